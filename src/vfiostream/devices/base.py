"""What devices of every interface have in common: an access, the order of calls, PCI config space, guest memory."""

from __future__ import annotations

from vfiostream.access.contract import Access
from vfiostream.buffers import Buffer
from vfiostream.devices.calls import Calls, Phase
from vfiostream.devices.contract import Device, DeviceDescription
from vfiostream.devices.operations import operation
from vfiostream.devices.pci_space import PciSpace
from vfiostream.errors import Incompatible, LocalProtocolError


class BaseDevice(Device):
    """A device over ``access``, which belongs to it and is closed with it."""

    def __init__(self, access: Access, description: DeviceDescription, pci: PciSpace | None) -> None:
        self.name = access.name
        self.description = description
        self._access = access
        self._pci = pci
        self._calls = Calls(access.name)

    @property
    def caveat(self) -> str | None:
        return self._access.caveat

    async def read_pci_config(self) -> bytes | None:
        return None if self._pci is None else await self._pci.read()

    async def load_pci_config(self, config: Buffer) -> None:
        with self._calls.call("load_pci_config"):
            if self._pci is None:
                raise Incompatible(
                    f"{self.name} is not on PCI, and the source is; use a target device of the same kind"
                )
            await self._pci.restore(config)

    async def accepts(self, version: str) -> bool:
        with operation(self.name, "check of a version"):
            return await self._access.accepts_version(version)

    async def dma_map(self, iova: int, length: int, fd: int, offset: int) -> None:
        with operation(self.name, f"map {length} bytes of guest memory at {iova:#x}"):
            await self._access.dma_map(iova, length, fd, offset, writable=self.description.dirty_tracking)

    async def aclose(self) -> None:
        self._calls.phase = Phase.CLOSED
        await self._access.aclose()

    def _require_bitmap(self, pages: int, bitmap: memoryview) -> None:
        if not self.description.dirty_tracking:
            raise self._calls.misuse("it does not track dirty pages")
        if len(bitmap) != (pages + 7) // 8:
            raise self._calls.misuse(f"a bitmap of {len(bitmap)} bytes is not one of {pages} pages")

    def _beyond(self, count: int) -> LocalProtocolError:
        return self._calls.misuse(f"{count} bytes are more than was announced")
