// Causal self-attention with grouped queries over packed documents, in the flash form: scores exist a block at a time,
// forward keeps the log-sum-exp of each row, backward makes the probabilities again from it (Dao: FlashAttention-2,
// 2023).
//
//   S = Q K^T / sqrt(HS), P = softmax(S) over the keys 0 .. i of the row's own document, O = P V
//   dV = P^T dO,  dS = P (dO V^T - D),  D = rowsum(dO O),  dQ = dS K / sqrt(HS),  dK = dS^T Q / sqrt(HS)
//
// Scores are held transposed, keys down and queries across: the softmax then runs down the columns with a vector of
// queries at a time, and the block of P^T is, as it stands, the right panel of O^T = V^T P^T and of dQ^T = K^T dS^T.
// dV and dK need P and dS the other way round; they are turned over a tile at a time.
//
// Blocks count from the start of the document, and every sum runs over them in ascending order, so the bits of a
// document depend neither on its neighbours, nor on the number of threads, nor on how its blocks are shared out.
#pragma once
#include <cmath>
#include <limits>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/rows.h"

struct AttentionShape {
    int NH, NKV, HS;
    int MR, NR;     // register tile
    size_t keys;    // forward: keys a block
    size_t block;   // backward: queries and keys a block; a multiple of NR
    size_t stride;      // of a row of qkv
    size_t out_stride;  // of a row of out
};

template <class X>
AttentionShape attention_shape(const Cpu<X>& dev, int NH, int NKV, int HS) {
    const int MR = tile_rows(dev), NR = tile_columns(dev);
    return {NH, NKV, HS, MR, NR, size_t(16 * MR), size_t((64 + NR - 1) / NR * NR), size_t(NH + 2 * NKV) * size_t(HS),
            size_t(NH) * size_t(HS)};
}

inline size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

// ----------------------------------------------------------------------------
// who does what

// The part of a document and kv head that one task does: query blocks i0 .. i1, key blocks j0 .. j1 (backward), and
// which gradients come out of it.
struct AttentionTask {
    size_t first, length;  // the document
    int kv;
    size_t i0, i1, j0, j1;
    bool dq, dkv;
};

// Tasks are whole documents where that keeps the threads about as busy as pieces would; `cost` is what pieces add to
// the work. A long document is cut into pieces of 256 queries, or of 256 keys.
struct AttentionPlan {
    bool whole;
    size_t piece;  // blocks
    size_t tasks;
};

inline AttentionPlan attention_plan(int threads, const int32_t* cu_seqlens, int documents, int NKV, size_t block,
                                    bool backward) {
    const double cost = backward ? 1.4 : 1.1;  // 7 products for 5; packing K and V again
    double total = 0, longest = 0;
    AttentionPlan plan = {true, (256 + block - 1) / block, 0};
    size_t pieces = 0;
    for (int d = 0; d < documents; d++) {
        size_t length = size_t(cu_seqlens[d + 1] - cu_seqlens[d]);
        double work = double(length) * double(length);
        total += work * NKV;
        longest = work > longest ? work : longest;
        pieces += round_up(length, plan.piece * block) / (plan.piece * block);
    }
    const size_t heads = size_t(documents) * size_t(NKV);
    const double share = total / threads;
    const double even = double(round_up(heads, size_t(threads)) / size_t(threads)) * longest;
    const double uneven = share + longest * (threads - 1) / threads;
    plan.whole = threads == 1 || (even < uneven ? even : uneven) <= cost * share;
    plan.tasks = plan.whole ? heads : pieces * size_t(NKV) * (backward ? 2 : 1);
    return plan;
}

// Task number `index` of the plan; the later pieces of a document, which have more keys, come first.
inline AttentionTask attention_task(const AttentionPlan& plan, size_t index, const int32_t* cu_seqlens, int NKV,
                                    size_t block, bool backward) {
    for (int d = 0;; d++) {
        size_t first = size_t(cu_seqlens[d]), length = size_t(cu_seqlens[d + 1]) - first;
        size_t blocks = round_up(length, block) / block;
        size_t pieces = plan.whole ? 1 : round_up(blocks, plan.piece) / plan.piece;
        size_t kinds = backward && !plan.whole ? 2 : 1;
        size_t here = pieces * kinds * size_t(NKV);
        if (index >= here) {
            index -= here;
            continue;
        }
        AttentionTask t = {first, length, int(index % size_t(NKV)), 0, blocks, 0, blocks, backward, backward};
        if (!plan.whole) {
            size_t piece = pieces - 1 - index / size_t(NKV) % pieces;
            size_t begin = piece * plan.piece, end = begin + plan.piece < blocks ? begin + plan.piece : blocks;
            t.dkv = backward && index / (pieces * size_t(NKV)) == 0;
            t.dq = backward && !t.dkv;
            (t.dkv ? t.j0 : t.i0) = begin;
            (t.dkv ? t.j1 : t.i1) = end;
        }
        return t;
    }
}

// ----------------------------------------------------------------------------
// panels

// out [tile of MR lines][HS][MR]: left panels that sum over the head.
template <class X>
void attention_pack_lines(const Cpu<X>& dev, const AttentionShape& s, X* out, const X* in, size_t stride,
                          size_t lines) {
    for (size_t line = 0; line < lines; line += size_t(s.MR)) {
        int n = lines - line < size_t(s.MR) ? int(lines - line) : s.MR;
        transpose_lines(dev, out + line * size_t(s.HS), size_t(s.MR), s.MR, in + line * stride, stride, n,
                        size_t(s.HS));
    }
}

// out [tile of MR channels][lines][MR] = in * factor: left panels that sum over the lines.
template <class X>
void attention_pack_channels(const AttentionShape& s, X* out, const X* in, size_t stride, size_t lines, X factor) {
    const size_t MR = size_t(s.MR), HS = size_t(s.HS);
    for (size_t c = 0; c < HS; c += MR) {
        const size_t n = HS - c < MR ? HS - c : MR;
        for (size_t line = 0; line < lines; line++, out += MR) {
            const X* from = in + line * stride + c;
            for (size_t i = 0; i < n; i++) {
                out[i] = from[i] * factor;
            }
            for (size_t i = n; i < MR; i++) {
                out[i] = 0;
            }
        }
    }
}

// out [HS][NR] = in * factor, up to NR lines: a right panel that sums over the head.
template <class X>
void attention_pack_queries(const Cpu<X>& dev, const AttentionShape& s, X* out, const X* in, size_t stride,
                            size_t lines, X factor) {
    transpose_lines(dev, out, size_t(s.NR), s.NR, in, stride, int(lines), size_t(s.HS));
    for (size_t i = 0; i < size_t(s.HS) * size_t(s.NR); i++) {
        out[i] *= factor;
    }
}

// c [lines][NR] = or += left panels [tile][k][MR] times a right panel; `step`: elements from left tile to left tile.
template <class X>
void attention_product(const Cpu<X>& dev, const AttentionShape& s, X* c, const X* a, size_t step, const X* b, size_t k,
                       size_t lines, int columns, bool add) {
    const size_t MR = size_t(s.MR), NR = size_t(s.NR);
    for (size_t line = 0; line < lines; line += MR, a += step) {
        int n = lines - line < MR ? int(lines - line) : s.MR;
        gemm_tile(dev, k, a, b, c + line * NR, NR, n, columns, add);
    }
}

// No key after the query: scores of rows key0 .. key0 + keys, columns query0 .. query0 + NR.
template <class X>
void attention_mask(const AttentionShape& s, X* scores, size_t key0, size_t keys, size_t query0) {
    const size_t NR = size_t(s.NR);
    for (size_t k = key0 > query0 ? 0 : query0 - key0; k < keys; k++) {
        for (size_t c = 0; c < NR && query0 + c < key0 + k; c++) {
            scores[k * NR + c] = -std::numeric_limits<X>::infinity();
        }
    }
}

// ----------------------------------------------------------------------------
// forward

template <class X>
struct AttentionForwardSpace {
    X *K, *V;               // left panels of the document: [key tile][HS][MR], [channel tile][key][MR]
    X *Q, *S, *O;           // [HS][NR], [key][NR], [HS][NR]
    X *max, *sum, *shrink;  // [NR]
};

template <class X>
AttentionForwardSpace<X> attention_forward_space(Arena& arena, const AttentionShape& s, size_t longest) {
    const size_t HS = size_t(s.HS), NR = size_t(s.NR), MR = size_t(s.MR);
    AttentionForwardSpace<X> w;
    w.K = arena_take<X>(arena, round_up(longest, MR) * HS);
    w.V = arena_take<X>(arena, longest * round_up(HS, MR));
    w.Q = arena_take<X>(arena, HS * NR);
    w.S = arena_take<X>(arena, s.keys * NR);
    w.O = arena_take<X>(arena, HS * NR);
    w.max = arena_take<X>(arena, NR);
    w.sum = arena_take<X>(arena, NR);
    w.shrink = arena_take<X>(arena, NR);
    return w;
}

// Up to NR queries of one head: those from query0 of the document, whose keys are packed.
template <class X>
void attention_forward_panel(const Cpu<X>& dev, const AttentionShape& s, const AttentionForwardSpace<X>& w, X* out,
                             X* lse, const X* q, size_t query0, size_t queries, size_t packed) {
    const size_t HS = size_t(s.HS), NR = size_t(s.NR), MR = size_t(s.MR), seen = query0 + queries;
    attention_pack_queries(dev, s, w.Q, q, s.stride, queries, X(1 / std::sqrt(double(s.HS))));
    for (size_t c = 0; c < NR; c++) {
        w.max[c] = -std::numeric_limits<X>::infinity();
        w.sum[c] = 0;
    }
    for (size_t key = 0; key < seen; key += s.keys) {
        const size_t n = seen - key < s.keys ? seen - key : s.keys;
        attention_product(dev, s, w.S, w.K + key * HS, MR * HS, w.Q, HS, n, s.NR, false);
        attention_mask(s, w.S, key, n, query0);
        row_kernels(dev).softmax_columns(w.S, n, NR, w.max, w.sum, w.shrink);
        if (key > 0) {
            row_kernels(dev).scale_columns(w.O, HS, NR, w.shrink);
        }
        attention_product(dev, s, w.O, w.V + key * MR, packed * MR, w.S, n, HS, s.NR, key > 0);
    }
    for (size_t c = 0; c < NR; c++) {
        w.shrink[c] = 1 / w.sum[c];
    }
    for (size_t c = 0; c < queries; c++) {
        lse[c] = w.max[c] + std::log(w.sum[c]);
    }
    row_kernels(dev).scale_columns(w.O, HS, NR, w.shrink);
    transpose_lines(dev, out, s.out_stride, s.HS, w.O, NR, s.HS, queries);
}

// out (N, NH*HS), rows out_stride apart, lse (NH, N) = of qkv (N, QKV): q | k | v heads side by side. Query head h uses
// kv head h / (NH / NKV). No document is empty.
template <class X>
void attention_forward(Cpu<X>& dev, X* out, size_t out_stride, typename Cpu<X>::real* lse, const X* qkv,
                       const Documents& docs, size_t N, int NH, int NKV, int HS) {
    AttentionShape s = attention_shape(dev, NH, NKV, HS);
    s.out_stride = out_stride;
    const int32_t* cu_seqlens = docs.cu_seqlens;
    const int documents = docs.count;
    const size_t NR = size_t(s.NR), group = size_t(NH / NKV), width = size_t(HS);
    const AttentionPlan plan = attention_plan(dev.threads, cu_seqlens, documents, NKV, NR, false);
    size_t longest = 0;
    for (int d = 0; d < documents; d++) {
        size_t length = size_t(cu_seqlens[d + 1] - cu_seqlens[d]);
        longest = length > longest ? length : longest;
    }
    Arena arena = arena_of(dev), one;
    attention_forward_space<X>(one, s, longest);
    char* space = arena_take<char>(arena, one.used * size_t(dev.threads));
    parallel_tasks(dev.threads, plan.tasks, [&](size_t index, int worker) {
        const AttentionTask t = attention_task(plan, index, cu_seqlens, NKV, NR, false);
        Arena mine = {space + one.used * size_t(worker), 0, one.used};
        const AttentionForwardSpace<X> w = attention_forward_space<X>(mine, s, longest);
        const size_t keys = t.i1 * NR < t.length ? t.i1 * NR : t.length;
        const X* rows = qkv + t.first * s.stride;
        attention_pack_lines(dev, s, w.K, rows + size_t(NH + t.kv) * width, s.stride, keys);
        attention_pack_channels(s, w.V, rows + size_t(NH + NKV + t.kv) * width, s.stride, keys, X(1));
        for (size_t h = size_t(t.kv) * group; h < size_t(t.kv + 1) * group; h++) {
            for (size_t q = t.i0 * NR; q < keys; q += NR) {
                const size_t row = t.first + q, n = keys - q < NR ? keys - q : NR;
                attention_forward_panel(dev, s, w, out + row * out_stride + h * width, lse + h * N + row,
                                        qkv + row * s.stride + h * width, q, n, keys);
            }
        }
    });
}

// ----------------------------------------------------------------------------
// backward

template <class X>
struct AttentionBackwardSpace {
    // of the document, a block of keys after the other
    X *K, *V;       // left panels [key tile][HS][MR]
    X* K_channels;  // left panels [channel tile][key][MR]
    X *dK, *dV;     // sums, transposed: [panel of NR keys][HS][NR]
    // of a block of queries
    X *Q, *dO;                     // right panels [panel of NR queries][HS][NR], Q scaled
    X *Q_channels, *dO_channels;   // left panels [channel tile][query][MR], Q scaled
    X* dQ;                         // sum, transposed: [panel of NR queries][HS][NR]
    X *S, *dS;                     // [panel of NR queries][key][NR]
    X* turned;                     // [query][NR keys]
    X *lse, *D;                    // [query]
    size_t lines, channels, sums;  // elements a block of K, of K_channels, of dK
};

template <class X>
AttentionBackwardSpace<X> attention_backward_space(Arena& arena, const AttentionShape& s, size_t longest) {
    const size_t HS = size_t(s.HS), MR = size_t(s.MR), blocks = round_up(longest, s.block) / s.block;
    AttentionBackwardSpace<X> w;
    w.lines = round_up(s.block, MR) * HS;
    w.channels = s.block * round_up(HS, MR);
    w.sums = s.block * HS;
    w.K = arena_take<X>(arena, blocks * w.lines);
    w.V = arena_take<X>(arena, blocks * w.lines);
    w.K_channels = arena_take<X>(arena, blocks * w.channels);
    w.dK = arena_take<X>(arena, blocks * w.sums);
    w.dV = arena_take<X>(arena, blocks * w.sums);
    w.Q = arena_take<X>(arena, w.sums);
    w.dO = arena_take<X>(arena, w.sums);
    w.Q_channels = arena_take<X>(arena, w.channels);
    w.dO_channels = arena_take<X>(arena, w.channels);
    w.dQ = arena_take<X>(arena, w.sums);
    w.S = arena_take<X>(arena, s.block * s.block);
    w.dS = arena_take<X>(arena, s.block * s.block);
    w.turned = arena_take<X>(arena, s.block * size_t(s.NR));
    w.lse = arena_take<X>(arena, s.block);
    w.D = arena_take<X>(arena, s.block);
    return w;
}

// P and dS of `queries` queries and `keys` keys; diagonal: they are the same positions. What lies above the diagonal of
// S and dS is not written.
template <class X>
void attention_backward_scores(const Cpu<X>& dev, const AttentionShape& s, const AttentionBackwardSpace<X>& w,
                               const X* K, const X* V, size_t queries, size_t keys, bool diagonal) {
    const size_t HS = size_t(s.HS), NR = size_t(s.NR), MR = size_t(s.MR);
    for (size_t q = 0; q < queries; q += NR) {
        const size_t seen = diagonal && q + NR < keys ? q + NR : keys;
        X *S = w.S + q * s.block, *dS = w.dS + q * s.block;
        attention_product(dev, s, S, K, MR * HS, w.Q + q * HS, HS, seen, s.NR, false);
        attention_product(dev, s, dS, V, MR * HS, w.dO + q * HS, HS, seen, s.NR, false);
        if (diagonal) {
            attention_mask(s, S, 0, seen, q);
        }
        row_kernels(dev).grad_columns(S, dS, seen, NR, w.lse + q, w.D + q);
    }
}

// sum [panel of NR keys][HS][NR] = or += of left panels [channel tile][query][MR] and scores [panel][key][NR].
template <class X>
void attention_backward_keys(const Cpu<X>& dev, const AttentionShape& s, const AttentionBackwardSpace<X>& w, X* sum,
                             const X* left, const X* scores, size_t queries, size_t keys, bool diagonal, bool add) {
    const size_t HS = size_t(s.HS), NR = size_t(s.NR), MR = size_t(s.MR);
    for (size_t key = 0; key < keys; key += NR) {
        const size_t first = diagonal ? key : 0;  // the first query that sees any of these keys
        const int n = keys - key < NR ? int(keys - key) : s.NR;
        for (size_t q = first; q < queries; q += NR) {
            const size_t lines = queries - q < NR ? queries - q : NR;
            transpose_lines(dev, w.turned + q * NR, NR, s.NR, scores + q * s.block + key * NR, NR, n, lines);
        }
        attention_product(dev, s, sum + key * HS, left + first * MR, queries * MR, w.turned + first * NR,
                          queries - first, HS, n, add);
    }
}

// out: `lines` rows of one head, stride elements apart = factor * sum [panel][HS][NR].
template <class X>
void attention_backward_store(const Cpu<X>& dev, const AttentionShape& s, X* out, size_t stride, X* sum, size_t lines,
                              X factor) {
    const size_t HS = size_t(s.HS), NR = size_t(s.NR);
    for (size_t line = 0; line < lines; line += NR) {
        X* panel = sum + line * HS;
        for (size_t i = 0; i < HS * NR; i++) {
            panel[i] *= factor;
        }
        transpose_lines(dev, out + line * stride, stride, s.HS, panel, NR, s.HS,
                        lines - line < NR ? lines - line : NR);
    }
}

// What attention_backward was given.
template <class X>
struct AttentionGradients {
    X* dqkv;
    size_t dqkv_stride;
    const X *dout, *out;
    const typename Cpu<X>::real* lse;
    const X* qkv;
    size_t N;
};

// Packs a block of queries of head h, with their lse and D.
template <class X>
void attention_backward_queries(const Cpu<X>& dev, const AttentionShape& s, const AttentionBackwardSpace<X>& w,
                                const AttentionGradients<X>& a, size_t h, size_t row, size_t queries) {
    const size_t HS = size_t(s.HS), NR = size_t(s.NR), wide = size_t(s.NH) * HS;
    const X scale = X(1 / std::sqrt(double(s.HS)));
    const X *q = a.qkv + row * s.stride + h * HS, *dout = a.dout + row * wide + h * HS,
            *out = a.out + row * s.out_stride + h * HS;
    for (size_t i = 0; i < queries; i += NR) {
        const size_t n = queries - i < NR ? queries - i : NR;
        attention_pack_queries(dev, s, w.Q + i * HS, q + i * s.stride, s.stride, n, scale);
        attention_pack_queries(dev, s, w.dO + i * HS, dout + i * wide, wide, n, X(1));
    }
    attention_pack_channels(s, w.Q_channels, q, s.stride, queries, scale);
    attention_pack_channels(s, w.dO_channels, dout, wide, queries, X(1));
    for (size_t i = 0; i < s.block; i++) {
        w.lse[i] = i < queries ? a.lse[h * a.N + row + i] : 0;
        w.D[i] = i < queries ? row_kernels(dev).dot(dout + i * wide, out + i * s.out_stride, HS) : 0;
    }
}

template <class X>
void attention_backward_task(const Cpu<X>& dev, const AttentionShape& s, const AttentionBackwardSpace<X>& w,
                             const AttentionGradients<X>& a, const AttentionTask& t) {
    const size_t HS = size_t(s.HS), NR = size_t(s.NR), MR = size_t(s.MR), B = s.block, group = size_t(s.NH / s.NKV);
    const size_t j1 = t.j1 < t.i1 ? t.j1 : t.i1;
    const auto lines = [&](size_t block) { return t.length - block * B < B ? t.length - block * B : B; };
    const size_t k_at = size_t(s.NH + t.kv) * HS, v_at = size_t(s.NH + s.NKV + t.kv) * HS;
    for (size_t j = t.j0; j < j1; j++) {
        const X* row = a.qkv + (t.first + j * B) * s.stride;
        attention_pack_lines(dev, s, w.K + j * w.lines, row + k_at, s.stride, lines(j));
        attention_pack_lines(dev, s, w.V + j * w.lines, row + v_at, s.stride, lines(j));
        if (t.dq) {
            attention_pack_channels(s, w.K_channels + j * w.channels, row + k_at, s.stride, lines(j), X(1));
        }
    }
    for (size_t g = 0; g < group; g++) {
        const size_t h = size_t(t.kv) * group + g;
        for (size_t i = t.i0 > t.j0 ? t.i0 : t.j0; i < t.i1; i++) {
            const size_t row = t.first + i * B, queries = lines(i);
            attention_backward_queries(dev, s, w, a, h, row, queries);
            for (size_t j = t.j0; j < j1 && j <= i; j++) {
                const size_t keys = lines(j);
                attention_backward_scores(dev, s, w, w.K + j * w.lines, w.V + j * w.lines, queries, keys, i == j);
                for (size_t q = 0; t.dq && q < queries; q += NR) {
                    const size_t seen = i == j && q + NR < keys ? q + NR : keys;
                    attention_product(dev, s, w.dQ + q * HS, w.K_channels + j * w.channels, keys * MR, w.dS + q * B,
                                      seen, HS, s.NR, j > 0);
                }
                if (t.dkv) {
                    const bool add = g > 0 || i > j;
                    attention_backward_keys(dev, s, w, w.dV + j * w.sums, w.dO_channels, w.S, queries, keys, i == j,
                                            add);
                    attention_backward_keys(dev, s, w, w.dK + j * w.sums, w.Q_channels, w.dS, queries, keys, i == j,
                                            add);
                }
            }
            if (t.dq) {
                const X scale = X(1 / std::sqrt(double(s.HS)));
                attention_backward_store(dev, s, a.dqkv + row * a.dqkv_stride + h * HS, a.dqkv_stride, w.dQ, queries,
                                         scale);
            }
        }
    }
    for (size_t j = t.j0; t.dkv && j < j1; j++) {
        X* row = a.dqkv + (t.first + j * B) * a.dqkv_stride;
        attention_backward_store(dev, s, row + k_at, a.dqkv_stride, w.dK + j * w.sums, lines(j), X(1));
        attention_backward_store(dev, s, row + v_at, a.dqkv_stride, w.dV + j * w.sums, lines(j), X(1));
    }
}

// dqkv (N, QKV), rows dqkv_stride apart, = the gradient for dout (N, NH*HS); out and lse as attention_forward left them.
template <class X>
void attention_backward(Cpu<X>& dev, X* dqkv, size_t dqkv_stride, const X* dout, const X* out, size_t out_stride,
                        const typename Cpu<X>::real* lse, const X* qkv, const Documents& docs, size_t N, int NH,
                        int NKV, int HS) {
    AttentionShape s = attention_shape(dev, NH, NKV, HS);
    s.out_stride = out_stride;
    const int32_t* cu_seqlens = docs.cu_seqlens;
    const int documents = docs.count;
    const AttentionPlan plan = attention_plan(dev.threads, cu_seqlens, documents, NKV, s.block, true);
    size_t longest = 0;
    for (int d = 0; d < documents; d++) {
        size_t length = size_t(cu_seqlens[d + 1] - cu_seqlens[d]);
        longest = length > longest ? length : longest;
    }
    Arena arena = arena_of(dev), one;
    attention_backward_space<X>(one, s, longest);
    char* space = arena_take<char>(arena, one.used * size_t(dev.threads));
    const AttentionGradients<X> a = {dqkv, dqkv_stride, dout, out, lse, qkv, N};
    parallel_tasks(dev.threads, plan.tasks, [&](size_t index, int worker) {
        const AttentionTask t = attention_task(plan, index, cu_seqlens, NKV, s.block, true);
        Arena mine = {space + one.used * size_t(worker), 0, one.used};
        attention_backward_task(dev, s, attention_backward_space<X>(mine, s, longest), a, t);
    });
}

// memory: count + 1 ints.
template <class X>
Documents documents_place(Cpu<X>&, int32_t* memory, const int32_t* cu_seqlens, int count, int) {
    memcpy(memory, cu_seqlens, (size_t(count) + 1) * sizeof(int32_t));
    Documents docs;
    docs.cu_seqlens = memory;
    docs.count = count;
    return docs;
}

// Of forward and backward, for documents of at most `longest` tokens.
template <class X>
size_t attention_workspace(const Cpu<X>& dev, size_t, size_t longest, int NH, int NKV, int HS) {
    const AttentionShape s = attention_shape(dev, NH, NKV, HS);
    Arena forward, backward;
    attention_forward_space<X>(forward, s, longest);
    attention_backward_space<X>(backward, s, longest);
    return (forward.used > backward.used ? forward.used : backward.used) * size_t(dev.threads);
}
