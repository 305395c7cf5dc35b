// What the tier amx adds to avx512vnni: the format bf16, products by the tiles of amx_tiles.h, and attention by tiles
// (leaf_attention_amx.inc). Leaf kernels only; see isa.h and format.h. Needs AVX512_BF16 and VBMI besides, which every
// processor with tiles has.
//
//   unit of a strip   | tile: rows 0-15 | tile: rows 16-31 |         row of a tile: 32 k of one row
//   unit of a panel   | tile: columns 0-15 | tile: columns 16-31 |   row p of a tile: k = 2p and 2p + 1 of each column
//
// A float becomes bf16 by vcvtneps2bf16: to nearest even; a NaN stays one and is made quiet; a denormal becomes zero
// with its sign, here as in the tiles. A weight in NF4 is bf16(code * absmax), rounded once: the 16 codes of a block
// are multiplied and rounded as one vector, and its 64 weights are looked up there.
//
// g++ 12 takes the "undefined" operand of its own AVX-512 headers for a mistake; clang has no such warning.
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wunknown-warning-option"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/isa.h"

namespace {

typedef unsigned char byte;

constexpr int SIDE = 32;                              // rows of a strip, columns of a panel
constexpr size_t DEPTH = 32;                          // reduction indices of a unit
constexpr size_t ROW = 64, TILE = 1024, UNIT = 2048;  // bytes
constexpr size_t KC = 1024, NC = 256;

// The first n lanes, all from 16 or 32 on.
inline __mmask16 lanes16(size_t n) {
    return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1);
}
inline __mmask32 lanes32(size_t n) {
    return n >= 32 ? __mmask32(0xffffffff) : __mmask32((1u << n) - 1);
}
inline size_t beyond(size_t n, size_t part) {
    return n > part ? n - part : 0;
}

inline void store_row(byte* p, __m512i row) {
    _mm512_store_si512(p, row);
}
inline __m512i join(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// ---- lines and pairs of lines ----

// 32 elements of a line as bf16, zeros from n on.
inline __m512i line_bf16(const float* p, size_t n) {
    return __m512i(_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(lanes16(beyond(n, 16)), p + 16),
                                       _mm512_maskz_loadu_ps(lanes16(n), p)));
}
inline __m512i line_bf16(const bf16* p, size_t n) {
    return _mm512_maskz_loadu_epi16(lanes32(n), p);
}

// Lanes 0 16 1 17 2 18 ...: two halves in turns.
inline __m512i turns() {
    const __m512i even = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(16)), 16));
}

// 16 elements of two lines as pairs of bf16; what a mask leaves out is not read and counts as zero.
inline __m512i pairs_bf16(const float* p, const float* q, __mmask16 first, __mmask16 second) {
    __m512i both = __m512i(_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(second, q), _mm512_maskz_loadu_ps(first, p)));
    return _mm512_permutexvar_epi16(turns(), both);
}
inline __m512i pairs_bf16(const bf16* p, const bf16* q, __mmask16 first, __mmask16 second) {
    __m512i both = join(_mm256_maskz_loadu_epi16(first, p), _mm256_maskz_loadu_epi16(second, q));
    return _mm512_permutexvar_epi16(turns(), both);
}

// A row of two tiles of pairs: the first n <= 32 elements of two lines, of which `have` are there. The lines of the
// next unit are called for early.
template <class X>
inline void pair_row(byte* left, byte* right, const X* in, size_t ldi, size_t n, size_t have) {
    const X *first = in, *second = have > 1 ? in + ldi : in;
    for (size_t i = 0; i < SIDE; i += 64 / sizeof(X)) {
        _mm_prefetch(reinterpret_cast<const char*>(in + DEPTH * ldi + i), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(in + (DEPTH + 1) * ldi + i), _MM_HINT_T0);
    }
    __mmask16 low = 0xffff, high = 0xffff;
    if (n >= SIDE && have > 1) {
        store_row(left, pairs_bf16(first, second, low, low));
        store_row(right, pairs_bf16(first + 16, second + 16, high, high));
        return;
    }
    low = have > 0 ? lanes16(n) : 0;
    high = have > 0 ? lanes16(beyond(n, 16)) : 0;
    store_row(left, pairs_bf16(first, second, low, have > 1 ? low : 0));
    store_row(right, pairs_bf16(first + 16, second + 16, high, have > 1 ? high : 0));
}

// ---- 16 x 16 transposition of 32-bit elements ----

// Which row of the result column d of the input is. Weights from NF4 lines come in an order of their own (nf4_shifts):
// of d = (d3 d2 d1 d0) in binary, row (d1 d3 d2 d0).
template <bool NF4>
constexpr size_t transposed_row(size_t d) {
    return NF4 ? (d >> 1 & 1) * 8 + (d >> 2) * 2 + (d & 1) : d;
}

// Four columns at a time: loads from memory put rows r, 4 + r, 8 + r, 12 + r side by side, and two of the four rounds
// of transpose16 (avx512.h) are left. Those occupy the one unit that the look-ups in NF4 need as well.
template <bool NF4>
inline void transpose(byte* out, const byte* in) {
#pragma GCC unroll 4
    for (size_t g = 0; g < 4; g++) {
        __m512i v[4];
#pragma GCC unroll 4
        for (size_t r = 0; r < 4; r++) {
            const __m128i* p = reinterpret_cast<const __m128i*>(in + r * ROW + g * 16);
            v[r] = _mm512_castsi128_si512(_mm_load_si128(p));
            v[r] = _mm512_inserti32x4(v[r], _mm_load_si128(p + 16), 1);
            v[r] = _mm512_inserti32x4(v[r], _mm_load_si128(p + 32), 2);
            v[r] = _mm512_inserti32x4(v[r], _mm_load_si128(p + 48), 3);
        }
        const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
        const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
        store_row(out + transposed_row<NF4>(4 * g) * ROW, _mm512_unpacklo_epi64(a, c));
        store_row(out + transposed_row<NF4>(4 * g + 1) * ROW, _mm512_unpackhi_epi64(a, c));
        store_row(out + transposed_row<NF4>(4 * g + 2) * ROW, _mm512_unpacklo_epi64(b, d));
        store_row(out + transposed_row<NF4>(4 * g + 3) * ROW, _mm512_unpackhi_epi64(b, d));
    }
}

inline void clear(byte* p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += ROW) {
        store_row(p + i, _mm512_setzero_si512());
    }
}

// ---- packing ----

// Rows go to tiles as they are. Eight units of a row at a time: long enough runs are read, and what is written stays
// within 16 KB of the first cache.
template <class X>
inline void a_lines(byte* out, const X* in, size_t ldi, int n, size_t k) {
    constexpr size_t GROUP = 8 * DEPTH;
    for (size_t k0 = 0; k0 < k; k0 += GROUP, out += 8 * UNIT) {
        const size_t end = k - k0 < GROUP ? k : k0 + GROUP;
        for (int i = 0; i < SIDE; i++) {
            const X* line = in + size_t(i) * ldi;
            byte* row = out + size_t(i) * ROW;
            size_t at = k0;
            for (; i < n && at + DEPTH <= end; at += DEPTH, row += UNIT) {
                store_row(row, line_bf16(line + at, DEPTH));
            }
            for (; at < end; at += DEPTH, row += UNIT) {
                store_row(row, i < n ? line_bf16(line + at, end - at) : _mm512_setzero_si512());
            }
        }
    }
}
void pack_a_lines(void* out, const float* in, size_t ldi, int n, size_t k) {
    a_lines(static_cast<byte*>(out), in, ldi, n, k);
}
void pack_a_bf16_lines(void* out, const bf16* in, size_t ldi, int n, size_t k) {
    a_lines(static_cast<byte*>(out), in, ldi, n, k);
}

template <class X>
inline void a_columns(byte* unit, const X* in, size_t ldi, size_t n, size_t k) {
    alignas(64) byte pairs[2 * TILE];
    for (size_t k0 = 0; k0 < k; k0 += DEPTH, unit += UNIT) {
        for (size_t p = 0; p < 16; p++) {
            const size_t have = beyond(k, k0 + 2 * p);
            const X* lines = in + (have ? k0 + 2 * p : 0) * ldi;
            pair_row(pairs + p * ROW, pairs + TILE + p * ROW, lines, ldi, n, have);
        }
        transpose<false>(unit, pairs);
        transpose<false>(unit + TILE, pairs + TILE);
    }
}
void pack_a_columns(void* out, const float* in, size_t ldi, int n, size_t k) {
    a_columns(static_cast<byte*>(out), in, ldi, size_t(n), k);
}

template <class X>
inline void b_lines(byte* out, const X* in, size_t ldi, int n, size_t k) {
    alignas(64) byte lines[TILE];
    for (int half = 0; half < 2; half++) {
        const int first = half * 16, have = n - first < 0 ? 0 : n - first < 16 ? n - first : 16;
        byte* tile = out + size_t(half) * TILE;
        clear(lines, TILE);
        for (size_t k0 = 0; k0 < k; k0 += DEPTH, tile += UNIT) {
            for (int i = 0; i < have; i++) {
                const X* p = in + size_t(first + i) * ldi + k0;
                store_row(lines + size_t(i) * ROW, k - k0 >= DEPTH ? line_bf16(p, DEPTH) : line_bf16(p, k - k0));
            }
            transpose<false>(tile, lines);
        }
    }
}
void pack_b_lines(void* out, const float* in, size_t ldi, int n, size_t k) {
    b_lines(static_cast<byte*>(out), in, ldi, n, k);
}
void pack_b_bf16_lines(void* out, const bf16* in, size_t ldi, int n, size_t k) {
    b_lines(static_cast<byte*>(out), in, ldi, n, k);
}

// Any number of columns: panels one after another.
template <class X>
inline void b_columns(byte* out, const X* in, size_t ldi, size_t n, size_t k) {
    const size_t units = (k + DEPTH - 1) / DEPTH;
    for (size_t p = 0; p < units * 16; p++) {
        const size_t have = beyond(k, 2 * p);
        const X* lines = in + (have ? 2 * p : 0) * ldi;
        byte* row = out + p / 16 * UNIT + p % 16 * ROW;
        for (size_t j = 0; j < n; j += SIDE, row += units * UNIT) {
            pair_row(row, row + TILE, lines + j, ldi, n - j, have);
        }
    }
}
void pack_b_columns(void* out, const float* in, size_t ldi, int n, size_t k) {
    b_columns(static_cast<byte*>(out), in, ldi, size_t(n), k);
}
void pack_b_bf16_columns(void* out, const bf16* in, size_t ldi, int n, size_t k) {
    b_columns(static_cast<byte*>(out), in, ldi, size_t(n), k);
}

// ---- packing from NF4 ----

struct Bytes {
    alignas(64) uint8_t at[64];
};
inline __m512i load(const Bytes& b) {
    return _mm512_load_si512(b.at);
}

inline __m256i nf4_table(float absmax) {
    return __m256i(_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(NF4_CODE), _mm512_set1_ps(absmax))));
}

// Lines. vpmultishiftqb takes eight bits from any place of its 64, for each byte: the code wanted is in the lower four,
// and vpermw reads the lower five of 16, whose fifth does not matter, since the table stands there twice.
//
// Eight words of four codes come from two words, which stand in turns: 16 bytes, broadcast. So word q has codes
// 16 (q % 2) + 4 (q / 2) and the three behind it.
constexpr size_t nf4_place(size_t lane) {
    return lane / 4 % 2 * 16 + lane / 8 * 4 + lane % 4;
}
constexpr Bytes nf4_shifts() {
    Bytes b = {};
    for (size_t lane = 0; lane < 32; lane++) {
        const size_t code = nf4_place(lane) % 16;
        b.at[2 * lane] = uint8_t(code / 2 * 8 + (code % 2 == 0 ? 4 : 0));  // the earlier code is in the high nibble
    }
    return b;
}
constexpr Bytes LINE_SHIFTS = nf4_shifts();

// Which lanes have one of the first n codes.
inline __mmask32 nf4_lanes(size_t n) {
    __mmask32 mask = 0;
    for (size_t lane = 0; lane < 32; lane++) {
        mask |= nf4_place(lane) < n ? 1u << lane : 0;
    }
    return mask;
}

// 64 weights of a line to rows of two tiles that wait to be transposed.
inline void nf4_line(byte* rows, const uint8_t* codes, float absmax) {
    const __m512i shifts = load(LINE_SHIFTS), table = _mm512_broadcast_i64x4(nf4_table(absmax));
    const __m512i low = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512i high = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16)));
    store_row(rows, _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, low), table));
    store_row(rows + TILE, _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, high), table));
}
// The same of n < 64.
inline void nf4_line_end(byte* rows, const uint8_t* codes, float absmax, size_t n) {
    const __m512i shifts = load(LINE_SHIFTS), table = _mm512_broadcast_i64x4(nf4_table(absmax));
    const __m256i bytes = _mm256_maskz_loadu_epi8(lanes32((n + 1) / 2), codes);
    const __m512i low = _mm512_broadcast_i32x4(_mm256_castsi256_si128(bytes));
    const __m512i high = _mm512_broadcast_i32x4(_mm256_extracti32x4_epi32(bytes, 1));
    store_row(rows, _mm512_maskz_permutexvar_epi16(nf4_lanes(n), _mm512_multishift_epi64_epi8(shifts, low), table));
    store_row(rows + TILE, _mm512_maskz_permutexvar_epi16(nf4_lanes(beyond(n, 32)),
                                                          _mm512_multishift_epi64_epi8(shifts, high), table));
}

void pack_b_nf4_lines(void* out, const uint8_t* codes, size_t ld, const float* absmax, size_t lda, int n, size_t k) {
    constexpr size_t BLOCK = 64, AHEAD = 128;  // bytes of codes that are called for early
    alignas(64) byte lines[2 * TILE];
    for (int half = 0; half < 2; half++) {
        const int first = half * 16, have = n - first < 0 ? 0 : n - first < 16 ? n - first : 16;
        const uint8_t* from = codes + size_t(first) * ld;
        const float* sizes = absmax + size_t(first) * lda;
        byte* tile = static_cast<byte*>(out) + size_t(half) * TILE;
        clear(lines, 2 * TILE);
        for (size_t k0 = 0; k0 < k; k0 += BLOCK, from += BLOCK / 2, sizes++, tile += 2 * UNIT) {
            for (size_t i = 0; i < size_t(have); i++) {
                if (k - k0 >= BLOCK) {
                    _mm_prefetch(reinterpret_cast<const char*>(from + i * ld + AHEAD), _MM_HINT_T0);
                    nf4_line(lines + i * ROW, from + i * ld, sizes[i * lda]);
                } else {
                    nf4_line_end(lines + i * ROW, from + i * ld, sizes[i * lda], k - k0);
                }
            }
            transpose<true>(tile, lines);
            if (k - k0 > DEPTH) {
                transpose<true>(tile + UNIT, lines + TILE);
            }
        }
    }
}

// Columns: a block of 64 weights of two lines becomes a row of four tiles. For each tile vpermb puts bytes of the two
// lines, 8 of each, in turns at the foot of eight words of 64 bits; vpmultishiftqb makes the four codes of the two
// 16-bit lanes; the fifth bit, set in the lanes of the second line, chooses that line's half of the table.
constexpr Bytes pair_bytes(size_t tile) {
    Bytes b = {};
    for (size_t i = 0; i < 64; i++) {
        b.at[i] = uint8_t(i % 2 * 32 + tile * 8 + i / 8);
    }
    return b;
}
constexpr Bytes pair_shifts() {
    Bytes b = {};
    for (size_t word = 0; word < 8; word++) {
        b.at[word * 8] = 4;       // first line, earlier code
        b.at[word * 8 + 2] = 12;  // second line, earlier code
        b.at[word * 8 + 4] = 0;
        b.at[word * 8 + 6] = 8;
    }
    return b;
}
constexpr Bytes PAIR_BYTES[4] = {pair_bytes(0), pair_bytes(1), pair_bytes(2), pair_bytes(3)};
constexpr Bytes PAIR_SHIFTS = pair_shifts();

// A row of the tiles of two panels, `panel` bytes apart.
inline void nf4_pair(byte* row, size_t panel, const uint8_t* first, const uint8_t* second, __m256i first_table,
                     __m256i second_table) {
    const __m512i codes = join(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)),
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
    const __m512i table = join(first_table, second_table);
    const __m512i four = _mm512_set1_epi16(15), fifth = _mm512_set1_epi32(0x100000);
#pragma GCC unroll 4
    for (size_t t = 0; t < 4; t++) {
        __m512i index = _mm512_permutexvar_epi8(load(PAIR_BYTES[t]), codes);
        index = _mm512_multishift_epi64_epi8(load(PAIR_SHIFTS), index);
        index = _mm512_ternarylogic_epi32(index, four, fifth, 0xea);  // index & four | fifth
        store_row(row + t / 2 * panel + t % 2 * TILE, _mm512_permutexvar_epi16(index, table));
    }
}

void pack_b_nf4_columns(void* out, const uint8_t* codes, size_t ld, const float* absmax, size_t lda, size_t n,
                        size_t k) {
    constexpr size_t AHEAD = 32;  // lines that are called for early
    const size_t units = (k + DEPTH - 1) / DEPTH, panel = units * UNIT, blocks = n / 64;
    for (size_t p = 0; p < units * 16; p++, codes += 2 * ld, absmax += 2 * lda) {
        byte* row = static_cast<byte*>(out) + p / 16 * UNIT + p % 16 * ROW;
        if (2 * p + 1 < k) {
            for (size_t at = 0; at < n / 2; at += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(codes + AHEAD * ld + at), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(codes + (AHEAD + 1) * ld + at), _MM_HINT_T0);
            }
            for (size_t i = 0; i < blocks; i++) {
                const uint8_t* first = codes + i * 32;
                nf4_pair(row + i * 2 * panel, panel, first, first + ld, nf4_table(absmax[i]),
                         nf4_table(absmax[lda + i]));
            }
        } else if (2 * p < k) {
            for (size_t i = 0; i < blocks; i++) {
                const uint8_t* only = codes + i * 32;
                nf4_pair(row + i * 2 * panel, panel, only, only, nf4_table(absmax[i]), _mm256_setzero_si256());
            }
        } else {
            for (size_t i = 0; i < 4 * blocks; i++) {
                store_row(row + i / 2 * panel + i % 2 * TILE, _mm512_setzero_si512());
            }
        }
    }
}

// ---- multiplying ----

constexpr int C0 = 0, C1 = 1, C2 = 2, C3 = 3, A0 = 4, A1 = 5, B0 = 6, B1 = 7;  // tiles
constexpr size_t SUMS = 4 * TILE;  // bytes of 32 x 32 sums: the tiles C0, C1 (rows 0-15), C2, C3

// 32 x 32 sums and `steps` units, which are so many bytes apart. BOTH: rows 16-31 as well. AHEAD: each step calls for
// four lines of memory at `next`.
template <bool BOTH, bool AHEAD>
inline void multiply_segment(byte* c, const byte* a, size_t a_step, const byte* b, size_t b_step, size_t steps,
                             bool first, const byte* next) {
    if (first) {
        tile_zero<C0>();
        tile_zero<C1>();
    } else {
        tile_load<C0>(c, ROW);
        tile_load<C1>(c + TILE, ROW);
    }
    if (BOTH && first) {
        tile_zero<C2>();
        tile_zero<C3>();
    } else if (BOTH) {
        tile_load<C2>(c + 2 * TILE, ROW);
        tile_load<C3>(c + 3 * TILE, ROW);
    }
    for (; steps > 0; steps--, a += a_step, b += b_step, next += AHEAD ? 4 * 64 : 0) {
        tile_load<B0>(b, ROW);
        tile_load<A0>(a, ROW);
        tile_dot_bf16<C0, A0, B0>();
        tile_load<B1>(b + TILE, ROW);
        tile_dot_bf16<C1, A0, B1>();
        for (int line = 0; AHEAD && line < 4; line++) {
            _mm_prefetch(reinterpret_cast<const char*>(next + line * 64), _MM_HINT_T1);
        }
        if (BOTH) {
            tile_load<A1>(a + TILE, ROW);
            tile_dot_bf16<C2, A1, B0>();
            tile_dot_bf16<C3, A1, B1>();
        }
    }
    tile_store<C0>(c, ROW);
    tile_store<C1>(c + TILE, ROW);
    if (BOTH) {
        tile_store<C2>(c + 2 * TILE, ROW);
        tile_store<C3>(c + 3 * TILE, ROW);
    }
}

// Sums, 32 columns after another, to rows of c.
inline void store_sums(float* c, size_t ldc, const byte* sums, int mr, size_t nc, bool add) {
    for (size_t i = 0; i < size_t(mr); i++, c += ldc) {
        const byte* row = sums + i / 16 * 2 * TILE + i % 16 * ROW;
        for (size_t j = 0; j < nc; j += 16) {
            const __mmask16 lanes = lanes16(nc - j);
            __m512 sum = _mm512_load_ps(row + j / 32 * SUMS + j / 16 % 2 * TILE);
            if (add) {
                sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, c + j), sum);
            }
            _mm512_mask_storeu_ps(c + j, lanes, sum);
        }
    }
}

// Tiles hold 32 x 32 sums for 256 k; in between these rest in `sums`, which stays in the first cache together with 16
// KB of the strip. Panels come from the second cache, and so will the strip that follows this one: with NC columns a
// strip takes a fourth as many steps as it has lines of memory, and each step calls for four lines of the next.
template <bool BOTH>
void multiply_columns(size_t units, const byte* a, const byte* b, float* c, size_t ldc, int mr, size_t nc, bool add) {
    constexpr size_t SEGMENT = 8;  // units
    alignas(64) byte sums[NC / SIDE * SUMS];
    const byte* next = a + units * UNIT;
    for (size_t unit = 0; unit == 0 || unit < units; unit += SEGMENT) {  // no units: sums of zero
        const size_t steps = units - unit < SEGMENT ? units - unit : SEGMENT;
        for (size_t j = 0; j < nc; j += SIDE, next += steps * 4 * 64) {
            multiply_segment<BOTH, true>(sums + j / SIDE * SUMS, a + unit * UNIT, UNIT,
                                         b + (j / SIDE * units + unit) * UNIT, UNIT, steps, unit == 0, next);
        }
    }
    store_sums(c, ldc, sums, mr, nc, add);
}

void multiply(size_t k, const void* a, const void* b, float* c, size_t ldc, int mr, size_t nc, bool add) {
    const size_t units = (k + DEPTH - 1) / DEPTH;
    const byte *strip = static_cast<const byte*>(a), *panels = static_cast<const byte*>(b);
    tiles_open();
    for (size_t j = 0; j < nc; j += NC, panels += NC / SIDE * units * UNIT) {
        const size_t columns = nc - j < NC ? nc - j : NC;
        if (mr > 16) {
            multiply_columns<true>(units, strip, panels, c + j, ldc, mr, columns, add);
        } else {
            multiply_columns<false>(units, strip, panels, c + j, ldc, mr, columns, add);
        }
    }
    tiles_close();
}

size_t peak_loop(size_t n, float* sink) {
    alignas(64) byte tile[TILE];
    clear(tile, TILE);
    tiles_open();
    tile_zero<C0>();
    tile_zero<C1>();
    tile_zero<C2>();
    tile_zero<C3>();
    tile_load<A0>(tile, ROW);
    tile_load<A1>(tile, ROW);
    tile_load<B0>(tile, ROW);
    tile_load<B1>(tile, ROW);
    for (size_t i = 0; i < n; i++) {
        tile_dot_bf16<C0, A0, B0>();
        tile_dot_bf16<C1, A0, B1>();
        tile_dot_bf16<C2, A1, B0>();
        tile_dot_bf16<C3, A1, B1>();
    }
    tile_store<C0>(tile, ROW);
    tiles_close();
    *sink = _mm512_cvtss_f32(_mm512_load_ps(tile));
    return n * 4 * (2 * 16 * 16 * DEPTH);
}

#include "kernels/cpu/leaf_attention_amx.inc"  // written over what stands above

}  // namespace

extern const GemmFormat<float> gemm_bf16_amx = {"bf16",
                                                SIDE,
                                                SIDE,
                                                DEPTH,
                                                UNIT,
                                                UNIT,
                                                KC,
                                                NC,
                                                pack_a_lines,
                                                pack_a_columns,
                                                pack_b_lines,
                                                pack_b_columns,
                                                pack_b_nf4_lines,
                                                pack_b_nf4_columns,
                                                pack_b_bf16_lines,
                                                pack_b_bf16_columns,
                                                pack_a_bf16_lines,
                                                multiply,
                                                peak_loop};

extern const AttentionTiles attention_tiles_amx = LEAF_ATTENTION_AMX;
