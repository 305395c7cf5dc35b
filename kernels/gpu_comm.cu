// Tensors over ranks with NCCL, instantiated for the two activation types. Without NCCL: gpu_comm_none.cpp.
#define CUDA_WITH_NCCL  // for cuda.cuh: the other objects are built where there is no NCCL
#include "kernels/comm_nccl.cuh"
#include "kernels/gpu_comm.inc"
