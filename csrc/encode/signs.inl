// Signs of a sketch, four to a nibble; of several orthogonal blocks they are refined (SignCode of src/qjl/codebook.py).

namespace encode {

constexpr int SPACE = 16;  // between tokens, so that not all of them meet in a few sets of the cache

inline void pack_signs(const float* z, int64_t bytes, uint8_t* codes) {
    for (int64_t j = 0; j < bytes; ++j) {
        over_row([&](int t) {
            WideInts byte{};
            for (int place = 0; place < 8; ++place)
                byte |= (wide(z + (8 * j + place) * BLOCK + t) >= 0) & (1 << place);
            store(codes + j * BLOCK + t, __builtin_convertvector(byte, WideBytes));
        });
    }
}

inline void to_signs(float* z, int64_t count) {
    for (int64_t i = 0; i < count * BLOCK; i += WIDTH) store(z + i, wide(z + i) >= 0 ? splat(1) : splat(-1));
}

// A token's z, its signs s, and others = (gram - I) s: what the signs of the other blocks decode to.
struct Token {
    float *z, *signs, *others;
};

// c of the least |y - c S^T s|, at least the smallest positive number.
inline float best_factor(const QjlPart& part, const Token& token) {
    Octet along{}, squared{};
    for (int64_t i = 0; i < part.dim; i += EIGHT) {
        const Octet signs = load<Octet>(token.signs + i);
        along += load<Octet>(token.z + i) * signs;
        squared += load<Octet>(token.others + i) * signs;
    }
    const float c = sum(along) / (part.dim + sum(squared));
    return c > __FLT_MIN__ ? c : __FLT_MIN__;
}

// Turns sign i over, and with it what the blocks other than its own, from `first` to `last`, are up against.
inline void flip(const QjlPart& part, const Token& token, int64_t i, int64_t first, int64_t last) {
    token.signs[i] = -token.signs[i];
    const float change = 2 * token.signs[i];
    const float* row = part.gram + i * part.dim;
    const auto add = [&](int64_t j) {
        store(token.others + j, load<Octet>(token.others + j) + change * load<Octet>(row + j));
    };
    for (int64_t j = 0; j < first; j += EIGHT) add(j);
    for (int64_t j = last; j < part.dim; j += EIGHT) add(j);
}

// The best signs of one block beside those of the others; whether any changed.
inline bool refine_block(const QjlPart& part, const Token& token, float c, int64_t first, int64_t last) {
    bool changed = false;
    for (int64_t start = first; start < last; start += EIGHT) {
        const Octet target = load<Octet>(token.z + start) - c * load<Octet>(token.others + start);
        const OctetInts is_wrong = (target >= 0) ^ (load<Octet>(token.signs + start) > 0);
        const OctetBytes bytes = __builtin_convertvector(is_wrong, OctetBytes);
        uint64_t wrong = load<uint64_t>(&bytes);
        changed |= wrong != 0;
        while (wrong) {
            const int place = __builtin_ctzll(wrong) / 8;
            flip(part, token, start + place, first, last);
            wrong &= ~(0xffull << 8 * place);
        }
    }
    return changed;
}

inline void refine(const QjlPart& part, const Token& token) {
    bool changed = true;
    for (int sweep = 0; sweep < part.sweeps && changed; ++sweep) {
        const float c = best_factor(part, token);
        changed = false;
        for (int64_t first = 0; first < part.dim; first += part.block) {
            const int64_t last = first + part.block < part.dim ? first + part.block : part.dim;
            changed |= refine_block(part, token, c, first, last);
        }
    }
}

inline void add_other_blocks(const QjlPart& part, const float* signs, float* others) {
    zero(others, part.dim * BLOCK);
    for (int64_t first = 0; first < part.dim; first += part.block) {
        const int64_t last = first + part.block < part.dim ? first + part.block : part.dim;
        const float* rows = part.gram + first * part.dim;
        float* own = others + first * BLOCK;
        multiply_add(rows, part.dim, last - first, first, signs, own);
        multiply_add(rows + last, part.dim, last - first, part.dim - last, signs + last * BLOCK, own);
    }
}

inline int64_t refinement_floats(const QjlPart& part) { return BLOCK * (part.dim + 3 * (part.dim + SPACE)); }

inline void refine_rows(const QjlPart& part, float* z, float* room) {
    const int64_t stride = part.dim + SPACE;
    float *others = room, *z_of = others + BLOCK * part.dim;
    float *signs_of = z_of + BLOCK * stride, *others_of = signs_of + BLOCK * stride;
    store_tokens(z, stride, part.dim, z_of);
    to_signs(z, part.dim);
    add_other_blocks(part, z, others);
    store_tokens(z, stride, part.dim, signs_of);
    store_tokens(others, stride, part.dim, others_of);
    for (int64_t t = 0; t < BLOCK; ++t)
        refine(part, {z_of + t * stride, signs_of + t * stride, others_of + t * stride});
    load_rows([&](int t) { return signs_of + t * stride; }, part.dim, z);
}

// Codes z, and puts the signs in its place.
inline void encode_signs(const QjlPart& part, float* z, float* room, uint8_t* codes) {
    if (part.gram) refine_rows(part, z, room);
    pack_signs(z, part.nibbles / 2, codes);
    to_signs(z, part.dim);
}

}  // namespace encode
