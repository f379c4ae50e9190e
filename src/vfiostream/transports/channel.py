"""One channel of a link: what its connection has still to take, and the segment that comes next on it."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost
from vfiostream.transports.polled import PolledTransport
from vfiostream.transports.segments import HEAD_SIZE, Head, Kind
from vfiostream.transports.unsent import IOV_MAX, Unsent

SHORTEST = 64 << 10
"""Bytes of a segment where the channel takes little; fewer would cost calls."""
LONGEST = 2 << 20
"""Bytes of a segment where it takes all: a chunk of the default size in one."""


class Signal:
    """Wakes the one task that waits for it; one that is given while nobody waits is kept."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def give(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = anyio.Event()


class Channel:
    """The connection is this object's. Its steps raise what the connection raises."""

    def __init__(self, connection: PolledTransport, number: int, count: int, memory: int) -> None:
        self.connection = connection
        self.name = f"channel {number + 1} of {count}"
        self.lost: str | None = None
        """What is wrong with it, once something is."""

        self.busy = False
        """Whether it has no room, or something is left that it has still to take: :meth:`settle` sees to both."""
        self.got_busy = Signal()
        self._rest: list[memoryview] = []
        self._longest = max(min(memory, LONGEST), 1)
        self._length = min(SHORTEST, self._longest)
        """Of the next segment at most."""

        self.segment: Head | None = None
        """The one that comes next, once its head is here."""
        self.left = 0
        """Bytes of it that were not read."""
        self.ended = False
        """Whether its end has come."""
        self.watched = False
        """Whether a task waits until something comes."""
        self.wanted = Signal()
        """Given when that task shall."""
        self._head = bytearray(HEAD_SIZE)
        self._view = memoryview(self._head)
        self._got = 0
        """Bytes of the next head that are here."""

    # ---- out

    def give(self, position: int, unsent: Unsent, most: int) -> int:
        """Begin a segment at ``position`` with what is next in ``unsent``, ``most`` bytes at most. Return how many are
        its now, of which those that the connection did not take are copied; 0 where it has no room.
        """
        most = min(most, self._length)
        views: list[memoryview] = []
        length = 0
        cut: memoryview | None = None
        for view in unsent.head(IOV_MAX - 1):
            if length + len(view) > most:
                cut = view[: most - length]
                views.append(cut)
                length = most
                break
            views.append(view)
            length += len(view)
            if length == most:
                break
        try:
            taken = self._offer([Head(position, length, Kind.DATA).pack(), *views])
            if taken == 0:
                return 0
        finally:
            if cut is not None:
                cut.release()
        unsent.advance(length)
        if not self._rest:
            self._length = min(2 * self._length, self._longest)
        else:
            self._length = max(min(taken, self._longest), min(SHORTEST, self._longest))
        return length

    def put(self, head: Head) -> None:
        """Send a segment without bytes, as soon as there is room."""
        raw = head.pack()
        if self._rest or self._offer([raw]) == 0:
            self._rest.append(memoryview(raw))

    def _offer(self, buffers: Sequence[Buffer]) -> int:
        """Hand over what the connection takes, and keep a copy of the rest if it took any."""
        taken = self.connection.offer(buffers)
        size = sum(map(len, buffers))
        if 0 < taken < size:
            self._rest.append(memoryview(_tail(buffers, taken)))
        if taken < size or self.connection.holds:
            self.busy = True
            self.got_busy.give()
        return taken

    async def settle(self) -> None:
        """Wait for room, and until everything that is left was taken."""
        await self.connection.room()
        while self._rest or self.connection.holds:
            if self._rest:
                taken = self.connection.offer(self._rest[:IOV_MAX])
                while self._rest and taken >= len(self._rest[0]):
                    taken -= len(self._rest.pop(0))
                if taken:
                    self._rest[0] = self._rest[0][taken:]
            if self._rest or self.connection.holds:
                await self.connection.room()
        self.busy = False

    # ---- in

    @property
    def expects(self) -> bool:
        """Whether the head of a segment is what comes next on it."""
        return self.segment is None and not self.ended and self.lost is None

    def take_head(self) -> Head | None:
        """What is there of the next head; None where it is not all. Raises ValueError for one that can't be."""
        count = self.connection.take([self._view[self._got :]])
        if count is None:
            return None
        if count == 0:
            raise ConnectionLost(f"{self.connection.address}: the other end closed it; see there why")
        return self._came(count)

    def take(self, into: Sequence[memoryview]) -> tuple[int | None, Head | None]:
        """Read the segment into ``into``, and what is there of the next head. Return how many bytes of the segment
        were there, None for none, and that head, if it is whole.
        """
        views: list[memoryview] = []
        wanted = 0
        cut: memoryview | None = None
        for view in into[: IOV_MAX - 1]:
            if wanted + len(view) > self.left:
                cut = view[: self.left - wanted]
                views.append(cut)
                wanted = self.left
                break
            views.append(view)
            wanted += len(view)
            if wanted == self.left:
                break
        if wanted == self.left:
            views.append(self._view)
        try:
            count = self.connection.take(views)
        finally:
            if cut is not None:
                cut.release()
        if count is None:
            return None, None
        if count == 0:
            raise ConnectionLost(f"{self.connection.address}: the other end closed it; see there why")
        done = min(count, wanted)
        self.left -= done
        if self.left == 0:
            self.segment = None
            if count > done:
                return done, self._came(count - done)
        return done, None

    def _came(self, count: int) -> Head | None:
        self._got += count
        if self._got < HEAD_SIZE:
            return None
        self._got = 0
        return Head.parse(self._head)


def _tail(buffers: Sequence[Buffer], start: int) -> bytes:
    pieces = []
    for buffer in buffers:
        if start >= len(buffer):
            start -= len(buffer)
        else:
            pieces.append(memoryview(buffer)[start:])
            start = 0
    return b"".join(pieces)
