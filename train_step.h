// Two parts of a run that tests and tools need without a run: the memory plan, and one optimizer step. Both follow from
// model, settings and total memory alone, never from free memory or a timing, so that a run repeats.
#pragma once
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "llama_io.h"

// ---------------------------------------------------------------------------------------------------------------------
// the memory plan

struct Plan {
    size_t pass_tokens = 0;
    Recompute recompute = Recompute::NONE;
    std::string base_text;  // NF4 with double quantisation, bf16, ...
    size_t weights = 0, adapter = 0, optimizer = 0, activations = 0, workspace = 0;  // bytes

    size_t total() const { return weights + adapter + optimizer + activations + workspace; }
};

inline const char* recompute_name(Recompute r) {
    const char* const names[] = {"none", "ffn", "attn", "full"};
    return names[int(r)];
}

inline bool recompute_parse(Recompute& r, const std::string& name) {
    for (Recompute x : {Recompute::NONE, Recompute::FFN, Recompute::ATTN, Recompute::FULL}) {
        if (name == recompute_name(x)) {
            r = x;
            return true;
        }
    }
    return false;
}

// A model without memory: the linear groups' shapes, for the workspace functions.
template <class Dev>
size_t plan_workspace(Dev& dev, const LlamaConfig& c, const LoraConfig& lora, const BaseOptions& base, size_t N,
                      size_t longest) {
    Llama<Dev> m;
    m.dev = dev;
    m.c = c;
    m.groups.assign(GROUPS, {});
    for (int g = 0; g < GROUPS; g++) {
        LinearGroup<typename Dev::real>& group = m.groups[g];
        for (int i = group_first[g]; i < group_first[g + 1]; i++) {
            LinearPart<typename Dev::real>& part = group.part[group.parts++];
            part.w.store = base.nf4 ? Store::NF4 : Store::F32;
            part.w.rows = module_rows(c, i);
            part.w.cols = module_cols(c, i);
            part.r = lora.target[i] ? lora.r : 0;
            group.OC += part.w.rows;
        }
        group.C = module_cols(c, group_first[g]);
        group.R = group_rank(lora, g);
    }
    return llama_workspace_bytes(m, N, longest);
}

// Fills the plan for given pass_tokens and recompute. longest: tokens of the longest example.
template <class Dev>
void plan_fill(Plan& p, Dev& dev, const LlamaConfig& c, const LoraConfig& lora, const BaseOptions& base,
               size_t longest) {
    p.base_text = base.nf4 || c.bnb_nf4 ? base.double_quant ? "NF4, double quantisation" : "NF4"
                  : c.dtype.empty()     ? "16 bit"
                                        : c.dtype;
    p.weights = base_bytes(c, base, c.dtype);
    p.adapter = 2 * adapter_elements(c, lora) * sizeof(typename Dev::real);
    p.optimizer = p.adapter;
    p.activations = activation_bytes<Dev>(c, lora, p.pass_tokens, p.recompute, true);
    p.workspace = plan_workspace(dev, c, lora, base, p.pass_tokens, longest);
}

// The largest pass of at most 2048 tokens (or the longest example) that fits into 70 % of the memory without
// recomputation; if not even the longest example does, the cheapest recomputation that makes it fit. What the user gave
// (pass_tokens > 0, recompute not auto) stands. most: tokens of the largest step: longer passes would stay empty.
template <class Dev>
Error plan_choose(Plan& p, Dev& dev, const LlamaConfig& c, const LoraConfig& lora, const BaseOptions& base,
                  size_t longest, size_t most, int pass_tokens, const std::string& recompute, uint64_t memory) {
    if (pass_tokens > 0 && size_t(pass_tokens) < longest) {
        return bad_input("--pass-tokens %d is less than the longest example (found %zu tokens)", pass_tokens, longest)
            .hinted("a document is never split over passes: raise --pass-tokens or lower -t");
    }
    std::vector<size_t> sizes;
    for (size_t n = 2048; pass_tokens == 0 && n > longest; n /= 2) {
        sizes.push_back(std::max(longest, std::min(n, most)));
    }
    sizes.push_back(pass_tokens > 0 ? size_t(pass_tokens) : longest);
    std::vector<Recompute> ways = {Recompute::NONE, Recompute::FFN, Recompute::FULL};
    if (recompute != "auto") {
        ways.assign(1, Recompute::NONE);
        recompute_parse(ways[0], recompute);
    }
    for (Recompute way : ways) {
        for (size_t n : sizes) {
            p.pass_tokens = n;
            p.recompute = way;
            plan_fill(p, dev, c, lora, base, longest);
            if (p.total() - p.workspace <=
                memory / 10 * 7) {  // the workspace grows with the threads, which must not decide
                return {};
            }
        }
    }
    if (p.total() > memory) {
        return runtime_failure(
                   "the run needs %.1f GB of memory, the machine has %.1f GB (weights %.1f, activations %.1f)",
                   double(p.total()) / 1e9, double(memory) / 1e9, double(p.weights) / 1e9, double(p.activations) / 1e9)
            .hinted(base.nf4 ? "a smaller model, or shorter examples (-t)"
                             : "a smaller model, --quant nf4, or shorter examples (-t)");
    }
    return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// one optimizer step

struct StepRates {
    double lr = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0, clip = 1;
};

struct StepResult {
    double loss = 0;       // per target, before the update
    double grad_norm = 0;  // before clipping
    size_t tokens = 0, targets = 0;
    double flops = 0;
    std::string bad;  // what is not finite: loss and gradient before the update (then there was none), or A and B after
};

// step counts from 1. The loss is divided by the targets of all passes together, known before the first of them.
template <class Dev>
StepResult train_step(Llama<Dev>& m, const Dataset& data, const std::vector<size_t>& examples, size_t pass_tokens,
                      bool pack, int64_t step, const StepRates& rates) {
    StepResult r;
    std::vector<std::vector<size_t>> passes = passes_make(data, examples, pass_tokens, pack);
    for (size_t i : examples) {
        r.tokens += data.length(i);
        r.targets +=
            size_t(std::count(data.targets.begin() + data.start[i] + 1, data.targets.begin() + data.start[i + 1], 1));
    }
    llama_zero_gradients(m);
    Batch b;
    for (const std::vector<size_t>& one : passes) {
        batch_make(b, data, one);
        Pass<Dev> p = llama_forward(m, b, uint32_t(step), float(m.adapter.lora.dropout));
        r.loss += llama_loss(m, p, true, 1 / double(r.targets)).loss;
        llama_backward(m, p);
        r.flops += pass_flops(m.c, m.adapter.lora, b);
    }
    r.loss /= double(r.targets);
    r.grad_norm = llama_gradient_norm(m);
    if (!std::isfinite(r.loss) || !std::isfinite(r.grad_norm)) {
        std::string where = llama_first_nonfinite_gradient(m);
        r.bad = !std::isfinite(r.loss) ? "loss" : where.empty() ? "gradient norm" : "gradient of " + where;
        return r;
    }
    AdamW a;
    a.lr = rates.lr;
    a.beta1 = rates.beta1;
    a.beta2 = rates.beta2;
    a.eps = rates.eps;
    a.weight_decay = rates.weight_decay;
    a.step = step;
    a.grad_scale = rates.clip > 0 ? std::min(1.0, rates.clip / (r.grad_norm + 1e-6)) : 1;  // as torch's clip_grad_norm_
    llama_update(m, a);
    if (first_nonfinite(m.dev, m.adapter.p, m.adapter.size) < m.adapter.size) {
        r.bad = "adapter";
    }
    return r;
}
