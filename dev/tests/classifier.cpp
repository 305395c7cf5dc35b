// The head: against a plain softmax in double, against finite differences, in every tier, bit for bit for any number of
// threads and rows.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dev/tests/test.h"
#include "kernels/cpu/classifier.h"

namespace {

struct Source {
    uint64_t state;
    uint32_t bits() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return uint32_t(state >> 33);
    }
    float next() { return float(bits() % 20001) / 10000.0f - 1.0f; }
};

struct Shape {
    const char* name;
    size_t N;
    int C, V;
    float spread;  // of the logits
    int every;     // a row in so many has a label
};
const Shape shapes[] = {
    {"one row", 1, 16, 10, 1, 1},
    {"odd", 37, 51, 101, 1, 3},
    {"steep", 24, 40, 70, 300, 1},  // exp of a logit would overflow
    {"two reductions", 9, 600, 1000, 1, 2},
    {"several runs", 6, 8, 17000, 2, 1},    // of the vocabulary in the backward pass
    {"several chunks", 700, 12, 33, 1, 1},  // of rows
    {"vocabulary of one", 4, 5, 1, 1, 1},
};

template <class X>
struct Head {
    Shape shape;
    std::vector<X> x, rstd, norm_w;
    std::vector<uint16_t> w;
    std::vector<int32_t> rows, labels;
    LinearInput<X, X> in;
    Matrix matrix;
};

template <class X>
void make_head(Head<X>& h, const Shape& shape) {
    Source source{7};
    h.shape = shape;
    const size_t C = size_t(shape.C);
    for (size_t i = 0; i < shape.N * C; i++) {
        h.x.push_back(X(source.next()));
    }
    for (size_t i = 0; i < shape.N; i++) {
        h.rstd.push_back(X(source.next() * shape.spread));
        if (i % size_t(shape.every) == 0) {
            h.rows.push_back(int32_t(i));
            h.labels.push_back(int32_t(source.bits() % uint32_t(shape.V)));
        }
    }
    for (size_t i = 0; i < C; i++) {
        h.norm_w.push_back(X(source.next()));
    }
    for (size_t i = 0; i < C * size_t(shape.V); i++) {
        h.w.push_back(to_bf16(source.next()).bits);
    }
    h.in.kind = LinearInput<X, X>::RMSNORM;
    h.in.x = h.x.data();
    h.in.stride = C;
    h.in.rstd = h.rstd.data();
    h.in.norm_w = h.norm_w.data();
    h.matrix.store = Store::BF16;
    h.matrix.rows = shape.V;
    h.matrix.cols = shape.C;
    h.matrix.data = h.w.data();
}

template <class X>
struct Result {
    std::vector<X> losses, din, logits;
    std::vector<uint8_t> correct;
};

constexpr size_t FENCE = 16;

template <class X>
Result<X> run(Cpu<X>& dev, const Head<X>& h, X scale, bool want_din) {
    const size_t n = h.rows.size(), N = h.shape.N, C = size_t(h.shape.C), V = size_t(h.shape.V);
    const X nan = std::numeric_limits<X>::quiet_NaN();
    Result<X> r;
    r.losses.assign(n + FENCE, nan);
    r.din.assign(N * C + FENCE, nan);
    r.logits.assign(n * V + FENCE, nan);
    r.correct.assign(n + FENCE, 77);
    device_reserve(dev, classifier_workspace(dev, h.shape.C, h.shape.V, n));
    classifier(dev, r.losses.data(), r.correct.data(), want_din ? r.din.data() : nullptr, h.in, h.matrix, h.rows.data(),
               h.labels.data(), n, N, scale);
    head_logits(dev, r.logits.data(), h.in, h.matrix, h.rows.data(), n);
    bool fences = true;
    for (size_t i = 0; i < FENCE; i++) {
        fences = fences && std::isnan(r.losses[n + i]) && std::isnan(r.din[N * C + i]) &&
                 std::isnan(r.logits[n * V + i]) && r.correct[n + i] == 77;
    }
    CHECK(fences, "%s: written outside of an output", h.shape.name);
    CHECK(want_din || std::isnan(r.din[0]), "%s: din written though not wanted", h.shape.name);
    return r;
}

// The plain formulas in T.
template <class T>
Result<T> reference(const Head<T>& h, T scale) {
    const size_t n = h.rows.size(), C = size_t(h.shape.C), V = size_t(h.shape.V);
    Result<T> r;
    r.din.assign(h.shape.N * C, T(0));
    for (size_t i = 0; i < n; i++) {
        const size_t row = size_t(h.rows[i]);
        std::vector<T> logits(V, T(0)), x(C);
        for (size_t c = 0; c < C; c++) {
            x[c] = h.x[row * C + c] * h.rstd[row] * h.norm_w[c];
        }
        for (size_t v = 0; v < V; v++) {
            for (size_t c = 0; c < C; c++) {
                logits[v] += x[c] * T(to_float(bf16{h.w[v * C + c]}));
            }
        }
        T max = *std::max_element(logits.begin(), logits.end()), sum = 0;
        for (T logit : logits) {
            sum += std::exp(logit - max);
        }
        T lse = max + std::log(sum);
        r.losses.push_back(lse - logits[size_t(h.labels[i])]);
        r.correct.push_back(size_t(h.labels[i]) ==
                            size_t(std::max_element(logits.begin(), logits.end()) - logits.begin()));
        for (size_t v = 0; v < V; v++) {
            T d = scale * (std::exp(logits[v] - lse) - T(int32_t(v) == h.labels[i]));
            for (size_t c = 0; c < C; c++) {
                r.din[row * C + c] += d * T(to_float(bf16{h.w[v * C + c]}));
            }
        }
        r.logits.insert(r.logits.end(), logits.begin(), logits.end());
    }
    return r;
}

template <class A, class B>
double distance(const std::vector<A>& a, const std::vector<B>& b) {
    double greatest = 0;
    for (size_t i = 0; i < b.size(); i++) {
        double d = std::fabs(double(a[i]) - double(b[i]));
        if (!(d == d)) {
            return d;
        }
        greatest = std::max(greatest, d);
    }
    return greatest;
}

template <class T>
double magnitude(const std::vector<T>& v) {
    double greatest = 0;
    for (T x : v) {
        greatest = std::max(greatest, std::fabs(double(x)));
    }
    return greatest;
}

void classifier_double() {
    Cpu<double> dev;
    device_open(dev, 2);
    for (const Shape& shape : shapes) {
        Head<double> h;
        make_head(h, shape);
        Result<double> exact = reference(h, 0.25), r = run(dev, h, 0.25, true);
        // doubles against doubles: the rounding of sums over C and V, on the scale of the greatest logit
        const double bound = 1e-13 * (1 + magnitude(exact.logits));
        CHECK_ERROR(std::string(shape.name) + " losses", distance(r.losses, exact.losses), bound);
        CHECK_ERROR(std::string(shape.name) + " logits", distance(r.logits, exact.logits), bound);
        CHECK_ERROR(std::string(shape.name) + " din", distance(r.din, exact.din), bound);
        CHECK(std::equal(exact.correct.begin(), exact.correct.end(), r.correct.begin()), "%s: correct", shape.name);
        Result<double> forward = run(dev, h, 0.25, false);
        CHECK_ERROR("forward only", distance(forward.losses, exact.losses), bound);
    }
    device_close(dev);
}

void classifier_tiers() {
    for (const char* tier : {"ref", "avx2", "avx512"}) {
        Cpu<float> dev;
        device_open(dev, 2);
        dev.isa = cpu_isa_choose(tier);
        if (!dev.isa) {
            continue;
        }
        device_math(dev, "fp32");
        for (const Shape& shape : shapes) {
            Head<float> h;
            make_head(h, shape);
            Head<double> h64;
            make_head(h64, shape);
            Result<double> exact = reference(h64, 0.25);
            Result<float> naive = reference(h, 0.25f), r = run(dev, h, 0.25f, true);
            const std::string name = std::string(shape.name) + " " + tier;
            const double ulp = 1.2e-7, logit = magnitude(exact.logits);
            auto bound = [&](double naive_error, double size) { return std::max(2 * naive_error, 4 * ulp * size); };
            double logit_error = bound(distance(naive.logits, exact.logits), logit);
            CHECK_ERROR(name + " logits", distance(r.logits, exact.logits), logit_error);
            CHECK_ERROR(name + " losses", distance(r.losses, exact.losses),
                        bound(distance(naive.losses, exact.losses), 1 + logit));
            // an error of the logits is one of the probabilities too
            CHECK_ERROR(name + " din", distance(r.din, exact.din),
                        bound(distance(naive.din, exact.din), magnitude(exact.din) * (1 + logit)));
        }
        device_close(dev);
    }
}

void classifier_finite_differences() {
    Cpu<double> dev;
    device_open(dev, 1);
    Head<double> h;
    make_head(h, shapes[1]);
    h.in.kind = LinearInput<double, double>::PLAIN;
    const double scale = 0.5, step = 1e-5;
    Result<double> r = run(dev, h, scale, true);
    auto loss = [&]() {
        Result<double> now = run(dev, h, scale, false);
        double sum = 0;
        for (size_t i = 0; i < h.rows.size(); i++) {
            sum += now.losses[i];
        }
        return scale * sum;
    };
    for (size_t i = 0; i < h.x.size(); i += 13) {
        double old = h.x[i];
        h.x[i] = old + step;
        double up = loss();
        h.x[i] = old - step;
        double down = loss();
        h.x[i] = old;
        // truncation step^2 / 6 times a third derivative of order 10; rounding 1e-14 * 50 / step
        CHECK_ERROR("din", std::fabs((up - down) / (2 * step) - r.din[i]), 1e-7);
    }
    device_close(dev);
}

void classifier_ties() {
    Cpu<float> dev;
    device_open(dev, 1);
    const int V = 40;
    std::vector<float> x = {1}, w(V, -3.0f);
    w[11] = w[5] = w[37] = 2.0f;
    Matrix head;
    head.store = Store::F32;
    head.rows = V;
    head.cols = 1;
    head.data = w.data();
    LinearInput<float, float> in;
    in.x = x.data();
    in.stride = 1;
    device_reserve(dev, classifier_workspace(dev, 1, V, 1));
    for (int32_t label : {5, 11, 37, 0}) {
        int32_t row = 0;
        float loss = 0;
        uint8_t correct = 9;
        classifier(dev, &loss, &correct, static_cast<float*>(nullptr), in, head, &row, &label, 1, 1, 1.0f);
        CHECK(correct == (label == 5), "label %d: correct is %d", label, correct);
        double expected = std::log(3 + 37 * std::exp(-5.0)) + (label == 0 ? 5 : 0);
        CHECK_ERROR("loss", std::fabs(double(loss) - expected), 4 * 1.2e-7 * (1 + expected));
    }
    device_close(dev);
}

void classifier_nothing() {
    Cpu<float> dev;
    device_open(dev, 2);
    Head<float> h;
    make_head(h, shapes[1]);
    h.rows.clear();
    h.labels.clear();
    Result<float> r = run(dev, h, 1.0f, true);
    bool zero = std::all_of(r.din.begin(), r.din.end() - long(FENCE), [](float d) { return d == 0; });
    CHECK(zero, "no labels, yet din is not zero");
    device_close(dev);
}

void classifier_bitwise() {
    for (const char* tier : {"ref", "avx2", "avx512"}) {
        Cpu<float> dev;
        device_open(dev, 1);
        dev.isa = cpu_isa_choose(tier);
        if (!dev.isa) {
            continue;
        }
        device_math(dev, "fp32");
        for (const Shape& shape : shapes) {
            Head<float> h;
            make_head(h, shape);
            dev.threads = 1;
            Result<float> one = run(dev, h, 0.25f, true);
            for (int threads : {2, 3}) {
                dev.threads = threads;
                Result<float> r = run(dev, h, 0.25f, true);
                CHECK(memcmp(r.losses.data(), one.losses.data(), h.rows.size() * 4) == 0 &&
                          memcmp(r.din.data(), one.din.data(), one.din.size() * 4) == 0 &&
                          memcmp(r.logits.data(), one.logits.data(), one.logits.size() * 4) == 0,
                      "%s: %d threads give other bits (%s)", shape.name, threads, tier);
            }
            // the last labelled row alone
            Head<float> last;
            make_head(last, shape);
            last.rows = {h.rows.back()};
            last.labels = {h.labels.back()};
            Result<float> r = run(dev, last, 0.25f, true);
            const size_t row = size_t(h.rows.back()), C = size_t(shape.C);
            CHECK(memcmp(&r.losses[0], &one.losses[h.rows.size() - 1], 4) == 0 &&
                      memcmp(&r.din[row * C], &one.din[row * C], C * 4) == 0,
                  "%s: a row alone gives other bits (%s)", shape.name, tier);
        }
        device_close(dev);
    }
}

}  // namespace

extern const Test classifier_tests[] = {
    {"classifier_double", classifier_double},
    {"classifier_tiers", classifier_tiers},
    {"classifier_finite_differences", classifier_finite_differences},
    {"classifier_ties", classifier_ties},
    {"classifier_nothing", classifier_nothing},
    {"classifier_bitwise", classifier_bitwise},
    {nullptr, nullptr},
};
