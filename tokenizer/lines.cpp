// See lines.h.
#include "tokenizer/lines.h"

#include <openssl/evp.h>

#include <algorithm>
#include <cctype>
#include <cinttypes>
#include <cstring>

static const size_t BUFFER = size_t(1) << 20;
static const uint64_t ARRAY_CAP = UINT64_C(1) << 30;

static std::string shown(const std::string& path) {
    return printable(path, 4096);
}

void* hash_begin() {
    EVP_MD_CTX* hash = EVP_MD_CTX_new();
    EVP_DigestInit_ex(hash, EVP_sha256(), nullptr);
    return hash;
}

std::string hash_so_far(void* hash) {
    unsigned char digest[32];
    EVP_MD_CTX* copy = EVP_MD_CTX_new();
    EVP_MD_CTX_copy_ex(copy, static_cast<EVP_MD_CTX*>(hash));
    EVP_DigestFinal_ex(copy, digest, nullptr);
    EVP_MD_CTX_free(copy);
    std::string hex;
    for (unsigned char byte : digest) {
        hex += "0123456789abcdef"[byte >> 4];
        hex += "0123456789abcdef"[byte & 15];
    }
    return hex;
}

std::string hash_finish(void* hash) {
    std::string hex = hash_so_far(hash);
    EVP_MD_CTX_free(static_cast<EVP_MD_CTX*>(hash));
    return hex;
}

// What the first bytes (or, where the content does not look like JSON, the name) say that the file is instead.
static Error refuse_other_kinds(const std::string& path, const std::string& head, bool json) {
    auto begins = [&](const char* magic, size_t n) { return head.compare(0, n, magic, n) == 0; };
    static const char unpack[] = "decompress it first, for example with ";
    if (begins("\x1F\x8B", 2)) {
        return bad_input("%s: the file is compressed (gzip)", shown(path).c_str())
            .hinted(std::string(unpack) + "gunzip");
    }
    if (begins("\x28\xB5\x2F\xFD", 4)) {
        return bad_input("%s: the file is compressed (zstd)", shown(path).c_str())
            .hinted(std::string(unpack) + "unzstd");
    }
    if (begins("\xFD"
               "7zXZ",
               5)) {
        return bad_input("%s: the file is compressed (xz)", shown(path).c_str()).hinted(std::string(unpack) + "unxz");
    }
    if (begins("BZh", 3)) {
        return bad_input("%s: the file is compressed (bzip2)", shown(path).c_str())
            .hinted(std::string(unpack) + "bunzip2");
    }
    if (begins("PK\x03\x04", 4)) {
        return bad_input("%s: the file is a zip archive", shown(path).c_str()).hinted(std::string(unpack) + "unzip");
    }
    if (begins("PAR1", 4)) {
        return bad_input("%s: the file is Parquet", shown(path).c_str())
            .hinted(
                "convert it to jsonl, for example with pandas: read_parquet(...).to_json(..., orient=\"records\", "
                "lines=True)");
    }
    if (begins("version https://git-lfs", 23)) {
        return bad_input("%s: this is a Git LFS pointer, not the data", shown(path).c_str()).hinted("run git lfs pull");
    }
    auto byte = [&](size_t i) { return i < head.size() ? static_cast<unsigned char>(head[i]) : 1; };
    bool wide_mark = (byte(0) == 0xFF && byte(1) == 0xFE) || (byte(0) == 0xFE && byte(1) == 0xFF);
    bool utf32 = (byte(0) == 0 && byte(1) == 0) || (byte(2) == 0 && byte(3) == 0);
    if (wide_mark || (head.size() >= 2 && (byte(0) == 0) != (byte(1) == 0)) || (head.size() >= 4 && utf32)) {
        return bad_input("%s: the file is %s (need UTF-8)", shown(path).c_str(), utf32 ? "UTF-32" : "UTF-16")
            .hinted(utf32 ? "save as UTF-8: iconv -f UTF-32 -t UTF-8" : "save as UTF-8: iconv -f UTF-16 -t UTF-8");
    }
    size_t dot = path.rfind('.');
    std::string extension = dot == std::string::npos ? "" : path.substr(dot + 1);
    for (const char* other : {"csv", "tsv", "parquet", "arrow", "gz", "zst", "xlsx"}) {
        if (!json && extension == other) {
            return bad_input("%s: not a jsonl file (found .%s)", shown(path).c_str(), other)
                .hinted("convert it to jsonl: one JSON object a line");
        }
    }
    return {};
}

// Reads the next part of the file into the buffer, which is used up.
static Error refill(LineReader& r) {
    r.at = 0;
    r.filled = size_t(std::min<uint64_t>(r.buffer.size(), r.file.size - r.offset));
    if (Error e = file_pread(r.file, r.buffer.data(), r.filled, r.offset)) {
        return e;
    }
    r.offset += r.filled;
    EVP_DigestUpdate(static_cast<EVP_MD_CTX*>(r.hash), r.buffer.data(), r.filled);
    return {};
}

Error lines_open(LineReader& r, const std::string& path, void* hash) {
    r = LineReader();
    r.hash = hash;
    if (Error e = file_open(r.file, path)) {
        return e.hint.empty() ? e.hinted("-i takes a jsonl file on disk: one JSON object a line") : e;
    }
    r.buffer.resize(BUFFER);
    Error e = refill(r);
    if (!e) {
        r.bom = r.filled >= 3 && memcmp(r.buffer.data(), "\xEF\xBB\xBF", 3) == 0;
        r.at = r.bom ? 3 : 0;
        size_t first = r.at;
        while (first < r.filled && strchr(" \t\r\n", r.buffer[first]) && r.buffer[first] != '\0') {
            first++;
        }
        char begin = first < r.filled ? r.buffer[first] : '\0';
        r.array = begin == '[';
        e = refuse_other_kinds(path, std::string(r.buffer.data(), std::min<size_t>(r.filled, 64)),
                               begin == '{' || begin == '[');
    }
    if (e) {
        lines_close(r);
    }
    return e;
}

void lines_close(LineReader& r) {
    file_close(r.file);
}

Error lines_next(LineReader& r, Line& line, bool* more, uint64_t cap) {
    line = Line();
    *more = false;
    for (;;) {
        if (r.at == r.filled) {
            if (r.offset == r.file.size) {
                line.last = *more;
                break;
            }
            if (Error e = refill(r)) {
                return e;
            }
        }
        *more = true;
        const char* begin = r.buffer.data() + r.at;
        const char* end = static_cast<const char*>(memchr(begin, '\n', r.filled - r.at));
        size_t n = end ? size_t(end - begin) : r.filled - r.at;
        line.bytes += n;
        if (line.bytes <= cap) {
            line.text.append(begin, n);
        } else {
            line.text = std::string();
        }
        r.at += n + (end != nullptr);
        if (end) {
            break;
        }
    }
    line.number = *more ? ++r.number : 0;
    return {};
}

Error lines_rest(LineReader& r, std::string& text) {
    uint64_t left = r.file.size - r.offset + (r.filled - r.at);
    if (left > ARRAY_CAP) {
        return bad_input("%s: too large for a file that is one JSON array (found %" PRIu64 " MB, need at most %" PRIu64
                         ")",
                         shown(r.file.path).c_str(), left >> 20, ARRAY_CAP >> 20)
            .hinted("write one object a line instead: jq -c '.[]' FILE > FILE.jsonl");
    }
    text.clear();
    text.reserve(size_t(left));
    for (;;) {
        text.append(r.buffer.data() + r.at, r.filled - r.at);
        if (r.offset == r.file.size) {
            r.at = r.filled;
            return {};
        }
        if (Error e = refill(r)) {
            return e;
        }
    }
}
