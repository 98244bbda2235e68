// Vectors of numbers: order, exponentials, products; and rows of numbers of any type.

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST = -1e30f;

inline int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t more(int64_t a, int64_t b) { return a > b ? a : b; }

// Numbers of 64 tokens in their order to lanes, or back: four tokens stay together.
inline void swap_lanes(const float* from, float* to) {
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) store(to + 16 * i + 4 * j, load<F4>(from + 16 * j + 4 * i));
    }
}

// The same of bytes.
inline void swap_lanes(const uint8_t* from, uint8_t* to) {
    const F4 a = load<F4>(from), b = load<F4>(from + 16), c = load<F4>(from + 32), d = load<F4>(from + 48);
    const F4 even_ab = evens(a, b), odd_ab = odds(a, b), even_cd = evens(c, d), odd_cd = odds(c, d);
    store(to, evens(even_ab, even_cd)), store(to + 16, evens(odd_ab, odd_cd));
    store(to + 32, odds(even_ab, even_cd)), store(to + 48, odds(odd_ab, odd_cd));
}

template <class Floats>
QJL_INLINE auto round(const Floats& x) {
    using Integers = Vector<int32_t, sizeof(Floats) / 4>;
    const float magic = 12582912.0f;
    return as<Integers>(x + magic) - as<Integers>(magic - Floats{});
}

// A power of two apart: what is left of x, and the power as what is added to the bits of a float.
template <class Floats>
struct Octaves {
    using Integers = Vector<int32_t, sizeof(Floats) / 4>;
    Floats part;
    Integers whole;

    QJL_INLINE explicit Octaves(Floats x) {
        const float magic = 12582912.0f;  // whose lowest bits are zeros
        x = larger(x, -126.0f - Floats{});
        const Floats rounded = x + magic;
        whole = as<Integers>(rounded) << 23;
        part = x - (rounded - magic);
    }

    QJL_INLINE Floats times(const Floats& power) const { return as<Floats>(as<Integers>(power) + whole); }
};

template <class Floats>
QJL_INLINE Floats exp2(const Floats& x) {
    const Octaves<Floats> octaves(x);
    const Floats& part = octaves.part;
    Floats power = 1.5403530e-4f - Floats{};
    power = power * part + 1.3333558e-3f;
    power = power * part + 9.6181291e-3f;
    power = power * part + 5.5504109e-2f;
    power = power * part + 2.4022651e-1f;
    power = power * part + 6.9314718e-1f;
    power = power * part + 1.0f;
    return octaves.times(power);
}

inline float exp2(float x) { return exp2(x - F4{})[0]; }

// With an error of 1e-4, as weights need it.
template <class Floats>
QJL_INLINE Floats rough_exp2(const Floats& x) {
    const Octaves<Floats> octaves(x);
    Floats power = 0.05517166f * octaves.part + 0.24261112f;
    power = power * octaves.part + 0.69326098f;
    power = power * octaves.part + 0.99992807f;
    return octaves.times(power);
}

inline float dot(const float* a, const float* b, int64_t n) {
    F16 total{};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) total += load<F16>(a + i) * load<F16>(b + i);
    float rest = 0;
    for (; i < n; ++i) rest += a[i] * b[i];
    return sum(total) + rest;
}

inline float sum_of(const float* numbers, int64_t n) {
    F16 total{};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) total += load<F16>(numbers + i);
    float rest = 0;
    for (; i < n; ++i) rest += numbers[i];
    return sum(total) + rest;
}

// What `join` makes of all numbers of each of sixteen vectors, `of(0)` to `of(15)`.
template <class Of, class Join>
QJL_INLINE F16 join_each(const Of& of, const Join& join) {
    const auto four = [&](int i) {
        return join_neighbours(join_halves(of(i), of(i + 1), join), join_halves(of(i + 2), of(i + 3), join), join);
    };
    return join_neighbours(join_neighbours(four(0), four(4), join), join_neighbours(four(8), four(12), join), join);
}

inline void add_scaled(float* to, const float* from, float factor, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(to + i, load<F16>(to + i) + factor * load<F16>(from + i));
    for (; i < n; ++i) to[i] += factor * from[i];
}

inline void scale(float* numbers, float factor, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(numbers + i, factor * load<F16>(numbers + i));
    for (; i < n; ++i) numbers[i] *= factor;
}

inline const void* number_at(const void* data, int64_t place, int64_t dtype) {
    return static_cast<const uint8_t*>(data) + place * (dtype == 0 ? 4 : 2);
}

// The nearest number of 16 bits, the even one of two.

inline uint16_t bfloat16_of(float number) {
    uint32_t bits;
    __builtin_memcpy(&bits, &number, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t half_of(float number) {
    uint32_t bits;
    __builtin_memcpy(&bits, &number, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // as much as halves end before
    if (magnitude < 0x38800000) {
        const float steps = __builtin_fabsf(number) * 0x1p24f;
        return uint16_t(sign | uint32_t(__builtin_rintf(steps)));
    }
    return uint16_t(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10)));
}

inline void store_numbers(const float* from, int64_t n, void* to, int64_t place, int64_t dtype) {
    if (dtype == 0) {
        __builtin_memcpy(static_cast<float*>(to) + place, from, n * sizeof(float));
        return;
    }
    uint16_t* halves = static_cast<uint16_t*>(to) + place;
    for (int64_t i = 0; i < n; ++i) halves[i] = dtype == 1 ? bfloat16_of(from[i]) : half_of(from[i]);
}

// Numbers of one type: 0 float32, 1 bfloat16, 2 float16.
template <int TYPE>
struct Typed {
    const void* data;

    const uint16_t* halves(int64_t at) const { return static_cast<const uint16_t*>(data) + at; }

    QJL_INLINE F16 sixteen(int64_t at) const {
        if constexpr (TYPE == 0) return load<F16>(static_cast<const float*>(data) + at);
        else if constexpr (TYPE == 1) return as<F16>(converted<U16>(load<H16>(halves(at))) << 16);
        else return floats_of_halves(load<H16>(halves(at)));
    }

    float one(int64_t at) const {
        if constexpr (TYPE == 0) return static_cast<const float*>(data)[at];
        if constexpr (TYPE == 2) return float_of_half(*halves(at));
        const uint32_t bits = uint32_t(*halves(at)) << 16;
        float number;
        __builtin_memcpy(&number, &bits, 4);
        return number;
    }
};

// Sums of COUNT times 16 columns in four rows. GCC 12 keeps no arrays in registers.
template <int COUNT>
struct Columns {
    F16 a, b, c, d;
    Columns<COUNT - 1> others;

    QJL_INLINE void start(float* const (&to)[4], int64_t i) {
        a = load<F16>(to[0] + i), b = load<F16>(to[1] + i), c = load<F16>(to[2] + i), d = load<F16>(to[3] + i);
        others.start(to, i + 16);
    }

    template <class Of>
    QJL_INLINE void add(Of numbers, int64_t at, float p, float q, float r, float s) {
        const F16 x = numbers.sixteen(at);
        a += p * x, b += q * x, c += r * x, d += s * x;
        keep(a, b, c, d);
        others.add(numbers, at + 16, p, q, r, s);
    }

    // Rows may be the same: the first of them counts.
    QJL_INLINE void leave(float* const (&to)[4], int64_t i) const {
        others.leave(to, i + 16);
        store(to[3] + i, d), store(to[2] + i, c), store(to[1] + i, b), store(to[0] + i, a);
    }
};

template <>
struct Columns<0> {
    QJL_INLINE void start(float* const (&)[4], int64_t) {}
    template <class Of>
    QJL_INLINE void add(Of, int64_t, float, float, float, float) {}
    QJL_INLINE void leave(float* const (&)[4], int64_t) const {}
};

// Products of COUNT rows with four others.
template <int COUNT>
struct Products {
    F16 a{}, b{}, c{}, d{};
    Products<COUNT - 1> later;

    QJL_INLINE void add(auto numbers, const int64_t* at, int64_t i, const float* others, int64_t n) {
        const F16 x = numbers.sixteen(*at + i);
        a += x * load<F16>(others + i), b += x * load<F16>(others + n + i);
        c += x * load<F16>(others + 2 * n + i), d += x * load<F16>(others + 3 * n + i);
        keep(a, b, c, d);
        later.add(numbers, at + 1, i, others, n);
    }

    QJL_INLINE void leave(F16* to) const {
        to[0] = a, to[4] = b, to[8] = c, to[12] = d;
        later.leave(to + 1);
    }
};

template <>
struct Products<0> {
    QJL_INLINE void add(auto, const int64_t*, int64_t, const float*, int64_t) {}
    QJL_INLINE void leave(F16*) const {}
};

// Rows of numbers of one type, `stride` numbers apart; row r is the one at slots[r] where there are slots.
struct Numbers {
    const void* data;
    int64_t stride, dtype;
    const int32_t* slots = nullptr;

    int64_t place(int64_t row) const { return (slots ? slots[row] : row) * stride; }

    // Calls `use` with the numbers as what they are.
    template <class Use>
    void typed(const Use& use) const {
        if (dtype == 0) use(Typed<0>{data});
        else if (dtype == 1) use(Typed<1>{data});
        else use(Typed<2>{data});
    }

    void copy(int64_t row, float* to, int64_t n) const {
        typed([&](auto numbers) {
            const int64_t at = place(row);
            int64_t i = 0;
            for (; i + 16 <= n; i += 16) store(to + i, numbers.sixteen(at + i));
            for (; i < n; ++i) to[i] = numbers.one(at + i);
        });
    }

    // to[i][row] = <row, others[i]> for four others of n numbers; rows of `to` lie `apart`. Where there are fewer than
    // four rows, what is next to them is overwritten.
    void dots(int64_t rows, const float* others, int64_t n, float* to, int64_t apart) const {
        typed([&](auto numbers) { dots_of(numbers, rows, others, n, to, apart); });
    }

    template <class Of>
    __attribute__((noinline)) void dots_of(Of numbers, int64_t rows, const float* others, int64_t n, float* to,
                                           int64_t apart) const {
        constexpr int AT_ONCE = NATIVE_BYTES == 64 ? 4 : 1;  // what registers hold
        const auto add = [](const auto& x, const auto& y) { return x + y; };
        for (int64_t next = 0; next < rows; next += 4) {
            const int64_t row = more(0, fewer(next, rows - 4));
            int64_t at[4];
            for (int64_t k = 0; k < 4; ++k) at[k] = place(fewer(row + k, rows - 1));
            F16 products[16];  // [4 others][4 rows]
            for (int k = 0; k < 4; k += AT_ONCE) {
                Products<AT_ONCE> of_rows;
                for (int64_t i = 0; i + 16 <= n; i += 16) of_rows.add(numbers, at + k, i, others, n);
                of_rows.leave(products + k);
            }
            alignas(64) float dots[16];
            store(dots, join_each([&](int i) { return products[i]; }, add));
            for (int64_t i = n / 16 * 16; i < n; ++i) {
                for (int k = 0; k < 16; ++k) dots[k] += numbers.one(at[k % 4] + i) * others[k / 4 * n + i];
            }
            for (int i = 0; i < 4; ++i) store(to + i * apart + row, load<F4>(dots + 4 * i));
        }
    }

    // to[r] += sum over rows of factors[r][row] * row, for four r, of which some may be the same.
    void add_to(float* const (&to)[4], const float* const (&factors)[4], int64_t rows, int64_t n) const {
        constexpr int WIDE = NATIVE_BYTES / 16;  // what registers hold
        typed([&](auto numbers) {
            int64_t i = 0;
            for (; i + 16 * WIDE <= n; i += 16 * WIDE) add_columns<WIDE>(numbers, to, factors, rows, i);
            for (; i + 16 <= n; i += 16) add_columns<1>(numbers, to, factors, rows, i);
            for (; i < n; ++i) {
                F4 total = {to[0][i], to[1][i], to[2][i], to[3][i]};
                for (int64_t row = 0; row < rows; ++row) {
                    const F4 of_row = {factors[0][row], factors[1][row], factors[2][row], factors[3][row]};
                    total += numbers.one(place(row) + i) * of_row;
                }
                for (int r = 3; r >= 0; --r) to[r][i] = total[r];
            }
        });
    }

    // WIDE times 16 columns.
    template <int WIDE, class Of>
    __attribute__((noinline)) void add_columns(Of numbers, float* const (&to)[4], const float* const (&factors)[4],
                                               int64_t rows, int64_t i) const {
        Columns<WIDE> columns;
        columns.start(to, i);
        for (int64_t row = 0; row < rows; ++row) {
            columns.add(numbers, place(row) + i, factors[0][row], factors[1][row], factors[2][row], factors[3][row]);
        }
        columns.leave(to, i);
    }
};

QJL_INLINE void store_bytes(uint8_t* to, const I16& numbers) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)numbers));
#else
    int16_t words[16];
    store(words, converted<S16>(numbers));
    for (int i = 0; i < 16; ++i) to[i] = uint8_t(words[i]);
#endif
}
