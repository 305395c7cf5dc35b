// Encoding and decoding: added tokens, the split pattern, the per-thread cache in front of the merges. The tables are
// filled by tokenizer_load.cpp and tokenizer_json.cpp.
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer/tokenizer.h"

#include <pcre2.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

// The model's own patterns with \s and \S written as the property that the reference libraries mean by them (PCRE2's
// \s also takes U+180E). [^\s...] becomes [^\p{White_Space}...]. Every character is matched by some alternative, so
// the pre-tokens cover the text without gaps.
const char* const PATTERNS[] = {
    // Llama-3
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
    "| ?[^\\p{White_Space}\\p{L}\\p{N}]+[\\r\\n]*|\\p{White_Space}*[\\r\\n]+"
    "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
    // SmolLM2: each numeric character alone, then GPT-2's pattern within what lies between them. As one pattern: a
    // numeric character ends the text that the look-ahead sees, so white space before it is taken whole.
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+"
    "|\\p{White_Space}+(?![^\\p{White_Space}\\p{N}])|\\p{White_Space}+|\\p{N}",
};

// Ids of a pre-token seen before. One cache line each; longer ones are not kept.
struct CachedPiece {
    static const size_t MAX_BYTES = 26, MAX_IDS = 9;
    uint8_t bytes = 0;  // 0: empty slot
    uint8_t count = 0;
    char text[MAX_BYTES];
    int32_t ids[MAX_IDS];
};
static_assert(sizeof(CachedPiece) == 64, "one cache line");
const size_t CACHE_SLOTS = size_t(1) << 14;  // 1 MB a thread

// What a thread keeps between calls.
struct ThreadState {
    pcre2_match_data* match = nullptr;
    uint64_t serial = 0;  // of the tokenizer that the cache belongs to
    std::vector<CachedPiece> cache;

    ~ThreadState() { pcre2_match_data_free(match); }
};

ThreadState& thread_state(const Tokenizer& t) {
    thread_local ThreadState state;
    if (!state.match) {
        state.match = pcre2_match_data_create(1, nullptr);
    }
    if (state.serial != t.serial) {
        state.cache.assign(CACHE_SLOTS, CachedPiece());
        state.serial = t.serial;
    }
    return state;
}

void encode_piece(const Bpe& b, ThreadState& state, std::vector<int32_t>& ids, const char* text, size_t n) {
    if (n > CachedPiece::MAX_BYTES) {
        int32_t id = bpe_find(b, text, n);
        if (id >= 0 && b.whole[id]) {
            ids.push_back(id);
        } else {
            bpe_merge(b, ids, text, n);
        }
        return;
    }
    CachedPiece& c = state.cache[bpe_hash(text, n) >> 32 & (CACHE_SLOTS - 1)];
    if (c.bytes == n && memcmp(c.text, text, n) == 0) {
        for (size_t i = 0; i < c.count; i++) {
            ids.push_back(c.ids[i]);
        }
        return;
    }
    size_t before = ids.size();
    int32_t id = bpe_find(b, text, n);
    if (id >= 0 && b.whole[id]) {
        ids.push_back(id);
    } else {
        bpe_merge(b, ids, text, n);
    }
    size_t count = ids.size() - before;
    if (count <= CachedPiece::MAX_IDS) {
        c.bytes = uint8_t(n);
        c.count = uint8_t(count);
        memcpy(c.text, text, n);
        memcpy(c.ids, ids.data() + before, count * sizeof(int32_t));
    }
}

// The pre-token that begins at `at`: returns its end. The look-ahead sees the end of the segment, n.
size_t split_next(const Tokenizer& t, ThreadState& state, const char* text, size_t n, size_t at) {
    const pcre2_code* code = (const pcre2_code*)t.pattern;
    pcre2_match_context* limits = (pcre2_match_context*)t.pattern_limits;
    int rc = pcre2_match(code, PCRE2_SPTR(text), n, at, PCRE2_NO_UTF_CHECK, state.match, limits);
    if (rc < 0) {
        // The patterns match every character, so only a failed allocation of PCRE2 gets here.
        fprintf(stderr, "error: the split pattern failed at byte %zu of %zu (PCRE2 error %d)\n", at, n, rc);
        abort();
    }
    return pcre2_get_ovector_pointer(state.match)[1];
}

void encode_segment(const Tokenizer& t, ThreadState& state, std::vector<int32_t>& ids, const char* text, size_t n) {
    for (size_t at = 0; at < n;) {
        size_t end = split_next(t, state, text, n, at);
        encode_piece(t.bpe, state, ids, text + at, end - at);
        at = end;
    }
}

// The longest added token that begins at text; its length in *length, -1 when there is none.
int32_t added_token_at(const std::vector<AddedNode>& trie, const char* text, size_t n, size_t* length) {
    int32_t found = -1;
    int32_t node = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t child = trie[node].child;
        while (child >= 0 && trie[child].byte != (unsigned char)text[i]) {
            child = trie[child].sibling;
        }
        if (child < 0) {
            break;
        }
        node = child;
        if (trie[node].id >= 0) {
            found = trie[node].id;
            *length = i + 1;
        }
    }
    return found;
}

// First added token at or after `at` (leftmost, then longest); n when there is none. All tokens of a real model begin
// with the same byte, which memchr finds quickly.
size_t added_token_next(const std::vector<AddedNode>& trie, const char* text, size_t n, size_t at, size_t* length,
                        int32_t* id) {
    if (trie.size() <= 1) {
        return n;
    }
    const AddedNode& only = trie[trie[0].child];
    while (at < n) {
        if (only.sibling < 0) {
            const void* hit = memchr(text + at, only.byte, n - at);
            if (!hit) {
                return n;
            }
            at = size_t((const char*)hit - text);
        }
        *id = added_token_at(trie, text + at, n - at, length);
        if (*id >= 0) {
            return at;
        }
        at++;
    }
    return n;
}

// HF tokenizers looks for the added tokens that are not "normalized" first and for the others in what is left; with
// no normalizer (any is refused at load) that order is all there is to the flag. A special token that is not parsed
// still hides a shorter match inside it, there as here.
void encode_added(const Tokenizer& t, ThreadState& state, std::vector<int32_t>& ids, const char* text, size_t n,
                  bool parse_special, int pass) {
    if (pass == 2) {
        encode_segment(t, state, ids, text, n);
        return;
    }
    size_t done = 0, at = 0, length = 0;
    int32_t id = -1;
    while ((at = added_token_next(t.tries[pass], text, n, at, &length, &id)) < n) {
        if (t.added[id] == 2 && !parse_special) {
            at += length;
            continue;
        }
        encode_added(t, state, ids, text + done, at - done, parse_special, pass + 1);
        ids.push_back(id);
        at += length;
        done = at;
    }
    encode_added(t, state, ids, text + done, n - done, parse_special, pass + 1);
}

}  // namespace

Error split_compile(Tokenizer& t, SplitPattern pattern) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    // anchored: the pattern is only ever asked what begins right here
    pcre2_code* code = pcre2_compile(PCRE2_SPTR(PATTERNS[pattern]), PCRE2_ZERO_TERMINATED,
                                     PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &error, &offset, nullptr);
    if (!code) {
        char message[256] = "";
        pcre2_get_error_message(error, (PCRE2_UCHAR*)message, sizeof(message));
        return runtime_failure("PCRE2 does not take the split pattern: %s (at %zu)", message, size_t(offset))
            .hinted("PCRE2 10.40 or newer with Unicode support is needed");
    }
    t.pattern = code;
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where there is no JIT the interpreter gives the same matches
    pcre2_match_context* limits = pcre2_match_context_create(nullptr);
    if (!limits) {
        return runtime_failure("out of memory for the split pattern");
    }
    // A run of millions of spaces backtracks once over its length, more than the default limits allow.
    pcre2_set_match_limit(limits, UINT32_MAX);
    pcre2_set_depth_limit(limits, UINT32_MAX);
    pcre2_set_heap_limit(limits, UINT32_MAX);
    t.pattern_limits = limits;
    char version[64] = "";
    pcre2_config(PCRE2_CONFIG_UNICODE_VERSION, version);
    t.unicode_version = version;
    static std::atomic<uint64_t> loads{0};
    t.serial = ++loads;
    return {};
}

void added_token_insert(std::vector<AddedNode>& trie, const std::string& content, int32_t id) {
    if (trie.empty()) {
        trie.push_back(AddedNode());
    }
    int32_t node = 0;
    for (char c : content) {
        int32_t child = trie[node].child;
        while (child >= 0 && trie[child].byte != (unsigned char)c) {
            child = trie[child].sibling;
        }
        if (child < 0) {
            AddedNode fresh;
            fresh.byte = (unsigned char)c;
            fresh.sibling = trie[node].child;
            child = int32_t(trie.size());
            trie.push_back(fresh);
            trie[node].child = child;
        }
        node = child;
    }
    trie[node].id = id;
}

void tokenizer_free(Tokenizer& t) {
    pcre2_code_free((pcre2_code*)t.pattern);
    pcre2_match_context_free((pcre2_match_context*)t.pattern_limits);
    t = Tokenizer();
}

void tokenizer_encode(const Tokenizer& t, std::vector<int32_t>& ids, const char* text, size_t n, bool parse_special) {
    encode_added(t, thread_state(t), ids, text, n, parse_special, 0);
}

size_t tokenizer_count_special(const Tokenizer& t, const char* text, size_t n) {
    size_t count = 0;
    for (const std::vector<AddedNode>& trie : t.tries) {
        size_t at = 0, length = 0;
        int32_t id = -1;
        while ((at = added_token_next(trie, text, n, at, &length, &id)) < n) {
            count += t.added[id] == 2;
            at += length;
        }
    }
    return count;
}

int tokenizer_special_id(const Tokenizer& t, const char* content) {
    size_t n = strlen(content);
    for (const std::vector<AddedNode>& trie : t.tries) {
        size_t length = 0;
        int32_t id = trie.empty() ? -1 : added_token_at(trie, content, n, &length);
        if (id >= 0 && length == n) {
            return id;
        }
    }
    return -1;
}

std::string tokenizer_decode(const Tokenizer& t, const int32_t* ids, size_t n, bool skip_special) {
    std::string text;
    for (size_t i = 0; i < n; i++) {
        int32_t id = ids[i];
        if (id < 0 || size_t(id) >= t.pieces.size() || (skip_special && t.added[id] == 2)) {
            continue;
        }
        text += t.pieces[id];
    }
    return text;
}
