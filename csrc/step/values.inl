// Weighted sums of packed values.

// Weighted sums over the tokens seen so far, in the space of the codes, for up to MAX_ROWS rows.
struct Sums {
    const Head& h;
    const QjlSide& side;
    Scratch& room;
    static constexpr float TOLERANCE = 6e-5f;
    static constexpr int MOST_TAKEN_OUT = 6;
    int64_t first_row, rows;
    float* of_pairs;  // [pair_count][2][4]
    float* middles;   // [groups][MAX_ROWS]: sums of weights times middles
    float* energy;    // [groups][MAX_ROWS]: sums of squared products
    float maximum[MAX_ROWS], weight[MAX_ROWS];
    Place places[TILE];

    Sums(const Head& h, Scratch& room, int64_t first_row, int64_t rows)
        : h(h), side(h.s.values), room(room), first_row(first_row), rows(rows),
          of_pairs(room.sums_of_pairs), middles(room.sums_of_middles), energy(room.energy) {
        __builtin_memset(of_pairs, 0, side.pair_count * 8 * sizeof(float));
        __builtin_memset(middles, 0, side.groups * MAX_ROWS * sizeof(float));
        __builtin_memset(energy, 0, side.groups * MAX_ROWS * sizeof(float));
        for (int64_t r = 0; r < MAX_ROWS; ++r) maximum[r] = LOWEST, weight[r] = 0;
    }

    // Turns base-2 scores of a tile [rows][TILE][64] into softmax weights, in place.
    __attribute__((noinline)) void weigh(float* scores, int64_t blocks) {
        float decay[8];
        bool moved = false;
        for (int64_t r = 0; r < 4; ++r) decay[r] = decay[4 + r] = 1;
        for (int64_t r = 0; r < rows; ++r) {
            float* row = scores + r * TILE * 64;
            F16 most = load<F16>(row);
            for (int64_t i = 1; i < blocks * 4; ++i) most = larger(most, load<F16>(row + 16 * i));
            const float tile_maximum = largest(most);
            const float updated = tile_maximum > maximum[r] ? tile_maximum : maximum[r];
            decay[r] = decay[4 + r] = exp2(maximum[r] - updated);
            moved |= updated != maximum[r];
            maximum[r] = updated;
            F16 total{};
            for (int64_t i = 0; i < blocks * 4; ++i) {
                const F16 power = exp2(load<F16>(row + 16 * i) - updated);
                store(row + 16 * i, power);
                total += power;
            }
            weight[r] = weight[r] * decay[r] + sum(total);
        }
        if (moved) scale_sums(decay);
    }

    void scale_sums(const float (&decay)[8]) {
        const F8 factors = load<F8>(decay);
        for (int64_t k = 0; k < side.pair_count; ++k) store(of_pairs + 8 * k, load<F8>(of_pairs + 8 * k) * factors);
        for (int64_t i = 0; i < side.groups * MAX_ROWS; ++i) {
            middles[i] *= decay[i % MAX_ROWS];
            energy[i] *= decay[i % MAX_ROWS] * decay[i % MAX_ROWS];
        }
    }

    void add(float* scores, int64_t first_block, int64_t blocks) {
        weigh(scores, blocks);
        find(first_block, blocks);
        gather_codes(blocks);
        int64_t pair = 0;
        for (int64_t g = 0; g < side.groups; ++g) {
            int64_t last = pair;
            while (last < side.pair_count && side.pairs[last].group == g) ++last;
            float bound[MAX_ROWS], unit[8];
            multiply(scores, blocks, g, bound);
            bool is_twofold = false;
            for (int64_t r = 0; r < rows; ++r) {
                for (int i = 0; i < MOST_TAKEN_OUT && is_coarse(bound[r], blocks, g, r); ++i) {
                    take_out_largest(pair, last, blocks, r, bound[r]);
                }
                is_twofold |= is_coarse(bound[r], blocks, g, r);
            }
            quantize(bound, blocks, is_twofold, unit);
            add_pairs(pair, last, blocks, unit);
            if (is_twofold) {
                for (int64_t r = 0; r < rows; ++r) bound[r] = unit[r] * 1.001f;
                quantize(bound, blocks, false, unit);
                add_pairs(pair, last, blocks, unit);
            }
            if (side.middle) add_middles(scores, blocks, g);
            pair = last;
        }
    }

    void add_pairs(int64_t first, int64_t last, int64_t blocks, const float (&unit)[8]) {
        for (int64_t k = first; k < last; ++k) add_to(of_pairs + 8 * k, side.pairs[k], blocks, load<F8>(unit));
    }

    void find(int64_t first_block, int64_t blocks) {
        const int64_t size = block_bytes(side);
        for (int64_t b = 0; b < blocks; ++b) {
            places[b] = place_of(h, side, first_block + b, room.blocks_of_values + b * size);
        }
    }

    // The tile's codes, byte by byte: what a pair reads then lies together.
    __attribute__((noinline)) void gather_codes(int64_t blocks) {
        for (int64_t b = 0; b < blocks; ++b) {
            const uint8_t* codes = places[b].codes;
            for (int64_t j = 0; j < side.nibbles / 2; ++j) {
                store(room.codes + (j * TILE + b) * 64, load<I16>(codes + j * 64));
            }
        }
    }

    // Weights times the scales of the tokens; the largest of each row.
    __attribute__((noinline)) void multiply(const float* scores, int64_t blocks, int64_t g,
                                            float (&largest_product)[MAX_ROWS]) {
        for (int64_t b = 0; b < blocks; ++b) {
            F16 scales[4];
            Keys::decode_scales(side, h.head, places[b].scale, g, scales);
            for (int c = 0; c < 4; ++c) store(room.scales + b * 64 + c * 16, scales[c]);
        }
        for (int64_t r = 0; r < rows; ++r) {
            F16 most{}, squares{};
            for (int64_t i = 0; i < blocks * 64; i += 16) {
                const F16 product = load<F16>(scores + r * TILE * 64 + i) * load<F16>(room.scales + i);
                store(room.products + r * TILE * 64 + i, product);
                most = larger(most, product);
                squares += product * product;
            }
            largest_product[r] = largest(most);
            energy[g * MAX_ROWS + r] += sum(squares);
        }
    }

    // Whether rounding to integers would show in the result: one unit's error is uniform, and errors add as noise does.
    bool is_coarse(float bound, int64_t blocks, int64_t g, int64_t r) const {
        const float unit = bound / WEIGHT_TOP, tokens = float(blocks * 64);
        return unit * unit * tokens / 12 > TOLERANCE * TOLERANCE * energy[g * MAX_ROWS + r];
    }

    // A few tokens that outweigh all others are added exactly, so that units become fine enough for the rest.
    __attribute__((noinline)) void take_out_largest(int64_t first_pair, int64_t last_pair, int64_t blocks, int64_t r,
                                                    float& bound) {
        float* products = room.products + r * TILE * 64;
        int64_t place = 0;
        while (largest_of(products + place, 64) != bound) place += 64;
        while (products[place] != bound) ++place;
        unpack_token(place / 64, place % 16 * 4 + place / 16 % 4);
        for (int64_t k = first_pair; k < last_pair; ++k) {
            const QjlPair& pair = side.pairs[k];
            const auto level = [&](int i) { return int(pair.tables[i][room.nibbles[pair.sources[i]]]); };
            const float unit = bound * pair.step;
            of_pairs[8 * k + r] += unit * float(level(0) + level(1));
            of_pairs[8 * k + 4 + r] += unit * float(level(2) + level(3));
        }
        products[place] = 0;
        bound = largest_of(products, blocks * 64);
    }

    static float largest_of(const float* numbers, int64_t count) {
        F16 most{};
        for (int64_t i = 0; i < count; i += 16) most = larger(most, load<F16>(numbers + i));
        return largest(most);
    }

    void unpack_token(int64_t block, int64_t token) {
        for (int64_t j = 0; j < side.nibbles / 2; ++j) {
            const uint8_t byte = room.codes[(j * TILE + block) * 64 + token];
            room.nibbles[2 * j] = byte & 15, room.nibbles[2 * j + 1] = byte >> 4;
        }
    }

    // Integers from products, which become what is left over if they are rounded down; `unit` is what 1 stands for.
    __attribute__((noinline)) void quantize(const float (&bound)[MAX_ROWS], int64_t blocks, bool is_rounded_down,
                                            float (&unit)[8]) {
        for (int64_t r = 0; r < 4; ++r) unit[r] = unit[4 + r] = 0;
        const float shift = is_rounded_down ? -0.5f : 0;
        for (int64_t r = 0; r < rows; ++r) {
            if (!(bound[r] > 1e-30f)) {
                for (int64_t b = 0; b < blocks; ++b) __builtin_memset(room.weights + (b * rows + r) * 128, 0, 128);
                continue;
            }
            unit[r] = unit[4 + r] = bound[r] / WEIGHT_TOP;
            const float inverse = WEIGHT_TOP / bound[r];
            for (int64_t b = 0; b < blocks; ++b) {
                float* products = room.products + (r * TILE + b) * 64;
                I16 weights[4];
                for (int c = 0; c < 4; ++c) {
                    const F16 product = load<F16>(products + c * 16);
                    weights[c] = round(product * inverse + shift);
                    if (is_rounded_down) {
                        weights[c] = larger(weights[c], I16{});
                        store(products + c * 16, larger(product - converted<F16>(weights[c]) * unit[r], F16{}));
                    }
                }
                put_weights(room.weights + (b * rows + r) * 128, weights);
            }
        }
    }

    void add_to(float* sums, const QjlPair& pair, int64_t blocks, F8 unit) {
        float added[8];
        switch (rows) {
            case 1: add_pair<1>(pair, room.codes, blocks, room.weights, added); break;
            case 2: add_pair<2>(pair, room.codes, blocks, room.weights, added); break;
            case 3: add_pair<3>(pair, room.codes, blocks, room.weights, added); break;
            default: add_pair<4>(pair, room.codes, blocks, room.weights, added); break;
        }
        store(sums, load<F8>(sums) + load<F8>(added) * (unit * pair.step));
    }

    void add_middles(const float* scores, int64_t blocks, int64_t g) {
        for (int64_t b = 0; b < blocks; ++b) {
            F16 by_four[4];
            Keys::decode_halves(places[b].middle + g * 128, by_four);
            for (int64_t r = 0; r < rows; ++r) {
                F16 total{};
                for (int c = 0; c < 4; ++c) total += by_four[c] * load<F16>(scores + (r * TILE + b) * 64 + c * 16);
                middles[g * MAX_ROWS + r] += sum(total);
            }
        }
    }

    // [maximum, weight, sums of all coordinates] of each row
    __attribute__((noinline)) void leave(float* partial) const {
        const int64_t group_dim = side.code_dim / side.groups;
        for (int64_t r = 0; r < rows; ++r) {
            float* row = partial + (first_row + r) * (2 + side.code_dim);
            row[0] = maximum[r], row[1] = weight[r];
            for (int64_t i = 0; i < side.code_dim; ++i) {
                row[2 + i] = side.middle ? middles[i / group_dim * MAX_ROWS + r] : 0;
            }
            for (int64_t k = 0; k < side.pair_count; ++k) {
                for (int i = 0; i < 2; ++i) {
                    const int32_t coordinate = side.pairs[k].coordinates[i];
                    if (coordinate >= 0) row[2 + coordinate] += of_pairs[8 * k + 4 * i + r];
                }
            }
        }
    }
};
