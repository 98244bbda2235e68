// Scores of packed keys.

inline void decode_halves(const uint8_t* halves, F16 (&lanes)[4]) {
    alignas(64) float tokens[64], by_lanes[64];
    for (int i = 0; i < 4; ++i) store(tokens + 16 * i, floats_of_halves(load<H16>(halves + 32 * i)));
    swap_lanes(tokens, by_lanes);
    for (int i = 0; i < 4; ++i) lanes[i] = load<F16>(by_lanes + 16 * i);
}

inline void decode_scales(const QjlSide& side, int64_t head, const uint8_t* scale, int64_t g, F16 (&lanes)[4]) {
    if (!side.unit) return decode_halves(scale + g * 128, lanes);
    I16 codes[4];
    put_in_lanes(scale + g * 64, codes);
    const float unit = side.unit[head];
    for (int k = 0; k < 4; ++k) {
        lanes[k] = where_any(codes[k], exp2((converted<F16>(codes[k]) - 128.0f) * (1.0f / 12)) * unit);
    }
}

// Fills in what rows ask. Scores are linear in the queries, so `factor` scales them once for all.
//
// A table has 16 entries of 8 bits above its least, times a factor of its own: units as fine as its range allows. Where
// that is not fine enough for all of them together, the widest tables have a second one, of what the first leaves.
struct Question {
    const Head& h;
    const QjlSide& side;
    Scratch& room;
    const Asked& asked;
    int64_t rows;
    static constexpr float LEAST = 1e-30f;
    static constexpr float KEY_SHARE = 1;  // of the error of scores in the tolerance

    void ask(int64_t first_row, float factor) {
        __builtin_memset(room.queries, 0, MAX_ROWS * side.head_dim * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) h.put_query(first_row + r, factor, room.queries + r * side.head_dim);
        map_queries();
        fill_tables();
        for (int64_t g = 0; g < side.groups; ++g) quantize(g);
        meet_mean();
    }

    const float* query(int64_t r) const { return room.queries + r * side.head_dim; }

    __attribute__((noinline)) void map_queries() {
        if (!side.map) {
            __builtin_memcpy(room.mapped, room.queries, MAX_ROWS * side.code_dim * sizeof(float));
            return;
        }
        constexpr int64_t AT_ONCE = 32;
        const Numbers map = map_of(side, h.head);
        for (int64_t first = 0; first < side.code_dim; first += AT_ONCE) {
            F4 mapped[AT_ONCE];
            const int64_t count = fewer(AT_ONCE, side.code_dim - first);
            map.from(first).dots(count, room.queries, side.head_dim, side.head_dim, mapped);
            for (int64_t i = 0; i < count; ++i) {
                for (int64_t r = 0; r < MAX_ROWS; ++r) room.mapped[r * side.code_dim + first + i] = mapped[i][r];
            }
        }
    }

    __attribute__((noinline)) void fill_tables() {
        const int64_t group_dim = side.code_dim / side.groups, group_nibbles = side.nibbles / side.groups;
        const int64_t code = side.code_stride * h.head * group_nibbles * side.slots;
        for (int64_t j = 0; j < side.nibbles; ++j) {
            const int64_t within = code + j % group_nibbles * side.slots;  // all groups have the same code
            const float* mapped = room.mapped + j / group_nibbles * group_dim;
            F16 table[MAX_ROWS]{};
            for (int64_t i = 0; i < side.slots; ++i) {
                const F16 entries = floats_of_halves(load<H16>(side.entries + (within + i) * 16));
                const float* of_rows = mapped + side.coordinates[within + i];
                for (int64_t r = 0; r < rows; ++r) table[r] += of_rows[r * side.code_dim] * entries;
            }
            for (int64_t r = 0; r < rows; ++r) store(room.tables_of_floats + (j * rows + r) * 16, table[r]);
        }
        for (int64_t g = 0; side.middle && g < side.groups; ++g) {
            for (int64_t r = 0; r < rows; ++r) {
                float total = 0;
                for (int64_t i = 0; i < group_dim; ++i) total += room.mapped[r * side.code_dim + g * group_dim + i];
                asked.sums_of_groups[g * MAX_ROWS + r] = total;
            }
        }
    }

    // Of the high or low nibble of a byte of a group.
    const float* table(int64_t g, int64_t byte, int64_t is_high, int64_t r) const {
        const int64_t nibble = 2 * (g * bytes_of_group(side) + byte) + is_high;
        return room.tables_of_floats + (nibble * rows + r) * 16;
    }

    // Where in the room is what belongs to four nibbles of a row.
    int64_t four(int64_t quad, int64_t is_high, int64_t r) const { return ((quad * 2 + is_high) * rows + r) * 4; }

    void quantize(int64_t g) const {
        const int64_t bytes = bytes_of_group(side), quads = (bytes + 3) / 4;
        measure(g, bytes, quads);
        for (int64_t r = 0; r < rows; ++r) choose_unit(g, quads, r);
        for (int64_t q = 0; q < quads; ++q) put_tables(g, q);
        asked.counts[g] = quads + refine(g, bytes, quads);
    }

    // The least entry of each table, and how far it is to the largest.
    __attribute__((noinline)) void measure(int64_t g, int64_t bytes, int64_t quads) const {
        for (int64_t q = 0; q < quads; ++q) {
            for (int64_t is_high = 0; is_high < 2; ++is_high) {
                for (int64_t r = 0; r < rows; ++r) {
                    const auto of = [&](int64_t i) {
                        return 4 * q + i < bytes ? load<F16>(table(g, 4 * q + i, is_high, r)) : F16{};
                    };
                    const F16 a = of(0), b = of(1), c = of(2), d = of(3);
                    const F4 low = -largest_of_each(-a, -b, -c, -d);
                    store(room.lows + four(q, is_high, r), low);
                    store(room.ranges + four(q, is_high, r), largest_of_each(a, b, c, d) - low);
                }
            }
        }
    }

    void choose_unit(int64_t g, int64_t quads, int64_t r) const {
        F4 widest{}, least{}, most{};
        for (int64_t q = 0; q < 2 * quads; ++q) {
            const F4 low = load<F4>(room.lows + four(q / 2, q % 2, r));
            widest = larger(widest, load<F4>(room.ranges + four(q / 2, q % 2, r)));
            least += low, most += larger(low, -low);
        }
        const float by_range = largest(widest) / (255.0f * FACTOR_TOP), by_sum = sum(most) * 0x1p-29f;
        const float unit = (by_range > by_sum ? by_range : by_sum) + LEAST;
        asked.units[g * MAX_ROWS + r] = unit, room.inverses[r] = 1 / unit;
        asked.firsts[g * MAX_ROWS + r] = int32_t(__builtin_rintf(sum(least) / unit));
    }

    uint8_t* factor_at(int64_t g, int64_t q, int64_t is_high, int64_t r, int64_t i) const {
        return asked.factors + g * most_quads(side) * 2 * rows * 4 + four(q, is_high, r) + i;
    }
    uint8_t* table_at(int64_t g, int64_t q, int64_t is_high, int64_t r, int64_t i) const {
        return asked.tables + (g * most_quads(side) * 2 * rows * 4 + four(q, is_high, r) + i) * 16;
    }
    Quad& quad_at(int64_t g, int64_t q) const { return asked.quads[g * most_quads(side) + q]; }

    // The tables of four bytes above their least entries, and how far scores are off by them, squared.
    __attribute__((noinline)) void put_tables(int64_t g, int64_t q) const {
        F4 error{};
        for (int64_t r = 0; r < rows; ++r) {
            const float unit = asked.units[g * MAX_ROWS + r];
            F4 squares{};
            for (int64_t is_high = 0; is_high < 2; ++is_high) {
                const F4 ranges = load<F4>(room.ranges + four(q, is_high, r)) * room.inverses[r];
                using Four = Vector<int32_t, 4>;
                Four factors = converted<Four>(ranges * (1.0f / 255) + 0.9999f);
                factors = factors < 1 ? Four{} + 1 : factors > FACTOR_TOP ? Four{} + FACTOR_TOP : factors;
                const F4 floats = converted<F4>(factors);
                squares += floats * floats;
                put_entries(g, q, is_high, r, floats);
            }
            error = larger(error, squares * (unit * unit / 12));
        }
        store(room.errors + 4 * q, error);
        for (int64_t i = 0; i < 4; ++i) quad_at(g, q).at[i] = int32_t((4 * q + i) * 64);
        for (int64_t i = bytes_of_group(side) - 4 * q; i < 4; ++i) leave_out(g, q, i);
    }

    void put_entries(int64_t g, int64_t q, int64_t is_high, int64_t r, F4 factors) const {
        const F4 lows = load<F4>(room.lows + four(q, is_high, r)), scales = room.inverses[r] / factors;
        const int64_t count = fewer(4, bytes_of_group(side) - 4 * q);
        const float* from = table(g, 4 * q, is_high, r);
        uint8_t *to = table_at(g, q, is_high, r, 0), *of_tables = factor_at(g, q, is_high, r, 0);
        for (int64_t i = 0; i < count; ++i) {
            of_tables[i] = uint8_t(factors[i]);
            store_bytes(to + 16 * i, round((load<F16>(from + 32 * rows * i) - lows[i]) * scales[i]));
        }
    }

    // A place of a quad that no byte takes: it counts nothing.
    void leave_out(int64_t g, int64_t q, int64_t i) const {
        quad_at(g, q).at[i] = quad_at(g, q).at[i - 1];
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t is_high = 0; is_high < 2; ++is_high) {
                *factor_at(g, q, is_high, r, i) = 0;
                __builtin_memset(table_at(g, q, is_high, r, i), 0, 16);
            }
        }
    }

    // Second tables for the widest bytes, until scores are as exact as they must be; how many quads that makes.
    int64_t refine(int64_t g, int64_t bytes, int64_t quads) const {
        const float allowed = allowed_error(g);
        float total = 0;
        for (int64_t byte = 0; byte < bytes; ++byte) total += room.errors[byte];
        int64_t count = 0;
        for (; total > allowed && count < 4 * quads; ++count) {
            int64_t widest = 0;
            for (int64_t byte = 1; byte < bytes; ++byte) {
                if (room.errors[byte] > room.errors[widest]) widest = byte;
            }
            if (!(room.errors[widest] > 0)) break;
            put_fine_tables(g, widest, quads + count / 4, count % 4);
            total -= room.errors[widest];
            room.errors[widest] = 0;
        }
        for (int64_t place = count; place % 4; ++place) leave_out(g, quads + place / 4, place % 4);
        return (count + 3) / 4;
    }

    void put_fine_tables(int64_t g, int64_t byte, int64_t q, int64_t i) const {
        quad_at(g, q).at[i] = int32_t(byte * 64);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t is_high = 0; is_high < 2; ++is_high) {
                const float factor = *factor_at(g, byte / 4, is_high, r, byte % 4);
                const float low = room.lows[four(byte / 4, is_high, r) + byte % 4];
                const F16 whole = (load<F16>(table(g, byte, is_high, r)) - low) * room.inverses[r];
                const I16 steps = round(whole * (1 / factor) - 0.5f);
                store_bytes(table_at(g, byte / 4, is_high, r, byte % 4), steps);
                store_bytes(table_at(g, q, is_high, r, i), round(whole - converted<F16>(steps) * factor));
                *factor_at(g, q, is_high, r, i) = 1;
            }
        }
    }

    // Of the sums of a group, squared: by the scales of the first tokens that a row has, apart from its first block.
    float allowed_error(int64_t g) const {
        const int64_t first = h.first_block(), blocks = h.blocks();
        const float error = KEY_SHARE * float(side.tolerance) * (h.s.softcap > 0 ? 1 : LOG2E);
        for (int64_t b = 1; b <= blocks; ++b) {
            const float square = mean_square(first + b % blocks, g);
            if (square > 0) return error * error / (square * float(side.groups));
        }
        return 0;
    }

    // Of the scales of a block's tokens.
    float mean_square(int64_t block, int64_t g) const {
        F16 scales[4];
        decode_scales(side, h.head, place_of(h, side, block, room.block_of_keys).scale, g, scales);
        float squares = 0, count = 0;
        for (const F16& of_lanes : scales) {
            float numbers[16];
            store(numbers, of_lanes);
            for (const float scale : numbers) squares += scale * scale, count += scale != 0;
        }
        return count > 0 ? squares / count : 0;
    }

    void meet_mean() const {
        const float* mean = side.mean ? side.mean + h.head * side.head_dim : nullptr;
        for (int64_t r = 0; r < rows; ++r) {
            asked.constants[r] = mean ? dot(query(r), mean, side.head_dim) : 0;
            if (const QjlTurn* turn = h.s.turn) {
                float* turned = asked.turned + r * 2 * turn->pairs;
                asked.constants[r] -= turn_apart(*turn, query(r), mean, turned);
                asked.turn_scales[r] = turn_scale(*turn, turned);
            }
        }
    }

    // The part of <query, mean> that RoPE turns, which is left by pairs.
    static float turn_apart(const QjlTurn& t, const float* query, const float* mean, float* real) {
        const int32_t *first = t.coordinates, *second = t.coordinates + t.pairs;
        float* imaginary = real + t.pairs;
        float total = 0;
        for (int64_t f = 0; f < t.pairs; ++f) {
            const float q1 = query[first[f]], q2 = query[second[f]], m1 = mean[first[f]], m2 = mean[second[f]];
            real[f] = (q1 * m1 + q2 * m2) * t.scaling;
            imaginary[f] = (q2 * m1 - q1 * m2) * t.scaling;
            total += q1 * m1 + q2 * m2;
        }
        return total;
    }

    // What coefficients are multiplied by so that they, and their sums, are integers of 16 and 32 bits. The modulus of
    // a frequency does not change with the position: it bounds them once for all.
    static float turn_scale(const QjlTurn& t, const float* real) {
        const float* imaginary = real + t.pairs;
        float most = LEAST;
        for (int64_t f = 0; f < t.pairs; ++f) {
            most += t.bounds[f] * __builtin_sqrtf(real[f] * real[f] + imaginary[f] * imaginary[f]);
        }
        return 1 / most;
    }
};

// Scores by the tables.
struct Keys {
    const Head& h;
    const QjlSide& side;
    Scratch& room;
    const Asked& asked;
    int64_t rows;

    // Adds the scores of one block to what is there, rows TILE * 64 apart.
    __attribute__((noinline)) void add(int64_t block, const Ahead& ahead, float* scores) const {
        const auto [codes, scale, middle] = place_of(h, side, block, room.block_of_keys);
        for (int64_t g = 0; g < side.groups; ++g) {
            scan(g, codes + g * bytes_of_group(side) * 64, g ? Ahead{codes, codes, 0} : ahead);
            F16 scales[4], middles[4]{};
            decode_scales(side, h.head, scale, g, scales);
            if (side.middle) decode_halves(middle + g * 128, middles);
            for (int64_t r = 0; r < rows; ++r) {
                const float unit = asked.units[g * MAX_ROWS + r];
                for (int k = 0; k < 4; ++k) {
                    float* to = scores + r * TILE * 64 + k * 16;
                    F16 score = load<F16>(to);
                    score += converted<F16>(load<I16>(room.sums + r * 64 + k * 16)) * (scales[k] * unit);
                    if (side.middle) score += middles[k] * asked.sums_of_groups[g * MAX_ROWS + r];
                    store(to, score);
                }
            }
        }
    }

    void scan(int64_t g, const uint8_t* codes, const Ahead& ahead) const {
        const auto of_rows = [&] {
            switch (rows) {
                case 1: return scan_block<1>;
                case 2: return scan_block<2>;
                case 3: return scan_block<3>;
                default: return scan_block<4>;
            }
        }();
        const int64_t first = g * most_quads(side);
        of_rows(codes, asked.quads + first, asked.counts[g], asked.tables + first * 2 * rows * 64,
                asked.factors + first * 2 * rows * 4, asked.firsts + g * MAX_ROWS, room.sums, ahead);
    }
};
