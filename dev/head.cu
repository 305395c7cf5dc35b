// The head: losses of n labelled rows of N and the gradient of their input, from x (N, C) behind an RMSNorm and the
// frozen matrix (V, C) in bf16. dev/classifier.cu is what stands between its two products.
//
//   1*  kernels/classifier.cuh: chunks of rows, cuBLASLt
//   c1  plain loops, a row at a time
//   c2* kernels/cpu/classifier.h: chunks of rows, packed panels, fp32
//   c3* the same, the products in int16
#include "dev/harness.h"
#include "kernels/classifier.cuh"
#include "kernels/cpu/classifier.h"

enum { LOSSES, CORRECT, DIN, X_, RSTD, NORM, HEAD, ROWS, LABELS };
constexpr float SCALE = 0.25f;

static std::vector<Array> arrays(const Shape& s) {
    const size_t N = s["N"], n = s["LABELLED"], C = s["C"], V = s["V"];
    return {
        {"losses", Kind::F32, Role::OUT, n},
        {"correct", Kind::U8, Role::OUT, n},
        {"din", Kind::STORE, Role::OUT, N * C},
        {"x", Kind::STORE, Role::IN, N * C, uniform(1, -2, 2)},
        {"rstd", Kind::F32, Role::IN, N, uniform(2, 0.5, 1)},
        {"norm", Kind::F32, Role::IN, C, uniform(3, 0.5, 1.5)},
        {"head", Kind::BF16, Role::IN, V * C, uniform(4, -0.2, 0.2)},
        {"rows", Kind::I32, Role::IN, n, [=](size_t i) { return double(i * N / n); }},
        {"labels", Kind::I32, Role::IN, n, [=](size_t i) { return double((i * 2654435761u + V - 1) % V); }},
    };
}

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    const size_t C = s["C"], V = s["V"];
    std::fill(v[DIN].begin(), v[DIN].end(), 0.0);
    for (size_t i = 0; i < s["LABELLED"]; i++) {
        const size_t row = size_t(v[ROWS][i]), label = size_t(v[LABELS][i]);
        std::vector<double> x(C), logits(V);
        for (size_t c = 0; c < C; c++) {
            x[c] = p.store(p.store(v[X_][row * C + c] * v[RSTD][row]) * v[NORM][c]);
        }
        size_t best = 0;
        for (size_t o = 0; o < V; o++) {
            double dot = 0;
            for (size_t c = 0; c < C; c++) {
                dot = p.f32(dot + p.f32(x[c] * v[HEAD][o * C + c]));
            }
            logits[o] = p.store(dot);
            best = logits[o] > logits[best] ? o : best;
        }
        double sum = 0;
        for (const double logit : logits) {
            sum = p.f32(sum + p.f32(std::exp(p.f32(logit - logits[best]))));
        }
        const double lse = p.f32(logits[best] + p.f32(std::log(sum)));
        v[LOSSES][i] = p.f32(lse - logits[label]);
        v[CORRECT][i] = best == label;
        std::vector<double> din(C);
        for (size_t o = 0; o < V; o++) {
            const double part = p.f32(std::exp(p.f32(logits[o] - lse))) - double(o == label);
            const double d = p.store(p.f32(part * double(SCALE)));
            for (size_t c = 0; c < C; c++) {
                din[c] = p.f32(din[c] + p.f32(d * v[HEAD][o * C + c]));
            }
        }
        for (size_t c = 0; c < C; c++) {
            v[DIN][row * C + c] = p.store(din[c]);
        }
    }
}

static Cost cost(const Shape& s, size_t store_bytes) {
    const double product = double(s["V"]) * double(s["C"]);
    return {2 * product * 2 + 2 * double(s["N"] * s["C"] * store_bytes), 4 * double(s["LABELLED"]) * product};
}

// ----------------------------------------------------------------------------
// versions

static Matrix head_of(const Run& r) {
    Matrix head;
    head.store = Store::BF16;
    head.rows = int(r["V"]);
    head.cols = int(r["C"]);
    head.data = r.get<bf16>(HEAD);
    return head;
}

template <class Dev>
static void prepare(Dev& dev, Run& r) {
    device_reserve(dev, classifier_workspace(dev, int(r["C"]), int(r["V"]), r["LABELLED"]));
}

// The production launcher of either device, by overload.
template <class Dev>
static void production(Dev& dev, Run& r) {
    using X = typename Dev::floatX;
    const LinearInput<X, float> in = {LinearInput<X, float>::RMSNORM, r.get<X>(X_), r["C"], r.get<float>(RSTD),
                                      r.get<float>(NORM)};
    classifier(dev, r.get<float>(LOSSES), r.get<uint8_t>(CORRECT), r.get<X>(DIN), in, head_of(r), r.get<int32_t>(ROWS),
               r.get<int32_t>(LABELS), r["LABELLED"], r["N"], SCALE);
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const size_t C = r["C"], V = r["V"];
    std::fill(r.get<float>(DIN), r.get<float>(DIN) + r["N"] * C, 0.0f);
    parallel_tasks(dev.threads, r["LABELLED"], [&](size_t i, int) {
        const size_t row = size_t(r.get<int32_t>(ROWS)[i]), label = size_t(r.get<int32_t>(LABELS)[i]);
        const bf16* head = r.get<bf16>(HEAD);
        std::vector<float> x(C), logits(V);
        for (size_t c = 0; c < C; c++) {
            x[c] = r.get<float>(X_)[row * C + c] * r.get<float>(RSTD)[row] * r.get<float>(NORM)[c];
        }
        for (size_t v = 0; v < V; v++) {
            for (size_t c = 0; c < C; c++) {
                logits[v] += x[c] * to_float(head[v * C + c]);
            }
        }
        const size_t best = size_t(std::max_element(logits.begin(), logits.end()) - logits.begin());
        float sum = 0;
        for (const float logit : logits) {
            sum += std::exp(logit - logits[best]);
        }
        const float lse = logits[best] + std::log(sum);
        r.get<float>(LOSSES)[i] = lse - logits[label];
        r.get<uint8_t>(CORRECT)[i] = best == label;
        float* din = r.get<float>(DIN) + row * C;
        for (size_t v = 0; v < V; v++) {
            const float d = (std::exp(logits[v] - lse) - float(v == label)) * SCALE;
            for (size_t c = 0; c < C; c++) {
                din[c] += d * to_float(head[v * C + c]);
            }
        }
    });
}

static bool small(const Shape& s) {
    return s["LABELLED"] * s["C"] * s["V"] <= size_t(1) << 29;
}

int main(int argc, char** argv) {
    Op op = {"head", "losses and the gradient of their input, from the rows with a label"};
    op.shapes = {{{"N", 8192}, {"LABELLED", 4096}, {"C", 4096}, {"V", 128256}}};
    op.cpu_shapes = {{{"N", 512}, {"LABELLED", 256}, {"C", 768}, {"V", 32000}},
                     {{"N", 512}, {"LABELLED", 256}, {"C", 2048}, {"V", 128256}},
                     {{"N", 16}, {"LABELLED", 16}, {"C", 768}, {"V", 32000}}};
    op.awkward = {{{"N", 1}, {"LABELLED", 1}, {"C", 48}, {"V", 8}},
                  {{"N", 33}, {"LABELLED", 10}, {"C", 101}, {"V", 101}},
                  {{"N", 70}, {"LABELLED", 70}, {"C", 64}, {"V", 520}}};
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.prepare_bf16 = prepare<Gpu<bf16>>;
    op.prepare_cpu = prepare<Cpu<float>>;
    op.versions = {
        gpu_production(1, "chunks of rows, cuBLASLt", production<Gpu<bf16>>, nullptr),
        cpu_version(1, "plain loops", on_cpu1, small),
        cpu_production(2, "chunks of rows, packed panels, fp32", production<Cpu<float>>, nullptr, "fp32"),
        cpu_production(3, "chunks of rows, packed panels, int16", production<Cpu<float>>, nullptr, "int16"),
    };
    return harness(op, argc, argv);
}
