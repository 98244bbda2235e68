// Scales of tokens as logarithms of 8 bits: twelve steps are an octave, 128 is one unit, and 0 stands for 0.

// The power of a code is the product of those of its nibbles.
struct Powers {
    float low[16], high[16];

    constexpr Powers() : low(), high() {
        constexpr double STEP = 1.0594630943592953, LEAST = 1.2599210498948732 * 0x1p-11;  // 2^(1/12), 2^(-128/12)
        double power = 1, power_of_high = LEAST;
        for (float& number : low) number = float(power), power *= STEP;
        for (float& number : high) number = float(power_of_high), power_of_high *= power;
    }
};

inline void scales_of_logarithms(const uint8_t* codes, float unit, float* scales) {
    static constexpr Powers POWERS;
    const Table low = load_table(POWERS.low), high = load_table(POWERS.high);
    for (int t = 0; t < 64; t += LANES) {
        const Floats power = lookup(low, low_index(codes + t)) * lookup(high, high_index(codes + t));
        store(scales + t, (power > *POWERS.high ? power : Floats{}) * unit);
    }
}
