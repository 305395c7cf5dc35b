// Stored weights to float on the host, while a checkpoint is read. Exact for all three formats.
#pragma once
#include <cmath>

#include "kernels/types.h"

// out (n) = the n elements at raw. Returns the index of the first that is not finite, or n.
inline size_t widen(float* out, const void* raw, Store store, size_t n) {
    bool finite = true;
    for (size_t i = 0; i < n; i++) {
        switch (store) {
            case Store::BF16: out[i] = to_float(static_cast<const bf16*>(raw)[i]); break;
            case Store::F16: out[i] = half_to_float(static_cast<const uint16_t*>(raw)[i]); break;
            default: memcpy(&out[i], static_cast<const char*>(raw) + 4 * i, 4); break;
        }
        finite &= std::isfinite(out[i]);
    }
    for (size_t i = 0; i < n && !finite; i++) {
        if (!std::isfinite(out[i])) {
            return i;
        }
    }
    return n;
}
