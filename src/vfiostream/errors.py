"""Every exception vfiostream raises on purpose, in one tree.

VfiostreamError
├── UsageError                  a parameter or address makes no sense; nothing was touched
├── DeviceError                 something about a device
│   ├── DeviceRefused           the driver answered an operation with an errno
│   ├── DeviceLost              the device's process or file descriptor went away
│   ├── DeviceTimeout           the driver did not answer in time; what it did is unknown
│   ├── DeviceBroken            the device answered, but against its interface
│   └── ReplayDiverged          a replayed device was asked what its record does not hold
├── GuestError                  the guest could not be paused, resumed or asked
├── Incompatible                this device can't move, or can't go there; nothing moved
├── BadDescription              a file that should describe a device does not
├── TransportError              opening, reading or writing a link or a file failed
│   ├── ConnectionLost          the other end is gone
│   └── PeerRefused             one end did not believe the other; nothing moved
├── ProtocolError
│   ├── LocalProtocolError      we called our own protocol out of order (a defect here)
│   └── StreamError             what came in is not a valid stream; carries the record's name
├── PeerAborted                 the other end gave up and said why
├── NotConverged                the policy gave up; the source runs
├── SourceStuck                 the migration failed and the source could not be resumed
└── OutcomeUnknown              connection lost after the commit; ask the other end

A foreign exception (OSError, msgpack's, zstandard's) is translated once, where it comes in, with ``raise ... from``.
A message is one sentence that says what, where and what to do.
"""

from __future__ import annotations

import errno as _errno
import os


class VfiostreamError(Exception):
    """Root of everything this package raises on purpose."""


class UsageError(VfiostreamError):
    """A parameter or an address makes no sense; nothing was touched."""


class DeviceError(VfiostreamError):
    """Something about a device went wrong."""


class DeviceRefused(DeviceError):
    """The driver answered ``operation`` with ``errno``."""

    def __init__(self, device: str, operation: str, errno: int, hint: str = "") -> None:
        self.device = device
        self.operation = operation
        self.errno = errno
        self.hint = hint
        name = _errno.errorcode.get(errno, str(errno))
        text = f"{device}: the driver refused {operation} with {name} ({os.strerror(errno)})"
        super().__init__(f"{text}; {hint}" if hint else text)


class DeviceLost(DeviceError):
    """The process or file descriptor behind the device went away."""


class DeviceTimeout(DeviceError):
    """The driver did not answer in time; what it has done by now is unknown."""


class DeviceBroken(DeviceError):
    """The device answered in a way its interface does not allow."""


class ReplayDiverged(DeviceError):
    """A replayed device was asked something else than the device that was recorded."""


class GuestError(VfiostreamError):
    """A hook of the guest failed, or took too long."""


class Incompatible(VfiostreamError):
    """This device can't be moved, or can't be moved there; nothing was moved."""


class BadDescription(VfiostreamError):
    """A file that was to say something of a device is no checkpoint and no description, or a damaged one."""


class TransportError(VfiostreamError):
    """A link or a file could not be opened, read or written."""

    taken: int | None = None
    """From a failed ``send``: how many bytes of it were handed over at most; None where that is not known."""


class ConnectionLost(TransportError):
    """The other end is gone, or the link to it."""


class PeerRefused(TransportError):
    """One end did not believe the other, or does not speak its language; nothing moved. Trying again does not help."""


class ProtocolError(VfiostreamError):
    """Root of both kinds of protocol error: ours and theirs."""


class LocalProtocolError(ProtocolError):
    """Our side used the protocol out of order: a defect in the caller."""


class StreamError(ProtocolError):
    """What came in is not a valid stream.

    ``record`` names the record (type and sequence number) at which it stopped being one; ``address`` says where it came
    from, as far as that is known.
    """

    def __init__(self, record: str, problem: str, address: str | None = None) -> None:
        super().__init__(record, problem, address)
        self.record = record
        self.problem = problem
        self.address = address

    def __str__(self) -> str:
        sentence = f"{self.record} {self.problem}"
        return sentence if self.address is None else f"{self.address}: {sentence}"


class PeerAborted(VfiostreamError):
    """The other end gave up; ``code`` and ``reason`` are its own words."""

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(f"the other end gave up ({code}): {reason}")


class NotConverged(VfiostreamError):
    """The policy gave up before the switchover; the source runs."""


class SourceStuck(VfiostreamError):
    """The migration failed, and then the source's device could not be made to run again."""


class OutcomeUnknown(VfiostreamError):
    """The connection went away after the commit was sent: only the target knows whether it runs."""
