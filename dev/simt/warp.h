// Barriers, shuffles, votes, tensor-core instructions and atomics under CUDA's names and cuda.cuh's.
//
// Every collective checks: the lane is in its mask, no lane of the mask has ended, all lanes are in the same operation
// at the same line. Tensor cores: products exact in fp32, sums in fp32 in the order of k, added to c; the hardware's
// order and rounding differ in the last bits. Atomics are real ones, between blocks too; there are none on floats,
// since their order would show in the result.
#pragma once
#include <type_traits>

#include "dev/simt/block.h"

#define threadIdx (simt::current->index)
#define blockIdx (simt::current->block->index)
#define blockDim (simt::current->block->launch->block)
#define gridDim (simt::current->block->launch->grid)
constexpr int warpSize = 32;

// Where a built-in is called, as its last default arguments.
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_HERE) {
    simt::barrier({"__syncthreads", file, line});
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, SIMT_HERE) {
    simt::collective({"__syncwarp", file, line}, mask, nullptr, [](void**) {});
}
inline void __threadfence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_block() {}

// ----------------------------------------------------------------------------
// shuffles: lane i gets the value of lane source(i), which stands in its own segment of `width` lanes

namespace simt {

template <class T>
struct Shuffle {
    T in, out;
    int source;
};

template <class T>
inline T shuffle(const Place& place, uint32_t mask, T value, int source) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "as CUDA's shuffles");
    check_mask(place, mask);
    if (!(mask >> source & 1)) {
        fault("%s (%s:%d): the lane reads lane %d, which is not in the mask %08x", place.operation, place.file,
              place.line, source, mask);
    }
    Shuffle<T> mine = {value, value, source};
    collective(place, mask, &mine, [mask](void** arguments) {
        for (uint32_t left = mask; left != 0; left &= left - 1) {
            Shuffle<T>* s = static_cast<Shuffle<T>*>(arguments[__builtin_ctz(left)]);
            s->out = static_cast<Shuffle<T>*>(arguments[s->source])->in;
        }
    });
    return mine.out;
}

inline int segment(const Place& place, int width) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
        fault("%s (%s:%d): width %d is no power of two up to 32", place.operation, place.file, place.line, width);
    }
    return current->lane & ~(width - 1);
}

}  // namespace simt

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SIMT_HERE) {
    const simt::Place place = {"__shfl_sync", file, line};
    return simt::shuffle(place, mask, value, simt::segment(place, width) | (source & (width - 1)));
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
    const simt::Place place = {"__shfl_up_sync", file, line};
    const int lane = simt::current->lane, source = lane - int(delta & 31);
    return simt::shuffle(place, mask, value, source >= simt::segment(place, width) ? source : lane);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
    const simt::Place place = {"__shfl_down_sync", file, line};
    const int lane = simt::current->lane, source = lane + int(delta & 31);
    return simt::shuffle(place, mask, value, source < simt::segment(place, width) + width ? source : lane);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, SIMT_HERE) {
    const simt::Place place = {"__shfl_xor_sync", file, line};
    const int lane = simt::current->lane, source = lane ^ (lanes & 31);
    return simt::shuffle(place, mask, value, source < simt::segment(place, width) + width ? source : lane);
}

// ----------------------------------------------------------------------------
// votes

namespace simt {

struct Vote {
    bool in;
    uint32_t out;
};

// The lanes of the mask whose predicate holds.
inline uint32_t vote(const Place& place, uint32_t mask, bool predicate) {
    Vote mine = {predicate, 0};
    collective(place, mask, &mine, [mask](void** arguments) {
        uint32_t all = 0;
        for (uint32_t left = mask; left != 0; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            all |= uint32_t(static_cast<Vote*>(arguments[lane])->in) << lane;
        }
        for (uint32_t left = mask; left != 0; left &= left - 1) {
            static_cast<Vote*>(arguments[__builtin_ctz(left)])->out = all;
        }
    });
    return mine.out;
}

}  // namespace simt

inline uint32_t __ballot_sync(uint32_t mask, bool predicate, SIMT_HERE) {
    return simt::vote({"__ballot_sync", file, line}, mask, predicate);
}
inline int __any_sync(uint32_t mask, bool predicate, SIMT_HERE) {
    return simt::vote({"__any_sync", file, line}, mask, predicate) != 0;
}
inline int __all_sync(uint32_t mask, bool predicate, SIMT_HERE) {
    return simt::vote({"__all_sync", file, line}, mask, predicate) == mask;
}

// ----------------------------------------------------------------------------
// tensor cores; fragments as cuda.cuh shows them

namespace simt {

struct Fragments {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};

inline void mma(void** arguments) {
    float A[16][16], B[16][8], C[16][8] = {};
    for (int lane = 0; lane < 32; lane++) {
        const Fragments& f = *static_cast<Fragments*>(arguments[lane]);
        const int g = lane / 4, t = lane % 4 * 2;
        for (int r = 0; r < 4; r++) {
            float* to = &A[g + r % 2 * 8][t + r / 2 * 8];
            to[0] = __uint_as_float(f.a[r] << 16);
            to[1] = __uint_as_float(f.a[r] & 0xffff0000u);
        }
        for (int r = 0; r < 2; r++) {
            B[t + r * 8][g] = __uint_as_float(f.b[r] << 16);
            B[t + r * 8 + 1][g] = __uint_as_float(f.b[r] & 0xffff0000u);
        }
    }
    for (int i = 0; i < 16; i++) {
        for (int k = 0; k < 16; k++) {
            for (int j = 0; j < 8; j++) {
                C[i][j] += A[i][k] * B[k][j];
            }
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        const Fragments& f = *static_cast<Fragments*>(arguments[lane]);
        for (int r = 0; r < 4; r++) {
            f.c[r] += C[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
        }
    }
}

struct Rows {
    const void* row;
    uint32_t* out;
};

inline Rows matrix_row(const Place& place, uint32_t* out, const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
        fault("%s (%s:%d): row address %p is not aligned to 16 bytes", place.operation, place.file, place.line, row);
    }
    if (!is_shared(row, 16)) {
        fault("%s (%s:%d): row address %p is outside the block's shared memory", place.operation, place.file,
              place.line, row);
    }
    return {row, out};
}

}  // namespace simt

inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE) {
    simt::Fragments mine = {c, a, {b0, b1}};
    simt::collective({"mma_16816", file, line}, 0xffffffffu, &mine, simt::mma);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_HERE) {
    const simt::Place place = {"ldmatrix_x4", file, line};
    simt::Rows mine = simt::matrix_row(place, r, row);
    simt::collective(place, 0xffffffffu, &mine, [](void** arguments) {
        for (int lane = 0; lane < 32; lane++) {
            for (int m = 0; m < 4; m++) {
                const char* from = static_cast<const char*>(static_cast<simt::Rows*>(arguments[m * 8 + lane / 4])->row);
                memcpy(&static_cast<simt::Rows*>(arguments[lane])->out[m], from + lane % 4 * 4, 4);
            }
        }
    });
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SIMT_HERE) {
    const simt::Place place = {"ldmatrix_x4_trans", file, line};
    simt::Rows mine = simt::matrix_row(place, r, row);
    simt::collective(place, 0xffffffffu, &mine, [](void** arguments) {
        for (int lane = 0; lane < 32; lane++) {
            for (int m = 0; m < 4; m++) {
                uint16_t pair[2];
                for (int h = 0; h < 2; h++) {
                    const simt::Rows* from = static_cast<simt::Rows*>(arguments[m * 8 + lane % 4 * 2 + h]);
                    memcpy(&pair[h], static_cast<const char*>(from->row) + lane / 4 * 2, 2);
                }
                static_cast<simt::Rows*>(arguments[lane])->out[m] = pair[0] | uint32_t(pair[1]) << 16;
            }
        }
    });
}

// ----------------------------------------------------------------------------
// atomics: return the value before

namespace simt {

template <class T>
struct Given {  // keeps a parameter out of deduction, so that it is converted
    using type = T;
};

template <class T, class Change>
inline T atomic_change(T* p, Change change) {
    static_assert(std::is_integral<T>::value && sizeof(T) >= 4, "atomics are on integers only");
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, change(old), true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
    return old;
}

}  // namespace simt

template <class T>
inline T atomicAdd(T* p, typename simt::Given<T>::type x) {
    static_assert(std::is_integral<T>::value && sizeof(T) >= 4, "atomics are on integers only");
    return __atomic_fetch_add(p, x, __ATOMIC_ACQ_REL);
}
template <class T>
inline T atomicSub(T* p, typename simt::Given<T>::type x) {
    static_assert(std::is_integral<T>::value && sizeof(T) >= 4, "atomics are on integers only");
    return __atomic_fetch_sub(p, x, __ATOMIC_ACQ_REL);
}
template <class T>
inline T atomicMax(T* p, typename simt::Given<T>::type x) {
    return simt::atomic_change(p, [x](T old) { return old < x ? x : old; });
}
template <class T>
inline T atomicMin(T* p, typename simt::Given<T>::type x) {
    return simt::atomic_change(p, [x](T old) { return x < old ? x : old; });
}
template <class T>
inline T atomicOr(T* p, typename simt::Given<T>::type x) {
    return simt::atomic_change(p, [x](T old) { return T(old | x); });
}
template <class T>
inline T atomicAnd(T* p, typename simt::Given<T>::type x) {
    return simt::atomic_change(p, [x](T old) { return T(old & x); });
}
template <class T>
inline T atomicExch(T* p, typename simt::Given<T>::type x) {
    return simt::atomic_change(p, [x](T) { return x; });
}
template <class T>
inline T atomicCAS(T* p, typename simt::Given<T>::type compare, typename simt::Given<T>::type x) {
    return simt::atomic_change(p, [compare, x](T old) { return old == compare ? x : old; });
}

// ----------------------------------------------------------------------------
// loads and stores with a cache policy; here only the alignment matters

namespace simt {

template <class T>
inline const T* aligned(const T* p, const char* what, const char* file, int line) {
    if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) {
        fault("%s (%s:%d): address %p is not aligned to %zu bytes", what, file, line, static_cast<const void*>(p),
              alignof(T));
    }
    return p;
}

}  // namespace simt

#define SIMT_LOAD(name)                              \
    template <class T>                               \
    inline T name(const T* p, SIMT_HERE) {           \
        return *simt::aligned(p, #name, file, line); \
    }
#define SIMT_STORE(name)                                                 \
    template <class T>                                                   \
    inline void name(T* p, typename simt::Given<T>::type x, SIMT_HERE) { \
        simt::aligned(p, #name, file, line);                             \
        *p = x;                                                          \
    }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldlu)
SIMT_STORE(__stcs)
SIMT_STORE(__stcg)
SIMT_STORE(__stwb)
SIMT_STORE(__stwt)
#undef SIMT_LOAD
#undef SIMT_STORE
