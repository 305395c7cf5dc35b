// The whole model against PyTorch + PEFT (the dumps of dev/ref), against finite differences, and against itself.
#include "dev/tests/fixture.h"
#include "dev/tests/ops.h"

// ---------------------------------------------------------------------------------------------------------------------
// dumps

// err.NAME of the dump is PyTorch's own fp32 error against fp64, and the dump holds that fp32 run. In float ours may
// err at most twice as much, so |ours - theirs| <= (2 + 1) err. In double ours keeps of that error only the RoPE
// angles, which are fp32 in both: (1 + 1) err. All relative to the tensor's rms. The floor is 16 units of fp32
// rounding: for single numbers and short tensors PyTorch's error may be zero by luck. `trained`: after steps of Adam, which
// makes a whole step of a gradient near zero whichever sign rounding gave it, single elements go by luck too; then the
// root mean square counts.
template <class Dev>
constexpr double error_factor = sizeof(typename Dev::real) == 8 ? 2 : 3;

static void compare(const Dump& d, const std::string& name, const std::vector<double>& ours, double factor,
                    bool trained = false) {
    std::vector<double> theirs = d.numbers(name);
    if (!CHECK(ours.size() == theirs.size(), "%s: %zu values, the dump has %zu", name.c_str(), ours.size(),
               theirs.size())) {
        return;
    }
    double worst = 0;
    bool nan = false;
    for (size_t i = 0; i < ours.size(); i++) {
        nan |= std::isnan(ours[i]);
        worst = std::max(worst, std::fabs(ours[i] - theirs[i]));
    }
    double bound = std::max(factor * d.numbers("err." + name)[0], 16 * 0x1p-24);
    const double error = trained ? rms_error(ours, theirs) : worst;
    CHECK_ERROR(test_state.name + (": " + name), nan ? NAN : error / rms(theirs), bound);
}

template <class X>
static std::vector<double> columns(const X* x, size_t N, size_t stride, size_t first, size_t width) {
    std::vector<double> out;
    for (size_t i = 0; i < N; i++) {
        for (size_t j = 0; j < width; j++) {
            out.push_back(double(x[i * stride + first + j]));
        }
    }
    return out;
}

template <class Dev>
static void compare_activations(Fixture<Dev>& f) {
    using X = typename Dev::floatX;
    Llama<Dev>& m = f.m;
    const LlamaConfig& c = m.c;
    const double factor = error_factor<Dev>;
    const size_t N = f.batch.size(), ATT = size_t(c.NH) * c.HS, KV = size_t(c.NKV) * c.HS, QKV = ATT + 2 * KV;
    compare(f.dump, "embed", columns(m.acts.resid, N, c.C, 0, c.C), factor);
    std::vector<X> norm(N * c.C), swiglu(N * c.F);
    for (int l = 0; l < c.L; l++) {
        LayerActivations<Dev> y = layer_activations(m, l);
        std::string layer = "layers." + std::to_string(l) + ".";
        compare(f.dump, layer + "resid_in", columns(y.x, N, c.C, 0, c.C), factor);
        rmsnorm_forward(m.dev, norm.data(), y.x, y.rstd1, m.w.layers[l].norm1, N, c.C);
        compare(f.dump, layer + "norm1", columns(norm.data(), N, c.C, 0, c.C), factor);
        compare(f.dump, layer + "q", columns(y.qkv, N, QKV, 0, ATT), factor);
        compare(f.dump, layer + "k", columns(y.qkv, N, QKV, ATT, KV), factor);
        compare(f.dump, layer + "v", columns(y.qkv, N, QKV, ATT + KV, KV), factor);
        compare(f.dump, layer + "attn", columns(y.attn, N, ATT, 0, ATT), factor);
        compare(f.dump, layer + "resid_mid", columns(y.mid, N, c.C, 0, c.C), factor);
        rmsnorm_forward(m.dev, norm.data(), y.mid, y.rstd2, m.w.layers[l].norm2, N, c.C);
        compare(f.dump, layer + "norm2", columns(norm.data(), N, c.C, 0, c.C), factor);
        compare(f.dump, layer + "gate", columns(y.gate_up, N, 2 * size_t(c.F), 0, c.F), factor);
        compare(f.dump, layer + "up", columns(y.gate_up, N, 2 * size_t(c.F), c.F, c.F), factor);
        swiglu_forward(m.dev, swiglu.data(), y.gate_up, N, c.F);
        compare(f.dump, layer + "swiglu", columns(swiglu.data(), N, c.F, 0, c.F), factor);
        compare(f.dump, layer + "resid_out", columns(y.next, N, c.C, 0, c.C), factor);
    }
    rmsnorm_forward(m.dev, norm.data(), layer_activations(m, c.L - 1).next, m.acts.rstd, m.w.final_norm, N, c.C);
    compare(f.dump, "final_norm", columns(norm.data(), N, c.C, 0, c.C), factor);
    std::vector<int32_t> rows(N);
    for (size_t i = 0; i < N; i++) {
        rows[i] = int32_t(i);
    }
    std::vector<typename Dev::real> logits(N * c.V);
    head_logits(m.dev, logits.data(), head_input(m), m.w.head, rows.data(), N);
    compare(f.dump, "logits", columns(logits.data(), N, c.V, 0, c.V), factor);
}

// Adapter values p (any flat buffer of the layout) against PREFIX.KEY for every A and B.
template <class Dev>
static void compare_adapter(Fixture<Dev>& f, const typename Dev::real* p, const std::string& prefix, double factor) {
    each_adapter(f.m.c, f.m.adapter.lora,
                 [&](const std::string& name, int, int, bool, int rows, int cols, size_t offset) {
                     compare(f.dump, prefix + name, columns(p + offset, 1, 0, 0, size_t(rows) * cols), factor,
                             prefix == "final.");
                 });
}

template <class Dev>
static void dump_test(const char* name, int steps = 20) {
    Fixture<Dev> f;
    fixture_open(f, name);
    if (f.ok) {
        const double factor = error_factor<Dev>;
        const size_t n = f.batch.n_labels;
        double loss = fixture_gradient(f.m, f.batch, n);
        compare(f.dump, "loss", {loss}, factor);
        compare_activations(f);
        compare_adapter(f, f.m.adapter.g, "grad.", factor);
        std::vector<double> losses, norms;
        for (int step = 1; step <= steps; step++) {
            losses.push_back(fixture_gradient(f.m, f.batch, n));
            norms.push_back(llama_gradient_norm(f.m));
            AdamW a = {1e-2, 0.9, 0.999, 1e-6, 0.01, step, std::min(1.0, 1.0 / (norms.back() + 1e-6))};
            llama_update(f.m, a);
        }
        if (steps == 0) {
            fixture_close(f);
            return;
        }
        compare(f.dump, "losses", losses, factor);
        compare(f.dump, "grad_norms", norms, factor);
        compare_adapter(f, f.m.adapter.p, "final.", factor);
    }
    fixture_close(f);
}

static void dump_gqa_llama3() {
    dump_test<Cpu<float>>("gqa_llama3");
}
static void dump_tied() {
    dump_test<Cpu<float>>("tied");
}
static void dump_head_dim() {
    dump_test<Cpu<float>>("head_dim");
}
static void dump_odd_width() {
    dump_test<Cpu<float>>("odd_width");
}
static void dump_bnb_nf4() {
    dump_test<Cpu<float>>("bnb_nf4");
}
static void dump_qv_only() {
    dump_test<Cpu<float>>("qv_only");
}
static void dump_linear_rslora() {
    dump_test<Cpu<float>>("linear_rslora");
}

// In double the same code must agree with the same dumps: their fp32 error is then the only one.
static void dump_in_double() {
    for (const char* name : reference_names) {
        dump_test<Cpu<double>>(name);
    }
}

// Every tier that this processor has passes the same dumps. One step only: the ref tier has no fused multiply-add and
// sums in one accumulator, and AdamW blows its few roundings more up (20 steps are held on the machine's best tier).
static void dump_on_every_tier() {
    const char* before = getenv("TRAIN_LLAMA_CPU");
    std::string restore = before ? before : "";
    for (const char* tier : {"ref", "avx2", "avx512"}) {
        if (cpu_isa_choose(tier) != nullptr) {
            setenv("TRAIN_LLAMA_CPU", tier, 1);
            dump_test<Cpu<float>>("gqa_llama3", 0);
            dump_test<Cpu<float>>("bnb_nf4", 0);
        }
    }
    if (before != nullptr) {
        setenv("TRAIN_LLAMA_CPU", restore.c_str(), 1);
    } else {
        unsetenv("TRAIN_LLAMA_CPU");
    }
}

// What a bitsandbytes checkpoint stands for, bit for bit.
static void bnb_weights_as_stored() {
    Fixture<Cpu<float>> f;
    fixture_open(f, "bnb_nf4");
    const std::pair<const char*, int> stored[] = {{"dequantised.model.layers.0.self_attn.k_proj.weight", K_PROJ},
                                                  {"dequantised.model.layers.0.mlp.gate_proj.weight", GATE_PROJ}};
    for (const auto& s : stored) {
        const Matrix& w = f.m.w.layers[0].linear[s.second];
        std::vector<bf16> theirs = f.dump.values<bf16>(s.first);
        std::vector<float> row(w.cols);
        size_t wrong = 0;
        for (int i = 0; i < w.rows && theirs.size() == w.elements(); i++) {
            matrix_row(f.m.dev, row.data(), w, i);
            for (int j = 0; j < w.cols; j++) {
                wrong += !(row[j] == to_float(theirs[size_t(i) * w.cols + j]));
            }
        }
        CHECK(theirs.size() == w.elements() && wrong == 0, "%s: %zu of %zu weights differ", s.first, wrong,
              theirs.size());
    }
    fixture_close(f);
}

// ---------------------------------------------------------------------------------------------------------------------
// finite differences

// Central differences of the loss in double. With h = 1e-5 the truncation is about h^2 and the rounding about 1e-16 /
// h, both some 1e-10 of the loss, so 1e-6 of the gradient's rms leaves room for small gradients and none for a wrong
// term.
static void gradient_check(const char* name, const FixtureOptions& o) {
    Fixture<Cpu<double>> f;
    fixture_open(f, name, o);
    if (!f.ok) {
        return;
    }
    const size_t n = f.batch.n_labels;
    fixture_gradient(f.m, f.batch, n);
    std::vector<double> g(f.m.adapter.g, f.m.adapter.g + f.m.adapter.size);
    each_adapter(f.m.c, f.m.adapter.lora,
                 [&](const std::string& key, int, int, bool, int rows, int cols, size_t offset) {
                     const size_t size = size_t(rows) * cols;
                     double scale = rms(std::vector<double>(g.begin() + offset, g.begin() + offset + size));
                     for (size_t k = 0; k < 3; k++) {
                         double* x = f.m.adapter.p + offset + random_below(7, STREAM_TOKENS, offset, k, size);
                         const double at = *x, h = 1e-5;
                         *x = at + h;
                         double up = fixture_gradient(f.m, f.batch, n);
                         *x = at - h;
                         double down = fixture_gradient(f.m, f.batch, n);
                         *x = at;
                         double error = std::fabs((up - down) / (2 * h) - g[x - f.m.adapter.p]);
                         CHECK_ERROR(std::string(name) + " " + key, error / scale, 1e-6);
                     }
                 });
    fixture_close(f);
}

static void gradient_of_the_model() {
    for (const char* name : {"gqa_llama3", "odd_width", "qv_only"}) {
        gradient_check(name, {});
    }
}

static void gradient_with_dropout() {
    FixtureOptions o;
    o.dropout = 0.25f;
    gradient_check("gqa_llama3", o);
}

static void gradient_on_nf4() {
    FixtureOptions o;
    o.base.nf4 = true;
    gradient_check("odd_width", o);
}

// ---------------------------------------------------------------------------------------------------------------------
// the model against itself

// One step's gradient and loss as bytes.
template <class Dev>
static std::string step_bytes(const FixtureOptions& o, double* loss = nullptr) {
    Fixture<Dev> f;
    fixture_open(f, "gqa_llama3", o);
    double l = fixture_gradient(f.m, f.batch, f.batch.n_labels);
    std::string bytes(reinterpret_cast<const char*>(f.m.adapter.g), f.m.adapter.size * sizeof(*f.m.adapter.g));
    bytes.append(reinterpret_cast<const char*>(&l), sizeof(l));
    if (loss != nullptr) {
        *loss = l;
    }
    fixture_close(f);
    return bytes;
}

static void same_bits_for_any_thread_count() {
    for (float p : {0.0f, 0.1f}) {
        FixtureOptions o;
        o.base.nf4 = true;
        o.dropout = p;
        o.threads = 1;
        std::string one = step_bytes<Cpu<float>>(o);
        CHECK(step_bytes<Cpu<float>>(o) == one, "two runs on one thread differ");
        for (int threads : {2, 3, 8}) {
            o.threads = threads;
            CHECK(step_bytes<Cpu<float>>(o) == one, "1 and %d threads differ (dropout %g)", threads, double(p));
        }
    }
}

static void same_bits_for_any_recompute() {
    FixtureOptions o;
    o.dropout = 0.1f;
    std::string kept = step_bytes<Cpu<float>>(o);
    for (const char* way : {"ffn", "attn", "full", "1 none, 1 ffn", "1 none, 1 full", "1 ffn, 1 attn", "1 attn, 1 full"}) {
        o.recompute = way;
        CHECK(step_bytes<Cpu<float>>(o) == kept, "recompute %s differs from none", way);
    }
}

static void evaluation_disturbs_nothing() {
    Fixture<Cpu<float>> f;
    fixture_open(f, "gqa_llama3");
    const size_t n = f.batch.n_labels;
    double a = fixture_gradient(f.m, f.batch, n);
    std::vector<float> g(f.m.adapter.g, f.m.adapter.g + f.m.adapter.size);
    PassLoss e = llama_loss(f.m, llama_forward(f.m, f.batch, 0, 0), false, 1);
    CHECK(e.loss / double(n) == a, "evaluation gives %.9g, training %.9g", e.loss / double(n), a);
    CHECK(std::equal(g.begin(), g.end(), f.m.adapter.g), "evaluation touched the gradients");
    CHECK(fixture_gradient(f.m, f.batch, n) == a, "the loss changed after an evaluation");
    fixture_close(f);
}

// A gradient is a sum over N rows; summed in another order it may move by N roundings of its terms, here 60 * 2^-24.
static void compare_gradients(const std::vector<float>& a, const std::vector<float>& b, const char* what) {
    std::vector<double> x(a.begin(), a.end());
    double worst = 0;
    for (size_t i = 0; i < a.size(); i++) {
        worst = std::max(worst, std::isnan(b[i]) ? INFINITY : std::fabs(double(a[i]) - b[i]));
    }
    CHECK_ERROR(what, worst / rms(x), 60 * 0x1p-24 * 8);  // 8: the largest gradients are some times the rms
}

static void packed_equals_separate() {
    for (float p : {0.0f, 0.2f}) {
        Fixture<Cpu<float>> f;
        FixtureOptions o;
        o.dropout = p;
        fixture_open(f, "gqa_llama3", o);
        const size_t n = f.batch.n_labels;
        fixture_gradient(f.m, f.batch, n, 5);
        std::vector<float> together(f.m.adapter.g, f.m.adapter.g + f.m.adapter.size);
        std::vector<float> losses(f.m.acts.losses, f.m.acts.losses + n);
        llama_zero_gradients(f.m);
        size_t at = 0;
        for (size_t d = 0; d + 1 < f.batch.cu_seqlens.size(); d++) {
            Batch one = one_document(f.batch, d);
            Pass<Cpu<float>> pass = llama_forward(f.m, one, 5, p);
            llama_loss(f.m, pass, true, 1 / double(n));
            llama_backward(f.m, pass);
            CHECK(std::equal(losses.begin() + at, losses.begin() + at + one.n_labels, f.m.acts.losses),
                  "document %zu: losses alone and packed differ in bits (dropout %g)", d, double(p));
            at += one.n_labels;
        }
        std::vector<float> separate(f.m.adapter.g, f.m.adapter.g + f.m.adapter.size);
        compare_gradients(together, separate, "gradients packed and separate");
        fixture_close(f);
    }
}

static void rows_without_label_add_nothing() {
    Fixture<Cpu<float>> f;
    fixture_open(f, "gqa_llama3");
    const size_t n = f.batch.n_labels;
    double a = fixture_gradient(f.m, f.batch, n);
    std::vector<float> g(f.m.adapter.g, f.m.adapter.g + f.m.adapter.size);
    Batch longer = f.batch;  // a document without any label behind the others
    for (int i = 0; i < 9; i++) {
        longer.tokens.push_back(3 + i);
        longer.labels.push_back(-1);
        longer.positions.push_back(i);
        longer.example.push_back(77);
    }
    longer.cu_seqlens.push_back(int32_t(longer.size()));
    CHECK(fixture_gradient(f.m, longer, n) == a, "the loss changed");
    std::vector<float> with(f.m.adapter.g, f.m.adapter.g + f.m.adapter.size);
    compare_gradients(g, with, "gradients with a document that has no labels");
    fixture_close(f);
}

// The same examples in one pass, in four passes, and one a pass: one optimizer step each.
static void accumulation_equals_one_pass() {
    Dataset data;
    for (int i = 0; i < 4; i++) {
        for (int t = 0; t < 9 + 3 * i; t++) {
            data.ids.push_back(int32_t(random_below(3, STREAM_TOKENS, uint64_t(i), uint64_t(t), 96)));
            data.targets.push_back(t > i + 1);
        }
        data.start.push_back(data.ids.size());
    }
    std::vector<float> first;
    for (size_t pass_tokens : {64, 20, 18}) {
        Fixture<Cpu<float>> f;
        fixture_open(f, "gqa_llama3");
        StepResult r =
            train_step(f.m, data, {0, 1, 2, 3}, pass_tokens, pass_tokens != 18, 1, {1e-3, 0.9, 0.999, 1e-8, 0, 0});
        std::vector<float> g(f.m.adapter.g, f.m.adapter.g + f.m.adapter.size);
        first = first.empty() ? g : first;
        compare_gradients(first, g, "gradients over passes");
        CHECK(r.tokens == 54 && r.targets == 54 - 4 * 2 - 6, "tokens %zu, targets %zu", r.tokens, r.targets);
        fixture_close(f);
    }
}

// After one step from zero moments m = (1 - beta1) * coefficient * g, with the coefficient min(1, clip / (norm + 1e-6))
// of torch's clip_grad_norm_.
static void clipping_scales_the_gradient() {
    Dataset data;
    data.ids = {1, 2, 3, 4, 5, 6};
    data.targets = {0, 1, 1, 1, 1, 1};
    data.start = {0, 6};
    for (double share : {0.5, 2.0, 0.0}) {  // of the gradient's norm; 0: no clipping
        Fixture<Cpu<float>> f;
        fixture_open(f, "gqa_llama3");
        StepRates rates;
        rates.clip = 0;
        rates.lr = 0;
        const double norm = train_step(f.m, data, {0}, 64, true, 1, rates).grad_norm;
        device_zero(f.m.dev, f.m.adapter.m, f.m.adapter.size * sizeof(float));
        device_zero(f.m.dev, f.m.adapter.v, f.m.adapter.size * sizeof(float));
        rates.clip = share * norm;
        train_step(f.m, data, {0}, 64, true, 1, rates);
        const double coefficient = share == 0.5 ? 0.5 * norm / (norm + 1e-6) : 1;
        double worst = 0;
        for (size_t i = 0; i < f.m.adapter.size; i++) {
            double want = 0.1 * coefficient * double(f.m.adapter.g[i]);
            worst = std::max(worst, std::fabs(f.m.adapter.m[i] - want) / std::max(std::fabs(want), 1e-20));
        }
        CHECK_ERROR("first moment with clip " + std::to_string(share), worst, 4 * 0x1p-24);  // a few roundings to float
        fixture_close(f);
    }
}

// A from U(-1/sqrt(in), 1/sqrt(in)), B zero: bounds kept and nearly reached, mean and variance those of the
// distribution (within five standard errors), each matrix drawn for itself, the same for the same seed.
static void adapter_start() {
    Fixture<Cpu<float>> f;
    fixture_open(f, "gqa_llama3");
    llama_adapter_init(f.m, 11);
    std::vector<float> first(f.m.adapter.p, f.m.adapter.p + f.m.adapter.size), before;
    each_adapter(
        f.m.c, f.m.adapter.lora, [&](const std::string& name, int, int, bool is_b, int rows, int cols, size_t offset) {
            const size_t n = size_t(rows) * cols;
            std::vector<float> x(first.begin() + offset, first.begin() + offset + n);
            if (is_b) {
                CHECK(std::all_of(x.begin(), x.end(), [](float v) { return v == 0; }), "%s is not zero", name.c_str());
                return;
            }
            double bound = 1 / std::sqrt(double(cols)), mean = 0, square = 0, low = 0, high = 0;
            for (float v : x) {
                mean += v / double(n);
                square += double(v) * v / double(n);
                low = std::min(low, double(v));
                high = std::max(high, double(v));
            }
            CHECK(low >= -bound && high <= bound && low < -0.9 * bound && high > 0.9 * bound, "%s: %g to %g",
                  name.c_str(), low, high);
            CHECK_ERROR(name + ": mean", std::fabs(mean), 5 * bound / std::sqrt(3.0 * double(n)));
            CHECK_ERROR(name + ": variance", std::fabs(square * 3 / (bound * bound) - 1),
                        5 * std::sqrt(0.8 / double(n)));
            CHECK(x != before, "%s repeats the matrix before it", name.c_str());
            before = x;
        });
    llama_adapter_init(f.m, 11);
    CHECK(std::equal(first.begin(), first.end(), f.m.adapter.p), "the same seed starts differently");
    llama_adapter_init(f.m, 12);
    CHECK(!std::equal(first.begin(), first.end(), f.m.adapter.p), "another seed starts the same");
    fixture_close(f);
}

// A non-finite weight shows as a named gradient and changes nothing.
static void non_finite_is_named() {
    Fixture<Cpu<float>> f;
    fixture_open(f, "gqa_llama3");
    Dataset data;
    data.ids = {1, 2, 3, 4, 5};
    data.targets = {0, 1, 1, 1, 1};
    data.start = {0, 5};
    std::string bad_name;
    each_adapter(f.m.c, f.m.adapter.lora,
                 [&](const std::string& name, int l, int module, bool is_b, int, int, size_t offset) {
                     if (l == 1 && module == DOWN_PROJ && !is_b) {
                         f.m.adapter.p[offset + 3] = INFINITY;
                         bad_name = name;
                     }
                 });
    std::vector<float> before(f.m.adapter.p, f.m.adapter.p + f.m.adapter.size);
    StepResult r = train_step(f.m, data, {0}, 64, true, 1, StepRates());
    CHECK(!r.bad.empty(), "an infinite adapter weight went unnoticed");
    CHECK(std::equal(before.begin(), before.end(), f.m.adapter.p), "the update was made all the same");
    f.m.adapter.g[0] = NAN;
    CHECK(text_has(llama_first_nonfinite_gradient(f.m), "layers.0.self_attn.q_proj.lora_A.weight[0]"), "%s",
          llama_first_nonfinite_gradient(f.m).c_str());
    fixture_close(f);
}

extern const Test model_tests[];
const Test model_tests[] = {
    {"dump_gqa_llama3", dump_gqa_llama3},
    {"dump_tied", dump_tied},
    {"dump_head_dim", dump_head_dim},
    {"dump_odd_width", dump_odd_width},
    {"dump_bnb_nf4", dump_bnb_nf4},
    {"dump_qv_only", dump_qv_only},
    {"dump_linear_rslora", dump_linear_rslora},
    {"dump_in_double", dump_in_double},
    {"dump_on_every_tier", dump_on_every_tier},
    {"bnb_weights_as_stored", bnb_weights_as_stored},
    {"gradient_of_the_model", gradient_of_the_model},
    {"gradient_with_dropout", gradient_with_dropout},
    {"gradient_on_nf4", gradient_on_nf4},
    {"same_bits_for_any_thread_count", same_bits_for_any_thread_count},
    {"same_bits_for_any_recompute", same_bits_for_any_recompute},
    {"evaluation_disturbs_nothing", evaluation_disturbs_nothing},
    {"packed_equals_separate", packed_equals_separate},
    {"rows_without_label_add_nothing", rows_without_label_add_nothing},
    {"accumulation_equals_one_pass", accumulation_equals_one_pass},
    {"clipping_scales_the_gradient", clipping_scales_the_gradient},
    {"adapter_start", adapter_start},
    {"non_finite_is_named", non_finite_is_named},
    {nullptr, nullptr},
};
