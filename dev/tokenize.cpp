// Tokenises texts from stdin for scripts/check_tokenizer.py: `tokenize MODEL_DIR [--parse-special]`.
//
//   in:  u32 length | bytes, again and again          out: u32 count | count x i32 ids, one a text
//
// Prints the Unicode version of the split pattern on stderr. Numbers are little endian, as the machine is.
#include <cstdio>
#include <cstring>

#include "tokenizer/tokenizer.h"

int main(int argc, char** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: tokenize MODEL_DIR [--parse-special] < texts > ids\n");
        return 2;
    }
    bool parse_special = argc > 2 && strcmp(argv[2], "--parse-special") == 0;
    Tokenizer t;
    if (Error e = tokenizer_load(t, argv[1], 1 << 20)) {
        return error_print(e);
    }
    fprintf(stderr, "%s\n", t.unicode_version.c_str());
    std::string text;
    std::vector<int32_t> ids;
    uint32_t n;
    while (fread(&n, sizeof(n), 1, stdin) == 1) {
        text.resize(n);
        if (n > 0 && fread(&text[0], 1, n, stdin) != n) {
            fprintf(stderr, "error: stdin ends inside a text\n");
            return 2;
        }
        size_t bad_at = 0;
        if (!utf8_validate(text.data(), n, &bad_at)) {
            fprintf(stderr, "error: invalid UTF-8 at byte %zu of a text\n", bad_at);
            return 2;
        }
        ids.clear();
        tokenizer_encode(t, ids, text.data(), n, parse_special);
        uint32_t count = uint32_t(ids.size());
        if (fwrite(&count, sizeof(count), 1, stdout) != 1 ||
            fwrite(ids.data(), sizeof(int32_t), count, stdout) != count) {
            return 1;
        }
    }
    tokenizer_free(t);
    return fflush(stdout) == 0 ? 0 : 1;
}
