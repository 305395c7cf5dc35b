// The head and its cross-entropy, for the rows that have a label only, in chunks of rows, so that the logits of a pass
// never stand in memory together.
//
//   logits = x W^T,  lse = log sum_v exp(logit_v),  loss = lse - logit_label
//   dlogit_v = scale (exp(logit_v - lse) - [v = label]),  dx = dlogits W
//
//   workspace | x (rows, C) | logits (rows, V), then dlogits | dx (rows, C) fp32 |
//
// W is an operand as it stands: it is held in X.
//
// Bytes a logit in bf16, in one kernel: read 2 for the loss; read 2 and written 2 for the gradient (table k, row 6).
// The second walk over a row goes backwards, so that it begins with what the caches still hold.
#pragma once
#include <cassert>
#include <cfloat>
#include <cmath>

#include "kernels/gpu.h"
#include "kernels/matmul.cuh"
#include "kernels/rmsnorm.cuh"
#include "kernels/vector.cuh"
#include "kernels/workspace.cuh"

constexpr size_t HEAD_LOGITS = size_t(1) << 27;            // elements of the logits of a chunk, at most ...
constexpr size_t HEAD_ROWS = 4096, HEAD_LEAST_ROWS = 128;  // ... within these bounds
constexpr int CLASSIFIER_THREADS = 512;

// ----------------------------------------------------------------------------
// CUDA kernels

// The sum of exp(logit - max) over what a thread, a warp, a block has met.
struct SoftmaxSum {
    float max, sum;
};

__device__ __forceinline__ SoftmaxSum softmax_join(SoftmaxSum a, SoftmaxSum b) {
    const float max = fmaxf(a.max, b.max);
    return {max, fmaf(a.sum, expf(a.max - max), b.sum * expf(b.max - max))};
}

// Elements i .. i + E of a row of V; behind its end what adds nothing to a sum of exponentials.
template <bool STREAM, int E, class X>
__device__ __forceinline__ void load_logits(float (&x)[E], const X* row, int i, int V) {
    load<STREAM>(x, row + i);  // the row's memory is a whole number of pieces
    if (i + E > V) {
#pragma unroll
        for (int k = 0; k < E; k++) {
            x[k] = i + k < V ? x[k] : -INFINITY;
        }
    }
}

// A block works on one row. losses[i], correct[i] of row i of logits (V wide, ld apart), which with backward become
// their gradient.
template <class X, int E, int U>
__global__ void __launch_bounds__(CLASSIFIER_THREADS)
    classifier_kernel(float* losses, uint8_t* correct, X* logits, size_t ld, const int32_t* labels, int V, float scale,
                      bool backward) {
    SHARED(float, maxes, CLASSIFIER_THREADS / 32);
    SHARED(float, sums, CLASSIFIER_THREADS / 32);
    SHARED(int, ties, CLASSIFIER_THREADS / 32);
    X* row = logits + size_t(blockIdx.x) * ld;
    const int label = labels[blockIdx.x], step = int(blockDim.x) * E, mine = int(threadIdx.x) * E;
    const int warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
    // careful: read before the barrier, behind which the gradient takes its place
    const float target = widen(row[label]);

    SoftmaxSum all = {-FLT_MAX, 0};
    bool tie = false;  // a lower id has as great a logit
    for (int first = mine; first < V; first += step * U) {
        float x[U][E];
#pragma unroll
        for (int j = 0; j < U; j++) {
            if (first + j * step < V) {
                load_logits<false>(x[j], row, first + j * step, V);
            }
        }
#pragma unroll
        for (int j = 0; j < U; j++) {
            const int i = first + j * step;
            if (i < V) {
                float greatest = x[j][0];
#pragma unroll
                for (int k = 1; k < E; k++) {
                    greatest = fmaxf(greatest, x[j][k]);
                }
                if (!tie && i < label && greatest >= target) {
#pragma unroll
                    for (int k = 0; k < E; k++) {
                        tie |= (x[j][k] >= target) & (i + k < label);
                    }
                }
                const float max = fmaxf(all.max, greatest);
                all.sum *= expf(all.max - max);
                all.max = max;
#pragma unroll
                for (int k = 0; k < E; k++) {
                    all.sum += expf(x[j][k] - max);
                }
            }
        }
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        const SoftmaxSum other = {__shfl_xor_sync(ALL_LANES, all.max, o), __shfl_xor_sync(ALL_LANES, all.sum, o)};
        all = softmax_join(all, other);
    }
    tie = __any_sync(ALL_LANES, tie);
    if (threadIdx.x % 32 == 0) {
        maxes[warp] = all.max;
        sums[warp] = all.sum;
        ties[warp] = tie;
    }
    __syncthreads();
    all = {maxes[0], sums[0]};
    tie = ties[0];
    for (int w = 1; w < warps; w++) {
        all = softmax_join(all, {maxes[w], sums[w]});
        tie = tie || ties[w];
    }
    const float lse = all.max + logf(all.sum);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = lse - target;
        correct[blockIdx.x] = target == all.max && !tie;
    }
    if (!backward) {
        return;
    }
    for (int first = mine + (V - 1) / (step * U) * (step * U); first >= 0; first -= step * U) {
        float x[U][E];
#pragma unroll
        for (int j = 0; j < U; j++) {
            if (first + j * step < V) {
                load_logits<true>(x[j], row, first + j * step, V);
            }
        }
#pragma unroll
        for (int j = 0; j < U; j++) {
            const int i = first + j * step;
            if (i < V) {
#pragma unroll
                for (int k = 0; k < E; k++) {
                    x[j][k] = __fmul_rn(expf(x[j][k] - lse), scale);
                }
                if (i <= label && label < i + E) {
#pragma unroll
                    for (int k = 0; k < E; k++) {
                        x[j][k] -= i + k == label ? scale : 0;
                    }
                }
                store<true>(row + i, x[j]);
            }
        }
    }
}

// out (n, C) = rows[i] of x, x_stride apart: the input of the head when it has no norm.
template <class X, int E, int U>
__global__ void gather_rows_kernel(X* out, const X* x, size_t x_stride, const int32_t* rows, int parts, int C) {
    const RowPlace at = row_place<U>(parts);
    const X* in = x + size_t(rows[at.row]) * x_stride;
    float v[U][E];
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < C) {
            load(v[j], in + i);
        }
    }
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < C) {
            store(out + at.row * size_t(C) + i, v[j]);
        }
    }
}

// Row rows[i] of out (.., C) = row i of x (n, C), rounded to X.
template <class X, int E, int U>
__global__ void scatter_rows_kernel(X* out, const float* x, const int32_t* rows, int parts, int C) {
    const RowPlace at = row_place<U>(parts);
    X* to = out + size_t(rows[at.row]) * size_t(C);
    float v[U][E];
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < C) {
            load(v[j], x + at.row * size_t(C) + i);
        }
    }
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < C) {
            store(to + i, v[j]);
        }
    }
}

// ----------------------------------------------------------------------------
// kernel launchers

template <class X>
struct HeadSpace {
    size_t rows;  // of a chunk
    size_t ld;    // from one row of logits to the next: whole pieces of 16 bytes
    X* x;
    X* logits;
    float* dx;
};

template <class X>
HeadSpace<X> head_space(Workspace& w, int C, int V, size_t n) {
    HeadSpace<X> s = {};
    s.ld = ceil_div(size_t(V), VECTOR<X>) * VECTOR<X>;
    s.rows = HEAD_LOGITS / s.ld / 128 * 128;
    s.rows = s.rows < HEAD_ROWS ? s.rows : HEAD_ROWS;
    s.rows = s.rows > HEAD_LEAST_ROWS ? s.rows : HEAD_LEAST_ROWS;
    s.rows = s.rows < n ? s.rows : n;
    s.x = workspace_take<X>(w, s.rows * size_t(C));
    s.logits = workspace_take<X>(w, s.rows * s.ld);
    s.dx = workspace_take<float>(w, s.rows * size_t(C));
    return s;
}

// Of classifier and head_logits, for n rows.
template <class X>
size_t classifier_workspace(const Gpu<X>&, int C, int V, size_t n) {
    Workspace w;
    head_space<X>(w, C, V, n);
    return w.used;
}

// The head's elements: device_store had them held as X.
template <class X>
const X* head_elements(const Matrix& head) {
    assert(head.store == (sizeof(X) == 2 ? Store::BF16 : Store::F32));
    return static_cast<const X*>(head.data);
}

// s.x (n, C) = the head's input in rows[0] .. rows[n - 1].
template <class X>
void head_input_rows(Gpu<X>& dev, const LinearInput<X, float>& in, const int32_t* rows, size_t n, int C,
                     const HeadSpace<X>& s) {
    constexpr int E = VECTOR<X>, U = 4;
    if (in.kind == LinearInput<X, float>::RMSNORM) {
        rmsnorm_rows(dev, s.x, size_t(C), in.x, in.stride, rows, in.rstd, in.norm_w, n, C);
    } else if (vectors_fit(E, s.x, size_t(C)) && vectors_fit(E, in.x, in.stride)) {
        const RowGrid g = row_grid(n, size_t(C) / E, U);
        LAUNCH((gather_rows_kernel<X, E, U>), g.blocks, g.threads, 0, dev.stream, s.x, in.x, in.stride, rows, g.parts,
               C);
    } else {
        const RowGrid g = row_grid(n, size_t(C), U);
        LAUNCH((gather_rows_kernel<X, 1, U>), g.blocks, g.threads, 0, dev.stream, s.x, in.x, in.stride, rows, g.parts,
               C);
    }
}

// logits (n, V), rows ld apart, = s.x (n, C) W^T.
template <class X, class Out>
void head_product(Gpu<X>& dev, Out* logits, size_t ld, const Matrix& head, size_t n, const HeadSpace<X>& s) {
    Matmul<X, Out> p;
    p.d = logits;
    p.ldd = ld;
    p.a = s.x;
    p.lda = size_t(head.cols);
    p.b = head_elements<X>(head);
    p.ldb = size_t(head.cols);
    p.b_trans = true;
    p.M = n;
    p.N = size_t(head.rows);
    p.K = size_t(head.cols);
    matmul(dev, p);
}

// s.dx (n, C) = dlogits (n, V) W.
template <class X>
void head_backward(Gpu<X>& dev, const Matrix& head, size_t n, const HeadSpace<X>& s) {
    Matmul<X, float> p;
    p.d = s.dx;
    p.ldd = size_t(head.cols);
    p.a = s.logits;
    p.lda = s.ld;
    p.b = head_elements<X>(head);
    p.ldb = size_t(head.cols);
    p.M = n;
    p.N = size_t(head.cols);
    p.K = size_t(head.rows);
    matmul(dev, p);
}

// logits (n, V) = x[rows] W^T, in fp32. Workspace: classifier_workspace.
template <class X>
void head_logits(Gpu<X>& dev, float* logits, const LinearInput<X, float>& in, const Matrix& head, const int32_t* rows,
                 size_t n) {
    Workspace w = workspace_of(dev);
    const HeadSpace<X> s = head_space<X>(w, head.cols, head.rows, n);
    const size_t V = size_t(head.rows);
    for (size_t first = 0; first < n; first += s.rows) {
        const size_t m = n - first < s.rows ? n - first : s.rows;
        head_input_rows(dev, in, rows + first, m, head.cols, s);
        head_product(dev, logits + first * V, V, head, m, s);
    }
}

// losses (n) and correct (n) of logits (n, V), rows ld apart, a multiple of VECTOR<X>; backward: logits become their
// gradient, times scale.
template <class X>
void classifier_rows(Gpu<X>& dev, float* losses, uint8_t* correct, X* logits, size_t ld, const int32_t* labels,
                     size_t n, int V, float scale, bool backward) {
    constexpr int E = VECTOR<X>, U = 4;
    size_t threads = ceil_div(size_t(V), size_t(U * E) * 32) * 32;
    threads = threads < CLASSIFIER_THREADS ? threads : CLASSIFIER_THREADS;
    LAUNCH((classifier_kernel<X, E, U>), unsigned(n), unsigned(threads), 0, dev.stream, losses, correct, logits, ld,
           labels, V, scale, backward);
}

// For the n rows that have a label: losses[i] = lse - logit[label], correct[i] = label is the arg max (the lowest id
// wins a tie), of logits rounded to X; din (N, C) = scale * gradient in those rows, 0 elsewhere. din nullptr: no
// gradient.
template <class X>
void classifier(Gpu<X>& dev, float* losses, uint8_t* correct, X* din, const LinearInput<X, float>& in,
                const Matrix& head, const int32_t* rows, const int32_t* labels, size_t n, size_t N, float scale) {
    constexpr int E = VECTOR<X>, U = 4;
    const int C = head.cols, V = head.rows;
    Workspace w = workspace_of(dev);
    const HeadSpace<X> s = head_space<X>(w, C, V, n);
    if (din) {
        device_zero(dev, din, N * size_t(C) * sizeof(X));
    }
    for (size_t first = 0; first < n; first += s.rows) {
        const size_t m = n - first < s.rows ? n - first : s.rows;
        head_input_rows(dev, in, rows + first, m, C, s);
        head_product(dev, s.logits, s.ld, head, m, s);
        classifier_rows(dev, losses + first, correct + first, s.logits, s.ld, labels + first, m, V, scale,
                        din != nullptr);
        if (!din) {
            continue;
        }
        head_backward(dev, head, m, s);
        if (vectors_fit(E, din, size_t(C))) {
            const RowGrid g = row_grid(m, size_t(C) / E, U);
            LAUNCH((scatter_rows_kernel<X, E, U>), g.blocks, g.threads, 0, dev.stream, din, s.dx, rows + first, g.parts,
                   C);
        } else {
            const RowGrid g = row_grid(m, size_t(C), U);
            LAUNCH((scatter_rows_kernel<X, 1, U>), g.blocks, g.threads, 0, dev.stream, din, s.dx, rows + first, g.parts,
                   C);
        }
    }
}
