"""Guest memory for a device of the kernel's: mapped for its DMA through a container (type 1) or an iommufd, and the log
of what the IOMMU saw it write.

Blocking; raises ``OSError``, and :class:`~vfiostream.access.mapping.CannotMap` for memory that can't be mapped here.
Each access has its own: devices of one migration have the guest's memory mapped once each. Devices that share an IOMMU
group can't have that, see :mod:`vfiostream.access.kernel_open`.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass

from vfiostream.access.kernel_calls import Kernel, address_of
from vfiostream.access.mapping import CannotMap
from vfiostream.uapi import iommufd
from vfiostream.uapi.vfio import BadCapabilityChain
from vfiostream.uapi.vfio_kernel import (
    DIRTY_BITMAP,
    DIRTY_PAGES,
    DIRTY_PAGES_GET_BITMAP,
    DIRTY_PAGES_START,
    DIRTY_PAGES_STOP,
    DMA_FLAG_READ,
    DMA_FLAG_WRITE,
    DMA_MAP,
    DMA_UNMAP,
    IOMMU_INFO,
    MAX_IOMMU_INFO,
    ContainerIoctl,
    dirty_page_sizes,
)


@dataclass(slots=True)
class _Mapped:
    """Guest memory that the device reaches."""

    length: int
    address: int
    """Of our own mapping, which is nobody's but the kernel's."""
    dirty: int = 0
    """Its pages that were logged as written and that nobody has asked for, bit n for page n."""


class Iommu(ABC):
    """What stands between a device and guest memory; ``fd`` (a container or an iommufd) is the caller's."""

    def __init__(self, kernel: Kernel, fd: int) -> None:
        self._kernel = kernel
        self._fd = fd
        self._mapped: dict[int, _Mapped] = {}

    def map(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
        """Let the device reach ``length`` bytes of file ``fd`` at ``offset``."""
        try:
            address = self._kernel.map_memory(fd, offset, length, writable=writable)
        except OSError as error:
            raise CannotMap(error.strerror or str(error)) from error
        try:
            self._map(iova, length, address, writable=writable)
        except BaseException:
            self._kernel.unmap_memory(address, length)
            raise
        self._mapped[iova] = _Mapped(length, address)

    def unmap(self, iova: int, length: int) -> None:
        """Take back what :meth:`map` did, whole."""
        known = self._mapped.get(iova)
        if known is None or known.length != length:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._unmap(iova, length)
        del self._mapped[iova]
        self._kernel.unmap_memory(known.address, length)

    def read_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        """OR what was written since it was asked for last into ``bitmap``."""
        found = 0
        for start, known in self._mapped.items():
            low, high = max(start, iova), min(start + known.length, iova + length)
            if low < high:
                found |= self._take(start, known, low, high - low, page_size) << (low - iova) // page_size
        if found:
            # Its length is that of what was asked for, in whole words: everything found has its place.
            whole = int.from_bytes(bitmap, "little") | found
            bitmap.cast("B")[:] = whole.to_bytes(bitmap.nbytes, "little")

    def close(self) -> None:
        """Unmap our own mappings; after every descriptor is closed that lets a device reach them."""
        for known in self._mapped.values():
            self._kernel.unmap_memory(known.address, known.length)
        self._mapped.clear()

    @abstractmethod
    def can_log(self) -> bool:
        """Whether there is a log."""

    @abstractmethod
    def start_log(self, page_size: int) -> None:
        """Log, in pages of ``page_size``; begin anew where it logs already."""

    @abstractmethod
    def stop_log(self) -> None:
        """End the log; nothing where none runs."""

    @abstractmethod
    def _map(self, iova: int, length: int, address: int, *, writable: bool) -> None: ...

    @abstractmethod
    def _unmap(self, iova: int, length: int) -> None: ...

    @abstractmethod
    def _take(self, start: int, known: _Mapped, iova: int, length: int, page_size: int) -> int:
        """What was written to ``length`` bytes at ``iova`` within ``known``, bit n for page n; asking clears."""


class Type1(Iommu):
    """The container of ``/dev/vfio/vfio``. Its log is that of the container: for an mdev, what its driver pinned or
    wrote; for a device behind an IOMMU all that it can reach, as the kernel does not know better.
    """

    def can_log(self) -> bool:
        return self._log_page_sizes() != 0

    def start_log(self, page_size: int) -> None:
        sizes = self._log_page_sizes()
        if sizes == 0:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        if page_size != sizes & -sizes:  # it logs in no other
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.stop_log()
        self._dirty_pages(DIRTY_PAGES_START)

    def stop_log(self) -> None:
        self._dirty_pages(DIRTY_PAGES_STOP)
        for known in self._mapped.values():
            known.dirty = 0

    def _map(self, iova: int, length: int, address: int, *, writable: bool) -> None:
        flags = DMA_FLAG_READ | (DMA_FLAG_WRITE if writable else 0)
        request = bytearray(DMA_MAP.pack(DMA_MAP.size, flags, address, iova, length))
        self._kernel.ioctl(self._fd, ContainerIoctl.MAP_DMA, request)

    def _unmap(self, iova: int, length: int) -> None:
        self._kernel.ioctl(
            self._fd, ContainerIoctl.UNMAP_DMA, bytearray(DMA_UNMAP.pack(DMA_UNMAP.size, 0, iova, length))
        )

    def _take(self, start: int, known: _Mapped, iova: int, length: int, page_size: int) -> int:
        # The kernel tells, and forgets, of whole mappings only: what was not asked for is kept here.
        words = (known.length // page_size + 63) // 64
        told = bytearray(words * 8)
        with memoryview(told) as view:
            request = DIRTY_PAGES.pack(DIRTY_PAGES.size + DIRTY_BITMAP.size, DIRTY_PAGES_GET_BITMAP)
            request += DIRTY_BITMAP.pack(start, known.length, page_size, len(told), address_of(view))
            self._kernel.ioctl(self._fd, ContainerIoctl.DIRTY_PAGES, bytearray(request))
        dirty = known.dirty | int.from_bytes(told, "little")
        first = (iova - start) // page_size
        taken = dirty & ((1 << length // page_size) - 1) << first
        known.dirty = dirty & ~taken
        return taken >> first

    def _dirty_pages(self, flag: int) -> None:
        self._kernel.ioctl(self._fd, ContainerIoctl.DIRTY_PAGES, bytearray(DIRTY_PAGES.pack(DIRTY_PAGES.size, flag)))

    def _log_page_sizes(self) -> int:
        needed = IOMMU_INFO.size
        for _ in range(2):  # with what it needs for its capabilities, the second time
            answer = bytearray(needed)
            IOMMU_INFO.pack_into(answer, 0, needed, 0, 0, 0, 0)
            self._kernel.ioctl(self._fd, ContainerIoctl.GET_INFO, answer)
            needed = IOMMU_INFO.unpack_from(answer)[0]
            if needed <= len(answer):
                break
            if needed > MAX_IOMMU_INFO:
                raise BadCapabilityChain(f"describes the IOMMU in {needed} bytes (the limit is {MAX_IOMMU_INFO})")
        else:
            return 0  # it grew in between: there are more of the capabilities that change, and we believe none
        return dirty_page_sizes(bytes(answer))


class Iommufd(Iommu):
    """An address space (IOAS) of ``/dev/iommu``. ``page_table`` is that of the device's IOMMU where it logs; None where
    it does not, as for every mediated device.
    """

    def __init__(self, kernel: Kernel, fd: int, space: int, page_table: int | None) -> None:
        super().__init__(kernel, fd)
        self._space = space
        self._page_table = page_table

    def can_log(self) -> bool:
        return self._page_table is not None

    def start_log(self, page_size: int) -> None:
        if self._page_table is None:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        self.stop_log()
        self._set_tracking(self._page_table, iommufd.DIRTY_TRACKING_ENABLE)

    def stop_log(self) -> None:
        if self._page_table is not None:
            self._set_tracking(self._page_table, 0)

    def _map(self, iova: int, length: int, address: int, *, writable: bool) -> None:
        flags = iommufd.MAP_FIXED_IOVA | iommufd.MAP_READABLE | (iommufd.MAP_WRITEABLE if writable else 0)
        size = iommufd.IOAS_MAP.size
        request = bytearray(iommufd.IOAS_MAP.pack(size, flags, self._space, 0, address, length, iova))
        self._kernel.ioctl(self._fd, iommufd.Ioctl.IOAS_MAP, request)

    def _unmap(self, iova: int, length: int) -> None:
        request = bytearray(iommufd.IOAS_UNMAP.pack(iommufd.IOAS_UNMAP.size, self._space, iova, length))
        self._kernel.ioctl(self._fd, iommufd.Ioctl.IOAS_UNMAP, request)

    def _take(self, start: int, known: _Mapped, iova: int, length: int, page_size: int) -> int:
        if self._page_table is None:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        told = bytearray((length // page_size + 63) // 64 * 8)
        with memoryview(told) as view:
            request = iommufd.GET_DIRTY_BITMAP.pack(
                iommufd.GET_DIRTY_BITMAP.size, self._page_table, 0, 0, iova, length, page_size, address_of(view)
            )
            self._kernel.ioctl(self._fd, iommufd.Ioctl.HWPT_GET_DIRTY_BITMAP, bytearray(request))
        return int.from_bytes(told, "little")

    def _set_tracking(self, page_table: int, flags: int) -> None:
        request = iommufd.SET_DIRTY_TRACKING.pack(iommufd.SET_DIRTY_TRACKING.size, flags, page_table, 0)
        self._kernel.ioctl(self._fd, iommufd.Ioctl.HWPT_SET_DIRTY_TRACKING, bytearray(request))
