// One step of AdamW over the flat buffer of the adapters.
//
//   1  an element a thread, then first_nonfinite in a launch of its own
//   2* kernels/adamw.cuh: 16 bytes a thread of each of four buffers, the check of p in the same launch
//   c1  plain loops, the check of p in the same walk
//   c2* kernels/cpu/adamw.h: row kernels, then the check
#include "dev/harness.h"
#include "kernels/adamw.cuh"
#include "kernels/cpu/adamw.h"
#include "kernels/cpu/parallel.h"

enum { P, M, V, G };

static const AdamW rates = {2e-4, 0.9, 0.999, 1e-8, 0.01, 3, 0.5};

static std::vector<Array> arrays(const Shape& s) {
    return {
        {"p", Kind::F32, Role::INOUT, s["N"], uniform(1, -0.5, 0.5)},
        {"m", Kind::F32, Role::INOUT, s["N"], uniform(2, -0.01, 0.01)},
        {"v", Kind::F32, Role::INOUT, s["N"], uniform(3, 1e-6, 1e-4)},
        {"g", Kind::F32, Role::IN, s["N"], uniform(4, -0.02, 0.02)},
    };
}

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    const double correction1 = 1 - std::pow(rates.beta1, double(rates.step)),
                 correction2 = 1 - std::pow(rates.beta2, double(rates.step));
    for (size_t i = 0; i < s["N"]; i++) {
        const double g = p.f32(v[G][i] * p.f32(rates.grad_scale));
        double &weight = v[P][i], &mean = v[M][i], &square = v[V][i];
        mean = p.f32(mean + p.f32(p.f32(1 - rates.beta1) * p.f32(g - mean)));
        square = p.f32(p.f32(square * p.f32(rates.beta2)) + p.f32(p.f32(p.f32(1 - rates.beta2) * g) * g));
        const double root = p.f32(p.f32(std::sqrt(square)) / p.f32(std::sqrt(correction2)));
        const double step = p.f32(p.f32(p.f32(rates.lr / correction1) * mean) / p.f32(root + p.f32(rates.eps)));
        weight = p.f32(p.f32(weight * p.f32(1 - rates.lr * rates.weight_decay)) - step);
    }
}

static Cost cost(const Shape& s, size_t) {
    return {double(s["N"]) * 28, double(s["N"]) * 14};
}

// ----------------------------------------------------------------------------
// CUDA kernels

__global__ void adamw_kernel1(float* p, float* m, float* v, const float* g, size_t n, AdamWScalars<float> a) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) {
        const float grad = g[i] * a.grad_scale;
        m[i] += a.weight1 * (grad - m[i]);
        v[i] = v[i] * a.beta2 + a.weight2 * grad * grad;
        p[i] = p[i] * a.keep + a.step_size * m[i] / (sqrtf(v[i]) / a.sqrt_correction2 + a.eps);
    }
}

// ----------------------------------------------------------------------------
// versions

template <class X>
static void prepare(Gpu<X>& dev, Run&) {
    device_reserve(dev, OPTIMIZER_WORKSPACE);
}

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    const size_t n = r["N"];
    LAUNCH(adamw_kernel1, unsigned(ceil_div(n, 256)), 256, 0, dev.stream, r.get<float>(P), r.get<float>(M),
           r.get<float>(V), r.get<float>(G), n, adamw_scalars<float>(rates));
    first_nonfinite(dev, r.get<float>(P), n);
}

// The production launcher of either device, by overload.
template <class Dev>
static void production(Dev& dev, Run& r) {
    adamw_update(dev, r.get<float>(P), r.get<float>(M), r.get<float>(V), r.get<float>(G), r["N"], rates);
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const AdamWScalars<float> a = adamw_scalars<float>(rates);
    float *p = r.get<float>(P), *m = r.get<float>(M), *v = r.get<float>(V), *g = r.get<float>(G);
    std::atomic<bool> finite{true};
    parallel_ranges(dev.threads, r["N"], 4096, [&](size_t begin, size_t end, int) {
        bool good = true;
        for (size_t i = begin; i < end; i++) {
            const float grad = g[i] * a.grad_scale;
            m[i] += a.weight1 * (grad - m[i]);
            v[i] = v[i] * a.beta2 + a.weight2 * grad * grad;
            p[i] = p[i] * a.keep + a.step_size * m[i] / (std::sqrt(v[i]) / a.sqrt_correction2 + a.eps);
            good = good && std::isfinite(p[i]);
        }
        if (!good) {
            finite = false;
        }
    });
    if (!finite) {
        first_nonfinite(dev, p, r["N"]);
    }
}

int main(int argc, char** argv) {
    Op op = {"adamw", "one step, and the check that all is finite"};
    op.shapes = {{{"N", 41943040}}};      // 8B at rank 16
    op.cpu_shapes = {{{"N", 11272192}}};  // 1B
    op.awkward = {{{"N", 1}}, {{"N", 1027}}, {{"N", 5003}}};
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.prepare_bf16 = prepare<bf16>;
    op.prepare_float = prepare<float>;
    op.versions = {
        gpu_version(1, "an element a thread, check apart", version1<bf16>, version1<float>),
        gpu_production(2, "16 bytes a thread, check in the launch", production<Gpu<bf16>>, production<Gpu<float>>),
        cpu_version(1, "plain loops", on_cpu1),
        cpu_production(2, "row kernels of the instruction tier", production<Cpu<float>>),
    };
    return harness(op, argc, argv);
}
