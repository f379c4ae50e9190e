"""The migration region: the device contract over both accesses, and what it says to the driver."""

from __future__ import annotations

import struct
from typing import ClassVar

import pytest

from tests.device_contract import Opener, ReadableContract, SizedContract, in_process, over_vfio_user
from vfiostream.vendor.device import ReferenceDevice

pytestmark = pytest.mark.anyio


REGION = 9


class RegionContract(SizedContract, ReadableContract):
    interface = "migration-region"
    numbers: ClassVar = {"running": 1, "stopped": 0, "stopped and saving": 2, "loading": 4}

    def tell(self, one: ReferenceDevice, state: int) -> None:
        one.write(REGION, 0, struct.pack("<I", state))


class TestInProcess(RegionContract):
    @pytest.fixture
    def opened(self) -> Opener:
        return in_process()


class TestOverVfioUser(RegionContract):
    @pytest.fixture
    def opened(self) -> Opener:
        return over_vfio_user()
