// The JSON reader and writer: what must be taken, what must be refused and in which words. The classes of cases are
// those of JSONTestSuite (Seriot, "Parsing JSON is a minefield"); the values follow from RFC 8259.
#include "io/json.h"

#include <clocale>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "dev/tests/test.h"
#include "io/file.h"

static Error parse(Json& j, const std::string& text, const JsonLimits& limits = {}) {
    return json_parse(j, text.data(), text.size(), "f", limits);
}

static void json_accepts() {
    static const char* const texts[] = {
        "null",
        "true",
        "false",
        "0",
        "-0",
        "1",
        "-1",
        "1.5",
        "1e5",
        "1E+5",
        "1e-5",
        "0.1e1",
        "\"\"",
        "\"a\"",
        "[]",
        "{}",
        " [ ] ",
        "\t{\r\n}\n",
        "[1,2,3]",
        "[[[]]]",
        "{\"a\":{}}",
        "{\"a\":1,\"b\":[]}",
        "[\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"]",
        "[\"\\u0060\\u012a\\u12AB\"]",
        "[\"\\uD83D\\uDE00\"]",
        "[\"\\u0000\"]",
        "{\"\":0}",
        "[null]",
        "[1e400000000000 ]",
        "\"\x7f\"",
        "\"\xE2\x80\xA8\xE2\x80\xA9\"",
        "[0.4e006]",
        "[-123.456e-7]",
        "\"\\uFFFF\"",
        "\"\xF4\x8F\xBF\xBF\"",
        "[1]\r",
        "\xEF\xBB\xBF{}",
        "{\"a\":\"b\",\"A\":\"b\"}",
        "[18446744073709551616]",
        "[1e-999]",
        "\"\\\\ud800\"",
    };
    for (const char* text : texts) {
        Json j;
        Error e = parse(j, text);
        bool overflows = strcmp(text, "[1e400000000000 ]") == 0;  // grammatical, but no double
        CHECK(bool(e) == overflows, "%s: %s", text, e.what.c_str());
    }
}

struct Reject {
    const char* text;
    size_t n;          // 0: strlen(text)
    const char* what;  // whole message after "f:"
    const char* hint;  // part of the hint
};

static void json_rejects() {
    static const Reject cases[] = {
        {"", 0, "1:1: empty (need a JSON value)", ""},
        {"  \n ", 0, "2:2: empty (need a JSON value)", ""},
        {"[1,]", 0, "1:3: trailing comma is not JSON", "remove the comma"},
        {"{\"a\":1 , }", 0, "1:8: trailing comma is not JSON", "remove"},
        {"[1,,2]", 0, "1:4: not JSON (found ',', need a value)", ""},
        {"[,1]", 0, "1:2: not JSON (found ',', need a value)", ""},
        {"{'a':1}", 0, "1:2: single quotes are not JSON (need double quotes)", ""},
        {"[\"a\", 'b']", 0, "1:7: single quotes are not JSON (need double quotes)", ""},
        {"{a:1}", 0, "1:2: not JSON (found 'a', need a key in double quotes)", ""},
        {"{1:1}", 0, "1:2: not JSON (found '1', need a key in double quotes)", ""},
        {"// x\n1", 0, "1:1: comments are not JSON", "remove the comment"},
        {"[1, /* x */ 2]", 0, "1:5: comments are not JSON", ""},
        {"{\"a\":1 # x\n}", 0, "1:8: comments are not JSON", ""},
        {"[NaN]", 0, "1:2: NaN and Infinity are not JSON (found 'NaN')", "write a number or null"},
        {"[nan]", 0, "1:2: NaN and Infinity are not JSON (found 'nan')", ""},
        {"[-Infinity]", 0, "1:2: NaN and Infinity are not JSON (found '-Infinity')", ""},
        {"{\"a\": Infinity}", 0, "1:7: NaN and Infinity are not JSON (found 'Infinity')", ""},
        {"[True]", 0, "1:2: not JSON (found 'True', need a value)", "Python"},
        {"[None]", 0, "1:2: not JSON (found 'None', need a value)", "Python"},
        {"[nul]", 0, "1:2: not JSON (found 'nul', need a value)", ""},
        {"[TRUE]", 0, "1:2: not JSON (found 'TRUE', need a value)", ""},
        {"[undefined]", 0, "1:2: not JSON (found 'undefined', need a value)", ""},
        {"*", 0, "1:1: not JSON (found '*', need a value)", ""},
        {"]", 0, "1:1: not JSON (found ']', need a value)", ""},
        {"\xC3\xA9", 0, "1:1: not JSON (found '\xC3\xA9', need a value)", ""},
        {"[1 2]", 0, "1:4: not JSON (found '2', need ',' or ']')", ""},
        {"[1}", 0, "1:3: not JSON (found '}', need ',' or ']')", ""},
        {"[\"a\" \"b\"]", 0, "1:6: not JSON (found '\"', need ',' or ']')", ""},
        {"{\"a\" 1}", 0, "1:6: not JSON (found '1', need ':' after the key)", ""},
        {"{\"a\",1}", 0, "1:5: not JSON (found ',', need ':' after the key)", ""},
        {"{\"a\"::1}", 0, "1:6: not JSON (found ':', need a value)", ""},
        {"{\"a\":}", 0, "1:6: not JSON (found '}', need a value)", ""},
        {"{\"a\":1 \"b\":2}", 0, "1:8: not JSON (found '\"', need ',' or '}')", ""},
        {"{\"a\":1]", 0, "1:7: not JSON (found ']', need ',' or '}')", ""},
        {"[+1]", 0, "1:2: not JSON (found '+', need a value)", ""},
        {"[.5]", 0, "1:2: not JSON (found '.', need a value)", ""},
        {"[01]", 0, "1:3: a number must not begin with a zero", ""},
        {"[00]", 0, "1:3: a number must not begin with a zero", ""},
        {"-01", 0, "1:3: a number must not begin with a zero", ""},
        {"[1.]", 0, "1:4: malformed number (found ']', need a digit)", ""},
        {"[1.e1]", 0, "1:4: malformed number (found 'e1', need a digit)", ""},
        {"[1e]", 0, "1:4: malformed number (found ']', need a digit)", ""},
        {"[1e+]", 0, "1:5: malformed number (found ']', need a digit)", ""},
        {"[-]", 0, "1:3: malformed number (found ']', need a digit)", ""},
        {"[--1]", 0, "1:3: malformed number (found '-', need a digit)", ""},
        {"[0x1F]", 0, "1:3: malformed number (found 'x1F' after it)", ""},
        {"[1.5.2]", 0, "1:5: malformed number (found '.' after it)", ""},
        {"[1,2{", 0, "1:5: not JSON (found '{', need ',' or ']')", ""},
        {"1_000", 0, "1:2: malformed number (found '_000' after it)", ""},
        {"{} {}", 0, "1:4: text after the JSON value (found '{', need the end)", ""},
        {"{}{}", 0, "1:3: text after the JSON value (found '{', need the end)", ""},
        {"1\n2", 0, "2:1: text after the JSON value (found '2', need the end)", ""},
        {"[]]", 0, "1:3: text after the JSON value (found ']', need the end)", ""},
        {"[1],", 0, "1:4: text after the JSON value (found ',', need the end)", ""},
        {"{} // x", 0, "1:4: text after the JSON value (found '/', need the end)", ""},
        {"{}\0", 3, "1:3: NUL byte outside a string", ""},
        {"12\0 34", 6, "1:3: NUL byte outside a string", ""},
        {"[ \0]", 4, "1:3: NUL byte outside a string", ""},
        {"[", 0, "1:2: the file ends inside a JSON value", "cut off"},
        {"{\"a\"", 0, "1:5: the file ends inside a JSON value", ""},
        {"{\"a\":", 0, "1:6: the file ends inside a JSON value", ""},
        {"[1", 0, "1:3: the file ends inside a JSON value", ""},
        {"[1,\n", 0, "2:1: the file ends inside a JSON value", ""},
        {"\"abc", 0, "1:5: the file ends inside a JSON value", ""},
        {"\"abc\\", 0, "1:6: the file ends inside a JSON value", ""},
        {"tru", 0, "1:4: the file ends inside a JSON value", ""},
        {"-", 0, "1:2: the file ends inside a JSON value", ""},
        {"1.", 0, "1:3: the file ends inside a JSON value", ""},
        {"[\"\t\"]", 0, "1:3: control character 0x09 inside a string must be escaped (as \\t)", ""},
        {"[\"a\nb\"]", 0, "1:4: control character 0x0A inside a string must be escaped (as \\n)", ""},
        {"\"\x1b\"", 0, "1:2: control character 0x1B inside a string must be escaped (as \\u00XX)", ""},
        {"\"a\0\"", 4, "1:3: control character 0x00 inside a string must be escaped (as \\u00XX)", ""},
        {"\"\\x41\"", 0, "1:2: no such escape in JSON (found '\\x')", "backslash"},
        {"{\"\\'\":1}", 0, "1:3: no such escape in JSON (found '\\'')", ""},
        {"\"\\u12G4\"", 0, "1:2: \\u must be followed by four hexadecimal digits", ""},
        {"\"\\u00\"", 0, "1:2: \\u must be followed by four hexadecimal digits", ""},
        {"[\"ab\\uD800\"]", 0, "1:5: lone surrogate \\uD800 in a string (need a pair)", "cut"},
        {"[\"\\uDC00\"]", 0, "1:3: lone surrogate \\uDC00 in a string (need a pair)", ""},
        {"[\"\\uD800\\uD800\"]", 0, "1:3: lone surrogate \\uD800 in a string (need a pair)", ""},
        {"[\"\\uDE00\\uD83D\"]", 0, "1:3: lone surrogate \\uDE00 in a string (need a pair)", ""},
        {"[\"\\uD800\\n\"]", 0, "1:3: lone surrogate \\uD800 in a string (need a pair)", ""},
        {"{\"k\":1,\n \"k\":2}", 0, "2:2: duplicate key \"k\"", "keep one"},
        {"{\"k\":{\"k\":1},\"\\u006b\":2}", 0, "1:14: duplicate key \"k\"", ""},
        {"[1, 1e400]", 0, "1:5: number 1e400 is beyond the range of a double", ""},
        {"[-1e9999]", 0, "1:2: number -1e9999 is beyond the range of a double", ""},
        {"[\"\xC3\xA9\xFF\"]", 0, "1:4: invalid UTF-8 (found byte 0xFF)", "save as UTF-8"},
        {"\"\xC0\xAF\"", 0, "1:2: invalid UTF-8 (found byte 0xC0)", ""},
        {"\"\xED\xA0\x80\"", 0, "1:2: invalid UTF-8 (found byte 0xED)", ""},
        {"\"\xF4\x90\x80\x80\"", 0, "1:2: invalid UTF-8 (found byte 0xF4)", ""},
        {"\"\xE2\x82\"", 0, "1:2: invalid UTF-8 (found byte 0xE2)", ""},
        {"\"\x80\"", 0, "1:2: invalid UTF-8 (found byte 0x80)", ""},
        {"\xFF\xFE{\0}\0", 6, "1:1: the text is UTF-16 or UTF-32 (need UTF-8)", "save as UTF-8"},
        {"\xFE\xFF\0{\0}", 6, "1:1: the text is UTF-16 or UTF-32 (need UTF-8)", "save as UTF-8"},
        {"{\0}\0", 4, "1:1: the text is UTF-16 or UTF-32 (need UTF-8)", "save as UTF-8"},
        {"\xEF\xBB\xBF\xEF\xBB\xBF{}", 0, "1:1: second byte order mark", ""},
        {"[\xEF\xBB\xBF]", 0, "1:2: not JSON (found '\xEF\xBB\xBF', need a value)", ""},
        {"[\xC2\xA0]", 0, "1:2: not JSON (found '\xC2\xA0', need a value)", ""},
        {"[\f]", 0, "1:2: not JSON (found '\\x0C', need a value)", ""},
    };
    for (const Reject& c : cases) {
        Json j;
        std::string text(c.text, c.n ? c.n : strlen(c.text));
        Error e = parse(j, text);
        CHECK(e.code == 2 && e.what == std::string("f:") + c.what && text_has(e.hint, c.hint), "%s: %s | %s",
              printable(text).c_str(), e.what.c_str(), e.hint.c_str());
        CHECK(j.type == Json::NUL, "%s: left a value", printable(text).c_str());
    }
}

static void json_values() {
    Json j;
    Error e =
        parse(j,
              "{\"i\":-9223372036854775808,\"u\":18446744073709551615,\"m\":9223372036854775807,\"r\":1.0,\"big\":"
              "18446744073709551616,\"z\":-0,\"zr\":-0.0,\"b\":true,\"n\":null,\"s\":\"\\uD83D\\uDE00\\u0000x\"}");
    CHECK(!e, "%s", e.what.c_str());
    CHECK(j.find("i")->type == Json::INT && j.find("i")->integer == INT64_MIN, "INT64_MIN");
    CHECK(j.find("u")->type == Json::UINT && j.find("u")->natural == UINT64_MAX, "UINT64_MAX");
    CHECK(j.find("m")->type == Json::INT && j.find("m")->integer == INT64_MAX, "INT64_MAX");
    CHECK(j.find("r")->type == Json::REAL && j.find("r")->real == 1, "1.0 is a REAL");
    CHECK(j.find("big")->type == Json::REAL && j.find("big")->real == 18446744073709551616.0, "2^64");
    CHECK(std::signbit(j.find("z")->number()) && std::signbit(j.find("zr")->number()), "the sign of zero");
    CHECK(j.find("b")->type == Json::BOOL && j.find("b")->boolean && j.find("n")->type == Json::NUL, "true, null");
    CHECK(j.find("s")->string == std::string("\xF0\x9F\x98\x80\0x", 6), "the string");
    CHECK(!j.find("absent") && !j.find("s")->find("x"), "find of what is not there");
    CHECK(j.keys.size() == 10 && j.keys[0] == "i" && j.keys[9] == "s", "keys in file order");
    CHECK(!parse(j, "[5e-324, 2.2250738585072011e-308, 0.1, 1e23]"), "numbers");
    CHECK(j.items[0].real == 5e-324 && j.items[1].real == 2.2250738585072011e-308 && j.items[2].real == 0.1 &&
              j.items[3].real == 1e23,
          "correctly rounded");
}

static std::string nested(size_t depth) {
    return std::string(depth, '[') + std::string(depth, ']');
}

static void json_depth() {
    Json j;
    CHECK(!parse(j, nested(64)), "64 deep");
    Error e = parse(j, nested(65));
    CHECK(e.what == "f:1:65: nesting deeper than 64", "%s", e.what.c_str());
    e = parse(j, std::string(100000, '['));
    CHECK(e.what == "f:1:65: nesting deeper than 64", "%s", e.what.c_str());
    std::string text;
    for (int i = 0; i < 50000; i++) {
        text += "[{\"\":";
    }
    e = parse(j, text);
    CHECK(text_has(e.what, "nesting deeper than 64"), "%s", e.what.c_str());
    JsonLimits limits;
    limits.depth = 512;
    CHECK(!parse(j, nested(512), limits) && parse(j, nested(513), limits), "a cap of 512");
}

static void json_limits() {
    Json j;
    JsonLimits limits;
    limits.first_line = 7;
    limits.line_is_record = true;
    Error e = parse(j, "{\"a\": \"\xC3\xA9\" x", limits);
    CHECK(e.what == "f:7:11: not JSON (found 'x', need ',' or '}')", "%s", e.what.c_str());
    e = parse(j, "{\"a\": 1", limits);
    CHECK(e.what == "f:7:8: the line ends inside a JSON value", "%s", e.what.c_str());

    limits = JsonLimits();
    limits.by_byte = true;
    limits.first_byte = 8;
    e = parse(j, "{\"\xC3\xA9\" x", limits);
    CHECK(e.what == "f unreadable at byte 14: not JSON (found 'x', need ':' after the key)", "%s", e.what.c_str());
    e = parse(j, "\xEF\xBB\xBF{}", limits);
    CHECK(e.what == "f unreadable at byte 8: byte order mark", "%s", e.what.c_str());

    limits = JsonLimits();
    limits.values = 4;
    CHECK(!parse(j, "[1,2,3]", limits), "four values");
    e = parse(j, "[1,2,3,4]", limits);
    CHECK(text_has(e.what, "more than 4 values"), "%s", e.what.c_str());

    limits = JsonLimits();
    limits.replace_surrogates = true;
    CHECK(!parse(j, "[\"\\uD800\", \"\\uD83D\\uDE00\", \"\\uDC00\\uD800x\", \"\\\\uD800\"]", limits), "surrogates");
    CHECK(j.items[0].string == "\xEF\xBF\xBD" && j.items[1].string == "\xF0\x9F\x98\x80" &&
              j.items[2].string == "\xEF\xBF\xBD\xEF\xBF\xBDx" && j.items[3].string == "\\uD800",
          "replaced surrogates");
}

static Error collect(void* context, std::string& key, Json& value) {
    std::string& seen = *static_cast<std::string*>(context);
    seen += key + "=" + json_write(value) + ";";
    return key == "bad" ? bad_input("stopped at %s", key.c_str()) : Error();
}

static void json_members() {
    std::string seen;
    JsonLimits limits;
    limits.member = collect;
    limits.context = &seen;
    limits.values = 5;
    Json j;
    CHECK(!parse(j, "{\"a\":{\"x\":[1]},\"b\":2,\"c\":[{\"a\":1},4],\"d\":\"s\"}", limits), "streamed");
    CHECK(seen == "a={\"x\":[1]};b=2;c=[{\"a\":1},4];d=\"s\";", "%s", seen.c_str());
    CHECK(j.type == Json::OBJECT && j.items.empty(), "members are not kept");
    Error e = parse(j, "{\"a\":1,\"b\":2,\"a\":3}", limits);
    CHECK(e.what == "f:1:14: duplicate key \"a\"", "%s", e.what.c_str());
    e = parse(j, "{\"a\":1,\"bad\":2,", limits);
    CHECK(e.what == "stopped at bad", "%s", e.what.c_str());
    e = parse(j, "{\"a\":1,}", limits);
    CHECK(e.what == "f:1:7: trailing comma is not JSON", "%s", e.what.c_str());
    seen.clear();
    CHECK(!parse(j, "[{\"a\":1}]", limits) && seen.empty() && j.items.size() == 1, "arrays are kept whole");
}

// Duplicate keys in an object of 200,000 are found, and in linear time: comparing each with each would take minutes.
static void json_many_keys() {
    std::string text = "{";
    for (int i = 0; i < 200000; i++) {
        text += "\"key" + std::to_string(i) + "\":0,";
    }
    Json j;
    clock_t start = clock();  // processor time, so that a busy machine does not count
    CHECK(!parse(j, text + "\"last\":1}") && j.keys.size() == 200001, "200,001 keys");
    Error e = parse(j, text + "\"key17\":1}");
    double seconds = double(clock() - start) / CLOCKS_PER_SEC;
    CHECK(text_has(e.what, "duplicate key \"key17\""), "%s", e.what.c_str());
    CHECK(seconds < 10, "took %.1f s", seconds);
}

static void json_writes() {
    Json j = Json::object();
    j.set("b", Json::array().push(1).push(-2.5).push(1.0).push(1e300).push(NAN).push(UINT64_MAX));
    j.set("a", "q\"\\\n\t\x01\x7f\xC3\xA9\xFF/").set("c", Json::object()).set("d", Json::array()).set("e", Json());
    j.set("c", true);
    std::string flat = json_write(j);
    CHECK(flat ==
              "{\"b\":[1,-2.5,1.0,1e+300,null,18446744073709551615],\"a\":\"q\\\"\\\\\\n\\t\\u0001\x7f\xC3\xA9"
              "\xEF\xBF\xBD/\",\"c\":true,\"d\":[],\"e\":null}",
          "%s", flat.c_str());
    Json small = Json::object().set("b", 1).set("a", Json::array().push("x").push(Json::object()));
    std::string tree = json_write(small, 2, true);
    CHECK(tree == "{\n  \"a\": [\n    \"x\",\n    {}\n  ],\n  \"b\": 1\n}", "%s", tree.c_str());

    uint64_t bits = 88172645463325252u;  // xorshift: doubles of every size read back exactly, and stay REAL
    for (int i = 0; i < 20000; i++) {
        bits ^= bits << 13;
        bits ^= bits >> 7;
        bits ^= bits << 17;
        double v;
        memcpy(&v, &bits, 8);
        if (!std::isfinite(v)) {
            continue;
        }
        v = i % 4 == 0 ? std::floor(v) : v;
        Json back;
        Error e = parse(back, json_write(Json(v)));
        if (!CHECK(!e && back.type == Json::REAL && memcmp(&back.real, &v, 8) == 0, "%a", v)) {
            return;
        }
    }
}

// Numbers are read and written the same where the decimal separator is a comma.
static void json_locale() {
    const char* old = nullptr;
    for (const char* name : {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "ru_RU.UTF-8"}) {
        old = old ? old : setlocale(LC_ALL, name);
    }
    if (!old) {  // not installed: make one, where the tools for that are
        std::string directory = test_directory(), out;
        if (run_command(&out, "localedef -i de_DE -f UTF-8 " + path_join(directory, "de_DE.UTF-8")) < 2) {
            setenv("LOCPATH", directory.c_str(), 1);
            old = setlocale(LC_ALL, "de_DE.UTF-8");
            unsetenv("LOCPATH");
        }
    }
    CHECK(!old || strcmp(localeconv()->decimal_point, ",") == 0, "%s has no decimal comma", old);
    Json j;
    Error e = parse(j, "[1.5,2e-1]");
    std::string text = json_write(j);
    bool same = !e && j.items[0].real == 1.5 && j.items[1].real == 0.2 && text == "[1.5,0.2]";
    setlocale(LC_ALL, "C");
    CHECK(same, "%s", text.c_str());
    if (!old) {
        test_skip("no locale with a decimal comma is installed");
    }
}

static void json_tokenizer() {
    std::string directory = llama3_tokenizer_directory();
    if (directory.empty()) {
        return test_skip("no Llama-3 vocabulary");
    }
    Json j;
    Error e = json_read_file(j, path_join(directory, "tokenizer.json"));
    CHECK(!e, "%s", e.what.c_str());
    const Json* model = j.find("model");
    const Json* merges = model ? model->find("merges") : nullptr;
    CHECK(merges && merges->items.size() == 280147, "the merges");
    const Json* vocabulary = model ? model->find("vocab") : nullptr;
    CHECK(vocabulary && vocabulary->keys.size() == 128000, "the vocabulary");
}

static void json_files() {
    std::string path = path_join(test_directory(), "x.json");
    Json j;
    Error e = json_read_file(j, path);
    CHECK(e.code == 2 && e.what == path + ": cannot open: No such file or directory", "%s", e.what.c_str());
    CHECK(!file_replace(path, "{\n  \"a\": 1,\n  \"b\" 2\n}\n"), "write");
    e = json_read_file(j, path);
    CHECK(e.what == path + ":3:7: not JSON (found '2', need ':' after the key)", "%s", e.what.c_str());
}

extern const Test json_tests[];
const Test json_tests[] = {
    {"json_accepts", json_accepts},     {"json_rejects", json_rejects}, {"json_values", json_values},
    {"json_depth", json_depth},         {"json_limits", json_limits},   {"json_members", json_members},
    {"json_many_keys", json_many_keys}, {"json_writes", json_writes},   {"json_locale", json_locale},
    {"json_tokenizer", json_tokenizer}, {"json_files", json_files},     {nullptr, nullptr},
};
