"""Which of several errors is the cause, when the tasks of a migration fall together."""

from __future__ import annotations

import anyio

from vfiostream.errors import (
    DeviceError,
    Incompatible,
    NotConverged,
    PeerAborted,
    StreamError,
    TransportError,
    VfiostreamError,
)
from vfiostream.protocol import limits

_ORDER: tuple[type[VfiostreamError], ...] = (PeerAborted, DeviceError, StreamError, NotConverged, VfiostreamError)
"""What says more about the cause comes first; that a link broke says least."""


def cause(error: BaseException, address: str | None = None) -> BaseException:
    """Return the one exception in ``error`` (a group or not) that the others follow from. A StreamError is told the
    ``address`` that the stream came from: the protocol does not know it.

    A defect of ours (anything that is not a VfiostreamError) is never hidden behind something else.
    """
    leaves = list(_leaves(error))
    cancelled = anyio.get_cancelled_exc_class()
    defects = [leaf for leaf in leaves if not isinstance(leaf, VfiostreamError | cancelled)]
    if defects:
        return error if len(defects) > 1 else defects[0]
    expected = [leaf for leaf in leaves if isinstance(leaf, VfiostreamError)]
    for leaf in expected:
        if isinstance(leaf, StreamError) and leaf.address is None:
            leaf.address = address
    for kind in _ORDER:
        for leaf in expected:
            if isinstance(leaf, kind) and not isinstance(leaf, TransportError):
                return leaf
    return expected[0] if expected else leaves[0]


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for member in error.exceptions for leaf in _leaves(member)]
    return [error]


def abort_code(error: BaseException) -> str:
    """The code of the ABORT that tells the peer of ``error``."""
    for kind, code in (
        (DeviceError, "device"),
        (StreamError, "stream"),
        (Incompatible, "incompatible"),
        (NotConverged, "not-converged"),
        (anyio.get_cancelled_exc_class(), "cancelled"),
    ):
        if isinstance(error, kind):
            return code
    return "failed"


def told(error: BaseException, cancelled: str = "cancelled") -> str:
    """The sentence that the peer is told of ``error``; ``cancelled`` if it is a cancellation."""
    return cancelled if isinstance(error, anyio.get_cancelled_exc_class()) else str(error) or type(error).__name__


def reason(text: str) -> str:
    """``text`` as an ABORT can carry it: printable, and not longer than a record takes."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return printable.encode()[: limits.MAX_TEXT].decode(errors="ignore")
