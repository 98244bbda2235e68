// The fused decode step: what Python passes to it, and what one instruction set is asked for.
#pragma once

#include <stdint.h>

// Packed keys or values of a layer: code_dim coordinates, each a sum of nibble look-ups, times a scale per token (and
// group of coordinates), plus a middle where there is one; `map` takes a query to that space, and, transposed, sums
// back.
// Strides count bytes over head and page. A page has P tokens.
struct QjlSide {
    const uint8_t* codes;   // [nibbles / 2][P] in each page
    const uint8_t* scale;   // [groups][P]: 8-bit logarithms where there are units, else float16
    const uint8_t* middle;  // [groups][P] float16, or null
    const float* unit;      // [heads], or null
    const void* map;        // [heads or 1][code_dim][head_dim], float16 or float32
    const float* mean;      // [heads][head_dim], or null
    int64_t codes_stride[2], scale_stride[2], middle_stride[2];
    int64_t map_stride;  // numbers from head to head, 0 for one map
    int64_t map_is_half;
    int64_t nibbles, groups, code_dim, head_dim;
    int64_t code_stride;  // heads share a code: 0, each has its own: 1

    // Keys: nibble j adds entries[j][i][nibble] times coordinate coordinates[j][i] of the query
    const int16_t* coordinates;  // [heads or 1][nibbles][slots]
    const uint16_t* entries;     // float16 [heads or 1][nibbles][slots][16]
    int64_t slots;

    // Values, group by group; a coordinate may be in several
    const struct QjlQuad* quads;
    int64_t quad_count;
    const float* mean_energy;  // [heads] of the mean, in those that y_hat has on average; or null

    double tolerance;  // how far a row of the result may be off, in relation to its norm
};

// Four coordinates of values: coordinate c is step * (tables[2 c][nibble sources[2 c]] + tables[2 c + 1][...]).
struct QjlQuad {
    int8_t tables[8][16];    // whose sums of two fit 8 bits
    int32_t sources[8];      // nibbles
    int32_t coordinates[4];  // -1: none
    int32_t group;
    float step;
    int32_t kind;  // which look-ups read the same nibbles, see QjlKind
};

// Nibbles a, A, b, B, ... of the quad: capital ones are the high ones of their bytes, small ones the low ones, and x and
// y any. A look-up that is not named has a table of zeros.
enum QjlKind : int32_t {
    QJL_ANY,         // eight of any
    QJL_TWO_CHAIN,   // (A, b) (A, b) (b, B) (b, B)
    QJL_TWO_LEVELS,  // (a) (a) (A) (A)
    QJL_ONE_LEVELS,  // (a) (A) (b) (B)
    QJL_FOUR_CHAIN,  // (x, y) four times
    QJL_ONE_CHAIN,   // (A, b) (b, B) (B, c) (c, C)
};

// Tokens in full precision by slot, strides in numbers over head and slot.
struct QjlExact {
    void *keys, *values;
    int64_t key_stride[2], value_stride[2];
    int64_t slots;
    int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16, also of queries, fresh tokens and results
};

// Tokens for the last slots of each row, one for each query, of the type of the exact ones; strides in numbers over
// batch, head and token.
struct QjlFresh {
    const void *keys, *values;  // null: none
    int64_t key_stride[3], value_stride[3];
};

// What a mean that RoPE turns adds to the scores of a span of four blocks, relative to its centre. Slow frequencies
// share 16 functions, a fast one has its own; functions come two by two, and 16384 stands for 1 in their tables.
struct QjlTurn {
    const float* inv_freq;       // [pairs], in double precision below
    const float* step;           // [2][pairs]: cos and sin of 256 inv_freq
    const double* anchor_step;   // the same of 8 * 256 inv_freq
    const int32_t* coordinates;  // [2][pairs]: first and second coordinate of each pair
    const int16_t* down;  // [(pairs - direct) / 2, rounded up][cosine, sine][16][2 pairs]: what slow frequencies have
                          // of each function
    const int16_t* up;    // [(16 + direct) / 2, rounded up][cosine, sine][128][2 functions]: shared ones, then those of
                          // fast frequencies, at half a token, one and a half, ... by lanes
    const float* bounds;  // [pairs]: what a modulus of 1 takes, at most, of the range of integers
    int64_t pairs, direct;
    float scaling;
};

// Which tokens of the pools each row has: packed ones from skip to length, and exact ones.
struct QjlRows {
    const int32_t* table;           // [batch][capacity]: pages; -1: a hole, whose tokens are not packed
    const int32_t *lengths, *skip;  // [batch]
    const int64_t* origins;         // [batch]: position of token 0
    const int32_t* slots;           // [batch][room]; -1: no token
    const int32_t* counts;          // [batch]: slots in use, those of the queries last
    int64_t capacity, room;
};

struct QjlStep {
    QjlSide keys, values;
    int64_t page_tokens, page_count;  // tokens of a page, pages of the pool
    QjlExact exact;
    const float* bias;        // of the tokens of the table, then of the slots, or null
    int64_t bias_stride[4];   // in numbers over batch, query head, query, token
    const QjlTurn* turn;      // null: the keys' mean is added as it is
    int64_t heads, blocks_per_split;  // of a row, at least

    // What changes from call to call lies together, in words, addresses first: Python writes it at once.
    uint8_t* room;  // on a boundary of 64 bytes
    int64_t room_bytes;
    int64_t splits;     // of a row, at most
    const void* query;  // [batch][query heads][queries][head_dim]
    void* out;          // [batch][query heads][queries][head_dim of the values]
    QjlFresh fresh;
    const QjlRows* of_rows;
    int64_t batch, rows, queries;         // rows = group x queries, queries fastest
    int64_t query_type, query_stride[3];  // in numbers over batch, query head, query
    int64_t out_type, out_stride[3];

    float scaling, softcap;  // softcap 0: none
    float* lse;              // [batch][heads][rows], or null
    float* scores;           // [batch][heads][rows][capacity * page_tokens]: packed tokens alone; null: the whole step
};

QJL_EXPORT int64_t qjl_step(const QjlStep* step, int64_t threads);
