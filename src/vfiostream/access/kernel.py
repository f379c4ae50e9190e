"""A device of the kernel's own VFIO: through its group and a container, or through its own node and an iommufd.

``include/uapi/linux/vfio.h`` is the interface; :mod:`vfiostream.access.kernel_open` has the addresses. Calls go to one
thread an access (:mod:`vfiostream.access.kernel_thread`); memory that is mapped needs none.

**Time limit.** A call that the kernel does not end in time raises :class:`~vfiostream.errors.DeviceTimeout`, and goes
on: nothing can take a thread out of the kernel. Until it has ended, the buffer it was given stays in use, every call of
the access waits for it (for as long, and raises the same), and what the access holds stays open and mapped, also after
``aclose``. A call that is cancelled waits for its end in the same way, and as long.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from vfiostream.access.contract import Access, DeviceInfo, MappedArea, MigrationData, PrecopyInfo, RegionInfo
from vfiostream.access.kernel_calls import Kernel, address_of
from vfiostream.access.kernel_iommu import Iommu
from vfiostream.access.kernel_open import Opened, find, open_place
from vfiostream.access.kernel_thread import KernelThread
from vfiostream.access.mapping import CannotMap, Mapping
from vfiostream.access.region_info import MAX_REGIONS, BadRegionInfo, parse_region_info
from vfiostream.buffers import Buffer
from vfiostream.errors import DeviceBroken, DeviceLost, DeviceRefused, UsageError
from vfiostream.uapi.four_region import MAX_VERSION
from vfiostream.uapi.vfio import (
    DEVICE_FLAGS_PCI,
    DEVICE_FLAGS_RESET,
    DEVICE_INFO,
    DMA_LOGGING_RANGE,
    FEATURE,
    FEATURE_DMA_LOGGING,
    FEATURE_DMA_LOGGING_REPORT,
    FEATURE_MIG_STATE,
    MAX_REGION_INFO,
    PRECOPY_INFO,
    PRECOPY_INFO_REINIT,
    REGION_INFO,
    BadCapabilityChain,
    Feature,
    FeatureOperation,
    MigrationState,
)
from vfiostream.uapi.vfio_kernel import Ioctl

logger = logging.getLogger("vfiostream.access")

PIECE = 4 << 20
"""Bytes that one call moves at most, of a region or into a migration's data: what a cancellation waits for. A read of
such data goes by what the caller has room for.
"""
_ADDRESSES = 1 << 64
_OFFSETS = 1 << 63
"""A file's offsets end there."""
_POINTER_SIZE = 8

T = TypeVar("T")


async def connect(address: str, *, timeout: float = 60.0, kernel: Kernel | None = None) -> KernelAccess:
    """Open the device of the address ``vfio:ADDRESS``.

    ``timeout`` is how many seconds the kernel may take for one call. Raises
    :class:`~vfiostream.errors.UsageError` where the host is not set up for it (it says what to do) or the address is
    none, :class:`~vfiostream.errors.DeviceRefused` where the kernel refuses, as for a device that somebody else has
    open, and the other errors of an access. ``kernel`` is for tests.
    """
    name = f"vfio:{address}"
    files = _Files(kernel or Kernel(), name)
    thread = KernelThread(name, files.close, timeout)
    try:
        info = await thread.call("opening the device", partial(files.open, address))
    except BaseException:
        await thread.aclose()
        raise
    return KernelAccess(files, thread, info)


class KernelAccess(Access):
    """An open device of the kernel's; made by :func:`connect`."""

    def __init__(self, files: _Files, thread: KernelThread, info: DeviceInfo) -> None:
        self.name = thread.name
        self.info = info
        self._files = files
        self._thread = thread
        self._regions: dict[int, RegionInfo] = {}
        self._areas: dict[int, tuple[MappedArea, ...]] = {}
        self._logs_itself: bool | None = None
        """Whether the device has a log of its own; None until somebody asks."""

    async def region_info(self, index: int) -> RegionInfo:
        if not 0 <= index < self.info.num_regions:
            raise UsageError(f"{self.name} has no region {index}; its regions are 0 to {self.info.num_regions - 1}")
        if index not in self._regions:
            work = partial(self._files.region_info, index)
            self._regions[index] = await self._call(f"the query for region {index}", work)
        return self._regions[index]

    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        await self._check_within(index, offset, len(into), "reading")
        for start in range(0, len(into), PIECE):
            piece = into[start : start + PIECE]
            work = partial(self._files.read, index, offset + start, piece)
            await self._call(f"reading {len(piece)} bytes of region {index} at {offset + start:#x}", work)

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        await self._check_within(index, offset, len(data), "writing")
        whole = memoryview(data)
        for start in range(0, len(whole), PIECE):
            piece = whole[start : start + PIECE]
            work = partial(self._files.write, index, offset + start, piece)
            await self._call(f"writing {len(piece)} bytes to region {index} at {offset + start:#x}", work)

    async def map(self, info: RegionInfo) -> Sequence[MappedArea]:
        if info.index not in self._areas:
            work = partial(self._files.map, info)
            self._areas[info.index] = await self._call(f"mapping region {info.index}", work)
        return self._areas[info.index]

    async def dma_map(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
        operation = f"mapping {length:#x} bytes of guest memory at {iova:#x}"
        if iova < 0 or length <= 0 or iova + length > _ADDRESSES or not 0 <= offset < _OFFSETS or fd < 0:
            raise UsageError(f"{length:#x} bytes at {iova:#x} can't be mapped for DMA from {offset:#x} of {fd}")
        work = partial(self._files.iommu.map, iova, length, fd, offset, writable=writable)
        hint = (
            "if the limit of locked memory (ulimit -l) is below the guest's size, raise it (LimitMEMLOCK= in systemd)"
        )
        try:
            await self._call(operation, work, {errno.ENOMEM: hint})
        except CannotMap as error:
            raise UsageError(f"{operation} can't be done from {offset:#x} of file descriptor {fd}: {error}") from error

    async def dma_unmap(self, iova: int, length: int) -> None:
        work = partial(self._files.iommu.unmap, iova, length)
        await self._call(f"unmapping {length:#x} bytes of guest memory at {iova:#x}", work)

    async def reset(self) -> None:
        await self._call("resetting the device", partial(self._files.ioctl, Ioctl.DEVICE_RESET))

    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        what = f"{_verb(operation)} feature {_feature_name(feature)}"
        return await self._call(what, partial(self._files.feature, operation, feature, data, size))

    async def set_migration_state(self, state: int) -> MigrationData | None:
        what = f"setting the migration state to {_state_name(state)}"
        fd = await self._call(what, partial(self._files.set_migration_state, state))
        return None if fd is None else KernelData(self, self._files, self._thread, fd)

    async def can_log_dma(self) -> bool:
        return await self._logs_own() or await self._call("asking the IOMMU for a log", self._files.can_log)

    async def start_dma_log(self, page_size: int, ranges: Sequence[tuple[int, int]], *, anew: bool = True) -> None:
        if await self._logs_own():
            work = partial(self._files.start_own_log, page_size, tuple(ranges), anew)
            await self._call("starting the device's log of its DMA", work)
        else:
            work = partial(self._files.iommu.start_log, page_size)
            await self._call("starting the IOMMU's log of DMA", work)

    async def read_dma_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        read = self._files.read_own_log if await self._logs_own() else self._files.iommu.read_log
        work = partial(read, iova, length, page_size, bitmap)
        await self._call(f"reading the log of DMA to {length:#x} bytes at {iova:#x}", work)

    async def stop_dma_log(self) -> None:
        stop = self._files.stop_own_log if await self._logs_own() else self._files.stop_iommu_log
        await self._call("stopping the log of DMA", stop)

    async def version(self) -> str | None:
        return await self._call("reading the driver's version", self._files.version)

    async def accepts_version(self, version: str) -> bool:
        return await self._call("asking the driver about a version", partial(self._files.accepts_version, version))

    async def aclose(self) -> None:
        self._areas.clear()
        await self._thread.aclose()

    async def _logs_own(self) -> bool:
        if self._logs_itself is None:
            work = self._files.logs_itself
            self._logs_itself = await self._call("asking the device for a log of its DMA", work)
        return self._logs_itself

    async def _check_within(self, index: int, offset: int, length: int, doing: str) -> None:
        """Drivers do the part of a transfer that is within a region, or what lies behind it."""
        info = await self.region_info(index)
        if offset < 0 or offset + length > info.size:
            raise DeviceRefused(self.name, f"{doing} {length} bytes of region {index} at {offset:#x}", errno.EINVAL)

    async def _call(self, operation: str, work: Callable[[], T], hints: dict[int, str] | None = None) -> T:
        logger.debug("%s: %s", self.name, operation)
        try:
            return await self._thread.call(operation, work)
        except CannotMap:
            raise
        except OSError as error:
            raise _refused(self.name, operation, error, hints) from error
        except (BadRegionInfo, BadCapabilityChain) as error:
            raise DeviceBroken(
                f"{self.name}: the driver {error}, which makes no sense; see the kernel's log"
            ) from error


class KernelData(MigrationData):
    """The descriptor of a migration's data. Refuses with what the driver says: ENODEV after the state was left."""

    def __init__(self, access: KernelAccess, files: _Files, thread: KernelThread, fd: int) -> None:
        self._name = access.name
        self._files = files
        self._thread = thread
        self._fd = fd

    async def read_into(self, into: Sequence[memoryview]) -> int:
        return await self._call("reading migration data", partial(self._files.read_data, self._fd, into))

    async def write(self, data: Buffer) -> None:
        whole = memoryview(data)
        for start in range(0, len(whole), PIECE):
            work = partial(self._files.write_data, self._fd, whole[start : start + PIECE])
            await self._call("writing migration data", work)

    async def precopy_info(self) -> PrecopyInfo:
        work = partial(self._files.precopy_info, self._fd)
        return await self._call("asking how much migration data there is", work)

    async def aclose(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            await self._thread.call_to_the_end(partial(self._files.close_data, fd))

    async def _call(self, operation: str, work: Callable[[], T]) -> T:
        if self._fd < 0:
            raise DeviceLost(f"{self._name}: its migration data was closed; set the migration state again")
        try:
            return await self._thread.call(operation, work)
        except OSError as error:
            raise DeviceRefused(self._name, operation, error.errno or errno.EIO) from error


class _Files:
    """What an access holds; every method blocks, runs in its thread and raises ``OSError``, or what it says."""

    iommu: Iommu

    def __init__(self, kernel: Kernel, name: str) -> None:
        self._kernel = kernel
        self._name = name
        self._opened: Opened | None = None
        self._offsets: dict[int, int] = {}
        """Where regions are in the device's file."""
        self._mappings: list[Mapping] = []
        self._data: set[int] = set()
        """Descriptors of migration data; nobody else knows of those that a cancelled call brought."""
        self._logging = False
        """Whether the device's own log runs. Nobody can have left it running: it ends with the file of the device."""

    def open(self, address: str) -> DeviceInfo:
        """Raises what :mod:`vfiostream.access.kernel_open` does."""
        self._opened = open_place(self._kernel, self._name, find(self._kernel, address))
        self.iommu = self._opened.iommu
        answer = bytearray(DEVICE_INFO.pack(DEVICE_INFO.size, 0, 0, 0))
        try:
            self.ioctl(Ioctl.DEVICE_GET_INFO, answer)
        except OSError as error:
            raise _refused(self._name, "the query for device info", error) from error
        _argsz, flags, num_regions, num_irqs = DEVICE_INFO.unpack(answer)
        if num_regions > MAX_REGIONS:
            raise DeviceBroken(
                f"{self._name}: the driver says that the device has {num_regions} regions (the limit is {MAX_REGIONS})"
            )
        return DeviceInfo(
            is_pci=bool(flags & DEVICE_FLAGS_PCI),
            can_reset=bool(flags & DEVICE_FLAGS_RESET),
            num_regions=num_regions,
            num_irqs=num_irqs,
            driver=self._opened.driver,
            kernel=self._kernel.release(),
        )

    def close(self) -> None:
        """The thread's last work."""
        while self._mappings:  # one of which somebody holds a slice goes with that, and not with the access
            self._mappings.pop().close()
        for fd in list(self._data):
            self.close_data(fd)
        if self._opened is not None:
            self._opened.close()

    def ioctl(self, request: int, argument: bytearray | int = 0) -> int:
        return self._kernel.ioctl(self._fd, request, argument)

    # ---- regions

    def region_info(self, index: int) -> RegionInfo:
        """Raises BadRegionInfo too."""
        needed = REGION_INFO.size
        answer = bytearray()
        while len(answer) < needed:  # with room for what it needs for its capabilities, after the first time
            if needed > MAX_REGION_INFO:
                raise BadRegionInfo(f"describes region {index} in {needed} bytes (the limit is {MAX_REGION_INFO})")
            answer = bytearray(needed)
            REGION_INFO.pack_into(answer, 0, needed, 0, index, 0, 0, 0)
            try:
                self.ioctl(Ioctl.DEVICE_GET_REGION_INFO, answer)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return RegionInfo(index, 0, readable=False, writable=False)  # as vfio-pci says of what it does not have
            needed = REGION_INFO.unpack_from(answer)[0]
        info, offset = parse_region_info(index, bytes(answer))
        if offset + info.size > _OFFSETS:
            raise BadRegionInfo(f"puts {info.size} bytes of region {index} at {offset:#x} of its file")
        self._offsets[index] = offset
        return info

    def read(self, index: int, offset: int, into: memoryview) -> None:
        start = self._offsets[index] + offset
        done = 0
        while done < len(into):
            size = self._kernel.pread(self._fd, into[done:], start + done)
            if size == 0:
                raise _os_error(errno.EIO)
            done += size

    def write(self, index: int, offset: int, data: memoryview) -> None:
        start = self._offsets[index] + offset
        done = 0
        while done < len(data):
            size = self._kernel.pwrite(self._fd, data[done:], start + done)
            if size == 0:
                raise _os_error(errno.EIO)
            done += size

    def map(self, info: RegionInfo) -> tuple[MappedArea, ...]:
        areas = []
        for start, length in info.mappable:
            try:
                mapping = Mapping(self._fd, self._offsets[info.index] + start, length, writable=info.writable)
            except CannotMap as error:
                logger.warning(
                    "%s: %#x+%#x of region %d can't be mapped (%s): it is read and written by calls, which is slower",
                    self._name, start, length, info.index, error,
                )  # fmt: skip
                continue
            self._mappings.append(mapping)
            areas.append(MappedArea(start, mapping.view))
        return tuple(areas)

    # ---- features

    def feature(self, operation: FeatureOperation, feature: int, data: bytes, size: int) -> bytes:
        request = self._feature(operation, feature, data, size)
        return bytes(request[FEATURE.size : FEATURE.size + size])

    def _feature(self, operation: FeatureOperation, feature: int, data: bytes, size: int = 0) -> bytearray:
        """The structure, as the driver left it."""
        length = FEATURE.size + max(len(data), size)
        request = bytearray(length)
        FEATURE.pack_into(request, 0, length, feature | operation)
        request[FEATURE.size : FEATURE.size + len(data)] = data
        self.ioctl(Ioctl.DEVICE_FEATURE, request)
        return request

    # ---- migration data

    def set_migration_state(self, state: int) -> int | None:
        """The descriptor that came, which is closed with the access if not before."""
        data = FEATURE_MIG_STATE.pack(state, -1)
        answer = self._feature(FeatureOperation.SET, Feature.MIG_DEVICE_STATE, data)
        fd: int = FEATURE_MIG_STATE.unpack_from(answer, FEATURE.size)[1]
        if fd < 0:
            return None
        self._data.add(fd)
        return fd

    def read_data(self, fd: int, into: Sequence[memoryview]) -> int:
        return self._kernel.read(fd, into)

    def write_data(self, fd: int, data: memoryview) -> None:
        while data:
            size = self._kernel.write(fd, data)
            if size == 0:
                raise _os_error(errno.EIO)
            data = data[size:]

    def precopy_info(self, fd: int) -> PrecopyInfo:
        answer = bytearray(PRECOPY_INFO.pack(PRECOPY_INFO.size, 0, 0, 0))
        self._kernel.ioctl(fd, Ioctl.MIG_GET_PRECOPY_INFO, answer)
        _argsz, flags, initial, dirty = PRECOPY_INFO.unpack(answer)
        return PrecopyInfo(bool(flags & PRECOPY_INFO_REINIT), initial, dirty)

    def close_data(self, fd: int) -> None:
        if fd in self._data:
            self._data.remove(fd)
            try:
                self._kernel.close(fd)
            except OSError:
                pass  # it is closed all the same

    # ---- the log of DMA

    def logs_itself(self) -> bool:
        try:
            self._feature(FeatureOperation.PROBE | FeatureOperation.SET, Feature.DMA_LOGGING_START, b"")
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return False
            raise
        return True

    def can_log(self) -> bool:
        """Whether the IOMMU has a log; raises BadCapabilityChain too."""
        return self.iommu.can_log()

    def start_own_log(self, page_size: int, ranges: Sequence[tuple[int, int]], anew: bool) -> None:
        if anew:
            self.stop_own_log()
        listed = bytearray().join(DMA_LOGGING_RANGE.pack(*one) for one in ranges)
        with memoryview(listed) as view:
            data = FEATURE_DMA_LOGGING.pack(page_size, len(ranges), 0) + _pointer(view)
            self._feature(FeatureOperation.SET, Feature.DMA_LOGGING_START, data)
        self._logging = True

    def read_own_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        data = FEATURE_DMA_LOGGING_REPORT.pack(iova, length, page_size) + _pointer(bitmap)
        self._feature(FeatureOperation.GET, Feature.DMA_LOGGING_REPORT, data)

    def stop_own_log(self) -> None:
        if self._logging:
            self._logging = False
            self._feature(FeatureOperation.SET, Feature.DMA_LOGGING_STOP, b"")

    def stop_iommu_log(self) -> None:
        if self.iommu.can_log():
            self.iommu.stop_log()

    # ---- the version of a mediated device

    def version(self) -> str | None:
        path = self._version_file
        if path is None:
            return None
        with open(self._kernel.path(path), "rb") as file:
            said = file.read(MAX_VERSION)
        return said.decode(errors="replace").strip() or None

    def accepts_version(self, version: str) -> bool:
        path = self._version_file
        if path is None:
            return True
        with open(self._kernel.path(path), "wb", buffering=0) as file:
            try:
                file.write(version.encode())
            except OSError:
                return False  # which is what its errno says, whatever it is
        return True

    @property
    def _version_file(self) -> str | None:
        return None if self._opened is None else self._opened.version_file

    @property
    def _fd(self) -> int:
        assert self._opened is not None
        return self._opened.fd


def _refused(name: str, operation: str, error: OSError, hints: dict[int, str] | None = None) -> Exception:
    number = error.errno or errno.EIO
    if number in (errno.ENODEV, errno.ENXIO):
        return DeviceLost(f"{name}: the device is gone ({operation}: {os.strerror(number)}); see the kernel's log")
    return DeviceRefused(name, operation, number, (hints or {}).get(number, ""))


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _pointer(view: memoryview) -> bytes:
    return (address_of(view) if len(view) else 0).to_bytes(_POINTER_SIZE, "little")


def _verb(operation: FeatureOperation) -> str:
    if FeatureOperation.PROBE in operation:
        return "probing"
    return "getting" if FeatureOperation.GET in operation else "setting"


def _feature_name(feature: int) -> str:
    try:
        return Feature(feature).name
    except ValueError:
        return str(feature)


def _state_name(state: int) -> str:
    try:
        return MigrationState(state).name
    except ValueError:
        return str(state)
