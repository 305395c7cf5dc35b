// The CPU device: number of threads, instruction tier, workspace. Every op takes a device as its first argument and
// overload resolution picks the implementation. Kernels never allocate: what they need beyond their arguments is the
// workspace, reserved before the first step to the largest need that the ops' *_workspace functions state.
#pragma once
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/types.h"

// Statistics, adapters and gradients are at least float.
template <class X>
struct RealOf {
    using type = float;
};
template <>
struct RealOf<double> {
    using type = double;
};

struct Comm;  // kernels/comm.h

template <class X>
struct Cpu {
    using floatX = X;                       // of activations
    using real = typename RealOf<X>::type;  // of statistics, adapters, gradients, optimizer state
    // Columns behind a row that an op may use, and ints that documents_place writes (kernels/gpu.h needs more of both).
    static constexpr size_t row_room(int) { return 0; }
    static constexpr size_t document_ints(size_t N) { return N + 1; }

    int threads = 1;
    const CpuIsa* isa = nullptr;  // leaf kernels of the chosen tier
    const GemmFormat<float>* base = nullptr;     // arithmetic of the frozen matrices, and of x A^T and dy B beside them
    const GemmFormat<float>* adapter = nullptr;  // of the adapters' other products
    char* workspace = nullptr;
    size_t workspace_bytes = 0;
    const Comm* comm = nullptr;  // the ranks of this training; nullptr: this process alone
    double* clock = nullptr;  // what the time since clock_start is added to
    std::chrono::steady_clock::time_point clock_start;
};

// threads = 0: as many as the machine has. The tier is the best of the processor, or the one that the environment
// variable TRAIN_LLAMA_CPU names (for tests); isa stays nullptr when that name is unknown or not supported here.
template <class X>
void device_open(Cpu<X>& dev, int threads);
template <class X>
void device_close(Cpu<X>& dev);
// Chooses the arithmetic of frozen matrices: fp32, int16, bf16, or auto: the fastest of the tier that errs no more than
// bf16 does. False, and nothing changed, when tier and device have no such arithmetic: bf16 belongs to Cpu<bf16>, the
// others to Cpu<float>; Cpu<double> has its own and takes auto alone. Cpu<float> opens with fp32.
template <class X>
bool device_math(Cpu<X>& dev, const char* math);
// 64-byte aligned, not initialised (config=debug fills with NaN). Ends the program with a message when there is none.
template <class X>
void* device_alloc(Cpu<X>& dev, size_t bytes, const char* what);
template <class X>
void device_free(Cpu<X>& dev, void* p);
// Of memory just allocated that all threads will read: writes a byte of each page, pieces of 2 MB by all threads in turn,
// since a page lies in the memory of the processor that writes to it first. Else what one thread reads from a file would
// all lie beside that one, and the others would share one memory's bandwidth.
template <class X>
void device_spread(Cpu<X>& dev, void* p, size_t bytes);
template <class X>
void device_zero(Cpu<X>& dev, void* p, size_t bytes);
template <class X>
void device_to(Cpu<X>& dev, void* device_p, const void* host_p, size_t bytes);
template <class X>
void device_from(Cpu<X>& dev, void* host_p, const void* device_p, size_t bytes);
// Grows the workspace to at least this many bytes.
template <class X>
void device_reserve(Cpu<X>& dev, size_t bytes);
// How a matrix that is stored so is held: as it is.
template <class X>
Store device_store(const Cpu<X>&, Store stored) {
    return stored;
}

// Work is done when a call returns, and clocks are always on.
template <class X>
void device_sync(Cpu<X>&) {}
template <class X>
void device_timing(Cpu<X>&, bool) {}

// Adds the time between start and stop to *seconds. One clock at a time.
template <class X>
void device_clock_start(Cpu<X>& dev, double* seconds) {
    dev.clock = seconds;
    dev.clock_start = std::chrono::steady_clock::now();
}
template <class X>
void device_clock_stop(Cpu<X>& dev) {
    *dev.clock += std::chrono::duration<double>(std::chrono::steady_clock::now() - dev.clock_start).count();
}
