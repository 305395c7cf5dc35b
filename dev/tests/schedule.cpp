// The run's arithmetic without a run: number of steps, rates, the order of examples.
#include <algorithm>

#include "dev/tests/test.h"
#include "train_run.h"

// A run over n examples of two tokens.
static Run small_run(size_t n, int batch, double epochs) {
    Run run;
    run.o.batch = batch;
    run.o.epochs = epochs;
    run.console.quiet = true;
    run.c.C = 2000;
    for (size_t i = 0; i < n; i++) {
        run.train.ids.insert(run.train.ids.end(), {1, 2});
        run.train.targets.insert(run.train.targets.end(), {0, 1});
        run.train.start.push_back(run.train.ids.size());
    }
    return run;
}

static void number_of_steps() {
    const struct {
        size_t n;
        int batch;
        double epochs;
        int64_t given, per_epoch, steps, warmup;
    } cases[] = {
        {226, 16, 3, 0, 15, 45, 2},   // ceil(226 / 16) = 15; 3 % of 45 is 1.35
        {100, 2, 1.1, 0, 50, 55, 2},  // 1.1 * 50 is 55.00000000000001 in double
        {10, 4, 0.5, 0, 3, 2, 1},     // ceil(1.5)
        {10, 4, 0.01, 0, 3, 1, 1},   {1, 16, 3, 0, 1, 3, 1}, {226, 16, 3, 7, 15, 7, 1},
    };
    for (const auto& c : cases) {
        Run run = small_run(c.n, c.batch, c.epochs);
        run.o.steps = c.given;
        Error e = schedule_settings(run);
        CHECK(!e && run.steps_per_epoch == c.per_epoch && run.steps == c.steps && run.warmup == c.warmup,
              "%zu examples, batch %d, %g epochs: %lld an epoch, %lld steps, %lld warm-up", c.n, c.batch, c.epochs,
              (long long)run.steps_per_epoch, (long long)run.steps, (long long)run.warmup);
    }
    Run run = small_run(8, 4, 1);
    run.o.warmup = 3;
    Error e = schedule_settings(run);
    CHECK(e.code == 2 && text_has(e.what, "--warmup 3 is longer than the run (found 2 steps)"), "%s", e.what.c_str());
}

// lr (s + 1) / W, then (T - s) / (T - W), 1, or (1 + cos(pi (s - W) / (T - W))) / 2.
static void rates() {
    const double linear[] = {0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25};
    const double cosine[] = {0.25, 0.5, 0.75, 1, 1, (1 + std::sqrt(0.5)) / 2, 0.5, (1 - std::sqrt(0.5)) / 2};
    const double constant[] = {0.25, 0.5, 0.75, 1, 1, 1, 1, 1};
    const std::pair<const char*, const double*> schedules[] = {
        {"linear", linear}, {"cosine", cosine}, {"constant", constant}};
    for (const auto& schedule : schedules) {
        Run run = small_run(8, 1, 1);
        run.o.warmup = 4;
        run.o.lr = 0.02;
        run.o.schedule = schedule.first;
        Error e = schedule_settings(run);
        for (int64_t s = 0; s < run.steps && !e; s++) {
            double want = 0.02 * schedule.second[s], rate = learning_rate(run, s);
            CHECK_ERROR(std::string(schedule.first) + " step " + std::to_string(s), std::fabs(rate - want), 1e-15);
        }
    }
    Run run = small_run(8, 1, 1);  // no warm-up: the first step has the full rate
    run.o.warmup = 0;
    run.o.lr = 0.5;
    Error e = schedule_settings(run);
    CHECK(!e && learning_rate(run, 0) == 0.5 && learning_rate(run, 7) == 0.5 / 8, "%g %g", learning_rate(run, 0),
          learning_rate(run, 7));
}

// 5e-5 * 10 * (2000 / hidden)^0.781, and the values that the formula's authors give for Llama sizes.
static void default_rate() {
    const std::pair<int, double> known[] = {
        {2000, 5e-4}, {2048, 4.91e-4}, {3072, 3.58e-4}, {4096, 2.86e-4}, {8192, 1.66e-4}};
    for (const auto& k : known) {
        Run run = small_run(8, 1, 1);
        run.c.C = k.first;
        Error e = schedule_settings(run);
        CHECK(!e && std::fabs(run.lr / k.second - 1) < 0.003, "hidden %d: %g, need %g", k.first, run.lr,
              k.second);  // 3 digits
    }
}

static void order_of_examples() {
    Run run = small_run(10, 4, 3);
    Error e = schedule_settings(run);
    CHECK(!e && run.steps == 9, "%lld steps", (long long)run.steps);
    std::vector<std::vector<size_t>> epochs(3);
    for (int64_t s = 0; s < 9; s++) {
        std::vector<size_t> step = step_examples(run, s);
        CHECK(step.size() == (s % 3 == 2 ? 2u : 4u), "step %lld has %zu examples", (long long)s, step.size());
        epochs[size_t(s / 3)].insert(epochs[size_t(s / 3)].end(), step.begin(), step.end());
    }
    for (size_t i = 0; i < 3; i++) {
        std::vector<size_t> sorted = epochs[i];
        std::sort(sorted.begin(), sorted.end());
        for (size_t k = 0; k < 10; k++) {
            CHECK(sorted[k] == k, "epoch %zu does not hold every example once", i);
        }
        CHECK(epochs[i] != sorted && epochs[i] != epochs[(i + 1) % 3], "epoch %zu is in file order or like another", i);
    }
    Run other = small_run(10, 4, 3);
    other.o.seed = 5;
    e = schedule_settings(other);
    CHECK(!e && step_examples(other, 0) != step_examples(run, 0), "another seed has the same order");
    Run plain = small_run(10, 4, 3);
    plain.o.shuffle = false;
    e = schedule_settings(plain);
    CHECK(!e && step_examples(plain, 3) == (std::vector<size_t>{0, 1, 2, 3}) &&
              step_examples(plain, 5) == (std::vector<size_t>{8, 9}),
          "--no-shuffle is not the file's order");
}

extern const Test schedule_tests[];
const Test schedule_tests[] = {
    {"number_of_steps", number_of_steps},     {"rates", rates},   {"default_rate", default_rate},
    {"order_of_examples", order_of_examples}, {nullptr, nullptr},
};
