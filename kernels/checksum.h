// A checksum of numbers that many threads add up in any order:
//
//   sum over i of mix((i + 1) G + bits of x[i])   mod 2^64,   G = 0x9e3779b97f4a7c15
//
// mix is the finaliser of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA
// 2014). The place is part of what is mixed, so two numbers that are exchanged change the sum, and bits are compared,
// so that -0 is not 0 and a NaN is like itself. It finds accidents, not attacks.
#pragma once
#include <cstdint>

#include "kernels/host_device.h"

HOST_DEVICE inline uint64_t checksum_term(uint64_t i, uint64_t bits) {
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u + bits;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}
