# cython: language_level=3, cdivision=True
"""The native twin: the functions of ``_pure.py``, which says what each means, without the GIL.

The loops that a processor's vector units make faster are in C (``kernels.h``). Everything is checked before anything is
written. Where memory is reached through numbers from a buffer (the runs), each number is read once more and checked
again right before its use: runs that change underneath give wrong bytes, never an access out of bounds. Words are read
with memcpy, as views may start anywhere.
"""

import sys
from array import array

cimport cython
from cpython.array cimport array as Array, clone, resize
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memmove, memset

cdef extern from "<sys/mman.h>" nogil:
    enum:
        MADV_HUGEPAGE
    int madvise(void *, size_t, int)

cdef extern from "kernels.h" nogil:
    enum:
        SEARCH_ROOM

    ctypedef struct Check:
        pass

    ctypedef struct Search:
        const unsigned char *bitmap
        uint64_t bits
        uint64_t gap
        uint64_t *out
        size_t capacity
        size_t length

    ctypedef struct Kernels:
        const char *level
        void (*check_start)(Check *, const unsigned char *, const unsigned char *, size_t, uint64_t) noexcept nogil
        void (*check_copy)(Check *, unsigned char *, const unsigned char *, size_t) noexcept nogil
        bint (*check_finish)(Check *, const unsigned char *, uint64_t *) noexcept nogil
        bint (*is_zero)(const unsigned char *, size_t) noexcept nogil
        uint64_t (*count_bits)(const unsigned char *, uint64_t) noexcept nogil
        void (*extract)(const unsigned char *, int, uint64_t, unsigned char *) noexcept nogil
        bint (*find_runs)(Search *) noexcept nogil
        uint64_t (*count_left)(const Search *) noexcept nogil

    int kernels_here(const Kernels **)

cdef const Kernels *kernels

# Numbers in an array of runs (1 MiB) from which on what is left is counted before more memory is taken, once.
cdef size_t COUNT_FROM = 1 << 17


def levels():
    cdef const Kernels *found[3]
    cdef int count = kernels_here(found)
    return tuple([found[n].level.decode() for n in range(count)])


def use_level(level):
    global kernels
    cdef const Kernels *found[3]
    cdef int n
    for n in range(kernels_here(found)):
        if found[n].level.decode() == level:
            kernels = found[n]
            return
    raise ValueError(f"this processor has no level {level!r}: it has {', '.join(levels())}")


use_level(levels()[-1])


@cython.final
@cython.freelist(8)
cdef class View:
    """A contiguous buffer, held until the last reference to this goes."""

    cdef Py_buffer raw
    cdef unsigned char *start
    cdef Py_ssize_t size

    def __cinit__(self, data, int flags):
        PyObject_GetBuffer(data, &self.raw, flags)
        self.start = <unsigned char *>self.raw.buf
        self.size = self.raw.len

    def __dealloc__(self):
        PyBuffer_Release(&self.raw)


# ---- zeros and copies

def is_zero(data):
    cdef View view = View(data, PyBUF_SIMPLE)
    cdef bint zero
    with nogil:
        zero = kernels.is_zero(view.start, view.size)
    return zero


def nonzero_pages(data, page_size, bitmap):
    cdef View view = View(data, PyBUF_SIMPLE)
    cdef View found = View(bitmap, PyBUF_WRITABLE)
    cdef uint64_t size = checked_page_size(page_size)
    cdef uint64_t pages = view.size // size
    cdef uint64_t count = 0
    cdef uint64_t n
    check_pages(view.size, page_size, found.size)
    with nogil:
        memset(found.start, 0, found.size)
        for n in range(pages):
            if not kernels.is_zero(view.start + n * size, size):
                found.start[n // 8] |= 1 << (n % 8)
                count += 1
    return count


def copy(dst, src):
    cdef View target = View(dst, PyBUF_WRITABLE)
    cdef View source = View(src, PyBUF_SIMPLE)
    check_same_length(target, source)
    with nogil:
        memmove(target.start, source.start, target.size)


def copy_check(dst, src, head, seed):
    cdef View target = View(dst, PyBUF_WRITABLE)
    cdef View source = View(src, PyBUF_SIMPLE)
    cdef View above = View(head, PyBUF_SIMPLE)
    cdef uint64_t start = checked_seed(seed)
    cdef Check check
    cdef uint64_t digest
    cdef bint found
    check_same_length(target, source)
    with nogil:
        kernels.check_start(&check, target.start, above.start, above.size, start)
        kernels.check_copy(&check, target.start, source.start, target.size)
        found = kernels.check_finish(&check, target.start + target.size, &digest)
    return digest if found else None


# ---- bitmaps

def bitmap_runs(bitmap, bits, gap=0):
    cdef View view = View(bitmap, PyBUF_SIMPLE)
    check_bits(view, bits)
    if gap < 0:
        raise ValueError(f"a gap of {gap} bits is less than none")
    cdef Search search
    memset(&search, 0, sizeof(search))
    search.bitmap = view.start
    search.bits = bits
    search.gap = min(gap, bits)
    # Enough for noise of 1 %: what is not used is given back untouched.
    cdef Array runs = clone(array("Q"), min(search.bits // 32, COUNT_FROM) + SEARCH_ROOM, False)
    cdef bint done = False
    cdef size_t capacity
    while True:
        search.out = <uint64_t *>runs.data.as_voidptr
        search.capacity = len(runs)
        with nogil:
            done = kernels.find_runs(&search)
            if done:
                capacity = search.length
            elif search.capacity < COUNT_FROM:
                capacity = 2 * search.capacity
            else:
                capacity = search.length + 2 * kernels.count_left(&search) + 2 * SEARCH_ROOM
        resize(runs, capacity)
        if done:
            return runs
        if search.capacity >= COUNT_FROM:
            ask_for_large_pages(runs.data.as_voidptr, capacity * sizeof(uint64_t))


cdef ask_for_large_pages(void *start, size_t size):
    """Runs of noise are larger than their bitmap, and the first touch of small pages takes longer than finding them."""
    cdef size_t offset = -<size_t>start & 0xFFFF  # No processor's small pages are larger than 64 KiB.
    madvise(<char *>start + offset, size - offset, MADV_HUGEPAGE)  # Where there are none all is as it was.


def bitmap_merge(dst, src):
    cdef View target = View(dst, PyBUF_WRITABLE)
    cdef View source = View(src, PyBUF_SIMPLE)
    check_same_length(target, source)
    cdef unsigned char *merged = target.start
    cdef const unsigned char *added = source.start
    cdef Py_ssize_t size = target.size
    cdef Py_ssize_t n
    with nogil:
        for n in range(size):
            merged[n] |= added[n]


def bitmap_and_not(dst, src):
    cdef View target = View(dst, PyBUF_WRITABLE)
    cdef View source = View(src, PyBUF_SIMPLE)
    check_same_length(target, source)
    cdef unsigned char *left = target.start
    cdef const unsigned char *removed = source.start
    cdef Py_ssize_t size = target.size
    cdef Py_ssize_t n
    with nogil:
        for n in range(size):
            left[n] &= ~removed[n]


def bitmap_extract(bitmap, first, bits, out):
    cdef View source = View(bitmap, PyBUF_SIMPLE)
    cdef View target = View(out, PyBUF_WRITABLE)
    if not 0 <= first <= 8 * source.size or not 0 <= bits <= 8 * source.size - first:
        raise ValueError(f"{bits} bits from bit {first} on are not in a bitmap of {source.size} bytes")
    if target.size != (bits + 7) // 8:
        raise ValueError(f"{bits} bits do not fill {target.size} bytes")
    cdef Py_ssize_t byte = first // 8
    cdef int shift = first % 8
    cdef uint64_t count = bits
    with nogil:
        kernels.extract(source.start + byte, shift, count, target.start)


def bitmap_count(bitmap, bits):
    cdef View view = View(bitmap, PyBUF_SIMPLE)
    check_bits(view, bits)
    cdef uint64_t limit = bits
    cdef uint64_t count
    with nogil:
        count = kernels.count_bits(view.start, limit)
    return count


# ---- runs of pages

cdef enum Way:
    MEASURE  # Go over the runs and copy nothing.
    GATHER
    GATHER_CHECK
    SCATTER

cdef struct Walk:
    const unsigned char *runs
    uint64_t total
    uint64_t index
    uint64_t skip
    unsigned char *memory
    uint64_t memory_pages
    uint64_t page_size
    Check *check  # Of what is gathered, where it is checked.


def gather(memory, runs, index, skip, out, page_size):
    cdef View source = View(memory, PyBUF_SIMPLE)
    cdef View target = View(out, PyBUF_WRITABLE)
    cdef View pairs = View(runs, PyBUF_SIMPLE)
    cdef uint64_t size = checked_page_size(page_size)
    cdef uint64_t room = target.size // size
    cdef Walk walk = start_walk(pairs, index, skip, source, size)
    cdef Walk trial = walk
    cdef uint64_t pages
    cdef bint sound
    with nogil:
        sound = step(&trial, room, &pages, NULL, MEASURE) and step(&walk, room, &pages, target.start, GATHER)
    if not sound:
        raise_outside(trial)
    return pages * size, walk.index, walk.skip


def gather_check(memory, runs, index, skip, out, page_size, head, seed):
    cdef View source = View(memory, PyBUF_SIMPLE)
    cdef View target = View(out, PyBUF_WRITABLE)
    cdef View pairs = View(runs, PyBUF_SIMPLE)
    cdef View above = View(head, PyBUF_SIMPLE)
    cdef uint64_t start = checked_seed(seed)
    cdef uint64_t size = checked_page_size(page_size)
    cdef uint64_t room = target.size // size
    cdef Check check
    cdef Walk walk = start_walk(pairs, index, skip, source, size)
    cdef Walk trial = walk
    cdef uint64_t pages
    cdef uint64_t digest
    cdef bint sound, found
    with nogil:
        kernels.check_start(&check, target.start, above.start, above.size, start)
        walk.check = &check
        sound = step(&trial, room, &pages, NULL, MEASURE) and step(&walk, room, &pages, target.start, GATHER_CHECK)
        found = sound and kernels.check_finish(&check, target.start + pages * size, &digest)
    if not sound:
        raise_outside(trial)
    return pages * size, walk.index, walk.skip, digest if found else None


def scatter(memory, runs, index, skip, data, page_size):
    cdef View target = View(memory, PyBUF_WRITABLE)
    cdef View source = View(data, PyBUF_SIMPLE)
    cdef View pairs = View(runs, PyBUF_SIMPLE)
    cdef uint64_t size = checked_page_size(page_size)
    cdef uint64_t wanted = source.size // size
    if source.size % size:
        raise ValueError(f"{source.size} bytes are not a whole number of pages of {page_size} bytes")
    cdef Walk walk = start_walk(pairs, index, skip, target, size)
    cdef Walk trial = walk
    cdef uint64_t pages
    cdef bint sound
    with nogil:
        sound = step(&trial, wanted, &pages, NULL, MEASURE)
        if sound and pages == wanted:
            sound = step(&walk, wanted, &pages, source.start, SCATTER)
    if not sound:
        raise_outside(trial)
    if pages != wanted:
        raise ValueError(f"{wanted} pages are more than the runs have left")
    return walk.index, walk.skip


cdef bint step(Walk *walk, uint64_t room, uint64_t *pages, unsigned char *packed, Way way) noexcept nogil:
    """Go over the next ``room`` pages, or what the runs have, and count them; False where a run leaves the memory."""
    cdef uint64_t first, count, taken
    cdef unsigned char *span
    pages[0] = 0
    while room and walk.index < walk.total:
        memcpy(&first, walk.runs + 16 * walk.index, 8)
        memcpy(&count, walk.runs + 16 * walk.index + 8, 8)
        if first > walk.memory_pages or count > walk.memory_pages - first or walk.skip > count:
            return False
        taken = min(count - walk.skip, room)
        span = walk.memory + (first + walk.skip) * walk.page_size
        if way == GATHER:
            memmove(packed + pages[0] * walk.page_size, span, taken * walk.page_size)
        elif way == GATHER_CHECK:
            kernels.check_copy(walk.check, packed + pages[0] * walk.page_size, span, taken * walk.page_size)
        elif way == SCATTER:
            memmove(span, packed + pages[0] * walk.page_size, taken * walk.page_size)
        pages[0] += taken
        room -= taken
        walk.skip += taken
        if walk.skip == count:
            walk.index += 1
            walk.skip = 0
    return True


cdef Walk start_walk(View runs, index, skip, View memory, uint64_t page_size) except *:
    cdef uint64_t total = runs.size // 16
    cdef uint64_t count = 0
    if runs.size % 16:
        raise ValueError(f"runs of {runs.size} bytes are not pairs of 64-bit numbers")
    if 0 <= index < total:
        memcpy(&count, runs.start + 16 * <uint64_t>index + 8, 8)
    if not 0 <= index <= total or not 0 <= skip <= count:
        raise ValueError(f"page {skip} of run {index} is not in the {total} runs")
    return Walk(runs.start, total, index, skip, memory.start, memory.size // page_size, page_size, NULL)


cdef raise_outside(Walk walk):
    raise ValueError(f"run {walk.index} does not lie in the memory of {walk.memory_pages} pages")


# ---- checks

cdef check_same_length(View dst, View src):
    if dst.size != src.size:
        raise ValueError(f"the destination has {dst.size} bytes and the source {src.size}")


cdef check_pages(Py_ssize_t size, page_size, Py_ssize_t bitmap_size):
    if size % page_size or bitmap_size != (size // page_size + 7) // 8:
        raise ValueError(f"a bitmap of {bitmap_size} bytes is not one of the {page_size} byte pages of {size} bytes")


cdef check_bits(View bitmap, bits):
    if not 0 <= bits <= 8 * bitmap.size:
        raise ValueError(f"{bits} bits are not in a bitmap of {bitmap.size} bytes")


cdef uint64_t checked_page_size(page_size) except 0:
    if not 0 < page_size <= sys.maxsize:
        raise ValueError(f"{page_size} bytes is not the size of a page")
    return page_size


cdef uint64_t checked_seed(seed) except? 0:
    if not 0 <= seed <= 0xFFFFFFFFFFFFFFFF:
        raise ValueError(f"a seed of {seed} is not an unsigned number of 64 bits")
    return seed
