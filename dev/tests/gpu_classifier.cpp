// The head on the GPU: against the CPU's in double, ties and ends of the vocabulary, logits whose exp overflows, heads
// that are stored in another type than the activations.
#include <algorithm>

#include "dev/tests/gpu.h"

namespace {

struct HeadShape {
    const char* name;
    size_t N;
    int C, V;
    double spread;  // of the logits
    size_t every;   // a row in so many has a label
};
const HeadShape head_shapes[] = {
    {"one row", 1, 16, 10, 1, 1},         {"odd", 37, 48, 101, 1, 3},
    {"steep", 24, 40, 70, 300, 1},                                                // exp of a logit would overflow
    {"wide", 6, 64, 3072, 2, 1},          {"several walks", 3, 16, 20011, 2, 1},  // of a block over its row
    {"several chunks", 4200, 8, 9, 1, 1},                                         // of rows
    {"vocabulary of one", 4, 8, 1, 1, 1},
};

// x rstd norm_w W^T, or x W^T; x, W and norm_w in numbers that X holds, W in numbers that bf16 holds.
template <class X>
struct HeadData {
    HeadShape shape;
    std::vector<double> x, rstd, norm_w, w;
    std::vector<int32_t> rows, labels;
    bool norm = true;
};

template <class X>
HeadData<X> head_data(const HeadShape& shape) {
    HeadData<X> h;
    h.shape = shape;
    const size_t C = size_t(shape.C), V = size_t(shape.V);
    h.x = random_stored<X>(shape.N * C, 1);
    h.norm_w = random_stored<X>(C, 2);
    h.w = random_stored<bf16>(C * V, 3);
    h.rstd = random_stored<float>(shape.N, 4, shape.spread);
    for (size_t i = 0; i < shape.N; i += shape.every) {
        h.rows.push_back(int32_t(i));
        h.labels.push_back(int32_t(random_below(5, STREAM_TOKENS, 0, i, V)));
    }
    h.labels.front() = int32_t(V) - 1;
    h.labels.back() = 0;
    return h;
}

struct HeadResult {
    std::vector<double> losses, din, logits;
    std::vector<uint8_t> correct;
};

template <class X>
HeadResult head_exact(const HeadData<X>& h, double scale) {
    DoubleDevice dev(1);
    const size_t n = h.rows.size(), C = size_t(h.shape.C), V = size_t(h.shape.V);
    HeadResult r;
    std::vector<float> w(h.w.begin(), h.w.end());
    Matrix head;
    head.rows = int(V);
    head.cols = int(C);
    head.data = w.data();
    LinearInput<double, double> in;
    in.kind = h.norm ? in.RMSNORM : in.PLAIN;
    in.x = h.x.data();
    in.stride = C;
    in.rstd = h.rstd.data();
    in.norm_w = h.norm_w.data();
    r.losses.resize(n);
    r.correct.resize(n);
    r.din.resize(h.shape.N * C);
    r.logits.resize(n * V);
    device_reserve(dev, classifier_workspace(dev, h.shape.C, h.shape.V, n));
    classifier(dev, r.losses.data(), r.correct.data(), r.din.data(), in, head, h.rows.data(), h.labels.data(), n,
               h.shape.N, scale);
    head_logits(dev, r.logits.data(), in, head, h.rows.data(), n);
    return r;
}

// In floats, one after another, rounded to X where a framework stores a tensor: the norm twice, the logits, their
// gradient, and dx. head_logits keeps the logits in fp32.
template <class X>
HeadResult head_plain(const HeadData<X>& h, double scale) {
    const size_t n = h.rows.size(), C = size_t(h.shape.C), V = size_t(h.shape.V);
    HeadResult r;
    r.din.assign(h.shape.N * C, 0);
    std::vector<float> logits(V), x(C), dx(C);
    for (size_t i = 0; i < n; i++) {
        const size_t row = size_t(h.rows[i]);
        for (size_t c = 0; c < C; c++) {
            const float value = float(h.x[row * C + c]);
            x[c] = h.norm ? float(rounded<X>(rounded<X>(double(value * float(h.rstd[row]))) * h.norm_w[c])) : value;
        }
        float max = -INFINITY, sum = 0;
        for (size_t v = 0; v < V; v++) {
            float s = 0;
            for (size_t c = 0; c < C; c++) {
                s += x[c] * float(h.w[v * C + c]);
            }
            r.logits.push_back(double(s));
            logits[v] = float(rounded<X>(double(s)));
            max = std::max(max, logits[v]);
        }
        for (size_t v = 0; v < V; v++) {
            sum += std::exp(logits[v] - max);
        }
        const float lse = max + std::log(sum);
        r.losses.push_back(double(lse - logits[size_t(h.labels[i])]));
        std::fill(dx.begin(), dx.end(), 0.0f);
        for (size_t v = 0; v < V; v++) {
            const float p = std::exp(logits[v] - lse) - float(int32_t(v) == h.labels[i]);
            const float d = float(rounded<X>(double(p * float(scale))));
            for (size_t c = 0; c < C; c++) {
                dx[c] += d * float(h.w[v * C + c]);
            }
        }
        for (size_t c = 0; c < C; c++) {
            r.din[row * C + c] = rounded<X>(double(dx[c]));
        }
    }
    return r;
}

std::vector<unsigned char> head_bytes(const std::vector<double>& w, Store store) {
    std::vector<unsigned char> bytes;
    for (double value : w) {
        const float f = float(value);
        const uint16_t narrow = to_bf16(f).bits;
        const unsigned char* p = store == Store::F32 ? reinterpret_cast<const unsigned char*>(&f)
                                                     : reinterpret_cast<const unsigned char*>(&narrow);
        bytes.insert(bytes.end(), p, p + (store == Store::F32 ? 4 : 2));
    }
    return bytes;
}

// stride > C: gaps behind the rows of x. shift: x and din begin off the grid of 16 bytes.
template <class X>
HeadResult head_run(Gpu<X>& dev, const HeadData<X>& h, Store store, float scale, bool want_din = true, size_t gap = 0,
                    size_t shift = 0) {
    const size_t n = h.rows.size(), N = h.shape.N, C = size_t(h.shape.C), V = size_t(h.shape.V);
    std::vector<X> spread(N * (C + gap), stored<X>(std::nan("")));
    for (size_t i = 0; i < N * C; i++) {
        spread[i / C * (C + gap) + i % C] = stored<X>(h.x[i]);
    }
    GpuBuffer<X, X> x(dev, spread, shift), din(dev, N * C, shift);
    GpuBuffer<float, X> rstd(dev, stored_values<float>(h.rstd)), norm_w(dev, stored_values<float>(h.norm_w));
    GpuBuffer<unsigned char, X> w(dev, head_bytes(h.w, store));
    GpuBuffer<int32_t, X> rows(dev, h.rows), labels(dev, h.labels);
    GpuBuffer<float, X> losses(dev, n), logits(dev, n * V);
    GpuBuffer<uint8_t, X> correct(dev, n);
    Matrix head;
    head.store = store;
    head.rows = int(V);
    head.cols = int(C);
    head.data = w.data();
    LinearInput<X, float> in;
    in.kind = h.norm ? in.RMSNORM : in.PLAIN;
    in.x = x.data();
    in.stride = C + gap;
    in.rstd = rstd.data();
    in.norm_w = norm_w.data();
    device_reserve(dev, classifier_workspace(dev, h.shape.C, h.shape.V, n));
    const std::vector<unsigned char> poison(dev.workspace_bytes, 0xff);
    device_to(dev, dev.workspace, poison.data(), poison.size());
    classifier(dev, losses.data(), correct.data(), want_din ? din.data() : nullptr, in, head, rows.data(),
               labels.data(), n, N, scale);
    head_logits(dev, logits.data(), in, head, rows.data(), n);
    CHECK(losses.intact() && correct.intact() && din.intact() && logits.intact(), "%s: written outside", h.shape.name);
    HeadResult r = {numbers(losses.get()), numbers(din.get()), numbers(logits.get()), correct.get()};
    CHECK(want_din || std::all_of(r.din.begin(), r.din.end(), [](double d) { return std::isnan(d); }),
          "%s: din written though not wanted", h.shape.name);
    return r;
}

bool same_result(const HeadResult& a, const HeadResult& b) {
    return a.losses == b.losses && a.din == b.din && a.logits == b.logits && a.correct == b.correct;
}

template <class X>
constexpr Store own_store = sizeof(X) == 2 ? Store::BF16 : Store::F32;

template <class X>
void classifier_of_type() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    // a loss is one number a row: those of all shapes are judged together, but for the steep ones
    std::vector<double> got, plain_losses, exact_losses;
    for (const HeadShape& shape : head_shapes) {
        const HeadData<X> h = head_data<X>(shape);
        const HeadResult exact = head_exact(h, 0.25), plain = head_plain(h, 0.25);
        const HeadResult r = head_run<X>(dev, h, own_store<X>, 0.25f);
        const std::string name = std::string(shape.name) + (sizeof(X) == 2 ? ", bf16" : ", float");
        check_yardstick<float>(name + ": logits", r.logits, plain.logits, exact.logits);
        check_yardstick<X>(name + ": din", r.din, plain.din, exact.din);
        if (shape.spread > 100) {
            check_yardstick<X>(name + ": losses", r.losses, plain.losses, exact.losses);
        } else {
            got.insert(got.end(), r.losses.begin(), r.losses.end());
            plain_losses.insert(plain_losses.end(), plain.losses.begin(), plain.losses.end());
            exact_losses.insert(exact_losses.end(), exact.losses.begin(), exact.losses.end());
        }
        // correct, where the label's logit is clear of all others by some units of bf16
        const size_t V = size_t(shape.V);
        for (size_t i = 0; i < h.rows.size(); i++) {
            const double* logits = &exact.logits[i * V];
            const double target = logits[h.labels[i]], size = greatest(logits, V);
            bool clear = true;
            for (size_t v = 0; v < V; v++) {
                clear = clear && (int32_t(v) == h.labels[i] || std::fabs(logits[v] - target) > size / 50);
            }
            CHECK(!clear || r.correct[i] == exact.correct[i], "%s: row %zu: correct is %d", name.c_str(), i,
                  r.correct[i]);
            CHECK(r.correct[i] <= 1, "%s: row %zu: correct is %d", name.c_str(), i, r.correct[i]);
        }
        for (size_t row = 0; row < shape.N; row++) {
            const double* d = &r.din[row * size_t(shape.C)];
            const bool labelled = row % shape.every == 0;
            CHECK(labelled || std::all_of(d, d + shape.C, [](double x) { return x == 0; }),
                  "%s: row %zu has no label, yet a gradient", name.c_str(), row);
        }
        CHECK(same_result(r, head_run<X>(dev, h, own_store<X>, 0.25f)), "%s: other bits the second time", name.c_str());
        const HeadResult forward = head_run<X>(dev, h, own_store<X>, 0.25f, false);
        CHECK(forward.losses == r.losses && forward.correct == r.correct, "%s: other losses without din", name.c_str());
    }
    check_yardstick<X>("losses", got, plain_losses, exact_losses);
}

void classifier_bf16() {
    classifier_of_type<bf16>();
}

void classifier_float() {
    classifier_of_type<float>();
}

// Rows that are taken as they stand, from memory with gaps and off the grid; and the same with a norm.
template <class X>
void classifier_inputs_of_type() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    for (bool norm : {false, true}) {
        HeadData<X> h = head_data<X>(head_shapes[1]);
        h.norm = norm;
        const HeadResult whole = head_run<X>(dev, h, own_store<X>, 1), exact = head_exact(h, 1),
                         plain = head_plain(h, 1);
        check_yardstick<X>("din", whole.din, plain.din, exact.din);
        check_yardstick<float>("logits", whole.logits, plain.logits, exact.logits);
        CHECK(same_result(whole, head_run<X>(dev, h, own_store<X>, 1, true, 16, 0)), "norm %d: gaps move bits", norm);
        CHECK(same_result(whole, head_run<X>(dev, h, own_store<X>, 1, true, 3, 1)), "norm %d: the grid moves bits",
              norm);
    }
}

void classifier_inputs() {
    classifier_inputs_of_type<bf16>();
    classifier_inputs_of_type<float>();
}

// Equal logits: the lowest id is the arg max. 2 and -3 are exact in every type.
template <class X>
void classifier_ties_of_type() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    HeadData<X> h;
    h.shape = {"ties", 1, 8, 400, 1, 1};
    h.norm = false;
    h.x = {1, 0, 0, 0, 0, 0, 0, 0};
    h.norm_w.assign(8, 1);
    h.rstd = {1};
    h.rows = {0};
    for (size_t v = 0; v < 400; v++) {
        h.w.insert(h.w.end(), 8, 0);
        h.w[v * 8] = v == 5 || v == 6 || v == 300 || v == 399 ? 2 : -3;
    }
    const double log_sum = std::log(4 + 396 * std::exp(-5.0));  // on top of the greatest, 2
    for (int32_t label : {5, 6, 300, 399, 0, 398}) {
        h.labels = {label};
        const HeadResult r = head_run<X>(dev, h, own_store<X>, 1);
        const bool tied = label == 5 || label == 6 || label == 300 || label == 399;
        CHECK(r.correct[0] == (label == 5), "label %d: correct is %d", label, r.correct[0]);
        // three float operations on numbers up to 8
        CHECK_ERROR("loss", std::fabs(r.losses[0] - (log_sum + (tied ? 0 : 5))), 8 * 3 * 6e-8);
    }
}

void classifier_ties() {
    classifier_ties_of_type<bf16>();
    classifier_ties_of_type<float>();
}

// Logits of -30,000 to 30,000: the loss is their difference, the gradient that of an arg max.
template <class X>
void classifier_extreme_of_type() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    HeadData<X> h;
    h.shape = {"extreme", 2, 8, 101, 1, 1};
    h.norm = false;
    h.x.assign(16, 0);
    h.x[0] = h.x[8] = 1;
    h.norm_w.assign(8, 1);
    h.rstd = {1, 1};
    h.rows = {0, 1};
    h.labels = {100, 50};
    for (size_t v = 0; v < 101; v++) {
        h.w.insert(h.w.end(), 8, 0);
        h.w[v * 8] = v == 50 ? 29952 : v == 100 ? -29952 : -512;
        h.w[v * 8 + 1] = v == 50 ? 1 : v == 100 ? 2 : 0;
    }
    const HeadResult r = head_run<X>(dev, h, own_store<X>, 0.5f);
    CHECK(r.losses[0] == 59904 && r.losses[1] == 0, "losses %g and %g", r.losses[0], r.losses[1]);
    CHECK(r.correct[0] == 0 && r.correct[1] == 1, "correct %d and %d", r.correct[0], r.correct[1]);
    // dlogits are 0.5 at 50 and -0.5 at the label, and nothing in the second row
    CHECK(r.din[1] == 0.5 * 1 - 0.5 * 2 && r.din[0] == 0.5 * 29952 + 0.5 * 29952, "din %g %g", r.din[0], r.din[1]);
    CHECK(r.din[8] == 0 && r.din[9] == 0, "din of the second row %g %g", r.din[8], r.din[9]);
}

void classifier_extreme() {
    classifier_extreme_of_type<bf16>();
    classifier_extreme_of_type<float>();
}

void classifier_nothing() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    HeadData<bf16> h = head_data<bf16>(head_shapes[1]);
    h.rows.clear();
    h.labels.clear();
    const HeadResult r = head_run<bf16>(dev, h, Store::BF16, 1);
    CHECK(std::all_of(r.din.begin(), r.din.end(), [](double d) { return d == 0; }), "no labels, yet din is not zero");
}

// What a chunk takes: about 256 MB of bf16 logits of the whole vocabulary of Llama 3, a few KB a row of a small one.
void classifier_bytes() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    const size_t large = classifier_workspace(dev, 4096, 128256, 8192), small = classifier_workspace(dev, 64, 512, 300);
    CHECK(large >= size_t(256) << 20 && large <= size_t(512) << 20, "%zu bytes", large);
    CHECK(small <= size_t(300) * (512 + 64 * 3) * 2 + 512 * 64 * 2 + 4 * 256, "%zu bytes", small);
    CHECK(classifier_workspace(dev, 4096, 128256, 100000) == large, "more rows need more");
}

}  // namespace

extern const Test gpu_classifier_tests[] = {{"gpu_classifier_bf16", classifier_bf16},
                                            {"gpu_classifier_float", classifier_float},
                                            {"gpu_classifier_inputs", classifier_inputs},
                                            {"gpu_classifier_ties", classifier_ties},
                                            {"gpu_classifier_extreme", classifier_extreme},
                                            {"gpu_classifier_nothing", classifier_nothing},
                                            {"gpu_classifier_bytes", classifier_bytes},
                                            {nullptr, nullptr}};
