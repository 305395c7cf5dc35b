// The reference models of dev/ref as Llama objects, and their dumps: what the tests of the whole model start from.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "dev/tests/test.h"
#include "train_step.h"

inline const char* const reference_names[] = {"gqa_llama3", "tied",    "head_dim",     "odd_width",
                                              "bnb_nf4",    "qv_only", "linear_rslora"};

struct Dump {
    Safetensors st;

    bool has(const std::string& name) const { return safetensors_find(st, name) != nullptr; }
    std::vector<uint8_t> bytes(const std::string& name) const {
        const Tensor* t = safetensors_find(st, name);
        std::vector<uint8_t> raw(t ? t->bytes : 0);
        if (CHECK(t != nullptr, "the dump has no %s", name.c_str())) {
            Error e = safetensors_read(st, *t, raw.data(), 0, raw.size());
            CHECK(!e, "%s", e.what.c_str());
        }
        return raw;
    }
    template <class T>
    std::vector<T> values(const std::string& name) const {
        std::vector<uint8_t> raw = bytes(name);
        std::vector<T> out(raw.size() / sizeof(T));
        memcpy(out.data(), raw.data(), out.size() * sizeof(T));
        return out;
    }
    std::vector<double> numbers(const std::string& name) const {
        const Tensor* t = safetensors_find(st, name);
        if (t != nullptr && t->dtype == "F64") {
            return values<double>(name);
        }
        std::vector<float> x = values<float>(name);
        return {x.begin(), x.end()};
    }
};

// A reference model with its adapter and batch. close it with llama_free(f.m) and safetensors_close(f.dump.st).
template <class Dev>
struct Fixture {
    Llama<Dev> m;
    Dump dump;
    Batch batch;
    bool ok = false;
};

// cu_seqlens and labels as the dump has them; positions restart in each document.
inline void batch_from_dump(Batch& b, const Dump& d) {
    b.tokens = d.values<int32_t>("tokens");
    b.labels = d.values<int32_t>("targets");
    b.cu_seqlens = d.values<int32_t>("cu_seqlens");
    b.n_labels = 0;
    b.positions.clear();
    b.example.clear();
    for (size_t doc = 0; doc + 1 < b.cu_seqlens.size(); doc++) {
        for (int i = b.cu_seqlens[doc]; i < b.cu_seqlens[doc + 1]; i++) {
            b.positions.push_back(i - b.cu_seqlens[doc]);
            b.example.push_back(uint32_t(doc));
            b.n_labels += b.labels[i] >= 0;
        }
    }
}

// Document d of a batch as a batch of its own.
inline Batch one_document(const Batch& b, size_t d) {
    Batch one;
    const int first = b.cu_seqlens[d], last = b.cu_seqlens[d + 1];
    one.tokens.assign(b.tokens.begin() + first, b.tokens.begin() + last);
    one.labels.assign(b.labels.begin() + first, b.labels.begin() + last);
    one.positions.assign(b.positions.begin() + first, b.positions.begin() + last);
    one.example.assign(b.example.begin() + first, b.example.begin() + last);
    one.cu_seqlens = {0, last - first};
    one.n_labels = size_t(std::count_if(one.labels.begin(), one.labels.end(), [](int32_t x) { return x >= 0; }));
    return one;
}

struct FixtureOptions {
    int threads = 2;
    BaseOptions base = {false, true};  // as stored
    const char* recompute = "none";    // as recompute_text has it
    float dropout = 0;
};

template <class Dev>
void fixture_open(Fixture<Dev>& f, const std::string& name, const FixtureOptions& o = {}) {
    std::string dir = source_path("dev/ref/" + name), hash;
    std::vector<std::string> warnings;
    device_open(f.m.dev, o.threads);
    LoraConfig lora;
    Error e = safetensors_open(f.dump.st, dir + "/dump.safetensors");
    e = e ? e : llama_config_read(f.m.c, dir);
    BaseOptions base = o.base;
    base.nf4 |= f.m.c.bnb_nf4;
    e = e ? e : llama_load(f.m, &hash, warnings, dir, base);
    e = e ? e : adapter_config_read(lora, dir + "/adapter");
    if (!CHECK(!e, "%s", e.what.c_str())) {
        return;
    }
    lora.dropout = o.dropout;
    batch_from_dump(f.batch, f.dump);
    llama_adapter_create(f.m, lora);
    e = adapter_load(f.m, dir + "/adapter");
    RecomputePlan recompute;
    f.ok =
        CHECK(!e, "%s", e.what.c_str()) && CHECK(recompute_parse(recompute, o.recompute, f.m.c.L), "%s", o.recompute);
    llama_activations_create(f.m, f.batch.size() + 32, f.batch.size(), recompute, true);
}

template <class Dev>
void fixture_close(Fixture<Dev>& f) {
    llama_free(f.m);
    safetensors_close(f.dump.st);
}

// Loss of the batch and its gradient in adapter.g (which is zeroed first). Returns the mean over n targets.
template <class Dev>
double fixture_gradient(Llama<Dev>& m, const Batch& b, size_t n, uint32_t step = 1) {
    llama_zero_gradients(m);
    Pass<Dev> p = llama_forward(m, b, step, float(m.adapter.lora.dropout));
    double loss = llama_loss(m, p, true, 1 / double(n)).loss / double(n);
    llama_backward(m, p);
    return loss;
}

inline double rms(const std::vector<double>& x) {
    double s = 0;
    for (double v : x) {
        s += v * v;
    }
    return std::sqrt(s / double(x.size()));
}
