// A number of all structs, so that Python and a library of another version do not meet: the sum over their fields of a
// hash of name, place and size, which does not depend on the order in which they are listed.
#include <stddef.h>

#include <initializer_list>

#include "baselines.h"

namespace {

constexpr uint64_t MEANING = 5;  // raised where a function or a field means something else, and no size tells so

constexpr uint64_t PRIME = 0x100000001b3;  // FNV-1a

// So that places of some fields, more by what those of others are less, do not add up to the same.
constexpr uint64_t mixed(uint64_t hash) {
    hash = (hash ^ hash >> 33) * 0xff51afd7ed558ccd;
    return hash ^ hash >> 33;
}

constexpr uint64_t hashed(const char* text, uint64_t first, uint64_t second) {
    uint64_t hash = 0xcbf29ce484222325;
    for (; *text; ++text) hash = (hash ^ uint8_t(*text)) * PRIME;
    for (const uint64_t number : {first, second})
        for (int bit = 0; bit < 64; bit += 8) hash = (hash ^ (number >> bit & 255)) * PRIME;
    return mixed(hash);
}

#define QJL_FIELD(Struct, field) +hashed(#Struct "." #field, offsetof(Struct, field), sizeof(Struct::field))

#define QJL_AGAIN(...) QJL_AGAIN3(QJL_AGAIN3(QJL_AGAIN3(__VA_ARGS__)))
#define QJL_AGAIN3(...) QJL_AGAIN2(QJL_AGAIN2(QJL_AGAIN2(__VA_ARGS__)))
#define QJL_AGAIN2(...) QJL_AGAIN1(QJL_AGAIN1(QJL_AGAIN1(__VA_ARGS__)))
#define QJL_AGAIN1(...) __VA_ARGS__
#define QJL_NEXT() QJL_FIELDS_OF
#define QJL_NOTHING
#define QJL_FIELDS_OF(Struct, field, ...) \
    QJL_FIELD(Struct, field) __VA_OPT__(QJL_NEXT QJL_NOTHING()(Struct, __VA_ARGS__))
#define QJL_STRUCT(Struct, ...) \
    (hashed(#Struct, sizeof(Struct), alignof(Struct)) QJL_AGAIN(QJL_FIELDS_OF(Struct, __VA_ARGS__)))

constexpr uint64_t ABI =
    hashed("meaning", MEANING, sizeof(void*)) +
    QJL_STRUCT(QjlLimits, dim, threads) +
    QJL_STRUCT(QjlCodes, data, batch, heads, blocks, bytes, batch_stride, head_stride, block_stride) +
    QJL_STRUCT(QjlDecode, codes, scales, middles, scale_stride, middle_stride, units, dim, groups, coordinates, entries,
               slots, code_stride, map, map_stride, mean, turns, cos, sin, pairs, out, head_dim, room, room_bytes) +
    QJL_STRUCT(QjlTokens, data, type, dim, head_stride, slot_stride, slot_count) +
    QJL_STRUCT(QjlMean, vector, pairs, interleaved) +
    QJL_STRUCT(QjlMap, rows, matrix, is_half, head_stride, flips, order, size) +
    QJL_STRUCT(QjlPart, kind, dim, nibbles, kinds, bit_coordinate, bit_index, tree, levels, patterns, kind_stride,
               place_stride, own, next, width, gram, block, sweeps) +
    QJL_STRUCT(QjlRecipe, codes, tokens, mean, map, parts, part_count, gains, gain_count, weights, units, norm_factor,
               scales, scale_stride) +
    QJL_STRUCT(QjlGridRecipe, codes, tokens, size, groups, bits, clip, steps, middles, step_stride, middle_stride) +
    QJL_STRUCT(QjlJob, recipe, grid, cos, sin) +
    QJL_STRUCT(QjlEncode, jobs, job_count, slots, pages, blocks, not_finite, room, room_bytes) +
    QJL_STRUCT(QjlSide, codes, scale, middle, unit, map, mean, codes_stride, scale_stride, middle_stride, map_stride,
               map_is_half, nibbles, groups, code_dim, head_dim, code_stride, coordinates, entries, slots, quads,
               quad_count, mean_energy, tolerance) +
    QJL_STRUCT(QjlQuad, tables, sources, coordinates, group, step, kind) +
    QJL_STRUCT(QjlExact, keys, values, key_stride, value_stride, slots, dtype) +
    QJL_STRUCT(QjlFresh, keys, values, key_stride, value_stride) +
    QJL_STRUCT(QjlTurn, inv_freq, step, anchor_step, coordinates, down, up, bounds, pairs, direct, scaling) +
    QJL_STRUCT(QjlRows, table, lengths, skip, origins, slots, counts, capacity, room) +
    QJL_STRUCT(QjlStep, keys, values, page_tokens, page_count, exact, bias, bias_stride, turn, heads,
               blocks_per_split, room, room_bytes, splits, query, out, fresh, of_rows, batch, rows, queries, query_type,
               query_stride, out_type, out_stride, scaling, softcap, lse, scores) +
    QJL_STRUCT(QjlFlashDecode, query, keys, values, out, heads, group, tokens, head_dim, scaling) +
    QJL_STRUCT(QjlPopcountScan, query, signs, scale, ones, scores, heads, group, tokens, m) +
    QJL_STRUCT(QjlRead, numbers, count, sums);

}  // namespace

uint64_t qjl_abi() { return ABI; }
