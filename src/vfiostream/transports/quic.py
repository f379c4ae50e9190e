"""QUIC: an encrypted connection of several streams over UDP, for links that are long or lose packets.

Here is the end that connects; ``quic_listen`` is the other one.
"""

from __future__ import annotations

import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from time import monotonic
from typing import NamedTuple

import anyio
from OpenSSL import SSL
from qh3 import QuicConnection, SessionTicket

from vfiostream.ending import to_the_end
from vfiostream.errors import PeerRefused, TransportError, UsageError
from vfiostream.transports.background import background
from vfiostream.transports.contract import Transport
from vfiostream.transports.credentials import Credentials, required
from vfiostream.transports.joining import joined
from vfiostream.transports.options import Options
from vfiostream.transports.polled import PolledTransport
from vfiostream.transports.quic_connection import WINDOW, Connection
from vfiostream.transports.quic_endpoint import (
    ETHERNET_DATAGRAM,
    SAFE_DATAGRAM,
    Endpoint,
    configuration_of,
    numeric,
    targets_of,
)
from vfiostream.transports.quic_listen import listen
from vfiostream.transports.quic_peer import Handshake
from vfiostream.transports.stream import host_and_port
from vfiostream.transports.tls_trust import context_of
from vfiostream.transports.udp import Address, Here, UdpSocket

__all__ = ["OPTIONS", "connect", "connect_many", "listen"]

logger = logging.getLogger("vfiostream.transport")

OPTIONS = frozenset({"credentials", "channels", "reconnect", "silent"})

LARGE_DATAGRAM = 9000
"""Bytes of a datagram that are worth having: larger ones fill the kernel's batches worse and moved less on loopback."""
LARGE_TRIED = 3.0
"""Seconds after which a handshake that tries large datagrams is given up for one without."""


_NEVER = float("inf")


class _Session(NamedTuple):
    """What whoever connects remembers of a listener."""

    ticket: SessionTicket
    certificate: bytes
    """DER: what the listener showed when the session began; it is not shown again."""


_sessions: dict[tuple[Address, Credentials], _Session] = {}
"""In the memory of this process."""


class _Caller(Endpoint):
    """Whoever connects: one connection, over a connected socket, which is replaced when this host has moved."""

    MOST_MOVES = 3
    """The library's listener knows four addresses of one connection and no more."""
    TROUBLE = 0.5
    """Seconds between looks at the way to the listener, where sending fails."""
    SILENCE = 3.0
    """Seconds without an answer after which the way to the listener is looked at."""

    def __init__(self, udp: UdpSocket, target: Address, address: str) -> None:
        super().__init__(udp)
        self.connection: Connection
        self._target = target
        self._address = address
        self._moves = 0
        self._looked = monotonic()

    def deliver(self, data: bytes, segment: int, address: Address, here: Here, now: float) -> None:
        self.connection.receive(data, segment, numeric(address), now)

    def look(self, now: float) -> None:
        trouble, self.udp.trouble = self.udp.trouble, None
        if trouble is not None and trouble.errno == errno.ECONNREFUSED:
            if self.connection.believed:
                self.connection.fail("nobody listens there any more; see the other end")
            else:
                self.connection.fail("nobody listens there; start `vfiostream receive` on it first")
            return
        silent = now - max(self._looked, self.connection.heard) >= self.SILENCE
        if (silent and self.connection.quic.should_wait_for_ack(now)) or (
            trouble is not None and now - self._looked >= self.TROUBLE
        ):
            self._looked = now
            self._look_for_another_way()

    def _look_for_another_way(self) -> None:
        try:
            sock = _connected(self.udp.sock.family, self._target)
        except OSError as error:
            logger.debug("%s: there is no way to it now: %s", self._address, error.strerror)
            return
        if sock.getsockname()[0] == self.udp.sock.getsockname()[0]:
            sock.close()  # This host is where it was.
        else:
            self.move(sock)

    def move(self, sock: socket.socket) -> None:
        """Go on over ``sock``, which is connected to the listener."""
        if self._moves == self.MOST_MOVES or not self.connection.believed:
            sock.close()
            return
        self._moves += 1
        old, self.udp = self.udp.sock, UdpSocket(sock)
        logger.info("%s: the connection moves to %s", self._address, sock.getsockname()[0])
        anyio.notify_closing(old)
        old.close()
        self.wake()

    async def introduced(self) -> None:
        """Wait until both ends believe each other. Raises what stands against it."""
        connection = self.connection
        while not (connection.believed or connection.failure):
            await connection.changed.wait()
        if connection.failure:
            failure = PeerRefused if connection.refused else TransportError
            raise failure(f"{self._address}: {connection.failure}")


@asynccontextmanager
async def connect(address: str, options: Options) -> AsyncIterator[Transport]:
    """Connect to whoever listens at ``address``; each channel is a stream of one connection."""
    async with joined(address, options, partial(connect_many, address, options)) as link:
        yield link


@asynccontextmanager
async def connect_many(address: str, options: Options, count: int) -> AsyncIterator[Sequence[PolledTransport]]:
    """Connect to whoever listens at ``address``, over ``count`` streams of one connection, 1 to
    :data:`~vfiostream.transports.options.MAX_CHANNELS`. The listener gets each of them, in any order.
    """
    async with _called(address, options) as connection:
        yield [connection.open(WINDOW // count) for _ in range(count)]


@asynccontextmanager
async def _called(address: str, options: Options) -> AsyncIterator[Connection]:
    """A connection to the first host of ``address`` that answers; with large datagrams, where they arrive."""
    credentials = required(options.credentials, address)
    context = context_of(credentials)
    host, port = host_and_port(address)
    if port == 0:
        raise UsageError(f"{address!r} has port 0, which can't be connected to; write the port the other end shows")
    until = _NEVER if options.timeout is None else monotonic() + options.timeout
    async with AsyncExitStack() as stack:
        for family, target in await targets_of(address, host, port):
            for large in (True, False):
                call = _Call(address, host, family, target, options, until, credentials, context, large)
                try:
                    connection = await stack.enter_async_context(_calling(call))
                except _TooLarge:
                    continue
                except PeerRefused:
                    raise
                except TransportError as error:
                    failure = error
                    break
                yield connection
                return
        raise failure


class _TooLarge(Exception):
    """Large datagrams make no sense here, or do not arrive."""


class _Call(NamedTuple):
    """An attempt."""

    address: str
    host: str
    family: socket.AddressFamily
    target: Address
    options: Options
    until: float
    """When it is given up, on the clock of ``time.monotonic``."""
    credentials: Credentials
    context: SSL.Context
    large: bool


@asynccontextmanager
async def _calling(call: _Call) -> AsyncIterator[Connection]:
    handshake = Handshake(call.context, call.credentials, call.address, call.host)
    try:
        udp = UdpSocket(_connected(call.family, call.target))
    except OSError as error:
        raise TransportError(
            f"{call.address}: there is no way to it ({error.strerror}); check the address and the network"
        ) from error
    caller = _Caller(udp, call.target, call.address)
    try:
        size = min(udp.payload(), LARGE_DATAGRAM) if call.large else SAFE_DATAGRAM
        if call.large and size <= ETHERNET_DATAGRAM:
            raise _TooLarge
        quic, remembered = _caller_quic(call, size)
        caller.connection = Connection(
            quic,
            handshake,
            call.address,
            wake=caller.wake,
            filling=size if call.large else 0,
            remembered=remembered,
        )
        caller.connections.append(caller.connection)
        quic.connect(numeric(call.target), monotonic())
        async with background(caller.read, caller.keep_time):
            try:
                await _introduced(caller, call)
                yield caller.connection
            finally:
                await to_the_end(caller.hang_up)
    finally:
        caller.udp.sock.close()


async def _introduced(caller: _Caller, call: _Call) -> None:
    """Wait until both ends believe each other."""
    left = call.until - monotonic()
    try:
        with anyio.fail_after(min(left, LARGE_TRIED) if call.large else left):
            await caller.introduced()
    except TimeoutError as error:
        if call.large and left > LARGE_TRIED:
            logger.debug("%s: large datagrams do not arrive", call.address)
            raise _TooLarge from error
        raise TransportError(
            f"{call.address}: nobody answered within {call.options.timeout:g} s; check the address and the network"
        ) from error


def _caller_quic(call: _Call, size: int) -> tuple[QuicConnection, bytes | None]:
    """A connection, which takes up an earlier session where there was one, and the certificate of that."""
    known = (call.target, call.credentials)
    session = _sessions.pop(known, None)
    configuration = configuration_of(is_client=True, size=size)
    configuration.server_name = call.host
    configuration.verify_mode = ssl.CERT_NONE  # Who listens there is seen within (quic_connection.py).
    if session is not None:
        configuration.session_ticket = session.ticket

    def remember(ticket: SessionTicket) -> None:
        shown = quic.get_peercert()
        if shown is not None:
            _sessions[known] = _Session(ticket, shown.public_bytes())
        elif session is not None:
            _sessions[known] = session._replace(ticket=ticket)

    quic = QuicConnection(configuration=configuration, session_ticket_handler=remember)
    return quic, session.certificate if session else None


def _connected(family: socket.AddressFamily, target: Address) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.connect(target)
    except OSError:
        sock.close()
        raise
    return sock
