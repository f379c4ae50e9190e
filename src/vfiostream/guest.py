"""Guest memory: named ranges that the device writes by DMA and that move in the same stream.

A range is a guest physical address, a length and a file (or memfd) that holds it; it is mapped here for as long as the
guest is open. A VMM that also knows which pages its vCPUs dirty subclasses :class:`Guest`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from vfiostream._accel import copy, is_zero
from vfiostream.buffers import Buffer
from vfiostream.errors import GuestError, UsageError

PAGE_SIZE = 4096
ADDRESS_SPACE = 1 << 64

_LIBC = ctypes.CDLL(None, use_errno=True)
_ONLY_MAPPED = frozenset({errno.EINVAL, errno.EPERM, errno.EBADF, errno.ESPIPE, errno.ENOSYS, errno.EOPNOTSUPP})
"""What writing to huge pages, devices and sealed files ends with."""
_MADV_POPULATE_WRITE = 23
"""madvise(2), Linux 5.14."""


@dataclass(slots=True)
class GuestRange:
    """``length`` bytes of guest memory from guest physical ``address`` on, both multiples of 4096.

    Raises :class:`~vfiostream.errors.UsageError` where that can't be, or ``fd`` can't be mapped; ``fd`` stays the
    caller's then.
    """

    address: int
    length: int
    fd: int
    """Of the file that holds it, from offset 0 on, and may be longer; the range's own."""
    name: str
    """For messages."""
    view: memoryview = field(init=False, repr=False)
    """The memory itself, shared with everybody who maps it: it changes while it is read."""
    present: int = field(init=False, default=0)
    """Bytes from the start of the range that are in our page tables, by :meth:`make_present`."""
    _writes: bool = field(init=False, repr=False)
    """Whether the file takes writes, or is only for mapping."""
    _start: int = field(init=False, repr=False)
    """Where it is mapped."""

    def __post_init__(self) -> None:
        what = f"guest memory {self.name} at {self.address:#x} has {self.length} bytes"
        if self.address % PAGE_SIZE or self.length % PAGE_SIZE or self.length <= 0:
            raise UsageError(f"{what}: address and length must be multiples of {PAGE_SIZE}, and the length not 0")
        if not 0 <= self.address <= ADDRESS_SPACE - self.length:
            raise UsageError(f"{what}: it must lie between 0 and 2^64")
        try:
            held = os.fstat(self.fd)
            if stat.S_ISREG(held.st_mode) and held.st_size < self.length:
                # Touching what lies beyond the file's end would kill this process (SIGBUS).
                raise UsageError(f"{what}, but its file holds {held.st_size}: make the file as long as the range")
            mapping = mmap.mmap(self.fd, self.length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise UsageError(
                f"guest memory {self.name} can't be mapped ({error.strerror}): give a file that can be read and written"
            ) from error
        except ValueError as error:  # what mmap itself finds wrong with the length, should the file have shrunk
            raise UsageError(f"guest memory {self.name} can't be mapped: {error}") from error
        self.view = memoryview(mapping)
        # What is to be appended to can't be written in place.
        self._writes = not fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_APPEND
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))

    @property
    def pages(self) -> int:
        return self.length // PAGE_SIZE

    def make_present(self) -> None:
        """Have all of the range ready to be written through our mapping: allocated, and in our page tables. Worth it
        for who has the time before a migration, as a target then receives straight into it; holds the calling thread
        (0.25 to 1 s for each GiB), not the interpreter. Does nothing on kernels before Linux 5.14. Raises
        :class:`~vfiostream.errors.GuestError` where there is no memory left: touching it would kill this process.
        """
        if _LIBC.madvise(ctypes.c_void_p(self._start), ctypes.c_size_t(self.length), _MADV_POPULATE_WRITE) == 0:
            self.present = self.length
            return
        number = ctypes.get_errno()
        if number in (errno.EFAULT, errno.ENOMEM):
            raise self._no_memory(self.length, number)

    def write(self, start: int, data: Buffer) -> None:
        """Put ``data`` at ``start``, through the file. For memory that is not present this takes half of the time:
        the pages need not be cleared before they are written, nor come into our page tables. Raises
        :class:`~vfiostream.errors.GuestError` where there is no memory left.
        """
        done = 0
        while self._writes and done < len(data):
            try:
                done += os.pwrite(self.fd, memoryview(data)[done:], start + done)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
                    raise self._no_memory(len(data) - done, error.errno) from error
                if error.errno not in _ONLY_MAPPED:
                    raise GuestError(
                        f"guest memory {self.name} can't be written ({error.strerror}): see to its file system"
                    ) from error
                self._writes = False
        copy(self.view[start + done : start + len(data)], memoryview(data)[done:])

    def _no_memory(self, length: int, number: int) -> GuestError:
        return GuestError(
            f"there is no memory for {length} bytes of guest memory {self.name} ({os.strerror(number)}): free some, or "
            "move to a host that has it"
        )

    def zero(self, start: int, length: int) -> None:
        """Make ``length`` bytes from ``start`` on zeros. What is zeros already stays untouched, and what is a hole in
        the file stays one.
        """
        stop = start + length
        while (start := self._first_data(start, stop)) < stop:
            end = min(stop, start + PAGE_SIZE)  # where its data ends, a file finds out by going over all of it
            if not is_zero(self.view[start:end]):
                ctypes.memset(self._start + start, 0, end - start)
            start = end

    def is_hole(self, start: int, length: int) -> bool:
        """Whether the file holds nothing for ``length`` bytes from ``start`` on, which are zeros then; they are not
        touched. Says no where the file does not know.
        """
        return self._first_data(start, start + length) == start + length

    def _first_data(self, start: int, stop: int) -> int:
        """Where the file holds data first, from ``start`` on; ``stop`` where that is not before it."""
        try:
            return min(stop, os.lseek(self.fd, start, os.SEEK_DATA))
        except OSError as error:
            return stop if error.errno == errno.ENXIO else start  # else it knows nothing of holes

    def close(self) -> None:
        """Let go of the mapping and the file; may be called again."""
        if self.fd >= 0:
            self.view.release()
            os.close(self.fd)
            self.fd = -1


class Guest:
    """The guest whose memory moves with the device.

    This class tracks nothing itself: devices report what they dirty. A VMM overrides the methods for what its vCPUs
    do. Every method is called by one task at a time, and raises nothing but a
    :class:`~vfiostream.errors.VfiostreamError` (:class:`~vfiostream.errors.GuestError` is there for that). Two of them
    clean up, ``stop_tracking`` and ``resume``: they are also called after failures of the others, shielded from
    cancellation, and each is given at most ``Settings.patience`` seconds.
    """

    def __init__(self, ranges: Sequence[GuestRange] = ()) -> None:
        """``ranges`` may come in any order. They are the guest's from here on, and closed with it; where they overlap
        that is a :class:`~vfiostream.errors.UsageError`, and they stay the caller's.
        """
        ordered = sorted(ranges, key=lambda entry: entry.address)
        for low, high in pairwise(ordered):
            if low.address + low.length > high.address:
                raise UsageError(f"guest memory {low.name} and {high.name} overlap at {high.address:#x}")
        self.ranges = tuple(ordered)
        """In the order of their addresses, as both ends number them."""

    @classmethod
    def open(cls, files: Iterable[tuple[int, Path]]) -> Self:
        """Map whole files as guest memory: pairs of guest physical address and file. Raises
        :class:`~vfiostream.errors.UsageError` for a file that can't be.
        """
        ranges: list[GuestRange] = []
        with contextlib.ExitStack() as undo:
            for address, path in files:
                ranges.append(_open_range(address, path))
                undo.callback(ranges[-1].close)
            guest = cls(ranges)
            undo.pop_all()
        return guest

    async def start_tracking(self) -> None:
        """Start to note which pages are dirtied by others than the devices."""

    async def merge_dirty(self, address: int, pages: int, bitmap: memoryview) -> None:
        """OR the pages dirtied since the last call into ``bitmap`` (bit n is page n from ``address``, little endian
        within bytes). Asking clears.
        """

    async def stop_tracking(self) -> None:
        """Nothing is asked any more."""

    async def pause(self) -> None:
        """Stop the vCPUs; the devices are stopped next."""

    async def resume(self) -> None:
        """The migration is off (or the checkpoint is read): let the vCPUs run on. The devices run already."""

    def close(self) -> None:
        """Let go of the memory; may be called again."""
        for entry in self.ranges:
            entry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _open_range(address: int, path: Path) -> GuestRange:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"guest memory {path} can't be opened ({error.strerror}): make a file of the guest's size first, for "
            "example with truncate -s"
        ) from error
    try:
        return GuestRange(address, os.fstat(fd).st_size, fd, str(path))
    except BaseException:
        os.close(fd)
        raise
