// Setting up a run, on every rank: model and text, the run directory and a checkpoint to go on from, data and plan, the
// model in memory. What follows from the settings alone is train_run.h's.
#pragma once
#include <filesystem>

#include "train_checkpoint.h"
#include "train_ranks.h"

// ---------------------------------------------------------------------------------------------------------------------
// model and text

inline Error model_open(Run& run) {
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

inline Error text_open(Run& run) {
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

inline void banner(Run& run, const std::string& device, int threads) {
    console_fact(run.console, "train_llama %s on %s%s, %d threads", train_llama_version,
                 run.comm.size > 1 ? (std::to_string(run.comm.size) + " ranks, each ").c_str() : "", device.c_str(),
                 threads);
    if (run.o.shard_base && run.o.ranks == 0 && ranks_of(run) == nullptr) {
        console_warn(run.console, "--shard-base changes nothing with one rank: mpirun -n R starts more");
    }
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (run.comm.size > 1 && run.o.threads == 0 && threads * run.comm.local_size < cores / 2) {
        console_warn(run.console,
                     "%d ranks of %d threads use a part of this machine's %ld processors: mpirun ties ranks to cores; "
                     "--bind-to none lets them share all",
                     run.comm.local_size, threads, cores);
    }
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

// ---------------------------------------------------------------------------------------------------------------------
// the run directory

// On rank 0: the run directory's name; with --resume the settings of the run in it (the text of run.json) and the
// checkpoint to go on from.
inline Error directory_look(Run& run, std::string* settings) {
    const Options& o = run.o;
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
    if (run.dir.empty()) {
        run.dir = run_directory_name(path_stem(o.inputs[0]), from.r, true);
        run.dir = run.dir.empty() ? run_directory_name(path_stem(o.inputs[0]), from.r, false) : run.dir;
    }
    const std::string path = path_join(run.dir, "run.json");
    Error e = path_exists(path) ? file_read_all(*settings, path) : Error();
    if (!e && o.inputs.empty() && settings->empty()) {
        e = bad_input("--resume: %s holds no run, and there is no -i to start one", run.dir.c_str());
    }
    if (e) {
        return e;
    }
    if (!path_exists(run.dir)) {
        console_fact(run.console, "no checkpoint in %s: starting afresh", run.dir.c_str());
        return {};
    }
    e = o.dry_run ? Error() : run_lock(run.lock, run.dir);
    if (e) {
        return e;
    }
    std::vector<std::string> complaints;
    e = checkpoint_newest(run.checkpoint, complaints, run.dir);
    for (const std::string& c : complaints) {
        console_warn(run.console, "%s", c.c_str());
    }
    if (!e && run.checkpoint.step < 0) {
        console_fact(run.console, "no checkpoint in %s: starting afresh", run.dir.c_str());
    }
    return e || run.checkpoint.step < 0 ? e : adapter_config_read(run.checkpoint_lora, run.checkpoint.path);
}

// What directory_look found, on every rank; with --resume the run's settings where the command line gives none.
inline Error directory_settings(Run& run) {
    Options& o = run.o;
    std::string settings;
    Error e = on_rank_0(run, [&] { return directory_look(run, &settings); });
    e = e ? e : directory_share(run, &settings);
    if (e || !o.resume) {
        return e;
    }
    run.pass_tokens_given = o.has("pass-tokens");
    run.recompute_given = o.has("recompute");
    run.gemm_given = o.has("gemm");
    if (!settings.empty()) {
        const std::string path = path_join(run.dir, "run.json");
        Json j;
        if (Error bad = json_parse(j, settings.data(), settings.size(), path)) {
            return bad;
        }
        if (Error bad = options_take(o, j, path, true)) {
            return bad;
        }
    }
    return o.inputs.empty() ? bad_input("--resume: %s holds no run, and there is no -i to start one", run.dir.c_str())
                            : Error();
}

// Without links and dots, whether it is there or not; "" when that cannot be told.
inline std::string whole_path(const std::string& path) {
    std::error_code failed;
    const std::filesystem::path whole = std::filesystem::absolute(path, failed);
    std::string text = failed ? "" : std::filesystem::weakly_canonical(whole, failed).string();
    return text.size() > 1 && text.back() == '/' ? text.substr(0, text.size() - 1) : text;
}

inline bool is_within(const std::string& path, const std::string& dir) {
    const std::string inner = whole_path(path), outer = whole_path(dir);
    return !outer.empty() && (inner + "/").rfind(outer + "/", 0) == 0;
}

// What must not be written over: an earlier run without leave, the model, the adapter started from, the data.
inline Error outputs_check(const Run& run) {
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
    if (!o.save_base.empty() && is_within(o.save_base, run.dir)) {
        return bad_input("--save-base %s lies in the run directory %s", o.save_base.c_str(), run.dir.c_str())
            .hinted("give a directory of its own: it will be the base of other runs");
    }
    if (o.overwrite && !o.init_adapter.empty() && is_within(o.init_adapter, run.dir)) {
        return bad_input("--init-adapter %s lies in the run directory that --overwrite replaces",
                         o.init_adapter.c_str())
            .hinted("give another directory with -o");
    }
    return run.lock.fd >= 0 ? Error() : run_directory_check(run.dir, run.model_dir, o.resume, o.overwrite);
}

// ---------------------------------------------------------------------------------------------------------------------
// data and plan

// Shows nothing when the settings were refused before there was a plan.
template <class Dev>
void plan_show(Run& run, const Dev& dev) {
    const Plan& p = run.plan;
    if (p.pass_tokens == 0) {
        return;
    }
    std::vector<std::vector<std::string>> rows = {
        {"memory plan", ""},
        {"  base (" + p.base_text + (p.spread ? text_format(", spread over %d ranks", p.ranks) : "") +
             (p.host_embed && !run.c.tied ? ", embedding on the host)" : ")"),
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

// The longest example and the most tokens of a step on one rank, for the plan.
inline void data_extent(const Run& run, size_t* longest, size_t* most) {
    *longest = std::max(run.train.longest, run.val.size() > 0 ? run.val.longest : 0);
    std::vector<size_t> lengths;
    for (size_t i = 0; i < run.train.size(); i++) {
        lengths.push_back(run.train.length(i));
    }
    std::sort(lengths.rbegin(), lengths.rend());
    lengths.resize(std::min(lengths.size(), size_t(run.o.batch)));
    const int ranks = run.o.ranks > 0 ? run.o.ranks : run.comm.size;
    const std::vector<int> rank = deal(lengths, ranks);
    std::vector<size_t> tokens(ranks, 0);
    for (size_t i = 0; i < lengths.size(); i++) {
        tokens[rank[i]] += lengths[i];
    }
    *most = std::max(*longest, *std::max_element(tokens.begin(), tokens.end()));
}

// The execution choices of a checkpoint are used again, unless this command line gives others.
inline void execution_restore(Run& run, const std::string& tier) {
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
    const int ranks = x->find("ranks") == nullptr ? 1 : int(state_number(*x, "ranks"));
    if (ranks != run.comm.size) {
        changed = text_format("ranks: %d then, %d now", ranks, run.comm.size);
    }
    if (version != nullptr && version->string != train_llama_version) {
        changed = "version " + printable(version->string) + " then, " + train_llama_version + " now";
    }
    if (!changed.empty()) {
        console_warn(run.console, "%s: the same training, no longer the same bits", changed.c_str());
    }
}

// Data, length and schedule, memory plan: all that a dry run shows. *longest: tokens of the longest example.
template <class Dev>
Error data_and_plan(Run& run, Dev& dev, const BaseOptions& base, size_t* longest) {
    const Options& o = run.o;
    run.has_val_beside = of_rank_0(run, path_exists(val_beside(o)));
    if (Error e = ranks_agree(run, data_read(run))) {
        return e;
    }
    data_report(run);
    if (Error e = schedule_settings(run)) {
        return e;
    }
    size_t most;
    data_extent(run, longest, &most);
    plan_wishes(run, dev);
    const uint64_t memory = memory_of_ranks(run, dev);
    Error e = plan_choose(run.plan, dev, run.c, run.lora, base, *longest, most, o.pass_tokens, o.recompute, memory);
    if (run.checkpoint.step >= 0) {
        const Plan chosen = run.plan;
        execution_restore(run, device_tier(dev));
        plan_fill(run.plan, dev, run.c, run.lora, base, *longest);
        if (!e && plan_counted(dev, run.plan) > std::max(plan_counted(dev, chosen), plan_budget(dev, memory))) {
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

// Every rank was given the same: another data file or setting on one machine would be silently wrong training.
template <class Dev>
Error same_check(Run& run, const Dev& dev) {
    if (ranks_of(run) == nullptr) {
        return {};
    }
    Json own = fingerprints(run);
    for (const Json& more : {resolved_settings(run), execution(run, dev)}) {
        for (size_t i = 0; i < more.keys.size(); i++) {
            own.set(more.keys[i], more.items[i]);
        }
    }
    own.set("val", run.val.hash).set("val_examples", run.val.size());
    return same_as_rank_0(run, own,
                          "start all ranks with the same options, program, data and model files (`then` is rank 0's)");
}

// ---------------------------------------------------------------------------------------------------------------------
// the model in memory

template <class Dev>
Error base_open(Run& run, Llama<Dev>& m, const BaseOptions& base) {
    const double t = seconds_now();
    m.c = run.c;
    if (is_shape(run.o)) {
        return llama_random(m, base);
    }
    std::vector<std::string> warnings;
    const bool saved = of_rank_0(run, run.o.resume && path_exists(path_join(run.o.save_base, "config.json")));
    const std::string save = saved ? "" : run.o.save_base;
    if (Error e = llama_load(m, &run.base_hash, warnings, run.model_dir, base, save)) {
        return e;
    }
    for (const std::string& w : warnings) {
        console_warn(run.console, "%s", w.c_str());
    }
    console_fact(run.console, "base read in %.1f s%s%s", seconds_now() - t,
                 saved           ? ", the saved one is there already: new runs start quickly with -m "
                 : !save.empty() ? ", and saved: new runs start quickly with -m "
                                 : "",
                 run.o.save_base.c_str());
    return {};
}

// Parameters and moments of rank 0 to all. on_host: the moments are.
template <class Dev>
void adapter_share(Llama<Dev>& m, bool on_host) {
    const size_t bytes = m.adapter.size * sizeof(*m.adapter.p);
    comm_broadcast_device(m.dev, m.adapter.p, bytes, 0);
    for (auto* moment : {m.adapter.m, m.adapter.v}) {
        if (on_host) {
            moments_settle(m.dev);
            comm_broadcast(*m.dev.comm, moment, bytes, 0);
        } else {
            comm_broadcast_device(m.dev, moment, bytes, 0);
        }
    }
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
    const bool on_host = run.plan.paged && moments_slab_bytes(m.dev) > 0;
    if (run.checkpoint.step < 0) {
        Error e = on_rank_0(run, [&] { return adapter_load(m, run.o.init_adapter); });
        if (!e && m.dev.comm != nullptr) {
            adapter_share(m, on_host);
        }
        return e;
    }
    Error e = ranks_agree(run, state_restore(run, keep_log));
    e = e ? e : on_rank_0(run, [&] { return checkpoint_restore(m, run.checkpoint); });
    if (!e && m.dev.comm != nullptr) {
        adapter_share(m, on_host);
    }
    if (!e) {
        console_fact(run.console, "going on after step %lld of %lld (%s)", (long long)run.step, (long long)run.steps,
                     run.checkpoint.path.c_str());
    }
    return e;
}
