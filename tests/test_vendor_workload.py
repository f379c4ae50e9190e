"""What the reference device writes while it runs, to its own memory and to the guest, and its records of that."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time

import pytest

from tests.vendor_operations import (
    BITMAP,
    IOVA,
    PAGE,
    RUNNING_LOGGING,
    STOP,
    STOP_LOGGING,
    Operations,
    finish,
    guest,
    opened,
    pages_of,
    refused,
)
from vfiostream.vendor.settings import Data, Pattern


def bits(bitmap: bytes) -> set[int]:
    value = int.from_bytes(bitmap, "little")
    return {n for n in range(8 * len(bitmap)) if value >> n & 1}


def written_pages(fd: int, pages: int) -> set[int]:
    content = os.pread(fd, pages * PAGE, 0)
    return {page for page in range(pages) if any(content[page * PAGE : (page + 1) * PAGE])}


@pytest.mark.parametrize("at_once", [True, False])
def test_the_bitmap_says_which_guest_pages_were_written_once(at_once: bool) -> None:
    with opened() as (device, ops), guest(device, 100) as fd:
        ops.set_state(RUNNING_LOGGING)
        device.workload.write(20)
        expected = written_pages(fd, 100)
        assert expected
        assert bits(ops.get_bitmap(IOVA, 100, at_once=at_once)) == expected
        assert bits(ops.get_bitmap(IOVA, 100, at_once=at_once)) == set()


def test_pieces_of_the_bitmap_make_up_the_whole() -> None:
    with opened() as (device, ops), guest(device, 100) as fd:
        ops.set_state(RUNNING_LOGGING)
        device.workload.write(60)
        found: set[int] = set()
        for start, end in itertools.pairwise((0, 3, 11, 16, 64, 65, 99, 100)):
            piece = bits(ops.get_bitmap(IOVA + start * PAGE, end - start))
            assert not found & {start + n for n in piece}
            found |= {start + n for n in piece}
        assert found == written_pages(fd, 100)


def test_a_bitmap_may_span_mappings_that_touch_and_no_gap() -> None:
    after = IOVA + 13 * PAGE
    with opened() as (device, ops), guest(device, 13) as low, guest(device, 20, after) as high:
        with guest(device, 4, after + 21 * PAGE):
            ops.set_state(RUNNING_LOGGING)
            device.workload.write(40)
            expected = written_pages(low, 13) | {13 + page for page in written_pages(high, 20)}
            for start, pages in ((IOVA, 34), (IOVA - PAGE, 2), (after, 22), (IOVA + 34 * PAGE, 5), (0, 1)):
                with refused(errno.EINVAL):
                    ops.get_bitmap(start, pages)
            assert bits(ops.get_bitmap(IOVA + 2 * PAGE, 31)) == {page - 2 for page in expected if page >= 2}


def test_bitmap_requests_that_make_no_sense_are_refused() -> None:
    with opened() as (device, ops), guest(device, 8):
        ops.set_state(RUNNING_LOGGING)
        for start, pages in ((IOVA + 1, 1), (IOVA, 0), (IOVA, 8 * PAGE + 1), (IOVA, (1 << 64) - 1)):
            with refused(errno.EINVAL):
                ops.get_bitmap(start, pages)


def test_outside_logging_the_bitmap_is_empty() -> None:
    with opened() as (device, ops), guest(device, 8):
        ops.regions.write(BITMAP, 0, b"\xff")
        device.workload.write(8)
        assert ops.get_bitmap(IOVA, 8) == b"\0"
        ops.set_state(RUNNING_LOGGING)
        assert ops.get_bitmap(IOVA, 8) == b"\0"  # a session starts clean


def test_the_last_bitmap_is_read_when_stopped() -> None:
    with opened() as (device, ops), guest(device, 8) as fd:
        ops.set_state(RUNNING_LOGGING)
        device.workload.write(3)
        ops.set_state(STOP_LOGGING)
        assert bits(ops.get_bitmap(IOVA, 8)) == written_pages(fd, 8)


def test_guest_memory_is_written_without_tracking_too_and_never_if_read_only() -> None:
    with opened(dirty_tracking=False) as (device, _):
        with guest(device, 8) as fd, guest(device, 8, 0, writable=False) as read_only:
            device.workload.write(20)
            assert written_pages(fd, 8)
            assert not written_pages(read_only, 8)


def test_unmapped_guest_memory_is_left_alone() -> None:
    with opened() as (device, ops), guest(device, 8) as fd, guest(device, 8, 0):
        device.dma_unmap(IOVA, 8 * PAGE)
        ops.set_state(RUNNING_LOGGING)
        device.workload.write(20)
        assert not written_pages(fd, 8)
        with refused(errno.EINVAL):
            ops.get_bitmap(IOVA, 8)
        device.client_gone()
        device.workload.write(1)


@pytest.mark.parametrize(
    ("iova", "length", "offset"),
    [
        (IOVA + 1, PAGE, 0),
        (IOVA, PAGE + 1, 0),
        (IOVA, PAGE, 1),
        (IOVA, 0, 0),
        (IOVA, 9 * PAGE, 0),
        (IOVA, PAGE, 8 * PAGE),
        ((1 << 64) - PAGE, 2 * PAGE, 0),
        (7 * PAGE, 2 * PAGE, 0),
        (8 * PAGE, PAGE, 0),
        (0, 1 << 62, 0),
    ],
)
def test_bad_dma_mappings_are_refused(iova: int, length: int, offset: int) -> None:
    with opened() as (device, _), guest(device, 8, 8 * PAGE) as fd:
        with pytest.raises(OSError):  # noqa: PT011 - EINVAL or ENOSPC
            device.dma_map(iova, length, fd, offset, writable=True)


def test_unmapping_takes_whole_mappings() -> None:
    with opened() as (device, _), guest(device, 8, 0), guest(device, 8, 8 * PAGE):
        for iova, length in ((0, PAGE), (PAGE, 16 * PAGE), (0, 15 * PAGE)):
            with refused(errno.EINVAL):
                device.dma_unmap(iova, length)
        device.dma_unmap(0, 16 * PAGE)
        with refused(errno.ENOENT):
            device.dma_unmap(0, 16 * PAGE)


# ---- the thread


def wait_for_change(ops: Operations) -> None:
    """Let the workload write; fails if it does not within a long time."""
    before = ops.digest
    deadline = time.monotonic() + 10
    while ops.digest == before:
        assert time.monotonic() < deadline, "nothing was written"


@pytest.mark.parametrize("pattern", ["uniform", "hotspot", "sequential"])
@pytest.mark.parametrize("data", ["zeros", "text", "library", "random"])
def test_the_workload_runs_until_stop_has_returned(pattern: Pattern, data: Data) -> None:
    with opened(dirty_rate=1 << 24, pattern=pattern, data=data, seed=1) as (device, source), opened() as (_, target):
        target.set_state(STOP)
        with guest(device, 8):
            source.set_state(RUNNING_LOGGING)
            target.load(source.capture())
            wait_for_change(source)
            target.load(source.capture())
            finish(source, target)
            assert source.digest == target.digest


def test_nothing_is_written_when_stopped() -> None:
    with opened(dirty_rate=1 << 26, state_time=0.03) as (_, ops):
        wait_for_change(ops)
        ops.set_state(STOP)
        digest = ops.digest
        ops.set_state(STOP_LOGGING)  # takes time in which a workload would write
        assert ops.digest == digest
        ops.set_state(RUNNING_LOGGING)
        wait_for_change(ops)


def test_the_same_seed_gives_the_same_device_and_writes() -> None:
    digests = []
    for seed in (5, 5, 6):
        with opened(seed=seed, data="text") as (device, ops):
            device.workload.write(50)
            digests.append(ops.digest)
    assert digests[0] == digests[1] != digests[2]


def test_patterns_choose_their_pages() -> None:
    def dirty_pages(pattern: Pattern, count: int) -> list[int]:
        with opened(pattern=pattern, memory=1000 * PAGE) as (device, ops):
            ops.set_state(RUNNING_LOGGING)
            ops.capture()
            device.workload.write(count)
            return pages_of(ops.capture())

    assert dirty_pages("sequential", 30) == list(range(30))
    assert 80 < len(dirty_pages("hotspot", 2000)) < 100 + 250
    assert len(dirty_pages("uniform", 2000)) > 800


def test_closing_ends_a_call_that_takes_its_time() -> None:
    with opened(capture_time=3600.0) as (device, ops):
        closer = threading.Timer(0, device.close)
        closer.start()
        with refused(errno.ENODEV):
            ops.get_memory_size()
        closer.join()
