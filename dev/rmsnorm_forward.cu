// RMSNorm of rows: rstd and the normed row.
//
//   1  a thread a row: accesses of a warp lie a row apart
//   2  a warp a row, an element a lane, rstd and row in one kernel
//   3* kernels/rmsnorm.cuh: rstd and row in two kernels, 16 bytes a thread, several pieces in flight
//   c1  plain loops, a row at a time
//   c2  row kernels, rstd and the row while it is in the cache
//   c3* kernels/cpu/elementwise.h: rstd of all rows, then the rows (which packing makes, see linear.h)
#include "dev/harness.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/parallel.h"
#include "kernels/rmsnorm.cuh"

enum { OUT, RSTD, X_IN, W };
constexpr size_t ROOM = 16;  // columns behind each row of out that nothing may touch
constexpr double EPS = 1e-5;

static std::vector<Array> arrays(const Shape& s) {
    const size_t N = s["N"], C = s["C"];
    return {
        {"out", Kind::STORE, Role::OUT, N * (C + ROOM), nullptr, C, C + ROOM},
        {"rstd", Kind::F32, Role::OUT, N},
        {"x", Kind::STORE, Role::IN, N * C, uniform(1, -3, 3)},
        {"w", Kind::F32, Role::IN, C, [](size_t i) { return double(i % 255 + 1) / 128; }},
    };
}

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    const size_t C = s["C"];
    for (size_t row = 0; row < s["N"]; row++) {
        double sum = 0;
        for (size_t c = 0; c < C; c++) {
            sum = p.f32(sum + p.f32(v[X_IN][row * C + c] * v[X_IN][row * C + c]));
        }
        v[RSTD][row] = p.f32(1 / p.f32(std::sqrt(p.f32(sum / double(C) + EPS))));
        for (size_t c = 0; c < C; c++) {
            const double n = p.store(p.f32(v[X_IN][row * C + c] * v[RSTD][row]));
            v[OUT][row * (C + ROOM) + c] = p.store(n * v[W][c]);
        }
    }
}

static Cost cost(const Shape& s, size_t store_bytes) {
    const double n = double(s["N"] * s["C"]);
    return {n * 2 * double(store_bytes) + double(s["N"] + s["C"]) * 4, 4 * n};
}

// ----------------------------------------------------------------------------
// CUDA kernels

template <class X>
__global__ void rmsnorm_forward_kernel1(X* out, size_t stride, float* rstd, const X* x, const float* w, size_t N, int C,
                                        float eps) {
    const size_t row = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= N) {
        return;
    }
    const X* in = x + row * C;
    float sum = 0;
    for (int c = 0; c < C; c++) {
        const float value = widen(in[c]);
        sum += value * value;
    }
    const float r = 1 / sqrtf(sum / C + eps);
    rstd[row] = r;
    for (int c = 0; c < C; c++) {
        out[row * stride + c] = narrow<X>(widen(narrow<X>(widen(in[c]) * r)) * w[c]);
    }
}

template <class X>
__global__ void rmsnorm_forward_kernel2(X* out, size_t stride, float* rstd, const X* x, const float* w, size_t N, int C,
                                        float eps) {
    const size_t row = size_t(blockIdx.x) * blockDim.x / 32 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= N) {
        return;
    }
    const X* in = x + row * C;
    float sum = 0;
    for (int c = lane; c < C; c += 32) {
        const float value = widen(in[c]);
        sum += value * value;
    }
    const float r = 1 / sqrtf(warp_sum(sum) / C + eps);
    if (lane == 0) {
        rstd[row] = r;
    }
    for (int c = lane; c < C; c += 32) {
        out[row * stride + c] = narrow<X>(widen(narrow<X>(widen(in[c]) * r)) * w[c]);
    }
}

// ----------------------------------------------------------------------------
// versions

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    LAUNCH((rmsnorm_forward_kernel1<X>), unsigned(ceil_div(r["N"], 128)), 128, 0, dev.stream, r.get<X>(OUT),
           r["C"] + ROOM, r.get<float>(RSTD), r.get<X>(X_IN), r.get<float>(W), r["N"], int(r["C"]), float(EPS));
}

template <class X>
static void version2(Gpu<X>& dev, Run& r) {
    LAUNCH((rmsnorm_forward_kernel2<X>), unsigned(ceil_div(r["N"], 8)), 256, 0, dev.stream, r.get<X>(OUT),
           r["C"] + ROOM, r.get<float>(RSTD), r.get<X>(X_IN), r.get<float>(W), r["N"], int(r["C"]), float(EPS));
}

template <class X>
static void production(Gpu<X>& dev, Run& r) {
    rmsnorm_rstd(dev, r.get<float>(RSTD), r.get<X>(X_IN), r["N"], int(r["C"]), EPS);
    rmsnorm_forward(dev, r.get<X>(OUT), r["C"] + ROOM, r.get<X>(X_IN), nullptr, r.get<float>(RSTD), r.get<float>(W),
                    r["N"], int(r["C"]));
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const size_t C = r["C"];
    parallel_ranges(dev.threads, r["N"], 1, [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            const float *x = r.get<float>(X_IN) + row * C, *w = r.get<float>(W);
            float sum = 0;
            for (size_t c = 0; c < C; c++) {
                sum += x[c] * x[c];
            }
            const float rstd = 1 / std::sqrt(sum / float(C) + float(EPS));
            r.get<float>(RSTD)[row] = rstd;
            for (size_t c = 0; c < C; c++) {
                r.get<float>(OUT)[row * (C + ROOM) + c] = x[c] * rstd * w[c];
            }
        }
    });
}

static void on_cpu2(Cpu<float>& dev, Run& r) {
    const size_t C = r["C"];
    const RowKernels<float>& kernels = row_kernels(dev);
    parallel_ranges(dev.threads, r["N"], rows_grain(C), [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            const float* x = r.get<float>(X_IN) + row * C;
            const float rstd = float(1 / std::sqrt(double(kernels.dot(x, x, C)) / double(C) + EPS));
            r.get<float>(RSTD)[row] = rstd;
            kernels.norm_mul(r.get<float>(OUT) + row * (C + ROOM), x, rstd, r.get<float>(W), C);
        }
    });
}

// Row by row: the CPU's op knows no stride of out.
static void on_cpu3(Cpu<float>& dev, Run& r) {
    const size_t C = r["C"];
    rmsnorm_rstd(dev, r.get<float>(RSTD), r.get<float>(X_IN), r["N"], int(C), EPS);
    parallel_ranges(dev.threads, r["N"], rows_grain(C), [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            row_kernels(dev).norm_mul(r.get<float>(OUT) + row * (C + ROOM), r.get<float>(X_IN) + row * C,
                                      r.get<float>(RSTD)[row], r.get<float>(W), C);
        }
    });
}

int main(int argc, char** argv) {
    Op op = {"rmsnorm_forward", "rstd and the normed row"};
    op.shapes = {{{"N", 8192}, {"C", 4096}}, {{"N", 8192}, {"C", 2048}}, {{"N", 8192}, {"C", 16384}}};
    op.cpu_shapes = {{{"N", 512}, {"C", 2048}}, {{"N", 512}, {"C", 4096}}};
    op.awkward = {{{"N", 1}, {"C", 48}}, {{"N", 33}, {"C", 101}}, {{"N", 70}, {"C", 576}}, {{"N", 3}, {"C", 2504}}};
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.versions = {
        gpu_version(1, "a thread a row", version1<bf16>, version1<float>),
        gpu_version(2, "a warp a row, one kernel", version2<bf16>, version2<float>),
        gpu_production(3, "16 bytes a thread, two kernels", production<bf16>, production<float>),
        cpu_version(1, "plain loops", on_cpu1),
        cpu_version(2, "row kernels, one walk", on_cpu2),
        cpu_production(3, "row kernels of the instruction tier", on_cpu3),
    };
    return harness(op, argc, argv);
}
