// What the ranks of one training agree on: errors, signals, where the run directory is and what it holds, that their
// adapters are still the same. The bytes between them are kernels/comm.h's; which rank trains on what is
// train_step.h's.
//
// Rank 0 alone reads and writes the run directory. An error of any rank ends all: those that meet in ranks_agree leave
// together; one that the others do not meet ends them after two seconds (ranks_end).
#pragma once
#include "train_run.h"

inline const Comm* ranks_of(const Run& run) {
    return run.comm.state != nullptr ? &run.comm : nullptr;
}

// As comm_agree: the same outcome on all ranks.
inline Error ranks_agree(const Run& run, const Error& mine) {
    return comm_agree(ranks_of(run), mine);
}

// fn() on rank 0; its error, if it has one, on all.
template <class Fn>
Error on_rank_0(const Run& run, const Fn& fn) {
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
    const int speaks = 1 << 16;
    std::vector<int> ends = {e.code | (e.what.empty() ? 0 : speaks)};
    if (!alone && !comm_ended(run.comm, ends[0], e ? 2 : -1, ends)) {
        Error named = e;
        named.what = text_format("rank %d of %d (%s): %s", run.comm.rank, run.comm.size, comm_host(run.comm).c_str(),
                                 e.what.empty() ? "ended because another rank did" : e.what.c_str());
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
            said.what =
                text_format("rank %d of %d (%s): ", speaker, run.comm.size, comm_host(run.comm).c_str()) + e.what;
        }
        if (stopped) {
            console_fact(run.console, "%s", said.what.c_str());
            console_fact(run.console, "%s", said.hint.c_str());
        } else {
            error_print(said);
        }
    }
    if (status != 0 &&
        !alone) {  // careful: a launcher that was told to end its ranks may never let MPI_Finalize return
        fflush(nullptr);
        _exit(status);
    }
    comm_close(run.comm);
    return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// during the run

// The signal that any rank has got; all ranks call this at the same places.
inline int stop_poll(Run& run, int own) {
    std::vector<int> all = {own};
    if (ranks_of(run) != nullptr) {
        all.resize(run.comm.size);
        comm_all_gather(run.comm, all.data(), &own, sizeof(own));
    }
    run.stop = std::max(run.stop, *std::max_element(all.begin(), all.end()));
    return run.stop;
}

// Every rank has made the same updates from the same sums: a rank whose adapter differs in a bit from that of most has
// a fault of memory, card or network.
inline Error drift_check(const Run& run, uint64_t own) {
    if (ranks_of(run) == nullptr) {
        return {};
    }
    std::vector<uint64_t> all(run.comm.size);
    comm_all_gather(run.comm, all.data(), &own, sizeof(own));
    size_t most = 0;
    uint64_t usual = all[0];
    for (uint64_t sum : all) {
        const size_t n = size_t(std::count(all.begin(), all.end(), sum));
        usual = n > most ? sum : usual;
        most = std::max(most, n);
    }
    std::string others;
    for (int r = 0; r < run.comm.size; r++) {
        others += all[r] == usual ? "" : (others.empty() ? "" : ", ") + std::to_string(r);
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
