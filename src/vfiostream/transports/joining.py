"""The end of a link of several channels that connects."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import anyio

from vfiostream.errors import TransportError
from vfiostream.transports.background import background
from vfiostream.transports.channels import ChannelsTransport
from vfiostream.transports.contract import Transport
from vfiostream.transports.options import Options
from vfiostream.transports.polled import PolledTransport
from vfiostream.transports.segments import TOKEN_SIZE, Preamble

T = TypeVar("T")
Dial = Callable[[], Awaitable[PolledTransport]]
"""Opens one connection, or stream of one, to who listens; raises TransportError."""


@asynccontextmanager
async def joined(address: str, options: Options, dial: Dial) -> AsyncIterator[Transport]:
    """A link to ``address`` of ``options.channels`` that ``dial`` opens; closed when the context ends. Raises
    :class:`~vfiostream.errors.TransportError` where one can't be opened.
    """
    if options.channels == 1:
        async with await _within(address, options.timeout, dial) as connection:
            yield connection
        return
    token = secrets.token_bytes(TOKEN_SIZE)
    async with background() as tasks:
        connections = await _within(address, options.timeout, partial(_opened, dial, token, options.channels))
        async with ChannelsTransport(address, connections, options.memory) as link:
            tasks.start_soon(link.run)
            yield link


async def _within(address: str, seconds: float | None, work: Callable[[], Awaitable[T]]) -> T:
    try:
        with anyio.fail_after(seconds):
            return await work()
    except TimeoutError as error:
        raise TransportError(
            f"{address}: nobody answered within {seconds:g} s; check the address and the network"
        ) from error


async def _opened(dial: Dial, token: bytes, count: int) -> list[PolledTransport]:
    """``count`` channels, opened side by side; none where one can't be."""
    opened: dict[int, PolledTransport] = {}
    failures: list[TransportError] = []

    async def one(number: int) -> None:
        try:
            opened[number] = await dial()
            await opened[number].send([Preamble(token, number, count).pack()])
        except TransportError as error:
            failures.append(error)
            tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            for number in range(count):
                tasks.start_soon(one, number)
        if failures:
            raise failures[0]
    except BaseException:
        for connection in opened.values():
            await connection.aclose()
        raise
    return [opened[number] for number in range(count)]
