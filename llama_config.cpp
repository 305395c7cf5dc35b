// See llama_config.h. Keys, defaults and their order of precedence are those of transformers' LlamaConfig and
// MistralConfig; what a released model never does, and what would train silently wrong, is refused by name.
#include "llama_config.h"

#include <algorithm>
#include <cmath>

#include "io/file.h"
#include "io/json.h"

static const int WIDTH_CAP = 1 << 22;  // hidden, ffn, vocabulary: keeps every row count and width inside an int
static const int HEADS_CAP = 1 << 16;
static const int LAYERS_CAP = 1 << 14;

struct Source {
    std::string path;  // printable
    const Json* root;
};

static std::string shown_value(const Json* v) {
    return v ? printable(json_write(*v), 80) : "nothing";
}

// "PATH: key K: cannot be used (found X, need Y)".
static Error key_error(const Source& s, const std::string& key, const Json* found, const char* need) {
    return bad_input("%s: key %s: cannot be used (found %s, need %s)", s.path.c_str(), key.c_str(),
                     shown_value(found).c_str(), need);
}

// A key that is null counts as absent, as in Python's `config.get(key) or default`.
static const Json* value_of(const Json& object, const char* key) {
    const Json* v = object.find(key);
    return v && v->type != Json::NUL ? v : nullptr;
}

// 4096, and 4096.0, which some exporters write.
static bool as_integer(const Json& v, int64_t& out) {
    if (v.type == Json::REAL && v.real == std::floor(v.real) && std::fabs(v.real) < 9e15) {
        out = int64_t(v.real);
        return true;
    }
    out = v.integer;
    return v.type == Json::INT;
}

// fallback 0: the key is required.
static Error read_size(int& out, const Source& s, const char* key, int cap, int fallback = 0) {
    const Json* v = value_of(*s.root, key);
    int64_t n = 0;
    if (!v && fallback) {
        out = fallback;
        return {};
    }
    if (!v || !as_integer(*v, n) || n <= 0) {
        return key_error(s, key, v, "a positive integer");
    }
    if (n > cap) {
        return key_error(s, key, v, ("at most " + std::to_string(cap)).c_str());
    }
    out = int(n);
    return {};
}

static Error read_bool(bool& out, const Source& s, const char* key) {
    const Json* v = value_of(*s.root, key);
    if (v && v->type != Json::BOOL) {
        return key_error(s, key, v, "true or false");
    }
    out = v && v->boolean;
    return {};
}

// A finite number, any spelling of it.
static Error read_number(double& out, const Source& s, const char* key, double fallback) {
    const Json* v = value_of(*s.root, key);
    if (v && !v->is_number()) {
        return key_error(s, key, v, "a number");
    }
    out = v ? v->number() : fallback;
    return {};
}

static std::string read_text(const Json& object, const char* key) {
    const Json* v = value_of(object, key);
    return v && v->type == Json::STRING ? v->string : "";
}

// ------------------------------------------------------------------------------------------------------ parts

static Error read_architecture(const Source& s, bool& mistral) {
    std::string type = read_text(*s.root, "model_type");
    const Json* list = value_of(*s.root, "architectures");
    if (type.empty() && list && list->type == Json::ARRAY && !list->items.empty()) {
        type = list->items[0].type == Json::STRING ? list->items[0].string : "";
    }
    mistral = type == "mistral" || type == "MistralForCausalLM";
    if (mistral || type == "llama" || type == "LlamaForCausalLM") {
        return {};
    }
    if (type.empty()) {
        return bad_input("%s: neither model_type nor architectures says what model this is (need llama)",
                         s.path.c_str());
    }
    return bad_input("%s: architecture %s not supported; supported: llama (and mistral without a sliding window)",
                     s.path.c_str(), printable(type).c_str());
}

static Error read_shape(LlamaConfig& c, const Source& s, bool mistral) {
    Error e;
    if ((e = read_size(c.C, s, "hidden_size", WIDTH_CAP)) || (e = read_size(c.F, s, "intermediate_size", WIDTH_CAP)) ||
        (e = read_size(c.L, s, "num_hidden_layers", LAYERS_CAP)) || (e = read_size(c.V, s, "vocab_size", WIDTH_CAP)) ||
        (e = read_size(c.NH, s, "num_attention_heads", HEADS_CAP)) ||
        (e = read_size(c.max_positions, s, "max_position_embeddings", INT32_MAX, 2048))) {
        return e;
    }
    bool absent = !s.root->find("num_key_value_heads");
    if ((e = read_size(c.NKV, s, "num_key_value_heads", HEADS_CAP, mistral && absent ? 8 : c.NH))) {
        return e;
    }
    if (c.NH % c.NKV != 0) {
        return bad_input("%s: %d query heads cannot share %d kv heads (need a divisor)", s.path.c_str(), c.NH, c.NKV);
    }
    if (!value_of(*s.root, "head_dim") && c.C % c.NH != 0) {
        return bad_input("%s: hidden_size %d is not divisible by %d heads, and head_dim is not given", s.path.c_str(),
                         c.C, c.NH);
    }
    if ((e = read_size(c.HS, s, "head_dim", WIDTH_CAP, std::max(c.C / c.NH, 1)))) {
        return e;
    }
    if (c.HS % 2 != 0 || c.HS > 256) {
        return bad_input("%s: head_dim unsupported (found %d, need an even number up to 256)", s.path.c_str(), c.HS);
    }
    return {};
}

// Settings of the graph that have one legal value here.
static Error read_graph(LlamaConfig& c, const Source& s, bool mistral) {
    const Json* act = value_of(*s.root, "hidden_act");
    if (act && (act->type != Json::STRING || (act->string != "silu" && act->string != "swish"))) {
        return bad_input("%s: unsupported activation: hidden_act (found %s, need \"silu\")", s.path.c_str(),
                         shown_value(act).c_str());
    }
    Error e;
    for (const char* key : {"attention_bias", "mlp_bias", "rope_interleaved"}) {
        bool on;
        if ((e = read_bool(on, s, key))) {
            return e;
        }
        if (on) {
            return key_error(s, key, s.root->find(key), "false: this form of the model is not supported");
        }
    }
    double dropout, partial;
    if ((e = read_bool(c.tied, s, "tie_word_embeddings")) || (e = read_number(c.rms_eps, s, "rms_norm_eps", 1e-6)) ||
        (e = read_number(dropout, s, "attention_dropout", 0)) ||
        (e = read_number(partial, s, "partial_rotary_factor", 1))) {
        return e;
    }
    if (!(c.rms_eps > 0) || !(c.rms_eps < 1)) {
        return key_error(s, "rms_norm_eps", s.root->find("rms_norm_eps"), "a small positive number");
    }
    if (partial != 1) {
        return key_error(s, "partial_rotary_factor", s.root->find("partial_rotary_factor"), "1");
    }
    if (dropout != 0) {
        c.warnings.push_back(s.path + ": attention_dropout " + shown_value(s.root->find("attention_dropout")) +
                             " is not applied");
    }
    if (mistral) {
        const Json* window = s.root->find("sliding_window");  // absent: MistralConfig's 4096; null: none
        bool none = window && window->type == Json::NUL;
        if (!none && (e = read_size(c.sliding_window, s, "sliding_window", INT32_MAX, 4096))) {
            return e;
        }
    }
    return {};
}

// ------------------------------------------------------------------------------------------------------ RoPE

struct RopeSource {
    double theta;
    RopeScaling scaling;
};

static bool same_rope(const RopeSource& a, const RopeSource& b) {
    const RopeScaling &x = a.scaling, &y = b.scaling;
    bool same = a.theta == b.theta && x.kind == y.kind;
    same = same && (x.kind == RopeScaling::NONE || x.factor == y.factor);
    return same && (x.kind != RopeScaling::LLAMA3 ||
                    (x.low_freq_factor == y.low_freq_factor && x.high_freq_factor == y.high_freq_factor &&
                     x.original_max_positions == y.original_max_positions));
}

// A positive number inside the dictionary `name`.
static Error rope_number(double& out, const Source& s, const Json& dict, const char* name, const char* key) {
    const Json* v = value_of(dict, key);
    if (!v) {
        return bad_input("%s: %s: missing key %s", s.path.c_str(), name, key);
    }
    if (!v->is_number() || !(v->number() > 0)) {
        return key_error(s, std::string(name) + "." + key, v, "a positive number");
    }
    out = v->number();
    return {};
}

static Error read_llama3(RopeScaling& r, const Source& s, const Json& dict, const char* name) {
    Error e;
    if ((e = rope_number(r.low_freq_factor, s, dict, name, "low_freq_factor")) ||
        (e = rope_number(r.high_freq_factor, s, dict, name, "high_freq_factor"))) {
        return e;
    }
    if (r.high_freq_factor <= r.low_freq_factor) {
        bool zero = r.high_freq_factor == r.low_freq_factor;
        return bad_input("%s: %s: high_freq_factor must be above low_freq_factor (found %s and %s%s)", s.path.c_str(),
                         name, shown_value(dict.find("high_freq_factor")).c_str(),
                         shown_value(dict.find("low_freq_factor")).c_str(), zero ? ", which would divide by zero" : "");
    }
    const char* key = "original_max_position_embeddings";
    const Json& holder = value_of(*s.root, key) ? *s.root : dict;  // the top level wins, as in transformers 5
    double length;
    if ((e = rope_number(length, s, holder, name, key))) {
        return e;
    }
    if (length != std::floor(length) || length > INT32_MAX) {
        return key_error(s, key, holder.find(key), "a positive integer");
    }
    r.original_max_positions = uint64_t(length);
    return {};
}

// One of the two spellings; dict may be nullptr or empty (no scaling).
static Error read_rope_dict(RopeSource& r, const Source& s, const Json* dict, const char* name) {
    r.scaling = RopeScaling();
    Error e;
    if (!dict || dict->items.empty()) {
        return {};
    }
    for (size_t i = 0; i < dict->items.size(); i++) {
        if (dict->items[i].type == Json::OBJECT) {
            return bad_input("%s: %s: one setting for each kind of layer is not supported (found %s)", s.path.c_str(),
                             name, printable(dict->keys[i]).c_str());
        }
    }
    if (value_of(*dict, "rope_theta") && (e = rope_number(r.theta, s, *dict, name, "rope_theta"))) {
        return e;
    }
    const Json* partial = value_of(*dict, "partial_rotary_factor");
    if (partial && !(partial->is_number() && partial->number() == 1)) {
        return key_error(s, std::string(name) + ".partial_rotary_factor", partial, "1");
    }
    const Json* type = value_of(*dict, "rope_type") ? value_of(*dict, "rope_type") : value_of(*dict, "type");
    std::string kind = !type ? "default" : type->type == Json::STRING ? type->string : json_write(*type);
    if (kind == "default") {
        return {};
    }
    if (kind != "linear" && kind != "llama3") {
        return bad_input("%s: RoPE scaling '%s' not supported (need default, linear or llama3)", s.path.c_str(),
                         printable(kind).c_str());
    }
    r.scaling.kind = kind == "linear" ? RopeScaling::LINEAR : RopeScaling::LLAMA3;
    if ((e = rope_number(r.scaling.factor, s, *dict, name, "factor"))) {
        return e;
    }
    if (r.scaling.factor < 1) {
        return key_error(s, std::string(name) + ".factor", dict->find("factor"), "at least 1");
    }
    return kind == "llama3" ? read_llama3(r.scaling, s, *dict, name) : Error();
}

// transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters. When both are there, a
// rope_scaling that is not empty wins; rope_theta inside the dictionary beats the one beside it.
static Error read_rope(LlamaConfig& c, const Source& s) {
    const Json* dict[2] = {value_of(*s.root, "rope_scaling"), value_of(*s.root, "rope_parameters")};
    const char* name[2] = {"rope_scaling", "rope_parameters"};
    RopeSource rope[2];
    double theta;
    if (Error e = read_number(theta, s, "rope_theta", 10000)) {
        return e;
    }
    if (!(theta > 0)) {
        return key_error(s, "rope_theta", s.root->find("rope_theta"), "a positive number");
    }
    bool given[2];
    for (int i = 0; i < 2; i++) {
        if (dict[i] && dict[i]->type != Json::OBJECT) {
            return key_error(s, name[i], dict[i], "an object or null");
        }
        given[i] = dict[i] && !dict[i]->items.empty();
    }
    int used = given[0] ? 0 : 1;
    rope[0].theta = rope[1].theta = theta;
    if (Error e = read_rope_dict(rope[used], s, dict[used], name[used])) {
        return e;
    }
    if (given[0] && given[1]) {
        Error e = read_rope_dict(rope[1], s, dict[1], name[1]);  // only compared: an error in it is a difference
        if (e || !same_rope(rope[0], rope[1])) {
            c.warnings.push_back(s.path + ": rope_scaling and rope_parameters disagree; rope_scaling is used");
        }
    }
    if (value_of(*s.root, "rope_theta") && rope[used].theta != theta) {
        c.warnings.push_back(s.path + ": rope_theta and " + name[used] + ".rope_theta disagree; the latter is used");
    }
    c.rope_theta = rope[used].theta;
    c.rope = rope[used].scaling;
    return {};
}

// ------------------------------------------------------------------------------------------------------ the rest

static Error read_quantisation(LlamaConfig& c, const Source& s) {
    const Json* q = value_of(*s.root, "quantization_config");
    q = q ? q : value_of(*s.root, "compression_config");
    if (!q) {
        return {};
    }
    if (q->type != Json::OBJECT) {
        return key_error(s, "quantization_config", q, "an object or null");
    }
    auto on = [&](const char* key) {
        const Json* v = q->find(key);
        return v && v->type == Json::BOOL && v->boolean;
    };
    bool four = on("load_in_4bit") || on("_load_in_4bit"), eight = on("load_in_8bit") || on("_load_in_8bit");
    std::string method = read_text(*q, "quant_method");
    method = !method.empty() ? method : four || eight ? "bitsandbytes" : "an unnamed method";
    if (method == "bitsandbytes" && four && !eight) {
        std::string type = read_text(*q, "bnb_4bit_quant_type"), storage = read_text(*q, "bnb_4bit_quant_storage");
        if (type == "nf4" && (storage.empty() || storage == "uint8")) {
            c.bnb_nf4 = true;
            return {};
        }
        method +=
            type == "nf4" ? " nf4 stored as " + storage : " " + (type.empty() ? "fp4" : type);  // fp4: its default
    } else if (method == "bitsandbytes") {
        method += " 8-bit";
    }
    return bad_input("%s: the checkpoint is pre-quantised with %s; only bitsandbytes nf4 is supported", s.path.c_str(),
                     printable(method).c_str())
        .hinted("use the 16-bit checkpoint of the same model");
}

// An id, a list of ids, or null; added to c.eos_ids when new.
static Error read_eos(LlamaConfig& c, const Source& s) {
    const Json* v = value_of(*s.root, "eos_token_id");
    if (!v) {
        return {};
    }
    size_t n = v->type == Json::ARRAY ? v->items.size() : 1;
    for (size_t i = 0; i < n; i++) {
        int64_t id;
        if (!as_integer(v->type == Json::ARRAY ? v->items[i] : *v, id)) {
            return key_error(s, "eos_token_id", v, "an integer, a list of integers or null");
        }
        if (id < 0 || id >= c.V) {
            c.warnings.push_back(s.path + ": eos_token_id " + std::to_string(id) +
                                 " is not in the vocabulary; ignored");
        } else if (std::find(c.eos_ids.begin(), c.eos_ids.end(), int(id)) == c.eos_ids.end()) {
            c.eos_ids.push_back(int(id));
        }
    }
    return {};
}

static Error read_config(LlamaConfig& c, const Source& s) {
    bool mistral = false;
    Error e;
    if (s.root->type != Json::OBJECT) {
        return bad_input("%s: need an object (found %s)", s.path.c_str(), s.root->type_name());
    }
    if ((e = read_architecture(s, mistral)) || (e = read_shape(c, s, mistral)) || (e = read_graph(c, s, mistral)) ||
        (e = read_rope(c, s)) || (e = read_quantisation(c, s)) || (e = read_eos(c, s))) {
        return e;
    }
    if (!s.root->find("eos_token_id") && c.V > 2) {
        c.eos_ids.push_back(2);  // LlamaConfig's default
    }
    c.name = read_text(*s.root, "_name_or_path");
    c.dtype = read_text(*s.root, "dtype");
    c.dtype = c.dtype.empty() ? read_text(*s.root, "torch_dtype") : c.dtype;
    return {};
}

static Error need_model_directory(const std::string& dir) {
    std::string where = printable(dir, 4096);
    if (!path_exists(dir)) {
        return bad_input("%s: no such model directory", where.c_str()).hinted("give the folder that holds config.json");
    }
    if (!path_is_directory(dir)) {
        return bad_input("%s: is a file, not a model directory", where.c_str())
            .hinted("give the folder that holds config.json");
    }
    if (path_exists(path_join(dir, "config.json"))) {
        return {};
    }
    std::vector<std::string> names;
    if (Error e = dir_list(names, dir)) {
        return e;
    }
    std::string list;
    for (const std::string& name : names) {
        list += (list.empty() ? "" : ", ") + printable(name);
    }
    return bad_input("%s: not a Hugging Face checkpoint: config.json missing (found: %s)", where.c_str(),
                     list.empty() ? "an empty directory" : printable(list, 1000).c_str())
        .hinted("a checkpoint has config.json, tokenizer.json and model.safetensors (or shards with an index)");
}

Error llama_config_read(LlamaConfig& c, const std::string& model_dir) {
    c = LlamaConfig();
    if (Error e = need_model_directory(model_dir)) {
        return e;
    }
    const uint64_t cap = UINT64_C(1) << 24;
    std::string path = path_join(model_dir, "config.json");
    if (Error e = file_read_all(c.text, path, cap)) {
        return e;
    }
    Json root;
    if (Error e = json_parse(root, c.text.data(), c.text.size(), path)) {
        return e.or_hinted("the file is damaged: get it again from where the model came from");
    }
    if (Error e = read_config(c, {printable(path, 4096), &root})) {
        return e.or_hinted(
            "give the unchanged config.json of a model with the plain Llama architecture, or choose another model");
    }
    path = path_join(model_dir, "generation_config.json");
    if (!path_exists(path)) {
        return {};
    }
    std::string text;
    if (Error e = file_read_all(text, path, cap)) {
        return e;
    }
    if (Error e = json_parse(root, text.data(), text.size(), path)) {
        return e;
    }
    return read_eos(c, {printable(path, 4096), &root});
}

Error llama_config_shape(LlamaConfig& c, const std::string& name) {
    static const struct {
        const char* name;
        int C, F, L, NH, NKV, HS, V, max_positions;
        double theta, factor;  // factor 0: no scaling
        bool tied;
        int eos;
    } shapes[] = {
        {"125m", 768, 2048, 12, 12, 4, 64, 32000, 2048, 10000, 0, false, 2},
        {"1b", 2048, 8192, 16, 32, 8, 64, 128256, 131072, 500000, 32, true, 128001},         // Llama 3.2
        {"3b", 3072, 8192, 28, 24, 8, 128, 128256, 131072, 500000, 32, true, 128001},        // Llama 3.2
        {"8b", 4096, 14336, 32, 32, 8, 128, 128256, 131072, 500000, 8, false, 128001},       // Llama 3.1
        {"70b", 8192, 28672, 80, 64, 8, 128, 128256, 131072, 500000, 8, false, 128001},      // Llama 3.1
        {"405b", 16384, 53248, 126, 128, 8, 128, 128256, 131072, 500000, 8, false, 128001},  // Llama 3.1
    };
    c = LlamaConfig();
    for (const auto& s : shapes) {
        if (name != s.name) {
            continue;
        }
        Json root = Json::object();
        root.set("model_type", "llama").set("_name_or_path", "shape:" + name).set("torch_dtype", "bfloat16");
        root.set("hidden_size", s.C).set("intermediate_size", s.F).set("num_hidden_layers", s.L);
        root.set("num_attention_heads", s.NH).set("num_key_value_heads", s.NKV).set("head_dim", s.HS);
        root.set("vocab_size", s.V).set("max_position_embeddings", s.max_positions).set("rms_norm_eps", 1e-5);
        root.set("rope_theta", s.theta).set("tie_word_embeddings", s.tied).set("eos_token_id", s.eos);
        if (s.factor > 0) {
            Json scaling = Json::object();
            scaling.set("rope_type", "llama3").set("factor", s.factor).set("low_freq_factor", 1.0);
            scaling.set("high_freq_factor", 4.0).set("original_max_position_embeddings", 8192);
            root.set("rope_scaling", scaling);
        }
        c.text = json_write(root, 2, true) + "\n";
        return read_config(c, {"shape:" + name, &root});
    }
    std::string list;
    for (const auto& s : shapes) {
        list += std::string(list.empty() ? "" : ", ") + s.name;
    }
    return bad_input("no such model shape (found %s, need one of %s)", printable(name).c_str(), list.c_str());
}

// Every operation rounds to fp32 as in PyTorch, where number / tensor is reciprocal, then multiply.
std::vector<float> llama_inv_freq(const LlamaConfig& c) {
    std::vector<float> inv(size_t(c.HS) / 2);
    const float theta = float(c.rope_theta), factor = float(c.rope.factor), low = float(c.rope.low_freq_factor);
    const double length = double(c.rope.original_max_positions);
    const float longest = float(length / c.rope.low_freq_factor), shortest = float(length / c.rope.high_freq_factor);
    const float ramp = float(c.rope.high_freq_factor - c.rope.low_freq_factor);
    for (size_t j = 0; j < inv.size(); j++) {
        float keep = 1.0f / std::pow(theta, float(2 * j) / float(c.HS));
        inv[j] = keep;
        if (c.rope.kind == RopeScaling::LINEAR) {
            inv[j] = keep / factor;
        } else if (c.rope.kind == RopeScaling::LLAMA3) {
            float wavelength = 1.0f / keep * float(2 * M_PI);
            if (wavelength > longest) {
                inv[j] = keep / factor;
            } else if (!(wavelength < shortest)) {
                float smooth = (1.0f / wavelength * float(length) - low) / ramp;
                inv[j] = (1.0f - smooth) * keep / factor + smooth * keep;
            }
        }
    }
    return inv;
}
