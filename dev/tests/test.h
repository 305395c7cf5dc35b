// The test harness: a test is a named function, a check that fails prints where and why and the test goes on.
// test_llama.cu owns the list of groups and the counting; the bodies are in the other files of this folder.
#pragma once
#include <cstdarg>
#include <cstddef>
#include <string>

struct Test {
    const char* name;
    void (*run)();
};

// The running test; test_llama.cu clears it before a test, runs the test, and reads it afterwards.
struct TestState {
    const char* name = "";
    std::string who;   // "rank 2: " in one of many ranks
    int failures = 0;  // checks that failed
    bool skipped = false;
};
extern TestState test_state;

// Marks the running test as failed and prints file:line and the message. Returns false, so that CHECK can be a value.
bool test_fail(const char* file, int line, const char* format, ...) __attribute__((format(printf, 3, 4)));
// Marks the running test as skipped, and the test returns: only for what the machine at hand lacks, said by name.
void test_skip(const char* why);

// CHECK(x == 3, "x is %d", x);
#define CHECK(condition, ...) ((condition) ? true : test_fail(__FILE__, __LINE__, __VA_ARGS__))

// The text has the part in it; for messages of errors.
bool text_has(const std::string& text, const std::string& part);

// err <= bound, said so that a NaN fails. Prints what, err and bound when it does.
#define CHECK_ERROR(what, err, bound) \
    CHECK((err) <= (bound), "%s: error %.3e, bound %.3e", std::string(what).c_str(), double(err), double(bound))

// A fresh empty directory for the running test, removed with its contents when the program ends.
std::string test_directory();
// Root of the source tree (dev/ref and the like); from the environment variable TRAIN_LLAMA_ROOT or ".".
std::string source_path(const std::string& relative);
// The real Llama-3.1 vocabulary, or "" when ../shared is absent (such tests call test_skip).
std::string llama3_tokenizer_directory();
// Runs a shell command; stdout and stderr together in *output; returns the exit status (128 + n for signal n).
int run_command(std::string* output, const std::string& command);
