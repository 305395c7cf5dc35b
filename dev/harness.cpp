// See harness.h. Everything here is the same for a GPU, for the stand-in and for the CPU: a device is an overload.
#include "dev/harness.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include <unistd.h>

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
// The arithmetic that the version wants of frozen products. False: the tier has it not.
static bool set_math(Cpu<float>& dev, const Version& v) {
    return device_math(dev, v.math != nullptr ? v.math : "fp32");
}
template <class X>
static bool set_math(Gpu<X>&, const Version&) {
    return true;
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
    return kind == Kind::U8 ? 1 : kind == Kind::BF16 || (kind == Kind::STORE && bf16_store) ? 2 : 4;
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

// Error over bound: twice the error of the plain evaluation, root mean square and greatest, and no less than one unit
// in the last place at the greatest value (for the root mean square a hundredth of it). Whole numbers must be equal.
static double error_ratio(const Array& a, bool coarse, const std::vector<double>& all_got,
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
    const double unit = size_of(a.kind, coarse) == 2 ? 0x1p-8 : 0x1p-24;
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
                                const std::vector<Bytes>& images, bool bf16_store, bool coarse) {
    Expected e;
    for (size_t i = 0; i < arrays.size(); i++) {
        e.exact.push_back(numbers_of(arrays[i], bf16_store, images[i]));
    }
    e.plain = e.exact;
    op.evaluate(shape, e.exact, {true, bf16_store});
    op.evaluate(shape, e.plain, {false, coarse});
    return e;
}

// All shapes of `shapes` that the version takes: poison, run, compare; once more, same bits.
template <class Dev>
static Checked check_version(Dev& dev, const Op& op, const Version& v, const std::vector<Shape>& shapes, int threads) {
    Checked c;
    // An arithmetic below fp32 may err as one that stores bf16 does.
    const bool half = is_bf16(dev), coarse = half || (v.math != nullptr && strcmp(v.math, "fp32") != 0);
    for (const Shape& shape : shapes) {
        if (v.fits != nullptr && !v.fits(shape)) {
            continue;
        }
        c.shapes++;
        Placed<Dev> p(dev, op, shape, threads);
        const Expected e = expected_values(op, shape, p.arrays, p.images, half, coarse);
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
                    const double ratio = error_ratio(a, coarse, numbers_of(a, half, after), e.plain[i], e.exact[i]);
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
    double bytes = 0, flops = 0;  // a second
    const char *of_bytes = "copy", *of_flops = "matmul";
};

struct Timing {
    double median = 0, p10 = 0, p90 = 0;  // seconds
};

static Timing timing_of(std::vector<double> t) {
    std::sort(t.begin(), t.end());
    const auto at = [&](double q) { return t[size_t(q * double(t.size() - 1) + 0.5)]; };
    return {at(0.5), at(0.1), at(0.9)};
}

// Memory that is overwritten so that nothing else is in the cache.
template <class Dev>
struct Flush {
    Dev& dev;
    size_t bytes;
    void* memory;
    Flush(Dev& d, size_t cache) : dev(d), bytes(cache > 0 ? 2 * cache + (size_t(32) << 20) : 0) {
        memory = bytes > 0 ? device_alloc(dev, bytes, "clearing the cache") : nullptr;
    }
    ~Flush() { device_free(dev, memory); }
    Flush(const Flush&) = delete;
};

template <class X>
static void clear_cache(Gpu<X>& dev, Flush<Gpu<X>>& flush) {
    if (flush.bytes > 0) {
        device_zero(dev, flush.memory, flush.bytes);
    }
}
// Not by memset, which may go past the cache.
static void clear_cache(Cpu<float>& dev, Flush<Cpu<float>>& flush) {
    parallel_ranges(dev.threads, flush.bytes, 4096, [&](size_t begin, size_t end, int) {
        volatile unsigned char* p = static_cast<unsigned char*>(flush.memory);
        for (size_t i = begin; i < end; i += 64) {
            p[i] = 1;
        }
    });
}

// The cache is overwritten before every repetition (cache 0: it is not), and what the op changes is put back. At least
// 5 repetitions, at most 50, about a second. The whole outputs are looked at afterwards: nothing unwritten, nothing
// outside.
template <class Dev>
static Timing time_version(Dev& dev, const Op& op, const Version& v, Placed<Dev>& p, size_t cache, Checked& c) {
    Flush<Dev> flush(dev, cache);
    write_back(p, false);
    if (prepare_for(op, dev) != nullptr) {
        prepare_for(op, dev)(dev, p.run);
    }
    std::vector<double> times;
    double spent = 0;
    for (int i = 0; i <= 5 || (i <= 50 && spent < 1); i++) {
        if (i > 0) {
            for (size_t k = 0; k < p.arrays.size(); k++) {
                if (p.arrays[k].role == Role::INOUT || p.arrays[k].role == Role::USED_UP) {
                    device_to(dev, p.memory[k], p.images[k].data(), p.images[k].size());
                }
            }
        }
        double seconds = 0;
        clear_cache(dev, flush);
        device_clock_start(dev, &seconds);
        function_for(v, dev)(dev, p.run);
        device_clock_stop(dev);
        synchronise(dev);
        if (i > 0) {  // the first warms up
            times.push_back(seconds);
            spent += seconds;
        }
    }
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

static std::string name_of(Cpu<float>& dev) {
    std::string name = "CPU";
    if (FILE* f = fopen("/proc/cpuinfo", "r")) {
        char line[256];
        while (name == "CPU" && fgets(line, sizeof line, f) != nullptr) {
            if (strncmp(line, "model name", 10) == 0 && strchr(line, ':') != nullptr) {
                name = std::string(strchr(line, ':') + 2);
                name.pop_back();
            }
        }
        fclose(f);
    }
    return name + ", " + std::to_string(dev.threads) + " threads, " + dev.isa->name;
}
template <class X>
static std::string name_of(Gpu<X>& dev) {
    return dev.info.name;
}

static size_t cache_of(const Cpu<float>&) {
    const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return bytes > 0 ? size_t(bytes) : size_t(32) << 20;
}
template <class X>
static size_t cache_of(const Gpu<X>& dev) {
    return dev.info.l2_bytes;
}

// Bytes a second of walks over as much memory as the op works on, the cache treated as before a version, and the peak
// of the arithmetic that is set: for each version anew, since other work on the machine disturbs both alike.
static void update_ceiling(Cpu<float>& dev, Ceiling& c, const Cost& cost, size_t cache) {
    c.of_bytes = cost.reads_only ? "read" : "copy";
    c.of_flops = dev.base->name;
    c.flops = 1e9 * peak_gflops(*dev.base, dev.threads);
    const size_t most = size_t(1) << 28, least = 1 << 16, n = std::min(std::max(size_t(cost.bytes) / 2, least), most);
    Flush<Cpu<float>> flush(dev, cache);
    std::vector<char> from(n, 1), to(n, 2);
    std::vector<double> times;
    std::atomic<uint64_t> sink{0};
    for (int i = 0; i < 7; i++) {
        double seconds = 0;
        clear_cache(dev, flush);
        device_clock_start(dev, &seconds);
        parallel_ranges(dev.threads, n, 4096, [&](size_t begin, size_t end, int) {
            if (!cost.reads_only) {
                memcpy(&to[begin], &from[begin], end - begin);
                return;
            }
            uint64_t sum = 0;
            for (const std::vector<char>* half : {&from, &to}) {
                for (size_t at = begin; at + 8 <= end; at += 8) {
                    uint64_t word;
                    memcpy(&word, half->data() + at, 8);
                    sum += word;
                }
            }
            sink += sum;
        });
        device_clock_stop(dev);
        times.push_back(seconds);
    }
    c.bytes = 2 * double(n) / *std::min_element(times.begin(), times.end());
}

template <class X>
static void update_ceiling(Gpu<X>& dev, Ceiling& c, const Cost&, size_t) {
    if (c.bytes == 0) {
        c.bytes = harness_copy_ceiling(dev);
        c.flops = harness_matmul_ceiling(dev);
    }
}

// ----------------------------------------------------------------------------
// the program

struct Settings {
    std::vector<std::string> versions;  // none: all
    Shape shape{};                      // the first of the op's, letters of the command line put in
    bool own_shape = false;
    bool bf16_store = true, check = true, bench = true, csv = false, warm = false;
    int threads = 0;
};

// What letters on the command line change.
static const Shape& first_shape(const Op& op) {
    return harness_has_gpu() || op.cpu_shapes.empty() ? op.shapes[0] : op.cpu_shapes[0];
}

static int usage(const Op& op, const std::string& why) {
    fprintf(stderr, "error: %s\n", why.c_str());
    fprintf(stderr, "hint: %s [VERSION...|all]", op.name);
    for (const auto& l : first_shape(op).letters) {
        fprintf(stderr, " [-%s %zu]", l.first.c_str(), l.second);
    }
    fprintf(stderr, " [--type bf16|float] [--check|--bench] [--warm] [--csv] [--threads n]\n      versions:");
    for (const Version& v : op.versions) {
        fprintf(stderr, " %s", v.number.c_str());
    }
    fprintf(stderr, "\n");
    return 2;
}

// Some letters are numbers of something that may be missing, or say yes and no.
static bool may_be_zero(const Op& op, const std::string& letter) {
    return std::any_of(op.awkward.begin(), op.awkward.end(), [&](const Shape& s) { return s[letter.c_str()] == 0; });
}

static bool whole_number(const char* text, size_t* n) {
    char* end = nullptr;
    const unsigned long long x = strtoull(text, &end, 10);
    *n = size_t(x);
    return *text >= '0' && *text <= '9' && *end == 0;
}

// "" or what is wrong.
static std::string parse(Settings& s, const Op& op, int argc, char** argv) {
    s.shape = first_shape(op);
    for (int i = 1; i < argc; i++) {
        const std::string arg = argv[i];
        const char* value = i + 1 < argc ? argv[i + 1] : "";
        size_t n = 0;
        const auto letter = std::find_if(s.shape.letters.begin(), s.shape.letters.end(),
                                         [&](const auto& l) { return arg == "-" + l.first; });
        if (letter != s.shape.letters.end() || arg == "--threads") {
            const bool zero = letter != s.shape.letters.end() && may_be_zero(op, letter->first);
            if (!whole_number(value, &n) || (n == 0 && !zero)) {
                return arg + " needs a whole number" + (zero ? "" : " above 0");
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
        } else if (arg == "--warm") {
            s.warm = true;
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

struct Share {
    double part;  // of the ceiling that the op is nearest to
    const char* of;
};

static Share share_of(const Ceiling& c, const Timing& t, const Cost& cost) {
    const double bytes = cost.bytes / t.median / c.bytes, flops = cost.flops / t.median / c.flops;
    return bytes > flops ? Share{bytes, c.of_bytes} : Share{flops, c.of_flops};
}

// Appends a line to dev/results/<device>.csv.
static void append_csv(const Op& op, const Version& v, const std::string& device, const std::string& shape,
                       const char* type, const Ceiling& c, const Timing& t, const Cost& cost, double ratio) {
    std::string name;
    for (char ch : device) {
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
        fprintf(f,
                "op,version,type,shape,us,us_p10,us_p90,gb_per_s,tflop_per_s,ceiling_gb_per_s,ceiling_tflop_per_s,"
                "share,of,err_over_bound,idea\n");
    }
    const Share share = share_of(c, t, cost);
    fprintf(f, "%s,%s%s,%s,%s,%.2f,%.2f,%.2f,%.1f,%.3f,%.1f,%.2f,%.3f,%s,%.3f,\"%s\"\n", op.name, v.number.c_str(),
            v.production ? "*" : "", type, shape.c_str(), 1e6 * t.median, 1e6 * t.p10, 1e6 * t.p90,
            1e-9 * cost.bytes / t.median, 1e-12 * cost.flops / t.median, 1e-9 * c.bytes, 1e-12 * c.flops, share.part,
            share.of, ratio, v.idea);
    fclose(f);
}

static void print_row(const Version& v, const Checked& c, bool checked, const Timing* t, const Cost& cost,
                      const Ceiling& ceiling) {
    char ratio[32] = "      -";
    if (checked && c.shapes > 0) {
        snprintf(ratio, sizeof ratio, "%7.2f", c.ratio);
    }
    printf(" %s%5s  %-44s %s %-6s", v.production ? "*" : " ", v.number.c_str(), v.idea, ratio,
           !c.problem.empty()        ? "FAILED"
           : checked && c.shapes > 0 ? "ok"
                                     : "");
    if (t != nullptr) {
        const Share share = share_of(ceiling, *t, cost);
        printf(" %10.1f (%.1f - %.1f)  %8.1f %8.3f   %3.0f %% of %s", 1e6 * t->median, 1e6 * t->p10, 1e6 * t->p90,
               1e-9 * cost.bytes / t->median, 1e-12 * cost.flops / t->median, 100 * share.part, share.of);
    }
    printf("\n");
    if (!c.problem.empty()) {
        printf("         %s\n", c.problem.c_str());
    }
    fflush(stdout);
}

static const std::vector<Shape>& shapes_for(const Op& op, const Cpu<float>&) {
    return op.cpu_shapes.empty() ? op.shapes : op.cpu_shapes;
}
template <class X>
static const std::vector<Shape>& shapes_for(const Op& op, const Gpu<X>&) {
    return op.shapes;
}

// Times the versions at one shape. Returns how many failed that had passed before.
template <class Dev>
static int time_shape(Dev& dev, const Op& op, const Settings& s, const Shape& shape, int threads,
                      const std::vector<const Version*>& versions, std::vector<Checked>& checked, Ceiling& ceiling) {
    const char* type = is_bf16(dev) ? "bf16" : "float";
    const size_t cache = s.warm ? 0 : cache_of(dev);
    printf("%s %s%s\n", text_of(shape).c_str(), type, s.warm ? ", warm" : "");
    printf("version  %-44s err/bound           us (p10 - p90)      GB/s  TFLOP/s\n", "idea");
    Placed<Dev> p(dev, op, shape, threads);
    write_back(p, true);
    const Cost cost = op.cost(shape, is_bf16(dev) ? 2 : 4);
    int failed = 0;
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
        set_math(dev, v);
        update_ceiling(dev, ceiling, cost, cache);
        const Timing t = time_version(dev, op, v, p, cache, checked[i]);
        failed += !checked[i].problem.empty();
        print_row(v, checked[i], s.check, &t, cost, ceiling);
        if (s.csv && checked[i].problem.empty()) {
            append_csv(op, v, name_of(dev), text_of(shape), type, ceiling, t, cost, checked[i].ratio);
        }
    }
    return failed;
}

// Checks the op's versions for this device, then times them. Returns how many failed.
template <class Dev>
static int run_versions(Dev& dev, const Op& op, const Settings& s, const Cpu<float>& host, bool timed) {
    std::vector<const Version*> versions;
    for (const Version& v : op.versions) {
        const auto named = std::find(s.versions.begin(), s.versions.end(), v.number);
        if ((!s.versions.empty() && named == s.versions.end()) || function_for(v, dev) == nullptr) {
            continue;
        }
        if (set_math(dev, v)) {
            versions.push_back(&v);
        } else {
            printf("   %5s  %-44s not on the tier %s\n", v.number.c_str(), v.idea, host.isa->name);
        }
    }
    if (versions.empty()) {
        return 0;
    }
    std::vector<Shape> checked_shapes = op.awkward;
    if (s.own_shape && !s.bench) {
        checked_shapes = {s.shape};
    }
    const bool times = timed && s.bench;
    if (!times) {
        printf("version  %-44s err/bound in %s\n", "idea", is_bf16(dev) ? "bf16" : "float");
    }
    std::vector<Checked> checked;
    int failed = 0;
    for (const Version* v : versions) {
        set_math(dev, *v);
        checked.push_back(s.check ? check_version(dev, op, *v, checked_shapes, host.threads) : Checked());
        failed += !checked.back().problem.empty();
        if (!times) {
            print_row(*v, checked.back(), s.check, nullptr, {}, {});
        }
    }
    if (!times) {
        return failed;
    }
    printf("%s\n", name_of(dev).c_str());
    Ceiling ceiling;
    for (const Shape& shape : s.own_shape ? std::vector<Shape>{s.shape} : shapes_for(op, dev)) {
        failed += time_shape(dev, op, s, shape, host.threads, versions, checked, ceiling);
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
    const int failed = run_versions<Gpu<X>>(dev, op, s, host, harness_has_gpu());
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
    failed += run_versions<Cpu<float>>(host, op, s, host, true);
    device_close(host);
    if (failed > 0) {
        printf("%d failed\n", failed);
    }
    return failed > 0 ? 1 : 0;
}
