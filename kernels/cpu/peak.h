// What the processor could do at best: the yardstick of the GEMMs.
#pragma once
#include "kernels/device.h"

// GFLOP/s of multiply-adds in registers, on this many threads together; takes 0.2 s.
double peak_gflops(const GemmFormat<float>& arithmetic, int threads);

// The same in the arithmetic of the device's frozen matrices.
template <class X>
double cpu_peak_gflops(const Cpu<X>& dev) {
    return peak_gflops(*dev.base, dev.threads);
}
