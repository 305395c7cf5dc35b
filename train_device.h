// What a run has to know of the device it is on, the same questions for each: its name, its memory, its speed, the time
// a step should take; and the choice between the devices that this program has.
#pragma once
#include "kernels/cpu/peak.h"
#include "train_ranks.h"
#include "train_speed.h"

// ---------------------------------------------------------------------------------------------------------------------
// one question, two answers

// The instruction tier or the card's generation with its arithmetic: results are the same bits on the same tier.
template <class X>
std::string device_tier(const Cpu<X>& dev) {
    return text_format("%s, %s", dev.isa->name, dev.base->name);
}
template <class X>
std::string device_tier(const Gpu<X>& dev) {
    return text_format("sm_%d, %s", dev.info.arch, sizeof(X) == 2 ? "bf16" : "fp32");
}

template <class X>
const char* device_kind(const Cpu<X>&) {
    return "cpu";
}
template <class X>
const char* device_kind(const Gpu<X>&) {
    return "cuda";
}

template <class X>
std::string device_label(const Cpu<X>& dev) {
    return "cpu, " + device_tier(dev);
}
template <class X>
std::string device_label(const Gpu<X>& dev) {
    return text_format("cuda, %s, %s", dev.info.name, sizeof(X) == 2 ? "bf16" : "fp32");
}

template <class X>
uint64_t device_memory(const Cpu<X>& dev) {
    return machine_memory() / uint64_t(dev.comm != nullptr ? dev.comm->local_size : 1);
}
template <class X>
uint64_t device_memory(const Gpu<X>& dev) {
    return dev.info.memory;
}

// GFLOP/s that the matrix products can reach. CPU: measured now, in the arithmetic of the frozen matrices; a card: what
// its kind sustains at its clocks.
template <class X>
double device_peak_gflops(Cpu<X>& dev) {
    return cpu_peak_gflops(dev);
}
template <class X>
double device_peak_gflops(Gpu<X>& dev) {
    return dev.info.gflops;
}

// The same at the end of a benchmark, measured now; before: what was measured at its start.
template <class X>
double device_measured_gflops(Cpu<X>& dev, double before) {
    return std::max(before, cpu_peak_gflops(dev));
}
template <class X>
double device_measured_gflops(Gpu<X>& dev, double) {
    return matmul_gflops(dev);
}

template <class X>
std::string device_peak_memory(Cpu<X>&) {
    return "peak memory " + text_bytes(double(peak_memory()));
}
template <class X>
std::string device_peak_memory(Gpu<X>& dev) {
    return "peak memory " + text_bytes(double(device_peak_bytes(dev))) + " on the card, " +
           text_bytes(double(peak_memory())) + " on the host";
}

// Memory for the whole plan in one piece, before anything is read, and its choice of kernels.
template <class X>
Error device_take(Cpu<X>&, const Plan&) {
    return {};
}
template <class X>
Error device_take(Gpu<X>& dev, const Plan& plan) {
    std::string why = device_arena(dev, plan.total() - plan.library);
    if (!why.empty()) {
        return runtime_failure("the card does not give the %s that the plan needs: %s",
                               text_bytes(double(plan.total())).c_str(), why.c_str())
            .hinted("end other programs on it (nvidia-smi lists them), or lower --pass-tokens, or --recompute full");
    }
    device_reserve(dev, plan.workspace);
    device_gemm(dev, plan.gemm);
    return {};
}

// Of all ranks together.
inline double sum_of_ranks(const Run& run, double x) {
    if (ranks_of(run) != nullptr) {
        comm_sum(run.comm, &x, 1);
    }
    return x;
}

// What the poorest rank has: all follow one plan.
template <class Dev>
uint64_t memory_of_ranks(const Run& run, const Dev& dev) {
    const std::vector<uint64_t> all = all_of_ranks(run, device_memory(dev));
    return *std::min_element(all.begin(), all.end());
}

// What of a plan the user asks for, before plan_choose.
template <class Dev>
void plan_wishes(Run& run, const Dev& dev) {
    run.plan = Plan();
    run.plan.gemm = gemm_parse(run.o.gemm);
    run.plan.paged = run.o.paged_optimizer;
    run.plan.ranks = run.o.ranks > 0 ? run.o.ranks : run.comm.size;
    run.plan.local_ranks = run.o.ranks > 0 ? std::min(run.o.ranks, 8) : run.comm.local_size;
    run.plan.spread = run.o.shard_base && (run.o.ranks > 0 || dev.comm != nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------
// the speed to expect

// Of a pass on a card: matrix products and what is made again at the products' rate, weights restored, attention at the
// third of that rate that it reaches, and the bytes that the ops between them read and write, at the memory's rate.
template <class X>
double plan_seconds(const Gpu<X>& dev, const Run& run, const Batch& b) {
    const LlamaConfig& c = run.c;
    const double N = double(b.size()), flops = pass_flops(c, run.lora, b), attention = attention_flops(c, b);
    const double rate = dev.info.gflops * 1e9;
    const double again =
        (plan_cost(run.plan, c, plan_restore_tokens(dev), 0) - 2) * 2 * N * double(linear_parameters(c));
    // Elements a token and layer: norms 9 C forward and back, gradients of norms 4 C each, RoPE both ways, delta,
    // SwiGLU 3 F forward, 8 F back, and the adapters' passes over inputs and output gradients.
    const double heads = double(c.NH + c.NKV) * c.HS, out = double(c.NH + 2 * c.NKV) * c.HS;
    const double elements = 17.0 * c.C + 4 * heads + 2.0 * c.NH * c.HS + 11.0 * c.F + 2 * (4.0 * c.C + out + 3.0 * c.F);
    return (flops - attention + again) / rate + attention / (rate / 3) +
           elements * N * c.L * sizeof(X) / (dev.info.gbytes_per_s * 1e9);
}

// tok/s of all ranks, each with such a batch, under the plan.
template <class X>
double plan_tokens_per_s(const Gpu<X>& dev, const Run& run, const Batch& b) {
    return double(b.size()) / plan_seconds(dev, run, b) * run.comm.size;
}

// The costs of a CPU are measured, on the fullest pass of this step; those of a card are known.
template <class X>
Speed device_speed(const Cpu<X>& dev, const Run& run, const BaseOptions& base, const std::vector<size_t>& examples) {
    Batch fullest, b;
    for (const std::vector<size_t>& pass : passes_make(run.train, examples, run.plan.pass_tokens, run.o.pack)) {
        batch_make(b, run.train, pass);
        fullest = b.size() > fullest.size() ? b : fullest;
    }
    return speed_measure(dev, run.c, run.lora, base, fullest);
}
template <class X>
Speed device_speed(const Gpu<X>&, const Run&, const BaseOptions&, const std::vector<size_t>&) {
    return {};
}

// The speed to expect in these steps; on a card, in the first.
template <class X>
std::string speed_text(const Cpu<X>&, const Run& run, const Speed& speed,
                       const std::vector<std::vector<size_t>>& steps) {
    double tokens = 0, seconds = 0, flops = 0, in_products = 0;
    for (const std::vector<size_t>& examples : steps) {
        double slowest = 0;
        for (const std::vector<size_t>& mine : examples_deal(run.train, examples, run.comm.size)) {
            const Work w = work_step<Cpu<X>>(run.c, run.lora, run.plan, run.o.pack, speed.head_rows, run.train, mine);
            slowest = std::max(slowest, work_seconds(speed, w));
            for (int part = 0; part < SPEED_PARTS; part++) {
                flops += is_product(part) ? w.units[part] : 0;
                in_products += is_product(part) ? work_seconds(speed, w, part) : 0;
            }
        }
        seconds += slowest;
        for (size_t i : examples) {
            tokens += double(run.train.length(i));
        }
    }
    const double rate = tokens / seconds;
    return text_format(
        "predicted speed %.*f tok/s (calibrated here: matrix products at %.0f GFLOP/s, memory at %.1f GB/s)",
        rate < 10 ? 2 : 0, rate, flops / in_products / 1e9, 1e-9 / speed.per_unit[OP_ADAMW]);
}
template <class X>
std::string speed_text(const Gpu<X>& dev, const Run& run, const Speed&, const std::vector<std::vector<size_t>>& steps) {
    if (dev.info.gflops == 0) {
        return "predicted speed: unknown, this device does not tell its clocks";
    }
    Batch b;
    batch_make(b, run.train, steps[0]);
    const double tokens_per_s = plan_tokens_per_s(dev, run, b);
    return text_format("predicted speed %.*f tok/s (matrix products at %.0f TFLOP/s, memory at %.0f GB/s)",
                       tokens_per_s < 10 ? 2 : 0, tokens_per_s, dev.info.gflops / 1e3, dev.info.gbytes_per_s);
}

// ---------------------------------------------------------------------------------------------------------------------
// the choice

inline Error device_settings(const Options& o) {
    if (o.math == "int16" && o.device == "cuda") {
        return bad_input("--math int16 is an arithmetic of the CPU; a GPU has bf16 and fp32")
            .hinted("leave out --math, or train on the CPU with --device cpu");
    }
    if (o.device == "cuda" && !HAVE_GPU) {
        return bad_input("--device cuda: this program was built without CUDA")
            .hinted("install the CUDA toolkit (nvcc) and build again, or leave out --device");
    }
    return {};
}

// Threads of this process: as asked, else its share of the machine's; 0: the device's own choice.
inline int rank_threads(const Run& run) {
    return run.o.threads > 0 ? run.o.threads : comm_threads(run.comm);
}

// fn on a device that is open and joined to the other ranks' devices; closes it.
template <class Dev, class Fn>
Error with_ranks(Run& run, Dev& dev, const Fn& fn) {
    run.threads = dev.threads;
    const std::string why = comm_attach(dev, run.comm);
    Error e = why.empty() ? fn(dev) : runtime_failure("%s", why.c_str());
    if (!e) {
        comm_detach(dev);  // waits for the other ranks, which may not come after an error
    }
    device_close(dev);
    return e;
}

// Ranks that have a usable card.
inline int cards_of_ranks(const Run& run, int have) {
    return int(sum_of_ranks(run, have));
}

// The tier to compute in: what this processor has, or TRAIN_LLAMA_CPU names; with ranks, what all of them have, since on
// different tiers the same update would round differently.
inline Error tier_choose(const CpuIsa** isa, Run& run) {
    *isa = cpu_isa_asked();
    Error e;
    if (*isa == nullptr) {
        e = bad_input("TRAIN_LLAMA_CPU names a tier that is unknown or that this processor lacks")
                .hinted("unset it, or set it to ref, avx2, avx512, avx512vnni or amx");
    }
    e = ranks_agree(run, e);
    if (e || ranks_of(run) == nullptr) {
        return e;
    }
    const std::vector<std::string> tiers = comm_all_gather_text(run.comm, (*isa)->name);
    for (const char* name : {"amx", "avx512vnni", "avx512", "avx2", "ref"}) {  // from the best down
        if (std::find(tiers.begin(), tiers.end(), name) != tiers.end()) {
            *isa = cpu_isa_choose(name);
        }
    }
    return {};
}

// Runs fn on the processor, in the arithmetic that --math names.
template <class X, class Fn>
Error with_cpu(Run& run, const CpuIsa* isa, const Fn& fn) {
    Cpu<X> dev;
    device_open(dev, rank_threads(run));
    dev.isa = isa;
    if (!device_math(dev, run.o.math.c_str())) {
        return bad_input("--math %s: the processor has no %s (its tier is %s)", run.o.math.c_str(),
                         run.o.math == "int16" ? "AVX-512 with VNNI" : "AMX", isa->name)
            .hinted("leave out --math, and the fastest arithmetic that it has is taken");
    }
    return with_ranks(run, dev, fn);
}

#if HAVE_GPU
// Runs fn on the card; *used is false when there is none and the CPU may do it instead.
template <class X, class Fn>
Error with_gpu(Run& run, bool* used, const Fn& fn) {
    Gpu<X> dev;
    const std::string why = device_open(dev, rank_threads(run), run.comm.local_rank, run.comm.local_size);
    int have = why.empty();
    const int of_all = cards_of_ranks(run, have);
    *used = of_all > 0 || run.o.device == "cuda";
    if (!*used) {
        console_fact(run.console, "no GPU is used: %s", why.c_str());
        return {};
    }
    Error e;
    if (!have) {
        e = bad_input("--device %s: %s", run.o.device.c_str(), why.c_str())
                .hinted(of_all > 0 ? "other ranks have a GPU: start fewer ranks, or train on the CPU with --device cpu"
                                   : "leave out --device to train on the CPU");
    }
    e = ranks_agree(run, e);
    if (e) {
        device_close(dev);
        return e;
    }
    return with_ranks(run, dev, fn);
}
#endif

// fn(dev) with the device that the options ask for: `auto` takes a GPU if there is one.
template <class Fn>
Error with_device(Run& run, const Fn& fn) {
#if HAVE_GPU
    bool used = false;
    Error e = run.o.device == "cpu" || run.o.math == "int16" ? Error()
              : run.o.math == "fp32" ? with_gpu<float>(run, &used, fn)
                                     : with_gpu<bf16>(run, &used, fn);
    if (used) {
        return e;
    }
#endif
    if (run.o.gemm != "auto" || run.o.paged_optimizer) {
        console_warn(run.console, "%s is a choice for GPUs and changes nothing here",
                     run.o.gemm != "auto" ? ("--gemm " + run.o.gemm).c_str() : "--paged-optimizer");
    }
    const CpuIsa* isa = nullptr;
    if (Error e = tier_choose(&isa, run)) {
        return e;
    }
    const bool in_bf16 = isa->bf16 != nullptr && (run.o.math == "auto" || run.o.math == "bf16");
    return in_bf16 ? with_cpu<bf16>(run, isa, fn) : with_cpu<float>(run, isa, fn);
}
