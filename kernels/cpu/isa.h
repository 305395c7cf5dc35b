// The leaf kernels of one instruction tier, as a table of plain functions. Each tier is one translation unit
// isa_{ref,avx2,avx512,avx512vnni,amx}.cpp that is built with that tier's flags; the first three export a table, the
// last two what they add to that of avx512. Everything else is built for the plain target. A leaf touches the memory
// it is given and calls nothing outside its unit. OpenMP, allocation and shapes belong to the callers.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/format.h"
#include "kernels/cpu/isa_attention.h"
#include "kernels/cpu/isa_rows.h"

// The 16 values of NF4 (QLoRA, Dettmers et al. 2023, appendix E), ascending: quantiles of N(0, 1) scaled to [-1, 1].
constexpr float NF4_CODE[16] = {-1.0f,
                                -0.6961928009986877f,
                                -0.5250730514526367f,
                                -0.39491748809814453f,
                                -0.28444138169288635f,
                                -0.18477343022823334f,
                                -0.09105003625154495f,
                                0.0f,
                                0.07958029955625534f,
                                0.16093020141124725f,
                                0.24611230194568634f,
                                0.33791524171829224f,
                                0.44070982933044434f,
                                0.5626170039176941f,
                                0.7229568362236023f,
                                1.0f};

struct CpuIsa {
    const char* name;  // ref, avx2, avx512, avx512vnni, amx
    // Its arithmetics; nullptr where the tier lacks one. fp32 is always there.
    const GemmFormat<float>*fp32, *int16, *bf16;

    int MR;  // rows of the fp32 format's register tile, which is attention's as well

    // out (k, width), row stride ldo: out[i][j] = in[j][i] for j < n, 0 for n <= j < width; in (n, k), row stride ldi.
    void (*transpose)(float* out, size_t ldo, int width, const float* in, size_t ldi, int n, size_t k);

    // out (n): the absmax first .. first + n of a matrix that is quantised twice, map8[absmax8[b]] * absmax2[b / 256],
    // rounded, + offset, rounded.
    void (*nf4_absmax)(float* out, const uint8_t* absmax8, const float* absmax2, const float* map8, float offset,
                       size_t first, size_t n);

    // out (n): the NF4 weights first .. first + n of a tensor as the matmul sees them, round_to_bf16(code * absmax).
    // codes from the start of the tensor; absmax[0] belongs to the block of weight `first` and is finite.
    void (*nf4_run)(float* out, const uint8_t* codes, const float* absmax, size_t first, size_t n);

    // out (n) = the f16 elements in (n), widened.
    void (*widen_f16)(float* out, const uint16_t* in, size_t n);

    // out (groups, 4): philox4x32 (kernels/random.h) of the counters {head[0], head[1], head[2], first + i}.
    void (*philox_run)(uint32_t* out, const uint32_t head[3], const uint32_t key[2], uint32_t first, size_t groups);

    CpuRows rows;  // exp, softmax, norms, SwiGLU over one row
    AttentionKernels<float> attention;
    const AttentionTiles* attention_tiles = nullptr;  // where the tier has any; beside the format bf16
};

extern const CpuIsa cpu_isa_ref, cpu_isa_avx2, cpu_isa_avx512;
extern const GemmFormat<float> gemm_int16_avx512vnni, gemm_bf16_amx;
extern const AttentionTiles attention_tiles_amx;
// The best tier of this processor, or the one named; nullptr when it is unknown or the processor lacks it.
const CpuIsa* cpu_isa_choose(const char* name_or_null);
// The one that the environment variable TRAIN_LLAMA_CPU names (for tests), or the best.
const CpuIsa* cpu_isa_asked();
