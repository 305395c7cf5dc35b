// Attention, forward: causal, grouped queries, documents of T tokens packed into N rows.
//
//   1   a block a query row and head, its scores in shared memory; softmax in two passes
//   2   kernels/attention_plain.cuh: a warp a query row and head, online softmax, no tensor cores
//   3   kernels/attention.cuh with four warps of 32 rows: production on sm_80, 90, 100
//   4   kernels/attention.cuh with eight warps of 16 rows: production on sm_86, 89, 120
//   5   four warps of 32 rows and the other width of column tiles: 32 keys for head size 64, 64 for 128
//   6*  kernels/attention.cuh, its own choice of the above
//   c1  plain loops, a query at a time, its scores in memory
//   c2* kernels/cpu/attention.h
#include "dev/attention.h"

static std::vector<Array> arrays(const Shape& s) {
    const size_t wide = s["NH"] * s["HS"];
    return {
        {"qkv", Kind::STORE, Role::IN, s["N"] * row_width(s), uniform(1, -2, 2)},
        {"out", Kind::STORE, Role::OUT, s["N"] * (wide + ROOM), nullptr, wide, wide + ROOM},
        {"lse", Kind::F32, Role::OUT, s["N"] * s["NH"]},
        {"documents", Kind::I32, Role::SCRATCH, Gpu<bf16>::document_ints(s["N"])},
    };
}
enum { QKV, OUT, LSE, DOCUMENTS };

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    const size_t N = s["N"], T = s["T"], HS = s["HS"], width = row_width(s), wide = s["NH"] * HS;
    for (size_t h = 0; h < s["NH"]; h++) {
        const size_t v_at = (s["NH"] + s["NKV"] + h / (s["NH"] / s["NKV"])) * HS;
        for (size_t row = 0; row < N; row++) {
            const size_t first = row / T * T;
            const std::vector<double> P = probabilities(v[QKV], s, p, h, row, &v[LSE][h * N + row]);
            for (size_t c = 0; c < HS; c++) {
                double o = 0;
                for (size_t j = first; j <= row; j++) {
                    o = p.f32(o + P[j - first] * v[QKV][j * width + v_at + c]);
                }
                v[OUT][row * (wide + ROOM) + h * HS + c] = p.store(o);
            }
        }
    }
}

static Cost cost(const Shape& s, size_t store_bytes) {
    const double N = double(s["N"]), wide = double(s["NH"] * s["HS"]);
    return {N * (double(row_width(s)) + wide) * double(store_bytes) + N * double(s["NH"]) * 4,
            4 * double(s["HS"]) * double(s["NH"]) * pairs_of(s)};
}

// ----------------------------------------------------------------------------
// CUDA kernels

// scores: one for each key of the document up to the query.
template <class X>
__global__ void attention_forward_kernel1(X* out, size_t out_stride, float* lse, const X* qkv, PlainAttention a) {
    DYN_SHARED(float, scores);
    const size_t row = blockIdx.x / unsigned(a.NH), first = size_t(a.cu_seqlens[document_of(a, row)]);
    const int h = int(blockIdx.x % unsigned(a.NH)), kv = h / (a.NH / a.NKV), keys = int(row - first) + 1;
    const X *q = qkv + row * a.stride + size_t(h) * size_t(a.HS), *K = qkv + size_t(a.NH + kv) * size_t(a.HS);
    const X* V = K + size_t(a.NKV) * size_t(a.HS);
    for (int j = int(threadIdx.x); j < keys; j += int(blockDim.x)) {
        const X* k = K + (first + size_t(j)) * a.stride;
        float dot = 0;
        for (int c = 0; c < a.HS; c++) {
            dot = fmaf(widen(q[c]), widen(k[c]), dot);
        }
        scores[j] = dot * a.scale;
    }
    __syncthreads();
    float top = -INFINITY, sum = 0;  // every thread makes them: no reduction between threads
    for (int j = 0; j < keys; j++) {
        top = fmaxf(top, scores[j]);
    }
    for (int j = 0; j < keys; j++) {
        sum += expf(scores[j] - top);
    }
    for (int c = int(threadIdx.x); c < a.HS; c += int(blockDim.x)) {
        float o = 0;
        for (int j = 0; j < keys; j++) {
            o = fmaf(expf(scores[j] - top), widen(V[(first + size_t(j)) * a.stride + size_t(c)]), o);
        }
        out[row * out_stride + size_t(h) * size_t(a.HS) + size_t(c)] = narrow<X>(o / sum);
    }
    if (threadIdx.x == 0) {
        lse[size_t(h) * a.N + row] = top + logf(sum);
    }
}

// ----------------------------------------------------------------------------
// versions

static size_t out_stride(const Run& r) {
    return r["NH"] * r["HS"] + ROOM;
}

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    LAUNCH((attention_forward_kernel1<X>), unsigned(r["N"] * r["NH"]), 128, r["T"] * sizeof(float), dev.stream,
           r.get<X>(OUT), out_stride(r), r.get<float>(LSE), r.get<X>(QKV), plain_of(r));
}

template <class X>
static void version2(Gpu<X>& dev, Run& r) {
    attention_plain_forward(dev.stream, r.get<X>(OUT), out_stride(r), r.get<float>(LSE), r.get<X>(QKV), plain_of(r));
}

template <int MT, int BN64, int BN128>
static void tiles(Gpu<bf16>& dev, Run& r) {
    const auto forward =
        r["HS"] == 64 ? attention_forward_tiles<64, MT, BN64> : attention_forward_tiles<128, MT, BN128>;
    forward(dev, r.get<bf16>(OUT), out_stride(r), r.get<float>(LSE), r.get<bf16>(QKV), documents, r["N"], int(r["NH"]),
            int(r["NKV"]));
}

template <class Dev>
static void production(Dev& dev, Run& r) {
    using X = typename Dev::floatX;
    attention_forward(dev, r.get<X>(OUT), out_stride(r), r.get<float>(LSE), r.get<X>(QKV), documents, r["N"],
                      int(r["NH"]), int(r["NKV"]), int(r["HS"]));
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const size_t N = r["N"], T = r["T"], NH = r["NH"], NKV = r["NKV"], HS = r["HS"], width = row_width(r.shape);
    const float* qkv = r.get<float>(QKV);
    parallel_tasks(dev.threads, NH * ceil_div(N, 64), [&](size_t task, int) {
        const size_t h = task % NH, begin = task / NH * 64, end = std::min(N, begin + 64);
        std::vector<float> p(T);
        for (size_t row = begin; row < end; row++) {
            const size_t first = row / T * T, n = row - first + 1;
            const float *k = qkv + first * width + (NH + h / (NH / NKV)) * HS, *v = k + NKV * HS;
            r.get<float>(LSE)[h * N + row] = plain_probabilities(p.data(), qkv + row * width + h * HS, k, width, n, HS);
            float* out = r.get<float>(OUT) + row * out_stride(r) + h * HS;
            std::fill(out, out + HS, 0.0f);
            for (size_t j = 0; j < n; j++) {
                for (size_t c = 0; c < HS; c++) {
                    out[c] += p[j] * v[j * width + c];
                }
            }
        }
    });
}

template <class Dev>
static void prepare(Dev& dev, Run& r) {
    place_documents(dev, r, r.get<int32_t>(DOCUMENTS));
}

int main(int argc, char** argv) {
    Op op = {"attention_forward", "out and log-sum-exp of packed qkv rows"};
    op.shapes = attention_shapes();
    op.cpu_shapes = attention_cpu_shapes();
    op.awkward = attention_awkward_shapes();
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.prepare_bf16 = prepare<Gpu<bf16>>;
    op.prepare_float = prepare<Gpu<float>>;
    op.prepare_cpu = prepare<Cpu<float>>;
    op.versions = {
        gpu_version(1, "a block a row, scores in shared memory", version1<bf16>, version1<float>, short_documents),
        gpu_version(2, "a warp a row, no tensor cores", version2<bf16>, version2<float>),
        gpu_version(3, "mma, four warps of 32 rows", tiles<2, 64, 32>, nullptr, tensor_core_heads),
        gpu_version(4, "mma, eight warps of 16 rows", tiles<1, 64, 32>, nullptr, tensor_core_heads),
        gpu_version(5, "mma, 32 rows, other column tiles", tiles<2, 32, 64>, nullptr, tensor_core_heads),
        gpu_production(6, "as the card and the shape ask", production<Gpu<bf16>>, production<Gpu<float>>),
        cpu_version(1, "plain loops, a query at a time", on_cpu1),
        cpu_production(2, "panels, online softmax", production<Cpu<float>>),
    };
    return harness(op, argc, argv);
}
