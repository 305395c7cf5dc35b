// A launch: its limits, its blocks in random order over the host's threads, and the record of kernels that were
// launched.
//
// The schedule is a function of the seed (environment variable SIMT_SEED, a number; 1 without it), the launch and the
// block; which of the host's threads has which block is not, and blocks that run at the same time do so in truth.
// SIMT_THREADS is how many of those there are (all of the machine without it); with 1 everything is repeated exactly.
//
// SIMT_KERNELS, if set, names a file to which the names of the kernels launched are appended when the program ends.
#pragma once
#include <cxxabi.h>

#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <typeinfo>

#include "dev/simt/memory.h"
#include "dev/simt/streams.h"
#include "kernels/cpu/parallel.h"

namespace simt {

// ----------------------------------------------------------------------------
// names

template <auto K>
struct Named {};

// The compiler's own demangler writes `simt::Named<&(void f<X, 4>(X*, int))>` or `simt::Named<&f>`. The names in them
// are f<X, 4> and f, as `nm -C` shows them, up to the arguments.
inline std::string kernel_name(const char* mangled) {
    int status = 0;
    char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
    std::string s = text ? text : mangled;
    free(text);
    const size_t begin = s.find('&');
    s.erase(0, begin == std::string::npos ? 0 : begin + 1);
    s.erase(0, s.compare(0, 1, "(") == 0 ? 1 : 0);
    s.erase(0, s.compare(0, 5, "void ") == 0 ? 5 : 0);
    const std::string unnamed = "(anonymous namespace)";
    int depth = 0;
    for (size_t i = 0; i < s.size(); i++) {
        if (s.compare(i, unnamed.size(), unnamed) == 0) {
            i += unnamed.size() - 1;
        } else if (depth == 0 && (s[i] == '(' || s[i] == '>')) {
            s.erase(i);
        } else {
            depth += s[i] == '<' ? 1 : s[i] == '>' ? -1 : 0;
        }
    }
    return s;
}

struct Names {
    std::mutex lock;
    std::set<std::string> all;
};
inline Names& names() {
    static Names* n = new Names;  // outlives every exit function
    return *n;
}

inline void names_write() {
    const char* path = getenv("SIMT_KERNELS");
    FILE* f = path && *path ? fopen(path, "a") : nullptr;
    if (!f) {
        return;
    }
    std::string text;
    for (const std::string& name : names().all) {
        text += name + "\n";
    }
    fwrite(text.data(), 1, text.size(), f);  // at once: several programs may append
    fclose(f);
}

inline const char* kernel_record(const char* mangled) {
    static const bool at_exit = atexit(names_write) == 0;
    (void)at_exit;
    const std::lock_guard<std::mutex> guard(names().lock);
    return names().all.insert(kernel_name(mangled)).first->c_str();
}

// ----------------------------------------------------------------------------
// running

inline int host_threads() {
    const char* text = getenv("SIMT_THREADS");
    const int n = text ? atoi(text) : int(std::thread::hardware_concurrency());
    return n > 1 ? n : 1;
}

// Each OS thread has the room for one block, kept from launch to launch.
inline Block& own_block() {
    static thread_local std::unique_ptr<Block> b(new Block);
    return *b;
}

inline void check_launch(const Launch& l) {
    const dim3 &g = l.grid, &b = l.block;
    const uint64_t threads = uint64_t(b.x) * b.y * b.z;
    const bool whole = g.x >= 1 && g.y >= 1 && g.z >= 1 && threads >= 1;
    if (current) {
        fault("a kernel launches a kernel");
    }
    if (!whole || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535) {
        fault("kernel %s: grid (%u, %u, %u) of blocks (%u, %u, %u) (%s:%d); a grid has 1 to 2147483647, 65535, 65535",
              l.kernel, g.x, g.y, g.z, b.x, b.y, b.z, l.file, l.line);
    }
    if (threads > MAX_THREADS || b.x > 1024 || b.y > 1024 || b.z > 64) {
        fault("kernel %s: blocks of (%u, %u, %u) threads (%s:%d); a block has at most %u, and (1024, 1024, 64)",
              l.kernel, b.x, b.y, b.z, l.file, l.line, MAX_THREADS);
    }
    if (l.shared > SHARED_LIMIT) {
        fault("kernel %s: %zu bytes of shared memory (%s:%d); a block has at most %zu", l.kernel, l.shared, l.file,
              l.line, SHARED_LIMIT);
    }
}

// A grid or block as LAUNCH is given it: a number, or dim3.
inline dim3 extent(const dim3& n) {
    return n;
}
template <class T>
inline typename std::enable_if<std::is_integral<T>::value, dim3>::type extent(T n) {
    if (n < 0 || uint64_t(n) > 0xffffffffu) {
        fault("a grid or block of %lld", static_cast<long long>(n));
    }
    return dim3(unsigned(n));
}

inline void launch_run(const Launch& l) {
    uint64_t random = mix(schedule_seed() * 0x9e3779b97f4a7c15ull + l.number) | 1;
    const uint64_t blocks = uint64_t(l.grid.x) * l.grid.y * l.grid.z;
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; i++) {  // Fisher and Yates, built from the front
        const uint64_t j = (uint64_t(random_next(random)) << 32 | random_next(random)) % (i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    const bool few = blocks * l.block.x * l.block.y * l.block.z <= 512;  // waking a thread costs more than these
    parallel_tasks(few ? 1 : host_threads(), size_t(blocks), [&](size_t i, int) {
        const uint64_t at = order[i];
        const uint3 index = {unsigned(at % l.grid.x), unsigned(at / l.grid.x % l.grid.y),
                             unsigned(at / l.grid.x / l.grid.y)};
        block_run(own_block(), l, index, mix(random + at) | 1);
    });
    check_memory(l);
}

template <class T>
inline void check_argument(const Launch&, int, const T&) {}
template <class T>
inline void check_argument(const Launch& l, int position, T* const& p) {
    if (p && !memory_find(p, 0)) {
        fault("kernel %s: argument %d points to %p, which is no memory of the device (%s:%d)", l.kernel, position,
              static_cast<const volatile void*>(p), l.file, l.line);
    }
}

inline uint64_t& launches() {
    static uint64_t n = 0;
    return n;
}

// What LAUNCH calls: launcher<K>(K, stream, settings)(arguments...). The arguments are converted as in a call, and
// every thread has its own copies. What is wrong with the launch itself is said at once, the rest when its turn comes.
template <auto K, class... P>
auto launcher(void (*)(P...), CUstream_st* stream, Launch l) {
    static const char* const name = kernel_record(typeid(Named<K>).name());
    l.kernel = name;
    l.number = launches()++;
    l.run = [](const void* a) { std::apply(K, *static_cast<const std::tuple<P...>*>(a)); };
    check_launch(l);
    return [l, stream](P... p) {
        int position = 0;
        (check_argument(l, ++position, p), ...);
        (void)position;
        const std::tuple<P...> arguments(p...);
        enqueue(stream, [l, arguments]() {
            Launch now = l;
            now.arguments = &arguments;
            launch_run(now);
        });
    };
}

}  // namespace simt

// The kernels launched by this process so far, each instantiation once, in order of their names.
inline std::vector<std::string> simt_launched_kernels() {
    const std::lock_guard<std::mutex> guard(simt::names().lock);
    return std::vector<std::string>(simt::names().all.begin(), simt::names().all.end());
}
