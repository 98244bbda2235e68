// Look-ups and weighted sums in plain C++.

namespace nibbles {

constexpr int MAX_ROWS = 4;
constexpr int TILE = 8;  // blocks whose weights are summed up at once
constexpr float WEIGHT_TOP = 32767;

inline void put_table(uint8_t* to, const int16_t* low, const int16_t* high) {
    __builtin_memcpy(to, low, 32);
    __builtin_memcpy(to + 32, high, 32);
}

// codes [bytes][64], tables [bytes][ROWS][64 bytes], factors [(bytes + 1) / 2][ROWS][2] -> sums [ROWS][64] by four;
// `soon` is what will be read next: as many bytes as codes
template <int ROWS>
void scan_block(const uint8_t* codes, int64_t bytes, const uint8_t* tables, const int32_t* factors, int32_t* sums,
                const uint8_t* soon) {
    for (int64_t j = 0; j < bytes; ++j) __builtin_prefetch(soon + j * 64);
    __builtin_memset(sums, 0, ROWS * 64 * sizeof(int32_t));
    for (int64_t j = 0; j < bytes; ++j) {
        for (int r = 0; r < ROWS; ++r) {
            const auto* low = reinterpret_cast<const int16_t*>(tables + (j * ROWS + r) * 64);
            const int32_t factor = factors[(j / 2 * ROWS + r) * 2];
            int32_t* row = sums + r * 64;
            for (int t = 0; t < 64; ++t) {
                const uint8_t byte = codes[j * 64 + t];
                row[t % 4 * 16 + t / 4] += (low[byte & 15] + low[16 + (byte >> 4)]) * factor;
            }
        }
    }
}

inline void put_weights(uint8_t* to, const I16 (&by_four)[4]) {
    int32_t numbers[64];
    __builtin_memcpy(numbers, by_four, sizeof numbers);
    auto* weights = reinterpret_cast<int16_t*>(to);
    for (int t = 0; t < 64; ++t) weights[t] = int16_t(numbers[t % 4 * 16 + t / 4]);
}

inline int level(const QjlPair& pair, int k, const uint8_t* codes, int t) {
    const int32_t source = pair.sources[k];
    return pair.tables[k][codes[source / 2 * (TILE * 64) + t] >> (source % 2 * 4) & 15];
}

// codes [bytes][TILE][64], weights [blocks][ROWS][128 bytes] -> sums [2][4]
template <int ROWS>
void add_pair(const QjlPair& pair, const uint8_t* codes, int64_t blocks, const uint8_t* weights,
              float* sums) {
    int64_t totals[8]{};
    for (int64_t b = 0; b < blocks; ++b, codes += 64) {
        const auto* of_rows = reinterpret_cast<const int16_t*>(weights + b * ROWS * 128);
        for (int t = 0; t < 64; ++t) {
            const int first = level(pair, 0, codes, t) + level(pair, 1, codes, t);
            const int second = level(pair, 2, codes, t) + level(pair, 3, codes, t);
            for (int r = 0; r < ROWS; ++r) {
                totals[r] += of_rows[r * 64 + t] * first;
                totals[4 + r] += of_rows[r * 64 + t] * second;
            }
        }
    }
    for (int i = 0; i < 8; ++i) sums[i] = float(totals[i]);
}

}  // namespace nibbles
