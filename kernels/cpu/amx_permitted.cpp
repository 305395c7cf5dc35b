// Whether the tiles of AMX may be used. Linux gives a thread's 8 KB of tiles only to processes that have asked for them
// (Documentation/arch/x86/xstate.rst); one request holds for all threads of the process, those to come as well.
#include "kernels/cpu/amx_tiles.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(AMX_STANDIN)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static bool ask() {
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;  // leaf 7, edx: not every compiler has names for them
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}

bool amx_permitted() {
    static const bool permitted = ask();
    return permitted;
}
#else
bool amx_permitted() {
#ifdef AMX_STANDIN
    return true;
#else
    return false;
#endif
}
#endif
