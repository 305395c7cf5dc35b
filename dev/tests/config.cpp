// config.json: every spelling that released models use, what is refused and in which words, and RoPE's frequencies.
#include "llama_config.h"

#include <cmath>

#include "dev/tests/test.h"
#include "io/file.h"
#include "io/json.h"

// The text of Llama-3.2-1B's config.json, as far as it matters here.
static const char* const LLAMA_1B =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"attention_bias\":false,\"attention_dropout\":0.0,\"bos_token_id\":"
    "128000,"
    "\"eos_token_id\":128001,\"head_dim\":64,\"hidden_act\":\"silu\",\"hidden_size\":2048,\"initializer_range\":0.02,"
    "\"intermediate_size\":8192,\"max_position_embeddings\":131072,\"mlp_bias\":false,\"model_type\":\"llama\","
    "\"num_attention_heads\":32,\"num_hidden_layers\":16,\"num_key_value_heads\":8,\"pretraining_tp\":1,"
    "\"rms_norm_eps\":1e-05,\"rope_scaling\":{\"factor\":32.0,\"high_freq_factor\":4.0,\"low_freq_factor\":1.0,"
    "\"original_max_position_embeddings\":8192,\"rope_type\":\"llama3\"},\"rope_theta\":500000.0,"
    "\"tie_word_embeddings\":true,\"torch_dtype\":\"bfloat16\",\"transformers_version\":\"4.45.0\",\"use_cache\":true,"
    "\"vocab_size\":128256,\"_name_or_path\":\"meta-llama/Llama-3.2-1B\",\"auto_map\":{\"AutoModel\":\"x.py\"}}";

static Error read_text(LlamaConfig& c, const std::string& text, const std::string& generation = "") {
    static std::string dir = test_directory();
    Error e = file_replace(path_join(dir, "config.json"), text);
    CHECK(!e, "%s", e.what.c_str());
    std::string path = path_join(dir, "generation_config.json");
    e = generation.empty() ? path_remove(path) : file_replace(path, generation);
    CHECK(!e, "%s", e.what.c_str());
    e = llama_config_read(c, dir);
    e.what = e.what.rfind(dir + "/", 0) == 0 ? e.what.substr(dir.size() + 1) : e.what;
    return e;
}

// The 1B file with the members of `changes` set; the value "absent" removes a key.
static std::string changed(const std::string& changes) {
    Json root, change, out = Json::object();
    Error e = json_parse(root, LLAMA_1B, std::string(LLAMA_1B).size(), "base");
    CHECK(!e, "%s", e.what.c_str());
    e = json_parse(change, changes.data(), changes.size(), "changes");
    CHECK(!e, "%s: %s", changes.c_str(), e.what.c_str());
    for (size_t i = 0; i < change.items.size(); i++) {
        root.set(change.keys[i], change.items[i]);
    }
    for (size_t i = 0; i < root.items.size(); i++) {
        if (!(root.items[i].type == Json::STRING && root.items[i].string == "absent")) {
            out.set(root.keys[i], root.items[i]);
        }
    }
    return json_write(out);
}

static Error read_changed(LlamaConfig& c, const std::string& changes) {
    return read_text(c, changed(changes));
}

static void config_reads() {
    LlamaConfig c;
    Error e = read_text(c, LLAMA_1B, "{\"eos_token_id\":[128001,128008,128009]}");
    CHECK(!e, "%s", e.what.c_str());
    CHECK(c.L == 16 && c.C == 2048 && c.F == 8192 && c.NH == 32 && c.NKV == 8 && c.HS == 64 && c.V == 128256,
          "the shape");
    CHECK(c.max_positions == 131072 && c.rms_eps == 1e-5 && c.rope_theta == 500000 && c.tied && !c.bnb_nf4, "numbers");
    CHECK(c.rope.kind == RopeScaling::LLAMA3 && c.rope.factor == 32 && c.rope.low_freq_factor == 1 &&
              c.rope.high_freq_factor == 4 && c.rope.original_max_positions == 8192,
          "RoPE scaling");
    CHECK(c.eos_ids == std::vector<int>({128001, 128008, 128009}), "stop ids of both files");
    CHECK(c.name == "meta-llama/Llama-3.2-1B" && c.dtype == "bfloat16" && c.text == LLAMA_1B, "texts");
    CHECK(c.warnings.empty() && c.sliding_window == 0, "no warnings");
}

static void config_spellings() {
    LlamaConfig c;
    auto good = [&](const char* changes) {
        Error e = read_changed(c, changes);
        return CHECK(!e, "%s: %s", changes, e.what.c_str());
    };
    CHECK(good("{\"hidden_size\":4096.0,\"rms_norm_eps\":0.00001,\"rope_theta\":100000}") && c.C == 4096 &&
              c.rms_eps == 1e-5 && c.rope_theta == 100000,
          "integers written as floats and back");
    CHECK(good("{\"head_dim\":null}") && c.HS == 64 && good("{\"head_dim\":\"absent\"}") && c.HS == 64, "no head_dim");
    CHECK(good("{\"head_dim\":128,\"hidden_size\":5120}") && c.HS == 128, "head_dim * heads is not hidden");
    CHECK(good("{\"hidden_size\":2050}") && c.HS == 64, "hidden not divisible by heads, head_dim given");
    CHECK(good("{\"num_key_value_heads\":null}") && c.NKV == 32, "null kv heads");
    CHECK(good("{\"num_key_value_heads\":\"absent\"}") && c.NKV == 32, "no kv heads");
    CHECK(good("{\"hidden_act\":\"absent\",\"max_position_embeddings\":\"absent\",\"rms_norm_eps\":\"absent\","
               "\"rope_theta\":\"absent\",\"rope_scaling\":null,\"tie_word_embeddings\":\"absent\",\"attention_bias\":"
               "\"absent\",\"mlp_bias\":\"absent\",\"torch_dtype\":\"absent\",\"_name_or_path\":\"absent\"}") &&
              c.max_positions == 2048 && c.rms_eps == 1e-6 && c.rope_theta == 10000 &&
              c.rope.kind == RopeScaling::NONE && !c.tied && c.dtype.empty() && c.name.empty(),
          "defaults");
    CHECK(good("{\"model_type\":\"absent\"}") && good("{\"architectures\":\"absent\"}"),
          "one of the two names is enough");
    CHECK(good("{\"torch_dtype\":\"absent\",\"dtype\":\"float16\"}") && c.dtype == "float16", "dtype");
    CHECK(good("{\"eos_token_id\":[128001,128009,128001]}") && c.eos_ids == std::vector<int>({128001, 128009}),
          "a list");
    CHECK(good("{\"eos_token_id\":null}") && c.eos_ids.empty() && good("{\"eos_token_id\":[]}") && c.eos_ids.empty(),
          "null");
    CHECK(good("{\"eos_token_id\":\"absent\"}") && c.eos_ids == std::vector<int>({2}), "LlamaConfig's default");
    CHECK(good("{\"eos_token_id\":128256}") && c.eos_ids.empty() && c.warnings.size() == 1 &&
              text_has(c.warnings[0], "eos_token_id 128256 is not in the vocabulary"),
          "an id beyond the vocabulary");
    CHECK(good("{\"attention_dropout\":0.1}") && c.warnings.size() == 1 &&
              text_has(c.warnings[0], "attention_dropout 0.1"),
          "dropout");
    CHECK(!read_text(c, "\xEF\xBB\xBF" + std::string(LLAMA_1B)) && c.C == 2048, "a byte order mark");

    CHECK(good("{\"model_type\":\"mistral\",\"sliding_window\":4096}") && c.sliding_window == 4096, "a window");
    CHECK(good("{\"model_type\":\"mistral\",\"sliding_window\":null}") && c.sliding_window == 0, "no window");
    CHECK(good("{\"model_type\":\"mistral\",\"num_key_value_heads\":\"absent\"}") && c.sliding_window == 4096 &&
              c.NKV == 8,
          "MistralConfig's defaults");
    CHECK(good("{\"sliding_window\":4096}") && c.sliding_window == 0, "a llama has none");
    CHECK(good("{\"quantization_config\":null}") && !c.bnb_nf4, "null");
    CHECK(
        good(
            "{\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"_load_in_4bit\":true,\"load_in_4bit\":true,"
            "\"_load_in_8bit\":false,\"load_in_8bit\":false,\"bnb_4bit_quant_type\":\"nf4\",\"bnb_4bit_quant_storage\":"
            "\"uint8\",\"bnb_4bit_use_double_quant\":true}}") &&
            c.bnb_nf4,
        "bitsandbytes nf4");
    CHECK(good("{\"quantization_config\":{\"load_in_4bit\":true,\"bnb_4bit_quant_type\":\"nf4\"}}") && c.bnb_nf4,
          "its early form, without a name");
}

static void config_rope_spellings() {
    LlamaConfig c;
    auto good = [&](const char* changes) {
        Error e = read_changed(c, changes);
        return CHECK(!e, "%s: %s", changes, e.what.c_str());
    };
    const std::string l3 =
        "\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":8192";
    const std::string v5 = "\"rope_parameters\":{\"rope_type\":\"llama3\",\"rope_theta\":500000.0," + l3 + "}";
    CHECK(good(("{\"rope_scaling\":\"absent\",\"rope_theta\":\"absent\"," + v5 + "}").c_str()) && c.rope.factor == 8 &&
              c.rope.kind == RopeScaling::LLAMA3 && c.rope_theta == 500000 && c.warnings.empty(),
          "transformers 5");
    CHECK(good(("{\"rope_scaling\":null," + v5 + "}").c_str()) && c.rope.factor == 8 && c.warnings.empty(),
          "null beside it");
    CHECK(good(("{\"rope_scaling\":{}," + v5 + "}").c_str()) && c.rope.factor == 8 && c.warnings.empty(),
          "empty beside it");
    CHECK(good(("{" + v5 + "}").c_str()) && c.rope.factor == 32 && c.warnings.size() == 1 &&
              text_has(c.warnings[0], "rope_scaling and rope_parameters disagree; rope_scaling is used"),
          "both, different");
    CHECK(good(("{\"rope_scaling\":{\"type\":\"llama3\"," + l3 + "}," + v5 + "}").c_str()) && c.rope.factor == 8 &&
              c.warnings.empty(),
          "both, the same, with the old selector");
    CHECK(good(("{\"rope_scaling\":{\"rope_type\":\"llama3\",\"rope_theta\":10000," + l3 + "}}").c_str()) &&
              c.rope_theta == 10000 && c.warnings.size() == 1 &&
              text_has(c.warnings[0], "rope_theta and rope_scaling.rope_theta"),
          "rope_theta inside wins");
    CHECK(good("{\"rope_scaling\":{\"type\":\"linear\",\"factor\":2.5}}") && c.rope.kind == RopeScaling::LINEAR &&
              c.rope.factor == 2.5,
          "linear");
    CHECK(good("{\"rope_scaling\":{\"rope_type\":\"default\"}}") && c.rope.kind == RopeScaling::NONE, "default");
    CHECK(good("{\"rope_scaling\":{\"factor\":4}}") && c.rope.kind == RopeScaling::NONE, "no type: default");
    CHECK(good("{\"rope_scaling\":{\"rope_type\":\"linear\",\"type\":\"yarn\",\"factor\":1}}") &&
              c.rope.kind == RopeScaling::LINEAR,
          "rope_type before type");
    CHECK(good("{\"original_max_position_embeddings\":4096}") && c.rope.original_max_positions == 4096,
          "the top level wins");
    CHECK(good("{\"rope_scaling\":{\"rope_type\":\"default\",\"partial_rotary_factor\":1.0}}"), "a whole rotation");
}

static void config_refusals() {
    const char* const scaling = "config.json: key rope_scaling.";
    const struct {
        const char *changes, *what, *hint;
    } cases[] = {
        {"{\"model_type\":\"qwen2\"}", "config.json: architecture qwen2 not supported; supported: llama (and mistral",
         ""},
        {"{\"model_type\":\"gemma\"}", "architecture gemma not supported", ""},
        {"{\"model_type\":\"phi3\"}", "architecture phi3 not supported", ""},
        {"{\"model_type\":\"llama4\"}", "architecture llama4 not supported", ""},
        {"{\"model_type\":\"absent\",\"architectures\":[\"Qwen3ForCausalLM\"]}",
         "architecture Qwen3ForCausalLM not supported", ""},
        {"{\"model_type\":\"absent\",\"architectures\":[]}", "neither model_type nor architectures", ""},
        {"{\"model_type\":\"a\\u001b[2J\"}", "architecture a\\x1B[2J not supported", ""},
        {"{\"hidden_size\":\"absent\"}", "key hidden_size: cannot be used (found nothing, need a positive integer)",
         ""},
        {"{\"hidden_size\":0}", "key hidden_size: cannot be used (found 0, need a positive integer)", ""},
        {"{\"hidden_size\":-1}", "key hidden_size: cannot be used (found -1, need a positive integer)", ""},
        {"{\"hidden_size\":\"4096\"}", "key hidden_size: cannot be used (found \"4096\", need a positive integer)", ""},
        {"{\"hidden_size\":4096.5}", "key hidden_size: cannot be used (found 4096.5, need a positive integer)", ""},
        {"{\"hidden_size\":true}", "key hidden_size: cannot be used (found true, need", ""},
        {"{\"hidden_size\":18446744073709551615}", "key hidden_size: cannot be used (found 18446744073709551615, need",
         ""},
        {"{\"hidden_size\":2147483648}", "key hidden_size: cannot be used (found 2147483648, need at most 4194304)",
         ""},
        {"{\"intermediate_size\":null}", "key intermediate_size: cannot be used (found nothing", ""},
        {"{\"num_hidden_layers\":[16]}", "key num_hidden_layers: cannot be used (found [16]", ""},
        {"{\"num_attention_heads\":\"absent\"}", "key num_attention_heads: cannot be used (found nothing", ""},
        {"{\"vocab_size\":\"absent\"}", "key vocab_size: cannot be used (found nothing", ""},
        {"{\"num_key_value_heads\":5}", "config.json: 32 query heads cannot share 5 kv heads", ""},
        {"{\"num_key_value_heads\":0}", "key num_key_value_heads: cannot be used (found 0", ""},
        {"{\"head_dim\":63}", "config.json: head_dim unsupported (found 63, need an even number up to 256)", ""},
        {"{\"head_dim\":258}", "head_dim unsupported (found 258", ""},
        {"{\"head_dim\":0}", "key head_dim: cannot be used (found 0", ""},
        {"{\"head_dim\":null,\"hidden_size\":2050}", "hidden_size 2050 is not divisible by 32 heads", ""},
        {"{\"hidden_act\":\"gelu\"}", "config.json: unsupported activation: hidden_act (found \"gelu\", need \"silu\")",
         ""},
        {"{\"attention_bias\":true}", "key attention_bias: cannot be used (found true, need false", ""},
        {"{\"mlp_bias\":true}", "key mlp_bias: cannot be used (found true, need false", ""},
        {"{\"mlp_bias\":1}", "key mlp_bias: cannot be used (found 1, need true or false)", ""},
        {"{\"tie_word_embeddings\":\"yes\"}",
         "key tie_word_embeddings: cannot be used (found \"yes\", need true or false)", ""},
        {"{\"rope_interleaved\":true}", "key rope_interleaved: cannot be used (found true", ""},
        {"{\"partial_rotary_factor\":0.5}", "key partial_rotary_factor: cannot be used (found 0.5, need 1)", ""},
        {"{\"rms_norm_eps\":0}", "key rms_norm_eps: cannot be used (found 0, need a small positive number)", ""},
        {"{\"rms_norm_eps\":\"1e-5\"}", "key rms_norm_eps: cannot be used (found \"1e-5\", need a number)", ""},
        {"{\"attention_dropout\":\"x\"}", "key attention_dropout: cannot be used", ""},
        {"{\"rope_theta\":0}", "key rope_theta: cannot be used (found 0, need a positive number)", ""},
        {"{\"rope_theta\":\"5e5\"}", "key rope_theta: cannot be used (found \"5e5\", need a number)", ""},
        {"{\"rope_scaling\":\"llama3\"}", "key rope_scaling: cannot be used (found \"llama3\", need an object or null)",
         ""},
        {"{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4}}", "config.json: RoPE scaling 'yarn' not supported", ""},
        {"{\"rope_scaling\":{\"rope_type\":\"dynamic\",\"factor\":4}}", "RoPE scaling 'dynamic' not supported", ""},
        {"{\"rope_scaling\":{\"rope_type\":\"longrope\"}}", "RoPE scaling 'longrope' not supported", ""},
        {"{\"rope_scaling\":{\"rope_type\":7}}", "RoPE scaling '7' not supported", ""},
        {"{\"rope_scaling\":{\"rope_type\":\"linear\"}}", "config.json: rope_scaling: missing key factor", ""},
        {"{\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":0.5}}",
         "rope_scaling.factor: cannot be used (found 0.5", ""},
        {"{\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":\"2\"}}",
         "rope_scaling.factor: cannot be used (found \"2\"", ""},
        {"{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"original_max_position_"
         "embeddings\":"
         "8192}}",
         "config.json: rope_scaling: missing key high_freq_factor", ""},
        {"{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4}}",
         "rope_scaling: missing key original_max_position_embeddings", ""},
        {"{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":4,"
         "\"original_max_position_embeddings\":8192}}",
         "(found 4 and 4, which would divide by zero)", ""},
        {"{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":1,"
         "\"original_max_position_embeddings\":8192}}",
         "high_freq_factor must be above low_freq_factor (found 1 and 4)", ""},
        {"{\"rope_scaling\":null,\"rope_parameters\":{\"full_attention\":{\"rope_theta\":1e4}}}",
         "rope_parameters: one setting for each kind of layer is not supported", ""},
        {"{\"rope_scaling\":{\"rope_type\":\"default\",\"partial_rotary_factor\":0.5}}", scaling, ""},
        {"{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4}}",
         "config.json: the checkpoint is pre-quantised with gptq; only bitsandbytes nf4 is supported",
         "use the 16-bit"},
        {"{\"quantization_config\":{\"quant_method\":\"awq\"}}", "pre-quantised with awq", "16-bit checkpoint"},
        {"{\"quantization_config\":{\"quant_method\":\"fbgemm_fp8\"}}", "pre-quantised with fbgemm_fp8", ""},
        {"{\"compression_config\":{\"quant_method\":\"compressed-tensors\"}}", "pre-quantised with compressed-tensors",
         ""},
        {"{\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"load_in_8bit\":true}}",
         "pre-quantised with bitsandbytes 8-bit", ""},
        {"{\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"load_in_4bit\":true}}",
         "pre-quantised with bitsandbytes fp4", ""},
        {"{\"quantization_config\":{\"load_in_4bit\":true,\"bnb_4bit_quant_type\":\"nf4\",\"bnb_4bit_quant_storage\":"
         "\"bfloat16\"}}",
         "pre-quantised with bitsandbytes nf4 stored as bfloat16", ""},
        {"{\"quantization_config\":{\"bits\":2}}", "pre-quantised with an unnamed method", ""},
        {"{\"quantization_config\":[]}", "key quantization_config: cannot be used (found [], need an object or null)",
         ""},
        {"{\"eos_token_id\":\"x\"}", "key eos_token_id: cannot be used (found \"x\", need an integer, a list", ""},
        {"{\"eos_token_id\":[1,null]}", "key eos_token_id: cannot be used (found [1,null]", ""},
        {"{\"model_type\":\"mistral\",\"sliding_window\":0}", "key sliding_window: cannot be used (found 0", ""},
    };
    for (const auto& k : cases) {
        LlamaConfig c;
        Error e = read_changed(c, k.changes);
        CHECK(e.code == 2 && text_has(e.what, k.what) && text_has(e.hint, k.hint), "%s: %s | %s", k.changes,
              e.what.c_str(), e.hint.c_str());
    }
}

static void config_directories() {
    std::string dir = test_directory();
    LlamaConfig c;
    Error e = llama_config_read(c, path_join(dir, "none"));
    CHECK(e.code == 2 && e.what == dir + "/none: no such model directory" &&
              e.hint == "give the folder that holds config.json",
          "%s", e.what.c_str());
    e = llama_config_read(c, dir);
    CHECK(text_has(e.what, "config.json missing (found: an empty directory)"), "%s", e.what.c_str());
    CHECK(!file_replace(path_join(dir, "tokenizer.json"), "{}") && !file_replace(path_join(dir, "a\nb"), ""), "write");
    e = llama_config_read(c, path_join(dir, "tokenizer.json"));
    CHECK(e.code == 2 && text_has(e.what, "tokenizer.json: is a file, not a model directory"), "%s", e.what.c_str());
    e = llama_config_read(c, dir);
    CHECK(e.code == 2 &&
              e.what == dir + ": not a Hugging Face checkpoint: config.json missing (found: a\\x0Ab, tokenizer.json)",
          "%s", e.what.c_str());
    e = read_text(c, "");
    CHECK(e.code == 2 && e.what == "config.json:1:1: empty (need a JSON value)", "%s", e.what.c_str());
    e = read_text(c, "{\n\"hidden_size\": 4");
    CHECK(e.code == 2 && e.what == "config.json:2:17: the file ends inside a JSON value", "%s", e.what.c_str());
    e = read_text(c, "[]");
    CHECK(e.code == 2 && e.what == "config.json: need an object (found an array)", "%s", e.what.c_str());
    e = read_text(c, LLAMA_1B, "{\"eos_token_id\":}");
    CHECK(e.code == 2 && text_has(e.what, "generation_config.json:1:17: not JSON"), "%s", e.what.c_str());
}

// Parameter counts follow from the shapes; the sums are the published ones.
static void config_shapes() {
    const struct {
        const char* name;
        uint64_t parameters;
    } cases[] = {
        {"1b", 1235814400}, {"3b", 3212749824}, {"8b", 8030261248}, {"70b", 70553706496}, {"405b", 405853388800}};
    for (const auto& k : cases) {
        LlamaConfig c;
        Error e = llama_config_shape(c, k.name);
        CHECK(!e, "%s", e.what.c_str());
        uint64_t q = uint64_t(c.NH) * c.HS, kv = uint64_t(c.NKV) * c.HS, C = c.C;
        uint64_t layer = C * (2 * q + 2 * kv) + 3 * C * c.F + 2 * C;
        uint64_t n = c.L * layer + C + uint64_t(c.V) * C * (c.tied ? 1 : 2);
        CHECK(n == k.parameters, "%s: %llu", k.name, (unsigned long long)n);
        CHECK(c.rope.kind == RopeScaling::LLAMA3 && c.rope_theta == 500000 && c.rms_eps == 1e-5, "%s", k.name);
        LlamaConfig again;
        e = read_text(again, c.text);
        CHECK(!e && again.C == c.C && again.rope.factor == c.rope.factor && again.tied == c.tied, "%s: its text",
              k.name);
    }
    LlamaConfig c;
    CHECK(!llama_config_shape(c, "125m") && c.C == 768 && c.L == 12 && c.NH == 12 && c.NKV == 4 && c.F == 2048 &&
              c.HS == 64 && c.V == 32000 && !c.tied && c.rope_theta == 10000 && c.rope.kind == RopeScaling::NONE,
          "125m");
    Error e = llama_config_shape(c, "7b");
    CHECK(e.code == 2 && e.what == "no such model shape (found 7b, need one of 125m, 1b, 3b, 8b, 70b, 405b)", "%s",
          e.what.c_str());
}

// Values computed in double from the formula; fp32 powers and divisions leave about 1e-6 relative.
static void config_inv_freq() {
    struct Value {
        int j;
        double want;
    };
    const struct {
        int HS;
        double factor;
        std::vector<Value> values;
    } cases[] = {
        {128,
         8,
         {{0, 1},
          {1, 0.814617234},
          {28, 0.00321144599},
          {29, 0.00216657076},
          {34, 0.000178507813},
          {35, 9.55621235e-05},
          {63, 3.06892599e-07}}},
        {64,
         32,
         {{1, 0.663601238},
          {14, 0.00321144599},
          {15, 0.00129054793},
          {17, 9.7082878e-05},
          {18, 1.94616382e-05},
          {31, 9.41830673e-08}}},
        {128, 32, {{29, 0.002118407}, {35, 2.38905309e-05}, {63, 7.67231497e-08}}},
    };
    for (const auto& k : cases) {
        LlamaConfig c;
        c.HS = k.HS;
        c.rope_theta = 500000;
        c.rope.kind = RopeScaling::LLAMA3;
        c.rope.factor = k.factor;
        std::vector<float> inv = llama_inv_freq(c);
        CHECK(inv.size() == size_t(k.HS) / 2, "size");
        for (const Value& v : k.values) {
            std::string what = "d=" + std::to_string(k.HS) + " j=" + std::to_string(v.j);
            CHECK_ERROR(what, std::fabs(inv[size_t(v.j)] - v.want) / v.want, 2e-6);
        }
    }
    // Bands kept, in the ramp, divided: 29, 6, 29 for d = 128 and 15, 3, 14 for d = 64.
    for (int HS : {128, 64}) {
        LlamaConfig c;
        c.HS = HS;
        c.rope_theta = 500000;
        std::vector<float> plain = llama_inv_freq(c);
        c.rope.kind = RopeScaling::LINEAR;
        c.rope.factor = 8;
        std::vector<float> divided = llama_inv_freq(c);
        c.rope.kind = RopeScaling::LLAMA3;
        std::vector<float> scaled = llama_inv_freq(c);
        int kept = 0, low = 0, ramp = 0;
        for (size_t j = 0; j < plain.size(); j++) {
            CHECK(divided[j] == plain[j] / 8, "linear");
            (scaled[j] == plain[j] ? kept : scaled[j] == divided[j] ? low : ramp)++;
        }
        CHECK(kept == (HS == 128 ? 29 : 15) && ramp == (HS == 128 ? 6 : 3), "d=%d: %d %d %d", HS, kept, ramp, low);
    }
}

extern const Test config_tests[];
const Test config_tests[] = {
    {"config_reads", config_reads},       {"config_spellings", config_spellings},
    {"config_refusals", config_refusals}, {"config_rope_spellings", config_rope_spellings},
    {"config_shapes", config_shapes},     {"config_directories", config_directories},
    {"config_inv_freq", config_inv_freq}, {nullptr, nullptr},
};
