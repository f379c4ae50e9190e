"""Descriptors that whoever started this process has passed on: ``fd:N``, ``fd:IN,OUT``, ``stdio:``, ``systemd:NAME``.

A connected stream socket is a link, two descriptors are one, a pipe is one way, and a listening socket can be received
from. Whoever passed a connection on has believed its peer; who may connect to a listening socket has the rules of its
kind. Invariants:

- Nothing is taken that was not passed on: what this process has opened itself is closed on exec, so a descriptor that
  is (the event loop's own, as a rule) is refused.
- What is taken is the transport's alone. Its number is closed; where that is 0 or 1, which anything may read from or
  print to, ``/dev/null`` takes the place of standard input, and standard error that of standard output.
"""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import os
import re
import socket
import stat
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager
from typing import NamedTuple

import anyio.lowlevel

from vfiostream.errors import PeerRefused, TransportError, UsageError
from vfiostream.transports.arrivals import arrivals
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.descriptors import DescriptorTransport, socket_of
from vfiostream.transports.options import Options
from vfiostream.transports.stream import SocketListener, SocketTransport, tune

logger = logging.getLogger("vfiostream.transport")

OPTIONS = frozenset({"answers", "plain", "silent"})

FIRST_PASSED = 3
"""The first descriptor that systemd passes on (sd_listen_fds(3))."""
MAX_PASSED = 1024
"""Most descriptors that are looked at of systemd's; more than a service is allowed by default."""
MAX_NAMES = MAX_PASSED * 256
"""Characters of their names, each of which has 255 at most."""

_FD_ADDRESS = re.compile(r"fd:(0|[1-9][0-9]{0,8})(?:,(0|[1-9][0-9]{0,8}))?")
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)


class Ends(NamedTuple):
    """Descriptors of an address: the same twice where it names one."""

    reads: int
    writes: int


def parse_ends(address: str) -> Ends:
    """The descriptors that ``address`` (``fd:``, ``stdio:``) names; raises UsageError."""
    if address == "stdio:":
        return Ends(0, 1)
    match = _FD_ADDRESS.fullmatch(address)
    if match is None:
        raise UsageError(f"{address!r} is not fd:N or fd:IN,OUT, with numbers of descriptors, nor stdio: without more")
    first, second = match.groups()
    ends = Ends(int(first), int(second or first))
    if 2 in ends:
        raise UsageError(f"{address}: descriptor 2 is standard error, where messages go; pass another one on")
    if second is not None and ends.reads == ends.writes:
        raise UsageError(f"{address}: that is one descriptor twice; write fd:{first}")
    return ends


# ---- which descriptors are what


def _kind(address: str, fd: int) -> int:
    """Whether ``fd`` is a pipe (S_IFIFO) or a stream socket (S_IFSOCK); raises UsageError for anything else."""
    try:
        mode = os.fstat(fd).st_mode
        passed = os.get_inheritable(fd) or fd <= 2
    except OSError as error:
        raise UsageError(
            f"{address}: descriptor {fd} is not open ({error.strerror}); have it passed on by whoever starts this"
        ) from error
    if not passed:
        raise UsageError(f"{address}: descriptor {fd} was opened in this process; name one that was passed on to it")
    if stat.S_ISREG(mode):
        raise UsageError(f"{address}: descriptor {fd} is a regular file; name it as file:PATH")
    if not stat.S_ISFIFO(mode) and not stat.S_ISSOCK(mode):
        what = "a terminal" if os.isatty(fd) else "neither a pipe nor a socket"
        raise UsageError(f"{address}: descriptor {fd} is {what}; put a pipe or a stream socket in its place")
    if stat.S_ISSOCK(mode):
        with socket_of(fd) as sock:
            if sock.type != socket.SOCK_STREAM:
                raise UsageError(f"{address}: descriptor {fd} is a socket of messages; pass on a stream socket")
    return stat.S_IFMT(mode)


def _check_way(address: str, fd: int, *, writes: bool) -> None:
    """Refuse a descriptor that does not go that way: the other end of a pipe, or a socket that nobody is at."""
    if _kind(address, fd) == stat.S_IFIFO:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == (os.O_RDONLY if writes else os.O_WRONLY):
            need, way = ("written", "reading") if writes else ("read", "writing")
            raise UsageError(f"{address}: descriptor {fd} has to be {need}, and is open for {way} only; pass the other")
        return
    with socket_of(fd) as sock:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise UsageError(f"{address}: descriptor {fd} is a listening socket, which can only be received from")
        try:
            sock.getpeername()
        except OSError as error:
            raise UsageError(
                f"{address}: the socket {fd} is not connected ({error.strerror}); pass on one that is"
            ) from error


def _is_listening(address: str, fd: int, *, trusted: bool) -> bool:
    """Whether ``fd`` listens; raises UsageError where it does, and more may connect to it than should."""
    if _kind(address, fd) != stat.S_IFSOCK:
        return False
    with socket_of(fd) as sock:
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        if sock.family not in _FAMILIES:
            raise UsageError(f"{address}: descriptor {fd} listens neither for TCP nor at a path; pass on one that does")
        name = sock.getsockname()
        if sock.family != socket.AF_UNIX and not trusted and not ipaddress.ip_address(name[0]).is_loopback:
            raise UsageError(
                f"{address}: it listens at {name[0]}, and whoever reaches that could send, since TCP knows no one; "
                "have it listen at a loopback address, or say that the network is trusted (--plain)"
            )
    return True


def _take(address: str, fds: Iterable[int]) -> dict[int, int]:
    """Make ``fds`` ours; returns their new numbers."""
    taken: dict[int, int] = {}
    with ExitStack() as undo:
        try:
            for fd in fds:
                taken[fd] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_PASSED)
                undo.callback(os.close, taken[fd])
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, null)
            for fd in taken:
                if fd <= 1:
                    os.dup2(2 if fd == 1 else null, fd)
                else:
                    os.close(fd)
        except OSError as error:
            raise TransportError(f"{address}: it can't be taken ({error.strerror}); free some descriptors") from error
        undo.pop_all()
    os.close(null)
    return taken


# ---- what is made of them


def _link(address: str, ends: Ends) -> Transport:
    """What goes both ways."""
    if ends.reads == ends.writes and _kind(address, ends.reads) == stat.S_IFIFO:
        raise UsageError(f"{address}: descriptor {ends.reads} is a pipe, and nobody answers there; give two, fd:IN,OUT")
    _check_way(address, ends.reads, writes=False)
    _check_way(address, ends.writes, writes=True)
    taken = _take(address, dict.fromkeys(ends))
    reads, writes = taken[ends.reads], taken[ends.writes]
    if reads == writes:
        sock = socket.socket(fileno=reads)
        if sock.family in _FAMILIES:
            tune(sock)
            return SocketTransport(sock, address)
        sock.detach()
    return DescriptorTransport(address, reads, writes, answers=True)


def _one_way(address: str, ends: Ends, *, writes: bool) -> Transport:
    fd = ends.writes if writes else ends.reads
    if ends.reads != ends.writes and address != "stdio:":
        raise UsageError(f"{address}: a checkpoint goes one way; give one descriptor, fd:{fd}")
    _check_way(address, fd, writes=writes)
    taken = _take(address, [fd])[fd]
    return DescriptorTransport(address, None if writes else taken, taken if writes else None, answers=False)


class PassedListener(Listener):
    """What is connected already: gives the one transport there is."""

    def __init__(self, transport: Transport) -> None:
        self.address = transport.address
        self._transport: Transport | None = transport
        self._closed = False

    async def accept(self) -> Transport:
        await anyio.lowlevel.checkpoint()
        if self._closed:
            raise TransportError(f"{self.address}: the listener was closed; open a new one")
        if self._transport is None:
            raise TransportError(f"{self.address}: it was accepted, and there is no other; pass on a listening socket")
        transport, self._transport = self._transport, None
        return transport

    async def aclose(self) -> None:
        self._closed = True
        if self._transport is not None:
            transport, self._transport = self._transport, None
            await transport.aclose()


def peer_user(sock: socket.socket) -> int:
    """The user of the process at the other end of a UNIX socket, as the kernel knows it (unix(7), SO_PEERCRED)."""
    _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)


class PassedSocketListener(SocketListener):
    """A listening socket that was made elsewhere: at a path, whose mode is not ours, processes of our own user and of
    root are believed.
    """

    def __init__(self, sock: socket.socket, address: str, options: Options) -> None:
        super().__init__(sock, address)
        self._refused = options.refused

    async def accept_socket(self) -> tuple[socket.socket, str]:
        while True:
            sock, address = await super().accept_socket()
            if sock.family != socket.AF_UNIX:
                return sock, address
            user = peer_user(sock)
            if user in (0, os.geteuid()):
                return sock, address
            sock.close()
            refusal = PeerRefused(f"{address}: a process of user {user}; send as user {os.geteuid()} or root")
            logger.warning("refused %s", refusal)
            if self._refused is not None:
                self._refused(refusal)


@asynccontextmanager
async def connect(address: str, options: Options) -> AsyncIterator[Transport]:
    """Take what is connected already; one way, only to be sent to."""
    options.only(address, "answers")
    await anyio.lowlevel.checkpoint()
    if address.startswith("systemd:"):
        raise UsageError(f"{address}: a service that systemd starts is there to receive; send to where it listens")
    ends = parse_ends(address)
    async with _link(address, ends) if options.answers else _one_way(address, ends, writes=True) as transport:
        yield transport


@asynccontextmanager
async def listen(address: str, options: Options) -> AsyncIterator[Listener]:
    """Take a listening socket, or what is connected already, which ``accept`` then gives; one way, only to be received
    from.
    """
    systemd = address.startswith("systemd:")
    options.only(address, "plain", "silent", *(() if systemd else ("answers",)))
    await anyio.lowlevel.checkpoint()
    ends = Ends(*[_passed(address)] * 2) if systemd else parse_ends(address)
    listener: Listener
    if not options.answers:
        listener = PassedListener(_one_way(address, ends, writes=False))
    elif ends.reads == ends.writes and _is_listening(address, ends.reads, trusted=options.plain):
        sock = socket.socket(fileno=_take(address, [ends.reads])[ends.reads])
        tune(sock)
        async with arrivals(PassedSocketListener(sock, address, options), options) as listener:
            yield listener
        return
    else:
        listener = PassedListener(_link(address, ends))
    async with listener:
        yield listener


def _passed(address: str) -> int:
    """The descriptor that systemd has passed on for ``address`` (sd_listen_fds(3)); raises UsageError."""
    name = address.removeprefix("systemd:")
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        raise UsageError(f"{address}: systemd has passed no socket on to this process; start it by a socket unit")
    count = os.environ.get("LISTEN_FDS", "")
    names = os.environ.get("LISTEN_FDNAMES", "")
    if re.fullmatch("[0-9]{1,4}", count) is None or not 0 < int(count) <= MAX_PASSED or len(names) > MAX_NAMES:
        raise UsageError(f"{address}: LISTEN_FDS and LISTEN_FDNAMES are not what systemd sets; see the socket unit")
    numbers = range(FIRST_PASSED, FIRST_PASSED + int(count))
    named = names.split(":") if names else ["unknown"] * len(numbers)
    if len(named) != len(numbers):
        raise UsageError(f"{address}: LISTEN_FDNAMES has {len(named)} names of {count} sockets; see the socket unit")
    found = [fd for fd, given in zip(numbers, named, strict=True) if name in ("", given)]
    if len(found) != 1:
        what = f"{len(found)} sockets of that name" if name else f"{count} sockets"
        raise UsageError(
            f"{address}: systemd has passed on {what}, and one is needed; name one by its FileDescriptorName, as in "
            f"systemd:NAME (here are {', '.join(sorted(set(named)))})"
        )
    return found[0]
