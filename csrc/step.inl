// The fused decode step over packed blocks: scores, online softmax, weighted sums, all on the codes.
//
// Scores: tables of 16-bit integers, one per nibble and query row, each group of four nibbles in units of its own.
// Values: 8-bit levels by nibble, summed with integer weights. An instruction set gives (nibbles_*.inl)
//   put_table, scan_block: sums of table entries over a block, for up to MAX_ROWS rows
//   put_weights, add_pair: weighted sums of two coordinates over the blocks of a tile
// Numbers of the 64 tokens of a block are kept "by four": token 4 i + c at place 16 c + i, as bytes of words come.

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

// Which token of a tile stands at a place.
inline int64_t token_at(int64_t place) { return place / 64 * 64 + place % 16 * 4 + place % 64 / 16; }

// Caps and masks scores; their base is 2 from here on.
inline void finish_scores(const Head& h, int64_t first_row, int64_t rows, int64_t block, int64_t blocks,
                          float* scores) {
    const QjlStep& s = h.s;
    for (int64_t r = 0; r < rows; ++r) {
        const float* bias = s.bias ? h.bias(first_row + r, block * 64) : nullptr;
        for (int64_t i = 0; i < blocks * 64; ++i) {
            float& score = scores[r * TILE * 64 + i];
            if (s.softcap > 0) score = capped(score, s.softcap) * LOG2E;
            const int64_t token = token_at(i);
            if (bias && h.has(block * 64 + token)) score += bias[token * s.bias_stride[3]] * LOG2E;
        }
    }
}

// Hides what a row does not have.
inline void hide_scores(const Head& h, int64_t rows, int64_t block, int64_t blocks, float* scores) {
    for (int64_t b = 0; b < blocks; ++b) {
        if (h.has_all(block + b)) continue;
        for (int64_t i = b * 64; i < b * 64 + 64; ++i) {
            if (h.has(block * 64 + token_at(i))) continue;
            for (int64_t r = 0; r < rows; ++r) scores[r * TILE * 64 + i] = -__builtin_inff();
        }
    }
}

// Calls `use(block, blocks)` for every tile of a split, with its scores in the room: [rows][TILE][64].
template <class Use>
void score_tiles(const Head& h, int64_t split, int64_t rows, const Asked& asked, Scratch& room,
                 const Use& use) {
    const int64_t first = h.first_block() + split * h.blocks_per_split();
    const int64_t last = fewer(first + h.blocks_per_split(), h.first_block() + h.blocks());
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
                const float* from = room.scores + r * TILE * 64;
                for (int64_t i = 0; i < blocks * 64; i += 64) {
                    const auto at = [&](int c) { return load<F16>(from + i + 16 * c); };
                    store_in_order(to + i, at(0), at(1), at(2), at(3));
                }
            }
        });
    }
}

inline void ask_item(const QjlStep& s, int64_t pair, int worker) {
    Scratch room = scratch_of(s, worker);
    const Head h = head_of(s, pair);
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
