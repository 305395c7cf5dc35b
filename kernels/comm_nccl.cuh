// Tensors over ranks on GPUs, through NCCL: one communicator over all ranks of comm.h, and one stream for it, beside
// which the device's own two go on.
//
//   dev.stream  ... reads buffer 0 | B |  reads buffer 1 ...         | F | reads buffer 0 ...
//   aside       ... reads buffer 0 | B |  reads buffer 1 ...         | F | dequantises buffer 0 ...
//   comm                               | all-gather into buffer 0 |
//
// B: comm_gather_begin, comm waits for what both streams were given so far. F: comm_gather_finish, both wait for comm.
// A prefetched group may never be used, and then nothing on dev.stream has waited for its reading aside: so comm waits
// for both.
//
// Bits: NCCL's documentation promises nothing. By what its makers say (NVIDIA/nccl issues 855, 1497) all ranks always
// get the same sum, and a ring adds in an order that follows from the topology: the same ranks on the same machines,
// the same NCCL and the same n give the same bits. Additions in the switch (NVLS) do not, with some drivers. So rings
// alone are used, unless the environment says otherwise; for sums as long as these nothing is faster, and one
// algorithm's buffers are enough. Ranks placed otherwise are another ring and other last bits.
#pragma once
#include <algorithm>
#include <fstream>

#include "kernels/comm.h"
#include "kernels/device.cuh"

// Blocks of NCCL's kernels: each takes a multiprocessor from the work beside it, and carries some 20 GB/s over NVLink.
constexpr int NCCL_CHANNELS = 8;
constexpr int NCCL_PEER_CHANNELS = 4;  // of a send or a receive, each with buffers for each other rank

struct GpuComm {
    ncclComm_t nccl = nullptr;
    cudaStream_t stream = nullptr;
    cudaEvent_t asked = nullptr, asked_aside = nullptr;  // what comm waits for
    cudaEvent_t summed = nullptr, gathered[2] = {};      // what waits for comm
};

inline std::string nccl_text(const char* call, ncclResult_t e, ncclComm_t nccl) {
    const char* const detail = ncclGetLastError(nccl);
    const std::string more = detail && *detail ? std::string(" (") + detail + ")" : "";
    return std::string("NCCL: ") + call + ": " + ncclGetErrorString(e) + more;
}

// "ncclAllReduce(x, ...)" is said by the name of the call alone.
inline void nccl_check(ncclResult_t e, ncclComm_t nccl, const char* call, const char* file, int line) {
    if (e != ncclSuccess) {
        const std::string name(call, std::find(call, call + strlen(call), '('));
        fprintf(stderr, "error: %s (%s:%d)\n", nccl_text(name.c_str(), e, nccl).c_str(), file, line);
        fprintf(stderr, "hint: NCCL_DEBUG=INFO in the environment shows what NCCL does; see what other ranks say\n");
        exit(1);
    }
}
#define NCCL_CHECK(nccl, call) nccl_check(call, nccl, #call, __FILE__, __LINE__)

// ----------------------------------------------------------------------------
// opening

// This machine, until it is started again. The names of machines are not always different.
inline std::string comm_machine(const Comm& comm) {
    std::string id;
    std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
    return comm_host(comm) + " " + id;
}

// Why two ranks would use one card, the same text on each, or "". NCCL refuses that, or hangs.
inline std::string comm_shared_card(const Comm& comm) {
    int number = 0, count = 0;
    char bus[32] = "";
    CUDA_CHECK(cudaGetDevice(&number));
    CUDA_CHECK(cudaGetDeviceCount(&count));
    CUDA_CHECK(cudaDeviceGetPCIBusId(bus, sizeof bus, number));
    const std::vector<std::string> cards = comm_all_gather_text(comm, comm_machine(comm) + " " + bus);
    const std::vector<std::string> names = comm_all_gather_text(
        comm, "GPU " + std::to_string(number) + " (" + bus + ") of " + comm_host(comm) +
                  ": start one rank a GPU there (mpirun -n " + std::to_string(count) + "), or train with --device cpu");
    for (size_t second = 1; second < cards.size(); second++) {
        const size_t first = size_t(std::find(cards.begin(), cards.end(), cards[second]) - cards.begin());
        if (first < second) {
            return "ranks " + std::to_string(first) + " and " + std::to_string(second) + " both use " + names[first];
        }
    }
    return "";
}

inline std::string nccl_open(ncclComm_t* nccl, const Comm& comm) {
    setenv("NCCL_ALGO", "Ring", 0);
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    setenv("NCCL_MAX_P2P_NCHANNELS", std::to_string(NCCL_PEER_CHANNELS).c_str(), 0);
    // Rank 0 hands its result on as well: where it has no id, none of the others waits for it in NCCL.
    struct {
        ncclUniqueId id;
        ncclResult_t result;
    } made = {};
    const char* call = "ncclGetUniqueId";
    made.result = comm.rank == 0 ? ncclGetUniqueId(&made.id) : ncclSuccess;
    comm_broadcast(comm, &made, sizeof made, 0);
    ncclResult_t e = made.result;
    if (e == ncclSuccess) {
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        config.maxCTAs = NCCL_CHANNELS;
        call = "ncclCommInitRankConfig";
        e = ncclCommInitRankConfig(nccl, comm.size, made.id, comm.rank, &config);
    }
    return e == ncclSuccess ? "" : nccl_text(call, e, nullptr) + "; NCCL_DEBUG=INFO in the environment shows why";
}

template <class X>
std::string comm_attach(Gpu<X>& dev, const Comm& comm) {
    if (comm.state == nullptr) {
        return "";
    }
    std::string why = comm_shared_card(comm);
    ncclComm_t nccl = nullptr;
    why = why.empty() ? nccl_open(&nccl, comm) : why;
    if (!why.empty()) {
        return why;
    }
    dev.comm = &comm;
    dev.ranks = new GpuComm;
    GpuComm& g = *dev.ranks;
    g.nccl = nccl;
    int least = 0, greatest = 0;  // its few blocks go first: who waits for them waits for all
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA_CHECK(cudaStreamCreateWithPriority(&g.stream, cudaStreamNonBlocking, greatest));
    for (cudaEvent_t* event : {&g.asked, &g.asked_aside, &g.summed, &g.gathered[0], &g.gathered[1]}) {
        CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    }
    return "";
}

template <class X>
void comm_close(Gpu<X>& dev) {
    GpuComm& g = *dev.ranks;
    for (cudaEvent_t event : {g.asked, g.asked_aside, g.summed, g.gathered[0], g.gathered[1]}) {
        CUDA_CHECK(cudaEventDestroy(event));
    }
    CUDA_CHECK(cudaStreamDestroy(g.stream));
    delete dev.ranks;
    dev.ranks = nullptr;
    dev.comm = nullptr;
}

template <class X>
void comm_detach(Gpu<X>& dev) {
    if (dev.ranks) {
        CUDA_CHECK(cudaStreamSynchronize(dev.ranks->stream));
        NCCL_CHECK(dev.ranks->nccl, ncclCommDestroy(dev.ranks->nccl));
        comm_close(dev);
    }
}

template <class X>
void comm_abandon(Gpu<X>& dev) {
    if (dev.ranks) {
        ncclCommAbort(dev.ranks->nccl);  // not checked: the error that led here is the one to be told
        comm_close(dev);
    }
}

// An estimate, at its high end; NCCL does not say what it will take, and takes buffers when two ranks first speak.
//   a channel of the ring: 10 MiB to receive (its three protocols' buffers), and to send 2 MiB between cards, or 10 MiB
//     where the network reads the card's memory
//   a channel to a peer: 12 MiB on the same machine, as all-to-all over eight H100 was seen to take (NVIDIA/nccl issue
//     1685); other machines share a pool, 8 MiB a channel
//   96 MiB for the code of its kernels and queues of work
template <class X>
size_t comm_device_bytes(const Gpu<X>&, int ranks, int local_ranks) {
    if (ranks == 0) {
        return 0;
    }
    const size_t peers = size_t(local_ranks) - 1, ring = ranks > 1 ? NCCL_CHANNELS * 20 : 0;
    return (96 + NCCL_PEER_CHANNELS * 8 + ring + peers * NCCL_PEER_CHANNELS * 12) << 20;
}

// ----------------------------------------------------------------------------
// sums

template <class X>
void comm_sum_begin(Gpu<X>& dev, float* x, size_t n) {
    if (!dev.ranks) {
        return;
    }
    GpuComm& g = *dev.ranks;
    CUDA_CHECK(cudaEventRecord(g.asked, dev.stream));
    CUDA_CHECK(cudaStreamWaitEvent(g.stream, g.asked, 0));
    NCCL_CHECK(g.nccl, ncclAllReduce(x, x, n, ncclFloat32, ncclSum, g.nccl, g.stream));
}

template <class X>
void comm_sum_finish(Gpu<X>& dev) {
    if (!dev.ranks) {
        return;
    }
    GpuComm& g = *dev.ranks;
    CUDA_CHECK(cudaEventRecord(g.summed, g.stream));
    CUDA_CHECK(cudaStreamWaitEvent(dev.stream, g.summed, 0));
}

// ----------------------------------------------------------------------------
// weights. Bytes are as good as wider types: NCCL only counts them, and moves 16 at a time where everything is aligned.

// What the comm stream does from now on sees, and follows, all that the device was given so far.
template <class X>
void comm_follow(Gpu<X>& dev) {
    GpuComm& g = *dev.ranks;
    CUDA_CHECK(cudaEventRecord(g.asked, dev.stream));
    CUDA_CHECK(cudaEventRecord(g.asked_aside, dev.state->aside));
    CUDA_CHECK(cudaStreamWaitEvent(g.stream, g.asked, 0));
    CUDA_CHECK(cudaStreamWaitEvent(g.stream, g.asked_aside, 0));
}

template <class X>
void comm_gather_begin(Gpu<X>& dev, int number, void* out, const void* slice, size_t bytes) {
    GpuComm& g = *dev.ranks;
    comm_follow(dev);
    NCCL_CHECK(g.nccl, ncclAllGather(slice, out, bytes, ncclUint8, g.nccl, g.stream));
    CUDA_CHECK(cudaEventRecord(g.gathered[number], g.stream));
}

template <class X>
void comm_gather_finish(Gpu<X>& dev, int number) {
    const cudaEvent_t gathered = dev.ranks->gathered[number];
    CUDA_CHECK(cudaStreamWaitEvent(dev.stream, gathered, 0));
    CUDA_CHECK(cudaStreamWaitEvent(dev.state->aside, gathered, 0));
}

template <class X>
void comm_broadcast_device(Gpu<X>& dev, void* p, size_t bytes, int root) {
    GpuComm& g = *dev.ranks;
    comm_follow(dev);
    NCCL_CHECK(g.nccl, ncclBroadcast(p, p, bytes, ncclUint8, root, g.nccl, g.stream));
    CUDA_CHECK(cudaStreamSynchronize(g.stream));
}

template <class X>
void comm_exchange_device(Gpu<X>& dev, const void* mine, void* const* from, size_t bytes) {
    GpuComm& g = *dev.ranks;
    comm_follow(dev);
    NCCL_CHECK(g.nccl, ncclGroupStart());
    for (int r = 0; r < dev.comm->size; r++) {
        if (mine) {
            NCCL_CHECK(g.nccl, ncclSend(static_cast<const char*>(mine) + size_t(r) * bytes, bytes, ncclUint8, r, g.nccl,
                                        g.stream));
        }
        if (from[r]) {
            NCCL_CHECK(g.nccl, ncclRecv(from[r], bytes, ncclUint8, r, g.nccl, g.stream));
        }
    }
    NCCL_CHECK(g.nccl, ncclGroupEnd());
    CUDA_CHECK(cudaStreamSynchronize(g.stream));
}
