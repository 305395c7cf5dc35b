// NF4 on the GPU: quantising while a checkpoint is loaded, the packed order of codes that the fused matmul reads, and
// writing a frozen matrix out as bf16 or float. kernels/cpu/nf4.h has the format and the same bytes; nf4_matmul.cuh
// multiplies.
//
//   weight i = round_to_bf16(NF4_CODE[code i] * absmax[i / 64]),  absmax = fl(fl(map8[absmax8] * absmax2) + offset)
//
// The packed order serves W and W^T alike. A unit (u, v) is 2x2 codes in 16 bits, the first in the low nibble:
//   w(2u, 2v)  w(2u, 2v+1)  w(2u+1, 2v)  w(2u+1, 2v+1)
//
//   cols:      0 1 | 2 3 | 4 5 | 6 7 | 8 9 |10 11|12 13|14 15   a 16x16 tile: 8x8 units = 32 words, one a lane 4g + t
//   rows 0,1   0,0   0,1   0,2   0,3   0,4   0,5   0,6   0,7      word = unit(g, t) | unit(g, t + 4) << 16
//   rows 2,3   1,0   1,1   ...                                  its bytes 0..3 are the pairs of fragment registers
//   ...                                                         a0..a3 when rows 2g, 2g+1 stand for a fragment's
//   rows 14,15 7,0   ...                           7,7          rows g, g + 8
//
//   supertile  16 rows x 64 cols = 512 bytes; the 16 bytes of a lane are its words of the four tiles, left to right,
//              and lie in one absmax block for each of its rows
//   codes      supertiles in the order [rows / 16][cols / 64]
//   absmax8, absmax32  [cols / 64][rows];  absmax2  as it was, by the block's number in bitsandbytes' order / 256
#pragma once
#include <utility>

#include "kernels/cpu/isa.h"
#include "kernels/nf4_ops.h"
#include "kernels/vector.cuh"
#include "kernels/workspace.cuh"

// ----------------------------------------------------------------------------
// codes

template <size_t I>
constexpr float nf4_code = NF4_CODE[I];
// A value above threshold I takes a code above I (kernels/cpu/nf4.cpp).
template <size_t I>
constexpr float nf4_threshold = (NF4_CODE[I] + NF4_CODE[I + 1]) / 2.0f;

template <size_t... I>
__device__ __forceinline__ int nf4_codes_below(float x, std::index_sequence<I...>) {
    return (int(x > nf4_threshold<I>) + ...);
}

template <size_t... I>
__device__ __forceinline__ float nf4_code_at(int index, std::index_sequence<I...>) {
    float code = 0;
    ((code = index == int(I) ? nf4_code<I> : code), ...);
    return code;
}

// The table of codes is spread over the lanes, twice in a warp: a shuffle of width 16 looks one up. Opaque, or the
// compiler works it out again (32 instructions) wherever it is used.
__device__ __forceinline__ float nf4_table(int lane) {
    float table = nf4_code_at(lane % 16, std::make_index_sequence<16>());
    opaque(table);
    return table;
}

// The code of the low nibble of bits: the shuffle ignores what is above it.
__device__ __forceinline__ float nf4_look_up(float table, uint32_t bits) {
    return __shfl_sync(ALL_LANES, table, int(bits), 16);
}

// Two weights, the earlier in the low half, of the codes in the low nibbles of `first` and `second`.
__device__ __forceinline__ uint32_t nf4_pair(float table, uint32_t first, uint32_t second, float absmax_first,
                                             float absmax_second) {
    return pack_bf16x2(__fmul_rn(nf4_look_up(table, first), absmax_first),
                       __fmul_rn(nf4_look_up(table, second), absmax_second));
}

// Product and sum are rounded apart: a fused multiply-add differs where the offset cancels.
__device__ __forceinline__ float nf4_restored(float entry, float absmax2, float offset) {
    return __fadd_rn(__fmul_rn(entry, absmax2), offset);
}

// The absmax of a block by its number in bitsandbytes' order; at: where it is stored (the number itself unless packed).
__device__ __forceinline__ float nf4_absmax_at(const Matrix& w, size_t at, size_t block) {
    return w.absmax32 ? w.absmax32[at] : nf4_restored(w.map8[w.absmax8[at]], w.absmax2[block / 256], w.offset);
}

// ----------------------------------------------------------------------------
// quantising. A warp takes 256 weights, a lane 8: four blocks of 64 with 8 lanes each.

template <int WARPS>
__global__ void __launch_bounds__(32 * WARPS)
    nf4_quantize_kernel(uint8_t* codes, float* absmax, const float* w, size_t n) {
    const int lane = threadIdx.x % 32;
    const size_t first = (size_t(blockIdx.x) * WARPS + threadIdx.x / 32) * 256 + size_t(lane) * 8;
    float x[8];
    if (first + 8 <= n) {
        const float4 low = reinterpret_cast<const float4*>(w + first)[0];
        const float4 high = reinterpret_cast<const float4*>(w + first)[1];
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[i] = first + i < n ? w[first + i] : 0.0f;
        }
    }
    float greatest = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        greatest = fmaxf(greatest, fabsf(x[i]));
    }
#pragma unroll
    for (int o = 4; o > 0; o /= 2) {
        greatest = fmaxf(greatest, __shfl_xor_sync(ALL_LANES, greatest, o));
    }
    const float inverse = 1.0f / fmaxf(greatest, 1e-38f);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int code = nf4_codes_below(__fmul_rn(x[i], inverse), std::make_index_sequence<15>());
        word |= uint32_t(code) << (4 * (i ^ 1));  // the earlier of two in the high nibble
    }
    if (first >= n) {
        return;
    }
    if (lane % 8 == 0) {
        absmax[first / 64] = greatest;
    }
    uint8_t* out = codes + first / 2;
    if (first + 8 <= n && reinterpret_cast<uintptr_t>(out) % 4 == 0) {
        *reinterpret_cast<uint32_t*>(out) = word;
    } else {
        for (size_t i = 0; 2 * i < 8 && first + 2 * i < n; i++) {
            out[i] = uint8_t(word >> 8 * i);
        }
    }
}

// ----------------------------------------------------------------------------
// packing, once a matrix: a thread a word, and a thread an absmax

template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    nf4_pack_kernel(uint32_t* packed, const uint8_t* codes, size_t rows, size_t cols) {
    const size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= rows * cols / 8) {
        return;
    }
    const int tile = i % 4, lane = i / 4 % 32, g = lane / 4, t = lane % 4;
    const size_t supertile = i / 128;
    const size_t row = supertile / (cols / 64) * 16 + 2 * g, col = supertile % (cols / 64) * 64 + 16 * tile + 2 * t;
    const uint8_t* even = codes + (row * cols + col) / 2;
    const uint8_t* odd = even + cols / 2;
    const uint32_t word = even[0] | uint32_t(odd[0]) << 8 | uint32_t(even[4]) << 16 | uint32_t(odd[4]) << 24;
    packed[i] = (word & 0x0f0f0f0fu) << 4 | (word >> 4 & 0x0f0f0f0fu);  // the earlier code from high to low nibble
}

template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS) nf4_transpose_kernel(T* out, const T* in, size_t rows, size_t cols) {
    const size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i < rows * cols) {
        out[i] = in[i % rows * cols + i / rows];
    }
}

// ----------------------------------------------------------------------------
// dequantising

// p[0] .. p[7] = 8 neighbours of a row; VECTORS: p is 16-byte aligned.
template <bool VECTORS, class X>
__device__ __forceinline__ void store_pairs(X* p, const uint32_t (&pair)[4]) {
    if constexpr (VECTORS && std::is_same<X, bf16>::value) {
        vector_put<false>(p, make_uint4(pair[0], pair[1], pair[2], pair[3]));
    } else if constexpr (VECTORS) {
        vector_put<false>(p, make_float4(bf16_low(pair[0]), bf16_high(pair[0]), bf16_low(pair[1]), bf16_high(pair[1])));
        vector_put<false>(p + 4,
                          make_float4(bf16_low(pair[2]), bf16_high(pair[2]), bf16_low(pair[3]), bf16_high(pair[3])));
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            p[i] = narrow<X>(i % 2 ? bf16_high(pair[i / 2]) : bf16_low(pair[i / 2]));
        }
    }
}

// Among four neighbouring lanes: byte j of lane t becomes byte t of lane j.
__device__ __forceinline__ uint32_t transpose_bytes(uint32_t word, int t) {
    uint32_t other = __shfl_xor_sync(ALL_LANES, word, 1);
    word = __byte_perm(word, other, t & 1 ? 0x3715 : 0x6240);
    other = __shfl_xor_sync(ALL_LANES, word, 2);
    return __byte_perm(word, other, t & 2 ? 0x3276 : 0x5410);
}

// Packed: a warp takes 32 rows x 64 cols, an absmax a lane. Lanes exchange codes so that each stores 8 neighbours and
// the four lanes of a row 64 bytes (128 as float) in one instruction. The warps of a block stand side by side.
template <class X, bool VECTORS, int WARPS>
__global__ void __launch_bounds__(32 * WARPS) nf4_dequantize_kernel(X* out, size_t ldo, Matrix w) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const unsigned across = unsigned(w.cols) / 64, segments = (across + WARPS - 1) / WARPS;
    const unsigned row = blockIdx.x / segments * 32, col = blockIdx.x % segments * WARPS + threadIdx.x / 32;
    if (col >= across) {
        return;
    }
    const uint4* codes = reinterpret_cast<const uint4*>(w.codes) + (size_t(row / 16) * across + col) * 32 + lane;
    const uint4 code[2] = {codes[0], codes[size_t(across) * 32]};
    const size_t mine = row + unsigned(lane);
    const float absmax = nf4_absmax_at(w, size_t(col) * unsigned(w.rows) + mine, mine * across + col);
    const float table = nf4_table(lane);
    X* first = out + (row + 2 * unsigned(g)) * ldo + size_t(col) * 64 + 8 * t;
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const float scale = __shfl_sync(ALL_LANES, absmax, 16 * i + 2 * g + odd);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t left = half ? code[i].z : code[i].x, right = half ? code[i].w : code[i].y;
                const uint32_t run = transpose_bytes(__byte_perm(left, right, odd ? 0x7531 : 0x6420), t);
                uint32_t pair[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    pair[j] = nf4_pair(table, run >> 8 * j, run >> (8 * j + 4), scale, scale);
                }
                store_pairs<VECTORS>(first + size_t(16 * i + odd) * ldo + 32 * half, pair);
            }
        }
    }
}

// x (E) = the weights from number i on, in bitsandbytes' order; E > 1: i is a multiple of E, codes of E / 2 bytes. All
// lanes of a warp call it together.
template <int E>
__device__ __forceinline__ void nf4_run(float (&x)[E], const Matrix& w, float table, size_t i) {
    const float absmax = nf4_absmax_at(w, i / 64, i / 64);
    uint32_t word = 0;  // the code of element j in nibble j ^ 1
    if constexpr (E == 8) {
        word = *reinterpret_cast<const uint32_t*>(w.codes + i / 2);
    } else if constexpr (E == 4) {
        word = *reinterpret_cast<const uint16_t*>(w.codes + i / 2);
    } else {
        word = i % 2 ? uint32_t(w.codes[i / 2]) << 4 : w.codes[i / 2];
    }
#pragma unroll
    for (int j = 0; j < E; j++) {
        x[j] = widen(narrow<bf16>(__fmul_rn(nf4_look_up(table, word >> (4 * (j ^ 1))), absmax)));
    }
}

// NF4 in bitsandbytes' order, any shape. Threads behind the end of a row decode its last weights again, since look-ups
// need whole warps, and store nothing.
template <class X, int E, int U>
__global__ void nf4_dequantize_flat_kernel(X* out, size_t ldo, Matrix w, int parts) {
    const RowPlace at = row_place<U>(parts);
    const float table = nf4_table(threadIdx.x % 32);
    const int last = w.cols - E;
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        float x[E];
        nf4_run(x, w, table, at.row * unsigned(w.cols) + unsigned(i < last ? i : last));
        if (i <= last) {
            store(out + at.row * ldo + i, x);
        }
    }
}

template <class X, class S, int E, int U>
__global__ void matrix_copy_kernel(X* out, size_t ldo, const S* in, int parts, int cols) {
    const RowPlace at = row_place<U>(parts);
    float x[U][E];
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < cols) {
            load(x[j], in + at.row * unsigned(cols) + i);
        }
    }
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < cols) {
            store(out + at.row * ldo + i, x[j]);
        }
    }
}

// ----------------------------------------------------------------------------
// kernel launchers

// What a chunk needs: its weights and absmax; what packing needs: a copy of the codes.
template <class X>
size_t nf4_load_workspace(const Gpu<X>&, size_t elements, size_t chunk) {
    Workspace quantise, pack;
    workspace_take<float>(quantise, chunk < elements ? chunk : elements);
    workspace_take<float>(quantise, ceil_div(chunk < elements ? chunk : elements, 64));
    workspace_take<uint8_t>(pack, ceil_div(elements, 2));
    return quantise.used > pack.used ? quantise.used : pack.used;
}

template <class X>
void nf4_quantize(Gpu<X>& dev, uint8_t* codes, float* absmax, const float* w, size_t n) {
    if (n == 0) {
        return;
    }
    constexpr int WARPS = 8;
    const size_t blocks = ceil_div(n, 64);
    Workspace space = workspace_of(dev);
    float* weights = workspace_take<float>(space, n);
    float* greatest = workspace_take<float>(space, blocks);
    device_to(dev, weights, w, n * sizeof(float));
    LAUNCH((nf4_quantize_kernel<WARPS>), unsigned(ceil_div(n, 256 * WARPS)), 32 * WARPS, 0, dev.stream, codes, greatest,
           weights, n);
    device_from(dev, absmax, greatest, blocks * sizeof(float));
}

// in (rows, cols) becomes (cols, rows).
template <class T, class X>
void nf4_transpose(Gpu<X>& dev, const T* in, size_t rows, size_t cols) {
    constexpr int THREADS = 256;
    Workspace space = workspace_of(dev);
    T* out = workspace_take<T>(space, rows * cols);
    LAUNCH((nf4_transpose_kernel<T, THREADS>), unsigned(ceil_div(rows * cols, THREADS)), THREADS, 0, dev.stream, out,
           in, rows, cols);
    CUDA_CHECK(cudaMemcpyAsync(const_cast<T*>(in), out, rows * cols * sizeof(T), cudaMemcpyDeviceToDevice, dev.stream));
}

template <class X>
void nf4_pack(Gpu<X>& dev, Matrix& w) {
    if (w.store != Store::NF4 || w.packed || !nf4_packs(dev, w)) {
        return;
    }
    constexpr int THREADS = 256;
    const size_t rows = size_t(w.rows), cols = size_t(w.cols), words = rows * cols / 8;
    Workspace space = workspace_of(dev);
    uint32_t* packed = workspace_take<uint32_t>(space, words);
    LAUNCH((nf4_pack_kernel<THREADS>), unsigned(ceil_div(words, THREADS)), THREADS, 0, dev.stream, packed, w.codes,
           rows, cols);
    CUDA_CHECK(cudaMemcpyAsync(const_cast<uint8_t*>(w.codes), packed, words * 4, cudaMemcpyDeviceToDevice, dev.stream));
    if (w.absmax32) {
        nf4_transpose(dev, w.absmax32, rows, cols / 64);
    } else {
        nf4_transpose(dev, w.absmax8, rows, cols / 64);
    }
    w.packed = true;
}

template <bool VECTORS, class X>
void nf4_dequantize(CUstream_st* stream, X* out, size_t ldo, const Matrix& w) {
    constexpr int WARPS = 8;
    const size_t blocks = ceil_div(size_t(w.cols) / 64, WARPS) * (size_t(w.rows) / 32);
    LAUNCH((nf4_dequantize_kernel<X, VECTORS, WARPS>), unsigned(blocks), 32 * WARPS, 0, stream, out, ldo, w);
}

template <int E, class X>
void nf4_dequantize_flat(CUstream_st* stream, X* out, size_t ldo, const Matrix& w) {
    constexpr int U = 4;
    const RowGrid g = row_grid(size_t(w.rows), size_t(w.cols) / E, U);
    LAUNCH((nf4_dequantize_flat_kernel<X, E, U>), g.blocks, g.threads, 0, stream, out, ldo, w, g.parts);
}

template <int E, class S, class X>
void matrix_copy(CUstream_st* stream, X* out, size_t ldo, const S* in, const Matrix& w) {
    constexpr int U = 4;
    const RowGrid g = row_grid(size_t(w.rows), size_t(w.cols) / E, U);
    LAUNCH((matrix_copy_kernel<X, S, E, U>), g.blocks, g.threads, 0, stream, out, ldo, in, g.parts, w.cols);
}

template <class S, class X>
void matrix_copy(CUstream_st* stream, X* out, size_t ldo, const Matrix& w) {
    constexpr int E = VECTOR<X>;
    const S* in = static_cast<const S*>(w.data);
    if (vectors_fit(E, out, ldo) && vectors_fit(E, in, size_t(w.cols))) {
        matrix_copy<E>(stream, out, ldo, in, w);
    } else {
        matrix_copy<1>(stream, out, ldo, in, w);
    }
}

template <class X>
void matrix_to_scratch(Gpu<X>&, CUstream_st* stream, X* out, size_t ldo, const Matrix& w) {
    constexpr int E = VECTOR<X>;
    const bool vectors = vectors_fit(E, out, ldo);
    switch (w.store) {
        case Store::BF16: matrix_copy<bf16>(stream, out, ldo, w); return;
        case Store::F16: matrix_copy<fp16>(stream, out, ldo, w); return;
        case Store::F32: matrix_copy<float>(stream, out, ldo, w); return;
        case Store::NF4: break;
    }
    if (w.packed && vectors) {
        nf4_dequantize<true>(stream, out, ldo, w);
    } else if (w.packed) {
        nf4_dequantize<false>(stream, out, ldo, w);
    } else if (vectors && w.cols % E == 0 && reinterpret_cast<uintptr_t>(w.codes) % 4 == 0) {
        nf4_dequantize_flat<E>(stream, out, ldo, w);
    } else {
        nf4_dequantize_flat<1>(stream, out, ldo, w);
    }
}
