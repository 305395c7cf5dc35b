// The GPU device and its ops as the rest of the program sees them: declarations only, no CUDA header, so that every file
// may include this and only gpu*.cu are compiled by nvcc. The definitions are kernels/*.cuh; the meaning of each op is the
// table of kernels.h. The same files compiled by g++ with the stand-in of dev/simt give the same symbols (cuda.cuh).
//
// X is bf16 (training) or float (parity with the CPU). Statistics, adapters, gradients and optimizer state are fp32.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/adamw.h"
#include "kernels/device.h"
#include "kernels/types.h"

struct CUstream_st;
struct Comm;  // kernels/comm.h
struct GpuComm;  // kernels/comm_nccl.cuh: NCCL's communicator, its stream, events
struct GpuPaging;  // kernels/paged.cuh: page-locked memory of the host, streams and slabs for the optimizer's moments
struct GpuState;  // kernels/device.cuh: Lt handle and plans, second stream, arena, dequantised matrices, timers

// Of cuBLASLt, in the arena beside what is planned. What its kernels for sm_90 want; older ones use less.
constexpr size_t LT_WORKSPACE = size_t(32) << 20;

enum class GemmPath : uint8_t { AUTO, FUSED, DEQUANT };  // of NF4 matmuls; AUTO: the table in linear.cuh

struct GpuInfo {
    char name[128] = "";
    int arch = 0;  // 80, 86, 89, 90, 100, 120
    int multiprocessors = 0;
    size_t shared_bytes = 0;  // a block may ask for
    size_t l2_bytes = 0;
    size_t memory = 0;  // of the card, in all
    // What it should sustain, from its clocks: bf16 matrix products, and copies. 0: not known. For plans and shares, never
    // for a choice that changes a bit.
    double gflops = 0, gbytes_per_s = 0;
};

template <class X>
struct Gpu {
    using floatX = X;
    using real = float;
    // Columns that follow a row which is an operand of a linear group: its products with the adapter stand there, so that
    // they are part of the same GEMM (linear.cuh). 16 columns are one step of a tensor core along the contraction.
    static constexpr size_t row_room(int R) { return (size_t(R) + 15) / 16 * 16; }
    // Of the buffer that documents_place writes, for passes of N tokens: cu_seqlens and three lists of tiles.
    static constexpr size_t document_ints(size_t N) { return N + 1 + 3 * 3 * N; }

    int threads = 1;  // of the host, for work that stays there
    GpuInfo info;
    CUstream_st* stream = nullptr;
    char* workspace = nullptr;
    size_t workspace_bytes = 0;
    GemmPath gemm = GemmPath::AUTO;
    GpuState* state = nullptr;
    GpuPaging* paging = nullptr;
    const Comm* comm = nullptr;  // the ranks of this training; nullptr: this process alone
    GpuComm* ranks = nullptr;
};

// ----------------------------------------------------------------------------
// device.cuh

// The first usable GPU, or with several ranks on this machine the local_rank-th (the only one, when the launcher shows each
// its own). "" and *dev open, or why there is none.
template <class X>
std::string device_open(Gpu<X>& dev, int threads, int local_rank = 0, int local_size = 1);
template <class X>
void device_close(Gpu<X>& dev);
// Takes one piece of the card's memory; device_alloc and device_reserve then place in it. "" or why it is not to be had.
// Without it each device_alloc asks the driver.
template <class X>
std::string device_arena(Gpu<X>& dev, size_t bytes);
// 256-byte aligned. Ends the program with a message when there is none.
template <class X>
void* device_alloc(Gpu<X>& dev, size_t bytes, const char* what);
template <class X>
void device_spread(Gpu<X>&, void*, size_t) {}
template <class X>
void device_free(Gpu<X>& dev, void* p);
template <class X>
void device_zero(Gpu<X>& dev, void* p, size_t bytes);
template <class X>
void device_to(Gpu<X>& dev, void* device_p, const void* host_p, size_t bytes);
template <class X>
void device_from(Gpu<X>& dev, void* host_p, const void* device_p, size_t bytes);
template <class X>
void device_reserve(Gpu<X>& dev, size_t bytes);
template <class X>
void device_sync(Gpu<X>& dev);
// Time of the work queued between start and stop, added to *seconds at the next device_sync. Off until timing is on.
template <class X>
void device_timing(Gpu<X>& dev, bool on);
template <class X>
void device_clock_start(Gpu<X>& dev, double* seconds);
template <class X>
void device_clock_stop(Gpu<X>& dev);
// What the card has been asked for by this process since device_open, at most: bytes.
template <class X>
size_t device_peak_bytes(Gpu<X>& dev);

// ----------------------------------------------------------------------------
// ops, as kernels.h has them

template <class X>
void embedding_forward(Gpu<X>& dev, X* out, const int32_t* tokens, const Matrix& wte, size_t N);
template <class X>
void rmsnorm_rstd(Gpu<X>& dev, float* rstd, const X* x, size_t N, int C, double eps);
template <class X>
void rmsnorm_forward(Gpu<X>& dev, X* out, size_t out_stride, const X* x, const int32_t* rows, const float* rstd,
                     const float* w, size_t N, int C);  // row i of out from row rows[i] of x (nullptr: row i)
template <class X>
void rmsnorm_backward(Gpu<X>& dev, X* dx, size_t dx_stride, const X* dout, const X* x, const float* rstd, const float* w,
                      size_t N, int C);
template <class X>
void rope_forward(Gpu<X>& dev, X* qkv, size_t stride, const Rope<float>& rope, size_t N);
template <class X>
void rope_backward(Gpu<X>& dev, X* dqkv, size_t stride, const Rope<float>& rope, size_t N);
template <class X>
void swiglu_forward(Gpu<X>& dev, X* out, size_t out_stride, const X* gate_up, size_t N, int F);
template <class X>
void swiglu_backward(Gpu<X>& dev, X* dgate_up, size_t stride, const X* dout, const X* gate_up, size_t N, int F);
// out (N, C) = the LoRA input under dropout, in (N, C) rows apart as given; add: out += instead (gradient of the input).
template <class X>
void dropout_rows(Gpu<X>& dev, X* out, size_t out_stride, const X* in, size_t in_stride, const Dropout& drop,
                  uint32_t module, size_t N, int C, bool add);

template <class X>
Documents documents_place(Gpu<X>& dev, int32_t* memory, const int32_t* cu_seqlens, int count, int HS);
template <class X>
void attention_forward(Gpu<X>& dev, X* out, size_t out_stride, float* lse, const X* qkv, const Documents& docs, size_t N,
                       int NH, int NKV, int HS);
template <class X>
void attention_backward(Gpu<X>& dev, X* dqkv, size_t dqkv_stride, const X* dout, const X* out, size_t out_stride,
                        const float* lse, const X* qkv, const Documents& docs, size_t N, int NH, int NKV, int HS);
template <class X>
size_t attention_workspace(const Gpu<X>& dev, size_t N, size_t longest, int NH, int NKV, int HS);

template <class X>
void linear_forward(Gpu<X>& dev, X* out, size_t out_stride, X* xa, const LinearInput<X, float>& in,
                    const LinearGroup<float>& g, size_t N, const X* residual, const Rope<float>* rope,
                    const Dropout& drop);
template <class X>
void linear_backward(Gpu<X>& dev, X* din, X* dout, size_t dout_stride, const LinearInput<X, float>& in,
                     const LinearGroup<float>& g, const X* xa, size_t N, const Rope<float>* rope, const Dropout& drop);
template <class X>
void linear_prefetch(Gpu<X>& dev, const LinearGroup<float>& g, size_t N);
template <class X>
size_t linear_workspace(const Gpu<X>& dev, const LinearGroup<float>& g, size_t N);
// Memory beside the workspace that keeps the last groups' weights in 16 bits, where a group at N rows goes that way: the
// greatest linear_slot_bytes of all groups is reserved once, before the first linear op.
template <class X>
size_t linear_slot_bytes(const Gpu<X>& dev, const LinearGroup<float>& g, size_t N);
template <class X>
void linear_slots_reserve(Gpu<X>& dev, size_t bytes);

// GFLOP/s of a large square product, measured now in the workspace (whose contents it destroys).
template <class X>
double matmul_gflops(Gpu<X>& dev);

template <class X>
void classifier(Gpu<X>& dev, float* losses, uint8_t* correct, X* din, const LinearInput<X, float>& in, const Matrix& head,
                const int32_t* rows, const int32_t* labels, size_t n, size_t N, float scale);
template <class X>
void head_logits(Gpu<X>& dev, float* logits, const LinearInput<X, float>& in, const Matrix& head, const int32_t* rows,
                 size_t n);
template <class X>
size_t classifier_workspace(const Gpu<X>& dev, int C, int V, size_t n);

// How a matrix that is stored so is held, so that it is an operand of a GEMM as it stands.
inline Store device_store(const Gpu<bf16>&, Store) {
    return Store::BF16;
}
inline Store device_store(const Gpu<float>&, Store) {
    return Store::F32;
}

// codes ((n + 1) / 2) in device memory and absmax ((n + 63) / 64) on the host, of n weights on the host that begin at a
// block border. Same bytes as the CPU's.
template <class X>
void nf4_quantize(Gpu<X>& dev, uint8_t* codes, float* absmax, const float* w, size_t n);
// Whether nf4_pack takes it: no block of 64 straddles two rows, and tiles are whole.
template <class X>
bool nf4_packs(const Gpu<X>&, const Matrix& w) {
    return w.rows % 64 == 0 && w.cols % 64 == 0;
}
// Codes and absmax of a whole NF4 matrix, in bitsandbytes' order until now, into the order of nf4_matmul.cuh, in place;
// sets w.packed. Does nothing when rows or cols are not multiples of 64.
template <class X>
void nf4_pack(Gpu<X>& dev, Matrix& w);
// Workspace that loading a matrix of that many elements, in chunks of at most `chunk`, needs.
template <class X>
size_t nf4_load_workspace(const Gpu<X>& dev, size_t elements, size_t chunk);

// Zeroed, page-locked memory of the host that the card can reach; freed by device_close. Ends the program with a message when
// there is none.
template <class X>
void* device_alloc_host(Gpu<X>& dev, size_t bytes, const char* what);
// m, and with it its v, is such memory: from now on adamw_update pages them through slabs on the card.
template <class X>
void moments_open(Gpu<X>& dev, const float* m);
// What moments_open takes on the card.
template <class X>
size_t moments_slab_bytes(const Gpu<X>& dev);
// Before the host reads or writes paged moments.
template <class X>
void moments_settle(Gpu<X>& dev);
// Starts to fetch paged moments for the next adamw_update; nothing when they are on the card.
template <class X>
void adamw_prefetch(Gpu<X>& dev, const float* m, const float* v, size_t n);

// Workspace of the three below.
template <class X>
size_t optimizer_workspace(const Gpu<X>& dev);
template <class X>
double sum_squares(Gpu<X>& dev, const float* x, size_t n);
template <class X>
size_t first_nonfinite(Gpu<X>& dev, const float* x, size_t n);
template <class X>
size_t adamw_update(Gpu<X>& dev, float* p, float* m, float* v, const float* g, size_t n, const AdamW& a);

// A number that differs when the bits of x (n) do: the same for any order of addition, to find ranks that have drifted apart.
template <class X>
uint64_t checksum(Gpu<X>& dev, const float* x, size_t n);

// ----------------------------------------------------------------------------
// gpu_comm.cu: tensors over ranks, as comm.h has them. Without NCCL gpu_comm_none.cpp, where comm_attach says so.

// Every rank calls it, after device_open, with its card. "" or the same text on every rank where two use one card; what NCCL
// says may differ from rank to rank.
template <class X>
std::string comm_attach(Gpu<X>& dev, const Comm& comm);
// Waits until every rank has called it, so it belongs on the way out on which all ranks are.
template <class X>
void comm_detach(Gpu<X>& dev);
// What device_close does with ranks that are still attached: work under way is given up, and nobody is waited for.
template <class X>
void comm_abandon(Gpu<X>& dev);
// What NCCL takes of the card's memory, estimated; after comm_attach.
template <class X>
size_t comm_device_bytes(const Gpu<X>& dev, int ranks, int local_ranks);
template <class X>
void comm_sum_begin(Gpu<X>& dev, float* x, size_t n);
template <class X>
void comm_sum_finish(Gpu<X>& dev);
template <class X>
size_t comm_sum_least(const Gpu<X>&) {
    return size_t(4) << 20;  // 16 MB: a few of them cover the latency, the last is what nothing overlaps
}
template <class X>
void comm_gather_begin(Gpu<X>& dev, int number, void* out, const void* slice, size_t bytes);
template <class X>
void comm_gather_finish(Gpu<X>& dev, int number);
template <class X>
void comm_broadcast_device(Gpu<X>& dev, void* p, size_t bytes, int root);
template <class X>
void comm_exchange_device(Gpu<X>& dev, const void* mine, void* const* from, size_t bytes);
