// Calls functions of a shared library for another process, on that process's own memory.
//
// A page that is touched for the first time raises SIGSEGV: it is fetched from the caller and put at the same address.
// When the function returns, what it changed goes back and the pages are dropped. bridge.py is the other side.
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace {

constexpr uintptr_t PAGE = 4096;
constexpr size_t UNIT = 8;  // bytes that have one owner: the size of what malloc gave to the next may change meanwhile

// What the server says, before `size` bytes.
struct Message {
    enum Kind : int64_t { FETCH, CHANGE, RETURN } kind;
    int64_t address, size;
};

std::map<uintptr_t, uint8_t*> fetched;  // where each page lies, and a copy of it as it came
std::atomic_flag is_fetching;

[[noreturn]] void give_up(const char* why) {
    std::perror(why);
    _exit(1);
}

void receive(void* to, size_t size) {
    for (auto* at = static_cast<uint8_t*>(to); size > 0;) {
        const ssize_t count = read(STDIN_FILENO, at, size);
        if (count == 0) _exit(0);
        if (count < 0) give_up("read");
        at += count, size -= count;
    }
}

void send(const void* from, size_t size) {
    for (auto* at = static_cast<const uint8_t*>(from); size > 0;) {
        const ssize_t count = write(STDOUT_FILENO, at, size);
        if (count < 0) give_up("write");
        at += count, size -= count;
    }
}

void send(Message message) { send(&message, sizeof message); }

uint8_t* new_page() {
    void* page = mmap(nullptr, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) give_up("mmap");
    return static_cast<uint8_t*>(page);
}

// Moved when it is complete, because other threads may be waiting to read it.
void fetch(uintptr_t page) {
    uint8_t *arriving = new_page(), *copy = new_page();
    send({Message::FETCH, int64_t(page), int64_t(PAGE)});
    receive(arriving, PAGE);
    std::memcpy(copy, arriving, PAGE);
    if (mremap(arriving, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, page) == MAP_FAILED) give_up("mremap");
    fetched[page] = copy;
}

void on_fault(int, siginfo_t* fault, void*) {
    const uintptr_t page = reinterpret_cast<uintptr_t>(fault->si_addr) / PAGE * PAGE;
    while (is_fetching.test_and_set()) usleep(10);
    if (!fetched.contains(page)) fetch(page);
    is_fetching.clear();
}

void return_changes(const uint8_t* page, const uint8_t* before) {
    const auto is_changed = [&](size_t at) { return std::memcmp(page + at, before + at, UNIT) != 0; };
    for (size_t at = 0; at < PAGE; at += UNIT) {
        const size_t first = at;
        while (at < PAGE && is_changed(at)) at += UNIT;
        if (at == first) continue;
        send({Message::CHANGE, reinterpret_cast<int64_t>(page + first), int64_t(at - first)});
        send(page + first, at - first);
    }
}

void return_pages() {
    for (const auto& [address, copy] : fetched) {
        auto* page = reinterpret_cast<uint8_t*>(address);
        if (std::memcmp(page, copy, PAGE) != 0) return_changes(page, copy);
        munmap(page, PAGE);
        munmap(copy, PAGE);
    }
    fetched.clear();
}

struct Request {
    char function[64];
    int64_t arguments[2];
    int64_t returns_text;
};

void serve(void* library, const Request& request) {
    using Function = int64_t (*)(int64_t, int64_t);
    const auto function = reinterpret_cast<Function>(dlsym(library, request.function));
    if (!function) give_up(request.function);
    const int64_t result = function(request.arguments[0], request.arguments[1]);
    return_pages();
    const auto* text = reinterpret_cast<const char*>(request.returns_text ? result : 0);
    const size_t size = text ? std::strlen(text) : 0;
    send({Message::RETURN, result, int64_t(size)});
    send(text, size);
}

}  // namespace

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, nullptr);
    for (Request request;;) {
        receive(&request, sizeof request);
        serve(library, request);
    }
}
