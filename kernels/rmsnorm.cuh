// RMSNorm (Zhang, Sennrich 2019), statistics in fp32.
//
//   rstd = 1 / sqrt(mean(x^2) + eps)            out = round_to_X(x rstd) w, as Hugging Face's LlamaRMSNorm rounds
//   dx += rstd (dout w - x rstd^2 mean(dout w x)),  w frozen
//
// Bytes an element in bf16, each read and written once: rstd 2, forward 4, backward 8 (table k, row 7). The weight, 4
// bytes a column, stays in the caches. The backward pass needs a row twice; it keeps in registers what it has read.
#pragma once
#include "kernels/gpu.h"
#include "kernels/vector.cuh"

// ----------------------------------------------------------------------------
// CUDA kernels

template <class X, int E, int U>
__global__ void __launch_bounds__(512) rmsnorm_rstd_kernel(float* rstd, const X* x, size_t N, int C, float eps) {
    SHARED(float, sums, 16);
    const size_t row = size_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= N) {
        return;  // whole warps, in blocks that have no barrier: only such have several rows
    }
    const X* in = x + row * size_t(C);
    const int step = int(blockDim.x) * E;
    float sum[E] = {};
    for (int first = int(threadIdx.x) * E; first < C; first += step * U) {
        float v[U][E] = {};
#pragma unroll
        for (int j = 0; j < U; j++) {
            if (first + j * step < C) {
                load(v[j], in + first + j * step);
            }
        }
#pragma unroll
        for (int j = 0; j < U; j++) {
#pragma unroll
            for (int k = 0; k < E; k++) {
                sum[k] = fmaf(v[j][k], v[j][k], sum[k]);
            }
        }
    }
#pragma unroll
    for (int k = 1; k < E; k++) {
        sum[0] += sum[k];
    }
    const float all = team_sum(sum[0], sums);
    if (threadIdx.x == 0) {
        rstd[row] = 1 / sqrtf(all / float(C) + eps);
    }
}

template <class X, int E, int U>
__global__ void rmsnorm_forward_kernel(X* out, size_t out_stride, const X* x, size_t x_stride, const int32_t* rows,
                                       const float* rstd, const float* w, int parts, int C) {
    const RowPlace at = row_place<U>(parts);
    const size_t from = rows ? size_t(rows[at.row]) : at.row;
    const X* in = x + from * x_stride;
    const float r = rstd[from];
    float v[U][E], weight[U][E];
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < C) {
            load(v[j], in + i);
            load(weight[j], w + i);
        }
    }
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < C) {
#pragma unroll
            for (int k = 0; k < E; k++) {
                v[j][k] = widen(narrow<X>(v[j][k] * r)) * weight[j][k];
            }
            store(out + at.row * out_stride + i, v[j]);
        }
    }
}

// The row is walked in spans of U pieces a thread, there and back: the span at which the first walk ends is still in
// registers when the second begins, and most rows have only that one.
template <class X, int E, int U>
__global__ void __launch_bounds__(512) rmsnorm_backward_kernel(X* dx, size_t dx_stride, const X* dout, const X* x,
                                                               const float* rstd, const float* w, size_t N, int C) {
    SHARED(float, sums, 16);
    const size_t row = size_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= N) {
        return;  // as above
    }
    const int step = int(blockDim.x) * E, span = step * U;
    const size_t at = row * size_t(C);
    X* to = dx + row * dx_stride;
    float v[U][E], d[U][E], sum[U][E];  // x, dout w, dx
    const auto read = [&](int first, bool with_dx) {
        float weight[U][E];
#pragma unroll
        for (int j = 0; j < U; j++) {
            const int i = first + j * step;
            if (i < C) {
                load(v[j], x + at + i);
                load(d[j], dout + at + i);
                load(weight[j], w + i);
                if (with_dx) {
                    load(sum[j], to + i);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < U; j++) {
#pragma unroll
            for (int k = 0; k < E; k++) {
                d[j][k] *= weight[j][k];
            }
        }
    };

    int first = int(threadIdx.x) * E;
    const int last = first + (C - 1) / span * span;
    float dot = 0;
    for (;; first += span) {
        read(first, first == last);
#pragma unroll
        for (int j = 0; j < U; j++) {
            if (first + j * step < C) {
#pragma unroll
                for (int k = 0; k < E; k++) {
                    dot = fmaf(d[j][k], v[j][k], dot);
                }
            }
        }
        if (first == last) {
            break;
        }
    }
    const float r = rstd[row], back = r * r * (team_sum(dot, sums) / float(C));
    for (;; first -= span, read(first, true)) {
#pragma unroll
        for (int j = 0; j < U; j++) {
            const int i = first + j * step;
            if (i < C) {
#pragma unroll
                for (int k = 0; k < E; k++) {
                    sum[j][k] = fmaf(r, fmaf(-v[j][k], back, d[j][k]), sum[j][k]);
                }
                store(to + i, sum[j]);
            }
        }
        if (first < span) {
            break;
        }
    }
}

// ----------------------------------------------------------------------------
// kernel launchers

// rstd (N) = of x (N, C).
template <class X>
void rmsnorm_rstd(Gpu<X>& dev, float* rstd, const X* x, size_t N, int C, double eps) {
    constexpr int E = VECTOR<X>, U = 4;
    if (N == 0) {
        return;
    }
    if (vectors_fit(E, x, size_t(C))) {
        const RowTeams t = row_teams(N, size_t(C) / E, U);
        LAUNCH((rmsnorm_rstd_kernel<X, E, U>), t.blocks, t.block, 0, dev.stream, rstd, x, N, C, float(eps));
    } else {
        const RowTeams t = row_teams(N, size_t(C), U);
        LAUNCH((rmsnorm_rstd_kernel<X, 1, U>), t.blocks, t.block, 0, dev.stream, rstd, x, N, C, float(eps));
    }
}

// out (N, C), rows out_stride apart, = x * rstd * w of row rows[i] (nullptr: i) of x, whose rows are x_stride apart.
// Columns of out behind C are left alone.
template <class X>
void rmsnorm_rows(Gpu<X>& dev, X* out, size_t out_stride, const X* x, size_t x_stride, const int32_t* rows,
                  const float* rstd, const float* w, size_t N, int C) {
    constexpr int E = VECTOR<X>, U = 2;
    if (N == 0) {
        return;
    }
    if (C % E == 0 && vectors_fit(E, out, out_stride) && vectors_fit(E, x, x_stride) && vectors_fit(E, w, 0)) {
        const RowGrid g = row_grid(N, size_t(C) / E, U);
        LAUNCH((rmsnorm_forward_kernel<X, E, U>), g.blocks, g.threads, 0, dev.stream, out, out_stride, x, x_stride,
               rows, rstd, w, g.parts, C);
    } else {
        const RowGrid g = row_grid(N, size_t(C), U);
        LAUNCH((rmsnorm_forward_kernel<X, 1, U>), g.blocks, g.threads, 0, dev.stream, out, out_stride, x, x_stride,
               rows, rstd, w, g.parts, C);
    }
}

template <class X>
void rmsnorm_forward(Gpu<X>& dev, X* out, size_t out_stride, const X* x, const int32_t* rows, const float* rstd,
                     const float* w, size_t N, int C) {
    rmsnorm_rows(dev, out, out_stride, x, size_t(C), rows, rstd, w, N, C);
}

// dx (N, C), rows dx_stride apart, += the gradient for dout (N, C), rounded once.
template <class X>
void rmsnorm_backward(Gpu<X>& dev, X* dx, size_t dx_stride, const X* dout, const X* x, const float* rstd,
                      const float* w, size_t N, int C) {
    constexpr int E = VECTOR<X>, U = 2;
    if (N == 0) {
        return;
    }
    if (vectors_fit(E, dx, dx_stride) && vectors_fit(E, dout, size_t(C)) && vectors_fit(E, x, size_t(C)) &&
        vectors_fit(E, w, 0)) {
        const RowTeams t = row_teams(N, size_t(C) / E, U);
        LAUNCH((rmsnorm_backward_kernel<X, E, U>), t.blocks, t.block, 0, dev.stream, dx, dx_stride, dout, x, rstd, w, N,
               C);
    } else {
        const RowTeams t = row_teams(N, size_t(C), U);
        LAUNCH((rmsnorm_backward_kernel<X, 1, U>), t.blocks, t.block, 0, dev.stream, dx, dx_stride, dout, x, rstd, w, N,
               C);
    }
}
