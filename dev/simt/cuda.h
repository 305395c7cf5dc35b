// CUDA on the CPU: what kernels/cuda.cuh takes in place of the CUDA headers when the compiler is not nvcc. The
// project's kernels run unchanged, thread for thread, and their mistakes are looked for on the way.
//
//   fibers.h   stacks and the switch between them      launch.h    grids, limits, the names of kernels launched
//   block.h    threads, warps, barriers, who runs      warp.h      shuffles, votes, ldmatrix, mma, atomics
//   types.h    keywords, vectors, arithmetic           async.h     cp.async
//   memory.h   device memory and its red zones         streams.h   queues of work, events
//   runtime.h  the cuda* calls                         cublaslt.h  matrix products
//   nccl.h     ranks that are processes, through MPI   nccl.cpp    what its operations do
//
// What ends the program with a message naming kernel, block and thread:
//   a lane outside its mask; a mask with lanes that have ended; lanes of a warp in different collectives; a barrier at
//   different lines; a deadlock (who waits where); addresses of cp.async and ldmatrix that are not aligned or outside
//   shared or device memory; a thread that ends with copies under way; writes behind dynamic shared memory, SHARED
//   arrays and allocations; launches beyond the limits; arguments that point to host memory; copies against their
//   direction; a stack that is used up
// What shows as NaN, or as any wrong value, in the result:
//   shared memory that was not written (or whose barrier is missing), the target of a copy that was not waited for,
//   device memory that was not written; with SIMT_STREAMS=queues, work that did not wait for another stream's event
//
// What is not here: time, occupancy, registers, bank conflicts; memory order between threads (every write is seen at
// once by the threads that run later); divergence within a warp between two collectives; __launch_bounds__; the last
// bits of approximate functions and of the tensor cores' sums; clusters, TMA, wgmma. A race that no order of warps
// makes visible is not found: compute-sanitizer racecheck on a GPU is for those.
//
// Environment: SIMT_SEED (order of warps, blocks, streams), SIMT_THREADS (of the host), SIMT_STREAMS=queues (streams
// run apart), SIMT_KERNELS (file for names), SIMT_MEMORY_MB (of the device), CUDA_VISIBLE_DEVICES (empty: no device),
// SIMT_DEVICES (how many), SIMT_CAPABILITY (of each), SIMT_DRIVER (its version), SIMT_BUS_ID (of a card that processes
// share), SIMT_NCCL_FAILS.
#pragma once
#include "dev/simt/async.h"
#include "dev/simt/launch.h"
#include "dev/simt/runtime.h"
#include "dev/simt/warp.h"
#include "kernels/bf16.h"

#define LAUNCH(kernel, grid, block, shared, stream, ...) \
    simt::launcher<(kernel)>(                            \
        (kernel), stream,                                \
        simt::Launch{"", __FILE__, __LINE__, simt::extent(grid), simt::extent(block), size_t(shared)})(__VA_ARGS__)
#define SHARED(T, name, n) T(&name)[n] = simt::shared<T, n>([] {})
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(simt::current->block->dynamic)

// A NaN is always this one on the device.
inline uint16_t round_to_bf16(float x) {
    return x != x ? 0x7fff : to_bf16(x).bits;
}
inline uint32_t pack_bf16x2(float low, float high) {
    return round_to_bf16(low) | uint32_t(round_to_bf16(high)) << 16;
}
inline float exp2_approx(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0 : y;  // subnormal results are zero there
}
inline void opaque(float&) {}
inline void opaque(int&) {}
