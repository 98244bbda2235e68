// decode (src/qjl/ops/__init__.py): one pass over each block of 64 tokens, from the codes to the tokens they stand for.

namespace decode {

using namespace encode;

struct Place {
    int64_t batch, head, block;
};

inline Place place_of(const QjlCodes& codes, int64_t index) {
    const int64_t row = index / codes.blocks;
    return {row / codes.heads, row % codes.heads, index % codes.blocks};
}

inline int64_t along(const int64_t (&stride)[3], Place at) {
    return at.batch * stride[0] + at.head * stride[1] + at.block * stride[2];
}

int64_t room_floats(const QjlDecode& operation) {
    return (operation.dim + (operation.map ? operation.head_dim : 0)) * BLOCK;
}

// Places of the 64 nibbles in a table, of one half of a byte.
struct Nibbles {
    Index indices[BLOCK / LANES];

    Nibbles(const uint8_t* bytes, Index (*index_of)(const uint8_t*)) {
        for (int64_t v = 0; v < BLOCK / LANES; ++v) indices[v] = index_of(bytes + v * LANES);
    }

    void add_entries(const float* entries, float* row) const {
        const Table table = load_table(entries);
        for (int64_t v = 0; v < BLOCK / LANES; ++v) {
            float* const to = row + v * LANES;
            store(to, load<Floats>(to) + lookup(table, indices[v]));
        }
    }
};

// Sums of entries by coordinate, for one group.
inline void add_codes(const QjlDecode& d, int64_t head, const uint8_t* codes, float* rows) {
    const int64_t bytes = d.codes.bytes / d.groups;
    int64_t place = d.code_stride * head * 2 * bytes * d.slots;
    for (int64_t j = 0; j < bytes; ++j, codes += BLOCK) {
        const Nibbles halves[2] = {{codes, low_index}, {codes, high_index}};
        for (const Nibbles& nibbles : halves)
            for (const int64_t last = place + d.slots; place < last; ++place)
                nibbles.add_entries(d.entries + place * 16, rows + d.coordinates[place] * BLOCK);
    }
}

inline void load_scales(const QjlDecode& d, Place at, int64_t group, float* scales) {
    const int64_t first = along(d.scale_stride, at) + group * BLOCK;
    if (!d.units) return widen(static_cast<const Half*>(d.scales) + first, BLOCK, scales);
    scales_of_logarithms(static_cast<const uint8_t*>(d.scales) + first, d.units[at.head], scales);
}

inline void scale_group(const QjlDecode& d, Place at, int64_t group, float* rows) {
    float scales[BLOCK], middles[BLOCK] = {};
    load_scales(d, at, group, scales);
    if (d.middles) widen(static_cast<const Half*>(d.middles) + along(d.middle_stride, at) + group * BLOCK, BLOCK, middles);
    for (int64_t i = 0; i < d.dim / d.groups; ++i)
        over_row([&](int t) {
            float* const x = rows + i * BLOCK + t;
            store(x, wide(x) * wide(scales + t) + wide(middles + t));
        });
}

// The mean, turned to each token's position.
inline void add_mean(const QjlDecode& d, Place at, float* rows) {
    if (!d.mean) return;
    const float* mean = d.mean + at.head * d.head_dim;
    const int64_t tokens = d.codes.blocks * BLOCK;
    for (int64_t i = 0; i < d.head_dim; ++i)
        over_row([&](int t) { store(rows + i * BLOCK + t, wide(rows + i * BLOCK + t) + mean[i]); });
    for (int64_t pair = 0; pair < d.pairs; ++pair) {
        const int64_t angle = (at.batch * d.pairs + pair) * tokens + at.block * BLOCK;
        const int32_t first = d.turns[pair], second = d.turns[d.pairs + pair];
        over_row([&](int t) {
            const Wide turned = wide(d.cos + angle + t) - 1, sin = wide(d.sin + angle + t);
            float *x = rows + first * BLOCK + t, *y = rows + second * BLOCK + t;
            store(x, wide(x) + (mean[first] * turned - mean[second] * sin));
            store(y, wide(y) + (mean[second] * turned + mean[first] * sin));
        });
    }
}

inline void decode_block(const QjlDecode& d, Place at, float* rows) {
    const int64_t bytes = d.codes.bytes / d.groups, width = d.dim / d.groups;
    const uint8_t* codes = d.codes.data + at.batch * d.codes.batch_stride + at.head * d.codes.head_stride +
                           at.block * d.codes.block_stride;
    zero(rows, d.dim * BLOCK);
    for (int64_t group = 0; group < d.groups; ++group) {
        float* const of_group = rows + group * width * BLOCK;
        add_codes(d, at.head, codes + group * bytes * BLOCK, of_group);
        scale_group(d, at, group, of_group);
    }
    if (d.map) {
        float* const mapped = rows + d.dim * BLOCK;
        zero(mapped, d.head_dim * BLOCK);
        multiply_add(d.map + at.head * d.map_stride, d.dim, d.head_dim, d.dim, rows, mapped);
        rows = mapped;
    }
    add_mean(d, at, rows);
    const int64_t first = ((at.batch * d.codes.heads + at.head) * d.codes.blocks + at.block) * BLOCK;
    store_tokens(rows, d.head_dim, d.head_dim, d.out + first * d.head_dim);
}

void decode(const QjlDecode& operation, Range range, float* room) {
    for (int64_t index = range.first; index < range.last; ++index)
        decode_block(operation, place_of(operation.codes, index), room);
}

}  // namespace decode
