"""A stream of a QUIC connection as a transport, and how much of it may be under way.

The library takes whatever it is given and grants the peer more as soon as bytes have arrived, whoever reads them: so
neither end would be bounded. Hence the credit of ours: the end that receives says up to which position its reader has
taken the stream, and the end that sends is never more than :attr:`QuicStream.window` bytes ahead of that. What comes
beyond it is a violation, and ends the connection. Acknowledgements and pings go on, whoever stalls.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import anyio
from qh3 import QuicConnection, QuicConnectionError

from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost, StreamError
from vfiostream.transports.polled import PolledTransport

logger = logging.getLogger("vfiostream.transport")

BACKLOG = 2 << 20
"""Bytes of a stream that may wait to be sent for the first time: enough for the next turn, and not so many that what is
sent last waits long behind them on a slow link."""
WAKE_AT = 1 << 20
"""Bytes that a reader sleeps for at most where it needs so many."""
TELL_EVERY = 8
"""A reader's progress is told when it is this part of the window: seldom, and early enough to keep the link full."""


LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    LookupError,
    QuicConnectionError,
    TypeError,
    ValueError,
)
"""What the library raises at bytes it can't read: its handshake is Python, and anybody may send to it."""


class Carrier(Protocol):
    """What a stream needs of its connection."""

    quic: QuicConnection
    failure: str
    """What has ended the connection, as a sentence; empty while it lives."""

    def wake(self) -> None:
        """There is something to send."""

    def consumed(self, stream: QuicStream) -> None:
        """Tell the peer how far the stream was read."""

    def left(self, stream: QuicStream) -> None:
        """Tell it that no more will be."""


class QuicStream(PolledTransport):
    """A stream in both directions. The connection calls what has no underscore and is not in the contract."""

    def __init__(self, carrier: Carrier, number: int, address: str, window: int) -> None:
        super().__init__(address)
        self.number = number
        self.window = self.keeps = window
        """Bytes that may be under way in each direction, sent and not read."""
        self.buffered = 0
        """Bytes that have arrived and were not read."""
        self.read = 0
        """Position up to which it was read here."""
        self._carrier = carrier
        self._told = 0
        self._arrived: deque[memoryview] = deque()
        self._ended = False
        self._broken = False
        self._sent = 0
        self._read_there = 0
        self._arrived_there = False
        self._refused = False
        self._room = anyio.Event()
        self._more = anyio.Event()

    # ---- what the connection has heard

    def arrive(self, data: bytes, end: bool) -> None:
        """Bytes have come, perhaps the last ones. Raises :class:`~vfiostream.errors.StreamError` where there are more
        than may be under way.
        """
        if not self._closed:
            if data:
                self._arrived.append(memoryview(data))
                self.buffered += len(data)
                if self.buffered > self.window:
                    raise StreamError(f"stream {self.number}", "sends more than may be under way", self.address)
            self._more.set()
        self._ended = self._ended or end

    def break_off(self) -> None:
        """The peer will not send the rest."""
        self._broken = True
        self._more.set()

    def stop(self) -> None:
        """The peer will not read the rest."""
        self._refused = True
        self._room.set()

    def read_there(self, position: int) -> None:
        """The peer's reader has come to ``position``. Raises :class:`~vfiostream.errors.StreamError`."""
        if not self._read_there <= position <= self._sent:
            raise StreamError(f"stream {self.number}", "was read where nothing was sent", self.address)
        self._read_there = position
        self._room.set()

    def arrived_there(self) -> None:
        """The peer has all of it."""
        self._arrived_there = True
        self._room.set()

    def connection_ended(self) -> None:
        self._room.set()
        self._more.set()

    @property
    def under_way(self) -> bool:
        """Whether something was sent of which it is not known that it arrived, and still may."""
        return not (self._arrived_there or self._refused or self._carrier.failure) and self._closing_well

    @property
    def _closing_well(self) -> bool:
        return self._finished or (self._closed and not self._torn)

    @property
    def over(self) -> bool:
        """Whether nobody will use it any more, at this end."""
        return self._closed and not self.under_way

    # ---- a polled transport

    def _write(self, buffers: Sequence[Buffer]) -> int:
        self._check_sending()
        quic = self._carrier.quic
        room = left = min(
            self.window - (self._sent - self._read_there), BACKLOG - quic.get_send_buffer_size(self.number)
        )
        if room <= 0:
            raise BlockingIOError
        try:
            for buffer in buffers:
                if len(buffer) <= left:
                    quic.send_stream_data(self.number, buffer)
                    left -= len(buffer)
                else:
                    with memoryview(buffer) as view, view[:left] as part:
                        quic.send_stream_data(self.number, part)
                    left = 0
                if not left:
                    break
        except LIBRARY_ERRORS as error:
            if left == room:
                raise self._just_ended() from error
            # What the library has got may have gone: the next call says what happened.
        self._sent += room - left
        self._carrier.wake()
        return room - left

    def _read(self, into: Sequence[memoryview]) -> int:
        arrived = self._arrived
        if not arrived:
            if self._ended:
                return 0
            if self._broken or self._carrier.failure:
                raise ConnectionLost(f"{self.address}: {self._loss()}")
            raise BlockingIOError
        count = 0
        for view in into:
            filled = 0
            while arrived and filled < len(view):
                part = arrived[0]
                step = min(len(view) - filled, len(part))
                view[filled : filled + step] = part[:step]
                filled += step
                if step == len(part):
                    arrived.popleft()
                else:
                    arrived[0] = part[step:]
            count += filled
            if not arrived:
                break
        self.buffered -= count
        self.read += count
        if self.read - self._told >= self.window // TELL_EVERY and not self._ended:
            self._told = self.read
            self._carrier.consumed(self)
        return count

    async def _writable(self) -> None:
        while not (self._refused or self._carrier.failure) and (
            self._sent - self._read_there >= self.window
            or self._carrier.quic.get_send_buffer_size(self.number) >= BACKLOG
        ):
            self._room = anyio.Event()
            await self._room.wait()
            self._check_not_closed()

    async def _readable(self, least: int) -> None:
        # The rest of what the peer may send has to fit, or nothing would come any more.
        enough = max(1, min(least, WAKE_AT, self.window // 2))
        while not (self.buffered >= enough or self._ended or self._broken or self._carrier.failure):
            self._more = anyio.Event()
            await self._more.wait()
            self._check_not_closed()

    async def _end(self) -> None:
        self._check_sending()
        try:
            self._carrier.quic.send_stream_data(self.number, b"", end_stream=True)
        except LIBRARY_ERRORS as error:
            raise self._just_ended() from error
        self._carrier.wake()
        while not self._arrived_there:
            if self._read_there == self._sent and (self._refused or self._carrier.failure):
                return  # Who has read all may leave without waiting for the end.
            self._check_sending()
            self._room = anyio.Event()
            await self._room.wait()
            self._check_not_closed()

    async def _let_go(self) -> None:
        self._room.set()
        self._more.set()
        self._arrived.clear()
        if self._carrier.failure:
            return
        quic = self._carrier.quic
        try:
            if not (self._ended or self._broken):
                self._carrier.left(self)
            if self._torn and not self._refused:
                quic.reset_stream(self.number, 0)
            elif not (self._finished or self._refused):
                quic.send_stream_data(self.number, b"", end_stream=True)
        except LIBRARY_ERRORS as error:
            # The connection has just ended, which will be heard of soon.
            logger.debug("%s: nothing can be said any more: %s", self.address, error)
        self._carrier.wake()

    def send_on(self) -> None:
        """Some of what waited was sent: there may be room."""
        self._room.set()

    def _check_sending(self) -> None:
        if self._refused or self._carrier.failure:
            raise ConnectionLost(f"{self.address}: {self._loss()}")

    def _just_ended(self) -> ConnectionLost:
        return ConnectionLost(f"{self.address}: the connection has just ended; see the other end")

    def _loss(self) -> str:
        if self._carrier.failure:
            return self._carrier.failure
        return "the other end closed the connection; see there why"

    def _check_not_closed(self) -> None:
        if self._closed:
            raise anyio.ClosedResourceError
