"""The four-region device: the device contract over both accesses and in both orders, and what it says to the driver."""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.lowlevel
import pytest

from tests.between import Between
from tests.device_contract import (
    IOVA,
    PAGE,
    Opener,
    SettingsContract,
    SizedContract,
    drain,
    driver,
    drivers,
    guest_memory,
    halt,
    in_process,
    load,
    over_vfio_user,
    save,
    served,
    state,
    take_round,
)
from vfiostream.access import vfio_user
from vfiostream.access.contract import Access, MappedArea, RegionInfo
from vfiostream.buffers import Buffer
from vfiostream.devices import open_device
from vfiostream.devices.contract import Device
from vfiostream.devices.four_region import FourRegionDevice, Order
from vfiostream.errors import (
    DeviceBroken,
    DeviceError,
    DeviceLost,
    DeviceRefused,
    DeviceTimeout,
    Incompatible,
    LocalProtocolError,
    UsageError,
)
from vfiostream.uapi.four_region import NATURAL, PACKED, State
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.settings import Fault, Operation

pytestmark = pytest.mark.anyio

CONTROL, CONFIG, MEMORY, BITMAP, VERSION = 9, 10, 11, 12, 13
ORDERS: tuple[Order, ...] = ("session", "posted")


class FourRegionContract(SizedContract, SettingsContract):
    interface = "four-region"

    @pytest.mark.parametrize("layout", ["natural", "packed"])
    async def test_everything_moves_with_either_layout(self, opened: Opener, layout: str) -> None:
        await self.check_move(opened, source={"layout": layout}, target={"layout": layout})

    async def test_it_describes_its_config_and_version(self, opened: Opener) -> None:
        with driver(version_string="version one") as one:
            async with opened(one) as device:
                about = device.description
                assert about.version == "version one"
                assert 3000 <= about.config_size <= about.config_limit == 2 * PAGE

    async def test_without_memory_there_are_no_captures(self, opened: Opener) -> None:
        with driver(memory=0) as one:
            async with opened(one) as source:
                assert not source.description.device_memory
                await source.start_precopy()
                with pytest.raises(LocalProtocolError):
                    await source.capture()

    async def test_the_driver_says_which_versions_it_takes(self, opened: Opener) -> None:
        with driver(version_string="new", accept=("old",)) as one:
            before = one.digest()
            async with opened(one) as device:
                assert await device.accepts("new")
                assert await device.accepts("old")
                assert not await device.accepts("future")
                assert not await device.accepts("")
                assert not await device.accepts("x" * 10_000)
                assert device.description.version == "new"
            assert (state(one), one.digest()) == (State.RUNNING, before)

    async def test_nothing_reaches_the_driver_before_a_chunk_is_whole(self, opened: Opener) -> None:
        with drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            before = other.digest()
            async with opened(other) as target:
                size, content = saved.captures[0]
                await target.start_load()
                await target.begin_capture(size)
                await target.write(content[: 8 * PAGE - 1])
                assert other.digest() == before
                await target.write(content[8 * PAGE - 1 : 8 * PAGE])
                assert other.digest() != before
                await target.abandon()

    @pytest.mark.parametrize(
        ("operation", "n", "named"),
        [
            (Operation.SET_STATE, 1, "set device state to RUNNING"),
            (Operation.SET_STATE, 2, "set device state to RUNNING_LOGGING"),
            (Operation.SET_STATE, 3, "set device state to STOP_LOGGING"),
            (Operation.GET_MEMORY_SIZE, 1, "get memory size"),
            (Operation.GET_MEMORY_SIZE, 3, "get memory size"),
            (Operation.GET_MEMORY, 1, "get memory chunk at 0"),
            (Operation.GET_MEMORY, 3, f"get memory chunk at {16 * PAGE}"),
            (Operation.GET_CONFIG_SIZE, 2, "get config size"),  # the first is asked when it's opened
            (Operation.GET_CONFIG, 1, "get config"),
            (Operation.GET_BITMAP, 1, "get dirty bitmap of 10 pages at 0x100000000"),
        ],
    )
    async def test_what_a_source_is_refused_has_a_name(
        self, opened: Opener, operation: Operation, n: int, named: str
    ) -> None:
        with driver(faults=(Fault(operation, n, errno.EIO),)) as one, guest_memory(10) as fd:
            async with opened(one) as source:
                await source.dma_map(IOVA, 10 * PAGE, fd, 0)
                with pytest.raises(DeviceRefused, match=source.name) as caught:
                    await save(source, one)
                    await source.merge_dirty(IOVA, 10, memoryview(bytearray(2)))
                assert (caught.value.operation, caught.value.errno) == (named, errno.EIO)
                await source.resume()
            await self.check_unharmed(opened, one)

    @pytest.mark.parametrize(
        ("operation", "n", "number", "named"),
        [
            (Operation.SET_STATE, 1, errno.EIO, "set device state to STOP"),
            (Operation.SET_STATE, 2, errno.EIO, "set device state to RUNNING"),
            (Operation.SET_MEMORY_SIZE, 1, errno.ENOSPC, "set memory size to 200704"),
            (Operation.SET_MEMORY, 1, errno.EIO, "set memory chunk at 0"),
            (Operation.SET_MEMORY, 2, errno.EBADMSG, f"set memory chunk at {8 * PAGE}"),
            (Operation.SET_CONFIG_SIZE, 1, errno.EIO, "set config size to 3056"),
            (Operation.SET_CONFIG, 1, errno.EIO, "set config"),
        ],
    )
    async def test_what_a_target_is_refused_has_a_name(
        self, opened: Opener, operation: Operation, n: int, number: int, named: str
    ) -> None:
        with drivers({}, {"faults": (Fault(operation, n, number),)}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            async with opened(other) as target:
                with pytest.raises(DeviceRefused) as caught:
                    await load(target, saved)
                    await target.run()
                assert (caught.value.operation, caught.value.errno) == (named, number)
                assert ("memory" in str(caught.value).partition(";")[2]) == (number == errno.ENOSPC)
                await target.abandon()
                assert state(other) == State.STOP

    @pytest.mark.parametrize("size", [0, 2 * PAGE + 1, 1 << 40])
    async def test_a_config_that_does_not_fit_is_refused(self, opened: Opener, size: int) -> None:
        with driver() as other:
            async with opened(other) as target:
                await target.start_load()
                with pytest.raises(Incompatible, match=f"1 to {2 * PAGE}"):
                    await target.begin_config(size)
                await target.abandon()


class TestInProcess(FourRegionContract):
    @pytest.fixture(params=ORDERS)
    def opened(self, request: pytest.FixtureRequest) -> Opener:
        return in_process(request.param)


class TestOverVfioUser(FourRegionContract):
    @pytest.fixture(params=ORDERS)
    def opened(self, request: pytest.FixtureRequest) -> Opener:
        return over_vfio_user(request.param)


# ---- what the driver gets to see


class Listening(Between):
    """Remembers what is read from and written to the control region."""

    def __init__(self, access: Access) -> None:
        super().__init__(access)
        self.heard: list[tuple[str, int, bytes]] = []

    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        await super().read_into(index, offset, into)
        if index == CONTROL:
            self.heard.append(("read", offset, bytes(into)))

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        await super().write(index, offset, data)
        if index == CONTROL:
            self.heard.append(("write", offset, bytes(data)))

    def written(self, *offsets: int) -> list[tuple[int, ...]]:
        """The numbers written to the fields at ``offsets``, in order: (offset, number...)."""
        formats = {4: "<I", 8: "<Q", 16: "<QQ"}
        return [
            (offset, *struct.unpack(formats[len(data)], data))
            for kind, offset, data in self.heard
            if kind == "write" and offset in offsets
        ]

    def states(self) -> list[State]:
        return [State(value) for _, value in self.written(NATURAL.device_state)]


@asynccontextmanager
async def listening(
    one: ReferenceDevice, order: Order = "session"
) -> AsyncIterator[tuple[FourRegionDevice, Listening]]:
    access = Listening(InProcessAccess(one))
    async with await FourRegionDevice.open(access, order=order) as device:
        access.heard.clear()
        yield device, access


async def next_of(device: Device, most: int) -> memoryview:
    """The next bytes, which lie in memory."""
    piece = await device.next(most)
    assert piece is not None
    return piece


async def test_the_position_advances_with_each_chunk_that_is_read() -> None:
    """The save loop of the posted patches never moved it (line 1487 of the thread)."""
    with driver() as one:
        async with listening(one) as (source, access):
            await source.start_precopy()
            [(size, _)] = await take_round(source, cuts=(3 * PAGE,))
            assert size == 49 * PAGE
            expected = [
                step
                for chunk in range(7)
                for step in ((NATURAL.memory_pos, chunk * 8 * PAGE), (NATURAL.memory_action, 1))
            ]
            assert access.written(NATURAL.memory_pos, NATURAL.memory_action) == expected


async def test_the_position_advances_with_each_chunk_that_is_written() -> None:
    with drivers({"memory_region": 64 * PAGE}, {}) as (one, other):
        async with listening(one) as (source, _):
            saved = await save(source, one, rounds=0)
        async with listening(other) as (target, access):
            await load(target, saved, cuts=(3 * PAGE,))
            fields = (NATURAL.memory_size, NATURAL.memory_pos, NATURAL.memory_action)
            assert access.written(*fields) == [(NATURAL.memory_size, 49 * PAGE)] + [
                step
                for chunk in range(7)
                for step in ((NATURAL.memory_pos, chunk * 8 * PAGE), (NATURAL.memory_action, 2))
            ]
            assert access.written(NATURAL.config_size, NATURAL.config_action) == [
                (NATURAL.config_size, len(saved.config)),
                (NATURAL.config_action, 2),
            ]


async def test_sizes_are_read_once_a_capture() -> None:
    with driver() as one:
        async with listening(one) as (source, access):
            await save(source, one, rounds=2)
            reads = [offset for kind, offset, _ in access.heard if kind == "read"]
            assert reads == [NATURAL.memory_size] * 3 + [NATURAL.config_size]
            assert access.written(NATURAL.config_action) == [(NATURAL.config_action, 1)]


@pytest.mark.parametrize("memory", [48 * PAGE, 0])
async def test_the_session_order(memory: int) -> None:
    with driver(memory=memory) as one:
        async with listening(one) as (source, access):
            await source.start_precopy()
            assert access.states() == [State.RUNNING, State.RUNNING_LOGGING]
            access.heard.clear()
            if memory:
                await take_round(source)
            await halt(source)
            await source.release()
            assert access.states() == [State.STOP_LOGGING, State.STOP]


async def test_the_posted_order() -> None:
    with driver() as one:
        async with listening(one, "posted") as (source, access):
            await source.start_precopy()
            with pytest.raises(LocalProtocolError, match="first capture"):
                await source.merge_dirty(IOVA, 8, memoryview(bytearray(1)))
            await source.resume()
            access.heard.clear()

            await source.start_precopy()
            await source.begin_round()
            size = await source.capture()
            while size:
                size -= len(await next_of(source, size))
            assert access.states() == [State.RUNNING]  # the last bytes may still be looked at
            assert not await source.next(1)
            assert access.states() == [State.RUNNING]
            assert await source.capture() == 0
            assert access.states() == [State.RUNNING, State.RUNNING_LOGGING]
            await take_round(source)
            await halt(source)
            assert access.states()[2:] == [State.STOP_LOGGING]
            await source.resume()
            assert access.states()[3:] == [State.RUNNING]


async def test_the_posted_order_without_device_memory() -> None:
    with driver(memory=0) as one:
        async with listening(one, "posted") as (source, access):
            await source.start_precopy()
            assert access.states() == [State.RUNNING, State.RUNNING_LOGGING]


async def test_the_posted_order_stopped_before_the_first_capture_is_read() -> None:
    with drivers({}, {}) as (one, other):
        async with listening(one, "posted") as (source, access), listening(other) as (target, _):
            await source.start_precopy()
            await source.begin_round()
            size = await source.capture()
            await target.start_load()
            into = bytes(await next_of(source, 9 * PAGE))
            await halt(source)
            into += await drain(source, size - len(into))
            assert access.states() == [State.RUNNING, State.STOP_LOGGING]
            await target.begin_capture(size)
            await target.write(into)
            assert await take_round(source) == []
            config = await drain(source, await source.capture_config())
            await target.begin_config(len(config))
            await target.write(config)
            assert one.digest() == other.digest()


async def test_a_driver_forgets_a_capture_that_was_made_outside_logging() -> None:
    with driver() as one:
        async with listening(one, "posted") as (source, access):
            await source.start_precopy()
            await source.begin_round()
            await source.capture()
            await source.resume()
            assert access.states() == [State.RUNNING, State.RUNNING_LOGGING, State.RUNNING]
            await source.resume()
            assert access.states()[3:] == [State.RUNNING]


async def test_a_device_runs_on_even_if_its_driver_does_not_forget() -> None:
    with driver(faults=(Fault(Operation.SET_STATE, 2, errno.EIO),)) as one:
        async with listening(one, "posted") as (source, access):
            await source.start_precopy()
            await source.begin_round()
            await source.capture()
            with pytest.raises(DeviceRefused, match="RUNNING_LOGGING"):
                await source.resume()
            assert access.states() == [State.RUNNING, State.RUNNING]


async def test_an_empty_capture_is_not_announced_to_the_target() -> None:
    with driver() as one:
        async with listening(one) as (target, access):
            await target.start_load()
            await target.begin_capture(0)
            await target.abandon()
            assert access.heard == [("write", NATURAL.device_state, struct.pack("<I", State.STOP))]


async def test_a_large_range_is_asked_for_in_parts_that_fit_the_bitmap_region() -> None:
    pages = 2 * 8 * PAGE + 21
    with driver() as one, guest_memory(pages) as fd:
        async with listening(one) as (source, access):
            await source.dma_map(IOVA, pages * PAGE, fd, 0)
            await source.start_precopy()
            await source.merge_dirty(IOVA, pages, memoryview(bytearray((pages + 7) // 8)))
            part = 8 * PAGE
            assert access.written(NATURAL.start_addr) == [
                (NATURAL.start_addr, IOVA, part),
                (NATURAL.start_addr, IOVA + part * PAGE, part),
                (NATURAL.start_addr, IOVA + 2 * part * PAGE, 21),
            ]


@pytest.mark.parametrize("length", [0, 1, 3])
async def test_a_bitmap_of_another_size_is_refused(length: int) -> None:
    with driver() as one:
        async with listening(one) as (source, _):
            await source.start_precopy()
            with pytest.raises(LocalProtocolError, match="12 pages"):
                await source.merge_dirty(IOVA, 12, memoryview(bytearray(length)))


async def test_bits_beyond_the_range_are_not_believed() -> None:
    class Stray(Between):
        async def read_into(self, index: int, offset: int, into: memoryview) -> None:
            await super().read_into(index, offset, into)
            if index == BITMAP:
                into[:] = b"\xff" * len(into)

    with driver(mmap="none") as one, guest_memory(12) as fd:
        async with await FourRegionDevice.open(Stray(InProcessAccess(one))) as source:
            await source.dma_map(IOVA, 12 * PAGE, fd, 0)
            await source.start_precopy()
            bitmap = bytearray(2)
            await source.merge_dirty(IOVA, 12, memoryview(bitmap))
            assert bitmap == b"\xff\x0f"


@pytest.mark.parametrize("size", [0, 2 * PAGE + 1, (1 << 64) - 1])
async def test_a_config_size_that_can_not_be_is_not_believed(size: int) -> None:
    class Wrong(Between):
        wrong = False

        async def read_into(self, index: int, offset: int, into: memoryview) -> None:
            await super().read_into(index, offset, into)
            if self.wrong and (index, offset) == (CONTROL, NATURAL.config_size):
                into[:] = struct.pack("<Q", size)

    with driver() as one:
        access = Wrong(InProcessAccess(one))
        async with await FourRegionDevice.open(access) as source:
            await source.start_precopy()
            await halt(source)
            access.wrong = True
            with pytest.raises(DeviceBroken, match=str(size)):
                await source.capture_config()
            await source.resume()


async def test_each_operation_leaves_a_trace(caplog: pytest.LogCaptureFixture) -> None:
    with driver(mmap="none") as one, caplog.at_level(logging.DEBUG, "vfiostream.device"):
        async with await FourRegionDevice.open(InProcessAccess(one, "in-process:a")) as source:
            await save(source, one, rounds=1, cuts=(8 * PAGE,))
    text = [record.getMessage() for record in caplog.records if record.name == "vfiostream.device"]
    for what in (
        "get version",
        "get caps",
        "get config size",
        "read PCI config space",
        "read the driver's own version",
        "set device state to RUNNING_LOGGING",
        "get memory size",
        f"get memory chunk at {8 * PAGE}",
        f"read {8 * PAGE} bytes of its memory region at 0",
        "get config",
    ):
        assert f"in-process:a: {what}" in text


# ---- cancelled at every access


class Interrupting(Between):
    """Cancels ``scope`` at the ``n``-th read or write: before it, in its middle, or when it's done."""

    scope: anyio.CancelScope

    def __init__(self, access: Access, n: int, when: str) -> None:
        super().__init__(access)
        self.left = n
        self._when = when

    async def _interrupted(self, call: Callable[[], Awaitable[None]]) -> None:
        self.left -= 1
        if self.left != 0:
            await call()
            return
        if self._when == "before":
            self.scope.cancel()
        if self._when == "in the middle":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._cancel_when_blocked)
                await call()
        else:
            await call()
        self.scope.cancel()
        await anyio.lowlevel.checkpoint()

    async def _cancel_when_blocked(self) -> None:
        await anyio.wait_all_tasks_blocked()
        self.scope.cancel()

    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        await self._interrupted(lambda: self.access.read_into(index, offset, into))

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        await self._interrupted(lambda: self.access.write(index, offset, data))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("order", ORDERS)
async def test_a_source_cancelled_at_any_access_runs_on(order: Order, when: str) -> None:
    with drivers({"memory_region": 32 * PAGE}, {}) as (one, other):
        for n in range(1, 1000):
            access = Interrupting(InProcessAccess(one), 0, when)
            async with await FourRegionDevice.open(access, order=order) as source:
                access.left = n
                with anyio.CancelScope() as scope:
                    access.scope = scope
                    await save(source, one, rounds=1)
                await source.resume()
                assert state(one) == State.RUNNING
                if not scope.cancelled_caught:
                    break
            async with await FourRegionDevice.open(InProcessAccess(one)) as source:
                saved = await save(source, one, rounds=0)
            async with await FourRegionDevice.open(InProcessAccess(other)) as target:
                await load(target, saved)
                assert one.digest() == other.digest()
        else:
            raise AssertionError("it never came to its end")
        assert n == 15


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_target_cancelled_at_any_access_is_abandoned(when: str) -> None:
    with drivers({}, {"memory_region": 32 * PAGE}) as (one, other):
        async with await FourRegionDevice.open(InProcessAccess(one)) as source:
            saved = await save(source, one, rounds=0)
        for n in range(1, 1000):
            access = Interrupting(InProcessAccess(other), 0, when)
            async with await FourRegionDevice.open(access) as target:
                access.left = n
                with anyio.CancelScope() as scope:
                    access.scope = scope
                    await load(target, saved)
                    await target.run()
                if not scope.cancelled_caught:
                    break
                await target.abandon()
                assert state(other) == State.STOP
        else:
            raise AssertionError("it never came to its end")
        assert n > 12
        assert (state(other), other.digest()) == (State.RUNNING, one.digest())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 11])
async def test_a_source_cancelled_while_it_waits_for_the_server_runs_on(n: int) -> None:
    with driver(state_time=0.005, capture_time=0.005) as one, served(one) as path:
        access = Interrupting(await vfio_user.connect(path), 0, "in the middle")
        async with await FourRegionDevice.open(access) as source:
            access.left = n
            with anyio.CancelScope() as scope:
                access.scope = scope
                await save(source, one, rounds=1)
            assert scope.cancel_called
            await source.resume()
            assert state(one) == State.RUNNING


# ---- finding the interface


@dataclass
class Table:
    """What a device says of itself; the reference device's, until a test changes it."""

    regions: dict[int, dict[str, Any]]
    control: dict[int, bytes]
    config_space: bytes | None = None
    version: bytes | None = None
    is_pci: bool = True
    num_regions: int = 14


class Altered(Between):
    """Over the reference device, with another table."""

    def __init__(self, access: Access, table: Table) -> None:
        super().__init__(access)
        self.table = table
        self.info = replace(access.info, is_pci=table.is_pci, num_regions=table.num_regions)

    async def region_info(self, index: int) -> RegionInfo:
        return replace(await super().region_info(index), **self.table.regions.get(index, {}))

    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        if index == CONTROL and offset in self.table.control:
            into[:] = self.table.control[offset]
        elif index == 7 and self.table.config_space is not None:
            into[:] = self.table.config_space
        elif index == VERSION and self.table.version is not None:
            into[:] = self.table.version
        else:
            await super().read_into(index, offset, into)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (Table({CONTROL: {"type": None}}, {}), "no control region"),
        (Table({CONTROL: {"type": 1}}, {}), "no control region"),
        (Table({CONTROL: {"size": 0}}, {}), "no control region"),
        (Table({CONFIG: {"type": None}}, {}), "no config region"),
        (Table({}, {}, num_regions=10), "no config region"),
        (Table({MEMORY: {"subtype": 2}}, {}), "two config regions, 10 and 11"),
        (Table({MEMORY: {"subtype": 5}}, {}), "unknown subtype 5"),
        (Table({MEMORY: {"subtype": 0}}, {}), "unknown subtype 0"),
        (Table({CONTROL: {"size": 59}}, {}), "control region has 59 bytes"),
        (Table({CONTROL: {"size": 64}}, {}), "control region has 64 bytes"),
        (Table({CONTROL: {"writable": False}}, {}), "control region, 9, can't be both"),
        (Table({CONFIG: {"readable": False}}, {}), "config region, 10, can't be both"),
        (Table({}, {NATURAL.version: u32(2)}), "version 2"),
        (Table({}, {NATURAL.version: u32(0)}), "version 0"),
        (Table({}, {NATURAL.caps: u32(2)}), "memory region and its driver does not have"),
        (Table({}, {NATURAL.caps: u32(1)}), "bitmap region and its driver does not have"),
        (Table({MEMORY: {"type": None}}, {}), "DEVICE_MEMORY and no memory region"),
        (Table({BITMAP: {"size": 0}}, {}), "SYSTEM_MEMORY and no bitmap region"),
        (Table({}, {NATURAL.caps: u32(7)}), "not known here"),
        (Table({}, {NATURAL.config_size: struct.pack("<Q", 3 * PAGE)}), "does not fit its region"),
        (Table({7: {"size": 32}}, {}), "config space of 32 bytes"),
        (Table({7: {"size": 1 << 40}}, {}), "config space of"),
        (Table({}, {}, config_space=bytes(14) + b"\x01" + bytes(241)), "header type 1"),
        (Table({}, {}, version=b"\xff" + bytes(4095)), "UTF-8"),
    ],
)
async def test_a_device_without_all_of_the_interface_is_blocked(table: Table, what: str) -> None:
    with driver() as one:
        access = Altered(InProcessAccess(one, "in-process:odd"), table)
        with pytest.raises(Incompatible, match=f"^in-process:odd can't be moved: .*{what}"):
            await FourRegionDevice.open(access)
        assert access.closed


async def test_a_ccw_device_with_the_same_type_is_not_taken_for_one() -> None:
    """Linux: type 2 with the subtypes async command, schib and crw."""
    regions = {9: {"size": 16}, 10: {"size": 64, "writable": False}, 11: {"size": 4, "writable": False}}
    with driver() as one:
        with pytest.raises(Incompatible):
            await FourRegionDevice.open(Altered(InProcessAccess(one), Table(regions, {}, is_pci=False)))


async def test_the_regions_are_found_wherever_they_are() -> None:
    """By their types: the indexes say nothing."""

    class Shuffled(Between):
        places = {CONTROL: MEMORY, MEMORY: CONTROL, CONFIG: BITMAP, BITMAP: CONFIG}  # noqa: RUF012 - it's constant

        async def region_info(self, index: int) -> RegionInfo:
            return replace(await super().region_info(self.places.get(index, index)), index=index)

        async def read_into(self, index: int, offset: int, into: memoryview) -> None:
            await super().read_into(self.places.get(index, index), offset, into)

        async def write(self, index: int, offset: int, data: Buffer) -> None:
            await super().write(self.places.get(index, index), offset, data)

        async def map(self, info: RegionInfo) -> Sequence[MappedArea]:
            return await super().map(replace(info, index=self.places.get(info.index, info.index)))

    with drivers({"mmap": "sparse"}, {"mmap": "sparse"}) as (one, other):
        async with (
            await FourRegionDevice.open(Shuffled(InProcessAccess(one))) as source,
            await FourRegionDevice.open(Shuffled(InProcessAccess(other))) as target,
        ):
            await load(target, await save(source, one))
            assert one.digest() == other.digest()


@pytest.mark.parametrize(
    "altered",
    [{"size": 8192}, {"writable": False}, {"type": (1 << 31) | 0x8086}, {"subtype": 2}, {"type": None}],
)
async def test_what_is_not_quite_a_version_region_is_not_one(altered: dict[str, Any]) -> None:
    with driver() as one:
        async with await FourRegionDevice.open(Altered(InProcessAccess(one), Table({VERSION: altered}, {}))) as device:
            assert device.description.version is None
            assert await device.accepts("anything")


async def test_an_empty_version_is_none() -> None:
    with driver() as one:
        async with await FourRegionDevice.open(Altered(InProcessAccess(one), Table({}, {}, version=bytes(4096)))) as it:
            assert it.description.version is None


async def test_a_device_that_is_not_on_pci() -> None:
    with driver() as one:
        table = Table({}, {}, is_pci=False)
        async with await FourRegionDevice.open(Altered(InProcessAccess(one), table)) as device:
            assert device.description.pci is None
            assert device.description.version is None
            assert await device.read_pci_config() is None
            await device.start_load()
            with pytest.raises(Incompatible, match="not on PCI"):
                await device.load_pci_config(bytes(256))
            await device.abandon()


async def test_the_layout_can_be_asked_for() -> None:
    with driver(layout="packed") as one:
        with pytest.raises(Incompatible, match="natural layout"):
            await FourRegionDevice.open(InProcessAccess(one), layout="natural")
        large = Table({CONTROL: {"size": 4096}}, {})
        async with await FourRegionDevice.open(Altered(InProcessAccess(one), large), layout="packed") as source:
            await save(source, one)
            await source.resume()
        with pytest.raises(DeviceRefused, match="get config size"):
            await FourRegionDevice.open(Altered(InProcessAccess(one), large))
    assert PACKED.config_size != NATURAL.config_size


@pytest.mark.parametrize(
    ("operation", "named"),
    [
        (Operation.GET_VERSION, "get version"),
        (Operation.GET_CAPS, "get caps"),
        (Operation.GET_CONFIG_SIZE, "get config size"),
    ],
)
async def test_opening_fails_with_the_operation_that_was_refused(operation: Operation, named: str) -> None:
    with driver(faults=(Fault(operation, 1, errno.EIO),)) as one:
        access = Between(InProcessAccess(one))
        with pytest.raises(DeviceRefused) as caught:
            await FourRegionDevice.open(access)
        assert caught.value.operation == named
        assert access.closed


@pytest.mark.parametrize("mmap", ["none", "sparse"])
async def test_a_refused_data_region_is_named(mmap: str) -> None:
    class Refusing(Between):
        async def read_into(self, index: int, offset: int, into: memoryview) -> None:
            if index == MEMORY:
                raise DeviceRefused(self.name, "a read of some bytes", errno.EIO)
            await super().read_into(index, offset, into)

    with driver(mmap=mmap) as one:
        async with await FourRegionDevice.open(Refusing(InProcessAccess(one))) as source:
            await source.start_precopy()
            await source.begin_round()
            await source.capture()
            with pytest.raises(DeviceRefused, match="of its memory region at 0"):
                await source.read([memoryview(bytearray(PAGE))])
            await source.resume()


@pytest.mark.parametrize(("fault", "error"), [("hang", DeviceTimeout), ("exit", DeviceLost)])
async def test_a_device_that_goes_away_is_told_apart(fault: Literal["hang", "exit"], error: type[DeviceError]) -> None:
    with driver(faults=(Fault(Operation.GET_MEMORY, 1, fault),)) as one:
        async with await FourRegionDevice.open(InProcessAccess(one)) as source:
            await source.start_precopy()
            await source.begin_round()
            await source.capture()
            with pytest.raises(error):
                await source.next(PAGE)


# ---- addresses


async def test_a_device_is_opened_by_its_address() -> None:
    with driver() as one, served(one) as path:
        async with await open_device(f"vfio-user:{path}", order="posted") as device:
            assert device.name == f"vfio-user:{path}"
            assert device.description.interface == "four-region"


async def test_a_device_that_takes_too_long() -> None:
    with driver(faults=(Fault(Operation.SET_STATE, 1, "hang"),)) as one, served(one) as path:
        async with await open_device(f"vfio-user:{path}", timeout=0.1) as device:
            with pytest.raises(DeviceTimeout, match="0.1 s"):
                await device.start_precopy()


@pytest.mark.parametrize("address", ["", "vfio-user:", "pci:0000:00:02.0", "device.sock"])
async def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(UsageError):
        await open_device(address)


async def test_nobody_at_the_address(tmp_path: Path) -> None:
    with pytest.raises(DeviceLost):
        await open_device(f"vfio-user:{tmp_path}/nobody")
