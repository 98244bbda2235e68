// One batch row and KV head, and what of the inputs belongs to it. Blocks begin at every 64th token.

struct Head {
    const QjlStep& s;
    int64_t batch, head;

    const uint8_t* at(const uint8_t* data, const int64_t (&stride)[2], int64_t page) const {
        return data + head * stride[0] + page * stride[1];
    }
    int64_t place_of_row(const int64_t (&stride)[3], int64_t row) const {
        return batch * stride[0] + (head * group() + row / s.queries) * stride[1] + row % s.queries * stride[2];
    }
    // The queries of some rows times a factor; zeros for what is left of MAX_ROWS.
    void put_queries(int64_t first_row, int64_t rows, float factor, float* to) const {
        const int64_t dim = s.keys.head_dim;
        for (int64_t r = 0; r < rows; ++r) {
            const void* query = number_at(s.query, place_of_row(s.query_stride, first_row + r), s.query_type);
            Numbers{query, 0, s.query_type}.copy(0, to + r * dim, dim);
        }
        scale(to, factor, rows * dim);
        __builtin_memset(to + rows * dim, 0, (MAX_ROWS - rows) * dim * sizeof(float));
    }
    int64_t first_token() const { return s.of_rows->skip[batch]; }
    int64_t end_token() const { return s.of_rows->lengths[batch]; }
    // That holds a token, or -1. Pages hold a power of two of them.
    int64_t page_of(int64_t token) const {
        return s.of_rows->table[batch * s.of_rows->capacity + (token >> __builtin_ctzll(s.page_tokens))];
    }
    bool has_all(int64_t block) const {
        if (block * 64 < first_token() || end_token() < block * 64 + 64) return false;
        for (int64_t token = block * 64; token < block * 64 + 64; token += s.page_tokens) {
            if (page_of(token) < 0) return false;
        }
        return true;
    }
    // Which tokens of a block there are.
    void find(int64_t block, bool (&seen)[64]) const {
        __builtin_memset(seen, 0, sizeof seen);
        const int64_t first = more(block * 64, first_token()), last = fewer(block * 64 + 64, end_token());
        for (int64_t token = first, end; token < last; token = end) {
            end = fewer(last, (token / s.page_tokens + 1) * s.page_tokens);
            if (page_of(token) >= 0) __builtin_memset(seen + token % 64, 1, end - token);
        }
    }
    int64_t first_block() const { return first_token() / 64; }
    int64_t blocks() const { return first_token() < end_token() ? (end_token() + 63) / 64 - first_block() : 0; }
    int64_t position(int64_t block) const { return s.of_rows->origins[batch] + block * 64; }

    // A row's splits depend on its own tokens alone, and with them its result.
    int64_t blocks_per_split() const { return more(s.blocks_per_split, (blocks() + s.splits - 1) / s.splits); }
    int64_t splits() const { return s.splits ? (blocks() + blocks_per_split() - 1) / blocks_per_split() : 0; }

    int64_t group() const { return s.rows / s.queries; }
    // Of a row's queries for the tokens from a column on.
    const float* bias(int64_t row, int64_t column) const {
        const int64_t query_head = head * group() + row / s.queries;
        const int64_t of_query = query_head * s.bias_stride[1] + row % s.queries * s.bias_stride[2];
        return s.bias + batch * s.bias_stride[0] + of_query + column * s.bias_stride[3];
    }
};

inline Head head_of(const QjlStep& s, int64_t pair) { return {s, pair / s.heads, pair % s.heads}; }

inline Numbers map_of(const QjlSide& side, int64_t head) {
    const int64_t bytes = head * side.map_stride * (side.map_is_half ? 2 : 4);
    return {static_cast<const uint8_t*>(side.map) + bytes, side.head_dim, side.map_is_half ? 2 : 0};
}

inline float capped(float score, float softcap) {
    return softcap > 0 ? softcap * __builtin_tanhf(score / softcap) : score;
}

// What a template lambda gives for so many rows.
template <class Of>
QJL_INLINE auto for_rows(int64_t rows, const Of& of) {
    switch (rows) {
        case 1: return of.template operator()<1>();
        case 2: return of.template operator()<2>();
        case 3: return of.template operator()<3>();
        default: return of.template operator()<4>();
    }
}
