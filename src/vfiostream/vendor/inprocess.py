"""The reference device without a process or a socket in between: an access for tests and benchmarks.

Calls reach the device in line, so a call whose device takes its time blocks the event loop for as long.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Sequence
from typing import TypeVar

import anyio.lowlevel

from vfiostream._accel import bitmap_merge
from vfiostream.access.contract import Access, DeviceInfo, MappedArea, MigrationData, PrecopyInfo, RegionInfo
from vfiostream.buffers import Buffer
from vfiostream.errors import DeviceLost, DeviceRefused, DeviceTimeout
from vfiostream.uapi.vfio import (
    DMA_LOGGING_RANGE,
    FEATURE_DMA_LOGGING,
    FEATURE_DMA_LOGGING_REPORT,
    Feature,
    FeatureOperation,
)
from vfiostream.vendor.device import NUM_IRQS, ReferenceDevice
from vfiostream.vendor.driver import Driver
from vfiostream.vendor.faults import Exit, Hang

_T = TypeVar("_T")


class InProcessAccess(Access):
    """An access straight onto ``device``, which lives on when the access is closed.

    A fault that hangs is a :class:`~vfiostream.errors.DeviceTimeout` at once; one that exits makes this and every later
    call a :class:`~vfiostream.errors.DeviceLost`.
    """

    def __init__(self, device: ReferenceDevice, name: str = "in-process:reference") -> None:
        self.name = name
        self.info = DeviceInfo(is_pci=True, can_reset=True, num_regions=len(device.regions), num_irqs=NUM_IRQS)
        self._device = device
        self._lost: str | None = None
        self._logging = False
        self._mapped: dict[int, list[MappedArea]] = {}

    async def _check(self) -> None:
        # Nothing is waited for here: a turn of the loop for each register would take longer than copying 64 KiB.
        await anyio.lowlevel.checkpoint_if_cancelled()
        if self._lost is not None:
            raise DeviceLost(f"{self.name}: the device is gone ({self._lost}); open it again")

    async def call(self, operation: str, call: Callable[[], _T]) -> _T:
        """Do ``call``; what it raises becomes an error of an access."""
        await self._check()
        try:
            return call()
        except OSError as error:
            raise DeviceRefused(self.name, operation, error.errno or 0, error.strerror or "") from error
        except Hang as error:
            raise DeviceTimeout(f"{self.name}: no answer to {operation}; open the device again") from error
        except Exit as error:
            self._lost = "its process ended"
            raise DeviceLost(f"{self.name}: the device went away during {operation}; open it again") from error

    async def region_info(self, index: int) -> RegionInfo:
        await self._check()
        region = self._device.regions[index]
        type_, subtype = region.type or (None, None)
        return RegionInfo(index, region.size, region.readable, region.writable, type_, subtype, region.mappable)

    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        def read() -> None:
            if into:
                self._device.read(index, offset, into)

        await self.call(f"a read of {len(into)} bytes at {offset} of region {index}", read)

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        def write() -> None:
            if data:
                self._device.write(index, offset, data)

        await self.call(f"a write of {len(data)} bytes at {offset} of region {index}", write)

    async def map(self, info: RegionInfo) -> Sequence[MappedArea]:
        await self._check()
        if info.index not in self._mapped:
            view = self._device.regions[info.index].view
            areas = [] if view is None else [MappedArea(at, view[at : at + size]) for at, size in info.mappable]
            self._mapped[info.index] = areas
        return self._mapped[info.index]

    async def dma_map(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
        def dma_map() -> None:
            self._device.dma_map(iova, length, fd, offset, writable=writable)

        await self.call(f"a DMA mapping of {length} bytes at {iova:#x}", dma_map)

    async def dma_unmap(self, iova: int, length: int) -> None:
        def dma_unmap() -> None:
            self._device.dma_unmap(iova, length)

        await self.call(f"taking back a DMA mapping of {length} bytes at {iova:#x}", dma_unmap)

    async def reset(self) -> None:
        await self.call("a reset", self._device.reset)

    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        def do() -> bytes:
            answer = self._device.driver.feature(operation | feature, data)
            if operation != FeatureOperation.GET:
                return b""
            if len(answer) > size:
                raise OSError(errno.EINVAL, f"the answer has {len(answer)} bytes")
            return answer

        return await self.call(f"feature {feature} ({operation.name})", do)

    async def set_migration_state(self, state: int) -> MigrationData | None:
        def set_state() -> bool:
            return self._device.driver.set_migration_state(state)

        opened = await self.call(f"the change to migration state {state}", set_state)
        return _Data(self, self._device.driver) if opened else None

    async def can_log_dma(self) -> bool:
        try:
            await self.feature(FeatureOperation.PROBE | FeatureOperation.SET, Feature.DMA_LOGGING_START)
        except DeviceRefused:
            return False
        return True

    async def start_dma_log(self, page_size: int, ranges: Sequence[tuple[int, int]], *, anew: bool = True) -> None:
        if anew:
            with contextlib.suppress(DeviceRefused):  # there is none, or starting says what is wrong
                await self._stop_dma_log()
        table = b"".join(DMA_LOGGING_RANGE.pack(*one) for one in ranges)
        data = FEATURE_DMA_LOGGING.pack(page_size, len(ranges), 0) + table
        self._logging = True
        await self.feature(FeatureOperation.SET, Feature.DMA_LOGGING_START, data)

    async def read_dma_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        head = FEATURE_DMA_LOGGING_REPORT.pack(iova, length, page_size)
        answer = await self.feature(FeatureOperation.GET, Feature.DMA_LOGGING_REPORT, head, len(head) + len(bitmap))
        bitmap_merge(bitmap, memoryview(answer)[len(head) :])

    async def stop_dma_log(self) -> None:
        if self._logging:
            await self._stop_dma_log()

    async def _stop_dma_log(self) -> None:
        await self.feature(FeatureOperation.SET, Feature.DMA_LOGGING_STOP)
        self._logging = False

    async def aclose(self) -> None:
        self._lost = "the access was closed"
        for areas in self._mapped.values():
            for area in areas:
                with contextlib.suppress(BufferError):  # in use somewhere: it goes when they let go
                    area.view.release()
        self._mapped.clear()
        self._device.client_gone()


class _Data(MigrationData):
    """The stream of data of the state that the device is in."""

    def __init__(self, access: InProcessAccess, driver: Driver) -> None:
        self._access = access
        self._driver = driver
        self._closed = False

    async def read_into(self, into: Sequence[memoryview]) -> int:
        def read() -> int:
            """One call of the driver after the other, as the kernel's readv does it."""
            total = 0
            for view in into:
                try:
                    count = self._driver.read_data(view)
                except OSError:
                    if not total:
                        raise
                    break
                total += count
                if count < len(view):
                    break
            return total

        return await self._do(f"a read of {sum(map(len, into))} bytes of data", read)

    async def write(self, data: Buffer) -> None:
        await self._do(f"a write of {len(data)} bytes of data", lambda: self._driver.write_data(data))

    async def precopy_info(self) -> PrecopyInfo:
        return PrecopyInfo(*await self._do("asking what is to come", self._driver.precopy_info))

    async def aclose(self) -> None:
        self._closed = True

    async def _do(self, operation: str, call: Callable[[], _T]) -> _T:
        if self._closed:
            raise DeviceLost(f"{self._access.name}: this migration's data was closed; set the state again for more")
        return await self._access.call(operation, call)
