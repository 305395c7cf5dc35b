// Rows of the embedding table to the activations.
//
//   1  a thread an element
//   2  a block a row, an element a thread at a time
//   3* kernels/embedding.cuh: 16 bytes a thread, four pieces in flight
//   c1  plain loops
//   c2* kernels/cpu/elementwise.h
#include "dev/harness.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/parallel.h"
#include "kernels/embedding.cuh"

enum { OUT, TOKENS, WTE };

static std::vector<Array> arrays(const Shape& s) {
    const size_t V = s["V"];
    return {
        {"out", Kind::STORE, Role::OUT, s["N"] * s["C"]},
        {"tokens", Kind::I32, Role::IN, s["N"], [=](size_t i) { return double(i * 2654435761u % V); }},
        {"wte", Kind::STORE, Role::IN, V * s["C"], uniform(1, -1, 1)},
    };
}

static void evaluate(const Shape& s, Values& v, const Precision&) {
    for (size_t i = 0; i < s["N"] * s["C"]; i++) {
        v[OUT][i] = v[WTE][size_t(v[TOKENS][i / s["C"]]) * s["C"] + i % s["C"]];
    }
}

static Cost cost(const Shape& s, size_t store_bytes) {
    return {double(s["N"] * s["C"]) * 2 * double(store_bytes), 0};
}

// ----------------------------------------------------------------------------
// CUDA kernels

template <class X>
__global__ void embedding_kernel1(X* out, const int32_t* tokens, const X* wte, size_t n, int C) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) {
        out[i] = wte[size_t(tokens[i / C]) * C + i % C];
    }
}

template <class X>
__global__ void embedding_kernel2(X* out, const int32_t* tokens, const X* wte, int C) {
    const X* in = wte + size_t(tokens[blockIdx.x]) * C;
    for (int i = threadIdx.x; i < C; i += blockDim.x) {
        out[size_t(blockIdx.x) * C + i] = in[i];
    }
}

// ----------------------------------------------------------------------------
// versions

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    const size_t n = r["N"] * r["C"];
    LAUNCH((embedding_kernel1<X>), unsigned(ceil_div(n, 256)), 256, 0, dev.stream, r.get<X>(OUT),
           r.get<int32_t>(TOKENS), r.get<X>(WTE), n, int(r["C"]));
}

template <class X>
static void version2(Gpu<X>& dev, Run& r) {
    LAUNCH((embedding_kernel2<X>), unsigned(r["N"]), 256, 0, dev.stream, r.get<X>(OUT), r.get<int32_t>(TOKENS),
           r.get<X>(WTE), int(r["C"]));
}

template <class Dev>
static void production(Dev& dev, Run& r) {
    using X = typename Dev::floatX;
    Matrix wte;
    wte.store = sizeof(X) == 2 ? Store::BF16 : Store::F32;
    wte.rows = int(r["V"]);
    wte.cols = int(r["C"]);
    wte.data = r.get<X>(WTE);
    embedding_forward(dev, r.get<X>(OUT), r.get<int32_t>(TOKENS), wte, r["N"]);
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const size_t C = r["C"];
    parallel_ranges(dev.threads, r["N"] * C, 4096, [&](size_t begin, size_t end, int) {
        for (size_t i = begin; i < end; i++) {
            r.get<float>(OUT)[i] = r.get<float>(WTE)[size_t(r.get<int32_t>(TOKENS)[i / C]) * C + i % C];
        }
    });
}

int main(int argc, char** argv) {
    Op op = {"embedding", "rows of the table"};
    op.shapes = {{{"N", 8192}, {"C", 4096}, {"V", 16384}}, {{"N", 8192}, {"C", 2048}, {"V", 16384}}};
    op.cpu_shapes = {{{"N", 512}, {"C", 2048}, {"V", 16384}}};
    op.awkward = {
        {{"N", 1}, {"C", 48}, {"V", 3}}, {{"N", 33}, {"C", 101}, {"V", 20}}, {{"N", 70}, {"C", 576}, {"V", 11}}};
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.versions = {
        gpu_version(1, "a thread an element", version1<bf16>, version1<float>),
        gpu_version(2, "a block a row", version2<bf16>, version2<float>),
        gpu_production(3, "16 bytes a thread, pieces in flight", production<Gpu<bf16>>, production<Gpu<float>>),
        cpu_version(1, "plain loops", on_cpu1),
        cpu_production(2, "a row at a time", production<Cpu<float>>),
    };
    return harness(op, argc, argv);
}
