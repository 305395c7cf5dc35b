// Passes: what every row is, and how examples are dealt out.
#include <algorithm>

#include "dev/tests/test.h"
#include "tokenizer/dataset.h"

// Examples of the given lengths; token k of example i is 1000 i + k, and a target unless k is a multiple of 3.
static Dataset data_of(const std::vector<size_t>& lengths) {
    Dataset data;
    data.files = {"made.jsonl"};
    data.formats = {{"text", 0}};
    for (size_t i = 0; i < lengths.size(); i++) {
        for (size_t k = 0; k < lengths[i]; k++) {
            data.ids.push_back(int32_t(1000 * i + k));
            data.targets.push_back(k % 3 != 0);
        }
        data.start.push_back(data.ids.size());
        data.file.push_back(0);
        data.line.push_back(i + 1);
        data.cut.push_back(0);
        data.format.push_back(0);
    }
    data.read = data.size();
    dataset_count(data);
    return data;
}

static uint64_t next_random(uint64_t& state) {
    state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return state >> 33;
}

static void pack_rows() {
    Dataset data = data_of({5, 1, 3});
    Batch b;
    batch_make(b, data, {2, 0, 1});
    CHECK(b.tokens == (std::vector<int32_t>{2000, 2001, 2002, 0, 1, 2, 3, 4, 1000}), "tokens");
    CHECK(b.labels == (std::vector<int32_t>{2001, 2002, -1, 1, 2, -1, 4, -1, -1}), "labels");
    CHECK(b.positions == (std::vector<int32_t>{0, 1, 2, 0, 1, 2, 3, 4, 0}), "positions");
    CHECK(b.cu_seqlens == (std::vector<int32_t>{0, 3, 8, 9}), "cu_seqlens");
    CHECK(b.example == (std::vector<uint32_t>{2, 2, 2, 0, 0, 0, 0, 0, 1}), "examples");
    CHECK(b.n_labels == 5 && b.size() == 9, "%zu labels in %zu rows", b.n_labels, b.size());
    batch_make(b, data, {});
    CHECK(b.size() == 0 && b.cu_seqlens == std::vector<int32_t>{0} && b.n_labels == 0, "an empty batch");
    // a target at an example's first token is never a label: its row would be in the document before
    data.targets[data.start[1]] = 1;
    batch_make(b, data, {0, 1});
    CHECK(b.labels[4] == -1, "prediction across the seam");
}

static void pack_best_fit() {
    Dataset data = data_of({4, 6, 3, 7, 5, 5, 12, 2});
    std::vector<size_t> all = {0, 1, 2, 3, 4, 5, 6, 7};
    // 12 alone; 7; 6; 5+5; 4 to the 6; 3 to the 7; 2 has room nowhere
    std::vector<std::vector<size_t>> expected = {{6}, {3, 2}, {1, 0}, {4, 5}, {7}};
    CHECK(passes_make(data, all, 10, true) == expected, "best fit decreasing");
    // equal lengths keep the order given
    CHECK(passes_make(data, {5, 7, 4}, 10, true) == (std::vector<std::vector<size_t>>{{5, 4}, {7}}), "ties");
    // the fullest pass that still has room, not the first: 7 | 6 | 3 goes to the 7
    CHECK(passes_make(data, {1, 2, 3}, 10, true) == (std::vector<std::vector<size_t>>{{3, 2}, {1}}), "best, not first");
    CHECK(passes_make(data, {1, 0, 2}, 10, false) == (std::vector<std::vector<size_t>>{{1}, {0}, {2}}), "no packing");
    CHECK(passes_make(data, {}, 10, true).empty(), "no examples");
}

static void pack_invariants() {
    uint64_t state = 7;
    for (int round = 0; round < 200; round++) {
        std::vector<size_t> lengths(1 + next_random(state) % 60);
        for (size_t& length : lengths) {
            length = 1 + next_random(state) % 100;
        }
        Dataset data = data_of(lengths);
        std::vector<size_t> examples;
        for (size_t i = 0; i < lengths.size(); i++) {
            examples.insert(examples.begin() + long(next_random(state) % (i + 1)), i);
        }
        size_t pass_tokens = 1 + next_random(state) % 150;
        auto passes = passes_make(data, examples, pass_tokens, true);
        CHECK(passes == passes_make(data, examples, pass_tokens, true), "not deterministic");
        std::vector<int> seen(lengths.size());
        size_t labels = 0, tokens = 0;
        for (const auto& pass : passes) {
            Batch b;
            batch_make(b, data, pass);
            CHECK(!pass.empty(), "an empty pass");
            CHECK(b.size() <= pass_tokens || pass.size() == 1, "pass of %zu tokens, at most %zu", b.size(),
                  pass_tokens);
            labels += b.n_labels;
            tokens += b.size();
            for (size_t row = 0; row < b.size(); row++) {
                bool last = row + 1 == b.size() || b.positions[row + 1] == 0;
                CHECK(!last || b.labels[row] == -1, "prediction across the seam");
                CHECK(b.labels[row] == -1 || b.labels[row] == b.tokens[row + 1], "label is not the next token");
                CHECK(size_t(b.tokens[row]) == 1000 * b.example[row] + size_t(b.positions[row]), "row is another's");
            }
            for (size_t i : pass) {
                seen[i]++;
            }
        }
        CHECK(std::count(seen.begin(), seen.end(), 1) == long(seen.size()), "an example is missing or twice");
        CHECK(labels == data.target_tokens && tokens == data.tokens, "%zu labels of %zu", labels, data.target_tokens);
    }
}

static void pack_split_and_counts() {
    Dataset data = data_of({1, 2, 3, 4, 7, 8, 4});
    std::copy(&data.ids[data.start[3]], &data.ids[data.start[4]], &data.ids[data.start[6]]);  // 6 repeats 3
    data.cut[5] = 1;
    dataset_count(data);
    CHECK(data.histogram == (std::vector<size_t>{1, 2, 3, 1}), "histogram");
    CHECK(data.duplicates == 1 && data.truncated == 1 && data.longest == 8 && data.tokens == 29, "counts");
    CHECK(data.target_tokens == 0 + 1 + 2 + 2 + 4 + 5 + 2, "%zu targets", data.target_tokens);
    CHECK(data.formats[0].second == 7, "formats");
    Dataset val;
    data.rejected = 2;
    data.read = 9;
    dataset_split(data, val, {0, 3, 5});
    CHECK(val.size() == 3 && data.size() == 4, "%zu and %zu", val.size(), data.size());
    CHECK(val.read == 3 && data.read == 6 && data.rejected == 2, "read = used + rejected + dropped");
    CHECK(val.line == (std::vector<size_t>{1, 4, 6}) && data.line == (std::vector<size_t>{2, 3, 5, 7}), "lines");
    CHECK(val.tokens == 13 && data.tokens == 16 && val.longest == 8 && data.longest == 7, "tokens");
    CHECK(val.truncated == 1 && data.truncated == 0 && data.duplicates == 0, "cut and duplicates");
    CHECK(val.ids[val.start[2]] == 5000 && val.targets[val.start[2] + 1] == 1, "contents");
    CHECK(text_has(dataset_overlap(data, val), "1 of 3 validation examples"), "%s", dataset_overlap(data, val).c_str());
    CHECK(dataset_overlap(data_of({2, 3}), data_of({1})).empty(), "no overlap");
}

extern const Test pack_tests[] = {{"pack_rows", pack_rows},
                                  {"pack_best_fit", pack_best_fit},
                                  {"pack_invariants", pack_invariants},
                                  {"pack_split_and_counts", pack_split_and_counts},
                                  {nullptr, nullptr}};
