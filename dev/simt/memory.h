// The device's memory: what cudaMalloc and cudaMallocHost have handed out, with red zones on both sides of each piece.
// The calls themselves are in runtime.h.
//
//   | red zone | bytes that begin as NaN | red zone |
//
// Red zones are checked after every launch, so that the message names the kernel, and when a piece is freed. Under
// AddressSanitizer they are poisoned instead, and the access itself is reported. A stray write of all ones is not seen.
//
// A GPU cannot read the host's ordinary memory, so copies are checked against their direction, and pointers among a
// kernel's arguments against the pieces.
#pragma once
#include <map>

#include "dev/simt/block.h"

namespace simt {

constexpr size_t RED_ZONE = 256;
constexpr unsigned char RED = 0xff;  // what is read there is a NaN

struct Piece {
    size_t bytes;
    bool on_host;  // page-locked: both sides may use it
};

struct Memory {
    std::map<const char*, Piece> pieces;
    size_t used = 0;  // on the device
};
// Changed by the host's calls only, never while a kernel runs.
inline Memory& memory() {
    static Memory m;
    return m;
}

// Of the device: SIMT_MEMORY_MB, or 4096.
inline size_t memory_total() {
    static const size_t bytes = [] {
        const char* text = getenv("SIMT_MEMORY_MB");
        const long mb = text ? atol(text) : 0;
        return size_t(mb > 0 ? mb : 4096) << 20;
    }();
    return bytes;
}

inline size_t memory_rounded(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

inline char* memory_take(size_t bytes, bool on_host) {
    const size_t rounded = memory_rounded(bytes);
    char* p = static_cast<char*>(aligned_alloc(256, RED_ZONE + rounded + RED_ZONE));
    if (!p) {
        return nullptr;
    }
    memset(p, RED, RED_ZONE + rounded + RED_ZONE);
    p += RED_ZONE;
#ifdef SIMT_ASAN
    ASAN_POISON_MEMORY_REGION(p - RED_ZONE, RED_ZONE);
    ASAN_POISON_MEMORY_REGION(p + bytes, rounded - bytes + RED_ZONE);
#endif
    memory().pieces[p] = {bytes, on_host};
    memory().used += on_host ? 0 : bytes;
    return p;
}

inline void check_red_zones(const char* p, size_t bytes, const Launch* l) {
#ifdef SIMT_ASAN
    (void)p, (void)bytes, (void)l;
#else
    for (size_t i = 0; i < RED_ZONE; i++) {
        const bool before = static_cast<unsigned char>(p[i - RED_ZONE]) != RED;
        if (before || static_cast<unsigned char>(p[bytes + i]) != RED) {
            fault("%s%s: write %zu bytes %s an allocation of %zu bytes", l ? "kernel " : "memory to be freed",
                  l ? l->kernel : "", before ? RED_ZONE - i : i, before ? "before" : "behind", bytes);
        }
    }
#endif
}

inline void check_memory(const Launch& l) {
    for (const auto& piece : memory().pieces) {
        check_red_zones(piece.first, piece.second.bytes, &l);
    }
}

inline void memory_give(const void* pointer, bool on_host) {
    const auto piece = memory().pieces.find(static_cast<const char*>(pointer));
    if (piece == memory().pieces.end() || piece->second.on_host != on_host) {
        fault("%s of %p, which is no such allocation", on_host ? "cudaFreeHost" : "cudaFree", pointer);
    }
    check_red_zones(piece->first, piece->second.bytes, nullptr);
#ifdef SIMT_ASAN
    ASAN_UNPOISON_MEMORY_REGION(piece->first - RED_ZONE, RED_ZONE + memory_rounded(piece->second.bytes) + RED_ZONE);
#endif
    memory().used -= on_host ? 0 : piece->second.bytes;
    free(const_cast<char*>(piece->first) - RED_ZONE);
    memory().pieces.erase(piece);
}

// The piece that the bytes stand in, or nullptr.
inline const Piece* memory_find(const void* pointer, size_t bytes) {
    const char* p = static_cast<const char*>(pointer);
    auto piece = memory().pieces.upper_bound(p);
    if (piece == memory().pieces.begin()) {
        return nullptr;
    }
    --piece;
    return size_t(p - piece->first) <= piece->second.bytes && bytes <= piece->second.bytes - size_t(p - piece->first)
               ? &piece->second
               : nullptr;
}

}  // namespace simt
