// What lies where in the room of a step: what splits and exact tokens leave, what queries ask, and room for each worker.

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

constexpr int RANK = 16;               // functions that slow frequencies share
constexpr int64_t DISTANCES = 2 * 64;  // of the tokens of a span from its centre

// Functions of the distance of a token: what slow frequencies share, then the fast ones.
inline int64_t functions_of(const QjlTurn& t) { return (RANK + t.direct + 1) / 2 * 2; }
inline int64_t room_for_coefficients(const QjlTurn& t) { return RANK + (t.pairs + 16) / 16 * 16; }

inline int64_t bytes_of_group(const QjlSide& side) { return side.nibbles / side.groups / 2; }

// Quads of a group: once for all bytes, and once more for those that are looked up finely.
inline int64_t most_quads(const QjlSide& side) { return 2 * ((bytes_of_group(side) + 3) / 4); }

// What up to MAX_ROWS query rows ask of the packed keys: prepared once, read by all splits.
struct Asked {
    Quad* quads;                    // [groups][most_quads]
    int64_t* counts;                // [groups]: how many of them
    uint8_t* tables;                // [groups][most_quads][low nibbles, high ones][rows][4][16]
    uint8_t* factors;               // [groups][most_quads][low nibbles, high ones][rows][4]
    int32_t* firsts;                // [groups][MAX_ROWS]: what sums of look-ups begin with
    float *units, *sums_of_groups;  // [groups][MAX_ROWS]
    float* constants;               // [MAX_ROWS]: what of the mean adds to all scores alike
    float* turned;                  // [rows][real, imaginary][pairs]: what RoPE turns
    float* turn_scales;             // [MAX_ROWS]: of its coefficients as integers
    uintptr_t end;

    Asked(const QjlStep& s, Room room) {
        const int64_t groups = s.keys.groups, count = groups * most_quads(s.keys);
        quads = room.take<Quad>(count);
        counts = room.take<int64_t>(groups);
        tables = room.take<uint8_t>(count * 2 * MAX_ROWS * 64);
        factors = room.take<uint8_t>(count * 2 * MAX_ROWS * 4);
        firsts = room.take<int32_t>(groups * MAX_ROWS);
        units = room.take<float>(groups * MAX_ROWS);
        sums_of_groups = room.take<float>(groups * MAX_ROWS);
        constants = room.take<float>(MAX_ROWS);
        turned = room.take<float>(s.turn ? MAX_ROWS * 2 * s.turn->pairs + 16 : 0);
        turn_scales = room.take<float>(MAX_ROWS);
        end = room.at;
    }
};

// What a worker needs.
struct Scratch {
    float *queries, *mapped;
    float *tables_of_floats, *lows, *ranges, *units, *errors;  // of the tables of a group
    float *scores, *products, *maxima, *scales;        // [MAX_ROWS][TILE] of 64, 64 and 16; [TILE][64]
    int32_t* sums;                                     // [MAX_ROWS][64]
    uint8_t* weights;                                  // [low digits, high digits][TILE][MAX_ROWS][64]
    float *sums_of_quads, *sums_of_middles, *energy;
    float* phasors_of_centre;
    double* phasors;
    int16_t* coefficients;  // [even, odd][MAX_ROWS][RANK, pairs]
    int32_t* evens;         // [MAX_ROWS][DISTANCES]: even parts
    float* outs;            // of up to MAX_ROWS rows
    int32_t* slots;         // of exact tokens
    uint8_t *block_of_keys, *blocks_of_values;  // put together from pages
    uintptr_t end;

    Scratch(const QjlStep& s, Room room) {
        const int64_t code_dim = more(s.keys.code_dim, s.values.code_dim);
        queries = room.take<float>(MAX_ROWS * s.keys.head_dim);
        mapped = room.take<float>(MAX_ROWS * code_dim);
        const int64_t quads = most_quads(s.keys) / 2;
        tables_of_floats = room.take<float>(quads * 2 * MAX_ROWS * 64);
        lows = room.take<float>(quads * 2 * MAX_ROWS * 4);
        ranges = room.take<float>(quads * 2 * MAX_ROWS * 4);
        units = room.take<float>(MAX_ROWS * 4);
        errors = room.take<float>(quads * 4);
        scores = room.take<float>(MAX_ROWS * TILE * 64);
        products = room.take<float>(MAX_ROWS * TILE * 64);
        maxima = room.take<float>(MAX_ROWS * TILE * 16);
        scales = room.take<float>(TILE * 64);
        sums = room.take<int32_t>(MAX_ROWS * 64);
        weights = room.take<uint8_t>(2 * TILE * MAX_ROWS * 64);
        sums_of_quads = room.take<float>(s.values.quad_count * 16);
        sums_of_middles = room.take<float>(s.values.groups * MAX_ROWS);
        energy = room.take<float>(s.values.groups * MAX_ROWS);
        const int64_t pairs = s.turn ? s.turn->pairs : 0;
        phasors_of_centre = room.take<float>(2 * pairs + 16);
        phasors = room.take<double>(2 * pairs);
        coefficients = room.take<int16_t>(s.turn ? 2 * MAX_ROWS * room_for_coefficients(*s.turn) : 0);
        evens = room.take<int32_t>(MAX_ROWS * DISTANCES);
        outs = room.take<float>(MAX_ROWS * s.values.head_dim);
        slots = room.take<int32_t>(64);
        block_of_keys = room.take<uint8_t>(block_bytes(s.keys));
        blocks_of_values = room.take<uint8_t>(TILE * block_bytes(s.values));
        end = room.at;
    }
};

inline int64_t asked_bytes(const QjlStep& s) { return int64_t(Asked(s, {0}).end); }
inline int64_t scratch_bytes(const QjlStep& s) { return int64_t(Scratch(s, {0}).end); }

// What a split leaves for the merge: per row, [maximum, weight, code_dim sums]; the exact tokens leave head_dim sums.
inline int64_t split_floats(const QjlStep& s) { return s.rows * (2 + s.values.code_dim); }
inline int64_t exact_floats(const QjlStep& s) { return s.rows * (2 + s.values.head_dim); }

inline int64_t left_bytes(const QjlStep& s) {  // of one batch row and KV head
    return (exact_floats(s) + s.splits * split_floats(s) + 15) / 16 * 64;
}

inline int64_t row_groups(const QjlStep& s) { return (s.rows + MAX_ROWS - 1) / MAX_ROWS; }

// Where splits begin is the same for all heads.
inline int64_t phasor_bytes(const QjlStep& s) { return s.turn ? (s.splits * 2 * s.turn->pairs * 8 + 63) / 64 * 64 : 0; }

inline int64_t shared_bytes(const QjlStep& s) {
    return s.batch * (phasor_bytes(s) + s.heads * (left_bytes(s) + row_groups(s) * asked_bytes(s)));
}

inline float* exact_of(const QjlStep& s, int64_t pair) {
    return reinterpret_cast<float*>(s.room + pair * left_bytes(s));
}

inline float* split_of(const QjlStep& s, int64_t pair, int64_t split) {
    return exact_of(s, pair) + exact_floats(s) + split * split_floats(s);
}

inline Asked asked_of(const QjlStep& s, int64_t pair, int64_t first_row) {
    const int64_t place = pair * row_groups(s) + first_row / MAX_ROWS;
    const uint8_t* first = s.room + s.batch * s.heads * left_bytes(s);
    return {s, {reinterpret_cast<uintptr_t>(first + place * asked_bytes(s))}};
}

// Cosines and sines of the centre of the first two blocks of each split, [splits][2][pairs].
inline double* phasors_of(const QjlStep& s, int64_t batch) {
    const int64_t of_heads = s.batch * s.heads * (left_bytes(s) + row_groups(s) * asked_bytes(s));
    return reinterpret_cast<double*>(s.room + of_heads + batch * phasor_bytes(s));
}

inline Scratch scratch_of(const QjlStep& s, int64_t worker) {
    return {s, {reinterpret_cast<uintptr_t>(s.room + shared_bytes(s) + worker * scratch_bytes(s))}};
}
