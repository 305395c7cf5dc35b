// A double-quantised NF4 matrix (OC, C) as the ladders dev/nf4_*.cu use it: its arrays, the weights that they stand
// for, and the Matrix on the device, in bitsandbytes' order and packed.
#pragma once
#include "dev/harness.h"
#include "kernels/cpu/nf4.h"
#include "kernels/cpu/parallel.h"
#include "kernels/nf4.cuh"

// The first arrays of such an op; what it has beside them follows.
enum { CODES, ABSMAX8, ABSMAX2, MAP8, PACKED_CODES, PACKED_ABSMAX8, NF4_ARRAYS };
constexpr float NF4_OFFSET = 0.08f;

inline std::vector<Array> nf4_arrays(const Shape& s) {
    const size_t n = s["OC"] * s["C"], blocks = ceil_div(n, 64);
    std::vector<float> map(256);
    nf4_map8(map.data());
    return {
        {"codes", Kind::U8, Role::IN, ceil_div(n, 2), [](size_t i) { return double(i * 2654435761u >> 11 & 255); }},
        {"absmax8", Kind::U8, Role::IN, blocks, [](size_t i) { return double(i * 2246822519u >> 9 & 255); }},
        {"absmax2", Kind::F32, Role::IN, ceil_div(blocks, 256), uniform(1, 0.01, 0.05)},
        {"map8", Kind::F32, Role::IN, 256, [=](size_t i) { return double(map[i]); }},
        {"packed codes", Kind::U8, Role::SCRATCH, ceil_div(n, 2)},
        {"packed absmax8", Kind::U8, Role::SCRATCH, blocks},
    };
}

// Weight i, in oracle and plain evaluation alike: its roundings are part of the format.
inline double nf4_weight(const Values& v, size_t i) {
    const int byte = int(v[CODES][i / 2]);
    const float code = NF4_CODE[i % 2 ? byte & 15 : byte >> 4];
    const float product = float(v[MAP8][size_t(v[ABSMAX8][i / 64])]) * float(v[ABSMAX2][i / 64 / 256]);
    const float absmax = product + NF4_OFFSET;
    return to_float(to_bf16(code * absmax));
}

// Bytes that are read of it at least.
inline double nf4_bytes(const Shape& s) {
    const double n = double(s["OC"] * s["C"]);
    return n / 2 + n / 64 + n / 64 / 256 * 4;
}

inline Matrix nf4_matrix(const Run& r) {
    Matrix w;
    w.store = Store::NF4;
    w.rows = int(r["OC"]);
    w.cols = int(r["C"]);
    w.codes = r.get<uint8_t>(CODES);
    w.absmax8 = r.get<uint8_t>(ABSMAX8);
    w.absmax2 = r.get<float>(ABSMAX2);
    w.map8 = r.get<float>(MAP8);
    w.offset = NF4_OFFSET;
    return w;
}

inline Matrix nf4_packed_matrix(const Run& r) {
    Matrix w = nf4_matrix(r);
    w.codes = r.get<uint8_t>(PACKED_CODES);
    w.absmax8 = r.get<uint8_t>(PACKED_ABSMAX8);
    return w;
}

// The packed arrays: a copy, which nf4_pack puts in order.
template <class X>
void nf4_prepare(Gpu<X>& dev, Run& r) {
    Matrix w = nf4_packed_matrix(r);
    device_reserve(dev, nf4_load_workspace(dev, w.elements(), w.elements()));
    CUDA_CHECK(cudaMemcpyAsync(r.get<uint8_t>(PACKED_CODES), r.get<uint8_t>(CODES), ceil_div(w.elements(), 2),
                               cudaMemcpyDeviceToDevice, dev.stream));
    CUDA_CHECK(cudaMemcpyAsync(r.get<uint8_t>(PACKED_ABSMAX8), r.get<uint8_t>(ABSMAX8), w.blocks(),
                               cudaMemcpyDeviceToDevice, dev.stream));
    nf4_pack(dev, w);
}
