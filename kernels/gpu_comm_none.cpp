// Tensors over ranks in a program built with CUDA and without NCCL: one rank is all there is. comm_attach refuses
// several, and leaves dev.comm nullptr for one, also when a launcher started it. That one trains as any process does,
// with its base whole, and nobody calls the other functions with work to do.
#include "kernels/comm.h"
#include "kernels/gpu.h"

template <class X>
std::string comm_attach(Gpu<X>& dev, const Comm& comm) {
    dev.comm = nullptr;
    return comm.size > 1 ? "this program was built without NCCL, through which ranks on GPUs speak: install it "
                           "(libnccl-dev or libnccl-devel, from NVIDIA's CUDA repository) and build again with "
                           "make train_llama, or train with --device cpu"
                         : "";
}
template <class X>
void comm_detach(Gpu<X>&) {}
template <class X>
void comm_abandon(Gpu<X>&) {}
template <class X>
size_t comm_device_bytes(const Gpu<X>&, int, int) {
    return 0;
}
template <class X>
void comm_sum_begin(Gpu<X>&, float*, size_t) {}
template <class X>
void comm_sum_finish(Gpu<X>&) {}
template <class X>
void comm_gather_begin(Gpu<X>&, int, void*, const void*, size_t) {}
template <class X>
void comm_gather_finish(Gpu<X>&, int) {}
template <class X>
void comm_broadcast_device(Gpu<X>&, void*, size_t, int) {}
template <class X>
void comm_exchange_device(Gpu<X>&, const void*, void* const*, size_t) {}

#include "kernels/gpu_comm.inc"
