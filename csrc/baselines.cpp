#include "baselines.h"

#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "pool.h"
#include "refusals.h"

namespace qjl {
namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

constexpr int FLOATS = 8;
constexpr int QUAD = 4;           // query heads that share a load
constexpr int SUMS = 8;           // in flight: two multiply-adds per cycle, four cycles each
constexpr int BLOCK_DIMS = 2048;  // of a block of keys: a page, so that a block and the next ones stay in the L1 cache
constexpr int MOST_TOKENS = BLOCK_DIMS / FLOATS;
constexpr int LEAST_TOKENS = 8;
constexpr int LINE = 64;
constexpr float LOWEST = -1e30f;
constexpr float LOG2_E = 1.44269504f;

inline Floats load(const float* numbers) {
    Floats vector;
    memcpy(&vector, numbers, sizeof vector);
    return vector;
}

inline void store(float* numbers, Floats vector) { memcpy(numbers, &vector, sizeof vector); }

inline Floats all(float number) { return Floats{} + number; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Floats widened(const uint16_t* halves) {
#if defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
#else
#if defined(__aarch64__)
    typedef __fp16 Halves __attribute__((vector_size(16)));  // GCC 12 has no _Float16 there in C++
#else
    typedef _Float16 Halves __attribute__((vector_size(16)));
#endif
    Halves narrow;
    memcpy(&narrow, halves, sizeof narrow);
    return __builtin_convertvector(narrow, Floats);
#endif
}

// Four sums over the lanes of a vector each.
inline void store_totals(float* totals, const Floats& a, const Floats& b, const Floats& c, const Floats& d) {
#if defined(__AVX2__)
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    const Floats* vectors[QUAD] = {&a, &b, &c, &d};
    for (int i = 0; i < QUAD; ++i) {
        const Floats& v = *vectors[i];
        totals[i] = ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
    }
#endif
}

inline void prefetch(const uint16_t* rows, int64_t numbers) {
    for (int64_t i = 0; i < numbers; i += LINE / 2) __builtin_prefetch(rows + i, 0, 2);
}

// 2^x for x up to 0, to 2e-7.
inline Floats exp2_of(Floats x) {
    constexpr float ROUND = 12582912.0f;  // adding 1.5 * 2^23 leaves the nearest integer in the lowest bits
    x = larger(x, all(-126.0f));
    const Floats shifted = x + ROUND;
    const Floats rest = x - (shifted - ROUND);
    constexpr float COEFFICIENTS[] = {1.339887440e-3f, 9.618437357e-3f, 5.550332471e-2f,
                                      2.402264791e-1f, 6.931472028e-1f, 1.0f};
    Floats power = all(1.535336188e-4f);
    for (float coefficient : COEFFICIENTS) power = power * rest + coefficient;
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(power) + (reinterpret_cast<Ints>(shifted) << 23));
}

// Flash decode

// Query heads over the tokens so far: weighted values, and largest score and sum of weights of each head.
struct Softmax {
    float* query;  // [heads][dim], times scaling * log2(e)
    float* out;    // [heads][dim]
    float* top;    // [heads]
    float* sum;    // [heads]
};

struct Rows {
    const uint16_t *keys, *values;
    int64_t tokens, dim;
};

template <int HEADS, int TOKENS>
inline void score(const float* query, const uint16_t* keys, int64_t dim, float* scores) {
    Floats sums[TOKENS][HEADS] = {};
    for (int64_t d = 0; d < dim; d += FLOATS) {
        Floats key[TOKENS];
        for (int t = 0; t < TOKENS; ++t) key[t] = widened(keys + t * dim + d);
        for (int h = 0; h < HEADS; ++h) {
            const Floats q = load(query + h * dim + d);
            for (int t = 0; t < TOKENS; ++t) sums[t][h] += key[t] * q;
        }
    }
    for (int t = 0; t < TOKENS; ++t)
        store_totals(scores + t * QUAD, sums[t][0], sums[t][1 % HEADS], sums[t][2 % HEADS], sums[t][3 % HEADS]);
}

// scores[token][QUAD] of a block, while the next keys and values are on their way.
template <int HEADS>
void score_block(const float* query, const Rows& block, int64_t ahead, float* scores) {
    constexpr int TOKENS = SUMS / HEADS;
    const int64_t dim = block.dim;
    int64_t t = 0;
    for (; t + TOKENS <= block.tokens; t += TOKENS) {
        prefetch(block.keys + (t + ahead) * dim, TOKENS * dim);
        prefetch(block.values + (t + ahead / 2) * dim, TOKENS * dim);
        score<HEADS, TOKENS>(query, block.keys + t * dim, dim, scores + t * QUAD);
    }
    for (; t < block.tokens; ++t) score<HEADS, 1>(query, block.keys + t * dim, dim, scores + t * QUAD);
}

// Turns scores into weights; returns what earlier sums shrink by.
void weigh(float* scores, int64_t count, const Softmax& state, float* shrink) {
    Floats most = load(scores);
    for (int64_t i = FLOATS; i < count; i += FLOATS) most = larger(most, load(scores + i));
    Floats top, before;
    for (int i = 0; i < FLOATS; ++i) {
        before[i] = state.top[i % QUAD];
        top[i] = most[i] > most[(i + QUAD) % FLOATS] ? most[i] : most[(i + QUAD) % FLOATS];
    }
    top = larger(top, before);
    Floats total = {};
    for (int64_t i = 0; i < count; i += FLOATS) {
        const Floats weight = exp2_of(load(scores + i) - top);
        store(scores + i, weight);
        total += weight;
    }
    const Floats factor = exp2_of(before - top);
    for (int h = 0; h < QUAD; ++h) {
        shrink[h] = factor[h];
        state.top[h] = top[h];
        state.sum[h] = state.sum[h] * factor[h] + total[h] + total[h + QUAD];
    }
}

template <int HEADS, int VECTORS>
inline void mix(const float* weights, const float* shrink, const uint16_t* values, const Rows& block, float* out) {
    Floats sums[HEADS][VECTORS];
    for (int h = 0; h < HEADS; ++h)
        for (int v = 0; v < VECTORS; ++v) sums[h][v] = load(out + h * block.dim + v * FLOATS) * shrink[h];
    for (int64_t t = 0; t < block.tokens; ++t) {
        Floats value[VECTORS];
        for (int v = 0; v < VECTORS; ++v) value[v] = widened(values + t * block.dim + v * FLOATS);
        for (int h = 0; h < HEADS; ++h) {
            const Floats weight = all(weights[t * QUAD + h]);
            for (int v = 0; v < VECTORS; ++v) sums[h][v] += value[v] * weight;
        }
    }
    for (int h = 0; h < HEADS; ++h)
        for (int v = 0; v < VECTORS; ++v) store(out + h * block.dim + v * FLOATS, sums[h][v]);
}

template <int HEADS>
void mix_block(const float* weights, const float* shrink, const Rows& block, float* out) {
    constexpr int VECTORS = SUMS / HEADS;
    int64_t d = 0;
    for (; d + VECTORS * FLOATS <= block.dim; d += VECTORS * FLOATS)
        mix<HEADS, VECTORS>(weights, shrink, block.values + d, block, out + d);
    for (; d < block.dim; d += FLOATS) mix<HEADS, 1>(weights, shrink, block.values + d, block, out + d);
}

template <int HEADS>
void attend_block(const Rows& block, int64_t ahead, const Softmax& state) {
    alignas(32) float scores[MOST_TOKENS * QUAD], shrink[QUAD];
    const int64_t count = (block.tokens + 1) / 2 * FLOATS;
    store(scores + count - FLOATS, all(LOWEST));
    score_block<HEADS>(state.query, block, ahead, scores);
    weigh(scores, count, state, shrink);
    mix_block<HEADS>(scores, shrink, block, state.out);
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A group of query heads over one block, four at a time: from the second four on, it is in the L1 cache.
void attend_group(const Rows& block, int64_t ahead, int64_t group, const Softmax& state) {
    for (int64_t h = 0; h < group; h += QUAD) {
        const int64_t first = h * block.dim;
        const Softmax quad{state.query + first, state.out + first, state.top + h, state.sum + h};
        switch (smaller(QUAD, group - h)) {
            case 1: attend_block<1>(block, ahead, quad); break;
            case 2: attend_block<2>(block, ahead, quad); break;
            case 3: attend_block<3>(block, ahead, quad); break;
            default: attend_block<4>(block, ahead, quad);
        }
    }
}

// Each head's tokens in `splits` parts, so that all threads have equally much to do.
struct FlashDecode {
    const QjlFlashDecode& operation;
    int64_t splits;
    float* scratch;  // of each part: query, out, top, sum

    int64_t padded_group() const { return (operation.group + QUAD - 1) / QUAD * QUAD; }
    int64_t group_numbers() const { return operation.group * operation.head_dim; }
    int64_t part_numbers() const { return 2 * (group_numbers() + padded_group()); }

    Softmax state(int64_t head, int64_t split) const {
        float* query = scratch + (head * splits + split) * part_numbers();
        float* top = query + 2 * group_numbers();
        return {query, query + group_numbers(), top, top + padded_group()};
    }

    static void run_part(const void* context, int64_t part, int) {
        const auto& self = *static_cast<const FlashDecode*>(context);
        self.attend(part / self.splits, part % self.splits);
    }

    void attend(int64_t head, int64_t split) const {
        const QjlFlashDecode& all = operation;
        const Softmax part = state(head, split);
        start(all.query + head * group_numbers(), part);
        const int64_t size = block_tokens(), share = (all.tokens + splits - 1) / splits;
        const int64_t last = smaller((split + 1) * share, all.tokens);
        for (int64_t token = split * share; token < last; token += size) {
            const int64_t number = (head * all.tokens + token) * all.head_dim;
            const Rows block{all.keys + number, all.values + number, smaller(size, last - token), all.head_dim};
            attend_group(block, size, all.group, part);
        }
    }

    void start(const float* query, const Softmax& part) const {
        for (int64_t i = 0; i < group_numbers(); ++i) part.query[i] = query[i] * operation.scaling * LOG2_E;
        for (int64_t i = 0; i < group_numbers(); ++i) part.out[i] = 0;
        for (int64_t h = 0; h < padded_group(); ++h) part.top[h] = LOWEST;
        for (int64_t h = 0; h < padded_group(); ++h) part.sum[h] = 0;
    }

    int64_t block_tokens() const {
        const int64_t tokens = BLOCK_DIMS / operation.head_dim / LEAST_TOKENS * LEAST_TOKENS;
        return tokens ? tokens : LEAST_TOKENS;
    }

    void merge(int64_t head, int64_t h) const {
        const int64_t dim = operation.head_dim;
        float* out = operation.out + head * group_numbers() + h * dim;
        float top = LOWEST, sum = 0;
        for (int64_t split = 0; split < splits; ++split) top = __builtin_fmaxf(top, state(head, split).top[h]);
        memset(out, 0, dim * sizeof *out);
        for (int64_t split = 0; split < splits; ++split) {
            const Softmax part = state(head, split);
            const float factor = exp2_of(all(part.top[h] - top))[0];
            sum += part.sum[h] * factor;
            for (int64_t d = 0; d < dim; ++d) out[d] += part.out[h * dim + d] * factor;
        }
        for (int64_t d = 0; d < dim; ++d) out[d] /= sum;
    }
};

int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

// Popcount scan

constexpr int PLANES = 4;  // bits of a quantized query

// A query as lowest + step * (0 .. 15): a score is scale * (per_count * count + per_one * ones + offset).
struct QuantizedQuery {
    float per_count, per_one, offset;

    QuantizedQuery(const float* query, int64_t m, uint8_t* levels) {
        float lowest = query[0], highest = query[0];
        for (int64_t i = 1; i < m; ++i) {
            lowest = __builtin_fminf(lowest, query[i]);
            highest = __builtin_fmaxf(highest, query[i]);
        }
        const float step = (highest - lowest) / 15;
        const float inverse = step > 0 ? 1 / step : 0;
        int64_t total = 0;
        for (int64_t i = 0; i < m; ++i) total += levels[i] = static_cast<uint8_t>((query[i] - lowest) * inverse + 0.5f);
        per_count = 2 * step;
        per_one = 2 * lowest;
        offset = -(step * total + lowest * m);
    }
};

typedef float Four __attribute__((vector_size(16)));

inline Four load_four(const float* numbers) {
    Four vector;
    memcpy(&vector, numbers, sizeof vector);
    return vector;
}

constexpr int64_t MOST_BITS = 2048;

// Four quantized queries as bit planes; `count` gives each one's sum of levels under the set bits of four tokens.
#if defined(__AVX2__)
constexpr int64_t VECTOR_BITS = 256;

class Planes {
  public:
    // levels [QUAD][m]
    Planes(const uint8_t* levels, int64_t m) : m_(m) {
        for (int64_t bit = 0; bit < words() * VECTOR_BITS; ++bit)
            for (int h = 0; h < QUAD; ++h)
                for (int j = 0; j < PLANES; ++j) set(bit, h, j, levels[h * m + bit % m] >> j & 1);
        for (int j = 0; j < PLANES; ++j)
            for (int i = 0; i < 32; ++i) worth_[j].bytes[i] = static_cast<uint8_t>(__builtin_popcount(i & 15) << j);
    }

    void count(const uint8_t* signs, Four counts[QUAD]) const {
        __m128i tokens[QUAD];
        if (m_ < VECTOR_BITS) {
            for (int pair = 0; pair < 2; ++pair) {
                const __m256i sums = totals<1>(signs + pair * 32);
                tokens[2 * pair] = _mm256_castsi256_si128(sums);
                tokens[2 * pair + 1] = _mm256_extracti128_si256(sums, 1);
            }
        } else {
            for (int t = 0; t < QUAD; ++t) {
                const __m256i sums = totals_of(signs + t * m_ / 8);
                tokens[t] = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
            }
        }
        __m128 rows[QUAD];
        for (int t = 0; t < QUAD; ++t) rows[t] = _mm_cvtepi32_ps(tokens[t]);
        _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
        for (int h = 0; h < QUAD; ++h) counts[h] = rows[h];
    }

  private:
    union alignas(32) Vector {
        uint8_t bytes[32];
        __m256i all;
    };

    int64_t words() const { return (m_ + VECTOR_BITS - 1) / VECTOR_BITS; }

    void set(int64_t bit, int h, int j, uint8_t value) {
        Vector& half = planes_[bit / VECTOR_BITS][h][j][bit % 8 / 4];
        uint8_t& byte = half.bytes[bit % VECTOR_BITS / 8];
        byte = static_cast<uint8_t>(bit % 4 ? byte | value << bit % 4 : value);
    }

    __m256i totals_of(const uint8_t* signs) const {
        switch (words()) {
            case 1: return totals<1>(signs);
            case 2: return totals<2>(signs);
            default: return totals<0>(signs);
        }
    }

    // Of each query, in each half of the vector.
    template <int WORDS>
    __m256i totals(const uint8_t* signs) const {
        const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
        __m256i sums[QUAD] = {zero, zero, zero, zero};
        for (int64_t w = 0; w < (WORDS ? WORDS : words()); ++w) {
            const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(signs) + w);
            const __m256i low = _mm256_and_si256(bits, nibble);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble);
            for (int h = 0; h < QUAD; ++h) {
                __m256i bytes = zero;
                for (int j = 0; j < PLANES; ++j) {
                    const Vector* plane = planes_[w][h][j];
                    const __m256i lower = _mm256_shuffle_epi8(worth_[j].all, _mm256_and_si256(low, plane[0].all));
                    const __m256i upper = _mm256_shuffle_epi8(worth_[j].all, _mm256_and_si256(high, plane[1].all));
                    bytes = _mm256_add_epi8(bytes, _mm256_add_epi8(lower, upper));
                }
                sums[h] = _mm256_add_epi64(sums[h], _mm256_sad_epu8(bytes, zero));
            }
        }
        const __m256i first = _mm256_or_si256(sums[0], _mm256_slli_epi64(sums[1], 32));
        const __m256i second = _mm256_or_si256(sums[2], _mm256_slli_epi64(sums[3], 32));
        return _mm256_add_epi32(_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second));
    }

    int64_t m_;
    Vector worth_[PLANES];                                     // of a nibble's bits in each plane
    Vector planes_[MOST_BITS / VECTOR_BITS][QUAD][PLANES][2];  // lower nibbles, upper nibbles
};
#else
constexpr int64_t WORD_BITS = 64;

class Planes {
  public:
    // levels [QUAD][m]
    Planes(const uint8_t* levels, int64_t m) : words_(m / WORD_BITS), planes_{} {
        for (int64_t bit = 0; bit < m; ++bit)
            for (int h = 0; h < QUAD; ++h)
                for (int j = 0; j < PLANES; ++j) {
                    const uint64_t level = levels[h * m + bit];
                    planes_[h][j][bit / WORD_BITS] |= (level >> j & 1) << (bit % WORD_BITS);
                }
    }

    void count(const uint8_t* signs, Four counts[QUAD]) const {
        for (int t = 0; t < QUAD; ++t)
            for (int h = 0; h < QUAD; ++h) counts[h][t] = total(signs + t * words_ * 8, planes_[h]);
    }

  private:
    float total(const uint8_t* signs, const uint64_t (*planes)[MOST_BITS / WORD_BITS]) const {
        int64_t sum = 0;
        for (int64_t w = 0; w < words_; ++w) {
            uint64_t bits;
            memcpy(&bits, signs + w * 8, sizeof bits);
            for (int j = 0; j < PLANES; ++j) sum += int64_t{__builtin_popcountll(bits & planes[j][w])} << j;
        }
        return static_cast<float>(sum);
    }

    int64_t words_;
    uint64_t planes_[QUAD][PLANES][MOST_BITS / WORD_BITS];
};
#endif

// Up to four query heads of one KV head over all of its tokens.
void scan_quad(const QjlPopcountScan& all, int64_t head, int64_t first, int64_t count) {
    uint8_t levels[QUAD * MOST_BITS] = {};
    Four per_count[QUAD], per_one[QUAD], offset[QUAD];
    for (int64_t h = 0; h < count; ++h) {
        const float* query = all.query + (head * all.group + first + h) * all.m;
        const QuantizedQuery quantized(query, all.m, levels + h * all.m);
        per_count[h] = Four{} + quantized.per_count;
        per_one[h] = Four{} + quantized.per_one;
        offset[h] = Four{} + quantized.offset;
    }
    const Planes planes(levels, all.m);
    const uint8_t* signs = all.signs + head * all.tokens * all.m / 8;
    float* scores = all.scores + (head * all.group + first) * all.tokens;
    for (int64_t t = 0; t < all.tokens; t += QUAD) {
        Four counts[QUAD];
        planes.count(signs + t * all.m / 8, counts);
        const Four scale = load_four(all.scale + head * all.tokens + t);
        const Four ones = load_four(all.ones + head * all.tokens + t);
        for (int64_t h = 0; h < count; ++h) {
            const Four row = scale * (per_count[h] * counts[h] + per_one[h] * ones + offset[h]);
            memcpy(scores + h * all.tokens + t, &row, sizeof row);
        }
    }
}

void scan_head(const void* context, int64_t head, int) {
    const auto& operation = *static_cast<const QjlPopcountScan*>(context);
    for (int64_t h = 0; h < operation.group; h += QUAD)
        scan_quad(operation, head, h, smaller(QUAD, operation.group - h));
}

// Read

constexpr int64_t STREAMS = 8;  // at once: one alone waits for its next page

struct Read {
    const QjlRead& operation;
    int64_t parts;
};

void read_part(const void* context, int64_t part, int) {
    const auto& [operation, parts] = *static_cast<const Read*>(context);
    const int64_t numbers = operation.count / parts / STREAMS / (4 * FLOATS) * (4 * FLOATS);
    const float* first = operation.numbers + part * STREAMS * numbers;
    Floats sums[4] = {};
    for (int64_t i = 0; i < numbers; i += 4 * FLOATS)
        for (int64_t stream = 0; stream < STREAMS; ++stream)
            for (int v = 0; v < 4; ++v) sums[v] += load(first + stream * numbers + i + v * FLOATS);
    store_totals(operation.sums + part * QUAD, sums[0], sums[1], sums[2], sums[3]);
}

}  // namespace
}  // namespace qjl

using namespace qjl;

int qjl_baselines_run_here() {
#if defined(__AVX2__)
    return runs_avx2();
#else
    return 1;
#endif
}

int64_t qjl_flash_decode(const QjlFlashDecode* operation, int64_t threads) {
    if (const int64_t refused = refusal(*operation)) return refused;
    const int64_t splits = threads / common_divisor(operation->heads, threads), parts = operation->heads * splits;
    FlashDecode decode{*operation, splits, nullptr};
    void* scratch = nullptr;
    if (posix_memalign(&scratch, LINE, parts * decode.part_numbers() * sizeof(float))) abort();
    decode.scratch = static_cast<float*>(scratch);
    parallel_for(parts, threads, FlashDecode::run_part, &decode);
    for (int64_t head = 0; head < operation->heads; ++head)
        for (int64_t h = 0; h < operation->group; ++h) decode.merge(head, h);
    free(scratch);
    return 0;
}

int64_t qjl_popcount_scan(const QjlPopcountScan* operation, int64_t threads) {
    if (const int64_t refused = refusal(*operation)) return refused;
    parallel_for(operation->heads, threads, scan_head, operation);
    return 0;
}

int64_t qjl_read(const QjlRead* operation, int64_t threads) {
    if (const int64_t refused = refusal(*operation)) return refused;
    const Read read{*operation, threads};
    parallel_for(threads, threads, read_part, &read);
    return 0;
}
