"""The reference device's log of its DMA: what is in it, and what it refuses."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from tests.access_contract import bits
from tests.vendor_operations import IOVA, PAGE, guest, refused
from tests.vendor_states import GET, PROBE, SET, Machine, machine
from vfiostream.uapi.vfio import Feature
from vfiostream.vendor.dma_log import FEATURES
from vfiostream.vendor.settings import parse_fault


def start_log(one: Machine, ranges: list[tuple[int, int]], page_size: int = PAGE) -> int:
    """Start; returns the page size that is logged."""
    data = struct.pack("<QII", page_size, len(ranges), 0) + b"".join(struct.pack("<QQ", *each) for each in ranges)
    answer = one.driver.feature(SET | Feature.DMA_LOGGING_START, data)
    assert answer[8:] == data[8:]
    return int(struct.unpack_from("<Q", answer)[0])


def stop_log(one: Machine) -> None:
    one.driver.feature(SET | Feature.DMA_LOGGING_STOP, b"")


def report(one: Machine, iova: int, length: int, page_size: int = PAGE) -> set[int]:
    data = struct.pack("<QQQ", iova, length, page_size)
    answer = one.driver.feature(GET | Feature.DMA_LOGGING_REPORT, data)
    assert answer[:24] == data
    assert len(answer) == 24 + -(-length // page_size // 64) * 8
    found = bits(answer[24:])
    assert not found or max(found) < length // page_size
    return found


def written_pages(fd: int, pages: int) -> set[int]:
    content = os.pread(fd, pages * PAGE, 0)
    return {page for page in range(pages) if any(content[page * PAGE : (page + 1) * PAGE])}


@pytest.mark.parametrize("interface", ["migration-states", "migration-region"])
def test_the_log_has_the_pages_of_its_ranges_once(interface: str) -> None:
    with machine(interface=interface) as one, guest(one.device, 100) as fd:
        one.device.workload.write(5)
        os.pwrite(fd, bytes(100 * PAGE), 0)
        assert start_log(one, [(IOVA + 40 * PAGE, 30 * PAGE), (IOVA, 20 * PAGE)]) == PAGE
        one.device.workload.write(60)
        expected = {page for page in written_pages(fd, 100) if page < 20 or 40 <= page < 70}
        assert expected
        assert report(one, IOVA, 10 * PAGE) == {page for page in expected if page < 10}
        assert report(one, IOVA, 100 * PAGE) == {page for page in expected if page >= 10}
        assert report(one, IOVA, 100 * PAGE) == set()


def test_reports_in_larger_pages_and_over_gaps() -> None:
    with machine() as one, guest(one.device, 64) as low, guest(one.device, 64, IOVA + 128 * PAGE) as high:
        assert start_log(one, [(IOVA, 256 * PAGE)], 16 * PAGE) == PAGE
        one.device.workload.write(30)
        expected = written_pages(low, 64) | {128 + page for page in written_pages(high, 64)}
        assert report(one, IOVA, 256 * PAGE, 8 * PAGE) == {page // 8 for page in expected}
        one.device.workload.write(1)
        assert report(one, 0, 1 << 40, 1 << 40) == {0}
        assert report(one, 0, 1 << 40, 1 << 40) == set()


def test_no_ranges_mean_everything_and_stopping_forgets() -> None:
    with machine() as one, guest(one.device, 8) as fd:
        start_log(one, [])
        one.device.workload.write(5)
        assert report(one, IOVA, 8 * PAGE) == written_pages(fd, 8)
        with refused(errno.EBUSY):
            start_log(one, [])
        one.device.workload.write(5)
        stop_log(one)
        stop_log(one)
        with refused(errno.EINVAL):
            report(one, IOVA, 8 * PAGE)
        start_log(one, [])
        assert report(one, IOVA, 8 * PAGE) == set()


@pytest.mark.parametrize(
    ("ranges", "page_size"),
    [
        ([(IOVA + 1, PAGE)], PAGE),
        ([(IOVA, PAGE - 1)], PAGE),
        ([(IOVA, 0)], PAGE),
        ([(IOVA, PAGE)], 2 * PAGE),
        ([(IOVA, PAGE)], 0),
        ([(IOVA, PAGE)], PAGE - 1),
        ([(IOVA, 3 * PAGE)], 3 * PAGE),
        ([(IOVA, PAGE)], 2048),
        ([((1 << 64) - PAGE, 2 * PAGE)], PAGE),
        ([(IOVA, 2 * PAGE), (IOVA + PAGE, PAGE)], PAGE),
        ([(IOVA + PAGE, PAGE), (IOVA, PAGE), (IOVA, PAGE)], PAGE),
    ],
)
def test_logs_that_make_no_sense(ranges: list[tuple[int, int]], page_size: int) -> None:
    with machine() as one:
        with refused(errno.EINVAL):
            start_log(one, ranges, page_size)
        start_log(one, [(n * PAGE, PAGE) for n in range(256)])


def test_more_ranges_than_there_may_be() -> None:
    with machine() as one, refused(errno.E2BIG):
        start_log(one, [(n * PAGE, PAGE) for n in range(257)])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(15),
        struct.pack("<QII", PAGE, 1, 0),
        struct.pack("<QIIQ", PAGE, 0, 0, 1),
        struct.pack("<QII", PAGE, 0, 1),
    ],
)
def test_malformed_requests_for_a_log(data: bytes) -> None:
    with machine() as one, refused(errno.EINVAL):
        one.driver.feature(SET | Feature.DMA_LOGGING_START, data)


@pytest.mark.parametrize(
    ("iova", "length", "page_size", "number"),
    [
        (IOVA, 0, PAGE, errno.EINVAL),
        (IOVA + 1, PAGE, PAGE, errno.EINVAL),
        (IOVA, PAGE + 1, PAGE, errno.EINVAL),
        (IOVA, PAGE, 0, errno.EINVAL),
        (IOVA, 3 * PAGE, 3 * PAGE, errno.EINVAL),
        (IOVA, PAGE, 1024, errno.EINVAL),
        (IOVA, 1 << 41, PAGE, errno.EINVAL),
        ((1 << 64) - PAGE, 2 * PAGE, PAGE, errno.EOVERFLOW),
    ],
)
def test_reports_that_make_no_sense(iova: int, length: int, page_size: int, number: int) -> None:
    with machine() as one:
        start_log(one, [])
        with refused(number):
            report(one, iova, length, page_size)
        with refused(errno.EINVAL):
            one.driver.feature(GET | Feature.DMA_LOGGING_REPORT, bytes(23))


def test_without_dirty_tracking_there_is_no_log() -> None:
    with machine(dirty_tracking=False) as one:
        for feature, operation in FEATURES.items():
            with refused(errno.ENOTTY):
                one.driver.feature(PROBE | operation | feature, b"")


def test_reset_and_the_clients_end_stop_the_log() -> None:
    with machine() as one:
        for end in (one.device.reset, one.device.client_gone):
            start_log(one, [])
            end()
            with refused(errno.EINVAL):
                report(one, IOVA, PAGE)


def test_faults() -> None:
    names = "start-log:1:ENOMEM report:2:EAGAIN stop-log:1:EBUSY"
    with machine(faults=tuple(parse_fault(text) for text in names.split())) as one:
        with refused(errno.ENOMEM):
            start_log(one, [])
        start_log(one, [])
        report(one, IOVA, PAGE)
        with refused(errno.EAGAIN):
            report(one, IOVA, PAGE)
        with refused(errno.EBUSY):
            stop_log(one)
        report(one, IOVA, PAGE)
        stop_log(one)
