"""Who we are on an encrypted link, and whom we believe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vfiostream.errors import UsageError

_FINGERPRINT = re.compile("[0-9a-f]{64}")


def fingerprint(text: str) -> str:
    """The SHA-256 fingerprint that ``text`` writes, as 64 small hexadecimal digits without colons. Raises
    :class:`~vfiostream.errors.UsageError` where it is none.
    """
    digits = text.replace(":", "").lower()
    if _FINGERPRINT.fullmatch(digits) is None:
        raise UsageError(
            f"{text!r} is not a fingerprint; write the 64 hexadecimal digits of a certificate's SHA-256, with or "
            "without colons, which `vfiostream cert` prints"
        )
    return digits


@dataclass(frozen=True, slots=True)
class Credentials:
    """What an encrypted link needs. There is no leaving out: an end without a certificate, or one that believes nobody
    or everybody, can't be written down. Raises :class:`~vfiostream.errors.UsageError`.

    A peer is believed if its certificate is one of ``peer_fingerprints``, whatever names are in it; or if the CA signed
    it and the name is in it. It must be valid now either way. The files are read when a link is opened.
    """

    cert: Path
    """PEM: our certificate, then those between it and the CA, if any."""
    key: Path
    """PEM: its private key, without a passphrase."""
    ca: Path | None = None
    """PEM: certificates of the CAs that may have signed the peer's; None to believe pinned certificates only."""
    peer_fingerprints: tuple[str, ...] = ()
    """SHA-256 of certificates (of their DER form) that are believed; see :func:`fingerprint`."""
    peer_name: str | None = None
    """A DNS name or IP address that the peer's certificate must have. None: whoever connects expects the host he
    connects to, whoever listens expects no name.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "peer_fingerprints", tuple(map(fingerprint, self.peer_fingerprints)))
        if self.ca is None and not self.peer_fingerprints:
            raise UsageError(
                "nobody would be believed: name the CA of the other end's certificate (--ca), or its fingerprint "
                "(--peer-fingerprint); `vfiostream cert` makes what both ends need"
            )
        if self.peer_name is not None and self.ca is None:
            raise UsageError("a pinned certificate is believed whatever its name: leave out --peer-name, or add --ca")


def required(credentials: Credentials | None, address: str) -> Credentials:
    """``credentials``; raises :class:`~vfiostream.errors.UsageError` where there are none, which ``address`` needs."""
    if credentials is None:
        raise UsageError(
            f"{address}: both ends of this link show a certificate; name yours with --cert and --key, and whom to "
            "believe with --ca or --peer-fingerprint (`vfiostream cert` makes what both ends need)"
        )
    return credentials
