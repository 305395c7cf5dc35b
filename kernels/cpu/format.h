// How a product is computed: the layout of a packed strip of A and of a packed panel of B, and the leaves that pack and
// multiply them. A tier has one format for each arithmetic it offers (fp32; int16; bf16); gemm.h works with any.
//
// The reduction is cut into units. A strip is MR rows of A, a panel NR columns of B; both are rows of units, each of
// them complete in itself, so that packing may stop and go on at any unit:
//
//   strip  | unit 0: a_unit bytes | unit 1 | ...        panel  | unit 0: b_unit bytes | unit 1 | ...
//
//   fp32   unit 16     A: MR rows of 16 floats               B: 16 rows of NR floats                (leaf_gemm.inc)
//   int16  unit 64     A: MR x 32 pairs of int16, MR scales  B: 32 x NR pairs of int16, NR scales (isa_avx512vnni.cpp)
//   bf16   unit 32     A: two tiles of 16 rows x 32          B: two tiles of 16 pairs x 16 columns  (isa_amx.cpp)
//
// Missing rows, columns and reduction indices are packed as zeros. Strips and panels stand on 64-byte borders.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/bf16.h"

template <class Real>
struct GemmFormat {
    const char* name;       // fp32, int16, bf16
    int MR, NR;             // rows of a strip, columns of a panel
    size_t unit;            // reduction indices
    size_t a_unit, b_unit;  // bytes
    size_t KC, NC;          // what a thread packs at a time: reduction indices (a multiple of unit) and columns (of NR)

    // Lines: n lines of k floats, ldi apart; a line is a row of A or a column of B. n <= MR, or NR.
    // Columns: k lines of n floats; the reduction runs over the lines.
    // The n rows or columns of one strip or panel, from the unit that `out` points to: ceil(k / unit) units. Columns of
    // B may be more than NR: ceil(n / NR) panels of that many units, one after another.
    void (*pack_a_lines)(void* out, const Real* in, size_t ldi, int n, size_t k);
    void (*pack_a_columns)(void* out, const Real* in, size_t ldi, int n, size_t k);
    void (*pack_b_lines)(void* out, const Real* in, size_t ldi, int n, size_t k);
    void (*pack_b_columns)(void* out, const Real* in, size_t ldi, int n, size_t k);

    // The same from a frozen matrix, or from activations in bf16; nullptr where it goes through floats.
    // NF4: lines of codes, ld bytes apart, each from the start of a block of 64; line j's absmax at absmax + j lda.
    //   lines    n lines, n <= NR, k along them, a multiple of 64: one panel
    //   columns  k lines of n columns, n a multiple of 64 and of NR: n / NR panels, each ceil(k / unit) b_unit bytes
    void (*pack_b_nf4_lines)(void* out, const uint8_t* codes, size_t ld, const float* absmax, size_t lda, int n,
                             size_t k);
    void (*pack_b_nf4_columns)(void* out, const uint8_t* codes, size_t ld, const float* absmax, size_t lda, size_t n,
                               size_t k);
    void (*pack_b_bf16_lines)(void* out, const bf16* in, size_t ldi, int n, size_t k);
    void (*pack_b_bf16_columns)(void* out, const bf16* in, size_t ldi, int n, size_t k);
    void (*pack_a_bf16_lines)(void* out, const bf16* in, size_t ldi, int n, size_t k);

    // c (mr, nc), row stride ldc, = or (add) += one strip times ceil(nc / NR) panels, which stand one after another;
    // mr <= MR. The bits of an element depend on neither mr, nc nor its place.
    void (*multiply)(size_t k, const void* a, const void* b, Real* c, size_t ldc, int mr, size_t nc, bool add);

    // Multiplies and adds in registers, n rounds; writes something to sink, returns the operations (two each). The peak
    // that `multiply` is measured against.
    size_t (*peak_loop)(size_t n, float* sink);
};

template <class Real>
size_t strip_bytes(const GemmFormat<Real>& f, size_t k) {
    return (k + f.unit - 1) / f.unit * f.a_unit;
}
template <class Real>
size_t panel_bytes(const GemmFormat<Real>& f, size_t k) {
    return (k + f.unit - 1) / f.unit * f.b_unit;
}
