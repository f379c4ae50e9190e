"""The bytes one end may hold at a time, whatever the sizes of what it holds.

Only the first stage of an end takes, and waits where nothing is left; the last stage gives back. So whatever waits in
between is bounded, and nothing in between can wait for memory.
"""

from __future__ import annotations

from collections import deque

import anyio
import anyio.lowlevel

from vfiostream.errors import UsageError
from vfiostream.protocol import limits

CHARGE = 1024
"""Bytes that what is less than a whole chunk is charged besides, for the objects around it: they take 945."""
DEFAULT_BUDGET = 64 * 1024 * 1024
_BESIDES = 1024 * 1024
"""Bytes for everything that is no chunk."""


def largest_chunk(limit: int) -> int:
    """The largest chunk that a budget of ``limit`` bytes has room for, where the other side has chosen it."""
    return max(limits.MIN_CHUNK, min(limits.MAX_CONTENT, (limit - _BESIDES) // 4))


def enough_for(chunk: int) -> int:
    """The smallest budget that chunks of ``chunk`` bytes go through."""
    return 4 * chunk + _BESIDES


class Lease:
    """A piece of the budget, with the memory for it."""

    __slots__ = ("_budget", "_charge", "_memory", "view")

    def __init__(self, budget: Budget, memory: bytearray, size: int, charge: int) -> None:
        self._budget = budget
        self._memory = memory
        self._charge = charge
        self.view = memoryview(memory)[:size]
        """The bytes; the lease holder's until :meth:`release`."""

    def cut(self, size: int) -> None:
        """Keep the first ``size`` bytes in view: there are no more to be used. What is charged stays."""
        whole, self.view = self.view, self.view[:size]
        whole.release()

    def release(self) -> None:
        """Give the bytes back; once."""
        self.view.release()
        self._budget._give(self._memory, self._charge)


class Budget:
    """``limit`` bytes. Leases are granted in the order in which they were asked for."""

    def __init__(self, limit: int, chunk: int) -> None:
        if limit < enough_for(chunk):
            raise UsageError(
                f"a budget of {limit} bytes is too small for chunks of {chunk}: give at least {enough_for(chunk)}"
            )
        self.limit = limit
        self.used = 0
        self.peak = 0
        """Most bytes that were out at a time."""
        self._chunk = chunk
        self._spare: list[bytearray] = []
        self._granted = 0
        """Whole chunks that were granted to somebody who waits, and will be taken from what lies spare."""
        self._waiting: deque[tuple[int, bool, anyio.Event]] = deque()
        """Of each who waits: the charge, whether it is for a whole chunk, and what is set when it is granted."""

    async def take(self, size: int, more: int = 0, *, gives_way: bool = True) -> Lease:
        """Wait until ``size`` bytes, and ``more`` that the holder will allocate itself, are free; return them. Raises
        UsageError for more than the whole limit. Cancelled, nothing was taken. Whoever takes without waiting still lets
        the others work, so that what is full goes on while the next is filled; but not unless it ``gives_way``.
        """
        if gives_way:
            await anyio.lowlevel.checkpoint()
        charge = self._charge(size) + more
        if charge > self.limit:
            raise UsageError(f"{charge} bytes at once do not fit a budget of {self.limit}")
        if self._waiting or self.used + charge > self.limit:
            entry = (charge, self._is_chunk(size), anyio.Event())
            self._waiting.append(entry)
            try:
                await entry[2].wait()
            except BaseException:
                if entry[2].is_set():
                    self._granted -= entry[1]
                    self._give(None, charge)
                else:
                    self._waiting.remove(entry)
                    self._grant()
                raise
            self._granted -= entry[1]
        else:
            self.used += charge
        return self._lease(size, charge)

    def take_left_over(self, size: int, more: int = 0) -> Lease | None:
        """The same without waiting, for what one could do without: None where half of the limit would not be left, or
        somebody waits.
        """
        charge = self._charge(size) + more
        if self._waiting or self.used + charge > self.limit // 2:
            return None
        self.used += charge
        return self._lease(size, charge)

    def _charge(self, size: int) -> int:
        return self._chunk if self._is_chunk(size) else size + CHARGE

    def _lease(self, size: int, charge: int) -> Lease:
        """``size`` bytes, that are charged already."""
        self.peak = max(self.peak, self.used)
        memory = self._memory(size)
        self._trim()
        return Lease(self, memory, size, charge)

    def _memory(self, size: int) -> bytearray:
        if self._is_chunk(size):
            return self._spare.pop() if self._spare else bytearray(self._chunk)
        return bytearray(size)

    def _is_chunk(self, size: int) -> bool:
        """Whether ``size`` bytes are lent as a whole chunk, which is used again, and charged for as that."""
        return self._chunk // 2 < size <= self._chunk

    def _give(self, memory: bytearray | None, charge: int) -> None:
        self.used -= charge
        if memory is not None and len(memory) == self._chunk:
            self._spare.append(memory)
            self._trim()
        self._grant()

    def _trim(self) -> None:
        """What lies spare counts too: in use and spare together stay within the limit."""
        while self._spare and self.used + (len(self._spare) - self._granted) * self._chunk > self.limit:
            self._spare.pop()

    def _grant(self) -> None:
        while self._waiting and self.used + self._waiting[0][0] <= self.limit:
            charge, is_chunk, event = self._waiting.popleft()
            self.used += charge
            self._granted += is_chunk
            event.set()
