// What llama.h and the kernels hand to each other: frozen matrices, the input of a linear group, its adapters, its
// epilogue, dropout. Plain structs with pointers to device memory; no ownership, no arithmetic, no device code.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/bf16.h"

enum class Store : uint8_t { NF4, BF16, F16, F32 };

// A frozen matrix (rows = output channels, cols = input channels), row-major.
// NF4, as bitsandbytes lays it out (QLoRA, Dettmers et al. 2023): blocks of 64 weights over the flattened tensor, which
// may straddle rows;
//   byte j      | weight 2j: high nibble | weight 2j + 1: low nibble |
//   weight i =  round_to_bf16(code[nibble i] * absmax[i / 64])
//   absmax b =  absmax32[b], or double-quantised:  fl(map8[absmax8[b]] * absmax2[b / 256]) + offset
struct Matrix {
    Store store = Store::F32;
    int rows = 0, cols = 0;
    const void* data = nullptr;        // BF16, F16, F32: the elements
    const uint8_t* codes = nullptr;    // NF4: ceil(rows * cols / 2) bytes
    const float* absmax32 = nullptr;   // NF4 without double quantisation; else nullptr
    const uint8_t* absmax8 = nullptr;  // NF4 with it: one a block of 64
    const float* absmax2 = nullptr;    // one for 256 blocks
    const float* map8 = nullptr;       // 256 entries
    float offset = 0;
    bool packed = false;  // NF4 on a GPU: codes and absmax in the order of nf4_matmul.cuh

    size_t elements() const { return size_t(rows) * cols; }
    size_t blocks() const { return (elements() + 63) / 64; }
};

// Inverted dropout on the input of A, drawn from (seed, step, example, position, module, channel) alone: the same mask
// however a step is split into passes, threads or ranks. p = 0: none.
struct Dropout {
    float p = 0;
    uint64_t seed = 0;
    uint32_t step = 0;
    const uint32_t* example = nullptr;  // (N) of each row
    const int32_t* position = nullptr;  // (N)
};

// One linear of a group with its adapter: y = W x + scale * B (A drop(x)). r = 0: no adapter, a hole in the group.
// Real: float, or double on Cpu<double>.
template <class Real>
struct LinearPart {
    Matrix w;
    int r = 0;
    Real scale = 0;
    const Real* A = nullptr;  // (r, C)
    const Real* B = nullptr;  // (OC of the part, r)
    Real* dA = nullptr;       // accumulated into, as dB
    Real* dB = nullptr;
    uint32_t module = 0;  // number of the adapter in the model, for dropout
};

// Linears that share their input: q, k, v; o; gate, up; down. Their outputs stand side by side in one row of OC
// channels, their A products side by side in one row of R.
template <class Real>
struct LinearGroup {
    int parts = 0;
    LinearPart<Real> part[3];
    int C = 0, OC = 0, R = 0;
};

// The (N, C) input of a group, as it can be made while it is packed.
//   PLAIN    x (N, C)
//   RMSNORM  x * rstd * norm_w, x (N, C)
//   SWIGLU   silu(x[:, :C]) * x[:, C:], x (N, 2C)
template <class X, class Real>
struct LinearInput {
    enum Kind { PLAIN, RMSNORM, SWIGLU } kind = PLAIN;
    const X* x = nullptr;
    size_t stride = 0;             // elements from row to row
    const Real* rstd = nullptr;    // (N)
    const Real* norm_w = nullptr;  // (C)
};

// Rotation of the first `heads` heads of an output row, in place, HF's half-split form: pair (i, i + HS/2) by the angle
// positions[row] * inv_freq[i].
template <class Real>
struct Rope {
    const Real* cos = nullptr;  // (max positions, HS / 2)
    const Real* sin = nullptr;
    const int32_t* positions = nullptr;  // (N)
    int heads = 0, HS = 0;
};

// The documents of a pass: rows cu_seqlens[d] .. cu_seqlens[d + 1]. Made by documents_place, once a pass.
struct Documents {
    const int32_t* cu_seqlens = nullptr;  // (count + 1)
    int count = 0;
    const int32_t* tiles[3] = {};  // GPU: what each block of attention's forward, dQ and dK/dV kernels works on
    int tile_count[3] = {};
};
