// Linear groups on the GPU, forward and backward: every way of making the frozen product, input, store, rank and
// epilogue, against the CPU's linear ops in double on the same numbers, by the yardstick of a plain evaluation that
// rounds where PyTorch and PEFT round under autocast.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "dev/tests/gpu.h"
#include "kernels/cpu/isa.h"

namespace {

enum Kind { PLAIN, RMSNORM, SWIGLU };

struct PartShape {
    int OC, r;
    Store store;
    bool nested;  // NF4: double quantisation
};

struct Shape {
    const char* name;
    size_t N;
    int C;
    Kind kind;
    std::vector<PartShape> parts;
    float dropout;
    bool residual;
    int rope_heads;       // of 16 channels; 0: no RoPE
    bool exact_adapters;  // A and B are numbers of X
};

// Parts of 64-multiples are packed on the device and may take the fused kernel, 48 and 112 straddle rows. Ranks that
// are no multiple of 16 leave padding in the room, 0 is a hole.
const std::vector<Shape>& shapes() {
    static const std::vector<Shape> list = {
        {"one row", 1, 64, PLAIN, {{64, 16, Store::NF4, true}}, 0, false, 0, true},
        {"qkv",
         33,
         128,
         RMSNORM,
         {{64, 8, Store::NF4, true}, {64, 3, Store::NF4, true}, {64, 8, Store::NF4, false}},
         0,
         false,
         8,
         true},
        {"qkv with a hole",
         70,
         64,
         RMSNORM,
         {{64, 16, Store::NF4, true}, {64, 0, Store::NF4, true}, {64, 16, Store::NF4, true}},
         0,
         false,
         8,
         false},
        {"qkv, odd ranks, dropout",
         33,
         64,
         RMSNORM,
         {{64, 5, Store::NF4, true}, {64, 0, Store::NF4, true}, {64, 4, Store::NF4, true}},
         0.25f,
         false,
         4,
         true},
        {"o", 33, 64, PLAIN, {{128, 3, Store::NF4, true}}, 0, true, 0, true},
        {"o, dropout", 70, 64, PLAIN, {{64, 16, Store::NF4, true}}, 0.5f, true, 0, true},
        {"down", 33, 192, SWIGLU, {{64, 16, Store::NF4, true}}, 0, true, 0, true},
        {"down, dropout", 17, 112, SWIGLU, {{48, 3, Store::NF4, true}}, 0.1f, true, 0, true},
        {"flat", 33, 112, RMSNORM, {{48, 3, Store::NF4, true}, {112, 16, Store::NF4, false}}, 0, false, 3, true},
        {"flat, odd width", 5, 101, PLAIN, {{37, 3, Store::NF4, true}}, 0, true, 0, true},
        {"no adapter, NF4", 33, 64, PLAIN, {{64, 0, Store::NF4, true}}, 0, true, 0, true},
        {"no adapter, 16 bits",
         33,
         48,
         SWIGLU,
         {{24, 0, Store::BF16, false}, {24, 0, Store::BF16, false}},
         0,
         true,
         0,
         true},
        {"16 bits", 33, 48, RMSNORM, {{48, 3, Store::BF16, false}, {32, 16, Store::BF16, false}}, 0, false, 3, true},
        {"16 bits, a hole, dropout",
         70,
         48,
         PLAIN,
         {{48, 0, Store::BF16, false}, {32, 4, Store::BF16, false}, {16, 3, Store::BF16, false}},
         0.25f,
         true,
         2,
         true},
        {"fp32", 33, 48, PLAIN, {{48, 3, Store::F32, false}, {24, 16, Store::F32, false}}, 0, true, 0, false},
        {"fp32, dropout", 17, 101, SWIGLU, {{37, 16, Store::F32, false}}, 0.25f, false, 0, true},
        {"mixed", 33, 64, RMSNORM, {{64, 16, Store::NF4, true}, {32, 3, Store::BF16, false}}, 0, false, 0, true},
        {"more rows than a chunk", 1030, 24, PLAIN, {{24, 3, Store::BF16, false}}, 0.25f, true, 0, true},
    };
    return list;
}

constexpr int HS = 16;
constexpr float SCALE = 1.75f;  // not a power of 2, or a factor in the wrong place would round alike

struct PartData {
    std::vector<uint8_t> codes, absmax8;
    std::vector<float> absmax, absmax2, map8, f32;
    std::vector<bf16> half;
    std::vector<double> A, B, dA, dB;
    std::vector<float> fA, fB;
};

struct Problem {
    Shape shape;
    size_t N, C, OC = 0, R = 0;
    std::vector<PartData> part;
    std::vector<double> x, rstd, norm_w, residual, dout, cos, sin;
    std::vector<int32_t> position;
    std::vector<uint32_t> example;
    Dropout drop;
    size_t x_width() const { return shape.kind == SWIGLU ? 2 * C : C; }
};

// A CPU matrix of the part.
Matrix matrix_of(const PartData& d, const PartShape& s, size_t C) {
    Matrix m;
    m.store = s.store;
    m.rows = s.OC;
    m.cols = int(C);
    if (s.store == Store::NF4) {
        m.codes = d.codes.data();
        m.absmax32 = s.nested ? nullptr : d.absmax.data();
        m.absmax8 = s.nested ? d.absmax8.data() : nullptr;
        m.absmax2 = s.nested ? d.absmax2.data() : nullptr;
        m.map8 = s.nested ? d.map8.data() : nullptr;
        m.offset = s.nested ? 0.125f : 0;
    } else {
        m.data = s.store == Store::F32 ? static_cast<const void*>(d.f32.data()) : d.half.data();
    }
    return m;
}

template <class X>
Problem make_problem(const Shape& s, uint64_t seed) {
    Problem p;
    p.shape = s;
    p.N = s.N;
    p.C = size_t(s.C);
    for (const PartShape& part : s.parts) {
        PartData d;
        const size_t n = size_t(part.OC) * p.C, blocks = (n + 63) / 64;
        const auto bytes = [&](size_t count, uint64_t salt) {
            std::vector<uint8_t> b(count);
            for (size_t i = 0; i < count; i++) {
                b[i] = uint8_t(random_bits(seed, STREAM_TOKENS, salt, i));
            }
            return b;
        };
        seed += 10;
        d.codes = bytes((n + 1) / 2, seed);
        d.absmax8 = bytes(blocks, seed + 1);
        d.absmax = random_values<float>(blocks, seed + 2, 0.2);
        d.absmax2 = random_values<float>((blocks + 255) / 256, seed + 3, 0.1);
        d.map8 = random_values<float>(256, seed + 4);
        // bf16 numbers whatever X is: the bf16 device holds no others.
        const std::vector<double> w = random_stored<bf16>(n, seed + 5, 0.2);
        d.f32.assign(w.begin(), w.end());
        d.half = stored_values<bf16>(w);
        const auto adapter = [&](size_t count, uint64_t salt) {
            return s.exact_adapters ? random_stored<X>(count, salt, 0.3) : random_stored<float>(count, salt, 0.3);
        };
        d.A = adapter(size_t(part.r) * p.C, seed + 6);
        d.B = adapter(size_t(part.r) * size_t(part.OC), seed + 7);
        d.dA = random_stored<float>(d.A.size(), seed + 8);
        d.dB = random_stored<float>(d.B.size(), seed + 9);
        d.fA.assign(d.A.begin(), d.A.end());
        d.fB.assign(d.B.begin(), d.B.end());
        p.part.push_back(d);
        p.OC += size_t(part.OC);
        p.R += size_t(part.r);
    }
    p.x = random_stored<X>(p.N * p.x_width(), seed + 11, 2);
    p.rstd = random_stored<float>(p.N, seed + 12);
    p.norm_w = random_stored<float>(p.C, seed + 13);
    p.residual = random_stored<X>(p.N * p.OC, seed + 14);
    p.dout = random_stored<X>(p.N * p.OC, seed + 15);
    for (size_t t = 0; t < 50; t++) {
        for (size_t i = 0; i < HS / 2; i++) {
            p.cos.push_back(rounded<float>(std::cos(double(t) / double(i + 1))));
            p.sin.push_back(rounded<float>(std::sin(double(t) / double(i + 1))));
        }
    }
    for (size_t i = 0; i < p.N; i++) {
        p.example.push_back(uint32_t(i / 7));
        p.position.push_back(int32_t(i % 50));
    }
    p.drop.p = s.dropout;
    p.drop.seed = 1337;
    p.drop.step = 7;
    p.drop.example = p.example.data();
    p.drop.position = p.position.data();
    return p;
}

// What the ops give, as numbers; rows of out, din and xa are dense.
struct Result {
    std::vector<double> out, xa, din;
    std::vector<std::vector<double>> dA, dB;
};

// ----------------------------------------------------------------------------
// exact: the CPU's ops in double

Result exact_result(const Problem& p) {
    DoubleDevice dev(2);
    Result r;
    LinearGroup<double> g;
    g.parts = int(p.part.size());
    g.C = int(p.C);
    g.OC = int(p.OC);
    g.R = int(p.R);
    for (int i = 0; i < g.parts; i++) {
        r.dA.push_back(p.part[i].dA);
        r.dB.push_back(p.part[i].dB);
    }
    for (int i = 0; i < g.parts; i++) {
        LinearPart<double>& part = g.part[i];
        part.w = matrix_of(p.part[i], p.shape.parts[i], p.C);
        part.r = p.shape.parts[i].r;
        part.scale = SCALE;
        part.A = p.part[i].A.data();
        part.B = p.part[i].B.data();
        part.dA = r.dA[i].data();
        part.dB = r.dB[i].data();
        part.module = uint32_t(11 + i);
    }
    using Input = LinearInput<double, double>;
    const Input in = {p.shape.kind == PLAIN     ? Input::PLAIN
                      : p.shape.kind == RMSNORM ? Input::RMSNORM
                                                : Input::SWIGLU,
                      p.x.data(), p.x_width(), p.rstd.data(), p.norm_w.data()};
    const Rope<double> rope = {p.cos.data(), p.sin.data(), p.position.data(), p.shape.rope_heads, HS};
    const Rope<double>* const turn = p.shape.rope_heads > 0 ? &rope : nullptr;
    r.out.resize(p.N * p.OC);
    r.xa.resize(p.N * p.R);
    r.din.resize(p.N * p.C);
    std::vector<double> dout = p.dout;
    device_reserve(static_cast<Cpu<double>&>(dev), linear_workspace(dev, g, p.N));
    linear_forward(static_cast<Cpu<double>&>(dev), r.out.data(), p.OC, r.xa.data(), in, g, p.N,
                   p.shape.residual ? p.residual.data() : nullptr, turn, p.drop);
    linear_backward(static_cast<Cpu<double>&>(dev), r.din.data(), dout.data(), p.OC, in, g, r.xa.data(), p.N, turn,
                    p.drop);
    for (double& v : r.xa) {
        v *= SCALE;  // the GPU keeps it with the scale
    }
    return r;
}

// ----------------------------------------------------------------------------
// plain: every step rounded to X

template <class X>
double dot(const double* a, size_t a_step, const double* b, size_t b_step, size_t n) {
    float sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += float(a[i * a_step]) * float(b[i * b_step]);
    }
    return sum;
}

template <class X>
void plain_rope(std::vector<double>& rows, const Problem& p, double direction) {
    for (size_t i = 0; i < p.N; i++) {
        for (int h = 0; h < p.shape.rope_heads; h++) {
            for (size_t k = 0; k < HS / 2; k++) {
                double &a = rows[i * p.OC + size_t(h) * HS + k], &b = rows[i * p.OC + size_t(h) * HS + HS / 2 + k];
                const size_t at = size_t(p.position[i]) * HS / 2 + k;
                const double c = rounded<X>(p.cos[at]), s = rounded<X>(direction * p.sin[at]);
                const double x = rounded<X>(rounded<X>(a * c) - rounded<X>(b * s));
                b = rounded<X>(rounded<X>(b * c) + rounded<X>(a * s));
                a = x;
            }
        }
    }
}

std::vector<double> weights_of(const Problem& p, size_t part) {
    DoubleDevice dev(1);
    const Matrix m = matrix_of(p.part[part], p.shape.parts[part], p.C);
    std::vector<double> w(m.elements());
    for (int i = 0; i < m.rows; i++) {
        matrix_row(static_cast<Cpu<double>&>(dev), w.data() + size_t(i) * p.C, m, i);
    }
    return w;
}

template <class X>
Result plain_result(const Problem& p) {
    const size_t N = p.N, C = p.C, OC = p.OC, R = p.R;
    const auto round = [](double v) { return rounded<X>(v); };
    Result r;
    std::vector<double> x(N * C);
    for (size_t i = 0; i < N; i++) {
        for (size_t c = 0; c < C; c++) {
            const double v = p.x[i * p.x_width() + c];
            x[i * C + c] = p.shape.kind == PLAIN     ? v
                           : p.shape.kind == RMSNORM ? round(round(v * p.rstd[i]) * p.norm_w[c])
                                                     : round(round(v / (1 + std::exp(-v))) * p.x[i * 2 * C + C + c]);
        }
    }
    r.out.resize(N * OC);
    r.xa.resize(N * R);
    r.din.assign(N * C, 0);
    std::vector<double> dout = p.dout;
    plain_rope<X>(dout, p, -1);
    size_t column = 0, rank = 0;
    DoubleDevice mask_device(1);
    for (size_t k = 0; k < p.part.size(); k++) {
        const size_t oc = size_t(p.shape.parts[k].OC), n = size_t(p.shape.parts[k].r);
        const std::vector<double> w = weights_of(p, k);
        std::vector<double> A = p.part[k].A, B = p.part[k].B, mask(C);
        std::transform(A.begin(), A.end(), A.begin(), round);
        std::transform(B.begin(), B.end(), B.begin(), round);
        std::vector<double> dropped(N * C), D(N * n), masks(N * C, 1), dlora(N * oc);
        for (size_t i = 0; i < N; i++) {
            if (p.drop.p > 0) {
                dropout_run(mask_device, &masks[i * C], p.drop, uint32_t(11 + k), i, 0, C);
            }
            for (size_t c = 0; c < C; c++) {
                dropped[i * C + c] = round(x[i * C + c] * masks[i * C + c]);
            }
            std::vector<double> xa(n);
            for (size_t j = 0; j < n; j++) {
                xa[j] = round(dot<X>(&dropped[i * C], 1, &A[j * C], 1, C));
                r.xa[i * R + rank + j] = round(xa[j] * SCALE);
            }
            for (size_t o = 0; o < oc; o++) {
                double y = round(dot<X>(&x[i * C], 1, &w[o * C], 1, C));
                if (n > 0) {
                    y = round(y + round(SCALE * round(dot<X>(xa.data(), 1, &B[o * n], 1, n))));
                }
                const size_t at = i * OC + column + o;
                r.out[at] = p.shape.residual ? round(y + p.residual[at]) : y;
                dlora[i * oc + o] = round(SCALE * dout[at]);
            }
            for (size_t j = 0; j < n; j++) {
                D[i * n + j] = round(dot<X>(&dlora[i * oc], 1, &B[j], n, oc));
            }
            for (size_t c = 0; c < C; c++) {
                double& d = r.din[i * C + c];
                d = round(d + round(dot<X>(&dout[i * OC + column], 1, &w[c], C, oc)));
                if (n > 0) {
                    d = round(d + round(masks[i * C + c] * round(dot<X>(&D[i * n], 1, &A[c], C, n))));
                }
            }
        }
        std::vector<double> dA = p.part[k].dA, dB = p.part[k].dB;
        for (size_t j = 0; j < n; j++) {
            for (size_t c = 0; c < C; c++) {
                dA[j * C + c] = rounded<float>(dA[j * C + c] + dot<X>(&D[j], n, &dropped[c], C, N));
            }
            for (size_t o = 0; o < oc; o++) {
                dB[o * n + j] = rounded<float>(dB[o * n + j] + dot<X>(&dlora[o], oc, &r.xa[rank + j], R, N) / SCALE);
            }
        }
        r.dA.push_back(dA);
        r.dB.push_back(dB);
        column += oc;
        rank += n;
    }
    plain_rope<X>(r.out, p, 1);
    return r;
}

// ----------------------------------------------------------------------------
// on the device

// A group's operands in device memory.
template <class X>
struct DeviceGroup {
    Gpu<X>& dev;
    LinearGroup<float> g;
    std::vector<void*> owned;

    template <class T>
    T* put(const std::vector<T>& values) {
        T* p = static_cast<T*>(device_alloc(dev, values.size() * sizeof(T), "a test"));
        device_to(dev, p, values.data(), values.size() * sizeof(T));
        owned.push_back(p);
        return p;
    }
    DeviceGroup(Gpu<X>& d, const Problem& p) : dev(d) {
        g.parts = int(p.part.size());
        g.C = int(p.C);
        g.OC = int(p.OC);
        g.R = int(p.R);
        for (int i = 0; i < g.parts; i++) {
            const PartData& from = p.part[i];
            LinearPart<float>& part = g.part[i];
            part.w = matrix_of(from, p.shape.parts[i], p.C);
            Matrix& w = part.w;
            if (w.store == Store::NF4) {
                w.codes = put(from.codes);
                w.absmax32 = w.absmax32 ? put(from.absmax) : nullptr;
                w.absmax8 = w.absmax8 ? put(from.absmax8) : nullptr;
                w.absmax2 = w.absmax2 ? put(from.absmax2) : nullptr;
                w.map8 = w.map8 ? put(from.map8) : nullptr;
                device_reserve(dev, nf4_load_workspace(dev, w.elements(), w.elements()));
                nf4_pack(dev, w);
            } else {
                w.data = w.store == Store::F32 ? static_cast<const void*>(put(from.f32)) : put(from.half);
            }
            part.r = p.shape.parts[i].r;
            part.scale = part.r > 0 ? SCALE : 0;
            part.A = put(from.fA);
            part.B = put(from.fB);
            part.module = uint32_t(11 + i);
        }
        device_sync(dev);
    }
    ~DeviceGroup() {
        for (void* p : owned) {
            device_free(dev, p);
        }
    }
    DeviceGroup(const DeviceGroup&) = delete;
};

// Rows of `width` numbers with `gap` poisoned columns behind each.
template <class X>
std::vector<X> with_gap(const std::vector<double>& x, size_t rows, size_t width, size_t gap) {
    std::vector<X> out(rows * (width + gap));
    memset(static_cast<void*>(out.data()), 0xff, out.size() * sizeof(X));
    for (size_t i = 0; i < rows; i++) {
        for (size_t j = 0; j < width; j++) {
            out[i * (width + gap) + j] = stored<X>(x[i * width + j]);
        }
    }
    return out;
}

// The first columns; *poisoned: all behind `used` ones are as with_gap left them.
template <class X>
std::vector<double> without_gap(const std::vector<X>& x, size_t rows, size_t width, size_t used, size_t stride,
                                bool* poisoned) {
    std::vector<double> out;
    for (size_t i = 0; i < rows; i++) {
        for (size_t j = 0; j < stride; j++) {
            if (j < width) {
                out.push_back(number(x[i * stride + j]));
            } else if (j >= used) {
                unsigned char bytes[sizeof(X)];
                memcpy(bytes, &x[i * stride + j], sizeof(X));
                *poisoned &= std::all_of(bytes, bytes + sizeof(X), [](unsigned char b) { return b == 0xff; });
            }
        }
    }
    return out;
}

struct How {
    GemmPath path = GemmPath::AUTO;
    bool din = true, prefetch = false, same_residual = false;
};

// Forward and backward of a group, once. gap: columns behind the rooms that nothing may touch.
template <class X>
Result device_result(Gpu<X>& dev, const Problem& p, DeviceGroup<X>& on, const How& how) {
    const size_t N = p.N, C = p.C, OC = p.OC, R = p.R, room = dev.row_room(int(R)), gap = 8;
    LinearGroup<float>& g = on.g;
    dev.gemm = how.path;
    device_reserve(dev, linear_workspace(dev, g, N));
    linear_slots_reserve(dev, linear_slot_bytes(dev, g, N));

    const size_t x_gap = p.shape.kind == PLAIN ? room + gap : 0;
    GpuBuffer<X, X> x(dev, with_gap<X>(p.x, N, p.x_width(), x_gap)), out(dev, N * (OC + gap)), xa(dev, N * R),
        residual(dev, with_gap<X>(p.residual, N, OC, gap)), din(dev, N * C),
        dout(dev, with_gap<X>(p.dout, N, OC, room + gap));
    GpuBuffer<float, X> rstd(dev, std::vector<float>(p.rstd.begin(), p.rstd.end())),
        norm_w(dev, std::vector<float>(p.norm_w.begin(), p.norm_w.end())),
        cosine(dev, std::vector<float>(p.cos.begin(), p.cos.end())),
        sine(dev, std::vector<float>(p.sin.begin(), p.sin.end()));
    GpuBuffer<int32_t, X> position(dev, p.position);
    GpuBuffer<uint32_t, X> example(dev, p.example);
    std::vector<float> gradients;
    for (const PartData& d : p.part) {
        gradients.insert(gradients.end(), d.dA.begin(), d.dA.end());
        gradients.insert(gradients.end(), d.dB.begin(), d.dB.end());
    }
    GpuBuffer<float, X> flat(dev, gradients);
    float* at = flat.data();
    for (int i = 0; i < g.parts; i++) {
        g.part[i].dA = at;
        g.part[i].dB = at += p.part[i].dA.size();
        at += p.part[i].dB.size();
    }
    using Input = LinearInput<X, float>;
    const Input in = {p.shape.kind == PLAIN     ? Input::PLAIN
                      : p.shape.kind == RMSNORM ? Input::RMSNORM
                                                : Input::SWIGLU,
                      x.data(), p.x_width() + x_gap, rstd.data(), norm_w.data()};
    const Rope<float> rope = {cosine.data(), sine.data(), position.data(), p.shape.rope_heads, HS};
    const Rope<float>* const turn = p.shape.rope_heads > 0 ? &rope : nullptr;
    Dropout drop = p.drop;
    drop.example = example.data();
    drop.position = position.data();
    const X* added = p.shape.residual ? residual.data() : nullptr;
    if (added && how.same_residual) {
        out.set(residual.get());
        added = out.data();
    }
    if (how.prefetch) {
        linear_prefetch(dev, g, N);
    }
    linear_forward(dev, out.data(), OC + gap, xa.data(), in, g, N, added, turn, drop);
    linear_backward(dev, how.din ? din.data() : nullptr, dout.data(), OC + room + gap, in, g, xa.data(), N, turn, drop);

    Result r;
    bool poisoned = true;
    r.out = without_gap(out.get(), N, OC, OC, OC + gap, &poisoned);
    CHECK(poisoned, "%s: written behind the rows of out", p.shape.name);
    without_gap(dout.get(), N, OC, OC + room, OC + room + gap, &poisoned);
    CHECK(poisoned, "%s: written behind the room of dout", p.shape.name);
    const std::vector<double> x_after =
        without_gap(x.get(), N, p.x_width(), p.x_width() + (x_gap > 0 ? room : 0), p.x_width() + x_gap, &poisoned);
    CHECK(poisoned, "%s: written behind the room of x", p.shape.name);
    CHECK(x_after == p.x, "%s: the input was changed", p.shape.name);
    r.xa = numbers(xa.get());
    r.din = numbers(din.get());
    const std::vector<float> sums = flat.get();
    const float* from = sums.data();
    for (const PartData& d : p.part) {
        r.dA.emplace_back(from, from + d.dA.size());
        r.dB.emplace_back(from + d.dA.size(), from + d.dA.size() + d.dB.size());
        from += d.dA.size() + d.dB.size();
    }
    CHECK_FENCES(out);
    CHECK_FENCES(xa);
    CHECK_FENCES(din);
    CHECK_FENCES(dout);
    CHECK_FENCES(x);
    CHECK_FENCES(flat);
    return r;
}

bool same_result(const Result& a, const Result& b) {
    const auto same = [](const std::vector<double>& u, const std::vector<double>& v) {
        return u.size() == v.size() && (u.empty() || same_bits(u.data(), v.data(), u.size()));
    };
    bool ok = same(a.out, b.out) && same(a.xa, b.xa) && same(a.din, b.din) && a.dA.size() == b.dA.size();
    for (size_t i = 0; ok && i < a.dA.size(); i++) {
        ok = same(a.dA[i], b.dA[i]) && same(a.dB[i], b.dB[i]);
    }
    return ok;
}

template <class X>
void check_result(const std::string& what, const Result& got, const Result& plain, const Result& exact) {
    check_yardstick<X>(what + ": out", got.out, plain.out, exact.out);
    check_yardstick<X>(what + ": xa", got.xa, plain.xa, exact.xa);
    check_yardstick<X>(what + ": din", got.din, plain.din, exact.din);
    for (size_t i = 0; i < exact.dA.size(); i++) {
        check_yardstick<X>(what + ": dA " + std::to_string(i), got.dA[i], plain.dA[i], exact.dA[i]);
        check_yardstick<X>(what + ": dB " + std::to_string(i), got.dB[i], plain.dB[i], exact.dB[i]);
    }
}

// ----------------------------------------------------------------------------
// tests

template <class X>
void check_shapes() {
    GpuDevice<X> dev;
    for (const Shape& s : shapes()) {
        if (!dev.ok) {
            return;
        }
        const Problem p = make_problem<X>(s, 100 + s.N);
        const Result exact = exact_result(p), plain = plain_result<X>(p);
        DeviceGroup<X> on(dev, p);
        How how;
        for (GemmPath path : {GemmPath::DEQUANT, GemmPath::FUSED}) {
            how.path = path;
            const std::string what = std::string(s.name) + (path == GemmPath::FUSED ? ", fused" : ", dequantised");
            const Result got = device_result(dev, p, on, how);
            check_result<X>(what, got, plain, exact);
            How other = how;
            other.same_residual = true;
            CHECK(same_result(got, device_result(dev, p, on, other)), "%s: other bits the second time", what.c_str());
        }
    }
}

void linear_bf16() {
    check_shapes<bf16>();
}
void linear_float() {
    check_shapes<float>();
}

// Without din the adapters' gradients are the same bits, and din stays as it was.
template <class X>
void check_no_din() {
    GpuDevice<X> dev;
    for (const Shape& s : shapes()) {
        if (!dev.ok) {
            return;
        }
        const Problem p = make_problem<X>(s, 3);
        DeviceGroup<X> on(dev, p);
        How how;
        how.path = GemmPath::DEQUANT;
        const Result with = device_result(dev, p, on, how);
        how.din = false;
        const Result without = device_result(dev, p, on, how);
        CHECK(with.dA == without.dA && with.dB == without.dB, "%s: other gradients without din", s.name);
        CHECK(std::all_of(without.din.begin(), without.din.end(), [](double v) { return std::isnan(v); }),
              "%s: din was written", s.name);
    }
}
void linear_no_din() {
    check_no_din<bf16>();
    check_no_din<float>();
}

// Fused and dequantised products differ by no more than twice the dequantised one's distance from the exact one.
void linear_paths() {
    GpuDevice<bf16> dev;
    for (const Shape& s : shapes()) {
        if (!dev.ok) {
            return;
        }
        const Problem p = make_problem<bf16>(s, 5);
        DeviceGroup<bf16> on(dev, p);
        const Result exact = exact_result(p);
        How how;
        how.path = GemmPath::DEQUANT;
        const Result a = device_result(dev, p, on, how);
        how.path = GemmPath::FUSED;
        const Result b = device_result(dev, p, on, how);
        const size_t slots = linear_slot_bytes(dev, on.g, p.N);
        const auto close = [&](const char* what, const std::vector<double>& u, const std::vector<double>& v,
                               const std::vector<double>& truth) {
            const double bound = 2 * rms_error(u, truth);
            CHECK_ERROR(std::string(s.name) + ": " + what + " of the two paths", rms_error(u, v), bound);
        };
        close("out", a.out, b.out, exact.out);
        close("din", a.din, b.din, exact.din);
        // What the fused kernel refuses falls to the other path: the same bits.
        bool packed = true, stored = true;
        for (int i = 0; i < on.g.parts; i++) {
            packed &= on.g.part[i].w.packed;
            stored &= on.g.part[i].w.store == Store::BF16;
        }
        CHECK((slots == 0) == (packed || stored), "%s: %zu bytes of slots", s.name, slots);
        CHECK(packed || same_result(a, b), "%s: not the same path", s.name);
    }
}

// The table, and what follows from it for the memory.
void linear_dispatch() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    const Shape s = {"table", 1, 64, PLAIN, {{64, 16, Store::NF4, true}}, 0, false, 0, true};
    const Problem p = make_problem<bf16>(s, 5);
    DeviceGroup<bf16> on(dev, p);
    const size_t slots = 2 * (64 + 16) * (64 + 16) * sizeof(bf16);
    struct {
        int arch;
        size_t rows;
    } const lines[] = {{80, 330},  {86, 540},  {87, 540},  {89, 1200}, {90, 150},
                       {100, 100}, {103, 100}, {120, 930}, {121, 930}};
    for (const auto& line : lines) {
        dev.info.arch = line.arch;
        dev.gemm = GemmPath::AUTO;
        CHECK(linear_slot_bytes(dev, on.g, line.rows) == 0, "sm_%d: %zu rows are not fused", line.arch, line.rows);
        CHECK(linear_slot_bytes(dev, on.g, line.rows + 1) == slots, "sm_%d: %zu rows are fused", line.arch,
              line.rows + 1);
        dev.gemm = GemmPath::FUSED;
        CHECK(linear_slot_bytes(dev, on.g, 9999) == 0, "sm_%d: fused is not forced", line.arch);
        dev.gemm = GemmPath::DEQUANT;
        CHECK(linear_slot_bytes(dev, on.g, 1) == slots, "sm_%d: dequantise is not forced", line.arch);
    }
    GpuDevice<float> plain;
    plain.gemm = GemmPath::FUSED;
    LinearGroup<float> g = on.g;
    CHECK(linear_slot_bytes(plain, g, 1) == 2 * slots, "fp32 activations are fused");
}

// Three groups that share two slots, the first and the third of one shape. Everything that calls need is made before
// the first: memory that is freed in between would empty the slots.
template <class X>
struct ThreeGroups {
    static constexpr size_t N = 17, OC = 128;  // the widest
    Gpu<X>& dev;
    std::vector<Problem> problems;
    std::vector<std::vector<double>> alone;  // the output of each on a device of its own
    std::vector<std::unique_ptr<DeviceGroup<X>>> groups;
    std::vector<std::unique_ptr<GpuBuffer<X, X>>> x, xa, residual;
    std::unique_ptr<GpuBuffer<float, X>> rstd, norm_w;

    explicit ThreeGroups(Gpu<X>& d) : dev(d) {
        const std::vector<Shape> shapes = {
            {"first", N, 64, RMSNORM, {{64, 3, Store::NF4, true}, {64, 16, Store::NF4, true}}, 0, false, 0, true},
            {"second", N, 112, PLAIN, {{48, 16, Store::NF4, true}}, 0, true, 0, true},
            {"third", N, 64, SWIGLU, {{128, 20, Store::NF4, false}}, 0, true, 0, true},
        };
        How how;
        how.path = dev.gemm = GemmPath::DEQUANT;
        size_t slots = 0, workspace = 0;
        for (size_t i = 0; i < 3; i++) {
            problems.push_back(make_problem<X>(shapes[i], 40 + i));
            const Problem& p = problems[i];
            GpuDevice<X> own;
            DeviceGroup<X> on(own, p);
            alone.push_back(device_result(static_cast<Gpu<X>&>(own), p, on, how).out);
            groups.emplace_back(new DeviceGroup<X>(dev, p));
            const size_t room = p.shape.kind == PLAIN ? dev.row_room(int(p.R)) : 0;
            x.emplace_back(new GpuBuffer<X, X>(dev, with_gap<X>(p.x, N, p.x_width(), room)));
            xa.emplace_back(new GpuBuffer<X, X>(dev, N * p.R));
            residual.emplace_back(new GpuBuffer<X, X>(dev, stored_values<X>(p.residual)));
            slots = std::max(slots, linear_slot_bytes(dev, groups[i]->g, N));
            workspace = std::max(workspace, linear_workspace(dev, groups[i]->g, N));
        }
        const auto floats = [](const std::vector<double>& v) { return std::vector<float>(v.begin(), v.end()); };
        rstd.reset(new GpuBuffer<float, X>(dev, floats(problems[0].rstd)));
        norm_w.reset(new GpuBuffer<float, X>(dev, floats(problems[0].norm_w)));
        device_reserve(dev, workspace);
        linear_slots_reserve(dev, slots);
    }
    // Queued, not waited for.
    void forward(size_t i, X* out) {
        using Input = LinearInput<X, float>;
        const Problem& p = problems[i];
        const Kind kind = p.shape.kind;
        const size_t room = kind == PLAIN ? dev.row_room(int(p.R)) : 0;
        const Input in = {kind == PLAIN     ? Input::PLAIN
                          : kind == RMSNORM ? Input::RMSNORM
                                            : Input::SWIGLU,
                          x[i]->data(), p.x_width() + room, rstd->data(), norm_w->data()};
        linear_forward(dev, out, p.OC, xa[i]->data(), in, groups[i]->g, N,
                       p.shape.residual ? residual[i]->data() : nullptr, static_cast<const Rope<float>*>(nullptr),
                       p.drop);
    }
    void prefetch(size_t i) { linear_prefetch(dev, groups[i]->g, N); }
};

// In an order that makes each slot change hands, fetched ahead or not, a whole sequence queued at once: always the bits
// of the group alone. The stand-in also does the work of the two streams in whatever order their events allow.
template <class X>
void check_slots() {
    const int order[] = {0, 1, 2, 0, 1, 2, 2, 1, 0, 0, 2, 1, 0};
    const int count = int(sizeof(order) / sizeof(order[0]));
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    ThreeGroups<X> three(dev);
    const size_t each = three.N * three.OC;
    GpuBuffer<X, X> outs(dev, each * size_t(count));
    // 1: the next group is fetched ahead, 2: one that does not come, 3: both; 4: one that does not come, into the slot
    // that was read last and is wanted next, so that it is overwritten before its weights were ever used.
    for (int ahead = 0; ahead < 5; ahead++) {
        outs.set(std::vector<X>(outs.n, stored<X>(-7)));
        for (int k = 0; k < count; k++) {
            const int i = order[k], next = order[(k + 1) % count], other = 3 - i - (next == i ? (i + 1) % 3 : next);
            three.forward(size_t(i), outs.data() + size_t(k) * each);
            if (ahead & 2) {
                three.prefetch(size_t(other));
            }
            if (ahead & 1) {
                three.prefetch(size_t(next));
            }
            if (ahead == 4 && next == i) {
                const int before = order[k - 1];  // its slot is named again, so that the other one goes
                for (const int group : {before, 3 - i - before, before}) {
                    three.prefetch(size_t(group));
                }
            }
        }
        const std::vector<double> got = numbers(outs.get());
        for (int k = 0; k < count; k++) {
            const std::vector<double>& want = three.alone[size_t(order[k])];
            CHECK(same_bits(got.data() + size_t(k) * each, want.data(), want.size()),
                  "fetched ahead %d, call %d: not group %d's output", ahead, k, order[k]);
        }
    }
}
void linear_slots() {
    check_slots<bf16>();
    check_slots<float>();
}
void linear_slots_queued() {
    const char* const names[] = {"SIMT_STREAMS", "SIMT_SEED"};
    std::string kept[2];
    bool had[2];
    for (int i = 0; i < 2; i++) {
        const char* const value = getenv(names[i]);
        had[i] = value != nullptr;
        kept[i] = value ? value : "";
    }
    setenv("SIMT_STREAMS", "queues", 1);
    for (const char* seed : {"1", "2", "3"}) {
        setenv("SIMT_SEED", seed, 1);
        check_slots<bf16>();
    }
    for (int i = 0; i < 2; i++) {
        had[i] ? setenv(names[i], kept[i].c_str(), 1) : unsetenv(names[i]);
    }
}

// The weights stay in the slot, the adapter does not.
void linear_slots_adapter() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    ThreeGroups<bf16> three(dev);
    GpuBuffer<bf16, bf16> out(dev, three.N * three.OC);
    three.forward(0, out.data());
    const std::vector<double> before = numbers(out.get());
    const std::vector<float> zeros(three.problems[0].part[1].fB.size());
    device_to(static_cast<Gpu<bf16>&>(dev), const_cast<float*>(three.groups[0]->g.part[1].B), zeros.data(),
              zeros.size() * sizeof(float));
    three.forward(0, out.data());
    const std::vector<double> after = numbers(out.get());
    bool first_same = true, second_same = true;
    for (size_t i = 0; i < three.N; i++) {
        for (size_t j = 0; j < 128; j++) {
            (j < 64 ? first_same : second_same) &= before[i * 128 + j] == after[i * 128 + j];
        }
    }
    CHECK(first_same && !second_same, "the second part's adapter was not written anew");
}

// Memory that was freed may come to hold other weights.
void linear_slots_forget() {
    GpuDevice<bf16> dev;
    if (!dev.ok || !device_arena(static_cast<Gpu<bf16>&>(dev), 4 << 20).empty()) {
        return;
    }
    const Shape s = {"again", 5, 48, PLAIN, {{48, 3, Store::NF4, false}}, 0, false, 0, true};
    How how;
    how.path = GemmPath::DEQUANT;
    device_reserve(static_cast<Gpu<bf16>&>(dev), 1 << 20);
    linear_slots_reserve(static_cast<Gpu<bf16>&>(dev), 1 << 16);
    const void* where = nullptr;
    for (uint64_t seed : {1, 2}) {
        const Problem p = make_problem<bf16>(s, seed);
        DeviceGroup<bf16> on(dev, p);
        CHECK(!where || where == on.g.part[0].w.codes, "the arena gave other memory: nothing is tested");
        where = on.g.part[0].w.codes;
        const Result got = device_result(static_cast<Gpu<bf16>&>(dev), p, on, how), exact = exact_result(p),
                     plain = plain_result<bf16>(p);
        check_yardstick<bf16>("after other weights in the same place", got.out, plain.out, exact.out);
        std::reverse(on.owned.begin(), on.owned.end());  // an arena takes its last piece back
    }
}

}  // namespace

extern const Test gpu_linear_tests[] = {{"gpu_linear_bf16", linear_bf16},
                                        {"gpu_linear_float", linear_float},
                                        {"gpu_linear_no_din", linear_no_din},
                                        {"gpu_linear_paths", linear_paths},
                                        {"gpu_linear_dispatch", linear_dispatch},
                                        {"gpu_linear_slots", linear_slots},
                                        {"gpu_linear_slots_queued", linear_slots_queued},
                                        {"gpu_linear_slots_adapter", linear_slots_adapter},
                                        {"gpu_linear_slots_forget", linear_slots_forget},
                                        {nullptr, nullptr}};
