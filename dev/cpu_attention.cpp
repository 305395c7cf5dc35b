// Times attention forward and backward of Cpu<float> and compares with the FMA peak measured in the same process.
//   build/release/cpu_attention [T] [HS] [NH] [NKV] [documents] [threads]
// Floating-point operations are those of the causal triangle: 2 products forward, 5 backward.
#include "kernels/cpu/attention.h"
#include "kernels/random.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

// With one thread the processor time, which other programs do not touch; with several the time on the clock.
static double seconds(int threads) {
    timespec t;
    clock_gettime(threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// The best of a second's runs: what the code can do when nothing else wants the processor.
template <class Fn>
static double best_seconds(int threads, const Fn& fn) {
    const double begin = seconds(threads);
    double best = 1e9;
    for (int runs = 0; runs < 5 || seconds(threads) - begin < 1; runs++) {
        double start = seconds(threads);
        fn();
        best = std::min(best, seconds(threads) - start);
    }
    return best;
}

int main(int argc, char** argv) {
    const auto argument = [&](int i, int otherwise) { return argc > i ? atoi(argv[i]) : otherwise; };
    const int T = argument(1, 512), HS = argument(2, 64), NH = argument(3, 12), NKV = argument(4, 4);
    const int documents = argument(5, 1);
    Cpu<float> dev;
    device_open(dev, argument(6, 0));
    if (!dev.isa) {
        fprintf(stderr, "error: TRAIN_LLAMA_CPU names no tier of this machine\n");
        return 2;
    }
    const size_t N = size_t(T) * size_t(documents), wide = size_t(NH) * size_t(HS);
    const size_t QKV = size_t(NH + 2 * NKV) * size_t(HS);
    std::vector<float> qkv(N * QKV), out(N * wide), dout(N * wide), lse(N * size_t(NH)), dqkv(N * QKV);
    for (size_t i = 0; i < qkv.size(); i++) {
        qkv[i] = float(random_uniform(1, STREAM_TOKENS, 0, i) * 4 - 2);
    }
    for (size_t i = 0; i < dout.size(); i++) {
        dout[i] = float(random_uniform(1, STREAM_TOKENS, 1, i) * 2 - 1);
    }
    std::vector<int32_t> starts;
    for (int d = 0; d <= documents; d++) {
        starts.push_back(d * T);
    }
    Documents docs;
    docs.cu_seqlens = starts.data();
    docs.count = documents;
    device_reserve(dev, attention_workspace(dev, N, size_t(T), NH, NKV, HS));

    std::vector<float> sink(size_t(dev.threads) * 64);
    std::vector<size_t> counted(size_t(dev.threads));
    const double peak_time = best_seconds(dev.threads, [&] {
        parallel(dev.threads, [&](int w) { counted[size_t(w)] = dev.isa->fma_loop(1000000, &sink[size_t(w) * 64]); });
    });
    const double peak = double(counted[0]) * dev.threads / peak_time;
    const double forward = best_seconds(dev.threads, [&] {
        attention_forward(dev, out.data(), wide, lse.data(), qkv.data(), docs, N, NH, NKV, HS);
    });
    const double backward = best_seconds(dev.threads, [&] {
        attention_backward(dev, dqkv.data(), QKV, dout.data(), out.data(), wide, lse.data(), qkv.data(), docs, N, NH,
                           NKV, HS);
    });
    const double product = double(documents) * NH * (double(T) * (T + 1) / 2) * HS * 2;
    printf("%s, %d threads, T %d, HS %d, heads %d/%d, documents %d: peak %.0f GFLOP/s\n", dev.isa->name, dev.threads, T,
           HS, NH, NKV, documents, peak * 1e-9);
    printf("forward  %8.3f ms  %6.1f GFLOP/s  %4.1f %% of peak\n", forward * 1e3, 2 * product / forward * 1e-9,
           200 * product / forward / peak);
    printf("backward %8.3f ms  %6.1f GFLOP/s  %4.1f %% of peak\n", backward * 1e3, 5 * product / backward * 1e-9,
           500 * product / backward / peak);
    device_close(dev);
    return 0;
}
