// Loads the tokenizer of a model directory: picks the vocabulary file, reads tokenizer.model itself, and adds what
// tokenizer_config.json and its companions say (BOS, EOS, chat template). tokenizer.json: see tokenizer_json.cpp.
//
// tokenizer.model of Llama-3 is tiktoken's form: lines `base64 SP rank`, rank = id = merge order. The same name holds
// a SentencePiece protobuf in Llama-2's time; that is refused. Special tokens are not in the file.
#include <cstring>

#include "io/file.h"
#include "io/json.h"
#include "tokenizer/tokenizer.h"

namespace {

// Llama-3's control tokens by their place after the vocabulary; those not named here are reserved ones. The names are
// those of the 3.1 release in HF form (3.0 and Meta's own code call some of them otherwise; the ids are the same).
const int SPECIAL_TOKENS = 256;
const struct {
    int place;
    const char* name;
} SPECIAL_NAMES[] = {
    {0, "<|begin_of_text|>"},   {1, "<|end_of_text|>"},   {4, "<|finetune_right_pad_id|>"},
    {6, "<|start_header_id|>"}, {7, "<|end_header_id|>"}, {8, "<|eom_id|>"},
    {9, "<|eot_id|>"},          {10, "<|python_tag|>"},
};

int base64_digit(unsigned char c) {
    if (c >= 'A' && c <= 'Z') {
        return c - 'A';
    }
    if (c >= 'a' && c <= 'z') {
        return c - 'a' + 26;
    }
    if (c >= '0' && c <= '9') {
        return c - '0' + 52;
    }
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

// Strict: whole groups of four, padding at the end only, unused bits zero.
bool base64_decode(std::string& bytes, const char* text, size_t n) {
    bytes.clear();
    if (n == 0 || n % 4 != 0) {
        return false;
    }
    size_t padding = text[n - 1] != '=' ? 0 : text[n - 2] != '=' ? 1 : 2;
    for (size_t i = 0; i < n; i += 4) {
        size_t digits = i + 4 == n ? 4 - padding : 4;
        uint32_t group = 0;
        for (size_t k = 0; k < 4; k++) {
            int digit = k < digits ? base64_digit((unsigned char)text[i + k]) : 0;
            if (digit < 0) {
                return false;
            }
            group = group << 6 | uint32_t(digit);
        }
        for (size_t k = 0; k + 1 < 4; k++) {
            unsigned char byte = (unsigned char)(group >> (16 - 8 * k));
            if (k + 1 < digits) {
                bytes += char(byte);
            } else if (byte != 0) {
                return false;
            }
        }
    }
    return true;
}

// A protobuf whose first field is a message that begins with a string field, as SentencePiece's models do.
bool is_sentencepiece(const std::string& text) {
    return text.size() >= 5 && text[0] == '\n' && text[2] == '\n' &&
           memchr(text.data(), 0, text.size() < 4096 ? text.size() : 4096);
}

Error tiktoken_read_vocabulary(std::vector<std::string>& vocabulary, const std::string& path) {
    std::string text;
    if (Error e = file_read_all(text, path)) {
        return e;
    }
    if (is_sentencepiece(text)) {
        return bad_input(
                   "%s: a SentencePiece model (as Llama-2's); only tiktoken's form and tokenizer.json are "
                   "supported",
                   path.c_str())
            .hinted("use a LLaMA-3 model, or one that has a byte-level tokenizer.json");
    }
    if (text.compare(0, 20, "version https://git-") == 0) {
        return bad_input("%s: this is a Git LFS pointer, not the vocabulary", path.c_str()).hinted("run git lfs pull");
    }
    std::string bytes;
    size_t line = 0;
    for (size_t at = 0; at < text.size();) {
        line++;
        size_t end = text.find('\n', at);
        end = end == std::string::npos ? text.size() : end;
        size_t stop = end > at && text[end - 1] == '\r' ? end - 1 : end;
        const char* s = text.data() + at;
        size_t n = stop - at;
        at = end + 1;
        if (n == 0) {
            continue;
        }
        const char* space = (const char*)memchr(s, ' ', n);
        if (!space || !base64_decode(bytes, s, size_t(space - s)) || bytes.size() > BPE_MAX_TOKEN_BYTES) {
            return bad_input("%s:%zu: need `base64 rank`, found %s", path.c_str(), line,
                             printable(std::string(s, n), 60).c_str());
        }
        std::string rank(space + 1, size_t(s + n - space - 1));
        if (rank != std::to_string(vocabulary.size())) {
            return bad_input("%s:%zu: rank %s where %zu should follow", path.c_str(), line, printable(rank, 20).c_str(),
                             vocabulary.size())
                .hinted("the file is damaged: ranks go up by one from 0");
        }
        vocabulary.push_back(bytes);
    }
    return {};
}

Error tiktoken_read(Tokenizer& t, const std::string& path, int embedding_rows) {
    std::vector<std::string> vocabulary;
    if (Error e = tiktoken_read_vocabulary(vocabulary, path)) {
        return e;
    }
    size_t ordinary = vocabulary.size();
    size_t all = ordinary + SPECIAL_TOKENS;
    if (all > size_t(embedding_rows)) {
        return bad_input("%s: token id %zu has no embedding row (%zu tokens and %d special ones, the model has %d)",
                         path.c_str(), all - 1, ordinary, SPECIAL_TOKENS, embedding_rows)
            .hinted("the tokenizer and the weights do not belong together");
    }
    t.pieces = vocabulary;
    t.pieces.resize(all);
    t.added.assign(all, 0);
    int reserved = 0;
    for (int place = 0; place < SPECIAL_TOKENS; place++) {
        std::string name;
        for (const auto& special : SPECIAL_NAMES) {
            if (special.place == place) {
                name = special.name;
            }
        }
        if (name.empty()) {
            name = "<|reserved_special_token_" + std::to_string(reserved++) + "|>";
        }
        size_t id = ordinary + size_t(place);
        t.pieces[id] = name;
        t.added[id] = 2;
        added_token_insert(t.tries[0], name, int32_t(id));
    }
    vocabulary.resize(all);
    if (Error e = tokenizer_set_vocabulary(t, vocabulary, path)) {
        return e;
    }
    // Two tokens join when their bytes together are a token, in the order of its rank: every way to cut a token in two
    // is a pair, all of the same rank.
    for (size_t id = 0; id < ordinary; id++) {
        const std::string& token = vocabulary[id];
        for (size_t cut = 1; cut < token.size(); cut++) {
            int32_t left = bpe_find(t.bpe, token.data(), cut);
            int32_t right = left < 0 ? -1 : bpe_find(t.bpe, token.data() + cut, token.size() - cut);
            if (right >= 0) {
                bpe_add_pair(t.bpe, left, right, uint32_t(id), int32_t(id));
            }
        }
    }
    bpe_set_whole(t.bpe, true);
    t.bos = int(ordinary);
    t.eos = int(ordinary) + 1;
    return split_compile(t, SPLIT_LLAMA3);
}

// Both forms beside each other (Meta's own file and the converted one) should hold the same vocabulary.
void compare_with_tiktoken(Tokenizer& t, const std::string& path) {
    std::vector<std::string> vocabulary;
    Error e = tiktoken_read_vocabulary(vocabulary, path);
    if (e) {
        t.warnings.push_back(path + " is beside tokenizer.json and is not used (" + e.what + ")");
        return;
    }
    for (size_t id = 0; id < vocabulary.size() || id < t.pieces.size(); id++) {
        const char* first = id < vocabulary.size() ? vocabulary[id].c_str() : "";
        bool ordinary = id < t.pieces.size() && !t.added[id];
        if (id < vocabulary.size() ? !ordinary || t.pieces[id] != vocabulary[id] : ordinary && !t.pieces[id].empty()) {
            t.warnings.push_back(path + " and tokenizer.json differ, first at token id " + std::to_string(id) + " (" +
                                 printable(first, 40) + "); tokenizer.json is used");
            return;
        }
    }
}

// bos_token and the like: a string, or an object with content, or null. "" when there is none.
std::string token_text(const Json& config, const char* key) {
    const Json* value = config.find(key);
    if (value && value->type == Json::OBJECT) {
        value = value->find("content");
    }
    return value && value->type == Json::STRING ? value->string : "";
}

Error read_role(const Tokenizer& t, int* id, const Json& config, const char* key, const std::string& path) {
    std::string text = token_text(config, key);
    if (text.empty()) {
        return {};
    }
    int found = tokenizer_special_id(t, text.c_str());
    if (found < 0) {
        found = bpe_find(t.bpe, text.data(), text.size());
    }
    if (found < 0) {
        return bad_input("%s: %s is %s, which %s does not have", path.c_str(), key, printable(text).c_str(),
                         t.source.c_str());
    }
    *id = found;
    return {};
}

// A string, or a list of {"name", "template"} of which "default" is the one for chats.
std::string config_template(Tokenizer& t, const Json& config, const std::string& path) {
    const Json* value = config.find("chat_template");
    if (!value || value->type == Json::NUL) {
        return "";
    }
    if (value->type == Json::STRING) {
        return value->string;
    }
    if (value->type == Json::ARRAY) {
        for (const Json& entry : value->items) {
            const Json* name = entry.find("name");
            const Json* text = entry.find("template");
            if (name && name->type == Json::STRING && name->string == "default" && text && text->type == Json::STRING) {
                return text->string;
            }
        }
    }
    t.warnings.push_back(path + ": chat_template is neither a text nor a list with one named default; it is ignored");
    return "";
}

// tokenizer_config.json repeats the added tokens under their ids; they must be those of the vocabulary file.
Error check_added_tokens_decoder(Tokenizer& t, const Json& config, const std::string& path) {
    const Json* decoder = config.find("added_tokens_decoder");
    if (!decoder || decoder->type != Json::OBJECT) {
        return {};
    }
    for (size_t i = 0; i < decoder->keys.size(); i++) {
        const Json* content = decoder->items[i].find("content");
        if (!content || content->type != Json::STRING) {
            continue;
        }
        int id = tokenizer_special_id(t, content->string.c_str());
        std::string name = printable(content->string);
        if (id < 0) {
            t.warnings.push_back(path + ": added token " + name + " is not in " + t.source + "; it stays plain text");
        } else if (std::to_string(id) != decoder->keys[i]) {
            return bad_input("%s: added token %s has id %s, but %s gives it %d", path.c_str(), name.c_str(),
                             printable(decoder->keys[i], 20).c_str(), t.source.c_str(), id);
        } else if (Error e = added_token_flags(decoder->items[i], content->string, path)) {
            return e;
        }
    }
    return {};
}

Error read_config(Tokenizer& t, const std::string& model_dir, int template_bos) {
    bool have_bos = false, have_eos = false;
    for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
        std::string path = path_join(model_dir, name);
        if (!path_exists(path)) {
            continue;
        }
        Json config;
        if (Error e = json_read_file(config, path)) {
            return e;
        }
        if (config.type != Json::OBJECT) {
            return bad_input("%s: need an object, found %s", path.c_str(), config.type_name());
        }
        bool first = strcmp(name, "tokenizer_config.json") == 0;
        if (!have_bos) {
            if (Error e = read_role(t, &t.bos, config, "bos_token", path)) {
                return e;
            }
            have_bos = !token_text(config, "bos_token").empty();
        }
        if (!have_eos) {
            if (Error e = read_role(t, &t.eos, config, "eos_token", path)) {
                return e;
            }
            have_eos = !token_text(config, "eos_token").empty();
        }
        if (first) {
            t.chat_template = config_template(t, config, path);
            if (Error e = check_added_tokens_decoder(t, config, path)) {
                return e;
            }
        }
    }
    if (template_bos >= 0 && !have_bos) {
        t.bos = template_bos;
    } else if (template_bos >= 0 && template_bos != t.bos) {
        t.warnings.push_back(t.source + ": its post_processor puts " + printable(t.pieces[template_bos]) +
                             " in front of a text, but bos_token is " + printable(t.pieces[t.bos]) +
                             "; bos_token is used");
    }
    std::string jinja = path_join(model_dir, "chat_template.jinja");
    if (path_exists(jinja)) {
        return file_read_all(t.chat_template, jinja);
    }
    return {};
}

Error load(Tokenizer& t, const std::string& model_dir, int embedding_rows) {
    std::string json = path_join(model_dir, "tokenizer.json");
    std::string tiktoken = path_join(model_dir, "tokenizer.model");
    bool have_json = path_exists(json), have_tiktoken = path_exists(tiktoken);
    if (!have_json && !have_tiktoken) {
        return bad_input("%s: no tokenizer.json and no tokenizer.model in it", model_dir.c_str())
            .hinted("copy the model's tokenizer files there as well");
    }
    t.source = have_json ? json : tiktoken;
    int template_bos = -1;
    Error e = have_json ? tokenizer_json_read(t, json, embedding_rows, &template_bos)
                        : tiktoken_read(t, tiktoken, embedding_rows);
    if (e) {
        return e;
    }
    if (have_json && have_tiktoken) {
        compare_with_tiktoken(t, tiktoken);
    } else if (!have_json) {
        t.warnings.push_back(tiktoken + ": used, since there is no tokenizer.json");
    }
    if (Error hash_error = sha256_file(t.hash, t.source)) {
        return hash_error;
    }
    return read_config(t, model_dir, template_bos);
}

}  // namespace

Error tokenizer_set_vocabulary(Tokenizer& t, const std::vector<std::string>& vocabulary, const std::string& path) {
    int clash[2];
    if (!bpe_set_vocabulary(t.bpe, vocabulary, clash)) {
        return bad_input("%s: tokens %d and %d have the same bytes", path.c_str(), clash[0], clash[1]);
    }
    for (int byte = 0; byte < 256; byte++) {
        if (t.bpe.byte_id[byte] < 0) {
            return bad_input("%s: the vocabulary has no token for the byte 0x%02X", path.c_str(), byte)
                .hinted("a byte-level vocabulary must be able to spell any text");
        }
    }
    return {};
}

Error tokenizer_load(Tokenizer& t, const std::string& model_dir, int embedding_rows) {
    tokenizer_free(t);
    Error e = load(t, model_dir, embedding_rows);
    if (e) {
        tokenizer_free(t);
    }
    return e.or_hinted("the tokenizer's files must be the model's own, unchanged: get them again");
}
