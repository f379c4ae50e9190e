"""A QUIC connection between two of us: who is at the other end, its streams, and what is said about them.

The library's server asks nobody for a certificate, so QUIC's own handshake can't tell a listener who connects. So
stream 0 carries a TLS 1.3 handshake within, with both certificates, made and checked by the same code as that of
``tls:``. It is tied to the connection by the listener's certificate: whoever connects compares the one of the QUIC
handshake, whose key signed for this connection, with the one within, and refuses where they differ. So nobody
in between can pass the inner handshake on: he would need the listener's key. What follows on stream 0 are records of
ours, within that TLS session; the other streams, which are opened only when both ends believe each other, are as the
QUIC library encrypts them.

Each side reads stream 0 as: from whoever connects, two bytes with a count and so many zeros (they fill a datagram of
the largest size that he means to send: a path that does not carry it ends here, and he tries again with a small one);
then TLS. A record has 17 bytes: kind, stream, position. Every other stream begins with the four bytes of its window,
from whoever opens it, so that it is there at both ends. All numbers are in network order.
"""

from __future__ import annotations

import enum
import logging
import struct
from collections.abc import Callable, Iterator
from time import monotonic

import anyio
from qh3 import QuicConnection, quic_events

from vfiostream.errors import StreamError, TransportError
from vfiostream.transports.options import MAX_CHANNELS
from vfiostream.transports.quic_peer import Handshake
from vfiostream.transports.quic_stream import LIBRARY_ERRORS, QuicStream
from vfiostream.transports.udp import Address, Here

logger = logging.getLogger("vfiostream.transport")
# The library warns of each connection that ends.
logging.getLogger("quic").setLevel(logging.CRITICAL)

WINDOW = 16 << 20
"""Bytes of all streams of a connection that may be under way: what 1 Gbit/s moves in a round trip of 130 ms."""
IDLE = 30.0
"""Seconds without a sign of life after which a connection counts as lost."""
PING_EVERY = 10.0
"""Seconds after which whoever connected asks for a sign of life, so that a quiet connection does not count as lost."""
INTRODUCTION = 10.0
"""Seconds that a listener gives somebody to show who he is."""
KEY_LASTS = 1 << 22
"""Packets that are sent under one key: AES-GCM is good for twice as many (RFC 9001, 6.6). The library counts none."""
LAST_WORDS = 1.0
"""Seconds that an alert may wait before the connection is closed without."""
ALPN = "vfiostream/1"

_CONTROL = 0
"""The stream that whoever connects opens first."""
_RECORD = struct.Struct("!BQQ")
_FILLING = struct.Struct("!H")
_WINDOW = struct.Struct("!I")
_REFUSED = 1
"""Error code of a connection that is closed because its peer is not believed, or breaks a rule."""


class Kind(enum.IntEnum):
    """Of a record."""

    WELCOME = 1
    """From the listener: you are believed."""
    READ = 2
    """The stream was read up to the position."""
    ARRIVED = 3
    """All of the stream has arrived."""
    LEFT = 4
    """The stream was read up to the position, and nobody reads on. QUIC's own STOP_SENDING would not come in order."""


class Connection:
    """One end of a connection; the endpoint brings it datagrams and asks for some. ``wake`` is called when there is
    something to send, ``opened`` with every stream the peer opens, ``failed`` when it has ended; ``known`` is kept up
    to date with the ids that the peer addresses it with. ``remembered`` is the certificate of the session that is taken
    up, if any, and ``filling`` how many bytes the first datagram is filled with.
    """

    def __init__(
        self,
        quic: QuicConnection,
        handshake: Handshake,
        address: str,
        *,
        wake: Callable[[], None],
        opened: Callable[[QuicStream], None] | None = None,
        failed: Callable[[Connection], None] | None = None,
        known: dict[bytes, Connection] | None = None,
        filling: int = 0,
        remembered: bytes | None = None,
    ) -> None:
        self.quic = quic
        self.address = address
        self.wake = wake
        self.failure = ""
        self.believed = False
        """Whether each end has seen who the other one is."""
        self.refused = False
        """Whether one of them did not like it."""
        self.over = False
        """Whether it has ended and nothing has to be sent any more."""
        self.heard = self.began = monotonic()
        """When something came, at last."""
        self.here: Here = ()
        """Which address of this host the peer talks to."""
        self.streams: dict[int, QuicStream] = {}
        self.changed = anyio.Event()
        """Set, and replaced, when the connection is believed, or ends, or a stream has arrived."""
        self._handshake = handshake
        self._listens = handshake.listens
        self._opened = opened
        self._failed = failed
        self.closing = False
        """Whether the peer has still to be told that it was closed."""
        self._close_by = 0.0
        self._known = {} if known is None else known
        self._filling = filling
        self._shown = remembered
        self._skip: int | None = None if self._listens else 0
        self._head = b""
        self._control = b""
        self._begun: dict[int, bytes] = {}
        """The first bytes of streams, as long as these are too few."""
        self._under_key = 0
        self._asked = monotonic()
        self._pings = 0

    # ---- for the endpoint

    def receive(self, data: bytes, segment: int, address: Address, now: float) -> None:
        """Datagrams of ``segment`` bytes each have come, the last may be shorter."""
        self.heard = now
        try:
            if len(data) > segment:
                self.quic.receive_gro_buffer(data, segment, address, now)
            else:
                self.quic.receive_datagram(data, address, now)
        except LIBRARY_ERRORS as error:
            logger.debug("%s: the library could not read what came: %r", self.address, error)
            self._fail("the other end sends what is not QUIC; see there")

    def advance(self, now: float) -> list[tuple[bytes, Address]]:
        """Let time pass and handle what has happened; returns the datagrams that have to go."""
        if self.over:
            return []
        quic = self.quic
        try:
            timer = quic.get_timer()
            if timer is not None and timer <= now:
                quic.handle_timer(now)
            self._handle_events()
            if not self.believed and self._listens and now - self.began > INTRODUCTION:
                self.close("it did not show who it is in time", refuse=True)
            if self.believed and not self._listens and now - max(self.heard, self._asked) >= PING_EVERY:
                self._asked = now
                self._pings += 1
                quic.send_ping(self._pings)
            datagrams = quic.datagrams_to_send(now)
            self._under_key += len(datagrams)
            if self._under_key >= KEY_LASTS and self.believed and not self.failure:
                self._change_key()
            # After what was said before: an alert says why. The library spreads packets over time, so that may have to
            # wait.
            if self.closing and (now >= self._close_by or not quic.get_send_buffer_size(_CONTROL)):
                self.closing = False
                quic.close(_REFUSED if self.refused else 0)
                datagrams += quic.datagrams_to_send(now)
                self._notify()
            return datagrams
        except LIBRARY_ERRORS as error:
            logger.debug("%s: the library failed: %r", self.address, error)
            self.fail("QUIC failed; start over on a new connection")
            return []

    def _change_key(self) -> None:
        try:
            self.quic.request_key_update()
        except LIBRARY_ERRORS:
            return  # The change before has not been acknowledged: with the next datagrams.
        self._under_key = 0

    def deadline(self) -> float:
        """When :meth:`advance` is due, on the clock of ``time.monotonic``."""
        if self.over:
            return float("inf")
        timer = self.quic.get_timer()
        due = float("inf") if timer is None else timer
        if self.closing:
            due = min(due, self._close_by)
        if self._listens:
            return due if self.believed else min(due, self.began + INTRODUCTION)
        return min(due, max(self.heard, self._asked) + PING_EVERY)

    def sent(self) -> None:
        """Datagrams have gone: there may be room for more."""
        for stream in self.streams.values():
            stream.send_on()

    def close(self, why: str = "", *, refuse: bool = False) -> None:
        """End it, which the peer is told with the next datagrams. ``why`` is for this end alone."""
        if not self.failure:
            self.refused = self.refused or refuse
            self.closing = True
            self._close_by = monotonic() + LAST_WORDS
            self._fail(why or "it was closed")
            self.wake()

    # ---- for streams

    def open(self, window: int) -> QuicStream:
        """A new stream, of which so many bytes may be under way. The listener gets those of a connection in any order;
        the windows of all together are :data:`WINDOW` at most.
        """
        number = self.quic.get_next_available_stream_id()
        stream = self.streams[number] = QuicStream(self, number, self.address, window)
        self.quic.send_stream_data(number, _WINDOW.pack(window))
        self.wake()
        return stream

    def consumed(self, stream: QuicStream) -> None:
        self._tell(Kind.READ, stream.number, stream.read)

    def left(self, stream: QuicStream) -> None:
        self._tell(Kind.LEFT, stream.number, stream.read)

    @property
    def under_way(self) -> bool:
        """Whether something that was sent has not arrived, as far as is known, and still may."""
        return not self.failure and any(stream.under_way for stream in self.streams.values())

    # ---- what has happened

    def _handle_events(self) -> None:
        while (event := self.quic.next_event()) is not None:
            try:
                self._handle(event)
            except (StreamError, TransportError) as error:
                self.close(str(error).removeprefix(f"{self.address}: "), refuse=True)

    def _handle(self, event: quic_events.QuicEvent) -> None:
        if isinstance(event, quic_events.StreamDataReceived):
            if event.stream_id == _CONTROL:
                self._hear(event.data)
                if event.end_stream:
                    raise StreamError("stream 0", "ended")
            else:
                self._receive(event)
        elif isinstance(event, quic_events.HandshakeCompleted):
            if not self._listens:
                if event.session_resumed:
                    logger.debug("%s: an earlier session is taken up", self.address)
                else:
                    certificate = self.quic.get_peercert()
                    self._shown = None if certificate is None else certificate.public_bytes()
                self._introduce()
        elif isinstance(event, quic_events.StreamReset):
            if event.stream_id == _CONTROL:
                raise StreamError("stream 0", "was broken off")
            if stream := self.streams.get(event.stream_id):
                stream.break_off()
        elif isinstance(event, quic_events.ConnectionIdIssued):
            self._known[event.connection_id] = self
        elif isinstance(event, quic_events.ConnectionIdRetired):
            self._known.pop(event.connection_id, None)
        elif isinstance(event, quic_events.ConnectionTerminated):
            self._ended(event)
            self._end()

    def _receive(self, event: quic_events.StreamDataReceived) -> None:
        number, data = event.stream_id, event.data
        stream = self.streams.get(number)
        if stream is None:
            stream, data = self._begin(number, data)
        if stream is not None:
            stream.arrive(data, event.end_stream)
            if event.end_stream:
                self._tell(Kind.ARRIVED, stream.number, 0)
        elif event.end_stream:
            raise StreamError(f"stream {number}", "ended before it began")

    def _begin(self, number: int, data: bytes) -> tuple[QuicStream | None, bytes]:
        """A stream that the peer opens, once its window is known, and what follows that of ``data``."""
        if not self.believed or self._opened is None or number % 4 or number > 4 * MAX_CHANNELS:
            raise StreamError(f"stream {number}", "was opened by an end that may not")
        data = self._begun.pop(number, b"") + data
        if len(data) < _WINDOW.size:
            self._begun[number] = data
            return None, b""
        (window,) = _WINDOW.unpack_from(data)
        if not 0 < window <= WINDOW - sum(stream.window for stream in self.streams.values()):
            raise StreamError(f"stream {number}", "asks for a window that is more than there is")
        stream = self.streams[number] = QuicStream(self, number, self.address, window)
        self._opened(stream)
        return stream, data[_WINDOW.size :]

    def _ended(self, event: quic_events.ConnectionTerminated) -> None:
        if event.error_code == _REFUSED and event.frame_type is None:
            self.refused = True
            self._fail("the other end refused us; see there why")
        elif event.reason_phrase == "Idle timeout":
            self._fail(f"nothing was heard of the other end for {IDLE:g} s; see whether it runs, and the network")
        elif event.error_code == 0:
            self._fail("the other end closed the connection; see there why")
        else:
            self._fail(f"QUIC failed ({event.reason_phrase or hex(event.error_code)}); see the other end")

    def fail(self, why: str) -> None:
        """It ended without a word of the peer: nothing more can be sent."""
        self._fail(why)
        self._end()

    def _end(self) -> None:
        self.over = True
        self._notify()

    def _fail(self, why: str) -> None:
        if not self.failure:
            self.failure = why
            for stream in self.streams.values():
                stream.connection_ended()
            if self._failed is not None:
                self._failed(self)
            self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    # ---- stream 0

    def _introduce(self) -> None:
        self.quic.send_stream_data(_CONTROL, _FILLING.pack(self._filling) + bytes(self._filling))
        self._handshake.advance(b"")
        self._say()

    def _hear(self, data: bytes) -> None:
        if self._skip is None:
            self._head += data[: _FILLING.size - len(self._head)]
            data = data[_FILLING.size :] if len(self._head) == _FILLING.size else b""
            if len(self._head) < _FILLING.size:
                return
            (self._skip,) = _FILLING.unpack(self._head)
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        if skipped == len(data):
            return
        was_done = self._handshake.done
        try:
            self._control += self._handshake.advance(data[skipped:])
        finally:
            self._say()  # An alert, where it is refused.
        if self._handshake.done and not was_done:
            self._handshake.check(self._shown)
            if self._listens:
                self.believed = True
                self._tell(Kind.WELCOME, 0, 0)
        for kind, number, position in self._records():
            self._obey(kind, number, position)

    def _records(self) -> Iterator[tuple[int, int, int]]:
        whole = len(self._control) // _RECORD.size * _RECORD.size
        records, self._control = self._control[:whole], self._control[whole:]
        return _RECORD.iter_unpack(records)

    def _obey(self, kind: int, number: int, position: int) -> None:
        if kind == Kind.WELCOME and not self._listens and not self.believed:
            self.believed = True
            self._notify()
            return
        stream = self.streams.get(number)
        if stream is None:
            raise StreamError("a record", "names a stream that is not open")
        if kind == Kind.READ:
            stream.read_there(position)
        elif kind == Kind.LEFT:
            stream.read_there(position)
            stream.stop()
            self._notify()
        elif kind == Kind.ARRIVED:
            stream.arrived_there()
            self._notify()
        else:
            raise StreamError("a record", "is of no known kind")

    def _tell(self, kind: Kind, number: int, position: int) -> None:
        if not self.failure:
            self._handshake.say(_RECORD.pack(kind, number, position))
            self._say()

    def _say(self) -> None:
        if (data := self._handshake.to_send()) and not self.failure:
            self.quic.send_stream_data(_CONTROL, data)
            self.wake()
