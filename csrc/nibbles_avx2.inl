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

inline __m256i add(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }

// Sums of both nibbles of 32 tokens: tokens 0 to 7 and 16 to 23, then the others.
struct Words {
    __m256i low, high;

    Words(const uint8_t* codes, const uint8_t* table) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i mask = _mm256_set1_epi8(15);
        const __m256i at_low = _mm256_and_si256(bytes, mask);
        const __m256i at_high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
        const __m256i low_bytes = _mm256_shuffle_epi8(twice(table), at_low);
        const __m256i high_bytes = _mm256_shuffle_epi8(twice(table + 16), at_low);
        const __m256i more_low = _mm256_shuffle_epi8(twice(table + 32), at_high);
        const __m256i more_high = _mm256_shuffle_epi8(twice(table + 48), at_high);
        low = add(_mm256_unpacklo_epi8(low_bytes, high_bytes), _mm256_unpacklo_epi8(more_low, more_high));
        high = add(_mm256_unpackhi_epi8(low_bytes, high_bytes), _mm256_unpackhi_epi8(more_low, more_high));
    }
};

// One row of 32 tokens of a block.
inline void scan_half(const uint8_t* codes, int64_t bytes, const uint8_t* tables, int64_t next, const int32_t* factors,
                      int64_t next_factor, int32_t* sums, int half) {
    __m256i totals[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                         _mm256_setzero_si256()};
    for (int64_t j = 0; j < bytes; j += 2, factors += next_factor) {
        Words words(codes + j * 64, tables + j * next);
        if (j + 1 < bytes) {
            const Words more(codes + (j + 1) * 64, tables + (j + 1) * next);
            words.low = add(words.low, more.low);
            words.high = add(words.high, more.high);
        }
        const __m256i even = _mm256_set1_epi32(factors[0]), odd = _mm256_set1_epi32(factors[1]);
        totals[0] = _mm256_add_epi32(totals[0], _mm256_madd_epi16(words.low, even));
        totals[1] = _mm256_add_epi32(totals[1], _mm256_madd_epi16(words.low, odd));
        totals[2] = _mm256_add_epi32(totals[2], _mm256_madd_epi16(words.high, even));
        totals[3] = _mm256_add_epi32(totals[3], _mm256_madd_epi16(words.high, odd));
    }
    for (int k = 0; k < 4; ++k) {
        alignas(32) int32_t of_tokens[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(of_tokens), totals[k]);
        for (int i = 0; i < 8; ++i) {
            const int token = half * 32 + i / 4 * 16 + k / 2 * 8 + i % 4 * 2 + k % 2;
            sums[token % 4 * 16 + token / 4] = of_tokens[i];
        }
    }
}

// codes [bytes][64], tables [bytes][ROWS][64 bytes], factors [(bytes + 1) / 2][ROWS][2] -> sums [ROWS][64] by four;
// `soon` is what will be read next: as many bytes as codes
template <int ROWS>
void scan_block(const uint8_t* codes, int64_t bytes, const uint8_t* tables, const int32_t* factors, int32_t* sums,
                const uint8_t* soon) {
    for (int64_t j = 0; j < bytes; ++j) __builtin_prefetch(soon + j * 64);
    for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < ROWS; ++r) {
            scan_half(codes + half * 32, bytes, tables + r * 64, ROWS * 64, factors + r * 2, ROWS * 2, sums + r * 64,
                      half);
        }
    }
}

// Weights of even tokens as words, then those of odd tokens.
inline void put_weights(uint8_t* to, const I16 (&by_four)[4]) {
    const I16 even = by_four[0] | by_four[2] << 16, odd = by_four[1] | by_four[3] << 16;
    __builtin_memcpy(to, &even, 64);
    __builtin_memcpy(to + 64, &odd, 64);
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
