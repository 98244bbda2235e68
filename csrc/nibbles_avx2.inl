// Look-ups and weighted sums with AVX2, and four products at once where there is AVX-VNNI.

#include "step/lookups.inl"

namespace nibbles {

constexpr int MAX_ROWS = 4;
constexpr int TILE = 16;  // blocks whose weights are summed up at once
#ifdef __AVXVNNI__
constexpr int FACTOR_TOP = 127;
constexpr int WEIGHT_TOP = 255;
#else
constexpr int FACTOR_TOP = 32;   // the sum of eight look-ups fits 16 bits
constexpr int WEIGHT_TOP = 127;  // that of two weighted levels too
#endif

QJL_INLINE __m256i at(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

QJL_INLINE void leave(void* to, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }

QJL_INLINE __m256i twice(const void* sixteen_bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(sixteen_bytes)));
}

QJL_INLINE __m256i repeated_four(const void* bytes) {
    int32_t four;
    __builtin_memcpy(&four, bytes, sizeof four);
    return _mm256_set1_epi32(four);
}

// Of every 16 tokens the first eight, then the others.
struct Tokens {
    __m256i early, late;
};

QJL_INLINE Tokens bytes_in_turn(__m256i a, __m256i b) {
    return {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
}

QJL_INLINE Tokens words_in_turn(__m256i a, __m256i b) {
    return {_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)};
}

// Numbers from 0 to 255 as 64 bytes.
QJL_INLINE void put_in_order(const I16 (&lanes)[4], uint8_t* bytes) {
    const auto half = [](auto a, auto b, auto c, auto d) {
        const __m256i early = _mm256_packs_epi32((__m256i)a, (__m256i)b);
        return _mm256_packus_epi16(early, _mm256_packs_epi32((__m256i)c, (__m256i)d));
    };
    leave(bytes, half(lanes[0].low, lanes[1].low, lanes[2].low, lanes[3].low));
    leave(bytes + 32, half(lanes[0].high, lanes[1].high, lanes[2].high, lanes[3].high));
}

// sum[i] + a[2 i] * two[0] + a[2 i + 1] * two[1]
QJL_INLINE I16 add_words(const I16& sum, const int16_t* a, const int16_t* two) {
    using Half = decltype(sum.low);
    const __m256i factors = repeated_four(two);
    return {sum.low + (Half)_mm256_madd_epi16(at(a), factors), sum.high + (Half)_mm256_madd_epi16(at(a + 16), factors)};
}

// Adds the products of bytes, four by four.
QJL_INLINE void add_products(__m256i& sum, __m256i positive, __m256i other) {
#ifdef __AVXVNNI__
    sum = _mm256_dpbusd_avx_epi32(sum, positive, other);
#else
    const __m256i words = _mm256_maddubs_epi16(positive, other);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
#endif
}

// Keys

// One nibble of each of four bytes, of 32 tokens.
struct Places {
    __m256i a, b, c, d;

    QJL_INLINE void stay_in_registers() { asm volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d)); }
};

struct BothPlaces {
    Places low, high;

    QJL_INLINE BothPlaces(const uint8_t* codes, const Quad& quad) {
        const auto put = [&](int i, __m256i& low, __m256i& high) {
            const __m256i bytes = at(codes + quad.at[i]), mask = _mm256_set1_epi8(15);
            low = _mm256_and_si256(bytes, mask);
            high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
        };
        put(0, low.a, high.a), put(1, low.b, high.b), put(2, low.c, high.c), put(3, low.d, high.d);
    }

    QJL_INLINE void stay_in_registers() { low.stay_in_registers(), high.stay_in_registers(); }
};

// Entries for two nibbles, side by side.
QJL_INLINE Tokens entries(const uint8_t* tables, __m256i a, __m256i b) {
    return bytes_in_turn(_mm256_shuffle_epi8(twice(tables), a), _mm256_shuffle_epi8(twice(tables + 16), b));
}

#ifdef __AVXVNNI__
// Sums of one row over 32 tokens, by lanes.
struct RowSums {
    __m256i a, b, c, d;

    QJL_INLINE void begin(int32_t first) { a = b = c = d = _mm256_set1_epi32(first); }

    template <int ROWS>
    QJL_INLINE void add(const BothPlaces& places, const uint8_t* tables, const uint8_t* factors) {
        add(places.low, tables, factors);
        add(places.high, tables + ROWS * 64, factors + ROWS * 4);
    }

    QJL_INLINE void add(const Places& places, const uint8_t* tables, const uint8_t* factors) {
        const __m256i four = repeated_four(factors);
        const Tokens ab = entries(tables, places.a, places.b), cd = entries(tables + 32, places.c, places.d);
        const Tokens early = words_in_turn(ab.early, cd.early), late = words_in_turn(ab.late, cd.late);
        add_products(a, early.early, four), add_products(b, early.late, four);
        add_products(c, late.early, four), add_products(d, late.late, four);
    }

    QJL_INLINE void leave_by_lanes(int32_t* sums) const {
        leave(sums, a), leave(sums + 16, b), leave(sums + 32, c), leave(sums + 48, d);
    }
};
#else
// Words of two tokens lie in 32 bits: sums of them as they lie, and of the odd token's.
struct WordSums {
    __m256i both, odd;

    QJL_INLINE void begin(int32_t first) {
        odd = _mm256_set1_epi32(first);
        both = _mm256_add_epi32(odd, _mm256_slli_epi32(odd, 16));
    }

    QJL_INLINE void add(__m256i words) {
        both = _mm256_add_epi32(both, words);
        odd = _mm256_add_epi32(odd, _mm256_srli_epi32(words, 16));
    }

    QJL_INLINE void leave_by_lanes(int32_t* sums) const {
        const __m256i even = _mm256_sub_epi32(both, _mm256_slli_epi32(odd, 16));
        leave(sums, _mm256_unpacklo_epi32(even, odd)), leave(sums + 16, _mm256_unpackhi_epi32(even, odd));
    }
};

// Sums of one row over 32 tokens.
struct RowSums {
    WordSums early, late;

    QJL_INLINE void begin(int32_t first) { early.begin(first), late.begin(first); }

    template <int ROWS>
    QJL_INLINE void add(const BothPlaces& places, const uint8_t* tables, const uint8_t* factors) {
        const Places &low = places.low, &high = places.high;
        const uint8_t *high_tables = tables + ROWS * 64, *high_factors = factors + ROWS * 4;
        Tokens words = products(low.a, low.b, tables, factors);
        add_words(words, products(low.c, low.d, tables + 32, factors + 2));
        add_words(words, products(high.a, high.b, high_tables, high_factors));
        add_words(words, products(high.c, high.d, high_tables + 32, high_factors + 2));
        early.add(words.early), late.add(words.late);
    }

    static QJL_INLINE Tokens products(__m256i a, __m256i b, const uint8_t* tables, const uint8_t* factors) {
        int16_t two;
        __builtin_memcpy(&two, factors, sizeof two);
        const Tokens looked_up = entries(tables, a, b);
        return {_mm256_maddubs_epi16(looked_up.early, _mm256_set1_epi16(two)),
                _mm256_maddubs_epi16(looked_up.late, _mm256_set1_epi16(two))};
    }

    static QJL_INLINE void add_words(Tokens& sums, const Tokens& words) {
        sums.early = _mm256_add_epi16(sums.early, words.early);
        sums.late = _mm256_add_epi16(sums.late, words.late);
        keep(sums.early, sums.late);
    }

    QJL_INLINE void leave_by_lanes(int32_t* sums) const {
        early.leave_by_lanes(sums), late.leave_by_lanes(sums + 32);
    }
};
#endif

// Keeps GCC 12 from loading what lies there once for both halves, and spilling it.
QJL_INLINE void look_again(const uint8_t*& tables, const uint8_t*& factors) {
    asm volatile("" : "+r"(tables), "+r"(factors));
}

// Sums of look-ups over a block. `quads [count]` say which four bytes of a token are looked up: where their 64 codes
// begin. tables [count][low nibbles, high ones][ROWS][4][16], which `factors` of the same [count][2][ROWS][4] multiply.
// first [ROWS], sums [ROWS][64] by lanes.
template <int ROWS>
__attribute__((noinline)) void scan_block(const uint8_t* codes, const Quad* quads, int64_t count, const uint8_t* tables,
                                          const uint8_t* factors, const int32_t* first, int32_t* sums, Ahead ahead) {
    RowSums rows[2][ROWS];  // of either half
    for (int r = 0; r < ROWS; ++r) rows[0][r].begin(first[r]), rows[1][r].begin(first[r]);
    for (int64_t q = 0; q < count; ++q, tables += 2 * ROWS * 64, factors += 2 * ROWS * 4) {
        for (int i = 0; i < 4; ++i) __builtin_prefetch(ahead.next());
        for (int half = 0; half < 2; ++half) {
            BothPlaces places(codes + 32 * half, quads[q]);
            look_again(tables, factors);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                places.stay_in_registers();
                rows[half][r].template add<ROWS>(places, tables + r * 64, factors + r * 4);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        rows[0][r].leave_by_lanes(sums + r * 64);
        rows[1][r].leave_by_lanes(sums + r * 64 + 8);
    }
}

// Weighted sums

// Where the nibbles are that a quad reads.
template <int KIND>
struct Sources {
    int64_t byte[Reads<KIND>::COUNT];
    __m256i shift[Reads<KIND>::COUNT];

    QJL_INLINE explicit Sources(const QjlQuad& quad) {
        for (int k = 0; k < 8; ++k) {
            const int n = Reads<KIND>::OF[k];
            if (n < 0) continue;
            byte[n] = quad.sources[k] / 2 * 64;
            shift[n] = _mm256_set1_epi32(quad.sources[k] % 2 * 4);
        }
    }

    QJL_INLINE __m256i nibbles(const uint8_t* codes, int n) const {
        __m256i bytes = at(codes + byte[n]);
        if (Reads<KIND>::IS_HIGH[n] == 1) bytes = _mm256_srli_epi16(bytes, 4);
        if (Reads<KIND>::IS_HIGH[n] == -1) bytes = _mm256_srlv_epi32(bytes, shift[n]);
        return _mm256_and_si256(bytes, _mm256_set1_epi8(15));
    }
};

// Sums of two coordinates in one row.
struct TwoSums {
    __m256i a = _mm256_setzero_si256(), b = a;

    QJL_INLINE void add(const uint8_t* weights, __m256i levels_a, __m256i levels_b) {
        const __m256i of_row = at(weights);
        add_products(a, of_row, levels_a), add_products(b, of_row, levels_b);
        keep(a, b);
    }
};

QJL_INLINE void leave_sums(int32_t* to, __m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), sums);
}

// Coordinates FIRST and FIRST + 1 of a quad: the sums of all four do not fit the registers.
template <int ROWS, int KIND, int FIRST>
__attribute__((noinline)) void add_two(const QjlQuad& quad, const Weighted& blocks, int64_t ahead_at, int32_t* sums) {
    using Of = Reads<KIND>;
    constexpr int A = 2 * FIRST, B = A + 2;
    const Sources<KIND> sources(quad);
    const __m256i first_a = twice(quad.tables[A]), second_a = twice(quad.tables[A + 1]);
    const __m256i first_b = twice(quad.tables[B]), second_b = twice(quad.tables[B + 1]);
    TwoSums row0, row1, row2, row3;
    const uint8_t* weights = blocks.weights;
    for (int64_t b = 0; b < blocks.count; ++b, weights += ROWS * 64) {
        if (FIRST == 0) __builtin_prefetch(blocks.ahead[b] + ahead_at);
#pragma GCC unroll 2
        for (int half = 0; half < 64; half += 32) {
            __m256i nibbles[Of::COUNT];
            for (int n = 0; n < Of::COUNT; ++n) nibbles[n] = sources.nibbles(blocks.codes[b] + half, n);
            __m256i a = _mm256_shuffle_epi8(first_a, nibbles[Of::OF[A]]);
            __m256i b = _mm256_shuffle_epi8(first_b, nibbles[Of::OF[B]]);
            if constexpr (Of::OF[1] >= 0) {
                a = _mm256_add_epi8(a, _mm256_shuffle_epi8(second_a, nibbles[Of::OF[A + 1]]));
                b = _mm256_add_epi8(b, _mm256_shuffle_epi8(second_b, nibbles[Of::OF[B + 1]]));
            }
            keep(a, b);
            row0.add(weights + half, a, b);
            if constexpr (ROWS > 1) row1.add(weights + 64 + half, a, b);
            if constexpr (ROWS > 2) row2.add(weights + 128 + half, a, b);
            if constexpr (ROWS > 3) row3.add(weights + 192 + half, a, b);
        }
    }
    leave_sums(sums + FIRST * MAX_ROWS, row0.a, row1.a, row2.a, row3.a);
    leave_sums(sums + (FIRST + 1) * MAX_ROWS, row0.b, row1.b, row2.b, row3.b);
}

// Weighted sums of four coordinates over blocks: sums [4 coordinates][MAX_ROWS]. What is `ahead` of them is read later,
// from a place on.
template <int ROWS, int KIND>
QJL_INLINE void add_quad(const QjlQuad& quad, const Weighted& blocks, int64_t ahead_at, int32_t* sums) {
    add_two<ROWS, KIND, 0>(quad, blocks, ahead_at, sums);
    add_two<ROWS, KIND, 2>(quad, blocks, ahead_at, sums);
}

}  // namespace nibbles
