// Look-ups and weighted sums with AVX-512 VBMI and VNNI.

#include "step/lookups.inl"

namespace nibbles {

constexpr int MAX_ROWS = 4;
constexpr int TILE = 16;  // blocks whose weights are summed up at once
constexpr int FACTOR_TOP = 127;
constexpr int WEIGHT_TOP = 255;

// Numbers from 0 to 255 as 64 bytes.
QJL_INLINE void put_in_order(const I16 (&lanes)[4], uint8_t* bytes) {
    const __m512i low = _mm512_packus_epi32((__m512i)lanes[0], (__m512i)lanes[1]);
    const __m512i high = _mm512_packus_epi32((__m512i)lanes[2], (__m512i)lanes[3]);
    _mm512_storeu_si512(bytes, _mm512_packus_epi16(low, high));
}

// sum[i] + a[2 i] * two[0] + a[2 i + 1] * two[1]
QJL_INLINE I16 add_words(const I16& sum, const int16_t* a, const int16_t* two) {
    int32_t both;
    __builtin_memcpy(&both, two, sizeof both);
    return (I16)_mm512_dpwssd_epi32((__m512i)sum, _mm512_loadu_si512(a), _mm512_set1_epi32(both));
}

struct Four {
    __m512i a, b, c, d;
};

// Four bytes of each token, 16 tokens in a vector.
struct Bytes {
    Four of;

    QJL_INLINE Bytes(const uint8_t* codes, const Quad& quad) {
        const auto at = [&](int i) { return _mm512_loadu_si512(codes + quad.at[i]); };
        const __m512i x = at(0), y = at(1), z = at(2), w = at(3);
        const __m512i first = _mm512_unpacklo_epi8(x, y), second = _mm512_unpackhi_epi8(x, y);
        const __m512i third = _mm512_unpacklo_epi8(z, w), fourth = _mm512_unpackhi_epi8(z, w);
        of.a = _mm512_unpacklo_epi16(first, third), of.b = _mm512_unpackhi_epi16(first, third);
        of.c = _mm512_unpacklo_epi16(second, fourth), of.d = _mm512_unpackhi_epi16(second, fourth);
    }

    // Where the nibbles are looked up in a register that holds their four tables.
    QJL_INLINE Four low() const { return {place(of.a), place(of.b), place(of.c), place(of.d)}; }
    QJL_INLINE Four high() const {
        return {place(_mm512_srli_epi16(of.a, 4)), place(_mm512_srli_epi16(of.b, 4)),
                place(_mm512_srli_epi16(of.c, 4)), place(_mm512_srli_epi16(of.d, 4))};
    }

    static QJL_INLINE __m512i place(__m512i bytes) {
        return _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8(15), _mm512_set1_epi32(0x30201000), 0xEA);  // (a & b) | c
    }
};

QJL_INLINE void look_up(Four& sums, const Four& places, const uint8_t* tables, const uint8_t* factors) {
    int32_t four;
    __builtin_memcpy(&four, factors, sizeof four);
    const __m512i table = _mm512_loadu_si512(tables), factor = _mm512_set1_epi32(four);
    sums.a = _mm512_dpbusd_epi32(sums.a, _mm512_permutexvar_epi8(places.a, table), factor);
    sums.b = _mm512_dpbusd_epi32(sums.b, _mm512_permutexvar_epi8(places.b, table), factor);
    sums.c = _mm512_dpbusd_epi32(sums.c, _mm512_permutexvar_epi8(places.c, table), factor);
    sums.d = _mm512_dpbusd_epi32(sums.d, _mm512_permutexvar_epi8(places.d, table), factor);
    keep(sums.a, sums.b, sums.c, sums.d);
}

// Sums of up to four rows. GCC 12 keeps no arrays in registers.
template <int ROWS>
struct RowSums {
    Four first, second, third, fourth;

    QJL_INLINE explicit RowSums(const int32_t* from) {
        const auto all = [&](int r) {
            const __m512i x = _mm512_set1_epi32(from[r < ROWS ? r : 0]);
            return Four{x, x, x, x};
        };
        first = all(0), second = all(1), third = all(2), fourth = all(3);
    }

    QJL_INLINE void add(const Four& places, const uint8_t* tables, const uint8_t* factors) {
        look_up(first, places, tables, factors);
        if constexpr (ROWS > 1) look_up(second, places, tables + 64, factors + 4);
        if constexpr (ROWS > 2) look_up(third, places, tables + 128, factors + 8);
        if constexpr (ROWS > 3) look_up(fourth, places, tables + 192, factors + 12);
    }

    QJL_INLINE void leave(int32_t* sums) const {
        leave(first, sums);
        if constexpr (ROWS > 1) leave(second, sums + 64);
        if constexpr (ROWS > 2) leave(third, sums + 128);
        if constexpr (ROWS > 3) leave(fourth, sums + 192);
    }

    static QJL_INLINE void leave(const Four& row, int32_t* to) {
        _mm512_storeu_si512(to, row.a), _mm512_storeu_si512(to + 16, row.b);
        _mm512_storeu_si512(to + 32, row.c), _mm512_storeu_si512(to + 48, row.d);
    }
};

// Sums of look-ups over a block. `quads [count]` say which four bytes of a token are looked up: where their 64 codes
// begin. tables [count][low nibbles, high ones][ROWS][4][16], which `factors` of the same [count][2][ROWS][4] multiply.
// first [ROWS], sums [ROWS][64] by lanes.
template <int ROWS>
__attribute__((noinline)) void scan_block(const uint8_t* codes, const Quad* quads, int64_t count,
                                          const uint8_t* tables, const uint8_t* factors, const int32_t* first,
                                          int32_t* sums, Ahead ahead) {
    RowSums<ROWS> rows(first);
    for (int64_t q = 0; q < count; ++q, tables += 2 * ROWS * 64, factors += 2 * ROWS * 4) {
        for (int i = 0; i < 4; ++i) __builtin_prefetch(ahead.next());
        const Bytes bytes(codes, quads[q]);
        rows.add(bytes.low(), tables, factors);
        rows.add(bytes.high(), tables + ROWS * 64, factors + ROWS * 4);
    }
    rows.leave(sums);
}

// Weighted sums

QJL_INLINE __m512i table_of(const QjlQuad& quad, int k) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(quad.tables[k])));
}

// Where the nibbles are that a quad reads.
template <int KIND>
struct Sources {
    int64_t byte[Reads<KIND>::COUNT];
    __m128i shift[Reads<KIND>::COUNT];

    QJL_INLINE explicit Sources(const QjlQuad& quad) {
        for (int k = 0; k < 8; ++k) {
            const int n = Reads<KIND>::OF[k];
            if (n < 0) continue;
            byte[n] = quad.sources[k] / 2 * 64;
            shift[n] = _mm_cvtsi32_si128(quad.sources[k] % 2 * 4);
        }
    }

    QJL_INLINE __m512i nibbles(const uint8_t* codes, int n) const {
        __m512i bytes = _mm512_loadu_si512(codes + byte[n]);
        if (Reads<KIND>::IS_HIGH[n] == 1) bytes = _mm512_srli_epi16(bytes, 4);
        if (Reads<KIND>::IS_HIGH[n] == -1) bytes = _mm512_srl_epi16(bytes, shift[n]);
        return _mm512_and_si512(bytes, _mm512_set1_epi8(15));
    }
};

QJL_INLINE __m512i sums_of_16(const Four& a, const Four& b, const Four& c, const Four& d) {
    const auto two = [](__m512i x, __m512i y) {
        return _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
    };
    const auto four = [&](const Four& x) {
        const __m512i first = two(x.a, x.b), last = two(x.c, x.d);
        return _mm512_add_epi32(_mm512_unpacklo_epi64(first, last), _mm512_unpackhi_epi64(first, last));
    };
    const auto lanes = [](__m512i x, __m512i y) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
    };
    return lanes(lanes(four(a), four(b)), lanes(four(c), four(d)));
}

// Weighted sums of four coordinates over blocks: sums [4 coordinates][MAX_ROWS]. What is `ahead` of them is read later,
// from a place on.
template <int ROWS, int KIND>
QJL_INLINE void add_quad(const QjlQuad& quad, const Weighted& blocks, int64_t ahead_at, int32_t* sums) {
    using Of = Reads<KIND>;
    const Sources<KIND> sources(quad);
    __m512i tables[8];
    for (int k = 0; k < 8; ++k) {
        if (Of::OF[k] >= 0) tables[k] = table_of(quad, k);
    }
    const __m512i zero = _mm512_setzero_si512();
    Four first{zero, zero, zero, zero}, second = first, third = first, fourth = first;  // by coordinate, members: rows
    const uint8_t* weights = blocks.weights;
    for (int64_t b = 0; b < blocks.count; ++b, weights += ROWS * 64) {
        __builtin_prefetch(blocks.ahead[b] + ahead_at);
        __m512i nibbles[Of::COUNT];
        for (int n = 0; n < Of::COUNT; ++n) nibbles[n] = sources.nibbles(blocks.codes[b], n);
        const auto number = [&](int c) {
            const __m512i one = _mm512_shuffle_epi8(tables[2 * c], nibbles[Of::OF[2 * c]]);
            if constexpr (Of::OF[1] < 0) return one;
            else return _mm512_add_epi8(one, _mm512_shuffle_epi8(tables[2 * c + 1], nibbles[Of::OF[2 * c + 1]]));
        };
        const __m512i w = number(0), x = number(1), y = number(2), z = number(3);
        const auto add = [&](int r, __m512i& a, __m512i& b, __m512i& c, __m512i& d) {
            const __m512i of_row = _mm512_loadu_si512(weights + r * 64);
            a = _mm512_dpbusd_epi32(a, of_row, w), b = _mm512_dpbusd_epi32(b, of_row, x);
            c = _mm512_dpbusd_epi32(c, of_row, y), d = _mm512_dpbusd_epi32(d, of_row, z);
            keep(a, b, c, d);
        };
        add(0, first.a, second.a, third.a, fourth.a);
        if constexpr (ROWS > 1) add(1, first.b, second.b, third.b, fourth.b);
        if constexpr (ROWS > 2) add(2, first.c, second.c, third.c, fourth.c);
        if constexpr (ROWS > 3) add(3, first.d, second.d, third.d, fourth.d);
    }
    _mm512_storeu_si512(sums, sums_of_16(first, second, third, fourth));
}

}  // namespace nibbles
