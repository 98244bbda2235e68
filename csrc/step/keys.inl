// Scores of packed keys.

// Fills in what rows ask. Scores are linear in the queries, so `factor` scales them once for all.
struct Question {
    const Head& h;
    const QjlSide& side;
    Scratch& room;
    const Asked& asked;
    int64_t rows;

    void ask(int64_t first_row, float factor) {
        __builtin_memset(room.queries, 0, MAX_ROWS * side.head_dim * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) h.put_query(first_row + r, factor, room.queries + r * side.head_dim);
        map_queries();
        fill_tables();
        quantize_tables();
        meet_mean();
    }

    const float* query(int64_t r) const { return room.queries + r * side.head_dim; }

    __attribute__((noinline)) void map_queries() {
        if (!side.map) {
            __builtin_memcpy(room.mapped, room.queries, MAX_ROWS * side.code_dim * sizeof(float));
            return;
        }
        const Numbers map = map_of(side, h.head);
        for (int64_t i = 0; i < side.code_dim; ++i) {
            map.copy(i, room.row, side.head_dim);
            const F4 mapped = dots(room.row, room.queries, side.head_dim, side.head_dim);
            for (int64_t r = 0; r < MAX_ROWS; ++r) room.mapped[r * side.code_dim + i] = mapped[r];
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
                asked.sums_of_groups[g * rows + r] = total;
            }
        }
    }

    const float* floats(int64_t j, int64_t r) const { return room.tables_of_floats + (j * rows + r) * 16; }

    // Four nibbles share a unit in which their sums fit 16 bits; units are integer multiples of the group's least.
    __attribute__((noinline)) void quantize_tables() {
        const int64_t group_nibbles = side.nibbles / side.groups, quads = (group_nibbles + 3) / 4;
        for (int64_t g = 0; g < side.groups; ++g) {
            int32_t* factors = asked.factors + g * quads * rows * 2;
            for (int64_t r = 0; r < rows; ++r) {
                const float unit = choose_units(g * group_nibbles, group_nibbles, r, factors);
                asked.units[g * rows + r] = unit;
                for (int64_t j = 0; j < group_nibbles; j += 2) {
                    const float inverse = 1 / (unit * float(factors[(j / 4 * rows + r) * 2]));
                    put(g * group_nibbles + j, r, inverse);
                }
            }
        }
    }

    float choose_units(int64_t first, int64_t count, int64_t r, int32_t* factors) const {
        float total = 0;
        for (int64_t quad = 0; quad * 4 < count; ++quad) {
            float bound = 1e-30f;
            for (int64_t j = quad * 4; j < quad * 4 + 4 && j < count; ++j) {
                const F16 table = load<F16>(floats(first + j, r));
                bound += largest(larger(table, -table));
            }
            room.bounds[quad] = bound;
            total += bound;
        }
        const float unit = total * 0x1p-29f;
        for (int64_t quad = 0; quad * 4 < count; ++quad) {
            const int32_t factor = int32_t(room.bounds[quad] / (unit * 32760.0f)) + 1;
            factors[(quad * rows + r) * 2] = factor;
            factors[(quad * rows + r) * 2 + 1] = factor << 16;
        }
        return unit;
    }

    void put(int64_t j, int64_t r, float inverse) {
        int16_t entries[2][16];
        for (int64_t k = 0; k < 2; ++k) {
            store(entries[k], converted<S16>(round(load<F16>(floats(j + k, r)) * inverse)));
        }
        put_table(asked.tables + (j / 2 * rows + r) * 64, entries[0], entries[1]);
    }

    void meet_mean() {
        const float* mean = side.mean ? side.mean + h.head * side.head_dim : nullptr;
        for (int64_t r = 0; r < rows; ++r) {
            asked.constants[r] = mean ? dot(query(r), mean, side.head_dim) : 0;
            if (const QjlTurn* turn = h.s.turn) {
                asked.constants[r] -= turn_apart(*turn, query(r), mean, asked.turned + r * 2 * turn->pairs);
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
};

// Scores by the tables.
struct Keys {
    const Head& h;
    const QjlSide& side;
    Scratch& room;
    const Asked& asked;
    int64_t rows;

    // Scores of one block, rows `stride` apart.
    __attribute__((noinline)) void score(int64_t block, float* scores, int64_t stride) const {
        const auto [codes, scale, middle] = place_of(h, side, block, room.block_of_keys);
        const int64_t bytes = side.nibbles / side.groups / 2;
        const uint8_t* soon = codes_ahead(h, h.s.values, block);
        for (int64_t g = 0; g < side.groups; ++g) {
            scan(codes + g * bytes * 64, bytes, asked.tables + g * bytes * rows * 64,
                 asked.factors + g * ((bytes + 1) / 2) * rows * 2, soon + g * bytes * 64);
            F16 scales[4], middles[4]{};
            decode_scales(side, h.head, scale, g, scales);
            if (side.middle) decode_halves(middle + g * 128, middles);
            for (int64_t r = 0; r < rows; ++r) {
                const float unit = asked.units[g * rows + r];
                for (int c = 0; c < 4; ++c) {
                    F16 part = converted<F16>(load<I16>(room.sums + r * 64 + c * 16)) * (scales[c] * unit);
                    if (side.middle) part += middles[c] * asked.sums_of_groups[g * rows + r];
                    float* to = scores + r * stride + c * 16;
                    store(to, g ? load<F16>(to) + part : part + asked.constants[r]);
                }
            }
        }
    }

    void scan(const uint8_t* codes, int64_t bytes, const uint8_t* tables, const int32_t* factors,
              const uint8_t* soon) const {
        switch (rows) {
            case 1: return scan_block<1>(codes, bytes, tables, factors, room.sums, soon);
            case 2: return scan_block<2>(codes, bytes, tables, factors, room.sums, soon);
            case 3: return scan_block<3>(codes, bytes, tables, factors, room.sums, soon);
            default: return scan_block<4>(codes, bytes, tables, factors, room.sums, soon);
        }
    }

    static void decode_halves(const uint8_t* halves, F16 (&by_four)[4]) {
        F16 tokens[4];
        for (int i = 0; i < 4; ++i) tokens[i] = floats_of_halves(load<H16>(halves + 32 * i));
        arrange_by_four(tokens, by_four);
    }

    static void decode_scales(const QjlSide& side, int64_t head, const uint8_t* scale, int64_t g, F16 (&by_four)[4]) {
        if (!side.unit) return decode_halves(scale + g * 128, by_four);
        const I16 words = load<I16>(scale + g * 64);
        const float unit = side.unit[head];
        for (int c = 0; c < 4; ++c) {
            const I16 codes = (words >> (8 * c)) & 255;
            const F16 octaves = (converted<F16>(codes) - 128.0f) * (1.0f / 12);
            by_four[c] = where_any(codes, exp2(octaves) * unit);
        }
    }
};
