// One batch row and KV head, and what of the inputs belongs to it. Blocks of pages begin at every 64th token.

struct Head {
    const QjlStep& s;
    int64_t batch, head;

    const uint8_t* at(const uint8_t* data, const int64_t (&stride)[3], int64_t block) const {
        return data + batch * stride[0] + head * stride[1] + block * stride[2];
    }
    const float* query(int64_t row) const {
        return s.query + ((batch * s.heads + head) * s.rows + row) * s.keys.head_dim;
    }
    int64_t first_token() const { return s.pages ? s.pages->skip[batch] : 0; }
    int64_t end_token() const { return s.pages ? s.pages->lengths[batch] : s.blocks * 64; }
    bool has(int64_t token) const { return first_token() <= token && token < end_token(); }
    bool has_all(int64_t block, int64_t blocks) const {
        return first_token() <= block * 64 && (block + blocks) * 64 <= end_token();
    }
    int64_t first_block() const { return first_token() / 64; }
    int64_t blocks() const { return first_token() < end_token() ? (end_token() + 63) / 64 - first_block() : 0; }
    int64_t position(int64_t block) const {
        return s.pages ? s.pages->origins[batch] + block * 64 : s.first[batch * s.blocks + block];
    }

    // A row's splits depend on its own tokens alone, and with them its result.
    int64_t blocks_per_split() const { return more(s.blocks_per_split, (blocks() + s.splits - 1) / s.splits); }
    int64_t splits() const { return s.splits ? (blocks() + blocks_per_split() - 1) / blocks_per_split() : 0; }

    int64_t group() const { return s.rows / s.queries; }
    const float* bias(const float* data, const int64_t (&stride)[4], int64_t row) const {
        const int64_t query_head = head * group() + row / s.queries;
        return data + batch * stride[0] + query_head * stride[1] + row % s.queries * stride[2];
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
