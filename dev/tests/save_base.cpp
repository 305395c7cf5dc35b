// The packed base as a bitsandbytes directory: what is written is what is read back, whatever is refused leaves
// nothing.
#include "llama_save_base.h"

#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmath>
#include <cstring>

#include "dev/tests/files.h"
#include "dev/tests/fixture.h"

static const char* const config_text =
    R"({"model_type":"llama","architectures":["LlamaForCausalLM"],"vocab_size":20,"hidden_size":16,)"
    R"("intermediate_size":24,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,)"
    R"("hidden_act":"silu","eos_token_id":[3,4],"max_position_embeddings":64,"rms_norm_eps":1e-05,)"
    R"("rope_theta":500000.0,"tie_word_embeddings":false})";

// A place with a model's directory `model` in it, which holds config.json alone.
static std::string place() {
    std::string dir = test_directory();
    Error e = dir_create(dir + "/model");
    CHECK(!e, "%s", e.what.c_str());
    write_text(dir + "/model/config.json", config_text);
    return dir;
}

static HostTensor plain_tensor(const std::string& name, size_t n, uint32_t seed) {
    HostTensor t{name, "BF16", {n}, std::string(n * 2, '\0')};
    for (size_t i = 0; i < t.bytes.size(); i++) {
        t.bytes[i] = char(random_uniform(seed, STREAM_WEIGHTS, 0, i) * 256);
    }
    return t;
}

// The same tensor, whatever the order.
static bool stored(const Safetensors& st, const HostTensor& t) {
    const Tensor* found = safetensors_find(st, t.name);
    if (!found || found->dtype != t.dtype || found->shape != t.shape || found->bytes != t.bytes.size()) {
        return false;
    }
    std::string bytes(t.bytes.size(), '\0');
    return !safetensors_read(st, *found, &bytes[0], 0, bytes.size()) && bytes == t.bytes;
}

static Error write_units(const std::string& dir, const std::string& model, uint64_t shard_bytes,
                         const std::vector<std::vector<HostTensor>>& units) {
    BaseWriter w;
    w.shard_bytes = shard_bytes;
    Error e = base_writer_open(w, dir, model, 0);
    for (size_t i = 0; i < units.size() && !e; i++) {
        e = base_writer_add(w, units[i]);
    }
    return e ? e : base_writer_close(w);
}

// ---------------------------------------------------------------------------------------------------------------------

// A random matrix and its packed form.
struct Packed {
    Matrix w;
    std::vector<uint8_t> codes, absmax8;
    std::vector<float> absmax, absmax2, map8 = std::vector<float>(256);

    Packed(int rows, int cols, bool nested, uint32_t seed) {
        w.store = Store::NF4;
        w.rows = rows;
        w.cols = cols;
        std::vector<float> x(w.elements());
        for (size_t i = 0; i < x.size(); i++) {
            x[i] = float(random_uniform(seed, STREAM_WEIGHTS, 0, i) - 0.5);
        }
        codes.resize((w.elements() + 1) / 2);
        absmax.resize(w.blocks());
        nf4_quantize(codes.data(), absmax.data(), x.data(), x.size(), 1);
        w.codes = codes.data();
        if (!nested) {
            w.absmax32 = absmax.data();
            return;
        }
        absmax8.resize(w.blocks());
        absmax2.resize((w.blocks() + 255) / 256);
        nf4_double_quantize(absmax8.data(), absmax2.data(), &w.offset, absmax.data(), absmax.size());
        nf4_map8(map8.data());
        w.absmax8 = absmax8.data();
        w.absmax2 = absmax2.data();
        w.map8 = map8.data();
    }
};

template <class T>
static bool same_bytes(const Safetensors& st, const Tensor* t, const std::vector<T>& need) {
    std::vector<T> found(need.size());
    return t && t->bytes == need.size() * sizeof(T) && !safetensors_read(st, *t, found.data(), 0, t->bytes) &&
           memcmp(found.data(), need.data(), t->bytes) == 0;
}

// Blocks that straddle rows, short last blocks, an odd number of weights, two blocks of the second level.
static void save_base_round_trip() {
    const int shapes[][2] = {{5, 64}, {3, 96}, {7, 13}, {1, 1}, {40, 520}, {33, 1}};
    const char* const sources[][2] = {{"BF16", "bfloat16"}, {"F16", "float16"}, {"F32", "float32"}};
    for (bool nested : {true, false}) {
        std::string dir = place(), to = dir + "/base";
        std::vector<Packed> made;
        std::vector<HostTensor> unit;
        for (size_t i = 0; i < 6; i++) {
            made.emplace_back(shapes[i][0], shapes[i][1], nested, uint32_t(i));
        }
        for (size_t i = 0; i < made.size(); i++) {
            bnb_tensors(unit, "m" + std::to_string(i) + ".weight", made[i].w, sources[i % 3][0]);
        }
        Error e = write_units(to, dir + "/model", 1000000, {{plain_tensor("model.embed_tokens.weight", 320, 1)}, unit});
        CHECK(!e, "%s", e.what.c_str());
        Safetensors st;
        e = checkpoint_open(st, to);
        CHECK(!e && st.warnings.empty() && st.tensors.size() == 1 + made.size() * (nested ? 6 : 4), "%zu tensors, %s",
              st.tensors.size(), e.what.c_str());
        for (size_t i = 0; i < made.size(); i++) {
            const Packed& m = made[i];
            const std::string name = "m" + std::to_string(i) + ".weight";
            BnbQuantState q;
            e = bnb_quant_state_read(q, st, name);
            if (!CHECK(!e, "%s", e.what.c_str())) {
                continue;
            }
            CHECK(q.rows == uint64_t(m.w.rows) && q.cols == uint64_t(m.w.cols) && q.dtype == sources[i % 3][1] &&
                      q.nested() == nested && memcmp(&q.offset, &m.w.offset, 4) == 0,
                  "%s: settings", name.c_str());
            CHECK(q.codes->shape == (std::vector<uint64_t>{(m.w.elements() + 1) / 2, 1}), "%s: shape", name.c_str());
            CHECK(same_bytes(st, q.codes, m.codes), "%s: codes", name.c_str());
            CHECK(memcmp(q.quant_map, NF4_CODE, sizeof q.quant_map) == 0, "%s: table of codes", name.c_str());
            CHECK(nested ? same_bytes(st, q.absmax, m.absmax8) && same_bytes(st, q.nested_absmax, m.absmax2) &&
                               memcmp(q.nested_map, m.map8.data(), sizeof q.nested_map) == 0
                         : same_bytes(st, q.absmax, m.absmax),
                  "%s: absmax", name.c_str());
        }
        safetensors_close(st);
    }
}

// The texts are bitsandbytes 0.50's for these settings.
static void save_base_settings() {
    Packed flat(64, 4, false, 1), nested(128, 320, true, 2);
    nested.w.offset = 0.10155372321605682f;
    std::vector<HostTensor> out;
    bnb_tensors(out, "a", flat.w, "BF16");
    bnb_tensors(out, "b", nested.w, "F16");
    CHECK(out[3].name == "a.quant_state.bitsandbytes__nf4" && out[3].dtype == "U8" &&
              out[3].bytes == R"({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 4]})",
          "%s", out[3].bytes.c_str());
    CHECK(out[9].shape == std::vector<uint64_t>{out[9].bytes.size()} &&
              out[9].bytes ==
                  R"({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [128, 320], )"
                  R"("nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.10155372321605682})",
          "%s", out[9].bytes.c_str());
    // The offset is the same float once its digits have been read as a double.
    uint32_t bits = 12345;
    for (int i = 0; i < 3000; i++) {
        bits = bits * 1664525 + 1013904223;
        float read;
        memcpy(&nested.w.offset, &bits, 4);
        if (!std::isfinite(nested.w.offset)) {
            continue;
        }
        out.clear();
        bnb_tensors(out, "b", nested.w, "BF16");
        const std::string& text = out.back().bytes;
        read = float(strtod(text.c_str() + text.rfind(' '), nullptr));
        CHECK(memcmp(&read, &nested.w.offset, 4) == 0, "%a became %a in %s", nested.w.offset, read, text.c_str());
    }
}

// ---------------------------------------------------------------------------------------------------------------------

// Units of 100, 40, 50, 300, 60 and 70 bytes, at most 200 in a shard: a unit is never split, one that is larger has a
// shard of its own.
static void save_base_shards() {
    const size_t sizes[] = {50, 20, 25, 150, 30, 35};
    std::vector<std::vector<HostTensor>> units;
    for (size_t i = 0; i < 6; i++) {
        std::string name = i == 0 ? "model.embed_tokens.weight" : "unit" + std::to_string(i);
        units.push_back({plain_tensor(name, sizes[i] - 10, uint32_t(i)), plain_tensor(name + ".rest", 10, 77)});
    }
    std::string dir = place(), to = dir + "/base";
    Error e = write_units(to, dir + "/model", 200, units);
    CHECK(!e, "%s", e.what.c_str());
    CHECK(listing(to) ==
              "config.json model-00001-of-00003.safetensors model-00002-of-00003.safetensors "
              "model-00003-of-00003.safetensors model.safetensors.index.json",
          "%s", listing(to).c_str());
    CHECK(listing(dir) == "base model", "%s", listing(dir).c_str());
    Safetensors st;
    e = checkpoint_open(st, to);  // compares index and shards; a wrong total is a warning
    CHECK(!e && st.warnings.empty(), "%s", e ? e.what.c_str() : st.warnings[0].c_str());
    const int shard_of[] = {0, 0, 0, 1, 2, 2};
    for (size_t i = 0; i < 6; i++) {
        for (const HostTensor& t : units[i]) {
            const Tensor* found = safetensors_find(st, t.name);
            CHECK(stored(st, t) && found->file == shard_of[i], "%s: in %d", t.name.c_str(), found ? found->file : -1);
        }
    }
    safetensors_close(st);
    CHECK(text_has(file_text(to + "/model.safetensors.index.json"), "\"total_size\": 620\n"), "total_size");

    e = write_units(dir + "/many", dir + "/model", 1, units);
    e = e ? e : checkpoint_open(st, dir + "/many");
    CHECK(!e && st.files.size() == 6 && path_exists(dir + "/many/model-00006-of-00006.safetensors"), "%s, %zu shards",
          e.what.c_str(), st.files.size());
    safetensors_close(st);
    e = write_units(dir + "/one", dir + "/model", 620, units);
    CHECK(!e && listing(dir + "/one") == "config.json model.safetensors", "%s %s", e.what.c_str(),
          listing(dir + "/one").c_str());
    e = checkpoint_open(st, dir + "/one");
    CHECK(!e && st.warnings.empty() && st.tensors.size() == 12, "%s", e.what.c_str());
    safetensors_close(st);
}

static std::string quantization(const std::string& dtype, bool nested) {
    return std::string(R"({"_load_in_4bit":true,"_load_in_8bit":false,"bnb_4bit_compute_dtype":")") + dtype +
           R"(","bnb_4bit_quant_storage":"uint8","bnb_4bit_quant_type":"nf4","bnb_4bit_use_double_quant":)" +
           (nested ? "true" : "false") +
           R"(,"llm_int8_enable_fp32_cpu_offload":false,"llm_int8_has_fp16_weight":false,)"
           R"("llm_int8_skip_modules":null,"llm_int8_threshold":6.0,"load_in_4bit":true,"load_in_8bit":false,)"
           R"("quant_method":"bitsandbytes"})";
}

// The keys are those that transformers 5.23 writes; all others are the model's own.
static void save_base_config() {
    const struct {
        const char *more, *dtype;
        bool added;
    } cases[] = {{"", "bfloat16", true},
                 {R"("dtype":"float16",)", "float16", false},
                 {R"("torch_dtype":"float32",)", "float32", false},
                 {R"("dtype":null,"torch_dtype":"float32",)", "float32", false}};
    for (const auto& c : cases) {
        for (bool nested : {true, false}) {
            std::string dir = place(), to = dir + "/base", text = config_text;
            text.insert(1, c.more);
            write_text(dir + "/model/config.json", text);
            Packed m(3, 96, nested, 3);
            std::vector<HostTensor> unit;
            bnb_tensors(unit, "x.weight", m.w, "BF16");
            Error e = write_units(to, dir + "/model", 1000, {{plain_tensor("model.embed_tokens.weight", 4, 1)}, unit});
            CHECK(!e, "%s", e.what.c_str());
            Json before, after, need;
            const std::string q = quantization(c.dtype, nested);
            e = json_parse(before, text.data(), text.size(), "before");
            e = e ? e : json_read_file(after, to + "/config.json");
            e = e ? e : json_parse(need, q.data(), q.size(), "need");
            CHECK(!e, "%s", e.what.c_str());
            before.set("quantization_config", need);
            if (c.added) {
                before.set("torch_dtype", c.dtype);
            }
            CHECK(json_write(after, 0, true) == json_write(before, 0, true), "%s", json_write(after).c_str());
            LlamaConfig config;
            e = llama_config_read(config, to);
            CHECK(!e && config.bnb_nf4 && config.dtype == c.dtype && config.rope_theta == 500000 &&
                      config.rms_eps == 1e-5 && config.eos_ids == (std::vector<int>{3, 4}),
                  "%s", e.what.c_str());
        }
    }
}

// What a tokenizer is made of comes along, links as files; nothing happens to the model's directory.
static void save_base_copies() {
    std::string dir = place(), to = dir + "/base", model = dir + "/model";
    const char* const names[] = {"chat_template.jinja", "generation_config.json", "special_tokens_map.json",
                                 "tokenizer.json",      "tokenizer.model",        "tokenizer_config.json"};
    CHECK(!dir_create(dir + "/blobs"), "create");
    for (size_t i = 0; i < 6; i++) {
        std::string bytes = "{\"" + std::string(names[i]) + "\": \"\xC3\xA9\"}\r\n" + std::string(i, '\0');
        if (i % 2 == 0) {
            write_text(model + "/" + names[i], bytes);
            continue;
        }
        write_text(dir + "/blobs/" + std::to_string(i), bytes);
        CHECK(symlink(("../blobs/" + std::to_string(i)).c_str(), (model + "/" + names[i]).c_str()) == 0, "symlink");
    }
    write_text(dir + "/blobs/config", config_text);
    CHECK(unlink((model + "/config.json").c_str()) == 0 &&
              symlink("../blobs/config", (model + "/config.json").c_str()) == 0,
          "symlink");
    write_text(model + "/README.md", "not copied");
    std::string before = listing(model) + listing(dir + "/blobs");
    Error e = write_units(to, model, 1000, {{plain_tensor("model.embed_tokens.weight", 4, 1)}});
    CHECK(!e, "%s", e.what.c_str());
    CHECK(listing(to) ==
              "chat_template.jinja config.json generation_config.json model.safetensors special_tokens_map.json "
              "tokenizer.json tokenizer.model tokenizer_config.json",
          "%s", listing(to).c_str());
    for (const char* name : names) {
        std::string path = to + "/" + name;
        char target[16];
        CHECK(file_text(path) == file_text(model + "/" + name) && readlink(path.c_str(), target, sizeof target) < 0,
              "%s", name);
    }
    CHECK(listing(model) + listing(dir + "/blobs") == before && file_text(model + "/config.json") == config_text &&
              file_text(dir + "/blobs/config") == config_text,
          "the model's directory changed");
}

// ---------------------------------------------------------------------------------------------------------------------

static void refused(const std::string& dir, const std::string& to, const std::string& text, int code = 2,
                    uint64_t bytes = 0) {
    const std::string before = listing(dir);
    BaseWriter w;
    Error e = base_writer_open(w, to, dir + "/model", bytes);
    CHECK(e.code == code && text_has(e.what, text) && !e.hint.empty(), "%s: got '%s' (code %d), need '%s'", to.c_str(),
          e.what.c_str(), e.code, text.c_str());
    CHECK(listing(dir) == before, "%s: %s became %s", to.c_str(), before.c_str(), listing(dir).c_str());
    base_writer_abandon(w);  // does nothing
}

static void save_base_refusals() {
    std::string dir = place();
    CHECK(!dir_create(dir + "/full") && !dir_create(dir + "/mine"), "create");
    write_text(dir + "/full/a b", "precious");
    write_text(dir + "/file", "precious");
    CHECK(symlink("model", (dir + "/link").c_str()) == 0 && symlink("nowhere", (dir + "/dangling").c_str()) == 0 &&
              symlink("full", (dir + "/.new.save-base").c_str()) == 0,
          "symlink");
    refused(dir, dir + "/full", "/full: is not empty (found a b)");
    refused(dir, dir + "/full/", "is not empty");
    refused(dir, dir + "/file", "/file: is not a directory");
    refused(dir, dir + "/dangling", "/dangling: is not a directory");
    refused(dir, dir + "/model", "/model: is the model's own directory");
    refused(dir, dir + "/link", "/link: is the model's own directory");
    refused(dir, dir + "/full/../model/", "is the model's own directory");
    refused(dir, ".", "is the directory in which the program runs");
    refused(dir, "", "'' is not the name of a directory");
    refused(dir, dir + "/new/..", "is not the name of a directory");
    refused(dir, dir + "/file/x", "/file");
    refused(dir, "/proc/x", "/proc");
    refused(dir, dir + "/new", "/.new.save-base: is in the way");
    refused(dir, dir + "/much", "too little disk space for the base", 1, UINT64_MAX);
    CHECK(file_text(dir + "/full/a b") == "precious" && file_text(dir + "/file") == "precious",
          "what was there changed");

    BaseWriter first;
    Error e = base_writer_open(first, dir + "/mine", dir + "/model", 0);
    CHECK(!e && !path_exists(dir + "/mine"), "an empty directory is taken away: %s", e.what.c_str());
    refused(dir, dir + "/mine", "in use by another run (process " + std::to_string(getpid()));
    e = base_writer_add(first, {plain_tensor("model.embed_tokens.weight", 4, 1)});
    e = e ? e : base_writer_close(first);
    CHECK(!e && listing(dir + "/mine") == "config.json model.safetensors", "%s", e.what.c_str());
}

// An empty directory by other names; what a killed process left is replaced.
static void save_base_places() {
    std::string dir = place();
    CHECK(!dir_create(dir + "/real") && !dir_create(dir + "/.slash.save-base/deep"), "create");
    write_text(dir + "/.slash.save-base/model-00001-of-00000.safetensors", "half");
    CHECK(symlink("real", (dir + "/link").c_str()) == 0, "symlink");
    for (const char* name : {"link", "slash//", "deep/er/base"}) {
        std::string to = dir + "/" + name;
        Error e = write_units(to, dir + "/model", 1000, {{plain_tensor("model.embed_tokens.weight", 4, 1)}});
        CHECK(!e && listing(to) == "config.json model.safetensors", "%s: %s", name, e.what.c_str());
    }
    CHECK(listing(dir) == "deep link model real slash" && listing(dir + "/deep/er") == "base" &&
              listing(dir + "/real") == "config.json model.safetensors",
          "%s", listing(dir).c_str());
}

// Every way to fail after the start: a full disk (here: a limit on the file's size), a model without config.json, a
// target that has been filled meanwhile, and the caller's own failure.
static void save_base_failures() {
    std::string dir = place(), to = dir + "/base", model = dir + "/model";
    std::vector<HostTensor> embed = {plain_tensor("model.embed_tokens.weight", 5000, 1)};
    struct rlimit before, small;
    CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0, "getrlimit");
    auto old = signal(SIGXFSZ, SIG_IGN);
    small = before;
    small.rlim_cur = 4096;
    for (bool at_close : {false, true}) {
        BaseWriter w;
        w.shard_bytes = at_close ? 1000000 : 1;
        Error e = base_writer_open(w, to, model, 0);
        e = e ? e : base_writer_add(w, embed);
        CHECK(!e, "%s", e.what.c_str());
        CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0, "setrlimit");
        e = at_close ? base_writer_close(w) : base_writer_add(w, {plain_tensor("x", 1, 1)});
        CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0, "setrlimit");
        CHECK(
            e.code == 1 && text_has(e.what, "cannot write: File too large") && text_has(e.hint, "on a disk with room"),
            "'%s' '%s' (code %d)", e.what.c_str(), e.hint.c_str(), e.code);
        e = base_writer_close(w);  // an error that was passed over
        CHECK(e.code == 1 && text_has(e.what, "given up after an error") && listing(dir) == "model",
              "'%s' (code %d), %s", e.what.c_str(), e.code, listing(dir).c_str());
    }
    signal(SIGXFSZ, old);

    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0, "getrlimit");
    small = before;
    small.rlim_cur = 0;
    CHECK(setrlimit(RLIMIT_NOFILE, &small) == 0, "setrlimit");
    Error e = write_units(to, model, 1, {embed});
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0, "setrlimit");
    CHECK(e.code == 1 && text_has(e.what, "Too many open files") && !e.hint.empty() && listing(dir) == "model",
          "'%s' (code %d), %s", e.what.c_str(), e.code, listing(dir).c_str());

    BaseWriter w;
    w.shard_bytes = 1;
    e = base_writer_open(w, to, model, 0);
    e = e ? e : base_writer_add(w, embed);
    e = e ? e : base_writer_add(w, embed);
    CHECK(!e && !path_exists(to) && listing(dir) == ".base.save-base model", "%s", listing(dir).c_str());
    base_writer_abandon(w);
    CHECK(listing(dir) == "model", "%s", listing(dir).c_str());

    e = base_writer_open(w, to, model, 0);  // nothing of the first use is left in it
    CHECK(!e && w.shards.empty() && w.total_bytes == 0 && !dir_create(to), "%s", e.what.c_str());
    write_text(to + "/other", "precious");
    e = base_writer_add(w, embed);
    e = e ? e : base_writer_close(w);
    CHECK(e.code == 1 && text_has(e.what, "cannot rename") && file_text(to + "/other") == "precious" &&
              listing(dir) == "base model",
          "'%s' (code %d), %s", e.what.c_str(), e.code, listing(dir).c_str());

    CHECK(unlink((model + "/config.json").c_str()) == 0, "unlink");
    e = write_units(dir + "/new", model, 1000, {embed});
    CHECK(e.code == 2 && text_has(e.what, "model/config.json: cannot open") && listing(dir) == "base model",
          "'%s' (code %d), %s", e.what.c_str(), e.code, listing(dir).c_str());
}

// ---------------------------------------------------------------------------------------------------------------------

static bool same_tensors(const std::vector<HostTensor>& a, const std::vector<HostTensor>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const HostTensor& x, const HostTensor& y) {
        return x.name == y.name && x.dtype == y.dtype && x.shape == y.shape && x.bytes == y.bytes;
    });
}

static void save_base_pack() {
    std::vector<HostTensor> tensors = {{"a", "F32", {}, std::string(4, '\0')},
                                       plain_tensor("model.norm.weight", 7, 1),
                                       {"empty", "U8", {0, 3}, ""},
                                       {std::string("n\0l", 3), "", {1, 2, 3}, "\xFF"}};
    std::string text = host_tensors_pack(tensors);
    std::vector<HostTensor> out(2);
    CHECK(host_tensors_unpack(out, text) && same_tensors(out, tensors), "round trip");
    CHECK(host_tensors_unpack(out, host_tensors_pack({})) && out.empty(), "no tensors");
    for (size_t n = 0; n < text.size(); n++) {
        CHECK(!host_tensors_unpack(out, text.substr(0, n)) && out.empty(), "cut after %zu bytes", n);
    }
    CHECK(!host_tensors_unpack(out, text + '\0'), "a byte too many");
    // Counts and lengths beyond the text: tensors, the first name, its dtype, its dimensions, its bytes.
    for (size_t at : {0, 8, 17, 28, 36}) {
        for (uint64_t wrong : {UINT64_MAX, UINT64_MAX / 8 + 1, uint64_t(1) << 40}) {
            std::string damaged = text;
            memcpy(&damaged[at], &wrong, 8);
            CHECK(!host_tensors_unpack(out, damaged) && out.empty(), "%llx at %zu", (unsigned long long)wrong, at);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// whole models

// Hands the weights of a loaded model to a writer, unit by unit.
struct SaveWeights {
    BaseWriter& w;
    const Safetensors& source;
    std::vector<HostTensor> unit;
    Error error;

    void next_unit(const std::string& name) {
        const bool first = text_has(name, "input_layernorm") || name == "model.norm.weight";
        if (first && !error) {
            error = base_writer_add(w, std::move(unit));
            unit.clear();
        }
    }
    void copy(const std::string& name) {
        const Tensor* t = safetensors_find(source, name);
        HostTensor h{name, t->dtype, t->shape, std::string(t->bytes, '\0')};
        Error e = safetensors_read(source, *t, &h.bytes[0], 0, t->bytes);
        CHECK(!e, "%s", e.what.c_str());
        unit.push_back(std::move(h));
    }
    void vector(const std::string& name, float*&, int) {
        next_unit(name);
        copy(name);
    }
    void matrix(const std::string& name, Matrix& m, int, int, bool) {
        if (m.store == Store::NF4) {
            bnb_tensors(unit, name, m, safetensors_find(source, name)->dtype);
        } else {
            copy(name);
        }
    }
};

struct CollectBytes {
    std::vector<std::string> parts;

    void add(const void* p, size_t bytes) { parts.emplace_back(static_cast<const char*>(p), bytes); }
    void vector(const std::string&, float*& p, int n) { add(p, n * sizeof(float)); }
    void matrix(const std::string&, Matrix& m, int, int, bool) {
        add(&m.store, sizeof m.store);
        if (m.store != Store::NF4) {
            return add(m.data, m.elements() * store_bytes(m.store));
        }
        add(m.codes, (m.elements() + 1) / 2);
        add(&m.offset, sizeof m.offset);
        if (m.absmax32) {
            return add(m.absmax32, m.blocks() * 4);
        }
        add(m.absmax8, m.blocks());
        add(m.absmax2, (m.blocks() + 255) / 256 * 4);
        add(m.map8, 256 * 4);
    }
};

static Error load(Llama<Cpu<float>>& m, const std::string& dir, bool double_quant) {
    device_open(m.dev, 1);
    std::string hash;
    std::vector<std::string> warnings;
    Error e = llama_config_read(m.c, dir);
    return e ? e : llama_load(m, &hash, warnings, dir, {true, double_quant});
}

// Quantised, saved and loaded again: the same bytes in memory.
static void save_base_models() {
    for (const char* name : {"gqa_llama3", "odd_width", "tied", "linear_rslora"}) {
        for (bool double_quant : {true, false}) {
            std::string source = source_path(std::string("dev/ref/") + name), to = test_directory() + "/base";
            Llama<Cpu<float>> m, again;
            Safetensors st;
            BaseWriter w;
            w.shard_bytes = 50000;
            Error e = load(m, source, double_quant);
            e = e ? e : checkpoint_open(st, source);
            e = e ? e : base_writer_open(w, to, source, 0);
            if (!CHECK(!e, "%s", e.what.c_str())) {
                continue;
            }
            SaveWeights save{w, st, {}, {}};
            each_weight(m.w, m.c, save);
            e = save.error ? save.error : base_writer_add(w, std::move(save.unit));
            e = e ? e : base_writer_close(w);
            e = e ? e : load(again, to, !double_quant);  // a bitsandbytes checkpoint is used as stored
            CHECK(!e && again.c.bnb_nf4, "%s: %s", name, e.what.c_str());
            CollectBytes first, second;
            each_weight(m.w, m.c, first);
            each_weight(again.w, again.c, second);
            CHECK(!e && first.parts == second.parts, "%s, double_quant %d: weights differ", name, double_quant);
            llama_free(m);
            llama_free(again);
            safetensors_close(st);
        }
    }
}

extern const Test save_base_tests[];
const Test save_base_tests[] = {
    {"save_base_round_trip", save_base_round_trip},
    {"save_base_settings", save_base_settings},
    {"save_base_shards", save_base_shards},
    {"save_base_config", save_base_config},
    {"save_base_copies", save_base_copies},
    {"save_base_refusals", save_base_refusals},
    {"save_base_places", save_base_places},
    {"save_base_failures", save_base_failures},
    {"save_base_pack", save_base_pack},
    {"save_base_models", save_base_models},
    {nullptr, nullptr},
};
