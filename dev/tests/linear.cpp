// Linear groups: against plain loops in double, against finite differences, in every tier, and bit for bit against
// themselves. The dropout mask is read from dropout_run and has a test of its own.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dev/tests/test.h"
#include "kernels/cpu/linear.h"
#include "kernels/random.h"

namespace {

constexpr int PLAIN = 0, RMSNORM = 1, SWIGLU = 2;
enum Residual { NONE, OTHER, SAME };
constexpr size_t FENCE = 32;
constexpr double FENCE_VALUE = -12345.5;

// An output between fences, filled with NaN.
template <class X>
struct Fenced {
    std::vector<X> all;
    size_t n = 0;
    X* data() { return all.data() + FENCE; }
    const X* data() const { return all.data() + FENCE; }
    X operator[](size_t i) const { return all[FENCE + i]; }
};

template <class X>
Fenced<X> fenced(size_t n) {
    Fenced<X> f;
    f.all.assign(n + 2 * FENCE, X(FENCE_VALUE));
    f.n = n;
    std::fill_n(f.data(), n, std::numeric_limits<X>::quiet_NaN());
    return f;
}

template <class X>
bool fences_stand(const Fenced<X>& f) {
    bool ok = true;
    for (size_t i = 0; i < FENCE; i++) {
        ok &= f.all[i] == X(FENCE_VALUE) && f.all[f.all.size() - 1 - i] == X(FENCE_VALUE);
    }
    return ok;
}

// Floats, so that the same numbers exist in both precisions.
struct Source {
    uint64_t state;
    uint32_t bits() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return uint32_t(state >> 33);
    }
    float next() { return float(bits() % 20001) / 10000.0f - 1.0f; }
};

std::vector<float> random_floats(Source& source, size_t n, float scale = 1) {
    std::vector<float> v(n);
    for (float& x : v) {
        x = source.next() * scale;
    }
    return v;
}

struct PartShape {
    int OC, r;
    Store store;
    bool double_quantised;
};

struct Shape {
    const char* name;
    size_t N;
    int C, kind;
    std::vector<PartShape> parts;
    float dropout;
    Residual residual;
    size_t pad;  // of the output's row stride
};

// Holes, mixed ranks, every store, and sizes that are no multiple of anything: blocks that straddle rows, rows that
// begin inside a byte, reductions longer than one block of the engine.
const std::vector<Shape>& shapes() {
    static const std::vector<Shape> list = {
        {"one row", 1, 64, PLAIN, {{64, 4, Store::NF4, true}}, 0, NONE, 0},
        {"qkv",
         33,
         96,
         RMSNORM,
         {{96, 8, Store::NF4, true}, {32, 3, Store::NF4, true}, {32, 0, Store::BF16, false}},
         0,
         NONE,
         5},
        {"qkv dropout",
         37,
         70,
         RMSNORM,
         {{50, 4, Store::NF4, false}, {22, 0, Store::NF4, true}, {22, 7, Store::F16, false}},
         0.25f,
         OTHER,
         3},
        {"odd C", 13, 51, PLAIN, {{37, 5, Store::NF4, true}}, 0, SAME, 1},
        {"one channel", 5, 1, PLAIN, {{1, 1, Store::NF4, false}}, 0, OTHER, 0},
        {"no adapter", 9, 40, SWIGLU, {{19, 0, Store::BF16, false}}, 0, SAME, 0},
        {"down", 35, 600, SWIGLU, {{67, 16, Store::NF4, true}}, 0, SAME, 0},
        {"down dropout", 7, 130, SWIGLU, {{65, 2, Store::F32, false}}, 0.5f, OTHER, 2},
        {"gate up", 200, 80, RMSNORM, {{130, 6, Store::BF16, false}, {130, 9, Store::NF4, true}}, 0.1f, SAME, 0},
        {"long rank", 18, 576, PLAIN, {{48, 256, Store::NF4, true}}, 0, NONE, 0},
        {"plain absmax", 9, 576, PLAIN, {{48, 4, Store::NF4, false}}, 0, NONE, 0},
        {"many outputs", 6, 66, RMSNORM, {{1100, 2, Store::NF4, true}}, 0, NONE, 0},
        {"bands", 530, 300, RMSNORM, {{70, 20, Store::NF4, true}}, 0, NONE, 0},
        {"bands dropout", 530, 300, PLAIN, {{70, 20, Store::BF16, false}}, 0.1f, OTHER, 4},
        {"many rows", 1037, 33, PLAIN, {{34, 3, Store::F16, false}}, 0.3f, SAME, 0},
    };
    return list;
}

struct PartData {
    std::vector<uint8_t> codes, absmax8;
    std::vector<float> absmax, absmax2, map8, f32, A, B, dA, dB;
    std::vector<uint16_t> half;
    std::vector<double> w;  // (OC, C) as the matmul should see them
};

// One problem in floats, with the weights' meaning worked out here.
struct Problem {
    Shape shape;
    int OC = 0, R = 0;
    std::vector<PartData> part;
    std::vector<float> x, rstd, norm_w, residual, dout;
    std::vector<uint32_t> example;
    std::vector<int32_t> position;
    std::vector<float> scale;
    Dropout drop;

    size_t x_width() const { return size_t(shape.C) * (shape.kind == SWIGLU ? 2 : 1); }
    size_t x_stride() const { return x_width() + 3; }
    size_t out_stride() const { return size_t(OC) + shape.pad; }
};

void make_weights(PartData& d, const PartShape& shape, int C, Source& source) {
    const size_t n = size_t(shape.OC) * size_t(C), blocks = (n + 63) / 64;
    d.w.resize(n);
    if (shape.store == Store::NF4) {
        d.codes.resize((n + 1) / 2);
        for (uint8_t& c : d.codes) {
            c = uint8_t(source.bits());
        }
        d.map8 = random_floats(source, 256);
        d.absmax8.resize(blocks);
        for (uint8_t& c : d.absmax8) {
            c = uint8_t(source.bits());
        }
        d.absmax2 = random_floats(source, (blocks + 255) / 256, 0.1f);
        d.absmax = random_floats(source, blocks, 0.2f);
        for (size_t i = 0; i < n; i++) {
            volatile float absmax = d.absmax[i / 64];
            if (shape.double_quantised) {
                absmax = d.map8[d.absmax8[i / 64]] * d.absmax2[i / 64 / 256];
                absmax = absmax + 0.125f;
            }
            uint8_t pair = d.codes[i / 2];
            float product = NF4_CODE[i % 2 ? pair & 15 : pair >> 4] * absmax;
            d.w[i] = to_float(to_bf16(product));
        }
    } else {
        d.f32 = random_floats(source, n, 0.2f);
        d.half.resize(n);
        for (size_t i = 0; i < n; i++) {
            if (shape.store == Store::BF16) {
                d.half[i] = to_bf16(d.f32[i]).bits;
                d.w[i] = to_float(bf16{d.half[i]});
            } else if (shape.store == Store::F16) {
                d.half[i] = uint16_t((source.bits() & 0x83ff) | (source.bits() % 16) << 10);  // all below 2
                d.w[i] = half_to_float(d.half[i]) * 1.0;
            } else {
                d.w[i] = d.f32[i];
            }
        }
    }
}

Problem make_problem(const Shape& shape, uint64_t seed) {
    Source source{seed};
    Problem p;
    p.shape = shape;
    const size_t N = shape.N, C = size_t(shape.C);
    for (const PartShape& s : shape.parts) {
        PartData d;
        make_weights(d, s, shape.C, source);
        d.A = random_floats(source, size_t(s.r) * C, 0.3f);
        d.B = random_floats(source, size_t(s.r) * size_t(s.OC), 0.3f);
        d.dA = random_floats(source, d.A.size());
        d.dB = random_floats(source, d.B.size());
        p.part.push_back(d);
        p.scale.push_back(0.5f + float(p.part.size()));
        p.OC += s.OC;
        p.R += s.r;
    }
    p.x = random_floats(source, N * p.x_stride(), 2);
    p.rstd = random_floats(source, N);
    p.norm_w = random_floats(source, C);
    p.residual = random_floats(source, N * p.out_stride());
    p.dout = random_floats(source, N * p.out_stride());
    for (size_t i = 0; i < N; i++) {
        p.example.push_back(source.bits());
        p.position.push_back(int32_t(i % 50));
    }
    p.drop.p = shape.dropout;
    p.drop.seed = 1337;
    p.drop.step = 7;
    p.drop.example = p.example.data();
    p.drop.position = p.position.data();
    return p;
}

// All that a device needs and gives, for the rows first .. first + N of a problem.
template <class X>
struct Run {
    std::vector<X> x, rstd, norm_w, residual, dout;
    std::vector<std::vector<X>> A, B;
    std::vector<Fenced<X>> dA, dB;
    Fenced<X> out, xa, din;
    LinearGroup<X> group;
    LinearInput<X, X> in;
    Dropout drop;
    size_t N;
};

template <class X>
std::vector<X> converted(const std::vector<float>& v) {
    return std::vector<X>(v.begin(), v.end());
}

template <class X>
Matrix make_matrix(const PartData& d, const PartShape& s, int C) {
    Matrix m;
    m.store = s.store;
    m.rows = s.OC;
    m.cols = C;
    if (s.store == Store::NF4) {
        m.codes = d.codes.data();
        if (s.double_quantised) {
            m.absmax8 = d.absmax8.data();
            m.absmax2 = d.absmax2.data();
            m.map8 = d.map8.data();
            m.offset = 0.125f;
        } else {
            m.absmax32 = d.absmax.data();
        }
    } else {
        m.data = s.store == Store::F32 ? static_cast<const void*>(d.f32.data()) : d.half.data();
    }
    return m;
}

template <class X>
Run<X> make_run(const Problem& p, size_t first, size_t N) {
    Run<X> r;
    const int C = p.shape.C;
    r.N = N;
    r.x = converted<X>(p.x);
    r.rstd = converted<X>(p.rstd);
    r.norm_w = converted<X>(p.norm_w);
    r.residual = converted<X>(p.residual);
    r.dout = converted<X>(p.dout);
    r.x.erase(r.x.begin(), r.x.begin() + long(first * p.x_stride()));
    r.rstd.erase(r.rstd.begin(), r.rstd.begin() + long(first));
    r.residual.erase(r.residual.begin(), r.residual.begin() + long(first * p.out_stride()));
    r.dout.erase(r.dout.begin(), r.dout.begin() + long(first * p.out_stride()));
    r.out = fenced<X>(N * p.out_stride());
    r.xa = fenced<X>(N * size_t(p.R));
    r.din = fenced<X>(N * size_t(C));
    r.group.parts = int(p.part.size());
    r.group.C = C;
    r.group.OC = p.OC;
    r.group.R = p.R;
    for (size_t i = 0; i < p.part.size(); i++) {
        r.A.push_back(converted<X>(p.part[i].A));
        r.B.push_back(converted<X>(p.part[i].B));
        r.dA.push_back(fenced<X>(p.part[i].dA.size()));
        r.dB.push_back(fenced<X>(p.part[i].dB.size()));
        std::copy(p.part[i].dA.begin(), p.part[i].dA.end(), r.dA[i].data());
        std::copy(p.part[i].dB.begin(), p.part[i].dB.end(), r.dB[i].data());
    }
    r.drop = p.drop;
    r.drop.example += first;
    r.drop.position += first;
    return r;
}

// Pointers last, when the vectors have found their place.
template <class X>
void connect(Run<X>& r, const Problem& p) {
    for (size_t i = 0; i < p.part.size(); i++) {
        LinearPart<X>& part = r.group.part[i];
        part.w = make_matrix<X>(p.part[i], p.shape.parts[i], p.shape.C);
        part.r = p.shape.parts[i].r;
        part.scale = X(p.scale[i]);
        part.A = r.A[i].data();
        part.B = r.B[i].data();
        part.dA = r.dA[i].data();
        part.dB = r.dB[i].data();
        part.module = uint32_t(11 + i);
    }
    r.in.kind = p.shape.kind == PLAIN     ? LinearInput<X, X>::PLAIN
                : p.shape.kind == RMSNORM ? LinearInput<X, X>::RMSNORM
                                          : LinearInput<X, X>::SWIGLU;
    r.in.x = r.x.data();
    r.in.stride = p.x_stride();
    r.in.rstd = r.rstd.data();
    r.in.norm_w = r.norm_w.data();
}

template <class X>
void run_forward(Cpu<X>& dev, Run<X>& r, const Problem& p) {
    connect(r, p);
    device_reserve(dev, linear_workspace(dev, r.group, r.N));
    const size_t stride = p.out_stride(), OC = size_t(p.OC);
    const X* residual = nullptr;
    if (p.shape.residual == OTHER) {
        residual = r.residual.data();
    } else if (p.shape.residual == SAME) {
        for (size_t i = 0; i < r.N; i++) {
            std::copy_n(r.residual.data() + i * stride, OC, r.out.data() + i * stride);
        }
        residual = r.out.data();
    }
    linear_forward(dev, r.out.data(), stride, r.xa.data(), r.in, r.group, r.N, residual,
                   static_cast<const Rope<X>*>(nullptr), r.drop);
}

template <class X>
void run_backward(Cpu<X>& dev, Run<X>& r, const Problem& p, bool want_din) {
    linear_backward(dev, want_din ? r.din.data() : nullptr, r.dout.data(), p.out_stride(), r.in, r.group, r.xa.data(),
                    r.N, static_cast<const Rope<X>*>(nullptr), r.drop);
}

template <class X>
Cpu<X> open_device(int threads, const char* tier = nullptr) {
    Cpu<X> dev;
    device_open(dev, threads);
    if (tier) {
        dev.isa = cpu_isa_choose(tier);
        if (dev.isa) {
            device_math(dev, sizeof(X) == sizeof(float) ? "fp32" : "auto");
        }
    }
    return dev;
}

// ---- the plain loops ----

template <class T>
struct Reference {
    std::vector<T> x;  // (N, C) after norm or SwiGLU
    std::vector<std::vector<T>> mask;
    std::vector<T> out, xa, din;
    std::vector<std::vector<T>> dA, dB;
};

template <class T>
Reference<T> reference(const Problem& p) {
    Reference<T> r;
    const size_t N = p.shape.N, C = size_t(p.shape.C), stride = p.out_stride(), R = size_t(p.R);
    const Cpu<T> mask_device = open_device<T>(1);
    r.x.resize(N * C);
    for (size_t i = 0; i < N; i++) {
        for (size_t c = 0; c < C; c++) {
            T x = T(p.x[i * p.x_stride() + c]);
            if (p.shape.kind == RMSNORM) {
                x = x * T(p.rstd[i]) * T(p.norm_w[c]);
            } else if (p.shape.kind == SWIGLU) {
                x = x / (T(1) + std::exp(-x)) * T(p.x[i * p.x_stride() + C + c]);
            }
            r.x[i * C + c] = x;
        }
    }
    r.out.assign(N * stride, T(0));
    r.xa.assign(N * R, T(0));
    r.din.assign(N * C, T(0));
    size_t column = 0, rank = 0;
    for (size_t k = 0; k < p.part.size(); k++) {
        const PartData& d = p.part[k];
        const size_t OC = size_t(p.shape.parts[k].OC), n = size_t(p.shape.parts[k].r);
        const T scale = T(p.scale[k]);
        r.mask.emplace_back(N * C, T(1));
        r.dA.emplace_back(d.dA.begin(), d.dA.end());
        r.dB.emplace_back(d.dB.begin(), d.dB.end());
        std::vector<T>&mask = r.mask[k], &dA = r.dA[k], &dB = r.dB[k];
        std::vector<T> sumA(dA.size(), T(0)), sumB(dB.size(), T(0));
        for (size_t i = 0; i < N; i++) {
            if (p.shape.dropout > 0) {
                dropout_run(mask_device, &mask[i * C], p.drop, uint32_t(11 + k), i, 0, C);
            }
            T* xa = r.xa.data() + i * R;
            for (size_t j = 0; j < n; j++) {
                for (size_t c = 0; c < C; c++) {
                    xa[rank + j] += r.x[i * C + c] * mask[i * C + c] * T(d.A[j * C + c]);
                }
            }
            for (size_t o = 0; o < OC; o++) {
                T y = 0, z = 0;
                for (size_t c = 0; c < C; c++) {
                    y += r.x[i * C + c] * T(d.w[o * C + c]);
                }
                for (size_t j = 0; j < n; j++) {
                    z += xa[rank + j] * T(d.B[o * n + j]);
                }
                y += scale * z;
                y += p.shape.residual == NONE ? T(0) : T(p.residual[i * stride + column + o]);
                r.out[i * stride + column + o] = y;
            }
            std::vector<T> t(n, T(0)), dx(C, T(0));
            for (size_t o = 0; o < OC; o++) {
                T dy = T(p.dout[i * stride + column + o]);
                for (size_t j = 0; j < n; j++) {
                    t[j] += dy * T(d.B[o * n + j]);
                    sumB[o * n + j] += dy * xa[rank + j];
                }
                for (size_t c = 0; c < C; c++) {
                    dx[c] += dy * T(d.w[o * C + c]);
                }
            }
            for (size_t c = 0; c < C; c++) {
                T masked = 0;
                for (size_t j = 0; j < n; j++) {
                    sumA[j * C + c] += t[j] * r.x[i * C + c] * mask[i * C + c];
                    masked += t[j] * T(d.A[j * C + c]);
                }
                r.din[i * C + c] += dx[c] + scale * masked * mask[i * C + c];
            }
        }
        for (size_t i = 0; i < dA.size(); i++) {
            dA[i] += scale * sumA[i];
        }
        for (size_t i = 0; i < dB.size(); i++) {
            dB[i] += scale * sumB[i];
        }
        column += OC;
        rank += n;
    }
    return r;
}

// Greatest distance; width of stride elements a row are compared.
template <class A, class B>
double distance(const A& a, const B& b, size_t rows, size_t width, size_t stride) {
    double greatest = 0;
    for (size_t i = 0; i < rows; i++) {
        for (size_t j = 0; j < width; j++) {
            double d = std::fabs(double(a[i * stride + j]) - double(b[i * stride + j]));
            greatest = d <= greatest ? greatest : d;  // a NaN is taken and kept
            if (!(d == d)) {
                return d;
            }
        }
    }
    return greatest;
}

template <class T>
double magnitude(const std::vector<T>& v) {
    double greatest = 0;
    for (T x : v) {
        greatest = std::max(greatest, std::fabs(double(x)));
    }
    return greatest;
}

template <class X>
void check_fences(const Run<X>& r, const Problem& p) {
    bool ok = fences_stand(r.out) && fences_stand(r.xa) && fences_stand(r.din);
    for (size_t k = 0; k < p.part.size(); k++) {
        ok = ok && fences_stand(r.dA[k]) && fences_stand(r.dB[k]);
    }
    for (size_t i = 0; i < r.N; i++) {
        for (size_t j = size_t(p.OC); j < p.out_stride(); j++) {
            ok = ok && std::isnan(r.out[i * p.out_stride() + j]);  // between the rows nothing is written either
        }
    }
    CHECK(ok, "%s: written outside of an output", p.shape.name);
}

// Compares all outputs with the double loops; the bound of each is twice what plain loops in X make, and at least
// `floor` of the output's magnitude.
template <class X>
void check_against(const Run<X>& r, const Problem& p, const Reference<double>& exact, const Reference<X>& naive,
                   double floor, bool with_din) {
    const size_t N = p.shape.N, C = size_t(p.shape.C), R = size_t(p.R), OC = size_t(p.OC), stride = p.out_stride();
    std::string name = p.shape.name;
    auto bound = [&](double naive_error, double size) { return std::max(2 * naive_error, floor * size); };
    CHECK_ERROR(name + " out", distance(r.out, exact.out, N, OC, stride),
                bound(distance(naive.out, exact.out, N, OC, stride), magnitude(exact.out)));
    CHECK_ERROR(name + " xa", distance(r.xa, exact.xa, N, R, R),
                bound(distance(naive.xa, exact.xa, N, R, R), magnitude(exact.xa)));
    if (with_din) {
        CHECK_ERROR(name + " din", distance(r.din, exact.din, N, C, C),
                    bound(distance(naive.din, exact.din, N, C, C), magnitude(exact.din)));
    }
    for (size_t k = 0; k < p.part.size(); k++) {
        const size_t a = exact.dA[k].size(), b = exact.dB[k].size();
        CHECK_ERROR(name + " dA", distance(r.dA[k], exact.dA[k], 1, a, a),
                    bound(distance(naive.dA[k], exact.dA[k], 1, a, a), magnitude(exact.dA[k])));
        CHECK_ERROR(name + " dB", distance(r.dB[k], exact.dB[k], 1, b, b),
                    bound(distance(naive.dB[k], exact.dB[k], 1, b, b), magnitude(exact.dB[k])));
    }
}

// ---- tests ----

void linear_double() {
    Cpu<double> dev = open_device<double>(2);
    for (const Shape& shape : shapes()) {
        Problem p = make_problem(shape, 1);
        Reference<double> exact = reference<double>(p);
        Run<double> r = make_run<double>(p, 0, shape.N);
        run_forward(dev, r, p);
        run_backward(dev, r, p, true);
        // Both sides are doubles: a few hundred roundings of 1.1e-16 of partial sums.
        check_against(r, p, exact, exact, 1e-13, true);
        check_fences(r, p);

        Run<double> no_din = make_run<double>(p, 0, shape.N);
        run_forward(dev, no_din, p);
        run_backward(dev, no_din, p, false);
        check_against(no_din, p, exact, exact, 1e-13, false);
        CHECK(shape.N == 0 || std::isnan(no_din.din[0]), "%s: din written though not wanted", shape.name);
    }
    device_close(dev);
}

void linear_tiers() {
    for (const char* tier : {"ref", "avx2", "avx512"}) {
        Cpu<float> dev = open_device<float>(2, tier);
        if (!dev.isa) {
            continue;
        }
        for (const Shape& shape : shapes()) {
            Problem p = make_problem(shape, 2);
            p.shape.name = shape.name;
            Run<float> r = make_run<float>(p, 0, shape.N);
            run_forward(dev, r, p);
            run_backward(dev, r, p, true);
            check_against(r, p, reference<double>(p), reference<float>(p), 4 * 1.2e-7, true);  // 4 ulp
            check_fences(r, p);
        }
        device_close(dev);
    }
}

// The frozen products in int16, the adapters' own in fp32. A step is 1 / 8191 of the greatest of 64 elements of x, and
// 1 / 2048 of the power of two in that of w: sums of some hundred such roundings stay below 2e-3 of the greatest
// output.
void linear_int16() {
    Cpu<float> dev = open_device<float>(2);
    if (!dev.isa->int16) {
        test_skip("this processor has no AVX-512 with VNNI");
        return;
    }
    CHECK(device_math(dev, "int16") && dev.base == dev.isa->int16 && dev.adapter == dev.isa->fp32, "%s, %s",
          dev.base->name, dev.adapter->name);
    for (const Shape& shape : shapes()) {
        Problem p = make_problem(shape, 7);
        Reference<double> exact = reference<double>(p);
        Run<float> r = make_run<float>(p, 0, shape.N);
        run_forward(dev, r, p);
        run_backward(dev, r, p, true);
        check_against(r, p, exact, reference<float>(p), 2e-3, true);
        check_fences(r, p);
    }
    device_close(dev);
}

// Activations in bf16: sums rest in scratch and are rounded once, more rows than the scratch holds go in bands. One
// rounding to 8 bits, and those of a sum of 70 in float.
void linear_bf16_bands() {
    const size_t M = 1300, K = 70, n = 200;
    Source source{8};
    std::vector<bf16> x, w, add;
    for (auto* v : {&x, &w, &add}) {
        for (float f : random_floats(source, v == &x ? M * K : v == &w ? n * K : M * n)) {
            v->push_back(to_bf16(f));
        }
    }
    std::vector<double> want(M * n), bound(M * n);
    for (size_t i = 0; i < M * n; i++) {
        double sizes = std::fabs(to_float(add[i]));
        want[i] = to_float(add[i]);
        for (size_t k = 0; k < K; k++) {
            const double term = double(to_float(x[i / n * K + k])) * to_float(w[i % n * K + k]);
            want[i] += term;
            sizes += std::fabs(term);
        }
        bound[i] = 0x1p-8 * std::fabs(want[i]) + double(K + 1) * 0x1p-24 * sizes;
    }
    Matrix weight;
    weight.store = Store::BF16;
    weight.rows = int(n);
    weight.cols = int(K);
    weight.data = w.data();
    std::vector<bf16> first;
    for (int threads : {1, 2, 3}) {
        for (bool in_place : {false, true}) {
            Cpu<bf16> dev;
            dev.threads = threads;
            dev.isa = cpu_isa_choose(nullptr);
            dev.base = dev.adapter = dev.isa->fp32;  // bf16 needs another processor; storage is the same
            Arena count;
            thread_scratch(dev, count);
            strips_take(count, *dev.base, M, K);
            device_reserve(dev, count.used);
            Arena arena = arena_of(dev);
            char* scratch = thread_scratch(dev, arena);
            Strips<float> a = strips_take(arena, *dev.base, M, K);
            pack_a(dev, a, operand_stored<bf16>(x.data(), K), false, M, K, scratch);
            std::vector<bf16> out(M * n + FENCE, to_bf16(float(FENCE_VALUE)));
            if (in_place) {
                std::copy(add.begin(), add.end(), out.begin());
            }
            Product<bf16, bf16> product;
            product.c = out.data();
            product.ldc = product.n = n;
            product.residual = in_place ? out.data() : add.data();
            product_add(product, a, K, operand_weight<bf16>(weight), false);
            gemm(dev, &product, 1, M, scratch);
            size_t wrong = 0;
            for (size_t i = 0; i < M * n; i++) {
                wrong += !(std::fabs(to_float(out[i]) - want[i]) <= bound[i]);
            }
            CHECK(wrong == 0, "%d threads: %zu elements wrong", threads, wrong);
            for (size_t i = M * n; i < out.size(); i++) {
                CHECK(out[i].bits == to_bf16(float(FENCE_VALUE)).bits, "written behind the output");
            }
            first = first.empty() ? out : first;
            CHECK(memcmp(out.data(), first.data(), out.size() * sizeof(bf16)) == 0, "%d threads: other bits", threads);
            device_close(dev);
        }
    }
}

// L = sum(out * dout) is linear in each of A, B and x, so central differences are exact but for rounding.
void linear_finite_differences() {
    Cpu<double> dev = open_device<double>(1);
    for (const Shape& shape : shapes()) {
        if (shape.N > 40 || shape.C > 200 || shape.kind != PLAIN) {
            continue;  // the other kinds differ in the input alone, which linear_double covers
        }
        for (float dropout : {0.0f, 0.4f}) {
            Shape changed = shape;
            changed.dropout = dropout;
            Problem p = make_problem(changed, 3);
            for (PartData& d : p.part) {
                std::fill(d.dA.begin(), d.dA.end(), 0.0f);
                std::fill(d.dB.begin(), d.dB.end(), 0.0f);
            }
            Run<double> r = make_run<double>(p, 0, shape.N);
            run_forward(dev, r, p);
            run_backward(dev, r, p, true);
            auto loss = [&]() {
                Run<double> again = r;
                run_forward(dev, again, p);
                double sum = 0;
                for (size_t i = 0; i < r.N; i++) {
                    for (size_t o = 0; o < size_t(p.OC); o++) {
                        sum += again.out[i * p.out_stride() + o] * r.dout[i * p.out_stride() + o];
                    }
                }
                return sum;
            };
            const double h = 1e-3;
            auto check = [&](const char* what, double& parameter, double gradient) {
                double old = parameter;
                parameter = old + h;
                double up = loss();
                parameter = old - h;
                double down = loss();
                parameter = old;
                double numeric = (up - down) / (2 * h);
                CHECK_ERROR(std::string(shape.name) + " " + what, std::fabs(numeric - gradient),
                            1e-8 * (1 + std::fabs(gradient)));  // rounding of a loss of about 100, over 2 h
            };
            for (size_t k = 0; k < p.part.size(); k++) {
                for (size_t i = 0; i < r.A[k].size(); i += 7) {
                    check("dA", r.A[k][i], r.dA[k][i]);
                }
                for (size_t i = 0; i < r.B[k].size(); i += 5) {
                    check("dB", r.B[k][i], r.dB[k][i]);
                }
            }
            for (size_t i = 0; i < r.N * size_t(p.shape.C); i += 11) {
                check("din", r.x[i / size_t(p.shape.C) * p.x_stride() + i % size_t(p.shape.C)], r.din[i]);
            }
        }
    }
    device_close(dev);
}

template <class X>
bool same_bits(const Fenced<X>& a, const Fenced<X>& b) {
    return a.all.size() == b.all.size() && memcmp(a.all.data(), b.all.data(), a.all.size() * sizeof(X)) == 0;
}

template <class X>
void threads_agree(const char* tier) {
    Cpu<X> dev = open_device<X>(1, tier);
    if (!dev.isa) {
        return;
    }
    for (const Shape& shape : shapes()) {
        Problem p = make_problem(shape, 4);
        Run<X> first;
        for (int threads : {1, 2, 3}) {
            dev.threads = threads;
            Run<X> r = make_run<X>(p, 0, shape.N);
            run_forward(dev, r, p);
            run_backward(dev, r, p, true);
            if (threads == 1) {
                first = r;
                continue;
            }
            bool same = same_bits(r.out, first.out) && same_bits(r.xa, first.xa) && same_bits(r.din, first.din);
            for (size_t k = 0; k < p.part.size(); k++) {
                same = same && same_bits(r.dA[k], first.dA[k]) && same_bits(r.dB[k], first.dB[k]);
            }
            CHECK(same, "%s: %d threads give other bits than 1 (%s)", shape.name, threads, dev.isa->name);
        }
    }
    device_close(dev);
}

void linear_threads_bitwise() {
    threads_agree<float>("ref");
    threads_agree<float>("avx2");
    threads_agree<float>("avx512");
    threads_agree<double>(nullptr);
}

// A document packed with others gives the bits that it gives alone.
void linear_rows_bitwise() {
    for (const char* tier : {"ref", "avx2", "avx512"}) {
        Cpu<float> dev = open_device<float>(1, tier);
        if (!dev.isa) {
            continue;
        }
        for (const Shape& shape : shapes()) {
            Problem p = make_problem(shape, 5);
            Run<float> whole = make_run<float>(p, 0, shape.N);
            run_forward(dev, whole, p);
            run_backward(dev, whole, p, true);
            const size_t OC = size_t(p.OC), C = size_t(shape.C), R = size_t(p.R), stride = p.out_stride();
            for (size_t first : {size_t(0), size_t(1), shape.N / 2, shape.N - 1}) {
                for (size_t n : {size_t(1), size_t(5), size_t(14)}) {
                    if (first + n > shape.N) {
                        continue;
                    }
                    Run<float> alone = make_run<float>(p, first, n);
                    run_forward(dev, alone, p);
                    run_backward(dev, alone, p, true);
                    bool same = true;
                    const float* out = alone.out.data();
                    for (size_t i = 0; i < n; i++) {
                        size_t j = first + i;
                        same = same && memcmp(out + i * stride, whole.out.data() + j * stride, OC * 4) == 0;
                        same = same && memcmp(alone.xa.data() + i * R, whole.xa.data() + j * R, R * 4) == 0;
                        same = same && memcmp(alone.din.data() + i * C, whole.din.data() + j * C, C * 4) == 0;
                    }
                    CHECK(same, "%s: rows %zu..%zu alone give other bits (%s)", shape.name, first, first + n, tier);
                }
            }
        }
        device_close(dev);
    }
}

// rope_forward after the product, rope_backward before the gradients; what they compute is the elementwise group's.
void linear_rope() {
    Cpu<float> dev = open_device<float>(2);
    Problem p = make_problem(shapes()[1], 6);  // qkv: 96 + 32 + 32 channels
    std::vector<float> cos, sin;
    const int HS = 16;
    for (int i = 0; i < 50 * HS / 2; i++) {
        cos.push_back(float(std::cos(0.37 * i)));
        sin.push_back(float(std::sin(0.37 * i)));
    }
    Rope<float> rope;
    rope.cos = cos.data();
    rope.sin = sin.data();
    rope.positions = p.position.data();
    rope.heads = 8;
    rope.HS = HS;
    Run<float> plain = make_run<float>(p, 0, p.shape.N), turned = make_run<float>(p, 0, p.shape.N);
    run_forward(dev, plain, p);
    rope_forward(dev, plain.out.data(), p.out_stride(), rope, p.shape.N);
    connect(turned, p);
    linear_forward(dev, turned.out.data(), p.out_stride(), turned.xa.data(), turned.in, turned.group, turned.N,
                   static_cast<const float*>(nullptr), &rope, turned.drop);
    CHECK(same_bits(plain.out, turned.out), "forward: the rotation of the product differs");

    rope_backward(dev, plain.dout.data(), p.out_stride(), rope, p.shape.N);
    run_backward(dev, plain, p, true);
    linear_backward(dev, turned.din.data(), turned.dout.data(), p.out_stride(), turned.in, turned.group,
                    turned.xa.data(), turned.N, &rope, turned.drop);
    CHECK(plain.dout == turned.dout, "backward: dout is not rotated back in place");
    CHECK(same_bits(plain.din, turned.din) && same_bits(plain.dA[0], turned.dA[0]) &&
              same_bits(plain.dB[1], turned.dB[1]),
          "backward: the gradients differ from those of the rotated dout");
    device_close(dev);
}

void linear_dropout_mask() {
    const size_t N = 64, C = 1000;
    std::vector<uint32_t> example(N);
    std::vector<int32_t> position(N);
    for (size_t i = 0; i < N; i++) {
        example[i] = uint32_t(i / 8);
        position[i] = int32_t(i % 8);
    }
    Dropout drop;
    drop.p = 0.3f;
    drop.seed = 5;
    drop.step = 9;
    drop.example = example.data();
    drop.position = position.data();
    const Cpu<double> dev = open_device<double>(1);
    auto mask = [&](uint32_t module) {
        std::vector<double> m(N * C, 1.0);
        for (size_t i = 0; i < N; i++) {
            dropout_run(dev, &m[i * C], drop, module, i, 0, C);
        }
        return m;
    };
    std::vector<double> m = mask(3);
    size_t kept = 0;
    bool two_values = true;
    for (double x : m) {
        kept += x != 0;
        two_values &= x == 0 || std::fabs(x - 1 / (1 - double(0.3f))) < 1e-15;
    }
    CHECK(two_values, "a mask element is neither 0 nor 1 / (1 - p)");
    // 64000 draws with p = 0.3: standard deviation 0.0018; 6 of them
    CHECK_ERROR("fraction kept", std::fabs(double(kept) / double(N * C) - 0.7), 0.011);

    // the documented rule
    uint32_t counter[4] = {example[17], uint32_t(position[17]), 3, 0}, word[4];
    uint64_t mixed = drop.seed * 0x9e3779b97f4a7c15u + drop.step;
    mixed = (mixed ^ (mixed >> 32)) * 0xd6e8feb86659fd93u;
    const uint32_t key[2] = {uint32_t(mixed), uint32_t(mixed >> 32)};
    for (const char* tier : {"ref", "avx2", "avx512"}) {
        Cpu<double> other = open_device<double>(1, tier);
        if (!other.isa) {
            continue;
        }
        std::vector<double> row(C, 1.0);
        dropout_run(other, &row[0], drop, 3, 17, 0, C);
        bool same = std::equal(row.begin(), row.end(), m.begin() + 17 * C);
        for (size_t c = 0; c < C; c++) {
            counter[3] = uint32_t(c / 4);
            philox4x32(word, counter, key);
            same = same && (row[c] != 0) == (word[c % 4] >= 0.3f * 4294967296.0);
        }
        CHECK(same, "%s: the mask is not philox4x32 of {example, position, module, c / 4}", tier);
    }

    std::vector<double> parts(C, 1.0);
    dropout_run(dev, &parts[0], drop, 3, 17, 0, 512);
    dropout_run(dev, &parts[512], drop, 3, 17, 512, C - 512);
    CHECK(std::equal(parts.begin(), parts.end(), m.begin() + 17 * C), "a row in two runs has another mask");

    Dropout shifted = drop;
    shifted.example += 17;
    shifted.position += 17;
    std::vector<double> row(C, 1.0);
    dropout_run(dev, &row[0], shifted, 3, 0, 0, C);
    CHECK(std::equal(row.begin(), row.end(), m.begin() + 17 * C), "the mask depends on the row's place in the pass");

    auto agreement = [&](const std::vector<double>& other) {
        size_t same = 0;
        for (size_t i = 0; i < m.size(); i++) {
            same += (m[i] != 0) == (other[i] != 0);
        }
        return double(same) / double(m.size());
    };
    // independent masks agree in 0.7^2 + 0.3^2 = 0.58 of the places, standard deviation 0.002
    CHECK_ERROR("another module", std::fabs(agreement(mask(4)) - 0.58), 0.012);
    drop.step = 10;
    CHECK_ERROR("another step", std::fabs(agreement(mask(3)) - 0.58), 0.012);
    drop.step = 9;
    drop.seed = 6;
    CHECK_ERROR("another seed", std::fabs(agreement(mask(3)) - 0.58), 0.012);
}

}  // namespace

// Threads get about the same share, also of few columns: the greatest over the mean. A block of 64 columns or more, and
// as many strips as it takes; with B threads on T blocks the best that whole blocks allow is ceil(T / B) B / T.
static void linear_shares() {
    const struct {
        size_t M, n, threads;
        double most;
    } cases[] = {{512, 768, 2, 1.05},   {512, 2048, 7, 1.15},  {512, 768, 64, 1.2},  {2048, 256, 64, 1.2},
                 {512, 8192, 64, 1.15}, {96, 2048, 16, 1.25}, {2048, 4096, 128, 1.2}};
    Cpu<float> dev;
    device_open(dev, 1);
    for (const auto& c : cases) {
        Product<float, float> p;
        p.n = c.n;
        const GemmCut cut = gemm_cut(dev, &p, 1, c.M, c.threads);
        CHECK(cut.nc % 64 == 0 && cut.band % band_unit(dev) == 0, "blocks of %zu columns, %zu rows", cut.nc, cut.band);
        const size_t tasks = (c.n + cut.nc - 1) / cut.nc * ((c.M + cut.band - 1) / cut.band);
        const size_t rounds = (tasks + c.threads - 1) / c.threads;
        const double share = double(rounds * std::min(cut.nc, c.n) * std::min(cut.band, c.M)) * double(c.threads) /
                             double(c.M * c.n);
        CHECK(share <= c.most, "%zu rows, %zu columns, %zu threads: blocks of %zu x %zu, share %.2f", c.M, c.n, c.threads,
              cut.nc, cut.band, share);
    }
    device_close(dev);
}

extern const Test linear_tests[] = {
    {"linear_shares", linear_shares},
    {"linear_double", linear_double},
    {"linear_tiers", linear_tiers},
    {"linear_int16", linear_int16},
    {"linear_bf16_bands", linear_bf16_bands},
    {"linear_finite_differences", linear_finite_differences},
    {"linear_threads_bitwise", linear_threads_bitwise},
    {"linear_rows_bitwise", linear_rows_bitwise},
    {"linear_rope", linear_rope},
    {"linear_dropout_mask", linear_dropout_mask},
    {nullptr, nullptr},
};
