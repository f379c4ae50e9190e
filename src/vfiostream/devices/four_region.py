"""The four-region interface of 2019 as a device, over any access.

A data region is a staging buffer: what the driver puts there is ours to read until the next operation, and what we put
there reaches the device with SET_BUFFER only. So a call never leaves half a chunk with the driver; and once a call has
failed or was cancelled, only ``resume``, ``release`` and ``abandon`` reach it. Which call is in order when is in two
tables, ``_SOURCE_CALLS`` and ``_TARGET_CALLS``.

The two orders of a session differ in when LOGGING is set. *session*: at the start, so the first capture is the whole
memory because nothing was captured before. *posted*, as the posted patches do it: when the first capture, which is the
whole because it is taken outside LOGGING, has been read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Self, TypeAlias

from vfiostream._accel import bitmap_merge
from vfiostream.access.contract import Access
from vfiostream.buffers import Buffer
from vfiostream.devices import pci
from vfiostream.devices.contract import Device, DeviceDescription
from vfiostream.devices.control import logger, operation
from vfiostream.devices.discovery import Found, LayoutName, discover, read_pci_config
from vfiostream.devices.regions import Region
from vfiostream.errors import DeviceBroken, DeviceRefused, Incompatible, LocalProtocolError
from vfiostream.uapi.four_region import PAGE_SIZE, State

Order: TypeAlias = Literal["session", "posted"]

MAX_BITMAP = 1024 * 1024
"""Bytes of bitmap asked for at a time, however large the region: 32 GiB of guest memory."""


class _Phase(StrEnum):
    IDLE = "idle"
    LOGGING = "logging"
    STOPPED = "stopped"
    RELEASED = "released"
    SOURCE_FAILED = "in a session that has failed"
    LOADING = "loading"
    FILLED = "loading, with bytes that wait to be delivered"
    LOADED = "loaded"
    RUNNING = "running what it has loaded"
    ABANDONED = "abandoned"
    LOAD_FAILED = "in a load that has failed"
    CLOSED = "closed"


_Calls: TypeAlias = dict[str, dict[_Phase, _Phase]]
_SOURCE_CALLS: _Calls = {
    "start_precopy": {_Phase.IDLE: _Phase.LOGGING},
    "capture": {_Phase.LOGGING: _Phase.LOGGING, _Phase.STOPPED: _Phase.STOPPED},
    "next": {_Phase.LOGGING: _Phase.LOGGING, _Phase.STOPPED: _Phase.STOPPED},
    "merge_dirty": {_Phase.LOGGING: _Phase.LOGGING, _Phase.STOPPED: _Phase.STOPPED},
    "stop": {_Phase.LOGGING: _Phase.STOPPED},
    "capture_config": {_Phase.STOPPED: _Phase.STOPPED},
    "release": {_Phase.STOPPED: _Phase.RELEASED, _Phase.SOURCE_FAILED: _Phase.RELEASED},
    "resume": {
        _Phase.IDLE: _Phase.IDLE,
        _Phase.LOGGING: _Phase.IDLE,
        _Phase.STOPPED: _Phase.IDLE,
        _Phase.RELEASED: _Phase.IDLE,
        _Phase.SOURCE_FAILED: _Phase.IDLE,
    },
}
_TARGET_CALLS: _Calls = {
    "start_load": {_Phase.IDLE: _Phase.LOADING},
    "begin_capture": {_Phase.LOADING: _Phase.LOADING},
    "room": {_Phase.LOADING: _Phase.LOADING},
    "fill": {_Phase.LOADING: _Phase.LOADING},
    "deliver": {_Phase.FILLED: _Phase.LOADING},
    "begin_config": {_Phase.LOADING: _Phase.LOADING},
    "load_pci_config": {_Phase.LOADING: _Phase.LOADING},
    "finish_load": {_Phase.LOADING: _Phase.LOADED},
    "run": {_Phase.LOADED: _Phase.RUNNING},
    # Where several devices move, all are abandoned if one fails, wherever the others are.
    "abandon": {
        _Phase.IDLE: _Phase.ABANDONED,
        _Phase.LOADING: _Phase.ABANDONED,
        _Phase.FILLED: _Phase.ABANDONED,
        _Phase.LOADED: _Phase.ABANDONED,
        _Phase.RUNNING: _Phase.ABANDONED,
        _Phase.LOAD_FAILED: _Phase.ABANDONED,
        _Phase.ABANDONED: _Phase.ABANDONED,
    },
}


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
    unsent: int = 0
    """Bytes of ``done`` that are not in the region yet, as it is not mapped there."""

    @property
    def is_due(self) -> bool:
        """Whether the driver takes what is in the region now."""
        return self.done == self.size or self.done % self.region.size == 0


class FourRegionDevice(Device):
    """A device of the four-region interface; made by :meth:`open`."""

    def __init__(self, access: Access, found: Found, description: DeviceDescription, order: Order) -> None:
        self.name = access.name
        self.description = description
        self._access = access
        self._control = found.control
        self._config = found.config
        self._memory = found.memory
        self._bitmap = found.bitmap
        self._version = found.version
        self._pci = found.pci
        self._posted = order == "posted"
        self._phase = _Phase.IDLE
        self._state: State | None = None
        """What we have set the device to; None while that is not known."""
        self._captured_unlogged = False
        """Whether the driver has captured outside LOGGING, and remembers it."""
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
            found = await discover(access, layout)
            return cls(access, found, found.description, order)
        except BaseException:
            await access.aclose()
            raise

    @property
    def caveat(self) -> str | None:
        return self._access.caveat

    # ---- source

    async def start_precopy(self) -> None:
        with self._call("start_precopy"):
            await self._set_state(State.RUNNING)
            if not self._posted or self._memory is None:
                await self._set_state(State.RUNNING_LOGGING)

    async def capture(self) -> int:
        with self._call("capture"):
            if self._memory is None:
                raise self._misuse("there is no device memory to capture")
            self._require_all_read()
            if not self._is_logging:
                self._captured_unlogged = True
            size = await self._control.get_memory_size()
            self._reading = _Reading(self._memory, size)
            return size

    async def next(self, most: int) -> memoryview:
        with self._call("next"):
            reading = self._reading
            if reading is None or reading.done == reading.size:
                # In posted order this ends the first capture: only now nothing in the region is needed any more.
                if reading is not None and not self._is_logging:
                    await self._set_state(State.RUNNING_LOGGING)
                self._reading = None
                return memoryview(b"")
            if reading.done == reading.fetched:
                await self._control.get_memory(reading.done)
                reading.fetched = min(reading.size, reading.done + reading.region.size)
            got = await reading.region.next(
                reading.done % reading.region.size, min(most, reading.fetched - reading.done)
            )
            reading.done += len(got)
            return got

    async def merge_dirty(self, iova: int, pages: int, bitmap: memoryview) -> None:
        with self._call("merge_dirty"):
            if self._bitmap is None:
                raise self._misuse("it does not track dirty pages")
            if not self._is_logging:
                raise self._misuse("dirty pages are tracked from the end of the first capture on")
            if len(bitmap) != (pages + 7) // 8:
                raise self._misuse(f"a bitmap of {len(bitmap)} bytes is not one of {pages} pages")
            step = min(self._bitmap.size, MAX_BITMAP) * 8
            for first in range(0, pages, step):
                count = min(step, pages - first)
                await self._control.get_bitmap(iova + first * PAGE_SIZE, count)
                bits = bytearray((count + 7) // 8)
                await self._bitmap.read(0, memoryview(bits))
                if count % 8:
                    bits[-1] &= (1 << count % 8) - 1
                start = first // 8
                bitmap_merge(bitmap[start : start + len(bits)], bits)

    async def stop(self) -> None:
        with self._call("stop"):
            await self._set_state(State.STOP_LOGGING)

    async def capture_config(self) -> int:
        with self._call("capture_config"):
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

    async def read_pci_config(self) -> bytes | None:
        if self._pci is None:
            return None
        return await read_pci_config(self._access, self._pci)

    async def release(self) -> None:
        with self._call("release"):
            await self._set_state(State.STOP)

    async def resume(self) -> None:
        with self._call("resume"):
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
            return True
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
        with self._call("start_load"):
            await self._set_state(State.STOP)

    async def begin_capture(self, size: int) -> None:
        with self._call("begin_capture"):
            if self._memory is None:
                raise self._misuse("there is no device memory to load")
            self._require_all_written()
            if size:
                await self._control.set_memory_size(size)
            self._writing = _Writing(self._memory, size, is_config=False)

    def room(self, most: int) -> memoryview:
        self._check_call("room")
        writing = self._writing
        if writing is None or writing.done == writing.size:
            return memoryview(bytearray())
        start = writing.done % writing.region.size
        return writing.region.room(start, min(most, writing.size - writing.done, writing.region.size - start))

    def fill(self, count: int) -> bool:
        self._check_call("fill")
        writing = self._writing
        if writing is None or count > writing.size - writing.done:
            raise self._misuse(f"{count} bytes are more than was announced")
        if not writing.region.is_mapped(writing.done % writing.region.size):
            writing.unsent = count
        writing.done += count
        if writing.unsent or writing.is_due:
            self._phase = _Phase.FILLED
        return self._phase is _Phase.FILLED

    async def deliver(self) -> None:
        with self._call("deliver"):
            writing = self._writing
            assert writing is not None
            size = writing.region.size
            if writing.unsent:
                await writing.region.send((writing.done - writing.unsent) % size, writing.unsent)
                writing.unsent = 0
            if not writing.is_due:
                return
            if writing.is_config:
                await self._control.set_config()
            else:
                await self._control.set_memory((writing.done - 1) // size * size)

    async def begin_config(self, size: int) -> None:
        with self._call("begin_config"):
            self._require_all_written()
            if not 1 <= size <= self._config.size:
                raise Incompatible(
                    f"{self.name} takes a config of 1 to {self._config.size} bytes, and the source's has {size}; "
                    "use a target device of the same kind"
                )
            await self._control.set_config_size(size)
            self._writing = _Writing(self._config, size, is_config=True)

    async def load_pci_config(self, config: Buffer) -> None:
        with self._call("load_pci_config"):
            if self._pci is None:
                raise Incompatible(
                    f"{self.name} is not on PCI, and the source is; use a target device of the same kind"
                )
            current = await read_pci_config(self._access, self._pci)
            try:
                writes = pci.restore_writes(bytes(config), current)
            except Incompatible as error:
                raise Incompatible(f"{self.name}: {error}; use a target device of the same kind") from error
            for offset, data in writes:
                with operation(self.name, f"restore {len(data)} bytes of PCI config space at {offset:#04x}"):
                    await self._access.write(self._pci.index, offset, data)

    async def finish_load(self) -> None:
        with self._call("finish_load"):
            self._require_all_written()  # and what was written, the driver has taken

    async def run(self) -> None:
        with self._call("run"):
            await self._set_state(State.RUNNING)

    async def abandon(self) -> None:
        with self._call("abandon"):
            if self._state is not State.STOP:
                await self._set_state(State.STOP)

    # ---- both

    async def dma_map(self, iova: int, length: int, fd: int, offset: int) -> None:
        with operation(self.name, f"map {length} bytes of guest memory at {iova:#x}"):
            await self._access.dma_map(iova, length, fd, offset, writable=self.description.dirty_tracking)

    async def aclose(self) -> None:
        self._phase = _Phase.CLOSED
        for region in (self._config, self._memory, self._bitmap):
            if region is not None:
                region.forget_areas()
        await self._access.aclose()

    # ---- what they share

    @contextmanager
    def _call(self, name: str) -> Iterator[None]:
        """Check that the call is in order. It leaves a failed device behind unless it comes to its end."""
        then = self._check_call(name)
        self._phase = _Phase.SOURCE_FAILED if name in _SOURCE_CALLS else _Phase.LOAD_FAILED
        yield
        self._phase = then

    def _check_call(self, name: str) -> _Phase:
        """Raise where the call is out of order; returns the phase that follows it."""
        then = (_SOURCE_CALLS if name in _SOURCE_CALLS else _TARGET_CALLS)[name].get(self._phase)
        if then is None:
            raise self._misuse(f"{name} is out of order while the device is {self._phase}")
        return then

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
            raise self._misuse("the capture before was not read to its end")

    def _require_all_written(self) -> None:
        if self._writing is not None and self._writing.done < self._writing.size:
            raise self._misuse("the capture or config before was not written to its end")

    def _misuse(self, problem: str) -> LocalProtocolError:
        return LocalProtocolError(f"{self.name}: {problem}")
