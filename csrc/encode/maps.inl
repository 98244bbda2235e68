// Linear maps of rows: a blocked matrix product in float32, and the fast Walsh-Hadamard transform.

namespace encode {

// y += matrix x, in tiles of ROWS rows by TILE vectors of tokens

inline Wide broadcast(float number) { return splat(number); }
inline WideInts broadcast(int32_t number) { return filled<WideInts>(number); }
inline Wide add_products(Wide sums, Wide a, Wide b) { return sums + a * b; }

// Products of pairs of 16-bit integers, where they take half of the time of floats
#if defined(__AVX512VNNI__)
constexpr bool HAS_PAIRS = true;
inline WideInts add_products(WideInts sums, WideInts a, WideInts b) {
    return (WideInts)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
}
#else
constexpr bool HAS_PAIRS = false;
#endif

// x has TILE_TOKENS columns, y has BLOCK.
template <int ROWS, class Number>
inline void multiply_tile(const Number* matrix, int64_t stride, int64_t inner, const Number* x, Number* y) {
    using Vector = decltype(broadcast(Number()));
    Vector sums[ROWS][TILE];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < TILE; ++v) sums[r][v] = load<Vector>(y + r * BLOCK + v * WIDTH);
    for (int64_t i = 0; i < inner; ++i) {
        Vector row[TILE];
        for (int v = 0; v < TILE; ++v) row[v] = load<Vector>(x + i * TILE_TOKENS + v * WIDTH);
        for (int r = 0; r < ROWS; ++r) {
            const Vector factor = broadcast(matrix[r * stride + i]);
            for (int v = 0; v < TILE; ++v) sums[r][v] = add_products(sums[r][v], factor, row[v]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < TILE; ++v) store(y + r * BLOCK + v * WIDTH, sums[r][v]);
}

// `matrix` is [outer, inner], its rows `stride` apart; numbers are floats, or pairs of integers.
template <class Number>
inline void multiply_add(const Number* matrix, int64_t stride, int64_t outer, int64_t inner, const Number* x,
                         Number* y) {
    constexpr int ROWS = 4;
    constexpr int64_t INNER = 128;  // whose columns stay in the first cache
    alignas(64) Number columns[INNER * TILE_TOKENS];
    for (int64_t first = 0; first < inner; first += INNER) {
        const int64_t count = inner - first < INNER ? inner - first : INNER;
        for (int64_t t = 0; t < BLOCK; t += TILE_TOKENS) {
            for (int64_t i = 0; i < count; ++i)
                __builtin_memcpy(columns + i * TILE_TOKENS, x + (first + i) * BLOCK + t, sizeof(Wide) * TILE);
            int64_t r = 0;
            for (; r + ROWS <= outer; r += ROWS)
                multiply_tile<ROWS>(matrix + r * stride + first, stride, count, columns, y + r * BLOCK + t);
            for (; r < outer; ++r)
                multiply_tile<1>(matrix + r * stride + first, stride, count, columns, y + r * BLOCK + t);
        }
    }
}

// Walsh-Hadamard

// The stages of RADIX rows that lie `step` apart.
template <int RADIX>
inline void butterfly(float* rows, int64_t step) {
    over_row([&](int t) {
        Wide x[RADIX];
        for (int i = 0; i < RADIX; ++i) x[i] = wide(rows + i * step * BLOCK + t);
#pragma GCC unroll 4
        for (int half = 1; half < RADIX; half *= 2) {
#pragma GCC unroll 8
            for (int i = 0; i < RADIX; ++i) {
                if (i & half) continue;
                const Wide sum = x[i] + x[i + half], difference = x[i] - x[i + half];
                x[i] = sum;
                x[i + half] = difference;
            }
        }
        for (int i = 0; i < RADIX; ++i) store(rows + i * step * BLOCK + t, x[i]);
    });
}

template <int RADIX>
inline int64_t stages(float* rows, int64_t size, int64_t step) {
    for (; step * RADIX <= size; step *= RADIX)
        for (int64_t first = 0; first < size; first += step * RADIX)
            for (int64_t i = first; i < first + step; ++i) butterfly<RADIX>(rows + i * BLOCK, step);
    return step;
}

// Of `size` rows, a power of two; not normalised.
inline void walsh_hadamard(float* rows, int64_t size) {
    stages<2>(rows, size, stages<4>(rows, size, stages<8>(rows, size, 1)));
}

// Orthonormal Hadamard matrices of `size` along the diagonal.
inline void hadamard_blocks(float* rows, int64_t dim, int64_t size) {
    const float factor = 1 / __builtin_sqrtf(static_cast<float>(size));
    for (int64_t i = 0; i < dim * BLOCK; i += WIDTH) store(rows + i, wide(rows + i) * factor);
    for (int64_t first = 0; first < dim; first += size) walsh_hadamard(rows + first * BLOCK, size);
}

// A randomised Hadamard sketch: signs, a transform and a choice of its rows for each of the copies of x.
inline void sketch(const QjlMap& map, int64_t dim, const float* x, float* transformed, float* y) {
    for (int64_t first = 0; first < map.rows; first += map.size) {
        const float* flips = map.flips + first / map.size * dim;
        for (int64_t i = 0; i < dim; ++i)
            over_row([&](int t) { store(transformed + i * BLOCK + t, wide(x + i * BLOCK + t) * flips[i]); });
        zero(transformed + dim * BLOCK, (map.size - dim) * BLOCK);
        walsh_hadamard(transformed, map.size);
        for (int64_t r = first; r < map.rows && r < first + map.size; ++r)
            __builtin_memcpy(y + r * BLOCK, transformed + map.order[r] * BLOCK, BLOCK * sizeof(float));
    }
}

}  // namespace encode
