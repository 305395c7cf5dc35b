// One frozen NF4 matrix (OC, C) with an adapter, M rows to multiply it with and room for what comes out, filled with
// numbers of no meaning: what dev/cpu_gemm.cpp times.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/linear.h"
#include "kernels/cpu/parallel.h"

enum { FORWARD, BACKWARD };

struct Case {
    int OC, C;
    size_t M;
    std::vector<uint8_t> codes, absmax8;
    std::vector<float> absmax2, map8, A, B, dA, dB;
    std::vector<float> w;           // dequantised
    std::vector<float> x[2], y[2];  // input and output, of forward and of backward
    std::vector<float> xa;
    std::vector<bf16> w16, x16[2], y16[2];
    LinearGroup<float> group;
};

inline void case_prepare(Case& c, const Cpu<float>& dev, int OC, int C, size_t M, bool halves) {
    c.OC = OC;
    c.C = C;
    c.M = M;
    const size_t n = size_t(OC) * size_t(C);
    uint32_t state = 1;
    auto next = [&]() { return state = state * 1664525u + 1013904223u; };
    auto floats = [&](std::vector<float>& v, size_t count) {
        v.resize(count);
        std::generate(v.begin(), v.end(), [&]() { return float(next() >> 8) * 0x1p-24f - 0.5f; });
    };
    c.codes.resize(n / 2);
    std::generate(c.codes.begin(), c.codes.end(), [&]() { return uint8_t(next() >> 24); });
    c.absmax8.resize(n / 64);
    std::generate(c.absmax8.begin(), c.absmax8.end(), [&]() { return uint8_t(next() >> 24); });
    c.absmax2.assign(n / 64 / 256 + 1, 0.01f);
    c.map8.resize(256);
    nf4_map8(c.map8.data());
    floats(c.A, 16 * size_t(C));
    floats(c.B, 16 * size_t(OC));
    c.dA.assign(c.A.size(), 0);
    c.dB.assign(c.B.size(), 0);
    c.xa.assign(M * 16, 0);
    for (int way : {FORWARD, BACKWARD}) {
        floats(c.x[way], M * size_t(way == FORWARD ? C : OC));
        c.y[way].assign(M * size_t(way == FORWARD ? OC : C), 0);
    }
    LinearPart<float>& p = c.group.part[0];
    c.group.parts = 1;
    c.group.C = C;
    c.group.OC = OC;
    p.w.store = Store::NF4;
    p.w.rows = OC;
    p.w.cols = C;
    p.w.codes = c.codes.data();
    p.w.absmax8 = c.absmax8.data();
    p.w.absmax2 = c.absmax2.data();
    p.w.map8 = c.map8.data();
    p.w.offset = 0.02f;
    p.scale = 2;
    p.A = c.A.data();
    p.B = c.B.data();
    p.dA = c.dA.data();
    p.dB = c.dB.data();
    c.w.resize(n);
    parallel_ranges(dev.threads, size_t(OC), 1, [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; row++) {
            matrix_row(dev, c.w.data() + row * size_t(C), p.w, row);
        }
    });
    const auto half = [](std::vector<bf16>& out, const std::vector<float>& in) {
        out.resize(in.size());
        std::transform(in.begin(), in.end(), out.begin(), [](float f) { return to_bf16(f); });
    };
    for (int way = 0; halves && way < 2; way++) {
        half(c.w16, c.w);
        half(c.x16[way], c.x[way]);
        half(c.y16[way], c.y[way]);
    }
}

// The product as the trainer has it, with an adapter of rank r.
inline void case_product(Cpu<float>& dev, Case& c, int way, int r) {
    const Rope<float>* const rope = nullptr;
    LinearInput<float, float> in;
    in.x = c.x[FORWARD].data();
    in.stride = size_t(c.C);
    c.group.R = c.group.part[0].r = r;
    device_reserve(dev, linear_workspace(dev, c.group, c.M));
    if (way == FORWARD) {
        linear_forward(dev, c.y[way].data(), size_t(c.OC), c.xa.data(), in, c.group, c.M,
                       static_cast<const float*>(nullptr), rope, Dropout());
    } else {
        linear_backward(dev, c.y[way].data(), c.x[way].data(), size_t(c.OC), in, c.group, c.xa.data(), c.M, rope,
                        Dropout());
    }
}

// Relative root mean square of what case_product left in y, at 500 places.
inline double case_error(const Case& c, int way) {
    const size_t C = size_t(c.C), OC = size_t(c.OC), K = way == FORWARD ? C : OC, n = way == FORWARD ? OC : C;
    double error = 0, size = 0;
    for (size_t sample = 0; sample < 500; sample++) {
        const size_t m = sample * 2654435761u % c.M, j = (sample * 40503u + 7) % n;
        double sum = 0;
        for (size_t k = 0; k < K; k++) {
            sum += double(c.x[way][m * K + k]) * double(c.w[way == FORWARD ? j * C + k : k * C + j]);
        }
        const double difference = double(c.y[way][m * n + j]) - sum;
        error += difference * difference;
        size += sum * sum;
    }
    return std::sqrt(error / size);
}
