// How and where this process was started, for comm_mpi.cpp and comm_none.cpp: what the environment says of launchers.
//
//   mpirun of Open MPI          OMPI_COMM_WORLD_SIZE, PMIX_RANK
//   mpirun of MPICH, Intel MPI  PMI_SIZE, PMI_RANK            (and Flux, PALS, srun --mpi=pmi2)
//   prterun, srun --mpi=pmix    PMIX_RANK
//   srun                        SLURM_STEP_NUM_TASKS, whatever --mpi is
//   none                        TRAIN_LLAMA_ONE_RANK: one rank that goes the way of many, for tests
//
// The script of sbatch and the shell of salloc hold SLURM_NTASKS, which is what may be started, and at most a step of
// one task: they are no launcher.
#pragma once
#include <cstdlib>
#include <string>

#include <unistd.h>

struct Launcher {
    const char* variable = nullptr;  // nullptr: nobody's task
    long tasks = 1;                  // at least so many
};

inline Launcher launcher_find() {
    // mpirun before Slurm: on other machines its tasks are started by a step of Slurm with a task a machine.
    for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"}) {
        const char* value = getenv(name);
        long tasks = value != nullptr ? atol(value) : 0;
        if (tasks > 1 || (tasks == 1 && name[0] != 'S')) {
            return {name, tasks};
        }
    }
    for (const char* name : {"PMI_RANK", "PMIX_RANK"}) {
        const char* value = getenv(name);
        if (value != nullptr) {
            return {name, atol(value) + 1};
        }
    }
    const char* one = "TRAIN_LLAMA_ONE_RANK";
    return {getenv(one) != nullptr ? one : nullptr, 1};
}

// A rank's fair share of the processors that it may run on, in whole ones, at least 1: each is shared by all ranks of
// the machine that may run on it. masks (size, bytes): bit i % 8 of byte i / 8 is processor i.
inline int fair_share(const unsigned char* masks, size_t bytes, int rank, int size) {
    const unsigned char* own = masks + size_t(rank) * bytes;
    double share = 0;
    for (size_t cpu = 0; cpu < 8 * bytes; cpu++) {
        int users = 0;
        for (int r = 0; r < size && (own[cpu / 8] >> cpu % 8 & 1) != 0; r++) {
            users += masks[size_t(r) * bytes + cpu / 8] >> cpu % 8 & 1;
        }
        share += users > 0 ? 1.0 / users : 0;
    }
    return share < 1 ? 1 : int(share + 1e-6);  // three thirds are one
}

inline std::string host_name() {
    char name[256] = "";
    gethostname(name, sizeof name - 1);
    return name;
}
