"""What the tests of the reference device's migration states share: a device with them, called in line."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.vendor_operations import BAR0, SMALL, Direct
from vfiostream.uapi.vfio import Feature, FeatureOperation, MigrationState
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.settings import Settings

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = MigrationState
GET, SET, PROBE = FeatureOperation.GET, FeatureOperation.SET, FeatureOperation.PROBE


class Machine:
    """A device with migration states, called in line."""

    def __init__(self, device: ReferenceDevice) -> None:
        self.device = device
        self.driver = device.driver
        self.regions = Direct(device)

    @property
    def state(self) -> MigrationState:
        answer = self.driver.feature(GET | Feature.MIG_DEVICE_STATE, b"")
        state, fd = struct.unpack("<Ii", answer)
        assert fd == -1
        assert struct.unpack("<I", self.regions.read(BAR0, 32, 4))[0] == state
        return MigrationState(state)

    @property
    def digest(self) -> bytes:
        return self.regions.read(BAR0, 0, 32)

    @property
    def data_size(self) -> int:
        return int(struct.unpack("<Q", self.driver.feature(GET | Feature.MIG_DATA_SIZE, b""))[0])

    def go(self, *states: MigrationState) -> None:
        for state in states:
            self.driver.set_migration_state(state)

    def read(self, most: int = 1 << 16) -> bytes:
        into = bytearray(most)
        return bytes(into[: self.driver.read_data(memoryview(into))])

    def read_all(self, most: int = 1 << 16) -> bytes:
        """What there is, to the end, or to the end for now."""
        whole = b""
        while True:
            try:
                piece = self.read(most)
            except OSError as error:
                if error.errno == errno.ENOMSG and self.state in (PRE_COPY, PRE_COPY_P2P):
                    return whole
                raise
            if not piece:
                return whole
            whole += piece


@contextmanager
def machine(**changes: Any) -> Iterator[Machine]:
    device = ReferenceDevice(Settings(**{**SMALL, "interface": "migration-states", **changes}))
    try:
        yield Machine(device)
    finally:
        device.close()
