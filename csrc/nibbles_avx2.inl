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

QJL_INLINE __m256i twice(const void* sixteen_bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(sixteen_bytes)));
}

// Low and high nibbles of 32 tokens.
struct Places {
    __m256i low, high;

    explicit QJL_INLINE Places(const uint8_t* codes) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        low = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
        high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
    }
};

// Of tokens 0 to 7 and 16 to 23, then of the other 16.
struct Words {
    __m256i low, high;

    QJL_INLINE void add(const Words& more) {
        low = _mm256_add_epi16(low, more.low);
        high = _mm256_add_epi16(high, more.high);
    }
};

// The table of one nibble.
struct Entries {
    __m256i low_bytes, high_bytes;

    explicit QJL_INLINE Entries(const uint8_t* table) : low_bytes(twice(table)), high_bytes(twice(table + 16)) {}

    QJL_INLINE Words at(__m256i places) const {
        const __m256i low = _mm256_shuffle_epi8(low_bytes, places), high = _mm256_shuffle_epi8(high_bytes, places);
        return {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
    }
};

// Sums of the entries of a block.
struct BlockWords {
    Words first, second;

    QJL_INLINE BlockWords(const Places& a, const Places& b, const uint8_t* table) {
        const Entries entries(table);
        first = entries.at(a.low), second = entries.at(b.low);
        add(a.high, b.high, table + 32);
    }

    QJL_INLINE void add(const Places& a, const Places& b, const uint8_t* table) {
        add(a.low, b.low, table);
        add(a.high, b.high, table + 32);
    }

    QJL_INLINE void add(__m256i a, __m256i b, const uint8_t* table) {
        const Entries entries(table);
        first.add(entries.at(a));
        second.add(entries.at(b));
        keep(first.low, first.high, second.low, second.high);
    }
};

// Sums of one row over 32 tokens: of even and odd words of the low ones, then of the high ones.
struct HalfSums {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;

    QJL_INLINE void add(const Words& words, __m256i even, __m256i odd) {
        a = _mm256_add_epi32(a, _mm256_madd_epi16(words.low, even));
        b = _mm256_add_epi32(b, _mm256_madd_epi16(words.low, odd));
        c = _mm256_add_epi32(c, _mm256_madd_epi16(words.high, even));
        d = _mm256_add_epi32(d, _mm256_madd_epi16(words.high, odd));
    }

    QJL_INLINE void leave(int32_t* by_four) const {
        leave((F8)a, (F8)c, by_four);
        leave((F8)b, (F8)d, by_four + 16);
    }

    static QJL_INLINE void leave(F8 low, F8 high, int32_t* to) {
        store(to, _mm256_shuffle_ps(low, high, 0x88));
        store(to + 32, _mm256_shuffle_ps(low, high, 0xdd));
    }
};

struct RowSums {
    HalfSums first, second;

    QJL_INLINE void add(const BlockWords& words, const int32_t* factors) {
        const __m256i even = _mm256_set1_epi32(factors[0]), odd = _mm256_set1_epi32(factors[1]);
        first.add(words.first, even, odd);
        second.add(words.second, even, odd);
    }
};

// Sums of many rows do not fit the registers; GCC 12 would spill them twice.
template <int ROWS>
QJL_INLINE void leave_in_memory([[maybe_unused]] RowSums (&rows)[ROWS]) {
    if constexpr (ROWS > 1) asm volatile("" : "+m"(rows));
}

// codes [bytes][64], tables [bytes][ROWS][64 bytes], factors [(bytes + 1) / 2][ROWS][2] -> sums [ROWS][64] by four;
// `soon` is what will be read next: as many bytes as codes
template <int ROWS>
__attribute__((noinline)) void scan_block(const uint8_t* codes, int64_t bytes, const uint8_t* tables,
                                          const int32_t* factors, int32_t* sums, const uint8_t* soon) {
    constexpr int64_t NEXT = ROWS * 64;
    const int64_t ahead = bytes * 64;  // the next block, as a rule
    RowSums rows[ROWS];
    int64_t j = 0;
    for (; j + 2 <= bytes; j += 2, codes += 128, tables += 2 * NEXT, factors += 2 * ROWS) {
        const Places a(codes), b(codes + 32), c(codes + 64), d(codes + 96);
        __builtin_prefetch(codes + ahead);
        __builtin_prefetch(codes + ahead + 64);
        __builtin_prefetch(soon + j * 64);
        __builtin_prefetch(soon + j * 64 + 64);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            BlockWords words(a, b, tables + r * 64);
            words.add(c, d, tables + NEXT + r * 64);
            rows[r].add(words, factors + r * 2);
            leave_in_memory(rows);
        }
    }
    if (j < bytes) {
        const Places a(codes), b(codes + 32);
        for (int r = 0; r < ROWS; ++r) rows[r].add({a, b, tables + r * 64}, factors + r * 2);
    }
    for (int r = 0; r < ROWS; ++r) {
        rows[r].first.leave(sums + r * 64);
        rows[r].second.leave(sums + r * 64 + 8);
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

    QJL_INLINE __m256i nibbles(int64_t place) const {
        const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes + place));
        return _mm256_and_si256(_mm256_srl_epi16(codes, shift), _mm256_set1_epi8(15));
    }
    QJL_INLINE __m256i of(__m256i nibbles) const { return _mm256_shuffle_epi8(table, nibbles); }
};

// Levels of 32 tokens.
struct LevelWords {
    __m256i even, odd;

    explicit QJL_INLINE LevelWords(__m256i bytes)
        : even(_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8)), odd(_mm256_srai_epi16(bytes, 8)) {}
};

// The weighted sums of both coordinates in one row.
struct PairSums {
    __m256i first = _mm256_setzero_si256(), second = first;

    QJL_INLINE void add(__m256i weights, __m256i firsts, __m256i seconds) {
        first = _mm256_add_epi32(first, _mm256_madd_epi16(weights, firsts));
        second = _mm256_add_epi32(second, _mm256_madd_epi16(weights, seconds));
        keep(first, second);
    }

    QJL_INLINE void add(const uint8_t* weights, const LevelWords& firsts, const LevelWords& seconds) {
        const auto* row = reinterpret_cast<const __m256i*>(weights);
        add(_mm256_load_si256(row), firsts.even, seconds.even);
        add(_mm256_load_si256(row + 2), firsts.odd, seconds.odd);
    }
};

QJL_INLINE F4 sums_of(__m256i a, __m256i b, __m256i c, __m256i d) {
    const auto floats = [](__m256i x) { return (F8)_mm256_cvtepi32_ps(x); };
    return sums(floats(a), floats(b), floats(c), floats(d));
}

template <int ROWS, int KIND>
__attribute__((noinline)) void add_pair_of(const QjlPair& pair, const uint8_t* codes, int64_t blocks,
                                           const uint8_t* weights, float* to) {
    const Levels a(pair, 0, codes), b(pair, 1, codes), c(pair, 2, codes), d(pair, 3, codes);
    PairSums row0, row1, row2, row3;
    for (int64_t place = 0; place < blocks * 64; weights += ROWS * 128) {
        for (const uint8_t* half = weights; half < weights + 64; half += 32, place += 32) {
            const __m256i at_a = a.nibbles(place);
            const __m256i at_c = KIND == 0 ? at_a : c.nibbles(place);
            __m256i first = a.of(at_a), second = c.of(at_c);
            if constexpr (KIND != 1) {
                const __m256i at_b = b.nibbles(place);
                first = _mm256_add_epi8(first, b.of(at_b));
                second = _mm256_add_epi8(second, d.of(KIND == 0 ? at_b : d.nibbles(place)));
            }
            const LevelWords firsts(first), seconds(second);
            row0.add(half, firsts, seconds);
            if constexpr (ROWS > 1) row1.add(half + 128, firsts, seconds);
            if constexpr (ROWS > 2) row2.add(half + 256, firsts, seconds);
            if constexpr (ROWS > 3) row3.add(half + 384, firsts, seconds);
        }
    }
    store(to, sums_of(row0.first, row1.first, row2.first, row3.first));
    store(to + 4, sums_of(row0.second, row1.second, row2.second, row3.second));
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
