// The ops that treat each row, or each element, alone: embedding, RMSNorm, RoPE, SwiGLU. X and the statistics are
// float, or double on Cpu<double>; on Cpu<bf16> X is bf16, and everything between reading and writing it is float. Rows
// are shared out between the workers; a row's bits depend on nothing but the row.
//
//   rstd = 1 / sqrt(mean(x^2) + eps)            norm(x) = x rstd w        (Zhang, Sennrich: RMSNorm, 2019)
//   rope: (a, b) -> (a cos - b sin, b cos + a sin), pairs (i, i + HS/2)   (Su et al.: RoFormer, 2021; HF's half-split)
//   swiglu = silu(gate) up, silu(x) = x / (1 + exp(-x))                   (Shazeer: GLU variants, 2020)
#pragma once
#include <cmath>

#include "kernels/cpu/nf4.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/rows.h"

// Rows that are worth a second worker: about 16,000 elements.
inline size_t rows_grain(size_t width) {
    return width < 16384 ? 16384 / width : 1;
}

// out (cols) = one row, rounded.
inline void matrix_row(const Cpu<bf16>& dev, bf16* out, const Matrix& m, size_t row) {
    Cpu<float> single;
    single.isa = dev.isa;
    const size_t cols = size_t(m.cols), PART = 256;
    float run[PART];
    for (size_t i = 0; i < cols; i += PART) {
        const size_t n = cols - i < PART ? cols - i : PART;
        matrix_run(single, run, m, row * cols + i, n);
        row_kernels(dev).narrow(out + i, run, n);
    }
}

// out (N, C) = rows of wte (V, C). tokens: 0 <= token < V.
template <class X>
void embedding_forward(Cpu<X>& dev, X* out, const int32_t* tokens, const Matrix& wte, size_t N) {
    const size_t C = size_t(wte.cols);
    parallel_ranges(dev.threads, N, rows_grain(C), [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            matrix_row(dev, out + row * C, wte, size_t(tokens[row]));
        }
    });
}

// rstd (N) = of x (N, C).
template <class X>
void rmsnorm_rstd(Cpu<X>& dev, typename Cpu<X>::real* rstd, const X* x, size_t N, int C, double eps) {
    parallel_ranges(dev.threads, N, rows_grain(size_t(C)), [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            const X* p = x + row * size_t(C);
            double mean = double(row_kernels(dev).dot(p, p, size_t(C))) / C;
            rstd[row] = typename Cpu<X>::real(1 / std::sqrt(mean + eps));
        }
    });
}

// out (N, C) = x (N, C) * rstd (N) * w (C).
template <class X>
void rmsnorm_forward(Cpu<X>& dev, X* out, const X* x, const typename Cpu<X>::real* rstd, const typename Cpu<X>::real* w,
                     size_t N, int C) {
    parallel_ranges(dev.threads, N, rows_grain(size_t(C)), [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            row_kernels(dev).norm_mul(out + row * size_t(C), x + row * size_t(C), rstd[row], w, size_t(C));
        }
    });
}

// dx (N, C), rows dx_stride apart, += the gradient for dout (N, C); w is frozen and gets none.
template <class X>
void rmsnorm_backward(Cpu<X>& dev, X* dx, size_t dx_stride, const X* dout, const X* x,
                      const typename Cpu<X>::real* rstd, const typename Cpu<X>::real* w, size_t N, int C) {
    parallel_ranges(dev.threads, N, rows_grain(size_t(C)), [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            const size_t at = row * size_t(C);
            row_kernels(dev).norm_grad(dx + row * dx_stride, dout + at, x + at, rstd[row], w, size_t(C));
        }
    });
}

template <class X>
void rope_rows(Cpu<X>& dev, X* qkv, size_t stride, const Rope<typename Cpu<X>::real>& rope, size_t N, bool inverse) {
    const size_t half = size_t(rope.HS) / 2;
    parallel_ranges(dev.threads, N, rows_grain(size_t(rope.heads) * 2 * half), [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            const size_t at = size_t(rope.positions[row]) * half;
            for (int h = 0; h < rope.heads; h++) {
                X* head = qkv + row * stride + size_t(h) * 2 * half;
                row_kernels(dev).rotate(head, head + half, rope.cos + at, rope.sin + at, half, inverse);
            }
        }
    });
}

// qkv (N rows, stride elements apart): the first rope.heads heads of each row, in place.
template <class X>
void rope_forward(Cpu<X>& dev, X* qkv, size_t stride, const Rope<typename Cpu<X>::real>& rope, size_t N) {
    rope_rows(dev, qkv, stride, rope, N, false);
}

// The inverse rotation, which is the gradient.
template <class X>
void rope_backward(Cpu<X>& dev, X* dqkv, size_t stride, const Rope<typename Cpu<X>::real>& rope, size_t N) {
    rope_rows(dev, dqkv, stride, rope, N, true);
}

// out (N, F) = silu(gate) up, gate_up (N, 2F): gate | up in a row.
template <class X>
void swiglu_forward(Cpu<X>& dev, X* out, const X* gate_up, size_t N, int F) {
    const size_t f = size_t(F);
    parallel_ranges(dev.threads, N, rows_grain(f), [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            const X* gate = gate_up + row * 2 * f;
            row_kernels(dev).silu_mul(out + row * f, gate, gate + f, f);
        }
    });
}

// dgate_up (N, 2F), rows stride apart, = the gradient for dout (N, F).
template <class X>
void swiglu_backward(Cpu<X>& dev, X* dgate_up, size_t stride, const X* dout, const X* gate_up, size_t N, int F) {
    const size_t f = size_t(F);
    parallel_ranges(dev.threads, N, rows_grain(f), [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            const X* gate = gate_up + row * 2 * f;
            X* dgate = dgate_up + row * stride;
            row_kernels(dev).silu_mul_grad(dgate, dgate + f, dout + row * f, gate, gate + f, f);
        }
    });
}
