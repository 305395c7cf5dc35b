// Rotary embedding (Su et al. 2021), HF's half-split form, in place on the first heads of packed rows.
//
//   (a, b) -> (a cos - b sin, b cos + a sin),  pairs (i, i + HS/2);  the inverse turns by -sin
//
// Read and written once: 4 bytes an element in bf16 (table k, row 8). A row's cosines and sines, 4 HS bytes, are read
// from memory by its first head and from the cache by the others.
#pragma once
#include "kernels/gpu.h"
#include "kernels/vector.cuh"

// ----------------------------------------------------------------------------
// CUDA kernels

template <class X, int E>
__global__ void rope_kernel(X* qkv, size_t stride, Rope<float> rope, int parts, float direction) {
    const RowPlace at = row_place<1>(parts);
    const int half = rope.HS / 2, pieces = half / E;  // of half a head
    const int head = at.first / pieces, i = at.first % pieces * E;
    if (head >= rope.heads) {
        return;
    }
    const size_t angle = size_t(rope.positions[at.row]) * size_t(half) + size_t(i);
    X* low = qkv + at.row * stride + head * rope.HS + i;
    float a[E], b[E], c[E], s[E];
    load(a, low);
    load(b, low + half);
    load(c, rope.cos + angle);
    load(s, rope.sin + angle);
#pragma unroll
    for (int k = 0; k < E; k++) {
        const float x = a[k], y = b[k], sine = s[k] * direction;
        a[k] = fmaf(-y, sine, x * c[k]);
        b[k] = fmaf(x, sine, y * c[k]);
    }
    store(low, a);
    store(low + half, b);
}

// ----------------------------------------------------------------------------
// kernel launchers

template <class X>
void rope_rows(Gpu<X>& dev, X* qkv, size_t stride, const Rope<float>& rope, size_t N, float direction) {
    constexpr int E = VECTOR<X>;
    const size_t half = size_t(rope.HS) / 2;
    if (N == 0 || rope.heads == 0) {
        return;
    }
    if (half % E == 0 && vectors_fit(E, qkv, stride) && vectors_fit(E, rope.cos, 0) && vectors_fit(E, rope.sin, 0)) {
        const RowGrid g = row_grid(N, size_t(rope.heads) * half / E, 1);
        LAUNCH((rope_kernel<X, E>), g.blocks, g.threads, 0, dev.stream, qkv, stride, rope, g.parts, direction);
    } else {
        const RowGrid g = row_grid(N, size_t(rope.heads) * half, 1);
        LAUNCH((rope_kernel<X, 1>), g.blocks, g.threads, 0, dev.stream, qkv, stride, rope, g.parts, direction);
    }
}

// qkv (N rows, stride elements apart): the first rope.heads heads of each row, in place.
template <class X>
void rope_forward(Gpu<X>& dev, X* qkv, size_t stride, const Rope<float>& rope, size_t N) {
    rope_rows(dev, qkv, stride, rope, N, 1);
}

// The inverse rotation, which is the gradient.
template <class X>
void rope_backward(Gpu<X>& dev, X* dqkv, size_t stride, const Rope<float>& rope, size_t N) {
    rope_rows(dev, dqkv, stride, rope, N, -1);
}
