// Vectors of sixteen, which the compiler lowers to what an instruction set has.

typedef float F4 __attribute__((vector_size(16)));
typedef float F8 __attribute__((vector_size(32)));
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef int16_t S16 __attribute__((vector_size(32)));

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

#ifdef __AVX512F__
inline F16 four_times(const float* four) { return (F16)_mm512_broadcast_f32x4(_mm_loadu_ps(four)); }
#else
inline F16 four_times(const float* four) {
    F16 repeated;
    for (int i = 0; i < 16; i += 4) __builtin_memcpy(reinterpret_cast<float*>(&repeated) + i, four, 16);
    return repeated;
}
#endif

// Keeps four sums in registers, where GCC 12 would spill them at every step.
#ifdef __AVX512F__
#define QJL_KEEP(a, b, c, d) asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d))
#else
#define QJL_KEEP(a, b, c, d)
#endif
