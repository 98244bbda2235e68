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

    // Of the slots that `find` has left in the room.
    Numbers found(const void* data, const int64_t (&stride)[2]) const {
        const int64_t dtype = h.s.exact.dtype;
        return {number_at(data, h.head * stride[0], dtype), stride[1], dtype, room.slots};
    }

    const int32_t* slots() const { return h.s.of_rows->slots + h.batch * h.s.of_rows->room; }
    int64_t count() const { return h.s.of_rows->counts[h.batch]; }

    // Leaves the slots of some tokens in the room, that of another one where there is none; whether any is.
    bool find(int64_t token, int64_t tokens) const {
        const int32_t* from = slots() + token;
        int32_t any = -1;
        for (int64_t i = 0; i < tokens; ++i) any = from[i] >= 0 ? from[i] : any;
        for (int64_t i = 0; i < tokens; ++i) room.slots[i] = from[i] >= 0 ? from[i] : any;
        return any >= 0;
    }

    void add() const {
        for (int64_t r = 0; r < h.s.rows; r += MAX_ROWS) {
            const int64_t rows = fewer(MAX_ROWS, h.s.rows - r);
            h.put_queries(r, rows, h.s.scaling, room.queries);
            for (int64_t token = 0; token < count(); token += MOST) {
                const int64_t tokens = fewer(MOST, count() - token);
                if (!find(token, tokens)) continue;
                score(token, tokens, r, rows);
                for (int64_t i = 0; i < rows; ++i) weigh(room.scores + i * MOST, row(r + i));
                mix(tokens, r, rows);
            }
        }
    }

    void score(int64_t token, int64_t tokens, int64_t first_row, int64_t rows) const {
        const QjlStep& s = h.s;
        found(s.exact.keys, s.exact.key_stride).dots(tokens, room.queries, s.keys.head_dim, room.scores, MOST);
        for (int64_t r = 0; r < rows; ++r) {
            float* scores = room.scores + r * MOST;
            if (s.softcap > 0) {
                for (int64_t i = 0; i < tokens; ++i) scores[i] = capped(scores[i], s.softcap);
            }
            if (s.bias) {
                const float* bias = h.bias(first_row + r, s.of_rows->capacity * s.page_tokens + token);
                for (int64_t i = 0; i < tokens; ++i) scores[i] += bias[i * s.bias_stride[3]];
            }
            scale(scores, LOG2E, tokens);
            hide(token, tokens, first_row + r, scores);
        }
    }

    // No query sees a token that comes after its own.
    void hide(int64_t token, int64_t tokens, int64_t row, float* scores) const {
        const int64_t last = count() - (h.s.queries - 1 - row % h.s.queries), seen = fewer(tokens, last - token);
        const int32_t* of_tokens = slots() + token;
        for (int64_t i = 0; i < seen; ++i) scores[i] = of_tokens[i] < 0 ? -__builtin_inff() : scores[i];
        for (int64_t i = more(0, seen); i < MOST; ++i) scores[i] = -__builtin_inff();
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

    void mix(int64_t tokens, int64_t first_row, int64_t rows) const {
        const auto to = [&](int64_t r) { return row(first_row + (r < rows ? r : 0)) + 2; };
        const auto weights = [&](int64_t r) { return room.scores + (r < rows ? r : 0) * MOST; };
        found(h.s.exact.values, h.s.exact.value_stride)
            .add_to({to(0), to(1), to(2), to(3)}, {weights(0), weights(1), weights(2), weights(3)}, tokens,
                    h.s.values.head_dim);
    }
};

inline void attend_exact(const QjlStep& s, int64_t pair, Scratch& room) {
    const Head h = head_of(s, pair);
    const ExactTokens tokens{h, room, exact_of(s, pair)};
    tokens.clear();
    tokens.add();
}
