"""The migration region: the device contract over both accesses, and what it says to the driver."""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, ClassVar

import pytest

from tests.between import Between
from tests.device_contract import (
    PAGE,
    Opener,
    ReadableSettingsContract,
    Saved,
    SizedContract,
    drain,
    driver,
    drivers,
    halt,
    in_process,
    load,
    over_vfio_user,
    runs,
    save,
    start,
    take_round,
)
from vfiostream.access.contract import Access
from vfiostream.buffers import Buffer
from vfiostream.devices.contract import Device, Pending
from vfiostream.devices.finding import find
from vfiostream.errors import DeviceBroken, DeviceRefused
from vfiostream.uapi.vfio import RegionState as State
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.settings import Fault, Operation

pytestmark = pytest.mark.anyio


REGION = 9


class RegionContract(SizedContract, ReadableSettingsContract):
    interface = "migration-region"
    numbers: ClassVar = {"running": 1, "stopped": 0, "stopped and saving": 2, "loading": 4}

    def tell(self, one: Any, state: int) -> None:
        one.write(REGION, 0, struct.pack("<I", state))


class TestInProcess(RegionContract):
    @pytest.fixture
    def opened(self) -> Opener:
        return in_process()


class TestOverVfioUser(RegionContract):
    @pytest.fixture
    def opened(self) -> Opener:
        return over_vfio_user()


# ---- what the driver gets to see

STATE, PENDING, OFFSET, SIZE = 0, 8, 16, 24
KIND: dict[str, Any] = {"interface": "migration-region"}


def region_driver(**changes: Any) -> AbstractContextManager[ReferenceDevice]:
    return driver(**KIND, **changes)


class Heard(Between):
    """Remembers what is read from and written to the header, and answers some of it itself."""

    def __init__(self, access: Access) -> None:
        super().__init__(access)
        self.heard: list[tuple[str, int, int]] = []
        """What, where, and which number."""
        self.answers: dict[int, int] = {}
        """By field, instead of the driver's."""

    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        await super().read_into(index, offset, into)
        if index == REGION and offset < 32:
            if offset in self.answers:
                into[:] = self.answers[offset].to_bytes(len(into), "little")
            self.heard.append(("read", offset, int.from_bytes(into, "little")))

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        if index == REGION and offset < 32:
            self.heard.append(("write", offset, int.from_bytes(data, "little")))
        await super().write(index, offset, data)

    def written(self, offset: int) -> list[int]:
        return [number for what, at, number in self.heard if (what, at) == ("write", offset)]

    def fields(self) -> list[tuple[str, int]]:
        return [(what, offset) for what, offset, _ in self.heard]


@asynccontextmanager
async def heard(one: ReferenceDevice) -> AsyncIterator[tuple[Device, Heard]]:
    access = Heard(InProcessAccess(one, "in-process:a"))
    async with await find(access) as device:
        access.heard.clear()
        yield device, access


async def test_the_states_on_the_way() -> None:
    with drivers(KIND, KIND) as (one, other):
        async with heard(one) as (source, access), heard(other) as (target, answers):
            saved = await save(source, one)
            assert access.written(STATE) == [State.RUNNING | State.SAVING, State.SAVING]
            await load(target, saved)
            await start(target)
            assert answers.written(STATE) == [State.RESUMING, State.RUNNING]
            await source.release()
            await source.resume()
            assert access.written(STATE)[2:] == [0, State.RUNNING]


async def test_a_session_that_was_left_behind_is_ended_first() -> None:
    with region_driver() as one:
        one.write(REGION, STATE, struct.pack("<I", 3))
        async with heard(one) as (source, access):
            await source.start_precopy()
            assert access.written(STATE) == [State.RUNNING, State.RUNNING | State.SAVING]
            await source.resume()


async def test_reserved_bits_of_the_state_are_kept() -> None:
    with region_driver() as one:
        async with heard(one) as (source, access):
            access.answers[STATE] = 0xABCD_EF00 | State.RUNNING
            with pytest.raises(DeviceRefused):  # this driver does not know them
                await source.start_precopy()
            assert access.written(STATE) == [0xABCD_EF00 | State.RUNNING | State.SAVING]


async def test_an_iteration_is_in_the_header_s_order_and_its_end_frees_the_place() -> None:
    with region_driver() as one:
        async with heard(one) as (source, access):
            await source.start_precopy()
            access.heard.clear()
            await source.begin_round()
            assert access.fields() == [("read", PENDING)]
            access.heard.clear()
            size = await source.capture()
            assert access.heard[1:] == [("read", OFFSET, PAGE), ("read", SIZE, size)]
            assert access.fields()[0] == ("read", PENDING)
            access.heard.clear()
            await drain(source, size)
            assert access.heard == []
            await source.capture()
            assert access.fields()[0] == ("read", PENDING)
            await source.resume()


@pytest.mark.parametrize("there", [8 * PAGE, 20 * PAGE])
async def test_segments_are_the_source_s_where_they_fit(there: int) -> None:
    with drivers(KIND, {**KIND, "memory_region": there}) as (one, other):
        async with heard(one) as (source, _), heard(other) as (target, access):
            saved = await save(source, one)
            assert max(size or 0 for size, _ in saved.captures) == 8 * PAGE
            await load(target, saved, cuts=(3000,))
            assert access.written(SIZE) == [size for size, _ in saved.captures]
            assert [offset for what, offset, _ in access.heard if what == "read"].count(OFFSET) == len(saved.captures)


async def test_segments_are_cut_where_the_target_s_region_is_smaller() -> None:
    with drivers(KIND, {**KIND, "memory_region": 3 * PAGE}) as (one, other):
        async with heard(one) as (source, _), heard(other) as (target, access):
            saved = await save(source, one, rounds=0)
            await load(target, saved)
            assert access.written(SIZE)[:4] == [3 * PAGE, 3 * PAGE, 2 * PAGE, 3 * PAGE]
            await start(target)
            assert one.digest() == other.digest()


async def test_what_is_pending_is_what_the_driver_says_and_asking_changes_nothing() -> None:
    with region_driver() as one:
        async with heard(one) as (source, access):
            await source.start_precopy()
            access.answers[PENDING] = 4711
            assert await source.pending() == Pending(0, 4711)
            del access.answers[PENDING]
            for _ in range(3):
                await source.pending()
            assert Saved(await take_round(source)).size >= one.settings.memory
            await source.resume()


async def test_a_round_has_what_was_pending_at_its_start_and_little_more() -> None:
    with region_driver(memory_region=PAGE) as one:
        async with heard(one) as (source, access):
            await source.start_precopy()
            access.answers[PENDING] = 5 * PAGE
            await source.begin_round()
            del access.answers[PENDING]
            sizes = []
            while size := await source.capture():
                sizes.append(size)
                await drain(source, size)
            assert sizes == [PAGE] * 5
            await source.resume()


# ---- what makes no sense


@pytest.mark.parametrize(
    ("field", "number", "problem"),
    [
        (OFFSET, 0, "data is at 0"),
        (OFFSET, 31, "data is at 31"),
        (OFFSET, 9 * PAGE, f"data is at {9 * PAGE}"),
        (OFFSET, (1 << 64) - 1, "data is at 18446744073709551615"),
        (SIZE, 8 * PAGE + 1, f"there are {8 * PAGE + 1} bytes at {PAGE}"),
        (SIZE, (1 << 64) - 1, "there are 18446744073709551615 bytes"),
    ],
)
async def test_places_outside_the_region_are_not_believed(field: int, number: int, problem: str) -> None:
    with region_driver() as one:
        async with heard(one) as (source, access):
            await source.start_precopy()
            await source.begin_round()
            access.answers[field] = number
            with pytest.raises(DeviceBroken, match=f"in-process:a: .*{problem}"):
                await source.capture()
            await source.resume()
        if field == OFFSET:
            async with heard(one) as (target, access):
                access.answers[field] = number
                await target.start_load()
                with pytest.raises(DeviceBroken, match=problem):
                    await target.begin_capture(100)
                await target.abandon()
                assert not runs(one)


async def test_nothing_though_something_is_pending() -> None:
    with region_driver() as one:
        async with heard(one) as (source, access):
            await source.start_precopy()
            access.answers[SIZE] = 0
            assert await take_round(source) == []  # for now
            await halt(source)
            with pytest.raises(DeviceBroken, match="stopped, says that [0-9]+ bytes are pending and gives none"):
                await take_round(source)
            await source.resume()


@pytest.mark.parametrize("number", [5, 7])
async def test_a_state_that_can_not_be(number: int) -> None:
    with region_driver() as one:
        async with heard(one) as (device, access):
            access.answers[STATE] = number
            with pytest.raises(DeviceBroken, match=f"in-process:a: .*state {number:#x}"):
                await device.start_precopy()
            with pytest.raises(DeviceBroken, match=f"state {number:#x}"):
                await device.start_load()


@pytest.mark.parametrize(
    ("effect", "error", "text"),
    [
        (errno.EIO, DeviceRefused, "it is in RUNNING|SAVING now; its driver's log may say why"),
        ("error", DeviceBroken, "it is in the error state now: only a reset gets it out of there"),
    ],
)
async def test_a_change_that_is_refused_says_where_the_device_is_now(
    effect: Any, error: type[Exception], text: str
) -> None:
    with region_driver(faults=(Fault(Operation.SET_STATE, 2, effect),)) as one:
        async with heard(one) as (source, _):
            await source.start_precopy()
            await source.quiesce()
            with pytest.raises(error) as caught:
                await source.stop()
            assert "in-process:a: the driver refused set device state to SAVING with EIO" in str(caught.value)
            assert text in str(caught.value)


async def test_each_operation_leaves_a_trace(caplog: pytest.LogCaptureFixture) -> None:
    with drivers({**KIND, "mmap": "none"}, {**KIND, "mmap": "none"}) as (one, other):
        with caplog.at_level(logging.DEBUG, "vfiostream.device"):
            async with heard(one) as (source, _), heard(other) as (target, _):
                await load(target, await save(source, one, rounds=1, cuts=(8 * PAGE,)), cuts=(8 * PAGE,))
    text = [record.getMessage() for record in caplog.records if record.name == "vfiostream.device"]
    for what in (
        "ask for a log of its DMA",
        "get device state",
        "set device state to RUNNING|SAVING",
        "get pending bytes",
        "get data offset",
        "get data size",
        f"read {8 * PAGE} bytes of its migration region at {PAGE}",
        f"write {8 * PAGE} bytes of its migration region at {PAGE}",
        f"set data size to {8 * PAGE}",
        "read PCI config space",
    ):
        assert f"in-process:a: {what}" in text
