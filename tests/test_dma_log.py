"""The log of a device's DMA: its ranges, and the bitmaps that are asked for in windows."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from vfiostream.devices import dirty
from vfiostream.devices.dma_log import merged
from vfiostream.uapi.vfio import MAX_DMA_LOGGING_RANGES

PAGE = 4096


@pytest.mark.parametrize(
    ("mapped", "most", "expected"),
    [
        ([], 256, []),
        ([(0, 10)], 256, [(0, 10)]),
        ([(0, 10)], 1, [(0, 10)]),
        ([(20, 5), (0, 10)], 256, [(0, 10), (20, 5)]),
        ([(10, 5), (0, 10), (15, 1)], 256, [(0, 16)]),
        ([(0, 10), (2, 3), (8, 7)], 256, [(0, 15)]),
        ([(0, 1), (4, 1), (6, 1), (11, 1)], 3, [(0, 1), (4, 3), (11, 1)]),
        ([(0, 1), (4, 1), (6, 1), (11, 1)], 2, [(0, 7), (11, 1)]),
        ([(0, 1), (4, 1), (6, 1), (11, 1)], 1, [(0, 12)]),
        ([(0, 1), (2, 1), (4, 1)], 1, [(0, 5)]),
    ],
)
def test_ranges_are_merged(mapped: list[tuple[int, int]], most: int, expected: list[tuple[int, int]]) -> None:
    assert merged(mapped, most) == expected


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 3)), max_size=600),
    st.sampled_from([1, 2, 7, MAX_DMA_LOGGING_RANGES]),
)
def test_every_page_that_is_mapped_is_logged_and_ranges_are_apart(mapped: list[tuple[int, int]], most: int) -> None:
    pages = {page for start, length in mapped for page in range(start, start + length)}
    ranges = merged(mapped, most)
    assert len(ranges) <= most
    assert pages <= {page for start, length in ranges for page in range(start, start + length)}
    for (start, length), (following, _) in pairwise(ranges):
        assert start + length < following
    if len(ranges) < most:  # nothing had to be combined
        assert pages == {page for start, length in ranges for page in range(start, start + length)}


@pytest.mark.anyio
@pytest.mark.parametrize("pages", [1, 7, 64, 65, 200, 1000])
@pytest.mark.parametrize("window", [8, 64, 200, 1 << 20])
async def test_a_bitmap_is_asked_for_in_windows_and_not_believed_beyond_its_end(pages: int, window: int) -> None:
    asked = []

    async def ask(first: int, count: int, bits: memoryview) -> None:
        assert not any(bits)
        assert len(bits) == (count + 63) // 64 * 8
        assert 0 < count <= window
        asked.append((first, count))
        bits[:] = b"\xff" * len(bits)

    size = (pages + 7) // 8
    bitmap = bytearray(size + 2)
    await dirty.merge(memoryview(bitmap)[1:-1], pages, window, ask)
    assert sum(count for _, count in asked) == pages
    assert int.from_bytes(bitmap[1:-1], "little") == (1 << pages) - 1
    assert (bitmap[0], bitmap[-1]) == (0, 0)


@pytest.mark.anyio
async def test_no_window_is_larger_than_memory_should_be_spent_on() -> None:
    asked = []

    async def ask(first: int, count: int, bits: memoryview) -> None:
        asked.append((first, count))

    pages = 2 * dirty.MAX_WINDOW + 3
    await dirty.merge(memoryview(bytearray((pages + 7) // 8)), pages, 1 << 40, ask)
    assert asked == [(0, dirty.MAX_WINDOW), (dirty.MAX_WINDOW, dirty.MAX_WINDOW), (2 * dirty.MAX_WINDOW, 3)]
