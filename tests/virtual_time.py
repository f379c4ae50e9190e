"""Tests in which time passes as soon as everybody waits: under trio, which can do that."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
import trio.testing

T = TypeVar("T")


def in_virtual_time(test: Callable[[], Awaitable[T]]) -> Callable[[], T]:
    """``test`` run by a clock that goes to the next deadline when nothing else is left to do."""

    def run() -> T:
        return trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))

    return run
