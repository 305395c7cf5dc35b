// The matrix engine: C (M, n) = or += a sum of products A B, whatever A and B are made of. Both operands are rewritten
// as they are used into the layout of a format (format.h), so that a frozen 4-bit matrix, a norm, SwiGLU, dropout or a
// transposition costs one pass over a panel and no memory of its own. It knows no model; linear.h and classifier.h put
// the pieces together.
//
//            K                           NC                      A, packed once for all threads:
//        +-------+-------+       KC  +--+--+--+--+                 [block of KC][strip of MR rows][unit]
//     MR | strip | strip |           |  |  |  |  | panels        B, packed by the thread that needs it, in its cache:
//        +-------+-------+           |  |  |  |  | of NR           [panel of NR columns][unit], KC deep and NC wide
//        | strip | strip |  x        +--+--+--+--+
//        +-------+-------+           |  |  |  |  |               for NC columns, for each block of KC: pack B;
//            KC      KC              +--+--+--+--+                 for each strip: multiply with all the panels
//
// An element is the sum over the terms and their blocks of KC, in order, of what the format makes of one block. Nothing
// of that depends on the number of rows, on a row's place or on the threads, so neither do its bits.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "kernels/cpu/format.h"
#include "kernels/cpu/nf4.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/rows.h"
#include "kernels/device.h"
#include "kernels/types.h"

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

// ---- formats ----

// What Cpu<double> computes in: the layout of fp32, one element after another.
namespace format_double {
constexpr int MR = 4, NR = 8;

template <int WIDTH>
void pack_lines(void* out, const double* in, size_t ldi, int n, size_t k) {
    double* to = static_cast<double*>(out);
    for (size_t i = 0; i < k; i++) {
        for (int j = 0; j < WIDTH; j++) {
            *to++ = j < n ? in[size_t(j) * ldi + i] : 0;
        }
    }
}

template <int WIDTH>
void pack_columns(void* out, const double* in, size_t ldi, int n, size_t k) {
    double* to = static_cast<double*>(out);
    for (size_t i = 0; i < k; i++) {
        for (int j = 0; j < WIDTH; j++) {
            *to++ = j < n ? in[i * ldi + size_t(j)] : 0;
        }
    }
}

inline void tile(size_t k, const double* a, const double* b, double* c, size_t ldc, int mr, int nr, bool add) {
    double sum[MR][NR] = {};
    for (; k > 0; k--, a += MR, b += NR) {
        for (int i = 0; i < MR; i++) {
            for (int j = 0; j < NR; j++) {
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

inline void multiply(size_t k, const void* a, const void* b, double* c, size_t ldc, int mr, size_t nc, bool add) {
    const double* panel = static_cast<const double*>(b);
    for (size_t j = 0; j < nc; j += NR, panel += k * NR) {
        tile(k, static_cast<const double*>(a), panel, c + j, ldc, mr, int(nc - j < NR ? nc - j : NR), add);
    }
}

inline const GemmFormat<double> format = {"fp64",
                                          MR,
                                          NR,
                                          1,
                                          MR * sizeof(double),
                                          NR * sizeof(double),
                                          256,
                                          256,
                                          pack_lines<MR>,
                                          pack_columns<MR>,
                                          pack_lines<NR>,
                                          pack_columns<NR>,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          multiply,
                                          nullptr};
}  // namespace format_double

// The format of the frozen matrices and of what shares their packed left side (x A^T, dy B), and the one of the
// adapters' other products.
inline const GemmFormat<double>& base_format(const Cpu<double>&) {
    return format_double::format;
}
inline const GemmFormat<double>& adapter_format(const Cpu<double>&) {
    return format_double::format;
}
template <class X>
const GemmFormat<float>& base_format(const Cpu<X>& dev) {
    return *dev.base;
}
template <class X>
const GemmFormat<float>& adapter_format(const Cpu<X>& dev) {
    return *dev.adapter;
}

// Rows of the register tile, and a transposition, by themselves, for attention.
inline int tile_rows(const Cpu<double>&) {
    return format_double::MR;
}
template <class X>
int tile_rows(const Cpu<X>& dev) {
    return dev.isa->MR;
}
inline void transpose_lines(const Cpu<double>&, double* out, size_t ldo, int width, const double* in, size_t ldi, int n,
                            size_t k) {
    for (size_t i = 0; i < k; i++) {
        for (int j = 0; j < width; j++) {
            out[i * ldo + size_t(j)] = j < n ? in[size_t(j) * ldi + i] : 0;
        }
    }
}
template <class X>
void transpose_lines(const Cpu<X>& dev, float* out, size_t ldo, int width, const float* in, size_t ldi, int n,
                     size_t k) {
    dev.isa->transpose(out, ldo, width, in, ldi, n, k);
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

// A row in another type, rounded when it is narrower; or a copy.
template <class X, class To, class From>
void row_convert(const Cpu<X>& dev, To* out, const From* in, size_t n) {
    if constexpr (std::is_same<To, From>::value) {
        memcpy(out, in, n * sizeof *in);
    } else if constexpr (std::is_same<From, bf16>::value) {
        dev.isa->rows.of_bf16.widen(out, in, n);
    } else {
        dev.isa->rows.of_bf16.narrow(out, in, n);
    }
}
inline const float* as_real(const float* p) {
    return p;
}
inline const double* as_real(const double* p) {
    return p;
}
inline const float* as_real(const bf16*) {
    return nullptr;
}

// A matrix that is read in runs along its rows: element (row, column) of what is described, counted from (row0, col0).
template <class X>
struct Operand {
    using Real = typename Cpu<X>::real;
    enum Kind {
        WEIGHT,        // a frozen matrix
        PLAIN,         // scale * x, row stride ld
        SOFTMAX_GRAD,  // scale * (exp(x - lse[row]) - [column = label[row]]), row stride ld
        INPUT          // scale * the input of a group, of row `map[row]` if there is a map, under dropout if there is
    } kind = PLAIN;
    const Matrix* w = nullptr;
    const Real* x = nullptr;
    size_t ld = 0;
    Real scale = 1;
    LinearInput<X, Real> in;
    const int32_t* map = nullptr;
    const Dropout* drop = nullptr;
    uint32_t module = 0;
    const Real* lse = nullptr;
    const int32_t* label = nullptr;
    size_t row0 = 0, col0 = 0;
};

template <class X>
Operand<X> operand_weight(const Matrix& w) {
    Operand<X> op;
    op.kind = Operand<X>::WEIGHT;
    op.w = &w;
    return op;
}

template <class X>
Operand<X> operand_plain(const typename Cpu<X>::real* x, size_t ld, typename Cpu<X>::real scale = 1) {
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

// The gradient of cross-entropy by its logits, made anew wherever it is packed.
template <class X, class Real>
Operand<X> operand_softmax_grad(const Real* logits, size_t ld, const Real* lse, const int32_t* label, Real scale) {
    Operand<X> op = operand_plain<X>(logits, ld, scale);
    op.kind = Operand<X>::SOFTMAX_GRAD;
    op.lse = lse;
    op.label = label;
    return op;
}

// Activations as they stand in memory, times scale.
template <class X>
Operand<X> operand_stored(const X* x, size_t ld, typename Cpu<X>::real scale = 1) {
    LinearInput<X, typename Cpu<X>::real> in;
    in.x = x;
    in.stride = ld;
    Operand<X> op = operand_input<X>(in, 0);
    op.scale = scale;
    return op;
}

template <class Real>
void operand_scale(Real* x, Real scale, size_t n) {
    for (size_t i = 0; i < n && scale != 1; i++) {
        x[i] *= scale;
    }
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
        memcpy(out, op.x + row * op.ld + column, n * sizeof(Real));
        operand_scale(out, op.scale, n);
        return;
    }
    if (op.kind == Operand<X>::SOFTMAX_GRAD) {
        memcpy(out, op.x + row * op.ld + column, n * sizeof(Real));
        row_kernels(dev).softmax_grad(out, op.lse[row], op.scale, n);
        const size_t label = size_t(op.label[row]);
        if (label >= column && label < column + n) {
            out[label - column] -= op.scale;
        }
        return;
    }
    row = op.map ? size_t(op.map[row]) : row;
    const X* x = op.in.x + row * op.in.stride + column;
    const auto& kernels = row_kernels(dev);
    switch (op.in.kind) {
        case LinearInput<X, Real>::PLAIN: row_convert(dev, out, x, n); break;
        case LinearInput<X, Real>::RMSNORM:
            kernels.norm_mul_wide(out, x, op.in.rstd[row], op.in.norm_w + column, n);
            break;
        case LinearInput<X, Real>::SWIGLU: kernels.silu_mul_wide(out, x, x + op.ld, n); break;
    }
    if (op.drop) {
        dropout_run(dev, out, *op.drop, op.module, row, column, n);
    }
    operand_scale(out, op.scale, n);
}

// Where rows of the operand stand in memory as they are, the first of them and *ld from one to the next; else nullptr.
template <class X>
const X* operand_stored_at(const Operand<X>& op, size_t row, size_t column, size_t* ld) {
    *ld = op.in.stride;
    const bool stored =
        op.kind == Operand<X>::INPUT && op.in.kind == op.in.PLAIN && !op.map && !op.drop && op.scale == 1;
    return stored ? op.in.x + (row + op.row0) * *ld + column + op.col0 : nullptr;
}
template <class X>
const typename Cpu<X>::real* operand_in_place(const Operand<X>& op, size_t row, size_t column, size_t* ld) {
    if (op.kind == Operand<X>::PLAIN && op.scale == 1) {
        *ld = op.ld;
        return op.x + (row + op.row0) * *ld + column + op.col0;
    }
    return as_real(operand_stored_at(op, row, column, ld));
}

// ---- packing ----

// Lines of floats on their way from an operand into a strip or panel.
constexpr size_t LINES_ROOM = 64 * 144;  // elements
constexpr size_t LINES_DEPTH = 64;       // a multiple of every format's unit

// One strip of A or one panel of B at `out`: its inner indices first .. first + n are rows of the operand, the
// reduction k0 .. k0 + k runs along them.
template <class X, class Real>
void pack_lines(const Cpu<X>& dev, const GemmFormat<Real>& f, bool is_a, char* out, const Operand<X>& op, size_t first,
                int n, size_t k0, size_t k, Real* lines) {
    const auto pack = is_a ? f.pack_a_lines : f.pack_b_lines;
    size_t ld = 0;
    if (const Real* in = operand_in_place(op, first, k0, &ld)) {
        pack(out, in, ld, n, k);
        return;
    }
    if constexpr (std::is_same<X, bf16>::value) {
        const bf16* in = operand_stored_at(op, first, k0, &ld);
        if (in && (is_a ? f.pack_a_bf16_lines : f.pack_b_bf16_lines)) {
            (is_a ? f.pack_a_bf16_lines : f.pack_b_bf16_lines)(out, in, ld, n, k);
            return;
        }
    }
    // The stride is no power of two, so that lines do not share cache sets.
    const size_t depth = LINES_ROOM / size_t(n) / LINES_DEPTH * LINES_DEPTH - LINES_DEPTH, stride = depth + 16;
    for (size_t i = 0; i < k; i += depth) {
        const size_t part = k - i < depth ? k - i : depth;
        for (int j = 0; j < n; j++) {
            operand_run(dev, lines + size_t(j) * stride, op, first + size_t(j), k0 + i, part);
        }
        pack(out + i / f.unit * (is_a ? f.a_unit : f.b_unit), lines, stride, n, part);
    }
}

// The strips or panels, one after another at `out`, of the columns first .. first + n of the operand; the reduction
// k0 .. k0 + k runs down its rows.
template <class X, class Real>
void pack_columns(const Cpu<X>& dev, const GemmFormat<Real>& f, bool is_a, char* out, const Operand<X>& op,
                  size_t first, size_t n, size_t k0, size_t k, Real* lines) {
    const auto pack = is_a ? f.pack_a_columns : f.pack_b_columns;
    const size_t width = size_t(is_a ? f.MR : f.NR), unit = is_a ? f.a_unit : f.b_unit;
    const size_t panel = is_a ? strip_bytes(f, k) : panel_bytes(f, k);
    const size_t group = LINES_ROOM / LINES_DEPTH / width * width;
    for (size_t j0 = 0; j0 < n; j0 += group) {
        const size_t columns = n - j0 < group ? n - j0 : group;
        for (size_t i = 0; i < k; i += LINES_DEPTH) {
            const size_t part = k - i < LINES_DEPTH ? k - i : LINES_DEPTH;
            size_t ld = 0;
            const Real* in = operand_in_place(op, k0 + i, first + j0, &ld);
            if (!in) {
                for (size_t line = 0; line < part; line++) {
                    operand_run(dev, lines + line * columns, op, k0 + i + line, first + j0, columns);
                }
                in = lines;
                ld = columns;
            }
            for (size_t j = 0; j < columns; j += width) {
                pack(out + (j0 + j) / width * panel + i / f.unit * unit, in + j, ld,
                     int(columns - j < width ? columns - j : width), part);
            }
        }
    }
}

// Scratch of one thread: panels of B, lines, absmax of the blocks that go into a panel, and a block of C before it is
// rounded.
template <class Real>
struct ThreadScratch {
    char* panels;
    Real *lines, *sums;
    float* absmax;
};
constexpr size_t BLOCK_COLUMNS = 256;  // of C, at most, that a thread takes; a format's NC of them at a time
constexpr size_t SUMS_ROWS = 576;      // of a block of C that is rounded when it is whole: 590 KB of the second cache

inline size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

template <class X>
size_t panels_room(const Cpu<X>& dev) {
    const auto room = [&](const auto& f) { return base_format(dev).NC / size_t(f.NR) * panel_bytes(f, f.KC); };
    const size_t base = room(base_format(dev)), adapter = room(adapter_format(dev));
    return round_up(base > adapter ? base : adapter, 64);
}
template <class X>
size_t absmax_room(const Cpu<X>& dev) {
    return base_format(dev).KC * base_format(dev).NC / 64;
}
template <class X>
size_t sums_room(const Cpu<X>&) {
    return sizeof(X) == sizeof(typename Cpu<X>::real) ? 0 : SUMS_ROWS * BLOCK_COLUMNS;
}
template <class X>
size_t scratch_bytes(const Cpu<X>& dev) {
    return panels_room(dev) + (LINES_ROOM + sums_room(dev)) * sizeof(typename Cpu<X>::real) +
           round_up(absmax_room(dev) * sizeof(float), 64);
}

// Scratch of all threads; taken first by every op.
template <class X>
char* thread_scratch(const Cpu<X>& dev, Arena& arena) {
    return arena_take<char>(arena, size_t(dev.threads) * scratch_bytes(dev));
}

template <class X>
ThreadScratch<typename Cpu<X>::real> scratch_of(const Cpu<X>& dev, char* scratch, int worker) {
    using Real = typename Cpu<X>::real;
    char* p = scratch + size_t(worker) * scratch_bytes(dev);
    Real *lines = reinterpret_cast<Real*>(p + panels_room(dev)), *sums = lines + LINES_ROOM;
    return {p, lines, sums, reinterpret_cast<float*>(sums + sums_room(dev))};
}

// The absmax of `blocks` blocks in each of n rows of the matrix from (row, column): absmax[j * blocks + b].
template <class X>
const float* absmax_of(const Cpu<X>& dev, float* absmax, const Matrix& w, size_t row, size_t column, size_t n,
                       size_t blocks, size_t* lda) {
    const size_t in_row = size_t(w.cols) / 64, first = row * in_row + column / 64;
    if (w.absmax32) {
        *lda = in_row;
        return w.absmax32 + first;
    }
    *lda = blocks;
    for (size_t j = 0; j < n; j++) {
        nf4_absmax_run(dev, absmax + j * blocks, w, first + j * in_row, blocks);
    }
    return absmax;
}

// The panels of a frozen matrix by the format's own packer; false where it has none for it. lines: as in pack_lines.
template <class X, class Real>
bool pack_weight(const Cpu<X>&, const GemmFormat<Real>&, const ThreadScratch<Real>&, const Operand<X>&, bool, size_t,
                 size_t, size_t, size_t) {
    return false;  // Cpu<double>
}
template <class X>
bool pack_weight(const Cpu<X>& dev, const GemmFormat<float>& f, const ThreadScratch<float>& s, const Operand<X>& op,
                 bool along, size_t first, size_t n, size_t k0, size_t k) {
    if (op.kind != Operand<X>::WEIGHT) {
        return false;
    }
    const Matrix& w = *op.w;
    const size_t row = op.row0 + (along ? k0 : first), column = op.col0 + (along ? first : k0), cols = size_t(w.cols);
    const size_t width = size_t(f.NR), panel = panel_bytes(f, k);
    if (w.store == Store::NF4 && cols % 64 == 0 && column % 64 == 0 &&
        (along ? f.pack_b_nf4_columns != nullptr && n % 64 == 0 && n % width == 0 : f.pack_b_nf4_lines != nullptr)) {
        const uint8_t* codes = w.codes + (row * cols + column) / 2;
        size_t lda = 0;
        if (along) {
            const float* absmax = absmax_of(dev, s.absmax, w, row, column, k, n / 64, &lda);
            f.pack_b_nf4_columns(s.panels, codes, cols / 2, absmax, lda, n, k);
            return true;
        }
        for (size_t j = 0; j < n; j += width) {
            const size_t have = n - j < width ? n - j : width;
            const float* absmax = absmax_of(dev, s.absmax, w, row + j, column, have, (k + 63) / 64, &lda);
            f.pack_b_nf4_lines(s.panels + j / width * panel, codes + j * cols / 2, cols / 2, absmax, lda, int(have), k);
        }
        return true;
    }
    if (w.store == Store::BF16 && (along ? f.pack_b_bf16_columns : f.pack_b_bf16_lines) != nullptr) {
        const bf16* in = static_cast<const bf16*>(w.data) + row * cols + column;
        if (along) {
            f.pack_b_bf16_columns(s.panels, in, cols, int(n), k);
            return true;
        }
        for (size_t j = 0; j < n; j += width) {
            f.pack_b_bf16_lines(s.panels + j / width * panel, in + j * cols, cols, int(n - j < width ? n - j : width),
                                k);
        }
        return true;
    }
    return false;
}

// The panels of B for the columns first .. first + n of C and the reduction indices k0 .. k0 + k. along = false: these
// columns are rows of the operand; true: they are its columns.
template <class X, class Real>
void pack_b(const Cpu<X>& dev, const GemmFormat<Real>& f, const ThreadScratch<Real>& s, const Operand<X>& op,
            bool along, size_t first, size_t n, size_t k0, size_t k) {
    if (pack_weight(dev, f, s, op, along, first, n, k0, k)) {
        return;
    }
    if (along) {
        pack_columns(dev, f, false, s.panels, op, first, n, k0, k, s.lines);
        return;
    }
    const size_t width = size_t(f.NR);
    for (size_t j = 0; j < n; j += width) {
        pack_lines(dev, f, false, s.panels + j / width * panel_bytes(f, k), op, first + j,
                   int(n - j < width ? n - j : width), k0, k, s.lines);
    }
}

// ---- A ----

// A, packed: M rows and K reduction indices.
template <class Real>
struct Strips {
    const GemmFormat<Real>* f = nullptr;
    char* p = nullptr;
};

template <class Real>
size_t strips_of(const GemmFormat<Real>& f, size_t M) {
    return (M + size_t(f.MR) - 1) / size_t(f.MR);
}
template <class Real>
Strips<Real> strips_take(Arena& arena, const GemmFormat<Real>& f, size_t M, size_t K) {
    return {&f, arena_take<char>(arena, strips_of(f, M) * strip_bytes(f, K))};
}

// Small work is not worth waking the others; elements are packed, or products of three sizes.
template <class X>
int worth_threads(const Cpu<X>& dev, size_t work, size_t least) {
    return work < least ? 1 : dev.threads;
}
constexpr size_t PACK_LEAST = 32768, GEMM_LEAST = 1 << 20;

// packed = A (M, K): M rows of the operand, or (along) M of its columns.
template <class X, class Real>
void pack_a(const Cpu<X>& dev, const Strips<Real>& packed, const Operand<X>& op, bool along, size_t M, size_t K,
            char* scratch) {
    const GemmFormat<Real>& f = *packed.f;
    const size_t mr = size_t(f.MR), strips = strips_of(f, M), group = (48 + mr - 1) / mr;
    const size_t groups = (strips + group - 1) / group, blocks = (K + f.KC - 1) / f.KC;
    parallel_tasks(worth_threads(dev, M * K, PACK_LEAST), groups * blocks, [&](size_t task, int worker) {
        const size_t k0 = task / groups * f.KC, k = K - k0 < f.KC ? K - k0 : f.KC;
        const size_t row0 = task % groups * group * mr, row1 = M - row0 < group * mr ? M : row0 + group * mr;
        char* out = packed.p + strips * strip_bytes(f, k0) + row0 / mr * strip_bytes(f, k);
        Real* lines = scratch_of(dev, scratch, worker).lines;
        if (along) {
            pack_columns(dev, f, true, out, op, row0, row1 - row0, k0, k, lines);
            return;
        }
        for (size_t row = row0; row < row1; row += mr, out += strip_bytes(f, k)) {
            pack_lines(dev, f, true, out, op, row, int(row1 - row < mr ? row1 - row : mr), k0, k, lines);
        }
    });
}

// ---- C = A B ----

// One product: A packed, K long, and B: columns are rows of the operand (along = false) or its columns (true).
template <class X>
struct Term {
    Strips<typename Cpu<X>::real> a;
    size_t K = 0;
    Operand<X> b;
    bool along = false;
};

constexpr int MAX_TERMS = 6;  // three linears and their adapters

// c (M, n), row stride ldc, = [residual, same stride, may be c itself +] the sum of the terms; add: += instead. Out: X
// for activations, or real. The sum is made in real and rounded once.
template <class X, class Out>
struct Product {
    Out* c = nullptr;
    size_t ldc = 0, n = 0;
    const Out* residual = nullptr;
    bool add = false;
    const Rope<typename Cpu<X>::real>* rope = nullptr;  // of its first rope_heads heads, before it is rounded
    size_t rope_heads = 0;
    int terms = 0;
    Term<X> term[MAX_TERMS];
};

template <class X, class Out>
void product_add(Product<X, Out>& p, const Strips<typename Cpu<X>::real>& a, size_t K, const Operand<X>& b,
                 bool along) {
    p.term[p.terms++] = {a, K, b, along};
}

// Columns of the least block that is whole in 64s and in heads.
inline size_t rope_step(int HS) {
    size_t step = 64;
    while (step % size_t(HS) != 0) {
        step += 64;
    }
    return step;
}

// RoPE in place, on `columns` columns of whole heads.
template <class X, class Real>
void rope_block(const Cpu<X>& dev, Real* c, size_t ldc, const Rope<Real>& rope, size_t columns, size_t row0,
                size_t row1) {
    const size_t half = size_t(rope.HS) / 2;
    for (size_t row = row0; row < row1; row++, c += ldc) {
        const size_t at = size_t(rope.positions[row]) * half;
        for (size_t j = 0; j < columns; j += 2 * half) {
            real_kernels(dev).rotate(c + j, c + j + half, rope.cos + at, rope.sin + at, half, false);
        }
    }
}

// The columns n0 .. n0 + nc and the rows row0 .. row1 (row0 a multiple of band_unit) of one product, by one
// thread. Heads that are to be rotated do not straddle blocks.
template <class X, class Out, class Real>
void gemm_block(const Cpu<X>& dev, const Product<X, Out>& p, size_t M, size_t n0, size_t nc, size_t row0, size_t row1,
                const ThreadScratch<Real>& s) {
    constexpr bool in_place = std::is_same<Out, Real>::value;
    const size_t NC = base_format(dev).NC;
    Out* out = p.c + row0 * p.ldc + n0;
    Real* sum = s.sums;
    size_t lds = nc;
    if constexpr (in_place) {
        sum = out;
        lds = p.ldc;
    }
    const Out* from = p.add ? p.c : p.residual;
    if (from && !(in_place && from == p.c)) {
        for (size_t i = row0; i < row1; i++) {
            row_convert(dev, sum + (i - row0) * lds, from + i * p.ldc + n0, nc);
        }
    }
    for (size_t j = 0; j < nc; j += NC) {
        const size_t n = nc - j < NC ? nc - j : NC;
        bool add = from != nullptr;
        for (int t = 0; t < p.terms; t++) {
            const Term<X>& term = p.term[t];
            const GemmFormat<Real>& f = *term.a.f;
            const size_t mr = size_t(f.MR), strips = strips_of(f, M);
            for (size_t k0 = 0; k0 < term.K; k0 += f.KC, add = true) {
                const size_t k = term.K - k0 < f.KC ? term.K - k0 : f.KC, strip = strip_bytes(f, k);
                pack_b(dev, f, s, term.b, term.along, n0 + j, n, k0, k);
                const char* a = term.a.p + strips * strip_bytes(f, k0) + row0 / mr * strip;
                for (size_t row = row0; row < row1; row += mr, a += strip) {
                    f.multiply(k, a, s.panels, sum + (row - row0) * lds + j, lds,
                               int(row1 - row < mr ? row1 - row : mr), n, add);
                }
            }
        }
    }
    const size_t rotated = p.rope ? p.rope_heads * size_t(p.rope->HS) : 0;
    if (n0 < rotated) {
        rope_block(dev, sum, lds, *p.rope, rotated - n0 < nc ? rotated - n0 : nc, row0, row1);
    }
    if constexpr (!in_place) {
        for (size_t i = 0; i < row1 - row0; i++) {
            row_convert(dev, out + i * p.ldc, sum + i * lds, nc);
        }
    }
}

// Rows that are whole strips in both formats of a product.
template <class X>
size_t band_unit(const Cpu<X>& dev) {
    const size_t a = size_t(base_format(dev).MR), b = size_t(adapter_format(dev).MR);
    size_t unit = a;
    while (unit % b != 0) {
        unit += a;
    }
    return unit;
}

// How products are cut: blocks of nc columns and `band` rows.
struct GemmCut {
    size_t nc, band;
};

// The cheapest cut for this many threads, by a count in units of one element's products: a block's columns cost its
// rows and the packing of B (as much as PACK_ROWS rows), and every strip is brought from memory once a block (as much
// as STRIP_COLUMNS columns). Rows are cut where columns do not go round.
template <class X, class Out>
GemmCut gemm_cut(const Cpu<X>& dev, const Product<X, Out>* products, int count, size_t M, size_t threads) {
    constexpr size_t PACK_ROWS = 10, STRIP_COLUMNS = 12;
    const size_t unit = band_unit(dev);
    const size_t longest = std::is_same<Out, typename Cpu<X>::real>::value ? M : SUMS_ROWS;
    size_t step = 64, most = 0;  // whole panels, whole blocks of NF4, whole heads
    for (int i = 0; i < count; i++) {
        most = products[i].n > most ? products[i].n : most;
        step = products[i].rope ? rope_step(products[i].rope->HS) : step;
    }
    const size_t widest = round_up(most < BLOCK_COLUMNS ? most : BLOCK_COLUMNS / step * step, step);
    GemmCut best = {};
    size_t least = ~size_t(0);
    const size_t fewest = (M + longest - 1) / longest;
    for (size_t bands = fewest; bands <= fewest * threads && (bands == fewest || M > (bands - 1) * unit); bands++) {
        const size_t band = round_up((M + bands - 1) / bands, unit);
        for (size_t nc = widest; nc > 0; nc -= step) {
            size_t blocks = 0;
            for (int i = 0; i < count; i++) {
                blocks += (products[i].n + nc - 1) / nc;
            }
            const size_t rounds = (blocks * ((M + band - 1) / band) + threads - 1) / threads;
            const size_t rows = band < M ? band : M, cost = rounds * (nc + STRIP_COLUMNS) * (rows + PACK_ROWS);
            if (cost < least) {
                least = cost;
                best = {nc, band};
            }
        }
    }
    return best;
}

// All products share M and are independent. Blocks are dealt to the threads as they become free; how they are cut moves
// no bit.
template <class X, class Out>
void gemm(const Cpu<X>& dev, const Product<X, Out>* products, int count, size_t M, char* scratch) {
    if (count == 0 || M == 0) {
        return;
    }
    size_t work = 0;
    for (int i = 0; i < count; i++) {
        for (int t = 0; t < products[i].terms; t++) {
            work += M * products[i].n * products[i].term[t].K;
        }
    }
    const int threads = worth_threads(dev, work, GEMM_LEAST);
    const GemmCut cut = gemm_cut(dev, products, count, M, size_t(threads));
    const size_t bands = (M + cut.band - 1) / cut.band;
    size_t blocks = 0;
    for (int i = 0; i < count; i++) {
        blocks += (products[i].n + cut.nc - 1) / cut.nc;
    }
    parallel_tasks(threads, blocks * bands, [&](size_t task, int worker) {
        size_t block = task / bands;
        const size_t row0 = task % bands * cut.band;
        const Product<X, Out>* p = products;
        while (block >= (p->n + cut.nc - 1) / cut.nc) {
            block -= (p->n + cut.nc - 1) / cut.nc;
            p++;
        }
        const size_t n0 = block * cut.nc, columns = p->n - n0 < cut.nc ? p->n - n0 : cut.nc;
        gemm_block(dev, *p, M, n0, columns, row0, M - row0 < cut.band ? M : row0 + cut.band,
                   scratch_of(dev, scratch, worker));
    });
}
