// The work of a pass in parts, and the seconds that it takes when the costs of the parts are known (train_speed.h
// measures them):
//
//   seconds = sum over the parts of  per_fixed * fixed + per_unit * units
//
//   part                  fixed counts                      units count
//   linear group, head    weights that are gone through     floating-point operations
//   attention             elements of Q                     floating-point operations
//   embedding, norms ...  calls                             elements read and written
//   host                  passes                            tokens
//   update                -                                 bytes
//
// Two counts, since a linear group's weights are unpacked once for all tokens of a pass, attention packs K and V and
// cuts blocks at the diagonal, and a call has to wake the threads.
#pragma once
#include "train_step.h"

// Forward's ops by their number, then backward's (the head's are in forward's), then ...
enum { SPEED_BACKWARD = OPS, SPEED_FIRST_QKV = 2 * OPS, SPEED_HOST, SPEED_PARTS };

struct Work {
    double fixed[SPEED_PARTS] = {}, units[SPEED_PARTS] = {};
};

// What a part costs, in seconds.
struct Speed {
    double per_fixed[SPEED_PARTS] = {}, per_unit[SPEED_PARTS] = {};
    size_t head_rows = 512;  // that the head works on together
};

inline void work_add(Work& w, int part, double fixed, double units) {
    w.fixed[part] += fixed;
    w.units[part] += units;
}

inline double work_seconds(const Speed& s, const Work& w, int part) {
    return s.per_fixed[part] * w.fixed[part] + s.per_unit[part] * w.units[part];
}

inline double work_seconds(const Speed& s, const Work& w) {
    double sum = 0;
    for (int part = 0; part < SPEED_PARTS; part++) {
        sum += work_seconds(s, w, part);
    }
    return sum;
}

inline const int group_op[GROUPS] = {OP_QKV, OP_O, OP_GATE_UP, OP_DOWN};

inline bool is_product(int part) {
    const int op = part % OPS;
    return part == SPEED_FIRST_QKV ||
           (part < 2 * OPS && (op == OP_HEAD || std::find(group_op, group_op + GROUPS, op) != group_op + GROUPS));
}

struct GroupSize {
    double weights = 0, adapters = 0;  // elements of W; of A and B
};

inline GroupSize group_size(const LlamaConfig& c, const LoraConfig& lora, int group) {
    GroupSize s;
    for (int m = group_first[group]; m < group_first[group + 1]; m++) {
        const double rows = module_rows(c, m), cols = module_cols(c, m);
        s.weights += rows * cols;
        s.adapters += lora.target[m] ? lora.r * (rows + cols) : 0;
    }
    return s;
}

inline void work_group_forward(Work& w, const LlamaConfig& c, const LoraConfig& lora, const Batch& b, int group) {
    const GroupSize s = group_size(c, lora, group);
    work_add(w, group_op[group], s.weights, 2 * double(b.size()) * (s.weights + s.adapters));
}

// Forward has two of attention's seven products.
inline void work_attention_forward(Work& w, const LlamaConfig& c, const Batch& b) {
    work_add(w, OP_ATTENTION, double(b.size()) * c.NH * c.HS, attention_flops(c, b) / c.L * 2 / 7);
}

inline void work_layer_forward(Work& w, const LlamaConfig& c, const LoraConfig& lora, const Batch& b) {
    for (int g = 0; g < GROUPS; g++) {
        work_group_forward(w, c, lora, b, g);
    }
    work_attention_forward(w, c, b);
    work_add(w, OP_NORM, 2, 2 * double(b.size()) * c.C);
}

// first: layer 0, whose q, k, v have no input gradient. What is made again is forward's.
inline void work_layer_backward(Work& w, const LlamaConfig& c, const LoraConfig& lora, const Batch& b,
                                Recompute recompute, bool first) {
    const double N = double(b.size());
    if (recompute != Recompute::NONE) {
        work_group_forward(w, c, lora, b, GATE_UP_GROUP);
    }
    if (recompute == Recompute::ATTN || recompute == Recompute::FULL) {
        work_group_forward(w, c, lora, b, QKV_GROUP);
    }
    if (recompute == Recompute::FULL) {
        work_attention_forward(w, c, b);
        work_group_forward(w, c, lora, b, O_GROUP);
        work_add(w, OP_NORM, 1, N * c.C);
    }
    for (int g = 0; g < GROUPS; g++) {
        const GroupSize s = group_size(c, lora, g);
        const bool no_input = first && g == QKV_GROUP;
        work_add(w, no_input ? int(SPEED_FIRST_QKV) : SPEED_BACKWARD + group_op[g], no_input ? 0 : s.weights,
                 N * ((no_input ? 0 : 2 * s.weights) + 4 * s.adapters));
    }
    const double norms = first ? 1 : 2;
    work_add(w, SPEED_BACKWARD + OP_ATTENTION, N * c.NH * c.HS, attention_flops(c, b) / c.L * 5 / 7);
    work_add(w, SPEED_BACKWARD + OP_NORM, norms, norms * 4 * N * c.C);
    work_add(w, SPEED_BACKWARD + OP_SWIGLU, 1, 5 * N * c.F);
}

// Before the first layer and behind the last one.
inline void work_ends(Work& w, const LlamaConfig& c, const Batch& b, size_t head_rows) {
    const double N = double(b.size()), n = double(b.n_labels), head = double(c.V) * c.C;
    work_add(w, OP_EMBED, 1, N * c.C);
    work_add(w, OP_NORM, 1, N * c.C);
    work_add(w, SPEED_BACKWARD + OP_NORM, 1, 5 * N * c.C);
    work_add(w, OP_HEAD, std::ceil(n / double(head_rows)) * head, 4 * n * head);
    work_add(w, SPEED_HOST, 1, N);
}

inline Work work_pass(const LlamaConfig& c, const LoraConfig& lora, const RecomputePlan& recompute, const Batch& b,
                      size_t head_rows) {
    Work w;
    work_ends(w, c, b, head_rows);
    for (int l = 0; l < c.L; l++) {
        work_layer_forward(w, c, lora, b);
        work_layer_backward(w, c, lora, b, recompute_of(recompute, l), l == 0);
    }
    return w;
}

// Bytes that an update moves an element: gradients are zeroed, read for their norm and once more; p, m, v are read and
// written, p read again.
template <class Dev>
double update_bytes(size_t elements) {
    return 10.0 * sizeof(typename Dev::real) * double(elements);
}

// One rank's part of a step.
template <class Dev>
Work work_step(const LlamaConfig& c, const LoraConfig& lora, const Plan& plan, bool pack, size_t head_rows,
               const Dataset& data, const std::vector<size_t>& examples) {
    Work sum;
    Batch b;
    for (const std::vector<size_t>& pass : passes_make(data, examples, plan.pass_tokens, pack)) {
        batch_make(b, data, pass);
        const Work w = work_pass(c, lora, plan.recompute, b, head_rows);
        for (int part = 0; part < SPEED_PARTS; part++) {
            work_add(sum, part, w.fixed[part], w.units[part]);
        }
    }
    work_add(sum, OP_ADAMW, 0, update_bytes<Dev>(adapter_elements(c, lora)));
    return sum;
}
