"""Memory of other people's files in our address space.

Whoever can truncate such a file can make touching the mapping kill this process (SIGBUS). What lies behind the end of
the file is refused here; a peer that truncates it later is trusted not to, as QEMU trusts it.
"""

from __future__ import annotations

import mmap


class CannotMap(OSError):
    """These bytes of this file can't be mapped; the text says why."""


class Mapping:
    """``length`` bytes of ``fd`` from ``offset`` on, shared; the caller keeps ``fd`` and may close it."""

    view: memoryview
    """The memory; read only unless ``writable`` was asked for."""

    def __init__(self, fd: int, offset: int, length: int, *, writable: bool) -> None:
        if fd < 0 or length <= 0:  # Python's mmap takes -1 for "no file", and 0 for "all there is"
            raise CannotMap(f"{length} bytes of file descriptor {fd}")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            # Of a regular file, Python refuses to map what lies behind its end.
            self._memory = mmap.mmap(fd, length, mmap.MAP_SHARED, protection, offset=offset)
        except (OSError, ValueError, OverflowError) as error:
            raise CannotMap(str(error)) from error
        self.view = memoryview(self._memory)

    def close(self) -> None:
        """Unmap. While somebody still holds a slice of ``view``, the memory stays; it goes with the last slice."""
        try:
            self.view.release()
            self._memory.close()
        except BufferError:
            pass  # a slice is held, see above
