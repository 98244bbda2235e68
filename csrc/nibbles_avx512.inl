// Look-ups and weighted sums with AVX-512 VBMI and VNNI.

namespace nibbles {

constexpr int MAX_ROWS = 4;
constexpr int TILE = 16;  // blocks whose weights are summed up at once
constexpr float WEIGHT_TOP = 65535;

inline void put_table(uint8_t* to, const int16_t* low, const int16_t* high) {
    __builtin_memcpy(to, low, 32);
    __builtin_memcpy(to + 32, high, 32);
}

// Places in a table of 32 words, of the low and high nibbles of even and odd tokens.
struct Places {
    __m512i even_low, even_high, odd_low, odd_high;

    explicit Places(const uint8_t* bytes) {
        const __m512i words = _mm512_loadu_si512(bytes), mask = _mm512_set1_epi16(15), upper = _mm512_set1_epi16(16);
        even_low = _mm512_and_si512(words, mask);
        even_high = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4), mask, upper, 0xEA);  // (a & b) | c
        odd_low = _mm512_and_si512(_mm512_srli_epi16(words, 8), mask);
        odd_high = _mm512_or_si512(_mm512_srli_epi16(words, 12), upper);
    }
};

inline __attribute__((always_inline)) void add_words(__m512i& even, __m512i& odd, const Places& at, __m512i table) {
    even = _mm512_add_epi16(even, _mm512_add_epi16(_mm512_permutexvar_epi16(at.even_low, table),
                                                   _mm512_permutexvar_epi16(at.even_high, table)));
    odd = _mm512_add_epi16(odd, _mm512_add_epi16(_mm512_permutexvar_epi16(at.odd_low, table),
                                                 _mm512_permutexvar_epi16(at.odd_high, table)));
}

// Sums of one row, by four.
struct RowSums {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;

    inline __attribute__((always_inline)) void add(__m512i even, __m512i odd, const int32_t* factor) {
        const __m512i low = _mm512_set1_epi32(factor[0]), high = _mm512_set1_epi32(factor[1]);
        a = _mm512_dpwssd_epi32(a, even, low);
        b = _mm512_dpwssd_epi32(b, odd, low);
        c = _mm512_dpwssd_epi32(c, even, high);
        d = _mm512_dpwssd_epi32(d, odd, high);
        keep(a, b, c, d);
    }

    inline __attribute__((always_inline)) void add(const Places& at, const uint8_t* tables, const int32_t* factor) {
        __m512i even = _mm512_setzero_si512(), odd = even;
        add_words(even, odd, at, _mm512_load_si512(tables));
        add(even, odd, factor);
    }

    inline __attribute__((always_inline)) void add(const Places& first, const Places& second, const uint8_t* tables,
                                                   int64_t next, const int32_t* factor) {
        const __m512i table = _mm512_load_si512(tables);
        __m512i even = _mm512_add_epi16(_mm512_permutexvar_epi16(first.even_low, table),
                                        _mm512_permutexvar_epi16(first.even_high, table));
        __m512i odd = _mm512_add_epi16(_mm512_permutexvar_epi16(first.odd_low, table),
                                       _mm512_permutexvar_epi16(first.odd_high, table));
        add_words(even, odd, second, _mm512_load_si512(tables + next));
        add(even, odd, factor);
    }

    void leave(int32_t* to) const {
        _mm512_store_si512(to, a);
        _mm512_store_si512(to + 16, b);
        _mm512_store_si512(to + 32, c);
        _mm512_store_si512(to + 48, d);
    }
};

// codes [bytes][64], tables [bytes][ROWS][64 bytes], factors [(bytes + 1) / 2][ROWS][2] -> sums [ROWS][64] by four;
// `soon` is what will be read next: as many bytes as codes
template <int ROWS>
__attribute__((noinline)) void scan_block(const uint8_t* codes, int64_t bytes, const uint8_t* tables,
                                          const int32_t* factors, int32_t* sums, const uint8_t* soon) {
    constexpr int64_t NEXT = ROWS * 64;
    const int64_t ahead = bytes * 64;  // the next block, as a rule
    RowSums first, second, third, fourth;
    int64_t j = 0;
    for (; j + 2 <= bytes; j += 2, codes += 128, tables += 2 * NEXT, factors += 2 * ROWS) {
        const Places even(codes), odd(codes + 64);
        __builtin_prefetch(codes + ahead);
        __builtin_prefetch(codes + ahead + 64);
        __builtin_prefetch(soon + j * 64);
        __builtin_prefetch(soon + j * 64 + 64);
        first.add(even, odd, tables, NEXT, factors);
        if constexpr (ROWS > 1) second.add(even, odd, tables + 64, NEXT, factors + 2);
        if constexpr (ROWS > 2) third.add(even, odd, tables + 128, NEXT, factors + 4);
        if constexpr (ROWS > 3) fourth.add(even, odd, tables + 192, NEXT, factors + 6);
    }
    if (j < bytes) {
        const Places last(codes);
        first.add(last, tables, factors);
        if constexpr (ROWS > 1) second.add(last, tables + 64, factors + 2);
        if constexpr (ROWS > 2) third.add(last, tables + 128, factors + 4);
        if constexpr (ROWS > 3) fourth.add(last, tables + 192, factors + 6);
    }
    first.leave(sums);
    if constexpr (ROWS > 1) second.leave(sums + 64);
    if constexpr (ROWS > 2) third.leave(sums + 128);
    if constexpr (ROWS > 3) fourth.leave(sums + 192);
}

// High bytes of 64 weights, then low bytes.
inline void put_weights(uint8_t* to, const I16 (&by_four)[4]) {
    const I16 low = (by_four[0] & 255) | (by_four[1] & 255) << 8 | (by_four[2] & 255) << 16 | by_four[3] << 24;
    const I16 high = by_four[0] >> 8 | (by_four[1] >> 8) << 8 | (by_four[2] >> 8) << 16 | (by_four[3] >> 8) << 24;
    _mm512_store_si512(to, (__m512i)high);
    _mm512_store_si512(to + 64, (__m512i)low);
}

// The sums of eight vectors.
inline F8 sums_of(const __m512 (&x)[8]) {
    __m512 fours[2];
    for (int i = 0; i < 2; ++i) {
        const __m512 *v = x + 4 * i;
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
        const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    }
    const __m512 pairs = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                                       _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    const __m256 low = _mm512_castps512_ps256(_mm512_shuffle_f32x4(pairs, pairs, 0x08));
    const __m256 high = _mm512_castps512_ps256(_mm512_shuffle_f32x4(pairs, pairs, 0x0d));
    return (F8)_mm256_add_ps(low, high);
}

// The weighted sums of both coordinates in one row, by high and low bytes of the weights.
struct PairSums {
    __m512i high_first = _mm512_setzero_si512(), low_first = high_first, high_second = high_first,
            low_second = high_first;

    inline __attribute__((always_inline)) void add(const uint8_t* weights, __m512i first, __m512i second) {
        const __m512i high = _mm512_load_si512(weights), low = _mm512_load_si512(weights + 64);
        high_first = _mm512_dpbusd_epi32(high_first, high, first);
        high_second = _mm512_dpbusd_epi32(high_second, high, second);
        low_first = _mm512_dpbusd_epi32(low_first, low, first);
        low_second = _mm512_dpbusd_epi32(low_second, low, second);
        keep(high_first, low_first, high_second, low_second);
    }

    static __m512 joined(__m512i high, __m512i low) {
        return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
    }
    __m512 first() const { return joined(high_first, low_first); }
    __m512 second() const { return joined(high_second, low_second); }
};

struct Levels {
    __m512i table;
    __m512i shift;
    const uint8_t* bytes;

    Levels(const QjlPair& pair, int k, const uint8_t* codes)
        : table(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pair.tables[k])))),
          shift(_mm512_set1_epi16(int16_t(pair.sources[k] % 2 * 4))),
          bytes(codes + pair.sources[k] / 2 * (TILE * 64)) {}

    __m512i nibbles(int64_t place) const {
        return _mm512_and_si512(_mm512_srlv_epi16(_mm512_loadu_si512(bytes + place), shift), _mm512_set1_epi8(15));
    }
    __m512i of(__m512i nibbles) const { return _mm512_shuffle_epi8(table, nibbles); }
};

template <int ROWS, int KIND>
__attribute__((noinline)) void add_pair_of(const QjlPair& pair, const uint8_t* codes, int64_t blocks,
                                           const uint8_t* weights, float* sums) {
    const Levels a(pair, 0, codes), b(pair, 1, codes), c(pair, 2, codes), d(pair, 3, codes);
    PairSums row0, row1, row2, row3;
    for (int64_t i = 0, place = 0; i < blocks; ++i, place += 64, weights += ROWS * 128) {
        const __m512i at_a = a.nibbles(place);
        const __m512i at_c = KIND == 0 ? at_a : c.nibbles(place);
        __m512i first = a.of(at_a), second = c.of(at_c);
        if constexpr (KIND != 1) {
            const __m512i at_b = b.nibbles(place);
            first = _mm512_add_epi8(first, b.of(at_b));
            second = _mm512_add_epi8(second, d.of(KIND == 0 ? at_b : d.nibbles(place)));
        }
        row0.add(weights, first, second);
        if constexpr (ROWS > 1) row1.add(weights + 128, first, second);
        if constexpr (ROWS > 2) row2.add(weights + 256, first, second);
        if constexpr (ROWS > 3) row3.add(weights + 384, first, second);
    }
    const __m512 all[8] = {row0.first(),  row1.first(),  row2.first(),  row3.first(),
                           row0.second(), row1.second(), row2.second(), row3.second()};
    const F8 totals = sums_of(all);
    __builtin_memcpy(sums, &totals, sizeof totals);
}

// codes [bytes][TILE][64], weights [blocks][ROWS][128 bytes] -> sums [2][4]
template <int ROWS>
void add_pair(const QjlPair& pair, const uint8_t* codes, int64_t blocks, const uint8_t* weights,
              float* sums) {
    switch (pair.kind) {
        case 0: return add_pair_of<ROWS, 0>(pair, codes, blocks, weights, sums);
        case 1: return add_pair_of<ROWS, 1>(pair, codes, blocks, weights, sums);
        default: return add_pair_of<ROWS, 2>(pair, codes, blocks, weights, sums);
    }
}

}  // namespace nibbles
