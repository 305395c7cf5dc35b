// Checkpoints of a run: what state.json holds, saving, the checks before a resume, restoring. Whole-or-absent writing
// and hashes are io/run.h's.
#pragma once
#include "train_device.h"

inline Json fingerprints(const Run& run) {
    Json j = Json::object();
    j.set("base", run.base_hash).set("config", sha256_hex(run.c.text.data(), run.c.text.size()));
    j.set("tokenizer", run.tokenizer.hash).set("template", run.form.name() + " " + run.form.date);
    j.set("data", run.train.hash).set("examples", run.train.size());
    return j;
}

// The settings that decide the training, with nothing left on auto: in the log and in each checkpoint.
inline Json resolved_settings(const Run& run) {
    const Options& o = run.o;
    Json targets = Json::array();
    for (int m = 0; m < MODULES; m++) {
        if (run.lora.target[m]) {
            targets.push(module_name[m]);
        }
    }
    Json j = Json::object();
    j.set("rank", run.lora.r).set("scale", run.lora.scale()).set("dropout", run.lora.dropout).set("targets", targets);
    j.set("quant", o.quant).set("double_quant", o.double_quant).set("batch", o.batch).set("max_tokens", run.max_tokens);
    j.set("total_steps", run.steps).set("steps_per_epoch", run.steps_per_epoch).set("warmup_steps", run.warmup);
    j.set("peak_lr", run.lr).set("schedule", o.schedule).set("weight_decay", o.weight_decay).set("beta1", o.beta1);
    j.set("beta2", o.beta2).set("eps", o.eps).set("clip", o.clip).set("shuffle", o.shuffle).set("seed", o.seed);
    return j;
}

// How this run computes what it computes: a resume does the same where it can.
template <class Dev>
Json execution(const Run& run, const Dev& dev) {
    return Json::object()
        .set("pass_tokens", run.plan.pass_tokens)
        .set("recompute", recompute_text(run.plan.recompute))
        .set("gemm", gemm_name(run.plan.gemm))
        .set("device", device_kind(dev))
        .set("tier", device_tier(dev))
        .set("ranks", run.comm.size)
        .set("program", train_llama_version);
}

// regular: one of the run's own save points. Another (after a signal) leaves no trace in the log of the run that goes
// on from it.
template <class Dev>
Error checkpoint_save(Run& run, Llama<Dev>& m, bool regular) {
    static_assert(sizeof(typename Dev::real) == 4, "the moments are written as F32");
    const uint64_t log_before = log_bytes(run.log);
    std::string name = text_format("checkpoints/step_%lld", (long long)run.step);
    log_event(run.log, Json::object().set("event", "checkpoint").set("step", run.step).set("path", name));
    log_sync(run.log);
    Json state = Json::object();
    state.set("version", 1).set("step", run.step).set("log_bytes", regular ? log_bytes(run.log) : log_before);
    state.set("fingerprints", fingerprints(run)).set("resolved", resolved_settings(run)).set("val", run.val.hash);
    state.set("execution", execution(run, m.dev));
    state.set("first_loss", run.first_loss).set("last_loss", run.last_loss).set("window_loss", run.window_loss);
    state.set("window_steps", run.window_steps);
    Json evaluations = Json::array();
    for (const Evaluation& e : run.evaluations) {
        evaluations.push(Json::object()
                             .set("step", e.step)
                             .set("loss", e.loss)
                             .set("accuracy", e.accuracy)
                             .set("train_loss", e.train_loss));
    }
    state.set("evaluations", evaluations);
    std::vector<float> values;
    std::vector<bf16> rounded;
    std::vector<float> moment1(m.adapter.size), moment2(m.adapter.size);
    moments_settle(m.dev);
    device_from(m.dev, moment1.data(), m.adapter.m, moment1.size() * 4);
    device_from(m.dev, moment2.data(), m.adapter.v, moment2.size() * 4);
    std::vector<CheckpointFile> files(4);
    files[0] = {"adapter_model.safetensors", "", adapter_tensors(m, values, rounded, false)};
    files[1] = {"adapter_config.json", adapter_config_text(run.lora, run.base_name), {}};
    files[2] = {"optimizer.safetensors",
                "",
                {{"exp_avg", "F32", {moment1.size()}, moment1.data()},
                 {"exp_avg_sq", "F32", {moment2.size()}, moment2.data()}}};
    files[3] = {"state.json", json_write(state, 1) + "\n", {}};
    return checkpoint_write(run.dir, run.step, files, run.o.keep);
}

// Saves, and says so when that fails: a full disk costs the checkpoint, not the run. False: it failed.
template <class Dev>
bool checkpoint_try(Run& run, Llama<Dev>& m, bool regular) {
    Error e = checkpoint_save(run, m, regular);
    if (e) {
        console_warn(run.console, "no checkpoint at step %lld: %s; those before are kept", (long long)run.step,
                     e.what.c_str());
        log_event(run.log, Json::object().set("event", "checkpoint_failed").set("step", run.step).set("why", e.what));
    }
    return !e;
}

inline Error resume_check(Run& run) {
    const Json& state = run.checkpoint.state;
    std::string differ = differences(state.find("fingerprints"), fingerprints(run));
    differ = differ.empty() ? differences(state.find("resolved"), resolved_settings(run)) : differ;
    if (!differ.empty()) {
        return bad_input("%s: cannot go on from it, these have changed: %s", run.checkpoint.path.c_str(),
                         differ.c_str())
            .hinted("restore them, or start a new run with another -o");
    }
    const Json* val = state.find("val");
    if (val != nullptr && val->string != run.val.hash) {
        console_warn(run.console,
                     "the held-out data is not what it was: evaluations before and after this resume do not compare");
    }
    return {};
}

inline double state_number(const Json& state, const char* key) {
    const Json* v = state.find(key);
    return v != nullptr && v->is_number() ? v->number() : 0;
}

// The numbers of the checkpoint's state.json back into the run.
inline Error state_restore(Run& run, uint64_t* keep_log) {
    const Json& s = run.checkpoint.state;
    if (state_number(s, "version") != 1) {
        return bad_input("%s: written by a newer version of this program", run.checkpoint.path.c_str())
            .hinted("use that version to go on");
    }
    if (Error e = resume_check(run)) {
        return e;
    }
    run.step = run.checkpoint.step;
    *keep_log = uint64_t(state_number(s, "log_bytes"));
    run.first_loss = state_number(s, "first_loss");
    run.last_loss = state_number(s, "last_loss");
    run.window_loss = state_number(s, "window_loss");
    run.window_steps = int64_t(state_number(s, "window_steps"));
    const Json* list = s.find("evaluations");
    for (size_t i = 0; list != nullptr && i < list->items.size(); i++) {
        const Json& e = list->items[i];
        run.evaluations.push_back({int64_t(state_number(e, "step")), state_number(e, "loss"),
                                   state_number(e, "accuracy"), state_number(e, "train_loss")});
    }
    return {};
}

template <class Dev>
Error checkpoint_restore(Llama<Dev>& m, const Checkpoint& checkpoint) {
    using real = typename Dev::real;
    if (Error e = adapter_load(m, checkpoint.path)) {
        return e;
    }
    BaseReader r;
    std::string path = path_join(checkpoint.path, "optimizer.safetensors");
    if (Error e = safetensors_open(r.st, path)) {
        return e;
    }
    Error error;
    std::vector<real> host(m.adapter.size);
    const char* const names[] = {"exp_avg", "exp_avg_sq"};
    for (const char* name : names) {
        const Tensor* t = safetensors_find(r.st, name);
        if (t == nullptr || t->dtype != "F32" || t->elements() != m.adapter.size) {
            error = bad_input("%s: tensor %s is missing or has another size than the adapter", path.c_str(), name);
            break;
        }
        error = tensor_stream(r, *t, [&](const void*, const float* x, uint64_t first, size_t count) {
            std::copy(x, x + count, host.begin() + first);
        });
        moments_settle(m.dev);
        device_to(m.dev, name[7] == '\0' ? m.adapter.m : m.adapter.v, host.data(), host.size() * sizeof(real));
        if (error) {
            break;
        }
    }
    safetensors_close(r.st);
    return error;
}

// The adapter under its final names, each whole or absent. *hash: of adapter_model.safetensors.
template <class Dev>
Error adapter_write(Run& run, Llama<Dev>& m, std::string* hash) {
    std::vector<float> values;
    std::vector<bf16> rounded;
    std::string path = path_join(run.dir, "adapter_model.safetensors");
    std::string temporary = path_join(run.dir, text_format(".tmp-%ld-adapter", long(getpid())));
    if (Error e = path_remove(temporary)) {
        return e;
    }
    if (Error e = safetensors_write(temporary, adapter_tensors(m, values, rounded, run.o.adapter_dtype == "bf16"))) {
        return e;
    }
    if (Error e = sha256_file(*hash, temporary)) {
        return e;
    }
    if (Error e = path_rename(temporary, path)) {
        return e;
    }
    return file_replace(path_join(run.dir, "adapter_config.json"), adapter_config_text(run.lora, run.base_name));
}
