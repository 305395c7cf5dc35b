// Activations times an NF4 matrix with an adapter: y (M, OC) = x[:, :C + R] [W | B]^T, or with BWD 1
// dx (M, C) = dy[:, :OC + R] [W ; A]. Version 2 against 3 is where the fused kernel stops being worth it (the table of
// linear.cuh); 4 to 8 against 3 is the table of nf4_matmul.cuh.
//
//   1  a thread an output, weights decoded one by one from bitsandbytes' order
//   2  dequantised to scratch (kernels/nf4.cuh), then cuBLASLt
//   3* kernels/nf4_matmul.cuh, the tile by its table
//   4  tile 64 x 16
//   5  tile 64 x 32
//   6  tile 64 x 64
//   7  tile 128 x 128
//   8  tile 256 x 128
//   c1  an output at a time, weights decoded one by one (R 0, as all on the CPU)
//   c2  dequantised to scratch, then the product of kernels/cpu/linear.h
//   c3* kernels/cpu/linear.h: decoded while a panel is packed, fp32
//   c4* the same in int16
#include "dev/nf4_matrix.h"
#include "kernels/cpu/linear.h"
#include "kernels/matmul.h"
#include "kernels/nf4_matmul.cuh"

enum { X_ = NF4_ARRAYS, ADAPTER, SCRATCH, Y };

// K is without the adapter's columns.
struct Sizes {
    size_t M, K, F, R;
    bool backward;
};

static Sizes sizes_of(const Shape& s) {
    const bool backward = s["BWD"] != 0;
    return {s["M"], backward ? s["OC"] : s["C"], backward ? s["C"] : s["OC"], s["R"], backward};
}

static std::vector<Array> arrays(const Shape& s) {
    const Sizes z = sizes_of(s);
    std::vector<Array> a = nf4_arrays(s);
    a.push_back({"x", Kind::STORE, Role::IN, z.M * (z.K + z.R), uniform(2, -1, 1)});
    a.push_back({"adapter", Kind::STORE, Role::IN, z.F * z.R, uniform(3, -0.1, 0.1)});
    a.push_back({"scratch", Kind::STORE, Role::SCRATCH, z.F * (z.K + z.R)});
    a.push_back({"y", Kind::STORE, Role::OUT, z.M * z.F});
    return a;
}

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    const Sizes z = sizes_of(s);
    const size_t n = z.K + z.R;
    std::vector<double> w(z.F * n);
    for (size_t f = 0; f < z.F; f++) {
        for (size_t k = 0; k < n; k++) {
            w[f * n + k] = k < z.K ? nf4_weight(v, z.backward ? k * z.F + f : f * z.K + k)
                                   : v[ADAPTER][z.backward ? (k - z.K) * z.F + f : f * z.R + k - z.K];
        }
    }
    for (size_t i = 0; i < z.M * z.F; i++) {
        double sum = 0;
        for (size_t k = 0; k < n; k++) {
            sum = p.f32(sum + p.f32(v[X_][i / z.F * n + k] * w[i % z.F * n + k]));
        }
        v[Y][i] = p.store(sum);
    }
}

static Cost cost(const Shape& s, size_t store_bytes) {
    const Sizes z = sizes_of(s);
    const double elements = double(z.M * (z.K + z.R) + z.F * z.R + z.M * z.F);
    return {nf4_bytes(s) + elements * double(store_bytes), 2 * double(z.M) * double(z.F) * double(z.K + z.R)};
}

// ----------------------------------------------------------------------------
// CUDA kernels

template <class X>
__global__ void nf4_matmul_kernel1(X* y, const X* x, Matrix w, const X* adapter, Sizes z) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const float table = nf4_table(threadIdx.x % 32);
    const size_t m = i / z.F < z.M ? i / z.F : z.M - 1, f = i % z.F;  // all lanes of a warp look codes up
    float sum = 0;
    for (size_t k = 0; k < z.K; k++) {
        float weight[1];
        nf4_run(weight, w, table, z.backward ? k * z.F + f : f * z.K + k);
        sum += widen(x[m * (z.K + z.R) + k]) * weight[0];
    }
    for (size_t r = 0; r < z.R; r++) {
        sum += widen(x[m * (z.K + z.R) + z.K + r]) * widen(adapter[z.backward ? r * z.F + f : f * z.R + r]);
    }
    if (i < z.M * z.F) {
        y[i] = narrow<X>(sum);
    }
}

// ----------------------------------------------------------------------------
// versions

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    const Sizes z = sizes_of(r.shape);
    LAUNCH((nf4_matmul_kernel1<X>), unsigned(ceil_div(z.M * z.F, 128)), 128, 0, dev.stream, r.get<X>(Y), r.get<X>(X_),
           nf4_matrix(r), r.get<X>(ADAPTER), z);
}

// [W | B], or [W ; A], in scratch.
template <class X>
static void version2(Gpu<X>& dev, Run& r) {
    const Sizes z = sizes_of(r.shape);
    Matrix w = nf4_packed_matrix(r);
    w.packed = true;
    const size_t n = z.K + z.R, ld = z.backward ? z.F : n, rows = z.backward ? z.R : z.F, cols = z.backward ? z.F : z.R;
    X* scratch = r.get<X>(SCRATCH);
    matrix_to_scratch(dev, dev.stream, scratch, ld, w);
    if (z.R > 0) {
        CUDA_CHECK(cudaMemcpy2DAsync(scratch + (z.backward ? z.K * ld : z.K), ld * sizeof(X), r.get<X>(ADAPTER),
                                     cols * sizeof(X), cols * sizeof(X), rows, cudaMemcpyDeviceToDevice, dev.stream));
    }
    Matmul<X, X> p;
    p.d = r.get<X>(Y);
    p.ldd = z.F;
    p.a = r.get<X>(X_);
    p.lda = n;
    p.b = scratch;
    p.ldb = ld;
    p.b_trans = !z.backward;
    p.M = z.M;
    p.N = z.F;
    p.K = n;
    matmul(dev, p);
}

template <Nf4Tile TILE>
static void fused(Gpu<bf16>& dev, Run& r) {
    const Sizes z = sizes_of(r.shape);
    Matrix w = nf4_packed_matrix(r);
    w.packed = true;
    const Nf4Group g = {1, {&w}, w.rows, w.cols};
    const bf16 *x = r.get<bf16>(X_), *adapter = r.get<bf16>(ADAPTER);
    bf16* y = r.get<bf16>(Y);
    if (z.backward) {
        nf4_matmul_backward(dev, y, z.F, x, z.K + z.R, z.M, g, adapter, int(z.R), TILE);
    } else {
        nf4_matmul_forward(dev, y, z.F, x, z.K + z.R, z.M, g, adapter, int(z.R), nullptr, 0, TILE);
    }
}

// The matrix in NF4, or what on_cpu2 has written to scratch.
static LinearGroup<float> cpu_group(const Run& r, bool dequantised) {
    LinearGroup<float> g;
    g.parts = 1;
    g.part[0].w = nf4_matrix(r);
    if (dequantised) {
        g.part[0].w.store = Store::F32;
        g.part[0].w.data = r.get<float>(SCRATCH);
    }
    g.C = int(r["C"]);
    g.OC = int(r["OC"]);
    return g;
}

static bool no_adapter(const Shape& s) {
    return s["R"] == 0;
}

static void prepare_cpu(Cpu<float>& dev, Run& r) {
    device_reserve(dev, std::max(linear_workspace(dev, cpu_group(r, false), r["M"]),
                                 linear_workspace(dev, cpu_group(r, true), r["M"])));
}

static bool small_no_adapter(const Shape& s) {
    return s["R"] == 0 && s["M"] * s["OC"] * s["C"] <= size_t(1) << 26;
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const Sizes z = sizes_of(r.shape);
    const Matrix w = nf4_matrix(r);
    parallel_ranges(dev.threads, z.M * z.F, 64, [&](size_t begin, size_t end, int) {
        for (size_t i = begin; i < end; i++) {
            const size_t m = i / z.F, f = i % z.F;
            float sum = 0;
            for (size_t k = 0; k < z.K; k++) {
                const size_t at = z.backward ? k * z.F + f : f * z.K + k;
                const int code = at % 2 ? w.codes[at / 2] & 15 : w.codes[at / 2] >> 4;
                sum += r.get<float>(X_)[m * z.K + k] * to_float(to_bf16(NF4_CODE[code] * nf4_absmax(w, at / 64)));
            }
            r.get<float>(Y)[i] = sum;
        }
    });
}

static void cpu_product(Cpu<float>& dev, Run& r, const LinearGroup<float>& g) {
    const Sizes z = sizes_of(r.shape);
    LinearInput<float, float> in;
    in.x = r.get<float>(X_);
    in.stride = z.K;
    if (z.backward) {
        linear_backward(dev, r.get<float>(Y), r.get<float>(X_), z.K, LinearInput<float, float>(), g,
                        static_cast<const float*>(nullptr), z.M, static_cast<const Rope<float>*>(nullptr), Dropout());
    } else {
        linear_forward(dev, r.get<float>(Y), z.F, static_cast<float*>(nullptr), in, g, z.M,
                       static_cast<const float*>(nullptr), static_cast<const Rope<float>*>(nullptr), Dropout());
    }
}

static void on_cpu2(Cpu<float>& dev, Run& r) {
    const Matrix w = nf4_matrix(r);
    parallel_ranges(dev.threads, size_t(w.rows), 1, [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            matrix_row(dev, r.get<float>(SCRATCH) + row * size_t(w.cols), w, row);
        }
    });
    cpu_product(dev, r, cpu_group(r, true));
}

static void on_cpu3(Cpu<float>& dev, Run& r) {
    cpu_product(dev, r, cpu_group(r, false));
}

int main(int argc, char** argv) {
    Op op = {"nf4_matmul", "activations times NF4 (OC, C) with R adapter columns"};
    for (size_t backward : {0, 1}) {
        for (size_t M : {16, 32, 64, 128, 256, 512, 1024, 4096}) {
            op.shapes.push_back({{"M", M}, {"OC", 4096}, {"C", 4096}, {"R", 16}, {"BWD", backward}});
        }
        op.shapes.push_back({{"M", 128}, {"OC", 28672}, {"C", 4096}, {"R", 32}, {"BWD", backward}});
        for (size_t M : {16, 64, 128, 512}) {
            op.cpu_shapes.push_back({{"M", M}, {"OC", 2048}, {"C", 2048}, {"R", 0}, {"BWD", backward}});
        }
        op.cpu_shapes.push_back({{"M", 512}, {"OC", 8192}, {"C", 2048}, {"R", 0}, {"BWD", backward}});
        op.awkward.push_back({{"M", 1}, {"OC", 64}, {"C", 64}, {"R", 0}, {"BWD", backward}});
        op.awkward.push_back({{"M", 70}, {"OC", 192}, {"C", 320}, {"R", 0}, {"BWD", backward}});
        op.awkward.push_back({{"M", 33}, {"OC", 128}, {"C", 192}, {"R", 16}, {"BWD", backward}});
        op.awkward.push_back({{"M", 70}, {"OC", 192}, {"C", 320}, {"R", 48}, {"BWD", backward}});
    }
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.versions = {
        gpu_version(1, "an output a thread", version1<bf16>, version1<float>),
        gpu_version(2, "dequantise, then cuBLASLt", version2<bf16>, version2<float>),
        gpu_production(3, "decoded in registers, tile by its table", fused<Nf4Tile::BY_SHAPE>, nullptr),
        gpu_version(4, "tile 64 x 16", fused<Nf4Tile::T64x16>, nullptr),
        gpu_version(5, "tile 64 x 32", fused<Nf4Tile::T64x32>, nullptr),
        gpu_version(6, "tile 64 x 64", fused<Nf4Tile::T64x64>, nullptr),
        gpu_version(7, "tile 128 x 128", fused<Nf4Tile::T128x128>, nullptr),
        gpu_version(8, "tile 256 x 128", fused<Nf4Tile::T256x128>, nullptr),
        cpu_version(1, "an output at a time", on_cpu1, small_no_adapter),
        cpu_version(2, "dequantised, then packed panels, fp32", on_cpu2, no_adapter),
        cpu_production(3, "decoded into packed panels, fp32", on_cpu3, no_adapter, "fp32"),
        cpu_production(4, "decoded into packed panels, int16", on_cpu3, no_adapter, "int16"),
    };
    op.prepare_bf16 = nf4_prepare<bf16>;
    op.prepare_float = nf4_prepare<float>;
    op.prepare_cpu = prepare_cpu;
    return harness(op, argc, argv);
}
