// Scalar quantizers (ScalarCode of src/qjl/codebook.py): nearest levels of coordinates at the best of a few gains.
//
// A level is found by comparisons with edges, from the middle one on. Bit d of its path tells whether x lay above the
// edge at depth d; the edges of depth d lie at tree[2^d + path so far], levels and patterns of bits at [path].

namespace encode {

constexpr int KIND_ENTRIES = 256;  // of every table of a kind
constexpr int KIND_WIDTHS = 9;     // a kind is a width of 0 to 8 bits, plus 9 where those lie in several nibbles

struct Levels {
    const float *tree, *levels, *patterns;
    int width;
};

inline Levels levels_of(const QjlPart& part, int64_t kind) {
    const int64_t first = kind * KIND_ENTRIES;
    return {part.tree + first, part.levels + first, part.patterns + first, static_cast<int>(kind % KIND_WIDTHS)};
}

struct Found {
    WideInts path;
    Wide level;
};

template <int WIDTH_OF_KIND, int DEPTH = 0>
inline Found find(const Levels& levels, Wide x, WideInts path = WideInts{}) {
    if constexpr (DEPTH == WIDTH_OF_KIND) {
        return {path, lookup<1 << DEPTH>(levels.levels, path)};
    } else {
        const Wide edge = lookup<1 << DEPTH>(levels.tree + (1 << DEPTH), path);
        return find<WIDTH_OF_KIND, DEPTH + 1>(levels, x, x > edge ? path + (1 << DEPTH) : path);
    }
}

// Calls `function` with the width as a constant.
template <class Function>
inline void with_width(int width, Function function) {
    switch (width) {
        case 0: return function(Constant<0>());
        case 1: return function(Constant<1>());
        case 2: return function(Constant<2>());
        case 3: return function(Constant<3>());
        case 4: return function(Constant<4>());
        case 5: return function(Constant<5>());
        case 6: return function(Constant<6>());
        case 7: return function(Constant<7>());
        default: return function(Constant<8>());
    }
}

// The search for gains

struct Gains {
    const float* values;
    int64_t count;
    const float* weights;  // of the coordinates; null where all count alike
};

// <z, z_hat> and |z_hat|^2 in the metric of the weights.
struct Sums {
    Wide inner[TILE] = {}, squared[TILE] = {};
};

struct Coordinates {
    int64_t first, last;
};

// From `first` on, those whose codes have one width.
inline Coordinates of_one_width(const QjlPart& part, const uint8_t* kinds, int64_t first) {
    int64_t last = first + 1;
    while (last < part.dim && kinds[last] % KIND_WIDTHS == kinds[first] % KIND_WIDTHS) ++last;
    return {first, last};
}

template <int WIDTH_OF_KIND>
inline Sums added(Sums sums, const QjlPart& part, const uint8_t* kinds, Coordinates coordinates, const float* weights,
                  const float* z, float gain) {
    for (int64_t i = coordinates.first; i < coordinates.last; ++i) {
        const Levels levels = levels_of(part, kinds[i]);
        const float weight = weights ? weights[i] : 1;
        for (int v = 0; v < TILE; ++v) {
            const Wide x = wide(z + i * BLOCK + v * WIDTH);
            const Wide level = find<WIDTH_OF_KIND>(levels, gain * x).level, weighted = weight * level;
            sums.inner[v] += weighted * x;
            sums.squared[v] += weighted * level;
        }
    }
    return sums;
}

// Cosine of the angle between z and what g z decodes to, up to the norm of z.
inline void cosines(const QjlPart& part, const uint8_t* kinds, const float* weights, const float* z, float gain,
                    float* found) {
    for (int64_t t = 0; t < BLOCK; t += TILE_TOKENS) {
        Sums sums;
        for (Coordinates run{0, 0}; run.last < part.dim;) {
            run = of_one_width(part, kinds, run.last);
            with_width(kinds[run.first] % KIND_WIDTHS, [&](auto width) {
                sums = added<width.VALUE>(sums, part, kinds, run, weights, z + t, gain);
            });
        }
        for (int v = 0; v < TILE; ++v) {
            const Wide norm = larger(square_root(sums.squared[v]), splat(1e-30f));
            store(found + t + v * WIDTH, sums.inner[v] / norm);
        }
    }
}

// The gain of each token whose code is at the least angle to it.
inline void choose_gains(const QjlPart& part, const uint8_t* kinds, const Gains& gains, const float* z,
                         float* chosen) {
    float best[BLOCK], cosine[BLOCK];
    over_row([&](int t) {
        store(chosen + t, splat(gains.values[0]));
        store(best + t, splat(-__builtin_inff()));
    });
    if (gains.count == 1) return;
    for (int64_t g = 0; g < gains.count; ++g) {
        cosines(part, kinds, gains.weights, z, gains.values[g], cosine);
        over_row([&](int t) {
            const WideInts is_better = wide(cosine + t) > wide(best + t);
            store(chosen + t, is_better ? splat(gains.values[g]) : wide(chosen + t));
            store(best + t, is_better ? wide(cosine + t) : wide(best + t));
        });
    }
}

// Codes

// Codes one row in place: what it decodes to, and the pattern of bits of each token.
inline void encode_row(const Levels& levels, const float* gains, float* z, uint8_t* bits) {
    with_width(levels.width, [&](auto width) {
        over_row([&](int t) {
            const Found found = find<width.VALUE>(levels, wide(z + t) * wide(gains + t));
            const auto pattern = (WideInts)lookup<1 << width.VALUE>(levels.patterns, found.path);
            store(z + t, found.level);
            store(bits + t, __builtin_convertvector(pattern, WideBytes));
        });
    });
}

// Each bit of a byte is some bit of some coordinate.
inline void gather_bits(const int16_t* coordinate, const int16_t* index, const uint8_t* bits, uint8_t* byte) {
    constexpr int BYTES = LANES < 4 ? 16 : 4 * LANES;
    typedef uint8_t Bytes __attribute__((vector_size(BYTES)));
    for (int t = 0; t < BLOCK; t += BYTES) {
        Bytes gathered{};
        for (int place = 0; place < 8; ++place) {
            const Bytes source = load<Bytes>(bits + coordinate[place] * BLOCK + t);
            const uint8_t from = 1 << index[place], to = 1 << place;  // named: GCC's UBSan takes a cast for an int
            gathered |= (Bytes)((source & from) != 0) & to;
        }
        store(byte + t, gathered);
    }
}

// Codes z, and puts what it decodes to in its place; `bits [dim, 64]` is room.
inline void encode_levels(const QjlPart& part, int64_t head, const Gains& gains, float* z, uint8_t* bits,
                          uint8_t* codes) {
    const uint8_t* kinds = part.kinds + head * part.kind_stride;
    float chosen[BLOCK];
    choose_gains(part, kinds, gains, z, chosen);
    for (int64_t i = 0; i < part.dim; ++i)
        encode_row(levels_of(part, kinds[i]), chosen, z + i * BLOCK, bits + i * BLOCK);
    const int64_t places = head * part.place_stride;
    for (int64_t j = 0; j < part.nibbles / 2; ++j)
        gather_bits(part.bit_coordinate + places + 8 * j, part.bit_index + places + 8 * j, bits, codes + j * BLOCK);
}

}  // namespace encode
