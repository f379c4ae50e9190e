"""The source's side of device memory: what is dirty, and the captures a client takes of it.

Invariant: a page that differs from what the client has is dirty, or in a capture that is not wholly fetched. Which
pages are dirty is tracked always, not only under LOGGING: a client may take the whole first and turn LOGGING on later.

The caller holds the device's lock around every method.
"""

from __future__ import annotations

import errno
import secrets
from array import array

from vfiostream._accel import bitmap_merge, bitmap_runs
from vfiostream.uapi.four_region import PAGE_SIZE
from vfiostream.vendor.capture import NO_NONCE, Capture, Kind


class Saving:
    """Captures of ``memory``, whole pages of it; with no memory there are none."""

    def __init__(self, memory: memoryview, chunk: int) -> None:
        self._memory = memory
        self._chunk = chunk
        self._pages = len(memory) // PAGE_SIZE
        self.dirty = bytearray((self._pages + 7) // 8)
        """A bit for each page written since it was last captured."""
        self.nonce = NO_NONCE
        self.captures = 0
        """Captures of the stream so far, those the config has to name."""
        self._capture: Capture | None = None
        self._captured = self.dirty
        self._unfetched: set[int] = set()

    def forget(self) -> None:
        """Everything counts as dirty again: the next capture is the whole memory, and starts a stream."""
        self.dirty = bytearray(len(self.dirty))
        self.nonce, self.captures = NO_NONCE, 0
        self._capture = None
        self._unfetched = set()

    def capture(self, *, logging: bool) -> int:
        """Capture the whole memory, or under LOGGING what was written since the last capture; returns its size.

        A capture that was not wholly fetched is replaced: all its pages are captured again, under its number, since
        nobody knows what the client kept of it.
        """
        replaced = self._capture if self._unfetched else None
        self._capture = None
        self._unfetched = set()
        if replaced is not None:
            self.captures -= 1
            if replaced.kind is Kind.DIRTY:
                bitmap_merge(self.dirty, self._captured)
        if not logging or self.captures == 0:
            return self._start(Kind.WHOLE, array("Q", (0, self._pages)))
        runs = bitmap_runs(self.dirty, self._pages)
        return self._start(Kind.DIRTY, runs) if runs else 0

    def _start(self, kind: Kind, runs: array[int]) -> int:
        if kind is Kind.WHOLE:
            self.nonce, self.captures = secrets.token_bytes(len(NO_NONCE)), 0
        self._captured, self.dirty = self.dirty, bytearray(len(self.dirty))
        self._capture = Capture(kind, self.nonce, self.captures, self._memory, runs)
        self.captures += 1
        self._unfetched = set(range(0, self._capture.size, self._chunk))
        return self._capture.size

    def fetch(self, pos: int, out: memoryview) -> None:
        """Put the chunk at ``pos`` of the last capture into ``out``, from its start. Raises OSError."""
        if self._capture is None:
            raise OSError(errno.EINVAL, "there is no capture to fetch from")
        if pos % self._chunk or pos >= self._capture.size:
            raise OSError(errno.EINVAL, f"position {pos} starts no chunk of the capture of {self._capture.size} bytes")
        self._capture.read(pos, out[: self._capture.size - pos])
        self._unfetched.discard(pos)
