// Logits to losses and, in place, to their gradient: what stands between the two matrix products of the head.
//
//   1  a block a row, an element a thread, three walks: greatest, sum, gradient
//   2  the same with the greatest and the sum in one walk
//   3* kernels/classifier.cuh: 16 bytes a thread, four pieces in flight, the second walk backwards
//   c1  plain loops, exp of the C library
//   c2  row kernels of the instruction tier, as kernels/cpu/classifier.h uses them
#include "dev/harness.h"
#include "kernels/classifier.cuh"
#include "kernels/cpu/classifier.h"

enum { LOGITS, LOSSES, CORRECT, LABELS };
constexpr float SCALE = 0.25f;

static size_t row_stride(const Shape& s) {
    return (s["V"] + 7) / 8 * 8;
}

static std::vector<Array> arrays(const Shape& s) {
    const size_t n = s["N"], V = s["V"];
    return {
        {"logits", Kind::STORE, Role::INOUT, n * row_stride(s), uniform(1, -8, 8)},
        {"losses", Kind::F32, Role::OUT, n},
        {"correct", Kind::U8, Role::OUT, n},
        {"labels", Kind::I32, Role::IN, n, [=](size_t i) { return double((i * 2654435761u + V - 1) % V); }},
    };
}

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    const size_t V = s["V"], stride = row_stride(s);
    for (size_t row = 0; row < s["N"]; row++) {
        double* x = &v[LOGITS][row * stride];
        const size_t label = size_t(v[LABELS][row]);
        size_t best = 0;
        double sum = 0;
        for (size_t i = 1; i < V; i++) {
            best = x[i] > x[best] ? i : best;
        }
        for (size_t i = 0; i < V; i++) {
            sum = p.f32(sum + p.f32(std::exp(p.f32(x[i] - x[best]))));
        }
        const double lse = p.f32(x[best] + p.f32(std::log(sum)));
        v[LOSSES][row] = p.f32(lse - x[label]);
        v[CORRECT][row] = best == label;
        for (size_t i = 0; i < V; i++) {
            x[i] = p.store(p.f32(p.f32(p.f32(std::exp(p.f32(x[i] - lse))) - double(i == label)) * double(SCALE)));
        }
        for (size_t i = V; i < stride; i++) {
            x[i] = 0;  // memory of whole pieces behind a row: not compared
        }
    }
}

static Cost cost(const Shape& s, size_t store_bytes) {
    const double n = double(s["N"] * s["V"]);
    return {n * 2 * double(store_bytes), 10 * n};
}

// ----------------------------------------------------------------------------
// CUDA kernels

// The reduction of one value a thread over the block, in every thread.
template <class Join>
__device__ float block_join(float x, float* shared, Join join) {
    for (int o = 16; o > 0; o >>= 1) {
        x = join(x, __shfl_xor_sync(ALL_LANES, x, o));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = shared[0];
    for (unsigned w = 1; w < blockDim.x / 32; w++) {
        x = join(x, shared[w]);
    }
    return x;
}

template <class X, bool ONE_WALK>
__global__ void __launch_bounds__(1024)
    classifier_simple_kernel(float* losses, uint8_t* correct, X* logits, size_t ld, const int32_t* labels, int V) {
    SHARED(float, shared, 32);
    X* row = logits + size_t(blockIdx.x) * ld;
    const int label = labels[blockIdx.x];
    const float target = widen(row[label]);
    const auto larger = [](float a, float b) { return fmaxf(a, b); };
    const auto plus = [](float a, float b) { return a + b; };
    float max = -FLT_MAX, sum = 0, ties = 0;
    for (int i = threadIdx.x; i < V; i += blockDim.x) {
        const float x = widen(row[i]), greater = fmaxf(max, x);
        ties += x >= target && i < label ? 1 : 0;
        if (ONE_WALK) {
            sum = sum * expf(max - greater) + expf(x - greater);
        }
        max = greater;
    }
    const float mine = max;
    max = block_join(max, shared, larger);
    if (ONE_WALK) {
        sum *= expf(mine - max);
    } else {
        for (int i = threadIdx.x; i < V; i += blockDim.x) {
            sum += expf(widen(row[i]) - max);
        }
    }
    const float lse = max + logf(block_join(sum, shared, plus));
    ties = block_join(ties, shared, plus);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = lse - target;
        correct[blockIdx.x] = target == max && ties == 0;
    }
    for (int i = threadIdx.x; i < V; i += blockDim.x) {
        row[i] = narrow<X>((expf(widen(row[i]) - lse) - (i == label ? 1.0f : 0.0f)) * SCALE);
    }
}

// ----------------------------------------------------------------------------
// versions

// What is behind the last logit of a row is memory that a version may write: zeros after, as the evaluation has it.
template <class X>
static void clear_behind(Gpu<X>& dev, Run& r) {
    const size_t V = r["V"], stride = row_stride(r.shape);
    for (size_t row = 0; V < stride && row < r["N"]; row++) {
        device_zero(dev, r.get<X>(LOGITS) + row * stride + V, (stride - V) * sizeof(X));
    }
}

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    LAUNCH((classifier_simple_kernel<X, false>), unsigned(r["N"]), 1024, 0, dev.stream, r.get<float>(LOSSES),
           r.get<uint8_t>(CORRECT), r.get<X>(LOGITS), row_stride(r.shape), r.get<int32_t>(LABELS), int(r["V"]));
    clear_behind(dev, r);
}

template <class X>
static void version2(Gpu<X>& dev, Run& r) {
    LAUNCH((classifier_simple_kernel<X, true>), unsigned(r["N"]), 1024, 0, dev.stream, r.get<float>(LOSSES),
           r.get<uint8_t>(CORRECT), r.get<X>(LOGITS), row_stride(r.shape), r.get<int32_t>(LABELS), int(r["V"]));
    clear_behind(dev, r);
}

template <class X>
static void production(Gpu<X>& dev, Run& r) {
    classifier_rows(dev, r.get<float>(LOSSES), r.get<uint8_t>(CORRECT), r.get<X>(LOGITS), row_stride(r.shape),
                    r.get<int32_t>(LABELS), r["N"], int(r["V"]), SCALE, true);
    clear_behind(dev, r);
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const size_t V = r["V"], stride = row_stride(r.shape);
    parallel_tasks(dev.threads, r["N"], [&](size_t i, int) {
        float* x = r.get<float>(LOGITS) + i * stride;
        const size_t label = size_t(r.get<int32_t>(LABELS)[i]);
        const size_t best = size_t(std::max_element(x, x + V) - x);
        const float target = x[label], max = x[best];
        float sum = 0;
        for (size_t v = 0; v < V; v++) {
            sum += std::exp(x[v] - max);
        }
        const float lse = max + std::log(sum);
        r.get<float>(LOSSES)[i] = lse - target;
        r.get<uint8_t>(CORRECT)[i] = best == label;
        for (size_t v = 0; v < V; v++) {
            x[v] = (std::exp(x[v] - lse) - float(v == label)) * SCALE;
        }
        std::fill(x + V, x + stride, 0.0f);
    });
}

static void on_cpu2(Cpu<float>& dev, Run& r) {
    const size_t V = r["V"], stride = row_stride(r.shape);
    parallel_tasks(dev.threads, r["N"], [&](size_t i, int) {
        float* x = r.get<float>(LOGITS) + i * stride;
        const size_t label = size_t(r.get<int32_t>(LABELS)[i]);
        const RowKernels<float>& kernels = row_kernels(dev);
        const float max = kernels.row_max(x, V), target = x[label], lse = max + std::log(kernels.exp_sum(x, max, V));
        bool best = target == max;
        for (size_t v = 0; v < label && best; v++) {
            best = x[v] < max;
        }
        r.get<float>(LOSSES)[i] = lse - target;
        r.get<uint8_t>(CORRECT)[i] = best;
        kernels.softmax_grad(x, lse, SCALE, V);
        x[label] -= SCALE;
        std::fill(x + V, x + stride, 0.0f);
    });
}

int main(int argc, char** argv) {
    Op op = {"classifier", "losses, and the gradient of the logits in place"};
    op.shapes = {{{"N", 1024}, {"V", 128256}}};
    op.cpu_shapes = {{{"N", 128}, {"V", 128256}}};
    op.awkward = {{{"N", 1}, {"V", 8}}, {{"N", 33}, {"V", 101}}, {{"N", 7}, {"V", 3072}}, {{"N", 2}, {"V", 20011}}};
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.versions = {
        gpu_version(1, "an element a thread, three walks", version1<bf16>, version1<float>),
        gpu_version(2, "an element a thread, two walks", version2<bf16>, version2<float>),
        gpu_production(3, "16 bytes a thread, two walks", production<bf16>, production<float>),
        cpu_version(1, "plain loops, exp of the C library", on_cpu1),
        cpu_version(2, "row kernels of the instruction tier", on_cpu2),
    };
    return harness(op, argc, argv);
}
