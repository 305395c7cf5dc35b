// Opening the CPU device and its memory.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>

#include <sys/mman.h>
#include <unistd.h>

#include "kernels/cpu/parallel.h"
#include "kernels/device.h"

template <>
bool device_math(Cpu<float>& dev, const char* math) {
    const bool any = strcmp(math, "auto") == 0;
    const GemmFormat<float>* base = strcmp(math, "int16") == 0 || (any && dev.isa->int16) ? dev.isa->int16
                                    : strcmp(math, "fp32") == 0 || any                    ? dev.isa->fp32
                                                                                          : nullptr;
    if (base) {
        dev.base = base;
        dev.adapter = dev.isa->fp32;
    }
    return base != nullptr;
}
template <>
bool device_math(Cpu<bf16>& dev, const char* math) {
    const bool has = dev.isa->bf16 && (strcmp(math, "bf16") == 0 || strcmp(math, "auto") == 0);
    if (has) {
        dev.base = dev.adapter = dev.isa->bf16;
    }
    return has;
}
template <>
bool device_math(Cpu<double>&, const char* math) {
    return strcmp(math, "auto") == 0;
}

static const size_t PAGE = 4096, HUGE_PAGE = size_t(2) << 20;

template <class X>
void device_open(Cpu<X>& dev, int threads) {
    int machine = int(std::thread::hardware_concurrency());
    dev.threads = threads > 0 ? threads : machine > 0 ? machine : 1;
    dev.isa = cpu_isa_asked();
    dev.workspace = nullptr;
    dev.workspace_bytes = 0;
    if (dev.isa) {
        device_math(dev, sizeof(X) == sizeof(float) ? "fp32" : "auto");
    }
}

template <class X>
void device_close(Cpu<X>& dev) {
    device_free(dev, dev.workspace);
    dev.workspace = nullptr;
    dev.workspace_bytes = 0;
}

template <class X>
void* device_alloc(Cpu<X>&, size_t bytes, const char* what) {
    void* p = nullptr;
    if (posix_memalign(&p, bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 64, bytes ? bytes : 64) != 0) {
        fprintf(stderr, "error: not enough memory for %s (need %.1f MiB)\n", what, double(bytes) / (1 << 20));
        fprintf(stderr, "hint: lower --pass-tokens or --max-tokens, or choose a smaller model or rank\n");
        exit(1);
    }
    if (bytes >= 2 * HUGE_PAGE) {
        madvise(p, bytes, MADV_HUGEPAGE);  // only a wish: without it the same memory in small pages
    }
#ifdef TRAIN_LLAMA_DEBUG
    memset(p, 0xff, bytes);  // a NaN in every floating-point type
#endif
    return p;
}

template <class X>
void device_spread(Cpu<X>& dev, void* p, size_t bytes) {
    parallel(dev.threads, [&](int worker) {
        for (size_t i = size_t(worker) * HUGE_PAGE; i < bytes; i += size_t(dev.threads) * HUGE_PAGE) {
            for (size_t j = i; j < i + HUGE_PAGE && j < bytes; j += PAGE) {
                static_cast<volatile char*>(p)[j] = 0;
            }
        }
    });
}

template <class X>
void device_free(Cpu<X>&, void* p) {
    free(p);
}

template <class X>
void device_zero(Cpu<X>&, void* p, size_t bytes) {
    memset(p, 0, bytes);
}

template <class X>
void device_to(Cpu<X>&, void* device_p, const void* host_p, size_t bytes) {
    if (bytes > 0) {  // an empty list has no address
        memcpy(device_p, host_p, bytes);
    }
}

template <class X>
void device_from(Cpu<X>&, void* host_p, const void* device_p, size_t bytes) {
    if (bytes > 0) {
        memcpy(host_p, device_p, bytes);
    }
}

template <class X>
void device_reserve(Cpu<X>& dev, size_t bytes) {
    if (bytes > dev.workspace_bytes) {
        device_free(dev, dev.workspace);
        dev.workspace = static_cast<char*>(device_alloc(dev, bytes, "the workspace"));
        dev.workspace_bytes = bytes;
    }
}

#define INSTANTIATE(X)                                              \
    template void device_open(Cpu<X>&, int);                        \
    template void device_close(Cpu<X>&);                            \
    template void* device_alloc(Cpu<X>&, size_t, const char*);      \
    template void device_free(Cpu<X>&, void*);                      \
    template void device_spread(Cpu<X>&, void*, size_t);            \
    template void device_zero(Cpu<X>&, void*, size_t);              \
    template void device_to(Cpu<X>&, void*, const void*, size_t);   \
    template void device_from(Cpu<X>&, void*, const void*, size_t); \
    template void device_reserve(Cpu<X>&, size_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(double)

void wait_passively(char** argv) {
    if (getenv("OMP_WAIT_POLICY") == nullptr && getenv("GOMP_SPINCOUNT") == nullptr) {
        setenv("OMP_WAIT_POLICY", "passive", 1);
        execv("/proc/self/exe", argv);
    }
}
