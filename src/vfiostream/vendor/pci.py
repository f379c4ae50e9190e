"""PCI config space of the reference device: who it is, one BAR, and two interrupt capabilities.

The ids are not registered with the PCI-SIG: they are for a device that exists only behind a vfio-user socket. It raises
no interrupt; the MSI and MSI-X capabilities are there because what a guest wrote to them is state that a move has to
carry. The MSI-X table in BAR 0 can't be written: vfio has its user keep that, and set vectors up by SET_IRQS.
"""

from __future__ import annotations

import struct

from vfiostream.buffers import Buffer

SIZE = 256
VENDOR = 0x5653
DEVICE = 0x0001
CLASS = 0x120000
"""Processing accelerator."""
REVISION = 1
BAR0_SIZE = 4096

MSI = 0x50
MSIX = 0x70

_COMMAND_WRITABLE = 0x0546
"""Memory space, bus master, parity error response, SERR#, interrupt disable. There is no I/O space to enable."""


def _layout() -> tuple[bytes, bytes]:
    """Values at power-on, and the mask of the bits a guest may write."""
    values, masks = bytearray(SIZE), bytearray(SIZE)

    def put(format_: str, offset: int, value: int, mask: int = 0) -> None:
        struct.pack_into(format_, values, offset, value)
        struct.pack_into(format_, masks, offset, mask)

    put("<H", 0x00, VENDOR)
    put("<H", 0x02, DEVICE)
    put("<H", 0x04, 0, _COMMAND_WRITABLE)
    put("<H", 0x06, 0x0010)  # status: there is a capability list
    put("<I", 0x08, CLASS << 8 | REVISION)
    put("<B", 0x0C, 0, 0xFF)  # cache line size
    put("<I", 0x10, 0, 0x1_0000_0000 - BAR0_SIZE)  # 32-bit memory; the bits below its size are fixed, which sizes it
    put("<H", 0x2C, VENDOR)
    put("<H", 0x2E, DEVICE)
    put("<B", 0x34, MSI)
    put("<B", 0x3C, 0xFF, 0xFF)  # interrupt line
    put("<B", 0x3D, 1)  # INTA#

    put("<B", MSI, 0x05)
    put("<B", MSI + 1, MSIX)
    put("<H", MSI + 2, 0x0180, 0x0001)  # one vector, 64-bit addresses, maskable; enable
    put("<I", MSI + 4, 0, 0xFFFF_FFFC)
    put("<I", MSI + 8, 0, 0xFFFF_FFFF)
    put("<H", MSI + 12, 0, 0xFFFF)
    put("<I", MSI + 16, 0, 0x1)  # mask bits of one vector; the pending bits that follow are read only

    put("<B", MSIX, 0x11)
    put("<B", MSIX + 1, 0)
    put("<H", MSIX + 2, 0x0003, 0xC000)  # four vectors; function mask and enable
    put("<I", MSIX + 4, 0x800)  # table and pending bits in BAR 0
    put("<I", MSIX + 8, 0xC00)
    return bytes(values), bytes(masks)


_POWER_ON, _WRITABLE = _layout()


class ConfigSpace:
    """256 bytes, of which some bits can be written. The caller checks bounds."""

    def __init__(self) -> None:
        self._values = bytearray(_POWER_ON)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self._values[offset : offset + count])

    def write(self, offset: int, data: Buffer) -> None:
        for position, byte in enumerate(data, offset):
            mask = _WRITABLE[position]
            self._values[position] = self._values[position] & ~mask | byte & mask

    def reset(self) -> None:
        self._values[:] = _POWER_ON
