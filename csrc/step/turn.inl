// What a mean that RoPE turns adds to the scores.

struct Turn {
    const QjlTurn t;
    const Head& h;
    Scratch& room;
    const Asked& asked;
    int64_t rows;
    const double* first_phasors;
    static constexpr int64_t SPAN = 2 * 64, ANCHOR = 8;
    static constexpr float TABLE_TOP = 16384;  // what stands for 1 in the tables of functions
    int64_t turns = 0;

    Turn(const Head& h, int64_t split, Scratch& room, const Asked& asked, int64_t rows)
        : t(h.s.turn ? *h.s.turn : QjlTurn{}), h(h), room(room), asked(asked), rows(rows),
          first_phasors(h.s.turn ? phasors_of(h.s, h.batch) + split * 2 * t.pairs : nullptr) {}

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

    // Puts what mean and RoPE give into the scores of a tile, [rows][TILE][64], two blocks at a time; tile after tile.
    void put(int64_t blocks, float* scores) {
        for (int64_t b = 0; b < blocks; b += 2) {
            const int64_t spanned = fewer(2, blocks - b);
            if (t.pairs) {
                step();
                for (int64_t r = 0; r < rows; r += 2) put_coefficients(r, fewer(2, rows - r));
                multiply();
            }
            for (int64_t r = 0; r < rows; ++r) leave(r, scores + (r * TILE + b) * 64, spanned);
        }
    }

    // Phasors of the centre of the next two blocks: turned on from the last ones in float32, and at every ANCHOR-th time
    // in double precision.
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

    // Parts that are even and odd about the centre: of each frequency, then of the functions that slow ones share.
    void put_coefficients(int64_t first, int64_t count) {
        for (int64_t r = first; r < first + count; ++r) turn_row(r);
        count == 2 ? join_slow<2>(first) : join_slow<1>(first);
        for (int64_t r = first; r < first + count; ++r) {
            put_integers(r, 0, room.shared + 2 * (r - first));
            put_integers(r, 1, room.shared + 2 * (r - first) + 1);
        }
    }

    void put_integers(int64_t r, int part, const float* shared) const {
        int16_t *to = coefficients(part, r), *of_fast = to + RANK;
        const float* fast = parts(part, r);
        for (int64_t f = 0; f < t.direct; f += 16) {
            store(of_fast + f, converted<S16>(round(load<F16>(fast + f))));  // more than there are are left out
        }
        of_fast[t.direct] = 0;
        for (int k = 0; k < RANK; ++k) to[k] = int16_t(round(shared[4 * k] + F4{})[0]);
    }

    float* parts(int part, int64_t row) const { return room.parts + (2 * row + part) * room_for_parts(t.pairs); }
    int16_t* coefficients(int part, int64_t row) const {
        return room.coefficients + (part * MAX_ROWS + row) * room_for_functions(t);
    }

    __attribute__((noinline)) void turn_row(int64_t r) const {
        float *even = parts(0, r), *odd = parts(1, r);
        const float *cosine = room.phasors_of_centre, *sine = cosine + t.pairs;
        const float *real = of_row(r), *imaginary = real + t.pairs;
        const float scale = asked.turn_scales[r];
        for (int64_t f = 0; f < t.pairs; f += 16) {  // more than there are are left out
            const F16 c = load<F16>(cosine + f), s = load<F16>(sine + f);
            const F16 re = load<F16>(real + f) * scale, im = load<F16>(imaginary + f) * scale;
            store(even + f, re * c + im * s);
            store(odd + f, im * c - re * s);
        }
        for (int64_t f = t.pairs; f < t.pairs + 4; ++f) even[f] = odd[f] = 0;
    }

    // Four slow frequencies at a time.
    template <int ROWS>
    __attribute__((noinline)) void join_slow(int64_t row) const {
        constexpr int LANES = sizeof(Native) / sizeof(float);
        alignas(64) float sums_of[4][4 * RANK]{};
        const float *even = parts(0, row), *odd = parts(1, row);
        const float *other_even = parts(0, row + ROWS - 1), *other_odd = parts(1, row + ROWS - 1);
        for (int i = 0; i < 4 * RANK; i += LANES) {
            Native a{}, b{}, c{}, d{};
            const float* table = t.down + i;
            for (int64_t f = t.direct; f < t.pairs; f += 4, table += 8 * RANK) {
                const Native cosines = load<Native>(table), sines = load<Native>(table + 4 * RANK);
                a += repeated(even + f) * cosines, b += repeated(odd + f) * sines;
                if constexpr (ROWS > 1) c += repeated(other_even + f) * cosines, d += repeated(other_odd + f) * sines;
                keep(a, b, c, d);
            }
            store(sums_of[0] + i, a), store(sums_of[1] + i, b), store(sums_of[2] + i, c), store(sums_of[3] + i, d);
        }
        for (int k = 0; k < RANK; ++k) {
            const auto of = [&](int i) { return load<F4>(sums_of[i] + 4 * k); };
            store(room.shared + 4 * k, sums(of(0), of(1), of(2), of(3)));
        }
    }

    void multiply() const {
        for (int part = 0; part < 2; ++part) {
            switch (rows) {
                case 1: multiply<1>(part); break;
                case 2: multiply<2>(part); break;
                case 3: multiply<3>(part); break;
                default: multiply<4>(part);
            }
        }
    }

    // Even parts of all rows, or odd ones, at each distance from the centre.
    template <int ROWS>
    __attribute__((noinline)) void multiply(int part) const {
        constexpr bool TWO_AT_ONCE = sizeof(Native) == 64;  // registers hold two times four vectors
        const int64_t functions = functions_of(t), next = room_for_functions(t);
        int32_t* to = room.steps + part * MAX_ROWS * 64;
        for (int k = 0; k < 4; k += 1 + TWO_AT_ONCE) {
            Steps<ROWS> first, second;
            const int16_t *table = t.up + part * 128 + k * 32, *two = coefficients(part, 0);
            for (int64_t f = 0; f < functions; f += 2, table += 256, two += 2) {
                first.add(table, two, next);
                if constexpr (TWO_AT_ONCE) second.add(table + 32, two, next);
            }
            first.leave(to + k * 16);
            if constexpr (TWO_AT_ONCE) second.leave(to + k * 16 + 16);
        }
    }

    // Of 16 tokens and up to four rows.
    template <int ROWS>
    struct Steps {
        I16 first{}, second{}, third{}, fourth{};

        QJL_INLINE void add(const int16_t* table, const int16_t* two, int64_t next) {
            first = add_words(first, table, two);
            if constexpr (ROWS > 1) second = add_words(second, table, two + next);
            if constexpr (ROWS > 2) third = add_words(third, table, two + 2 * next);
            if constexpr (ROWS > 3) fourth = add_words(fourth, table, two + 3 * next);
            keep(first, second, third, fourth);
        }

        QJL_INLINE void leave(int32_t* to) const {
            store(to, first);
            if constexpr (ROWS > 1) store(to + 64, second);
            if constexpr (ROWS > 2) store(to + 128, third);
            if constexpr (ROWS > 3) store(to + 192, fourth);
        }
    };

    // Steps away from the centre come as tokens do after it; before it they come backwards.
    void leave(int64_t r, float* scores, int64_t blocks) const {
        const float constant = asked.constants[r];
        if (!t.pairs) {
            for (int64_t i = 0; i < blocks * 64; i += 16) store(scores + i, constant + F16{});
            return;
        }
        const float unit = 1 / (asked.turn_scales[r] * TABLE_TOP);
        const int32_t *even = room.steps + r * 64, *odd = even + MAX_ROWS * 64;
        for (int i = 0; i < 64; i += 16) {
            const I16 evens = load<I16>(even + i), odds = load<I16>(odd + i);
            store(scores + 48 - i, reversed(converted<F16>(evens - odds)) * unit + constant);
            if (blocks > 1) store(scores + 64 + i, converted<F16>(evens + odds) * unit + constant);
        }
    }
};
