// Look-ups and weighted sums in plain C++: what the other instruction sets do.

#include "step/lookups.inl"

namespace nibbles {

constexpr int MAX_ROWS = 4;
constexpr int TILE = 16;  // blocks whose weights are summed up at once
constexpr int FACTOR_TOP = 127;
constexpr int WEIGHT_TOP = 255;

// Which lane of a token's number; lane 16 k + 4 L + i has token 16 L + 4 k + i.
inline int lane_of(int token) { return token / 4 % 4 * 16 + token / 16 * 4 + token % 4; }

// Numbers from 0 to 255 as 64 bytes.
inline void put_in_order(const I16 (&lanes)[4], uint8_t* bytes) {
    int32_t numbers[64];
    __builtin_memcpy(numbers, lanes, sizeof numbers);
    for (int t = 0; t < 64; ++t) bytes[t] = uint8_t(numbers[lane_of(t)]);
}

// sum[i] + a[2 i] * two[0] + a[2 i + 1] * two[1]
inline I16 add_words(const I16& sum, const int16_t* a, const int16_t* two) {
    int32_t numbers[16];
    __builtin_memcpy(numbers, &sum, sizeof numbers);
    for (int i = 0; i < 16; ++i) numbers[i] += a[2 * i] * two[0] + a[2 * i + 1] * two[1];
    return load<I16>(numbers);
}

// Sums of look-ups over a block. `quads [count]` say which four bytes of a token are looked up: where their 64 codes
// begin. tables [count][low nibbles, high ones][ROWS][4][16], which `factors` of the same [count][2][ROWS][4] multiply.
// first [ROWS], sums [ROWS][64] by lanes.
template <int ROWS>
void scan_block(const uint8_t* codes, const Quad* quads, int64_t count, const uint8_t* tables, const uint8_t* factors,
                const int32_t* first, int32_t* sums, Ahead ahead) {
    for (int r = 0; r < ROWS; ++r) {
        for (int i = 0; i < 64; ++i) sums[r * 64 + i] = first[r];
    }
    for (int64_t q = 0; q < count; ++q, tables += 2 * ROWS * 64, factors += 2 * ROWS * 4) {
        for (int i = 0; i < 4; ++i) __builtin_prefetch(ahead.next());
        for (int i = 0; i < 4; ++i) {
            const uint8_t* bytes = codes + quads[q].at[i];
            for (int r = 0; r < ROWS; ++r) {
                const uint8_t *low = tables + (r * 4 + i) * 16, *high = low + ROWS * 64;
                const int low_factor = factors[r * 4 + i], high_factor = factors[(ROWS + r) * 4 + i];
                for (int t = 0; t < 64; ++t) {
                    sums[r * 64 + lane_of(t)] += low[bytes[t] & 15] * low_factor + high[bytes[t] >> 4] * high_factor;
                }
            }
        }
    }
}

// Weighted sums of four coordinates over blocks: sums [4 coordinates][MAX_ROWS]. What is `ahead` of them is read later,
// from a place on.
template <int ROWS, int>
void add_quad(const QjlQuad& quad, const Weighted& blocks, int64_t ahead_at, int32_t* sums) {
    __builtin_memset(sums, 0, 4 * MAX_ROWS * sizeof(int32_t));
    const uint8_t* weights = blocks.weights;
    for (int64_t b = 0; b < blocks.count; ++b, weights += ROWS * 64) {
        __builtin_prefetch(blocks.ahead[b] + ahead_at);
        const auto level = [&](int k, int t) {
            const int32_t source = quad.sources[k];
            return quad.tables[k][blocks.codes[b][source / 2 * 64 + t] >> (source % 2 * 4) & 15];
        };
        for (int t = 0; t < 64; ++t) {
            for (int c = 0; c < 4; ++c) {
                const int number = level(2 * c, t) + level(2 * c + 1, t);
                for (int r = 0; r < ROWS; ++r) sums[c * MAX_ROWS + r] += weights[r * 64 + t] * number;
            }
        }
    }
}

}  // namespace nibbles
