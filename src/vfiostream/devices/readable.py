"""What the interfaces of Linux 5.8 and 5.18 have in common: the state of a device can be asked, not only told.

So nothing here rests on what we believe that the device does. A change that fails is followed by a question, and the
error says where the device is now. And a device that is found stopped is not started as the source of a migration: it
may have moved away, and another run with its state. Who knows better says so, with ``resume`` on a device that was
opened anew.

What a state says of who runs is its :class:`Condition`; all but RUNS are *stopped for certain*. FAILED is left by a
reset alone, and so is LOADING, where the driver has not got all. A reset loses the state: a source is never reset here;
a target may be, as what it has is a copy.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from enum import Enum
from typing import Generic, TypeVar

from vfiostream.access.contract import Access, RegionInfo
from vfiostream.devices.base import BaseDevice
from vfiostream.devices.calls import Phase
from vfiostream.devices.contract import DeviceDescription
from vfiostream.devices.dma_log import DmaLog
from vfiostream.devices.operations import blocker, logger, operation
from vfiostream.devices.pci_space import PciSpace
from vfiostream.errors import DeviceBroken, DeviceError, DeviceRefused, Incompatible
from vfiostream.uapi.vfio import Feature, FeatureOperation

S = TypeVar("S", bound=int)


class Condition(Enum):
    """What a state says of a device; the values are for messages."""

    RUNS = "runs"
    STOPPED = "is stopped"
    LOADING = "is in a load that was not finished"
    FAILED = "has failed"


_ADVICE = {
    Condition.STOPPED: "another may run with its state; only if none does, let it run with `vfiostream device resume`",
    Condition.LOADING: "what it has is nobody's state: load it again, or let its guest or VMM reset it",
    Condition.FAILED: "only a reset gets it out of there, and that loses its state: let its guest or VMM reset it",
}


async def describe(
    access: Access,
    infos: Sequence[RegionInfo],
    interface: str,
    flags: tuple[str, ...] = (),
    data_size: int | None = None,
) -> tuple[DeviceDescription, PciSpace | None]:
    """The description of a device with these regions, all of whose state comes in captures; and its config space."""
    pci = await PciSpace.find(access, infos)
    logs = await _logs(access)
    with operation(access.name, "read the driver's own version"):
        version = await access.version()
    described = DeviceDescription(
        interface=interface,
        version=version,
        device_memory=True,
        dirty_tracking=bool(logs),
        config_size=0,
        config_limit=0,
        pci=None if pci is None else pci.identity,
        driver=access.info.driver,
        kernel=access.info.kernel,
        flags=(*flags, *logs),
        data_size=data_size,
    )
    return described, pci


async def _logs(access: Access) -> tuple[str, ...]:
    """Who logs the device's DMA, as a flag; none where nobody does."""
    with operation(access.name, "ask for a log of its DMA"):
        if not await access.can_log_dma():
            return ()
    try:
        with operation(access.name, "ask for a log of its own"):
            await access.feature(FeatureOperation.PROBE | FeatureOperation.SET, Feature.DMA_LOGGING_START)
    except DeviceRefused:
        return ("iommu-log",)
    return ("dma-log",)


class ReadableDevice(BaseDevice, Generic[S]):
    """A device with the states ``S``. A subclass says how they are asked and told, and moves the bytes."""

    _running: S
    _stopped: S

    def __init__(self, access: Access, description: DeviceDescription, pci: PciSpace | None) -> None:
        super().__init__(access, description, pci)
        self._log = DmaLog(access)
        self._state: S | None = None
        """Where the device is; None while that is not known."""
        self._untouched = False
        """Whether a session was to start, and the device was not found running: then it is left as it is."""
        self._loading = False
        """Whether what the device has is from our load, so that it may be reset."""

    # ---- what a subclass has

    @abstractmethod
    async def _ask(self) -> S:
        """Where the device is."""

    @abstractmethod
    async def _tell(self, state: S) -> None:
        """Put the device in ``state``."""

    @staticmethod
    @abstractmethod
    def _named(state: S) -> str:
        """What the interface's header calls it."""

    @staticmethod
    @abstractmethod
    def _condition(state: S) -> Condition: ...

    @abstractmethod
    async def _start_saving(self) -> None:
        """The device runs: let it tell its state from now on."""

    @abstractmethod
    async def _start_loading(self) -> None:
        """The device may be anywhere but in a load or failed: let it take state from now on."""

    @abstractmethod
    def _forget(self) -> None:
        """Nothing more of what was begun is read or written."""

    # ---- states

    async def _where(self) -> S:
        self._state = None
        with operation(self.name, "get device state"):
            self._state = await self._ask()
        return self._state

    async def _set(self, state: S, advice: str = "its driver's log may say why") -> None:
        """Put the device in ``state``; where the driver refuses, say where the device is now."""
        self._state = None
        what = f"set device state to {self._named(state)}"
        try:
            with operation(self.name, what):
                await self._tell(state)
        except DeviceRefused as error:
            try:
                now = await self._where()
            except DeviceError as unknown:
                hint = f"and where it is now is not known ({unknown}); {advice}"
                raise DeviceRefused(self.name, what, error.errno, hint) from error
            if self._condition(now) is Condition.FAILED:
                raise DeviceBroken(f"{error}; it is in {self._named(now)} now: {_ADVICE[Condition.FAILED]}") from error
            raise DeviceRefused(self.name, what, error.errno, f"it is in {self._named(now)} now; {advice}") from error
        self._state = state

    def _it_is(self, now: S) -> str:
        condition = self._condition(now)
        return f"it {condition.value} ({self._named(now)}): {_ADVICE[condition]}"

    # ---- source

    async def start_precopy(self) -> None:
        self._calls.check("start_precopy")
        self._untouched = True
        now = await self._where()
        if self._condition(now) is not Condition.RUNS:
            raise blocker(self.name, self._it_is(now))
        self._untouched = False
        with self._calls.call("start_precopy"):
            if now != self._running:
                await self._set(self._running)
            await self._log.start()
            await self._start_saving()

    async def merge_dirty(self, iova: int, pages: int, bitmap: memoryview) -> None:
        with self._calls.call("merge_dirty"):
            self._require_bitmap(pages, bitmap)
            if pages and not self._log.running:
                raise self._calls.misuse("no guest memory was mapped before it began to track")
            await self._log.merge(iova, pages, bitmap)

    async def capture_config(self) -> int:
        with self._calls.call("capture_config"):
            return 0

    async def release(self) -> None:
        with self._calls.call("release"):
            self._forget()
            try:
                await self._set(self._stopped)
            finally:
                await self._log.stop()

    async def resume(self) -> None:
        self._calls.check("resume")
        if self._untouched:
            return
        if self._calls.phase is Phase.IDLE:
            now = await self._where()
            if self._condition(now) in (Condition.LOADING, Condition.FAILED):
                raise DeviceBroken(f"{self.name} can't be let run: {self._it_is(now)}")
        with self._calls.call("resume"):
            self._forget()
            await self._set(self._running)
            await self._log.stop()

    # ---- target

    async def start_load(self) -> None:
        with self._calls.call("start_load"):
            if self._condition(await self._where()) in (Condition.LOADING, Condition.FAILED):
                await self._reset()
            await self._start_loading()
            self._loading = True

    async def _reset(self) -> None:
        """Reset a target that did not come out of a load; what it has is lost, and meant to be."""
        self._state = None
        with operation(self.name, "reset"):
            await self._access.reset()
        now = await self._where()
        if self._condition(now) is Condition.LOADING:  # some reset the device, and leave the state
            await self._set(self._stopped)
        elif self._condition(now) is Condition.FAILED:
            raise DeviceBroken(f"{self.name}: it is in {self._named(now)}, and a reset has left it there; see its host")

    async def begin_config(self, size: int) -> None:
        with self._calls.call("begin_config"):
            raise Incompatible(
                f"{self.name} takes no config apart from its other state, and the source has one of {size} bytes; use "
                "a target device of the same kind"
            )

    async def abandon(self) -> None:
        with self._calls.call("abandon"):
            self._forget()
            if self._state == self._stopped:
                return
            try:
                await self._set(self._stopped)
            except (DeviceRefused, DeviceBroken) as error:
                if self._state is None:
                    raise
                if self._condition(self._state) is not Condition.RUNS:
                    logger.info("%s: it will not run: %s", self.name, error)
                elif self._loading:
                    await self._reset()
                    await self._set(self._stopped)
                else:
                    raise

    # ---- both

    async def dma_map(self, iova: int, length: int, fd: int, offset: int) -> None:
        await super().dma_map(iova, length, fd, offset)
        if self.description.dirty_tracking:
            self._log.add(iova, length)
