"""Blocks of memory between the event loop and threads that write them to a file or fill them from one.

A thread hop for each chunk costs more than the chunk: so one is paid for a block, and only where somebody waits for it.
The blocks are page-aligned and of whole pages, so that they suit O_DIRECT. Past the page cache a disk is as fast as it
is, for a tenth of a CPU second a GB; through it, the kernel needs 0.3 to 1.6 to find the pages. Invariants:

- A block belongs to the threads while it is busy, and to the event loop while it is not.
- After the first failure no work is done any more, and everybody who asks is told.
- When :meth:`BlockThreads.join` has returned there is no thread, and nobody uses the file.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import anyio
import anyio.lowlevel

BLOCK = 4 << 20
"""Bytes of a block, a multiple of :data:`ALIGNMENT`. From 1 to 16 MiB made no difference that could be measured."""

ALIGNMENT = 4096
"""What O_DIRECT wants offsets and lengths to be multiples of: the sector size of a disk, or less."""


class Block:
    """:data:`BLOCK` bytes for a piece of a file. Memory is used from when it is first written to."""

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.offset = 0
        """Where in the file its first byte belongs."""
        self.size = 0
        """How many bytes from its start on are filled."""
        self.busy = False


class BlockThreads:
    """``count`` threads that do ``work`` on one block after another, in the order of their submission.

    They start with the first block. They are daemons: a process may end though a file system hangs.
    """

    def __init__(self, work: Callable[[Block], None], count: int) -> None:
        self._work = work
        self._count = count
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[Block | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._stopped = False
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def submit(self, block: Block) -> None:
        """Have the work done on ``block``, which is busy until then."""
        while len(self._threads) < self._count:
            thread = threading.Thread(target=self._run, name="vfiostream-file", daemon=True)
            thread.start()
            self._threads.append(thread)
        block.busy = True
        self._jobs.put(block)

    async def done_with(self, block: Block) -> None:
        """Wait until ``block`` is not busy. Raises what the work on any block raised, and
        :class:`anyio.ClosedResourceError` once :meth:`stop` was called. One task at a time may wait.
        """
        while block.busy and self._error is None:
            if self._stopped:
                raise anyio.ClosedResourceError
            await anyio.wait_readable(self._bell)
            os.eventfd_read(self._bell)
        if self._error is not None:
            raise self._error

    async def stop(self) -> None:
        """Let whoever waits go, and have no more work begun; call :meth:`join` next."""
        self._stopped = True
        anyio.notify_closing(self._bell)
        # The waiter goes before the descriptor does: anyio knows it by its number, which the next one may get.
        await anyio.lowlevel.cancel_shielded_checkpoint()

    def join(self) -> None:
        """Wait until the threads have ended; for a thread of its own, as a file system may hang. Call it once."""
        self._stopped = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self._bell)

    def _run(self) -> None:
        while (block := self._jobs.get()) is not None:
            try:
                if self._error is None and not self._stopped:
                    self._work(block)
            except BaseException as error:  # noqa: BLE001 - It is raised from done_with.
                self._error = error
            block.busy = False
            os.eventfd_write(self._bell, 1)


def set_direct(fd: int, direct: bool) -> bool:
    """Have the page cache passed by, or not, from the next call on; return whether it is. Not every file system can."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | (os.O_DIRECT if direct else 0))
    except OSError:
        return False
    return direct
