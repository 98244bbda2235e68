// pack, unpack, scan and expand (src/qjl/ops/__init__.py) on blocks of 64 tokens.
//
// For `scan` an instruction set gives `Floats`, LANES of them; the look-up of LANES nibbles at once in a `Table` of 16
// entries, by `Index`es; and how many rows and vectors of tokens to keep in registers.

namespace codes {

// Vectors

typedef uint8_t Bytes __attribute__((vector_size(16)));

template <int N, class Vector>
void transpose(Vector (&rows)[N]) {
    using Lanes = typename Count<N>::Up;
#pragma GCC unroll 8
    for (int stage = 1; stage < N; stage *= 2) {
        Vector turned[N];
#pragma GCC unroll 16
        for (int i = 0; i < N / 2; ++i) {
            turned[2 * i] = in_turn<0>(rows[i], rows[i + N / 2], Lanes());
            turned[2 * i + 1] = in_turn<N / 2>(rows[i], rows[i + N / 2], Lanes());
        }
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) rows[i] = turned[i];
    }
}

// Blocks

struct Place {
    int64_t batch, head, block;
};

inline Place place_of(const QjlCodes& codes, int64_t index) {
    const int64_t row = index / codes.blocks;
    return {row / codes.heads, row % codes.heads, index % codes.blocks};
}

inline uint8_t* block_at(const QjlCodes& codes, Place at) {
    return codes.data + at.batch * codes.batch_stride + at.head * codes.head_stride + at.block * codes.block_stride;
}

inline int64_t along(const int64_t (&stride)[3], Place at) {
    return at.batch * stride[0] + at.head * stride[1] + at.block * stride[2];
}

// Index of the first token of a block in an array [batch, heads, blocks * 64].
inline int64_t first_token(const QjlCodes& codes, Place at) {
    return ((at.batch * codes.heads + at.head) * codes.blocks + at.block) * BLOCK;
}

// pack and unpack: 16 tokens by 16 bytes at a time

constexpr int SIDE = 16;

inline Bytes joined_pairs(const uint8_t* nibbles) {
    const auto even = [](Bytes a, Bytes b) {
        return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    };
    const auto odd = [](Bytes a, Bytes b) {
        return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    };
    const Bytes first = load<Bytes>(nibbles), second = load<Bytes>(nibbles + SIDE);
    return even(first, second) | odd(first, second) << 4;
}

inline void pack_square(const uint8_t* nibbles, int64_t count, uint8_t* block) {
    Bytes rows[SIDE];
    for (int t = 0; t < SIDE; ++t) rows[t] = joined_pairs(nibbles + t * count);
    transpose(rows);
    for (int j = 0; j < SIDE; ++j) store(block + j * BLOCK, rows[j]);
}

inline void pack_byte(const uint8_t* nibbles, int64_t count, uint8_t* byte) {
    for (int t = 0; t < BLOCK; ++t) byte[t] = nibbles[t * count] | nibbles[t * count + 1] << 4;
}

inline void unpack_square(const uint8_t* block, uint8_t* nibbles, int64_t count) {
    Bytes rows[SIDE];
    for (int j = 0; j < SIDE; ++j) rows[j] = load<Bytes>(block + j * BLOCK);
    transpose(rows);
    for (int t = 0; t < SIDE; ++t) {
        const Bytes low = rows[t] & 15, high = rows[t] >> 4;
        store(nibbles + t * count, in_turn<0>(low, high, Count<SIDE>::Up()));
        store(nibbles + t * count + SIDE, in_turn<SIDE / 2>(low, high, Count<SIDE>::Up()));
    }
}

inline void unpack_byte(const uint8_t* byte, uint8_t* nibbles, int64_t count) {
    for (int t = 0; t < BLOCK; ++t) {
        nibbles[t * count] = byte[t] & 15;
        nibbles[t * count + 1] = byte[t] >> 4;
    }
}

void pack(const QjlPack& operation, Range range) {
    const QjlCodes& codes = operation.codes;
    const int64_t count = 2 * codes.bytes;
    for (int64_t index = range.first; index < range.last; ++index) {
        const Place at = place_of(codes, index);
        const uint8_t* nibbles = operation.nibbles + first_token(codes, at) * count;
        uint8_t* block = block_at(codes, at);
        int64_t j = 0;
        for (; j + SIDE <= codes.bytes; j += SIDE)
            for (int t = 0; t < BLOCK; t += SIDE)
                pack_square(nibbles + t * count + 2 * j, count, block + j * BLOCK + t);
        for (; j < codes.bytes; ++j) pack_byte(nibbles + 2 * j, count, block + j * BLOCK);
    }
}

void unpack(const QjlPack& operation, Range range) {
    const QjlCodes& codes = operation.codes;
    const int64_t count = 2 * codes.bytes;
    for (int64_t index = range.first; index < range.last; ++index) {
        const Place at = place_of(codes, index);
        uint8_t* nibbles = operation.nibbles + first_token(codes, at) * count;
        const uint8_t* block = block_at(codes, at);
        int64_t j = 0;
        for (; j + SIDE <= codes.bytes; j += SIDE)
            for (int t = 0; t < BLOCK; t += SIDE)
                unpack_square(block + j * BLOCK + t, nibbles + t * count + 2 * j, count);
        for (; j < codes.bytes; ++j) unpack_byte(block + j * BLOCK, nibbles + 2 * j, count);
    }
}

// scan

struct ScanRows {
    const float* tables;  // of the first row
    int64_t table_stride;
    float* scores;
    int64_t score_stride;
};

// ROWS query rows over VECTORS * LANES tokens.
template <int ROWS>
void scan_tile(const uint8_t* codes, int64_t bytes, const ScanRows& rows, int token) {
    Floats sums[ROWS][VECTORS] = {};
    for (int64_t j = 0; j < bytes; ++j) {
        Index low[VECTORS], high[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            low[v] = low_index(codes + j * BLOCK + token + v * LANES);
            high[v] = high_index(codes + j * BLOCK + token + v * LANES);
        }
        for (int r = 0; r < ROWS; ++r) {
            const float* entries = rows.tables + r * rows.table_stride + j * 32;
            const Table first = load_table(entries), second = load_table(entries + 16);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += lookup(first, low[v]) + lookup(second, high[v]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v)
            store(rows.scores + r * rows.score_stride + token + v * LANES, sums[r][v]);
}

template <int ROWS>
void scan_block(const uint8_t* codes, int64_t bytes, const ScanRows& rows) {
    for (int token = 0; token < BLOCK; token += VECTORS * LANES) scan_tile<ROWS>(codes, bytes, rows, token);
}

template <int ROWS>
void scan_last_rows(const uint8_t* codes, int64_t bytes, const ScanRows& rows, int64_t left) {
    if constexpr (ROWS > 0) {
        if (left == ROWS) return scan_block<ROWS>(codes, bytes, rows);
        scan_last_rows<ROWS - 1>(codes, bytes, rows, left);
    }
}

void scan(const QjlScan& operation, Range range) {
    const QjlCodes& codes = operation.codes;
    const int64_t table_stride = codes.bytes * 32, score_stride = codes.blocks * BLOCK;
    for (int64_t index = range.first; index < range.last; ++index) {
        const Place at = place_of(codes, index);
        const uint8_t* block = block_at(codes, at);
        const int64_t first_row = (at.batch * codes.heads + at.head) * operation.rows;
        ScanRows rows{operation.tables + first_row * table_stride, table_stride,
                      operation.scores + first_row * score_stride + at.block * BLOCK, score_stride};
        int64_t left = operation.rows;
        for (; left > SCAN_ROWS; left -= SCAN_ROWS) {
            scan_block<SCAN_ROWS>(block, codes.bytes, rows);
            rows.tables += SCAN_ROWS * table_stride;
            rows.scores += SCAN_ROWS * score_stride;
        }
        scan_last_rows<SCAN_ROWS>(block, codes.bytes, rows, left);
    }
}

// expand: entries are whole vectors already, so they are copied one by one

// WIDTH is the width of an entry, or 0 where it is known at run time alone.
template <int WIDTH>
void expand_block(const uint8_t* block, const QjlExpand& operation, const float* entries, float* expanded) {
    const int64_t width = WIDTH ? WIDTH : operation.width;
    const auto copy = [&](const float* from) {
        if constexpr (WIDTH) __builtin_memcpy(expanded, from, WIDTH * sizeof(float));
        else for (int64_t i = 0; i < width; ++i) expanded[i] = from[i];
        expanded += width;
    };
    for (int t = 0; t < BLOCK; ++t) {
        for (int64_t j = 0; j < operation.codes.bytes; ++j) {
            const uint8_t byte = block[j * BLOCK + t];
            const float* of_byte = entries + j * 32 * width;
            copy(of_byte + (byte & 15) * width);
            copy(of_byte + (16 + (byte >> 4)) * width);
        }
    }
}

auto expand_block_of(int64_t width) {
    switch (width) {
        case 1: return expand_block<1>;
        case 2: return expand_block<2>;
        case 3: return expand_block<3>;
        case 4: return expand_block<4>;
        case 8: return expand_block<8>;
        default: return expand_block<0>;
    }
}

void expand(const QjlExpand& operation, Range range) {
    const QjlCodes& codes = operation.codes;
    const auto expand_block = expand_block_of(operation.width);
    for (int64_t index = range.first; index < range.last; ++index) {
        const Place at = place_of(codes, index);
        expand_block(block_at(codes, at), operation, operation.entries + at.head * operation.head_stride,
                     operation.expanded + first_token(codes, at) * codes.bytes * 2 * operation.width);
    }
}

}  // namespace codes
