// Tokens as the encoders see them: a block of 64 tokens is rows, one for each coordinate, of 64 floats.

namespace encode {

constexpr int WIDTH = LANES < 4 ? 4 : LANES;         // floats in a vector
constexpr int TILE = LANES == 1 ? 2 : VECTORS;       // vectors that loops over tokens keep in registers
constexpr int64_t TILE_TOKENS = TILE * WIDTH;

typedef float Wide __attribute__((vector_size(4 * WIDTH)));
typedef int32_t WideInts __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t WideShorts __attribute__((vector_size(2 * WIDTH)));
typedef uint8_t WideBytes __attribute__((vector_size(WIDTH)));

// Eight numbers, which divide every dimension that packs into bytes.
constexpr int EIGHT = 8;
typedef float Octet __attribute__((vector_size(4 * EIGHT)));
typedef int32_t OctetInts __attribute__((vector_size(4 * EIGHT)));
typedef uint16_t OctetShorts __attribute__((vector_size(2 * EIGHT)));
typedef uint8_t OctetBytes __attribute__((vector_size(EIGHT)));

inline float sum(Octet x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

template <class Ints>
inline Ints filled(int32_t value) {
    return Ints{} + value;
}

inline Wide splat(float value) { return value - Wide{}; }  // less zero, which leaves even -0 as it is
inline Wide wide(const float* from) { return load<Wide>(from); }
inline Wide square_root(Wide x) {
    for (int lane = 0; lane < WIDTH; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
}

inline Wide smaller(Wide a, Wide b) { return a < b ? a : b; }

inline void zero(float* to, int64_t count) { __builtin_memset(to, 0, count * sizeof(float)); }

// Calls `function(t)` for the first token t of every vector of a row.
template <class Function>
inline void over_row(Function function) {
    for (int t = 0; t < BLOCK; t += WIDTH) function(t);
}

// Sums over coordinates of what `term(i, t)` gives for each vector of tokens.
template <class Term>
inline void sum_rows(int64_t count, float* sums, Term term) {
    for (int first = 0; first < BLOCK; first += TILE_TOKENS) {
        Wide tile[TILE] = {};
        for (int64_t i = 0; i < count; ++i)
            for (int v = 0; v < TILE; ++v) tile[v] += term(i, first + v * WIDTH);
        for (int v = 0; v < TILE; ++v) store(sums + first + v * WIDTH, tile[v]);
    }
}

template <int N>
struct Constant {
    static constexpr int VALUE = N;
};

// Entries of a table whose size is a power of two.
template <int ENTRIES>
inline Wide lookup(const float* table, WideInts index) {
    if constexpr (ENTRIES == 1) {
        return splat(*table);
    } else if constexpr (WIDTH == 4) {
#ifdef QJL_NEON
        if constexpr (ENTRIES == 16) return qjl::lookup(load_table(table), bytes_of_entries((uint32x4_t)index));
#endif
        return Wide{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
#ifdef __clang__  // which shuffles only by lanes that are known when compiling
    } else if constexpr (ENTRIES <= 2 * WIDTH) {
        Wide found;
        for (int lane = 0; lane < WIDTH; ++lane) found[lane] = table[index[lane] & (ENTRIES - 1)];
        return found;
#else
    } else if constexpr (ENTRIES <= WIDTH) {
        return __builtin_shuffle(wide(table), index);
    } else if constexpr (ENTRIES == 2 * WIDTH) {
        return __builtin_shuffle(wide(table), wide(table + WIDTH), index);
#endif
    } else {
        const Wide lower = lookup<ENTRIES / 2>(table, index), upper = lookup<ENTRIES / 2>(table + ENTRIES / 2, index);
        return (index & (ENTRIES / 2)) != 0 ? upper : lower;
    }
}

// Numbers of 16 bits

struct Half {
    uint16_t bits;
};

struct Bfloat16 {
    uint16_t bits;
};

inline Wide widened(const float* from) { return wide(from); }

inline Wide widened(const Bfloat16* from) {
    return (Wide)(__builtin_convertvector(load<WideShorts>(from), WideInts) << 16);
}

#if defined(__AVX512F__)
inline Wide widened(const Half* from) { return (Wide)_mm512_cvtph_ps((__m256i)load<WideShorts>(from)); }
#elif defined(__F16C__)
inline Wide widened(const Half* from) { return (Wide)_mm256_cvtph_ps((__m128i)load<WideShorts>(from)); }
#else
inline Wide widened(const Half* from) {
    const WideInts bits = __builtin_convertvector(load<WideShorts>(from), WideInts);
    const WideInts magnitude = bits & 0x7fff;
    const WideInts scaled = (WideInts)((Wide)(magnitude << 13) * 0x1p112f);  // subnormal ones come out right too
    const WideInts endless = (magnitude >= 0x7c00) & 0x7f800000;
    return (Wide)(scaled | endless | (bits & 0x8000) << 16);
}
#endif

// The bits of the nearest float16, the even one of two; clipped to the largest.
inline uint16_t rounded_half(float value) {
    constexpr float LARGEST = 65504.0f, LEAST_NORMAL = 0x1p-14f;
    const uint16_t sign = value < 0 ? 0x8000 : 0;
    const float magnitude = value < 0 ? -value : value;
    if (magnitude >= LARGEST) return sign | 0x7bff;
    if (magnitude < LEAST_NORMAL) return sign | static_cast<uint16_t>(__builtin_rintf(magnitude * 0x1p24f));
    uint32_t bits;
    __builtin_memcpy(&bits, &magnitude, sizeof bits);
    bits += 0xfff + (bits >> 13 & 1);
    return sign | static_cast<uint16_t>((bits >> 13) - (112 << 10));
}

inline float widened(uint16_t half) {
    const Half padded[WIDTH] = {{half}};
    return widened(padded)[0];
}

// Tokens to rows

template <int N, class Vector>
void transpose(Vector (&rows)[N]) {
    using Lanes = typename Count<N>::Up;
#pragma GCC unroll 8
    for (int stage = 1; stage < N; stage *= 2) {
        Vector turned[N];
#pragma GCC unroll 16
        for (int i = 0; i < N / 2; ++i) {
            turned[2 * i] = in_turn<0>(rows[i], rows[i + N / 2], Lanes());
            turned[2 * i + 1] = in_turn<N / 2>(rows[i], rows[i + N / 2], Lanes());
        }
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) rows[i] = turned[i];
    }
}

// The first `count` numbers, and zeros.
template <class Stored>
inline Wide first_widened(const Stored* from, int64_t count) {
    if (count >= WIDTH) return widened(from);
    Stored padded[WIDTH] = {};
    __builtin_memcpy(padded, from, count * sizeof(Stored));
    return widened(padded);
}

inline void store_first(float* to, Wide numbers, int64_t count) {
    if (count >= WIDTH) return store(to, numbers);
    __builtin_memcpy(to, &numbers, count * sizeof(float));
}

inline void widen(const Half* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += WIDTH) store_first(to + i, first_widened(from + i, count - i), count - i);
}

// 64 tokens of one head.
struct Tokens {
    const QjlTokens& pool;
    int64_t head;
    const int32_t* slots;

    int64_t offset(int64_t t) const { return head * pool.head_stride + slots[t] * pool.slot_stride; }
};

// `dim` numbers of each of 64 tokens to as many rows; `from(t)` is where a token lies.
template <class From>
inline void load_rows(From from, int64_t dim, float* rows) {
    for (int t = 0; t < BLOCK; t += WIDTH) {
        for (int64_t i = 0; i < dim; i += WIDTH) {
            const int64_t count = dim - i < WIDTH ? dim - i : WIDTH;
            Wide square[WIDTH];
            for (int lane = 0; lane < WIDTH; ++lane)
                square[lane] = first_widened(from(t + lane) + i, count);
            transpose(square);
            for (int lane = 0; lane < count; ++lane) store(rows + (i + lane) * BLOCK + t, square[lane]);
        }
    }
}

// The inverse.
inline void store_tokens(const float* rows, int64_t stride, int64_t dim, float* tokens) {
    for (int t = 0; t < BLOCK; t += WIDTH) {
        for (int64_t i = 0; i < dim; i += WIDTH) {
            const int64_t count = dim - i < WIDTH ? dim - i : WIDTH;
            Wide square[WIDTH] = {};
            for (int lane = 0; lane < count; ++lane) square[lane] = wide(rows + (i + lane) * BLOCK + t);
            transpose(square);
            for (int lane = 0; lane < WIDTH; ++lane)
                store_first(tokens + (t + lane) * stride + i, square[lane], count);
        }
    }
}

template <class Stored>
void load_rows(const Tokens& tokens, float* rows) {
    const Stored* data = static_cast<const Stored*>(tokens.pool.data);
    load_rows([&](int t) { return data + tokens.offset(t); }, tokens.pool.dim, rows);
}

inline WideInts are_endless(WideInts bits) { return (bits & 0x7f800000) == 0x7f800000; }

// Whether all numbers are finite; those that are not become 0.
inline bool keep_finite(float* rows, int64_t count) {
    WideInts found{};
    for (int64_t i = 0; i < count; i += WIDTH) found |= are_endless(load<WideInts>(rows + i));
    int32_t any = 0;
    for (int lane = 0; lane < WIDTH; ++lane) any |= found[lane];
    for (int64_t i = 0; any && i < count; i += WIDTH) {
        const auto bits = load<WideInts>(rows + i);
        store(rows + i, bits & ~are_endless(bits));
    }
    return !any;
}

// Whether all tokens are finite.
inline bool load_finite_rows(const Tokens& tokens, float* rows) {
    switch (tokens.pool.type) {
        case QJL_FLOAT32: load_rows<float>(tokens, rows); break;
        case QJL_BFLOAT16: load_rows<Bfloat16>(tokens, rows); break;
        default: load_rows<Half>(tokens, rows);
    }
    return keep_finite(rows, tokens.pool.dim * BLOCK);
}

// The mean, turned to each token's position

struct Angles {
    const float *cos, *sin;  // of the first pair at the first token of the block
    int64_t stride;          // from one pair to the next
};

inline Angles angles_of(const QjlEncode& operation, const QjlJob& job, int64_t block) {
    if (!job.cos) return {};
    return {job.cos + block * BLOCK, job.sin + block * BLOCK, operation.blocks * BLOCK};
}

inline void subtract_turned(const QjlMean& mean, const float* vector, const Angles& angles, float* rows) {
    for (int64_t pair = 0; pair < mean.pairs; ++pair) {
        const int64_t first = mean.interleaved ? 2 * pair : pair;
        const int64_t second = mean.interleaved ? 2 * pair + 1 : pair + mean.pairs;
        over_row([&](int t) {
            const Wide cos = wide(angles.cos + pair * angles.stride + t);
            const Wide sin = wide(angles.sin + pair * angles.stride + t);
            float *x = rows + first * BLOCK + t, *y = rows + second * BLOCK + t;
            store(x, wide(x) - (vector[first] * cos - vector[second] * sin));
            store(y, wide(y) - (vector[second] * cos + vector[first] * sin));
        });
    }
}

inline void subtract_mean(const QjlMean& mean, int64_t dim, int64_t head, const Angles& angles, float* rows) {
    if (!mean.vector) return;
    const float* vector = mean.vector + head * dim;
    subtract_turned(mean, vector, angles, rows);
    for (int64_t i = 2 * mean.pairs; i < dim; ++i)
        over_row([&](int t) { store(rows + i * BLOCK + t, wide(rows + i * BLOCK + t) - vector[i]); });
}

}  // namespace encode
