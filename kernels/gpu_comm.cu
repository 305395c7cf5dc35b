// Tensors over ranks with NCCL, instantiated for the two activation types. Without NCCL: gpu_comm_none.cpp.
#define CUDA_WITH_NCCL  // for cuda.cuh: the other objects are built where there is no NCCL
#include "kernels/comm_nccl.cuh"

#define INSTANTIATE_COMM(X)                                                    \
    template std::string comm_attach(Gpu<X>&, const Comm&);                    \
    template void comm_detach(Gpu<X>&);                                        \
    template void comm_abandon(Gpu<X>&);                                       \
    template size_t comm_device_bytes(const Gpu<X>&, int, int);                \
    template void comm_sum_begin(Gpu<X>&, float*, size_t);                     \
    template void comm_sum_finish(Gpu<X>&);                                    \
    template void comm_gather_begin(Gpu<X>&, int, void*, const void*, size_t); \
    template void comm_gather_finish(Gpu<X>&, int);                            \
    template void comm_broadcast_device(Gpu<X>&, void*, size_t, int);          \
    template void comm_exchange_device(Gpu<X>&, const void*, void* const*, size_t);

INSTANTIATE_COMM(bf16)
INSTANTIATE_COMM(float)
