"""The four-region device-state interface of 2019: numbers and layouts.

From the cover letter and patch 1 of "QEMU VFIO live migration" (Yan Zhao, 2019-02-19), as decided in
``docs/architecture.md``. Bytes and tables only: nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

REGION_TYPE = 1 << 1
"""``VFIO_REGION_TYPE_DEVICE_STATE``. Linux later gave the number to CCW: see the checks in ``devices.four_region``."""

PAGE_SIZE = 4096
"""What ``page_nr`` and the bits of a dirty bitmap count."""

INTERFACE_VERSION = 1


class Subtype(IntEnum):
    """The four regions, in the order of their subtypes."""

    CONTROL = 1
    CONFIG = 2
    MEMORY = 3
    BITMAP = 4


class Caps(IntFlag):
    """``caps`` of the control region."""

    DEVICE_MEMORY = 1
    SYSTEM_MEMORY = 2


class State(IntEnum):
    """``device_state``: RUNNING or STOP, each with or without the modifier LOGGING (2)."""

    RUNNING = 0
    STOP = 1
    RUNNING_LOGGING = 2
    STOP_LOGGING = 3

    @property
    def logging(self) -> bool:
        return bool(self & 2)

    @property
    def running(self) -> bool:
        return not self & 1


class Action(IntEnum):
    """What a write to an ``action`` field asks for. GET_BITMAP has no field: writing ``page_nr`` triggers it."""

    GET_BUFFER = 1
    SET_BUFFER = 2
    GET_BITMAP = 3


@dataclass(frozen=True, slots=True)
class ControlLayout:
    """Offsets of the fields of ``struct vfio_device_state_ctl``; u32 unless said."""

    name: str
    size: int
    version: int
    device_state: int
    caps: int
    config_action: int
    config_size: int
    """u64"""
    memory_action: int
    memory_size: int
    """u64"""
    memory_pos: int
    """u64"""
    start_addr: int
    """u64"""
    page_nr: int
    """u64"""


NATURAL = ControlLayout("natural", 72, 0, 4, 8, 16, 24, 32, 40, 48, 56, 64)
PACKED = ControlLayout("packed", 60, 0, 4, 8, 12, 16, 24, 28, 36, 44, 52)

VERSION_SUBTYPE = 0x56465356
"""Subtype of the version region, in the vendor's own type (``REGION_TYPE_PCI_VENDOR | vendor id``).

Our way to have the thread's ``version`` attribute (lines 12425-12450) where there is no sysfs: reading the region gives
the version string, padded with NULs; writing a foreign string in one write at offset 0 is answered with an errno where
the driver can't take that device's stream. The number is far from the small ones that vendors count their subtypes
with (Intel's OpRegion and NVIDIA's NVLink memory are subtype 1), and the region is believed only beside the four.
"""
MAX_VERSION = 4096
"""Longest version string in bytes; also the size of the region."""
