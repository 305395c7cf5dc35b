// What a step costs on ranks that are not there: the clocks of work and link by hand, the order of what goes over the
// link against the model's own, whole steps against sums made here.
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

// 4 layers of 64, heads of 16, ffn 128, vocabulary 96, rank 16 on all linears; 1 GFLOP/s.
static void small_run(Run& run, const std::vector<size_t>& lengths) {
    LlamaConfig& c = run.c;
    c.L = 4, c.C = 64, c.F = 128, c.V = 96, c.NH = 4, c.NKV = 2, c.HS = 16;
    run.peak_gflops = 1;
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

// A document of n tokens, n - 1 with a label, at 1 GFLOP/s: 4 operations a weight and token, 6 an adapter weight; the
// input gradient of the first layer's q, k, v is not made; the head 4; attention 7 products of 2 over the pairs of a
// head.
static double document_seconds(double n) {
    return (4 * n * 4 * SMALL - 2 * n * SMALL_QKV + 6 * n * 4 * SMALL_LORA + 4 * (n - 1) * 96 * 64 +
            7 * 2 * (n * (n + 1) / 2) * 64 * 4) /
           1e9;
}

// On the CPU everything adds up: the fullest rank, or of each round the fullest; the sum; the gathers.
static void steps_by_hand() {
    Run run;
    small_run(run, {300, 200, 200, 100});
    Cpu<float> dev;
    const double t1 = document_seconds(100), t2 = document_seconds(200), t3 = document_seconds(300),
                 work = t1 + 2 * t2 + t3;
    const auto sum = [](double R) { return 2 * (R - 1) / R * 4 * 4 * SMALL_LORA / 1e6; };  // seconds at 1 MB/s
    run.plan.ranks = 1;
    Forecast f = forecast_step(dev, run, 0, all(run));
    CHECK(is_near(f.seconds, work) && is_near(f.work, work) && f.bytes == 0 && f.tokens == 800,
          "one rank: %.9g s, by hand %.9g s; %g bytes", f.seconds, work, f.bytes);
    run.plan.ranks = 2;  // 300 and 100 on one, 200 twice on the other
    f = forecast_step(dev, run, 0, all(run));
    CHECK(is_near(f.seconds, t3 + t1 + sum(2)) && is_near(f.compute, t3 + t1) && is_near(f.work, work),
          "two ranks: %.9g s, by hand %.9g s", f.seconds, t3 + t1 + sum(2));
    CHECK(is_near(f.bytes, sum(2) * 1e6) && f.gathers == 0, "two ranks: %g bytes", f.bytes);
    run.plan.ranks = 3;  // 300; 200 and 100; 200
    f = forecast_step(dev, run, 0, all(run));
    CHECK(is_near(f.seconds, t3 + sum(3)) && is_near(f.work, work), "three ranks: %.9g s, by hand %.9g s", f.seconds,
          t3 + sum(3));
    run.plan.ranks = 3;  // of the base as well: 4 gathers of two slices of 5,000 bytes from others
    f = forecast_step(dev, run, 5000, all(run));
    CHECK(is_near(f.seconds, t3 + sum(3) + 4 * 2 * 5e-3) && f.gathers == 4, "spread: %.9g s, %zu gathers", f.seconds,
          f.gathers);
    CHECK(is_near(f.bytes, sum(3) * 1e6 + 4 * 2 * 5000), "spread: %g bytes", f.bytes);
    run.plan.ranks = 2;  // passes of one document: 300 beside 200, 100 beside 200
    run.plan.pass_tokens = 300;
    f = forecast_step(dev, run, 5000, all(run));
    CHECK(is_near(f.seconds, t3 + t2 + sum(2) + 2 * 4 * 5e-3) && is_near(f.compute, t3 + t1),
          "in step: %.9g s, by hand %.9g s", f.seconds, t3 + t2 + sum(2) + 2 * 4 * 5e-3);
    run.plan.ranks = 9;  // more than there are documents: one a rank, five have nothing
    f = forecast_step(dev, run, 0, all(run));
    CHECK(is_near(f.seconds, t3 + sum(9)) && is_near(f.work, work), "nine ranks: %.9g s", f.seconds);
    run.comm.size = 2;  // the peak is that of two
    f = forecast_step(dev, run, 0, all(run));
    CHECK(is_near(f.compute, 2 * t3), "a rank of two: %.9g s", f.compute);
    Batch b;
    batch_make(b, run.train, {0});
    const PassTime t = pass_time(dev, run, b);
    CHECK(is_near(t.head, 2 * 4.0 * 299 * 96 * 64 / 1e9), "its head: %.9g s", t.head);
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
    const PassTime t = pass_time(dev, run, b);
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
    const Forecast f = forecast_step(dev, run, 0, all(run));
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
            const Forecast g = forecast_step(dev, run, slice, all(run));
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
            const Forecast g = forecast_step(dev, run, R > 1 ? slice * 8 / size_t(R) : slice * 8, all(run));
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
                          "%.3f + other ranks %.3f (262 kB each way); at most %.0f tok/s together, "
                          "efficiency %.0f %%",
                          compute + sum, compute, sum, 800 / (compute + sum), 100 * work / 2 / (compute + sum)),
                      text = forecast_text(cpu, run, BaseOptions(), {all(run), all(run)});
    CHECK(text == want, "%s\n    want %s", text.c_str(), want.c_str());
}

extern const Test forecast_tests[];
const Test forecast_tests[] = {
    {"clocks_by_hand", clocks_by_hand},
    {"order_of_the_model", order_of_the_model},
    {"steps_by_hand", steps_by_hand},
    {"parts_of_a_pass", parts_of_a_pass},
    {"cards_and_links", cards_and_links},
    {"line_shown", line_shown},
    {nullptr, nullptr},
};
