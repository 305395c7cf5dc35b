// The attention kernels of a tier. leaf_attention.inc is their one source; Cpu<double> has the same table
// (attention.h). Rows of scores are queries, columns keys. Every buffer has whole vectors: what lies between n and the
// next multiple of ATTENTION_LANES may be read and, in c, s and ds, be written.
#pragma once
#include <cstddef>

#include "kernels/bf16.h"

constexpr size_t ATTENTION_LANES = 16;  // the longest vector of any tier

constexpr double LOG2_OF_E = 1.4426950408889634;

// 2^r for r from 0 to 1, the highest power first: the polynomial of the least greatest relative error (2.1e-9) among
// those with p(0) = 1.
constexpr float POWER_OF_TWO[7] = {
    0x1.c4456ep-13f, 0x1.47373ap-10f, 0x1.3cfd82p-7f, 0x1.c68af6p-5f, 0x1.ebfd3ap-3f, 0x1.62e42cp-1f, 1};

// What a row sees of n elements.
static inline size_t attention_seen(ptrdiff_t seen, size_t n) {
    return seen <= 0 ? 0 : size_t(seen) < n ? size_t(seen) : n;
}

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

// A matrix of blocks of 32 x 32 elements: the first block, and elements to the one below it and to the one beside it.
template <class T>
struct AttentionBlocks {
    T* p;
    size_t below, beside;
};

// The same with operands in bf16 and sums in float, for the tier that has tiles (leaf_attention_amx.inc). Everything
// stands in blocks; m, n and k are rounded up to them. A block of sums is four tiles, 4 KB. A block of an operand is
// two, 2 KB, like a unit of a strip (left) or of a panel (right) in the format bf16 (format.h), whose packers make most
// of them: a left operand by its rows, a right one by pairs of its rows.
struct AttentionTiles {
    // Around all the others, in a thread. Between them nothing else may use tiles.
    void (*open)();
    void (*close)();

    // Blocks of a left operand, the channels being its rows: of each 32 lines all the channels, one block after
    // another.
    void (*pack_turned)(bf16* out, const bf16* in, size_t ldi, size_t lines, size_t channels);

    // c (m, n) = or (add) += A B, A (m, k), B (k, n). The bits of an element depend on neither m, n nor its place.
    // Where m ends in the upper half of a block, the lower half of c is left as it is.
    void (*product)(AttentionBlocks<float> c, AttentionBlocks<const bf16> a, AttentionBlocks<const bf16> b, size_t m,
                    size_t n, size_t k, bool add);
    // c (32, n), the blocks side by side, times f[row].
    void (*shrink)(float* c, size_t n, const float* f);

    // Of s (rows, n), at most 32 rows, blocks side by side, row i sees its first seen + i elements; the others become
    // 0, as do rows behind the last.
    //   softmax  p = exp(scale s - max'), left; max, sum and f (32) as above; sum is of what has not been rounded
    //   grad     p = exp(scale s - lse), right;  ds = p (dp - D), from the p that has not been rounded: left, right
    void (*softmax)(bf16* p, const float* s, size_t rows, size_t n, ptrdiff_t seen, float scale, float* max, float* sum,
                    float* f);
    void (*grad)(bf16* p, bf16* ds_left, bf16* ds_right, const float* s, const float* dp, size_t rows, size_t n,
                 ptrdiff_t seen, float scale, const float* lse, const float* D);

    // out (lines, channels), rows ldo apart, = f x, f as in `scale` above. x: of each 32 lines all the channels, one
    // block after another; turned: the rows of a block are channels.
    void (*store)(bf16* out, size_t ldo, const float* x, size_t lines, size_t channels, bool turned, float factor,
                  const float* sum, float* total);
};
