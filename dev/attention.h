// What attention_forward.cu and attention_backward.cu of dev/ share: shapes, documents, the probabilities of a row.
#pragma once
#include <algorithm>
#include <cmath>

#include "dev/harness.h"
#include "kernels/attention.cuh"
#include "kernels/cpu/attention.h"

constexpr size_t ROOM = 16;  // columns behind each row of an output that nothing may touch

static size_t row_width(const Shape& s) {
    return (s["NH"] + 2 * s["NKV"]) * s["HS"];
}

// T: tokens of a document; the last one has what is left of N.
static std::vector<Shape> attention_shapes() {
    return {{{"N", 8192}, {"T", 2048}, {"NH", 32}, {"NKV", 8}, {"HS", 128}},
            {{"N", 8192}, {"T", 8192}, {"NH", 32}, {"NKV", 8}, {"HS", 128}},
            {{"N", 8192}, {"T", 512}, {"NH", 32}, {"NKV", 8}, {"HS", 128}},
            {{"N", 8192}, {"T", 2048}, {"NH", 32}, {"NKV", 8}, {"HS", 64}}};
}
static std::vector<Shape> attention_cpu_shapes() {
    return {{{"N", 1024}, {"T", 1024}, {"NH", 12}, {"NKV", 4}, {"HS", 64}},
            {{"N", 512}, {"T", 512}, {"NH", 32}, {"NKV", 8}, {"HS", 64}},
            {{"N", 2048}, {"T", 2048}, {"NH", 8}, {"NKV", 2}, {"HS", 128}}};
}
static std::vector<Shape> attention_awkward_shapes() {
    return {{{"N", 1}, {"T", 1}, {"NH", 1}, {"NKV", 1}, {"HS", 64}},
            {{"N", 33}, {"T", 20}, {"NH", 9}, {"NKV", 3}, {"HS", 64}},
            {{"N", 200}, {"T", 130}, {"NH", 2}, {"NKV", 1}, {"HS", 64}},
            {{"N", 140}, {"T", 139}, {"NH", 2}, {"NKV", 1}, {"HS", 128}},
            {{"N", 70}, {"T", 35}, {"NH", 3}, {"NKV", 3}, {"HS", 80}}};
}

static bool tensor_core_heads(const Shape& s) {
    return s["HS"] == 64 || s["HS"] == 128;
}
// A score of each key fits 48 KB.
[[maybe_unused]] static bool short_documents(const Shape& s) {
    return s["T"] <= 12 * 1024;
}

// Pairs of a query and a key it sees, of one head.
static double pairs_of(const Shape& s) {
    const double T = double(s["T"]), rest = double(s["N"] % s["T"]);
    return double(s["N"] / s["T"]) * T * (T + 1) / 2 + rest * (rest + 1) / 2;
}

static Documents documents;  // of the configuration that was prepared last

template <class Dev>
static void place_documents(Dev& dev, const Run& r, int32_t* memory) {
    std::vector<int32_t> starts;
    for (size_t at = 0; at < r["N"]; at += r["T"]) {
        starts.push_back(int32_t(at));
    }
    starts.push_back(int32_t(r["N"]));
    documents = documents_place(dev, memory, starts.data(), int(starts.size()) - 1, int(r["HS"]));
    device_reserve(
        dev, attention_workspace(dev, r["N"], std::min(r["T"], r["N"]), int(r["NH"]), int(r["NKV"]), int(r["HS"])));
}

static PlainAttention plain_of(const Run& r) {
    return plain_attention(documents.cu_seqlens, documents.count, r["N"], int(r["NH"]), int(r["NKV"]), int(r["HS"]));
}

// P of query `row` and head h over the keys of its document, from the first; *lse too. The plain evaluation rounds
// where a framework stores: scores, scaled scores, P.
static std::vector<double> probabilities(const std::vector<double>& qkv, const Shape& s, const Precision& p, size_t h,
                                         size_t row, double* lse) {
    const size_t HS = s["HS"], width = row_width(s), first = row / s["T"] * s["T"];
    const size_t k_at = (s["NH"] + h / (s["NH"] / s["NKV"])) * HS;
    const double scale = p.f32(1 / std::sqrt(double(HS)));
    std::vector<double> P;
    double top = -INFINITY, sum = 0;
    for (size_t j = first; j <= row; j++) {
        double dot = 0;
        for (size_t c = 0; c < HS; c++) {
            dot = p.f32(dot + qkv[row * width + h * HS + c] * qkv[j * width + k_at + c]);
        }
        P.push_back(p.store(p.store(dot) * scale));
        top = std::max(top, P.back());
    }
    for (double& x : P) {
        x = p.f32(std::exp(x - top));
        sum = p.f32(sum + x);
    }
    for (double& x : P) {
        x = p.store(x / sum);
    }
    *lse = p.f32(top + p.f32(std::log(sum)));
    return P;
}

// p[j] = softmax of q k_j scale over n keys, rows of k stride apart; returns the log-sum-exp. In plain loops.
[[maybe_unused]] static float plain_probabilities(float* p, const float* q, const float* k, size_t stride, size_t n,
                                                  size_t HS) {
    const float scale = 1 / std::sqrt(float(HS));
    float top = -INFINITY, sum = 0;
    for (size_t j = 0; j < n; j++) {
        float dot = 0;
        for (size_t c = 0; c < HS; c++) {
            dot += q[c] * k[j * stride + c];
        }
        p[j] = dot * scale;
        top = std::max(top, p[j]);
    }
    for (size_t j = 0; j < n; j++) {
        p[j] = std::exp(p[j] - top);
        sum += p[j];
    }
    for (size_t j = 0; j < n; j++) {
        p[j] /= sum;
    }
    return top + std::log(sum);
}
