// Rotated tokens on a uniform grid of their own.

namespace encode {

inline int64_t grid_floats(const QjlGridRecipe& operation) {
    return operation.tokens.dim * (BLOCK + BLOCK / static_cast<int64_t>(sizeof(float)));
}

struct Grid {
    float step[BLOCK], middle[BLOCK];  // as they are stored; a step of 0 counts as 1
};

// From `clip` times the least to `clip` times the greatest of `count` rows.
inline Grid fit_grid(const float* rows, int64_t count, float clip, float top, uint16_t* steps, uint16_t* middles) {
    float low[BLOCK], high[BLOCK];
    over_row([&](int t) {
        Wide least = wide(rows + t), greatest = least;
        for (int64_t i = 1; i < count; ++i) {
            least = smaller(least, wide(rows + i * BLOCK + t));
            greatest = larger(greatest, wide(rows + i * BLOCK + t));
        }
        store(low + t, clip * least);
        store(high + t, clip * greatest);
    });
    Grid grid;
    for (int t = 0; t < BLOCK; ++t) {
        steps[t] = rounded_half((high[t] - low[t]) / top);
        middles[t] = rounded_half((high[t] + low[t]) / 2);
        grid.step[t] = steps[t] ? widened(steps[t]) : 1;
        grid.middle[t] = widened(middles[t]);
    }
    return grid;
}

inline void round_row(const float* row, const Grid& grid, float top, uint8_t* codes) {
    for (int t = 0; t < BLOCK; ++t) {
        const float level = __builtin_rintf((row[t] - grid.middle[t]) / grid.step[t] + top / 2);
        codes[t] = static_cast<uint8_t>(level > 0 ? level < top ? level : top : 0);
    }
}

// Numbers of `bits` bits each, side by side.
inline void pack_numbers(const uint8_t* numbers, int64_t count, int64_t bits, uint8_t* codes) {
    for (int64_t j = 0; j < count * bits / 8; ++j) {
        int16_t owner[8], index[8];
        for (int place = 0; place < 8; ++place) {
            owner[place] = static_cast<int16_t>((8 * j + place) / bits);
            index[place] = static_cast<int16_t>((8 * j + place) % bits);
        }
        gather_bits(owner, index, numbers, codes + j * BLOCK);
    }
}

// Whether all tokens are finite.
inline bool encode_on_grid(const QjlGridRecipe& operation, const Tokens& tokens, int64_t page, float* rows) {
    const bool is_finite = load_finite_rows(tokens, rows);
    const int64_t head = tokens.head, dim = operation.tokens.dim, channels = dim / operation.groups;
    const float top = static_cast<float>((1 << operation.bits) - 1);
    auto* const numbers = reinterpret_cast<uint8_t*>(rows + dim * BLOCK);
    hadamard_blocks(rows, dim, operation.size);
    for (int64_t group = 0; group < operation.groups; ++group) {
        const int64_t first = group * channels;
        const Grid grid = fit_grid(rows + first * BLOCK, channels, operation.clip, top,
                                   operation.steps + along(operation.step_stride, head, page) + group * BLOCK,
                                   operation.middles + along(operation.middle_stride, head, page) + group * BLOCK);
        for (int64_t i = first; i < first + channels; ++i) round_row(rows + i * BLOCK, grid, top, numbers + i * BLOCK);
    }
    pack_numbers(numbers, dim, operation.bits, page_of(operation.codes, head, page));
    return is_finite;
}

}  // namespace encode
