"""The reference device: hardware, a driver of the interface chosen, and the regions that every PCI device has.

A stand-in for a vendor's driver and hardware, whoever asks it (``server`` over vfio-user, ``inprocess`` for tests). It
refuses with OSError; the errno is what a client gets, the text is for the log of the driver.

Reset makes a fresh device: the first content, running, no session, no load, PCI config space as at power-on. DMA
mappings stay, they are the client's.
"""

from __future__ import annotations

import errno
import logging
import struct

from vfiostream.buffers import Buffer
from vfiostream.uapi.vfio import PCI_BAR0_REGION, PCI_CONFIG_REGION, PCI_NUM_REGIONS
from vfiostream.vendor import pci
from vfiostream.vendor.driver import Driver
from vfiostream.vendor.four_region import FourRegionDriver
from vfiostream.vendor.hardware import DIGEST_SIZE, Hardware
from vfiostream.vendor.migration_region import MigrationRegionDriver
from vfiostream.vendor.migration_states import MigrationStatesDriver
from vfiostream.vendor.regions import Region
from vfiostream.vendor.settings import Interface, Settings
from vfiostream.vendor.stream import BLOCK
from vfiostream.vendor.workload import Workload

logger = logging.getLogger("vfiostream.vendor")

NUM_IRQS = 5
"""The five of a PCI device, with no interrupt in any of them."""

_DRIVERS: dict[Interface, type[Driver]] = {
    "four-region": FourRegionDriver,
    "migration-region": MigrationRegionDriver,
    "migration-states": MigrationStatesDriver,
}
_U32 = struct.Struct("<I")


class ReferenceDevice:
    """One device, running from the start. :meth:`close` it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        chunk = settings.memory_region if settings.interface == "four-region" else BLOCK
        self._hardware = Hardware(settings, chunk)
        self.driver = _DRIVERS[settings.interface](self._hardware)
        self._closed = False
        regions = [Region() for _ in range(PCI_NUM_REGIONS)]
        regions[PCI_BAR0_REGION] = Region(pci.BAR0_SIZE, readable=True)
        regions[PCI_CONFIG_REGION] = Region(pci.SIZE, readable=True, writable=True)
        self.regions = (*regions, *self.driver.regions)

    @property
    def workload(self) -> Workload:
        return self._hardware.workload

    @property
    def state(self) -> int:
        """The device state, in the numbers of the interface."""
        return self.driver.state

    def read(self, index: int, offset: int, into: memoryview) -> None:
        """Read ``len(into)`` bytes of a region. Raises OSError, Hang, Exit."""
        region = self._checked(index, offset, len(into), "read")
        if region.view is not None and offset >= region.trapped:
            into[:] = region.view[offset : offset + len(into)]
        elif index == PCI_CONFIG_REGION:
            into[:] = self._hardware.pci.read(offset, len(into))
        elif index == PCI_BAR0_REGION:
            into[:] = self._read_bar0(offset, len(into))
        else:
            self.driver.read(index, offset, into)

    def write(self, index: int, offset: int, data: Buffer) -> None:
        """Write to a region; returns when what it asks for is done. Raises OSError, Hang, Exit."""
        region = self._checked(index, offset, len(data), "write")
        if not region.writable:
            raise OSError(errno.EPERM, f"region {index} can't be written")
        if region.view is not None and offset >= region.trapped:
            region.view[offset : offset + len(data)] = data
        elif index == PCI_CONFIG_REGION:
            self._hardware.pci.write(offset, data)
        else:
            self.driver.write(index, offset, data)

    def dma_map(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
        """Map guest memory; the caller keeps ``fd``. Raises OSError."""
        with self._hardware.lock:
            self._hardware.guest.map(iova, length, fd, offset, writable=writable)

    def dma_unmap(self, iova: int, length: int) -> None:
        """Take back mappings; they are not accessed after this returns. Raises OSError."""
        with self._hardware.lock:
            self._hardware.guest.unmap(iova, length)

    def client_gone(self) -> None:
        """The client went away: its guest memory is not ours any more. All else stays as it is."""
        self._hardware.client_gone()
        self.driver.client_gone()

    def reset(self) -> None:
        """``VFIO_DEVICE_RESET``; see above."""
        with self._hardware.lock:
            self.driver.reset()
            self._hardware.power_on()
        logger.debug("device was reset")

    def digest(self) -> bytes:
        """BLAKE2b of device memory and config content, as they are now."""
        return self._hardware.digest()

    def interrupt(self) -> None:
        """As :meth:`~.hardware.Hardware.interrupt`."""
        self._hardware.interrupt()

    def close(self) -> None:
        """Let go of everything; a call that waits in another thread ends with ENODEV. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._hardware.close()
        self.driver.close()

    def _checked(self, index: int, offset: int, count: int, what: str) -> Region:
        if not 0 <= index < len(self.regions):
            raise OSError(errno.EINVAL, f"there is no region {index}")
        region = self.regions[index]
        if count <= 0 or offset < 0 or offset + count > region.size:
            raise OSError(
                errno.EINVAL, f"a {what} of {count} bytes at {offset} leaves the {region.size} of region {index}"
            )
        return region

    def _read_bar0(self, offset: int, count: int) -> bytes:
        """The digest, and after it the device state, a u32."""
        content = bytearray(pci.BAR0_SIZE)
        if offset < DIGEST_SIZE:
            content[:DIGEST_SIZE] = self.digest()
        _U32.pack_into(content, DIGEST_SIZE, self.state)
        return bytes(content[offset : offset + count])
