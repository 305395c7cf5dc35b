// What AVX-512 with VNNI adds to the tier avx512: the int16 format, block floating point for a reduction.
//
// 64 reduction indices are a block, and a unit of the format. Every block of a row of A or of a column of B has a scale
// of its own and its elements are whole multiples of it, as large as the sum of a block allows:
//
//   a = i * scale_a, |i| <= 8191     b = j * scale_b, |j| <= 4096     64 * 8191 * 4096 = 2,147,221,504 < 2^31
//   c = sum over blocks, ascending, in fp32:  float(sum over the block, in int32: i * j) * scale_b * scale_a
//
//   unit of A   6 rows of 64 int16        | 6 scales, 10 unused floats
//   unit of B   32 rows of 64 pairs       | 64 scales           a pair: reduction indices 2p and 2p + 1 of one column
//
// scale_a = (greatest magnitude of the block) / 8191. scale_b = 2^-11 of the power of two in the block's greatest:
// weights are bf16, and so those within four octaves of the greatest are whole steps. That is every weight of an NF4
// block (the least code but 0 is 0.08), so forward nothing of W is lost. Neither scale is less than the smallest normal
// float: a block of zeros, or of values near the end of the range, needs no other rule. An infinity or a NaN makes its
// scale infinite or a NaN, and so every sum that its block enters.
//
// B in NF4 is the frozen weight round_to_bf16(code * absmax). Forward, where a line of W is a column of B, the block is
// W's own. Backward the reduction runs over the lines of W, so that a block has 64 absmax; then 64 lines by 64 columns
// of W share the scale of their greatest one, and a line loses a bit of its weights for each octave that it lies under
// that: nothing that counts in the sum, unless its gradients are as much greater. Either way a block's 16 possible
// values become a table of int16.
//
// Leaf kernels only; see isa.h and leaf_gemm.inc for what may be included here.
// g++ 12 takes the "undefined" operand of its own AVX-512 headers for a mistake; clang has no such warning.
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wunknown-warning-option"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/cpu/avx512.h"
#include "kernels/cpu/isa.h"

namespace {

constexpr int MR = 6, NR = 64, NV = NR / 16;
constexpr size_t BLOCK = 64;
constexpr float A_STEPS = 8191, B_STEPS = 2048;  // of the greatest of a block; of the power of two in it

struct UnitA {
    int32_t pair[MR][32];  // of a row, side by side
    float scale[16];       // of MR rows; whole cache lines
};
struct UnitB {
    int32_t pair[32][NR];
    float scale[NR];
};

// What a packer reads next, a block of a line, or of codes, that it comes to 16 or 64 lines later: too many lines for
// the processor to see by itself where each of them goes on.
inline void fetch(const void* p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(static_cast<const char*>(p) + i);
    }
}

// ---- multiply ----

// c += a * b, pairwise, in 32 bits. Around the intrinsic g++ 12 copies registers.
inline void multiply_pairs(__m512i& c, __m512i a, __m512i b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
}

// M rows by V vectors. The int32 sums fill 24 of the 32 registers, so the sums in fp32 wait in the first-level cache.
// next: units of A that are called for while a is in use.
template <int M, int V>
static void multiply_panel(size_t units, const UnitA* a, const UnitB* b, float* c, size_t ldc, int columns, bool add,
                           const UnitA* next) {
    alignas(64) float total[M][V * 16];
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            _mm512_store_ps(total[i] + v * 16, _mm512_setzero_ps());
            __builtin_prefetch(c + size_t(i) * ldc + v * 16, 1);
        }
    }
    for (; units > 0; units--, a++, b++, next++) {
        fetch(next, sizeof *next);
        __m512i sum[M][V];
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) {
                sum[i][v] = _mm512_setzero_si512();
            }
        }
        for (int p0 = 0; p0 < 32; p0 += 2) {  // g++ 12 would unroll a plain loop around a copy of every sum
#pragma GCC unroll 2
            for (int p = p0; p < p0 + 2; p++) {
                __m512i right[V];
#pragma GCC unroll 16
                for (int v = 0; v < V; v++) {
                    right[v] = _mm512_loadu_si512(b->pair[p] + v * 16);
                }
#pragma GCC unroll 16
                for (int i = 0; i < M; i++) {
                    __m512i left = _mm512_set1_epi32(a->pair[i][p]);
#pragma GCC unroll 16
                    for (int v = 0; v < V; v++) {
                        multiply_pairs(sum[i][v], left, right[v]);
                    }
                }
            }
        }
        __m512 right[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            right[v] = _mm512_loadu_ps(b->scale + v * 16);
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            __m512 left = _mm512_set1_ps(a->scale[i]);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) {
                // One scale after the other: the product of two small ones could be denormal, or 0.
                __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][v]), right[v]);
                float* t = total[i] + v * 16;
                _mm512_store_ps(t, _mm512_fmadd_ps(x, left, _mm512_load_ps(t)));
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            float* p = c + size_t(i) * ldc + v * 16;
            __mmask16 mask = v + 1 < V ? 0xffff : lanes(columns - v * 16);
            __m512 out = _mm512_load_ps(total[i] + v * 16);
            _mm512_mask_storeu_ps(p, mask, add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p), out) : out);
        }
    }
}

template <int M>
static void multiply_rows(size_t units, const UnitA* a, const UnitB* b, float* c, size_t ldc, size_t nc, bool add) {
    for (; nc > 0; b += units, c += NR) {
        int columns = nc < size_t(NR) ? int(nc) : NR;
        const UnitA* next = nc > size_t(NR) ? a : a + units;  // with the last panel, the strip behind this one
        switch ((columns + 15) / 16) {
            case 1: multiply_panel<M, 1>(units, a, b, c, ldc, columns, add, next); break;
            case 2: multiply_panel<M, 2>(units, a, b, c, ldc, columns, add, next); break;
            case 3: multiply_panel<M, 3>(units, a, b, c, ldc, columns, add, next); break;
            default: multiply_panel<M, NV>(units, a, b, c, ldc, columns, add, next); break;
        }
        nc -= size_t(columns);
    }
}

static void multiply(size_t k, const void* strip, const void* panels, float* c, size_t ldc, int mr, size_t nc,
                     bool add) {
    const size_t units = (k + BLOCK - 1) / BLOCK;
    const UnitA* a = static_cast<const UnitA*>(strip);
    const UnitB* b = static_cast<const UnitB*>(panels);
    switch (mr) {
        case 1: multiply_rows<1>(units, a, b, c, ldc, nc, add); break;
        case 2: multiply_rows<2>(units, a, b, c, ldc, nc, add); break;
        case 3: multiply_rows<3>(units, a, b, c, ldc, nc, add); break;
        case 4: multiply_rows<4>(units, a, b, c, ldc, nc, add); break;
        case 5: multiply_rows<5>(units, a, b, c, ldc, nc, add); break;
        default: multiply_rows<MR>(units, a, b, c, ldc, nc, add); break;
    }
}

// ---- blocks ----

// Bits of the magnitude of each lane. As integers they are in the order of the magnitudes, infinity above every number
// and NaN above it, while a maximum of floats may drop a NaN.
inline __m512i magnitude(__m512 x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

// From the bits of the greatest magnitudes of 16 blocks: their scales, and what their elements are multiplied by to be
// whole steps. Of A: the greatest is at most A_STEPS (1 + 2^-23), and rounds to A_STEPS.
inline __m512 scales_of_a(__m512i greatest, __m512* inverse) {
    const __m512i least = _mm512_castps_si512(_mm512_set1_ps(A_STEPS * 0x1p-126f));
    const __m512 g = _mm512_castsi512_ps(_mm512_max_epi32(greatest, least));
    *inverse = _mm512_div_ps(_mm512_set1_ps(A_STEPS), g);
    return _mm512_mul_ps(g, _mm512_set1_ps(1 / A_STEPS));
}
// Of B: without the mantissa a NaN is an infinity.
inline __m512 scales_of_b(__m512i greatest, __m512* inverse) {
    const __m512i least = _mm512_castps_si512(_mm512_set1_ps(B_STEPS * 0x1p-126f));
    const __m512i power = _mm512_and_si512(_mm512_max_epi32(greatest, least), _mm512_set1_epi32(0x7f800000));
    *inverse = _mm512_div_ps(_mm512_set1_ps(B_STEPS), _mm512_castsi512_ps(power));
    return _mm512_mul_ps(_mm512_castsi512_ps(power), _mm512_set1_ps(1 / B_STEPS));
}
// Of one block.
inline float block_scale(bool of_a, int greatest, float* inverse) {
    __m512 factor;
    const __m512i g = _mm512_set1_epi32(greatest);
    const __m512 scale = of_a ? scales_of_a(g, &factor) : scales_of_b(g, &factor);
    *inverse = _mm512_cvtss_f32(factor);
    return _mm512_cvtss_f32(scale);
}

inline __m512i to_steps(__m512 x, __m512 inverse) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
}

// Two rows of whole numbers to pairs: a in the lower halves of the lanes, b in the upper ones.
inline __m512i pairs(__m512i a, __m512i b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
}

// Two vectors of whole numbers to 32 words. vpackssdw takes quarters from them in turn.
inline __m512i words(__m512i a, __m512i b) {
    return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), _mm512_packs_epi32(a, b));
}

inline __m512 load(const float* p, __mmask16 mask) {
    return _mm512_maskz_loadu_ps(mask, p);
}
inline __m512 load(const bf16* p, __mmask16 mask) {
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// The first `columns` lanes of vector v of a row, `columns` counted from vector 0.
inline __mmask16 lanes_of(int v, int columns) {
    return columns >= v * 16 + 16 ? 0xffff : columns <= v * 16 ? 0 : lanes(columns - v * 16);
}

// The first n elements of a line, n <= 64, and zeros, as 32 pairs; returns their scale.
template <bool OF_A, class In>
inline float pack_block(__m512i out[2], const In* in, size_t n) {
    __m512 x[4];
    __m512i greatest = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        x[v] = load(in + v * 16, lanes_of(v, int(n)));
        greatest = _mm512_max_epi32(greatest, magnitude(x[v]));
    }
    float inverse;
    const float scale = block_scale(OF_A, _mm512_reduce_max_epi32(greatest), &inverse);
    const __m512 factor = _mm512_set1_ps(inverse);
    out[0] = words(to_steps(x[0], factor), to_steps(x[1], factor));
    out[1] = words(to_steps(x[2], factor), to_steps(x[3], factor));
    return scale;
}

// ---- A ----

template <class In>
static void pack_a_lines(void* out, const In* in, size_t ldi, int n, size_t k) {
    UnitA* unit = static_cast<UnitA*>(out);
    for (size_t k0 = 0; k0 < k; k0 += BLOCK, unit++, in += BLOCK) {
        const size_t count = k - k0 < BLOCK ? k - k0 : BLOCK;
        memset(unit->scale, 0, sizeof unit->scale);
        for (int i = 0; i < MR; i++) {
            const In* from = in + size_t(i < n ? i : 0) * ldi;
            if (k - k0 > BLOCK) {
                fetch(from + BLOCK, BLOCK * sizeof(In));
            }
            __m512i row[2];
            unit->scale[i] = pack_block<true>(row, from, i < n ? count : 0);
            _mm512_storeu_si512(unit->pair[i], row[0]);
            _mm512_storeu_si512(unit->pair[i] + 16, row[1]);
        }
    }
}

static void pack_a_columns(void* out, const float* in, size_t ldi, int n, size_t k) {
    char* unit = static_cast<char*>(out);
    for (size_t k0 = 0; k0 < k; k0 += BLOCK, unit += sizeof(UnitA)) {
        const size_t count = k - k0 < BLOCK ? k - k0 : BLOCK;
        float line[MR][BLOCK];
        for (size_t p = 0; p < count; p++) {
            for (int i = 0; i < n; i++) {
                line[i][p] = in[(k0 + p) * ldi + size_t(i)];
            }
        }
        pack_a_lines(unit, line[0], BLOCK, n, count);
    }
}

// ---- B ----

// 16 lines of one block, 32 pairs each, to 16 columns of a unit.
inline void store_columns(UnitB* unit, int column, __m512i line[16][2]) {
    for (int half = 0; half < 2; half++) {
        __m512 v[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) {
            v[j] = _mm512_castsi512_ps(line[j][half]);
        }
        transpose16(v);
#pragma GCC unroll 16
        for (int p = 0; p < 16; p++) {
            _mm512_storeu_si512(unit->pair[half * 16 + p] + column, _mm512_castps_si512(v[p]));
        }
    }
}

template <class In>
static void pack_b_lines(void* out, const In* in, size_t ldi, int n, size_t k) {
    UnitB* unit = static_cast<UnitB*>(out);
    for (size_t k0 = 0; k0 < k; k0 += BLOCK, unit++, in += BLOCK) {
        const size_t count = k - k0 < BLOCK ? k - k0 : BLOCK;
        for (int j0 = 0; j0 < NR; j0 += 16) {
            __m512i line[16][2];
            for (int j = j0; j < j0 + 16; j++) {
                const In* from = in + size_t(j < n ? j : 0) * ldi;
                if (k - k0 > BLOCK) {
                    fetch(from + BLOCK, BLOCK * sizeof(In));
                }
                unit->scale[j] = pack_block<false>(line[j - j0], from, j < n ? count : 0);
            }
            store_columns(unit, j0, line);
        }
    }
}

// One panel.
template <class In>
static void pack_b_panel(UnitB* unit, const In* in, size_t ldi, int n, size_t k) {
    for (size_t k0 = 0; k0 < k; k0 += BLOCK, unit++, in += BLOCK * ldi) {
        const size_t count = k - k0 < BLOCK ? k - k0 : BLOCK;
        __m512i greatest[NV];
        __m512 inverse[NV];
        for (int v = 0; v < NV; v++) {
            greatest[v] = _mm512_setzero_si512();
        }
        for (size_t p = 0; p < count; p++) {
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                __m512 x = load(in + p * ldi + v * 16, lanes_of(v, n));
                greatest[v] = _mm512_max_epi32(greatest[v], magnitude(x));
            }
        }
        for (int v = 0; v < NV; v++) {
            _mm512_storeu_ps(unit->scale + v * 16, scales_of_b(greatest[v], &inverse[v]));
        }
        for (size_t p = 0; p < BLOCK; p += 2) {
            const In* even = in + (p < count ? p : 0) * ldi;
            const In* odd = in + (p + 1 < count ? p + 1 : 0) * ldi;
            if (k - k0 >= 2 * BLOCK) {
                fetch(even + BLOCK * ldi, NR * sizeof(In));
                fetch(odd + BLOCK * ldi, NR * sizeof(In));
            }
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                __m512 x = load(even + v * 16, p < count ? lanes_of(v, n) : 0);
                __m512 y = load(odd + v * 16, p + 1 < count ? lanes_of(v, n) : 0);
                _mm512_storeu_si512(unit->pair[p / 2] + v * 16,
                                    pairs(to_steps(x, inverse[v]), to_steps(y, inverse[v])));
            }
        }
    }
}

template <class In>
static void pack_b_columns(void* out, const In* in, size_t ldi, int n, size_t k) {
    UnitB* unit = static_cast<UnitB*>(out);
    for (int j = 0; j < n; j += NR, unit += (k + BLOCK - 1) / BLOCK) {
        pack_b_panel(unit, in + j, ldi, n - j < NR ? n - j : NR, k);
    }
}

// ---- B from NF4 ----

// The 16 weights code * absmax of a block, in steps.
inline __m512i step_table(float absmax, __m512 inverse) {
    return to_steps(round_to_bf16(_mm512_mul_ps(_mm512_loadu_ps(NF4_CODE), _mm512_set1_ps(absmax))), inverse);
}

// The bits of the greatest weights that these absmax allow.
inline __m512i greatest_weight(__m512 absmax) {
    return magnitude(round_to_bf16(absmax));
}

// 32 codes, the earlier of a byte in its high nibble, to 32 words of a table that holds its 16 twice.
inline __m512i look_up(const uint8_t* codes, __m512i table) {
    // A byte to a lane, its nibbles to the lane's words; vpermw reads 5 bits of each.
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
    const __m512i later = _mm512_and_si512(_mm512_slli_epi32(byte, 16), _mm512_set1_epi32(0x000f0000));
    return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(byte, 4), later), table);
}

static void pack_b_nf4_lines(void* out, const uint8_t* codes, size_t ld, const float* absmax, size_t lda, int n,
                             size_t k) {
    UnitB* unit = static_cast<UnitB*>(out);
    for (size_t k0 = 0; k0 < k; k0 += BLOCK, unit++, codes += BLOCK / 2, absmax++) {
        for (int j0 = 0; j0 < NR; j0 += 16) {
            float top[16], inverse[16];
            for (int j = 0; j < 16; j++) {
                top[j] = j0 + j < n ? absmax[size_t(j0 + j) * lda] : 0;
            }
            __m512 inverses;
            _mm512_storeu_ps(unit->scale + j0, scales_of_b(greatest_weight(_mm512_loadu_ps(top)), &inverses));
            _mm512_storeu_ps(inverse, inverses);
            __m512i line[16][2];
            for (int j = 0; j < 16; j++) {
                const uint8_t* from = codes + size_t(j0 + j < n ? j0 + j : 0) * ld;
                if (k - k0 > BLOCK) {
                    fetch(from + BLOCK / 2, BLOCK / 2);
                }
                __m512i table = step_table(top[j], _mm512_set1_ps(inverse[j]));
                table = words(table, table);
                line[j][0] = look_up(from, table);
                line[j][1] = look_up(from + 16, table);
            }
            store_columns(unit, j0, line);
        }
    }
}

// Columns: 64 lines by 64 columns to a unit. absmax (64), 0 for a line behind the last; lines of codes, ld bytes apart.
static void pack_square(UnitB* unit, const uint8_t* codes, size_t ld, const float* absmax, size_t lines) {
    __m512i greatest = _mm512_setzero_si512();
    for (int v = 0; v < 4; v++) {
        greatest = _mm512_max_epi32(greatest, greatest_weight(_mm512_loadu_ps(absmax + v * 16)));
    }
    float factor;
    const __m512 scale = _mm512_set1_ps(block_scale(false, _mm512_reduce_max_epi32(greatest), &factor));
    const __m512 inverse = _mm512_set1_ps(factor);
    // Two codes of the even line in a byte, of the odd one in another; 8 of each make 16 columns' pairs.
    const __m512i nibbles = _mm512_set1_epi32(0x000f000f), upper_table = _mm512_set1_epi32(0x00100000);
    for (size_t p = 0; p < 32; p++) {
        const size_t even = 2 * p < lines ? 2 * p : lines - 1, odd = 2 * p + 1 < lines ? 2 * p + 1 : lines - 1;
        const __m512i table = words(step_table(absmax[2 * p], inverse), step_table(absmax[2 * p + 1], inverse));
        const uint8_t *e = codes + even * ld, *o = codes + odd * ld;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const __m512i low = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(e + 8 * j)));
            const __m512i high = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(o + 8 * j)));
            const __m512i both = _mm512_or_si512(low, _mm512_slli_epi64(high, 16));
            __m512i code = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(both, 4), _mm512_slli_epi64(both, 32));
            // Bit 4 chooses the line's half of the table: (code & 15) | (odd ? 16 : 0).
            code = _mm512_ternarylogic_epi32(code, nibbles, upper_table, 0xea);
            _mm512_storeu_si512(unit->pair[p] + j * 16, _mm512_permutexvar_epi16(code, table));
        }
    }
    for (int v = 0; v < NV; v++) {
        _mm512_storeu_ps(unit->scale + v * 16, scale);
    }
}

static void pack_b_nf4_columns(void* out, const uint8_t* codes, size_t ld, const float* absmax, size_t lda, size_t n,
                               size_t k) {
    const size_t units = (k + BLOCK - 1) / BLOCK;
    for (size_t u = 0; u < units; u++) {
        const size_t lines = k - u * BLOCK < BLOCK ? k - u * BLOCK : BLOCK;
        for (size_t j = 0; j < n / NR; j++) {
            float top[BLOCK] = {};
            for (size_t i = 0; i < lines; i++) {
                top[i] = absmax[(u * BLOCK + i) * lda + j];
                if (k - u * BLOCK >= 2 * BLOCK) {
                    fetch(codes + ((u + 1) * BLOCK + i) * ld + j * NR / 2, NR / 2);
                }
            }
            pack_square(static_cast<UnitB*>(out) + j * units + u, codes + u * BLOCK * ld + j * NR / 2, ld, top, lines);
        }
    }
}

// ---- peak ----

static size_t peak_loop(size_t n, float* sink) {
    constexpr int CHAINS = 12;  // latency of 5 cycles times 2 units, with room
    __m512i sum[CHAINS];
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; i++) {
        sum[i] = _mm512_set1_epi32(i);
    }
    const __m512i left = _mm512_set1_epi16(3), right = _mm512_set1_epi16(-5);
    for (size_t step = 0; step < n; step++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) {
            multiply_pairs(sum[i], left, right);
        }
    }
#pragma GCC unroll 16
    for (int i = 1; i < CHAINS; i++) {
        sum[0] = _mm512_add_epi32(sum[0], sum[i]);
    }
    _mm512_mask_storeu_ps(sink, 1, _mm512_cvtepi32_ps(sum[0]));
    return n * CHAINS * 32 * 2;
}

}  // namespace

extern const GemmFormat<float> gemm_int16_avx512vnni = {
    "int16",
    MR,
    NR,
    BLOCK,
    sizeof(UnitA),
    sizeof(UnitB),
    1024,
    128,
    pack_a_lines<float>,
    pack_a_columns,
    pack_b_lines<float>,
    pack_b_columns<float>,
    pack_b_nf4_lines,
    pack_b_nf4_columns,
    pack_b_lines<bf16>,
    pack_b_columns<bf16>,
    pack_a_lines<bf16>,
    multiply,
    peak_loop,
};
