// Dense products, row-major: d (M, N) = op(A) op(B), the shapes that an 8B model makes. AT, BT: the operand is stored
// transposed. The first four are a layer's frozen products with their adapters' columns, the fifth an input gradient,
// the rest the skinny products of the adapters.
//
//   1  a thread an element, operands read from memory each time
//   2  tiles of 32 x 32 in shared memory, four elements a thread
//   3* kernels/matmul.cuh: cuBLASLt (plain loops on the stand-in)
#include "dev/harness.h"
#include "kernels/matmul.cuh"

enum { A_, B_, D_ };

static std::vector<Array> arrays(const Shape& s) {
    return {
        {"a", Kind::STORE, Role::IN, s["M"] * s["K"], uniform(1, -1, 1)},
        {"b", Kind::STORE, Role::IN, s["K"] * s["N"], uniform(2, -1, 1)},
        {"d", Kind::STORE, Role::OUT, s["M"] * s["N"]},
    };
}

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    const size_t M = s["M"], N = s["N"], K = s["K"];
    for (size_t i = 0; i < M; i++) {
        for (size_t j = 0; j < N; j++) {
            double sum = 0;
            for (size_t k = 0; k < K; k++) {
                const double a = v[A_][s["AT"] ? k * M + i : i * K + k], b = v[B_][s["BT"] ? j * K + k : k * N + j];
                sum = p.f32(sum + p.f32(a * b));
            }
            v[D_][i * N + j] = p.store(sum);
        }
    }
}

static Cost cost(const Shape& s, size_t store_bytes) {
    const double M = double(s["M"]), N = double(s["N"]), K = double(s["K"]);
    return {(M * K + K * N + M * N) * double(store_bytes), 2 * M * N * K};
}

// ----------------------------------------------------------------------------
// CUDA kernels

// Element (row, k) of op(A), and (k, col) of op(B), at row * step_row + k * step_k.
struct Steps {
    size_t a_row, a_k, b_k, b_col;
};

template <class X>
__global__ void matmul_kernel1(X* d, const X* a, const X* b, Steps s, size_t M, size_t N, size_t K) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x, row = i / N, col = i % N;
    if (row < M) {
        float sum = 0;
        for (size_t k = 0; k < K; k++) {
            sum = fmaf(widen(a[row * s.a_row + k * s.a_k]), widen(b[k * s.b_k + col * s.b_col]), sum);
        }
        d[i] = narrow<X>(sum);
    }
}

constexpr int TILE = 32, ROWS = 4;  // a thread: rows y, y + 8, y + 16, y + 24 of one column

template <class X>
__global__ void matmul_kernel2(X* d, const X* a, const X* b, Steps s, size_t M, size_t N, size_t K) {
    SHARED(float, tile_a, TILE*(TILE + 1));
    SHARED(float, tile_b, TILE*(TILE + 1));
    const size_t across = (N + TILE - 1) / TILE, row0 = blockIdx.x / across * TILE, col0 = blockIdx.x % across * TILE;
    const int x = int(threadIdx.x) % TILE, y = int(threadIdx.x) / TILE;
    float sum[ROWS] = {};
    for (size_t k0 = 0; k0 < K; k0 += TILE) {
        for (int r = 0; r < ROWS; r++) {
            const int i = y + r * TILE / ROWS;
            const bool in_a = row0 + i < M && k0 + x < K, in_b = k0 + i < K && col0 + x < N;
            tile_a[i * (TILE + 1) + x] = in_a ? widen(a[(row0 + i) * s.a_row + (k0 + x) * s.a_k]) : 0;
            tile_b[i * (TILE + 1) + x] = in_b ? widen(b[(k0 + i) * s.b_k + (col0 + x) * s.b_col]) : 0;
        }
        __syncthreads();
        for (int k = 0; k < TILE; k++) {
            for (int r = 0; r < ROWS; r++) {
                sum[r] = fmaf(tile_a[(y + r * TILE / ROWS) * (TILE + 1) + k], tile_b[k * (TILE + 1) + x], sum[r]);
            }
        }
        __syncthreads();
    }
    for (int r = 0; r < ROWS; r++) {
        const size_t row = row0 + size_t(y + r * TILE / ROWS), col = col0 + size_t(x);
        if (row < M && col < N) {
            d[row * N + col] = narrow<X>(sum[r]);
        }
    }
}

// ----------------------------------------------------------------------------
// versions

static Steps steps_of(const Run& r) {
    const size_t M = r["M"], N = r["N"], K = r["K"];
    return {r["AT"] ? 1 : K, r["AT"] ? M : 1, r["BT"] ? 1 : N, r["BT"] ? K : 1};
}

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    LAUNCH((matmul_kernel1<X>), unsigned(ceil_div(r["M"] * r["N"], 256)), 256, 0, dev.stream, r.get<X>(D_),
           r.get<X>(A_), r.get<X>(B_), steps_of(r), r["M"], r["N"], r["K"]);
}

template <class X>
static void version2(Gpu<X>& dev, Run& r) {
    const size_t blocks = ceil_div(r["M"], TILE) * ceil_div(r["N"], TILE);
    LAUNCH((matmul_kernel2<X>), unsigned(blocks), TILE * TILE / ROWS, 0, dev.stream, r.get<X>(D_), r.get<X>(A_),
           r.get<X>(B_), steps_of(r), r["M"], r["N"], r["K"]);
}

template <class X>
static void version3(Gpu<X>& dev, Run& r) {
    Matmul<X, X> p;
    p.d = r.get<X>(D_);
    p.a = r.get<X>(A_);
    p.b = r.get<X>(B_);
    p.a_trans = r["AT"] != 0;
    p.b_trans = r["BT"] != 0;
    p.M = r["M"];
    p.ldd = p.N = r["N"];
    p.K = r["K"];
    p.lda = p.a_trans ? p.M : p.K;
    p.ldb = p.b_trans ? p.K : p.N;
    matmul(dev, p);
}

int main(int argc, char** argv) {
    Op op = {"matmul", "d (M, N) = op(A) op(B)"};
    const auto shape = [](size_t M, size_t N, size_t K, size_t at, size_t bt) {
        return Shape{{"M", M}, {"N", N}, {"K", K}, {"AT", at}, {"BT", bt}};
    };
    const size_t M = 8192;
    op.shapes = {shape(M, 6144, 4096 + 48, 0, 1),  shape(M, 4096, 4096 + 16, 0, 1),  shape(M, 28672, 4096 + 32, 0, 1),
                 shape(M, 4096, 14336 + 16, 0, 1), shape(M, 4096, 28672 + 32, 0, 0), shape(M, 48, 4096, 0, 1),
                 shape(M, 32, 28672, 0, 0),        shape(16, 4096, M, 1, 0),         shape(14336, 16, M, 1, 0)};
    for (size_t trans = 0; trans < 4; trans++) {
        op.awkward.push_back(shape(1, 24, 101, trans % 2, trans / 2));
        op.awkward.push_back(shape(33, 48, 70, trans % 2, trans / 2));
        op.awkward.push_back(shape(70, 1, 33, trans % 2, trans / 2));
    }
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.versions = {
        gpu_version(1, "a thread an element", version1<bf16>, version1<float>),
        gpu_version(2, "32 x 32 tiles in shared memory", version2<bf16>, version2<float>),
        gpu_production(3, "cuBLASLt, its first choice", version3<bf16>, version3<float>),
    };
    return harness(op, argc, argv);
}
