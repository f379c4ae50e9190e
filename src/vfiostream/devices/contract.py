"""What a device that can move is, whatever interface its driver speaks.

A device gives its state in rounds. A round is a sequence of *captures*: ordered, opaque sequences of bytes, some of a
size that is known when they begin, some not (the first round is the whole, later ones hold what changed since); and at
the end there may be a *config* in one piece. The target takes captures in the same order, cut wherever the stream cut
them, and the config last. Every device passes the suite in ``tests/device_contract.py``.

States, and the only legal order of calls::

    source   idle --start_precopy--> tracking --quiesce--> quiet --stop--> stopped --release--> released
             stopped (or where a call failed) --quiesce--> waking; any of these --resume--> idle
    target   idle --start_load--> loading --finish_load--> loaded --quiesce--> quiet --run--> running
             any of these --abandon--> abandoned (stopped; never runs what it has)

Several devices that move together take each of these steps before any takes the next, because of what they may do to
each other while *quiet*.

After any failure or cancellation of a call, only ``quiesce``, ``resume`` or ``release`` (source) and ``abandon``
(target) are in order. A driver may begin to report dirty guest pages only when the first round has been read:
``merge_dirty`` comes after it, and guest memory is first read after it.

Bytes are not copied here where they lie in memory: what goes out is sent from where the driver put it, what comes in is
received where the driver will look for it. What has to be asked for by a call goes from and to memory of the caller's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple

from vfiostream.buffers import Buffer
from vfiostream.closing import Closing


@dataclass(frozen=True, slots=True)
class PciIdentity:
    """Who a PCI device is, from its config space."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    class_code: int
    """24 bits: base class, sub-class, programming interface."""
    revision: int


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """What one has to know of a device to say whether another can take its state."""

    interface: str
    """``"four-region"`` (2019), ``"migration-region"`` (Linux 5.8), ``"migration-states"`` (Linux 5.18)."""
    version: str | None
    """The driver's own version string; opaque. None where the driver has none."""
    device_memory: bool
    """Whether there are captures: the four regions' capability DEVICE_MEMORY; the other interfaces always have them."""
    dirty_tracking: bool
    """Whether it is reported which guest pages the device dirties: the four regions' capability SYSTEM_MEMORY; else a
    log of the device's own or of its IOMMU.
    """
    config_size: int
    """Bytes of its config now; 0 where the interface has none apart from the captures."""
    config_limit: int
    """Bytes of config it can take: the size of its config region."""
    pci: PciIdentity | None
    """None for a device that is not on PCI."""
    driver: str | None
    """Name of the kernel's driver; None where that is not known, as over vfio-user."""
    kernel: str | None
    """Release of the kernel that the driver is part of; None over vfio-user."""
    flags: tuple[str, ...]
    """What its driver can do, each once: ``device-memory``, ``system-memory`` (the four regions' capabilities);
    ``stop-copy``, ``p2p``, ``pre-copy`` (the migration states' flags); ``dma-log`` or ``iommu-log`` (who logs what it
    writes to guest memory, where the interface does not say it).
    """
    data_size: int | None
    """Bytes that it would give after a stop, as the driver estimates them; None where it can't be asked."""


@dataclass(frozen=True, slots=True)
class DescribedDevice:
    """A device that is not here: what a checkpoint or a description file says of it, which nobody vouches for."""

    name: str
    """Its address, where it was described."""
    description: DeviceDescription


def flag_names(flags: IntFlag) -> tuple[str, ...]:
    """The known ones of ``flags`` as a description has them: ``PRE_COPY`` is ``pre-copy``."""
    return tuple(flag.name.lower().replace("_", "-") for flag in type(flags) if flag.name and flag in flags)


class Pending(NamedTuple):
    """What a device says that it still has to give, in bytes."""

    initial: int
    """What the target should have before the source stops, so that the rest goes quickly."""
    rest: int
    """What it would give beyond that, if it were stopped now; estimated."""


class Device(Closing):
    """One device, open for one migration. Methods are called by one task at a time.

    Errors are those of :class:`vfiostream.access.contract.Access`, and
    :class:`~vfiostream.errors.LocalProtocolError` for calls out of order.
    """

    name: str
    description: DeviceDescription

    @property
    def caveat(self) -> str | None:
        """That of its access, as :attr:`vfiostream.access.contract.Access.caveat`."""
        return None

    # ---- source

    @abstractmethod
    async def start_precopy(self) -> None:
        """Start tracking what changes; the device goes on running. What an earlier session left behind is forgotten:
        the first round is the whole. Guest memory was mapped before.

        A device that is found stopped, where its interface says so, raises
        :class:`~vfiostream.errors.Incompatible`: another may run with its state. It is left as it is, and
        :meth:`resume` then leaves it, too; open it anew to let it run.
        """

    @abstractmethod
    async def begin_round(self) -> None:
        """Let :meth:`capture` give what there is to give now. The round before has been read to its end."""

    @abstractmethod
    async def capture(self) -> int | None:
        """Go on to the next capture of the round: returns its size in bytes, 0 where the round has no more, None where
        only its end will tell. The capture before must have been taken to its end. A round ends by itself, also of a
        device that changes all the time: with it comes at most what there was to give when it began, or little more.
        Only with ``description.device_memory``.
        """

    @abstractmethod
    async def next(self, most: int) -> memoryview | None:
        """The next bytes of the capture or config where they lie: at least one and at most ``most`` (more than 0) of
        them, or none at its end. None where they do not lie in memory: they are to be had with :meth:`read`. The caller
        asks until there are none.

        The bytes are the device's own and stay what they are until the next call to the device: whoever needs them
        longer copies them. The caller releases the view before that call. May return without having waited for
        anything.
        """

    @abstractmethod
    async def read(self, into: Sequence[memoryview]) -> int:
        """Copy the next bytes of the capture or config to these views (at least one, none empty): each is filled before
        the next gets any, and a device may leave all but the first alone. Returns how many bytes in all, 0 at its end.
        Fewer than fit are no sign of the end. The views are the device's while the call runs, and after a cancelled one
        they may hold anything.
        """

    @abstractmethod
    async def pending(self) -> Pending | None:
        """What the device says of itself, between two rounds or after the last; None for one that can't be asked
        without making it capture. Before the stop only.
        """

    @abstractmethod
    async def merge_dirty(self, iova: int, pages: int, bitmap: memoryview) -> None:
        """OR the guest pages the device has dirtied since it was last asked into ``bitmap`` (bit n is page n from
        ``iova``, little endian within bytes, ``ceil(pages / 8)`` bytes). Asking clears. Only with
        ``description.dirty_tracking``.
        """

    @abstractmethod
    async def quiesce(self) -> None:
        """Make no accesses to other devices any more (or not yet, on the way back and on the target), while it still
        answers theirs: ``RUNNING_P2P`` and ``PRE_COPY_P2P``. Does nothing where the interface has no such state.
        Quiet is running: on the target it comes after the commit.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Stop the device for good consistency; what it changed until now is still tracked. Runs on after
        :meth:`resume`.
        """

    @abstractmethod
    async def capture_config(self) -> int:
        """Let the driver collect its config, while stopped; returns its size in bytes, 0 where there is none.
        :meth:`next` and :meth:`read` then give it as they give a capture.
        """

    @abstractmethod
    async def read_pci_config(self) -> bytes | None:
        """PCI config space as it is now, or None for a device without one."""

    @abstractmethod
    async def release(self) -> None:
        """The target runs: stop tracking. The device stays stopped."""

    @abstractmethod
    async def resume(self) -> None:
        """The migration is off: stop tracking and run on. In order after any failed or cancelled call. It always
        tells the driver to run: whoever calls it knows that no other copy does.
        """

    # ---- target

    @abstractmethod
    async def accepts(self, version: str) -> bool:
        """Ask the driver whether it takes the stream of a device of this version. True where the driver has no
        versions to ask about. Changes nothing.
        """

    @abstractmethod
    async def start_load(self) -> None:
        """Stop the device, ready to take state."""

    @abstractmethod
    async def begin_capture(self, size: int | None) -> None:
        """A capture of ``size`` bytes follows (None: of as many as come before the next begins). Raises
        :class:`~vfiostream.errors.DeviceRefused` where it can't fit, and :class:`~vfiostream.errors.Incompatible` where
        captures of this interface always, or never, have a size.
        """

    @abstractmethod
    def room(self, most: int) -> memoryview:
        """Where the next bytes of the capture or config go: at most ``most`` (more than 0) of them, none where all that
        was announced is there, or there is no such place: then they are to be given with :meth:`write`.

        The place is the device's own, as that of :meth:`next`, and no driver looks at it: what is put there may be
        anything until :meth:`fill` says that it is right. Asking again gives the same place, until then. The caller
        releases the view before it calls :meth:`fill`.
        """

    @abstractmethod
    def fill(self, count: int) -> bool:
        """The first ``count`` bytes (more than 0) of the :meth:`room` are there, and right. Returns whether
        :meth:`deliver` comes next, before any other call but :meth:`abandon`. More than there was room for is a
        :class:`~vfiostream.errors.LocalProtocolError`.
        """

    @abstractmethod
    async def deliver(self) -> None:
        """Let the driver take what is there: a region is full, or the capture or config ends."""

    @abstractmethod
    async def write(self, data: Buffer) -> None:
        """Give ``data`` as the next bytes of the capture or config. More than was announced is a
        :class:`~vfiostream.errors.LocalProtocolError`.
        """

    @abstractmethod
    async def begin_config(self, size: int) -> None:
        """The config follows, ``size`` bytes, as a capture does; after all captures. The driver gets it in one piece
        when the last byte is there.
        """

    @abstractmethod
    async def load_pci_config(self, config: Buffer) -> None:
        """Restore what ``docs/architecture.md`` lists of PCI config space; BARs stay the target's."""

    @abstractmethod
    async def finish_load(self) -> None:
        """Everything was given. Raises where a capture or the config is not complete, or the driver finds fault with it
        now; after this only :meth:`run` is left to refuse.
        """

    @abstractmethod
    async def run(self) -> None:
        """Everything is loaded and committed: run. The driver may still refuse."""

    @abstractmethod
    async def abandon(self) -> None:
        """The load is off: leave the device stopped."""

    # ---- both

    @abstractmethod
    async def dma_map(self, iova: int, length: int, fd: int, offset: int) -> None:
        """Let the device reach guest memory, as :meth:`vfiostream.access.contract.Access.dma_map`: writable where it
        reports what it dirties (``description.dirty_tracking``), else only readable, so that nothing is lost.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of the device, in the state it is in; never raises, may be called again and under cancellation."""


def as_sequence(device: Device | Sequence[Device]) -> Sequence[Device]:
    """One device, or several that move together, as several."""
    return (device,) if isinstance(device, Device) else device
