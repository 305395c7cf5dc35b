// Parts of dev.workspace. With a null base it only counts, so that an op and its *_workspace function share one
// description of what is needed.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "kernels/gpu.h"

struct Workspace {
    char* base = nullptr;
    size_t used = 0, limit = ~size_t(0);
};

template <class X>
Workspace workspace_of(const Gpu<X>& dev) {
    return {dev.workspace, 0, dev.workspace_bytes};
}

// n elements, 256-byte aligned.
template <class T>
T* workspace_take(Workspace& w, size_t n) {
    const size_t begin = w.used;
    w.used += (n * sizeof(T) + 255) / 256 * 256;
    if (w.used > w.limit) {
        fprintf(stderr, "error: GPU workspace too small (%zu bytes, need %zu or more)\n", w.limit, w.used);
        abort();  // the caller did not reserve what the op's *_workspace function states
    }
    return w.base ? reinterpret_cast<T*>(w.base + begin) : nullptr;
}
