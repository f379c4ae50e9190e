"""Accesses that stand between a device and its access: they pass everything on, and tests change what they want to."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio
import anyio.lowlevel

from vfiostream.access.contract import Access, MappedArea, MigrationData, PrecopyInfo, RegionInfo
from vfiostream.buffers import Buffer
from vfiostream.errors import DeviceRefused, DeviceTimeout
from vfiostream.uapi.vfio import FeatureOperation

T = TypeVar("T")


class Between(Access):
    """Passes everything on."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.name = access.name
        self.info = access.info
        self.closed = False

    async def called(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        """Every call but the closing goes through here."""
        return await call()

    async def region_info(self, index: int) -> RegionInfo:
        return await self.called("region_info", lambda: self.access.region_info(index))

    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        await self.called("read_into", lambda: self.access.read_into(index, offset, into))

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        await self.called("write", lambda: self.access.write(index, offset, data))

    async def map(self, info: RegionInfo) -> Sequence[MappedArea]:
        return await self.called("map", lambda: self.access.map(info))

    async def dma_map(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
        await self.called("dma_map", lambda: self.access.dma_map(iova, length, fd, offset, writable=writable))

    async def dma_unmap(self, iova: int, length: int) -> None:
        await self.called("dma_unmap", lambda: self.access.dma_unmap(iova, length))

    async def reset(self) -> None:
        await self.called("reset", self.access.reset)

    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        return await self.called("feature", lambda: self.access.feature(operation, feature, data, size))

    async def set_migration_state(self, state: int) -> MigrationData | None:
        data = await self.called("set_migration_state", lambda: self.access.set_migration_state(state))
        return None if data is None else DataBetween(self, data)

    async def can_log_dma(self) -> bool:
        return await self.called("can_log_dma", self.access.can_log_dma)

    async def start_dma_log(self, page_size: int, ranges: Sequence[tuple[int, int]], *, anew: bool = True) -> None:
        await self.called("start_dma_log", lambda: self.access.start_dma_log(page_size, ranges, anew=anew))

    async def read_dma_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        await self.called("read_dma_log", lambda: self.access.read_dma_log(iova, length, page_size, bitmap))

    async def stop_dma_log(self) -> None:
        await self.called("stop_dma_log", self.access.stop_dma_log)

    async def version(self) -> str | None:
        return await self.called("version", self.access.version)

    async def accepts_version(self, version: str) -> bool:
        return await self.called("accepts_version", lambda: self.access.accepts_version(version))

    async def aclose(self) -> None:
        self.closed = True
        await self.access.aclose()


class DataBetween(MigrationData):
    """The data of a migration, through ``between``."""

    def __init__(self, between: Between, data: MigrationData) -> None:
        self.between = between
        self.data = data

    async def read_into(self, into: Sequence[memoryview]) -> int:
        return await self.between.called("data.read_into", lambda: self.data.read_into(into))

    async def write(self, data: Buffer) -> None:
        await self.between.called("data.write", lambda: self.data.write(data))

    async def precopy_info(self) -> PrecopyInfo:
        return await self.between.called("data.precopy_info", self.data.precopy_info)

    async def aclose(self) -> None:
        await self.data.aclose()


STRIKES = ("refused", "refused when done", "no answer", "no answer when done", "cancelled", "cancelled when done")


class Striking(Between):
    """Lets the ``n``-th call from now on go wrong, for each ``n`` in :attr:`plan`: refused, not answered or cancelled,
    either before the device got it or when it was done; or refused by a driver that has broken down.
    """

    def __init__(self, access: Access) -> None:
        super().__init__(access)
        self.plan: dict[int, str] = {}
        self.count = 0
        self.struck: list[str] = []
        """What went wrong so far."""
        self.break_down: Callable[[], None] = lambda: None
        """What breaks the driver."""
        self.scope: anyio.CancelScope
        """What a cancellation cancels."""

    def strike(self, plan: dict[int, str]) -> None:
        self.plan, self.count = dict(plan), 0

    async def called(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        self.count += 1
        how = self.plan.pop(self.count, None)
        if how is None:
            return await call()
        self.struck.append(f"{name} {how}")
        if how == "broken":
            self.break_down()
        if how.endswith("when done"):
            await call()
        if how.startswith("cancelled"):
            self.scope.cancel()
            await anyio.lowlevel.checkpoint()
            raise AssertionError("a device shields none of its calls")
        if how in ("refused", "refused when done", "broken"):
            raise DeviceRefused(self.name, name, errno.EIO)
        raise DeviceTimeout(f"{self.name}: no answer to {name}")
