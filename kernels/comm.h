// Ranks: the processes that mpirun or srun started for one training, one a GPU or a group of cores. This file owns what
// they say to each other: on the host through MPI, and for tensors the overloads on the device, MPI for the CPU and
// NCCL between GPUs (comm_nccl.cuh). A program that no launcher started is one rank; nothing is opened then, and every
// function here does at once what it would do for one.
//
// All ranks call the same functions in the same order with the same sizes. Sums are made in the order of the ranks, so
// that the same number of ranks always gives the same bits:
//
//   x_0 + x_1 + ... + x_{R-1}      rank r adds the r-th part of x and sends the result to all
//
// Two files define the host's part: comm_mpi.cpp, or comm_none.cpp where there is no MPI.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/device.h"

struct CommState;  // comm_mpi.cpp: communicators, requests, buffers

struct Comm {
    int rank = 0, size = 1;
    int local_rank = 0, local_size = 1;  // among the ranks of this machine
    CommState* state = nullptr;          // nullptr: no launcher, nothing to close
};

// ----------------------------------------------------------------------------
// the host's part

// Whether this program was built with MPI.
bool comm_is_built();
// Joins the other tasks of the launcher, if one started this process (also with a single task). "" or why that fails:
// built without MPI, or an MPI that does not see the launcher's other tasks (what to do is part of the text).
std::string comm_open(Comm& comm);
void comm_close(Comm& comm);
// Ends every rank with this exit status, now.
[[noreturn]] void comm_abort(const Comm& comm, int status);
// How many threads this rank should use: the cores it may run on, shared fairly with the other ranks that may run on
// them, at least 1; 0 (the device's own default) for one rank.
int comm_threads(const Comm& comm);
std::string comm_host(const Comm& comm);  // this machine's name

void comm_barrier(const Comm& comm);
void comm_broadcast(const Comm& comm, void* p, size_t bytes, int root);
// out (size, bytes) = every rank's `mine`, in the order of the ranks.
void comm_all_gather(const Comm& comm, void* out, const void* mine, size_t bytes);
// The same of texts of different lengths (each under 2 GB).
std::vector<std::string> comm_all_gather_text(const Comm& comm, const std::string& mine);
// Texts to rank 0 alone; empty elsewhere.
std::vector<std::string> comm_gather_text(const Comm& comm, const std::string& mine);

// The way out of a program. True: every rank called this within `seconds` of this call (< 0: wait as long as it takes),
// and codes holds what each gave. False: some are still somewhere else; a later call goes on waiting, with this code.
bool comm_ended(const Comm& comm, int code, double seconds, std::vector<int>& codes);

// x (n) = its sum over the ranks, in the order of the ranks.
void comm_sum(const Comm& comm, float* x, size_t n);
void comm_sum(const Comm& comm, double* x, size_t n);

// out (size, bytes) = every rank's slice, begun now and whole after comm_gather_wait. Two may be under way, number 0
// and 1.
void comm_gather_start(const Comm& comm, int number, void* out, const void* slice, size_t bytes);
void comm_gather_wait(const Comm& comm, int number);

// Piece s (of `bytes`) of `mine` goes to rank s; from[r] (bytes) = the piece that rank r sent here. mine = nullptr:
// this rank sends nothing; from[r] = nullptr: rank r sends nothing.
void comm_exchange(const Comm& comm, const void* mine, void* const* from, size_t bytes);

// ----------------------------------------------------------------------------
// tensors of a device. dev.comm is the ranks; nullptr: one process, and nothing is done.

// Once, before the device's memory is taken. "" or why it fails. comm must outlive the device.
template <class X>
std::string comm_attach(Cpu<X>& dev, const Comm& comm) {
    dev.comm = comm.state != nullptr ? &comm : nullptr;
    return "";
}

template <class X>
void comm_detach(Cpu<X>& dev) {
    dev.comm = nullptr;
}
// What comm_attach takes of the device's memory, at most, for so many ranks in all and on a machine; none for 0.
template <class X>
size_t comm_device_bytes(const Cpu<X>&, int, int) {
    return 0;
}

// x (n) = its sum over the ranks. Begun now, where the device can do it beside other work; x may be read by what is
// queued after comm_sum_finish.
template <class X>
void comm_sum_begin(Cpu<X>& dev, typename Cpu<X>::real* x, size_t n) {
    if (dev.comm != nullptr) {
        comm_sum(*dev.comm, x, n);
    }
}
template <class X>
void comm_sum_finish(Cpu<X>&) {}
// Elements that are worth a call. CPU: the ranks wait for each other in it, so once is best.
template <class X>
size_t comm_sum_least(const Cpu<X>&) {
    return SIZE_MAX;
}

// out (size, bytes) = every rank's slice of `bytes`. comm_gather_begin waits for the work queued so far, which may
// still read out, and runs beside what is queued later; comm_gather_finish: what is queued from now on sees out whole.
// number: 0 or 1, one gather under way for each.
template <class X>
void comm_gather_begin(Cpu<X>& dev, int number, void* out, const void* slice, size_t bytes) {
    comm_gather_start(*dev.comm, number, out, slice, bytes);
}
template <class X>
void comm_gather_finish(Cpu<X>& dev, int number) {
    comm_gather_wait(*dev.comm, number);
}

// While the base is read: device memory p (bytes) of rank root to all, and comm_exchange of device memory. Done when
// they return.
template <class X>
void comm_broadcast_device(Cpu<X>& dev, void* p, size_t bytes, int root) {
    comm_broadcast(*dev.comm, p, bytes, root);
}
template <class X>
void comm_exchange_device(Cpu<X>& dev, const void* mine, void* const* from, size_t bytes) {
    comm_exchange(*dev.comm, mine, from, bytes);
}
