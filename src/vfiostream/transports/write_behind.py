"""Writes a file behind its caller's back, in large blocks past the page cache where the file system lets it.

Measured on ext4 with 2 GiB against ``dd conv=fsync``: 2.7 to 7 times as fast, as nothing is left for fsync, for 0.11
CPU seconds a GB instead of 0.7 to 1.1. Where O_DIRECT can't be had, writing to the disk is started after each block.
"""

from __future__ import annotations

import errno
import os
from collections import deque

from vfiostream import _accel
from vfiostream.buffers import Buffer
from vfiostream.transports.blocks import ALIGNMENT, Block, BlockThreads, set_direct

BLOCKS = 3
"""Blocks of a file, 12 MiB in all: one being filled, one being written, one for when the two are not in step."""


class WriteBehind:
    """What comes after the file's start, in order. The descriptor stays the caller's, who uses it between
    :meth:`flush` and the next :meth:`write` only, and after :meth:`join`.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._direct = set_direct(fd, True)
        self._offset = 0
        """Of the block that is being filled."""
        self._blocks = deque(Block() for _ in range(BLOCKS))
        """The first is the one that is being filled, or will be when it is not busy any more."""
        # One thread: blocks written at once were no faster, and would leave holes where one fails.
        self._threads = BlockThreads(self._write_out, 1)

    async def ready(self) -> None:
        """Wait until there is room for a byte at least. Raises as :meth:`write`; nothing is lost by cancelling it."""
        await self._threads.done_with(self._blocks[0])

    async def write(self, buffer: Buffer) -> None:
        """Copy ``buffer``, which may be reused then. Raises ``OSError`` where writing something failed, now or before,
        and :class:`anyio.ClosedResourceError` after :meth:`stop`. What is cancelled has copied an unknown part.
        """
        with memoryview(buffer) as view:
            done = 0
            while done < len(view):
                await self.ready()
                block = self._blocks[0]
                count = min(len(block.view) - block.size, len(view) - done)
                _accel.copy(block.view[block.size : block.size + count], view[done : done + count])
                block.size += count
                done += count
                if block.size == len(block.view):
                    self._hand_over(block)

    async def flush(self) -> None:
        """Wait until everything is written; the disk may still have it in a cache of its own. Errors as :meth:`write`.
        Nothing is written past the page cache after this.
        """
        await self.ready()
        if self._blocks[0].size:
            self._hand_over(self._blocks[0])
        for block in self._blocks:
            await self._threads.done_with(block)

    async def stop(self) -> None:
        """Give up what is not written yet; call :meth:`join` next."""
        await self._threads.stop()

    def join(self) -> None:
        """Wait for the thread to end; for a thread of its own, as the file system may hang. Call it once."""
        self._threads.join()

    def _hand_over(self, block: Block) -> None:
        block.offset = self._offset
        self._offset += block.size
        self._threads.submit(block)
        self._blocks.rotate(-1)

    def _write_out(self, block: Block) -> None:
        done = 0
        while done < block.size:
            whole = (block.size - done) & -ALIGNMENT
            if self._direct and not whole:  # the end of the file
                self._direct = set_direct(self._fd, False)
            end = done + whole if self._direct else block.size
            try:
                done += os.pwrite(self._fd, block.view[done:end], block.offset + done)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                # Some file systems take the flag and then refuse; any does after it has taken a part that is no page.
                self._direct = set_direct(self._fd, False)
        if not self._direct:
            # Has the kernel begin to write; otherwise it would wait for fsync.
            os.posix_fadvise(self._fd, block.offset, block.size, os.POSIX_FADV_DONTNEED)
        block.size = 0
