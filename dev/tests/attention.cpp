// Attention: against the formula, finite differences, packing, threads, tiers, awkward shapes.
#include "kernels/cpu/attention.h"

#include <algorithm>
#include <type_traits>

#include "dev/tests/ops.h"

namespace {

struct Shape {
    int NH, NKV, HS;
    std::vector<int> lengths;
};

struct Starts {
    std::vector<int32_t> at;
    size_t longest = 0;
    size_t N() const { return size_t(at.back()); }
    int documents() const { return int(at.size()) - 1; }
};

Starts starts_of(const std::vector<int>& lengths) {
    Starts s;
    s.at.push_back(0);
    for (int length : lengths) {
        s.at.push_back(s.at.back() + length);
        s.longest = size_t(length) > s.longest ? size_t(length) : s.longest;
    }
    return s;
}

template <class T>
struct Result {
    std::vector<T> out, lse, dqkv;
    double score_term = 0, gradient_term = 0;  // greatest sum of magnitudes behind a score and behind dS K
};

// The formula, row by row, in T alone. D = rowsum(dO O) is of the output given, or of the exact one. rounded: to bf16,
// what PyTorch's flash attention rounds beside inputs and results: exp(score - maximum) before it is multiplied by V, P
// before dO, dS before K and Q.
template <class T>
Result<T> plain_attention(const Shape& shape, const std::vector<T>& qkv, const std::vector<T>& dout,
                          const std::vector<T>& out = {}, bool rounded = false) {
    const auto operand = [&](T x) { return rounded ? T(to_float(to_bf16(float(x)))) : x; };
    const Starts s = starts_of(shape.lengths);
    const size_t N = s.N(), HS = size_t(shape.HS), NH = size_t(shape.NH), NKV = size_t(shape.NKV);
    const size_t wide = NH * HS, QKV = (NH + 2 * NKV) * HS;
    Result<T> r = {std::vector<T>(N * wide), std::vector<T>(NH * N), std::vector<T>(N * QKV), 0, 0};
    const T scale = T(1) / std::sqrt(T(HS));
    for (int d = 0; d < s.documents(); d++) {
        for (size_t row = size_t(s.at[size_t(d)]); row < size_t(s.at[size_t(d) + 1]); row++) {
            for (size_t h = 0; h < NH; h++) {
                const size_t first = size_t(s.at[size_t(d)]), n = row - first + 1, kv = h / (NH / NKV);
                const T *q = &qkv[row * QKV + h * HS], *dO = &dout[row * wide + h * HS];
                T *o = &r.out[row * wide + h * HS], *dq = &r.dqkv[row * QKV + h * HS];
                std::vector<T> p(n), dp(n);
                T max = -std::numeric_limits<T>::infinity(), sum = 0, D = 0;
                for (size_t j = 0; j < n; j++) {
                    const T *k = &qkv[(first + j) * QKV + (NH + kv) * HS], *v = k + NKV * HS;
                    T score_term = 0, gradient_term = 0, key = 0;
                    for (size_t c = 0; c < HS; c++) {
                        p[j] += q[c] * k[c];
                        dp[j] += dO[c] * v[c];
                        score_term += std::fabs(q[c] * k[c]) * scale;
                        gradient_term += std::fabs(dO[c] * v[c]) * scale;
                        key = std::max(key, std::max(std::fabs(k[c]), std::fabs(q[c])));
                    }
                    r.score_term = std::max(r.score_term, double(score_term));
                    r.gradient_term = std::max(r.gradient_term, double(gradient_term * key));
                    p[j] *= scale;
                    max = p[j] > max ? p[j] : max;
                }
                for (size_t j = 0; j < n; j++) {
                    p[j] = std::exp(p[j] - max);
                    sum += p[j];
                }
                r.lse[h * N + row] = max + std::log(sum);
                for (size_t j = 0; j < n; j++) {
                    const T weight = operand(p[j]) / sum;
                    p[j] /= sum;
                    D += p[j] * dp[j];
                    for (size_t c = 0; c < HS; c++) {
                        o[c] += weight * qkv[(first + j) * QKV + (NH + NKV + kv) * HS + c];
                    }
                }
                for (size_t c = 0; c < HS && !out.empty(); c++) {
                    D = (c == 0 ? 0 : D) + dO[c] * out[row * wide + h * HS + c];
                }
                for (size_t j = 0; j < n; j++) {
                    const T* k = &qkv[(first + j) * QKV + (NH + kv) * HS];
                    T *dk = &r.dqkv[(first + j) * QKV + (NH + kv) * HS], *dv = dk + NKV * HS;
                    const T ds = operand(p[j] * (dp[j] - D)) * scale, weight = operand(p[j]);
                    for (size_t c = 0; c < HS; c++) {
                        dq[c] += ds * k[c];
                        dk[c] += ds * q[c];
                        dv[c] += weight * dO[c];
                    }
                }
            }
        }
    }
    return r;
}

inline bool is_nan(double x) {
    return std::isnan(x);
}
inline bool is_nan(bf16 x) {
    return std::isnan(to_float(x));
}
inline double widened(double x) {
    return x;
}
inline double widened(bf16 x) {
    return double(to_float(x));
}
template <class T, class X>
std::vector<T> values_of(const std::vector<X>& x) {
    std::vector<T> out(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        out[i] = T(widened(x[i]));
    }
    return out;
}

// The first `width` of each row; the rest of a row must still be the poison.
template <class X>
std::vector<X> rows_of(const Guarded<X>& buffer, size_t N, size_t width, size_t stride) {
    std::vector<X> rows;
    for (size_t i = 0; i < N * stride; i++) {
        if (i % stride < width) {
            rows.push_back(buffer[i]);
        } else {
            CHECK(is_nan(buffer[i]), "element %zu between the rows was written", i);
        }
    }
    return rows;
}

// The ops, into poisoned and fenced buffers whose rows stand apart.
template <class X>
Result<typename Cpu<X>::real> device_attention(Cpu<X>& dev, const Shape& shape, const std::vector<X>& qkv,
                                               const std::vector<X>& dout) {
    using Real = typename Cpu<X>::real;
    const Starts s = starts_of(shape.lengths);
    const size_t N = s.N(), HS = size_t(shape.HS), NH = size_t(shape.NH);
    device_reserve(dev, attention_workspace(dev, N, s.longest, shape.NH, shape.NKV, shape.HS));
    memset(dev.workspace, 0xff, dev.workspace_bytes);  // NaN: what is read must have been written
    const size_t wide = NH * HS, stride = wide + 3, QKV = qkv.size() / N, dstride = QKV + 5;
    Guarded<X> out(N * stride), dqkv(N * dstride);
    Guarded<Real> lse(NH * N);
    std::vector<int32_t> memory(Cpu<X>::document_ints(N));
    const Documents docs = documents_place(dev, memory.data(), s.at.data(), s.documents(), shape.HS);
    attention_forward(dev, out.data(), stride, lse.data(), qkv.data(), docs, N, shape.NH, shape.NKV, shape.HS);
    attention_backward(dev, dqkv.data(), dstride, dout.data(), out.data(), stride, lse.data(), qkv.data(), docs, N,
                       shape.NH, shape.NKV, shape.HS);
    CHECK_FENCES(out);
    CHECK_FENCES(lse);
    CHECK_FENCES(dqkv);
    return {values_of<Real>(rows_of(out, N, wide, stride)), std::vector<Real>(lse.data(), lse.data() + lse.n),
            values_of<Real>(rows_of(dqkv, N, QKV, dstride)), 0, 0};
}

// fn(dev) with each tier and each type of activations.
template <class Fn>
void for_each_storage(const Fn& fn) {
    for_each_tier([&](Cpu<float>& dev) {
        fn(dev);
        Cpu<bf16> narrow;
        device_open(narrow, 2);
        narrow.isa = dev.isa;
        fn(narrow);
        device_close(narrow);
    });
}
template <class X>
std::string device_name(const Cpu<X>& dev) {
    return std::string(dev.isa->name) + (sizeof(X) == sizeof(bf16) ? " bf16" : "");
}
inline void value_set(float& x, float value) {
    x = value;
}
inline void value_set(bf16& x, float value) {
    x = to_bf16(value);
}
template <class X>
std::vector<X> stored(const std::vector<float>& x) {
    std::vector<X> out(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        value_set(out[i], x[i]);
    }
    return out;
}

std::string name_of(const Shape& shape) {
    std::string name = std::to_string(shape.NH) + "/" + std::to_string(shape.NKV) + " heads of " +
                       std::to_string(shape.HS) + ", documents";
    for (int length : shape.lengths) {
        name += " " + std::to_string(length);
    }
    return name;
}

template <class T>
void inputs_of(const Shape& shape, double size, std::vector<T>* qkv, std::vector<T>* dout) {
    const size_t N = starts_of(shape.lengths).N(), HS = size_t(shape.HS);
    *qkv = random_values<T>(N * size_t(shape.NH + 2 * shape.NKV) * HS, 11, size);
    *dout = random_values<T>(N * size_t(shape.NH) * HS, 12);
}

const std::vector<Shape> shapes = {
    {1, 1, 2, {1}},           {9, 3, 6, {33}},       {9, 3, 32, {1, 2, 63, 64, 65, 130}},
    {4, 2, 64, {130, 1, 97}}, {2, 1, 80, {65, 96}},  {3, 3, 128, {64, 2, 193}},
    {2, 1, 256, {70}},        {1, 1, 18, {1, 1, 1}}, {4, 2, 16, {7, 129, 400}},
};

}  // namespace

// Cpu<double> is the formula up to its rounding: 1e-12 is some thousand roundings of 1e-16.
static void attention_double() {
    DoubleDevice dev(2);
    for (const Shape& shape : shapes) {
        std::vector<double> qkv, dout;
        inputs_of(shape, 2, &qkv, &dout);
        const Result<double> want = plain_attention(shape, qkv, dout), got = device_attention(dev, shape, qkv, dout);
        const std::string name = name_of(shape);
        CHECK_ERROR(name + ": out", greatest_error(got.out.data(), want.out.data(), want.out.size()), 1e-12);
        CHECK_ERROR(name + ": lse", greatest_error(got.lse.data(), want.lse.data(), want.lse.size()), 1e-12);
        CHECK_ERROR(name + ": dqkv", greatest_error(got.dqkv.data(), want.dqkv.data(), want.dqkv.size()), 1e-12);
    }
}

static void attention_differences() {
    DoubleDevice dev(1);
    for (const Shape& shape : {Shape{4, 2, 6, {1, 9, 2}}, Shape{3, 1, 4, {70}}}) {
        std::vector<double> qkv, dout;
        inputs_of(shape, 2, &qkv, &dout);
        const Result<double> got = device_attention(dev, shape, qkv, dout);
        const Starts s = starts_of(shape.lengths);
        std::vector<double> out(dout.size()), lse(s.N() * size_t(shape.NH));
        double error = difference_error(qkv, got.dqkv.data(), 1, [&] {
            Documents docs;
            docs.cu_seqlens = s.at.data();
            docs.count = s.documents();
            attention_forward(dev, out.data(), out.size() / s.N(), lse.data(), qkv.data(), docs, s.N(), shape.NH,
                              shape.NKV, shape.HS);
            double sum = 0;
            for (size_t i = 0; i < out.size(); i++) {
                sum += out[i] * dout[i];
            }
            return sum;
        });
        CHECK_ERROR(name_of(shape), error, 1e-6);
    }
}

static void attention_tiers() {
    for (const Shape& shape : shapes) {
        for (double size : {1.0, 6.0}) {  // 6: some rows put nearly all weight on one key
            std::vector<double> qkv, dout;
            std::vector<float> qkv_float, dout_float;
            inputs_of(shape, size, &qkv, &dout);
            inputs_of(shape, size, &qkv_float, &dout_float);
            const Result<double> want = plain_attention(shape, qkv, dout);
            const Result<float> plain = plain_attention(shape, qkv_float, dout_float);
            // A document of one token: P = 1 and dP = D, so the plain evaluation cancels without error. Ours sums D in
            // another order, and may miss by 4 roundings of the sums that cancel; likewise lse, one score.
            const bool lone = starts_of(shape.lengths).longest == 1;
            const double lse_floor = lone ? 4 * 6e-8 * want.score_term : 0;
            const double dqkv_floor = lone ? 4 * 6e-8 * want.gradient_term : 0;
            for_each_tier([&](Cpu<float>& dev) {
                const Result<float> got = device_attention(dev, shape, qkv_float, dout_float);
                const std::string name = std::string(dev.isa->name) + ", " + name_of(shape);
                CHECK_ERROR(name + ": out", greatest_error(got.out.data(), want.out.data(), want.out.size()),
                            float_bound(plain.out, want.out));
                CHECK_ERROR(name + ": lse", greatest_error(got.lse.data(), want.lse.data(), want.lse.size()),
                            std::max(lse_floor, float_bound(plain.lse, want.lse)));
                CHECK_ERROR(name + ": dqkv", greatest_error(got.dqkv.data(), want.dqkv.data(), want.dqkv.size()),
                            std::max(dqkv_floor, float_bound(plain.dqkv, want.dqkv)));
            });
        }
    }
}

// What the greatest error exceeds a rounding to bf16 by: half a unit in the last of 8 places, 2^-8 of the value.
static double error_beyond_rounding(const std::vector<float>& got, const std::vector<double>& want) {
    double worst = 0;
    for (size_t i = 0; i < want.size(); i++) {
        const double e = std::fabs(double(got[i]) - want[i]) - std::fabs(want[i]) / 256;
        worst = e > worst || std::isnan(e) ? e : worst;
        if (std::isnan(worst)) {
            break;
        }
    }
    return worst;
}

// Activations in bf16: the arithmetic is that of floats on what is stored, and a result is rounded once. D belongs to
// the rounded output, which is what backward is given.
static void attention_bf16() {
    const std::vector<Shape> own = {{4, 2, 16, {1, 7, 63, 64, 65, 130}},
                                    {6, 2, 64, {130, 1, 7, 65}},
                                    {2, 1, 80, {63, 96, 2}},
                                    {3, 3, 128, {64, 1, 193}},
                                    {9, 3, 6, {33}},
                                    {2, 1, 18, {1, 1}}};
    for (const Shape& shape : own) {
        for (double size : {1.0, 6.0}) {
            std::vector<float> qkv, dout;
            inputs_of(shape, size, &qkv, &dout);
            const std::vector<bf16> qkv_bf16 = stored<bf16>(qkv), dout_bf16 = stored<bf16>(dout);
            const auto reals = values_of<double>(qkv_bf16), dreals = values_of<double>(dout_bf16);
            const auto floats = values_of<float>(qkv_bf16), dfloats = values_of<float>(dout_bf16);
            for_each_tier([&](Cpu<float>& tier) {
                Cpu<bf16> dev;
                device_open(dev, 2);
                dev.isa = tier.isa;
                const Result<float> got = device_attention(dev, shape, qkv_bf16, dout_bf16);
                const Result<double> want = plain_attention(shape, reals, dreals, values_of<double>(got.out));
                const Result<float> plain = plain_attention(shape, floats, dfloats, got.out);
                const std::string name = device_name(dev) + ", " + name_of(shape);
                // 4 roundings of the sums behind a score, and behind dS K, where a plain evaluation has no error.
                const double lse_floor = 4 * 6e-8 * want.score_term, dqkv_floor = 4 * 6e-8 * want.gradient_term;
                CHECK_ERROR(name + ": out", error_beyond_rounding(got.out, want.out), float_bound(plain.out, want.out));
                CHECK_ERROR(name + ": lse", greatest_error(got.lse.data(), want.lse.data(), want.lse.size()),
                            std::max(lse_floor, float_bound(plain.lse, want.lse)));
                CHECK_ERROR(name + ": dqkv", error_beyond_rounding(got.dqkv, want.dqkv),
                            std::max(dqkv_floor, float_bound(plain.dqkv, want.dqkv)));
                device_close(dev);
            });
        }
    }
}

// A document alone has the bits it has among others.
template <class X>
static void packed_on(Cpu<X>& dev) {
    const Shape shape = {9, 3, 32, {1, 2, 63, 64, 65, 130, 300}};
    std::vector<float> qkv_float, dout_float;
    inputs_of(shape, 2, &qkv_float, &dout_float);
    const Starts s = starts_of(shape.lengths);
    const size_t N = s.N(), QKV = qkv_float.size() / N, wide = dout_float.size() / N;
    const std::vector<X> qkv = stored<X>(qkv_float), dout = stored<X>(dout_float);
    const Result<float> together = device_attention(dev, shape, qkv, dout);
    for (int d = 0; d < s.documents(); d++) {
        const size_t first = size_t(s.at[size_t(d)]), n = size_t(s.at[size_t(d) + 1]) - first;
        const Shape alone_shape = {shape.NH, shape.NKV, shape.HS, {int(n)}};
        const std::vector<X> own(qkv.begin() + long(first * QKV), qkv.begin() + long((first + n) * QKV));
        const std::vector<X> own_dout(dout.begin() + long(first * wide), dout.begin() + long((first + n) * wide));
        const Result<float> alone = device_attention(dev, alone_shape, own, own_dout);
        bool lse = true;
        for (size_t h = 0; h < size_t(shape.NH); h++) {
            lse = lse && same_bits(&alone.lse[h * n], &together.lse[h * N + first], n);
        }
        const std::string name = device_name(dev);
        CHECK(same_bits(alone.out.data(), &together.out[first * wide], n * wide), "%s: out of document of %zu",
              name.c_str(), n);
        CHECK(lse, "%s: lse of document of %zu", name.c_str(), n);
        CHECK(same_bits(alone.dqkv.data(), &together.dqkv[first * QKV], n * QKV), "%s: dqkv of document of %zu",
              name.c_str(), n);
    }
}

static void attention_packed() {
    for_each_storage([](auto& dev) { packed_on(dev); });
}

// One document and one kv head on several threads is cut into pieces, of fewer blocks the more threads there are; one
// thread takes it whole.
template <class X>
static void threads_on(Cpu<X>& dev) {
    for (const Shape& shape : {Shape{2, 1, 64, {700}}, Shape{6, 3, 16, {330, 20, 200}}}) {
        std::vector<float> qkv_float, dout_float;
        inputs_of(shape, 2, &qkv_float, &dout_float);
        const std::vector<X> qkv = stored<X>(qkv_float), dout = stored<X>(dout_float);
        const std::string name = device_name(dev);
        dev.threads = 1;
        const Result<float> one = device_attention(dev, shape, qkv, dout);
        for (int threads : {2, 3, 7, 64}) {
            dev.threads = threads;
            const Result<float> many = device_attention(dev, shape, qkv, dout);
            CHECK(same_bits(one.out.data(), many.out.data(), one.out.size()), "%s: out, %d threads", name.c_str(),
                  threads);
            CHECK(same_bits(one.lse.data(), many.lse.data(), one.lse.size()), "%s: lse, %d threads", name.c_str(),
                  threads);
            CHECK(same_bits(one.dqkv.data(), many.dqkv.data(), one.dqkv.size()), "%s: dqkv, %d threads", name.c_str(),
                  threads);
        }
    }
}

static void attention_threads() {
    for_each_storage([](auto& dev) { threads_on(dev); });
}

// The plan, executed by threads that take the next task when they are free. Work is counted in blocks of scores times
// products; packing a block of keys is about a fortieth of a product.
struct Shares {
    double greatest, mean, whole;  // of a thread; whole: the work if nothing were cut, over the threads
    std::vector<int> dq, dkv;      // how often each (head, block) is given a gradient, or an output
};

static Shares shares_of(int threads, const std::vector<int>& lengths, int NKV, bool backward) {
    const Starts s = starts_of(lengths);
    const AttentionPlan plan = attention_plan(threads, s.at.data(), s.documents(), NKV, backward);
    const size_t blocks = s.N() / ATTENTION_BLOCK + lengths.size() + 1;
    Shares r = {0, 0, 0, std::vector<int>(blocks * size_t(NKV)), std::vector<int>(blocks * size_t(NKV))};
    std::vector<double> busy(static_cast<size_t>(threads));
    for (size_t index = 0; index < plan.tasks; index++) {
        const AttentionTask t = attention_task(plan, index, s.at.data(), NKV, backward);
        double& thread = *std::min_element(busy.begin(), busy.end());
        size_t before = 0;  // blocks of the documents before, one more each for what is left over
        for (size_t d = 0; size_t(s.at[d]) < t.first; d++) {
            before += size_t(lengths[d]) / ATTENTION_BLOCK + 1;
        }
        double products = !backward ? 2 : t.dq && t.dkv ? 5 : t.dq ? 3 : 4, work = 0;
        for (size_t i = t.i0; i < t.i1; i++) {
            for (size_t j = t.j0; j < t.j1 && j <= i; j++) {
                work += i == j ? 0.5 : 1;
            }
            r.dq[(before + i) * size_t(NKV) + size_t(t.kv)] += t.dq || !backward;
        }
        for (size_t j = t.j0; j < t.j1; j++) {
            r.dkv[(before + j) * size_t(NKV) + size_t(t.kv)] += t.dkv;
        }
        thread += products * work + double(std::min(t.j1, t.i1) - t.j0) / 40;
    }
    for (int length : lengths) {
        const double n = double(length) / double(ATTENTION_BLOCK);
        r.whole += n * n / 2 * NKV * (backward ? 5 : 2) / threads;
    }
    r.greatest = *std::max_element(busy.begin(), busy.end());
    for (double work : busy) {
        r.mean += work / threads;
    }
    return r;
}

static void attention_shares() {
    struct Case {
        int threads, NKV;
        std::vector<int> lengths;
        double even, cost;  // bounds of greatest / mean, and of greatest / the share of work that is not cut
    };
    const std::vector<Case> cases = {
        {64, 8, {8192}, 1.3, 1.6},    {64, 4, {2048}, 1.3, 1.7},          {7, 4, {1024}, 1.3, 1.6},
        {3, 4, {1024, 64}, 1.3, 1.6}, {16, 8, {64, 100, 4096}, 1.3, 1.6}, {64, 8, {4096, 4096, 30, 700}, 1.3, 1.6},
        {2, 4, {512}, 1.01, 1.2},
    };
    for (const Case& c : cases) {
        for (bool backward : {false, true}) {
            const Shares s = shares_of(c.threads, c.lengths, c.NKV, backward);
            const std::string name = std::to_string(c.threads) + " threads, " + std::to_string(c.lengths[0]) +
                                     (backward ? " backward" : " forward");
            CHECK(s.greatest <= c.even * s.mean, "%s: greatest share %.2f of the mean", name.c_str(),
                  s.greatest / s.mean);
            CHECK(s.greatest <= c.cost * s.whole, "%s: greatest share %.2f of the work", name.c_str(),
                  s.greatest / s.whole);
            size_t before = 0;
            for (size_t d = 0; d < c.lengths.size(); d++) {
                const size_t blocks = (size_t(c.lengths[d]) + ATTENTION_BLOCK - 1) / ATTENTION_BLOCK;
                for (size_t i = before * size_t(c.NKV); i < (before + blocks) * size_t(c.NKV); i++) {
                    CHECK(s.dq[i] == 1 && s.dkv[i] == (backward ? 1 : 0), "%s: block %zu is made %d and %d times",
                          name.c_str(), i, s.dq[i], s.dkv[i]);
                }
                before += size_t(c.lengths[d]) / ATTENTION_BLOCK + 1;
            }
        }
    }
}

// A NaN reaches the rows that see it and no other document.
template <class X>
static void nan_on(Cpu<X>& dev) {
    const Shape shape = {2, 1, 16, {40, 40}};
    std::vector<float> qkv, dout;
    inputs_of(shape, 1, &qkv, &dout);
    const size_t QKV = 4 * 16, bad = 20;
    qkv[bad * QKV + 2 * 16] = std::numeric_limits<float>::quiet_NaN();  // the key of row 20
    const Result<float> got = device_attention(dev, shape, stored<X>(qkv), stored<X>(dout));
    const std::string name = device_name(dev);
    for (size_t row = 0; row < 80; row++) {
        bool seen = row >= bad && row < 40;
        CHECK(std::isnan(got.out[row * 32]) == seen, "%s: out of row %zu is %g", name.c_str(), row,
              double(got.out[row * 32]));
        CHECK(row < 40 || std::isfinite(got.dqkv[row * QKV]), "%s: dq of row %zu", name.c_str(), row);
    }
}

static void attention_nan() {
    for_each_tier([](Cpu<float>& dev) { nan_on(dev); });
}

// Where element (i, j) of a row of blocks stands: of sums, of a left operand, of a right one (leaf_attention_amx.inc).
static size_t place_sums(size_t i, size_t j) {
    return j / 32 * 1024 + i / 16 * 512 + j % 32 / 16 * 256 + i % 16 * 16 + j % 16;
}
static size_t place_left(size_t i, size_t j) {
    return j / 32 * 1024 + i * 32 + j % 32;
}
static size_t place_right(size_t i, size_t j) {
    return j / 32 * 1024 + j % 32 / 16 * 512 + i / 2 * 32 + j % 16 * 2 + i % 2;
}

// softmax and grad of `rows` rows that see seen + i of n: what they write and where. What no row sees is NaN.
static void check_scores(const AttentionTiles& tiles, size_t rows, size_t n, ptrdiff_t seen) {
    const size_t elements = (n + 31) / 32 * 1024;
    const float scale = 0.3f;
    const std::string name =
        std::to_string(rows) + " rows of " + std::to_string(n) + ", the first sees " + std::to_string(seen);
    const std::vector<float> values = random_values<float>(4 * elements, 31, 6);
    Guarded<float> s(elements), dp(elements), max(32), sum(32 * ATTENTION_LANES), f(32);
    Guarded<bf16> p(elements), right(elements), ds_left(elements), ds_right(elements);
    const auto sees = [&](size_t i, size_t j) { return i < rows && j < n && ptrdiff_t(j) < seen + ptrdiff_t(i); };
    float lse[32], D[32], before[32];
    for (size_t i = 0; i < 32; i++) {
        lse[i] = 2 + values[i] / 6;
        D[i] = values[32 + i];
        max[i] = before[i] = i % 3 == 0 ? -std::numeric_limits<float>::infinity() : values[64 + i] / 4;
        for (size_t j = 0; j < ATTENTION_LANES; j++) {
            sum[i * ATTENTION_LANES + j] = i % 3 == 0 ? 0 : float(j) / 8;
        }
        for (size_t j = 0; j < n; j++) {
            if (sees(i, j)) {
                s[place_sums(i, j)] = values[i * n + j];
                dp[place_sums(i, j)] = values[2 * elements + i * n + j];
            }
        }
    }
    tiles.softmax(p.data(), s.data(), rows, n, seen, scale, max.data(), sum.data(), f.data());
    tiles.grad(right.data(), ds_left.data(), ds_right.data(), s.data(), dp.data(), rows, n, seen, scale, lse, D);
    CHECK(p.intact() && right.intact() && ds_left.intact() && ds_right.intact() && f.intact() && sum.intact() &&
              max.intact() && s.intact(),
          "%s: written outside", name.c_str());
    // A rounding to bf16 is at most 2^-8 of the value; beside it, float's roundings of arguments up to 12.
    const double error = 0x1p-8 + 4e-6;
    for (size_t i = 0; i < 32; i++) {
        double greatest = before[i], total = 0, had = 0;
        for (size_t j = 0; j < n; j++) {
            greatest = sees(i, j) ? std::max(greatest, double(scale) * double(s[place_sums(i, j)])) : greatest;
        }
        for (size_t j = 0; j < elements / 32; j++) {
            const float got = to_float(p[place_left(i, j)]), prob = to_float(right[place_right(i, j)]);
            const float ds = to_float(ds_left[place_left(i, j)]), again = to_float(ds_right[place_right(i, j)]);
            if (!sees(i, j)) {
                CHECK(got == 0 && prob == 0 && ds == 0 && again == 0, "%s: row %zu does not see %zu: %g, %g, %g, %g",
                      name.c_str(), i, j, double(got), double(prob), double(ds), double(again));
                continue;
            }
            const double x = double(scale) * double(s[place_sums(i, j)]), e = std::exp(x - greatest);
            const double P = std::exp(x - double(lse[i]));
            const double want = P * (double(dp[place_sums(i, j)]) - double(D[i]));
            total += e;
            const bool right_values = std::fabs(double(got) - e) <= error * e &&
                                      std::fabs(double(prob) - P) <= error * P &&
                                      std::fabs(double(ds) - want) <= error * std::fabs(want) + 4e-6 * P && ds == again;
            CHECK(right_values, "%s: (%zu, %zu): %g for %g, %g for %g, %g and %g for %g", name.c_str(), i, j,
                  double(got), e, double(prob), P, double(ds), double(again), want);
        }
        if (i < rows) {
            const double shrink = greatest == double(before[i]) ? 1 : std::exp(double(before[i]) - greatest);
            for (size_t j = 0; j < ATTENTION_LANES; j++) {
                had += double(sum[i * ATTENTION_LANES + j]);
            }
            const double sums = (i % 3 == 0 ? 0 : 15) * shrink + total;  // 0 / 8 + 1 / 8 + ... + 15 / 8
            CHECK(std::fabs(double(f[i]) - shrink) <= 4e-6 * shrink, "%s: f of row %zu", name.c_str(), i);
            CHECK(std::fabs(had - sums) <= 4e-6 * sums, "%s: sum of row %zu: %g, need %g", name.c_str(), i, had, sums);
            CHECK(double(max[i]) == greatest || std::fabs(double(max[i]) - greatest) <= 1e-6, "%s: max of row %zu",
                  name.c_str(), i);
        } else {
            CHECK(f[i] == 1, "%s: f of row %zu, which is none", name.c_str(), i);
        }
    }
}

// The leaves of tiles that know no tiles.
static void attention_scores_bf16() {
    const CpuIsa* isa = cpu_isa_choose("amx");
    if (!isa || !isa->attention_tiles) {
        test_skip("no tier amx here");
        return;
    }
    for (size_t rows : {size_t(1), size_t(7), size_t(16), size_t(31), size_t(32)}) {
        for (size_t n : {size_t(1), size_t(32), size_t(37), size_t(64), size_t(128)}) {
            for (ptrdiff_t seen : {ptrdiff_t(-40), ptrdiff_t(-2), ptrdiff_t(1), ptrdiff_t(17), ptrdiff_t(128)}) {
                check_scores(*isa->attention_tiles, rows, n, seen);
            }
        }
    }
}

// By tiles: against the formula on what is stored, with a plain evaluation in float that rounds P and dS as the tiles
// do. They may differ in which of two neighbours a value next to the middle becomes, and, beyond 128 keys, in the
// maximum that had been seen when P was rounded: twice its error. Results are rounded once more.
static void attention_tiles_bf16() {
    Cpu<bf16> dev;
    device_open(dev, 2);
    dev.isa = cpu_isa_choose("amx");
    if (!dev.isa || !dev.isa->attention_tiles) {
        test_skip("no tier amx here");
        return;
    }
    const std::vector<int> lengths = {1, 7, 31, 32, 33, 64, 100, 400};
    const std::vector<Shape> own = {{1, 1, 16, lengths},       {3, 1, 64, lengths},    {8, 2, 80, {33, 1, 100, 65}},
                                    {3, 3, 128, {400, 7, 31}}, {4, 1, 128, {64, 129}}, {9, 3, 6, {33}},
                                    {2, 1, 18, {1, 1}},        {2, 2, 96, {127, 16}}};
    for (const Shape& shape : own) {
        for (double size : {1.0, 6.0}) {  // 6: some rows put nearly all weight on one key
            std::vector<float> qkv_float, dout_float;
            inputs_of(shape, size, &qkv_float, &dout_float);
            const std::vector<bf16> qkv = stored<bf16>(qkv_float), dout = stored<bf16>(dout_float);
            const Result<float> got = device_attention(dev, shape, qkv, dout);
            const Result<double> want =
                plain_attention(shape, values_of<double>(qkv), values_of<double>(dout), values_of<double>(got.out));
            const Result<float> plain =
                plain_attention(shape, values_of<float>(qkv), values_of<float>(dout), got.out, true);
            const std::string name = name_of(shape);
            // 4 roundings of the sums behind a score, and behind dS K, where a plain evaluation has no error.
            const double lse_floor = 4 * 6e-8 * want.score_term, dqkv_floor = 4 * 6e-8 * want.gradient_term;
            CHECK_ERROR(name + ": out", error_beyond_rounding(got.out, want.out), float_bound(plain.out, want.out));
            CHECK_ERROR(name + ": lse", greatest_error(got.lse.data(), want.lse.data(), want.lse.size()),
                        std::max(lse_floor, float_bound(plain.lse, want.lse)));
            const size_t N = starts_of(shape.lengths).N(), QKV = want.dqkv.size() / N, HS = size_t(shape.HS);
            const size_t begins[] = {0, size_t(shape.NH) * HS, size_t(shape.NH + shape.NKV) * HS, QKV};
            for (int part = 0; part < 3; part++) {  // each to its own bound: dV is greater than the others
                const size_t from = begins[part], to = begins[part + 1];
                std::vector<float> mine, bound;
                std::vector<double> exact;
                for (size_t i = 0; i < N * QKV; i++) {
                    if (i % QKV >= from && i % QKV < to) {
                        mine.push_back(got.dqkv[i]);
                        bound.push_back(plain.dqkv[i]);
                        exact.push_back(want.dqkv[i]);
                    }
                }
                CHECK_ERROR(name + ": d" + "qkv"[part], error_beyond_rounding(mine, exact),
                            std::max(dqkv_floor, float_bound(bound, exact)));
            }
        }
    }
    packed_on(dev);
    threads_on(dev);
    nan_on(dev);

    // All of this would hold for sums in float of the same inputs: P is rounded to bf16.
    CpuIsa without = *dev.isa;
    without.attention_tiles = nullptr;
    const Shape shape = {2, 1, 64, {100}};
    std::vector<float> qkv, dout;
    inputs_of(shape, 1, &qkv, &dout);
    const Result<float> tiles = device_attention(dev, shape, stored<bf16>(qkv), stored<bf16>(dout));
    dev.isa = &without;
    const Result<float> floats = device_attention(dev, shape, stored<bf16>(qkv), stored<bf16>(dout));
    CHECK(greatest_error(tiles.out.data(), floats.out.data(), floats.out.size()) > 0, "out is that of floats");
    CHECK(greatest_error(tiles.dqkv.data(), floats.dqkv.data(), floats.dqkv.size()) > 0, "dqkv is that of floats");
    device_close(dev);
}

extern const Test attention_tests[] = {{"attention_double", attention_double},
                                       {"attention_differences", attention_differences},
                                       {"attention_tiers", attention_tiers},
                                       {"attention_bf16", attention_bf16},
                                       {"attention_packed", attention_packed},
                                       {"attention_threads", attention_threads},
                                       {"attention_shares", attention_shares},
                                       {"attention_nan", attention_nan},
                                       {"attention_scores_bf16", attention_scores_bf16},
                                       {"attention_tiles_bf16", attention_tiles_bf16},
                                       {nullptr, nullptr}};
