// Everything of CUDA that a kernel or launcher of this project uses, under one set of names: launches, shared memory,
// tensor-core and asynchronous-copy instructions, conversions, checked calls. Compiled by nvcc it is the real thing; by any
// other compiler it is the stand-in of dev/simt, which runs the same kernels on the CPU. No other file of kernels/ holds
// assembly, or asks which of the two it is. NCCL is here for the one file that asks for it (gpu_comm.cu).
//
//   LAUNCH((kernel<X, 4>), grid, block, shared_bytes, stream, arguments...)   the kernel is named, never a variable
//   SHARED(float, sums, 32);             a static array of a block
//   DYN_SHARED(bf16, tile);              the block's dynamic shared memory (shared_bytes of the launch), 128-byte aligned
//
// Threads of a warp that take part in a collective (shuffle, vote, ldmatrix, mma) must reach it together.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "kernels/bf16.h"

#ifdef __CUDACC__
#include <cublasLt.h>
#include <cuda_runtime.h>
#ifdef CUDA_WITH_NCCL
#include <nccl.h>
#endif
#else
#include "dev/simt/cublaslt.h"
#include "dev/simt/cuda.h"
#include "dev/simt/nccl.h"
#endif

inline void cuda_check(cudaError_t e, const char* file, int line) {
    if (e != cudaSuccess) {
        fprintf(stderr, "error: CUDA: %s (%s:%d)\n", cudaGetErrorString(e), file, line);
        fprintf(stderr, e == cudaErrorMemoryAllocation
                            ? "hint: lower --pass-tokens, choose --recompute full, or a smaller model\n"
                            : "hint: a fault of the driver or of this program; scripts/gpu_check.sh tests the kernels\n");
        exit(1);
    }
}
#define CUDA_CHECK(call) cuda_check(call, __FILE__, __LINE__)

#ifdef __CUDACC__

#define LAUNCH(kernel, grid, block, shared, stream, ...)                                    \
    do {                                                                                    \
        allow_shared(reinterpret_cast<const void*>(kernel), shared, __FILE__, __LINE__);    \
        (kernel)<<<grid, block, shared, stream>>>(__VA_ARGS__);                             \
        CUDA_CHECK(cudaGetLastError());                                                     \
    } while (0)
#define SHARED(T, name, n) __shared__ T name[n]
#define DYN_SHARED(T, name)                                             \
    extern __shared__ __align__(128) unsigned char dynamic_shared[];    \
    T* name = reinterpret_cast<T*>(dynamic_shared)

inline void cublas_check(cublasStatus_t e, const char* file, int line) {
    if (e != CUBLAS_STATUS_SUCCESS) {
        fprintf(stderr, "error: cuBLASLt: %s (%s:%d)\n", cublasLtGetStatusString(e), file, line);
        fprintf(stderr, "hint: scripts/gpu_check.sh tests the matrix products on this card\n");
        exit(1);
    }
}
#define CUBLAS_CHECK(call) cublas_check(call, __FILE__, __LINE__)

// More than 48 KB a block has to be asked for.
inline void allow_shared(const void* kernel, size_t bytes, const char* file, int line) {
    if (bytes > 48 * 1024) {
        cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), file, line);
    }
}

// ----------------------------------------------------------------------------
// conversions

__device__ __forceinline__ uint16_t round_to_bf16(float x) {
    uint16_t r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ float exp2_approx(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// The compiler no longer knows where x came from, so it keeps it instead of computing it anew.
__device__ __forceinline__ void opaque(float& x) {
    asm volatile("" : "+f"(x));
}
__device__ __forceinline__ void opaque(int& x) {
    asm volatile("" : "+r"(x));
}

// ----------------------------------------------------------------------------
// tensor cores. Fragments of m16n8k16, g = lane / 4, t = lane % 4, two bf16 a register:
//   a0 (g, 2t..)  a1 (g+8, 2t..)  a2 (g, 2t+8..)  a3 (g+8, 2t+8..);  b0 (2t.., g)  b1 (2t+8.., g)
//   c0, c1 (g, 2t..)  c2, c3 (g+8, 2t..)

__device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 (16-byte aligned).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    uint32_t s = uint32_t(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(s));
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    uint32_t s = uint32_t(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(s));
}

// ----------------------------------------------------------------------------
// asynchronous copies, global to shared memory; both sides aligned to the size

__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
                 "l"(global)
                 : "memory");
}
// real = false: writes zeros and reads nothing, so the address may be anywhere.
__device__ __forceinline__ void cp_async_16_or_zero(void* shared, const void* global, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
                 "l"(global), "r"(real ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_8_or_zero(void* shared, const void* global, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
                 "l"(global), "r"(real ? 8 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif  // __CUDACC__

// ----------------------------------------------------------------------------
// what both have in common

__device__ __forceinline__ float widen(float x) {
    return x;
}
__device__ __forceinline__ float widen(bf16 x) {
    return __uint_as_float(uint32_t(x.bits) << 16);
}
template <class X>
__device__ __forceinline__ X narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
    return {round_to_bf16(x)};
}
__device__ __forceinline__ float bf16_low(uint32_t pair) {
    return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float bf16_high(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum over the lanes of a warp, in every lane, always in the same order.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        x += __shfl_xor_sync(ALL_LANES, x, o);
    }
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, o));
    }
    return x;
}

constexpr size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}
