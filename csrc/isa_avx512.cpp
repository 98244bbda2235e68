// AVX-512 with BW, DQ, VL, VBMI and VNNI.
#include <immintrin.h>

#include "kernels.h"

namespace qjl {
namespace {

constexpr int LANES = 16, VECTORS = 4;

typedef float Floats __attribute__((vector_size(64)));
using Index = __m512i;  // the lowest four bits count
using Table = __m512;

inline Index low_index(const uint8_t* bytes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

inline Index high_index(const uint8_t* bytes) { return _mm512_srli_epi32(low_index(bytes), 4); }
inline Table load_table(const float* entries) { return _mm512_loadu_ps(entries); }
inline Floats lookup(Table table, Index index) { return _mm512_permutexvar_ps(index, table); }

#include "vectors.inl"
#include "nibbles_avx512.inl"
#include "unit.inl"

}  // namespace

constinit const Kernels avx512_kernels = table_named("avx512");

}  // namespace qjl
