// Rotary embedding of the q and k heads of packed rows, in place. The worked example of dev/README.md.
//
//   1  a thread a pair of one head, a block a row: cosines and sines are read again by every head
//   2  a thread a pair of all heads: cosine and sine are read once and stay in registers
//   3* kernels/rope.cuh: 16 bytes a thread, several pieces in flight
//   c1  plain loops
//   c2* kernels/cpu/elementwise.h
#include "dev/harness.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/parallel.h"
#include "kernels/rope.cuh"

enum { QKV, COS, SIN, POSITIONS };
constexpr size_t ROOM = 16;  // columns behind each row that nothing may touch
constexpr size_t MAX_T = 8192;

static size_t row_width(const Shape& s) {
    return (s["NH"] + 2 * s["NKV"]) * s["HS"];
}

static std::vector<Array> arrays(const Shape& s) {
    const size_t half = s["HS"] / 2, width = row_width(s), N = s["N"], T = N < MAX_T ? N : MAX_T;
    const auto angle = [=](size_t i) {
        return double(i / half) * std::pow(500000.0, -double(i % half) / double(half));
    };
    return {
        {"qkv", Kind::STORE, Role::INOUT, N * (width + ROOM), uniform(1, -2, 2), width, width + ROOM},
        {"cos", Kind::F32, Role::IN, T * half, [=](size_t i) { return std::cos(angle(i)); }},
        {"sin", Kind::F32, Role::IN, T * half, [=](size_t i) { return std::sin(angle(i)); }},
        {"positions", Kind::I32, Role::IN, N, [=](size_t i) { return double(i * 7 % T); }},
    };
}

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    const size_t half = s["HS"] / 2, stride = row_width(s) + ROOM;
    for (size_t row = 0; row < s["N"]; row++) {
        for (size_t h = 0; h < s["NH"] + s["NKV"]; h++) {
            for (size_t i = 0; i < half; i++) {
                double& x = v[QKV][row * stride + h * 2 * half + i];
                double& y = v[QKV][row * stride + h * 2 * half + half + i];
                const size_t at = size_t(v[POSITIONS][row]) * half + i;
                // as frameworks do it: tables and products in the storage type
                const double c = p.store(v[COS][at]), sn = p.store(v[SIN][at]), a = x, b = y;
                x = p.store(p.store(a * c) - p.store(b * sn));
                y = p.store(p.store(b * c) + p.store(a * sn));
            }
        }
    }
}

static Cost cost(const Shape& s, size_t store_bytes) {
    const double turned = double(s["N"]) * double(s["NH"] + s["NKV"]) * double(s["HS"]);
    return {2 * turned * double(store_bytes) + double(s["N"] * s["HS"]) * 4, 3 * turned};
}

// ----------------------------------------------------------------------------
// CUDA kernels

template <class X>
__global__ void rope_kernel1(X* qkv, size_t stride, Rope<float> rope) {
    const int half = rope.HS / 2;
    const size_t row = blockIdx.x, angle = size_t(rope.positions[row]) * half;
    for (int pair = threadIdx.x; pair < rope.heads * half; pair += blockDim.x) {
        const int i = pair % half;
        X* p = qkv + row * stride + pair / half * rope.HS + i;
        const float a = widen(p[0]), b = widen(p[half]), c = rope.cos[angle + i], s = rope.sin[angle + i];
        p[0] = narrow<X>(a * c - b * s);
        p[half] = narrow<X>(b * c + a * s);
    }
}

template <class X>
__global__ void rope_kernel2(X* qkv, size_t stride, Rope<float> rope) {
    const int half = rope.HS / 2;
    const size_t row = blockIdx.x, angle = size_t(rope.positions[row]) * half;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        const float c = rope.cos[angle + i], s = rope.sin[angle + i];
        for (int head = 0; head < rope.heads; head++) {
            X* p = qkv + row * stride + head * rope.HS + i;
            const float a = widen(p[0]), b = widen(p[half]);
            p[0] = narrow<X>(a * c - b * s);
            p[half] = narrow<X>(b * c + a * s);
        }
    }
}

// ----------------------------------------------------------------------------
// versions

static Rope<float> rope_of(const Run& r) {
    Rope<float> rope;
    rope.cos = r.get<float>(COS);
    rope.sin = r.get<float>(SIN);
    rope.positions = r.get<int32_t>(POSITIONS);
    rope.heads = int(r["NH"] + r["NKV"]);
    rope.HS = int(r["HS"]);
    return rope;
}

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    LAUNCH((rope_kernel1<X>), unsigned(r["N"]), 256, 0, dev.stream, r.get<X>(QKV), row_width(r.shape) + ROOM,
           rope_of(r));
}

template <class X>
static void version2(Gpu<X>& dev, Run& r) {
    LAUNCH((rope_kernel2<X>), unsigned(r["N"]), 64, 0, dev.stream, r.get<X>(QKV), row_width(r.shape) + ROOM,
           rope_of(r));
}

// The production launcher of either device, by overload.
template <class Dev>
static void production(Dev& dev, Run& r) {
    rope_forward(dev, r.get<typename Dev::floatX>(QKV), row_width(r.shape) + ROOM, rope_of(r), r["N"]);
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const Rope<float> rope = rope_of(r);
    const size_t half = r["HS"] / 2, stride = row_width(r.shape) + ROOM;
    parallel_ranges(dev.threads, r["N"], 1, [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            for (int head = 0; head < rope.heads; head++) {
                float* x = r.get<float>(QKV) + row * stride + size_t(head) * 2 * half;
                for (size_t i = 0; i < half; i++) {
                    const size_t at = size_t(rope.positions[row]) * half + i;
                    const float a = x[i], b = x[half + i];
                    x[i] = a * rope.cos[at] - b * rope.sin[at];
                    x[half + i] = b * rope.cos[at] + a * rope.sin[at];
                }
            }
        }
    });
}

int main(int argc, char** argv) {
    Op op = {"rope", "rotation of q and k in place"};
    op.shapes = {{{"N", 8192}, {"NH", 32}, {"NKV", 8}, {"HS", 128}}, {{"N", 8192}, {"NH", 32}, {"NKV", 8}, {"HS", 64}}};
    op.cpu_shapes = {{{"N", 512}, {"NH", 32}, {"NKV", 8}, {"HS", 64}},
                     {{"N", 512}, {"NH", 32}, {"NKV", 8}, {"HS", 128}}};
    op.awkward = {{{"N", 1}, {"NH", 1}, {"NKV", 1}, {"HS", 64}},
                  {{"N", 33}, {"NH", 9}, {"NKV", 3}, {"HS", 64}},
                  {{"N", 70}, {"NH", 3}, {"NKV", 1}, {"HS", 10}},
                  {{"N", 5}, {"NH", 4}, {"NKV", 2}, {"HS", 128}}};
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.versions = {
        gpu_version(1, "a thread a pair, a block a row", version1<bf16>, version1<float>),
        gpu_version(2, "a thread a pair of all heads", version2<bf16>, version2<float>),
        gpu_production(3, "16 bytes a thread, pieces in flight", production<Gpu<bf16>>, production<Gpu<float>>),
        cpu_version(1, "plain loops", on_cpu1),
        cpu_production(2, "row kernels of the instruction tier", production<Cpu<float>>),
    };
    return harness(op, argc, argv);
}
