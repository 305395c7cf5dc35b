// SwiGLU, forward and backward one after the other.
//
//   1  a thread an element, the row and column by division
//   2  a block a row, an element a thread at a time
//   3* kernels/swiglu.cuh: 16 bytes a thread, two pieces of each operand in flight
//   c1  plain loops, exp of the C library
//   c2  plain loops, exp of the row kernels in pieces that stay in the cache
//   c3* kernels/cpu/elementwise.h
#include "dev/harness.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/parallel.h"
#include "kernels/swiglu.cuh"

enum { OUT, DGATE_UP, GATE_UP, DOUT };

static std::vector<Array> arrays(const Shape& s) {
    const size_t n = s["N"] * s["F"];
    return {
        {"out", Kind::STORE, Role::OUT, n},
        {"dgate_up", Kind::STORE, Role::OUT, 2 * n},
        {"gate_up", Kind::STORE, Role::IN, 2 * n, uniform(1, -6, 6)},
        {"dout", Kind::STORE, Role::IN, n, uniform(2, -1, 1)},
    };
}

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    const size_t F = s["F"];
    for (size_t i = 0; i < s["N"] * F; i++) {
        const size_t at = i / F * 2 * F + i % F;
        const double g = v[GATE_UP][at], u = v[GATE_UP][at + F], d = v[DOUT][i];
        const double e = p.f32(1 + p.f32(std::exp(-g))), sigmoid = p.f32(1 / e), silu = p.store(p.f32(g / e));
        const double slope = p.f32(sigmoid * p.f32(1 + p.f32(g * p.f32(1 - sigmoid))));
        v[OUT][i] = p.store(silu * u);
        v[DGATE_UP][at] = p.store(p.f32(p.store(d * u) * slope));
        v[DGATE_UP][at + F] = p.store(d * silu);
    }
}

static Cost cost(const Shape& s, size_t store_bytes) {
    const double n = double(s["N"] * s["F"]);
    return {n * 8 * double(store_bytes), 15 * n};
}

// ----------------------------------------------------------------------------
// CUDA kernels

// Element f of a row: gate and up are F apart in both rows of 2 F.
template <class X>
__device__ void swiglu_element(X* out, X* dgate, const X* gate, const X* dout, int F) {
    const float g = widen(gate[0]), u = widen(gate[F]), d = widen(*dout), s = 1 / (1 + expf(-g));
    *out = narrow<X>(g * s * u);
    dgate[0] = narrow<X>(d * u * s * (1 + g * (1 - s)));
    dgate[F] = narrow<X>(d * g * s);
}

template <class X>
__global__ void swiglu_kernel1(X* out, X* dgate_up, const X* gate_up, const X* dout, size_t n, int F) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) {
        const size_t at = i / F * 2 * F + i % F;
        swiglu_element(out + i, dgate_up + at, gate_up + at, dout + i, F);
    }
}

template <class X>
__global__ void swiglu_kernel2(X* out, X* dgate_up, const X* gate_up, const X* dout, int F) {
    const size_t row = blockIdx.x;
    for (int f = threadIdx.x; f < F; f += blockDim.x) {
        const size_t at = row * 2 * F + f;
        swiglu_element(out + row * F + f, dgate_up + at, gate_up + at, dout + row * F + f, F);
    }
}

// ----------------------------------------------------------------------------
// versions

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    const size_t n = r["N"] * r["F"];
    LAUNCH((swiglu_kernel1<X>), unsigned(ceil_div(n, 256)), 256, 0, dev.stream, r.get<X>(OUT), r.get<X>(DGATE_UP),
           r.get<X>(GATE_UP), r.get<X>(DOUT), n, int(r["F"]));
}

template <class X>
static void version2(Gpu<X>& dev, Run& r) {
    LAUNCH((swiglu_kernel2<X>), unsigned(r["N"]), 256, 0, dev.stream, r.get<X>(OUT), r.get<X>(DGATE_UP),
           r.get<X>(GATE_UP), r.get<X>(DOUT), int(r["F"]));
}

template <class X>
static void production(Gpu<X>& dev, Run& r) {
    swiglu_forward(dev, r.get<X>(OUT), r["F"], r.get<X>(GATE_UP), r["N"], int(r["F"]));
    swiglu_backward(dev, r.get<X>(DGATE_UP), 2 * r["F"], r.get<X>(DOUT), r.get<X>(GATE_UP), r["N"], int(r["F"]));
}

// One element, e = exp(-gate).
static void swiglu_plain(float* out, float* dgate, float* dup, float g, float u, float d, float e) {
    const float s = 1 / (1 + e);
    *out = g * s * u;
    *dgate = d * u * s * (1 + g * (1 - s));
    *dup = d * g * s;
}

template <bool VECTOR_EXP>
static void on_cpu_plain(Cpu<float>& dev, Run& r) {
    const size_t F = r["F"], PIECE = 512;
    parallel_ranges(dev.threads, r["N"], 1, [&](size_t begin, size_t end, int) {
        float e[PIECE];
        for (size_t i = begin * F; i < end * F;) {
            const size_t at = i / F * 2 * F + i % F, n = std::min(PIECE, F - i % F);
            const float* gate = r.get<float>(GATE_UP) + at;
            for (size_t j = 0; j < n; j++) {
                e[j] = VECTOR_EXP ? -gate[j] : std::exp(-gate[j]);
            }
            if (VECTOR_EXP) {
                row_kernels(dev).exp(e, e, n);
            }
            float* dgate = r.get<float>(DGATE_UP) + at;
            for (size_t j = 0; j < n; j++, i++) {
                swiglu_plain(r.get<float>(OUT) + i, dgate + j, dgate + F + j, gate[j], gate[F + j],
                             r.get<float>(DOUT)[i], e[j]);
            }
        }
    });
}

static void on_cpu3(Cpu<float>& dev, Run& r) {
    swiglu_forward(dev, r.get<float>(OUT), r.get<float>(GATE_UP), r["N"], int(r["F"]));
    swiglu_backward(dev, r.get<float>(DGATE_UP), 2 * r["F"], r.get<float>(DOUT), r.get<float>(GATE_UP), r["N"],
                    int(r["F"]));
}

int main(int argc, char** argv) {
    Op op = {"swiglu", "forward and backward"};
    op.shapes = {{{"N", 8192}, {"F", 14336}}, {{"N", 8192}, {"F", 8192}}};
    op.cpu_shapes = {{{"N", 512}, {"F", 8192}}, {{"N", 512}, {"F", 2048}}};
    op.awkward = {{{"N", 1}, {"F", 48}}, {{"N", 33}, {"F", 101}}, {{"N", 70}, {"F", 576}}, {{"N", 2}, {"F", 2504}}};
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.versions = {
        gpu_version(1, "a thread an element", version1<bf16>, version1<float>),
        gpu_version(2, "a block a row", version2<bf16>, version2<float>),
        gpu_production(3, "16 bytes a thread, two kernels", production<bf16>, production<float>),
        cpu_version(1, "plain loops, exp of the C library", on_cpu_plain<false>),
        cpu_version(2, "plain loops, exp of the row kernels", on_cpu_plain<true>),
        cpu_production(3, "row kernels of the instruction tier", on_cpu3),
    };
    return harness(op, argc, argv);
}
