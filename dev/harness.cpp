// See harness.h. Everything here is the same for a GPU, for the stand-in and for the CPU: a device is an overload.
#include "dev/harness.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "dev/tests/gpu.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/peak.h"
#include "kernels/random.h"

constexpr size_t FENCE = 256;           // bytes on both sides of an array
constexpr unsigned char POISON = 0xff;  // a NaN in every floating-point type

size_t Shape::operator[](const char* letter) const {
    for (const auto& l : letters) {
        if (l.first == letter) {
            return l.second;
        }
    }
    fprintf(stderr, "error: the shape of this op has no letter %s\n", letter);
    exit(2);
}

Fill uniform(uint64_t seed, double low, double high) {
    return [=](size_t i) { return low + (high - low) * random_uniform(seed, STREAM_TOKENS, 0, i); };
}

static std::string text_of(const Shape& s) {
    std::string text;
    for (const auto& l : s.letters) {
        text += (text.empty() ? "" : " ") + l.first + "=" + std::to_string(l.second);
    }
    return text;
}

// ----------------------------------------------------------------------------
// devices, by overload

static RunCpu function_for(const Version& v, const Cpu<float>&) {
    return v.on_cpu;
}
static RunBf16 function_for(const Version& v, const Gpu<bf16>&) {
    return v.on_bf16;
}
static RunFloat function_for(const Version& v, const Gpu<float>&) {
    return v.on_float;
}
static RunCpu prepare_for(const Op& op, const Cpu<float>&) {
    return op.prepare_cpu;
}
static RunBf16 prepare_for(const Op& op, const Gpu<bf16>&) {
    return op.prepare_bf16;
}
static RunFloat prepare_for(const Op& op, const Gpu<float>&) {
    return op.prepare_float;
}
static void synchronise(Cpu<float>&) {}
template <class X>
static void synchronise(Gpu<X>& dev) {
    device_sync(dev);
}
static bool is_bf16(const Gpu<bf16>&) {
    return true;
}
template <class Dev>
static bool is_bf16(const Dev&) {
    return false;
}

// ----------------------------------------------------------------------------
// arrays: their bytes on the host, fences included

static size_t size_of(Kind kind, bool bf16_store) {
    return kind == Kind::U8 ? 1 : kind == Kind::STORE && bf16_store ? 2 : 4;
}

static bool in_gap(const Array& a, size_t i) {
    return a.stride > 0 && i % a.stride >= a.width;
}

static double element(const Array& a, bool bf16_store, const unsigned char* p) {
    float f;
    int32_t n;
    bf16 h;
    switch (a.kind) {
        case Kind::U8: return *p;
        case Kind::I32: memcpy(&n, p, 4); return n;
        default: break;
    }
    if (size_of(a.kind, bf16_store) == 2) {
        memcpy(&h, p, 2);
        return double(to_float(h));
    }
    memcpy(&f, p, 4);
    return double(f);
}

static void set_element(const Array& a, bool bf16_store, unsigned char* p, double x) {
    if (a.kind == Kind::U8) {
        *p = uint8_t(x);
    } else if (a.kind == Kind::I32) {
        int32_t n = int32_t(x);
        memcpy(p, &n, 4);
    } else if (size_of(a.kind, bf16_store) == 2) {
        bf16 h = to_bf16(float(x));
        memcpy(p, &h, 2);
    } else {
        float f = float(x);
        memcpy(p, &f, 4);
    }
}

using Bytes = std::vector<unsigned char>;

static Bytes image_of(const Array& a, bool bf16_store, int threads) {
    const size_t size = size_of(a.kind, bf16_store);
    Bytes image(2 * FENCE + a.n * size, POISON);
    if (a.fill) {
        parallel_ranges(threads, a.n, 4096, [&](size_t begin, size_t end, int) {
            for (size_t i = begin; i < end; i++) {
                if (!in_gap(a, i)) {
                    set_element(a, bf16_store, &image[FENCE + i * size], a.fill(i));
                }
            }
        });
    }
    return image;
}

static std::vector<double> numbers_of(const Array& a, bool bf16_store, const Bytes& image) {
    const size_t size = size_of(a.kind, bf16_store);
    std::vector<double> x(a.n);
    for (size_t i = 0; i < a.n; i++) {
        x[i] = element(a, bf16_store, &image[FENCE + i * size]);
    }
    return x;
}

static bool is_output(const Array& a) {
    return a.role == Role::OUT || a.role == Role::INOUT;
}

// One shape's arrays on a device.
template <class Dev>
struct Placed {
    Dev& dev;
    std::vector<Array> arrays;
    std::vector<Bytes> images;  // as they are before a run
    std::vector<char*> memory;
    Run run;

    Placed(Dev& d, const Op& op, const Shape& shape, int threads) : dev(d), arrays(op.arrays(shape)), run{shape, {}} {
        for (const Array& a : arrays) {
            images.push_back(image_of(a, is_bf16(dev), threads));
            memory.push_back(static_cast<char*>(device_alloc(dev, images.back().size(), a.name)));
            run.memory.push_back(memory.back() + FENCE);
        }
    }
    ~Placed() {
        for (char* p : memory) {
            device_free(dev, p);
        }
    }
    Placed(const Placed&) = delete;
};

template <class Dev>
static void write_back(Placed<Dev>& p, bool inputs_too) {
    for (size_t i = 0; i < p.arrays.size(); i++) {
        if (inputs_too || p.arrays[i].role != Role::IN) {
            device_to(p.dev, p.memory[i], p.images[i].data(), p.images[i].size());
        }
    }
}

template <class Dev>
static Bytes read_back(Placed<Dev>& p, size_t i) {
    Bytes bytes(p.images[i].size());
    device_from(p.dev, bytes.data(), p.memory[i], bytes.size());
    return bytes;
}

// ----------------------------------------------------------------------------
// checks

struct Checked {
    double ratio = 0;     // error over bound, the greatest of all arrays and shapes
    std::string problem;  // "" or what failed first
    int shapes = 0;
};

static void note(Checked& c, const std::string& problem) {
    if (c.problem.empty()) {
        c.problem = problem;
    }
}

// Fences and gaps of what a run left, and inputs that it must not change.
static void check_bytes(Checked& c, const Array& a, bool bf16_store, const Bytes& before, const Bytes& after) {
    const size_t size = size_of(a.kind, bf16_store), end = FENCE + a.n * size;
    const auto poisoned = [&](size_t begin, size_t n) {
        return std::all_of(&after[begin], &after[begin] + n, [](unsigned char b) { return b == POISON; });
    };
    if (!poisoned(0, FENCE) || !poisoned(end, FENCE)) {
        note(c, std::string(a.name) + ": written outside");
    }
    for (size_t i = 0; a.stride > 0 && i < a.n; i++) {
        if (in_gap(a, i) && !poisoned(FENCE + i * size, size)) {
            note(c, std::string(a.name) + ": written between the rows");
            break;
        }
    }
    if (a.role == Role::IN && before != after) {
        note(c, std::string(a.name) + ": an input was changed");
    }
}

// Error over bound: twice the error of the plain evaluation, root mean square and greatest, and no less than one unit in
// the last place at the greatest value (for the root mean square a hundredth of it). Whole numbers must be equal.
static double error_ratio(const Array& a, bool bf16_store, const std::vector<double>& all_got,
                          const std::vector<double>& all_plain, const std::vector<double>& all_exact) {
    std::vector<double> got, plain, exact;
    for (size_t i = 0; i < a.n; i++) {
        if (!in_gap(a, i)) {
            got.push_back(all_got[i]), plain.push_back(all_plain[i]), exact.push_back(all_exact[i]);
        }
    }
    const double infinity = std::numeric_limits<double>::infinity();
    if (a.kind == Kind::U8 || a.kind == Kind::I32) {
        return got == exact ? 0 : infinity;
    }
    const double unit = size_of(a.kind, bf16_store) == 2 ? 0x1p-8 : 0x1p-24;
    const double floor = unit * greatest(exact.data(), exact.size());
    const double rms = std::max(2 * rms_error(plain, exact), floor / 100);
    const double worst = std::max(2 * greatest_error(plain.data(), exact.data(), exact.size()), floor);
    const auto over = [&](double error, double bound) {
        return error == 0 ? 0 : error <= infinity && bound > 0 ? error / bound : infinity;  // NaN: infinity
    };
    return std::max(over(rms_error(got, exact), rms),
                    over(greatest_error(got.data(), exact.data(), exact.size()), worst));
}

struct Expected {
    Values exact, plain;
};

static Expected expected_values(const Op& op, const Shape& shape, const std::vector<Array>& arrays,
                                const std::vector<Bytes>& images, bool bf16_store) {
    Expected e;
    for (size_t i = 0; i < arrays.size(); i++) {
        e.exact.push_back(numbers_of(arrays[i], bf16_store, images[i]));
    }
    e.plain = e.exact;
    op.evaluate(shape, e.exact, {true, bf16_store});
    op.evaluate(shape, e.plain, {false, bf16_store});
    return e;
}

// All shapes of `shapes` that the version takes: poison, run, compare; once more, same bits.
template <class Dev>
static Checked check_version(Dev& dev, const Op& op, const Version& v, const std::vector<Shape>& shapes, int threads) {
    Checked c;
    const bool half = is_bf16(dev);
    for (const Shape& shape : shapes) {
        if (v.fits != nullptr && !v.fits(shape)) {
            continue;
        }
        c.shapes++;
        Placed<Dev> p(dev, op, shape, threads);
        const Expected e = expected_values(op, shape, p.arrays, p.images, half);
        std::vector<Bytes> first;
        for (int time = 0; time < 2; time++) {
            write_back(p, true);
            if (prepare_for(op, dev) != nullptr) {
                prepare_for(op, dev)(dev, p.run);
            }
            function_for(v, dev)(dev, p.run);
            synchronise(dev);
            for (size_t i = 0; i < p.arrays.size(); i++) {
                const Array& a = p.arrays[i];
                const Bytes after = read_back(p, i);
                check_bytes(c, a, half, p.images[i], after);
                if (is_output(a) && time == 0) {
                    const double ratio = error_ratio(a, half, numbers_of(a, half, after), e.plain[i], e.exact[i]);
                    if (!(ratio <= 1)) {
                        char text[80];
                        snprintf(text, sizeof text, ": error is %.3g times the bound at ", ratio);
                        note(c, a.name + (text + text_of(shape)));
                    }
                    c.ratio = std::max(c.ratio, ratio);
                } else if (is_output(a) && after != first[i]) {
                    note(c, std::string(a.name) + ": two runs differ at " + text_of(shape));
                }
                if (time == 0) {
                    first.push_back(after);
                }
            }
        }
    }
    return c;
}

// ----------------------------------------------------------------------------
// times

struct Ceiling {
    std::string device;
    double bytes = 0, flops = 0;  // a second
    size_t cache = 0;             // bytes of the last level
};

struct Timing {
    double median = 0, p10 = 0, p90 = 0;  // seconds
};

static Timing timing_of(std::vector<double> t) {
    std::sort(t.begin(), t.end());
    const auto at = [&](double q) { return t[size_t(q * double(t.size() - 1) + 0.5)]; };
    return {at(0.5), at(0.1), at(0.9)};
}

// The cache is overwritten before every repetition, and what the op changes is put back. At least 5 repetitions, at most
// 50, about a second. The whole outputs are looked at afterwards: nothing unwritten, nothing outside.
template <class Dev>
static Timing time_version(Dev& dev, const Op& op, const Version& v, Placed<Dev>& p, size_t cache, Checked& c) {
    const size_t flush_bytes = 2 * cache + (size_t(32) << 20);
    void* flush = device_alloc(dev, flush_bytes, "clearing the cache");
    write_back(p, false);
    if (prepare_for(op, dev) != nullptr) {
        prepare_for(op, dev)(dev, p.run);
    }
    std::vector<double> times;
    double spent = 0;
    for (int i = 0; i <= 5 || (i <= 50 && spent < 1); i++) {
        if (i > 0) {
            for (size_t k = 0; k < p.arrays.size(); k++) {
                if (p.arrays[k].role == Role::INOUT) {
                    device_to(dev, p.memory[k], p.images[k].data(), p.images[k].size());
                }
            }
        }
        double seconds = 0;
        device_zero(dev, flush, flush_bytes);
        device_clock_start(dev, &seconds);
        function_for(v, dev)(dev, p.run);
        device_clock_stop(dev);
        synchronise(dev);
        if (i > 0) {  // the first warms up
            times.push_back(seconds);
            spent += seconds;
        }
    }
    device_free(dev, flush);
    for (size_t i = 0; i < p.arrays.size(); i++) {
        const Array& a = p.arrays[i];
        const Bytes after = read_back(p, i);
        check_bytes(c, a, is_bf16(dev), p.images[i], after);
        for (size_t k = 0; is_output(a) && k < a.n; k++) {
            const double x = element(a, is_bf16(dev), &after[FENCE + k * size_of(a.kind, is_bf16(dev))]);
            if (!in_gap(a, k) && !std::isfinite(x)) {
                note(c, std::string(a.name) + ": not finite, or not written, at " + std::to_string(k));
                break;
            }
        }
    }
    return timing_of(times);
}

static Ceiling cpu_ceiling(Cpu<float>& dev) {
    Ceiling c;
    c.device = "CPU";
    if (FILE* f = fopen("/proc/cpuinfo", "r")) {
        char line[256];
        while (c.device == "CPU" && fgets(line, sizeof line, f) != nullptr) {
            if (strncmp(line, "model name", 10) == 0 && strchr(line, ':') != nullptr) {
                c.device = std::string(strchr(line, ':') + 2);
                c.device.pop_back();
            }
        }
        fclose(f);
    }
    c.device += ", " + std::to_string(dev.threads) + " threads, " + dev.isa->name;
    c.cache = size_t(32) << 20;
    c.flops = 1e9 * cpu_peak_gflops(dev);
    const size_t n = size_t(128) << 20;
    std::vector<char> from(n, 1), to(n, 2);
    for (int i = 0; i < 5; i++) {
        double seconds = 0;
        device_clock_start(dev, &seconds);
        parallel_ranges(dev.threads, n, 4096, [&](size_t begin, size_t end, int) {
            memcpy(&to[begin], &from[begin], end - begin);
        });
        device_clock_stop(dev);
        c.bytes = std::max(c.bytes, 2 * double(n) / seconds);
    }
    return c;
}

template <class X>
static Ceiling gpu_ceiling(Gpu<X>& dev) {
    Ceiling c;
    c.device = dev.info.name;
    c.cache = dev.info.l2_bytes;
    c.bytes = harness_copy_ceiling(dev);
    c.flops = harness_matmul_ceiling(dev);
    return c;
}

// ----------------------------------------------------------------------------
// the program

struct Settings {
    std::vector<std::string> versions;  // none: all
    Shape shape{};                      // the first of the op's, letters of the command line put in
    bool own_shape = false;
    bool bf16_store = true, check = true, bench = true, csv = false;
    int threads = 0;
};

static int usage(const Op& op, const std::string& why) {
    fprintf(stderr, "error: %s\n", why.c_str());
    fprintf(stderr, "hint: %s [VERSION...|all]", op.name);
    for (const auto& l : op.shapes[0].letters) {
        fprintf(stderr, " [-%s %zu]", l.first.c_str(), l.second);
    }
    fprintf(stderr, " [--type bf16|float] [--check|--bench] [--csv] [--threads n]\n      versions:");
    for (const Version& v : op.versions) {
        fprintf(stderr, " %s", v.number.c_str());
    }
    fprintf(stderr, "\n");
    return 2;
}

static bool whole_number(const char* text, size_t* n) {
    char* end = nullptr;
    const unsigned long long x = strtoull(text, &end, 10);
    *n = size_t(x);
    return *text >= '0' && *text <= '9' && *end == 0 && x > 0;
}

// "" or what is wrong.
static std::string parse(Settings& s, const Op& op, int argc, char** argv) {
    s.shape = op.shapes[0];
    for (int i = 1; i < argc; i++) {
        const std::string arg = argv[i];
        const char* value = i + 1 < argc ? argv[i + 1] : "";
        size_t n = 0;
        const auto letter = std::find_if(s.shape.letters.begin(), s.shape.letters.end(),
                                         [&](const auto& l) { return arg == "-" + l.first; });
        if (letter != s.shape.letters.end() || arg == "--threads") {
            if (!whole_number(value, &n)) {
                return arg + " needs a whole number above 0";
            }
            if (arg == "--threads") {
                s.threads = int(n);
            } else {
                letter->second = n;
                s.own_shape = true;
            }
            i++;
        } else if (arg == "--type") {
            s.bf16_store = strcmp(value, "bf16") == 0;
            if (!s.bf16_store && strcmp(value, "float") != 0) {
                return "--type is bf16 or float";
            }
            i++;
        } else if (arg == "--check") {
            s.bench = false;
        } else if (arg == "--bench") {
            s.check = false;
        } else if (arg == "--csv") {
            s.csv = true;
        } else if (std::any_of(op.versions.begin(), op.versions.end(),
                               [&](const Version& v) { return v.number == arg; })) {
            s.versions.push_back(arg);
        } else if (arg != "all") {
            return "unknown: " + arg;
        }
    }
    return s.check || s.bench ? "" : "--check and --bench exclude each other";
}

// Appends a line to dev/results/<device>.csv.
static void append_csv(const Op& op, const Version& v, const std::string& shape, const char* type, const Ceiling& c,
                       const Timing& t, const Cost& cost, double ratio) {
    std::string name;
    for (char ch : c.device) {
        const bool good = isalnum(static_cast<unsigned char>(ch)) != 0;
        if (good || (!name.empty() && name.back() != '-')) {
            name += good ? char(tolower(ch)) : '-';
        }
    }
    const std::string path = source_path("dev/results/" + name + ".csv");
    FILE* f = fopen(path.c_str(), "a");
    if (f == nullptr) {
        perror(path.c_str());
        exit(1);
    }
    if (ftell(f) == 0) {
        fprintf(f, "op,version,type,shape,us,us_p10,us_p90,gb_per_s,tflop_per_s,copy_gb_per_s,matmul_tflop_per_s,"
                   "err_over_bound,idea\n");
    }
    fprintf(f, "%s,%s%s,%s,%s,%.2f,%.2f,%.2f,%.1f,%.3f,%.1f,%.2f,%.3f,\"%s\"\n", op.name, v.number.c_str(),
            v.production ? "*" : "", type, shape.c_str(), 1e6 * t.median, 1e6 * t.p10, 1e6 * t.p90,
            1e-9 * cost.bytes / t.median, 1e-12 * cost.flops / t.median, 1e-9 * c.bytes, 1e-12 * c.flops, ratio,
            v.idea);
    fclose(f);
}

static void print_row(const Version& v, const Checked& c, bool checked, const Timing* t, const Cost& cost,
                      const Ceiling& ceiling) {
    char ratio[32] = "      -";
    if (checked && c.shapes > 0) {
        snprintf(ratio, sizeof ratio, "%7.2f", c.ratio);
    }
    printf(" %s%5s  %-44s %s %-6s", v.production ? "*" : " ", v.number.c_str(), v.idea, ratio,
           !c.problem.empty() ? "FAILED" : checked && c.shapes > 0 ? "ok" : "");
    if (t != nullptr) {
        const double bytes = cost.bytes / t->median / ceiling.bytes, flops = cost.flops / t->median / ceiling.flops;
        printf(" %10.1f (%.1f - %.1f)  %8.1f %8.2f   %3.0f %% of %s", 1e6 * t->median, 1e6 * t->p10, 1e6 * t->p90,
               1e-9 * cost.bytes / t->median, 1e-12 * cost.flops / t->median, 100 * std::max(bytes, flops),
               bytes > flops ? "copy" : "matmul");
    }
    printf("\n");
    if (!c.problem.empty()) {
        printf("         %s\n", c.problem.c_str());
    }
    fflush(stdout);
}

// Checks the op's versions for this device, then times them. Returns how many failed.
template <class Dev>
static int run_versions(Dev& dev, const Op& op, const Settings& s, const Cpu<float>& host, bool timed,
                        Ceiling (*measure)(Dev&)) {
    std::vector<const Version*> versions;
    for (const Version& v : op.versions) {
        const auto named = std::find(s.versions.begin(), s.versions.end(), v.number);
        if ((s.versions.empty() || named != s.versions.end()) && function_for(v, dev) != nullptr) {
            versions.push_back(&v);
        }
    }
    if (versions.empty()) {
        return 0;
    }
    std::vector<Shape> checked_shapes = op.awkward;
    if (s.own_shape && !s.bench) {
        checked_shapes = {s.shape};
    }
    const char* type = is_bf16(dev) ? "bf16" : "float";
    const bool times = timed && s.bench;
    if (!times) {
        printf("version  %-44s err/bound in %s\n", "idea", type);
    }
    std::vector<Checked> checked;
    int failed = 0;
    for (const Version* v : versions) {
        checked.push_back(s.check ? check_version(dev, op, *v, checked_shapes, host.threads) : Checked());
        failed += !checked.back().problem.empty();
        if (!times) {
            print_row(*v, checked.back(), s.check, nullptr, {}, {});
        }
    }
    if (!times) {
        return failed;
    }
    const Ceiling ceiling = measure(dev);
    printf("%s: copy %.1f GB/s, matmul %.2f TFLOP/s\n", ceiling.device.c_str(), 1e-9 * ceiling.bytes,
           1e-12 * ceiling.flops);
    for (const Shape& shape : s.own_shape ? std::vector<Shape>{s.shape} : op.shapes) {
        printf("%s %s\n", text_of(shape).c_str(), type);
        printf("version  %-44s err/bound           us (p10 - p90)      GB/s  TFLOP/s\n", "idea");
        Placed<Dev> p(dev, op, shape, host.threads);
        write_back(p, true);
        const Cost cost = op.cost(shape, is_bf16(dev) ? 2 : 4);
        for (size_t i = 0; i < versions.size(); i++) {
            const Version& v = *versions[i];
            if (v.fits != nullptr && !v.fits(shape)) {
                printf("   %5s  %-44s not for this shape\n", v.number.c_str(), v.idea);
                continue;
            }
            if (!checked[i].problem.empty()) {
                print_row(v, checked[i], s.check, nullptr, {}, {});  // what is wrong needs no time
                continue;
            }
            const Timing t = time_version(dev, op, v, p, ceiling.cache, checked[i]);
            failed += !checked[i].problem.empty();
            print_row(v, checked[i], s.check, &t, cost, ceiling);
            if (s.csv && checked[i].problem.empty()) {
                append_csv(op, v, text_of(shape), type, ceiling, t, cost, checked[i].ratio);
            }
        }
    }
    return failed;
}

template <class X>
static int run_gpu(const Op& op, const Settings& s, const Cpu<float>& host) {
    Gpu<X> dev;
    const std::string why = device_open(dev, host.threads);
    if (!why.empty()) {
        printf("no GPU versions: %s\n", why.c_str());
        return 0;
    }
    if (harness_has_gpu()) {
        device_timing(dev, true);
    } else {
        printf("%s: no GPU here, so no times of GPU versions\n", dev.info.name);
    }
    const int failed = run_versions<Gpu<X>>(dev, op, s, host, harness_has_gpu(), gpu_ceiling<X>);
    device_close(dev);
    return failed;
}

int harness(const Op& op, int argc, char** argv) {
    wait_passively(argv);
    Settings s;
    const std::string wrong = parse(s, op, argc, argv);
    if (!wrong.empty()) {
        return usage(op, wrong);
    }
    Cpu<float> host;
    device_open(host, s.threads);
    if (host.isa == nullptr) {
        fprintf(stderr, "error: TRAIN_LLAMA_CPU names no tier of this processor\n");
        return 2;
    }
    printf("%s: %s\n", op.name, op.what);
    for (const Shape& shape : op.awkward) {
        printf("%s%s", &shape == &op.awkward[0] ? "checked at " : "; ", text_of(shape).c_str());
    }
    printf("\n");
    int failed = s.bf16_store ? run_gpu<bf16>(op, s, host) : run_gpu<float>(op, s, host);
    failed += run_versions<Cpu<float>>(host, op, s, host, true, cpu_ceiling);
    device_close(host);
    if (failed > 0) {
        printf("%d failed\n", failed);
    }
    return failed > 0 ? 1 : 0;
}
