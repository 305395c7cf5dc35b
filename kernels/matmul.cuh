// Dense matrix products (matmul.h) by cuBLASLt, by plain loops in the stand-in: the one place that knows cuBLASLt. Owns
// the plans: what the library is told of a product, and the algorithm that it chose, kept by shape, type, leading
// dimensions and alignment.
#pragma once
#include "kernels/cuda.cuh"
#include "kernels/device.cuh"
#include "kernels/matmul.h"

// ----------------------------------------------------------------------------
// plans. cuBLASLt is column-major; read so, a row-major matrix is its transpose, and D^T = op(B)^T op(A)^T: its A is
// our b, its B is our a, its m is our N.

inline cudaDataType_t matmul_type(const bf16*) {
    return CUDA_R_16BF;
}
inline cudaDataType_t matmul_type(const float*) {
    return CUDA_R_32F;
}

// What a kernel may assume of a pointer, in bytes.
inline uint32_t matmul_alignment(const void* p) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p) | 256;
    return uint32_t(address & (~address + 1));
}

template <class X, class Out>
std::string matmul_text(const Matmul<X, Out>& p) {
    char text[256];
    snprintf(text, sizeof(text), "(%zu, %zu) = %s %s (%zu, %zu)%s x (%zu, %zu)%s, rows %zu = %zu x %zu apart", p.M, p.N,
             sizeof(Out) == 2 ? "bf16" : "fp32", sizeof(X) == 2 ? "bf16" : "fp32", p.M, p.K,
             p.a_trans ? " transposed" : "", p.K, p.N, p.b_trans ? " transposed" : "", p.ldd, p.lda, p.ldb);
    return text;
}

template <class X, class Out>
void matmul_plan(MatmulPlan& plan, GpuState& s, const Matmul<X, Out>& p, const uint32_t (&alignment)[4]) {
    const int32_t trans_a = p.b_trans ? CUBLAS_OP_T : CUBLAS_OP_N, trans_b = p.a_trans ? CUBLAS_OP_T : CUBLAS_OP_N;
    CUBLAS_CHECK(cublasLtMatmulDescInit(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS_CHECK(
        cublasLtMatmulDescSetAttribute(&plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, &trans_a, sizeof(trans_a)));
    CUBLAS_CHECK(
        cublasLtMatmulDescSetAttribute(&plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, &trans_b, sizeof(trans_b)));
    const auto layout = [](cublasLtMatrixLayoutOpaque_t& l, cudaDataType_t type, size_t rows, size_t cols, size_t ld) {
        CUBLAS_CHECK(cublasLtMatrixLayoutInit(&l, type, cols, rows, int64_t(ld)));
    };
    layout(plan.a, matmul_type(p.b), p.b_trans ? p.N : p.K, p.b_trans ? p.K : p.N, p.ldb);
    layout(plan.b, matmul_type(p.a), p.a_trans ? p.K : p.M, p.a_trans ? p.M : p.K, p.lda);
    layout(plan.c, matmul_type(p.d), p.M, p.N, p.c ? p.ldc : p.ldd);
    layout(plan.d, matmul_type(p.d), p.M, p.N, p.ldd);

    cublasLtMatmulPreferenceOpaque_t preference;
    CUBLAS_CHECK(cublasLtMatmulPreferenceInit(&preference));
    const uint64_t workspace = LT_WORKSPACE;
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                      sizeof(workspace)));
    // Partial sums of a split contraction stay fp32; the other ways round each of them to the type of D.
    const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                      &reduction, sizeof(reduction)));
    const auto which = {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (const auto attribute : which) {
        const uint32_t& bytes = alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES];
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &bytes, sizeof(bytes)));
    }
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    const cublasStatus_t e = cublasLtMatmulAlgoGetHeuristic(s.lt, &plan.operation, &plan.a, &plan.b, &plan.c, &plan.d,
                                                            &preference, 1, &result, &found);
    if (e != CUBLAS_STATUS_SUCCESS || found == 0 || result.state != CUBLAS_STATUS_SUCCESS) {
        fprintf(stderr, "error: cuBLASLt has no algorithm for %s (%s)\n", matmul_text(p).c_str(),
                cublasLtGetStatusString(e != CUBLAS_STATUS_SUCCESS ? e : CUBLAS_STATUS_NOT_SUPPORTED));
        fprintf(stderr, "hint: a newer cuBLAS may have; scripts/gpu_check.sh tests the matrix products on this card\n");
        exit(1);
    }
    plan.algorithm = result.algo;
}

// ----------------------------------------------------------------------------
// the product

template <class X, class Out>
void matmul(Gpu<X>& dev, const Matmul<X, Out>& p) {
    GpuState& s = *dev.state;
    if (!s.lt_workspace) {
        s.lt_workspace = static_cast<char*>(device_alloc(dev, LT_WORKSPACE, "cuBLASLt"));
    }
    const Out* const c = p.c ? p.c : p.d;
    const float beta = p.c ? p.beta : 0;
    const uint32_t alignment[4] = {matmul_alignment(p.b), matmul_alignment(p.a), matmul_alignment(c),
                                   matmul_alignment(p.d)};
    const MatmulKey key = {p.M,
                           p.N,
                           p.K,
                           p.lda,
                           p.ldb,
                           p.ldd,
                           p.c ? p.ldc : 0,
                           uint64_t(p.a_trans),
                           uint64_t(p.b_trans),
                           sizeof(Out),
                           alignment[0],
                           alignment[1],
                           alignment[2],
                           alignment[3]};
    auto found = s.plans.find(key);
    if (found == s.plans.end()) {
        found = s.plans.emplace(key, MatmulPlan()).first;  // filled where it stays: its parts need not be copyable
        matmul_plan(found->second, s, p, alignment);
    }
    MatmulPlan& plan = found->second;
    CUBLAS_CHECK(cublasLtMatmul(s.lt, &plan.operation, &p.alpha, p.b, &plan.a, p.a, &plan.b, &beta, c, c == p.d ? &plan.d : &plan.c,
                                p.d, &plan.d, &plan.algorithm, s.lt_workspace, LT_WORKSPACE, dev.stream));
}

// ----------------------------------------------------------------------------
// the device's ceiling

// Numbers of -1 to 1 that look random: products of constants draw less power, and run at a higher clock.
template <class X>
__global__ void matmul_fill_kernel(X* out, size_t n) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) {
        const uint32_t h = (uint32_t(i) ^ uint32_t(i) >> 13) * 0x9e3779b1u;
        out[i] = narrow<X>(float(int(h >> 16) - 32768) * (1.0f / 32768));
    }
}

// The greatest square product, of up to 8192, that the workspace holds, for a tenth of a second. 0: it holds none.
template <class X>
double matmul_gflops(Gpu<X>& dev) {
    size_t n = 8192;
    while (n >= 64 && 3 * n * n * sizeof(X) > dev.workspace_bytes) {
        n /= 2;
    }
    if (n < 64) {
        return 0;
    }
    X* const memory = reinterpret_cast<X*>(dev.workspace);
    Matmul<X, X> m;
    m.d = memory;
    m.a = memory + n * n;
    m.b = memory + 2 * n * n;
    m.ldd = m.lda = m.ldb = m.M = m.N = m.K = n;
    m.b_trans = true;
    LAUNCH((matmul_fill_kernel<X>), unsigned(ceil_div(2 * n * n, 256)), 256, 0, dev.stream, memory + n * n, 2 * n * n);
    matmul(dev, m);
    const bool timing = dev.state->timing;
    device_sync(dev);
    device_timing(dev, true);
    double seconds = 0;
    size_t count = 1;
    for (; seconds < 0.1; count *= 2) {
        seconds = 0;
        device_clock_start(dev, &seconds);
        for (size_t i = 0; i < count; i++) {
            matmul(dev, m);
        }
        device_clock_stop(dev);
        device_sync(dev);
    }
    device_timing(dev, timing);
    return 2e-9 * double(n) * double(n) * double(n) * double(count / 2) / seconds;
}
