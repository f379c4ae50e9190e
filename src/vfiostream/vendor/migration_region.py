"""The migration region of Linux 5.8 to 5.17, from the driver's side.

One region: the header (``struct vfio_device_migration_info``), and from its second page on the data area. What goes
through it is the stream of ``stream``, in pieces as large as the area.

Decisions where the interface leaves a choice:

- A data area that was prepared stays as it is, however often ``data_offset`` is read, until ``pending_bytes`` is read
  again: then it is free, and its data taken for read.
- ``pending_bytes`` is estimated, and 0 only when there is nothing to give: for now while running, for good when
  stopped.
- Each of the five states may follow each other one, but: nothing goes back from stop-and-copy to pre-copy, and a load
  that was begun is left when it is whole. Leaving the saving states ends the session, all memory counts as dirty again.
- A driver that breaks shows SAVING | RESUMING, which is what the kernel's header calls the error state, until reset.
- There is no dirty bitmap in the region. The device logs its DMA as the features of Linux have it, which came later;
  it stands for the IOMMU that users of this interface asked.
"""

from __future__ import annotations

import errno
import logging
import struct

from vfiostream.buffers import Buffer
from vfiostream.uapi.four_region import PAGE_SIZE
from vfiostream.uapi.vfio import REGION_SUBTYPE_MIGRATION, REGION_TYPE_MIGRATION, Feature, RegionState
from vfiostream.vendor.dma_log import FEATURES, DmaLog
from vfiostream.vendor.driver import Driver
from vfiostream.vendor.hardware import Hardware
from vfiostream.vendor.regions import mappable_areas, staging_region
from vfiostream.vendor.settings import Operation
from vfiostream.vendor.stream import Incoming, Outgoing

logger = logging.getLogger("vfiostream.vendor")

DATA_OFFSET = PAGE_SIZE
"""Where the data area starts: it is mapped, the header is trapped."""

STOP = RegionState(0)
RUNNING = RegionState.RUNNING
PRE_COPY = RegionState.RUNNING | RegionState.SAVING
STOP_COPY = RegionState.SAVING
RESUMING = RegionState.RESUMING
ERROR = RegionState.SAVING | RegionState.RESUMING

_STATES = (STOP, RUNNING, PRE_COPY, STOP_COPY, RESUMING)
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class MigrationRegionDriver(Driver):
    """Region 9."""

    def __init__(self, hardware: Hardware) -> None:
        super().__init__(hardware)
        size = self.settings.memory_region
        areas = mappable_areas(size, self.settings.mmap, start=DATA_OFFSET)
        type_ = (REGION_TYPE_MIGRATION, REGION_SUBTYPE_MIGRATION)
        region = staging_region("migration", type_, DATA_OFFSET + size, areas, trapped=DATA_OFFSET)
        self.regions = (region,)
        assert region.view is not None
        self._area = region.view[DATA_OFFSET:]
        if self.settings.dirty_tracking:
            self.features = dict(FEATURES)
        self._log = DmaLog(hardware, self.strike)
        self._state = RUNNING
        self._outgoing: Outgoing | None = None
        self._incoming: Incoming | None = None
        self._prepared: int | None = None
        """Bytes in the data area for the client to read; None where it is free."""

    @property
    def state(self) -> int:
        return self._state

    def reset(self) -> None:
        self._log.forget()
        self._state = RUNNING
        self._outgoing = self._incoming = self._prepared = None

    def client_gone(self) -> None:
        self._log.forget()

    def break_down(self) -> None:
        self._state = ERROR
        self._outgoing = self._incoming = self._prepared = None

    def close(self) -> None:
        self._area.release()
        super().close()

    # ---- features

    def get_feature(self, feature: Feature, data: bytes) -> bytes:
        return self._log.report(data)

    def set_feature(self, feature: Feature, data: bytes) -> bytes:
        if feature is Feature.DMA_LOGGING_START:
            return self._log.start(data)
        self._log.stop()
        return data

    # ---- the header

    def read(self, index: int, offset: int, into: memoryview) -> None:
        match (offset, len(into)):
            case (0, 4):  # device_state
                into[:] = _U32.pack(self._state)
            case (4, 4):  # reserved
                into[:] = bytes(4)
            case (8, 8):  # pending_bytes
                into[:] = _U64.pack(self._pending())
            case (16, 8):  # data_offset
                into[:] = _U64.pack(self._data_offset())
            case (24, 8):  # data_size
                into[:] = _U64.pack(self._prepared or 0)
            case _:
                raise OSError(errno.EINVAL, f"a read of {len(into)} bytes at {offset} is not one of a field")

    def write(self, index: int, offset: int, data: Buffer) -> None:
        match (offset, len(data)):
            case (0, 4):  # device_state
                self._set_state(_U32.unpack(data)[0])
            case (24, 8):  # data_size
                self._take(_U64.unpack(data)[0])
            case _:
                raise OSError(errno.EINVAL, f"a write of {len(data)} bytes at {offset} is not one to a field")

    def _set_state(self, value: int) -> None:
        if value not in _STATES:
            raise OSError(errno.EINVAL, f"{value:#x} is not a device state")
        before, state = self._state, RegionState(value)
        if before == ERROR:
            raise OSError(errno.EINVAL, "the device is in its error state, which reset alone ends")
        if before == STOP_COPY and state == PRE_COPY:
            raise OSError(errno.EINVAL, "stop-and-copy does not go back to pre-copy")
        self.strike(Operation.SET_STATE)
        if state == before:
            return
        self.hardware.take_time(self.settings.state_time)
        if self._incoming is not None:
            self.hardware.set_content(self._incoming.complete())
            self._incoming = None
        with self.hardware.lock:
            self._prepared = None
            if not state & RegionState.SAVING:
                self._outgoing = None
                self.hardware.saving.forget()
            elif self._outgoing is None:
                self._outgoing = Outgoing(self.hardware)
            if state == RESUMING:
                self._incoming = Incoming(self.hardware)
            self.hardware.workload.run(bool(state & RegionState.RUNNING))
            self._state = state
        logger.debug("device state %d -> %d", before, state)

    # ---- save

    def _pending(self) -> int:
        self.strike(Operation.GET_PENDING)
        if self._outgoing is None:
            return 0
        self._prepared = None
        return self._outgoing.last_bytes() if self._state == STOP_COPY else sum(self._outgoing.left())

    def _data_offset(self) -> int:
        if self._outgoing is not None and self._prepared is None:
            self.strike(Operation.DATA_READ)
            self._prepared = self._outgoing.read(self._area, last=self._state == STOP_COPY)
        return DATA_OFFSET

    # ---- load

    def _take(self, size: int) -> None:
        if self._incoming is None:
            raise OSError(errno.EINVAL, f"no data is taken in state {int(self._state)}")
        if size > len(self._area):
            raise OSError(errno.EINVAL, f"{size} bytes are more than the {len(self._area)} of the data area")
        self.strike(Operation.DATA_WRITE)
        self._incoming.write(self._area[:size])
