// Where a block of 64 tokens lies: in a page of 64 as it is, otherwise put together from pages.

struct Place {
    const uint8_t *codes, *scale, *middle;
};

inline int64_t scale_size(const QjlSide& side) { return side.unit ? 1 : 2; }

inline int64_t block_bytes(const QjlSide& side) {
    return 64 * (side.nibbles / 2 + side.groups * (scale_size(side) + (side.middle ? 2 : 0)));
}

inline Place in_place(const Head& h, const QjlSide& side, int64_t page) {
    return {h.at(side.codes, side.codes_stride, page), h.at(side.scale, side.scale_stride, page),
            side.middle ? h.at(side.middle, side.middle_stride, page) : nullptr};
}

// Puts the tokens of a block that a row has side by side; in place of others there are zeros, which decode to zero.
struct Gather {
    const Head& h;
    const QjlSide& side;
    int64_t page_tokens, first, last;

    Gather(const Head& h, const QjlSide& side, int64_t block)
        : h(h), side(side), page_tokens(h.s.page_tokens), first(more(block * 64, h.first_token())),
          last(fewer(block * 64 + 64, h.end_token())) {}

    Place into(uint8_t* room) const {
        if (!h.has_all(first / 64)) __builtin_memset(room, 0, block_bytes(side));
        uint8_t* scale = room + side.nibbles / 2 * 64;
        uint8_t* middle = scale + side.groups * scale_size(side) * 64;
        gather(room, side.codes, side.codes_stride, side.nibbles / 2, 1);
        gather(scale, side.scale, side.scale_stride, side.groups, scale_size(side));
        if (side.middle) gather(middle, side.middle, side.middle_stride, side.groups, 2);
        return {room, scale, middle};
    }

    // [rows][page_tokens] of each page to [rows][64], numbers of `size` bytes.
    void gather(uint8_t* to, const uint8_t* data, const int64_t (&stride)[2], int64_t rows, int64_t size) const {
        for (int64_t token = first, count; token < last; token += count) {
            const int64_t slot = token & (page_tokens - 1);
            count = fewer(page_tokens - slot, last - token);
            if (h.page_of(token) < 0) continue;
            const uint8_t* from = h.at(data, stride, h.page_of(token)) + slot * size;
            for (int64_t i = 0; i < rows; ++i) {
                copy(to + (i * 64 + token % 64) * size, from + i * page_tokens * size, count * size);
            }
        }
    }

    static void copy(uint8_t* to, const uint8_t* from, int64_t bytes) {
        for (; bytes >= 16; bytes -= 16, to += 16, from += 16) __builtin_memcpy(to, from, 16);
        for (int64_t i = 0; i < bytes; ++i) to[i] = from[i];
    }
};

inline Place place_of(const Head& h, const QjlSide& side, int64_t block, uint8_t* room) {
    if (h.s.page_tokens == 64 && h.has_all(block)) return in_place(h, side, h.page_of(block * 64));
    return Gather{h, side, block}.into(room);
}

// What `place_of` will read first, or nearly so where that is no block of the row.
inline const uint8_t* codes_ahead(const Head& h, const QjlSide& side, int64_t block) {
    const int64_t within = fewer(block, h.first_block() + h.blocks() - 1);
    return h.at(side.codes, side.codes_stride, more(h.page_of(more(within * 64, h.first_token())), 0));
}
