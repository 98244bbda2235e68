// The C interface of the library: what Python calls through ctypes.
//
// Arrays are contiguous unless strides are given; strides count elements. `threads` is the most threads to use.
//
// An operation returns 0 when it is done; the bytes of `room` that it needs where it was given fewer, and nothing has
// been done; or a negative number where its sizes do not fit each other, which qjl_refusal puts into words.
#pragma once

#include <stdint.h>

#define QJL_EXPORT extern "C" __attribute__((visibility("default")))

// Instruction sets

QJL_EXPORT const char* qjl_supported();  // names that run on this machine, separated by spaces, best last
QJL_EXPORT const char* qjl_selected();
QJL_EXPORT int qjl_select(const char* name);  // 0, or 1 where that name does not run here

// What Python compares and reads before the first call

QJL_EXPORT uint64_t qjl_abi();  // of all structs (abi.cpp)
QJL_EXPORT const char* qjl_refusal(int64_t returned);

struct QjlLimits {
    int64_t dim;      // coordinates of a part or of a group, whose places are kept in 16 bits
    int64_t threads;  // that share the work of an operation
};

QJL_EXPORT void qjl_limits(QjlLimits* limits);

// Packed codes

struct QjlCodes {  // uint8 [batch, heads, blocks, bytes, 64], the last two contiguous
    uint8_t* data;
    int64_t batch, heads, blocks, bytes;
    int64_t batch_stride, head_stride, block_stride;
};

// Encoding (encode.inl, grid.inl): blocks of 64 tokens of a pool to pages of another, for many layers at once

enum QjlType { QJL_FLOAT32, QJL_BFLOAT16, QJL_FLOAT16 };

struct QjlTokens {  // [slots, heads, dim], the last dimension contiguous
    const void* data;
    int64_t type;  // QjlType
    int64_t dim;
    int64_t head_stride, slot_stride, slot_count;
};

struct QjlMean {
    const float* vector;  // [heads, dim], or null
    int64_t pairs;        // of coordinates that turn, as the job tells
    int64_t interleaved;  // whether a pair is (2f, 2f + 1) and not (f, f + pairs)
};

struct QjlMap {  // a matrix per head, or a randomised Hadamard sketch: order(H flips x) for each copy of the tokens
    int64_t rows;
    const void* matrix;  // [heads, rows, dim], heads `head_stride` apart: float16 where `is_half`, otherwise float32
    int64_t is_half, head_stride;
    const float* flips;    // [copies, dim]
    const int32_t* order;  // [rows], rows of H
    int64_t size;          // of H, which is not normalised
};

enum QjlPartKind { QJL_LEVELS, QJL_TRELLIS, QJL_SIGNS };

struct QjlPart {   // encodes `dim` coordinates in `nibbles` nibbles
    int64_t kind;  // QjlPartKind
    int64_t dim, nibbles;
    const uint8_t* kinds;                         // levels: [heads, dim], heads `kind_stride` apart
    const int16_t *bit_coordinate, *bit_index;    // [heads, nibbles, 4], heads `place_stride` apart
    const float *tree, *levels, *patterns;        // [kinds, 256], see levels.inl; patterns are the bits of int32
    int64_t kind_stride, place_stride;
    const float *own, *next;                      // trellis: [16, width]
    int64_t width;
    const float* gram;                            // signs: [dim, dim], or null where they are not refined
    int64_t block, sweeps;                        // of rows that are orthogonal; over the blocks, at most
};

struct QjlRecipe {
    QjlCodes codes;  // of the pool: a page for each block
    QjlTokens tokens;
    QjlMean mean;
    QjlMap map;
    const QjlPart* parts;
    int64_t part_count;
    const float* gains;
    int64_t gain_count;
    const float* weights;  // [heads, rows of the map], or null where all count alike
    const float* units;    // [heads] of exact scales as uint8 logarithms; null for float16 norms times norm_factor
    float norm_factor;
    void* scales;          // [heads, pages, 64], the last contiguous
    int64_t scale_stride[2];
};

struct QjlGridRecipe {
    QjlCodes codes;  // of the pool: a page for each block
    QjlTokens tokens;
    int64_t size;  // of the orthonormal Hadamard matrices along the diagonal
    int64_t groups, bits;
    float clip;
    uint16_t *steps, *middles;  // float16 [heads, pages, groups, 64], the last two contiguous
    int64_t step_stride[2], middle_stride[2];
};

struct QjlJob {
    const QjlRecipe* recipe;      // this
    const QjlGridRecipe* grid;    // or that
    const float *cos, *sin;  // [pairs, blocks * 64], how each pair of coordinates of the mean turns; null without pairs
};

struct QjlEncode {
    const QjlJob* jobs;
    int64_t job_count;
    const int32_t *slots, *pages;  // [blocks * 64] and [blocks]
    int64_t blocks;
    int64_t not_finite;  // is left here: the first job with tokens that are not, or -1
    float* room;         // on a boundary of 64 bytes
    int64_t room_bytes;
};

QJL_EXPORT int64_t qjl_encode(QjlEncode* operation, int64_t threads);

// Decoding (decode.inl): mean + map^T (scale * code + middle), a code the sum of what its nibbles add to each coordinate

struct QjlDecode {
    QjlCodes codes;
    const void* scales;   // [groups][64] in each block: uint8 logarithms where there are units, else float16
    const void* middles;  // likewise float16, or null
    int64_t scale_stride[3], middle_stride[3];  // over batch, head and block
    const float* units;                         // [heads], or null
    int64_t dim, groups;          // coordinates, cut into groups that have one code
    const int16_t* coordinates;   // [heads or 1][nibbles of a group][slots]
    const float* entries;         // [heads or 1][nibbles of a group][slots][16]
    int64_t slots, code_stride;   // heads share a code: 0, each has its own: 1
    const float* map;             // [heads or 1][head_dim][dim], heads `map_stride` apart; null for the identity
    int64_t map_stride;
    const float* mean;       // [heads][head_dim], or null
    const int32_t* turns;    // [2][pairs]: first and second coordinate of each pair of the mean that turns
    const float *cos, *sin;  // [batch][pairs][blocks * 64]
    int64_t pairs;
    float* out;  // [batch][heads][blocks * 64][head_dim]
    int64_t head_dim;
    float* room;  // on a boundary of 64 bytes
    int64_t room_bytes;
};

QJL_EXPORT int64_t qjl_decode(const QjlDecode* operation, int64_t threads);

// The fused decode step (step.inl)

#include "step.h"
