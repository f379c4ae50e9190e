"""The migration states of Linux 5.18, from the driver's side.

Decisions where the interface leaves a choice:

- While quiet (``RUNNING_P2P``, ``PRE_COPY_P2P``) the device still changes its own memory, and writes no guest memory.
- In PRE_COPY each capture of what has changed ends with one ENOMSG, even if more has changed by then: a round ends.
- New initial bytes (REINIT) are reported, to a client that opted in, when most of the memory has changed since it was
  last captured.
- A stream that is not whole, or was refused, leaves the device in RESUMING when it is to stop: more of the stream may
  be written, or the device reset.
"""

from __future__ import annotations

import errno
import logging

from vfiostream.buffers import Buffer
from vfiostream.uapi.vfio import (
    FEATURE_DATA_SIZE,
    FEATURE_MIG_STATE,
    FEATURE_MIGRATION,
    Feature,
    FeatureOperation,
    MigrationFlags,
    MigrationState,
)
from vfiostream.vendor.capture import CONFIG_HEADER, largest_capture
from vfiostream.vendor.dma_log import FEATURES, DmaLog
from vfiostream.vendor.driver import Driver
from vfiostream.vendor.hardware import Hardware
from vfiostream.vendor.settings import Operation
from vfiostream.vendor.states import (
    OPENING,
    PRE_COPY,
    PRE_COPY_P2P,
    RESUMING,
    RUNNING,
    RUNNING_P2P,
    SAVING,
    STOP_COPY,
    path,
)
from vfiostream.vendor.stream import BLOCK_HEADER, Incoming, Outgoing

logger = logging.getLogger("vfiostream.vendor")

_RUNNING = (RUNNING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P)
_QUIET = (RUNNING_P2P, PRE_COPY_P2P)


class MigrationStatesDriver(Driver):
    """No regions; features and a stream of data."""

    def __init__(self, hardware: Hardware) -> None:
        super().__init__(hardware)
        get, set_ = FeatureOperation.GET, FeatureOperation.SET
        self.flags = self.settings.migration_flags
        self.features = {
            Feature.MIGRATION: get,
            Feature.MIG_DEVICE_STATE: get | set_,
            Feature.MIG_DATA_SIZE: get,
        }
        if MigrationFlags.PRE_COPY in self.flags:
            self.features[Feature.MIG_PRECOPY_INFO_V2] = set_
        if self.settings.dirty_tracking:
            self.features |= FEATURES
        self._log = DmaLog(hardware, self.strike)
        self._state = RUNNING
        self._outgoing: Outgoing | None = None
        self._incoming: Incoming | None = None
        self._end_told = True
        """Whether the end of the last capture was answered with ENOMSG."""
        self._opted_in = False

    @property
    def state(self) -> int:
        return self._state

    def reset(self) -> None:
        self._log.forget()
        self._state = RUNNING
        self._outgoing = self._incoming = None
        self._opted_in = False

    def client_gone(self) -> None:
        self._log.forget()
        self._opted_in = False

    def break_down(self) -> None:
        self._state = MigrationState.ERROR
        self._outgoing = self._incoming = None

    # ---- features

    def get_feature(self, feature: Feature, data: bytes) -> bytes:
        match feature:
            case Feature.MIGRATION:
                return FEATURE_MIGRATION.pack(self.flags)
            case Feature.MIG_DEVICE_STATE:
                return FEATURE_MIG_STATE.pack(self._state, -1)
            case Feature.MIG_DATA_SIZE:
                return FEATURE_DATA_SIZE.pack(self._last_bytes())
        return self._log.report(data)

    def set_feature(self, feature: Feature, data: bytes) -> bytes:
        match feature:
            case Feature.MIG_DEVICE_STATE:
                if len(data) != FEATURE_MIG_STATE.size:
                    raise OSError(errno.EINVAL, f"MIG_DEVICE_STATE has {len(data)} bytes")
                self.set_migration_state(FEATURE_MIG_STATE.unpack(data)[0])
            case Feature.MIG_PRECOPY_INFO_V2:
                self._opted_in = True
            case Feature.DMA_LOGGING_START:
                return self._log.start(data)
            case _:
                self._log.stop()
        return data

    def _last_bytes(self) -> int:
        if self._outgoing is not None:
            return self._outgoing.last_bytes()
        size = largest_capture(len(self.hardware.memory)) if self.hardware.memory else 0
        return size + BLOCK_HEADER.size + CONFIG_HEADER.size + self.hardware.config_size

    # ---- states

    def set_migration_state(self, state: int) -> bool:
        if state not in tuple(MigrationState):
            raise OSError(errno.EINVAL, f"{state} is not a migration state")
        way = path(self.flags, self._state, MigrationState(state))
        if way is None:
            raise OSError(errno.EINVAL, f"no way leads from {self._state.name} to {MigrationState(state).name}")
        opened = False
        for step in way:
            opened = self._go(step)
        return opened

    def _go(self, state: MigrationState) -> bool:
        """Go along one arc; returns whether that opened a stream of data."""
        before = self._state
        self.strike(Operation(f"{_text(before)}-to-{_text(state)}"))
        self.hardware.take_time(self.settings.state_time)
        if before is RESUMING:
            assert self._incoming is not None
            self.hardware.set_content(self._incoming.complete())
            self._incoming = None
        opened = (before, state) in OPENING
        with self.hardware.lock:
            if before in SAVING and state not in SAVING:
                self._outgoing = None
                self.hardware.saving.forget()
            if opened and state is RESUMING:
                self._incoming = Incoming(self.hardware)
            elif opened:
                self._outgoing = Outgoing(self.hardware)
                self._end_told = True
            self.hardware.workload.run(state in _RUNNING, quiet=state in _QUIET)
            self._state = state
        logger.debug("migration state %s -> %s", before.name, state.name)
        return opened

    # ---- data

    def read_data(self, into: memoryview) -> int:
        if self._outgoing is None:
            raise OSError(errno.EINVAL, f"in {self._state.name} there is no data to read")
        self.strike(Operation.DATA_READ)
        if self._state is STOP_COPY:
            return self._outgoing.read(into, last=True)
        at_end = self._outgoing.between_captures and not self._end_told
        count = 0 if at_end else self._outgoing.read(into, last=False)
        self._end_told = count == 0
        if not count:
            raise OSError(errno.ENOMSG, "there is nothing more for now")
        return count

    def write_data(self, data: Buffer) -> None:
        if self._incoming is None:
            raise OSError(errno.EINVAL, f"in {self._state.name} no data is taken")
        self.strike(Operation.DATA_WRITE)
        self._incoming.write(data)

    def precopy_info(self) -> tuple[bool, int, int]:
        if self._outgoing is None or self._state is STOP_COPY:
            raise OSError(errno.EINVAL, f"in {self._state.name} nothing is said of what is to come")
        again = self._opted_in and self._outgoing.begin_again()
        return (again, *self._outgoing.left())


def _text(state: MigrationState) -> str:
    return state.name.lower().replace("_", "-")
