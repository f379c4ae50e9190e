"""TLS 1.3 over TCP, with a certificate at both ends.

OpenSSL reads and writes the socket itself, one record a call: a copy into memory of our own, to gather system calls,
costs more than it saves (``docs/transports.md``). Python's own ``ssl`` can't ask a client for a certificate that no CA
signed, so pinning needs pyOpenSSL. Invariants:

- A record that OpenSSL has sealed must go next, whatever is offered then: its bytes count as taken, and a copy of them
  is kept until the kernel has all of it (:attr:`TlsTransport.holds`).
- The end of the stream is a close_notify of the peer's. One without it is a lost connection, as anybody on the way can
  cut a TCP connection.
- What ended the connection is remembered, and said again by every later call: OpenSSL says it once.
- A peer is believed because :class:`_Judge` said so, never because nothing was said against it.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from OpenSSL import SSL, crypto
from service_identity import CertificateError, VerificationError
from service_identity.cryptography import verify_certificate_hostname, verify_certificate_ip_address

from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost, PeerRefused, TransportError, UsageError
from vfiostream.transports import stream
from vfiostream.transports.background import background
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.credentials import Credentials, required
from vfiostream.transports.options import Options
from vfiostream.transports.stream import WAKE_AT, SocketListener, SocketTransport

logger = logging.getLogger("vfiostream.transport")

HANDSHAKE_TIMEOUT = 10.0
"""Seconds that a handshake may take."""
STRANGERS = 32
"""Handshakes that a listener carries on at a time; a further one takes the place of the oldest, so that those who
connect and say nothing can't keep the right sender out.
"""
WAITING = 64
"""Believed senders that may wait to be accepted."""
MAX_FILE = 1 << 20
"""Bytes that a file with certificates or a key may have."""
GREETING = "greeting"
RECORD = 16384
"""Bytes of content in a record at most (RFC 8446, 5.1)."""
SEALED = RECORD + 512
"""More than a record takes on the link."""

_Codes = SSL.X509VerificationCodes


class _Judge:
    """Says whether a peer is believed, and if not, why. OpenSSL asks it about each certificate of the chain, about the
    peer's own last, and about some more than once.
    """

    def __init__(self, credentials: Credentials, name: str | None) -> None:
        self._credentials = credentials
        self._name = name
        self._flaw: int | None = None
        """OpenSSL's first objection to the chain."""
        self.believed = False
        self.problem = "the other end showed no certificate; give it one (--cert and --key)"
        """Where it is not believed: why not, and what to do."""

    def __call__(self, _: SSL.Connection, shown: crypto.X509, flaw: int, depth: int, ok: int) -> bool:
        if not ok and self._flaw is None:
            self._flaw = flaw
        if depth:
            return True  # What is wrong with a CA means nothing where the peer's own certificate is pinned.
        problem = self._objection(shown.to_cryptography(), flaw)
        self.believed = problem is None
        if problem is not None:
            self.problem = problem
        return self.believed

    def _objection(self, certificate: x509.Certificate, flaw: int) -> str | None:
        """``flaw`` is OpenSSL's, in the peer's own certificate."""
        digits = certificate.fingerprint(hashes.SHA256()).hex()
        if flaw == _Codes.ERR_CERT_HAS_EXPIRED:
            until = certificate.not_valid_after_utc
            return f"the other end's certificate was valid until {until:%Y-%m-%d %H:%M} UTC; give that end a new one"
        if flaw == _Codes.ERR_CERT_NOT_YET_VALID:
            since = certificate.not_valid_before_utc
            return (
                f"the other end's certificate is not valid before {since:%Y-%m-%d %H:%M} UTC; see whether both hosts' "
                "clocks are right, or give that end another one"
            )
        if digits in self._credentials.peer_fingerprints:
            return None
        if self._credentials.ca is None:
            return (
                f"the other end's certificate has the fingerprint {digits}, which is not pinned here; see which "
                "certificate that end shows, and pin the right one (--peer-fingerprint)"
            )
        if self._flaw is not None:
            return (
                f"the CA in {self._credentials.ca} does not vouch for the other end's certificate "
                f"({_words(self._flaw)}); give both ends certificates of one CA"
            )
        if self._name is None or _is_for(certificate, self._name):
            return None
        return (
            f"the other end's certificate is for {_names(certificate)}, not for {self._name}; say --peer-name if "
            "that is the right one, or give that end another one"
        )


def _words(flaw: int) -> str:
    """Name of an error of OpenSSL's verification."""
    for name, code in vars(_Codes).items():
        if name.startswith("ERR_") and code == flaw:
            return name.removeprefix("ERR_").lower().replace("_", " ")
    return f"OpenSSL's error {flaw}"


def _is_for(certificate: x509.Certificate, name: str) -> bool:
    verify = verify_certificate_ip_address if _is_ip(name) else verify_certificate_hostname
    try:
        verify(certificate, name)
    except (VerificationError, CertificateError, ValueError):
        return False
    return True


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _names(certificate: x509.Certificate) -> str:
    """What a certificate says it is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return "nobody"
    return ", ".join(str(name.value) for name in names) or "nobody"


# ---- what the files say


def _content(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise UsageError(f"{path}: {what} can't be read ({error.strerror}); name a file that can") from error
    if len(content) > MAX_FILE:
        raise UsageError(f"{path}: {what} has at most {MAX_FILE} bytes, and this file more; name another one")
    return content


def _certificates(path: Path, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_content(path, what))
    except ValueError as error:
        raise UsageError(f"{path}: this is not {what} in PEM; name a file that holds one") from error


def _context(credentials: Credentials) -> SSL.Context:
    """What OpenSSL has to know of us. Raises :class:`~vfiostream.errors.UsageError`."""
    own, *between = _certificates(credentials.cert, "a certificate")
    try:
        key = serialization.load_pem_private_key(_content(credentials.key, "a private key"), None)
    except TypeError as error:
        raise UsageError(f"{credentials.key}: this key has a passphrase; name one without") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{credentials.key}: this is not a private key in PEM; name a file that holds one") from error
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    try:
        context.use_certificate(own)
        context.use_privatekey(key)  # type: ignore[arg-type] # what can't sign is refused here
        context.check_privatekey()
    except (SSL.Error, TypeError) as error:
        raise UsageError(
            f"{credentials.key}: this is not the key of the certificate in {credentials.cert}; name two that fit"
        ) from error
    for certificate in between:
        context.add_extra_chain_cert(certificate)
    if credentials.ca is not None:
        store = context.get_cert_store()
        assert store is not None
        for certificate in _certificates(credentials.ca, "the certificate of a CA"):
            store.add_cert(crypto.X509.from_cryptography(certificate))
    return context


# ---- what goes wrong


class _Trouble:
    """What OpenSSL raises, in words."""

    def __init__(self, address: str, credentials: Credentials) -> None:
        self._address = address
        self._credentials = credentials

    def of(self, error: SSL.Error, doing: str) -> TransportError:
        """The error of ours that says it."""
        if isinstance(error, SSL.SysCallError):
            return self._lost(error.args[0], doing)
        reason = _reason(error)
        _, is_alert, alert = reason.partition(" alert ")
        if is_alert:
            return PeerRefused(f"{self._address}: {self._told(alert)}")
        if doing == GREETING and reason in _OLDER:
            return PeerRefused(f"{self._address}: the other end does not speak TLS 1.3; use a newer one there")
        if doing == GREETING and reason in _PLAIN:
            return PeerRefused(f"{self._address}: what comes from the other end is not TLS; let both ends use tls:")
        return TransportError(f"{self._address}: {doing} failed in TLS ({reason}); start over on a new connection")

    def _told(self, alert: str) -> str:
        cert = self._credentials.cert
        match alert:
            case "certificate expired":
                return f"the other end says that our certificate has expired; make a new one in place of {cert}"
            case "unknown ca":
                return f"the other end does not know the CA of our certificate; name it there (--ca), or pin {cert}"
            case "protocol version" | "handshake failure" | "insufficient security":
                return f"the other end can't agree with us on TLS 1.3 ({alert}); use a newer one there"
            case "internal error":  # OpenSSL's alert where the objection is not its own, but ours: name or fingerprint
                return f"the other end does not believe our certificate; see there why, and let it know that in {cert}"
            case _ if "certificate" in alert or alert in ("access denied", "decrypt error"):
                return (
                    f"the other end does not believe our certificate ({alert}); see there why, and let it know the "
                    f"one in {cert}"
                )
        return f"the other end has ended TLS ({alert}); see there why"

    def _lost(self, number: int, doing: str) -> ConnectionLost:
        reason = os.strerror(number) if number > 0 else "it ended without a word"
        return ConnectionLost(f"{self._address}: the connection was lost while {doing} ({reason}); see the other end")


def _reason(error: SSL.Error) -> str:
    """OpenSSL's own words."""
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return str(entries[-1][-1]) if entries else "no reason given"


_OLDER = ("unsupported protocol", "wrong ssl version", "no protocols available")
_PLAIN = (
    "wrong version number",
    "http request",
    "https proxy request",
    "record layer failure",
    "packet length too long",
)
"""OpenSSL's words for what an older end, and one without TLS, send."""
_REFUSED_BY_US = ("certificate verify failed", "peer did not return a certificate")


async def _handshake(
    sock: socket.socket, context: SSL.Context, credentials: Credentials, address: str, *, host: str | None
) -> TlsTransport:
    """Make TLS of a connected socket, or close it. ``host`` is whom we connected to; None where we accepted."""
    trouble = _Trouble(address, credentials)
    judge = _Judge(credentials, credentials.peer_name or host)
    try:
        connection = SSL.Connection(context, sock)
        connection.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, judge)
        if host is None:
            connection.set_accept_state()
        else:
            connection.set_connect_state()
            if not _is_ip(host):
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
            if _reason(error) in _REFUSED_BY_US:
                raise PeerRefused(f"{address}: {judge.problem}") from error
            raise trouble.of(error, GREETING) from error
    except BaseException:
        sock.close()
        raise
    return TlsTransport(sock, address, connection, trouble)


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

    def __init__(self, sock: socket.socket, address: str, connection: SSL.Connection, trouble: _Trouble) -> None:
        super().__init__(sock, address)
        self._connection = connection
        self._trouble = trouble
        self._rest = b""
        """Content of the record that OpenSSL has sealed and the kernel has not taken whole."""
        self._problem: TransportError | None = None

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
        self._greeting: deque[anyio.CancelScope] = deque()
        """Around the handshakes, the oldest first."""
        self._believed: deque[TlsTransport] = deque()
        self._news = anyio.Event()
        self._closed = False
        self._problem: TransportError | None = None
        """Why nobody is accepted any more."""

    async def accept(self) -> Transport:
        await anyio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise TransportError(f"{self.address}: the listener was closed; open a new one")
            if self._believed:
                return self._believed.popleft()
            if self._problem is not None:
                raise TransportError(*self._problem.args) from self._problem
            if self._news.is_set():
                self._news = anyio.Event()
            await self._news.wait()

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._news.set()
        for scope in self._greeting:
            scope.cancel()
        await self._sockets.aclose()
        while self._believed:
            await self._believed.popleft().aclose()

    async def greet(self, tasks: TaskGroup) -> None:
        """Take in whoever connects until the listener is closed."""
        while True:
            try:
                sock, address = await self._sockets.accept_socket()
            except TransportError as error:
                self._problem = error
                self._news.set()
                return
            if len(self._greeting) == STRANGERS:
                self._greeting.popleft().cancel()
            scope = anyio.CancelScope()
            self._greeting.append(scope)
            tasks.start_soon(self._greet, sock, address, scope)

    async def _greet(self, sock: socket.socket, address: str, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                transport = await _handshake(sock, self._context, self._credentials, address, host=None)
                if len(self._believed) < WAITING:
                    self._believed.append(transport)
                    self._news.set()
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
            if scope in self._greeting:
                self._greeting.remove(scope)


@asynccontextmanager
async def connect(address: str, options: Options) -> AsyncIterator[Transport]:
    """Connect to whoever listens at ``address``; each end believes the other when this has returned."""
    options.only(address, "credentials")
    credentials = required(options.credentials, address)
    context = _context(credentials)
    host, _ = stream.host_and_port(address)
    try:
        with anyio.fail_after(options.timeout):
            sock = await stream.connect_socket(address)
            transport = await _handshake(sock, context, credentials, address, host=host)
    except TimeoutError as error:
        raise stream.no_answer(address, options) from error
    async with transport:
        yield transport


@asynccontextmanager
async def listen(address: str, options: Options) -> AsyncIterator[Listener]:
    """Listen at ``address``, for those who show a certificate that ``options.credentials`` believe."""
    options.only(address, "credentials")
    credentials = required(options.credentials, address)
    context = _context(credentials)
    async with (
        await stream.listen_socket(address, trusted=True) as sockets,
        background() as tasks,
        TlsListener(sockets, context, credentials, options) as listener,
    ):
        tasks.start_soon(listener.greet, tasks)
        yield listener
