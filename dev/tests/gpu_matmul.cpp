// Dense products on the GPU: every transpose, type, leading dimension, alpha and beta, C in place and apart, against
// sums in double.
#include <algorithm>

#include "dev/tests/gpu.h"
#include "kernels/matmul.h"

namespace {

struct Shape {
    size_t M, N, K;
};
const Shape shapes[] = {{1, 1, 1}, {33, 17, 70}, {16, 48, 101}, {70, 24, 33}, {1, 112, 48}, {5, 3, 200}};

struct Scalars {
    float alpha, beta;
    int c;  // 0: none, 1: D itself, 2: apart
};
const Scalars scalars[] = {{1, 0, 0}, {0.5f, 1, 1}, {-1.5f, 0.25f, 2}, {1, 1, 2}, {2, 0, 2}};

// Rows of `width` numbers, ld apart; what stands between them is the poison of GpuBuffer.
template <class T>
std::vector<T> spaced(const std::vector<double>& x, size_t rows, size_t width, size_t ld) {
    std::vector<T> out(rows * ld);
    memset(static_cast<void*>(out.data()), 0xff, out.size() * sizeof(T));
    for (size_t i = 0; i < rows; i++) {
        for (size_t j = 0; j < width; j++) {
            out[i * ld + j] = stored<T>(x[i * width + j]);
        }
    }
    return out;
}

template <class X, class Out>
void check_product(Gpu<X>& dev, const Shape& s, bool a_trans, bool b_trans, const Scalars& k, size_t pad) {
    const size_t a_rows = a_trans ? s.K : s.M, a_cols = a_trans ? s.M : s.K, b_rows = b_trans ? s.N : s.K,
                 b_cols = b_trans ? s.K : s.N;
    const std::vector<double> a = random_stored<X>(a_rows * a_cols, 1), b = random_stored<X>(b_rows * b_cols, 2),
                              c = random_stored<Out>(s.M * s.N, 3);
    GpuBuffer<X, X> da(dev, spaced<X>(a, a_rows, a_cols, a_cols + pad), pad),
        db(dev, spaced<X>(b, b_rows, b_cols, b_cols + 2 * pad));
    const size_t ldd = s.N + pad, ldc = k.c == 2 ? s.N + 3 * pad : ldd;
    GpuBuffer<Out, X> dc(dev, spaced<Out>(c, s.M, s.N, ldc)), dd(dev, s.M * ldd, pad);
    if (k.c == 1) {
        dd.set(spaced<Out>(c, s.M, s.N, ldd));
    }
    Matmul<X, Out> p;
    p.d = dd.data();
    p.ldd = ldd;
    p.a = da.data();
    p.lda = a_cols + pad;
    p.a_trans = a_trans;
    p.b = db.data();
    p.ldb = b_cols + 2 * pad;
    p.b_trans = b_trans;
    p.c = k.c == 0 ? nullptr : k.c == 1 ? dd.data() : dc.data();
    p.ldc = ldc;
    p.M = s.M;
    p.N = s.N;
    p.K = s.K;
    p.alpha = k.alpha;
    p.beta = k.beta;
    matmul(dev, p);
    const std::vector<Out> raw = dd.get();

    std::vector<double> exact(s.M * s.N), plain(s.M * s.N), got(s.M * s.N);
    bool between = true;
    for (size_t i = 0; i < s.M; i++) {
        for (size_t j = 0; j < s.N; j++) {
            double sum = 0;
            float rough = 0;
            for (size_t l = 0; l < s.K; l++) {
                const double x = a[a_trans ? l * s.M + i : i * s.K + l], y = b[b_trans ? j * s.K + l : l * s.N + j];
                sum += x * y;
                rough += float(x) * float(y);
            }
            const size_t at = i * s.N + j;
            const double old = k.c == 0 || k.beta == 0 ? 0 : k.beta * c[at];
            exact[at] = k.alpha * sum + old;
            plain[at] = rounded<Out>(double(k.alpha * rough + float(old)));
            got[at] = number(raw[i * ldd + j]);
        }
        for (size_t j = s.N; j < ldd; j++) {
            between &= std::isnan(number(raw[i * ldd + j]));
        }
    }
    const std::string what = "(" + std::to_string(s.M) + ", " + std::to_string(s.N) + ", " + std::to_string(s.K) + ")" +
                             (a_trans ? " T" : " N") + (b_trans ? "T" : "N") + " c " + std::to_string(k.c) + " pad " +
                             std::to_string(pad);
    check_yardstick<Out>(what, got, plain, exact);
    CHECK(between, "%s: written between the rows of D", what.c_str());
    CHECK_FENCES(dd);
    matmul(dev, p);
    if (k.c != 1) {
        const std::vector<Out> again = dd.get();
        CHECK(memcmp(again.data(), raw.data(), raw.size() * sizeof(Out)) == 0, "%s: other bits the second time",
              what.c_str());
    }
}

template <class X, class Out>
void check_products() {
    GpuDevice<X> dev;
    for (const Shape& s : shapes) {
        for (int trans = 0; trans < 4 && dev.ok; trans++) {
            for (const Scalars& k : scalars) {
                const size_t pads[] = {0, 3, 8}, turn = size_t(trans) + size_t(&k - scalars) + size_t(&s - shapes);
                check_product<X, Out>(dev, s, trans & 1, trans & 2, k, pads[turn % 3]);
            }
        }
    }
}

void matmul_bf16() {
    check_products<bf16, bf16>();
}
void matmul_bf16_float() {
    check_products<bf16, float>();
}
void matmul_float() {
    check_products<float, float>();
}

// Plans are kept: products that differ in one thing only must not take each other's.
void matmul_plans() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    for (int round = 0; round < 2; round++) {
        for (size_t pad : {0, 8, 3}) {
            check_product<bf16, bf16>(dev, {16, 16, 16}, false, false, {1, 1, 2}, pad);
            check_product<bf16, bf16>(dev, {16, 16, 16}, false, true, {1, 1, 1}, pad);
            check_product<bf16, bf16>(dev, {16, 16, 16}, true, false, {1, 0, 0}, pad);
            check_product<bf16, float>(dev, {16, 16, 16}, true, false, {2, 1, 2}, pad);
        }
    }
    // C alone has other rows, or stands elsewhere; then D.
    const std::vector<double> x = random_stored<bf16>(16 * 16, 1);
    GpuBuffer<bf16, bf16> a(dev, stored_values<bf16>(x)), c(dev, 16 * 32), d(dev, 16 * 16 + 1);
    c.set(stored_values<bf16>(random_stored<bf16>(16 * 32, 2)));
    for (const size_t ldc : {16, 32}) {
        for (const size_t shift : {0, 1}) {
            Matmul<bf16, bf16> p;
            p.a = p.b = a.data();
            p.lda = p.ldb = p.ldd = p.M = p.N = p.K = 16;
            p.c = c.data() + 8 * shift;
            p.ldc = ldc - 8 * shift * (ldc == 32);
            p.d = d.data() + shift;
            p.alpha = 0;
            p.beta = 1;
            matmul(dev, p);
            const std::vector<double> from = numbers(c.get()), got = numbers(d.get());
            bool same = true;
            for (size_t i = 0; i < 16; i++) {
                for (size_t j = 0; j < 16; j++) {
                    same &= got[i * 16 + j + shift] == from[i * p.ldc + j + 8 * shift];
                }
            }
            CHECK(same, "C with rows %zu apart, %zu elements on: not copied", p.ldc, 8 * shift);
        }
    }
}

// A C that is not wanted may hold anything.
void matmul_ignores_c() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    GpuBuffer<bf16, bf16> a(dev, stored_values<bf16>({1, 2, 3, 4})), b(dev, stored_values<bf16>({5, 6, 7, 8})),
        d(dev, 4);
    Matmul<bf16, bf16> p;
    p.d = d.data();
    p.a = a.data();
    p.b = b.data();
    p.ldd = p.lda = p.ldb = p.M = p.N = p.K = 2;
    p.beta = 1;  // of no C
    matmul(dev, p);
    CHECK(numbers(d.get()) == (std::vector<double>{19, 22, 43, 50}), "beta took part without a C");
}

template <class X>
void check_speed() {
    GpuDevice<X> dev(3 * 128 * 128 * sizeof(X));
    if (dev.ok) {
        const double gflops = matmul_gflops(static_cast<Gpu<X>&>(dev));
        CHECK(gflops > 0 && std::isfinite(gflops), "%g GFLOP/s", gflops);
        GpuDevice<X> none;
        CHECK(matmul_gflops(static_cast<Gpu<X>&>(none)) == 0, "a speed without workspace");
    }
}
void matmul_speed() {
    check_speed<bf16>();
    check_speed<float>();
}

}  // namespace

extern const Test gpu_matmul_tests[] = {{"gpu_matmul_bf16", matmul_bf16},
                                        {"gpu_matmul_bf16_float", matmul_bf16_float},
                                        {"gpu_matmul_float", matmul_float},
                                        {"gpu_matmul_plans", matmul_plans},
                                        {"gpu_matmul_ignores_c", matmul_ignores_c},
                                        {"gpu_matmul_speed", matmul_speed},
                                        {nullptr, nullptr}};
