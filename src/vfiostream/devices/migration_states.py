"""The migration states of Linux 5.18 as a device: ``VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`` and a stream of bytes.

The stream of a session is one, from its first byte in PRE_COPY to its last in STOP_COPY; rounds are our own cuts of it.
In PRE_COPY a round goes on until the driver has nothing for now, or has given as much as it said when the round began;
in STOP_COPY until it is at its end. Without PRE_COPY, rounds before the stop have nothing.

From ``include/uapi/linux/vfio.h``; which changes of state there are is ``vfio_mig_get_next_state()``. The driver walks
over states between by itself.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from typing import Self

from vfiostream.access.contract import Access, MigrationData, PrecopyInfo, RegionInfo
from vfiostream.buffers import Buffer
from vfiostream.devices.contract import DeviceDescription, Pending, flag_names
from vfiostream.devices.operations import blocker, logger, operation
from vfiostream.devices.pci_space import PciSpace
from vfiostream.devices.readable import Condition, ReadableDevice, describe
from vfiostream.errors import DeviceBroken, DeviceRefused, Incompatible
from vfiostream.uapi.vfio import (
    FEATURE_DATA_SIZE,
    FEATURE_MIG_STATE,
    FEATURE_MIGRATION,
    Feature,
    FeatureOperation,
    MigrationFlags,
    MigrationState as State,
)

MAX_UNTOLD_ROUND = 1 << 30
"""Bytes after which a round before the stop ends, of a driver that does not say how much it has: as many as it gives in
a round is for the policy to judge.
"""

_CONDITIONS = {
    State.ERROR: Condition.FAILED,
    State.STOP: Condition.STOPPED,
    State.RUNNING: Condition.RUNS,
    State.STOP_COPY: Condition.STOPPED,
    State.RESUMING: Condition.LOADING,
    State.RUNNING_P2P: Condition.RUNS,
    State.PRE_COPY: Condition.RUNS,
    State.PRE_COPY_P2P: Condition.RUNS,
}
_PRE_COPY = (State.PRE_COPY, State.PRE_COPY_P2P)
_STREAMING = (*_PRE_COPY, State.STOP_COPY, State.RESUMING)
_NO_SUCH_FEATURE = (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""What drivers and servers without a feature answer: the kernel says ENOTTY, servers of vfio-user are not so sure."""


async def migration_flags(access: Access) -> MigrationFlags | None:
    """What the driver behind ``access`` can do with the migration states; None where it has none."""
    try:
        with operation(access.name, "get migration flags"):
            raw = await access.feature(FeatureOperation.GET, Feature.MIGRATION, size=FEATURE_MIGRATION.size)
    except DeviceRefused as error:
        if error.errno not in _NO_SUCH_FEATURE:
            raise
        return None
    return MigrationFlags(FEATURE_MIGRATION.unpack(raw)[0])


async def _stop_copy_length(access: Access) -> int | None:
    """How much there is to read after a stop, by the driver's estimate; None where that can't be asked."""
    try:
        with operation(access.name, "get migration data size"):
            raw = await access.feature(FeatureOperation.GET, Feature.MIG_DATA_SIZE, size=FEATURE_DATA_SIZE.size)
    except DeviceRefused as error:
        logger.debug("%s", error)
        return None
    length: int = FEATURE_DATA_SIZE.unpack(raw)[0]
    return length


class MigrationStatesDevice(ReadableDevice[State]):
    """A device with the migration states; made by :meth:`open`."""

    _running = State.RUNNING
    _stopped = State.STOP

    def __init__(
        self, access: Access, description: DeviceDescription, pci: PciSpace | None, flags: MigrationFlags
    ) -> None:
        super().__init__(access, description, pci)
        self._pre_copy = MigrationFlags.PRE_COPY in flags
        self._p2p = MigrationFlags.P2P in flags
        self._data: MigrationData | None = None
        self._due: float = 0
        """Bytes that this round still has, by what the driver told: at 0 it is asked once more, below it is its end."""
        self._capturing = False
        self._ended = False
        """Whether the stream is at its end."""

    @classmethod
    async def open(cls, access: Access, flags: MigrationFlags, infos: Sequence[RegionInfo]) -> Self:
        """Open the device behind ``access``, with the answer of :func:`migration_flags` and its regions. The caller
        closes the access where this fails; else it belongs to the device. Raises
        :class:`~vfiostream.errors.Incompatible` for a device that can't be moved.
        """
        if MigrationFlags.STOP_COPY not in flags:
            raise blocker(access.name, f"its driver can't save its state (migration flags {flags:#x})")
        size = await _stop_copy_length(access)
        description, pci = await describe(access, infos, "migration-states", flag_names(flags), size)
        return cls(access, description, pci, flags)

    # ---- states

    async def _ask(self) -> State:
        raw = await self._access.feature(FeatureOperation.GET, Feature.MIG_DEVICE_STATE, size=FEATURE_MIG_STATE.size)
        number, _ = FEATURE_MIG_STATE.unpack(raw)
        try:
            return State(number)
        except ValueError as error:
            raise DeviceBroken(
                f"{self.name}: the device is in state {number}, which is not known here; is its kernel newer than this "
                "program?"
            ) from error

    async def _tell(self, state: State) -> None:
        data = await self._access.set_migration_state(state)
        before = self._data
        if data is not None or state not in _STREAMING:
            self._data = data
            if before is not None:
                await before.aclose()

    @staticmethod
    def _named(state: State) -> str:
        return state.name

    @staticmethod
    def _condition(state: State) -> Condition:
        return _CONDITIONS[state]

    def _stream(self) -> MigrationData:
        if self._data is None:
            raise DeviceBroken(f"{self.name}: the driver has changed the state and opened no stream for it")
        return self._data

    # ---- source

    async def _start_saving(self) -> None:
        self._ended = False
        if self._pre_copy:
            await self._opt_in()
            await self._set(State.PRE_COPY)
            self._stream()

    async def _opt_in(self) -> None:
        """Let the driver say when it has new initial bytes; without this it keeps such a change for the stop."""
        try:
            with operation(self.name, "opt in to new initial bytes"):
                await self._access.feature(FeatureOperation.SET, Feature.MIG_PRECOPY_INFO_V2)
        except DeviceRefused as error:
            logger.debug("%s", error)

    async def begin_round(self) -> None:
        with self._calls.call("begin_round"):
            self._require_all_read()
            if self._state is State.STOP_COPY:
                self._due = 0 if self._ended else math.inf
            elif self._pre_copy:
                info = await self._precopy_info()
                self._due = MAX_UNTOLD_ROUND if info is None else info.initial + info.dirty

    async def capture(self) -> int | None:
        with self._calls.call("capture"):
            self._require_all_read()
            self._capturing = self._due > 0
            return None if self._capturing else 0

    async def next(self, most: int) -> memoryview | None:
        with self._calls.call("next"):
            return None if self._capturing else memoryview(b"")

    async def read(self, into: Sequence[memoryview]) -> int:
        with self._calls.call("read"):
            if not self._capturing:
                return 0
            count = await self._read(self._of_this_round(into))
            self._due -= count
            if not count:
                self._ended = self._state is State.STOP_COPY
                self._due = 0
            self._capturing = count > 0 and self._due >= 0
            return count

    def _of_this_round(self, into: Sequence[memoryview]) -> Sequence[memoryview]:
        """Those of ``into`` that would be read, one at a time, before the round ends."""
        room = 0
        for count, view in enumerate(into):
            if room > self._due:
                return into[:count]
            room += len(view)
        return into

    async def _read(self, into: Sequence[memoryview]) -> int:
        try:
            with operation(self.name, f"read at most {sum(map(len, into))} bytes of its state"):
                return await self._stream().read_into(into)
        except DeviceRefused as error:
            if error.errno == errno.ENOMSG and self._state in _PRE_COPY:
                return 0
            raise

    async def pending(self) -> Pending | None:
        with self._calls.call("pending"):
            info = await self._precopy_info() if self._pre_copy else None
            length = await _stop_copy_length(self._access)
            if info is None and length is None:
                return None
            initial, dirty = (0, 0) if info is None else (info.initial, info.dirty)
            return Pending(initial, dirty + (length or 0))

    async def _precopy_info(self) -> PrecopyInfo | None:
        """What there is to read before the stop; None where that can't be asked."""
        try:
            with operation(self.name, "get precopy info"):
                info = await self._stream().precopy_info()
        except DeviceRefused as error:
            logger.debug("%s", error)
            return None
        logger.debug("%s: %s", self.name, info)
        return info

    async def quiesce(self) -> None:
        with self._calls.call("quiesce"):
            if self._p2p:
                await self._set(State.PRE_COPY_P2P if self._state in _PRE_COPY else State.RUNNING_P2P)

    async def stop(self) -> None:
        with self._calls.call("stop"):
            self._require_all_read()
            before = self._data
            await self._set(State.STOP_COPY)
            if before is not None and self._stream() is not before:
                raise DeviceBroken(
                    f"{self.name}: the driver has begun another stream at the stop, so what was read before is of no "
                    "use; was the device reset meanwhile?"
                )
            self._stream()

    def _require_all_read(self) -> None:
        if self._capturing:
            raise self._calls.misuse("the capture before was not read to its end")

    def _forget(self) -> None:
        self._capturing, self._due = False, 0

    # ---- target

    async def _start_loading(self) -> None:
        await self._set(State.RESUMING)
        self._stream()

    async def begin_capture(self, size: int | None) -> None:
        with self._calls.call("begin_capture"):
            if size:
                raise Incompatible(
                    f"{self.name} takes captures whose size is not known, and the source's has {size} bytes; use a "
                    "target device of the same kind"
                )
            self._capturing = size is None

    def room(self, most: int) -> memoryview:
        self._calls.check("room")
        return memoryview(b"")

    def fill(self, count: int) -> bool:
        self._calls.check("fill")
        raise self._beyond(count)

    async def deliver(self) -> None:
        with self._calls.call("deliver"):
            pass

    async def write(self, data: Buffer) -> None:
        with self._calls.call("write"):
            if len(data) and not self._capturing:
                raise self._beyond(len(data))
            with operation(self.name, f"write {len(data)} bytes of its state"):
                await self._stream().write(data)

    async def finish_load(self) -> None:
        with self._calls.call("finish_load"):
            await self._set(State.STOP, "the state that it was given is not whole, or not of a device like this one")

    async def run(self) -> None:
        with self._calls.call("run"):
            await self._set(State.RUNNING)

    # ---- both

    async def aclose(self) -> None:
        if self._data is not None:
            await self._data.aclose()
        await super().aclose()
