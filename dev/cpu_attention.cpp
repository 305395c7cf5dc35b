// Times attention forward and backward with activations in float and in bf16, on a tier with tiles also multiplied in
// bf16, and compares with the FMA peak measured in between, in the same process.
//   build/release/cpu_attention [T] [HS] [NH] [NKV] [documents] [threads]
// Without T and HS: a list of shapes. Floating-point operations are those of the causal triangle: 2 products forward,
// 5 backward.
#include "kernels/cpu/attention.h"
#include "kernels/random.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

struct Shape {
    int T, HS, NH, NKV, documents;
};

// With one thread the processor time, which other programs do not touch; with several the time on the clock.
static double seconds(int threads) {
    timespec t;
    clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// Of one call, out of as many as take two milliseconds: clocks are coarse.
template <class Fn>
static double seconds_of(int threads, const Fn& fn) {
    const double start = seconds(threads);
    double now = start;
    int calls = 0;
    for (; now - start < 2e-3; calls++) {
        fn();
        now = seconds(threads);
    }
    return (now - start) / calls;
}

static void value_set(float& x, double value) {
    x = float(value);
}
static void value_set(bf16& x, double value) {
    x = to_bf16(float(value));
}

template <class X>
static void measure(int threads, const CpuIsa* isa, const Shape& s, const char* storage) {
    Cpu<X> dev;
    device_open(dev, threads);
    dev.isa = isa;
    const size_t N = size_t(s.T) * size_t(s.documents), wide = size_t(s.NH) * size_t(s.HS);
    const size_t QKV = size_t(s.NH + 2 * s.NKV) * size_t(s.HS);
    std::vector<X> qkv(N * QKV), out(N * wide), dout(N * wide), dqkv(N * QKV);
    std::vector<float> lse(N * size_t(s.NH)), sink(size_t(dev.threads) * 64);
    for (size_t i = 0; i < qkv.size(); i++) {
        value_set(qkv[i], random_uniform(1, STREAM_TOKENS, 0, i) * 4 - 2);
    }
    for (size_t i = 0; i < dout.size(); i++) {
        value_set(dout[i], random_uniform(1, STREAM_TOKENS, 1, i) * 2 - 1);
    }
    std::vector<int32_t> starts;
    for (int d = 0; d <= s.documents; d++) {
        starts.push_back(d * s.T);
    }
    Documents docs;
    docs.cu_seqlens = starts.data();
    docs.count = s.documents;
    device_reserve(dev, attention_workspace(dev, N, size_t(s.T), s.NH, s.NKV, s.HS));

    // The best of a second's runs: what the code can do when nothing else wants the processor.
    std::vector<size_t> counted(size_t(dev.threads));
    const double begin = seconds(dev.threads);
    double peak = 0, forward = 1e9, backward = 1e9;
    for (int runs = 0; runs < 5 || seconds(dev.threads) - begin < 1; runs++) {
        const double loop = seconds_of(dev.threads, [&] {
            parallel(dev.threads,
                     [&](int w) { counted[size_t(w)] = dev.isa->fp32->peak_loop(200000, &sink[size_t(w) * 64]); });
        });
        peak = std::max(peak, double(counted[0]) * dev.threads / loop);
        forward =
            std::min(forward, seconds_of(dev.threads, [&] {
                         attention_forward(dev, out.data(), wide, lse.data(), qkv.data(), docs, N, s.NH, s.NKV, s.HS);
                     }));
        backward = std::min(backward, seconds_of(dev.threads, [&] {
                                attention_backward(dev, dqkv.data(), QKV, dout.data(), out.data(), wide, lse.data(),
                                                   qkv.data(), docs, N, s.NH, s.NKV, s.HS);
                            }));
    }
    const double product = double(s.documents) * s.NH * (double(s.T) * (s.T + 1) / 2) * s.HS * 2;
    printf("%-5s %5d %4d %7d/%-3d %5d %6.0f | %9.3f %7.1f %5.1f %% | %9.3f %7.1f %5.1f %%\n", storage, s.T, s.HS, s.NH,
           s.NKV, s.documents, peak * 1e-9, forward * 1e3, 2 * product / forward * 1e-9, 200 * product / forward / peak,
           backward * 1e3, 5 * product / backward * 1e-9, 500 * product / backward / peak);
    fflush(stdout);
    device_close(dev);
}

int main(int argc, char** argv) {
    wait_passively(argv);
    const auto argument = [&](int i, int otherwise) { return argc > i ? atoi(argv[i]) : otherwise; };
    Cpu<float> dev;
    device_open(dev, argument(6, 0));
    if (!dev.isa) {
        fprintf(stderr, "error: TRAIN_LLAMA_CPU names no tier of this machine\n");
        return 2;
    }
    std::vector<Shape> shapes;
    if (argc > 2) {
        shapes.push_back({argument(1, 0), argument(2, 0), argument(3, 12), argument(4, 4), argument(5, 1)});
    } else {
        for (int HS : {64, 128}) {
            for (int T : {512, 1024, 2048}) {
                shapes.push_back({T, HS, 12, 4, 1});
            }
            shapes.push_back({64, HS, 12, 4, 16});
        }
    }
    printf("%s, %d threads; GFLOP/s, and of the FMA peak\n", dev.isa->name, dev.threads);
    printf("          T   HS     heads  docs   peak |   forward ms             |  backward ms\n");
    for (const Shape& s : shapes) {
        measure<float>(dev.threads, dev.isa, s, "float");
        CpuIsa floats = *dev.isa;
        floats.attention_tiles = nullptr;
        measure<bf16>(dev.threads, &floats, s, "bf16");
        if (dev.isa->attention_tiles) {
            measure<bf16>(dev.threads, dev.isa, s, "tiles");
        }
    }
    device_close(dev);
    return 0;
}
