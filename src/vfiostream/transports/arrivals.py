"""Those who connect to a listener: what they are is said by their first bytes.

A connection is a link of its own, or a channel of one that is complete when all its channels have come. So nobody is
accepted before he has spoken, and whoever says nothing keeps nobody else out. Invariants:

- A connection that has not been accepted belongs to one of: those who have said nothing yet (``_strangers``), links
  that are not complete (``_gatherings``), what can be accepted (``_waiting``). Each of the three is bounded.
- Whatever strangers do, it costs them their connection and a line in the log, and nobody else anything.
- A link that reconnects is in ``_hosts`` until it is closed, and so long the socket stays, for its next connections.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel

from vfiostream.errors import TransportError
from vfiostream.transports.background import Background, background
from vfiostream.transports.channel import Signal
from vfiostream.transports.channels import ChannelsTransport
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.joining import GOODBYE, one_of, turn_away
from vfiostream.transports.options import RETURN_WITHIN, Options
from vfiostream.transports.polled import PolledTransport
from vfiostream.transports.reconnecting import Gone, ReconnectingTransport
from vfiostream.transports.segments import MAGIC, PREAMBLE_SIZE, Preamble

logger = logging.getLogger("vfiostream.transport")

STRANGERS = 128
"""Connections that have said nothing yet; a further one takes the place of the oldest."""
GATHERINGS = 4
"""Links that are not complete."""
GATHERING_TIMEOUT = 10.0
"""Seconds that the channels of a link may take to come, from the first to the last."""
WAITING = 8
"""Links that may wait to be accepted; one is served at a time."""


class _Gathering:
    """A link whose channels have not all come."""

    def __init__(self, count: int, reconnects: bool) -> None:
        self.count = count
        self.reconnects = reconnects
        self.channels: dict[int, PolledTransport] = {}
        self.over = anyio.Event()
        """It is complete, or given up."""

    def awaits(self, preamble: Preamble, connection: PolledTransport) -> bool:
        """Whether this is one of the channels that have not come, from the one who sent the others."""
        same = (self.count, self.reconnects) == (preamble.channels, preamble.reconnects)
        known = all(connection.peer == other.peer for other in self.channels.values())
        return same and known and preamble.number not in self.channels


class _Host:
    """Gives a link that reconnects one connection after another, as they come."""

    def __init__(self, link: ReconnectingTransport, peer: str | None, memory: int) -> None:
        self.link = link
        self.peer = peer
        """Who it is with (:attr:`~vfiostream.transports.polled.PolledTransport.peer`)."""
        self.attempt = 0
        """Of what came last: nothing older is taken."""
        self._memory = memory
        self._next: Sequence[PolledTransport] | None = None
        self._unused: list[PolledTransport] = []
        """Those that others came after before they were used."""
        self._serving = anyio.CancelScope()

    def come(self, channels: Sequence[PolledTransport]) -> None:
        """``channels`` are what the link goes over from now on, whatever it is believed to have."""
        self._unused.extend(self._next or ())
        self._next = channels
        self._serving.cancel()
        self.link.notify()

    async def run(self) -> None:
        """A task: until the link is over, or its connections do not come."""
        link = self.link
        try:
            while link.open:
                with anyio.move_on_after(link.patience):
                    while self._next is None and link.open:
                        await link.changed()
                if self._next is None:
                    link.give_up()
                    return
                channels, self._next = self._next, None
                while self._unused:
                    await self._unused.pop().aclose()
                with anyio.CancelScope() as self._serving:
                    async with one_of(link.address, channels, self._memory) as inner:
                        try:
                            await link.serve(inner, channels)
                        except Gone as error:
                            link.fail(error)
        finally:
            for channel in (*self._unused, *(self._next or ())):
                await channel.aclose()


@asynccontextmanager
async def arrivals(listener: Listener, options: Options) -> AsyncIterator[Listener]:
    """Listen as ``listener`` does, whose ``accept`` gives a :class:`~vfiostream.transports.polled.PolledTransport` for
    each connection, for links of one and of several channels. Closes it when the context ends.
    """
    if options.silent:
        async with listener:
            yield listener
        return
    async with background() as tasks:
        made = _Arrivals(listener, options, tasks)
        tasks.start_soon(made.run)
        try:
            async with made:
                yield made
        finally:
            await made.shut()


class _Arrivals(Listener):
    def __init__(self, listener: Listener, options: Options, tasks: Background) -> None:
        self.address = listener.address
        self._listener = listener
        self._memory = options.memory
        self._patience = RETURN_WITHIN if options.reconnect is None else options.reconnect
        self._tasks = tasks
        self._hosts: dict[bytes, _Host] = {}
        """By token, the links that may come back."""
        self._shut = False
        self._closed = False
        self._strangers: dict[PolledTransport, None] = {}
        """In the order in which they came."""
        self._gatherings: dict[tuple[bytes, int], _Gathering] = {}
        self._waiting: deque[Transport | TransportError] = deque()
        """What :meth:`accept` gives, or raises."""
        self._came = Signal()
        self._host_ended = Signal()
        self._went = Signal()

    async def accept(self) -> Transport:
        await anyio.lowlevel.checkpoint()
        while not self._waiting:
            if self._closed:
                raise TransportError(f"{self.address}: the listener was closed; open a new one")
            await self._came.wait()
        came = self._waiting.popleft()
        self._went.give()
        if isinstance(came, TransportError):
            raise came
        return came

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        while self._waiting:
            came = self._waiting.popleft()
            if isinstance(came, Transport):
                await came.aclose()
        self._came.give()
        self._went.give()
        if not any(host.link.open for host in self._hosts.values()):
            await self.shut()

    async def shut(self) -> None:
        """Let nobody come back either."""
        self._closed = True
        if self._shut:
            return
        self._shut = True
        with anyio.move_on_after(GOODBYE, shield=True):
            while any(host.link.closed.is_set() for host in self._hosts.values()):
                await self._host_ended.wait()
        await self._listener.aclose()
        for connection in list(self._strangers):
            await self._refuse(connection)
        for gathering in list(self._gatherings.values()):
            await self._give_up(gathering)

    async def run(self) -> None:
        """A task: let them in until the listener is closed."""
        while not self._shut:
            try:
                connection = await self._listener.accept()
            except TransportError as error:
                if self._closed:
                    return
                self._add(error)
                while error in self._waiting:  # Whoever accepts has to do something about it first.
                    await self._went.wait()
                continue
            assert isinstance(connection, PolledTransport)
            self._strangers[connection] = None
            if len(self._strangers) > STRANGERS:
                oldest = next(iter(self._strangers))
                logger.warning("%s: %s has said nothing and makes room for others", self.address, oldest.address)
                await self._refuse(oldest)
            self._tasks.start_soon(self._meet, connection)
            while len(self._waiting) >= WAITING:
                await self._went.wait()

    def _add(self, came: Transport | TransportError) -> None:
        self._waiting.append(came)
        self._came.give()

    async def _refuse(self, connection: PolledTransport) -> None:
        self._strangers.pop(connection, None)
        await connection.aclose()

    # ---- who is it

    async def _meet(self, connection: PolledTransport) -> None:
        """A task: hear what ``connection`` says first, and put it where it belongs."""
        try:
            raw = await _heard(connection, len(MAGIC))
            if raw == MAGIC:
                raw += await _heard(connection, PREAMBLE_SIZE - len(MAGIC))
        except TransportError as error:
            logger.debug("%s: %s", self.address, error)
            await self._refuse(connection)
            return
        if self._strangers.pop(connection, self) is self:
            return  # It was refused meanwhile.
        if not raw:
            logger.debug("%s: %s left without a word", self.address, connection.address)
            await connection.aclose()
        elif raw[: len(MAGIC)] != MAGIC:
            if self._closed:
                await connection.aclose()
                return
            connection.put_back(raw)
            self._add(connection)
        else:
            await self._channel_came(connection, raw)

    async def _channel_came(self, connection: PolledTransport, raw: bytes) -> None:
        try:
            if len(raw) < PREAMBLE_SIZE:
                raise ValueError("ends too early")
            preamble = Preamble.parse(raw)
            link = preamble.token, preamble.attempt
            gathering = self._gatherings.get(link)
            if self._closed and not preamble.reconnects:
                raise ValueError("comes when nobody is waited for any more")
            if gathering is None and len(self._gatherings) >= GATHERINGS:
                raise ValueError("is of a link for which there is no room, as others are not complete; try again later")
        except ValueError as error:
            logger.warning("%s: a channel from %s %s", self.address, connection.address, error)
            await connection.aclose()
            return
        if gathering is None:
            gathering = self._gatherings[link] = _Gathering(preamble.channels, preamble.reconnects)
            self._tasks.start_soon(self._limit, link, gathering)
        if not gathering.awaits(preamble, connection):
            logger.warning(
                "%s: the channels from %s contradict each other, and none of them is taken",
                self.address,
                connection.address,
            )
            await connection.aclose()
            await self._give_up(gathering)
            return
        gathering.channels[preamble.number] = connection
        if len(gathering.channels) == gathering.count:
            gathering.over.set()
            channels = [gathering.channels[number] for number in range(gathering.count)]
            self._complete(preamble, channels)

    def _complete(self, preamble: Preamble, channels: Sequence[PolledTransport]) -> None:
        address = channels[0].address
        if not preamble.reconnects:
            made = ChannelsTransport(address, channels, self._memory)
            self._tasks.start_soon(made.run)
            self._add(made)
            return
        host = self._hosts.get(preamble.token)
        if host is not None and channels[0].peer != host.peer:
            host = None
        if host is not None and preamble.attempt > host.attempt:
            host.attempt = preamble.attempt
            host.come(channels)
        elif preamble.attempt or self._closed or preamble.token in self._hosts:
            logger.warning("%s: a link from %s comes back that is not known here", self.address, address)
            self._tasks.start_soon(turn_away, address, channels, self._memory)
        else:
            link = ReconnectingTransport(address, self._memory, self._patience)
            link.keeps += sum(channel.keeps for channel in channels)
            host = self._hosts[preamble.token] = _Host(link, channels[0].peer, self._memory)
            host.come(channels)
            self._tasks.start_soon(self._host, preamble.token, host)
            self._add(link)

    async def _host(self, token: bytes, host: _Host) -> None:
        try:
            await host.run()
        finally:
            del self._hosts[token]
            self._host_ended.give()
            if self._closed and not self._hosts:
                await self.shut()

    async def _limit(self, token: tuple[bytes, int], gathering: _Gathering) -> None:
        """A task: end ``gathering`` when it is over, or its time is."""
        with anyio.move_on_after(GATHERING_TIMEOUT):
            await gathering.over.wait()
        del self._gatherings[token]
        if not gathering.over.is_set():
            logger.warning(
                "%s: only %d of %d channels of a link came within %g s, and none of them is taken",
                self.address,
                len(gathering.channels),
                gathering.count,
                GATHERING_TIMEOUT,
            )
            await self._give_up(gathering)

    async def _give_up(self, gathering: _Gathering) -> None:
        if gathering.over.is_set() and len(gathering.channels) == gathering.count:
            return
        gathering.over.set()
        for connection in gathering.channels.values():
            await connection.aclose()


async def _heard(connection: PolledTransport, count: int) -> bytes:
    """The next ``count`` bytes; fewer where the stream ends."""
    raw = bytearray(count)
    done = 0
    with memoryview(raw) as view:
        while done < count:
            got = await connection.receive([view[done:]], count - done)
            if got == 0:
                break
            done += got
    return bytes(raw[:done])
