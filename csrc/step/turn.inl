// What a mean that RoPE turns adds to the scores.

struct Turn {
    const QjlTurn t;
    const Head& h;
    Scratch& room;
    const Asked& asked;
    int64_t rows;
    const double* first_phasors;
    static constexpr int64_t SPAN = 2 * DISTANCES, ANCHOR = 8;
    static_assert(TILE * 64 % SPAN == 0, "a span is put as a whole");
    static constexpr int TABLE_BITS = 14, TABLE_TOP = 1 << TABLE_BITS;  // what stands for 1 in the tables of functions
    int64_t turns = 0;
    float units[MAX_ROWS];

    Turn(const Head& h, int64_t split, Scratch& room, const Asked& asked, int64_t rows)
        : t(h.s.turn ? *h.s.turn : QjlTurn{}), h(h), room(room), asked(asked), rows(rows),
          first_phasors(h.s.turn ? phasors_of(h.s, h.batch) + split * 2 * t.pairs : nullptr) {
        for (int64_t r = 0; r < rows; ++r) units[r] = t.pairs ? 1 / (asked.turn_scales[r] * TABLE_TOP) : 0;
    }

    // What splits of a batch row begin with.
    static void prepare(const Head& h) {
        if (!h.s.turn) return;
        const QjlTurn& t = *h.s.turn;
        double* cosine = phasors_of(h.s, h.batch);
        for (int64_t split = 0; split < h.splits(); ++split, cosine += 2 * t.pairs) {
            const double centre = h.position(h.first_block() + split * h.blocks_per_split()) + (SPAN - 1) / 2.0;
            for (int64_t f = 0; f < t.pairs; ++f) {
                const double angle = centre * t.inv_freq[f];
                cosine[f] = __builtin_cos(angle), cosine[t.pairs + f] = __builtin_sin(angle);
            }
        }
    }

    const float* of_row(int64_t r) const { return asked.turned + r * 2 * t.pairs; }

    // Puts what mean and RoPE give into the scores of a tile, [rows][TILE][64], span by span; tile after tile.
    void put(int64_t blocks, float* scores) {
        for (int64_t b = 0; b < blocks; b += SPAN / 64) t.pairs ? turn_span(scores + b * 64) : fill(scores + b * 64);
    }

    void fill(float* scores) const {
        for (int64_t r = 0; r < rows; ++r, scores += TILE * 64) {
            for (int64_t i = 0; i < SPAN; i += 16) store(scores + i, asked.constants[r] + F16{});
        }
    }

    void turn_span(float* scores) {
        step();
        for_rows(rows, [&]<int ROWS> { put_span<ROWS>(scores); });
    }

    // Phasors of the centre of the next span: turned on from the last ones in float32, and at every ANCHOR-th time in
    // double precision.
    void step() {
        if (turns % ANCHOR) {
            turn_on(room.phasors_of_centre, t.step);
        } else {
            anchor();
        }
        ++turns;
    }

    template <class Number>
    __attribute__((noinline)) void turn_on(Number* __restrict cosine, const Number* step_cosine) const {
        Number* __restrict sine = cosine + t.pairs;
        const Number* step_sine = step_cosine + t.pairs;
        for (int64_t f = 0; f < t.pairs; ++f) {
            const Number c = cosine[f], s = sine[f];
            cosine[f] = c * step_cosine[f] - s * step_sine[f];
            sine[f] = s * step_cosine[f] + c * step_sine[f];
        }
    }

    __attribute__((noinline)) void anchor() {
        if (turns) turn_on(room.phasors, t.anchor_step);
        else __builtin_memcpy(room.phasors, first_phasors, 2 * t.pairs * sizeof(double));
        for (int64_t i = 0; i < 2 * t.pairs; ++i) room.phasors_of_centre[i] = float(room.phasors[i]);
    }

    // Parts that are even and odd about the centre: of each frequency, of the functions, then of the tokens.
    template <int ROWS>
    void put_span(float* scores) const {
        for (int64_t r = 0; r < ROWS; ++r) turn_row(r);
        share<ROWS>(0), share<ROWS>(1);
        multiply<ROWS>(0, [&](int64_t r, int64_t i, const I16& even) { store(evens(r) + i, even); });
        multiply<ROWS>(1, [&](int64_t r, int64_t i, const I16& odd) {
            leave(r, i, load<I16>(evens(r) + i), odd, scores + r * TILE * 64);
        });
    }

    // Functions that frequencies share come first.
    int16_t* coefficients(int part, int64_t row) const {
        return room.coefficients + (part * MAX_ROWS + row) * room_for_coefficients(t);
    }
    int32_t* evens(int64_t row) const { return room.evens + row * DISTANCES; }

    __attribute__((noinline)) void turn_row(int64_t r) const {
        const int64_t pairs = t.pairs;
        const float *cosine = room.phasors_of_centre, *sine = cosine + pairs;
        const float *real = of_row(r), *imaginary = real + pairs;
        const float scale = asked.turn_scales[r];
        int16_t *even = coefficients(0, r) + RANK, *odd = coefficients(1, r) + RANK;
        for (int64_t f = 0; f < pairs; f += 16) {  // more than there are are left out
            const F16 c = load<F16>(cosine + f) * scale, s = load<F16>(sine + f) * scale;
            const F16 re = load<F16>(real + f), im = load<F16>(imaginary + f);
            store(even + f, converted<S16>(round(re * c + im * s)));
            store(odd + f, converted<S16>(round(im * c - re * s)));
        }
    }

    template <int ROWS>
    __attribute__((noinline)) void share(int part) const {
        const int64_t count = t.pairs - t.direct, next = room_for_coefficients(t);
        const int16_t *table = t.down + part * 2 * RANK, *slow = coefficients(part, 0) + RANK + t.direct;
        Products<ROWS> sums;
        for (int64_t f = 0; f < count; f += 2, table += 4 * RANK, slow += 2) sums.add(table, slow, next);
        sums.each([&](int64_t r, const I16& sum) {
            store(coefficients(part, r), converted<S16>((sum + TABLE_TOP / 2) >> TABLE_BITS));
        });
    }

    // Even parts of all rows, or odd ones, at each distance from the centre.
    template <int ROWS, class Use>
    __attribute__((noinline)) void multiply(int part, const Use& use) const {
        constexpr bool TWO_AT_ONCE = sizeof(Native) == 64;  // registers hold two times four vectors
        const int64_t functions = functions_of(t), next = room_for_coefficients(t);
        for (int64_t i = 0; i < DISTANCES; i += TWO_AT_ONCE ? 32 : 16) {
            Products<ROWS> first, second;
            const int16_t *table = t.up + (part * DISTANCES + i) * 2, *two = coefficients(part, 0);
            for (int64_t f = 0; f < functions; f += 2, table += 4 * DISTANCES, two += 2) {
                first.add(table, two, next);
                if constexpr (TWO_AT_ONCE) second.add(table + 32, two, next);
            }
            first.each([&](int64_t r, const I16& sum) { use(r, i, sum); });
            if constexpr (TWO_AT_ONCE) second.each([&](int64_t r, const I16& sum) { use(r, i + 16, sum); });
        }
    }

    // Sums of up to four rows, 16 in each.
    template <int ROWS>
    struct Products {
        I16 first{}, second{}, third{}, fourth{};

        QJL_INLINE void add(const int16_t* table, const int16_t* two, int64_t next) {
            first = add_words(first, table, two);
            if constexpr (ROWS > 1) second = add_words(second, table, two + next);
            if constexpr (ROWS > 2) third = add_words(third, table, two + 2 * next);
            if constexpr (ROWS > 3) fourth = add_words(fourth, table, two + 3 * next);
            keep(first, second, third, fourth);
        }

        template <class Use>
        QJL_INLINE void each(const Use& use) const {
            use(0, first);
            if constexpr (ROWS > 1) use(1, second);
            if constexpr (ROWS > 2) use(2, third);
            if constexpr (ROWS > 3) use(3, fourth);
        }
    };

    // Away from the centre tokens come in their order after it; before it they come backwards.
    QJL_INLINE void leave(int64_t r, int64_t i, const I16& even, const I16& odd, float* scores) const {
        const float unit = units[r], constant = asked.constants[r];
        store(scores + DISTANCES - 16 - i, reversed(converted<F16>(even - odd)) * unit + constant);
        store(scores + DISTANCES + i, converted<F16>(even + odd) * unit + constant);
    }
};
