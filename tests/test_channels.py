"""Links of several channels: against the suite of all links, and what only they have."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from vfiostream.testing import LinkContract
from vfiostream.transports import connect, listen, stream
from vfiostream.transports.contract import Transport
from vfiostream.transports.options import Options

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def linked(address: str, channels: int, **options: Any) -> AsyncIterator[tuple[Transport, Transport]]:
    async with listen(address) as listener:
        async with connect(listener.address, Options(channels=channels, **options)) as sender:
            yield sender, await listener.accept()


class TestTwoOverTcp(LinkContract):
    def pair(self) -> Any:
        return linked("tcp:127.0.0.1:0", 2)


class TestFourOverTcp(LinkContract):
    def pair(self) -> Any:
        return linked("tcp:127.0.0.1:0", 4)


class SmallBuffers(LinkContract):
    """Sockets that hold little: a segment is taken in many parts, and all channels are in use."""

    @pytest.fixture(autouse=True)
    def _small_buffers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = stream._socket

        def small(family: socket.AddressFamily) -> socket.socket:
            sock = real(family)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            return sock

        monkeypatch.setattr(stream, "_socket", small)


class TestSixteenOverTcp(SmallBuffers):
    def pair(self) -> Any:
        return linked("tcp:127.0.0.1:0", 16)


class TestTwoOverUnixThatHoldLittle(SmallBuffers):
    links = 0

    def pair(self) -> Any:
        self.links += 1
        return linked(f"unix:{self.folder}/{self.links}", 2)


class TestFourOverUnix(LinkContract):
    links = 0

    def pair(self) -> Any:
        self.links += 1
        return linked(f"unix:{self.folder}/{self.links}", 4)
