"""The end of a link of several channels that connects."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import anyio

from vfiostream.errors import TransportError
from vfiostream.transports.background import background
from vfiostream.transports.channels import ChannelsTransport
from vfiostream.transports.contract import Transport
from vfiostream.transports.options import Options
from vfiostream.transports.polled import PolledTransport
from vfiostream.transports.segments import TOKEN_SIZE, Preamble

Dial = Callable[[], Awaitable[PolledTransport]]
"""Opens one connection, or stream of one, to who listens; raises TransportError."""


@asynccontextmanager
async def joined(address: str, options: Options, dial: Dial) -> AsyncIterator[Transport]:
    """A link to ``address`` of ``options.channels`` that ``dial`` opens; closed when the context ends. Raises
    :class:`~vfiostream.errors.TransportError` where one can't be opened.
    """
    async with background() as tasks:
        token = secrets.token_bytes(TOKEN_SIZE)
        connections = await _opened(dial, options.channels)
        try:
            for number, connection in enumerate(connections):
                await connection.send([Preamble(token, number, options.channels).pack()])
        except BaseException:
            await _close(connections)
            raise
        async with ChannelsTransport(address, connections, options.memory) as link:
            tasks.start_soon(link.run)
            yield link


async def _opened(dial: Dial, count: int) -> list[PolledTransport]:
    """``count`` connections, opened side by side; none where one can't be."""
    opened: list[PolledTransport] = []
    failures: list[TransportError] = []

    async def one() -> None:
        try:
            opened.append(await dial())
        except TransportError as error:
            failures.append(error)
            tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(one)
        if failures:
            raise failures[0]
    except BaseException:
        await _close(opened)
        raise
    return opened


async def _close(connections: Sequence[PolledTransport]) -> None:
    for connection in connections:
        await connection.aclose()
