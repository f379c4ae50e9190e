"""A device under test: how it is brought back to where a check begins, and what all interfaces have in common."""

from __future__ import annotations

import errno
import math
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Self

import anyio

from vfiostream.access.contract import Access
from vfiostream.conformance import doorbell
from vfiostream.conformance.rules import NotTestable
from vfiostream.devices.regions import Region
from vfiostream.errors import DeviceError, DeviceRefused, UsageError

Opener = Callable[[], Awaitable[Access]]
"""Opens the device; it may be called again when what it gave was closed."""

PAGE = 4096
GUEST_IOVA = 0x1_0000_0000
GUEST_PAGES = 256
MAX_STREAM = 256 << 20
"""Bytes of state that are kept in memory, to be changed and loaded again; a device with more is tested in part."""
WATCH = 0.5
"""Seconds that a device is given to write guest memory by itself."""
GLANCE = 0.005
"""Seconds between two looks at guest memory."""
STILL = 0.05
"""Seconds that a stopped device is watched for writes."""


class Unusable(Exception):
    """The device can't be brought back to where a check begins; the text says why."""


class Subject(ABC):
    """A device, reached through ``access``. Everything a check opens is closed by :meth:`fresh`."""

    access: Access

    def __init__(self, opener: Opener, access: Access) -> None:
        self._opener = opener
        self.access = access
        self._target: Self | None = None
        self._writes: bool | None = None

    @property
    def name(self) -> str:
        return self.access.name

    @property
    def target(self) -> Self:
        """The device that streams are loaded into: this one, where there is no other."""
        return self if self._target is None else self._target

    @target.setter
    def target(self, other: Self) -> None:
        self._target = other

    @abstractmethod
    async def run(self) -> None:
        """Make it run, from whatever state that allows."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop it, from running; what it dirtied is still told."""

    async def close_data(self) -> None:  # noqa: B027 - where there is none
        """Let go of what is open beside the access; never raises."""

    async def reset(self) -> None:
        """Bring it back within a check: by a reset, whatever it says of having one, or else by opening it anew. Then it
        runs.
        """
        await self.close_data()
        if await refusal(self.access.reset()) is not None:
            await self.reopen()
        await self.run()

    async def reopen(self) -> None:
        await self.close_data()
        await self.access.aclose()
        self.access = await self._opener()

    async def fresh(self) -> None:
        """Bring it to where a check begins: open, running, with nothing mapped, logged or captured. Raises
        :class:`Unusable`.
        """
        await self.close_data()
        try:
            await self.access.reset()  # before it is closed: a driver may not expect to be closed in mid-load
        except DeviceError:
            pass  # it can't be, or it is lost and can be had by opening it anew
        try:
            await self.reopen()
            await self.reset()
        except (DeviceError, UsageError, OSError) as error:
            raise Unusable(str(error)) from error

    async def aclose(self) -> None:
        await self.close_data()
        await self.access.aclose()

    async def region(self, index: int, name: str) -> Region:
        """A data region, of the access as it is now."""
        return await Region.open(self.access, await self.access.region_info(index), name)

    # ---- guest memory

    @asynccontextmanager
    async def guest(self) -> AsyncIterator[Guest]:
        """Guest memory that the device reaches; raises :class:`NotTestable` where it can't be given any."""
        fd = os.memfd_create("conformance", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, GUEST_PAGES * PAGE)
            with mmap.mmap(fd, GUEST_PAGES * PAGE) as memory:
                try:
                    await self.access.dma_map(GUEST_IOVA, len(memory), fd, 0, writable=True)
                except (DeviceRefused, UsageError) as error:
                    raise NotTestable(f"guest memory can't be mapped: {error}") from error
                access = self.access
                try:
                    yield Guest(self, memory)
                finally:
                    with suppress(DeviceError):  # of what was closed meanwhile, nothing is mapped any more
                        await access.dma_unmap(GUEST_IOVA, len(memory))
        finally:
            os.close(fd)


class Guest:
    """Guest memory of ``subject`` while it is mapped."""

    def __init__(self, subject: Subject, memory: mmap.mmap) -> None:
        self._subject = subject
        self._memory = memory

    def look(self) -> bytes:
        return self._memory[:]

    async def let_write(self) -> bytes:
        """Have the device write some of it, by a doorbell or by waiting; returns what it held before. Raises
        :class:`NotTestable` where the device can't be made to.
        """
        before = self.look()
        if await doorbell.ring(self._subject.access, GUEST_IOVA, len(before)):
            return before
        if self._subject._writes is False:
            raise NotTestable(_SILENT)
        with anyio.move_on_after(WATCH):
            while self.look() == before:  # noqa: ASYNC110 - a device tells nobody that it writes
                await anyio.sleep(GLANCE)
        self._subject._writes = self.look() != before
        if not self._subject._writes:
            raise NotTestable(_SILENT)
        return before

    def changed(self, before: bytes) -> set[int]:
        """The pages that differ from ``before``."""
        now = self.look()
        spans = range(0, len(now), PAGE)
        return {at // PAGE for at in spans if now[at : at + PAGE] != before[at : at + PAGE]}

    async def is_still(self) -> set[int]:
        """The pages that change within a moment."""
        before = self.look()
        await anyio.sleep(STILL)
        return self.changed(before)


_SILENT = f"the device wrote no guest memory within {WATCH:g} s: give it work that does DMA"


def bits(bitmap: bytes | bytearray | memoryview) -> set[int]:
    """The numbers of the bits that are set."""
    return {8 * at + bit for at, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1}


async def refusal(call: Awaitable[object]) -> DeviceRefused | None:
    """With what ``call`` is refused; None where it is not."""
    try:
        await call
    except DeviceRefused as refused:
        return refused
    return None


def named(refused: DeviceRefused) -> str:
    """The errno of a refusal, by its name."""
    return errno.errorcode.get(refused.errno, str(refused.errno))


def near(told: int, found: int) -> bool:
    """Whether ``told`` is an estimate of ``found`` that is of use: a downtime is reckoned with it, so it may be wrong
    by a factor of two, and by a page.
    """
    return math.floor(found / 2) - PAGE <= told <= found * 2 + PAGE
