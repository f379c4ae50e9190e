"""Kernel access on a kernel's real VFIO: through a group and a device's own node, with two drivers."""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import anyio
import pytest
from anyio import wait_all_tasks_blocked

import vfiostream
from tests.access_contract import IOVA, PAGE, AccessContract, Subject, guest_memory, pattern, read
from tests.kernel.conftest import MakeMdev
from tests.kernel.mdev import Mdev
from vfiostream.access import open_access
from vfiostream.access.contract import Access, MigrationData
from vfiostream.access.kernel_calls import Kernel
from vfiostream.access.kernel_host import list_devices
from vfiostream.cli import main
from vfiostream.devices import open_device
from vfiostream.errors import DeviceRefused, UsageError
from vfiostream.uapi.vfio import Feature, FeatureOperation, MigrationFlags, MigrationState

pytestmark = pytest.mark.anyio
TIMEOUT = 20.0
MEMORY, REGISTERS, PCI_CONFIG, CONTROL, STAGED = 0, 2, 7, 9, 11
"""Regions of the four-region driver: device memory, registers, and the interface's."""
REG_IOVA, REG_LENGTH, REG_OFFSET, REG_KICK = 0x08, 0x10, 0x20, 0x28
TO_GUEST, FROM_GUEST = 2, 3
SCRATCH = 7
"""Register of mtty's serial port that keeps what is written."""

Address: TypeAlias = Callable[[Mdev], str]


@pytest.fixture(params=["group", "node"])
def address(request: pytest.FixtureRequest) -> Address:
    """The two ways to a device, as addresses that force each."""
    if request.param == "group":
        return lambda mdev: f"vfio:{mdev.group.name}/{mdev.uuid}"
    return lambda mdev: f"vfio:{mdev.cdev}"


@contextmanager
def nothing_left_open() -> Iterator[None]:
    def descriptors() -> set[str]:
        links = set()
        for number in os.listdir("/proc/self/fd"):
            try:
                links.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
            except FileNotFoundError:
                pass  # the one that was listed with
        return {link for link in links if "vfio" in link or "iommu" in link or "mig" in link}

    before = descriptors()
    yield
    assert descriptors() == before


class FourRegionSubject(Subject):
    """Its device memory is BAR 0, and it copies between that and guest memory when it is told to, by whole pages."""

    memory, unmappable = MEMORY, CONTROL

    def __init__(self, access: Access, how: str) -> None:
        self.access = access
        self.whole = STAGED if how == "whole" else None
        self.sparse = STAGED if how == "sparse" else None

    async def device_reads(self, iova: int, length: int) -> bytes:
        await self._copy(FROM_GUEST, iova, length)
        return await read(self.access, MEMORY, 0, length)

    async def device_writes(self, iova: int, data: bytes) -> None:
        await self.access.write(MEMORY, 0, data)
        await self._copy(TO_GUEST, iova, len(data))

    async def _copy(self, kick: int, iova: int, length: int) -> None:
        whole = -(-length // PAGE) * PAGE
        for register, value in ((REG_IOVA, iova), (REG_LENGTH, whole), (REG_OFFSET, 0), (REG_KICK, kick)):
            await self.access.write(REGISTERS, register, struct.pack("<Q", value))


class TestFourRegionAccess(AccessContract):
    @pytest.fixture(params=["whole", "sparse", "none"])
    def how(self, request: pytest.FixtureRequest) -> str:
        how: str = request.param
        return how

    @pytest.fixture
    async def subject(self, mdev: MakeMdev, address: Address, how: str) -> AsyncIterator[Subject]:
        types = {"whole": "four-region-16M-packed", "sparse": "four-region-16M-sparse", "none": "four-region-16M-nomap"}
        device = mdev(types[how])
        with nothing_left_open():
            async with await open_access(address(device), timeout=TIMEOUT) as access:
                yield FourRegionSubject(access, how)


@pytest.fixture
async def mtty(mdev: MakeMdev, address: Address) -> AsyncIterator[Access]:
    with nothing_left_open():
        async with await open_access(address(mdev("mtty-2")), timeout=TIMEOUT) as access:
            yield access


@pytest.fixture
async def other_mtty(mdev: MakeMdev, address: Address) -> AsyncIterator[Access]:
    async with await open_access(address(mdev("mtty-2")), timeout=TIMEOUT) as access:
        yield access


@pytest.fixture
async def four_region(mdev: MakeMdev, address: Address) -> AsyncIterator[FourRegionSubject]:
    async with await open_access(address(mdev("four-region-16M")), timeout=TIMEOUT) as access:
        yield FourRegionSubject(access, "whole")


async def start(access: Access, state: MigrationState) -> MigrationData:
    data = await access.set_migration_state(state)
    assert data is not None
    return data


async def state_of(access: Access) -> MigrationState:
    answer = await access.feature(FeatureOperation.GET, Feature.MIG_DEVICE_STATE, size=8)
    return MigrationState(struct.unpack("<Ii", answer)[0])


async def read_all(data: MigrationData) -> bytes:
    whole, buffer = b"", bytearray(16)
    while size := await data.read_into([memoryview(buffer)]):
        whole += buffer[:size]
    return whole


async def test_what_a_driver_is_and_has(mtty: Access) -> None:
    assert mtty.info.is_pci
    assert (await mtty.region_info(PCI_CONFIG)).size == 255
    assert (await mtty.region_info(5)).size == 0  # a BAR it does not have
    flags = await mtty.feature(FeatureOperation.GET, Feature.MIGRATION, size=8)
    assert MigrationFlags(int.from_bytes(flags, "little")) == (
        MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY
    )
    with pytest.raises(DeviceRefused, match="setting feature BUS_MASTER|setting feature 10") as caught:
        await mtty.feature(FeatureOperation.SET, 10, bytes(4))
    assert caught.value.errno == errno.ENOTTY
    await mtty.feature(FeatureOperation.PROBE | FeatureOperation.GET, Feature.MIG_DATA_SIZE)


async def test_a_state_moves_in_pre_copy_and_stop_copy(mtty: Access, other_mtty: Access) -> None:
    await mtty.write(MEMORY, SCRATCH, b"\x5a")
    async with (
        await start(mtty, MigrationState.PRE_COPY) as source,
        await start(other_mtty, MigrationState.RESUMING) as target,
    ):
        told = await source.precopy_info()
        assert (told.reinit, told.initial > 0) == (False, True)
        early = await read_all(source)
        assert len(early) == told.initial
        await target.write(early)
        assert await mtty.set_migration_state(MigrationState.STOP_COPY) is None  # the same data go on
        with pytest.raises(DeviceRefused):
            await source.precopy_info()
        await target.write(await read_all(source))
        await other_mtty.set_migration_state(MigrationState.RUNNING)
    assert await mtty.set_migration_state(MigrationState.STOP) is None
    assert await state_of(other_mtty) is MigrationState.RUNNING
    assert await state_of(mtty) is MigrationState.STOP
    assert await read(other_mtty, MEMORY, SCRATCH, 1) == b"\x5a"


async def test_a_stream_that_is_too_short_is_refused_at_its_end(mtty: Access) -> None:
    async with await start(mtty, MigrationState.RESUMING):
        with pytest.raises(DeviceRefused, match="setting the migration state to STOP with EINVAL"):
            await mtty.set_migration_state(MigrationState.STOP)
    assert await state_of(mtty) is MigrationState.RESUMING


async def test_data_are_of_no_use_when_their_state_was_left_or_they_are_closed(mtty: Access) -> None:
    data = await start(mtty, MigrationState.STOP_COPY)
    await mtty.set_migration_state(MigrationState.STOP)
    with pytest.raises(DeviceRefused) as caught:
        await data.read_into([memoryview(bytearray(8))])
    assert caught.value.errno == errno.ENODEV
    await data.aclose()
    await data.aclose()


async def test_data_that_come_to_a_cancelled_call_are_closed_with_the_access(mdev: MakeMdev, address: Address) -> None:
    device = mdev("mtty-2")
    with nothing_left_open():
        async with await open_access(address(device), timeout=TIMEOUT) as access:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(access.set_migration_state, MigrationState.STOP_COPY)
                await wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            assert await state_of(access) is MigrationState.STOP_COPY
            await access.set_migration_state(MigrationState.RUNNING)


# ---- the log of DMA


async def test_a_driver_that_logs_itself_is_asked(mtty: Access) -> None:
    assert await mtty.can_log_dma()
    with guest_memory(64 * PAGE) as (fd, _):
        await mtty.dma_map(IOVA, 64 * PAGE, fd, 0, writable=True)
        bitmap = bytearray(8)
        for _ in range(2):
            await mtty.start_dma_log(PAGE, [(IOVA, 64 * PAGE)])
            await mtty.read_dma_log(IOVA, 64 * PAGE, PAGE, memoryview(bitmap))
        assert bitmap == bytes(8)
        await mtty.stop_dma_log()
        await mtty.stop_dma_log()


async def test_else_the_iommu_of_a_group_is(four_region: FourRegionSubject) -> None:
    access = four_region.access
    assert await access.can_log_dma() == ("/dev/" not in access.name)
    if not await access.can_log_dma():
        with pytest.raises(DeviceRefused) as caught:
            await access.start_dma_log(PAGE, [(IOVA, 64 * PAGE)])
        assert caught.value.errno == errno.ENOTTY
        await access.stop_dma_log()
        return
    with guest_memory(192 * PAGE) as (fd, _):
        for first, pages in ((0, 128), (128, 64)):
            await access.dma_map(IOVA + first * PAGE, pages * PAGE, fd, first * PAGE, writable=True)
        await four_region.device_writes(IOVA, b"before the log")
        await access.start_dma_log(PAGE, [(IOVA, 192 * PAGE)])
        await access.start_dma_log(PAGE, [(IOVA, 192 * PAGE)])
        for page in (3, 66, 129):
            await four_region.device_writes(IOVA + page * PAGE, b"logged")

        async def dirty(first: int, pages: int) -> set[int]:
            bitmap = bytearray((pages + 63) // 64 * 8)
            await access.read_dma_log(IOVA + first * PAGE, pages * PAGE, PAGE, memoryview(bitmap))
            told = int.from_bytes(bitmap, "little")
            return {first + n for n in range(pages) if told >> n & 1}

        assert await dirty(64, 66) == {66, 129}  # across mappings, and in the midst of both
        assert await dirty(0, 192) == {3}
        await four_region.device_writes(IOVA + 5 * PAGE, b"again")
        assert await dirty(0, 192) == {5}
        await access.stop_dma_log()
        await access.stop_dma_log()
        with pytest.raises(DeviceRefused):
            await dirty(0, 192)


# ---- opening


async def test_a_uuid_takes_the_node_of_the_devices_own(mdev: MakeMdev) -> None:
    device = mdev("mtty-2")
    with nothing_left_open():
        async with await open_access(f"vfio:{device.uuid}", timeout=TIMEOUT):
            links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
            assert str(device.cdev) in links
            assert str(device.group) not in links


async def test_who_has_a_device_is_said_to_who_wants_it(mdev: MakeMdev, address: Address) -> None:
    device = mdev("mtty-2")
    async with await open_access(address(device), timeout=TIMEOUT):
        for wanted in (f"vfio:{device.group.name}/{device.uuid}", f"vfio:{device.cdev}"):
            with nothing_left_open():
                with pytest.raises(DeviceRefused, match=r"with (EBUSY|EINVAL) .*; (this|another) process has it open"):
                    await open_access(wanted, timeout=TIMEOUT)
    await (await open_access(address(device), timeout=TIMEOUT)).aclose()


async def test_a_group_is_asked_for_a_device_of_another(mdev: MakeMdev) -> None:
    one, other = mdev("mtty-2"), mdev("mtty-2")
    with nothing_left_open():
        with pytest.raises(DeviceRefused, match=f"ENODEV .*; the devices of that group are: {one.uuid}$"):
            await open_access(f"vfio:{one.group.name}/{other.uuid}", timeout=TIMEOUT)


async def test_what_is_not_there(mdev: MakeMdev) -> None:
    with pytest.raises(UsageError, match="there is no such mediated device; .* makes one"):
        await open_access("vfio:00000000-1111-2222-3333-444444444444")
    with pytest.raises(UsageError, match="there is no such PCI device"):
        await open_access("vfio:0000:00:1f.0")
    with pytest.raises(UsageError, match="there is no such node"):
        await open_access("vfio:/dev/vfio/devices/vfio4711")


async def test_devices_have_guest_memory_of_their_own(mdev: MakeMdev, address: Address) -> None:
    async with (
        await open_access(address(mdev("four-region-16M")), timeout=TIMEOUT) as one,
        await open_access(address(mdev("four-region-16M")), timeout=TIMEOUT) as other,
    ):
        with guest_memory(PAGE) as (fd, memory):
            for access in (one, other):
                await access.dma_map(IOVA, PAGE, fd, 0, writable=True)
            await FourRegionSubject(one, "whole").device_writes(IOVA, pattern(PAGE))
            assert await FourRegionSubject(other, "whole").device_reads(IOVA, PAGE) == pattern(PAGE)
            await one.dma_unmap(IOVA, PAGE)
            await FourRegionSubject(other, "whole").device_writes(IOVA, pattern(PAGE, seed=1))
            assert memory[:] == pattern(PAGE, seed=1)


async def test_a_slice_that_somebody_holds_keeps_the_device(mdev: MakeMdev, address: Address) -> None:
    """The kernel keeps a file open for as long as it is mapped."""
    device = mdev("four-region-16M")
    access = await open_access(address(device), timeout=TIMEOUT)
    (area,) = await access.map(await access.region_info(STAGED))
    with area.view[: mmap.PAGESIZE]:
        await access.aclose()
        with pytest.raises(DeviceRefused, match="EBUSY"):
            await open_access(f"vfio:{device.group.name}/{device.uuid}", timeout=TIMEOUT)
    del area
    await (await open_access(address(device), timeout=TIMEOUT)).aclose()


# ---- what sysfs says


async def test_the_version_of_a_type(mdev: MakeMdev, address: Address) -> None:
    async with await open_access(address(mdev("four-region-16M-next")), timeout=TIMEOUT) as access:
        version = await access.version()
        assert version is not None
        assert "generation=2" in version
        assert await access.accepts_version(version)
        assert await access.accepts_version(version.replace("generation=2", "generation=1"))
        assert not await access.accepts_version(version.replace("generation=2", "generation=3"))


async def test_the_driver_is_asked_before_a_migration(mdev: MakeMdev, address: Address, tmp_path: Path) -> None:
    """Generation 1 goes into generation 2 and not back: by the driver's word, which nobody else knows."""
    old, new = (address(mdev(f"four-region-16M{suffix}")) for suffix in ("", "-next"))
    async with await open_device(old, timeout=TIMEOUT) as one, await open_device(new, timeout=TIMEOUT) as other:
        assert one.description.kernel == os.uname().release
        assert one.description.driver == other.description.driver == "four-region"
        there = await vfiostream.check(one, other)
        assert (there.driver_asked, there.reasons, there.notes) == (True, (), ())
        back = await vfiostream.check(other, one)
        assert back.driver_asked
        assert len(back.reasons) == 1
        assert "does not take version" in back.reasons[0]
        (tmp_path / "new").write_text(vfiostream.description_text(other))
        stored = await vfiostream.read_description(tmp_path / "new")
        assert (await vfiostream.check(stored, one)).reasons == back.reasons
        described = await vfiostream.check(one, stored)
        assert (described.driver_asked, described.reasons) == (False, ())


async def test_a_type_without_version(mtty: Access) -> None:
    assert await mtty.version() is None
    assert await mtty.accepts_version("anything")


def test_the_devices_of_this_host(mdev: MakeMdev) -> None:
    made = {mdev("mtty-2").uuid, mdev("four-region-16M").uuid}
    found = {device.name: device for device in list_devices(Kernel())}
    assert made <= set(found)
    assert all(found[name].bound and found[name].group and found[name].cdev for name in made)


def test_the_command_that_lists_and_probes_them(mdev: MakeMdev, capsys: pytest.CaptureFixture[str]) -> None:
    serial, four_region = mdev("mtty-2"), mdev("four-region-16M")
    assert main(["devices", "--probe", "--json"]) == 0
    found = {entry["address"]: entry for entry in json.loads(capsys.readouterr().out)["devices"]}
    entry = found[f"vfio:{four_region.uuid}"]
    assert (entry["driver"], entry["node"]) == ("four-region", str(four_region.cdev))
    assert (entry["device"]["interface"], entry["problem"]) == ("four-region", None)
    assert found[f"vfio:{serial.uuid}"]["probed"]
