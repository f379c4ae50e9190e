"""Kernel access, on a kernel that answers from tables: parsing, refusals, set-up problems, threads, what stays open.

On a kernel that is real it is tested in tests/kernel/test_access.py.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from anyio import wait_all_tasks_blocked
from hypothesis import given as drawn, strategies as st

from tests.access_contract import IOVA, PAGE, AccessContract, Subject, guest_memory, pattern, read
from tests.fake_kernel import BDF, GROUP, LIMIT, NODE, RW, UUID, FakeKernel, FakeRegion, Hold
from vfiostream.access import open_access
from vfiostream.access.contract import Access
from vfiostream.access.kernel import KernelAccess, connect
from vfiostream.access.kernel_host import list_devices, node_of, trouble
from vfiostream.access.region_info import MAX_AREAS, MAX_REGIONS, BadRegionInfo, parse_region_info
from vfiostream.errors import DeviceBroken, DeviceLost, DeviceRefused, DeviceTimeout, UsageError
from vfiostream.uapi import iommufd
from vfiostream.uapi.vfio import (
    MAX_REGION_INFO,
    REGION_FLAG_CAPS,
    REGION_FLAG_MMAP,
    REGION_INFO,
    BadCapabilityChain,
    Feature,
    FeatureOperation,
    MigrationState,
    pack_capabilities,
)
from vfiostream.uapi.vfio_kernel import ContainerIoctl, Extension, Ioctl, dirty_page_sizes

pytestmark = pytest.mark.anyio
WHOLE, SPARSE, TRAPPED = 0, 1, 2
IN_GROUP = f"{GROUP}/{UUID}"


def descriptors(kind: str) -> int:
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            pass  # the one that was listed with
    return sum(kind in link for link in links)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vfiostream-kernel"]


def mapped(what: str) -> int:
    return sum(what in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[FakeKernel]:
    made = FakeKernel(tmp_path)
    made.add_mdev()
    made.regions = [
        FakeRegion(256 * 1024, RW | REGION_FLAG_MMAP, (2, 3)),
        FakeRegion(64 * 1024, RW | REGION_FLAG_MMAP, sparse=[(0x8000, 0x2000), (0x1000, 0x1000)]),
        FakeRegion(4096),
    ]
    before = threads(), descriptors("fake-"), mapped("memfd:guest")
    yield made
    assert not made.kinds
    assert (threads(), descriptors("fake-"), mapped("memfd:guest")) == before


@pytest.fixture(params=[IN_GROUP, NODE], ids=["group", "node"])
def address(request: pytest.FixtureRequest) -> str:
    address: str = request.param
    return address


@pytest.fixture
async def access(kernel: FakeKernel, address: str) -> AsyncIterator[KernelAccess]:
    async with await connect(address, timeout=LIMIT, kernel=kernel) as opened:
        yield opened


class FakeSubject(Subject):
    memory, unmappable, whole, sparse = TRAPPED, TRAPPED, WHOLE, SPARSE

    def __init__(self, access: Access, kernel: FakeKernel) -> None:
        self.access = access
        self._kernel = kernel

    async def device_reads(self, iova: int, length: int) -> bytes:
        try:
            return self._kernel.dma_read(iova, length)
        except OSError as error:
            raise DeviceRefused("fake", "DMA", error.errno or 0) from error

    async def device_writes(self, iova: int, data: bytes) -> None:
        try:
            self._kernel.dma_write(iova, data)
        except OSError as error:
            raise DeviceRefused("fake", "DMA", error.errno or 0) from error


class TestKernelAccess(AccessContract):
    @pytest.fixture
    async def subject(self, access: KernelAccess, kernel: FakeKernel) -> AsyncIterator[Subject]:
        yield FakeSubject(access, kernel)


# ---- addresses, and what opening does


@pytest.mark.parametrize(
    "wrong", ["", "gpu", "12", "12/", "12/a/b", "/dev/vfio/12", "/dev/vfio/devices/", "0000:3b:00.9", UUID[:-1]]
)
async def test_what_is_no_address_says_what_is(wrong: str, kernel: FakeKernel) -> None:
    with pytest.raises(UsageError, match="not the address of a device; write "):
        await (open_access("vfio:") if not wrong else connect(wrong, kernel=kernel))


@pytest.mark.parametrize(
    ("given", "node"), [(UUID, NODE), (UUID.upper(), NODE), (NODE, NODE), (IN_GROUP, f"/dev/vfio/{GROUP}")]
)
async def test_where_an_address_leads(given: str, node: str, kernel: FakeKernel) -> None:
    async with await connect(given, kernel=kernel) as opened:
        assert opened.name == f"vfio:{given}"
    assert node in kernel.calls
    assert ("/dev/iommu" in kernel.calls) == (node == NODE)
    assert ("/dev/vfio/vfio" in kernel.calls) == (node != NODE)


@pytest.mark.parametrize("missing", [NODE, "/dev/iommu"])
async def test_without_node_or_iommufd_it_is_the_group(missing: str, kernel: FakeKernel) -> None:
    kernel.path(missing).unlink()
    async with await connect(UUID, kernel=kernel):
        assert f"/dev/vfio/{GROUP}" in kernel.calls


async def test_a_kernel_without_nodes_of_devices(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.add_pci(node=False)
    for given in (BDF, BDF.removeprefix("0000:")):
        async with await connect(given, kernel=kernel) as opened:
            assert await read(opened, 0, 0, 4) == bytes(4)


async def test_type_1_where_there_is_no_version_2(kernel: FakeKernel) -> None:
    kernel.extensions = {Extension.TYPE1_IOMMU}
    async with await connect(IN_GROUP, kernel=kernel):
        pass


GROUP_STEPS: list[tuple[object, int]] = [
    ("/dev/vfio/vfio", errno.EIO),
    (("container", ContainerIoctl.GET_API_VERSION), errno.EINVAL),
    (f"/dev/vfio/{GROUP}", errno.EBUSY),
    (("group", Ioctl.GROUP_GET_STATUS), errno.ENODEV),
    (("group", Ioctl.GROUP_SET_CONTAINER), errno.EBUSY),
    (("container", ContainerIoctl.CHECK_EXTENSION), errno.EINVAL),
    (("container", ContainerIoctl.SET_IOMMU), errno.EPERM),
    (("group", Ioctl.GROUP_GET_DEVICE_FD), errno.EBUSY),
    (("device", Ioctl.DEVICE_GET_INFO), errno.EIO),
]
NODE_STEPS: list[tuple[object, int]] = [
    ("/dev/iommu", errno.EIO),
    (NODE, errno.EIO),
    (("device", Ioctl.DEVICE_BIND_IOMMUFD), errno.EBUSY),
    (("iommufd", iommufd.Ioctl.IOAS_ALLOC), errno.ENOMEM),
    (("device", Ioctl.DEVICE_ATTACH_IOMMUFD_PT), errno.EINVAL),
    (("device", Ioctl.DEVICE_GET_INFO), errno.EIO),
]


@pytest.mark.parametrize(("step", "number", "given"), [(*one, IN_GROUP) for one in GROUP_STEPS])
async def test_nothing_stays_open_when_opening_a_group_fails(
    step: object, number: int, given: str, kernel: FakeKernel
) -> None:
    kernel.failures[step] = number
    with pytest.raises(DeviceRefused) as caught:  # and the kernel's fixture looks what is left
        await connect(given, kernel=kernel)
    assert caught.value.errno == number


@pytest.mark.parametrize(("step", "number", "given"), [(*one, NODE) for one in NODE_STEPS])
async def test_nothing_stays_open_when_opening_a_node_fails(
    step: object, number: int, given: str, kernel: FakeKernel
) -> None:
    kernel.failures[step] = number
    with pytest.raises(DeviceRefused) as caught:
        await connect(given, kernel=kernel)
    assert caught.value.errno == number


@pytest.mark.parametrize("step", [step for step, _ in GROUP_STEPS + NODE_STEPS])
async def test_nothing_stays_open_when_opening_is_cancelled(step: object, kernel: FakeKernel) -> None:
    hold = kernel.holds[step] = Hold()
    given = NODE if any(step == other for other, _ in NODE_STEPS[:-1]) else IN_GROUP
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: connect(given, kernel=kernel))
        assert await anyio.to_thread.run_sync(hold.entered.wait, LIMIT)
        tasks.cancel_scope.cancel()
        hold.opened.set()


async def test_other_versions_of_vfio_and_too_many_regions_are_not_believed(kernel: FakeKernel) -> None:
    kernel.regions *= MAX_REGIONS
    with pytest.raises(DeviceBroken, match=r"says that the device has 3072 regions"):
        await connect(IN_GROUP, kernel=kernel)
    kernel.api_version = 1
    with pytest.raises(DeviceBroken, match="speaks version 1 of VFIO"):
        await connect(IN_GROUP, kernel=kernel)


# ---- what is wrong with the host, and the way out


def no_vfio(kernel: FakeKernel) -> None:
    for name in (NODE, "/dev/vfio/vfio", f"/dev/vfio/{GROUP}"):
        kernel.path(name).unlink()
    kernel.path("/dev/vfio/devices").rmdir()
    kernel.path("/dev/vfio").rmdir()


async def test_no_vfio(kernel: FakeKernel) -> None:
    no_vfio(kernel)
    for given in (UUID, IN_GROUP):
        with pytest.raises(UsageError, match=r"without /dev/vfio: load the kernel's VFIO \(modprobe vfio-pci\)"):
            await connect(given, kernel=kernel)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (BDF, "there is no such PCI device; `vfiostream devices` lists"),
        (
            "00000000-0000-0000-0000-000000000000",
            "no such mediated device; .* mdev_supported_types/TYPE/create",
        ),
        ("/dev/vfio/devices/vfio7", "there is no such node; `vfiostream devices` lists"),
        ("13/0000:3b:00.2", "there is no /dev/vfio/13; `vfiostream devices` lists"),
        (f"noiommu-0/{BDF}", "noiommu mode"),
    ],
)
async def test_no_such_device(given: str, says: str, kernel: FakeKernel) -> None:
    with pytest.raises(UsageError, match=says):
        await connect(given, kernel=kernel)


async def test_a_kernel_without_mediated_devices(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the kernel has no mediated devices; load the module"):
        await connect(UUID, kernel=FakeKernel(tmp_path))


@pytest.mark.parametrize("given", [BDF, f"{GROUP}/{BDF}"])
@pytest.mark.parametrize(
    ("driver", "says"),
    [
        ("nvidia", f"is bound to the driver nvidia: .*driverctl set-override {BDF} vfio-pci.*driver/unbind; "),
        (None, f"is bound to no driver: .*echo {BDF} > /sys/bus/pci/drivers_probe`$"),
    ],
)
async def test_bound_to_another_driver_or_none(given: str, driver: str | None, says: str, tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.add_pci(driver)
    kernel.make_folder("/dev/vfio")
    with pytest.raises(UsageError, match=says):
        await connect(given, kernel=kernel)


async def test_no_iommu_and_noiommu(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.add_pci("nvidia", group=False)
    with pytest.raises(UsageError, match=r"has no IOMMU group, .*VT-d"):
        await connect(BDF, kernel=kernel)
    kernel = FakeKernel(tmp_path / "other")
    kernel.add_pci(node=False)
    kernel.make_file(f"/dev/vfio/noiommu-{GROUP}")
    with pytest.raises(UsageError, match="is in noiommu mode, in which no guest memory can be mapped"):
        await connect(BDF, kernel=kernel)


async def test_bound_and_without_a_node(kernel: FakeKernel) -> None:
    kernel.path(NODE).unlink()
    kernel.path(f"/dev/vfio/{GROUP}").unlink()
    with pytest.raises(UsageError, match=r"has no node in /dev/vfio \(no 12, nor vfio0\): see whether udev runs"):
        await connect(UUID, kernel=kernel)


async def test_a_group_that_is_not_viable_names_who_is_in_the_way(kernel: FakeKernel) -> None:
    for name, driver in (("0000:3b:00.0", "nvidia"), ("0000:3a:00.0", "pcieport"), ("0000:3b:00.3", "vfio-pci")):
        kernel.make_link(f"/sys/kernel/iommu_groups/{GROUP}/devices/{name}/driver", f"/sys/bus/pci/drivers/{driver}")
    kernel.viable = False
    with pytest.raises(UsageError, match=r"can't be used; the host's drivers hold 0000:3b:00.0 \(nvidia\) of it: bind"):
        await connect(IN_GROUP, kernel=kernel)
    kernel.viable = True
    kernel.failures["group", Ioctl.GROUP_SET_CONTAINER] = errno.EBUSY
    with pytest.raises(DeviceRefused, match=r"EBUSY .*; the host's drivers hold 0000:3b:00.0 \(nvidia\)"):
        await connect(IN_GROUP, kernel=kernel)


@pytest.mark.parametrize(
    ("process", "says"),
    [
        ("4711", r"process 4711 \(qemu\) has it open: end that first"),
        ("self", "this process has it open: two devices of one IOMMU group"),
        (None, "another process has it open, or another device of its IOMMU group"),
    ],
)
async def test_busy_says_who_has_it(process: str | None, says: str, kernel: FakeKernel) -> None:
    node = f"/dev/vfio/{GROUP}"
    kernel.failures[node] = errno.EBUSY
    kernel.make_folder("/proc/other")
    if process == "self":
        process = str(os.getpid())
    if process is not None:
        kernel.make_file(f"/proc/{process}/comm", "qemu\n")
        kernel.make_folder(f"/proc/{process}/fd")
        kernel.path(f"/proc/{process}/fd/7").symlink_to(node)
    with pytest.raises(DeviceRefused, match=f"refused opening {node} with EBUSY .*; {says}"):
        await connect(IN_GROUP, kernel=kernel)


@pytest.mark.parametrize(
    ("given", "node"),
    [(IN_GROUP, f"/dev/vfio/{GROUP}"), (NODE, NODE), (NODE, "/dev/iommu"), (IN_GROUP, "/dev/vfio/vfio")],
)
async def test_no_permission_says_on_what_and_who_has_it(given: str, node: str, kernel: FakeKernel) -> None:
    kernel.path(node).chmod(0o640)
    kernel.failures[node] = errno.EACCES
    with pytest.raises(UsageError, match=rf"no permission on {node}; it belongs to .* group \w+ with mode 0640"):
        await connect(given, kernel=kernel)


async def test_no_iommufd(kernel: FakeKernel) -> None:
    kernel.path("/dev/iommu").unlink()
    with pytest.raises(UsageError, match="there is no /dev/iommu; modprobe iommufd, or name the device as GROUP/NAME"):
        await connect(NODE, kernel=kernel)


async def test_no_driver_of_the_iommu(kernel: FakeKernel) -> None:
    kernel.extensions = set()
    with pytest.raises(UsageError, match="no IOMMU driver for it; modprobe vfio_iommu_type1"):
        await connect(IN_GROUP, kernel=kernel)


async def test_a_device_that_its_group_does_not_have(kernel: FakeKernel) -> None:
    kernel.failures["group", Ioctl.GROUP_GET_DEVICE_FD] = errno.ENODEV
    with pytest.raises(DeviceRefused, match=f"opening gone in /dev/vfio/12 .*; the devices of that group are: {UUID}"):
        await connect(f"{GROUP}/gone", kernel=kernel)


async def test_too_little_memory_may_be_locked(access: KernelAccess, kernel: FakeKernel) -> None:
    kernel.failures["container", ContainerIoctl.MAP_DMA] = kernel.failures["iommufd", iommufd.Ioctl.IOAS_MAP] = (
        errno.ENOMEM
    )
    with guest_memory(PAGE) as (fd, _):
        with pytest.raises(DeviceRefused, match=r"ENOMEM .*; if the limit of locked memory \(ulimit -l\)"):
            await access.dma_map(IOVA, PAGE, fd, 0, writable=True)
        assert mapped("memfd:guest") == 1  # the test's own


async def test_what_cannot_be_mapped_for_dma(access: KernelAccess) -> None:
    with guest_memory(PAGE) as (fd, _):
        for iova, length, offset in ((-PAGE, PAGE, 0), (IOVA, 0, 0), ((1 << 64) - PAGE, 2 * PAGE, 0), (IOVA, PAGE, -1)):
            with pytest.raises(UsageError, match="can't be mapped for DMA"):
                await access.dma_map(iova, length, fd, offset, writable=True)
        with pytest.raises(UsageError, match="the file holds 4096 bytes"):
            await access.dma_map(IOVA, 2 * PAGE, fd, 0, writable=True)


# ---- region info


def region_answer(index: int = 1, *, size: int = 8192, flags: int = RW, offset: int = 0, chain: bytes = b"") -> bytes:
    whole = REGION_INFO.size + len(chain)
    return REGION_INFO.pack(whole, flags, index, REGION_INFO.size if chain else 0, size, offset) + chain


def test_region_info_is_taken_apart() -> None:
    chain = pack_capabilities(REGION_INFO.size, type_=(2, 3), sparse=[(4096, 4096), (0, 4096)])
    info, offset = parse_region_info(
        1, region_answer(flags=RW | REGION_FLAG_MMAP | REGION_FLAG_CAPS, offset=7, chain=chain)
    )
    assert (info.type, info.subtype, info.mappable, offset) == (2, 3, ((0, 4096), (4096, 4096)), 7)
    info, _ = parse_region_info(
        1, region_answer(chain=chain)
    )  # without their flags neither capabilities nor mmap count
    assert (info.type, info.mappable) == (None, ())


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (region_answer(2), "region 2 when asked about region 1"),
        (region_answer(flags=RW | REGION_FLAG_CAPS, chain=b"\1\0\1\0" + bytes(4)), "bad capability chain"),
        *(
            (
                region_answer(
                    flags=RW | REGION_FLAG_CAPS | REGION_FLAG_MMAP,
                    chain=pack_capabilities(REGION_INFO.size, type_=None, sparse=sparse),
                ),
                says,
            )
            for sparse, says in (
                ([(0, 0)], "empty"),
                ([(4096, 8192)], "outside"),
                ([(100, 4096)], "misaligned"),
                ([(0, 8192), (4096, 4096)], "overlaps"),
                ([(0, 4096)] * (MAX_AREAS + 1), "257 mappable areas"),
            )
        ),
    ],
)
def test_region_info_that_makes_no_sense(answer: bytes, says: str) -> None:
    with pytest.raises(BadRegionInfo, match=says):
        parse_region_info(1, answer)


@drawn(st.binary(min_size=REGION_INFO.size, max_size=200))
def test_any_bytes_are_region_info_or_bad(answer: bytes) -> None:
    try:
        parse_region_info(REGION_INFO.unpack_from(answer)[2], answer)
    except BadRegionInfo:
        pass


@drawn(st.binary(min_size=24, max_size=200))
def test_any_bytes_are_the_info_of_an_iommu_or_bad(answer: bytes) -> None:
    try:
        dirty_page_sizes(answer)
    except BadCapabilityChain:
        pass


async def test_a_region_that_the_driver_refuses_to_know_is_empty(access: KernelAccess, kernel: FakeKernel) -> None:
    kernel.failures["device", Ioctl.DEVICE_GET_REGION_INFO] = errno.EINVAL
    info = await access.region_info(WHOLE)
    assert (info.size, info.readable, info.mappable) == (0, False, ())


async def test_an_answer_that_grows_is_asked_for_again_and_believed_to_a_limit(
    access: KernelAccess, kernel: FakeKernel
) -> None:
    sizes: list[int] = []

    def growing(index: int, answer: bytearray) -> None:
        sizes.append(len(answer))
        REGION_INFO.pack_into(answer, 0, min(len(answer) * 2, limit), RW, index, 0, 4096, 0)

    kernel.answer_region = growing
    limit = 100
    assert (await access.region_info(WHOLE)).size == 4096
    assert sizes == [32, 64, 100]
    limit = 1 << 30
    with pytest.raises(DeviceBroken, match=rf"the driver describes region 1 in {MAX_REGION_INFO * 2} bytes"):
        await access.region_info(SPARSE)


async def test_a_region_lies_within_its_file(access: KernelAccess, kernel: FakeKernel) -> None:
    kernel.answer_region = lambda index, answer: REGION_INFO.pack_into(
        answer, 0, 32, RW, index, 0, 4096, (1 << 63) - 4095
    )
    with pytest.raises(DeviceBroken, match="puts 4096 bytes of region 0 at 0x7ffffffffffff001"):
        await access.region_info(WHOLE)


async def test_areas_that_cannot_be_mapped_are_left_out(
    access: KernelAccess, kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    kernel.answer_region = lambda index, answer: REGION_INFO.pack_into(
        answer, 0, 32, RW | REGION_FLAG_MMAP, index, 0, 1 << 30, 0
    )
    with caplog.at_level(logging.WARNING, "vfiostream.access"):
        assert await access.map(await access.region_info(WHOLE)) == ()
    assert "of region 0 can't be mapped" in caplog.text


# ---- the thread


async def enter(hold: Hold) -> None:
    assert await anyio.to_thread.run_sync(hold.entered.wait, LIMIT)


async def test_a_cancelled_call_is_waited_for(access: KernelAccess, kernel: FakeKernel) -> None:
    hold = kernel.holds["pread"] = Hold()
    into = bytearray(8)
    await access.write(TRAPPED, 0, b"the data")
    ended = False

    async def reading() -> None:
        nonlocal ended
        try:
            await access.read_into(TRAPPED, 0, memoryview(into))
        finally:
            ended = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reading)
        await enter(hold)
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await wait_all_tasks_blocked()
            assert not ended
            del kernel.holds["pread"]
            hold.opened.set()
    assert into == b"the data"  # so nobody writes to it any more
    gc.collect()
    into.clear()  # and nobody holds it
    assert await read(access, TRAPPED, 0, 8) == b"the data"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncios_own_cancellation_waits_too(access: KernelAccess, kernel: FakeKernel) -> None:
    hold = kernel.holds["pread"] = Hold()
    into = bytearray(8)
    await access.write(TRAPPED, 0, b"the data")
    task = asyncio.create_task(access.read_into(TRAPPED, 0, memoryview(into)))
    await enter(hold)
    for _ in range(3):
        task.cancel()
        await wait_all_tasks_blocked()
        assert not task.done()
    hold.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert into == b"the data"


async def test_a_call_that_takes_too_long_is_left_and_waited_for_by_the_next(kernel: FakeKernel, address: str) -> None:
    async with await connect(address, timeout=LIMIT, kernel=kernel) as access:
        await access.region_info(TRAPPED)
        access._thread._timeout = 0.05  # for what is held, and not for what a busy machine takes to open it
        hold = kernel.holds["pwrite"] = Hold()
        with pytest.raises(DeviceTimeout, match=r"writing 4 bytes to region 2 at 0x0 has not ended within 0\.05 s"):
            await access.write(TRAPPED, 0, b"late")
        with pytest.raises(DeviceTimeout, match="writing 4 bytes"):  # which is what the device is at
            await access.reset()
        assert ("device", Ioctl.DEVICE_RESET) not in kernel.calls
        hold.opened.set()
        with anyio.fail_after(LIMIT):
            while True:
                try:
                    assert await read(access, TRAPPED, 0, 4) == b"late"
                    break
                except DeviceTimeout:
                    pass  # so slow is this machine


async def test_what_is_closed_while_the_kernel_is_at_work_is_let_go_of_by_the_thread(
    kernel: FakeKernel, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    access = await connect(address, timeout=LIMIT, kernel=kernel)
    (area,) = await access.map(await access.region_info(WHOLE))
    access._thread._timeout = 0.05  # for what is held, and not for what a busy machine takes to open it
    hold = kernel.holds["pwrite"] = Hold()
    with pytest.raises(DeviceTimeout):
        await access.write(WHOLE, 0, b"late")
    (thread,) = threads()
    await access.aclose()
    assert "the thread does the rest later" in caplog.text
    area.view[8:12] = b"here"  # nothing is unmapped, nor closed
    assert sorted(kernel.kinds.values()) != []
    with pytest.raises(DeviceLost):
        await access.reset()
    hold.opened.set()
    await anyio.to_thread.run_sync(thread.join, LIMIT)
    with pytest.raises(ValueError, match="released"):
        area.view[0]
    await access.aclose()


async def test_who_waits_when_the_access_is_closed_gets_an_end(access: KernelAccess, kernel: FakeKernel) -> None:
    await access.region_info(TRAPPED)
    hold = kernel.holds["pread"] = Hold()
    ends: list[object] = []

    async def reading() -> None:
        try:
            ends.append(await read(access, TRAPPED, 0, 4))
        except DeviceLost:
            ends.append("lost")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reading)
        await enter(hold)
        tasks.start_soon(reading)
        await wait_all_tasks_blocked()
        tasks.start_soon(access.aclose)
        await wait_all_tasks_blocked()
        hold.opened.set()
    assert ends == [bytes(4), "lost"]


async def test_the_thread_leaves_nothing_open(kernel: FakeKernel, address: str) -> None:
    before = descriptors("eventfd")
    async with await connect(address, kernel=kernel):
        assert descriptors("eventfd") == before + 1
    assert descriptors("eventfd") == before


async def test_another_device_is_not_held_up(kernel: FakeKernel, address: str, tmp_path: Path) -> None:
    other_kernel = FakeKernel(tmp_path / "other")
    other_kernel.add_mdev()
    async with (
        await connect(address, kernel=kernel) as access,
        await connect(UUID, kernel=other_kernel) as other,
        anyio.create_task_group() as tasks,
    ):
        await access.region_info(TRAPPED)
        hold = kernel.holds["pread"] = Hold()
        tasks.start_soon(read, access, TRAPPED, 0, 4)
        await enter(hold)
        assert await read(other, 0, 0, 4) == bytes(4)
        hold.opened.set()


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, DeviceRefused), (errno.ENODEV, DeviceLost)])
async def test_what_the_kernel_refuses(
    number: int, kind: type[Exception], access: KernelAccess, kernel: FakeKernel
) -> None:
    kernel.failures["pread"] = kernel.failures["pwrite"] = number
    with pytest.raises(kind, match="reading 4 bytes of region 2 at 0x10"):
        await read(access, TRAPPED, 16, 4)
    with pytest.raises(kind, match="writing 4 bytes to region 2 at 0x10"):
        await access.write(TRAPPED, 16, bytes(4))


async def test_short_reads_and_writes_go_on(
    access: KernelAccess, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread, pwrite = kernel.pread, kernel.pwrite
    monkeypatch.setattr(kernel, "pread", lambda fd, into, offset: pread(fd, into[:3], offset))
    monkeypatch.setattr(kernel, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    await access.write(TRAPPED, 5, pattern(40))
    assert await read(access, TRAPPED, 5, 40) == pattern(40)
    monkeypatch.setattr(kernel, "pread", lambda fd, into, offset: 0)
    monkeypatch.setattr(kernel, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(DeviceRefused, match="EIO"):
        await read(access, TRAPPED, 0, 4)
    with pytest.raises(DeviceRefused, match="EIO"):
        await access.write(TRAPPED, 0, bytes(4))


# ---- features and the data of a migration


async def test_a_feature_is_asked_for_and_refused(access: KernelAccess, kernel: FakeKernel) -> None:
    assert await access.feature(FeatureOperation.GET, Feature.MIGRATION, size=8) == (7).to_bytes(8, "little")
    assert kernel.calls[-1] == (Feature.MIGRATION, FeatureOperation.GET)
    with pytest.raises(DeviceRefused, match="refused getting feature MIG_DATA_SIZE with ENOTTY"):
        await access.feature(FeatureOperation.GET, Feature.MIG_DATA_SIZE, size=8)


async def test_a_state_without_data(access: KernelAccess) -> None:
    assert await access.set_migration_state(MigrationState.STOP) is None


async def test_data_out(access: KernelAccess, kernel: FakeKernel) -> None:
    kernel.data = pattern(100)
    data = await access.set_migration_state(MigrationState.PRE_COPY)
    assert data is not None
    assert await data.precopy_info() == (True, 24, 99)
    into = bytearray(64)
    assert await data.read_into([memoryview(into)]) == 64
    assert into == pattern(100)[:64]
    assert await data.read_into([memoryview(into)]) == 36
    assert await data.read_into([memoryview(into)]) == 0
    kernel.failures["read"] = errno.ENOMSG
    with pytest.raises(DeviceRefused, match="reading migration data with ENOMSG"):
        await data.read_into([memoryview(into)])
    await data.aclose()
    await data.aclose()
    with pytest.raises(DeviceLost):
        await data.read_into([memoryview(into)])


async def test_data_out_to_several_places(access: KernelAccess, kernel: FakeKernel) -> None:
    """Of which a call of the kernel takes 1024."""
    kernel.data = pattern(3000)
    data = await access.set_migration_state(MigrationState.STOP_COPY)
    assert data is not None
    into = bytearray(3000)
    whole = memoryview(into)
    kernel.calls.clear()
    assert await data.read_into([whole[:7], whole[7:900], whole[900:901]]) == 901
    assert kernel.calls == ["read"]
    assert await data.read_into([whole[at : at + 1] for at in range(901, 3000)]) == 1024
    assert await data.read_into([whole[1925:2900], whole[2900:], whole[:0]]) == 1075
    assert into == pattern(3000)
    assert await data.read_into([whole[:1], whole[1:2]]) == 0
    await data.aclose()


async def test_data_in(access: KernelAccess, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.data = b""
    write = kernel.write
    monkeypatch.setattr(kernel, "write", lambda fd, data: write(fd, data[:7]))
    data = await access.set_migration_state(MigrationState.RESUMING)
    assert data is not None
    await data.write(pattern(100))
    assert kernel.data_end is not None
    assert os.read(kernel.data_end, 200) == pattern(100)
    os.close(kernel.data_end)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await data.aclose()


async def test_data_that_a_cancelled_call_brought_are_closed_with_the_access(kernel: FakeKernel, address: str) -> None:
    kernel.data = b"state"
    async with await connect(address, kernel=kernel) as access:
        hold = kernel.holds["device", Ioctl.DEVICE_FEATURE] = Hold()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(access.set_migration_state, MigrationState.STOP_COPY)
            await enter(hold)
            tasks.cancel_scope.cancel()
            hold.opened.set()


async def test_data_that_nobody_closed_are_closed_with_the_access(kernel: FakeKernel, address: str) -> None:
    kernel.data = b"state"
    async with await connect(address, kernel=kernel) as access:
        data = await access.set_migration_state(MigrationState.STOP_COPY)
    assert data is not None
    await data.aclose()


# ---- the log of DMA


async def dirty(access: Access, first: int, pages: int) -> set[int]:
    bitmap = bytearray((pages + 63) // 64 * 8)
    bitmap[-1] = 0x80  # is ORed to
    await access.read_dma_log(IOVA + first * PAGE, pages * PAGE, PAGE, memoryview(bitmap))
    assert bitmap[-1] & 0x80
    bitmap[-1] &= 0x7F
    told = int.from_bytes(bitmap, "little")
    return {first + n for n in range(len(bitmap) * 8) if told >> n & 1}


async def test_the_devices_own_log_comes_first(access: KernelAccess, kernel: FakeKernel) -> None:
    kernel.logs_itself = True
    ranges = [(IOVA, 64 * PAGE), (2 * IOVA, PAGE)]
    assert await access.can_log_dma()
    await access.stop_dma_log()
    assert (Feature.DMA_LOGGING_STOP, FeatureOperation.SET) not in kernel.calls
    for _ in range(2):
        await access.start_dma_log(PAGE, ranges)
    assert kernel.log_ranges == ranges
    assert await dirty(access, 0, 64) == {2}
    await access.stop_dma_log()
    await access.stop_dma_log()
    assert not kernel.logging


async def test_the_log_of_the_iommu(access: KernelAccess, kernel: FakeKernel, address: str) -> None:
    if address == NODE:
        await access.aclose()
        kernel.page_tables = True
        access = await connect(address, kernel=kernel)
    assert await access.can_log_dma()
    with guest_memory(192 * PAGE) as (fd, _):
        for first, pages in ((0, 128), (128, 64)):
            await access.dma_map(IOVA + first * PAGE, pages * PAGE, fd, first * PAGE, writable=True)
        for _ in range(2):
            kernel.dma_write(IOVA, b"before")
            await access.start_dma_log(PAGE, [(IOVA, 192 * PAGE)])
        for page in (3, 66, 127, 129):
            kernel.dma_write(IOVA + page * PAGE, b"logged")
        assert await dirty(access, 64, 66) == {66, 127, 129}
        assert await dirty(access, 0, 190) == {3}
        assert await dirty(access, 0, 190) == set()
        await access.stop_dma_log()
        await access.stop_dma_log()
        with pytest.raises(DeviceRefused):
            await dirty(access, 0, 128)
    await access.aclose()


async def test_no_log_at_all(access: KernelAccess, kernel: FakeKernel) -> None:
    kernel.iommu_logs = False
    assert not await access.can_log_dma()
    with pytest.raises(DeviceRefused, match="ENOTTY"):
        await access.start_dma_log(PAGE, [(IOVA, PAGE)])
    await access.stop_dma_log()


async def test_a_container_logs_in_its_own_pages(kernel: FakeKernel) -> None:
    async with await connect(IN_GROUP, kernel=kernel) as access:
        with pytest.raises(DeviceRefused, match="EINVAL"):
            await access.start_dma_log(2 * PAGE, [(IOVA, 2 * PAGE)])


# ---- who drives it, and the version of a mediated device


async def test_the_driver_and_its_kernel(access: KernelAccess) -> None:
    assert (access.info.driver, access.info.kernel) == ("vfio_mdev", os.uname().release)


async def test_a_driver_that_is_not_known(kernel: FakeKernel) -> None:
    kernel.path(f"/sys/kernel/iommu_groups/{GROUP}/devices/{UUID}").unlink()
    async with await connect(IN_GROUP, kernel=kernel) as access:
        assert access.info.driver is None


async def test_the_version_of_a_mediated_device(kernel: FakeKernel, address: str) -> None:
    version = kernel.path(f"/sys/bus/mdev/devices/{UUID}/mdev_type/version")
    async with await connect(address, kernel=kernel) as access:
        assert await access.version() is None
        assert await access.accepts_version("any")
    version.write_text("gpu 1\n")
    async with await connect(address, kernel=kernel) as access:
        assert await access.version() == "gpu 1"
        assert await access.accepts_version("gpu 0")
        assert version.read_text() == "gpu 0"
        version.unlink()
        version.symlink_to("/dev/full")
        assert not await access.accepts_version("gpu 2")


# ---- the devices of a host


def test_the_devices_of_a_host(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    assert list(list_devices(kernel)) == []
    kernel.add_pci("nvidia", node=False)
    kernel.add_mdev()
    kernel.make_folder("/sys/bus/pci/devices/0000:00:1f.0")  # in no group: nobody can have it
    pci, mdev = list_devices(kernel)
    assert (pci.name, pci.driver, pci.group, pci.bound) == (BDF, "nvidia", GROUP, False)
    assert "is bound to the driver nvidia" in (trouble(kernel, pci) or "")
    assert (mdev.name, mdev.driver, mdev.cdev, mdev.bound) == (UUID, "vfio_mdev", "vfio0", True)
    assert trouble(kernel, mdev) is None
    assert node_of(kernel, mdev) == NODE


def test_structures_have_the_kernels_sizes() -> None:
    layouts = (iommufd.IOAS_ALLOC, iommufd.IOAS_MAP, iommufd.IOAS_UNMAP, iommufd.HWPT_ALLOC, iommufd.GET_DIRTY_BITMAP)
    assert [layout.size for layout in layouts] == [12, 40, 24, 40, 48]
