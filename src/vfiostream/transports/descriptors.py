"""Pipes, and sockets that came without a word about what they are: a descriptor that is read, one that is written.

Both may be the same socket. With one of them this is a transport of one direction.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import anyio
import anyio.lowlevel

from vfiostream.buffers import Buffer
from vfiostream.errors import LocalProtocolError
from vfiostream.transports.polled import PolledTransport

PIPE_SIZE = 1 << 20
"""Bytes that a pipe is made to hold: what Linux allows everybody (``fs.pipe-max-size``). Its default of 64 KiB has both
ends wake each other for each of them.
"""


@contextmanager
def socket_of(fd: int) -> Iterator[socket.socket]:
    """The socket ``fd``, which stays open when the context ends; raises OSError where it is none."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


class DescriptorTransport(PolledTransport):
    """Owns the descriptors from the start. They are non-blocking meanwhile, which everybody sees who shares them with
    us; those that were not are given back their mode before they are closed.
    """

    def __init__(self, address: str, reads: int | None, writes: int | None, *, answers: bool) -> None:
        super().__init__(address, answers=answers)
        self._reads = reads
        self._writes = writes
        self._blocking = set[int]()
        """Those that were blocking."""
        for fd in {reads, writes} - {None}:
            assert fd is not None
            if os.get_blocking(fd):
                self._blocking.add(fd)
                os.set_blocking(fd, False)
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                try:
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
                except OSError:
                    pass  # The user has too many large pipes, or this one holds more: it is as large as it is.

    def _write(self, buffers: Sequence[Buffer]) -> int:
        if self._writes is None:
            raise self._one_way("read")
        return os.writev(self._writes, buffers)

    def _read(self, into: Sequence[memoryview]) -> int:
        if self._reads is None:
            raise self._one_way("written")
        return os.readv(self._reads, into)

    async def _writable(self) -> None:
        assert self._writes is not None
        await anyio.wait_writable(self._writes)

    async def _readable(self, least: int) -> None:
        assert self._reads is not None
        await anyio.wait_readable(self._reads)

    async def _end(self) -> None:
        if self._writes is None:
            raise self._one_way("read")
        if stat.S_ISSOCK(os.fstat(self._writes).st_mode):
            with socket_of(self._writes) as sock:
                sock.shutdown(socket.SHUT_WR)
        else:
            fd, self._writes = self._writes, None
            self._give_up(fd)

    async def _let_go(self) -> None:
        held = [fd for fd in dict.fromkeys((self._reads, self._writes)) if fd is not None]
        self._reads = self._writes = None
        for fd in held:
            anyio.notify_closing(fd)
        try:
            # The waiters go before the descriptors do: anyio knows them by numbers, which others may get next.
            await anyio.lowlevel.cancel_shielded_checkpoint()
        finally:
            for fd in held:
                self._give_up(fd)

    def _give_up(self, fd: int) -> None:
        if fd in self._blocking:
            os.set_blocking(fd, True)
        os.close(fd)

    def _one_way(self, used: str) -> LocalProtocolError:
        return LocalProtocolError(f"{self.address}: it is one way, and can only be {used}")
