// Several processes that read one data set: each must get what one alone gets, to the last byte of the last message.
// The processes are threads here, which meet at a table.
#include "tokenizer/parts.h"

#include <algorithm>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "dev/tests/byte_tokenizer.h"

namespace {

// Where the parts lay down their texts, and take those of all once the last has come.
struct Table {
    std::mutex lock;
    std::condition_variable changed;
    std::vector<std::string> texts, ready;
    size_t waiting = 0, meetings = 0;
    bool left = false, stuck = false;                          // one has gone for good; another waits for it in vain
    size_t longest = 0;                                        // of all texts
    std::vector<size_t> sent;                                  // bytes, of each part
    std::vector<std::string> first_texts;                      // of the first meeting
    std::function<void(size_t part)> disturb = [](size_t) {};  // before a part lays down its text
};

std::vector<std::string> meet(Table& table, size_t part, const std::string& mine) {
    table.disturb(part);
    std::unique_lock<std::mutex> hold(table.lock);
    table.texts[part] = mine;
    table.sent[part] += mine.size();
    table.longest = std::max(table.longest, mine.size());
    size_t meeting = table.meetings;
    if (++table.waiting == table.texts.size()) {
        table.ready = table.texts;
        table.first_texts = meeting == 0 ? table.texts : table.first_texts;
        table.waiting = 0;
        table.meetings++;
        table.changed.notify_all();
    }
    table.changed.wait(hold, [&] { return table.meetings > meeting || table.left; });
    if (table.meetings > meeting) {
        return table.ready;  // nobody comes again before all have taken theirs
    }
    table.stuck = true;
    return {};
}

struct Parts {
    std::vector<Dataset> data;
    std::vector<Error> errors;
    Table table;
};

// files[p], options[p]: of part p. False, with a failed check, when the parts did not meet equally often.
bool load_parts(Parts& run, const std::vector<std::vector<std::string>>& files, const Tokenizer& t,
                std::vector<DataOptions> options) {
    size_t parts = files.size();
    run.data.assign(parts, {});
    run.errors.assign(parts, {});
    run.table.texts.assign(parts, "");
    run.table.sent.assign(parts, 0);
    std::vector<std::thread> threads;
    for (size_t p = 0; p < parts; p++) {
        options[p].part = int(p);
        options[p].parts = int(parts);
        options[p].exchange = [&run, p](const std::string& mine) { return meet(run.table, p, mine); };
        threads.emplace_back([&, p] {
            run.errors[p] = dataset_load(run.data[p], files[p], t, options[p]);
            std::lock_guard<std::mutex> hold(run.table.lock);
            run.table.left = true;
            run.table.changed.notify_all();
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    return CHECK(!run.table.stuck, "%zu parts: one waits for another that has gone", parts);
}

// "" or the first field in which they differ.
std::string difference(const Dataset& a, const Dataset& b) {
    bool bad = a.bad.size() == b.bad.size();
    for (size_t i = 0; i < a.bad.size() && bad; i++) {
        bad = a.bad[i].file == b.bad[i].file && a.bad[i].line == b.bad[i].line && a.bad[i].reason == b.bad[i].reason &&
              a.bad[i].raw == b.bad[i].raw;
    }
    const struct {
        const char* name;
        bool same;
    } fields[] = {{"files", a.files == b.files},
                  {"ids", a.ids == b.ids},
                  {"targets", a.targets == b.targets},
                  {"start", a.start == b.start},
                  {"file", a.file == b.file},
                  {"line", a.line == b.line},
                  {"cut", a.cut == b.cut},
                  {"format", a.format == b.format},
                  {"read", a.read == b.read},
                  {"rejected", a.rejected == b.rejected},
                  {"dropped_without_target", a.dropped_without_target == b.dropped_without_target},
                  {"truncated", a.truncated == b.truncated},
                  {"duplicates", a.duplicates == b.duplicates},
                  {"blank_lines", a.blank_lines == b.blank_lines},
                  {"tokens", a.tokens == b.tokens},
                  {"target_tokens", a.target_tokens == b.target_tokens},
                  {"longest", a.longest == b.longest},
                  {"histogram", a.histogram == b.histogram},
                  {"formats", a.formats == b.formats},
                  {"warnings", a.warnings == b.warnings},
                  {"notes", a.notes == b.notes},
                  {"bad", bad},
                  {"hash", a.hash == b.hash}};
    for (const auto& field : fields) {
        if (!field.same) {
            return field.name;
        }
    }
    return "";
}

bool same_error(const Error& a, const Error& b) {
    return a.code == b.code && a.what == b.what && a.hint == b.hint;
}

struct Fixture {
    Tokenizer t;
    DataOptions options;
    std::string dir;
    Error alone;  // of the last comparison: what one process gets
    Dataset whole;
};

bool fixture_make(Fixture& f, Template wanted) {
    f.dir = test_directory();
    if (!byte_tokenizer(f.t)) {
        return false;
    }
    Error e = chat_form_choose(f.options.form, f.t, wanted);
    return CHECK(!e, "%s", e.what.c_str());
}

std::string write(const Fixture& f, const std::string& name, const std::string& bytes) {
    std::string path = path_join(f.dir, name);
    Error e = file_replace(path, bytes);
    CHECK(!e, "%s", e.what.c_str());
    return path;
}

// Loads the files with 1, 2, 3 and 5 parts and compares all.
void compare(Fixture& f, const char* name, const std::vector<std::string>& files) {
    f.alone = dataset_load(f.whole, files, f.t, f.options);
    for (size_t parts : {2, 3, 5}) {
        Parts run;
        if (!load_parts(run, std::vector<std::vector<std::string>>(parts, files), f.t,
                        std::vector<DataOptions>(parts, f.options))) {
            continue;
        }
        for (size_t p = 0; p < parts; p++) {
            CHECK(same_error(run.errors[p], f.alone), "%s: part %zu of %zu:\n%s\nhint: %s\nalone:\n%s\nhint: %s", name,
                  p, parts, run.errors[p].what.c_str(), run.errors[p].hint.c_str(), f.alone.what.c_str(),
                  f.alone.hint.c_str());
            std::string differs = difference(run.data[p], f.whole);
            CHECK(differs.empty(), "%s: part %zu of %zu: %s differs", name, p, parts, differs.c_str());
        }
    }
}

std::string chats(int n) {
    std::string bytes;
    for (int i = 0; i < n; i++) {
        std::string user = "{\"role\": \"user\", \"content\": \"" + std::string(size_t(i * 7 % 17), 'q') + "\"}";
        std::string said = "{\"role\": \"assistant\", \"content\": \"a" + std::to_string(i % 5) + "\"}";
        bytes += "{\"messages\": [" + user + ", " + said + "]" + (i % 3 ? "" : ", \"id\": 1") + "}\n";
    }
    return bytes;
}

// Faults of every kind among good lines, blank ones and duplicates; line 1 is good.
std::string mixed(int n) {
    static const char* const lines[] = {
        "{\"text\": \"same\"}",
        "{\"text\": 3}",
        "",
        "{\"question\": \"q<|eot_id|>\", \"answer\": \"a\", \"source\": \"x\"}",
        "{\"text\": \"<|begin_of_text|>b\"}",
        "{\"text\": \"\xFF\"}",
        " \t",
        "{\"foo\": 1}",
        "{\"prompt\": \"a long prompt, so long that all of it is past what is kept\", \"completion\": \"c\"}",
        "{\"text\": \"long enough to be cut somewhere before it ends\"}",
        "{\"text\": \"open"};
    std::string bytes;
    for (int i = 0; i < n; i++) {
        bytes += std::string(lines[size_t(i) % 11]) + "\n";
    }
    return bytes;
}

void parts_good_files() {
    Fixture f;
    if (!fixture_make(f, Template::LLAMA3_RAW)) {
        return;
    }
    std::string questions = source_path("data.jsonl");
    std::string dialogues = write(f, "chats.jsonl", "\xEF\xBB\xBF" + chats(300));
    compare(f, "data.jsonl", {questions});
    CHECK(f.whole.size() > 100, "%s", f.alone.what.c_str());
    compare(f, "chats", {dialogues});
    CHECK(f.whole.size() == 300 && f.whole.duplicates > 0 && f.whole.notes.size() == 2, "%s", f.alone.what.c_str());
    compare(f, "two files", {dialogues, questions});
    CHECK(f.whole.size() > 400 && f.whole.formats.size() == 2, "%s", f.alone.what.c_str());
    compare(f, "one record", {write(f, "one.jsonl", "{\"text\": \"a\"}")});
    CHECK(f.whole.size() == 1, "%s", f.alone.what.c_str());
    compare(f, "fewer records than parts", {write(f, "few.jsonl", "\n{\"text\": \"a\"}\n\n{\"text\": \"b\"}\n")});
    CHECK(f.whole.size() == 2 && f.whole.blank_lines == 2, "%s", f.alone.what.c_str());
    std::string array = "[{\"text\": \"a\"}";
    for (int i = 0; i < 100; i++) {
        array += ", {\"question\": \"" + std::string(size_t(i % 13), 'q') + "\", \"answer\": \"a\"}";
    }
    compare(f, "array", {questions, write(f, "array.json", array + "]\n"), dialogues});
    CHECK(f.whole.file.size() > 500 && f.whole.notes.size() == 3, "%s", f.alone.what.c_str());
    f.options.threads = 2;
    compare(f, "two threads each", {dialogues});
    CHECK(f.whole.size() == 300, "%s", f.alone.what.c_str());
    tokenizer_free(f.t);
}

void parts_bad_lines() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    f.options.max_tokens = 40;
    std::string bad = write(f, "bad.jsonl", mixed(110));
    std::string array = write(f, "bad.json", "[{\"text\": \"a\"}, 3, {\"text\": \"b\"}, {\"text\": \"\"}]");
    std::string none = write(f, "none.jsonl", "{\"text\": 1}\n{\"text\": 2}\n{\"foo\": 3}\n{\"text\": 4}\n");
    compare(f, "bad lines", {bad, array});
    CHECK(f.alone.code == 2 && text_has(f.alone.what, "... and 22 more\n42 of 94 records are bad"), "%s",
          f.alone.what.c_str());
    f.options.skip_bad = true;
    compare(f, "bad lines skipped", {bad, array});
    CHECK(!f.alone && f.whole.bad.size() == 42 && f.whole.dropped_without_target == 10 && f.whole.truncated > 0 &&
              f.whole.duplicates > 0 && f.whole.blank_lines == 20 && f.whole.warnings.size() >= 2,
          "%s", f.alone.what.c_str());
    f.options.replace_bad_utf8 = true;
    compare(f, "bad UTF-8 replaced", {bad});
    CHECK(!f.alone && f.whole.bad.size() == 30 && f.whole.warnings.size() == 3, "%s", f.alone.what.c_str());
    f.options.replace_bad_utf8 = false;
    compare(f, "no good line", {none});
    CHECK(text_has(f.alone.what, "no example is left of 4 records"), "%s", f.alone.what.c_str());
    compare(f, "a record that ends the run", {array, write(f, "chats.jsonl", mixed(30) + chats(4))});
    CHECK(text_has(f.alone.what, ":31: chat data, and the model is used without"), "%s", f.alone.what.c_str());
    f.options.skip_bad = false;
    compare(f, "pretty-printed", {write(f, "pretty.jsonl", "{\n  \"text\": \"a\"\n}\n")});
    CHECK(text_has(f.alone.what, "this file is pretty-printed"), "%s", f.alone.what.c_str());
    tokenizer_free(f.t);
}

void parts_bad_files() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    std::string fine = write(f, "fine.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n");
    const struct {
        const char* name;
        std::string bytes;
        const char* what;
    } cases[] = {{"empty.jsonl", "", "an empty file"},
                 {"blank.jsonl", "\n \n", "only blank lines"},
                 {"array.json", "[]", "an empty array"},
                 {"cut.json", "[{\"text\": \"a\"},\n {\"te", "ends inside a JSON value"},
                 {"a.gz", "\x1F\x8B\x08 ...", "compressed"},
                 {"missing.jsonl", "", "cannot open"}};
    for (const auto& c : cases) {
        std::string path = write(f, c.name, c.bytes);
        if (std::string(c.what) == "cannot open") {
            CHECK(!path_remove(path), "%s", path.c_str());
        }
        for (const std::vector<std::string>& files : {std::vector<std::string>{path}, {fine, path}, {path, fine}}) {
            compare(f, c.name, files);
            CHECK(f.alone.code == 2 && text_has(f.alone.what, c.what), "%s: %s", c.name, f.alone.what.c_str());
        }
    }
    f.options.format = "csv";
    compare(f, "no such format", {fine});
    CHECK(text_has(f.alone.what, "no such format"), "%s", f.alone.what.c_str());
    tokenizer_free(f.t);
}

// Several rounds: more lines than a portion has for each of five parts, and texts that go in several pieces.
void parts_rounds() {
    Fixture f;
    if (!fixture_make(f, Template::LLAMA3_RAW)) {
        return;
    }
    std::string bytes;
    for (int i = 0; i < 21000; i++) {
        bytes += "{\"text\": \"" + std::to_string(i % 20000) + "\"}\n";
    }
    std::string many = write(f, "many.jsonl", bytes);
    compare(f, "many lines", {many});
    CHECK(f.whole.size() == 21000 && f.whole.duplicates == 1000, "%s", f.alone.what.c_str());
    f.options.max_tokens = size_t(1) << 30;
    f.options.exchange_bytes = size_t(1) << 20;
    std::string record = "{\"text\": \"" + std::string(size_t(3) << 19, 'x') + "\"}\n";
    std::string long_line = write(f, "long.jsonl", chats(20) + record + chats(40));
    compare(f, "a long line", {long_line});
    CHECK(f.whole.size() == 61 && f.whole.longest == (size_t(3) << 19) + 2, "%s", f.alone.what.c_str());
    Parts run;
    load_parts(run, {{long_line}, {long_line}}, f.t, {f.options, f.options});
    CHECK(run.table.longest == f.options.exchange_bytes + 1, "a text of %zu bytes", run.table.longest);
    f.options.max_line_bytes = size_t(1) << 20;
    compare(f, "a line that is too long", {long_line});
    CHECK(text_has(f.alone.what, "long.jsonl:21: the line is too long"), "%s", f.alone.what.c_str());
    tokenizer_free(f.t);
}

// Each part does its own records and no others, and about as many bytes of them.
void parts_share() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    std::string bytes;
    for (int i = 0; i < 30; i++) {
        bytes += "{\"text\": \"0123456789\"}\n";
    }
    std::string file = write(f, "data.jsonl", bytes);
    // the middle part alone keeps three tokens of an example: what it did shows
    std::vector<DataOptions> options(3, f.options);
    options[1].max_tokens = 3;
    Parts run;
    if (load_parts(run, {{file}, {file}, {file}}, f.t, options)) {
        std::vector<uint8_t> cut(30, 0);
        std::fill(cut.begin() + 10, cut.begin() + 20, 1);
        for (size_t p = 0; p < 3; p++) {
            CHECK(!run.errors[p] && run.data[p].cut == cut, "part %zu: %s", p, run.errors[p].what.c_str());
        }
        CHECK(run.table.meetings == 1, "%zu meetings", run.table.meetings);
    }
    // by bytes, not by lines: one line as long as all the others
    std::vector<Item> items(9);
    for (size_t i = 0; i < 9; i++) {
        items[i].line.text.assign(i == 0 ? 799 : 99, 'x');
    }
    CHECK(parts_deal(items, 2) == (std::vector<size_t>{0, 1, 9}), "two parts");
    CHECK(parts_deal(items, 4) == (std::vector<size_t>{0, 1, 1, 5, 9}), "four parts");
    CHECK(parts_deal(items, 1) == (std::vector<size_t>{0, 9}), "one part");
    CHECK(parts_deal({}, 3) == (std::vector<size_t>{0, 0, 0, 0}), "no items");
    items.resize(2);
    CHECK(parts_deal(items, 5) == (std::vector<size_t>{0, 1, 1, 1, 1, 2}), "more parts than items");
    tokenizer_free(f.t);
}

// One machine lacks a file, or has another one: all stop, and the one that knows says why.
void parts_that_differ() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    std::string fine = write(f, "fine.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n");
    std::string other = write(f, "other.jsonl", "{\"text\": \"a\"}\n{\"text\": \"c\"}\n");
    std::string shorter = write(f, "shorter.jsonl", "{\"text\": \"a\"}\n");
    std::string rest = write(f, "rest.jsonl", "{\"text\": \"b\"}\n");
    std::string blank = write(f, "blank.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n\n");
    std::string array = write(f, "array.json", "[{\"text\": \"a\"}]");
    std::string cut = write(f, "cut.json", "[{\"text\": \"a\"}");
    std::string missing = path_join(f.dir, "missing.jsonl");
    const struct {
        std::vector<std::string> files, of_one;
        const char* what;  // what that one says; nullptr: all say that they differ
    } cases[] = {{{fine}, {missing}, "missing.jsonl: cannot open"},
                 {{fine, fine}, {fine, missing}, "missing.jsonl: cannot open"},
                 {{missing}, {fine}, ""},
                 {{array}, {cut}, "cut.json:1:15: "},
                 {{fine}, {cut}, "cut.json:1:15: "},
                 {{fine}, {other}, nullptr},
                 {{fine}, {shorter}, nullptr},
                 {{fine}, {blank}, nullptr},
                 {{fine}, {array}, nullptr},
                 {{shorter, rest}, {fine, rest}, nullptr}};
    for (const auto& c : cases) {
        for (size_t odd : {0, 1, 2}) {
            std::vector<std::vector<std::string>> files(3, c.files);
            files[odd] = c.of_one;
            Parts run;
            if (!load_parts(run, files, f.t, std::vector<DataOptions>(3, f.options))) {
                continue;
            }
            for (size_t p = 0; p < 3; p++) {
                const Error& e = run.errors[p];
                bool knows = c.what != nullptr && (c.what[0] != '\0') == (p == odd);
                const char* what = c.what == nullptr   ? "the processes do not read the same bytes here"
                                   : c.what[0] == '\0' ? "cannot open"
                                                       : c.what;
                CHECK(e.code == 2 && (c.what == nullptr || knows ? text_has(e.what, what) : e.what.empty()),
                      "part %zu, %zu is odd: code %d %s, expected %s", p, odd, e.code, e.what.c_str(), what);
                CHECK(run.data[p].size() == 0 && run.data[p].files.empty(), "something is left");
            }
        }
    }
    tokenizer_free(f.t);
}

// A file that shrinks under one of them, between two rounds.
void parts_shrunk_file() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    std::string bytes;
    for (int i = 0; i < 12000; i++) {
        bytes += "{\"text\": \"" + std::string(200, 'x') + "\"}\n";
    }
    std::string files[] = {write(f, "a.jsonl", bytes), write(f, "b.jsonl", bytes)};
    Parts run;
    run.table.disturb = [&](size_t part) {
        if (part == 1) {
            run.errors[1] = file_truncate(files[1], size_t(2) << 20);
        }
    };
    if (load_parts(run, {{files[0]}, {files[1]}}, f.t, {f.options, f.options})) {
        CHECK(run.table.meetings == 2, "%zu meetings", run.table.meetings);
        CHECK(text_has(run.errors[1].what, "b.jsonl") && text_has(run.errors[1].what, "changed"), "%s",
              run.errors[1].what.c_str());
        CHECK(run.errors[0].code == run.errors[1].code && run.errors[0].what.empty(), "%s", run.errors[0].what.c_str());
    }
    tokenizer_free(f.t);
}

std::string number(uint64_t value) {
    return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

// A text that breaks off at any byte, or holds too large a number anywhere, is an Error and never more.
void parts_damaged_texts() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    f.options.skip_bad = true;
    std::string file = write(f, "data.jsonl",
                             "{\"text\": \"aaaaaaaaaa\"}\n{\"text\": \"b\"}\n"  // process 0
                             "{\"text\": 5}\n{\"text\": \"c\", \"k\": 1}\n");   // process 1
    Parts run;
    if (!load_parts(run, {{file}, {file}}, f.t, {f.options, f.options})) {
        return;
    }
    CHECK(!run.errors[0] && run.table.meetings == 1 && run.data[0].size() == 3, "%s", run.errors[0].what.c_str());
    const std::string whole = run.table.first_texts[1];
    DataOptions options = f.options;
    options.parts = 2;
    std::string arrives;
    int calls = 0;
    options.exchange = [&](const std::string& mine) {
        return ++calls == 1 ? std::vector<std::string>{mine, arrives} : std::vector<std::string>{".", "."};
    };
    Dataset data;
    auto load = [&](const std::string& text) {
        arrives = text;
        calls = 0;
        return dataset_load(data, {file}, f.t, options);
    };
    Error e = load(whole);
    CHECK(!e && difference(data, run.data[0]).empty(), "the whole text: %s", e.what.c_str());
    for (size_t n = 0; n < whole.size(); n++) {
        e = load(whole.substr(0, n));
        CHECK(e.code == 1 && text_has(e.what, "process 1 of 2"), "%zu bytes of %zu: %s", n, whole.size(),
              e.what.c_str());
        e = load(whole.substr(0, n) + ".");
        CHECK(e.code == 1 || n + 1 == whole.size(), "%zu bytes of %zu and an end: %s", n, whole.size(), e.what.c_str());
    }
    e = load(whole.substr(0, whole.size() - 1) + "more.");
    CHECK(e.code == 1, "bytes after the last record: %s", e.what.c_str());
    for (size_t n = 0; n + 8 < whole.size(); n++) {
        std::string changed = whole;
        std::fill(changed.begin() + long(n), changed.begin() + long(n) + 8, char(0xFF));
        e = load(changed);
        CHECK(e || data.read == 4, "byte %zu changed", n);
    }
    // a record of no format, and one with fewer targets than tokens
    const std::string swaps[][2] = {{number(TEXT_ONLY << 4), number(N_RECORD_FORMATS << 4)},
                                    {number(3) + std::string("\0\1\1", 3), number(2) + std::string("\0\1", 2)}};
    for (const auto& swap : swaps) {
        size_t at = whole.find(swap[0]);
        if (CHECK(at != std::string::npos, "not in the text")) {
            e = load(std::string(whole).replace(at, swap[0].size(), swap[1]));
            CHECK(e.code == 1 && text_has(e.what, "process 1 of 2"), "%s", e.what.c_str());
        }
    }
    options.exchange = [](const std::string&) { return std::vector<std::string>(); };
    e = dataset_load(data, {file}, f.t, options);
    CHECK(e.code == 1 && text_has(e.what, "process 0 of 2"), "no text at all: %s", e.what.c_str());
    tokenizer_free(f.t);
}

}  // namespace

extern const Test parts_tests[] = {{"parts_good_files", parts_good_files},
                                   {"parts_bad_lines", parts_bad_lines},
                                   {"parts_bad_files", parts_bad_files},
                                   {"parts_rounds", parts_rounds},
                                   {"parts_share", parts_share},
                                   {"parts_that_differ", parts_that_differ},
                                   {"parts_shrunk_file", parts_shrunk_file},
                                   {"parts_damaged_texts", parts_damaged_texts},
                                   {nullptr, nullptr}};
