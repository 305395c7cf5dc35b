// Causal self-attention with grouped queries over packed documents, in the flash form: scores exist a block at a time,
// forward keeps the log-sum-exp of each row, backward makes the probabilities again from it (Dao: FlashAttention-2,
// 2023).
//
//   S = Q K^T / sqrt(HS), P = softmax(S) over the keys 0 .. i of the row's own document, O = P V
//   dV = P^T dO,  dS = P (dO V^T - D),  D = rowsum(dO O),  dQ = dS K / sqrt(HS),  dK = dS^T Q / sqrt(HS)
//
// Activations are widened as they are packed, sums are kept in real, and a result is rounded once, when it is stored.
// Packed are rows [line][line_room] and, of the keys and values of a block, columns [channel][block_room]; a product
// reads its left side by single elements, in either direction, and its right side by vectors along a row:
//
//   forward    S = Q . K columns      O  += P . V rows
//   backward   S = Q . K columns      dP  = dO . V columns      dQ += dS . K rows
//              dV += P^T . dO rows    dK += dS^T . Q rows
//
// So only K and V are turned over, once for all the query heads that share them, and K's columns take the 1 / sqrt(HS).
// A block of keys meets the queries of all these heads before the next one is read, a few rows at a time: their scores
// do not leave the first cache. Where a block has keys that some of its queries do not see, the rows are those of one
// register tile, and products end with the last key that one of them sees.
//
// Blocks count from the start of the document, and every sum runs over them in ascending order, so the bits of a
// document depend neither on its neighbours, nor on the number of threads, nor on how its blocks are shared out.
#pragma once
#include <cmath>
#include <limits>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/rows.h"

namespace rows_double {
constexpr int TILE_MR = 4, TILE_NV = 4;
#include "kernels/cpu/leaf_attention.inc"
static const AttentionKernels<double> attention_table = LEAF_ATTENTION;
#undef LEAF_ATTENTION
}  // namespace rows_double

// ----------------------------------------------------------------------------
// arithmetic and storage

inline const AttentionKernels<float>& attention_kernels(const Cpu<float>& dev) {
    return dev.isa->attention;
}
inline const AttentionKernels<double>& attention_kernels(const Cpu<double>&) {
    return rows_double::attention_table;
}

// The same processor, counting in the type of sums.
template <class X>
Cpu<typename Cpu<X>::real> attention_arithmetic(const Cpu<X>& dev) {
    Cpu<typename Cpu<X>::real> same;
    same.threads = dev.threads;
    same.isa = dev.isa;
    return same;
}

template <class Real>
void row_widen(const Cpu<Real>&, Real* out, const Real* in, size_t n) {
    memcpy(out, in, n * sizeof(Real));
}
inline void row_widen(const Cpu<float>& dev, float* out, const bf16* in, size_t n) {
    dev.isa->rows.of_bf16.widen(out, in, n);
}
template <class Real>
void row_narrow(const Cpu<Real>&, Real* out, const Real* in, size_t n) {
    memcpy(out, in, n * sizeof(Real));
}
inline void row_narrow(const Cpu<float>& dev, bf16* out, const float* in, size_t n) {
    dev.isa->rows.of_bf16.narrow(out, in, n);
}

constexpr size_t ATTENTION_BLOCK = 64;  // queries, and in backward keys; documents are cut between blocks
constexpr size_t ATTENTION_KEYS = 128;  // forward: keys a block
constexpr size_t ATTENTION_TILES = 4;   // register tiles, one below the other, whose scores are made together
constexpr size_t ATTENTION_PIECE = 4;   // blocks in a piece of a document, at most

struct AttentionShape {
    int NH, NKV, HS;
    size_t rows, tile;  // of a register tile; whose scores are made together
    size_t line_room;   // elements from packed row to packed row: whole vectors, and not a power of two, so that the
                        // rows do not share cache sets
    size_t stride;      // of a row of qkv
    size_t out_stride;  // of a row of out
    double scale;       // 1 / sqrt(HS)
};

template <class X>
AttentionShape attention_shape(const Cpu<X>& dev, int NH, int NKV, int HS) {
    const size_t rows = size_t(tile_rows(attention_arithmetic(dev)));
    return {NH,
            NKV,
            HS,
            rows,
            rows * ATTENTION_TILES,
            round_up(size_t(HS), ATTENTION_LANES) + ATTENTION_LANES,
            size_t(NH + 2 * NKV) * size_t(HS),
            size_t(NH) * size_t(HS),
            1 / std::sqrt(double(HS))};
}

// From channel to channel of n packed columns.
constexpr size_t block_room(size_t n) {
    return n + ATTENTION_LANES;
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
// the work. A long document is cut into pieces of some blocks of queries, or of keys.
struct AttentionPlan {
    bool whole;
    size_t piece;  // blocks
    size_t tasks;
};

inline AttentionPlan attention_plan(int threads, const int32_t* cu_seqlens, int documents, int NKV, bool backward) {
    const double cost = backward ? 1.4 : 1.1;  // 7 products for 5; packing K and V again
    double total = 0, longest = 0;
    for (int d = 0; d < documents; d++) {
        double length = double(cu_seqlens[d + 1] - cu_seqlens[d]), work = length * length;
        total += work * NKV;
        longest = work > longest ? work : longest;
    }
    const size_t heads = size_t(documents) * size_t(NKV);
    const double share = total / threads;
    const double even = double(round_up(heads, size_t(threads)) / size_t(threads)) * longest;
    const double uneven = share + longest * (threads - 1) / threads;
    AttentionPlan plan = {threads == 1 || (even < uneven ? even : uneven) <= cost * share, ATTENTION_PIECE, heads};
    for (; !plan.whole; plan.piece /= 2) {
        plan.tasks = 0;
        for (int d = 0; d < documents; d++) {
            const size_t length = size_t(cu_seqlens[d + 1] - cu_seqlens[d]), piece = plan.piece * ATTENTION_BLOCK;
            plan.tasks += round_up(length, piece) / piece * size_t(NKV) * (backward ? 2 : 1);
        }
        if (plan.piece == 1 || plan.tasks >= 4 * size_t(threads)) {
            break;
        }
    }
    return plan;
}

// Task number `index` of the plan. The greater pieces of a document come first: late queries, which see many keys, and
// early keys, which are seen by many queries.
inline AttentionTask attention_task(const AttentionPlan& plan, size_t index, const int32_t* cu_seqlens, int NKV,
                                    bool backward) {
    for (int d = 0;; d++) {
        size_t first = size_t(cu_seqlens[d]), length = size_t(cu_seqlens[d + 1]) - first;
        size_t blocks = round_up(length, ATTENTION_BLOCK) / ATTENTION_BLOCK;
        size_t pieces = plan.whole ? 1 : round_up(blocks, plan.piece) / plan.piece;
        size_t kinds = backward && !plan.whole ? 2 : 1;
        size_t here = pieces * kinds * size_t(NKV);
        if (index >= here) {
            index -= here;
            continue;
        }
        AttentionTask t = {first, length, int(index % size_t(NKV)), 0, blocks, 0, blocks, backward, backward};
        if (!plan.whole) {
            t.dkv = backward && index / (pieces * size_t(NKV)) == 0;
            t.dq = backward && !t.dkv;
            size_t place = index / size_t(NKV) % pieces, piece = t.dkv ? place : pieces - 1 - place;
            size_t begin = piece * plan.piece, end = begin + plan.piece < blocks ? begin + plan.piece : blocks;
            (t.dkv ? t.j0 : t.i0) = begin;
            (t.dkv ? t.j1 : t.i1) = end;
        }
        return t;
    }
}

inline size_t attention_longest(const Documents& docs) {
    size_t longest = 0;
    for (int d = 0; d < docs.count; d++) {
        const size_t length = size_t(docs.cu_seqlens[d + 1] - docs.cu_seqlens[d]);
        longest = length > longest ? length : longest;
    }
    return longest;
}

// ----------------------------------------------------------------------------
// packing and products

// out [line][line_room]: `lines` rows of one head, zeros behind them up to a whole vector.
template <class Real, class X>
void attention_pack_rows(const Cpu<Real>& dev, const AttentionShape& s, Real* out, const X* in, size_t stride,
                         size_t lines) {
    const size_t HS = size_t(s.HS), wide = s.line_room - ATTENTION_LANES;
    for (size_t i = 0; i < lines; i++, out += s.line_room, in += stride) {
        row_widen(dev, out, in, HS);
        for (size_t c = HS; c < wide; c++) {
            out[c] = 0;
        }
    }
}

// out [channel][room]: up to room - ATTENTION_LANES packed rows turned over, zeros behind them up to a whole vector.
template <class Real>
void attention_pack_columns(const Cpu<Real>& dev, const AttentionShape& s, Real* out, size_t room, const Real* rows,
                            size_t lines) {
    transpose_lines(dev, out, room, int(round_up(lines, ATTENTION_LANES)), rows, s.line_room, int(lines), size_t(s.HS));
}

// One side of a product: packed elements and where the next ones are.
template <class Real>
struct AttentionLeft {
    const Real* p;
    size_t row_step, step;  // to the next row, to the next index of the sum
};
template <class Real>
struct AttentionRight {
    const Real* p;
    size_t step;  // to the next index of the sum
};

// Every product goes through here. c (m, n), rows ldc apart, = or += a sum of k terms; c is multiplied by f[row] first
// where there is an f.
template <class Real>
void attention_product(const Cpu<Real>& dev, Real* c, size_t ldc, const AttentionLeft<Real>& a,
                       const AttentionRight<Real>& b, size_t m, size_t n, size_t k, bool add, const Real* f = nullptr) {
    attention_kernels(dev).product(c, ldc, a.p, a.row_step, a.step, b.p, b.step, m, n, k, add, f);
}

// ----------------------------------------------------------------------------
// forward

template <class Real>
struct AttentionForwardSpace {
    Real *K, *V;           // of the document: columns, a block of keys after the other; rows
    Real *Q, *O;           // of a block of queries of each head that shares K and V: rows, sums
    Real *max, *sum;       // [head][query], [head][query][ATTENTION_LANES]
    Real *S, *rows;        // scores of a few rows; a block of rows to be turned over, or the rows to be stored
    Real *shrink, *total;  // of a few rows, of a block of queries
};

template <class Real>
AttentionForwardSpace<Real> attention_forward_space(Arena& arena, const AttentionShape& s, size_t longest) {
    const size_t HS = size_t(s.HS), room = s.line_room, queries = ATTENTION_BLOCK * size_t(s.NH / s.NKV);
    AttentionForwardSpace<Real> w;
    w.K = arena_take<Real>(arena, round_up(longest, ATTENTION_KEYS) / ATTENTION_KEYS * HS * block_room(ATTENTION_KEYS));
    w.V = arena_take<Real>(arena, longest * room);
    w.Q = arena_take<Real>(arena, queries * room);
    w.O = arena_take<Real>(arena, queries * room);
    w.max = arena_take<Real>(arena, queries);
    w.sum = arena_take<Real>(arena, queries * ATTENTION_LANES);
    w.S = arena_take<Real>(arena, s.tile * block_room(ATTENTION_KEYS));
    w.rows = arena_take<Real>(arena, ATTENTION_KEYS * room);
    w.shrink = arena_take<Real>(arena, round_up(s.tile, ATTENTION_LANES));
    w.total = arena_take<Real>(arena, ATTENTION_BLOCK);
    return w;
}

// What attention_forward was given.
template <class X>
struct AttentionOutputs {
    X* out;
    typename Cpu<X>::real* lse;
    const X* qkv;
    size_t N;
};

// `queries` rows of one head, from `query`, meet `keys` keys, from `key`: positions in the document. Q, O, max and sum
// are the head's.
template <class Real>
void attention_forward_block(const Cpu<Real>& dev, const AttentionShape& s, const AttentionForwardSpace<Real>& w,
                             const Real* Q, Real* O, Real* max, Real* sum, size_t query, size_t queries, size_t key,
                             size_t keys) {
    const size_t HS = size_t(s.HS), room = block_room(ATTENTION_KEYS);
    const AttentionRight<Real> K = {w.K + key / ATTENTION_KEYS * HS * room, room},
                               V = {w.V + key * s.line_room, s.line_room};
    const size_t step = key + keys > query + 1 ? s.rows : s.tile;
    for (size_t r = 0; r < queries; r += step) {
        const size_t m = queries - r < step ? queries - r : step;
        const ptrdiff_t seen = ptrdiff_t(query + r + 1) - ptrdiff_t(key);  // keys that the first of the rows sees
        if (seen + ptrdiff_t(m) <= 1) {
            continue;
        }
        const size_t reach = size_t(seen) + m - 1, n = reach < keys ? reach : keys;
        attention_product(dev, w.S, room, {Q + r * s.line_room, s.line_room, 1}, K, m, n, HS, false);
        attention_kernels(dev).softmax(w.S, room, m, n, seen, max + r, sum + r * ATTENTION_LANES, w.shrink);
        attention_product(dev, O + r * s.line_room, s.line_room, {w.S, room, 1}, V, m, HS, n, key > 0, w.shrink);
    }
}

template <class X, class Real>
void attention_forward_task(const Cpu<Real>& dev, const AttentionShape& s, const AttentionForwardSpace<Real>& w,
                            const AttentionOutputs<X>& a, const AttentionTask& t) {
    const size_t HS = size_t(s.HS), room = s.line_room, group = size_t(s.NH / s.NKV), B = ATTENTION_BLOCK;
    const size_t end = t.i1 * ATTENTION_BLOCK < t.length ? t.i1 * ATTENTION_BLOCK : t.length;
    const X* k = a.qkv + t.first * s.stride + size_t(s.NH + t.kv) * HS;
    const X* v = k + size_t(s.NKV) * HS;
    for (size_t key = 0; key < end; key += ATTENTION_KEYS) {
        const size_t n = end - key < ATTENTION_KEYS ? end - key : ATTENTION_KEYS, columns = block_room(ATTENTION_KEYS);
        attention_pack_rows(dev, s, w.rows, k + key * s.stride, s.stride, n);
        attention_kernels(dev).scale(w.rows, room, w.rows, room, n, HS, Real(s.scale), nullptr, nullptr);
        attention_pack_columns(dev, s, w.K + key / ATTENTION_KEYS * HS * columns, columns, w.rows, n);
        attention_pack_rows(dev, s, w.V + key * room, v + key * s.stride, s.stride, n);
    }
    for (size_t query = t.i0 * ATTENTION_BLOCK; query < end; query += B) {
        const size_t n = end - query < B ? end - query : B, row = t.first + query;
        for (size_t g = 0; g < group; g++) {
            const size_t h = size_t(t.kv) * group + g;
            attention_pack_rows(dev, s, w.Q + g * B * room, a.qkv + row * s.stride + h * HS, s.stride, n);
            for (size_t i = 0; i < B; i++) {
                w.max[g * B + i] = -std::numeric_limits<Real>::infinity();
            }
            memset(w.sum + g * B * ATTENTION_LANES, 0, B * ATTENTION_LANES * sizeof(Real));
        }
        for (size_t key = 0; key < query + n; key += ATTENTION_KEYS) {
            const size_t keys = end - key < ATTENTION_KEYS ? end - key : ATTENTION_KEYS;
            for (size_t g = 0; g < group; g++) {
                attention_forward_block(dev, s, w, w.Q + g * B * room, w.O + g * B * room, w.max + g * B,
                                        w.sum + g * B * ATTENTION_LANES, query, n, key, keys);
            }
        }
        for (size_t g = 0; g < group; g++) {
            const size_t h = size_t(t.kv) * group + g;
            attention_kernels(dev).scale(w.rows, room, w.O + g * B * room, room, n, HS, Real(1),
                                         w.sum + g * B * ATTENTION_LANES, w.total);
            for (size_t i = 0; i < n; i++) {
                row_narrow(dev, a.out + (row + i) * s.out_stride + h * HS, w.rows + i * room, HS);
                a.lse[h * a.N + row + i] = w.max[g * B + i] + std::log(w.total[i]);
            }
        }
    }
}

// out (N, NH*HS), rows out_stride apart, lse (NH, N) = of qkv (N, QKV): q | k | v heads side by side. Query head h uses
// kv head h / (NH / NKV). No document is empty.
template <class X>
void attention_forward(Cpu<X>& dev, X* out, size_t out_stride, typename Cpu<X>::real* lse, const X* qkv,
                       const Documents& docs, size_t N, int NH, int NKV, int HS) {
    using Real = typename Cpu<X>::real;
    AttentionShape s = attention_shape(dev, NH, NKV, HS);
    s.out_stride = out_stride;
    const AttentionPlan plan = attention_plan(dev.threads, docs.cu_seqlens, docs.count, NKV, false);
    const size_t longest = attention_longest(docs);
    const Cpu<Real> arithmetic = attention_arithmetic(dev);
    Arena arena = arena_of(dev), one;
    attention_forward_space<Real>(one, s, longest);
    char* space = arena_take<char>(arena, one.used * size_t(dev.threads));
    const AttentionOutputs<X> a = {out, lse, qkv, N};
    parallel_tasks(dev.threads, plan.tasks, [&](size_t index, int worker) {
        Arena mine = {space + one.used * size_t(worker), 0, one.used};
        attention_forward_task(arithmetic, s, attention_forward_space<Real>(mine, s, longest), a,
                               attention_task(plan, index, docs.cu_seqlens, NKV, false));
    });
}

// ----------------------------------------------------------------------------
// backward

template <class Real>
struct AttentionBackwardSpace {
    // of the document
    Real *K, *dK, *dV;            // rows, sums
    Real *K_columns, *V_columns;  // a block after the other
    // of a block of queries of each head that shares K and V
    Real *Q, *dO, *dQ;  // rows, rows, sums
    Real *lse, *D;      // [head][query], lse as a power of two
    Real *S, *dS;       // [query][block_room]
    Real* rows;         // a block of rows to be turned over or stored
};

template <class Real>
AttentionBackwardSpace<Real> attention_backward_space(Arena& arena, const AttentionShape& s, size_t longest) {
    const size_t B = ATTENTION_BLOCK, blocks = round_up(longest, B) / B, group = size_t(s.NH / s.NKV);
    const size_t lines = blocks * B * s.line_room, columns = blocks * size_t(s.HS) * block_room(B);
    AttentionBackwardSpace<Real> w;
    w.K = arena_take<Real>(arena, lines);
    w.dK = arena_take<Real>(arena, lines);
    w.dV = arena_take<Real>(arena, lines);
    w.K_columns = arena_take<Real>(arena, columns);
    w.V_columns = arena_take<Real>(arena, columns);
    w.Q = arena_take<Real>(arena, group * B * s.line_room);
    w.dO = arena_take<Real>(arena, group * B * s.line_room);
    w.dQ = arena_take<Real>(arena, group * B * s.line_room);
    w.lse = arena_take<Real>(arena, group * B);
    w.D = arena_take<Real>(arena, group * B);
    w.S = arena_take<Real>(arena, B * block_room(B));
    w.dS = arena_take<Real>(arena, B * block_room(B));
    w.rows = arena_take<Real>(arena, B * s.line_room);
    return w;
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

// P and dS of one head's block i of queries and block j of keys, and what comes of them; lines: queries, keys.
template <class Real>
void attention_backward_block(const Cpu<Real>& dev, const AttentionShape& s, const AttentionBackwardSpace<Real>& w,
                              const AttentionTask& t, size_t g, size_t i, size_t j, size_t queries, size_t keys) {
    const size_t HS = size_t(s.HS), line = s.line_room, B = ATTENTION_BLOCK, room = block_room(B), block = B * line;
    const bool diagonal = i == j;
    const size_t step = diagonal ? s.rows : s.tile;
    const Real *Q = w.Q + g * block, *dO = w.dO + g * block;
    const AttentionRight<Real> K_columns = {w.K_columns + j * HS * room, room},
                               V_columns = {w.V_columns + j * HS * room, room};
    for (size_t r = 0; r < queries; r += step) {
        const size_t m = queries - r < step ? queries - r : step;
        const size_t n = diagonal && r + m < keys ? r + m : keys;
        Real *S = w.S + r * room, *dS = w.dS + r * room;
        attention_product(dev, S, room, {Q + r * line, line, 1}, K_columns, m, n, HS, false);
        attention_product(dev, dS, room, {dO + r * line, line, 1}, V_columns, m, n, HS, false);
        attention_kernels(dev).grad(S, dS, room, m, n, ptrdiff_t(diagonal ? r + 1 : keys), w.lse + g * B + r,
                                    w.D + g * B + r);
        if (t.dq) {
            attention_product(dev, w.dQ + g * block + r * line, line, {dS, room, 1}, {w.K + j * block, line}, m, HS, n,
                              j > 0);
        }
    }
    for (size_t k = 0; t.dkv && k < keys; k += diagonal ? s.rows : keys) {
        const size_t m = !diagonal ? keys : keys - k < s.rows ? keys - k : s.rows, rest = queries - k;
        const size_t from = k * room + k;  // the first query that sees any of these keys
        Real *dV = w.dV + j * block + k * line, *dK = w.dK + j * block + k * line;
        const bool add = !diagonal || g > 0;
        attention_product(dev, dV, line, {w.S + from, 1, room}, {dO + k * line, line}, m, HS, rest, add);
        attention_product(dev, dK, line, {w.dS + from, 1, room}, {Q + k * line, line}, m, HS, rest, add);
    }
}

// Packs a block of queries of head h, the g-th of its group, with their lse and D.
template <class X, class Real>
void attention_backward_queries(const Cpu<Real>& dev, const AttentionShape& s, const AttentionBackwardSpace<Real>& w,
                                const AttentionGradients<X>& a, size_t g, size_t h, size_t row, size_t queries) {
    const size_t HS = size_t(s.HS), wide = size_t(s.NH) * HS, B = ATTENTION_BLOCK, at = g * B * s.line_room;
    attention_pack_rows(dev, s, w.Q + at, a.qkv + row * s.stride + h * HS, s.stride, queries);
    attention_pack_rows(dev, s, w.dO + at, a.dout + row * wide + h * HS, wide, queries);
    attention_pack_rows(dev, s, w.rows, a.out + row * s.out_stride + h * HS, s.out_stride, queries);
    for (size_t i = 0; i < queries; i++) {
        w.lse[g * B + i] = a.lse[h * a.N + row + i];
        w.D[g * B + i] = row_kernels(dev).dot(w.dO + at + i * s.line_room, w.rows + i * s.line_room, HS);
    }
}

// out: `lines` rows of one head, stride elements apart, = factor * sums.
template <class X, class Real>
void attention_backward_store(const Cpu<Real>& dev, const AttentionShape& s, const AttentionBackwardSpace<Real>& w,
                              X* out, size_t stride, const Real* sums, size_t lines, Real factor) {
    const size_t HS = size_t(s.HS);
    attention_kernels(dev).scale(w.rows, s.line_room, sums, s.line_room, lines, HS, factor, nullptr, nullptr);
    for (size_t i = 0; i < lines; i++) {
        row_narrow(dev, out + i * stride, w.rows + i * s.line_room, HS);
    }
}

template <class X, class Real>
void attention_backward_task(const Cpu<Real>& dev, const AttentionShape& s, const AttentionBackwardSpace<Real>& w,
                             const AttentionGradients<X>& a, const AttentionTask& t) {
    const size_t HS = size_t(s.HS), B = ATTENTION_BLOCK, room = block_room(B), block = B * s.line_room;
    const size_t group = size_t(s.NH / s.NKV), j1 = t.j1 < t.i1 ? t.j1 : t.i1;
    const size_t k_at = size_t(s.NH + t.kv) * HS, v_at = size_t(s.NH + s.NKV + t.kv) * HS;
    const Real scale = Real(1 / std::sqrt(double(HS)));
    const auto lines = [&](size_t b) { return t.length - b * B < B ? t.length - b * B : B; };
    for (size_t j = t.j0; j < j1; j++) {
        const X* row = a.qkv + (t.first + j * B) * s.stride;
        attention_pack_rows(dev, s, w.K + j * block, row + k_at, s.stride, lines(j));
        attention_kernels(dev).scale(w.rows, s.line_room, w.K + j * block, s.line_room, lines(j), HS, Real(s.scale),
                                     nullptr, nullptr);
        attention_pack_columns(dev, s, w.K_columns + j * HS * room, room, w.rows, lines(j));
        attention_pack_rows(dev, s, w.rows, row + v_at, s.stride, lines(j));
        attention_pack_columns(dev, s, w.V_columns + j * HS * room, room, w.rows, lines(j));
    }
    for (size_t i = t.i0 > t.j0 ? t.i0 : t.j0; i < t.i1; i++) {
        const size_t row = t.first + i * B, queries = lines(i), h = size_t(t.kv) * group;
        for (size_t g = 0; g < group; g++) {
            attention_backward_queries(dev, s, w, a, g, h + g, row, queries);
        }
        for (size_t j = t.j0; j < j1 && j <= i; j++) {
            for (size_t g = 0; g < group; g++) {
                attention_backward_block(dev, s, w, t, g, i, j, queries, lines(j));
            }
        }
        for (size_t g = 0; t.dq && g < group; g++) {
            attention_backward_store(dev, s, w, a.dqkv + row * a.dqkv_stride + (h + g) * HS, a.dqkv_stride,
                                     w.dQ + g * block, queries, scale);
        }
    }
    for (size_t j = t.j0; t.dkv && j < j1; j++) {
        X* row = a.dqkv + (t.first + j * B) * a.dqkv_stride;
        attention_backward_store(dev, s, w, row + k_at, a.dqkv_stride, w.dK + j * block, lines(j), scale);
        attention_backward_store(dev, s, w, row + v_at, a.dqkv_stride, w.dV + j * block, lines(j), Real(1));
    }
}

// dqkv (N, QKV), rows dqkv_stride apart, = the gradient for dout (N, NH*HS); out and lse as attention_forward left
// them.
template <class X>
void attention_backward(Cpu<X>& dev, X* dqkv, size_t dqkv_stride, const X* dout, const X* out, size_t out_stride,
                        const typename Cpu<X>::real* lse, const X* qkv, const Documents& docs, size_t N, int NH,
                        int NKV, int HS) {
    using Real = typename Cpu<X>::real;
    AttentionShape s = attention_shape(dev, NH, NKV, HS);
    s.out_stride = out_stride;
    const AttentionPlan plan = attention_plan(dev.threads, docs.cu_seqlens, docs.count, NKV, true);
    const size_t longest = attention_longest(docs);
    const Cpu<Real> arithmetic = attention_arithmetic(dev);
    Arena arena = arena_of(dev), one;
    attention_backward_space<Real>(one, s, longest);
    char* space = arena_take<char>(arena, one.used * size_t(dev.threads));
    const AttentionGradients<X> a = {dqkv, dqkv_stride, dout, out, lse, qkv, N};
    parallel_tasks(dev.threads, plan.tasks, [&](size_t index, int worker) {
        Arena mine = {space + one.used * size_t(worker), 0, one.used};
        attention_backward_task(arithmetic, s, attention_backward_space<Real>(mine, s, longest), a,
                                attention_task(plan, index, docs.cu_seqlens, NKV, true));
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
    using Real = typename Cpu<X>::real;
    const AttentionShape s = attention_shape(dev, NH, NKV, HS);
    Arena forward, backward;
    attention_forward_space<Real>(forward, s, longest);
    attention_backward_space<Real>(backward, s, longest);
    return (forward.used > backward.used ? forward.used : backward.used) * size_t(dev.threads);
}
