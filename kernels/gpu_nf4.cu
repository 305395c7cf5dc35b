// The GPU's NF4: quantising, packing, dequantising, and the products that dequantise as they go.
#include "kernels/nf4_matmul.cuh"

bool nf4_matmul_takes(const Nf4Group& g, int R) {
    if (g.parts < 1 || g.parts > 3 || R < 0 || R % 16 != 0) {
        return false;
    }
    int rows = 0;
    for (int i = 0; i < g.parts; i++) {
        const Matrix& w = *g.w[i];
        if (w.store != Store::NF4 || !w.packed || w.cols != g.cols) {
            return false;
        }
        rows += w.rows;
    }
    return rows == g.rows;
}

void nf4_matmul_forward(Gpu<bf16>& dev, bf16* y, size_t ldy, const bf16* x, size_t ldx, size_t M, const Nf4Group& g,
                        const bf16* lora_b, int R, const bf16* residual, size_t ldr, Nf4Tile tile) {
    nf4_matmul<false>(dev, {{}, 0, 0, 0, 0, y, ldy, x, ldx, 0, lora_b, R, residual, ldr}, M, g, tile);
}

void nf4_matmul_backward(Gpu<bf16>& dev, bf16* dx, size_t lddx, const bf16* dy, size_t lddy, size_t M,
                         const Nf4Group& g, const bf16* lora_a, int R, Nf4Tile tile) {
    nf4_matmul<true>(dev, {{}, 0, 0, 0, 0, dx, lddx, dy, lddy, 0, lora_a, R, nullptr, 0}, M, g, tile);
}

#define INSTANTIATE(X)                                                           \
    template void nf4_quantize(Gpu<X>&, uint8_t*, float*, const float*, size_t); \
    template void nf4_pack(Gpu<X>&, Matrix&);                                    \
    template size_t nf4_load_workspace(const Gpu<X>&, size_t, size_t);           \
    template void matrix_to_scratch(Gpu<X>&, CUstream_st*, X*, size_t, const Matrix&);
INSTANTIATE(bf16)
INSTANTIATE(float)
