// Vectors of sixteen, which the compiler lowers to what an instruction set has.

typedef float F4 __attribute__((vector_size(16)));
typedef float F8 __attribute__((vector_size(32)));
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef int16_t S16 __attribute__((vector_size(32)));

// The widest vector of this instruction set.
#if defined(__AVX512F__)
typedef F16 Native;
#elif defined(__AVX2__)
typedef F8 Native;
#else
typedef F4 Native;
#endif

inline float float_of_half(uint16_t half) {
    const uint32_t magnitude = uint32_t(half & 0x7fff) << 13, sign = uint32_t(half & 0x8000) << 16;
    float value;
    __builtin_memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    if (value >= 65536.0f) value = (half & 0x3ff) ? __builtin_nanf("") : __builtin_inff();
    return sign ? -value : value;
}

#ifdef __F16C__
inline F8 eight_of_halves(const void* halves) {
    return (F8)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(halves)));
}

inline F16 floats_of_halves(H16 halves) {
    const F8 low = eight_of_halves(&halves), high = eight_of_halves(reinterpret_cast<const uint16_t*>(&halves) + 8);
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#else
// For finite numbers, which packed constants and maps are.
inline F16 floats_of_halves(H16 halves) {
    const U16 words = __builtin_convertvector(halves, U16);
    const F16 magnitude = (F16)((words & 0x7fff) << 13) * 0x1p112f;
    return (F16)((U16)magnitude | (words & 0x8000) << 16);
}
#endif

// Four numbers, over and over.
inline Native repeated(const float* four) {
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

// Keeps four sums in registers, where GCC 12 would spill them at every step.
#ifdef __AVX512F__
#define QJL_KEEP(a, b, c, d) asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d))
#else
#define QJL_KEEP(a, b, c, d)
#endif
