// Embedding, RMSNorm, RoPE, SwiGLU, and the row kernels below them: formulas, finite differences, tiers, alignment; the
// same on activations in bf16.
#include "kernels/cpu/elementwise.h"

#include <algorithm>

#include "dev/tests/ops.h"

namespace {

const size_t row_counts[] = {1, 33};
const int widths[] = {6, 64, 80, 576};

// ---- the formulas, plainly, in T ----

template <class T>
std::vector<T> plain_rstd(const std::vector<T>& x, size_t N, size_t C, double eps) {
    std::vector<T> rstd(N);
    for (size_t row = 0; row < N; row++) {
        T sum = 0;
        for (size_t c = 0; c < C; c++) {
            sum += x[row * C + c] * x[row * C + c];
        }
        rstd[row] = T(1) / std::sqrt(sum / T(C) + T(eps));
    }
    return rstd;
}

// dx of RMSNorm, without what was there.
template <class T>
std::vector<T> plain_norm_grad(const std::vector<T>& dout, const std::vector<T>& x, const std::vector<T>& rstd,
                               const std::vector<T>& w, size_t N, size_t C) {
    std::vector<T> dx(N * C);
    for (size_t row = 0; row < N; row++) {
        T dot = 0;
        for (size_t c = 0; c < C; c++) {
            dot += dout[row * C + c] * w[c] * x[row * C + c];
        }
        for (size_t c = 0; c < C; c++) {
            const size_t i = row * C + c;
            dx[i] = rstd[row] * (dout[i] * w[c] - x[i] * rstd[row] * rstd[row] * dot / T(C));
        }
    }
    return dx;
}

template <class T>
T plain_silu(T x) {
    return x / (T(1) + std::exp(-x));
}

template <class T>
std::vector<T> plain_swiglu_grad(const std::vector<T>& dout, const std::vector<T>& gate_up, size_t N, size_t F) {
    std::vector<T> d(N * 2 * F);
    for (size_t row = 0; row < N; row++) {
        for (size_t f = 0; f < F; f++) {
            const T g = gate_up[row * 2 * F + f], u = gate_up[row * 2 * F + F + f], up = dout[row * F + f];
            const T s = T(1) / (T(1) + std::exp(-g));
            d[row * 2 * F + f] = up * u * s * (T(1) + g * (T(1) - s));
            d[row * 2 * F + F + f] = up * g * s;
        }
    }
    return d;
}

template <class X>
double dot_of(const std::vector<X>& a, const std::vector<X>& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); i++) {
        sum += double(a[i]) * double(b[i]);
    }
    return sum;
}

template <class X>
void check_against(const std::string& name, const Guarded<X>& got, const std::vector<double>& want, double bound) {
    CHECK(got.intact(), "%s: written outside", name.c_str());
    CHECK_ERROR(name, greatest_error(got.data(), want.data(), want.size()), bound);
}

// ---- activations in bf16 ----

const int odd_widths[] = {1, 7, 33, 101, 576};

// The bf16 device of a tier. It needs no workspace, so it is not opened.
Cpu<bf16> bf16_device(const Cpu<float>& dev) {
    Cpu<bf16> narrow;
    narrow.isa = dev.isa;
    narrow.threads = dev.threads;
    return narrow;
}

// Random values that bf16 holds, so that the double they are compared with is of the same input.
struct Stored {
    std::vector<bf16> x;
    std::vector<float> single;
    std::vector<double> exact;
    Stored(size_t n, uint64_t seed, double size = 1) : x(n), single(n), exact(n) {
        const std::vector<float> random = random_values<float>(n, seed, size);
        for (size_t i = 0; i < n; i++) {
            x[i] = to_bf16(random[i]);
            single[i] = to_float(x[i]);
            exact[i] = double(single[i]);
        }
    }
};

// Half a unit in the last place of bf16 at |x|: 8 bits, the least exponent that of floats.
double half_ulp(double x) {
    int exponent = 0;
    std::frexp(x, &exponent);
    return std::ldexp(1.0, std::max(exponent, -125) - 9);
}

// bound: of the float before it is stored. Storing moves it by half a unit in the last place more.
void check_stored(const std::string& name, const Guarded<bf16>& got, const std::vector<double>& want, double bound) {
    CHECK(got.intact(), "%s: written outside", name.c_str());
    for (size_t i = 0; i < want.size(); i++) {
        const double e = std::fabs(double(to_float(got[i])) - want[i]);
        const double most = bound + half_ulp(std::fabs(want[i]) + bound);
        CHECK(e <= most, "%s: element %zu is %.9g, want %.9g: error %.3g > %.3g", name.c_str(), i,
              double(to_float(got[i])), want[i], e, most);
    }
}

void check_float(const std::string& name, const Guarded<float>& got, const std::vector<double>& want, double bound) {
    check_against(name, got, want, bound);
}

bool is_nan(bf16 x) {
    return std::isnan(to_float(x));
}

}  // namespace

static void embedding_rows() {
    const int V = 11, C = 80;
    const std::vector<float> table = random_values<float>(size_t(V) * C, 1);
    std::vector<bf16> narrow(table.size());
    for (size_t i = 0; i < table.size(); i++) {
        narrow[i] = to_bf16(table[i]);
    }
    Matrix wide_matrix, narrow_matrix;
    wide_matrix.rows = narrow_matrix.rows = V;
    wide_matrix.cols = narrow_matrix.cols = C;
    wide_matrix.data = table.data();
    narrow_matrix.store = Store::BF16;
    narrow_matrix.data = narrow.data();
    const std::vector<int32_t> tokens = {10, 0, 3, 3, 9};
    const auto check = [&](const char* name, const auto& out, const auto& expected) {
        CHECK(out.intact(), "%s: written outside", name);
        for (size_t i = 0; i < out.n; i++) {
            const size_t from = size_t(tokens[i / C]) * C + i % C;
            CHECK(double(out[i]) == double(expected(from)), "%s: element %zu", name, i);
        }
    };
    for_each_tier([&](Cpu<float>& dev) {
        Guarded<float> a(tokens.size() * C), b(tokens.size() * C);
        embedding_forward(dev, a.data(), tokens.data(), wide_matrix, tokens.size());
        embedding_forward(dev, b.data(), tokens.data(), narrow_matrix, tokens.size());
        check("F32", a, [&](size_t i) { return table[i]; });
        check("BF16", b, [&](size_t i) { return to_float(narrow[i]); });
        Cpu<bf16> half = bf16_device(dev);
        Guarded<bf16> d(tokens.size() * C), e(tokens.size() * C);
        embedding_forward(half, d.data(), tokens.data(), wide_matrix, tokens.size());
        embedding_forward(half, e.data(), tokens.data(), narrow_matrix, tokens.size());
        for (const Guarded<bf16>* out : {&d, &e}) {
            Guarded<float> widened(out->n);
            row_kernels(half).widen(widened.data(), out->data(), out->n);
            CHECK(out->intact(), "bf16: written outside");
            check("to bf16", widened, [&](size_t i) { return to_float(narrow[i]); });
        }
    });
    DoubleDevice dev(2);
    Guarded<double> out(tokens.size() * C);
    embedding_forward(dev, out.data(), tokens.data(), wide_matrix, tokens.size());
    check("double", out, [&](size_t i) { return table[i]; });
}

static void rmsnorm_formula() {
    const double eps = 1e-5;
    for (size_t N : row_counts) {
        for (int C : widths) {
            const size_t n = N * size_t(C);
            const std::vector<double> x = random_values<double>(n, 1, 3), dout = random_values<double>(n, 2);
            const std::vector<double> w = random_values<double>(size_t(C), 3), before = random_values<double>(n, 4);
            const std::vector<float> xf(x.begin(), x.end()), doutf(dout.begin(), dout.end()), wf(w.begin(), w.end());
            const std::vector<double> rstd = plain_rstd(x, N, size_t(C), eps);
            const std::vector<float> rstdf = plain_rstd(xf, N, size_t(C), eps);
            std::vector<double> y(n), dx = plain_norm_grad(dout, x, rstd, w, N, size_t(C));
            std::vector<float> yf(n), dxf = plain_norm_grad(doutf, xf, rstdf, wf, N, size_t(C));
            for (size_t i = 0; i < n; i++) {
                y[i] = x[i] * rstd[i / size_t(C)] * w[i % size_t(C)];
                yf[i] = xf[i] * rstdf[i / size_t(C)] * wf[i % size_t(C)];
                dx[i] += before[i];
                dxf[i] += float(before[i]);
            }
            const auto check = [&](auto& dev, const std::string& name, const auto& in, const auto& din,
                                   const auto& weight, double rstd_bound, double out_bound, double dx_bound) {
                using X = typename std::decay<decltype(in[0])>::type;
                Guarded<X> r(N), out(n), d(n);
                for (size_t i = 0; i < n; i++) {
                    d[i] = X(before[i]);
                }
                rmsnorm_rstd(dev, r.data(), in.data(), N, C, eps);
                rmsnorm_forward(dev, out.data(), in.data(), r.data(), weight.data(), N, C);
                rmsnorm_backward(dev, d.data(), size_t(C), din.data(), in.data(), r.data(), weight.data(), N, C);
                check_against(name + ": rstd", r, rstd, rstd_bound);
                check_against(name + ": out", out, y, out_bound);
                check_against(name + ": dx", d, dx, dx_bound);
            };
            const std::string size = std::to_string(N) + "x" + std::to_string(C);
            DoubleDevice exact(2);
            check(exact, "double " + size, x, dout, w, 1e-13, 1e-13, 1e-13);
            for_each_tier([&](Cpu<float>& dev) {
                check(dev, dev.isa->name + (" " + size), xf, doutf, wf, float_bound(rstdf, rstd), float_bound(yf, y),
                      float_bound(dxf, dx));
            });
        }
    }
}

static void rmsnorm_differences() {
    const size_t N = 3;
    const int C = 7;
    DoubleDevice dev(1);
    std::vector<double> x = random_values<double>(N * C, 1), rstd(N), out(N * C), dx(N * C);
    const std::vector<double> dout = random_values<double>(N * C, 2), w = random_values<double>(C, 3);
    const auto loss = [&] {
        rmsnorm_rstd(dev, rstd.data(), x.data(), N, C, 1e-5);
        rmsnorm_forward(dev, out.data(), x.data(), rstd.data(), w.data(), N, C);
        return dot_of(out, dout);
    };
    loss();
    rmsnorm_backward(dev, dx.data(), size_t(C), dout.data(), x.data(), rstd.data(), w.data(), N, C);
    CHECK_ERROR("dx", difference_error(x, dx.data(), 1, loss), 1e-6);
}

// The angle in double, position * theta^(-2i/HS); pair (i, i + HS/2). What lies behind the rotated heads stays.
static void rope_formula() {
    for (int HS : {6, 32, 64, 80, 128}) {
        const int heads = 3, positions = 40;
        const size_t N = 33, half = size_t(HS) / 2, stride = size_t(heads) * size_t(HS) + 5;
        std::vector<double> cosines(positions * half), sines(positions * half);
        for (size_t p = 0; p < positions; p++) {
            for (size_t i = 0; i < half; i++) {
                const double angle = double(p) * std::pow(500000.0, -2.0 * double(i) / HS);
                cosines[p * half + i] = std::cos(angle);
                sines[p * half + i] = std::sin(angle);
            }
        }
        std::vector<int32_t> place(N);
        for (size_t i = 0; i < N; i++) {
            place[i] = int32_t((i * 7) % positions);
        }
        const std::vector<double> x = random_values<double>(N * stride, 1);
        std::vector<double> want = x;
        for (size_t row = 0; row < N; row++) {
            for (size_t h = 0; h < size_t(heads); h++) {
                for (size_t i = 0; i < half; i++) {
                    const size_t at = row * stride + h * size_t(HS) + i;
                    const double angle = place[row] * std::pow(500000.0, -2.0 * double(i) / HS);
                    want[at] = x[at] * std::cos(angle) - x[at + half] * std::sin(angle);
                    want[at + half] = x[at + half] * std::cos(angle) + x[at] * std::sin(angle);
                }
            }
        }
        const auto check = [&](auto& dev, const std::string& name, auto zero, double bound) {
            using X = decltype(zero);
            const std::vector<X> c(cosines.begin(), cosines.end()), s(sines.begin(), sines.end());
            Rope<X> rope;
            rope.cos = c.data();
            rope.sin = s.data();
            rope.positions = place.data();
            rope.heads = heads;
            rope.HS = HS;
            Guarded<X> q(N * stride);
            std::copy(x.begin(), x.end(), q.data());
            rope_forward(dev, q.data(), stride, rope, N);
            check_against(name, q, want, bound);
            for (size_t row = 0; row < N; row++) {
                for (size_t i = size_t(heads) * size_t(HS); i < stride; i++) {
                    CHECK(q[row * stride + i] == X(x[row * stride + i]), "%s: element %zu of a row is not a head's",
                          name.c_str(), i);
                }
            }
            rope_backward(dev, q.data(), stride, rope, N);
            check_against(name + " and back", q, x, 2 * bound);
        };
        const std::string size = ", head of " + std::to_string(HS);
        DoubleDevice exact(2);
        check(exact, "double" + size, 0.0, 1e-14);
        // |x| <= 1: four roundings (cos, sin, two products) and one of the sum, each at most 2^-24 of 1 or of sqrt 2
        for_each_tier([&](Cpu<float>& dev) { check(dev, dev.isa->name + size, 0.0f, 6 * 6e-8); });
    }
}

// The gradient of a rotation is its transpose: <rope(x), y> = <x, rope_backward(y)>.
static void rope_gradient() {
    DoubleDevice dev(1);
    const double c[] = {0.6, -0.28}, s[] = {0.8, 0.96};
    const int32_t place[] = {0};
    Rope<double> rope;
    rope.cos = c;
    rope.sin = s;
    rope.positions = place;
    rope.heads = 1;
    rope.HS = 4;
    std::vector<double> x = random_values<double>(4, 1), y = random_values<double>(4, 2), forward = x, backward = y;
    rope_forward(dev, forward.data(), 4, rope, 1);
    rope_backward(dev, backward.data(), 4, rope, 1);
    CHECK_ERROR("inner products", std::fabs(dot_of(forward, y) - dot_of(x, backward)), 1e-15);
}

static void swiglu_formula() {
    for (size_t N : row_counts) {
        for (int F : widths) {
            const size_t n = N * size_t(F);
            const std::vector<double> in = random_values<double>(2 * n, 1, 12), dout = random_values<double>(n, 2);
            const std::vector<float> inf(in.begin(), in.end()), doutf(dout.begin(), dout.end());
            std::vector<double> y(n), d = plain_swiglu_grad(dout, in, N, size_t(F));
            std::vector<float> yf(n), df = plain_swiglu_grad(doutf, inf, N, size_t(F));
            for (size_t i = 0; i < n; i++) {
                const size_t at = i / size_t(F) * 2 * size_t(F) + i % size_t(F);
                y[i] = plain_silu(in[at]) * in[at + size_t(F)];
                yf[i] = plain_silu(inf[at]) * inf[at + size_t(F)];
            }
            const auto check = [&](auto& dev, const std::string& name, const auto& x, const auto& dx, double out_bound,
                                   double d_bound) {
                using X = typename std::decay<decltype(x[0])>::type;
                Guarded<X> out(n), back(2 * n);
                swiglu_forward(dev, out.data(), x.data(), N, F);
                swiglu_backward(dev, back.data(), 2 * size_t(F), dx.data(), x.data(), N, F);
                check_against(name + ": out", out, y, out_bound);
                check_against(name + ": dgate_up", back, d, d_bound);
            };
            const std::string size = std::to_string(N) + "x" + std::to_string(F);
            DoubleDevice exact(2);
            check(exact, "double " + size, in, dout, 1e-13, 1e-13);
            for_each_tier([&](Cpu<float>& dev) {
                check(dev, dev.isa->name + (" " + size), inf, doutf, float_bound(yf, y), float_bound(df, d));
            });
        }
    }
}

static void swiglu_differences() {
    const size_t N = 3;
    const int F = 5;
    DoubleDevice dev(1);
    std::vector<double> x = random_values<double>(N * 2 * F, 1, 4), out(N * F), d(N * 2 * F);
    const std::vector<double> dout = random_values<double>(N * F, 2);
    swiglu_backward(dev, d.data(), 2 * size_t(F), dout.data(), x.data(), N, F);
    double error = difference_error(x, d.data(), 1, [&] {
        swiglu_forward(dev, out.data(), x.data(), N, F);
        return dot_of(out, dout);
    });
    CHECK_ERROR("dgate_up", error, 1e-6);
}

// Gradients whose rows stand apart: the same bits, and nothing between the rows is touched.
static void elementwise_strides() {
    const size_t N = 5, gap = 3;
    const int C = 33, F = 17;
    DoubleDevice dev(2);
    const std::vector<double> x = random_values<double>(N * 2 * C, 1), dout = random_values<double>(N * C, 2),
                              w = random_values<double>(C, 3), rstd(N, 0.7);
    std::vector<double> dense(N * C, 0.25), dense2(N * 2 * F);
    rmsnorm_backward(dev, dense.data(), C, dout.data(), x.data(), rstd.data(), w.data(), N, C);
    swiglu_backward(dev, dense2.data(), 2 * F, dout.data(), x.data(), N, F);
    Guarded<double> apart(N * (C + gap)), apart2(N * (2 * F + gap));
    for (size_t i = 0; i < N * C; i++) {
        apart[i / C * (C + gap) + i % C] = 0.25;
    }
    rmsnorm_backward(dev, apart.data(), C + gap, dout.data(), x.data(), rstd.data(), w.data(), N, C);
    swiglu_backward(dev, apart2.data(), 2 * F + gap, dout.data(), x.data(), N, F);
    const auto check = [&](const char* name, const Guarded<double>& a, const std::vector<double>& d, size_t width) {
        CHECK_FENCES(a);
        for (size_t i = 0; i < a.n; i++) {
            size_t row = i / (width + gap), column = i % (width + gap);
            CHECK(column < width ? same_bits(&a[i], &d[row * width + column], 1) : std::isnan(a[i]),
                  "%s: row %zu, column %zu", name, row, column);
        }
    };
    check("rmsnorm_backward", apart, dense, C);
    check("swiglu_backward", apart2, dense2, 2 * F);
}

// Rows are long enough that several workers get some.
static void elementwise_threads() {
    const size_t N = 101;
    const int C = 2048;
    const std::vector<float> x = random_values<float>(N * C, 1), dout = random_values<float>(N * C, 2);
    const std::vector<float> w = random_values<float>(C, 3);
    for_each_tier([&](Cpu<float>& dev) {
        std::vector<float> first;
        for (int threads : {1, 2, 3}) {
            dev.threads = threads;
            std::vector<float> rstd(N), norm(N * C), dx(N * C), swiglu(N * C / 2), dgate_up(N * C);
            rmsnorm_rstd(dev, rstd.data(), x.data(), N, C, 1e-5);
            rmsnorm_forward(dev, norm.data(), x.data(), rstd.data(), w.data(), N, C);
            rmsnorm_backward(dev, dx.data(), size_t(C), dout.data(), x.data(), rstd.data(), w.data(), N, C);
            swiglu_forward(dev, swiglu.data(), x.data(), N, C / 2);
            swiglu_backward(dev, dgate_up.data(), size_t(C), dout.data(), x.data(), N, C / 2);
            for (const std::vector<float>* more : {&norm, &dx, &swiglu, &dgate_up}) {
                rstd.insert(rstd.end(), more->begin(), more->end());
            }
            first = threads == 1 ? rstd : first;
            CHECK(same_bits(first.data(), rstd.data(), first.size()), "%s: %d threads give other bits", dev.isa->name,
                  threads);
        }
    });
}

// Every 97th float from 0 to -104 and to 88.7: relative error at most 2e-7 where the result is normal, half the least
// float and 2e-7 below; and what lies beyond.
static void exp_sweep() {
    for_each_tier([&](Cpu<float>& dev) {
        double worst = 0, worst_at = 0, worst_small = 0;
        for (float end : {-104.0f, 88.7f}) {
            std::vector<float> x, y;
            uint32_t last;
            memcpy(&last, &end, 4);
            for (uint32_t bits = last & 0x80000000; bits <= last; bits += 97) {
                float f;
                memcpy(&f, &bits, 4);
                x.push_back(f);
                if (x.size() == 100000 || bits + 97 > last) {
                    y.assign(x.size(), 0);
                    row_kernels(dev).exp(y.data(), x.data(), x.size());
                    for (size_t i = 0; i < x.size(); i++) {
                        const double want = std::exp(double(x[i])), e = std::fabs(double(y[i]) - want);
                        if (want >= 1.1754943508222875e-38 && !(e / want <= worst)) {
                            worst = e / want;
                            worst_at = double(x[i]);
                        } else if (want < 1.1754943508222875e-38 && !(e <= worst_small)) {
                            worst_small = e;
                        }
                    }
                    x.clear();
                }
            }
        }
        CHECK(worst <= 2e-7, "%s: relative error %.3g at %.9g", dev.isa->name, worst, worst_at);
        // subnormal: two roundings of half the least float, and 2e-7 of the least normal one, which is less
        CHECK_ERROR(std::string(dev.isa->name) + ": subnormal", worst_small, 2 * 1.4012984643e-45);
        const float infinity = std::numeric_limits<float>::infinity();
        const float x[] = {-infinity, -1e30f, -104, -103.98f, 0, -0.0f, 89, 1e30f, infinity, std::nanf("")};
        float y[10];
        row_kernels(dev).exp(y, x, 10);
        CHECK(y[0] == 0 && y[1] == 0 && y[2] == 0 && y[3] == 0, "%s: not 0 far below: %g %g %g %g", dev.isa->name,
              double(y[0]), double(y[1]), double(y[2]), double(y[3]));
        CHECK(y[4] == 1 && y[5] == 1, "%s: exp(0) is %.9g, %.9g", dev.isa->name, double(y[4]), double(y[5]));
        CHECK(y[6] == infinity && y[7] == infinity && y[8] == infinity, "%s: not infinite above", dev.isa->name);
        CHECK(std::isnan(y[9]), "%s: exp(NaN) is %g", dev.isa->name, double(y[9]));
    });
}

// silu(g) u where exp(-g) is infinite or vanishes.
static void silu_ends() {
    for_each_tier([&](Cpu<float>& dev) {
        const float g[] = {0, -0.0f, -200, -89.5f, 200, 89.5f, std::nanf("")}, u[] = {2, 2, 2, 2, 2, 2, 2};
        float y[7];
        row_kernels(dev).silu_mul(y, g, u, 7);
        CHECK(y[0] == 0 && y[1] == 0 && y[2] == 0, "%s: %g %g %g", dev.isa->name, double(y[0]), double(y[1]),
              double(y[2]));
        CHECK_ERROR("-89.5", std::fabs(double(y[3])), 1e-36);  // the true value is -2.5e-37
        CHECK(y[4] == 400 && y[5] == 179, "%s: %g %g", dev.isa->name, double(y[4]), double(y[5]));
        CHECK(std::isnan(y[6]), "%s: NaN is lost", dev.isa->name);
    });
}

// Any alignment gives the same bits, and an elementwise row may be cut anywhere; nothing outside is touched.
static void rows_alignment() {
    const size_t n = 203;
    const std::vector<float> a = random_values<float>(n, 1, 5), b = random_values<float>(n, 2, 5);
    const std::vector<float> c = random_values<float>(n, 3, 5);
    for_each_tier([&](Cpu<float>& dev) {
        const RowKernels<float>& rows = row_kernels(dev);
        std::vector<float> first;
        for (size_t shift : {0, 1, 3, 8, 15}) {
            Guarded<float> x(n, shift), y(n, 15 - shift), z(n, shift), out(n, shift), two(n, shift);
            const auto reset = [&] {
                std::copy(a.begin(), a.end(), x.data());
                std::copy(b.begin(), b.end(), y.data());
                std::copy(c.begin(), c.end(), z.data());
            };
            std::vector<float> all;
            const auto keep = [&](const Guarded<float>& g) {
                CHECK(g.intact(), "%s: written outside", dev.isa->name);
                all.insert(all.end(), g.data(), g.data() + n);
            };
            reset();
            for (size_t begin : {size_t(0), size_t(67)}) {  // in two pieces
                const size_t m = begin ? n - begin : 67;
                rows.silu_mul(out.data() + begin, x.data() + begin, y.data() + begin, m);
            }
            keep(out);
            for (size_t begin : {size_t(0), size_t(50)}) {
                const size_t m = begin ? n - begin : 50;
                rows.norm_mul(out.data() + begin, x.data() + begin, 0.37f, y.data() + begin, m);
            }
            keep(out);
            rows.silu_mul_grad(out.data(), two.data(), z.data(), x.data(), y.data(), n);
            keep(out);
            keep(two);
            rows.norm_grad(x.data(), y.data(), z.data(), 0.37f, y.data(), n);
            keep(x);
            reset();
            rows.softmax_grad(x.data(), 4.5f, 0.01f, n);
            keep(x);
            reset();
            all.push_back(rows.dot(x.data(), y.data(), n));
            all.push_back(rows.row_max(x.data(), n));
            all.push_back(rows.exp_sum(x.data(), 5, n));
            first = first.empty() ? all : first;
            CHECK(same_bits(first.data(), all.data(), all.size()), "%s: shifted by %zu gives other bits", dev.isa->name,
                  shift);
        }
        // whole and in pieces
        std::vector<float> whole(n), pieces(n);
        rows.silu_mul(whole.data(), a.data(), b.data(), n);
        for (size_t i = 0; i < n; i += 5) {
            rows.silu_mul(&pieces[i], &a[i], &b[i], std::min(size_t(5), n - i));
        }
        CHECK(whole == pieces, "%s: silu_mul of pieces has other bits", dev.isa->name);
        rows.norm_mul(whole.data(), a.data(), 0.7f, b.data(), n);
        for (size_t i = 0; i < n; i += 5) {
            rows.norm_mul(&pieces[i], &a[i], 0.7f, &b[i], std::min(size_t(5), n - i));
        }
        CHECK(whole == pieces, "%s: norm_mul of pieces has other bits", dev.isa->name);
    });
}

// max, sum exp(x - max), exp(x - lse) scale of a row of logits; lengths around every vector width.
static void rows_softmax() {
    for (size_t n = 1; n <= 150; n += n < 70 ? 1 : 79) {
        std::vector<float> x = random_values<float>(n, n, 20);
        const float want_max = *std::max_element(x.begin(), x.end());
        double want_sum = 0;
        float plain_sum = 0;
        for (float value : x) {
            want_sum += std::exp(double(value) - double(want_max));
            plain_sum += std::exp(value - want_max);
        }
        const double sum_bound = std::max(2 * std::fabs(double(plain_sum) - want_sum), 4 * 6e-8 * want_sum);
        for_each_tier([&](Cpu<float>& dev) {
            Guarded<float> row(n);
            std::copy(x.begin(), x.end(), row.data());
            CHECK(row_kernels(dev).row_max(row.data(), n) == want_max, "%s: max of %zu", dev.isa->name, n);
            const double sum = double(row_kernels(dev).exp_sum(row.data(), want_max, n));
            CHECK_ERROR("sum", std::fabs(sum - want_sum), sum_bound);
            const float lse = want_max + std::log(float(want_sum));
            row_kernels(dev).softmax_grad(row.data(), lse, 0.25f, n);
            CHECK_FENCES(row);
            for (size_t i = 0; i < n; i++) {
                const double want = std::exp(double(x[i]) - double(lse)) * 0.25;
                // exp's own 2e-7, and the rounding of x - lse: 2^-25 of at most 64
                CHECK_ERROR("p", std::fabs(double(row[i]) - want) / want, 3e-7 + 2e-6);
            }
        });
    }
}

// ---- activations in bf16 ----

// Every 4,999th float: the nearer of the two neighbours in bf16, the even one between them; NaN stays NaN.
static void bf16_rounding() {
    std::vector<float> x = {std::nanf(""), -std::nanf("")};
    for (uint32_t special : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu, 0x7f7fffffu, 0x7f7f8000u, 0x7f7f7fffu,
                             0x7f800000u, 0xff800000u, 0x3f808000u, 0x3f818000u, 0x3f807fffu, 0x3f808001u, 0x00008000u,
                             0x00018000u, 0x80000001u, 0x00000000u, 0x80000000u}) {
        float f;
        memcpy(&f, &special, 4);
        x.push_back(f);
    }
    for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += 4999) {
        const uint32_t u = uint32_t(bits);
        float f;
        memcpy(&f, &u, 4);
        x.push_back(f);
    }
    const auto value = [](uint32_t upper) {  // of a bf16; what lies beyond the greatest as if there were more exponents
        const uint32_t u = upper << 16;
        float f;
        memcpy(&f, &u, 4);
        return std::isinf(f) ? std::ldexp(std::signbit(f) ? -1.0 : 1.0, 128) : double(f);
    };
    for_each_tier([&](Cpu<float>& dev) {
        const RowKernels<float, bf16>& rows = row_kernels(bf16_device(dev));
        Guarded<bf16> out(x.size(), 1);
        Guarded<float> back(x.size(), 3);
        rows.narrow(out.data(), x.data(), x.size());
        rows.widen(back.data(), out.data(), x.size());
        CHECK_FENCES(out);
        CHECK_FENCES(back);
        for (size_t i = 0; i < x.size(); i++) {
            uint32_t u, wide;
            memcpy(&u, &x[i], 4);
            memcpy(&wide, &back[i], 4);
            uint32_t want = u >> 16;  // towards zero
            if (std::isfinite(x[i])) {
                const double exact = double(x[i]);
                const double down = std::fabs(exact - value(want)), up = std::fabs(value(want + 1) - exact);
                want += up < down || (up == down && want % 2 == 1) ? 1 : 0;
            }
            const bool right = std::isnan(x[i]) ? is_nan(out[i]) && out[i].bits >> 15 == u >> 31 : out[i].bits == want;
            CHECK(right, "%s: %08x becomes %04x, want %04x", dev.isa->name, u, out[i].bits, want);
            CHECK(wide == uint32_t(out[i].bits) << 16, "%s: %04x is widened to %08x", dev.isa->name, out[i].bits, wide);
        }
    });
}

static void bf16_rmsnorm() {
    const double eps = 1e-5;
    for (size_t N : row_counts) {
        for (int C : odd_widths) {
            const size_t n = N * size_t(C), wide = size_t(C) + 3;
            const Stored x(n, 1, 3), dout(n, 2), before(n, 4);
            const std::vector<float> wf = random_values<float>(size_t(C), 3);
            const std::vector<double> w(wf.begin(), wf.end());
            const std::vector<double> rstd = plain_rstd(x.exact, N, size_t(C), eps);
            const std::vector<float> rstdf = plain_rstd(x.single, N, size_t(C), eps);
            const std::vector<double> rstd_used(rstdf.begin(), rstdf.end());  // what the others are given
            std::vector<double> y(n), dx = plain_norm_grad(dout.exact, x.exact, rstd_used, w, N, size_t(C));
            std::vector<float> yf(n), dxf = plain_norm_grad(dout.single, x.single, rstdf, wf, N, size_t(C));
            for (size_t i = 0; i < n; i++) {
                y[i] = x.exact[i] * rstd_used[i / size_t(C)] * w[i % size_t(C)];
                yf[i] = x.single[i] * rstdf[i / size_t(C)] * wf[i % size_t(C)];
                dx[i] += before.exact[i];
                dxf[i] += before.single[i];
            }
            for_each_tier([&](Cpu<float>& single) {
                Cpu<bf16> dev = bf16_device(single);
                const std::string name = dev.isa->name + (" " + std::to_string(N) + "x" + std::to_string(C));
                Guarded<float> r(N, 1), packed(n, 1);
                Guarded<bf16> out(n, 5), d(N * wide - 3, 7);
                rmsnorm_rstd(dev, r.data(), x.x.data(), N, C, eps);
                check_float(name + ": rstd", r, rstd, float_bound(rstdf, rstd));
                rmsnorm_forward(dev, out.data(), x.x.data(), rstdf.data(), wf.data(), N, C);
                check_stored(name + ": out", out, y, float_bound(yf, y));
                for (size_t row = 0; row < N; row++) {
                    row_kernels(dev).norm_mul_wide(packed.data() + row * size_t(C), x.x.data() + row * size_t(C),
                                                   rstdf[row], wf.data(), size_t(C));
                    std::copy_n(before.x.data() + row * size_t(C), C, d.data() + row * wide);
                }
                check_float(name + ": packed", packed, y, float_bound(yf, y));
                rmsnorm_backward(dev, d.data(), wide, dout.x.data(), x.x.data(), rstdf.data(), wf.data(), N, C);
                CHECK_FENCES(d);
                Guarded<bf16> dense(n);
                for (size_t i = 0; i < d.n; i++) {
                    if (i % wide < size_t(C)) {
                        dense[i / wide * size_t(C) + i % wide] = d[i];
                    } else {
                        CHECK(is_nan(d[i]), "%s: dx: written between the rows", name.c_str());
                    }
                }
                check_stored(name + ": dx", dense, dx, float_bound(dxf, dx));
            });
        }
    }
}

// Both directions, each from the same input.
static void bf16_rope() {
    for (int HS : {2, 14, 66, 80, 128, 202}) {
        const int heads = 2, positions = 9;
        const size_t N = 7, half = size_t(HS) / 2, stride = size_t(heads) * size_t(HS) + 5;
        std::vector<float> cosines(positions * half), sines(positions * half);
        for (size_t i = 0; i < cosines.size(); i++) {
            cosines[i] = float(std::cos(double(i)));
            sines[i] = float(std::sin(double(i)));
        }
        std::vector<int32_t> place(N);
        for (size_t i = 0; i < N; i++) {
            place[i] = int32_t((i * 7) % positions);
        }
        const Rope<float> rope = {cosines.data(), sines.data(), place.data(), heads, HS};
        const Stored x(N * stride, 1);
        for (bool inverse : {false, true}) {
            std::vector<double> want = x.exact;
            for (size_t i = 0; i < N * stride; i++) {
                const size_t row = i / stride, c = i % stride, lane = c % size_t(HS), pair = lane % half;
                if (c < size_t(heads) * size_t(HS)) {
                    const size_t at = size_t(place[row]) * half + pair;
                    const double sine = (lane < half ? -1 : 1) * (inverse ? -1 : 1) * double(sines[at]);
                    want[i] = x.exact[i] * double(cosines[at]) + x.exact[lane < half ? i + half : i - half] * sine;
                }
            }
            for_each_tier([&](Cpu<float>& single) {
                Cpu<bf16> dev = bf16_device(single);
                Guarded<bf16> q(N * stride, 3);
                std::copy(x.x.begin(), x.x.end(), q.data());
                inverse ? rope_backward(dev, q.data(), stride, rope, N) : rope_forward(dev, q.data(), stride, rope, N);
                // two products and a sum, each rounded by at most 2^-24 of 1 or of sqrt 2
                check_stored(dev.isa->name + (", head of " + std::to_string(HS)), q, want, 4 * 6e-8);
            });
        }
    }
}

static void bf16_swiglu() {
    for (size_t N : row_counts) {
        for (int F : odd_widths) {
            const size_t n = N * size_t(F), f = size_t(F);
            const Stored in(2 * n, 1, 12), dout(n, 2);
            std::vector<double> y(n), d = plain_swiglu_grad(dout.exact, in.exact, N, f);
            std::vector<float> yf(n), df = plain_swiglu_grad(dout.single, in.single, N, f);
            for (size_t i = 0; i < n; i++) {
                const size_t at = i / f * 2 * f + i % f;
                y[i] = plain_silu(in.exact[at]) * in.exact[at + f];
                yf[i] = plain_silu(in.single[at]) * in.single[at + f];
            }
            for_each_tier([&](Cpu<float>& single) {
                Cpu<bf16> dev = bf16_device(single);
                const std::string name = dev.isa->name + (" " + std::to_string(N) + "x" + std::to_string(F));
                Guarded<bf16> out(n, 1), back(2 * n, 3);
                Guarded<float> packed(n, 5);
                swiglu_forward(dev, out.data(), in.x.data(), N, F);
                check_stored(name + ": out", out, y, float_bound(yf, y));
                for (size_t row = 0; row < N; row++) {
                    const bf16* gate = in.x.data() + row * 2 * f;
                    row_kernels(dev).silu_mul_wide(packed.data() + row * f, gate, gate + f, f);
                }
                check_float(name + ": packed", packed, y, float_bound(yf, y));
                swiglu_backward(dev, back.data(), 2 * f, dout.x.data(), in.x.data(), N, F);
                check_stored(name + ": dgate_up", back, d, float_bound(df, d));
            });
        }
    }
}

// A value that is not finite stays where it is and keeps what it is.
static void bf16_not_finite() {
    const float infinity = std::numeric_limits<float>::infinity();
    for_each_tier([&](Cpu<float>& single) {
        Cpu<bf16> dev = bf16_device(single);
        const RowKernels<float, bf16>& rows = row_kernels(dev);
        for (size_t n : {size_t(5), size_t(70)}) {
            for (size_t at : {size_t(0), size_t(3), n - 1}) {
                std::vector<bf16> x(n, to_bf16(0.5f)), y(n, to_bf16(2)), out(n), two(n);
                const std::vector<float> w(n, 1), zero(n, 0);
                const auto check = [&](const char* name, const std::vector<bf16>& got, bool all) {
                    for (size_t i = 0; i < n; i++) {
                        CHECK(is_nan(got[i]) == (all || i == at), "%s: %s: element %zu of %zu, NaN at %zu",
                              dev.isa->name, name, i, n, at);
                    }
                };
                x[at] = to_bf16(std::nanf(""));
                rows.silu_mul(out.data(), x.data(), y.data(), n);
                check("silu_mul", out, false);
                rows.silu_mul_grad(out.data(), two.data(), y.data(), x.data(), y.data(), n);
                check("dgate", out, false);
                check("dup", two, false);
                rows.norm_mul(out.data(), x.data(), 1, w.data(), n);
                check("norm_mul", out, false);
                CHECK(std::isnan(rows.dot(x.data(), y.data(), n)), "%s: dot loses NaN", dev.isa->name);
                out = y;
                rows.norm_grad(out.data(), y.data(), x.data(), 1, w.data(), n);  // through the mean
                check("norm_grad", out, true);
                out = x;
                two = y;
                rows.rotate(out.data(), two.data(), w.data(), w.data(), n, false);
                check("rotate", out, false);
                check("rotate, second half", two, false);
                x[at] = to_bf16(-infinity);
                rows.norm_mul(out.data(), x.data(), 1, w.data(), n);
                CHECK(to_float(out[at]) == -infinity, "%s: -infinity becomes %g", dev.isa->name,
                      double(to_float(out[at])));
            }
        }
        const bf16 g[] = {to_bf16(0), to_bf16(-200), to_bf16(200), to_bf16(infinity)};
        const bf16 u[] = {to_bf16(2), to_bf16(2), to_bf16(2), to_bf16(3e38f)};
        bf16 y[4];
        rows.silu_mul(y, g, u, 4);
        CHECK(to_float(y[0]) == 0 && to_float(y[1]) == 0 && to_float(y[2]) == 400 && to_float(y[3]) == infinity,
              "%s: %g %g %g %g", dev.isa->name, double(to_float(y[0])), double(to_float(y[1])),
              double(to_float(y[2])), double(to_float(y[3])));
    });
}

// What every elementwise kernel makes of n elements, in pieces of `piece`, from memory that is shifted.
static std::vector<bf16> bf16_pieces(const RowKernels<float, bf16>& rows, size_t n, size_t piece, size_t shift) {
    const Stored a(n, 1, 5), b(n, 2, 5), c(n, 3, 5);
    const std::vector<float> w = random_values<float>(n, 4);
    Guarded<bf16> x(n, shift), y(n, 15 - shift), z(n, shift), out(n, shift), two(n, 31 - shift);
    Guarded<float> real(n, shift);
    std::copy(a.x.begin(), a.x.end(), x.data());
    std::copy(b.x.begin(), b.x.end(), y.data());
    std::copy(c.x.begin(), c.x.end(), z.data());
    std::vector<bf16> all;
    const auto keep = [&](const Guarded<bf16>& g) {
        CHECK_FENCES(g);
        all.insert(all.end(), g.data(), g.data() + n);
    };
    const auto keep_real = [&] {
        CHECK_FENCES(real);
        const bf16* halves = reinterpret_cast<const bf16*>(real.data());
        all.insert(all.end(), halves, halves + 2 * n);
    };
    const auto in_pieces = [&](const auto& fn) {
        for (size_t i = 0; i < n; i += piece) {
            fn(i, std::min(piece, n - i));
        }
    };
    in_pieces([&](size_t i, size_t m) { rows.norm_mul(&out[i], &x[i], 0.37f, &w[i], m); });
    keep(out);
    in_pieces([&](size_t i, size_t m) { rows.norm_mul_wide(&real[i], &x[i], 0.37f, &w[i], m); });
    keep_real();
    in_pieces([&](size_t i, size_t m) { rows.narrow(&out[i], &real[i], m); });
    keep(out);
    in_pieces([&](size_t i, size_t m) { rows.widen(&real[i], &y[i], m); });
    keep_real();
    const size_t unfused = all.size();
    in_pieces([&](size_t i, size_t m) { rows.silu_mul(&out[i], &x[i], &y[i], m); });
    keep(out);
    in_pieces([&](size_t i, size_t m) { rows.silu_mul_wide(&real[i], &x[i], &y[i], m); });
    keep_real();
    in_pieces([&](size_t i, size_t m) { rows.silu_mul_grad(&out[i], &two[i], &z[i], &x[i], &y[i], m); });
    keep(out);
    keep(two);
    in_pieces([&](size_t i, size_t m) { rows.rotate(&x[i], &y[i], &w[i], &real[i], m, true); });
    keep(x);
    keep(y);
    CHECK(unfused == 6 * n, "%zu", unfused);
    return all;
}

// Any alignment and any cut give the same bits. So do avx2 and avx512, lane by lane the same operations; ref as well
// where nothing is fused: in norm_mul, and where bf16 is widened and rounded. (Sums depend on the width of a vector.)
static void bf16_same_bits() {
    const size_t n = 203;
    std::vector<bf16> of_tier[2];
    for_each_tier([&](Cpu<float>& single) {
        Cpu<bf16> dev = bf16_device(single);
        const RowKernels<float, bf16>& rows = row_kernels(dev);
        const std::vector<bf16> first = bf16_pieces(rows, n, n, 0);
        for (size_t piece : {size_t(1), size_t(5), size_t(67), n}) {
            for (size_t shift : {0, 1, 8, 15}) {
                const std::vector<bf16> got = bf16_pieces(rows, n, piece, shift);
                CHECK(same_bits(first.data(), got.data(), first.size()), "%s: pieces of %zu, shifted by %zu",
                      dev.isa->name, piece, shift);
            }
        }
        const Stored a(n, 1), b(n, 2), c(n, 3);
        const std::vector<float> w = random_values<float>(n, 4);
        std::vector<bf16> dx;
        for (size_t shift : {0, 1, 8, 15}) {  // the two kernels with a sum
            Guarded<bf16> x(n, shift), y(n, 15 - shift), d(n, shift);
            std::copy(a.x.begin(), a.x.end(), x.data());
            std::copy(b.x.begin(), b.x.end(), y.data());
            std::copy(c.x.begin(), c.x.end(), d.data());
            const float sum = rows.dot(x.data(), y.data(), n);
            rows.norm_grad(d.data(), y.data(), x.data(), 0.37f, w.data(), n);
            CHECK_FENCES(d);
            std::vector<bf16> got(d.data(), d.data() + n);
            got.resize(n + 2);
            memcpy(&got[n], &sum, 4);
            dx = dx.empty() ? got : dx;
            CHECK(same_bits(dx.data(), got.data(), got.size()), "%s: sums, shifted by %zu", dev.isa->name, shift);
        }
        const bool fused = strcmp(dev.isa->name, "ref") != 0;
        for (bool what : {false, true}) {
            std::vector<bf16>& other = of_tier[what];
            if (what && !fused) {
                continue;
            }
            other = other.empty() ? first : other;
            CHECK(same_bits(other.data(), first.data(), what ? first.size() : 6 * n),
                  "%s: other bits than another tier's", dev.isa->name);
        }
    });
}

static void bf16_threads() {
    const size_t N = 101;
    const int C = 2048;
    const Stored x(N * C, 1), dout(N * C, 2);
    const std::vector<float> w = random_values<float>(C, 3);
    std::vector<int32_t> place(N);
    std::vector<float> cosines(C / 2, 0.6f), sines(C / 2, 0.8f);
    const Rope<float> rope = {cosines.data(), sines.data(), place.data(), 1, C};
    for_each_tier([&](Cpu<float>& single) {
        Cpu<bf16> dev = bf16_device(single);
        std::vector<bf16> first;
        for (int threads : {1, 2, 3}) {
            dev.threads = threads;
            std::vector<float> rstd(N);
            std::vector<bf16> norm(N * C), dx = dout.x, swiglu(N * C / 2), dgate_up(N * C), q = x.x;
            rmsnorm_rstd(dev, rstd.data(), x.x.data(), N, C, 1e-5);
            rmsnorm_forward(dev, norm.data(), x.x.data(), rstd.data(), w.data(), N, C);
            rmsnorm_backward(dev, dx.data(), size_t(C), dout.x.data(), x.x.data(), rstd.data(), w.data(), N, C);
            swiglu_forward(dev, swiglu.data(), x.x.data(), N, C / 2);
            swiglu_backward(dev, dgate_up.data(), size_t(C), dout.x.data(), x.x.data(), N, C / 2);
            rope_forward(dev, q.data(), size_t(C), rope, N);
            for (const std::vector<bf16>* more : {&dx, &swiglu, &dgate_up, &q}) {
                norm.insert(norm.end(), more->begin(), more->end());
            }
            first = threads == 1 ? norm : first;
            CHECK(same_bits(first.data(), norm.data(), first.size()), "%s: %d threads give other bits", dev.isa->name,
                  threads);
        }
    });
}

extern const Test elementwise_tests[] = {{"embedding_rows", embedding_rows},
                                         {"rmsnorm_formula", rmsnorm_formula},
                                         {"rmsnorm_differences", rmsnorm_differences},
                                         {"rope_formula", rope_formula},
                                         {"rope_gradient", rope_gradient},
                                         {"swiglu_formula", swiglu_formula},
                                         {"swiglu_differences", swiglu_differences},
                                         {"elementwise_strides", elementwise_strides},
                                         {"elementwise_threads", elementwise_threads},
                                         {"exp_sweep", exp_sweep},
                                         {"silu_ends", silu_ends},
                                         {"rows_alignment", rows_alignment},
                                         {"rows_softmax", rows_softmax},
                                         {"bf16_rounding", bf16_rounding},
                                         {"bf16_rmsnorm", bf16_rmsnorm},
                                         {"bf16_rope", bf16_rope},
                                         {"bf16_swiglu", bf16_swiglu},
                                         {"bf16_not_finite", bf16_not_finite},
                                         {"bf16_same_bits", bf16_same_bits},
                                         {"bf16_threads", bf16_threads},
                                         {nullptr, nullptr}};
