// Loading a base and an adapter: what is refused, by name, and how much memory it takes.
#include <functional>

#include "dev/tests/fixture.h"
#include "io/file.h"

// A small valid model in a fresh directory; `change` alters its tensors or config.json before it is written.
struct SmallModel {
    std::string config =
        R"({"model_type":"llama","architectures":["LlamaForCausalLM"],"vocab_size":20,"hidden_size":16,"intermediate_size":24,)"
        R"("num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,"hidden_act":"silu",)"
        R"("max_position_embeddings":64,"rms_norm_eps":1e-5,"rope_theta":10000.0,"tie_word_embeddings":false})";
    std::vector<std::vector<float>> data;
    std::vector<TensorOut> tensors;

    void add(const std::string& name, std::vector<uint64_t> shape) {
        size_t n = 1;
        for (uint64_t s : shape) {
            n *= s;
        }
        std::vector<float> values(n);
        for (size_t i = 0; i < n; i++) {
            values[i] = float(random_uniform(1, STREAM_WEIGHTS, tensors.size(), i) - 0.5);
        }
        data.push_back(std::move(values));
        tensors.push_back({name, "F32", std::move(shape), nullptr});
    }
    SmallModel() {
        add("model.embed_tokens.weight", {20, 16});
        add("lm_head.weight", {20, 16});
        add("model.norm.weight", {16});
        const std::string l = "model.layers.0.";
        add(l + "input_layernorm.weight", {16});
        add(l + "post_attention_layernorm.weight", {16});
        add(l + "self_attn.q_proj.weight", {16, 16});
        add(l + "self_attn.k_proj.weight", {8, 16});
        add(l + "self_attn.v_proj.weight", {8, 16});
        add(l + "self_attn.o_proj.weight", {16, 16});
        add(l + "mlp.gate_proj.weight", {24, 16});
        add(l + "mlp.up_proj.weight", {24, 16});
        add(l + "mlp.down_proj.weight", {16, 24});
    }
    size_t at(const std::string& name) const {
        for (size_t i = 0; i < tensors.size(); i++) {
            if (tensors[i].name == name) {
                return i;
            }
        }
        return 0;
    }
    void remove(const std::string& name) {
        size_t i = at(name);
        tensors.erase(tensors.begin() + i);
        data.erase(data.begin() + i);
    }
    std::string write() {
        std::string dir = test_directory();
        for (size_t i = 0; i < tensors.size(); i++) {
            tensors[i].data = data[i].data();
        }
        Error e = safetensors_write(dir + "/model.safetensors", tensors);
        e = e ? e : file_replace(dir + "/config.json", config);
        CHECK(!e, "%s", e.what.c_str());
        return dir;
    }
};

// Loads and returns the error; warnings are joined into *said.
static Error load(const std::string& dir, const BaseOptions& base, std::string* said = nullptr) {
    Llama<Cpu<float>> m;
    device_open(m.dev, 1);
    std::string hash;
    std::vector<std::string> warnings;
    Error e = llama_config_read(m.c, dir);
    e = e ? e : llama_load(m, &hash, warnings, dir, base);
    CHECK(e || (m.w.head.data == m.w.embed.data) == m.c.tied, "tied %d, but the head is %s", m.c.tied,
          m.c.tied ? "a matrix of its own" : "the embedding");
    for (const std::string& w : warnings) {
        if (said != nullptr) {
            *said += w + "\n";
        }
    }
    llama_free(m);
    return e;
}

static void refused(const std::function<void(SmallModel&)>& change, const std::string& text) {
    for (bool nf4 : {true, false}) {
        SmallModel model;
        change(model);
        Error e = load(model.write(), {nf4, true});
        CHECK(e.code == 2 && text_has(e.what, text), "got '%s' (code %d), need '%s'", e.what.c_str(), e.code,
              text.c_str());
    }
}

static void bad_checkpoints_are_named() {
    refused([](SmallModel& s) { s.remove("lm_head.weight"); },
            "lm_head.weight is missing (config.json says tie_word_embeddings is false)");
    refused([](SmallModel& s) { s.remove("model.layers.0.mlp.up_proj.weight"); },
            "model.layers.0.mlp.up_proj.weight is missing");
    refused(
        [](SmallModel& s) {
            s.remove("model.layers.0.mlp.up_proj.weight");
            s.remove("model.norm.weight");
        },
        "and 1 more");
    refused([](SmallModel& s) { s.add("model.layers.0.self_attn.q_proj.bias", {16}); },
            "unexpected tensor model.layers.0.self_attn.q_proj.bias");
    refused([](SmallModel& s) { s.add("model.layers.1.input_layernorm.weight", {16}); },
            "unexpected tensor model.layers.1");
    refused([](SmallModel& s) { s.add("model.layers.0.self_attn.q_norm.weight", {8}); }, "q_norm");
    refused(
        [](SmallModel& s) {
            s.tensors[s.at("model.layers.0.mlp.down_proj.weight")].shape = {24, 16};
        },
        "model.layers.0.mlp.down_proj.weight: expected shape [16,24], found [24,16]");
    refused([](SmallModel& s) { s.tensors[0].shape = {16, 20}; }, "expected shape [20,16], found [16,20]");
    refused([](SmallModel& s) { s.tensors[s.at("model.layers.0.self_attn.k_proj.weight")].dtype = "I32"; },
            "dtype I32");
    refused([](SmallModel& s) { s.data[s.at("model.layers.0.self_attn.v_proj.weight")][37] = NAN; },
            "model.layers.0.self_attn.v_proj.weight has a non-finite value at index 37");
    refused([](SmallModel& s) { s.data[s.at("model.norm.weight")][3] = -INFINITY; },
            "model.norm.weight has a non-finite value at index 3");
    refused([](SmallModel& s) { s.data[0][319] = INFINITY; },
            "model.embed_tokens.weight has a non-finite value at index 319");
}

static void good_checkpoints_load() {
    SmallModel plain;
    Error e = load(plain.write(), {true, true});
    CHECK(!e, "%s", e.what.c_str());
    SmallModel old;  // tables that old exports carry
    old.add("model.layers.0.self_attn.rotary_emb.inv_freq", {4});
    e = load(old.write(), {false, true});
    CHECK(!e, "%s", e.what.c_str());
}

static void tied_head_is_ignored_with_a_warning() {
    for (bool same : {false, true}) {
        SmallModel tied;
        tied.config.replace(tied.config.find("\"tie_word_embeddings\":false"), 27, "\"tie_word_embeddings\":true");
        if (same) {
            tied.data[1] = tied.data[0];
        }
        std::string said;
        Error e = load(tied.write(), {true, true}, &said);
        CHECK(!e && text_has(said, "lm_head.weight is ignored") == !same, "same %d: '%s' '%s'", same, e.what.c_str(),
              said.c_str());
    }
}

// The transposed matrix gets a hint of its own.
static void transposed_is_guessed() {
    SmallModel s;
    s.tensors[s.at("model.layers.0.mlp.down_proj.weight")].shape = {24, 16};
    Error e = load(s.write(), {true, true});
    CHECK(text_has(e.hint, "transposed"), "%s", e.hint.c_str());
}

static void adapter_refusals() {
    const std::string good =
        R"({"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj","v_proj"],"bias":"none"})";
    const std::pair<const char*, const char*> cases[] = {
        {R"({"peft_type":"IA3","r":4})", "peft_type: need \"LORA\""},
        {R"({"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"],"use_dora":true})", "use_dora is set"},
        {R"({"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"],"modules_to_save":["lm_head"]})",
         "modules_to_save is set"},
        {R"({"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"],"bias":"all"})",
         "bias: need \"none\""},
        {R"({"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"],"some_new_thing":3})",
         "some_new_thing is set"},
        {R"({"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"],"rank_pattern":{"k_proj":2}})",
         "rank_pattern is set"},
        {R"({"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["wte"]})",
         "'wte' is not one of the seven linears"},
        {R"({"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":".*attn.*"})", "is not one of the seven linears"},
        {R"({"peft_type":"LORA","r":0,"lora_alpha":8,"target_modules":["q_proj"]})", "r: need a positive integer"},
        {R"({"peft_type":"LORA","r":4,"target_modules":["q_proj"]})", "lora_alpha: need a number"},
        {R"([1])", "need an object"},
    };
    for (const auto& c : cases) {
        std::string dir = test_directory();
        CHECK(!file_replace(dir + "/adapter_config.json", c.first), "cannot write");
        LoraConfig lora;
        Error e = adapter_config_read(lora, dir);
        CHECK(e.code == 2 && text_has(e.what, c.second), "got '%s', need '%s'", e.what.c_str(), c.second);
    }
    std::string dir = test_directory();
    CHECK(!file_replace(dir + "/adapter_config.json", good), "cannot write");
    LoraConfig lora;
    Error e = adapter_config_read(lora, dir);
    CHECK(!e && lora.r == 4 && lora.alpha == 8 && lora.target[Q_PROJ] && lora.target[V_PROJ] && !lora.target[K_PROJ],
          "a good configuration was misread: %s", e.what.c_str());
}

// An adapter whose tensors do not fit the model, by name.
static void adapter_tensors_are_checked() {
    const std::pair<const char*, std::vector<uint64_t>> cases[] = {
        {"found [4,15]", {4, 15}}, {"found [3,16]", {3, 16}}, {"is missing", {}}};
    for (const auto& c : cases) {
        SmallModel s;
        std::string model = s.write(), dir = test_directory();
        std::vector<float> zeros(1000, 0.0f);
        std::vector<TensorOut> tensors = {
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", "F32", {16, 4}, zeros.data()}};
        if (!c.second.empty()) {
            tensors.push_back(
                {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "F32", c.second, zeros.data()});
        }
        Error e = safetensors_write(dir + "/adapter_model.safetensors", tensors);
        Llama<Cpu<float>> m;
        device_open(m.dev, 1);
        std::string hash;
        std::vector<std::string> warnings;
        e = e ? e : llama_config_read(m.c, model);
        e = e ? e : llama_load(m, &hash, warnings, model, {true, true});
        CHECK(!e, "%s", e.what.c_str());
        LoraConfig lora;
        lora.r = 4;
        std::fill(lora.target + 1, lora.target + MODULES, false);
        llama_adapter_create(m, lora);
        e = adapter_load(m, dir);
        CHECK(e.code == 2 && text_has(e.what, "q_proj.lora_A.weight") && text_has(e.what, c.first),
              "got '%s', need '%s'", e.what.c_str(), c.first);
        llama_free(m);
    }
}

extern const Test load_tests[];
const Test load_tests[] = {
    {"bad_checkpoints_are_named", bad_checkpoints_are_named},
    {"good_checkpoints_load", good_checkpoints_load},
    {"tied_head_is_ignored_with_a_warning", tied_head_is_ignored_with_a_warning},
    {"transposed_is_guessed", transposed_is_guessed},
    {"adapter_refusals", adapter_refusals},
    {"adapter_tensors_are_checked", adapter_tensors_are_checked},
    {nullptr, nullptr},
};
