// What a person sees on the terminal: facts, warnings, one live line, small tables. Everything that matters is in
// log.jsonl as well. A terminal that goes away never stops a run: errors of stdout are not looked at.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

struct Console {
    bool quiet = false;
    bool muted = false;     // says nothing at all: a rank whose like is heard already
    bool terminal = false;  // stdout is one: the live line is redrawn in place, colours are used
    bool live = false;      // a live line stands unfinished
};
void console_open(Console& console, bool quiet);
void console_fact(Console& console, const char* format, ...) __attribute__((format(printf, 2, 3)));  // "# ..."
void console_line(Console& console, const std::string& line);                                        // as it is
void console_warn(Console& console, const char* format, ...)
    __attribute__((format(printf, 2, 3)));  // stderr, also when quiet
void console_live(Console& console, const std::string& line, bool last);
// Rows of cells, the columns padded to the widest; the first column to the left, the others to the right.
void console_table(Console& console, const std::vector<std::vector<std::string>>& rows);

std::string text_format(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text_count(uint64_t n);            // 1,234,567
std::string text_bytes(double bytes);          // 1.23 GB (powers of ten)
std::string text_duration(double seconds);     // 42 s, 3 m 05 s, 2 h 07 m
size_t text_columns(const std::string& utf8);  // characters, for padding
