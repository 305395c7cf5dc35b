// What linear groups and the classifier call of the NF4 files (kernels/nf4.cuh, kernels/nf4_matmul.cuh), which are
// compiled into an object of their own: declarations only.
#pragma once
#include "kernels/gpu.h"

// out (rows, cols), rows ldo apart, = the matrix as the matmul sees it, any store. NF4: round_to_bf16(code * absmax),
// then widened when X is float; packed or in bitsandbytes' order. 16-byte stores where out, ldo and cols allow them.
template <class X>
void matrix_to_scratch(Gpu<X>& dev, CUstream_st* stream, X* out, size_t ldo, const Matrix& w);

// Packed NF4 matrices that share their input, one below the other: rows = sum of the parts' rows.
struct Nf4Group {
    int parts;
    const Matrix* w[3];
    int rows;
    int cols;
};

// Whether the products below serve the group with R columns of adapters: all parts packed (so rows and cols are
// multiples of 64), R a multiple of 16, 0 for none.
bool nf4_matmul_takes(const Nf4Group& g, int R);

// Shapes of tiles, output channels x tokens. BY_SHAPE is the table in nf4_matmul.cuh; tests and measurements name one.
enum class Nf4Tile : uint8_t { BY_SHAPE, T64x16, T64x32, T64x64, T128x128, T256x128 };

// y (M, rows) = x[:, :cols + R] [W | B]^T [+ residual], summed in fp32 and rounded once. lora_b (rows, R); residual
// (M, rows), rows ldr apart, may be nullptr or y itself. Pointers are 16-byte aligned, ldy, ldx, ldr multiples of 8.
void nf4_matmul_forward(Gpu<bf16>& dev, bf16* y, size_t ldy, const bf16* x, size_t ldx, size_t M, const Nf4Group& g,
                        const bf16* lora_b, int R, const bf16* residual, size_t ldr, Nf4Tile tile = Nf4Tile::BY_SHAPE);
// dx (M, cols) = dy[:, :rows + R] [W ; A], lora_a (R, cols); otherwise as above.
void nf4_matmul_backward(Gpu<bf16>& dev, bf16* dx, size_t lddx, const bf16* dy, size_t lddy, size_t M,
                         const Nf4Group& g, const bf16* lora_a, int R, Nf4Tile tile = Nf4Tile::BY_SHAPE);
