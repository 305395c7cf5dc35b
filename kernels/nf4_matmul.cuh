// Products of activations with packed NF4 matrices that dequantise as they go: W is never written as 16 bit.
//
//   forward    y (M, rows) = x[:, :cols + R] [W | B]^T [+ residual]
//   backward   dx (M, cols) = dy[:, :rows + R] [W ; A]
//
// mma.sync m16n8k16, fp32 sums; the weights are the A operand, decoded in registers, the tokens the B operand. So a
// product is computed as its transpose: a "feature" is an output column of y or dx, and a "slice" is 64 steps of the
// contraction. Up to three matrices that lie one below the other are one product; columns R of adapters are more
// slices, of 16-bit weights. nf4.cuh has the packed order and the rule of a weight; not here: dense products
// (matmul.cuh) and the choice between the two (linear.cuh).
//
//   block:  32 * ROW_WARPS features x TOKENS tokens
//   warp:   32 features x TOKENS tokens, every SLICE_WARPS-th slice; each weight is decoded once in a block
//   shared: the parts | stage 0 | stage 1 | ...     a stage is what a step reads:
//           tokens [SLICE_WARPS][TOKENS][128 bytes], 16-byte chunk c of row r at c ^ (r % 8), | codes, whole supertiles
//
// Copies into the ring are asynchronous, STAGES - 1 steps ahead, with one barrier a step.
#pragma once
#include <climits>

#include "kernels/nf4.cuh"

// ----------------------------------------------------------------------------
// tiles

template <int TOKENS_, int ROW_WARPS_, int SLICE_WARPS_, int STAGES_, int BLOCKS_>
struct Nf4TileShape {
    static constexpr int TOKENS = TOKENS_, ROW_WARPS = ROW_WARPS_, SLICE_WARPS = SLICE_WARPS_, STAGES = STAGES_;
    // On a multiprocessor. Without it ptxas aims at more of them and spills.
    static constexpr int BLOCKS = BLOCKS_;
    static constexpr int FEATURES = 32 * ROW_WARPS, WARPS = ROW_WARPS * SLICE_WARPS, THREADS = 32 * WARPS;
    static constexpr int PARTS_BYTES = 26 * 128;
    static constexpr int TOKEN_BYTES = SLICE_WARPS * TOKENS * 128, STAGE_BYTES = TOKEN_BYTES + WARPS * 1024;
    static constexpr int SUM_BYTES = (SLICE_WARPS - 1) * ROW_WARPS * TOKENS * 32 * 4;
    // The output leaves through shared memory, in fp32, so many tokens at a time; 4 floats of padding against
    // conflicts.
    static constexpr int OUT_TOKENS = TOKENS < 64 ? TOKENS : 64, OUT_STRIDE = FEATURES + 4;
    static constexpr int greatest(int a, int b) { return a > b ? a : b; }
    static constexpr int OUT_BYTES = OUT_TOKENS * OUT_STRIDE * 4;
    static constexpr int SHARED_BYTES = PARTS_BYTES + greatest(STAGES * STAGE_BYTES, greatest(SUM_BYTES, OUT_BYTES));
    static_assert(SLICE_WARPS * TOKENS * 8 % THREADS == 0 && ROW_WARPS % 2 == 0,
                  "copies are whole rounds of the block");
};

// features x tokens
using Nf4Tile64x16 = Nf4TileShape<16, 2, 4, 4, 2>;
using Nf4Tile64x32 = Nf4TileShape<32, 2, 4, 3, 2>;
using Nf4Tile64x64 = Nf4TileShape<64, 2, 2, 3, 3>;
using Nf4Tile128x128 = Nf4TileShape<128, 4, 1, 3, 2>;
using Nf4Tile256x128 = Nf4TileShape<128, 8, 1, 3, 1>;

// ----------------------------------------------------------------------------
// the matrices of a launch, one below the other

struct alignas(16) Nf4Part {
    const uint8_t* codes = nullptr;
    const uint8_t* absmax8 = nullptr;  // nullptr: no double quantisation, absmax is absmax32; else absmax2
    const float* absmax = nullptr;
    const float* map8 = nullptr;
    float offset = 0;
    int rows = 0, begin = 0;  // its first row in the whole
};

// A block keeps these in shared memory: parts are told apart in every step, and neither an index into a kernel's
// arguments nor choosing each field is as cheap. Without double quantisation the map is all ones and the offset -0,
// which leave an absmax as it is, -0 too.
struct Nf4Parts {
    Nf4Part part[3];
    float map[3][256];
};

struct Nf4Product {
    Nf4Part part[3];
    int second, third;  // rows where those parts begin; INT_MAX: there is none
    int rows, cols;     // of all parts
    bf16* y;
    size_t ldy;
    const bf16* x;
    size_t ldx;
    int M;
    const bf16* adapter;  // forward B (rows, R), backward A (R, cols)
    int R;
    const bf16* residual;
    size_t ldr;
};

template <class Tile>
__device__ __forceinline__ void nf4_parts_load(Nf4Parts& parts, const Nf4Product& p) {
    for (int i = threadIdx.x; i < 3 * 256; i += Tile::THREADS) {
        const int k = i / 256;
        const float* map = k == 0 ? p.part[0].map8 : k == 1 ? p.part[1].map8 : p.part[2].map8;
        parts.map[k][i % 256] = map ? map[i % 256] : 1.0f;
    }
    if (threadIdx.x < 3) {
        parts.part[threadIdx.x] = threadIdx.x == 0 ? p.part[0] : threadIdx.x == 1 ? p.part[1] : p.part[2];
    }
    __syncthreads();
}

// Parts begin at multiples of 64 rows, so that what a warp reads at a time is of one part.
__device__ __forceinline__ int nf4_part(const Nf4Product& p, int row) {
    return int(row >= p.second) + int(row >= p.third);
}

// 512 bytes: rows row .. row + 15, cols 64 block .. of the whole.
__device__ __forceinline__ const uint8_t* nf4_supertile(const Nf4Parts& parts, const Nf4Product& p, int row,
                                                        int block) {
    const Nf4Part& part = parts.part[nf4_part(p, row)];
    return part.codes + size_t(unsigned(row - part.begin) / 16 * (unsigned(p.cols) / 64) + unsigned(block)) * 512;
}

// An absmax on its way: code 0 and its value where there is no double quantisation.
struct Nf4Absmax {
    uint32_t code;
    float value;
};

// Of rows row + lane, and 32 further down, in column block `block`; all are of one part.
template <int ROWS>
__device__ __forceinline__ void nf4_absmax_fetch(Nf4Absmax (&out)[ROWS], const Nf4Parts& parts, const Nf4Product& p,
                                                 int row, int lane, int block) {
    const Nf4Part& part = parts.part[nf4_part(p, row)];
    const unsigned local = unsigned(row - part.begin + lane), across = unsigned(p.cols) / 64;
    const unsigned at = unsigned(block) * unsigned(part.rows) + local;
    const uint8_t* absmax8 = part.absmax8;
    const float* absmax = part.absmax;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const unsigned number = (local + 32 * i) * across + unsigned(block);  // in bitsandbytes' order
        out[i].code = absmax8 ? __ldg(absmax8 + at + 32 * i) : 0;
        out[i].value = __ldg(absmax + (absmax8 ? number / 256 : at + 32 * i));
    }
}

__device__ __forceinline__ float nf4_absmax_restore(const Nf4Parts& parts, const Nf4Product& p, int row, Nf4Absmax a) {
    const int part = nf4_part(p, row);
    return nf4_restored(parts.map[part][a.code], a.value, parts.part[part].offset);
}

// ----------------------------------------------------------------------------
// where a thread stands

struct Nf4Place {
    int thread, lane, g, t;  // g = lane / 4, t = lane % 4
    int warp, row_warp, slice_warp;
    int first_feature, first_token;  // of the block
    int feature;                     // first of the warp
    int features;                    // of the product
    int slices, all_slices;          // of W; with the adapters'
    int blocks;                      // of 64 columns of W
};

template <bool BACKWARD, class Tile>
__device__ __forceinline__ Nf4Place nf4_place(const Nf4Product& p) {
    Nf4Place at;
    at.thread = threadIdx.x;
    at.lane = at.thread % 32;
    at.g = at.lane / 4;
    at.t = at.lane % 4;
    // Through a shuffle the compiler knows that it is the same in all lanes. Without, it compiled the main loop twice.
    at.warp = __shfl_sync(ALL_LANES, at.thread / 32, 0);
    at.row_warp = at.warp % Tile::ROW_WARPS;
    at.slice_warp = at.warp / Tile::ROW_WARPS;
    at.features = BACKWARD ? p.cols : p.rows;
    at.slices = (BACKWARD ? p.rows : p.cols) / 64;
    at.all_slices = at.slices + (p.R + 63) / 64;
    at.blocks = p.cols / 64;
    // Neighbouring blocks share their tokens, the larger operand.
    const unsigned across = (unsigned(at.features) + Tile::FEATURES - 1) / Tile::FEATURES;
    at.first_feature = int(blockIdx.x % across) * Tile::FEATURES;
    at.first_token = int(blockIdx.x / across) * Tile::TOKENS;
    at.feature = at.first_feature + 32 * at.row_warp;
    return at;
}

// ----------------------------------------------------------------------------
// copies of a step into its stage

// A thread copies one chunk of a row, then of the row ROUND further down, and so on through the slices. Rows behind the
// last token are left as they are: what comes of them is not written.
template <class Tile>
__device__ __forceinline__ void nf4_copy_tokens(unsigned char* stage, const Nf4Product& p, const Nf4Place& at,
                                                const bf16* from, int columns, int step) {
    constexpr int ROUND = Tile::THREADS / 8, ROUNDS = Tile::SLICE_WARPS * Tile::TOKENS / ROUND;
    const int row = at.thread / 8 % Tile::TOKENS, slice = at.thread / 8 / Tile::TOKENS;
    const int col = slice * 64 + at.thread % 8 * 8;
    unsigned char* to = stage + at.thread / 8 * 128 + ((at.thread % 8) ^ (row % 8)) * 16;
    from += step * (Tile::SLICE_WARPS * 64);
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int down = i * ROUND % Tile::TOKENS, further = i * ROUND / Tile::TOKENS;
        if ((step * Tile::SLICE_WARPS + further) * 64 + col < columns && at.first_token + row + down < p.M) {
            cp_async_16(to + i * ROUND * 128, from + further * 64);
        }
        // A running pointer: an address from its row takes six instructions more.
        if constexpr (ROUND < Tile::TOKENS) {
            const bool last = (i + 1) * ROUND % Tile::TOKENS == 0;
            from = last ? from - (Tile::TOKENS - ROUND) * p.ldx : from + ROUND * p.ldx;
        }
    }
}

// A warp copies two supertiles: forward of 2 ROW_WARPS row tiles a slice, backward of 4 row tiles a slice.
template <bool BACKWARD, class Tile>
__device__ __forceinline__ void nf4_copy_codes(unsigned char* stage, const Nf4Parts& parts, const Nf4Product& p,
                                               const Nf4Place& at, int step) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int supertile = at.warp + i * Tile::WARPS;
        int row, block;
        if (BACKWARD) {
            row = (step * Tile::SLICE_WARPS * 4 + supertile / (Tile::ROW_WARPS / 2)) * 16;
            block = at.first_feature / 64 + supertile % (Tile::ROW_WARPS / 2);
        } else {
            row = at.first_feature + supertile % (2 * Tile::ROW_WARPS) * 16;
            block = step * Tile::SLICE_WARPS + supertile / (2 * Tile::ROW_WARPS);
        }
        if (row < p.rows && block < at.blocks) {
            cp_async_16(stage + Tile::TOKEN_BYTES + supertile * 512 + at.lane * 16,
                        nf4_supertile(parts, p, row, block) + at.lane * 16);
        }
    }
}

// ----------------------------------------------------------------------------
// a slice

// sum += 32 features (fragments a of 16) x all tokens, over 16 of the contraction.
template <class Tile>
__device__ __forceinline__ void nf4_multiply(float (&sum)[2][Tile::TOKENS / 8][4], const uint32_t (&a)[2][4],
                                             const unsigned char* tokens, int lane, int k16) {
    const int row = lane % 8 + lane / 16 * 8, chunk = lane / 8 % 2;
    const unsigned char* from = tokens + row * 128 + ((k16 * 2 + chunk) ^ (lane % 8)) * 16;
#pragma unroll
    for (int j = 0; j < Tile::TOKENS / 16; j++) {
        uint32_t b[4];
        ldmatrix_x4(b, from + j * 16 * 128);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            mma_16816(sum[i][2 * j], a[i], b[0], b[1]);
            mma_16816(sum[i][2 * j + 1], a[i], b[2], b[3]);
        }
    }
}

// W: a lane's word is its fragment, byte r register r; even registers are of row 2g, odd ones of row 2g + 1.
template <class Tile>
__device__ __forceinline__ void nf4_slice_forward(float (&sum)[2][Tile::TOKENS / 8][4], const Nf4Place& at, float table,
                                                  float absmax, const unsigned char* tokens,
                                                  const unsigned char* codes) {
    float scale[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            scale[i][odd] = __shfl_sync(ALL_LANES, absmax, 16 * i + 2 * at.g + odd);
        }
    }
    const unsigned char* mine = codes + (at.slice_warp * Tile::ROW_WARPS + at.row_warp) * 1024 + at.lane * 16;
#pragma unroll 1  // unrolled, so much is moved ahead that registers spill
    for (int half = 0; half < 2; half++) {
        uint2 word[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            word[i] = *reinterpret_cast<const uint2*>(mine + i * 512 + half * 8);
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
            uint32_t a[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t bits = k ? word[i].y : word[i].x;
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    a[i][r] = nf4_pair(table, bits >> 8 * r, bits >> (8 * r + 4), scale[i][r % 2], scale[i][r % 2]);
                }
            }
            nf4_multiply<Tile>(sum, a, tokens, at.lane, 2 * half + k);
        }
    }
}

// W^T: a lane takes units (t, g) and (t + 4, g) of a tile, half g / 4 of the words of two other lanes. Register r is of
// column 2g + r % 2, the pair of rows 2t, 2t + 1, from 8 on in registers 2 and 3: nibbles r % 2 and r % 2 + 2 of a
// unit.
template <class Tile>
__device__ __forceinline__ void nf4_slice_backward(float (&sum)[2][Tile::TOKENS / 8][4], const Nf4Place& at,
                                                   float table, const float (&absmax)[2], const unsigned char* tokens,
                                                   const unsigned char* codes) {
    // 32 features are half a supertile: two tiles, 8 bytes of a lane.
    const unsigned char* mine = codes + at.row_warp / 2 * 512 + (4 * at.t + at.g % 4) * 16 + at.row_warp % 2 * 8;
    const uint32_t halves = at.g / 4 ? 0x7632 : 0x5410;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const unsigned char* supertile = mine + (at.slice_warp * 4 + k) * (Tile::ROW_WARPS / 2) * 512;
        const uint2 upper = *reinterpret_cast<const uint2*>(supertile);
        const uint2 lower = *reinterpret_cast<const uint2*>(supertile + 256);
        float scale[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            scale[r] = __shfl_sync(ALL_LANES, absmax[k / 2], 16 * (k % 2) + 2 * at.t + r % 2 + r / 2 * 8);
        }
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t bits = __byte_perm(i ? upper.y : upper.x, i ? lower.y : lower.x, halves);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int first = r / 2 * 16 + r % 2 * 4;
                a[i][r] = nf4_pair(table, bits >> first, bits >> (first + 8), scale[r / 2 * 2], scale[r / 2 * 2 + 1]);
            }
        }
        nf4_multiply<Tile>(sum, a, tokens, at.lane, k);
    }
}

__device__ __forceinline__ uint32_t bf16_pair(const bf16* p) {
    return *reinterpret_cast<const uint32_t*>(p);
}

// The adapters' columns: 16-bit weights straight from global memory. Few, so they are not copied ahead.
template <bool BACKWARD, class Tile>
__device__ __forceinline__ void nf4_slice_adapter(float (&sum)[2][Tile::TOKENS / 8][4], const Nf4Product& p,
                                                  const Nf4Place& at, const unsigned char* tokens, int slice) {
    int feature = at.feature + 2 * at.g;
    opaque(feature);  // or these rare addresses take registers through the whole loop
    const int first = (slice - at.slices) * 64;
#pragma unroll 1
    for (int k = 0; k < 4 && first + 16 * k < p.R; k++) {
        const int r = first + 16 * k + 2 * at.t;
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (BACKWARD) {  // A (R, features): pairs along r come from two rows
                const bf16* from = p.adapter + size_t(r) * at.features + feature + 16 * i;
                const uint32_t r0 = bf16_pair(from), r1 = bf16_pair(from + at.features);
                const uint32_t r8 = bf16_pair(from + 8 * size_t(at.features));
                const uint32_t r9 = bf16_pair(from + 9 * size_t(at.features));
                a[i][0] = __byte_perm(r0, r1, 0x5410);
                a[i][1] = __byte_perm(r0, r1, 0x7632);
                a[i][2] = __byte_perm(r8, r9, 0x5410);
                a[i][3] = __byte_perm(r8, r9, 0x7632);
            } else {  // B (features, R)
                const bf16* from = p.adapter + size_t(feature + 16 * i) * p.R + r;
                a[i][0] = bf16_pair(from);
                a[i][1] = bf16_pair(from + p.R);
                a[i][2] = bf16_pair(from + 8);
                a[i][3] = bf16_pair(from + p.R + 8);
            }
        }
        nf4_multiply<Tile>(sum, a, tokens, at.lane, k);
    }
}

// ----------------------------------------------------------------------------
// the output

// The warps of a row of features add up their slices, in the order of the warps.
template <class Tile>
__device__ __forceinline__ void nf4_add_slices(float (&sum)[2][Tile::TOKENS / 8][4], const Nf4Place& at,
                                               float* memory) {
    constexpr int TILES = Tile::TOKENS / 8, SUMS = 8 * TILES;
    float* mine = memory + at.row_warp * SUMS * 32 + at.lane;
    if (at.slice_warp > 0) {
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            mine[((at.slice_warp - 1) * Tile::ROW_WARPS * SUMS + i) * 32] = sum[i / 4 / TILES][i / 4 % TILES][i % 4];
        }
    }
    __syncthreads();
    if (at.slice_warp == 0) {
#pragma unroll
        for (int s = 0; s < Tile::SLICE_WARPS - 1; s++) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) {
                sum[i / 4 / TILES][i / 4 % TILES][i % 4] += mine[(s * Tile::ROW_WARPS * SUMS + i) * 32];
            }
        }
    }
    __syncthreads();
}

// 8 features of a token: fp32 sums, the residual if there is one, one rounding, 16 bytes.
__device__ __forceinline__ void nf4_write_8(const Nf4Product& p, size_t token, int feature, const float* sums) {
    float x[8], r[8];
    load(x, sums);
    if (p.residual) {
        load(r, p.residual + token * p.ldr + feature);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[i] += r[i];
        }
    }
    store(p.y + token * p.ldy + feature, x);
}

template <class Tile>
__device__ __forceinline__ void nf4_write(const float (&sum)[2][Tile::TOKENS / 8][4], const Nf4Product& p,
                                          const Nf4Place& at, float* memory) {
    constexpr int CHUNKS = Tile::FEATURES / 8;  // of a token
#pragma unroll
    for (int base = 0; base < Tile::TOKENS; base += Tile::OUT_TOKENS) {
        if (at.slice_warp == 0) {
            float* mine = memory + 2 * at.t * Tile::OUT_STRIDE + 32 * at.row_warp + 2 * at.g;
#pragma unroll
            for (int j = 0; j < Tile::OUT_TOKENS / 8; j++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float(&c)[4] = sum[i][base / 8 + j];
                    float* to = mine + 8 * j * Tile::OUT_STRIDE + 16 * i;
                    vector_put<false>(to, make_float2(c[0], c[2]));
                    vector_put<false>(to + Tile::OUT_STRIDE, make_float2(c[1], c[3]));
                }
            }
        }
        __syncthreads();
        for (int i = at.thread; i < Tile::OUT_TOKENS * CHUNKS; i += Tile::THREADS) {
            const int row = i / CHUNKS, col = i % CHUNKS * 8;
            const int token = at.first_token + base + row, feature = at.first_feature + col;
            if (token < p.M && feature < at.features) {
                nf4_write_8(p, token, feature, memory + row * Tile::OUT_STRIDE + col);
            }
        }
        __syncthreads();
    }
}

// ----------------------------------------------------------------------------
// the kernel

template <bool BACKWARD, class Tile>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS) nf4_matmul_kernel(Nf4Product p) {
    constexpr int STAGES = Tile::STAGES, SLICE_WARPS = Tile::SLICE_WARPS;
    static_assert(sizeof(Nf4Parts) <= Tile::PARTS_BYTES, "shared memory");
    DYN_SHARED(unsigned char, shared);
    Nf4Parts& parts = *reinterpret_cast<Nf4Parts*>(shared);
    unsigned char* ring = shared + Tile::PARTS_BYTES;
    const Nf4Place at = nf4_place<BACKWARD, Tile>(p);
    const bool active = at.feature < at.features;
    const int steps = (at.all_slices + SLICE_WARPS - 1) / SLICE_WARPS, columns = at.slices * 64 + p.R;
    const bf16* x = p.x + size_t(at.first_token + at.thread / 8 % Tile::TOKENS) * p.ldx +
                    at.thread / 8 / Tile::TOKENS * 64 + at.thread % 8 * 8;
    const float table = nf4_table(at.lane);
    nf4_parts_load<Tile>(parts, p);

    auto copy = [&](int step) {
        if (step < steps) {
            unsigned char* stage = ring + step % STAGES * Tile::STAGE_BYTES;
            nf4_copy_tokens<Tile>(stage, p, at, x, columns, step);
            nf4_copy_codes<BACKWARD, Tile>(stage, parts, p, at, step);
        }
        cp_async_commit();  // empty at the end: the number of groups under way stays the same
    };
    // Absmax of a slice, fetched a step ahead: forward a row of 32 a lane, backward two rows of 64.
    Nf4Absmax next[1 + BACKWARD] = {};
    auto fetch = [&](int slice) {
        if (active && slice < at.slices) {
            nf4_absmax_fetch(next, parts, p, BACKWARD ? slice * 64 : at.feature, at.lane,
                             BACKWARD ? at.feature / 64 : slice);
        }
    };

    float sum[2][Tile::TOKENS / 8][4] = {};
    for (int step = 0; step < STAGES - 1; step++) {
        copy(step);
    }
    fetch(at.slice_warp);
    for (int step = 0; step < steps; step++) {
        // Behind the barrier the stage is there for all, and all have left the one before, which the next copy
        // overwrites.
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        copy(step + STAGES - 1);
        const unsigned char* stage = ring + step % STAGES * Tile::STAGE_BYTES;
        const unsigned char *tokens = stage + at.slice_warp * Tile::TOKENS * 128, *codes = stage + Tile::TOKEN_BYTES;
        const int slice = step * SLICE_WARPS + at.slice_warp;
        if (active && slice < at.slices) {
            const int row = BACKWARD ? slice * 64 : at.feature;
            float absmax[1 + BACKWARD];
#pragma unroll
            for (int h = 0; h < 1 + BACKWARD; h++) {
                absmax[h] = nf4_absmax_restore(parts, p, row, next[h]);
            }
            fetch(slice + SLICE_WARPS);
            if constexpr (BACKWARD) {
                nf4_slice_backward<Tile>(sum, at, table, absmax, tokens, codes);
            } else {
                nf4_slice_forward<Tile>(sum, at, table, absmax[0], tokens, codes);
            }
        } else if (active && slice < at.all_slices) {
            nf4_slice_adapter<BACKWARD, Tile>(sum, p, at, tokens, slice);
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    float* memory = reinterpret_cast<float*>(ring);
    if (SLICE_WARPS > 1) {
        nf4_add_slices<Tile>(sum, at, memory);
    }
    nf4_write<Tile>(sum, p, at, memory);
}

// ----------------------------------------------------------------------------
// kernel launchers; nf4_matmul_forward and _backward are in gpu_nf4.cu

// The tile of a product with M tokens.
//
//   M <= 16                                    64 x 16     four warps share a contraction: few blocks, much of it each
//   M <= 32                                    64 x 32
//   fewer 128 x 128 tiles than processors      64 x 64
//   100 KB of shared memory (86, 89, 120)      256 x 128   one block fits, so it had better be of 8 warps
//   else                                       128 x 128   two blocks
//
// Shared memory, and registers forward / backward, are in dev/results/resources.md.
inline Nf4Tile nf4_matmul_tile(const GpuInfo& info, size_t M, int features) {
    if (M <= 16) {
        return Nf4Tile::T64x16;
    }
    if (M <= 32) {
        return Nf4Tile::T64x32;
    }
    const bool small = info.arch == 86 || info.arch == 89 || info.arch >= 120;
    const size_t processors = size_t(info.multiprocessors), down = ceil_div(M, 128);
    if (down * ceil_div(size_t(features), 128) < processors) {
        return Nf4Tile::T64x64;
    }
    return small && down * ceil_div(size_t(features), 256) >= processors ? Nf4Tile::T256x128 : Nf4Tile::T128x128;
}

template <bool BACKWARD, class Tile>
void nf4_matmul_launch(Gpu<bf16>& dev, const Nf4Product& p) {
    const size_t features = size_t(BACKWARD ? p.cols : p.rows);
    const size_t blocks = ceil_div(features, Tile::FEATURES) * ceil_div(size_t(p.M), Tile::TOKENS);
    LAUNCH((nf4_matmul_kernel<BACKWARD, Tile>), unsigned(blocks), Tile::THREADS, Tile::SHARED_BYTES, dev.stream, p);
}

// What the kernel relies on; anything else is a fault of the caller, who asks nf4_matmul_takes first.
inline void nf4_matmul_check(const Nf4Product& p, const Nf4Group& g) {
    const void* pointers[4] = {p.y, p.x, p.adapter, p.residual};
    uintptr_t bits = 0;
    for (const void* pointer : pointers) {
        bits |= reinterpret_cast<uintptr_t>(pointer);
    }
    if (!nf4_matmul_takes(g, p.R) || bits % 16 != 0 || (p.ldx | p.ldy | (p.residual ? p.ldr : 0)) % 8 != 0) {
        fprintf(stderr,
                "error: NF4 matmul: need packed matrices, R a multiple of 16 (found %d), 16-byte aligned pointers "
                "(found %p, %p, %p, %p) and rows apart by multiples of 8 (found %zu, %zu, %zu)\n",
                p.R, pointers[0], pointers[1], pointers[2], pointers[3], p.ldy, p.ldx, p.ldr);
        abort();
    }
}

template <bool BACKWARD>
void nf4_matmul(Gpu<bf16>& dev, Nf4Product p, size_t M, const Nf4Group& g, Nf4Tile tile) {
    nf4_matmul_check(p, g);
    p.M = int(M);
    p.rows = g.rows;
    p.cols = g.cols;
    for (int i = 0, row = 0; i < g.parts; i++) {
        const Matrix& w = *g.w[i];
        p.part[i] = w.absmax32 ? Nf4Part{w.codes, nullptr, w.absmax32, nullptr, -0.0f, w.rows, row}
                               : Nf4Part{w.codes, w.absmax8, w.absmax2, w.map8, w.offset, w.rows, row};
        row += w.rows;
    }
    p.second = g.parts > 1 ? p.part[1].begin : INT_MAX;
    p.third = g.parts > 2 ? p.part[2].begin : INT_MAX;
    if (tile == Nf4Tile::BY_SHAPE) {
        tile = nf4_matmul_tile(dev.info, M, BACKWARD ? g.cols : g.rows);
    }
    switch (M == 0 ? Nf4Tile::BY_SHAPE : tile) {
        case Nf4Tile::T64x16: nf4_matmul_launch<BACKWARD, Nf4Tile64x16>(dev, p); break;
        case Nf4Tile::T64x32: nf4_matmul_launch<BACKWARD, Nf4Tile64x32>(dev, p); break;
        case Nf4Tile::T64x64: nf4_matmul_launch<BACKWARD, Nf4Tile64x64>(dev, p); break;
        case Nf4Tile::T128x128: nf4_matmul_launch<BACKWARD, Nf4Tile128x128>(dev, p); break;
        case Nf4Tile::T256x128: nf4_matmul_launch<BACKWARD, Nf4Tile256x128>(dev, p); break;
        case Nf4Tile::BY_SHAPE: break;
    }
}
