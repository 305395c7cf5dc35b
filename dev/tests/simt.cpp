// The stand-in of dev/simt: small kernels give the right result under any schedule, and mistakes planted in them are
// caught.
//
// A planted mistake runs in a child process with one thread of the host, under several seeds, and each time it must
// show: by the message that the table names, or, where it names none, by a wrong result (as a NaN mostly). The same
// kernel without the mistake is right under the same seeds. The kernels stand in a namespace of their own, so that
// lists of the project's kernels can leave them out.
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "dev/tests/test.h"
#include "io/file.h"
#include "kernels/cuda.cuh"

namespace simt_test {

// Memory of the device, n elements, freed at the end of the scope.
template <class T>
struct Buffer {
    T* p = nullptr;
    size_t n;
    explicit Buffer(size_t count) : n(count) { CUDA_CHECK(cudaMalloc(&p, n * sizeof(T))); }
    explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
        CUDA_CHECK(cudaMemcpyAsync(p, values.data(), n * sizeof(T), cudaMemcpyHostToDevice, nullptr));
    }
    ~Buffer() { CUDA_CHECK(cudaFree(p)); }
    Buffer(const Buffer&) = delete;
    std::vector<T> get() const {
        std::vector<T> values(n);
        CUDA_CHECK(cudaMemcpy(values.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }
};

enum Mistake {
    NONE,
    // reduction
    NO_BARRIER,
    // matrix product
    NO_TRAILING_BARRIER,
    NO_BARRIER_AFTER_WAIT,
    NO_WAIT,
    WAIT_TOO_HIGH,
    SWAPPED_A,
    SWAPPED_B,
    CROOKED_LDMATRIX,
    CROOKED_COPY,
    COPY_PAST_SHARED,
    COPY_PAST_GLOBAL,
    // warps
    NO_SYNCWARP,
    DIVERGENT_SHUFFLE,
    ENDED_LANE,
    LANE_ENDS,
    LANE_NOT_IN_MASK,
    SOURCE_NOT_IN_MASK,
    CROOKED_LOAD,
    // blocks and memory
    DIVERGENT_BARRIER,
    TWO_BARRIERS,
    PAST_DYNAMIC,
    PAST_STATIC,
    PAST_GLOBAL,
    BEFORE_GLOBAL,
    UNWRITTEN,
    NO_MEMORY,
    DEEP_STACK
};

// ----------------------------------------------------------------------------
// a sum over a block

template <Mistake M>
__global__ void sum_kernel(float* out, const float* x, int n) {
    SHARED(float, sums, 32);
    float sum = 0;
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
        sum += x[size_t(blockIdx.x) * size_t(n) + size_t(i)];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = sum;
    }
    if (M != NO_BARRIER) {
        __syncthreads();
    }
    if (threadIdx.x < 32) {
        sum = warp_sum(threadIdx.x < blockDim.x / 32 ? sums[threadIdx.x] : 0);
        if (threadIdx.x == 0) {
            out[blockIdx.x] = sum;
        }
    }
}

// Whole numbers, so that the sum is exact in any order. Rows that 256 threads do not divide.
template <Mistake M>
std::vector<float> sum_run(std::vector<float>* expected) {
    const int blocks = 5, n = 700;
    std::vector<float> x(size_t(blocks) * n);
    expected->assign(blocks, 0);
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = float(int(i * 37 % 101) - 40);
        (*expected)[i / n] += x[i];
    }
    Buffer<float> in(x), out(blocks);
    LAUNCH(sum_kernel<M>, blocks, 256, 0, nullptr, out.p, in.p, n);
    return out.get();
}

// ----------------------------------------------------------------------------
// C (M, N) = A (M, K) B (N, K)^T by tiles of 64 x 64 x 32: a ring of two stages filled by cp.async, ldmatrix, mma

constexpr int LD = 40;  // elements from row to row of a stage: 8 rows fall on 8 different banks

template <Mistake F>
__global__ void __launch_bounds__(128) product_kernel(float* C, const bf16* A, const bf16* B, int N, int K) {
    DYN_SHARED(bf16, stages);
    const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
    const int row = int(blockIdx.y) * 64, col = int(blockIdx.x) * 64, tiles = K / 32;
    const auto load = [&](int tile) {
        bf16* a = stages + tile % 2 * 128 * LD + (F == CROOKED_COPY ? 4 : 0);
        for (int i = t; i < 256; i += 128) {
            const int r = i / 4, c = i % 4 * 8;
            cp_async_16(a + r * LD + c, A + size_t(row + r) * size_t(K) + size_t(tile * 32 + c));
            const size_t past = F == COPY_PAST_GLOBAL && i == 255 && tile == tiles - 1 ? 8 : 0;
            const int further = F == COPY_PAST_SHARED && i == 255 ? 8 * LD : 0;
            cp_async_16(a + (64 + r) * LD + c + further,
                        B + size_t(col + r) * size_t(K) + size_t(tile * 32 + c) + past);
        }
        cp_async_commit();
    };
    float acc[2][4][4] = {};
    load(0);
    for (int tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) {
            load(tile + 1);
            if (F == WAIT_TOO_HIGH) {
                cp_async_wait<2>();
            } else if (F != NO_WAIT) {
                cp_async_wait<1>();
            }
        } else if (F != NO_WAIT) {
            cp_async_wait<0>();
        }
        if (F != NO_BARRIER_AFTER_WAIT) {
            __syncthreads();
        }
        const bf16* a = stages + tile % 2 * 128 * LD + (F == CROOKED_LDMATRIX ? 4 : 0);
        for (int k = 0; k < 32; k += 16) {
            uint32_t fa[2][4];
            for (int i = 0; i < 2; i++) {
                ldmatrix_x4(fa[i], a + (warp / 2 * 32 + i * 16 + lane % 16) * LD + k + lane / 16 * 8);
                if (F == SWAPPED_A) {
                    const uint32_t other = fa[i][1];
                    fa[i][1] = fa[i][2];
                    fa[i][2] = other;
                }
            }
            for (int j = 0; j < 2; j++) {
                uint32_t fb[4];
                const int r = 64 + warp % 2 * 32 + j * 16 + lane % 8 + lane / 16 * 8;
                ldmatrix_x4(fb, a + r * LD + k + lane / 8 % 2 * 8);
                for (int i = 0; i < 2; i++) {
                    mma_16816(acc[i][2 * j], fa[i], fb[F == SWAPPED_B], fb[F != SWAPPED_B]);
                    mma_16816(acc[i][2 * j + 1], fa[i], fb[2], fb[3]);
                }
            }
        }
        if (F != NO_TRAILING_BARRIER) {
            __syncthreads();
        }
    }
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) {
            for (int r = 0; r < 4; r++) {
                const int y = row + warp / 2 * 32 + i * 16 + lane / 4 + r / 2 * 8;
                C[size_t(y) * size_t(N) + size_t(col + warp % 2 * 32 + j * 8 + lane % 4 * 2 + r % 2)] = acc[i][j][r];
            }
        }
    }
}

// Whole numbers up to 4: products and sums are exact.
template <Mistake F>
std::vector<float> product_run(std::vector<float>* expected) {
    const int M = 128, N = 64, K = 160;
    std::vector<bf16> a(size_t(M) * K), b(size_t(N) * K);
    for (size_t i = 0; i < a.size(); i++) {
        a[i] = to_bf16(float(int(i * 31 % 97 % 9) - 4));
    }
    for (size_t i = 0; i < b.size(); i++) {
        b[i] = to_bf16(float(int(i * 17 % 89 % 9) - 4));
    }
    expected->assign(size_t(M) * N, 0);
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            for (int k = 0; k < K; k++) {
                (*expected)[size_t(i) * N + j] += to_float(a[size_t(i) * K + k]) * to_float(b[size_t(j) * K + k]);
            }
        }
    }
    Buffer<bf16> da(a), db(b);
    Buffer<float> dc(expected->size());
    LAUNCH((product_kernel<F>), dim3(N / 64, M / 64), 128, 2 * 128 * LD * sizeof(bf16), nullptr, dc.p, da.p, db.p, N,
           K);
    return dc.get();
}

// ----------------------------------------------------------------------------
// within warps

// Each half of a warp on its own, several halves under way at the same time: suffix sums of 16 lanes, by shuffles; the
// number of odd elements; each element's partner in the 4 lanes around it. out (3, n).
template <Mistake M>
__global__ void halves_kernel(float* out, const float* x, int n) {
    SHARED(float, staged, 64);
    const int i = int(threadIdx.x), lane = i % 32;
    const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
    if (M == ENDED_LANE && lane == 5) {
        return;
    }
    float sum = x[i];
    for (int o = 1; o < 16; o *= 2) {
        const float other = __shfl_down_sync(M == LANE_NOT_IN_MASK ? 0xffffu : half, sum, unsigned(o), 16);
        sum += lane % 16 + o < 16 ? other : 0;
        if (M == LANE_ENDS && lane == 21 && o == 4) {
            return;
        }
    }
    out[i] = sum;
    if (M == DIVERGENT_SHUFFLE && lane % 16 < 3) {
        out[n + i] = float(__any_sync(half, true));
    } else {
        out[n + i] = float(__popc(__ballot_sync(half, int(x[i]) % 2 != 0)));
    }
    if (M == SOURCE_NOT_IN_MASK) {
        out[i] = __shfl_xor_sync(half, sum, 16);
    }
    staged[i] = x[i];
    if (M != NO_SYNCWARP) {
        __syncwarp(half);
    }
    out[2 * n + i] = staged[i ^ 3];
    if (M == CROOKED_LOAD) {
        out[i] = __ldg(reinterpret_cast<const float2*>(x + 1)).x;
    }
}

template <Mistake M>
std::vector<float> halves_run(std::vector<float>* expected) {
    const int n = 64;
    std::vector<float> x(n);
    for (int i = 0; i < n; i++) {
        x[i] = float(i * i % 23);
    }
    expected->assign(3 * n, 0);
    for (int i = 0; i < n; i++) {
        for (int j = i / 16 * 16; j < i / 16 * 16 + 16; j++) {
            (*expected)[i] += j >= i ? x[j] : 0;
            (*expected)[n + i] += int(x[j]) % 2;
        }
        (*expected)[2 * n + i] = x[i ^ 3];
    }
    Buffer<float> in(x), out(3 * n);
    LAUNCH((halves_kernel<M>), 1, n, 0, nullptr, out.p, in.p, n);
    return out.get();
}

// ----------------------------------------------------------------------------
// blocks and memory

template <int BYTES>
int deep(int n) {
    volatile char room[BYTES];
    room[n % BYTES] = char(n);
    return n == 0 ? 0 : deep<BYTES>(n - 1) + room[n % BYTES];
}

// out[i] = i + 1 of n, in shared memory on the way, by blocks of 64.
template <Mistake M>
__global__ void blocks_kernel(float* out, size_t n) {
    DYN_SHARED(float, dynamic);
    SHARED(float, fixed, 64);
    const size_t t = threadIdx.x, i = size_t(blockIdx.x) * 64 + t;
    if (M == DIVERGENT_BARRIER && i < 7) {
        __shfl_sync(ALL_LANES, t, 0);
    }
    if (M == TWO_BARRIERS && t >= 32) {
        __syncthreads();
    }
    if (i >= n) {
        return;
    }
    dynamic[t + (M == PAST_DYNAMIC && i == 32 ? 32 : 0)] = float(i);
    fixed[t] = 1;
    if (M == PAST_STATIC && i == 1) {
        *(&fixed[0] + 64) = 1;
    }
    __syncthreads();
    const size_t from = M == UNWRITTEN ? (t + 64) % 128 : t;
    out[M == PAST_GLOBAL && i == 9 ? n : i] = dynamic[from] + fixed[t];
    if (M == BEFORE_GLOBAL && i == 9) {
        *(out - 1) = 0;
    }
    if (M == NO_MEMORY && i == 9) {
        *reinterpret_cast<float*>(n / 150 * 16) = 0;
    }
    if (M == DEEP_STACK && i == 9) {
        out[i] += float(deep<1000>(1000) & 0);
    }
}

template <Mistake M>
std::vector<float> blocks_run(std::vector<float>* expected) {
    const size_t n = 150;  // the last block has fewer; its other threads end before the barrier
    expected->resize(n);
    for (size_t i = 0; i < n; i++) {
        (*expected)[i] = float(i + 1);
    }
    Buffer<float> out(n);
    LAUNCH((blocks_kernel<M>), 3, 64, 64 * sizeof(float), nullptr, out.p, n);
    return out.get();
}

__global__ void nothing_kernel(const float*) {}
__global__ void large_kernel() {
    SHARED(float, sums, 8192);  // 32 KB
    sums[threadIdx.x] = 0;
}

// ----------------------------------------------------------------------------
// streams

// b = a + 1 on one stream, c = 2 b on another, back and forth over events; then to the host.
enum Order { RIGHT_ORDER, NO_EVENT_WAIT, NO_HOST_WAIT };

__global__ void step_kernel(float* out, const float* in, float scale, float add) {
    out[threadIdx.x] = fmaf(in[threadIdx.x], scale, add);
}

template <Order O>
std::vector<float> streams_run(std::vector<float>* expected) {
    constexpr size_t n = 32;
    cudaStream_t one = nullptr, two = nullptr;
    cudaEvent_t first = nullptr, second = nullptr;
    CUDA_CHECK(cudaStreamCreateWithFlags(&one, cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamCreateWithFlags(&two, cudaStreamNonBlocking));
    CUDA_CHECK(cudaEventCreateWithFlags(&first, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventCreateWithFlags(&second, cudaEventDisableTiming));
    Buffer<float> a(n), b(n);
    float* host = nullptr;
    CUDA_CHECK(cudaMallocHost(&host, n * sizeof(float)));
    CUDA_CHECK(cudaMemsetAsync(a.p, 0, n * sizeof(float), one));
    float value = 0;
    for (int i = 0; i < 5; i++) {
        LAUNCH(step_kernel, 1, n, 0, one, b.p, a.p, 1.0f, 1.0f);
        CUDA_CHECK(cudaEventRecord(first, one));
        if (O != NO_EVENT_WAIT) {
            CUDA_CHECK(cudaStreamWaitEvent(two, first));
        }
        LAUNCH(step_kernel, 1, n, 0, two, a.p, b.p, 2.0f, 0.0f);
        CUDA_CHECK(cudaEventRecord(second, two));
        CUDA_CHECK(cudaStreamWaitEvent(one, second));
        value = 2 * (value + 1);
    }
    CUDA_CHECK(cudaMemcpyAsync(host, a.p, n * sizeof(float), cudaMemcpyDeviceToHost, one));
    if (O != NO_HOST_WAIT) {
        CUDA_CHECK(cudaStreamSynchronize(one));
    }
    const std::vector<float> result(host, host + n);
    expected->assign(n, value);
    CUDA_CHECK(cudaFreeHost(host));
    CUDA_CHECK(cudaEventDestroy(first));
    CUDA_CHECK(cudaEventDestroy(second));
    CUDA_CHECK(cudaStreamDestroy(one));
    CUDA_CHECK(cudaStreamDestroy(two));
    return result;
}

// ----------------------------------------------------------------------------
// running mistakes

using Run = std::vector<float> (*)(std::vector<float>* expected);

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    for (size_t i = 0; i < a.size(); i++) {
        if (!(a[i] == b[i])) {
            return false;
        }
    }
    return a.size() == b.size();
}

// fn in a child process: what it printed, and how it ended (128 + n for signal n).
std::string child(const std::function<int()>& fn, int* status) {
    int ends[2];
    if (!CHECK(pipe(ends) == 0, "no pipe")) {
        return "";
    }
    fflush(nullptr);
    const pid_t pid = fork();
    if (pid == 0) {
        dup2(ends[1], 1);
        dup2(ends[1], 2);
        close(ends[0]);
        const rlimit none = {0, 0};
        setrlimit(RLIMIT_CORE, &none);
        // The threads of OpenMP did not come along.
        setenv("SIMT_THREADS", "1", 1);
        const int code = fn();
        fflush(nullptr);
        _exit(code);
    }
    close(ends[1]);
    std::string text;
    char part[4096];
    for (ssize_t n; (n = read(ends[0], part, sizeof(part))) > 0;) {
        text.append(part, size_t(n));
    }
    close(ends[0]);
    int how = 0;
    waitpid(pid, &how, 0);
    *status = WIFSIGNALED(how) ? 128 + WTERMSIG(how) : WEXITSTATUS(how);
    return text;
}

constexpr int RIGHT = 40, WRONG = 41;
#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
constexpr int SEEDS = 1;  // a process takes long to copy there
#else
constexpr int SEEDS = 5;
#endif

struct Planted {
    const char* what;
    Run run;
    const char* message;  // nullptr: the result is wrong
};

void check_planted(const Planted* list, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const Planted& p = list[i];
        for (int seed = 101; seed <= 100 + SEEDS; seed++) {  // not the one of the process, so that schedules begin anew
            int status = 0;
            const std::string text = child(
                [&] {
                    setenv("SIMT_SEED", std::to_string(seed).c_str(), 1);
                    std::vector<float> expected;
                    const std::vector<float> result = p.run(&expected);
                    return same(result, expected) ? RIGHT : WRONG;
                },
                &status);
            if (!p.message) {
                CHECK(status == WRONG, "%s, seed %d: status %d, need a wrong result (%d)\n%s", p.what, seed, status,
                      WRONG, text.c_str());
                continue;
            }
            CHECK(status != RIGHT && status != WRONG, "%s, seed %d: not caught", p.what, seed);
            CHECK(text_has(text, p.message), "%s, seed %d: no \"%s\" in:\n%s", p.what, seed, p.message, text.c_str());
        }
    }
}
template <size_t N>
void check_planted(const Planted (&list)[N]) {
    check_planted(list, N);
}

// A call that must end the program with the message.
void check_refused(const char* what, const char* message, const std::function<void()>& fn) {
    int status = 0;
    const std::string text = child([&] { return fn(), RIGHT; }, &status);
    CHECK(status == 128 + SIGABRT && text_has(text, message), "%s: status %d, no \"%s\" in:\n%s", what, status, message,
          text.c_str());
}

// ----------------------------------------------------------------------------
// tests

// The environment variable of the schedule, put back at the end of the scope.
struct Variable {
    const char* name;
    std::string before;
    bool was_set;
    explicit Variable(const char* n) : name(n) {
        const char* text = getenv(n);
        was_set = text != nullptr;
        before = was_set ? text : "";
    }
    ~Variable() { was_set ? setenv(name, before.c_str(), 1) : unsetenv(name); }
};

void results() {
    const Variable seed("SIMT_SEED"), threads("SIMT_THREADS"), streams("SIMT_STREAMS");
    const struct {
        const char* what;
        Run run;
    } list[] = {{"sum", sum_run<NONE>},
                {"product", product_run<NONE>},
                {"halves", halves_run<NONE>},
                {"blocks", blocks_run<NONE>},
                {"streams", streams_run<RIGHT_ORDER>}};
    for (const auto& kernel : list) {
        for (int i = 0; i < 8; i++) {
            setenv("SIMT_SEED", std::to_string(i * 1000003).c_str(), 1);
            setenv("SIMT_THREADS", i % 2 ? "2" : "1", 1);
            setenv("SIMT_STREAMS", i % 4 < 2 ? "queues" : "at once", 1);
            std::vector<float> expected;
            const std::vector<float> result = kernel.run(&expected);
            CHECK(same(result, expected), "%s, seed %d: wrong", kernel.what, i);
        }
    }
}

// Lane l gets row l / 4 of matrix m, elements 2 (l % 4) and the next; with .trans column l / 4, rows 2 (l % 4) and the
// next. Matrices are copied to shared memory first; those of the right half by copies that write zeros.
__global__ void fragments_kernel(uint32_t* out, const bf16* x) {
    DYN_SHARED(bf16, tile);  // (16, 16), rows 24 apart
    const int lane = int(threadIdx.x);
    cp_async_16(tile + lane % 16 * 24, x + lane % 16 * 16);
    cp_async_commit();
    if (lane < 16) {
        cp_async_16_or_zero(tile + lane * 24 + 8, lane % 2 ? x + lane * 16 + 8 : nullptr, lane % 2 != 0);
    } else {
        cp_async_8_or_zero(tile + lane % 16 * 24 + 16, x + lane % 16 * 16, true);
        cp_async_8_or_zero(tile + lane % 16 * 24 + 20, nullptr, false);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t a[4], b[4];
    ldmatrix_x4(a, tile + (lane % 8 + lane / 8 % 2 * 8) * 24 + lane / 16 * 8);
    ldmatrix_x4_trans(b, tile + (lane % 8 + lane / 8 % 2 * 8) * 24 + lane / 16 * 16);
    for (int m = 0; m < 4; m++) {
        out[lane * 8 + m] = a[m];
        out[lane * 8 + 4 + m] = b[m];
    }
}

void fragments() {
    std::vector<bf16> x(256);
    for (size_t i = 0; i < x.size(); i++) {
        x[i].bits = uint16_t(i + 1);
    }
    // What the tile holds at (r, c): see the copies.
    const auto at = [&](int r, int c) -> uint32_t {
        return c < 8    ? x[size_t(r * 16 + c)].bits
               : c < 16 ? (r % 2 ? x[size_t(r * 16 + c)].bits : 0u)
                        : (c < 20 ? x[size_t(r * 16 + c - 16)].bits : 0u);
    };
    Buffer<bf16> in(x);
    Buffer<uint32_t> out(256);
    LAUNCH(fragments_kernel, 1, 32, 16 * 24 * sizeof(bf16), nullptr, out.p, in.p);
    const std::vector<uint32_t> got = out.get();
    for (int lane = 0; lane < 32; lane++) {
        for (int m = 0; m < 4; m++) {
            const int row = m % 2 * 8, g = lane / 4, t = lane % 4 * 2, col = m / 2 * 8;
            const uint32_t plain = at(row + g, col + t) | at(row + g, col + t + 1) << 16;
            const uint32_t trans = at(row + t, 2 * col + g) | at(row + t + 1, 2 * col + g) << 16;
            CHECK(got[size_t(lane * 8 + m)] == plain, "ldmatrix, lane %d, matrix %d: %08x, need %08x", lane, m,
                  got[size_t(lane * 8 + m)], plain);
            CHECK(got[size_t(lane * 8 + 4 + m)] == trans, "ldmatrix.trans, lane %d, matrix %d: %08x, need %08x", lane,
                  m, got[size_t(lane * 8 + 4 + m)], trans);
        }
    }
}

// Every kind of shuffle at a width; a lane whose source is outside its segment keeps its own value, but xor may reach
// back into segments before it.
__global__ void shuffles_kernel(int* out, int width) {
    const int lane = int(threadIdx.x);
    for (int k = 0; k < 32; k++) {
        int* to = out + (k * 32 + lane) * 4;
        to[0] = __shfl_sync(ALL_LANES, lane, k + lane, width);
        to[1] = __shfl_up_sync(ALL_LANES, lane, unsigned(k), width);
        to[2] = __shfl_down_sync(ALL_LANES, lane, unsigned(k), width);
        to[3] = int(__shfl_xor_sync(ALL_LANES, double(lane) + 0.5, k, width));
    }
}

void shuffles() {
    for (int width = 1; width <= 32; width *= 2) {
        Buffer<int> out(32 * 32 * 4);
        LAUNCH(shuffles_kernel, 1, 32, 0, nullptr, out.p, width);
        const std::vector<int> got = out.get();
        for (int k = 0; k < 32; k++) {
            for (int lane = 0; lane < 32; lane++) {
                const int first = lane / width * width, other = lane ^ k;
                const int need[4] = {first + (k + lane) % width, lane - k >= first ? lane - k : lane,
                                     lane + k < first + width ? lane + k : lane, other < first + width ? other : lane};
                for (int i = 0; i < 4; i++) {
                    const int value = got[size_t((k * 32 + lane) * 4 + i)];
                    CHECK(value == need[i], "kind %d, width %d, by %d: lane %d gets %d, need %d", i, width, k, lane,
                          value, need[i]);
                }
            }
        }
    }
}

// Blocks and threads of three dimensions; votes; atomics between blocks, whose tickets are all different.
__global__ void places_kernel(unsigned* out, int* counters, unsigned* tickets) {
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned i = block * threads + thread;
    out[i] =
        threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * (blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z);
    tickets[atomicAdd(&counters[0], 1)]++;
    atomicMax(&counters[1], int(i));
    atomicMin(&counters[2], -int(i));
    if (__all_sync(ALL_LANES, thread < 32) && __any_sync(ALL_LANES, thread == 7) &&
        !__any_sync(ALL_LANES, thread == 40)) {
        atomicAdd(&counters[3], 1);
    }
}

void places() {
    const dim3 grid(3, 4, 2), block(4, 8, 2);
    const unsigned threads = 64, all = 24 * threads;
    Buffer<unsigned> out(all), tickets(std::vector<unsigned>(all, 0));
    Buffer<int> counters(std::vector<int>(4, 0));
    LAUNCH(places_kernel, grid, block, 0, nullptr, out.p, counters.p, tickets.p);
    const std::vector<unsigned> got = out.get(), taken = tickets.get();
    for (unsigned i = 0; i < all; i++) {
        const unsigned t = i % threads, b = i / threads;
        const unsigned need =
            t % 4 + 10 * (t / 4 % 8) + 100 * (t / 32) + 1000 * (b % 3 + 10 * (b / 3 % 4) + 100 * (b / 12));
        CHECK(got[i] == need, "thread %u of block %u is %u, need %u", t, b, got[i], need);
        CHECK(taken[i] == 1, "ticket %u was taken %u times", i, taken[i]);
    }
    const std::vector<int> c = counters.get();
    CHECK(c[0] == int(all) && c[1] == int(all) - 1 && c[2] == 1 - int(all) && c[3] == int(all) / 2,
          "counters %d %d %d %d", c[0], c[1], c[2], c[3]);
}

// Values from the definitions in the CUDA Math API and the PTX ISA.
void arithmetic() {
    CHECK(__byte_perm(0x33221100, 0x77665544, 0x7531) == 0x77553311, "%08x",
          __byte_perm(0x33221100, 0x77665544, 0x7531));
    CHECK(__byte_perm(0x000080ff, 0, 0xa9ba) == 0x00ff0000, "%08x", __byte_perm(0x000080ff, 0, 0xa9ba));
    CHECK(__popc(0xf0f0u) == 8 && __ffs(0) == 0 && __ffs(0x10) == 5 && __clz(0) == 32 && __clz(1) == 31, "bits");
    CHECK(__umulhi(0xffffffffu, 0xffffffffu) == 0xfffffffeu, "umulhi");
    CHECK(__funnelshift_r(0x80000001u, 0x7u, 4) == 0x78000000u, "%08x", __funnelshift_r(0x80000001u, 0x7u, 4));
    CHECK(__brev(1) == 0x80000000u, "brev");
    CHECK(exp2_approx(3) == 8 && exp2_approx(-127) == 0 && exp2_approx(-126) == 0x1p-126f, "exp2_approx");
    CHECK(max(NAN, 1.0f) == 1 && min(2.0f, NAN) == 2, "NaN in min and max");
    // 1 + 2^-8 is halfway between two bf16: to the even one, 1; 1 + 3 2^-8 to 1 + 2^-6.
    CHECK(pack_bf16x2(1 + 0x1p-8f, 1 + 0x3p-8f) == 0x3f823f80, "%08x", pack_bf16x2(1 + 0x1p-8f, 1 + 0x3p-8f));
    CHECK(narrow<bf16>(NAN).bits == 0x7fff && narrow<bf16>(-INFINITY).bits == 0xff80, "NaN and infinity");
    CHECK(narrow<bf16>(3.4e38f).bits == 0x7f80, "rounds up to infinity");
    CHECK(bf16_low(0x3f804000) == 2 && bf16_high(0x3f804000) == 1, "halves of a pair");
}

template <class X, int N, bool B, Mistake M>
__global__ void named_kernel(X*) {}

// The names as `nm -C` prints those of functions, up to their arguments; each once; appended to SIMT_KERNELS.
void kernel_names() {
    const Variable file("SIMT_KERNELS");
    for (int i = 0; i < 2; i++) {
        LAUNCH((named_kernel<bf16, -4, true, NO_WAIT>), 1, 1, 0, nullptr, nullptr);
        LAUNCH(nothing_kernel, 1, 1, 0, nullptr, nullptr);
    }
    const std::string path = path_join(test_directory(), "names");
    setenv("SIMT_KERNELS", path.c_str(), 1);
    simt::names_write();
    std::string text;
    FILE* f = fopen(path.c_str(), "r");
    for (int c; f && (c = getc(f)) != EOF;) {
        text += char(c);
    }
    if (f) {
        fclose(f);
    }
    const std::string need[] = {
        "simt_test::named_kernel<bf16, -4, true, (simt_test::Mistake)" + std::to_string(int(NO_WAIT)) + ">",
        "simt_test::nothing_kernel"};
    for (const std::string& name : need) {
        int times = 0;
        for (const std::string& launched : simt_launched_kernels()) {
            times += launched == name;
        }
        CHECK(times == 1, "%s is named %d times among the kernels launched", name.c_str(), times);
        CHECK(text_has("\n" + text, "\n" + name + "\n"), "no line %s in:\n%s", name.c_str(), text.c_str());
    }
}

// Memory begins as NaN, runs out where it should, and is counted; events measure time.
void runtime() {
    cudaDeviceProp p;
    CHECK(cudaGetDeviceProperties(&p, 0) == cudaSuccess && std::string(p.name) == "stand-in" && p.major == 8, "device");
    size_t left = 0, all = 0, after = 0;
    CUDA_CHECK(cudaMemGetInfo(&left, &all));
    {
        Buffer<float> a(1000);
        CUDA_CHECK(cudaMemGetInfo(&after, &all));
        CHECK(left - after == 4000, "%zu bytes taken, need 4000", left - after);
        for (float x : a.get()) {
            CHECK(x != x, "memory begins as %g, need NaN", double(x));
        }
        CUDA_CHECK(cudaMemsetAsync(a.p, 0, 4000, nullptr));
        CUDA_CHECK(cudaMemcpy2DAsync(a.p + 1, 40, a.p + 500, 20, 8, 2, cudaMemcpyDeviceToDevice, nullptr));
        CHECK(a.get()[0] == 0 && a.get()[999] == 0, "cudaMemsetAsync");
    }
    void* none = &left;
    CHECK(cudaMalloc(&none, all + 1) == cudaErrorMemoryAllocation && none == nullptr, "more than there is");
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation && cudaGetLastError() == cudaSuccess, "the last error, once");
    cudaEvent_t begin = nullptr, end = nullptr;
    float milliseconds = -1;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end) == cudaErrorInvalidResourceHandle, "not recorded");
    CUDA_CHECK(cudaEventRecord(begin, nullptr));
    usleep(2000);
    CUDA_CHECK(cudaEventRecord(end, nullptr));
    CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    CHECK(milliseconds >= 2, "%g ms, need 2 at least", double(milliseconds));
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    cudaGetLastError();
    const Variable real("SIMT_CARD");
    setenv("SIMT_CARD", "GeForce 1:12:1500:7000:256", 1);
    int clock = 0, memory = 0;
    CUDA_CHECK(cudaGetDeviceProperties(&p, 0));
    CUDA_CHECK(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0));
    CUDA_CHECK(cudaDeviceGetAttribute(&memory, cudaDevAttrMemoryClockRate, 0));
    CHECK(std::string(p.name) == "GeForce 1" && p.multiProcessorCount == 12 && p.memoryBusWidth == 256, "%s", p.name);
    CHECK(clock == 1500000 && memory == 7000000, "%d and %d kHz", clock, memory);
    const Variable visible("CUDA_VISIBLE_DEVICES");
    setenv("CUDA_VISIBLE_DEVICES", "", 1);
    int count = 1;
    CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice && count == 0, "%d devices, need none", count);
    cudaGetLastError();
}

__global__ void rounded_sum_kernel(float* out, const float* x) {
    SHARED(float, sums, 8);
    float sum = warp_sum(x[size_t(blockIdx.x) * 256 + threadIdx.x]);
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    for (int i = 0; i < 8; i++) {
        sum += sums[i];
    }
    out[size_t(blockIdx.x) * 256 + threadIdx.x] = sum;
}

// Sums that round, so that an order that depends on the schedule would show.
void any_schedule() {
    const Variable seed("SIMT_SEED"), threads("SIMT_THREADS");
    std::vector<float> x(16 * 256), first;
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = sinf(float(i)) * float(i % 7 + 1);
    }
    for (int i = 0; i < 10; i++) {
        setenv("SIMT_SEED", std::to_string(i).c_str(), 1);
        setenv("SIMT_THREADS", i % 2 ? "2" : "1", 1);
        Buffer<float> in(x), out(x.size());
        LAUNCH(rounded_sum_kernel, 16, 256, 0, nullptr, out.p, in.p);
        const std::vector<float> result = out.get();
        first = i == 0 ? result : first;
        CHECK(same(result, first), "seed %d gives other bits", i);
    }
}

void mistakes_in_blocks() {
    const Planted list[] = {
        {"no barrier after the write", sum_run<NO_BARRIER>, nullptr},
        {"read of what no lane wrote", blocks_run<UNWRITTEN>, nullptr},
        {"barrier in divergent code", blocks_run<DIVERGENT_BARRIER>, "deadlock, every thread waits"},
        {"two barriers", blocks_run<TWO_BARRIERS>, "but other threads of the block wait in __syncthreads"},
        {"write behind dynamic shared memory", blocks_run<PAST_DYNAMIC>,
         "bytes behind the 256 bytes of dynamic shared"},
        {"write behind a SHARED array", blocks_run<PAST_STATIC>,
         "write 0 bytes behind the 256 bytes of a SHARED array"},
#ifdef SIMT_ASAN
        {"write behind global memory", blocks_run<PAST_GLOBAL>, "AddressSanitizer"},
        {"write before global memory", blocks_run<BEFORE_GLOBAL>, "AddressSanitizer"},
        {"wild write", blocks_run<NO_MEMORY>, "AddressSanitizer"},
#else
        {"write behind global memory", blocks_run<PAST_GLOBAL>, "write 0 bytes behind an allocation of 600 bytes"},
        {"write before global memory", blocks_run<BEFORE_GLOBAL>, "write 4 bytes before an allocation of 600 bytes"},
#ifndef SIMT_TSAN
        {"wild write", blocks_run<NO_MEMORY>, "thread (9, 0, 0), lane 9: access to memory that is not there"},
        {"deep stack", blocks_run<DEEP_STACK>, "thread (9, 0, 0), lane 9: the stack of 64 KB is used up"},
#endif
#endif
    };
    check_planted(list);
}

void mistakes_in_warps() {
    const Planted list[] = {
        {"no __syncwarp", halves_run<NO_SYNCWARP>, nullptr},
        {"divergent shuffle", halves_run<DIVERGENT_SHUFFLE>, "of the warp are in __"},
        {"ended lane", halves_run<ENDED_LANE>, "__shfl_down_sync"},
        {"lane that ends", halves_run<LANE_ENDS>, "__shfl_down_sync"},
        {"lane not in the mask", halves_run<LANE_NOT_IN_MASK>, "the lane is not in its mask 0000ffff"},
        {"source not in the mask", halves_run<SOURCE_NOT_IN_MASK>, "which is not in the mask"},
        {"misaligned float2", halves_run<CROOKED_LOAD>, "is not aligned to 8 bytes"},
    };
    check_planted(list);
}

void mistakes_in_products() {
    const Planted list[] = {
        {"no trailing barrier", product_run<NO_TRAILING_BARRIER>, nullptr},
        {"no barrier after the wait", product_run<NO_BARRIER_AFTER_WAIT>, nullptr},
        {"no wait", product_run<NO_WAIT>, "asynchronous copies that it did not wait for"},
        {"wait count one too high", product_run<WAIT_TOO_HIGH>, nullptr},
        {"a1 and a2 exchanged", product_run<SWAPPED_A>, nullptr},
        {"b0 and b1 exchanged", product_run<SWAPPED_B>, nullptr},
        {"misaligned ldmatrix", product_run<CROOKED_LDMATRIX>, "is not aligned to 16 bytes"},
        {"misaligned copy", product_run<CROOKED_COPY>, "one of them not aligned to 16 bytes"},
        {"copy past shared memory", product_run<COPY_PAST_SHARED>, "is outside the block's shared memory"},
        {"copy from past global memory", product_run<COPY_PAST_GLOBAL>, "is outside the device's memory"},
    };
    check_planted(list);
}

void mistakes_between_streams() {
    const Variable streams("SIMT_STREAMS");
    setenv("SIMT_STREAMS", "queues", 1);
    const Planted list[] = {
        {"no wait for an event", streams_run<NO_EVENT_WAIT>, nullptr},
        {"the host does not wait", streams_run<NO_HOST_WAIT>, nullptr},
    };
    check_planted(list);
    check_refused("stream that was destroyed", "does not exist (any more)", [] {
        cudaStream_t s = nullptr;
        cudaStreamCreate(&s);
        cudaStreamDestroy(s);
        LAUNCH(nothing_kernel, 1, 1, 0, s, nullptr);
    });
    // A copy from ordinary memory has read it when the call returns; one stream does its work in order.
    cudaStream_t s = nullptr;
    CUDA_CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    Buffer<float> a(1), b(1);
    float x = 3;
    CUDA_CHECK(cudaMemcpyAsync(a.p, &x, sizeof(x), cudaMemcpyHostToDevice, s));
    x = 4;
    LAUNCH(step_kernel, 1, 1, 0, s, b.p, a.p, 1.0f, 0.0f);
    CHECK(b.get()[0] != b.get()[0], "the kernel was done before anybody waited for it");
    CUDA_CHECK(cudaStreamSynchronize(s));
    CHECK(b.get()[0] == 3, "%g came over, need 3", double(b.get()[0]));
    CUDA_CHECK(cudaStreamDestroy(s));
}

void limits() {
    const float host = 0;
    check_refused("threads", "a block has at most 1024", [] { LAUNCH(nothing_kernel, 1, 1056, 0, nullptr, nullptr); });
    check_refused("threads in z", "(1024, 1024, 64)",
                  [] { LAUNCH(nothing_kernel, 1, dim3(1, 1, 65), 0, nullptr, nullptr); });
    check_refused("no threads", "nothing_kernel: grid (1, 1, 1) of blocks (0, 1, 1)",
                  [] { LAUNCH(nothing_kernel, 1, 0, 0, nullptr, nullptr); });
    check_refused("no blocks", "nothing_kernel: grid (0, 1, 1)",
                  [] { LAUNCH(nothing_kernel, 0, 32, 0, nullptr, nullptr); });
    check_refused("grid", "a grid has 1 to 2147483647, 65535",
                  [] { LAUNCH(nothing_kernel, dim3(1, 65536), 32, 0, nullptr, nullptr); });
    check_refused("negative grid", "a grid or block of -1",
                  [] { LAUNCH(nothing_kernel, -1, 32, 0, nullptr, nullptr); });
    check_refused("shared memory", "102400 bytes of shared memory",
                  [] { LAUNCH(nothing_kernel, 1, 32, 100 << 10, nullptr, nullptr); });
    check_refused("both kinds of shared memory", "32768 bytes of SHARED arrays and 71680 of dynamic",
                  [] { LAUNCH(large_kernel, 1, 32, 70 << 10, nullptr); });
    check_refused("host memory", "argument 1 points to", [&] { LAUNCH(nothing_kernel, 1, 32, 0, nullptr, &host); });
    check_refused("copy to the host as to the device", "is not inside one allocation of the device", [] {
        float a = 0, b = 0;
        cudaMemcpy(&a, &b, sizeof(a), cudaMemcpyHostToDevice);
    });
    check_refused("copy from the device as from the host", "is memory of the device, but the direction says host", [] {
        Buffer<float> a(1), b(1);
        cudaMemcpyAsync(a.p, b.p, sizeof(float), cudaMemcpyHostToDevice, nullptr);
    });
    check_refused("copy past the end", "is not inside one allocation of the device", [] {
        Buffer<float> a(4);
        float b[8];
        cudaMemcpyAsync(b, a.p, sizeof(b), cudaMemcpyDeviceToHost, nullptr);
    });
    check_refused("freed twice", "no such allocation", [] {
        float* p = nullptr;
        cudaMalloc(&p, 4);
        cudaFree(p);
        cudaFree(p);
    });
}

// A communicator of this process alone: the same calls, and what the library would punish.
void nccl() {
    const Variable streams("SIMT_STREAMS");
    setenv("SIMT_STREAMS", "queues", 1);
    ncclUniqueId id;
    ncclComm_t comm = nullptr;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.maxCTAs = 2;
    cudaStream_t s = nullptr;
    CUDA_CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    CHECK(ncclGetUniqueId(&id) == ncclSuccess && ncclCommInitRankConfig(&comm, 1, id, 0, &config) == ncclSuccess,
          "no communicator");
    Buffer<float> a(std::vector<float>{1, 2, 3, 4}), b(4);
    float* const p = a.p;
    ncclAllReduce(p, p, 4, ncclFloat32, ncclSum, comm, s);
    ncclAllGather(p, b.p, 8, ncclUint8, comm, s);
    ncclBroadcast(p, p, 16, ncclUint8, 0, comm, s);
    ncclGroupStart();
    ncclSend(p + 2, 8, ncclUint8, 0, comm, s);
    ncclRecv(b.p + 2, 8, ncclUint8, 0, comm, s);
    ncclGroupEnd();
    CHECK(b.get()[0] != b.get()[0], "done before anybody waited for it");
    CUDA_CHECK(cudaStreamSynchronize(s));
    CHECK(b.get() == (std::vector<float>{1, 2, 3, 4}) && a.get() == b.get(), "one rank changes nothing");
    check_refused("host memory", "ncclBroadcast: the source, 4 bytes", [&] {
        float x = 0;
        ncclBroadcast(&x, &x, 4, ncclUint8, 0, comm, s);
    });
    check_refused("past the end", "ncclAllReduce: the source, 20 bytes",
                  [&] { ncclAllReduce(p, p, 5, ncclFloat32, ncclSum, comm, s); });
    check_refused("half in place", "overlap and are not in place",
                  [&] { ncclAllReduce(p, p + 1, 3, ncclFloat32, ncclSum, comm, s); });
    check_refused("a gather over its own slice", "overlap and are not in place",
                  [&] { ncclAllGather(p + 1, p, 8, ncclUint8, comm, s); });
    check_refused("no such root", "root 1 of 1 ranks", [&] { ncclBroadcast(p, p, 4, ncclUint8, 1, comm, s); });
    check_refused("a send outside a group", "ncclSend outside a group",
                  [&] { ncclSend(p, 4, ncclUint8, 0, comm, s); });
    const auto alone = [&](size_t received) {
        ncclGroupStart();
        ncclSend(p, 4, ncclUint8, 0, comm, s);
        if (received > 0) {
            ncclRecv(p + 1, received, ncclUint8, 0, comm, s);
        }
        ncclGroupEnd();
        cudaStreamSynchronize(s);
    };
    check_refused("a send without its receive", "what rank 0 sends to rank 0 is not what that receives",
                  [&] { alone(0); });
    check_refused("a receive of another size", "is not what that receives", [&] { alone(8); });
    check_refused("two ranks of one process", "rank 0 of 2 with 2 channels, but MPI has rank 0 of 1", [&] {
        ncclComm_t more = nullptr;
        ncclCommInitRankConfig(&more, 2, id, 0, &config);
    });
    ncclCommDestroy(comm);
    CUDA_CHECK(cudaStreamDestroy(s));
}

}  // namespace simt_test

extern const Test simt_tests[] = {{"simt_results", simt_test::results},
                                  {"simt_any_schedule", simt_test::any_schedule},
                                  {"simt_fragments", simt_test::fragments},
                                  {"simt_shuffles", simt_test::shuffles},
                                  {"simt_places", simt_test::places},
                                  {"simt_arithmetic", simt_test::arithmetic},
                                  {"simt_kernel_names", simt_test::kernel_names},
                                  {"simt_runtime", simt_test::runtime},
                                  {"simt_mistakes_in_blocks", simt_test::mistakes_in_blocks},
                                  {"simt_mistakes_in_warps", simt_test::mistakes_in_warps},
                                  {"simt_mistakes_in_products", simt_test::mistakes_in_products},
                                  {"simt_mistakes_between_streams", simt_test::mistakes_between_streams},
                                  {"simt_limits", simt_test::limits},
                                  {"simt_nccl", simt_test::nccl},
                                  {nullptr, nullptr}};
