"""What is in device memory: bytes that compress as the contents of real memory do, or as badly as one likes."""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

from vfiostream.uapi.four_region import PAGE_SIZE
from vfiostream.vendor.settings import Data

POOL_SIZE = 4 * 1024 * 1024
"""Bytes of a pool. More than the window of fast compressors, so that the repetition of it does not help them."""

STAMP = struct.Struct("<Q")
"""Starts each page that is not zeros, and differs from page to page and from write to write."""
_INITIAL = 1 << 63
"""Tells the stamps of the first content from those of writes."""

_TEXT = """
    the of and to in is a that for it as was with be by on not he his but at are this have from or had an they which
    one you were her all she there would their we him been has when who will more no if out so said what up its about
    into than them can only other new some could time these two may then do first any my now such like our over man
    device memory page region state driver buffer migrate guest host register queue interrupt
"""
_WORDS = _TEXT.split()


def make_pool(data: Data, seed: int, size: int) -> bytes:
    """``size`` bytes of ``data``, whole pages; the same for the same seed (and, for ``library``, the same machine)."""
    source = random.Random(f"{seed} {data}")
    match data:
        case "zeros":
            return bytes(size)
        case "random":
            return source.randbytes(size)
        case "text":
            return _text(source, size)
        case "library":
            return _libraries(source, size)


def _text(source: random.Random, size: int) -> bytes:
    words: list[str] = []
    length = 0
    while length < size:
        words += source.choices(_WORDS, k=4096)
        length = sum(len(word) + 1 for word in words[-4096:]) + length
    return " ".join(words).encode()[:size].ljust(size)


def _libraries(source: random.Random, size: int) -> bytes:
    """The executable and the libraries this process runs on, from a place that depends on the seed."""
    mapped = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    names = [Path(sys.executable).resolve()]
    names += sorted(Path(name) for name in mapped if ".so" in Path(name).name and name.startswith(("/lib", "/usr/lib")))
    content = bytearray()
    for name in names:
        content += name.read_bytes()
        if len(content) >= 4 * size:
            break
    start = source.randrange(len(content) // PAGE_SIZE) * PAGE_SIZE
    whole = content[start:] + content[:start]
    return bytes((whole * (size // len(whole) + 1))[:size])


def fill(memory: memoryview, pool: bytes, *, stamped: bool) -> None:
    """Fill ``memory`` (whole pages) with ``pool`` over and over, each page told from the others by its stamp."""
    for start in range(0, len(memory), len(pool)):
        count = min(len(pool), len(memory) - start)
        memory[start : start + count] = pool[:count]
    if stamped:
        for page in range(len(memory) // PAGE_SIZE):
            STAMP.pack_into(memory, page * PAGE_SIZE, _INITIAL | page)
