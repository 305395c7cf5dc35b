// See json.h. nlohmann's parser drives a handler that builds our values; it reads through an iterator of ours, so that
// the place of every token is known. When it stops, diagnose() looks at the text itself and says what is wrong there.
#include "io/json.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iterator>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "io/file.h"

// ------------------------------------------------------------------------------------------------------ values

Json& Json::set(const std::string& key, Json value) {
    if (type != OBJECT) {
        *this = object();
    }
    for (size_t i = 0; i < keys.size(); i++) {
        if (keys[i] == key) {
            items[i] = std::move(value);
            return *this;
        }
    }
    keys.push_back(key);
    items.push_back(std::move(value));
    return *this;
}

Json& Json::push(Json value) {
    if (type != ARRAY) {
        *this = array();
    }
    items.push_back(std::move(value));
    return *this;
}

const Json* Json::find(const char* key) const {
    for (size_t i = 0; i < keys.size(); i++) {
        if (keys[i] == key) {
            return &items[i];
        }
    }
    return nullptr;
}

double Json::number() const {
    return type == INT ? double(integer) : type == UINT ? double(natural) : type == REAL ? real : NAN;
}

const char* Json::type_name() const {
    switch (type) {
        case NUL: return "null";
        case BOOL: return "a boolean";
        case INT:
        case UINT:
        case REAL: return "a number";
        case STRING: return "a string";
        case ARRAY: return "an array";
        case OBJECT: return "an object";
    }
    return "";
}

// ------------------------------------------------------------------------------------------------------ the text

// Input iterator whose copies share one place in the text.
struct Reader {
    using iterator_category = std::input_iterator_tag;
    using value_type = char;
    using difference_type = std::ptrdiff_t;
    using pointer = const char*;
    using reference = const char&;

    const char** at;
    const char* end;  // of the text; the iterator that stands for the end has at == nullptr

    reference operator*() const { return **at; }
    Reader& operator++() {
        ++*at;
        return *this;
    }
    bool operator==(const Reader&) const { return *at == end; }
    bool operator!=(const Reader&) const { return *at != end; }
};

struct Text {
    const char* begin;
    size_t n;
    const std::string* name;
    const JsonLimits* limits;
};

static bool is_space(char c) {
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

static bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

static size_t skip_space(const Text& t, size_t i) {
    while (i < t.n && is_space(t.begin[i])) {
        i++;
    }
    return i;
}

// "NAME:LINE:COL: what".
static Error error_at(const Text& t, size_t i, const std::string& what) {
    const JsonLimits& l = *t.limits;
    std::string name = printable(*t.name, 4096);
    if (l.by_byte) {
        return bad_input("%s unreadable at byte %zu: %s", name.c_str(), l.first_byte + i, what.c_str());
    }
    size_t line = l.first_line, column = 1;
    for (size_t k = 0; k < std::min(i, t.n);) {
        if (t.begin[k] == '\n' && !l.line_is_record) {
            line++;
            column = 0;
        }
        k += std::max<size_t>(utf8_sequence(t.begin + k, t.n - k), 1);
        column++;
    }
    return bad_input("%s:%zu:%zu: %s", name.c_str(), line, column, what.c_str());
}

// Index of the first byte that is not UTF-8, n when there is none.
static size_t invalid_utf8(const char* text, size_t n) {
    for (size_t i = 0; i < n;) {
        uint64_t eight;
        if (n - i >= 8 && (memcpy(&eight, text + i, 8), (eight & UINT64_C(0x8080808080808080)) == 0)) {
            i += 8;
            continue;
        }
        size_t length = utf8_sequence(text + i, n - i);
        if (length == 0) {
            return i;
        }
        i += length;
    }
    return n;
}

// The code unit of the escape \uXXXX at text, -1 when there is none.
static int escape_unit(const char* text, size_t n) {
    unsigned unit = 0;
    if (n < 6 || text[0] != '\\' || text[1] != 'u') {
        return -1;
    }
    auto [end, failed] = std::from_chars(text + 2, text + 6, unit, 16);
    return failed == std::errc() && end == text + 6 ? int(unit) : -1;
}

// Index of the first surrogate escape from `from` on that has no partner, n when there is none. Escapes occur in
// strings only, so the strings need not be followed.
static size_t lone_surrogate(const char* text, size_t n, size_t from) {
    for (size_t i = from; i < n;) {
        const char* found = static_cast<const char*>(memchr(text + i, '\\', n - i));
        if (!found) {
            return n;
        }
        i = size_t(found - text);
        int unit = escape_unit(text + i, n - i);
        if (unit < 0xD800 || unit > 0xDFFF) {
            i += 2;
            continue;
        }
        int next = escape_unit(text + std::min(i + 6, n), n - std::min(i + 6, n));
        if (unit >= 0xDC00 || next < 0xDC00 || next > 0xDFFF) {
            return i;
        }
        i += 12;
    }
    return n;
}

// ------------------------------------------------------------------------------------------------------ building

struct Open {
    Json* value;
    std::unordered_set<std::string> seen;  // the keys, once there are too many to compare one by one
};

static const size_t FEW_KEYS = 16;

struct Builder {
    Text text;
    const char* at;        // the reader's place: one past the last byte read
    const char* last_end;  // end of the last token that was taken
    Json* root;
    std::vector<Open> open;
    size_t values = 0;
    bool has_root = false, after_key = false, after_number = false;
    size_t failed_at = 0;  // where nlohmann stopped
    bool overflow = false;
    Error error;

    bool fail(size_t i, const std::string& what, const std::string& hint = "") {
        error = error_at(text, i, what).hinted(hint);
        return false;
    }
    size_t here() const { return size_t(at - text.begin); }
    bool taken() {
        last_end = at;
        after_key = after_number = false;
        return true;
    }

    // Puts a value where it belongs and returns its address; nullptr: over the limit.
    Json* place(Json&& value) {
        if (++values > text.limits->values) {
            fail(here() - 1, "more than " + std::to_string(text.limits->values) + " values");
            return nullptr;
        }
        has_root = true;
        if (open.empty()) {
            *root = std::move(value);
            return root;
        }
        std::vector<Json>& items = open.back().value->items;
        items.push_back(std::move(value));
        return &items.back();
    }
    // A value is complete: members of the outermost object may be wanted at once.
    bool complete() {
        taken();
        if (!text.limits->member || open.size() != 1 || root->type != Json::OBJECT) {
            return true;
        }
        error = text.limits->member(text.limits->context, root->keys.back(), root->items.back());
        root->keys.clear();
        root->items.clear();
        values = 0;
        return !error;
    }
    bool scalar(Json&& value) { return place(std::move(value)) && complete(); }
    bool number(Json&& value, bool zero = false) {
        const char* before = last_end;
        if (!scalar(std::move(value))) {
            return false;
        }
        // The byte after a number has been read too, unless the text ended. It is a digit only in numbers like 01.
        bool digit_after_zero = zero && last_end - before >= 2 && last_end[-2] == '0' && is_digit(last_end[-1]);
        last_end -= is_digit(last_end[-1]) && !digit_after_zero ? 0 : 1;
        after_number = true;
        return true;
    }
    bool start(Json&& value) {
        if (open.size() >= size_t(text.limits->depth)) {
            return fail(here() - 1, "nesting deeper than " + std::to_string(text.limits->depth));
        }
        Json* placed = place(std::move(value));
        if (!placed) {
            return false;
        }
        open.push_back({placed, {}});
        return taken();
    }
    bool end() {
        open.pop_back();
        return complete();
    }

    // The interface that nlohmann calls. number_integer(0) is "-0": what has no sign goes to number_unsigned.
    bool null() { return scalar(Json()); }
    bool boolean(bool v) { return scalar(Json(v)); }
    bool number_integer(int64_t v) { return v == 0 ? number(Json(-0.0), true) : number(Json((long long)v)); }
    bool number_unsigned(uint64_t v) { return number(Json((unsigned long long)v), v == 0); }
    bool number_float(double v, const std::string&) { return number(Json(v)); }
    bool string(std::string& v) { return scalar(Json(std::move(v))); }
    bool binary(nlohmann::json::binary_t&) { return false; }
    bool start_object(size_t) { return start(Json::object()); }
    bool end_object() { return end(); }
    bool start_array(size_t) { return start(Json::array()); }
    bool end_array() { return end(); }
    bool key(std::string& k) {
        Open& o = open.back();
        std::vector<std::string>& keys = o.value->keys;
        bool kept = !(text.limits->member && open.size() == 1);
        bool twice;
        if (kept && keys.size() < FEW_KEYS) {
            twice = std::find(keys.begin(), keys.end(), k) != keys.end();
        } else {
            if (o.seen.empty()) {
                o.seen.insert(keys.begin(), keys.end());
            }
            twice = !o.seen.insert(k).second;
        }
        if (twice) {
            size_t i = skip_space(text, size_t(last_end - text.begin));
            i = text.begin[i] == ',' ? skip_space(text, i + 1) : i;
            return fail(i, "duplicate key \"" + printable(k) + "\"", "keep one of the two");
        }
        keys.push_back(std::move(k));
        taken();
        after_key = true;
        return true;
    }
    bool parse_error(size_t position, const std::string&, const nlohmann::json::exception& e) {
        failed_at = position > 0 ? position - 1 : 0;
        overflow = e.id == 406;
        return false;
    }
};

// ------------------------------------------------------------------------------------------------------ diagnosis

static Error ends_inside(const Text& t) {
    const char* what = t.limits->line_is_record ? "the line" : t.limits->by_byte ? "it" : "the file";
    return error_at(t, t.n, std::string(what) + " ends inside a JSON value")
        .hinted(t.limits->line_is_record
                    ? "each line must hold one whole JSON value; a last line that is cut off means "
                      "a truncated copy"
                    : "the copy or download was probably cut off: get the file again");
}

// What stands at index i, for "found ...".
static std::string found_at(const Text& t, size_t i) {
    size_t end = i;
    while (end < t.n && end - i < 24 && (isalnum(static_cast<unsigned char>(t.begin[end])) || t.begin[end] == '_')) {
        end++;
    }
    if (end == i) {
        end = i + std::max<size_t>(utf8_sequence(t.begin + i, t.n - i), 1);
    }
    return "'" + printable(std::string(t.begin + i, end - i)) + "'";
}

// A value or key should begin at i and what stands there is none.
static Error not_a_value(const Text& t, size_t i, const char* need) {
    std::string rest(t.begin + i, std::min<size_t>(t.n - i, 16));
    auto starts = [&](const char* word) { return rest.compare(0, strlen(word), word) == 0; };
    std::string found = found_at(t, i);
    Error e = error_at(t, i, "not JSON (found " + found + ", need " + need + ")");
    if (rest[0] == '\'') {
        return error_at(t, i, "single quotes are not JSON (need double quotes)");
    }
    if (rest[0] == '/' || rest[0] == '#') {
        return error_at(t, i, "comments are not JSON").hinted("remove the comment");
    }
    if (starts("NaN") || starts("nan") || starts("Inf") || starts("inf") || starts("-Inf") || starts("-inf") ||
        starts("-NaN") || starts("-nan")) {
        return error_at(t, i,
                        "NaN and Infinity are not JSON (found " +
                            (rest[0] == '-' ? "'-" + found_at(t, i + 1).substr(1) : found) + ")")
            .hinted("write a number or null");
    }
    if (starts("True") || starts("False") || starts("None")) {
        return e.hinted("this is Python's spelling: JSON has true, false and null");
    }
    return e;
}

// The string that begins at i is wrong at failed_at or just before it.
static Error bad_string(const Text& t, size_t i, size_t failed_at) {
    size_t lone = lone_surrogate(t.begin, std::min(t.n, failed_at + 12), i);
    if (lone <= failed_at) {
        return error_at(t, lone, "lone surrogate " + std::string(t.begin + lone, 6) + " in a string (need a pair)")
            .hinted("the text was cut between two halves of a character");
    }
    unsigned char c = static_cast<unsigned char>(t.begin[failed_at]);
    if (c < 0x20) {
        char what[80];
        snprintf(what, sizeof what, "control character 0x%02X inside a string must be escaped (as %s)", c,
                 c == '\n'   ? "\\n"
                 : c == '\t' ? "\\t"
                 : c == '\r' ? "\\r"
                             : "\\u00XX");
        return error_at(t, failed_at, what);
    }
    size_t escape = failed_at;
    while (escape > i && t.begin[escape] != '\\') {
        escape--;
    }
    if (escape + 1 < t.n && t.begin[escape + 1] == 'u') {
        return error_at(t, escape, "\\u must be followed by four hexadecimal digits");
    }
    return error_at(t, escape, "no such escape in JSON (found '\\" + found_at(t, failed_at).substr(1, 1) + "')")
        .hinted("a backslash itself is written \\\\");
}

static Error diagnose(const Builder& b) {
    const Text& t = b.text;
    size_t i = size_t(b.last_end - t.begin);
    auto in_number = [](char c) { return isalnum(static_cast<unsigned char>(c)) || (c && strchr("._+-", c)); };
    if (b.after_number && i < t.n && in_number(t.begin[i]) && b.failed_at < t.n) {
        bool zero = t.begin[i - 1] == '0' && is_digit(t.begin[i]);
        return error_at(t, i,
                        zero ? std::string("a number must not begin with a zero")
                             : "malformed number (found " + found_at(t, i) + " after it)");
    }
    i = skip_space(t, i);
    if (b.failed_at >= t.n || i >= t.n) {
        return b.has_root ? ends_inside(t) : i >= t.n ? error_at(t, i, "empty (need a JSON value)") : ends_inside(t);
    }
    if (t.begin[i] == 0) {
        return error_at(t, i, "NUL byte outside a string");
    }
    if (b.open.empty() && b.has_root) {
        return error_at(t, i, "text after the JSON value (found " + found_at(t, i) + ", need the end)");
    }
    const char* need = "a value";
    if (b.after_key) {
        if (t.begin[i] != ':') {
            return not_a_value(t, i, "':' after the key");
        }
        i = skip_space(t, i + 1);
    } else if (!b.open.empty()) {
        const Json& inside = *b.open.back().value;
        bool object = inside.type == Json::OBJECT;
        // A value handed to limits.member has left the object, but the token before this one is not the brace then.
        bool first = b.last_end[-1] == (object ? '{' : '[') && inside.items.empty();
        need = object ? "a key in double quotes" : need;
        if (!first) {
            if (t.begin[i] != ',') {
                return not_a_value(t, i, object ? "',' or '}'" : "',' or ']'");
            }
            size_t comma = i;
            i = skip_space(t, i + 1);
            if (i < t.n && (t.begin[i] == '}' || t.begin[i] == ']')) {
                return error_at(t, comma, "trailing comma is not JSON").hinted("remove the comma");
            }
        }
        if (object && i < t.n && t.begin[i] != '"') {
            return not_a_value(t, i, need);
        }
    }
    if (i >= t.n) {
        return ends_inside(t);
    }
    if (b.overflow) {
        std::string number(t.begin + i, b.failed_at + 1 - i);
        return error_at(t, i, "number " + printable(number, 40) + " is beyond the range of a double");
    }
    if (t.begin[i] == '"') {
        return bad_string(t, i, b.failed_at);
    }
    if (is_digit(t.begin[i]) ||
        (t.begin[i] == '-' && i + 1 < t.n && !isalpha(static_cast<unsigned char>(t.begin[i + 1])))) {
        return error_at(t, b.failed_at, "malformed number (found " + found_at(t, b.failed_at) + ", need a digit)");
    }
    return not_a_value(t, i, need);
}

// ------------------------------------------------------------------------------------------------------ parsing

static Error check_encoding(const Text& t) {
    auto byte = [&](size_t i) { return i < t.n ? static_cast<unsigned char>(t.begin[i]) : 1; };
    bool mark = (byte(0) == 0xFF && byte(1) == 0xFE) || (byte(0) == 0xFE && byte(1) == 0xFF);
    if (mark || (t.n >= 2 && (byte(0) == 0) != (byte(1) == 0))) {
        return error_at(t, 0, "the text is UTF-16 or UTF-32 (need UTF-8)").hinted("save as UTF-8");
    }
    size_t bad = invalid_utf8(t.begin, t.n);
    if (bad < t.n) {
        char what[64];
        snprintf(what, sizeof what, "invalid UTF-8 (found byte 0x%02X)", byte(bad));
        return error_at(t, bad, what).hinted("save as UTF-8");
    }
    return {};
}

Error json_parse(Json& out, const char* text, size_t n, const std::string& name, const JsonLimits& limits) {
    out = Json();
    if (n >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0 && !limits.by_byte) {
        text += 3;
        n -= 3;
    }
    Text t{text, n, &name, &limits};
    if (Error e = check_encoding(t)) {
        return e;
    }
    if (n >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0) {
        return error_at(t, 0, limits.by_byte ? "byte order mark" : "second byte order mark");
    }
    std::string mended;
    if (limits.replace_surrogates) {
        size_t lone = lone_surrogate(text, n, 0);
        if (lone < n) {
            mended.assign(text, n);
            for (; lone < n; lone = lone_surrogate(mended.data(), n, lone + 6)) {
                mended.replace(lone, 6, "\\ufffd");
            }
            t.begin = mended.data();
        }
    }
    Builder b;
    b.text = t;
    b.at = b.last_end = t.begin;
    b.root = &out;
    bool good = false;
    try {
        good = nlohmann::json::sax_parse(Reader{&b.at, t.begin + n}, Reader{nullptr, nullptr}, &b);
    } catch (const std::exception& e) {
        b.error = runtime_failure("%s: %s", printable(name, 4096).c_str(), e.what());
    }
    if (good && skip_space(t, size_t(b.last_end - t.begin)) < n) {  // nlohmann takes a NUL byte for the end of the text
        good = false;
        b.failed_at = size_t(b.last_end - t.begin);
    }
    if (good) {
        return {};
    }
    Error e = b.error ? b.error : diagnose(b);
    out = Json();
    return e;
}

Error json_read_file(Json& out, const std::string& path, const JsonLimits& limits) {
    std::string text;
    if (Error e = file_read_all(text, path)) {
        return e;
    }
    return json_parse(out, text.data(), text.size(), path, limits);
}

// ------------------------------------------------------------------------------------------------------ writing

static void write_string(std::string& out, const std::string& s) {
    out += '"';
    for (size_t i = 0; i < s.size();) {
        unsigned char c = static_cast<unsigned char>(s[i]);
        size_t length = utf8_sequence(&s[i], s.size() - i);
        if (length == 0) {
            out += "\xEF\xBF\xBD";
        } else if (c == '"' || c == '\\') {
            out += '\\';
            out += s[i];
        } else if (c >= 0x20) {
            out.append(s, i, length);
        } else if (const char* letter = strchr("\bb\tt\nn\ff\rr", c); letter && c) {
            out += '\\';
            out += letter[1];
        } else {
            char escaped[8];
            snprintf(escaped, sizeof escaped, "\\u%04x", c);
            out += escaped;
        }
        i += length ? length : 1;
    }
    out += '"';
}

static void write_real(std::string& out, double v) {
    if (!std::isfinite(v)) {
        out += "null";
        return;
    }
    char digits[40];
    char* end = std::to_chars(digits, digits + sizeof digits, v).ptr;
    out.append(digits, end);
    if (std::find_if(digits, end, [](char c) { return c == '.' || c == 'e'; }) == end) {
        out += ".0";
    }
}

static void write_value(std::string& out, const Json& v, int indent, bool sort_keys, int level) {
    switch (v.type) {
        case Json::NUL: out += "null"; return;
        case Json::BOOL: out += v.boolean ? "true" : "false"; return;
        case Json::INT: out += std::to_string(v.integer); return;
        case Json::UINT: out += std::to_string(v.natural); return;
        case Json::REAL: write_real(out, v.real); return;
        case Json::STRING: write_string(out, v.string); return;
        case Json::ARRAY:
        case Json::OBJECT: break;
    }
    bool object = v.type == Json::OBJECT;
    std::vector<size_t> order(v.items.size());
    for (size_t i = 0; i < order.size(); i++) {
        order[i] = i;
    }
    if (object && sort_keys) {
        std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return v.keys[a] < v.keys[b]; });
    }
    out += object ? '{' : '[';
    for (size_t i = 0; i < order.size(); i++) {
        out += i ? "," : "";
        if (indent > 0) {
            out += '\n';
            out.append(size_t(indent) * size_t(level + 1), ' ');
        }
        if (object) {
            write_string(out, v.keys[order[i]]);
            out += indent > 0 ? ": " : ":";
        }
        write_value(out, v.items[order[i]], indent, sort_keys, level + 1);
    }
    if (indent > 0 && !order.empty()) {
        out += '\n';
        out.append(size_t(indent) * size_t(level), ' ');
    }
    out += object ? '}' : ']';
}

std::string json_write(const Json& value, int indent, bool sort_keys) {
    std::string out;
    write_value(out, value, indent, sort_keys, 0);
    return out;
}
