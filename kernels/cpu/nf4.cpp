#include "kernels/cpu/nf4.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/parallel.h"

// A value above threshold i takes a code above i.
static const float thresholds[15] = {
    -0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
    -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f,
    0.2920137718319893f, 0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784178118011f};

static void quantize_block(uint8_t* codes, float* absmax, const float* w, size_t n) {
    float x[64] = {};
    std::copy(w, w + n, x);
    float greatest = 0;
    for (int i = 0; i < 64; i++) {
        greatest = std::max(greatest, std::fabs(x[i]));
    }
    *absmax = greatest;
    const float inverse = greatest > 0 ? 1.0f / greatest : 0.0f;
    const bool tiny = std::isinf(inverse);  // a subnormal absmax
    int32_t code[64] = {};
    for (int i = 0; i < 64; i++) {
        x[i] = tiny ? x[i] / greatest : x[i] * inverse;
    }
    for (float t : thresholds) {
        for (int i = 0; i < 64; i++) {
            code[i] += x[i] > t;
        }
    }
    for (size_t i = 0; i < (n + 1) / 2; i++) {
        codes[i] = uint8_t(code[2 * i] << 4 | code[2 * i + 1]);
    }
}

void nf4_quantize(uint8_t* codes, float* absmax, const float* w, size_t n, int threads) {
    parallel_ranges(threads, (n + 63) / 64, 1024, [&](size_t begin, size_t end, int) {
        for (size_t b = begin; b < end; b++) {
            quantize_block(codes + b * 32, absmax + b, w + b * 64, std::min<size_t>(64, n - b * 64));
        }
    });
}

// Entry i of n evenly spaced values from 0.1 to 1, as PyTorch's linspace makes it: fused, counted from the nearer end.
static float linspace(int i, int n) {
    float step = (1.0f - 0.1f) / float(n - 1);
    return i < n / 2 ? std::fma(step, float(i), 0.1f) : std::fma(-step, float(n - 1 - i), 1.0f);
}

void nf4_map8(float map[256]) {
    static const float powers[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    int count = 0;
    for (int i = 0; i < 7; i++) {
        int n = (1 << i) + 1;
        for (int j = 0; j + 1 < n; j++) {
            float middle = (linspace(j, n) + linspace(j + 1, n)) / 2.0f;
            map[count++] = powers[i] * middle;
            map[count++] = -(powers[i] * middle);
        }
    }
    map[count++] = 0.0f;
    map[count++] = 1.0f;
    std::sort(map, map + 256);
}

void nf4_double_quantize(uint8_t* absmax8, float* absmax2, float* offset, const float* absmax, size_t blocks) {
    float map[256], middle[255];
    nf4_map8(map);
    for (int i = 0; i < 255; i++) {
        middle[i] = (map[i] + map[i + 1]) / 2.0f;
    }
    double sum = 0;
    for (size_t i = 0; i < blocks; i++) {
        sum += absmax[i];
    }
    *offset = blocks ? float(sum / double(blocks)) : 0.0f;
    for (size_t begin = 0; begin < blocks; begin += 256) {
        size_t end = std::min(blocks, begin + 256);
        float greatest = 0;
        for (size_t i = begin; i < end; i++) {
            greatest = std::max(greatest, std::fabs(absmax[i] - *offset));
        }
        absmax2[begin / 256] = greatest;
        float inverse = greatest > 0 ? 1.0f / std::max(greatest, 1e-38f) : 0.0f;
        for (size_t i = begin; i < end; i++) {
            float x = (absmax[i] - *offset) * inverse;
            absmax8[i] = uint8_t(std::lower_bound(middle, middle + 255, x) - middle);
        }
    }
}
