// The engine behind linear groups and the head, in every arithmetic of this machine, against the same ops in double
// (which linear.cpp and classifier.cpp hold against plain loops): sizes that end inside strips, panels, units, blocks
// of KC and NC and bands of rows; workspaces of exactly the bytes that the ops ask for, filled with NaN; fences; the
// same bits for any number of threads and rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <string>
#include <type_traits>
#include <vector>

#include <sys/mman.h>

#include "dev/tests/ops.h"
#include "dev/tests/test.h"
#include "kernels/cpu/classifier.h"
#include "kernels/cpu/linear.h"

namespace {

// ---- arithmetics ----

// Root mean square of an error, over that of the result, at most. All operands are random, and so are their roundings:
// their squares add up. An element may err by EXTREME times as much.
//
//   fp32   A sum of n terms is rounded n times, each time by 2^-24 of what has come together, or less: a random walk
//          that ends at sqrt(n / 2) 2^-24. n is 1,200 at most; din of the head has more terms, but is nearly its
//          label's.
//   int16  A rounding to steps is step / sqrt(12). A step of A is 1/8191 of the greatest of 64 elements, which is at
//          most 8 times their root mean square (a lone one, as the label's is among dlogits). One of B is 1/2048 of it
//          at most, here 3 times (uniform values, sizes 1/4 to 1); forward NF4 and bf16 are whole steps of it.
//   bf16   Mantissas 1 to 2 are rounded by 2^-8 at most, by 2^-8 / sqrt(3) on average, of a mean of 1.53. Eight
//          roundings: x, W, A, x A^T as it is stored, the same times the scale, B, and the result, as often as a part
//          of din is added to it.
double tolerance(const std::string& math) {
    return math == "fp32"    ? std::sqrt(1200 / 2) * 0x1p-24
           : math == "int16" ? std::sqrt((std::pow(8 / 8191.0, 2) + std::pow(3 / 2048.0, 2)) / 12)
                             : std::sqrt(8 / 3.0) * 0x1p-8 / 1.53;
}
constexpr size_t PAGE = 4096;
constexpr double EXTREME = 8;  // of a million normal numbers the greatest is at 5, in rows up to 1.8 times the mean

// A device for each format of this machine that computes so; the test is skipped without one.
template <class X>
std::vector<Cpu<X>> devices(const char* math) {
    std::vector<Cpu<X>> list;
    for (const char* tier : {"ref", "avx2", "avx512", "avx512vnni", "amx"}) {
        Cpu<X> dev;
        dev.isa = cpu_isa_choose(tier);
        if (dev.isa && device_math(dev, math) && (list.empty() || list.back().base != dev.base)) {
            list.push_back(dev);
        }
    }
    if (list.empty()) {
        test_skip((std::string("no tier with ") + math + " here").c_str());
    }
    return list;
}

double value(bf16 x) {
    return double(to_float(x));
}
double value(double x) {
    return x;
}
template <class X>
X narrowed(float x) {
    if constexpr (std::is_same<X, bf16>::value) {
        return to_bf16(x);
    } else {
        return X(x);
    }
}

// got (rows, width) of row stride ld against want; got may have been rounded to bf16 at last, as far as its size says.
template <class X>
void check_near(const std::string& what, const Guarded<X>& got, const Guarded<double>& want, size_t rows, size_t width,
                size_t ld, double bound) {
    double squares = 0, errors = 0, worst = 0;
    for (size_t i = 0; i < rows; i++) {
        for (size_t j = i * ld; j < i * ld + width; j++) {
            const double e = std::fabs(value(got[j]) - want[j]), last = std::is_same<X, bf16>::value ? 0x1p-8 : 0;
            squares += want[j] * want[j];
            errors += e * e;
            worst = e - last * std::fabs(want[j]) <= worst ? worst : e - last * std::fabs(want[j]);
        }
    }
    const double size = rows * width > 0 ? std::sqrt(squares / double(rows * width)) : 0;
    CHECK_ERROR(what + ", all", std::sqrt(errors), bound * std::sqrt(squares));
    CHECK_ERROR(what + ", the worst", worst, EXTREME * bound * size);
    static const std::vector<unsigned char> untouched(64, 0xff);
    for (size_t i = 0; i < rows && ld > width; i++) {
        CHECK(memcmp(got.data() + i * ld + width, untouched.data(), (ld - width) * sizeof(X)) == 0,
              "%s: row %zu is written behind its end", what.c_str(), i);
    }
}

// ---- data ----

// n rows of uniform values, each row of its own size between 1/4 and 1.
std::vector<float> random_rows(size_t n, size_t width, uint64_t seed) {
    std::vector<float> x = random_values<float>(n * width, seed);
    const std::vector<float> size = random_values<float>(n, seed + 1000, 0.375);
    for (size_t i = 0; i < n * width; i++) {
        x[i] *= 0.625f + size[i / width];
    }
    return x;
}
// Activations, the same in every device.
std::vector<float> random_activations(size_t n, size_t width, uint64_t seed, float size = 1) {
    std::vector<float> x = random_rows(n, width, seed);
    for (float& value : x) {
        value = to_float(to_bf16(value * size));
    }
    return x;
}

std::vector<float> random_rstd(size_t n, uint64_t seed) {
    std::vector<float> x = random_values<float>(n, seed, 0.25);
    for (float& value : x) {
        value += 1.25f;
    }
    return x;
}

// n rows from `first` on as a device holds them: between fences, NaN behind each.
template <class X>
Guarded<X> placed(const std::vector<float>& x, size_t first, size_t n, size_t width, size_t ld) {
    Guarded<X> out(n * ld);
    for (size_t i = 0; i < n * width; i++) {
        out[i / width * ld + i % width] = narrowed<X>(x[first * width + i]);
    }
    return out;
}
template <class X>
std::vector<X> converted(const std::vector<float>& x) {
    return std::vector<X>(x.begin(), x.end());
}

struct Weight {
    std::vector<float> f32, absmax, absmax2, map8 = std::vector<float>(256);
    std::vector<bf16> half;
    std::vector<uint8_t> codes, absmax8;
    float offset = 0;
};
enum Kept { NF4, NF4_TWICE, BF16, F32 };  // TWICE: the absmax quantised as well

Weight make_weight(size_t n, uint64_t seed) {
    Weight w;
    const size_t blocks = (n + 63) / 64;
    w.f32 = random_rows(blocks, 64, seed);
    for (float x : w.f32) {
        w.half.push_back(to_bf16(x));
    }
    w.codes.resize((n + 1) / 2);
    w.absmax.resize(blocks);
    nf4_quantize(w.codes.data(), w.absmax.data(), w.f32.data(), n, 1);
    w.absmax8.resize(blocks);
    w.absmax2.resize((blocks + 255) / 256);
    nf4_map8(w.map8.data());
    nf4_double_quantize(w.absmax8.data(), w.absmax2.data(), &w.offset, w.absmax.data(), blocks);
    return w;
}

Matrix matrix_of(const Weight& w, Kept kept, int rows, int cols) {
    Matrix m;
    m.store = kept == F32 ? Store::F32 : kept == BF16 ? Store::BF16 : Store::NF4;
    m.rows = rows;
    m.cols = cols;
    m.data = kept == F32 ? static_cast<const void*>(w.f32.data()) : w.half.data();
    m.codes = w.codes.data();
    if (kept == NF4_TWICE) {
        m.absmax8 = w.absmax8.data();
        m.absmax2 = w.absmax2.data();
        m.map8 = w.map8.data();
        m.offset = w.offset;
    } else {
        m.absmax32 = w.absmax.data();
    }
    return m;
}

// Just the bytes that an op asks for, for as long as the scope.
template <class X>
struct Workspace {
    Cpu<X>& dev;
    Guarded<char> memory;
    Workspace(Cpu<X>& d, size_t bytes) : dev(d), memory(bytes) {
        dev.workspace = memory.data();
        dev.workspace_bytes = bytes;
    }
    ~Workspace() {
        CHECK_FENCES(memory);
        dev.workspace = nullptr;
        dev.workspace_bytes = 0;
    }
    Workspace(const Workspace&) = delete;
};

// ---- linear groups ----

enum Kind { PLAIN, RMSNORM, SWIGLU };
enum Residual { NONE, APART, SAME };

struct PartShape {
    int OC, r;
    Kept kept;
};
struct Shape {
    size_t N;
    int C;
    Kind kind;
    std::vector<PartShape> parts;
    float dropout;
    Residual residual;
    bool din;
};

const std::vector<Shape>& shapes() {
    static const std::vector<Shape> list = {
        {1, 1088, PLAIN, {{101, 3, NF4_TWICE}}, 0, NONE, true},
        {1, 68, SWIGLU, {{70, 16, BF16}, {64, 3, F32}}, 0.25f, APART, true},
        {97, 1088, RMSNORM, {{101, 16, NF4_TWICE}, {70, 0, NF4}, {64, 3, BF16}}, 0, NONE, true},
        {97, 100, SWIGLU, {{513, 3, NF4}}, 0.1f, SAME, true},
        {97, 128, SWIGLU, {{513, 0, NF4_TWICE}}, 0, SAME, true},
        {97, 128, PLAIN, {{513, 16, BF16}}, 0, APART, false},
        {577, 128, RMSNORM, {{70, 3, NF4_TWICE}, {64, 0, F32}, {101, 16, NF4}}, 0.25f, APART, true},
        {1200, 68, PLAIN, {{513, 16, F32}}, 0, SAME, false},
        {1200, 128, SWIGLU, {{64, 16, NF4}}, 0, APART, true},
        {1200, 100, RMSNORM, {{70, 3, BF16}, {64, 3, NF4_TWICE}}, 0.1f, NONE, true},
    };
    return list;
}

struct Problem {
    Shape shape;
    size_t OC = 0, R = 0;
    std::vector<Weight> w;
    std::vector<std::vector<float>> A, B, dA, dB;
    std::vector<float> x, rstd, norm_w, residual, dout;
    std::vector<uint32_t> example;
    std::vector<int32_t> position;

    size_t x_width() const { return size_t(shape.C) * (shape.kind == SWIGLU ? 2 : 1); }
};

// Adapters count as much as their matrix in the output and in din; dA and dB begin a little smaller than they get.
Problem make_problem(const Shape& shape) {
    Problem p;
    p.shape = shape;
    const size_t N = shape.N, C = size_t(shape.C);
    uint64_t seed = 1;
    for (const PartShape& s : shape.parts) {
        const size_t OC = size_t(s.OC), r = size_t(s.r);
        const double half = 1 / std::sqrt(std::sqrt(double(r) + 1));
        p.w.push_back(make_weight(OC * C, seed++));
        p.A.push_back(random_values<float>(r * C, seed++, half));
        p.B.push_back(random_values<float>(r * OC, seed++, half));
        p.dA.push_back(random_values<float>(r * C, seed++, std::sqrt(double(N * OC)) / 16));
        p.dB.push_back(random_values<float>(r * OC, seed++, std::sqrt(double(N * C)) / 16));
        p.OC += OC;
        p.R += r;
    }
    p.x = random_activations(N, p.x_width(), seed++, shape.kind == SWIGLU ? 4 : 1);
    p.rstd = random_rstd(N, seed++);
    p.norm_w = random_values<float>(C, seed++, 2);
    p.residual = random_activations(N, p.OC, seed++);
    p.dout = random_activations(N, p.OC, seed++);
    for (size_t i = 0; i < N; i++) {
        p.example.push_back(uint32_t(i / 50));
        p.position.push_back(int32_t(i % 50));
    }
    return p;
}

template <class X>
struct Outcome {
    using Real = typename Cpu<X>::real;
    Guarded<X> out, xa, din;
    std::vector<Guarded<Real>> dA, dB;
};

constexpr size_t GAP = 3;  // elements between rows

// Forward and backward of N rows from `first` on.
template <class X>
Outcome<X> run(Cpu<X>& dev, const Problem& p, size_t first, size_t N) {
    using Real = typename Cpu<X>::real;
    const Shape& shape = p.shape;
    const size_t C = size_t(shape.C), ld = p.OC + GAP, x_ld = p.x_width() + GAP;
    const Guarded<X> x = placed<X>(p.x, first, N, p.x_width(), x_ld);
    const Guarded<X> residual = placed<X>(p.residual, first, N, p.OC, ld);
    Guarded<X> dout = placed<X>(p.dout, first, N, p.OC, ld);
    Outcome<X> o = {Guarded<X>(N * ld), Guarded<X>(N * p.R), Guarded<X>(N * C), {}, {}};
    if (shape.residual == SAME) {
        memcpy(o.out.data(), residual.data(), N * ld * sizeof(X));
    }
    const std::vector<Real> rstd = converted<Real>(p.rstd), norm_w = converted<Real>(p.norm_w);
    std::vector<std::vector<Real>> A, B;
    LinearGroup<Real> g;
    g.parts = int(shape.parts.size());
    g.C = shape.C;
    g.OC = int(p.OC);
    g.R = int(p.R);
    for (size_t i = 0; i < shape.parts.size(); i++) {
        const PartShape& s = shape.parts[i];
        LinearPart<Real>& part = g.part[i];
        A.push_back(converted<Real>(p.A[i]));
        B.push_back(converted<Real>(p.B[i]));
        o.dA.push_back(placed<Real>(p.dA[i], 0, 1, p.dA[i].size(), p.dA[i].size()));
        o.dB.push_back(placed<Real>(p.dB[i], 0, 1, p.dB[i].size(), p.dB[i].size()));
        part.w = matrix_of(p.w[i], s.kept, s.OC, shape.C);
        part.r = s.r;
        part.scale = Real(0.75f + 0.25f * float(i));
        part.A = A[i].data();
        part.B = B[i].data();
        part.dA = o.dA[i].data();
        part.dB = o.dB[i].data();
        part.module = uint32_t(5 + i);
    }
    LinearInput<X, Real> in;
    in.kind = shape.kind == PLAIN ? in.PLAIN : shape.kind == RMSNORM ? in.RMSNORM : in.SWIGLU;
    in.x = x.data();
    in.stride = x_ld;
    in.rstd = rstd.data() + first;
    in.norm_w = norm_w.data();
    const Dropout drop = {shape.dropout, 1337, 7, p.example.data() + first, p.position.data() + first};
    const size_t bytes = linear_workspace(dev, g, N);
    const Rope<Real>* no_rope = nullptr;
    {
        Workspace<X> workspace(dev, bytes);
        const X* added = shape.residual == SAME ? o.out.data() : shape.residual == APART ? residual.data() : nullptr;
        linear_forward(dev, o.out.data(), ld, o.xa.data(), in, g, N, added, no_rope, drop);
    }
    Workspace<X> workspace(dev, bytes);
    linear_backward(dev, shape.din ? o.din.data() : nullptr, dout.data(), ld, in, g, o.xa.data(), N, no_rope, drop);
    return o;
}

// With the fences of both.
template <class X>
bool same(const Guarded<X>& a, const Guarded<X>& b) {
    return a.intact() && b.intact() && same_bits(a.data(), b.data(), a.n);
}

// The bits of what is written to memory, by more threads, and of the last row by itself.
template <class X>
void check_bits(const std::string& name, Cpu<X>& dev, const Problem& p, const Outcome<X>& one) {
    const size_t last = p.shape.N - 1, ld = p.OC + GAP, C = size_t(p.shape.C);
    for (int threads : {2, 7}) {
        dev.threads = threads;
        const Outcome<X> r = run(dev, p, 0, p.shape.N);
        bool equal = same(r.out, one.out) && same(r.xa, one.xa) && same(r.din, one.din);
        for (size_t i = 0; i < r.dA.size(); i++) {
            equal = equal && same(r.dA[i], one.dA[i]) && same(r.dB[i], one.dB[i]);
        }
        CHECK(equal, "%s%d threads give other bits, or write outside", name.c_str(), threads);
    }
    const Outcome<X> row = run(dev, p, last, 1);
    CHECK(same_bits(row.out.data(), one.out.data() + last * ld, ld) &&
              same_bits(row.xa.data(), one.xa.data() + last * p.R, p.R) &&
              same_bits(row.din.data(), one.din.data() + last * C, C),
          "%sthe last row alone has other bits", name.c_str());
}

template <class X>
void linear(const char* math) {
    std::vector<Cpu<X>> list = devices<X>(math);
    const double bound = tolerance(math);
    for (size_t i = 0; i < shapes().size() && !list.empty(); i++) {
        DoubleDevice double_device(2);
        const Problem p = make_problem(shapes()[i]);
        const size_t N = p.shape.N, C = size_t(p.shape.C);
        const Outcome<double> want = run<double>(double_device, p, 0, N);
        for (Cpu<X>& dev : list) {
            const std::string name =
                std::string(dev.isa->name) + ", N " + std::to_string(N) + " C " + std::to_string(C) + ": ";
            dev.threads = 1;
            const Outcome<X> got = run(dev, p, 0, N);
            check_near(name + "out", got.out, want.out, N, p.OC, p.OC + GAP, bound);
            check_near(name + "xa", got.xa, want.xa, N, p.R, p.R, bound);
            check_near(name + "din", got.din, want.din, p.shape.din ? N : 0, C, C, bound);
            for (size_t k = 0; k < got.dA.size(); k++) {
                check_near(name + "dA", got.dA[k], want.dA[k], 1, got.dA[k].n, got.dA[k].n, bound);
                check_near(name + "dB", got.dB[k], want.dB[k], 1, got.dB[k].n, got.dB[k].n, bound);
            }
            check_bits(name, dev, p, got);
        }
    }
}

// ---- the head ----

struct HeadShape {
    size_t N, n;  // rows, and those with a label
    int C, V;
    Kept kept;
    Kind kind;
};
// Several runs of the vocabulary (8,192) in the backward pass, several chunks of rows (512).
const HeadShape heads[] = {
    {5, 1, 68, 513, F32, RMSNORM},       {97, 50, 100, 8300, BF16, RMSNORM}, {33, 20, 64, 16400, NF4_TWICE, PLAIN},
    {1200, 577, 64, 101, BF16, RMSNORM}, {600, 580, 128, 70, NF4, PLAIN},    {97, 97, 1088, 101, BF16, RMSNORM},
};

struct Head {
    HeadShape shape;
    Weight w;
    std::vector<float> x, rstd, norm_w;
    std::vector<int32_t> rows, labels;
};

template <class X>
struct HeadOutcome {
    using Real = typename Cpu<X>::real;
    Guarded<Real> logits, losses;
    Guarded<uint8_t> correct;
    Guarded<X> din;
};

template <class X>
HeadOutcome<X> run(Cpu<X>& dev, const Head& h) {
    using Real = typename Cpu<X>::real;
    const HeadShape& s = h.shape;
    const size_t C = size_t(s.C);
    HeadOutcome<X> o = {Guarded<Real>(s.n * size_t(s.V)), Guarded<Real>(s.n), Guarded<uint8_t>(s.n),
                        Guarded<X>(s.N * C)};
    const Guarded<X> x = placed<X>(h.x, 0, s.N, C, C + GAP);
    const std::vector<Real> rstd = converted<Real>(h.rstd), norm_w = converted<Real>(h.norm_w);
    LinearInput<X, Real> in;
    in.kind = s.kind == PLAIN ? in.PLAIN : in.RMSNORM;
    in.x = x.data();
    in.stride = C + GAP;
    in.rstd = rstd.data();
    in.norm_w = norm_w.data();
    const Matrix w = matrix_of(h.w, s.kept, s.V, s.C);
    const size_t bytes = classifier_workspace(dev, s.C, s.V, s.n);
    {
        Workspace<X> workspace(dev, bytes);
        head_logits(dev, o.logits.data(), in, w, h.rows.data(), s.n);
    }
    Workspace<X> workspace(dev, bytes);
    classifier(dev, o.losses.data(), o.correct.data(), o.din.data(), in, w, h.rows.data(), h.labels.data(), s.n, s.N,
               Real(0.5));
    return o;
}

template <class Real>
int32_t arg_max(const Real* logits, int V) {
    return int32_t(std::max_element(logits, logits + V) - logits);  // the first of equals
}

// Logits of a few units. Every third label is to be the greatest of them, which the caller finds.
Head make_head(const HeadShape& shape) {
    const size_t C = size_t(shape.C);
    Head h = {shape, make_weight(size_t(shape.V) * C, 1), {}, {}, {}, {}, {}};
    h.x = random_activations(shape.N, C, 2);
    h.rstd = random_rstd(shape.N, 3);
    h.norm_w = random_values<float>(C, 4, 12 / std::sqrt(double(C)));
    for (size_t i = 0; i < shape.n; i++) {
        h.rows.push_back(int32_t((i + 1) * shape.N / shape.n - 1));
        h.labels.push_back(int32_t(i * 7919 % size_t(shape.V)));
    }
    return h;
}

template <class X>
void check_head(const std::string& name, const Head& h, const HeadOutcome<X>& got, const HeadOutcome<double>& want,
                double bound) {
    const size_t n = h.shape.n, N = h.shape.N, V = size_t(h.shape.V), C = size_t(h.shape.C);
    check_near(name + "logits", got.logits, want.logits, n, V, V, bound);
    check_near(name + "din", got.din, want.din, N, C, C, bound);
    double squares = 0, most = 0;
    for (size_t i = 0; i < n * V; i++) {
        squares += want.logits[i] * want.logits[i];
        most = std::max(most, std::fabs(want.logits[i]));
    }
    // lse errs no more than the logits; and both, and their difference, are floats.
    CHECK_ERROR(name + "losses", greatest_error(got.losses.data(), want.losses.data(), n),
                2 * EXTREME * bound * std::sqrt(squares / double(n * V)) + 4 * 0x1p-24 * (most + std::log(double(V))));
    size_t wrong = 0, not_zero = 0;
    for (size_t i = 0; i < n; i++) {
        wrong += got.correct[i] != (arg_max(&got.logits[i * V], h.shape.V) == h.labels[i]);
    }
    for (size_t i = 0; i < N * C; i++) {
        not_zero += want.din[i] == 0 && value(got.din[i]) != 0;
    }
    CHECK(wrong == 0, "%scorrect is wrong for %zu of %zu rows", name.c_str(), wrong, n);
    CHECK(not_zero == 0, "%sdin is not zero in %zu places of rows without a label", name.c_str(), not_zero);
}

template <class X>
void head(const char* math) {
    std::vector<Cpu<X>> list = devices<X>(math);
    for (size_t i = 0; i < std::size(heads) && !list.empty(); i++) {
        DoubleDevice double_device(2);
        Head h = make_head(heads[i]);
        HeadOutcome<double> want = run<double>(double_device, h);
        for (size_t k = 0; k < h.labels.size(); k += 3) {
            h.labels[k] = arg_max(&want.logits[k * size_t(h.shape.V)], h.shape.V);
        }
        want = run<double>(double_device, h);
        for (Cpu<X>& dev : list) {
            const std::string name = std::string(dev.isa->name) + ", V " + std::to_string(h.shape.V) + " C " +
                                     std::to_string(h.shape.C) + ": ";
            dev.threads = 1;
            const HeadOutcome<X> one = run(dev, h);
            check_head(name, h, one, want, tolerance(math));
            for (int threads : {2, 7}) {
                dev.threads = threads;
                const HeadOutcome<X> r = run(dev, h);
                CHECK(same(r.logits, one.logits) && same(r.losses, one.losses) && same(r.correct, one.correct) &&
                          same(r.din, one.din),
                      "%s%d threads give other bits, or write outside", name.c_str(), threads);
            }
        }
    }
}

// ---- memory ----

size_t pages_present(const void* p, size_t pages) {
    std::vector<unsigned char> state(pages);
    CHECK(mincore(const_cast<void*>(p), pages * PAGE, state.data()) == 0, "mincore fails");
    return size_t(std::count_if(state.begin(), state.end(), [](unsigned char s) { return s & 1; }));
}

// Every page is written to, and nothing behind the last: the memory ends inside a piece, and in a page.
void pages_are_spread() {
    const size_t pages = 4 * 512 + 7, bytes = pages * PAGE - 100;
    for (int threads : {1, 3, 7}) {
        Cpu<float> dev;
        dev.threads = threads;
        void* memory = mmap(nullptr, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED, "no memory");
        char* p = static_cast<char*>(memory);
        CHECK(pages_present(p, pages) < pages, "memory is there before anyone writes to it: nothing is tested");
        memset(p + bytes, 1, 100);
        device_spread(dev, p, bytes);
        const size_t present = pages_present(p, pages);
        CHECK(present == pages, "%d threads: %zu of %zu pages", threads, present, pages);
        CHECK(std::count(p + bytes, p + pages * PAGE, 1) == 100, "%d threads write behind the end", threads);
        munmap(memory, pages * PAGE);
    }
}

}  // namespace

extern const Test engine_tests[] = {
    {"linear_fp32", [] { linear<float>("fp32"); }},
    {"linear_int16", [] { linear<float>("int16"); }},
    {"linear_bf16", [] { linear<bf16>("bf16"); }},
    {"head_fp32", [] { head<float>("fp32"); }},
    {"head_int16", [] { head<float>("int16"); }},
    {"head_bf16", [] { head<bf16>("bf16"); }},
    {"pages_are_spread", pages_are_spread},
    {nullptr, nullptr},
};
