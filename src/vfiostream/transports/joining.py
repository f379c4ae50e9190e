"""The end of a link that connects: over one connection or several, once or as often as it has to."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio

from vfiostream.errors import ConnectionLost, PeerRefused, StreamError, TransportError
from vfiostream.transports.background import background
from vfiostream.transports.channels import ChannelsTransport
from vfiostream.transports.contract import Transport
from vfiostream.transports.options import Options
from vfiostream.transports.polled import PolledTransport
from vfiostream.transports.reconnecting import Gone, ReconnectingTransport, rests_of
from vfiostream.transports.segments import TOKEN_SIZE, Head, Kind, Preamble

logger = logging.getLogger("vfiostream.transport")

Connections = Callable[[int], AbstractAsyncContextManager[Sequence[PolledTransport]]]
"""Opens so many connections, or streams of one, to who listens; they are closed when the context ends. Raises
TransportError."""
GOODBYE = 2.0
"""Seconds that it may take to tell the other end that a link is given up."""
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
"""Seconds between two attempts to reconnect: twice as many each time."""


@asynccontextmanager
async def joined(address: str, options: Options, connections: Connections) -> AsyncIterator[Transport]:
    """A link to ``address`` made of ``connections``, as ``options`` have it; closed when the context ends. Raises
    :class:`~vfiostream.errors.TransportError` where it can't be opened.
    """
    if options.reconnect is None:
        async with connections(options.channels) as opened:
            if options.channels == 1:
                yield opened[0]
                return
            await _introduce(opened, secrets.token_bytes(TOKEN_SIZE))
            async with background() as tasks, ChannelsTransport(address, opened, options.memory) as made:
                tasks.start_soon(made.run)
                yield made
        return
    async with background() as tasks, ReconnectingTransport(address, options.memory, options.reconnect) as link:
        caller = _Caller(link, options, connections)
        tasks.start_soon(caller.run)
        await caller.met()
        try:
            yield link
        finally:
            await link.aclose()
            with anyio.move_on_after(GOODBYE, shield=True):
                await caller.ended.wait()


@asynccontextmanager
async def one_of(
    address: str, connections: Sequence[PolledTransport], memory: int
) -> AsyncIterator[ChannelsTransport | PolledTransport]:
    """One stream of ``connections``, for a link that reconnects and has ``memory`` bytes in all."""
    if len(connections) == 1:
        yield connections[0]
        return
    async with background() as tasks, ChannelsTransport(address, connections, rests_of(memory)) as made:
        tasks.start_soon(made.run)
        yield made


async def _introduce(connections: Sequence[PolledTransport], token: bytes, attempt: int | None = None) -> None:
    """Say on each of ``connections`` of which link it is a channel; ``attempt`` for one that reconnects."""
    for number, connection in enumerate(connections):
        preamble = Preamble(token, number, len(connections), attempt is not None, attempt or 0)
        await connection.send([preamble.pack()])


async def turn_away(address: str, connections: Sequence[PolledTransport], memory: int) -> None:
    """Tell the other end of a link that reconnects that nobody knows it here any more. Raises nothing."""
    try:
        async with one_of(address, connections, memory) as inner, inner:
            with anyio.move_on_after(GOODBYE):
                await inner.send([Head(0, 0, Kind.GONE).pack()])
                await inner.finish()
                scrap = memoryview(bytearray(1024))
                while await inner.receive([scrap]):
                    pass
    except (TransportError, StreamError) as error:
        logger.debug("%s", error)


class _Caller:
    """Gives a link that reconnects one connection after another."""

    def __init__(self, link: ReconnectingTransport, options: Options, connections: Connections) -> None:
        self._link = link
        self._options = options
        self._connections = connections
        self._token = secrets.token_bytes(TOKEN_SIZE)
        self._attempt = 0
        self.ended = anyio.Event()
        self._met = False
        """Whether both ends have ever been connected."""

    async def met(self) -> None:
        """Wait for the first connection; raises what is in its way."""
        while not self._met:
            self._link.check_alive()
            await self._link.changed()

    async def run(self) -> None:
        """A task: connect again whenever the link was lost, until it is over or the time is."""
        try:
            await self._keep()
            if self._met and not self._link.said_goodbye and not self._link.over:
                with anyio.move_on_after(GOODBYE):
                    await self._say_goodbye()
        finally:
            self.ended.set()

    async def _say_goodbye(self) -> None:
        """Come back once more, as the other end waits for that."""
        attempt, self._attempt = self._attempt, self._attempt + 1
        try:
            async with self._connections(self._options.channels) as opened:
                await _introduce(opened, self._token, attempt)
                await turn_away(self._link.address, opened, self._options.memory)
        except TransportError as error:
            logger.debug("%s", error)

    async def _keep(self) -> None:
        link = self._link
        while link.open:
            seconds = link.patience if self._met else math.inf
            with anyio.CancelScope(deadline=anyio.current_time() + seconds) as limit:
                await self._until_lost(limit)
            if limit.cancelled_caught:
                link.give_up()

    async def _until_lost(self, limit: anyio.CancelScope) -> None:
        """Connect, trying until ``limit`` ends it, and serve the link until that connection is lost."""

        served = False

        def met() -> None:
            nonlocal served
            served = self._met = True
            limit.deadline = math.inf

        pause = FIRST_PAUSE
        while not served and not self._link.closed.is_set():
            try:
                await self._once(met)
            except (Gone, PeerRefused) as error:
                self._link.fail(error)
            except TransportError as error:
                if not self._met:
                    self._link.fail(error)
                self._link.could_not(error)
            if not served and not self._link.closed.is_set():
                if not self._met:
                    self._link.fail(ConnectionLost(f"{self._link.address}: {self._link.lost}"))
                    return
                await anyio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _once(self, met: Callable[[], None]) -> None:
        attempt, self._attempt = self._attempt, self._attempt + 1
        link, memory = self._link, self._options.memory
        async with self._connections(self._options.channels) as opened:
            await _introduce(opened, self._token, attempt)
            if attempt == 0:
                link.keeps += sum(connection.keeps for connection in opened)
            async with one_of(link.address, opened, memory) as inner:
                await link.serve(inner, opened, met=met)


@asynccontextmanager
async def side_by_side(
    address: str, timeout: float | None, dial: Callable[[], Awaitable[PolledTransport]], count: int
) -> AsyncIterator[Sequence[PolledTransport]]:
    """``count`` connections that ``dial`` opens, within ``timeout`` seconds."""
    try:
        with anyio.fail_after(timeout):
            opened = await _opened(dial, count)
    except TimeoutError as error:
        raise TransportError(
            f"{address}: nobody answered within {timeout:g} s; check the address and the network"
        ) from error
    try:
        yield opened
    finally:
        await _close(opened)


async def _opened(dial: Callable[[], Awaitable[PolledTransport]], count: int) -> list[PolledTransport]:
    if count == 1:
        return [await dial()]
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
