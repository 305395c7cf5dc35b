// Rates of one step of AdamW (Loshchilov, Hutter 2019) and what each device's kernel takes of them: computed in double and
// then rounded, as PyTorch does.
#pragma once
#include <cmath>
#include <cstdint>

#include "kernels/cpu/isa_rows.h"

struct AdamW {
    double lr, beta1, beta2, eps, weight_decay;
    int64_t step;       // from 1
    double grad_scale;  // clip coefficient, 1 = none
};

template <class Real>
AdamWScalars<Real> adamw_scalars(const AdamW& a) {
    const double correction1 = 1 - std::pow(a.beta1, double(a.step)),
                 correction2 = 1 - std::pow(a.beta2, double(a.step));
    return {Real(a.grad_scale), Real(1 - a.lr * a.weight_decay), Real(1 - a.beta1), Real(a.beta2),
            Real(1 - a.beta2),  Real(std::sqrt(correction2)),    Real(a.eps),       Real(-(a.lr / correction1))};
}
