// What a mean that RoPE turns adds to the scores.

struct Turn {
    const QjlTurn t;
    const Head& h;
    Scratch& room;
    const Asked& asked;
    int64_t rows;
    static constexpr int64_t SPAN = 2 * 64, ANCHOR = 8;
    int64_t next = -1, anchored = -1, turns = 0;

    Turn(const Head& h, Scratch& room, const Asked& asked, int64_t rows)
        : t(h.s.turn ? *h.s.turn : QjlTurn{}), h(h), room(room), asked(asked), rows(rows) {}

    const float* of_row(int64_t r) const { return asked.turned + r * 2 * t.pairs; }

    // Adds to the scores of a tile, [rows][TILE][64], two blocks at a time.
    void add(int64_t first_block, int64_t blocks, float* scores) {
        if (!t.pairs) return;
        for (int64_t b = 0; b < blocks; b += 2) {
            const int64_t spanned = fewer(2, blocks - b);
            stand_at(h.position(first_block + b));
            int64_t r = 0;
            for (; r + 2 <= rows; r += 2) add_rows<2>(r, scores + (r * TILE + b) * 64, spanned);
            if (r < rows) add_rows<1>(r, scores + (r * TILE + b) * 64, spanned);
        }
    }

    // Phasors of the centre of the two blocks: turned on from the last ones in float32, and at every ANCHOR-th time in
    // double precision.
    void stand_at(int64_t position) {
        if (position == next && turns < ANCHOR) {
            turn_on(room.phasors_of_centre, t.step);
            ++turns;
        } else {
            anchor(position);
            turns = 1;
        }
        next = position + SPAN;
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

    __attribute__((noinline)) void anchor(int64_t position) {
        double *cosine = room.phasors, *sine = cosine + t.pairs;
        float *centre_cosine = room.phasors_of_centre, *centre_sine = centre_cosine + t.pairs;
        if (position == anchored + ANCHOR * SPAN) {
            turn_on(room.phasors, t.anchor_step);
        } else {
            for (int64_t f = 0; f < t.pairs; ++f) {
                const double angle = (position + (SPAN - 1) / 2.0) * t.inv_freq[f];
                cosine[f] = __builtin_cos(angle), sine[f] = __builtin_sin(angle);
            }
        }
        for (int64_t f = 0; f < t.pairs; ++f) centre_cosine[f] = float(cosine[f]), centre_sine[f] = float(sine[f]);
        anchored = position;
    }

    // Parts that are even and odd about the centre: of each frequency, then of the functions that slow ones share.
    template <int ROWS>
    void add_rows(int64_t first, float* scores, int64_t blocks) const {
        for (int i = 0; i < ROWS; ++i) turn_row(of_row(first + i), even_of(i), odd_of(i));
        join_slow<ROWS>();
        add_parts<ROWS>(scores, blocks);
    }

    float* even_of(int row) const { return room.parts + 2 * row * room_for_parts(t.pairs); }
    float* odd_of(int row) const { return even_of(row) + room_for_parts(t.pairs); }

    __attribute__((noinline)) void turn_row(const float* row, float* __restrict even, float* __restrict odd) const {
        const float *cosine = room.phasors_of_centre, *sine = cosine + t.pairs;
        const float *real = row, *imaginary = row + t.pairs;
        for (int64_t f = 0; f < t.pairs; ++f) {
            even[f] = real[f] * cosine[f] + imaginary[f] * sine[f];
            odd[f] = imaginary[f] * cosine[f] - real[f] * sine[f];
        }
        for (int64_t f = t.pairs; f < t.pairs + 4; ++f) even[f] = odd[f] = 0;
    }

    // Four slow frequencies at a time.
    template <int ROWS>
    __attribute__((noinline)) void join_slow() const {
        constexpr int LANES = sizeof(Native) / sizeof(float);
        alignas(64) float parts[4][4 * RANK]{};
        const float *even = even_of(0), *odd = odd_of(0);
        const float *other_even = even_of(ROWS - 1), *other_odd = odd_of(ROWS - 1);
        for (int i = 0; i < 4 * RANK; i += LANES) {
            Native a{}, b{}, c{}, d{};
            const float* table = t.down + i;
            for (int64_t f = t.direct; f < t.pairs; f += 4, table += 8 * RANK) {
                const Native cosines = load<Native>(table), sines = load<Native>(table + 4 * RANK);
                a += repeated(even + f) * cosines, b += repeated(odd + f) * sines;
                if constexpr (ROWS > 1) c += repeated(other_even + f) * cosines, d += repeated(other_odd + f) * sines;
                keep(a, b, c, d);
            }
            store(parts[0] + i, a), store(parts[1] + i, b), store(parts[2] + i, c), store(parts[3] + i, d);
        }
        for (int k = 0; k < RANK; ++k) {
            const auto of = [&](int i) { return load<F4>(parts[i] + 4 * k); };
            store(room.shared + 4 * k, sums(of(0), of(1), of(2), of(3)));
        }
    }

    template <int ROWS>
    __attribute__((noinline)) void add_parts(float* scores, int64_t blocks) const {
        constexpr int LANES = sizeof(Native) / sizeof(float);
        alignas(64) float even[ROWS][64], odd[ROWS][64];
        for (int step = 0; step < 64; step += 2 * LANES) {
            Parts first, second;
            const float *table = t.up + step, *of_function = room.shared;
            for (int64_t f = 0; f < t.direct; ++f, table += 128) {
                add_steps<ROWS>(first, second, table, even_of(0)[f], odd_of(0)[f], even_of(ROWS - 1)[f],
                                odd_of(ROWS - 1)[f]);
            }
            for (int k = 0; k < RANK; ++k, table += 128, of_function += 4) {
                add_steps<ROWS>(first, second, table, of_function[0], of_function[1], of_function[2], of_function[3]);
            }
            first.leave(even[0] + step, odd[0] + step);
            if constexpr (ROWS > 1) second.leave(even[1] + step, odd[1] + step);
        }
        for (int i = 0; i < ROWS; ++i) add_mirrored(even[i], odd[i], scores + i * TILE * 64, blocks);
    }

    struct Parts {
        Native even{}, next_even{}, odd{}, next_odd{};

        inline __attribute__((always_inline)) void add(float even_part, float odd_part, Native cosine,
                                                       Native next_cosine, Native sine, Native next_sine) {
            even += even_part * cosine, next_even += even_part * next_cosine;
            odd += odd_part * sine, next_odd += odd_part * next_sine;
            keep(even, next_even, odd, next_odd);
        }

        void leave(float* evens, float* odds) const {
            store(evens, even), store(evens + sizeof(Native) / 4, next_even);
            store(odds, odd), store(odds + sizeof(Native) / 4, next_odd);
        }
    };

    template <int ROWS>
    static inline __attribute__((always_inline)) void add_steps(Parts& first, Parts& second, const float* table,
                                                                float even, float odd, float other_even,
                                                                float other_odd) {
        constexpr int LANES = sizeof(Native) / sizeof(float);
        Native cosine = load<Native>(table), next_cosine = load<Native>(table + LANES);
        Native sine = load<Native>(table + 64), next_sine = load<Native>(table + 64 + LANES);
        keep(cosine, next_cosine, sine, next_sine);
        first.add(even, odd, cosine, next_cosine, sine, next_sine);
        if constexpr (ROWS > 1) second.add(other_even, other_odd, cosine, next_cosine, sine, next_sine);
    }

    // Steps away from the centre come as tokens do after it, by four.
    static void add_mirrored(const float* even, const float* odd, float* scores, int64_t blocks) {
        for (int c = 0; c < 64; c += 16) {
            const F16 evens = load<F16>(even + c), odds = load<F16>(odd + c);
            float *before = scores + 48 - c, *behind = scores + 64 + c;
            store(before, load<F16>(before) + reversed(evens - odds));
            if (blocks > 1) store(behind, load<F16>(behind) + (evens + odds));
        }
    }
};
