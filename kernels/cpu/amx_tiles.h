// The tile instructions of AMX (Intel SDM, volume 1, chapter 18): eight registers of 1 KB. Here a tile always has 16
// rows of 64 bytes; tiles are named by number, which is a constant.
//
//   tile_dot_bf16<C, A, B>:  c[m][n] += sum over k < 32 of a[m][k] b[k][n]
//
//   C   16 x 16 floats               A   16 rows x 32 bf16
//   B   16 pairs of rows: | b[2p][0] b[2p+1][0] | b[2p][1] b[2p+1][1] | ... | b[2p][15] b[2p+1][15] |   64 bytes each
//
// Sums are in fp32: even k apart from odd k, one fma each, then their sum, then c + that sum, each rounded to nearest
// even. Denormals count as zero, in operands and in results.
//
// A thread has its tiles between tiles_open and tiles_close; before and after, an instruction on a tile is illegal. A
// leaf opens and closes within itself: tens of nanoseconds, where a strip of 256 columns and 1,024 k takes eight
// microseconds. Attention's leaves take less than one; there a task opens and closes for all of them. So nothing
// depends on what a thread did before, or on other users of the tiles, and while they are closed the system has no 8 KB
// to save when it switches threads.
//
// The instructions are assembly with a memory clobber: the intrinsics of g++ 12 do not say which memory they touch, so
// that the stores that fill a tile's memory were moved behind its load, or dropped.
#pragma once
#include <stddef.h>
#include <stdint.h>

// Whether this processor has tiles with bf16 and the system lets this process use them; asks it at the first call.
// In amx_permitted.cpp, which is built for any processor.
bool amx_permitted();

#ifdef AMX_STANDIN
#include "dev/simt/amx_tiles.h"
#else

// Palette 1, first row 0, then bytes a row of 16 tiles at 16 and rows of 16 tiles at 48; the last eight do not exist.
alignas(64) static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tiles_config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
static_assert(sizeof(tiles_config) == 64, "as ldtilecfg reads it");

static inline void tiles_open() {
    asm volatile("ldtilecfg %0" ::"m"(tiles_config) : "memory");
}
static inline void tiles_close() {
    asm volatile("tilerelease" ::: "memory");
}

template <int T>
static inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// 16 rows of 64 bytes, `stride` bytes from one to the next.
template <int T>
static inline void tile_load(const void* p, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void tile_store(void* p, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// The assembler's order is the reverse of the manual's: b, a, c.
template <int C, int A, int B>
static inline void tile_dot_bf16() {
    static_assert(C != A && C != B && A != B, "three different tiles");
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif
