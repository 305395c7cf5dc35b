// What the tests of GPU ops share. They are compiled once and linked either with the real device (kernels/gpu*.cu built by
// nvcc) or with the stand-in of dev/simt; without a usable GPU they are skipped by name.
#pragma once
#include "dev/tests/ops.h"
#include "kernels/gpu.h"
#include "kernels/kernels.h"

// An open device for the scope of a test; `ok` is false, and the test marked skipped, when there is none.
template <class X>
struct GpuDevice : Gpu<X> {
    bool ok = false;
    explicit GpuDevice(size_t workspace = 0) {
        std::string why = device_open(static_cast<Gpu<X>&>(*this), 2);
        ok = why.empty();
        if (!ok) {
            test_skip(why.c_str());
        } else if (workspace > 0) {
            device_reserve(static_cast<Gpu<X>&>(*this), workspace);
        }
    }
    ~GpuDevice() {
        if (ok) {
            device_close(static_cast<Gpu<X>&>(*this));
        }
    }
    GpuDevice(const GpuDevice&) = delete;
};

// n elements of device memory that begin as NaN (all bits set), between two fences that nothing may touch.
// shift: elements off the 256-byte grid.
template <class T, class X>
struct GpuBuffer {
    static constexpr size_t FENCE = 256;  // bytes
    Gpu<X>& dev;
    size_t n, begin;
    char* memory;
    size_t bytes;

    explicit GpuBuffer(Gpu<X>& d, size_t count, size_t shift = 0)
        : dev(d), n(count), begin(FENCE + shift * sizeof(T)), bytes(begin + count * sizeof(T) + FENCE) {
        memory = static_cast<char*>(device_alloc(dev, bytes, "a test"));
        std::vector<char> poison(bytes, char(0xff));
        device_to(dev, memory, poison.data(), bytes);
    }
    GpuBuffer(Gpu<X>& d, const std::vector<T>& values, size_t shift = 0) : GpuBuffer(d, values.size(), shift) {
        set(values);
    }
    ~GpuBuffer() { device_free(dev, memory); }
    GpuBuffer(const GpuBuffer&) = delete;

    T* data() { return reinterpret_cast<T*>(memory + begin); }
    void set(const std::vector<T>& values) { device_to(dev, data(), values.data(), values.size() * sizeof(T)); }
    std::vector<T> get() {
        std::vector<T> values(n);
        device_from(dev, values.data(), data(), n * sizeof(T));
        return values;
    }
    bool intact() {
        std::vector<unsigned char> all(bytes);
        device_from(dev, all.data(), memory, bytes);
        for (size_t i = 0; i < bytes; i++) {
            if ((i < begin || i >= begin + n * sizeof(T)) && all[i] != 0xff) {
                return false;
            }
        }
        return true;
    }
};

// ----------------------------------------------------------------------------
// the two storage types, and numbers through them

inline double number(float x) {
    return x;
}
inline double number(bf16 x) {
    return to_float(x);
}
template <class X>
X stored(double x);
template <>
inline float stored<float>(double x) {
    return float(x);
}
template <>
inline bf16 stored<bf16>(double x) {
    return to_bf16(float(x));
}
// x as it is after being stored once.
template <class X>
double rounded(double x) {
    return number(stored<X>(x));
}

template <class X>
std::vector<double> numbers(const std::vector<X>& x) {
    std::vector<double> out(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        out[i] = number(x[i]);
    }
    return out;
}

template <class X>
std::vector<X> stored_values(const std::vector<double>& x) {
    std::vector<X> out;
    for (double v : x) {
        out.push_back(stored<X>(v));
    }
    return out;
}

// Random numbers that X holds exactly.
template <class X>
std::vector<double> random_stored(size_t n, uint64_t seed, double size = 1) {
    std::vector<double> x = random_values<double>(n, seed, size);
    for (double& v : x) {
        v = rounded<X>(v);
    }
    return x;
}

// The yardstick: `plain` is the same op evaluated by plain operations, each rounded to X where PyTorch's kernels round.
// Neither the root mean square nor the greatest error of `got` may be more than twice its. floor: one unit in the last
// place of X at the greatest value, below which the order of two roundings decides (for the rms: a hundredth of it).
template <class X>
void check_yardstick(const std::string& what, const std::vector<double>& got, const std::vector<double>& plain,
                     const std::vector<double>& exact) {
    const double unit = sizeof(X) == 2 ? 1.0 / 256 : 1.0 / 16777216, size = greatest(exact.data(), exact.size());
    const double rms = 2 * rms_error(plain, exact), floor = unit * size;
    CHECK_ERROR(what + " (rms)", rms_error(got, exact), rms > floor / 100 ? rms : floor / 100);
    const double worst = 2 * greatest_error(plain.data(), exact.data(), exact.size());
    CHECK_ERROR(what + " (greatest)", greatest_error(got.data(), exact.data(), exact.size()),
                worst > floor ? worst : floor);
}
