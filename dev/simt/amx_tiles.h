// The tile instructions on a processor that has AVX-512 but no AMX: the functions of kernels/cpu/amx_tiles.h with the
// same results bit for bit, as the manual defines them (Intel SDM, volume 2, TDPBF16PS):
//
//   even = odd = 0                                         each of the 16 x 16 elements c[m][n]
//   for p in 0 .. 15: even = fma(a[m][2p],   b[p][2n],   even)
//                     odd  = fma(a[m][2p+1], b[p][2n+1], odd)
//   c = c + (even + odd)                                   nearest even; denormals are zero, read or written
//
// Only which NaN comes out of two is left open. Mistakes that the processor punishes or would let pass end the program:
// an instruction on closed tiles, tiles opened twice (one of two leaves did not close them), a tile read that nothing
// has filled since they were opened, rows that overlap.
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct StandinTiles {
    alignas(64) unsigned char tile[8][1024];
    bool open, filled[8];
};
static thread_local StandinTiles standin_tiles;

static inline void standin_check(bool right, const char* what, const char* mistake) {
    if (!right) {
        fprintf(stderr, "amx: %s: %s\n", what, mistake);
        abort();
    }
}
static inline unsigned char* standin_tile(int t, const char* what) {
    standin_check(standin_tiles.open, what, "the tiles are not open in this thread");
    standin_check(standin_tiles.filled[t], what, "the tile has not been filled");
    return standin_tiles.tile[t];
}

static inline void tiles_open() {
    standin_check(!standin_tiles.open, "tiles_open", "the tiles are open already");
    memset(&standin_tiles, 0, sizeof(standin_tiles));
    standin_tiles.open = true;
}
static inline void tiles_close() {
    standin_check(standin_tiles.open, "tiles_close", "the tiles are not open in this thread");
    standin_tiles.open = false;
}

template <int T>
static inline void tile_zero() {
    standin_tiles.filled[T] = true;
    memset(standin_tile(T, "tile_zero"), 0, 1024);
}
template <int T>
static inline void tile_load(const void* p, size_t stride) {
    standin_check(stride >= 64, "tile_load", "rows overlap");
    standin_tiles.filled[T] = true;
    unsigned char* tile = standin_tile(T, "tile_load");
    for (int i = 0; i < 16; i++) {
        memcpy(tile + i * 64, static_cast<const unsigned char*>(p) + size_t(i) * stride, 64);
    }
}
template <int T>
static inline void tile_store(void* p, size_t stride) {
    standin_check(stride >= 64, "tile_store", "rows overlap");
    const unsigned char* tile = standin_tile(T, "tile_store");
    for (int i = 0; i < 16; i++) {
        memcpy(static_cast<unsigned char*>(p) + size_t(i) * stride, tile + i * 64, 64);
    }
}

// Says what it needs, so that a file built for any x86-64 can have it. The control register is set around the sums:
// round to nearest, no traps, denormals read and written as zero; the empty statements keep them between the two.
__attribute__((target("avx512f"))) static inline void standin_dot(void* c, const void* a, const void* b) {
    constexpr unsigned NEAREST_DAZ_FTZ_NO_TRAPS = 0x9fc0;
    constexpr int BAND = 4;  // rows at a time: eight independent sums
    const unsigned control = _mm_getcsr();
    _mm_setcsr(NEAREST_DAZ_FTZ_NO_TRAPS);
    asm volatile("" ::: "memory");
    alignas(64) float a_even[16][16], a_odd[16][16];
    typedef uint32_t Pairs __attribute__((vector_size(64)));
    Pairs pairs;
    for (int m = 0; m < 16; m++) {
        memcpy(&pairs, static_cast<const char*>(a) + m * 64, 64);
        _mm512_store_ps(a_even[m], __m512(pairs << 16));
        _mm512_store_ps(a_odd[m], __m512(pairs & 0xffff0000));
    }
    for (int m = 0; m < 16; m += BAND) {
        __m512 even[BAND], odd[BAND];
        for (int i = 0; i < BAND; i++) {
            even[i] = odd[i] = _mm512_setzero_ps();
        }
        for (int p = 0; p < 16; p++) {
            memcpy(&pairs, static_cast<const char*>(b) + p * 64, 64);
            const __m512 b_even = __m512(pairs << 16), b_odd = __m512(pairs & 0xffff0000);
            for (int i = 0; i < BAND; i++) {
                even[i] = _mm512_fmadd_ps(_mm512_set1_ps(a_even[m + i][p]), b_even, even[i]);
                odd[i] = _mm512_fmadd_ps(_mm512_set1_ps(a_odd[m + i][p]), b_odd, odd[i]);
            }
        }
        for (int i = 0; i < BAND; i++) {
            float* row = static_cast<float*>(c) + (m + i) * 16;
            _mm512_storeu_ps(row, _mm512_add_ps(_mm512_loadu_ps(row), _mm512_add_ps(even[i], odd[i])));
        }
    }
    asm volatile("" ::: "memory");
    _mm_setcsr(control);
}

template <int C, int A, int B>
static inline void tile_dot_bf16() {
    static_assert(C != A && C != B && A != B, "three different tiles");
    const unsigned char* a = standin_tile(A, "tile_dot_bf16: A");
    const unsigned char* b = standin_tile(B, "tile_dot_bf16: B");
    standin_dot(standin_tile(C, "tile_dot_bf16: C"), a, b);
}
