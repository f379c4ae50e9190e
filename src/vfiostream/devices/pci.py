"""PCI config space: who a device is, and what of its config space moves with it.

What is restored, in which order and why, is the table in ``docs/architecture.md``. Bytes only: nothing here does I/O.
Both config spaces come from outside (a stream, a device), so nothing in them is believed before it is checked; what
can't be is an :class:`~vfiostream.errors.Incompatible` that does not name the device, which the caller adds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vfiostream.devices.contract import PciIdentity
from vfiostream.errors import Incompatible

MIN_SIZE = 64
MAX_SIZE = 4096
"""Bytes of config space: the header alone, and with the extended space of PCI Express."""
MAX_CAPABILITIES = 48
"""Longest capability list: 4 bytes each, between the header and the end of the first 256 bytes."""

_STANDARD_SIZE = 256
"""Capabilities of the list lie within the first 256 bytes."""

_COMMAND = 0x04
_COMMAND_MOVED = 0x0547
"""I/O, memory, bus master, parity error response, SERR#, INTx disable."""
_STATUS = 0x06
_STATUS_CAPABILITIES = 0x0010
_CACHE_LINE_SIZE = 0x0C
_HEADER_TYPE = 0x0E
_HEADER_TYPE_MASK = 0x7F
_CAPABILITIES = 0x34
_INTERRUPT_LINE = 0x3C

_MSI = 0x05
_MSI_ENABLE = 0x0001
_MSI_VECTORS = 0x000E
_MSI_VECTORS_ENABLED = 0x0070
_MSI_64_BIT = 0x0080
_MSI_MASKABLE = 0x0100
_MSIX = 0x11
_MSIX_SIZE = 12
_MSIX_VECTORS = 0x07FF
_MSIX_MASK_AND_ENABLE = 0xC000

_U16 = struct.Struct("<H")
_IDENTITY = struct.Struct("<HH4xI32xHH")
"""Vendor, device; revision and class at 8; subsystem vendor and subsystem at 0x2c."""


def identity(config: bytes) -> PciIdentity:
    """Who the device with this config space is; raises Incompatible for what is no config space of an endpoint."""
    if not MIN_SIZE <= len(config) <= MAX_SIZE:
        raise Incompatible(f"PCI config space has {len(config)} bytes, not {MIN_SIZE} to {MAX_SIZE}")
    if kind := config[_HEADER_TYPE] & _HEADER_TYPE_MASK:
        raise Incompatible(f"PCI config space is of header type {kind}, and only endpoints (type 0) can be moved")
    vendor, device, class_and_revision, subsystem_vendor, subsystem = _IDENTITY.unpack_from(config)
    return PciIdentity(
        vendor=vendor,
        device=device,
        subsystem_vendor=subsystem_vendor,
        subsystem=subsystem,
        class_code=class_and_revision >> 8,
        revision=class_and_revision & 0xFF,
    )


def restore_writes(saved: bytes, current: bytes) -> list[tuple[int, bytes]]:
    """The writes, (offset, data) in this order, that bring what moves of ``saved`` to the device whose config space is
    ``current``.

    Raises :class:`~vfiostream.errors.Incompatible` when the two are not the same kind of device or their interrupt
    capabilities are laid out differently.
    """
    theirs, ours = identity(saved), identity(current)
    for what, their, our in (
        ("vendor", f"{theirs.vendor:#06x}", f"{ours.vendor:#06x}"),
        ("device", f"{theirs.device:#06x}", f"{ours.device:#06x}"),
        ("class", f"{theirs.class_code:#08x}", f"{ours.class_code:#08x}"),
    ):
        if their != our:
            raise Incompatible(f"the saved PCI config space is of {what} {their}, and this device's of {our}")
    interrupts, here = _interrupts(saved), _interrupts(current)
    if interrupts != here:
        raise Incompatible(
            f"the interrupt capabilities differ: the saved PCI config space has {interrupts}, here {here}"
        )

    writes = [(_CACHE_LINE_SIZE, saved[_CACHE_LINE_SIZE : _CACHE_LINE_SIZE + 2])]
    writes.append((_INTERRUPT_LINE, saved[_INTERRUPT_LINE : _INTERRUPT_LINE + 1]))
    if interrupts.msi is not None:
        msi = interrupts.msi
        writes += [(offset, saved[offset : offset + length]) for offset, length in msi.registers]
        writes.append(_merged(saved, current, msi.offset + 2, _MSI_ENABLE | _MSI_VECTORS_ENABLED))
    if interrupts.msix is not None:
        writes.append(_merged(saved, current, interrupts.msix.offset + 2, _MSIX_MASK_AND_ENABLE))
    writes.append(_merged(saved, current, _COMMAND, _COMMAND_MOVED))
    return writes


@dataclass(frozen=True, slots=True)
class _Msi:
    """Layout of an MSI capability."""

    offset: int
    is_64_bit: bool
    maskable: bool
    vectors: int
    """Of which as many can be enabled."""

    @property
    def size(self) -> int:
        return 10 + 4 * self.is_64_bit + 10 * self.maskable

    @property
    def registers(self) -> list[tuple[int, int]]:
        """(offset, length) of address, upper address, data and mask bits, as far as there are such."""
        registers = [(4, 4), (8, 4), (12, 2), (16, 4)] if self.is_64_bit else [(4, 4), (8, 2), (12, 4)]
        return [(self.offset + at, length) for at, length in registers[: None if self.maskable else -1]]

    def __str__(self) -> str:
        return (
            f"MSI at {self.offset:#04x} ({64 if self.is_64_bit else 32} bit, {self.vectors} vectors, "
            f"{'' if self.maskable else 'not '}maskable)"
        )


@dataclass(frozen=True, slots=True)
class _Msix:
    """Layout of an MSI-X capability."""

    offset: int
    vectors: int

    def __str__(self) -> str:
        return f"MSI-X at {self.offset:#04x} ({self.vectors} vectors)"


@dataclass(frozen=True, slots=True)
class _Interrupts:
    msi: _Msi | None
    msix: _Msix | None

    def __str__(self) -> str:
        return " and ".join(str(one) for one in (self.msi, self.msix) if one is not None) or "none"


def _interrupts(config: bytes) -> _Interrupts:
    offsets = _capability_offsets(config)
    msi, msix = None, None
    if (offset := offsets.get(_MSI)) is not None:
        control = _u16(config, offset + 2)
        vectors = 1 << ((control & _MSI_VECTORS) >> 1)
        msi = _Msi(offset, bool(control & _MSI_64_BIT), bool(control & _MSI_MASKABLE), vectors)
        _require_room(config, offset, msi.size)
    if (offset := offsets.get(_MSIX)) is not None:
        _require_room(config, offset, _MSIX_SIZE)
        msix = _Msix(offset, (_u16(config, offset + 2) & _MSIX_VECTORS) + 1)
    return _Interrupts(msi, msix)


def _capability_offsets(config: bytes) -> dict[int, int]:
    """Offsets of the capabilities by their ids; of several with an id, the first."""
    offsets: dict[int, int] = {}
    if not _u16(config, _STATUS) & _STATUS_CAPABILITIES:
        return offsets
    offset = config[_CAPABILITIES] & ~3
    for _ in range(MAX_CAPABILITIES):
        if offset == 0:
            return offsets
        if offset < MIN_SIZE:
            raise Incompatible(f"the PCI capability list leads into the header, to {offset:#04x}")
        _require_room(config, offset, 4)
        offsets.setdefault(config[offset], offset)
        offset = config[offset + 1] & ~3
    if offset:
        raise Incompatible(f"the PCI capability list has more than {MAX_CAPABILITIES} entries or runs in a circle")
    return offsets


def _require_room(config: bytes, offset: int, length: int) -> None:
    end = min(len(config), _STANDARD_SIZE)
    if offset + length > end:
        raise Incompatible(f"the PCI capability at {offset:#04x} has {length} bytes, and the space ends at {end:#04x}")


def _merged(saved: bytes, current: bytes, offset: int, mask: int) -> tuple[int, bytes]:
    """A write of the 16 bits at ``offset``: those of ``mask`` as saved, the others as they are."""
    return offset, _U16.pack(_u16(saved, offset) & mask | _u16(current, offset) & ~mask & 0xFFFF)


def _u16(config: bytes, offset: int) -> int:
    value: int = _U16.unpack_from(config, offset)[0]
    return value
