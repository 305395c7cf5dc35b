// The AVX2 tier (with FMA and F16C). Leaf kernels only; see isa.h and leaf_gemm.inc for what may be included here.
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/cpu/isa.h"

namespace {

constexpr int W = 8, TILE_MR = 6, TILE_NV = 2;
typedef __m256 vec;
struct table16 {
    __m256 low, high;  // values 0-7, 8-15
};

inline __m256i lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
inline vec v_zero() {
    return _mm256_setzero_ps();
}
inline vec v_set1(float x) {
    return _mm256_set1_ps(x);
}
inline vec v_load(const float* p) {
    return _mm256_loadu_ps(p);
}
inline vec v_load_n(const float* p, int n) {
    return _mm256_maskload_ps(p, lanes(n));
}
inline void v_store(float* p, vec x) {
    _mm256_storeu_ps(p, x);
}
inline void v_store_n(float* p, vec x, int n) {
    _mm256_maskstore_ps(p, lanes(n), x);
}
inline vec v_add(vec a, vec b) {
    return _mm256_add_ps(a, b);
}
inline vec v_fma(vec a, vec b, vec c) {
    return _mm256_fmadd_ps(a, b, c);
}

// Rows to columns, in three rounds: pairs, fours, then 128-bit halves.
inline void v_transpose(vec v[8]) {
    vec a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    // b[4h + c]: column c of each half, rows 4h .. 4h + 3
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 8
    for (int c = 0; c < 4; c++) {
        v[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
        v[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
}

inline vec round_bf16(vec x) {
    __m256i u = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    u = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(int(0xffff0000))));
}
inline table16 v_table(float absmax) {
    vec scale = v_set1(absmax);
    return {round_bf16(_mm256_mul_ps(v_load(NF4_CODE), scale)), round_bf16(_mm256_mul_ps(v_load(NF4_CODE + 8), scale))};
}
inline void v_table_store(float* p, table16 t) {
    v_store(p, t.low);
    v_store(p + 8, t.high);
}
// 4 bytes to 8 lanes: each lane shifts its nibble down; the permutes read its low 3 bits, the blend its fourth.
inline vec v_lookup(const uint8_t* codes, table16 table) {
    int32_t bytes;
    memcpy(&bytes, codes, 4);
    __m256i shift = _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4);
    __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), shift);
    __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
    __m256 if_low = _mm256_permutevar8x32_ps(table.low, code), if_high = _mm256_permutevar8x32_ps(table.high, code);
    return _mm256_blendv_ps(if_low, if_high, upper);
}
inline vec v_widen_bf16(const uint16_t* p) {
    __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
inline vec v_widen_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}

#include "kernels/cpu/leaf_gemm.inc"
#include "kernels/cpu/leaf_rows.inc"

#include "kernels/cpu/leaf_attention.inc"  // written over both

}  // namespace

extern const CpuIsa cpu_isa_avx2 = {"avx2",     &format_fp32, nullptr,   nullptr,    TILE_MR,   transpose,
                                    nf4_absmax, nf4_run,      widen_f16, philox_run, LEAF_ROWS, LEAF_ATTENTION};
