// Look-ups and weighted sums with AVX2, and, of bytes by four, with AVX-VNNI.

namespace nibbles {

constexpr int MAX_ROWS = 4;
constexpr int TILE = 16;  // blocks whose weights are summed up at once
#ifdef __AVXVNNI__
constexpr int FACTOR_TOP = 127;
constexpr int WEIGHT_TOP = 255;
#else
constexpr int FACTOR_TOP = 32;  // eight look-ups fit 16 bits
constexpr int WEIGHT_TOP = 127;
#endif

QJL_INLINE __m256i at(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }
QJL_INLINE void leave(void* bytes, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(bytes), x); }

QJL_INLINE __m256i twice(const void* sixteen_bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(sixteen_bytes)));
}

template <class Number>
QJL_INLINE Number number_at(const void* bytes) {
    Number number;
    __builtin_memcpy(&number, bytes, sizeof number);
    return number;
}

// Two vectors in turn: by 16 tokens, the first eight and the others.
struct Halves {
    __m256i first, second;
};

QJL_INLINE Halves bytes_in_turn(__m256i a, __m256i b) {
    return {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
}
QJL_INLINE Halves words_in_turn(__m256i a, __m256i b) {
    return {_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)};
}

// 64 bytes as numbers: vector k has tokens 4 k to 4 k + 3 of every 16.
inline void put_in_lanes(const uint8_t* bytes, I16 (&lanes)[4]) {
    const __m256i zero = _mm256_setzero_si256();
    for (int half = 0; half < 2; ++half) {
        const Halves words = bytes_in_turn(at(bytes + 32 * half), zero);
        const Halves a = words_in_turn(words.first, zero), b = words_in_turn(words.second, zero);
        const __m256i numbers[] = {a.first, a.second, b.first, b.second};
        for (int k = 0; k < 4; ++k) __builtin_memcpy(reinterpret_cast<uint8_t*>(lanes + k) + 32 * half, numbers + k, 32);
    }
}

// Numbers from 0 to 255 as 64 bytes.
inline void put_in_order(const I16 (&lanes)[4], uint8_t* bytes) {
    const auto in_order = [](auto a, auto b, auto c, auto d) {
        return _mm256_packus_epi16(_mm256_packs_epi32((__m256i)a, (__m256i)b), _mm256_packs_epi32((__m256i)c, (__m256i)d));
    };
    leave(bytes, in_order(lanes[0].low, lanes[1].low, lanes[2].low, lanes[3].low));
    leave(bytes + 32, in_order(lanes[0].high, lanes[1].high, lanes[2].high, lanes[3].high));
}

// sum[i] + a[2 i] * two[0] + a[2 i + 1] * two[1]
QJL_INLINE I16 add_words(const I16& sum, const int16_t* a, const int16_t* two) {
    using Half = decltype(sum.low);
    const __m256i factors = _mm256_set1_epi32(number_at<int32_t>(two));
    return {sum.low + (Half)_mm256_madd_epi16(at(a), factors), sum.high + (Half)_mm256_madd_epi16(at(a + 16), factors)};
}

// Nibbles of the four bytes of a quad.
struct Places {
    __m256i low[4][2], high[4][2];

    QJL_INLINE void put(const uint8_t* codes, const Quad& quad) {
        const __m256i mask = _mm256_set1_epi8(15);
        for (int i = 0; i < 4; ++i) {
            for (int half = 0; half < 2; ++half) {
                const __m256i bytes = at(codes + quad.at[i] + 32 * half);
                low[i][half] = _mm256_and_si256(bytes, mask);
                high[i][half] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
            }
        }
    }
};

#ifdef __AVXVNNI__
QJL_INLINE __m256i plus_products(__m256i sum, __m256i bytes, __m256i factors) {
    return _mm256_dpbusd_avx_epi32(sum, bytes, factors);
}

struct RowSums {
    __m256i of[2][4];

    QJL_INLINE void begin(int32_t first) {
        for (auto& half : of) {
            for (auto& sum : half) sum = _mm256_set1_epi32(first);
        }
    }

    QJL_INLINE void add(const __m256i (&places)[4][2], const uint8_t* table, const uint8_t* factors) {
        const __m256i four = _mm256_set1_epi32(number_at<int32_t>(factors));
        const __m256i a = twice(table), b = twice(table + 16), c = twice(table + 32), d = twice(table + 48);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const Halves ab = bytes_in_turn(_mm256_shuffle_epi8(a, places[0][half]), _mm256_shuffle_epi8(b, places[1][half]));
            const Halves cd = bytes_in_turn(_mm256_shuffle_epi8(c, places[2][half]), _mm256_shuffle_epi8(d, places[3][half]));
            const Halves first = words_in_turn(ab.first, cd.first), second = words_in_turn(ab.second, cd.second);
            of[half][0] = plus_products(of[half][0], first.first, four);
            of[half][1] = plus_products(of[half][1], first.second, four);
            of[half][2] = plus_products(of[half][2], second.first, four);
            of[half][3] = plus_products(of[half][3], second.second, four);
        }
    }

    template <int ROWS>
    QJL_INLINE void add(const Places& places, const uint8_t* tables, const uint8_t* factors) {
        add(places.low, tables, factors);
        add(places.high, tables + ROWS * 64, factors + ROWS * 4);
    }

    QJL_INLINE void leave_by_lanes(int32_t* sums) const {
        for (int half = 0; half < 2; ++half) {
            for (int k = 0; k < 4; ++k) leave(sums + 16 * k + 8 * half, of[half][k]);
        }
    }
};
#else
// Sums of one row. Two tokens share 32 bits: sums of both as they lie, and of the second.
struct RowSums {
    __m256i both[2][2], second[2][2];
    int32_t first;

    QJL_INLINE void begin(int32_t number) {
        first = number;
        for (int half = 0; half < 2; ++half) {
            for (int k = 0; k < 2; ++k) both[half][k] = second[half][k] = _mm256_setzero_si256();
        }
    }

    static QJL_INLINE void add_two(Halves (&words)[2], const __m256i (&a)[2], const __m256i (&b)[2], const uint8_t* tables,
                                   const uint8_t* factors) {
        const __m256i of_a = twice(tables), of_b = twice(tables + 16), two = _mm256_set1_epi16(number_at<int16_t>(factors));
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const Halves x = bytes_in_turn(_mm256_shuffle_epi8(of_a, a[half]), _mm256_shuffle_epi8(of_b, b[half]));
            words[half].first = _mm256_add_epi16(words[half].first, _mm256_maddubs_epi16(x.first, two));
            words[half].second = _mm256_add_epi16(words[half].second, _mm256_maddubs_epi16(x.second, two));
        }
    }

    template <int ROWS>
    QJL_INLINE void add(const Places& places, const uint8_t* tables, const uint8_t* factors) {
        Halves words[2]{};
        add_two(words, places.low[0], places.low[1], tables, factors);
        add_two(words, places.low[2], places.low[3], tables + 32, factors + 2);
        add_two(words, places.high[0], places.high[1], tables + ROWS * 64, factors + ROWS * 4);
        add_two(words, places.high[2], places.high[3], tables + ROWS * 64 + 32, factors + ROWS * 4 + 2);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) add_words(words[half], both[half], second[half]);
    }

    static QJL_INLINE void add_words(const Halves& words, __m256i (&both)[2], __m256i (&second)[2]) {
        both[0] = _mm256_add_epi32(both[0], words.first);
        both[1] = _mm256_add_epi32(both[1], words.second);
        second[0] = _mm256_add_epi32(second[0], _mm256_srli_epi32(words.first, 16));
        second[1] = _mm256_add_epi32(second[1], _mm256_srli_epi32(words.second, 16));
    }

    QJL_INLINE void leave_by_lanes(int32_t* sums) const {
        for (int half = 0; half < 2; ++half) {
            for (int k = 0; k < 2; ++k) {
                const __m256i start = _mm256_set1_epi32(first), odd = second[half][k];
                const __m256i even = _mm256_sub_epi32(both[half][k], _mm256_slli_epi32(odd, 16));
                const __m256i a = _mm256_add_epi32(even, start), b = _mm256_add_epi32(odd, start);
                leave(sums + 32 * k + 8 * half, _mm256_unpacklo_epi32(a, b));
                leave(sums + 32 * k + 16 + 8 * half, _mm256_unpackhi_epi32(a, b));
            }
        }
    }
};
#endif

// Sums of look-ups over a block, see nibbles_scalar.inl.
template <int ROWS>
__attribute__((noinline)) void scan_block(const uint8_t* codes, const Quad* quads, int64_t count, const uint8_t* tables,
                                          const uint8_t* factors, const int32_t* first, int32_t* sums, Ahead ahead) {
    RowSums rows[ROWS];
    for (int r = 0; r < ROWS; ++r) rows[r].begin(first[r]);
    for (int64_t q = 0; q < count; ++q, tables += 2 * ROWS * 64, factors += 2 * ROWS * 4) {
        for (int i = 0; i < 4; ++i) __builtin_prefetch(ahead.next());
        Places places;
        places.put(codes, quads[q]);
        asm volatile("" : "+m"(places));
        for (int r = 0; r < ROWS; ++r) {
            rows[r].template add<ROWS>(places, tables + r * 64, factors + r * 4);
        }
        asm volatile("" : "+m"(rows));
    }
    for (int r = 0; r < ROWS; ++r) rows[r].leave_by_lanes(sums + r * 64);
}

// Values

#ifndef __AVXVNNI__
QJL_INLINE __m256i plus_products(__m256i sum, __m256i weights, __m256i levels) {
    const __m256i words = _mm256_maddubs_epi16(weights, levels);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}
#endif

// Which look-ups of two coordinates read the same nibbles.
enum TwoKind { FOUR_NIBBLES, SAME_TWO, SAME_ONE, ONE_EACH, CHAIN };

struct Levels {
    __m256i table, shift;
    int64_t at_byte;

    QJL_INLINE Levels(const QjlQuad& quad, int k)
        : table(twice(quad.tables[k])),
          shift(_mm256_set1_epi32(quad.sources[k] % 2 * 4)),
          at_byte(quad.sources[k] / 2 * 64) {}

    QJL_INLINE __m256i nibbles(const uint8_t* codes) const {
        return _mm256_and_si256(_mm256_srlv_epi32(at(codes + at_byte), shift), _mm256_set1_epi8(15));
    }
    QJL_INLINE __m256i of(__m256i nibbles) const { return _mm256_shuffle_epi8(table, nibbles); }
};

struct TwoSums {
    __m256i first = _mm256_setzero_si256(), second = first;

    QJL_INLINE void add(const uint8_t* weights, __m256i firsts, __m256i seconds) {
        const __m256i row = at(weights);
        first = plus_products(first, row, firsts);
        second = plus_products(second, row, seconds);
        keep(first, second);
    }
};

QJL_INLINE __m128i sums_of(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
}

template <int ROWS, TwoKind KIND>
__attribute__((noinline)) void add_two(const QjlQuad& quad, int k, const uint8_t* const* codes, int64_t blocks,
                                       const uint8_t* weights, int32_t* sums) {
    const Levels a(quad, k), b(quad, k + 1), c(quad, k + 2), d(quad, k + 3);
    TwoSums row0, row1, row2, row3;
    for (int64_t block = 0; block < blocks; ++block, weights += ROWS * 64) {
#pragma GCC unroll 2
        for (int half = 0; half < 64; half += 32) {
            const uint8_t* from = codes[block] + half;
            const __m256i at_a = a.nibbles(from);
            const __m256i at_c = KIND == SAME_TWO || KIND == SAME_ONE ? at_a : c.nibbles(from);
            __m256i first = a.of(at_a), second = c.of(at_c);
            if constexpr (KIND != SAME_ONE && KIND != ONE_EACH) {
                const __m256i at_b = KIND == CHAIN ? at_c : b.nibbles(from);
                first = _mm256_add_epi8(first, b.of(at_b));
                second = _mm256_add_epi8(second, d.of(KIND == SAME_TWO ? at_b : d.nibbles(from)));
            }
            keep(first, second);
            row0.add(weights + half, first, second);
            if constexpr (ROWS > 1) row1.add(weights + 64 + half, first, second);
            if constexpr (ROWS > 2) row2.add(weights + 128 + half, first, second);
            if constexpr (ROWS > 3) row3.add(weights + 192 + half, first, second);
        }
    }
    auto* to = reinterpret_cast<__m128i*>(sums);
    _mm_storeu_si128(to, sums_of(row0.first, row1.first, row2.first, row3.first));
    _mm_storeu_si128(to + 1, sums_of(row0.second, row1.second, row2.second, row3.second));
}

template <int ROWS, TwoKind KIND>
QJL_INLINE void add_four(const QjlQuad& quad, const uint8_t* const* codes, int64_t blocks, const uint8_t* weights,
                         int32_t* sums) {
    add_two<ROWS, KIND>(quad, 0, codes, blocks, weights, sums);
    add_two<ROWS, KIND>(quad, 4, codes, blocks, weights, sums + 2 * MAX_ROWS);
}

// Weighted sums of four coordinates over blocks, see nibbles_scalar.inl.
template <int ROWS>
void add_quad(const QjlQuad& quad, const uint8_t* const* codes, int64_t blocks, const uint8_t* weights, int32_t* sums,
              const uint8_t* const* ahead, int64_t ahead_at) {
    for (int64_t b = 0; b < blocks; ++b) __builtin_prefetch(ahead[b] + ahead_at);
    switch (quad.kind) {
        case QJL_TWO_CHAIN:
        case QJL_FOUR_CHAIN: return add_four<ROWS, SAME_TWO>(quad, codes, blocks, weights, sums);
        case QJL_TWO_LEVELS: return add_four<ROWS, SAME_ONE>(quad, codes, blocks, weights, sums);
        case QJL_LEVELS: return add_four<ROWS, ONE_EACH>(quad, codes, blocks, weights, sums);
        case QJL_ONE_CHAIN: return add_four<ROWS, CHAIN>(quad, codes, blocks, weights, sums);
        default: return add_four<ROWS, FOUR_NIBBLES>(quad, codes, blocks, weights, sums);
    }
}

}  // namespace nibbles
