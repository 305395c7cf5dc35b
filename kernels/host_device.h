// Functions that run on both sides are marked HOST_DEVICE. Beside cuda.cuh the only place that asks which compiler it is.
#pragma once
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif
