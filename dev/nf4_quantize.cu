// Quantising to NF4: codes and absmax of blocks of 64, as done once while a checkpoint is loaded.
//
//   1  a thread a block of 64
//   2* kernels/nf4.cuh: a warp four blocks, 8 weights a lane
//   c1  plain loops, a weight at a time
//   c2* kernels/cpu/nf4.cpp: a threshold at a time over a block of 64
#include "dev/harness.h"
#include "kernels/cpu/nf4.h"
#include "kernels/cpu/parallel.h"
#include "kernels/nf4.cuh"

enum { CODES, ABSMAX, WEIGHTS };

static std::vector<Array> arrays(const Shape& s) {
    return {
        {"codes", Kind::U8, Role::OUT, ceil_div(s["N"], 2)},
        {"absmax", Kind::F32, Role::OUT, ceil_div(s["N"], 64)},
        {"weights", Kind::F32, Role::IN, s["N"], uniform(1, -0.1, 0.1)},
    };
}

// In float: which side of a threshold a weight is on is decided there, by the format.
static void evaluate(const Shape& s, Values& v, const Precision&) {
    const size_t n = s["N"];
    for (size_t begin = 0; begin < n; begin += 64) {
        float greatest = 0;
        for (size_t i = begin; i < n && i < begin + 64; i++) {
            greatest = std::max(greatest, std::fabs(float(v[WEIGHTS][i])));
        }
        v[ABSMAX][begin / 64] = greatest;
        const float inverse = 1.0f / std::max(greatest, 1e-38f);
        for (size_t i = begin; i < (n + 1) / 2 * 2 && i < begin + 64; i++) {
            const float x = i < n ? float(v[WEIGHTS][i]) * inverse : 0.0f;
            int code = 0;
            for (int k = 0; k < 15; k++) {
                code += x > (NF4_CODE[k] + NF4_CODE[k + 1]) / 2.0f;
            }
            v[CODES][i / 2] = i % 2 ? v[CODES][i / 2] + code : 16 * code;
        }
    }
}

static Cost cost(const Shape& s, size_t) {
    return {double(s["N"]) * (4 + 0.5 + 4.0 / 64), 0};
}

// ----------------------------------------------------------------------------
// CUDA kernels

template <int THREADS>
__global__ void nf4_quantize_kernel1(uint8_t* codes, float* absmax, const float* w, size_t n) {
    const size_t block = size_t(blockIdx.x) * THREADS + threadIdx.x, begin = block * 64;
    if (begin >= n) {
        return;
    }
    float greatest = 0;
    for (size_t i = begin; i < n && i < begin + 64; i++) {
        greatest = fmaxf(greatest, fabsf(w[i]));
    }
    absmax[block] = greatest;
    const float inverse = 1.0f / fmaxf(greatest, 1e-38f);
    for (size_t i = begin; i < n && i < begin + 64; i += 2) {
        const float second = i + 1 < n ? w[i + 1] : 0.0f;
        const int high = nf4_codes_below(__fmul_rn(w[i], inverse), std::make_index_sequence<15>());
        const int low = nf4_codes_below(__fmul_rn(second, inverse), std::make_index_sequence<15>());
        codes[i / 2] = uint8_t(high << 4 | low);
    }
}

// ----------------------------------------------------------------------------
// versions

template <class X>
static void version1(Gpu<X>& dev, Run& r) {
    LAUNCH((nf4_quantize_kernel1<128>), unsigned(ceil_div(r["N"], 64 * 128)), 128, 0, dev.stream, r.get<uint8_t>(CODES),
           r.get<float>(ABSMAX), r.get<float>(WEIGHTS), r["N"]);
}

// The kernel alone: its launcher, nf4_quantize, takes weights of the host and waits for the bus.
template <class X>
static void version2(Gpu<X>& dev, Run& r) {
    LAUNCH((nf4_quantize_kernel<8>), unsigned(ceil_div(r["N"], 256 * 8)), 256, 0, dev.stream, r.get<uint8_t>(CODES),
           r.get<float>(ABSMAX), r.get<float>(WEIGHTS), r["N"]);
}

static void on_cpu1(Cpu<float>& dev, Run& r) {
    const size_t n = r["N"];
    const float* w = r.get<float>(WEIGHTS);
    parallel_ranges(dev.threads, ceil_div(n, 64), 64, [&](size_t first, size_t last, int) {
        for (size_t block = first; block < last; block++) {
            const size_t begin = block * 64, end = std::min(n, begin + 64);
            float greatest = 0;
            for (size_t i = begin; i < end; i++) {
                greatest = std::max(greatest, std::fabs(w[i]));
            }
            r.get<float>(ABSMAX)[block] = greatest;
            const float inverse = 1.0f / std::max(greatest, 1e-38f);
            for (size_t i = begin; i < (end + 1) / 2 * 2; i++) {
                const float x = i < n ? w[i] * inverse : 0.0f;
                int code = 0;
                while (code < 15 && x > (NF4_CODE[code] + NF4_CODE[code + 1]) / 2.0f) {
                    code++;
                }
                uint8_t& pair = r.get<uint8_t>(CODES)[i / 2];
                pair = uint8_t(i % 2 ? pair | code : code << 4);
            }
        }
    });
}

static void on_cpu2(Cpu<float>& dev, Run& r) {
    nf4_quantize(r.get<uint8_t>(CODES), r.get<float>(ABSMAX), r.get<float>(WEIGHTS), r["N"], dev.threads);
}

int main(int argc, char** argv) {
    Op op = {"nf4_quantize", "N floats to NF4"};
    op.shapes = {{{"N", 1 << 26}}};
    op.cpu_shapes = {{{"N", 1 << 24}}};
    op.awkward = {{{"N", 1}}, {{"N", 64}}, {{"N", 255}}, {{"N", 4101}}};
    op.arrays = arrays;
    op.evaluate = evaluate;
    op.cost = cost;
    op.versions = {
        gpu_version(1, "a thread a block of 64", version1<bf16>, version1<float>),
        gpu_production(2, "a warp four blocks", version2<bf16>, version2<float>),
        cpu_version(1, "plain loops", on_cpu1),
        cpu_production(2, "loops that the compiler vectorises", on_cpu2),
    };
    return harness(op, argc, argv);
}
