"""The kernel's own sample device, a PCI card with serial ports, by hand: its migration state, and a register."""

from __future__ import annotations

import struct

from tests.kernel.raw_vfio import FEATURE_GET, FEATURE_SET, RawDevice

MIGRATION = 1
MIG_DEVICE_STATE = 2
STOP, RUNNING, STOP_COPY, RESUMING = 1, 2, 3, 4
PORTS = (0, 1)
"""A port's registers are the BAR of its number."""
SCRATCH = 7
"""The register of a port that keeps what is written."""


def set_state(device: RawDevice, state: int) -> int:
    """Returns the data file descriptor, -1 if there is no new one."""
    payload = struct.pack("<Ii", state, -1)
    fd: int = struct.unpack("<Ii", device.feature(MIG_DEVICE_STATE, FEATURE_SET, payload))[1]
    return fd


def get_state(device: RawDevice) -> int:
    state: int = struct.unpack("<Ii", device.feature(MIG_DEVICE_STATE, FEATURE_GET, bytes(8)))[0]
    return state
