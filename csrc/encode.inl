// encode and encode_grid (src/qjl/ops/__init__.py): one pass over each block of 64 tokens, from the tokens to their
// packed codes.

#include "rows.inl"

#include "maps.inl"

#include "levels.inl"
#include "signs.inl"
#include "trellis.inl"

namespace encode {

using codes::block_at;
using codes::Place;
using codes::place_of;

// Room for one worker: where its arrays begin, in floats

struct Room {
    int64_t size = 0;

    int64_t take(int64_t floats) {
        const int64_t first = size;
        size += (floats + 15) / 16 * 16;
        return first;
    }
};

inline int64_t part_floats(const QjlPart& part) {
    switch (part.kind) {
        case QJL_LEVELS: return part.dim * BLOCK / sizeof(float);
        case QJL_SIGNS: return part.gram ? refinement_floats(part) : 0;
        default: return part.nibbles * (sizeof(Costs) + BLOCK) / sizeof(float);
    }
}

struct Arrays {
    int64_t rows, mapped, coded, matrix, part, size;

    Arrays(const QjlMap& map, int64_t dim, int64_t part_floats) {
        Room room;
        rows = room.take(dim * BLOCK);
        mapped = room.take(map.rows * BLOCK);
        coded = room.take((map.size > map.rows ? map.size : map.rows) * BLOCK);
        matrix = room.take(map.is_half ? map.rows * dim : 0);
        part = room.take(part_floats);
        size = room.size;
    }
};

inline Arrays arrays_of(const QjlEncode& operation) {
    int64_t most = 0;
    for (int64_t i = 0; i < operation.part_count; ++i) {
        const int64_t floats = part_floats(operation.parts[i]);
        if (floats > most) most = floats;
    }
    return {operation.map, operation.tokens.dim, most};
}

int64_t encode_room(const QjlEncode& operation) { return arrays_of(operation).size; }

// The map, of one head after the other

struct Map {
    const QjlMap& map;
    int64_t dim;
    float *widened_matrix, *room;
    const Half* widened_from = nullptr;

    const float* matrix(int64_t head) {
        if (!map.is_half) return static_cast<const float*>(map.matrix) + head * map.head_stride;
        const Half* matrix = static_cast<const Half*>(map.matrix) + head * map.head_stride;
        if (matrix != widened_from) widen(matrix, map.rows * dim, widened_matrix);
        widened_from = matrix;
        return widened_matrix;
    }

    void apply(int64_t head, const float* rows, float* mapped) {
        if (!map.matrix) return sketch(map, dim, rows, room, mapped);
        zero(mapped, map.rows * BLOCK);
        multiply_add(matrix(head), dim, map.rows, dim, rows, mapped);
    }
};

// Codes and scales

// z = mapped / rms, the rms of the coordinates that count.
inline void normalise(const float* mapped, const float* weights, int64_t count, float* z) {
    float squared[BLOCK];
    int64_t active = 0;
    for (int64_t i = 0; i < count; ++i) active += !weights || weights[i] > 0;
    sum_rows(count, squared, [&](int64_t i, int t) {
        const Wide x = wide(mapped + i * BLOCK + t);
        return weights && !(weights[i] > 0) ? Wide{} : x * x;
    });
    over_row([&](int t) {
        const Wide rms = square_root(wide(squared + t) / static_cast<float>(active));
        store(squared + t, 1 / larger(rms, splat(1e-30f)));
    });
    for (int64_t i = 0; i < count; ++i)
        over_row([&](int t) { store(z + i * BLOCK + t, wide(mapped + i * BLOCK + t) * wide(squared + t)); });
}

inline void encode_part(const QjlEncode& operation, const QjlPart& part, int64_t head, float* z, float* room,
                        uint8_t* codes) {
    const float* weights = operation.weights ? operation.weights + head * operation.map.rows : nullptr;
    switch (part.kind) {
        case QJL_LEVELS: {
            const Gains gains{operation.gains, operation.gain_count, weights};
            return encode_levels(part, head, gains, z, reinterpret_cast<uint8_t*>(room), codes);
        }
        case QJL_SIGNS: return encode_signs(part, z, room, codes);
        default: {
            auto* const costs = reinterpret_cast<Costs*>(room);
            auto* const nibbles = reinterpret_cast<uint8_t*>(costs + part.nibbles);
            switch (part.width) {
                case 1: return encode_trellis<1>(part, z, costs, nibbles, codes);
                case 2: return encode_trellis<2>(part, z, costs, nibbles, codes);
                default: return encode_trellis<4>(part, z, costs, nibbles, codes);
            }
        }
    }
}

inline void encode_parts(const QjlEncode& operation, int64_t head, float* z, float* room, uint8_t* codes) {
    for (int64_t i = 0; i < operation.part_count; ++i) {
        const QjlPart& part = operation.parts[i];
        encode_part(operation, part, head, z, room, codes);
        z += part.dim * BLOCK;
        codes += part.nibbles / 2 * BLOCK;
    }
}

// The norm of each token.
inline void norms(const float* rows, int64_t count, float* scales) {
    sum_rows(count, scales, [&](int64_t i, int t) { return wide(rows + i * BLOCK + t) * wide(rows + i * BLOCK + t); });
    over_row([&](int t) { store(scales + t, square_root(wide(scales + t))); });
}

// |y|^2 / <y, y_hat> in the metric of the weights; 0 for a token of zeros.
inline void exact_scales(const float* y, const float* decoded, const float* weights, int64_t count, float* scales) {
    float aligned[BLOCK];
    const auto weighted = [&](int64_t i, int t) {
        const Wide x = wide(y + i * BLOCK + t);
        return weights ? x * weights[i] : x;
    };
    sum_rows(count, scales, [&](int64_t i, int t) { return weighted(i, t) * wide(y + i * BLOCK + t); });
    sum_rows(count, aligned, [&](int64_t i, int t) { return weighted(i, t) * wide(decoded + i * BLOCK + t); });
    over_row([&](int t) {
        const Wide is = wide(aligned + t);
        store(scales + t, is > 0 ? wide(scales + t) / larger(is, splat(1e-30f)) : Wide{});
    });
}

inline void store_logarithms(const float* scales, float unit, uint8_t* codes) {
    constexpr float STEPS_PER_OCTAVE = 12, UNIT_CODE = 128, LEAST = 1, LARGEST = 255;
    for (int t = 0; t < BLOCK; ++t) {
        const float code = __builtin_rintf(__builtin_log2f(scales[t] / unit) * STEPS_PER_OCTAVE + UNIT_CODE);
        const float clipped = code < LEAST ? LEAST : code < LARGEST ? code : LARGEST;
        codes[t] = scales[t] > 0 ? static_cast<uint8_t>(clipped) : 0;
    }
}

inline void store_halves(const float* scales, float factor, uint16_t* halves) {
    for (int t = 0; t < BLOCK; ++t) halves[t] = rounded_half(scales[t] * factor);
}

inline void encode_block(const QjlEncode& operation, Map& map, const Arrays& arrays, float* room, int64_t index) {
    const Place at = place_of(operation.codes, index);
    float *rows = room + arrays.rows, *mapped = room + arrays.mapped, *coded = room + arrays.coded;
    uint8_t* codes = block_at(operation.codes, at);
    const float* weights = operation.weights ? operation.weights + at.head * operation.map.rows : nullptr;
    float scales[BLOCK];
    load_rows(operation.tokens, at, rows);
    subtract_mean(operation.mean, operation.tokens.dim, operation.codes.blocks, at, rows);
    map.apply(at.head, rows, mapped);
    if (operation.units) {
        normalise(mapped, weights, operation.map.rows, coded);
        encode_parts(operation, at.head, coded, room + arrays.part, codes);
        exact_scales(mapped, coded, weights, operation.map.rows, scales);
        store_logarithms(scales, operation.units[at.head], static_cast<uint8_t*>(operation.scales) + index * BLOCK);
    } else {
        encode_parts(operation, at.head, mapped, room + arrays.part, codes);
        norms(rows, operation.tokens.dim, scales);
        store_halves(scales, operation.norm_factor, static_cast<uint16_t*>(operation.scales) + index * BLOCK);
    }
}

void encode(const QjlEncode& operation, Range range, float* room) {
    const Arrays arrays = arrays_of(operation);
    Map map{operation.map, operation.tokens.dim, room + arrays.matrix, room + arrays.coded};
    for (int64_t index = range.first; index < range.last; ++index) encode_block(operation, map, arrays, room, index);
}

}  // namespace encode
