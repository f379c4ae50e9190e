"""What this machine does to bytes, apart from any link, and what a measured rate means for a migration.

The speeds are of one thread on memory that was touched before; they bound what one end can do with each byte.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from vfiostream import _accel
from vfiostream.buffers import Buffer
from vfiostream.policy import Precopy, RoundReport, Verdict
from vfiostream.protocol import framing, limits
from vfiostream.protocol.payload import Compressor

AREA = 128 << 20
"""Bytes that are copied and checked in one pass: more than caches hold."""
LEAST_TIME = 0.3
"""Seconds that a speed is measured for at least."""
LEAST_PASSES = 3


class Speeds(NamedTuple):
    """Bytes a second, of one thread."""

    copy: float
    """From memory to memory."""
    check: float
    """Frames made of memory, each with its xxh3, in the default chunk."""
    compress: float
    """zstd 1, of the content that was given, in the default chunk."""
    ratio: float
    """Bytes of content for one of what zstd 1 made of it; chunks that do not shrink count as they are."""


class Outlook(NamedTuple):
    """What a migration of ``size`` bytes would come to, at a rate that was measured."""

    size: int
    seconds: float
    """Of precopy, with nothing dirtied meanwhile."""
    dirty_rate: int
    """Distinct bytes that may be dirtied a second so that it still converges."""
    seconds_at_dirty_rate: float
    """Of precopy, with so much dirtied."""


def speeds(content: Buffer) -> Speeds:
    """Measure; takes about a second, and blocks. ``content`` (at least a byte) is what is compressed."""
    here, there = (memoryview(mmap.mmap(-1, AREA)) for _ in range(2))
    for at in range(0, AREA, len(content)):
        piece = here[at : at + len(content)]
        piece[:] = memoryview(content)[: len(piece)]
    frames = _chunks(here)
    copy = _speed(AREA, lambda: _accel.copy(there, here))
    check = _speed(AREA, lambda: [framing.body_check(b"", (chunk,), 1) for chunk in frames])
    compressor = Compressor()
    chunks = _chunks(memoryview(content))
    packed = [compressor.compress(chunk) for chunk in chunks]
    size = sum(len(chunk) if made is None else len(made) for chunk, made in zip(chunks, packed, strict=True))
    compress = _speed(len(content), lambda: [compressor.compress(chunk) for chunk in chunks])
    return Speeds(copy, check, compress, len(content) / size)


def outlook(size: int, rate: float, policy: Precopy) -> Outlook:
    """Say what a migration of ``size`` bytes at ``rate`` bytes a second comes to, as ``policy`` judges its rounds. What
    the devices take to stop and to start is not in it.
    """
    at_rest = _precopy(size, rate, 0.0, policy)
    assert at_rest is not None  # A second round that finds nothing satisfies every policy.
    low, high = 0.0, rate
    while high - low > 1:
        middle = (low + high) / 2
        if _precopy(size, rate, middle, policy) is None:
            high = middle
        else:
            low = middle
    dirty_rate = int(low)
    busy = _precopy(size, rate, dirty_rate, policy)
    return Outlook(size, at_rest, dirty_rate, at_rest if busy is None else busy)


def _precopy(size: int, rate: float, dirty_rate: float, policy: Precopy) -> float | None:
    """Seconds until ``policy`` switches over; None where it does not. ``dirty_rate`` counts a page that is written
    twice in a round as one, as the rounds themselves do.
    """
    number, content, collected, previous = 1, size, 0.0, None
    while True:
        ended = collected + content / rate
        verdict = policy.judge(RoundReport(number, content, size, collected, ended, previous))
        if verdict is Verdict.SWITCHOVER:
            return ended
        if verdict is Verdict.GIVE_UP:
            return None
        content = min(size, round(dirty_rate * (ended - collected)))
        number, collected, previous = number + 1, ended, collected


def _chunks(content: memoryview) -> list[memoryview]:
    return [content[at : at + limits.DEFAULT_CHUNK] for at in range(0, len(content), limits.DEFAULT_CHUNK)]


def _speed(size: int, once: Callable[[], object]) -> float:
    """Bytes a second of ``once``, which handles ``size`` bytes: the median of several passes."""
    once()  # The first touches what no pass after it has to.
    taken: list[float] = []
    while len(taken) < LEAST_PASSES or sum(taken) < LEAST_TIME:
        began = time.perf_counter()
        once()
        taken.append(time.perf_counter() - began)
    return size / max(median(taken), 1e-9)
