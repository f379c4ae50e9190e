"""Devices that write guest memory when they are told to, so that what they report can be held against it."""

from __future__ import annotations

import secrets
import struct

from vfiostream.access.contract import Access
from vfiostream.errors import DeviceRefused

_U64 = struct.Struct("<Q")

# The four-region driver in tests/kernel: its registers, in README.md there.
REGISTERS = 2
_SIZE = 0x8000
_ID = 0x4E47_5234
_AT_ID, _AT_IOVA, _AT_LENGTH, _AT_PATTERN, _AT_KICK = 0x00, 0x08, 0x10, 0x18, 0x28
_FILL_GUEST = 1
_PAGE = 4096


async def ring(access: Access, iova: int, length: int) -> bool:
    """Have the device write some of the guest memory mapped from ``iova`` on; returns whether it has such a doorbell.
    When this returns, it has been written.
    """
    if access.info.num_regions <= REGISTERS or (await access.region_info(REGISTERS)).size != _SIZE:
        return False
    raw = bytearray(_U64.size)
    try:
        await access.read_into(REGISTERS, _AT_ID, memoryview(raw))
    except DeviceRefused:
        return False
    if _U64.unpack(raw)[0] != _ID:
        return False
    # Less than all of it, and not from its start, so that what is told can be wrong by too much and by a shift.
    for register, value in (
        (_AT_IOVA, iova + 3 * _PAGE),
        (_AT_LENGTH, min(17 * _PAGE, length - 3 * _PAGE)),
        (_AT_PATTERN, secrets.randbits(62)),
        (_AT_KICK, _FILL_GUEST),
    ):
        await access.write(REGISTERS, register, _U64.pack(value))
    return True
