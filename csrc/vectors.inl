// Vectors of any size: what an instruction set has as it is, larger ones by halves.
//
// The compiler would take larger ones too, but GCC 12 moves them through memory.

#if defined(__AVX512F__)
constexpr int NATIVE_BYTES = 64;
#elif defined(__AVX2__)
constexpr int NATIVE_BYTES = 32;
#else
constexpr int NATIVE_BYTES = 16;
#endif

template <class Half>
struct Twice {
    Half low, high;
};

template <class T, int N, bool IS_NATIVE>
struct VectorOf {
    typedef T Type __attribute__((vector_size(N * sizeof(T))));
};

template <class T, int N>
struct VectorOf<T, N, false> {
    using Type = Twice<typename VectorOf<T, N / 2, N / 2 * 4 <= NATIVE_BYTES>::Type>;
};

// N numbers; those of 16 bits are cut as floats are.
template <class T, int N>
using Vector = typename VectorOf<T, N, N * 4 <= NATIVE_BYTES>::Type;

using F4 = Vector<float, 4>;
using F8 = Vector<float, 8>;
using F16 = Vector<float, 16>;
using I16 = Vector<int32_t, 16>;
using U16 = Vector<uint32_t, 16>;
using H16 = Vector<uint16_t, 16>;
using S16 = Vector<int16_t, 16>;

// The widest vector of this instruction set.
using Native = Vector<float, NATIVE_BYTES / 4>;

// GCC 12 passes vectors through memory where it does not inline.
#define QJL_INLINE inline __attribute__((always_inline))

#define QJL_BY_HALVES(op)                                                            \
    template <class Half>                                                            \
    QJL_INLINE Twice<Half> operator op(const Twice<Half>& a, const Twice<Half>& b) { \
        return {a.low op b.low, a.high op b.high};                                   \
    }                                                                                \
    template <class Half, class Number>                                              \
    QJL_INLINE Twice<Half> operator op(const Twice<Half>& a, Number b) {             \
        return {a.low op b, a.high op b};                                            \
    }                                                                                \
    template <class Half, class Number>                                              \
    QJL_INLINE Twice<Half> operator op(Number a, const Twice<Half>& b) {             \
        return {a op b.low, a op b.high};                                            \
    }                                                                                \
    template <class Half, class Other>                                               \
    QJL_INLINE Twice<Half>& operator op##=(Twice<Half>& a, const Other& b) {         \
        return a = a op b;                                                           \
    }
QJL_BY_HALVES(+)
QJL_BY_HALVES(-)
QJL_BY_HALVES(*)
QJL_BY_HALVES(/)
QJL_BY_HALVES(&)
QJL_BY_HALVES(|)
QJL_BY_HALVES(<<)
QJL_BY_HALVES(>>)
#undef QJL_BY_HALVES

template <class Half>
QJL_INLINE Twice<Half> operator-(const Twice<Half>& x) {
    return {-x.low, -x.high};
}

template <class To>
struct Memory {
    static QJL_INLINE To load(const void* from) {
        To vector;
        __builtin_memcpy(&vector, from, sizeof vector);
        return vector;
    }
    static QJL_INLINE void store(void* to, const To& vector) { __builtin_memcpy(to, &vector, sizeof vector); }
};

template <class Half>
struct Memory<Twice<Half>> {
    static QJL_INLINE Twice<Half> load(const void* from) {
        return {Memory<Half>::load(from), Memory<Half>::load(static_cast<const uint8_t*>(from) + sizeof(Half))};
    }
    static QJL_INLINE void store(void* to, const Twice<Half>& vector) {
        Memory<Half>::store(to, vector.low);
        Memory<Half>::store(static_cast<uint8_t*>(to) + sizeof(Half), vector.high);
    }
};

template <class Vector>
QJL_INLINE Vector load(const void* from) {
    return Memory<Vector>::load(from);
}

template <class Vector>
QJL_INLINE void store(void* to, const Vector& vector) {
    Memory<Vector>::store(to, vector);
}

// The bits of x.
template <class To, class From>
QJL_INLINE To as(const From& x) {
    return (To)x;
}

template <class To, class Half>
QJL_INLINE To as(const Twice<Half>& x) {
    return {as<decltype(To::low)>(x.low), as<decltype(To::high)>(x.high)};
}

// The numbers of x.
template <class To, class From>
QJL_INLINE To converted(const From& x) {
    return __builtin_convertvector(x, To);
}

template <class To, class Half>
QJL_INLINE To converted(const Twice<Half>& x) {
    return {converted<decltype(To::low)>(x.low), converted<decltype(To::high)>(x.high)};
}

template <class Floats>
QJL_INLINE Floats larger(const Floats& a, const Floats& b) {
    return a > b ? a : b;
}

template <class Half>
QJL_INLINE Twice<Half> larger(const Twice<Half>& a, const Twice<Half>& b) {
    return {larger(a.low, b.low), larger(a.high, b.high)};
}

template <class Numbers>
QJL_INLINE Numbers smaller(const Numbers& a, const Numbers& b) {
    return a < b ? a : b;
}

template <class Half>
QJL_INLINE Twice<Half> smaller(const Twice<Half>& a, const Twice<Half>& b) {
    return {smaller(a.low, b.low), smaller(a.high, b.high)};
}

// Lanes

template <int... I>
struct Indices {};

template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};

template <int... I>
struct Count<0, I...> {
    using Up = Indices<I...>;
};

template <class Floats>
using Lanes = typename Count<sizeof(Floats) / 4>::Up;

template <int FIRST, int STEP, class Floats, int... I>
QJL_INLINE auto chosen(const Floats& a, const Floats& b, Indices<I...>) {
    return __builtin_shufflevector(a, b, (FIRST + STEP * I)...);
}

template <class Floats>
QJL_INLINE Floats evens(const Floats& a, const Floats& b) {
    return chosen<0, 2>(a, b, Lanes<Floats>());
}

template <class Floats>
QJL_INLINE Floats odds(const Floats& a, const Floats& b) {
    return chosen<1, 2>(a, b, Lanes<Floats>());
}

template <class Floats>
QJL_INLINE Floats reversed(const Floats& x) {
    return chosen<sizeof(Floats) / 4 - 1, -1>(x, x, Lanes<Floats>());
}

// The lanes of a and b in turn, from lane FIRST of each.
template <int FIRST, class Floats, int... I>
QJL_INLINE Floats in_turn(const Floats& a, const Floats& b, Indices<I...>) {
    return __builtin_shufflevector(a, b, (FIRST + I / 2 + I % 2 * int(sizeof...(I)))...);
}

template <class Floats>
QJL_INLINE Twice<Floats> in_turn(const Floats& a, const Floats& b) {
    return {in_turn<0>(a, b, Lanes<Floats>()), in_turn<sizeof(Floats) / 8>(a, b, Lanes<Floats>())};
}

template <class Half>
QJL_INLINE Twice<Twice<Half>> in_turn(const Twice<Half>& a, const Twice<Half>& b) {
    return {in_turn(a.low, b.low), in_turn(a.high, b.high)};
}

template <class Half>
QJL_INLINE Twice<Half> evens(const Twice<Half>& a, const Twice<Half>& b) {
    return {evens(a.low, a.high), evens(b.low, b.high)};
}

template <class Half>
QJL_INLINE Twice<Half> odds(const Twice<Half>& a, const Twice<Half>& b) {
    return {odds(a.low, a.high), odds(b.low, b.high)};
}

template <class Half>
QJL_INLINE Twice<Half> reversed(const Twice<Half>& x) {
    return {reversed(x.high), reversed(x.low)};
}

template <class Half>
QJL_INLINE Twice<Half> halves(const Twice<Half>& x) {
    return x;
}

template <class Floats>
QJL_INLINE auto halves(const Floats& x) {
    using Half = Vector<float, sizeof(Floats) / 8>;
    return Twice<Half>{chosen<0, 1>(x, x, Lanes<Half>()), chosen<sizeof(Half) / 4, 1>(x, x, Lanes<Half>())};
}

// Sums

QJL_INLINE float sum(F4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }

template <class Floats>
QJL_INLINE float sum(const Floats& x) {
    const auto [low, high] = halves(x);
    return sum(low + high);
}

// What `join` makes of the neighbours in a, then of those in b.
template <class Floats>
QJL_INLINE Floats join_neighbours(const Floats& a, const Floats& b, auto join) {
    return join(evens(a, b), odds(a, b));
}

// The same, of vectors whose numbers are all joined in the end: any two may meet first.
template <class Half>
QJL_INLINE Twice<Half> join_halves(const Twice<Half>& a, const Twice<Half>& b, auto join) {
    return {join(a.low, a.high), join(b.low, b.high)};
}

template <class Floats>
QJL_INLINE Floats join_halves(const Floats& a, const Floats& b, auto join) {
    return join_neighbours(a, b, join);
}

QJL_INLINE float largest(F4 x) {
    const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
}

template <class Floats>
QJL_INLINE float largest(const Floats& x) {
    const auto [low, high] = halves(x);
    return largest(larger(low, high));
}

// Halves

inline float float_of_half(uint16_t half) {
    const uint32_t magnitude = uint32_t(half & 0x7fff) << 13, sign = uint32_t(half & 0x8000) << 16;
    float value;
    __builtin_memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    if (value >= 65536.0f) value = (half & 0x3ff) ? __builtin_nanf("") : __builtin_inff();
    return sign ? -value : value;
}

#if defined(__AVX512F__)
QJL_INLINE F16 floats_of_halves(H16 halves) { return (F16)_mm512_cvtph_ps((__m256i)halves); }
#elif defined(__F16C__)
QJL_INLINE F16 floats_of_halves(H16 halves) {
    return {(F8)_mm256_cvtph_ps((__m128i)halves.low), (F8)_mm256_cvtph_ps((__m128i)halves.high)};
}
#else
// For finite numbers, which packed constants and maps are.
QJL_INLINE F16 floats_of_halves(H16 halves) {
    const U16 words = converted<U16>(halves);
    const F16 magnitude = as<F16>((words & 0x7fff) << 13) * 0x1p112f;
    return as<F16>(as<U16>(magnitude) | (words & 0x8000) << 16);
}
#endif

// Four numbers, over and over.
QJL_INLINE Native repeated(const float* four) {
#if defined(__AVX512F__)
    return (Native)_mm512_broadcast_f32x4(_mm_loadu_ps(four));
#elif defined(__AVX2__)
    return (Native)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(four));
#else
    Native numbers;
    __builtin_memcpy(&numbers, four, sizeof numbers);
    return numbers;
#endif
}

template <class Vector>
struct Kept {
    static QJL_INLINE void keep([[maybe_unused]] Vector& vector) {
#if defined(__AVX2__)
        asm volatile("" : "+v"(vector));
#elif defined(__aarch64__)
        asm volatile("" : "+w"(vector));
#endif
    }
};

template <class Half>
struct Kept<Twice<Half>> {
    static QJL_INLINE void keep(Twice<Half>& vector) {
        Kept<Half>::keep(vector.low);
        Kept<Half>::keep(vector.high);
    }
};

// Keeps vectors in registers, where GCC 12 would spill them or put off the sums that they are.
template <class... Vectors>
QJL_INLINE void keep(Vectors&... vectors) {
    (Kept<Vectors>::keep(vectors), ...);
}
