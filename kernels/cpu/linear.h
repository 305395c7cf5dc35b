// Linear groups: frozen linears that share an input, each with a LoRA adapter (Hu et al. 2021), forward and backward.
//
//   forward    y_p = x W_p^T + s_p xa_p B_p^T,        xa_p = drop(x) A_p^T
//   backward   t_p = s_p dy_p B_p
//              dx  = sum_p dy_p W_p + mask_p (t_p A_p)
//              dA_p += t_p^T drop(x),   dB_p += s_p dy_p^T xa_p
//
// The adapter's product is folded into the frozen one as more reduction indices, so y and dx are written once. Under
// dropout the mask stands between t_p A_p and dx; that part is then made apart, in chunks of rows.
// x is made while it is packed (LinearInput). How the products are done is gemm.h's business.
#pragma once
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/gemm.h"

constexpr size_t DROPOUT_ROWS = 192;  // rows of a chunk
constexpr size_t DROPOUT_LINE = 256;  // elements that are added at a time

// ---- workspace ----

template <class Real>
struct LinearForwardSpace {
    char* scratch;
    Strips<Real> x;       // the input
    Strips<Real> xa[3];   // s_p xa_p
    Strips<Real> masked;  // drop(x) of one chunk
};

template <class X>
LinearForwardSpace<typename Cpu<X>::real> linear_forward_space(const Cpu<X>& dev, Arena& arena,
                                                               const LinearGroup<typename Cpu<X>::real>& g, size_t N,
                                                               bool dropout) {
    using Real = typename Cpu<X>::real;
    LinearForwardSpace<Real> s = {};
    s.scratch = thread_scratch(dev, arena);
    s.x = strips_take(arena, base_format(dev), N, size_t(g.C));
    for (int p = 0; p < g.parts; p++) {
        s.xa[p] = strips_take(arena, adapter_format(dev), N, size_t(g.part[p].r));
    }
    if (dropout && g.R > 0) {
        s.masked = strips_take(arena, base_format(dev), DROPOUT_ROWS, size_t(g.C));
    }
    return s;
}

template <class Real>
struct LinearBackwardSpace {
    char* scratch;
    Strips<Real> dy[3];  // dout
    Real* t;             // (N, R) dout B, not scaled
    Strips<Real> ta[3];  // s_p t_p
    Strips<Real> left;   // t^T or xa^T
    Real* right;         // (R, C) or (r, OC): a sum before it is scaled and added
    Real* masked_dx;     // (DROPOUT_ROWS, C)
};

template <class X>
LinearBackwardSpace<typename Cpu<X>::real> linear_backward_space(const Cpu<X>& dev, Arena& arena,
                                                                 const LinearGroup<typename Cpu<X>::real>& g, size_t N,
                                                                 bool dropout) {
    using Real = typename Cpu<X>::real;
    LinearBackwardSpace<Real> s = {};
    s.scratch = thread_scratch(dev, arena);
    size_t widest = size_t(g.R) * size_t(g.C);
    for (int p = 0; p < g.parts; p++) {
        const LinearPart<Real>& part = g.part[p];
        s.dy[p] = strips_take(arena, base_format(dev), N, size_t(part.w.rows));
        s.ta[p] = strips_take(arena, adapter_format(dev), N, size_t(part.r));
        size_t size = size_t(part.r) * size_t(part.w.rows);
        widest = size > widest ? size : widest;
    }
    s.t = arena_take<Real>(arena, N * size_t(g.R));
    s.left = strips_take(arena, adapter_format(dev), size_t(g.R), N);
    s.right = arena_take<Real>(arena, widest);
    if (dropout && g.R > 0) {
        s.masked_dx = arena_take<Real>(arena, DROPOUT_ROWS * size_t(g.C));
    }
    return s;
}

template <class X>
size_t linear_workspace(const Cpu<X>& dev, const LinearGroup<typename Cpu<X>::real>& g, size_t N) {
    Arena forward, backward;
    linear_forward_space(dev, forward, g, N, true);
    linear_backward_space(dev, backward, g, N, true);
    return forward.used > backward.used ? forward.used : backward.used;
}

// Weights are unpacked where they are used: nothing to do ahead, and nothing kept.
template <class X>
void linear_prefetch(Cpu<X>&, const LinearGroup<typename Cpu<X>::real>&, size_t) {}
template <class X>
size_t linear_slot_bytes(const Cpu<X>&, const LinearGroup<typename Cpu<X>::real>&, size_t) {
    return 0;
}
template <class X>
void linear_slots_reserve(Cpu<X>&, size_t) {}

// ---- forward ----

// xa_p (M rows from row0) = drop(x) A_p^T, x or drop(x) packed.
template <class X, class Real>
void linear_xa(Cpu<X>& dev, X* xa, const LinearGroup<Real>& g, int first, int last, const Strips<Real>& packed,
               size_t M, char* scratch) {
    Product<X, X> product[3];
    int count = 0;
    for (int p = 0, column = 0; p < last; column += g.part[p++].r) {
        const LinearPart<Real>& part = g.part[p];
        if (p >= first && part.r > 0) {
            Product<X, X>& out = product[count++];
            out.c = xa + column;
            out.ldc = size_t(g.R);
            out.n = size_t(part.r);
            product_add(out, packed, size_t(g.C), operand_plain<X>(part.A, size_t(g.C)), false);
        }
    }
    gemm(dev, product, count, M, scratch);
}

// out (N, OC), rows out_stride apart, = x W^T + scale xa B^T [+ residual (N, OC), the same stride, may be out itself];
// then RoPE on the leading heads. xa (N, R) = drop(x) A^T, kept for backward.
template <class X>
void linear_forward(Cpu<X>& dev, X* out, size_t out_stride, X* xa, const LinearInput<X, typename Cpu<X>::real>& in,
                    const LinearGroup<typename Cpu<X>::real>& g, size_t N, const X* residual,
                    const Rope<typename Cpu<X>::real>* rope, const Dropout& drop) {
    using Real = typename Cpu<X>::real;
    Arena arena = arena_of(dev);
    LinearForwardSpace<Real> s = linear_forward_space(dev, arena, g, N, drop.p > 0);
    const Operand<X> x = operand_input<X>(in, g.C);
    pack_a(dev, s.x, x, false, N, size_t(g.C), s.scratch);

    if (drop.p > 0) {
        for (int p = 0; p < g.parts; p++) {
            for (size_t row = 0; row < N && g.part[p].r > 0; row += DROPOUT_ROWS) {
                size_t M = N - row < DROPOUT_ROWS ? N - row : DROPOUT_ROWS;
                Operand<X> masked = x;
                masked.drop = &drop;
                masked.module = g.part[p].module;
                masked.row0 = row;
                pack_a(dev, s.masked, masked, false, M, size_t(g.C), s.scratch);
                linear_xa(dev, xa + row * size_t(g.R), g, p, p + 1, s.masked, M, s.scratch);
            }
        }
    } else {
        linear_xa(dev, xa, g, 0, g.parts, s.x, N, s.scratch);
    }

    Product<X, X> product[3];
    size_t column = 0, rank = 0, heads = rope ? size_t(rope->heads) : 0;
    const bool rotate = rope && rope_step(rope->HS) <= BLOCK_COLUMNS;  // in the product's blocks
    for (int p = 0; p < g.parts; p++) {
        const LinearPart<Real>& part = g.part[p];
        const size_t r = size_t(part.r);
        if (rotate) {
            const size_t here = size_t(part.w.rows / rope->HS);
            product[p].rope = rope;
            product[p].rope_heads = here < heads ? here : heads;
            heads -= product[p].rope_heads;
        }
        product[p].c = out + column;
        product[p].ldc = out_stride;
        product[p].n = size_t(part.w.rows);
        product[p].residual = residual ? residual + column : nullptr;
        product_add(product[p], s.x, size_t(g.C), operand_weight<X>(part.w), false);
        if (r > 0) {
            pack_a(dev, s.xa[p], operand_stored<X>(xa + rank, size_t(g.R), part.scale), false, N, r, s.scratch);
            product_add(product[p], s.xa[p], r, operand_plain<X>(part.B, r), false);
        }
        column += size_t(part.w.rows);
        rank += r;
    }
    gemm(dev, product, g.parts, N, s.scratch);
    if (rope && !rotate) {
        rope_forward(dev, out, out_stride, *rope, N);
    }
}

// ---- backward ----

// din (N, C) += mask_p (t_p A_p) of every part, chunk by chunk.
template <class X, class Real>
void linear_masked_dx(Cpu<X>& dev, X* din, const LinearGroup<Real>& g, const LinearBackwardSpace<Real>& s, size_t N,
                      const Dropout& drop) {
    const size_t C = size_t(g.C);
    for (int p = 0, column = 0; p < g.parts; column += g.part[p++].r) {
        const LinearPart<Real>& part = g.part[p];
        for (size_t row = 0; row < N && part.r > 0; row += DROPOUT_ROWS) {
            size_t M = N - row < DROPOUT_ROWS ? N - row : DROPOUT_ROWS;
            Operand<X> t = operand_plain<X>(s.t + column, size_t(g.R), part.scale);
            t.row0 = row;
            pack_a(dev, s.ta[p], t, false, M, size_t(part.r), s.scratch);
            Product<X, Real> product;
            product.c = s.masked_dx;
            product.ldc = product.n = C;
            product_add(product, s.ta[p], size_t(part.r), operand_plain<X>(part.A, C), true);
            gemm(dev, &product, 1, M, s.scratch);
            parallel_ranges(dev.threads, M, PACK_LEAST / C + 1, [&](size_t begin, size_t end, int) {
                for (size_t i = begin; i < end; i++) {
                    Real* from = s.masked_dx + i * C;
                    dropout_run(dev, from, drop, part.module, row + i, 0, C);
                    Real line[DROPOUT_LINE];
                    for (size_t c = 0; c < C; c += DROPOUT_LINE) {
                        const size_t n = C - c < DROPOUT_LINE ? C - c : DROPOUT_LINE;
                        X* to = din + (row + i) * C + c;
                        row_convert(dev, line, to, n);
                        for (size_t j = 0; j < n; j++) {
                            line[j] += from[c + j];
                        }
                        row_convert(dev, to, line, n);
                    }
                }
            });
        }
    }
}

// dA_p += s_p t_p^T drop(x). Without dropout all parts share one pass over x.
template <class X, class Real>
void linear_dA(Cpu<X>& dev, const LinearGroup<Real>& g, const LinearInput<X, Real>& in,
               const LinearBackwardSpace<Real>& s, size_t N, const Dropout& drop) {
    const size_t C = size_t(g.C);
    for (int p = 0, column = 0; p < g.parts; column += g.part[p++].r) {
        const LinearPart<Real>& part = g.part[p];
        if (part.r == 0) {
            continue;
        }
        Real* sum = s.right;
        if (drop.p > 0 || column == 0) {
            size_t M = size_t(drop.p > 0 ? part.r : g.R);
            pack_a(dev, s.left, operand_plain<X>(s.t + column, size_t(g.R)), true, M, N, s.scratch);
            Operand<X> x = operand_input<X>(in, g.C);
            x.drop = drop.p > 0 ? &drop : nullptr;
            x.module = part.module;
            Product<X, Real> product;
            product.c = s.right;
            product.ldc = product.n = C;
            product_add(product, s.left, N, x, true);
            gemm(dev, &product, 1, M, s.scratch);
        } else {
            sum += size_t(column) * C;
        }
        parallel_ranges(dev.threads, size_t(part.r) * C, PACK_LEAST, [&](size_t begin, size_t end, int) {
            for (size_t i = begin; i < end; i++) {
                part.dA[i] += part.scale * sum[i];
            }
        });
    }
}

// dB_p += s_p dy_p^T xa_p, made as its transpose: the reduction runs over rows, and the long side is then the columns.
template <class X, class Real>
void linear_dB(Cpu<X>& dev, const LinearGroup<Real>& g, const X* dout, size_t dout_stride, const X* xa,
               const LinearBackwardSpace<Real>& s, size_t N) {
    for (int p = 0, rank = 0; p < g.parts; rank += g.part[p++].r) {
        const LinearPart<Real>& part = g.part[p];
        const size_t r = size_t(part.r), OC = size_t(part.w.rows);
        if (r > 0) {
            pack_a(dev, s.left, operand_stored<X>(xa + rank, size_t(g.R)), true, r, N, s.scratch);
            Product<X, Real> product;
            product.c = s.right;
            product.ldc = product.n = OC;
            product_add(product, s.left, N, operand_stored<X>(dout, dout_stride), true);
            gemm(dev, &product, 1, r, s.scratch);
            parallel_ranges(dev.threads, OC, PACK_LEAST / r + 1, [&](size_t begin, size_t end, int) {
                for (size_t o = begin; o < end; o++) {
                    for (size_t i = 0; i < r; i++) {
                        part.dB[o * r + i] += part.scale * s.right[i * OC + o];
                    }
                }
            });
        }
        dout += OC;
    }
}

// din (N, C) = gradient of x, the input after norm or SwiGLU; nullptr: not wanted. dout (N, OC), rows dout_stride
// apart, is rotated back in place first. dA, dB +=.
template <class X>
void linear_backward(Cpu<X>& dev, X* din, X* dout, size_t dout_stride, const LinearInput<X, typename Cpu<X>::real>& in,
                     const LinearGroup<typename Cpu<X>::real>& g, const X* xa, size_t N,
                     const Rope<typename Cpu<X>::real>* rope, const Dropout& drop) {
    using Real = typename Cpu<X>::real;
    Arena arena = arena_of(dev);
    LinearBackwardSpace<Real> s = linear_backward_space(dev, arena, g, N, drop.p > 0);
    if (rope) {
        rope_backward(dev, dout, dout_stride, *rope, N);
    }

    Product<X, Real> product[3];
    Product<X, X> dx;
    int count = 0;
    dx.c = din;
    dx.ldc = dx.n = size_t(g.C);
    size_t column = 0, rank = 0;
    for (int p = 0; p < g.parts; p++) {
        const LinearPart<Real>& part = g.part[p];
        const size_t OC = size_t(part.w.rows), r = size_t(part.r);
        if (din || r > 0) {
            pack_a(dev, s.dy[p], operand_stored<X>(dout + column, dout_stride), false, N, OC, s.scratch);
            product_add(dx, s.dy[p], OC, operand_weight<X>(part.w), true);
        }
        if (r > 0) {
            Product<X, Real>& t = product[count++];
            t.c = s.t + rank;
            t.ldc = size_t(g.R);
            t.n = r;
            product_add(t, s.dy[p], OC, operand_plain<X>(part.B, r), true);
        }
        column += OC;
        rank += r;
    }
    gemm(dev, product, count, N, s.scratch);

    if (din) {
        rank = 0;
        for (int p = 0; p < g.parts; p++) {
            const LinearPart<Real>& part = g.part[p];
            const size_t r = size_t(part.r);
            if (r > 0 && !(drop.p > 0)) {
                pack_a(dev, s.ta[p], operand_plain<X>(s.t + rank, size_t(g.R), part.scale), false, N, r, s.scratch);
                product_add(dx, s.ta[p], r, operand_plain<X>(part.A, size_t(g.C)), true);
            }
            rank += r;
        }
        gemm(dev, &dx, 1, N, s.scratch);
        if (drop.p > 0) {
            linear_masked_dx(dev, din, g, s, N, drop);
        }
    }
    linear_dA(dev, g, in, s, N, drop);
    linear_dB(dev, g, dout, dout_stride, xa, s, N);
}
