// The reference tier: plain C that any processor runs; products and sums are rounded apart. Leaf kernels only; see
// isa.h and leaf_gemm.inc for what may be included here.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/bf16.h"
#include "kernels/cpu/isa.h"

namespace {

constexpr int W = 4, TILE_MR = 4, TILE_NV = 2;
struct vec {
    float x[W];
};
struct table16 {
    float x[16];
};

inline vec v_zero() {
    return {};
}
inline vec v_set1(float x) {
    return {{x, x, x, x}};
}
inline vec v_load(const float* p) {
    return {{p[0], p[1], p[2], p[3]}};
}
inline vec v_load_n(const float* p, int n) {
    vec v = {};
    for (int i = 0; i < n; i++) {
        v.x[i] = p[i];
    }
    return v;
}
inline void v_store_n(float* p, vec v, int n) {
    for (int i = 0; i < n; i++) {
        p[i] = v.x[i];
    }
}
inline void v_store(float* p, vec v) {
    memcpy(p, v.x, sizeof v.x);
}
inline vec v_add(vec a, vec b) {
    return {{a.x[0] + b.x[0], a.x[1] + b.x[1], a.x[2] + b.x[2], a.x[3] + b.x[3]}};
}
inline vec v_fma(vec a, vec b, vec c) {
    return {{c.x[0] + a.x[0] * b.x[0], c.x[1] + a.x[1] * b.x[1], c.x[2] + a.x[2] * b.x[2], c.x[3] + a.x[3] * b.x[3]}};
}

inline void v_transpose(vec v[W]) {
    for (int i = 0; i < W; i++) {
        for (int j = 0; j < i; j++) {
            float t = v[i].x[j];
            v[i].x[j] = v[j].x[i];
            v[j].x[i] = t;
        }
    }
}

inline float bits_to_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline table16 v_table(float absmax) {
    table16 t;
    for (int i = 0; i < 16; i++) {
        float product = NF4_CODE[i] * absmax;
        uint32_t u;
        memcpy(&u, &product, 4);
        t.x[i] = bits_to_float((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000);
    }
    return t;
}
inline void v_table_store(float* p, const table16& t) {
    memcpy(p, t.x, sizeof t.x);
}
inline vec v_lookup(const uint8_t* codes, const table16& t) {
    return {{t.x[codes[0] >> 4], t.x[codes[0] & 15], t.x[codes[1] >> 4], t.x[codes[1] & 15]}};
}
inline vec v_widen_bf16(const uint16_t* p) {
    vec v;
    for (int i = 0; i < W; i++) {
        v.x[i] = bits_to_float(uint32_t(p[i]) << 16);
    }
    return v;
}
inline vec v_widen_f16(const uint16_t* p) {
    return {{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])}};
}

#include "kernels/cpu/leaf_gemm.inc"
#include "kernels/cpu/leaf_rows.inc"

#include "kernels/cpu/leaf_attention.inc"  // written over both

}  // namespace

extern const CpuIsa cpu_isa_ref = {"ref",      &format_fp32, nullptr,   nullptr,    TILE_MR,   transpose,
                                   nf4_absmax, nf4_run,      widen_f16, philox_run, LEAF_ROWS, LEAF_ATTENTION};
