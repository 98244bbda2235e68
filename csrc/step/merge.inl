// Joins the splits and the exact tokens of one pair in a fixed order; the sums of the codes are mapped back once.

struct Merge {
    const QjlStep& s;
    const Head h;
    int64_t pair;
    Scratch& room;

    const float* exact(int64_t r) const { return exact_of(s, pair) + r * (2 + s.values.head_dim); }
    const float* split(int64_t k, int64_t r) const { return split_of(s, pair, k) + r * (2 + s.values.code_dim); }

    void run() const {
        for (int64_t r = 0; r < s.rows; r += MAX_ROWS) {
            const int64_t rows = fewer(MAX_ROWS, s.rows - r);
            for (int64_t i = 0; i < rows; ++i) join(r + i, room.mapped + i * s.values.code_dim, out(i));
            map_back(rows);
            for (int64_t i = 0; i < rows; ++i) {
                store_numbers(out(i), s.values.head_dim, s.out, h.place_of_row(s.out_stride, r + i), s.out_type);
            }
        }
    }

    float* out(int64_t i) const { return room.outs + i * s.values.head_dim; }

    // Leaves sums of codes and of exact tokens, both over the whole weight.
    void join(int64_t r, float* sums, float* out) const {
        const QjlSide& side = s.values;
        const int64_t splits = h.splits();
        float maximum = exact(r)[0];
        for (int64_t k = 0; k < splits; ++k) maximum = split(k, r)[0] > maximum ? split(k, r)[0] : maximum;
        float packed = 0;
        for (int64_t k = 0; k < splits; ++k) packed += split(k, r)[1] * exp2(split(k, r)[0] - maximum);
        const float factor = exp2(exact(r)[0] - maximum), weight = packed + exact(r)[1] * factor;
        const bool sees_any = maximum > LOWEST;
        const float share = sees_any ? 1 / weight : 0;
        __builtin_memset(sums, 0, side.code_dim * sizeof(float));
        __builtin_memset(out, 0, side.head_dim * sizeof(float));
        for (int64_t k = 0; k < splits; ++k) {
            add_scaled(sums, split(k, r) + 2, exp2(split(k, r)[0] - maximum) * share, side.code_dim);
        }
        add_scaled(out, exact(r) + 2, factor * share, side.head_dim);
        if (side.mean) add_scaled(out, side.mean + h.head * side.head_dim, packed * share, side.head_dim);
        const float lse = sees_any ? (maximum + __builtin_log2f(weight)) / LOG2E : -__builtin_inff();
        if (s.lse) s.lse[pair * s.rows + r] = lse;
    }

    void map_back(int64_t rows) const {
        const QjlSide& side = s.values;
        const auto to = [&](int64_t r) { return out(r < rows ? r : 0); };
        const auto sums = [&](int64_t r) { return room.mapped + (r < rows ? r : 0) * side.code_dim; };
        if (side.map) {
            map_of(side, h.head)
                .add_to({to(0), to(1), to(2), to(3)}, {sums(0), sums(1), sums(2), sums(3)}, side.code_dim,
                        side.head_dim);
        } else {
            for (int64_t r = 0; r < rows; ++r) add_scaled(to(r), sums(r), 1, side.code_dim);
        }
    }
};
