// One block of a launch: its threads, their warps, who runs next, barriers, warp collectives, shared memory; and
// `fault`, which ends the program with a message that names kernel, block and thread. Which blocks there are: launch.h.
//
// A CUDA thread runs on a fiber of the OS thread that has its block, until it waits (barrier, collective) or returns.
// Then another lane of the same warp runs, and only when none can is a warp drawn at random: so one warp runs ahead of
// the others as far as its waits let it, which is the order that shows missing barriers. Nothing interrupts a thread
// between two waits, so a thread that spins for another one's write spins for ever.
//
//   current -> Thread (lane of) -> Warp (of) -> Block -> Launch
#pragma once
#include <signal.h>

#include <cstdarg>

#include "dev/simt/fibers.h"
#include "dev/simt/types.h"

namespace simt {

constexpr unsigned MAX_THREADS = 1024;     // of a block
constexpr size_t STATIC_LIMIT = 48 << 10;  // bytes of SHARED arrays of a block
constexpr size_t SHARED_LIMIT = 99 << 10;  // with the dynamic part
constexpr size_t SHARED_FENCE = 128;       // bytes behind each piece of shared memory
constexpr unsigned char POISON = 0xff;     // a NaN in every floating-point type

// What a thread waits in. Two are one place when it is the same operation at the same line of source.
struct Place {
    const char* operation;
    const char* file;
    int line;
};
inline bool same_place(const Place& a, const Place& b) {
    return a.line == b.line && (a.operation == b.operation || strcmp(a.operation, b.operation) == 0) &&
           (a.file == b.file || strcmp(a.file, b.file) == 0);
}

struct Launch {
    const char* kernel;
    const char* file;  // of LAUNCH
    int line;
    dim3 grid, block;
    size_t shared;
    void (*run)(const void*) = nullptr;  // calls the kernel with the arguments
    const void* arguments = nullptr;
    uint64_t number = 0;  // launches before this one
};

struct Block;
struct Warp;

// A copy that was begun and not waited for.
struct Copy {
    char* to;
    const char* from;  // nullptr: zeros
    uint32_t bytes, group;
};

struct Thread {
    uint3 index;
    int lane;
    Warp* warp;
    Block* block;
    Fiber* fiber;  // nullptr: not begun
    bool ended;
    Place waits;  // what it waits in; operation nullptr: it does not
    uint32_t mask;
    uint32_t group;  // copy groups committed
    std::vector<Copy> copies;
};

// Lanes that have come to a collective of the lanes `mask`. A warp may have several, of different masks.
struct Meeting {
    uint32_t mask, here;
    Place place;
};

struct Warp {
    uint32_t live;   // lanes that exist and have not returned
    uint32_t ready;  // lanes that may run
    uint32_t at_barrier;
    int rotation;  // the order of its lanes: from this one on, up or down
    bool down;
    int meetings;
    Meeting meeting[32];
    void* arguments[32];  // of each lane's collective
};

struct SharedArray {
    const void* site;  // of SHARED
    char* data;
    size_t bytes;
};

struct Block {
    const Launch* launch;
    uint3 index;
    Fibers fibers;
    Thread threads[MAX_THREADS];
    Warp warps[MAX_THREADS / 32];
    unsigned count;  // threads
    unsigned live;
    unsigned at_barrier;
    Place barrier;
    uint32_t ready_warps;  // those with a lane that may run; the running one may have none
    int running;           // warp; -1: to be drawn
    uint64_t random;
    char* dynamic = nullptr;  // dynamic shared memory: SHARED_LIMIT bytes and a fence
    char* statics = nullptr;  // SHARED arrays, each with a fence
    size_t statics_used;      // bytes of it, with fences
    size_t statics_bytes;     // without
    std::vector<SharedArray> arrays;
    Block() = default;
    Block(const Block&) = delete;
    ~Block() {
        free(dynamic);
        free(statics);
    }
};

// __thread, not thread_local: then it is read without a call that asks whether it was made.
inline __thread Thread* current = nullptr;

// ----------------------------------------------------------------------------
// faults

[[noreturn]] inline void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

inline void print_thread(const Thread& t) {
    const Block& b = *t.block;
    fprintf(stderr, "simt: kernel %s, block (%u, %u, %u), thread (%u, %u, %u), lane %d: ", b.launch->kernel, b.index.x,
            b.index.y, b.index.z, t.index.x, t.index.y, t.index.z, t.lane);
}

// The program is in no state to go on: other threads of the kernel are in the middle of their work.
[[noreturn]] inline void fault(const char* format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    fflush(stdout);
    if (current) {
        print_thread(*current);
    } else {
        fprintf(stderr, "simt: ");
    }
    fprintf(stderr, "%s\n", text);
    if (current) {
        const Launch& l = *current->block->launch;
        fprintf(stderr, "simt: launched at %s:%d, grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory\n",
                l.file, l.line, l.grid.x, l.grid.y, l.grid.z, l.block.x, l.block.y, l.block.z, l.shared);
    }
    fflush(stderr);
    abort();
}

[[noreturn]] inline void fault_deadlock(Block& b) {
    fflush(stdout);
    fprintf(stderr, "simt: kernel %s, block (%u, %u, %u): deadlock, every thread waits:\n", b.launch->kernel, b.index.x,
            b.index.y, b.index.z);
    for (unsigned w = 0; w < (b.count + 31) / 32; w++) {
        uint32_t left = b.warps[w].live;
        while (left != 0) {
            const Thread& first = b.threads[w * 32 + unsigned(__builtin_ctz(left))];
            uint32_t lanes = 0;
            for (int i = 0; i < 32; i++) {
                const Thread& t = b.threads[w * 32 + unsigned(i)];
                if (left >> i & 1 && t.mask == first.mask && same_place(t.waits, first.waits)) {
                    lanes |= 1u << i;
                }
            }
            left &= ~lanes;
            fprintf(stderr, "simt:   warp %u, lanes %08x: %s (%s:%d)", w, lanes, first.waits.operation,
                    first.waits.file, first.waits.line);
            if (first.mask != 0) {
                fprintf(stderr, " of lanes %08x", first.mask);
            }
            fprintf(stderr, "\n");
        }
    }
    fflush(stderr);
    abort();
}

// An access that the machine refuses: no memory there, a vector access that is not aligned (then the address may be
// shown as nil), or the page below the thread's stack.
inline void on_signal(int number, siginfo_t* info, void*) {
    signal(number, SIG_DFL);
    if (current) {
        const char* at = static_cast<const char*>(info->si_addr);
        const Fiber* f = current->fiber;
        if (f && at < f->stack && at >= f->stack - STACK_GUARD) {
            fault("the stack of %zu KB is used up", STACK_BYTES >> 10);
        }
        fault("access to memory that is not there, or not aligned to its size: %p", info->si_addr);
    }
}

// The message of a thread that faults in the machine's sense; sanitizers have their own. On a stack of its own, since
// the thread's may be the trouble.
inline void watch_signals() {
#if !defined(SIMT_ASAN) && !defined(SIMT_TSAN)
    static thread_local std::vector<char> room(64 << 10);
    stack_t stack = {};
    stack.ss_sp = room.data();
    stack.ss_size = room.size();
    sigaltstack(&stack, nullptr);
    for (int number : {SIGSEGV, SIGBUS}) {
        struct sigaction before = {}, action = {};
        sigaction(number, nullptr, &before);
        if (!(before.sa_flags & SA_SIGINFO) && before.sa_handler == SIG_DFL) {
            action.sa_sigaction = on_signal;
            action.sa_flags = SA_SIGINFO | SA_ONSTACK;
            sigaction(number, &action, nullptr);
        }
    }
#endif
}

// ----------------------------------------------------------------------------
// who runs

// xorshift64* (Vigna 2016): any sequence will do that is the same for the same seed.
inline uint32_t random_next(uint64_t& state) {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return uint32_t(state * 0x2545f4914f6cdd1dull >> 32);
}

inline void warp_shuffle(Block& b, Warp& w) {
    const uint32_t r = random_next(b.random);
    w.rotation = int(r & 31);
    w.down = r & 32;
}

// Takes the next thread off the ready ones; nullptr: there is none.
inline Thread* block_next(Block& b) {
    if (b.running < 0 || b.warps[b.running].ready == 0) {
        if (b.running >= 0) {
            b.ready_warps &= ~(1u << b.running);
        }
        if (b.ready_warps == 0) {
            return nullptr;
        }
        uint32_t skip = random_next(b.random) % uint32_t(__builtin_popcount(b.ready_warps)), left = b.ready_warps;
        for (; skip > 0; skip--) {
            left &= left - 1;
        }
        b.running = __builtin_ctz(left);
        warp_shuffle(b, b.warps[b.running]);
    }
    Warp& w = b.warps[b.running];
    const uint64_t twice = uint64_t(w.ready) << 32 | w.ready;
    const int lane = w.down ? (63 - __builtin_clzll(twice << (31 - w.rotation) >> (31 - w.rotation))) & 31
                            : __builtin_ctzll(twice >> w.rotation << w.rotation) & 31;
    w.ready &= ~(1u << lane);
    return &b.threads[b.running * 32 + lane];
}

inline void fiber_main();

inline Fiber& thread_fiber(Block& b, Thread& t) {
    if (!t.fiber) {
        Fibers& f = b.fibers;
        if (f.idle.empty()) {
            f.idle.push_back(fiber_make(f, fiber_main));
        }
        t.fiber = f.idle.back();
        f.idle.pop_back();
    }
    return *t.fiber;
}

// The running thread waits; returns when somebody has made it ready and its turn has come.
inline void thread_wait() {
    Thread* me = current;
    Block& b = *me->block;
    Thread* next = block_next(b);
    if (next == me) {
        return;
    }
    if (!next) {
        fault_deadlock(b);
    }
    current = next;
    fiber_switch(*me->fiber, thread_fiber(b, *next));
}

inline void make_ready(Block& b, Warp& w, uint32_t lanes) {
    w.ready |= lanes;
    b.ready_warps |= 1u << (&w - b.warps);
}

inline void barrier_release(Block& b) {
    for (unsigned i = 0; i < (b.count + 31) / 32; i++) {
        Warp& w = b.warps[i];
        if (w.at_barrier != 0) {
            make_ready(b, w, w.at_barrier);
            w.at_barrier = 0;
        }
    }
    b.at_barrier = 0;
    if (b.warps[b.running].ready == 0) {
        b.ready_warps &= ~(1u << b.running);
    }
    b.running = -1;
}

inline void thread_end(Thread& t) {
    Block& b = *t.block;
    Warp& w = *t.warp;
    if (t.ended) {
        fault("the stand-in has run the thread twice");
    }
    t.ended = true;
    if (!t.copies.empty()) {
        fault("the thread ends with %zu asynchronous copies that it did not wait for", t.copies.size());
    }
    w.live &= ~(1u << t.lane);
    for (int i = 0; i < w.meetings; i++) {
        const Meeting& m = w.meeting[i];
        if (m.mask >> t.lane & 1) {
            fault("the lane ends while others wait for it in %s (%s:%d)", m.place.operation, m.place.file,
                  m.place.line);
        }
    }
    b.live--;
    if (b.live > 0 && b.at_barrier == b.live) {
        barrier_release(b);  // those that have ended count as arrived
    }
}

// What a fiber does: it runs the thread it was given, then takes up threads that have not begun; then it is idle until
// it is given one.
inline void fiber_main() {
    fiber_arrive(*current->fiber, &current->block->fibers.main);
    for (;;) {
        Thread& t = *current;
        Block& b = *t.block;
        Fiber& self = *t.fiber;
        b.launch->run(b.launch->arguments);
        thread_end(t);
        Thread* next = block_next(b);
        if (!next && b.live > 0) {
            fault_deadlock(b);
        }
        current = next;
        if (next && !next->fiber) {
            next->fiber = &self;
            continue;
        }
        b.fibers.idle.push_back(&self);
        fiber_switch(self, next ? *next->fiber : b.fibers.main);
    }
}

// ----------------------------------------------------------------------------
// barriers and collectives

inline void barrier(const Place& place) {
    Thread& me = *current;
    Block& b = *me.block;
    if (b.at_barrier > 0 && !same_place(place, b.barrier)) {
        fault("%s (%s:%d), but other threads of the block wait in %s (%s:%d)", place.operation, place.file, place.line,
              b.barrier.operation, b.barrier.file, b.barrier.line);
    }
    b.barrier = place;
    me.waits = place;
    me.mask = 0;
    me.warp->at_barrier |= 1u << me.lane;
    if (++b.at_barrier == b.live) {
        barrier_release(b);
    }
    thread_wait();
}

// Whether the running lane may take part in a collective of the mask.
inline void check_mask(const Place& place, uint32_t mask) {
    const uint32_t live = current->warp->live;
    if (!(mask >> current->lane & 1)) {
        fault("%s (%s:%d): the lane is not in its mask %08x", place.operation, place.file, place.line, mask);
    }
    if (mask & ~live) {
        fault("%s (%s:%d): lanes %08x of the mask %08x have ended or do not exist", place.operation, place.file,
              place.line, mask & ~live, mask);
    }
}

// Every lane of `mask` brings its argument; the last to come calls work(arguments by lane), then all go on.
template <class Work>
inline void collective(const Place& place, uint32_t mask, void* argument, Work work) {
    check_mask(place, mask);
    Thread& me = *current;
    Warp& w = *me.warp;
    const uint32_t bit = 1u << me.lane;
    w.arguments[me.lane] = argument;
    int i = 0;
    while (i < w.meetings && w.meeting[i].mask != mask) {
        i++;
    }
    Meeting& m = w.meeting[i];
    if (i == w.meetings) {
        m.mask = mask;
        m.here = 0;
        m.place = place;
        w.meetings++;
    } else if (!same_place(place, m.place)) {
        fault("%s (%s:%d), but lanes %08x of the warp are in %s (%s:%d)", place.operation, place.file, place.line,
              m.here, m.place.operation, m.place.file, m.place.line);
    }
    m.here |= bit;
    if (m.here == mask) {
        m = w.meeting[--w.meetings];
        work(w.arguments);
        make_ready(*me.block, w, mask);
        warp_shuffle(*me.block, w);
    } else {
        me.waits = place;
        me.mask = mask;
    }
    thread_wait();
}

// ----------------------------------------------------------------------------
// shared memory

// The block's array of a SHARED; the first thread that comes by makes it. It is aligned to its type and, below 16
// bytes, to no more: real arrays need not be either.
inline void* shared_array(const void* site, size_t bytes, size_t alignment) {
    Block& b = *current->block;
    for (const SharedArray& a : b.arrays) {
        if (a.site == site) {
            return a.data;
        }
    }
    size_t begin = (b.statics_used + 127) / 128 * 128 + (alignment < 16 ? alignment : 0);
    b.statics_bytes += bytes;
    if (b.statics_bytes > STATIC_LIMIT || b.statics_bytes + b.launch->shared > SHARED_LIMIT) {
        fault("%zu bytes of SHARED arrays and %zu of dynamic shared memory, a block can have %zu, %zu with dynamic",
              b.statics_bytes, b.launch->shared, STATIC_LIMIT, SHARED_LIMIT);
    }
    char* data = b.statics + begin;
    memset(data, POISON, bytes + SHARED_FENCE);
    b.statics_used = begin + bytes + SHARED_FENCE;
    b.arrays.push_back({site, data, bytes});
    return data;
}

// The site is the address of something that every SHARED, and every instantiation of it, has for itself.
template <class T, size_t N, class Site>
inline T (&shared(Site))[N] {
    static const char site = 0;
    return *static_cast<T(*)[N]>(shared_array(&site, sizeof(T[N]), alignof(T)));
}

// Whether the bytes are the block's own shared memory.
inline bool is_shared(const void* p, size_t bytes) {
    const Block& b = *current->block;
    const char* c = static_cast<const char*>(p);
    if (c >= b.dynamic && c + bytes <= b.dynamic + b.launch->shared) {
        return true;
    }
    for (const SharedArray& a : b.arrays) {
        if (c >= a.data && c + bytes <= a.data + a.bytes) {
            return true;
        }
    }
    return false;
}

inline void check_shared_fence(const Block& b, const char* end, const char* what, size_t bytes) {
    for (size_t i = 0; i < SHARED_FENCE; i++) {
        if (static_cast<unsigned char>(end[i]) != POISON) {
            fault("kernel %s, block (%u, %u, %u), some thread: write %zu bytes behind the %zu bytes of %s",
                  b.launch->kernel, b.index.x, b.index.y, b.index.z, i, bytes, what);
        }
    }
}

// ----------------------------------------------------------------------------
// running a block

inline void block_begin(Block& b, const Launch& l, const uint3& index, uint64_t seed) {
    if (!b.dynamic) {
        b.dynamic = static_cast<char*>(aligned_alloc(128, SHARED_LIMIT + SHARED_FENCE));
        b.statics = static_cast<char*>(aligned_alloc(128, 4 * STATIC_LIMIT));
        if (!b.dynamic || !b.statics) {
            fault("no memory for a block");
        }
        watch_signals();
    }
    b.launch = &l;
    b.index = index;
    b.count = b.live = l.block.x * l.block.y * l.block.z;
    b.at_barrier = 0;
    b.running = -1;
    b.random = seed;
    b.arrays.clear();
    b.statics_used = b.statics_bytes = 0;
    memset(b.dynamic, POISON, l.shared + SHARED_FENCE);
    const unsigned warps = (b.count + 31) / 32;
    b.ready_warps = warps == 32 ? ~0u : (1u << warps) - 1;
    for (unsigned i = 0; i < warps; i++) {
        Warp& w = b.warps[i];
        const unsigned lanes = b.count - i * 32;
        w.live = w.ready = lanes >= 32 ? ~0u : (1u << lanes) - 1;
        w.at_barrier = 0;
        w.meetings = 0;
    }
    uint3 at = {0, 0, 0};
    for (unsigned i = 0; i < b.count; i++) {
        Thread& t = b.threads[i];
        t.index = at;
        t.lane = int(i & 31);
        t.warp = &b.warps[i / 32];
        t.block = &b;
        t.fiber = nullptr;
        t.ended = false;
        t.group = 0;
        if (++at.x == l.block.x) {
            at.x = 0;
            if (++at.y == l.block.y) {
                at.y = 0;
                at.z++;
            }
        }
    }
}

inline void block_run(Block& b, const Launch& l, const uint3& index, uint64_t seed) {
    block_begin(b, l, index, seed);
    Thread* first = block_next(b);
    current = first;
    fiber_switch(b.fibers.main, thread_fiber(b, *first));
    current = nullptr;
    check_shared_fence(b, b.dynamic + l.shared, "dynamic shared memory", l.shared);
    for (const SharedArray& a : b.arrays) {
        check_shared_fence(b, a.data + a.bytes, "a SHARED array", a.bytes);
    }
}

}  // namespace simt
