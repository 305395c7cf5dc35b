// The row kernels of a tier: what the elementwise ops and the softmaxes do to one row, or to the columns of one small
// block. leaf_rows.inc is their one source; Cpu<double> has the same table (rows.h). Any pointer alignment gives the
// same bits, and an elementwise result depends on its own element alone, so a row may be cut anywhere.
#pragma once
#include <cstddef>

// AdamW for one step, folded into the scalars that PyTorch uses (adamw.h).
template <class Real>
struct AdamWScalars {
    Real grad_scale, keep, weight1, beta2, weight2, sqrt_correction2, eps, step_size;
};

template <class Real>
struct RowKernels {
    // out = exp(x); relative error <= 2e-7 for floats, 0 far below, infinity above, NaN stays NaN.
    void (*exp)(Real* out, const Real* x, size_t n);
    // out = silu(g) u,  silu(g) = g / (1 + exp(-g));  and both its gradients
    void (*silu_mul)(Real* out, const Real* g, const Real* u, size_t n);
    void (*silu_mul_grad)(Real* dg, Real* du, const Real* dout, const Real* g, const Real* u, size_t n);
    // out = x rstd w;  dx += rstd (dout w - x rstd^2 / n * sum(dout w x))
    void (*norm_mul)(Real* out, const Real* x, Real rstd, const Real* w, size_t n);
    void (*norm_grad)(Real* dx, const Real* dout, const Real* x, Real rstd, const Real* w, size_t n);
    Real (*dot)(const Real* a, const Real* b, size_t n);
    // (lo, hi) = (lo cos - hi sin, hi cos + lo sin) over n pairs, in place; turned back with inverse
    void (*rotate)(Real* lo, Real* hi, const Real* cos, const Real* sin, size_t n, bool inverse);

    // Cross-entropy: max x;  sum exp(x - max);  x = exp(x - lse) scale
    Real (*row_max)(const Real* x, size_t n);
    Real (*exp_sum)(const Real* x, Real max, size_t n);
    void (*softmax_grad)(Real* x_inout, Real lse, Real scale, size_t n);

    // Attention, on blocks of transposed scores: a column is a query, a row a key, n columns side by side (a multiple
    // of the tier's vector), row stride n.
    //   softmax_columns  s = exp(s - max'), max' the greater of max and the column's greatest;
    //                    shrink = exp(max - max'); sum = sum shrink + the column's sum; max = max'
    //   grad_columns     s = exp(s - lse);  ds = s (ds - D)
    //   scale_columns    x *= f[column]
    void (*softmax_columns)(Real* s, size_t rows, size_t n, Real* max, Real* sum, Real* shrink);
    void (*grad_columns)(Real* s, Real* ds, size_t rows, size_t n, const Real* lse, const Real* D);
    void (*scale_columns)(Real* x, size_t rows, size_t n, const Real* f);

    void (*adamw)(Real* p, Real* m, Real* v, const Real* g, size_t n, const AdamWScalars<Real>* a);
};

using CpuRows = RowKernels<float>;
