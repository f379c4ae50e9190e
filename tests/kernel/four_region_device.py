"""A device of our four-region driver by hand: its registers, and the twelve operations of the interface.

Region indexes and registers are those of ``four_region/four_region.h``.
"""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum, IntFlag

import pytest

from tests.kernel.raw_vfio import Info, RawDevice
from vfiostream.uapi.four_region import NATURAL, PACKED, PAGE_SIZE, Action, State

MEMORY_BAR, REGISTERS, PCI_CONFIG = 0, 2, 7
CONTROL, CONFIG, MEMORY, BITMAP, VERSION = range(9, 14)

SCRATCH = 0x1000
"""Where the registers end: from here on BAR 2 keeps what is written, up to its end at 32 KiB."""


class Register(IntEnum):
    ID = 0x00
    IOVA = 0x08
    LENGTH = 0x10
    PATTERN = 0x18
    OFFSET = 0x20
    KICK = 0x28
    RATE = 0x30
    WORK = 0x38
    WRITTEN = 0x40
    FAILED = 0x48
    STATE = 0x50


class Kick(IntEnum):
    GUEST = 1
    TO_GUEST = 2
    FROM_GUEST = 3
    DEVICE = 4


class Work(IntFlag):
    DEVICE = 1
    GUEST = 2


ID = 0x4E475234


class FourRegion:
    """One open device of the driver."""

    def __init__(self, device: RawDevice) -> None:
        self.device = device
        self.regions = [device.info(index) for index in range(device.num_regions)]
        self._maps: dict[tuple[int, int], mmap.mmap] = {}
        self.layout = PACKED if self.regions[CONTROL].size == PACKED.size else NATURAL

    # ---- registers and memory

    def register(self, which: Register) -> int:
        value: int = struct.unpack("<Q", self.device.read(self.regions[REGISTERS], which, 8))[0]
        return value

    def set_register(self, which: Register, value: int) -> None:
        self.device.write(self.regions[REGISTERS], which, struct.pack("<Q", value))

    def kick(self, kick: Kick, *, iova: int = 0, length: int, pattern: int = 0, offset: int = 0) -> None:
        """Let the device work; it is done when this returns."""
        self.set_register(Register.IOVA, iova)
        self.set_register(Register.LENGTH, length)
        self.set_register(Register.PATTERN, pattern)
        self.set_register(Register.OFFSET, offset)
        self.set_register(Register.KICK, kick)

    @property
    def memory(self) -> bytes:
        """All of its memory."""
        info = self.regions[MEMORY_BAR]
        return self.device.read(info, 0, info.size) if info.size else b""

    def poke(self, offset: int, data: bytes) -> None:
        self.device.write(self.regions[MEMORY_BAR], offset, data)

    @property
    def scratch(self) -> bytes:
        info = self.regions[REGISTERS]
        return self.device.read(info, SCRATCH, info.size - SCRATCH)

    # ---- the interface

    def control(self, offset: int, layout: str, *values: int) -> int:
        """Write ``values``, or read where there are none."""
        info = self.regions[CONTROL]
        if values:
            self.device.write(info, offset, struct.pack(layout, *values))
            return 0
        value: int = struct.unpack(layout, self.device.read(info, offset, struct.calcsize(layout)))[0]
        return value

    def set_state(self, state: State | int) -> None:
        self.control(self.layout.device_state, "<I", state)

    def capture(self) -> int:
        return self.control(self.layout.memory_size, "<Q")

    def fetch(self, pos: int) -> None:
        self.control(self.layout.memory_pos, "<Q", pos)
        self.control(self.layout.memory_action, "<I", Action.GET_BUFFER)

    def take_capture(self) -> bytearray:
        """Make a capture and fetch all of it."""
        size, info = self.capture(), self.regions[MEMORY]
        out = bytearray(size)
        for pos in range(0, size, info.size):
            self.fetch(pos)
            self.get_data(info, memoryview(out)[pos : pos + info.size])
        return out

    def announce(self, size: int) -> None:
        self.control(self.layout.memory_size, "<Q", size)

    def load_chunk(self, pos: int, data: bytes | bytearray | memoryview) -> None:
        self.put_data(self.regions[MEMORY], data)
        self.control(self.layout.memory_pos, "<Q", pos)
        self.control(self.layout.memory_action, "<I", Action.SET_BUFFER)

    def load_capture(self, data: bytes | bytearray) -> None:
        self.announce(len(data))
        step = self.regions[MEMORY].size
        for pos in range(0, len(data), step):
            self.load_chunk(pos, memoryview(data)[pos : pos + step])

    def take_config(self) -> bytes:
        size = self.control(self.layout.config_size, "<Q")
        self.control(self.layout.config_action, "<I", Action.GET_BUFFER)
        out = bytearray(size)
        self.get_data(self.regions[CONFIG], out)
        return bytes(out)

    def load_config(self, data: bytes) -> None:
        self.control(self.layout.config_size, "<Q", len(data))
        self.put_data(self.regions[CONFIG], data)
        self.control(self.layout.config_action, "<I", Action.SET_BUFFER)

    def dirty_pages(self, iova: int, pages: int) -> set[int]:
        """Numbers of the dirty pages, counted from ``iova``."""
        self.control(self.layout.start_addr, "<QQ", iova, pages)
        raw = bytearray((pages + 7) // 8)
        self.get_data(self.regions[BITMAP], raw)
        bits = int.from_bytes(raw, "little")
        return {page for page in range(pages) if bits >> page & 1}

    # ---- data regions: mapped where they can be, read and written elsewhere

    def get_data(self, info: Info, into: bytearray | memoryview) -> None:
        for start, end, mapped in self._pieces(info, len(into)):
            if mapped is not None:
                into[start:end] = mapped
            else:
                into[start:end] = self.device.read(info, start, end - start)

    def put_data(self, info: Info, data: bytes | bytearray | memoryview) -> None:
        for start, end, mapped in self._pieces(info, len(data)):
            if mapped is not None:
                mapped[:] = data[start:end]
            else:
                self.device.write(info, start, data[start:end])

    def _pieces(self, info: Info, count: int) -> Iterator[tuple[int, int, memoryview | None]]:
        """Cut the first ``count`` bytes of a region: where each piece starts and ends, and where it is mapped."""
        done = 0
        for offset, length in info.areas:
            if done < min(offset, count):
                yield done, min(offset, count), None
            if offset < count:
                end = min(offset + length, count)
                yield offset, end, memoryview(self._map(info, offset, length))[: end - offset]
            done = offset + length
        if done < count:
            yield done, count, None

    def _map(self, info: Info, offset: int, length: int) -> mmap.mmap:
        key = (info.index, offset)
        if key not in self._maps:
            self._maps[key] = self.device.map(info, offset, length)
        return self._maps[key]


def numbered(first: int, pages: int) -> bytes:
    """What KICK fills ``pages`` pages with, when the pattern is ``first``."""
    return b"".join(struct.pack("<Q", first + page) * (PAGE_SIZE // 8) for page in range(pages))


@contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """The device refuses with one of these errnos."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise
    else:
        pytest.fail(f"was not refused with {' or '.join(errno.errorcode[number] for number in numbers)}")
