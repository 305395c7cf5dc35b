// Which tier runs here. The only place that asks the processor what it has.
#include <cstdlib>
#include <cstring>

#include "kernels/cpu/isa.h"

#if defined(__x86_64__)
#include "kernels/cpu/amx_tiles.h"

// The two highest tiers are the table of avx512 with more formats.
static CpuIsa with_int16() {
    CpuIsa isa = cpu_isa_avx512;
    isa.name = "avx512vnni";
    isa.int16 = &gemm_int16_avx512vnni;
    return isa;
}
static CpuIsa with_bf16() {
    CpuIsa isa = with_int16();
    isa.name = "amx";
    isa.bf16 = &gemm_bf16_amx;
    isa.attention_tiles = &attention_tiles_amx;
    return isa;
}
static const CpuIsa isa_avx512vnni = with_int16(), isa_amx = with_bf16();

static bool has_avx2() {  // F16C, which has no name here with every compiler, is older
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static bool has_vnni() {
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}
static bool has_amx() {
    return has_vnni() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
           amx_permitted();
}

static const struct {
    const CpuIsa* isa;
    bool (*supported)();
} tiers[] = {{&isa_amx, has_amx},
             {&isa_avx512vnni, has_vnni},
             {&cpu_isa_avx512, has_avx512},
             {&cpu_isa_avx2, has_avx2},
             {&cpu_isa_ref, [] { return true; }}};
#else
static const struct {
    const CpuIsa* isa;
    bool (*supported)();
} tiers[] = {{&cpu_isa_ref, [] { return true; }}};
#endif

const CpuIsa* cpu_isa_choose(const char* name_or_null) {
    for (const auto& tier : tiers) {
        if ((!name_or_null || strcmp(tier.isa->name, name_or_null) == 0) && tier.supported()) {
            return tier.isa;
        }
    }
    return nullptr;
}

const CpuIsa* cpu_isa_asked() {
    const char* name = getenv("TRAIN_LLAMA_CPU");
    return cpu_isa_choose(name && *name ? name : nullptr);
}
