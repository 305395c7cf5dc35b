// The optimizer's walk over the flat adapter buffers: AdamW, the norm of the gradients, the search for what is not
// finite.
//
// AdamW (Loshchilov, Hutter 2019) in the order of PyTorch's single-tensor path, rounded as its vector code rounds,
// which fuses three of the operations: the same bits as the CPU's tiers with fused multiply-add.
//   g = g grad_scale;  p = p (1 - lr wd);  m = m + (1 - beta1)(g - m);  v = v beta2 + (1 - beta2) g g
//   p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Bytes an element: AdamW 28 (p, m, v read and written, g read), the finite check of p rides along; sum_squares,
// first_nonfinite and checksum 4 (table k, row 11).
#pragma once
#include "kernels/adamw.h"
#include "kernels/checksum.h"
#include "kernels/gpu.h"
#include "kernels/vector.cuh"
#include "kernels/workspace.cuh"

// Blocks, at most, and their size: the same on every card, and so are the bits of a sum.
constexpr size_t SUM_GRID = 1024;
constexpr int SUM_THREADS = 256;
// dev.workspace of the functions below: what the host then reads, and a double for each block.
constexpr size_t OPTIMIZER_WORKSPACE = 256 + SUM_GRID * sizeof(double);

// ----------------------------------------------------------------------------
// CUDA kernels

// *behind = the greatest n - i of what is not finite: integers, so the order of blocks does not matter.
__device__ __forceinline__ void report_nonfinite(unsigned long long* behind, size_t i, size_t n, float x) {
    if ((__float_as_uint(x) & 0x7f800000) == 0x7f800000) {
        atomicMax(behind, static_cast<unsigned long long>(n - i));
    }
}

__device__ __forceinline__ void adamw_element(float& p, float& m, float& v, float g, const AdamWScalars<float>& a) {
    const float grad = __fmul_rn(g, a.grad_scale), change = __fsub_rn(grad, m);
    m = a.weight1 < 0.5f ? fmaf(a.weight1, change, m) : fmaf(a.weight1 - 1, change, grad);  // as torch.lerp
    v = fmaf(__fmul_rn(a.weight2, grad), grad, __fmul_rn(v, a.beta2));
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), a.sqrt_correction2), a.eps);
    p = __fadd_rn(__fmul_rn(p, a.keep), __fdiv_rn(__fmul_rn(a.step_size, m), denominator));
}

// E elements a thread; the last n % E go one by one. left: elements from p to the end of the whole buffer.
template <int E>
__global__ void adamw_kernel(float* p, float* m, float* v, const float* g, size_t n, AdamWScalars<float> a,
                             unsigned long long* behind, size_t left) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * E;
    if (i + E <= n) {
        float weight[E], mean[E], square[E], grad[E];
        load<true>(weight, p + i);
        load<true>(mean, m + i);
        load<true>(square, v + i);
        load<true>(grad, g + i);
#pragma unroll
        for (int k = 0; k < E; k++) {
            adamw_element(weight[k], mean[k], square[k], grad[k], a);
            report_nonfinite(behind, i + k, left, weight[k]);
        }
        store<true>(p + i, weight);
        store<true>(m + i, mean);
        store<true>(v + i, square);
    } else {
        for (size_t at = i; at < n; at++) {
            adamw_element(p[at], m[at], v[at], g[at], a);
            report_nonfinite(behind, at, left, p[at]);
        }
    }
}

// *out = the sum over a block of SUM_THREADS, always in the same order.
__device__ __forceinline__ void sum_store(double* out, double sum, double* sums) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        sum += __shfl_xor_sync(ALL_LANES, sum, o);
    }
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < SUM_THREADS / 32; w++) {
            sum += sums[w];
        }
        *out = sum;
    }
}

// partial[block] = the sum of squares of the elements that the block meets, E and then a grid's width further on.
template <int E, int U>
__global__ void sum_squares_kernel(double* partial, const float* x, size_t n) {
    SHARED(double, sums, SUM_THREADS / 32);
    const size_t step = size_t(gridDim.x) * blockDim.x * E;
    double sum = 0;
    for (size_t begin = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * E; begin < n; begin += step * U) {
        float v[U][E];
#pragma unroll
        for (int j = 0; j < U; j++) {
            const size_t i = begin + size_t(j) * step;
            if (i + E <= n) {
                load(v[j], x + i);
            } else {
#pragma unroll
                for (int k = 0; k < E; k++) {
                    v[j][k] = i + size_t(k) < n ? x[i + size_t(k)] : 0;
                }
            }
        }
#pragma unroll
        for (int j = 0; j < U; j++) {
#pragma unroll
            for (int k = 0; k < E; k++) {
                sum += double(v[j][k]) * double(v[j][k]);  // the product is exact: fused or not is one
            }
        }
    }
    sum_store(partial + blockIdx.x, sum, sums);
}

// *out = the sum of partial (n): one block.
template <class T>
__global__ void sum_partials_kernel(T* out, const T* partial, size_t n) {
    SHARED(T, sums, SUM_THREADS / 32);
    T sum = 0;
    for (size_t i = threadIdx.x; i < n; i += blockDim.x) {
        sum += partial[i];
    }
    sum_store(out, sum, sums);
}

template <int E>
__global__ void nonfinite_kernel(const float* x, size_t n, unsigned long long* behind) {
    const size_t step = size_t(gridDim.x) * blockDim.x * E;
#pragma unroll 4
    for (size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * E; i < n; i += step) {
        if (i + E <= n) {
            float v[E];
            load(v, x + i);
#pragma unroll
            for (int k = 0; k < E; k++) {
                report_nonfinite(behind, i + k, n, v[k]);
            }
        } else {
            for (size_t at = i; at < n; at++) {
                report_nonfinite(behind, at, n, x[at]);
            }
        }
    }
}

// *sum += the terms of x (n), whole numbers, so the order of warps does not matter.
template <int E>
__global__ void checksum_kernel(unsigned long long* sum, const float* x, size_t n) {
    const size_t step = size_t(gridDim.x) * blockDim.x * E;
    unsigned long long own = 0;
#pragma unroll 4
    for (size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * E; i < n; i += step) {
        if (i + E <= n) {
            float v[E];
            load(v, x + i);
#pragma unroll
            for (int k = 0; k < E; k++) {
                own += checksum_term(i + size_t(k), __float_as_uint(v[k]));
            }
        } else {
            for (size_t at = i; at < n; at++) {
                own += checksum_term(at, __float_as_uint(x[at]));
            }
        }
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        own += __shfl_xor_sync(ALL_LANES, own, o);
    }
    if (threadIdx.x % 32 == 0) {
        atomicAdd(sum, own);
    }
}

// ----------------------------------------------------------------------------
// kernel launchers

// 0, for report_nonfinite.
template <class X>
unsigned long long* nonfinite_begin(Gpu<X>& dev) {
    Workspace w = workspace_of(dev);
    unsigned long long* behind = workspace_take<unsigned long long>(w, 1);
    device_zero(dev, behind, sizeof *behind);
    return behind;
}

// What report_nonfinite left, as an index; waits for the kernel.
template <class X>
size_t nonfinite_index(Gpu<X>& dev, const unsigned long long* behind, size_t n) {
    unsigned long long found = 0;
    device_from(dev, &found, behind, sizeof found);
    return n - size_t(found);
}

inline size_t sum_blocks(size_t n) {
    const size_t blocks = ceil_div(n, size_t(SUM_THREADS) * 4);
    return blocks < SUM_GRID ? blocks : SUM_GRID;
}

// p, m, v (n) in place; g (n) is read only. What is not finite then is reported as one of a buffer that ends `left` elements
// behind p.
template <class X>
void adamw_launch(Gpu<X>& dev, float* p, float* m, float* v, const float* g, size_t n, const AdamWScalars<float>& s,
                  unsigned long long* behind, size_t left) {
    if (vectors_fit(4, p, 0) && vectors_fit(4, m, 0) && vectors_fit(4, v, 0) && vectors_fit(4, g, 0)) {
        LAUNCH((adamw_kernel<4>), unsigned(ceil_div(n, 4 * 256)), 256, 0, dev.stream, p, m, v, g, n, s, behind, left);
    } else {
        LAUNCH((adamw_kernel<1>), unsigned(ceil_div(n, 256)), 256, 0, dev.stream, p, m, v, g, n, s, behind, left);
    }
}

template <class X>
size_t optimizer_workspace(const Gpu<X>&) {
    return OPTIMIZER_WORKSPACE;
}

// The sum of x[i]^2 over x (n), in double.
template <class X>
double sum_squares(Gpu<X>& dev, const float* x, size_t n) {
    if (n == 0) {
        return 0;
    }
    Workspace w = workspace_of(dev);
    const size_t blocks = sum_blocks(n);
    double* result = workspace_take<double>(w, 1);
    double* partial = workspace_take<double>(w, blocks);
    if (vectors_fit(4, x, 0)) {
        LAUNCH((sum_squares_kernel<4, 4>), unsigned(blocks), SUM_THREADS, 0, dev.stream, partial, x, n);
    } else {
        LAUNCH((sum_squares_kernel<1, 4>), unsigned(blocks), SUM_THREADS, 0, dev.stream, partial, x, n);
    }
    LAUNCH((sum_partials_kernel<double>), 1, SUM_THREADS, 0, dev.stream, result, partial, blocks);
    double sum = 0;
    device_from(dev, &sum, result, sizeof sum);
    return sum;
}

// The index of the first element of x (n) that is infinite or NaN; n when all are finite.
template <class X>
size_t first_nonfinite(Gpu<X>& dev, const float* x, size_t n) {
    if (n == 0) {
        return 0;
    }
    unsigned long long* behind = nonfinite_begin(dev);
    if (vectors_fit(4, x, 0)) {
        LAUNCH((nonfinite_kernel<4>), unsigned(sum_blocks(n)), SUM_THREADS, 0, dev.stream, x, n, behind);
    } else {
        LAUNCH((nonfinite_kernel<1>), unsigned(sum_blocks(n)), SUM_THREADS, 0, dev.stream, x, n, behind);
    }
    return nonfinite_index(dev, behind, n);
}

// The checksum of x (n), as checksum.h has it. Workspace: optimizer_workspace.
template <class X>
uint64_t checksum(Gpu<X>& dev, const float* x, size_t n) {
    if (n == 0) {
        return 0;
    }
    Workspace w = workspace_of(dev);
    unsigned long long* sum = workspace_take<unsigned long long>(w, 1);
    device_zero(dev, sum, sizeof *sum);
    if (vectors_fit(4, x, 0)) {
        LAUNCH((checksum_kernel<4>), unsigned(sum_blocks(n)), SUM_THREADS, 0, dev.stream, sum, x, n);
    } else {
        LAUNCH((checksum_kernel<1>), unsigned(sum_blocks(n)), SUM_THREADS, 0, dev.stream, sum, x, n);
    }
    unsigned long long result = 0;
    device_from(dev, &result, sum, sizeof result);
    return result;
}
