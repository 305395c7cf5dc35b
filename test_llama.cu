// test_llama [SUBSTRING...] [--quick] [--list]: runs the tests whose name has one of the substrings (all without any).
// Owns the list of groups and the counting; the tests are in dev/tests/. One line a test; the last line is
// `N passed, N failed, N skipped`; exit 1 when one failed. --quick leaves out what takes long (for slow, instrumented
// builds).
//
// Groups whose name begins with `ranks_` are for many ranks: under mpirun they alone are run, on every rank, and rank 0
// counts a test that failed on any. `ends_` is like them, but ends all ranks, so it must be asked for. Tests of other
// groups start them (dev/tests/ranks.h).
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "dev/tests/ranks.h"
#include "dev/tests/test.h"
#include "kernels/cpu/parallel.h"

extern const Test json_tests[], files_tests[], safetensors_tests[], bnb_tests[], config_tests[];
extern const Test options_tests[], run_tests[];
extern const Test tokenizer_tests[], tokenizer_files_tests[], records_tests[], chat_tests[], pack_tests[];
extern const Test random_tests[], elementwise_tests[], attention_tests[], adamw_tests[];
extern const Test linear_tests[], nf4_tests[], classifier_tests[], format_tests[], amx_tests[];
extern const Test engine_tests[];
extern const Test convert_tests[], model_tests[], plan_tests[], schedule_tests[], load_tests[], trainer_tests[],
    math_tests[];
extern const Test bad_inputs_tests[], trainer_ranks_tests[], ranks_trainer_tests[];
extern const Test forecast_tests[], parts_tests[], save_base_tests[], comm_tests[], ranks_comm_tests[],
    ends_comm_tests[];
extern const Test gpu_device_tests[], gpu_elementwise_tests[], gpu_classifier_tests[], gpu_adamw_tests[];
extern const Test gpu_attention_tests[], gpu_nf4_tests[], gpu_matmul_tests[], gpu_linear_tests[], gpu_paged_tests[];
extern const Test gpu_model_tests[], gpu_trainer_tests[];
extern const Test gpu_forecast_tests[], gpu_comm_tests[], ranks_gpu_comm_tests[], ends_gpu_comm_tests[];
extern const Test simt_tests[];  // HAVE_GPU 2: this program has the stand-in of dev/simt

static const struct {
    const char* name;
    const Test* tests;
    bool slow;
} groups[] = {
    {"json", json_tests, false},
    {"files", files_tests, false},
    {"safetensors", safetensors_tests, false},
    {"bnb", bnb_tests, false},
    {"config", config_tests, false},
    {"options", options_tests, false},
    {"run", run_tests, false},
    {"tokenizer_files", tokenizer_files_tests, false},
    {"tokenizer", tokenizer_tests, false},
    {"records", records_tests, false},
    {"chat", chat_tests, false},
    {"pack", pack_tests, false},
    {"random", random_tests, false},
    {"elementwise", elementwise_tests, false},
    {"attention", attention_tests, false},
    {"adamw", adamw_tests, false},
    {"format", format_tests, false},
    {"amx", amx_tests, false},
    {"engine", engine_tests, false},
    {"linear", linear_tests, false},
    {"nf4", nf4_tests, false},
    {"classifier", classifier_tests, false},
    {"convert", convert_tests, false},
    {"model", model_tests, false},
    {"plan", plan_tests, false},
    {"schedule", schedule_tests, false},
    {"load", load_tests, false},
    {"trainer", trainer_tests, true},
    {"math", math_tests, true},
    {"bad_inputs", bad_inputs_tests, true},
    {"forecast", forecast_tests, false},
    {"parts", parts_tests, false},
    {"save_base", save_base_tests, false},
    {"comm", comm_tests, true},
    {"trainer_ranks", trainer_ranks_tests, true},
    {"ranks_trainer", ranks_trainer_tests, false},
    {"ranks_comm", ranks_comm_tests, false},
    {"ends_comm", ends_comm_tests, false},
#if HAVE_GPU
    {"gpu_device", gpu_device_tests, false},
    {"gpu_forecast", gpu_forecast_tests, false},
    {"gpu_comm", gpu_comm_tests, true},
    {"ranks_gpu_comm", ranks_gpu_comm_tests, false},
    {"ends_gpu_comm", ends_gpu_comm_tests, false},
    {"gpu_elementwise", gpu_elementwise_tests, false},
    {"gpu_classifier", gpu_classifier_tests, false},
    {"gpu_adamw", gpu_adamw_tests, false},
    {"gpu_attention", gpu_attention_tests, false},
    {"gpu_nf4", gpu_nf4_tests, false},
    {"gpu_matmul", gpu_matmul_tests, false},
    {"gpu_linear", gpu_linear_tests, false},
    {"gpu_paged", gpu_paged_tests, false},
    {"gpu_model", gpu_model_tests, false},
    {"gpu_trainer", gpu_trainer_tests, true},
#endif
#if HAVE_GPU == 2
    {"simt", simt_tests, false},
#endif
};

static bool has_part(const std::string& name, const std::vector<std::string>& parts) {
    for (const std::string& part : parts) {
        if (name.find(part) != std::string::npos) {
            return true;
        }
    }
    return false;
}

static bool wanted(const std::string& name, const std::vector<std::string>& parts) {
    bool ends = name.rfind("ends_", 0) == 0, of_ranks = ends || name.rfind("ranks_", 0) == 0;
    return of_ranks == (test_comm.state != nullptr) && (has_part(name, parts) || (parts.empty() && !ends));
}

// What became of a test, over all ranks: each gives its failures and whether it skipped.
static const char* test_result() {
    int mine[2] = {test_state.failures, test_state.skipped};
    std::vector<int> all(2 * size_t(test_comm.size));
    comm_all_gather(test_comm, all.data(), mine, sizeof mine);
    int failures = 0, skipped = 0;
    for (size_t r = 0; r < all.size(); r += 2) {
        failures += all[r];
        skipped += all[r + 1];
    }
    return failures > 0 ? "FAILED" : skipped > 0 ? "skipped" : "ok";
}

int main(int argc, char** argv) {
    wait_passively(argv);
    std::string why = comm_open(test_comm);
    if (!why.empty()) {
        fprintf(stderr, "error: %s\n", why.c_str());
        return 2;
    }
    std::vector<std::string> parts;
    bool quick = false, list = false;
    for (int i = 1; i < argc; i++) {
        quick |= strcmp(argv[i], "--quick") == 0;
        list |= strcmp(argv[i], "--list") == 0;
        if (argv[i][0] != '-') {
            parts.push_back(argv[i]);
        }
    }
    const bool speaks = test_comm.rank == 0;
    int passed = 0, failed = 0, skipped = 0;
    for (const auto& group : groups) {
        for (const Test* t = group.tests; t->name != nullptr && !(quick && group.slow); t++) {
            std::string name = std::string(group.name) + "/" + t->name;
            if (!wanted(name, parts)) {
                continue;
            }
            if (list) {
                if (speaks) {
                    printf("%s\n", name.c_str());
                }
                continue;
            }
            test_state = TestState();
            test_state.name = t->name;
            test_state.who = test_comm.state != nullptr ? "rank " + std::to_string(test_comm.rank) + ": " : "";
            auto start = std::chrono::steady_clock::now();
            t->run();
            double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
            const char* result = test_result();
            if (speaks) {
                printf("%-52s %-7s %7.0f ms\n", name.c_str(), result, ms);
                fflush(stdout);
            }
            (result[0] == 'F' ? failed : result[0] == 's' ? skipped : passed)++;
        }
    }
    if (speaks && !list) {
        printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    }
    comm_close(test_comm);
    return failed > 0 ? 1 : 0;
}
