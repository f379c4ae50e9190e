"""The leaf functions of the accelerator, in this process, against memcpy of as many bytes between populated memory."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

from benchmarks.contents import fill_random
from benchmarks.pairs import Run, in_turn
from benchmarks.plan import MIB, CannotRun, Plan
from benchmarks.row import Row, compare
from vfiostream import _accel

BITMAP = 64 * MIB
"""Bytes: of 2 TiB of guest memory."""
COPY = 256 * MIB
"""Bytes, much more than the caches."""
CLUSTER = 1024
"""Pages in a row, 4 MiB, as a buffer of a driver."""
ROUNDS_PER_PAIR = 5
"""These take milliseconds each."""


def bitmaps(plan: Plan) -> Iterator[Row]:
    _check_native()
    size = BITMAP // 8 if plan.quick else BITMAP
    bits = size * 8
    source = _memory(size)
    fill_random(source, seed=0)
    destination = _memory(size)
    kinds: tuple[tuple[str, float, memoryview], ...] = (
        ("0.001 % of the pages", 1.0, scattered(bits, 0.00001)),
        ("1 % of the pages, clustered", 1.0, clustered(bits, 0.01)),
        ("1 % of the pages, random", 0.15, scattered(bits, 0.01)),
    )
    for name, must, bitmap in kinds:
        rounds = in_turn(
            {
                "ours": partial(_timed, size, partial(_accel.bitmap_runs, bitmap, bits)),
                "memcpy": partial(_timed, size, partial(_accel.copy, destination, source)),
            },
            plan.pairs * ROUNDS_PER_PAIR,
        )
        yield compare(rounds, "ours", "memcpy", path=f"bitmap of {size // MIB} MiB to runs, {name}", must=must)


def fused_copy(plan: Plan) -> Iterator[Row]:
    """In calls of a chunk each, as the pipeline makes them; memcpy in the same calls."""
    _check_native()
    source, destination = _memory(COPY), _memory(COPY)
    fill_random(source, seed=0)
    chunks = [slice(at, at + plan.chunk) for at in range(0, COPY, plan.chunk)]
    sources, destinations = ([memory[chunk] for chunk in chunks] for memory in (source, destination))
    head = bytes(40)

    def fused() -> None:
        for into, chunk in zip(destinations, sources, strict=True):
            _accel.copy_check(into, chunk, head, 1)

    def plain() -> None:
        for into, chunk in zip(destinations, sources, strict=True):
            _accel.copy(into, chunk)

    rounds = in_turn(
        {"ours": lambda: _timed(COPY, fused), "memcpy": lambda: _timed(COPY, plain)}, plan.pairs * ROUNDS_PER_PAIR
    )
    yield compare(rounds, "ours", "memcpy", path="fused copy, zero test and xxh3", must=0.8)


def scattered(bits: int, part: float) -> memoryview:
    """A bitmap with ``part`` of its bits set, at random."""
    bitmap = _memory(bits // 8)
    source = random.Random(part)
    for _ in range(round(bits * part)):
        bit = int(source.random() * bits)
        bitmap[bit >> 3] |= 1 << (bit & 7)
    return bitmap


def clustered(bits: int, part: float) -> memoryview:
    """A bitmap with ``part`` of its bits set, in clusters at random."""
    bitmap = _memory(bits // 8)
    source = random.Random(part)
    for _ in range(round(bits * part / CLUSTER)):
        at = source.randrange(0, bits - CLUSTER, 8) // 8
        bitmap[at : at + CLUSTER // 8] = b"\xff" * (CLUSTER // 8)
    return bitmap


def _memory(size: int) -> memoryview:
    """Populated, and zeros."""
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))


def _timed(size: int, call: Callable[[], object]) -> Run:
    began = perf_counter()
    call()
    return Run(size, perf_counter() - began)


def _check_native() -> None:
    if _accel.IMPLEMENTATION != "native":
        raise CannotRun("the native accelerator was not built: install gcc and libxxhash-dev, and run scripts/setup")


MEASUREMENTS = (bitmaps, fused_copy)
