// The part of the CUDA runtime that the project calls. One device, named "stand-in", or as many as SIMT_DEVICES says, which
// differ in nothing but their number and capability (SIMT_CAPABILITY=7.5,8.0) and share one memory. The cards of two
// processes are not the same, unless SIMT_BUS_ID names one for both. SIMT_CARD gives them name and rates of a real card,
// for plans: NAME:MULTIPROCESSORS:MHZ:MEMORY MHZ:BITS OF THE BUS.
//
// Streams are streams.h's, memory is memory.h's. A copy to or from the host's ordinary memory waits for its stream; one
// with page-locked memory does not. CUDA_VISIBLE_DEVICES set and empty: there is no device, as with the real one.
#pragma once
#include <unistd.h>

#include "dev/simt/memory.h"
#include "dev/simt/streams.h"

#define CUDART_VERSION 13000

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout
};
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrClockRate = 13,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMemoryClockRate = 36,
    cudaDevAttrGlobalMemoryBusWidth = 37,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
constexpr unsigned cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2;
constexpr unsigned cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int regsPerBlock, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, multiProcessorCount, l2CacheSize;
    int memoryBusWidth, major, minor;
};
struct cudaFuncAttributes {
    size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};

namespace simt {

// The last error, until it is asked for.
inline cudaError_t& last_error() {
    static cudaError_t e = cudaSuccess;
    return e;
}
inline cudaError_t answer(cudaError_t e) {
    last_error() = e != cudaSuccess ? e : last_error();
    return e;
}

inline int devices() {
    const char* text = getenv("SIMT_DEVICES");
    return text ? atoi(text) : 1;
}
inline int& device_in_use() {
    static int device = 0;
    return device;
}

// What a device says of its speed. The stand-in has none worth a name.
struct Card {
    char name[256] = "stand-in";
    int multiprocessors = 108, mhz = 0, memory_mhz = 0, bits = 0;
};
inline Card card() {
    Card c;
    const char* text = getenv("SIMT_CARD");
    if (text && sscanf(text, "%255[^:]:%d:%d:%d:%d", c.name, &c.multiprocessors, &c.mhz, &c.memory_mhz, &c.bits) != 5) {
        fault("SIMT_CARD=%s: need NAME:MULTIPROCESSORS:MHZ:MEMORY MHZ:BITS", text);
    }
    return c;
}

// A side of a copy: memory of the device where the direction says so, and not where it says host.
inline void check_side(const char* call, const char* side, const void* p, size_t bytes, bool device) {
    const Piece* piece = memory_find(p, bytes);
    if (device && !piece) {
        fault("%s: the %s, %zu bytes at %p, is not inside one allocation of the device", call, side, bytes, p);
    }
    if (!device && piece && !piece->on_host) {
        fault("%s: the %s, %zu bytes at %p, is memory of the device, but the direction says host", call, side, bytes,
              p);
    }
}
inline void check_copy(const char* call, const void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (kind != cudaMemcpyDefault && bytes > 0) {
        check_side(call, "destination", to, bytes, kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice);
        check_side(call, "source", from, bytes, kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice);
    }
}

}  // namespace simt

inline const char* cudaGetErrorString(cudaError_t e) {
    switch (e) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorInvalidResourceHandle: return "invalid resource handle";
        case cudaErrorNotReady: return "device not ready";
    }
    return "unknown error";
}
inline const char* cudaGetErrorName(cudaError_t e) {
    return cudaGetErrorString(e);
}
inline cudaError_t cudaPeekAtLastError() {
    return simt::last_error();
}
inline cudaError_t cudaGetLastError() {
    const cudaError_t e = simt::last_error();
    simt::last_error() = cudaSuccess;
    return e;
}

// ----------------------------------------------------------------------------
// the device

inline cudaError_t cudaDriverGetVersion(int* version) {
    const char* driver = getenv("SIMT_DRIVER");
    *version = driver ? atoi(driver) : CUDART_VERSION;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
    int driver = 0;
    *count = 0;
    cudaDriverGetVersion(&driver);
    if (driver < CUDART_VERSION) {
        return simt::answer(cudaErrorInsufficientDriver);
    }
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    *count = !visible || (*visible && strcmp(visible, "-1") != 0) ? simt::devices() : 0;
    return simt::answer(*count ? cudaSuccess : cudaErrorNoDevice);
}
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= simt::devices()) {
        return simt::answer(cudaErrorInvalidDevice);
    }
    simt::device_in_use() = device;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = simt::device_in_use();
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device) {
    const char* shared = getenv("SIMT_BUS_ID");
    const unsigned process = unsigned(getpid());
    if (device < 0 || device >= simt::devices()) {
        return simt::answer(cudaErrorInvalidDevice);
    }
    if (shared) {
        snprintf(id, size_t(bytes), "%s", shared);
    } else {
        snprintf(id, size_t(bytes), "%04x:%02x:%02x.0", process >> 8 & 0xffff, process & 0xff, unsigned(device));
    }
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (device < 0 || device >= simt::devices()) {
        return simt::answer(cudaErrorInvalidDevice);
    }
    *p = cudaDeviceProp();
    const simt::Card card = simt::card();
    strcpy(p->name, card.name);
    p->totalGlobalMem = simt::memory_total();
    p->sharedMemPerBlock = simt::STATIC_LIMIT;
    p->sharedMemPerBlockOptin = simt::SHARED_LIMIT;
    p->sharedMemPerMultiprocessor = simt::SHARED_LIMIT + 1024;
    p->regsPerBlock = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = int(simt::MAX_THREADS);
    p->maxThreadsPerMultiProcessor = 2048;
    p->multiProcessorCount = card.multiprocessors;
    p->memoryBusWidth = card.bits;
    p->l2CacheSize = 40 << 20;
    const char* capability = getenv("SIMT_CAPABILITY");  // of each device, the last of all that follow as well
    for (int i = 0; i < device && capability && strchr(capability, ','); i++) {
        capability = strchr(capability, ',') + 1;
    }
    p->major = capability ? atoi(capability) : 8;
    p->minor = capability && strchr(capability, '.') ? atoi(strchr(capability, '.') + 1) : 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    const cudaError_t e = cudaGetDeviceProperties(&p, device);
    if (e != cudaSuccess) {
        return e;
    }
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(p.sharedMemPerBlock); break;
        case cudaDevAttrWarpSize: *value = p.warpSize; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(p.sharedMemPerBlockOptin); break;
        case cudaDevAttrClockRate: *value = simt::card().mhz * 1000; break;
        case cudaDevAttrMemoryClockRate: *value = simt::card().memory_mhz * 1000; break;
        case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
    }
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
    simt::streams_finish(false);
    return cudaSuccess;
}

// Kernels by address: the stand-in has nothing to look up.
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
    const bool fits = attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || size_t(value) <= simt::SHARED_LIMIT;
    return simt::answer(fits ? cudaSuccess : cudaErrorInvalidValue);
}
template <class... P>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    *a = cudaFuncAttributes();
    a->maxThreadsPerBlock = int(simt::MAX_THREADS);
    return cudaSuccess;
}
template <class... P>
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, void (*kernel)(P...)) {
    return cudaFuncGetAttributes(a, reinterpret_cast<const void*>(kernel));
}

// ----------------------------------------------------------------------------
// memory

inline cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
    *total = simt::memory_total();
    *left = *total - simt::memory().used;
    return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
    *p = nullptr;
    if (bytes == 0) {
        return cudaSuccess;
    }
    if (bytes <= simt::memory_total() - simt::memory().used) {
        *p = simt::memory_take(bytes, false);
    }
    return simt::answer(*p ? cudaSuccess : cudaErrorMemoryAllocation);
}
inline cudaError_t cudaFree(void* p) {
    if (p) {
        simt::streams_finish(false);
        simt::memory_give(p, false);
    }
    return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** p, size_t bytes) {
    *p = bytes > 0 ? simt::memory_take(bytes, true) : nullptr;
    return simt::answer(*p || bytes == 0 ? cudaSuccess : cudaErrorMemoryAllocation);
}
inline cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
    return cudaMallocHost(p, bytes);
}
inline cudaError_t cudaFreeHost(void* p) {
    if (p) {
        simt::streams_finish(false);
        simt::memory_give(p, true);
    }
    return cudaSuccess;
}
template <class T>
inline cudaError_t cudaMalloc(T** p, size_t bytes) {
    return cudaMalloc(reinterpret_cast<void**>(p), bytes);
}
template <class T>
inline cudaError_t cudaMallocHost(T** p, size_t bytes) {
    return cudaMallocHost(reinterpret_cast<void**>(p), bytes);
}

// Rows of `width` bytes, `to_pitch` and `from_pitch` apart.
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind kind, cudaStream_t s = nullptr) {
    if (height > 1 && (width > to_pitch || width > from_pitch)) {
        return simt::answer(cudaErrorInvalidValue);
    }
    bool ordinary = false;  // memory of the host
    for (size_t i = 0; i < height && width > 0; i++) {
        char* const to_row = static_cast<char*>(to) + i * to_pitch;
        const char* const from_row = static_cast<const char*>(from) + i * from_pitch;
        simt::check_copy("cudaMemcpy", to_row, from_row, width, kind);
        ordinary |= !simt::memory_find(to_row, width) || !simt::memory_find(from_row, width);
    }
    simt::enqueue(s, [=]() {
        for (size_t i = 0; i < height && width > 0; i++) {
            memmove(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
        }
    });
    if (ordinary && s) {
        simt::stream_finish(s);
    }
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t s = nullptr) {
    return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, s);
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind);
}
inline cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                size_t height, cudaMemcpyKind kind) {
    return cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, height, kind);
}
inline cudaError_t cudaMemset2DAsync(void* p, size_t pitch, int value, size_t width, size_t height,
                                     cudaStream_t s = nullptr) {
    for (size_t i = 0; i < height && width > 0; i++) {
        simt::check_side("cudaMemset", "destination", static_cast<char*>(p) + i * pitch, width, true);
    }
    simt::enqueue(s, [=]() {
        for (size_t i = 0; i < height && width > 0; i++) {
            memset(static_cast<char*>(p) + i * pitch, value, width);
        }
    });
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t s = nullptr) {
    return cudaMemset2DAsync(p, bytes, value, bytes, 1, s);
}
inline cudaError_t cudaMemset(void* p, int value, size_t bytes) {
    return cudaMemsetAsync(p, value, bytes);
}

// ----------------------------------------------------------------------------
// streams and events

inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int) {
    *s = new CUstream_st{flags != cudaStreamNonBlocking, {}};
    simt::streams().push_back(*s);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
    return cudaStreamCreateWithPriority(s, flags, 0);
}
inline cudaError_t cudaStreamCreate(cudaStream_t* s) {
    return cudaStreamCreateWithPriority(s, cudaStreamDefault, 0);
}
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    simt::check_stream(s);
    if (s) {
        simt::stream_finish(s);
    } else {
        simt::streams_finish(true);
    }
    return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
    cudaStreamSynchronize(s);
    std::vector<CUstream_st*>& all = simt::streams();
    for (size_t i = 0; i < all.size(); i++) {
        if (all[i] == s) {
            all.erase(all.begin() + std::ptrdiff_t(i));
            break;
        }
    }
    delete s;
    return cudaSuccess;
}
inline cudaError_t cudaStreamQuery(cudaStream_t s) {
    simt::check_stream(s);
    if (s && !s->queue.empty()) {
        simt::streams_step();
    }
    return s && !s->queue.empty() ? cudaErrorNotReady : cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) {
    *e = new CUevent_st{(flags & cudaEventDisableTiming) == 0, 0, 0, {}};
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* e) {
    return cudaEventCreateWithFlags(e, cudaEventDefault);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t e) {
    simt::streams_finish(false);  // somebody may wait for it
    delete e;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = nullptr) {
    const uint64_t record = ++e->recorded;
    simt::enqueue(s, [e, record]() {
        e->done = record;
        e->when = std::chrono::steady_clock::now();
    });
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    simt::event_finish(*e);
    return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t e) {
    if (e->done < e->recorded) {
        simt::streams_step();
    }
    return e->done < e->recorded ? cudaErrorNotReady : cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned = 0) {
    simt::enqueue(s, simt::Work{nullptr, e, e->recorded});
    return cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    if (begin->recorded == 0 || end->recorded == 0 || !begin->timed || !end->timed) {
        return simt::answer(cudaErrorInvalidResourceHandle);
    }
    if (begin->done < begin->recorded || end->done < end->recorded) {
        return simt::answer(cudaErrorNotReady);
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->when - begin->when).count();
    return cudaSuccess;
}
