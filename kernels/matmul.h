// Dense matrix products of 16-bit or fp32 operands: the interface, without a CUDA header. Row-major throughout; ld =
// elements from row to row.
//
//   D (M, N) = alpha op(A) op(B) + beta C,   op(A) (M, K), op(B) (K, N);   C may be D
#pragma once
#include "kernels/gpu.h"

template <class X, class Out>
struct Matmul {
    Out* d = nullptr;
    size_t ldd = 0;
    const X* a = nullptr;  // (M, K), or (K, M) when a_trans
    size_t lda = 0;
    bool a_trans = false;
    const X* b = nullptr;  // (K, N), or (N, K) when b_trans
    size_t ldb = 0;
    bool b_trans = false;
    const Out* c = nullptr;  // nullptr: beta is 0
    size_t ldc = 0;
    size_t M = 0, N = 0, K = 0;
    float alpha = 1, beta = 0;
};

// X bf16: Out bf16 or float, sums in fp32. X float: Out float, fp32 throughout (no TF32). Deterministic: the algorithm
// is the library's first choice for the shape, on one stream and one workspace.
template <class X, class Out>
void matmul(Gpu<X>& dev, const Matmul<X, Out>& p);
