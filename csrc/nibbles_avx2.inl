// Look-ups and weighted sums with AVX2.

namespace nibbles {

constexpr int MAX_ROWS = 4;
constexpr int TILE = 8;  // blocks whose weights are summed up at once
constexpr float WEIGHT_TOP = 32767;

// Low bytes and high bytes of both tables: a byte shuffle looks up one of them.
inline void put_table(uint8_t* to, const int16_t* low, const int16_t* high) {
    for (int i = 0; i < 16; ++i) {
        to[i] = uint8_t(low[i]), to[16 + i] = uint8_t(low[i] >> 8);
        to[32 + i] = uint8_t(high[i]), to[48 + i] = uint8_t(high[i] >> 8);
    }
}

inline __m256i twice(const void* sixteen_bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(sixteen_bytes)));
}

// Low and high nibbles of 32 tokens.
struct Places {
    __m256i low, high;

    explicit Places(const uint8_t* codes) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        low = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
        high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
    }
};

// Sums of table entries: tokens 0 to 7 and 16 to 23, then the others.
struct Words {
    __m256i low, high;

    QJL_INLINE Words(__m256i at, const uint8_t* table) {
        const __m256i low_bytes = _mm256_shuffle_epi8(twice(table), at);
        const __m256i high_bytes = _mm256_shuffle_epi8(twice(table + 16), at);
        low = _mm256_unpacklo_epi8(low_bytes, high_bytes);
        high = _mm256_unpackhi_epi8(low_bytes, high_bytes);
    }

    QJL_INLINE Words(const Places& at, const uint8_t* table) : Words(at.low, table) { add({at.high, table + 32}); }

    QJL_INLINE void add(const Words& more) {
        low = _mm256_add_epi16(low, more.low);
        high = _mm256_add_epi16(high, more.high);
    }
};

// Sums of one row: even and odd tokens of the low words, then of the high ones.
struct RowSums {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;

    QJL_INLINE void add(const Words& words, const int32_t* factors) {
        const __m256i even = _mm256_set1_epi32(factors[0]), odd = _mm256_set1_epi32(factors[1]);
        a = _mm256_add_epi32(a, _mm256_madd_epi16(words.low, even));
        b = _mm256_add_epi32(b, _mm256_madd_epi16(words.low, odd));
        c = _mm256_add_epi32(c, _mm256_madd_epi16(words.high, even));
        d = _mm256_add_epi32(d, _mm256_madd_epi16(words.high, odd));
        QJL_KEEP(a, b, c, d);
    }

    QJL_INLINE void add(const Places& first, const Places& second, const uint8_t* tables, int64_t next,
                        const int32_t* factors) {
        Words words(first, tables);
        words.add({second, tables + next});
        add(words, factors);
    }

    static QJL_INLINE void leave(__m256i low, __m256i high, int32_t* to) {
        const __m256 first = _mm256_castsi256_ps(low), second = _mm256_castsi256_ps(high);
        _mm256_store_ps(reinterpret_cast<float*>(to), _mm256_shuffle_ps(first, second, 0x88));
        _mm256_store_ps(reinterpret_cast<float*>(to + 32), _mm256_shuffle_ps(first, second, 0xdd));
    }

    // By four.
    QJL_INLINE void leave(int32_t* to) const {
        leave(a, c, to);
        leave(b, d, to + 16);
    }
};

// 32 tokens of a block, for one row or two of ROWS.
template <int ROWS, bool IS_TWO>
void scan_half(const uint8_t* codes, int64_t bytes, const uint8_t* tables, const int32_t* factors, int32_t* sums) {
    constexpr int64_t NEXT = ROWS * 64;
    RowSums one, two;
    int64_t j = 0;
    for (; j + 2 <= bytes; j += 2, codes += 128, tables += 2 * NEXT, factors += 2 * ROWS) {
        const Places first(codes), second(codes + 64);
        one.add(first, second, tables, NEXT, factors);
        if constexpr (IS_TWO) two.add(first, second, tables + 64, NEXT, factors + 2);
    }
    if (j < bytes) {
        const Places last(codes);
        one.add(Words(last, tables), factors);
        if constexpr (IS_TWO) two.add(Words(last, tables + 64), factors + 2);
    }
    one.leave(sums);
    if constexpr (IS_TWO) two.leave(sums + 64);
}

// codes [bytes][64], tables [bytes][ROWS][64 bytes], factors [(bytes + 1) / 2][ROWS][2] -> sums [ROWS][64] by four;
// `soon` is what will be read next: as many bytes as codes
template <int ROWS>
void scan_block(const uint8_t* codes, int64_t bytes, const uint8_t* tables, const int32_t* factors, int32_t* sums,
                const uint8_t* soon) {
    for (int64_t j = 0; j < bytes; ++j) __builtin_prefetch(soon + j * 64);
    for (int half = 0; half < 2; ++half, codes += 32, sums += 8) {
        scan_half<ROWS, (ROWS > 1)>(codes, bytes, tables, factors, sums);
        if constexpr (ROWS > 2) scan_half<ROWS, (ROWS > 3)>(codes, bytes, tables + 128, factors + 4, sums + 128);
    }
}

// Weights of even tokens as words, then those of odd tokens.
inline void put_weights(uint8_t* to, const I16 (&by_four)[4]) {
    const I16 even = by_four[0] | by_four[2] << 16, odd = by_four[1] | by_four[3] << 16;
    store(to, even);
    store(to + 64, odd);
}

struct Levels {
    __m256i table;
    __m128i shift;
    const uint8_t* bytes;

    Levels(const QjlPair& pair, int k, const uint8_t* codes)
        : table(twice(pair.tables[k])),
          shift(_mm_cvtsi32_si128(pair.sources[k] % 2 * 4)),
          bytes(codes + pair.sources[k] / 2 * (TILE * 64)) {}

    __m256i of(int64_t place) const {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + place));
        return _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srl_epi16(codes, shift), _mm256_set1_epi8(15)));
    }
};

inline __m256i even_words(__m256i bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
inline __m256i odd_words(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

inline float sum_of(__m256i x) {
    const F8 numbers = (F8)_mm256_cvtepi32_ps(x);
    return ((numbers[0] + numbers[1]) + (numbers[2] + numbers[3])) + ((numbers[4] + numbers[5]) + (numbers[6] + numbers[7]));
}

// codes [bytes][TILE][64], weights [blocks][ROWS][128 bytes] -> sums [2][4]
template <int ROWS>
void add_pair(const QjlPair& pair, const uint8_t* codes, int64_t blocks, const uint8_t* weights,
              float* sums) {
    const Levels a(pair, 0, codes), b(pair, 1, codes), c(pair, 2, codes), d(pair, 3, codes);
    __m256i first[ROWS], second[ROWS];
    for (int r = 0; r < ROWS; ++r) first[r] = second[r] = _mm256_setzero_si256();
    for (int64_t i = 0; i < blocks; ++i, weights += ROWS * 128) {
        for (int half = 0; half < 2; ++half) {
            const int64_t place = i * 64 + half * 32;
            const __m256i levels = pair.kind == 1 ? a.of(place) : _mm256_add_epi8(a.of(place), b.of(place));
            const __m256i others = pair.kind == 1 ? c.of(place) : _mm256_add_epi8(c.of(place), d.of(place));
            const __m256i even = even_words(levels), odd = odd_words(levels);
            const __m256i other_even = even_words(others), other_odd = odd_words(others);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const auto* row = reinterpret_cast<const __m256i*>(weights + r * 128 + half * 32);
                const __m256i of_even = _mm256_loadu_si256(row), of_odd = _mm256_loadu_si256(row + 2);
                first[r] = _mm256_add_epi32(first[r], _mm256_madd_epi16(of_even, even));
                first[r] = _mm256_add_epi32(first[r], _mm256_madd_epi16(of_odd, odd));
                second[r] = _mm256_add_epi32(second[r], _mm256_madd_epi16(of_even, other_even));
                second[r] = _mm256_add_epi32(second[r], _mm256_madd_epi16(of_odd, other_odd));
            }
        }
    }
    for (int r = 0; r < 4; ++r) {
        sums[r] = r < ROWS ? sum_of(first[r % ROWS]) : 0;
        sums[4 + r] = r < ROWS ? sum_of(second[r % ROWS]) : 0;
    }
}

}  // namespace nibbles
