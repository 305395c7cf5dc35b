// What the processor could do at best: the yardstick of the GEMMs.
#pragma once
#include "kernels/device.h"

// GFLOP/s of multiply-adds in registers, in the device's tier, on all its threads together; takes 0.2 s.
double cpu_peak_gflops(const Cpu<float>& dev);
