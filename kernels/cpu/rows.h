// The row kernels of a device: the tier's for float and bf16, plain C++ for double (gradient checks).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/device.h"

namespace rows_double {
constexpr int W = 1;
typedef double vec;
inline vec v_zero() {
    return 0;
}
inline vec v_set1(double x) {
    return x;
}
inline vec v_load(const double* p) {
    return *p;
}
inline vec v_load_n(const double* p, int) {
    return *p;
}
inline void v_store(double* p, vec x) {
    *p = x;
}
inline void v_store_n(double* p, vec x, int) {
    *p = x;
}
inline vec v_add(vec a, vec b) {
    return a + b;
}
inline vec v_fma(vec a, vec b, vec c) {
    return a * b + c;
}

#define LEAF_REAL double
#include "kernels/cpu/leaf_rows.inc"
static const RowKernels<double> table = LEAF_ROWS;
#undef LEAF_REAL
#undef LEAF_ROWS
#undef LEAF_ROWS_OF
}  // namespace rows_double

inline const RowKernels<float>& row_kernels(const Cpu<float>& dev) {
    return dev.isa->rows.of_float;
}
inline const RowKernels<float, bf16>& row_kernels(const Cpu<bf16>& dev) {
    return dev.isa->rows.of_bf16;
}
inline const RowKernels<double>& row_kernels(const Cpu<double>&) {
    return rows_double::table;
}

// Those on rows of real.
template <class X>
const RowKernels<float>& real_kernels(const Cpu<X>& dev) {
    return dev.isa->rows.of_float;
}
inline const RowKernels<double>& real_kernels(const Cpu<double>&) {
    return rows_double::table;
}
