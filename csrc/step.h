// The fused decode step: what Python passes to it, and what one instruction set is asked for.
#pragma once

#include <stdint.h>

// Packed keys or values of a layer: code_dim coordinates, each a sum of nibble look-ups, times a scale per token (and
// group of coordinates), plus a middle where there is one; `map` takes a query to that space, and, transposed, sums
// back.
// Strides count bytes over batch, head and block; of a pool over nothing, head and page, which has more or fewer tokens
// than the 64 of a block.
struct QjlSide {
    const uint8_t* codes;   // [nibbles / 2][64] in each block
    const uint8_t* scale;   // [groups][64]: 8-bit logarithms where there are units, else float16
    const uint8_t* middle;  // [groups][64] float16, or null
    const float* unit;      // [heads], or null
    const void* map;        // [heads or 1][code_dim][head_dim], float16 or float32
    const float* mean;      // [heads][head_dim], or null
    int64_t codes_stride[3], scale_stride[3], middle_stride[3];
    int64_t map_stride;  // numbers from head to head, 0 for one map
    int64_t map_is_half;
    int64_t nibbles, groups, code_dim, head_dim;
    int64_t code_stride;  // heads share a code: 0, each has its own: 1

    // Keys: nibble j adds entries[j][i][nibble] times coordinate coordinates[j][i] of the query
    const int16_t* coordinates;  // [heads or 1][nibbles][slots]
    const uint16_t* entries;     // float16 [heads or 1][nibbles][slots][16]
    int64_t slots;

    // Values: each pair adds integers by nibble to two coordinates
    const struct QjlPair* pairs;
    int64_t pair_count;
};

// first = tables[0][s0] + tables[1][s1], second = tables[2][s2] + tables[3][s3], s the nibbles `sources`.
struct QjlPair {
    int8_t tables[4][16];
    int32_t sources[4];
    int32_t coordinates[2];  // -1: none
    int32_t group;
    float step;
    int32_t kind;  // 0: s0 = s2, s1 = s3; 1: tables 1 and 3 are zero; 2: neither
};

// Tokens in full precision, strides in numbers over batch, head and token.
struct QjlSegment {
    const void *keys, *values;
    int64_t key_stride[3], value_stride[3];
    int64_t tokens;
    int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16
    const float* bias;
    int64_t bias_stride[4];  // over batch, query head, query, token
};

// What a mean that RoPE turns adds to the scores of two blocks, relative to their centre.
struct QjlTurn {
    const float* inv_freq;      // [pairs], in double precision below
    const float* step;          // [2][pairs]: cos and sin of 128 inv_freq
    const double* anchor_step;  // the same of 8 * 128 inv_freq
    const int32_t* coordinates;                  // [2][pairs]: first and second coordinate of each pair
    const float* down;  // [(pairs - direct) / 4, rounded up][cosine, sine][RANK][4 pairs]: slow frequencies
    const float* up;    // [direct + RANK][cosine, sine][64]: at inv_freq times .5, 4.5, ... 60.5, 1.5, ...; then what
                        // slow frequencies share
    int64_t pairs, direct;
    float scaling;
};

// Where the tokens of each row lie in a pool; a row has those from skip to length.
struct QjlPages {
    const int32_t* table;  // [batch][capacity]
    const int32_t *lengths, *skip;  // [batch]
    const int64_t* origins;         // [batch]: position of token 0
    int64_t capacity, tokens;       // tokens of a page
    int64_t count;                  // of pages in the pool
};

struct QjlStep {
    QjlSide keys, values;
    const QjlPages* pages;  // null: blocks lie by their strides
    QjlSegment exact[2];
    int64_t exact_count;
    const float* bias;  // of the packed tokens, or null; strides as in QjlSegment
    int64_t bias_stride[4];
    const QjlTurn* turn;   // null: the keys' mean is added as it is
    const int64_t* first;  // [batch][blocks]: position of each block's first token; unused with pages
    int64_t blocks;        // of each row; unused with pages
    int64_t blocks_per_split, splits;  // with pages: at least, of a row; at most, of a row
    int64_t batch, heads, rows, queries;  // rows = group x queries, queries fastest
    const float* query;                   // [batch][heads][rows][head_dim]
    float scaling, softcap;               // softcap 0: none
    float* out;                           // [batch][heads][rows][head_dim of the values]
    float* lse;                           // [batch][heads][rows]
    float* scores;                        // [batch][heads][rows][blocks * 64]: the scan alone; null: the whole step
    uint8_t* room;  // on a boundary of 64 bytes
    int64_t room_bytes;
};

QJL_EXPORT int64_t qjl_step(const QjlStep* step, int64_t threads);
