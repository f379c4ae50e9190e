"""Links of QUIC for tests, and a network in between that misbehaves."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel

from tests.certificates import issued, written
from vfiostream.transports import connect, listen
from vfiostream.transports.contract import Transport
from vfiostream.transports.options import Options


def options_in(folder: Path) -> Options:
    """For both ends, of which either may speak first."""
    return Options(credentials=written(folder, issued("localhost")), silent=True)


@asynccontextmanager
async def linked(options: Options, address: str = "quic:127.0.0.1:0") -> AsyncIterator[tuple[Transport, Transport]]:
    """The sender's end and the receiver's."""
    async with listen(address, options) as listener, connect(listener.address, options) as sender:
        yield sender, await listener.accept()


class Network:
    """Passes datagrams on between a listener and those who take ``address`` for the listener's."""

    def __init__(self, listener: str) -> None:
        self.passes: Callable[[bytes], bool] = lambda _: True
        """Whether a datagram arrives."""
        self.count = 0
        """Datagrams that came here."""
        self._front = _bound()
        self._back: dict[tuple[str, int], socket.socket] = {}
        self._target = ("127.0.0.1", int(listener.rpartition(":")[2]))
        self.address = f"quic:127.0.0.1:{self._front.getsockname()[1]}"

    async def run(self) -> None:
        async with anyio.create_task_group() as self.tasks:
            while True:
                await anyio.wait_readable(self._front)
                data, sender = self._front.recvfrom(65535)
                back = self._back.get(sender)
                if back is None:
                    back = self._back[sender] = _bound()
                    self.tasks.start_soon(self._answer, back, sender)
                self._pass(data, back, self._target)

    async def _answer(self, back: socket.socket, sender: tuple[str, int]) -> None:
        while True:
            await anyio.wait_readable(back)
            self._pass(back.recv(65535), self._front, sender)

    def _pass(self, data: bytes, sock: socket.socket, to: tuple[str, int]) -> None:
        self.count += 1
        if self.passes(data):
            sock.sendto(data, to)

    async def die(self) -> None:
        """From here on nobody listens at ``address``."""
        self.tasks.cancel_scope.cancel()
        await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        self.close()

    def close(self) -> None:
        for sock in (self._front, *self._back.values()):
            sock.close()


def _bound() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    return sock


@asynccontextmanager
async def network(listener: str) -> AsyncIterator[Network]:
    between = Network(listener)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(between.run)
            yield between
            tasks.cancel_scope.cancel()
    finally:
        between.close()
