// bf16, one 2-byte struct for every device: the upper half of a float. Rounding is to nearest, ties to even; a NaN
// stays a NaN.
#pragma once
#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};

inline float to_float(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

inline float to_float(float x) {
    return x;
}

inline bf16 to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) {
        return {uint16_t((u >> 16) | 0x40)};  // keep the sign and make it quiet: plain rounding could reach infinity
    }
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

// IEEE half precision, read only: as some checkpoints store their weights.
inline float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff, u;
    if (exponent == 31) {
        u = sign | 0x7f800000 | mantissa << 13;
    } else if (exponent > 0) {
        u = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {  // zero or subnormal: mantissa * 2^-24 is exact in float
        float f = float(mantissa) * 0x1p-24f;
        memcpy(&u, &f, 4);
        u |= sign;
    }
    float f;
    memcpy(&f, &u, 4);
    return f;
}
