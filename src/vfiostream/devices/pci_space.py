"""PCI config space of a device that is open: read whole, and restored where :mod:`vfiostream.devices.pci` says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from vfiostream.access.contract import Access, RegionInfo
from vfiostream.buffers import Buffer
from vfiostream.devices import pci
from vfiostream.devices.contract import PciIdentity
from vfiostream.devices.operations import blocker, operation
from vfiostream.errors import Incompatible
from vfiostream.uapi.vfio import PCI_CONFIG_REGION


class PciSpace:
    """The config space of the device behind ``access``; made by :meth:`find`."""

    def __init__(self, access: Access, info: RegionInfo) -> None:
        self._access = access
        self._info = info
        self.identity: PciIdentity

    @classmethod
    async def find(cls, access: Access, infos: Sequence[RegionInfo]) -> Self | None:
        """That of a device with these regions; None for one that is not on PCI. Raises Incompatible for what is no
        config space of an endpoint.
        """
        if not access.info.is_pci:
            return None
        if len(infos) <= PCI_CONFIG_REGION:
            raise blocker(access.name, "it is a PCI device without config space")
        info = infos[PCI_CONFIG_REGION]
        if not (pci.MIN_SIZE <= info.size <= pci.MAX_SIZE and info.readable and info.writable):
            raise blocker(
                access.name,
                f"its PCI config space of {info.size} bytes is not one of {pci.MIN_SIZE} to {pci.MAX_SIZE} to be read "
                "and written",
            )
        space = cls(access, info)
        try:
            space.identity = pci.identity(await space.read())
        except Incompatible as error:
            raise blocker(access.name, str(error)) from error
        return space

    async def read(self) -> bytes:
        """All of it."""
        config = bytearray(self._info.size)
        with operation(self._access.name, "read PCI config space"):
            await self._access.read_into(self._info.index, 0, memoryview(config))
        return bytes(config)

    async def restore(self, config: Buffer) -> None:
        """Write what moves of ``config``, that of the source; raises Incompatible where the two are not alike."""
        name = self._access.name
        current = await self.read()
        try:
            writes = pci.restore_writes(bytes(config), current)
        except Incompatible as error:
            raise Incompatible(f"{name}: {error}; use a target device of the same kind") from error
        for offset, data in writes:
            with operation(name, f"restore {len(data)} bytes of PCI config space at {offset:#04x}"):
                await self._access.write(self._info.index, offset, data)
