// What the tiers with AVX-512 share. Internal linkage, as everything in a tier's translation unit (leaf_gemm.inc).
#pragma once
#include <immintrin.h>

// The first n of 16 lanes, n <= 16.
static inline __mmask16 lanes(int n) {
    return __mmask16((1u << n) - 1);
}

// 16 rows to 16 columns, in four rounds: pairs, fours, then 128-bit quarters twice.
static inline void transpose16(__m512 v[16]) {
    __m512 a[16];
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

// To the nearest bf16, ties to even; finite values.
static inline __m512 round_to_bf16(__m512 x) {
    __m512i u = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(int(0xffff0000))));
}
