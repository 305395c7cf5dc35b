// The architecture, written once for every device: the lists of weights, adapters and activations, forward, loss,
// backward, update. It calls the ops of kernels/kernels.h and does no arithmetic on tensors itself. Reading and writing
// files is llama_io.h, the run is train_llama.cu.
//
//   x0 = embed[tokens]
//   layer:  mid = x + o(attention(rope(qkv(norm1(x)))))        every linear: y = W x + scale B A drop(x), W frozen
//           x'  = mid + down(silu(gate) * up),  gate, up = gate_up(norm2(mid))
//   loss = sum of cross-entropy(head(norm(xL))) over the rows that have a label
//
// Letters: N tokens of a pass (whole documents in a row, no padding), L layers, C hidden, F ffn, NH query heads, NKV
// key/value heads, HS head size, V vocabulary, R rank, OC output channels; QKV = (NH + 2 NKV) HS. d... = gradient.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels/comm.h"
#include "kernels/kernels.h"
#include "llama_config.h"
#include "tokenizer/dataset.h"

// ---------------------------------------------------------------------------------------------------------------------
// the seven linears of a layer, and their adapters

enum Module { Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ, MODULES };

inline const char* const module_path[MODULES] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                                 "self_attn.o_proj", "mlp.gate_proj",    "mlp.up_proj",
                                                 "mlp.down_proj"};

inline int module_rows(const LlamaConfig& c, int m) {  // output channels
    switch (m) {
        case Q_PROJ: return c.NH * c.HS;
        case K_PROJ:
        case V_PROJ: return c.NKV * c.HS;
        case O_PROJ:
        case DOWN_PROJ: return c.C;
        default: return c.F;
    }
}

inline int module_cols(const LlamaConfig& c, int m) {  // input channels
    return m == O_PROJ ? c.NH * c.HS : m == DOWN_PROJ ? c.F : c.C;
}

// What makes an adapter: LoRA (Hu et al. 2021), scale alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023).
struct LoraConfig {
    int r = 16;
    double alpha = 32;
    bool rslora = false;
    double dropout = 0;
    bool target[MODULES] = {true, true, true, true, true, true, true};

    double scale() const { return rslora ? alpha / std::sqrt(double(r)) : alpha / r; }
};

// ---------------------------------------------------------------------------------------------------------------------
// list 1: the frozen weights

template <class Real>
struct LayerWeights {
    Real* norm1 = nullptr;   // (C) input_layernorm
    Real* norm2 = nullptr;   // (C) post_attention_layernorm
    Matrix linear[MODULES];  // (module_rows, module_cols)
};

template <class Real>
struct Weights {
    Matrix embed;                // (V, C)
    Matrix head;                 // (V, C); the same as embed when tied
    Real* final_norm = nullptr;  // (C)
    std::vector<LayerWeights<Real>> layers;
};

// The base comes in units, each in one piece of memory and read by one rank:
//   0 the embedding    1 .. L the layers    L + 1 the final norm and the head
inline int base_units(const LlamaConfig& c) {
    return c.L + 2;
}

// Calls v.matrix(name, matrix, rows, cols, is_linear) and v.vector(name, pointer, length) for every weight of a unit by
// its Hugging Face name. The head is left out when it is tied.
template <class Real, class Visitor>
void each_weight_of(Weights<Real>& w, const LlamaConfig& c, int unit, Visitor&& v) {
    w.layers.resize(c.L);
    if (unit == 0) {
        v.matrix("model.embed_tokens.weight", w.embed, c.V, c.C, false);
        return;
    }
    if (unit > c.L) {
        v.vector("model.norm.weight", w.final_norm, c.C);
        if (!c.tied) {
            v.matrix("lm_head.weight", w.head, c.V, c.C, false);
        }
        return;
    }
    LayerWeights<Real>& layer = w.layers[unit - 1];
    const std::string name = "model.layers." + std::to_string(unit - 1) + ".";
    v.vector(name + "input_layernorm.weight", layer.norm1, c.C);
    for (int m = 0; m < MODULES; m++) {
        if (m == GATE_PROJ) {
            v.vector(name + "post_attention_layernorm.weight", layer.norm2, c.C);
        }
        v.matrix(name + module_path[m] + ".weight", layer.linear[m], module_rows(c, m), module_cols(c, m), true);
    }
}

template <class Real, class Visitor>
void each_weight(Weights<Real>& w, const LlamaConfig& c, Visitor&& v) {
    for (int unit = 0; unit < base_units(c); unit++) {
        each_weight_of(w, c, unit, v);
    }
}

struct UnitMemory {
    char* p = nullptr;
    size_t bytes = 0;
};

// A base spread over the ranks: each keeps a slice of every layer's unit, and two layers at a time are whole, layer l in
// buffer l % 2. slice = 0: every rank has the whole base.
struct SpreadBase {
    size_t slice = 0;         // bytes
    char* mine = nullptr;     // (L, slice)
    char* whole[2] = {};      // (ranks, slice) each
    int holds[2] = {-1, -1};  // the layer that is there or on its way
    bool coming[2] = {};      // on its way
};

// ---------------------------------------------------------------------------------------------------------------------
// list 2: the adapter. Parameters, gradients and the two moments are four flat buffers with one layout.

template <class Real>
struct Adapter {
    LoraConfig lora;
    size_t size = 0;  // elements of each buffer
    Real* p = nullptr;
    Real* g = nullptr;
    Real* m = nullptr;
    Real* v = nullptr;
};

// Calls v(name, layer, module, is_b, rows, cols, offset) for every A (R, in) and B (out, R) by its PEFT name; offset
// counts elements in the flat buffers. Returns their size.
template <class Visitor>
size_t each_adapter(const LlamaConfig& c, const LoraConfig& lora, Visitor&& v) {
    size_t offset = 0;
    for (int l = 0; l < c.L; l++) {
        for (int m = 0; m < MODULES; m++) {
            for (int is_b = 0; lora.target[m] && is_b < 2; is_b++) {
                std::string name = "base_model.model.model.layers." + std::to_string(l) + "." + module_path[m] +
                                   (is_b ? ".lora_B.weight" : ".lora_A.weight");
                int rows = is_b ? module_rows(c, m) : lora.r;
                int cols = is_b ? lora.r : module_cols(c, m);
                v(name, l, m, is_b == 1, rows, cols, offset);
                offset += size_t(rows) * cols;
            }
        }
    }
    return offset;
}

inline size_t adapter_elements(const LlamaConfig& c, const LoraConfig& lora) {
    return each_adapter(c, lora, [](const std::string&, int, int, bool, int, int, size_t) {});
}

// ---------------------------------------------------------------------------------------------------------------------
// list 3: the activations

// What backward finds again of a layer; the rest it makes anew, to the same bits.
//          resid, rstd1, xa    mid, rstd2, attn, lse    qkv      gate_up
//   NONE   kept                kept                     kept     kept
//   FFN    kept                kept                     kept     made from mid
//   ATTN   kept                kept                     made     made
//   FULL   kept                made                     made     made
enum class Recompute { NONE, FFN, ATTN, FULL };

// How many layers do which: the first ones NONE, the next FFN, and so on.
struct RecomputePlan {
    int layers[4] = {};
};

inline RecomputePlan recompute_everywhere(Recompute r, int L) {
    RecomputePlan p;
    p.layers[int(r)] = L;
    return p;
}

// Layers that keep at least what `r` keeps; they are the first ones.
inline int layers_keeping(const RecomputePlan& p, Recompute r) {
    int n = 0;
    for (int i = 0; i <= int(r); i++) {
        n += p.layers[i];
    }
    return n;
}

inline Recompute recompute_of(const RecomputePlan& p, int l) {
    return l < layers_keeping(p, Recompute::NONE)   ? Recompute::NONE
           : l < layers_keeping(p, Recompute::FFN)  ? Recompute::FFN
           : l < layers_keeping(p, Recompute::ATTN) ? Recompute::ATTN
                                                    : Recompute::FULL;
}

template <class Dev>
struct Activations {
    using X = typename Dev::floatX;
    using real = typename Dev::real;
    // for backward: a copy for each layer that keeps it (n), and one for all the others
    X* resid;     // (L+1, N, C)    input of layer l; the last: output of the last layer
    X* mid;       // (n, N, C)      after attention's residual add
    X* qkv;       // (n, N, QKV)    rotated
    X* attn;      // (n, N, NH HS | room)
    real* lse;    // (n, NH, N)
    X* gate_up;   // (n, N, 2F)
    real* rstd1;  // (L, N)
    real* rstd2;  // (n, N)
    real* rstd;   // (N)            of the final norm
    X* xa[4];     // (L, N, R of the group)  A products of qkv, o, gate_up, down
    // gradients, one layer at a time
    X* dresid;    // (N, C | room)
    X* dnorm;     // (N, C)
    X* dattn;     // (N, NH HS)
    X* dqkv;      // (N, QKV | room)
    X* dswiglu;   // (N, F)
    X* dgate_up;  // (N, 2F | room)
    // of the batch
    int32_t* tokens;     // (N)
    int32_t* positions;  // (N)
    int32_t* documents;  // cu_seqlens, and what else the device wants to know of them
    uint32_t* example;   // (N)
    int32_t* rows;       // (N)  rows that have a label
    int32_t* labels;     // (N)  their labels
    real* losses;        // (N)
    uint8_t* correct;    // (N)
};

enum Group { QKV_GROUP, O_GROUP, GATE_UP_GROUP, DOWN_GROUP, GROUPS };
inline const int group_first[GROUPS + 1] = {Q_PROJ, O_PROJ, GATE_PROJ, DOWN_PROJ, MODULES};

inline int group_rank(const LoraConfig& lora, int group) {
    int r = 0;
    for (int m = group_first[group]; m < group_first[group + 1]; m++) {
        r += lora.target[m] ? lora.r : 0;
    }
    return r;
}

// Elements from row to row of the buffers whose rows have room behind them for a group's adapter products.
struct RowStrides {
    size_t attn, dresid, dqkv, dgate_up;
};

template <class Dev>
RowStrides row_strides(const LlamaConfig& c, const LoraConfig& lora) {
    const auto room = [&](int g) { return Dev::row_room(group_rank(lora, g)); };
    return {size_t(c.NH) * c.HS + room(O_GROUP), size_t(c.C) + std::max(room(O_GROUP), room(DOWN_GROUP)),
            size_t(c.NH + 2 * c.NKV) * c.HS + room(QKV_GROUP), size_t(2) * c.F + room(GATE_UP_GROUP)};
}

// Calls v(name, pointer, copies, elements of a copy) for every activation of passes of up to N tokens. `backward` is
// false for a model that only evaluates: then one layer's copy of everything serves all layers.
template <class Dev, class Visitor>
void each_activation(Activations<Dev>& a, const LlamaConfig& c, const LoraConfig& lora, size_t N,
                     const RecomputePlan& recompute, bool backward, Visitor&& v) {
    const size_t QKV = size_t(c.NH + 2 * c.NKV) * c.HS, ATT = size_t(c.NH) * c.HS, L = c.L;
    const RowStrides stride = row_strides<Dev>(c, lora);
    const size_t all = backward ? L : 1;
    const auto kept = [&](Recompute r) { return backward ? std::min(L, size_t(layers_keeping(recompute, r)) + 1) : 1; };
    v("resid", a.resid, backward ? L + 1 : 2, N * c.C);
    v("mid", a.mid, kept(Recompute::ATTN), N * c.C);
    v("qkv", a.qkv, kept(Recompute::FFN), N * QKV);
    v("attn", a.attn, kept(Recompute::ATTN), N * stride.attn);
    v("lse", a.lse, kept(Recompute::ATTN), N * c.NH);
    v("gate_up", a.gate_up, kept(Recompute::NONE), N * 2 * c.F);
    v("rstd1", a.rstd1, all, N);
    v("rstd2", a.rstd2, kept(Recompute::ATTN), N);
    v("rstd", a.rstd, size_t(1), N);
    const char* const xa_name[GROUPS] = {"xa_qkv", "xa_o", "xa_gate_up", "xa_down"};
    for (int g = 0; g < GROUPS; g++) {
        v(xa_name[g], a.xa[g], all, N * group_rank(lora, g));
    }
    const size_t one = backward ? 1 : 0;
    v("dresid", a.dresid, one, N * stride.dresid);
    v("dnorm", a.dnorm, one, N * c.C);
    v("dattn", a.dattn, one, N * ATT);
    v("dqkv", a.dqkv, one, N * stride.dqkv);
    v("dswiglu", a.dswiglu, one, N * c.F);
    v("dgate_up", a.dgate_up, one, N * stride.dgate_up);
    v("tokens", a.tokens, size_t(1), N);
    v("positions", a.positions, size_t(1), N);
    v("documents", a.documents, size_t(1), Dev::document_ints(N));
    v("example", a.example, size_t(1), N);
    v("rows", a.rows, size_t(1), N);
    v("labels", a.labels, size_t(1), N);
    v("losses", a.losses, size_t(1), N);
    v("correct", a.correct, size_t(1), N);
}

// Every allocation begins at a multiple of this.
inline size_t placed_bytes(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

template <class Dev>
size_t activation_bytes(const LlamaConfig& c, const LoraConfig& lora, size_t N, const RecomputePlan& recompute,
                        bool backward) {
    Activations<Dev> a;
    size_t bytes = 0;
    each_activation(a, c, lora, N, recompute, backward, [&](const char*, auto*& p, size_t copies, size_t elements) {
        bytes += placed_bytes(std::max<size_t>(copies * elements, 1) * sizeof(*p));  // llama_alloc's least is one
    });
    return bytes;
}

// ---------------------------------------------------------------------------------------------------------------------
// the model

// Where the time of a step goes, for --benchmark.
enum Op {
    OP_EMBED,
    OP_NORM,
    OP_QKV,
    OP_ATTENTION,
    OP_O,
    OP_GATE_UP,
    OP_DOWN,
    OP_SWIGLU,
    OP_HEAD,
    OP_ADAMW,
    OP_RANKS,
    OPS
};
inline const char* const op_name[OPS] = {"embedding", "rmsnorm", "qkv",       "attention", "o",           "gate_up",
                                         "down",      "swiglu",  "head+loss", "adamw",     "other ranks"};

template <class Dev>
struct OpTimer {  // adds the device's time until the end of its scope
    Dev& dev;
    OpTimer(Dev& d, double& seconds) : dev(d) { device_clock_start(dev, &seconds); }
    ~OpTimer() { device_clock_stop(dev); }
};

template <class Dev>
struct Llama {
    using X = typename Dev::floatX;
    using real = typename Dev::real;

    Dev dev;
    LlamaConfig c;
    Weights<real> w;
    std::vector<UnitMemory> units;  // of the base
    SpreadBase spread;
    Adapter<real> adapter;
    Activations<Dev> acts;
    RecomputePlan recompute;
    bool backward = true;      // activations for backward are there
    size_t max_tokens = 0;     // of a pass
    size_t max_positions = 0;  // of a document
    real* rope_cos = nullptr;  // (max_positions, HS/2)
    real* rope_sin = nullptr;
    std::vector<LinearGroup<real>> groups;  // (L, GROUPS)
    std::vector<void*> allocations;
    size_t placed = 0;  // bytes of them
    double op_seconds[OPS] = {};
    uint64_t dropout_seed = 0;
    size_t summed_from = 0;  // gradients from this element on are being summed over the ranks
};

template <class Dev, class T>
void llama_alloc(Llama<Dev>& m, T*& p, size_t elements, const char* what) {
    const size_t bytes = std::max<size_t>(elements, 1) * sizeof(T);
    p = static_cast<T*>(device_alloc(m.dev, bytes, what));
    m.allocations.push_back(p);
    m.placed += placed_bytes(bytes);
}

// The four adapter buffers (gradients and moments zero, p not yet set) and the linear groups that point into them.
// Weights must be in place. paged: moments on the host, where the device has memory apart from it.
template <class Dev>
void llama_adapter_create(Llama<Dev>& m, const LoraConfig& lora, bool paged = false) {
    using real = typename Dev::real;
    Adapter<real>& a = m.adapter;
    a.lora = lora;
    a.size = adapter_elements(m.c, lora);
    llama_alloc(m, a.p, a.size, "adapter");
    llama_alloc(m, a.g, a.size, "adapter gradients");
    device_zero(m.dev, a.p, a.size * sizeof(real));
    device_zero(m.dev, a.g, a.size * sizeof(real));
    a.m = paged ? static_cast<real*>(device_alloc_host(m.dev, a.size * sizeof(real), "first moments")) : nullptr;
    if (a.m != nullptr) {
        a.v = static_cast<real*>(device_alloc_host(m.dev, a.size * sizeof(real), "second moments"));
        moments_open(m.dev, a.m);
        m.placed += moments_slab_bytes(m.dev);
    } else {
        llama_alloc(m, a.m, a.size, "first moments");
        llama_alloc(m, a.v, a.size, "second moments");
        device_zero(m.dev, a.m, a.size * sizeof(real));
        device_zero(m.dev, a.v, a.size * sizeof(real));
    }
    m.groups.assign(size_t(m.c.L) * GROUPS, {});
    for (int l = 0; l < m.c.L; l++) {
        for (int g = 0; g < GROUPS; g++) {
            LinearGroup<real>& group = m.groups[size_t(l) * GROUPS + g];
            for (int i = group_first[g]; i < group_first[g + 1]; i++) {
                LinearPart<real>& part = group.part[group.parts++];
                part.w = m.w.layers[l].linear[i];
                part.scale = real(lora.scale());
                part.module = uint32_t(l * MODULES + i);
                group.OC += module_rows(m.c, i);
            }
            group.C = module_cols(m.c, group_first[g]);
            group.R = group_rank(lora, g);
        }
    }
    each_adapter(m.c, lora, [&](const std::string&, int l, int module, bool is_b, int, int, size_t offset) {
        int g = 0;
        while (module >= group_first[g + 1]) {
            g++;
        }
        LinearPart<real>& part = m.groups[size_t(l) * GROUPS + g].part[module - group_first[g]];
        part.r = lora.r;
        (is_b ? part.B : part.A) = a.p + offset;
        (is_b ? part.dB : part.dA) = a.g + offset;
    });
}

// A from U(-1/sqrt(in), 1/sqrt(in)), which is PEFT's kaiming_uniform(a = sqrt 5); B zero.
template <class Dev>
void llama_adapter_init(Llama<Dev>& m, uint64_t seed) {
    using real = typename Dev::real;
    std::vector<real> p(m.adapter.size, real(0));
    each_adapter(m.c, m.adapter.lora,
                 [&](const std::string&, int l, int module, bool is_b, int rows, int cols, size_t offset) {
                     double bound = 1 / std::sqrt(double(cols));
                     for (size_t i = 0; !is_b && i < size_t(rows) * cols; i++) {
                         double u = random_uniform(seed, STREAM_ADAPTER, uint64_t(l) * MODULES + module, i);
                         p[offset + i] = real(float((2 * u - 1) * bound));
                     }
                 });
    device_to(m.dev, m.adapter.p, p.data(), p.size() * sizeof(real));
}

// Bytes of workspace that passes of N tokens, with documents of up to `longest`, need.
template <class Dev>
size_t llama_workspace_bytes(const Llama<Dev>& m, size_t N, size_t longest) {
    size_t bytes = attention_workspace(m.dev, N, longest, m.c.NH, m.c.NKV, m.c.HS);
    for (const LinearGroup<typename Dev::real>& g : m.groups) {
        bytes = std::max(bytes, linear_workspace(m.dev, g, N));
    }
    return std::max({bytes, classifier_workspace(m.dev, m.c.C, m.c.V, N), optimizer_workspace(m.dev)});
}

// Bytes of memory for weights restored ahead, for passes of N tokens.
template <class Dev>
size_t llama_slot_bytes(const Llama<Dev>& m, size_t N) {
    size_t bytes = 0;
    for (const LinearGroup<typename Dev::real>& g : m.groups) {
        bytes = std::max(bytes, linear_slot_bytes(m.dev, g, N));
    }
    return bytes;
}

// Activations for passes of up to N tokens, RoPE tables for documents of up to `longest`, the workspace.
template <class Dev>
void llama_activations_create(Llama<Dev>& m, size_t N, size_t longest, const RecomputePlan& recompute, bool backward) {
    using real = typename Dev::real;
    m.max_tokens = N;
    m.max_positions = longest;
    m.recompute = recompute;
    m.backward = backward;
    each_activation(m.acts, m.c, m.adapter.lora, N, recompute, backward,
                    [&](const char* name, auto*& p, size_t copies, size_t elements) {
                        llama_alloc(m, p, copies * elements, name);
                    });
    linear_slots_reserve(m.dev, llama_slot_bytes(m, N));
    device_reserve(m.dev, llama_workspace_bytes(m, N, longest));
    const size_t half = m.c.HS / 2;
    std::vector<float> inv_freq = llama_inv_freq(m.c);
    std::vector<real> cos_table(longest * half), sin_table(longest * half);
    for (size_t t = 0; t < longest; t++) {
        for (size_t i = 0; i < half; i++) {
            float angle = float(t) * inv_freq[i];  // careful: the reference multiplies in fp32
            cos_table[t * half + i] = real(float(std::cos(double(angle))));
            sin_table[t * half + i] = real(float(std::sin(double(angle))));
        }
    }
    llama_alloc(m, m.rope_cos, longest * half, "rope cos");
    llama_alloc(m, m.rope_sin, longest * half, "rope sin");
    device_to(m.dev, m.rope_cos, cos_table.data(), cos_table.size() * sizeof(real));
    device_to(m.dev, m.rope_sin, sin_table.data(), sin_table.size() * sizeof(real));
}

template <class Dev>
void llama_free(Llama<Dev>& m) {
    for (void* p : m.allocations) {
        device_free(m.dev, p);
    }
    m.allocations.clear();
    device_close(m.dev);
}

// ---------------------------------------------------------------------------------------------------------------------
// one pass

// What the functions of a pass share.
template <class Dev>
struct Pass {
    size_t N = 0;
    Documents docs;
    Rope<typename Dev::real> rope;
    Dropout dropout;
    size_t n_labels = 0;
};

// Layer l's copy of an activation of max_tokens rows that the layers up to `least` keep.
template <class Dev, class T>
T* layer_copy(const Llama<Dev>& m, T* base, int l, Recompute least, size_t row) {
    return base + (m.backward ? size_t(std::min(l, layers_keeping(m.recompute, least))) : 0) * m.max_tokens * row;
}

template <class Dev>
struct LayerActivations {  // the rows of layer l, and what the linears read
    using X = typename Dev::floatX;
    using real = typename Dev::real;
    X *x, *next, *mid, *qkv, *attn, *gate_up, *xa[GROUPS];
    real *lse, *rstd1, *rstd2;
    size_t attn_stride;
};

template <class Dev>
LayerActivations<Dev> layer_activations(const Llama<Dev>& m, int l) {
    const LlamaConfig& c = m.c;
    const Activations<Dev>& a = m.acts;
    const bool one = !m.backward;
    const RowStrides stride = row_strides<Dev>(c, m.adapter.lora);
    LayerActivations<Dev> y;
    y.x = a.resid + (one ? size_t(l) % 2 : size_t(l)) * m.max_tokens * c.C;
    y.next = a.resid + (one ? size_t(l + 1) % 2 : size_t(l + 1)) * m.max_tokens * c.C;
    y.mid = layer_copy(m, a.mid, l, Recompute::ATTN, c.C);
    y.qkv = layer_copy(m, a.qkv, l, Recompute::FFN, size_t(c.NH + 2 * c.NKV) * c.HS);
    y.attn = layer_copy(m, a.attn, l, Recompute::ATTN, stride.attn);
    y.lse = layer_copy(m, a.lse, l, Recompute::ATTN, c.NH);
    y.gate_up = layer_copy(m, a.gate_up, l, Recompute::NONE, size_t(2) * c.F);
    y.rstd1 = layer_copy(m, a.rstd1, l, Recompute::FULL, 1);
    y.rstd2 = layer_copy(m, a.rstd2, l, Recompute::ATTN, 1);
    for (int g = 0; g < GROUPS; g++) {
        y.xa[g] = layer_copy(m, a.xa[g], l, Recompute::FULL, group_rank(m.adapter.lora, g));
    }
    y.attn_stride = stride.attn;
    return y;
}

template <class X, class Real>
LinearInput<X, Real> input_plain(const X* x, size_t width) {
    return {LinearInput<X, Real>::PLAIN, x, width, nullptr, nullptr};
}

template <class X, class Real>
LinearInput<X, Real> input_rmsnorm(const X* x, size_t C, const Real* rstd, const Real* norm_w) {
    return {LinearInput<X, Real>::RMSNORM, x, C, rstd, norm_w};
}

template <class X, class Real>
LinearInput<X, Real> input_swiglu(const X* gate_up, size_t F) {
    return {LinearInput<X, Real>::SWIGLU, gate_up, 2 * F, nullptr, nullptr};
}

// Layer l's weights begin to come from the other ranks, unless they are here. What is queued so far may still read those
// that they replace.
template <class Dev>
void layer_fetch(Llama<Dev>& m, int l) {
    SpreadBase& s = m.spread;
    if (s.slice == 0 || l < 0 || l >= m.c.L || s.holds[l % 2] == l) {
        return;
    }
    OpTimer t(m.dev, m.op_seconds[OP_RANKS]);
    comm_gather_begin(m.dev, l % 2, s.whole[l % 2], s.mine + size_t(l) * s.slice, s.slice);
    s.holds[l % 2] = l;
    s.coming[l % 2] = true;
}

// What is queued from now on sees layer l's weights.
template <class Dev>
void layer_ready(Llama<Dev>& m, int l) {
    layer_fetch(m, l);
    if (m.spread.coming[l % 2]) {
        OpTimer t(m.dev, m.op_seconds[OP_RANKS]);
        comm_gather_finish(m.dev, l % 2);
        m.spread.coming[l % 2] = false;
    }
}

// The next linear group to be used, if there is one, so that a device can get its weights ready meanwhile.
template <class Dev>
void prefetch(Llama<Dev>& m, const Pass<Dev>& p, int l, Group g) {
    if (l >= 0 && l < m.c.L) {
        layer_ready(m, l);
        linear_prefetch(m.dev, m.groups[size_t(l) * GROUPS + g], p.N);
    }
}

template <class Dev>
void layer_qkv(Llama<Dev>& m, const Pass<Dev>& p, int l) {
    using X = typename Dev::floatX;
    using real = typename Dev::real;
    LayerActivations<Dev> y = layer_activations(m, l);
    const LinearGroup<real>& group = m.groups[size_t(l) * GROUPS + QKV_GROUP];
    OpTimer t(m.dev, m.op_seconds[OP_QKV]);
    linear_forward(m.dev, y.qkv, group.OC, y.xa[QKV_GROUP],
                   input_rmsnorm<X, real>(y.x, m.c.C, y.rstd1, m.w.layers[l].norm1), group, p.N,
                   static_cast<const X*>(nullptr), &p.rope, p.dropout);
}

// From the layer's input to mid and its rstd.
template <class Dev>
void layer_attention(Llama<Dev>& m, const Pass<Dev>& p, int l) {
    using X = typename Dev::floatX;
    using real = typename Dev::real;
    const LlamaConfig& c = m.c;
    LayerActivations<Dev> y = layer_activations(m, l);
    layer_qkv(m, p, l);
    prefetch(m, p, l, O_GROUP);
    {
        OpTimer t(m.dev, m.op_seconds[OP_ATTENTION]);
        attention_forward(m.dev, y.attn, y.attn_stride, y.lse, y.qkv, p.docs, p.N, c.NH, c.NKV, c.HS);
    }
    {
        OpTimer t(m.dev, m.op_seconds[OP_O]);
        linear_forward(m.dev, y.mid, c.C, y.xa[O_GROUP], input_plain<X, real>(y.attn, y.attn_stride),
                       m.groups[size_t(l) * GROUPS + O_GROUP], p.N, y.x, static_cast<const Rope<real>*>(nullptr),
                       p.dropout);
    }
    prefetch(m, p, l, GATE_UP_GROUP);
    OpTimer t(m.dev, m.op_seconds[OP_NORM]);
    rmsnorm_rstd(m.dev, y.rstd2, y.mid, p.N, c.C, c.rms_eps);
}

template <class Dev>
void layer_gate_up(Llama<Dev>& m, const Pass<Dev>& p, int l) {
    using X = typename Dev::floatX;
    using real = typename Dev::real;
    LayerActivations<Dev> y = layer_activations(m, l);
    const LinearGroup<real>& group = m.groups[size_t(l) * GROUPS + GATE_UP_GROUP];
    {
        OpTimer t(m.dev, m.op_seconds[OP_GATE_UP]);
        linear_forward(m.dev, y.gate_up, group.OC, y.xa[GATE_UP_GROUP],
                       input_rmsnorm<X, real>(y.mid, m.c.C, y.rstd2, m.w.layers[l].norm2), group, p.N,
                       static_cast<const X*>(nullptr), static_cast<const Rope<real>*>(nullptr), p.dropout);
    }
    prefetch(m, p, l, DOWN_GROUP);
}

template <class Dev>
void layer_forward(Llama<Dev>& m, const Pass<Dev>& p, int l) {
    using X = typename Dev::floatX;
    using real = typename Dev::real;
    const LlamaConfig& c = m.c;
    LayerActivations<Dev> y = layer_activations(m, l);
    {
        OpTimer t(m.dev, m.op_seconds[OP_NORM]);
        rmsnorm_rstd(m.dev, y.rstd1, y.x, p.N, c.C, c.rms_eps);
    }
    layer_attention(m, p, l);
    layer_gate_up(m, p, l);
    {
        OpTimer t(m.dev, m.op_seconds[OP_DOWN]);
        linear_forward(m.dev, y.next, c.C, y.xa[DOWN_GROUP], input_swiglu<X, real>(y.gate_up, c.F),
                       m.groups[size_t(l) * GROUPS + DOWN_GROUP], p.N, y.mid, static_cast<const Rope<real>*>(nullptr),
                       p.dropout);
    }
    prefetch(m, p, l + 1, QKV_GROUP);
}

// The pass up to the last layer's output and its rstd. step and dropout_p are for dropout (p = 0 in evaluation).
template <class Dev>
Pass<Dev> llama_forward(Llama<Dev>& m, const Batch& b, uint32_t step, float dropout_p) {
    const LlamaConfig& c = m.c;
    Activations<Dev>& a = m.acts;
    Pass<Dev> p;
    p.N = b.size();
    p.rope = {m.rope_cos, m.rope_sin, a.positions, c.NH + c.NKV, c.HS};
    p.dropout = {dropout_p, m.dropout_seed, step, a.example, a.positions};
    device_to(m.dev, a.tokens, b.tokens.data(), p.N * sizeof(int32_t));
    device_to(m.dev, a.positions, b.positions.data(), p.N * sizeof(int32_t));
    p.docs = documents_place(m.dev, a.documents, b.cu_seqlens.data(), int(b.cu_seqlens.size()) - 1, c.HS);
    device_to(m.dev, a.example, b.example.data(), p.N * sizeof(uint32_t));
    std::vector<int32_t> rows, labels;  // compacted: the head never sees a row without a label
    for (size_t i = 0; i < p.N; i++) {
        if (b.labels[i] >= 0) {
            rows.push_back(int32_t(i));
            labels.push_back(b.labels[i]);
        }
    }
    p.n_labels = rows.size();
    device_to(m.dev, a.rows, rows.data(), rows.size() * sizeof(int32_t));
    device_to(m.dev, a.labels, labels.data(), labels.size() * sizeof(int32_t));
    {
        OpTimer t(m.dev, m.op_seconds[OP_EMBED]);
        embedding_forward(m.dev, a.resid, a.tokens, m.w.embed, p.N);
    }
    for (int l = 0; l < c.L; l++) {
        layer_ready(m, l);
        layer_fetch(m, l + 1);
        layer_forward(m, p, l);
    }
    OpTimer t(m.dev, m.op_seconds[OP_NORM]);
    rmsnorm_rstd(m.dev, a.rstd, layer_activations(m, c.L - 1).next, p.N, c.C, c.rms_eps);
    return p;
}

template <class Dev>
LinearInput<typename Dev::floatX, typename Dev::real> head_input(const Llama<Dev>& m) {
    return input_rmsnorm<typename Dev::floatX, typename Dev::real>(layer_activations(m, m.c.L - 1).next, m.c.C,
                                                                   m.acts.rstd, m.w.final_norm);
}

struct PassLoss {
    double loss = 0;  // sum of cross-entropy over the labels
    size_t labels = 0;
    size_t correct = 0;  // labels that are the arg max
};

// Loss of the pass just run; with backward, also its gradient times `scale` at the final norm's output (acts.dnorm).
template <class Dev>
PassLoss llama_loss(Llama<Dev>& m, const Pass<Dev>& p, bool backward, double scale) {
    using X = typename Dev::floatX;
    using real = typename Dev::real;
    OpTimer t(m.dev, m.op_seconds[OP_HEAD]);
    Activations<Dev>& a = m.acts;
    classifier(m.dev, a.losses, a.correct, backward ? a.dnorm : static_cast<X*>(nullptr), head_input(m), m.w.head,
               a.rows, a.labels, p.n_labels, p.N, real(scale));
    std::vector<real> losses(p.n_labels);
    std::vector<uint8_t> correct(p.n_labels);
    device_from(m.dev, losses.data(), a.losses, losses.size() * sizeof(real));
    device_from(m.dev, correct.data(), a.correct, correct.size());
    PassLoss sum;
    sum.labels = p.n_labels;
    for (size_t i = 0; i < p.n_labels; i++) {
        sum.loss += double(losses[i]);
        sum.correct += correct[i];
    }
    return sum;
}

// The linear group that backward of layer l begins with.
template <class Dev>
Group backward_first(const Llama<Dev>& m, int l) {
    const Recompute policy = recompute_of(m.recompute, l);
    return policy == Recompute::NONE ? DOWN_GROUP : policy == Recompute::FULL ? QKV_GROUP : GATE_UP_GROUP;
}

template <class Dev>
void layer_backward(Llama<Dev>& m, const Pass<Dev>& p, int l) {
    using X = typename Dev::floatX;
    using real = typename Dev::real;
    const LlamaConfig& c = m.c;
    Activations<Dev>& a = m.acts;
    LayerActivations<Dev> y = layer_activations(m, l);
    const LinearGroup<real>* group = &m.groups[size_t(l) * GROUPS];
    const RowStrides stride = row_strides<Dev>(c, m.adapter.lora);
    const Recompute policy = recompute_of(m.recompute, l);
    const Rope<real>* no_rope = nullptr;
    if (policy == Recompute::FULL) {
        layer_attention(m, p, l);
    }
    if (policy != Recompute::NONE) {
        layer_gate_up(m, p, l);
    }
    {
        OpTimer t(m.dev, m.op_seconds[OP_DOWN]);
        linear_backward(m.dev, a.dswiglu, a.dresid, stride.dresid, input_swiglu<X, real>(y.gate_up, c.F),
                        group[DOWN_GROUP], y.xa[DOWN_GROUP], p.N, no_rope, p.dropout);
    }
    prefetch(m, p, l, GATE_UP_GROUP);
    {
        OpTimer t(m.dev, m.op_seconds[OP_SWIGLU]);
        swiglu_backward(m.dev, a.dgate_up, stride.dgate_up, a.dswiglu, y.gate_up, p.N, c.F);
    }
    {
        OpTimer t(m.dev, m.op_seconds[OP_GATE_UP]);
        linear_backward(m.dev, a.dnorm, a.dgate_up, stride.dgate_up,
                        input_rmsnorm<X, real>(y.mid, c.C, y.rstd2, m.w.layers[l].norm2), group[GATE_UP_GROUP],
                        y.xa[GATE_UP_GROUP], p.N, no_rope, p.dropout);
    }
    prefetch(m, p, l, O_GROUP);
    {
        OpTimer t(m.dev, m.op_seconds[OP_NORM]);
        rmsnorm_backward(m.dev, a.dresid, stride.dresid, a.dnorm, y.mid, y.rstd2, m.w.layers[l].norm2, p.N, c.C);
    }
    {
        OpTimer t(m.dev, m.op_seconds[OP_O]);
        linear_backward(m.dev, a.dattn, a.dresid, stride.dresid, input_plain<X, real>(y.attn, y.attn_stride),
                        group[O_GROUP], y.xa[O_GROUP], p.N, no_rope, p.dropout);
    }
    prefetch(m, p, l, QKV_GROUP);
    if (policy == Recompute::ATTN) {
        layer_qkv(m, p, l);
    }
    {
        OpTimer t(m.dev, m.op_seconds[OP_ATTENTION]);
        attention_backward(m.dev, a.dqkv, stride.dqkv, a.dattn, y.attn, y.attn_stride, y.lse, y.qkv, p.docs, p.N, c.NH,
                           c.NKV, c.HS);
    }
    X* din = l > 0 ? a.dnorm : nullptr;  // nothing below the first layer is trained
    {
        OpTimer t(m.dev, m.op_seconds[OP_QKV]);
        linear_backward(m.dev, din, a.dqkv, stride.dqkv, input_rmsnorm<X, real>(y.x, c.C, y.rstd1, m.w.layers[l].norm1),
                        group[QKV_GROUP], y.xa[QKV_GROUP], p.N, &p.rope, p.dropout);
    }
    prefetch(m, p, l - 1, backward_first(m, l - 1));
    if (l > 0) {
        OpTimer t(m.dev, m.op_seconds[OP_NORM]);
        rmsnorm_backward(m.dev, a.dresid, stride.dresid, a.dnorm, y.x, y.rstd1, m.w.layers[l].norm1, p.N, c.C);
    }
}

// The gradients of layer l, and of those above it, are this rank's whole part: they are summed over the ranks, as soon as
// there are enough of them for one message. Layer 0 is the last to be called with.
template <class Dev>
void layer_sum(Llama<Dev>& m, int l) {
    if (m.dev.comm == nullptr) {
        return;
    }
    const size_t first = m.adapter.size / size_t(m.c.L) * size_t(l), n = m.summed_from - first;
    if (l == 0 || n >= comm_sum_least(m.dev)) {
        OpTimer t(m.dev, m.op_seconds[OP_RANKS]);
        comm_sum_begin(m.dev, m.adapter.g + first, n);
        m.summed_from = first;
    }
}

// Adds the pass's gradient to adapter.g. Needs llama_loss(..., backward = true) before it. last: of the step.
template <class Dev>
void llama_backward(Llama<Dev>& m, const Pass<Dev>& p, bool last = true) {
    const LlamaConfig& c = m.c;
    Activations<Dev>& a = m.acts;
    adamw_prefetch(m.dev, m.adapter.m, m.adapter.v, m.adapter.size);
    {
        OpTimer t(m.dev, m.op_seconds[OP_NORM]);
        const size_t stride = row_strides<Dev>(c, m.adapter.lora).dresid;
        device_zero(m.dev, a.dresid, p.N * stride * sizeof(*a.dresid));
        rmsnorm_backward(m.dev, a.dresid, stride, a.dnorm, layer_activations(m, c.L - 1).next, a.rstd, m.w.final_norm,
                         p.N, c.C);
    }
    for (int l = c.L - 1; l >= 0; l--) {
        layer_ready(m, l);
        layer_fetch(m, l - 1);
        layer_backward(m, p, l);
        if (last) {
            layer_sum(m, l);
        }
    }
}

// The part of a rank that has no examples left in what the others do: their weights pass through it, and a step's sum.
template <class Dev>
void llama_idle(Llama<Dev>& m, bool backward, bool last) {
    for (int l = 0; l < m.c.L; l++) {
        layer_ready(m, l);
        layer_fetch(m, l + 1);
    }
    for (int l = m.c.L - 1; l >= 0 && backward; l--) {
        layer_ready(m, l);
        layer_fetch(m, l - 1);
        if (last) {
            layer_sum(m, l);
        }
    }
    device_sync(m.dev);  // as a pass does: the host waits for the other ranks only with nothing of its own under way
}

// ---------------------------------------------------------------------------------------------------------------------
// the update

template <class Dev>
void llama_zero_gradients(Llama<Dev>& m) {
    device_zero(m.dev, m.adapter.g, m.adapter.size * sizeof(*m.adapter.g));
    m.summed_from = m.adapter.size;
}

// Adapter.g is the sum of all ranks from here on.
template <class Dev>
void llama_gradients_whole(Llama<Dev>& m) {
    if (m.dev.comm != nullptr) {
        OpTimer t(m.dev, m.op_seconds[OP_RANKS]);
        comm_sum_finish(m.dev);
    }
}

template <class Dev>
double llama_gradient_norm(Llama<Dev>& m) {
    OpTimer t(m.dev, m.op_seconds[OP_ADAMW]);
    return std::sqrt(sum_squares(m.dev, m.adapter.g, m.adapter.size));
}

// False: an element of A or B is not finite any more.
template <class Dev>
bool llama_update(Llama<Dev>& m, const AdamW& rates) {
    OpTimer t(m.dev, m.op_seconds[OP_ADAMW]);
    return m.adapter.size ==
           adamw_update(m.dev, m.adapter.p, m.adapter.m, m.adapter.v, m.adapter.g, m.adapter.size, rates);
}

// The name of the adapter tensor whose gradient holds the first non-finite value; "" when all are finite.
template <class Dev>
std::string llama_first_nonfinite_gradient(Llama<Dev>& m) {
    size_t bad = first_nonfinite(m.dev, m.adapter.g, m.adapter.size);
    std::string where;
    each_adapter(m.c, m.adapter.lora, [&](const std::string& name, int, int, bool, int rows, int cols, size_t offset) {
        if (bad >= offset && bad < offset + size_t(rows) * cols) {
            where = name + "[" + std::to_string(bad - offset) + "]";
        }
    });
    return where;
}

// ---------------------------------------------------------------------------------------------------------------------
// counts

inline size_t linear_parameters(const LlamaConfig& c) {
    size_t n = 0;
    for (int m = 0; m < MODULES; m++) {
        n += size_t(module_rows(c, m)) * module_cols(c, m);
    }
    return n * c.L;
}

inline size_t model_parameters(const LlamaConfig& c) {
    return linear_parameters(c) + size_t(c.V) * c.C * (c.tied ? 1 : 2) + size_t(c.C) * (2 * size_t(c.L) + 1);
}

// Those of causal attention, exactly: forward two products over the pairs of a query and a key not after it, backward
// five.
inline double attention_flops(const LlamaConfig& c, const Batch& b) {
    double pairs = 0;
    for (size_t d = 0; d + 1 < b.cu_seqlens.size(); d++) {
        double T = b.cu_seqlens[d + 1] - b.cu_seqlens[d];
        pairs += T * (T + 1) / 2;
    }
    return 3.5 * 4 * pairs * double(c.NH) * c.HS * c.L;
}

// Floating-point operations of forward and backward of one pass (a multiply-add counts two): frozen linears forward and
// input gradient, adapters forward and both gradients, the head on rows with labels, causal attention exactly (backward
// 2.5 times forward: five products against two). Recomputation is not counted: it is the program's choice.
inline double pass_flops(const LlamaConfig& c, const LoraConfig& lora, const Batch& b) {
    const double N = double(b.size());
    double skipped = 0;  // input gradient of the first layer's q, k, v
    for (int m = Q_PROJ; m <= V_PROJ; m++) {
        skipped += 2 * N * double(module_rows(c, m)) * module_cols(c, m);
    }
    return 4 * N * double(linear_parameters(c)) - skipped + 6 * N * double(adapter_elements(c, lora)) +
           4 * double(b.n_labels) * double(c.V) * c.C + attention_flops(c, b);
}
