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

template <class Floats>
QJL_INLINE auto round(const Floats& x) {
    using Integers = Vector<int32_t, sizeof(Floats) / 4>;
    const float magic = 12582912.0f;
    return as<Integers>(x + magic) - as<Integers>(magic - Floats{});
}

template <class Floats>
QJL_INLINE Floats exp2(Floats x) {
    x = larger(x, -126.0f - Floats{});
    const auto whole = round(x);
    const Floats part = x - converted<Floats>(whole);
    Floats power = 1.5403530e-4f - Floats{};
    power = power * part + 1.3333558e-3f;
    power = power * part + 9.6181291e-3f;
    power = power * part + 5.5504109e-2f;
    power = power * part + 2.4022651e-1f;
    power = power * part + 6.9314718e-1f;
    power = power * part + 1.0f;
    return as<Floats>(as<decltype(whole)>(power) + (whole << 23));
}

inline float exp2(float x) { return exp2(x - F4{})[0]; }

// With an error of 1e-4, as weights need it.
template <class Floats>
QJL_INLINE Floats rough_exp2(Floats x) {
    x = larger(x, -126.0f - Floats{});
    const auto whole = round(x);
    const Floats part = x - converted<Floats>(whole);
    Floats power = 0.05517166f * part + 0.24261112f;
    power = power * part + 0.69326098f;
    power = power * part + 0.99992807f;
    return as<Floats>(as<decltype(whole)>(power) + (whole << 23));
}

inline float dot(const float* a, const float* b, int64_t n) {
    F16 total{};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) total += load<F16>(a + i) * load<F16>(b + i);
    float rest = 0;
    for (; i < n; ++i) rest += a[i] * b[i];
    return sum(total) + rest;
}

// The largest of each of four vectors.
template <class Floats>
QJL_INLINE F4 largest_of_each(const Floats& a, const Floats& b, const Floats& c, const Floats& d) {
    const auto folded = [](const Floats& x) {
        const auto [low, high] = halves(x);
        return larger(low, high);
    };
    if constexpr (sizeof(Floats) > sizeof(F4)) {
        return largest_of_each(folded(a), folded(b), folded(c), folded(d));
    } else {
        const F4 ab = larger(evens(a, b), odds(a, b)), cd = larger(evens(c, d), odds(c, d));
        return larger(evens(ab, cd), odds(ab, cd));
    }
}

// <x, r> for four rows r, `stride` apart.
inline F4 dots(const float* x, const float* rows, int64_t stride, int64_t n) {
    F16 a{}, b{}, c{}, d{};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const F16 at = load<F16>(x + i);
        a += at * load<F16>(rows + i);
        b += at * load<F16>(rows + stride + i);
        c += at * load<F16>(rows + 2 * stride + i);
        d += at * load<F16>(rows + 3 * stride + i);
    }
    F4 total = sums(a, b, c, d);
    for (; i < n; ++i) total += x[i] * F4{rows[i], rows[stride + i], rows[2 * stride + i], rows[3 * stride + i]};
    return total;
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

// Rows of numbers of one type, `stride` numbers apart; row r is the one at slots[r] where there are slots.
struct Numbers {
    const void* data;
    int64_t stride, dtype;  // 0 float32, 1 bfloat16, 2 float16
    const int32_t* slots = nullptr;

    int64_t place(int64_t row, int64_t i) const { return (slots ? slots[row] : row) * stride + i; }
    const uint16_t* halves(int64_t place) const { return static_cast<const uint16_t*>(data) + place; }

    F16 sixteen(int64_t row, int64_t i) const {
        const int64_t at = place(row, i);
        if (dtype == 0) return load<F16>(static_cast<const float*>(data) + at);
        const H16 bits = load<H16>(halves(at));
        return dtype == 1 ? as<F16>(converted<U16>(bits) << 16) : floats_of_halves(bits);
    }

    float one(int64_t row, int64_t i) const {
        const int64_t at = place(row, i);
        if (dtype == 0) return static_cast<const float*>(data)[at];
        if (dtype == 2) return float_of_half(*halves(at));
        const uint32_t bits = uint32_t(*halves(at)) << 16;
        float number;
        __builtin_memcpy(&number, &bits, 4);
        return number;
    }

    void copy(int64_t row, float* to, int64_t n) const {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) store(to + i, sixteen(row, i));
        for (; i < n; ++i) to[i] = one(row, i);
    }

    // to[r] += sum over rows of factors[r][row] * row, for four r, of which some may be the same.
    __attribute__((noinline)) void add_to(float* const (&to)[4], const float* const (&factors)[4], int64_t rows,
                                          int64_t n) const {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            F16 a = load<F16>(to[0] + i), b = load<F16>(to[1] + i), c = load<F16>(to[2] + i), d = load<F16>(to[3] + i);
            for (int64_t row = 0; row < rows; ++row) {
                const F16 x = sixteen(row, i);
                a += factors[0][row] * x, b += factors[1][row] * x, c += factors[2][row] * x, d += factors[3][row] * x;
                keep(a, b, c, d);
            }
            store(to[3] + i, d), store(to[2] + i, c), store(to[1] + i, b), store(to[0] + i, a);
        }
        for (; i < n; ++i) {
            F4 total = {to[0][i], to[1][i], to[2][i], to[3][i]};
            for (int64_t row = 0; row < rows; ++row) {
                total += one(row, i) * F4{factors[0][row], factors[1][row], factors[2][row], factors[3][row]};
            }
            for (int r = 3; r >= 0; --r) to[r][i] = total[r];
        }
    }
};
