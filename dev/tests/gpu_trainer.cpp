// The program on a GPU (or its stand-in), as people run it: a few steps on the default base against the losses that
// PyTorch gives in fp32, resume, and what it says.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "dev/tests/gpu.h"
#include "dev/tests/program.h"
#include "dev/tests/ranks.h"
#include "io/json.h"

// train_llama --device cuda, with the GPU visible.
static int train_gpu(std::string* output, const std::string& arguments) {
    return run_command(output, program() + base() + " --device cuda " + arguments);
}

static bool has_gpu() {
    return GpuDevice<bf16>().ok;
}

// The first 8 steps: the stand-in is slow.
static void losses_of_the_default_base() {
    if (!has_gpu()) {
        return;
    }
    const std::string device = program() + base() + " --device cuda";
    check_bf16_losses(device, "nf4", "dequant", " --gemm dequant", 8);
    check_bf16_losses(device, "nf4", "fused", " --gemm fused", 8);
    check_bf16_losses(device, "none", "", "", 8);
}

// In fp32 the GPU repeats the CPU's losses up to the order of sums.
static void fp32_is_the_cpu() {
    if (!has_gpu()) {
        return;
    }
    const std::string root = test_directory(),
                      options = "-i " + small_data(12) + " -r 4 -b 4 -t 48 -n 4 --val none -o ";
    std::string out;
    CHECK(train_gpu(&out, options + root + "/gpu --math fp32") == 0, "%s", out.c_str());
    CHECK(run_command(&out, program() + base() + " --device cpu --math fp32 " + options + root + "/cpu") == 0, "%s", out.c_str());
    const std::vector<double> gpu = losses_of(root + "/gpu"), cpu = losses_of(root + "/cpu");
    CHECK(gpu.size() == 4 && cpu.size() == 4, "%zu and %zu losses", gpu.size(), cpu.size());
    for (size_t s = 0; s < std::min(gpu.size(), cpu.size()); s++) {
        // Sums of up to 512 products: about sqrt(512) roundings of 6e-8 in a row of some 30 ops, and four steps of
        // Adam.
        CHECK_ERROR("step " + std::to_string(s + 1), std::fabs(gpu[s] - cpu[s]) / cpu[s], 2e-5);
    }
}

// Straight through, with everything made again, and stopped in the middle and resumed: the same adapter, byte for byte.
static void resume_and_recompute_same_bytes() {
    if (!has_gpu()) {
        return;
    }
    const std::string root = test_directory(), options = "-i " + small_data(10) +
                                                         " -r 4 -b 4 -t 48 --schedule constant --warmup 0 --val none "
                                                         "--save-every 2 ";
    std::string out;
    CHECK(train_gpu(&out, options + "-n 4 -o " + root + "/straight") == 0, "%s", out.c_str());
    CHECK(train_gpu(&out, options + "-n 4 --recompute full -o " + root + "/full") == 0, "%s", out.c_str());
    CHECK(text_has(out, "recompute full"), "%s", out.c_str());
    const std::string want = file_text(root + "/straight/adapter_model.safetensors");
    CHECK(file_text(root + "/full/adapter_model.safetensors") == want, "recompute full gives another adapter");
    CHECK(run_command(&out, "rm -r " + root + "/full/checkpoints/step_4 " + root + "/full/adapter_model.safetensors") ==
              0,
          "%s", out.c_str());
    CHECK(train_gpu(&out, "--resume -o " + root + "/full") == 0, "%s", out.c_str());
    CHECK(text_has(out, "going on after step 2"), "%s", out.c_str());
    CHECK(file_text(root + "/full/adapter_model.safetensors") == want, "the resumed run gives another adapter");
}

// What a larger card chose does not fit into a smaller one: planned anew, and said. The stand-in's memory can be set.
static void resume_on_a_smaller_card() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    if (std::string(dev.info.name) != "stand-in") {
        test_skip("a card's memory cannot be set");
        return;
    }
    std::string out;
    const std::string dir = test_directory() + "/run", run = program() + base() + " --device cuda -o " + dir;
    const std::string options = " -i " + source_path("data.jsonl") + " -r 4 -b 64 -t 48 --val none --save-every 1 -n ";
    CHECK(run_command(&out, "SIMT_MEMORY_MB=1000 " + run + options + "1") == 0, "%s", out.c_str());
    CHECK(text_has(out, "passes of 1565 tokens"), "%s", out.c_str());
    CHECK(run_command(&out, "rm " + dir + "/adapter_model.safetensors") == 0, "%s", out.c_str());
    CHECK(run_command(&out, "SIMT_MEMORY_MB=840 " + program() + base() + " --device cuda --resume -n 2 -o " + dir) == 2,
          "-n is part of the run: %s", out.c_str());
    const int code = run_command(&out, "SIMT_MEMORY_MB=840 " + program() + " --device cuda --resume -o " + dir);
    CHECK(code == 0 && text_has(out, "do not fit here"), "exit %d: %s", code, out.c_str());
}

// Without --threads, as people call it: random weights are made by as many threads as the host has.
static void benchmark_line() {
    if (!has_gpu()) {
        return;
    }
    std::string out;
    int code = train_gpu(&out, "--benchmark 1 -b 2 -t 16");
    const size_t at = out.rfind("tokens_per_s: ");
    CHECK(code == 0 && at != std::string::npos && atof(out.c_str() + at + 14) > 0, "exit %d: %s", code, out.c_str());
    for (const char* word : {"predicted speed", "measured peak", "gate_up", "on the card", "planned"}) {
        CHECK(text_has(out, word), "no '%s' in: %s", word, out.c_str());
    }
    code = run_command(&out, program() + " --device cuda -m shape:125m --dry-run -t 64");
    CHECK(code == 0 && !text_has(out, " 0 threads"), "exit %d: %s", code, out.c_str());
}

// What a run on a card says of itself, and refusals.
static void words() {
    if (!has_gpu()) {
        return;
    }
    std::string out;
    const std::string data = "-i " + small_data(8);
    CHECK(train_gpu(&out, data + " --dry-run") == 0, "%s", out.c_str());
    CHECK(text_has(out, "on cuda, ") && text_has(out, ", bf16") && text_has(out, "predicted speed") &&
              text_has(out, "memory plan"),
          "%s", out.c_str());
    CHECK(train_gpu(&out, data + " --math int16 --dry-run") == 2 && text_has(out, "--math int16"), "%s", out.c_str());
    CHECK(train_gpu(&out, "-m shape:405b --quant none --dry-run") == 2, "a second -m: %s", out.c_str());
    const int code = run_command(&out, program() + " --device cuda -m shape:405b --quant none --dry-run");
    CHECK(code == 0 && text_has(out, "GB of memory, the card has"), "exit %d: %s", code, out.c_str());
}

// One rank, through the ranks' own code: the communicator, the sum, the gathers of a base "spread" over one.
static void one_rank_goes_the_way_of_many() {
    if (!has_gpu()) {
        return;
    }
    const std::string root = test_directory();
    const std::string common = "-q -i " + small_data(6) + " -r 4 -b 3 -n 3 --val none -o " + root + "/";
    std::string out;
    int code = train_gpu(&out, common + "plain");
    code = code ? code
                : run_command(&out, ranks_environment() + "TRAIN_LLAMA_ONE_RANK=1 " + program() + base() +
                                        " --device cuda --shard-base " + common + "one");
    CHECK(code == 0 && file_text(root + "/plain/adapter_model.safetensors") ==
                           file_text(root + "/one/adapter_model.safetensors"),
          "other bytes (exit %d): %s", code, out.c_str());
}

// Several ranks, a card each: as many as the stand-in is told to have.
static void ranks_with_a_card_each() {
    if (!has_gpu() || !ranks_can_start()) {
        return;
    }
    if (strstr(GpuDevice<bf16>().info.name, "stand-in") == nullptr) {
        return test_skip("one real card: NCCL takes no two ranks on it");
    }
    const std::string root = test_directory(), data = small_data(7);
    const std::string common = program() + base() + " --device cuda -q -r 4 -b 5 -n 2 --save-every 1 --val " +
                               small_data(3, "data_val.jsonl") + " -i " + data + " -o " + root + "/";
    const struct {
        const char* name;
        const char* more;
        const char* like;
    } runs[] = {
        {"plain", "", "plain"},
        {"spread", " --shard-base", "plain"},
        {"parts", " --pass-tokens 32 --recompute full --gemm dequant", "parts"},
        {"parts_spread", " --pass-tokens 32 --recompute full --gemm dequant --shard-base --paged-optimizer", "parts"},
    };
    std::string out;
    for (const auto& r : runs) {
        const int code = run_ranks(&out, 2, common + r.name + r.more, "SIMT_DEVICES=2", 100);
        if (!CHECK(code == 0, "%s: exit %d\n%s", r.name, code, out.c_str())) {
            return;
        }
        CHECK(file_text(root + "/" + r.name + "/adapter_model.safetensors") ==
                  file_text(root + "/" + r.like + "/adapter_model.safetensors"),
              "%s: other bytes than %s", r.name, r.like);
    }
    const int alone = run_command(&out, common + "alone");
    const std::vector<double> one = losses_of(root + "/alone"), two = losses_of(root + "/plain");
    CHECK(alone == 0 && one.size() == 2 && two.size() == 2, "alone: exit %d\n%s", alone, out.c_str());
    // The first loss is of the same products on the same rows; bf16 rounds the sums of gradients apart after that.
    CHECK_ERROR("first loss", one.size() == 2 && two.size() == 2 ? std::fabs(one[0] - two[0]) : 1, 1e-6);
    for (size_t i = 0; i < std::min(one.size(), two.size()); i++) {
        CHECK_ERROR("loss of step " + std::to_string(i + 1), std::fabs(one[i] - two[i]) / one[i], 1.0 / 256);
    }
    // with moments on the host, and as another count
    CHECK(run_command(&out, "cd " + root + "/parts_spread && rm -r adapter* checkpoints/step_2") == 0, "%s",
          out.c_str());
    int code = run_ranks(&out, 2, program() + " --resume -q -o " + root + "/parts_spread", "SIMT_DEVICES=2", 100);
    CHECK(code == 0 && file_text(root + "/parts_spread/adapter_model.safetensors") ==
                           file_text(root + "/parts/adapter_model.safetensors"),
          "resumed: other bytes (exit %d)\n%s", code, out.c_str());
    code = run_ranks(&out, 2, program() + base() + " --device cuda --dry-run -i " + data, "SIMT_DEVICES=1 SIMT_BUS_ID=0000:01:00.0", 60);
    CHECK(code != 0 && text_has(out, "GPU"), "two ranks, one card: exit %d\n%s", code, out.c_str());
}

extern const Test gpu_trainer_tests[];
const Test gpu_trainer_tests[] = {
    {"losses_of_the_default_base", losses_of_the_default_base},
    {"fp32_is_the_cpu", fp32_is_the_cpu},
    {"resume_and_recompute_same_bytes", resume_and_recompute_same_bytes},
    {"resume_on_a_smaller_card", resume_on_a_smaller_card},
    {"benchmark_line", benchmark_line},
    {"words", words},
    {"one_rank_goes_the_way_of_many", one_rank_goes_the_way_of_many},
    {"ranks_with_a_card_each", ranks_with_a_card_each},
    {nullptr, nullptr},
};
