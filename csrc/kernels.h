// The kernels of one instruction set, as a table of functions.
#pragma once

#include "qjl_cpu.h"

namespace qjl {

constexpr int64_t BLOCK = 64;

struct Range {
    int64_t first, last;
};

struct Kernels {
    const char* name;

    // step.inl: over one KV head, then over one split of its packed tokens, then over one KV head
    int64_t (*step_room)(const QjlStep&, int64_t workers);  // bytes
    void (*step_ask)(const QjlStep&, int64_t pair, int worker);
    void (*step_packed)(const QjlStep&, int64_t item, int worker);
    void (*step_finish)(const QjlStep&, int64_t pair, int worker);

    // encode.inl: floats of room for one worker, and some blocks of one head; false where a token is not finite
    int64_t (*encode_room)(const QjlJob&);
    bool (*encode)(const QjlEncode&, const QjlJob&, int64_t head, Range, float* room);

    // decode.inl: floats of room for one worker, and a range of the batch * heads * blocks blocks
    int64_t (*decode_room)(const QjlDecode&);
    void (*decode)(const QjlDecode&, Range, float* room);
};

bool runs_avx2();  // FMA, F16C and BMI2 included

extern const Kernels scalar_kernels, avx2_kernels, avxvnni_kernels, avx512_kernels, neon_kernels, neondot_kernels;

}  // namespace qjl
