// For the tests of the tokenizer: small tokenizer.json files made in place (every byte a token of its own number, and
// the merges that a test asks for), and the checks that they share.
#pragma once
#include <random>
#include <string>
#include <vector>

#include "dev/tests/test.h"
#include "io/file.h"
#include "io/json.h"
#include "tokenizer/tokenizer.h"

inline const char* const LLAMA3_PATTERN =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+"
    "|\\s+(?!\\S)|\\s+";

typedef std::vector<int32_t> Ids;

inline std::string join(const Ids& ids) {
    std::string s;
    for (size_t i = 0; i < ids.size() && i < 40; i++) {
        s += (i ? " " : "") + std::to_string(ids[i]);
    }
    return s;
}

inline Ids encode(const Tokenizer& t, const std::string& text, bool parse_special = false) {
    Ids ids;
    tokenizer_encode(t, ids, text.data(), text.size(), parse_special);
    return ids;
}

inline std::string decode(const Tokenizer& t, const Ids& ids, bool skip_special = false) {
    return tokenizer_decode(t, ids.data(), ids.size(), skip_special);
}

inline void check_ids(const Tokenizer& t, const std::string& text, const Ids& expected, bool parse_special = false) {
    Ids ids = encode(t, text, parse_special);
    CHECK(ids == expected, "%s: %s, need %s", printable(text).c_str(), join(ids).c_str(), join(expected).c_str());
}

inline std::string utf8(uint32_t c) {
    std::string s;
    if (c < 0x80) {
        s += char(c);
    } else if (c < 0x800) {
        s += char(0xC0 | c >> 6);
    } else if (c < 0x10000) {
        s += char(0xE0 | c >> 12);
        s += char(0x80 | (c >> 6 & 0x3F));
    } else {
        s += char(0xF0 | c >> 18);
        s += char(0x80 | (c >> 12 & 0x3F));
        s += char(0x80 | (c >> 6 & 0x3F));
    }
    if (c >= 0x80) {
        s += char(0x80 | (c & 0x3F));
    }
    return s;
}

// The character of GPT-2's byte alphabet for a byte.
inline std::string byte_char(int byte) {
    int shifted = 256;
    for (int b = 0; b < 256; b++) {
        bool itself = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        if (b == byte) {
            return utf8(uint32_t(itself ? b : shifted));
        }
        shifted += !itself;
    }
    return "";
}

inline std::string spelt(const std::string& bytes) {
    std::string s;
    for (char c : bytes) {
        s += byte_char((unsigned char)c);
    }
    return s;
}

inline Json& at(Json& object, const char* key) {
    for (size_t i = 0; i < object.keys.size(); i++) {
        if (object.keys[i] == key) {
            return object.items[i];
        }
    }
    object.set(key, Json());
    return object.items.back();
}

inline Json parsed(const std::string& text) {
    Json value;
    Error e = json_parse(value, text.data(), text.size(), "test");
    CHECK(!e, "%s", e.what.c_str());
    return value;
}

inline Json added_token(int id, const char* content, bool special, bool normalized) {
    Json token = Json::object();
    token.set("id", id).set("content", content).set("single_word", false).set("lstrip", false).set("rstrip", false);
    return token.set("normalized", normalized).set("special", special);
}

// A tokenizer.json: the 256 bytes as ids 0..255 (id = byte), then the results of the merges in order, then nothing
// else. Merges are pairs of byte strings.
typedef std::vector<std::pair<std::string, std::string>> Merges;

inline Json small_tokenizer(const Merges& merges, bool smollm2 = false, bool pairs = true) {
    Json vocab = Json::object(), list = Json::array();
    for (int b = 0; b < 256; b++) {
        vocab.set(byte_char(b), b);
    }
    for (const auto& m : merges) {
        std::string left = spelt(m.first), right = spelt(m.second);
        if (!vocab.find((left + right).c_str())) {
            vocab.set(left + right, int(vocab.keys.size()));
        }
        list.push(pairs ? Json::array().push(left).push(right) : Json(left + " " + right));
    }
    Json root = parsed(R"({"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{"type":"Sequence","pretokenizers":[
            {"type":"Split","pattern":{"Regex":""},"behavior":"Isolated","invert":false},
            {"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}]},
        "post_processor":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":false,"use_regex":true},
        "decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},
        "model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,
            "end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false}})");
    Json& parts = at(at(root, "pre_tokenizer"), "pretokenizers");
    at(at(parts.items[0], "pattern"), "Regex") = LLAMA3_PATTERN;
    if (smollm2) {
        parts = parsed(R"([{"type":"Digits","individual_digits":true},
            {"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}])");
    }
    at(root, "model").set("vocab", vocab).set("merges", list);
    return root;
}

inline void put(const std::string& directory, const char* name, const std::string& bytes) {
    Error e = file_replace(path_join(directory, name), bytes);
    CHECK(!e, "%s", e.what.c_str());
}

inline Error load_json(Tokenizer& t, const Json& root, int rows = 1000) {
    std::string directory = test_directory();
    put(directory, "tokenizer.json", json_write(root));
    return tokenizer_load(t, directory, rows);
}

inline bool load_ok(Tokenizer& t, const std::string& directory, int rows) {
    Error e = tokenizer_load(t, directory, rows);
    return CHECK(!e, "%s", e.what.c_str());
}

// The file must be refused, as bad input, with these words in the message.
inline void check_refused(const Json& root, const std::string& part, int rows = 1000) {
    Tokenizer t;
    Error e = load_json(t, root, rows);
    CHECK(e.code == 2, "code %d, need 2 for: %s", e.code, part.c_str());
    CHECK(text_has(e.what, part), "message is: %s\n  need: %s", e.what.c_str(), part.c_str());
    CHECK(text_has(e.what, "tokenizer.json: "), "no file name in: %s", e.what.c_str());
    CHECK(t.pieces.empty() && !t.pattern, "a refused tokenizer is not empty");
    tokenizer_free(t);
}
