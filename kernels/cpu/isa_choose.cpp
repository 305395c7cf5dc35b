// Which tier runs here. The only place that asks the processor what it has.
#include <cstring>

#include "kernels/cpu/isa.h"

#if defined(__x86_64__)
static bool supported(const CpuIsa& isa) {
    if (&isa == &cpu_isa_avx512) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    if (&isa == &cpu_isa_avx2) {  // F16C, which has no name here with every compiler, is older
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    }
    return true;
}
static const CpuIsa* const tiers[] = {&cpu_isa_avx512, &cpu_isa_avx2, &cpu_isa_ref};
#else
static bool supported(const CpuIsa&) {
    return true;
}
static const CpuIsa* const tiers[] = {&cpu_isa_ref};
#endif

const CpuIsa* cpu_isa_choose(const char* name_or_null) {
    for (const CpuIsa* isa : tiers) {
        if ((!name_or_null || strcmp(isa->name, name_or_null) == 0) && supported(*isa)) {
            return isa;
        }
    }
    return nullptr;
}
