// NEON, which every aarch64 has.
#include "isa_neon.inl"

namespace qjl {

constinit const Kernels neon_kernels = table_named("neon");

}  // namespace qjl
