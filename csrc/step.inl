// The fused decode step over packed blocks: scores, online softmax, weighted sums, all on the codes.
//
// Scores: tables of 16-bit integers, one per nibble and query row, each group of four nibbles in units of its own.
// Values: 8-bit levels by nibble, summed with integer weights. An instruction set gives (nibbles_*.inl)
//   put_table, scan_block: sums of table entries over a block, for up to MAX_ROWS rows
//   put_weights, add_pair: weighted sums of two coordinates over the blocks of a tile
// Numbers of the 64 tokens of a block are kept "by four": token 4 i + c at place 16 c + i, as bytes of words come.

namespace step {

using namespace nibbles;

constexpr int RANK = 4;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST = -1e30f;

QJL_INLINE void arrange_by_four(const F16 (&tokens)[4], F16 (&by_four)[4]) {
    const F16 even[2] = {evens(tokens[0], tokens[1]), evens(tokens[2], tokens[3])};
    const F16 odd[2] = {odds(tokens[0], tokens[1]), odds(tokens[2], tokens[3])};
    by_four[0] = evens(even[0], even[1]), by_four[2] = odds(even[0], even[1]);
    by_four[1] = evens(odd[0], odd[1]), by_four[3] = odds(odd[0], odd[1]);
}

QJL_INLINE void store_in_order(float* tokens, const F16& a, const F16& b, const F16& c, const F16& d) {
    const auto even = in_turn(a, c), odd = in_turn(b, d);
    const auto first = in_turn(even.low, odd.low), last = in_turn(even.high, odd.high);
    store(tokens, first.low), store(tokens + 16, first.high), store(tokens + 32, last.low), store(tokens + 48, last.high);
}

template <class Floats>
QJL_INLINE auto round(const Floats& x) {
    using Integers = Vector<int32_t, sizeof(Floats) / 4>;
    const float magic = 12582912.0f;
    return as<Integers>(x + magic) - as<Integers>(magic - Floats{});
}

template <class Floats>
QJL_INLINE Floats exp2(Floats x) {
    x = larger(x, -126.0f - Floats{});
    const auto whole = round(x);
    const Floats part = x - converted<Floats>(whole);
    Floats power = 1.5403530e-4f - Floats{};
    power = power * part + 1.3333558e-3f;
    power = power * part + 9.6181291e-3f;
    power = power * part + 5.5504109e-2f;
    power = power * part + 2.4022651e-1f;
    power = power * part + 6.9314718e-1f;
    power = power * part + 1.0f;
    return as<Floats>(as<decltype(whole)>(power) + (whole << 23));
}

inline float exp2(float x) { return exp2(x - F4{})[0]; }

inline float dot(const float* a, const float* b, int64_t n) {
    F16 total{};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) total += load<F16>(a + i) * load<F16>(b + i);
    float rest = 0;
    for (; i < n; ++i) rest += a[i] * b[i];
    return sum(total) + rest;
}

// <x, r> for four rows r, `stride` apart.
inline F4 dots(const float* x, const float* rows, int64_t stride, int64_t n) {
    F16 a{}, b{}, c{}, d{};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const F16 at = load<F16>(x + i);
        a += at * load<F16>(rows + i);
        b += at * load<F16>(rows + stride + i);
        c += at * load<F16>(rows + 2 * stride + i);
        d += at * load<F16>(rows + 3 * stride + i);
    }
    F4 total = sums(a, b, c, d);
    for (; i < n; ++i) total += x[i] * F4{rows[i], rows[stride + i], rows[2 * stride + i], rows[3 * stride + i]};
    return total;
}

inline void add_scaled(float* to, const float* from, float factor, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(to + i, load<F16>(to + i) + factor * load<F16>(from + i));
    for (; i < n; ++i) to[i] += factor * from[i];
}

// Rows of numbers of one type, `stride` numbers apart.
struct Numbers {
    const void* data;
    int64_t stride, dtype;  // 0 float32, 1 bfloat16, 2 float16

    const uint16_t* halves(int64_t place) const { return static_cast<const uint16_t*>(data) + place; }

    F16 sixteen(int64_t row, int64_t i) const {
        const int64_t place = row * stride + i;
        if (dtype == 0) return load<F16>(static_cast<const float*>(data) + place);
        const H16 bits = load<H16>(halves(place));
        return dtype == 1 ? as<F16>(converted<U16>(bits) << 16) : floats_of_halves(bits);
    }

    float one(int64_t row, int64_t i) const {
        const int64_t place = row * stride + i;
        if (dtype == 0) return static_cast<const float*>(data)[place];
        if (dtype == 2) return float_of_half(*halves(place));
        const uint32_t bits = uint32_t(*halves(place)) << 16;
        float number;
        __builtin_memcpy(&number, &bits, 4);
        return number;
    }

    void copy(int64_t row, float* to, int64_t n) const {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) store(to + i, sixteen(row, i));
        for (; i < n; ++i) to[i] = one(row, i);
    }

    // to[r] += sum over rows of factors[r][row] * row, for four r, of which some may be the same.
    __attribute__((noinline)) void add_to(float* const (&to)[4], const float* const (&factors)[4], int64_t rows, int64_t n) const {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            F16 a = load<F16>(to[0] + i), b = load<F16>(to[1] + i), c = load<F16>(to[2] + i), d = load<F16>(to[3] + i);
            for (int64_t row = 0; row < rows; ++row) {
                const F16 x = sixteen(row, i);
                a += factors[0][row] * x, b += factors[1][row] * x, c += factors[2][row] * x, d += factors[3][row] * x;
                keep(a, b, c, d);
            }
            store(to[3] + i, d), store(to[2] + i, c), store(to[1] + i, b), store(to[0] + i, a);
        }
        for (; i < n; ++i) {
            F4 total = {to[0][i], to[1][i], to[2][i], to[3][i]};
            for (int64_t row = 0; row < rows; ++row) {
                total += one(row, i) * F4{factors[0][row], factors[1][row], factors[2][row], factors[3][row]};
            }
            for (int r = 3; r >= 0; --r) to[r][i] = total[r];
        }
    }
};

// Room that one worker and one piece of work need; the order of the members is the order in memory.
struct Room {
    uintptr_t at;

    template <class T>
    T* take(int64_t count) {
        T* here = reinterpret_cast<T*>(at);
        at += (count * sizeof(T) + 63) / 64 * 64;
        return here;
    }
};

// Slow frequencies are read four at a time, from any place on.
inline int64_t room_for_parts(int64_t pairs) { return (pairs + 4 + 15) / 16 * 16; }

// What up to MAX_ROWS query rows ask of the packed keys: prepared once, read by all splits.
struct Asked {
    uint8_t* tables;               // [nibbles / 2][rows][64 bytes] of integers
    int32_t* factors;              // [groups][quads][rows][2]
    float *units, *sums_of_groups; // [groups][rows]
    float* constants;              // [rows]: what of the mean adds to all scores alike
    float* turned;                 // [rows][real, imaginary][pairs]: what RoPE turns
    uintptr_t end;

    Asked(const QjlStep& s, Room room) {
        tables = room.take<uint8_t>(s.keys.nibbles / 2 * MAX_ROWS * 64);
        factors = room.take<int32_t>((s.keys.nibbles / 4 + s.keys.groups) * MAX_ROWS * 2);
        units = room.take<float>(s.keys.groups * MAX_ROWS);
        sums_of_groups = room.take<float>(s.keys.groups * MAX_ROWS);
        constants = room.take<float>(MAX_ROWS);
        turned = room.take<float>(s.turn ? MAX_ROWS * 2 * s.turn->pairs : 0);
        end = room.at;
    }
};

inline int64_t asked_bytes(const QjlStep& s) { return int64_t(Asked(s, {0}).end); }

struct Scratch {
    float *row, *queries, *mapped, *tables_of_floats, *bounds;
    float *scores, *scales, *products, *parts, *shared, *phasors_of_centre, *sums_of_pairs;
    double* phasors;
    uint8_t *weights, *codes, *nibbles;
    int32_t* sums;
    uintptr_t end;

    Scratch(const QjlStep& s, Room room) {
        const int64_t dim = larger_of(s.keys.head_dim, s.values.head_dim);
        const int64_t code_dim = larger_of(s.keys.code_dim, s.values.code_dim);
        row = room.take<float>(larger_of(dim, code_dim) + 16);
        queries = room.take<float>(MAX_ROWS * s.keys.head_dim);
        mapped = room.take<float>(MAX_ROWS * code_dim);
        tables_of_floats = room.take<float>(s.keys.nibbles * MAX_ROWS * 16);
        bounds = room.take<float>(s.keys.nibbles / 4 + 1);
        sums = room.take<int32_t>(MAX_ROWS * 64);
        scores = room.take<float>(MAX_ROWS * TILE * 64);
        scales = room.take<float>(TILE * 64);
        products = room.take<float>(MAX_ROWS * TILE * 64);
        weights = room.take<uint8_t>(TILE * MAX_ROWS * 128);
        codes = room.take<uint8_t>(s.values.nibbles / 2 * TILE * 64);
        nibbles = room.take<uint8_t>(s.values.nibbles);
        const int64_t pairs = s.turn ? s.turn->pairs : 0;
        phasors = room.take<double>(2 * pairs);
        phasors_of_centre = room.take<float>(2 * pairs);
        parts = room.take<float>(4 * room_for_parts(pairs));
        shared = room.take<float>(4 * RANK);
        sums_of_pairs = room.take<float>(s.values.pair_count * 8);
        end = room.at;
    }

    static int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
};

// What a split leaves for the merge: per row, [maximum, weight, code_dim sums]; the exact tokens leave head_dim sums.
inline int64_t split_floats(const QjlStep& s) { return s.rows * (2 + s.values.code_dim); }
inline int64_t exact_floats(const QjlStep& s) { return s.rows * (2 + s.values.head_dim); }

inline int64_t scratch_bytes(const QjlStep& s) { return int64_t(Scratch(s, {0}).end); }

// One batch row and KV head.
struct Head {
    const QjlStep& s;
    int64_t batch, head;

    const uint8_t* at(const uint8_t* data, const int64_t (&stride)[3], int64_t block) const {
        return data + batch * stride[0] + head * stride[1] + block * stride[2];
    }
    const float* query(int64_t row) const {
        return s.query + ((batch * s.heads + head) * s.rows + row) * s.keys.head_dim;
    }
    int64_t group() const { return s.rows / s.queries; }
    const float* bias(const float* data, const int64_t (&stride)[4], int64_t row) const {
        const int64_t query_head = head * group() + row / s.queries;
        return data + batch * stride[0] + query_head * stride[1] + row % s.queries * stride[2];
    }
};

// Maps

inline Numbers map_of(const QjlSide& side, int64_t head) {
    const int64_t bytes = head * side.map_stride * (side.map_is_half ? 2 : 4);
    return {static_cast<const uint8_t*>(side.map) + bytes, side.head_dim, side.map_is_half ? 2 : 0};
}

// Scores

// Fills in what rows ask. Scores are linear in the queries, so `factor` scales them once for all.
struct Question {
    const Head& h;
    const QjlSide& side;
    Scratch& room;
    const Asked& asked;
    int64_t rows;

    void ask(int64_t first_row, float factor) {
        __builtin_memset(room.queries, 0, MAX_ROWS * side.head_dim * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) {
            add_scaled(room.queries + r * side.head_dim, h.query(first_row + r), factor, side.head_dim);
        }
        map_queries();
        fill_tables();
        quantize_tables();
        meet_mean();
    }

    const float* query(int64_t r) const { return room.queries + r * side.head_dim; }

    __attribute__((noinline)) void map_queries() {
        if (!side.map) return void(__builtin_memcpy(room.mapped, room.queries, MAX_ROWS * side.code_dim * sizeof(float)));
        const Numbers map = map_of(side, h.head);
        for (int64_t i = 0; i < side.code_dim; ++i) {
            map.copy(i, room.row, side.head_dim);
            const F4 mapped = dots(room.row, room.queries, side.head_dim, side.head_dim);
            for (int64_t r = 0; r < MAX_ROWS; ++r) room.mapped[r * side.code_dim + i] = mapped[r];
        }
    }

    __attribute__((noinline)) void fill_tables() {
        const int64_t group_dim = side.code_dim / side.groups, group_nibbles = side.nibbles / side.groups;
        const int64_t code = side.code_stride * h.head * group_nibbles * side.slots;
        for (int64_t j = 0; j < side.nibbles; ++j) {
            const int64_t within = code + j % group_nibbles * side.slots;  // all groups have the same code
            const float* mapped = room.mapped + j / group_nibbles * group_dim;
            F16 table[MAX_ROWS]{};
            for (int64_t i = 0; i < side.slots; ++i) {
                const F16 entries = floats_of_halves(load<H16>(side.entries + (within + i) * 16));
                const float* of_rows = mapped + side.coordinates[within + i];
                for (int64_t r = 0; r < rows; ++r) table[r] += of_rows[r * side.code_dim] * entries;
            }
            for (int64_t r = 0; r < rows; ++r) store(room.tables_of_floats + (j * rows + r) * 16, table[r]);
        }
        for (int64_t g = 0; side.middle && g < side.groups; ++g) {
            for (int64_t r = 0; r < rows; ++r) {
                float total = 0;
                for (int64_t i = 0; i < group_dim; ++i) total += room.mapped[r * side.code_dim + g * group_dim + i];
                asked.sums_of_groups[g * rows + r] = total;
            }
        }
    }

    const float* floats(int64_t j, int64_t r) const { return room.tables_of_floats + (j * rows + r) * 16; }

    // Four nibbles share a unit in which their sums fit 16 bits; units are integer multiples of the group's least.
    __attribute__((noinline)) void quantize_tables() {
        const int64_t group_nibbles = side.nibbles / side.groups, quads = (group_nibbles + 3) / 4;
        for (int64_t g = 0; g < side.groups; ++g) {
            int32_t* factors = asked.factors + g * quads * rows * 2;
            for (int64_t r = 0; r < rows; ++r) {
                const float unit = choose_units(g * group_nibbles, group_nibbles, r, factors);
                asked.units[g * rows + r] = unit;
                for (int64_t j = 0; j < group_nibbles; j += 2) {
                    const float inverse = 1 / (unit * float(factors[(j / 4 * rows + r) * 2]));
                    put(g * group_nibbles + j, r, inverse);
                }
            }
        }
    }

    float choose_units(int64_t first, int64_t count, int64_t r, int32_t* factors) const {
        float total = 0;
        for (int64_t quad = 0; quad * 4 < count; ++quad) {
            float bound = 1e-30f;
            for (int64_t j = quad * 4; j < quad * 4 + 4 && j < count; ++j) {
                const F16 table = load<F16>(floats(first + j, r));
                bound += largest(larger(table, -table));
            }
            room.bounds[quad] = bound;
            total += bound;
        }
        const float unit = total * 0x1p-29f;
        for (int64_t quad = 0; quad * 4 < count; ++quad) {
            const int32_t factor = int32_t(room.bounds[quad] / (unit * 32760.0f)) + 1;
            factors[(quad * rows + r) * 2] = factor;
            factors[(quad * rows + r) * 2 + 1] = factor << 16;
        }
        return unit;
    }

    void put(int64_t j, int64_t r, float inverse) {
        int16_t entries[2][16];
        for (int64_t k = 0; k < 2; ++k) {
            store(entries[k], converted<S16>(round(load<F16>(floats(j + k, r)) * inverse)));
        }
        put_table(asked.tables + (j / 2 * rows + r) * 64, entries[0], entries[1]);
    }

    void meet_mean() {
        const float* mean = side.mean ? side.mean + h.head * side.head_dim : nullptr;
        for (int64_t r = 0; r < rows; ++r) {
            asked.constants[r] = mean ? dot(query(r), mean, side.head_dim) : 0;
            if (h.s.turn) asked.constants[r] -= turn_apart(*h.s.turn, query(r), mean, asked.turned + r * 2 * h.s.turn->pairs);
        }
    }

    // The part of <query, mean> that RoPE turns, which is left by pairs.
    static float turn_apart(const QjlTurn& t, const float* query, const float* mean, float* real) {
        const int32_t *first = t.coordinates, *second = t.coordinates + t.pairs;
        float* imaginary = real + t.pairs;
        float total = 0;
        for (int64_t f = 0; f < t.pairs; ++f) {
            const float q1 = query[first[f]], q2 = query[second[f]], m1 = mean[first[f]], m2 = mean[second[f]];
            real[f] = (q1 * m1 + q2 * m2) * t.scaling;
            imaginary[f] = (q2 * m1 - q1 * m2) * t.scaling;
            total += q1 * m1 + q2 * m2;
        }
        return total;
    }
};

// Scores by the tables.
struct Keys {
    const Head& h;
    const QjlSide& side;
    Scratch& room;
    const Asked& asked;
    int64_t rows;

    // Scores of one block, rows `stride` apart.
    __attribute__((noinline)) void score(int64_t block, float* scores, int64_t stride) const {
        const uint8_t* codes = h.at(side.codes, side.codes_stride, block);
        const int64_t bytes = side.nibbles / side.groups / 2;
        const uint8_t* scale = h.at(side.scale, side.scale_stride, block);
        const uint8_t* middle = side.middle ? h.at(side.middle, side.middle_stride, block) : nullptr;
        const uint8_t* soon = h.at(h.s.values.codes, h.s.values.codes_stride, block);
        for (int64_t g = 0; g < side.groups; ++g) {
            scan(codes + g * bytes * 64, bytes, asked.tables + g * bytes * rows * 64,
                 asked.factors + g * ((bytes + 1) / 2) * rows * 2, soon + g * bytes * 64);
            F16 scales[4], middles[4]{};
            decode_scales(side, h.head, scale, g, scales);
            if (middle) decode_halves(middle + g * 128, middles);
            for (int64_t r = 0; r < rows; ++r) {
                const float unit = asked.units[g * rows + r];
                for (int c = 0; c < 4; ++c) {
                    F16 part = converted<F16>(load<I16>(room.sums + r * 64 + c * 16)) * (scales[c] * unit);
                    if (middle) part += middles[c] * asked.sums_of_groups[g * rows + r];
                    float* to = scores + r * stride + c * 16;
                    store(to, g ? load<F16>(to) + part : part + asked.constants[r]);
                }
            }
        }
    }

    void scan(const uint8_t* codes, int64_t bytes, const uint8_t* tables, const int32_t* factors,
              const uint8_t* soon) const {
        switch (rows) {
            case 1: return scan_block<1>(codes, bytes, tables, factors, room.sums, soon);
            case 2: return scan_block<2>(codes, bytes, tables, factors, room.sums, soon);
            case 3: return scan_block<3>(codes, bytes, tables, factors, room.sums, soon);
            default: return scan_block<4>(codes, bytes, tables, factors, room.sums, soon);
        }
    }

    static void decode_halves(const uint8_t* halves, F16 (&by_four)[4]) {
        F16 tokens[4];
        for (int i = 0; i < 4; ++i) tokens[i] = floats_of_halves(load<H16>(halves + 32 * i));
        arrange_by_four(tokens, by_four);
    }

    static void decode_scales(const QjlSide& side, int64_t head, const uint8_t* scale, int64_t g, F16 (&by_four)[4]) {
        if (!side.unit) return decode_halves(scale + g * 128, by_four);
        const I16 words = load<I16>(scale + g * 64);
        const float unit = side.unit[head];
        for (int c = 0; c < 4; ++c) {
            const I16 codes = (words >> (8 * c)) & 255;
            const F16 octaves = (converted<F16>(codes) - 128.0f) * (1.0f / 12);
            by_four[c] = where_any(codes, exp2(octaves) * unit);
        }
    }
};

// The mean that RoPE turns

struct Turn {
    const QjlTurn t;
    const Head& h;
    Scratch& room;
    const Asked& asked;
    int64_t rows;
    static constexpr int64_t SPAN = 2 * 64, ANCHOR = 8;
    int64_t next = -1, anchored = -1, turns = 0;

    Turn(const Head& h, Scratch& room, const Asked& asked, int64_t rows)
        : t(h.s.turn ? *h.s.turn : QjlTurn{}), h(h), room(room), asked(asked), rows(rows) {}

    const float* of_row(int64_t r) const { return asked.turned + r * 2 * t.pairs; }

    // Adds to the scores of a tile, [rows][TILE][64], two blocks at a time where they follow one another.
    void add(int64_t first_block, int64_t blocks, float* scores) {
        if (!t.pairs) return;
        const int64_t* first = h.s.first + h.batch * h.s.blocks + first_block;
        for (int64_t b = 0, spanned; b < blocks; b += spanned) {
            spanned = b + 1 < blocks && first[b + 1] == first[b] + 64 ? 2 : 1;
            stand_at(first[b]);
            int64_t r = 0;
            for (; r + 2 <= rows; r += 2) add_rows<2>(r, scores + (r * TILE + b) * 64, spanned);
            if (r < rows) add_rows<1>(r, scores + (r * TILE + b) * 64, spanned);
        }
    }

    // Phasors of the centre of the two blocks: turned on from the last ones in float32, and at every ANCHOR-th time in
    // double precision.
    void stand_at(int64_t position) {
        if (position == next && turns < ANCHOR) {
            turn_on(room.phasors_of_centre, t.step);
            ++turns;
        } else {
            anchor(position);
            turns = 1;
        }
        next = position + SPAN;
    }

    template <class Number>
    __attribute__((noinline)) void turn_on(Number* __restrict cosine, const Number* step_cosine) const {
        Number* __restrict sine = cosine + t.pairs;
        const Number* step_sine = step_cosine + t.pairs;
        for (int64_t f = 0; f < t.pairs; ++f) {
            const Number c = cosine[f], s = sine[f];
            cosine[f] = c * step_cosine[f] - s * step_sine[f];
            sine[f] = s * step_cosine[f] + c * step_sine[f];
        }
    }

    __attribute__((noinline)) void anchor(int64_t position) {
        double *cosine = room.phasors, *sine = cosine + t.pairs;
        float *centre_cosine = room.phasors_of_centre, *centre_sine = centre_cosine + t.pairs;
        if (position == anchored + ANCHOR * SPAN) {
            turn_on(room.phasors, t.anchor_step);
        } else {
            for (int64_t f = 0; f < t.pairs; ++f) {
                const double angle = (position + (SPAN - 1) / 2.0) * t.inv_freq[f];
                cosine[f] = __builtin_cos(angle), sine[f] = __builtin_sin(angle);
            }
        }
        for (int64_t f = 0; f < t.pairs; ++f) centre_cosine[f] = float(cosine[f]), centre_sine[f] = float(sine[f]);
        anchored = position;
    }

    // Parts that are even and odd about the centre: of each frequency, then of the functions that slow ones share.
    template <int ROWS>
    void add_rows(int64_t first, float* scores, int64_t blocks) const {
        for (int i = 0; i < ROWS; ++i) turn_row(of_row(first + i), even_of(i), odd_of(i));
        join_slow<ROWS>();
        add_parts<ROWS>(scores, blocks);
    }

    float* even_of(int row) const { return room.parts + 2 * row * room_for_parts(t.pairs); }
    float* odd_of(int row) const { return even_of(row) + room_for_parts(t.pairs); }

    __attribute__((noinline)) void turn_row(const float* row, float* __restrict even, float* __restrict odd) const {
        const float *cosine = room.phasors_of_centre, *sine = cosine + t.pairs;
        const float *real = row, *imaginary = row + t.pairs;
        for (int64_t f = 0; f < t.pairs; ++f) {
            even[f] = real[f] * cosine[f] + imaginary[f] * sine[f];
            odd[f] = imaginary[f] * cosine[f] - real[f] * sine[f];
        }
        for (int64_t f = t.pairs; f < t.pairs + 4; ++f) even[f] = odd[f] = 0;
    }

    // Four slow frequencies at a time.
    template <int ROWS>
    __attribute__((noinline)) void join_slow() const {
        constexpr int LANES = sizeof(Native) / sizeof(float);
        alignas(64) float parts[4][4 * RANK]{};
        const float *even = even_of(0), *odd = odd_of(0), *other_even = even_of(ROWS - 1), *other_odd = odd_of(ROWS - 1);
        for (int i = 0; i < 4 * RANK; i += LANES) {
            Native a{}, b{}, c{}, d{};
            const float* table = t.down + i;
            for (int64_t f = t.direct; f < t.pairs; f += 4, table += 8 * RANK) {
                const Native cosines = load<Native>(table), sines = load<Native>(table + 4 * RANK);
                a += repeated(even + f) * cosines, b += repeated(odd + f) * sines;
                if constexpr (ROWS > 1) c += repeated(other_even + f) * cosines, d += repeated(other_odd + f) * sines;
                keep(a, b, c, d);
            }
            store(parts[0] + i, a), store(parts[1] + i, b), store(parts[2] + i, c), store(parts[3] + i, d);
        }
        for (int k = 0; k < RANK; ++k) {
            const auto of = [&](int i) { return load<F4>(parts[i] + 4 * k); };
            store(room.shared + 4 * k, sums(of(0), of(1), of(2), of(3)));
        }
    }

    template <int ROWS>
    __attribute__((noinline)) void add_parts(float* scores, int64_t blocks) const {
        constexpr int LANES = sizeof(Native) / sizeof(float);
        alignas(64) float even[ROWS][64], odd[ROWS][64];
        for (int step = 0; step < 64; step += 2 * LANES) {
            Parts first, second;
            const float *table = t.up + step, *of_function = room.shared;
            for (int64_t f = 0; f < t.direct; ++f, table += 128) {
                add_steps<ROWS>(first, second, table, even_of(0)[f], odd_of(0)[f], even_of(ROWS - 1)[f], odd_of(ROWS - 1)[f]);
            }
            for (int k = 0; k < RANK; ++k, table += 128, of_function += 4) {
                add_steps<ROWS>(first, second, table, of_function[0], of_function[1], of_function[2], of_function[3]);
            }
            first.leave(even[0] + step, odd[0] + step);
            if constexpr (ROWS > 1) second.leave(even[1] + step, odd[1] + step);
        }
        for (int i = 0; i < ROWS; ++i) add_mirrored(even[i], odd[i], scores + i * TILE * 64, blocks);
    }

    struct Parts {
        Native even{}, next_even{}, odd{}, next_odd{};

        inline __attribute__((always_inline)) void add(float even_part, float odd_part, Native cosine,
                                                       Native next_cosine, Native sine, Native next_sine) {
            even += even_part * cosine, next_even += even_part * next_cosine;
            odd += odd_part * sine, next_odd += odd_part * next_sine;
            keep(even, next_even, odd, next_odd);
        }

        void leave(float* evens, float* odds) const {
            store(evens, even), store(evens + sizeof(Native) / 4, next_even);
            store(odds, odd), store(odds + sizeof(Native) / 4, next_odd);
        }
    };

    template <int ROWS>
    static inline __attribute__((always_inline)) void add_steps(Parts& first, Parts& second, const float* table,
                                                                float even, float odd, float other_even,
                                                                float other_odd) {
        constexpr int LANES = sizeof(Native) / sizeof(float);
        Native cosine = load<Native>(table), next_cosine = load<Native>(table + LANES);
        Native sine = load<Native>(table + 64), next_sine = load<Native>(table + 64 + LANES);
        keep(cosine, next_cosine, sine, next_sine);
        first.add(even, odd, cosine, next_cosine, sine, next_sine);
        if constexpr (ROWS > 1) second.add(other_even, other_odd, cosine, next_cosine, sine, next_sine);
    }

    // Steps away from the centre come as tokens do after it, by four.
    static void add_mirrored(const float* even, const float* odd, float* scores, int64_t blocks) {
        for (int c = 0; c < 64; c += 16) {
            const F16 evens = load<F16>(even + c), odds = load<F16>(odd + c);
            float *before = scores + 48 - c, *behind = scores + 64 + c;
            store(before, load<F16>(before) + reversed(evens - odds));
            if (blocks > 1) store(behind, load<F16>(behind) + (evens + odds));
        }
    }
};

// Values

// Weighted sums over the tokens seen so far, in the space of the codes, for up to MAX_ROWS rows.
struct Sums {
    const Head& h;
    const QjlSide& side;
    Scratch& room;
    static constexpr float TOLERANCE = 6e-5f;
    static constexpr int MOST_TAKEN_OUT = 6;
    int64_t first_row, rows;
    float* of_pairs;  // [pair_count][2][4]
    float maximum[MAX_ROWS], weight[MAX_ROWS];

    Sums(const Head& h, Scratch& room, int64_t first_row, int64_t rows)
        : h(h), side(h.s.values), room(room), first_row(first_row), rows(rows),
          of_pairs(room.sums_of_pairs) {
        __builtin_memset(of_pairs, 0, side.pair_count * 8 * sizeof(float));
        for (int64_t r = 0; r < MAX_ROWS; ++r) maximum[r] = LOWEST, weight[r] = 0;
    }

    // Turns base-2 scores of a tile [rows][TILE][64] into softmax weights, in place.
    __attribute__((noinline)) void weigh(float* scores, int64_t blocks) {
        float decay[8];
        bool moved = false;
        for (int64_t r = 0; r < 4; ++r) decay[r] = decay[4 + r] = 1;
        for (int64_t r = 0; r < rows; ++r) {
            float* row = scores + r * TILE * 64;
            F16 most = load<F16>(row);
            for (int64_t i = 1; i < blocks * 4; ++i) most = larger(most, load<F16>(row + 16 * i));
            const float tile_maximum = largest(most);
            const float updated = tile_maximum > maximum[r] ? tile_maximum : maximum[r];
            decay[r] = decay[4 + r] = exp2(maximum[r] - updated);
            moved |= updated != maximum[r];
            maximum[r] = updated;
            F16 total{};
            for (int64_t i = 0; i < blocks * 4; ++i) {
                const F16 power = exp2(load<F16>(row + 16 * i) - updated);
                store(row + 16 * i, power);
                total += power;
            }
            weight[r] = weight[r] * decay[r] + sum(total);
        }
        if (moved) scale_sums(decay);
    }

    void scale_sums(const float (&decay)[8]) {
        const F8 factors = load<F8>(decay);
        for (int64_t k = 0; k < side.pair_count; ++k) store(of_pairs + 8 * k, load<F8>(of_pairs + 8 * k) * factors);
        for (int64_t i = 0; i < side.groups * MAX_ROWS; ++i) {
            middles[i] *= decay[i % MAX_ROWS];
            energy[i] *= decay[i % MAX_ROWS] * decay[i % MAX_ROWS];
        }
    }

    void add(float* scores, int64_t first_block, int64_t blocks) {
        weigh(scores, blocks);
        gather_codes(first_block, blocks);
        int64_t pair = 0;
        for (int64_t g = 0; g < side.groups; ++g) {
            int64_t last = pair;
            while (last < side.pair_count && side.pairs[last].group == g) ++last;
            float bound[MAX_ROWS], unit[8];
            multiply(scores, first_block, blocks, g, bound);
            bool is_twofold = false;
            for (int64_t r = 0; r < rows; ++r) {
                for (int i = 0; i < MOST_TAKEN_OUT && is_coarse(bound[r], blocks, g, r); ++i) {
                    take_out_largest(pair, last, blocks, r, bound[r]);
                }
                is_twofold |= is_coarse(bound[r], blocks, g, r);
            }
            quantize(bound, blocks, is_twofold, unit);
            add_pairs(pair, last, blocks, unit);
            if (is_twofold) {
                for (int64_t r = 0; r < rows; ++r) bound[r] = unit[r] * 1.001f;
                quantize(bound, blocks, false, unit);
                add_pairs(pair, last, blocks, unit);
            }
            if (side.middle) add_middles(scores, first_block, blocks, g);
            pair = last;
        }
    }

    void add_pairs(int64_t first, int64_t last, int64_t blocks, const float (&unit)[8]) {
        for (int64_t k = first; k < last; ++k) add_to(of_pairs + 8 * k, side.pairs[k], blocks, load<F8>(unit));
    }

    // The tile's codes, byte by byte: what a pair reads then lies together.
    __attribute__((noinline)) void gather_codes(int64_t first_block, int64_t blocks) {
        for (int64_t b = 0; b < blocks; ++b) {
            const uint8_t* codes = h.at(side.codes, side.codes_stride, first_block + b);
            for (int64_t j = 0; j < side.nibbles / 2; ++j) {
                store(room.codes + (j * TILE + b) * 64, load<I16>(codes + j * 64));
            }
        }
    }

    // Weights times the scales of the tokens; the largest of each row.
    __attribute__((noinline)) void multiply(const float* scores, int64_t first_block, int64_t blocks, int64_t g,
                                            float (&largest_product)[MAX_ROWS]) {
        for (int64_t b = 0; b < blocks; ++b) {
            F16 scales[4];
            Keys::decode_scales(side, h.head, h.at(side.scale, side.scale_stride, first_block + b), g, scales);
            for (int c = 0; c < 4; ++c) store(room.scales + b * 64 + c * 16, scales[c]);
        }
        for (int64_t r = 0; r < rows; ++r) {
            F16 most{}, squares{};
            for (int64_t i = 0; i < blocks * 64; i += 16) {
                const F16 product = load<F16>(scores + r * TILE * 64 + i) * load<F16>(room.scales + i);
                store(room.products + r * TILE * 64 + i, product);
                most = larger(most, product);
                squares += product * product;
            }
            largest_product[r] = largest(most);
            energy[g * MAX_ROWS + r] += sum(squares);
        }
    }

    // Whether rounding to integers would show in the result: one unit's error is uniform, and errors add as noise does.
    bool is_coarse(float bound, int64_t blocks, int64_t g, int64_t r) const {
        const float unit = bound / WEIGHT_TOP, tokens = float(blocks * 64);
        return unit * unit * tokens / 12 > TOLERANCE * TOLERANCE * energy[g * MAX_ROWS + r];
    }

    // A few tokens that outweigh all others are added exactly, so that units become fine enough for the rest.
    __attribute__((noinline)) void take_out_largest(int64_t first_pair, int64_t last_pair, int64_t blocks, int64_t r,
                                                    float& bound) {
        float* products = room.products + r * TILE * 64;
        int64_t place = 0;
        while (largest_of(products + place, 64) != bound) place += 64;
        while (products[place] != bound) ++place;
        unpack_token(place / 64, place % 16 * 4 + place / 16 % 4);
        for (int64_t k = first_pair; k < last_pair; ++k) {
            const QjlPair& pair = side.pairs[k];
            const auto level = [&](int i) { return int(pair.tables[i][room.nibbles[pair.sources[i]]]); };
            const float unit = bound * pair.step;
            of_pairs[8 * k + r] += unit * float(level(0) + level(1));
            of_pairs[8 * k + 4 + r] += unit * float(level(2) + level(3));
        }
        products[place] = 0;
        bound = largest_of(products, blocks * 64);
    }

    static float largest_of(const float* numbers, int64_t count) {
        F16 most{};
        for (int64_t i = 0; i < count; i += 16) most = larger(most, load<F16>(numbers + i));
        return largest(most);
    }

    void unpack_token(int64_t block, int64_t token) {
        for (int64_t j = 0; j < side.nibbles / 2; ++j) {
            const uint8_t byte = room.codes[(j * TILE + block) * 64 + token];
            room.nibbles[2 * j] = byte & 15, room.nibbles[2 * j + 1] = byte >> 4;
        }
    }

    // Integers from products, which become what is left over if they are rounded down; `unit` is what 1 stands for.
    __attribute__((noinline)) void quantize(const float (&bound)[MAX_ROWS], int64_t blocks, bool is_rounded_down,
                                            float (&unit)[8]) {
        for (int64_t r = 0; r < 4; ++r) unit[r] = unit[4 + r] = 0;
        const float shift = is_rounded_down ? -0.5f : 0;
        for (int64_t r = 0; r < rows; ++r) {
            if (!(bound[r] > 1e-30f)) {
                for (int64_t b = 0; b < blocks; ++b) __builtin_memset(room.weights + (b * rows + r) * 128, 0, 128);
                continue;
            }
            unit[r] = unit[4 + r] = bound[r] / WEIGHT_TOP;
            const float inverse = WEIGHT_TOP / bound[r];
            for (int64_t b = 0; b < blocks; ++b) {
                float* products = room.products + (r * TILE + b) * 64;
                I16 weights[4];
                for (int c = 0; c < 4; ++c) {
                    const F16 product = load<F16>(products + c * 16);
                    weights[c] = round(product * inverse + shift);
                    if (is_rounded_down) {
                        weights[c] = larger(weights[c], I16{});
                        store(products + c * 16, larger(product - converted<F16>(weights[c]) * unit[r], F16{}));
                    }
                }
                put_weights(room.weights + (b * rows + r) * 128, weights);
            }
        }
    }

    void add_to(float* sums, const QjlPair& pair, int64_t blocks, F8 unit) {
        float added[8];
        switch (rows) {
            case 1: add_pair<1>(pair, room.codes, blocks, room.weights, added); break;
            case 2: add_pair<2>(pair, room.codes, blocks, room.weights, added); break;
            case 3: add_pair<3>(pair, room.codes, blocks, room.weights, added); break;
            default: add_pair<4>(pair, room.codes, blocks, room.weights, added); break;
        }
        store(sums, load<F8>(sums) + load<F8>(added) * (unit * pair.step));
    }

    void add_middles(const float* scores, int64_t first_block, int64_t blocks, int64_t g) {
        for (int64_t b = 0; b < blocks; ++b) {
            F16 by_four[4];
            Keys::decode_halves(h.at(side.middle, side.middle_stride, first_block + b) + g * 128, by_four);
            for (int64_t r = 0; r < rows; ++r) {
                F16 total{};
                for (int c = 0; c < 4; ++c) total += by_four[c] * load<F16>(scores + (r * TILE + b) * 64 + c * 16);
                middles[g * MAX_ROWS + r] += sum(total);
            }
        }
    }

    // [maximum, weight, sums of all coordinates] of each row
    __attribute__((noinline)) void leave(float* partial) const {
        const int64_t group_dim = side.code_dim / side.groups;
        for (int64_t r = 0; r < rows; ++r) {
            float* row = partial + (first_row + r) * (2 + side.code_dim);
            row[0] = maximum[r], row[1] = weight[r];
            for (int64_t i = 0; i < side.code_dim; ++i) {
                row[2 + i] = side.middle ? middles[i / group_dim * MAX_ROWS + r] : 0;
            }
            for (int64_t k = 0; k < side.pair_count; ++k) {
                for (int i = 0; i < 2; ++i) {
                    const int32_t coordinate = side.pairs[k].coordinates[i];
                    if (coordinate >= 0) row[2 + coordinate] += of_pairs[8 * k + 4 * i + r];
                }
            }
        }
    }

    static constexpr int MAX_GROUPS = 64;
    float middles[MAX_GROUPS * MAX_ROWS]{};  // sums of weights times middles
    float energy[MAX_GROUPS * MAX_ROWS]{};   // sums of squared products
};

// Pieces of work

inline float* exact_of(const QjlStep& s, int64_t pair) {
    const int64_t floats = (exact_floats(s) + s.splits * split_floats(s) + 15) / 16 * 16;
    return reinterpret_cast<float*>(s.workspace) + pair * floats;
}

inline float* split_of(const QjlStep& s, int64_t pair, int64_t split) {
    return exact_of(s, pair) + exact_floats(s) + split * split_floats(s);
}

inline float capped(float score, float softcap) {
    return softcap > 0 ? softcap * __builtin_tanhf(score / softcap) : score;
}

// Caps and masks scores; their base is 2 from here on.
inline void finish_scores(const Head& h, int64_t first_row, int64_t rows, int64_t block, int64_t blocks, float* scores) {
    const QjlStep& s = h.s;
    const int64_t step = s.bias_stride[3];
    for (int64_t r = 0; r < rows; ++r) {
        const float* bias = s.bias ? h.bias(s.bias, s.bias_stride, first_row + r) + block * 64 * step : nullptr;
        for (int64_t i = 0; i < blocks * 64; ++i) {
            float& score = scores[r * TILE * 64 + i];
            if (s.softcap > 0) score = capped(score, s.softcap) * LOG2E;
            if (bias) score += bias[(i / 64 * 64 + i % 16 * 4 + i % 64 / 16) * step] * LOG2E;
        }
    }
}

inline int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t row_groups(const QjlStep& s) { return (s.rows + MAX_ROWS - 1) / MAX_ROWS; }

inline Asked asked_of(const QjlStep& s, int64_t pair, int64_t first_row) {
    const int64_t place = pair * row_groups(s) + first_row / MAX_ROWS;
    return {s, {reinterpret_cast<uintptr_t>(exact_of(s, s.batch * s.heads)) + place * asked_bytes(s)}};
}

inline void ask(const QjlStep& s, int64_t pair, Scratch& room) {
    const Head h{s, pair / s.heads, pair % s.heads};
    for (int64_t row = 0; row < s.rows; row += MAX_ROWS) {
        const Asked asked = asked_of(s, pair, row);
        const float factor = s.scores ? 1 : s.softcap > 0 ? s.scaling : s.scaling * LOG2E;
        Question{h, s.keys, room, asked, fewer(MAX_ROWS, s.rows - row)}.ask(row, factor);
    }
}

// Calls `use(block, blocks)` for every tile of a split, with its scores in the room: [rows][TILE][64].
template <class Use>
void score_tiles(const Head& h, int64_t split, int64_t rows, const Asked& asked, Scratch& room,
                 const Use& use) {
    const int64_t first = split * h.s.blocks_per_split, last = fewer(first + h.s.blocks_per_split, h.s.blocks);
    const Keys keys{h, h.s.keys, room, asked, rows};
    Turn turn(h, room, asked, rows);
    for (int64_t block = first; block < last; block += TILE) {
        const int64_t blocks = fewer(TILE, last - block);
        for (int64_t b = 0; b < blocks; ++b) keys.score(block + b, room.scores + b * 64, TILE * 64);
        turn.add(block, blocks, room.scores);
        use(block, blocks);
    }
}

inline void attend_packed(const QjlStep& s, int64_t pair, int64_t split, Scratch& room) {
    const Head h{s, pair / s.heads, pair % s.heads};
    for (int64_t row = 0; row < s.rows; row += MAX_ROWS) {
        const int64_t rows = fewer(MAX_ROWS, s.rows - row);
        Sums sums(h, room, row, rows);
        score_tiles(h, split, rows, asked_of(s, pair, row), room, [&](int64_t block, int64_t blocks) {
            if (s.softcap > 0 || s.bias) finish_scores(h, row, rows, block, blocks, room.scores);
            sums.add(room.scores, block, blocks);
        });
        sums.leave(split_of(s, pair, split));
    }
}

// Raw scores of the packed tokens alone, as the benchmark of the scan wants them.
inline void score_packed(const QjlStep& s, int64_t pair, int64_t split, Scratch& room) {
    const Head h{s, pair / s.heads, pair % s.heads};
    for (int64_t row = 0; row < s.rows; row += MAX_ROWS) {
        const int64_t rows = fewer(MAX_ROWS, s.rows - row);
        score_tiles(h, split, rows, asked_of(s, pair, row), room, [&](int64_t block, int64_t blocks) {
            for (int64_t r = 0; r < rows; ++r) {
                float* to = s.scores + (pair * s.rows + row + r) * s.blocks * 64 + block * 64;
                const float* from = room.scores + r * TILE * 64;
                for (int64_t i = 0; i < blocks * 64; i += 64) {
                    const auto at = [&](int c) { return load<F16>(from + i + 16 * c); };
                    store_in_order(to + i, at(0), at(1), at(2), at(3));
                }
            }
        });
    }
}

// Tokens in full precision, MOST of them at a time.
struct ExactTokens {
    static constexpr int64_t MOST = 64;
    const Head& h;
    Scratch& room;
    float* partial;  // [maximum, weight, head_dim sums] of each row

    float* row(int64_t r) const { return partial + r * (2 + h.s.values.head_dim); }

    void clear() const {
        __builtin_memset(partial, 0, exact_floats(h.s) * sizeof(float));
        for (int64_t r = 0; r < h.s.rows; ++r) row(r)[0] = LOWEST;
    }

    Numbers tokens_of(const void* data, const int64_t (&stride)[3], int64_t token, int64_t dtype) const {
        const int64_t place = h.batch * stride[0] + h.head * stride[1] + token * stride[2];
        return {static_cast<const uint8_t*>(data) + place * (dtype == 0 ? 4 : 2), stride[2], dtype};
    }

    void add(const QjlSegment& segment) const {
        for (int64_t r = 0; r < h.s.rows; r += MAX_ROWS) {
            const int64_t rows = h.s.rows - r < MAX_ROWS ? h.s.rows - r : MAX_ROWS;
            for (int64_t token = 0; token < segment.tokens; token += MOST) {
                const int64_t tokens = segment.tokens - token < MOST ? segment.tokens - token : MOST;
                score(segment, token, tokens, r, rows);
                for (int64_t i = 0; i < rows; ++i) weigh(room.scores + i * MOST, row(r + i));
                mix(segment, token, tokens, r, rows);
            }
        }
    }

    void score(const QjlSegment& segment, int64_t token, int64_t tokens, int64_t first_row, int64_t rows) const {
        const QjlStep& s = h.s;
        const int64_t dim = s.keys.head_dim;
        __builtin_memset(room.queries, 0, MAX_ROWS * dim * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) add_scaled(room.queries + r * dim, h.query(first_row + r), s.scaling, dim);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = tokens; i < MOST; ++i) room.scores[r * MOST + i] = -__builtin_inff();
        }
        const Numbers keys = tokens_of(segment.keys, segment.key_stride, token, segment.dtype);
        for (int64_t i = 0; i < tokens; ++i) {
            keys.copy(i, room.row, dim);
            const F4 scores = dots(room.row, room.queries, dim, dim);
            for (int64_t r = 0; r < rows; ++r) {
                float score = capped(scores[r], s.softcap);
                if (segment.bias) {
                    const float* bias = h.bias(segment.bias, segment.bias_stride, first_row + r);
                    score += bias[(token + i) * segment.bias_stride[3]];
                }
                room.scores[r * MOST + i] = score * LOG2E;
            }
        }
    }

    void weigh(float* scores, float* sums) const {
        F16 most = load<F16>(scores);
        for (int i = 16; i < MOST; i += 16) most = larger(most, load<F16>(scores + i));
        const float maximum = largest(most) > sums[0] ? largest(most) : sums[0];
        const float decay = exp2(sums[0] - maximum);
        for (int64_t i = 1; i < 2 + h.s.values.head_dim; ++i) sums[i] *= decay;
        sums[0] = maximum;
        F16 total{};
        for (int i = 0; i < MOST; i += 16) {
            const F16 weight = exp2(load<F16>(scores + i) - maximum);
            store(scores + i, weight);
            total += weight;
        }
        sums[1] += sum(total);
    }

    void mix(const QjlSegment& segment, int64_t token, int64_t tokens, int64_t first_row, int64_t rows) const {
        const auto to = [&](int64_t r) { return row(first_row + (r < rows ? r : 0)) + 2; };
        const auto weights = [&](int64_t r) { return room.scores + (r < rows ? r : 0) * MOST; };
        tokens_of(segment.values, segment.value_stride, token, segment.dtype)
            .add_to({to(0), to(1), to(2), to(3)}, {weights(0), weights(1), weights(2), weights(3)}, tokens,
                    h.s.values.head_dim);
    }
};

inline void attend_exact(const QjlStep& s, int64_t pair, Scratch& room) {
    const Head h{s, pair / s.heads, pair % s.heads};
    const ExactTokens tokens{h, room, exact_of(s, pair)};
    tokens.clear();
    for (int64_t i = 0; i < s.exact_count; ++i) tokens.add(s.exact[i]);
}

// Joins the splits and the exact tokens of one pair in a fixed order; the sums of the codes are mapped back once.
struct Merge {
    const QjlStep& s;
    const Head h;
    int64_t pair;
    Scratch& room;

    float* out(int64_t r) const { return s.out + (pair * s.rows + r) * s.values.head_dim; }
    const float* exact(int64_t r) const { return exact_of(s, pair) + r * (2 + s.values.head_dim); }
    const float* split(int64_t k, int64_t r) const { return split_of(s, pair, k) + r * (2 + s.values.code_dim); }

    void run() const {
        for (int64_t r = 0; r < s.rows; r += MAX_ROWS) {
            const int64_t rows = s.rows - r < MAX_ROWS ? s.rows - r : MAX_ROWS;
            for (int64_t i = 0; i < rows; ++i) join(r + i, room.mapped + i * s.values.code_dim);
            map_back(r, rows);
        }
    }

    // Leaves sums of codes and of exact tokens, both over the whole weight.
    void join(int64_t r, float* sums) const {
        const QjlSide& side = s.values;
        float maximum = exact(r)[0];
        for (int64_t k = 0; k < s.splits; ++k) maximum = split(k, r)[0] > maximum ? split(k, r)[0] : maximum;
        float packed = 0;
        for (int64_t k = 0; k < s.splits; ++k) packed += split(k, r)[1] * exp2(split(k, r)[0] - maximum);
        const float factor = exp2(exact(r)[0] - maximum), weight = packed + exact(r)[1] * factor;
        const bool sees_any = maximum > LOWEST;
        const float share = sees_any ? 1 / weight : 0;
        __builtin_memset(sums, 0, side.code_dim * sizeof(float));
        __builtin_memset(out(r), 0, side.head_dim * sizeof(float));
        for (int64_t k = 0; k < s.splits; ++k) {
            add_scaled(sums, split(k, r) + 2, exp2(split(k, r)[0] - maximum) * share, side.code_dim);
        }
        add_scaled(out(r), exact(r) + 2, factor * share, side.head_dim);
        if (side.mean) add_scaled(out(r), side.mean + h.head * side.head_dim, packed * share, side.head_dim);
        s.lse[pair * s.rows + r] = sees_any ? (maximum + __builtin_log2f(weight)) / LOG2E : -__builtin_inff();
    }

    void map_back(int64_t first_row, int64_t rows) const {
        const QjlSide& side = s.values;
        const auto to = [&](int64_t r) { return out(first_row + (r < rows ? r : 0)); };
        const auto sums = [&](int64_t r) { return room.mapped + (r < rows ? r : 0) * side.code_dim; };
        if (side.map) {
            map_of(side, h.head)
                .add_to({to(0), to(1), to(2), to(3)}, {sums(0), sums(1), sums(2), sums(3)}, side.code_dim, side.head_dim);
        } else {
            for (int64_t r = 0; r < rows; ++r) add_scaled(to(r), sums(r), 1, side.code_dim);
        }
    }
};

inline int64_t shared_bytes(const QjlStep& s) {
    const int64_t pairs = s.batch * s.heads;
    return reinterpret_cast<uint8_t*>(exact_of(s, pairs)) - s.workspace + pairs * row_groups(s) * asked_bytes(s);
}

// The room of a worker lies behind what all share.
inline Scratch scratch_of(const QjlStep& s, int64_t worker) {
    return {s, {reinterpret_cast<uintptr_t>(s.workspace) + shared_bytes(s) + worker * scratch_bytes(s)}};
}

inline void ask_item(const QjlStep& s, int64_t pair, int worker) {
    Scratch room = scratch_of(s, worker);
    ask(s, pair, room);
}

inline void packed_item(const QjlStep& s, int64_t item, int worker) {
    Scratch room = scratch_of(s, worker);
    (s.scores ? score_packed : attend_packed)(s, item / s.splits, item % s.splits, room);
}

inline void finish_item(const QjlStep& s, int64_t pair, int worker) {
    Scratch room = scratch_of(s, worker);
    attend_exact(s, pair, room);
    Merge{s, {s, pair / s.heads, pair % s.heads}, pair, room}.run();
}

inline int64_t workspace(const QjlStep& s, int64_t workers) { return shared_bytes(s) + workers * scratch_bytes(s); }

}  // namespace step
