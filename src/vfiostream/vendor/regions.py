"""Regions of the reference device, as a client is told of them."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from dataclasses import dataclass

from vfiostream.uapi.four_region import PAGE_SIZE
from vfiostream.vendor.settings import Mmap


@dataclass(slots=True)
class Region:
    """One region; a staging region is a memfd (``fd``), mapped here as ``view``."""

    size: int = 0
    readable: bool = False
    writable: bool = False
    type: tuple[int, int] | None = None
    mappable: tuple[tuple[int, int], ...] = ()
    """(offset, length) of what a client may map."""
    fd: int | None = None
    view: memoryview | None = None
    trapped: int = 0
    """Bytes at the start of a staging region that are registers of the driver's."""

    @property
    def sparse(self) -> bool:
        """Whether only parts can be mapped, which the client has to be told."""
        return bool(self.mappable) and self.mappable != ((0, self.size),)

    def close(self) -> None:
        if self.view is not None and self.fd is not None:
            os.close(self.fd)
            with contextlib.suppress(BufferError):  # somebody still looks at it: it goes when they let go
                self.view.release()


def mappable_areas(size: int, how: Mmap, *, start: int = 0) -> tuple[tuple[int, int], ...]:
    """(offset, length) of what can be mapped of the ``size`` bytes from ``start`` on."""
    if how == "none":
        return ()
    if how == "whole":
        return ((start, size),)
    middle = max(1, size // PAGE_SIZE // 2) * PAGE_SIZE
    areas = ((PAGE_SIZE, middle), (middle + PAGE_SIZE, size))
    return tuple((start + first, end - first) for first, end in areas if first < end)


def staging_region(
    name: str, type_: tuple[int, int], size: int, mappable: tuple[tuple[int, int], ...], *, trapped: int = 0
) -> Region:
    """A region of memory that driver and client pass data through."""
    fd = os.memfd_create(f"vfiostream-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    # A client gets this fd. Without the seals it could shrink the file and have our next access end in SIGBUS.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    mapped = mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return Region(size, True, True, type_, mappable, fd, memoryview(mapped), trapped)
