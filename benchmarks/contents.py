"""What is moved: bytes that don't compress, bytes of shared libraries, and a mixture.

A repetition lies further apart than any window that is compared here reaches, and no page is zeros unless it is meant
to be.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from benchmarks.plan import MIB, PAGE, CannotRun
from vfiostream.vendor.contents import POOL_SIZE, fill, make_pool

Content = Literal["random", "library", "mixed"]
LIBRARIES = Path("/usr/lib")
MIN_LIBRARIES = 64 * MIB
"""Less would fit the window of a compressor (zstd 1 has 512 KiB, and long-range ones more), and the caches."""

# Extents of a mixture, in pages: from smaller than a chunk to a few of them, so that chunks are mixed as well.
_EXTENTS = (16, 64, 256, 1024)
_KINDS = ("zeros", "zeros", "library", "random")


def fill_random(memory: memoryview, seed: int) -> None:
    """Whole pages, each of which differs from all others."""
    fill(memory, make_pool("random", seed, POOL_SIZE), stamped=True)


def libraries(folder: Path = LIBRARIES) -> Iterator[bytes]:
    """The shared libraries of this machine, in the order of their names; over and over."""
    files = sorted(path for path in folder.rglob("*.so*") if path.is_file() and not path.is_symlink())
    if sum(path.stat().st_size for path in files) < MIN_LIBRARIES:
        raise CannotRun(
            f"{folder} has less than {MIN_LIBRARIES >> 20} MiB of shared libraries: install qemu-system-x86"
        )
    while True:
        for path in files:
            yield path.read_bytes()


def write(path: Path, content: Content, size: int) -> None:
    """Make a file of ``size`` bytes, whole pages."""
    path.touch()
    os.truncate(path, 0)
    os.truncate(path, size)
    with path.open("r+b") as file:
        for piece in pieces(content, size):
            file.write(piece)


def pieces(content: Content, size: int) -> Iterator[bytes]:
    """``size`` bytes of ``content``, in order."""
    if content == "mixed":
        yield from _mixed(size)
        return
    source = _random() if content == "random" else libraries()
    left = size
    while left:
        piece = next(source)[:left]
        left -= len(piece)
        yield piece


def _random() -> Iterator[bytes]:
    source = random.Random("random")
    while True:
        yield source.randbytes(MIB)


class _Cut:
    """Pieces of any size out of an endless stream."""

    def __init__(self, stream: Iterator[bytes]) -> None:
        self._stream = stream
        self._rest = memoryview(b"")

    def take(self, size: int) -> bytes:
        taken = bytearray()
        while len(taken) < size:
            if not self._rest:
                self._rest = memoryview(next(self._stream))
            piece = self._rest[: size - len(taken)]
            taken += piece
            self._rest = self._rest[len(piece) :]
        return bytes(taken)


def _mixed(size: int) -> Iterator[bytes]:
    """Half zeros, a quarter library-like, a quarter random, to the page: each cycle has all of them in each length."""
    order = random.Random("mixed")
    library, noise = _Cut(libraries()), _Cut(_random())
    left = size
    while left:
        cycle = [(kind, pages) for kind in _KINDS for pages in _EXTENTS]
        order.shuffle(cycle)
        for kind, pages in cycle:
            length = min(left, pages * PAGE)
            left -= length
            yield bytes(length) if kind == "zeros" else (library if kind == "library" else noise).take(length)
