// Memory on the host's side for cards that have little: page-locked, so that the card's copy engines and kernels reach it.
// Two uses: an embedding whose few rows of a pass are gathered over the bus, and the optimizer's moments, which are needed
// once a step (the idea of QLoRA's paged optimizer, Dettmers et al. 2023, with explicit copies instead of managed memory).
//
// The moments go through two slabs on the card, each with m and v of SLAB elements, one stream for each direction:
//
//   in      | 0 | 1 |          | 2 |   | 3 | ...      slabs 0 and 1 are fetched while backward still runs
//   update            | 0 | 1 |    | 2 |   | 3 | ...  on the main stream, after the norm of the whole gradient is known
//   out                   | 0 | 1 |    | 2 | ...      the last ones go back while the next step's forward runs
//
// 16 bytes an element cross the bus once a step, half of them each way.
#pragma once
#include "kernels/adamw.cuh"
#include "kernels/device.cuh"

constexpr size_t SLAB = size_t(1) << 20;

struct MomentSlab {
    float *m = nullptr, *v = nullptr;
    cudaEvent_t arrived = nullptr, updated = nullptr, stored = nullptr;
};

struct GpuPaging {
    std::vector<char*> host;  // page-locked pieces
    MomentSlab slab[2];
    cudaStream_t in = nullptr, out = nullptr;  // nullptr: no moments are paged
    const float* moments = nullptr;            // m of those that are
    bool begun = false;                        // the first slabs are on their way
};

// ----------------------------------------------------------------------------
// memory

// Zeroed memory of the host that the card can read and write. Ends the program with a message when there is none.
template <class X>
void* device_alloc_host(Gpu<X>& dev, size_t bytes, const char* what) {
    dev.paging = dev.paging ? dev.paging : new GpuPaging;
    void* p = nullptr;
    if (cudaMallocHost(&p, bytes > 0 ? bytes : 1) != cudaSuccess) {
        fprintf(stderr, "error: not enough page-locked host memory for %s (need %.1f MiB)\n", what,
                double(bytes) / (1 << 20));
        fprintf(stderr, "hint: free memory of the host, or use a smaller model or rank\n");
        exit(1);
    }
    memset(p, 0, bytes);
    dev.paging->host.push_back(static_cast<char*>(p));
    return p;
}

// m (n) is page-locked memory of device_alloc_host, and with it its v: from now on adamw_update pages them.
template <class X>
void moments_open(Gpu<X>& dev, const float* m) {
    GpuPaging& g = *dev.paging;
    g.moments = m;
    CUDA_CHECK(cudaStreamCreateWithFlags(&g.in, cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamCreateWithFlags(&g.out, cudaStreamNonBlocking));
    for (MomentSlab& s : g.slab) {
        s.m = static_cast<float*>(device_alloc(dev, SLAB * sizeof(float), "a slab of first moments"));
        s.v = static_cast<float*>(device_alloc(dev, SLAB * sizeof(float), "a slab of second moments"));
        CUDA_CHECK(cudaEventCreateWithFlags(&s.arrived, cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&s.updated, cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&s.stored, cudaEventDisableTiming));
    }
}

// Bytes on the card that moments_open takes.
template <class X>
size_t moments_slab_bytes(const Gpu<X>&) {
    return 4 * SLAB * sizeof(float);
}

// Waits until the host's copy of the moments is whole.
template <class X>
void moments_settle(Gpu<X>& dev) {
    if (dev.paging && dev.paging->out) {
        CUDA_CHECK(cudaStreamSynchronize(dev.paging->in));
        CUDA_CHECK(cudaStreamSynchronize(dev.paging->out));
        dev.paging->begun = false;  // what was fetched may be replaced now
    }
}

template <class X>
void paging_close(Gpu<X>& dev) {
    if (!dev.paging) {
        return;
    }
    moments_settle(dev);
    GpuPaging& g = *dev.paging;
    if (g.in) {
        for (MomentSlab& s : g.slab) {
            device_free(dev, s.v);
            device_free(dev, s.m);
            CUDA_CHECK(cudaEventDestroy(s.arrived));
            CUDA_CHECK(cudaEventDestroy(s.updated));
            CUDA_CHECK(cudaEventDestroy(s.stored));
        }
        CUDA_CHECK(cudaStreamDestroy(g.in));
        CUDA_CHECK(cudaStreamDestroy(g.out));
    }
    for (char* p : g.host) {
        CUDA_CHECK(cudaFreeHost(p));
    }
    delete dev.paging;
    dev.paging = nullptr;
}

// ----------------------------------------------------------------------------
// the update

inline size_t slab_elements(size_t slab, size_t n) {
    return n - slab * SLAB < SLAB ? n - slab * SLAB : SLAB;
}

// Starts to copy slab number `slab` to the card, once what was there before has gone back.
inline void slab_fetch(GpuPaging& g, size_t slab, const float* m, const float* v, size_t n) {
    MomentSlab& s = g.slab[slab % 2];
    const size_t bytes = slab_elements(slab, n) * sizeof(float);
    CUDA_CHECK(cudaStreamWaitEvent(g.in, s.stored, 0));
    CUDA_CHECK(cudaMemcpyAsync(s.m, m + slab * SLAB, bytes, cudaMemcpyHostToDevice, g.in));
    CUDA_CHECK(cudaMemcpyAsync(s.v, v + slab * SLAB, bytes, cudaMemcpyHostToDevice, g.in));
    CUDA_CHECK(cudaEventRecord(s.arrived, g.in));
}

template <class X>
void adamw_prefetch(Gpu<X>& dev, const float* m, const float* v, size_t n) {
    if (!dev.paging || dev.paging->moments != m || dev.paging->begun) {
        return;
    }
    for (size_t slab = 0; slab < 2 && slab * SLAB < n; slab++) {
        slab_fetch(*dev.paging, slab, m, v, n);
    }
    dev.paging->begun = true;
}

// p, m, v (n) in place; g (n) is read only. Returns the index of the first element of p that is then infinite or NaN; n
// when all are finite. Workspace: optimizer_workspace.
template <class X>
size_t adamw_update(Gpu<X>& dev, float* p, float* m, float* v, const float* g, size_t n, const AdamW& a) {
    if (n == 0) {
        return 0;
    }
    const AdamWScalars<float> scalars = adamw_scalars<float>(a);
    unsigned long long* behind = nonfinite_begin(dev);
    if (!dev.paging || dev.paging->moments != m) {
        adamw_launch(dev, p, m, v, g, n, scalars, behind, n);
        return nonfinite_index(dev, behind, n);
    }
    GpuPaging& paging = *dev.paging;
    adamw_prefetch(dev, m, v, n);
    for (size_t slab = 0; slab * SLAB < n; slab++) {
        MomentSlab& s = paging.slab[slab % 2];
        const size_t first = slab * SLAB, count = slab_elements(slab, n), bytes = count * sizeof(float);
        CUDA_CHECK(cudaStreamWaitEvent(dev.stream, s.arrived, 0));
        adamw_launch(dev, p + first, s.m, s.v, g + first, count, scalars, behind, n - first);
        CUDA_CHECK(cudaEventRecord(s.updated, dev.stream));
        CUDA_CHECK(cudaStreamWaitEvent(paging.out, s.updated, 0));
        CUDA_CHECK(cudaMemcpyAsync(m + first, s.m, bytes, cudaMemcpyDeviceToHost, paging.out));
        CUDA_CHECK(cudaMemcpyAsync(v + first, s.v, bytes, cudaMemcpyDeviceToHost, paging.out));
        CUDA_CHECK(cudaEventRecord(s.stored, paging.out));
        if ((slab + 2) * SLAB < n) {
            slab_fetch(paging, slab + 2, m, v, n);
        }
    }
    paging.begun = false;
    return nonfinite_index(dev, behind, n);
}
