// Products of other libraries, to compare with: OpenBLAS (sgemm) and oneDNN (bf16 matmul, which is what PyTorch calls).
// They are looked for while the program runs, so nothing here is needed to build it. Both compute, row-major,
//
//   forward    y (M, OC) = x (M, C) W^T        backward    dx (M, C) = dy (M, OC) W,        W (OC, C)
//
// Their idle threads spin for a while after a call: wait before anything else is timed.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include <dlfcn.h>

template <class F>
bool library_function(void* library, const char* name, F& out) {
    out = reinterpret_cast<F>(dlsym(library, name));
    return out != nullptr;
}

// The first of the names that opens; nullptr and, in *why, what was looked for.
inline void* library_open(const std::string& path, const std::vector<std::string>& names, std::string* why) {
    for (const std::string& name : path.empty() ? names : std::vector<std::string>{path}) {
        if (void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) {
            return library;
        }
        *why += (why->empty() ? "no " : ", ") + name;
    }
    return nullptr;
}

// ----------------------------------------------------------------------------
// OpenBLAS

struct Blas {
    void (*sgemm)(int order, int trans_a, int trans_b, int M, int N, int K, float alpha, const float* a, int lda,
                  const float* b, int ldb, float beta, float* c, int ldc) = nullptr;
    std::string core;  // whose kernels it runs: Haswell, Zen: AVX2; SkylakeX, Cooperlake, SapphireRapids: AVX-512
    std::string text;  // its own words about itself, or why it is not here
};

// core: whose kernels to take; "": its own choice, which takes AVX2 on processors that it does not know. What the
// environment says of this and of its blocking is put aside: a comparison should not depend on it unseen.
inline Blas blas_open(const std::string& path, const std::string& core, int threads) {
    Blas b;
    unsetenv("OPENBLAS_L2_SIZE");
    if (core.empty()) {
        unsetenv("OPENBLAS_CORETYPE");
    } else {
        setenv("OPENBLAS_CORETYPE", core.c_str(), 1);
    }
    void* library = library_open(path, {"libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0"}, &b.text);
    void (*set_threads)(int) = nullptr;
    char* (*config)() = nullptr;
    char* (*corename)() = nullptr;
    if (library == nullptr) {
        return b;
    }
    if (!library_function(library, "openblas_set_num_threads", set_threads) ||
        !library_function(library, "openblas_get_config", config) ||
        !library_function(library, "openblas_get_corename", corename) ||
        !library_function(library, "cblas_sgemm", b.sgemm)) {
        b.sgemm = nullptr;
        b.text = "the library is not OpenBLAS";
        return b;
    }
    set_threads(threads);
    b.core = corename();
    b.text = config();
    return b;
}

inline void blas_product(const Blas& b, float* out, const float* in, const float* w, int M, int OC, int C,
                         bool backward) {
    const int K = backward ? OC : C, N = backward ? C : OC;
    b.sgemm(101, 111, backward ? 111 : 112, M, N, K, 1, in, K, w, C, 0, out, N);
}

// ----------------------------------------------------------------------------
// oneDNN, by its C interface of version 3

struct Dnn {
    using Handle = void*;
    struct Argument {
        int number;
        Handle memory;
    };
    int (*describe)(Handle*, int dims, const int64_t* size, int type, const int64_t* stride) = nullptr;
    int (*matmul)(Handle*, Handle engine, Handle a, Handle b, Handle bias, Handle c, Handle attributes) = nullptr;
    int (*make)(Handle*, Handle description) = nullptr;
    int (*memory)(Handle*, Handle description, Handle engine, void* data) = nullptr;
    int (*execute)(Handle, Handle stream, int n, const Argument*) = nullptr;
    int (*wait)(Handle stream) = nullptr;
    int (*free_primitive)(Handle) = nullptr;
    int (*free_memory)(Handle) = nullptr;
    Handle engine = nullptr, stream = nullptr;
    std::string text;  // its version, or why it is not here
};

inline Dnn dnn_open(const std::string& path, int threads) {
    Dnn d;
    struct Version {
        int major, minor, patch;
    };
    const Version* (*version)() = nullptr;
    int (*new_engine)(Dnn::Handle*, int kind, size_t index) = nullptr;
    int (*new_stream)(Dnn::Handle*, Dnn::Handle engine, unsigned flags) = nullptr;
    void (*set_threads)(int) = nullptr;
    void* library = library_open(path, {"libdnnl.so.3"}, &d.text);
    if (library == nullptr) {
        return d;
    }
    const bool found = library_function(library, "dnnl_version", version) && version()->major == 3 &&
                       library_function(library, "dnnl_engine_create", new_engine) &&
                       library_function(library, "dnnl_stream_create", new_stream) &&
                       library_function(library, "dnnl_memory_desc_create_with_strides", d.describe) &&
                       library_function(library, "dnnl_matmul_primitive_desc_create", d.matmul) &&
                       library_function(library, "dnnl_primitive_create", d.make) &&
                       library_function(library, "dnnl_memory_create", d.memory) &&
                       library_function(library, "dnnl_primitive_execute", d.execute) &&
                       library_function(library, "dnnl_stream_wait", d.wait) &&
                       library_function(library, "dnnl_primitive_destroy", d.free_primitive) &&
                       library_function(library, "dnnl_memory_destroy", d.free_memory);
    const int CPU = 1;
    if (!found || new_engine(&d.engine, CPU, 0) != 0 || new_stream(&d.stream, d.engine, 1) != 0) {
        d.engine = nullptr;
        d.text = "the library is not oneDNN 3";
        return d;
    }
    if (library_function(RTLD_DEFAULT, "omp_set_num_threads", set_threads)) {
        set_threads(threads);
    }
    d.text = "oneDNN " + std::to_string(version()->major) + "." + std::to_string(version()->minor);
    return d;
}

// A product of bf16 matrices, made once for its operands and then run.
struct DnnProduct {
    Dnn::Handle primitive = nullptr;
    Dnn::Argument arguments[3] = {};
};

inline DnnProduct dnn_product(const Dnn& d, void* out, void* in, void* w, int M, int OC, int C, bool backward) {
    const int BF16 = 2, numbers[3] = {1, 33, 17};  // source, weights, destination
    const int64_t K = backward ? OC : C, N = backward ? C : OC, one = 1;
    const int64_t size[3][2] = {{M, K}, {K, N}, {M, N}};
    const int64_t stride[3][2] = {{K, 1}, {backward ? C : one, backward ? one : C}, {N, 1}};
    void* const data[3] = {in, w, out};
    Dnn::Handle description[3] = {}, all = nullptr;
    DnnProduct p;
    bool good = true;
    for (int i = 0; i < 3; i++) {
        good = good && d.describe(&description[i], 2, size[i], BF16, stride[i]) == 0 &&
               d.memory(&p.arguments[i].memory, description[i], d.engine, data[i]) == 0;
        p.arguments[i].number = numbers[i];
    }
    good = good && d.matmul(&all, d.engine, description[0], description[1], nullptr, description[2], nullptr) == 0;
    if (!good || d.make(&p.primitive, all) != 0) {
        p.primitive = nullptr;  // it has no bf16 on this processor
    }
    return p;
}

inline void dnn_run(const Dnn& d, const DnnProduct& p) {
    d.execute(p.primitive, d.stream, 3, p.arguments);
    d.wait(d.stream);
}

inline void dnn_free(const Dnn& d, const DnnProduct& p) {
    for (const Dnn::Argument& a : p.arguments) {
        d.free_memory(a.memory);
    }
    d.free_primitive(p.primitive);
}
