// Ranks, kernels/comm.h. Inner tests (groups ranks_comm, ends_comm) run on every rank at the same time; the others
// start them, or look at one process. What is expected is made on each rank from what all ranks hold, by plain loops.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <thread>
#include <vector>

#include <sched.h>
#include <unistd.h>

#include "dev/tests/ranks.h"
#include "kernels/launcher.h"

Comm test_comm;

std::string mpirun() {
    const char* other = getenv("TRAIN_LLAMA_MPIRUN");
    return other != nullptr ? other : *MPIRUN != 0 ? MPIRUN : "mpirun";
}

std::string this_program() {
    char path[4096];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path);
    return "'" + std::string(path, size_t(n > 0 ? n : 0)) + "'";
}

static double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
static void sleep_for(double seconds) {
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

// ----------------------------------------------------------------------------
// on every rank

// Value i of a rank: of any sign and of sizes that differ by 2^16, so that a sum depends on its order.
static double value(size_t rank, size_t i) {
    uint64_t x = (rank * 0x9e3779b97f4a7c15u + i + 1) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 31) * 0x94d049bb133111ebu;
    x ^= x >> 29;
    return (double(x >> 11) / 9007199254740992.0 - 0.5) * double(1u << (x & 16 ? 16 : x & 15));
}

template <class T>
static void check_sum(size_t n) {
    const size_t R = size_t(test_comm.size);
    std::vector<T> x(n), expected(n), backwards(n);
    for (size_t i = 0; i < n; i++) {
        x[i] = T(value(size_t(test_comm.rank), i));
        expected[i] = T(value(0, i));
        backwards[i] = T(value(R - 1, i));
        for (size_t r = 1; r < R; r++) {
            expected[i] += T(value(r, i));
            backwards[i] += T(value(R - 1 - r, i));
        }
    }
    std::vector<T> again = x;
    comm_sum(test_comm, x.data(), n);
    comm_sum(test_comm, again.data(), n);
    size_t wrong = 0;
    for (size_t i = 0; i < n; i++) {
        wrong += memcmp(&x[i], &expected[i], sizeof(T)) != 0 || memcmp(&x[i], &again[i], sizeof(T)) != 0;
    }
    CHECK(wrong == 0, "%zu of %zu sums of %zu bytes differ from x_0 + x_1 + ...", wrong, n, sizeof(T));
    CHECK(R < 3 || n < 1000 || expected != backwards, "these values do not show the order");
}

static void sums_in_the_order_of_the_ranks() {
    const size_t R = size_t(test_comm.size);
    for (size_t n : {size_t(0), size_t(1), R - 1, R, R + 1, 16 * R + 1, size_t(1100003)}) {
        check_sum<float>(n);
        check_sum<double>(n);
    }
    float zero = -0.0f;  // a sum that starts at 0 instead of x_0 gives +0
    comm_sum(test_comm, &zero, 1);
    CHECK(std::signbit(zero), "the sum of -0 is +0");
}

static std::vector<unsigned char> bytes_of(size_t rank, size_t n) {
    std::vector<unsigned char> b(n);
    for (size_t i = 0; i < n; i++) {
        b[i] = (unsigned char)(i * 7 + i / 251 + rank * 31 + 1);
    }
    return b;
}

// out (size, n): slice r is rank r's bytes.
static void check_slices(const std::vector<unsigned char>& out, size_t n, const char* what) {
    for (size_t r = 0; r < size_t(test_comm.size); r++) {
        std::vector<unsigned char> expected = bytes_of(r, n);
        CHECK(std::equal(expected.begin(), expected.end(), out.begin() + long(r * n)), "%s: slice %zu of %zu bytes",
              what, r, n);
    }
}

static void all_gather() {
    for (size_t n : {size_t(0), size_t(1), size_t(5), size_t(250001)}) {
        std::vector<unsigned char> mine = bytes_of(size_t(test_comm.rank), n), out(n * size_t(test_comm.size));
        comm_all_gather(test_comm, out.data(), mine.data(), n);
        check_slices(out, n, "gathered");
    }
}

// Rank r's text: empty for rank 0, else of a length of its own.
static std::string text_of(size_t rank) {
    std::vector<unsigned char> b = bytes_of(rank, rank * rank * 60001);
    return std::string(b.begin(), b.end());
}

static void texts() {
    const size_t rank = size_t(test_comm.rank), R = size_t(test_comm.size);
    for (size_t turn = 0; turn < 2; turn++) {  // the empty one first, and last
        auto of = [&](size_t r) { return text_of(turn == 0 ? r : R - 1 - r); };
        std::vector<std::string> all = comm_all_gather_text(test_comm, of(rank));
        std::vector<std::string> at_0 = comm_gather_text(test_comm, of(rank));
        CHECK(all.size() == R && at_0.size() == (rank == 0 ? R : 0), "%zu and %zu texts", all.size(), at_0.size());
        for (size_t r = 0; r < all.size(); r++) {
            CHECK(all[r] == of(r), "text %zu of all", r);
            CHECK(rank != 0 || at_0[r] == of(r), "text %zu at rank 0", r);
        }
    }
}

static void broadcast() {
    for (int root = 0; root < test_comm.size; root++) {
        for (size_t n : {size_t(0), size_t(1), size_t(250001)}) {
            std::vector<unsigned char> b = bytes_of(size_t(test_comm.rank), n);
            comm_broadcast(test_comm, b.data(), n, root);
            CHECK(b == bytes_of(size_t(root), n), "%zu bytes of rank %d", n, root);
        }
    }
}

// Rank r sends pieces when r is odd, or every rank, or none but the last.
static void exchange() {
    const size_t R = size_t(test_comm.size), rank = size_t(test_comm.rank);
    for (int turn = 0; turn < 3; turn++) {
        auto sends = [&](size_t r) { return turn == 0 ? r % 2 == 1 : turn == 1 || r == R - 1; };
        for (size_t n : {size_t(0), size_t(3), size_t(210001)}) {
            std::vector<unsigned char> mine = bytes_of(rank, n * R);
            std::vector<std::vector<unsigned char>> got(R, std::vector<unsigned char>(n + 1, 255));
            std::vector<void*> from(R, nullptr);
            for (size_t r = 0; r < R; r++) {
                from[r] = sends(r) ? got[r].data() : nullptr;
            }
            comm_exchange(test_comm, sends(rank) ? mine.data() : nullptr, from.data(), n);
            for (size_t r = 0; r < R; r++) {
                std::vector<unsigned char> expected(n + 1, 255), all = bytes_of(r, n * R);
                if (sends(r)) {
                    std::copy_n(all.begin() + long(rank * n), n, expected.begin());
                }
                CHECK(got[r] == expected, "turn %d, %zu bytes of rank %zu", turn, n, r);
            }
        }
    }
}

// Two gathers under way, ordinary calls between their beginnings and ends, and the ends in the other order.
static void gathers_under_way() {
    const size_t n[2] = {250001, 90001}, R = size_t(test_comm.size);
    std::vector<unsigned char> mine[2], out[2];
    for (int turn = 0; turn < 2; turn++) {
        for (int k = 0; k < 2; k++) {
            mine[k] = bytes_of(size_t(test_comm.rank), n[k]);
            out[k].assign(n[k] * R, 0);
            comm_gather_start(test_comm, k, out[k].data(), mine[k].data(), n[k]);
            check_sum<float>(50001);
        }
        std::vector<unsigned char> b = bytes_of(size_t(test_comm.rank), 1000);
        comm_broadcast(test_comm, b.data(), b.size(), test_comm.size - 1);
        CHECK(b == bytes_of(R - 1, b.size()), "the broadcast between");
        for (int k : {1, 0}) {
            comm_gather_wait(test_comm, k);
            check_slices(out[k], n[k], "under way");
        }
    }
    comm_gather_wait(test_comm, 0);  // nothing is under way
}

// Nobody leaves before the last has come.
static void barrier() {
    sleep_for(0.05 * test_comm.rank);
    double come = seconds_now();
    comm_barrier(test_comm);
    double gone = seconds_now();
    std::vector<double> all(size_t(test_comm.size));
    comm_all_gather(test_comm, all.data(), &come, sizeof come);
    double last = *std::max_element(all.begin(), all.end());
    CHECK(gone >= last, "left %.6f s before the last came", last - gone);
}

static void the_way_out() {
    const int rank = test_comm.rank, R = test_comm.size;
    std::vector<int> codes, expected;
    for (int r = 0; r < R; r++) {
        expected.push_back(10 + r);
    }
    CHECK(comm_ended(test_comm, 10 + rank, 20, codes) && codes == expected, "all came, and some were not seen");
    // One waits for the others in an ordinary call; they see that it does not come, and may still join it.
    if (R > 1) {
        double start = seconds_now();
        bool ended = rank < R - 1 && comm_ended(test_comm, 10 + rank, 0.2, codes);
        double took = seconds_now() - start;
        CHECK(!ended && (rank == R - 1 || (took >= 0.2 && took < 5)), "ended %d after %.3f s", ended, took);
        comm_barrier(test_comm);
        codes.clear();
        CHECK(comm_ended(test_comm, 10 + rank, -1, codes) && codes == expected, "they did not meet afterwards");
    }
    CHECK(comm_ended(test_comm, 10 + rank, 20, codes) && codes == expected, "not a third time");
}

static void of_this_machine() {
    CHECK(test_comm.local_size == test_comm.size && test_comm.local_rank == test_comm.rank, "rank %d of %d here",
          test_comm.local_rank, test_comm.local_size);
    for (const std::string& host : comm_all_gather_text(test_comm, comm_host(test_comm))) {
        CHECK(!host.empty() && host == comm_host(test_comm), "hosts %s and %s", host.c_str(),
              comm_host(test_comm).c_str());
    }
    // Tied to no cores: all ranks share all of them.
    std::vector<unsigned char> mask(8192);
    cpu_set_t* cpus = reinterpret_cast<cpu_set_t*>(mask.data());
    sched_getaffinity(0, mask.size(), cpus);
    int cores = CPU_COUNT_S(mask.size(), cpus);
    int expected = test_comm.size == 1 ? 0 : std::max(1, cores / test_comm.size);
    CHECK(comm_threads(test_comm) == expected, "%d threads of %d cores", comm_threads(test_comm), cores);
}

extern const Test ranks_comm_tests[] = {
    {"sums_in_the_order_of_the_ranks", sums_in_the_order_of_the_ranks},
    {"all_gather", all_gather},
    {"texts", texts},
    {"broadcast", broadcast},
    {"exchange", exchange},
    {"gathers_under_way", gathers_under_way},
    {"barrier", barrier},
    {"the_way_out", the_way_out},
    {"of_this_machine", of_this_machine},
    {nullptr, nullptr},
};

// ----------------------------------------------------------------------------
// on every rank, and it ends them

static void abort_of_one() {
    if (test_comm.rank == 1) {
        comm_abort(test_comm, 3);
    }
    comm_barrier(test_comm);
}

static void kill_of_one() {
    if (test_comm.rank == 1) {
        raise(SIGKILL);
    }
    comm_barrier(test_comm);
}

static void exit_of_one() {
    if (test_comm.rank == 1) {
        exit(1);
    }
    comm_barrier(test_comm);
}

static void failure_of_one() {
    CHECK(test_comm.rank != 1, "as planned");
}

extern const Test ends_comm_tests[] = {
    {"abort_of_one", abort_of_one},
    {"kill_of_one", kill_of_one},
    {"exit_of_one", exit_of_one},
    {"failure_of_one", failure_of_one},
    {nullptr, nullptr},
};

// ----------------------------------------------------------------------------
// on one process

static void inner_on_1() {
    check_inner(1, "ranks_comm/");
}
static void inner_on_2() {
    check_inner(2, "ranks_comm/");
}
static void inner_on_3() {
    check_inner(3, "ranks_comm/");
}
static void inner_on_4() {
    check_inner(4, "ranks_comm/");
}
static void inner_in_pieces() {
    check_inner(3, "ranks_comm/", "TRAIN_LLAMA_COMM_PIECE=100001");
}

static void one_ends_all(const char* test, int& code, std::string& out) {
    double start = seconds_now();
    code = run_ranks(&out, 3, this_program() + " " + test);
    double took = seconds_now() - start;
    CHECK(took <= 10, "%s: took %.1f s: %s", test, took, out.c_str());
}

static void one_that_aborts_ends_all() {
    int code = 0;
    std::string out;
    if (ranks_can_start()) {
        one_ends_all("ends_comm/abort_of_one", code, out);
        CHECK(code == 3, "exit %d: %s", code, out.c_str());
    }
}

static void one_that_is_killed_ends_all() {
    int code = 0;
    std::string out;
    if (ranks_can_start()) {
        one_ends_all("ends_comm/kill_of_one", code, out);
        CHECK(code != 0 && code != 124, "exit %d: %s", code, out.c_str());
    }
}

// As where memory or a card fails, deep inside.
static void one_that_exits_ends_all() {
    int code = 0;
    std::string out;
    if (ranks_can_start()) {
        one_ends_all("ends_comm/exit_of_one", code, out);
        const std::string who = "error: rank 1 of 3 (" + comm_host(Comm()) + ") has ended\n";
        CHECK(code == 1 && text_has(out, who), "exit %d: %s", code, out.c_str());
    }
}

// The harness itself: a check that fails on a rank which prints no results.
static void one_that_fails_is_seen() {
    int code = 0;
    std::string out;
    if (ranks_can_start()) {
        one_ends_all("ends_comm/failure_of_one", code, out);
        CHECK(code == 1 && text_has(out, "rank 1: ") && text_has(out, "0 passed, 1 failed, 0 skipped"), "exit %d: %s",
              code, out.c_str());
    }
}

// A launcher's environment with no launcher that this MPI could join (or no MPI): no copy goes on alone.
static void copies_are_refused() {
    for (const char* variable : {"OMPI_COMM_WORLD_SIZE=2", "PMI_SIZE=2", "SLURM_STEP_NUM_TASKS=2", "PMI_RANK=1"}) {
        std::string out;
        int code = run_command(&out, ranks_environment() + variable + " " + this_program() + " --list");
        const char* way = comm_is_built() ? "MPICXX=" : "without MPI";
        CHECK(code == 2 && text_has(out, "launcher with 2 tasks") && text_has(out, way), "%s: exit %d: %s", variable,
              code, out.c_str());
    }
    // sbatch's script, salloc's shell: an allocation of eight tasks, and nobody started them.
    std::string out;
    int code = run_command(&out, "SLURM_JOB_ID=7 SLURM_NTASKS=8 SLURM_NPROCS=8 SLURM_PROCID=0 SLURM_STEP_ID=0 "
                                 "SLURM_STEP_NUM_TASKS=1 " + this_program() + " --list");
    CHECK(code == 0 && text_has(out, "comm/copies_are_refused"), "no launcher: exit %d: %s", code, out.c_str());
}

// Every function on one process, with or without MPI.
static void alone() {
    Comm c;
    std::string why = comm_open(c), text = "abc";
    CHECK(why.empty() && c.rank == 0 && c.size == 1 && c.local_size == 1 && c.state == nullptr, "%s", why.c_str());
    CHECK(comm_threads(c) == 0 && !comm_host(c).empty(), "%d threads", comm_threads(c));
    float x[2] = {1.5f, -2};
    double y = 3;
    comm_sum(c, x, 2);
    comm_sum(c, &y, 1);
    comm_broadcast(c, x, sizeof x, 0);
    comm_barrier(c);
    CHECK(x[0] == 1.5f && x[1] == -2 && y == 3, "%g %g %g", x[0], x[1], y);
    float out[3][2] = {};
    comm_all_gather(c, out[0], x, sizeof x);
    comm_gather_start(c, 0, out[1], x, sizeof x);
    comm_gather_wait(c, 0);
    void* from[1] = {out[2]};
    comm_exchange(c, x, from, sizeof x);
    for (const auto& o : out) {
        CHECK(o[0] == x[0] && o[1] == x[1], "%g %g", o[0], o[1]);
    }
    from[0] = nullptr;
    comm_exchange(c, nullptr, from, sizeof x);
    std::vector<int> codes;
    CHECK(comm_ended(c, 5, 0, codes) && codes == std::vector<int>{5}, "%zu codes", codes.size());
    CHECK(comm_all_gather_text(c, text) == std::vector<std::string>{text} &&
              comm_gather_text(c, text) == std::vector<std::string>{text}, "texts");
    comm_close(c);
}

static void threads_are_shared_fairly() {
    // 8 processors. Two ranks tied to a half each; two tied to nothing; one with all and one with the last two.
    const unsigned char halves[2] = {0x0f, 0xf0}, all[2] = {0xff, 0xff}, uneven[2] = {0xff, 0xc0};
    const unsigned char three[3] = {0x07, 0x07, 0x07}, crowd[3] = {1, 1, 1};
    auto check = [](const unsigned char* masks, int size, std::vector<int> expected) {
        for (int r = 0; r < size; r++) {
            int n = fair_share(masks, 1, r, size);
            CHECK(n == expected[size_t(r)], "masks %02x %02x: rank %d gets %d", masks[0], masks[1], r, n);
        }
    };
    check(halves, 2, {4, 4});
    check(all, 2, {4, 4});
    check(uneven, 2, {7, 1});  // 6 + 2 / 2; 2 / 2
    check(three, 3, {1, 1, 1});
    check(crowd, 3, {1, 1, 1});
    const unsigned char many[4] = {0xff, 0x80, 0, 0x8f};  // 16 processors, shares 8 + 1/2 and 4 + 1/2
    CHECK(fair_share(many, 2, 0, 2) == 8 && fair_share(many, 2, 1, 2) == 4, "two bytes");
}

extern const Test comm_tests[] = {
    {"alone", alone},
    {"threads_are_shared_fairly", threads_are_shared_fairly},
    {"copies_are_refused", copies_are_refused},
    {"inner_on_1", inner_on_1},
    {"inner_on_2", inner_on_2},
    {"inner_on_3", inner_on_3},
    {"inner_on_4", inner_on_4},
    {"inner_in_pieces", inner_in_pieces},
    {"one_that_aborts_ends_all", one_that_aborts_ends_all},
    {"one_that_is_killed_ends_all", one_that_is_killed_ends_all},
    {"one_that_exits_ends_all", one_that_exits_ends_all},
    {"one_that_fails_is_seen", one_that_fails_is_seen},
    {nullptr, nullptr},
};
