// What the kernels that stream memory share: rows read and written 16 bytes a thread, and how rows are dealt to blocks.
// It owns no op.
//
// A row is cut into pieces of E elements: 16 bytes of X, so that E is 8 (bf16) or 4 (float); E = 1 where a width, a
// stride or a pointer does not allow that. Arithmetic is on floats whatever X is. A product and a sum are fused
// where fmaf is written, and elsewhere a sum has no product as its operand, or an intrinsic (__fmul_rn) that the compiler
// leaves alone, so that nvcc and the stand-in round alike. Behind expf nvcc fuses as it likes: an ulp, the same every run.
#pragma once
#include <type_traits>

#include "kernels/cuda.cuh"

template <class X>
constexpr int VECTOR = int(16 / sizeof(X));  // elements of a piece

// IEEE half precision, read only: as some checkpoints store their weights.
struct fp16 {
    uint16_t bits;
};

// The exponent is moved by a product, which makes subnormals normal; infinity and NaN keep theirs.
__device__ __forceinline__ float widen(fp16 x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
    const float finite = __uint_as_float(magnitude) * 0x1p112f;
    return __uint_as_float(sign | ((x.bits & 0x7c00) == 0x7c00 ? 0x7f800000 | magnitude : __float_as_uint(finite)));
}

// ----------------------------------------------------------------------------
// pieces. STREAM: the memory is not wanted in the caches afterwards. Loads that a kernel wants under way together stand
// before its first store, since the compiler must take the two for the same memory.

template <bool STREAM, class V>
__device__ __forceinline__ V vector_get(const void* p) {
    return STREAM ? __ldcs(static_cast<const V*>(p)) : *static_cast<const V*>(p);
}
template <bool STREAM, class V>
__device__ __forceinline__ void vector_put(void* p, V value) {
    if (STREAM) {
        __stcs(static_cast<V*>(p), value);
    } else {
        *static_cast<V*>(p) = value;
    }
}

template <class S>
__device__ __forceinline__ void widen_pair(float* out, uint32_t pair) {
    if constexpr (std::is_same<S, bf16>::value) {
        out[0] = bf16_low(pair);
        out[1] = bf16_high(pair);
    } else {
        out[0] = widen(S{uint16_t(pair)});
        out[1] = widen(S{uint16_t(pair >> 16)});
    }
}

// out (E) = p[0] .. p[E - 1]; p is aligned to E elements or 16 bytes, whichever is less.
template <bool STREAM = false, int E, class S>
__device__ __forceinline__ void load(float (&out)[E], const S* p) {
    if constexpr (E == 1) {
        out[0] = widen(*p);
    } else if constexpr (std::is_same<S, float>::value) {
        static_assert(E % 4 == 0, "float4");
#pragma unroll
        for (int i = 0; i < E; i += 4) {
            const float4 q = vector_get<STREAM, float4>(p + i);
            out[i] = q.x;
            out[i + 1] = q.y;
            out[i + 2] = q.z;
            out[i + 3] = q.w;
        }
    } else if constexpr (E == 4) {
        const uint2 q = vector_get<STREAM, uint2>(p);
        widen_pair<S>(out, q.x);
        widen_pair<S>(out + 2, q.y);
    } else {
        static_assert(E == 8, "uint4");
        const uint4 q = vector_get<STREAM, uint4>(p);
        widen_pair<S>(out, q.x);
        widen_pair<S>(out + 2, q.y);
        widen_pair<S>(out + 4, q.z);
        widen_pair<S>(out + 6, q.w);
    }
}

// p[0] .. p[E - 1] = x (E), rounded to X.
template <bool STREAM = false, int E, class X>
__device__ __forceinline__ void store(X* p, const float (&x)[E]) {
    if constexpr (E == 1) {
        *p = narrow<X>(x[0]);
    } else if constexpr (std::is_same<X, float>::value) {
#pragma unroll
        for (int i = 0; i < E; i += 4) {
            vector_put<STREAM>(p + i, make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
        }
    } else if constexpr (E == 4) {
        vector_put<STREAM>(p, make_uint2(pack_bf16x2(x[0], x[1]), pack_bf16x2(x[2], x[3])));
    } else {
        vector_put<STREAM>(p, make_uint4(pack_bf16x2(x[0], x[1]), pack_bf16x2(x[2], x[3]), pack_bf16x2(x[4], x[5]),
                                         pack_bf16x2(x[6], x[7])));
    }
}

// Whether E elements may be loaded at p and at every further `stride` elements.
template <class T>
bool vectors_fit(int E, const T* p, size_t stride) {
    const size_t bytes = size_t(E) * sizeof(T) < 16 ? size_t(E) * sizeof(T) : 16;
    return reinterpret_cast<uintptr_t>(p) % bytes == 0 && stride % size_t(E) == 0;
}

// ----------------------------------------------------------------------------
// rows whose elements are independent: each thread has U pieces under way; blocks of 32 to 256 threads, as many to a
// row as that takes

struct RowGrid {
    unsigned blocks, threads;
    int parts;  // blocks of a row
};

inline RowGrid row_grid(size_t N, size_t pieces, int U) {
    size_t threads = ceil_div(pieces, size_t(U) * 32) * 32;
    threads = threads < 256 ? threads : 256;
    const size_t parts = ceil_div(pieces, threads * size_t(U));
    return {unsigned(N * parts), unsigned(threads), int(parts)};
}

// The thread's pieces are first, first + step, .. U of them, where those stand inside the row.
struct RowPlace {
    size_t row;
    int first, step;
};

template <int U>
__device__ __forceinline__ RowPlace row_place(int parts) {
    const unsigned row = blockIdx.x / unsigned(parts), part = blockIdx.x % unsigned(parts);
    return {row, int(part * U * blockDim.x + threadIdx.x), int(blockDim.x)};
}

// ----------------------------------------------------------------------------
// rows that are reduced: each thread has U pieces under way; a warp for a row of up to 32 U pieces, else a block, of up
// to 512 threads

struct RowTeams {
    dim3 block;       // x: threads of a row, y: rows
    unsigned blocks;  // for all rows
};

inline RowTeams row_teams(size_t N, size_t pieces, int U) {
    size_t threads = ceil_div(pieces, size_t(U) * 32) * 32;
    threads = threads < 512 ? threads : 512;
    const size_t rows = threads == 32 ? 4 : 1;
    return {dim3(unsigned(threads), unsigned(rows)), unsigned(ceil_div(N, rows))};
}

// The sum over the threads of a row, in each of them. sums (16) is shared and used once in a kernel.
__device__ __forceinline__ float team_sum(float x, float* sums) {
    x = warp_sum(x);
    if (blockDim.x > 32) {
        if (threadIdx.x % 32 == 0) {
            sums[threadIdx.x / 32] = x;
        }
        __syncthreads();
        x = 0;
        for (unsigned w = 0; w < blockDim.x / 32; w++) {
            x += sums[w];
        }
    }
    return x;
}
