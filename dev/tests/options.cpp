// Options: spellings, ranges, messages, run.json and what a resumed run may change.
#include "io/options.h"

#include <clocale>
#include <cmath>

#include "dev/tests/test.h"
#include "io/file.h"

static Error parse(Options& o, const std::vector<std::string>& words) {
    std::vector<const char*> argv = {"train_llama"};
    for (const std::string& word : words) {
        argv.push_back(word.c_str());
    }
    bool done = false;
    return options_parse(o, &done, int(argv.size()), argv.data());
}

static std::vector<std::string> split(const std::string& line) {
    std::vector<std::string> words;
    for (size_t begin = 0; begin < line.size();) {
        size_t end = std::min(line.find(' ', begin), line.size());
        words.push_back(line.substr(begin, end - begin));
        begin = end + 1;
    }
    return words;
}

static void options_defaults() {
    Options o;
    Error e = parse(o, {"-i", "d.jsonl"});
    CHECK(!e, "%s", e.what.c_str());
    CHECK(o.rank == 16 && o.alpha == 32 && o.dropout == 0 && !o.rslora && o.targets == "all", "adapter defaults");
    CHECK(o.batch == 16 && o.epochs == 3 && o.steps == 0 && o.lr < 0 && o.schedule == "linear" && o.warmup < 0,
          "training defaults");
    CHECK(o.weight_decay == 0 && o.beta1 == 0.9 && o.beta2 == 0.999 && o.eps == 1e-8 && o.clip == 1.0,
          "AdamW defaults");
    CHECK(o.quant == "nf4" && o.double_quant && o.seed == 1337 && o.keep == 2 && o.max_line == 256, "other defaults");
    CHECK(o.shuffle && o.pack && o.chat_template == "auto" && o.device == "auto" && o.math == "auto",
          "execution defaults");
    CHECK(o.given == std::vector<std::string>{"input"}, "given has %zu names", o.given.size());
}

static void options_spellings() {
    Options o;
    Error e = parse(
        o,
        split("-i a.jsonl --input=b.jsonl -r8 --alpha=0.5 --no-double-quant --rslora -b 3 -t 64 -n 7 --lr 0 --eps 1e-6 "
              "--no-shuffle --no-pack -q --val none --seed 18446744073709551615 --targets q_proj,mlp --epochs .5 "
              "--keep 3 --math fp32 --threads 2 --warmup 0 --clip 0 --schedule cosine --adapter-dtype bf16"));
    CHECK(!e, "%s", e.what.c_str());
    CHECK(o.inputs == (std::vector<std::string>{"a.jsonl", "b.jsonl"}), "%zu inputs", o.inputs.size());
    CHECK(o.rank == 8 && o.alpha == 0.5 && !o.double_quant && o.rslora && o.batch == 3 && o.max_tokens == 64,
          "first part");
    CHECK(o.steps == 7 && o.lr == 0 && o.eps == 1e-6 && !o.shuffle && !o.pack && o.quiet && o.val == "none",
          "second part");
    CHECK(o.seed == UINT64_MAX && o.targets == "q_proj,mlp" && o.epochs == 0.5 && o.keep == 3 && o.math == "fp32",
          "third part");
    CHECK(o.threads == 2 && o.warmup == 0 && o.clip == 0 && o.schedule == "cosine" && o.adapter_dtype == "bf16",
          "fourth part");
    CHECK(o.has("rank") && o.has("no-shuffle") && !o.has("dropout"), "given");
    CHECK(!parse(o, split("--resume -o runs/x")) && o.resume, "resume with an output");
    CHECK(!parse(o, split("-m shape:125m --dry-run")) && o.dry_run, "random model without data");
    CHECK(!parse(o, split("--benchmark 5 -m some/dir")) && o.benchmark == 5, "benchmark without data");
}

// Each: a command line, and what message and hint must hold, separated by `|`. All end with code 2.
static const char* const bad_options[][2] = {
    {"-i x -r 0", "--rank must be an integer from 1 to 16384 (found 0)|usage: -r, --rank N"},
    {"-i x -r -3", "--rank must be an integer from 1 to 16384 (found -3)"},
    {"-i x -r 1.5", "--rank must be an integer from 1 to 16384 (found 1.5)"},
    {"-i x -r abc", "(found abc)"},
    {"-i x -r 8x", "(found 8x)"},
    {"-i x -r 99999999999999999999", "(found 99999999999999999999)"},
    {"-i x -r 1e1", "(found 1e1)"},
    {"-i x -r 0x10", "(found 0x10)"},
    {"-i x -b 0", "--batch must be an integer from 1 to 1048576 (found 0)"},
    {"-i x -n 0", "--steps must be an integer from 1 to 1000000000 (found 0)"},
    {"-i x -e 0", "--epochs must be a decimal number above 0 and at most 1000000 (found 0)"},
    {"-i x -e -1", "--epochs must be a decimal number above 0"},
    {"-i x -t 0", "--max-tokens must be an integer from 2 to 16777216 (found 0)"},
    {"-i x --pass-tokens 0", "--pass-tokens must be"},
    {"-i x --lr -1e-4", "--lr must be a decimal number from 0 to 10 (found -1e-4)"},
    {"-i x --lr nan", "--lr must be a decimal number from 0 to 10 (found nan)"},
    {"-i x --lr inf", "(found inf)"},
    {"-i x --lr 1e3", "from 0 to 10 (found 1e3)"},
    {"-i x --lr 1e999", "(found 1e999)"},
    {"-i x --lr 0,001", "(found 0,001)"},
    {"-i x --lr 0x1p-9", "(found 0x1p-9)"},
    {"-i x --alpha 0", "--alpha must be a decimal number above 0"},
    {"-i x --dropout 1", "--dropout must be a decimal number at least 0 and below 1 (found 1)"},
    {"-i x --dropout -0.1", "(found -0.1)"},
    {"-i x --beta1 1", "--beta1 must be"},
    {"-i x --beta2 1.5", "--beta2 must be"},
    {"-i x --eps 0", "--eps must be"},
    {"-i x --clip -1", "--clip must be"},
    {"-i x --weight-decay -1", "--weight-decay must be"},
    {"-i x --warmup -1", "--warmup must be an integer from 0"},
    {"-i x --seed -1", "--seed must be an integer from 0 to 18446744073709551615 (found -1)"},
    {"-i x --seed 18446744073709551616", "--seed must be"},
    {"-i x --keep 1", "--keep must be an integer from 2"},
    {"-i x --save-every 0", "--save-every must be"},
    {"-i x --eval-every 0", "--eval-every must be"},
    {"-i x --threads 0", "--threads must be"},
    {"-i x --max-line 0", "--max-line must be"},
    {"-i x --val-split 1", "--val-split must be a decimal number above 0 and below 1 (found 1)"},
    {"-i x --val-split 0", "--val-split must be"},
    {"--benchmark 0", "--benchmark must be"},
    {"-i x --schedule step", "--schedule must be one of constant, linear, cosine (found step)"},
    {"-i x --quant nf8", "--quant must be one of nf4, none (found nf8)"},
    {"-i x --device gpu", "--device must be one of auto, cpu, cuda (found gpu)"},
    {"-i x --math int8", "--math must be one of auto, fp32, int16, bf16 (found int8)"},
    {"-i x --recompute some", "--recompute must be one of auto, none, ffn, attn, full (found some)"},
    {"-i x --template chatml", "--template must be one of auto, llama3, llama3-raw, plain (found chatml)"},
    {"-i x --bad-utf8 skip", "--bad-utf8 must be one of error, replace (found skip)"},
    {"-i x --adapter-dtype f16", "--adapter-dtype must be one of f32, bf16 (found f16)"},
    {"-i x --targets q_proj,lm_head", "--targets: no such module (found lm_head, need all, attention, mlp"},
    {"-i x --targets q_proj,", "found an empty name"},
    {"-i x --quant nf4|none", "(found nf4|"},
    {"-i x --rnak 4", "unknown option --rnak|the nearest is --rank; usage: -r, --rank N"},
    {"-i x --max-token=4", "unknown option --max-token=4|the nearest is --max-tokens"},
    {"-i x --shuffle", "unknown option --shuffle|the nearest is --no-shuffle"},
    {"-i x -z", "unknown option -z|train_llama --help"},
    {"-i x --shard-bas", "unknown option --shard-bas|the nearest is --shard-base"},
    {"-i x --ranks 4", "--ranks needs --dry-run|mpirun -n 4"},
    {"-i x --link 9 --dry-run", "--link needs --ranks|usage: --link GB/s"},
    {"-i x --ranks 4 --link 0 --dry-run", "--link must be a decimal number above 0"},
    {"-i x --save-base y --dry-run", "--save-base needs a run that reads and quantises a base"},
    {"-i x --save-base y --quant none", "--save-base needs a run that reads and quantises a base"},
    {"-i x y", "unexpected argument (found y)|-i FILE"},
    {"-i x -r", "--rank needs a value|usage: -r, --rank N"},
    {"-i", "--input needs a value|usage: -i, --input FILE"},
    {"--config", "--config needs a value|usage: --config FILE"},
    {"-i x -o --resume", "--output needs a value (found --resume)|./-"},
    {"-i x --output= -r 4", "--output needs a value (found an empty one)"},
    {"-i x --dropout= 0.1", "--dropout needs a value (found an empty one)"},
    {"-i x -r 4 --rank 4", "--rank is given more than once|usage: -r, --rank N"},
    {"-i x --rslora --rslora", "--rslora is given more than once"},
    {"-i x -qq", "--quiet is given more than once"},
    {"-i x --rslora=1", "--rslora takes no value"},
    {"-i x --resume=false", "--resume takes no value"},
    {"-i x --val a --val-split 0.1", "--val and --val-split exclude each other"},
    {"-i x --resume --overwrite", "--resume and --overwrite exclude each other"},
    {"--resume", "--resume needs the run to go on with|-o DIR"},
    {"-i x --dump-data f", "--dump-data needs --dry-run"},
    {"", "--input is missing|--help"},
    {"-m some/dir", "--input is missing"},
    {"-i x --config no/such/file.json", "no/such/file.json"},
};

static void options_bad() {
    for (const auto& row : bad_options) {
        Options o;
        Error e = parse(o, split(row[0]));
        CHECK(e.code == 2, "'%s' ends with code %d", row[0], e.code);
        std::string wanted = row[1], all = e.what + "\n" + e.hint;
        for (size_t begin = 0; begin <= wanted.size();) {
            size_t end = std::min(wanted.find('|', begin), wanted.size());
            std::string part = wanted.substr(begin, end - begin);
            CHECK(text_has(all, part), "'%s' says '%s', need '%s'", row[0], all.c_str(), part.c_str());
            begin = end + 1;
        }
    }
    Options o;
    Error e = parse(o, {"-i", "", "-r", "4"});
    CHECK(e.code == 2 && text_has(e.what, "--input needs a value"), "empty path: %s", e.what.c_str());
    e = parse(o, {"-i", "x", "-r", "\x1b[31m4"});
    CHECK(e.code == 2 && text_has(e.what, "\\x1B[31m4"), "control bytes: %s", e.what.c_str());
}

// A number means the same in every locale; de_DE writes 0,5 for 0.5 (it is tried where it is installed).
static void options_locale() {
    std::string before = setlocale(LC_ALL, nullptr);
    setlocale(LC_ALL, "de_DE.UTF-8");
    Options o;
    Error e = parse(o, split("-i x --lr 0.001 --dropout 0.5"));
    CHECK(!e && o.lr == 0.001 && o.dropout == 0.5, "%s", e.what.c_str());
    e = parse(o, split("-i x --dropout 0.5 --epochs 1e9"));
    CHECK(text_has(e.what, "above 0 and at most 1000000 (found 1e9)"), "%s", e.what.c_str());
    setlocale(LC_ALL, before.c_str());
}

static void options_round_trip() {
    const char* const lines[] = {
        "-i a.jsonl",
        "-i a.jsonl -i b.jsonl -m dir -r 4 --alpha 0.1 --dropout 0.05 --rslora --targets q_proj,v_proj --adapter-dtype "
        "bf16 --quant none "
        "--no-double-quant -b 3 -e 0.7 -n 11 --lr 3.3e-4 --schedule cosine --warmup 0 --weight-decay 0.01 --beta1 0.8 "
        "--beta2 0.99 "
        "--eps 1e-6 --clip 0 --no-shuffle --no-pack --seed 18446744073709551615 --device cpu --threads 2 --math fp32 "
        "--recompute full "
        "--pass-tokens 99 --eval-every 3 --save-every 4 --keep 5 --val none --template plain --format text "
        "--parse-special --skip-bad "
        "--bad-utf8 replace --max-line 3 -t 77 -q -o out --overwrite --dry-run",
        "-i a.jsonl --val-split 0.25 --init-adapter adapters/x",
        "-i a.jsonl --init-adapter adapters/x -r 8",
        "-m shape:1b --dry-run",
    };
    for (const char* line : lines) {
        Options o, again;
        Error e = parse(o, split(line));
        CHECK(!e, "%s: %s", line, e.what.c_str());
        Json run = options_to_json(o);
        std::string text = json_write(run, 2);
        Json read;
        CHECK(!json_parse(read, text.data(), text.size(), "run.json"), "%s", text.c_str());
        e = options_take(again, read, "run.json", false);
        CHECK(!e, "%s: %s", line, e.what.c_str());
        CHECK(json_write(options_to_json(again)) == json_write(run), "%s: comes back as %s", line,
              json_write(options_to_json(again)).c_str());
        for (const char* key : {"output", "resume", "overwrite", "dry-run", "config", "dump-data", "benchmark"}) {
            CHECK(!run.find(key), "%s: run.json has %s", line, key);
        }
        CHECK(!options_take(again, read, "run.json", true), "%s: differs from itself", line);
    }
    Options o;
    CHECK(!parse(o, split("-i a.jsonl --init-adapter x --alpha 8")), "an adapter");
    Json run = options_to_json(o);
    CHECK(!run.find("rank") && !run.find("targets") && run.find("alpha"), "what the adapter brings: %s",
          json_write(run).c_str());
    CHECK(run.find("input")->items[0].string[0] == '/', "paths are absolute: %s", json_write(run).c_str());
    CHECK(run.find("lr") == nullptr && run.find("device")->string == "auto", "auto stays auto: %s",
          json_write(run).c_str());
}

static Error take(Options& o, const std::string& line, const std::string& text, bool resume) {
    Error e = parse(o, split(line));
    CHECK(!e, "%s: %s", line.c_str(), e.what.c_str());
    Json run;
    e = json_parse(run, text.data(), text.size(), "run.json");
    CHECK(!e, "%s: %s", text.c_str(), e.what.c_str());
    return options_take(o, run, "run.json", resume);
}

static void options_config() {
    std::string path = path_join(test_directory(), "c.json");
    CHECK(!file_replace(
              path,
              "{\"input\":[\"/d/"
              "a.jsonl\"],\"rank\":4,\"lr\":0.5,\"steps\":9,\"val-split\":0.5,\"no-shuffle\":true,\"rslora\":false}"),
          "write");
    Options o;
    Error e = parse(o, {"--config", path, "-r", "8"});
    CHECK(!e, "%s", e.what.c_str());
    CHECK(o.rank == 8 && o.lr == 0.5 && o.steps == 9 && o.val_split == 0.5 && !o.shuffle && o.inputs.size() == 1,
          "values");
    CHECK(o.has("lr") && o.has("rank") && o.has("no-shuffle"), "given");
    e = parse(o, {"--config", path, "-e", "2", "--val", "v.jsonl"});
    CHECK(!e && o.steps == 0 && o.epochs == 2 && o.val_split == 0 && o.val == "v.jsonl", "the command line wins: %s",
          e.what.c_str());
    CHECK(text_has(parse(o, {"--config", path, "--config", path}).what, "--config is given more than once"), "twice");

    const char* const bad[][2] = {
        {"{\"rnak\":4}", "run.json: unknown option \"rnak\""},
        {"{\"output\":\"x\"}", "\"output\" is not taken from a file"},
        {"{\"rank\":\"4\"}", "run.json: rank must be an integer from 1 to 16384 (found \"4\")"},
        {"{\"rank\":4.0}", "run.json: rank must be an integer"},
        {"{\"rank\":0}", "(found 0)"},
        {"{\"rank\":null}", "(found null)"},
        {"{\"rank\":[4]}", "(found an array)"},
        {"{\"rslora\":1}", "rslora must be true or false"},
        {"{\"input\":\"x\"}", "run.json: input must be"},
        {"{\"input\":[]}", "run.json: input must be"},
        {"{\"lr\":1e9}", "from 0 to 10"},
        {"{\"targets\":\"x\"}", "run.json: --targets: no such module"},
        {"{\"schedule\":\"\"}", "schedule must be one of"},
        {"[1]", "run.json: need an object of options (found an array)"},
        {"{\"seed\":-1}", "seed must be"},
        {"{\"val\":\"x\",\"val-split\":0.5}", "exclude each other"},
    };
    for (const auto& row : bad) {
        e = take(o, "-i x", row[0], false);
        CHECK(e.code == 2 && text_has(e.what, row[1]), "%s says '%s', need '%s'", row[0], e.what.c_str(), row[1]);
    }
}

static void options_resume() {
    const std::string run =
        "{\"input\":[\"/d/"
        "a.jsonl\"],\"rank\":4,\"epochs\":3,\"batch\":16,\"threads\":1,\"keep\":2,\"template\":\"plain\"}";
    Options o;
    Error e = take(o, "-o r --resume", run, true);
    CHECK(!e && o.rank == 4 && o.inputs[0] == "/d/a.jsonl" && o.output == "r" && o.threads == 1, "all from the run: %s",
          e.what.c_str());
    e = take(o, "-o r --resume -i /d/../d/a.jsonl -r 4 -e 3.0", run, true);
    CHECK(!e, "the same options again: %s", e.what.c_str());
    e = take(o, "-o r --resume --threads 7 --keep 9 -q --save-every 5 --device cpu", run, true);
    CHECK(!e && o.threads == 7 && o.keep == 9 && o.quiet && o.save_every == 5, "what may change: %s", e.what.c_str());
    const char* const bad[][2] = {
        {"-r 8", "--resume: rank differs from the run's (found 8, the run has 4)"},
        {"--alpha 1", "alpha differs from the run's (found 1, the run has 32)"},
        {"-i /d/b.jsonl", "input differs from the run's (found /d/b.jsonl, the run has /d/a.jsonl)"},
        {"-e 4", "epochs differs from the run's (found 4, the run has 3)"},
        {"-n 5", "steps differs from the run's (found 5, the run has by --epochs)"},
        {"--lr 0.001", "lr differs from the run's (found 0.001, the run has by the model's width)"},
        {"--seed 1", "seed differs"},
        {"-m other", "model differs"},
        {"--template llama3", "template differs"},
        {"-b 8", "batch differs"},
        {"--no-shuffle", "no-shuffle differs"},
        {"--val-split 0.1", "val-split differs"},
        {"--quant none", "quant differs"},
        {"-t 8", "max-tokens differs"},
        {"--dropout 0.1", "dropout differs"},
    };
    for (const auto& row : bad) {
        e = take(o, std::string("-o r --resume ") + row[0], run, true);
        CHECK(e.code == 2 && text_has(e.what, row[1]), "%s says '%s', need '%s'", row[0], e.what.c_str(), row[1]);
        CHECK(!e.hint.empty(), "%s has no hint", row[0]);
    }
    e = take(o, "-o r --resume -r 8", "{\"input\":[\"/d/a.jsonl\"],\"init-adapter\":\"/x\"}", true);
    CHECK(!e, "the adapter has the rank, not run.json: %s", e.what.c_str());
}

extern const Test options_tests[] = {{"options_defaults", options_defaults},
                                     {"options_spellings", options_spellings},
                                     {"options_bad", options_bad},
                                     {"options_locale", options_locale},
                                     {"options_round_trip", options_round_trip},
                                     {"options_config", options_config},
                                     {"options_resume", options_resume},
                                     {nullptr, nullptr}};
