// Chooses the instruction set and shares the work of each operation out over threads.
#ifdef QJL_HAS_AVX2
#include <cpuid.h>
#endif
#if defined(QJL_HAS_NEONDOT) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "refusals.h"

namespace qjl {

// Instruction sets

#ifdef QJL_HAS_AVX2
bool runs_avx2() {
    unsigned a, b, c, d;  // Clang's __builtin_cpu_supports does not know F16C
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

namespace {

#ifdef QJL_HAS_AVXVNNI
bool runs_avxvnni() {
    unsigned a, b, c, d;  // nor does it know AVX-VNNI
    return runs_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVXVNNI);
}
#endif

#ifdef QJL_HAS_NEONDOT
bool runs_neondot() {
#if defined(__APPLE__)
    return true;
#elif defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return false;
#endif
}
#endif

std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> tables = {&scalar_kernels};
#ifdef QJL_HAS_AVX2
    if (runs_avx2()) tables.push_back(&avx2_kernels);
#endif
#ifdef QJL_HAS_AVXVNNI
    if (runs_avxvnni()) tables.push_back(&avxvnni_kernels);
#endif
#ifdef QJL_HAS_AVX512
    const bool has_avx512 = runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
    if (has_avx512) tables.push_back(&avx512_kernels);
#endif
#ifdef QJL_HAS_NEON
    tables.push_back(&neon_kernels);
#endif
#ifdef QJL_HAS_NEONDOT
    if (runs_neondot()) tables.push_back(&neondot_kernels);
#endif
    return tables;
}

const std::vector<const Kernels*>& supported() {
    static const std::vector<const Kernels*> tables = runnable();
    return tables;
}

std::atomic<const Kernels*> selected{nullptr};

const Kernels& kernels() {
    const Kernels* table = selected.load(std::memory_order_relaxed);
    return table ? *table : *supported().back();
}

// Packed codes

constexpr int64_t PARTS_PER_THREAD = 4;  // so that a thread held up elsewhere leaves its share to the others

template <class Function>
struct OverBlocks {
    const Function& function;
    int64_t blocks, size;

    static void run_part(const void* context, int64_t part, int worker) {
        const auto& self = *static_cast<const OverBlocks*>(context);
        const int64_t first = part * self.size;
        self.function(Range{first, std::min(first + self.size, self.blocks)}, worker);
    }
};

// Calls `function(range, worker)` on ranges that make up all blocks.
template <class Function>
void over_blocks(const QjlCodes& codes, int64_t threads, const Function& function) {
    const int64_t blocks = codes.batch * codes.heads * codes.blocks;
    const int64_t most_parts = threads > 1 ? threads * PARTS_PER_THREAD : 1;
    const int64_t size = std::max<int64_t>(1, (blocks + most_parts - 1) / most_parts);
    const OverBlocks<Function> work{function, blocks, size};
    parallel_for((blocks + size - 1) / size, threads, OverBlocks<Function>::run_part, &work);
}

// Every worker has room of its own

int64_t workers(int64_t threads) { return std::clamp<int64_t>(threads, 1, MAX_THREADS); }

// Encoding

constexpr int64_t BLOCKS_AT_ONCE = 8;  // of one head, which share what a worker makes of its map

struct Encoding {
    const QjlEncode& all;
    const Kernels& table;
    int64_t room;  // floats of one worker
    std::atomic<int64_t> not_finite;

    struct Item {
        int64_t job, head, first;
    };
    std::vector<Item> items;

    explicit Encoding(const QjlEncode& all) : all(all), table(kernels()), room(0), not_finite(all.job_count) {
        for (int64_t job = 0; job < all.job_count; ++job) {
            room = std::max(room, table.encode_room(all.jobs[job]));
            for (int64_t head = 0; head < heads_of(all.jobs[job]); ++head)
                for (int64_t first = 0; first < all.blocks; first += BLOCKS_AT_ONCE) items.push_back({job, head, first});
        }
    }

    static int64_t heads_of(const QjlJob& job) { return job.recipe ? job.recipe->codes.heads : job.grid->codes.heads; }

    static void run_item(const void* context, int64_t index, int worker) {
        auto& self = *static_cast<Encoding*>(const_cast<void*>(context));
        const Item& item = self.items[index];
        const Range range{item.first, std::min(item.first + BLOCKS_AT_ONCE, self.all.blocks)};
        float* const room = self.all.room + worker * self.room;
        if (self.table.encode(self.all, self.all.jobs[item.job], item.head, range, room)) return;
        for (int64_t known = self.not_finite; item.job < known;)
            if (self.not_finite.compare_exchange_weak(known, item.job)) break;
    }
};

// The fused decode step

// Less work than this for each thread does not pay for waking it.
constexpr int64_t PAIRS_PER_THREAD = 4;  // of batch row and KV head, apart from their packed tokens
constexpr int64_t BLOCKS_PER_THREAD = 48;  // of all pairs

int64_t worth_waking(int64_t threads, int64_t work, int64_t work_per_thread) {
    return std::min(threads, (work + work_per_thread - 1) / work_per_thread);
}

int64_t blocks_of(const QjlStep& step) {
    int64_t tokens = 0;
    for (int64_t row = 0; row < step.batch; ++row) {
        tokens += std::max(0, step.of_rows->lengths[row] - step.of_rows->skip[row]);
    }
    return step.heads * (tokens + BLOCK - 1) / BLOCK;
}

// Puts the fresh keys or values of a row where its slots say; those before its first slot and without one are left out.
void put_fresh(const QjlStep& step, int64_t row, const void* fresh, const int64_t (&stride)[3], void* pool,
               const int64_t (&pool_stride)[2], int64_t dim) {
    const int64_t size = step.exact.dtype == QJL_FLOAT32 ? 4 : 2, first = step.of_rows->counts[row] - step.queries;
    const int32_t* slots = step.of_rows->slots + row * step.of_rows->room;
    for (int64_t token = std::max<int64_t>(0, -first); token < step.queries; ++token) {
        const int64_t slot = slots[first + token];
        for (int64_t head = 0; slot >= 0 && head < step.heads; ++head) {
            const int64_t from = row * stride[0] + head * stride[1] + token * stride[2];
            const int64_t to = head * pool_stride[0] + slot * pool_stride[1];
            std::memcpy(static_cast<uint8_t*>(pool) + to * size, static_cast<const uint8_t*>(fresh) + from * size,
                        dim * size);
        }
    }
}

void put_fresh(const QjlStep& step) {
    const QjlExact& pool = step.exact;
    for (int64_t row = 0; row < step.batch; ++row) {
        put_fresh(step, row, step.fresh.keys, step.fresh.key_stride, pool.keys, pool.key_stride, step.keys.head_dim);
        put_fresh(step, row, step.fresh.values, step.fresh.value_stride, pool.values, pool.value_stride,
                  step.values.head_dim);
    }
}

struct OverItems {
    const QjlStep& step;
    void (*kernel)(const QjlStep&, int64_t, int);

    static void run(const void* context, int64_t item, int worker) {
        const auto& self = *static_cast<const OverItems*>(context);
        self.kernel(self.step, item, worker);
    }
};

}  // namespace
}  // namespace qjl

using namespace qjl;

const char* qjl_supported() {
    static const std::string names = [] {
        std::string joined;
        for (const Kernels* table : supported()) joined.append(table->name).append(" ");
        return joined;
    }();
    return names.c_str();
}

const char* qjl_selected() { return kernels().name; }

int qjl_select(const char* name) {
    for (const Kernels* table : supported()) {
        if (std::strcmp(table->name, name) == 0) {
            selected.store(table);
            return 0;
        }
    }
    return 1;
}

int64_t qjl_encode(QjlEncode* operation, int64_t threads) {
    if (const int64_t refused = refusal(*operation)) return refused;
    Encoding encoding(*operation);
    const int64_t needed = workers(threads) * encoding.room * int64_t(sizeof(float));
    if (operation->room_bytes < needed) return needed;
    parallel_for(int64_t(encoding.items.size()), threads, Encoding::run_item, &encoding);
    const int64_t first = encoding.not_finite;
    operation->not_finite = first < operation->job_count ? first : -1;
    return 0;
}

int64_t qjl_decode(const QjlDecode* operation, int64_t threads) {
    if (const int64_t refused = refusal(*operation)) return refused;
    const Kernels& table = kernels();
    const int64_t room = table.decode_room(*operation), needed = workers(threads) * room * int64_t(sizeof(float));
    if (operation->room_bytes < needed) return needed;
    over_blocks(operation->codes, threads, [&](Range range, int worker) {
        table.decode(*operation, range, operation->room + worker * room);
    });
    return 0;
}

int64_t qjl_step(const QjlStep* step, int64_t threads) {
    if (const int64_t refused = refusal(*step)) return refused;
    const Kernels& table = kernels();
    const int64_t needed = table.step_room(*step, workers(threads));
    if (step->room_bytes < needed) return needed;
    if (step->fresh.keys) put_fresh(*step);
    const int64_t pairs = step->batch * step->heads;
    const int64_t few = worth_waking(threads, pairs, PAIRS_PER_THREAD);
    const OverItems ask{*step, table.step_ask}, packed{*step, table.step_packed}, finish{*step, table.step_finish};
    parallel_for(pairs, few, OverItems::run, &ask);
    parallel_for(pairs * step->splits, worth_waking(threads, blocks_of(*step), BLOCKS_PER_THREAD), OverItems::run,
                 &packed);
    if (!step->scores) parallel_for(pairs, few, OverItems::run, &finish);
    return 0;
}
