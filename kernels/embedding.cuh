// Embedding: rows of the table (V, C), stored as BF16, F16 or F32, to the activations. Read and written once: 4 bytes
// an element in bf16 (table k, row 12).
#pragma once
#include "kernels/gpu.h"
#include "kernels/vector.cuh"

// ----------------------------------------------------------------------------
// CUDA kernels

template <class X, class S, int E, int U>
__global__ void embedding_kernel(X* out, const int32_t* tokens, const S* wte, int parts, int C) {
    const RowPlace at = row_place<U>(parts);
    const S* in = wte + size_t(tokens[at.row]) * size_t(C);
    float x[U][E];
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < C) {
            load(x[j], in + i);
        }
    }
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < C) {
            store(out + at.row * size_t(C) + i, x[j]);
        }
    }
}

// ----------------------------------------------------------------------------
// kernel launchers

template <class S, class X>
void embedding_rows(Gpu<X>& dev, X* out, const int32_t* tokens, const Matrix& wte, size_t N) {
    constexpr int E = VECTOR<X>, U = 4;
    const S* data = static_cast<const S*>(wte.data);
    const size_t C = size_t(wte.cols);
    if (vectors_fit(E, out, C) && vectors_fit(E, data, C)) {
        const RowGrid g = row_grid(N, C / E, U);
        LAUNCH((embedding_kernel<X, S, E, U>), g.blocks, g.threads, 0, dev.stream, out, tokens, data, g.parts, int(C));
    } else {
        const RowGrid g = row_grid(N, C, U);
        LAUNCH((embedding_kernel<X, S, 1, U>), g.blocks, g.threads, 0, dev.stream, out, tokens, data, g.parts, int(C));
    }
}

// out (N, C) = rows of wte (V, C), which is not NF4. tokens: 0 <= token < V.
template <class X>
void embedding_forward(Gpu<X>& dev, X* out, const int32_t* tokens, const Matrix& wte, size_t N) {
    if (N == 0) {
        return;
    }
    switch (wte.store) {
        case Store::BF16: embedding_rows<bf16>(dev, out, tokens, wte, N); break;
        case Store::F16: embedding_rows<fp16>(dev, out, tokens, wte, N); break;
        default: embedding_rows<float>(dev, out, tokens, wte, N); break;
    }
}
