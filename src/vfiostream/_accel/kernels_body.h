/* The kernels, for whatever level of processor the file that includes this one is compiled. LEVEL is its name. */
#include "kernels.h"

#include <endian.h>
#include <string.h>

/* A copy is looked at in blocks of this size, which the nearest caches hold together with their source. */
#define BLOCK (16 << 10)

/* Bytes that are tested without a branch between them. */
#define STRIDE 64

static bool is_zero(const unsigned char *data, size_t size)
{
    unsigned char rest = 0;
    for (; size >= STRIDE; data += STRIDE, size -= STRIDE) {
        uint64_t words[STRIDE / 8], any = 0;
        memcpy(words, data, STRIDE);
        for (int n = 0; n < STRIDE / 8; n++)
            any |= words[n];
        if (any)
            return false;
    }
    for (size_t n = 0; n < size; n++)
        rest |= data[n];
    return rest == 0;
}

/* ---- copies that are checked */

static void check_start(Check *check, const unsigned char *dst, const unsigned char *head, size_t head_size, uint64_t seed)
{
    XXH3_INITSTATE(&check->state);
    XXH3_64bits_reset_withSeed(&check->state, seed);
    XXH3_64bits_update(&check->state, head, head_size);
    check->hashed = dst;
    check->zero = true;
}

static void check_catch_up(Check *check, const unsigned char *end)
{
    XXH3_64bits_update(&check->state, check->hashed, (size_t)(end - check->hashed));
    check->hashed = end;
}

static void check_copy(Check *check, unsigned char *dst, const unsigned char *src, size_t size)
{
    while (size) {
        size_t block = size < BLOCK ? size : BLOCK;
        memcpy(dst, src, block);
        /* The source may change meanwhile: the compiler must not read it in place of its copy. */
        __asm__ volatile("" ::: "memory");
        if (check->zero)
            check->zero = is_zero(dst, block);
        dst += block;
        src += block;
        size -= block;
        if (!check->zero)
            check_catch_up(check, dst); /* Zeros are hashed only when something else follows. */
    }
}

static uint64_t check_finish(Check *check, const unsigned char *end)
{
    check_catch_up(check, end);
    return XXH3_64bits_digest(&check->state);
}

/* ---- bitmaps */

/* The 64 bits from `base` on, those from `bits` on zero and not read. */
static inline uint64_t word_at(const unsigned char *bitmap, uint64_t base, uint64_t bits)
{
    uint64_t word = 0, left = bits - base;
    if (left >= 64) {
        memcpy(&word, bitmap + base / 8, 8);
        return le64toh(word);
    }
    memcpy(&word, bitmap + base / 8, (left + 7) / 8);
    return le64toh(word) & ((UINT64_C(1) << left) - 1);
}

static uint64_t count_bits(const unsigned char *bitmap, uint64_t bits)
{
    uint64_t count = 0, base = 0, words = bits / 64;
    for (uint64_t n = 0; n < words; n++) {
        uint64_t word;
        memcpy(&word, bitmap + 8 * n, 8);
        count += (uint64_t)__builtin_popcountll(word);
    }
    base = 64 * words;
    if (base < bits)
        count += (uint64_t)__builtin_popcountll(word_at(bitmap, base, bits));
    return count;
}

/* Append the bits that differ from the one below them: starts and ends of runs in turn. */
static inline void add_edges(Search *search, uint64_t word)
{
    uint64_t edges = word ^ (word << 1 | search->before);
    size_t count = (size_t)__builtin_popcountll(edges);
    uint64_t *out = search->out + search->length;
    search->before = word >> 63;
    search->length += count;
    /* Four at a time whether they are there or not: a branch for each would be guessed wrong too often. */
    for (size_t done = 0;; done += 4) {
        for (int n = 0; n < 4; n++) {
            *out++ = search->base + (edges ? (uint64_t)__builtin_ctzll(edges) : 0);
            edges &= edges - 1;
        }
        if (done + 4 >= count)
            break;
    }
}

/* Make runs (first bit, count) of the edges (first bit, end) found so far, but for the last, which may still grow. */
static void settle(Search *search)
{
    uint64_t *out = search->out;
    size_t last = search->settled, next = last + 2;
    if (search->length < next)
        return;
    for (; next + 2 <= search->length; next += 2) {
        uint64_t first = out[next], end = out[next + 1];
        if (first - out[last + 1] > search->gap) {
            out[last + 1] -= out[last];
            last += 2;
            out[last] = first;
        }
        out[last + 1] = end;
    }
    search->settled = last;
    if (next < search->length)
        out[last + 2] = out[next]; /* The run that is open. */
    search->length -= next - (last + 2);
}

static bool find_runs(Search *search)
{
    while (search->base < search->bits) {
        uint64_t left = search->bits - search->base;
        if (left >= 512) {
            /* Where no bit differs from the one before the block there is nothing to find. */
            uint64_t same = 0 - search->before, differ = 0, words[8];
            memcpy(words, search->bitmap + search->base / 8, 64);
            for (int n = 0; n < 8; n++)
                differ |= words[n] ^ same;
            if (!differ) {
                search->base += 512;
                continue;
            }
        }
        if (search->length - search->settled >= 4096)
            settle(search); /* While they are in the cache. */
        if (search->capacity - search->length < SEARCH_ROOM)
            return false;
        for (uint64_t end = search->base + (left < 512 ? left : 512); search->base < end; search->base += 64)
            add_edges(search, word_at(search->bitmap, search->base, search->bits));
    }
    if (search->capacity - search->length < SEARCH_ROOM)
        return false;
    if (search->before)
        search->out[search->length++] = search->bits;
    search->before = 0;
    settle(search);
    if (search->length)
        search->out[search->settled + 1] -= search->out[search->settled];
    return true;
}

const Kernels LEVEL = {LEVEL_NAME, check_start, check_copy, check_finish, is_zero, count_bits, find_runs};
