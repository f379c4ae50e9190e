"""Exit codes, and which one an error leads to. Other programs rely on them: ``docs/command-line.md``."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, NamedTuple

from vfiostream.errors import (
    BadDescription,
    Incompatible,
    LocalProtocolError,
    NotConverged,
    OutcomeUnknown,
    PeerAborted,
    SourceStuck,
    StreamError,
    UsageError,
    VfiostreamError,
)


class Exit(IntEnum):
    DONE = 0
    FAILED = 1
    """The source runs, or the file is untouched."""
    USAGE = 2
    DAMAGED = 4
    """What came in is no valid stream, checkpoint or description."""
    INCOMPATIBLE = 5
    CALLED_OFF = 6
    """Did not converge, or was cancelled: the source runs."""
    UNKNOWN = 7
    """After the switchover: who has the device has to be found out."""
    BROKEN = 8
    """A device breaks a rule of its interface."""


SourceState = Literal["running", "stopped", "unknown"]


class Cancelled(VfiostreamError):
    """A signal called the command off; the message says how things stand."""


class Failure(NamedTuple):
    """How a command failed."""

    code: Exit
    error: str
    """Name of the exception's class."""
    message: str
    """One sentence."""
    source: SourceState | None = None
    """Of the device that was to be moved or saved; None for a command without one."""


def failure_of(error: BaseException, *, has_source: bool) -> Failure:
    """Say what ``error`` means for a command; with ``has_source``, for one that moves or saves a device."""
    kind = type(error).__name__
    if not isinstance(error, VfiostreamError) or isinstance(error, LocalProtocolError):
        detail = f"{kind}: {error}" if str(error) else kind
        message = f"this is a defect in vfiostream ({detail}): run it again with --traceback and report what it prints"
        return Failure(Exit.FAILED, kind, message, "unknown" if has_source else None)
    return Failure(_code_of(error, has_source), kind, str(error), _source_after(error) if has_source else None)


def _code_of(error: VfiostreamError, has_source: bool) -> Exit:
    match error:
        case UsageError():
            return Exit.USAGE
        case BadDescription():
            return Exit.DAMAGED
        case StreamError() if not has_source:
            return Exit.DAMAGED
        case Incompatible():
            return Exit.INCOMPATIBLE
        case PeerAborted(code="incompatible"):
            return Exit.INCOMPATIBLE
        case NotConverged() | Cancelled():
            return Exit.CALLED_OFF
        case OutcomeUnknown() | SourceStuck():
            return Exit.UNKNOWN
        case _:
            return Exit.FAILED


def _source_after(error: VfiostreamError) -> SourceState:
    match error:
        case OutcomeUnknown():
            return "stopped"
        case SourceStuck():
            return "unknown"
        case _:
            return "running"
