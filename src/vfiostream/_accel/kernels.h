/* The loops of the native twin that are worth a processor's vector units.
 *
 * They are compiled once for each level of processor (kernels.c, kernels_avx2.c, kernels_avx512.c, all from kernels_body.h),
 * and the best one that the processor at hand can run is taken when the module is loaded. All levels give the same
 * results. They know nothing of Python, check nothing (_native.pyx does) and may run without the GIL.
 */
#ifndef VFIOSTREAM_KERNELS_H
#define VFIOSTREAM_KERNELS_H

/* Everything in the header: no library to link or load, and the compiler makes each level's own code of it. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A copy under way whose bytes are tested for zero and hashed while they are still in the cache. */
typedef struct {
    XXH3_state_t state;
    const unsigned char *seen;   /* Where the copied bytes begin that were not looked at yet. */
    const unsigned char *hashed; /* Where those begin that were not hashed: while all are zero, the first. */
    bool zero;                   /* All bytes that were looked at are zero. */
} Check;

/* A search for runs under way. It stops where `out` is full, and goes on when it has been given more room. */
typedef struct {
    const unsigned char *bitmap;
    uint64_t bits;
    uint64_t gap;
    uint64_t base;   /* Bits below this one have been looked at. */
    uint64_t before; /* The bit below `base`: 1 where a run is open. */
    uint64_t *out;   /* First bit and count of each run; from `settled` on, first bit and end. */
    size_t capacity; /* Numbers that `out` has room for. */
    size_t length;   /* Numbers in `out`. */
    size_t settled;
} Search;

/* `find_runs` needs room for this many numbers to get any further. */
#define SEARCH_ROOM 520

typedef struct {
    const char *level;

    /* Begin a check of `head` and of what will be copied to `dst`. */
    void (*check_start)(Check *check, const unsigned char *dst, const unsigned char *head, size_t head_size, uint64_t seed);
    /* Copy more; `dst` is where the copy before this one ended. */
    void (*check_copy)(Check *check, unsigned char *dst, const unsigned char *src, size_t size);
    /* All is copied, up to `end`; false where that is something and all of it is zero. */
    bool (*check_finish)(Check *check, const unsigned char *end, uint64_t *digest);

    bool (*is_zero)(const unsigned char *data, size_t size);
    uint64_t (*count_bits)(const unsigned char *bitmap, uint64_t bits);
    /* Write `bits` bits, from bit `shift` (0 to 7) of the bitmap on, to `out`, and clear what is left of its last byte. */
    void (*extract)(const unsigned char *bitmap, int shift, uint64_t bits, unsigned char *out);
    /* Go on with the search; false where `out` is full before it is done. */
    bool (*find_runs)(Search *search);
    /* The runs that a search has left to find, or a few more; joined ones count one by one. */
    uint64_t (*count_left)(const Search *search);
} Kernels;

/* Only gcc can be told inside a file what to compile it for; clang makes the plain level alone. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KERNELS_X86
#endif

extern const Kernels kernels_plain, kernels_avx2, kernels_avx512;

/* The levels that this processor can run, the best one last. */
int kernels_here(const Kernels *found[3]);

#endif
