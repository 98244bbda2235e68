// What all units for NEON share.
#define QJL_NEON
#include <arm_neon.h>

#include "kernels.h"

namespace qjl {
namespace {

constexpr int LANES = 4, VECTORS = 4;

typedef float Floats __attribute__((vector_size(16)));
using Index = uint8x16_t;  // the places of the four bytes of each entry
using Table = uint8x16x4_t;

inline Table load_table(const float* entries) { return vld1q_u8_x4(reinterpret_cast<const uint8_t*>(entries)); }

inline Index bytes_of_entries(uint32x4_t nibbles) {
    return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), nibbles, 0x04040404));
}

inline uint32x4_t four_bytes(const uint8_t* bytes) {
    uint32_t word;
    __builtin_memcpy(&word, bytes, sizeof word);
    return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(word))));
}

inline Index low_index(const uint8_t* bytes) {
    return bytes_of_entries(vandq_u32(four_bytes(bytes), vdupq_n_u32(15)));
}

inline Index high_index(const uint8_t* bytes) { return bytes_of_entries(vshrq_n_u32(four_bytes(bytes), 4)); }

inline Floats lookup(const Table& table, Index index) {
    return (Floats)vreinterpretq_f32_u8(vqtbl4q_u8(table, index));
}

#include "vectors.inl"
#include "nibbles_neon.inl"
#include "unit.inl"

}  // namespace
}  // namespace qjl
