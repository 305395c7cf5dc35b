// --math: which arithmetic runs, what is refused, and what training with each comes to. The program as a subprocess.
#include <algorithm>
#include <cmath>

#include "dev/tests/program.h"
#include "dev/tests/test.h"
#include "kernels/device.h"

// Steps of a curve; fewer in instrumented builds.
static size_t curve_steps() {
    return getenv("RANKS_STEPS") != nullptr ? 8 : 200;
}

// The losses of that many steps on the default base. The learning rate is a quarter of its default or less, so that
// what one rounding changes is not multiplied by the steps after it.
static std::vector<double> curve(const std::string& math) {
    const std::string dir = test_directory() + "/" + math;
    std::string out;
    const int code =
        train(&out, "-i " + source_path("data.jsonl") + base() + " -q -r 16 -n " + std::to_string(curve_steps()) +
                        " --lr 5e-4 --val none -o " + dir + " --math " + math);
    CHECK(code == 0, "--math %s: exit %d\n%s", math.c_str(), code, out.c_str());
    const std::vector<double> losses = losses_of(dir);
    CHECK(losses.size() == curve_steps(), "--math %s: %zu losses", math.c_str(), losses.size());
    return losses.empty() ? std::vector<double>(1, NAN) : losses;
}

// int16 within 1e-3 of fp32.
static void curves_of_200_steps() {
    const CpuIsa* isa = cpu_isa_asked();
    if (isa == nullptr || isa->int16 == nullptr) {
        test_skip("no tier with int16 here");
        return;
    }
    const std::vector<double> want = curve("fp32");
    CHECK(want.back() < 0.8 * want.front(), "nothing is learned: %g to %g", want.front(), want.back());
    const std::vector<double> got = curve("int16");
    size_t worst = 0;
    for (size_t i = 0; i < std::min(want.size(), got.size()); i++) {
        worst = std::fabs(got[i] - want[i]) > std::fabs(got[worst] - want[worst]) ? i : worst;
    }
    CHECK_ERROR("int16, step " + std::to_string(worst + 1), std::fabs(got[worst] - want[worst]), 1e-3);
}

// bf16 as far from fp32 as PyTorch's own, twice at most. And 200 steps of it end where those of fp32 do.
static void losses_in_bf16() {
    const CpuIsa* isa = cpu_isa_asked();
    if (isa == nullptr || isa->bf16 == nullptr) {
        test_skip("no tier amx here");
        return;
    }
    const std::string cpu = "CUDA_VISIBLE_DEVICES= " + program() + base() + " --device cpu --math bf16";
    const size_t steps = std::min(curve_steps(), size_t(20));
    check_bf16_losses(cpu, "nf4", "", "", steps);
    check_bf16_losses(cpu, "none", "", "", steps);
    const std::vector<double> want = curve("fp32"), got = curve("bf16");
    const double a = *std::min_element(want.begin(), want.end()), b = *std::min_element(got.begin(), got.end());
    CHECK(b < 2 * a, "the least loss: %g, %g in fp32", b, a);
}

// Every tier trains, says what it computes in, and takes the best by itself.
static void tiers_and_their_arithmetic() {
    const std::string data = small_data(4), root = test_directory();
    size_t tiers = 0;
    for (const char* tier : {"ref", "avx2", "avx512", "avx512vnni", "amx"}) {
        const CpuIsa* isa = cpu_isa_choose(tier);
        if (isa == nullptr) {
            continue;
        }
        tiers++;
        const std::string force = std::string("TRAIN_LLAMA_CPU=") + tier;
        for (const char* math : {"auto", "fp32", "int16", "bf16"}) {
            const std::string m = math, dir = root + "/" + tier + "-" + math;
            const bool has = m == "auto" || m == "fp32" || (m == "int16" ? isa->int16 : isa->bf16) != nullptr;
            const std::string chosen = m != "auto" ? m : isa->bf16 ? "bf16" : isa->int16 ? "int16" : "fp32";
            std::string out;
            const int code = train(
                &out, "-i " + data + base() + " -r 2 -b 4 -n 1 --val none --device cpu --math " + m + " -o " + dir,
                force);
            CHECK(code == (has ? 0 : 2), "%s, --math %s: exit %d\n%s", tier, math, code, out.c_str());
            CHECK(text_has(out, has ? std::string(tier) + ", " + chosen : "--math " + m + ": "), "%s, --math %s:\n%s",
                  tier, math, out.c_str());
            CHECK(has || (text_has(out, m == "int16" ? "has no AVX-512 with VNNI" : "has no AMX") &&
                          text_has(out, std::string("its tier is ") + tier) && !path_exists(dir + "/run.json")),
                  "%s, --math %s:\n%s", tier, math, out.c_str());
        }
    }
    CHECK(tiers > 0 && cpu_isa_choose("avx1024") == nullptr, "%zu tiers", tiers);
    std::string out;
    CHECK(train(&out, "-i " + data + base() + " -o " + root + "/none", "TRAIN_LLAMA_CPU=avx1024") == 2 &&
              text_has(out, "TRAIN_LLAMA_CPU names a tier"),
          "%s", out.c_str());
    CHECK(train(&out, "-i " + data + base() + " --device cuda --math int16 -o " + root + "/none") == 2 &&
              text_has(out, "--math int16 is an arithmetic of the CPU"),
          "%s", out.c_str());
}

extern const Test math_tests[] = {
    {"curves_of_200_steps", curves_of_200_steps},
    {"losses_in_bf16", losses_in_bf16},
    {"tiers_and_their_arithmetic", tiers_and_their_arithmetic},
    {nullptr, nullptr},
};
