"""Links of QUIC for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.certificates import issued, written
from vfiostream.transports import connect, listen
from vfiostream.transports.contract import Transport
from vfiostream.transports.options import Options


def options_in(folder: Path) -> Options:
    """For both ends."""
    return Options(credentials=written(folder, issued("localhost")))


@asynccontextmanager
async def linked(options: Options, address: str = "quic:127.0.0.1:0") -> AsyncIterator[tuple[Transport, Transport]]:
    """The sender's end and the receiver's."""
    async with listen(address, options) as listener, connect(listener.address, options) as sender:
        yield sender, await listener.accept()
