"""What the tests of the reference device share: small devices, and the twelve operations done by hand."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import pytest

from vfiostream.uapi.four_region import NATURAL, PACKED, Action, ControlLayout, State
from vfiostream.vendor import capture as stream
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.settings import Settings

BAR0, PCI_CONFIG, CONTROL, CONFIG, MEMORY, BITMAP, VERSION = 0, 7, 9, 10, 11, 12, 13
PAGE = 4096
RUNNING, STOP, RUNNING_LOGGING, STOP_LOGGING = State
IOVA = 0x1_0000_0000


class Regions(Protocol):
    """Whatever has regions. Both methods raise OSError with the errno of the device."""

    def read(self, index: int, offset: int, count: int) -> bytes: ...

    def write(self, index: int, offset: int, data: bytes) -> None: ...


class Operations:
    """The operations, and what is made of them. ``chunk`` is the size of the memory region."""

    def __init__(self, regions: Regions, chunk: int, layout: ControlLayout = NATURAL) -> None:
        self.regions = regions
        self.chunk = chunk
        self.layout = layout

    def get32(self, offset: int) -> int:
        return int(struct.unpack("<I", self.regions.read(CONTROL, offset, 4))[0])

    def get64(self, offset: int) -> int:
        return int(struct.unpack("<Q", self.regions.read(CONTROL, offset, 8))[0])

    def put32(self, offset: int, value: int) -> None:
        self.regions.write(CONTROL, offset, struct.pack("<I", value))

    def put64(self, offset: int, value: int) -> None:
        self.regions.write(CONTROL, offset, struct.pack("<Q", value))

    def set_state(self, state: int) -> None:
        self.put32(self.layout.device_state, state)

    @property
    def state(self) -> State:
        return State(struct.unpack("<I", self.regions.read(BAR0, 32, 4))[0])

    @property
    def digest(self) -> bytes:
        return self.regions.read(BAR0, 0, 32)

    def get_config(self) -> bytes:
        size = self.get64(self.layout.config_size)
        self.put32(self.layout.config_action, Action.GET_BUFFER)
        return self.regions.read(CONFIG, 0, size)

    def set_config(self, data: bytes) -> None:
        self.put64(self.layout.config_size, len(data))
        self.regions.write(CONFIG, 0, data)
        self.put32(self.layout.config_action, Action.SET_BUFFER)

    def get_memory_size(self) -> int:
        return self.get64(self.layout.memory_size)

    def set_memory_size(self, size: int) -> None:
        self.put64(self.layout.memory_size, size)

    def get_chunk(self, pos: int, size: int) -> bytes:
        self.put64(self.layout.memory_pos, pos)
        self.put32(self.layout.memory_action, Action.GET_BUFFER)
        return self.regions.read(MEMORY, 0, size)

    def set_chunk(self, pos: int, data: bytes) -> None:
        self.regions.write(MEMORY, 0, data)
        self.put64(self.layout.memory_pos, pos)
        self.put32(self.layout.memory_action, Action.SET_BUFFER)

    def capture(self) -> bytes:
        """A capture, fetched to its end."""
        size = self.get_memory_size()
        return b"".join(self.get_chunk(pos, min(self.chunk, size - pos)) for pos in range(0, size, self.chunk))

    def load(self, capture: bytes) -> None:
        self.set_memory_size(len(capture))
        for pos in range(0, len(capture), self.chunk):
            self.set_chunk(pos, capture[pos : pos + self.chunk])

    def get_bitmap(self, start: int, pages: int, *, at_once: bool = True) -> bytes:
        if at_once:
            self.regions.write(CONTROL, self.layout.start_addr, struct.pack("<QQ", start, pages))
        else:
            self.put64(self.layout.start_addr, start)
            self.put64(self.layout.page_nr, pages)
        return self.regions.read(BITMAP, 0, (pages + 7) // 8)


class Direct:
    """A device's regions, called in line."""

    def __init__(self, device: ReferenceDevice) -> None:
        self.device = device

    def read(self, index: int, offset: int, count: int) -> bytes:
        into = bytearray(count)
        self.device.read(index, offset, memoryview(into))
        return bytes(into)

    def write(self, index: int, offset: int, data: bytes) -> None:
        self.device.write(index, offset, data)


SMALL: dict[str, Any] = {
    "memory": 64 * PAGE,
    "config": 512,
    "memory_region": 4 * PAGE,
    "config_region": PAGE,
    "bitmap_region": PAGE,
    "data": "random",
}


@contextmanager
def opened(**changes: Any) -> Iterator[tuple[ReferenceDevice, Operations]]:
    """A small device with the ``changes`` to its settings."""
    settings = Settings(**{**SMALL, **changes})
    device = ReferenceDevice(settings)
    layout = PACKED if settings.layout == "packed" else NATURAL
    try:
        yield device, Operations(Direct(device), settings.memory_region, layout)
    finally:
        device.close()


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is looked at
        yield
    assert caught.value.errno == number


@contextmanager
def guest(device: ReferenceDevice, pages: int, iova: int = IOVA, *, writable: bool = True) -> Iterator[int]:
    """Guest memory of ``pages`` pages, mapped for DMA."""
    fd = os.memfd_create("guest")
    try:
        os.ftruncate(fd, pages * PAGE)
        device.dma_map(iova, pages * PAGE, fd, 0, writable=writable)
        yield fd
    finally:
        os.close(fd)


def finish(source: Operations, target: Operations) -> None:
    """Stop the source, move what is left, and run the target."""
    source.set_state(STOP_LOGGING)
    target.load(source.capture())
    target.set_config(source.get_config())
    source.set_state(STOP)
    target.set_state(RUNNING)


def pages_of(capture: bytes) -> list[int]:
    """The pages a capture holds, by its table."""
    runs = stream.CAPTURE_HEADER.unpack_from(capture)[6]
    table = struct.iter_unpack("<QQ", capture[stream.CAPTURE_HEADER.size :][: runs * 16])
    return [page for first, count in table for page in range(first, first + count)]


def kind_and_ordinal(capture: bytes) -> tuple[int, int]:
    fields = stream.CAPTURE_HEADER.unpack_from(capture)
    return fields[2], fields[3]
