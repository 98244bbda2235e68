// Signs of the products of a matrix and tokens, from integers of 16 bits.
//
// Tokens and rows of the matrix are scaled to NORM and rounded. That changes a product of d terms by at most
// sqrt(d) NORM + d / 4; those that are no larger, one or two of 256, are taken again in float32.

namespace encode {

constexpr float NORM = 32700;  // integers fit 16 bits, products 31
constexpr float ROUNDER = 0x1.8p23f;  // added to a number, it leaves the nearest integer in the lower half of the bits

// The rows of `matrix [rows, dim]`; dim is a multiple of EIGHT.
inline void round_matrix(const float* matrix, int64_t rows, int64_t dim, int16_t* integers) {
    for (int64_t r = 0; r < rows; ++r, matrix += dim, integers += dim) {
        Octet squared{};
        for (int64_t i = 0; i < dim; i += EIGHT) squared += load<Octet>(matrix + i) * load<Octet>(matrix + i);
        const float scale = NORM / __builtin_sqrtf(sum(squared));
        for (int64_t i = 0; i < dim; i += EIGHT) {
            const auto numbers = (OctetInts)(load<Octet>(matrix + i) * scale + ROUNDER);
            store(integers + i, __builtin_convertvector(numbers, OctetShorts));
        }
    }
}

// Tokens of these norms, from `rows [dim, 64]` to rows of pairs [dim / 2, 64].
inline void round_tokens(const float* rows, int64_t dim, const float* norms, int32_t* pairs) {
    over_row([&](int t) {
        const Wide norm = wide(norms + t), scale = norm > 0 ? NORM / norm : Wide{};
        for (int64_t i = 0; i < dim; i += 2) {
            const auto first = (WideInts)(wide(rows + i * BLOCK + t) * scale + ROUNDER);
            const auto second = (WideInts)(wide(rows + (i + 1) * BLOCK + t) * scale + ROUNDER);
            store(pairs + i / 2 * BLOCK + t, (first & 0xffff) | second << 16);
        }
    });
}

template <class Stored>
float product(const float* row, const Stored* token, int64_t dim) {
    Wide sums{};
    for (int64_t i = 0; i < dim; i += WIDTH) {
        sums += first_widened(row + i, dim - i) * first_widened(token + i, dim - i);
    }
    float total = 0;
    for (int lane = 0; lane < WIDTH; ++lane) total += sums[lane];
    return total;
}

inline float product(const float* row, const Tokens& tokens, int64_t t) {
    const QjlTokens& pool = tokens.pool;
    const int64_t first = tokens.offset(t);
    switch (pool.type) {
        case QJL_FLOAT32: return product(row, static_cast<const float*>(pool.data) + first, pool.dim);
        case QJL_BFLOAT16: return product(row, static_cast<const Bfloat16*>(pool.data) + first, pool.dim);
        default: return product(row, static_cast<const Half*>(pool.data) + first, pool.dim);
    }
}

struct SignsAndDoubts {
    uint8_t signs[BLOCK], doubts[BLOCK];
};

// Of eight rows of sums, one bit each.
inline SignsAndDoubts signs_of(const int32_t* sums, int32_t doubtful) {
    SignsAndDoubts found;
    over_row([&](int t) {
        WideInts signs{}, doubts{};
        for (int place = 0; place < 8; ++place) {
            const WideInts sum = load<WideInts>(sums + place * BLOCK + t);
            signs |= (sum >= 0) & (1 << place);
            doubts |= ((sum < 0 ? -sum : sum) <= doubtful) & (1 << place);
        }
        store(found.signs + t, __builtin_convertvector(signs, WideBytes));
        store(found.doubts + t, __builtin_convertvector(doubts, WideBytes));
    });
    return found;
}

// Calls `function(t, place)` for every bit of the bytes of 64 tokens.
template <class Function>
inline void over_bits(const uint8_t* bytes, Function function) {
    for (int t = 0; t < BLOCK; t += 8)
        for (uint64_t left = load<uint64_t>(bytes + t); left; left &= left - 1)
            function(t + __builtin_ctzll(left) / 8, __builtin_ctzll(left) % 8);
}

inline void pack_product_signs(const int32_t* sums, const float* matrix, int64_t count, const Tokens& tokens,
                               uint8_t* codes) {
    const float dim = static_cast<float>(tokens.pool.dim);
    const auto doubtful = static_cast<int32_t>(__builtin_sqrtf(dim) * NORM + dim / 4) + 1;
    for (int64_t j = 0; j < count / 8; ++j) {
        SignsAndDoubts found = signs_of(sums + 8 * j * BLOCK, doubtful);
        over_bits(found.doubts, [&](int t, int place) {
            const bool is_positive = product(matrix + (8 * j + place) * tokens.pool.dim, tokens, t) >= 0;
            found.signs[t] = static_cast<uint8_t>((found.signs[t] & ~(1 << place)) | is_positive << place);
        });
        __builtin_memcpy(codes + j * BLOCK, found.signs, BLOCK);
    }
}

}  // namespace encode
