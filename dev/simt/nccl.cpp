// The stand-in for NCCL (nccl.h): what its operations do when their turn on a stream comes.
//
// HAVE_MPI 0: this program has no MPI, and a communicator has one rank.
#include "dev/simt/nccl.h"

#include <unistd.h>

#include <algorithm>

#include "dev/simt/memory.h"

#if HAVE_MPI
#include <mpi.h>
#endif

struct ncclComm {
    int rank = 0, size = 1;
    uint64_t calls = 0;     // whose turn has come
    bool given_up = false;  // ncclCommAbort: what is still queued does nothing
#if HAVE_MPI
    MPI_Comm ranks = MPI_COMM_NULL;  // MPI_COMM_NULL: this process alone
#endif
};

namespace simt {

// A send or a receive of a group.
struct Message {
    bool is_send;
    char* p;
    size_t bytes;
    int peer;
};
struct Group {
    int depth = 0;
    std::vector<Message> messages;
    ncclComm* comm = nullptr;
    CUstream_st* stream = nullptr;
};
static Group group;

// ----------------------------------------------------------------------------
// between ranks

// all (size, bytes) = every rank's mine.
static void gather(const ncclComm& c, void* all, const void* mine, size_t bytes) {
#if HAVE_MPI
    if (c.ranks != MPI_COMM_NULL) {
        PMPI_Allgather(mine, int(bytes), MPI_BYTE, all, int(bytes), MPI_BYTE, c.ranks);
        return;
    }
#endif
    (void)c;
    memcpy(all, mine, bytes);
}

// Every send finds its receive, of as many bytes, in the order in which both sides have them.
static void exchange(const ncclComm& c, const std::vector<Message>& messages) {
    const size_t R = size_t(c.size);
    std::vector<uint64_t> mine(2 * R), all(2 * R * R);  // to each rank, and from each: messages and bytes in one number
    for (const Message& m : messages) {
        uint64_t& sum = mine[(m.is_send ? 0 : R) + size_t(m.peer)];
        sum = mix(sum + 1 + m.bytes);
    }
    gather(c, all.data(), mine.data(), mine.size() * sizeof(uint64_t));
    for (size_t from = 0; from < R; from++) {
        for (size_t to = 0; to < R; to++) {
            if (all[2 * R * from + to] != all[2 * R * to + R + from]) {
                fault("NCCL: what rank %zu sends to rank %zu is not what that receives", from, to);
            }
        }
    }
    std::vector<const Message*> to_self;
    for (const Message& m : messages) {
        if (m.peer == c.rank && m.is_send) {
            to_self.push_back(&m);
        }
    }
    size_t next = 0;
    for (const Message& m : messages) {
        if (m.peer == c.rank && !m.is_send) {
            memmove(m.p, to_self[next++]->p, m.bytes);
        }
    }
#if HAVE_MPI
    std::vector<MPI_Request> requests;
    for (const Message& m : messages) {
        if (m.peer != c.rank) {
            requests.emplace_back();
            m.is_send ? PMPI_Isend(m.p, int(m.bytes), MPI_BYTE, m.peer, 0, c.ranks, &requests.back())
                      : PMPI_Irecv(m.p, int(m.bytes), MPI_BYTE, m.peer, 0, c.ranks, &requests.back());
        }
    }
    if (!requests.empty()) {  // without others there may be no MPI
        PMPI_Waitall(int(requests.size()), requests.data(), MPI_STATUSES_IGNORE);
    }
#endif
}

// ----------------------------------------------------------------------------
// what the library would punish

static size_t type_bytes(ncclDataType_t type) {
    return type == ncclFloat32 ? 4 : 1;
}

static void check_side(const char* call, const char* side, const void* p, size_t bytes) {
    const Piece* piece = memory_find(p, bytes);
    if (bytes > 0 && (!piece || piece->on_host)) {
        fault("%s: the %s, %zu bytes at %p, is not inside one allocation of the device", call, side, bytes, p);
    }
}

// in_place: where the source stands in the destination when it may.
static void check_sides(const char* call, const void* from, size_t from_bytes, const void* to, size_t to_bytes,
                        size_t in_place) {
    check_side(call, "source", from, from_bytes);
    check_side(call, "destination", to, to_bytes);
    const char *a = static_cast<const char*>(from), *b = static_cast<const char*>(to);
    if (a != b + in_place && a < b + to_bytes && b < a + from_bytes) {
        fault("%s: source %p and destination %p overlap and are not in place", call, from, to);
    }
}

struct Call {
    const char* name;
    int kind, type, detail;  // detail: root or operation
    uint64_t count, number;
};

// All ranks are in the same call.
static void meet(ncclComm& c, Call call) {
    call.number = c.calls++;
    std::vector<Call> all(static_cast<size_t>(c.size));
    gather(c, all.data(), &call, sizeof call);
    for (int r = 0; r < c.size; r++) {
        const Call& other = all[size_t(r)];
        if (other.kind != call.kind || other.type != call.type || other.detail != call.detail ||
            other.count != call.count || other.number != call.number) {
            static const char* const names[] = {"ncclAllReduce", "ncclAllGather", "ncclBroadcast", "a group"};
            fault(
                "NCCL: ranks differ in their call %llu: rank %d is in %s (type %d, count %llu, root or operation %d), "
                "rank %d in %s (type %d, count %llu, root or operation %d)",
                static_cast<unsigned long long>(call.number), c.rank, names[call.kind], call.type,
                static_cast<unsigned long long>(call.count), call.detail, r, names[other.kind], other.type,
                static_cast<unsigned long long>(other.count), other.detail);
        }
    }
}

template <class Fn>
static ncclResult_t queue(ncclComm* c, CUstream_st* stream, const Call& call, const Fn& fn) {
    if (group.depth > 0) {
        fault("%s inside a group: the stand-in has groups of sends and receives only", call.name);
    }
    enqueue(stream, [c, call, fn]() {
        if (!c->given_up) {
            meet(*c, call);
            fn(*c);
        }
    });
    return ncclSuccess;
}

static ncclResult_t add_message(const char* call, bool is_send, char* p, size_t bytes, int peer, ncclComm* comm,
                                CUstream_st* stream) {
    if (group.depth == 0) {
        fault("%s outside a group: with its receive on the other side it would wait for ever", call);
    }
    if (peer < 0 || peer >= comm->size || bytes > 0x7fffffff) {
        fault("%s: %zu bytes, rank %d; the stand-in has ranks 0 to %d and takes less than 2 GB", call, bytes, peer,
              comm->size - 1);
    }
    if (!group.messages.empty() && (group.comm != comm || group.stream != stream)) {
        fault("%s: the stand-in has one communicator and one stream a group", call);
    }
    check_side(call, is_send ? "source" : "destination", p, bytes);
    group.comm = comm;
    group.stream = stream;
    group.messages.push_back({is_send, p, bytes, peer});
    return ncclSuccess;
}

}  // namespace simt

// ----------------------------------------------------------------------------
// the library's calls

const char* ncclGetErrorString(ncclResult_t e) {
    return e == ncclSuccess ? "no error" : e == ncclInvalidUsage ? "invalid usage" : "unhandled system error";
}
const char* ncclGetLastError(ncclComm_t) {
    return "";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "%d", int(getpid()));
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t* config) {
    if (getenv("SIMT_NCCL_FAILS")) {
        return ncclSystemError;
    }
    ncclComm c;
#if HAVE_MPI
    int started = 0;
    MPI_Initialized(&started);
    if (started) {
        PMPI_Comm_split(MPI_COMM_WORLD, 0, rank, &c.ranks);
        PMPI_Comm_size(c.ranks, &c.size);
        PMPI_Comm_rank(c.ranks, &c.rank);
    }
#endif
    if (c.size != ranks || c.rank != rank || config->maxCTAs < 1) {
        simt::fault("ncclCommInitRankConfig: rank %d of %d with %d channels, but MPI has rank %d of %d", rank, ranks,
                    config->maxCTAs, c.rank, c.size);
    }
    std::vector<ncclUniqueId> ids(static_cast<size_t>(ranks));
    simt::gather(c, ids.data(), &id, sizeof id);
    for (const ncclUniqueId& other : ids) {
        if (memcmp(&other, &id, sizeof id) != 0) {
            simt::fault("ncclCommInitRankConfig: ranks with different unique ids");
        }
    }
    *comm = new ncclComm(c);
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    simt::streams_finish(false);
#if HAVE_MPI
    if (comm->ranks != MPI_COMM_NULL) {
        PMPI_Comm_free(&comm->ranks);
    }
#endif
    delete comm;
    return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
    comm->given_up = true;
    simt::streams_finish(false);
    delete comm;  // and not MPI's communicator, which all ranks would have to free together
    return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
    simt::check_sides("ncclAllReduce", from, count * 4, to, count * 4, 0);
    if (type != ncclFloat32 || op != ncclSum) {
        simt::fault("ncclAllReduce: the stand-in has sums of floats only");
    }
    return simt::queue(comm, stream, {"ncclAllReduce", 0, type, op, count, 0}, [=](const ncclComm& c) {
        const size_t chunk = 65536;
        std::vector<float> all(size_t(c.size) * std::min(count, chunk));
        for (size_t at = 0; at < count; at += chunk) {
            const size_t n = std::min(count - at, chunk);
            simt::gather(c, all.data(), static_cast<const float*>(from) + at, n * sizeof(float));
            for (size_t i = 0; i < n; i++) {
                float sum = all[i];
                for (size_t r = 1; r < size_t(c.size); r++) {
                    sum += all[r * n + i];
                }
                static_cast<float*>(to)[at + i] = sum;
            }
        }
    });
}

ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    const size_t bytes = count * simt::type_bytes(type), R = size_t(comm->size);
    simt::check_sides("ncclAllGather", from, bytes, to, bytes * R, size_t(comm->rank) * bytes);
    return simt::queue(comm, stream, {"ncclAllGather", 1, type, 0, count, 0}, [=](const ncclComm& c) {
        const size_t chunk = 1 << 20;
        std::vector<char> all(R * std::min(bytes, chunk));
        for (size_t at = 0; at < bytes; at += chunk) {
            const size_t n = std::min(bytes - at, chunk);
            simt::gather(c, all.data(), static_cast<const char*>(from) + at, n);
            for (size_t r = 0; r < R; r++) {
                memcpy(static_cast<char*>(to) + r * bytes + at, all.data() + r * n, n);
            }
        }
    });
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
    const size_t bytes = count * simt::type_bytes(type);
    simt::check_sides("ncclBroadcast", comm->rank == root ? from : to, bytes, to, bytes, 0);
    if (root < 0 || root >= comm->size) {
        simt::fault("ncclBroadcast: root %d of %d ranks", root, comm->size);
    }
    return simt::queue(comm, stream, {"ncclBroadcast", 2, type, root, count, 0}, [=](const ncclComm& c) {
        if (c.rank == root) {
            memmove(to, from, bytes);
        }
#if HAVE_MPI
        const size_t chunk = 1 << 30;
        for (size_t at = 0; at < bytes && c.ranks != MPI_COMM_NULL; at += chunk) {
            PMPI_Bcast(static_cast<char*>(to) + at, int(std::min(bytes - at, chunk)), MPI_BYTE, root, c.ranks);
        }
#endif
    });
}

ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int rank, ncclComm_t comm,
                      cudaStream_t stream) {
    return simt::add_message("ncclSend", true, static_cast<char*>(const_cast<void*>(from)),
                             count * simt::type_bytes(type), rank, comm, stream);
}
ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int rank, ncclComm_t comm, cudaStream_t stream) {
    return simt::add_message("ncclRecv", false, static_cast<char*>(to), count * simt::type_bytes(type), rank, comm,
                             stream);
}

ncclResult_t ncclGroupStart() {
    simt::group.depth++;
    return ncclSuccess;
}
// The library pairs sends with receives; ranks that take no part may be elsewhere. Here all take part, unless none
// does.
ncclResult_t ncclGroupEnd() {
    if (simt::group.depth == 0) {
        return ncclInvalidUsage;
    }
    if (--simt::group.depth > 0 || simt::group.messages.empty()) {
        return ncclSuccess;
    }
    const simt::Group whole = simt::group;
    simt::group = simt::Group();
    return simt::queue(whole.comm, whole.stream, {"a group", 3, 0, 0, 0, 0},
                       [whole](const ncclComm& c) { simt::exchange(c, whole.messages); });
}

// ----------------------------------------------------------------------------
// before the host waits for other ranks, what was queued has its turn. MPI_Test and its like do not wait.

#if HAVE_MPI
int MPI_Barrier(MPI_Comm ranks) {
    simt::streams_finish(false);
    return PMPI_Barrier(ranks);
}
int MPI_Bcast(void* p, int count, MPI_Datatype type, int root, MPI_Comm ranks) {
    simt::streams_finish(false);
    return PMPI_Bcast(p, count, type, root, ranks);
}
int MPI_Allgather(const void* from, int from_count, MPI_Datatype from_type, void* to, int to_count,
                  MPI_Datatype to_type, MPI_Comm ranks) {
    simt::streams_finish(false);
    return PMPI_Allgather(from, from_count, from_type, to, to_count, to_type, ranks);
}
int MPI_Allgatherv(const void* from, int from_count, MPI_Datatype from_type, void* to, const int* counts,
                   const int* offsets, MPI_Datatype to_type, MPI_Comm ranks) {
    simt::streams_finish(false);
    return PMPI_Allgatherv(from, from_count, from_type, to, counts, offsets, to_type, ranks);
}
int MPI_Alltoallv(const void* from, const int* from_counts, const int* from_offsets, MPI_Datatype from_type, void* to,
                  const int* to_counts, const int* to_offsets, MPI_Datatype to_type, MPI_Comm ranks) {
    simt::streams_finish(false);
    return PMPI_Alltoallv(from, from_counts, from_offsets, from_type, to, to_counts, to_offsets, to_type, ranks);
}
int MPI_Waitall(int count, MPI_Request* requests, MPI_Status* statuses) {
    simt::streams_finish(false);
    return PMPI_Waitall(count, requests, statuses);
}
#endif
