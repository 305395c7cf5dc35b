// Speed of the linear groups on the CPU: GFLOP/s and the share of the multiply-add peak that is measured in between, on
// the same threads. Build with the kernels of kernels/cpu; run alone on the machine, or read only the shares.
// The peak is taken before every repetition.
//
//   build/release/cpu_gemm [rows [threads [repetitions]]]        default 512, all, 7
//
// A line is one group of one linear, OC x C. `forward` and `backward` count the frozen product alone, without adapter,
// norm or dropout; `lora` is the time of the same with an adapter of rank 16 (and dA, dB) over the time without.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "kernels/cpu/linear.h"
#include "kernels/cpu/peak.h"

// One thread is timed by the processor time it had, so that other work on the machine disturbs it less.
static double seconds(const Cpu<float>& dev) {
    if (dev.threads == 1) {
        return double(clock()) / CLOCKS_PER_SEC;
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double peak_gflops(const Cpu<float>& dev) {
    if (dev.threads > 1) {
        return cpu_peak_gflops(dev);
    }
    float sink;
    double flops = 0, begin = seconds(dev), spent = 0;
    for (; spent < 0.05; spent = seconds(dev) - begin) {
        flops += double(dev.isa->fma_loop(100000, &sink));
    }
    return 1e-9 * flops / spent;
}

static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

struct Case {
    int OC, C;
    std::vector<uint8_t> codes, absmax8;
    std::vector<float> absmax2, A, B, dA, dB, x, y, dx, xa, map8;
    std::vector<uint16_t> half;
};

static Case make_case(int OC, int C, size_t N) {
    Case c;
    c.OC = OC;
    c.C = C;
    const size_t n = size_t(OC) * size_t(C);
    uint32_t state = 1;
    auto next = [&]() { return state = state * 1664525u + 1013904223u; };
    auto floats = [&](std::vector<float>& v, size_t count) {
        v.resize(count);
        for (float& f : v) {
            f = float(next() >> 8) * 0x1p-24f - 0.5f;
        }
    };
    c.codes.resize(n / 2);
    std::generate(c.codes.begin(), c.codes.end(), [&]() { return uint8_t(next() >> 24); });
    c.absmax8.resize(n / 64);
    std::generate(c.absmax8.begin(), c.absmax8.end(), [&]() { return uint8_t(next() >> 24); });
    c.absmax2.assign(n / 64 / 256 + 1, 0.01f);
    c.map8.resize(256);
    nf4_map8(c.map8.data());
    c.half.resize(n);
    std::generate(c.half.begin(), c.half.end(), [&]() { return to_bf16(float(next() >> 8) * 0x1p-28f).bits; });
    floats(c.A, 16 * size_t(C));
    floats(c.B, 16 * size_t(OC));
    floats(c.x, N * size_t(C));
    c.dA.resize(c.A.size());
    c.dB.resize(c.B.size());
    c.y.resize(N * size_t(OC));
    c.dx.resize(N * size_t(C));
    c.xa.resize(N * 16);
    return c;
}

static LinearGroup<float> make_group(Case& c, Store store, int r) {
    LinearGroup<float> g;
    g.parts = 1;
    g.C = c.C;
    g.OC = c.OC;
    g.R = r;
    LinearPart<float>& p = g.part[0];
    p.w.store = store;
    p.w.rows = c.OC;
    p.w.cols = c.C;
    p.w.data = c.half.data();
    p.w.codes = c.codes.data();
    p.w.absmax8 = c.absmax8.data();
    p.w.absmax2 = c.absmax2.data();
    p.w.map8 = c.map8.data();
    p.w.offset = 0.02f;
    p.r = r;
    p.scale = 2;
    p.A = c.A.data();
    p.B = c.B.data();
    p.dA = c.dA.data();
    p.dB = c.dB.data();
    return g;
}

int main(int argc, char** argv) {
    const size_t N = argc > 1 ? size_t(atol(argv[1])) : 512;
    Cpu<float> dev;
    device_open(dev, argc > 2 ? atoi(argv[2]) : 0);
    const int repetitions = argc > 3 ? atoi(argv[3]) : 7;
    if (!dev.isa) {
        fprintf(stderr, "error: TRAIN_LLAMA_CPU names no tier of this processor\n");
        return 2;
    }
    const int shapes[][2] = {{768, 768}, {2048, 768}, {768, 2048}, {2048, 2048}, {8192, 2048}, {2048, 8192}};
    printf("%s, %d threads, %zu rows\n", dev.isa->name, dev.threads, N);
    printf("    OC x C      store  peak GF/s  forward GF/s (%%)  backward GF/s (%%)  lora forward  backward\n");
    for (const auto& shape : shapes) {
        Case c = make_case(shape[0], shape[1], N);
        LinearInput<float, float> in;
        in.x = c.x.data();
        in.stride = size_t(c.C);
        for (Store store : {Store::NF4, Store::BF16}) {
            std::vector<double> time[4], peak;
            for (int repetition = 0; repetition <= repetitions; repetition++) {
                peak.push_back(peak_gflops(dev));
                for (int variant = 0; variant < 4; variant++) {
                    LinearGroup<float> g = make_group(c, store, variant < 2 ? 0 : 16);
                    device_reserve(dev, linear_workspace(dev, g, N));
                    double begin = seconds(dev);
                    if (variant % 2 == 0) {
                        linear_forward(dev, c.y.data(), size_t(c.OC), c.xa.data(), in, g, N,
                                       static_cast<const float*>(nullptr), static_cast<const Rope<float>*>(nullptr),
                                       Dropout());
                    } else {
                        linear_backward(dev, c.dx.data(), c.y.data(), size_t(c.OC), in, g, c.xa.data(), N,
                                        static_cast<const Rope<float>*>(nullptr), Dropout());
                    }
                    if (repetition > 0) {  // the first warms up
                        time[variant].push_back(seconds(dev) - begin);
                    }
                }
            }
            double flops = 2e-9 * double(N) * c.OC * c.C, best = median(peak);
            double forward = median(time[0]), backward = median(time[1]);
            printf("%6d x %-6d  %-5s  %9.1f  %8.1f (%3.0f %%)    %8.1f (%3.0f %%)        x %.3f   x %.3f\n", c.OC, c.C,
                   store == Store::NF4 ? "nf4" : "bf16", best, flops / forward, 100 * flops / forward / best,
                   flops / backward, 100 * flops / backward / best, median(time[2]) / forward,
                   median(time[3]) / backward);
            fflush(stdout);
        }
    }
    device_close(dev);
    return 0;
}
