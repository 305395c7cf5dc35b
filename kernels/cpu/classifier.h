// The head and its cross-entropy, for the rows that have a label only, in chunks of rows so that the logits of a pass
// never stand in memory together.
//
//   logits = x W^T,  lse = log sum_v exp(logit_v),  loss = lse - logit_label
//   dlogit_v = scale (exp(logit_v - lse) - [v = label]),  dx = dlogits W
#pragma once
#include <cmath>

#include "kernels/cpu/gemm.h"

constexpr size_t CLASSIFIER_LOGITS = size_t(1) << 24;                // elements of the logits of a chunk, at most ...
constexpr size_t CLASSIFIER_ROWS = 512, CLASSIFIER_LEAST_ROWS = 48;  // ... within these bounds
constexpr size_t CLASSIFIER_COLUMNS = 8192;                          // of dlogits, packed together; whole blocks of KC

template <class Real>
struct ClassifierSpace {
    char* scratch;
    size_t rows;           // of a chunk
    Strips<Real> x;        // input of a chunk
    Real* logits;          // (rows, V)
    Real* lse;             // (rows)
    Strips<Real> dlogits;  // (rows, CLASSIFIER_COLUMNS)
    Real* dx;              // (rows, C)
};

template <class X>
ClassifierSpace<typename Cpu<X>::real> classifier_space(const Cpu<X>& dev, Arena& arena, int C, int V, size_t n) {
    using Real = typename Cpu<X>::real;
    ClassifierSpace<Real> s = {};
    s.rows = CLASSIFIER_LOGITS / size_t(V);
    s.rows = s.rows < CLASSIFIER_ROWS ? s.rows : CLASSIFIER_ROWS;
    s.rows = s.rows > CLASSIFIER_LEAST_ROWS ? s.rows : CLASSIFIER_LEAST_ROWS;
    s.rows = s.rows < n ? s.rows : n;
    s.scratch = thread_scratch(dev, arena);
    s.x = strips_take(arena, base_format(dev), s.rows, size_t(C));
    s.logits = arena_take<Real>(arena, s.rows * size_t(V));
    s.lse = arena_take<Real>(arena, s.rows);
    const size_t columns = size_t(V) < CLASSIFIER_COLUMNS ? size_t(V) : CLASSIFIER_COLUMNS;
    s.dlogits = strips_take(arena, base_format(dev), s.rows, columns);
    s.dx = arena_take<Real>(arena, s.rows * size_t(C));
    return s;
}

template <class X>
size_t classifier_workspace(const Cpu<X>& dev, int C, int V, size_t n) {
    Arena arena;
    classifier_space(dev, arena, C, V, n);
    return arena.used;
}

// logits (n, V) = x[rows] W^T.
template <class X, class Real>
void head_product(Cpu<X>& dev, Real* logits, const LinearInput<X, Real>& in, const Matrix& head, const int32_t* rows,
                  size_t n, const ClassifierSpace<Real>& s) {
    Operand<X> x = operand_input<X>(in, head.cols);
    x.map = rows;
    pack_a(dev, s.x, x, false, n, size_t(head.cols), s.scratch);
    Product<X, Real> product;
    product.c = logits;
    product.ldc = product.n = size_t(head.rows);
    product_add(product, s.x, size_t(head.cols), operand_weight<X>(head), false);
    gemm(dev, &product, 1, n, s.scratch);
}

// dx (n, C) = dlogits (n, V) W, a run of the vocabulary after another; dlogits are made of the logits as they are packed.
template <class X, class Real>
void head_backward(Cpu<X>& dev, const Matrix& head, const int32_t* labels, size_t n, Real scale,
                   const ClassifierSpace<Real>& s) {
    const size_t V = size_t(head.rows);
    for (size_t first = 0; first < V; first += CLASSIFIER_COLUMNS) {
        size_t columns = V - first < CLASSIFIER_COLUMNS ? V - first : CLASSIFIER_COLUMNS;
        Operand<X> dlogits = operand_softmax_grad<X>(s.logits, V, s.lse, labels, scale);
        dlogits.col0 = first;
        pack_a(dev, s.dlogits, dlogits, false, n, columns, s.scratch);
        Product<X, Real> product;
        product.c = s.dx;
        product.ldc = product.n = size_t(head.cols);
        product.add = first > 0;
        Operand<X> w = operand_weight<X>(head);
        w.row0 = first;
        product_add(product, s.dlogits, columns, w, true);
        gemm(dev, &product, 1, n, s.scratch);
    }
}

// logits (n, V) = x[rows] W^T. Workspace: classifier_workspace.
template <class X>
void head_logits(Cpu<X>& dev, typename Cpu<X>::real* logits, const LinearInput<X, typename Cpu<X>::real>& in,
                 const Matrix& head, const int32_t* rows, size_t n) {
    Arena arena = arena_of(dev);
    auto s = classifier_space(dev, arena, head.cols, head.rows, n);
    for (size_t first = 0; first < n; first += s.rows) {
        head_product(dev, logits + first * size_t(head.rows), in, head, rows + first,
                     n - first < s.rows ? n - first : s.rows, s);
    }
}

// For the n rows that have a label: losses[i] = lse - logit[label], correct[i] = label is the arg max (the lowest id
// wins a tie); din (N, C) = scale * gradient in those rows, 0 elsewhere. din nullptr: forward only.
template <class X>
void classifier(Cpu<X>& dev, typename Cpu<X>::real* losses, uint8_t* correct, X* din,
                const LinearInput<X, typename Cpu<X>::real>& in, const Matrix& head, const int32_t* rows,
                const int32_t* labels, size_t n, size_t N, typename Cpu<X>::real scale) {
    using Real = typename Cpu<X>::real;
    const size_t V = size_t(head.rows), C = size_t(head.cols);
    Arena arena = arena_of(dev);
    ClassifierSpace<Real> s = classifier_space(dev, arena, head.cols, head.rows, n);
    if (din) {
        parallel_ranges(dev.threads, N, PACK_LEAST / C + 1, [&](size_t begin, size_t end, int) {
            memset(static_cast<void*>(din + begin * C), 0, (end - begin) * C * sizeof(X));
        });
    }
    for (size_t first = 0; first < n; first += s.rows) {
        const size_t m = n - first < s.rows ? n - first : s.rows;
        head_product(dev, s.logits, in, head, rows + first, m, s);
        parallel_tasks(worth_threads(dev, m * V, PACK_LEAST), m, [&](size_t i, int) {
            const Real* logits = s.logits + i * V;
            const size_t label = size_t(labels[first + i]);
            const auto& kernels = row_kernels(dev);
            Real max = kernels.row_max(logits, V), target = logits[label];
            Real lse = max + std::log(kernels.exp_sum(logits, max, V));
            bool best = target == max;
            for (size_t v = 0; v < label && best; v++) {
                best = logits[v] < max;
            }
            losses[first + i] = lse - target;
            correct[first + i] = best;
            s.lse[i] = lse;
        });
        if (din) {
            head_backward(dev, head, labels + first, m, scale, s);
            parallel_ranges(dev.threads, m, PACK_LEAST / C + 1, [&](size_t begin, size_t end, int) {
                for (size_t i = begin; i < end; i++) {
                    row_convert(dev, din + size_t(rows[first + i]) * C, s.dx + i * C, C);
                }
            });
        }
    }
}
