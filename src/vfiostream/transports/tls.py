"""TLS 1.3 over TCP, with a certificate at both ends.

OpenSSL reads and writes the socket itself, one record a call: a copy into memory of our own, to gather system calls,
costs more than it saves (``docs/transports.md``). Python's own ``ssl`` can't ask a client for a certificate that no CA
signed, so pinning needs pyOpenSSL. Invariants:

- A record that OpenSSL has sealed must go next, whatever is offered then: its bytes count as taken, and a copy of them
  is kept until the kernel has all of it (:attr:`TlsTransport.holds`).
- The end of the stream is a close_notify of the peer's. One without it is a lost connection, as anybody on the way can
  cut a TCP connection.
- What ended the connection is remembered, and said again by every later call: OpenSSL says it once.
- A peer is believed because ``tls_trust`` said so, never because nothing was said against it.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, closing
from functools import partial

import anyio
import anyio.lowlevel
from OpenSSL import SSL

from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost, PeerRefused, TransportError, UsageError
from vfiostream.transports import stream
from vfiostream.transports.arrivals import arrivals
from vfiostream.transports.background import Background, background
from vfiostream.transports.channel import Signal
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.credentials import Credentials, required
from vfiostream.transports.joining import joined, side_by_side
from vfiostream.transports.options import MAX_CHANNELS, Options
from vfiostream.transports.polled import PolledTransport
from vfiostream.transports.stream import WAKE_AT, SocketListener, SocketTransport
from vfiostream.transports.tls_trust import GREETING, REFUSED_BY_US, Judge, Trouble, context_of, is_ip, reason_of

logger = logging.getLogger("vfiostream.transport")

OPTIONS = frozenset({"credentials", "channels", "reconnect", "silent"})

HANDSHAKE_TIMEOUT = 10.0
"""Seconds that a handshake may take."""
STRANGERS = 2 * MAX_CHANNELS
"""Handshakes that a listener carries on at a time; a further one takes the place of the oldest, so that those who
connect and say nothing can't keep the right sender out.
"""
WAITING = 2 * MAX_CHANNELS
"""Believed senders that may wait to be accepted."""
RECORD = 16384
"""Bytes of content in a record at most (RFC 8446, 5.1)."""
SEALED = RECORD + 512
"""More than a record takes on the link."""


async def _handshake(
    sock: socket.socket, context: SSL.Context, credentials: Credentials, address: str, *, host: str | None
) -> TlsTransport:
    """Make TLS of a connected socket, or close it. ``host`` is whom we connected to; None where we accepted."""
    trouble = Trouble(address, credentials)
    judge = Judge(credentials, credentials.peer_name or host)
    try:
        connection = SSL.Connection(context, sock)
        connection.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, judge)
        if host is None:
            connection.set_accept_state()
        else:
            connection.set_connect_state()
            if not is_ip(host):
                connection.set_tlsext_host_name(_ascii(host, address))
        try:
            with anyio.fail_after(HANDSHAKE_TIMEOUT):
                await _until_done(connection.do_handshake, sock)
                if not judge.believed:
                    raise PeerRefused(f"{address}: {judge.problem}")
                if host is not None:
                    await _until_believed(connection, sock)
        except TimeoutError as error:
            raise TransportError(
                f"{address}: the other end did not greet us within {HANDSHAKE_TIMEOUT:g} s; let both ends use tls:"
            ) from error
        except SSL.Error as error:
            if reason_of(error) in REFUSED_BY_US:
                raise PeerRefused(f"{address}: {judge.problem}") from error
            raise trouble.of(error, GREETING) from error
    except BaseException:
        sock.close()
        raise
    return TlsTransport(sock, address, connection, judge, trouble)


async def _until_done(step: Callable[[], object], sock: socket.socket) -> None:
    """Take a step of OpenSSL's as often as it takes, waiting for what it asks for."""
    while True:
        try:
            step()
        except SSL.WantReadError:
            await anyio.wait_readable(sock)
        except SSL.WantWriteError:
            await anyio.wait_writable(sock)
        else:
            return


async def _until_believed(connection: SSL.Connection, sock: socket.socket) -> None:
    """Wait until the server has accepted our certificate, which a client of TLS 1.3 is not told. What a server says
    first then is an alert, or else a session ticket, which it sends to those it believes (RFC 8446, 4.6.1).
    """
    await anyio.wait_readable(sock)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except SSL.WantReadError:
        pass  # It was a ticket.


def _ascii(host: str, address: str) -> bytes:
    try:
        return host.encode("idna")
    except UnicodeError as error:
        raise UsageError(f"{address}: {host!r} is not the name of a host; check it") from error


# ---- the transport


class TlsTransport(SocketTransport):
    """A connected socket with TLS over it; this object owns both."""

    keeps = 4 * RECORD
    """One record that comes, and one that goes, sealed and as it was."""

    def __init__(
        self, sock: socket.socket, address: str, connection: SSL.Connection, judge: Judge, trouble: Trouble
    ) -> None:
        super().__init__(sock, address)
        self.peer = judge.fingerprint
        self._connection = connection
        self._trouble = trouble
        self._rest = b""
        """Content of the record that OpenSSL has sealed and the kernel has not taken whole."""
        self._problem: TransportError | None = None
        self._end_of_socket = select.poll()
        self._end_of_socket.register(sock, 0)

    @property
    def holds(self) -> bool:
        return bool(self._rest)

    def _write(self, buffers: Sequence[Buffer]) -> int:
        self._flush()
        taken = 0
        with closing(_records(buffers)) as records:
            for record in records:
                try:
                    sent = self._connection.send(record)
                except SSL.WantWriteError:
                    sent = 0
                except SSL.Error as error:
                    problem = self._broken(error, "sending")
                    if taken:
                        break  # What was taken has to be told; the next call says the problem.
                    raise problem from error
                taken += len(record)
                if sent < len(record):
                    self._rest = bytes(record[sent:])
                    break
        return taken

    def _flush(self) -> None:
        """Hand over what was sealed, or raise BlockingIOError."""
        self._check_unbroken()
        if self._end_of_socket.poll(0):
            # After a write that failed OpenSSL would not give what the peer said before it was gone.
            raise self._trouble.lost(errno.ECONNRESET, "sending")
        try:
            while self._rest:
                self._rest = self._rest[self._connection.send(self._rest) :]
        except SSL.WantWriteError as error:
            raise BlockingIOError from error
        except SSL.Error as error:
            raise self._broken(error, "sending") from error

    def _read(self, into: Sequence[memoryview]) -> int:
        self._check_unbroken()
        count = 0
        try:
            for view in into:
                start, end = 0, len(view)
                while start < end:
                    with view[start : start + RECORD] as place:  # pyOpenSSL allocates as much as it may give.
                        got = self._connection.recv_into(place)
                    start += got
                    count += got
        except SSL.ZeroReturnError:
            pass
        except (SSL.WantReadError, SSL.WantWriteError) as error:
            # Write: a new key that the peer asked for waits for room; it goes with a later call.
            if not count:
                raise BlockingIOError from error
        except SSL.Error as error:
            problem = self._broken(error, "receiving")
            if not count:
                raise problem from error
        return count

    async def _writable(self) -> None:
        await super()._writable()
        try:
            self._flush()
        except BlockingIOError:
            pass

    async def _readable(self, least: int) -> None:
        if self._connection.pending():
            await anyio.lowlevel.checkpoint()
            return
        # OpenSSL may have taken all but a byte of a record already.
        self._wake_at(max(1, min(least, WAKE_AT) - SEALED))
        await anyio.wait_readable(self._sock)

    async def _end(self) -> None:
        self._torn = True
        while self._rest:
            await self._writable()
        self._check_unbroken()
        try:
            await _until_done(self._connection.shutdown, self._sock)
        except SSL.Error as error:
            raise self._broken(error, "finishing") from error
        self._torn = False
        await super()._end()  # Wakes a reader who waits for more than the few bytes of close_notify.

    def _broken(self, error: SSL.Error, doing: str) -> TransportError:
        self._problem = self._trouble.of(error, doing)
        return self._problem

    def _check_unbroken(self) -> None:
        if self._problem is not None:
            raise type(self._problem)(*self._problem.args)


def _records(buffers: Sequence[Buffer]) -> Generator[Buffer, None, None]:
    """The bytes of ``buffers`` in pieces for a record each: as views where one buffer fills it, else gathered, as a
    record costs as much as copying its content a few times.
    """
    gathered = bytearray()
    for buffer in buffers:
        with memoryview(buffer) as view:
            start, end = 0, len(view)
            while start < end:
                if not gathered and end - start >= RECORD:
                    with view[start : start + RECORD] as piece:
                        yield piece
                    start += RECORD
                else:
                    part = view[start : start + RECORD - len(gathered)]
                    gathered += part
                    start += len(part)
                    part.release()
                    if len(gathered) == RECORD:
                        yield gathered
                        gathered = bytearray()
    if gathered:
        yield gathered


class TlsListener(Listener):
    """A listening socket whose senders are greeted in tasks of the context of :func:`listen`."""

    def __init__(
        self, sockets: SocketListener, context: SSL.Context, credentials: Credentials, options: Options
    ) -> None:
        self.address = sockets.address
        self._sockets = sockets
        self._context = context
        self._credentials = credentials
        self._refused = options.refused
        self._greeting: dict[anyio.CancelScope, socket.socket] = {}
        """Handshakes, the oldest first."""
        self._believed: deque[TlsTransport] = deque()
        self._news = Signal()
        self._closed = False
        self._problem: TransportError | None = None
        """Why nobody is accepted until somebody has been told."""
        self._told = Signal()

    async def accept(self) -> Transport:
        await anyio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise TransportError(f"{self.address}: the listener was closed; open a new one")
            if self._believed:
                return self._believed.popleft()
            if self._problem is not None:
                problem, self._problem = self._problem, None
                self._told.give()
                raise problem
            await self._news.wait()

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._news.give()
        self._told.give()
        for scope in self._greeting:
            scope.cancel()
        await self._sockets.aclose()
        while self._believed:
            await self._believed.popleft().aclose()

    async def greet(self, tasks: Background) -> None:
        """Take in whoever connects until the listener is closed."""
        while not self._closed:
            try:
                sock, address = await self._sockets.accept_socket()
            except TransportError as error:
                self._problem = error
                self._news.give()
                await self._told.wait()
                continue
            carried_on = [scope for scope in self._greeting if not scope.cancel_called]
            if len(carried_on) >= STRANGERS:
                carried_on[0].cancel()
            scope = anyio.CancelScope()
            self._greeting[scope] = sock
            tasks.start_soon(self._greet, sock, address, scope)

    async def _greet(self, sock: socket.socket, address: str, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                transport = await _handshake(sock, self._context, self._credentials, address, host=None)
                if len(self._believed) < WAITING:
                    self._believed.append(transport)
                    self._news.give()
                else:
                    logger.warning("%s: too many senders wait already; it was let go", address)
                    await transport.aclose()
        except ConnectionLost as error:
            logger.debug("%s", error)
        except TransportError as error:
            logger.warning("refused %s", error)
            if self._refused is not None:
                self._refused(error)
        finally:
            self._greeting.pop(scope, None)

    def discard(self) -> None:
        """Close what no task came to: they have all ended."""
        for sock in self._greeting.values():
            sock.close()


@asynccontextmanager
async def connect(address: str, options: Options) -> AsyncIterator[Transport]:
    """Connect to whoever listens at ``address``; each end believes the other when this has returned."""
    credentials = required(options.credentials, address)
    context = context_of(credentials)
    host, _ = stream.host_and_port(address)

    async def dial() -> PolledTransport:
        sock = await stream.connect_socket(address)
        return await _handshake(sock, context, credentials, address, host=host)

    async with joined(address, options, partial(side_by_side, address, options.timeout, dial)) as link:
        yield link


@asynccontextmanager
async def listen(address: str, options: Options) -> AsyncIterator[Listener]:
    """Listen at ``address``, for those who show a certificate that ``options.credentials`` believe."""
    credentials = required(options.credentials, address)
    context = context_of(credentials)
    async with await stream.listen_socket(address, trusted=True) as sockets:
        listener = TlsListener(sockets, context, credentials, options)
        try:
            async with background() as tasks, arrivals(listener, options) as senders:
                tasks.start_soon(listener.greet, tasks)
                yield senders
        finally:
            listener.discard()
