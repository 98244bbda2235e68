// The fused decode step over packed blocks: scores, online softmax, weighted sums, all on the codes.
//
// Scores: tables of 8-bit integers, one per nibble and query row, with a factor each.
// Values: 8-bit levels by nibble, summed with 8-bit weights. An instruction set gives (nibbles_*.inl)
//   scan_block: sums of table entries over a block, for up to MAX_ROWS rows
//   add_quad: weighted sums of four coordinates over the blocks of a tile
// Numbers of the 64 tokens of a block lie "by lanes": token 16 L + 4 k + i at place 16 k + 4 L + i, as bytes come that
// are unpacked twice in lanes of 16.

namespace step {

using namespace nibbles;

#include "step/numbers.inl"

#include "step/head.inl"

#include "step/pages.inl"

#include "step/room.inl"

#include "step/keys.inl"

#include "step/turn.inl"

#include "step/values.inl"

#include "step/exact.inl"

#include "step/merge.inl"

// Pieces of work

// Which token of a block stands at a place.
inline int64_t token_at(int64_t place) { return place % 16 / 4 * 16 + place / 16 * 4 + place % 4; }

// Caps and masks scores; their base is 2 from here on.
inline void finish_scores(const Head& h, int64_t first_row, int64_t rows, int64_t block, int64_t blocks,
                          float* scores) {
    const QjlStep& s = h.s;
    const int64_t columns = s.of_rows->capacity * s.page_tokens;
    for (int64_t r = 0; r < rows; ++r) {
        const float* bias = s.bias ? h.bias(first_row + r, 0) : nullptr;
        for (int64_t i = 0; i < blocks * 64; ++i) {
            float& score = scores[r * TILE * 64 + i];
            if (s.softcap > 0) score = capped(score, s.softcap) * LOG2E;
            const int64_t token = block * 64 + i / 64 * 64 + token_at(i % 64);
            if (bias && token < columns) score += bias[token * s.bias_stride[3]] * LOG2E;
        }
    }
}

// Hides what a row does not have.
inline void hide_scores(const Head& h, int64_t rows, int64_t block, int64_t blocks, float* scores) {
    for (int64_t b = 0; b < blocks; ++b) {
        if (h.has_all(block + b)) continue;
        bool seen[64];
        h.find(block + b, seen);
        for (int64_t i = 0; i < 64; ++i) {
            if (seen[token_at(i)]) continue;
            for (int64_t r = 0; r < rows; ++r) scores[(r * TILE + b) * 64 + i] = -__builtin_inff();
        }
    }
}

inline void fetch(const uint8_t* from, int64_t lines) {
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(from + i * 64);
}

// Calls `use(block, blocks)` for every tile of a split, with its scores in the room: [rows][TILE][64].
//
// Memory is read at an even pace: lines of the next tile's keys as values are summed up, one in each block and quad; the
// other lines of them, and those of a tile's values, as its keys are scanned.
template <class Use>
void score_tiles(const Head& h, int64_t split, int64_t rows, const Asked& asked, Scratch& room, const Use& use) {
    const QjlSide &keys = h.s.keys, &values = h.s.values;
    const int64_t first = h.first_block() + split * h.blocks_per_split();
    const int64_t last = fewer(first + h.blocks_per_split(), h.first_block() + h.blocks());
    const int64_t lines = keys.nibbles / 2, with_values = h.s.scores ? 0 : fewer(values.quad_count, lines);
    const Keys of_keys{h, keys, room, asked, rows};
    Turn turn(h, split, room, asked, rows);
    for (int64_t block = first; block < last; block += TILE) {
        const int64_t blocks = fewer(TILE, last - block);
        turn.put(blocks, room.scores);
        for (int64_t b = 0; b < blocks; ++b) {
            if (block == h.first_block()) fetch(codes_ahead(h, keys, block + b + 1), lines);
            const uint8_t* later = codes_ahead(h, keys, block + b + TILE) + with_values * 64;
            of_keys.add(block + b, {later, codes_ahead(h, values, block + b), lines - with_values}, room.scores + b * 64);
        }
        use(block, blocks);
    }
}

inline void attend_packed(const QjlStep& s, int64_t pair, int64_t split, Scratch& room) {
    const Head h = head_of(s, pair);
    if (split >= h.splits()) return;
    for (int64_t row = 0; row < s.rows; row += MAX_ROWS) {
        const int64_t rows = fewer(MAX_ROWS, s.rows - row);
        Sums sums(h, room, row, rows);
        score_tiles(h, split, rows, asked_of(s, pair, row), room, [&](int64_t block, int64_t blocks) {
            if (s.softcap > 0 || s.bias) finish_scores(h, row, rows, block, blocks, room.scores);
            hide_scores(h, rows, block, blocks, room.scores);
            sums.add(room.scores, block, blocks);
        });
        sums.leave(split_of(s, pair, split));
    }
}

// Raw scores of the packed tokens alone, as the benchmark of the scan wants them.
inline void score_packed(const QjlStep& s, int64_t pair, int64_t split, Scratch& room) {
    const Head h = head_of(s, pair);
    for (int64_t row = 0; row < s.rows; row += MAX_ROWS) {
        const int64_t rows = fewer(MAX_ROWS, s.rows - row);
        score_tiles(h, split, rows, asked_of(s, pair, row), room, [&](int64_t block, int64_t blocks) {
            for (int64_t r = 0; r < rows; ++r) {
                float* to = s.scores + (pair * s.rows + row + r) * s.of_rows->capacity * s.page_tokens + block * 64;
                for (int64_t b = 0; b < blocks; ++b) {
                    swap_lanes(room.scores + (r * TILE + b) * 64, to + b * 64);
                }
            }
        });
    }
}

inline void ask_item(const QjlStep& s, int64_t pair, int worker) {
    Scratch room = scratch_of(s, worker);
    const Head h = head_of(s, pair);
    if (h.head == 0) Turn::prepare(h);
    for (int64_t row = 0; row < s.rows; row += MAX_ROWS) {
        const Asked asked = asked_of(s, pair, row);
        const float factor = s.scores ? 1 : s.softcap > 0 ? s.scaling : s.scaling * LOG2E;
        Question{h, s.keys, room, asked, fewer(MAX_ROWS, s.rows - row)}.ask(row, factor);
    }
}

inline void packed_item(const QjlStep& s, int64_t item, int worker) {
    Scratch room = scratch_of(s, worker);
    (s.scores ? score_packed : attend_packed)(s, item / s.splits, item % s.splits, room);
}

inline void finish_item(const QjlStep& s, int64_t pair, int worker) {
    Scratch room = scratch_of(s, worker);
    attend_exact(s, pair, room);
    Merge{s, head_of(s, pair), pair, room}.run();
}

inline int64_t room_bytes(const QjlStep& s, int64_t workers) { return shared_bytes(s) + workers * scratch_bytes(s); }

}  // namespace step
