// Attention of the GPU device: the kernels of attention.cuh and attention_plain.cuh, compiled for both storage types.
#include "kernels/attention.cuh"

#define INSTANTIATE_ATTENTION(X)                                                                                     \
    template Documents documents_place(Gpu<X>&, int32_t*, const int32_t*, int, int);                                 \
    template void attention_forward(Gpu<X>&, X*, size_t, float*, const X*, const Documents&, size_t, int, int, int); \
    template void attention_backward(Gpu<X>&, X*, size_t, const X*, const X*, size_t, const float*, const X*,        \
                                     const Documents&, size_t, int, int, int);                                       \
    template size_t attention_workspace(const Gpu<X>&, size_t, size_t, int, int, int);

INSTANTIATE_ATTENTION(bf16)
INSTANTIATE_ATTENTION(float)
