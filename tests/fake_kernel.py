"""A kernel with VFIO for hosts without: what kernel access calls, answered from tables, over real file descriptors.

Its ``/dev`` and ``/sys`` are a folder of the test's. A device is a memfd with its regions one after the other, so it
can be read, written and mapped for real; its DMA goes to the addresses that were mapped for it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vfiostream.access.kernel_calls import Kernel
from vfiostream.uapi import iommufd
from vfiostream.uapi.vfio import (
    DEVICE_FLAGS_RESET,
    DEVICE_INFO,
    FEATURE,
    FEATURE_MIG_STATE,
    PRECOPY_INFO,
    REGION_FLAG_CAPS,
    REGION_FLAG_READ,
    REGION_FLAG_WRITE,
    REGION_INFO,
    Feature,
    FeatureOperation,
    pack_capabilities,
)
from vfiostream.uapi.vfio_kernel import (
    BIND_IOMMUFD,
    DIRTY_BITMAP,
    DIRTY_PAGES,
    DIRTY_PAGES_GET_BITMAP,
    DMA_MAP,
    DMA_UNMAP,
    GROUP_STATUS,
    IOMMU_INFO,
    IOMMU_INFO_CAPS,
    Extension,
)

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
BDF = "0000:3b:00.2"
GROUP = "12"
NODE = "/dev/vfio/devices/vfio0"
RW = REGION_FLAG_READ | REGION_FLAG_WRITE
REGION_SPACING = 1 << 20
LIMIT = 20.0
"""Seconds for anything that is waited for."""
PAGE = 4096


@dataclass
class FakeRegion:
    size: int
    flags: int = RW
    type: tuple[int, int] | None = None
    sparse: list[tuple[int, int]] | None = None


class Hold:
    """A call of the kernel's that does not end before the test says so."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.opened.wait(LIMIT)


@dataclass
class Mapped:
    length: int
    address: int
    writable: bool
    dirty: set[int] = field(default_factory=set)


class FakeKernel(Kernel):
    """``failures`` and ``holds`` are keyed by what is called: the path of a node to open, an ioctl of a kind of file
    (``("group", Ioctl.GROUP_GET_STATUS)``), or ``"pread"``, ``"pwrite"``, ``"read"``, ``"write"``.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.failures: dict[object, int] = {}
        self.holds: dict[object, Callable[[], None]] = {}
        self.regions: list[FakeRegion] = [FakeRegion(256)]
        self.calls: list[object] = []
        self.extensions = {Extension.TYPE1_IOMMU, Extension.TYPE1V2_IOMMU}
        self.api_version = 0
        self.viable = True
        self.logs_itself = False
        self.iommu_logs = True
        self.page_tables = False
        """Whether the IOMMU behind an iommufd logs."""
        self.memory: dict[int, Mapped] = {}
        self.logging = False
        self.log_ranges: list[tuple[int, int]] = []
        self.data: bytes | None = None
        """What the data of a migration holds when its state is set; None for no data."""
        self.data_end: int | None = None
        """The other end of the data, to read from what was written."""
        self.answer_region: Callable[[int, bytearray], None] = self._answer_region
        self.kinds: dict[int, str] = {}
        """What is open."""

    # ---- the host

    def add_mdev(self, *, node: bool = True) -> None:
        folder = f"/sys/devices/virtual/parent/{UUID}"
        self._add_device(folder, f"/sys/bus/mdev/devices/{UUID}", "vfio_mdev", node=node)
        self.make_folder(f"{folder}/mdev_type")

    def add_pci(self, driver: str | None = "vfio-pci", *, node: bool = True, group: bool = True) -> None:
        self._add_device(f"/sys/devices/pci/{BDF}", f"/sys/bus/pci/devices/{BDF}", driver, node=node, group=group)

    def make_folder(self, name: str) -> None:
        self.path(name).mkdir(parents=True, exist_ok=True)

    def make_file(self, name: str, text: str = "") -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text(text)

    def make_link(self, name: str, target: str) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).symlink_to(self.path(target))

    def _add_device(self, folder: str, listed: str, driver: str | None, *, node: bool, group: bool = True) -> None:
        self.make_folder(folder)
        self.make_link(listed, folder)
        if driver is not None:
            self.make_link(f"{folder}/driver", f"/sys/bus/any/drivers/{driver}")
        if group:
            self.make_link(f"{folder}/iommu_group", f"/sys/kernel/iommu_groups/{GROUP}")
            self.make_link(f"/sys/kernel/iommu_groups/{GROUP}/devices/{folder.rpartition('/')[2]}", folder)
        if driver is None or "vfio" not in driver:
            return
        self.make_file("/dev/vfio/vfio")
        self.make_file(f"/dev/vfio/{GROUP}")
        if node:
            self.make_file("/dev/iommu")
            self.make_file(NODE)
            self.make_folder(f"{folder}/vfio-dev/vfio0")
            self.make_link("/sys/class/vfio-dev/vfio0/device", folder)

    # ---- the device's DMA

    def dma_read(self, iova: int, length: int) -> bytes:
        return ctypes.string_at(self._reach(iova, length, write=False), length)

    def dma_write(self, iova: int, data: bytes) -> None:
        ctypes.memmove(self._reach(iova, len(data), write=True), data, len(data))

    def _reach(self, iova: int, length: int, *, write: bool) -> int:
        for start, known in self.memory.items():
            if start <= iova and iova + length <= start + known.length and (known.writable or not write):
                if write and self.logging:
                    known.dirty |= set(range((iova - start) // PAGE, (iova + length - 1 - start) // PAGE + 1))
                return known.address + iova - start
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

    # ---- what access calls

    def open(self, path: str) -> int:
        self._enter(path)
        if not self.exists(path):
            raise _error(errno.ENOENT)
        kinds = {"/dev/vfio/vfio": "container", "/dev/iommu": "iommufd"}
        kind = kinds.get(path, "device" if path.startswith("/dev/vfio/devices/") else "group")
        return self._new(kind)

    def close(self, fd: int) -> None:
        del self.kinds[fd]
        super().close(fd)

    def ioctl(self, fd: int, request: int, argument: bytearray | int = 0) -> int:
        kind = self.kinds[fd]
        self._enter((kind, request))
        handler: Callable[..., int | None] = getattr(self, f"_{kind}_{int(request):x}", self._nothing)
        return handler(argument) or 0

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        self._enter("pread")
        return super().pread(fd, into, offset)

    def pwrite(self, fd: int, data: object, offset: int) -> int:
        self._enter("pwrite")
        return super().pwrite(fd, data, offset)  # type: ignore[arg-type]

    def read(self, fd: int, into: Sequence[memoryview]) -> int:
        self._enter("read")
        return super().read(fd, into)

    def write(self, fd: int, data: object) -> int:
        self._enter("write")
        return super().write(fd, data)  # type: ignore[arg-type]

    def _enter(self, what: object) -> None:
        self.calls.append(what)
        if what in self.holds:
            self.holds[what]()
        if what in self.failures:
            raise _error(self.failures[what])

    def _new(self, kind: str) -> int:
        fd = os.memfd_create(f"fake-{kind}", os.MFD_CLOEXEC)
        if kind == "device":
            os.ftruncate(fd, len(self.regions) * REGION_SPACING)
        self.kinds[fd] = kind
        return fd

    def _nothing(self, argument: bytearray | int) -> int:
        return 0

    # ---- containers and groups

    def _container_3b64(self, _: int) -> int:
        return self.api_version

    def _container_3b65(self, extension: int) -> int:
        return extension in self.extensions

    def _container_3b70(self, answer: bytearray) -> None:
        size = IOMMU_INFO.size + 32
        flags = IOMMU_INFO_CAPS if self.iommu_logs else 0
        IOMMU_INFO.pack_into(answer, 0, size, flags, PAGE, IOMMU_INFO.size if len(answer) >= size else 0, 0)
        if len(answer) >= size:
            answer[IOMMU_INFO.size :] = b"\x02\0\x01\0" + bytes(12) + PAGE.to_bytes(8, "little") + bytes(8)

    def _container_3b71(self, request: bytearray) -> None:
        _, flags, address, iova, length = DMA_MAP.unpack(request)
        self.memory[iova] = Mapped(length, address, bool(flags & 2))

    def _container_3b72(self, request: bytearray) -> None:
        del self.memory[DMA_UNMAP.unpack(request)[2]]

    def _container_3b75(self, request: bytearray) -> None:
        _, flags = DIRTY_PAGES.unpack_from(request)
        if flags != DIRTY_PAGES_GET_BITMAP:
            self.logging = flags == 1
            for known in self.memory.values():
                known.dirty.clear()
            return
        iova, length, page_size, size, address = DIRTY_BITMAP.unpack_from(request, DIRTY_PAGES.size)
        mapped = self.memory.get(iova)
        if not self.logging or mapped is None or (length, page_size) != (mapped.length, PAGE):
            raise _error(errno.EINVAL)
        bits = sum(1 << page for page in mapped.dirty)
        mapped.dirty.clear()
        ctypes.memmove(address, bits.to_bytes(size, "little"), size)

    def _group_3b67(self, status: bytearray) -> None:
        GROUP_STATUS.pack_into(status, 0, 8, 1 if self.viable else 0)

    def _group_3b6a(self, _: bytearray) -> int:
        return self._new("device")

    # ---- iommufd

    def _device_3b76(self, bind: bytearray) -> None:
        BIND_IOMMUFD.pack_into(bind, 0, *BIND_IOMMUFD.unpack(bind)[:3], 5)

    def _device_3b77(self, attach: bytearray) -> None:
        assert int.from_bytes(attach[8:], "little") == (8 if self.page_tables else 7)

    def _iommufd_3b81(self, space: bytearray) -> None:
        iommufd.IOAS_ALLOC.pack_into(space, 0, 12, 0, 7)

    def _iommufd_3b85(self, request: bytearray) -> None:
        _, flags, space, _, address, length, iova = iommufd.IOAS_MAP.unpack(request)
        assert space == 7
        self.memory[iova] = Mapped(length, address, bool(flags & iommufd.MAP_WRITEABLE))

    def _iommufd_3b86(self, request: bytearray) -> None:
        del self.memory[iommufd.IOAS_UNMAP.unpack(request)[2]]

    def _iommufd_3b89(self, request: bytearray) -> None:
        if not self.page_tables:
            raise _error(errno.ENOENT)
        fields = list(iommufd.HWPT_ALLOC.unpack(request))
        assert fields[1:4] == [iommufd.HWPT_ALLOC_DIRTY_TRACKING, 5, 7]
        fields[4] = 8
        iommufd.HWPT_ALLOC.pack_into(request, 0, *fields)

    def _iommufd_3b8b(self, request: bytearray) -> None:
        self.logging = bool(iommufd.SET_DIRTY_TRACKING.unpack(request)[1])
        for known in self.memory.values():
            known.dirty.clear()

    def _iommufd_3b8c(self, request: bytearray) -> None:
        _, page_table, _, _, iova, length, page_size, address = iommufd.GET_DIRTY_BITMAP.unpack(request)
        if not self.logging or page_table != 8 or page_size != PAGE:
            raise _error(errno.EINVAL)
        for start, known in self.memory.items():
            if start <= iova and iova + length <= start + known.length:
                first = (iova - start) // PAGE
                taken = {page for page in known.dirty if first <= page < first + length // PAGE}
                known.dirty -= taken
                bits = sum(1 << page - first for page in taken)
                size = (length // PAGE + 7) // 8
                ctypes.memmove(address, bits.to_bytes(size, "little"), size)
                return
        raise _error(errno.EINVAL)

    # ---- the device

    def _device_3b6b(self, answer: bytearray) -> None:
        DEVICE_INFO.pack_into(answer, 0, 16, DEVICE_FLAGS_RESET, len(self.regions), 1)

    def _device_3b6c(self, answer: bytearray) -> None:
        self.answer_region(REGION_INFO.unpack_from(answer)[2], answer)

    def _answer_region(self, index: int, answer: bytearray) -> None:
        region = self.regions[index]
        chain = pack_capabilities(REGION_INFO.size, type_=region.type, sparse=region.sparse)
        flags = region.flags | (REGION_FLAG_CAPS if chain else 0)
        whole = REGION_INFO.size + len(chain)
        there = chain if len(answer) >= whole else b""
        offset = REGION_INFO.size if there else 0
        REGION_INFO.pack_into(answer, 0, whole, flags, index, offset, region.size, index * REGION_SPACING)
        answer[REGION_INFO.size : REGION_INFO.size + len(there)] = there

    def _device_3b75(self, request: bytearray) -> None:
        _, flags = FEATURE.unpack_from(request)
        feature, operation = flags & 0xFFFF, FeatureOperation(flags & ~0xFFFF)
        self.calls.append((feature, operation))
        if feature == Feature.MIG_DEVICE_STATE and FeatureOperation.SET in operation:
            self._set_state(request)
        elif feature == Feature.MIGRATION and operation == FeatureOperation.GET:
            request[FEATURE.size :] = (7).to_bytes(8, "little")
        elif feature in (Feature.DMA_LOGGING_START, Feature.DMA_LOGGING_STOP, Feature.DMA_LOGGING_REPORT):
            self._own_log(Feature(feature), operation, request)
        else:
            raise _error(errno.ENOTTY)

    def _set_state(self, request: bytearray) -> None:
        state, fd = FEATURE_MIG_STATE.unpack_from(request, FEATURE.size)
        assert fd == -1
        if self.data is None:
            return
        ours, theirs = os.pipe()
        os.write(theirs, self.data)
        resuming = state == 4
        self.data_end = ours if resuming else None
        data = theirs if resuming else ours
        if not resuming:
            os.close(theirs)
        self.kinds[data] = "data"
        FEATURE_MIG_STATE.pack_into(request, FEATURE.size, state, data)

    def _own_log(self, feature: Feature, operation: FeatureOperation, request: bytearray) -> None:
        if not self.logs_itself:
            raise _error(errno.ENOTTY)
        if FeatureOperation.PROBE in operation:
            return
        if feature is Feature.DMA_LOGGING_START:
            assert not self.logging
            count = int.from_bytes(request[16:20], "little")
            listed = ctypes.string_at(int.from_bytes(request[24:32], "little"), count * 16)
            numbers = [int.from_bytes(listed[n : n + 8], "little") for n in range(0, len(listed), 8)]
            self.log_ranges = list(zip(numbers[::2], numbers[1::2], strict=True))
        if feature is Feature.DMA_LOGGING_REPORT:
            address = int.from_bytes(request[32:40], "little")
            ctypes.c_uint8.from_address(address).value |= 0b100
        else:
            self.logging = feature is Feature.DMA_LOGGING_START

    def _data_3b79(self, answer: bytearray) -> None:
        PRECOPY_INFO.pack_into(answer, 0, PRECOPY_INFO.size, 1, 24, 99)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
