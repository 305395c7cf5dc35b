// comm.h by MPI: the engine between hosts, and on the CPU between all ranks. The other file for the same functions is
// comm_none.cpp. Knows nothing of devices.
//
// MPI is started only in a process that a launcher started; without one, state stays nullptr and a function stops after
// what it does for one rank. Errors of MPI itself end all ranks with MPI's own message (its default).
//
// Three communicators, so that what waits in one of them never stands in the way of the others: ordinary calls; gathers
// that are under way beside them; the way out.
//
// Counts in MPI are int. Whatever may be longer goes in pieces of at most state->piece bytes. The environment variable
// TRAIN_LLAMA_COMM_PIECE sets it, so that tests need no arrays of gigabytes.
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include <sched.h>
#include <unistd.h>

#include "kernels/comm.h"
#include "kernels/launcher.h"

using Requests = std::vector<MPI_Request>;

struct CommState {
    MPI_Comm ordinary, beside, way_out, machine;
    size_t piece = size_t(1) << 30;
    int threads = 1;
    // comm_sum: every rank's values of this rank's slice of a chunk; what goes to and comes from each rank
    size_t sum_bytes = 0;
    void* sum_values = nullptr;
    std::vector<int> sum_counts, sum_offsets, own_counts, own_offsets;
    Requests gathers[2];
    // comm_ended: lives on in here when it was not over in time
    MPI_Request ended = MPI_REQUEST_NULL;
    int ended_mine = 0;
    std::vector<int> ended_codes;
};

bool comm_is_built() {
    return true;
}

// ----------------------------------------------------------------------------
// opening and closing

// "Open MPI v4.1.4", "MPICH Version: 4.0.2"
static std::string library_name() {
    char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int n = 0;
    MPI_Get_library_version(text, &n);
    std::string name(text, size_t(std::max(n, 0)));
    name = name.substr(0, name.find_first_of(",\n"));
    std::replace(name.begin(), name.end(), '\t', ' ');
    return name;
}

// Threads for this rank, from what all ranks of the machine may run on.
static int threads_of_rank(const Comm& comm) {
    std::vector<unsigned char> mine(8192), masks(mine.size() * size_t(comm.local_size));
    sched_getaffinity(0, mine.size(), reinterpret_cast<cpu_set_t*>(mine.data()));
    MPI_Allgather(mine.data(), int(mine.size()), MPI_BYTE, masks.data(), int(mine.size()), MPI_BYTE,
                  comm.state->machine);
    return fair_share(masks.data(), mine.size(), comm.local_rank, comm.local_size);
}

// Something deep inside that cannot go on calls exit(). The others would wait for ever, unless the launcher ends them,
// and they would not know who it was. size 1: all have met on the way out, or there are no others.
static Comm others;
static void end_others() {
    if (others.size > 1) {
        const Comm ranks = others;
        fprintf(stderr, "error: rank %d of %d (%s) has ended\n", ranks.rank, ranks.size, host_name().c_str());
        comm_abort(ranks, 1);
    }
}

std::string comm_open(Comm& comm) {
    comm = {};
    Launcher launcher = launcher_find();
    if (launcher.variable == nullptr) {
        return "";
    }
    int provided = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &comm.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &comm.size);
    if (comm.size == 1 && launcher.tasks > 1) {
        MPI_Finalize();
        return "started by a launcher with " + std::to_string(launcher.tasks) + " tasks (" + launcher.variable +
               "), but the MPI of this program (" + library_name() +
               ") sees none of the others; start it with the mpirun of that MPI, or with srun --mpi=pmix (or pmi2: "
               "srun --mpi=list shows what there is), or build it with the launcher's MPI: "
               "make MPICXX=/path/to/its/mpicxx";
    }
    CommState* s = comm.state = new CommState;
    others = comm;
    atexit(end_others);  // after MPI_Init, so that it runs before what MPI itself does at an exit
    MPI_Comm_dup(MPI_COMM_WORLD, &s->ordinary);
    MPI_Comm_dup(MPI_COMM_WORLD, &s->beside);
    MPI_Comm_dup(MPI_COMM_WORLD, &s->way_out);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, comm.rank, MPI_INFO_NULL, &s->machine);
    MPI_Comm_rank(s->machine, &comm.local_rank);
    MPI_Comm_size(s->machine, &comm.local_size);
    s->threads = comm.size > 1 ? threads_of_rank(comm) : 0;

    const char* piece = getenv("TRAIN_LLAMA_COMM_PIECE");
    if (piece != nullptr && atol(piece) > 0) {
        s->piece = std::min(s->piece, size_t(atol(piece)));
    }
    const size_t R = size_t(comm.size);
    s->sum_bytes = std::max(std::min(s->piece, size_t(4) << 20), sizeof(double));
    s->sum_values = malloc(s->sum_bytes + R * 16 * sizeof(double));  // slices are rounded up to 16
    if (s->sum_values == nullptr) {
        return "not enough memory for the sums over ranks";
    }
    s->sum_counts.resize(R);
    s->sum_offsets.resize(R);
    s->own_counts.resize(R);
    s->own_offsets.resize(R);
    s->ended_codes.resize(R);
    return "";
}

void comm_close(Comm& comm) {
    CommState* s = comm.state;
    if (s == nullptr) {
        return;
    }
    others = {};
    for (MPI_Comm* c : {&s->ordinary, &s->beside, &s->way_out, &s->machine}) {
        MPI_Comm_free(c);
    }
    free(s->sum_values);
    delete s;
    comm = {};
    MPI_Finalize();
}

void comm_abort(const Comm& comm, int status) {
    fflush(nullptr);
    others = {};  // MPI_Abort may call exit
    if (comm.state != nullptr) {
        MPI_Abort(MPI_COMM_WORLD, status);
    }
    _exit(status);
}

int comm_threads(const Comm& comm) {
    return comm.state != nullptr ? comm.state->threads : 0;
}

std::string comm_host(const Comm&) {
    return host_name();
}

// ----------------------------------------------------------------------------
// bytes

void comm_barrier(const Comm& comm) {
    if (comm.state != nullptr) {
        MPI_Barrier(comm.state->ordinary);
    }
}

// fn(at, n) for each piece of so many bytes.
template <class Fn>
static void pieces(const Comm& comm, size_t bytes, const Fn& fn) {
    for (size_t at = 0; at < bytes; at += comm.state->piece) {
        fn(at, int(std::min(comm.state->piece, bytes - at)));
    }
}

void comm_broadcast(const Comm& comm, void* p, size_t bytes, int root) {
    if (comm.state != nullptr) {
        pieces(comm, bytes, [&](size_t at, int n) {
            MPI_Bcast(static_cast<char*>(p) + at, n, MPI_BYTE, root, comm.state->ordinary);
        });
    }
}

// A piece of every rank's slice goes to its place in out, where slices are `bytes` apart: a type of MPI that says so.
static void gather_begin(const Comm& comm, MPI_Comm ranks, Requests& requests, void* out, const void* mine,
                         size_t bytes) {
    char* slot = static_cast<char*>(out) + size_t(comm.rank) * bytes;
    if (bytes > 0 && slot != mine) {
        memcpy(slot, mine, bytes);
    }
    if (comm.state == nullptr) {
        return;
    }
    pieces(comm, bytes, [&](size_t at, int n) {
        MPI_Request request;
        if (size_t(n) == bytes) {
            MPI_Iallgather(MPI_IN_PLACE, 0, MPI_BYTE, out, n, MPI_BYTE, ranks, &request);
        } else {
            MPI_Datatype run, spaced;
            MPI_Type_contiguous(n, MPI_BYTE, &run);
            MPI_Type_create_resized(run, 0, MPI_Aint(bytes), &spaced);
            MPI_Type_commit(&spaced);
            MPI_Iallgather(MPI_IN_PLACE, 0, MPI_BYTE, static_cast<char*>(out) + at, 1, spaced, ranks, &request);
            MPI_Type_free(&run);
            MPI_Type_free(&spaced);
        }
        requests.push_back(request);
    });
}

static void wait(Requests& requests) {
    MPI_Waitall(int(requests.size()), requests.data(), MPI_STATUSES_IGNORE);
    requests.clear();
}

void comm_all_gather(const Comm& comm, void* out, const void* mine, size_t bytes) {
    Requests requests;
    gather_begin(comm, comm.state != nullptr ? comm.state->ordinary : MPI_COMM_NULL, requests, out, mine, bytes);
    if (comm.state != nullptr) {
        wait(requests);
    }
}

void comm_gather_start(const Comm& comm, int number, void* out, const void* slice, size_t bytes) {
    if (comm.state == nullptr) {
        return comm_all_gather(comm, out, slice, bytes);
    }
    gather_begin(comm, comm.state->beside, comm.state->gathers[number], out, slice, bytes);
}

void comm_gather_wait(const Comm& comm, int number) {
    if (comm.state != nullptr) {
        wait(comm.state->gathers[number]);
    }
}

// Texts of every rank's length; this rank's own is in its place.
static std::vector<std::string> text_room(const Comm& comm, const std::string& mine, bool needed) {
    std::vector<uint64_t> lengths(size_t(comm.size));
    uint64_t length = mine.size();
    comm_all_gather(comm, lengths.data(), &length, sizeof length);
    std::vector<std::string> texts(needed ? lengths.size() : 0);
    for (size_t r = 0; r < texts.size(); r++) {
        texts[r].resize(lengths[r]);
    }
    if (needed) {
        texts[size_t(comm.rank)] = mine;
    }
    return texts;
}

std::vector<std::string> comm_all_gather_text(const Comm& comm, const std::string& mine) {
    std::vector<std::string> texts = text_room(comm, mine, true);
    for (size_t r = 0; r < texts.size(); r++) {
        comm_broadcast(comm, &texts[r][0], texts[r].size(), int(r));
    }
    return texts;
}

// A message in pieces, which arrive in the order in which they are sent.
static void send(const Comm& comm, Requests& requests, const void* p, size_t bytes, int to) {
    pieces(comm, bytes, [&](size_t at, int n) {
        requests.emplace_back();
        MPI_Isend(static_cast<const char*>(p) + at, n, MPI_BYTE, to, 0, comm.state->ordinary, &requests.back());
    });
}
static void receive(const Comm& comm, Requests& requests, void* p, size_t bytes, int from) {
    pieces(comm, bytes, [&](size_t at, int n) {
        requests.emplace_back();
        MPI_Irecv(static_cast<char*>(p) + at, n, MPI_BYTE, from, 0, comm.state->ordinary, &requests.back());
    });
}

std::vector<std::string> comm_gather_text(const Comm& comm, const std::string& mine) {
    std::vector<std::string> texts = text_room(comm, mine, comm.rank == 0);
    if (comm.state == nullptr) {
        return texts;
    }
    Requests requests;
    if (comm.rank != 0) {
        send(comm, requests, mine.data(), mine.size(), 0);
    }
    for (size_t r = 1; r < texts.size(); r++) {
        receive(comm, requests, &texts[r][0], texts[r].size(), int(r));
    }
    wait(requests);
    return texts;
}

void comm_exchange(const Comm& comm, const void* mine, void* const* from, size_t bytes) {
    void* own = from[comm.rank];
    const char* parts = static_cast<const char*>(mine);
    if (mine != nullptr && own != nullptr && bytes > 0) {
        memcpy(own, parts + size_t(comm.rank) * bytes, bytes);
    }
    if (comm.state == nullptr) {
        return;
    }
    Requests requests;
    for (int r = 0; r < comm.size; r++) {
        if (r != comm.rank && from[r] != nullptr) {
            receive(comm, requests, from[r], bytes, r);
        }
    }
    for (int r = 0; r < comm.size; r++) {
        if (r != comm.rank && mine != nullptr) {
            send(comm, requests, parts + size_t(r) * bytes, bytes, r);
        }
    }
    wait(requests);
}

// ----------------------------------------------------------------------------
// the way out

// A gather that ends on a rank only when all have begun it. Tested now and again, since waiting in MPI has no end.
bool comm_ended(const Comm& comm, int code, double seconds, std::vector<int>& codes) {
    codes.assign(size_t(comm.size), code);
    CommState* s = comm.state;
    if (s == nullptr) {
        return true;
    }
    if (s->ended == MPI_REQUEST_NULL) {
        s->ended_mine = code;
        MPI_Iallgather(&s->ended_mine, 1, MPI_INT, s->ended_codes.data(), 1, MPI_INT, s->way_out, &s->ended);
    }
    auto start = std::chrono::steady_clock::now();
    for (;;) {
        int done = 0;
        MPI_Test(&s->ended, &done, MPI_STATUS_IGNORE);
        if (done != 0) {
            codes = s->ended_codes;
            return true;
        }
        if (seconds >= 0 && std::chrono::steady_clock::now() - start > std::chrono::duration<double>(seconds)) {
            return false;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

// ----------------------------------------------------------------------------
// sums

// A chunk at a time: the slices change places (all to all), each rank adds what it has got, and the sums go to all. An
// element's sum is the same wherever chunks and slices end.
template <class T>
static void sum(const Comm& comm, T* x, size_t n, MPI_Datatype type) {
    CommState* s = comm.state;
    if (s == nullptr || comm.size == 1) {
        return;
    }
    const size_t R = size_t(comm.size), chunk = s->sum_bytes / sizeof(T);
    for (size_t at = 0; at < n; at += chunk, x += chunk) {
        const size_t m = std::min(chunk, n - at), slice = ((m + R - 1) / R + 15) / 16 * 16;
        for (size_t r = 0; r < R; r++) {
            size_t begin = std::min(r * slice, m);
            s->sum_offsets[r] = int(begin);
            s->sum_counts[r] = int(std::min(begin + slice, m) - begin);
        }
        const size_t own = size_t(s->sum_counts[size_t(comm.rank)]);
        for (size_t r = 0; r < R; r++) {
            s->own_counts[r] = int(own);
            s->own_offsets[r] = int(r * own);
        }
        T* values = static_cast<T*>(s->sum_values);
        MPI_Alltoallv(x, s->sum_counts.data(), s->sum_offsets.data(), type, values, s->own_counts.data(),
                      s->own_offsets.data(), type, s->ordinary);
        T* total = x + s->sum_offsets[size_t(comm.rank)];
        std::copy_n(values, own, total);
        for (size_t r = 1; r < R; r++) {
            const T* term = values + r * own;
            for (size_t i = 0; i < own; i++) {
                total[i] += term[i];
            }
        }
        MPI_Allgatherv(MPI_IN_PLACE, 0, type, x, s->sum_counts.data(), s->sum_offsets.data(), type, s->ordinary);
    }
}

void comm_sum(const Comm& comm, float* x, size_t n) {
    sum(comm, x, n, MPI_FLOAT);
}
void comm_sum(const Comm& comm, double* x, size_t n) {
    sum(comm, x, n, MPI_DOUBLE);
}
