"""Devices, guests and links for the tests of whole migrations: reference devices in this process."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import anyio

from vfiostream.devices.four_region import FourRegionDevice
from vfiostream.guest import Guest, GuestRange
from vfiostream.uapi.four_region import State
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.settings import Settings as DeviceSettings

MIB = 1024 * 1024
SMALL = DeviceSettings(
    memory=2 * MIB, config=8192, memory_region=256 * 1024, config_region=64 * 1024, bitmap_region=4096, data="text"
)
"""A device that moves in milliseconds, in eight chunks of its region."""


@dataclass
class Machine:
    """A host of the test: one device as its driver sees it, and as we do."""

    driver: ReferenceDevice
    device: FourRegionDevice

    @property
    def digest(self) -> bytes:
        out = memoryview(bytearray(32))
        self.driver.read(0, 0, out)
        return bytes(out)

    @property
    def state(self) -> State:
        out = bytearray(4)
        self.driver.read(0, 32, memoryview(out))
        return State(struct.unpack("<I", out)[0])

    async def open_again(self) -> None:
        """Open the device for another migration, as the next client would."""
        await self.device.aclose()
        self.device = await FourRegionDevice.open(InProcessAccess(self.driver))


@asynccontextmanager
async def machine(
    settings: DeviceSettings = SMALL, *, order: Literal["session", "posted"] = "session", **changes: object
) -> AsyncIterator[Machine]:
    driver = ReferenceDevice(replace(settings, **changes))  # type: ignore[arg-type]
    try:
        made = Machine(driver, await FourRegionDevice.open(InProcessAccess(driver), order=order))
        try:
            yield made
        finally:
            await made.device.aclose()
    finally:
        driver.close()


@asynccontextmanager
async def machines(
    source: DeviceSettings = SMALL, target: DeviceSettings | None = None
) -> AsyncIterator[tuple[Machine, Machine]]:
    """A source, and a target with other content that stands still."""
    if target is None:
        target = replace(source, dirty_rate=0, faults=())
    async with machine(source) as here, machine(replace(target, seed=99)) as there:
        yield here, there


@contextmanager
def guest(*areas: tuple[int, int], kind: type[Guest] = Guest) -> Iterator[Guest]:
    """A guest with (address, length) areas of memory, all zeros."""
    ranges = []
    for address, length in areas:
        fd = os.memfd_create("guest")
        os.ftruncate(fd, length)
        ranges.append(GuestRange(address, length, fd, f"memfd at {address:#x}"))
    with kind(ranges) as made:
        yield made


def contents(made: Guest) -> list[bytes]:
    return [bytes(area.view) for area in made.ranges]


async def until(condition: anyio.Event) -> None:
    """Wait for ``condition``, not for ever."""
    with anyio.fail_after(20):
        await condition.wait()
