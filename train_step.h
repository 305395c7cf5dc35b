// Two parts of a run that tests and tools need without a run: the memory plan, and one optimizer step. Both follow from
// model, settings and total memory alone, never from free memory or a timing, so that a run repeats.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "llama_io.h"

// ---------------------------------------------------------------------------------------------------------------------
// the memory plan

struct Plan {
    size_t pass_tokens = 0;
    RecomputePlan recompute;
    GemmPath gemm = GemmPath::AUTO;          // a GPU's
    bool host_embed = false, paged = false;  // embedding, optimizer moments in the host's memory beside a GPU
    std::string base_text;                   // NF4 with double quantisation, bf16, ...
    int ranks = 1, local_ranks = 1;          // in all, and of those on a machine
    bool spread = false;                     // the base's layers over the ranks
    size_t weights = 0, adapter = 0, optimizer = 0, activations = 0, slots = 0, workspace = 0;  // bytes
    size_t library = 0;                                                                         // of cuBLASLt

    size_t total() const { return weights + adapter + optimizer + activations + slots + workspace + library; }
};

inline const char* gemm_name(GemmPath g) {
    const char* const names[] = {"auto", "fused", "dequant"};
    return names[int(g)];
}

inline GemmPath gemm_parse(const std::string& name) {
    return name == "fused" ? GemmPath::FUSED : name == "dequant" ? GemmPath::DEQUANT : GemmPath::AUTO;
}

template <class X>
void device_gemm(Cpu<X>&, GemmPath) {}
template <class X>
void device_gemm(Gpu<X>& dev, GemmPath g) {
    dev.gemm = g;
}

inline const char* recompute_name(Recompute r) {
    const char* const names[] = {"none", "ffn", "attn", "full"};
    return names[int(r)];
}

// "none", or with different layers "20 none, 8 ffn, 4 full".
inline std::string recompute_text(const RecomputePlan& p) {
    std::string text;
    int kinds = 0;
    for (int r = 0; r < 4; r++) {
        if (p.layers[r] > 0) {
            text += (kinds++ > 0 ? ", " : "") + std::to_string(p.layers[r]) + " " + recompute_name(Recompute(r));
        }
    }
    return kinds == 1 ? text.substr(text.find(' ') + 1) : text;
}

// What recompute_text wrote, or a name alone, for a model of L layers. False: it is neither.
inline bool recompute_parse(RecomputePlan& p, const std::string& text, int L) {
    RecomputePlan read;
    int sum = 0;
    for (size_t at = 0; at < text.size();) {
        const size_t end = std::min(text.find(", ", at), text.size()), space = text.find(' ', at);
        const bool counted = space < end;
        const std::string name = text.substr(counted ? space + 1 : at, end - (counted ? space + 1 : at));
        int r = 0;
        while (r < 4 && name != recompute_name(Recompute(r))) {
            r++;
        }
        if (r == 4) {
            return false;
        }
        read.layers[r] = counted ? std::atoi(text.c_str() + at) : L;
        sum += read.layers[r];
        at = end + 2;
    }
    p = sum == L ? read : p;
    return sum == L;
}

// A model without memory: the linear groups' shapes, for the functions that say how much ops need.
template <class Dev>
Llama<Dev> plan_model(Dev& dev, const LlamaConfig& c, const LoraConfig& lora, const BaseOptions& base) {
    Llama<Dev> m;
    m.dev = dev;
    m.c = c;
    const int layers = c.bnb_plain.empty() ? 1 : c.L;  // unless they differ, one stands for all
    m.groups.assign(size_t(layers) * GROUPS, {});
    for (int at = 0; at < layers * GROUPS; at++) {
        const int g = at % GROUPS;
        LinearGroup<typename Dev::real>& group = m.groups[at];
        for (int i = group_first[g]; i < group_first[g + 1]; i++) {
            LinearPart<typename Dev::real>& part = group.part[group.parts++];
            const std::string name = "model.layers." + std::to_string(at / GROUPS) + "." + module_path[i] + ".weight";
            part.w = base_matrix(dev, c, base, name, true, module_rows(c, i), module_cols(c, i));
            part.r = lora.target[i] ? lora.r : 0;
            group.OC += part.w.rows;
        }
        group.C = module_cols(c, group_first[g]);
        group.R = group_rank(lora, g);
    }
    return m;
}

// What a plan decides of how the base is held.
inline void plan_base(BaseOptions& base, const Plan& p) {
    base.host_embed = p.host_embed;
    base.spread = p.spread ? p.ranks : 0;
}

template <class X>
size_t plan_library(const Cpu<X>&) {
    return 0;
}
template <class X>
size_t plan_library(const Gpu<X>&) {
    return LT_WORKSPACE;
}

// Fills the plan for given pass_tokens and recompute. longest: tokens of the longest example.
template <class Dev>
void plan_fill(Plan& p, Dev& dev, const LlamaConfig& c, const LoraConfig& lora, const BaseOptions& options,
               size_t longest) {
    BaseOptions base = options;
    plan_base(base, p);
    p.base_text = base.nf4 || c.bnb_nf4 ? base.double_quant ? "NF4, double quantisation" : "NF4"
                  : c.dtype.empty()     ? "16 bit"
                                        : c.dtype;
    const BaseBytes measured = base_measure(dev, c, base);
    p.weights = measured.bytes;
    p.adapter = 2 * placed_bytes(adapter_elements(c, lora) * sizeof(typename Dev::real));
    p.optimizer = p.paged && moments_slab_bytes(dev) > 0 ? moments_slab_bytes(dev) : p.adapter;
    p.activations = activation_bytes<Dev>(c, lora, p.pass_tokens, p.recompute, true) +
                    2 * placed_bytes(longest * size_t(c.HS) / 2 * sizeof(typename Dev::real));
    Llama<Dev> m = plan_model(dev, c, lora, base);
    device_gemm(m.dev, p.gemm);
    p.library =
        plan_library(dev) + (p.ranks > 1 || dev.comm != nullptr ? comm_device_bytes(dev, p.ranks, p.local_ranks) : 0);
    p.slots = placed_bytes(llama_slot_bytes(m, p.pass_tokens));
    p.workspace = placed_bytes(std::max(llama_workspace_bytes(m, p.pass_tokens, longest), measured.load_workspace));
}

// What decides about the fit: on the CPU without the workspace, which grows with the threads.
template <class X>
size_t plan_counted(const Cpu<X>&, const Plan& p) {
    return p.total() - p.workspace;
}
template <class X>
size_t plan_counted(const Gpu<X>&, const Plan& p) {
    return p.total();
}

template <class X>
const char* device_owner(const Cpu<X>&) {
    return "machine";
}
template <class X>
const char* device_owner(const Gpu<X>&) {
    return "card";
}

// What no run can have: on a card, what the driver and the library's kernels take.
template <class X>
uint64_t plan_reserved(const Cpu<X>&) {
    return 0;
}
template <class X>
uint64_t plan_reserved(const Gpu<X>&) {
    return uint64_t(768) << 20;
}

// The share of the machine's or card's memory that a plan may fill by itself. A card: 3 % stay for what the sizes of
// allocations cannot foresee.
template <class X>
size_t plan_budget(const Cpu<X>&, uint64_t memory) {
    return size_t(memory / 10 * 7);
}
template <class X>
size_t plan_budget(const Gpu<X>& dev, uint64_t memory) {
    return memory > plan_reserved(dev) ? size_t((memory - plan_reserved(dev)) / 100 * 97) : 0;
}

// Restoring the weights of a matrix costs about as much as multiplying this many tokens by it. GPU: 1.258 bytes a
// weight times an H200's ratio of tensor-core rate to memory rate. CPU: about one weight a cycle against 32
// multiply-adds. And the longest pass that is worth having.
template <class X>
double plan_restore_tokens(const Cpu<X>&) {
    return 30;
}
template <class X>
double plan_restore_tokens(const Gpu<X>&) {
    return 231;
}
template <class X>
size_t plan_longest_pass(const Cpu<X>&) {
    return 2048;
}
template <class X>
size_t plan_longest_pass(const Gpu<X>&) {
    return 8192;
}

// With a spread base: how many tokens can be multiplied by a matrix while it comes from the other ranks, 0.52 bytes a
// weight. GPU: 25 GB/s and 400 TFLOP/s, a fast card behind PCIe. CPU: 5 GB/s and 100 GFLOP/s.
template <class X>
double plan_gather_tokens(const Cpu<X>&) {
    return 5;
}
template <class X>
double plan_gather_tokens(const Gpu<X>&) {
    return 4100;
}

// The time of a token in units of its forward matrix products: forward and input gradient; what is made again, as a
// share of the forward products of the model at hand; the weights restored in each; those of a spread base that come
// more slowly than they are used.
inline double plan_cost(const Plan& p, const LlamaConfig& c, double restore_tokens, double gather_tokens) {
    double share[MODULES], all = 0;
    for (int m = 0; m < MODULES; m++) {
        share[m] = double(module_rows(c, m)) * module_cols(c, m);
        all += share[m];
    }
    const double ffn = (share[GATE_PROJ] + share[UP_PROJ]) / all,
                 qkv = (share[Q_PROJ] + share[K_PROJ] + share[V_PROJ]) / all, o = share[O_PROJ] / all;
    const double again = p.recompute.layers[int(Recompute::FFN)] * ffn +
                         p.recompute.layers[int(Recompute::ATTN)] * (ffn + qkv) +
                         p.recompute.layers[int(Recompute::FULL)] * (ffn + qkv + 2 * o);  // 2: attention beside o
    const double N = double(p.pass_tokens), forward = N, backward = N * (1 + again / c.L);
    const double waits = std::max(0.0, gather_tokens - forward) + std::max(0.0, gather_tokens - backward);
    return 2 + again / c.L + 2 * restore_tokens / N + (p.spread ? waits / N : 0);
}

// Fills p for passes of p.pass_tokens: as many layers as fit keep everything, then as many of the rest as fit all but
// gate_up, and so on. False: not even with everything made again.
template <class Dev>
bool plan_fit(Plan& p, Dev& dev, const LlamaConfig& c, const LoraConfig& lora, const BaseOptions& base, size_t longest,
              size_t budget) {
    const auto fits = [&] {
        plan_fill(p, dev, c, lora, base, longest);
        return plan_counted(dev, p) <= budget;
    };
    p.recompute = recompute_everywhere(Recompute::FULL, c.L);
    if (!fits()) {
        return false;
    }
    for (int r = 0; r < int(Recompute::FULL); r++) {
        int low = 0, high = p.recompute.layers[int(Recompute::FULL)];  // the most layers of kind r that fit
        const RecomputePlan before = p.recompute;
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            p.recompute = before;
            p.recompute.layers[r] += middle;
            p.recompute.layers[int(Recompute::FULL)] -= middle;
            if (fits()) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        p.recompute = before;
        p.recompute.layers[r] += low;
        p.recompute.layers[int(Recompute::FULL)] -= low;
    }
    return fits();
}

// What a card that is too small may do without, one thing more at each rung: 16-bit copies of weights (then the fused
// matmuls serve at any size), the embedding, the optimizer's moments.
template <class X>
int plan_rungs(const Cpu<X>&) {
    return 1;
}
template <class X>
int plan_rungs(const Gpu<X>&) {
    return 4;
}

// Pass size and what each layer keeps, by the least cost of a token among the passes that fit, on the first rung where
// one does. What the user gave (pass_tokens > 0, recompute not auto; p.gemm, p.paged) stands. most: tokens of the
// largest step: longer passes would stay empty.
template <class Dev>
Error plan_choose(Plan& p, Dev& dev, const LlamaConfig& c, const LoraConfig& lora, const BaseOptions& base,
                  size_t longest, size_t most, int pass_tokens, const std::string& recompute, uint64_t memory) {
    if (pass_tokens > 0 && size_t(pass_tokens) < longest) {
        return bad_input("--pass-tokens %d is less than the longest example (found %zu tokens)", pass_tokens, longest)
            .hinted("a document is never split over passes: raise --pass-tokens or lower -t");
    }
    std::vector<size_t> sizes;
    for (size_t n = plan_longest_pass(dev); pass_tokens == 0 && n > longest; n /= 2) {
        sizes.push_back(std::max(longest, std::min(n, most)));
    }
    sizes.push_back(pass_tokens > 0 ? size_t(pass_tokens) : longest);
    const size_t budget = plan_budget(dev, memory);
    const Plan wish = p;
    const size_t wide = 2 * placed_bytes(adapter_elements(c, lora) * sizeof(typename Dev::real));  // moments unpaged
    for (int rung = 0; rung < plan_rungs(dev); rung++) {
        Plan best;
        double least = 0;
        for (size_t n : sizes) {
            p = wish;
            p.gemm = rung > 0 && wish.gemm == GemmPath::AUTO ? GemmPath::FUSED : wish.gemm;
            p.host_embed = rung > 1;
            p.paged = wish.paged || (rung > 2 && moments_slab_bytes(dev) < wide);
            p.pass_tokens = n;
            bool fit;
            if (recompute == "auto") {
                fit = plan_fit(p, dev, c, lora, base, longest, budget);
            } else {
                recompute_parse(p.recompute, recompute, c.L);
                plan_fill(p, dev, c, lora, base, longest);
                fit = plan_counted(dev, p) <= budget;
            }
            const double cost = plan_cost(p, c, plan_restore_tokens(dev), plan_gather_tokens(dev));
            if (fit && (best.pass_tokens == 0 || cost < least)) {
                best = p;
                least = cost;
            }
        }
        if (best.pass_tokens > 0) {
            p = best;
            return {};
        }
    }
    if (p.total() + plan_reserved(dev) > memory) {
        const bool shorter = pass_tokens > 0 && size_t(pass_tokens) > longest;
        return runtime_failure(
                   "the run needs %.1f GB of memory, the %s has %.1f GB%s (weights %.1f, adapter and optimizer %.1f, "
                   "activations %.1f, workspace %.1f)",
                   double(p.total()) / 1e9, device_owner(dev), double(memory) / 1e9,
                   plan_reserved(dev) > 0 ? ", 0.8 GB of it for the driver" : "", double(p.weights) / 1e9,
                   double(p.adapter + p.optimizer) / 1e9, double(p.activations) / 1e9, double(p.workspace) / 1e9)
            .hinted(shorter               ? "lower --pass-tokens"
                    : recompute != "auto" ? "--recompute full or auto, or shorter examples (-t)"
                    : base.nf4            ? "a smaller model, or shorter examples (-t)"
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
    std::vector<size_t> rank_tokens;
    std::string bad;  // what is not finite: loss and gradient before the update (then there was none), or A and B after
};

// The rank of each example: the longest first, each to the rank that has the fewest tokens so far (the first of
// equals). LPT of Graham 1969: the fullest rank has at most 4/3 of the least possible.
inline std::vector<int> deal(const std::vector<size_t>& lengths, int ranks) {
    std::vector<size_t> by_length(lengths.size()), tokens(ranks, 0);
    std::iota(by_length.begin(), by_length.end(), size_t(0));
    std::stable_sort(by_length.begin(), by_length.end(), [&](size_t a, size_t b) { return lengths[a] > lengths[b]; });
    std::vector<int> rank(lengths.size(), 0);
    for (size_t i : by_length) {
        rank[i] = int(std::min_element(tokens.begin(), tokens.end()) - tokens.begin());
        tokens[rank[i]] += lengths[i];
    }
    return rank;
}

// Examples of a step, or of an evaluation, dealt to the ranks; each rank's in the order given.
inline std::vector<std::vector<size_t>> examples_deal(const Dataset& data, const std::vector<size_t>& examples,
                                                      int ranks) {
    std::vector<size_t> lengths;
    for (size_t i : examples) {
        lengths.push_back(data.length(i));
    }
    const std::vector<int> rank = deal(lengths, ranks);
    std::vector<std::vector<size_t>> dealt(ranks);
    for (size_t i = 0; i < examples.size(); i++) {
        dealt[rank[i]].push_back(examples[i]);
    }
    return dealt;
}

// This rank's passes of a step, and what it has to know of the others.
struct RankPasses {
    std::vector<std::vector<size_t>> mine;
    size_t most = 0;             // passes of the rank that has most; every rank goes through as many
    std::vector<size_t> tokens;  // of each rank
};

template <class Dev>
RankPasses rank_passes(const Llama<Dev>& m, const Dataset& data, const std::vector<size_t>& examples,
                       size_t pass_tokens, bool pack) {
    RankPasses p;
    const int ranks = m.dev.comm != nullptr ? m.dev.comm->size : 1, rank = m.dev.comm != nullptr ? m.dev.comm->rank : 0;
    const std::vector<std::vector<size_t>> dealt = examples_deal(data, examples, ranks);
    for (int r = 0; r < ranks; r++) {
        p.tokens.push_back(0);
        for (size_t i : dealt[r]) {
            p.tokens[r] += data.length(i);
        }
        std::vector<std::vector<size_t>> passes = passes_make(data, dealt[r], pass_tokens, pack);
        p.most = std::max(p.most, passes.size());
        if (r == rank) {
            p.mine = std::move(passes);
        }
    }
    return p;
}

// x (n) = its sum over the ranks.
template <class Dev>
void host_sum(const Dev& dev, double* x, size_t n) {
    if (dev.comm != nullptr) {
        comm_sum(*dev.comm, x, n);
    }
}

// step counts from 1. The loss is divided by the targets of all passes of all ranks together, known before the first of
// them.
template <class Dev>
StepResult train_step(Llama<Dev>& m, const Dataset& data, const std::vector<size_t>& examples, size_t pass_tokens,
                      bool pack, int64_t step, const StepRates& rates) {
    StepResult r;
    const RankPasses passes = rank_passes(m, data, examples, pass_tokens, pack);
    r.rank_tokens = passes.tokens;
    for (size_t i : examples) {
        r.tokens += data.length(i);
        r.targets +=
            size_t(std::count(data.targets.begin() + data.start[i] + 1, data.targets.begin() + data.start[i + 1], 1));
    }
    llama_zero_gradients(m);
    Batch b;
    const size_t rounds = std::max<size_t>(passes.most, 1);
    for (size_t i = 0; i < rounds; i++) {
        const bool last = i + 1 == rounds;
        if (i >= passes.mine.size()) {
            llama_idle(m, true, last);
            continue;
        }
        batch_make(b, data, passes.mine[i]);
        Pass<Dev> p = llama_forward(m, b, uint32_t(step), float(m.adapter.lora.dropout));
        r.loss += llama_loss(m, p, true, 1 / double(r.targets)).loss;
        llama_backward(m, p, last);
        r.flops += pass_flops(m.c, m.adapter.lora, b);
    }
    llama_gradients_whole(m);
    r.grad_norm = llama_gradient_norm(m);  // and the device has done all that was queued
    // careful: the norm of rank 0 for all, since cards of different sizes add it up in different orders
    double sums[] = {r.loss, r.flops, m.dev.comm == nullptr || m.dev.comm->rank == 0 ? r.grad_norm : 0};
    host_sum(m.dev, sums, 3);
    r.loss = sums[0] / double(r.targets);
    r.flops = sums[1];
    r.grad_norm = sums[2];
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
    if (!llama_update(m, a)) {
        r.bad = "adapter";
    }
    return r;
}
