// AVX2 with FMA, F16C and BMI2.
#include <immintrin.h>

#include "kernels.h"

namespace qjl {
namespace {

#include "avx2.inl"

}  // namespace

constinit const Kernels avx2_kernels = table_named("avx2");

}  // namespace qjl
