// What the look-ups of an instruction set are given (nibbles_*.inl).

// Where the 64 codes of each of four bytes begin in a block.
struct Quad {
    int32_t at[4];
};

// Lines of memory that are read soon: some of `first`, then those of `second`.
struct Ahead {
    const uint8_t *first, *second;
    int64_t lines;  // of first

    QJL_INLINE const uint8_t* next() {
        if (lines-- > 0) return (first += 64) - 64;
        return (second += 64) - 64;
    }
};
