// Attention without tensor cores, for what attention.cuh does not take: fp32, and bf16 of any head size up to 256. The
// formulas, shapes and packed documents are those of cpu/attention.h. All arithmetic is fp32.
//
// One warp has one row and head, and walks over the other side (keys, or queries in the dK/dV kernel) 32 at a time. The
// lanes change their meaning in the middle of a step, and the 32 weights pass through shared memory:
//
//      lane = key      score = q . k(lane)  ->  p(lane)      dot products without any exchange between lanes
//      lane = channel  o(c) += sum_j p(j) v(j, c)            rows of V read side by side
//
// All sums run in one order, and a row's gradient is summed by one warp: no atomics, the same bits every time.
#pragma once
#include <cmath>

#include "kernels/cuda.cuh"

constexpr int PLAIN_WARPS = 4;                        // a block
constexpr int PLAIN_HEAD_SIZE = 256;                  // at most
constexpr int PLAIN_CHANNELS = PLAIN_HEAD_SIZE / 32;  // of a lane: lane, lane + 32, ..

// One pass's shape as all kernels here take it.
struct PlainAttention {
    const int32_t* cu_seqlens;
    int documents;
    size_t N;
    int NH, NKV, HS;
    size_t stride;  // of qkv
    float scale;
};

// What a warp keeps in shared memory: two rows of a head, two weights for each of the 32 on the other side.
struct PlainScratch {
    float row[2][PLAIN_HEAD_SIZE];
    float weight[2][32];
};

// ----------------------------------------------------------------------------
// CUDA kernels

// The document that `row` is in: d with cu_seqlens[d] <= row < cu_seqlens[d + 1].
__device__ __forceinline__ int document_of(const PlainAttention& a, size_t row) {
    int low = 0, high = a.documents;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (size_t(a.cu_seqlens[middle]) <= row ? low : high) = middle;
    }
    return low;
}

template <class X>
__device__ __forceinline__ void plain_row(float* row, const X* in, int HS, int lane) {
    for (int c = lane; c < HS; c += 32) {
        row[c] = widen(in[c]);
    }
}

template <class X>
__device__ __forceinline__ float plain_dot(const float* row, const X* in, int HS) {
    float sum = 0;
    for (int c = 0; c < HS; c++) {
        sum = fmaf(row[c], widen(in[c]), sum);
    }
    return sum;
}

// sum(c) += weight(j) in(j, c) over `count` rows.
template <class X>
__device__ __forceinline__ void plain_weighted_rows(float (&sum)[PLAIN_CHANNELS], const float* weight, const X* in,
                                                    size_t stride, int count, int HS, int lane) {
    for (int j = 0; j < count; j++) {
        const float w = weight[j];
        const X* row = in + size_t(j) * stride;
#pragma unroll
        for (int i = 0; i < PLAIN_CHANNELS; i++) {
            if (lane + 32 * i < HS) {
                sum[i] = fmaf(w, widen(row[lane + 32 * i]), sum[i]);
            }
        }
    }
}

template <class X>
__device__ __forceinline__ void plain_store(X* out, const float (&sum)[PLAIN_CHANNELS], float factor, int HS,
                                            int lane) {
#pragma unroll
    for (int i = 0; i < PLAIN_CHANNELS; i++) {
        if (lane + 32 * i < HS) {
            out[lane + 32 * i] = narrow<X>(sum[i] * factor);
        }
    }
}

__device__ __forceinline__ PlainScratch& plain_scratch() {
    SHARED(PlainScratch, scratch, PLAIN_WARPS);
    return scratch[threadIdx.x / 32];
}

// A warp a query row and head.
template <class X>
__global__ void attention_plain_forward_kernel(X* out, size_t out_stride, float* lse, const X* qkv, PlainAttention a) {
    PlainScratch& mine = plain_scratch();
    const int lane = int(threadIdx.x) % 32;
    const size_t item = size_t(blockIdx.x) * PLAIN_WARPS + threadIdx.x / 32;
    if (item >= a.N * size_t(a.NH)) {
        return;
    }
    const size_t row = item / size_t(a.NH), first = size_t(a.cu_seqlens[document_of(a, row)]);
    const int h = int(item % size_t(a.NH)), kv = h / (a.NH / a.NKV);
    const X *K = qkv + size_t(a.NH + kv) * size_t(a.HS), *V = K + size_t(a.NKV) * size_t(a.HS);
    plain_row(mine.row[0], qkv + row * a.stride + size_t(h) * size_t(a.HS), a.HS, lane);
    __syncwarp();

    float o[PLAIN_CHANNELS] = {}, top = -INFINITY, sum = 0;  // sum: of this lane's keys
    for (size_t key0 = first; key0 <= row; key0 += 32) {
        const size_t key = key0 + size_t(lane);
        const float s = key <= row ? a.scale * plain_dot(mine.row[0], K + key * a.stride, a.HS) : -INFINITY;
        const float higher = fmaxf(top, warp_max(s)), shrink = expf(top - higher), p = expf(s - higher);
        top = higher;
        sum = sum * shrink + p;
        mine.weight[0][lane] = p;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < PLAIN_CHANNELS; i++) {
            o[i] *= shrink;
        }
        const int count = row - key0 < 32 ? int(row - key0) + 1 : 32;
        plain_weighted_rows(o, mine.weight[0], V + key0 * a.stride, a.stride, count, a.HS, lane);
        __syncwarp();  // all have read the weights before the next are written
    }
    sum = warp_sum(sum);
    plain_store(out + row * out_stride + size_t(h) * size_t(a.HS), o, 1 / sum, a.HS, lane);
    if (lane == 0) {
        lse[size_t(h) * a.N + row] = top + logf(sum);
    }
}

// A warp a query row and head: dQ, and delta (NH, N) = rowsum(dO O) for the kernel that follows.
template <class X>
__global__ void attention_plain_dq_kernel(X* dqkv, size_t dqkv_stride, float* delta, const X* dout, const X* out,
                                          size_t out_stride, const float* lse, const X* qkv, PlainAttention a) {
    PlainScratch& mine = plain_scratch();
    const int lane = int(threadIdx.x) % 32;
    const size_t item = size_t(blockIdx.x) * PLAIN_WARPS + threadIdx.x / 32;
    if (item >= a.N * size_t(a.NH)) {
        return;
    }
    const size_t row = item / size_t(a.NH), first = size_t(a.cu_seqlens[document_of(a, row)]);
    const int h = int(item % size_t(a.NH)), kv = h / (a.NH / a.NKV);
    const size_t head = size_t(h) * size_t(a.HS);
    const X *K = qkv + size_t(a.NH + kv) * size_t(a.HS), *V = K + size_t(a.NKV) * size_t(a.HS);
    const X *dO = dout + item * size_t(a.HS), *O = out + row * out_stride + head;
    plain_row(mine.row[0], qkv + row * a.stride + head, a.HS, lane);
    plain_row(mine.row[1], dO, a.HS, lane);
    __syncwarp();
    float D = 0;
    for (int c = lane; c < a.HS; c += 32) {
        D = fmaf(mine.row[1][c], widen(O[c]), D);
    }
    D = warp_sum(D);
    const float row_lse = lse[size_t(h) * a.N + row];

    float dq[PLAIN_CHANNELS] = {};
    for (size_t key0 = first; key0 <= row; key0 += 32) {
        const size_t key = key0 + size_t(lane);
        float ds = 0;
        if (key <= row) {
            const float s = a.scale * plain_dot(mine.row[0], K + key * a.stride, a.HS);
            ds = expf(s - row_lse) * (plain_dot(mine.row[1], V + key * a.stride, a.HS) - D);
        }
        mine.weight[0][lane] = ds;
        __syncwarp();
        const int count = row - key0 < 32 ? int(row - key0) + 1 : 32;
        plain_weighted_rows(dq, mine.weight[0], K + key0 * a.stride, a.stride, count, a.HS, lane);
        __syncwarp();
    }
    plain_store(dqkv + row * dqkv_stride + head, dq, a.scale, a.HS, lane);
    if (lane == 0) {
        delta[size_t(h) * a.N + row] = D;
    }
}

// A warp a key row and kv head, which sums over the query heads of its group.
template <class X>
__global__ void attention_plain_dkv_kernel(X* dqkv, size_t dqkv_stride, const float* delta, const X* dout,
                                           const float* lse, const X* qkv, PlainAttention a) {
    PlainScratch& mine = plain_scratch();
    const int lane = int(threadIdx.x) % 32, group = a.NH / a.NKV;
    const size_t item = size_t(blockIdx.x) * PLAIN_WARPS + threadIdx.x / 32;
    if (item >= a.N * size_t(a.NKV)) {
        return;
    }
    const size_t row = item / size_t(a.NKV), end = size_t(a.cu_seqlens[document_of(a, row) + 1]);
    const int kv = int(item % size_t(a.NKV));
    const size_t HS = size_t(a.HS), k_at = size_t(a.NH + kv) * HS, v_at = k_at + size_t(a.NKV) * HS;
    plain_row(mine.row[0], qkv + row * a.stride + k_at, a.HS, lane);
    plain_row(mine.row[1], qkv + row * a.stride + v_at, a.HS, lane);
    __syncwarp();

    float dk[PLAIN_CHANNELS] = {}, dv[PLAIN_CHANNELS] = {};
    for (int h = kv * group; h < (kv + 1) * group; h++) {
        const size_t dout_stride = size_t(a.NH) * HS;
        const X *Q = qkv + size_t(h) * HS, *dO = dout + size_t(h) * HS;
        for (size_t query0 = row; query0 < end; query0 += 32) {
            const size_t query = query0 + size_t(lane);
            float p = 0, ds = 0;
            if (query < end) {
                const float s = a.scale * plain_dot(mine.row[0], Q + query * a.stride, a.HS);
                p = expf(s - lse[size_t(h) * a.N + query]);
                ds = p * (plain_dot(mine.row[1], dO + query * dout_stride, a.HS) - delta[size_t(h) * a.N + query]);
            }
            mine.weight[0][lane] = p;
            mine.weight[1][lane] = ds;
            __syncwarp();
            const int count = end - query0 < 32 ? int(end - query0) : 32;
            plain_weighted_rows(dv, mine.weight[0], dO + query0 * dout_stride, dout_stride, count, a.HS, lane);
            plain_weighted_rows(dk, mine.weight[1], Q + query0 * a.stride, a.stride, count, a.HS, lane);
            __syncwarp();
        }
    }
    plain_store(dqkv + row * dqkv_stride + k_at, dk, a.scale, a.HS, lane);
    plain_store(dqkv + row * dqkv_stride + v_at, dv, 1, a.HS, lane);
}

// ----------------------------------------------------------------------------
// kernel launchers, for the dispatch in attention.cuh

inline PlainAttention plain_attention(const int32_t* cu_seqlens, int documents, size_t N, int NH, int NKV, int HS) {
    return {cu_seqlens, documents, N, NH, NKV, HS, size_t(NH + 2 * NKV) * size_t(HS), float(1 / std::sqrt(double(HS)))};
}

inline dim3 plain_grid(size_t N, int heads) {
    return dim3(unsigned(ceil_div(N * size_t(heads), PLAIN_WARPS)));
}

template <class X, class Stream>
void attention_plain_forward(Stream stream, X* out, size_t out_stride, float* lse, const X* qkv,
                             const PlainAttention& a) {
    LAUNCH((attention_plain_forward_kernel<X>), plain_grid(a.N, a.NH), 32 * PLAIN_WARPS, 0, stream, out, out_stride,
           lse, qkv, a);
}

// delta: (NH, N) of workspace.
template <class X, class Stream>
void attention_plain_backward(Stream stream, X* dqkv, size_t dqkv_stride, float* delta, const X* dout, const X* out,
                              size_t out_stride, const float* lse, const X* qkv, const PlainAttention& a) {
    LAUNCH((attention_plain_dq_kernel<X>), plain_grid(a.N, a.NH), 32 * PLAIN_WARPS, 0, stream, dqkv, dqkv_stride, delta,
           dout, out, out_stride, lse, qkv, a);
    LAUNCH((attention_plain_dkv_kernel<X>), plain_grid(a.N, a.NKV), 32 * PLAIN_WARPS, 0, stream, dqkv, dqkv_stride,
           delta, dout, lse, qkv, a);
}
