// Signs of a sketch, four to a nibble; of several orthogonal blocks they are refined (SignCode of src/qjl/codebook.py).

namespace encode {

constexpr int REFINEMENTS = 6;

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

// A token's z, its signs s, and others = (gram - I) s: what the other blocks' signs decode to.
struct Token {
    float *z, *signs, *others;
};

inline float dot(const float* x, const float* y, int64_t count) {
    Wide sums[TILE] = {};
    int64_t i = 0;
    for (; i + TILE * WIDTH <= count; i += TILE * WIDTH)
        for (int v = 0; v < TILE; ++v) sums[v] += wide(x + i + v * WIDTH) * wide(y + i + v * WIDTH);
    float total = 0;
    for (; i < count; ++i) total += x[i] * y[i];
    for (int v = 1; v < TILE; ++v) sums[0] += sums[v];
    for (int lane = 0; lane < WIDTH; ++lane) total += sums[0][lane];
    return total;
}

inline void add_scaled(float* to, const float* x, float factor, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] += factor * x[i];
}

// Turns sign i over, and what it adds to the other blocks.
inline void flip(const QjlPart& part, const Token& token, int64_t i, int64_t first, int64_t last) {
    token.signs[i] = -token.signs[i];
    const float* row = part.gram + i * part.dim;
    const float change = 2 * token.signs[i];
    add_scaled(token.others, row, change, first);
    add_scaled(token.others + last, row + last, change, part.dim - last);
}

// The best signs of one block beside those of the others; whether any changed.
inline bool refine_block(const QjlPart& part, const Token& token, float c, int64_t first, int64_t last) {
    bool changed = false;
    for (int64_t start = first; start < last; start += 8) {
        uint8_t is_wrong[8];
        for (int64_t i = 0; i < 8; ++i) {
            const bool is_positive = token.z[start + i] >= c * token.others[start + i];
            is_wrong[i] = is_positive != (token.signs[start + i] > 0);
        }
        uint64_t left;
        __builtin_memcpy(&left, is_wrong, sizeof left);
        changed |= left != 0;
        for (int64_t i = 0; left; ++i, left >>= 8)
            if (left & 1) flip(part, token, start + i, first, last);
    }
    return changed;
}

inline void refine(const QjlPart& part, const Token& token) {
    for (int sweep = 0; sweep < REFINEMENTS; ++sweep) {
        const float squared = part.dim + dot(token.others, token.signs, part.dim);  // |S^T s|^2 / d
        const float c = dot(token.z, token.signs, part.dim) / squared;
        bool changed = false;
        for (int64_t first = 0; first < part.dim; first += part.block) {
            const int64_t last = first + part.block < part.dim ? first + part.block : part.dim;
            changed |= refine_block(part, token, c > __FLT_MIN__ ? c : __FLT_MIN__, first, last);
        }
        if (!changed) return;
    }
}

// What each block's signs are up against, from those of all the others.
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

// `room` holds four times as many numbers as z.
inline void refine_rows(const QjlPart& part, float* z, float* room) {
    const int64_t size = part.dim * BLOCK;
    float *others = room, *z_of = room + size, *signs_of = room + 2 * size, *others_of = room + 3 * size;
    store_tokens(z, part.dim, z_of);
    to_signs(z, part.dim);
    add_other_blocks(part, z, others);
    store_tokens(z, part.dim, signs_of);
    store_tokens(others, part.dim, others_of);
    for (int64_t t = 0; t < BLOCK; ++t)
        refine(part, {z_of + t * part.dim, signs_of + t * part.dim, others_of + t * part.dim});
    load_rows(signs_of, part.dim, part.dim, z);
}

// Codes z, and puts the signs in its place.
inline void encode_signs(const QjlPart& part, float* z, float* room, uint8_t* codes) {
    if (part.gram) refine_rows(part, z, room);
    pack_signs(z, part.nibbles / 2, codes);
    to_signs(z, part.dim);
}

}  // namespace encode
