"""TCP and UNIX sockets, driven without a stream class in between.

A raw non-blocking socket with ``sendmsg`` and ``recv_into`` copies nothing and asks the event loop only when the kernel
has no room or no data. Measured against iperf3 it reaches 0.58 to 0.66 on asyncio and trio alike; anyio's streams reach
0.3 to 0.64 depending on the loop, asyncio's 0.25.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import re
import socket
import stat
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import anyio
import anyio.lowlevel

from vfiostream.buffers import Buffer
from vfiostream.errors import TransportError, UsageError
from vfiostream.transports.arrivals import arrivals
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.joining import joined, side_by_side
from vfiostream.transports.options import MAX_CHANNELS, Options
from vfiostream.transports.polled import PolledTransport

logger = logging.getLogger("vfiostream.transport")

OPTIONS = frozenset({"plain", "channels", "reconnect", "silent"})

KEEPALIVE_IDLE = 10
"""Seconds without a sign of life after which the kernel asks the peer for one."""
KEEPALIVE_INTERVAL = 5
"""Seconds between such questions."""
KEEPALIVE_COUNT = 4
"""Unanswered questions after which the connection counts as lost: 30 seconds in all."""

WAKE_AT = 1024 * 1024
"""Bytes that a reader sleeps for at most where it needs so many: a wake-up costs as much as copying 100 KiB, and the
sender goes on meanwhile.
"""

BACKLOG = 2 * MAX_CHANNELS
"""Connections that may wait to be accepted."""

UNIX_SEND_BUFFER = 2 << 20
"""Bytes that may wait on a UNIX socket; Linux allows ``net.core.wmem_max`` at most, without a word. With its default of
208 KiB a chunk of 1 MiB goes in five parts, and the two ends keep waking each other: that moved 3 to 7 GB/s, this moves
8, and more gained nothing. For TCP the kernel finds the size itself, and stops doing so where it is set.
"""

UNIX_PATH_MAX = 107
"""Bytes of ``sun_path`` without its terminating zero (unix(7))."""

LOOPBACK = "127.0.0.1"
"""Where no host is named."""

_PLACE = re.compile(r"(?:\[(?P<bracketed>[^][]+)\]|(?P<plain>[^][:]*)):(?P<port>[0-9]{1,5})")


_TCP_INFO = struct.Struct("<3xB20xI28xI")
"""Of struct tcp_info (linux/tcp.h): tcpi_probes, tcpi_unacked and tcpi_last_ack_recv, in milliseconds."""


class SocketTransport(PolledTransport):
    """A connected stream socket, non-blocking, which this object owns."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        super().__init__(address)
        self._sock = sock
        self._wakes_at = 1 if sock.family != socket.AF_UNIX else None
        """Bytes that the kernel lets a waiting reader wake up for (SO_RCVLOWAT); None where it has no such thing."""

    def _write(self, buffers: Sequence[Buffer]) -> int:
        return self._sock.sendmsg(buffers, (), socket.MSG_NOSIGNAL)

    def _read(self, into: Sequence[memoryview]) -> int:
        return self._sock.recvmsg_into(into)[0]

    @property
    def silent(self) -> float:
        if self._closed or self._sock.family == socket.AF_UNIX:
            return 0.0
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        probes, unacknowledged, since = _TCP_INFO.unpack(info)
        return since / 1000 if probes or unacknowledged else 0.0

    async def _writable(self) -> None:
        await anyio.wait_writable(self._sock)

    async def _readable(self, least: int) -> None:
        self._wake_at(min(least, WAKE_AT))
        await anyio.wait_readable(self._sock)

    async def _end(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    async def _let_go(self) -> None:
        await _close(self._sock)

    def _wake_at(self, count: int) -> None:
        """Do not wake a waiting reader for fewer than ``count`` bytes. The kernel wakes it all the same where the
        stream ends or its own buffers are full (tcp_stream_is_readable in net/ipv4/tcp.c); a UNIX socket always does.
        """
        if self._wakes_at not in (None, count):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._wakes_at = count


class SocketListener(Listener):
    """A listening stream socket, non-blocking, which this object owns; with the path it unlinks, for UNIX."""

    def __init__(self, sock: socket.socket, address: str, path: str | None = None) -> None:
        self.address = address
        self._sock = sock
        self._path = path
        self._inode = _inode(path) if path is not None else None
        self._closed = False

    async def accept(self) -> Transport:
        return SocketTransport(*await self.accept_socket())

    async def accept_socket(self) -> tuple[socket.socket, str]:
        """As :meth:`accept`, for those who make another transport of it: the socket, not blocking, and the sender's
        address.
        """
        await anyio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise TransportError(f"{self.address}: the listener was closed; open a new one")
            try:
                sock, peer = self._sock.accept()
            except BlockingIOError:
                try:
                    await anyio.wait_readable(self._sock)
                except anyio.ClosedResourceError as error:
                    raise TransportError(f"{self.address}: the listener was closed; open a new one") from error
            except ConnectionAbortedError:
                logger.debug("%s: a sender gave up before it was accepted", self.address)
            except OSError as error:
                raise TransportError(
                    f"{self.address}: accepting a sender failed ({error.strerror}); free resources and try again"
                ) from error
            else:
                break
        sock.setblocking(False)
        address = self.address if sock.family == socket.AF_UNIX else _text(self.address, peer)
        logger.debug("%s: accepted %s", self.address, address)
        return sock, address

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._path is not None and self._inode is not None and _inode(self._path) == self._inode:
            try:
                os.unlink(self._path)
            except OSError as error:
                logger.warning("%s: could not remove the socket: %s", self.address, error.strerror)
        await _close(self._sock)
        logger.debug("%s: closed", self.address)


@asynccontextmanager
async def connect(address: str, options: Options) -> AsyncIterator[Transport]:
    """Connect to whoever listens at ``address``; of a host with several addresses, the first that answers."""

    async def dial() -> PolledTransport:
        return SocketTransport(await connect_socket(address), address)

    async with joined(address, options, partial(side_by_side, address, options.timeout, dial)) as link:
        yield link


async def connect_socket(address: str) -> socket.socket:
    """A socket, not blocking, that is connected to ``address``, whose scheme does not matter here. Raises as
    :func:`vfiostream.transports.connect`.
    """
    for family, target in await _targets(address):
        try:
            sock = await _connected(family, target)
        except OSError as error:
            logger.debug("%s: connecting to %s failed: %s", address, target, error.strerror)
            failure = error
        else:
            logger.debug("%s: connected to %s", address, target)
            return sock
    raise TransportError(f"{address}: {_connect_problem(failure)}") from failure


async def _connected(family: socket.AddressFamily, target: str | tuple[str, int]) -> socket.socket:
    sock = _socket(family)
    try:
        code = sock.connect_ex(target)
        if code == errno.EINPROGRESS:
            await anyio.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_problem(error: OSError) -> str:
    if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
        return "nobody listens there; start `vfiostream receive` on it first"
    if error.errno == errno.EAGAIN:
        return "too many senders wait there already; try again when it is free"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"connecting is not allowed ({error.strerror}); run as the user that listens there"
    return f"connecting failed ({error.strerror}); check the address and the network"


@asynccontextmanager
async def listen(address: str, options: Options) -> AsyncIterator[Listener]:
    """Listen at ``address``; of a host with several addresses, at the first that can be bound.

    A UNIX socket that nobody listens on any more is replaced. Only its owner may connect to the new one. To a TCP port
    everybody may: so it has to be one of the loopback, unless ``options.plain`` says that the network is trusted.
    """
    if address.startswith("unix:"):
        options.only(address, "channels", "reconnect", "silent")
    async with arrivals(await listen_socket(address, trusted=options.plain), options) as listener:
        yield listener


async def listen_socket(address: str, *, trusted: bool) -> SocketListener:
    """Listen at ``address``, whose scheme does not matter here. Whoever is not ``trusted`` may come from this host
    only. Raises as :func:`vfiostream.transports.listen`.
    """
    targets = await _targets(address, passive=True)
    for family, target in targets:
        if family != socket.AF_UNIX and not trusted and not ipaddress.ip_address(target[0]).is_loopback:
            raise UsageError(
                f"{address}: whoever reaches this port could send, since tcp: knows no one; listen at tls:, which "
                "does, or at a loopback address, or say that the network is trusted (--plain)"
            )
    path = str(targets[0][1]) if targets[0][0] == socket.AF_UNIX else None
    if path is not None:
        _clear_stale(path, address)
    for family, target in targets:
        try:
            sock = _bound(family, target)
        except OSError as error:
            logger.debug("%s: listening at %s failed: %s", address, target, error.strerror)
            failure = error
        else:
            name = address if path is not None else _text(address, sock.getsockname())
            listener = SocketListener(sock, name, path)
            logger.debug("%s: listening", listener.address)
            return listener
    what = "an address and port of this host" if path is None else "a path in a folder that exists"
    raise TransportError(f"{address}: listening failed ({failure.strerror}); choose {what} you may use") from failure


def _bound(family: socket.AddressFamily, target: str | tuple[str, int]) -> socket.socket:
    sock = _socket(family)
    try:
        if family == socket.AF_UNIX:
            # Linux gives the socket's own mode to the file that bind makes, less the umask (unix_bind_bsd in the
            # kernel's net/unix/af_unix.c): so there is no moment at which others may connect.
            os.fchmod(sock.fileno(), 0o600)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(target)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _clear_stale(path: str, address: str) -> None:
    """Remove a socket nobody is bound to any more; refuse anything else that has the name."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # bind says what is wrong with the path, if anything is
    if not stat.S_ISSOCK(mode):
        raise TransportError(f"{address}: the path exists and is not a socket; choose another one")
    # Connecting as a datagram socket tells a live stream listener (EPROTOTYPE) from a stale file (ECONNREFUSED), and
    # the live one never hears of it (unix_find_bsd in the kernel's net/unix/af_unix.c).
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        code = probe.connect_ex(path)
    if code != errno.ECONNREFUSED:
        raise TransportError(
            f"{address}: the socket belongs to a program that runs or to another user; choose another path"
        )
    try:
        os.unlink(path)
    except OSError as error:
        raise TransportError(
            f"{address}: a socket nobody uses can't be replaced ({error.strerror}); remove it"
        ) from error
    logger.debug("%s: removed a socket nobody used", address)


def host_and_port(address: str) -> tuple[str, int]:
    """Of ``SCHEME:HOST:PORT``; no HOST is the loopback. Raises :class:`~vfiostream.errors.UsageError`."""
    scheme, _, place = address.partition(":")
    match = _PLACE.fullmatch(place)
    if match is None or int(match["port"]) > 65535:
        raise UsageError(
            f"{address!r} is not {scheme}:HOST:PORT with a port up to 65535; an IPv6 HOST goes in brackets"
        )
    return match["bracketed"] or match["plain"] or LOOPBACK, int(match["port"])


async def _targets(address: str, *, passive: bool = False) -> list[tuple[socket.AddressFamily, str | tuple[str, int]]]:
    """Socket family and address of everything ``address`` may mean, in the order to try; at least one."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        if len(os.fsencode(rest)) > UNIX_PATH_MAX:
            raise UsageError(f"{address!r} is longer than the {UNIX_PATH_MAX} bytes of a UNIX socket; shorten the path")
        return [(socket.AF_UNIX, rest)]
    host, port = host_and_port(address)
    if not passive and port == 0:
        raise UsageError(f"{address!r} has port 0, which can't be connected to; write the port the other end shows")
    try:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise TransportError(f"{address}: the host can't be found; check its name") from error
    if not found:
        raise TransportError(f"{address}: the host has no address this system can use; name one of another family")
    return [(family, target) for family, _, _, _, target in found]


def _socket(family: socket.AddressFamily) -> socket.socket:
    """A non-blocking socket; what ``accept`` makes of a listening one inherits its options (tcp(7)), but not
    that, nor the buffer of a UNIX one: who listens only answers."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    tune(sock)
    return sock


def tune(sock: socket.socket) -> None:
    """Make a stream socket what the transports and listeners here take."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BUFFER)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)


async def _close(sock: socket.socket) -> None:
    """Close a socket others may be waiting on; the caller has marked its owner closed, so nobody starts to."""
    anyio.notify_closing(sock)
    try:
        # The waiters go before the descriptor does: anyio knows them by its number, which the next socket may get.
        await anyio.lowlevel.cancel_shielded_checkpoint()
    finally:
        sock.close()


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _text(like: str, name: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """``name`` as an address of the scheme of ``like``."""
    scheme = like.partition(":")[0]
    host, port = name[:2]
    return f"{scheme}:[{host}]:{port}" if ":" in host else f"{scheme}:{host}:{port}"
