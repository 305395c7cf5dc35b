// The whole model on a GPU (or its stand-in): against PyTorch + PEFT (the dumps of dev/ref), against the CPU, against
// itself.
#include "dev/tests/fixture.h"
#include "dev/tests/gpu.h"

// ---------------------------------------------------------------------------------------------------------------------
// dumps

// n elements of device memory as numbers.
template <class X, class T>
static std::vector<double> fetch(Gpu<X>& dev, const T* p, size_t n) {
    std::vector<T> host(n);
    device_from(dev, host.data(), p, n * sizeof(T));
    return numbers(host);
}

// Columns first .. first + width of N rows.
template <class X>
static std::vector<double> fetch_columns(Gpu<X>& dev, const X* p, size_t N, size_t stride, size_t first, size_t width) {
    std::vector<double> all = fetch(dev, p, N * stride), out;
    for (size_t i = 0; i < N; i++) {
        out.insert(out.end(), all.begin() + i * stride + first, all.begin() + i * stride + first + width);
    }
    return out;
}

// The dump holds PyTorch's fp32 run. err.NAME is that run's own error against fp64, err16.NAME the error of PyTorch's
// bf16 run, both the greatest one relative to the tensor's rms; rms16.NAME is the root mean square of the latter. Ours
// may err twice as much as PyTorch in the same precision, so fp32: |ours - theirs| <= (2 + 1) err; bf16: <= 2 err16 +
// err. The floors are 16 units of fp32 rounding, and one of bf16: for single numbers and short tensors PyTorch's error
// may be zero by luck. `trained`: after steps of Adam, which makes a whole step of a gradient near zero whichever sign
// rounding gave it, single elements go by luck too; then the root mean square counts.
template <class X>
static void compare(const Dump& d, const std::string& name, const std::vector<double>& ours, bool trained = false) {
    const std::vector<double> theirs = d.numbers(name);
    if (!CHECK(ours.size() == theirs.size(), "%s: %zu values, the dump has %zu", name.c_str(), ours.size(),
               theirs.size())) {
        return;
    }
    const double err = d.numbers("err." + name)[0];
    const bool root = trained && sizeof(X) == 2;
    const double bound = sizeof(X) == 4 ? std::max(3 * err, 16 * 0x1p-24)
                                        : std::max(2 * d.numbers((root ? "rms16." : "err16.") + name)[0] + err, 0x1p-8);
    const double error = root ? rms_error(ours, theirs) : greatest_error(ours.data(), theirs.data(), ours.size());
    CHECK_ERROR(test_state.name + (": " + name), error / rms(theirs), bound);
}

template <class X>
static void compare_activations(Fixture<Gpu<X>>& f) {
    Llama<Gpu<X>>& m = f.m;
    const LlamaConfig& c = m.c;
    const size_t N = f.batch.size(), ATT = size_t(c.NH) * c.HS, KV = size_t(c.NKV) * c.HS, QKV = ATT + 2 * KV;
    compare<X>(f.dump, "embed", fetch(m.dev, m.acts.resid, N * c.C));
    for (int l = 0; l < c.L; l++) {
        LayerActivations<Gpu<X>> y = layer_activations(m, l);
        const std::string layer = "layers." + std::to_string(l) + ".";
        compare<X>(f.dump, layer + "q", fetch_columns(m.dev, y.qkv, N, QKV, 0, ATT));
        compare<X>(f.dump, layer + "k", fetch_columns(m.dev, y.qkv, N, QKV, ATT, KV));
        compare<X>(f.dump, layer + "v", fetch_columns(m.dev, y.qkv, N, QKV, ATT + KV, KV));
        compare<X>(f.dump, layer + "attn", fetch_columns(m.dev, y.attn, N, y.attn_stride, 0, ATT));
        compare<X>(f.dump, layer + "resid_mid", fetch(m.dev, y.mid, N * c.C));
        compare<X>(f.dump, layer + "gate", fetch_columns(m.dev, y.gate_up, N, 2 * size_t(c.F), 0, c.F));
        compare<X>(f.dump, layer + "up", fetch_columns(m.dev, y.gate_up, N, 2 * size_t(c.F), c.F, c.F));
        compare<X>(f.dump, layer + "resid_out", fetch(m.dev, y.next, N * c.C));
    }
    std::vector<int32_t> rows(N);
    for (size_t i = 0; i < N; i++) {
        rows[i] = int32_t(i);
    }
    device_to(m.dev, m.acts.rows, rows.data(), N * sizeof(int32_t));
    float* logits;
    llama_alloc(m, logits, N * c.V, "logits");
    head_logits(m.dev, logits, head_input(m), m.w.head, m.acts.rows, N);
    compare<X>(f.dump, "logits", fetch(m.dev, logits, N * c.V));
}

template <class X>
static void compare_adapter(Fixture<Gpu<X>>& f, const float* p, const std::string& prefix, bool trained = false) {
    each_adapter(f.m.c, f.m.adapter.lora, [&](const std::string& name, int, int, bool, int rows, int cols, size_t at) {
        compare<X>(f.dump, prefix + name, fetch(f.m.dev, p + at, size_t(rows) * cols), trained);
    });
}

// Activations, loss and gradients of the first step; with steps, losses, norms and the adapter over all 20 of them.
template <class X>
static void dump_test(const char* name, bool steps) {
    if (!GpuDevice<X>().ok) {
        return;
    }
    Fixture<Gpu<X>> f;
    fixture_open(f, name);
    if (f.ok) {
        const size_t n = f.batch.n_labels;
        compare<X>(f.dump, "loss", {fixture_gradient(f.m, f.batch, n)});
        compare_activations(f);
        compare_adapter(f, f.m.adapter.g, "grad.");
        std::vector<double> losses, norms;
        for (int step = 1; steps && step <= 20; step++) {
            losses.push_back(fixture_gradient(f.m, f.batch, n));
            norms.push_back(llama_gradient_norm(f.m));
            AdamW a = {1e-2, 0.9, 0.999, 1e-6, 0.01, step, std::min(1.0, 1.0 / (norms.back() + 1e-6))};
            CHECK(llama_update(f.m, a), "step %d: the adapter is not finite", step);
        }
        if (steps) {
            compare<X>(f.dump, "losses", losses);
            compare<X>(f.dump, "grad_norms", norms);
            compare_adapter(f, f.m.adapter.p, "final.", true);
        }
    }
    fixture_close(f);
}

static void dump_bf16() {
    for (const char* name : reference_names) {
        dump_test<bf16>(name, std::string(name) == "gqa_llama3" || std::string(name) == "bnb_nf4");
    }
}

static void dump_fp32() {
    for (const char* name : reference_names) {
        dump_test<float>(name, std::string(name) == "gqa_llama3");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// the model against itself

// One step's gradient and loss as bytes.
template <class X>
static std::string step_bytes(const char* name, const FixtureOptions& o, GemmPath path = GemmPath::AUTO) {
    Fixture<Gpu<X>> f;
    fixture_open(f, name, o);
    std::string bytes;
    if (f.ok) {
        f.m.dev.gemm = path;
        const double loss = fixture_gradient(f.m, f.batch, f.batch.n_labels);
        std::vector<float> g(f.m.adapter.size);
        device_from(f.m.dev, g.data(), f.m.adapter.g, g.size() * sizeof(float));
        bytes.assign(reinterpret_cast<const char*>(g.data()), g.size() * sizeof(float));
        bytes.append(reinterpret_cast<const char*>(&loss), sizeof(loss));
        CHECK(std::isfinite(loss), "the loss is not finite");
    }
    fixture_close(f);
    return bytes;
}

template <class X>
static void same_bits(const char* name, const FixtureOptions& options) {
    FixtureOptions o = options;
    const std::string kept = step_bytes<X>(name, o);
    CHECK(step_bytes<X>(name, o) == kept, "%s: two runs differ", name);
    for (const char* way : {"ffn", "attn", "full", "1 none, 1 ffn", "1 ffn, 1 full"}) {
        o.recompute = way;
        CHECK(step_bytes<X>(name, o) == kept, "%s: recompute %s differs from none", name, way);
    }
}

static void same_bits_for_any_recompute() {
    if (!GpuDevice<bf16>().ok) {
        return;
    }
    FixtureOptions o;
    same_bits<bf16>("gqa_llama3", o);
    o.base.nf4 = true;
    o.dropout = 0.1f;
    same_bits<bf16>("gqa_llama3", o);
    same_bits<float>("gqa_llama3", o);
}

static void evaluation_disturbs_nothing() {
    if (!GpuDevice<bf16>().ok) {
        return;
    }
    Fixture<Gpu<bf16>> f;
    fixture_open(f, "gqa_llama3");
    const size_t n = f.batch.n_labels, size = f.m.adapter.size;
    const double a = fixture_gradient(f.m, f.batch, n);
    const std::vector<double> g = fetch(f.m.dev, f.m.adapter.g, size);
    const PassLoss e = llama_loss(f.m, llama_forward(f.m, f.batch, 0, 0), false, 1);
    CHECK(e.loss / double(n) == a, "evaluation gives %.9g, training %.9g", e.loss / double(n), a);
    CHECK(fetch(f.m.dev, f.m.adapter.g, size) == g, "evaluation touched the gradients");
    CHECK(fixture_gradient(f.m, f.batch, n) == a, "the loss changed after an evaluation");
    fixture_close(f);
}

// A document's loss does not depend on the documents that share its pass.
static void documents_apart() {
    if (!GpuDevice<bf16>().ok) {
        return;
    }
    Fixture<Gpu<bf16>> f;
    fixture_open(f, "gqa_llama3");
    const Batch& b = f.batch;
    llama_loss(f.m, llama_forward(f.m, b, 1, 0), false, 1);
    const std::vector<double> together = fetch(f.m.dev, f.m.acts.losses, b.n_labels);
    std::vector<double> apart;
    for (size_t d = 0; d + 1 < b.cu_seqlens.size(); d++) {
        const Batch one = one_document(b, d);
        llama_loss(f.m, llama_forward(f.m, one, 1, 0), false, 1);
        const std::vector<double> its = fetch(f.m.dev, f.m.acts.losses, one.n_labels);
        apart.insert(apart.end(), its.begin(), its.end());
    }
    // Rows are products of their own and attention sees one document, so the bits agree where the library's products do
    // not choose another order of sums for another number of rows; one unit of bf16 rounding of the loss is the bound.
    CHECK_ERROR("losses", greatest_error(together.data(), apart.data(), apart.size()),
                0x1p-8 * greatest(together.data(), together.size()));
    fixture_close(f);
}

// ---------------------------------------------------------------------------------------------------------------------
// plans

// dev/ref/bnb_nf4 with one matrix left in 16 bits, as "dynamic" checkpoints leave some.
static std::string mixed_checkpoint() {
    const std::string from = source_path("dev/ref/bnb_nf4"), dir = test_directory() + "/mixed";
    const std::string plain = "model.layers.1.mlp.gate_proj.weight";
    std::string out;
    CHECK(run_command(&out, "cp -r " + from + " " + dir + " && rm " + dir + "/model.safetensors") == 0, "%s",
          out.c_str());
    LlamaConfig c;
    Safetensors st;
    Error e = llama_config_read(c, dir);
    e = e ? e : safetensors_open(st, from + "/model.safetensors");
    std::vector<std::vector<uint8_t>> bytes;
    std::vector<TensorOut> tensors;
    for (const Tensor& t : st.tensors) {
        if (t.name.rfind(plain, 0) != 0) {
            bytes.emplace_back(t.bytes);
            e = e ? e : safetensors_read(st, t, bytes.back().data(), 0, t.bytes);
            tensors.push_back({t.name, t.dtype, t.shape, nullptr});
        }
    }
    bytes.emplace_back(size_t(c.F) * c.C * 2);
    tensors.push_back({plain, "BF16", {uint64_t(c.F), uint64_t(c.C)}, nullptr});
    for (size_t i = 0; i < tensors.size(); i++) {
        tensors[i].data = bytes[i].data();
    }
    safetensors_close(st);
    e = e ? e : safetensors_write(dir + "/model.safetensors", tensors);
    CHECK(!e, "%s", e.what.c_str());
    return dir;
}

// All that is allocated is planned, byte for byte, and an arena of that size is enough: every kind of base, adapters
// that leave groups without any, each way of multiplying.
static void plan_is_what_is_taken() {
    if (!GpuDevice<bf16>().ok) {
        return;
    }
    const std::string mixed = mixed_checkpoint();
    for (const std::string& dir : {source_path("dev/ref/gqa_llama3"), source_path("dev/ref/bnb_nf4"), mixed}) {
        for (GemmPath path : {GemmPath::FUSED, GemmPath::DEQUANT}) {
            for (bool all : {true, false}) {
                Llama<Gpu<bf16>> m;
                CHECK(device_open(m.dev, 2).empty(), "no device");
                std::string hash;
                std::vector<std::string> warnings;
                Error e = llama_config_read(m.c, dir);
                e = e ? e : bnb_layout_read(m.c, dir);
                CHECK(m.c.bnb_plain.size() == (dir == mixed ? 1u : 0u), "%zu plain linears", m.c.bnb_plain.size());
                LoraConfig lora;
                lora.r = 4;
                for (int i = 0; i < MODULES && !all; i++) {
                    lora.target[i] = i == Q_PROJ || i == V_PROJ;
                }
                Plan p;
                p.pass_tokens = 50;
                p.gemm = path;
                p.recompute = recompute_everywhere(Recompute::FFN, m.c.L);
                plan_fill(p, m.dev, m.c, lora, BaseOptions(), 40);
                const std::string why = device_arena(m.dev, p.total() - p.library);
                CHECK(why.empty(), "%s", why.c_str());
                device_reserve(m.dev, p.workspace);
                device_gemm(m.dev, p.gemm);
                e = e ? e : llama_load(m, &hash, warnings, dir, BaseOptions());
                CHECK(!e, "%s", e.what.c_str());
                llama_adapter_create(m, lora);
                llama_activations_create(m, 50, 40, p.recompute, true);
                const size_t placed = p.total() - p.workspace - p.slots - p.library;
                CHECK(placed == m.placed, "%s: %zu planned, %zu taken", dir.c_str(), placed, m.placed);
                CHECK(p.workspace == m.dev.workspace_bytes, "%s: workspace %zu planned, %zu taken", dir.c_str(),
                      p.workspace, m.dev.workspace_bytes);
                CHECK(device_peak_bytes(m.dev) <= p.total(), "%s: %zu planned, %zu at the peak", dir.c_str(), p.total(),
                      device_peak_bytes(m.dev));
                llama_free(m);
            }
        }
    }
}

extern const Test gpu_model_tests[];
const Test gpu_model_tests[] = {
    {"dump_bf16", dump_bf16},
    {"dump_fp32", dump_fp32},
    {"same_bits_for_any_recompute", same_bits_for_any_recompute},
    {"evaluation_disturbs_nothing", evaluation_disturbs_nothing},
    {"documents_apart", documents_apart},
    {"plan_is_what_is_taken", plan_is_what_is_taken},
    {nullptr, nullptr},
};
