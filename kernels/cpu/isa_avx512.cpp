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

#include "kernels/cpu/isa.h"

namespace {

constexpr int W = 16, TILE_MR = 6, TILE_NV = 4;
typedef __m512 vec;
typedef __m512 table16;

inline __mmask16 lanes(int n) {
    return __mmask16((1u << n) - 1);
}
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

// Rows to columns, in four rounds: pairs, fours, then 128-bit quarters twice.
inline void v_transpose(vec v[16]) {
    vec a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    // v[4q + c]: column c of each quarter, rows 4q .. 4q + 3
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        __m512d a0 = _mm512_castps_pd(a[i]), a1 = _mm512_castps_pd(a[i + 1]);
        __m512d a2 = _mm512_castps_pd(a[i + 2]), a3 = _mm512_castps_pd(a[i + 3]);
        v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a0, a2));
        v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a0, a2));
        v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(a1, a3));
        v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(a1, a3));
    }
    // a[c]: quarters 0 and 2 of rows 0-7; a[4 + c]: quarters 1 and 3; a[8 + c], a[12 + c] the same of rows 8-15
#pragma GCC unroll 16
    for (int c = 0; c < 4; c++) {
        a[c] = _mm512_shuffle_f32x4(v[c], v[4 + c], 0x88);
        a[4 + c] = _mm512_shuffle_f32x4(v[c], v[4 + c], 0xdd);
        a[8 + c] = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0x88);
        a[12 + c] = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0xdd);
    }
#pragma GCC unroll 16
    for (int c = 0; c < 4; c++) {
        v[c] = _mm512_shuffle_f32x4(a[c], a[8 + c], 0x88);
        v[8 + c] = _mm512_shuffle_f32x4(a[c], a[8 + c], 0xdd);
        v[4 + c] = _mm512_shuffle_f32x4(a[4 + c], a[12 + c], 0x88);
        v[12 + c] = _mm512_shuffle_f32x4(a[4 + c], a[12 + c], 0xdd);
    }
}

inline table16 v_table(float absmax) {
    __m512i u = _mm512_castps_si512(_mm512_mul_ps(v_load(NF4_CODE), v_set1(absmax)));
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(int(0xffff0000))));
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
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline vec v_widen_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}

#include "kernels/cpu/leaf_gemm.inc"
#include "kernels/cpu/leaf_rows.inc"

}  // namespace

extern const CpuIsa cpu_isa_avx512 = {"avx512",   TILE_MR,   TILE_NV* W, gemm_tile, transpose, nf4_run,
                                      widen_bf16, widen_f16, philox_run, fma_loop,  LEAF_ROWS};
