// Which instruction set this processor has.
#include "abi.h"

extern "C" __attribute__((visibility("default"))) int kva_abi_version() { return KVA_ABI_VERSION; }

// The names of the compiled instruction sets that run here, best first, separated by spaces.
extern "C" __attribute__((visibility("default"))) const char* kva_isas() {
#ifdef KVA_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    if (avx512) return "avx512 avx2 baseline";
    if (avx2) return "avx2 baseline";
#endif
    return "baseline";
}
