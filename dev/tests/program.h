// For the tests that run ./train_llama as a subprocess, as people do: the command, the files around it.
// TRAIN_LLAMA_PROGRAM names another binary.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "dev/tests/files.h"
#include "io/file.h"
#include "io/json.h"

inline std::string program() {
    const char* path = getenv("TRAIN_LLAMA_PROGRAM");
    return path != nullptr ? path : source_path("train_llama");
}

// " -m" and the default base.
inline std::string base() {
    return " -m " + source_path("dev/tiny_llama");
}

// Runs train_llama with these arguments, stdout and stderr in *output. No GPU is visible to it unless the environment
// says so: what these tests expect is the CPU's.
inline int train(std::string* output, const std::string& arguments, const std::string& environment = "") {
    return run_command(output, "CUDA_VISIBLE_DEVICES= " + environment + " " + program() + " " + arguments);
}

// The records of a run's log.jsonl.
inline std::vector<Json> log_records(const std::string& dir) {
    std::vector<Json> records;
    std::string text = file_text(dir + "/log.jsonl");
    for (size_t at = 0; at < text.size();) {
        size_t end = text.find('\n', at);
        if (!CHECK(end != std::string::npos, "log.jsonl: the last line has no end")) {
            break;
        }
        Json j;
        Error e = json_parse(j, text.data() + at, end - at, "log.jsonl");
        CHECK(!e, "log.jsonl: %s", e.what.c_str());
        records.push_back(j);
        at = end + 1;
    }
    return records;
}

// Of every step in a run's log.
inline std::vector<double> losses_of(const std::string& dir) {
    std::vector<double> losses;
    for (const Json& r : log_records(dir)) {
        if (r.find("event")->string == "step") {
            losses.push_back(r.find("loss")->number());
        }
    }
    return losses;
}

// A small data set: n records of data.jsonl, or of another file of the repository.
inline std::string small_data(size_t n, const char* from = "data.jsonl") {
    std::string text = file_text(source_path(from)), path = test_directory() + "/small.jsonl";
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        at = text.find('\n', at) + 1;
    }
    write_text(path, text.substr(0, at));
    return path;
}

// dev/ref/tiny_bf16.json: losses of PyTorch + PEFT over 20 steps in fp32, and how far its own bf16 runs lie from
// theirs. Those of `command`, which is given the options of that run and `more`, may lie twice as far. Which step a run
// happens to be near at is luck, so the greatest distance up to a step counts.
inline void check_bf16_losses(const std::string& command, const std::string& quant, const std::string& name,
                              const std::string& more, size_t steps) {
    Json reference;
    Error e = json_read_file(reference, source_path("dev/ref/tiny_bf16.json"));
    CHECK(!e, "%s", e.what.c_str());
    const Json& r = *reference.find(quant.c_str());
    std::string options = r.find("options")->string, out;
    const std::string run = quant + " " + name, dir = test_directory() + "/" + quant + name;
    for (const char* path : {"data.jsonl", "dev/ref/tiny_adapter"}) {
        options.replace(options.find(path), strlen(path), source_path(path));
    }
    options.replace(options.find("-n 20"), 5, "-n " + std::to_string(steps));
    const auto numbers = [&](const char* key) {
        std::vector<double> list;
        for (const Json& item : r.find(key)->items) {
            list.push_back(item.number());
        }
        return list;
    };
    const std::vector<double> want = numbers("fp32"), distance = numbers("distance");
    const int code = run_command(&out, command + " " + options + more + " -o " + dir);
    if (!CHECK(code == 0, "%s: exit %d: %s", run.c_str(), code, out.c_str())) {
        return;
    }
    const std::vector<double> got = losses_of(dir);
    if (!CHECK(got.size() == steps && want.size() >= steps, "%zu losses of %zu", got.size(), want.size())) {
        return;
    }
    double far = 0;
    for (size_t s = 0; s < steps; s++) {
        far = std::max(far, distance[s]);
        CHECK_ERROR(run + (" step " + std::to_string(s + 1)), std::fabs(got[s] - want[s]), 2 * far);
    }
}
