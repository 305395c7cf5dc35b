// A data file as lines: opens it, refuses what is no UTF-8 text of JSON, and hands out its lines through a buffer of
// fixed size, whatever the file's. Lines end at byte 0x0A alone (U+2028 and the like are content). Knows no JSON.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "io/error.h"
#include "io/file.h"

struct LineReader {
    InFile file;
    uint64_t offset = 0;  // in the file, of the first byte that is not in the buffer yet
    std::vector<char> buffer;
    size_t at = 0, filled = 0;  // the unread part of the buffer
    size_t number = 0;          // of the line handed out last, from 1
    bool bom = false;           // the file begins with a byte order mark, which is skipped
    bool array = false;         // its first byte that is no white space is '['
    void* hash = nullptr;       // the caller's; takes every byte of the file as it is read
};

struct Line {
    size_t number = 0;
    std::string text;    // without its end of line; "" when it is longer than the cap
    uint64_t bytes = 0;  // its true length
    bool last = false;   // the last line, which has no end of line
};

// sha256 over everything that is read, as 64 hex digits. hash_finish frees it.
void* hash_begin();
std::string hash_so_far(void* hash);
std::string hash_finish(void* hash);

// Errors name the kind of file that this is instead (compressed, UTF-16, CSV, a directory, ...) and what to do.
Error lines_open(LineReader& r, const std::string& path, void* hash);
void lines_close(LineReader& r);
// *more = false: the end of the file; line is then empty.
Error lines_next(LineReader& r, Line& line, bool* more, uint64_t cap);
Error lines_rest(LineReader& r, std::string& text);  // what is left of the file, at most 1 GiB
