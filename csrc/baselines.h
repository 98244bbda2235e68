// What the benchmarks compare with: attention over float16 keys and values, and RaBitQ's scan by popcounts. Not used by
// the backend.
#pragma once

#include "qjl_cpu.h"

QJL_EXPORT int qjl_baselines_run_here();  // whether this machine has the instructions that they were compiled with

// One query token against float16 keys and values: softmax(scaling q k) v.
struct QjlFlashDecode {
    const float* query;             // [heads, group, head_dim]
    const uint16_t *keys, *values;  // [heads, tokens, head_dim]
    float* out;                     // [heads, group, head_dim]
    int64_t heads, group, tokens, head_dim;  // head_dim a multiple of 8
    float scaling;
};

// scores = scale * <q, signs>, the query in four bits per coordinate.
struct QjlPopcountScan {
    const float* query;    // [heads, group, m]
    const uint8_t* signs;  // [heads, tokens, m / 8], a set bit for +1
    const float* scale;    // [heads, tokens]
    const float* ones;     // [heads, tokens]: set bits of a token, which RaBitQ stores too
    float* scores;         // [heads, group, tokens]
    int64_t heads, group, tokens, m;  // tokens a multiple of 4; m 128, or a multiple of 256 up to 2048
};

// A read of memory that does nothing else.
struct QjlRead {
    const float* numbers;
    int64_t count;
    float* sums;  // [threads][4]: so that no read can be left out
};

QJL_EXPORT int64_t qjl_flash_decode(const QjlFlashDecode* operation, int64_t threads);
QJL_EXPORT int64_t qjl_popcount_scan(const QjlPopcountScan* operation, int64_t threads);
QJL_EXPORT int64_t qjl_read(const QjlRead* operation, int64_t threads);
