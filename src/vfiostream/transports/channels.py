"""A link of several connections: cut into segments on the way out, in order again on the way in.

A segment goes to a channel that has room, and its length follows from what that channel took lately: so a channel gets
as much as it carries. What a channel did not take of a segment is copied, so that nobody else waits for it. Segments
are read in order, from the channel straight to where they go; what is ahead stays in the other channels, and needs no
memory of ours. Invariants:

- ``_position`` is what was received, ``_found`` has the channel of each segment whose head is here, by position. Each
  segment begins where another has ended: the one at ``_position`` is the next, and one before it is a lie.
- A channel is waited for by one task a direction: for room by the first of its two, for what comes by the second, or by
  whoever receives where that one does not.
- A channel that is lost ends the link, but not before what came on the others was read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import anyio
import anyio.lowlevel

from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost, LocalProtocolError, StreamError, TransportError
from vfiostream.transports.channel import Channel, Signal
from vfiostream.transports.contract import Transport
from vfiostream.transports.polled import PolledTransport
from vfiostream.transports.segments import HEAD_SIZE, Head, Kind
from vfiostream.transports.unsent import Unsent

logger = logging.getLogger("vfiostream.transport")


class ChannelsTransport(Transport):
    """A link over ``connections``, which are this object's. It holds ``memory`` bytes at most. :meth:`run` has to."""

    def __init__(self, address: str, connections: Sequence[PolledTransport], memory: int) -> None:
        self.address = address
        self.answers = True
        self.keeps = memory + sum(connection.keeps for connection in connections)
        count = len(connections)
        self._channels = [Channel(one, number, count, memory // count) for number, one in enumerate(connections)]
        self._closed = False
        self._lost: str | None = None
        """What has become of the link."""
        self._tasks = anyio.CancelScope()

        self._sent = 0
        """Bytes that are a channel's."""
        self._turn = 0
        """The channel that gets the next segment if it has room."""
        self._room = Signal()
        """Given when there may be a channel with room, or none ever again."""
        self._torn = False
        self._finished = False

        self._position = 0
        self._found: dict[int, Channel] = {}
        self._last = 0
        """The channel that brought the last segment: as a rule it brings the next."""
        self._end: int | None = None
        """Where the stream ends, once the other end has said so."""
        self._lie: StreamError | None = None
        """What the other end has done that can't be."""
        self._news = Signal()
        """Given when something may have come, or nothing ever will."""

    async def run(self) -> None:
        """A task: do what has to go on while nobody sends or receives, until the link is closed. It raises nothing."""
        try:
            with self._tasks:
                async with anyio.create_task_group() as tasks:
                    for channel in self._channels:
                        tasks.start_soon(self._settle, channel)
                        tasks.start_soon(self._watch, channel)
        finally:
            await self.aclose()

    async def _settle(self, channel: Channel) -> None:
        while True:
            await channel.got_busy.wait()
            try:
                await channel.settle()
            except TransportError as error:
                self._lose(channel, error)
                self._news.give()
                return
            finally:
                self._room.give()

    async def _watch(self, channel: Channel) -> None:
        while channel.lost is None:
            await channel.wanted.wait()
            try:
                await channel.connection.more(HEAD_SIZE)
            except TransportError as error:
                self._lose(channel, error)
            channel.watched = False
            self._news.give()

    def _lose(self, channel: Channel, error: TransportError) -> str:
        if channel.lost is None:
            reason = str(error).removeprefix(f"{channel.connection.address}: ")
            channel.lost = f"{self.address}: {channel.name}: {reason}"
            logger.debug("%s", channel.lost)
        if self._lost is None:
            self._lost = channel.lost
        return self._lost

    # ---- out

    async def send(self, buffers: Sequence[Buffer]) -> None:
        self._check_can_send()
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._check_can_send()
        size = left = sum(map(len, buffers))
        with Unsent(buffers) as unsent:
            while left:
                channel = self._free()
                if channel is None:
                    self._torn = left < size
                    await self._room.wait()
                    self._check_not_lost(size - left)
                    continue
                try:
                    given = channel.give(self._sent, unsent, left)
                except TransportError as error:
                    self._torn = True
                    raise self._failure(channel, error, size - left) from error
                self._sent += given
                left -= given
        self._torn = False
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: sent %d bytes", self.address, size)

    async def finish(self) -> None:
        self._check_can_send()
        await anyio.lowlevel.checkpoint()
        self._check_can_send()
        self._torn = True
        for channel in self._channels:
            try:
                channel.put(Head(self._sent, 0, Kind.END))
            except TransportError as error:
                raise self._failure(channel, error) from error
        while any(channel.busy for channel in self._channels):
            await self._room.wait()
            self._check_not_lost()
        self._torn = False
        self._finished = True
        logger.debug("%s: finished sending", self.address)

    def _free(self) -> Channel | None:
        for _ in self._channels:
            channel = self._channels[self._turn]
            if not channel.busy:
                return channel
            self._turn = (self._turn + 1) % len(self._channels)
        return None

    # ---- in

    async def receive(self, into: Sequence[memoryview], least: int = 1) -> int:
        self._check_open()
        # Before bytes are taken: nothing may be awaited between taking and returning them.
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        while (count := self._take(into)) is None:
            await self._arrival(least)
            self._check_open()
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: received %d bytes", self.address, count)
        return count

    def _take(self, into: Sequence[memoryview]) -> int | None:
        """As ``receive``, but None where nothing is there."""
        if self._lie is not None:
            raise self._lie
        channel = self._found.get(self._position)
        if channel is None:
            if self._position != self._end and not self._look():
                return None
            if self._position == self._end:
                return 0
            channel = self._found[self._position]
        try:
            count, head = channel.take(into)
        except TransportError as error:
            raise self._failure(channel, error) from error
        except ValueError as error:
            raise self._lied(channel, str(error)) from error
        if count is None:
            return None
        del self._found[self._position]
        self._position += count
        if channel.segment is not None:
            self._found[self._position] = channel
        elif head is not None:
            self._came(channel, head)
        return count

    def _look(self, *, everywhere: bool = False) -> bool:
        """Find the next segment, or that there is none; False where it has not come yet. A channel that is watched has
        nothing, as far as is known.
        """
        count = len(self._channels)
        for number in range(self._last, self._last + count):
            channel = self._channels[number % count]
            if not channel.expects or (channel.watched and not everywhere):
                continue
            try:
                head = channel.take_head()
            except TransportError as error:
                self._lose(channel, error)
                continue
            except ValueError as error:
                raise self._lied(channel, str(error)) from error
            if head is not None:
                self._came(channel, head)
                if self._position in self._found or self._position == self._end:
                    self._last = number % count
                    return True
        return False

    def _came(self, channel: Channel, head: Head) -> None:
        position, length, kind, _ = head
        if position < self._position or position in self._found:
            raise self._lied(channel, f"brings what has come already, at {position}")
        if self._end is not None and position + length > self._end:
            raise self._lied(channel, f"brings what is after the end, at {position}")
        if kind is Kind.END:
            if self._end not in (None, position) or any(there >= position for there in self._found):
                raise self._lied(channel, f"says that the stream ends at {position}, where it does not")
            channel.ended = True
            self._end = position
            return
        channel.segment, channel.left = head, length
        self._found[position] = channel

    async def _arrival(self, least: int) -> None:
        """Wait until :meth:`_take` may find something. Raises where it never will."""
        channel = self._found.get(self._position)
        if channel is not None:
            if channel.watched:
                await self._news.wait()
                return
            try:
                await channel.connection.more(min(least, channel.left))
            except TransportError as error:
                raise self._failure(channel, error) from error
            return
        if self._lost is not None:
            # What came before it was lost is still to be had.
            if not self._look(everywhere=True):
                raise ConnectionLost(self._lost)
            return
        expecting = [channel for channel in self._channels if channel.expects]
        if not expecting:
            raise self._lied(self._channels[0], f"and all others have left out what comes at {self._position}")
        for channel in expecting:
            if not channel.watched:
                channel.watched = True
                channel.wanted.give()
        await self._news.wait()

    def _lied(self, channel: Channel, problem: str) -> StreamError:
        self._lie = StreamError(channel.name, problem, self.address)
        return self._lie

    # ---- both

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._tasks.cancel()
        self._room.give()
        self._news.give()
        for channel in self._channels:
            await channel.connection.aclose()
        logger.debug("%s: closed", self.address)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"{self.address}: it was closed; open a new one")

    def _check_not_lost(self, taken: int = 0) -> None:
        self._check_open()
        if self._lost is not None:
            failure = ConnectionLost(self._lost)
            failure.taken = taken
            raise failure

    def _check_can_send(self) -> None:
        self._check_open()
        if self._finished:
            raise LocalProtocolError(f"{self.address}: nothing can be sent or finished after finish")
        self._check_not_lost()
        if self._torn:
            raise TransportError(f"{self.address}: an earlier send stopped part-way; start over on a new link")

    def _failure(self, channel: Channel, error: TransportError, taken: int | None = None) -> TransportError:
        """What to raise for what ``channel`` has raised."""
        if self._closed:
            return TransportError(f"{self.address}: it was closed while in use; open a new one")
        failure = ConnectionLost(self._lose(channel, error))
        failure.taken = taken
        return failure
