// Look-ups and weighted sums with NEON, with or without dot products of bytes.

#include "step/lookups.inl"

namespace nibbles {

constexpr int MAX_ROWS = 4;
constexpr int TILE = 16;  // blocks whose weights are summed up at once
constexpr int FACTOR_TOP = 127;

// Numbers from 0 to 255 as 64 bytes.
QJL_INLINE void put_in_order(const I16 (&lanes)[4], uint8_t* bytes) {
    const auto* from = reinterpret_cast<const uint8_t*>(lanes);
    for (int quarter = 0; quarter < 4; ++quarter, bytes += 16, from += 16) {
        const auto words = [&](int k) { return load<uint16x8_t>(from + 64 * k); };
        const uint16x8_t low = vuzp1q_u16(words(0), words(1)), high = vuzp1q_u16(words(2), words(3));
        vst1q_u8(bytes, vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)));
    }
}

// sum[i] + a[2 i] * two[0] + a[2 i + 1] * two[1]
QJL_INLINE I16 add_words(I16 sum, const int16_t* a, const int16_t* two) {
    auto* quarter = reinterpret_cast<uint8_t*>(&sum);
    for (int i = 0; i < 2; ++i, a += 16, quarter += 32) {
        const int16x8x2_t x = vld2q_s16(a);
        const int32x4_t low = vmlal_n_s16(load<int32x4_t>(quarter), vget_low_s16(x.val[0]), two[0]);
        const int32x4_t high = vmlal_high_n_s16(load<int32x4_t>(quarter + 16), x.val[0], two[0]);
        store(quarter, vmlal_n_s16(low, vget_low_s16(x.val[1]), two[1]));
        store(quarter + 16, vmlal_high_n_s16(high, x.val[1], two[1]));
    }
    return sum;
}

// Look-ups of 16 tokens

// Sums of four tokens in each.
struct Four {
    uint32x4_t a, b, c, d;
};

QJL_INLINE uint8x8_t four_factors(const uint8_t* factors) {
    uint32_t four;
    __builtin_memcpy(&four, factors, sizeof four);
    return vcreate_u8(four);
}

#ifdef __ARM_FEATURE_DOTPROD

// One nibble of each of four bytes: those of two bytes in turn, as places in their two tables.
struct Places {
    uint8x16_t a, b, c, d;  // of the first two bytes for tokens 0 to 7, then 8 to 15; of the other two
};

struct Nibbles {
    Places low, high;

    QJL_INLINE Nibbles(const uint8_t* codes, const Quad& quad) {
        const auto at = [&](int i) { return vld1q_u8(codes + quad.at[i]); };
        const uint8x16_t x = at(0), y = at(1), z = at(2), w = at(3);
        const Places bytes{vzip1q_u8(x, y), vzip2q_u8(x, y), vzip1q_u8(z, w), vzip2q_u8(z, w)};
        low = {low_place(bytes.a), low_place(bytes.b), low_place(bytes.c), low_place(bytes.d)};
        high = {high_place(bytes.a), high_place(bytes.b), high_place(bytes.c), high_place(bytes.d)};
    }

    static QJL_INLINE uint8x16_t second_table() { return vreinterpretq_u8_u16(vdupq_n_u16(0x1000)); }
    static QJL_INLINE uint8x16_t low_place(uint8x16_t bytes) {
        return vorrq_u8(vandq_u8(bytes, vdupq_n_u8(15)), second_table());
    }
    static QJL_INLINE uint8x16_t high_place(uint8x16_t bytes) { return vorrq_u8(vshrq_n_u8(bytes, 4), second_table()); }
};

QJL_INLINE void look_up(Four& sums, const Places& places, const uint8_t* tables, const uint8_t* factors) {
    const uint8x16x2_t first = vld1q_u8_x2(tables), second = vld1q_u8_x2(tables + 32);
    const auto found = [](const uint8x16x2_t& two, uint8x16_t at) { return vreinterpretq_u16_u8(vqtbl2q_u8(two, at)); };
    const uint16x8_t a = found(first, places.a), b = found(first, places.b);
    const uint16x8_t c = found(second, places.c), d = found(second, places.d);
    const uint8x8_t four = four_factors(factors);
    sums.a = vdotq_lane_u32(sums.a, vreinterpretq_u8_u16(vzip1q_u16(a, c)), four, 0);
    sums.b = vdotq_lane_u32(sums.b, vreinterpretq_u8_u16(vzip2q_u16(a, c)), four, 0);
    sums.c = vdotq_lane_u32(sums.c, vreinterpretq_u8_u16(vzip1q_u16(b, d)), four, 0);
    sums.d = vdotq_lane_u32(sums.d, vreinterpretq_u8_u16(vzip2q_u16(b, d)), four, 0);
    keep(sums.a, sums.b, sums.c, sums.d);
}

#else

// One nibble of each of four bytes.
struct Places {
    uint8x16_t a, b, c, d;
};

struct Nibbles {
    Places low, high;

    QJL_INLINE Nibbles(const uint8_t* codes, const Quad& quad) {
        const auto at = [&](int i) { return vld1q_u8(codes + quad.at[i]); };
        const uint8x16_t x = at(0), y = at(1), z = at(2), w = at(3), mask = vdupq_n_u8(15);
        low = {vandq_u8(x, mask), vandq_u8(y, mask), vandq_u8(z, mask), vandq_u8(w, mask)};
        high = {vshrq_n_u8(x, 4), vshrq_n_u8(y, 4), vshrq_n_u8(z, 4), vshrq_n_u8(w, 4)};
    }
};

// Adds look-ups of two bytes, whose products fit 16 bits.
QJL_INLINE void add_two(Four& sums, uint8x16_t first, uint8x16_t second, uint8x16_t factor, uint8x16_t other) {
    const uint16x8_t low = vmull_u8(vget_low_u8(first), vget_low_u8(factor)), high = vmull_high_u8(first, factor);
    const uint16x8_t lows = vmlal_u8(low, vget_low_u8(second), vget_low_u8(other));
    const uint16x8_t highs = vmlal_high_u8(high, second, other);
    sums.a = vaddw_u16(sums.a, vget_low_u16(lows)), sums.b = vaddw_high_u16(sums.b, lows);
    sums.c = vaddw_u16(sums.c, vget_low_u16(highs)), sums.d = vaddw_high_u16(sums.d, highs);
    keep(sums.a, sums.b, sums.c, sums.d);
}

QJL_INLINE void look_up(Four& sums, const Places& places, const uint8_t* tables, const uint8_t* factors) {
    const auto found = [&](int i, uint8x16_t at) { return vqtbl1q_u8(vld1q_u8(tables + 16 * i), at); };
    uint8x8_t four = four_factors(factors);
    keep(four);  // else GCC 12 takes its bytes apart as a number
    add_two(sums, found(0, places.a), found(1, places.b), vdupq_lane_u8(four, 0), vdupq_lane_u8(four, 1));
    add_two(sums, found(2, places.c), found(3, places.d), vdupq_lane_u8(four, 2), vdupq_lane_u8(four, 3));
}

#endif

template <int ROWS>
QJL_INLINE void look_up(Four (&rows)[4], const Places& places, const uint8_t* tables, const uint8_t* factors) {
    look_up(rows[0], places, tables, factors);
    if constexpr (ROWS > 1) look_up(rows[1], places, tables + 64, factors + 4);
    if constexpr (ROWS > 2) look_up(rows[2], places, tables + 128, factors + 8);
    if constexpr (ROWS > 3) look_up(rows[3], places, tables + 192, factors + 12);
}

template <int ROWS>
QJL_INLINE void scan_quarter(const uint8_t* codes, const Quad* quads, int64_t count, const uint8_t* tables,
                             const uint8_t* factors, const int32_t* first, int32_t* sums, Ahead& ahead) {
    Four rows[4];
    for (int r = 0; r < ROWS; ++r) {
        rows[r].a = rows[r].b = rows[r].c = rows[r].d = vreinterpretq_u32_s32(vdupq_n_s32(first[r]));
    }
    for (int64_t q = 0; q < count; ++q, tables += 2 * ROWS * 64, factors += 2 * ROWS * 4) {
        __builtin_prefetch(ahead.next());
        const Nibbles nibbles(codes, quads[q]);
        look_up<ROWS>(rows, nibbles.low, tables, factors);
        look_up<ROWS>(rows, nibbles.high, tables + ROWS * 64, factors + ROWS * 4);
    }
    for (int r = 0; r < ROWS; ++r, sums += 64) {
        store(sums, rows[r].a), store(sums + 16, rows[r].b), store(sums + 32, rows[r].c), store(sums + 48, rows[r].d);
    }
}

// Sums of look-ups over a block. `quads [count]` say which four bytes of a token are looked up: where their 64 codes
// begin. tables [count][low nibbles, high ones][ROWS][4][16], which `factors` of the same [count][2][ROWS][4] multiply.
// first [ROWS], sums [ROWS][64] by lanes.
template <int ROWS>
__attribute__((noinline)) void scan_block(const uint8_t* codes, const Quad* quads, int64_t count,
                                          const uint8_t* tables, const uint8_t* factors, const int32_t* first,
                                          int32_t* sums, Ahead ahead) {
    for (int quarter = 0; quarter < 4; ++quarter, codes += 16, sums += 4) {
        scan_quarter<ROWS>(codes, quads, count, tables, factors, first, sums, ahead);
    }
}

// Weighted sums

#ifdef __ARM_FEATURE_DOTPROD

constexpr int WEIGHT_TOP = 255;
constexpr int MIDDLE = 128;  // is added to numbers, which have no sign then

QJL_INLINE void add_products(int32x4_t& sums, uint8x16_t weights, uint8x16_t numbers) {
    sums = vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(sums), weights, numbers));
}

#else

constexpr int WEIGHT_TOP = 127;  // so that two products fit 16 bits
constexpr int MIDDLE = 0;

QJL_INLINE void add_products(int32x4_t& sums, uint8x16_t weights, uint8x16_t numbers) {
    const int8x16_t a = vreinterpretq_s8_u8(weights), b = vreinterpretq_s8_u8(numbers);
    sums = vpadalq_s16(sums, vmlal_high_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), a, b));
}

#endif

// Numbers of a quad.
template <int KIND>
struct Numbers {
    using Of = Reads<KIND>;
    int64_t byte[Of::COUNT];
    int8x16_t shift[Of::COUNT];
    uint8x16_t tables[8];

    explicit QJL_INLINE Numbers(const QjlQuad& quad) {
        for (int k = 0; k < 8; ++k) {
            const int n = Of::OF[k];
            if (n < 0) continue;
            const uint8x16_t table = vld1q_u8(reinterpret_cast<const uint8_t*>(quad.tables[k]));
            tables[k] = k % 2 ? table : veorq_u8(table, vdupq_n_u8(MIDDLE));
            byte[n] = quad.sources[k] / 2 * 64;
            shift[n] = vdupq_n_s8(int8_t(quad.sources[k] % 2 * -4));
        }
    }

    // Of 16 tokens.
    QJL_INLINE void find(const uint8_t* codes, uint8x16_t (&found)[4]) const {
        uint8x16_t nibbles[Of::COUNT];
        for (int n = 0; n < Of::COUNT; ++n) {
            uint8x16_t bytes = vld1q_u8(codes + byte[n]);
            if (Of::IS_HIGH[n] == -1) bytes = vshlq_u8(bytes, shift[n]);
            nibbles[n] = Of::IS_HIGH[n] == 1 ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
        }
        for (int c = 0; c < 4; ++c) {
            const int a = Of::OF[2 * c], b = Of::OF[2 * c + 1];
            found[c] = vqtbl1q_u8(tables[2 * c], nibbles[a]);
            if (b >= 0) found[c] = vaddq_u8(found[c], vqtbl1q_u8(tables[2 * c + 1], nibbles[b]));
        }
    }
};

QJL_INLINE int32x4_t sums_of(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
    return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
}

// What MIDDLE adds to the sums of each row.
template <int ROWS>
QJL_INLINE int32x4_t sums_of_middle(const uint8_t* weights, int64_t blocks) {
    int32x4_t a = vdupq_n_s32(0), b = a, c = a, d = a;
    const uint8x16_t one = vdupq_n_u8(1);
    for (int64_t place = 0; place < blocks * 64; place += 64, weights += ROWS * 64) {
        for (const uint8_t* at = weights; at < weights + 64; at += 16) {
            add_products(a, vld1q_u8(at), one);
            if constexpr (ROWS > 1) add_products(b, vld1q_u8(at + 64), one);
            if constexpr (ROWS > 2) add_products(c, vld1q_u8(at + 128), one);
            if constexpr (ROWS > 3) add_products(d, vld1q_u8(at + 192), one);
        }
    }
    return vmulq_n_s32(sums_of(a, b, c, d), MIDDLE);
}

// Sums of one row, of four coordinates.
struct RowSums {
    int32x4_t a = vdupq_n_s32(0), b = a, c = a, d = a;

    QJL_INLINE void add(const uint8_t* of_row, const uint8x16_t (&numbers)[4]) {
        const uint8x16_t x = vld1q_u8(of_row);
        add_products(a, x, numbers[0]), add_products(b, x, numbers[1]);
        add_products(c, x, numbers[2]), add_products(d, x, numbers[3]);
    }
};

// Weighted sums of four coordinates over blocks: sums [4 coordinates][MAX_ROWS]. What is `ahead` of them is read later,
// from a place on.
template <int ROWS, int KIND>
QJL_INLINE void add_quad(const QjlQuad& quad, const Weighted& blocks, int64_t ahead_at, int32_t* sums) {
    const int32x4_t middle = MIDDLE ? sums_of_middle<ROWS>(blocks.weights, blocks.count) : vdupq_n_s32(0);
    const Numbers<KIND> numbers(quad);
    RowSums w, x, y, z;
    const uint8_t* weights = blocks.weights;
    for (int64_t b = 0; b < blocks.count; ++b, weights += ROWS * 64) {
        __builtin_prefetch(blocks.ahead[b] + ahead_at);
#pragma GCC unroll 1  // more at once does not fit the registers
        for (int place = 0; place < 64; place += 16) {
            uint8x16_t found[4];
            numbers.find(blocks.codes[b] + place, found);
            keep(found[0], found[1], found[2], found[3]);
            w.add(weights + place, found);
            if constexpr (ROWS > 1) x.add(weights + 64 + place, found);
            if constexpr (ROWS > 2) y.add(weights + 128 + place, found);
            if constexpr (ROWS > 3) z.add(weights + 192 + place, found);
        }
    }
    vst1q_s32(sums, vsubq_s32(sums_of(w.a, x.a, y.a, z.a), middle));
    vst1q_s32(sums + 4, vsubq_s32(sums_of(w.b, x.b, y.b, z.b), middle));
    vst1q_s32(sums + 8, vsubq_s32(sums_of(w.c, x.c, y.c, z.c), middle));
    vst1q_s32(sums + 12, vsubq_s32(sums_of(w.d, x.d, y.d, z.d), middle));
}

}  // namespace nibbles
