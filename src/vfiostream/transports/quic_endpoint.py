"""A UDP socket and the QUIC connections over it, driven in two tasks: what ends that connect and that listen share.

The library (qh3) keeps a connection and does no input or output; the endpoint brings it datagrams, its timer and the
kernel's room. One task waits for the socket, the other for the clock and for those who have something to send.
Everything that has come is handed over before anything is sent, so that one acknowledgement stands for many packets.
"""

from __future__ import annotations

import socket
from time import monotonic

import anyio
import anyio.lowlevel
from qh3 import QuicConfiguration

from vfiostream.errors import TransportError
from vfiostream.transports.quic_connection import ALPN, IDLE, WINDOW, Connection
from vfiostream.transports.udp import Address, Here, UdpSocket

SAFE_DATAGRAM = 1232
"""Bytes of a datagram that every path carries (IPv6 carries packets of 1280)."""
ETHERNET_DATAGRAM = 1472
"""Up to this the library finds out itself what the path carries; above, the handshake tries it."""
BURST = 64
"""Batches of datagrams that are taken from the kernel before anything is sent."""
LINGER = 10.0
"""Seconds that what was sent may take to arrive when a context ends."""
CID = 8
"""Bytes of our connection ids."""

_NEVER = float("inf")


class Endpoint:
    """A socket and the connections over it."""

    def __init__(self, udp: UdpSocket) -> None:
        self.udp = udp
        self.connections: list[Connection] = []
        self._woken = anyio.Event()
        self._due = _NEVER

    def wake(self) -> None:
        """There is something to send: let the clock see to it."""
        self._woken.set()

    def deliver(self, data: bytes, segment: int, address: Address, here: Here, now: float) -> None:
        """Datagrams have come from ``address``."""
        raise NotImplementedError

    def ended(self, connection: Connection) -> None:
        """A connection is over."""

    def broke(self, why: str) -> None:
        """The socket is of no use any more."""
        for connection in self.connections:
            connection.fail(why)

    def look(self, now: float) -> None:
        """See to the socket itself."""

    async def read(self) -> None:
        """Hand over what comes, for ever."""
        while True:
            try:
                await anyio.wait_readable(self.udp.sock)
            except anyio.ClosedResourceError:
                await anyio.lowlevel.checkpoint()  # It was replaced.
                continue
            now = monotonic()
            try:
                for _ in range(BURST):
                    came = self.udp.receive()
                    if came is None:
                        break
                    self.deliver(*came, now)
            except OSError as error:
                self.broke(f"receiving failed ({error.strerror}); start over on a new connection")
                return
            if self._turn() < self._due:
                self.wake()

    async def keep_time(self) -> None:
        """Send what is to be sent when it is due, for ever."""
        while True:
            if self.udp.blocked:
                try:
                    await anyio.wait_writable(self.udp.sock)
                except anyio.ClosedResourceError:
                    await anyio.lowlevel.checkpoint()
                self.udp.send_on()
            self._woken = anyio.Event()
            self._due = self._turn()
            if not self.udp.blocked:
                with anyio.move_on_after(max(0.0, self._due - monotonic())):
                    await self._woken.wait()

    def _turn(self) -> float:
        """Send what is there to be sent; returns when it is the clock's turn."""
        now = monotonic()
        self.look(now)
        for connection in tuple(self.connections):
            if self.udp.blocked:
                break
            if datagrams := connection.advance(now):
                self.udp.send(datagrams, connection.here)
                connection.sent()
            if connection.over:
                self.connections.remove(connection)
                self.ended(connection)
        if self.udp.blocked:
            return 0.0
        return min((connection.deadline() for connection in self.connections), default=_NEVER)

    async def hang_up(self) -> None:
        """Let arrive what was sent, say goodbye and close the socket; bounded in time."""
        with anyio.move_on_after(LINGER):
            for connection in tuple(self.connections):
                for stream in connection.streams.values():
                    await stream.aclose()
            for connection in tuple(self.connections):
                while connection.under_way:
                    await connection.changed.wait()
            for connection in tuple(self.connections):
                connection.close()
                while connection.closing and not connection.over:
                    await connection.changed.wait()


def configuration_of(*, is_client: bool, size: int) -> QuicConfiguration:
    return QuicConfiguration(
        is_client=is_client,
        alpn_protocols=[ALPN],
        idle_timeout=IDLE,
        # What may be under way is bounded by our own credit: the library's must never be in its way.
        max_data=2 * WINDOW,
        max_stream_data=2 * WINDOW,
        max_datagram_size=size,
        probe_datagram_size=size < ETHERNET_DATAGRAM,
        connection_id_length=CID,
    )


def numeric(address: Address) -> Address:
    """As the library takes it: without the name of an interface, which its number says as well."""
    return (address[0].partition("%")[0], *address[1:])


async def targets_of(address: str, host: str, port: int) -> list[tuple[socket.AddressFamily, Address]]:
    try:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except (socket.gaierror, UnicodeError) as error:
        raise TransportError(f"{address}: the host can't be found; check its name") from error
    if not found:
        raise TransportError(f"{address}: the host has no address this system can use; name one of another family")
    return [(family, target) for family, _, _, _, target in found]


def text_of(address: Address) -> str:
    host, port = address[:2]
    return f"quic:[{host}]:{port}" if ":" in host else f"quic:{host}:{port}"
