"""The kernel's VFIO by hand: ioctls and nothing else, so that a test of the driver tests only the driver.

A device is reached through a group in a container with the type1 IOMMU (:class:`Type1`), or through its own character
device bound to an iommufd (:class:`Iommufd`). Both hold several devices that then share their DMA mappings.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from tests.kernel.mdev import Mdev
from vfiostream.uapi.vfio import (
    REGION_FLAG_CAPS,
    REGION_FLAG_MMAP,
    REGION_INFO,
    parse_capabilities,
)

SET_IOMMU = 0x3B66
GROUP_GET_STATUS = 0x3B67
GROUP_SET_CONTAINER = 0x3B68
GROUP_GET_DEVICE_FD = 0x3B6A
DEVICE_GET_INFO = 0x3B6B
DEVICE_GET_REGION_INFO = 0x3B6C
DEVICE_GET_IRQ_INFO = 0x3B6D
DEVICE_SET_IRQS = 0x3B6E
DEVICE_RESET = 0x3B6F
IOMMU_MAP_DMA = 0x3B71
IOMMU_UNMAP_DMA = 0x3B72
DEVICE_FEATURE = 0x3B75
DEVICE_BIND_IOMMUFD = 0x3B76
DEVICE_ATTACH_IOMMUFD_PT = 0x3B77
IOAS_ALLOC = 0x3B81
IOAS_MAP = 0x3B85
IOAS_UNMAP = 0x3B86

TYPE1V2_IOMMU = 3
GROUP_VIABLE = 1
FEATURE_GET = 1 << 16
FEATURE_SET = 1 << 17


def call(fd: int, request: int, layout: str, *values: int) -> tuple[Any, ...]:
    """Make an ioctl with a structure that starts with its own size; returns what the kernel left in it."""
    packed = struct.Struct(layout)
    data = bytearray(packed.pack(packed.size, *values))
    fcntl.ioctl(fd, request, data)
    return packed.unpack(data)


@dataclass(frozen=True, slots=True)
class Info:
    """A region's info with its capabilities."""

    index: int
    flags: int
    size: int
    offset: int
    """Where the region is in the device's file."""
    type: tuple[int, int] | None
    sparse: tuple[tuple[int, int], ...] | None

    @property
    def areas(self) -> tuple[tuple[int, int], ...]:
        """(offset, length) of what can be mapped."""
        if not self.flags & REGION_FLAG_MMAP:
            return ()
        return ((0, self.size),) if self.sparse is None else self.sparse


class RawDevice:
    """An open device; its file descriptor is ``fd``."""

    def __init__(self, fd: int, *more: int) -> None:
        self.fd = fd
        self._more = more
        self._maps: list[mmap.mmap] = []
        _, self.flags, self.num_regions, self.num_irqs = call(fd, DEVICE_GET_INFO, "<IIII", 0, 0, 0)

    def info(self, index: int) -> Info:
        first = call(self.fd, DEVICE_GET_REGION_INFO, REGION_INFO.format, 0, index, 0, 0, 0)
        data = bytearray(REGION_INFO.pack(first[0], 0, index, 0, 0, 0)).ljust(first[0], b"\0")
        fcntl.ioctl(self.fd, DEVICE_GET_REGION_INFO, data)
        _, flags, _, cap_offset, size, offset = REGION_INFO.unpack_from(data)
        assert bool(flags & REGION_FLAG_CAPS) == bool(cap_offset)
        type_, sparse = parse_capabilities(bytes(data), cap_offset)
        return Info(index, flags, size, offset, type_, sparse)

    def map(self, info: Info, offset: int, length: int, *, shared: bool = True) -> mmap.mmap:
        mapped = mmap.mmap(
            self.fd, length, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE, offset=info.offset + offset
        )
        self._maps.append(mapped)
        return mapped

    def read(self, info: Info, offset: int, count: int) -> bytes:
        return os.pread(self.fd, count, info.offset + offset)

    def write(self, info: Info, offset: int, data: bytes | bytearray | memoryview) -> None:
        assert os.pwrite(self.fd, data, info.offset + offset) == len(data)

    def feature(self, index: int, flags: int, payload: bytes) -> bytes:
        header = struct.pack("<II", 8 + len(payload), index | flags)
        data = bytearray(header + payload)
        fcntl.ioctl(self.fd, DEVICE_FEATURE, data)
        return bytes(data[8:])

    def close(self) -> None:
        for mapped in self._maps:  # each holds a duplicate of the file descriptor
            mapped.close()
        self._maps.clear()
        for fd in (self.fd, *self._more):
            os.close(fd)


class Guest:
    """Memory lent to devices."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size, mmap.MAP_SHARED)
        self.size = size
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class Holder(ABC):
    """What devices are opened in, and what their DMA mappings belong to."""

    fd: int

    def __init__(self) -> None:
        self.devices: list[RawDevice] = []

    @abstractmethod
    def open(self, mdev: Mdev) -> RawDevice: ...

    @abstractmethod
    def dma_map(self, iova: int, guest: Guest, *, writable: bool = True) -> None: ...

    @abstractmethod
    def dma_unmap(self, iova: int, length: int) -> None: ...

    def close(self) -> None:
        for device in self.devices:
            device.close()
        self.devices.clear()
        if self.fd != -1:
            os.close(self.fd)
            self.fd = -1


class Type1(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.fd = os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)

    def open(self, mdev: Mdev) -> RawDevice:
        group = os.open(mdev.group, os.O_RDWR | os.O_CLOEXEC)
        assert call(group, GROUP_GET_STATUS, "<II", 0)[1] & GROUP_VIABLE
        fcntl.ioctl(group, GROUP_SET_CONTAINER, struct.pack("<i", self.fd))
        if not self.devices:
            fcntl.ioctl(self.fd, SET_IOMMU, TYPE1V2_IOMMU)
        name = bytearray(mdev.uuid.encode() + b"\0")
        device = RawDevice(fcntl.ioctl(group, GROUP_GET_DEVICE_FD, name), group)
        self.devices.append(device)
        return device

    def dma_map(self, iova: int, guest: Guest, *, writable: bool = True) -> None:
        call(self.fd, IOMMU_MAP_DMA, "<IIQQQ", 3 if writable else 1, guest.address, iova, guest.size)

    def dma_unmap(self, iova: int, length: int) -> None:
        call(self.fd, IOMMU_UNMAP_DMA, "<IIQQ", 0, iova, length)


class Iommufd(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.fd = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
        self.ioas: int = call(self.fd, IOAS_ALLOC, "<III", 0, 0)[2]

    def open(self, mdev: Mdev) -> RawDevice:
        fd = os.open(mdev.cdev, os.O_RDWR | os.O_CLOEXEC)
        call(fd, DEVICE_BIND_IOMMUFD, "<IIiI", 0, self.fd, 0)
        call(fd, DEVICE_ATTACH_IOMMUFD_PT, "<III", 0, self.ioas)
        device = RawDevice(fd)
        self.devices.append(device)
        return device

    def dma_map(self, iova: int, guest: Guest, *, writable: bool = True) -> None:
        flags = 1 | 4 | (2 if writable else 0)
        call(self.fd, IOAS_MAP, "<IIIIQQQ", flags, self.ioas, 0, guest.address, guest.size, iova)

    def dma_unmap(self, iova: int, length: int) -> None:
        call(self.fd, IOAS_UNMAP, "<IIQQ", self.ioas, iova, length)
