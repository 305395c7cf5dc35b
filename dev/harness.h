// The harness of dev/: one program an op that checks and times its versions. An op file holds the versions that are not
// in kernels/, and a table; harness.cpp does the rest: shapes, data, poison and fences, comparison, timing, the printed
// table. The production kernel is included from kernels/ and never copied. dev/README.md teaches it, dev/rope.cu is the
// example.
//
//   build/release/<op> [VERSION...|all] [-N n -C c ...] [--type bf16|float] [--check|--bench] [--warm]
//                      [--csv] [--threads n]
//
// Built by nvcc the GPU versions run on the GPU. Built without, they run on the stand-in of dev/simt: they are checked,
// and no time is printed for them. CPU versions (c1, c2 ...) are checked and timed in both.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/device.h"
#include "kernels/gpu.h"

// ----------------------------------------------------------------------------
// shapes and arrays

// Sizes by letter: Shape{{"N", 8192}, {"C", 4096}}. Every shape of an op has the same letters.
struct Shape {
    std::vector<std::pair<std::string, size_t>> letters;
    Shape(std::initializer_list<std::pair<std::string, size_t>> list) : letters(list) {}
    size_t operator[](const char* letter) const;  // a letter that is not there ends the program
};

// STORE: the type that activations are stored in, bf16 or float (--type; float for CPU versions).
enum class Kind : uint8_t { STORE, F32, BF16, I32, U8 };
// OUT begins as poison; INOUT is filled, and compared after; SCRATCH begins as poison and is not compared; USED_UP is
// filled, may be changed, and is not compared.
enum class Role : uint8_t { IN, OUT, INOUT, SCRATCH, USED_UP };
// Element i of an array before the op runs. Called from many threads; rounded to the array's type afterwards.
using Fill = std::function<double(size_t i)>;
// Uniform between the two, a stream of its own for each seed.
Fill uniform(uint64_t seed, double low, double high);

// Elements past `width` in each `stride` are a gap that an op may neither read nor write (0: no gaps).
struct Array {
    const char* name;
    Kind kind;
    Role role;
    size_t n;
    Fill fill = nullptr;  // IN, INOUT and USED_UP
    size_t width = 0, stride = 0;
};

// ----------------------------------------------------------------------------
// what the op's functions get

// How an evaluation rounds. The oracle is exact: both functions give x back. The plain evaluation rounds like a
// framework that stores every intermediate tensor: f32 where it holds a float in registers, store where it writes.
struct Precision {
    bool exact;
    bool is_bf16;
    double f32(double x) const { return exact ? x : double(float(x)); }
    double store(double x) const { return exact || !is_bf16 ? f32(x) : double(to_float(to_bf16(float(x)))); }
};

// The arrays in double, in the order of Op::arrays.
using Values = std::vector<std::vector<double>>;

// One configuration: a shape and memory on the device, in the order of Op::arrays.
struct Run {
    const Shape& shape;
    std::vector<void*> memory;
    template <class T>
    T* get(size_t array) const {
        return static_cast<T*>(memory[array]);
    }
    size_t operator[](const char* letter) const { return shape[letter]; }
};

struct Cost {
    double bytes, flops;      // that the op must move and do at least, whatever a version does
    bool reads_only = false;  // it writes next to nothing: its yardstick is a walk that reads, on the CPU
};

// ----------------------------------------------------------------------------
// versions and ops

using RunBf16 = void (*)(Gpu<bf16>&, Run&);
using RunFloat = void (*)(Gpu<float>&, Run&);
using RunCpu = void (*)(Cpu<float>&, Run&);

struct Version {
    std::string number;  // "1", "2", ...; "c1", ... on the CPU
    const char* idea;
    RunBf16 on_bf16 = nullptr;  // nullptr: not for that type
    RunFloat on_float = nullptr;
    RunCpu on_cpu = nullptr;
    bool production = false;               // it is the one in kernels/, printed with a *
    bool (*fits)(const Shape&) = nullptr;  // nullptr: takes every shape
    const char* math = nullptr;            // CPU: arithmetic of the frozen products, nullptr: fp32
};

inline Version gpu_version(int number, const char* idea, RunBf16 on_bf16, RunFloat on_float,
                           bool (*fits)(const Shape&) = nullptr) {
    return {std::to_string(number), idea, on_bf16, on_float, nullptr, false, fits};
}
inline Version gpu_production(int number, const char* idea, RunBf16 on_bf16, RunFloat on_float,
                              bool (*fits)(const Shape&) = nullptr) {
    return {std::to_string(number), idea, on_bf16, on_float, nullptr, true, fits};
}
inline Version cpu_version(int number, const char* idea, RunCpu on_cpu, bool (*fits)(const Shape&) = nullptr) {
    return {"c" + std::to_string(number), idea, nullptr, nullptr, on_cpu, false, fits};
}
inline Version cpu_production(int number, const char* idea, RunCpu on_cpu, bool (*fits)(const Shape&) = nullptr,
                              const char* math = nullptr) {
    return {"c" + std::to_string(number), idea, nullptr, nullptr, on_cpu, true, fits, math};
}

struct Op {
    const char* name;
    const char* what;                 // one line
    std::vector<Shape> shapes{};      // that are timed on a GPU; letters on the command line change the first
    std::vector<Shape> cpu_shapes{};  // on the CPU
    std::vector<Shape> awkward{};     // that are checked, before anything is timed; small, for the stand-in
    std::vector<Array> (*arrays)(const Shape&) = nullptr;
    void (*evaluate)(const Shape&, Values&, const Precision&) = nullptr;  // writes the OUT and INOUT arrays
    Cost (*cost)(const Shape&, size_t store_bytes) = nullptr;
    std::vector<Version> versions{};
    // Once for each configuration, before it runs and not timed: device_reserve, lists in scratch arrays.
    RunBf16 prepare_bf16 = nullptr;
    RunFloat prepare_float = nullptr;
    RunCpu prepare_cpu = nullptr;
};

// The program. Exit status 1 when a check fails, 2 when the command line is wrong.
int harness(const Op& op, int argc, char** argv);

// ----------------------------------------------------------------------------
// harness_gpu.cu: what needs CUDA itself

// False in a build for the stand-in.
bool harness_has_gpu();
// Bytes read and written a second by a copy that is much larger than the L2.
double harness_copy_ceiling(Gpu<bf16>& dev);
double harness_copy_ceiling(Gpu<float>& dev);
// Floating-point operations a second of an 8192 x 8192 x 8192 product by cuBLASLt: bf16, or fp32.
double harness_matmul_ceiling(Gpu<bf16>& dev);
double harness_matmul_ceiling(Gpu<float>& dev);
