// Plain C++ for any machine.
#include "kernels.h"

namespace qjl {
namespace {

constexpr int LANES = 1, VECTORS = 4;

using Floats = float;
using Index = int;
using Table = const float*;

inline Table load_table(const float* entries) { return entries; }
inline Index low_index(const uint8_t* byte) { return *byte & 15; }
inline Index high_index(const uint8_t* byte) { return *byte >> 4; }
inline Floats lookup(Table table, Index index) { return table[index]; }

#include "vectors.inl"
#include "nibbles_scalar.inl"
#include "unit.inl"

}  // namespace

constinit const Kernels scalar_kernels = table_named("scalar");

}  // namespace qjl
