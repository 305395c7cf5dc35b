// A run: what it is made of, the settings that follow from model and data, its data and the order of its examples. The
// loop and the files are train_llama.cu's, checkpoints train_checkpoint.h's.
#pragma once
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "io/console.h"
#include "io/options.h"
#include "io/run.h"
#include "llama_io.h"
#include "train_step.h"

// ---------------------------------------------------------------------------------------------------------------------
// a run

struct Evaluation {
    int64_t step = 0;
    double loss = 0, accuracy = 0;
    double train_loss = 0;  // mean of the steps since the evaluation before; 0 at the first
};

struct Run {
    Options o;
    Console console;
    std::string dir, model_dir, exe_dir, program;
    LlamaConfig c;
    LoraConfig lora;
    Tokenizer tokenizer;
    ChatForm form;
    Dataset train, val;
    std::string val_source;  // for the banner: a path, "10 % of the input" or why there is none
    Plan plan;
    size_t max_tokens = 0;  // of an example
    int64_t steps = 0, steps_per_epoch = 0, warmup = 0;
    double lr = 0;
    std::string base_hash;
    double peak_gflops = 0;  // measured on this machine, for mfu
    std::string base_name;   // of the base in adapter_config.json: its directory
    int threads = 1;
    std::vector<size_t> order;  // of the examples of epoch order_epoch
    int64_t order_epoch = -1;
    RunLog log;
    RunLock lock;
    Comm comm;
    int stop = 0;                 // the signal that all ranks know of
    bool leaving = false;         // all ranks know that they end
    bool has_val_beside = false;  // <input stem>_val.jsonl is there, for rank 0
    Checkpoint checkpoint;        // resumed from; step -1: none
    LoraConfig checkpoint_lora;   // of its adapter
    // given here, not by the run resumed
    bool pass_tokens_given = false, recompute_given = false, gemm_given = false;
    // what a checkpoint carries beside tensors
    int64_t step = 0;  // steps done
    std::vector<Evaluation> evaluations;
    double first_loss = 0, last_loss = 0, window_loss = 0;
    int64_t window_steps = 0;
};

inline double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Of the machine, or of the control group that the process may use.
inline uint64_t machine_memory() {
    uint64_t bytes = uint64_t(sysconf(_SC_PHYS_PAGES)) * uint64_t(sysconf(_SC_PAGESIZE));
    if (FILE* f = fopen("/sys/fs/cgroup/memory.max", "r")) {
        unsigned long long limit = 0;
        if (fscanf(f, "%llu", &limit) == 1 && limit > 0) {  // the file says "max" when there is none
            bytes = std::min<uint64_t>(bytes, limit);
        }
        fclose(f);
    }
    return bytes;
}

inline uint64_t peak_memory() {  // of this process, bytes
    struct rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    return uint64_t(usage.ru_maxrss) * 1024;
}

// The keys of `now` whose values differ in `then`, with both; "" when none does.
inline std::string differences(const Json* then, const Json& now) {
    std::string differ;
    for (size_t i = 0; i < now.keys.size(); i++) {
        const Json* old = then == nullptr ? nullptr : then->find(now.keys[i].c_str());
        std::string was = old ? json_write(*old) : "nothing", is = json_write(now.items[i]);
        if (was != is) {
            differ += (differ.empty() ? "" : "; ") + now.keys[i] + " (then " + printable(was) + ", now " +
                      printable(is) + ")";
        }
    }
    return differ;
}

// ---------------------------------------------------------------------------------------------------------------------
// settings that depend on model and data

inline std::string default_model(const Run& run) {
    for (const char* up : {"", "../../"}) {  // beside the program, or beside the build folder that holds it
        std::string dir = run.exe_dir + "/" + up + "dev/tiny_llama";
        if (path_is_directory(dir)) {
            return dir;
        }
    }
    return run.exe_dir + "/dev/tiny_llama";
}

inline bool is_shape(const Options& o) {
    return o.model.rfind("shape:", 0) == 0;
}

// The list was checked with the other options.
inline void targets_parse(LoraConfig& lora, const std::string& list) {
    std::fill(lora.target, lora.target + MODULES, false);
    for (size_t at = 0; at <= list.size();) {
        size_t comma = std::min(list.find(',', at), list.size());
        std::string word = list.substr(at, comma - at);
        for (int m = 0; m < MODULES; m++) {
            if (word == "all" || word == module_name[m] || (word == "attention" && m <= O_PROJ) ||
                (word == "mlp" && m > O_PROJ)) {
                lora.target[m] = true;
            }
        }
        at = comma + 1;
    }
}

inline Error lora_settings(Run& run) {
    const Options& o = run.o;
    run.lora.r = o.rank;
    run.lora.alpha = o.alpha;
    run.lora.rslora = o.rslora;
    targets_parse(run.lora, o.targets);
    if (run.checkpoint.step >= 0) {  // holds what --init-adapter, if there was one, brought
        run.lora = run.checkpoint_lora;
    } else if (!o.init_adapter.empty()) {
        LoraConfig wanted = run.lora;
        if (Error e = adapter_config_read(run.lora, o.init_adapter)) {
            return e;
        }
        bool differs[] = {o.has("rank") && wanted.r != run.lora.r, o.has("alpha") && wanted.alpha != run.lora.alpha,
                          o.has("rslora") && wanted.rslora != run.lora.rslora,
                          o.has("targets") && !std::equal(wanted.target, wanted.target + MODULES, run.lora.target)};
        const char* const names[] = {"rank", "alpha", "rslora", "targets"};
        for (int i = 0; i < 4; i++) {
            if (differs[i]) {
                return bad_input("--%s differs from that of --init-adapter %s", names[i], o.init_adapter.c_str())
                    .hinted("leave it out: an adapter that is started from brings its own");
            }
        }
    }
    run.lora.dropout = o.dropout;
    int limit = 1 << 30;
    for (int m = 0; m < MODULES; m++) {
        if (run.lora.target[m]) {
            limit = std::min({limit, module_rows(run.c, m), module_cols(run.c, m)});
        }
    }
    if (run.lora.r > limit) {
        return bad_input("--rank %d is larger than the smallest side of a target matrix (need at most %d)", run.lora.r,
                         limit)
            .hinted("a rank beyond that adds nothing");
    }
    const int served[] = {1, 8, 16, 32, 64, 128, 256, 320, 512};  // vLLM's --max-lora-rank
    const int* next = std::lower_bound(served, served + 9, run.lora.r);
    if (next < served + 9 && *next != run.lora.r && run.lora.r > 16) {
        console_warn(run.console, "rank %d: vLLM needs --max-lora-rank %d to load this adapter", run.lora.r, *next);
    }
    return {};
}

inline Error length_settings(Run& run) {
    const Options& o = run.o;
    size_t limit = size_t(run.c.max_positions);
    run.max_tokens = o.max_tokens > 0 ? size_t(o.max_tokens) : std::min<size_t>(2048, limit);
    if (run.c.sliding_window > 0 && run.max_tokens > size_t(run.c.sliding_window)) {
        return bad_input("%s: the model attends to %d tokens only (sliding_window), and examples may have %zu",
                         run.model_dir.c_str(), run.c.sliding_window, run.max_tokens)
            .hinted(text_format("lower the length: -t %d", run.c.sliding_window));
    }
    if (run.max_tokens > limit) {
        console_warn(run.console, "-t %zu is beyond the model's %zu positions: it has not learned them", run.max_tokens,
                     limit);
    }
    return {};
}

inline Error schedule_settings(Run& run) {
    const Options& o = run.o;
    run.steps_per_epoch = int64_t((run.train.size() + o.batch - 1) / o.batch);
    run.steps =
        o.steps > 0
            ? o.steps
            : int64_t(std::ceil(o.epochs * double(run.steps_per_epoch) * (1 - 1e-12)));  // 1.1 x 50 is 55, not 56
    run.warmup = o.warmup >= 0 ? o.warmup : int64_t(std::ceil(0.03 * double(run.steps)));
    if (run.warmup > run.steps) {
        return bad_input("--warmup %lld is longer than the run (found %lld steps)", (long long)run.warmup,
                         (long long)run.steps)
            .hinted("lower --warmup or train longer (-e, -n)");
    }
    // "LoRA Without Regret" and the Tinker cookbook: ten times the full fine-tuning rate, falling with the width.
    run.lr = o.lr >= 0 ? o.lr : 5e-5 * 10 * std::pow(2000.0 / run.c.C, 0.781);
    if (run.lr > 0.1) {
        console_warn(run.console, "--lr %g is very high for LoRA; the default here would be %.3g", run.lr,
                     5e-5 * 10 * std::pow(2000.0 / run.c.C, 0.781));
    }
    return {};
}

inline double learning_rate(const Run& run, int64_t step) {  // of step 0, 1, ...
    const double s = double(step), W = double(run.warmup), T = double(run.steps);
    if (step < run.warmup) {
        return run.lr * (s + 1) / W;
    }
    const double left = T - W > 0 ? (s - W) / (T - W) : 0;
    if (run.o.schedule == "cosine") {
        return run.lr * 0.5 * (1 + std::cos(M_PI * left));
    }
    return run.o.schedule == "linear" ? run.lr * (1 - left) : run.lr;
}

// ---------------------------------------------------------------------------------------------------------------------
// data

// Held-out data that is used unless something else is asked for.
inline std::string val_beside(const Options& o) {
    return path_join(path_directory(o.inputs[0]), path_stem(o.inputs[0]) + "_val.jsonl");
}

inline Error data_read(Run& run) {
    const Options& o = run.o;
    DataOptions d;
    d.form = run.form;
    d.format = o.format;
    d.max_tokens = run.max_tokens;
    d.vocab = run.c.V;
    d.parse_special = o.parse_special;
    d.skip_bad = o.skip_bad;
    d.replace_bad_utf8 = o.bad_utf8 == "replace";
    d.max_line_bytes = size_t(o.max_line) << 20;
    d.threads = run.threads;
    if (run.comm.state != nullptr) {
        d.part = run.comm.rank;
        d.parts = run.comm.size;
        d.exchange = [&run](const std::string& mine) { return comm_all_gather_text(run.comm, mine); };
    }
    if (Error e = dataset_load(run.train, o.inputs, run.tokenizer, d)) {
        return e;
    }
    std::string beside = val_beside(o);
    std::string file = o.val.empty() && o.val_split == 0 && run.has_val_beside ? beside : o.val == "none" ? "" : o.val;
    if (!file.empty()) {
        run.val_source = file;
        if (Error e = dataset_load(run.val, {file}, run.tokenizer, d)) {
            return e;
        }
        std::string overlap = dataset_overlap(run.train, run.val);
        if (!overlap.empty()) {
            console_warn(run.console, "%s", overlap.c_str());
        }
    } else if (o.val_split > 0) {
        size_t n = run.train.size(), held = std::max<size_t>(1, size_t(o.val_split * double(n) + 0.5));
        if (n < 2 || held >= n) {
            return bad_input("--val-split %g leaves nothing to train on (found %zu examples)", o.val_split, n);
        }
        std::vector<size_t> order = random_permutation(n, o.seed, STREAM_SPLIT, 0);
        order.resize(held);
        std::sort(order.begin(), order.end());
        dataset_split(run.train, run.val, order);
        run.val_source = text_format("%zu examples of the input (--val-split %g)", held, o.val_split);
    } else {
        run.val_source = o.val == "none" ? "none" : "none (" + beside + " is not there; --val FILE or --val-split F)";
    }
    return {};
}

inline void data_report(Run& run) {
    for (const std::string& line : dataset_report(run.train)) {
        console_line(run.console, "# " + line);
    }
    if (run.train.truncated > 0) {
        console_warn(run.console,
                     "%zu of %zu examples are longer than %zu tokens: cut, so they do not learn to end; -t raises it",
                     run.train.truncated, run.train.size(), run.max_tokens);
    }
    for (const Dataset* d : {&run.train, &run.val}) {
        for (const std::string& w : d->warnings) {
            console_warn(run.console, "%s", w.c_str());
        }
    }
    const Dataset& v = run.val;
    std::string counts =
        v.size() == 0 ? "" : ", " + text_count(v.size()) + " examples, " + text_count(v.target_tokens) + " targets";
    const std::pair<size_t, const char*> lost[] = {
        {v.rejected, "rejected"}, {v.dropped_without_target, "dropped"}, {v.truncated, "cut"}};
    for (const auto& l : lost) {
        counts += l.first > 0 ? ", " + text_count(l.first) + " " + l.second : "";
    }
    console_fact(run.console, "held-out data: %s%s", run.val_source.c_str(), counts.c_str());
}

// The examples of step s (0, 1, ...): the next -b of its epoch's order. The last step of an epoch may hold fewer.
inline std::vector<size_t> step_examples(Run& run, int64_t s) {
    const size_t n = run.train.size(), batch = size_t(run.o.batch);
    const int64_t epoch = s / run.steps_per_epoch;
    if (run.order_epoch != epoch) {
        run.order.resize(n);
        std::iota(run.order.begin(), run.order.end(), size_t(0));
        if (run.o.shuffle) {
            run.order = random_permutation(n, run.o.seed, STREAM_ORDER, uint64_t(epoch));
        }
        run.order_epoch = epoch;
    }
    size_t first = size_t(s % run.steps_per_epoch) * batch;
    return {run.order.begin() + first, run.order.begin() + std::min(n, first + batch)};
}
