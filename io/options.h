// The options of train_llama: one struct, filled from the command line (CLI11, in options.cpp) and from a run.json, and
// written back as run.json. Ranges and spellings are checked here; whether a file exists or a rank fits is not.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "io/error.h"
#include "io/json.h"

constexpr const char* train_llama_version = "0.1.0";

struct Options {
    // data and model
    std::vector<std::string> inputs;
    std::string model;   // "": dev/tiny_llama beside the program; shape:NAME: random weights in place
    std::string output;  // "": runs/<stem>-r<rank>-<k>
    std::string val;     // "": <input stem>_val.jsonl when it is there; none
    double val_split = 0;
    std::string chat_template = "auto";
    std::string format = "auto";
    bool parse_special = false, skip_bad = false;
    std::string bad_utf8 = "error";
    int64_t max_line = 256;  // MB
    int max_tokens = 0;      // 0: min(2048, the model's limit)
    // adapter
    int rank = 16;
    double alpha = 32, dropout = 0;
    bool rslora = false;
    std::string targets = "all";
    std::string adapter_dtype = "f32";
    std::string init_adapter;
    std::string quant = "nf4";
    bool double_quant = true;
    // training
    int batch = 16;
    double epochs = 3;
    int64_t steps = 0;  // 0: by epochs
    double lr = -1;     // < 0: by the model's width
    std::string schedule = "linear";
    int64_t warmup = -1;  // < 0: ceil(3 % of the steps)
    double weight_decay = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, clip = 1.0;
    bool shuffle = true, pack = true;
    uint64_t seed = 1337;
    // execution
    int pass_tokens = 0;  // 0: by the memory plan
    bool paged_optimizer = false, shard_base = false;
    std::string device = "auto", math = "auto", gemm = "auto", recompute = "auto";
    int threads = 0;  // 0: all
    // the run
    int64_t eval_every = 0, save_every = 0;  // 0: once an epoch
    int64_t keep = 2;
    bool resume = false, overwrite = false, dry_run = false, quiet = false;
    std::string dump_data, save_base;
    int64_t benchmark = 0;
    int ranks = 0;     // of the machines that a dry run plans for; 0: those that are here
    double link = 25;  // GB/s between them

    std::vector<std::string> given;  // long names set by the command line or --config, in order
    bool has(const std::string& name) const;
};

// Returns an Error with code 2 for anything wrong. *done is set when --help or --version was answered on stdout.
Error options_parse(Options& o, bool* done, int argc, const char* const* argv);
// The settings as given (auto stays auto), without output, resume, overwrite and dry-run: the contents of run.json.
// Paths are written absolute, so that the run can be repeated from elsewhere.
Json options_to_json(const Options& o);
// Takes every setting of a run.json that o was not given itself; an unknown key or a bad value is an error.
// resume: a given setting that differs and changes the training is an error that names both values.
Error options_take(Options& o, const Json& run, const std::string& path, bool resume);
