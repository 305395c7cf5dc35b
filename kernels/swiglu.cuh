// SwiGLU (Shazeer 2020): gate and up stand side by side in a row of 2 F.
//
//   out = silu(gate) up,  silu(x) = x s,  s = 1 / (1 + exp(-x))
//   dgate = dout up s (1 + gate (1 - s)),  dup = dout gate s
//
// Bytes an element of out in bf16, each read and written once: forward 6, backward 10 (table k, row 9).
#pragma once
#include "kernels/gpu.h"
#include "kernels/vector.cuh"

// ----------------------------------------------------------------------------
// CUDA kernels

// The quotient to two units in the last place, 0 where exp(-x) is above 2^126: a correctly rounded one would make these
// kernels wait for arithmetic instead of memory.
__device__ __forceinline__ float sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + expf(-x));
}

template <class X, int E, int U>
__global__ void swiglu_forward_kernel(X* out, size_t out_stride, const X* gate_up, int parts, int F) {
    const RowPlace at = row_place<U>(parts);
    const X* gate = gate_up + at.row * 2 * size_t(F);
    const X* up = gate + F;
    float g[U][E], u[U][E];
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < F) {
            load(g[j], gate + i);
            load(u[j], up + i);
        }
    }
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < F) {
#pragma unroll
            for (int k = 0; k < E; k++) {
                g[j][k] = g[j][k] * sigmoid(g[j][k]) * u[j][k];
            }
            store(out + at.row * out_stride + i, g[j]);
        }
    }
}

// dgate_up may be gate_up itself: a thread reads all of its elements before it writes one.
template <class X, int E, int U>
__global__ void swiglu_backward_kernel(X* dgate_up, size_t stride, const X* dout, const X* gate_up, int parts, int F) {
    const RowPlace at = row_place<U>(parts);
    const X* gate = gate_up + at.row * 2 * size_t(F);
    const X* up = gate + F;
    X* dgate = dgate_up + at.row * stride;
    X* dup = dgate + F;
    float g[U][E], u[U][E], d[U][E];
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < F) {
            load(g[j], gate + i);
            load(u[j], up + i);
            load(d[j], dout + at.row * size_t(F) + i);
        }
    }
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < F) {
#pragma unroll
            for (int k = 0; k < E; k++) {
                const float s = sigmoid(g[j][k]), silu = g[j][k] * s;
                g[j][k] = d[j][k] * u[j][k] * fmaf(silu, 1 - s, s);
                u[j][k] = d[j][k] * silu;
            }
            store(dgate + i, g[j]);
            store(dup + i, u[j]);
        }
    }
}

// ----------------------------------------------------------------------------
// kernel launchers

// out (N, F), rows out_stride apart, = silu(gate) up, gate_up (N, 2F). Columns of out behind F are left alone.
template <class X>
void swiglu_forward(Gpu<X>& dev, X* out, size_t out_stride, const X* gate_up, size_t N, int F) {
    constexpr int E = VECTOR<X>, U = 2;
    if (N == 0) {
        return;
    }
    if (vectors_fit(E, out, out_stride) && vectors_fit(E, gate_up, size_t(F))) {
        const RowGrid g = row_grid(N, size_t(F) / E, U);
        LAUNCH((swiglu_forward_kernel<X, E, U>), g.blocks, g.threads, 0, dev.stream, out, out_stride, gate_up, g.parts,
               F);
    } else {
        const RowGrid g = row_grid(N, size_t(F), U);
        LAUNCH((swiglu_forward_kernel<X, 1, U>), g.blocks, g.threads, 0, dev.stream, out, out_stride, gate_up, g.parts,
               F);
    }
}

// dgate_up (N, 2F), rows stride apart, = the gradient for dout (N, F).
template <class X>
void swiglu_backward(Gpu<X>& dev, X* dgate_up, size_t stride, const X* dout, const X* gate_up, size_t N, int F) {
    constexpr int E = VECTOR<X>, U = 2;
    if (N == 0) {
        return;
    }
    if (vectors_fit(E, dgate_up, stride) && vectors_fit(E, dout, size_t(F)) && vectors_fit(E, gate_up, size_t(F))) {
        const RowGrid g = row_grid(N, size_t(F) / E, U);
        LAUNCH((swiglu_backward_kernel<X, E, U>), g.blocks, g.threads, 0, dev.stream, dgate_up, stride, dout, gate_up,
               g.parts, F);
    } else {
        const RowGrid g = row_grid(N, size_t(F), U);
        LAUNCH((swiglu_backward_kernel<X, 1, U>), g.blocks, g.threads, 0, dev.stream, dgate_up, stride, dout, gate_up,
               g.parts, F);
    }
}
