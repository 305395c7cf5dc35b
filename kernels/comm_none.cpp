// comm.h for a program that is built without MPI: one rank. See comm_mpi.cpp for many.
#include <cstdio>
#include <cstring>

#include <unistd.h>

#include "kernels/comm.h"
#include "kernels/launcher.h"

struct CommState {};  // one task goes the way of many ranks, alone

static CommState one_task;

bool comm_is_built() {
    return false;
}

// Tasks that know nothing of each other would be as many copies of the same training.
std::string comm_open(Comm& comm) {
    comm = {};
    Launcher launcher = launcher_find();
    if (launcher.tasks <= 1) {
        comm.state = launcher.variable != nullptr ? &one_task : nullptr;
        return "";
    }
    return "started by a launcher with " + std::to_string(launcher.tasks) + " tasks (" + launcher.variable +
           "), but this program is built without MPI; install it (apt install libopenmpi-dev openmpi-bin, dnf install "
           "openmpi-devel, conda install openmpi), make again, and the line `MPI` of the build must show a tick";
}

void comm_close(Comm& comm) {
    comm = {};
}

void comm_abort(const Comm&, int status) {
    fflush(nullptr);
    _exit(status);
}

int comm_threads(const Comm&) {
    return 0;
}

std::string comm_host(const Comm&) {
    return host_name();
}

void comm_barrier(const Comm&) {}
void comm_broadcast(const Comm&, void*, size_t, int) {}

void comm_all_gather(const Comm&, void* out, const void* mine, size_t bytes) {
    if (bytes > 0) {
        memcpy(out, mine, bytes);
    }
}

std::vector<std::string> comm_all_gather_text(const Comm&, const std::string& mine) {
    return {mine};
}

std::vector<std::string> comm_gather_text(const Comm&, const std::string& mine) {
    return {mine};
}

bool comm_ended(const Comm&, int code, double, std::vector<int>& codes) {
    codes = {code};
    return true;
}

void comm_sum(const Comm&, float*, size_t) {}
void comm_sum(const Comm&, double*, size_t) {}

void comm_gather_start(const Comm& comm, int, void* out, const void* slice, size_t bytes) {
    comm_all_gather(comm, out, slice, bytes);
}
void comm_gather_wait(const Comm&, int) {}

void comm_exchange(const Comm&, const void* mine, void* const* from, size_t bytes) {
    if (mine != nullptr && from[0] != nullptr && bytes > 0) {
        memcpy(from[0], mine, bytes);
    }
}
