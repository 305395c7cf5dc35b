// From a step's examples to passes. See dataset.h.
//
//   examples  [a0 a1 a2] [b0 b1]          target: a2, b1
//   tokens     a0 a1 a2   b0 b1
//   labels     -  a2 -    b1 -            never across the seam: a document's first token is no label
//   positions  0  1  2    0  1
//   cu_seqlens 0          3       5
#include <algorithm>
#include <set>

#include "tokenizer/dataset.h"

void batch_make(Batch& b, const Dataset& data, const std::vector<size_t>& examples) {
    b = Batch();
    b.cu_seqlens.push_back(0);
    for (size_t i : examples) {
        size_t first = data.start[i], n = data.length(i);
        for (size_t k = 0; k < n; k++) {
            bool label = k + 1 < n && data.targets[first + k + 1];
            b.tokens.push_back(data.ids[first + k]);
            b.labels.push_back(label ? data.ids[first + k + 1] : -1);
            b.positions.push_back(int32_t(k));
            b.example.push_back(uint32_t(i));
            b.n_labels += label;
        }
        b.cu_seqlens.push_back(int32_t(b.tokens.size()));
    }
}

std::vector<std::vector<size_t>> passes_make(const Dataset& data, const std::vector<size_t>& examples,
                                             size_t pass_tokens, bool pack) {
    std::vector<std::vector<size_t>> passes;
    std::vector<size_t> order = examples;
    if (pack) {
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t a, size_t b) { return data.length(a) > data.length(b); });
    }
    std::set<std::pair<size_t, size_t>> room;  // free tokens of a pass, its number
    for (size_t i : order) {
        size_t n = data.length(i), pass = passes.size(), space = std::max(pass_tokens, n);
        auto best = pack ? room.lower_bound({n, 0}) : room.end();  // least room that is enough, then the oldest
        if (best == room.end()) {
            passes.push_back({});
        } else {
            space = best->first;
            pass = best->second;
            room.erase(best);
        }
        passes[pass].push_back(i);
        room.insert({space - n, pass});
    }
    return passes;
}
