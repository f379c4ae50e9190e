"""Whether pages that are sent again should go as a delta: zstd with their old content as prefix. A prototype.

Pages of library-like content changed in 8 bytes each, in a tenth of their bytes, or wholly. They go in chunks of 1 MiB
of gathered pages, or page by page, and through two ways into zstd: ``python-zstandard``, which knows dictionaries of
raw content and makes a compressor for each, and ``libzstd`` itself, whose ZSTD_CCtx_refPrefix needs neither. Level 1
has a hash table for 16 Ki positions, where nothing is left of a chunk's old content when the new comes: deltas are
given one of 128 Ki.

What a delta needs beside that is not in the figures: the source has to keep what the target has, another copy of all
the memory that may be sent so, and to copy into it what it sends.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import thread_time
from typing import Any, Literal, NamedTuple, Protocol

import zstandard

from benchmarks.contents import libraries
from benchmarks.pairs import column, spread
from benchmarks.plan import MIB, PAGE, CannotRun, Plan
from vfiostream import _accel

CONTENT = 32 * MIB
"""Bytes that are sent again; their own content comes next among the libraries where pages change wholly."""
WINDOW_LOG = 21
"""2 MiB: a chunk and its old content."""
HASH_LOG = 17
CHANGES = ("8 bytes", "10 %", "wholly")
PIECES = {"chunk": MIB, "page": PAGE}


class Cost(NamedTuple):
    """What sending takes, for each byte of content."""

    cpu: float
    """Seconds of one core at the source, in s/GB."""
    wire: float
    """Bytes on the link."""
    receiving: float
    """Seconds of one core at the target, in s/GB."""


@dataclass(frozen=True, slots=True)
class BreakEven:
    """At which link rates, in GB/s, one way of sending is faster than another."""

    when: Literal["always", "never", "below", "above"]
    rate: float = 0.0

    def __str__(self) -> str:
        return self.when if self.when in ("always", "never") else f"{self.when} {self.rate:.2g} GB/s"


def break_even(ours: Cost, other: Cost) -> BreakEven:
    """Where sending as ``ours`` says is faster than as ``other``. Compressing and sending overlap, so the slower of
    both counts: GB take max(cpu, wire / rate) seconds.
    """
    if ours.cpu <= other.cpu and ours.wire <= other.wire:
        return BreakEven("always")
    if ours.cpu >= other.cpu and ours.wire >= other.wire:
        return BreakEven("never")
    if ours.wire < other.wire:
        return BreakEven("below", other.wire / ours.cpu)
    return BreakEven("above", ours.wire / other.cpu)


def changed(old: bytes, change: str, fresh: bytes, source: random.Random) -> bytes:
    """``old`` (whole pages) with as much of every page changed as ``change`` says; wholly is ``fresh``."""
    if change == "wholly":
        return fresh
    new = bytearray(old)
    count = 8 if change == "8 bytes" else PAGE // 10
    for page in range(0, len(new), PAGE):
        at = page + source.randrange(PAGE - count)
        new[at : at + count] = source.randbytes(count)
    return bytes(new)


def table(plan: Plan) -> Iterator[dict[str, Any]]:
    """One line for each change, size of piece and way into zstd, and beside it level 1 in chunks by the same way."""
    content = CONTENT // 8 if plan.quick else CONTENT
    stream = b"".join(_first(libraries(), 2 * content))
    old, fresh = stream[:content], stream[content : 2 * content]
    raw = Cost(_copying(plan, old), 1.0, 0.0)
    ways: dict[str, Way] = {"libzstd": _Library(), "python-zstandard": _Package()}
    for change in CHANGES:
        new = changed(old, change, fresh, random.Random(change))
        pieces = {
            name: [(old[at : at + size], new[at : at + size]) for at in range(0, content, size)]
            for name, size in PIECES.items()
        }
        contestants = {
            (way, piece, delta): partial(_cost, ways[way], pieces[piece], delta)
            for way in ways
            for piece, delta in (("chunk", False), ("chunk", True), ("page", True))
        }
        rounds = plan.rounds(contestants)
        for way in ways:
            plain = _median(column(rounds, (way, "chunk", False)))
            for piece in PIECES:
                delta = _median(column(rounds, (way, piece, True)))
                yield {
                    "changed in each page": change,
                    "sent by": piece,
                    "through": way,
                    "raw": raw._asdict(),
                    "zstd 1": plain._asdict(),
                    "delta": delta._asdict(),
                    "delta is faster than raw": str(break_even(delta, raw)),
                    "delta is faster than zstd 1": str(break_even(delta, plain)),
                }


def _first(stream: Iterator[bytes], size: int) -> Iterator[bytes]:
    while size > 0:
        piece = next(stream)
        size -= len(piece)
        yield piece


def _median(costs: list[Cost]) -> Cost:
    return Cost(*(spread(values).median for values in zip(*costs, strict=True)))


def _copying(plan: Plan, content: bytes) -> float:
    """CPU seconds per GB of gathering pages with their check, which all ways of sending pay: the cost of raw."""
    buffer = bytearray(MIB)
    chunks = [content[at : at + MIB] for at in range(0, len(content), MIB)]

    def copy() -> None:
        for chunk in chunks:
            _accel.copy_check(memoryview(buffer)[: len(chunk)], chunk, b"", 0)

    return spread(_spent(copy)[0] / len(content) * 1e9 for _ in range(plan.pairs)).median


def _spent(call: Callable[[], Any]) -> tuple[float, Any]:
    began = thread_time()
    result = call()
    return thread_time() - began, result


class Way(Protocol):
    """A way into zstd."""

    def compress(self, new: bytes, old: bytes) -> bytes:
        """``new`` at level 1; with ``old`` as prefix where it is not empty."""

    def decompress(self, frame: bytes, old: bytes, size: int) -> bytes: ...


class _Package:
    """python-zstandard."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()

    def compress(self, new: bytes, old: bytes) -> bytes:
        if not old:
            return self._compressor.compress(new)
        tables = {"hash_log": HASH_LOG, "window_log": WINDOW_LOG} if len(new) > PAGE else {}
        parameters = zstandard.ZstdCompressionParameters.from_level(
            1, source_size=len(new), dict_size=len(old), **tables
        )
        return zstandard.ZstdCompressor(dict_data=_dictionary(old), compression_params=parameters).compress(new)

    def decompress(self, frame: bytes, old: bytes, size: int) -> bytes:
        if not old:
            return self._decompressor.decompress(frame)
        return zstandard.ZstdDecompressor(dict_data=_dictionary(old)).decompress(frame)


def _dictionary(old: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


class _Library:
    """libzstd, with one context for each way and parameters."""

    _LEVEL, _WINDOW_LOG, _HASH_LOG = 100, 101, 102  # ZSTD_cParameter of zstd.h

    def __init__(self) -> None:
        name = ctypes.util.find_library("zstd")
        if name is None:
            raise CannotRun("libzstd is not here: install libzstd1")
        self._zstd = ctypes.CDLL(name)
        text, size, context = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p
        self._declare("createCCtx", context)
        self._declare("createDCtx", context)
        self._declare("CCtx_setParameter", size, context, ctypes.c_int, ctypes.c_int)
        self._declare("CCtx_refPrefix", size, context, text, size)
        self._declare("DCtx_refPrefix", size, context, text, size)
        self._declare("compress2", size, context, text, size, text, size)
        self._declare("decompressDCtx", size, context, text, size, text, size)
        self._declare("isError", ctypes.c_uint, size)
        self._plain = self._context()
        self._chunk = self._context((self._WINDOW_LOG, WINDOW_LOG), (self._HASH_LOG, HASH_LOG))
        self._page = self._context()
        self._decompressor = self._zstd.ZSTD_createDCtx()
        self._out = ctypes.create_string_buffer(2 * MIB)

    def _declare(self, name: str, result: Any, *arguments: Any) -> None:
        function = getattr(self._zstd, f"ZSTD_{name}")
        function.restype, function.argtypes = result, arguments

    def _context(self, *parameters: tuple[int, int]) -> int:
        context: int = self._zstd.ZSTD_createCCtx()
        for parameter, value in ((self._LEVEL, 1), *parameters):
            self._checked(self._zstd.ZSTD_CCtx_setParameter(context, parameter, value))
        return context

    def _checked(self, result: int) -> int:
        if self._zstd.ZSTD_isError(result):
            raise CannotRun(f"libzstd failed with {result - (1 << 64)}")
        return result

    def compress(self, new: bytes, old: bytes) -> bytes:
        context = self._plain
        if old:
            context = self._chunk if len(new) > PAGE else self._page
            self._checked(self._zstd.ZSTD_CCtx_refPrefix(context, old, len(old)))
        size = self._zstd.ZSTD_compress2(context, self._out, len(self._out), new, len(new))
        return ctypes.string_at(self._out, self._checked(size))

    def decompress(self, frame: bytes, old: bytes, size: int) -> bytes:
        if old:
            self._checked(self._zstd.ZSTD_DCtx_refPrefix(self._decompressor, old, len(old)))
        got = self._zstd.ZSTD_decompressDCtx(self._decompressor, self._out, len(self._out), frame, len(frame))
        return ctypes.string_at(self._out, self._checked(got))


def _cost(way: Way, pairs: list[tuple[bytes, bytes]], delta: bool) -> Cost:
    """Send the new content of every pair, to somebody who has the old one."""
    pieces = [(new, old if delta else b"") for old, new in pairs]
    sending, frames = _spent(lambda: [way.compress(new, old) for new, old in pieces])
    both = list(zip(frames, pieces, strict=True))
    receiving, arrived = _spent(lambda: [way.decompress(frame, old, len(new)) for frame, (new, old) in both])
    if any(new != got for (new, _), got in zip(pieces, arrived, strict=True)):
        raise CannotRun("what a delta gave is not what was compressed")
    content = sum(len(new) for new, _ in pieces)
    wire = sum(min(len(frame), len(new)) for frame, (new, _) in both)  # what does not shrink goes as it is
    return Cost(sending / content * 1e9, wire / content, receiving / content * 1e9)


MEASUREMENTS = (table,)
