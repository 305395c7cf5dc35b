// All GPU ops but attention (gpu_attention.cu) and NF4 (gpu_nf4.cu), instantiated for the two activation types.
#include "kernels/adamw.cuh"
#include "kernels/classifier.cuh"
#include "kernels/device.cuh"
#include "kernels/dropout.cuh"
#include "kernels/embedding.cuh"
#include "kernels/linear.cuh"
#include "kernels/matmul.cuh"
#include "kernels/paged.cuh"
#include "kernels/rmsnorm.cuh"
#include "kernels/rope.cuh"
#include "kernels/swiglu.cuh"

#define INSTANTIATE_DEVICE(X)                                       \
    template std::string device_open(Gpu<X>&, int, int, int);       \
    template void device_close(Gpu<X>&);                            \
    template std::string device_arena(Gpu<X>&, size_t);             \
    template void* device_alloc(Gpu<X>&, size_t, const char*);      \
    template void device_free(Gpu<X>&, void*);                      \
    template void device_zero(Gpu<X>&, void*, size_t);              \
    template void device_to(Gpu<X>&, void*, const void*, size_t);   \
    template void device_from(Gpu<X>&, void*, const void*, size_t); \
    template void device_reserve(Gpu<X>&, size_t);                  \
    template void device_sync(Gpu<X>&);                             \
    template void device_timing(Gpu<X>&, bool);                     \
    template void device_clock_start(Gpu<X>&, double*);             \
    template void device_clock_stop(Gpu<X>&);                       \
    template void* device_alloc_host(Gpu<X>&, size_t, const char*); \
    template size_t device_peak_bytes(Gpu<X>&);

#define INSTANTIATE_ROWS(X)                                                                                           \
    template void embedding_forward(Gpu<X>&, X*, const int32_t*, const Matrix&, size_t);                              \
    template void rmsnorm_rstd(Gpu<X>&, float*, const X*, size_t, int, double);                                       \
    template void rmsnorm_forward(Gpu<X>&, X*, size_t, const X*, const int32_t*, const float*, const float*, size_t,  \
                                  int);                                                                               \
    template void rmsnorm_backward(Gpu<X>&, X*, size_t, const X*, const X*, const float*, const float*, size_t, int); \
    template void rope_forward(Gpu<X>&, X*, size_t, const Rope<float>&, size_t);                                      \
    template void rope_backward(Gpu<X>&, X*, size_t, const Rope<float>&, size_t);                                     \
    template void swiglu_forward(Gpu<X>&, X*, size_t, const X*, size_t, int);                                         \
    template void swiglu_backward(Gpu<X>&, X*, size_t, const X*, const X*, size_t, int);                              \
    template void dropout_rows(Gpu<X>&, X*, size_t, const X*, size_t, const Dropout&, uint32_t, size_t, int, bool);   \
    template double sum_squares(Gpu<X>&, const float*, size_t);                                                       \
    template size_t first_nonfinite(Gpu<X>&, const float*, size_t);                                                   \
    template void moments_open(Gpu<X>&, const float*);                                                                \
    template size_t moments_slab_bytes(const Gpu<X>&);                                                                \
    template void moments_settle(Gpu<X>&);                                                                            \
    template void adamw_prefetch(Gpu<X>&, const float*, const float*, size_t);                                        \
    template size_t optimizer_workspace(const Gpu<X>&);                                                               \
    template uint64_t checksum(Gpu<X>&, const float*, size_t);                                                        \
    template size_t adamw_update(Gpu<X>&, float*, float*, float*, const float*, size_t, const AdamW&);

#define INSTANTIATE_PRODUCTS(X)                                                                                      \
    template void matmul(Gpu<X>&, const Matmul<X, X>&);                                                              \
    template double matmul_gflops(Gpu<X>&);                                                                          \
    template void linear_forward(Gpu<X>&, X*, size_t, X*, const LinearInput<X, float>&, const LinearGroup<float>&,   \
                                 size_t, const X*, const Rope<float>*, const Dropout&);                              \
    template void linear_backward(Gpu<X>&, X*, X*, size_t, const LinearInput<X, float>&, const LinearGroup<float>&,  \
                                  const X*, size_t, const Rope<float>*, const Dropout&);                             \
    template void linear_prefetch(Gpu<X>&, const LinearGroup<float>&, size_t);                                       \
    template size_t linear_workspace(const Gpu<X>&, const LinearGroup<float>&, size_t);                              \
    template size_t linear_slot_bytes(const Gpu<X>&, const LinearGroup<float>&, size_t);                             \
    template void linear_slots_reserve(Gpu<X>&, size_t);                                                             \
    template void classifier(Gpu<X>&, float*, uint8_t*, X*, const LinearInput<X, float>&, const Matrix&,             \
                             const int32_t*, const int32_t*, size_t, size_t, float);                                 \
    template void head_logits(Gpu<X>&, float*, const LinearInput<X, float>&, const Matrix&, const int32_t*, size_t); \
    template size_t classifier_workspace(const Gpu<X>&, int, int, size_t);

INSTANTIATE_DEVICE(bf16)
INSTANTIATE_DEVICE(float)
INSTANTIATE_ROWS(bf16)
INSTANTIATE_ROWS(float)
INSTANTIATE_PRODUCTS(bf16)
INSTANTIATE_PRODUCTS(float)
template void matmul(Gpu<bf16>&, const Matmul<bf16, float>&);
