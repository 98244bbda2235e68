// NEON with dot products of bytes, an option of Armv8.2 that almost all newer processors have.
#include "isa_neon.inl"

namespace qjl {

constinit const Kernels neondot_kernels = table_named("neondot");

}  // namespace qjl
