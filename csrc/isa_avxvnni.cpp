// AVX2 with FMA, F16C, BMI2 and AVX-VNNI.
#include <immintrin.h>

#include "kernels.h"

namespace qjl {
namespace {

#include "avx2.inl"

}  // namespace

constinit const Kernels avxvnni_kernels = table_named("avxvnni");

}  // namespace qjl
