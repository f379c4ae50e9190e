/* The kernels for processors with AVX2; nothing elsewhere. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,bmi,popcnt")
#define LEVEL kernels_avx2
#define LEVEL_NAME "avx2"
#include "kernels_body.h"
#else
typedef int nothing; /* A translation unit must not be empty. */
#endif
