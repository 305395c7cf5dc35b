// The optimizer on the GPU: the bits of the CPU's fused tiers (which are PyTorch's), sums, the search for what is not
// finite.
#include <algorithm>

#include "dev/tests/gpu.h"

namespace {

template <class X>
struct OptimizerDevice : GpuDevice<X> {
    OptimizerDevice() {
        if (this->ok) {
            device_reserve(*this, optimizer_workspace(*this));
        }
    }
};

const AdamW adamw_settings[] = {
    {0.001, 0.9, 0.999, 1e-08, 0.0, 0, 1.0},
    {0.0003, 0.9, 0.95, 1e-08, 0.1, 0, 0.37},
    {0.01, 0.3, 0.99, 1e-06, 0.01, 0, 1.0},  // beta1 below a half: lerp's other branch
};

struct AdamWState {
    std::vector<float> p, m, v;
};

AdamWState adamw_start(size_t n) {
    return {random_values<float>(n, 1, 0.5), std::vector<float>(n), std::vector<float>(n)};
}

std::vector<float> adamw_gradient(size_t n, int step) {
    return random_values<float>(n, 9 + uint64_t(step), 0.02);
}

// Ten steps on a CPU tier.
AdamWState adamw_cpu(const char* tier, AdamW a, size_t n) {
    Cpu<float> dev;
    device_open(dev, 1);
    dev.isa = cpu_isa_choose(tier);
    AdamWState s;
    if (dev.isa) {
        s = adamw_start(n);
        for (a.step = 1; a.step <= 10; a.step++) {
            adamw_update(dev, s.p.data(), s.m.data(), s.v.data(), adamw_gradient(n, int(a.step)).data(), n, a);
        }
    }
    device_close(dev);
    return s;
}

template <class X>
void adamw_of_type() {
    OptimizerDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    for (const AdamW& setting : adamw_settings) {
        for (size_t n : {size_t(1), size_t(7), size_t(5003)}) {
            const std::string name = "lr " + std::to_string(setting.lr) + ", n " + std::to_string(n);
            AdamW a = setting;
            DoubleDevice exact(1);
            const AdamWState start = adamw_start(n);
            std::vector<double> p64(start.p.begin(), start.p.end()), m64(n), v64(n);
            for (a.step = 1; a.step <= 10; a.step++) {
                const std::vector<float> g = adamw_gradient(n, int(a.step));
                adamw_update(exact, p64.data(), m64.data(), v64.data(), std::vector<double>(g.begin(), g.end()).data(),
                             n, a);
            }
            for (size_t shift : {0, 1}) {
                GpuBuffer<float, X> p(dev, start.p, shift), m(dev, start.m, shift), v(dev, start.v, shift);
                for (a.step = 1; a.step <= 10; a.step++) {
                    GpuBuffer<float, X> g(dev, adamw_gradient(n, int(a.step)), shift);
                    const size_t bad = adamw_update(dev, p.data(), m.data(), v.data(), g.data(), n, a);
                    CHECK(bad == n, "%s: element %zu is said not to be finite", name.c_str(), bad);
                }
                CHECK(p.intact() && m.intact() && v.intact(), "%s: written outside", name.c_str());
                const std::vector<float> pf = p.get(), mf = m.get(), vf = v.get();
                // p at 0.5 rounds by 3e-8 a step, in three operations; an update of at most 3 lr by 2^-22 of itself
                CHECK_ERROR(name + ": p", greatest_error(pf.data(), p64.data(), n), 10 * (3 * 3e-8 + 3 * a.lr * 5e-7));
                for (const char* tier : {"avx2", "avx512"}) {
                    const AdamWState cpu = adamw_cpu(tier, setting, n);
                    CHECK(cpu.p.empty() || (cpu.p == pf && cpu.m == mf && cpu.v == vf),
                          "%s: not the bits of %s, shift %zu", name.c_str(), tier, shift);
                }
            }
        }
    }
    CHECK(adamw_update(dev, nullptr, nullptr, nullptr, nullptr, 0, adamw_settings[0]) == 0, "of nothing");
}

void adamw_steps() {
    adamw_of_type<float>();
    adamw_of_type<bf16>();
}

// Where a gradient, or the weight itself, makes p infinite or NaN; the first of several; a gradient whose square
// overflows does not.
void adamw_nonfinite() {
    OptimizerDevice<float> dev;
    if (!dev.ok) {
        return;
    }
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    AdamW a = adamw_settings[0];
    a.step = 1;
    for (size_t n : {size_t(6), size_t(3001)}) {
        for (size_t shift : {0, 1}) {
            const auto run = [&](const std::vector<std::pair<size_t, float>>& gradients, size_t weight_at) {
                AdamWState s = adamw_start(n);
                std::vector<float> g = adamw_gradient(n, 1);
                for (const auto& bad : gradients) {
                    g[bad.first] = bad.second;
                }
                if (weight_at < n) {
                    s.p[weight_at] = -infinity;
                }
                GpuBuffer<float, float> p(dev, s.p, shift), m(dev, s.m, shift), v(dev, s.v, shift), grad(dev, g, shift);
                return adamw_update(dev, p.data(), m.data(), v.data(), grad.data(), n, a);
            };
            CHECK(run({}, n) == n, "all %zu are finite", n);
            CHECK(run({{n - 1, nan}}, n) == n - 1, "NaN at the end of %zu", n);
            CHECK(run({{n - 1, nan}, {n / 2, nan}}, n) == n / 2, "the first of two of %zu", n);
            CHECK(run({{n / 2, infinity}, {0, nan}}, n) == 0, "NaN at the beginning of %zu", n);
            CHECK(run({{n - 2, nan}}, 3) == 3, "a weight of %zu", n);
            CHECK(run({{2, 1e30f}}, n) == n, "a step divided by infinity is 0");
        }
    }
}

// Sums of integers are exact in double; a wide range of sizes must not lose the small ones.
void sum_squares_exact() {
    OptimizerDevice<float> dev;
    if (!dev.ok) {
        return;
    }
    CHECK(sum_squares(dev, nullptr, 0) == 0, "of nothing");
    for (size_t n : {size_t(1), size_t(255), size_t(1025), size_t(70001), size_t(4400003)}) {
        for (size_t shift : {0, 1}) {
            if (n > 1000000 && shift > 0) {
                continue;  // a second round of the whole grid: aligned alone
            }
            std::vector<float> x(n);
            double want = 0;
            for (size_t i = 0; i < n; i++) {
                x[i] = float(i % 1000) - 500;
                want += double(x[i]) * double(x[i]);
            }
            GpuBuffer<float, float> memory(dev, x, shift);
            const double got = sum_squares(dev, memory.data(), n);
            CHECK(got == want, "%zu, shift %zu: %.17g, not %.17g", n, shift, got, want);
            CHECK(first_nonfinite(dev, memory.data(), n) == n, "%zu, shift %zu: all are finite", n, shift);
        }
    }
    const size_t n = 300001;
    std::vector<float> x = random_values<float>(n, 5);
    GpuBuffer<float, float> memory(dev, x);
    const double one = sum_squares(dev, memory.data(), n);
    CHECK(sum_squares(dev, memory.data(), n) == one, "other bits the second time");
    CHECK_ERROR("mean square", std::fabs(one / double(n) - 1.0 / 3), 5 * std::sqrt(4.0 / 45 / double(n)));
    x[3] = 3e30f;
    memory.set(x);
    CHECK_ERROR("beyond float", std::fabs(sum_squares(dev, memory.data(), n) / (double(3e30f) * double(3e30f)) - 1),
                1e-15);
    x[3] = std::numeric_limits<float>::quiet_NaN();
    memory.set(x);
    CHECK(std::isnan(sum_squares(dev, memory.data(), n)), "NaN is lost");
}

void nonfinite_first() {
    OptimizerDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    const float infinity = std::numeric_limits<float>::infinity();
    CHECK(first_nonfinite(dev, nullptr, 0) == 0, "of nothing");
    for (size_t n : {size_t(1), size_t(300), size_t(100002)}) {
        for (size_t shift : {0, 1}) {
            std::vector<float> x(n, std::numeric_limits<float>::max());
            GpuBuffer<float, bf16> memory(dev, x, shift);
            const auto first = [&](size_t at, float value) {
                x[at] = value;
                memory.set(x);
                return first_nonfinite(dev, memory.data(), n);
            };
            CHECK(first(0, -std::numeric_limits<float>::max()) == n, "all of %zu are finite", n);
            CHECK(first(n - 1, infinity) == n - 1, "infinity at the end of %zu", n);
            CHECK(first(n / 2, -infinity) == n / 2, "-infinity in the middle of %zu", n);
            CHECK(first(n / 3, std::numeric_limits<float>::quiet_NaN()) == n / 3, "NaN in the first third of %zu", n);
            CHECK(memory.intact(), "written outside");
        }
    }
}

}  // namespace

extern const Test gpu_adamw_tests[] = {{"gpu_adamw_steps", adamw_steps},
                                       {"gpu_adamw_nonfinite", adamw_nonfinite},
                                       {"gpu_sum_squares", sum_squares_exact},
                                       {"gpu_first_nonfinite", nonfinite_first},
                                       {nullptr, nullptr}};
