"""Two ends of a link within the process, for tests of everything above the transports.

It holds a bounded number of bytes in each direction, so that backpressure is as real as on a socket.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import anyio.lowlevel

from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost, LocalProtocolError, TransportError
from vfiostream.transports.contract import Transport
from vfiostream.transports.unsent import Unsent


class _Pipe:
    """One direction: bytes on their way, and what each of its ends has said."""

    def __init__(self, capacity: int) -> None:
        self.room = capacity
        self.held = bytearray()
        self.finished = False
        self.writer_gone = False
        self.reader_gone = False
        self._changed = anyio.Event()

    def put(self, data: memoryview) -> int:
        count = min(len(data), self.room)
        self.held += data[:count]
        self.room -= count
        self.notify()
        return count

    def take(self, into: memoryview) -> int:
        count = min(len(into), len(self.held))
        into[:count] = self.held[:count]
        del self.held[:count]
        self.room += count
        self.notify()
        return count

    def notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def change(self) -> None:
        await self._changed.wait()


class MemoryTransport(Transport):
    """One end of :func:`memory_pair`."""

    def __init__(self, address: str, outgoing: _Pipe, incoming: _Pipe) -> None:
        self.address = address
        self.answers = True
        self._outgoing = outgoing
        self._incoming = incoming
        self._torn = False
        self._closed = False

    async def send(self, buffers: Sequence[Buffer]) -> None:
        self._check_can_send()
        await anyio.lowlevel.checkpoint()
        taken = 0
        with Unsent(buffers) as unsent:
            while True:
                self._check_open()
                self._check_reader(taken)
                if not unsent:
                    return
                if self._outgoing.room:
                    count = self._outgoing.put(unsent.head(1)[0])
                    unsent.advance(count)
                    taken += count
                    self._torn = bool(unsent)
                else:
                    await self._outgoing.change()

    async def receive(self, into: Sequence[memoryview], least: int = 1) -> int:
        self._check_open()
        await anyio.lowlevel.checkpoint()
        while True:
            self._check_open()
            if self._incoming.held:
                return sum(self._incoming.take(view) for view in into)
            if self._incoming.finished:
                return 0
            if self._incoming.writer_gone:
                raise ConnectionLost(f"{self.address}: the other end is gone; start over on a new link")
            await self._incoming.change()

    async def finish(self) -> None:
        self._check_can_send()
        await anyio.lowlevel.checkpoint()
        self._check_open()
        self._outgoing.finished = True
        self._outgoing.notify()

    async def aclose(self) -> None:
        self._closed = True
        self._outgoing.writer_gone = True
        self._outgoing.notify()
        self._incoming.reader_gone = True
        self._incoming.notify()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"{self.address}: this end was closed; open a new one")

    def _check_can_send(self) -> None:
        self._check_open()
        if self._outgoing.finished:
            raise LocalProtocolError(f"{self.address}: nothing can be sent or finished after finish")
        self._check_reader(0)
        if self._torn:
            raise TransportError(f"{self.address}: an earlier send stopped part-way; start over on a new link")

    def _check_reader(self, taken: int) -> None:
        if self._outgoing.reader_gone:
            failure = ConnectionLost(f"{self.address}: the other end is gone; start over on a new link")
            failure.taken = taken
            raise failure


def memory_pair(capacity: int = 65536) -> tuple[Transport, Transport]:
    """Return both ends of a link that holds at most ``capacity`` bytes (at least 1) in each direction.

    Closing an end loses what it has not read; what it sent before can still be read.
    """
    there, back = _Pipe(capacity), _Pipe(capacity)
    return MemoryTransport("memory:first", there, back), MemoryTransport("memory:second", back, there)
