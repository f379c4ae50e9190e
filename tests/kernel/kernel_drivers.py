"""Devices of the kernel's as drivers of the device contract (``tests/device_contract.py``): the tests work on their
memory and registers past the access that has them open, by its file descriptor, and open them themselves otherwise.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import struct
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar, Literal, TypeAlias

from tests.between import Between, T
from tests.device_contract import PAGE, Opener, as_it_is
from tests.kernel import four_region_device, mtty_device
from tests.kernel.four_region_device import MEMORY_BAR, REGISTERS, FourRegion, Kick, Register
from tests.kernel.mdev import Mdev
from tests.kernel.raw_vfio import DEVICE_RESET, GROUP_GET_DEVICE_FD, RawDevice, Type1
from vfiostream.access import kernel as kernel_access
from vfiostream.access.contract import Access
from vfiostream.access.kernel_calls import Kernel
from vfiostream.devices.contract import Device
from vfiostream.devices.finding import find
from vfiostream.errors import DeviceRefused
from vfiostream.uapi.vfio import FEATURE_MIG_STATE, Feature, FeatureOperation, MigrationState
from vfiostream.vendor.settings import Interface

Way: TypeAlias = Literal["group", "node"]
TIMEOUT = 20.0
_numbers = itertools.count(1)
"""What makes content differ from all other."""


@dataclass(frozen=True, slots=True)
class About:
    interface: Interface
    memory: int


@dataclass(frozen=True, slots=True)
class Workload:
    write: Callable[[int], None]


class KernelDriver(ABC):
    """One device of the kernel's, which exists for longer than a test."""

    interface: ClassVar[Interface]
    memory = 0

    def __init__(self, mdev: Mdev) -> None:
        self.mdev = mdev
        self.guest: tuple[int, int] | None = None
        """Where guest memory is mapped that it may write to: address and bytes."""
        self.broken = False
        """Whether the access is to find it in its error state."""
        self.workload = Workload(self._work)
        self._open: RawDevice | None = None

    def address(self, way: Way) -> str:
        return f"vfio:{self.mdev.group.name}/{self.mdev.uuid}" if way == "group" else f"vfio:{self.mdev.cdev}"

    @property
    def settings(self) -> About:
        return About(self.interface, self.memory)

    @contextmanager
    def device(self) -> Iterator[RawDevice]:
        """The open device."""
        if self._open is not None:
            yield self._open
            return
        holder = Type1()
        try:
            self._open = holder.open(self.mdev)
            yield self._open
        finally:
            self._open = None
            holder.close()

    @contextmanager
    def held(self, fd: int) -> Iterator[None]:
        """An access has it open, as ``fd``."""
        self._open = RawDevice(fd)
        try:
            yield
        finally:
            self._open = None
            self.guest = None

    def write(self, index: int, offset: int, data: bytes) -> None:
        with self.device() as device:
            device.write(device.info(index), offset, data)

    def reset(self) -> None:
        """Its content is then what no other device has."""
        self.broken = False
        with self.device() as device:
            fcntl.ioctl(device.fd, DEVICE_RESET)
            self._make_different(next(_numbers))

    @property
    @abstractmethod
    def state(self) -> int: ...

    @abstractmethod
    def digest(self) -> bytes: ...

    @abstractmethod
    def _make_different(self, number: int) -> None: ...

    @abstractmethod
    def _work(self, count: int) -> None: ...


class FourRegionKernelDriver(KernelDriver):
    """Of our own driver: it works where its registers say."""

    interface = "four-region"

    def __init__(self, mdev: Mdev) -> None:
        super().__init__(mdev)
        with self.device() as device:
            self._board = FourRegion(device)
        self.memory = self._board.regions[MEMORY_BAR].size
        self._pages = random.Random(0)

    @contextmanager
    def board(self) -> Iterator[FourRegion]:
        with self.device() as device:
            self._board.device = device
            yield self._board

    @property
    def state(self) -> int:
        with self.board() as board:
            return board.register(Register.STATE)

    def digest(self) -> bytes:
        """Of its memory and registers; the state, which is one of them, is not moved."""
        with self.board() as board:
            info = board.regions[REGISTERS]
            registers = board.device.read(info, 0, info.size)
            memory = board.memory
        whole = blake2b(registers[: Register.STATE])
        whole.update(registers[Register.STATE + 8 :])
        whole.update(memory)
        return whole.digest()

    def _make_different(self, number: int) -> None:
        self.write(REGISTERS, four_region_device.SCRATCH, struct.pack("<Q", number))

    def _work(self, count: int) -> None:
        with self.board() as board:
            for _ in range(count):
                pattern = next(_numbers)
                if self.memory:
                    offset = PAGE * self._pages.randrange(self.memory // PAGE)
                    board.kick(Kick.DEVICE, length=PAGE, pattern=pattern, offset=offset)
                if self.guest is not None:
                    iova, length = self.guest
                    page = self._pages.randrange(length // PAGE)
                    with suppress(PermissionError):  # it may be lent to be read only
                        board.kick(Kick.GUEST, iova=iova + PAGE * page, length=PAGE, pattern=pattern)


class MttyDriver(KernelDriver):
    """Of the kernel's sample: what there is to be moved is a register of each port."""

    interface = "migration-states"

    def __init__(self, mdev: Mdev) -> None:
        super().__init__(mdev)
        with self.device() as device:
            self._ports = [device.info(port) for port in mtty_device.PORTS]
        self._due: int | None = None
        self._data = -1

    def put_in(self, state: int) -> None:
        """Tell it to go to ``state``, as soon as somebody has it open: it takes the kernel down when it is opened, and
        not reset, after it was closed in RESUMING.
        """
        self._due = state

    @contextmanager
    def held(self, fd: int) -> Iterator[None]:
        with super().held(fd), self.device() as device:
            if self._due is not None:
                self._data = mtty_device.set_state(device, self._due)
                self._due = None
            try:
                yield
            finally:
                if self._data != -1:
                    os.close(self._data)
                    self._data = -1

    @property
    def state(self) -> int:
        if self.broken:
            return MigrationState.ERROR
        if self._due is not None:
            return self._due
        with self.device() as device:
            return mtty_device.get_state(device)

    def digest(self) -> bytes:
        """The registers themselves."""
        with self.device() as device:
            return b"".join(device.read(port, mtty_device.SCRATCH, 1) for port in self._ports)

    def reset(self) -> None:
        self._due = None
        super().reset()

    def _make_different(self, number: int) -> None:
        with self.device() as device:
            for port, value in zip(self._ports, number.to_bytes(8, "little"), strict=False):
                device.write(port, mtty_device.SCRATCH, bytes([value]))

    def _work(self, count: int) -> None:
        with self.device() as device:
            for number in range(count):
                port = self._ports[number % len(self._ports)]
                value = device.read(port, mtty_device.SCRATCH, 1)[0]
                device.write(port, mtty_device.SCRATCH, bytes([(value + 37) % 256]))


class Front(Between):
    """What stands between a device and the access to one of these drivers: it sees what guest memory there is, and lets
    a driver look broken that can't be broken.
    """

    def __init__(self, access: Access, driver: KernelDriver) -> None:
        super().__init__(access)
        self.driver = driver

    async def called(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        if self.driver.broken and name.startswith(("set_migration_state", "data.")):
            raise DeviceRefused(self.name, name, errno.EIO)
        done = await call()
        if name == "reset":
            self.driver.broken = False
        return done

    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        if self.driver.broken and (operation, feature) == (FeatureOperation.GET, Feature.MIG_DEVICE_STATE):
            return FEATURE_MIG_STATE.pack(MigrationState.ERROR, -1)
        return await super().feature(operation, feature, data, size)

    async def dma_map(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
        await super().dma_map(iova, length, fd, offset, writable=writable)
        self.driver.guest = (iova, length)

    async def dma_unmap(self, iova: int, length: int) -> None:
        await super().dma_unmap(iova, length)
        self.driver.guest = None


class _Watched(Kernel):
    """Knows the descriptor of the device that an access opens."""

    device = -1

    def open(self, path: str) -> int:
        fd = super().open(path)
        if path.startswith("/dev/vfio/devices/"):
            self.device = fd
        return fd

    def ioctl(self, fd: int, request: int, argument: bytearray | int = 0) -> int:
        value = super().ioctl(fd, request, argument)
        if request == GROUP_GET_DEVICE_FD:
            self.device = value
        return value


def through(way: Way) -> Opener:
    """Opens a device of the kernel's."""

    @asynccontextmanager
    async def opened(one: KernelDriver, between: Callable[[Access], Access] = as_it_is) -> AsyncIterator[Device]:
        kernel = _Watched()
        address = one.address(way).removeprefix("vfio:")
        access = await kernel_access.connect(address, timeout=TIMEOUT, kernel=kernel)
        with one.held(kernel.device):
            async with await find(between(Front(access, one))) as device:
                yield device

    return opened
