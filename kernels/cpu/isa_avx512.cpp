// The AVX-512 tier (f, bw, dq, vl). Leaf kernels only; see isa.h and leaf_gemm.inc for what may be included here.
// g++ 12 takes the "undefined" operand of its own AVX-512 headers for a mistake; clang has no such warning.
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wunknown-warning-option"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/cpu/avx512.h"
#include "kernels/cpu/isa.h"

namespace {

constexpr int W = 16, TILE_MR = 6, TILE_NV = 4;
typedef __m512 vec;
typedef __m512 table16;

inline vec v_zero() {
    return _mm512_setzero_ps();
}
inline vec v_set1(float x) {
    return _mm512_set1_ps(x);
}
inline vec v_load(const float* p) {
    return _mm512_loadu_ps(p);
}
inline vec v_load_n(const float* p, int n) {
    return _mm512_maskz_loadu_ps(lanes(n), p);
}
inline void v_store(float* p, vec x) {
    _mm512_storeu_ps(p, x);
}
inline void v_store_n(float* p, vec x, int n) {
    _mm512_mask_storeu_ps(p, lanes(n), x);
}
inline vec v_add(vec a, vec b) {
    return _mm512_add_ps(a, b);
}
inline vec v_fma(vec a, vec b, vec c) {
    return _mm512_fmadd_ps(a, b, c);
}

inline void v_transpose(vec v[16]) {
    transpose16(v);
}
inline table16 v_table(float absmax) {
    return round_to_bf16(_mm512_mul_ps(v_load(NF4_CODE), v_set1(absmax)));
}
inline void v_table_store(float* p, table16 t) {
    v_store(p, t);
}
// 8 bytes to 16 lanes: lane l takes the dword with its byte, shifts its nibble down, and vpermps reads its low 4 bits.
inline vec v_lookup(const uint8_t* codes, table16 table) {
    const __m512i half = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i shift = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
    __m512i bytes = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)codes));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_permutexvar_epi32(half, bytes), shift), table);
}
inline vec v_widen_bf16(const uint16_t* p) {
    __m512i bits = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, bits, 16));
}
inline vec v_widen_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}

#include "kernels/cpu/leaf_gemm.inc"
#include "kernels/cpu/leaf_rows.inc"

#include "kernels/cpu/leaf_attention.inc"  // written over both

}  // namespace

extern const CpuIsa cpu_isa_avx512 = {"avx512",   &format_fp32, nullptr,   nullptr,    TILE_MR,   transpose,
                                      nf4_absmax, nf4_run,      widen_f16, philox_run, LEAF_ROWS, LEAF_ATTENTION};
