// Weighted sums of packed values.

// By row; those of rows that are not there are 1.
using ByRow = float[MAX_ROWS];

// What is added to sums is multiplied by, and what they were.
struct Factors {
    const ByRow &added, &old;
};

// Adds blocks to the sums of quads of one kind, [quads][4 coordinates][MAX_ROWS].
template <int ROWS, int KIND>
__attribute__((noinline)) void add_quads_of(const QjlQuad* quads, int64_t first, int64_t last, const Weighted& blocks,
                                            const Factors& factors, float* sums) {
    alignas(64) float decays[16], units[16];
    for (int i = 0; i < 16; ++i) decays[i] = factors.old[i % MAX_ROWS], units[i] = factors.added[i % MAX_ROWS];
    for (int64_t k = first; k < last; ++k) {
        alignas(64) int32_t added[16];
        add_quad<ROWS, KIND>(quads[k], blocks, k * 64, added);
        const F16 of_blocks = converted<F16>(load<I16>(added)) * (load<F16>(units) * quads[k].step);
        store(sums + 16 * k, load<F16>(sums + 16 * k) * load<F16>(decays) + of_blocks);
    }
}

template <int ROWS>
auto adder_of(int32_t kind) {
    switch (kind) {
        case QJL_TWO_CHAIN: return add_quads_of<ROWS, QJL_TWO_CHAIN>;
        case QJL_TWO_LEVELS: return add_quads_of<ROWS, QJL_TWO_LEVELS>;
        case QJL_ONE_LEVELS: return add_quads_of<ROWS, QJL_ONE_LEVELS>;
        case QJL_FOUR_CHAIN: return add_quads_of<ROWS, QJL_FOUR_CHAIN>;
        case QJL_ONE_CHAIN: return add_quads_of<ROWS, QJL_ONE_CHAIN>;
        default: return add_quads_of<ROWS, QJL_ANY>;
    }
}

// Weighted sums over the tokens seen so far, in the space of the codes, for up to MAX_ROWS rows.
//
// Weights of a tile are integers, in units that are as fine as the result asks. Most have one digit of 8 bits; blocks
// with larger ones are summed up once more, by their high digits.
struct Sums {
    const Head& h;
    const QjlSide& side;
    Scratch& room;
    int64_t first_row, rows;
    float maximum[MAX_ROWS], weight[MAX_ROWS];  // of base-2 scores; of all tokens together
    const uint8_t* codes[TILE];
    const uint8_t* ahead[TILE];  // keys of the next tile
    Place places[TILE];
    int8_t place_of_high[TILE];  // of a block among those with high digits, or -1
    static constexpr int BASE = WEIGHT_TOP + 1, BITS = BASE == 256 ? 8 : 7;
    static constexpr ByRow NO_DECAY = {1, 1, 1, 1};
    static constexpr float VALUE_SHARE = 0.8f;  // of the error of weights in the tolerance

    Sums(const Head& h, Scratch& room, int64_t first_row, int64_t rows)
        : h(h), side(h.s.values), room(room), first_row(first_row), rows(rows) {
        __builtin_memset(room.sums_of_quads, 0, side.quad_count * 16 * sizeof(float));
        __builtin_memset(room.sums_of_middles, 0, side.groups * MAX_ROWS * sizeof(float));
        __builtin_memset(room.energy, 0, side.groups * MAX_ROWS * sizeof(float));
        for (int64_t r = 0; r < MAX_ROWS; ++r) maximum[r] = LOWEST, weight[r] = 0;
    }

    // Base-2 scores of a tile, [rows][TILE][64], which become powers.
    void add(float* scores, int64_t first_block, int64_t blocks) {
        ByRow decay = {1, 1, 1, 1}, power = {1, 1, 1, 1};
        for (int64_t r = 0; r < rows; ++r) weigh(scores + r * TILE * 64, blocks, r, decay[r], power[r]);
        find(first_block, blocks);
        int64_t quad = 0;
        for (int64_t g = 0; g < side.groups; ++g) {
            int64_t last = quad;
            while (last < side.quad_count && side.quads[last].group == g) ++last;
            add_group(g, quad, last, scores, blocks, decay, power);
            quad = last;
        }
    }

    // Powers in relation to the largest of the tile; what earlier sums, and these, are multiplied by.
    __attribute__((noinline)) void weigh(float* scores, int64_t blocks, int64_t r, float& decay, float& power) {
        F16 most = load<F16>(scores);
        for (int64_t i = 16; i < blocks * 64; i += 16) most = larger(most, load<F16>(scores + i));
        const float top = largest(most) > LOWEST ? largest(most) : LOWEST;
        const float updated = top > maximum[r] ? top : maximum[r];
        decay = exp2(maximum[r] - updated), power = exp2(top - updated);
        maximum[r] = updated;
        F16 total{};
        for (int64_t i = 0; i < blocks * 64; i += 16) {
            const F16 of_lanes = rough_exp2(load<F16>(scores + i) - top);
            store(scores + i, of_lanes);
            total += of_lanes;
        }
        weight[r] = weight[r] * decay + sum(total) * power;
    }

    void find(int64_t first_block, int64_t blocks) {
        const int64_t size = block_bytes(side);
        for (int64_t b = 0; b < blocks; ++b) {
            places[b] = place_of(h, side, first_block + b, room.blocks_of_values + b * size);
            ahead[b] = codes_ahead(h, h.s.keys, first_block + TILE + b);
        }
    }

    void add_group(int64_t g, int64_t first_quad, int64_t last_quad, const float* scores, int64_t blocks,
                   const ByRow& decay, const ByRow& power) {
        put_scales(g, blocks);
        for (int64_t b = 0; b < blocks; ++b) codes[b] = places[b].codes;
        ByRow units = {}, inverses;
        for (int64_t b = 0; b < blocks; ++b) place_of_high[b] = -1;
        for (int64_t r = 0; r < rows; ++r) {
            const auto [most, squares] = multiply(scores + r * TILE * 64, blocks, r);
            float& energy = room.energy[g * MAX_ROWS + r];
            energy = energy * decay[r] * decay[r] + squares * power[r] * power[r];
            const float of_mean = side.mean_energy ? side.mean_energy[h.head] * weight[r] * weight[r] : 0;
            const float unit = unit_of(most, energy + of_mean, float(blocks * 64), power[r]);
            units[r] = unit * power[r], inverses[r] = unit > 0 ? 1 / unit : 0;
            if (unit * WEIGHT_TOP < most) find_high(r, blocks, inverses[r]);
        }
        const int64_t high = count_high(blocks);
        for (int64_t r = 0; r < rows; ++r) put_weights(r, blocks, inverses[r]);
        add_quads(first_quad, last_quad, {codes, room.weights, ahead, blocks}, {units, decay});
        if (high) add_high(first_quad, last_quad, blocks, high, units);
        if (side.middle) add_middles(scores, g, blocks, decay, power);
    }

    __attribute__((noinline)) void put_scales(int64_t g, int64_t blocks) const {
        for (int64_t b = 0; b < blocks; ++b) decode_scales(side, h.head, places[b].scale, g, room.scales + b * 64);
    }

    struct Products {
        float most, squares;
    };

    // Powers times scales, and the largest of each block by lanes.
    __attribute__((noinline)) Products multiply(const float* powers, int64_t blocks, int64_t r) const {
        F16 most{}, squares{};
        for (int64_t b = 0; b < blocks; ++b) {
            F16 of_block{};
            for (int64_t i = b * 64; i < b * 64 + 64; i += 16) {
                const F16 product = load<F16>(powers + i) * load<F16>(room.scales + i);
                store(room.products + r * TILE * 64 + i, product);
                of_block = larger(of_block, product);
                squares += product * product;
            }
            store(room.maxima + (r * TILE + b) * 16, of_block);
            most = larger(most, of_block);
        }
        return {largest(most), sum(squares)};
    }

    // Rounding errors add as noise does, and are to be a share of what a row adds up to: as codes are, if they do not
    // agree with each other, and their mean.
    float unit_of(float most, float energy, float tokens, float power) const {
        const float coarse = most / WEIGHT_TOP, fine = coarse / BASE, error = VALUE_SHARE * float(side.tolerance);
        const float wanted = error * __builtin_sqrtf(12 * energy / tokens);
        if (wanted >= coarse * power) return coarse;
        return wanted > fine * power ? wanted / power : fine;
    }

    void find_high(int64_t r, int64_t blocks, float inverse) {
        for (int64_t b = 0; b < blocks; ++b) {
            const bool is_high = largest(load<F16>(room.maxima + (r * TILE + b) * 16)) * inverse > WEIGHT_TOP + 0.4f;
            if (is_high) place_of_high[b] = 0;
        }
    }

    int64_t count_high(int64_t blocks) {
        int8_t count = 0;
        for (int64_t b = 0; b < blocks; ++b) {
            if (place_of_high[b] >= 0) place_of_high[b] = count++;
        }
        return count;
    }

    __attribute__((noinline)) void put_weights(int64_t r, int64_t blocks, float inverse) const {
        uint8_t* high_digits = room.weights + TILE * MAX_ROWS * 64;
        for (int64_t b = 0; b < blocks; ++b) {
            I16 weights[4], high[4];
            for (int k = 0; k < 4; ++k) {
                weights[k] = round(load<F16>(room.products + (r * TILE + b) * 64 + k * 16) * inverse);
            }
            if (place_of_high[b] >= 0) {
                for (int k = 0; k < 4; ++k) high[k] = weights[k] >> BITS, weights[k] = weights[k] & WEIGHT_TOP;
                put_in_order(high, high_digits + (place_of_high[b] * rows + r) * 64);
            }
            put_in_order(weights, room.weights + (b * rows + r) * 64);
        }
    }

    void add_high(int64_t first_quad, int64_t last_quad, int64_t blocks, int64_t count, ByRow& units) {
        const uint8_t* high[TILE];
        for (int64_t b = 0; b < blocks; ++b) {
            if (place_of_high[b] >= 0) high[place_of_high[b]] = codes[b];
        }
        for (float& unit : units) unit *= BASE;
        const uint8_t* digits = room.weights + TILE * MAX_ROWS * 64;
        add_quads(first_quad, last_quad, {high, digits, ahead, count}, {units, NO_DECAY});
    }

    // Quads of one kind follow one another.
    void add_quads(int64_t first, int64_t last, const Weighted& blocks, const Factors& factors) const {
        for (int64_t k = first, end; k < last; k = end) {
            for (end = k; end < last && side.quads[end].kind == side.quads[k].kind;) ++end;
            const auto add = for_rows(rows, [&]<int ROWS> { return adder_of<ROWS>(side.quads[k].kind); });
            add(side.quads, k, end, blocks, factors, room.sums_of_quads);
        }
    }

    void add_middles(const float* powers, int64_t g, int64_t blocks, const ByRow& decay, const ByRow& power) const {
        F16 totals[MAX_ROWS]{};
        for (int64_t b = 0; b < blocks; ++b) {
            alignas(64) float middles[64];
            decode_halves(places[b].middle + g * 128, middles);
            for (int64_t r = 0; r < rows; ++r) {
                const float* of_row = powers + (r * TILE + b) * 64;
                for (int i = 0; i < 64; i += 16) totals[r] += load<F16>(middles + i) * load<F16>(of_row + i);
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            float& middle = room.sums_of_middles[g * MAX_ROWS + r];
            middle = middle * decay[r] + sum(totals[r]) * power[r];
        }
    }

    // [maximum, weight, sums of all coordinates] of each row
    __attribute__((noinline)) void leave(float* partial) const {
        const int64_t group_dim = side.code_dim / side.groups;
        for (int64_t r = 0; r < rows; ++r) {
            float* row = partial + (first_row + r) * (2 + side.code_dim);
            row[0] = maximum[r], row[1] = weight[r];
            for (int64_t i = 0; i < side.code_dim; ++i) {
                row[2 + i] = side.middle ? room.sums_of_middles[i / group_dim * MAX_ROWS + r] : 0;
            }
            for (int64_t k = 0; k < side.quad_count; ++k) {
                for (int c = 0; c < 4; ++c) {
                    const int32_t coordinate = side.quads[k].coordinates[c];
                    if (coordinate >= 0) row[2 + coordinate] += room.sums_of_quads[16 * k + MAX_ROWS * c + r];
                }
            }
        }
    }
};
