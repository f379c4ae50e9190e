/* The kernels for processors with AVX-512; nothing elsewhere. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,bmi,popcnt,avx512f,avx512bw,avx512vl")
#define LEVEL kernels_avx512
#define LEVEL_NAME "avx512"
#include "kernels_body.h"
#else
typedef int nothing; /* A translation unit must not be empty. */
#endif
