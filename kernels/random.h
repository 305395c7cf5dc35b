// Every random number of the project: a pure function of (seed, stream, substream, index), the same bits on every
// device and for any order of evaluation. No state, so none to save.
//
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): ten rounds of two
// 32 x 32 -> 64 bit products over a 128-bit counter. Here the key is the seed, and the counter holds
//   | index low | index high, 16 bits; stream, 16 bits | substream low | substream high |
// so an index is below 2^48 and a stream below 2^16.
//
// Published vectors (Random123 1.09, kat_vectors), counter, key -> output:
//   00000000 00000000 00000000 00000000, 00000000 00000000 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8
//   ffffffff ffffffff ffffffff ffffffff, ffffffff ffffffff -> 408f276d 41c83b0e a20bc7c6 6d5451fd
//   243f6a88 85a308d3 13198a2e 03707344, a4093822 299f31d0 -> d16cfe09 94fdcceb 5001e420 24126ea1
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/host_device.h"

HOST_DEVICE inline void philox4x32(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t a = uint64_t(0xD2511F53) * c0, b = uint64_t(0xCD9E8D57) * c2;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0;
        c1 = uint32_t(b);
        c2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c3 = uint32_t(a);
        k0 += 0x9E3779B9;  // the golden ratio and sqrt(3) - 1, as the paper's Weyl sequences
        k1 += 0xBB67AE85;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// What a number is for. Numbers of the order of epoch 3 are (seed, STREAM_ORDER, 3, index), and so on.
enum RandomStream : uint32_t {
    STREAM_ORDER = 1,
    STREAM_ADAPTER,
    STREAM_DROPOUT,
    STREAM_SPLIT,
    STREAM_TOKENS,
    STREAM_WEIGHTS
};

inline uint64_t random_bits(uint64_t seed, uint32_t stream, uint64_t substream, uint64_t index) {
    const uint32_t counter[4] = {uint32_t(index), uint32_t(index >> 32) << 16 | (stream & 0xffff), uint32_t(substream),
                                 uint32_t(substream >> 32)};
    const uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    uint32_t out[4];
    philox4x32(out, counter, key);
    return uint64_t(out[1]) << 32 | out[0];
}

// [0, 1) in steps of 2^-53.
inline double random_uniform(uint64_t seed, uint32_t stream, uint64_t substream, uint64_t index) {
    return double(random_bits(seed, stream, substream, index) >> 11) * 0x1p-53;
}

// 0 .. n - 1, n > 0: the upper half of the 128-bit product bits * n. Each value gets floor or ceil of 2^64 / n of the
// 2^64 draws, so no probability is off by more than n / 2^64 of itself: below 2^32, less than one in four billion. No
// training run draws enough to show that. Rejection would make the count of draws depend on their values.
inline uint64_t random_below(uint64_t seed, uint32_t stream, uint64_t substream, uint64_t index, uint64_t n) {
    uint64_t bits = random_bits(seed, stream, substream, index);
    uint64_t low = (bits & 0xffffffff) * (n & 0xffffffff), cross = (bits >> 32) * (n & 0xffffffff) + (low >> 32);
    uint64_t other = (bits & 0xffffffff) * (n >> 32) + (cross & 0xffffffff);
    return (bits >> 32) * (n >> 32) + (cross >> 32) + (other >> 32);
}

// Fisher and Yates, from the last place down; index i of the stream settles place i.
inline std::vector<size_t> random_permutation(size_t n, uint64_t seed, uint32_t stream, uint64_t substream) {
    std::vector<size_t> order(n);
    for (size_t i = 0; i < n; i++) {
        order[i] = i;
    }
    for (size_t i = n; i-- > 1;) {
        std::swap(order[i], order[size_t(random_below(seed, stream, substream, i, uint64_t(i) + 1))]);
    }
    return order;
}
