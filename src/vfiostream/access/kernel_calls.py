"""The system calls and files of the kernel that kernel access uses: the one seam at which tests put another kernel.

Everything here may block and runs in the thread of an access (:mod:`vfiostream.access.kernel_thread`), and everything
raises ``OSError``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from vfiostream.buffers import Buffer

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
]  # fmt: skip
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value
MAX_ATTRIBUTE = 4096
"""Bytes of a file in sysfs that are read: they are a page at most."""
MAX_VIEWS = 1024
"""Buffers that the kernel takes in one call: ``UIO_MAXIOV`` of ``include/uapi/linux/uio.h``."""


class Kernel:
    """The kernel we run on; ``root`` is where its ``/dev``, ``/sys`` and ``/proc`` are."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    # ---- file descriptors

    def open(self, path: str) -> int:
        """Open a device node to read and write."""
        return os.open(self.root / path.lstrip("/"), os.O_RDWR | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: bytearray | int = 0) -> int:
        """An ioctl; a structure is changed in place, and the return value is the ioctl's own. Python holds its lock
        during one with more than 1024 bytes: what may take long passes pointers.
        """
        return fcntl.ioctl(fd, request, argument)

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        return os.preadv(fd, [into], offset)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def read(self, fd: int, into: Sequence[memoryview]) -> int:
        return os.readv(fd, into[:MAX_VIEWS])

    def write(self, fd: int, data: Buffer) -> int:
        return os.write(fd, data)

    # ---- memory, by address: what only the kernel is to reach

    def map_memory(self, fd: int, offset: int, length: int, *, writable: bool) -> int:
        """Map a piece of a file for others to reach through our page tables; returns its address. What lies behind
        the end of a regular file is refused: a device could not reach it.
        """
        held = os.fstat(fd)
        if stat.S_ISREG(held.st_mode) and held.st_size < offset + length:
            raise OSError(errno.EINVAL, f"the file holds {held.st_size} bytes")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = _LIBC.mmap(None, length, protection, mmap.MAP_SHARED, fd, offset)
        if address in (None, _MAP_FAILED):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return int(address)

    def unmap_memory(self, address: int, length: int) -> None:
        if _LIBC.munmap(address, length) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def release(self) -> str:
        return os.uname().release

    # ---- sysfs, procfs, device nodes

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def names(self, folder: str) -> list[str]:
        """What is in a folder, in order; nothing where there is no such folder."""
        try:
            return sorted(os.listdir(self.path(folder)))
        except OSError:
            return []

    def target(self, name: str) -> str | None:
        """Where a link leads; None where there is no link."""
        try:
            return os.readlink(self.path(name))
        except OSError:
            return None

    def link(self, name: str) -> str | None:
        """The last part of that."""
        target = self.target(name)
        return None if target is None else os.path.basename(target)

    def attribute(self, name: str) -> str | None:
        """Text of a file in sysfs, without white space around it; None where it can't be read."""
        try:
            with open(self.path(name), "rb") as file:
                return file.read(MAX_ATTRIBUTE).decode(errors="replace").strip()
        except OSError:
            return None


def address_of(view: memoryview) -> int:
    """Where ``view`` is in memory; it has to be writable, and to be held for as long as the address is used."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
