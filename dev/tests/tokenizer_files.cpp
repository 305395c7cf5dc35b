// Tokenizer files: added tokens, tokenizer_config.json and its companions, tiktoken's form, and every kind of file that
// must be refused, with the words of its message.
#include <map>

#include "dev/tests/small_tokenizer.h"

namespace {

// ---- added tokens and configuration ---------------------------------------------------------------------------------

void added_tokens() {
    Json root = small_tokenizer({{"a", "b"}});
    Json& list = at(root, "added_tokens");
    list.push(added_token(257, "<s>", true, false)).push(added_token(258, "<s>>", true, false));
    list.push(added_token(259, "<t>", false, false)).push(added_token(260, "a<", false, true));
    Tokenizer t;
    Error e = load_json(t, root);
    CHECK(!e, "%s", e.what.c_str());
    check_ids(t, "x<s>y<s>>z", {'x', 257, 'y', 258, 'z'}, true);  // the longest of those that begin here
    check_ids(t, "<s><s>", {257, 257}, true);
    check_ids(t, "<s", {'<', 's'}, true);
    check_ids(t, "<s>", {'<', 's', '>'}, false);
    check_ids(t, "<t>ab", {259, 256}, false);  // not special: always a token
    check_ids(t, "<t>ab", {259, 256}, true);
    check_ids(t, "a<s>", {'a', 257}, true);  // those that are not "normalized" are looked for first, anywhere
    check_ids(t, "a<s>", {260, 's', '>'}, false);
    check_ids(t, "a<t>", {'a', 259}, false);
    check_ids(t, "a<x", {260, 'x'}, false);
    check_ids(t, "ba<xab", {'b', 260, 'x', 256}, true);
    std::string text = "a<s>b<s>><t><s";
    CHECK(tokenizer_count_special(t, text.data(), text.size()) == 2, "%zu special tokens, need 2",
          tokenizer_count_special(t, text.data(), text.size()));
    CHECK(tokenizer_special_id(t, "<s>") == 257 && tokenizer_special_id(t, "<s>>") == 258 &&
              tokenizer_special_id(t, "a<") == 260 && tokenizer_special_id(t, "<s") == -1 &&
              tokenizer_special_id(t, "ab") == -1 && tokenizer_special_id(t, "") == -1,
          "ids by text");
    CHECK(decode(t, {257, 'x', 259, 258, 256, -1, 5000}) == "<s>x<t><s>>ab", "decode");
    CHECK(decode(t, {257, 'x', 259, 258, 256}, true) == "x<t>ab", "decode without special tokens");
    CHECK(t.added[257] == 2 && t.added[259] == 1 && t.added[256] == 0 && t.pieces[260] == "a<", "tables");
    tokenizer_free(t);
}

// An added token may be in the vocabulary too (SmolLM2's are), also with characters outside the byte alphabet.
void added_token_in_vocabulary() {
    Json root = small_tokenizer({{"a", "b"}});
    at(at(root, "model"), "vocab").set("<end>", 257).set("<빛>", 258);
    at(root, "added_tokens").push(added_token(257, "<end>", true, false)).push(added_token(258, "<빛>", true, false));
    Tokenizer t;
    Error e = load_json(t, root);
    CHECK(!e, "%s", e.what.c_str());
    check_ids(t, "ab<end><빛>", {256, 257, 258}, true);
    check_ids(t, "<end>", {'<', 'e', 'n', 'd', '>'}, false);
    CHECK(t.pieces[258] == "<빛>" && decode(t, {257, 258}) == "<end><빛>", "text of the tokens");
    tokenizer_free(t);
}

// The whole directory: tokenizer.json with two control tokens, and these other files.
Error load_config(Tokenizer& t, const std::map<std::string, std::string>& files) {
    Json root = small_tokenizer({});
    at(root, "added_tokens").push(added_token(256, "<s>", true, false)).push(added_token(257, "</s>", true, false));
    std::string directory = test_directory();
    put(directory, "tokenizer.json", json_write(root));
    for (const auto& file : files) {
        put(directory, file.first.c_str(), file.second);
    }
    return tokenizer_load(t, directory, 258);
}

void config_files() {
    Tokenizer t;
    Error e = load_config(t, {});
    CHECK(!e && t.bos == -1 && t.eos == -1 && t.chat_template.empty(), "nothing but tokenizer.json: %s",
          e.what.c_str());
    std::string hash;
    e = sha256_file(hash, t.source);
    CHECK(!e && hash == t.hash && hash.size() == 64, "hash %s", t.hash.c_str());
    CHECK(!t.unicode_version.empty(), "no Unicode version");
    e = load_config(t, {{"tokenizer_config.json", R"({"bos_token":"<s>","eos_token":{"content":"</s>","lstrip":false},
        "model_max_length":1000000000000000019884624838656,"chat_template":"one","pad_token":null})"}});
    CHECK(!e && t.bos == 256 && t.eos == 257 && t.chat_template == "one", "%s %d %d", e.what.c_str(), t.bos, t.eos);
    e = load_config(t, {{"tokenizer_config.json", R"({"bos_token":null,"chat_template":[{"name":"tool_use",
        "template":"no"},{"name":"default","template":"yes"}]})"},
                        {"special_tokens_map.json", R"({"bos_token":{"content":"</s>"},"eos_token":"<s>"})"}});
    CHECK(!e && t.bos == 257 && t.eos == 256 && t.chat_template == "yes", "%s %d %d", e.what.c_str(), t.bos, t.eos);
    e = load_config(t, {{"tokenizer_config.json", R"({"chat_template":"old","bos_token":"<s>"})"},
                        {"special_tokens_map.json", R"({"bos_token":"</s>"})"},
                        {"chat_template.jinja", "new"}});
    CHECK(!e && t.bos == 256 && t.chat_template == "new", "%s %d %s", e.what.c_str(), t.bos, t.chat_template.c_str());
    e = load_config(t, {{"tokenizer_config.json", R"({"chat_template":[{"name":"rag","template":"x"}]})"}});
    CHECK(!e && t.chat_template.empty() && t.warnings.size() == 1 &&
              text_has(t.warnings[0], "chat_template is neither a text nor a list with one named default"),
          "list without default");
    e = load_config(t, {{"tokenizer_config.json", R"({"bos_token":"<bos>"})"}});
    CHECK(e.code == 2 && text_has(e.what, "tokenizer_config.json: bos_token is <bos>, which ") &&
              text_has(e.what, "does not have"),
          "%s", e.what.c_str());
    e = load_config(t, {{"tokenizer_config.json", R"({"added_tokens_decoder":{"257":{"content":"<s>"}}})"}});
    CHECK(e.code == 2 && text_has(e.what, "added token <s> has id 257, but ") && text_has(e.what, "gives it 256"), "%s",
          e.what.c_str());
    e = load_config(t,
                    {{"tokenizer_config.json", R"({"added_tokens_decoder":{"256":{"content":"<s>","rstrip":true}}})"}});
    CHECK(e.code == 2 && text_has(e.what, "added token <s>: rstrip is not supported"), "%s", e.what.c_str());
    e = load_config(t, {{"tokenizer_config.json", R"({"added_tokens_decoder":{"258":{"content":"<new>"}}})"}});
    CHECK(!e && t.warnings.size() == 1 && text_has(t.warnings[0], "added token <new> is not in "), "%s",
          e.what.c_str());
    e = load_config(t, {{"tokenizer_config.json", "[]"}});
    CHECK(e.code == 2 && text_has(e.what, "need an object, found an array"), "%s", e.what.c_str());
    e = load_config(t, {{"tokenizer_config.json", "{"}});
    CHECK(e.code == 2 && text_has(e.what, "tokenizer_config.json:1:"), "%s", e.what.c_str());
    tokenizer_free(t);
}

void post_processors() {
    const char* const bos = R"({"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},
        {"Sequence":{"id":"A","type_id":0}}],"pair":[],
        "special_tokens":{"<s>":{"id":"<s>","ids":[256],"tokens":["<s>"]}}})";
    Json root = small_tokenizer({});
    at(root, "added_tokens").push(added_token(256, "<s>", true, false)).push(added_token(257, "</s>", true, false));
    Json byte_level = at(root, "post_processor");
    Tokenizer t;
    at(root, "post_processor") = Json();
    Error e = load_json(t, root);
    CHECK(!e && t.warnings.empty(), "none: %s", e.what.c_str());
    Json both = Json::object();
    both.set("type", "Sequence").set("processors", Json::array().push(byte_level).push(parsed(bos)));
    at(root, "post_processor") = both;
    e = load_json(t, root);
    CHECK(!e && t.warnings.empty() && t.bos == 256, "template: %s, bos %d", e.what.c_str(), t.bos);
    check_ids(t, "x", {'x'});  // BOS is the caller's
    std::string directory = test_directory();
    put(directory, "tokenizer.json", json_write(root));
    put(directory, "tokenizer_config.json", R"({"bos_token":"</s>"})");
    e = tokenizer_load(t, directory, 1000);
    CHECK(!e && t.bos == 257 && t.warnings.size() == 1 &&
              text_has(t.warnings[0], "puts <s> in front of a text, but bos_token is </s>; bos_token is used"),
          "no warning");
    at(root, "post_processor") =
        parsed(R"({"type":"TemplateProcessing","single":[{"Sequence":{"id":"A","type_id":0}}]})");
    e = load_json(t, root);
    CHECK(!e && t.warnings.empty(), "text alone: %s", e.what.c_str());
    Json wrong = parsed(bos);
    at(at(at(wrong, "special_tokens"), "<s>"), "ids").items[0] = 257;
    at(root, "post_processor") = wrong;
    check_refused(root, "post_processor names <s> with other ids than its added token has");
    wrong = parsed(bos);
    at(wrong, "single").push(at(wrong, "single").items[0]);
    at(root, "post_processor") = wrong;
    check_refused(root, "post_processor TemplateProcessing is not supported");
    at(root, "post_processor") = parsed(R"({"type":"RobertaProcessing"})");
    check_refused(root, "post_processor RobertaProcessing is not supported (need ByteLevel or TemplateProcessing)");
    tokenizer_free(t);
}

// ---- bad files ------------------------------------------------------------------------------------------------------

void refused_components() {
    Json good = small_tokenizer({{"a", "b"}}), root;
    for (const char* type : {"Unigram", "WordPiece", "WordLevel"}) {
        root = good;
        at(at(root, "model"), "type") = type;
        check_refused(root, std::string("model type ") + type + " is not supported (need BPE)");
    }
    root = good;
    root.set("normalizer", parsed(R"({"type":"NFC"})"));
    check_refused(root, "normalizer NFC is not supported (need null)");
    root.set("normalizer", parsed(R"({"type":"Sequence","normalizers":[{"type":"Prepend"},{"type":"Replace"}]})"));
    check_refused(root, "normalizer Sequence[Prepend, Replace] is not supported");
    root = good;
    root.set("pre_tokenizer", Json());
    check_refused(root, "pre_tokenizer null is not supported");
    root.set("pre_tokenizer", parsed(R"({"type":"Metaspace","replacement":"_"})"));
    check_refused(root, "pre_tokenizer Metaspace is not supported");
    root.set("pre_tokenizer",
             parsed(R"({"type":"Sequence","pretokenizers":[{"type":"Punctuation"},{"type":"ByteLevel"}]})"));
    check_refused(root, "pre_tokenizer ByteLevel with add_prefix_space true is not supported");
    root.set("pre_tokenizer", parsed(R"({"type":"Sequence","pretokenizers":[{"type":"Punctuation"},
        {"type":"ByteLevel","add_prefix_space":false}]})"));
    check_refused(root, "pre_tokenizer Sequence[Punctuation, ByteLevel] is not supported");
    root = good;
    Json& split = at(at(root, "pre_tokenizer"), "pretokenizers").items[0];
    at(at(split, "pattern"), "Regex") = "\\p{L}+|\\p{N}";
    check_refused(root, "unknown split pattern (found \\p{L}+|\\p{N}, need Llama-3's)");
    at(split, "pattern") = Json::object().set("String", " ");
    check_refused(root, "unknown split pattern (found no Regex");
    root = good;
    at(at(at(root, "pre_tokenizer"), "pretokenizers").items[0], "behavior") = "Removed";
    check_refused(root, "pre_tokenizer Split is not supported (need behavior Isolated");
    root = small_tokenizer({}, true);
    at(at(at(root, "pre_tokenizer"), "pretokenizers").items[0], "individual_digits") = false;
    check_refused(root, "pre_tokenizer Digits is not supported (need individual_digits true)");
    root = good;
    root.set("decoder", parsed(R"({"type":"Sequence","decoders":[{"type":"ByteFallback"}]})"));
    check_refused(root, "decoder Sequence[ByteFallback] is not supported (need ByteLevel)");
    root = good;
    at(root, "model").set("byte_fallback", true);
    check_refused(root, "model option byte_fallback is not supported");
    root = good;
    at(root, "model").set("dropout", 0.1);
    check_refused(root, "model option dropout is not supported");
    root = good;
    at(root, "model").set("end_of_word_suffix", "</w>");
    check_refused(root, "model option end_of_word_suffix is not supported");
    root = good;
    root.set("model", Json());
    check_refused(root, "no model in it");
    for (const char* key : {"lstrip", "rstrip", "single_word"}) {
        root = good;
        at(root, "added_tokens").push(added_token(257, "<x>", true, false).set(key, true));
        check_refused(root, std::string("added token <x>: ") + key + " is not supported");
    }
}

void refused_vocabularies() {
    Json good = small_tokenizer({{"a", "b"}}), root;
    root = good;  // byte 0x41 taken out, its id given to another token
    Json& vocab = at(at(root, "model"), "vocab");
    vocab.keys[0x41] = "AA";
    check_refused(root, "the vocabulary has no token for the byte 0x41");
    root = good;
    at(at(root, "model"), "vocab").set("xx", 256);
    check_refused(root, "tokens ab and xx share id 256");
    root = good;
    at(at(root, "model"), "vocab").set("xx", 1000);
    check_refused(root, "token id 1000 (xx) has no embedding row (the model has 1000)");
    at(at(root, "model"), "vocab").set("xx", 4000000000LL);
    check_refused(root, "token id 4000000000 (xx) has no embedding row");
    at(at(root, "model"), "vocab").set("xx", 18446744073709551615ULL);
    check_refused(root, "token id 18446744073709551615 (xx) has no embedding row");
    at(at(root, "model"), "vocab").set("xx", -1);
    check_refused(root, "token xx: its id is -1, need a whole number from 0");
    at(at(root, "model"), "vocab").set("xx", 1.5);
    check_refused(root, "token xx: its id is 1.5, need a whole number");
    at(at(root, "model"), "vocab").set("xx", "7");
    check_refused(root, "token xx: its id is \"7\", need a whole number");
    root = good;
    at(at(root, "model"), "vocab").set("\u2581the", 257);
    check_refused(root, "token \u2581the (id 257) is not spelt in the byte alphabet");
    root = good;
    at(at(root, "model"), "vocab").set(std::string(1025, 'x'), 257);
    check_refused(root, "a token of 1025 bytes in the vocabulary");
    root = good;
    at(root, "model").set("vocab", Json::array());
    check_refused(root, "model.vocab: need an object with tokens");
}

void refused_merges() {
    Json good = small_tokenizer({{"a", "b"}}), root;
    root = good;
    at(at(root, "model"), "merges").push("x yz");
    check_refused(root, "merge 2: token yz is not in the vocabulary");
    root = good;
    at(at(root, "model"), "merges").push("x y");
    check_refused(root, "merge 2: its result xy is not in the vocabulary");
    root = good;
    at(at(root, "model"), "merges").push("a b");
    check_refused(root, "merge 2 (a b) is there twice");
    for (const char* text : {"ab", "a b c", " b", "a "}) {
        root = good;
        at(at(root, "model"), "merges").push(text);
        check_refused(root, std::string("merge 2: need two tokens, found \"") + text + "\"");
    }
    root = good;
    at(at(root, "model"), "merges").push(Json::array().push("a"));
    check_refused(root, "merge 2: need two tokens, found [\"a\"]");
    at(root, "model").set("merges", 3);
    check_refused(root, "model.merges: need an array, found a number");
}

void refused_added_tokens() {
    Json good = small_tokenizer({{"a", "b"}}), root;
    root = good;
    at(root, "added_tokens").push(added_token(255, "ab", false, false));
    check_refused(root, "added token ab has id 255, but the vocabulary gives it 256");
    root = good;
    at(root, "added_tokens").push(added_token(300, "<x>", true, false));
    check_refused(root, "added token <x> has id 300, but its place after the vocabulary gives it 257");
    root = good;
    at(root, "added_tokens").push(added_token(257, "<pad>", true, false));
    check_refused(root, "token id 257 (<pad>) has no embedding row (the model has 257)", 257);
    at(root, "added_tokens").push(added_token(258, "<pad>", true, false));
    check_refused(root, "added token <pad> is there twice");
    root = good;
    at(root, "added_tokens").push(added_token(257, "", true, false));
    check_refused(root, "added_tokens: an entry without content");
    root = good;
    root.set("added_tokens", "none");
    check_refused(root, "added_tokens: need an array, found a string");
    root = good;  // a hole below a token of the vocabulary: the next free id is taken already
    at(at(root, "model"), "vocab").set("xx", 258);
    at(root, "added_tokens").push(added_token(258, "<x>", true, false));
    check_refused(root, "tokens xx and <x> share id 258");
}

std::string base64(const std::string& bytes) {
    const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string text;
    for (size_t i = 0; i < bytes.size(); i += 3) {
        uint32_t group = 0;
        for (size_t k = 0; k < 3; k++) {
            group = group << 8 | (i + k < bytes.size() ? (unsigned char)bytes[i + k] : 0);
        }
        for (size_t k = 0; k < 4; k++) {
            text += i + k <= bytes.size() ? digits[group >> (18 - 6 * k) & 63] : '=';
        }
    }
    return text;
}

std::string tiktoken_text(const std::vector<std::string>& more) {
    std::string text;
    int rank = 0;
    for (int b = 0; b < 256; b++) {
        text += base64(std::string(1, char(b))) + " " + std::to_string(rank++) + "\n";
    }
    for (const std::string& token : more) {
        text += base64(token) + " " + std::to_string(rank++) + "\n";
    }
    return text;
}

void check_tiktoken(const std::string& text, const std::string& part, int rows = 1000) {
    std::string directory = test_directory();
    put(directory, "tokenizer.model", text);
    Tokenizer t;
    Error e = tokenizer_load(t, directory, rows);
    CHECK(e.code == 2 && text_has(e.what, part), "message is: %s\n  need: %s", e.what.c_str(), part.c_str());
    CHECK(t.pieces.empty(), "a refused tokenizer is not empty");
}

void tiktoken_files() {
    std::string directory = test_directory();
    Tokenizer t;
    Error e = tokenizer_load(t, directory, 1000);
    CHECK(e.code == 2 && text_has(e.what, "no tokenizer.json and no tokenizer.model in it"), "%s", e.what.c_str());
    put(directory, "tokenizer.model", "\r\n" + tiktoken_text({"ab", "abc", "bc", "xyz"}) + "\n");
    if (!load_ok(t, directory, 516)) {
        return;
    }
    CHECK(t.warnings.size() == 1 && text_has(t.warnings[0], "tokenizer.model: used, since there is no tokenizer.json"),
          "%zu warnings", t.warnings.size());
    check_ids(t, "abc", {257});
    check_ids(t, "xbc", {'x', 258});
    check_ids(t, "aabc", {'a', 257});
    check_ids(t, "xyz", {259});  // whole piece, though no merges reach it
    check_ids(t, "xyza", {'x', 'y', 'z', 'a'});
    check_ids(t, "<|begin_of_text|>a<|eot_id|>", {260, 'a', 269}, true);
    CHECK(t.bos == 260 && t.eos == 261 && t.pieces.size() == 516, "%d %d %zu", t.bos, t.eos, t.pieces.size());
    CHECK(
        t.pieces[260 + 2] == "<|reserved_special_token_0|>" && t.pieces[260 + 255] == "<|reserved_special_token_247|>",
        "names of the reserved tokens: %s %s", t.pieces[262].c_str(), t.pieces[515].c_str());
    tokenizer_free(t);

    check_tiktoken(tiktoken_text({}), "token id 511 has no embedding row", 511);
    check_tiktoken(tiktoken_text({}) + "A!== 256\n", "tokenizer.model:257: need `base64 rank`, found A!== 256");
    check_tiktoken(tiktoken_text({}) + "QUI 256\n", "tokenizer.model:257: need `base64 rank`");
    check_tiktoken(tiktoken_text({}) + "QUJ= 256\n", "tokenizer.model:257: need `base64 rank`");  // unused bits set
    check_tiktoken(tiktoken_text({}) + "QUI=\n", "tokenizer.model:257: need `base64 rank`");
    check_tiktoken(tiktoken_text({}) + " 256\n", "tokenizer.model:257: need `base64 rank`");
    check_tiktoken(tiktoken_text({}) + "QUI= 257\n", "tokenizer.model:257: rank 257 where 256 should follow");
    check_tiktoken(tiktoken_text({}) + "QUI= -1\n", "tokenizer.model:257: rank -1 where 256 should follow");
    check_tiktoken(tiktoken_text({"ab", "ab"}), "tokens 256 and 257 have the same bytes");
    check_tiktoken("QUI= 0\n", "the vocabulary has no token for the byte 0x00");
    check_tiktoken("", "the vocabulary has no token for the byte 0x00");
    check_tiktoken(std::string("\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", 16), "a SentencePiece model (as Llama-2's)");
    check_tiktoken("version https://git-lfs.github.com/spec/v1\n", "this is a Git LFS pointer");
}

void both_forms() {
    std::string directory = test_directory();
    Json root = small_tokenizer({{"a", "b"}});
    put(directory, "tokenizer.json", json_write(root));
    put(directory, "tokenizer.model", tiktoken_text({"ab"}));
    Tokenizer t;
    if (!load_ok(t, directory, 600)) {
        return;
    }
    CHECK(t.warnings.empty() && text_has(t.source, "tokenizer.json"), "equal: %zu warnings", t.warnings.size());
    for (const std::vector<std::string>& other : {std::vector<std::string>{"ax"}, {}, {"ab", "cd"}}) {
        put(directory, "tokenizer.model", tiktoken_text(other));
        if (load_ok(t, directory, 600)) {
            CHECK(t.warnings.size() == 1 && text_has(t.warnings[0], "differ, first at token id"), "no warning");
            check_ids(t, "ab", {256});
        }
    }
    put(directory, "tokenizer.model", "junk");
    if (load_ok(t, directory, 600)) {
        CHECK(t.warnings.size() == 1 && text_has(t.warnings[0], "is beside tokenizer.json and is not used"),
              "no warning");
    }
    tokenizer_free(t);
}

// Cut and changed files: an error or a tokenizer, never a crash.
void damaged_files() {
    Json root = small_tokenizer({{"a", "b"}, {"ab", "c"}});
    at(root, "added_tokens").push(added_token(258, "<x>", true, false));
    std::string good = json_write(root), directory = test_directory();
    std::mt19937 rng(13);
    for (int i = 0; i < 200; i++) {
        std::string bad = good;
        if (i % 2) {
            bad.resize(rng() % bad.size());
        } else {
            for (int k = 0; k < 3; k++) {
                bad[rng() % bad.size()] = char(rng());
            }
        }
        put(directory, "tokenizer.json", bad);
        Tokenizer t;
        Error e = tokenizer_load(t, directory, 300);
        CHECK(e.code == 0 || e.code == 2, "code %d: %s", e.code, e.what.c_str());
        if (!e) {
            std::string text = "abc <x> \n 12";
            CHECK(decode(t, encode(t, text)) == text, "a damaged file that loads does not give text back");
        }
        tokenizer_free(t);
    }
}

}  // namespace

extern const Test tokenizer_files_tests[];
const Test tokenizer_files_tests[] = {
    {"added_tokens", added_tokens},
    {"added_token_in_vocabulary", added_token_in_vocabulary},
    {"config_files", config_files},
    {"post_processors", post_processors},
    {"refused_components", refused_components},
    {"refused_vocabularies", refused_vocabularies},
    {"refused_merges", refused_merges},
    {"refused_added_tokens", refused_added_tokens},
    {"tiktoken_files", tiktoken_files},
    {"both_forms", both_forms},
    {"damaged_files", damaged_files},
    {nullptr, nullptr},
};
