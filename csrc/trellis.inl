// Trellis codes: the best nibbles of each token by Viterbi's algorithm (src/qjl/trellis.py).
//
// |z - own_c - next_p|^2 = |z|^2 + (|own_c|^2 - 2 z own_c) + (|next_p|^2 - 2 z next_p) + 2 own_c next_p, where p is the
// nibble before c: only the last term needs the 256 pairs of states. The way back looks for each best predecessor
// again, which is cheaper than to keep them.

namespace encode {

constexpr int STATES = 16;

// Points of W coordinates each, in the orders and multiples that the search needs.
template <int W>
struct Trellis {
    float own[W][STATES], next[W][STATES];
    float own_squared[STATES], next_squared[STATES];
    float cross[STATES][STATES];  // 2 own_c next_p at [p][c]

    explicit Trellis(const QjlPart& part) {
        for (int c = 0; c < STATES; ++c) {
            own_squared[c] = next_squared[c] = 0;
            for (int i = 0; i < W; ++i) {
                own[i][c] = part.own[c * W + i];
                next[i][c] = part.next[c * W + i];
                own_squared[c] += own[i][c] * own[i][c];
                next_squared[c] += next[i][c] * next[i][c];
            }
        }
        for (int p = 0; p < STATES; ++p) {
            for (int c = 0; c < STATES; ++c) {
                cross[p][c] = 0;
                for (int i = 0; i < W; ++i) cross[p][c] += 2 * own[i][c] * next[i][p];
            }
        }
    }
};

// What the states cost of TILE vectors of tokens; ``before`` in quarters. Four times a quarter is added by a
// multiply-add, which does not wait for the unit that takes minima as a plain addition would.
using Costs = Wide[STATES][TILE];

template <int W>
inline Wide distance(const float (&points)[W][STATES], const float (&squared)[STATES], int state, const float* z) {
    Wide sum = splat(squared[state]);
    for (int i = 0; i < W; ++i) sum -= 2 * points[i][state] * wide(z + i * BLOCK);
    return sum;
}

// The cheapest way to each state; `before` holds the cost of those they come from.
template <int W>
inline void cheapest(const Trellis<W>& trellis, const Costs& before, Costs& costs) {
    constexpr int AT_ONCE = 4;
    for (int first = 0; first < STATES; first += AT_ONCE) {
        Wide least[AT_ONCE][TILE];
        for (int c = 0; c < AT_ONCE; ++c)
            for (int v = 0; v < TILE; ++v) least[c][v] = 4 * before[0][v] + trellis.cross[0][first + c];
        for (int p = 1; p < STATES; ++p)
            for (int c = 0; c < AT_ONCE; ++c)
                for (int v = 0; v < TILE; ++v)
                    least[c][v] = smaller(least[c][v], 4 * before[p][v] + trellis.cross[p][first + c]);
        for (int c = 0; c < AT_ONCE; ++c)
            for (int v = 0; v < TILE; ++v) costs[first + c][v] = least[c][v];
    }
}

template <int W>
inline void forward(const Trellis<W>& trellis, const float* z, int64_t nibbles, Costs* before, Costs& costs) {
    for (auto& cost : costs)
        for (Wide& one : cost) one = Wide{};
    for (int64_t j = 0; j < nibbles; ++j) {
        const float* group = z + j * W * BLOCK;
        if (j) {
            for (int p = 0; p < STATES; ++p)
                for (int v = 0; v < TILE; ++v)
                    before[j][p][v] =
                        (costs[p][v] + distance(trellis.next, trellis.next_squared, p, group + v * WIDTH)) / 4;
            cheapest(trellis, before[j], costs);
        }
        for (int c = 0; c < STATES; ++c)
            for (int v = 0; v < TILE; ++v)
                costs[c][v] += distance(trellis.own, trellis.own_squared, c, group + v * WIDTH);
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
        for (int i = 0; i < W; ++i) cost += own[i] * (trellis.next[i][p] / 2);
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
