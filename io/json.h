// JSON in and out. One parsed value type for every JSON file of the program (config.json, tokenizer.json, jsonl
// records, manifests), made by nlohmann-json's SAX parser in json.cpp, which adds what that lacks: duplicate keys,
// depth, numbers beyond double, bad UTF-8 and lone surrogates are errors with line and column; a BOM is skipped at
// byte 0 only. No tensor data, no knowledge of any particular file.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "io/error.h"

struct Json {
    enum Type : uint8_t { NUL, BOOL, INT, UINT, REAL, STRING, ARRAY, OBJECT };  // UINT: only above INT64_MAX
    Type type = NUL;
    union {
        bool boolean;
        int64_t integer = 0;
        uint64_t natural;
        double real;
    };
    std::string string;             // STRING: UTF-8, may hold NUL bytes
    std::vector<Json> items;        // ARRAY: the elements; OBJECT: the values, in file order
    std::vector<std::string> keys;  // OBJECT: the keys, beside items

    Json() = default;
    Json(bool v) : type(BOOL) { boolean = v; }
    Json(int v) : type(INT) { integer = v; }
    Json(long v) : type(INT) { integer = v; }
    Json(long long v) : type(INT) { integer = v; }
    Json(unsigned v) : type(INT) { integer = v; }
    Json(unsigned long v) { *this = Json((unsigned long long)v); }
    Json(unsigned long long v) : type(v > INT64_MAX ? UINT : INT) { natural = v; }
    Json(double v) : type(REAL) { real = v; }
    Json(const char* v) : type(STRING), string(v) {}
    Json(std::string v) : type(STRING), string(std::move(v)) {}

    // Writers build objects with these; set() replaces a key that is there. Both return *this, to be chained.
    static Json object() {
        Json j;
        j.type = OBJECT;
        return j;
    }
    static Json array() {
        Json j;
        j.type = ARRAY;
        return j;
    }
    Json& set(const std::string& key, Json value);
    Json& push(Json value);

    const Json* find(const char* key) const;  // OBJECT: the value, or nullptr (also when this is no object)
    bool is_number() const { return type == INT || type == UINT || type == REAL; }
    double number() const;          // INT, UINT or REAL as double
    const char* type_name() const;  // "null", "a boolean", "a number", "a string", "an array", "an object"
};

struct JsonLimits {
    int depth = 64;                   // deepest nesting of arrays and objects
    size_t first_line = 1;            // line number of the text's first byte (jsonl: the record's line)
    bool replace_surrogates = false;  // a lone surrogate escape becomes U+FFFD instead of an error
    bool line_is_record = false;      // jsonl: the position is reported as `name:line:` and the column inside the line
    bool by_byte = false;             // positions as "NAME unreadable at byte N: ": for JSON inside a binary file
    size_t first_byte = 0;            // by_byte: place of the text's first byte in that file
    size_t values = size_t(1) << 25;  // most values held at once (each takes about 100 bytes)
    // Not null: each member of the outermost object goes here when it is complete, in file order, and is not kept.
    Error (*member)(void* context, std::string& key, Json& value) = nullptr;
    void* context = nullptr;
};

// Parses the n bytes at text, which must hold exactly one value. `name` is the file's name, for messages.
// Errors: code 2, "NAME:LINE:COL: ..."; columns count characters from 1. A text that stops too early has the words
// "ends inside a JSON value" in its message.
Error json_parse(Json& out, const char* text, size_t n, const std::string& name, const JsonLimits& limits = {});
Error json_read_file(Json& out, const std::string& path, const JsonLimits& limits = {});

// indent 0: one line. Doubles are written shortest so that they read back exactly; non-finite ones as null; bytes that
// are not UTF-8 as U+FFFD.
std::string json_write(const Json& value, int indent = 0, bool sort_keys = false);
