// An NF4 matrix written out as bf16 or float, what the dequantise + cuBLASLt path does before each product.
//
//   1  bitsandbytes' order, a thread two weights, its own look-up in a table in memory
//   2  bitsandbytes' order, 16 bytes of output a thread, look-ups by shuffle (kernels/nf4.cuh, what does not pack)
//   3* kernels/nf4.cuh: packed, a warp 32 x 64, an absmax a lane, codes exchanged among four lanes
//   c1  plain loops, a weight at a time
//   c2* kernels/cpu/nf4.h
#include "dev/nf4_matrix.h"
#include "kernels/nf4.cuh"

enum { OUT = NF4_ARRAYS, TABLE };

static std::vector<Array> arrays(const Shape& s) {
    std::vector<Array> a = nf4_arrays(s);
    a.push_back({"out", Kind::STORE, Role::OUT, s["OC"] * s["C"]});
    a.push_back({"table", Kind::F32, Role::IN, 16, [](size_t i) { return double(NF4_CODE[i]); }});
    return a;
}

static void evaluate(const Shape& s, Values& v, const Precision&) {
    for (size_t i = 0; i < s["OC"] * s["C"]; i++) {
        v[OUT][i] = nf4_weight(v, i);
    }
}

static Cost cost(const Shape& s, size_t store_bytes) {
    return {nf4_bytes(s) + double(s["OC"] * s["C"] * store_bytes), 0};
}

// ----------------------------------------------------------------------------
// CUDA kernels

template <class X>
__global__ void nf4_dequantize_kernel1(X* out, Matrix w, const float* table, size_t n) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 2;
    if (i >= n) {
        return;
    }
    const int byte = w.codes[i / 2];
    const float absmax = nf4_absmax_at(w, i / 64, i / 64);
    out[i] = narrow<X>(widen(narrow<bf16>(__fmul_rn(table[byte >> 4], absmax))));
    if (i + 1 < n) {
        out[i + 1] = narrow<X>(widen(narrow<bf16>(__fmul_rn(table[byte & 15], absmax))));
    }
}

// ----------------------------------------------------------------------------
// versions

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    const size_t n = r["OC"] * r["C"];
    LAUNCH((nf4_dequantize_kernel1<X>), unsigned(ceil_div(n, 512)), 256, 0, dev.stream, r.get<X>(OUT), nf4_matrix(r),
           r.get<float>(TABLE), n);
}

template <class X>
static void version2(Gpu<X>& dev, Run& r) {
    matrix_to_scratch(dev, dev.stream, r.get<X>(OUT), r["C"], nf4_matrix(r));
}

static bool packs(const Shape& s) {
    return s["OC"] % 64 == 0 && s["C"] % 64 == 0;
}

template <class X>
static void version3(Gpu<X>& dev, Run& r) {
    Matrix w = nf4_packed_matrix(r);
    w.packed = true;
    matrix_to_scratch(dev, dev.stream, r.get<X>(OUT), r["C"], w);
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const Matrix w = nf4_matrix(r);
    parallel_ranges(dev.threads, w.elements(), 4096, [&](size_t begin, size_t end, int) {
        for (size_t i = begin; i < end; i++) {
            const int code = i % 2 ? w.codes[i / 2] & 15 : w.codes[i / 2] >> 4;
            r.get<float>(OUT)[i] = to_float(to_bf16(NF4_CODE[code] * nf4_absmax(w, i / 64)));
        }
    });
}

static void on_cpu2(Cpu<float>& dev, Run& r) {
    const Matrix w = nf4_matrix(r);
    parallel_ranges(dev.threads, size_t(w.rows), 1, [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            matrix_row(dev, r.get<float>(OUT) + row * size_t(w.cols), w, row);
        }
    });
}

int main(int argc, char** argv) {
    Op op = {"nf4_dequantize", "NF4 matrix (OC, C) to bf16 or float"};
    op.shapes = {{{"OC", 4096}, {"C", 4096}}, {{"OC", 28672}, {"C", 4096}}, {{"OC", 4096}, {"C", 14336}}};
    op.cpu_shapes = {{{"OC", 2048}, {"C", 2048}}, {{"OC", 8192}, {"C", 2048}}};
    op.awkward = {{{"OC", 64}, {"C", 64}},
                  {{"OC", 128}, {"C", 192}},
                  {{"OC", 64}, {"C", 576}},
                  {{"OC", 20}, {"C", 144}},
                  {{"OC", 3}, {"C", 7}}};
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.versions = {
        gpu_version(1, "two weights a thread, table in memory", version1<bf16>, version1<float>),
        gpu_version(2, "bitsandbytes' order, 16 bytes a thread", version2<bf16>, version2<float>),
        gpu_production(3, "packed, a warp 32 x 64", version3<bf16>, version3<float>, packs),
        cpu_version(1, "plain loops", on_cpu1),
        cpu_production(2, "leaf of the instruction tier", on_cpu2),
    };
    op.prepare_bf16 = nf4_prepare<bf16>;
    op.prepare_float = nf4_prepare<float>;
    return harness(op, argc, argv);
}
