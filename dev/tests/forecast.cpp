// What a step costs: a pass counted in parts against the model's own count and sums made here, the costs of the parts
// from known times, a calibration of this machine. And on ranks that are not there: the clocks of work and link by
// hand, the order of what goes over the link against the model's own, whole steps against sums made here.
#include <cmath>

#include "dev/tests/test.h"
#define HAVE_GPU 0
#include "train_forecast.h"

static bool is_near(double x, double want) {  // sums of a few hundred terms, each rounded once
    return std::fabs(x - want) <= 1e-12 * std::fabs(want);
}

static PassTime pass(double head, double forward, double backward, int L) {
    PassTime t;
    t.head = head;
    t.forward = forward;
    t.backward.assign(L, backward);
    return t;
}

static double seconds(bool beside, double gather, double sum, size_t least, const std::vector<PassTime>& passes) {
    LinkUse use;
    use.beside = beside;
    use.gather = gather;
    use.sum = sum;
    use.layer = 10;
    use.least = least;
    return passes_seconds(use, passes);
}

// Four layers, forward 1 s, backward 2 s, head 0.5 s: 12.5 s alone.
static void clocks_by_hand() {
    const PassTime one = pass(0.5, 1, 2, 4), none = pass(0, 0, 0, 4);
    const struct {
        const char* what;
        double want, seconds;
    } known[] = {
        {"alone", 12.5, seconds(true, 0, 0, 10, {one})},
        // Layers 2 and 3 come while 1 and 2 are used, 1 and 0 while 2 and 1 are: 3 - 1 is left over twice, 3 - 2 twice.
        {"gathers", 12.5 + 2 * 2 + 2 * 1, seconds(true, 3, 0, 10, {one})},
        {"gathers that are hidden", 12.5, seconds(true, 1, 0, 10, {one})},
        {"gathers hidden backward alone", 12.5 + 2 * 0.5, seconds(true, 1.5, 0, 10, {one})},
        {"gathers, nothing beside", 12.5 + 4 * 3, seconds(false, 3, 0, 10, {one})},
        // Two messages of 2 s: the first is ready at 8.5 and is gone at 10.5, the second at 12.5.
        {"sum in two messages", 12.5 + 2, seconds(true, 0, 0.1, 20, {one})},
        {"sum, slow link", 8.5 + 2 * 12, seconds(true, 0, 0.6, 20, {one})},
        {"sum in messages of three layers and one", 10.5 + 3 + 1, seconds(true, 0, 0.1, 21, {one})},
        {"sum, nothing beside", 12.5 + 4, seconds(false, 0, 0.1, SIZE_MAX, {one})},
        // The link is at 6.5 + 1 (layer 3's sum) + 1 (gather of 1), 8.5 + 1 + 1, 10.5 + 1, 12.5 + 1.
        {"both", 13.5, seconds(true, 1, 0.1, 10, {one})},
        // Layer 3 done at 6.5, its sum 1.5, gather of 1, sum of 2 1.5, gather of 0: layer 0 begins at 11.5, its sum
        // ends all.
        {"both, link full", 6.5 + 1.5 + 1 + 1.5 + 1 + 2 + 1.5, seconds(true, 1, 0.15, 10, {one})},
        {"two passes, the sum in the last", 25 + 2, seconds(true, 0, 0.1, 20, {one, one})},
        {"two passes with gathers", 25 + 12, seconds(true, 3, 0, 20, {one, one})},
        // A rank that has no pass left sums when it gets there: all of it after its work.
        {"an empty pass", 12.5 + 4, seconds(true, 0, 0.1, 10, {one, none})},
        {"an empty pass waits for weights", 12.5 + 6 + 4 * 3, seconds(true, 3, 0, 10, {one, none})},
        {"two layers stay where they are", 6, seconds(true, 100, 0, 10, {pass(0, 1, 2, 2)})},
    };
    for (const auto& k : known) {
        CHECK(is_near(k.seconds, k.want), "%s: %.3f s, by hand %.3f s", k.what, k.seconds, k.want);
    }
}

// A device that only counts what the model asks of the link.
struct CountingDevice {
    using floatX = float;
    using real = float;
    const Comm* comm = nullptr;
    size_t gathers = 0, least = 0;
    std::vector<size_t> messages;
};
static void comm_gather_begin(CountingDevice& dev, int, void*, const void*, size_t) {
    dev.gathers++;
}
static void comm_gather_finish(CountingDevice&, int) {}
static void comm_sum_begin(CountingDevice& dev, float*, size_t n) {
    dev.messages.push_back(n);
}
static size_t comm_sum_least(const CountingDevice& dev) {
    return dev.least;
}
static void device_clock_start(CountingDevice&, double*) {}
static void device_clock_stop(CountingDevice&) {}
static void device_sync(CountingDevice&) {}

// As many gathers and messages as the model makes: llama_idle goes through what every rank must, in the same order.
static void order_of_the_model() {
    for (int L : {1, 2, 3, 4, 7, 32}) {
        for (size_t least : {size_t(1), size_t(25), size_t(64), SIZE_MAX}) {
            const Comm two = {0, 2, 0, 2, nullptr};
            Llama<CountingDevice> m;
            m.dev.comm = &two;
            m.dev.least = least;
            m.c.L = L;
            m.spread.slice = 16;
            std::vector<float> gradients(size_t(L) * 10);
            m.adapter.size = gradients.size();
            m.adapter.g = gradients.data();
            std::vector<char> mine(size_t(L) * 16);
            m.spread.mine = mine.data();
            m.summed_from = m.adapter.size;
            llama_idle(m, true, true);  // the first two layers come once a run
            m.dev.gathers = 0;
            m.dev.messages.clear();
            m.summed_from = m.adapter.size;
            for (int i = 0; i < 3; i++) {
                llama_idle(m, true, i == 2);
            }
            LinkUse use;
            use.gather = 1;
            use.sum = 1;
            use.layer = 10;
            use.least = least;
            const double s = passes_seconds(use, std::vector<PassTime>(3, pass(0, 0, 0, L)));
            CHECK(use.gathers == m.dev.gathers && m.dev.gathers == size_t(3 * 2 * std::max(L - 2, 0)),
                  "%d layers: %zu gathers told, %zu made", L, use.gathers, m.dev.gathers);
            CHECK(use.messages == m.dev.messages.size(), "%d layers of 10, at least %zu: %zu messages told, %zu made",
                  L, least, use.messages, m.dev.messages.size());
            CHECK(s == double(use.gathers) + 10.0 * L, "%d layers: %g s of link", L, s);
        }
    }
}

// 4 layers of 64, heads of 16, ffn 128, vocabulary 96, rank 16 on all linears.
static void small_run(Run& run, const std::vector<size_t>& lengths) {
    LlamaConfig& c = run.c;
    c.L = 4, c.C = 64, c.F = 128, c.V = 96, c.NH = 4, c.NKV = 2, c.HS = 16;
    run.o.link = 0.001;
    run.plan.pass_tokens = 1000;
    run.plan.recompute = recompute_everywhere(Recompute::NONE, c.L);
    for (size_t n : lengths) {
        for (size_t t = 0; t < n; t++) {
            run.train.ids.push_back(0);
            run.train.targets.push_back(t > 0);
        }
        run.train.start.push_back(run.train.ids.size());
        run.train.longest = std::max(run.train.longest, n);
    }
}

static std::vector<size_t> all(const Run& run) {
    std::vector<size_t> examples(run.train.size());
    std::iota(examples.begin(), examples.end(), size_t(0));
    return examples;
}

// Parameters of the linears of a layer of it: q, k, v, o, three of the MLP. And of an adapter's A and B: r (in + out).
constexpr double SMALL = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128, SMALL_QKV = 64 * 64 + 2 * 64 * 32;
constexpr double SMALL_LORA = 16 * (128 + 2 * 96 + 128 + 3 * 192);

// Products and attention at 1 GFLOP/s, all else for nothing.
static Speed one_gflops() {
    Speed s;
    for (int part = 0; part < SPEED_PARTS; part++) {
        s.per_unit[part] = is_product(part) || part % OPS == OP_ATTENTION ? 1e-9 : 0;
    }
    return s;
}

// A document of n tokens, n - 1 with a label, at 1 GFLOP/s: 4 operations a weight and token, 6 an adapter weight; the
// input gradient of the first layer's q, k, v is not made; the head 4; attention 7 products of 2 over the pairs of a
// head.
static double document_seconds(double n) {
    return (4 * n * 4 * SMALL - 2 * n * SMALL_QKV + 6 * n * 4 * SMALL_LORA + 4 * (n - 1) * 96 * 64 +
            7 * 2 * (n * (n + 1) / 2) * 64 * 4) /
           1e9;
}

// The operations of all parts together are those that the model counts, where nothing is made again.
static void parts_are_the_models_operations() {
    Run run;
    small_run(run, {300, 1, 200, 7});
    Batch b;
    batch_make(b, run.train, all(run));
    const RecomputePlan none = recompute_everywhere(Recompute::NONE, run.c.L);
    for (const char* targets : {"all", "attention", "q,v", "down"}) {
        targets_parse(run.lora, targets);
        for (int heads : {1, 2, 4}) {
            run.c.NKV = heads;
            const Work w = work_pass(run.c, run.lora, none, b, 100);
            double flops = 0;
            for (int part = 0; part < SPEED_PARTS; part++) {
                flops += is_product(part) || part % OPS == OP_ATTENTION ? w.units[part] : 0;
            }
            CHECK(is_near(flops, pass_flops(run.c, run.lora, b)), "%s, %d: %.9g operations, the model's %.9g", targets,
                  heads, flops, pass_flops(run.c, run.lora, b));
        }
    }
}

// Every cost a number of its own: a document of 100 tokens, 99 with a label, in four layers that make more and more
// again.
static void seconds_by_hand() {
    Run run;
    small_run(run, {100});
    Batch b;
    batch_make(b, run.train, {0});
    RecomputePlan one_of_each;
    std::fill(one_of_each.layers, one_of_each.layers + 4, 1);
    const double N = 100, O = 64 * 64, GATE_UP = 2 * 64 * 128, DOWN = 64 * 128, r = 16;
    const double qkv_lora = r * (128 + 2 * 96), o_lora = r * 128, gate_up_lora = r * 2 * 192, down_lora = r * 192;
    const double pairs = N * (N + 1) / 2, q = N * 64;
    const struct {
        const char* what;
        int part;
        double fixed, units;
    } known[] = {
        {"embedding", OP_EMBED, 1, N * 64},
        // two a layer, the last, and the second of the layer that makes attention again
        {"norms", OP_NORM, 4 * 2 + 1 + 1, 10 * N * 64},
        // q, k, v: layers 2 and 3 again; o: layer 3; gate and up: layers 1, 2, 3
        {"q, k, v", OP_QKV, 6 * SMALL_QKV, 6 * 2 * N * (SMALL_QKV + qkv_lora)},
        {"o", OP_O, 5 * O, 5 * 2 * N * (O + o_lora)},
        {"gate and up", OP_GATE_UP, 7 * GATE_UP, 7 * 2 * N * (GATE_UP + gate_up_lora)},
        {"down", OP_DOWN, 4 * DOWN, 4 * 2 * N * (DOWN + down_lora)},
        {"attention", OP_ATTENTION, 5 * q, 5 * 2 * 2 * pairs * 64},
        {"head, 40 rows together", OP_HEAD, 3 * 96 * 64, 4 * 99.0 * 96 * 64},
        {"q, k, v back", OPS + OP_QKV, 3 * SMALL_QKV, 3 * N * (2 * SMALL_QKV + 4 * qkv_lora)},
        {"those of layer 0", SPEED_FIRST_QKV, 0, N * 4 * qkv_lora},
        {"o back", OPS + OP_O, 4 * O, 4 * N * (2 * O + 4 * o_lora)},
        {"gate and up back", OPS + OP_GATE_UP, 4 * GATE_UP, 4 * N * (2 * GATE_UP + 4 * gate_up_lora)},
        {"down back", OPS + OP_DOWN, 4 * DOWN, 4 * N * (2 * DOWN + 4 * down_lora)},
        {"attention back", OPS + OP_ATTENTION, 4 * q, 4 * 5 * 2 * pairs * 64},
        // two a layer but one in layer 0; the last one's sum is zeroed first
        {"norms back", OPS + OP_NORM, 7 + 1, 7 * 4 * N * 64 + 5 * N * 64},
        {"SwiGLU back", OPS + OP_SWIGLU, 4, 4 * 5 * N * 128},
        {"host", SPEED_HOST, 1, N},
    };
    const Work w = work_pass(run.c, run.lora, one_of_each, b, 40);
    Speed s;
    double want = 0;
    for (const auto& k : known) {
        s.per_fixed[k.part] = 1e-7 * (k.part + 1);
        s.per_unit[k.part] = 1e-9 * (2 * k.part + 1);
        want += 1e-7 * (k.part + 1) * k.fixed + 1e-9 * (2 * k.part + 1) * k.units;
        CHECK(is_near(w.fixed[k.part], k.fixed) && is_near(w.units[k.part], k.units),
              "%s: %.9g and %.9g units, by hand %.9g and %.9g", k.what, w.fixed[k.part], w.units[k.part], k.fixed,
              k.units);
    }
    CHECK(is_near(work_seconds(s, w), want), "%.9g s, by hand %.9g s", work_seconds(s, w), want);
    // A step of three such documents in passes of two: as the pass of two, the pass of one, and the update.
    Run step;
    small_run(step, {100, 100, 100});
    step.plan.pass_tokens = 250;
    step.plan.recompute = one_of_each;
    s.head_rows = 40;
    s.per_unit[OP_ADAMW] = 1e-8;
    Batch two;
    batch_make(two, step.train, {0, 1});
    want += work_seconds(s, work_pass(step.c, step.lora, one_of_each, two, 40)) + 1e-8 * 10 * 4 * 4 * SMALL_LORA;
    const double got =
        work_seconds(s, work_step<Cpu<float>>(step.c, step.lora, step.plan, true, 40, step.train, all(step)));
    CHECK(is_near(got, want), "a step: %.9g s, by hand %.9g s", got, want);
    // Products at 1 GFLOP/s, the update at 10 GB/s.
    step.plan.recompute = recompute_everywhere(Recompute::NONE, 4);
    s = one_gflops();
    s.per_unit[OP_ADAMW] = 1e-10;
    const std::string text = speed_text(Cpu<float>(), step, s, {all(step), all(step)}),
                      said = text_format(
                          "predicted speed %.0f tok/s (calibrated here: matrix products at 1 GFLOP/s, "
                          "memory at 10.0 GB/s)",
                          300 / (3 * document_seconds(100) + 1e-10 * 10 * 4 * 4 * SMALL_LORA));
    CHECK(text == said, "%s\n    want %s", text.c_str(), said.c_str());
}

// More tokens, longer documents, more made again: more seconds.
static void more_takes_longer() {
    Run run;
    small_run(run, {1, 2, 16, 100, 101, 600});
    const Speed s = one_gflops();
    Batch b;
    double before = 0;
    for (size_t i = 0; i < run.train.size(); i++) {
        batch_make(b, run.train, {i});
        double least = 0;
        for (Recompute again : {Recompute::NONE, Recompute::FFN, Recompute::ATTN, Recompute::FULL}) {
            const double t =
                work_seconds(s, work_pass(run.c, run.lora, recompute_everywhere(again, run.c.L), b, s.head_rows));
            CHECK(t > least && t > before, "%zu tokens, %s: %.9g s after %.9g s and %.9g s", b.size(),
                  recompute_name(again), t, least, before);
            least = t;
        }
        before = work_seconds(s, work_pass(run.c, run.lora, run.plan.recompute, b, s.head_rows));
    }
    Batch split;  // 100 tokens in two documents have fewer pairs than in one
    Run half;
    small_run(half, {50, 50});
    batch_make(b, run.train, {3});
    batch_make(split, half.train, {0, 1});
    split.n_labels = b.n_labels;
    CHECK(work_seconds(s, work_pass(run.c, run.lora, run.plan.recompute, split, 512)) <
              work_seconds(s, work_pass(run.c, run.lora, run.plan.recompute, b, 512)),
          "two documents cost what one does");
}

// Times made of known costs give these costs; times that no costs give lie on the large size alone.
static void costs_from_times() {
    Work small, large;
    const double f = 500, units[] = {1e4, 4e4};
    small.fixed[OP_O] = large.fixed[OP_O] = f;
    small.units[OP_O] = units[0];
    large.units[OP_O] = units[1];
    const auto fit = [&](double t1, double t2) {
        Speed s;
        speed_fit(s, OP_O, small, t1, large, t2);
        return s;
    };
    Speed s = fit(f * 3e-6 + units[0] * 2e-7, f * 3e-6 + units[1] * 2e-7);
    CHECK(std::fabs(s.per_fixed[OP_O] / 3e-6 - 1) < 1e-9 && std::fabs(s.per_unit[OP_O] / 2e-7 - 1) < 1e-9,
          "%.12g and %.12g", s.per_fixed[OP_O], s.per_unit[OP_O]);
    for (double t1 : {0.0, 0.5, 1.5}) {  // faster than in proportion, by more than all, or the small one slower
        s = fit(t1, 1.0);
        CHECK(
            (t1 == 0.5 && s.per_fixed[OP_O] > 0) || (s.per_fixed[OP_O] == 0 && is_near(s.per_unit[OP_O], 1 / units[1])),
            "%g s and 1 s: %.12g and %.12g", t1, s.per_fixed[OP_O], s.per_unit[OP_O]);
        CHECK(is_near(f * s.per_fixed[OP_O] + units[1] * s.per_unit[OP_O], 1), "the large size is met: %g s", t1);
    }
    small.units[OP_O] = 0.9 * units[1];  // too near each other
    s = fit(0.95, 1.0);
    CHECK(s.per_fixed[OP_O] == 0 && is_near(s.per_unit[OP_O], 1 / units[1]), "too near: %.12g", s.per_fixed[OP_O]);
    s = fit(0, 0);
    CHECK(s.per_fixed[OP_O] == 0 && s.per_unit[OP_O] == 0, "no time: %.12g", s.per_unit[OP_O]);
}

// The beginning of a pass: its documents up to there, its share of labels, tokens of the small vocabulary.
static void beginning_of_a_pass() {
    Run run;
    small_run(run, {40, 60, 100});
    for (size_t i = 0; i < run.train.size(); i++) {
        run.train.ids[run.train.start[i] + 1] = 95;
    }
    Batch pass;
    batch_make(pass, run.train, all(run));
    Batch b = speed_batch(pass, 70, 50, 512);
    CHECK(b.cu_seqlens == (std::vector<int32_t>{0, 40, 70}) && b.size() == 70, "documents end at %d", b.cu_seqlens[1]);
    CHECK(b.positions[39] == 39 && b.positions[40] == 0 && b.positions[69] == 29, "positions go on at %d",
          b.positions[40]);
    CHECK(b.tokens[1] == 95 - 50 && *std::max_element(b.tokens.begin(), b.tokens.end()) < 50, "token %d", b.tokens[1]);
    const auto labels = [](const Batch& x) {
        return size_t(std::count_if(x.labels.begin(), x.labels.end(), [](int32_t l) { return l >= 0; }));
    };
    // 197 of 200 rows have a label: 69 of 70 is the next number above
    CHECK(b.n_labels == 69 && labels(b) == 69, "%zu labels, %zu said", labels(b), b.n_labels);
    b = speed_batch(pass, 100, 50, 30);
    CHECK(b.n_labels == 30 && labels(b) == 30 && b.cu_seqlens == (std::vector<int32_t>{0, 40, 100}),
          "%zu labels, %zu said", labels(b), b.n_labels);
    pass.n_labels = 0;
    b = speed_batch(pass, 100, 50, 30);
    CHECK(b.n_labels == 0 && labels(b) == 0, "%zu labels of none", labels(b));
}

// On this machine: every cost is a number, nothing but what was not there is free, whatever the base, the shape and the
// pass. The small model of a large one is small.
static void calibration() {
    Cpu<float> dev;
    device_open(dev, 2);
    for (const std::vector<size_t>& lengths : {std::vector<size_t>{70, 50, 80}, {1}, {2}, {33}}) {
        Run run;
        small_run(run, lengths);
        run.lora.dropout = lengths.size() > 1 ? 0.1 : 0;
        run.c.C = lengths.size() > 1 ? 48 : 64;
        run.c.rms_eps = 1e-5;
        Batch b;
        batch_make(b, run.train, all(run));
        for (bool nf4 : {true, false}) {
            BaseOptions base;
            base.nf4 = nf4;
            const Speed s = speed_measure(dev, run.c, run.lora, base, b);
            const Work w = work_pass(run.c, run.lora, run.plan.recompute, b, s.head_rows);
            for (int part = 0; part < SPEED_PARTS; part++) {
                CHECK(std::isfinite(s.per_fixed[part]) && std::isfinite(s.per_unit[part]) && s.per_fixed[part] >= 0 &&
                          s.per_unit[part] >= 0,
                      "part %d: %g and %g", part, s.per_fixed[part], s.per_unit[part]);
                CHECK(part == SPEED_HOST || part % OPS == OP_QKV || w.units[part] == 0 || work_seconds(s, w, part) > 0,
                      "part %d of %zu tokens is free", part, b.size());
            }
            CHECK(s.per_unit[OP_ADAMW] > 0 && s.head_rows == 512, "%zu rows of the head", s.head_rows);
        }
    }
    CHECK(dev.workspace == nullptr, "the device keeps what was taken");
    device_close(dev);
    for (const char* name : {"125m", "8b", "405b"}) {
        LlamaConfig c;
        Error e = llama_config_shape(c, name);
        CHECK(!e, "%s", e.what.c_str());
        const LlamaConfig s = speed_config(c, 2);
        CHECK(linear_parameters(s) / 2 <= size_t(24) << 20 && s.HS == c.HS && s.NH / s.NKV == c.NH / c.NKV && s.L == 2,
              "%s: %zu weights a layer", name, linear_parameters(s) / 2);
        CHECK(std::string(name) != "125m" || (s.C == c.C && s.F == c.F), "125m is small enough: %d", s.C);
    }
}

// On the CPU everything adds up: the fullest rank, or of each round the fullest; the sum; the gathers.
static void steps_by_hand() {
    Run run;
    small_run(run, {300, 200, 200, 100});
    const Cpu<float> dev;
    const Speed speed = one_gflops();
    const double t1 = document_seconds(100), t2 = document_seconds(200), t3 = document_seconds(300),
                 work = t1 + 2 * t2 + t3;
    const auto sum = [](double R) { return 2 * (R - 1) / R * 4 * 4 * SMALL_LORA / 1e6; };  // seconds at 1 MB/s
    run.plan.ranks = 1;
    Forecast f = forecast_step(dev, run, speed, 0, all(run));
    CHECK(is_near(f.seconds, work) && is_near(f.work, work) && f.bytes == 0 && f.tokens == 800,
          "one rank: %.9g s, by hand %.9g s; %g bytes", f.seconds, work, f.bytes);
    run.plan.ranks = 2;  // 300 and 100 on one, 200 twice on the other
    f = forecast_step(dev, run, speed, 0, all(run));
    CHECK(is_near(f.seconds, t3 + t1 + sum(2)) && is_near(f.compute, t3 + t1) && is_near(f.work, work),
          "two ranks: %.9g s, by hand %.9g s", f.seconds, t3 + t1 + sum(2));
    CHECK(is_near(f.bytes, sum(2) * 1e6) && f.gathers == 0, "two ranks: %g bytes", f.bytes);
    run.plan.ranks = 3;  // 300; 200 and 100; 200
    f = forecast_step(dev, run, speed, 0, all(run));
    CHECK(is_near(f.seconds, t3 + sum(3)) && is_near(f.work, work), "three ranks: %.9g s, by hand %.9g s", f.seconds,
          t3 + sum(3));
    run.plan.ranks = 3;  // of the base as well: 4 gathers of two slices of 5,000 bytes from others
    f = forecast_step(dev, run, speed, 5000, all(run));
    CHECK(is_near(f.seconds, t3 + sum(3) + 4 * 2 * 5e-3) && f.gathers == 4, "spread: %.9g s, %zu gathers", f.seconds,
          f.gathers);
    CHECK(is_near(f.bytes, sum(3) * 1e6 + 4 * 2 * 5000), "spread: %g bytes", f.bytes);
    run.plan.ranks = 2;  // passes of one document: 300 beside 200, 100 beside 200
    run.plan.pass_tokens = 300;
    f = forecast_step(dev, run, speed, 5000, all(run));
    CHECK(is_near(f.seconds, t3 + t2 + sum(2) + 2 * 4 * 5e-3) && is_near(f.compute, t3 + t1),
          "in step: %.9g s, by hand %.9g s", f.seconds, t3 + t2 + sum(2) + 2 * 4 * 5e-3);
    run.plan.ranks = 9;  // more than there are documents: one a rank, five have nothing
    f = forecast_step(dev, run, speed, 0, all(run));
    CHECK(is_near(f.seconds, t3 + sum(9)) && is_near(f.work, work), "nine ranks: %.9g s", f.seconds);
    Batch b;
    batch_make(b, run.train, {0});
    const PassTime t = pass_time(dev, run, speed, b);
    CHECK(is_near(t.head, 4.0 * 299 * 96 * 64 / 1e9), "its head: %.9g s", t.head);
}

// An H200 as the plan's own test has it, 8B at rank 16, eight documents of 2,048 packed.
static void card_run(Run& run, Gpu<bf16>& dev) {
    dev.info.gflops = 790e3;
    dev.info.gbytes_per_s = 4300;
    Error e = llama_config_shape(run.c, "8b");
    CHECK(!e, "%s", e.what.c_str());
    run.plan.pass_tokens = 8192;
    for (int i = 0; i < 8 * 2048; i++) {
        run.train.ids.push_back(0);
        run.train.targets.push_back(i % 2048 > 0);
        if (i % 2048 == 2047) {
            run.train.start.push_back(size_t(i) + 1);
        }
    }
}

// The parts of a pass are its whole, and a layer that makes more again has more of it.
static void parts_of_a_pass() {
    Run run;
    Gpu<bf16> dev;
    card_run(run, dev);
    run.plan.recompute.layers[int(Recompute::NONE)] = 20;
    run.plan.recompute.layers[int(Recompute::FULL)] = 12;
    Batch b;
    batch_make(b, run.train, {0, 1, 2, 3});
    const PassTime t = pass_time(dev, run, Speed(), b);
    CHECK(is_near(t.seconds(), plan_seconds(dev, run, b)), "%.9g s in parts, %.9g s", t.seconds(),
          plan_seconds(dev, run, b));
    // The head: 4 operations a weight for the 4 * 2,047 rows with labels.
    CHECK(is_near(t.head, 4.0 * 4 * 2047 * 128256 * 4096 / 790e12), "head %.9g s", t.head);
    // A layer of 8B has 218 million weights in its linears: gate and up 117, q, k, v 25, o 17. Backward of one that
    // keeps all costs what forward does; FULL makes all but down again, and attention, counted as o once more.
    const double all = 4096.0 * (4096 + 2 * 1024 + 4096 + 3 * 14336),
                 again = 4096.0 * (2 * 14336 + 4096 + 2 * 1024 + 2 * 4096) / all, restore = 231.0 / 8192;
    CHECK(is_near(t.backward[0], t.forward), "backward %.9g s, forward %.9g s", t.backward[0], t.forward);
    CHECK(is_near(t.backward[31] / t.forward, (1 + restore + again) / (1 + restore)), "%.9g times forward",
          t.backward[31] / t.forward);
    CHECK(t.backward[19] == t.backward[0] && t.backward[20] == t.backward[31], "the first 20 layers keep all");
}

// Known sizes: the gradients of 8B at rank 16 are 168 MB, which eight ranks sum in 0.8 ms at 370 GB/s; on a card only
// the last message is left over. The faster the link the better; with more ranks a step is shorter where the link keeps
// up, and the efficiency lower.
static void cards_and_links() {
    Run run;
    Gpu<bf16> dev;
    card_run(run, dev);
    run.plan.recompute = recompute_everywhere(Recompute::NONE, run.c.L);
    run.plan.ranks = 8;
    run.o.link = 370;
    const Forecast f = forecast_step(dev, run, Speed(), 0, all(run));
    CHECK(f.bytes > 2 * 7 / 8.0 * 167.5e6 && f.bytes < 2 * 7 / 8.0 * 168.5e6, "%g bytes", f.bytes);
    CHECK_ERROR("0.8 ms", std::fabs(f.bytes / 370e9 - 0.8e-3), 0.05e-3);
    // 1,310,720 elements a layer, 4 layers a message of 16 MB and more
    CHECK(is_near(f.seconds, f.compute + 2 * 7 / 8.0 * 4 * 4 * 1310720 / 370e9), "left over: %.6g s",
          f.seconds - f.compute);
    CHECK(f.messages == 8, "%zu messages", f.messages);
    for (size_t slice : {size_t(0), size_t(14) << 20}) {
        double before = 0;
        for (double link : {0.1, 1.0, 10.0, 25.0, 100.0, 1000.0}) {
            run.o.link = link;
            const Forecast g = forecast_step(dev, run, Speed(), slice, all(run));
            CHECK(before == 0 || g.seconds < before, "at %g GB/s %.9g s, %.9g s with a slower link", link, g.seconds,
                  before);
            CHECK(g.seconds > g.compute && g.seconds < g.compute + g.bytes / (link * 1e9) * 1.0001,
                  "at %g GB/s %.9g s, compute %.9g s", link, g.seconds, g.compute);
            before = g.seconds;
        }
        run.o.link = 200;
        double efficiency = 2;
        before = 1e9;
        for (int R : {1, 2, 4, 8}) {
            run.plan.ranks = R;
            const Forecast g = forecast_step(dev, run, Speed(), R > 1 ? slice * 8 / size_t(R) : slice * 8, all(run));
            CHECK(g.seconds < before && g.work / R / g.seconds < efficiency, "%d ranks: %.9g s, efficiency %.4f", R,
                  g.seconds, g.work / R / g.seconds);
            CHECK(R > 1 || (is_near(g.seconds, g.compute) && is_near(g.work, g.seconds)), "one rank: %.9g s of %.9g s",
                  g.seconds, g.compute);
            before = g.seconds;
            efficiency = g.work / R / g.seconds;
        }
        run.plan.ranks = 8;
    }
}

static void line_shown() {
    Run run;
    small_run(run, {300, 200, 200, 100});
    run.plan.ranks = 2;
    run.plan.weights = 1234567;
    Cpu<float> cpu;
    const double compute = document_seconds(300) + document_seconds(100), sum = 4 * 4 * SMALL_LORA / 1e6,
                 work = compute + 2 * document_seconds(200);
    const std::string want = text_format(
                          "2 ranks at 0.001 GB/s: 1.23 MB a rank; a step of 800 tokens %.3f s = compute "
                          "%.3f + other ranks %.3f (262 kB each way); %.0f tok/s together, "
                          "efficiency %.0f %%",
                          compute + sum, compute, sum, 800 / (compute + sum), 100 * work / 2 / (compute + sum)),
                      text = forecast_text(cpu, run, one_gflops(), BaseOptions(), {all(run), all(run)});
    CHECK(text == want, "%s\n    want %s", text.c_str(), want.c_str());
}

extern const Test forecast_tests[];
const Test forecast_tests[] = {
    {"clocks_by_hand", clocks_by_hand},
    {"order_of_the_model", order_of_the_model},
    {"parts_are_the_models_operations", parts_are_the_models_operations},
    {"seconds_by_hand", seconds_by_hand},
    {"more_takes_longer", more_takes_longer},
    {"costs_from_times", costs_from_times},
    {"beginning_of_a_pass", beginning_of_a_pass},
    {"calibration", calibration},
    {"steps_by_hand", steps_by_hand},
    {"parts_of_a_pass", parts_of_a_pass},
    {"cards_and_links", cards_and_links},
    {"line_shown", line_shown},
    {nullptr, nullptr},
};
