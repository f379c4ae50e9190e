/* The kernels for any processor, and the choice among them. */
#define LEVEL kernels_plain
#define LEVEL_NAME "plain"
#include "kernels_body.h"

int kernels_here(const Kernels *found[3])
{
    int count = 0;
    found[count++] = &kernels_plain;
#ifdef KERNELS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt")) {
        found[count++] = &kernels_avx2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
            found[count++] = &kernels_avx512;
    }
#endif
    return count;
}
