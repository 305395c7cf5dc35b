// The speed that a run on a CPU will have, told before it: a small model of the run's own shapes makes the beginning of
// one of the run's passes for a second or two, and the time of each op at two sizes gives the costs of train_work.h.
//
// The small model has two layers, narrower ones where the run's are large, and a part of the vocabulary; base,
// arithmetic, tier, threads, adapters and dropout are the run's. Only memory tells it apart: two layers stay in a cache
// that many do not fit.
//
// Left out: what the ranks add (train_forecast.h), evaluations and checkpoints.
#pragma once
#include <chrono>

#include "train_work.h"

constexpr double SPEED_SECONDS = 1.7;  // after which nothing new is begun
constexpr size_t SPEED_VOCABULARY = 4096, SPEED_UPDATE = size_t(1) << 22;

// Widths are halved until a layer has at most this many weights. Some for each thread: small products are not shared
// out as large ones are.
inline LlamaConfig speed_config(const LlamaConfig& c, int threads) {
    LlamaConfig s = c;
    s.L = 2;
    s.V = std::min(c.V, int(SPEED_VOCABULARY));
    s.tied = true;
    s.dtype = c.dtype == "float16" ? "bfloat16" : c.dtype;  // random bits are no 16-bit floats; both widen alike
    const size_t most = size_t(12) << 20;
    while (linear_parameters(s) / 2 > most * size_t(std::max(threads, 2))) {
        const int group = s.NH / s.NKV;
        s.C = std::max(s.C / 128 * 64, 64);
        s.F = std::max(s.F / 128 * 64, 64);
        s.NKV = std::max(s.NKV / 2, 1);
        s.NH = s.NKV * group;
    }
    return s;
}

// The first n rows of a pass. Labels as densely as the pass has them, but never more than the head takes together.
inline Batch speed_batch(const Batch& pass, size_t n, int V, size_t head_rows) {
    Batch b;
    const double share = double(pass.n_labels) / double(pass.size());
    const size_t labels = std::min({n, head_rows, size_t(std::ceil(share * double(n)))});
    for (size_t i = 0; i < n; i++) {
        b.tokens.push_back(pass.tokens[i] % V);
        const bool has_label = (i + 1) * labels / n > i * labels / n;
        b.labels.push_back(has_label ? b.tokens.back() : -1);
    }
    b.positions.assign(pass.positions.begin(), pass.positions.begin() + n);
    b.example.assign(pass.example.begin(), pass.example.begin() + n);
    for (size_t d = 0; d + 1 < pass.cu_seqlens.size() && size_t(pass.cu_seqlens[d]) < n; d++) {
        b.cu_seqlens.push_back(pass.cu_seqlens[d]);
    }
    b.cu_seqlens.push_back(int32_t(n));
    b.n_labels = labels;
    return b;
}

inline double speed_clock() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of the parts of a pass, each time that it is made.
struct SpeedSamples {
    Work work;
    std::vector<double> seconds[SPEED_PARTS];
};

// Makes the pass once. The first time, layer 0's backward once more by itself: its q, k, v are told from layer 1's.
template <class Dev>
void speed_sample(SpeedSamples& s, Llama<Dev>& m, const Batch& b) {
    double t[SPEED_PARTS] = {}, spent = 0;
    const auto take = [&](int first) {
        for (int op = 0; op < OPS; op++) {
            t[first + op] = m.op_seconds[op];
            spent += m.op_seconds[op];
            m.op_seconds[op] = 0;
        }
    };
    const double start = speed_clock();
    const Pass<Dev> p = llama_forward(m, b, 1, float(m.adapter.lora.dropout));
    llama_loss(m, p, true, 1 / double(std::max<size_t>(b.n_labels, 1)));
    take(0);
    llama_backward(m, p);
    take(SPEED_BACKWARD);
    t[SPEED_HOST] = speed_clock() - start - spent;
    if (s.seconds[SPEED_FIRST_QKV].empty()) {
        layer_backward(m, p, 0);
        t[SPEED_FIRST_QKV] = m.op_seconds[OP_QKV];
        std::fill(m.op_seconds, m.op_seconds + OPS, 0.0);
    } else {
        t[SPEED_FIRST_QKV] = s.seconds[SPEED_FIRST_QKV][0];
    }
    t[SPEED_BACKWARD + OP_QKV] -= t[SPEED_FIRST_QKV];
    for (int part = 0; part < SPEED_PARTS; part++) {
        s.seconds[part].push_back(t[part]);
    }
}

// The middle one. The first call of all touches new memory: it counts only where there is no other.
inline double speed_median(std::vector<double> x) {
    if (x.size() > 1) {
        x.erase(x.begin());
    }
    std::nth_element(x.begin(), x.begin() + x.size() / 2, x.end());
    return x.empty() ? 0 : x[x.size() / 2];
}

// Both costs of a part from its seconds at two sizes, neither below zero; where the sizes tell them apart too badly,
// all is laid on the units of the large one.
inline void speed_fit(Speed& s, int part, const Work& small, double small_seconds, const Work& large,
                      double large_seconds) {
    const double f1 = small.fixed[part], u1 = small.units[part], t1 = small_seconds;
    const double f2 = large.fixed[part], u2 = large.units[part], t2 = large_seconds;
    const double apart = f1 * u2 - f2 * u1;
    const double per_fixed = (t1 * u2 - t2 * u1) / apart, per_unit = (f1 * t2 - f2 * t1) / apart;
    const bool told = apart > 0.3 * f2 * u1 && per_fixed > 0 && per_unit > 0;
    s.per_fixed[part] = told ? per_fixed : 0;
    s.per_unit[part] = told ? per_unit : u2 > 0 ? std::max(t2, 0.0) / u2 : 0;
}

// Seconds of a byte of the update of n elements.
template <class Dev>
double speed_update(Dev& dev, size_t n) {
    using real = typename Dev::real;
    real* x[4];
    for (real*& p : x) {
        p = static_cast<real*>(device_alloc(dev, n * sizeof(real), "the calibration"));
        device_zero(dev, p, n * sizeof(real));
    }
    AdamW rates = {};
    rates.lr = 1e-4;
    rates.eps = 1e-8;
    rates.step = 1;
    std::vector<double> seconds;
    for (int i = 0; i < 4; i++) {
        const double start = speed_clock();
        device_zero(dev, x[3], n * sizeof(real));
        rates.grad_scale = 1 + sum_squares(dev, x[3], n);
        adamw_update(dev, x[0], x[1], x[2], x[3], n, rates);
        seconds.push_back(speed_clock() - start);
    }
    for (real* p : x) {
        device_free(dev, p);
    }
    return speed_median(seconds) / update_bytes<Dev>(n);
}

// The cost of each part on this device, from the beginning of `pass`, one of those that the run will make. Takes less
// than two seconds where a small pass does, and memory for two layers of it.
template <class X>
Speed speed_measure(const Cpu<X>& device, const LlamaConfig& c, const LoraConfig& lora, const BaseOptions& options,
                    const Batch& pass) {
    const double start = speed_clock();
    Speed s;
    Arena none;
    s.head_rows = classifier_space(device, none, c.C, c.V, SIZE_MAX).rows;
    const size_t most = std::min(pass.size(), plan_longest_pass(device));
    BaseOptions base = options;
    base.spread = 0;
    Llama<Cpu<X>> m;
    m.dev = device;
    m.dev.workspace = nullptr;  // the small model's own
    m.dev.workspace_bytes = 0;
    m.dev.comm = nullptr;
    m.c = speed_config(c, device.threads);
    (void)llama_random(m, base);  // only other ranks can make it fail
    llama_adapter_create(m, lora);
    llama_activations_create(m, most, most, recompute_everywhere(Recompute::NONE, 2), true);
    llama_adapter_init(m, 1);
    const size_t elements = std::min(adapter_elements(c, lora), SPEED_UPDATE);
    s.per_unit[OP_ADAMW] = elements > 0 ? speed_update(m.dev, elements) : 0;

    std::vector<size_t> sizes;
    for (size_t n = most; n >= 16 || sizes.empty(); n /= 4) {
        sizes.insert(sizes.begin(), n);
    }
    SpeedSamples small, large;
    Batch small_batch, large_batch;
    double took = 0;
    for (size_t size : sizes) {
        if (small_batch.size() > 0 && speed_clock() - start + 2 * 1.3 * 4 * took > SPEED_SECONDS) {
            break;
        }
        std::swap(small, large);
        std::swap(small_batch, large_batch);
        large = SpeedSamples();
        large_batch = speed_batch(pass, size, m.c.V, s.head_rows);
        large.work = work_pass(m.c, lora, m.recompute, large_batch, s.head_rows);
        const double begin = speed_clock();
        speed_sample(large, m, large_batch);
        took = speed_clock() - begin;
    }
    for (int i = 0; i < 5 && speed_clock() - start + took < SPEED_SECONDS; i++) {
        speed_sample(large, m, large_batch);
        if (small_batch.size() > 0) {
            speed_sample(small, m, small_batch);
        }
    }
    for (int part = 0; part < SPEED_PARTS; part++) {
        if (part != OP_ADAMW) {
            speed_fit(s, part, small.work, speed_median(small.seconds[part]), large.work,
                      speed_median(large.seconds[part]));
        }
    }
    llama_free(m);
    return s;
}
