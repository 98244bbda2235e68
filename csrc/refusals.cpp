#include "refusals.h"

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "kernels.h"
#include "pool.h"

namespace qjl {

const QjlLimits limits = {.dim = 1 << 15, .threads = MAX_THREADS};

namespace {

enum Rule : int64_t {
    SIZES, DIMS, GROUPS, CODES, TYPES, MAPS, SKETCHES, PARTS, TRELLISES, SIGNS, GAINS, TURNS, GRIDS, QUERIES, SPLITS,
    PAGE_SIZES, ROOM, LENGTHS, TABLES, COUNTS, SLOTS, JOBS, HEAD_DIMS, BITS, RULES
};

constexpr const char* WORDS[] = {
    "a size is negative",
    "a dimension is zero, or more than 32768 coordinates share a code",
    "groups do not cut the coordinates and the nibbles into equal whole bytes",
    "the codes do not have as many bytes as the parts fill",
    "the tokens are neither float32 nor bfloat16 nor float16",
    "there is no map, although codes and tokens differ in their dimension",
    "the size of a Hadamard matrix is no power of two that holds the tokens",
    "the parts do not make up the coordinates of the map",
    "a trellis takes 1, 2 or 4 coordinates per nibble, and one nibble for so many",
    "signs are refined in blocks of a multiple of 8",
    "there is no gain to try",
    "a mean turns in more pairs than it has coordinates, or is not there",
    "a grid takes 1 to 8 bits, and Hadamard matrices of a power of two along the whole diagonal",
    "the queries do not divide the query rows",
    "the splits do not hold all blocks",
    "a page takes 16, 32, 64 or 128 tokens",
    "room must begin on a boundary of 64 bytes",
    "a row has more tokens than its pages",
    "a table names a page that is not in the pool",
    "a row has more exact tokens than its slots",
    "a row names a slot that is not in the pool",
    "a job has one recipe",
    "head_dim must be a multiple of 8",
    "m must be 128 or a multiple of 256 up to 2048, and the tokens a multiple of 4",
};
static_assert(std::size(WORDS) == RULES);

// The first rule that does not hold.
class Rules {
  public:
    // Is not asked where an earlier rule is broken: then its numbers may mean nothing.
    template <class Holds>
    Rules& require(Rule rule, Holds holds) {
        if (!broken_ && !holds()) broken_ = -1 - rule;
        return *this;
    }
    template <class Others>
        requires std::is_invocable_v<Others>
    Rules& then(Others others) {
        if (!broken_) broken_ = others();
        return *this;
    }
    Rules& then(int64_t other) {
        if (!broken_) broken_ = other;
        return *this;
    }
    operator int64_t() const { return broken_; }

  private:
    int64_t broken_ = 0;
};

template <class... Sizes>
bool none_negative(Sizes... sizes) {
    return ((sizes >= 0) && ...);
}

bool is_dim(int64_t dim) { return 0 < dim && dim <= limits.dim; }
bool is_power_of_two(int64_t size) { return size > 0 && !(size & (size - 1)); }
bool is_type(int64_t type) { return type >= QJL_FLOAT32 && type <= QJL_FLOAT16; }
bool is_aligned(const void* room) { return reinterpret_cast<uintptr_t>(room) % 64 == 0; }

bool are_among(const int32_t* indices, int64_t first, int64_t last, int64_t least, int64_t count) {
    for (int64_t i = first; i < last; ++i)
        if (indices[i] < least || indices[i] >= count) return false;
    return true;
}

Rules of_codes(const QjlCodes& codes) {
    return Rules().require(SIZES, [&] { return none_negative(codes.batch, codes.heads, codes.blocks, codes.bytes); });
}

// Encoding

Rules of_map(const QjlMap& map, int64_t dim) {
    return Rules()
        .require(DIMS, [&] { return map.rows > 0 && dim > 0; })
        .require(SKETCHES, [&] { return map.matrix || (is_power_of_two(map.size) && map.size >= dim); });
}

Rules of_part(const QjlPart& part) {
    Rules rules;
    rules.require(DIMS, [&] { return is_dim(part.dim); }).require(CODES, [&] {
        return part.nibbles >= 0 && part.nibbles % 2 == 0;
    });
    switch (part.kind) {
        case QJL_LEVELS: return rules;
        case QJL_TRELLIS:
            return rules.require(TRELLISES, [&] {
                return (part.width == 1 || part.width == 2 || part.width == 4) && part.nibbles * part.width == part.dim;
            });
        case QJL_SIGNS:
            return rules.require(CODES, [&] { return part.nibbles * 4 == part.dim; }).require(SIGNS, [&] {
                return !part.gram || (part.block > 0 && part.block % 8 == 0 && part.dim % 8 == 0);
            });
        default: return rules.require(PARTS, [] { return false; });
    }
}

Rules of_parts(const QjlRecipe& recipe) {
    Rules rules;
    int64_t dim = 0, nibbles = 0;
    for (int64_t i = 0; i < recipe.part_count; ++i) {
        rules.then(of_part(recipe.parts[i]));
        dim += recipe.parts[i].dim, nibbles += recipe.parts[i].nibbles;
    }
    return rules.require(PARTS, [&] { return dim == recipe.map.rows; }).require(CODES, [&] {
        return nibbles == 2 * recipe.codes.bytes;
    });
}

Rules of_mean(const QjlMean& mean, int64_t dim) {
    return Rules().require(TURNS, [&] { return mean.pairs >= 0 && 2 * mean.pairs <= dim; });
}

Rules of_recipe(const QjlRecipe& recipe) {
    return Rules()
        .require(TYPES, [&] { return is_type(recipe.tokens.type); })
        .then(of_map(recipe.map, recipe.tokens.dim))
        .then(of_mean(recipe.mean, recipe.tokens.dim))
        .require(GAINS, [&] { return recipe.gain_count > 0; })
        .then(of_parts(recipe));
}

Rules of_grid(const QjlGridRecipe& grid) {
    const int64_t dim = grid.tokens.dim;
    return Rules()
        .require(TYPES, [&] { return is_type(grid.tokens.type); })
        .require(DIMS, [&] { return is_dim(dim); })
        .require(GROUPS, [&] { return grid.groups > 0 && dim % grid.groups == 0; })
        .require(GRIDS, [&] {
            return 1 <= grid.bits && grid.bits <= 8 && is_power_of_two(grid.size) && dim % grid.size == 0;
        })
        .require(CODES, [&] { return dim * grid.bits == 8 * grid.codes.bytes; });
}

Rules of_job(const QjlEncode& operation, const QjlJob& job) {
    Rules rules;
    rules.require(JOBS, [&] { return !job.recipe != !job.grid; });
    if (rules) return rules;
    const QjlCodes& codes = job.recipe ? job.recipe->codes : job.grid->codes;
    const QjlTokens& tokens = job.recipe ? job.recipe->tokens : job.grid->tokens;
    return rules.then(of_codes(codes))
        .then(job.recipe ? of_recipe(*job.recipe) : of_grid(*job.grid))
        .require(TURNS, [&] { return !job.recipe || !job.recipe->mean.pairs || (job.cos && job.sin); })
        .require(SLOTS, [&] { return are_among(operation.slots, 0, operation.blocks * BLOCK, 0, tokens.slot_count); })
        .require(TABLES, [&] { return are_among(operation.pages, 0, operation.blocks, 0, codes.blocks); });
}

// The fused decode step

constexpr int32_t NONE = -1;  // a hole, or a slot without a token

Rules of_side(const QjlSide& side) {
    return Rules()
        .require(SIZES, [&] { return none_negative(side.nibbles, side.slots, side.quad_count); })
        .require(DIMS, [&] { return side.code_dim > 0 && side.head_dim > 0 && side.groups > 0; })
        .require(GROUPS, [&] { return side.code_dim % side.groups == 0 && side.nibbles % (2 * side.groups) == 0; })
        .require(DIMS, [&] { return is_dim(side.code_dim / side.groups); })
        .require(MAPS, [&] { return side.map || side.code_dim == side.head_dim; });
}

Rules of_turn(const QjlTurn* turn, const QjlSide& keys) {
    return Rules().require(TURNS, [&] {
        return !turn || (keys.mean && 0 <= turn->direct && turn->direct <= turn->pairs && 2 * turn->pairs <= keys.head_dim);
    });
}

Rules of_exact(const QjlExact& exact) {
    return Rules().require(SIZES, [&] { return exact.slots >= 0; }).require(TYPES, [&] { return is_type(exact.dtype); });
}

Rules of_packed_row(const QjlStep& step, int64_t row) {
    const QjlRows& rows = *step.of_rows;
    const int64_t skip = rows.skip[row], length = rows.lengths[row], tokens = step.page_tokens;
    if (skip >= length) return {};
    return Rules()
        .require(LENGTHS, [&] { return skip >= 0 && length <= rows.capacity * tokens; })
        .require(SPLITS, [&] { return step.splits > 0; })
        .require(TABLES, [&] {
            return are_among(rows.table + row * rows.capacity, skip / tokens, (length + tokens - 1) / tokens, NONE,
                             step.page_count);
        });
}

Rules of_exact_row(const QjlStep& step, int64_t row) {
    const QjlRows& rows = *step.of_rows;
    const int64_t count = rows.counts[row];
    return Rules().require(COUNTS, [&] { return 0 <= count && count <= rows.room; }).require(SLOTS, [&] {
        return are_among(rows.slots + row * rows.room, 0, count, NONE, step.exact.slots);
    });
}

Rules of_rows(const QjlStep& step) {
    Rules rules;
    rules.require(PAGE_SIZES, [&] {
        const int64_t tokens = step.page_tokens;
        return is_power_of_two(tokens) && 16 <= tokens && tokens <= 2 * BLOCK;
    });
    for (int64_t row = 0; !rules && row < step.batch; ++row) {
        rules.then(of_packed_row(step, row)).then(of_exact_row(step, row));
    }
    return rules;
}

}  // namespace

int64_t refusal(const QjlEncode& operation) {
    Rules rules;
    rules.require(SIZES, [&] { return none_negative(operation.job_count, operation.blocks); }).require(ROOM, [&] {
        return is_aligned(operation.room);
    });
    for (int64_t i = 0; !rules && i < operation.job_count; ++i) rules.then(of_job(operation, operation.jobs[i]));
    return rules;
}

int64_t refusal(const QjlDecode& operation) {
    const int64_t dim = operation.dim, groups = operation.groups;
    return of_codes(operation.codes)
        .require(SIZES, [&] { return none_negative(operation.slots, operation.pairs); })
        .require(GROUPS, [&] { return groups > 0 && dim % groups == 0 && operation.codes.bytes % groups == 0; })
        .require(DIMS, [&] { return is_dim(dim / groups) && operation.head_dim > 0; })
        .require(MAPS, [&] { return operation.map || operation.head_dim == dim; })
        .require(TURNS, [&] {
            return !operation.pairs || (operation.mean && 2 * operation.pairs <= operation.head_dim);
        })
        .require(ROOM, [&] { return is_aligned(operation.room); });
}

int64_t refusal(const QjlStep& step) {
    return of_side(step.keys)
        .then(of_side(step.values))
        .then(of_turn(step.turn, step.keys))
        .require(SIZES, [&] { return none_negative(step.batch, step.heads, step.rows, step.splits); })
        .require(QUERIES, [&] { return step.queries > 0 && step.rows % step.queries == 0; })
        .require(SPLITS, [&] { return step.blocks_per_split > 0 || !step.splits; })
        .require(TYPES, [&] { return is_type(step.query_type) && is_type(step.out_type); })
        .then(of_exact(step.exact))
        .then([&] { return of_rows(step); })
        .require(ROOM, [&] { return is_aligned(step.room); });
}

int64_t refusal(const QjlFlashDecode& operation) {
    return Rules()
        .require(SIZES, [&] { return none_negative(operation.heads, operation.group, operation.tokens); })
        .require(HEAD_DIMS, [&] { return operation.head_dim > 0 && operation.head_dim % 8 == 0; });
}

int64_t refusal(const QjlPopcountScan& operation) {
    const int64_t m = operation.m;
    return Rules()
        .require(SIZES, [&] { return none_negative(operation.heads, operation.group, operation.tokens); })
        .require(BITS, [&] {
            return (m == 128 || (m % 256 == 0 && 0 < m && m <= 2048)) && operation.tokens % 4 == 0;
        });
}

int64_t refusal(const QjlRead& operation) {
    return Rules().require(SIZES, [&] { return operation.count >= 0; });
}

}  // namespace qjl

const char* qjl_refusal(int64_t returned) {
    const int64_t rule = -1 - returned;
    return 0 <= rule && rule < qjl::RULES ? qjl::WORDS[rule] : "the reason is not known";
}

void qjl_limits(QjlLimits* limits) { *limits = qjl::limits; }
