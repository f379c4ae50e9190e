"""Connections within the process whose every call takes or gives as much as a seed says, for tests of channels."""

from __future__ import annotations

import random
from collections.abc import Sequence

import anyio
import anyio.lowlevel

from vfiostream.buffers import Buffer
from vfiostream.transports.polled import PolledTransport


class _Way:
    """One direction."""

    def __init__(self, capacity: int, whim: random.Random) -> None:
        self.capacity = capacity
        self.whim = whim
        self.held = bytearray()
        self.ended = False
        self.carried = 0
        self.changed = anyio.Event()

    def notify(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


class SlowConnection(PolledTransport):
    """One end of :func:`slow_pair`."""

    def __init__(self, name: str, out: _Way, back: _Way) -> None:
        super().__init__(name)
        self.out = out
        self._back = back

    def _write(self, buffers: Sequence[Buffer]) -> int:
        if self.out.ended:
            raise BrokenPipeError(32, "Broken pipe")
        room = self.out.capacity - len(self.out.held)
        if room == 0:
            raise BlockingIOError
        data = b"".join(bytes(buffer) for buffer in buffers)
        data = data[: self.out.whim.randint(1, room)]
        self.out.held += data
        self.out.carried += len(data)
        self.out.notify()
        return len(data)

    def _read(self, into: Sequence[memoryview]) -> int:
        held = self._back.held
        if not held:
            if self._back.ended:
                return 0
            raise BlockingIOError
        most = self._back.whim.randint(1, len(held))
        done = 0
        for view in into:
            count = min(len(view), most - done)
            view[:count] = held[done : done + count]
            done += count
        del held[:done]
        self._back.notify()
        return done

    async def _writable(self) -> None:
        # The bytes of some channels are slow to leave.
        for _ in range(self.out.whim.choice((0, 0, 1, 7))):
            await anyio.lowlevel.checkpoint()
        while len(self.out.held) == self.out.capacity and not self.out.ended:
            await self._change(self.out)

    async def _readable(self, least: int) -> None:
        for _ in range(self._back.whim.choice((0, 0, 1, 5))):
            await anyio.lowlevel.checkpoint()
        while not self._back.held and not self._back.ended:
            await self._change(self._back)

    async def _change(self, way: _Way) -> None:
        if self._closed:
            raise anyio.ClosedResourceError
        await way.changed.wait()
        if self._closed:
            raise anyio.ClosedResourceError

    async def _end(self) -> None:
        self.out.ended = True
        self.out.notify()

    async def _let_go(self) -> None:
        self.cut()

    def cut(self) -> None:
        """Nothing goes either way any more; what has arrived can be read."""
        for way in (self.out, self._back):
            way.ended = True
            way.notify()


def slow_pair(name: str, capacity: int, seed: int) -> tuple[SlowConnection, SlowConnection]:
    whim = random.Random(seed)
    there, back = (_Way(capacity, whim) for _ in range(2))
    return SlowConnection(name, there, back), SlowConnection(name, back, there)
