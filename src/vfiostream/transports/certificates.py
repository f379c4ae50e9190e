"""Certificates for both ends of a link, of a CA that is made for them and forgotten.

The CA's key is never written: who could steal it could be either end. So a pair is never added to; another one is made.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vfiostream.errors import UsageError

ENDS = ("source", "target")
_DNS_NAME = re.compile(r"(?=.{1,253}\Z)(?:\*\.)?[a-zA-Z0-9_-]{1,63}(?:\.[a-zA-Z0-9_-]{1,63})*")
MAX_DAYS = 10_000
SKEW = timedelta(hours=1)
"""That the clock of the other host may be behind."""


class Issued(NamedTuple):
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in small hexadecimal digits."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    @property
    def certificate_file(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_file(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class Authority:
    """A CA in memory. Its own certificate, and what it issues where nothing else is said, is valid from ``since`` until
    ``until``.
    """

    def __init__(self, since: datetime, until: datetime) -> None:
        self._valid = (since, until)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("vfiostream CA")
        usage = x509.KeyUsage(
            False, False, False, False, False, True, True, False, False
        )  # signs certificates and CRLs
        self.certificate = (
            self._builder(self._name, self._key, since, until)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def issue(
        self, common_name: str, names: Sequence[str], since: datetime | None = None, until: datetime | None = None
    ) -> Issued:
        """A certificate for the DNS names and IP addresses ``names``, which may be used at either end of a link.

        Raises :class:`~vfiostream.errors.UsageError` for what can't be such a name.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # signs handshakes
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            self._builder(_name(common_name), key, since or self._valid[0], until or self._valid[1])
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage(both), critical=False)
            .add_extension(x509.SubjectAlternativeName(list(map(_general_name, names))), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Issued(certificate, key)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, since: datetime, until: datetime
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(since)
            .not_valid_after(until)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )


def make_pair(folder: Path, names: Sequence[str], days: int) -> dict[str, Issued]:
    """Make ``folder`` with ``ca.pem`` and, for each of :data:`ENDS`, a certificate (``.pem``) and its key (``.key``,
    mode 0600), valid for ``days`` from now; ``names`` are in both, as either end may listen. Returns what was issued.

    The folder must not be there, or be empty; it gets its name when all is in it. Raises
    :class:`~vfiostream.errors.UsageError`.
    """
    if not 1 <= days <= MAX_DAYS:
        raise UsageError(f"{days} days is no time that certificates can be valid for; say 1 to {MAX_DAYS}")
    now = datetime.now(UTC)
    authority = Authority(now - SKEW, now + timedelta(days=days))
    issued = {end: authority.issue(f"vfiostream {end}", names) for end in ENDS}
    files = {"ca.pem": (authority.certificate.public_bytes(Encoding.PEM), 0o644)}
    for end, made in issued.items():
        files[f"{end}.pem"] = (made.certificate_file, 0o644)
        files[f"{end}.key"] = (made.key_file, 0o600)
    _write_folder(folder.absolute(), files)
    return issued


def _write_folder(folder: Path, files: Mapping[str, tuple[bytes, int]]) -> None:
    """Make ``folder`` of ``files``, with the mode of each, or leave everything as it was."""
    try:
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UsageError(f"{folder}: it can't be made ({error.strerror}); choose a folder where you may") from error
    try:
        for name, (content, mode) in files.items():
            with open(beside / name, "xb", opener=partial(os.open, mode=mode)) as file:
                file.write(content)
        # Takes the place of an empty folder, and of nothing else (rename(2)).
        os.rename(beside, folder)
    except OSError as error:
        raise UsageError(
            f"{folder}: it can't be made ({error.strerror}); choose one that is not there, or that is empty"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if _DNS_NAME.fullmatch(name) is None:
        raise UsageError(
            f"{name!r} is no name of a host and no IP address; write it as the other end will connect to it"
        )
    return x509.DNSName(name)
