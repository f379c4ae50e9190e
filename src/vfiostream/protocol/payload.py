"""What a payload stands for: the content itself, zeros, the pages that are none, or a zstd frame.

The only module that knows zstd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import zstandard

from vfiostream import _accel
from vfiostream.buffers import Buffer
from vfiostream.errors import StreamError
from vfiostream.protocol import limits
from vfiostream.protocol.framing import FLAG_SPARSE, FLAG_ZERO, FLAG_ZSTD, sparse_bitmap_size

MAX_LEVEL = 19
MIN_LEVEL = -7
SAMPLES = 3
"""Places where content is probed: at both ends and between."""
SAMPLE = 4096
"""Bytes at each."""
WORTH = 1 / 32
"""The least share that samples have to shrink by: less is not worth the target's time."""


def bound(size: int) -> int:
    """Most bytes that ``size`` bytes of content can take while they are being compressed: the content, and the output
    of a compressor that finds nothing to save (``ZSTD_COMPRESSBOUND``).
    """
    return size + size // 256 + 1024


class Compressor:
    """Turns content into payload. One for each thread: the zstd contexts are not shared.

    The levels are zstd's own: of the other parameters that were tried on independent frames of 1 MiB, none makes them
    smaller than level 1 does in the same time.
    """

    def __init__(self, level: int = 1) -> None:
        """``level`` is what :meth:`compress` uses if not told."""
        self._level = level
        self._contexts: dict[int, zstandard.ZstdCompressor] = {}
        """By level, made when first used: some take megabytes."""

    def compress(self, content: Buffer, level: int | None = None, *, probe: bool = False) -> bytes | None:
        """Return a zstd frame that is smaller than ``content``, or None where there is none. ``level`` is zstd's,
        :data:`MIN_LEVEL` to :data:`MAX_LEVEL` but 0. With ``probe``, content whose samples do not shrink is not tried.
        """
        if probe and not self._shrinks(memoryview(content)):
            return None
        packed = self._context(self._level if level is None else level).compress(content)
        return packed if len(packed) < len(content) else None

    def _shrinks(self, content: memoryview) -> bool:
        """Whether samples of ``content`` get smaller by :data:`WORTH`. Costs a few microseconds if they do not."""
        if len(content) <= 2 * SAMPLES * SAMPLE:
            return True
        step = (len(content) - SAMPLE) // (SAMPLES - 1)
        # Each by itself: after noise zstd looks less closely, and would overlook what follows.
        context = self._context(MIN_LEVEL)
        packed = sum(len(context.compress(content[at * step : at * step + SAMPLE])) for at in range(SAMPLES))
        return packed < (1 - WORTH) * SAMPLES * SAMPLE

    def _context(self, level: int) -> zstandard.ZstdCompressor:
        if level not in self._contexts:
            if level == 0 or not MIN_LEVEL <= level <= MAX_LEVEL:
                raise ValueError(f"there is no zstd level {level} here: {MIN_LEVEL} to {MAX_LEVEL} are, but 0")
            context = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
            self._contexts[level] = context
        return self._contexts[level]


class Decompressor:
    """Turns payload into content, never more of it than the frame announced. One for each thread."""

    def __init__(self) -> None:
        self._context = zstandard.ZstdDecompressor()

    def content(self, payload: Buffer, flags: int, content_size: int, where: str) -> Buffer:
        """Return the content of a frame: ``payload`` itself where nothing was done to it, else new bytes. Raises
        :class:`~vfiostream.errors.StreamError` before it allocates more than ``content_size`` bytes.
        """
        if flags == FLAG_ZERO:
            return bytes(content_size)
        if flags != FLAG_ZSTD:
            return payload
        try:
            # The library allocates what the zstd frame says of itself, so that is what has to be checked. Its own
            # max_window_size counts only where it decompresses in steps.
            parameters = zstandard.get_frame_parameters(payload)
            if parameters.window_size > limits.MAX_WINDOW:
                raise StreamError(
                    where, f"has a zstd window of {parameters.window_size} bytes (the limit is {limits.MAX_WINDOW})"
                )
            if parameters.content_size != content_size:
                raise StreamError(where, f"has a zstd frame that does not hold just the {content_size} bytes announced")
            content: bytes = self._context.decompress(payload, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise StreamError(where, f"has a payload that zstd can't decompress: {error}") from error
        if len(content) != content_size:
            raise StreamError(where, f"decompresses to {len(content)} bytes, {content_size} were announced")
        return content


def shrunk(content: memoryview) -> tuple[int, Sequence[Buffer]]:
    """How ``content`` goes without its zero pages: flags and payload, whose pieces lie in ``content``."""
    pages, rest = divmod(len(content), limits.PAGE_SIZE)
    if rest:
        return (FLAG_ZERO, ()) if _accel.is_zero(content) else (0, (content,))
    bitmap = bytearray((pages + 7) // 8)
    kept = _accel.nonzero_pages(content, limits.PAGE_SIZE, bitmap)
    if kept == 0:
        return FLAG_ZERO, ()
    if kept == pages:
        return 0, (content,)
    runs = _accel.bitmap_runs(bitmap, pages)
    pieces: list[Buffer] = [
        content[first * limits.PAGE_SIZE : (first + count) * limits.PAGE_SIZE]
        for first, count in zip(runs[::2], runs[1::2], strict=True)
    ]
    return FLAG_SPARSE, [*pieces, bitmap]


class Piece(NamedTuple):
    """A stretch of content."""

    size: int
    data: Buffer | None
    """None for zeros."""


def pieces(payload: Buffer, flags: int, content_size: int) -> list[Piece]:
    """What the payload of a frame that is not compressed stands for, in order; of a frame whose prefix was checked.
    Raises ValueError for what is wrong with it.
    """
    if flags == FLAG_ZERO:
        return [Piece(content_size, None)]
    if flags != FLAG_SPARSE:
        return [Piece(content_size, payload)]
    view = memoryview(payload)
    pages = content_size // limits.PAGE_SIZE
    end = len(view) - sparse_bitmap_size(content_size)
    bitmap = view[end:]
    if _accel.bitmap_count(bitmap, 8 * len(bitmap)) != _accel.bitmap_count(bitmap, pages):
        raise ValueError("has bits set beyond its last page")
    runs = _accel.bitmap_runs(bitmap, pages)
    if sum(runs[1::2]) * limits.PAGE_SIZE != end:
        raise ValueError(f"says that {sum(runs[1::2])} of its pages are not zeros, and has {end} bytes of them")
    found: list[Piece] = []
    at = done = 0
    for first, count in zip(runs[::2], runs[1::2], strict=True):
        start, size = first * limits.PAGE_SIZE, count * limits.PAGE_SIZE
        if start > at:
            found.append(Piece(start - at, None))
        found.append(Piece(size, view[done : done + size]))
        at, done = start + size, done + size
    if at < content_size:
        found.append(Piece(content_size - at, None))
    return found
