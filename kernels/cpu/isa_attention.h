// The attention kernels of a tier. leaf_attention.inc is their one source; Cpu<double> has the same table
// (attention.h). Rows of scores are queries, columns keys. Every buffer has whole vectors: what lies between n and the
// next multiple of ATTENTION_LANES may be read and, in c, s and ds, be written.
#pragma once
#include <cstddef>

constexpr size_t ATTENTION_LANES = 16;  // the longest vector of any tier

template <class Real>
struct AttentionKernels {
    // c (m, n) = A B, or (add) c f + A B with an f for each row, 1 where f is nullptr. A (m, k): element (i, l) at
    // a[i * row_step + l * step]; B (k, n): rows ldb apart. Each element is summed over l in ascending order in one
    // accumulator, so that its bits depend on neither m, n nor its place.
    void (*product)(Real* c, size_t ldc, const Real* a, size_t row_step, size_t step, const Real* b, size_t ldb,
                    size_t m, size_t n, size_t k, bool add, const Real* f);

    // Of s (rows, n), row i sees its first seen + i elements, at most n and perhaps none; the others count as -inf,
    // whatever they hold, and become 0.
    //   softmax  s = exp(s - max'), max' the greater of max and the row's greatest; f = exp(max - max');
    //            sum [row][ATTENTION_LANES] = sum f + the row's, lane by lane; max = max'. f has room for a
    //            multiple of ATTENTION_LANES rows.
    //   grad     s = exp(s - lse);  ds = s (ds - D)
    void (*softmax)(Real* s, size_t ld, size_t rows, size_t n, ptrdiff_t seen, Real* max, Real* sum, Real* f);
    void (*grad)(Real* s, Real* ds, size_t ld, size_t rows, size_t n, ptrdiff_t seen, const Real* lse, const Real* D);

    // out (rows, n) = f x, f = factor, or (sum) factor / total, total[row] = the lanes of sum [row][ATTENTION_LANES].
    void (*scale)(Real* out, size_t ldo, const Real* x, size_t ld, size_t rows, size_t n, Real factor, const Real* sum,
                  Real* total);
};
