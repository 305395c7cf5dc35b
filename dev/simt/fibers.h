// Stacks to run on, and the switch from one to another within an OS thread. Owns no schedule: block.h decides who runs.
//
// A switch saves the registers that a callee must keep on the stack that is left, and takes them from the other: about
// ten instructions on x86-64 and aarch64 (ELF), ucontext elsewhere or with SIMT_UCONTEXT. Signal masks and
// floating-point control are not switched.
//
// AddressSanitizer and ThreadSanitizer are told of every switch, so they run as with threads. A stack has 64 KB (256 KB
// under a sanitizer), mapped lazily, above a page that nobody may touch.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if !defined(__x86_64__) && !(defined(__aarch64__) && defined(__ELF__)) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define SIMT_TSAN
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SIMT_TSAN
#endif
#endif
#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#ifndef SIMT_UCONTEXT
// Leaves the present stack, noting its end in *save, and goes on where the stack `to` was left.
extern "C" void simt_switch(void** save, void* to);
#if defined(__x86_64__)
__asm__(
    ".pushsection .text.simt_switch,\"axG\",@progbits,simt_switch,comdat\n"
    ".weak simt_switch\n"
    ".hidden simt_switch\n"
    ".type simt_switch,@function\n"
    "simt_switch:\n"
    "    push %rbp\n"
    "    push %rbx\n"
    "    push %r12\n"
    "    push %r13\n"
    "    push %r14\n"
    "    push %r15\n"
    "    mov %rsp, (%rdi)\n"
    "    mov %rsi, %rsp\n"
    "    pop %r15\n"
    "    pop %r14\n"
    "    pop %r13\n"
    "    pop %r12\n"
    "    pop %rbx\n"
    "    pop %rbp\n"
    "    ret\n"
    ".size simt_switch, .-simt_switch\n"
    ".popsection\n");
#else
__asm__(
    ".pushsection .text.simt_switch,\"axG\",%progbits,simt_switch,comdat\n"
    ".weak simt_switch\n"
    ".hidden simt_switch\n"
    ".type simt_switch,%function\n"
    "simt_switch:\n"
    "    sub sp, sp, #160\n"
    "    stp x19, x20, [sp, #0]\n"
    "    stp x21, x22, [sp, #16]\n"
    "    stp x23, x24, [sp, #32]\n"
    "    stp x25, x26, [sp, #48]\n"
    "    stp x27, x28, [sp, #64]\n"
    "    stp x29, x30, [sp, #80]\n"
    "    stp d8, d9, [sp, #96]\n"
    "    stp d10, d11, [sp, #112]\n"
    "    stp d12, d13, [sp, #128]\n"
    "    stp d14, d15, [sp, #144]\n"
    "    mov x9, sp\n"
    "    str x9, [x0]\n"
    "    mov sp, x1\n"
    "    ldp x19, x20, [sp, #0]\n"
    "    ldp x21, x22, [sp, #16]\n"
    "    ldp x23, x24, [sp, #32]\n"
    "    ldp x25, x26, [sp, #48]\n"
    "    ldp x27, x28, [sp, #64]\n"
    "    ldp x29, x30, [sp, #80]\n"
    "    ldp d8, d9, [sp, #96]\n"
    "    ldp d10, d11, [sp, #112]\n"
    "    ldp d12, d13, [sp, #128]\n"
    "    ldp d14, d15, [sp, #144]\n"
    "    add sp, sp, #160\n"
    "    ret\n"
    ".size simt_switch, .-simt_switch\n"
    ".popsection\n");
#endif
#endif

namespace simt {

#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
constexpr size_t STACK_BYTES = 256 << 10;
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif
constexpr size_t STACKS_AT_ONCE = 32;  // stacks of one mapping
constexpr size_t STACK_GUARD = 4096;   // bytes at the low end that fault

struct Fiber {
    char* stack = nullptr;  // lowest address; the OS thread's own stack only after it was left once
    size_t bytes = 0;
#ifdef SIMT_UCONTEXT
    ucontext_t context;
#else
    void* top = nullptr;  // where it was left
#endif
    void* sanitizer = nullptr;  // what the sanitizer keeps for it
};

// The fibers of an OS thread. They live as long as it does, each running one CUDA thread after another.
struct Fibers {
    Fiber main;  // the OS thread's own stack
    std::vector<Fiber*> all, idle;
    std::vector<char*> mappings;
    size_t left = 0;  // stacks of the last mapping that have no fiber yet
    ~Fibers() {
        for (Fiber* f : all) {
#ifdef SIMT_TSAN
            __tsan_destroy_fiber(f->sanitizer);
#endif
            delete f;
        }
        for (char* p : mappings) {
            munmap(p, STACKS_AT_ONCE * STACK_BYTES);
        }
    }
};

// To be called first thing on a fiber that was switched to; `left` is where the switch came from.
inline void fiber_arrive(Fiber& self, Fiber* left) {
#ifdef SIMT_ASAN
    const void* stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(self.sanitizer, &stack, &bytes);
    if (left && !left->stack) {
        left->stack = const_cast<char*>(static_cast<const char*>(stack));
        left->bytes = bytes;
    }
#else
    (void)self, (void)left;
#endif
}

inline void fiber_switch(Fiber& from, Fiber& to) {
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.bytes);
#endif
#ifdef SIMT_TSAN
    from.sanitizer = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.sanitizer, 0);
#endif
#ifdef SIMT_UCONTEXT
    swapcontext(&from.context, &to.context);
#else
    simt_switch(&from.top, to.top);
#endif
    fiber_arrive(from, nullptr);
}

// A fiber that begins in `entry`, which never returns, when it is first switched to.
inline Fiber* fiber_make(Fibers& fibers, void (*entry)()) {
    if (fibers.left == 0) {
        void* p = mmap(nullptr, STACKS_AT_ONCE * STACK_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            fprintf(stderr, "simt: no memory for the stacks of threads\n");
            abort();
        }
        fibers.mappings.push_back(static_cast<char*>(p));
        fibers.left = STACKS_AT_ONCE;
    }
    Fiber* f = new Fiber;
    char* lowest = fibers.mappings.back() + --fibers.left * STACK_BYTES;
    mprotect(lowest, STACK_GUARD, PROT_NONE);  // where the kernel has no more mappings to give, it goes without
    f->stack = lowest + STACK_GUARD;
    f->bytes = STACK_BYTES - STACK_GUARD;
    // Tops of stacks that stand a power of two apart would share a few lines of the first cache.
    const size_t shift = fibers.all.size() % 16 * 192;
    fibers.all.push_back(f);
#ifdef SIMT_TSAN
    f->sanitizer = __tsan_create_fiber(0);
#endif
#ifdef SIMT_UCONTEXT
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = f->bytes - shift;
    f->context.uc_link = nullptr;
    makecontext(&f->context, entry, 0);
#else
    uintptr_t* p = reinterpret_cast<uintptr_t*>(f->stack + f->bytes - shift);
#if defined(__x86_64__)
    *--p = 0;  // where entry would return to; also makes the stack as aligned as after a call
    *--p = reinterpret_cast<uintptr_t>(entry);
    p -= 6;
    memset(p, 0, 6 * sizeof(*p));
#else
    p -= 20;
    memset(p, 0, 20 * sizeof(*p));
    p[11] = reinterpret_cast<uintptr_t>(entry);  // x30
#endif
    f->top = p;
#endif
    return f;
}

}  // namespace simt
