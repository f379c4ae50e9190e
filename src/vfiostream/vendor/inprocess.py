"""The reference device without a process or a socket in between: an access for tests and benchmarks.

Calls reach the device in line, so a call whose device takes its time blocks the event loop for as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import anyio.lowlevel

from vfiostream.access.contract import Access, DeviceInfo, MappedArea, RegionInfo
from vfiostream.buffers import Buffer
from vfiostream.errors import DeviceLost, DeviceRefused, DeviceTimeout
from vfiostream.vendor.device import NUM_IRQS, NUM_REGIONS, ReferenceDevice
from vfiostream.vendor.faults import Exit, Hang


class InProcessAccess(Access):
    """An access straight onto ``device``, which lives on when the access is closed.

    A fault that hangs is a :class:`~vfiostream.errors.DeviceTimeout` at once; one that exits makes this and every later
    call a :class:`~vfiostream.errors.DeviceLost`.
    """

    def __init__(self, device: ReferenceDevice, name: str = "in-process:reference") -> None:
        self.name = name
        self.info = DeviceInfo(is_pci=True, can_reset=True, num_regions=NUM_REGIONS, num_irqs=NUM_IRQS)
        self._device = device
        self._lost: str | None = None
        self._mapped: dict[int, list[MappedArea]] = {}

    async def _check(self) -> None:
        # Nothing is waited for here: a turn of the loop for each register would take longer than copying 64 KiB.
        await anyio.lowlevel.checkpoint_if_cancelled()
        if self._lost is not None:
            raise DeviceLost(f"{self.name}: the device is gone ({self._lost}); open it again")

    async def _call(self, operation: str, call: Callable[[], None]) -> None:
        await self._check()
        try:
            call()
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

        await self._call(f"a read of {len(into)} bytes at {offset} of region {index}", read)

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        def write() -> None:
            if data:
                self._device.write(index, offset, data)

        await self._call(f"a write of {len(data)} bytes at {offset} of region {index}", write)

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

        await self._call(f"a DMA mapping of {length} bytes at {iova:#x}", dma_map)

    async def dma_unmap(self, iova: int, length: int) -> None:
        def dma_unmap() -> None:
            self._device.dma_unmap(iova, length)

        await self._call(f"taking back a DMA mapping of {length} bytes at {iova:#x}", dma_unmap)

    async def reset(self) -> None:
        await self._call("a reset", self._device.reset)

    async def aclose(self) -> None:
        self._lost = "the access was closed"
        for areas in self._mapped.values():
            for area in areas:
                with contextlib.suppress(BufferError):  # in use somewhere: it goes when they let go
                    area.view.release()
        self._mapped.clear()
        self._device.client_gone()
