// What the units with vectors of 256 bits are made of; included within their namespace.

constexpr int LANES = 8, VECTORS = 2;

typedef float Floats __attribute__((vector_size(32)));

struct Index {
    __m256i within_half;  // the lowest three bits count
    __m256 is_upper;      // the sign counts
};

struct Table {
    __m256 lower, upper;
};

inline __m256i eight_bytes(const uint8_t* bytes) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
}

inline Table load_table(const float* entries) { return {_mm256_loadu_ps(entries), _mm256_loadu_ps(entries + 8)}; }

inline Index low_index(const uint8_t* bytes) {
    const __m256i wide = eight_bytes(bytes);
    return {wide, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 28))};
}

inline Index high_index(const uint8_t* bytes) {
    const __m256i wide = eight_bytes(bytes);
    return {_mm256_srli_epi32(wide, 4), _mm256_castsi256_ps(_mm256_slli_epi32(wide, 24))};
}

inline Floats lookup(const Table& table, const Index& index) {
    const __m256 lower = _mm256_permutevar8x32_ps(table.lower, index.within_half);
    const __m256 upper = _mm256_permutevar8x32_ps(table.upper, index.within_half);
    return _mm256_blendv_ps(lower, upper, index.is_upper);
}

#include "vectors.inl"
#include "nibbles_avx2.inl"
#include "unit.inl"
