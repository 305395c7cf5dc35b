// See bpe.h. Both hash tables are open addressing with linear probing, at most half full, so a look-up is nearly
// always one cache line; they are built once and read by every thread.
#include "tokenizer/bpe.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <queue>
#include <unordered_map>

namespace {

const uint32_t NO_RANK = UINT32_MAX;
const uint32_t END = UINT32_MAX;

// 64 x 64 -> 128 bit product folded to 64: every input bit reaches every output bit.
uint64_t mix(uint64_t a, uint64_t b) {
    unsigned __int128 p = (unsigned __int128)a * b;
    return uint64_t(p) ^ uint64_t(p >> 64);
}

size_t power_of_two_above(size_t n) {
    size_t size = 16;
    while (size < n) {
        size *= 2;
    }
    return size;
}

uint64_t hash_pair(uint32_t left, uint32_t right) {
    return mix((uint64_t(left) << 32 | right) ^ UINT64_C(0x9E3779B97F4A7C15), UINT64_C(0xD6E8FEB86659FD93));
}

void insert_pair(std::vector<BpePair>& table, const BpePair& p) {
    size_t mask = table.size() - 1;
    size_t i = hash_pair(p.left, p.right) & mask;
    while (table[i].left != UINT32_MAX) {
        i = (i + 1) & mask;
    }
    table[i] = p;
}

// Symbols of the long-run algorithm: a doubly linked list over the byte positions where a symbol begins, and for each
// rank the list of positions that had it when they were added. An entry is stale when rank[position] has moved on.
struct RankList {
    std::vector<uint32_t> at;
    size_t next = 0;  // entries before it are done
    bool sorted = true;
    bool queued = false;
};

struct Run {
    const Bpe* bpe;
    std::vector<uint32_t> id, rank, before, after;
    std::unordered_map<uint32_t, RankList> lists;
    std::priority_queue<uint32_t, std::vector<uint32_t>, std::greater<uint32_t>> ranks;
    uint32_t last_rank = NO_RANK;  // the list used last: runs of one character ask for the same one again and again
    RankList* last = nullptr;
};

// Recomputes the rank of the pair that begins at p and enters it into its list.
void run_update(Run& r, uint32_t p) {
    uint32_t q = r.after[p];
    const BpePair* pair = q == END ? nullptr : bpe_find_pair(*r.bpe, r.id[p], r.id[q]);
    r.rank[p] = pair ? pair->rank : NO_RANK;
    if (!pair) {
        return;
    }
    if (pair->rank != r.last_rank) {
        r.last_rank = pair->rank;
        r.last = &r.lists[pair->rank];  // unordered_map never moves its values
    }
    RankList& list = *r.last;
    if (!list.at.empty() && list.at.back() > p) {
        list.sorted = false;
    }
    list.at.push_back(p);
    if (!list.queued) {
        list.queued = true;
        r.ranks.push(pair->rank);
    }
}

void run_join(Run& r, uint32_t p) {
    uint32_t q = r.after[p];
    r.id[p] = bpe_find_pair(*r.bpe, r.id[p], r.id[q])->id;
    r.rank[q] = NO_RANK;
    r.after[p] = r.after[q];
    if (r.after[p] != END) {
        r.before[r.after[p]] = p;
    }
    run_update(r, p);
    if (r.before[p] != END) {
        run_update(r, r.before[p]);
    }
}

}  // namespace

uint64_t bpe_hash(const char* text, size_t n) {
    uint64_t h = n * UINT64_C(0x9E3779B97F4A7C15) ^ UINT64_C(0xA0761D6478BD642F);
    while (n > 16) {
        uint64_t a, b;
        memcpy(&a, text, 8);
        memcpy(&b, text + 8, 8);
        h = mix(a ^ h, b ^ UINT64_C(0xE7037ED1A0B428DB));
        text += 16;
        n -= 16;
    }
    uint64_t a = 0, b = 0;
    if (n >= 8) {
        memcpy(&a, text, 8);
        memcpy(&b, text + n - 8, 8);
    } else if (n >= 4) {
        uint32_t head, tail;
        memcpy(&head, text, 4);
        memcpy(&tail, text + n - 4, 4);
        a = head;
        b = tail;
    } else if (n > 0) {
        a = uint64_t((unsigned char)text[0]) << 16 | uint64_t((unsigned char)text[n / 2]) << 8 |
            (unsigned char)text[n - 1];
    }
    return mix(a ^ h, b ^ UINT64_C(0x8EBC6AF09C88C6E3));
}

bool bpe_set_vocabulary(Bpe& b, const std::vector<std::string>& pieces, int clash[2]) {
    size_t total = 0, tokens = 0;
    for (const std::string& piece : pieces) {
        total += piece.size();
        tokens += !piece.empty();
    }
    b.bytes.clear();
    b.bytes.reserve(total);
    b.first.assign(1, 0);
    b.first.reserve(pieces.size() + 1);
    b.whole.assign(pieces.size(), 0);
    b.pairs.assign(16, BpePair());
    b.pair_count = 0;
    b.slots.assign(power_of_two_above(2 * tokens + 1), -1);
    size_t mask = b.slots.size() - 1;
    for (size_t id = 0; id < pieces.size(); id++) {
        const std::string& piece = pieces[id];
        b.bytes.insert(b.bytes.end(), piece.begin(), piece.end());
        b.first.push_back(uint32_t(b.bytes.size()));
        if (piece.empty()) {
            continue;
        }
        int32_t same = bpe_find(b, piece.data(), piece.size());
        if (same >= 0) {
            clash[0] = same;
            clash[1] = int(id);
            return false;
        }
        size_t i = bpe_hash(piece.data(), piece.size()) & mask;
        while (b.slots[i] >= 0) {
            i = (i + 1) & mask;
        }
        b.slots[i] = int32_t(id);
    }
    for (int c = 0; c < 256; c++) {
        char byte = char(c);
        b.byte_id[c] = bpe_find(b, &byte, 1);
    }
    return true;
}

int32_t bpe_find(const Bpe& b, const char* text, size_t n) {
    size_t mask = b.slots.size() - 1;
    for (size_t i = bpe_hash(text, n) & mask;; i = (i + 1) & mask) {
        int32_t id = b.slots[i];
        if (id < 0) {
            return -1;
        }
        uint32_t first = b.first[id];
        if (b.first[id + 1] - first == n && memcmp(b.bytes.data() + first, text, n) == 0) {
            return id;
        }
    }
}

bool bpe_add_pair(Bpe& b, int32_t left, int32_t right, uint32_t rank, int32_t id) {
    if (bpe_find_pair(b, uint32_t(left), uint32_t(right))) {
        return false;
    }
    if (2 * (b.pair_count + 1) > b.pairs.size()) {
        std::vector<BpePair> larger(2 * b.pairs.size());
        for (const BpePair& p : b.pairs) {
            if (p.left != UINT32_MAX) {
                insert_pair(larger, p);
            }
        }
        b.pairs.swap(larger);
    }
    insert_pair(b.pairs, {uint32_t(left), uint32_t(right), rank, uint32_t(id)});
    b.pair_count++;
    return true;
}

const BpePair* bpe_find_pair(const Bpe& b, uint32_t left, uint32_t right) {
    size_t mask = b.pairs.size() - 1;
    for (size_t i = hash_pair(left, right) & mask;; i = (i + 1) & mask) {
        const BpePair& p = b.pairs[i];
        if (p.left == left && p.right == right) {
            return &p;
        }
        if (p.left == UINT32_MAX) {
            return nullptr;
        }
    }
}

void bpe_set_whole(Bpe& b, bool ignore_merges) {
    std::vector<int32_t> ids;
    for (size_t id = 0; id + 1 < b.first.size(); id++) {
        size_t n = b.first[id + 1] - b.first[id];
        if (n == 0) {
            continue;
        }
        ids.clear();
        if (!ignore_merges) {
            bpe_merge(b, ids, b.bytes.data() + b.first[id], n);
        }
        b.whole[id] = ignore_merges || (ids.size() == 1 && ids[0] == int32_t(id));
    }
}

void bpe_merge_scan(const Bpe& b, std::vector<int32_t>& ids, const char* text, size_t n) {
    if (n == 0) {
        return;
    }
    const size_t ON_STACK = 128;
    uint32_t stack[2 * ON_STACK];
    std::vector<uint32_t> heap;
    uint32_t* id = stack;
    if (n > ON_STACK) {
        heap.resize(2 * n);
        id = heap.data();
    }
    uint32_t* rank = id + n;  // of the pair (i, i + 1)
    for (size_t i = 0; i < n; i++) {
        id[i] = uint32_t(b.byte_id[(unsigned char)text[i]]);
    }
    for (size_t i = 0; i + 1 < n; i++) {
        const BpePair* p = bpe_find_pair(b, id[i], id[i + 1]);
        rank[i] = p ? p->rank : NO_RANK;
    }
    for (;;) {
        size_t best = 0;
        uint32_t best_rank = NO_RANK;
        for (size_t i = 0; i + 1 < n; i++) {
            if (rank[i] < best_rank) {
                best_rank = rank[i];
                best = i;
            }
        }
        if (best_rank == NO_RANK) {
            break;
        }
        id[best] = bpe_find_pair(b, id[best], id[best + 1])->id;
        n--;
        memmove(id + best + 1, id + best + 2, (n - best - 1) * sizeof(id[0]));
        if (best + 1 < n) {
            // rank[best] belonged to the pair that is gone and rank[best + 1] to its right neighbour
            memmove(rank + best + 1, rank + best + 2, (n - best - 2) * sizeof(rank[0]));
            const BpePair* p = bpe_find_pair(b, id[best], id[best + 1]);
            rank[best] = p ? p->rank : NO_RANK;
        }
        if (best > 0) {
            const BpePair* p = bpe_find_pair(b, id[best - 1], id[best]);
            rank[best - 1] = p ? p->rank : NO_RANK;
        }
    }
    ids.insert(ids.end(), id, id + n);
}

// Pairs of one rank are joined from left to right in one sweep over their list, so a run of ten million spaces costs
// a few sweeps and not ten million operations on a heap of ten million entries. A join may make a pair of lower rank
// (never of the same: the joined string is longer); then the sweep stops, and goes on when its rank is lowest again.
void bpe_merge_lists(const Bpe& b, std::vector<int32_t>& ids, const char* text, size_t n) {
    Run r;
    r.bpe = &b;
    r.id.resize(n);
    r.rank.assign(n, NO_RANK);
    r.before.resize(n);
    r.after.resize(n);
    for (size_t i = 0; i < n; i++) {
        r.id[i] = uint32_t(b.byte_id[(unsigned char)text[i]]);
        r.before[i] = i == 0 ? END : uint32_t(i - 1);
        r.after[i] = i + 1 == n ? END : uint32_t(i + 1);
    }
    for (size_t i = 0; i + 1 < n; i++) {
        run_update(r, uint32_t(i));
    }
    while (!r.ranks.empty()) {
        uint32_t rank = r.ranks.top();
        r.ranks.pop();
        RankList& list = r.lists[rank];
        if (!list.sorted) {
            std::sort(list.at.begin() + std::ptrdiff_t(list.next), list.at.end());
            list.sorted = true;
        }
        while (list.next < list.at.size() && (r.ranks.empty() || r.ranks.top() > rank)) {
            uint32_t p = list.at[list.next++];
            if (r.rank[p] == rank) {
                run_join(r, p);
            }
        }
        if (list.next < list.at.size()) {
            r.ranks.push(rank);
            continue;
        }
        list.at.clear();
        list.next = 0;
        list.queued = false;
    }
    for (size_t i = 0; i < n; i = r.after[i]) {
        ids.push_back(int32_t(r.id[i]));
        if (r.after[i] == END) {
            break;
        }
    }
}

void bpe_merge(const Bpe& b, std::vector<int32_t>& ids, const char* text, size_t n) {
    if (n <= 96) {  // about where the two cross
        bpe_merge_scan(b, ids, text, n);
    } else {
        bpe_merge_lists(b, ids, text, n);
    }
}
