// Asynchronous copies to shared memory (cp.async) under cuda.cuh's names.
//
// A copy poisons its destination when it is begun and is done only when its thread waits for it: whoever reads before
// that reads NaN, and whatever the source holds by then is what arrives. A thread must not end with copies it did not
// wait for.
#pragma once
#include "dev/simt/memory.h"
#include "dev/simt/warp.h"

namespace simt {

inline void copy_begin(const Place& place, void* to, const void* from, size_t bytes, bool real) {
    Thread& me = *current;
    if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (real && reinterpret_cast<uintptr_t>(from) % bytes != 0)) {
        fault("%s (%s:%d): from %p to %p, one of them not aligned to %zu bytes", place.operation, place.file,
              place.line, from, to, bytes);
    }
    if (!is_shared(to, bytes)) {
        fault("%s (%s:%d): destination %p is outside the block's shared memory", place.operation, place.file,
              place.line, to);
    }
    if (real && !memory_find(from, bytes)) {
        fault("%s (%s:%d): source %p is outside the device's memory", place.operation, place.file, place.line, from);
    }
    memset(to, POISON, bytes);
    me.copies.push_back(
        {static_cast<char*>(to), real ? static_cast<const char*>(from) : nullptr, uint32_t(bytes), me.group});
}

inline void copies_wait(uint32_t allowed) {
    Thread& me = *current;
    size_t kept = 0;
    for (const Copy& c : me.copies) {
        if (c.group + allowed >= me.group) {
            me.copies[kept++] = c;
        } else if (c.from) {
            memcpy(c.to, c.from, c.bytes);
        } else {
            memset(c.to, 0, c.bytes);
        }
    }
    me.copies.resize(kept);
}

}  // namespace simt

inline void cp_async_16(void* shared, const void* global, SIMT_HERE) {
    simt::copy_begin({"cp_async_16", file, line}, shared, global, 16, true);
}
inline void cp_async_16_or_zero(void* shared, const void* global, bool real, SIMT_HERE) {
    simt::copy_begin({"cp_async_16_or_zero", file, line}, shared, global, 16, real);
}
inline void cp_async_8_or_zero(void* shared, const void* global, bool real, SIMT_HERE) {
    simt::copy_begin({"cp_async_8_or_zero", file, line}, shared, global, 8, real);
}
inline void cp_async_commit() {
    simt::current->group++;
}
template <int N>
inline void cp_async_wait() {
    simt::copies_wait(N);
}
