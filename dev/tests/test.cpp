// See test.h. The list of groups and the totals are in test_llama.cu.
#include "dev/tests/test.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "io/file.h"

TestState test_state;

bool test_fail(const char* file, int line, const char* format, ...) {
    char text[4096];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    test_state.failures++;
    fprintf(stderr, "%s%s:%d: %s: %s\n", test_state.who.c_str(), file, line, test_state.name, text);
    return false;
}

void test_skip(const char* why) {
    test_state.skipped = true;
    fprintf(stderr, "%s: skipped: %s\n", test_state.name, why);
}

bool text_has(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

static std::vector<std::string>& made_directories() {
    static std::vector<std::string> list;
    return list;
}

static void remove_directories() {
    for (const std::string& directory : made_directories()) {
        if (Error e = path_remove(directory)) {
            error_print(e);
        }
    }
}

std::string test_directory() {
    const char* root = getenv("TMPDIR");
    std::string path = path_join(root && *root ? root : "/tmp", "test_llama.XXXXXX");
    if (!mkdtemp(&path[0])) {
        perror(path.c_str());
        exit(1);
    }
    if (made_directories().empty()) {
        atexit(remove_directories);
    }
    made_directories().push_back(path);
    return path;
}

std::string source_path(const std::string& relative) {
    const char* root = getenv("TRAIN_LLAMA_ROOT");
    return path_join(root && *root ? root : ".", relative);
}

std::string llama3_tokenizer_directory() {
    std::string path = source_path("../shared/llama3_tokenizer");
    return path_exists(path_join(path, "tokenizer.json")) ? path : "";
}

int run_command(std::string* output, const std::string& command) {
    if (output) {
        output->clear();
    }
    int ends[2];
    if (pipe(ends) != 0) {
        return test_fail(__FILE__, __LINE__, "no pipe for: %s", command.c_str()), -1;
    }
    fflush(nullptr);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 1);
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        execl("/bin/sh", "sh", "-c", command.c_str(), static_cast<char*>(nullptr));
        _exit(127);
    }
    close(ends[1]);
    if (child < 0) {
        close(ends[0]);
        return test_fail(__FILE__, __LINE__, "no process for: %s", command.c_str()), -1;
    }
    char buffer[1 << 16];
    for (;;) {
        ssize_t n = read(ends[0], buffer, sizeof buffer);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            break;
        }
        if (output) {
            output->append(buffer, size_t(n));
        }
    }
    close(ends[0]);
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}
