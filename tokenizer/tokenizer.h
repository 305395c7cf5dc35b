// Text to tokens and back: reads tokenizer.json (byte-level BPE) or tokenizer.model (tiktoken form) of a model
// directory, splits text by the model's pattern, applies the merges. Knows no chat templates (their text is kept for
// whoever does), no records, no tensors. What it does not implement exactly it refuses by name.
//
//   text --added tokens--> segments --split pattern (PCRE2)--> pre-tokens --BPE on bytes--> ids
//
// The patterns are those of Llama-3 and of SmolLM2 (single digits, then GPT-2's). Giant runs are not cut (Meta's own
// wrapper cuts at 25,000 characters of a kind; HF tokenizers and tiktoken do not, and are followed).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "io/error.h"
#include "tokenizer/bpe.h"

// A node of a trie of added tokens: children are a list linked by `sibling`.
struct AddedNode {
    unsigned char byte = 0;
    int32_t child = -1, sibling = -1;
    int32_t id = -1;  // of the token that ends here, -1 none
};

struct Tokenizer {
    std::vector<std::string> pieces;  // id -> bytes of the token ("" for an id that does not exist)
    std::vector<uint8_t> added;       // id -> 0 ordinary, 1 added, 2 added and special (control)
    int bos = -1, eos = -1;           // ids of bos_token / eos_token of tokenizer_config.json; -1: none. Without
                                      // that: what tokenizer.json itself puts in front; tiktoken: Llama-3's two
    std::string chat_template;        // text, "": none (chat_template.jinja wins over tokenizer_config.json)
    std::string hash;                 // sha256 of the vocabulary file, for the checkpoint's fingerprint
    std::string source;               // path of the vocabulary file
    std::string unicode_version;      // of the split pattern's character classes, e.g. "14.0.0"
    std::vector<std::string> warnings;

    Bpe bpe;
    std::vector<AddedNode> tries[2];  // added tokens with normalized false, then those with true; [0] is the root
    void* pattern = nullptr;          // compiled split pattern and its limits, read-only after load
    void* pattern_limits = nullptr;
    uint64_t serial = 0;  // differs for every load; per-thread caches go by it
};

// tokenizer.json, else tokenizer.model (tiktoken); both: tokenizer.json, with a warning where they differ. Every id
// must be < embedding_rows. Errors: code 2, with file and what is wrong; t is then freed.
Error tokenizer_load(Tokenizer& t, const std::string& model_dir, int embedding_rows);
void tokenizer_free(Tokenizer& t);

// Appends the ids of n bytes of valid UTF-8. Never adds BOS or EOS. Safe from many threads at once.
// parse_special true: every added token's text becomes its id (leftmost, longest), as HF tokenizers does by default.
// parse_special false: only added tokens that are not special do, so data cannot forge a control token; text that
// spells a special token is ordinary text (HF's split_special_tokens, Meta's chat format).
void tokenizer_encode(const Tokenizer& t, std::vector<int32_t>& ids, const char* text, size_t n, bool parse_special);
size_t tokenizer_count_special(const Tokenizer& t, const char* text, size_t n);  // special tokens' texts in it
int tokenizer_special_id(const Tokenizer& t, const char* content);               // id of an added token by its text, -1
// The tokens' bytes, joined; may end or begin inside a character. Ids that do not exist give nothing.
std::string tokenizer_decode(const Tokenizer& t, const int32_t* ids, size_t n, bool skip_special);

// Strict UTF-8 (no surrogates, nothing overlong, nothing above U+10FFFF); bad_at: first byte of the first bad sequence.
bool utf8_validate(const char* text, size_t n, size_t* bad_at);
// One U+FFFD for each maximal ill-formed subpart (WHATWG's decoder); replaced: how many.
std::string utf8_replace_invalid(const char* text, size_t n, size_t* replaced);
std::string python_strip(const std::string& s);  // Python's str.strip() on valid UTF-8
bool is_blank(const std::string& s);             // nothing but the characters that python_strip strips

// Inside this folder: what tokenizer_load is made of.
enum SplitPattern { SPLIT_LLAMA3, SPLIT_DIGITS_GPT2 };
Error split_compile(Tokenizer& t, SplitPattern pattern);
void added_token_insert(std::vector<AddedNode>& trie, const std::string& content, int32_t id);
// Fills everything but the texts and ids of tokenizer_config.json. template_bos: the added token that the file's own
// post-processor puts in front, -1 none (callers of tokenizer_encode do that, not we).
Error tokenizer_json_read(Tokenizer& t, const std::string& path, int embedding_rows, int* template_bos);
// The bounds of every id and the byte alphabet, checked where both readers end.
Error tokenizer_set_vocabulary(Tokenizer& t, const std::vector<std::string>& vocabulary, const std::string& path);
// Added tokens whose flags ask for what is not implemented (lstrip, rstrip, single_word) are refused.
struct Json;
Error added_token_flags(const Json& token, const std::string& content, const std::string& path);
