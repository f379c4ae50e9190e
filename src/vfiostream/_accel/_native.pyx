# cython: language_level=3, cdivision=True
"""The native twin: the functions of ``_pure.py``, which says what each means, without the GIL.

Everything is checked before anything is written. Where memory is reached through numbers from a buffer (the runs), each
number is read once more and checked again right before its use: runs that change underneath give wrong bytes, never an
access out of bounds. Words are read with memcpy, as views may start anywhere.
"""

import sys
from array import array

cimport cython
from cpython.array cimport array as Array, clone
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove

cdef extern from "<endian.h>" nogil:
    uint64_t le64toh(uint64_t)

cdef extern from * nogil:
    int count_trailing_zeros "__builtin_ctzll"(unsigned long long)
    int count_ones "__builtin_popcountll"(unsigned long long)


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
        zero = all_zero(view.start, view.size)
    return zero


def copy(dst, src):
    cdef View target = View(dst, PyBUF_WRITABLE)
    cdef View source = View(src, PyBUF_SIMPLE)
    check_same_length(target, source)
    with nogil:
        memmove(target.start, source.start, target.size)


cdef bint all_zero(const unsigned char *at, Py_ssize_t size) noexcept nogil:
    cdef uint64_t words[8]
    cdef unsigned char rest = 0
    cdef Py_ssize_t n
    while size >= 64:
        memcpy(words, at, 64)
        if words[0] | words[1] | words[2] | words[3] | words[4] | words[5] | words[6] | words[7]:
            return False
        at += 64
        size -= 64
    for n in range(size):
        rest |= at[n]
    return rest == 0


# ---- bitmaps

cdef struct Numbers:
    uint64_t *data
    size_t length
    size_t capacity


def bitmap_runs(bitmap, bits):
    cdef View view = View(bitmap, PyBUF_SIMPLE)
    check_bits(view, bits)
    cdef uint64_t limit = bits
    cdef Numbers found = Numbers(NULL, 0, 0)
    cdef bint complete
    cdef Array runs
    try:
        with nogil:
            complete = find_runs(view.start, limit, &found)
        if not complete:
            raise MemoryError
        runs = clone(array("Q"), found.length, False)
        if found.length:
            memcpy(runs.data.as_voidptr, found.data, found.length * sizeof(uint64_t))
        return runs
    finally:
        free(found.data)


def bitmap_merge(dst, src):
    cdef View target = View(dst, PyBUF_WRITABLE)
    cdef View source = View(src, PyBUF_SIMPLE)
    check_same_length(target, source)
    cdef unsigned char *merged = target.start
    cdef const unsigned char *added = source.start
    cdef Py_ssize_t n
    with nogil:
        for n in range(target.size):
            merged[n] |= added[n]


def bitmap_count(bitmap, bits):
    cdef View view = View(bitmap, PyBUF_SIMPLE)
    check_bits(view, bits)
    cdef uint64_t limit = bits
    cdef uint64_t base = 0
    cdef uint64_t count = 0
    with nogil:
        while base < limit:
            count += count_ones(word_at(view.start, base, limit))
            base += 64
    return count


cdef bint find_runs(const unsigned char *bitmap, uint64_t bits, Numbers *found) noexcept nogil:
    """Append each run's first bit and count; False when memory ran out."""
    cdef uint64_t base = 0
    cdef uint64_t first = 0
    cdef uint64_t before = 0  # The bit below the word at hand; where it is set, a run is open.
    cdef uint64_t word, edges, at
    while base < bits:
        if base % 512 == 0 and before == 0 and bits - base >= 512 and all_zero(bitmap + base // 8, 64):
            base += 512
            continue
        word = word_at(bitmap, base, bits)
        edges = word ^ (word << 1 | before)  # Set where a bit differs from the one below it: starts and ends in turn.
        before = word >> 63
        while edges:
            at = base + count_trailing_zeros(edges)
            edges &= edges - 1
            if found.length % 2 == 0:
                first = at
                if not append(found, first):
                    return False
            elif not append(found, at - first):
                return False
        base += 64
    return before == 0 or append(found, bits - first)


cdef uint64_t word_at(const unsigned char *bitmap, uint64_t base, uint64_t bits) noexcept nogil:
    """The 64 bits from ``base`` on, those from ``bits`` on zero and not read."""
    cdef uint64_t word = 0
    cdef uint64_t left = bits - base
    if left >= 64:
        memcpy(&word, bitmap + base // 8, 8)
        return le64toh(word)
    memcpy(&word, bitmap + base // 8, (left + 7) // 8)
    return le64toh(word) & ((<uint64_t>1 << left) - 1)


cdef bint append(Numbers *numbers, uint64_t number) noexcept nogil:
    cdef size_t capacity
    cdef void *grown
    if numbers.length == numbers.capacity:
        capacity = numbers.capacity * 2 if numbers.capacity else 128
        grown = realloc(numbers.data, capacity * sizeof(uint64_t))
        if grown == NULL:
            return False
        numbers.data = <uint64_t *>grown
        numbers.capacity = capacity
    numbers.data[numbers.length] = number
    numbers.length += 1
    return True


# ---- runs of pages

cdef enum Way:
    MEASURE  # Go over the runs and copy nothing.
    GATHER
    SCATTER

cdef struct Walk:
    const unsigned char *runs
    uint64_t total
    uint64_t index
    uint64_t skip
    unsigned char *memory
    uint64_t memory_pages
    uint64_t page_size


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
    return Walk(runs.start, total, index, skip, memory.start, memory.size // page_size, page_size)


cdef raise_outside(Walk walk):
    raise ValueError(f"run {walk.index} does not lie in the memory of {walk.memory_pages} pages")


# ---- checks

cdef check_same_length(View dst, View src):
    if dst.size != src.size:
        raise ValueError(f"the destination has {dst.size} bytes and the source {src.size}")


cdef check_bits(View bitmap, bits):
    if not 0 <= bits <= 8 * bitmap.size:
        raise ValueError(f"{bits} bits are not in a bitmap of {bitmap.size} bytes")


cdef uint64_t checked_page_size(page_size) except 0:
    if not 0 < page_size <= sys.maxsize:
        raise ValueError(f"{page_size} bytes is not the size of a page")
    return page_size
