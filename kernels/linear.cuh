// Linear groups: frozen linears that share an input, each with a LoRA adapter (Hu et al. 2021). The adapters are folded
// into the frozen products as more columns of the contraction, so that the output is written once and every sum is
// fp32:
//
//   forward   out = [ x | s xa ] [ W | B ]^T + residual       xa = drop(x) A^T
//   backward  din = [ dout | D ] [ W ]                        D = s dout B
//                                [ A ]
//             dA_p += D_p^T drop(x),   dB_p += dout_p^T (s xa)_p
//
// A (R, C) are the parts' rows one below the other, B (OC, R) their matrices along a diagonal. R is filled up with
// zeros to RP = row_room(R) columns, the room that stands behind each row of x and of dout.
//
// Here xa holds s drop(x) A^T, with the scale, as it stands in the room; on the CPU it holds drop(x) A^T. The two
// devices never read each other's.
//
// The frozen product is made in one of three ways:
//   IN_PLACE  W is stored as X. One product a part reads it where it is, another adds the adapters: out is read and
//   written
//             once more, 4 N OC bytes in bf16, and rounded between the two, as PEFT does.
//   FUSED     nf4_matmul.cuh decodes W as it multiplies: no 16-bit copy, no slot.
//   DEQUANT   W is written as X into a slot, A and B around it, and one product reads the whole:
//
//               | W  (OC, C)  | B (OC, RP) |     rows ld = C + RP apart, ld a multiple of 8
//               | A  (RP, C)  |            |
//
// There are two slots. W is frozen, so a slot stays good until another group wants it; the one used longest ago goes. A
// group is known by where its weights stand and by its adapters' numbers in the model: with sharded weights the layers
// take turns in two buffers, so that the same place holds another layer's weights soon after.
// linear_prefetch fills a slot on the second stream while the first one multiplies. Two events keep the order:
// `released`, recorded after the last product that reads a slot, is waited for before it is overwritten aside; `ready`,
// recorded after it was written aside, is waited for before it is read. A and B change every step and are written at
// each use.
#pragma once
#include <cassert>
#include <type_traits>

#include "kernels/device.cuh"
#include "kernels/dropout.cuh"
#include "kernels/matmul.cuh"
#include "kernels/nf4_ops.h"
#include "kernels/rmsnorm.cuh"
#include "kernels/rope.cuh"
#include "kernels/swiglu.cuh"
#include "kernels/workspace.cuh"

// ----------------------------------------------------------------------------
// the dispatch table

// Up to how many rows the fused kernel is the faster way. All of these are estimates, at their low ends: the rows M*
// whose product takes as long as writing and reading W in 16 bits, times f / (1 - f) for a kernel that reaches f of
// cuBLAS. Measurements of dev/results/ will replace them.
struct FusedRows {
    int arch;  // and newer ones up to the next line
    size_t rows;
};
constexpr FusedRows fused_rows_table[] = {
    {80, 330},   // A100: M* 180, f 0.65
    {86, 540},   // RTX 3090: M* 96, f 0.85
    {89, 1200},  // RTX 4090: M* 205, f 0.85
    {90, 150},   // H100, H200: M* 231, f 0.40; mma.sync reaches 62 % of wgmma there
    {100, 100},  // B200: M* 320, f 0.25; mma.sync is further behind
    {120, 930},  // RTX 5090: M* 165, f 0.85
};

inline size_t fused_rows(int arch) {
    size_t rows = 0;
    for (const FusedRows& line : fused_rows_table) {
        rows = arch >= line.arch ? line.rows : rows;
    }
    return rows;
}

enum class LinearWay { IN_PLACE, FUSED, DEQUANT };

inline Nf4Group linear_nf4_group(const LinearGroup<float>& g) {
    Nf4Group group = {g.parts, {}, g.OC, g.C};
    for (int p = 0; p < g.parts; p++) {
        group.w[p] = &g.part[p].w;
    }
    return group;
}

// Of passes of N rows. A group that goes through a slot at N does so at every greater number of rows.
template <class X>
LinearWay linear_way(const Gpu<X>& dev, const LinearGroup<float>& g, size_t N) {
    const Store own = std::is_same<X, bf16>::value ? Store::BF16 : Store::F32;
    bool in_place = true, nf4 = std::is_same<X, bf16>::value;
    for (int p = 0; p < g.parts; p++) {
        in_place &= g.part[p].w.store == own;
        nf4 &= g.part[p].w.store == Store::NF4;
    }
    if (in_place) {
        return LinearWay::IN_PLACE;
    }
    const bool wanted = dev.gemm == GemmPath::FUSED || (dev.gemm == GemmPath::AUTO && N <= fused_rows(dev.info.arch));
    const bool taken = nf4 && wanted && nf4_matmul_takes(linear_nf4_group(g), int(dev.row_room(g.R)));
    return taken ? LinearWay::FUSED : LinearWay::DEQUANT;
}

// ----------------------------------------------------------------------------
// CUDA kernels

struct AdapterParts {
    const float* A[3];
    const float* B[3];
    int r[3], rows[3];
};

// a (RP, C) = the parts' A one below the other; b (OC, RP) = their B along the diagonal; zeros elsewhere.
template <class X>
__global__ void linear_adapter_kernel(X* a, size_t lda, X* b, size_t ldb, AdapterParts parts, unsigned RP, unsigned C,
                                      unsigned OC) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    const bool is_a = i < RP * C;
    i = is_a ? i : i - RP * C;
    const unsigned width = is_a ? C : RP, row = i / width, col = i % width;
    if (!is_a && row >= OC) {
        return;
    }
    float value = 0;
    int rank = 0, first = 0;
#pragma unroll
    for (int p = 0; p < 3; p++) {
        const int j = int(is_a ? row : col) - rank, o = int(row) - first, r = parts.r[p];
        if (j >= 0 && j < r && (is_a || (o >= 0 && o < parts.rows[p]))) {
            value = is_a ? parts.A[p][size_t(j) * C + col] : parts.B[p][size_t(o) * size_t(r) + size_t(j)];
        }
        rank += r;
        first += parts.rows[p];
    }
    (is_a ? a + row * lda : b + row * ldb)[col] = narrow<X>(value);
}

// ----------------------------------------------------------------------------
// workspace

constexpr size_t DROPOUT_CHUNK = 1024;  // rows of which a masked copy is made at a time

template <class X>
struct LinearSpace {
    X* x;        // (N, C), rows ldx apart with room: the input after norm or SwiGLU; not of PLAIN inputs
    X* a;        // (RP, C)    where no slot holds them
    X* b;        // (OC, RP)
    X* masked;   // (DROPOUT_CHUNK, C)
    size_t ldx;  // of x here
};

// A multiple of 8, so that rows can be read 16 bytes at a time.
template <class X>
size_t linear_ld(const LinearGroup<float>& g) {
    return (size_t(g.C) + Gpu<X>::row_room(g.R) + 7) / 8 * 8;
}

template <class X>
LinearSpace<X> linear_space(Workspace& w, const LinearGroup<float>& g, size_t N) {
    const size_t RP = Gpu<X>::row_room(g.R), C = size_t(g.C), rows = N < DROPOUT_CHUNK ? N : DROPOUT_CHUNK;
    LinearSpace<X> s;
    s.ldx = linear_ld<X>(g);
    s.x = workspace_take<X>(w, N * s.ldx);
    s.a = workspace_take<X>(w, RP * C);
    s.b = workspace_take<X>(w, size_t(g.OC) * RP);
    s.masked = workspace_take<X>(w, g.R > 0 ? rows * C : 0);
    return s;
}

template <class X>
size_t linear_workspace(const Gpu<X>&, const LinearGroup<float>& g, size_t N) {
    Workspace w;
    linear_space<X>(w, g, N);
    return w.used;
}

// ----------------------------------------------------------------------------
// slots

// Bytes of one slot that holds the group.
template <class X>
size_t linear_one_slot(const LinearGroup<float>& g) {
    return device_rounded((size_t(g.OC) + Gpu<X>::row_room(g.R)) * linear_ld<X>(g) * sizeof(X));
}

template <class X>
size_t linear_slot_bytes(const Gpu<X>& dev, const LinearGroup<float>& g, size_t N) {
    return linear_way(dev, g, N) == LinearWay::DEQUANT ? 2 * linear_one_slot<X>(g) : 0;
}

template <class X>
void linear_slots_reserve(Gpu<X>& dev, size_t bytes) {
    GpuState& s = *dev.state;
    if (bytes > 2 * s.slot_bytes) {
        device_sync(dev);
        device_free(dev, s.slot_memory);
        s.slot_bytes = device_rounded((bytes + 1) / 2);
        s.slot_memory = static_cast<char*>(device_alloc(dev, 2 * s.slot_bytes, "dequantised weights"));
        for (GpuSlot& slot : s.slots) {
            slot.holds[0] = nullptr;
            CUDA_CHECK(cudaEventRecord(slot.released, dev.stream));
        }
    }
}

inline const void* linear_weight(const LinearGroup<float>& g, int p) {
    const Matrix& w = g.part[p].w;
    return p >= g.parts ? nullptr : w.store == Store::NF4 ? static_cast<const void*>(w.codes) : w.data;
}

inline uint32_t linear_module(const LinearGroup<float>& g, int p) {
    return p >= g.parts ? 0 : g.part[p].module;
}

template <class X>
X* linear_slot_memory(const GpuState& s, const GpuSlot& slot) {
    return reinterpret_cast<X*>(s.slot_memory + size_t(&slot - s.slots) * s.slot_bytes);
}

// The slot that holds the group's W. If none does, one is written: aside, on the second stream, or on the first.
template <class X>
GpuSlot& linear_slot(Gpu<X>& dev, const LinearGroup<float>& g, bool aside) {
    GpuState& s = *dev.state;
    const size_t ld = linear_ld<X>(g);
    GpuSlot* slot = nullptr;
    for (GpuSlot& have : s.slots) {
        bool same = have.ld == ld;
        for (int p = 0; p < 3; p++) {
            same &= have.holds[p] == linear_weight(g, p) && have.modules[p] == linear_module(g, p);
        }
        slot = same ? &have : slot;
    }
    if (slot) {
        slot->used = ++s.slot_uses;
        return *slot;
    }
    if (linear_one_slot<X>(g) > s.slot_bytes) {
        fprintf(stderr, "error: no slot for a linear group of (%d, %d) weights (%zu bytes reserved, need %zu)\n", g.OC,
                g.C, s.slot_bytes, linear_one_slot<X>(g));
        fprintf(stderr, "hint: a fault of this program: linear_slots_reserve was not called for it\n");
        exit(1);
    }
    slot = s.slots[0].used <= s.slots[1].used ? &s.slots[0] : &s.slots[1];
    const cudaStream_t stream = aside ? s.aside : dev.stream;
    if (aside) {
        CUDA_CHECK(cudaStreamWaitEvent(stream, slot->released, 0));
    } else if (slot->written_aside) {
        CUDA_CHECK(cudaStreamWaitEvent(stream, slot->ready, 0));  // prefetched, never used, and overwritten now
    }
    X* out = linear_slot_memory<X>(s, *slot);
    for (int p = 0; p < 3; p++) {
        slot->holds[p] = linear_weight(g, p);
        slot->modules[p] = linear_module(g, p);
        if (p < g.parts) {
            matrix_to_scratch(dev, stream, out, ld, g.part[p].w);
            out += size_t(g.part[p].w.rows) * ld;
        }
    }
    slot->ld = ld;
    slot->used = ++s.slot_uses;
    slot->written_aside = aside;
    if (aside) {
        CUDA_CHECK(cudaEventRecord(slot->ready, stream));
    }
    return *slot;
}

// The weights must have been written, and waited for, before.
template <class X>
void linear_prefetch(Gpu<X>& dev, const LinearGroup<float>& g, size_t N) {
    if (linear_way(dev, g, N) == LinearWay::DEQUANT) {
        linear_slot(dev, g, true);
    }
}

// ----------------------------------------------------------------------------
// what forward and backward share

// The operands of a group's products, and where they stand.
template <class X>
struct LinearCall {
    LinearWay way;
    LinearSpace<X> space;
    GpuSlot* slot;  // DEQUANT, when W is wanted
    const X* w;     // of the slot
    X* a;           // (RP, C), rows lda apart
    X* b;           // (OC, RP), rows ldb apart
    size_t ldw, lda, ldb, RP;
    float scale;
};

// want_w: the frozen weights take part, not only the adapters.
template <class X>
LinearCall<X> linear_begin(Gpu<X>& dev, const LinearGroup<float>& g, size_t N, bool want_w) {
    LinearCall<X> c = {};
    c.way = linear_way(dev, g, N);
    Workspace workspace = workspace_of(dev);
    c.space = linear_space<X>(workspace, g, N);
    c.RP = dev.row_room(g.R);
    c.a = c.space.a;
    c.b = c.space.b;
    c.lda = size_t(g.C);
    c.ldb = c.RP;
    if (c.way == LinearWay::DEQUANT && want_w) {
        GpuState& s = *dev.state;
        c.slot = &linear_slot(dev, g, false);
        if (c.slot->written_aside) {
            CUDA_CHECK(cudaStreamWaitEvent(dev.stream, c.slot->ready, 0));
            c.slot->written_aside = false;
        }
        X* w = linear_slot_memory<X>(s, *c.slot);
        c.w = w;
        c.ldw = c.lda = c.ldb = c.slot->ld;
        c.a = w + size_t(g.OC) * c.ldw;
        c.b = w + g.C;
    }
    AdapterParts parts = {};
    for (int p = 0; p < g.parts; p++) {
        const LinearPart<float>& part = g.part[p];
        parts.A[p] = part.A;
        parts.B[p] = part.B;
        parts.r[p] = part.r;
        parts.rows[p] = part.w.rows;
        assert(part.r == 0 || c.scale == 0 || part.scale == c.scale);  // one factor for the whole room
        c.scale = part.r > 0 ? part.scale : c.scale;
    }
    if (g.R > 0) {
        const unsigned threads = 256;
        const size_t elements = c.RP * (size_t(g.C) + size_t(g.OC));
        LAUNCH((linear_adapter_kernel<X>), unsigned(ceil_div(elements, threads)), threads, 0, dev.stream, c.a, c.lda,
               c.b, c.ldb, parts, unsigned(c.RP), unsigned(g.C), unsigned(g.OC));
    }
    return c;
}

template <class X>
void linear_end(Gpu<X>& dev, const LinearCall<X>& c) {
    if (c.slot) {
        CUDA_CHECK(cudaEventRecord(c.slot->released, dev.stream));
    }
}

// The rows of the group's input, *stride apart, with room behind each.
template <class X>
X* linear_x(Gpu<X>& dev, const LinearSpace<X>& s, size_t* stride, const LinearInput<X, float>& in, int C, size_t N) {
    *stride = s.ldx;
    switch (in.kind) {
        case LinearInput<X, float>::RMSNORM:
            rmsnorm_rows(dev, s.x, s.ldx, in.x, in.stride, static_cast<const int32_t*>(nullptr), in.rstd, in.norm_w, N,
                         C);
            return s.x;
        case LinearInput<X, float>::SWIGLU:
            assert(in.stride == 2 * size_t(C));
            swiglu_forward(dev, s.x, s.ldx, in.x, N, C);
            return s.x;
        default:
            // The rows are read only, the room behind them is the group's own: whoever made the buffer left it for
            // this.
            *stride = in.stride;
            return const_cast<X*>(in.x);
    }
}

// fn(part number, its first rank, first row, rows) for every part with an adapter, in chunks of rows.
template <class Fn>
void linear_chunks(const LinearGroup<float>& g, size_t N, const Fn& fn) {
    size_t rank = 0;
    for (int p = 0; p < g.parts; p++) {
        for (size_t row = 0; row < N && g.part[p].r > 0; row += DROPOUT_CHUNK) {
            fn(p, rank, row, N - row < DROPOUT_CHUNK ? N - row : DROPOUT_CHUNK);
        }
        rank += size_t(g.part[p].r);
    }
}

inline Dropout linear_drop_at(Dropout drop, size_t row) {
    drop.example += row;
    drop.position += row;
    return drop;
}

// ----------------------------------------------------------------------------
// forward

// The room behind x = s drop(x) A^T, the columns from R to RP zero.
template <class X>
void linear_room(Gpu<X>& dev, X* x, size_t ldx, const LinearCall<X>& c, const LinearGroup<float>& g, size_t N,
                 const Dropout& drop) {
    Matmul<X, X> m;
    m.ldd = ldx;
    m.b_trans = true;
    m.ldb = c.lda;
    m.K = size_t(g.C);
    m.alpha = c.scale;
    if (!(drop.p > 0)) {
        m.d = x + g.C;
        m.a = x;
        m.lda = ldx;
        m.b = c.a;
        m.M = N;
        m.N = c.RP;
        matmul(dev, m);
        return;
    }
    linear_chunks(g, N, [&](int p, size_t rank, size_t row, size_t rows) {
        const LinearPart<float>& part = g.part[p];
        dropout_rows(dev, c.space.masked, m.K, x + row * ldx, ldx, linear_drop_at(drop, row), part.module, rows, g.C,
                     false);
        const bool last = rank + size_t(part.r) == size_t(g.R);  // its columns go on to the padding, A's rows of zeros
        m.d = x + row * ldx + g.C + rank;
        m.a = c.space.masked;
        m.lda = m.K;
        m.b = c.a + rank * c.lda;
        m.M = rows;
        m.N = last ? c.RP - rank : size_t(part.r);
        matmul(dev, m);
    });
}

// out (N, OC) = [x | room] [W | B]^T + residual where W is stored as X.
template <class X>
void linear_forward_in_place(Gpu<X>& dev, X* out, size_t out_stride, const X* x, size_t ldx, const LinearCall<X>& c,
                             const LinearGroup<float>& g, size_t N, const X* residual) {
    Matmul<X, X> m;
    m.ldd = m.ldc = out_stride;
    m.lda = ldx;
    m.b_trans = true;
    m.beta = 1;
    m.M = N;
    size_t column = 0;
    for (int p = 0; p < g.parts; p++) {
        const Matrix& w = g.part[p].w;
        m.d = out + column;
        m.c = residual ? residual + column : nullptr;
        m.a = x;
        m.b = static_cast<const X*>(w.data);
        m.ldb = m.K = size_t(g.C);
        m.N = size_t(w.rows);
        matmul(dev, m);
        column += m.N;
    }
    if (g.R > 0) {
        m.d = out;
        m.c = out;
        m.a = x + g.C;
        m.b = c.b;
        m.ldb = c.ldb;
        m.K = c.RP;
        m.N = size_t(g.OC);
        matmul(dev, m);
    }
}

template <class X>
void linear_forward(Gpu<X>& dev, X* out, size_t out_stride, X* xa, const LinearInput<X, float>& in,
                    const LinearGroup<float>& g, size_t N, const X* residual, const Rope<float>* rope,
                    const Dropout& drop) {
    if (N == 0) {
        return;
    }
    const LinearCall<X> c = linear_begin(dev, g, N, true);
    size_t ldx = 0;
    X* const x = linear_x(dev, c.space, &ldx, in, g.C, N);
    if (g.R > 0) {
        linear_room(dev, x, ldx, c, g, N, drop);
        CUDA_CHECK(cudaMemcpy2DAsync(xa, size_t(g.R) * sizeof(X), x + g.C, ldx * sizeof(X), size_t(g.R) * sizeof(X), N,
                                     cudaMemcpyDeviceToDevice, dev.stream));
    }
    if (c.way == LinearWay::IN_PLACE) {
        linear_forward_in_place(dev, out, out_stride, x, ldx, c, g, N, residual);
    } else if (c.way == LinearWay::FUSED) {
        if constexpr (std::is_same<X, bf16>::value) {
            nf4_matmul_forward(dev, out, out_stride, x, ldx, N, linear_nf4_group(g), c.b, int(c.RP), residual,
                               out_stride);
        }
    } else {
        Matmul<X, X> m;
        m.d = out;
        m.ldd = m.ldc = out_stride;
        m.c = residual;
        m.beta = 1;
        m.a = x;
        m.lda = ldx;
        m.b = c.w;
        m.ldb = c.ldw;
        m.b_trans = true;
        m.M = N;
        m.N = size_t(g.OC);
        m.K = size_t(g.C) + c.RP;
        matmul(dev, m);
    }
    linear_end(dev, c);
    if (rope) {
        rope_forward(dev, out, out_stride, *rope, N);
    }
}

// ----------------------------------------------------------------------------
// backward

// din (N, C) = [dout | D] [W ; A] where W is stored as X; without D and A when K_a is 0.
template <class X>
void linear_backward_in_place(Gpu<X>& dev, X* din, const X* dout, size_t dout_stride, const LinearCall<X>& c,
                              const LinearGroup<float>& g, size_t N, size_t K_a) {
    Matmul<X, X> m;
    m.d = din;
    m.lda = dout_stride;
    m.ldd = m.ldc = m.ldb = m.N = size_t(g.C);
    m.beta = 1;
    m.M = N;
    size_t column = 0;
    for (int p = 0; p < g.parts; p++) {
        const Matrix& w = g.part[p].w;
        m.c = p > 0 ? din : nullptr;
        m.a = dout + column;
        m.b = static_cast<const X*>(w.data);
        m.K = size_t(w.rows);
        matmul(dev, m);
        column += m.K;
    }
    if (K_a > 0) {
        m.c = din;
        m.a = dout + g.OC;
        m.b = c.a;
        m.ldb = c.lda;
        m.K = K_a;
        matmul(dev, m);
    }
}

// din (N, C) = the gradient of x. The products with A stand under the mask of dropout, and are then made apart.
template <class X>
void linear_din(Gpu<X>& dev, X* din, const X* dout, size_t dout_stride, const LinearCall<X>& c,
                const LinearGroup<float>& g, size_t N, const Dropout& drop) {
    const size_t C = size_t(g.C), folded = drop.p > 0 ? 0 : c.RP;
    if (c.way == LinearWay::IN_PLACE) {
        linear_backward_in_place(dev, din, dout, dout_stride, c, g, N, folded);
    } else if (c.way == LinearWay::FUSED) {
        if constexpr (std::is_same<X, bf16>::value) {
            nf4_matmul_backward(dev, din, C, dout, dout_stride, N, linear_nf4_group(g), c.a, int(folded));
        }
    } else {
        Matmul<X, X> m;
        m.d = din;
        m.ldd = C;
        m.a = dout;
        m.lda = dout_stride;
        m.b = c.w;
        m.ldb = c.ldw;
        m.M = N;
        m.N = C;
        m.K = size_t(g.OC) + folded;
        matmul(dev, m);
    }
    if (drop.p > 0) {
        linear_chunks(g, N, [&](int p, size_t rank, size_t row, size_t rows) {
            const LinearPart<float>& part = g.part[p];
            Matmul<X, X> m;
            m.d = c.space.masked;
            m.a = dout + row * dout_stride + g.OC + rank;
            m.lda = dout_stride;
            m.b = c.a + rank * c.lda;
            m.ldb = c.lda;
            m.M = rows;
            m.ldd = m.N = C;
            m.K = size_t(part.r);
            matmul(dev, m);
            dropout_rows(dev, din + row * C, C, c.space.masked, C, linear_drop_at(drop, row), part.module, rows, g.C,
                         true);
        });
    }
}

// dA_p (r, C) += D_p^T drop(x), dB_p (OC_p, r) += dout_p^T (s xa)_p, straight into the fp32 gradients.
template <class X>
void linear_adapter_gradients(Gpu<X>& dev, const X* dout, size_t dout_stride, const LinearInput<X, float>& in,
                              const LinearCall<X>& c, const LinearGroup<float>& g, const X* xa, size_t N,
                              const Dropout& drop) {
    size_t ldx = 0, column = 0, rank = 0;
    const X* const x = linear_x(dev, c.space, &ldx, in, g.C, N);
    Matmul<X, float> m;
    m.a_trans = true;
    m.lda = dout_stride;
    m.beta = 1;
    const auto add_dA = [&](const LinearPart<float>& part, const X* D, const X* input, size_t ld, size_t rows) {
        m.d = part.dA;
        m.c = part.dA;
        m.a = D;
        m.b = input;
        m.ldb = ld;
        m.M = size_t(part.r);
        m.ldd = m.ldc = m.N = size_t(g.C);
        m.K = rows;
        matmul(dev, m);
    };
    for (int p = 0; p < g.parts; p++) {
        const LinearPart<float>& part = g.part[p];
        if (part.r > 0) {
            if (!(drop.p > 0)) {
                add_dA(part, dout + g.OC + rank, x, ldx, N);
            }
            m.d = part.dB;
            m.c = part.dB;
            m.a = dout + column;
            m.b = xa + rank;
            m.ldb = size_t(g.R);
            m.M = size_t(part.w.rows);
            m.ldd = m.ldc = m.N = size_t(part.r);
            m.K = N;
            matmul(dev, m);
        }
        column += size_t(part.w.rows);
        rank += size_t(part.r);
    }
    if (drop.p > 0) {
        linear_chunks(g, N, [&](int p, size_t at, size_t row, size_t rows) {
            dropout_rows(dev, c.space.masked, size_t(g.C), x + row * ldx, ldx, linear_drop_at(drop, row),
                         g.part[p].module, rows, g.C, false);
            add_dA(g.part[p], dout + row * dout_stride + g.OC + at, c.space.masked, size_t(g.C), rows);
        });
    }
}

template <class X>
void linear_backward(Gpu<X>& dev, X* din, X* dout, size_t dout_stride, const LinearInput<X, float>& in,
                     const LinearGroup<float>& g, const X* xa, size_t N, const Rope<float>* rope, const Dropout& drop) {
    if (N == 0) {
        return;
    }
    if (rope) {
        rope_backward(dev, dout, dout_stride, *rope, N);
    }
    const LinearCall<X> c = linear_begin(dev, g, N, din != nullptr);
    if (g.R > 0) {
        Matmul<X, X> m;
        m.d = dout + g.OC;
        m.ldd = m.lda = dout_stride;
        m.a = dout;
        m.b = c.b;
        m.ldb = c.ldb;
        m.M = N;
        m.N = c.RP;
        m.K = size_t(g.OC);
        m.alpha = c.scale;
        matmul(dev, m);
    }
    if (din) {
        linear_din(dev, din, dout, dout_stride, c, g, N, drop);
    }
    linear_end(dev, c);
    if (g.R > 0) {
        linear_adapter_gradients(dev, dout, dout_stride, in, c, g, xa, N, drop);
    }
}
