// train_llama: a run of fine-tuning from its options to the files it leaves. Owns the loop, evaluation, what is logged
// and shown, the benchmark. Settings and data of a run are train_run.h's; no tensor arithmetic: that is llama.h and
// kernels/.
//
//   epoch e's order = permutation(seed, e); a step = the next -b examples of it, split into passes of whole documents
//   loss = sum of cross-entropy over the step's targets / their number;  clip;  AdamW on A and B
#include <new>
#include <utility>

#include "kernels/cpu/parallel.h"
#include "train_forecast.h"
#include "train_setup.h"

static volatile sig_atomic_t stop_signal = 0;
static bool speaks = true;                  // rank 0
static volatile sig_atomic_t patience = 0;  // with other ranks: seconds that a step or evaluation may last

extern "C" void on_signal(int number) {
    if (stop_signal != 0) {
        _exit(128 + number);  // the second one: at once; the checkpoint before is intact
    }
    stop_signal = number;
    alarm(unsigned(patience));  // perhaps another rank is dead, and this one would wait for it in vain
    const char text[] = "\n# stopping after this step, and saving; once more to stop at once, unsaved\n";
    ssize_t ignored = speaks ? write(STDERR_FILENO, text, sizeof(text) - 1) : 0;  // nothing else is safe in a handler
    (void)ignored;
}

// ---------------------------------------------------------------------------------------------------------------------
// records of log.jsonl

// Settings as given, then what they came to. How many threads is no part of it: they change no number.
static Json log_run(const Run& run, const std::string& device) {
    Json j = Json::object();
    j.set("event", "run").set("version", train_llama_version);
    for (const Json& settings : {options_to_json(run.o), resolved_settings(run)}) {
        for (size_t i = 0; i < settings.keys.size(); i++) {
            if (settings.keys[i] != "threads") {
                j.set(settings.keys[i], settings.items[i]);
            }
        }
    }
    j.set("device", device).set("model_dir", run.model_dir).set("base_sha256", run.base_hash);
    j.set("parameters", uint64_t(model_parameters(run.c)))
        .set("adapter_parameters", uint64_t(adapter_elements(run.c, run.lora)));
    j.set("template_used", run.form.name()).set("unicode", run.tokenizer.unicode_version);
    return j;
}

static Json log_data(const Run& run) {
    const Dataset& d = run.train;
    Json j = Json::object();
    j.set("event", "data").set("examples", d.size()).set("rejected", d.rejected).set("truncated", d.truncated);
    j.set("dropped", d.dropped_without_target).set("duplicates", d.duplicates).set("tokens", d.tokens);
    j.set("target_tokens", d.target_tokens).set("longest", d.longest).set("hash", d.hash);
    j.set("val_examples", run.val.size()).set("val_target_tokens", run.val.target_tokens);
    return j;
}

static Json log_plan(const Plan& p) {
    Json j = Json::object();
    j.set("event", "plan").set("weights_bytes", p.weights).set("adapter_bytes", p.adapter);
    j.set("optimizer_bytes", p.optimizer).set("activation_bytes", p.activations);  // the workspace goes by the threads
    j.set("pass_tokens", p.pass_tokens).set("recompute", recompute_text(p.recompute));
    j.set("ranks", p.ranks).set("base_spread", p.spread);
    return j;
}

// ---------------------------------------------------------------------------------------------------------------------
// evaluation

// false: a signal came in between, there is no result.
template <class Dev>
bool evaluate(Evaluation& e, Run& run, Llama<Dev>& m) {
    std::vector<size_t> all(run.val.size());
    std::iota(all.begin(), all.end(), size_t(0));
    const RankPasses passes = rank_passes(m, run.val, all, run.plan.pass_tokens, run.o.pack);
    double loss = 0, labels = 0, correct = 0;
    Batch b;
    for (size_t i = 0; i < passes.most; i++) {
        if (stop_poll(run, stop_signal) != 0) {
            return false;
        }
        if (i >= passes.mine.size()) {
            llama_idle(m, false, false);
            continue;
        }
        batch_make(b, run.val, passes.mine[i]);
        PassLoss one = llama_loss(m, llama_forward(m, b, 0, 0), false, 1);
        loss += one.loss;
        labels += double(one.labels);
        correct += double(one.correct);
    }
    double sums[] = {loss, labels, correct};
    host_sum(m.dev, sums, 3);
    e.step = run.step;
    e.loss = sums[0] / sums[1];
    e.accuracy = sums[2] / sums[1];
    return true;
}

// Validation loss has risen twice in a row while training loss fell: the adapter has begun to learn the examples by
// heart.
static void overfitting_warning(Run& run) {
    const std::vector<Evaluation>& e = run.evaluations;
    const size_t n = e.size();
    if (n < 3 || !(e[n - 1].loss > e[n - 2].loss && e[n - 2].loss > e[n - 3].loss &&
                   e[n - 1].train_loss < e[n - 2].train_loss)) {
        return;
    }
    const Evaluation* best = &e[0];
    for (const Evaluation& x : e) {
        best = x.loss < best->loss ? &x : best;
    }
    console_warn(run.console,
                 "overfitting: validation loss has risen for two evaluations (%.4f, %.4f, %.4f) while training loss "
                 "fell; the best step was %lld (%.4f)",
                 e[n - 3].loss, e[n - 2].loss, e[n - 1].loss, (long long)best->step, best->loss);
    log_event(run.log, Json::object()
                           .set("event", "overfitting")
                           .set("step", run.step)
                           .set("best_step", best->step)
                           .set("best_loss", best->loss));
}

// Evaluates when that is due and not yet done at this step. False: the loss is not finite.
template <class Dev>
bool evaluate_and_log(Run& run, Llama<Dev>& m) {
    Evaluation e;
    if (run.val.size() == 0 || (!run.evaluations.empty() && run.evaluations.back().step == run.step) ||
        !evaluate(e, run, m)) {
        return true;
    }
    e.train_loss = run.window_steps > 0 ? run.window_loss / double(run.window_steps) : 0;
    run.window_loss = 0;
    run.window_steps = 0;
    run.evaluations.push_back(e);
    log_event(run.log, Json::object()
                           .set("event", "eval")
                           .set("step", e.step)
                           .set("loss", e.loss)
                           .set("perplexity", std::exp(e.loss))
                           .set("token_accuracy", e.accuracy));
    console_line(run.console, text_format("eval step %lld | loss %.4f | perplexity %.3f | next-token accuracy %.1f %%",
                                          (long long)e.step, e.loss, std::exp(e.loss), 100 * e.accuracy));
    overfitting_warning(run);
    return std::isfinite(e.loss);
}

// ---------------------------------------------------------------------------------------------------------------------
// the loop

static StepRates step_rates(const Run& run, int64_t s) {
    const Options& o = run.o;
    return {learning_rate(run, s), o.beta1, o.beta2, o.eps, o.weight_decay, o.clip};
}

static void step_log(Run& run, const StepResult& r, double lr, double seconds, double eta) {
    const double rate = double(r.tokens) / seconds,
                 mfu = run.peak_gflops > 0 ? r.flops / seconds / 1e9 / run.peak_gflops : 0;
    Json record = Json::object()
                      .set("event", "step")
                      .set("step", run.step)
                      .set("epoch", double(run.step) / double(run.steps_per_epoch))
                      .set("loss", r.loss)
                      .set("lr", lr)
                      .set("grad_norm", r.grad_norm)
                      .set("tokens", r.tokens)
                      .set("target_tokens", r.targets)
                      .set("ms", seconds * 1e3)
                      .set("tokens_per_s", rate)
                      .set("mfu", mfu);
    if (r.rank_tokens.size() > 1) {
        Json each = Json::array();
        for (size_t n : r.rank_tokens) {
            each.push(n);
        }
        record.set("rank_tokens", each);
    }
    log_event(run.log, record);
    console_live(run.console,
                 text_format("step %4lld/%lld | loss %.4f | norm %.3f | lr %.2e | %.0f tok/s | %4.1f%% mfu | eta %s",
                             (long long)run.step, (long long)run.steps, r.loss, r.grad_norm, lr, rate, 100 * mfu,
                             text_duration(eta).c_str()),
                 run.step == run.steps);
}

// Ends a run whose step or evaluation is not finite: what, where, which lines. s: the step from 0, -1 before the first.
static Error diverged(Run& run, const std::string& bad, int64_t s) {
    std::string lines;
    for (size_t i : s >= 0 ? step_examples(run, s) : std::vector<size_t>()) {
        lines += (lines.empty() ? "" : ", ") + run.train.files[size_t(run.train.file[i])] + ":" +
                 std::to_string(run.train.line[i]);
    }
    log_event(run.log,
              Json::object().set("event", "end").set("reason", "diverged").set("steps", run.step).set("bad", bad));
    std::string where = path_join(run.dir, "checkpoints");
    Error e = {3, text_format("training diverged at step %lld: %s is not finite", (long long)(s + 1), bad.c_str()), ""};
    e.what += lines.empty() ? "" : "; the step's lines: " + printable(lines, 1000);
    return e.hinted("lower --lr, or look at these lines" +
                    (path_exists(where) ? "; the checkpoints before it are in " + where : ""));
}

static bool is_due(const Run& run, int64_t every) {
    return run.step % (every > 0 ? every : run.steps_per_epoch) == 0 || run.step == run.steps;
}

// Saves when it is due or a signal came. An Error only for the end of the run: 128 + signal, or 1 when that save
// failed or the ranks have drifted apart.
template <class Dev>
Error save_or_stop(Run& run, Llama<Dev>& m) {
    if (Error e = drift_check(run, m.dev.comm != nullptr ? checksum(m.dev, m.adapter.p, m.adapter.size) : 0)) {
        run.leaving = true;
        log_event(run.log, Json::object().set("event", "end").set("reason", "error").set("steps", run.step));
        return e;
    }
    const bool regular = is_due(run, run.o.save_every);
    const bool stop = stop_poll(run, stop_signal) != 0 && run.step < run.steps;
    alarm(0);
    const bool none = run.step == 0 || run.checkpoint.step == run.step || !(regular || stop);
    const bool saved = none || of_rank_0(run, run.comm.rank > 0 || checkpoint_try(run, m, regular));
    if (!stop) {
        return {};
    }
    log_event(run.log,
              Json::object().set("event", "end").set("reason", saved ? "signal" : "error").set("steps", run.step));
    if (!saved) {
        return runtime_failure("stopped by a signal after step %lld, and that step could not be saved",
                               (long long)run.step)
            .hinted("an earlier checkpoint may be there: " + run.program + " --resume -o " + run.dir);
    }
    return Error{128 + run.stop, "stopped by a signal after step " + std::to_string(run.step),
                 "go on with: " + run.program + " --resume -o " + run.dir};
}

// Steps until the end or a signal. The result's code is 0, 1, 3 (diverged) or 128 + signal.
template <class Dev>
Error train_loop(Run& run, Llama<Dev>& m) {
    const Options& o = run.o;
    if ((run.step == 0 || is_due(run, o.eval_every)) && !evaluate_and_log(run, m)) {
        return diverged(run, "validation loss", run.step - 1);
    }
    const double started = seconds_now();
    const int64_t first = run.step;
    while (run.step < run.steps) {
        if (Error e = run.stop != 0 ? save_or_stop(run, m) : Error()) {
            return e;  // came during an evaluation
        }
        const int64_t s = run.step;
        const double t = seconds_now();
        const StepRates rates = step_rates(run, s);
        StepResult r = train_step(m, run.train, step_examples(run, s), run.plan.pass_tokens, o.pack, s + 1, rates);
        if (!r.bad.empty()) {
            return diverged(run, r.bad, s);
        }
        run.step++;
        if (s == 0 && r.loss > std::log(double(run.c.V)) + 1) {
            console_warn(run.console,
                         "the first loss %.2f is worse than guessing (ln V = %.2f): tokenizer and model may not match",
                         r.loss, std::log(double(run.c.V)));
        }
        if (r.grad_norm == 0) {
            console_warn(run.console,
                         "step %lld: the gradient is zero, nothing more is learnt; --lr may be far too high",
                         (long long)run.step);
        }
        run.first_loss = s == 0 ? r.loss : run.first_loss;
        run.last_loss = r.loss;
        run.window_loss += r.loss;
        run.window_steps++;
        const double now = seconds_now();
        step_log(run, r, rates.lr, now - t, (now - started) / double(run.step - first) * double(run.steps - run.step));
        if (is_due(run, o.eval_every) && !evaluate_and_log(run, m)) {
            return diverged(run, "validation loss", s);
        }
        const double lasted = seconds_now() - t;
        patience = run.comm.size > 1 ? std::max(int(patience), int(10 + 3 * lasted)) : 0;
        if (Error e = save_or_stop(run, m)) {
            return e;
        }
    }
    return {};
}

static void closing_table(Run& run, const std::string& hash, double seconds, const std::string& memory) {
    std::vector<std::vector<std::string>> rows = {{"", "before", "after"}};
    if (run.evaluations.size() > 1) {
        const Evaluation &a = run.evaluations.front(), &b = run.evaluations.back();
        rows.push_back({"validation loss", text_format("%.4f", a.loss), text_format("%.4f", b.loss)});
        rows.push_back({"perplexity", text_format("%.3f", std::exp(a.loss)), text_format("%.3f", std::exp(b.loss))});
        rows.push_back({"next-token accuracy", text_format("%.1f %%", 100 * a.accuracy),
                        text_format("%.1f %%", 100 * b.accuracy)});
    }
    rows.push_back(
        {"training loss (first, last step)", text_format("%.4f", run.first_loss), text_format("%.4f", run.last_loss)});
    console_table(run.console, rows);
    if (run.evaluations.size() > 1 && run.evaluations.back().loss > run.evaluations.front().loss) {
        console_warn(run.console, "validation loss is higher than before training: lower --lr, or train on more data");
    }
    console_fact(run.console, "%lld steps in %s, %s", (long long)run.steps, text_duration(seconds).c_str(),
                 memory.c_str());
    console_fact(run.console, "adapter %s/adapter_model.safetensors (sha256 %.16s)", run.dir.c_str(), hash.c_str());
    console_fact(run.console, "load it with PEFT:  PeftModel.from_pretrained(base, \"%s\")", run.dir.c_str());
    console_fact(run.console, "repeat the run:     %s --config %s/run.json", run.program.c_str(), run.dir.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// a run

template <class Dev>
Error dry_run(Run& run, const Dev& dev, const BaseOptions& base) {
    const Options& o = run.o;
    for (size_t i = 0; i < std::min<size_t>(3, run.train.size()); i++) {
        console_line(run.console, text_format("# example %zu (line %zu), targets marked:", i + 1, run.train.line[i]));
        console_line(run.console, dataset_show(run.train, run.tokenizer, i, run.console.terminal));
    }
    if (!o.dump_data.empty()) {
        std::string text;
        for (size_t i = 0; i < run.train.size(); i++) {
            text += dataset_dump_line(run.train, i) + "\n";
        }
        if (Error e = on_rank_0(run, [&] { return file_replace(o.dump_data, text); })) {
            return e;
        }
        console_fact(run.console, "%zu examples written to %s", run.train.size(), o.dump_data.c_str());
    }
    console_fact(run.console, "%lld steps, %lld an epoch; peak rate %.3g after %lld steps of warm-up, %s",
                 (long long)run.steps, (long long)run.steps_per_epoch, run.lr, (long long)run.warmup,
                 o.schedule.c_str());
    std::vector<std::vector<size_t>> steps;
    for (int64_t s = 0; s < std::min<int64_t>(run.steps_per_epoch, 50); s++) {
        steps.push_back(step_examples(run, s));
    }
    const Speed speed = device_speed(dev, run, base, steps[0]);
    console_fact(run.console, "%s", speed_text(dev, run, speed, steps).c_str());
    forecast_show(run, dev, speed, base, steps);
    console_fact(run.console, "dry run: nothing was trained, no run directory was made");
    return {};
}

static void signals_install() {
    struct sigaction action = {};
    action.sa_handler = on_signal;
    for (int number : {SIGINT, SIGTERM, SIGHUP}) {
        struct sigaction before = {};
        sigaction(number, nullptr, &before);
        if (before.sa_handler != SIG_IGN) {  // nohup, and what a shell starts in the background
            sigaction(number, &action, nullptr);
        }
    }
}

static std::string rejected_text(const Dataset& data) {
    std::string text;
    for (const RejectedLine& r : data.bad) {
        text += json_write(Json::object()
                               .set("file", data.files[size_t(r.file)])
                               .set("line", r.line)
                               .set("reason", r.reason)
                               .set("raw", utf8_replace_invalid(r.raw.data(), r.raw.size(), nullptr))) +
                "\n";
    }
    return text;
}

// The last record of the log says that the run ended with this very adapter.
static bool is_complete(const Run& run) {
    std::string adapter = path_join(run.dir, "adapter_model.safetensors"), hash;
    InFile log;
    if (run.checkpoint.step < run.steps || !path_exists(adapter) ||
        !path_exists(path_join(run.dir, "adapter_config.json")) || sha256_file(hash, adapter) ||
        file_open(log, path_join(run.dir, "log.jsonl"))) {
        return false;
    }
    std::string tail(size_t(std::min<uint64_t>(log.size, 400)), ' ');
    Error e = file_pread(log, &tail[0], tail.size(), log.size - tail.size());
    file_close(log);
    size_t last = tail.rfind("{\"event\":\"end\"");
    return !e && last != std::string::npos && tail.find("\"finished\"", last) != std::string::npos &&
           tail.find(hash, last) != std::string::npos;
}

// On rank 0: run.json and the log, begun or gone on with.
static Error run_files_open(Run& run, uint64_t keep_log, const std::string& device) {
    if (Error e = file_replace(path_join(run.dir, "run.json"), json_write(options_to_json(run.o), 2) + "\n")) {
        return e;
    }
    if (Error e = log_open(run.log, path_join(run.dir, "log.jsonl"), keep_log)) {
        return e;
    }
    if (keep_log == 0) {
        log_event(run.log, log_run(run, device));
        log_event(run.log, log_data(run));
        log_event(run.log, log_plan(run.plan));
    }
    return run.train.bad.empty() && run.val.bad.empty()
               ? Error()
               : file_replace(path_join(run.dir, "rejected.jsonl"), rejected_text(run.train) + rejected_text(run.val));
}

// The part of a run that writes: run.json, the log, the loop, the adapter.
template <class Dev>
Error run_files(Run& run, Llama<Dev>& m, uint64_t keep_log, const std::string& device, double setup) {
    const double started = seconds_now();
    console_fact(run.console, "run directory %s", run.dir.c_str());
    console_fact(run.console, "%lld steps of up to %d examples, %lld an epoch; peak rate %.3g, warm-up %lld, %s",
                 (long long)run.steps, run.o.batch, (long long)run.steps_per_epoch, run.lr, (long long)run.warmup,
                 run.o.schedule.c_str());
    if (Error e = on_rank_0(run, [&] { return run_files_open(run, keep_log, device); })) {
        return e;
    }
    signals_install();
    if (Error e = train_loop(run, m)) {
        return e;
    }
    std::string hash;
    if (Error e = on_rank_0(run, [&] { return adapter_write(run, m, &hash); })) {
        log_event(run.log, Json::object().set("event", "end").set("reason", "error").set("steps", run.step));
        return e.what.empty()
                   ? e
                   : e.hinted("free space or mend the directory, then: " + run.program + " --resume -o " + run.dir);
    }
    log_event(run.log, Json::object()
                           .set("event", "end")
                           .set("reason", "finished")
                           .set("steps", run.step)
                           .set("adapter_sha256", hash));
    log_sync(run.log);
    closing_table(run, hash, seconds_now() - started + setup, device_peak_memory(m.dev));
    return {};
}

// On rank 0: the run directory is there, this run's alone, on a disk with room.
static Error run_directory_open(Run& run) {
    Error e = run_directory_prepare(run.dir, run.model_dir, run.o.resume, run.o.overwrite);
    e = e || run.lock.fd >= 0 ? e : run_lock(run.lock, run.dir);
    return e ? e : checkpoint_preflight(run.dir, 3 * adapter_elements(run.c, run.lora) * 4);
}

// From data and model to the end of the run. The run directory is touched only once everything has been read.
template <class Dev>
Error train(Run& run, Dev& dev) {
    const Options& o = run.o;
    const double started = seconds_now();
    BaseOptions base = {o.quant == "nf4", o.double_quant, false};
    const std::string device = device_label(dev);
    run.peak_gflops = sum_of_ranks(run, device_peak_gflops(dev));
    banner(run, device, dev.threads);
    size_t longest;
    Error e = data_and_plan(run, dev, base, &longest);
    if (o.dry_run) {
        return e ? e : dry_run(run, dev, base);
    }
    plan_base(base, run.plan);
    Llama<Dev> m;
    m.dev = std::exchange(dev, Dev());  // the model's from here on: llama_free closes it
    uint64_t keep_log;
    e = ranks_agree(run, e);
    e = e ? e : same_check(run, m.dev);
    e = ranks_agree(run, e ? e : device_take(m.dev, run.plan));
    e = ranks_agree(run, e ? e : model_ready(run, m, base, longest, &keep_log));
    if (!e && of_rank_0(run, run.comm.rank == 0 && is_complete(run))) {
        console_fact(run.console, "already complete: the adapter is in %s", run.dir.c_str());
    } else if (!e) {
        e = on_rank_0(run, [&] { return run_directory_open(run); });
        e = e ? e : run_files(run, m, keep_log, device, seconds_now() - started);
    }
    log_close(run.log);
    if (!e) {
        comm_detach(m.dev);
    }
    llama_free(m);
    return e;
}

// ---------------------------------------------------------------------------------------------------------------------
// --benchmark: timed steps on random tokens

// Of a step on the rank that has most of them.
static size_t random_tokens(const Run& run) {
    const int ranks = run.o.ranks > 0 ? run.o.ranks : run.comm.size;
    return run.max_tokens * size_t((run.o.batch + ranks - 1) / ranks);
}

static void benchmark_data(Run& run, int documents) {
    const size_t T = run.max_tokens;
    Dataset& d = run.train;
    for (int i = 0; i < documents; i++) {
        for (size_t t = 0; t < T; t++) {
            d.ids.push_back(int32_t(random_below(run.o.seed, STREAM_TOKENS, uint64_t(i), t, uint64_t(run.c.V))));
            d.targets.push_back(t > 0);
        }
        d.start.push_back(d.ids.size());
    }
    d.longest = T;
}

template <class Dev>
Error benchmark(Run& run, Dev& dev) {
    const Options& o = run.o;
    BaseOptions base = {o.quant == "nf4", o.double_quant, false};
    run.peak_gflops = sum_of_ranks(run, device_peak_gflops(dev));
    banner(run, device_label(dev), dev.threads);
    plan_wishes(run, dev);
    Error plan = plan_choose(run.plan, dev, run.c, run.lora, base, run.max_tokens, random_tokens(run), o.pass_tokens,
                             o.recompute, memory_of_ranks(run, dev));
    plan_show(run, dev);
    if (plan) {
        return plan;
    }
    benchmark_data(run, o.batch);
    std::vector<size_t> examples(run.train.size());
    std::iota(examples.begin(), examples.end(), size_t(0));
    const Speed speed = device_speed(dev, run, base, examples);
    console_fact(run.console, "%s", speed_text(dev, run, speed, {examples}).c_str());
    plan_base(base, run.plan);
    Llama<Dev> m;
    m.dev = std::exchange(dev, Dev());  // the model's from here on: llama_free closes it
    Error e = ranks_agree(run, device_take(m.dev, run.plan));
    e = e ? e : base_open(run, m, base);
    if (e) {
        llama_free(m);
        return e;
    }
    llama_adapter_create(m, run.lora, run.plan.paged);
    llama_activations_create(m, run.plan.pass_tokens, run.max_tokens, run.plan.recompute, true);
    llama_adapter_init(m, o.seed);
    std::vector<double> seconds;
    StepResult r;
    for (int64_t s = 0; s <= o.benchmark; s++) {  // the first is a warm-up
        if (s == 1) {
            std::fill(m.op_seconds, m.op_seconds + OPS, 0.0);
            device_timing(m.dev, true);
        }
        const double t = seconds_now();
        r = train_step(m, run.train, examples, run.plan.pass_tokens, o.pack, s + 1,
                       {1e-4, o.beta1, o.beta2, o.eps, 0, o.clip});
        if (s > 0) {
            seconds.push_back(seconds_now() - t);
            console_live(
                run.console,
                text_format("step %lld/%lld | loss %.4f | %.0f ms | %.1f tok/s", (long long)s, (long long)o.benchmark,
                            r.loss, seconds.back() * 1e3, double(r.tokens) / seconds.back()),
                s == o.benchmark);
        }
    }
    device_sync(m.dev);  // the clocks of work still queued
    double total = std::accumulate(seconds.begin(), seconds.end(), 0.0);
    std::vector<std::vector<std::string>> rows = {{"time by op", "ms a step", "share"}};
    for (int i = 0; i < (m.dev.comm != nullptr ? OPS : OP_RANKS); i++) {
        rows.push_back({op_name[i], text_format("%.1f", m.op_seconds[i] / double(seconds.size()) * 1e3),
                        text_format("%.1f %%", 100 * m.op_seconds[i] / total)});
    }
    console_table(run.console, rows);
    std::sort(seconds.begin(), seconds.end());
    const double median = seconds[seconds.size() / 2], achieved = r.flops / median / 1e9;
    const double peak = sum_of_ranks(run, device_measured_gflops(m.dev, run.peak_gflops / run.comm.size));
    console_fact(run.console, "median %.1f ms a step of %zu tokens, %s; %s planned", median * 1e3, r.tokens,
                 device_peak_memory(m.dev).c_str(), text_bytes(double(run.plan.total())).c_str());
    console_fact(run.console, "achieved %.1f GFLOP/s, measured peak %.1f GFLOP/s: %.1f %%", achieved, peak,
                 100 * achieved / peak);
    printf("tokens_per_s: %.2f\n", double(r.tokens) / median);
    comm_detach(m.dev);
    llama_free(m);
    return {};
}

// -m shape:NAME --dry-run: the memory plan and the speed to hope for, without data.
template <class Dev>
Error shape_plan(Run& run, Dev& dev) {
    const Options& o = run.o;
    if (!o.dry_run) {
        return bad_input("-m %s has random weights: it is for --dry-run and --benchmark N only", o.model.c_str());
    }
    run.peak_gflops = sum_of_ranks(run, device_peak_gflops(dev));
    banner(run, device_label(dev), dev.threads);
    BaseOptions base = {o.quant == "nf4", o.double_quant, false};
    plan_wishes(run, dev);
    Error e = plan_choose(run.plan, dev, run.c, run.lora, base, run.max_tokens, random_tokens(run), o.pass_tokens,
                          o.recompute, memory_of_ranks(run, dev));
    plan_show(run, dev);
    if (e && e.code != 1) {
        return e;
    }
    if (e) {  // a plan is what was asked for; that it does not fit here is part of it
        console_warn(run.console, "%s", e.what.c_str());
    }
    benchmark_data(run, run.o.batch);
    std::vector<size_t> step(run.train.size());
    std::iota(step.begin(), step.end(), size_t(0));
    const Speed speed = device_speed(dev, run, base, step);
    console_fact(run.console, "%s", speed_text(dev, run, speed, {step}).c_str());
    forecast_show(run, dev, speed, base, {step});
    return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// main

static Error program(Run& run, int argc, char** argv) {
    bool done = false;
    Error e = options_parse(run.o, &done, argc, argv);
    if (e || done) {
        return e;
    }
    console_open(run.console, run.o.quiet);
    run.console.muted = !speaks;
    run.console.terminal &= run.comm.state == nullptr;  // a launcher's is of its own making, whatever stands behind it
    run.program = argv[0];
    char exe[4096];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof(exe) - 1);
    run.exe_dir = path_directory(n > 0 ? std::string(exe, size_t(n)) : std::string(argv[0]));
    e = same_options(run);
    e = ranks_agree(run, e ? e : device_settings(run.o));
    e = e ? e : directory_settings(run);
    e = e ? e : model_open(run);
    e = e ? e : lora_settings(run);
    e = e ? e : length_settings(run);
    e = e || run.comm.rank > 0 ? e : outputs_check(run);
    e = ranks_agree(run, e);
    if (e) {
        return e;
    }
    return with_device(run, [&](auto& dev) -> Error {
        if (run.o.benchmark > 0) {
            return benchmark(run, dev);
        }
        if (is_shape(run.o)) {
            return shape_plan(run, dev);
        }
        Error opened = ranks_agree(run, text_open(run));
        opened = opened ? opened : train(run, dev);
        tokenizer_free(run.tokenizer);
        return opened;
    });
}

int main(int argc, char** argv) {
    wait_passively(argv);
    signal(SIGPIPE, SIG_IGN);  // a reader of our output that goes away must not end the training
    Run run;
    const std::string why = comm_open(run.comm);
    if (!why.empty()) {
        return error_print(bad_input("%s", why.c_str()));
    }
    speaks = run.comm.rank == 0;
    FILE* silent = speaks ? stdout : freopen("/dev/null", "w", stdout);  // what all would say, one says
    (void)silent;
    Error e;
    try {
        e = program(run, argc, argv);
    } catch (const std::bad_alloc&) {
        e = runtime_failure("out of memory")
                .hinted("fewer or shorter examples, a smaller model; --dry-run shows the plan");
    }
    if (run.lock.fd >= 0) {
        run_unlock(run.lock);
        rmdir(run.dir.c_str());  // only succeeds when nothing was written there
    }
    return ranks_end(run, e);
}
