"""How a device is reached: regions that can be read, written and mapped, and DMA mappings.

An access knows nothing of migration. vfio-user is one; the kernel's file descriptors and an in-process device for tests
are others. Every access passes the suite in ``tests/access_contract.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from vfiostream.buffers import Buffer
from vfiostream.closing import Closing


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
    """``VFIO_DEVICE_GET_INFO``."""

    is_pci: bool
    can_reset: bool
    num_regions: int
    num_irqs: int


class Access(Closing):
    """A device that is open.

    Errors: :class:`~vfiostream.errors.DeviceRefused` when the device answers with an errno,
    :class:`~vfiostream.errors.DeviceLost` when it is gone, :class:`~vfiostream.errors.DeviceTimeout` when it does not
    answer within the access's time limit, :class:`~vfiostream.errors.DeviceBroken` when the answer makes no sense.

    Cancellation: a call that was started reaches the device whole or not at all. A cancelled call may still take
    effect; the next call waits for it first. So after a cancellation, writing the state wanted is always in order. A
    transfer that is split is as many calls: of a cancelled one, the first pieces may have taken effect.
    """

    name: str
    """How the user would write it (``vfio-user:/run/gpu.sock``)."""

    info: DeviceInfo

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

    @abstractmethod
    async def aclose(self) -> None:
        """Let go; never raises; may be called again and under cancellation. Mapped views become invalid."""
