// Byte-pair encoding of one pre-token: the vocabulary as a hash table of byte strings, the merges as a hash table of
// id pairs, and the two loops that apply them. No files, no pattern, no added tokens.
//
//   start from single bytes; while some adjacent pair has a merge, join the pair of lowest (rank, position)
//
// The order is that of the reference libraries (HF tokenizers: rank = line of the merge; tiktoken: rank = id of the
// joined token); ties go to the leftmost pair.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

const size_t BPE_MAX_TOKEN_BYTES = 1024;  // readers refuse longer ones; the longest of Llama-3 has 128

struct BpePair {
    uint32_t left = UINT32_MAX, right = 0;  // left UINT32_MAX: empty slot
    uint32_t rank = 0, id = 0;
};

struct Bpe {
    std::vector<char> bytes;      // all tokens' bytes, one after the other
    std::vector<uint32_t> first;  // token id -> its first byte in `bytes`; one entry more than tokens
    std::vector<int32_t> slots;   // open addressing, hash of bytes -> id, -1 empty
    std::vector<uint8_t> whole;   // id -> 1 when a pre-token with just these bytes becomes this id at once
    std::vector<BpePair> pairs;   // open addressing, (left, right) -> rank and joined id
    size_t pair_count = 0;
    int32_t byte_id[256];  // id of each single byte
};

uint64_t bpe_hash(const char* text, size_t n);

// pieces: id -> bytes, "" for ids that are not in the vocabulary (added tokens among them). False: two ids have the
// same bytes; they come back in clash, and the caller words the message. Also sets byte_id, -1 for a missing byte.
bool bpe_set_vocabulary(Bpe& b, const std::vector<std::string>& pieces, int clash[2]);
int32_t bpe_find(const Bpe& b, const char* text, size_t n);                         // id of exactly these bytes, -1
bool bpe_add_pair(Bpe& b, int32_t left, int32_t right, uint32_t rank, int32_t id);  // false: the pair is there already
const BpePair* bpe_find_pair(const Bpe& b, uint32_t left, uint32_t right);          // nullptr: does not merge
// Sets `whole`: every token (ignore_merges), or those that their own merges rebuild. After pairs and byte_id are set.
void bpe_set_whole(Bpe& b, bool ignore_merges);

// The merges alone, without the look-up of the whole piece. Both give the same ids; bpe_merge picks by length.
// scan: quadratic in n with a tiny constant. lists: n log n at worst, for runs of any length below 2^32 - 1 bytes.
void bpe_merge_scan(const Bpe& b, std::vector<int32_t>& ids, const char* text, size_t n);
void bpe_merge_lists(const Bpe& b, std::vector<int32_t>& ids, const char* text, size_t n);
void bpe_merge(const Bpe& b, std::vector<int32_t>& ids, const char* text, size_t n);
