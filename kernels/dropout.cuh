// Inverted dropout of rows: the input of A, and on the way back the part of the input's gradient that comes through A.
//
//   out = or += x mask / (1 - p);  channel c of a row is kept when word c % 4 of
//   philox4x32({example, position, module, c / 4}, key of seed and step) is at least p 2^32
//
// so that the mask is that of the CPU (kernels/cpu/gemm.h) whatever the pass, the thread or the device. Bytes an
// element in bf16, each read and written once: 4, added: 6 (beside table k, which has no dropout). Ten rounds of philox
// for 4 elements are 15 integer instructions an element.
#pragma once
#include "kernels/gpu.h"
#include "kernels/random.h"
#include "kernels/vector.cuh"

struct DropoutKey {
    uint32_t key[2], module, threshold;
    float scale;
    const uint32_t* example;
    const int32_t* position;
};

inline DropoutKey dropout_key(const Dropout& drop, uint32_t module) {
    uint64_t mixed = drop.seed * 0x9e3779b97f4a7c15u + drop.step;
    mixed = (mixed ^ (mixed >> 32)) * 0xd6e8feb86659fd93u;
    return {{uint32_t(mixed), uint32_t(mixed >> 32)},
            module,
            uint32_t(double(drop.p) * 4294967296.0),
            1 / (1 - drop.p),
            drop.example,
            drop.position};
}

// ----------------------------------------------------------------------------
// CUDA kernels

// A thread takes E channels, a multiple of 4; VECTORS: with 16-byte accesses, else one by one, up to C.
template <class X, bool VECTORS, int E, int U>
__global__ void dropout_kernel(X* out, size_t out_stride, const X* in, size_t in_stride, DropoutKey drop, int parts,
                               int C, bool add) {
    const RowPlace at = row_place<U>(parts);
    const X* from = in + at.row * in_stride;
    X* to = out + at.row * out_stride;
    const uint32_t example = drop.example[at.row], position = uint32_t(drop.position[at.row]);
    float x[U][E], old[U][E];
    const auto read = [&](float(&values)[E], const X* row, int i) {
        if constexpr (VECTORS) {
            load(values, row + i);
        } else {
#pragma unroll
            for (int k = 0; k < E; k++) {
                values[k] = i + k < C ? widen(row[i + k]) : 0;
            }
        }
    };
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < C) {
            read(x[j], from, i);
#pragma unroll
            for (int k = 0; k < E; k++) {
                old[j][k] = 0;
            }
            if (add) {
                read(old[j], to, i);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < U; j++) {
        const int i = (at.first + j * at.step) * E;
        if (i < C) {
#pragma unroll
            for (int k = 0; k < E; k += 4) {
                const uint32_t counter[4] = {example, position, drop.module, uint32_t(i + k) / 4};
                uint32_t words[4];
                philox4x32(words, counter, drop.key);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    float& value = x[j][k + c];
                    value = words[c] >= drop.threshold ? fmaf(value, drop.scale, old[j][k + c]) : old[j][k + c];
                }
            }
            if constexpr (VECTORS) {
                store(to + i, x[j]);
            } else {
#pragma unroll
                for (int k = 0; k < E; k++) {
                    if (i + k < C) {
                        to[i + k] = narrow<X>(x[j][k]);
                    }
                }
            }
        }
    }
}

// ----------------------------------------------------------------------------
// kernel launchers

// out (N, C) = or (add) += the rows of in (N, C) under dropout, of example[row] and position[row]. out may be in.
template <class X>
void dropout_rows(Gpu<X>& dev, X* out, size_t out_stride, const X* in, size_t in_stride, const Dropout& drop,
                  uint32_t module, size_t N, int C, bool add) {
    constexpr int E = VECTOR<X>, U = 2;
    if (N == 0) {
        return;
    }
    const DropoutKey d = dropout_key(drop, module);
    if (C % E == 0 && vectors_fit(E, out, out_stride) && vectors_fit(E, in, in_stride)) {
        const RowGrid g = row_grid(N, size_t(C) / E, U);
        LAUNCH((dropout_kernel<X, true, E, U>), g.blocks, g.threads, 0, dev.stream, out, out_stride, in, in_stride, d,
               g.parts, C, add);
    } else {
        const RowGrid g = row_grid(N, ceil_div(size_t(C), 4), U);
        LAUNCH((dropout_kernel<X, false, 4, U>), g.blocks, g.threads, 0, dev.stream, out, out_stride, in, in_stride, d,
               g.parts, C, add);
    }
}
