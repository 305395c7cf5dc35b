// See options.h. One table drives everything: what CLI11 is told, ranges and their messages, the help, run.json and
// what a resumed run may change. CLI11 only splits argv; every value is converted here, the same way for argv and JSON.
#include "io/options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <variant>

#include <CLI/CLI.hpp>

#include "io/file.h"

namespace {

using Field = std::variant<bool Options::*, int Options::*, int64_t Options::*, uint64_t Options::*, double Options::*,
                           std::string Options::*, std::vector<std::string> Options::*>;

enum : unsigned {
    PATH = 1,       // written absolute into run.json
    NOT_SAVED = 2,  // not a key of run.json
    FREE = 4,       // a resumed run may change it: it decides how, where or how often, not what is learnt
    INVERTED = 8,   // a flag that clears its field
    OPEN_LOW = 16,  // the range leaves out its ends
    OPEN_HIGH = 32,
};

struct Setting {
    const char* group;
    char letter;           // 0: none
    const char* name;      // long name, and the key of run.json
    const char* argument;  // as the help shows it; with '|' the list of values allowed; nullptr: a flag
    const char* help;
    Field field;
    unsigned flags = 0;
    double low = 0, high = 0;         // of numbers
    const char* automatic = nullptr;  // what the default means when it is no legal value: "by the memory plan"
};

const double MANY = 1e9;

const Setting settings[] = {
    {"Data and model", 'i', "input", "FILE", "training data, jsonl; may be repeated", &Options::inputs, PATH, 0, 0, ""},
    {"", 'm', "model", "DIR", "base model: a Hugging Face directory, or shape:NAME", &Options::model, PATH, 0, 0,
     "dev/tiny_llama beside the program"},
    {"", 'o', "output", "DIR", "run directory", &Options::output, PATH | NOT_SAVED, 0, 0, "runs/<stem>-r<rank>-<k>"},
    {"", 0, "val", "FILE|none", "held-out data", &Options::val, PATH | FREE, 0, 0,
     "<input stem>_val.jsonl if it is there"},
    {"", 0, "val-split", "F", "hold out this fraction of the input", &Options::val_split, OPEN_LOW | OPEN_HIGH, 0, 1,
     "none"},
    {"", 't', "max-tokens", "N", "longest example kept whole; longer ones are cut", &Options::max_tokens, 0, 2, 1 << 24,
     "min(2048, the model's limit)"},
    {"", 0, "template", "auto|llama3|llama3-raw|plain", "how a dialogue becomes text", &Options::chat_template},
    {"", 0, "format", "F", "format of the records, for every line", &Options::format},
    {"", 0, "parse-special", nullptr, "read control tokens that stand in the text", &Options::parse_special},
    {"", 0, "skip-bad", nullptr, "leave bad lines out and list them in rejected.jsonl", &Options::skip_bad},
    {"", 0, "bad-utf8", "error|replace", "what to do with invalid UTF-8", &Options::bad_utf8},
    {"", 0, "max-line", "MB", "longest line that is read", &Options::max_line, FREE, 1, 65536},

    {"Adapter", 'r', "rank", "N", "LoRA rank", &Options::rank, 0, 1, 16384},
    {"", 0, "alpha", "X", "the adapter's scale is alpha/rank", &Options::alpha, OPEN_LOW, 0, 1e6},
    {"", 0, "dropout", "P", "dropout on the adapter's input", &Options::dropout, OPEN_HIGH, 0, 1},
    {"", 0, "rslora", nullptr, "scale alpha/sqrt(rank) instead", &Options::rslora},
    {"", 0, "targets", "LIST", "all, attention, mlp, or names: q_proj,v_proj", &Options::targets},
    {"", 0, "adapter-dtype", "f32|bf16", "of the adapter file at the end", &Options::adapter_dtype, FREE},
    {"", 0, "init-adapter", "DIR", "start from a PEFT adapter", &Options::init_adapter, PATH, 0, 0, "a fresh adapter"},
    {"", 0, "quant", "nf4|none", "how the frozen base is held", &Options::quant},
    {"", 0, "no-double-quant", nullptr, "keep the scales of NF4 blocks in fp32", &Options::double_quant, INVERTED},

    {"Training", 'b', "batch", "N", "examples per optimizer step", &Options::batch, 0, 1, 1 << 20},
    {"", 'e', "epochs", "X", "length in epochs", &Options::epochs, OPEN_LOW, 0, 1e6},
    {"", 'n', "steps", "N", "length in steps; wins over --epochs", &Options::steps, 0, 1, MANY, "by --epochs"},
    {"", 0, "lr", "X", "peak learning rate", &Options::lr, 0, 0, 10, "by the model's width"},
    {"", 0, "schedule", "constant|linear|cosine", "decay after the warm-up", &Options::schedule},
    {"", 0, "warmup", "N", "warm-up steps", &Options::warmup, 0, 0, MANY, "3 % of the steps"},
    {"", 0, "weight-decay", "X", "AdamW", &Options::weight_decay, 0, 0, 100},
    {"", 0, "beta1", "X", "AdamW", &Options::beta1, OPEN_HIGH, 0, 1},
    {"", 0, "beta2", "X", "AdamW", &Options::beta2, OPEN_HIGH, 0, 1},
    {"", 0, "eps", "X", "AdamW", &Options::eps, OPEN_LOW, 0, 1},
    {"", 0, "clip", "X", "clip the gradient to this norm; 0: never", &Options::clip, 0, 0, MANY},
    {"", 0, "no-shuffle", nullptr, "file order in every epoch", &Options::shuffle, INVERTED},
    {"", 0, "seed", "N", "of every random choice", &Options::seed, 0, 0, 18446744073709551615.0},

    {"Execution (never changes the result beyond rounding)", 0, "device", "auto|cpu|cuda", "where", &Options::device,
     FREE},
    {"", 0, "threads", "N", "CPU threads", &Options::threads, FREE, 1, 4096, "all"},
    {"", 0, "math", "auto|fp32|int16|bf16", "CPU arithmetic of the base", &Options::math, FREE},
    {"", 0, "gemm", "auto|fused|dequant", "GPU kernels of the NF4 base", &Options::gemm, FREE},
    {"", 0, "recompute", "auto|none|ffn|attn|full", "activations made again instead of kept", &Options::recompute,
     FREE},
    {"", 0, "paged-optimizer", nullptr, "GPU: the optimizer's moments stay on the host", &Options::paged_optimizer,
     FREE},
    {"", 0, "shard-base", nullptr, "many ranks: each holds a part of the NF4 base", &Options::shard_base, FREE},
    {"", 0, "pass-tokens", "N", "tokens in flight", &Options::pass_tokens, FREE, 1, 1 << 24, "by the memory plan"},
    {"", 0, "no-pack", nullptr, "one document a pass", &Options::pack, INVERTED | FREE},

    {"The run", 0, "eval-every", "N", "steps between evaluations", &Options::eval_every, FREE, 1, MANY,
     "once an epoch"},
    {"", 0, "save-every", "N", "steps between checkpoints", &Options::save_every, FREE, 1, MANY, "once an epoch"},
    {"", 0, "keep", "N", "checkpoints that are kept", &Options::keep, FREE, 2, MANY},
    {"", 0, "resume", nullptr, "go on from the newest good checkpoint", &Options::resume, NOT_SAVED},
    {"", 0, "overwrite", nullptr, "replace an earlier run in --output", &Options::overwrite, NOT_SAVED},
    {"", 0, "dry-run", nullptr, "everything up to the first step: data report, plan", &Options::dry_run, NOT_SAVED},
    {"", 0, "dump-data", "FILE", "with --dry-run: every example's tokens and targets", &Options::dump_data,
     PATH | NOT_SAVED, 0, 0, ""},
    {"", 0, "benchmark", "N", "time N steps on random tokens, write nothing", &Options::benchmark, NOT_SAVED, 1, MANY,
     "off"},
    {"", 0, "ranks", "R", "with --dry-run: plan for R ranks like this one", &Options::ranks, NOT_SAVED, 1, 1 << 16,
     "those that run"},
    {"", 0, "link", "GB/s", "with --ranks: what a rank can send and receive", &Options::link, NOT_SAVED | OPEN_LOW, 0,
     1e6},
    {"", 0, "save-base", "DIR", "write the NF4 base as read, so that the next start is quick", &Options::save_base,
     PATH | NOT_SAVED, 0, 0, "not written"},
    {"", 'q', "quiet", nullptr, "print warnings and errors only", &Options::quiet, FREE},
};

const char* const config_usage = "usage: --config FILE   options from a run.json; the command line wins";

const Setting* find_setting(const std::string& name) {
    for (const Setting& s : settings) {
        if (name == s.name) {
            return &s;
        }
    }
    return nullptr;
}

template <class T>
bool holds(const Setting& s) {
    return std::holds_alternative<T Options::*>(s.field);
}

bool is_number(const Setting& s) {
    return holds<int>(s) || holds<int64_t>(s) || holds<uint64_t>(s) || holds<double>(s);
}

// Not by printf, which knows locales with a decimal comma: 0.9, 1e-08, and whole numbers without a point.
std::string number_text(double v) {
    return v == std::floor(v) && std::fabs(v) < 1e15 ? std::to_string(int64_t(v)) : json_write(Json(v));
}

// ---- one value: from JSON (which argv's text becomes first), to JSON, ranges

std::string need(const Setting& s) {
    if (holds<bool>(s)) {
        return "true or false";
    }
    if (holds<uint64_t>(s)) {
        return "an integer from 0 to 18446744073709551615";
    }
    if (is_number(s)) {
        std::string low = number_text(s.low), high = number_text(s.high);
        std::string range = s.flags & OPEN_LOW
                                ? "above " + low + (s.flags & OPEN_HIGH ? " and below " : " and at most ") + high
                            : s.flags & OPEN_HIGH ? "at least " + low + " and below " + high
                                                  : "from " + low + " to " + high;
        return (holds<double>(s) ? "a decimal number " : "an integer ") + range;
    }
    if (strchr(s.argument, '|') && !(s.flags & PATH)) {
        std::string list = s.argument;
        for (size_t at; (at = list.find('|')) != std::string::npos;) {
            list.replace(at, 1, ", ");
        }
        return "one of " + list;
    }
    return "a value";
}

// "targets": the words of PEFT's module names and their groups; the first unknown one, or "".
std::string bad_target(const std::string& list) {
    static const char* const known[] = {"all",    "attention", "mlp",       "q_proj",  "k_proj",
                                        "v_proj", "o_proj",    "gate_proj", "up_proj", "down_proj"};
    for (size_t begin = 0; begin <= list.size();) {
        size_t end = std::min(list.find(',', begin), list.size());
        std::string word = list.substr(begin, end - begin);
        if (std::find(std::begin(known), std::end(known), word) == std::end(known)) {
            return word.empty() ? "an empty name" : word;
        }
        begin = end + 1;
    }
    return "";
}

bool in_range(const Setting& s, double v) {
    return std::isfinite(v) && (s.flags & OPEN_LOW ? v > s.low : v >= s.low) &&
           (s.flags & OPEN_HIGH ? v < s.high : v <= s.high);
}

bool set_text(Options& o, const Setting& s, const Json& v) {
    if (v.type != Json::STRING || v.string.empty() || v.string.find('\0') != std::string::npos) {
        return false;
    }
    if (strchr(s.argument, '|') && !(s.flags & PATH)) {
        std::string list = std::string("|") + s.argument + "|";
        if (v.string.find('|') != std::string::npos || list.find("|" + v.string + "|") == std::string::npos) {
            return false;
        }
    }
    o.*std::get<std::string Options::*>(s.field) = v.string;
    return true;
}

// False: v is none of what need() says; the field is left alone.
bool set_value(Options& o, const Setting& s, const Json& v) {
    bool integral = v.type == Json::INT || v.type == Json::UINT;
    if (holds<bool>(s)) {
        if (v.type != Json::BOOL) {
            return false;
        }
        o.*std::get<bool Options::*>(s.field) = v.boolean != bool(s.flags & INVERTED);
    } else if (holds<int>(s) || holds<int64_t>(s)) {
        if (v.type != Json::INT || !in_range(s, double(v.integer))) {
            return false;
        }
        if (holds<int>(s)) {
            o.*std::get<int Options::*>(s.field) = int(v.integer);
        } else {
            o.*std::get<int64_t Options::*>(s.field) = v.integer;
        }
    } else if (holds<uint64_t>(s)) {
        if (!integral || (v.type == Json::INT && v.integer < 0)) {
            return false;
        }
        o.*std::get<uint64_t Options::*>(s.field) = v.type == Json::INT ? uint64_t(v.integer) : v.natural;
    } else if (holds<double>(s)) {
        if (!v.is_number() || !in_range(s, v.number())) {
            return false;
        }
        o.*std::get<double Options::*>(s.field) = v.number();
    } else if (holds<std::string>(s)) {
        return set_text(o, s, v);
    } else {
        std::vector<std::string> list;
        for (const Json& item : v.items) {
            if (item.type != Json::STRING || item.string.empty() || item.string.find('\0') != std::string::npos) {
                return false;
            }
            list.push_back(item.string);
        }
        if (v.type != Json::ARRAY || list.empty()) {
            return false;
        }
        o.*std::get<std::vector<std::string> Options::*>(s.field) = list;
    }
    return true;
}

std::string absolute(const Setting& s, const std::string& path) {
    bool word = path.empty() || (path == "none" && std::string(s.name) == "val") || path.rfind("shape:", 0) == 0;
    if (!(s.flags & PATH) || word) {
        return path;
    }
    std::error_code failed;
    std::filesystem::path whole = std::filesystem::absolute(path, failed).lexically_normal();
    std::string text = failed ? path : whole.string();
    return text.size() > 1 && text.back() == '/' ? text.substr(0, text.size() - 1) : text;
}

Json value_of(const Options& o, const Setting& s) {
    if (holds<bool>(s)) {
        return Json((o.*std::get<bool Options::*>(s.field)) != bool(s.flags & INVERTED));
    }
    if (holds<int>(s)) {
        return Json(o.*std::get<int Options::*>(s.field));
    }
    if (holds<int64_t>(s)) {
        return Json(o.*std::get<int64_t Options::*>(s.field));
    }
    if (holds<uint64_t>(s)) {
        return Json(o.*std::get<uint64_t Options::*>(s.field));
    }
    if (holds<double>(s)) {
        return Json(o.*std::get<double Options::*>(s.field));
    }
    if (holds<std::string>(s)) {
        return Json(absolute(s, o.*std::get<std::string Options::*>(s.field)));
    }
    Json list = Json::array();
    for (const std::string& path : o.*std::get<std::vector<std::string> Options::*>(s.field)) {
        list.push(absolute(s, path));
    }
    return list;
}

// The field stands at a default that is no value of its own.
bool is_automatic(const Options& o, const Setting& s) {
    return s.automatic && json_write(value_of(o, s)) == json_write(value_of(Options(), s));
}

std::string shown(const Options& o, const Setting& s) {
    if (is_automatic(o, s)) {
        return *s.automatic ? s.automatic : "nothing";
    }
    Json v = value_of(o, s);
    if (v.type == Json::ARRAY) {
        std::string list;
        for (const Json& item : v.items) {
            list += (list.empty() ? "" : ", ") + printable(item.string);
        }
        return list;
    }
    return v.type == Json::STRING ? printable(v.string) : v.type == Json::REAL ? number_text(v.real) : json_write(v);
}

// ---- words for people

std::string spelt(const Setting& s) {
    std::string text = s.letter ? std::string("-") + s.letter + ", --" : "    --";
    text += s.name;
    return s.argument ? text + " " + s.argument : text;
}

std::string described(const Setting& s) {
    Options defaults;
    std::string text = s.help;
    if (s.argument && (!s.automatic || *s.automatic)) {
        text += " (default: " + shown(defaults, s) + ")";
    }
    return text;
}

std::string usage(const Setting& s) {
    std::string text = spelt(s);
    return "usage: " + text.substr(std::min(text.find_first_not_of(' '), text.size())) + "   " + described(s);
}

size_t edit_distance(const std::string& a, const std::string& b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); j++) {
        row[j] = j;
    }
    for (size_t i = 1; i <= a.size(); i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); j++) {
            size_t above = row[j];
            row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
            diagonal = above;
        }
    }
    return row[b.size()];
}

// A name that begins with the word comes before one that is a few letters off.
const Setting& nearest(const std::string& name) {
    const Setting* best = settings;
    size_t distance = SIZE_MAX;
    for (const Setting& s : settings) {
        size_t d =
            !name.empty() && std::string(s.name).rfind(name, 0) == 0 ? 0 : edit_distance(name.substr(0, 64), s.name);
        if (d < distance) {
            distance = d;
            best = &s;
        }
    }
    return *best;
}

void print_help() {
    printf(
        "train_llama fine-tunes a LLaMA-3 model by LoRA or QLoRA from a jsonl file.\n\n"
        "  train_llama -i data.jsonl -r 16                 train the default base on your data\n"
        "  train_llama -i data.jsonl -m DIR -o runs/mine   a Hugging Face model, a run directory of your choice\n"
        "  train_llama -o runs/mine --resume               go on where it stopped\n");
    for (const Setting& s : settings) {
        if (*s.group) {
            printf("\n%s:\n", s.group);
        }
        std::string left = spelt(s);
        printf(left.size() <= 28 ? "  %-28s  %s\n" : "  %s\n                                %s\n", left.c_str(),
               described(s).c_str());
    }
    printf("\nAnd:\n  %-28s  %s\n  %-28s  %s\n  %-28s  %s\n", "    --config FILE",
           "options from a run.json; the command line wins", "    --version", "the program's version", "-h, --help",
           "this page");
    printf(
        "\nExit status: 0 done, 1 runtime failure, 2 bad option or input, 3 diverged, 128 + n saved and stopped by "
        "signal n.\n");
    fflush(stdout);
}

// ---- argv

// Text to JSON of the setting's kind; a text that is no such number stays a string, which set_value refuses.
Json from_text(const Setting& s, const std::string& text) {
    const char *begin = text.data(), *end = begin + text.size();
    if (holds<double>(s)) {
        double v = 0;
        std::from_chars_result r = std::from_chars(begin, end, v);
        return r.ec == std::errc() && r.ptr == end ? Json(v) : Json(text);
    }
    if (holds<uint64_t>(s)) {
        uint64_t v = 0;
        std::from_chars_result r = std::from_chars(begin, end, v);
        return r.ec == std::errc() && r.ptr == end ? Json(v) : Json(text);
    }
    if (is_number(s)) {
        int64_t v = 0;
        std::from_chars_result r = std::from_chars(begin, end, v);
        return r.ec == std::errc() && r.ptr == end ? Json(v) : Json(text);
    }
    return Json(text);
}

Error value_error(const Setting& s, const std::string& where, const std::string& found) {
    return bad_input("%s must be %s (found %s)", where.c_str(), need(s).c_str(), found.c_str()).hinted(usage(s));
}

Error set_from_text(Options& o, const Setting& s, const std::vector<std::string>& texts) {
    std::string dashed = std::string("--") + s.name;
    bool list = holds<std::vector<std::string>>(s);
    if (texts.size() > 1 && !list) {
        return bad_input("%s is given more than once", dashed.c_str()).hinted(usage(s));
    }
    Json items = Json::array();
    for (const std::string& text : texts) {
        if (!is_number(s) && (text.empty() || (text.size() > 1 && text[0] == '-'))) {
            return bad_input("%s needs a value (found %s)", dashed.c_str(),
                             text.empty() ? "an empty one" : printable(text).c_str())
                .hinted(usage(s) +
                        (text.empty() || !(s.flags & PATH) ? "" : "; a path that begins with '-' is written ./-..."));
        }
        items.push(from_text(s, text));
    }
    if (!set_value(o, s, list ? items : items.items[0])) {
        return value_error(s, dashed, texts[0].empty() ? "nothing" : printable(texts[0]));
    }
    return {};
}

// Rules between settings and inside lists, wherever the values came from.
Error check_together(const Options& o) {
    std::string word = bad_target(o.targets);
    if (!word.empty()) {
        return bad_input(
                   "--targets: no such module (found %s, need all, attention, mlp, or a list of q_proj, k_proj, "
                   "v_proj, "
                   "o_proj, gate_proj, up_proj, down_proj)",
                   printable(word).c_str())
            .hinted(usage(*find_setting("targets")));
    }
    if (!o.val.empty() && o.val_split > 0) {
        return bad_input("--val and --val-split exclude each other")
            .hinted("give the held-out data as a file, or as a fraction");
    }
    return {};
}

Error check_complete(const Options& o) {
    if (o.resume && o.overwrite) {
        return bad_input("--resume and --overwrite exclude each other")
            .hinted("--resume goes on with the run, --overwrite removes it");
    }
    if (o.resume && o.output.empty() && o.inputs.empty()) {
        return bad_input("--resume needs the run to go on with")
            .hinted("give its directory with -o DIR, or its data with -i FILE");
    }
    if (!o.dump_data.empty() && !o.dry_run) {
        return bad_input("--dump-data needs --dry-run").hinted(usage(*find_setting("dump-data")));
    }
    if (o.ranks > 0 && !o.dry_run) {
        return bad_input("--ranks needs --dry-run: it plans for machines that are not there")
            .hinted("to train on many ranks: mpirun -n " + std::to_string(o.ranks) + " ./train_llama ...");
    }
    if (o.has("link") && o.ranks == 0) {
        return bad_input("--link needs --ranks").hinted(usage(*find_setting("link")));
    }
    bool random_model = o.model.rfind("shape:", 0) == 0;
    if (!o.save_base.empty() && (o.dry_run || o.benchmark > 0 || random_model || o.quant != "nf4")) {
        return bad_input(
                   "--save-base needs a run that reads and quantises a base: no --dry-run, --benchmark, -m shape: or "
                   "--quant none")
            .hinted(usage(*find_setting("save-base")));
    }
    if (o.inputs.empty() && !o.resume && o.benchmark == 0 && !random_model) {
        return bad_input("--input is missing: no training data")
            .hinted("train_llama -i data.jsonl -r 16; train_llama --help lists every option");
    }
    return {};
}

Error unknown_option(const std::string& argument) {
    if (argument.empty() || argument[0] != '-' || argument == "-" || argument == "--") {
        return bad_input("unexpected argument (found %s)", printable(argument).c_str())
            .hinted("data files are given with -i FILE");
    }
    std::string name = argument.substr(0, argument.find('='));
    name.erase(0, std::min(name.find_first_not_of('-'), name.size()));
    if (name.size() < 2) {
        return bad_input("unknown option %s", printable(argument).c_str())
            .hinted("train_llama --help lists every option");
    }
    const Setting& s = nearest(name);
    return bad_input("unknown option %s", printable(argument).c_str())
        .hinted(std::string("the nearest is --") + s.name + "; " + usage(s));
}

// What CLI11 itself refuses: an option at the end without its value, a flag with one. Its text begins with the name.
Error parser_error(const CLI::ParseError& e) {
    std::string what = e.what();
    what.erase(0, std::min(what.find_first_not_of('-'), what.size()));
    std::string name = what.substr(0, what.find_first_of(" :="));
    if (const Setting* s = find_setting(name)) {
        return bad_input("--%s %s", s->name, s->argument ? "needs a value" : "takes no value").hinted(usage(*s));
    }
    if (name == "config") {
        return bad_input("--config needs a value").hinted(config_usage);
    }
    return bad_input("%s", printable(what, 400).c_str()).hinted("train_llama --help lists every option");
}

}  // namespace

bool Options::has(const std::string& name) const {
    return std::find(given.begin(), given.end(), name) != given.end();
}

Error options_parse(Options& o, bool* done, int argc, const char* const* argv) {
    *done = false;
    o = Options();
    CLI::App app;
    app.set_help_flag("");
    app.allow_extras();
    std::vector<CLI::Option*> parsed;
    for (const Setting& s : settings) {
        std::string names = (s.letter ? std::string("-") + s.letter + "," : "") + "--" + s.name;
        if (s.argument) {
            parsed.push_back(app.add_option(names)->type_size(1)->expected(1)->allow_extra_args(false)->take_all());
        } else {
            parsed.push_back(app.add_flag(names)->disable_flag_override()->take_all());
        }
    }
    CLI::Option* config = app.add_option("--config")->type_size(1)->expected(1)->allow_extra_args(false)->take_all();
    CLI::Option* help = app.add_flag("-h,--help")->take_all();
    CLI::Option* version = app.add_flag("--version")->take_all();
    for (int i = 1; i < argc; i++) {
        std::string text = argv[i];  // careful: to CLI11 `--name= next` is `--name next`
        if (text.rfind("--", 0) == 0 && text.find('=') == text.size() - 1) {
            const Setting* s = find_setting(text.substr(2, text.size() - 3));
            return s ? bad_input("%s needs a value (found an empty one)", text.substr(0, text.size() - 1).c_str())
                           .hinted(usage(*s))
                     : unknown_option(text);
        }
    }
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        return parser_error(e);
    }
    if (help->count() > 0) {
        print_help();
        *done = true;
        return {};
    }
    if (version->count() > 0) {
        printf("train_llama %s\n", train_llama_version);
        *done = true;
        return {};
    }
    std::vector<std::string> rest = app.remaining();
    if (!rest.empty()) {
        return unknown_option(rest[0]);
    }
    for (size_t k = 0; k < parsed.size(); k++) {
        const Setting& s = settings[k];
        if (parsed[k]->count() == 0) {
            continue;
        }
        if (!s.argument) {
            if (parsed[k]->count() > 1) {
                return bad_input("--%s is given more than once", s.name).hinted(usage(s));
            }
            o.*std::get<bool Options::*>(s.field) = !(s.flags & INVERTED);
        } else if (Error e = set_from_text(o, s, parsed[k]->results())) {
            return e;
        }
    }
    for (const CLI::Option* option : app.parse_order()) {
        std::string name = option->get_name().substr(2);
        if (find_setting(name) && !o.has(name)) {
            o.given.push_back(name);
        }
    }
    if (config->count() > 1) {
        return bad_input("--config is given more than once").hinted(config_usage);
    }
    if (config->count() == 1) {
        std::string path = config->results()[0];
        Json run;
        if (Error e = json_read_file(run, path)) {
            return e;
        }
        if (Error e = options_take(o, run, path, false)) {
            return e;
        }
    }
    if (Error e = check_together(o)) {
        return e;
    }
    return check_complete(o);
}

Json options_to_json(const Options& o) {
    Json run = Json::object();
    for (const Setting& s : settings) {
        std::string name = s.name;
        // An adapter that is started from brings these; a default written here would contradict it.
        bool of_adapter = name == "rank" || name == "alpha" || name == "targets" || name == "rslora";
        bool left_to_adapter = of_adapter && !o.init_adapter.empty() && !o.has(name);
        if (!(s.flags & NOT_SAVED) && !is_automatic(o, s) && !left_to_adapter) {
            run.set(name, value_of(o, s));
        }
    }
    return run;
}

// run.json into r, checked; the names found, in order.
static Error read_run(Options& r, std::vector<std::string>& found, const Json& run, const std::string& path) {
    std::string file = printable(path, 1000);
    if (run.type != Json::OBJECT) {
        return bad_input("%s: need an object of options (found %s)", file.c_str(), run.type_name());
    }
    for (size_t k = 0; k < run.keys.size(); k++) {
        const Setting* s = find_setting(run.keys[k]);
        if (!s) {
            return bad_input("%s: unknown option \"%s\"", file.c_str(), printable(run.keys[k]).c_str())
                .hinted(std::string("the nearest is \"") + nearest(run.keys[k]).name +
                        "\"; names are those of the command line, without dashes");
        }
        if (s->flags & NOT_SAVED) {
            return bad_input("%s: \"%s\" is not taken from a file", file.c_str(), s->name)
                .hinted(std::string("give --") + s->name + " on the command line");
        }
        if (!set_value(r, *s, run.items[k])) {
            const Json& v = run.items[k];
            return value_error(
                *s, file + ": " + s->name,
                v.type == Json::ARRAY || v.type == Json::OBJECT ? v.type_name() : printable(json_write(v)));
        }
        found.push_back(s->name);
    }
    Error e = check_together(r);
    return e ? bad_input("%s: %s", file.c_str(), e.what.c_str()).hinted(e.hint) : e;
}

Error options_take(Options& o, const Json& run, const std::string& path, bool resume) {
    Options r;
    std::vector<std::string> found;
    if (Error e = read_run(r, found, run, path)) {
        return e;
    }
    auto in_file = [&](const char* name) { return std::find(found.begin(), found.end(), name) != found.end(); };
    for (const Setting& s : settings) {
        if (!resume || (s.flags & (FREE | NOT_SAVED)) || !o.has(s.name)) {
            continue;
        }
        bool brought_by_adapter = !r.init_adapter.empty() && !in_file(s.name);
        std::string before = json_write(value_of(r, s)), now = json_write(value_of(o, s));
        if (before != now && !brought_by_adapter) {
            bool moved = s.flags & PATH;
            return bad_input("--resume: %s differs from the run's (found %s, the run has %s)", s.name,
                             shown(o, s).c_str(), shown(r, s).c_str())
                .hinted(moved ? "leave the option out; if the file has only moved, write its new place into " +
                                    printable(path, 1000)
                              : "leave the option out, or start another run with another -o");
        }
    }
    const Options line = o;
    for (const std::string& name : found) {
        const Setting& s = *find_setting(name);
        // The command line wins over the file also where two options decide the same thing.
        bool overruled =
            line.has(name) || (name == "val" && line.has("val-split")) ||
            (!resume && ((name == "val-split" && line.has("val")) || (name == "steps" && line.has("epochs"))));
        if (overruled) {
            continue;
        }
        set_value(o, s, run.items[size_t(std::find(run.keys.begin(), run.keys.end(), name) - run.keys.begin())]);
        o.given.push_back(name);
    }
    return check_together(o);
}
