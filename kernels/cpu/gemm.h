// The matrix engine: C (M, n) = or += a sum of products A B, whatever A and B are made of. Both operands are rewritten
// into panels as they are used, so that a frozen 4-bit matrix, a norm, SwiGLU, dropout or a transposition costs one
// pass over a panel and no memory of its own. It knows no model; linear.h and classifier.h put the pieces together.
//
//   A, packed once for all threads      [K block of KC][tile of MR rows][k][MR]
//   B, packed by the thread that needs it, in its own cache   [panel of NR columns][k][NR], at most KC x NC
//   for a block of columns: for each K block: pack B; for each tile of rows, for each panel: the register tile
//
// An element is the sum over K blocks, in order, of sums over ascending k. Nothing of that depends on the number of
// rows, on a row's place or on the threads, so neither do its bits.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "kernels/cpu/nf4.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/rows.h"
#include "kernels/device.h"
#include "kernels/types.h"

constexpr size_t GEMM_KC = 256, GEMM_NC = 256;
constexpr size_t GEMM_LINES = 16;           // rows that are transposed together
constexpr size_t GEMM_LINE = GEMM_KC + 16;  // their stride: not a power of two, so that they do not share cache sets

// ---- workspace ----

// Hands out parts of dev.workspace. With base = nullptr it only counts, so that the size functions and the ops share
// one description of what is needed.
struct Arena {
    char* base = nullptr;
    size_t used = 0, limit = ~size_t(0);
};

template <class T>
T* arena_take(Arena& arena, size_t n) {
    size_t begin = arena.used;
    arena.used += (n * sizeof(T) + 63) / 64 * 64;
    if (arena.used > arena.limit) {
        fprintf(stderr, "error: workspace too small (%zu bytes, need %zu or more)\n", arena.limit, arena.used);
        abort();  // the caller did not reserve what the op's *_workspace function states
    }
    return arena.base ? reinterpret_cast<T*>(arena.base + begin) : nullptr;
}

template <class X>
Arena arena_of(const Cpu<X>& dev) {
    return {dev.workspace, 0, dev.workspace_bytes};
}

// ---- leaves by type ----

inline int tile_rows(const Cpu<float>& dev) {
    return dev.isa->MR;
}
inline int tile_columns(const Cpu<float>& dev) {
    return dev.isa->NR;
}
inline void gemm_tile(const Cpu<float>& dev, size_t k, const float* a, const float* b, float* c, size_t ldc, int mr,
                      int nr, bool add) {
    dev.isa->gemm_tile(k, a, b, c, ldc, mr, nr, add);
}
inline void transpose_lines(const Cpu<float>& dev, float* out, size_t ldo, int width, const float* in, size_t ldi,
                            int n, size_t k) {
    dev.isa->transpose(out, ldo, width, in, ldi, n, k);
}

constexpr int DOUBLE_MR = 4, DOUBLE_NR = 8;
inline int tile_rows(const Cpu<double>&) {
    return DOUBLE_MR;
}
inline int tile_columns(const Cpu<double>&) {
    return DOUBLE_NR;
}
inline void gemm_tile(const Cpu<double>&, size_t k, const double* a, const double* b, double* c, size_t ldc, int mr,
                      int nr, bool add) {
    double sum[DOUBLE_MR][DOUBLE_NR] = {};
    for (; k > 0; k--, a += DOUBLE_MR, b += DOUBLE_NR) {
        for (int i = 0; i < DOUBLE_MR; i++) {
            for (int j = 0; j < DOUBLE_NR; j++) {
                sum[i][j] += a[i] * b[j];
            }
        }
    }
    for (int i = 0; i < mr; i++) {
        for (int j = 0; j < nr; j++) {
            double* out = c + size_t(i) * ldc + j;
            *out = add ? *out + sum[i][j] : sum[i][j];
        }
    }
}
inline void transpose_lines(const Cpu<double>&, double* out, size_t ldo, int width, const double* in, size_t ldi, int n,
                            size_t k) {
    for (size_t i = 0; i < k; i++) {
        for (int j = 0; j < width; j++) {
            out[i * ldo + size_t(j)] = j < n ? in[size_t(j) * ldi + i] : 0;
        }
    }
}

// ---- dropout ----

// x (n) = x * mask / (1 - p) for the channels first .. first + n (first a multiple of 4) of one row. Channel c of a row
// is kept when word c % 4 of philox4x32 of {example, position, module, c / 4}, under a key of seed and step, is at
// least p 2^32.
template <class X, class Real>
void dropout_run(const Cpu<X>& dev, Real* x, const Dropout& drop, uint32_t module, size_t row, size_t first, size_t n) {
    uint64_t mixed = drop.seed * 0x9e3779b97f4a7c15u + drop.step;
    mixed = (mixed ^ (mixed >> 32)) * 0xd6e8feb86659fd93u;
    const uint32_t key[2] = {uint32_t(mixed), uint32_t(mixed >> 32)};
    const uint32_t head[3] = {drop.example[row], uint32_t(drop.position[row]), module};
    const uint32_t threshold = uint32_t(double(drop.p) * 4294967296.0);
    const Real scale = Real(1) / (Real(1) - Real(drop.p));
    constexpr size_t PART = 256;
    uint32_t words[PART];
    for (size_t begin = 0; begin < n; begin += PART) {
        size_t part = n - begin < PART ? n - begin : PART;
        dev.isa->philox_run(words, head, key, uint32_t((first + begin) / 4), (part + 3) / 4);
        for (size_t i = 0; i < part; i++) {
            x[begin + i] = words[i] >= threshold ? x[begin + i] * scale : Real(0);
        }
    }
}

// ---- operands ----

// A matrix that is read in runs along its rows: element (row, column) of what is described, counted from (row0, col0).
template <class X>
struct Operand {
    using Real = typename Cpu<X>::real;
    static_assert(sizeof(X) == sizeof(Real), "activations are packed as they are");
    enum Kind {
        WEIGHT,  // a frozen matrix
        PLAIN,   // scale * x, row stride ld
        INPUT    // the input of a group, row `map[row]` when there is a map, under dropout when there is one
    } kind = PLAIN;
    const Matrix* w = nullptr;
    const Real* x = nullptr;
    size_t ld = 0;
    Real scale = 1;
    LinearInput<X, Real> in;
    const int32_t* map = nullptr;
    const Dropout* drop = nullptr;
    uint32_t module = 0;
    size_t row0 = 0, col0 = 0;
};

template <class X>
Operand<X> operand_weight(const Matrix& w) {
    Operand<X> op;
    op.kind = Operand<X>::WEIGHT;
    op.w = &w;
    return op;
}

template <class X, class Real>
Operand<X> operand_plain(const Real* x, size_t ld, Real scale = 1) {
    Operand<X> op;
    op.kind = Operand<X>::PLAIN;
    op.x = x;
    op.ld = ld;
    op.scale = scale;
    return op;
}

template <class X, class Real>
Operand<X> operand_input(const LinearInput<X, Real>& in, int columns) {
    Operand<X> op;
    op.kind = Operand<X>::INPUT;
    op.in = in;
    op.ld = size_t(columns);
    return op;
}

// out (n) = elements (row, column) .. (row, column + n).
template <class X, class Real>
void operand_run(const Cpu<X>& dev, Real* out, const Operand<X>& op, size_t row, size_t column, size_t n) {
    row += op.row0;
    column += op.col0;
    if (op.kind == Operand<X>::WEIGHT) {
        matrix_run(dev, out, *op.w, row * size_t(op.w->cols) + column, n);
        return;
    }
    if (op.kind == Operand<X>::PLAIN) {
        const Real* x = op.x + row * op.ld + column;
        if (op.scale == 1) {
            memcpy(out, x, n * sizeof(Real));
            return;
        }
        for (size_t i = 0; i < n; i++) {
            out[i] = op.scale * x[i];
        }
        return;
    }
    row = op.map ? size_t(op.map[row]) : row;
    const X* x = op.in.x + row * op.in.stride + column;
    switch (op.in.kind) {
        case LinearInput<X, Real>::PLAIN: memcpy(out, x, n * sizeof(Real)); break;
        case LinearInput<X, Real>::RMSNORM:
            row_kernels(dev).norm_mul(out, x, op.in.rstd[row], op.in.norm_w + column, n);
            break;
        case LinearInput<X, Real>::SWIGLU: row_kernels(dev).silu_mul(out, x, x + op.ld, n); break;
    }
    if (op.drop) {
        dropout_run(dev, out, *op.drop, op.module, row, column, n);
    }
}

// Where rows of the operand stand in memory as they are, the first of them and *ld from one to the next; else nullptr.
template <class X>
const typename Cpu<X>::real* operand_in_place(const Operand<X>& op, size_t row, size_t column, size_t* ld) {
    const bool plain = op.kind == Operand<X>::PLAIN && op.scale == 1;
    const bool input = op.kind == Operand<X>::INPUT && op.in.kind == op.in.PLAIN && !op.map && !op.drop;
    *ld = plain ? op.ld : op.in.stride;
    return plain || input ? (plain ? op.x : op.in.x) + (row + op.row0) * *ld + column + op.col0 : nullptr;
}

// Packs (k)(width) panels, one after another, of the inner indices first .. first + n and the reduction indices
// k0 .. k0 + k. along = false: inner indices are rows of the operand, which is transposed on the way; true: they are
// its columns. lines: GEMM_LINES * GEMM_LINE of scratch.
template <class X, class Real>
void pack_panels(const Cpu<X>& dev, Real* panels, int width, const Operand<X>& op, bool along, size_t first, size_t n,
                 size_t k0, size_t k, Real* lines) {
    const size_t w = size_t(width);
    if (along) {  // n <= GEMM_LINES * GEMM_LINE
        const size_t padded = (n + w - 1) / w * w;
        for (size_t i = n; i < padded; i++) {
            lines[i] = 0;
        }
        for (size_t i = 0; i < k; i++) {
            operand_run(dev, lines, op, k0 + i, first, n);
            for (size_t j = 0; j < padded; j += w) {
                memcpy(panels + j * k + i * w, lines + j, w * sizeof(Real));
            }
        }
        return;
    }
    for (size_t begin = 0; begin < n; begin += w, panels += k * w) {
        for (size_t j = 0; j < w; j += GEMM_LINES) {
            size_t count = w - j < GEMM_LINES ? w - j : GEMM_LINES;
            size_t have = n <= begin + j ? 0 : n - begin - j < count ? n - begin - j : count;
            size_t ld = 0;
            const Real* from = operand_in_place(op, first + begin + j, k0, &ld);
            if (!from) {
                for (size_t i = 0; i < have; i++) {
                    operand_run(dev, lines + i * GEMM_LINE, op, first + begin + j + i, k0, k);
                }
                from = lines;
                ld = GEMM_LINE;
            }
            transpose_lines(dev, panels + j, w, int(count), from, ld, int(have), k);
        }
    }
}

// ---- A ----

template <class X>
size_t packed_elements(const Cpu<X>& dev, size_t M, size_t K) {
    size_t mr = size_t(tile_rows(dev));
    return (M + mr - 1) / mr * mr * K;
}

// Small work is not worth waking the others; elements are packed, or products of three sizes.
template <class X>
int worth_threads(const Cpu<X>& dev, size_t work, size_t least) {
    return work < least ? 1 : dev.threads;
}
constexpr size_t PACK_LEAST = 32768, GEMM_LEAST = 1 << 20;

// Scratch of the threads; taken first by every op.
template <class X>
typename Cpu<X>::real* thread_scratch(const Cpu<X>& dev, Arena& arena) {
    return arena_take<typename Cpu<X>::real>(arena, size_t(dev.threads) * (GEMM_KC * GEMM_NC + GEMM_LINES * GEMM_LINE));
}

// packed (packed_elements) = A (M, K): M rows of the operand, or (along) M of its columns.
template <class X, class Real>
void pack_a(const Cpu<X>& dev, Real* packed, const Operand<X>& op, bool along, size_t M, size_t K, Real* scratch) {
    const size_t mr = size_t(tile_rows(dev)), tiles = (M + mr - 1) / mr, group = 8;
    const size_t groups = (tiles + group - 1) / group, blocks = (K + GEMM_KC - 1) / GEMM_KC;
    parallel_tasks(worth_threads(dev, M * K, PACK_LEAST), groups * blocks, [&](size_t task, int worker) {
        size_t k0 = task / groups * GEMM_KC, k = K - k0 < GEMM_KC ? K - k0 : GEMM_KC;
        size_t row = task % groups * group * mr, rows = M - row < group * mr ? M - row : group * mr;
        pack_panels(dev, packed + tiles * mr * k0 + row * k, int(mr), op, along, row, rows, k0, k,
                    scratch + size_t(worker) * GEMM_LINES * GEMM_LINE);
    });
}

// ---- C = A B ----

// One product: A packed, K long, and B: columns are rows of the operand (along = false) or its columns (true).
template <class X>
struct Term {
    const typename Cpu<X>::real* a = nullptr;
    size_t K = 0;
    Operand<X> b;
    bool along = false;
};

constexpr int MAX_TERMS = 6;  // three linears and their adapters

// c (M, n), row stride ldc, = [residual, same stride, may be c itself +] the sum of the terms; add: += instead.
template <class X>
struct Product {
    typename Cpu<X>::real* c = nullptr;
    size_t ldc = 0, n = 0;
    const typename Cpu<X>::real* residual = nullptr;
    bool add = false;
    int terms = 0;
    Term<X> term[MAX_TERMS];
};

template <class X>
void product_add(Product<X>& p, const typename Cpu<X>::real* a, size_t K, const Operand<X>& b, bool along) {
    p.term[p.terms++] = {a, K, b, along};
}

// The columns n0 .. n0 + nc and the rows row0 .. row1 (row0 a multiple of the tile's) of one product, by one thread.
template <class X, class Real>
void gemm_block(const Cpu<X>& dev, const Product<X>& p, size_t M, size_t n0, size_t nc, size_t row0, size_t row1,
                Real* panels) {
    const size_t mr = size_t(tile_rows(dev)), nr = size_t(tile_columns(dev)), tiles = (M + mr - 1) / mr;
    bool add = p.add;
    if (p.residual) {
        for (size_t i = row0; i < row1 && p.residual != p.c; i++) {
            memcpy(p.c + i * p.ldc + n0, p.residual + i * p.ldc + n0, nc * sizeof(Real));
        }
        add = true;
    }
    for (int t = 0; t < p.terms; t++) {
        const Term<X>& term = p.term[t];
        for (size_t k0 = 0; k0 < term.K; k0 += GEMM_KC, add = true) {
            size_t k = term.K - k0 < GEMM_KC ? term.K - k0 : GEMM_KC;
            pack_panels(dev, panels, int(nr), term.b, term.along, n0, nc, k0, k, panels + GEMM_KC * GEMM_NC);
            for (size_t row = row0; row < row1; row += mr) {
                const Real* a = term.a + tiles * mr * k0 + row * k;
                int rows = int(row1 - row < mr ? row1 - row : mr);
                for (size_t j = 0; j < nc; j += nr) {
                    gemm_tile(dev, k, a, panels + j * k, p.c + row * p.ldc + n0 + j, p.ldc, rows,
                              int(nc - j < nr ? nc - j : nr), add);
                }
            }
        }
    }
}

// All products share M and are independent. Their blocks of columns are dealt to the threads; where there are too few,
// blocks become narrower and then shorter, which moves no bit.
template <class X, class Real>
void gemm(const Cpu<X>& dev, const Product<X>* products, int count, size_t M, Real* scratch) {
    const size_t mr = size_t(tile_rows(dev)), nr = size_t(tile_columns(dev)), tiles = (M + mr - 1) / mr;
    size_t work = 0;
    for (int i = 0; i < count; i++) {
        for (int t = 0; t < products[i].terms; t++) {
            work += M * products[i].n * products[i].term[t].K;
        }
    }
    const size_t threads = size_t(worth_threads(dev, work, GEMM_LEAST));
    size_t nc = GEMM_NC, blocks = 0, bands = 1;
    for (;; nc /= 2) {
        blocks = 0;
        for (int i = 0; i < count; i++) {
            blocks += (products[i].n + nc - 1) / nc;
        }
        if (threads == 1 || blocks >= 4 * threads || nc <= nr || nc <= 64) {
            break;
        }
    }
    while (threads > 1 && blocks * bands < 2 * threads && tiles / bands >= 8) {
        bands *= 2;
    }
    const size_t band = (tiles + bands - 1) / bands * mr;
    parallel_tasks(int(threads), blocks * bands, [&](size_t task, int worker) {
        size_t block = task / bands, row0 = task % bands * band;
        const Product<X>* p = products;
        while (block >= (p->n + nc - 1) / nc) {
            block -= (p->n + nc - 1) / nc;
            p++;
        }
        if (row0 < M) {
            size_t n0 = block * nc, columns = p->n - n0 < nc ? p->n - n0 : nc;
            gemm_block(dev, *p, M, n0, columns, row0, M - row0 < band ? M : row0 + band,
                       scratch + size_t(worker) * (GEMM_KC * GEMM_NC + GEMM_LINES * GEMM_LINE));
        }
    });
}
