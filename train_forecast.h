// What a step costs on many ranks, told without them: the seconds of each rank's passes, by train_speed.h on a CPU and
// by train_device.h on a card, and what the link between the ranks adds.
//
// B: bytes a second that a rank can send and at the same time receive. R ranks, L layers.
//
//   sum of n gradients   every part is sent to the rank that adds it, and comes back:   s(n) = 2 (R-1)/R 4 n / B
//   a spread layer       the other ranks' slices of it come:                            g = (R-1) slice / B
//
// A pass keeps two clocks, work and link, and goes through the layers in the order of llama_forward and llama_backward.
// On a card the link is busy beside the work: a gather starts when the layer that was in its buffer is done and has the
// time of one layer, so that g - forward (backward) of each is left over; messages of the sum have the time of the
// layers below theirs, the last has none. Two layers are always there already: 2 (L-2) gathers a pass. On a CPU MPI
// moves bytes only while somebody waits for them: nothing is hidden.
//
//   forward    layer     0     1     2     3        backward    3     2     1     0
//              arriving        2     3                          .     1     0                        (L = 4)
//              sent                                                   3     2     1     0  (sums of the last pass)
//
// A spread base keeps the ranks in step layer by layer: in each round of passes all wait for the one that has most to
// do. Without it they meet at the sum alone. efficiency = work of all ranks / R / seconds of the step.
//
// Left out: the update, the time that a message takes to start, the small exchanges of a step (loss, norm, signals),
// and what NCCL's own blocks take from a card. One link for all: no difference between cards of one machine and those
// of another.
#pragma once
#include "train_device.h"

// Whether the link works beside the arithmetic.
template <class X>
bool is_link_beside(const Cpu<X>&) {
    return false;
}
template <class X>
bool is_link_beside(const Gpu<X>&) {
    return true;
}

// Seconds of a pass: between forward and backward, of a layer forward, of each layer backward. A rank that has no pass
// left goes through an empty one.
struct PassTime {
    double head = 0, forward = 0;
    std::vector<double> backward;  // (L)

    double seconds() const {
        return head + forward * double(backward.size()) + std::accumulate(backward.begin(), backward.end(), 0.0);
    }
};

// CPU: by the costs measured here. What is before the first layer is laid on the head.
template <class X>
PassTime pass_time(const Cpu<X>&, const Run& run, const Speed& speed, const Batch& b) {
    PassTime t;
    Work ends, forward;
    work_ends(ends, run.c, b, speed.head_rows);
    work_layer_forward(forward, run.c, run.lora, b);
    t.head = work_seconds(speed, ends);
    t.forward = work_seconds(speed, forward);
    for (int l = 0; l < run.c.L; l++) {
        Work w;
        work_layer_backward(w, run.c, run.lora, b, recompute_of(run.plan.recompute, l), l == 0);
        t.backward.push_back(work_seconds(speed, w));
    }
    return t;
}

// A card: the layers share what the head leaves, by plan_cost of what each makes again.
template <class X>
PassTime pass_time(const Gpu<X>& dev, const Run& run, const Speed&, const Batch& b) {
    const LlamaConfig& c = run.c;
    Plan one = run.plan;
    std::vector<double> cost;
    for (int l = 0; l < c.L; l++) {
        one.recompute = recompute_everywhere(recompute_of(run.plan.recompute, l), c.L);
        cost.push_back(plan_cost(one, c, plan_restore_tokens(dev), 0));
    }
    one.recompute = recompute_everywhere(Recompute::NONE, c.L);
    const double forward = plan_cost(one, c, plan_restore_tokens(dev), 0) / 2;
    PassTime t;
    t.head = 4 * double(b.n_labels) * double(c.V) * c.C / (dev.info.gflops * 1e9);
    const double unit = (plan_seconds(dev, run, b) - t.head) / std::accumulate(cost.begin(), cost.end(), 0.0);
    t.forward = unit * forward;
    for (double whole : cost) {
        t.backward.push_back(unit * (whole - forward));
    }
    return t;
}

// What goes over the link in a step.
struct LinkUse {
    bool beside = false;
    double gather = 0, sum = 0;   // seconds of a layer, of an element of the gradients
    size_t layer = 0, least = 0;  // elements of the gradients of a layer, of a message but the last
    size_t gathers = 0, messages = 0;
};

// Seconds of a step's passes on a rank whose peers never keep it waiting. Counts gathers and messages in use.
inline double passes_seconds(LinkUse& use, const std::vector<PassTime>& passes) {
    double work = 0, link = 0;
    const auto moved = [&](double seconds) {  // queued now; the time at which it is done
        link = std::max(link, work) + seconds;
        work = use.beside ? work : link;
        return link;
    };
    int holds[2] = {0, 1};  // as the step before left them
    double here[2] = {};
    const auto fetch = [&](int l, int L) {
        if (use.gather > 0 && l >= 0 && l < L && holds[l % 2] != l) {
            holds[l % 2] = l;
            here[l % 2] = moved(use.gather);
            use.gathers++;
        }
    };
    for (const PassTime& pass : passes) {
        const int L = int(pass.backward.size());
        for (int l = 0; l < L; l++) {
            work = std::max(work, here[l % 2]);
            fetch(l + 1, L);
            work += pass.forward;
        }
        work += pass.head;
        size_t waiting = 0;  // gradients that are not yet on their way
        for (int l = L - 1; l >= 0; l--) {
            work = std::max(work, here[l % 2]);
            fetch(l - 1, L);
            work += pass.backward[l];
            waiting += use.layer;
            if (&pass == &passes.back() && use.sum > 0 && (l == 0 || waiting >= use.least)) {
                moved(use.sum * double(waiting));
                waiting = 0;
                use.messages++;
            }
        }
    }
    return std::max(work, link);
}

struct Forecast {
    double seconds = 0;  // of the step
    double compute = 0;  // of it, the arithmetic of the rank that has most
    double work = 0;     // arithmetic of all ranks together
    double bytes = 0;    // that a rank sends, and receives
    size_t tokens = 0, gathers = 0, messages = 0;
};

// A step of these examples under run.plan. slice: bytes of a layer that a rank keeps; 0: it has the whole base.
template <class Dev>
Forecast forecast_step(const Dev& dev, const Run& run, const Speed& speed, size_t slice,
                       const std::vector<size_t>& examples) {
    const int R = run.plan.ranks;
    const double gather_bytes = double(R - 1) * double(slice), sum_bytes = 2.0 * (R - 1) / R * 4;
    PassTime none;
    none.backward.resize(run.c.L);
    std::vector<std::vector<PassTime>> ranks(R);
    std::vector<double> compute(R, 0);
    Forecast f;
    size_t rounds = 1;
    Batch b;
    const std::vector<std::vector<size_t>> dealt = examples_deal(run.train, examples, R);
    for (int r = 0; r < R; r++) {
        for (const std::vector<size_t>& pass : passes_make(run.train, dealt[r], run.plan.pass_tokens, run.o.pack)) {
            batch_make(b, run.train, pass);
            f.tokens += b.size();
            ranks[r].push_back(pass_time(dev, run, speed, b));
            compute[r] += ranks[r].back().seconds();
        }
        rounds = std::max(rounds, ranks[r].size());
        f.work += compute[r];
    }
    std::vector<PassTime> slowest(rounds, none);
    for (std::vector<PassTime>& passes : ranks) {
        passes.resize(rounds, none);
        for (size_t i = 0; i < rounds; i++) {
            slowest[i] = passes[i].seconds() > slowest[i].seconds() ? passes[i] : slowest[i];
        }
    }
    LinkUse use;
    use.beside = is_link_beside(dev);
    use.gather = gather_bytes / (run.o.link * 1e9);
    use.sum = sum_bytes / (run.o.link * 1e9);
    use.layer = adapter_elements(run.c, run.lora) / size_t(run.c.L);
    use.least = comm_sum_least(dev);
    if (slice > 0) {
        ranks = {slowest};
    }
    for (const std::vector<PassTime>& passes : ranks) {
        use.gathers = use.messages = 0;
        f.seconds = std::max(f.seconds, passes_seconds(use, passes));
    }
    f.compute = *std::max_element(compute.begin(), compute.end());
    f.gathers = use.gathers;
    f.messages = use.messages;
    f.bytes = double(use.gathers) * gather_bytes + sum_bytes * double(use.layer) * double(run.c.L);
    return f;
}

// Whether there is a speed to go by.
template <class X>
bool is_speed_known(const Cpu<X>&) {
    return true;
}
template <class X>
bool is_speed_known(const Gpu<X>& dev) {
    return dev.info.gflops > 0;
}

// The mean of these steps in one line.
template <class Dev>
std::string forecast_text(const Dev& dev, const Run& run, const Speed& speed, const BaseOptions& base,
                          const std::vector<std::vector<size_t>>& steps) {
    const int R = run.plan.ranks;
    const std::string head = text_format("%d %s at %g GB/s: %s a rank; ", R, R == 1 ? "rank" : "ranks", run.o.link,
                                         text_bytes(double(run.plan.total())).c_str());
    if (!is_speed_known(dev)) {
        return head + "the time of a step is unknown, this device does not tell its clocks";
    }
    const size_t slice = run.plan.spread ? spread_slice(base_measure(dev, run.c, base).layer, R) : 0;
    Forecast sum;
    for (const std::vector<size_t>& examples : steps) {
        const Forecast f = forecast_step(dev, run, speed, slice, examples);
        sum.seconds += f.seconds;
        sum.compute += f.compute;
        sum.work += f.work;
        sum.bytes += f.bytes;
        sum.tokens += f.tokens;
    }
    const double n = double(steps.size()), seconds = sum.seconds / n, tokens_per_s = double(sum.tokens) / sum.seconds;
    const int digits = seconds < 0.1 ? 4 : seconds < 1 ? 3 : seconds < 10 ? 2 : 1;
    return head + text_format(
                      "a step of %s tokens %.*f s = compute %.*f + other ranks %.*f (%s each way); %.*f tok/s "
                      "together, efficiency %.0f %%",
                      text_count(uint64_t(double(sum.tokens) / n)).c_str(), digits, seconds, digits, sum.compute / n,
                      digits, seconds - sum.compute / n, text_bytes(sum.bytes / n).c_str(), tokens_per_s < 10 ? 2 : 0,
                      tokens_per_s, 100 * sum.work / R / sum.seconds);
}

// Says it, when --ranks asks for it.
template <class Dev>
void forecast_show(Run& run, const Dev& dev, const Speed& speed, const BaseOptions& base,
                   const std::vector<std::vector<size_t>>& steps) {
    if (run.o.ranks > 0) {
        console_fact(run.console, "%s", forecast_text(dev, run, speed, base, steps).c_str());
    }
}
