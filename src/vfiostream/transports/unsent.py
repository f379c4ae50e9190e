"""The bytes of one ``send`` that have not gone out yet, for transports that gather.

The kernel may take less than it is offered. Moving on is done by slicing views, so nothing is copied, and every view is
released at the end: a view left behind in a traceback would keep a mapped region from being closed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from vfiostream.buffers import Buffer

IOV_MAX: int = os.sysconf("SC_IOV_MAX")
"""The most buffers the kernel takes in one call."""


class Unsent:
    """A queue of bytes over the caller's buffers; true while some are left. Use it in ``with``."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        self._first = 0

    def __bool__(self) -> bool:
        return self._first < len(self._views)

    def head(self, limit: int = IOV_MAX) -> list[memoryview]:
        """The next ``limit`` buffers at most, none of them empty. They stay the queue's."""
        return self._views[self._first : self._first + limit]

    def advance(self, count: int) -> None:
        """Drop the next ``count`` bytes: they went out. At most as many as :meth:`head` gave."""
        while count:
            view = self._views[self._first]
            if count < len(view):
                self._views[self._first] = view[count:]
                count = 0
            else:
                count -= len(view)
                self._first += 1
            view.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for view in self._views:
            view.release()
