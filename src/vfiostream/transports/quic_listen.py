"""The end of QUIC that listens: one socket, and a connection for everybody who comes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import socket
import struct
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

import anyio
import anyio.lowlevel
from qh3 import QuicConnection, QuicProtocolVersion, SessionTicket

# Not of the library's public interface, as is QuicConnection.host_cid: hence the narrow version in pyproject.toml, and
# tests/test_quic.py.
from qh3._hazmat import Buffer
from qh3.quic.packet import QuicHeader, QuicPacketType, encode_quic_retry, pull_quic_header

from vfiostream.ending import to_the_end
from vfiostream.errors import PeerRefused, StreamError, TransportError
from vfiostream.transports.arrivals import arrivals
from vfiostream.transports.background import background
from vfiostream.transports.contract import Listener
from vfiostream.transports.credentials import Credentials, required
from vfiostream.transports.options import Options
from vfiostream.transports.polled import PolledTransport
from vfiostream.transports.quic_connection import Connection
from vfiostream.transports.quic_endpoint import (
    CID,
    SAFE_DATAGRAM,
    Endpoint,
    configuration_of,
    numeric,
    targets_of,
    text_of,
)
from vfiostream.transports.quic_peer import Handshake
from vfiostream.transports.quic_stream import QuicStream
from vfiostream.transports.stream import host_and_port
from vfiostream.transports.tls_trust import context_of
from vfiostream.transports.udp import Address, Here, UdpSocket

logger = logging.getLogger("vfiostream.transport")

STRANGERS = 32
"""Connections of those who have not shown who they are, at a time; a further one has to wait."""
RETRY_ABOVE = 4
"""So many of them, and who comes next must show first that its address is its own (RFC 9000, 8.1.2)."""
TICKETS = 64
"""Sessions that a listener remembers, so that who comes again is spared a part of the handshake."""

RETRY_WITHIN = 10.0
"""Seconds within which it has to."""
SMALLEST_INITIAL = 1200
"""Bytes of the datagram that begins a connection, at least (RFC 9000, 14.1)."""

_TOKEN = struct.Struct(f"!Q{CID}s")
_SEAL = 32


class _Answerer(Endpoint):
    """Whoever listens: a socket, and a connection for everybody who comes."""

    def __init__(self, udp: UdpSocket, address: str, options: Options, credentials: Credentials) -> None:
        super().__init__(udp)
        self.address = address
        self.open = True
        self.problem = ""
        """Why nobody can come any more."""
        self.streams: deque[QuicStream] = deque()
        """Those that wait to be accepted."""
        self.came = anyio.Event()
        self._refused = options.refused
        self._credentials = credentials
        self._configuration = configuration_of(is_client=False, size=SAFE_DATAGRAM)
        self._known: dict[bytes, Connection] = {}
        """By the ids that they are addressed with."""
        self._tickets: OrderedDict[bytes, SessionTicket] = OrderedDict()
        self._secret = os.urandom(32)
        self._context = context_of(credentials)
        self._configuration.load_cert_chain(credentials.cert, credentials.key)

    def deliver(self, data: bytes, segment: int, address: Address, here: Here, now: float) -> None:
        address = numeric(address)
        connection = self._known.get(_destination(data))
        if connection is None:
            connection = self._stranger(data[:segment], address, here)
        if connection is not None:
            connection.here = here
            connection.receive(data, segment, address, now)

    def ended(self, connection: Connection) -> None:
        for number in [number for number, other in self._known.items() if other is connection]:
            del self._known[number]

    def broke(self, why: str) -> None:
        super().broke(why)
        self.problem = why
        self.came.set()

    def close(self) -> None:
        """Let nobody else in."""
        self.open = False
        self.came.set()
        for connection in self.connections:
            if all(stream in self.streams for stream in connection.streams.values()):
                connection.close("the listener was closed")
        self.streams.clear()

    def _failed(self, connection: Connection) -> None:
        if not connection.believed and connection.refused:
            refusal = PeerRefused(f"{connection.address}: {connection.failure}")
            logger.warning("refused a sender: %s", refusal)
            if self._refused is not None:
                self._refused(refusal)

    def _stranger(self, data: bytes, address: Address, here: Here) -> Connection | None:
        """A connection for somebody new, if that is what ``data`` asks for."""
        if not self.open or len(data) < SMALLEST_INITIAL or not data[0] & 0x80:
            return None
        try:
            header = pull_quic_header(Buffer(data=data), CID)
        except ValueError:
            return None
        if header.packet_type != QuicPacketType.INITIAL or header.version != QuicProtocolVersion.VERSION_1:
            return None
        original, retried = header.destination_cid, None
        strangers = [connection for connection in self.connections if not connection.believed]
        if header.token:
            proven = self._proven(header.token, address)
            if proven is None:
                return None
            original, retried = proven
        elif len(strangers) >= RETRY_ABOVE:
            self.udp.send([(self._retry(header, address), address)], here)
            return None
        if len(strangers) >= STRANGERS:
            strangers[0].fail("others came")
        return self._answer(original, retried, header.destination_cid, address)

    def _answer(self, original: bytes, retried: bytes | None, asked: bytes, address: Address) -> Connection:
        quic = QuicConnection(
            configuration=self._configuration,
            original_destination_connection_id=original,
            retry_source_connection_id=retried,
            session_ticket_fetcher=lambda label: self._tickets.pop(label, None),
            session_ticket_handler=self._remember,
        )
        connection = Connection(
            quic,
            Handshake(self._context, self._credentials, text_of(address), None),
            text_of(address),
            wake=self.wake,
            opened=self._opened,
            failed=self._failed,
            known=self._known,
        )
        self._known[asked] = self._known[quic.host_cid] = connection
        self.connections.append(connection)
        return connection

    def _remember(self, ticket: SessionTicket) -> None:
        self._tickets[ticket.ticket] = ticket
        if len(self._tickets) > TICKETS:
            self._tickets.popitem(last=False)

    def _opened(self, stream: QuicStream) -> None:
        if not self.open:
            raise StreamError(f"stream {stream.number}", "was opened after the listener was closed")
        self.streams.append(stream)
        self.came.set()

    def _retry(self, header: QuicHeader, address: Address) -> bytes:
        """Asks to come again with a token that only ``address`` gets to see."""
        ours = os.urandom(CID)
        return encode_quic_retry(
            version=QuicProtocolVersion.VERSION_1,
            source_cid=ours,
            destination_cid=header.source_cid,
            original_destination_cid=header.destination_cid,
            retry_token=self._token(header.destination_cid, ours, address),
        )

    def _token(self, original: bytes, ours: bytes, address: Address) -> bytes:
        known = _TOKEN.pack(int(monotonic() + RETRY_WITHIN), ours) + original
        return self._seal(known, address) + known

    def _proven(self, token: bytes, address: Address) -> tuple[bytes, bytes] | None:
        """The connection ids that a token of ours was made for; None where it is none, or not for ``address``."""
        seal, known = token[:_SEAL], token[_SEAL:]
        if not hmac.compare_digest(seal, self._seal(known, address)):
            return None
        until, ours = _TOKEN.unpack_from(known)
        if until < monotonic():
            return None
        return known[_TOKEN.size :], ours

    def _seal(self, known: bytes, address: Address) -> bytes:
        return hmac.digest(self._secret, known + repr(address).encode(), hashlib.sha256)


class QuicListener(Listener):
    """Where streams come from that others open."""

    def __init__(self, answerer: _Answerer) -> None:
        self.address = answerer.address
        self._answerer = answerer

    async def accept(self) -> PolledTransport:
        answerer = self._answerer
        await anyio.lowlevel.checkpoint()
        while answerer.open:
            if answerer.streams:
                stream = answerer.streams.popleft()
                logger.debug("%s: accepted %s", self.address, stream.address)
                return stream
            if answerer.problem:
                raise TransportError(f"{self.address}: {answerer.problem}")
            if answerer.came.is_set():
                answerer.came = anyio.Event()
            await answerer.came.wait()
        raise TransportError(f"{self.address}: the listener was closed; open a new one")

    async def aclose(self) -> None:
        if self._answerer.open:
            self._answerer.close()


@asynccontextmanager
async def listen(address: str, options: Options) -> AsyncIterator[Listener]:
    """Listen at ``address``; of a host with several addresses, at the first that can be bound."""
    credentials = required(options.credentials, address)
    host, port = host_and_port(address)
    for family, target in await targets_of(address, host, port):
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.bind(target)
        except OSError as error:
            failure = error
        else:
            break
    else:
        raise TransportError(
            f"{address}: listening failed ({failure.strerror}); choose an address and port of this host you may use"
        ) from failure
    with sock:
        answerer = _Answerer(UdpSocket(sock, listens=True), text_of(sock.getsockname()), options, credentials)
        logger.debug("%s: listening", answerer.address)
        async with background(answerer.read, answerer.keep_time):
            try:
                async with arrivals(QuicListener(answerer), options) as senders:
                    yield senders
            finally:
                await to_the_end(answerer.hang_up)


def _destination(data: bytes) -> bytes:
    """The id of the connection that a datagram is for (RFC 8999, 5)."""
    if not data or not data[0] & 0x80:
        return data[1 : 1 + CID]
    return data[6 : 6 + data[5]] if len(data) > 5 else b""
