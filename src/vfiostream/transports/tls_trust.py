"""Whom TLS believes, what it shows of us, and what it says when something is wrong."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from OpenSSL import SSL, crypto
from service_identity import CertificateError, VerificationError
from service_identity.cryptography import verify_certificate_hostname, verify_certificate_ip_address

from vfiostream.errors import ConnectionLost, PeerRefused, TransportError, UsageError
from vfiostream.transports.credentials import Credentials

MAX_FILE = 1 << 20
"""Bytes that a file with certificates or a key may have."""
MAX_NAMES = 200
"""Letters that are repeated of the names in a certificate."""
GREETING = "greeting"
"""What is being done until both ends believe each other."""

_Codes = SSL.X509VerificationCodes


class Judge:
    """Says whether a peer is believed, and if not, why. OpenSSL asks it about each certificate of the chain, about the
    peer's own last, and about some more than once.
    """

    def __init__(self, credentials: Credentials, name: str | None) -> None:
        self._credentials = credentials
        self._name = name
        self._flaw: int | None = None
        """OpenSSL's first objection to the chain."""
        self.believed = False
        self.fingerprint = ""
        """Of the peer's certificate; empty until there is one."""
        self.problem = "the other end showed no certificate; give it one (--cert and --key)"
        """Where it is not believed: why not, and what to do."""

    def __call__(self, _: SSL.Connection, shown: crypto.X509, flaw: int, depth: int, ok: int) -> bool:
        if not ok and self._flaw is None:
            self._flaw = flaw
        if depth:
            # What is wrong with a CA means nothing where the peer's own certificate is pinned. Where none is, the peer
            # is told OpenSSL's reason.
            if ok or self._credentials.peer_fingerprints:
                return True
            self.problem = self._no_chain()
            return False
        try:
            problem = self._objection(shown.to_cryptography(), flaw)
        except ValueError as error:  # of cryptography, which is stricter than OpenSSL
            problem = f"the other end's certificate can't be understood ({error}); give that end another one"
        self.believed = problem is None
        if problem is not None:
            self.problem = problem
        return self.believed

    def _objection(self, certificate: x509.Certificate, flaw: int) -> str | None:
        """``flaw`` is OpenSSL's, in the peer's own certificate."""
        self.fingerprint = digits = certificate.fingerprint(hashes.SHA256()).hex()
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
            return self._no_chain()
        if self._name is None or _is_for(certificate, self._name):
            return None
        return (
            f"the other end's certificate is for {_names(certificate)}, not for {self._name}; say --peer-name if "
            "that is the right one, or give that end another one"
        )

    def _no_chain(self) -> str:
        assert self._flaw is not None
        return (
            f"the CA in {self._credentials.ca} does not vouch for the other end's certificate "
            f"({_words(self._flaw)}); give both ends certificates of one CA"
        )


def _words(flaw: int) -> str:
    """Name of an error of OpenSSL's verification."""
    for name, code in vars(_Codes).items():
        if name.startswith("ERR_") and code == flaw:
            return name.removeprefix("ERR_").lower().replace("_", " ")
    return f"OpenSSL's error {flaw}"


def _is_for(certificate: x509.Certificate, name: str) -> bool:
    verify = verify_certificate_ip_address if is_ip(name) else verify_certificate_hostname
    try:
        verify(certificate, name)
    except (VerificationError, CertificateError, ValueError):
        return False
    return True


def is_ip(name: str) -> bool:
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
    text = ", ".join(str(name.value) for name in names)[:MAX_NAMES]
    return "".join(letter if letter.isprintable() else "?" for letter in text) or "nobody"


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


def context_of(credentials: Credentials) -> SSL.Context:
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


class Trouble:
    """What OpenSSL raises, in words."""

    def __init__(self, address: str, credentials: Credentials) -> None:
        self._address = address
        self._credentials = credentials

    def of(self, error: SSL.Error, doing: str) -> TransportError:
        """The error of ours that says it."""
        if isinstance(error, SSL.SysCallError):
            return self.lost(error.args[0], doing)
        reason = reason_of(error)
        _, is_alert, alert = reason.partition(" alert ")
        if is_alert and doing != GREETING:
            return TransportError(f"{self._address}: the other end has ended TLS ({alert}); see there why")
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

    def lost(self, number: int, doing: str) -> ConnectionLost:
        """The error that says that the connection is gone, by an errno; -1 for an end without any."""
        reason = os.strerror(number) if number > 0 else "it ended without a word"
        return ConnectionLost(f"{self._address}: the connection was lost while {doing} ({reason}); see the other end")


def reason_of(error: SSL.Error) -> str:
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
REFUSED_BY_US = ("certificate verify failed", "peer did not return a certificate")
