"""The TLS handshake within a QUIC connection, which says who is at the other end: bytes in, bytes out."""

from __future__ import annotations

from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from vfiostream.errors import PeerRefused
from vfiostream.transports.credentials import Credentials
from vfiostream.transports.tls_trust import GREETING, REFUSED_BY_US, Judge, Trouble, reason_of

_MOST = 1 << 16
"""Bytes that OpenSSL is asked for at a time."""


class Handshake:
    """A TLS 1.3 session over two buffers, with a certificate at both ends. ``host`` is whom we connect to; None where
    we listen.
    """

    def __init__(self, context: SSL.Context, credentials: Credentials, address: str, host: str | None) -> None:
        self.listens = host is None
        self.done = False
        """Whether each end has proven that its certificate is its own, and the peer's is believed here."""
        self._address = address
        self._judge = Judge(credentials, credentials.peer_name or host)
        self._trouble = Trouble(address, credentials)
        self._tls = SSL.Connection(context, None)
        self._tls.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, self._judge)
        if self.listens:
            self._tls.set_accept_state()
        else:
            self._tls.set_connect_state()

    def advance(self, came: bytes) -> bytes:
        """Take what came of the peer's; returns what it says within, once :attr:`done`. Raises
        :class:`~vfiostream.errors.PeerRefused`, or another :class:`~vfiostream.errors.TransportError`.
        """
        said = b""
        try:
            if came:
                self._tls.bio_write(came)
            if not self.done:
                self._tls.do_handshake()
                if not self._judge.believed:
                    raise self._refusal(self._judge.problem)
                self.done = True
            while True:
                said += self._tls.recv(_MOST)
        except SSL.WantReadError:
            return said
        except SSL.Error as error:
            if reason_of(error) in REFUSED_BY_US:
                raise self._refusal(self._judge.problem) from error
            raise self._trouble.of(error, GREETING) from error

    def check(self, shown: bytes | None) -> None:
        """See that who connected is not passed on: the listener's certificate here has to be the one it ``shown`` (DER)
        in the handshake around this one. Raises :class:`~vfiostream.errors.PeerRefused`.
        """
        if self.listens:
            return
        within = self._tls.get_peer_certificate(as_cryptography=True)
        if shown is None or within is None or within.public_bytes(Encoding.DER) != shown:
            raise self._refusal("somebody between us and the other end shows another certificate; see who is there")

    def say(self, record: bytes) -> None:
        """Say something to the peer, once :attr:`done`."""
        self._tls.sendall(record)

    def to_send(self) -> bytes:
        """What has to go to the peer."""
        data = b""
        try:
            while True:
                data += self._tls.bio_read(_MOST)
        except SSL.WantReadError:
            return data

    def _refusal(self, problem: str) -> PeerRefused:
        return PeerRefused(f"{self._address}: {problem}")
