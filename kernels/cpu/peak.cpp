#include "kernels/cpu/peak.h"

#include <chrono>
#include <vector>

#include "kernels/cpu/parallel.h"

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double peak_gflops(const GemmFormat<float>& arithmetic, int threads) {
    struct Result {
        double rate;
        float sink;
        char apart[64];  // the threads' results on different cache lines
    };
    std::vector<Result> results(size_t(threads), Result{});
    parallel(threads, [&](int worker) {
        Result& result = results[size_t(worker)];
        double flops = 0, begin = seconds(), spent = 0;
        while (spent < 0.2) {
            flops += double(arithmetic.peak_loop(100000, &result.sink));
            spent = seconds() - begin;
        }
        result.rate = flops / spent;
    });
    double sum = 0;
    for (const Result& result : results) {
        sum += result.rate;
    }
    return sum * 1e-9;
}
