// Tests on many ranks. An outer test, in a plain process, starts a command with n of them; an inner test, in a group
// whose name begins with `ranks_`, runs in each of them, all at the same time, and speaks through test_comm.
#pragma once
#include <cstdlib>
#include <string>

#include "dev/tests/test.h"
#include "kernels/comm.h"

// The ranks of this test program: one, unless a launcher started it. main opens and closes it. (comm.cpp)
extern Comm test_comm;

// mpirun of the MPI that this program is built with; the environment variable TRAIN_LLAMA_MPIRUN names another.
// (comm.cpp)
std::string mpirun();
// The path of this test program, for a shell. (comm.cpp)
std::string this_program();

// For a command that starts MPI, A=1 B=2. Settings are the environment's, since mpiruns agree on no option but -n: Open
// MPI 4 reads OMPI_*, 5 also PRTE_*. It may run as root, on fewer cores than ranks, which it then does not tie to cores
// and which yield while they wait; copies from one process to another by the kernel are not allowed in every container.
// MPI holds memory when a program ends, which the address sanitizer takes for leaks.
inline std::string ranks_environment() {
    const char* asan = getenv("ASAN_OPTIONS");
    return std::string("OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 ") +
           "OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none "
           "OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_btl_vader_single_copy_mechanism=none "
           "PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none "
           "OMP_NUM_THREADS=1 ASAN_OPTIONS='" +
           (asan != nullptr ? asan + std::string(":") : "") + "detect_leaks=0' ";
}

// Runs the command on n ranks, stdout and stderr of all in *output; returns mpirun's exit status. environment: A=1 B=2,
// for the ranks. A job that hangs is ended after `seconds`, with status 124 (or 137 when it does not want to).
inline int run_ranks(std::string* output, int n, const std::string& command, const std::string& environment = "",
                     int seconds = 50) {
    return run_command(output, ranks_environment() + environment + " timeout -k 5 " + std::to_string(seconds) + " " +
                                   mpirun() + " -n " + std::to_string(n) + " " + command + " </dev/null");
}

// The running test can start ranks; else it is skipped, by name, and the test returns.
inline bool ranks_can_start() {
    if (!comm_is_built()) {
        return test_skip("built without MPI"), false;
    }
    if (run_command(nullptr, "command -v " + mpirun()) != 0) {
        return test_skip("no mpirun"), false;
    }
    static const int started = run_ranks(nullptr, 2, "true");  // what is tested is not mpirun
    if (started != 0) {
        return test_skip("mpirun does not start two tasks on this machine"), false;
    }
    return true;
}

// This very program, on n ranks, with the inner tests whose names have the part in them: all of them pass.
inline void check_inner(int n, const std::string& part, const std::string& environment = "", int seconds = 50) {
    if (!ranks_can_start()) {
        return;
    }
    std::string out;
    int code = run_ranks(&out, n, this_program() + " " + part, environment, seconds);
    CHECK(code == 0 && text_has(out, " passed, 0 failed, 0 skipped") && !text_has("\n" + out, "\n0 passed"),
          "%s on %d ranks: exit %d:\n%s", part.c_str(), n, code, out.c_str());
}
