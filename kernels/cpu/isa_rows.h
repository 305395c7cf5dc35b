// The row kernels of a tier: what the elementwise ops and the softmaxes do to one row, or to the columns of one small
// block. leaf_rows.inc is their one source; Cpu<double> has the same table (rows.h). Any pointer alignment gives the
// same bits, and an elementwise result depends on its own element alone, so a row may be cut anywhere.
//
// Everything is computed in Real. X is how activations are stored, Real or bf16: a result is rounded to bf16 once, to
// nearest even, where it is stored.
#pragma once
#include <cstddef>

#include "kernels/bf16.h"

// AdamW for one step, folded into the scalars that PyTorch uses (adamw.h).
template <class Real>
struct AdamWScalars {
    Real grad_scale, keep, weight1, beta2, weight2, sqrt_correction2, eps, step_size;
};

template <class Real, class X = Real>
struct RowKernels {
    // out = exp(x); relative error <= 2e-7 for floats, 0 far below, infinity above, NaN stays NaN.
    void (*exp)(Real* out, const Real* x, size_t n);
    // out = silu(g) u,  silu(g) = g / (1 + exp(-g));  and both its gradients
    void (*silu_mul)(X* out, const X* g, const X* u, size_t n);
    void (*silu_mul_grad)(X* dg, X* du, const X* dout, const X* g, const X* u, size_t n);
    // out = x rstd w;  dx += rstd (dout w - x rstd^2 / n * sum(dout w x))
    void (*norm_mul)(X* out, const X* x, Real rstd, const Real* w, size_t n);
    void (*norm_grad)(X* dx, const X* dout, const X* x, Real rstd, const Real* w, size_t n);
    Real (*dot)(const X* a, const X* b, size_t n);
    // (lo, hi) = (lo cos - hi sin, hi cos + lo sin) over n pairs, in place; turned back with inverse
    void (*rotate)(X* lo, X* hi, const Real* cos, const Real* sin, size_t n, bool inverse);
    // silu_mul and norm_mul in Real, for packing; x in Real; x in X
    void (*silu_mul_wide)(Real* out, const X* g, const X* u, size_t n);
    void (*norm_mul_wide)(Real* out, const X* x, Real rstd, const Real* w, size_t n);
    void (*widen)(Real* out, const X* x, size_t n);
    void (*narrow)(X* out, const Real* x, size_t n);

    // Cross-entropy: max x;  sum exp(x - max);  x = exp(x - lse) scale
    Real (*row_max)(const Real* x, size_t n);
    Real (*exp_sum)(const Real* x, Real max, size_t n);
    void (*softmax_grad)(Real* x_inout, Real lse, Real scale, size_t n);

    void (*adamw)(Real* p, Real* m, Real* v, const Real* g, size_t n, const AdamWScalars<Real>* a);
};

// Of a tier.
struct CpuRows {
    RowKernels<float> of_float;
    RowKernels<float, bf16> of_bf16;
};
