// What the harness needs of CUDA itself: the ceilings that the speed of every op is compared with.
#include <algorithm>

#include "dev/harness.h"
#include "kernels/cuda.cuh"
#include "kernels/matmul.cuh"

bool harness_has_gpu() {
#ifdef __CUDACC__
    return true;
#else
    return false;
#endif
}

// ----------------------------------------------------------------------------
// CUDA kernels

__global__ void ceiling_copy_kernel(uint4* out, const uint4* in, size_t n) {
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        out[i] = in[i];
    }
}

// ----------------------------------------------------------------------------
// kernel launchers

// The best of ten: a ceiling is what the device can do.
template <class X>
static double copy_ceiling(Gpu<X>& dev) {
    const size_t n = size_t(64) << 20;  // of 16 bytes: 1 GiB there and 1 GiB back
    uint4* memory = static_cast<uint4*>(device_alloc(dev, 2 * n * sizeof(uint4), "the copy ceiling"));
    device_zero(dev, memory, 2 * n * sizeof(uint4));
    double best = 1e9;
    for (int i = 0; i < 10; i++) {
        double seconds = 0;
        device_clock_start(dev, &seconds);
        LAUNCH(ceiling_copy_kernel, 16 * dev.info.multiprocessors, 512, 0, dev.stream, memory + n, memory, n);
        device_clock_stop(dev);
        device_sync(dev);
        best = std::min(best, seconds);
    }
    device_free(dev, memory);
    return 2 * double(n) * sizeof(uint4) / best;
}

template <class X>
static double matmul_ceiling(Gpu<X>& dev) {
    device_reserve(dev, 3 * 8192 * 8192 * sizeof(X));
    return 1e9 * matmul_gflops(dev);
}

double harness_copy_ceiling(Gpu<bf16>& dev) {
    return copy_ceiling(dev);
}
double harness_copy_ceiling(Gpu<float>& dev) {
    return copy_ceiling(dev);
}
double harness_matmul_ceiling(Gpu<bf16>& dev) {
    return matmul_ceiling(dev);
}
double harness_matmul_ceiling(Gpu<float>& dev) {
    return matmul_ceiling(dev);
}
