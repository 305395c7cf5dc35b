// A linear group of one NF4 matrix (OC, C) with an adapter of rank R behind an RMSNorm. BWD 0: out = n W^T + s n A^T
// B^T, BWD 1: din, dA and dB. Version 2 against 3 is what dequantising costs where no attention hides it; 4 against 2
// and 3 is where the table of linear.cuh should change over.
//
//   1  as frameworks do it: dequantise, the frozen product, then the adapter's products in passes of their own
//   2  adapters folded in, dequantised each time
//   3  adapters folded in, W ready in its slot: prefetched, or used a moment ago
//   4  adapters folded in, the fused kernel
//   5* kernels/linear.cuh by its table, W not in a slot
//   c1  plain loops: dequantised, the frozen product, then the adapter's products in passes of their own
//   c2  the products of kernels/cpu/linear.h, the adapter's in passes of their own (BWD 0)
//   c3* kernels/cpu/linear.h: adapters folded in, fp32
//   c4* the same, the frozen product in int16
#include "dev/nf4_matrix.h"
#include "kernels/cpu/linear.h"
#include "kernels/linear.cuh"

enum { X_ = NF4_ARRAYS, RSTD, NORM, A_, B_, FORWARD };
enum { OUT_ = FORWARD, OUT_XA, NORMED };
enum { DOUT = FORWARD, XA, DIN, DA, DB, BARE_XA };
constexpr float SCALE = 2;

static size_t room_of(const Shape& s) {
    return Gpu<bf16>::row_room(int(s["R"]));
}

static std::vector<Array> arrays(const Shape& s) {
    const size_t N = s["N"], C = s["C"], OC = s["OC"], R = s["R"], width = OC + room_of(s);
    std::vector<Array> a = nf4_arrays(s);
    a.push_back({"x", Kind::STORE, Role::IN, N * C, uniform(2, -2, 2)});
    a.push_back({"rstd", Kind::F32, Role::IN, N, uniform(3, 0.5, 1)});
    a.push_back({"norm", Kind::F32, Role::IN, C, uniform(4, 0.5, 1.5)});
    a.push_back({"A", Kind::F32, Role::IN, R * C, uniform(5, -0.05, 0.05)});
    a.push_back({"B", Kind::F32, Role::IN, OC * R, uniform(6, -0.05, 0.05)});
    if (s["BWD"] == 0) {
        a.push_back({"out", Kind::STORE, Role::OUT, N * OC});
        a.push_back({"xa", Kind::STORE, Role::SCRATCH, N * R});  // with the scale on the GPU, without on the CPU
        a.push_back({"normed", Kind::STORE, Role::SCRATCH, N * C});
    } else {
        // The GPU puts D = s dout B into the room behind a row.
        a.push_back({"dout", Kind::STORE, Role::USED_UP, N * width, uniform(7, -1, 1)});
        a.push_back({"xa", Kind::STORE, Role::IN, N * R, uniform(8, -1, 1)});
        a.push_back({"din", Kind::STORE, Role::OUT, N * C});
        a.push_back({"dA", Kind::F32, Role::INOUT, R * C, uniform(9, -1, 1)});
        a.push_back({"dB", Kind::F32, Role::INOUT, OC * R, uniform(10, -1, 1)});
        a.push_back({"xa without the scale", Kind::STORE, Role::SCRATCH, N * R});  // as the CPU keeps it
    }
    return a;
}

// sum of a[i * a_step] b[i * b_step].
static double dot(const double* a, size_t a_step, const double* b, size_t b_step, size_t n, const Precision& p) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum = p.f32(sum + p.f32(a[i * a_step] * b[i * b_step]));
    }
    return sum;
}

static void evaluate_backward(const Shape& s, Values& v, const Precision& p, const std::vector<double>& n,
                              const std::vector<double>& w, const std::vector<double>& A,
                              const std::vector<double>& B) {
    const size_t N = s["N"], C = s["C"], OC = s["OC"], R = s["R"], width = OC + room_of(s);
    for (size_t i = 0; i < N; i++) {
        double* const dout = &v[DOUT][i * width];
        std::vector<double> scaled(OC);
        for (size_t o = 0; o < OC; o++) {
            scaled[o] = p.store(SCALE * dout[o]);
        }
        for (size_t j = 0; j < width - OC; j++) {
            dout[OC + j] = j < R ? p.store(dot(scaled.data(), 1, &B[j], R, OC, p)) : 0;
        }
        for (size_t c = 0; c < C; c++) {
            const double base = p.store(dot(dout, 1, &w[c], C, OC, p));
            v[DIN][i * C + c] = R > 0 ? p.store(base + p.store(dot(dout + OC, 1, &A[c], C, R, p))) : base;
        }
    }
    for (size_t j = 0; j < R; j++) {
        for (size_t c = 0; c < C; c++) {
            double& dA = v[DA][j * C + c];
            dA = p.f32(dA + p.store(dot(&v[DOUT][OC + j], width, &n[c], C, N, p)));
        }
        for (size_t o = 0; o < OC; o++) {
            double& dB = v[DB][o * R + j];
            dB = p.f32(dB + p.store(dot(&v[DOUT][o], width, &v[XA][j], R, N, p)));
        }
    }
}

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    const size_t N = s["N"], C = s["C"], OC = s["OC"], R = s["R"];
    std::vector<double> w(OC * C), n(N * C), A = v[A_], B = v[B_];
    for (size_t i = 0; i < w.size(); i++) {
        w[i] = nf4_weight(v, i);
    }
    for (size_t i = 0; i < n.size(); i++) {
        n[i] = p.store(p.store(v[X_][i] * v[RSTD][i / C]) * v[NORM][i % C]);
    }
    for (double& x : A) {
        x = p.store(x);
    }
    for (double& x : B) {
        x = p.store(x);
    }
    if (s["BWD"] != 0) {
        evaluate_backward(s, v, p, n, w, A, B);
        return;
    }
    for (size_t i = 0; i < N; i++) {
        std::vector<double> xa(R);
        for (size_t j = 0; j < R; j++) {
            xa[j] = p.store(dot(&n[i * C], 1, &A[j * C], 1, C, p));
        }
        for (size_t o = 0; o < OC; o++) {
            const double base = p.store(dot(&n[i * C], 1, &w[o * C], 1, C, p));
            const double lora = R > 0 ? p.store(SCALE * p.store(dot(xa.data(), 1, &B[o * R], 1, R, p))) : 0;
            v[OUT_][i * OC + o] = R > 0 ? p.store(base + lora) : base;
        }
    }
}

static Cost cost(const Shape& s, size_t store_bytes) {
    const double N = double(s["N"]), C = double(s["C"]), OC = double(s["OC"]), R = double(s["R"]);
    const double adapters = R * (C + OC), passes = s["BWD"] ? 2 : 1;
    return {nf4_bytes(s) + N * (C * passes + OC) * double(store_bytes) + adapters * 4 * passes,
            2 * N * (OC * C + adapters * passes)};
}

// ----------------------------------------------------------------------------
// versions

template <class Real>
static LinearGroup<Real> group_of(const Run& r, bool packed) {
    LinearGroup<Real> g;
    g.parts = 1;
    LinearPart<Real>& part = g.part[0];
    part.w = packed ? nf4_packed_matrix(r) : nf4_matrix(r);
    part.w.packed = packed;
    part.r = g.R = int(r["R"]);
    part.scale = SCALE;
    part.A = r.get<float>(A_);
    part.B = r.get<float>(B_);
    if (r["BWD"]) {
        part.dA = r.get<float>(DA);
        part.dB = r.get<float>(DB);
    }
    g.C = int(r["C"]);
    g.OC = int(r["OC"]);
    return g;
}

template <class X>
static LinearInput<X, float> input_of(const Run& r) {
    return {LinearInput<X, float>::RMSNORM, r.get<X>(X_), r["C"], r.get<float>(RSTD), r.get<float>(NORM)};
}

template <class Dev>
static void both(Dev& dev, Run& r, const LinearGroup<float>& g) {
    using X = typename Dev::floatX;
    const Rope<float>* const rope = nullptr;
    if (r["BWD"]) {
        linear_backward(dev, r.get<X>(DIN), r.get<X>(DOUT), r["OC"] + room_of(r.shape), input_of<X>(r), g, r.get<X>(XA),
                        r["N"], rope, Dropout());
    } else {
        linear_forward(dev, r.get<X>(OUT_), r["OC"], r.get<X>(OUT_XA), input_of<X>(r), g, r["N"],
                       static_cast<const X*>(nullptr), rope, Dropout());
    }
}

// The frozen product alone, then what linear.cuh does where W is stored as X: products of the adapters' own.
template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    LinearGroup<float> g = group_of<float>(r, true);
    GpuState& s = *dev.state;
    matrix_to_scratch(dev, dev.stream, linear_slot_memory<X>(s, s.slots[0]), size_t(g.C), g.part[0].w);
    s.slots[0].holds[0] = nullptr;
    Matrix& w = g.part[0].w;
    w.data = linear_slot_memory<X>(s, s.slots[0]);
    w.store = sizeof(X) == 2 ? Store::BF16 : Store::F32;
    both(dev, r, g);
}

template <class X>
static void forget(Gpu<X>& dev) {
    for (GpuSlot& slot : dev.state->slots) {
        slot.holds[0] = nullptr;
    }
}

template <class X, GemmPath PATH, bool READY>
static void folded(Gpu<X>& dev, Run& r) {
    dev.gemm = PATH;
    if (!READY) {
        forget(dev);
    }
    both(dev, r, group_of<float>(r, true));
}

// c (M, N), rows ldc apart, += scale a b. Element (i, k) of a is a[i * a_row + k * a_k], (k, j) of b is
// b[k * b_k + j * b_col].
static void plain_product(Cpu<float>& dev, float* c, size_t ldc, const float* a, size_t a_row, size_t a_k,
                          const float* b, size_t b_k, size_t b_col, size_t M, size_t N, size_t K, float scale) {
    parallel_ranges(dev.threads, M, 1, [&](size_t begin, size_t end, int) {
        for (size_t i = begin; i < end; i++) {
            for (size_t j = 0; j < N; j++) {
                float sum = 0;
                for (size_t k = 0; k < K; k++) {
                    sum += a[i * a_row + k * a_k] * b[k * b_k + j * b_col];
                }
                c[i * ldc + j] += scale * sum;
            }
        }
    });
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const size_t N = r["N"], C = r["C"], OC = r["OC"], R = r["R"], width = OC + room_of(r.shape);
    const Matrix m = nf4_matrix(r);
    std::vector<float> w(OC * C), n(N * C), t(N * R);
    for (size_t row = 0; row < OC; row++) {
        matrix_row(dev, &w[row * C], m, row);
    }
    for (size_t i = 0; i < n.size(); i++) {
        n[i] = r.get<float>(X_)[i] * r.get<float>(RSTD)[i / C] * r.get<float>(NORM)[i % C];
    }
    const float *A = r.get<float>(A_), *B = r.get<float>(B_);
    if (r["BWD"] == 0) {
        float* out = r.get<float>(OUT_);
        std::fill(out, out + N * OC, 0.0f);
        plain_product(dev, out, OC, n.data(), C, 1, w.data(), 1, C, N, OC, C, 1);
        plain_product(dev, t.data(), R, n.data(), C, 1, A, 1, C, N, R, C, 1);
        plain_product(dev, out, OC, t.data(), R, 1, B, 1, R, N, OC, R, SCALE);
        return;
    }
    float *din = r.get<float>(DIN), *dout = r.get<float>(DOUT);
    std::fill(din, din + N * C, 0.0f);
    plain_product(dev, t.data(), R, dout, width, 1, B, R, 1, N, R, OC, SCALE);
    plain_product(dev, din, C, dout, width, 1, w.data(), C, 1, N, C, OC, 1);
    plain_product(dev, din, C, t.data(), R, 1, A, C, 1, N, C, R, 1);
    plain_product(dev, r.get<float>(DA), C, t.data(), 1, R, n.data(), C, 1, R, C, N, 1);
    plain_product(dev, r.get<float>(DB), R, dout, 1, width, r.get<float>(XA), R, 1, OC, R, N, 1);
}

// A matrix of floats as a group without an adapter; scale stands before the next product, not in it.
static LinearGroup<float> float_group(const float* w, size_t OC, size_t C) {
    LinearGroup<float> g;
    g.parts = 1;
    g.part[0].w.data = w;
    g.part[0].w.rows = g.OC = int(OC);
    g.part[0].w.cols = g.C = int(C);
    return g;
}

static void on_cpu2(Cpu<float>& dev, Run& r) {
    const size_t N = r["N"], C = r["C"], OC = r["OC"], R = r["R"];
    const Rope<float>* const rope = nullptr;
    float *out = r.get<float>(OUT_), *xa = r.get<float>(OUT_XA), *normed = r.get<float>(NORMED);
    rmsnorm_forward(dev, normed, r.get<float>(X_), r.get<float>(RSTD), r.get<float>(NORM), N, int(C));
    LinearInput<float, float> in, down;
    in.x = normed;
    in.stride = C;
    down.x = xa;
    down.stride = R;
    LinearGroup<float> frozen = group_of<float>(r, false);
    frozen.R = frozen.part[0].r = 0;
    linear_forward(dev, out, OC, xa, in, frozen, N, static_cast<const float*>(nullptr), rope, Dropout());
    if (R > 0) {
        linear_forward(dev, xa, R, xa, in, float_group(r.get<float>(A_), R, C), N, static_cast<const float*>(nullptr),
                       rope, Dropout());
        for (size_t i = 0; i < N * R; i++) {
            xa[i] *= SCALE;
        }
        linear_forward(dev, out, OC, xa, down, float_group(r.get<float>(B_), OC, R), N, static_cast<const float*>(out),
                       rope, Dropout());
    }
}

static void on_cpu3(Cpu<float>& dev, Run& r) {
    Run own = r;
    if (r["BWD"]) {
        own.memory[XA] = r.memory[BARE_XA];
    }
    both(dev, own, group_of<float>(r, false));
}

static bool forward_only(const Shape& s) {
    return s["BWD"] == 0;
}
static bool small(const Shape& s) {
    return s["N"] * s["OC"] * s["C"] <= size_t(1) << 28;
}

template <class X>
static void prepare(Gpu<X>& dev, Run& r) {
    nf4_prepare(dev, r);
    const LinearGroup<float> g = group_of<float>(r, true);
    dev.gemm = GemmPath::DEQUANT;
    device_reserve(dev, linear_workspace(dev, g, r["N"]));
    linear_slots_reserve(dev, linear_slot_bytes(dev, g, r["N"]));
    forget(dev);  // the same place may have held other weights
    device_sync(dev);
}

static void prepare_cpu(Cpu<float>& dev, Run& r) {
    device_reserve(dev, linear_workspace(dev, group_of<float>(r, false), r["N"]));
    for (size_t i = 0; r["BWD"] && i < r["N"] * r["R"]; i++) {
        r.get<float>(BARE_XA)[i] = r.get<float>(XA)[i] / SCALE;
    }
}

int main(int argc, char** argv) {
    Op op = {"linear", "a frozen NF4 linear with its adapter"};
    for (size_t backward : {0, 1}) {
        const auto shape = [=](size_t N, size_t OC, size_t C, size_t R) {
            return Shape{{"N", N}, {"OC", OC}, {"C", C}, {"R", R}, {"BWD", backward}};
        };
        for (size_t N : {64, 128, 256, 512, 1024, 2048, 8192}) {
            op.shapes.push_back(shape(N, 4096, 4096, 16));
        }
        op.cpu_shapes.push_back(shape(64, 2048, 2048, 16));
        op.cpu_shapes.push_back(shape(512, 2048, 2048, 16));
        op.cpu_shapes.push_back(shape(512, 16384, 2048, 16));
        op.shapes.push_back(shape(8192, 28672, 4096, 32));
        op.shapes.push_back(shape(8192, 4096, 14336, 16));
        op.awkward.push_back(shape(1, 64, 64, 16));
        op.awkward.push_back(shape(33, 128, 64, 3));
        op.awkward.push_back(shape(70, 64, 192, 0));
    }
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.versions = {
        gpu_version(1, "dequantise, frozen product, adapter", version1<bf16>, version1<float>),
        gpu_version(2, "folded, dequantised each time", folded<bf16, GemmPath::DEQUANT, false>,
                    folded<float, GemmPath::DEQUANT, false>),
        gpu_version(3, "folded, W ready in a slot", folded<bf16, GemmPath::DEQUANT, true>,
                    folded<float, GemmPath::DEQUANT, true>),
        gpu_version(4, "folded, the fused kernel", folded<bf16, GemmPath::FUSED, false>, nullptr),
        gpu_production(5, "folded, by the table", folded<bf16, GemmPath::AUTO, false>,
                       folded<float, GemmPath::AUTO, false>),
        cpu_version(1, "plain loops", on_cpu1, small),
        cpu_version(2, "packed panels, adapter in passes of its own", on_cpu2, forward_only),
        cpu_production(3, "packed panels, folded, fp32", on_cpu3, nullptr, "fp32"),
        cpu_production(4, "packed panels, folded, int16", on_cpu3, nullptr, "int16"),
    };
    op.prepare_bf16 = prepare<bf16>;
    op.prepare_float = prepare<float>;
    op.prepare_cpu = prepare_cpu;
    return harness(op, argc, argv);
}
