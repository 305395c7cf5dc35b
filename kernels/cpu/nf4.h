// NF4 on the host (QLoRA, Dettmers et al. 2023; the byte layout is bitsandbytes'): quantising, double quantisation, and
// reading a frozen Matrix of any store as the matmul sees it. Weights are never dequantised as a whole; gemm.h asks for
// runs of them.
//
//   code i   = number of thresholds below w * (1 / absmax), two a byte, the earlier in the high nibble
//   weight i = round_to_bf16(NF4_CODE[code i] * absmax[i / 64])
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/device.h"
#include "kernels/types.h"

// codes ((n + 1) / 2), absmax ((n + 63) / 64) of n finite weights that begin at a block border. A block of zeros gets
// code 7 and absmax 0, so does a pad weight behind an odd n.
void nf4_quantize(uint8_t* codes, float* absmax, const float* w, size_t n, int threads);

// The same for a part of a matrix in device memory: here that is the host's. Codes stay in bitsandbytes' order, so there
// is nothing to pack and no workspace.
template <class X>
void nf4_quantize(Cpu<X>& dev, uint8_t* codes, float* absmax, const float* w, size_t n) {
    nf4_quantize(codes, absmax, w, n, dev.threads);
}
template <class X>
bool nf4_packs(const Cpu<X>&, const Matrix&) {
    return false;
}
template <class X>
void nf4_pack(Cpu<X>&, Matrix&) {}
template <class X>
size_t nf4_load_workspace(const Cpu<X>&, size_t, size_t) {
    return 0;
}

// The 8-bit map of double quantisation, ascending, -0.9929.. to 1 with 0 at 127: computed in fp32 step by step, as
// bitsandbytes does.
void nf4_map8(float map[256]);

// absmax8 (blocks), absmax2 ((blocks + 255) / 256): absmax - offset over its greatest magnitude in 256, the nearest map
// entry, the lower at a tie. offset = sum / blocks in double, rounded once.
void nf4_double_quantize(uint8_t* absmax8, float* absmax2, float* offset, const float* absmax, size_t blocks);

// The absmax of a block of 64 weights; product and sum are rounded apart.
inline float nf4_absmax(const Matrix& m, size_t block) {
    if (m.absmax32) {
        return m.absmax32[block];
    }
    float product = m.map8[m.absmax8[block]] * m.absmax2[block / 256];
    return product + m.offset;
}

// The absmax first .. first + n, where they stand or in `room` (n).
template <class X>
const float* nf4_absmax_run(const Cpu<X>& dev, float* room, const Matrix& m, size_t first, size_t n) {
    if (m.absmax32) {
        return m.absmax32 + first;
    }
    dev.isa->nf4_absmax(room, m.absmax8, m.absmax2, m.map8, m.offset, first, n);
    return room;
}

// out (n): elements first .. first + n of the flattened matrix.
template <class X>
void matrix_run(const Cpu<X>& dev, float* out, const Matrix& m, size_t first, size_t n) {
    switch (m.store) {
        case Store::F32: memcpy(out, static_cast<const float*>(m.data) + first, n * sizeof(float)); break;
        case Store::BF16: dev.isa->rows.of_bf16.widen(out, static_cast<const bf16*>(m.data) + first, n); break;
        case Store::F16: dev.isa->widen_f16(out, static_cast<const uint16_t*>(m.data) + first, n); break;
        case Store::NF4:
            while (n > 0) {
                constexpr size_t BLOCKS = 16;
                float room[BLOCKS];
                size_t block = first / 64, part = (block + BLOCKS) * 64 - first;
                part = part < n ? part : n;
                const size_t blocks = (first + part + 63) / 64 - block;
                dev.isa->nf4_run(out, m.codes, nf4_absmax_run(dev, room, m, block, blocks), first, part);
                out += part;
                first += part;
                n -= part;
            }
            break;
    }
}

inline void matrix_run(const Cpu<double>& dev, double* out, const Matrix& m, size_t first, size_t n) {
    Cpu<float> single;
    single.isa = dev.isa;
    while (n > 0) {
        float run[256];
        size_t part = n < 256 ? n : 256;
        matrix_run(single, run, m, first, part);
        for (size_t i = 0; i < part; i++) {
            out[i] = run[i];
        }
        out += part;
        first += part;
        n -= part;
    }
}

// out (cols) = one row.
template <class X>
void matrix_row(const Cpu<X>& dev, X* out, const Matrix& m, size_t row) {
    matrix_run(dev, out, m, row * size_t(m.cols), size_t(m.cols));
}
