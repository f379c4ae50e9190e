"""The access contract on the reference device, in this process and over vfio-user; in-process faults."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from threading import Thread
from typing import get_args

import pytest

from tests.access_contract import AccessContract, FeatureContract, FeatureSubject, Subject
from tests.vendor_operations import CONTROL, MEMORY, PAGE, SMALL
from vfiostream.access.contract import Access
from vfiostream.access.vfio_user import connect
from vfiostream.errors import DeviceLost, DeviceRefused, DeviceTimeout
from vfiostream.uapi.four_region import NATURAL
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.server import Server
from vfiostream.vendor.settings import Mmap, Settings, parse_fault


class ReferenceSubject(Subject):
    """The reference device. It writes guest memory as it likes, not as a test asks."""

    memory, unmappable = MEMORY, CONTROL

    def __init__(self, access: Access, mmap: Mmap) -> None:
        self.access = access
        self.whole = MEMORY if mmap == "whole" else None
        self.sparse = MEMORY if mmap == "sparse" else None

    async def device_reads(self, iova: int, length: int) -> bytes:
        pytest.skip("the reference device reads no guest memory")

    async def device_writes(self, iova: int, data: bytes) -> None:
        pytest.skip("the reference device writes guest memory as it likes")


@pytest.fixture(params=get_args(Mmap))
def mmap(request: pytest.FixtureRequest) -> Mmap:
    how: Mmap = request.param
    return how


@pytest.fixture
def device(mmap: Mmap) -> Iterator[ReferenceDevice]:
    made = ReferenceDevice(Settings(**{**SMALL, "memory_region": 64 * PAGE, "mmap": mmap}))
    yield made
    made.close()


class TestInProcessAccess(AccessContract):
    @pytest.fixture
    async def subject(self, device: ReferenceDevice, mmap: Mmap) -> AsyncIterator[Subject]:
        async with InProcessAccess(device) as access:
            yield ReferenceSubject(access, mmap)


class TestVfioUserAccess(AccessContract):
    @pytest.fixture
    async def subject(self, device: ReferenceDevice, mmap: Mmap, tmp_path: Path) -> AsyncIterator[Subject]:
        server = Server(device, str(tmp_path / "socket"))
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            async with await connect(str(tmp_path / "socket"), timeout=10) as access:
                yield ReferenceSubject(access, mmap)
        finally:
            server.close()
            thread.join()


class ReferenceFeatures(FeatureSubject):
    def __init__(self, access: Access, device: ReferenceDevice) -> None:
        self.access = access
        self._device = device

    async def device_writes_somewhere(self) -> None:
        self._device.workload.write(20)


@pytest.fixture(
    params=[
        {"interface": "migration-states"},
        {"interface": "migration-states", "states": ("stop-copy",), "dirty_tracking": False},
        {"interface": "migration-region"},
        {},
    ],
    ids=["states", "stop-copy", "region", "four-region"],
)
def featured(request: pytest.FixtureRequest) -> Iterator[ReferenceDevice]:
    device = ReferenceDevice(Settings(**{**SMALL, "memory": 400 * PAGE, **request.param}))
    yield device
    device.close()


class TestInProcessFeatures(FeatureContract):
    @pytest.fixture
    async def subject(self, featured: ReferenceDevice) -> AsyncIterator[FeatureSubject]:
        async with InProcessAccess(featured) as access:
            yield ReferenceFeatures(access, featured)


class TestVfioUserFeatures(FeatureContract):
    @pytest.fixture
    async def subject(self, featured: ReferenceDevice, tmp_path: Path) -> AsyncIterator[FeatureSubject]:
        server = Server(featured, str(tmp_path / "socket"))
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            async with await connect(str(tmp_path / "socket"), timeout=10) as access:
                yield ReferenceFeatures(access, featured)
        finally:
            server.close()
            thread.join()


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
