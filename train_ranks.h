// What the ranks of one training agree on: errors, signals, where the run directory is and what it holds, that their
// adapters are still the same. The bytes between them are kernels/comm.h's; which rank trains on what is
// train_step.h's.
//
// Rank 0 alone reads and writes the run directory. An error of any rank ends all: those that meet in ranks_agree leave
// together; one whose others wait elsewhere ends them after two seconds (ranks_end).
#pragma once
#include "train_run.h"

inline const Comm* ranks_of(const Run& run) {
    return run.comm.state != nullptr ? &run.comm : nullptr;
}

// As comm_agree: the same outcome on all ranks, which leave together when it is an error.
inline Error ranks_agree(Run& run, const Error& mine) {
    Error e = comm_agree(ranks_of(run), mine);
    run.leaving = run.leaving || e;
    return e;
}

// fn() on rank 0; its error, if it has one, on all.
template <class Fn>
Error on_rank_0(Run& run, const Fn& fn) {
    return ranks_agree(run, run.comm.rank == 0 ? fn() : Error());
}

// The value of rank 0, a plain struct or number.
template <class T>
T of_rank_0(const Run& run, T value) {
    if (ranks_of(run) != nullptr) {
        comm_broadcast(run.comm, &value, sizeof(value), 0);
    }
    return value;
}

// Every rank's value, in the order of the ranks.
template <class T>
std::vector<T> all_of_ranks(const Run& run, T own) {
    std::vector<T> all(run.comm.size);
    comm_all_gather(run.comm, all.data(), &own, sizeof(own));
    return all;
}

inline std::string text_of_rank_0(const Run& run, std::string text) {
    text.resize(of_rank_0(run, text.size()));
    if (ranks_of(run) != nullptr) {
        comm_broadcast(run.comm, &text[0], text.size(), 0);
    }
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------
// the way out

// The exit status of the program, the same on all ranks; says the error of the lowest rank that has one to say.
inline int ranks_end(Run& run, const Error& e) {
    const bool alone = ranks_of(run) == nullptr, stopped = e.code >= 128;  // after saving: not an error of anyone's
    const std::string who =
        text_format("rank %d of %d (%s): ", run.comm.rank, run.comm.size, comm_host(run.comm).c_str());
    const int speaks = 1 << 16;
    std::vector<int> ends = {e.code | (e.what.empty() ? 0 : speaks)};
    for (int number : {SIGTERM, SIGINT, SIGHUP}) {
        if (!alone && e) {
            signal(number, SIG_IGN);  // a launcher that sees one rank end signals the others
        }
    }
    // Where all know that they leave, the slowest may have files to close; else nobody else may ever come.
    const double seconds = !e ? -1 : run.leaving || stopped || e.code == 3 ? 60 : 2;
    if (!alone && !comm_ended(run.comm, ends[0], seconds, ends)) {
        Error named = e;
        named.what = who + (e.what.empty() ? "ended because another rank did" : e.what);
        comm_abort(run.comm, error_print(named));
    }
    int status = 0, speaker = -1;
    for (int r = int(ends.size()) - 1; r >= 0; r--) {
        status = ends[r] != 0 && (speaker < 0 || ends[r] >= speaks) ? ends[r] % speaks : status;
        speaker = ends[r] >= speaks ? r : speaker;
    }
    if (e && (alone || run.comm.rank == speaker)) {
        Error said = e;
        if (!alone && speaker > 0) {
            said.what = who + e.what;
        }
        if (stopped) {
            console_fact(run.console, "%s", said.what.c_str());
            console_fact(run.console, "%s", said.hint.c_str());
        } else {
            error_print(said);
        }
    }
    if (status != 0 && !alone) {
        fflush(nullptr);
        comm_ended(run.comm, status, 10, ends);  // all wait for the one that speaks
        _exit(status);  // careful: a launcher that was told to end its ranks may never let MPI_Finalize return
    }
    comm_close(run.comm);
    return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// before anything that the ranks do together

// Refuses a rank whose values differ from rank 0's, naming them.
inline Error same_as_rank_0(Run& run, const Json& own, const char* hint) {
    Json first;
    const std::string of_0 = text_of_rank_0(run, json_write(own));
    Error e = json_parse(first, of_0.data(), of_0.size(), "rank 0");
    const std::string differ = e ? "" : differences(&first, own);
    if (!differ.empty()) {
        e = bad_input("not given the same as rank 0: %s", differ.c_str()).hinted(hint);
    }
    return ranks_agree(run, e);
}

// Every rank was given the same options: they decide what is computed, and which calls the ranks make together. Paths
// may differ from machine to machine; whether one is given may not.
inline Error same_options(Run& run) {
    if (ranks_of(run) == nullptr) {
        return {};
    }
    const Options& o = run.o;
    Json own = options_to_json(o);
    for (const char* path : {"input", "model", "val", "init-adapter"}) {
        own.set(path, own.find(path) == nullptr ? "not given" : "given");
    }
    for (const char* free : {"threads", "quiet"}) {
        own.set(free, "any");
    }
    own.set("inputs", o.inputs.size()).set("val-none", o.val == "none").set("shape", is_shape(o) ? o.model : "");
    own.set("resume", o.resume).set("overwrite", o.overwrite).set("dry-run", o.dry_run).set("benchmark", o.benchmark);
    own.set("ranks", o.ranks).set("save-base", !o.save_base.empty()).set("dump-data", !o.dump_data.empty());
    own.set("program", train_llama_version);
    return same_as_rank_0(run, own, "start all ranks with the same options (`then` is rank 0's)");
}

// ---------------------------------------------------------------------------------------------------------------------
// during the run

// The signal that any rank has got; all ranks call this at the same places.
inline int stop_poll(Run& run, int own) {
    const std::vector<int> all = all_of_ranks(run, own);
    run.stop = std::max(run.stop, *std::max_element(all.begin(), all.end()));
    return run.stop;
}

// Every rank has made the same updates from the same sums: a rank whose adapter differs in a bit from that of most has
// a fault of memory, card or network.
inline Error drift_check(const Run& run, uint64_t own) {
    if (ranks_of(run) == nullptr) {
        return {};
    }
    const std::vector<uint64_t> all = all_of_ranks(run, own);
    size_t most = 0;
    uint64_t usual = all[0];
    for (uint64_t sum : all) {
        const size_t n = size_t(std::count(all.begin(), all.end(), sum));
        usual = n > most ? sum : usual;
        most = std::max(most, n);
    }
    std::string others;
    for (int r = 0; r < run.comm.size; r++) {
        const bool odd = all[r] != usual || 2 * most <= all.size();  // of two, who is right?
        others += !odd ? "" : (others.empty() ? "" : ", ") + std::to_string(r);
    }
    if (others.empty()) {
        return {};
    }
    return runtime_failure(
               "after step %lld the adapter of rank %s differs from that of the other ranks: a fault of its "
               "memory, card or network",
               (long long)run.step, others.c_str())
        .hinted("the checkpoints before this step are good: leave that machine out and " + run.program +
                " --resume -o " + run.dir);
}

// ---------------------------------------------------------------------------------------------------------------------
// the run directory, as rank 0 sees it

// Copies what rank 0 found to all: directory, settings of an earlier run (the text of run.json, "" when there is none),
// checkpoint and its adapter's form.
inline Error directory_share(Run& run, std::string* settings) {
    if (ranks_of(run) == nullptr) {
        return {};
    }
    run.dir = text_of_rank_0(run, run.dir);
    *settings = text_of_rank_0(run, *settings);
    run.checkpoint.step = of_rank_0(run, run.checkpoint.step);
    run.checkpoint.path = text_of_rank_0(run, run.checkpoint.path);
    run.checkpoint_lora = of_rank_0(run, run.checkpoint_lora);
    const std::string state = text_of_rank_0(run, json_write(run.checkpoint.state));
    return run.comm.rank == 0 ? Error() : json_parse(run.checkpoint.state, state.data(), state.size(), "state.json");
}
