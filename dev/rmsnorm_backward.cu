// The gradient of RMSNorm's input, added to what is there.
//
//   1  a thread a row: accesses of a warp lie a row apart
//   2  a warp a row, an element a lane; the row is read twice
//   3* kernels/rmsnorm.cuh: a warp or block a row, 16 bytes a thread; the row stays in registers
//   c1  plain loops
//   c2* kernels/cpu/elementwise.h
#include "dev/harness.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/parallel.h"
#include "kernels/rmsnorm.cuh"

enum { DX, DOUT, X_IN, RSTD, W };
constexpr size_t ROOM = 16;  // columns behind each row of dx that nothing may touch

static std::vector<Array> arrays(const Shape& s) {
    const size_t N = s["N"], C = s["C"];
    return {
        {"dx", Kind::STORE, Role::INOUT, N * (C + ROOM), uniform(4, -1, 1), C, C + ROOM},
        {"dout", Kind::STORE, Role::IN, N * C, uniform(2, -1, 1)},
        {"x", Kind::STORE, Role::IN, N * C, uniform(1, -3, 3)},
        {"rstd", Kind::F32, Role::IN, N, uniform(3, 0.5, 0.7)},
        {"w", Kind::F32, Role::IN, C, [](size_t i) { return double(i % 255 + 1) / 128; }},
    };
}

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    const size_t C = s["C"];
    for (size_t row = 0; row < s["N"]; row++) {
        const double r = v[RSTD][row];
        double sum = 0;
        for (size_t c = 0; c < C; c++) {
            sum = p.f32(sum + p.f32(p.store(v[DOUT][row * C + c] * v[W][c]) * v[X_IN][row * C + c]));
        }
        const double mean = p.f32(sum / double(C));
        for (size_t c = 0; c < C; c++) {
            const double dnorm = p.store(v[DOUT][row * C + c] * v[W][c]);
            const double back = p.f32(p.f32(p.f32(v[X_IN][row * C + c] * r) * r) * mean);
            double& dx = v[DX][row * (C + ROOM) + c];
            dx = p.store(dx + p.store(p.f32(r * p.f32(dnorm - back))));
        }
    }
}

static Cost cost(const Shape& s, size_t store_bytes) {
    const double n = double(s["N"] * s["C"]);
    return {n * 4 * double(store_bytes) + double(s["N"] + s["C"]) * 4, 8 * n};
}

// ----------------------------------------------------------------------------
// CUDA kernels

// LANES threads work on a row.
template <class X, int LANES>
__device__ void rmsnorm_backward_row(X* dx, const X* dout, const X* x, float r, const float* w, int lane, int C) {
    float sum = 0;
    for (int c = lane; c < C; c += LANES) {
        sum += widen(dout[c]) * w[c] * widen(x[c]);
    }
    if (LANES == 32) {
        sum = warp_sum(sum);
    }
    const float back = r * r * sum / C;
    for (int c = lane; c < C; c += LANES) {
        dx[c] = narrow<X>(widen(dx[c]) + r * (widen(dout[c]) * w[c] - widen(x[c]) * back));
    }
}

template <class X>
__global__ void rmsnorm_backward_kernel1(X* dx, size_t stride, const X* dout, const X* x, const float* rstd,
                                         const float* w, size_t N, int C) {
    const size_t row = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row < N) {
        rmsnorm_backward_row<X, 1>(dx + row * stride, dout + row * C, x + row * C, rstd[row], w, 0, C);
    }
}

template <class X>
__global__ void rmsnorm_backward_kernel2(X* dx, size_t stride, const X* dout, const X* x, const float* rstd,
                                         const float* w, size_t N, int C) {
    const size_t row = size_t(blockIdx.x) * blockDim.x / 32 + threadIdx.x / 32;
    if (row < N) {
        rmsnorm_backward_row<X, 32>(dx + row * stride, dout + row * C, x + row * C, rstd[row], w, threadIdx.x % 32, C);
    }
}

// ----------------------------------------------------------------------------
// versions

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    LAUNCH((rmsnorm_backward_kernel1<X>), unsigned(ceil_div(r["N"], 128)), 128, 0, dev.stream, r.get<X>(DX),
           r["C"] + ROOM, r.get<X>(DOUT), r.get<X>(X_IN), r.get<float>(RSTD), r.get<float>(W), r["N"], int(r["C"]));
}

template <class X>
static void version2(Gpu<X>& dev, Run& r) {
    LAUNCH((rmsnorm_backward_kernel2<X>), unsigned(ceil_div(r["N"], 8)), 256, 0, dev.stream, r.get<X>(DX),
           r["C"] + ROOM, r.get<X>(DOUT), r.get<X>(X_IN), r.get<float>(RSTD), r.get<float>(W), r["N"], int(r["C"]));
}

// The production launcher of either device, by overload.
template <class Dev>
static void production(Dev& dev, Run& r) {
    using X = typename Dev::floatX;
    rmsnorm_backward(dev, r.get<X>(DX), r["C"] + ROOM, r.get<X>(DOUT), r.get<X>(X_IN), r.get<float>(RSTD),
                     r.get<float>(W), r["N"], int(r["C"]));
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const size_t C = r["C"];
    parallel_ranges(dev.threads, r["N"], 1, [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            const float *dout = r.get<float>(DOUT) + row * C, *x = r.get<float>(X_IN) + row * C, *w = r.get<float>(W);
            float *dx = r.get<float>(DX) + row * (C + ROOM), sum = 0;
            for (size_t c = 0; c < C; c++) {
                sum += dout[c] * w[c] * x[c];
            }
            const float rstd = r.get<float>(RSTD)[row], back = rstd * rstd * sum / float(C);
            for (size_t c = 0; c < C; c++) {
                dx[c] += rstd * (dout[c] * w[c] - x[c] * back);
            }
        }
    });
}

int main(int argc, char** argv) {
    Op op = {"rmsnorm_backward", "gradient of the norm's input, added"};
    op.shapes = {{{"N", 8192}, {"C", 4096}}, {{"N", 8192}, {"C", 2048}}, {{"N", 8192}, {"C", 16384}}};
    op.cpu_shapes = {{{"N", 512}, {"C", 2048}}, {{"N", 512}, {"C", 4096}}};
    op.awkward = {{{"N", 1}, {"C", 48}}, {{"N", 33}, {"C", 101}}, {{"N", 70}, {"C", 576}}, {{"N", 3}, {"C", 2504}}};
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.versions = {
        gpu_version(1, "a thread a row", version1<bf16>, version1<float>),
        gpu_version(2, "a warp a row, read twice", version2<bf16>, version2<float>),
        gpu_production(3, "16 bytes a thread, kept in registers", production<Gpu<bf16>>, production<Gpu<float>>),
        cpu_version(1, "plain loops", on_cpu1),
        cpu_production(2, "row kernels of the instruction tier", production<Cpu<float>>),
    };
    return harness(op, argc, argv);
}
