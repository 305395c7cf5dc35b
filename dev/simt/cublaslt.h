// A stand-in for the part of cuBLASLt that kernels/matmul.cuh calls: the same names, and every descriptor is honoured,
// so that a wrong one gives a wrong product here too. Column-major, as there:
//
//   D (m, n) = alpha op(A) op(B) + beta C
//
// A product is checked before it is made: known types, shapes that agree, leading dimensions not below the rows,
// pointers as aligned as the preference said, matrices that lie inside one allocation of the device. Sums are fp32 in
// order of k, rounded once when D is bf16: what the library's kernels do up to the order. Plain loops over OpenMP
// threads; each element is made by one of them, so the bits never depend on how many.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "dev/simt/memory.h"
#include "dev/simt/streams.h"
#include "kernels/bf16.h"

struct CUstream_st;

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB };
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES
};
enum cublasLtReductionScheme_t { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };

struct cublasLtContext {};
using cublasLtHandle_t = cublasLtContext*;
struct cublasLtMatrixLayoutOpaque_t {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld;
};
using cublasLtMatrixLayout_t = cublasLtMatrixLayoutOpaque_t*;
struct cublasLtMatmulDescOpaque_t {
    cublasComputeType_t compute;
    cudaDataType_t scale;
    cublasOperation_t trans[2];
};
using cublasLtMatmulDesc_t = cublasLtMatmulDescOpaque_t*;
struct cublasLtMatmulPreferenceOpaque_t {
    uint64_t workspace;
    uint32_t reduction, alignment[4];
};
using cublasLtMatmulPreference_t = cublasLtMatmulPreferenceOpaque_t*;
struct cublasLtMatmulAlgo_t {
    uint64_t workspace;
    uint32_t alignment[4];
};
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
};

inline const char* cublasLtGetStatusString(cublasStatus_t e) {
    return e == CUBLAS_STATUS_SUCCESS         ? "success"
           : e == CUBLAS_STATUS_INVALID_VALUE ? "invalid value"
                                              : "not supported";
}

inline void cublas_check(cublasStatus_t e, const char* file, int line) {
    if (e != CUBLAS_STATUS_SUCCESS) {
        fprintf(stderr, "error: cuBLASLt's stand-in: %s (%s:%d)\n", cublasLtGetStatusString(e), file, line);
        exit(1);
    }
}
#define CUBLAS_CHECK(call) cublas_check(call, __FILE__, __LINE__)

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    *handle = new cublasLtContext;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t layout, cudaDataType_t type, uint64_t rows,
                                               uint64_t cols, int64_t ld) {
    *layout = {type, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t desc, cublasComputeType_t compute,
                                             cudaDataType_t scale) {
    *desc = {compute, scale, {CUBLAS_OP_N, CUBLAS_OP_N}};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t what,
                                                     const void* value, size_t size) {
    if (size != sizeof(int32_t)) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    int32_t op;
    memcpy(&op, value, size);
    desc->trans[what == CUBLASLT_MATMUL_DESC_TRANSB] = cublasOperation_t(op);
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t preference) {
    *preference = {0, ~0u, {256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                           cublasLtMatmulPreferenceAttributes_t what, const void* value,
                                                           size_t size) {
    const bool wide = what == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
    if (size != (wide ? sizeof(uint64_t) : sizeof(uint32_t))) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    void* const to = wide ? static_cast<void*>(&preference->workspace)
                     : what == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK
                         ? static_cast<void*>(&preference->reduction)
                         : &preference->alignment[what - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES];
    memcpy(to, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

// Shapes, types and leading dimensions of a product that the library would take.
inline cublasStatus_t simt_matmul_checked(const cublasLtMatmulDescOpaque_t& desc, const cublasLtMatrixLayoutOpaque_t& a,
                                          const cublasLtMatrixLayoutOpaque_t& b, const cublasLtMatrixLayoutOpaque_t& c,
                                          const cublasLtMatrixLayoutOpaque_t& d) {
    const bool at = desc.trans[0] == CUBLAS_OP_T, bt = desc.trans[1] == CUBLAS_OP_T;
    const uint64_t m = at ? a.cols : a.rows, k = at ? a.rows : a.cols, k2 = bt ? b.cols : b.rows,
                   n = bt ? b.rows : b.cols;
    bool ok = k == k2 && m == d.rows && n == d.cols && c.rows == d.rows && c.cols == d.cols && m > 0 && n > 0 && k > 0;
    for (const cublasLtMatrixLayoutOpaque_t* layout : {&a, &b, &c, &d}) {
        ok &= layout->ld >= int64_t(layout->rows);
    }
    if (!ok || desc.compute != CUBLAS_COMPUTE_32F || desc.scale != CUDA_R_32F) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    const bool types = a.type == b.type && c.type == d.type && (a.type == CUDA_R_16BF || d.type == CUDA_R_32F);
    return types ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int wanted,
                                                     cublasLtMatmulHeuristicResult_t* results, int* found) {
    const cublasStatus_t e = simt_matmul_checked(*desc, *a, *b, *c, *d);
    *found = e == CUBLAS_STATUS_SUCCESS && wanted > 0 ? 1 : 0;
    if (*found == 1) {
        results[0].algo.workspace = preference->workspace;
        memcpy(results[0].algo.alignment, preference->alignment, sizeof(preference->alignment));
        results[0].workspaceSize = preference->workspace;
        results[0].state = CUBLAS_STATUS_SUCCESS;
    }
    return e;
}

inline bool simt_inside(const void* p, const cublasLtMatrixLayoutOpaque_t& layout) {
    const size_t elements = size_t(layout.cols - 1) * size_t(layout.ld) + size_t(layout.rows);
    return simt::memory_find(p, elements * (layout.type == CUDA_R_16BF ? 2 : 4)) != nullptr;
}

// Element (row, col) of a column-major matrix.
inline float simt_element(const void* p, const cublasLtMatrixLayoutOpaque_t& layout, size_t row, size_t col) {
    const size_t i = row + col * size_t(layout.ld);
    return layout.type == CUDA_R_16BF ? to_float(static_cast<const bf16*>(p)[i]) : static_cast<const float*>(p)[i];
}

// A product as it was asked for, until its turn on its stream comes.
struct SimtMatmul {
    cublasLtMatmulDescOpaque_t desc;
    const void *A, *B, *C;
    void* D;
    cublasLtMatrixLayoutOpaque_t a, b, c, d;
    float alpha, beta;
    char* workspace;
    size_t workspace_bytes;
};

inline void simt_matmul(const SimtMatmul& p) {
    const size_t edge = p.workspace_bytes < 4096 ? p.workspace_bytes : 4096;  // the library may write all of it
    memset(p.workspace, 0xff, edge);
    memset(p.workspace + p.workspace_bytes - edge, 0xff, edge);
    const bool at = p.desc.trans[0] == CUBLAS_OP_T, bt = p.desc.trans[1] == CUBLAS_OP_T;
    const size_t m = p.d.rows, n = p.d.cols, k = at ? p.a.rows : p.a.cols;
    std::vector<float> left(k * m);  // op(A) by rows of k, so that the inner loop runs along m
#pragma omp parallel for if (m * n * k > 100000)
    for (size_t l = 0; l < k; l++) {
        for (size_t i = 0; i < m; i++) {
            left[l * m + i] = at ? simt_element(p.A, p.a, l, i) : simt_element(p.A, p.a, i, l);
        }
    }
#pragma omp parallel for if (m * n * k > 100000)
    for (size_t j = 0; j < n; j++) {
        std::vector<float> sum(m, 0.0f);
        for (size_t l = 0; l < k; l++) {
            const float y = bt ? simt_element(p.B, p.b, j, l) : simt_element(p.B, p.b, l, j);
            for (size_t i = 0; i < m; i++) {
                sum[i] += left[l * m + i] * y;
            }
        }
        for (size_t i = 0; i < m; i++) {
            // C is not read when beta is 0: it may hold anything.
            const float x = p.beta == 0 ? p.alpha * sum[i] : p.alpha * sum[i] + p.beta * simt_element(p.C, p.c, i, j);
            const size_t at_d = i + j * size_t(p.d.ld);
            if (p.d.type == CUDA_R_16BF) {
                static_cast<bf16*>(p.D)[at_d] = to_bf16(x);
            } else {
                static_cast<float*>(p.D)[at_d] = x;
            }
        }
    }
}

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha, const void* A,
                                     cublasLtMatrixLayout_t a, const void* B, cublasLtMatrixLayout_t b,
                                     const void* beta, const void* C, cublasLtMatrixLayout_t c, void* D,
                                     cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t* algo, void* workspace,
                                     size_t workspace_bytes, CUstream_st* stream) {
    const cublasStatus_t e = simt_matmul_checked(*desc, *a, *b, *c, *d);
    if (e != CUBLAS_STATUS_SUCCESS) {
        return e;
    }
    const void* const pointers[4] = {A, B, C, D};
    const cublasLtMatrixLayoutOpaque_t* const layouts[4] = {a, b, c, d};
    bool ok = workspace_bytes >= algo->workspace && simt::memory_find(workspace, workspace_bytes);
    for (int i = 0; i < 4; i++) {
        ok &=
            reinterpret_cast<uintptr_t>(pointers[i]) % algo->alignment[i] == 0 && simt_inside(pointers[i], *layouts[i]);
    }
    if (!ok) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    SimtMatmul p = {*desc, A, B, C, D, *a, *b, *c, *d, 0, 0, static_cast<char*>(workspace), workspace_bytes};
    memcpy(&p.alpha, alpha, sizeof(p.alpha));
    memcpy(&p.beta, beta, sizeof(p.beta));
    simt::enqueue(stream, [p]() { simt_matmul(p); });
    return CUBLAS_STATUS_SUCCESS;
}
