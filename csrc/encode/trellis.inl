// Trellis codes: the best nibbles of each token by Viterbi's algorithm (src/qjl/trellis.py).
//
// With p the nibble before c, |z - own_c - next_p|^2 = |z|^2 + (|own_c|^2 - 2 z own_c) + (|next_p|^2 - 2 z next_p) +
// 2 own_c next_p, and only the last term needs the 256 pairs of states. The way back looks for each best predecessor
// again, which is cheaper than to keep them.
//
// The bits of floats that are not negative are in the order of the floats, and processors take more minima of integers
// than of floats. So costs are shifted, all states' alike: z of one group adds |z|^2, and the way to the next one
// 2 |z|^2 + 2 R^2 in advance, where R is the longest own: more than |z - own_c|^2, which has yet to come.

namespace encode {

constexpr int STATES = 16;

// Points of W coordinates each, with the factors that the search needs.
template <int W>
struct Trellis {
    float own[W][STATES], next[W][STATES];
    float own_squared[STATES] = {}, own_slope[W][STATES];    // |own|^2 - 2 z own
    float next_squared[STATES] = {}, next_slope[W][STATES];  // |next|^2 - 2 z next
    float cross[STATES][STATES] = {};                        // 2 own_c next_p at [p][c]
    float longest_squared = 0;

    explicit Trellis(const QjlPart& part) {
        for (int i = 0; i < W; ++i) {
            for (int c = 0; c < STATES; ++c) {
                own[i][c] = part.own[c * W + i];
                next[i][c] = part.next[c * W + i];
                own_squared[c] += own[i][c] * own[i][c];
                own_slope[i][c] = -2 * own[i][c];
                next_squared[c] += next[i][c] * next[i][c];
                next_slope[i][c] = -2 * next[i][c];
            }
            for (int p = 0; p < STATES; ++p)
                for (int c = 0; c < STATES; ++c) cross[p][c] += 2 * own[i][c] * next[i][p];
        }
        for (float squared : own_squared) longest_squared = squared > longest_squared ? squared : longest_squared;
    }
};

// What the states cost of TILE vectors of tokens.
using Costs = Wide[STATES][TILE];

inline Wide smaller_positive(Wide a, Wide b) {
    if constexpr (LANES == 1) return smaller(a, b);
    return (Wide)((WideInts)a < (WideInts)b ? (WideInts)a : (WideInts)b);
}

// The cheapest way to each state from those `before`.
template <int W>
inline void cheapest(const Trellis<W>& trellis, const Costs& before, Costs& costs) {
    constexpr int AT_ONCE = 4;
    for (int first = 0; first < STATES; first += AT_ONCE) {
        Wide least[AT_ONCE][TILE];
        for (int c = 0; c < AT_ONCE; ++c)
            for (int v = 0; v < TILE; ++v) least[c][v] = before[0][v] + trellis.cross[0][first + c];
        for (int p = 1; p < STATES; ++p)
            for (int c = 0; c < AT_ONCE; ++c)
                for (int v = 0; v < TILE; ++v)
                    least[c][v] = smaller_positive(least[c][v], before[p][v] + trellis.cross[p][first + c]);
        for (int c = 0; c < AT_ONCE; ++c)
            for (int v = 0; v < TILE; ++v) costs[first + c][v] = least[c][v];
    }
}

template <int W>
struct Group {
    Wide z[W][TILE], squared[TILE] = {};

    explicit Group(const float* rows) {
        for (int i = 0; i < W; ++i) {
            for (int v = 0; v < TILE; ++v) {
                z[i][v] = wide(rows + i * BLOCK + v * WIDTH);
                squared[v] += z[i][v] * z[i][v];
            }
        }
    }
};

// to = from + shift + constant of each state + W products
template <int W>
inline void add_products(const Costs& from, const Wide (&shift)[TILE], const float (&constants)[STATES],
                         const float (&slopes)[W][STATES], const Group<W>& group, Costs& to) {
    for (int c = 0; c < STATES; ++c) {
        Wide sums[TILE];
        for (int v = 0; v < TILE; ++v) sums[v] = from[c][v] + (shift[v] + constants[c]);
        for (int i = 0; i < W; ++i)
            for (int v = 0; v < TILE; ++v) sums[v] += slopes[i][c] * group.z[i][v];
        for (int v = 0; v < TILE; ++v) to[c][v] = sums[v];
    }
}

template <int W>
inline void forward(const Trellis<W>& trellis, const float* z, int64_t nibbles, Costs* before, Costs& costs) {
    const Wide unshifted[TILE] = {};
    Group<W> last(z);
    for (auto& cost : costs)
        for (int v = 0; v < TILE; ++v) cost[v] = 2 * trellis.longest_squared + 2 * last.squared[v];
    add_products(costs, unshifted, trellis.own_squared, trellis.own_slope, last, costs);
    for (int64_t j = 1; j < nibbles; ++j) {
        const Group<W> group(z + j * W * BLOCK);
        Wide shift[TILE];
        for (int v = 0; v < TILE; ++v) shift[v] = 2 * group.squared[v] - last.squared[v];
        add_products(costs, shift, trellis.next_squared, trellis.next_slope, group, before[j]);
        cheapest(trellis, before[j], costs);
        add_products(costs, unshifted, trellis.own_squared, trellis.own_slope, group, costs);
        last = group;
    }
}

inline WideInts cheapest_state(const Costs& costs, int v) {
    Wide least = costs[0][v];
    WideInts state{};
    for (int c = 1; c < STATES; ++c) {
        const WideInts is_less = costs[c][v] < least;
        least = is_less ? costs[c][v] : least;
        state = is_less ? filled<WideInts>(c) : state;
    }
    return state;
}

template <int W>
inline WideInts best_before(const Trellis<W>& trellis, const Costs& before, int v, const Wide (&own)[W]) {
    Wide least = splat(__builtin_inff());
    WideInts state{};
    for (int p = 0; p < STATES; ++p) {
        Wide cost = before[p][v];
        for (int i = 0; i < W; ++i) cost -= own[i] * trellis.next_slope[i][p];
        const WideInts is_less = cost < least;
        least = is_less ? cost : least;
        state = is_less ? filled<WideInts>(p) : state;
    }
    return state;
}

// From the last state back: nibbles [nibbles, 64], and what they decode to in place of z.
template <int W>
inline void backward(const Trellis<W>& trellis, const Costs* before, int v, WideInts state, int64_t nibbles, float* z,
                     uint8_t* chosen) {
    for (int64_t j = nibbles - 1; j >= 0; --j) {
        store(chosen + j * BLOCK, __builtin_convertvector(state, WideBytes));
        Wide decoded[W];
        for (int i = 0; i < W; ++i) decoded[i] = lookup<STATES>(trellis.own[i], state);
        if (j) {
            state = best_before(trellis, before[j], v, decoded);
            for (int i = 0; i < W; ++i) decoded[i] += lookup<STATES>(trellis.next[i], state);
        }
        for (int i = 0; i < W; ++i) store(z + (j * W + i) * BLOCK, decoded[i]);
    }
}

inline void join_nibbles(const uint8_t* nibbles, int64_t bytes, uint8_t* codes) {
    for (int64_t j = 0; j < bytes; ++j)
        for (int t = 0; t < BLOCK; ++t)
            codes[j * BLOCK + t] = nibbles[2 * j * BLOCK + t] | nibbles[(2 * j + 1) * BLOCK + t] << 4;
}

template <int W>
void encode_trellis(const QjlPart& part, float* z, Costs* before, uint8_t* nibbles, uint8_t* codes) {
    const Trellis<W> trellis(part);
    for (int t = 0; t < BLOCK; t += TILE * WIDTH) {
        Costs costs;
        forward(trellis, z + t, part.nibbles, before, costs);
        for (int v = 0; v < TILE; ++v)
            backward(trellis, before, v, cheapest_state(costs, v), part.nibbles, z + t + v * WIDTH,
                     nibbles + t + v * WIDTH);
    }
    join_nibbles(nibbles, part.nibbles / 2, codes);
}

}  // namespace encode
