// Attention, backward: gradient of packed qkv rows for dout; out and log-sum-exp are those of the forward.
//
//   1   kernels/attention_plain.cuh: a warp a query row for dQ, a warp a key row for dK and dV, no tensor cores
//   2   kernels/attention.cuh with 32 rows a warp in the dQ kernel: production on sm_80, 90, 100
//   3   kernels/attention.cuh with 16 rows a warp in the dQ kernel: production on sm_86, 89, 120
//   4   as 2, and 16 rows a warp in the dK/dV kernel too (head size 64; with 128 it is so in 2)
//   5*  kernels/attention.cuh, its own choice of the above
//   c1  plain loops, a query at a time, its probabilities and their gradient in memory
//   c2* kernels/cpu/attention.h
#include "dev/attention.h"

enum { DQKV, QKV, DOUT, OUT, LSE, DOCUMENTS };

static std::vector<Array> arrays(const Shape& s) {
    const size_t wide = s["NH"] * s["HS"], width = row_width(s);
    return {
        {"dqkv", Kind::STORE, Role::OUT, s["N"] * (width + ROOM), nullptr, width, width + ROOM},
        {"qkv", Kind::STORE, Role::IN, s["N"] * width, uniform(1, -2, 2)},
        {"dout", Kind::STORE, Role::IN, s["N"] * wide, uniform(2, -1, 1)},
        {"out", Kind::STORE, Role::SCRATCH, s["N"] * wide},
        {"lse", Kind::F32, Role::SCRATCH, s["N"] * s["NH"]},
        {"documents", Kind::I32, Role::SCRATCH, Gpu<bf16>::document_ints(s["N"])},
    };
}

// Adds one query row's share to dkv; writes its dQ.
static void evaluate_row(const Shape& s, Values& v, const Precision& p, std::vector<double>& share, size_t h,
                         size_t row) {
    const size_t HS = s["HS"], width = row_width(s), first = row / s["T"] * s["T"], q_at = h * HS;
    const size_t k_at = (s["NH"] + h / (s["NH"] / s["NKV"])) * HS, v_at = k_at + s["NKV"] * HS;
    const double scale = p.f32(1 / std::sqrt(double(HS))), *dO = &v[DOUT][row * s["NH"] * HS + q_at];
    double unused = 0, mean = 0;
    const std::vector<double> P = probabilities(v[QKV], s, p, h, row, &unused);
    std::vector<double> dS(P.size()), dq(HS);
    for (size_t j = 0; j < P.size(); j++) {
        for (size_t c = 0; c < HS; c++) {
            dS[j] = p.f32(dS[j] + dO[c] * v[QKV][(first + j) * width + v_at + c]);
        }
        dS[j] = p.store(dS[j]);
        mean = p.f32(mean + P[j] * dS[j]);
    }
    for (size_t j = 0; j < P.size(); j++) {
        const double ds = p.store(p.store(P[j] * (dS[j] - mean)) * scale);
        for (size_t c = 0; c < HS; c++) {
            double &dk = share[(first + j) * width + k_at + c], &dv = share[(first + j) * width + v_at + c];
            dq[c] = p.f32(dq[c] + ds * v[QKV][(first + j) * width + k_at + c]);
            dk = p.f32(dk + ds * v[QKV][row * width + q_at + c]);
            dv = p.f32(dv + P[j] * dO[c]);
        }
    }
    for (size_t c = 0; c < HS; c++) {
        v[DQKV][row * (width + ROOM) + q_at + c] = p.store(dq[c]);
    }
}

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    const size_t width = row_width(s), wide = s["NH"] * s["HS"];
    std::vector<double> sum(s["N"] * width);
    for (size_t h = 0; h < s["NH"]; h++) {
        std::vector<double> share(s["N"] * width);  // of this query head
        for (size_t row = 0; row < s["N"]; row++) {
            evaluate_row(s, v, p, share, h, row);
        }
        for (size_t i = 0; i < sum.size(); i++) {
            sum[i] = p.f32(sum[i] + p.store(share[i]));
        }
    }
    for (size_t i = 0; i < sum.size(); i++) {
        if (i % width >= wide) {
            v[DQKV][i / width * (width + ROOM) + i % width] = p.store(sum[i]);
        }
    }
}

// Five products; the two kernels of the GPU do seven.
static Cost cost(const Shape& s, size_t store_bytes) {
    const double N = double(s["N"]), wide = double(s["NH"] * s["HS"]);
    return {N * 2 * (double(row_width(s)) + wide) * double(store_bytes) + N * double(s["NH"]) * 4,
            10 * double(s["HS"]) * double(s["NH"]) * pairs_of(s)};
}

// ----------------------------------------------------------------------------
// versions

static size_t dqkv_stride(const Run& r) {
    return row_width(r.shape) + ROOM;
}

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    attention_plain_backward(dev.stream, r.get<X>(DQKV), dqkv_stride(r), reinterpret_cast<float*>(dev.workspace),
                             r.get<X>(DOUT), r.get<X>(OUT), r["NH"] * r["HS"], r.get<float>(LSE), r.get<X>(QKV),
                             plain_of(r));
}

template <int MT, int DKV_MT64>
static void tiles(Gpu<bf16>& dev, Run& r) {
    const auto backward =
        r["HS"] == 64 ? attention_backward_tiles<64, MT, DKV_MT64> : attention_backward_tiles<128, MT, 1>;
    backward(dev, r.get<bf16>(DQKV), dqkv_stride(r), reinterpret_cast<RowStatistics*>(dev.workspace), r.get<bf16>(DOUT),
             r.get<bf16>(OUT), r["NH"] * r["HS"], r.get<float>(LSE), r.get<bf16>(QKV), documents, r["N"], int(r["NH"]),
             int(r["NKV"]));
}

template <class Dev>
static void production(Dev& dev, Run& r) {
    using X = typename Dev::floatX;
    attention_backward(dev, r.get<X>(DQKV), dqkv_stride(r), r.get<X>(DOUT), r.get<X>(OUT), r["NH"] * r["HS"],
                       r.get<float>(LSE), r.get<X>(QKV), documents, r["N"], int(r["NH"]), int(r["NKV"]), int(r["HS"]));
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const size_t N = r["N"], T = r["T"], NH = r["NH"], NKV = r["NKV"], HS = r["HS"], width = row_width(r.shape);
    const size_t stride = dqkv_stride(r);
    const float *qkv = r.get<float>(QKV), scale = 1 / std::sqrt(float(HS));
    float* dqkv = r.get<float>(DQKV);
    for (size_t row = 0; row < N; row++) {
        std::fill(dqkv + row * stride, dqkv + row * stride + width, 0.0f);
    }
    parallel_tasks(dev.threads, NKV * ceil_div(N, T), [&](size_t task, int) {
        const size_t kv = task % NKV, first = task / NKV * T, end = std::min(N, first + T), k_at = (NH + kv) * HS;
        const size_t v_at = k_at + NKV * HS;
        std::vector<float> p(T), ds(T);
        for (size_t h = kv * (NH / NKV); h < (kv + 1) * (NH / NKV); h++) {
            for (size_t row = first; row < end; row++) {
                const size_t n = row - first + 1;
                const float *q = qkv + row * width + h * HS, *dout = r.get<float>(DOUT) + (row * NH + h) * HS;
                float *dq = dqkv + row * stride + h * HS, mean = 0;
                plain_probabilities(p.data(), q, qkv + first * width + k_at, width, n, HS);
                for (size_t j = 0; j < n; j++) {
                    ds[j] = 0;
                    for (size_t c = 0; c < HS; c++) {
                        ds[j] += dout[c] * qkv[(first + j) * width + v_at + c];
                    }
                    mean += p[j] * ds[j];
                }
                for (size_t j = 0; j < n; j++) {
                    const float d = p[j] * (ds[j] - mean) * scale, *k = qkv + (first + j) * width + k_at;
                    float *dk = dqkv + (first + j) * stride + k_at, *dv = dqkv + (first + j) * stride + v_at;
                    for (size_t c = 0; c < HS; c++) {
                        dq[c] += d * k[c];
                        dk[c] += d * q[c];
                        dv[c] += p[j] * dout[c];
                    }
                }
            }
        }
    });
}

template <class Dev>
static void prepare(Dev& dev, Run& r) {
    using X = typename Dev::floatX;
    place_documents(dev, r, r.get<int32_t>(DOCUMENTS));
    attention_forward(dev, r.get<X>(OUT), r["NH"] * r["HS"], r.get<float>(LSE), r.get<X>(QKV), documents, r["N"],
                      int(r["NH"]), int(r["NKV"]), int(r["HS"]));
}

static bool small_heads(const Shape& s) {
    return s["HS"] == 64;
}

int main(int argc, char** argv) {
    Op op = {"attention_backward", "gradient of packed qkv rows"};
    op.shapes = attention_shapes();
    op.cpu_shapes = attention_cpu_shapes();
    op.awkward = attention_awkward_shapes();
    // Not a document of one token alone: its dQ and dK are 0, which the plain evaluation meets without any error.
    op.awkward.erase(op.awkward.begin());
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.prepare_bf16 = prepare<Gpu<bf16>>;
    op.prepare_float = prepare<Gpu<float>>;
    op.prepare_cpu = prepare<Cpu<float>>;
    op.versions = {
        gpu_version(1, "a warp a row, no tensor cores", version1<bf16>, version1<float>),
        gpu_version(2, "mma, dQ by 32 rows a warp", tiles<2, 2>, nullptr, tensor_core_heads),
        gpu_version(3, "mma, dQ by 16 rows a warp", tiles<1, 2>, nullptr, tensor_core_heads),
        gpu_version(4, "mma, dK/dV by 16 rows a warp", tiles<2, 1>, nullptr, small_heads),
        gpu_production(5, "as the card and the shape ask", production<Gpu<bf16>>, production<Gpu<float>>),
        cpu_version(1, "plain loops, a query at a time", on_cpu1),
        cpu_production(2, "panels, blocks of P and dS", production<Cpu<float>>),
    };
    return harness(op, argc, argv);
}
