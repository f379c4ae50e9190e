"""Dirty bitmaps: asked for in windows, however large guest memory is, and believed only within the range."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from vfiostream._accel import bitmap_merge

PAGE_SIZE = 4096
"""Bytes that one bit stands for."""
MAX_WINDOW = 8 * 1024 * 1024
"""Pages that are asked for at a time: 1 MiB of bitmap, 32 GiB of guest memory."""


async def merge(
    bitmap: memoryview, pages: int, window: int, ask: Callable[[int, int, memoryview], Awaitable[None]]
) -> None:
    """OR the bits of ``pages`` pages into ``bitmap``, in windows of at most ``window`` pages, a multiple of 8.

    ``ask(first, count, bits)`` fills ``bits``, zeros in whole 64-bit words, for ``count`` pages from page ``first`` on.
    What it sets beyond them is passed over.
    """
    step = min(window, MAX_WINDOW)
    for first in range(0, pages, step):
        count = min(step, pages - first)
        bits = bytearray((count + 63) // 64 * 8)
        await ask(first, count, memoryview(bits))
        length = (count + 7) // 8
        if count % 8:
            bits[length - 1] &= (1 << count % 8) - 1
        bitmap_merge(bitmap[first // 8 : first // 8 + length], memoryview(bits)[:length])
