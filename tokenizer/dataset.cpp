// Reading: files to examples, with the check of every line. See dataset.h; records.cpp has the rules of one record,
// report.cpp what is shown of the result, pack.cpp the passes, parts.cpp how several processes share the work.
//
// Lines are taken in portions of a few MB. The records of a portion are parsed and tokenised in parallel, each into
// an Item of its own, and then put into the data set in file order: the result does not depend on the threads, nor on
// the number of processes.
#include "tokenizer/dataset.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "io/json.h"
#include "tokenizer/chat.h"
#include "tokenizer/lines.h"
#include "tokenizer/parts.h"
#include "tokenizer/records.h"

static const size_t PORTION_BYTES = size_t(4) << 20, PORTION_LINES = 4096;  // for each part, ...
static const size_t PORTION_PARTS = 16;  // ... of at most so many: every part keeps the text of all
static const size_t LISTED = 20;         // bad lines in an Error
static const size_t NAMED = 10;          // line numbers in a warning
static const size_t ROWS = 20;           // reasons, and keys that play no part
static const char UTF8_HINT[] = "save as UTF-8, or --bad-utf8 replace puts U+FFFD there";

static std::string shown(const std::string& path) {
    return printable(path, 4096);
}

// Line numbers of a warning, the first few by name.
struct Places {
    size_t count = 0, lines = 0;
    std::string list;
};

static void places_add(Places& p, size_t line, size_t count) {
    p.count += count;
    if (p.lines++ < NAMED) {
        p.list += (p.list.empty() ? "" : ", ") + std::to_string(line);
    }
}

static std::string places_text(const Places& p) {
    return (p.lines == 1 ? "line " : "lines ") + p.list +
           (p.lines > NAMED ? " and " + std::to_string(p.lines - NAMED) + " more" : "");
}

struct Loader {
    Dataset& data;
    const Tokenizer& t;
    const DataOptions& options;
    void* hash;
    int file = 0;
    bool array = false;
    Places controls, bos_spelt, mended;  // of the present file
    size_t records = 0;                  // of the present file
    std::vector<std::string> listed;
    std::string hint;
    std::vector<std::pair<std::string, size_t>> reasons;  // why records were not used, with counts
    std::vector<std::pair<std::string, size_t>> unused;   // keys
};

// A table of at most ROWS names; the last row takes the rest.
static void count_in(std::vector<std::pair<std::string, size_t>>& table, const std::string& name) {
    for (auto& row : table) {
        if (row.first == name) {
            row.second++;
            return;
        }
    }
    if (table.size() < ROWS) {
        table.push_back({table.size() + 1 < ROWS ? name : "others", 1});
    } else {
        table.back().second++;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// one record

// BOS, the parts, EOS. A part whose text is parsed for control tokens may spell BOS or EOS itself: not doubled.
static void encode_plain(Item& item, const Tokenizer& t, const std::string& prompt, const std::string& completion,
                         bool parse) {
    std::vector<int32_t>& ids = item.ids;
    size_t bos = t.bos >= 0;
    if (bos) {
        ids.push_back(t.bos);
    }
    tokenizer_encode(t, ids, prompt.data(), prompt.size(), parse);
    size_t learnt = ids.size();
    tokenizer_encode(t, ids, completion.data(), completion.size(), parse);
    if (bos && ids.size() > 1 && ids[1] == t.bos) {
        ids.erase(ids.begin());
        learnt -= learnt > 1;
        item.bos_spelt = true;
    }
    if (t.eos >= 0 && ids.size() > bos && ids.back() != t.eos) {
        ids.push_back(t.eos);
    }
    item.targets.assign(ids.size(), 1);
    std::fill(item.targets.begin(), item.targets.begin() + std::min(std::max<size_t>(learnt, 1), ids.size()), 0);
}

static void encode_record(Item& item, const Tokenizer& t, const DataOptions& options, Record& r) {
    bool parse = options.parse_special;
    auto count = [&](const std::string& text) {
        return parse ? 0 : tokenizer_count_special(t, text.data(), text.size());
    };
    switch (r.kind) {
        case Record::CHAT:
            for (const Turn& turn : r.turns) {
                item.controls += count(turn.text);
            }
            chat_encode(item.ids, &item.targets, t, options.form, r.turns, parse, false);
            break;
        case Record::PAIR:
            item.controls = count(r.prompt) + count(r.completion);
            encode_plain(item, t, r.prompt, r.completion, parse);
            break;
        case Record::TEXT: encode_plain(item, t, "", r.text, true); break;
        case Record::TOKENS:
            item.ids = std::move(r.ids);
            item.targets = std::move(r.targets);
            break;
    }
    if (item.ids.size() > options.max_tokens) {
        item.ids.resize(options.max_tokens);
        item.targets.resize(options.max_tokens);
        item.cut = true;
    }
}

// The line's text as JSON; fills item.bad and item.column.
static void parse_line(Json& json, Item& item, const DataOptions& options) {
    const std::string& text = item.line.text;
    if (item.line.bytes > options.max_line_bytes) {
        item.bad = bad_input("the line is too long (found %" PRIu64 " MB, need at most %zu)",
                             (item.line.bytes + (1 << 20) - 1) >> 20, options.max_line_bytes >> 20)
                       .hinted("--max-line takes a larger limit in MB");
        return;
    }
    if (text.compare(0, 3, "\xEF\xBB\xBF") == 0) {
        item.bad = bad_input("a byte order mark inside the file")
                       .hinted("files that were joined? remove the mark (bytes EF BB BF)");
        item.column = 1;
        return;
    }
    JsonLimits limits;
    limits.line_is_record = true;
    limits.replace_surrogates = options.replace_bad_utf8;
    size_t bad_at = 0;
    bool valid = utf8_validate(text.data(), text.size(), &bad_at);
    if (!valid && options.replace_bad_utf8) {
        std::string mended = utf8_replace_invalid(text.data(), text.size(), &bad_at);
        item.mended = true;
        item.bad = json_parse(json, mended.data(), mended.size(), "", limits);
    } else {
        item.bad = json_parse(json, text.data(), text.size(), "", limits);
    }
    if (!item.bad) {
        return;
    }
    item.fatal = item.bad.code != 2;
    int used = 0;
    if (sscanf(item.bad.what.c_str(), ":1:%zu: %n", &item.column, &used) == 1) {
        item.bad.what.erase(0, size_t(used));
    }
    if (item.bad.what.find("ends inside a JSON value") != std::string::npos) {
        item.bad = item.line.last ? bad_input("the file ends inside a JSON value (a truncated copy?)")
                                        .hinted("get the file again, or remove its last line")
                                  : bad_input("the line ends inside a JSON value (need one whole object a line)")
                                        .hinted("one object a line: jq -c . FILE > FILE.jsonl");
    } else if (!valid || item.bad.what.find("surrogate") != std::string::npos) {
        item.bad.hint = UTF8_HINT;
    }
}

static void process(Item& item, const Tokenizer& t, const DataOptions& options) {
    Json json;
    if (item.element) {
        json = *item.element;
    } else {
        parse_line(json, item, options);
        if (item.bad) {
            return;
        }
    }
    Record r;
    item.bad = record_read(r, json, options.format, options.form.kind != ChatForm::PLAIN, options.vocab);
    if (item.bad) {
        return;
    }
    item.format = r.format;
    item.unused = std::move(r.unused);
    bool free_of_form = r.kind == Record::TEXT || r.kind == Record::TOKENS;
    if (!options.form.recognised && !free_of_form) {
        item.fatal = true;
        item.bad =
            bad_input("a %s record needs the model's chat template, and that is not recognised (fingerprint %s)",
                      record_formats[r.format], options.form.fingerprint.c_str())
                .hinted("choose one: --template llama3 (3.1 form, dated), llama3-raw (Meta's own) or plain (none)");
        return;
    }
    if (r.kind == Record::CHAT && options.form.kind == ChatForm::PLAIN) {
        item.fatal = true;
        item.bad =
            bad_input("chat data, and the model is used without a chat template (found a %s record)",
                      record_formats[r.format])
                .hinted(
                    "a base model learns from question/answer, prompt/completion or text records; an instruct model "
                    "brings its template; or choose --template llama3 or llama3-raw");
        return;
    }
    encode_record(item, t, options, r);
}

// ---------------------------------------------------------------------------------------------------------------------
// the check

static std::string place(const Loader& load, const Item& item) {
    std::string where = shown(load.data.files[size_t(load.file)]);
    where += load.array ? ": element " + std::to_string(item.line.number) : ":" + std::to_string(item.line.number);
    return where + (item.column ? ":" + std::to_string(item.column) : "");
}

// `what (found X, need Y)` without its bracket: the same for all records with that fault.
static std::string kind_of_fault(const std::string& what) {
    return what.substr(0, what.find(" ("));
}

static void reject(Loader& load, Item& item) {
    Dataset& data = load.data;
    data.rejected++;
    count_in(load.reasons, kind_of_fault(item.bad.what));
    if (load.options.skip_bad) {
        std::string reason = (item.column ? "column " + std::to_string(item.column) + ": " : "") + item.bad.what;
        data.bad.push_back(
            {load.file, item.line.number, reason, item.element ? json_write(*item.element) : item.line.text});
    } else if (load.listed.size() < LISTED) {
        load.listed.push_back(place(load, item) + ": " + item.bad.what);
        load.hint = load.hint.empty() ? item.bad.hint : load.hint;
    }
}

// Puts one finished item into the data set, or among the bad.
static Error absorb(Loader& load, Item& item) {
    Dataset& data = load.data;
    data.read++;
    load.records++;
    if (item.fatal) {
        return Error{item.bad.code, place(load, item) + ": " + item.bad.what, item.bad.hint};
    }
    if (item.bad) {
        size_t end = item.line.text.find_last_not_of(" \t\r");
        bool open = end != std::string::npos && strchr("{[,", item.line.text[end]) && item.line.text[end] != '\0';
        if (load.records == 1 && !load.options.skip_bad && !item.line.last && open &&
            item.bad.what.find("ends inside") != std::string::npos) {
            return bad_input("%s: the line ends inside an object (need one object a line; this file is pretty-printed)",
                             place(load, item).c_str())
                .hinted("jq -c . FILE > FILE.jsonl");
        }
        reject(load, item);
        return {};
    }
    for (const std::string& key : item.unused) {
        count_in(load.unused, key);
    }
    if (item.controls) {
        places_add(load.controls, item.line.number, item.controls);
    }
    if (item.bos_spelt) {
        places_add(load.bos_spelt, item.line.number, 1);
    }
    if (item.mended) {
        places_add(load.mended, item.line.number, 1);
    }
    if (std::find(item.targets.begin(), item.targets.end(), 1) == item.targets.end()) {
        data.dropped_without_target++;
        count_in(load.reasons, "no token to learn among the first " + std::to_string(load.options.max_tokens));
        return {};
    }
    size_t format = 0;
    while (format < data.formats.size() && data.formats[format].first != record_formats[item.format]) {
        format++;
    }
    if (format == data.formats.size()) {
        data.formats.push_back({record_formats[item.format], 0});
    }
    data.ids.insert(data.ids.end(), item.ids.begin(), item.ids.end());
    data.targets.insert(data.targets.end(), item.targets.begin(), item.targets.end());
    data.start.push_back(data.ids.size());
    data.file.push_back(load.file);
    data.line.push_back(item.line.number);
    data.cut.push_back(item.cut);
    data.format.push_back(uint8_t(format));
    return {};
}

static size_t portion_parts(const DataOptions& options) {
    return std::min(size_t(options.parts), PORTION_PARTS);
}

static Error run_portion(Loader& load, std::vector<Item>& items) {
    const Tokenizer& t = load.t;
    const DataOptions& options = load.options;
    int threads = std::max(1, options.threads);
    (void)threads;  // without OpenMP
    std::vector<size_t> bounds = parts_deal(items, options.parts);
    const size_t begin = bounds[size_t(options.part)], end = bounds[size_t(options.part) + 1];
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (size_t i = begin; i < end; i++) {
        process(items[i], t, options);
    }
    if (options.parts > 1) {
        std::string round = std::to_string(items.size()) + " records to " + hash_so_far(load.hash);
        if (Error e = parts_exchange(items, bounds, options, round, load.data.files[size_t(load.file)])) {
            return e;
        }
    }
    for (Item& item : items) {
        if (Error e = absorb(load, item)) {
            return e;
        }
    }
    items.clear();
    return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// one file
//
// With several parts every file ends with a portion, an empty one if need be: there they see that they read the same.

static Error load_lines(Loader& load, LineReader& reader) {
    const size_t parts = portion_parts(load.options);
    std::vector<Item> items;
    size_t bytes = 0;
    for (bool more = true; more;) {
        Item item;
        if (Error e = lines_next(reader, item.line, &more, load.options.max_line_bytes)) {
            return parts_failed(load.options, e);
        }
        bool blank = item.line.text.find_first_not_of(" \t\r") == std::string::npos;
        if (more && blank && item.line.bytes == item.line.text.size()) {
            load.data.blank_lines++;
            continue;
        }
        if (more) {
            bytes += item.line.text.size();
            items.push_back(std::move(item));
        }
        if (bytes >= PORTION_BYTES * parts || items.size() >= PORTION_LINES * parts || !more) {
            if (Error e = run_portion(load, items)) {
                return e;
            }
            bytes = 0;
        }
    }
    return {};
}

static Error parse_array(Loader& load, LineReader& reader, Json& array) {
    std::string text;
    if (Error e = lines_rest(reader, text)) {
        return e;
    }
    bool valid = utf8_validate(text.data(), text.size(), nullptr);
    if (!valid && load.options.replace_bad_utf8) {
        size_t replaced = 0;
        text = utf8_replace_invalid(text.data(), text.size(), &replaced);
        load.data.notes.push_back(shown(reader.file.path) + ": " + std::to_string(replaced) +
                                  " invalid byte sequences replaced by U+FFFD");
    }
    JsonLimits limits;
    limits.replace_surrogates = load.options.replace_bad_utf8;
    if (Error e = json_parse(array, text.data(), text.size(), reader.file.path, limits)) {
        std::string hint = valid ? e.hint : UTF8_HINT;
        return e.hinted("a file that begins with [ is read as one JSON array" + (hint.empty() ? "" : "; " + hint));
    }
    load.data.notes.push_back(shown(reader.file.path) + ": read as one JSON array, its elements as the records");
    return {};
}

// The array is parsed by every part; its elements are dealt.
static Error load_array(Loader& load, LineReader& reader) {
    Json array;
    if (Error e = parse_array(load, reader, array)) {
        return parts_failed(load.options, e);
    }
    const size_t lines = PORTION_LINES * portion_parts(load.options);
    std::vector<Item> items;
    for (size_t i = 0; i <= array.items.size(); i++) {
        if (items.size() >= lines || i == array.items.size()) {
            if (Error e = run_portion(load, items)) {
                return e;
            }
        }
        if (i < array.items.size()) {
            Item item;
            item.element = &array.items[i];
            item.line.number = i + 1;
            items.push_back(std::move(item));
        }
    }
    return {};
}

static void warn_of_file(Loader& load) {
    std::vector<std::string>& warnings = load.data.warnings;
    std::string path = shown(load.data.files[size_t(load.file)]) + ": ";
    if (load.controls.lines) {
        warnings.push_back(path + std::to_string(load.controls.count) + " control tokens spelt inside text (" +
                           places_text(load.controls) +
                           "): kept as ordinary text; --parse-special makes them control tokens");
    }
    if (load.bos_spelt.lines) {
        warnings.push_back(path + "text already begins with the BOS token (" + places_text(load.bos_spelt) +
                           "): not added twice");
    }
    if (load.mended.lines) {
        warnings.push_back(path + "invalid UTF-8 replaced by U+FFFD (" + places_text(load.mended) + ")");
    }
    load.controls = load.bos_spelt = load.mended = Places();
}

static Error load_file(Loader& load, const std::string& path) {
    LineReader reader;
    if (Error e = lines_open(reader, path, load.hash)) {
        return parts_failed(load.options, e);
    }
    load.array = reader.array;
    load.records = 0;
    if (reader.bom) {
        load.data.notes.push_back(shown(path) + ": the byte order mark at its beginning is skipped");
    }
    size_t blank_before = load.data.blank_lines;
    Error e = reader.array ? load_array(load, reader) : load_lines(load, reader);
    lines_close(reader);
    if (e) {
        return e;
    }
    if (load.records == 0) {
        const char* found = load.array                             ? "an empty array"
                            : load.data.blank_lines > blank_before ? "only blank lines"
                                                                   : "an empty file";
        return bad_input("%s: no examples (found %s)", shown(path).c_str(), found)
            .hinted("need one JSON object a line");
    }
    warn_of_file(load);
    return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// the whole

static std::string reason_table(std::vector<std::pair<std::string, size_t>> reasons) {
    std::stable_sort(reasons.begin(), reasons.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
    std::string table;
    for (const auto& reason : reasons) {
        std::string count = std::to_string(reason.second);
        table += "\n" + std::string(count.size() < 8 ? 8 - count.size() : 0, ' ') + count + "  " + reason.first;
    }
    return table;
}

static Error bad_lines(const Loader& load) {
    const Dataset& data = load.data;
    Error e{2, "", load.hint + (load.hint.empty() ? "" : "; ") + "--skip-bad goes on without the bad records"};
    for (const std::string& line : load.listed) {
        e.what += (e.what.empty() ? "" : "\n") + line;
    }
    if (data.rejected > load.listed.size()) {
        e.what += "\n... and " + std::to_string(data.rejected - load.listed.size()) + " more";
    }
    if (data.rejected > 1) {
        e.what += "\n" + std::to_string(data.rejected) + " of " + std::to_string(data.read) +
                  " records are bad:" + reason_table(load.reasons);
    }
    return e;
}

static Error load_files(Loader& load) {
    Dataset& data = load.data;
    for (size_t f = 0; f < data.files.size(); f++) {
        load.file = int(f);
        if (Error e = load_file(load, data.files[f])) {
            return e;
        }
    }
    if (data.rejected && !load.options.skip_bad) {
        return bad_lines(load);
    }
    if (data.size() == 0) {
        std::string names;
        for (const std::string& path : data.files) {
            names += (names.empty() ? "" : ", ") + shown(path);
        }
        return bad_input("%s: no example is left of %zu records:%s", names.c_str(), data.read,
                         reason_table(load.reasons).c_str())
            .hinted(data.dropped_without_target ? "--max-tokens keeps more of each example"
                                                : "mend the lines, or name their form with --format");
    }
    if (!load.unused.empty()) {
        std::string keys;
        for (const auto& key : load.unused) {
            keys += (keys.empty() ? "" : ", ") + printable(key.first, 40) + " (" + std::to_string(key.second) + ")";
        }
        data.notes.push_back("keys that play no part, with records: " + keys);
    }
    if (load.t.eos < 0 && load.options.form.kind == ChatForm::PLAIN) {
        data.warnings.push_back(
            "the model names no eos_token: examples end without one, and the model will not learn to stop");
    }
    return {};
}

Error dataset_load(Dataset& data, const std::vector<std::string>& files, const Tokenizer& t,
                   const DataOptions& options) {
    data = Dataset();
    data.files = files;
    if (Error e = record_format_check(options.format)) {
        return e;
    }
    Loader load{data, t, options, hash_begin(), 0, false, {}, {}, {}, 0, {}, "", {}, {}};
    Error e = load_files(load);
    std::string digest = hash_finish(load.hash);
    if (e) {
        data = Dataset();
        return e;
    }
    data.hash = digest;
    dataset_count(data);
    return {};
}
