"""The target's side: captures in the order the source took them, then the config that completes them.

Pages reach the memory as they come. So a load that has begun is finished, or begun again, or the device does not run.
"""

from __future__ import annotations

import errno
from array import array

from vfiostream._accel import scatter
from vfiostream.uapi.four_region import PAGE_SIZE
from vfiostream.vendor.capture import (
    NO_NONCE,
    CaptureHead,
    Kind,
    largest_capture,
    parse_capture_header,
    parse_config,
    parse_runs,
)


class Load:
    """One load into ``memory``, from its first capture to its config."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._nonce = NO_NONCE
        self._captures = 0
        self._whole = True
        """Whether the last capture came to its end; if it did not, or was refused, only a fresh start will do."""
        self._total = 0
        self._pos = 0
        self._head: CaptureHead | None = None
        self._head_bytes = bytearray()
        self._runs = array("Q")
        self._index = self._skip = 0

    def begin_capture(self, total: int) -> None:
        """A capture of ``total`` bytes follows; one of none is nothing. Raises OSError, ENOSPC when it can't fit."""
        if total > largest_capture(len(self._memory)):
            raise OSError(errno.ENOSPC, f"a capture of {total} bytes is larger than any of this device")
        if total == 0:
            if not self._whole:
                raise OSError(errno.EINVAL, "the capture before did not come to its end")
            return
        if not self._whole:
            self._captures = 0
        self._whole = False
        self._total = total
        self._pos = 0
        self._head = None
        self._head_bytes = bytearray()

    def take(self, pos: int, region: memoryview) -> None:
        """Take the chunk at ``pos``, in ``region`` from its start. Raises OSError; after anything but a wrong position
        the load has to begin again.
        """
        if self._pos >= self._total:
            raise OSError(errno.EINVAL, "no chunk is due: announce the size of a capture first")
        if pos != self._pos:
            raise OSError(errno.EINVAL, f"the chunk at {pos} is not due, that at {self._pos} is")
        data = region[: self._total - pos]
        self._pos = self._total  # nothing more is due unless this chunk is good
        if self._head is None:
            self._head = parse_capture_header(data, self._total, len(self._memory))
            self._check_order(self._head)
        if missing := self._head.size - len(self._head_bytes):
            self._head_bytes += data[:missing]
            data = data[missing:]
            if len(self._head_bytes) == self._head.size:
                self._runs = parse_runs(self._head, self._head_bytes, len(self._memory))
                self._index = self._skip = 0
        if data:
            self._index, self._skip = scatter(self._memory, self._runs, self._index, self._skip, data, PAGE_SIZE)
        self._pos = pos + len(region)
        if self._pos >= self._total:
            self._whole = True
            self._nonce = self._head.nonce
            self._captures += 1

    def _check_order(self, head: CaptureHead) -> None:
        if head.kind is Kind.WHOLE:
            if head.ordinal != 0:
                raise OSError(errno.EINVAL, f"a whole capture has number {head.ordinal}, not 0")
            self._captures = 0
        elif self._captures == 0 or head.ordinal != self._captures:
            raise OSError(errno.EINVAL, f"dirty capture {head.ordinal} comes where {self._captures} is due")
        elif head.nonce != self._nonce:
            raise OSError(errno.EINVAL, f"dirty capture {head.ordinal} belongs to another stream")

    def complete(self, snapshot: bytes, config_size: int) -> bytes:
        """Check that ``snapshot`` completes this load; returns the content of the config. Raises OSError."""
        nonce, captures, content = parse_config(snapshot, config_size)
        if not self._memory:
            expected = (NO_NONCE, 0)
        elif self._whole and self._captures:
            expected = (self._nonce, self._captures)
        else:
            raise OSError(errno.EINVAL, "the config comes before all of the memory")
        if (nonce, captures) != expected:
            raise OSError(errno.EINVAL, f"the config follows {captures} captures of its stream, {expected[1]} are here")
        return content
