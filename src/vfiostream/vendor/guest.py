"""Guest memory as the device sees it: what a client mapped for DMA, and which pages of it the device wrote.

The caller holds the device's lock around every method.

A client that truncates a file it has mapped here makes the next write to it kill this process (SIGBUS); like every
vfio-user server that maps guest memory, this one trusts its client that far.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import mmap
import os
from dataclasses import dataclass, field

from vfiostream.uapi.four_region import PAGE_SIZE

MAX_MAPPINGS = 512
"""DMA mappings a client may have at a time; each holds a file descriptor of this process."""
MAX_GUEST = 1 << 40
"""Bytes of guest memory a client may map: bounds the bitmaps."""


@dataclass(slots=True, eq=False)
class Mapping:
    """One mapping; ``dirty`` has a bit a page."""

    iova: int
    length: int
    writable: bool
    memory: mmap.mmap
    view: memoryview
    dirty: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self.clear()

    @property
    def pages(self) -> int:
        return self.length // PAGE_SIZE

    def clear(self) -> None:
        self.dirty = bytearray((self.pages + 7) // 8)

    def take(self, first: int, count: int) -> int:
        """The bits of ``count`` pages from ``first``, as an integer; clears them."""
        low, high = first // 8, (first + count + 7) // 8
        held = int.from_bytes(self.dirty[low:high], "little")
        mask = ((1 << count) - 1) << first % 8
        self.dirty[low:high] = (held & ~mask).to_bytes(high - low, "little")
        return (held & mask) >> first % 8

    def close(self) -> None:
        self.view.release()
        with contextlib.suppress(BufferError):  # somebody still looks at it: it goes when they let go
            self.memory.close()


class GuestMemory:
    """All mappings of the client, ordered by address."""

    def __init__(self) -> None:
        self._mappings: list[Mapping] = []
        self._writable: list[Mapping] = []
        self._first_page: list[int] = []
        self.pages = 0
        """Pages the device can write, over all mappings."""

    def map(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
        """Map ``length`` bytes of ``fd`` at ``offset``; the caller keeps ``fd``. Raises OSError."""
        if length <= 0 or iova < 0 or offset < 0 or (iova | length | offset) % PAGE_SIZE or iova + length > 1 << 64:
            raise OSError(errno.EINVAL, f"a DMA mapping of {length} bytes at {iova:#x} is not of whole pages")
        if any(iova < other.iova + other.length and other.iova < iova + length for other in self._mappings):
            raise OSError(errno.EINVAL, f"a DMA mapping of {length} bytes at {iova:#x} overlaps another")
        if len(self._mappings) >= MAX_MAPPINGS or length + sum(one.length for one in self._mappings) > MAX_GUEST:
            raise OSError(errno.ENOSPC, f"more than {MAX_MAPPINGS} DMA mappings or {MAX_GUEST} bytes of guest memory")
        if os.fstat(fd).st_size < offset + length:
            raise OSError(errno.EINVAL, f"the file to map at {iova:#x} ends before the mapping does")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            memory = mmap.mmap(fd, length, mmap.MAP_SHARED, protection, offset=offset)
        except ValueError as error:  # mmap looks at the size once more: the file was truncated in between
            raise OSError(errno.EINVAL, f"the file to map at {iova:#x} can't be mapped: {error}") from error
        self._mappings.append(Mapping(iova, length, writable, memory, memoryview(memory)))
        self._index()

    def unmap(self, iova: int, length: int) -> None:
        """Take back the mappings in a range, and what was logged of them. Raises OSError for a range that has none or
        that cuts one.
        """
        end = iova + length
        gone = [one for one in self._mappings if one.iova < end and iova < one.iova + one.length]
        if not gone:
            raise OSError(errno.ENOENT, f"nothing is mapped in the {length} bytes at {iova:#x}")
        if gone[0].iova < iova or gone[-1].iova + gone[-1].length > end:
            raise OSError(errno.EINVAL, f"the {length} bytes at {iova:#x} cut a DMA mapping")
        self._drop(gone)

    def unmap_all(self) -> None:
        self._drop(self._mappings[:])

    def clear_dirty(self) -> None:
        for mapping in self._mappings:
            mapping.clear()

    def take_dirty(self, iova: int, pages: int) -> bytes:
        """The bitmap of ``pages`` pages from ``iova``, which is cleared. Raises OSError unless all of it is mapped."""
        mappings = self._covering(iova, iova + pages * PAGE_SIZE)
        bits, done = 0, 0
        for mapping in mappings:
            first = (iova - mapping.iova) // PAGE_SIZE + done
            count = min(mapping.pages - first, pages - done)
            bits |= mapping.take(first, count) << done
            done += count
        return bits.to_bytes((pages + 7) // 8, "little")

    def take_mapped_dirty(self, iova: int, pages: int) -> bytes:
        """As :meth:`take_dirty`, but what is not mapped counts as clean."""
        bits, end = 0, iova + pages * PAGE_SIZE
        for mapping in self._mappings:
            first, last = max(iova, mapping.iova), min(end, mapping.iova + mapping.length)
            if first < last:
                taken = mapping.take((first - mapping.iova) // PAGE_SIZE, (last - first) // PAGE_SIZE)
                bits |= taken << (first - iova) // PAGE_SIZE
        return bits.to_bytes((pages + 7) // 8, "little")

    def locate(self, page: int) -> tuple[Mapping, int]:
        """The mapping that holds writable page number ``page`` (0 to ``pages`` - 1), and its number in it."""
        at = bisect.bisect_right(self._first_page, page) - 1
        return self._writable[at], page - self._first_page[at]

    def _covering(self, start: int, end: int) -> list[Mapping]:
        """The mappings that hold ``start`` to ``end``, in order; raises OSError for a gap."""
        covered, at = [], start
        for mapping in self._mappings:
            if at < end and mapping.iova <= at < mapping.iova + mapping.length:
                covered.append(mapping)
                at = mapping.iova + mapping.length
        if at < end:
            raise OSError(errno.EINVAL, f"guest memory from {start:#x} to {end:#x} is not all mapped for DMA")
        return covered

    def _drop(self, gone: list[Mapping]) -> None:
        self._mappings = [one for one in self._mappings if one not in gone]
        self._index()
        for mapping in gone:
            mapping.close()

    def _index(self) -> None:
        self._mappings.sort(key=lambda one: one.iova)
        self._writable = [one for one in self._mappings if one.writable]
        ends = list(itertools.accumulate((one.pages for one in self._writable), initial=0))
        self._first_page, self.pages = ends[:-1], ends[-1]
