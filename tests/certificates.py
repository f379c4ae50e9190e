"""Certificates for tests, the wrong ones too."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from vfiostream.transports.certificates import Authority, Issued
from vfiostream.transports.credentials import Credentials

NOW = datetime.now(UTC)
NAMES = ("localhost", "127.0.0.1", "::1")


@cache
def authority(number: int = 0) -> Authority:
    """The CA both ends know, and others that they do not."""
    return Authority(NOW - timedelta(days=30), NOW + timedelta(days=30))


@cache
def issued(who: str, ca: int = 0, names: tuple[str, ...] = NAMES, since: int = -1, until: int = 1) -> Issued:
    """A certificate that is valid from ``since`` to ``until`` days from now."""
    return authority(ca).issue(who, names, NOW + timedelta(days=since), NOW + timedelta(days=until))


def written(folder: Path, made: Issued, believed: int | None = 0, **others: Any) -> Credentials:
    """Credentials, in new files in ``folder``: to show ``made``, and believe CA number ``believed``."""
    place = Path(mkdtemp(dir=folder))
    (place / "cert.pem").write_bytes(made.certificate_file)
    (place / "key.pem").write_bytes(made.key_file)
    ca = None
    if believed is not None:
        ca = place / "ca.pem"
        ca.write_bytes(authority(believed).certificate.public_bytes(Encoding.PEM))
    return Credentials(place / "cert.pem", place / "key.pem", ca, **others)
