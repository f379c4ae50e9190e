"""Reads into several chunks at once: as many as are worth it, as the budget has left over, and whole in every case."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import cast

import anyio
import pytest

from tests.device_contract import driver
from tests.protocol_streams import HELLO
from vfiostream.devices.contract import Device
from vfiostream.devices.migration_states import MigrationStatesDevice, migration_flags
from vfiostream.migrate import receive, send
from vfiostream.pipeline import reading
from vfiostream.pipeline.budget import enough_for
from vfiostream.pipeline.outbound import Outbound
from vfiostream.pipeline.progress import Progress
from vfiostream.pipeline.reading import AT_ONCE, MOST_CHUNKS, Reading
from vfiostream.pipeline.settings import Settings
from vfiostream.protocol.sessions import SourceSession
from vfiostream.transports.memory import memory_pair
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess

pytestmark = pytest.mark.anyio
CHUNK = 64 * 1024
SMALLEST = Settings(chunk=CHUNK, budget=enough_for(CHUNK))
"""Room for twenty chunks."""


class Driver:
    """Fills what it is offered with the numbers of the chunks, in its own time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, per_chunk: float = AT_ONCE / 100) -> None:
        self.per_chunk = per_chunk
        """Seconds."""
        self.gives: int | None = None
        """Bytes for the next read; None for as many as fit."""
        self.offered: list[int] = []
        """Chunks, of each read."""
        self.now = 0.0
        monkeypatch.setattr(reading, "monotonic", lambda: self.now)

    async def read(self, into: Sequence[memoryview]) -> int:
        assert {len(view) for view in into} == {CHUNK}
        self.offered.append(len(into))
        for number, view in enumerate(into):
            view[:] = bytes([number]) * CHUNK
        count = CHUNK * len(into) if self.gives is None else self.gives
        self.now += count / CHUNK * self.per_chunk
        return count


@pytest.fixture
async def line() -> Outbound:
    return Outbound(memory_pair(1)[0], SourceSession(HELLO, answers=False), SMALLEST, Progress())


def reads(driver: object, line: Outbound) -> Reading:
    return Reading(cast(Device, driver), line, CHUNK)


async def take(reads: Reading, times: int = 1) -> None:
    for _ in range(times):
        for lease in await reads.read():
            lease.release()


@pytest.mark.parametrize(
    ("per_chunk", "offered"),
    [
        (AT_ONCE / 1000, MOST_CHUNKS),
        (AT_ONCE / MOST_CHUNKS, MOST_CHUNKS),
        (AT_ONCE / 2.5, 2),
        (AT_ONCE * 0.9, 1),
        (AT_ONCE * 1000, 1),
        (0.0, MOST_CHUNKS),
    ],
)
async def test_as_much_is_asked_for_as_the_driver_gives_at_once(
    monkeypatch: pytest.MonkeyPatch, line: Outbound, per_chunk: float, offered: int
) -> None:
    driver = Driver(monkeypatch, per_chunk)
    await take(reads(driver, line), 3)
    assert driver.offered == [1, offered, offered]
    assert line.budget.used == 0


async def test_a_driver_that_slows_down_is_asked_for_less(monkeypatch: pytest.MonkeyPatch, line: Outbound) -> None:
    driver = Driver(monkeypatch)
    one = reads(driver, line)
    await take(one, 2)
    driver.per_chunk = AT_ONCE
    await take(one, 2)
    driver.per_chunk = AT_ONCE / 100
    await take(one, 2)
    assert driver.offered == [1, 8, 8, 1, 1, 8]


async def test_a_driver_that_gives_little_at_a_time_is_offered_little(
    monkeypatch: pytest.MonkeyPatch, line: Outbound
) -> None:
    driver = Driver(monkeypatch, AT_ONCE)  # a page takes a sixteenth of it
    driver.gives = 4096
    await take(reads(driver, line), 3)
    assert driver.offered == [1, 1, 1]


async def test_what_is_filled_is_the_callers_and_the_rest_is_given_back(
    monkeypatch: pytest.MonkeyPatch, line: Outbound
) -> None:
    driver = Driver(monkeypatch)
    one = reads(driver, line)
    await take(one)
    driver.gives = 2 * CHUNK + 5
    leases = await one.read()
    assert [bytes(lease.view) for lease in leases] == [bytes(CHUNK), bytes([1]) * CHUNK, bytes([2]) * 5]
    assert (driver.offered[-1], line.budget.used) == (8, 3 * CHUNK)
    driver.gives = 0
    assert await one.read() == []
    assert line.budget.used == 3 * CHUNK


async def test_half_of_the_budget_is_left_to_others(monkeypatch: pytest.MonkeyPatch, line: Outbound) -> None:
    driver = Driver(monkeypatch)
    one = reads(driver, line)
    await take(one)
    held = [await line.take(CHUNK) for _ in range(7)]
    await take(one)
    held += [await line.take(CHUNK) for _ in range(12)]
    await take(one)  # into the last one
    assert driver.offered == [1, 3, 1]


async def test_devices_that_read_at_once_do_not_wait_for_each_others_chunks(
    monkeypatch: pytest.MonkeyPatch, line: Outbound
) -> None:
    count = 12
    entered = 0
    all_read = anyio.Event()

    class Meeting(Driver):
        async def read(self, into: Sequence[memoryview]) -> int:
            nonlocal entered
            if self.offered:
                entered += 1
                if entered == count:
                    all_read.set()
                await all_read.wait()
            return await super().read(into)

    drivers = [Meeting(monkeypatch) for _ in range(count)]
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for driver in drivers:
                tasks.start_soon(take, reads(driver, line), 2)
    assert sorted(driver.offered[1] for driver in drivers)[-1] == 8
    assert line.budget.used == 0


async def test_what_a_driver_may_still_write_to_is_not_given_back(
    monkeypatch: pytest.MonkeyPatch, line: Outbound
) -> None:
    class Stuck(Driver):
        async def read(self, into: Sequence[memoryview]) -> int:
            if not self.offered:
                return await super().read(into)
            reached.set()
            await anyio.sleep_forever()
            raise AssertionError("it was woken")

    reached = anyio.Event()
    one = reads(Stuck(monkeypatch), line)
    await take(one)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.read)
        await reached.wait()
        tasks.cancel_scope.cancel()
    assert line.budget.used == 8 * CHUNK


async def opened(one: ReferenceDevice) -> MigrationStatesDevice:
    access = InProcessAccess(one)
    flags = await migration_flags(access)
    assert flags is not None
    return await MigrationStatesDevice.open(access, flags, [await access.region_info(n) for n in range(9)])


@pytest.mark.parametrize("compression", [0, 3])
async def test_several_devices_arrive_whole(monkeypatch: pytest.MonkeyPatch, compression: int) -> None:
    monkeypatch.setattr(reading, "monotonic", lambda: 0.0)  # so fast that every read is of several chunks
    most = []
    read = MigrationStatesDevice.read

    async def seen(device: MigrationStatesDevice, into: Sequence[memoryview]) -> int:
        most.append(len(into))
        return await read(device, into)

    monkeypatch.setattr(MigrationStatesDevice, "read", seen)
    kind = {"interface": "migration-states", "memory": 40 * CHUNK + 4096, "data": "text"}
    settings = Settings(chunk=CHUNK, budget=4 * enough_for(CHUNK), compression=compression)
    with ExitStack() as stack:
        a, b, c, d = (stack.enter_context(driver(**kind, seed=seed)) for seed in range(4))
        sources, targets = [await opened(a), await opened(b)], [await opened(c), await opened(d)]
        here, there = memory_pair(1 << 20)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: receive(targets, there, settings=settings))
                await send(sources, here, settings=settings)
        assert (a.digest(), b.digest()) == (c.digest(), d.digest())
        assert max(most) > 2
        for device in (*sources, *targets):
            await device.aclose()
