"""The migration region of Linux 5.8 to 5.17 as a device: a header, read and written by calls, and data behind it.

The driver gives its state in segments: reading ``pending_bytes`` begins one, ``data_offset`` and ``data_size`` say
where it lies, and reading ``pending_bytes`` again lets the driver have the place back. Each segment is a capture here,
and goes to the target's driver as one, with one write of ``data_size``; it is cut only where the target's region is too
small for it, as QEMU did.

From ``struct vfio_device_migration_info`` in ``include/uapi/linux/vfio.h`` of those kernels.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Self

from vfiostream.access.contract import Access, RegionInfo
from vfiostream.buffers import Buffer
from vfiostream.devices.calls import Phase
from vfiostream.devices.contract import DeviceDescription, Pending
from vfiostream.devices.operations import blocker, operation
from vfiostream.devices.pci_space import PciSpace
from vfiostream.devices.readable import Condition, ReadableDevice, describe
from vfiostream.devices.regions import Region
from vfiostream.errors import DeviceBroken, Incompatible
from vfiostream.uapi.vfio import (
    MIGRATION_INFO,
    MIGRATION_INFO_DATA_OFFSET,
    MIGRATION_INFO_DATA_SIZE,
    MIGRATION_INFO_DEVICE_STATE,
    MIGRATION_INFO_PENDING_BYTES,
    REGION_SUBTYPE_MIGRATION,
    REGION_TYPE_MIGRATION,
    RegionState as State,
)

_STOP = State(0)
_PRE_COPY = State.RUNNING | State.SAVING
_ERROR = State.SAVING | State.RESUMING
_STATES = {
    _STOP: ("STOP", Condition.STOPPED),
    State.RUNNING: ("RUNNING", Condition.RUNS),
    State.SAVING: ("SAVING", Condition.STOPPED),
    _PRE_COPY: ("RUNNING|SAVING", Condition.RUNS),
    State.RESUMING: ("RESUMING", Condition.LOADING),
    _ERROR: ("the error state", Condition.FAILED),
}
_STATE_BITS = 0b111
"""The others are reserved, and kept as they are."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def migration_region(infos: Sequence[RegionInfo]) -> RegionInfo | None:
    """That region among those of a device."""
    kind = (REGION_TYPE_MIGRATION, REGION_SUBTYPE_MIGRATION)
    return next((info for info in infos if (info.type, info.subtype) == kind and info.size), None)


class MigrationRegionDevice(ReadableDevice[State]):
    """A device with the migration region; made by :meth:`open`."""

    _running = State.RUNNING
    _stopped = _STOP

    def __init__(self, access: Access, description: DeviceDescription, pci: PciSpace | None, region: Region) -> None:
        super().__init__(access, description, pci)
        self._region = region
        self._due: float = 0
        """Bytes that this round still has at most, as far as is known; 0 at its end."""
        self._offset = 0
        """Where the segment at hand begins in the region: one on its way out, or the place for one on its way in."""
        self._size = 0
        """Of the capture at hand; of one on its way in, as much as is left of it with what is in the region."""
        self._done = 0
        """How much of that was read, or is in the region."""

    @classmethod
    async def open(cls, access: Access, infos: Sequence[RegionInfo], info: RegionInfo) -> Self:
        """Open the device behind ``access``, with the answer of :func:`migration_region` among its regions. The caller
        closes the access where this fails; else it belongs to the device. Raises
        :class:`~vfiostream.errors.Incompatible` for a device that can't be moved.
        """
        if not (info.readable and info.writable and info.size > MIGRATION_INFO.size):
            raise blocker(
                access.name,
                f"its migration region, {info.index}, of {info.size} bytes is not one of more than "
                f"{MIGRATION_INFO.size} to be read and written",
            )
        description, pci = await describe(access, infos, "migration-region")
        return cls(access, description, pci, await Region.open(access, info, "migration region"))

    # ---- the header

    async def _get(self, what: str, offset: int, field: struct.Struct = _U64) -> int:
        raw = bytearray(field.size)
        with operation(self.name, f"get {what}"):
            await self._access.read_into(self._region.index, offset, memoryview(raw))
        value: int = field.unpack(raw)[0]
        return value

    async def _ask(self) -> State:
        bits = await self._get("device state", MIGRATION_INFO_DEVICE_STATE, _U32)
        state = State(bits & _STATE_BITS)
        if state not in _STATES:
            raise DeviceBroken(
                f"{self.name}: the device is in state {bits:#x}, which its interface does not have; see its driver"
            )
        return state

    async def _tell(self, state: State) -> None:
        reserved = await self._get("device state", MIGRATION_INFO_DEVICE_STATE, _U32) & ~_STATE_BITS
        await self._access.write(self._region.index, MIGRATION_INFO_DEVICE_STATE, _U32.pack(reserved | state))

    @staticmethod
    def _named(state: State) -> str:
        return _STATES[state][0]

    @staticmethod
    def _condition(state: State) -> Condition:
        return _STATES[state][1]

    async def _get_pending(self) -> int:
        return await self._get("pending bytes", MIGRATION_INFO_PENDING_BYTES)

    async def _get_offset(self) -> int:
        """Where data goes, or lies; raises DeviceBroken where that is no place for it."""
        offset = await self._get("data offset", MIGRATION_INFO_DATA_OFFSET)
        if not MIGRATION_INFO.size <= offset < self._region.size:
            raise DeviceBroken(
                f"{self.name}: the driver says that data is at {offset}, and that is not behind the header and in its "
                f"migration region of {self._region.size} bytes; this driver can't be moved"
            )
        return offset

    # ---- source

    async def _start_saving(self) -> None:
        await self._set(_PRE_COPY)

    async def begin_round(self) -> None:
        with self._calls.call("begin_round"):
            self._require_all_read()
            self._due = math.inf if self._state is State.SAVING else await self._get_pending()

    async def capture(self) -> int:
        with self._calls.call("capture"):
            self._require_all_read()
            self._size = self._done = 0
            if self._due <= 0:
                return 0
            pending = await self._get_pending()
            if pending:
                self._offset = await self._get_offset()
                self._size = await self._get_size(pending)
            self._due = self._due - self._size if self._size else 0
            return self._size

    async def _get_size(self, pending: int) -> int:
        size = await self._get("data size", MIGRATION_INFO_DATA_SIZE)
        if size > self._region.size - self._offset:
            raise DeviceBroken(
                f"{self.name}: the driver says that there are {size} bytes at {self._offset} of its migration region, "
                f"which has {self._region.size}; this driver can't be moved"
            )
        if not size and self._state is State.SAVING:
            raise DeviceBroken(
                f"{self.name}: the driver has stopped, says that {pending} bytes are pending and gives none; this "
                "driver can't be moved"
            )
        return size

    async def next(self, most: int) -> memoryview | None:
        with self._calls.call("next"):
            count = min(most, self._size - self._done)
            if not count:
                return memoryview(b"")
            got = self._region.view(self._offset + self._done, count)
            if got is not None:
                self._done += len(got)
            return got

    async def read(self, into: Sequence[memoryview]) -> int:
        with self._calls.call("read"):
            count = min(len(into[0]), self._size - self._done)
            await self._region.read(self._offset + self._done, into[0][:count])
            self._done += count
            return count

    async def pending(self) -> Pending | None:
        with self._calls.call("pending"):
            return Pending(0, await self._get_pending())

    async def quiesce(self) -> None:
        with self._calls.call("quiesce"):
            pass

    async def stop(self) -> None:
        with self._calls.call("stop"):
            self._require_all_read()
            await self._set(State.SAVING)

    def _require_all_read(self) -> None:
        if self._done < self._size:
            raise self._calls.misuse("the capture before was not read to its end")

    def _forget(self) -> None:
        self._due = self._size = self._done = 0

    # ---- target

    async def _start_loading(self) -> None:
        await self._set(State.RESUMING)

    async def begin_capture(self, size: int | None) -> None:
        with self._calls.call("begin_capture"):
            if size is None:
                raise Incompatible(
                    f"{self.name} takes captures of a known size, and the source's have none; use a target device of "
                    "the same kind"
                )
            self._require_all_written()
            self._size, self._done = size, 0
            if size:
                self._offset = await self._get_offset()

    def room(self, most: int) -> memoryview:
        self._calls.check("room")
        count = min(most, self._segment - self._done)
        if not count:
            return memoryview(b"")
        return self._region.view(self._offset + self._done, count) or memoryview(b"")

    def fill(self, count: int) -> bool:
        self._calls.check("fill")
        if count > self._segment - self._done:
            raise self._beyond(count)
        self._done += count
        if self._done == self._segment:
            self._calls.phase = Phase.FILLED
            return True
        return False

    async def deliver(self) -> None:
        with self._calls.call("deliver"):
            await self._set_data()

    async def write(self, data: Buffer) -> None:
        with self._calls.call("write"):
            rest = memoryview(data)
            while rest:
                count = min(len(rest), self._segment - self._done)
                if not count:
                    raise self._beyond(len(rest))
                await self._region.write(self._offset + self._done, rest[:count])
                self._done += count
                if self._done == self._segment:
                    await self._set_data()
                rest = rest[count:]

    @property
    def _segment(self) -> int:
        """Bytes of the capture that the driver takes at a time: all that is left, or as many as its region has."""
        return min(self._size, self._region.size - self._offset)

    async def _set_data(self) -> None:
        """The driver takes what is in the region; then comes the next place, if there is more."""
        with operation(self.name, f"set data size to {self._done}"):
            await self._access.write(self._region.index, MIGRATION_INFO_DATA_SIZE, _U64.pack(self._done))
        self._size -= self._done
        self._done = 0
        if self._size:
            self._offset = await self._get_offset()

    def _require_all_written(self) -> None:
        if self._size:
            raise self._calls.misuse("the capture before was not written to its end")

    async def finish_load(self) -> None:
        with self._calls.call("finish_load"):
            self._require_all_written()  # and what was written, the driver has taken

    async def run(self) -> None:
        with self._calls.call("run"):
            await self._set(State.RUNNING)

    # ---- both

    async def aclose(self) -> None:
        self._region.forget_areas()
        await super().aclose()
