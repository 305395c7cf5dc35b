// What is told about a data set: its numbers, the report, one example for the eye or as JSON; and its split, which
// must keep the numbers right. See dataset.h.
#include <algorithm>
#include <cstdio>

#include "io/json.h"
#include "tokenizer/dataset.h"

// ---------------------------------------------------------------------------------------------------------------------
// numbers

// FNV-1a over the words of ids and targets. Equal hashes are compared in full, so its quality costs time at worst.
static uint64_t example_hash(const Dataset& data, size_t i) {
    uint64_t hash = UINT64_C(0xCBF29CE484222325);
    for (size_t k = data.start[i]; k < data.start[i + 1]; k++) {
        hash = (hash ^ (uint64_t(uint32_t(data.ids[k])) << 1 | data.targets[k])) * UINT64_C(0x100000001B3);
        hash ^= hash >> 29;
    }
    return hash;
}

static bool same_example(const Dataset& a, size_t i, const Dataset& b, size_t j) {
    size_t n = a.length(i);
    return n == b.length(j) && std::equal(&a.ids[a.start[i]], &a.ids[a.start[i]] + n, &b.ids[b.start[j]]) &&
           std::equal(&a.targets[a.start[i]], &a.targets[a.start[i]] + n, &b.targets[b.start[j]]);
}

using HashedExample = std::pair<uint64_t, size_t>;  // hash, number of the example

static std::vector<HashedExample> hashes_sorted(const Dataset& data) {
    std::vector<HashedExample> hashes(data.size());
    for (size_t i = 0; i < data.size(); i++) {
        hashes[i] = {example_hash(data, i), i};
    }
    std::sort(hashes.begin(), hashes.end());
    return hashes;
}

void dataset_count(Dataset& data) {
    data.tokens = data.ids.size();
    data.target_tokens = size_t(std::count(data.targets.begin(), data.targets.end(), 1));
    data.truncated = size_t(std::count(data.cut.begin(), data.cut.end(), 1));
    data.longest = data.duplicates = 0;
    data.histogram.clear();
    for (auto& format : data.formats) {
        format.second = 0;
    }
    for (size_t i = 0; i < data.size(); i++) {
        data.longest = std::max(data.longest, data.length(i));
        size_t k = 0;
        while ((data.length(i) >> k) > 1) {
            k++;
        }
        if (k >= data.histogram.size()) {
            data.histogram.resize(k + 1);
        }
        data.histogram[k]++;
        data.formats[data.format[i]].second++;
    }
    std::vector<HashedExample> hashes = hashes_sorted(data);
    for (size_t i = 0, first = 0; i < hashes.size(); i++) {
        first = hashes[i].first == hashes[first].first ? first : i;
        data.duplicates += i > first && same_example(data, hashes[first].second, data, hashes[i].second);
    }
}

std::string dataset_overlap(const Dataset& train, const Dataset& val) {
    std::vector<HashedExample> hashes = hashes_sorted(train);
    size_t shared = 0;
    for (size_t i = 0; i < val.size(); i++) {
        HashedExample wanted{example_hash(val, i), 0};
        auto at = std::lower_bound(hashes.begin(), hashes.end(), wanted);
        shared += at != hashes.end() && at->first == wanted.first && same_example(train, at->second, val, i);
    }
    if (shared == 0) {
        return "";
    }
    return std::to_string(shared) + " of " + std::to_string(val.size()) +
           " validation examples are also in the training data: their loss says nothing about unseen data";
}

void dataset_split(Dataset& train, Dataset& val, const std::vector<size_t>& held_out) {
    Dataset kept;
    val = Dataset();
    kept.files = val.files = train.files;
    kept.formats = val.formats = train.formats;
    kept.hash = val.hash = train.hash;
    for (size_t i = 0, next = 0; i < train.size(); i++) {
        bool held = next < held_out.size() && held_out[next] == i;
        next += held;
        Dataset& to = held ? val : kept;
        size_t first = train.start[i], end = train.start[i + 1];
        to.ids.insert(to.ids.end(), &train.ids[first], &train.ids[first] + (end - first));
        to.targets.insert(to.targets.end(), &train.targets[first], &train.targets[first] + (end - first));
        to.start.push_back(to.ids.size());
        to.file.push_back(train.file[i]);
        to.line.push_back(train.line[i]);
        to.cut.push_back(train.cut[i]);
        to.format.push_back(train.format[i]);
    }
    val.read = val.size();
    kept.read = train.read - val.size();
    kept.rejected = train.rejected;
    kept.dropped_without_target = train.dropped_without_target;
    kept.blank_lines = train.blank_lines;
    kept.warnings = std::move(train.warnings);
    kept.notes = std::move(train.notes);
    kept.bad = std::move(train.bad);
    dataset_count(kept);
    dataset_count(val);
    train = std::move(kept);
}

// ---------------------------------------------------------------------------------------------------------------------
// the report

static std::string with_commas(size_t value) {
    std::string digits = std::to_string(value);
    for (size_t i = digits.size(); i > 3; i -= 3) {
        digits.insert(i - 3, ",");
    }
    return digits;
}

static std::string padded(const std::string& text, size_t width, bool right) {
    std::string space(text.size() < width ? width - text.size() : 0, ' ');
    return right ? space + text : text + space;
}

// One row a power of two, the bar's length in proportion, at least one mark where there is an example.
static void add_histogram(std::vector<std::string>& lines, const Dataset& data) {
    const size_t WIDTH = 40;
    size_t most = *std::max_element(data.histogram.begin(), data.histogram.end());
    size_t first = 0;
    while (data.histogram[first] == 0) {
        first++;
    }
    for (size_t k = first; k < data.histogram.size(); k++) {
        size_t count = data.histogram[k], low = size_t(1) << k;
        size_t marks = count == 0 ? 0 : std::max<size_t>(1, (count * WIDTH + most / 2) / most);
        std::string range = k == 0 ? "1" : with_commas(low) + "-" + with_commas(2 * low - 1);
        lines.push_back(padded(k == first ? "length" : "", 10, false) + padded(range, 13, true) + "  " +
                        padded(with_commas(count), 9, true) + "  " + std::string(marks, '#'));
    }
}

std::vector<std::string> dataset_report(const Dataset& data) {
    std::vector<std::string> lines;
    auto add = [&](const char* name, const std::string& text) { lines.push_back(padded(name, 10, false) + text); };
    for (size_t f = 0; f < data.files.size(); f++) {
        add(f ? "" : "data", printable(data.files[f], 4096));
    }
    add("records", with_commas(data.read) + " read = " + with_commas(data.size()) + " used + " +
                       with_commas(data.rejected) + " rejected + " + with_commas(data.dropped_without_target) +
                       " dropped (nothing to learn after the cut)");
    std::string formats;
    for (const auto& format : data.formats) {
        if (format.second) {
            formats += (formats.empty() ? "" : ", ") + format.first + " " + with_commas(format.second);
        }
    }
    add("formats", formats);
    char share[32];
    snprintf(share, sizeof share, "%.1f %%",
             100.0 * double(data.target_tokens) / double(std::max<size_t>(1, data.tokens)));
    add("tokens",
        with_commas(data.tokens) + ", of which " + with_commas(data.target_tokens) + " are learnt (" + share + ")");
    if (data.size()) {
        add("longest", with_commas(data.longest) + " tokens, on average " + with_commas(data.tokens / data.size()));
        add_histogram(lines, data);
    }
    std::string further = with_commas(data.truncated) + " cut, " + with_commas(data.duplicates) +
                          " exact duplicates, " + with_commas(data.blank_lines) + " blank lines";
    add("of these", further);
    for (const std::string& note : data.notes) {
        add("note", note);
    }
    return lines;
}

// ---------------------------------------------------------------------------------------------------------------------
// one example

// Text of the data for a terminal: lines stay lines, everything else that steers a terminal is escaped.
static std::string printable_lines(const std::string& text) {
    std::string out;
    for (size_t at = 0; at <= text.size();) {
        size_t end = std::min(text.find('\n', at), text.size());
        out += printable(text.substr(at, end - at), SIZE_MAX);
        out += end < text.size() ? "\n" : "";
        at = end + 1;
    }
    return out;
}

std::string dataset_show(const Dataset& data, const Tokenizer& t, size_t i, bool colour) {
    const char* begin = colour ? "\033[32m" : "[";
    const char* end = colour ? "\033[0m" : "]";
    std::string out;
    for (size_t k = data.start[i]; k < data.start[i + 1];) {
        size_t first = k;
        while (k < data.start[i + 1] && data.targets[k] == data.targets[first]) {
            k++;
        }
        std::string text = printable_lines(tokenizer_decode(t, &data.ids[first], k - first, false));
        out += data.targets[first] ? begin + text + end : text;
    }
    return out;
}

std::string dataset_dump_line(const Dataset& data, size_t i) {
    std::string ids, targets;
    for (size_t k = data.start[i]; k < data.start[i + 1]; k++) {
        const char* comma = k > data.start[i] ? "," : "";
        ids += comma + std::to_string(data.ids[k]);
        targets += comma;
        targets += data.targets[k] ? '1' : '0';
    }
    return "{\"file\":" + json_write(Json(data.files[size_t(data.file[i])])) +
           ",\"line\":" + std::to_string(data.line[i]) + ",\"ids\":[" + ids + "],\"targets\":[" + targets + "]}";
}
