"""How many bytes a second may go out, and what goes out of a frame at once.

:class:`Bandwidth` is what the user sets, at any time; :class:`Pace` is what one line makes of it.

What a limit means: over any time, no more than the limit gives for it, and :data:`SAVED` seconds of it, and one piece.
While there is something to send it is not less either: a sleep that took too long is made up for, as far as
:data:`SAVED` goes. A frame goes out in pieces of :data:`PIECE` seconds, so that the others on the link find gaps for
what they have to send, and the buffers of switches on the way do not have to hold what was saved up.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import anyio

from vfiostream.buffers import Buffer
from vfiostream.errors import UsageError

MAX_RATE = (1 << 63) - 1
"""Bytes a second."""
PIECE = 0.002
"""Seconds of the limit that go out at once."""
LEAST_PIECE = 16 * 1024
"""Bytes that go out at once all the same: fewer cost more than they smooth."""
SAVED = 0.005
"""Seconds of the limit that can be made up for: event loops sleep up to a millisecond too long, and so does a machine
that has others to serve.
"""
_AT_ONCE = 1e-6
"""Seconds that nobody sleeps for; clocks tell no less for certain. What went too early is paid for by what follows."""


class Bandwidth:
    """The limits of a migration in bytes a second of what goes over the link or into the file, headers and all; None
    for no limit. Both may be assigned to at any time, in the thread of the event loop: what is under way takes the new
    one up at once. Given to several migrations, each of them has these limits for itself. Raises
    :class:`~vfiostream.errors.UsageError` for what is no rate.
    """

    def __init__(self, limit: float | None = None, switchover: float | None = None) -> None:
        self._limit = _checked(limit)
        self._switchover = _checked(switchover)
        self._told: list[Callable[[], None]] = []

    @property
    def limit(self) -> float | None:
        """While the source runs."""
        return self._limit

    @limit.setter
    def limit(self, rate: float | None) -> None:
        self._limit = _checked(rate)
        self._tell()

    @property
    def switchover(self) -> float | None:
        """While the source is stopped; None holds nothing back, as a guest is waiting. It is also what a policy may
        count on (:class:`vfiostream.policy.RoundReport`), so a rate that the link does not have makes the switchover
        longer than expected.
        """
        return self._switchover

    @switchover.setter
    def switchover(self, rate: float | None) -> None:
        self._switchover = _checked(rate)
        self._tell()

    def __repr__(self) -> str:
        return f"Bandwidth({self._limit!r}, {self._switchover!r})"

    def _tell(self) -> None:
        for told in self._told:
            told()


def _checked(rate: float | None) -> float | None:
    if rate is None or 0 < rate <= MAX_RATE:
        return rate
    if rate > 0:
        raise UsageError(f"a bandwidth of {rate} bytes a second is beyond {MAX_RATE}: leave the limit out")
    raise UsageError(f"a bandwidth of {rate} bytes a second moves nothing")


class Pace:
    """Spreads the bytes of one line over time. One task waits for its :meth:`turn`, and says what went
    (:meth:`count`). Use it in ``with``.
    """

    def __init__(self, bandwidth: Bandwidth) -> None:
        self.held = 0.0
        """Seconds that somebody waited for his turn."""
        self._bandwidth = bandwidth
        self._stopped = False
        self._off = False
        self._rate: float | None = None
        """What has counted since ``_at``."""
        self._at = 0.0
        self._owed = 0.0
        """Bytes that went, and were not due yet at ``_at``; less than 0 where more might have gone."""
        self._news = anyio.Event()

    @property
    def source_stopped(self) -> bool:
        """Whether the limit is that of the switchover."""
        return self._stopped

    @source_stopped.setter
    def source_stopped(self, stopped: bool) -> None:
        self._stopped = stopped
        self._news.set()

    @property
    def _wanted(self) -> float | None:
        if self._off:
            return None
        return self._bandwidth.switchover if self._stopped else self._bandwidth.limit

    async def turn(self) -> float:
        """Wait until more may go; returns how many bytes may at once, which is infinite where there is no limit."""
        while (rate := self._wanted) is not None:
            now = anyio.current_time()
            wait = self._settle(now, rate) / rate
            if wait < _AT_ONCE:
                return max(LEAST_PIECE, rate * PIECE // 1)
            self._news = anyio.Event()
            with anyio.move_on_after(wait):
                await self._news.wait()
            self.held += anyio.current_time() - now
        return math.inf

    def count(self, size: int) -> None:
        """``size`` bytes have gone, or go now."""
        rate = self._wanted
        if rate is not None:
            self._owed = self._settle(anyio.current_time(), rate) + size

    def _settle(self, now: float, rate: float) -> float:
        """What is owed now, at which ``rate`` begins to count."""
        owed = 0.0 if self._rate is None else self._owed - self._rate * (now - self._at)
        self._owed, self._at, self._rate = max(owed, -SAVED * rate), now, rate
        return self._owed

    def call_off(self) -> None:
        """Nobody is held back any more."""
        self._off = True
        self._news.set()

    def _changed(self) -> None:
        self._news.set()

    def __enter__(self) -> Self:
        self._bandwidth._told.append(self._changed)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._bandwidth._told.remove(self._changed)


class Pieces:
    """The bytes of a frame that are still to go; true while there are some. Use it in ``with``: a view that is left
    behind would keep a mapped region from being closed.
    """

    def __init__(self, frame: Sequence[Buffer]) -> None:
        self._views = deque(memoryview(buffer) for buffer in frame if len(buffer))
        self._taken: list[memoryview] = []

    def __bool__(self) -> bool:
        return bool(self._views)

    def take(self, size: float) -> Sequence[memoryview]:
        """The next ``size`` bytes at most (1 or more); the views are good until the next call."""
        self._release(self._taken)
        self._taken = []
        while size and self._views:
            view = self._views.popleft()
            if len(view) > size:
                cut = int(size)
                self._views.appendleft(view[cut:])
                self._taken.append(view[:cut])
                view.release()
                break
            self._taken.append(view)
            size -= len(view)
        return self._taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._release(self._taken)
        self._release(self._views)

    @staticmethod
    def _release(views: Sequence[memoryview]) -> None:
        for view in views:
            view.release()
