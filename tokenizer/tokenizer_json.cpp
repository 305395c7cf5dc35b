// Reads tokenizer.json of HF tokenizers: model BPE over bytes, added tokens, and the components around them. Every
// component is either recognised whole or refused by its name; nothing is skipped.
//
// Vocabulary and merges are spelt in GPT-2's byte alphabet: 21-7E, A1-AC and AE-FF stand for themselves, the other 68
// bytes in rising order for U+0100, U+0101, ... (the space is U+0120).
#include <string_view>
#include <unordered_map>

#include "io/file.h"
#include "io/json.h"
#include "tokenizer/tokenizer.h"

namespace {

const char* const LLAMA3_SPLIT =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

typedef std::unordered_map<std::string_view, int32_t> TokenIds;

struct ByteAlphabet {
    int16_t byte_of[324];  // code point -> byte, -1: not in the alphabet
};

ByteAlphabet byte_alphabet() {
    ByteAlphabet a;
    for (int16_t& b : a.byte_of) {
        b = -1;
    }
    int next = 256;
    for (int b = 0; b < 256; b++) {
        bool itself = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        a.byte_of[itself ? b : next++] = int16_t(b);
    }
    return a;
}

// The bytes that a token of the file stands for; false when it has characters outside the alphabet. All of the
// alphabet is below U+0800: one or two bytes of UTF-8.
bool bytes_of_token(std::string& bytes, std::string_view token) {
    static const ByteAlphabet alphabet = byte_alphabet();
    bytes.clear();
    for (size_t i = 0; i < token.size(); i++) {
        unsigned c = (unsigned char)token[i];
        if (c >= 0x80) {
            if (c >= 0xE0 || i + 1 == token.size()) {
                return false;
            }
            c = (c & 0x1F) << 6 | ((unsigned char)token[++i] & 0x3F);
        }
        if (c >= 324 || alphabet.byte_of[c] < 0) {
            return false;
        }
        bytes += char(alphabet.byte_of[c]);
    }
    return true;
}

// The value of a key, nullptr when it is absent or null.
const Json* present(const Json& object, const char* key) {
    const Json* value = object.find(key);
    return value && value->type != Json::NUL ? value : nullptr;
}

bool is_true(const Json& object, const char* key) {
    const Json* value = object.find(key);
    return value && value->type == Json::BOOL && value->boolean;
}

// A flag of a component whose absence means `otherwise`.
bool flag(const Json& object, const char* key, bool otherwise) {
    const Json* value = object.find(key);
    return value && value->type == Json::BOOL ? value->boolean : otherwise;
}

bool is_string(const Json* value, const char* text) {
    return value && value->type == Json::STRING && value->string == text;
}

// "Sequence[Split, ByteLevel]", for messages.
std::string component_name(const Json& component, const char* list) {
    const Json* type = component.find("type");
    std::string name = type && type->type == Json::STRING ? printable(type->string) : "(no type)";
    const Json* parts = component.find(list);
    if (parts && parts->type == Json::ARRAY) {
        name += "[";
        for (size_t i = 0; i < parts->items.size() && i < 8; i++) {
            name += (i ? ", " : "") + component_name(parts->items[i], list);
        }
        name += "]";
    }
    return name;
}

Error unsupported(const std::string& path, const char* what, const std::string& name, const char* need) {
    return bad_input("%s: %s %s is not supported (need %s)", path.c_str(), what, name.c_str(), need)
        .hinted("this program reads the tokenizers of Llama-3 and SmolLM2 models; it does not approximate others");
}

bool is_byte_level(const Json& c, bool use_regex) {
    return is_string(c.find("type"), "ByteLevel") && !flag(c, "add_prefix_space", true) &&
           flag(c, "use_regex", true) == use_regex;
}

Error read_pre_tokenizer(SplitPattern* pattern, const Json& root, const std::string& path) {
    const char* need = "Llama-3's Sequence[Split, ByteLevel] or SmolLM2's Sequence[Digits, ByteLevel]";
    const Json* pre = present(root, "pre_tokenizer");
    if (!pre) {
        return unsupported(path, "pre_tokenizer", "null", need);
    }
    const Json* parts = pre->find("pretokenizers");
    bool sequence = is_string(pre->find("type"), "Sequence") && parts && parts->type == Json::ARRAY;
    if (sequence && parts->items.size() == 2) {
        const Json& first = parts->items[0];
        const Json& second = parts->items[1];
        const Json* split = first.find("pattern");
        if (is_string(first.find("type"), "Split") && is_byte_level(second, false)) {
            const Json* regex = split ? split->find("Regex") : nullptr;
            if (!is_string(regex, LLAMA3_SPLIT)) {
                bool text = regex && regex->type == Json::STRING;
                return bad_input("%s: unknown split pattern (found %s, need Llama-3's)", path.c_str(),
                                 text ? printable(regex->string, 200).c_str() : "no Regex")
                    .hinted("another pattern cuts text elsewhere, and the model would see tokens it does not know");
            }
            if (is_string(first.find("behavior"), "Isolated") && !is_true(first, "invert")) {
                *pattern = SPLIT_LLAMA3;
                return {};
            }
            return unsupported(path, "pre_tokenizer", "Split", "behavior Isolated, not inverted");
        }
        if (is_string(first.find("type"), "Digits") && is_byte_level(second, true)) {
            if (is_true(first, "individual_digits")) {
                *pattern = SPLIT_DIGITS_GPT2;
                return {};
            }
            return unsupported(path, "pre_tokenizer", "Digits", "individual_digits true");
        }
        if (is_string(second.find("type"), "ByteLevel") && flag(second, "add_prefix_space", true)) {
            return unsupported(path, "pre_tokenizer", "ByteLevel with add_prefix_space true", need);
        }
    }
    return unsupported(path, "pre_tokenizer", component_name(*pre, "pretokenizers"), need);
}

// TemplateProcessing: "$A", or one added token and "$A".
Error read_template(const Tokenizer& t, const Json& c, const std::string& path, int* template_bos) {
    const char* need = "the text alone or after one added token";
    const Json* single = c.find("single");
    if (!single || single->type != Json::ARRAY || single->items.empty() || single->items.size() > 2 ||
        !single->items.back().find("Sequence")) {
        return unsupported(path, "post_processor", "TemplateProcessing", need);
    }
    if (single->items.size() == 1) {
        return {};
    }
    const Json* token = single->items[0].find("SpecialToken");
    const Json* name = token ? token->find("id") : nullptr;
    if (!name || name->type != Json::STRING) {
        return unsupported(path, "post_processor", "TemplateProcessing", need);
    }
    int id = tokenizer_special_id(t, name->string.c_str());
    const Json* tokens = c.find("special_tokens");
    const Json* entry = tokens ? tokens->find(name->string.c_str()) : nullptr;
    const Json* ids = entry ? entry->find("ids") : nullptr;
    if (id < 0 || !ids || ids->type != Json::ARRAY || ids->items.size() != 1 || ids->items[0].type != Json::INT ||
        ids->items[0].integer != id) {
        return bad_input("%s: post_processor names %s with other ids than its added token has", path.c_str(),
                         printable(name->string).c_str());
    }
    *template_bos = id;
    return {};
}

Error read_post_processor(const Tokenizer& t, const Json& c, const std::string& path, int* template_bos) {
    const Json* type = c.find("type");
    const Json* parts = c.find("processors");
    if (is_string(type, "ByteLevel")) {
        return {};  // moves offsets only
    }
    if (is_string(type, "TemplateProcessing")) {
        return read_template(t, c, path, template_bos);
    }
    if (is_string(type, "Sequence") && parts && parts->type == Json::ARRAY) {
        for (const Json& part : parts->items) {
            if (is_string(part.find("type"), "Sequence")) {
                return unsupported(path, "post_processor", component_name(c, "processors"), "one level");
            }
            if (Error e = read_post_processor(t, part, path, template_bos)) {
                return e;
            }
        }
        return {};
    }
    return unsupported(path, "post_processor", component_name(c, "processors"), "ByteLevel or TemplateProcessing");
}

// What of the BPE model changes the merging, and is not what Llama-3 has.
Error check_model(const Json& model, const std::string& path) {
    const Json* type = model.find("type");
    if (!is_string(type, "BPE")) {
        std::string name = type && type->type == Json::STRING ? printable(type->string) : "(no type)";
        return unsupported(path, "model type", name, "BPE");
    }
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
        const Json* value = present(model, key);
        if (value && !is_string(value, "")) {
            return unsupported(path, "model option", key, "null");
        }
    }
    const Json* dropout = present(model, "dropout");
    if (dropout && !(dropout->is_number() && dropout->number() == 0)) {
        return unsupported(path, "model option", "dropout", "null");
    }
    if (is_true(model, "byte_fallback")) {
        return unsupported(path, "model option", "byte_fallback", "false: a vocabulary of bytes");
    }
    return {};
}

Error no_row(const std::string& path, const std::string& token, const std::string& id, int rows) {
    return bad_input("%s: token id %s (%s) has no embedding row (the model has %d)", path.c_str(), id.c_str(),
                     printable(token).c_str(), rows)
        .hinted("the tokenizer and the weights do not belong together, or a token was added without enlarging them");
}

// id as a number within [0, rows), or what is wrong with it.
Error token_id(int32_t* id, const Json* value, const std::string& token, const std::string& path, int rows) {
    if (!value || (value->type != Json::INT && value->type != Json::UINT) ||
        (value->type == Json::INT && value->integer < 0)) {
        return bad_input("%s: token %s: its id is %s, need a whole number from 0", path.c_str(),
                         printable(token).c_str(), value ? printable(json_write(*value), 40).c_str() : "absent");
    }
    if (value->type == Json::UINT || value->integer >= rows) {
        return no_row(path, token, json_write(*value), rows);
    }
    *id = int32_t(value->integer);
    return {};
}

Error claim_id(std::vector<const std::string*>& owner, int32_t id, const std::string& token, const std::string& path) {
    if (size_t(id) >= owner.size()) {
        owner.resize(size_t(id) + 1, nullptr);
    }
    if (owner[id] && *owner[id] != token) {
        return bad_input("%s: tokens %s and %s share id %d", path.c_str(), printable(*owner[id]).c_str(),
                         printable(token).c_str(), id);
    }
    owner[id] = &token;
    return {};
}

Error read_added_tokens(Tokenizer& t, std::vector<const std::string*>& owner, const Json& root, const TokenIds& ids,
                        const std::string& path, int rows) {
    const Json* list = present(root, "added_tokens");
    if (!list) {
        return {};
    }
    if (list->type != Json::ARRAY) {
        return bad_input("%s: added_tokens: need an array, found %s", path.c_str(), list->type_name());
    }
    int64_t largest = -1;
    for (const Json& token : list->items) {
        const Json* content = token.find("content");
        if (!content || content->type != Json::STRING || content->string.empty()) {
            return bad_input("%s: added_tokens: an entry without content", path.c_str());
        }
        const std::string& text = content->string;
        int32_t id = -1;
        if (Error e = token_id(&id, token.find("id"), text, path, rows)) {
            return e;
        }
        if (Error e = added_token_flags(token, text, path)) {
            return e;
        }
        if (tokenizer_special_id(t, text.c_str()) >= 0) {
            return bad_input("%s: added token %s is there twice", path.c_str(), printable(text).c_str());
        }
        // The reference ignores the id written here: it takes the vocabulary's own, else the next free one.
        auto known = ids.find(text);
        int64_t next = largest >= int64_t(ids.size()) ? largest + 1 : int64_t(ids.size());
        int64_t expected = known != ids.end() ? known->second : next;
        if (id != expected) {
            return bad_input(
                "%s: added token %s has id %d, but %s gives it %lld", path.c_str(), printable(text).c_str(), id,
                known != ids.end() ? "the vocabulary" : "its place after the vocabulary", (long long)expected);
        }
        largest = id > largest ? id : largest;
        if (Error e = claim_id(owner, id, text, path)) {
            return e;
        }
        if (t.pieces.size() < owner.size()) {
            t.pieces.resize(owner.size());
            t.added.resize(owner.size(), 0);
        }
        t.pieces[id] = text;
        t.added[id] = is_true(token, "special") ? 2 : 1;
        added_token_insert(t.tries[flag(token, "normalized", true)], text, id);
    }
    return {};
}

Error read_merges(Bpe& b, const Json& model, const std::string& path) {
    const Json* merges = model.find("merges");
    if (!merges || merges->type != Json::ARRAY) {
        return bad_input("%s: model.merges: need an array, found %s", path.c_str(),
                         merges ? merges->type_name() : "nothing");
    }
    std::string left, right;
    for (size_t i = 0; i < merges->items.size(); i++) {
        const Json& m = merges->items[i];
        std::string_view a, c;
        bool pair = m.type == Json::ARRAY && m.items.size() == 2 && m.items[0].type == Json::STRING &&
                    m.items[1].type == Json::STRING;
        if (pair) {
            a = m.items[0].string;
            c = m.items[1].string;
        } else if (m.type == Json::STRING) {
            size_t space = m.string.find(' ');
            pair = space != std::string::npos && m.string.find(' ', space + 1) == std::string::npos;
            if (pair) {
                a = std::string_view(m.string).substr(0, space);
                c = std::string_view(m.string).substr(space + 1);
            }
        }
        if (!pair || a.empty() || c.empty()) {
            return bad_input("%s: merge %zu: need two tokens, found %s", path.c_str(), i + 1,
                             printable(json_write(m)).c_str());
        }
        int32_t left_id = bytes_of_token(left, a) ? bpe_find(b, left.data(), left.size()) : -1;
        int32_t right_id = bytes_of_token(right, c) ? bpe_find(b, right.data(), right.size()) : -1;
        if (left_id < 0 || right_id < 0) {
            return bad_input("%s: merge %zu: token %s is not in the vocabulary", path.c_str(), i + 1,
                             printable(std::string(left_id < 0 ? a : c)).c_str());
        }
        left += right;
        int32_t id = bpe_find(b, left.data(), left.size());
        if (id < 0) {
            return bad_input("%s: merge %zu: its result %s is not in the vocabulary", path.c_str(), i + 1,
                             printable(std::string(a) + std::string(c)).c_str());
        }
        if (!bpe_add_pair(b, left_id, right_id, uint32_t(i), id)) {
            return bad_input("%s: merge %zu (%s %s) is there twice", path.c_str(), i + 1,
                             printable(std::string(a)).c_str(), printable(std::string(c)).c_str());
        }
    }
    return {};
}

// Vocabulary and added tokens: pieces, added, the byte strings of the BPE (an added token with characters outside the
// byte alphabet is no part of those).
Error read_vocabulary(Tokenizer& t, const Json& root, const Json& model, const std::string& path, int rows) {
    const Json* vocab = model.find("vocab");
    if (!vocab || vocab->type != Json::OBJECT || vocab->keys.empty()) {
        return bad_input("%s: model.vocab: need an object with tokens", path.c_str());
    }
    TokenIds ids;
    ids.reserve(vocab->keys.size());
    std::vector<const std::string*> owner;
    for (size_t i = 0; i < vocab->keys.size(); i++) {
        const std::string& token = vocab->keys[i];
        int32_t id = -1;
        if (token.empty() || token.size() > BPE_MAX_TOKEN_BYTES) {
            return bad_input("%s: a token of %zu bytes in the vocabulary (need 1 to %zu)", path.c_str(), token.size(),
                             BPE_MAX_TOKEN_BYTES);
        }
        if (Error e = token_id(&id, &vocab->items[i], token, path, rows)) {
            return e;
        }
        if (Error e = claim_id(owner, id, token, path)) {
            return e;
        }
        ids.emplace(token, id);
    }
    t.pieces.resize(owner.size());
    t.added.resize(owner.size(), 0);
    if (Error e = read_added_tokens(t, owner, root, ids, path, rows)) {
        return e;
    }
    std::vector<std::string> vocabulary(owner.size());
    for (size_t i = 0; i < vocab->keys.size(); i++) {
        int64_t id = vocab->items[i].integer;
        bool known = bytes_of_token(vocabulary[id], vocab->keys[i]);
        if (!known) {
            vocabulary[id].clear();
        }
        if (!known && !t.added[id]) {
            return bad_input("%s: token %s (id %lld) is not spelt in the byte alphabet", path.c_str(),
                             printable(vocab->keys[i]).c_str(), (long long)id)
                .hinted("only byte-level vocabularies are supported");
        }
        if (!t.added[id]) {
            t.pieces[id] = vocabulary[id];
        }
    }
    return tokenizer_set_vocabulary(t, vocabulary, path);
}

}  // namespace

Error added_token_flags(const Json& token, const std::string& content, const std::string& path) {
    for (const char* key : {"lstrip", "rstrip", "single_word"}) {
        if (is_true(token, key)) {
            return bad_input("%s: added token %s: %s is not supported", path.c_str(), printable(content).c_str(), key);
        }
    }
    return {};
}

Error tokenizer_json_read(Tokenizer& t, const std::string& path, int embedding_rows, int* template_bos) {
    *template_bos = -1;
    Json root;
    if (Error e = json_read_file(root, path)) {
        return e;
    }
    const Json* model = root.find("model");
    if (!model || model->type != Json::OBJECT) {
        return bad_input("%s: no model in it: this is not a tokenizer of HF tokenizers", path.c_str());
    }
    if (Error e = check_model(*model, path)) {
        return e;
    }
    if (const Json* normalizer = present(root, "normalizer")) {
        return unsupported(path, "normalizer", component_name(*normalizer, "normalizers"), "null");
    }
    SplitPattern pattern = SPLIT_LLAMA3;
    if (Error e = read_pre_tokenizer(&pattern, root, path)) {
        return e;
    }
    const Json* decoder = present(root, "decoder");
    if (!decoder || !is_string(decoder->find("type"), "ByteLevel")) {
        return unsupported(path, "decoder", decoder ? component_name(*decoder, "decoders") : "null", "ByteLevel");
    }
    if (Error e = read_vocabulary(t, root, *model, path, embedding_rows)) {
        return e;
    }
    if (Error e = read_merges(t.bpe, *model, path)) {
        return e;
    }
    bpe_set_whole(t.bpe, is_true(*model, "ignore_merges"));
    if (const Json* post = present(root, "post_processor")) {
        if (Error e = read_post_processor(t, *post, path, template_bos)) {
            return e;
        }
    }
    return split_compile(t, pattern);
}
