// Scores of packed keys.

inline void decode_halves(const uint8_t* halves, float* by_lanes) {
    alignas(64) float tokens[64];
    for (int i = 0; i < 4; ++i) store(tokens + 16 * i, floats_of_halves(load<H16>(halves + 32 * i)));
    swap_lanes(tokens, by_lanes);
}

inline void decode_scales(const QjlSide& side, int64_t head, const uint8_t* scale, int64_t g, float* by_lanes) {
    if (!side.unit) return decode_halves(scale + g * 128, by_lanes);
    uint8_t codes[64];
    swap_lanes(scale + g * 64, codes);
    scales_of_logarithms(codes, side.unit[head], by_lanes);
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
        h.put_queries(first_row, rows, factor, room.queries);
        map_queries();
        for (int64_t g = 0; g < side.groups; ++g) {
            for_rows(rows, [&]<int ROWS> { quantize<ROWS>(g); });
            if (side.middle) sum_group(g);
        }
        meet_mean();
    }

    const float* query(int64_t r) const { return room.queries + r * side.head_dim; }

    __attribute__((noinline)) void map_queries() {
        if (!side.map) {
            __builtin_memcpy(room.mapped, room.queries, MAX_ROWS * side.code_dim * sizeof(float));
            return;
        }
        map_of(side, h.head).dots(side.code_dim, room.queries, side.head_dim, room.mapped, side.code_dim);
    }

    template <int ROWS>
    __attribute__((noinline)) void quantize(int64_t g) const {
        const int64_t bytes = bytes_of_group(side), quads = (bytes + 3) / 4;
        for (int64_t n = 0; n < 2 * quads; ++n) fill<ROWS>(g, n), measure<ROWS>(n);
        choose_units(g, 2 * quads);
        for (int64_t q = 0; q < quads; ++q) {
            const F16 of_low = put_entries<ROWS>(g, 2 * q), of_high = put_entries<ROWS>(g, 2 * q + 1);
            alignas(64) float errors[16];
            store(errors, of_low + of_high);
            F4 most{};
            for (int r = 0; r < ROWS; ++r) most = larger(most, load<F4>(errors + 4 * r));
            store(room.errors + 4 * q, most);
            for (int64_t i = 0; i < 4; ++i) quad_at(g, q).at[i] = int32_t(fewer(4 * q + i, bytes - 1) * 64);
        }
        asked.counts[g] = quads + refine(g, bytes, quads);
    }

    // Four nibbles are the low ones, or the high ones, of four bytes of a group. Where what belongs to one of them and
    // a row lies in the room:
    int64_t place(int64_t four, int64_t r, int64_t i) const { return (four * rows + r) * 4 + i; }
    float* table(int64_t four, int64_t r, int64_t i) const {
        return room.tables_of_floats + place(four, r, i) * 16;
    }

    // Tables are zeros where there is no byte.
    template <int ROWS>
    QJL_INLINE void fill(int64_t g, int64_t four) const {
        const int64_t nibbles = side.nibbles / side.groups, dim = side.code_dim;  // all groups have the same code
        const float* mapped = room.mapped + g * (dim / side.groups);
        for (int64_t i = 0; i < 4; ++i) {
            const int64_t nibble = 2 * (four / 2 * 4 + i) + four % 2;
            const int64_t first = (side.code_stride * h.head * nibbles + nibble) * side.slots;
            F16 a{}, b{}, c{}, d{};
            for (int64_t k = first; nibble < nibbles && k < first + side.slots; ++k) {
                const F16 entries = floats_of_halves(load<H16>(side.entries + k * 16));
                const float* of_rows = mapped + side.coordinates[k];
                a += of_rows[0] * entries;
                if constexpr (ROWS > 1) b += of_rows[dim] * entries;
                if constexpr (ROWS > 2) c += of_rows[2 * dim] * entries;
                if constexpr (ROWS > 3) d += of_rows[3 * dim] * entries;
            }
            store(table(four, 0, i), a);
            if constexpr (ROWS > 1) store(table(four, 1, i), b);
            if constexpr (ROWS > 2) store(table(four, 2, i), c);
            if constexpr (ROWS > 3) store(table(four, 3, i), d);
        }
    }

    // The least entry of each table, and how far it is to the largest.
    template <int ROWS>
    QJL_INLINE void measure(int64_t four) const {
        const auto of = [&](int i) { return load<F16>(table(four, i / 4 < ROWS ? i / 4 : 0, i % 4)); };
        const F16 low = join_each(of, [](const auto& x, const auto& y) { return smaller(x, y); });
        const F16 high = join_each(of, [](const auto& x, const auto& y) { return larger(x, y); });
        store(room.lows + place(four, 0, 0), low);
        store(room.ranges + place(four, 0, 0), high - low);
    }

    void choose_units(int64_t g, int64_t fours) const {
        F16 widest{}, least{}, most{};
        for (int64_t n = 0; n < fours; ++n) {
            const F16 low = load<F16>(room.lows + place(n, 0, 0));
            widest = larger(widest, load<F16>(room.ranges + place(n, 0, 0)));
            least += low, most += larger(low, -low);
        }
        alignas(64) float of_rows[3][4 * MAX_ROWS];
        store(of_rows[0], widest), store(of_rows[1], least), store(of_rows[2], most);
        for (int64_t r = 0; r < rows; ++r) {
            const auto of = [&](int k) { return load<F4>(of_rows[k] + 4 * r); };
            const float by_range = largest(of(0)) / (255.0f * FACTOR_TOP), by_sum = sum(of(2)) * 0x1p-29f;
            const float unit = (by_range > by_sum ? by_range : by_sum) + LEAST;
            asked.units[g * MAX_ROWS + r] = unit;
            asked.firsts[g * MAX_ROWS + r] = int32_t(__builtin_rintf(sum(of(1)) / unit));
            store(room.units + 4 * r, unit + F4{});
        }
    }

    uint8_t* factor_at(int64_t g, int64_t four, int64_t r, int64_t i) const {
        return asked.factors + g * most_quads(side) * 2 * rows * 4 + place(four, r, i);
    }
    uint8_t* table_at(int64_t g, int64_t four, int64_t r, int64_t i) const {
        return asked.tables + (g * most_quads(side) * 2 * rows * 4 + place(four, r, i)) * 16;
    }
    Quad& quad_at(int64_t g, int64_t q) const { return asked.quads[g * most_quads(side) + q]; }

    // Tables above their least entries; how far scores are off by them, squared. Factors of four rows are written, so
    // that what comes next must be put next.
    template <int ROWS>
    QJL_INLINE F16 put_entries(int64_t g, int64_t four) const {
        const F16 units = load<F16>(room.units), ranges = load<F16>(room.ranges + place(four, 0, 0));
        const I16 whole = converted<I16>(ranges / units * (1.0f / 255) + 0.9999f);
        const I16 factors = smaller(larger(whole, I16{} + 1), I16{} + FACTOR_TOP);
        store_bytes(factor_at(g, four, 0, 0), factors);
        const F16 steps = converted<F16>(factors) * units;
        alignas(64) float scales[16];
        store(scales, 1.0f / steps);
        const float *lows = room.lows + place(four, 0, 0), *from = table(four, 0, 0);
        uint8_t* to = table_at(g, four, 0, 0);
        for (int64_t k = 0; k < 4 * ROWS; ++k) {
            store_bytes(to + 16 * k, round((load<F16>(from + 16 * k) - lows[k]) * scales[k]));
        }
        return steps * steps * (1.0f / 12);
    }

    // A place of a quad that no byte takes: it counts nothing.
    void leave_out(int64_t g, int64_t q, int64_t i) const {
        quad_at(g, q).at[i] = quad_at(g, q).at[i - 1];
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t is_high = 0; is_high < 2; ++is_high) {
                *factor_at(g, 2 * q + is_high, r, i) = 0;
                __builtin_memset(table_at(g, 2 * q + is_high, r, i), 0, 16);
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
                const int64_t four = byte / 4 * 2 + is_high, fine = 2 * q + is_high;
                const float factor = *factor_at(g, four, r, byte % 4), unit = asked.units[g * MAX_ROWS + r];
                const F16 above = load<F16>(table(four, r, byte % 4)) - room.lows[place(four, r, byte % 4)];
                const F16 whole = above * (1 / unit);
                const I16 steps = round(whole * (1 / factor) - 0.5f);
                store_bytes(table_at(g, four, r, byte % 4), steps);
                store_bytes(table_at(g, fine, r, i), round(whole - converted<F16>(steps) * factor));
                *factor_at(g, fine, r, i) = 1;
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
        float scales[64], squares = 0, count = 0;
        decode_scales(side, h.head, place_of(h, side, block, room.block_of_keys).scale, g, scales);
        for (const float scale : scales) squares += scale * scale, count += scale != 0;
        return count > 0 ? squares / count : 0;
    }

    // What a middle is multiplied by.
    void sum_group(int64_t g) const {
        const int64_t dim = side.code_dim / side.groups;
        for (int64_t r = 0; r < rows; ++r) {
            float total = 0;
            for (int64_t i = 0; i < dim; ++i) total += room.mapped[r * side.code_dim + g * dim + i];
            asked.sums_of_groups[g * MAX_ROWS + r] = total;
        }
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
        for (int64_t f = 0; f < t.pairs; ++f) {
            const float q1 = query[first[f]], q2 = query[second[f]], m1 = mean[first[f]], m2 = mean[second[f]];
            real[f] = (q1 * m1 + q2 * m2) * t.scaling;
            imaginary[f] = (q2 * m1 - q1 * m2) * t.scaling;
        }
        return sum_of(real, t.pairs) / t.scaling;
    }

    // What coefficients are multiplied by so that they, and their sums, are integers of 16 and 32 bits. The modulus of
    // a frequency does not change with the position: it bounds them once for all.
    float turn_scale(const QjlTurn& t, const float* __restrict real) const {
        const float* __restrict imaginary = real + t.pairs;
        float* __restrict moduli = room.phasors_of_centre;  // of splits, which come later
        for (int64_t f = 0; f < t.pairs; ++f) {
            moduli[f] = __builtin_sqrtf(real[f] * real[f] + imaginary[f] * imaginary[f]);
        }
        return 1 / (LEAST + dot(moduli, t.bounds, t.pairs));
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
            alignas(64) float scales[64], middles[64] = {};
            decode_scales(side, h.head, scale, g, scales);
            if (side.middle) decode_halves(middle + g * 128, middles);
            for (int64_t r = 0; r < rows; ++r) {
                const float unit = asked.units[g * MAX_ROWS + r];
                for (int k = 0; k < 4; ++k) {
                    float* to = scores + r * TILE * 64 + k * 16;
                    F16 score = load<F16>(to);
                    const F16 scale_of_sums = load<F16>(scales + k * 16) * unit;
                    score += converted<F16>(load<I16>(room.sums + r * 64 + k * 16)) * scale_of_sums;
                    if (side.middle) score += load<F16>(middles + k * 16) * asked.sums_of_groups[g * MAX_ROWS + r];
                    store(to, score);
                }
            }
        }
    }

    void scan(int64_t g, const uint8_t* codes, const Ahead& ahead) const {
        const int64_t first = g * most_quads(side);
        for_rows(rows, [&]<int ROWS> {
            scan_block<ROWS>(codes, asked.quads + first, asked.counts[g], asked.tables + first * 2 * ROWS * 64,
                             asked.factors + first * 2 * ROWS * 4, asked.firsts + g * MAX_ROWS, room.sums, ahead);
        });
    }
};
