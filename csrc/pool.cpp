#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>

namespace qjl {
namespace {

constexpr int SPINS = 300;  // some ten microseconds

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void wait_while(const std::atomic<uint32_t>& value, uint32_t unwanted) {
    for (int spin = 0; spin < SPINS && value.load(std::memory_order_acquire) == unwanted; ++spin) pause();
    value.wait(unwanted, std::memory_order_acquire);
}

struct alignas(64) Ticket {
    std::atomic<uint32_t> issued{0};
};

constexpr uint32_t CLOSED = 1u << 31;

// A worker that wakes late finds its region closed, so nobody waits for it.
struct Region {
    Task task;
    const void* context;
    int64_t items, threads;
    alignas(64) std::atomic<int64_t> next;
    alignas(64) std::atomic<uint32_t> inside{CLOSED};  // workers, and whether others are too late

    void run(int worker) {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) task(context, item, worker);
    }

    void open() { inside.fetch_and(~CLOSED, std::memory_order_release); }

    void close() {
        inside.fetch_or(CLOSED, std::memory_order_acq_rel);
        for (uint32_t now; (now = inside.load(std::memory_order_acquire)) != CLOSED;) wait_while(inside, now);
    }

    void visit(int worker) {
        const bool is_open = !(inside.fetch_add(1, std::memory_order_acquire) & CLOSED);
        if (is_open && worker < threads) run(worker);
        if (inside.fetch_sub(1, std::memory_order_acq_rel) == CLOSED + 1) inside.notify_one();
    }
};

std::atomic<bool> taken{false};
Region region;
Ticket tickets[MAX_THREADS];
int64_t started = 1;  // threads, a caller's included

void work(int worker, uint32_t seen) {
    for (;;) {
        wait_while(tickets[worker].issued, seen);
        seen = tickets[worker].issued.load(std::memory_order_acquire);
        region.visit(worker);
    }
}

// Threads do not survive a fork: the child starts its own.
void forget_threads() {
    started = 1;
    region.inside.store(CLOSED);
    taken.store(false);
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_threads);

// Makes sure of up to `wanted` threads and returns how many there are.
int64_t start_threads(int64_t wanted) {
    try {
        for (; started < wanted; ++started)
            std::thread(work, static_cast<int>(started), tickets[started].issued.load()).detach();
    } catch (const std::system_error&) {  // the system gives no more: those there are do the work
    }
    return std::min(started, wanted);
}

void run_here(int64_t items, Task task, const void* context) {
    for (int64_t item = 0; item < items; ++item) task(context, item, 0);
}

void run_on_pool(int64_t items, int64_t threads, Task task, const void* context) {
    region.task = task;
    region.context = context;
    region.items = items;
    region.threads = start_threads(threads);
    region.next.store(0, std::memory_order_relaxed);
    region.open();
    for (int64_t worker = 1; worker < region.threads; ++worker) {
        tickets[worker].issued.fetch_add(1, std::memory_order_release);
        tickets[worker].issued.notify_one();
    }
    region.run(0);
    region.close();
}

}  // namespace

void parallel_for(int64_t items, int64_t threads, Task task, const void* context) {
    threads = std::min({items, threads, MAX_THREADS});
    if (threads <= 1 || taken.exchange(true, std::memory_order_acquire)) return run_here(items, task, context);
    run_on_pool(items, threads, task, context);
    taken.store(false, std::memory_order_release);
}

}  // namespace qjl
