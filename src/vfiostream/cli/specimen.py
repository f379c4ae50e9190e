"""What a bench moves: guest memory, or a reference device, of a size and with a content.

All of it is touched before it is used, so that no clock counts what the kernel takes to find pages. The reference
device is a simulation in the process of its end; guest memory is plain memory, with a reference device that has none
beside it, as something has to be switched over.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, get_args

from anyio import to_thread

from vfiostream.cli.values import show_size
from vfiostream.devices.contract import Device
from vfiostream.devices.four_region import FourRegionDevice
from vfiostream.errors import UsageError
from vfiostream.guest import PAGE_SIZE, Guest, GuestRange
from vfiostream.vendor.contents import fill, make_pool
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.settings import Settings

Data = Literal["zeros", "text", "library", "random", "mixed"]
DATA: tuple[Data, ...] = get_args(Data)
What = Literal["guest memory", "reference device"]
WHATS: tuple[What, ...] = get_args(What)

VERSION = "vfiostream-bench,1"
"""Of every device of a bench: the ordinary check of versions tells a bench from a migration that went astray."""

MIB = 1 << 20
CONTENT_SIZE = 16 * MIB
"""Bytes of content, which is repeated. More than any window of the compressor."""
RESERVE = 256 * MIB
"""Bytes of memory that a bench leaves free on a machine, for both ends' buffers and everybody else."""


def make_content(data: Data) -> bytes:
    """Content of the kind ``data``, of :data:`CONTENT_SIZE`. ``mixed`` is half zeros, a quarter of bytes of shared
    libraries and a quarter random, in turn MiB by MiB.
    """
    if data != "mixed":
        return make_pool(data, 0, CONTENT_SIZE)
    libraries, noise = (make_pool(kind, 0, CONTENT_SIZE // 4) for kind in ("library", "random"))
    zeros = bytes(MIB)
    return b"".join(
        zeros + libraries[at : at + MIB] + zeros + noise[at : at + MIB] for at in range(0, len(libraries), MIB)
    )


def check_size(size: int) -> None:
    """Raise :class:`~vfiostream.errors.UsageError` for what guest memory or a device can't have as its size."""
    if size <= 0 or size % PAGE_SIZE:
        raise UsageError(f"{size} bytes can't be moved in a bench: choose a --size that is a multiple of {PAGE_SIZE}")


def check_room(size: int) -> None:
    """Raise :class:`~vfiostream.errors.UsageError` unless ``size`` bytes of memory are free on this machine."""
    found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free = max(0, int(found[1]) * 1024 - RESERVE) if found else 0
    if size > free:
        raise UsageError(
            f"a bench of this size needs {show_size(size)} of memory on one machine, where {show_size(free)} can be "
            "had: choose a smaller --size"
        )


class Specimen:
    """Guest memory or a reference device, ready to be moved or to be moved into, any number of times.

    Making one takes about a second a GiB, and blocks: :func:`prepared` does it in a thread.
    """

    def __init__(self, what: What, size: int, content: bytes = bytes(MIB)) -> None:
        """``size`` bytes with ``content`` over and over. Raises :class:`~vfiostream.errors.UsageError` where there is
        no room.
        """
        self.what = what
        self.size = size
        is_device = what == "reference device"
        self.guest = Guest(() if is_device else (_memory(size, content),))
        try:
            self._device = ReferenceDevice(
                Settings(memory=size if is_device else 0, config=PAGE_SIZE, data="zeros", version_string=VERSION)
            )
        except BaseException:
            self.guest.close()
            raise
        if is_device and any(content):
            # A device knows no mixed content. Reset, it starts with what its pool has.
            self._device.workload.pool = content
            self._device.reset()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Device]:
        """The device, for one migration in which :attr:`guest` goes with it."""
        async with await FourRegionDevice.open(InProcessAccess(self._device, f"in-process:{self.what}")) as device:
            yield device

    def close(self) -> None:
        self._device.close()
        self.guest.close()


@asynccontextmanager
async def prepared(what: What, size: int, content: bytes = bytes(MIB)) -> AsyncIterator[Specimen]:
    """A :class:`Specimen`, for as long as it is needed."""
    check_room(size)
    specimen = await to_thread.run_sync(Specimen, what, size, content)
    try:
        yield specimen
    finally:
        specimen.close()


def _memory(size: int, content: bytes) -> GuestRange:
    fd = os.memfd_create("vfiostream-bench", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        memory = GuestRange(0, size, fd, "of a bench")
    except BaseException:
        os.close(fd)
        raise
    fill(memory.view, content, stamped=False)
    return memory
