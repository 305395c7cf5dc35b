// The GPU device: opening it and saying why there is none, its memory, copies, clocks. Owns GpuState, what a Gpu<X>
// keeps between calls. Not here: matrix products (matmul.cuh), linear groups and their dequantised matrices
// (linear.cuh).
//
// Memory: device_alloc asks the driver for each piece, or, once device_arena was called, places pieces one behind the
// other:
//
//   arena   | cuBLASLt's workspace | piece | piece | ...   | free |
//                                                          ^ used
//
// Only the last piece can be given back to an arena; the program allocates once and frees everything at its end.
#pragma once
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda.cuh"
#include "kernels/gpu.h"

constexpr size_t DEVICE_ALIGNMENT = 256;

// A product as cuBLASLt was told of it, with the algorithm that it chose (matmul.cuh). Opaque parts of its interface.
struct MatmulPlan {
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t a, b, c, d;
    cublasLtMatmulAlgo_t algorithm;
};
using MatmulKey = std::array<uint64_t, 14>;

// The 16-bit copy of the matrices of a linear group (linear.cuh). Two of them: one is read while the other is written.
struct GpuSlot {
    const void* holds[3] = {};  // codes or elements of the group's matrices; holds[0] nullptr: nothing
    uint32_t modules[3] = {};   // the numbers of its adapters: one place may hold one layer's weights, then another's
    size_t ld = 0;              // elements from row to row
    uint64_t used = 0;          // number of the last use or prefetch; the lower of the two is replaced
    cudaEvent_t ready = nullptr, released = nullptr;  // written, on the second stream; last read, on the first
    bool written_aside = false;                       // the first stream has not waited for `ready` yet
};

struct GpuClock {
    double* seconds;
    cudaEvent_t begin, end;
};

struct GpuState {
    cudaStream_t aside = nullptr;  // the second stream: dequantisation of the matrices to come
    cublasLtHandle_t lt = nullptr;
    char* lt_workspace = nullptr;
    std::map<MatmulKey, MatmulPlan> plans;

    char* arena = nullptr;
    size_t arena_bytes = 0, arena_used = 0;
    std::map<char*, size_t> pieces;  // every allocation and its bytes
    size_t bytes = 0, peak_bytes = 0;

    GpuSlot slots[2];
    char* slot_memory = nullptr;
    size_t slot_bytes = 0;  // of one
    uint64_t slot_uses = 0;

    bool timing = false;
    std::vector<cudaEvent_t> free_events;
    std::vector<GpuClock> clocks;  // stopped, their time not added yet
    GpuClock running = {};
};

// ----------------------------------------------------------------------------
// kernels

// Never run. Whether the program holds code for a card is asked of a kernel.
[[maybe_unused]] static __global__ void device_probe_kernel() {}

// ----------------------------------------------------------------------------
// opening

// What the card should sustain: 80 % of its tensor cores' peak and 88 % of its memory's, the shares that an H200 and an
// A100 were seen to reach in long products and copies.
inline void device_rates(GpuInfo& info, int number) {
    int clock_khz = 0, memory_khz = 0, bits = 0;
    cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, number);
    cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, number);
    cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, number);
    // bf16 products with fp32 sums, a clock and multiprocessor, from NVIDIA's architecture papers.
    // GeForce cards of one generation do half of what its other cards do.
    const int small = strstr(info.name, "GeForce") ? 256 : 512;
    const int products = info.arch >= 120   ? small
                         : info.arch >= 100 ? 4096
                         : info.arch >= 90  ? 2048
                         : info.arch > 80   ? small
                                            : 1024;
    info.gflops = 0.8 * 2 * products * info.multiprocessors * double(clock_khz) * 1e-6;
    info.gbytes_per_s = 0.88 * 2 * double(memory_khz) * double(bits) / 8 * 1e-6;  // two transfers a clock
}

inline std::string device_capability(const GpuInfo& info) {
    return std::to_string(info.arch / 10) + "." + std::to_string(info.arch % 10);
}

// Why the card of that number is of no use as far as it can be said without touching it, or "" and what it is. A
// context would take a few hundred megabytes of it, which may be another rank's.
inline std::string device_look(int number, GpuInfo& info) {
    cudaDeviceProp p;
    const cudaError_t e = cudaGetDeviceProperties(&p, number);
    if (e != cudaSuccess) {
        return std::string("the GPU does not answer: ") + cudaGetErrorString(e);
    }
    snprintf(info.name, sizeof(info.name), "%.127s", p.name);
    info.arch = 10 * p.major + p.minor;
    info.multiprocessors = p.multiProcessorCount;
    info.shared_bytes = p.sharedMemPerBlockOptin;
    info.l2_bytes = size_t(p.l2CacheSize);
    info.memory = p.totalGlobalMem;
    device_rates(info, number);
    return p.major < 8
               ? info.name + (" has compute capability " + device_capability(info)) + ", need 8.0 or newer (Ampere)"
               : "";
}

// The same of a card that is taken into use: it is this thread's from now on.
inline std::string device_refusal(int number, GpuInfo& info) {
    const std::string why = device_look(number, info), name = info.name;
    if (!why.empty()) {
        return why;
    }
    cudaError_t e = cudaSetDevice(number);
    if (e == cudaSuccess) {
        e = cudaFree(nullptr);  // makes the context
    }
    if (e != cudaSuccess) {
        return name + " cannot be used: " + cudaGetErrorString(e);
    }
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(device_probe_kernel)) != cudaSuccess) {
        return "this program holds no code for " + name + " (compute capability " + device_capability(info) +
               "): build it with CUDA_ARCH=" + std::to_string(info.arch) + (info.arch == 90 ? "a" : "");
    }
    return "";
}

// Why there is no card at all, or "" and how many there are.
inline std::string device_count(int& count) {
    count = 0;
    const cudaError_t e = cudaGetDeviceCount(&count);
    if (e == cudaErrorInsufficientDriver) {
        int driver = 0;
        cudaDriverGetVersion(&driver);
        char why[128];
        snprintf(why, sizeof(why), "the NVIDIA driver is too old (it knows CUDA %d.%d, need %d.%d)", driver / 1000,
                 driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
        return driver > 0 ? why : "no NVIDIA driver is loaded";
    }
    if (e == cudaErrorNoDevice || (e == cudaSuccess && count == 0)) {
        return "no NVIDIA GPU is visible";
    }
    return e == cudaSuccess ? "" : std::string("the NVIDIA driver reports: ") + cudaGetErrorString(e);
}

// The first usable card becomes this thread's; with several ranks on this machine the local_rank-th. Fewer cards than
// ranks may be a launcher's choice, which shows each rank some of its own: only one, or several, that
// CUDA_VISIBLE_DEVICES names. comm_attach finds the ranks that share one after all.
inline std::string device_choose(GpuInfo& info, int local_rank, int local_size) {
    int count = 0;
    std::string why = device_count(count);
    std::vector<int> usable;
    for (int i = 0; i < count; i++) {
        const std::string refused = device_look(i, info);
        if (refused.empty()) {
            usable.push_back(i);
        } else {
            why = why.empty() ? refused : why;
        }
    }
    const int cards = int(usable.size());
    if (cards > 1 && cards < local_size && getenv("CUDA_VISIBLE_DEVICES") == nullptr) {
        return std::to_string(local_size) + " ranks on this machine, " + std::to_string(cards) +
               " usable GPUs: start one rank a GPU (mpirun -n " + std::to_string(cards) +
               "), or spread the ranks over more machines";
    }
    if (cards > 1 && local_size > 1) {
        return device_refusal(usable[size_t(local_rank % cards)], info);
    }
    for (int i : usable) {
        const std::string refused = device_refusal(i, info);
        if (refused.empty()) {
            return "";
        }
        why = why.empty() ? refused : why;
    }
    return why;
}

template <class X>
std::string device_open(Gpu<X>& dev, int threads, int local_rank, int local_size) {
    dev = Gpu<X>();
    const int machine = int(std::thread::hardware_concurrency());
    dev.threads = threads > 0 ? threads : machine > 0 ? machine : 1;
    const std::string why = device_choose(dev.info, local_rank, local_size);
    cudaGetLastError();  // of a card that was refused: else the next checked launch would report it
    if (!why.empty()) {
        return why;
    }
    dev.state = new GpuState;
    GpuState& s = *dev.state;
    int least = 0, greatest = 0;  // the least is also the default
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA_CHECK(cudaStreamCreateWithPriority(&dev.stream, cudaStreamNonBlocking, greatest));
    CUDA_CHECK(cudaStreamCreateWithPriority(&s.aside, cudaStreamNonBlocking, least));
    for (GpuSlot& slot : s.slots) {
        CUDA_CHECK(cudaEventCreateWithFlags(&slot.ready, cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&slot.released, cudaEventDisableTiming));
    }
    CUBLAS_CHECK(cublasLtCreate(&s.lt));
    return "";
}

template <class X>
void paging_close(Gpu<X>& dev);  // paged.cuh

template <class X>
void device_close(Gpu<X>& dev) {
    if (!dev.state) {
        return;
    }
    GpuState& s = *dev.state;
    comm_abandon(dev);
    device_sync(dev);
    paging_close(dev);
    CUBLAS_CHECK(cublasLtDestroy(s.lt));
    for (GpuSlot& slot : s.slots) {
        CUDA_CHECK(cudaEventDestroy(slot.ready));
        CUDA_CHECK(cudaEventDestroy(slot.released));
    }
    for (cudaEvent_t event : s.free_events) {
        CUDA_CHECK(cudaEventDestroy(event));
    }
    // What the caller did not free goes as well: a closed device holds nothing.
    for (const auto& piece : s.pieces) {
        if (!s.arena) {
            CUDA_CHECK(cudaFree(piece.first));
        }
    }
    CUDA_CHECK(cudaFree(s.arena));
    CUDA_CHECK(cudaStreamDestroy(s.aside));
    CUDA_CHECK(cudaStreamDestroy(dev.stream));
    delete dev.state;
    dev.state = nullptr;
    dev.stream = nullptr;
    dev.workspace = nullptr;
    dev.workspace_bytes = 0;
}

// ----------------------------------------------------------------------------
// memory

inline size_t device_rounded(size_t bytes) {
    const size_t least = bytes > 0 ? bytes : 1;
    return (least + DEVICE_ALIGNMENT - 1) / DEVICE_ALIGNMENT * DEVICE_ALIGNMENT;
}

// nullptr: there is no room. *why then says how much there is.
inline char* memory_take(GpuState& s, size_t bytes, std::string& why) {
    char* p = nullptr;
    bytes = device_rounded(bytes);
    char text[160];
    if (s.arena) {
        if (bytes > s.arena_bytes - s.arena_used) {
            snprintf(text, sizeof(text), "%.1f MiB are left of the %.1f MiB planned",
                     double(s.arena_bytes - s.arena_used) / (1 << 20), double(s.arena_bytes) / (1 << 20));
            why = text;
            return nullptr;
        }
        p = s.arena + s.arena_used;
        s.arena_used += bytes;
    } else {
        const cudaError_t e = cudaMalloc(reinterpret_cast<void**>(&p), bytes);
        if (e == cudaErrorMemoryAllocation) {
            size_t left = 0, all = 0;
            cudaGetLastError();
            CUDA_CHECK(cudaMemGetInfo(&left, &all));
            snprintf(text, sizeof(text), "%.1f MiB are free of the GPU's %.1f MiB", double(left) / (1 << 20),
                     double(all) / (1 << 20));
            why = text;
            return nullptr;
        }
        CUDA_CHECK(e);
        s.bytes += bytes;
        s.peak_bytes = s.bytes > s.peak_bytes ? s.bytes : s.peak_bytes;
    }
    s.pieces[p] = bytes;
    return p;
}

// bytes: of all that is to be placed, each piece rounded up to 256 bytes. cuBLASLt's workspace comes on top.
template <class X>
std::string device_arena(Gpu<X>& dev, size_t bytes) {
    GpuState& s = *dev.state;
    std::string why;
    char* p = s.pieces.empty() ? memory_take(s, LT_WORKSPACE + bytes, why) : nullptr;
    if (!p) {
        return s.pieces.empty() ? why : "something was allocated before the arena";
    }
    s.pieces.clear();
    s.arena = p;
    s.arena_bytes = LT_WORKSPACE + device_rounded(bytes);
    s.lt_workspace = memory_take(s, LT_WORKSPACE, why);
    return "";
}

template <class X>
void* device_alloc(Gpu<X>& dev, size_t bytes, const char* what) {
    std::string why;
    char* p = memory_take(*dev.state, bytes, why);
    if (!p) {
        fprintf(stderr, "error: not enough GPU memory for %s (need %.1f MiB, %s)\n", what, double(bytes) / (1 << 20),
                why.c_str());
        fprintf(stderr, "hint: lower --pass-tokens or --max-tokens, or choose a smaller model or rank\n");
        exit(1);
    }
#ifdef TRAIN_LLAMA_DEBUG
    CUDA_CHECK(cudaMemsetAsync(p, 0xff, device_rounded(bytes), dev.stream));  // a NaN in every floating-point type
#endif
    return p;
}

template <class X>
void device_free(Gpu<X>& dev, void* p) {
    if (!p) {
        return;
    }
    GpuState& s = *dev.state;
    const auto piece = s.pieces.find(static_cast<char*>(p));
    if (s.arena && piece->first + piece->second == s.arena + s.arena_used) {
        s.arena_used -= piece->second;
    } else if (!s.arena) {
        CUDA_CHECK(cudaFree(p));  // waits for the work that was queued
        s.bytes -= piece->second;
    }
    s.pieces.erase(piece);
    for (GpuSlot& slot : s.slots) {
        slot.holds[0] = nullptr;  // other weights may come to stand where the old ones stood
    }
}

template <class X>
void device_reserve(Gpu<X>& dev, size_t bytes) {
    if (bytes > dev.workspace_bytes) {
        device_free(dev, dev.workspace);
        dev.workspace = static_cast<char*>(device_alloc(dev, bytes, "the workspace"));
        dev.workspace_bytes = bytes;
    }
}

template <class X>
size_t device_peak_bytes(Gpu<X>& dev) {
    return dev.state->peak_bytes;
}

// ----------------------------------------------------------------------------
// copies. They wait: afterwards the host may write its side. "Device" memory may also be device_alloc_host's.

template <class X>
void device_zero(Gpu<X>& dev, void* p, size_t bytes) {
    CUDA_CHECK(cudaMemsetAsync(p, 0, bytes, dev.stream));
}

template <class X>
void device_to(Gpu<X>& dev, void* device_p, const void* host_p, size_t bytes) {
    if (bytes == 0) {
        return;
    }
    CUDA_CHECK(cudaMemcpyAsync(device_p, host_p, bytes, cudaMemcpyDefault, dev.stream));
    CUDA_CHECK(cudaStreamSynchronize(dev.stream));
}

template <class X>
void device_from(Gpu<X>& dev, void* host_p, const void* device_p, size_t bytes) {
    if (bytes == 0) {
        return;
    }
    CUDA_CHECK(cudaMemcpyAsync(host_p, device_p, bytes, cudaMemcpyDefault, dev.stream));
    CUDA_CHECK(cudaStreamSynchronize(dev.stream));
}

// ----------------------------------------------------------------------------
// waiting and clocks

template <class X>
void device_sync(Gpu<X>& dev) {
    GpuState& s = *dev.state;
    CUDA_CHECK(cudaStreamSynchronize(s.aside));
    CUDA_CHECK(cudaStreamSynchronize(dev.stream));
    for (const GpuClock& c : s.clocks) {
        float milliseconds = 0;
        CUDA_CHECK(cudaEventElapsedTime(&milliseconds, c.begin, c.end));
        *c.seconds += double(milliseconds) * 1e-3;
        s.free_events.push_back(c.begin);
        s.free_events.push_back(c.end);
    }
    s.clocks.clear();
}

template <class X>
void device_timing(Gpu<X>& dev, bool on) {
    dev.state->timing = on;
}

inline cudaEvent_t device_event(GpuState& s) {
    cudaEvent_t event = nullptr;
    if (s.free_events.empty()) {
        CUDA_CHECK(cudaEventCreate(&event));
    } else {
        event = s.free_events.back();
        s.free_events.pop_back();
    }
    return event;
}

// One clock at a time, as on the CPU.
template <class X>
void device_clock_start(Gpu<X>& dev, double* seconds) {
    GpuState& s = *dev.state;
    if (s.timing) {
        s.running = {seconds, device_event(s), device_event(s)};
        CUDA_CHECK(cudaEventRecord(s.running.begin, dev.stream));
    }
}

template <class X>
void device_clock_stop(Gpu<X>& dev) {
    GpuState& s = *dev.state;
    if (s.running.seconds) {
        CUDA_CHECK(cudaEventRecord(s.running.end, dev.stream));
        s.clocks.push_back(s.running);
        s.running = {};
    }
}
