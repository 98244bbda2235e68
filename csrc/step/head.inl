// One batch row and KV head, and what of the inputs belongs to it.

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

inline Head head_of(const QjlStep& s, int64_t pair) { return {s, pair / s.heads, pair % s.heads}; }

inline Numbers map_of(const QjlSide& side, int64_t head) {
    const int64_t bytes = head * side.map_stride * (side.map_is_half ? 2 : 4);
    return {static_cast<const uint8_t*>(side.map) + bytes, side.head_dim, side.map_is_half ? 2 : 0};
}

inline float capped(float score, float softcap) {
    return softcap > 0 ? softcap * __builtin_tanhf(score / softcap) : score;
}
