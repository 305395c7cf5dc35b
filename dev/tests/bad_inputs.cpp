// What a user sees who gives the program something wrong: whole runs, by exit status and words of the message. The
// numbers are those of dev/results/bad_inputs.md, which also names the tests of the other inputs.
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "dev/tests/program.h"
#include "io/json.h"

// Runs the program and holds exit status and output against what is expected; '|' separates parts of the message. What
// is refused as bad input leaves no output directory.
static void expect(int number, const std::string& arguments, int code, const std::string& parts,
                   const std::string& environment = "") {
    std::string out, dir = test_directory() + "/out";
    bool has_output = text_has(arguments, "-o ");
    int status = train(&out, arguments + (has_output ? "" : " -o " + dir), environment);
    CHECK(status == code, "%d: exit %d, need %d: %s\n%s", number, status, code, arguments.c_str(), out.c_str());
    CHECK(text_has(out, code == 0 ? "" : "error: "), "%d: no error: %s", number, out.c_str());
    for (size_t at = 0; at <= parts.size();) {
        size_t end = std::min(parts.find('|', at), parts.size());
        std::string part = parts.substr(at, end - at);
        CHECK(text_has(out, part), "%d: no `%s` in\n%s", number, part.c_str(), out.c_str());
        at = end + 1;
    }
    CHECK(code != 2 || has_output || !path_exists(dir), "%d: an output directory was left", number);
}

// ---------------------------------------------------------------------------------------------------------------------
// model directories

struct ModelFile {
    std::string name, bytes;
};
static const char ABSENT[] = "(no such file)";

static std::string tiny(const std::string& name) {
    char* path = realpath(source_path("dev/tiny_llama").c_str(), nullptr);
    std::string dir = path ? path : "";
    free(path);
    return path_join(dir, name);
}

// The default base with some files changed, added or (ABSENT) taken away.
static std::string model_with(const std::vector<ModelFile>& files) {
    std::string dir = test_directory();
    std::vector<std::string> names;
    Error e = dir_list(names, tiny(""));
    CHECK(!e, "%s", e.what.c_str());
    for (const std::string& name : names) {
        CHECK(symlink(tiny(name).c_str(), path_join(dir, name).c_str()) == 0, "symlink");
    }
    for (const ModelFile& f : files) {
        unlink(path_join(dir, f.name).c_str());
        if (f.bytes != ABSENT) {
            write_text(path_join(dir, f.name), f.bytes);
        }
    }
    return dir;
}

static Json parsed(const std::string& text) {
    Json value;
    Error e = json_parse(value, text.data(), text.size(), "test");
    CHECK(!e, "%s", e.what.c_str());
    return value;
}

static ModelFile config_with(const std::string& changes) {
    Json config = parsed(file_text(tiny("config.json"))), more = parsed(changes);
    for (size_t i = 0; i < more.keys.size(); i++) {
        config.set(more.keys[i], more.items[i]);
    }
    return {"config.json", json_write(config, 2)};
}

static std::string replaced(std::string text, const std::string& from, const std::string& to) {
    size_t at = text.find(from);
    if (CHECK(at != std::string::npos, "no `%s` to replace", from.c_str())) {
        text.replace(at, from.size(), to);
    }
    return text;
}

static std::string length_bytes(uint64_t n) {
    std::string s;
    for (int i = 0; i < 8; i++) {
        s += char(n >> 8 * i & 255);
    }
    return s;
}

// A safetensors file of this header and zeros.
static std::string tensors_file(const std::string& header, size_t zeros = 0) {
    return length_bytes(header.size()) + header + std::string(zeros, '\0');
}

// Header and data of the default base.
static void weights_read(std::string* header, std::string* data) {
    std::string bytes = file_text(tiny("model.safetensors"));
    uint64_t n = 0;
    for (size_t i = 0; i < 8; i++) {
        n |= uint64_t(uint8_t(bytes[i])) << 8 * i;
    }
    *header = bytes.substr(8, n);
    *data = bytes.substr(8 + n);
}

struct BadModel {
    int number;
    std::vector<ModelFile> files;
    const char* parts;
};

static void check_models(const std::vector<BadModel>& cases, int code) {
    std::string data = small_data(3);
    for (const BadModel& c : cases) {
        expect(c.number, "-i " + data + " -r 2 -n 1 --val none -m " + model_with(c.files), code, c.parts);
    }
}

static void models_config() {
    std::string data = small_data(3), config = file_text(tiny("config.json"));
    expect(1, "-i " + data + " -m " + test_directory() + "/none", 2, "no such model directory|holds config.json");
    expect(1, "-i " + data + " -m " + tiny("config.json"), 2, "is a file, not a model directory|holds config.json");
    const std::string llama3 = R"({"rope_type":"llama3","factor":8,"low_freq_factor":)",
                      positions = R"(,"original_max_position_embeddings":512})";
    check_models(
        {{2, {{"config.json", ABSENT}}, "config.json missing (found: |tokenizer.json|hint: "},
         {3, {{"config.json", ""}}, "config.json:1:1: empty (need a JSON value)"},
         {3, {{"config.json", config.substr(0, 100)}}, "config.json:7:3: the file ends inside a JSON value|hint: "},
         {4, {config_with(R"({"model_type":"qwen2"})")}, "architecture qwen2 not supported; supported: llama"},
         {5, {config_with(R"({"hidden_size":"192"})")}, "key hidden_size: |found \"192\", need a positive integer"},
         {6, {config_with(R"({"num_key_value_heads":4})")}, "6 query heads cannot share 4 kv heads"},
         {7, {config_with(R"({"head_dim":33})")}, "head_dim unsupported (found 33, need an even number"},
         {8, {config_with(R"({"rope_scaling":{"rope_type":"yarn","factor":2}})")}, "RoPE scaling 'yarn' not supported"},
         {9,
          {config_with("{\"rope_scaling\":" + llama3 + "1" + positions + "}")},
          "rope_scaling: missing key high_freq_factor"},
         {10,
          {config_with("{\"rope_scaling\":" + llama3 + "4,\"high_freq_factor\":4" + positions + "}")},
          "found 4 and 4, which would divide by zero"},
         {12, {config_with(R"({"hidden_act":"gelu"})")}, "unsupported activation: hidden_act (found \"gelu\""},
         {13,
          {config_with(R"({"tie_word_embeddings":false})")},
          "lm_head.weight is missing|tie_word_embeddings is fals"},
         {15,
          {config_with(R"({"quantization_config":{"quant_method":"gptq","bits":4}})")},
          "pre-quantised with gptq|use the 16-bit checkpoint"},
         {17,
          {config_with(R"({"model_type":"mistral","sliding_window":64})")},
          "attends to 64 tokens only|lower the length: -t 64"},
         {36, {config_with(R"({"vocab_size":3080})")}, "expected shape [3080,192], found [3072,192]"},
         {37, {config_with(R"({"num_hidden_layers":5})")}, "model.layers.4.|is missing|and 8 more"},
         {38, {config_with(R"({"num_hidden_layers":3})")}, "unexpected tensor model.layers.3."},
         {51, {config_with(R"({"vocab_size":3060})")}, "has no embedding row (the model has 3060)"}},
        2);
    check_models({{3, {{"config.json", "\xEF\xBB\xBF" + config}}, "1 steps in"},
                  {11,
                   {config_with(R"({"rope_scaling":{"rope_type":"linear","factor":2},)"
                                R"("rope_parameters":{"rope_type":"linear","factor":4}})")},
                   "warning: |rope_scaling and rope_parameters disagree; rope_scaling is used"}},
                 0);
}

static void models_weights() {
    std::string header, data;
    weights_read(&header, &data);
    const std::string whole = length_bytes(header.size()) + header + data, name = "model.safetensors";
    std::string infinite = data;
    infinite[10] = '\x80', infinite[11] = '\x7F';  // bf16, little-endian: +inf as the sixth value
    const std::string gate = R"("model.layers.0.mlp.gate_proj.weight":{"dtype":"BF16","shape":)";
    auto one = [](const std::string& inside, size_t zeros) { return tensors_file("{" + inside + "}", zeros); };
    const std::string a = R"("a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]})";
    check_models(
        {{16, {{name, ABSENT}, {"pytorch_model.bin", "x"}}, "only pytorch_model.bin is here|convert it to safetensors"},
         {24, {{name, "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n"}}, "Git LFS pointer|pull"},
         {25, {{name, "<!DOCTYPE html><html><body>404</body></html>"}}, "starts with '<'|download error page?|hint: "},
         {26, {{name, ""}}, "too short to be safetensors (found 0 bytes"},
         {26, {{name, "1234567"}}, "too short to be safetensors (found 7 bytes"},
         {27, {{name, length_bytes(1000) + "{}"}}, "header length 1000 exceeds the file|hint: "},
         {27, {{name, length_bytes(100000001) + "{}"}}, "header length 100000001 exceeds the limit|hint: "},
         {28, {{name, tensors_file("[]")}}, "header unreadable at byte 8: must be an object"},
         {28, {{name, tensors_file("{\"\xFF\":1}")}}, "header unreadable at byte 10: invalid UTF-8"},
         {29, {{name, whole.substr(0, whole.size() - 1000)}}, "header needs |download incomplete|again"},
         {30, {{name, whole + "junk"}}, "4 unexpected bytes after the last tensor"},
         {31,
          {{name, one(a + R"(,"b":{"dtype":"BF16","shape":[2],"data_offsets":[6,10]})", 10)}},
          "tensor b: offsets do not follow previous tensor (found 6, need 4)"},
         {32,
          {{name, one(R"("a":{"dtype":"BF16","shape":[3],"data_offsets":[0,4]})", 4)}},
          "tensor a: shape says 6 bytes, offsets say 4"},
         {33,
          {{name, one(R"("a":{"dtype":"BF16","shape":[4294967296,4294967296,2],"data_offsets":[0,4]})", 4)}},
          "tensor a: size overflows"},
         {34, {{name, one(a + "," + a, 4)}}, "duplicate key \"a\""},
         {35,
          {{name, length_bytes(header.size()) + replaced(header, R"("BF16")", R"("I16" )") + data}},
          "model.embed_tokens.weight|dtype I16"},
         {35,
          {{name, one(R"("a":{"dtype":"F128","shape":[1],"data_offsets":[0,16]})", 16)}},
          "tensor a: dtype not usable as weight (found \"F128\""},
         {39,
          {{name, length_bytes(header.size()) + header + infinite}},
          "embed_tokens.weight has a non-finite value at index 5"},
         {40,
          {{name, length_bytes(header.size()) + replaced(header, gate + "[512,192]", gate + "[192,512]") + data}},
          "expected shape [512,192], found [192,512]|transposed"}},
        2);
    // a head of zeros where config.json says tied; and rows of the control tokens as a base model has them
    std::string tied = header.substr(0, header.rfind('}')) +
                       R"(,"lm_head.weight":{"dtype":"BF16","shape":[3072,192],)" + "\"data_offsets\":[" +
                       std::to_string(data.size()) + "," + std::to_string(data.size() + 3072 * 192 * 2) + "]}}";
    std::string untrained = data;
    std::fill(&untrained[3056 * 192 * 2], &untrained[3072 * 192 * 2], '\0');
    check_models({{14,
                   {{name, length_bytes(tied.size()) + tied + data + std::string(3072 * 192 * 2, '\0')}},
                   "warning: |lm_head.weight is ignored"}},
                 0);
    std::string chat = test_directory() + "/chat.jsonl";
    write_text(chat, R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]})");
    std::string common = "-i " + chat + " -r 2 -n 1 --val none --template llama3 -m ";
    expect(54, common + model_with({{name, length_bytes(header.size()) + header + untrained}}), 0,
           "warning: |looks untrained (a base model?)");
    // chat markup that the default base has never seen
    expect(110, common + tiny(""), 0, "warning: |is worse than guessing (ln V = 8.03): tokenizer and model may not");
}

static void models_shards() {
    std::string header, data;
    weights_read(&header, &data);
    const std::string whole = length_bytes(header.size()) + header + data, first = "model-00001-of-00002.safetensors",
                      second = "model-00002-of-00002.safetensors", embed = "model.embed_tokens.weight";
    const ModelFile none = {"model.safetensors", ABSENT}, one = {first, whole}, two = {second, whole};
    auto index = [&](const Json& map, const Json& total) {
        Json root = Json::object().set("metadata", Json::object().set("total_size", total)).set("weight_map", map);
        return ModelFile{"model.safetensors.index.json", json_write(root)};
    };
    Json all = Json::object();
    for (const std::string& key : parsed(header).keys) {
        if (key != "__metadata__") {
            all.set(key, first);
        }
    }
    auto with = [&](const std::string& key, const Json& value) {
        Json map = all;
        return index(map.set(key, value), data.size());
    };
    check_models({{18, {none, one, with(embed, second)}, "shard model-00002-of-00002.safetensors missing: download in"},
                  {19, {none, one, with(embed, "../../etc/x.safetensors")}, "illegal shard name|refused|hint: "},
                  {19, {none, one, with(embed, "/etc/x.safetensors")}, "illegal shard name|refused"},
                  {20, {none, one, with(embed, 7)}, "index malformed: weight_map of model.embed_tokens.weight"},
                  {20, {none, one, index(Json::object(), 0)}, "index malformed: weight_map"},
                  {21, {none, one, with("model.extra.weight", first)}, "does not contain model.extra.weight"},
                  {22, {none, one, two, with(embed, second)}, "duplicate tensor |also in "}},
                 2);
    check_models({{23, {none, one, index(all, data.size() + 1)}, "warning: |total_size should be "},
                  {23, {none, one, index(all, 1.5)}, "warning: |total_size should be |found 1.5"}},
                 0);
}

static void models_tokenizer() {
    const std::string name = "tokenizer.json", good = file_text(tiny(name));
    Json root = parsed(good);
    auto changed = [&](const char* key, const Json& value) {
        Json copy = root;
        return ModelFile{name, json_write(copy.set(key, value))};
    };
    auto model_changed = [&](const char* key, const Json& value) {
        Json model = *root.find("model");
        return changed("model", model.set(key, value));
    };
    Json vocab = *root.find("model")->find("vocab"), merges = *root.find("model")->find("merges");
    Json shared = vocab, unknown = merges, added = *root.find("added_tokens");
    shared.items[1] = shared.items[0];
    unknown.push("no such");
    added.items[0].set("id", 7);
    Json split = parsed(R"({"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"a+"},)"
                        R"("behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,)"
                        R"("trim_offsets":true,"use_regex":false}]})");
    const ModelFile none = {name, ABSENT};
    check_models(
        {{43, {none}, "no tokenizer.json and no tokenizer.model|hint: "},
         {44, {none, {"tokenizer.model", std::string("\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", 16)}}, "SentencePiece"},
         {45, {model_changed("type", "Unigram")}, "model type Unigram is not supported (need BPE)"},
         {46, {changed("normalizer", parsed(R"({"type":"NFC"})"))}, "normalizer NFC is not supported|hint: "},
         {47, {changed("pre_tokenizer", split)}, "unknown split pattern (found a+, need Llama-3's)|hint: "},
         {48, {model_changed("vocab", shared)}, " share id "},
         {49, {model_changed("merges", unknown)}, "merge |token no is not in the vocabulary"},
         {50, {changed("added_tokens", added)}, "begin_of_text|has id 7, but "},
         {52, {none, {"tokenizer.model", "IQ== 0\nA!== 1\n"}}, "tokenizer.model:2: need `base64 rank`, found A!== 1"},
         {52, {none, {"tokenizer.model", "IQ== 0\nIg== 2\n"}}, "tokenizer.model:2: rank 2 where 1 should follow"}},
        2);
}

// ---------------------------------------------------------------------------------------------------------------------
// data

struct BadData {
    int number;
    const char* name;
    std::string bytes;
    const char* parts;
    const char* options = "";
};

static const std::string FINE = "{\"text\": \"fine\"}\n";

// UTF-16, little-endian, with its mark.
static std::string utf16(const std::string& ascii) {
    std::string out = "\xFF\xFE";
    for (char c : ascii) {
        out += c;
        out += '\0';
    }
    return out;
}

static std::string dialogue(const std::string& messages) {
    return "{\"messages\": [" + messages + "]}\n";
}

static void check_data(const std::vector<BadData>& cases, int code) {
    for (const BadData& c : cases) {
        std::string path = path_join(test_directory(), c.name);
        write_text(path, c.bytes);
        expect(c.number, "-i " + path + base() + " -r 2 --val none --dry-run " + c.options, code, c.parts);
    }
}

static void data_files() {
    const std::string dir = test_directory(), fifo = path_join(dir, "fifo");
    CHECK(mkfifo(fifo.c_str(), 0600) == 0, "mkfifo");
    expect(55, "-i " + dir + "/none.jsonl" + base(), 2, "none.jsonl: cannot open: No such file|hint: ");
    expect(55, "-i " + dir + base(), 2, "not a regular file (found a directory)|hint: ");
    expect(55, "-i " + fifo + base(), 2, "not a regular file (found a pipe (FIFO))|hint: ");
    check_data(
        {{56, "d.jsonl", "", "no examples (found an empty file)|hint: "},
         {56, "d.jsonl", "\n \n", "no examples (found only blank lines)"},
         {57, "d.jsonl.gz", "\x1F\x8B\x08 ...", "compressed (gzip)|gunzip"},
         {57, "d.jsonl.zst", "\x28\xB5\x2F\xFD ...", "compressed (zstd)|unzstd"},
         {57, "d.parquet", "PAR1....PAR1", "the file is Parquet|jsonl"},
         {57, "d.csv", "question,answer\na,b\n", "not a jsonl file (found .csv)|one JSON object a line"},
         {58, "d.jsonl", utf16(FINE), "the file is UTF-16 (need UTF-8)|iconv -f UTF-16"},
         {60, "d.jsonl", "{\n  \"text\": \"a\"\n}\n", "d.jsonl:1:2: the line ends inside an object|jq -c"},
         {62, "d.jsonl", FINE + "{\"text\": \"a\xFF\"}\n", "d.jsonl:2:12: invalid UTF-8 (found byte 0xFF)|--bad-utf8"},
         {68, "d.jsonl", "{\"text\": \"" + std::string(2 << 20, 'x') + "\"}",
          ":1: the line is too long (found |--max-line", "--max-line 1"},
         {69, "d.jsonl", FINE + "{\"text\": \"fi",
          "d.jsonl:2:13: the file ends inside a JSON value (a truncated copy?)"},
         {84, "d.jsonl", "{\"text\": 1}\n{\"text\": 2}\n", "no example is left of 2 records|2  text is not text",
          "--skip-bad"},
         {84, "d.jsonl", "{\"prompt\": \"abcdefgh\", \"completion\": \"b\"}\n",
          "no example is left of 1 records|--max-tokens", "-t 2"}},
        2);
    std::string small = file_text(small_data(3));
    check_data(
        {{59, "d.json", "[{\"text\": \"a\"},\n {\"text\": \"b\"}]\n", "2 read = 2 used"},
         {62, "d.jsonl", "{\"text\": \"a\xFF\"}\n", "warning: |invalid UTF-8 replaced by U+FFFD (line 1)",
          "--bad-utf8 replace"},
         {64, "d.jsonl", "{\"text\": \"a\\ud83d\"}\n", "1 read = 1 used", "--bad-utf8 replace"},
         {81, "d.jsonl", "{\"question\": \"a<|eot_id|>\", \"answer\": \"b\"}\n",
          "warning: |1 control tokens spelt inside text (line 1): kept as ordinary text"},
         {82, "d.jsonl", "{\"text\": \"<|begin_of_text|>abc\"}\n", "warning: |begins with the BOS token (line 1)"},
         {83, "d.jsonl", "{\"text\": \"abcdefgh ijkl\"}\n{\"prompt\": \"abcdefgh ijkl\", \"completion\": \"x\"}\n",
          "2 read = 1 used + 0 rejected + 1 dropped|1 cut", "-t 3"},
         {85, "d.jsonl", FINE, "1 read = 1 used|3 steps, 1 an epoch"}},
        0);
    std::string path = small_data(3);
    expect(86, "-i " + path + base() + " --dry-run --val " + path, 0, "warning: |3 of 3 validation examples");
}

static void data_records() {
    const char* const name = "d.jsonl";
    const std::string user = R"({"role": "user", "content": "a"})", bot = R"({"role": "assistant", "content": "b"})";
    // each as the second line of a file; all of them are told how to go on without it
    const std::vector<std::pair<int, std::pair<std::string, const char*>>> cases = {
        {61, {"\"hello\"", "not a record (found a string, need an object)"}},
        {61, {"17", "not a record (found a number, need an object)"}},
        {61, {"[1]", "not a record (found an array, need an object)"}},
        {63, {"{\"text\": \"a\tb\"}", "control character 0x09 inside a string must be escaped"}},
        {63, {std::string("{\"text\": \"a\0\"}", 13), "control character 0x00 inside a string must be escaped"}},
        {64, {R"({"text": "a\ud83d"})", "lone surrogate \\ud83d in a string"}},
        {65, {R"({"text": "a", "text": "b"})", "duplicate key \"text\""}},
        {66, {R"({"text": "a",})", ":2:13: trailing comma is not JSON"}},
        {66, {R"({'text': 'a'})", ":2:2: single quotes are not JSON"}},
        {66, {R"({"text": NaN})", ":2:10: NaN and Infinity are not JSON"}},
        {66, {R"({"text": "a" /* c */})", ":2:14: comments are not JSON"}},
        {67, {"{\"text\": " + std::string(100000, '['), "nesting deeper than 64"}},
        {70, {R"({"foo": 1, "bar": 2})", "no known format (found foo, bar; need messages, conversations,"}},
        {71, {R"({"messages": [], "text": "a"})", "fits two formats, messages and text|--format"}},
        {72, {dialogue(""), "a dialogue without messages"}},
        {72, {R"({"messages": {}})", "messages is not a list (found an object"}},
        {72, {R"({"messages": ["hi"]})", "a message is no object (found a string)"}},
        {73, {dialogue(R"({"role": "narrator", "content": "a"})"), "unknown role (found \"narrator\", need system"}},
        {73, {dialogue(R"({"content": "a"})"), "a message without \"role\""}},
        {73, {dialogue(R"({"from": "human", "value": "a"})"), "a message with \"from\" or \"value\" in \"messages\""}},
        {74, {dialogue(R"({"role": "user", "content": 5})"), "content of a message is not text (found a number"}},
        {74, {dialogue(R"({"role": "user", "content": null})"), "content of a message is not text (found null"}},
        {74,
         {dialogue(R"({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]})"),
          "found a part of type \"image_url\", need text"}},
        {75, {dialogue(user), "nothing to learn: no assistant turn"}},
        {76, {dialogue(bot), "the dialogue begins with the assistant"}},
        {77, {R"({"prompt": "a", "completion": " \n"})", "completion is empty: there is nothing to learn"}},
        {78, {R"({"instruction": "a", "output": {"x": 1}})", "output is not text (found an object, need a string)"}},
        {79, {R"({"prompt": "a", "chosen": "b", "rejected": "c"})", "preference data is not a format for supervised"}},
        {80,
         {dialogue(user + R"(, {"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]})"),
          "tool messages are not supported yet (found \"tool_calls\")"}},
    };
    for (const auto& c : cases) {
        std::string parts = c.second.second + std::string("|d.jsonl:2:|--skip-bad");
        check_data({{c.first, name, FINE + c.second.first + (c.second.first.back() == '\n' ? "" : "\n") + FINE,
                     parts.c_str(), "--template llama3"}},
                   2);
    }
    check_data(
        {{53, name, dialogue(user + ", " + bot), "d.jsonl:1: chat data, and the model is used without|--template"}}, 2);
    Json config = parsed(file_text(tiny("tokenizer_config.json")));
    config.set("chat_template", "{{ bos_token }}\nhello");
    std::string path = path_join(test_directory(), name);
    write_text(path, dialogue(user + ", " + bot));
    expect(53, "-i " + path + " --val none -m " + model_with({{"tokenizer_config.json", json_write(config)}}), 2,
           "not recognised (fingerprint b5c99c5106bb8d1a)|--template llama3");
}

// ---------------------------------------------------------------------------------------------------------------------
// options

static void options() {
    std::string out = test_directory() + "/out", data = "-i " + small_data(3) + base() + " --val none --dry-run ";
    const struct {
        int number;
        const char *options, *parts;
        int code;
    } cases[] = {
        {87, "-r 0", "--rank must be an integer from 1 to 16384 (found 0)|usage: -r, --rank N", 2},
        {87, "-r -3", "(found -3)|usage: -r", 2},
        {87, "-r 1.5", "(found 1.5)|usage: -r", 2},
        {87, "-r abc", "(found abc)|usage: -r", 2},
        {87, "-r 500", "larger than the smallest side of a target matrix (need at most 64)|hint: ", 2},
        {88, "-r 48", "warning: rank 48: vLLM needs --max-lora-rank 64 to load this adapter", 0},
        {89, "--lr -1", "--lr must be a decimal number from 0 to 10 (found -1)", 2},
        {89, "--lr nan", "(found nan)", 2},
        {89, "--lr 1e3", "(found 1e3)", 2},
        {89, "--lr 0.5", "warning: --lr 0.5 is very high for LoRA", 0},
        {90, "--rnak 4", "unknown option --rnak|the nearest is --rank; usage: -r, --rank N", 2},
        {90, "-r", "--rank needs a value|usage: -r, --rank N", 2},
        {90, "-r 4 --rank 4", "--rank is given more than once|usage: -r, --rank N", 2},
        {91, "-t 0", "--max-tokens must be an integer from 2 to 16777216 (found 0)", 2},
        {91, "-t 1000", "warning: -t 1000 is beyond the model's 512 positions: it has not learned them", 0},
        {92, "-n 3 --warmup 9", "--warmup 9 is longer than the run (found 3 steps)|hint: ", 2},
        {114, "--lr 0,001", "--lr must be a decimal number from 0 to 10 (found 0,001)", 2},
    };
    for (const auto& c : cases) {
        expect(c.number, "-o " + out + " " + data + c.options, c.code, c.parts);
    }
    // far beyond any machine's memory; the plan is shown, then refused
    expect(107, "-m shape:405b --benchmark 1 -t 131072", 1,
           "memory plan|the run needs |the machine has |hint: a smaller model, or shorter examples (-t)");
    // a locale that writes 0,25, made here where the machine has the means
    std::string locales = test_directory();
    run_command(nullptr, "localedef -i de_DE -f UTF-8 " + locales + "/de_DE.UTF-8 2>&1");
    expect(114, data + "--lr 0.25", 0, "peak rate 0.25 ", "LOCPATH=" + locales + " LC_ALL=de_DE.UTF-8");
}

// ---------------------------------------------------------------------------------------------------------------------
// output directories, checkpoints, signals, surroundings

static void output_directories() {
    std::string dir = test_directory(), run = " -o " + dir + "/run", model = model_with({});
    std::string common = "-i " + small_data(3) + base() + " -r 2 -n 1 --val none -q";
    expect(93, common + run, 0, "");
    expect(93, common + run, 2, "holds a finished run|--resume goes on with it, --overwrite replaces it");
    expect(94, "-i " + small_data(3) + " -m " + model + " -n 1 --val none -o " + model, 2,
           "is the model's own directory|hint: ");
    write_text(dir + "/file", "x");
    expect(94, common + " -o " + dir + "/file", 2, "is not a directory|hint: ");
    expect(95, common + " -o /proc/train_llama_run", 2, "/proc/train_llama_run: cannot create directory: ");
    expect(115, common + " -o " + dir + "/" + std::string(300, 'n'), 2, "File name too long|255 bytes");
    // a second process on a directory that a first one is training in
    pid_t child = fork();
    if (child == 0) {
        setpgid(0, 0);
        std::string out;
        train(&out, "-i " + small_data(3) + base() + " -r 2 -n 1000000 --val none -q -o " + dir + "/busy");
        _exit(0);
    }
    for (int i = 0; i < 300 && !path_exists(dir + "/busy/log.jsonl"); i++) {
        usleep(100000);
    }
    expect(96, "--resume -o " + dir + "/busy", 2, "in use by another run (process | on |hint: ");
    kill(-child, SIGKILL);
    waitpid(child, nullptr, 0);
}

static void flip_byte(const std::string& path) {
    std::string bytes = file_text(path);
    bytes[bytes.size() / 2] = char(bytes[bytes.size() / 2] ^ 1);
    write_text(path, bytes);
}

static void resumed_runs() {
    const std::string dir = test_directory(), run = dir + "/run", data = small_data(12);
    std::string model = model_with({config_with("{}"), {"tokenizer.json", file_text(tiny("tokenizer.json"))}});
    std::string common = "-i " + data + " -m " + model + " -r 2 -b 4 -n 3 --save-every 1 --keep 3 --val none -o " + run;
    const std::string resume = "--resume -o " + run, checkpoint = run + "/checkpoints/step_";
    expect(97, common + " --resume", 0, "no checkpoint in |: starting afresh");
    expect(102, resume, 0, "already complete: the adapter is in " + run);
    CHECK(!path_remove(run + "/adapter_model.safetensors"), "remove");
    expect(100, resume + " -r 8", 2, "--resume: rank differs from the run's (found 8, the run has 2)|hint: ");
    expect(100, resume + " --alpha 7", 2, "alpha differs from the run's (found 7, the run has 32)");
    expect(100, resume + " --template llama3-raw", 2, "template differs from the run's (found llama3-raw");
    expect(100, resume + " -m " + tiny(""), 2, "model differs from the run's (found ");
    std::string text = file_text(data), config = file_text(model + "/config.json"),
                tokenizer = file_text(model + "/tokenizer.json");
    write_text(data, text.substr(text.find('\n') + 1) + text.substr(0, text.find('\n') + 1));
    expect(117, resume, 2, "these have changed: data (then |, now |start a new run with another -o");
    write_text(data, text);
    write_text(model + "/config.json", config + " ");
    expect(100, resume, 2, "these have changed: config (then |, now |hint: ");
    write_text(model + "/config.json", config);
    write_text(model + "/tokenizer.json", tokenizer + " ");
    expect(100, resume, 2, "these have changed: tokenizer (then |, now |hint: ");
    write_text(model + "/tokenizer.json", tokenizer);
    flip_byte(checkpoint + "3/adapter_model.safetensors");
    expect(98, resume, 0, "warning: |step_3/adapter_model.safetensors: |going on after step 2 of 3");
    CHECK(!path_remove(run + "/adapter_model.safetensors"), "remove");
    for (const char* step : {"1", "2", "3"}) {
        flip_byte(checkpoint + step + "/state.json");
    }
    expect(99, resume, 2, "step_1/state.json: |step_2/state.json: |step_3/state.json: |nothing was changed");
    CHECK(path_exists(checkpoint + "3/state.json") && !path_exists(run + "/adapter_model.safetensors"), "touched");
    for (const char* step : {"1", "2", "3"}) {
        write_text(checkpoint + step + "/MANIFEST.json", "{\"version\":2,\"something\":\"else\"}");
    }
    expect(101, resume, 2, "written by a newer version |found version 2|hint: ");
}

static void adapters_to_start_from() {
    const std::string dir = test_directory(),
                      common = "-i " + small_data(3) + base() + " --val none --init-adapter " + dir;
    const std::string plain = R"({"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q_proj"])";
    const std::pair<const char*, const char*> cases[] = {
        {R"(,"use_dora":true})", "use_dora is set (true): adapters of this kind are not supported|hint: "},
        {R"(,"modules_to_save":["lm_head"]})", "modules_to_save is set|hint: "}};
    for (const auto& c : cases) {
        write_text(dir + "/adapter_config.json", plain + c.first);
        expect(104, common, 2, c.second);
    }
    write_text(dir + "/adapter_config.json", plain + "}");
    const std::string prefix = "base_model.model.model.layers.";
    auto tensor = [](const std::string& name, const std::string& shape, size_t at, size_t bytes) {
        return "\"" + name + R"(":{"dtype":"F32","shape":)" + shape + ",\"data_offsets\":[" + std::to_string(at) + "," +
               std::to_string(at + bytes) + "]}";
    };
    const std::string a = prefix + "0.self_attn.q_proj.lora_A.weight", file = dir + "/adapter_model.safetensors";
    write_text(file, tensors_file("{" + tensor(a, "[2,100]", 0, 800) + "}", 800));
    expect(104, common, 2, "q_proj.lora_A.weight: |found [2,100]");
    write_text(file, tensors_file("{" + tensor(a, "[2,192]", 0, 1536) + "}", 1536));
    expect(103, common, 2, "layers.0.self_attn.q_proj.lora_B.weight is missing");
    std::string header = "{";
    for (size_t l = 0; l < 4; l++) {
        std::string name = prefix + std::to_string(l) + ".self_attn.q_proj.lora_";
        header += tensor(name + "A.weight", "[2,192]", l * 3072, 1536) + ",";
        header += tensor(name + "B.weight", "[192,2]", l * 3072 + 1536, 1536) + ",";
    }
    write_text(file,
               tensors_file(header + tensor("base_model.model.lm_head.lora_A.weight", "[2,192]", 12288, 1536) + "}",
                            12288 + 1536));
    expect(103, common, 2, "unexpected tensor base_model.model.lm_head.lora_A.weight");
}

// A full disk (here: a limit on the size of a file) costs the checkpoint, not the run; the end of the run cannot be
// written, and it says so. A closed stdout and an empty environment change nothing.
static void surroundings() {
    const std::string dir = test_directory();
    const std::string options = base() + " -n 2 --save-every 1 --val none ", data = small_data(3);
    expect(111, "-i " + data + options + "-r 16 -o " + dir + "/full", 1,
           "warning: no checkpoint at step 1: |File too large; those before are kept|step    2/2 |hint: free "
           "space|--resume",
           "trap '' XFSZ; ulimit -f 200;");
    CHECK(!path_exists(dir + "/full/adapter_model.safetensors"), "half an adapter under its final name");
    expect(111, "--resume -o " + dir + "/full", 0, "2 steps in");
    expect(113, "-i " + data + options + "-r 2 -o " + dir + "/closed >&-", 0, "");
    CHECK(path_exists(dir + "/closed/adapter_model.safetensors"), "no adapter");
    expect(116, "-i " + data + options + "-r 2 -o " + dir + "/bare", 0, "2 steps in", "env -i");
    const std::string odd = dir + "/with space \xC3\xA9\xED\x95\x9C\nline";
    CHECK(!dir_create(odd), "mkdir");
    write_text(odd + "/d a.jsonl", file_text(data));
    expect(115, "-i '" + odd + "/d a.jsonl'" + options + "-r 2 -o '" + odd + "/run'", 0, "2 steps in");
    CHECK(path_exists(odd + "/run/adapter_model.safetensors"), "no adapter in a directory with an odd name");
    expect(115, "--resume -o '" + odd + "/run'", 0, "already complete");
}

// Once: saved, the way on is shown. Twice: at once, in the middle of a step, which takes a second or more on the tier ref,
// and on any in an instrumented build. SIGTERM, since a shell starts what is in the background with SIGINT ignored.
static void interrupted() {
    const std::string slow = getenv("RANKS_STEPS") != nullptr ? "" : "TRAIN_LLAMA_CPU=ref ";
    const std::string dir = test_directory(), data = small_data(220);
    auto signalled = [&](std::string* out, const std::string& run, const std::string& signals) {
        return run_command(out, slow + program() + " -i " + data + base() + " -r 16 -b 400 -e 9 --threads 1 --val none -o " +
                                    run + " & p=$!; for i in $(seq 300); do [ -s " + run +
                                    "/log.jsonl ] && break; sleep 0.1; done; sleep 0.2; " + signals + " wait $p");
    };
    std::string out;
    int code = signalled(&out, dir + "/once", "kill -TERM $p;");
    CHECK(code == 143 && text_has(out, "stopped by a signal after step ") &&
              text_has(out, " --resume -o " + dir + "/once"),
          "112: exit %d\n%s", code, out.c_str());
    code = signalled(&out, dir + "/twice", "kill -TERM $p; sleep 0.005; kill -TERM $p;");
    CHECK(code == 143 && !text_has(out, "stopped by a signal") && !path_exists(dir + "/twice/checkpoints"),
          "112: exit %d\n%s", code, out.c_str());
}

extern const Test bad_inputs_tests[];
const Test bad_inputs_tests[] = {
    {"models_config", models_config},
    {"models_weights", models_weights},
    {"models_shards", models_shards},
    {"models_tokenizer", models_tokenizer},
    {"data_files", data_files},
    {"data_records", data_records},
    {"options", options},
    {"output_directories", output_directories},
    {"resumed_runs", resumed_runs},
    {"adapters_to_start_from", adapters_to_start_from},
    {"surroundings", surroundings},
    {"interrupted", interrupted},
    {nullptr, nullptr},
};
