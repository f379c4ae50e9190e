"""The device's own log of the guest pages it writes, as the features DMA_LOGGING_* of Linux have it.

Logged are pages of 4096 bytes, whatever size was asked for; a report is in the page size that it asks for. The checks
are the kernel's (``drivers/vfio/vfio_main.c``), and vfio-user's where they differ: no ranges at all means everything.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from vfiostream._accel import bitmap_runs
from vfiostream.uapi.four_region import PAGE_SIZE
from vfiostream.uapi.vfio import (
    DMA_LOGGING_RANGE,
    FEATURE_DMA_LOGGING,
    FEATURE_DMA_LOGGING_REPORT,
    MAX_DMA_LOGGING_RANGES,
    Feature,
    FeatureOperation,
)
from vfiostream.vendor.hardware import Hardware
from vfiostream.vendor.settings import Operation

FEATURES = {
    Feature.DMA_LOGGING_START: FeatureOperation.SET,
    Feature.DMA_LOGGING_STOP: FeatureOperation.SET,
    Feature.DMA_LOGGING_REPORT: FeatureOperation.GET,
}
MAX_REPORT = 1 << 40
"""Bytes of guest memory in one report: bounds the bitmap (32 MiB)."""
_WORD = 64


class DmaLog:
    """The log, not running at first."""

    def __init__(self, hardware: Hardware, strike: Callable[[Operation], None]) -> None:
        """``strike`` lets operations fail, :meth:`.driver.Driver.strike`."""
        self._hardware = hardware
        self._strike = strike
        self._ranges: tuple[range, ...] | None = None
        """Addresses that are logged; None while no log runs."""

    def start(self, data: bytes) -> bytes:
        """DMA_LOGGING_START; returns ``data`` with the page size that is logged. Raises OSError: EINVAL for what makes
        no sense, E2BIG for too many ranges, EBUSY while a log runs.
        """
        self._strike(Operation.START_LOG)
        if len(data) < FEATURE_DMA_LOGGING.size:
            raise OSError(errno.EINVAL, f"DMA_LOGGING_START has {len(data)} bytes")
        page_size, count, reserved = FEATURE_DMA_LOGGING.unpack_from(data)
        if count > MAX_DMA_LOGGING_RANGES:
            raise OSError(errno.E2BIG, f"{count} ranges to log, {MAX_DMA_LOGGING_RANGES} at most")
        if reserved or not _is_page_size(page_size):
            raise OSError(errno.EINVAL, f"a log in pages of {page_size} bytes can't be had")
        table = data[FEATURE_DMA_LOGGING.size :]
        if len(table) != count * DMA_LOGGING_RANGE.size:
            raise OSError(errno.EINVAL, f"{count} ranges to log are announced, {len(table)} bytes of them are here")
        ranges = sorted((range(iova, iova + length) for iova, length in DMA_LOGGING_RANGE.iter_unpack(table)),
                        key=lambda one: one.start)  # fmt: skip
        end = 0
        for one in ranges:
            if one.start % page_size or one.stop % page_size or one.start == one.stop or one.stop > 1 << 64:
                raise OSError(errno.EINVAL, f"the range {one.start:#x} to {one.stop:#x} is not of whole pages")
            if one.start < end:
                raise OSError(errno.EINVAL, f"the range from {one.start:#x} on overlaps another")
            end = one.stop
        if self._ranges is not None:
            raise OSError(errno.EBUSY, "a log runs already")
        with self._hardware.lock:
            self._ranges = tuple(ranges) or (range(1 << 64),)
            self._hardware.guest.clear_dirty()
            self._hardware.log_guest(True)
        return FEATURE_DMA_LOGGING.pack(PAGE_SIZE, count, 0) + table

    def stop(self) -> None:
        """DMA_LOGGING_STOP; nothing where no log runs."""
        self._strike(Operation.STOP_LOG)
        self.forget()

    def forget(self) -> None:
        """As :meth:`stop`, for a reset, or because the client has gone."""
        with self._hardware.lock:
            self._ranges = None
            self._hardware.log_guest(False)

    def report(self, data: bytes) -> bytes:
        """DMA_LOGGING_REPORT; returns ``data`` with the bitmap behind it, which is cleared. Raises OSError, EINVAL."""
        self._strike(Operation.REPORT)
        if len(data) != FEATURE_DMA_LOGGING_REPORT.size:
            raise OSError(errno.EINVAL, f"DMA_LOGGING_REPORT has {len(data)} bytes")
        iova, length, page_size = FEATURE_DMA_LOGGING_REPORT.unpack(data)
        if self._ranges is None:
            raise OSError(errno.EINVAL, "no log runs")
        if not _is_page_size(page_size) or (iova | length) % page_size or not 0 < length <= MAX_REPORT:
            raise OSError(errno.EINVAL, f"a report of {length} bytes at {iova:#x} in pages of {page_size} bytes")
        if iova + length > 1 << 64:
            raise OSError(errno.EOVERFLOW, f"a report of {length} bytes at {iova:#x} leaves the addresses")
        count = length // page_size
        bitmap = bytearray(-(-count // _WORD) * 8)
        for one in self._ranges:
            first, last = max(iova, one.start), min(iova + length, one.stop)
            if first < last:
                self._take(bitmap, iova, first, (last - first) // PAGE_SIZE, page_size)
        return data + bitmap

    def _take(self, bitmap: bytearray, iova: int, first: int, pages: int, page_size: int) -> None:
        """Set the bits of the ``pages`` small pages from ``first`` on that were written."""
        with self._hardware.lock:
            dirty = self._hardware.guest.take_mapped_dirty(first, pages)
        runs = bitmap_runs(dirty, pages)
        for start, count in zip(runs[::2], runs[1::2], strict=True):
            at = first - iova + start * PAGE_SIZE
            for bit in range(at // page_size, (at + count * PAGE_SIZE - 1) // page_size + 1):
                bitmap[bit >> 3] |= 1 << (bit & 7)


def _is_page_size(size: int) -> bool:
    return size >= PAGE_SIZE and size & (size - 1) == 0
