// What the tests of kernels share: guarded buffers, the tiers of this machine, random data, errors and their bounds.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "dev/tests/test.h"
#include "kernels/device.h"
#include "kernels/random.h"

// n elements that begin as NaN, between two fences that nothing may touch. shift: elements off the 64-byte grid.
template <class T>
struct Guarded {
    static constexpr size_t FENCE = 64;
    std::vector<T> memory;
    size_t n, begin;

    explicit Guarded(size_t count, size_t shift = 0) : memory(count + 2 * FENCE + 64), n(count) {
        memset(static_cast<void*>(memory.data()), 0xff, memory.size() * sizeof(T));  // NaN as float and double
        begin = FENCE;
        while (reinterpret_cast<uintptr_t>(memory.data() + begin) % 64 != 0) {
            begin++;
        }
        begin += shift;
    }
    T* data() { return memory.data() + begin; }
    const T* data() const { return memory.data() + begin; }
    T& operator[](size_t i) { return memory[begin + i]; }
    const T& operator[](size_t i) const { return memory[begin + i]; }
    bool intact() const {
        const unsigned char* bytes = reinterpret_cast<const unsigned char*>(memory.data());
        for (size_t i = 0; i < memory.size() * sizeof(T); i++) {
            bool inside = i >= begin * sizeof(T) && i < (begin + n) * sizeof(T);
            if (!inside && bytes[i] != 0xff) {
                return false;
            }
        }
        return true;
    }
};

#define CHECK_FENCES(buffer) CHECK((buffer).intact(), "%s: written outside", #buffer)

template <class T>
bool same_bits(const T* a, const T* b, size_t n) {
    return memcmp(a, b, n * sizeof(T)) == 0;
}

// n values of -size .. size, the same for float and double up to rounding.
template <class T>
std::vector<T> random_values(size_t n, uint64_t seed, double size = 1) {
    std::vector<T> x(n);
    for (size_t i = 0; i < n; i++) {
        x[i] = T(float((2 * random_uniform(seed, STREAM_TOKENS, 7, i) - 1) * size));
    }
    return x;
}

// Greatest |a - b|; NaN if any is.
template <class A, class B>
double greatest_error(const A* a, const B* b, size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double e = std::fabs(double(a[i]) - double(b[i]));
        worst = e > worst || std::isnan(e) ? e : worst;
        if (std::isnan(worst)) {
            break;
        }
    }
    return worst;
}

// Root of the mean square of a - exact; NaN if any is.
inline double rms_error(const std::vector<double>& a, const std::vector<double>& exact) {
    double sum = 0;
    for (size_t i = 0; i < exact.size(); i++) {
        sum += (a[i] - exact[i]) * (a[i] - exact[i]);
    }
    return std::sqrt(sum / double(exact.size() > 0 ? exact.size() : 1));
}

template <class T>
double greatest(const T* a, size_t n) {
    std::vector<T> zero(n, T(0));
    return greatest_error(a, zero.data(), n);
}

// Twice the error of the plain float evaluation, and never less than 4 units in the last place of the greatest value:
// below that the order of two roundings decides.
inline double float_bound(const std::vector<float>& plain, const std::vector<double>& exact) {
    double yardstick = 2 * greatest_error(plain.data(), exact.data(), exact.size());
    double floor = 4 * double(std::numeric_limits<float>::epsilon()) / 2 * greatest(exact.data(), exact.size());
    return yardstick > floor ? yardstick : floor;
}

// fn(dev) with each tier that this machine has.
template <class Fn>
void for_each_tier(const Fn& fn) {
    for (const char* name : {"ref", "avx2", "avx512"}) {
        Cpu<float> dev;
        device_open(dev, 2);
        dev.isa = cpu_isa_choose(name);
        if (dev.isa) {
            device_math(dev, "fp32");
            fn(dev);
        }
        device_close(dev);
    }
}

// A double device with as many threads.
struct DoubleDevice : Cpu<double> {
    explicit DoubleDevice(int count) { device_open(*this, count); }
    ~DoubleDevice() { device_close(*this); }
    DoubleDevice(const DoubleDevice&) = delete;
};

// Greatest error of `gradient` against central differences of the sum of loss() over its inputs x, relative to the
// greatest gradient. Step 1e-5: its square, and 1e-16 over it, are both far below 1e-6.
template <class Loss>
double difference_error(std::vector<double>& x, const double* gradient, size_t stride, const Loss& loss) {
    double worst = 0, size = greatest(gradient, x.size());
    for (size_t i = 0; i < x.size(); i += stride) {
        const double kept = x[i], step = 1e-5;
        x[i] = kept + step;
        double above = loss();
        x[i] = kept - step;
        double below = loss();
        x[i] = kept;
        double e = std::fabs((above - below) / (2 * step) - gradient[i]) / size;
        if (!(e <= worst)) {
            worst = e;
        }
    }
    return worst;
}
