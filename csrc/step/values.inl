// Weighted sums of packed values.

// Weighted sums over the tokens seen so far, in the space of the codes, for up to MAX_ROWS rows.
//
// Weights of a tile are integers of 8 bits in relation to the largest that is possible in it. Where that is too coarse
// for what a tile adds, they have twice as many digits, which are summed apart.
struct Sums {
    const Head& h;
    const QjlSide& side;
    Scratch& room;
    int64_t first_row, rows;
    float maximum[MAX_ROWS], weight[MAX_ROWS];  // of base-2 scores; of all tokens together
    const uint8_t* codes[TILE];
    const uint8_t* ahead[TILE];  // keys of the next tile
    Place places[TILE];
    static constexpr int BASE = WEIGHT_TOP + 1, BITS = BASE == 256 ? 8 : 7;
    static constexpr float COARSE = 12;  // times the tolerance: as errors of some tiles are among many

    Sums(const Head& h, Scratch& room, int64_t first_row, int64_t rows)
        : h(h), side(h.s.values), room(room), first_row(first_row), rows(rows) {
        __builtin_memset(room.sums_of_quads, 0, side.quad_count * 16 * sizeof(float));
        __builtin_memset(room.sums_of_middles, 0, side.groups * MAX_ROWS * sizeof(float));
        __builtin_memset(room.energy, 0, side.groups * MAX_ROWS * sizeof(float));
        for (int64_t r = 0; r < MAX_ROWS; ++r) maximum[r] = LOWEST, weight[r] = 0;
    }

    // Factors by row; those of rows that are not there are 1.
    using ByRow = float[MAX_ROWS];

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
        const float bound = put_scales(g, blocks);
        const float unit = bound / WEIGHT_TOP, inverse = bound > 0 ? WEIGHT_TOP / bound : 0;
        const int64_t bytes = side.nibbles / side.groups / 2;
        for (int64_t b = 0; b < blocks; ++b) codes[b] = places[b].codes + g * bytes * 64;
        bool is_coarse = false;
        for (int64_t r = 0; r < rows; ++r) {
            const float squares = put_weights(scores + r * TILE * 64, blocks, r, inverse), of_one = unit * power[r];
            float& energy = room.energy[g * MAX_ROWS + r];
            energy = energy * decay[r] * decay[r] + squares * of_one * of_one;
            const float error = COARSE * float(side.tolerance);
            is_coarse |= of_one * of_one * float(blocks * 64) / 12 > error * error * energy;
        }
        ByRow units;
        for (int64_t r = 0; r < MAX_ROWS; ++r) units[r] = unit * power[r];
        if (is_coarse) {
            for (int64_t r = 0; r < rows; ++r) put_fine_weights(scores + r * TILE * 64, blocks, r, inverse);
            add_quads(first_quad, last_quad, blocks, room.weights, units, decay);
            for (float& of_row : units) of_row /= BASE;
            add_quads(first_quad, last_quad, blocks, room.weights + TILE * MAX_ROWS * 64, units, {1, 1, 1, 1});
        } else {
            add_quads(first_quad, last_quad, blocks, room.weights, units, decay);
        }
        if (side.middle) add_middles(scores, g, blocks, decay, power);
    }

    // Scales of a tile; the largest of them.
    __attribute__((noinline)) float put_scales(int64_t g, int64_t blocks) const {
        F16 most{};
        for (int64_t b = 0; b < blocks; ++b) {
            F16 scales[4];
            decode_scales(side, h.head, places[b].scale, g, scales);
            for (int k = 0; k < 4; ++k) {
                store(room.scales + b * 64 + k * 16, scales[k]);
                most = larger(most, scales[k]);
            }
        }
        return largest(most);
    }

    // Powers times scales as integers up to WEIGHT_TOP; the sum of their squares.
    __attribute__((noinline)) float put_weights(const float* powers, int64_t blocks, int64_t r, float factor) const {
        F16 squares{};
        for (int64_t b = 0; b < blocks; ++b) {
            I16 weights[4];
            for (int k = 0; k < 4; ++k) {
                const int64_t at = b * 64 + k * 16;
                const F16 product = load<F16>(powers + at) * load<F16>(room.scales + at) * factor;
                squares += product * product;
                weights[k] = round(product);
            }
            put_in_order(weights, room.weights + (b * rows + r) * 64);
        }
        return sum(squares);
    }

    // The same with two digits each.
    __attribute__((noinline)) void put_fine_weights(const float* powers, int64_t blocks, int64_t r, float factor) const {
        for (int64_t b = 0; b < blocks; ++b) {
            I16 high[4], low[4];
            for (int k = 0; k < 4; ++k) {
                const int64_t at = b * 64 + k * 16;
                const F16 product = load<F16>(powers + at) * load<F16>(room.scales + at) * factor;
                const I16 all = round(product * float(BASE));
                high[k] = all >> BITS, low[k] = all & WEIGHT_TOP;
            }
            uint8_t* to = room.weights + (b * rows + r) * 64;
            put_in_order(high, to);
            put_in_order(low, to + TILE * MAX_ROWS * 64);
        }
    }

    void add_quads(int64_t first, int64_t last, int64_t blocks, const uint8_t* weights, const ByRow& units,
                   const ByRow& decay) {
        const auto of_rows = [&] {
            switch (rows) {
                case 1: return add_quad<1>;
                case 2: return add_quad<2>;
                case 3: return add_quad<3>;
                default: return add_quad<4>;
            }
        }();
        alignas(64) float decays[16], factors[16];
        for (int i = 0; i < 16; ++i) decays[i] = decay[i % MAX_ROWS], factors[i] = units[i % MAX_ROWS];
        const F16 old = load<F16>(decays), unit = load<F16>(factors);
        alignas(64) int32_t added[16];
        for (int64_t k = first; k < last; ++k) {
            of_rows(side.quads[k], codes, blocks, weights, added, ahead, k * 64);
            float* sums = room.sums_of_quads + k * 16;
            store(sums, load<F16>(sums) * old + converted<F16>(load<I16>(added)) * (unit * side.quads[k].step));
        }
    }

    void add_middles(const float* powers, int64_t g, int64_t blocks, const ByRow& decay, const ByRow& power) const {
        F16 totals[MAX_ROWS]{};
        for (int64_t b = 0; b < blocks; ++b) {
            F16 middles[4];
            decode_halves(places[b].middle + g * 128, middles);
            for (int64_t r = 0; r < rows; ++r) {
                for (int k = 0; k < 4; ++k) totals[r] += middles[k] * load<F16>(powers + (r * TILE + b) * 64 + k * 16);
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
