// What a run has to know of the device it is on, the same questions for each: its name, its memory, its speed, the time
// a step should take; and the choice between the devices that this program has.
#pragma once
#include "kernels/cpu/peak.h"
#include "train_ranks.h"

// ---------------------------------------------------------------------------------------------------------------------
// one question, two answers

// The instruction tier or the card's generation with its arithmetic: results are the same bits on the same tier.
inline std::string device_tier(const Cpu<float>& dev) {
    return dev.isa->name;
}
template <class X>
std::string device_tier(const Gpu<X>& dev) {
    return text_format("sm_%d, %s", dev.info.arch, sizeof(X) == 2 ? "bf16" : "fp32");
}

inline const char* device_kind(const Cpu<float>&) {
    return "cpu";
}
template <class X>
const char* device_kind(const Gpu<X>&) {
    return "cuda";
}

inline std::string device_label(const Cpu<float>& dev) {
    return text_format("cpu, %s", dev.isa->name);
}
template <class X>
std::string device_label(const Gpu<X>& dev) {
    return text_format("cuda, %s, %s", dev.info.name, sizeof(X) == 2 ? "bf16" : "fp32");
}

inline uint64_t device_memory(const Cpu<float>& dev) {
    return machine_memory() / uint64_t(dev.comm != nullptr ? dev.comm->local_size : 1);
}
template <class X>
uint64_t device_memory(const Gpu<X>& dev) {
    return dev.info.memory;
}

// GFLOP/s that the matrix products can reach. CPU: measured now; a card: what its kind sustains at its clocks.
inline double device_peak_gflops(Cpu<float>& dev) {
    return cpu_peak_gflops(dev);
}
template <class X>
double device_peak_gflops(Gpu<X>& dev) {
    return dev.info.gflops;
}

// The same at the end of a benchmark, measured now; before: what was measured at its start.
inline double device_measured_gflops(Cpu<float>& dev, double before) {
    return std::max(before, cpu_peak_gflops(dev));
}
template <class X>
double device_measured_gflops(Gpu<X>& dev, double) {
    return matmul_gflops(dev);
}

inline std::string device_peak_memory(Cpu<float>&) {
    return "peak memory " + text_bytes(double(peak_memory()));
}
template <class X>
std::string device_peak_memory(Gpu<X>& dev) {
    return "peak memory " + text_bytes(double(device_peak_bytes(dev))) + " on the card, " +
           text_bytes(double(peak_memory())) + " on the host";
}

// Memory for the whole plan in one piece, before anything is read, and its choice of kernels.
inline Error device_take(Cpu<float>&, const Plan&) {
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

// Of a pass on a CPU: its arithmetic at the rank's part of the peak of all.
inline double plan_seconds(const Cpu<float>&, const Run& run, const Batch& b) {
    return pass_flops(run.c, run.lora, b) / 1e9 / (run.peak_gflops / run.comm.size);
}

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

// tok/s of all ranks, each with such a batch, under the plan; on the CPU that is an upper bound.
template <class Dev>
double plan_tokens_per_s(const Dev& dev, const Run& run, const Batch& b) {
    return double(b.size()) / plan_seconds(dev, run, b) * run.comm.size;
}

inline std::string speed_text(const Cpu<float>&, const Run& run, double tokens_per_s) {
    return text_format("speed at most %.*f tok/s (the measured peak of %.0f GFLOP/s; half of it is usual)",
                       tokens_per_s < 10 ? 2 : 0, tokens_per_s, run.peak_gflops);
}
template <class X>
std::string speed_text(const Gpu<X>& dev, const Run&, double tokens_per_s) {
    if (dev.info.gflops == 0) {
        return "predicted speed: unknown, this device does not tell its clocks";
    }
    return text_format("predicted speed %.*f tok/s (matrix products at %.0f TFLOP/s, memory at %.0f GB/s)",
                       tokens_per_s < 10 ? 2 : 0, tokens_per_s, dev.info.gflops / 1e3, dev.info.gbytes_per_s);
}

// ---------------------------------------------------------------------------------------------------------------------
// the choice

inline Error device_settings(const Options& o) {
    if (o.math == "int16" || (o.math == "bf16" && o.device == "cpu")) {
        return bad_input("--math %s: the CPU computes in fp32 only in this version", o.math.c_str())
            .hinted("leave out --math");
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

// The tier that all ranks have: on different ones the same update would round differently.
inline void tier_agree(const Run& run, Cpu<float>& dev) {
    if (ranks_of(run) == nullptr) {
        return;
    }
    const std::vector<std::string> tiers = comm_all_gather_text(run.comm, dev.isa->name);
    for (const char* name : {"avx512", "avx2", "ref"}) {  // from the best down
        if (std::find(tiers.begin(), tiers.end(), name) != tiers.end()) {
            dev.isa = cpu_isa_choose(name);
        }
    }
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
    Error e = run.o.device == "cpu"  ? Error()
              : run.o.math == "fp32" ? with_gpu<float>(run, &used, fn)
                                     : with_gpu<bf16>(run, &used, fn);
    if (used) {
        return e;
    }
#endif
    Cpu<float> dev;
    device_open(dev, rank_threads(run));
    Error tier;
    if (dev.isa == nullptr) {
        tier = bad_input("TRAIN_LLAMA_CPU names a tier that is unknown or that this processor lacks")
                   .hinted("unset it, or set it to ref, avx2 or avx512");
    }
    if (Error e = ranks_agree(run, tier)) {
        return e;
    }
    tier_agree(run, dev);
    if (run.o.math == "bf16") {
        return bad_input("--math bf16: the CPU computes in fp32 only in this version").hinted("leave out --math");
    }
    if (run.o.gemm != "auto" || run.o.paged_optimizer) {
        console_warn(run.console, "%s is a choice for GPUs and changes nothing here",
                     run.o.gemm != "auto" ? ("--gemm " + run.o.gemm).c_str() : "--paged-optimizer");
    }
    return with_ranks(run, dev, fn);
}
