/* The kernels, for whatever level of processor the file that includes this one is compiled. LEVEL is its name. */
#include "kernels.h"

#include <endian.h>
#include <string.h>

/* A copy is looked at in pieces of this size. Smaller ones start the processor's copying and prefetching too often (16 KiB
 * takes a fifth longer), larger ones don't stay in every second-level cache together with their source.
 */
#define PIECE (64 << 10)

/* So many edges are made runs at a time, while they are in the cache. */
#define SETTLE 2048

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
    check->hashed = check->seen = dst;
    check->zero = true;
}

/* Look at what was copied since the last look, which ends at `end`. Zeros are hashed only when something else follows. */
static void check_look(Check *check, const unsigned char *end)
{
    check->zero = check->zero && is_zero(check->seen, (size_t)(end - check->seen));
    check->seen = end;
    if (!check->zero) {
        XXH3_64bits_update(&check->state, check->hashed, (size_t)(end - check->hashed));
        check->hashed = end;
    }
}

static void check_copy(Check *check, unsigned char *dst, const unsigned char *src, size_t size)
{
    while (size) {
        size_t part = PIECE - (size_t)(dst - check->seen);
        if (part > size)
            part = size;
        memcpy(dst, src, part);
        /* The source may change meanwhile: the compiler must not read it in place of its copy. */
        __asm__ volatile("" ::: "memory");
        dst += part;
        src += part;
        size -= part;
        if (dst - check->seen == PIECE)
            check_look(check, dst);
    }
}

static bool check_finish(Check *check, const unsigned char *end, uint64_t *digest)
{
    check_look(check, end);
    if (check->zero && check->hashed != end)
        return false;
    *digest = XXH3_64bits_digest(&check->state);
    return true;
}

/* ---- bitmaps */

/* The 64 bits that begin with byte `at`. */
static inline uint64_t word_at(const unsigned char *at)
{
    uint64_t word;
    memcpy(&word, at, 8);
    return le64toh(word);
}

/* The last bits, fewer than 64, as a word; none beyond them is read. */
static uint64_t last_word(const unsigned char *at, uint64_t bits)
{
    uint64_t word = 0;
    memcpy(&word, at, (bits + 7) / 8);
    return le64toh(word) & ((UINT64_C(1) << bits) - 1);
}

static uint64_t count_bits(const unsigned char *bitmap, uint64_t bits)
{
    uint64_t count = 0, words = bits / 64;
    for (uint64_t n = 0; n < words; n++)
        count += (uint64_t)__builtin_popcountll(word_at(bitmap + 8 * n));
    return count + (uint64_t)__builtin_popcountll(last_word(bitmap + 8 * words, bits % 64));
}

/* 64 bits from bit `shift` of byte `at` on; nine bytes are read. */
static inline uint64_t shifted_word(const unsigned char *at, int shift)
{
    return word_at(at) >> shift | word_at(at + 1) << (8 - shift);
}

static void extract(const unsigned char *bitmap, int shift, uint64_t bits, unsigned char *out)
{
    if (bits == 0)
        return;
    uint64_t words = (bits - 1) / 64, rest = bits - 64 * words;
    for (uint64_t n = 0; n < words; n++) {
        uint64_t word = htole64(shifted_word(bitmap + 8 * n, shift)); /* More bits follow, so the ninth byte is there. */
        memcpy(out + 8 * n, &word, 8);
    }
    unsigned char last[9] = {0};
    memcpy(last, bitmap + 8 * words, (rest + (uint64_t)shift + 7) / 8);
    uint64_t word = htole64(shifted_word(last, shift) & UINT64_MAX >> (64 - rest));
    memcpy(out + 8 * words, &word, (rest + 7) / 8);
}

/* Append the bits that differ from the one below them, starts and ends of runs in turn; returns the end of `out`. */
static inline uint64_t *add_edges(uint64_t *out, uint64_t edges, uint64_t base)
{
    size_t count = (size_t)__builtin_popcountll(edges);
    /* Four at a time whether they are there or not: a branch for each would be guessed wrong too often. */
    for (size_t done = 0;; done += 4) {
        for (size_t n = 0; n < 4; n++) {
            out[done + n] = base + (uint64_t)__builtin_ctzll(edges | UINT64_C(1) << 63);
            edges &= edges - 1;
        }
        if (done + 4 >= count)
            return out + count;
    }
}

/* Make runs (first bit, count) of the edges (first bit, end) found so far. */
static void settle(Search *search)
{
    uint64_t *out = search->out;
    size_t last = search->settled, next = last + 2, length = search->length;
    if (search->gap == 0) {
        for (; next <= length; next += 2)
            out[next - 1] -= out[next - 2];
        search->settled = next - 2;
        return;
    }
    if (length < next)
        return;
    /* The last one stays as it is: what is found next may join it. */
    for (; next + 2 <= length; next += 2) {
        if (out[next] - out[last + 1] > search->gap) {
            out[last + 1] -= out[last];
            last += 2;
            out[last] = out[next];
        }
        out[last + 1] = out[next + 1];
    }
    search->settled = last;
    if (next < length)
        out[last + 2] = out[next]; /* The start of a run that is open. */
    search->length = length - next + last + 2;
}

/* Close what is open; false where there is no room for it. */
static bool finish_runs(Search *search)
{
    if (search->capacity - search->length < SEARCH_ROOM)
        return false;
    if (search->before)
        search->out[search->length++] = search->bits;
    settle(search);
    if (search->settled < search->length)
        search->out[search->settled + 1] -= search->out[search->settled];
    return true;
}

static bool find_runs(Search *search)
{
    const unsigned char *bitmap = search->bitmap;
    uint64_t bits = search->bits;
    /* Not in the search: the compiler would have to think that writing to `out` changes them. */
    uint64_t base = search->base, before = search->before;
    bool room = true;
    while (base < bits) {
        uint64_t left = bits - base;
        if (left >= 512) {
            /* Where no bit differs from the one before the block there is nothing to find. */
            uint64_t same = 0 - before, differ = 0, words[8];
            memcpy(words, bitmap + base / 8, 64);
            for (int n = 0; n < 8; n++)
                differ |= words[n] ^ same;
            if (!differ) {
                base += 512;
                continue;
            }
        }
        if (search->length - search->settled >= SETTLE)
            settle(search);
        room = search->capacity - search->length >= SEARCH_ROOM;
        if (!room)
            break;
        uint64_t *out = search->out + search->length;
        for (uint64_t end = base + (left < 512 ? left : 512); base < end; base += 64) {
            uint64_t word = bits - base >= 64 ? word_at(bitmap + base / 8) : last_word(bitmap + base / 8, bits - base);
            out = add_edges(out, word ^ (word << 1 | before), base);
            before = word >> 63;
        }
        search->length = (size_t)(out - search->out);
    }
    search->base = base < bits ? base : bits;
    search->before = before;
    return room && finish_runs(search);
}

static uint64_t count_left(const Search *search)
{
    const unsigned char *bitmap = search->bitmap + search->base / 8;
    uint64_t left = search->bits - search->base, words = left / 64, count = 0;
    if (words)
        count = (uint64_t)__builtin_popcountll(word_at(bitmap)); /* More than there are in the first word, often. */
    for (uint64_t n = 1; n < words; n++) {
        uint64_t word = word_at(bitmap + 8 * n), below = word << 1 | word_at(bitmap + 8 * n - 8) >> 63;
        count += (uint64_t)__builtin_popcountll(word & ~below);
    }
    return count + 64; /* In what is left of the last word. */
}

const Kernels LEVEL = {LEVEL_NAME, check_start, check_copy, check_finish, is_zero, count_bits, extract, find_runs, count_left};
