// Flash attention on tensor cores (mma.sync): bf16, head sizes 64 and 128, grouped queries, packed documents. The
// formulas are those of cpu/attention.h (Dao: FlashAttention-2, 2023); any other case goes to attention_plain.cuh.
//
// A block owns a tile of 128 rows of one document (queries, or keys in the dK/dV kernel) and one head, and walks over
// tiles of BN columns. A warp owns 16 * MT rows and all columns, so the softmax of a row stays in a quad of lanes:
//
//      columns: keys (dK/dV: queries) ->                forward, dQ: rows are queries; from key 0 to the diagonal
//        0      BN     2BN    3BN                       dK/dV: rows are keys; from the diagonal to the document's end,
//      +------+------+------+------+                    once for each query head of the group: dK and dV of a kv head
//   w0 | full | full | diag | skip |  16 * MT rows      are summed in registers, in one order, without atomics
//   w1 | full | full | diag | skip |
//   w2 | full | full | full | diag |
//      +------+------+------+------+
//
// A tile of scores is the accumulator of an mma, and packed to bf16 it is the A operand of the next: the accumulators
// of column groups 2k and 2k + 1 are a0, a1 and a2, a3 of step k. So P and dS never touch shared memory. The dK/dV
// kernel makes the transposes S^T = K Q^T and dP^T = V dO^T for the same reason. Seven products, two routines:
//
//      S = Q K^T,  dP = dO V^T    mma_rows      A: own rows in shared memory   B: rows of the column tile are its n
//      O += P V,   dQ += dS K     mma_scores    A: scores in registers         B: rows of the column tile are its k
//      and in dK/dV  S^T, dP^T by mma_rows,  dV += P^T dO,  dK += dS^T Q by mma_scores
//
// Column tiles come through a ring of two stages with one barrier a tile: wait for one's own copies; barrier (now all
// copies have landed, and all have left the other stage); start the next copies into the other stage; compute.
//
// Rows past the end of a document are filled with zeros on the way in and not written on the way out, and need no other
// care: a key past the end lies above the diagonal of every real query; a query past the end has dO = 0, lse = delta =
// 0, so P = 1 adds 1 * 0 to dV, and dS = 1 * (0 - 0).
//
// 16 or 32 rows a warp (MT = 1, 2): each fragment of B that is read from shared memory feeds MT products. Where an mma
// takes about as long as that read (sm_80, 90, 100) a warp needs 32. On sm_86, 89, 120 it takes longer, and their 100
// KB of shared memory let few blocks in; there eight warps of 16 rows a block hide latency better than four of 32.
//
// careful: registers are the limit (255 a thread). Addresses written out in every step, a clamp on an address that is
// not read, or a division in the loop, made these kernels spill. Look at nvcc -Xptxas -v after every change.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/attention_plain.cuh"
#include "kernels/gpu.h"
#include "kernels/workspace.cuh"

constexpr int ATTENTION_ROWS = 128;  // of a tile
constexpr float LOG2_E = 1.44269504f;

// What a block works on: rows tile * 128 .. of the document of `length` tokens that begins at token `first`.
struct AttentionTile {
    int32_t first, length, tile;
};

// Of a query row, for the backward kernels: log-sum-exp in powers of two, and delta = rowsum(dO O).
struct RowStatistics {
    float lse2, delta;
};

// The number of the thread, for offsets that are to be computed anew at each use: kept in registers over the products,
// a few of them are enough to make a kernel spill.
__device__ __forceinline__ int thread_anew() {
    int thread = int(threadIdx.x);
    opaque(thread);
    return thread;
}

// ----------------------------------------------------------------------------
// tiles in shared memory: rows of HS bf16 are HS / 8 chunks of 16 bytes; chunk c of row r lies at c ^ (r % 8), so that
// the eight rows of any 8x8 matrix are in eight different groups of four banks

template <int HS>
__device__ __forceinline__ int swizzled(int row, int chunk) {
    return row * HS + ((chunk ^ (row & 7)) << 3);
}

// Starts the copies of ROWS rows from row0 on; all but the first `real` become zeros.
template <int HS, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(bf16* tile, const bf16* in, int stride, int row0, int real) {
    constexpr int CHUNKS = HS / 8, STEP = THREADS / CHUNKS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "the rows of a thread share their swizzle");
    const int thread = thread_anew();
    const int row = thread / CHUNKS, chunk = thread % CHUNKS;
    tile += swizzled<HS>(row, chunk);
    // careful: may be past the end of the array, and is not read then
    in += size_t(row0 + row) * size_t(stride) + size_t(chunk * 8);
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP) {
        cp_async_16_or_zero(tile + i * HS, in + size_t(i) * size_t(stride), row + i < real);
    }
}

// Where a lane points in a 16x16 block for ldmatrix_x4. 16 rows further is an addition, 16 columns further flips bits
// (^ k << 4), so one register serves all steps of a product.
template <int HS>
__device__ __forceinline__ int lane_in_rows() {  // A operand; B operand by ldmatrix_x4_trans: rows of the tile are k
    const int lane = thread_anew() % 32;
    return swizzled<HS>(lane % 16, lane / 16);
}
template <int HS>
__device__ __forceinline__ int lane_in_columns() {  // B operand: rows of the tile are n
    const int lane = thread_anew() % 32;
    return swizzled<HS>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// ----------------------------------------------------------------------------
// the two products. c[i][j] is the 16x8 accumulator of row group i, column group j

// Every row group of a, and the pair of column groups in b.
template <int MT, int NT>
__device__ __forceinline__ void mma_pair(float (&c)[MT][NT][4], int pair, const uint32_t (&a)[MT][4],
                                         const uint32_t (&b)[4]) {
#pragma unroll
    for (int i = 0; i < MT; i++) {
        mma_16816(c[i][2 * pair], a[i], b[0], b[1]);
        mma_16816(c[i][2 * pair + 1], a[i], b[2], b[3]);
    }
}

// c (16 MT, 8 NT) += A B^T over the head: the warp's rows of one tile, the first 8 NT rows of another.
template <int HS, int MT, int NT>
__device__ __forceinline__ void mma_rows(float (&c)[MT][NT][4], const bf16* A, const bf16* B) {
    const int at_a = lane_in_rows<HS>(), at_b = lane_in_columns<HS>();
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        uint32_t a[MT][4], b[4];
#pragma unroll
        for (int i = 0; i < MT; i++) {
            ldmatrix_x4(a[i], A + i * 16 * HS + (at_a ^ (k << 4)));
        }
#pragma unroll
        for (int j = 0; j < NT / 2; j++) {
            ldmatrix_x4(b, B + j * 16 * HS + (at_b ^ (k << 4)));
            mma_pair(c, j, a, b);
        }
    }
}

// c (16 MT, HS) += P B: scores (16 MT, 8 NT) rounded to bf16, and the first 8 NT rows of a tile.
template <int HS, int MT, int NT>
__device__ __forceinline__ void mma_scores(float (&c)[MT][HS / 8][4], const float (&p)[MT][NT][4], const bf16* B) {
    const int at_b = lane_in_rows<HS>();
#pragma unroll
    for (int k = 0; k < NT / 2; k++) {
        uint32_t a[MT][4], b[4];
#pragma unroll
        for (int i = 0; i < MT; i++) {
            a[i][0] = pack_bf16x2(p[i][2 * k][0], p[i][2 * k][1]);
            a[i][1] = pack_bf16x2(p[i][2 * k][2], p[i][2 * k][3]);
            a[i][2] = pack_bf16x2(p[i][2 * k + 1][0], p[i][2 * k + 1][1]);
            a[i][3] = pack_bf16x2(p[i][2 * k + 1][2], p[i][2 * k + 1][3]);
        }
#pragma unroll
        for (int j = 0; j < HS / 16; j++) {
            ldmatrix_x4_trans(b, B + k * 16 * HS + (at_b ^ (j << 4)));
            mma_pair(c, j, a, b);
        }
    }
}

// ----------------------------------------------------------------------------
// on accumulators. Element e of a group: row lane / 4 + e / 2 * 8, column 2 (lane % 4) + e % 2

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// Scores of keys behind their query become -inf. row0, column0: where the tile stands in the document.
template <int MT, int NT, bool ROWS_ARE_KEYS>
__device__ __forceinline__ void mask_scores(float (&s)[MT][NT][4], int row0, int column0) {
    const int lane = int(threadIdx.x) % 32, ahead = column0 + 2 * (lane % 4) - row0 - lane / 4;  // of element 0
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int d = ahead + j * 8 + e % 2 - i * 16 - e / 2 * 8;  // column - row
                if (ROWS_ARE_KEYS ? d < 0 : d > 0) {
                    s[i][j][e] = -INFINITY;
                }
            }
        }
    }
}

// One step of the online softmax: s becomes P relative to 2^(scale2 top). `sum` is of this lane's columns alone.
// `top` need not be the greatest score: it follows only when some row of the warp has outgrown it by 2^8, so most steps
// leave sum and o as they are. P is then at most 2^8, and bf16 and fp32 hold that with the same relative error.
template <int HS, int MT, int NT>
__device__ __forceinline__ void softmax_step(float (&s)[MT][NT][4], float (&top)[MT][2], float (&sum)[MT][2],
                                             float (&o)[MT][HS / 8][4], float scale2) {
    constexpr float SLACK = 8;
    float higher[MT][2];
    bool outgrown = false;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float x = top[i][r];
#pragma unroll
            for (int j = 0; j < NT; j++) {
                x = fmaxf(x, fmaxf(s[i][j][2 * r], s[i][j][2 * r + 1]));
            }
            higher[i][r] = quad_max(x);  // finite: key 0 is in the first tile, and every row sees it
            outgrown |= (higher[i][r] - top[i][r]) * scale2 > SLACK;
        }
    }
    if (__any_sync(ALL_LANES, outgrown)) {
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float shrink = exp2_approx((top[i][r] - higher[i][r]) * scale2);
                top[i][r] = higher[i][r];
                sum[i][r] *= shrink;
#pragma unroll
                for (int j = 0; j < HS / 8; j++) {
                    o[i][j][2 * r] *= shrink;
                    o[i][j][2 * r + 1] *= shrink;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float top2 = top[i][r] * scale2;
            float add = 0;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                s[i][j][2 * r] = exp2_approx(fmaf(s[i][j][2 * r], scale2, -top2));
                s[i][j][2 * r + 1] = exp2_approx(fmaf(s[i][j][2 * r + 1], scale2, -top2));
                add += s[i][j][2 * r] + s[i][j][2 * r + 1];
            }
            sum[i][r] += add;
        }
    }
}

// The warp's rows, as bf16, in whole chunks: factor[i][r] * c. own: the warp's own rows of a tile that no other warp
// reads, so barriers of the warp are enough: before, for lanes that have not read them yet, and behind.
template <int HS, int MT>
__device__ __forceinline__ void store_rows(bf16* out, size_t stride, int row0, int real, bf16* own,
                                           const float (&c)[MT][HS / 8][4], const float (&factor)[MT][2]) {
    const int lane = int(threadIdx.x) % 32;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < HS / 8; j++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                bf16* two = own + swizzled<HS>(i * 16 + r * 8 + lane / 4, j) + 2 * (lane % 4);
                *reinterpret_cast<uint32_t*>(two) =
                    pack_bf16x2(c[i][j][2 * r] * factor[i][r], c[i][j][2 * r + 1] * factor[i][r]);
            }
        }
    }
    __syncwarp();
#pragma unroll
    for (int at = lane; at < 16 * MT * HS / 8; at += 32) {
        const int row = at / (HS / 8), chunk = at % (HS / 8);
        if (row < real) {
            *reinterpret_cast<uint4*>(out + size_t(row0 + row) * stride + size_t(chunk * 8)) =
                *reinterpret_cast<const uint4*>(own + swizzled<HS>(row, chunk));
        }
    }
}

// ----------------------------------------------------------------------------
// CUDA kernels. Block b: tile b / heads, head b % heads. The heads of a group run side by side and share K and V in L2;
// tiles come longest first.

// Next stage of the ring: keys and values from key0 of the document on. to_v: from K to V in a row of qkv.
template <int HS, int BN, int THREADS>
__device__ __forceinline__ void load_keys(bf16* stage, const bf16* k, int to_v, int stride, const AttentionTile& t,
                                          int key0) {
    load_tile<HS, BN, THREADS>(stage, k, stride, t.first + key0, t.length - key0);
    load_tile<HS, BN, THREADS>(stage + BN * HS, k + to_v, stride, t.first + key0, t.length - key0);
    cp_async_commit();
}

template <int HS, int MT, int BN>
__global__ void __launch_bounds__(ATTENTION_ROWS / MT * 2)
    attention_forward_kernel(bf16* out, size_t out_stride, float* lse, const bf16* qkv, const AttentionTile* tiles,
                             size_t N, int NH, int NKV, float scale, float scale2) {
    constexpr int ROWS = 16 * MT, THREADS = ATTENTION_ROWS / MT * 2, NT = BN / 8;
    DYN_SHARED(bf16, Q);
    bf16* ring = Q + ATTENTION_ROWS * HS;  // two stages of K, V
    const AttentionTile t = tiles[blockIdx.x / unsigned(NH)];
    const int h = int(blockIdx.x % unsigned(NH)), kv = h / (NH / NKV);
    const int lane = int(threadIdx.x) % 32, own = int(threadIdx.x) / 32 * ROWS;  // the warp's first row in the tile
    const int row0 = t.tile * ATTENTION_ROWS, row = row0 + own;                  // and in the document
    const int stride = (NH + 2 * NKV) * HS;
    const bf16* k = qkv + size_t(NH + kv) * HS;
    const int keys = min(row0 + ATTENTION_ROWS, t.length);

    load_tile<HS, ATTENTION_ROWS, THREADS>(Q, qkv + size_t(h) * HS, stride, t.first + row0, t.length - row0);
    load_keys<HS, BN, THREADS>(ring, k, NKV * HS, stride, t, 0);
    float o[MT][HS / 8][4] = {}, top[MT][2], sum[MT][2] = {};
#pragma unroll
    for (int i = 0; i < MT; i++) {
        top[i][0] = top[i][1] = -INFINITY;
    }
    for (int key0 = 0; key0 < keys; key0 += BN) {
        const int stage = (key0 & BN) * 2 * HS;  // 0 and 2 BN HS by turns
        cp_async_wait<0>();
        __syncthreads();
        if (key0 + BN < keys) {
            load_keys<HS, BN, THREADS>(ring + (stage ^ 2 * BN * HS), k, NKV * HS, stride, t, key0 + BN);
        }
        if (key0 > row + ROWS - 1) {
            continue;  // all above the diagonal of this warp
        }
        float s[MT][NT][4] = {};
        mma_rows<HS, MT, NT>(s, Q + own * HS, ring + stage);
        if (key0 + BN - 1 > row) {
            mask_scores<MT, NT, false>(s, row, key0);
        }
        softmax_step<HS, MT, NT>(s, top, sum, o, scale2);
        mma_scores<HS, MT, NT>(o, s, ring + stage + BN * HS);
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int at = row + i * 16 + r * 8 + lane / 4;
            const float all = quad_sum(sum[i][r]);
            if (lane % 4 == 0 && at < t.length) {
                lse[size_t(h) * N + size_t(t.first + at)] = top[i][r] * scale + logf(all);
            }
            sum[i][r] = 1 / all;
        }
    }
    store_rows<HS, MT>(out + size_t(h) * HS, out_stride, t.first + row, t.length - row, Q + own * HS, o, sum);
}

// rowsum(dO O) of the row that a quad of lanes shares.
template <int HS>
__device__ __forceinline__ float quad_delta(const bf16* dout, const bf16* out) {
    float sum = 0;
#pragma unroll
    for (int chunk = 0; chunk < HS / 32; chunk++) {
        const int at = (chunk * 4 + int(threadIdx.x) % 4) * 8;
        const uint4 a = *reinterpret_cast<const uint4*>(dout + at), b = *reinterpret_cast<const uint4*>(out + at);
        sum = fmaf(bf16_low(a.x), bf16_low(b.x), fmaf(bf16_high(a.x), bf16_high(b.x), sum));
        sum = fmaf(bf16_low(a.y), bf16_low(b.y), fmaf(bf16_high(a.y), bf16_high(b.y), sum));
        sum = fmaf(bf16_low(a.z), bf16_low(b.z), fmaf(bf16_high(a.z), bf16_high(b.z), sum));
        sum = fmaf(bf16_low(a.w), bf16_low(b.w), fmaf(bf16_high(a.w), bf16_high(b.w), sum));
    }
    return quad_sum(sum);
}

// dQ, by the walk of the forward. It runs first, and leaves the statistics (NH, N) of its rows for the dK/dV kernel; it
// reads out and dO for them while its tiles are under way.
template <int HS, int MT, int BN>
__global__ void __launch_bounds__(ATTENTION_ROWS / MT * 2)
    attention_dq_kernel(bf16* dqkv, size_t dqkv_stride, RowStatistics* statistics, const bf16* dout, const bf16* out,
                        size_t out_stride, const float* lse, const bf16* qkv, const AttentionTile* tiles, size_t N,
                        int NH, int NKV, float scale, float scale2) {
    constexpr int ROWS = 16 * MT, THREADS = ATTENTION_ROWS / MT * 2, NT = BN / 8;
    DYN_SHARED(bf16, Q);
    bf16 *dO = Q + ATTENTION_ROWS * HS, *ring = dO + ATTENTION_ROWS * HS;  // two stages of K, V
    RowStatistics* rows = reinterpret_cast<RowStatistics*>(ring + 4 * BN * HS);
    const AttentionTile t = tiles[blockIdx.x / unsigned(NH)];
    const int kv = int(blockIdx.x % unsigned(NH)) / (NH / NKV);
    int h = int(blockIdx.x % unsigned(NH));
    const int lane = int(threadIdx.x) % 32, own = int(threadIdx.x) / 32 * ROWS;
    const int row0 = t.tile * ATTENTION_ROWS, row = row0 + own;
    const int stride = (NH + 2 * NKV) * HS, dout_stride = NH * HS;
    const bf16* k = qkv + size_t(NH + kv) * HS;
    const int keys = min(row0 + ATTENTION_ROWS, t.length);

    load_tile<HS, ATTENTION_ROWS, THREADS>(Q, qkv + size_t(h) * HS, stride, t.first + row0, t.length - row0);
    load_tile<HS, ATTENTION_ROWS, THREADS>(dO, dout + size_t(h) * HS, dout_stride, t.first + row0, t.length - row0);
    load_keys<HS, BN, THREADS>(ring, k, NKV * HS, stride, t, 0);
    for (int i = lane / 4; i < ROWS; i += 8) {
        const bool real = row + i < t.length;
        const size_t token = size_t(t.first + (real ? row + i : 0));  // all lanes of a quad must take part in its sum
        const float delta = quad_delta<HS>(dout + token * size_t(dout_stride) + size_t(h) * HS,
                                           out + token * out_stride + size_t(h) * HS);
        if (lane % 4 == 0) {
            const RowStatistics y = {lse[size_t(h) * N + token] * LOG2_E, delta};
            rows[own + i] = real ? y : RowStatistics{0, 0};
            if (real) {
                statistics[size_t(h) * N + token] = y;
            }
        }
    }
    float dq[MT][HS / 8][4] = {};
    for (int key0 = 0; key0 < keys; key0 += BN) {
        const int stage = (key0 & BN) * 2 * HS;  // 0 and 2 BN HS by turns
        cp_async_wait<0>();
        __syncthreads();
        if (key0 + BN < keys) {
            load_keys<HS, BN, THREADS>(ring + (stage ^ 2 * BN * HS), k, NKV * HS, stride, t, key0 + BN);
        }
        if (key0 > row + ROWS - 1) {
            continue;
        }
        float s[MT][NT][4] = {}, dp[MT][NT][4] = {};
        mma_rows<HS, MT, NT>(s, Q + own * HS, ring + stage);
        if (key0 + BN - 1 > row) {
            mask_scores<MT, NT, false>(s, row, key0);
        }
        const int own_anew = thread_anew() / 32 * ROWS;  // see thread_anew
        mma_rows<HS, MT, NT>(dp, dO + own_anew * HS, ring + stage + BN * HS);
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int thread = thread_anew();
                const RowStatistics y = rows[thread / 32 * ROWS + i * 16 + r * 8 + thread % 32 / 4];
#pragma unroll
                for (int j = 0; j < NT; j++) {
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; e++) {
                        s[i][j][e] = exp2_approx(fmaf(s[i][j][e], scale2, -y.lse2)) * (dp[i][j][e] - y.delta);
                    }
                }
            }
        }
        mma_scores<HS, MT, NT>(dq, s, ring + stage);
    }
    float factor[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++) {
        factor[i][0] = factor[i][1] = scale;
    }
    opaque(h);  // what follows from it is not kept over the loop
    store_rows<HS, MT>(dqkv + size_t(h) * HS, dqkv_stride, t.first + row, t.length - row, Q + own * HS, dq, factor);
}

// Of the dK/dV kernel: Q, dO and statistics of BN queries, in bf16.
template <int HS, int BN>
constexpr int DKV_STAGE = (2 * HS + int(sizeof(RowStatistics) / sizeof(bf16))) * BN;

// The column tiles of a dK/dV block: queries from `first` on, for one head of the group after the other.
struct QueryWalk {
    int query, head;
};

// Next stage of the ring: Q, dO and statistics of BN queries; `walk` moves on.
template <int HS, int BN, int THREADS>
__device__ __forceinline__ void load_queries(bf16* stage, QueryWalk& walk, int first, const bf16* qkv, int stride,
                                             const bf16* dout, int dout_stride, const RowStatistics* statistics,
                                             size_t N, const AttentionTile& t) {
    const int row = t.first + walk.query, real = t.length - walk.query, thread = int(threadIdx.x);
    load_tile<HS, BN, THREADS>(stage, qkv + size_t(walk.head) * HS, stride, row, real);
    load_tile<HS, BN, THREADS>(stage + BN * HS, dout + size_t(walk.head) * HS, dout_stride, row, real);
    if (thread < BN) {
        cp_async_8_or_zero(reinterpret_cast<RowStatistics*>(stage + 2 * BN * HS) + thread,
                           statistics + size_t(walk.head) * N + size_t(row + thread), thread < real);
    }
    cp_async_commit();
    walk.query += BN;
    if (walk.query >= t.length) {
        walk.query = first;
        walk.head++;
    }
}

// dK and dV of a kv head. Scores are transposed: keys down, queries across.
template <int HS, int MT, int BN>
__global__ void __launch_bounds__(ATTENTION_ROWS / MT * 2)
    attention_dkv_kernel(bf16* dqkv, size_t dqkv_stride, const bf16* dout, const RowStatistics* statistics,
                         const bf16* qkv, const AttentionTile* tiles, size_t N, int NH, int NKV, float scale,
                         float scale2) {
    constexpr int ROWS = 16 * MT, THREADS = ATTENTION_ROWS / MT * 2, NT = BN / 8;
    constexpr int STAGE = DKV_STAGE<HS, BN>;
    DYN_SHARED(bf16, K);
    bf16 *V = K + ATTENTION_ROWS * HS, *ring = V + ATTENTION_ROWS * HS;  // two stages of Q, dO, statistics
    const AttentionTile t = tiles[blockIdx.x / unsigned(NKV)];
    const int group = NH / NKV;
    int kv = int(blockIdx.x % unsigned(NKV));
    const int lane = int(threadIdx.x) % 32, own = int(threadIdx.x) / 32 * ROWS;
    const int row0 = t.tile * ATTENTION_ROWS, row = row0 + own;
    const int stride = (NH + 2 * NKV) * HS, dout_stride = NH * HS;

    QueryWalk next = {row0, kv * group};
    const bf16* k = qkv + size_t(NH + kv) * HS;
    load_tile<HS, ATTENTION_ROWS, THREADS>(K, k, stride, t.first + row0, t.length - row0);
    load_tile<HS, ATTENTION_ROWS, THREADS>(V, k + NKV * HS, stride, t.first + row0, t.length - row0);
    int query = next.query;
    load_queries<HS, BN, THREADS>(ring, next, row0, qkv, stride, dout, dout_stride, statistics, N, t);
    float dk[MT][HS / 8][4] = {}, dv[MT][HS / 8][4] = {};
    bool more = true;
    for (int stage = 0; more; stage = STAGE - stage) {
        const int here = query;
        query = next.query;
        cp_async_wait<0>();
        __syncthreads();
        more = next.head < (kv + 1) * group;
        if (more) {
            load_queries<HS, BN, THREADS>(ring + (STAGE - stage), next, row0, qkv, stride, dout, dout_stride,
                                          statistics, N, t);
        }
        if (here + BN - 1 < row) {
            continue;  // all queries before the keys of this warp
        }
        const bf16 *Q = ring + stage, *dO = Q + BN * HS;
        const float4* two = reinterpret_cast<const float4*>(dO + BN * HS) + lane % 4;  // of queries 2t, 2t + 1
        float s[MT][NT][4] = {};
        mma_rows<HS, MT, NT>(s, K + own * HS, Q);
        if (here < row + ROWS - 1) {
            mask_scores<MT, NT, true>(s, row, here);
        }
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const float4 y = two[j * 4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[i][j][e] = exp2_approx(fmaf(s[i][j][e], scale2, e % 2 ? -y.z : -y.x));
                }
            }
        }
        mma_scores<HS, MT, NT>(dv, s, dO);
        float dp[MT][NT][4] = {};
        mma_rows<HS, MT, NT>(dp, V + own * HS, dO);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const float4 y = two[j * 4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[i][j][e] *= dp[i][j][e] - (e % 2 ? y.w : y.y);
                }
            }
        }
        mma_scores<HS, MT, NT>(dk, s, Q);
    }
    float factor[MT][2], one[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++) {
        factor[i][0] = factor[i][1] = scale;
        one[i][0] = one[i][1] = 1;
    }
    opaque(kv);  // what follows from it is not kept over the loop
    dqkv += size_t(NH + kv) * HS;
    store_rows<HS, MT>(dqkv, dqkv_stride, t.first + row, t.length - row, K + own * HS, dk, factor);
    store_rows<HS, MT>(dqkv + NKV * HS, dqkv_stride, t.first + row, t.length - row, V + own * HS, dv, one);
}

// ----------------------------------------------------------------------------
// kernel launchers

// Columns of a tile. 64 at head size 128 would need more than the 99 KB that a block may have on sm_86, 89 and 120 in
// the dQ kernel; in the forward it fits, but leaves one block of four warps on sm_80 (version 5 of
// dev/attention_forward).
constexpr int attention_columns(int HS) {
    return HS == 64 ? 64 : 32;
}
constexpr int ATTENTION_DKV_COLUMNS = 32;

// Whether a warp takes 16 rows in the forward and dQ kernels, for the reason at the top of the file.
inline bool attention_many_warps(const GpuInfo& info) {
    return info.arch == 86 || info.arch == 89 || info.arch >= 120;
}

inline bool aligned_16(const void* p, size_t stride) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 8 == 0;
}

// Tiles of every document, those with most columns first. keys: a tile of keys is met by the queries behind it.
inline void attention_tiles(std::vector<AttentionTile>& tiles, const int32_t* cu_seqlens, int count, bool keys) {
    tiles.clear();
    for (int d = 0; d < count; d++) {
        const int32_t first = cu_seqlens[d], length = cu_seqlens[d + 1] - first;
        for (int32_t tile = 0; tile * ATTENTION_ROWS < length; tile++) {
            tiles.push_back({first, length, tile});
        }
    }
    const auto columns = [keys](const AttentionTile& t) {
        return keys ? t.length - t.tile * ATTENTION_ROWS : std::min(t.length, (t.tile + 1) * ATTENTION_ROWS);
    };
    std::stable_sort(tiles.begin(), tiles.end(),
                     [&](const AttentionTile& a, const AttentionTile& b) { return columns(a) > columns(b); });
}

// memory: document_ints(N) ints of the device: cu_seqlens (count + 1), then the lists of tiles, 3 ints a tile. The
// forward and dQ kernels walk alike and share a list. The plain kernels read cu_seqlens alone.
template <class X>
Documents documents_place(Gpu<X>& dev, int32_t* memory, const int32_t* cu_seqlens, int count, int) {
    Documents docs;
    docs.cu_seqlens = memory;
    docs.count = count;
    std::vector<int32_t> ints(cu_seqlens, cu_seqlens + count + 1);
    std::vector<AttentionTile> tiles;
    for (int list : {0, 2}) {
        attention_tiles(tiles, cu_seqlens, count, list == 2);
        docs.tiles[list] = memory + ints.size();
        docs.tile_count[list] = int(tiles.size());
        for (const AttentionTile& t : tiles) {
            ints.insert(ints.end(), {t.first, t.length, t.tile});
        }
    }
    docs.tiles[1] = docs.tiles[0];
    docs.tile_count[1] = docs.tile_count[0];
    device_to(dev, memory, ints.data(), ints.size() * sizeof(int32_t));
    return docs;
}

inline const AttentionTile* tiles_of(const Documents& docs, int list) {
    return reinterpret_cast<const AttentionTile*>(docs.tiles[list]);
}

inline float attention_scale(int HS) {
    return float(1 / std::sqrt(double(HS)));
}

template <int HS, int MT, int BN = attention_columns(HS)>
void attention_forward_tiles(Gpu<bf16>& dev, bf16* out, size_t out_stride, float* lse, const bf16* qkv,
                             const Documents& docs, size_t N, int NH, int NKV) {
    constexpr size_t shared = size_t(ATTENTION_ROWS + 4 * BN) * HS * sizeof(bf16);
    const dim3 grid(unsigned(docs.tile_count[0]) * unsigned(NH));
    LAUNCH((attention_forward_kernel<HS, MT, BN>), grid, ATTENTION_ROWS / MT * 2, shared, dev.stream, out, out_stride,
           lse, qkv, tiles_of(docs, 0), N, NH, NKV, attention_scale(HS), attention_scale(HS) * LOG2_E);
}

template <int HS, int MT, int DKV_MT>
void attention_backward_tiles(Gpu<bf16>& dev, bf16* dqkv, size_t dqkv_stride, RowStatistics* statistics,
                              const bf16* dout, const bf16* out, size_t out_stride, const float* lse, const bf16* qkv,
                              const Documents& docs, size_t N, int NH, int NKV) {
    constexpr int BN = attention_columns(HS);
    constexpr size_t shared =
        size_t(2 * ATTENTION_ROWS + 4 * BN) * HS * sizeof(bf16) + ATTENTION_ROWS * sizeof(RowStatistics);
    const dim3 grid(unsigned(docs.tile_count[1]) * unsigned(NH));
    LAUNCH((attention_dq_kernel<HS, MT, BN>), grid, ATTENTION_ROWS / MT * 2, shared, dev.stream, dqkv, dqkv_stride,
           statistics, dout, out, out_stride, lse, qkv, tiles_of(docs, 1), N, NH, NKV, attention_scale(HS),
           attention_scale(HS) * LOG2_E);
    constexpr int BN_DKV = ATTENTION_DKV_COLUMNS;
    constexpr size_t shared_dkv = size_t(2 * ATTENTION_ROWS * HS + 2 * DKV_STAGE<HS, BN_DKV>) * sizeof(bf16);
    const dim3 grid_dkv(unsigned(docs.tile_count[2]) * unsigned(NKV));
    LAUNCH((attention_dkv_kernel<HS, DKV_MT, BN_DKV>), grid_dkv, ATTENTION_ROWS / DKV_MT * 2, shared_dkv, dev.stream,
           dqkv, dqkv_stride, dout, statistics, qkv, tiles_of(docs, 2), N, NH, NKV, attention_scale(HS),
           attention_scale(HS) * LOG2_E);
}

// Tensor cores take head sizes 64 and 128, and rows whose 16-byte chunks are aligned: `rows` says that.
inline bool attention_by_tiles(int HS, bool rows) {
    return (HS == 64 || HS == 128) && rows;
}

// out (N, NH*HS), rows out_stride apart, lse (NH, N) = of qkv (N, (NH + 2 NKV) HS). No document is empty.
template <class X>
void attention_forward(Gpu<X>& dev, X* out, size_t out_stride, float* lse, const X* qkv, const Documents& docs,
                       size_t N, int NH, int NKV, int HS) {
    if constexpr (std::is_same<X, bf16>::value) {
        if (attention_by_tiles(HS, aligned_16(out, out_stride) && aligned_16(qkv, 0))) {
            const bool many = attention_many_warps(dev.info);
            const auto tiles_64 = many ? attention_forward_tiles<64, 1> : attention_forward_tiles<64, 2>;
            const auto tiles_128 = many ? attention_forward_tiles<128, 1> : attention_forward_tiles<128, 2>;
            return (HS == 64 ? tiles_64 : tiles_128)(dev, out, out_stride, lse, qkv, docs, N, NH, NKV);
        }
    }
    attention_plain_forward(dev.stream, out, out_stride, lse, qkv,
                            plain_attention(docs.cu_seqlens, docs.count, N, NH, NKV, HS));
}

// dqkv (N, (NH + 2 NKV) HS), rows dqkv_stride apart, = the gradient for dout (N, NH*HS); out and lse as
// attention_forward left them. Workspace: attention_workspace.
template <class X>
void attention_backward(Gpu<X>& dev, X* dqkv, size_t dqkv_stride, const X* dout, const X* out, size_t out_stride,
                        const float* lse, const X* qkv, const Documents& docs, size_t N, int NH, int NKV, int HS) {
    Workspace w = workspace_of(dev);
    RowStatistics* statistics = workspace_take<RowStatistics>(w, N * size_t(NH));
    if constexpr (std::is_same<X, bf16>::value) {
        if (attention_by_tiles(HS, aligned_16(dqkv, dqkv_stride) && aligned_16(dout, 0) &&
                                       aligned_16(out, out_stride) && aligned_16(qkv, 0))) {
            const bool many = attention_many_warps(dev.info);
            const auto tiles_64 = many ? attention_backward_tiles<64, 1, 2> : attention_backward_tiles<64, 2, 2>;
            const auto tiles_128 = many ? attention_backward_tiles<128, 1, 1> : attention_backward_tiles<128, 2, 1>;
            return (HS == 64 ? tiles_64 : tiles_128)(dev, dqkv, dqkv_stride, statistics, dout, out, out_stride, lse,
                                                     qkv, docs, N, NH, NKV);
        }
    }
    attention_plain_backward(dev.stream, dqkv, dqkv_stride, &statistics->lse2, dout, out, out_stride, lse, qkv,
                             plain_attention(docs.cu_seqlens, docs.count, N, NH, NKV, HS));
}

// Of the backward: the statistics of each query row and head. The plain kernels keep delta alone there.
template <class X>
size_t attention_workspace(const Gpu<X>&, size_t N, size_t, int NH, int, int) {
    Workspace w;
    workspace_take<RowStatistics>(w, N * size_t(NH));
    return w.used;
}
