// Look-ups and weighted sums with NEON.

namespace nibbles {

constexpr int MAX_ROWS = 4;
constexpr int TILE = 8;  // blocks whose weights are summed up at once
constexpr float WEIGHT_TOP = 32767;

// Low bytes and high bytes of both tables: a byte shuffle looks up one of them.
inline void put_table(uint8_t* to, const int16_t* low, const int16_t* high) {
    for (int i = 0; i < 16; ++i) {
        to[i] = uint8_t(low[i]), to[16 + i] = uint8_t(uint16_t(low[i]) >> 8);
        to[32 + i] = uint8_t(high[i]), to[48 + i] = uint8_t(uint16_t(high[i]) >> 8);
    }
}

// Sums of both nibbles of 16 tokens.
struct Words {
    int16x8_t low, high;

    Words(const uint8_t* codes, const uint8_t* table) {
        const uint8x16_t bytes = vld1q_u8(codes);
        const uint8x16_t at_low = vandq_u8(bytes, vdupq_n_u8(15)), at_high = vshrq_n_u8(bytes, 4);
        const uint8x16_t low_bytes = vqtbl1q_u8(vld1q_u8(table), at_low);
        const uint8x16_t high_bytes = vqtbl1q_u8(vld1q_u8(table + 16), at_low);
        const uint8x16_t more_low = vqtbl1q_u8(vld1q_u8(table + 32), at_high);
        const uint8x16_t more_high = vqtbl1q_u8(vld1q_u8(table + 48), at_high);
        low = vaddq_s16(vreinterpretq_s16_u8(vzip1q_u8(low_bytes, high_bytes)),
                        vreinterpretq_s16_u8(vzip1q_u8(more_low, more_high)));
        high = vaddq_s16(vreinterpretq_s16_u8(vzip2q_u8(low_bytes, high_bytes)),
                         vreinterpretq_s16_u8(vzip2q_u8(more_low, more_high)));
    }
};

// One row of 16 tokens of a block.
inline void scan_quarter(const uint8_t* codes, int64_t bytes, const uint8_t* tables, int64_t next,
                         const int32_t* factors, int64_t next_factor, int32_t* sums, int quarter) {
    int32x4_t totals[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
    for (int64_t j = 0; j < bytes; j += 2, factors += next_factor) {
        Words words(codes + j * 64, tables + j * next);
        if (j + 1 < bytes) {
            const Words more(codes + (j + 1) * 64, tables + (j + 1) * next);
            words.low = vaddq_s16(words.low, more.low);
            words.high = vaddq_s16(words.high, more.high);
        }
        const int16_t factor = int16_t(factors[0]);
        totals[0] = vmlal_n_s16(totals[0], vget_low_s16(words.low), factor);
        totals[1] = vmlal_n_s16(totals[1], vget_high_s16(words.low), factor);
        totals[2] = vmlal_n_s16(totals[2], vget_low_s16(words.high), factor);
        totals[3] = vmlal_n_s16(totals[3], vget_high_s16(words.high), factor);
    }
    for (int k = 0; k < 4; ++k) {
        int32_t of_tokens[4];
        vst1q_s32(of_tokens, totals[k]);
        for (int c = 0; c < 4; ++c) sums[c * 16 + quarter * 4 + k] = of_tokens[c];
    }
}

// codes [bytes][64], tables [bytes][ROWS][64 bytes], factors [(bytes + 1) / 2][ROWS][2] -> sums [ROWS][64] by four;
// `soon` is what will be read next: as many bytes as codes
template <int ROWS>
void scan_block(const uint8_t* codes, int64_t bytes, const uint8_t* tables, const int32_t* factors, int32_t* sums,
                const uint8_t* soon) {
    for (int64_t j = 0; j < bytes; ++j) __builtin_prefetch(soon + j * 64);
    for (int quarter = 0; quarter < 4; ++quarter) {
        for (int r = 0; r < ROWS; ++r) {
            scan_quarter(codes + quarter * 16, bytes, tables + r * 64, ROWS * 64, factors + r * 2, ROWS * 2,
                         sums + r * 64, quarter);
        }
    }
}

inline void put_weights(uint8_t* to, const I16 (&by_four)[4]) {
    int32_t numbers[64];
    __builtin_memcpy(numbers, by_four, sizeof numbers);
    auto* weights = reinterpret_cast<int16_t*>(to);
    for (int t = 0; t < 64; ++t) weights[t] = int16_t(numbers[t % 4 * 16 + t / 4]);
}

struct Levels {
    uint8x16_t table;
    int8x16_t shift;
    const uint8_t* bytes;

    Levels(const QjlPair& pair, int k, const uint8_t* codes)
        : table(vld1q_u8(reinterpret_cast<const uint8_t*>(pair.tables[k]))),
          shift(vdupq_n_s8(int8_t(pair.sources[k] % 2 * -4))),
          bytes(codes + pair.sources[k] / 2 * (TILE * 64)) {}

    int8x16_t of(int64_t place) const {
        const uint8x16_t nibbles = vandq_u8(vshlq_u8(vld1q_u8(bytes + place), shift), vdupq_n_u8(15));
        return vreinterpretq_s8_u8(vqtbl1q_u8(table, nibbles));
    }
};

inline int32x4_t add_products(int32x4_t total, const int16_t* weights, int8x16_t levels) {
    const int16x8_t low = vmovl_s8(vget_low_s8(levels)), high = vmovl_s8(vget_high_s8(levels));
    const int16x8_t first = vld1q_s16(weights), second = vld1q_s16(weights + 8);
    total = vmlal_s16(total, vget_low_s16(low), vget_low_s16(first));
    total = vmlal_s16(total, vget_high_s16(low), vget_high_s16(first));
    total = vmlal_s16(total, vget_low_s16(high), vget_low_s16(second));
    return vmlal_s16(total, vget_high_s16(high), vget_high_s16(second));
}

// codes [bytes][TILE][64], weights [blocks][ROWS][128 bytes] -> sums [2][4]
template <int ROWS>
void add_pair(const QjlPair& pair, const uint8_t* codes, int64_t blocks, const uint8_t* weights,
              float* sums) {
    const Levels a(pair, 0, codes), b(pair, 1, codes), c(pair, 2, codes), d(pair, 3, codes);
    int32x4_t first[ROWS], second[ROWS];
    for (int r = 0; r < ROWS; ++r) first[r] = second[r] = vdupq_n_s32(0);
    for (int64_t i = 0; i < blocks; ++i) {
        const auto* of_rows = reinterpret_cast<const int16_t*>(weights + i * ROWS * 128);
        for (int quarter = 0; quarter < 4; ++quarter) {
            const int64_t place = i * 64 + quarter * 16;
            const int8x16_t levels = pair.kind == 1 ? a.of(place) : vaddq_s8(a.of(place), b.of(place));
            const int8x16_t others = pair.kind == 1 ? c.of(place) : vaddq_s8(c.of(place), d.of(place));
            for (int r = 0; r < ROWS; ++r) {
                first[r] = add_products(first[r], of_rows + r * 64 + quarter * 16, levels);
                second[r] = add_products(second[r], of_rows + r * 64 + quarter * 16, others);
            }
        }
    }
    for (int r = 0; r < 4; ++r) {
        sums[r] = r < ROWS ? float(vaddvq_s32(first[r % ROWS])) : 0;
        sums[4 + r] = r < ROWS ? float(vaddvq_s32(second[r % ROWS])) : 0;
    }
}

}  // namespace nibbles
