// What went wrong, as a value. Readers and writers return an Error and never exit or throw; only a program's main
// prints it and ends with its code. This file owns the struct and its three makers, nothing else.
//
//   if (Error e = file_read_all(text, path)) { return e; }
//   return bad_input("%s: hidden_size must be a positive integer (found %s)", path, found).hinted("...");
#pragma once
#include <cstddef>
#include <string>

struct [[nodiscard]] Error {
    int code = 0;      // the exit status of design: 0 no error, 1 runtime failure, 2 bad option or input, 3 diverged
    std::string what;  // FILE[:LINE[:COL]]: what is wrong (found X, need Y); no trailing newline
    std::string hint;  // what the user can do about it; may be empty

    explicit operator bool() const { return code != 0; }
    Error hinted(const std::string& text) const { return {code, what, text}; }
    // The hint for whatever has none of its own.
    Error or_hinted(const std::string& text) const { return code != 0 && hint.empty() ? hinted(text) : *this; }
};

// printf-style makers. Strings that come from a file go through printable() first.
Error bad_input(const char* format, ...) __attribute__((format(printf, 1, 2)));        // code 2
Error runtime_failure(const char* format, ...) __attribute__((format(printf, 1, 2)));  // code 1

// Text made safe for a terminal and a log: control bytes as \xNN (so no escape sequence of a data file is ever
// echoed), invalid UTF-8 likewise, cut after max_bytes with "...".
std::string printable(const std::string& text, size_t max_bytes = 120);

// Bytes of the well-formed UTF-8 sequence that starts at text (1 to 4, and at most n); 0 when there is none.
size_t utf8_sequence(const char* text, size_t n);

// "error: ..." and "hint: ..." on stderr; returns e.code for main to return.
int error_print(const Error& e);
