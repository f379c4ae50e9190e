"""Datagrams by the many: a UDP socket whose kernel cuts what is sent and joins what comes (UDP GSO and GRO, udp(7)).

A system call a datagram would cost more than encrypting it. So datagrams of one size to one address are handed over
together, to be cut by the kernel or the card, and what came from one sender is handed up together with the size to cut
it at. Where the kernel or the card can't, datagrams go one by one.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections import deque
from collections.abc import Iterable

logger = logging.getLogger("vfiostream.transport")

Address = tuple[str, int] | tuple[str, int, int, int]
"""As ``socket`` has it: host and port, with flow and scope for IPv6."""

RECEIVE_BUFFER = 32 << 20
"""Bytes of datagrams that may wait in the kernel until we come; what comes beyond is lost. Twice the window of a link,
as the kernel counts its own overhead, too. Without the right to pass it, ``net.core.rmem_max`` is the limit.
"""
SEND_BUFFER = 8 << 20

LARGEST_BATCH = 65_000
"""Bytes that the kernel cuts at once: an IP packet's 65535 less its headers."""
MOST_SEGMENTS = 64
"""Datagrams that the kernel cuts one batch into at most (UDP_MAX_SEGMENTS; 128 from Linux 6.9)."""
LARGEST_DATAGRAM = 65_535

Here = tuple[tuple[int, int, bytes], ...]
"""Which address of this host datagrams came to, as what goes back is given along to come from there (ip(7))."""

_UDP_SEGMENT = 103
_UDP_GRO = 104
_IP_MTU = 14
_IPV6_MTU = 24
_IP_PKTINFO = 8
_IPV6_RECVPKTINFO = 49
_IPV6_PKTINFO = 50
# Only privileged processes may set these two.
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_ANCILLARY = socket.CMSG_SPACE(4) + socket.CMSG_SPACE(20)

_TRANSIENT = frozenset({errno.EAGAIN, errno.EINTR})
_CANT_CUT = frozenset({errno.EINVAL, errno.EIO, errno.EOPNOTSUPP, errno.ENOPROTOOPT})
"""What a kernel or a card says that does not cut."""


class UdpSocket:
    """A non-blocking UDP socket, which this object owns, and the datagrams it has not got rid of yet. One that
    ``listens`` may have several addresses, and answers from the one that was asked.
    """

    def __init__(self, sock: socket.socket, *, listens: bool = False) -> None:
        self.sock = sock
        self.trouble: OSError | None = None
        """The last thing the network said: for a connected socket, that nobody is there, or that the way is gone."""
        self._unsent: deque[tuple[list[bytes], Address, Here]] = deque()
        self._cuts = True
        sock.setblocking(False)
        for forced, allowed, size in (
            (_SO_RCVBUFFORCE, socket.SO_RCVBUF, RECEIVE_BUFFER),
            (_SO_SNDBUFFORCE, socket.SO_SNDBUF, SEND_BUFFER),
        ):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, size)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, allowed, size)
        if listens and sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        elif listens:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        try:
            sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
        except OSError as error:
            logger.debug("the kernel does not join datagrams: %s", error.strerror)

    @property
    def blocked(self) -> bool:
        """Whether datagrams wait for the kernel to have room."""
        return bool(self._unsent)

    def payload(self) -> int:
        """Bytes of a datagram that fit in a packet on the way to where the socket is connected, as far as the kernel
        knows.
        """
        if self.sock.family == socket.AF_INET6:
            return self.sock.getsockopt(socket.IPPROTO_IPV6, _IPV6_MTU) - 48
        return self.sock.getsockopt(socket.IPPROTO_IP, _IP_MTU) - 28

    def receive(self) -> tuple[bytes, int, Address, Here] | None:
        """What has come: datagrams from one sender, the size of each but the last, who sent them, and to where; or
        None.
        """
        while True:
            try:
                data, ancillary, _, address = self.sock.recvmsg(LARGEST_DATAGRAM, _ANCILLARY)
            except BlockingIOError:
                return None
            except OSError as error:
                # The kernel hands over what it heard of earlier datagrams (ICMP): none came with it.
                self.trouble = error
                if error.errno not in _TRANSIENT and error.errno not in _HEARD:
                    raise
                continue
            size = len(data)
            here: Here = ()
            for level, kind, value in ancillary:
                if level == socket.IPPROTO_UDP and kind == _UDP_GRO:
                    size = struct.unpack_from("=i" if len(value) >= 4 else "=H", value)[0]
                elif level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
                    here = ((level, kind, bytes(4) + value[4:8] + bytes(4)),)  # at whatever interface
                elif level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO:
                    here = ((level, kind, value[:16] + bytes(4)),)
            return data, size, address, here

    def send(self, datagrams: Iterable[tuple[bytes, Address]], here: Here = ()) -> None:
        """Send in order what the kernel has room for, from ``here`` if that is given, and keep the rest for
        :meth:`send_on`. What can't go is lost, as datagrams may be.
        """
        batch: list[bytes] = []
        segment = left = 0
        to: Address | None = None
        for data, address in datagrams:
            size = len(data)
            # All of a batch have the size of its first; the last may be shorter.
            if to != address or size > segment or size > left or len(batch) == MOST_SEGMENTS:
                batch = []
                segment, left, to = size, LARGEST_BATCH, address
                self._unsent.append((batch, address, here))
            batch.append(data)
            left = left - size if size == segment and self._cuts else 0
        self.send_on()

    def send_on(self) -> None:
        """Send what has waited."""
        unsent = self._unsent
        while unsent:
            batch, address, here = unsent[0]
            try:
                if len(batch) == 1:
                    self.sock.sendmsg(batch, here, 0, address)
                else:
                    cut = (socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("=H", len(batch[0])))
                    self.sock.sendmsg(batch, (cut, *here), 0, address)
            except BlockingIOError:
                return
            except OSError as error:
                if len(batch) > 1 and (error.errno in _CANT_CUT or error.errno == errno.EMSGSIZE):
                    # Too long for the path is cut by nobody, but a single datagram goes in fragments.
                    if error.errno != errno.EMSGSIZE:
                        logger.debug("datagrams go one by one from here: %s", error.strerror)
                        self._cuts = False
                    unsent.popleft()
                    unsent.extendleft(([data], address, here) for data in reversed(batch))
                    continue
                if error.errno != errno.EMSGSIZE:  # That says of a datagram that it was a probe.
                    self.trouble = error
            unsent.popleft()


_HEARD = frozenset(
    {
        errno.ECONNREFUSED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EMSGSIZE,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOPROTOOPT,
        errno.EPROTO,
    }
)
"""What a socket says of datagrams it sent before."""
