// train_llama: a run of fine-tuning from its options to the files it leaves. Owns the loop, evaluation, what is logged
// and shown, the benchmark. Settings and data of a run are train_run.h's; no tensor arithmetic: that is llama.h and
// kernels/.
//
//   epoch e's order = permutation(seed, e); a step = the next -b examples of it, split into passes of whole documents
//   loss = sum of cross-entropy over the step's targets / their number;  clip;  AdamW on A and B
#include <new>
#include <utility>

#include "kernels/cpu/parallel.h"
#include "train_checkpoint.h"

static volatile sig_atomic_t stop_signal = 0;

extern "C" void on_signal(int number) {
    if (stop_signal != 0) {
        _exit(128 + number);  // the second one: at once; the checkpoint before is intact
    }
    stop_signal = number;
    const char text[] = "\n# stopping after this step, and saving; once more to stop at once, unsaved\n";
    ssize_t ignored = write(STDERR_FILENO, text, sizeof(text) - 1);  // nothing else is safe in a handler
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
    return j;
}

// Shows nothing when the settings were refused before there was a plan.
template <class Dev>
void plan_show(Run& run, const Dev& dev) {
    const Plan& p = run.plan;
    if (p.pass_tokens == 0) {
        return;
    }
    std::vector<std::vector<std::string>> rows = {
        {"memory plan", ""},
        {"  base (" + p.base_text + (p.host_embed && !run.c.tied ? ", embedding on the host)" : ")"),
         text_bytes(double(p.weights))},
        {"  adapter and gradients (fp32)", text_bytes(double(p.adapter))},
        {!p.paged ? "  optimizer moments (fp32)" : "  optimizer moments (fp32, on the host; two slabs)",
         text_bytes(double(p.optimizer))},
        {text_format("  activations (passes of %zu tokens, recompute %s)", p.pass_tokens,
                     recompute_text(p.recompute).c_str()),
         text_bytes(double(p.activations))}};
    if (p.slots > 0) {
        rows.push_back({"  weights of two linear groups restored", text_bytes(double(p.slots))});
    }
    rows.push_back({"  workspace", text_bytes(double(p.workspace + p.library))});
    rows.push_back({"  together, of " + text_bytes(double(device_memory(dev))), text_bytes(double(p.total()))});
    console_table(run.console, rows);
}

// ---------------------------------------------------------------------------------------------------------------------
// evaluation

// false: a signal came in between, there is no result.
template <class Dev>
bool evaluate(Evaluation& e, Run& run, Llama<Dev>& m) {
    std::vector<size_t> all(run.val.size());
    std::iota(all.begin(), all.end(), size_t(0));
    PassLoss sum;
    Batch b;
    for (const std::vector<size_t>& examples : passes_make(run.val, all, run.plan.pass_tokens, run.o.pack)) {
        if (stop_signal != 0) {
            return false;
        }
        batch_make(b, run.val, examples);
        PassLoss one = llama_loss(m, llama_forward(m, b, 0, 0), false, 1);
        sum.loss += one.loss;
        sum.labels += one.labels;
        sum.correct += one.correct;
    }
    e.step = run.step;
    e.loss = sum.loss / double(sum.labels);
    e.accuracy = double(sum.correct) / double(sum.labels);
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
    log_event(run.log, Json::object()
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
                           .set("mfu", mfu));
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
// failed.
template <class Dev>
Error save_or_stop(Run& run, Llama<Dev>& m) {
    const bool regular = is_due(run, run.o.save_every), stop = stop_signal != 0 && run.step < run.steps;
    bool saved =
        run.step == 0 || run.checkpoint.step == run.step || !(regular || stop) || checkpoint_try(run, m, regular);
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
    return Error{128 + stop_signal, "stopped by a signal after step " + std::to_string(run.step),
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
        if (Error e = stop_signal != 0 ? save_or_stop(run, m) : Error()) {
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
// setting up

static Error model_open(Run& run) {
    if (is_shape(run.o)) {
        run.model_dir = run.o.model;
        if (!run.o.inputs.empty() || !run.o.dump_data.empty()) {
            return bad_input("-m %s takes no data: its weights are random", run.o.model.c_str())
                .hinted("leave out -i and --dump-data, or give a model directory");
        }
        return llama_config_shape(run.c, run.o.model.substr(6));
    }
    run.model_dir = run.o.model.empty() ? default_model(run) : run.o.model;
    Error read = llama_config_read(run.c, run.model_dir);
    read = read ? read : bnb_layout_read(run.c, run.model_dir);
    if (read) {
        return read;
    }
    for (const std::string& w : run.c.warnings) {
        console_warn(run.console, "%s", w.c_str());
    }
    char* real = realpath(run.model_dir.c_str(), nullptr);  // so that the adapter finds its base from any directory
    run.base_name = real != nullptr ? real : run.model_dir;
    free(real);
    return {};
}

static Error text_open(Run& run) {
    if (Error e = tokenizer_load(run.tokenizer, run.model_dir, run.c.V)) {
        return e;
    }
    for (const std::string& w : run.tokenizer.warnings) {
        console_warn(run.console, "%s", w.c_str());
    }
    const std::string& t = run.o.chat_template;
    return chat_form_choose(run.form, run.tokenizer,
                            t == "llama3"       ? Template::LLAMA3
                            : t == "llama3-raw" ? Template::LLAMA3_RAW
                            : t == "plain"      ? Template::PLAIN
                                                : Template::AUTO);
}

// A model's rows for the control tokens of its chat template may never have been trained (base models): said, since
// frozen embeddings stay as they are.
template <class Dev>
void untrained_rows_warning(Run& run, Llama<Dev>& m) {
    auto norm = [&](size_t row) {
        const int32_t token = int32_t(row);
        std::vector<typename Dev::floatX> x(run.c.C);
        device_to(m.dev, m.acts.tokens, &token, sizeof(token));
        embedding_forward(m.dev, m.acts.resid, m.acts.tokens, m.w.embed, 1);
        device_from(m.dev, x.data(), m.acts.resid, x.size() * sizeof(x[0]));
        double sum = 0;
        for (auto v : x) {
            sum += double(to_float(v)) * double(to_float(v));
        }
        return std::sqrt(sum);
    };
    if (run.form.kind == ChatForm::PLAIN) {
        return;
    }
    std::vector<double> sample;
    for (size_t i = 0; i < std::min<size_t>(1000, run.c.V); i++) {
        sample.push_back(norm(i * size_t(run.c.V) / std::min<size_t>(1000, run.c.V)));
    }
    std::nth_element(sample.begin(), sample.begin() + sample.size() / 2, sample.end());
    const int ids[] = {run.form.header, run.form.header_end, run.form.eot};
    for (int id : ids) {
        if (id >= 0 && norm(id) < 0.25 * sample[sample.size() / 2]) {
            console_warn(run.console,
                         "the embedding of %s looks untrained (a base model?); it is frozen and will stay meaningless",
                         printable(run.tokenizer.pieces[id]).c_str());
        }
    }
}

static void banner(Run& run, const std::string& device, int threads) {
    console_fact(run.console, "train_llama %s on %s, %d threads", train_llama_version, device.c_str(), threads);
    console_fact(run.console, "base %s: %s parameters, %d layers, hidden %d, %d/%d heads of %d, vocabulary %d%s",
                 run.model_dir.c_str(), text_count(model_parameters(run.c)).c_str(), run.c.L, run.c.C, run.c.NH,
                 run.c.NKV, run.c.HS, run.c.V, run.c.tied ? ", tied head" : "");
    std::string targets;
    for (int i = 0; i < MODULES; i++) {
        targets += run.lora.target[i] ? std::string(targets.empty() ? "" : " ") + module_name[i] : "";
    }
    console_fact(run.console, "LoRA rank %d, scale %g, dropout %g on %s: %s parameters", run.lora.r, run.lora.scale(),
                 double(run.lora.dropout), targets.c_str(), text_count(adapter_elements(run.c, run.lora)).c_str());
}

template <class Dev>
Error dry_run(Run& run, const Dev& dev) {
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
        if (Error e = file_replace(o.dump_data, text)) {
            return e;
        }
        console_fact(run.console, "%zu examples written to %s", run.train.size(), o.dump_data.c_str());
    }
    Batch b;
    batch_make(b, run.train, step_examples(run, 0));
    console_fact(run.console, "%lld steps, %lld an epoch; peak rate %.3g after %lld steps of warm-up, %s",
                 (long long)run.steps, (long long)run.steps_per_epoch, run.lr, (long long)run.warmup,
                 o.schedule.c_str());
    console_fact(run.console, "%s", speed_text(dev, run, plan_tokens_per_s(dev, run, b)).c_str());
    console_fact(run.console, "dry run: nothing was trained, no run directory was made");
    return {};
}

// The longest example and the most tokens of a step, for the plan.
static void data_extent(const Run& run, size_t* longest, size_t* most) {
    *longest = std::max(run.train.longest, run.val.size() > 0 ? run.val.longest : 0);
    std::vector<size_t> lengths;
    for (size_t i = 0; i < run.train.size(); i++) {
        lengths.push_back(run.train.length(i));
    }
    std::sort(lengths.rbegin(), lengths.rend());
    lengths.resize(std::min(lengths.size(), size_t(run.o.batch)));
    *most = std::max(*longest, std::accumulate(lengths.begin(), lengths.end(), size_t(0)));
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

// The execution choices of a checkpoint are used again, unless this command line gives others.
static void execution_restore(Run& run, const std::string& tier) {
    const Json* x = run.checkpoint.state.find("execution");
    if (x == nullptr) {
        return;
    }
    const Json *recompute = x->find("recompute"), *then = x->find("tier"), *version = x->find("program"),
               *gemm = x->find("gemm");
    std::string changed;
    if (!run.pass_tokens_given) {
        run.plan.pass_tokens = size_t(state_number(*x, "pass_tokens"));
    } else if (run.plan.pass_tokens != size_t(state_number(*x, "pass_tokens"))) {
        changed = "passes of another length";
    }
    if (!run.recompute_given && recompute != nullptr) {
        recompute_parse(run.plan.recompute, recompute->string, run.c.L);
    }
    if (gemm != nullptr && run.plan.gemm != gemm_parse(gemm->string)) {
        changed = run.gemm_given ? "other matrix products (--gemm)" : changed;
        run.plan.gemm = run.gemm_given ? run.plan.gemm : gemm_parse(gemm->string);
    }
    if (then != nullptr && then->string != tier) {
        changed = "tier " + printable(then->string) + " then, " + tier + " now";
    }
    if (version != nullptr && version->string != train_llama_version) {
        changed = "version " + printable(version->string) + " then, " + train_llama_version + " now";
    }
    if (!changed.empty()) {
        console_warn(run.console, "%s: the same training, no longer the same bits", changed.c_str());
    }
}

template <class Dev>
Error base_open(Run& run, Llama<Dev>& m, const BaseOptions& base) {
    const double t = seconds_now();
    m.c = run.c;
    if (is_shape(run.o)) {
        llama_random(m, base);
        return {};
    }
    std::vector<std::string> warnings;
    if (Error e = llama_load(m, &run.base_hash, warnings, run.model_dir, base)) {
        return e;
    }
    for (const std::string& w : warnings) {
        console_warn(run.console, "%s", w.c_str());
    }
    console_fact(run.console, "base read in %.1f s", seconds_now() - t);
    return {};
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

// The part of a run that writes: run.json, the log, the loop, the adapter.
template <class Dev>
Error run_files(Run& run, Llama<Dev>& m, uint64_t keep_log, const std::string& device, double setup) {
    const double started = seconds_now();
    console_fact(run.console, "run directory %s", run.dir.c_str());
    console_fact(run.console, "%lld steps of up to %d examples, %lld an epoch; peak rate %.3g, warm-up %lld, %s",
                 (long long)run.steps, run.o.batch, (long long)run.steps_per_epoch, run.lr, (long long)run.warmup,
                 run.o.schedule.c_str());
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
    if (!run.train.bad.empty() || !run.val.bad.empty()) {
        if (Error e =
                file_replace(path_join(run.dir, "rejected.jsonl"), rejected_text(run.train) + rejected_text(run.val))) {
            return e;
        }
    }
    signals_install();
    if (Error e = train_loop(run, m)) {
        return e;
    }
    std::string hash;
    if (Error e = adapter_write(run, m, &hash)) {
        log_event(run.log, Json::object().set("event", "end").set("reason", "error").set("steps", run.step));
        return e.hinted("free space or mend the directory, then: " + run.program + " --resume -o " + run.dir);
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

// Data, length and schedule, memory plan: all that a dry run shows. *longest: tokens of the longest example.
template <class Dev>
Error data_and_plan(Run& run, Dev& dev, const BaseOptions& base, size_t* longest) {
    const Options& o = run.o;
    if (Error e = data_read(run)) {
        return e;
    }
    data_report(run);
    if (Error e = schedule_settings(run)) {
        return e;
    }
    size_t most;
    data_extent(run, longest, &most);
    plan_wishes(run);
    Error e =
        plan_choose(run.plan, dev, run.c, run.lora, base, *longest, most, o.pass_tokens, o.recompute, device_memory(dev));
    if (run.checkpoint.step >= 0) {
        const Plan chosen = run.plan;
        execution_restore(run, device_tier(dev));
        plan_fill(run.plan, dev, run.c, run.lora, base, *longest);
        if (!e && plan_counted(dev, run.plan) >
                      std::max(plan_counted(dev, chosen), plan_budget(dev, device_memory(dev)))) {
            console_warn(run.console,
                         "the checkpoint's passes of %zu tokens, recompute %s, do not fit here: the same training, no "
                         "longer the same bits",
                         run.plan.pass_tokens, recompute_text(run.plan.recompute).c_str());
            run.plan = chosen;
        }
    }
    plan_show(run, dev);
    return e;
}

// Base, adapter and activations; a resumed run's state. *keep_log: bytes of the log that stay.
template <class Dev>
Error model_ready(Run& run, Llama<Dev>& m, const BaseOptions& base, size_t longest, uint64_t* keep_log) {
    if (Error e = base_open(run, m, base)) {
        return e;
    }
    llama_adapter_create(m, run.lora, run.plan.paged);
    llama_activations_create(m, run.plan.pass_tokens, longest, run.plan.recompute, true);
    untrained_rows_warning(run, m);
    m.dropout_seed = run.o.seed;
    *keep_log = 0;
    if (run.checkpoint.step < 0 && run.o.init_adapter.empty()) {
        llama_adapter_init(m, run.o.seed);
        return {};
    }
    if (run.checkpoint.step < 0) {
        return adapter_load(m, run.o.init_adapter);
    }
    Error e = state_restore(run, keep_log);
    e = e ? e : checkpoint_restore(m, run.checkpoint);
    if (!e) {
        console_fact(run.console, "going on after step %lld of %lld (%s)", (long long)run.step, (long long)run.steps,
                     run.checkpoint.path.c_str());
    }
    return e;
}

// From data and model to the end of the run. The run directory is touched only once everything has been read.
template <class Dev>
Error train(Run& run, Dev& dev) {
    const Options& o = run.o;
    const double started = seconds_now();
    BaseOptions base = {o.quant == "nf4", o.double_quant, false};
    const std::string device = device_label(dev);
    run.peak_gflops = device_peak_gflops(dev);
    banner(run, device, dev.threads);
    size_t longest;
    Error e = data_and_plan(run, dev, base, &longest);
    if (o.dry_run) {
        return e ? e : dry_run(run, dev);
    }
    base.host_embed = run.plan.host_embed;
    Llama<Dev> m;
    m.dev = std::exchange(dev, Dev());  // the model's from here on: llama_free closes it
    uint64_t keep_log;
    e = e ? e : device_take(m.dev, run.plan);
    e = e ? e : model_ready(run, m, base, longest, &keep_log);
    if (!e && is_complete(run)) {
        console_fact(run.console, "already complete: the adapter is in %s", run.dir.c_str());
    } else if (!e) {
        e = run_directory_prepare(run.dir, run.model_dir, o.resume, o.overwrite);
        e = e || run.lock.fd >= 0 ? e : run_lock(run.lock, run.dir);
        e = e ? e : checkpoint_preflight(run.dir, 3 * adapter_elements(run.c, run.lora) * 4);
        e = e ? e : run_files(run, m, keep_log, device, seconds_now() - started);
    }
    log_close(run.log);
    llama_free(m);
    return e;
}

// ---------------------------------------------------------------------------------------------------------------------
// --benchmark: timed steps on random tokens

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
    run.peak_gflops = device_peak_gflops(dev);
    banner(run, device_label(dev), dev.threads);
    plan_wishes(run);
    Error plan = plan_choose(run.plan, dev, run.c, run.lora, base, run.max_tokens, run.max_tokens * size_t(o.batch),
                             o.pass_tokens, o.recompute, device_memory(dev));
    plan_show(run, dev);
    if (plan) {
        return plan;
    }
    benchmark_data(run, o.batch);
    Batch first;
    batch_make(first, run.train, passes_make(run.train, {0}, run.plan.pass_tokens, o.pack)[0]);
    console_fact(run.console, "%s", speed_text(dev, run, plan_tokens_per_s(dev, run, first)).c_str());
    base.host_embed = run.plan.host_embed;
    Llama<Dev> m;
    m.dev = std::exchange(dev, Dev());  // the model's from here on: llama_free closes it
    Error e = device_take(m.dev, run.plan);
    e = e ? e : base_open(run, m, base);
    if (e) {
        llama_free(m);
        return e;
    }
    llama_adapter_create(m, run.lora, run.plan.paged);
    llama_activations_create(m, run.plan.pass_tokens, run.max_tokens, run.plan.recompute, true);
    llama_adapter_init(m, o.seed);
    std::vector<size_t> examples(run.train.size());
    std::iota(examples.begin(), examples.end(), size_t(0));
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
    for (int i = 0; i < OPS; i++) {
        rows.push_back({op_name[i], text_format("%.1f", m.op_seconds[i] / double(seconds.size()) * 1e3),
                        text_format("%.1f %%", 100 * m.op_seconds[i] / total)});
    }
    console_table(run.console, rows);
    std::sort(seconds.begin(), seconds.end());
    const double median = seconds[seconds.size() / 2], achieved = r.flops / median / 1e9;
    const double peak = device_measured_gflops(m.dev, run.peak_gflops);
    console_fact(run.console, "median %.1f ms a step of %zu tokens, %s; %s planned", median * 1e3, r.tokens,
                 device_peak_memory(m.dev).c_str(), text_bytes(double(run.plan.total())).c_str());
    console_fact(run.console, "achieved %.1f GFLOP/s, measured peak %.1f GFLOP/s: %.1f %%", achieved, peak,
                 100 * achieved / peak);
    printf("tokens_per_s: %.2f\n", double(r.tokens) / median);
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
    run.peak_gflops = device_peak_gflops(dev);
    banner(run, device_label(dev), dev.threads);
    BaseOptions base = {o.quant == "nf4", o.double_quant, false};
    const size_t most = run.max_tokens * size_t(o.batch);
    plan_wishes(run);
    Error e = plan_choose(run.plan, dev, run.c, run.lora, base, run.max_tokens, most, o.pass_tokens, o.recompute,
                          device_memory(dev));
    plan_show(run, dev);
    if (e && e.code != 1) {
        return e;
    }
    if (e) {  // a plan is what was asked for; that it does not fit here is part of it
        console_warn(run.console, "%s", e.what.c_str());
    }
    benchmark_data(run, 1);
    Batch b;
    batch_make(b, run.train, {0});
    console_fact(run.console, "%s", speed_text(dev, run, plan_tokens_per_s(dev, run, b)).c_str());
    return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// main

// A launcher that starts several tasks would get as many copies of the same training.
static Error launcher_check() {
    for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"}) {
        const char* value = getenv(name);
        if (value != nullptr && atoi(value) > 1) {
            return bad_input("started by a launcher with %d tasks (%s), but this program is built without MPI",
                             atoi(value), name)
                .hinted("start it once, without mpirun or srun (training on many ranks is not part of this version)");
        }
    }
    return {};
}

// The run directory's name; with --resume its settings where the command line gives none, and the checkpoint to go on
// from.
static Error directory_settings(Run& run) {
    Options& o = run.o;
    run.dir = o.output;
    LoraConfig from = {};
    from.r = o.rank;
    if (run.dir.empty() && !o.init_adapter.empty()) {  // the rank in the name is the adapter's
        if (Error e = adapter_config_read(from, o.init_adapter)) {
            return e;
        }
    }
    if (!o.resume) {
        run.dir =
            run.dir.empty() && !o.inputs.empty() ? run_directory_name(path_stem(o.inputs[0]), from.r, false) : run.dir;
        return {};
    }
    run.pass_tokens_given = o.has("pass-tokens");
    run.recompute_given = o.has("recompute");
    run.gemm_given = o.has("gemm");
    if (run.dir.empty()) {
        run.dir = run_directory_name(path_stem(o.inputs[0]), from.r, true);
        run.dir = run.dir.empty() ? run_directory_name(path_stem(o.inputs[0]), from.r, false) : run.dir;
    }
    std::string path = path_join(run.dir, "run.json");
    if (path_exists(path)) {
        Json j;
        if (Error e = json_read_file(j, path)) {
            return e;
        }
        if (Error e = options_take(o, j, path, true)) {
            return e;
        }
    }
    if (o.inputs.empty()) {
        return bad_input("--resume: %s holds no run, and there is no -i to start one", run.dir.c_str());
    }
    if (!path_exists(run.dir)) {
        console_fact(run.console, "no checkpoint in %s: starting afresh", run.dir.c_str());
        return {};
    }
    if (Error e = o.dry_run ? Error() : run_lock(run.lock, run.dir)) {
        return e;
    }
    std::vector<std::string> complaints;
    Error e = checkpoint_newest(run.checkpoint, complaints, run.dir);
    for (const std::string& c : complaints) {
        console_warn(run.console, "%s", c.c_str());
    }
    if (!e && run.checkpoint.step < 0) {
        console_fact(run.console, "no checkpoint in %s: starting afresh", run.dir.c_str());
    }
    return e;
}

static bool is_within(const std::string& path, const std::string& dir) {
    char *a = realpath(path.c_str(), nullptr), *b = realpath(dir.c_str(), nullptr);
    std::string inner = a ? a : "", outer = b ? b : "/nowhere";
    free(a);
    free(b);
    return inner == outer || inner.rfind(outer + "/", 0) == 0;
}

// What must not be written over: an earlier run without leave, the model, the adapter started from, the data.
static Error outputs_check(const Run& run) {
    const Options& o = run.o;
    if (!o.dump_data.empty()) {
        for (const std::string& in : o.inputs) {
            if (is_within(in, o.dump_data)) {
                return bad_input("--dump-data %s is the input itself", o.dump_data.c_str()).hinted("give another file");
            }
        }
    }
    if (o.dry_run || o.benchmark > 0) {
        return {};
    }
    if (o.overwrite && !o.init_adapter.empty() && is_within(o.init_adapter, run.dir)) {
        return bad_input("--init-adapter %s lies in the run directory that --overwrite replaces",
                         o.init_adapter.c_str())
            .hinted("give another directory with -o");
    }
    return run.lock.fd >= 0 ? Error() : run_directory_check(run.dir, run.model_dir, o.resume, o.overwrite);
}

static Error program(Run& run, int argc, char** argv) {
    bool done = false;
    Error e = options_parse(run.o, &done, argc, argv);
    if (e || done) {
        return e;
    }
    console_open(run.console, run.o.quiet);
    run.program = argv[0];
    char exe[4096];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof(exe) - 1);
    run.exe_dir = path_directory(n > 0 ? std::string(exe, size_t(n)) : std::string(argv[0]));
    e = launcher_check();
    e = e ? e : device_settings(run.o);
    e = e ? e : directory_settings(run);
    e = e ? e : model_open(run);
    e = e ? e : lora_settings(run);
    e = e ? e : length_settings(run);
    e = e ? e : outputs_check(run);
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
        Error opened = text_open(run);
        opened = opened ? opened : train(run, dev);
        tokenizer_free(run.tokenizer);
        return opened;
    });
}

int main(int argc, char** argv) {
    wait_passively(argv);
    signal(SIGPIPE, SIG_IGN);  // a reader of our output that goes away must not end the training
    Run run;
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
    if (e.code >= 128) {  // stopped after saving: not an error of anyone's
        console_fact(run.console, "%s", e.what.c_str());
        console_fact(run.console, "%s", e.hint.c_str());
        return e.code;
    }
    return e ? error_print(e) : 0;
}
