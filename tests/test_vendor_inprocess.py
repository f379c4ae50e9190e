"""The in-process access onto the reference device."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator

import pytest

from tests.access_contract import AccessContract, Subject
from tests.vendor_operations import BITMAP, CONFIG, CONTROL, MEMORY, PAGE, SMALL
from vfiostream.errors import DeviceLost, DeviceRefused, DeviceTimeout
from vfiostream.uapi.four_region import NATURAL
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.settings import Settings, parse_fault


class InProcessSubject(Subject):
    """The reference device with one region of each kind. It writes guest memory as it likes, not as a test asks."""

    plain, whole, sparse = CONFIG, MEMORY, BITMAP

    def __init__(self) -> None:
        self.device = ReferenceDevice(Settings(**{**SMALL, "memory_region": 64 * PAGE, "bitmap_region": 8 * PAGE}))
        self.device.regions[CONFIG].mappable = ()
        self.device.regions[BITMAP].mappable = ((PAGE, 2 * PAGE), (4 * PAGE, PAGE))
        self.access = InProcessAccess(self.device)

    async def device_reads(self, iova: int, length: int) -> bytes:
        pytest.skip("the reference device reads no guest memory")

    async def device_writes(self, iova: int, data: bytes) -> None:
        pytest.skip("the reference device writes guest memory as it likes")


class TestInProcessAccess(AccessContract):
    @pytest.fixture
    async def subject(self) -> AsyncIterator[Subject]:
        subject = InProcessSubject()
        yield subject
        await subject.access.aclose()
        subject.device.close()


@pytest.mark.anyio
async def test_in_process_faults() -> None:
    faults = tuple(parse_fault(text) for text in ("get-caps:1:EIO", "get-caps:2:hang", "get-caps:3:exit"))
    device = ReferenceDevice(Settings(**SMALL, faults=faults))
    async with InProcessAccess(device) as access:
        into = memoryview(bytearray(4))
        with pytest.raises(DeviceRefused) as caught:
            await access.read_into(CONTROL, NATURAL.caps, into)
        assert caught.value.errno == errno.EIO
        with pytest.raises(DeviceTimeout):
            await access.read_into(CONTROL, NATURAL.caps, into)
        for _ in range(2):
            with pytest.raises(DeviceLost):
                await access.read_into(CONTROL, NATURAL.caps, into)
    device.close()
