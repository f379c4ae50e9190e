"""How a device is reached: regions, DMA mappings, and what ``VFIO_DEVICE_FEATURE`` offers.

An access knows no interface of migration: it carries what one asks, whatever that means. vfio-user is one; the kernel's
file descriptors and an in-process device for tests are others. Every access passes the suite in
``tests/access_contract.py``.

Only what has several forms is more than a plain feature: the data of a migration (a file descriptor, or messages) and
the log of what the device writes by DMA (pointers, or messages; the device's own, or its IOMMU's).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vfiostream.buffers import Buffer
from vfiostream.closing import Closing
from vfiostream.uapi.vfio import FeatureOperation


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """One region of a device, as ``VFIO_DEVICE_GET_REGION_INFO`` describes it."""

    index: int
    size: int
    """Bytes; 0 for a region the device does not have."""
    readable: bool
    writable: bool
    type: int | None = None
    """Of its type capability; None for a region without one (the first nine of a PCI device)."""
    subtype: int | None = None
    mappable: tuple[tuple[int, int], ...] = ()
    """(offset, length) of the areas that can be mapped; empty where mmap is refused."""


@dataclass(frozen=True, slots=True)
class MappedArea:
    """A piece of a region in our address space; valid until the access is closed."""

    offset: int
    view: memoryview
    """Shared and writable where the region is. Belongs to the access: release slices before closing it."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """``VFIO_DEVICE_GET_INFO``, and what is known of who answers."""

    is_pci: bool
    can_reset: bool
    num_regions: int
    num_irqs: int
    driver: str | None = None
    """Name of the kernel's driver. None where that is not known: a server of vfio-user does not tell what it is."""
    kernel: str | None = None
    """Release of the kernel that this driver is part of. None over vfio-user: the driver is a program there, and which
    kernel it runs on says nothing of it.
    """


class PrecopyInfo(NamedTuple):
    """``vfio_precopy_info``."""

    reinit: bool
    """``VFIO_PRECOPY_INFO_REINIT``: there are new initial bytes. Only from a driver that was opted in to say so
    (``VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2``).
    """
    initial: int
    """Bytes that the target should have before the source stops."""
    dirty: int
    """Bytes beyond them that there are now, estimated."""


class MigrationData(Closing):
    """The bytes of a device's state, one way: out of it in PRE_COPY and STOP_COPY, into it in RESUMING. A stream: where
    the bytes are cut means nothing.

    Errors and cancellation are those of :class:`Access`; a call that was cancelled may have moved bytes, so the state
    that was being moved is of no use after it.
    """

    @abstractmethod
    async def read_into(self, into: Sequence[memoryview]) -> int:
        """Read some bytes into these views, at least one: each is filled before the next gets any, and an access may
        leave all but the first alone. Returns how many bytes in all, 0 only where nothing was read: that is the end in
        STOP_COPY. In PRE_COPY a driver that has nothing for now refuses with ENOMSG, or returns 0: so decide by the
        state. What it refuses after the first bytes is not raised, as with ``readv(2)``: it is asked again by the next
        call.
        """

    @abstractmethod
    async def write(self, data: Buffer) -> None:
        """Write all of ``data``."""

    @abstractmethod
    async def precopy_info(self) -> PrecopyInfo:
        """``VFIO_MIG_GET_PRECOPY_INFO``: in PRE_COPY only. ENOTTY where neither driver nor access has it."""

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of it; the device's state stays what it is. Never raises; may be called again."""


class Access(Closing):
    """A device that is open.

    Errors: :class:`~vfiostream.errors.DeviceRefused` when the device answers with an errno,
    :class:`~vfiostream.errors.DeviceLost` when it is gone, :class:`~vfiostream.errors.DeviceTimeout` when it does not
    answer within the access's time limit, :class:`~vfiostream.errors.DeviceBroken` when the answer makes no sense.

    Cancellation: a call that was started reaches the device whole or not at all. A cancelled call may still take
    effect; the next call waits for it first. So after a cancellation, writing the state wanted is always in order. A
    transfer that is split is as many calls: of a cancelled one, the first pieces may have taken effect.

    Buffers are used only while a call runs, with one exception: after a DeviceTimeout of the kernel's, its buffer may
    be in use until a later call has returned (:mod:`vfiostream.access.kernel`).
    """

    name: str
    """How the user would write it (``vfio-user:/run/gpu.sock``)."""

    info: DeviceInfo

    @property
    def caveat(self) -> str | None:
        """What has to be said with every result that comes of it, in one sentence: that its answers are not a device's
        own, for one. It may come up while the access is used.
        """
        return None

    @abstractmethod
    async def region_info(self, index: int) -> RegionInfo:
        """Describe region ``index`` (0 to ``info.num_regions`` - 1)."""

    @abstractmethod
    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        """Read exactly ``len(into)`` bytes of region ``index`` at ``offset``. Split where the access has a limit; a
        read of at most 8 bytes, or one that fits the limit, is one operation for the device.
        """

    @abstractmethod
    async def write(self, index: int, offset: int, data: Buffer) -> None:
        """Write ``data`` to region ``index`` at ``offset``; returns when the device has done what the write asks for.
        Split as in :meth:`read_into`.
        """

    @abstractmethod
    async def map(self, info: RegionInfo) -> Sequence[MappedArea]:
        """Map the areas of ``info.mappable``, ordered by offset. Areas that can't be mapped are left out: the caller
        reads and writes there instead. Mapping a region twice gives the same areas.
        """

    @abstractmethod
    async def dma_map(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
        """Let the device reach ``length`` bytes of file ``fd`` at ``offset`` under the addresses from ``iova`` on. The
        caller keeps ``fd``; it may close it after this returns.
        """

    @abstractmethod
    async def dma_unmap(self, iova: int, length: int) -> None:
        """Take back a mapping of :meth:`dma_map`; the device makes no access to it after this returns."""

    @abstractmethod
    async def reset(self) -> None:
        """``VFIO_DEVICE_RESET``."""

    # ---- VFIO_DEVICE_FEATURE: a device that does not have one refuses with ENOTTY

    @abstractmethod
    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        """``VFIO_DEVICE_FEATURE``: get, set or probe ``feature``. ``data`` is what is passed after the header; a GET
        returns ``size`` bytes, everything else none. Not for what has a method of its own below.
        """

    @abstractmethod
    async def set_migration_state(self, state: int) -> MigrationData | None:
        """Set ``VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE``; returns when the device is in that state. With it comes the
        data of a migration where the driver opens one (None: the one before goes on, or there is none). After a failure
        the device may be in a state on the way: ask which. The caller closes the data.
        """

    @abstractmethod
    async def can_log_dma(self) -> bool:
        """Whether there is a log of what the device writes by DMA: its own, or else its IOMMU's."""

    @abstractmethod
    async def start_dma_log(self, page_size: int, ranges: Sequence[tuple[int, int]], *, anew: bool = True) -> None:
        """Log the device's writes to ``ranges``, (IOVA, length) in whole pages, apart from each other, in pages of
        ``page_size`` or smaller ones. A log that runs already is begun anew; or, unless ``anew``, the device is left to
        refuse.
        """

    @abstractmethod
    async def read_dma_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        """OR what was written since the last call into ``bitmap`` (bit n is page n from ``iova``, little endian within
        bytes, a whole number of 64-bit words). Asking clears.
        """

    @abstractmethod
    async def stop_dma_log(self) -> None:
        """End the log; nothing where none runs."""

    # ---- the version of the device, as the 2019 thread proposed it: outside of any region

    async def version(self) -> str | None:
        """The driver's own version string, where the access has a way to read it (the ``version`` attribute of a
        mediated device's type); None where there is none.
        """
        return None

    async def accepts_version(self, version: str) -> bool:
        """Ask the driver whether it takes the stream of a device of ``version``; True where it has no such way."""
        return True

    @abstractmethod
    async def aclose(self) -> None:
        """Let go; never raises; may be called again and under cancellation. Mapped views become invalid."""
