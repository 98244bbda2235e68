// A persistent pool of threads that sleep when there is nothing to do.
#pragma once

#include <cstdint>

namespace qjl {

constexpr int64_t MAX_THREADS = 64;

using Task = void (*)(const void* context, int64_t item, int worker);

// Runs `task` once for each item from 0 to items - 1 on at most `threads` threads, the caller's among them; returns
// when all are done. A worker's number is below min(threads, MAX_THREADS), and no two tasks share it at one time.
// One region runs on the pool at a time: others, nested ones too, run on their caller's thread.
void parallel_for(int64_t items, int64_t threads, Task task, const void* context);

}  // namespace qjl
