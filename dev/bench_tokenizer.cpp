// Speed of tokenizer_encode on one thread, for scripts/bench_tokenizer.py: `bench_tokenizer MODEL_DIR FILE`.
// The file holds texts separated by NUL bytes. For each line read from stdin it makes one timed pass over all of them
// in a fresh thread and prints "SECONDS TOKENS" (loading apart), so that the caller can alternate with another program.
// Fresh, because the cache of pre-tokens belongs to a thread: each pass starts with an empty one.
#include <chrono>
#include <cstdio>
#include <functional>
#include <thread>

#include "io/file.h"
#include "tokenizer/tokenizer.h"

static void encode_all(const Tokenizer& t, const std::string& text, size_t& tokens) {
    std::vector<int32_t> ids;
    for (size_t at = 0; at < text.size();) {
        size_t end = text.find('\0', at);
        end = end == std::string::npos ? text.size() : end;
        ids.clear();
        tokenizer_encode(t, ids, text.data() + at, end - at, false);
        tokens += ids.size();
        at = end + 1;
    }
}

int main(int argc, char** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: bench_tokenizer MODEL_DIR FILE\n");
        return 2;
    }
    Tokenizer t;
    if (Error e = tokenizer_load(t, argv[1], 1 << 20)) {
        return error_print(e);
    }
    std::string text;
    if (Error e = file_read_all(text, argv[2])) {
        return error_print(e);
    }
    while (getchar() == '\n') {
        size_t tokens = 0;
        auto begin = std::chrono::steady_clock::now();
        std::thread(encode_all, std::cref(t), std::cref(text), std::ref(tokens)).join();
        std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        printf("%.6f %zu\n", seconds.count(), tokens);
        fflush(stdout);
    }
    tokenizer_free(t);
    return 0;
}
