// The optimizer against PyTorch, sums and searches over flat buffers.
#include "kernels/cpu/adamw.h"

#include "dev/tests/ops.h"

// Element i of input k, in any language: a hash of both, to -size .. size.
static float hashed(uint32_t i, uint32_t k, double size) {
    uint32_t x = i * 2654435761u + k * 40503u;
    x = (x ^ x >> 16) * 2246822519u;
    x = (x ^ x >> 13) * 3266489917u;
    return float((double(x ^ x >> 16) / 4294967296.0 * 2 - 1) * size);
}

// FNV-1a, 64 bits, over the bytes.
static uint64_t fingerprint(const float* x, size_t n) {
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(x);
    uint64_t hash = 1469598103934665603u;
    for (size_t i = 0; i < n * sizeof(float); i++) {
        hash = (hash ^ bytes[i]) * 1099511628211u;
    }
    return hash;
}

// p = hashed(i, 1, 0.5), m = v = 0, then `steps` steps with g = hashed(i, 9 + step, 0.02). The values are those of
// torch 2.15.0 (CPU, AVX-512), torch.optim.AdamW(foreach=False, fused=False), g times float32(grad_scale) beforehand:
// p8, m8, v8 the first 8 elements; m_hash, v_hash over 5,000. p_hash is over the same torch operations with numpy's
// square root, because torch takes it from a vector library that rounds one in six wrongly.
struct TorchRun {
    AdamW a;
    int steps;
    float p8[8], m8[8], v8[8];
    uint64_t p_hash, m_hash, v_hash;
};

static const TorchRun torch_runs[] = {
    {{0.001, 0.9, 0.999, 1e-08, 0.0, 0, 1.0},
     1,
     {-0x1.640c94p-2f, 0x1.122ce4p-4f, 0x1.32164p-2f, -0x1.58cdb6p-5f, -0x1.fa30cap-2f, -0x1.b178dep-2f, 0x1.5d593p-4f,
      -0x1.263dacp-3f},
     {0x1.c0acd6p-14f, 0x1.40d0cp-13f, -0x1.77342ep-10f, -0x1.c883eep-11f, 0x1.1dfd7cp-10f, -0x1.a7badp-12f,
      0x1.837adep-14f, -0x1.012906p-12f},
     {0x1.3a8bc2p-30f, 0x1.41a20ap-29f, 0x1.b7ee52p-23f, 0x1.45a282p-24f, 0x1.ff309ap-24f, 0x1.188ac2p-26f,
      0x1.d53094p-31f, 0x1.9d5238p-28f},
     0x5f366007abb30eb7,
     0x60e6bbe567c65516,
     0x6701f302d54c8eeb},
    {{0.0003, 0.9, 0.95, 1e-08, 0.1, 0, 0.37},
     5,
     {-0x1.62ff14p-2f, 0x1.16a53ep-4f, 0x1.31a0a6p-2f, -0x1.5a3dfap-5f, -0x1.f93d9ep-2f, -0x1.b167acp-2f,
      0x1.5e5368p-4f, -0x1.27d0c6p-3f},
     {-0x1.583f58p-10f, -0x1.1e2376p-13f, -0x1.4253fep-11f, -0x1.f75066p-11f, 0x1.4d1134p-12f, -0x1.0aadcp-14f,
      -0x1.6dc0d6p-14f, 0x1.e850c8p-11f},
     {0x1.252f8ep-18f, 0x1.b0071ap-20f, 0x1.455912p-18f, 0x1.92b8p-19f, 0x1.6770e6p-18f, 0x1.05b37ap-18f,
      0x1.2dca02p-19f, 0x1.021766p-18f},
     0x120335399c5473f4,
     0x6d18df26ba05db3d,
     0x7faa82b3ac0685c2},
    {{0.01, 0.3, 0.99, 1e-06, 0.01, 0, 1.0},
     3,
     {-0x1.6d5d7cp-2f, 0x1.0e5772p-4f, 0x1.3539e8p-2f, -0x1.dd1f48p-6f, -0x1.f2f34ap-2f, -0x1.90d598p-2f,
      0x1.f9db7ap-5f, -0x1.0d979p-3f},
     {-0x1.78f494p-7f, 0x1.c0d3dap-10f, 0x1.78749p-7f, -0x1.7dad32p-8f, -0x1.77d858p-7f, -0x1.d2a6d8p-7f,
      0x1.9c40f4p-9f, 0x1.1345cep-7f},
     {0x1.c4005ep-19f, 0x1.de0252p-20f, 0x1.57da24p-18f, 0x1.068feep-19f, 0x1.544368p-18f, 0x1.02531cp-18f,
      0x1.5292c4p-19f, 0x1.acbe5cp-19f},
     0x9c6288ae5874f9b,
     0xfd24f0b1be875e7,
     0xad6eee95eb34cd68},
};

static const size_t N = 5000;

template <class X>
static void run_steps(Cpu<X>& dev, const TorchRun& run, size_t n, X* p, X* m, X* v) {
    for (size_t i = 0; i < n; i++) {
        p[i] = X(hashed(uint32_t(i), 1, 0.5));
        m[i] = v[i] = 0;
    }
    std::vector<X> g(n);
    for (int step = 1; step <= run.steps; step++) {
        for (size_t i = 0; i < n; i++) {
            g[i] = X(hashed(uint32_t(i), uint32_t(9 + step), 0.02));
        }
        AdamW a = run.a;
        a.step = step;
        adamw_update(dev, p, m, v, g.data(), n, a);
    }
}

// The tiers with fused multiply-add give torch's bits. Without it each step rounds m and v once more: 2^-24 of the
// greatest term, which is 0.02 for m, 0.0004 for v; p moves by about lr a step and is itself rounded, at most 0.5.
static void adamw_torch() {
    for (const TorchRun& run : torch_runs) {
        for_each_tier([&](Cpu<float>& dev) {
            Guarded<float> p(N), m(N), v(N);
            run_steps(dev, run, N, p.data(), m.data(), v.data());
            const std::string name = std::string(dev.isa->name) + ", lr " + std::to_string(run.a.lr);
            if (std::string(dev.isa->name) != "ref") {
                CHECK(fingerprint(p.data(), N) == run.p_hash, "%s: p has other bits", name.c_str());
                CHECK(fingerprint(m.data(), N) == run.m_hash, "%s: m has other bits", name.c_str());
                CHECK(fingerprint(v.data(), N) == run.v_hash, "%s: v has other bits", name.c_str());
            }
            const double unit = 6e-8 * run.steps;
            CHECK_ERROR(name + ": p", greatest_error(p.data(), run.p8, 8), 2 * unit * 0.5);
            CHECK_ERROR(name + ": m", greatest_error(m.data(), run.m8, 8), 2 * unit * 0.02);
            CHECK_ERROR(name + ": v", greatest_error(v.data(), run.v8, 8), 2 * unit * 0.0004);
            CHECK_FENCES(p);
            CHECK_FENCES(m);
            CHECK_FENCES(v);
        });
        // The whole buffer against the formula in double, through the ref tier's operations on Cpu<double>. float p at
        // 0.5 rounds by 3e-8 a step, in three operations; an update of at most 3 lr by 2^-22 of itself.
        DoubleDevice exact(1);
        std::vector<double> want(N), want_m(N), want_v(N);
        run_steps(exact, run, N, want.data(), want_m.data(), want_v.data());
        for_each_tier([&](Cpu<float>& dev) {
            std::vector<float> p(N), m(N), v(N);
            run_steps(dev, run, N, p.data(), m.data(), v.data());
            CHECK_ERROR(std::string(dev.isa->name) + ": p against double", greatest_error(p.data(), want.data(), N),
                        run.steps * (3 * 3e-8 + 3 * run.a.lr * 5e-7));
        });
    }
}

// One element in double, worked out here: the first step of Adam moves p by lr against the sign of g.
static void adamw_formula() {
    DoubleDevice dev(1);
    double p = 2, m = 0.5, v = 0.25, g = -3;
    adamw_update(dev, &p, &m, &v, &g, 1, AdamW{0.01, 0.8, 0.9, 1e-3, 0.2, 3, 0.5});
    const double grad = -1.5, mean = 0.8 * 0.5 + 0.2 * grad, square = 0.9 * 0.25 + 0.1 * grad * grad;
    const double want = 2 * (1 - 0.01 * 0.2) - 0.01 / (1 - 0.8 * 0.8 * 0.8) * mean /
                                                   (std::sqrt(square) / std::sqrt(1 - 0.9 * 0.9 * 0.9) + 1e-3);
    CHECK_ERROR("m", std::fabs(m - mean), 1e-15);
    CHECK_ERROR("v", std::fabs(v - square), 1e-15);
    CHECK_ERROR("p", std::fabs(p - want), 1e-15);
    double q = 1, qm = 0, qv = 0, qg = 1e-3;
    adamw_update(dev, &q, &qm, &qv, &qg, 1, AdamW{0.01, 0.9, 0.999, 0, 0, 1, 1});
    CHECK_ERROR("first step", std::fabs(q - (1 - 0.01)), 1e-15);
}

static void adamw_threads() {
    const TorchRun& run = torch_runs[1];
    const size_t n = 100003;
    for_each_tier([&](Cpu<float>& dev) {
        std::vector<float> p(n), m(n), v(n);
        dev.threads = 1;
        run_steps(dev, run, n, p.data(), m.data(), v.data());
        for (int threads : {2, 3}) {
            std::vector<float> q(n), qm(n), qv(n);
            dev.threads = threads;
            run_steps(dev, run, n, q.data(), qm.data(), qv.data());
            CHECK(p == q && m == qm && v == qv, "%s: %d threads give other bits", dev.isa->name, threads);
        }
    });
}

// Sums of integers are exact in double; a wide range of sizes must not lose the small ones.
static void sum_squares_exact() {
    for_each_tier([&](Cpu<float>& dev) {
        for (size_t n : {size_t(0), size_t(1), size_t(255), size_t(257), size_t(70001)}) {
            std::vector<float> x(n);
            double want = 0;
            for (size_t i = 0; i < n; i++) {
                x[i] = float(i % 1000) - 500;
                want += double(x[i]) * double(x[i]);
            }
            double got = sum_squares(dev, x.data(), n);
            CHECK(got == want, "%zu: %.17g, not %.17g", n, got, want);
        }
        const size_t n = 300001;
        std::vector<float> x = random_values<float>(n, 5);
        x[7] = 1e15f;  // its square, 1e30, would be the whole of a float sum
        dev.threads = 1;
        const double one = sum_squares(dev, x.data(), n);
        for (int threads : {2, 3, 5}) {
            dev.threads = threads;
            CHECK(sum_squares(dev, x.data(), n) == one, "%d threads give other bits", threads);
        }
        x[7] = 0;
        CHECK_ERROR("mean square", std::fabs(sum_squares(dev, x.data(), n) / double(n) - 1.0 / 3),
                    5 * std::sqrt(4.0 / 45 / double(n)));  // 5 standard deviations of uniform numbers
        x[3] = 3e30f;
        CHECK_ERROR("beyond float", std::fabs(sum_squares(dev, x.data(), n) / (double(3e30f) * double(3e30f)) - 1),
                    1e-15);
        x[3] = std::numeric_limits<float>::quiet_NaN();
        CHECK(std::isnan(sum_squares(dev, x.data(), n)), "NaN is lost");
    });
}

static void nonfinite_first() {
    for_each_tier([&](Cpu<float>& dev) {
        for (size_t n : {size_t(1), size_t(300), size_t(100000)}) {
            std::vector<float> x(n, std::numeric_limits<float>::max());
            CHECK(first_nonfinite(dev, x.data(), n) == n, "all of %zu are finite", n);
            x[n - 1] = std::numeric_limits<float>::infinity();
            CHECK(first_nonfinite(dev, x.data(), n) == n - 1, "infinity at the end of %zu", n);
            x[n / 2] = -std::numeric_limits<float>::infinity();
            CHECK(first_nonfinite(dev, x.data(), n) == n / 2, "-infinity in the middle of %zu", n);
            x[n / 3] = std::numeric_limits<float>::quiet_NaN();
            CHECK(first_nonfinite(dev, x.data(), n) == n / 3, "NaN in the first third of %zu", n);
        }
        CHECK(first_nonfinite(dev, static_cast<const float*>(nullptr), 0) == 0, "of nothing");
    });
}

extern const Test adamw_tests[] = {{"adamw_torch", adamw_torch},         {"adamw_formula", adamw_formula},
                                   {"adamw_threads", adamw_threads},     {"sum_squares_exact", sum_squares_exact},
                                   {"nonfinite_first", nonfinite_first}, {nullptr, nullptr}};
