// A stand-in for the part of NCCL that kernels/comm_nccl.cuh calls: the same names, and ranks that are processes under
// mpirun. An operation is queued on its stream like a kernel; when its turn comes, the ranks meet through MPI on a
// communicator of its own (nccl.cpp).
//
// What ends the program with a message: ranks that do not make the same calls in the same order, with the same counts,
// types and roots; sends without their receive; memory that is not inside one allocation of the device, or of the host;
// source and destination that overlap and are not in place; a stream that does not exist; a send outside a group.
//
// Sums are x_0 + x_1 + ... in the order of the ranks. Real rings begin with another rank for each part.
//
// On a card a collective runs once all ranks have queued it. Here its turn comes when the host of each waits for
// something, and a host that waits for another rank in MPI itself would never get there. So with MPI the calls of that
// kind which the project makes do what is queued first (nccl.cpp stands before MPI's own, through its profiling
// interface). A program should not rely on it: it waits for its device, by device_sync or device_from, before ranks
// wait for each other.
//
// Environment: SIMT_NCCL_FAILS=1: no communicator can be opened.
#pragma once
#include <cstddef>

#include "dev/simt/streams.h"

enum ncclResult_t { ncclSuccess = 0, ncclSystemError = 2, ncclInvalidUsage = 5 };
enum ncclDataType_t { ncclUint8 = 1, ncclFloat32 = 7 };
enum ncclRedOp_t { ncclSum = 0 };

struct ncclUniqueId {
    char internal[128];
};
struct ncclComm;
using ncclComm_t = ncclComm*;
struct ncclConfig_t {
    int maxCTAs;
};
#define NCCL_CONFIG_INITIALIZER \
    { 0 }

const char* ncclGetErrorString(ncclResult_t e);
const char* ncclGetLastError(ncclComm_t comm);
ncclResult_t ncclGetUniqueId(ncclUniqueId* id);
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t* config);
ncclResult_t ncclCommDestroy(ncclComm_t comm);
ncclResult_t ncclCommAbort(ncclComm_t comm);
ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream);
ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream);
ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int rank, ncclComm_t comm,
                      cudaStream_t stream);
ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int rank, ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclGroupStart();
ncclResult_t ncclGroupEnd();
