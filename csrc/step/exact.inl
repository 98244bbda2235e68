// Tokens in full precision, MOST of them at a time.
struct ExactTokens {
    static constexpr int64_t MOST = 64;
    const Head& h;
    Scratch& room;
    float* partial;  // [maximum, weight, head_dim sums] of each row

    float* row(int64_t r) const { return partial + r * (2 + h.s.values.head_dim); }

    void clear() const {
        __builtin_memset(partial, 0, exact_floats(h.s) * sizeof(float));
        for (int64_t r = 0; r < h.s.rows; ++r) row(r)[0] = LOWEST;
    }

    Numbers tokens_of(const QjlSegment& segment, const void* data, const int64_t (&stride)[3], int64_t token) const {
        const int64_t row = h.batch * stride[0] + h.head * stride[1], dtype = segment.dtype;
        if (segment.is_pool) return {number_at(data, row, dtype), stride[2], dtype, room.slots};
        return {number_at(data, row + token * stride[2], dtype), stride[2], dtype};
    }

    const int32_t* slots() const { return h.s.of_rows->slots + h.batch * h.s.of_rows->room; }
    int64_t count() const { return h.s.of_rows->counts[h.batch]; }

    // Leaves the slots of some tokens of a pool in the room, that of another one where there is none; whether any is.
    bool find(int64_t token, int64_t tokens) const {
        const int32_t* from = slots() + token;
        int32_t any = -1;
        for (int64_t i = 0; i < tokens; ++i) any = from[i] >= 0 ? from[i] : any;
        for (int64_t i = 0; i < tokens; ++i) room.slots[i] = from[i] >= 0 ? from[i] : any;
        return any >= 0;
    }

    bool sees(int64_t row, int64_t token) const {
        return slots()[token] >= 0 && token < count() - (h.s.queries - 1 - row % h.s.queries);
    }

    void add(const QjlSegment& segment) const {
        const int64_t all = segment.is_pool ? count() : segment.tokens;
        for (int64_t r = 0; r < h.s.rows; r += MAX_ROWS) {
            const int64_t rows = fewer(MAX_ROWS, h.s.rows - r);
            for (int64_t token = 0; token < all; token += MOST) {
                const int64_t tokens = fewer(MOST, all - token);
                if (segment.is_pool && !find(token, tokens)) continue;
                score(segment, token, tokens, r, rows);
                for (int64_t i = 0; i < rows; ++i) weigh(room.scores + i * MOST, row(r + i));
                mix(segment, token, tokens, r, rows);
            }
        }
    }

    void score(const QjlSegment& segment, int64_t token, int64_t tokens, int64_t first_row, int64_t rows) const {
        const QjlStep& s = h.s;
        const int64_t dim = s.keys.head_dim;
        __builtin_memset(room.queries, 0, MAX_ROWS * dim * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) h.put_query(first_row + r, s.scaling, room.queries + r * dim);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = tokens; i < MOST; ++i) room.scores[r * MOST + i] = -__builtin_inff();
        }
        const Numbers keys = tokens_of(segment, segment.keys, segment.key_stride, token);
        for (int64_t i = 0; i < tokens; ++i) {
            keys.copy(i, room.row, dim);
            const F4 scores = dots(room.row, room.queries, dim, dim);
            for (int64_t r = 0; r < rows; ++r) {
                float score = capped(scores[r], s.softcap);
                if (segment.bias) {
                    const float* bias = h.bias(segment.bias, segment.bias_stride, first_row + r);
                    score += bias[(token + i) * segment.bias_stride[3]];
                }
                if (segment.is_pool && !sees(first_row + r, token + i)) score = -__builtin_inff();
                room.scores[r * MOST + i] = score * LOG2E;
            }
        }
    }

    void weigh(float* scores, float* sums) const {
        F16 most = load<F16>(scores);
        for (int i = 16; i < MOST; i += 16) most = larger(most, load<F16>(scores + i));
        const float maximum = largest(most) > sums[0] ? largest(most) : sums[0];
        const float decay = exp2(sums[0] - maximum);
        for (int64_t i = 1; i < 2 + h.s.values.head_dim; ++i) sums[i] *= decay;
        sums[0] = maximum;
        F16 total{};
        for (int i = 0; i < MOST; i += 16) {
            const F16 weight = exp2(load<F16>(scores + i) - maximum);
            store(scores + i, weight);
            total += weight;
        }
        sums[1] += sum(total);
    }

    void mix(const QjlSegment& segment, int64_t token, int64_t tokens, int64_t first_row, int64_t rows) const {
        const auto to = [&](int64_t r) { return row(first_row + (r < rows ? r : 0)) + 2; };
        const auto weights = [&](int64_t r) { return room.scores + (r < rows ? r : 0) * MOST; };
        tokens_of(segment, segment.values, segment.value_stride, token)
            .add_to({to(0), to(1), to(2), to(3)}, {weights(0), weights(1), weights(2), weights(3)}, tokens,
                    h.s.values.head_dim);
    }
};

inline void attend_exact(const QjlStep& s, int64_t pair, Scratch& room) {
    const Head h = head_of(s, pair);
    const ExactTokens tokens{h, room, exact_of(s, pair)};
    tokens.clear();
    for (int64_t i = 0; i < s.exact_count; ++i) tokens.add(s.exact[i]);
}
