// Causal self-attention with grouped queries over packed documents, in the flash form: scores exist a block at a time,
// forward keeps the log-sum-exp of each row, backward makes the probabilities again from it (Dao: FlashAttention-2,
// 2023).
//
//   S = Q K^T / sqrt(HS), P = softmax(S) over the keys 0 .. i of the row's own document, O = P V
//   dV = P^T dO,  dS = P (dO V^T - D),  D = rowsum(dO O),  dQ = dS K / sqrt(HS),  dK = dS^T Q / sqrt(HS)
//
// Activations are widened as they are packed, sums are kept in real, and a result is rounded once, when it is stored.
// Packed are rows, and of the keys and values of a block columns; a product reads its left side by single elements, in
// either direction, and its right side by vectors along a row:
//
//   forward    S = Q . K columns      O  += P . V rows
//   backward   S = Q . K columns      dP  = dO . V columns      dQ += dS . K rows
//              dV += P^T . dO rows    dK += dS^T . Q rows
//
// So only K and V are turned over, once for all the query heads that share them, and K's columns take the 1 / sqrt(HS).
//
// Where the tier has tiles, bf16 is multiplied as it is (AttentionTiles in isa_attention.h): an operand stands in
// blocks of 32 x 32, once for each side it is read from; P and dS are rounded to bf16, and the scale is the softmax's,
// since K times it would be rounded. One algorithm serves both; what they do differently is the section `arithmetic`,
// where the type of the device says which it is: Cpu<bf16> the tiles, Cpu<float> and Cpu<double> the above.
//
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

// fn(arithmetic): a device whose type says what is multiplied. Cpu<bf16> stands for the tiles, where the tier has them;
// else it is the same processor, counting in the type of sums.
template <class X, class Fn>
void attention_in(const Cpu<X>& dev, const Fn& fn) {
    fn(dev);
}
template <class Fn>
void attention_in(const Cpu<bf16>& dev, const Fn& fn) {
    if (dev.isa->attention_tiles) {
        fn(dev);
    } else {
        Cpu<float> same;
        same.threads = dev.threads;
        same.isa = dev.isa;
        fn(same);
    }
}

constexpr size_t ATTENTION_BLOCK = 64;  // queries, and in backward keys; documents are cut between blocks
constexpr size_t ATTENTION_KEYS = 128;  // forward: keys a block
constexpr size_t ATTENTION_TILES = 4;   // register tiles, one below the other, whose scores are made together
constexpr size_t ATTENTION_PIECE = 4;   // blocks in a piece of a document, at most
constexpr size_t ATTENTION_SIDE = 32;   // of a block of tiles

struct AttentionShape {
    int NH, NKV, HS;
    size_t rows, tile;  // of a register tile; whose scores are made together
    size_t line;        // elements from packed row to packed row, and of sums
    size_t channels;    // of packed columns
    size_t margin;      // elements behind the n of a row of scores, or of packed columns
    size_t stride;      // of a row of qkv
    size_t out_stride;  // of a row of out
    double scale;       // 1 / sqrt(HS)
};

inline AttentionShape attention_shape(int NH, int NKV, int HS, size_t rows, size_t tile, size_t line, size_t channels,
                                      size_t margin) {
    const size_t head = size_t(HS), stride = size_t(NH + 2 * NKV) * head, wide = size_t(NH) * head;
    return {NH, NKV, HS, rows, tile, line, channels, margin, stride, wide, 1 / std::sqrt(double(HS))};
}
// Rows have whole vectors, and not a power of two, so that they do not share cache sets.
template <class Real>
AttentionShape attention_shape(const Cpu<Real>& dev, int NH, int NKV, int HS) {
    const size_t rows = size_t(tile_rows(dev)), line = round_up(size_t(HS), ATTENTION_LANES) + ATTENTION_LANES;
    return attention_shape(NH, NKV, HS, rows, rows * ATTENTION_TILES, line, size_t(HS), ATTENTION_LANES);
}
// Whole blocks: of 32 lines all the channels, one block after another, and 32 rows of scores likewise.
inline AttentionShape attention_shape(const Cpu<bf16>&, int NH, int NKV, int HS) {
    const size_t channels = round_up(size_t(HS), ATTENTION_SIDE);
    return attention_shape(NH, NKV, HS, ATTENTION_SIDE, ATTENTION_SIDE, channels, channels, 0);
}

// Elements of n packed columns, from channel to channel and in all; of n lines.
inline size_t attention_room(const AttentionShape& s, size_t n) {
    return n + s.margin;
}
inline size_t attention_columns(const AttentionShape& s, size_t n) {
    return s.channels * attention_room(s, n);
}
inline size_t attention_lines(const AttentionShape& s, size_t n) {
    return round_up(n, ATTENTION_SIDE) * s.line;
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
// arithmetic: operands, products, results

// An operand is packed once for each way in which it is read; what follows says for each of them what Cpu<Real> does
// and what tiles do. Packed rows of Cpu<Real> serve every way but that of columns.

// Memory for what is read in one more way, n elements.
template <class Real>
Real* attention_again(const Cpu<Real>&, Arena&, void* same, size_t) {
    return static_cast<Real*>(same);
}
inline bf16* attention_again(const Cpu<bf16>&, Arena& arena, void*, size_t n) {
    return arena_take<bf16>(arena, n);
}

// Around what a task does.
template <class Real>
void attention_open(const Cpu<Real>&) {}
template <class Real>
void attention_close(const Cpu<Real>&) {}
inline void attention_open(const Cpu<bf16>& dev) {
    dev.isa->attention_tiles->open();
}
inline void attention_close(const Cpu<bf16>& dev) {
    dev.isa->attention_tiles->close();
}

// Rows that stand on the right of a product, or (Cpu<Real>) on either side: `lines` rows of one head, zeros behind them
// up to a whole vector.
template <class Real, class X>
void attention_pack_rows(const Cpu<Real>& dev, const AttentionShape& s, Real* out, const X* in, size_t stride,
                         size_t lines) {
    const size_t HS = size_t(s.HS), wide = s.line - ATTENTION_LANES;
    for (size_t i = 0; i < lines; i++, out += s.line, in += stride) {
        row_convert(dev, out, in, HS);
        for (size_t c = HS; c < wide; c++) {
            out[c] = 0;
        }
    }
}
// fn(out, in, lines) for each 32 lines.
template <class Fn>
void attention_strips(const AttentionShape& s, bf16* out, const bf16* in, size_t stride, size_t lines, const Fn& fn) {
    for (size_t i = 0; i < lines; i += ATTENTION_SIDE) {
        fn(out + i * s.line, in + i * stride, lines - i < ATTENTION_SIDE ? lines - i : ATTENTION_SIDE);
    }
}
inline void attention_pack_rows(const Cpu<bf16>& dev, const AttentionShape& s, bf16* out, const bf16* in, size_t stride,
                                size_t lines) {
    attention_strips(s, out, in, stride, lines, [&](bf16* to, const bf16* from, size_t n) {
        dev.isa->bf16->pack_b_bf16_columns(to, from, stride, s.HS, n);
    });
}

// Rows that stand on the left, and the same turned over: channels as rows of the left side.
template <class Real, class X>
void attention_pack_left(const Cpu<Real>& dev, const AttentionShape& s, Real* out, const X* in, size_t stride,
                         size_t lines) {
    attention_pack_rows(dev, s, out, in, stride, lines);
}
template <class Real, class X>
void attention_pack_turned(const Cpu<Real>&, const AttentionShape&, Real*, const X*, size_t, size_t) {}
inline void attention_pack_left(const Cpu<bf16>& dev, const AttentionShape& s, bf16* out, const bf16* in, size_t stride,
                                size_t lines) {
    attention_strips(s, out, in, stride, lines, [&](bf16* to, const bf16* from, size_t n) {
        dev.isa->bf16->pack_a_bf16_lines(to, from, stride, int(n), size_t(s.HS));
    });
}
inline void attention_pack_turned(const Cpu<bf16>& dev, const AttentionShape& s, bf16* out, const bf16* in,
                                  size_t stride, size_t lines) {
    dev.isa->attention_tiles->pack_turned(out, in, stride, lines, size_t(s.HS));
}

// Columns [channel][room] of the right side: a block of rows, times factor, turned over, zeros behind them up to a
// whole vector. Tiles leave the factor to the softmax. rows: room for the block.
template <class Real, class X>
void attention_pack_columns(const Cpu<Real>& dev, const AttentionShape& s, Real* out, size_t room, const X* in,
                            size_t stride, size_t lines, Real factor, Real* rows) {
    attention_pack_rows(dev, s, rows, in, stride, lines);
    if (factor != 1) {
        attention_kernels(dev).scale(rows, s.line, rows, s.line, lines, size_t(s.HS), factor, nullptr, nullptr);
    }
    transpose_lines(dev, out, room, int(round_up(lines, ATTENTION_LANES)), rows, s.line, int(lines), size_t(s.HS));
}
inline void attention_pack_columns(const Cpu<bf16>& dev, const AttentionShape& s, bf16* out, size_t, const bf16* in,
                                   size_t stride, size_t lines, float, float*) {
    attention_strips(s, out, in, stride, lines, [&](bf16* to, const bf16* from, size_t n) {
        dev.isa->bf16->pack_b_bf16_lines(to, from, stride, int(n), size_t(s.HS));
    });
}

// D = rowsum(dO O). Cpu<Real>: of dO as it was packed; rows: room for the block.
template <class Real, class X>
void attention_dots(const Cpu<Real>& dev, const AttentionShape& s, Real* D, const Real* dO, const X*, size_t,
                    const X* out, Real* rows, size_t lines) {
    attention_pack_rows(dev, s, rows, out, s.out_stride, lines);
    for (size_t i = 0; i < lines; i++) {
        D[i] = row_kernels(dev).dot(dO + i * s.line, rows + i * s.line, size_t(s.HS));
    }
}
inline void attention_dots(const Cpu<bf16>& dev, const AttentionShape& s, float* D, const bf16*, const bf16* dout,
                           size_t stride, const bf16* out, float*, size_t lines) {
    for (size_t i = 0; i < lines; i++) {
        D[i] = row_kernels(dev).dot(dout + i * stride, out + i * s.out_stride, size_t(s.HS));
    }
}

// S (m, n) = rows on the left . columns, of a block of `room` columns; before the scale, with tiles.
template <class Real>
void attention_scores(const Cpu<Real>& dev, const AttentionShape& s, Real* S, size_t room, const Real* rows,
                      const Real* columns, size_t m, size_t n) {
    attention_kernels(dev).product(S, room, rows, s.line, 1, columns, room, m, n, size_t(s.HS), false, nullptr);
}
inline void attention_scores(const Cpu<bf16>& dev, const AttentionShape& s, float* S, size_t, const bf16* rows,
                             const bf16* columns, size_t m, size_t n) {
    constexpr size_t BLOCK = ATTENTION_SIDE * ATTENTION_SIDE;
    const size_t line = ATTENTION_SIDE * s.line;
    dev.isa->attention_tiles->product({S, 0, BLOCK}, {rows, line, BLOCK}, {columns, BLOCK, line}, m, n, s.channels,
                                      false);
}

// sums (m, HS) = (add) f sums + P (m, k) . rows on the right. P, or dS, as softmax or grad left it; f for each row, 1
// where there is none.
template <class Real>
void attention_values(const Cpu<Real>& dev, const AttentionShape& s, Real* sums, const Real* P, size_t room,
                      const Real* rows, size_t m, size_t HS, size_t k, bool add, const Real* f = nullptr) {
    attention_kernels(dev).product(sums, s.line, P, room, 1, rows, s.line, m, HS, k, add, f);
}
inline void attention_values(const Cpu<bf16>& dev, const AttentionShape& s, float* sums, const bf16* P, size_t,
                             const bf16* rows, size_t m, size_t HS, size_t k, bool add, const float* f = nullptr) {
    constexpr size_t BLOCK = ATTENTION_SIDE * ATTENTION_SIDE;
    if (add && f) {
        dev.isa->attention_tiles->shrink(sums, HS, f);
    }
    dev.isa->attention_tiles->product({sums, 0, BLOCK}, {P, 0, BLOCK}, {rows, ATTENTION_SIDE * s.line, BLOCK}, m, HS, k,
                                      add);
}

// sums (m, HS) += P^T . rows, with the `queries` rows of P from `from` on and its m columns from there; rows from the
// first query on. Tiles: sums^T = rows^T P, rows as they are turned over.
template <class Real>
void attention_keys(const Cpu<Real>& dev, const AttentionShape& s, Real* sums, const Real* P, size_t room,
                    const Real* rows, size_t from, size_t m, size_t queries, bool add) {
    attention_kernels(dev).product(sums, s.line, P + from * room + from, 1, room, rows + from * s.line, s.line, m,
                                   size_t(s.HS), queries, add, nullptr);
}
inline void attention_keys(const Cpu<bf16>& dev, const AttentionShape& s, float* sums, const bf16* P, size_t room,
                           const bf16* rows, size_t from, size_t m, size_t queries, bool add) {
    constexpr size_t BLOCK = ATTENTION_SIDE * ATTENTION_SIDE;
    const size_t line = ATTENTION_SIDE * s.line;
    dev.isa->attention_tiles->product({sums, BLOCK, line}, {rows + from * s.line, BLOCK, line},
                                      {P + from * room + from * ATTENTION_SIDE, ATTENTION_SIDE * room, BLOCK},
                                      size_t(s.HS), m, queries, add);
}

// out: `lines` rows of one head, stride elements apart, = f sums, f = factor, or factor / total, the total of the row's
// lanes of `sum`. turned: the sums are those of attention_keys. rows: room for the block.
template <class X, class Real>
void attention_store(const Cpu<Real>& dev, const AttentionShape& s, X* out, size_t stride, const Real* sums,
                     size_t lines, bool, Real factor, Real* rows, const Real* sum = nullptr, Real* total = nullptr) {
    const size_t HS = size_t(s.HS);
    attention_kernels(dev).scale(rows, s.line, sums, s.line, lines, HS, factor, sum, total);
    for (size_t i = 0; i < lines; i++) {
        row_convert(dev, out + i * stride, rows + i * s.line, HS);
    }
}
inline void attention_store(const Cpu<bf16>& dev, const AttentionShape& s, bf16* out, size_t stride, const float* sums,
                            size_t lines, bool turned, float factor, float*, const float* sum = nullptr,
                            float* total = nullptr) {
    dev.isa->attention_tiles->store(out, stride, sums, lines, size_t(s.HS), turned, factor, sum, total);
}

// ----------------------------------------------------------------------------
// forward

// Operands are of the arithmetic's type, sums in its reals.
template <class Dev>
struct AttentionForwardSpace {
    using Operand = typename Dev::floatX;
    using Real = typename Dev::real;
    Operand *K, *V;        // of the document: columns, a block of keys after the other; rows
    Operand *Q, *P;        // of a block of queries of each head that shares K and V: rows; probabilities of a few rows
    Real* O;               // as Q: sums
    Real *max, *sum;       // [head][query], [head][query][ATTENTION_LANES]
    Real *S, *rows;        // scores of a few rows; room for a block of rows
    Real *shrink, *total;  // of a few rows, of a block of queries
};

template <class Dev>
AttentionForwardSpace<Dev> attention_forward_space(const Dev& dev, Arena& arena, const AttentionShape& s,
                                                   size_t longest) {
    using Operand = typename Dev::floatX;
    using Real = typename Dev::real;
    const size_t queries = ATTENTION_BLOCK * size_t(s.NH / s.NKV), scores = s.tile * attention_room(s, ATTENTION_KEYS);
    AttentionForwardSpace<Dev> w;
    w.K = arena_take<Operand>(
        arena, round_up(longest, ATTENTION_KEYS) / ATTENTION_KEYS * attention_columns(s, ATTENTION_KEYS));
    w.V = arena_take<Operand>(arena, attention_lines(s, longest));
    w.Q = arena_take<Operand>(arena, attention_lines(s, queries));
    w.O = arena_take<Real>(arena, attention_lines(s, queries));
    w.max = arena_take<Real>(arena, queries);
    w.sum = arena_take<Real>(arena, queries * ATTENTION_LANES);
    w.S = arena_take<Real>(arena, scores);
    w.P = attention_again(dev, arena, w.S, scores);
    w.rows = arena_take<Real>(arena, attention_lines(s, ATTENTION_KEYS));
    w.shrink = arena_take<Real>(arena, round_up(s.tile, ATTENTION_LANES));
    w.total = arena_take<Real>(arena, ATTENTION_BLOCK);
    return w;
}

// P = the softmax of S, with what it does to max, sum and shrink (isa_attention.h).
template <class Real>
void attention_softmax(const Cpu<Real>& dev, const AttentionShape&, const AttentionForwardSpace<Cpu<Real>>& w,
                       size_t room, size_t m, size_t n, ptrdiff_t seen, Real* max, Real* sum) {
    attention_kernels(dev).softmax(w.S, room, m, n, seen, max, sum, w.shrink);
}
inline void attention_softmax(const Cpu<bf16>& dev, const AttentionShape& s, const AttentionForwardSpace<Cpu<bf16>>& w,
                              size_t, size_t m, size_t n, ptrdiff_t seen, float* max, float* sum) {
    dev.isa->attention_tiles->softmax(w.P, w.S, m, n, seen, float(s.scale), max, sum, w.shrink);
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
template <class Dev>
void attention_forward_block(const Dev& dev, const AttentionShape& s, const AttentionForwardSpace<Dev>& w,
                             const typename Dev::floatX* Q, typename Dev::real* O, typename Dev::real* max,
                             typename Dev::real* sum, size_t query, size_t queries, size_t key, size_t keys) {
    const size_t HS = size_t(s.HS), room = attention_room(s, ATTENTION_KEYS);
    const typename Dev::floatX* K = w.K + key / ATTENTION_KEYS * attention_columns(s, ATTENTION_KEYS);
    const typename Dev::floatX* V = w.V + key * s.line;
    const size_t step = key + keys > query + 1 ? s.rows : s.tile;
    for (size_t r = 0; r < queries; r += step) {
        const size_t m = queries - r < step ? queries - r : step;
        const ptrdiff_t seen = ptrdiff_t(query + r + 1) - ptrdiff_t(key);  // keys that the first of the rows sees
        if (seen + ptrdiff_t(m) <= 1) {
            continue;
        }
        const size_t reach = size_t(seen) + m - 1, n = reach < keys ? reach : keys;
        attention_scores(dev, s, w.S, room, Q + r * s.line, K, m, n);
        attention_softmax(dev, s, w, room, m, n, seen, max + r, sum + r * ATTENTION_LANES);
        attention_values(dev, s, O + r * s.line, w.P, room, V, m, HS, n, key > 0, w.shrink);
    }
}

template <class X, class Dev>
void attention_forward_task(const Dev& dev, const AttentionShape& s, const AttentionForwardSpace<Dev>& w,
                            const AttentionOutputs<X>& a, const AttentionTask& t) {
    using Real = typename Dev::real;
    const size_t HS = size_t(s.HS), room = s.line, group = size_t(s.NH / s.NKV), B = ATTENTION_BLOCK;
    const size_t end = t.i1 * ATTENTION_BLOCK < t.length ? t.i1 * ATTENTION_BLOCK : t.length;
    const X* k = a.qkv + t.first * s.stride + size_t(s.NH + t.kv) * HS;
    const X* v = k + size_t(s.NKV) * HS;
    for (size_t key = 0; key < end; key += ATTENTION_KEYS) {
        const size_t n = end - key < ATTENTION_KEYS ? end - key : ATTENTION_KEYS;
        attention_pack_columns(dev, s, w.K + key / ATTENTION_KEYS * attention_columns(s, ATTENTION_KEYS),
                               attention_room(s, ATTENTION_KEYS), k + key * s.stride, s.stride, n, Real(s.scale),
                               w.rows);
        attention_pack_rows(dev, s, w.V + key * room, v + key * s.stride, s.stride, n);
    }
    for (size_t query = t.i0 * ATTENTION_BLOCK; query < end; query += B) {
        const size_t n = end - query < B ? end - query : B, row = t.first + query;
        for (size_t g = 0; g < group; g++) {
            const size_t h = size_t(t.kv) * group + g;
            attention_pack_left(dev, s, w.Q + g * B * room, a.qkv + row * s.stride + h * HS, s.stride, n);
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
            attention_store(dev, s, a.out + row * s.out_stride + h * HS, s.out_stride, w.O + g * B * room, n, false,
                            Real(1), w.rows, w.sum + g * B * ATTENTION_LANES, w.total);
            for (size_t i = 0; i < n; i++) {
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
    const AttentionPlan plan = attention_plan(dev.threads, docs.cu_seqlens, docs.count, NKV, false);
    const size_t longest = attention_longest(docs);
    const AttentionOutputs<X> a = {out, lse, qkv, N};
    attention_in(dev, [&](const auto& arithmetic) {
        AttentionShape s = attention_shape(arithmetic, NH, NKV, HS);
        s.out_stride = out_stride;
        Arena arena = arena_of(dev), one;
        attention_forward_space(arithmetic, one, s, longest);
        char* space = arena_take<char>(arena, one.used * size_t(dev.threads));
        parallel_tasks(dev.threads, plan.tasks, [&](size_t index, int worker) {
            Arena mine = {space + one.used * size_t(worker), 0, one.used};
            attention_open(arithmetic);
            attention_forward_task(arithmetic, s, attention_forward_space(arithmetic, mine, s, longest), a,
                                   attention_task(plan, index, docs.cu_seqlens, NKV, false));
            attention_close(arithmetic);
        });
    });
}

// ----------------------------------------------------------------------------
// backward

template <class Dev>
struct AttentionBackwardSpace {
    using Operand = typename Dev::floatX;
    using Real = typename Dev::real;
    // of the document
    Operand *K, *K_columns, *V_columns;  // rows; columns, a block after the other
    Real *dK, *dV;                       // sums
    // of a block of queries of each head that shares K and V
    Operand *Q, *dO;                // rows on the left
    Operand *Q_turned, *dO_turned;  // as attention_keys reads them
    Real *dQ, *lse, *D;             // sums; [head][query]
    Real *S, *dP;                   // [query][room]
    Operand *P, *dS, *dS_left;      // as attention_keys reads them, both, and as attention_values does
    Real* rows;                     // room for a block of rows
};

template <class Dev>
AttentionBackwardSpace<Dev> attention_backward_space(const Dev& dev, Arena& arena, const AttentionShape& s,
                                                     size_t longest) {
    using Operand = typename Dev::floatX;
    using Real = typename Dev::real;
    const size_t B = ATTENTION_BLOCK, blocks = round_up(longest, B) / B, group = size_t(s.NH / s.NKV);
    const size_t lines = blocks * B * s.line, columns = blocks * attention_columns(s, B), own = group * B * s.line;
    const size_t scores = B * attention_room(s, B);
    AttentionBackwardSpace<Dev> w;
    w.K = arena_take<Operand>(arena, lines);
    w.dK = arena_take<Real>(arena, lines);
    w.dV = arena_take<Real>(arena, lines);
    w.K_columns = arena_take<Operand>(arena, columns);
    w.V_columns = arena_take<Operand>(arena, columns);
    w.Q = arena_take<Operand>(arena, own);
    w.dO = arena_take<Operand>(arena, own);
    w.dQ = arena_take<Real>(arena, own);
    w.Q_turned = attention_again(dev, arena, w.Q, own);
    w.dO_turned = attention_again(dev, arena, w.dO, own);
    w.lse = arena_take<Real>(arena, group * B);
    w.D = arena_take<Real>(arena, group * B);
    w.S = arena_take<Real>(arena, scores);
    w.dP = arena_take<Real>(arena, scores);
    w.P = attention_again(dev, arena, w.S, scores);
    w.dS = attention_again(dev, arena, w.dP, scores);
    w.dS_left = attention_again(dev, arena, w.dP, scores);
    w.rows = arena_take<Real>(arena, B * s.line);
    return w;
}

// P and dS of m rows from S and dP: `at` is where the rows begin in each of them, lse and D are theirs.
template <class Real>
void attention_grad(const Cpu<Real>& dev, const AttentionShape&, const AttentionBackwardSpace<Cpu<Real>>& w, size_t at,
                    size_t room, size_t m, size_t n, ptrdiff_t seen, const Real* lse, const Real* D) {
    attention_kernels(dev).grad(w.S + at, w.dP + at, room, m, n, seen, lse, D);
}
inline void attention_grad(const Cpu<bf16>& dev, const AttentionShape& s, const AttentionBackwardSpace<Cpu<bf16>>& w,
                           size_t at, size_t, size_t m, size_t n, ptrdiff_t seen, const float* lse, const float* D) {
    dev.isa->attention_tiles->grad(w.P + at, w.dS_left + at, w.dS + at, w.S + at, w.dP + at, m, n, seen, float(s.scale),
                                   lse, D);
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
template <class Dev>
void attention_backward_block(const Dev& dev, const AttentionShape& s, const AttentionBackwardSpace<Dev>& w,
                              const AttentionTask& t, size_t g, size_t i, size_t j, size_t queries, size_t keys) {
    const size_t HS = size_t(s.HS), line = s.line, B = ATTENTION_BLOCK, room = attention_room(s, B), block = B * line;
    const bool diagonal = i == j;
    const size_t step = diagonal ? s.rows : s.tile, columns = j * attention_columns(s, B);
    for (size_t r = 0; r < queries; r += step) {
        const size_t m = queries - r < step ? queries - r : step, at = g * block + r * line;
        const size_t n = diagonal && r + m < keys ? r + m : keys;
        attention_scores(dev, s, w.S + r * room, room, w.Q + at, w.K_columns + columns, m, n);
        attention_scores(dev, s, w.dP + r * room, room, w.dO + at, w.V_columns + columns, m, n);
        attention_grad(dev, s, w, r * room, room, m, n, ptrdiff_t(diagonal ? r + 1 : keys), w.lse + g * B + r,
                       w.D + g * B + r);
        if (t.dq) {
            attention_values(dev, s, w.dQ + at, w.dS_left + r * room, room, w.K + j * block, m, HS, n, j > 0);
        }
    }
    for (size_t k = 0; t.dkv && k < keys; k += diagonal ? s.rows : keys) {
        const size_t m = !diagonal ? keys : keys - k < s.rows ? keys - k : s.rows;
        const size_t rest = queries - k;  // from the first query that sees any of these keys
        typename Dev::real *dV = w.dV + j * block + k * line, *dK = w.dK + j * block + k * line;
        const bool add = !diagonal || g > 0;
        attention_keys(dev, s, dV, w.P, room, w.dO_turned + g * block, k, m, rest, add);
        attention_keys(dev, s, dK, w.dS, room, w.Q_turned + g * block, k, m, rest, add);
    }
}

// Packs a block of queries of head h, the g-th of its group, with their lse and D.
template <class X, class Dev>
void attention_backward_queries(const Dev& dev, const AttentionShape& s, const AttentionBackwardSpace<Dev>& w,
                                const AttentionGradients<X>& a, const AttentionTask& t, size_t g, size_t h, size_t row,
                                size_t queries) {
    const size_t HS = size_t(s.HS), wide = size_t(s.NH) * HS, B = ATTENTION_BLOCK, at = g * B * s.line;
    const X *q = a.qkv + row * s.stride + h * HS, *dout = a.dout + row * wide + h * HS;
    attention_pack_left(dev, s, w.Q + at, q, s.stride, queries);
    attention_pack_left(dev, s, w.dO + at, dout, wide, queries);
    if (t.dkv) {
        attention_pack_turned(dev, s, w.Q_turned + at, q, s.stride, queries);
        attention_pack_turned(dev, s, w.dO_turned + at, dout, wide, queries);
    }
    for (size_t i = 0; i < queries; i++) {
        w.lse[g * B + i] = a.lse[h * a.N + row + i];
    }
    attention_dots(dev, s, w.D + g * B, w.dO + at, dout, wide, a.out + row * s.out_stride + h * HS, w.rows, queries);
}

template <class X, class Dev>
void attention_backward_task(const Dev& dev, const AttentionShape& s, const AttentionBackwardSpace<Dev>& w,
                             const AttentionGradients<X>& a, const AttentionTask& t) {
    using Real = typename Dev::real;
    const size_t HS = size_t(s.HS), B = ATTENTION_BLOCK, room = attention_room(s, B), block = B * s.line;
    const size_t group = size_t(s.NH / s.NKV), j1 = t.j1 < t.i1 ? t.j1 : t.i1;
    const size_t k_at = size_t(s.NH + t.kv) * HS, v_at = size_t(s.NH + s.NKV + t.kv) * HS;
    const Real scale = Real(s.scale);
    const auto lines = [&](size_t b) { return t.length - b * B < B ? t.length - b * B : B; };
    for (size_t j = t.j0; j < j1; j++) {
        const X* row = a.qkv + (t.first + j * B) * s.stride;
        const size_t columns = j * attention_columns(s, B);
        attention_pack_rows(dev, s, w.K + j * block, row + k_at, s.stride, lines(j));
        attention_pack_columns(dev, s, w.K_columns + columns, room, row + k_at, s.stride, lines(j), scale, w.rows);
        attention_pack_columns(dev, s, w.V_columns + columns, room, row + v_at, s.stride, lines(j), Real(1), w.rows);
    }
    for (size_t i = t.i0 > t.j0 ? t.i0 : t.j0; i < t.i1; i++) {
        const size_t row = t.first + i * B, queries = lines(i), h = size_t(t.kv) * group;
        for (size_t g = 0; g < group; g++) {
            attention_backward_queries(dev, s, w, a, t, g, h + g, row, queries);
        }
        for (size_t j = t.j0; j < j1 && j <= i; j++) {
            for (size_t g = 0; g < group; g++) {
                attention_backward_block(dev, s, w, t, g, i, j, queries, lines(j));
            }
        }
        for (size_t g = 0; t.dq && g < group; g++) {
            attention_store(dev, s, a.dqkv + row * a.dqkv_stride + (h + g) * HS, a.dqkv_stride, w.dQ + g * block,
                            queries, false, scale, w.rows);
        }
    }
    for (size_t j = t.j0; t.dkv && j < j1; j++) {
        X* row = a.dqkv + (t.first + j * B) * a.dqkv_stride;
        attention_store(dev, s, row + k_at, a.dqkv_stride, w.dK + j * block, lines(j), true, scale, w.rows);
        attention_store(dev, s, row + v_at, a.dqkv_stride, w.dV + j * block, lines(j), true, Real(1), w.rows);
    }
}

// dqkv (N, QKV), rows dqkv_stride apart, = the gradient for dout (N, NH*HS); out and lse as attention_forward left
// them.
template <class X>
void attention_backward(Cpu<X>& dev, X* dqkv, size_t dqkv_stride, const X* dout, const X* out, size_t out_stride,
                        const typename Cpu<X>::real* lse, const X* qkv, const Documents& docs, size_t N, int NH,
                        int NKV, int HS) {
    const AttentionPlan plan = attention_plan(dev.threads, docs.cu_seqlens, docs.count, NKV, true);
    const size_t longest = attention_longest(docs);
    const AttentionGradients<X> a = {dqkv, dqkv_stride, dout, out, lse, qkv, N};
    attention_in(dev, [&](const auto& arithmetic) {
        AttentionShape s = attention_shape(arithmetic, NH, NKV, HS);
        s.out_stride = out_stride;
        Arena arena = arena_of(dev), one;
        attention_backward_space(arithmetic, one, s, longest);
        char* space = arena_take<char>(arena, one.used * size_t(dev.threads));
        parallel_tasks(dev.threads, plan.tasks, [&](size_t index, int worker) {
            Arena mine = {space + one.used * size_t(worker), 0, one.used};
            attention_open(arithmetic);
            attention_backward_task(arithmetic, s, attention_backward_space(arithmetic, mine, s, longest), a,
                                    attention_task(plan, index, docs.cu_seqlens, NKV, true));
            attention_close(arithmetic);
        });
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
    Arena forward, backward;
    attention_in(dev, [&](const auto& arithmetic) {
        const AttentionShape s = attention_shape(arithmetic, NH, NKV, HS);
        attention_forward_space(arithmetic, forward, s, longest);
        attention_backward_space(arithmetic, backward, s, longest);
    });
    return (forward.used > backward.used ? forward.used : backward.used) * size_t(dev.threads);
}
