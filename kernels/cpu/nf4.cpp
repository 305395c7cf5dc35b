#include "kernels/cpu/nf4.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/parallel.h"

// A value above threshold i takes a code above i: the fp32 midpoint of codes i and i + 1, as bitsandbytes' CPU back end
// computes it. (The decimals in its CUDA kernel round to a neighbour of the midpoint at four of the fifteen.)
static float threshold(int i) {
    return (NF4_CODE[i] + NF4_CODE[i + 1]) / 2.0f;
}

static void quantize_block(uint8_t* codes, float* absmax, const float* w, size_t n) {
    float x[64] = {};
    std::copy(w, w + n, x);
    float greatest = 0;
    for (int i = 0; i < 64; i++) {
        greatest = std::max(greatest, std::fabs(x[i]));
    }
    *absmax = greatest;
    const float inverse = 1.0f / std::max(greatest, 1e-38f);  // the floor keeps it finite, of a block of zeros too
    int32_t code[64] = {};
    for (int i = 0; i < 64; i++) {
        x[i] *= inverse;
    }
    for (int k = 0; k < 15; k++) {
        const float t = threshold(k);
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
