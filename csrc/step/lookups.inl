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

// Which of the nibbles that a kind reads each look-up reads (-1: its table is of zeros), and whether they are the high
// ones of their bytes (-1: any).
template <int KIND>
struct Reads {
    static constexpr int COUNT = 8, OF[8] = {0, 1, 2, 3, 4, 5, 6, 7}, IS_HIGH[] = {-1, -1, -1, -1, -1, -1, -1, -1};
};
template <>
struct Reads<QJL_TWO_CHAIN> {
    static constexpr int COUNT = 3, OF[8] = {0, 1, 0, 1, 1, 2, 1, 2}, IS_HIGH[] = {1, 0, 1};
};
template <>
struct Reads<QJL_TWO_LEVELS> {
    static constexpr int COUNT = 2, OF[8] = {0, -1, 0, -1, 1, -1, 1, -1}, IS_HIGH[] = {0, 1};
};
template <>
struct Reads<QJL_ONE_LEVELS> {
    static constexpr int COUNT = 4, OF[8] = {0, -1, 1, -1, 2, -1, 3, -1}, IS_HIGH[] = {0, 1, 0, 1};
};
template <>
struct Reads<QJL_FOUR_CHAIN> {
    static constexpr int COUNT = 2, OF[8] = {0, 1, 0, 1, 0, 1, 0, 1}, IS_HIGH[] = {-1, -1};
};
template <>
struct Reads<QJL_ONE_CHAIN> {
    static constexpr int COUNT = 5, OF[8] = {0, 1, 1, 2, 2, 3, 3, 4}, IS_HIGH[] = {1, 0, 1, 0, 1};
};

// Blocks whose values are summed up at once.
struct Weighted {
    const uint8_t* const* codes;  // [count]: where those of a block begin
    const uint8_t* weights;       // [count][rows][64], up to WEIGHT_TOP
    const uint8_t* const* ahead;  // [count]: where is read later
    int64_t count;
};
