// The optimizer's walk over the flat adapter buffers: AdamW, the norm of the gradients, the search for what is not
// finite. The norm is summed in double over blocks that depend on n alone, so the number of threads changes no bit.
//
// AdamW (Loshchilov, Hutter 2019) in the order of PyTorch's single-tensor path, scalars in double and then rounded:
//   g = g grad_scale;  p = p (1 - lr wd);  m = m + (1 - beta1)(g - m);  v = v beta2 + (1 - beta2) g g
//   p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/adamw.h"
#include "kernels/checksum.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/rows.h"

template <class X>
size_t first_nonfinite(Cpu<X>& dev, const typename Cpu<X>::real* x, size_t n);

// All memory is the host's: nothing is paged.
template <class X>
void* device_alloc_host(Cpu<X>&, size_t, const char*) {
    return nullptr;
}
template <class X>
void moments_open(Cpu<X>&, const typename Cpu<X>::real*) {}
template <class X>
size_t moments_slab_bytes(const Cpu<X>&) {
    return 0;
}
template <class X>
void moments_settle(Cpu<X>&) {}
template <class X>
void adamw_prefetch(Cpu<X>&, const typename Cpu<X>::real*, const typename Cpu<X>::real*, size_t) {}
template <class X>
size_t optimizer_workspace(const Cpu<X>&) {
    return 0;
}

// p, m, v (n) in place; g (n) is read only. Returns the index of the first element of p that is then infinite or NaN; n
// when all are finite.
template <class X>
size_t adamw_update(Cpu<X>& dev, typename Cpu<X>::real* p, typename Cpu<X>::real* m, typename Cpu<X>::real* v,
                  const typename Cpu<X>::real* g, size_t n, const AdamW& a) {
    using real = typename Cpu<X>::real;
    const AdamWScalars<real> s = adamw_scalars<real>(a);
    parallel_ranges(dev.threads, n, 16384, [&](size_t begin, size_t end, int) {
        row_kernels(dev).adamw(p + begin, m + begin, v + begin, g + begin, end - begin, &s);
    });
    return first_nonfinite(dev, p, n);
}

constexpr size_t SUM_BLOCKS = 256;

// fn(block, begin, end) for 256 consecutive ranges of 0 .. n.
template <class X, class Fn>
void for_sum_blocks(Cpu<X>& dev, size_t n, const Fn& fn) {
    const size_t each = (n + SUM_BLOCKS - 1) / SUM_BLOCKS;
    parallel_tasks(n < 65536 ? 1 : dev.threads, SUM_BLOCKS, [&](size_t block, int) {
        size_t begin = block * each < n ? block * each : n, end = begin + each < n ? begin + each : n;
        fn(block, begin, end);
    });
}

// sum of x[i]^2 over x (n).
template <class X>
double sum_squares(Cpu<X>& dev, const typename Cpu<X>::real* x, size_t n) {
    double block_sum[SUM_BLOCKS];
    for_sum_blocks(dev, n, [&](size_t block, size_t begin, size_t end) {
        double s[8] = {};
        for (; begin + 8 <= end; begin += 8) {
            for (size_t j = 0; j < 8; j++) {
                s[j] += double(x[begin + j]) * double(x[begin + j]);
            }
        }
        for (size_t j = 0; begin + j < end; j++) {
            s[j] += double(x[begin + j]) * double(x[begin + j]);
        }
        block_sum[block] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    });
    double sum = 0;
    for (double s : block_sum) {
        sum += s;
    }
    return sum;
}

// The index of the first element of x (n) that is infinite or NaN; n when all are finite.
template <class X>
size_t first_nonfinite(Cpu<X>& dev, const typename Cpu<X>::real* x, size_t n) {
    size_t found[SUM_BLOCKS];
    for_sum_blocks(dev, n, [&](size_t block, size_t begin, size_t end) {
        found[block] = n;
        for (size_t i = begin; i < end; i++) {
            if (!std::isfinite(x[i])) {
                found[block] = i;
                break;
            }
        }
    });
    for (size_t i : found) {
        if (i < n) {
            return i;
        }
    }
    return n;
}

// The checksum of x (n), as checksum.h has it.
template <class X>
uint64_t checksum(Cpu<X>& dev, const typename Cpu<X>::real* x, size_t n) {
    using Bits = typename std::conditional<sizeof(typename Cpu<X>::real) == 8, uint64_t, uint32_t>::type;
    uint64_t block_sum[SUM_BLOCKS];
    for_sum_blocks(dev, n, [&](size_t block, size_t begin, size_t end) {
        block_sum[block] = 0;
        for (size_t i = begin; i < end; i++) {
            Bits bits;
            memcpy(&bits, x + i, sizeof bits);
            block_sum[block] += checksum_term(i, bits);
        }
    });
    uint64_t sum = 0;
    for (uint64_t s : block_sum) {
        sum += s;
    }
    return sum;
}
