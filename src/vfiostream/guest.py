"""Guest memory: named ranges that the device writes by DMA and that move in the same stream.

A range is a guest physical address, a length and a file (or memfd) that holds it; it is mapped here for as long as the
guest is open. A VMM that also knows which pages its vCPUs dirty subclasses :class:`Guest`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from vfiostream.errors import UsageError

PAGE_SIZE = 4096


@dataclass(slots=True)
class GuestRange:
    """``length`` bytes of guest memory from guest physical ``address`` on."""

    address: int
    length: int
    fd: int
    """Of the file that holds it, from offset 0 on; the range's own."""
    name: str
    """For messages."""
    view: memoryview = field(init=False, repr=False)
    """The memory itself, shared with everybody who maps it: it changes while it is read."""

    def __post_init__(self) -> None:
        if self.address % PAGE_SIZE or self.length % PAGE_SIZE or self.length <= 0:
            raise UsageError(
                f"guest memory {self.name} at {self.address:#x} has {self.length} bytes: address and length must be "
                f"multiples of {PAGE_SIZE}, and not 0"
            )
        self.view = memoryview(mmap.mmap(self.fd, self.length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))

    @property
    def pages(self) -> int:
        return self.length // PAGE_SIZE

    def close(self) -> None:
        """Let go of the mapping and the file; may be called again."""
        if self.fd >= 0:
            self.view.release()
            os.close(self.fd)
            self.fd = -1


class Guest:
    """The guest whose memory moves with the device.

    This class tracks nothing itself: devices report what they dirty. A VMM overrides the methods for what its vCPUs
    do. Every method is called by one task at a time; ``stop_tracking`` and ``resume`` also after failures of the
    others, under a shielded, bounded scope.
    """

    def __init__(self, ranges: Sequence[GuestRange] = ()) -> None:
        ordered = sorted(ranges, key=lambda entry: entry.address)
        for low, high in pairwise(ordered):
            if low.address + low.length > high.address:
                raise UsageError(f"guest memory {low.name} and {high.name} overlap at {high.address:#x}")
        self.ranges = tuple(ranges)
        """Owned by the guest from here on: closed with it."""

    @classmethod
    def open(cls, files: Iterable[tuple[int, Path]]) -> Self:
        """Map whole files as guest memory: pairs of guest physical address and file. Raises
        :class:`~vfiostream.errors.UsageError` for a file that can't be.
        """
        ranges: list[GuestRange] = []
        try:
            for address, path in files:
                try:
                    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                except OSError as error:
                    raise UsageError(
                        f"guest memory {path} can't be opened ({error.strerror}): make a file of the guest's size "
                        "first, for example with truncate -s"
                    ) from error
                try:
                    ranges.append(GuestRange(address, os.fstat(fd).st_size, fd, str(path)))
                except (UsageError, OSError, ValueError) as error:
                    os.close(fd)
                    if isinstance(error, UsageError):
                        raise
                    raise UsageError(f"guest memory {path} can't be mapped: {error}") from error
            return cls(ranges)
        except BaseException:
            for entry in ranges:
                entry.close()
            raise

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
