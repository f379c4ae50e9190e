"""Those who connect to a listener: what they are is said by their first bytes.

A connection is a link of its own, or a channel of one that is complete when all its channels have come. So nobody is
accepted before he has spoken, and whoever says nothing keeps nobody else out. Invariants:

- A connection that has not been accepted belongs to one of: those who have said nothing yet (``_strangers``), links
  that are not complete (``_gatherings``), what can be accepted (``_waiting``). Each of the three is bounded.
- Whatever strangers do, it costs them their connection and a line in the log, and nobody else anything.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel

from vfiostream.errors import TransportError
from vfiostream.transports.background import Background, background
from vfiostream.transports.channel import Signal
from vfiostream.transports.channels import ChannelsTransport
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.options import Options
from vfiostream.transports.polled import PolledTransport
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

    def __init__(self, count: int) -> None:
        self.count = count
        self.channels: dict[int, PolledTransport] = {}
        self.over = anyio.Event()
        """It is complete, or given up."""


@asynccontextmanager
async def arrivals(listener: Listener, options: Options) -> AsyncIterator[Listener]:
    """Listen as ``listener`` does, whose ``accept`` gives a :class:`~vfiostream.transports.polled.PolledTransport` for
    each connection, for links of one and of several channels. Closes it when the context ends.
    """
    if options.silent:
        async with listener:
            yield listener
        return
    async with background() as tasks, _Arrivals(listener, options.memory, tasks) as made:
        tasks.start_soon(made.run)
        yield made


class _Arrivals(Listener):
    def __init__(self, listener: Listener, memory: int, tasks: Background) -> None:
        self.address = listener.address
        self._listener = listener
        self._memory = memory
        self._tasks = tasks
        self._closed = False
        self._strangers: dict[PolledTransport, None] = {}
        """In the order in which they came."""
        self._gatherings: dict[bytes, _Gathering] = {}
        self._waiting: deque[Transport | TransportError] = deque()
        """What :meth:`accept` gives, or raises."""
        self._came = Signal()
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
        await self._listener.aclose()
        for connection in list(self._strangers):
            await self._refuse(connection)
        for gathering in list(self._gatherings.values()):
            await self._give_up(gathering)
        while self._waiting:
            came = self._waiting.popleft()
            if isinstance(came, Transport):
                await came.aclose()
        self._came.give()

    async def run(self) -> None:
        """A task: let them in until the listener is closed."""
        while not self._closed:
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
            connection.put_back(raw)
            self._add(connection)
        else:
            await self._channel_came(connection, raw)

    async def _channel_came(self, connection: PolledTransport, raw: bytes) -> None:
        try:
            if len(raw) < PREAMBLE_SIZE:
                raise ValueError("ends too early")
            preamble = Preamble.parse(raw)
            gathering = self._gatherings.get(preamble.token)
            if gathering is None and len(self._gatherings) >= GATHERINGS:
                raise ValueError("is of a link for which there is no room, as others are not complete; try again later")
        except ValueError as error:
            logger.warning("%s: a channel from %s %s", self.address, connection.address, error)
            await connection.aclose()
            return
        if gathering is None:
            gathering = self._gatherings[preamble.token] = _Gathering(preamble.channels)
            self._tasks.start_soon(self._limit, preamble.token, gathering)
        if (
            gathering.count != preamble.channels
            or preamble.number in gathering.channels
            or any(connection.peer != other.peer for other in gathering.channels.values())
        ):
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
            link = ChannelsTransport(channels[0].address, channels, self._memory)
            self._tasks.start_soon(link.run)
            self._add(link)

    async def _limit(self, token: bytes, gathering: _Gathering) -> None:
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
