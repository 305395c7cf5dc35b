// Three walks over the flat buffer of the adapters that read it and give a number each: the sum of squares, the first
// element that is not finite, the checksum.
//
//   1*  kernels/adamw.cuh
//   c1  plain loops, one thread, one accumulator
//   c2* kernels/cpu/adamw.h: 256 blocks, eight accumulators
#include "dev/harness.h"
#include "kernels/adamw.cuh"
#include "kernels/cpu/adamw.h"

enum { SUM, FIRST, CHECK, X_ };

static std::vector<Array> arrays(const Shape& s) {
    return {
        {"sum of squares", Kind::F32, Role::OUT, 1},
        {"first not finite", Kind::I32, Role::OUT, 1},
        {"checksum", Kind::I32, Role::OUT, 2},
        {"x", Kind::F32, Role::IN, s["N"], uniform(1, -1, 1)},
    };
}

static void put(const uint64_t check, int32_t words[2]) {
    words[0] = int32_t(uint32_t(check));
    words[1] = int32_t(uint32_t(check >> 32));
}

static void evaluate(const Shape& s, Values& v, const Precision& p) {
    double sum = 0;
    uint64_t check = 0;
    for (size_t i = 0; i < s["N"]; i++) {
        const float x = float(v[X_][i]);
        uint32_t bits;
        memcpy(&bits, &x, 4);
        check += checksum_term(i, bits);
        sum = p.f32(sum + p.f32(v[X_][i] * v[X_][i]));
    }
    int32_t words[2];
    put(check, words);
    v[SUM][0] = sum;
    v[FIRST][0] = double(s["N"]);
    v[CHECK] = {double(words[0]), double(words[1])};
}

static Cost cost(const Shape& s, size_t) {
    Cost c = {3 * 4 * double(s["N"]), 2 * double(s["N"])};
    c.reads_only = true;
    return c;
}

// ----------------------------------------------------------------------------
// versions

template <class Dev>
static void put_all(Dev& dev, Run& r, double sum, size_t first, uint64_t check) {
    const float narrow = float(sum);
    const int32_t index = int32_t(first);
    int32_t words[2];
    put(check, words);
    device_to(dev, r.get<float>(SUM), &narrow, sizeof narrow);
    device_to(dev, r.get<int32_t>(FIRST), &index, sizeof index);
    device_to(dev, r.get<int32_t>(CHECK), words, sizeof words);
}

template <class Dev>
static void production(Dev& dev, Run& r) {
    const float* x = r.get<float>(X_);
    const size_t n = r["N"];
    put_all(dev, r, sum_squares(dev, x, n), first_nonfinite(dev, x, n), checksum(dev, x, n));
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const float* x = r.get<float>(X_);
    const size_t n = r["N"];
    double sum = 0;
    uint64_t check = 0;
    size_t first = 0;
    for (size_t i = 0; i < n; i++) {
        sum += double(x[i]) * double(x[i]);
    }
    while (first < n && std::isfinite(x[first])) {
        first++;
    }
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        check += checksum_term(i, bits);
    }
    put_all(dev, r, sum, first, check);
}

template <class Dev>
static void prepare(Dev& dev, Run&) {
    device_reserve(dev, optimizer_workspace(dev));
}

int main(int argc, char** argv) {
    Op op = {"reductions", "sum of squares, first that is not finite, checksum"};
    op.shapes = {{{"N", 41943040}}};      // 8B at rank 16
    op.cpu_shapes = {{{"N", 11272192}}};  // 1B
    op.awkward = {{{"N", 1}}, {{"N", 1027}}, {{"N", 70001}}};
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.prepare_bf16 = prepare<Gpu<bf16>>;
    op.prepare_float = prepare<Gpu<float>>;
    op.prepare_cpu = prepare<Cpu<float>>;
    op.versions = {
        gpu_production(1, "partial sums of blocks, then one block", production<Gpu<bf16>>, production<Gpu<float>>),
        cpu_version(1, "plain loops", on_cpu1),
        cpu_production(2, "256 blocks, eight accumulators", production<Cpu<float>>),
    };
    return harness(op, argc, argv);
}
