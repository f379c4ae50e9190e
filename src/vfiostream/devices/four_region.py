"""The four-region interface of 2019 as a device, over any access.

A data region is a staging buffer: what the driver puts there is ours to read until the next operation, and what we put
there reaches the device with SET_BUFFER only. So a call never leaves half a chunk with the driver; and once a call has
failed or was cancelled, only ``resume``, ``release`` and ``abandon`` reach it (:mod:`vfiostream.devices.calls`).

The two orders of a session differ in when LOGGING is set. *session*: at the start, so the first capture is the whole
memory because nothing was captured before. *posted*, as the posted patches do it: when the first capture, which is the
whole because it is taken outside LOGGING, has been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

from vfiostream.access.contract import Access
from vfiostream.buffers import Buffer
from vfiostream.devices import dirty
from vfiostream.devices.base import BaseDevice
from vfiostream.devices.calls import Phase
from vfiostream.devices.contract import Pending
from vfiostream.devices.discovery import Found, LayoutName, discover
from vfiostream.devices.operations import logger, operation
from vfiostream.devices.regions import Region, regions_of
from vfiostream.errors import DeviceBroken, DeviceRefused, Incompatible
from vfiostream.uapi.four_region import State

Order: TypeAlias = Literal["session", "posted"]


@dataclass(slots=True)
class _Reading:
    """A capture or config on its way out."""

    region: Region
    size: int
    fetched: int = 0
    """Where what is in the region ends; the rest is still with the driver."""
    done: int = 0


@dataclass(slots=True)
class _Writing:
    """A capture or config on its way in."""

    region: Region
    size: int
    is_config: bool
    done: int = 0

    @property
    def is_due(self) -> bool:
        """Whether the driver takes what is in the region now."""
        return self.done == self.size or self.done % self.region.size == 0


class FourRegionDevice(BaseDevice):
    """A device of the four-region interface; made by :meth:`open`."""

    def __init__(self, access: Access, found: Found, order: Order) -> None:
        super().__init__(access, found.description, found.pci)
        self._control = found.control
        self._config = found.config
        self._memory = found.memory
        self._bitmap = found.bitmap
        self._version = found.version
        self._posted = order == "posted"
        self._state: State | None = None
        """What we have set the device to; None while that is not known."""
        self._captured_unlogged = False
        """Whether the driver has captured outside LOGGING, and remembers it."""
        self._asked = True
        """Whether the driver was asked for what there is in this round: it captures whenever it is."""
        self._reading: _Reading | None = None
        self._writing: _Writing | None = None

    @classmethod
    async def open(
        cls,
        access: Access,
        *,
        order: Order = "session",
        layout: LayoutName | None = None,
    ) -> Self:
        """Find the interface on the device behind ``access``, which from now on belongs to this device: it is closed
        with it, and when this fails.

        ``layout`` is that of the control region; None takes the packed one where the region has just its size. Raises
        :class:`~vfiostream.errors.Incompatible` for a device that does not have the interface, or not all of it.
        """
        try:
            return cls(access, await discover(access, await regions_of(access), layout), order)
        except BaseException:
            await access.aclose()
            raise

    # ---- source

    async def start_precopy(self) -> None:
        with self._calls.call("start_precopy"):
            await self._set_state(State.RUNNING)
            if not self._posted or self._memory is None:
                await self._set_state(State.RUNNING_LOGGING)

    async def begin_round(self) -> None:
        with self._calls.call("begin_round"):
            self._require_all_read()
            self._asked = False

    async def capture(self) -> int:
        with self._calls.call("capture"):
            if self._memory is None:
                raise self._calls.misuse("there is no device memory to capture")
            self._require_all_read()
            size, self._reading = 0, None
            if not self._asked:
                self._asked = True
                if not self._is_logging:
                    self._captured_unlogged = True
                size = await self._control.get_memory_size()
                self._reading = _Reading(self._memory, size)
            if not size and not self._is_logging:
                # In posted order the first capture ends here: only now nothing in the region is needed any more.
                await self._set_state(State.RUNNING_LOGGING)
            return size

    async def next(self, most: int) -> memoryview | None:
        with self._calls.call("next"):
            reading = await self._fetched()
            if reading is None:
                return memoryview(b"")
            got = reading.region.view(reading.done % reading.region.size, min(most, reading.fetched - reading.done))
            if got is not None:
                reading.done += len(got)
            return got

    async def read(self, into: Sequence[memoryview]) -> int:
        with self._calls.call("read"):
            reading = await self._fetched()
            if reading is None:
                return 0
            count = min(len(into[0]), reading.fetched - reading.done)
            await reading.region.read(reading.done % reading.region.size, into[0][:count])
            reading.done += count
            return count

    async def _fetched(self) -> _Reading | None:
        """What is being read, with its next byte in the region; None at its end."""
        reading = self._reading
        if reading is None or reading.done == reading.size:
            return None
        if reading.done == reading.fetched:
            await self._control.get_memory(reading.done)
            reading.fetched = min(reading.size, reading.done + reading.region.size)
        return reading

    async def pending(self) -> Pending | None:
        with self._calls.call("pending"):
            return None

    async def merge_dirty(self, iova: int, pages: int, bitmap: memoryview) -> None:
        with self._calls.call("merge_dirty"):
            self._require_bitmap(pages, bitmap)
            if not self._is_logging:
                raise self._calls.misuse("dirty pages are tracked from the end of the first capture on")
            region = self._bitmap
            assert region is not None

            async def ask(first: int, count: int, bits: memoryview) -> None:
                await self._control.get_bitmap(iova + first * dirty.PAGE_SIZE, count)
                await region.read(0, bits[: (count + 7) // 8])

            await dirty.merge(bitmap, pages, region.size * 8, ask)

    async def quiesce(self) -> None:
        with self._calls.call("quiesce"):
            pass

    async def stop(self) -> None:
        with self._calls.call("stop"):
            await self._set_state(State.STOP_LOGGING)

    async def capture_config(self) -> int:
        with self._calls.call("capture_config"):
            self._require_all_read()
            size = await self._control.get_config_size()
            if not 1 <= size <= self._config.size:
                raise DeviceBroken(
                    f"{self.name}: the driver says that its config has {size} bytes, and its config region takes "
                    f"{self._config.size}; this driver can't be moved"
                )
            await self._control.get_config()
            self._reading = _Reading(self._config, size, fetched=size)
            return size

    async def release(self) -> None:
        with self._calls.call("release"):
            await self._set_state(State.STOP)

    async def resume(self) -> None:
        with self._calls.call("resume"):
            self._reading = None
            try:
                # Leaving LOGGING makes a driver forget what it has captured, so it has to be entered first.
                if self._captured_unlogged:
                    await self._set_state(State.RUNNING_LOGGING)
            finally:
                await self._set_state(State.RUNNING)

    # ---- target

    async def accepts(self, version: str) -> bool:
        if self._version is None:
            return await super().accepts(version)
        data = version.encode()
        if not 0 < len(data) <= self._version.size:
            return False
        try:
            with operation(self.name, "check of a version"):
                await self._access.write(self._version.index, 0, data)
        except DeviceRefused as error:
            logger.info("%s: version %r is not taken: %s", self.name, version, error)
            return False
        return True

    async def start_load(self) -> None:
        with self._calls.call("start_load"):
            await self._set_state(State.STOP)

    async def begin_capture(self, size: int | None) -> None:
        with self._calls.call("begin_capture"):
            if size is None:
                raise Incompatible(
                    f"{self.name} takes captures of a known size, and the source's have none; use a target device of "
                    "the same kind"
                )
            if self._memory is None:
                raise self._calls.misuse("there is no device memory to load")
            self._require_all_written()
            if size:
                await self._control.set_memory_size(size)
            self._writing = _Writing(self._memory, size, is_config=False)

    def room(self, most: int) -> memoryview:
        self._calls.check("room")
        writing = self._writing
        if writing is None or writing.done == writing.size:
            return memoryview(b"")
        return writing.region.view(*self._next_room(writing, most)) or memoryview(b"")

    def fill(self, count: int) -> bool:
        self._calls.check("fill")
        writing = self._writing
        if writing is None or count > writing.size - writing.done:
            raise self._beyond(count)
        writing.done += count
        if writing.is_due:
            self._calls.phase = Phase.FILLED
        return writing.is_due

    async def deliver(self) -> None:
        with self._calls.call("deliver"):
            assert self._writing is not None
            await self._set_buffer(self._writing)

    async def write(self, data: Buffer) -> None:
        with self._calls.call("write"):
            rest = memoryview(data)
            while rest:
                writing = self._writing
                if writing is None or writing.done == writing.size:
                    raise self._beyond(len(rest))
                start, count = self._next_room(writing, len(rest))
                await writing.region.write(start, rest[:count])
                writing.done += count
                if writing.is_due:
                    await self._set_buffer(writing)
                rest = rest[count:]

    @staticmethod
    def _next_room(writing: _Writing, most: int) -> tuple[int, int]:
        """Where the next bytes go in the region, and how many of ``most``."""
        start = writing.done % writing.region.size
        return start, min(most, writing.size - writing.done, writing.region.size - start)

    async def _set_buffer(self, writing: _Writing) -> None:
        if writing.is_config:
            await self._control.set_config()
        else:
            size = writing.region.size
            await self._control.set_memory((writing.done - 1) // size * size)

    async def begin_config(self, size: int) -> None:
        with self._calls.call("begin_config"):
            self._require_all_written()
            if not 1 <= size <= self._config.size:
                raise Incompatible(
                    f"{self.name} takes a config of 1 to {self._config.size} bytes, and the source's has {size}; "
                    "use a target device of the same kind"
                )
            await self._control.set_config_size(size)
            self._writing = _Writing(self._config, size, is_config=True)

    async def finish_load(self) -> None:
        with self._calls.call("finish_load"):
            self._require_all_written()  # and what was written, the driver has taken

    async def run(self) -> None:
        with self._calls.call("run"):
            await self._set_state(State.RUNNING)

    async def abandon(self) -> None:
        with self._calls.call("abandon"):
            if self._state is not State.STOP:
                await self._set_state(State.STOP)

    # ---- both

    async def aclose(self) -> None:
        for region in (self._config, self._memory, self._bitmap):
            if region is not None:
                region.forget_areas()
        await super().aclose()

    # ---- what they share

    @property
    def _is_logging(self) -> bool:
        return self._state is not None and self._state.logging

    async def _set_state(self, state: State) -> None:
        self._state = None
        await self._control.set_state(state)
        self._state = state
        if state.logging:
            self._captured_unlogged = False

    def _require_all_read(self) -> None:
        if self._reading is not None and self._reading.done < self._reading.size:
            raise self._calls.misuse("the capture before was not read to its end")

    def _require_all_written(self) -> None:
        if self._writing is not None and self._writing.done < self._writing.size:
            raise self._calls.misuse("the capture or config before was not written to its end")
