// The gates of the linear groups on the CPU: the fused NF4 product, forward and backward, in every arithmetic that the
// tier has, beside OpenBLAS's sgemm and oneDNN's bf16 matmul on the dequantised matrix, and beside the peak of the
// arithmetic. All candidates take turns in one process, and a ratio is the median of those of single turns: a machine
// that is busy with other work changes the times and hardly the ratios.
//
//   build/release/cpu_gemm [--rows 512] [--threads n] [--repetitions 7] [--shape OCxC]
//                          [--blas libopenblas.so.0] [--blas-core SkylakeX] [--dnn libdnnl.so.3]
//   TRAIN_LLAMA_CPU=avx2 build/release/cpu_gemm          gate K5: the tier below, and OpenBLAS's kernels for Haswell
//
// A line is one group of one linear, OC x C. `forward` and `backward` count the frozen product alone, without adapter,
// norm or dropout; `lora` is the time of the same with an adapter of rank 16 (and dA, dB) over the time without.
// `error` is the relative root mean square against a product in double, of y and of dx. What is printed is Markdown.
// Exit status 1: a gate is under its floor.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <thread>
#include <vector>

#include "dev/blas.h"
#include "dev/gemm_case.h"
#include "kernels/cpu/peak.h"

struct Settings {
    size_t rows = 512;
    int threads = 0, repetitions = 7;
    int OC = 0, C = 0;                 // 0: the shapes of the gates
    std::string blas, blas_core, dnn;  // files, and whose kernels OpenBLAS takes
};

// One arithmetic at one shape: each value of forward and of backward; 0: not measured.
enum { RATE, SHARE, X_BLAS, X_DNN, ERROR, LORA, VALUES };
struct Line {
    size_t M = 0;
    int OC = 0, C = 0;
    std::string math;  // "": not on this tier
    double value[VALUES][2] = {};
};

// ----------------------------------------------------------------------------
// times

// One thread is timed by the processor time it had, so that other work on the machine disturbs it less.
static double seconds(int threads) {
    if (threads == 1) {
        return double(clock()) / CLOCKS_PER_SEC;
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Of one of `times` calls.
template <class Fn>
static double time_of(int threads, int times, const Fn& fn) {
    const double begin = seconds(threads);
    for (int i = 0; i < times; i++) {
        fn();
    }
    return (seconds(threads) - begin) / times;
}

static double peak_of(const GemmFormat<float>& format, int threads) {
    if (threads > 1) {
        return peak_gflops(format, threads);
    }
    float sink;
    double flops = 0, begin = seconds(threads), spent = 0;
    for (; spent < 0.05; spent = seconds(threads) - begin) {
        flops += double(format.peak_loop(100000, &sink));
    }
    return 1e-9 * flops / spent;
}

// OpenBLAS's threads and oneDNN's look for work for some 26 ms after a call, and take the cores from what comes next.
static void let_threads_sleep() {
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
}

static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v.empty() ? 0 : v[v.size() / 2];
}

// The median over the turns of a / b.
static double ratio(const std::vector<double>& a, const std::vector<double>& b) {
    std::vector<double> r;
    for (size_t i = 0; i < a.size() && i < b.size(); i++) {
        r.push_back(a[i] / b[i]);
    }
    return median(r);
}

struct Turns {
    std::vector<double> second_per_flop, time[2], lora[2];  // of the peak in registers; of the product
};

// One turn of the product in the device's arithmetic. The first turn warms up, and looks at what comes out.
static void take_turn(Cpu<float>& dev, Case& c, int times, bool first, Turns& t, Line& line) {
    const double peak = peak_of(*dev.base, dev.threads);
    for (int way : {FORWARD, BACKWARD}) {
        const double alone = time_of(dev.threads, times, [&]() { case_product(dev, c, way, 0); });
        if (first) {
            line.value[ERROR][way] = case_error(c, way);
        } else {
            t.time[way].push_back(alone);
            t.lora[way].push_back(time_of(dev.threads, times, [&]() { case_product(dev, c, way, 16); }));
        }
    }
    if (!first) {
        t.second_per_flop.push_back(1e-9 / peak);
    }
}

// Every candidate at one shape; a line each.
static std::vector<Line> measure(Cpu<float>& dev, const Blas& blas, const Dnn& dnn, int OC, int C, size_t M,
                                 int repetitions) {
    const GemmFormat<float>* const formats[] = {dev.isa->fp32, dev.isa->int16, dev.isa->bf16};
    Case c;
    case_prepare(c, dev, OC, C, M, dnn.engine != nullptr);
    DnnProduct products[2];
    for (int way = 0; way < 2 && dnn.engine != nullptr; way++) {
        products[way] = dnn_product(dnn, c.y16[way].data(), c.x16[way].data(), c.w16.data(), int(M), OC, C, way == 1);
    }
    const double flops = 2 * double(M) * OC * C;
    const int times = int(std::max(1.0, 4e9 * dev.threads / flops));  // some 20 ms, on a core of 200 GFLOP/s
    Turns ours[3], by_blas, by_dnn;
    std::vector<Line> lines(3);
    for (int turn = 0; turn <= repetitions; turn++) {
        for (int i = 0; i < 3; i++) {
            lines[i].math = formats[i] != nullptr ? formats[i]->name : "";
            if (formats[i] != nullptr) {
                dev.base = formats[i];
                take_turn(dev, c, times, turn == 0, ours[i], lines[i]);
            }
        }
        for (int way = 0; way < 2 && blas.sgemm != nullptr; way++) {
            by_blas.time[way].push_back(time_of(dev.threads, times, [&]() {
                blas_product(blas, c.y[way].data(), c.x[way].data(), c.w.data(), int(M), OC, C, way == BACKWARD);
            }));
        }
        for (int way = 0; way < 2 && products[way].primitive != nullptr; way++) {
            by_dnn.time[way].push_back(time_of(dev.threads, times, [&]() { dnn_run(dnn, products[way]); }));
        }
        let_threads_sleep();
        if (turn == 0) {
            by_blas = by_dnn = Turns();
        }
    }
    for (int way : {FORWARD, BACKWARD}) {
        for (int i = 0; i < 3; i++) {
            const std::vector<double>& time = ours[i].time[way];
            lines[i].value[RATE][way] = time.empty() ? 0 : flops / median(time);
            lines[i].value[SHARE][way] = flops * ratio(ours[i].second_per_flop, time);
            lines[i].value[X_BLAS][way] = ratio(by_blas.time[way], time);
            lines[i].value[X_DNN][way] = ratio(by_dnn.time[way], time);
            lines[i].value[LORA][way] = ratio(ours[i].lora[way], time);
        }
    }
    for (const auto& other : {std::make_pair("OpenBLAS", &by_blas), std::make_pair("oneDNN bf16", &by_dnn)}) {
        const std::vector<double>* time = other.second->time;
        if (!time[0].empty()) {
            Line line;
            line.math = other.first;
            line.value[RATE][FORWARD] = flops / median(time[FORWARD]);
            line.value[RATE][BACKWARD] = flops / median(time[BACKWARD]);
            lines.push_back(line);
        }
    }
    for (const DnnProduct& p : products) {
        if (p.primitive != nullptr) {
            dnn_free(dnn, p);
        }
    }
    for (Line& line : lines) {
        line.M = M;
        line.OC = OC;
        line.C = C;
    }
    return lines;
}

// ----------------------------------------------------------------------------
// what is printed

constexpr const char* ROW = "| %4s | %12s | %-11s | %7s | %4s | %6s | %5s | %7s | %4s | %6s | %5s | %15s | %9s |\n";

static void print_head() {
    printf(ROW, "rows", "OC x C", "math", "GF/s y", "peak", "x blas", "x dnn", "GF/s dx", "peak", "x blas", "x dnn",
           "error y, dx", "x lora");
    printf("|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
}

static std::string text(const char* format, double x) {
    char out[32] = "-";
    if (x > 0) {
        snprintf(out, sizeof out, format, x);
    }
    return out;
}

static void print_line(const Line& l) {
    const std::string shape = std::to_string(l.OC) + " x " + std::to_string(l.C);
    const auto one = [&](int value, int way, const char* format, double unit) {
        return text(format, l.value[value][way] / unit);
    };
    std::string way[2][4];
    for (int w : {FORWARD, BACKWARD}) {
        way[w][0] = one(RATE, w, "%.1f", 1e9);
        way[w][1] = one(SHARE, w, "%.0f%%", 0.01);
        way[w][2] = one(X_BLAS, w, "%.2f", 1);
        way[w][3] = one(X_DNN, w, "%.2f", 1);
    }
    const std::string error = one(ERROR, 0, "%.1e", 1) + " " + one(ERROR, 1, "%.1e", 1);
    const std::string lora = one(LORA, 0, "%.2f", 1) + " " + one(LORA, 1, "%.2f", 1);
    printf(ROW, std::to_string(l.M).c_str(), shape.c_str(), l.math.c_str(), way[0][0].c_str(), way[0][1].c_str(),
           way[0][2].c_str(), way[0][3].c_str(), way[1][0].c_str(), way[1][1].c_str(), way[1][2].c_str(),
           way[1][3].c_str(), error.c_str(), lora.c_str());
    fflush(stdout);
}

// ----------------------------------------------------------------------------
// gates

struct Gate {
    const char *name, *math;
    int value;  // X_BLAS, X_DNN or SHARE: the geometric mean over the shapes with so many rows
    bool forward, backward;
    size_t rows;  // 0: --rows
    double floor, target;
    const char* needs;  // what is missing where it cannot be run
};

constexpr const char* AVX512 = "a tier of AVX-512, and OpenBLAS with kernels of AVX-512 (--blas-core SkylakeX)";
constexpr const char* INT16 = "the tier avx512vnni, and OpenBLAS with kernels of AVX-512 (--blas-core SkylakeX)";
constexpr const char* AVX2 = "TRAIN_LLAMA_CPU=avx2 in the environment, and OpenBLAS with kernels for Haswell";
constexpr const char* AMX = "the tier amx, and oneDNN 3 (--dnn)";
static const Gate gates[] = {
    {"K1 forward", "fp32", X_BLAS, true, false, 0, 1.10, 1.20, AVX512},
    {"K1 backward", "fp32", X_BLAS, false, true, 0, 1.10, 1.20, AVX512},
    {"K2 128 rows", "fp32", X_BLAS, true, true, 128, 1.35, 1.5, AVX512},
    {"K2 16 rows", "fp32", X_BLAS, true, true, 16, 2.3, 3.0, AVX512},
    {"K3 forward, of peak", "fp32", SHARE, true, false, 0, 0.80, 0.88, AVX512},
    {"K3 backward, of peak", "fp32", SHARE, false, true, 0, 0.80, 0.88, AVX512},
    {"K4 forward, int16", "int16", X_BLAS, true, false, 0, 1.8, 2.0, INT16},
    {"K4 backward, int16", "int16", X_BLAS, false, true, 0, 1.8, 2.0, INT16},
    {"K5 forward, avx2", "fp32", X_BLAS, true, false, 0, 0.93, 1.0, AVX2},
    {"K5 backward, avx2", "fp32", X_BLAS, false, true, 0, 0.93, 1.0, AVX2},
    {"A1 forward, bf16", "bf16", X_DNN, true, false, 0, 1.05, 1.20, AMX},
    {"A1 backward, bf16", "bf16", X_DNN, false, true, 0, 1.05, 1.20, AMX},
    {"A2 16 rows, bf16", "bf16", X_DNN, true, true, 16, 1.2, 1.45, AMX},
    {"A2 64 rows, bf16", "bf16", X_DNN, true, true, 64, 1.2, 1.4, AMX},
    {"A2 128 rows, bf16", "bf16", X_DNN, true, true, 128, 1.1, 1.2, AMX},
    {"A3 forward, of peak", "bf16", SHARE, true, false, 0, 0.33, 0.42, AMX},
    {"A3 backward, of peak", "bf16", SHARE, false, true, 0, 0.33, 0.42, AMX},
};

static bool is_avx512(const CpuIsa& isa) {
    return strncmp(isa.name, "avx512", 6) == 0 || strcmp(isa.name, "amx") == 0;
}

// A comparison with OpenBLAS says nothing where it runs kernels of another class than our tier's.
static bool can_run(const Gate& g, const CpuIsa& isa, const std::string& core) {
    const bool wide = core == "SkylakeX" || core == "Cooperlake" || core == "SapphireRapids";
    if (g.needs == AVX2) {
        return strcmp(isa.name, "avx2") == 0 && core == "Haswell";
    }
    return g.needs == AMX || (is_avx512(isa) && (g.value == SHARE || wide));
}

// 0: no line has it.
static double geometric_mean(const std::vector<Line>& lines, const Gate& g, size_t rows) {
    double sum = 0, n = 0;
    for (const Line& l : lines) {
        for (int way : {FORWARD, BACKWARD}) {
            const double x = l.value[g.value][way];
            if (l.math == g.math && l.M == (g.rows > 0 ? g.rows : rows) && x > 0 &&
                (way == FORWARD ? g.forward : g.backward)) {
                sum += std::log(x);
                n++;
            }
        }
    }
    return n > 0 ? std::exp(sum / n) : 0;
}

// Returns how many are under their floor.
static int print_gates(const std::vector<Line>& lines, const CpuIsa& isa, const std::string& core, size_t rows) {
    int under = 0;
    printf("\n");
    for (const Gate& g : gates) {
        const double x = can_run(g, isa, core) ? geometric_mean(lines, g, rows) : 0;
        if (x > 0) {
            printf("- %-20s %.2f (floor %.2f, target %.2f) %s\n", g.name, x, g.floor, g.target,
                   x >= g.target  ? "ok"
                   : x >= g.floor ? "under target"
                                  : "UNDER FLOOR");
            under += x < g.floor;
        } else {
            printf("- %-20s not run: needs %s\n", g.name, g.needs);
        }
    }
    for (const auto& bound : {std::make_pair("fp32", 1e-6), std::make_pair("int16", 1e-3)}) {
        double worst = 0;
        for (const Line& l : lines) {
            worst = l.math == bound.first ? std::max({worst, l.value[ERROR][0], l.value[ERROR][1]}) : worst;
        }
        if (worst > 0) {
            printf("- N1 error of %-8s %.1e (at most %.0e) %s\n", bound.first, worst, bound.second,
                   worst <= bound.second ? "ok" : "TOO GREAT");
            under += worst > bound.second;
        }
    }
    return under;
}

// ----------------------------------------------------------------------------
// the program

static bool parse(Settings& s, int argc, char** argv) {
    for (int i = 1; i < argc; i++) {
        const std::string name = argv[i];
        const char* value = ++i < argc ? argv[i] : "";
        if (name == "--rows") {
            s.rows = size_t(atol(value));
        } else if (name == "--threads") {
            s.threads = atoi(value);
        } else if (name == "--repetitions") {
            s.repetitions = atoi(value);
        } else if (name == "--blas") {
            s.blas = value;
        } else if (name == "--blas-core") {
            s.blas_core = value;
        } else if (name == "--dnn") {
            s.dnn = value;
        } else if (name != "--shape" || sscanf(value, "%dx%d", &s.OC, &s.C) != 2) {
            fprintf(stderr,
                    "error: %s %s is no option\nusage: %s [--rows n] [--threads n] [--repetitions n] "
                    "[--shape OCxC] [--blas FILE] [--blas-core NAME] [--dnn FILE]\n",
                    name.c_str(), value, argv[0]);
            return false;
        }
    }
    const bool whole_blocks = s.OC % 64 == 0 && s.C % 64 == 0;
    if (s.rows == 0 || s.repetitions < 1 || !whole_blocks) {
        fprintf(stderr, "error: rows and repetitions are above 0, OC and C multiples of 64\n");
        return false;
    }
    return true;
}

int main(int argc, char** argv) {
    wait_passively(argv);
    Settings s;
    if (!parse(s, argc, argv)) {
        return 2;
    }
    Cpu<float> dev;
    device_open(dev, s.threads);
    if (dev.isa == nullptr) {
        fprintf(stderr, "error: TRAIN_LLAMA_CPU names no tier of this processor\n");
        return 2;
    }
    if (s.blas_core.empty() && !is_avx512(*dev.isa)) {
        s.blas_core = "Haswell";
    }
    const Blas blas = blas_open(s.blas, s.blas_core, dev.threads);
    const Dnn dnn = dnn_open(s.dnn, dev.threads);
    printf("%s, %d threads, medians of %d turns\n\n- OpenBLAS: %s\n- oneDNN: %s\n\n", dev.isa->name, dev.threads,
           s.repetitions, blas.text.c_str(), dnn.text.c_str());
    struct Shape {
        int OC, C;
        size_t M;
    };
    std::vector<Shape> shapes;
    if (s.OC > 0) {
        shapes.push_back({s.OC, s.C, s.rows});
    } else {
        const int sizes[][2] = {{768, 768},   {2048, 768},  {768, 2048},  {2048, 2048},
                                {8192, 2048}, {2048, 8192}, {4096, 4096}, {14336, 4096}};
        for (const auto& size : sizes) {
            shapes.push_back({size[0], size[1], s.rows});
        }
        for (size_t M : {16, 64, 128}) {
            shapes.push_back({2048, 2048, M});
        }
    }
    std::vector<Line> lines;
    print_head();
    for (const Shape& shape : shapes) {
        for (const Line& line : measure(dev, blas, dnn, shape.OC, shape.C, shape.M, s.repetitions)) {
            if (!line.math.empty()) {
                print_line(line);
                lines.push_back(line);
            }
        }
    }
    const int under = s.OC > 0 ? 0 : print_gates(lines, *dev.isa, blas.core, s.rows);
    device_close(dev);
    return under > 0 ? 1 : 0;
}
