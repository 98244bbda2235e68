// encode (src/qjl/ops/__init__.py): one pass over each block of 64 tokens, from the tokens to their packed codes.

#include "encode/rows.inl"

#include "encode/maps.inl"

#include "encode/products.inl"

#include "encode/levels.inl"
#include "encode/signs.inl"
#include "encode/trellis.inl"

namespace encode {

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

inline int64_t largest(int64_t a, int64_t b, int64_t c) {
    const int64_t larger = a > b ? a : b;
    return larger > c ? larger : c;
}

// The transform of a sketch and tokens as pairs of integers lie in `coded`, which is free then.
struct Arrays {
    int64_t rows, mapped, coded, matrix, part, size;

    Arrays(const QjlMap& map, int64_t dim, int64_t part_floats) {
        Room room;
        rows = room.take(dim * BLOCK);
        mapped = room.take(map.rows * BLOCK);
        coded = room.take(largest(map.rows, map.size, dim / 2) * BLOCK);
        matrix = room.take(map.is_half ? map.rows * dim : map.rows * dim / 2);
        part = room.take(part_floats);
        size = room.size;
    }
};

inline Arrays arrays_of(const QjlRecipe& operation) {
    int64_t most = 0;
    for (int64_t i = 0; i < operation.part_count; ++i) {
        const int64_t floats = part_floats(operation.parts[i]);
        if (floats > most) most = floats;
    }
    return {operation.map, operation.tokens.dim, most};
}


// The map, of one head after the other

struct Map {
    const QjlMap& map;
    int64_t dim;
    float *matrix_room, *room;
    const void* in_room = nullptr;  // the matrix of which `matrix_room` holds another form

    const float* matrix(int64_t head) {
        if (!map.is_half) return static_cast<const float*>(map.matrix) + head * map.head_stride;
        const Half* matrix = static_cast<const Half*>(map.matrix) + head * map.head_stride;
        if (matrix != in_room) widen(matrix, map.rows * dim, matrix_room);
        in_room = matrix;
        return matrix_room;
    }

    const int32_t* pairs(int64_t head) {
        auto* const pairs = reinterpret_cast<int16_t*>(matrix_room);
        if (matrix(head) != in_room) round_matrix(matrix(head), map.rows, dim, pairs);
        in_room = matrix(head);
        return reinterpret_cast<const int32_t*>(pairs);
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

inline void encode_part(const QjlRecipe& operation, const QjlPart& part, int64_t head, float* z, float* room,
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

inline void encode_parts(const QjlRecipe& operation, int64_t head, float* z, float* room, uint8_t* codes) {
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

// Whether signs of integers will do.
inline bool takes_pairs(const QjlRecipe& operation) {
    const QjlMap& map = operation.map;
    const bool is_plain = operation.part_count == 1 && operation.parts->kind == QJL_SIGNS && !operation.parts->gram;
    return HAS_PAIRS && is_plain && map.matrix && !map.is_half && !operation.mean.vector &&
           operation.tokens.dim % EIGHT == 0;
}

inline uint8_t* page_of(const QjlCodes& codes, int64_t head, int64_t page) {
    return codes.data + head * codes.head_stride + page * codes.block_stride;
}

inline int64_t along(const int64_t (&stride)[2], int64_t head, int64_t page) {
    return head * stride[0] + page * stride[1];
}

struct Block {
    Tokens tokens;
    bool is_finite;
    float *rows, *mapped, *coded, *part_room;
    uint8_t* codes;
};

inline void encode_scaled_exactly(const QjlRecipe& operation, Map& map, const Block& block, uint8_t* scales) {
    const int64_t count = operation.map.rows, head = block.tokens.head;
    const float* weights = operation.weights ? operation.weights + head * count : nullptr;
    float exact[BLOCK];
    map.apply(head, block.rows, block.mapped);
    normalise(block.mapped, weights, count, block.coded);
    encode_parts(operation, head, block.coded, block.part_room, block.codes);
    exact_scales(block.mapped, block.coded, weights, count, exact);
    store_logarithms(exact, operation.units[head], scales);
}

inline void encode_with_norms(const QjlRecipe& operation, Map& map, const Block& block, uint16_t* scales) {
    const int64_t dim = operation.tokens.dim, count = operation.map.rows, head = block.tokens.head;
    float norm[BLOCK];
    norms(block.rows, dim, norm);
    store_halves(norm, operation.norm_factor, scales);
    if constexpr (HAS_PAIRS) {
        if (block.is_finite && takes_pairs(operation)) {
            auto* const pairs = reinterpret_cast<int32_t*>(block.coded);
            auto* const sums = reinterpret_cast<int32_t*>(block.mapped);
            round_tokens(block.rows, dim, norm, pairs);
            zero(block.mapped, count * BLOCK);
            multiply_add(map.pairs(head), dim / 2, count, dim / 2, pairs, sums);
            return pack_product_signs(sums, map.matrix(head), count, block.tokens, block.codes);
        }
    }
    map.apply(head, block.rows, block.mapped);
    encode_parts(operation, head, block.mapped, block.part_room, block.codes);
}

// Blocks of one recipe, with what lies in the room of a worker.
struct Encoder {
    const QjlRecipe& operation;
    const Arrays arrays;
    float* room;
    Map map;

    Encoder(const QjlRecipe& operation, float* room)
        : operation(operation), arrays(arrays_of(operation)), room(room),
          map{operation.map, operation.tokens.dim, room + arrays.matrix, room + arrays.coded} {}

    // Whether all tokens are finite.
    bool encode(const Tokens& tokens, const Angles& angles, int64_t page) {
        const int64_t head = tokens.head, scales = along(operation.scale_stride, head, page);
        float* const rows = room + arrays.rows;
        const bool is_finite = load_finite_rows(tokens, rows);
        const Block block{tokens,
                          is_finite,
                          rows,
                          room + arrays.mapped,
                          room + arrays.coded,
                          room + arrays.part,
                          page_of(operation.codes, head, page)};
        subtract_mean(operation.mean, operation.tokens.dim, head, angles, rows);
        if (operation.units)
            encode_scaled_exactly(operation, map, block, static_cast<uint8_t*>(operation.scales) + scales);
        else
            encode_with_norms(operation, map, block, static_cast<uint16_t*>(operation.scales) + scales);
        return is_finite;
    }
};

}  // namespace encode

#include "encode/grid.inl"

namespace encode {

int64_t room_floats(const QjlJob& job) {
    return job.recipe ? arrays_of(*job.recipe).size : grid_floats(*job.grid);
}

// Some blocks of one head; whether all of their tokens are finite.
bool encode(const QjlEncode& operation, const QjlJob& job, int64_t head, Range range, float* room) {
    bool are_finite = true;
    const auto over_blocks = [&](const QjlTokens& pool, auto encode_block) {
        for (int64_t block = range.first; block < range.last; ++block)
            are_finite &= encode_block(Tokens{pool, head, operation.slots + block * BLOCK}, block);
    };
    if (job.grid) {
        over_blocks(job.grid->tokens, [&](const Tokens& tokens, int64_t block) {
            return encode_on_grid(*job.grid, tokens, operation.pages[block], room);
        });
    } else {
        Encoder encoder(*job.recipe, room);
        over_blocks(job.recipe->tokens, [&](const Tokens& tokens, int64_t block) {
            return encoder.encode(tokens, angles_of(operation, job, block), operation.pages[block]);
        });
    }
    return are_finite;
}

}  // namespace encode
