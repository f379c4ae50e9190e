"""The migration states: the device contract over both accesses, with every set of optional states, and what the driver
gets to see.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import pytest

from tests.between import Between, DataBetween, T
from tests.device_contract import (
    PAGE,
    Opener,
    ReadableSettingsContract,
    Saved,
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
from vfiostream.access.contract import Access, MigrationData, PrecopyInfo
from vfiostream.devices import migration_states
from vfiostream.devices.contract import Device, Pending
from vfiostream.devices.finding import find
from vfiostream.errors import DeviceBroken, DeviceRefused, Incompatible
from vfiostream.uapi.vfio import (
    FEATURE_DATA_SIZE,
    FEATURE_MIG_STATE,
    Feature,
    FeatureOperation,
    MigrationState as State,
)
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.settings import Fault, Operation

pytestmark = pytest.mark.anyio

ENOMSG = errno.ENOMSG
ALL = ("stop-copy", "p2p", "pre-copy")


class StatesContract(ReadableSettingsContract):
    interface = "migration-states"
    numbers: ClassVar = {
        "running": State.RUNNING,
        "stopped": State.STOP,
        "stopped and saving": State.STOP_COPY,
        "loading": State.RESUMING,
    }

    def tell(self, one: Any, state: int) -> None:
        one.driver.set_migration_state(state)

    async def test_a_capture_with_a_size_is_refused(self, opened: Opener) -> None:
        with self.driver() as other:
            async with opened(other) as target:
                await target.start_load()
                await target.begin_capture(0)  # nothing at all is no matter
                with pytest.raises(Incompatible, match="same kind"):
                    await target.begin_capture(100)
                await target.abandon()


class TestInProcess(StatesContract):
    @pytest.fixture(autouse=True, params=[ALL, ("stop-copy", "pre-copy"), ("stop-copy", "p2p"), ("stop-copy",)])
    def states(self, request: pytest.FixtureRequest) -> None:
        self.fixed = {"states": request.param}

    @pytest.fixture
    def opened(self) -> Opener:
        return in_process()


class TestOverVfioUser(StatesContract):
    @pytest.fixture
    def opened(self) -> Opener:
        return over_vfio_user()


# ---- what the driver gets to see


class Driven(Between):
    """Remembers the states that are told and the features that are asked, and answers some questions itself."""

    told: PrecopyInfo | int | None = None
    """The answer to precopy_info, an errno to refuse it with, or None for the driver's own answer."""
    length: int | None = None
    """The answer to MIG_DATA_SIZE: bytes, or an errno to refuse it with if negative."""
    number: int | None = None
    """The state that the device is said to be in."""
    empty: int | None = ENOMSG
    """With which a read is refused that finds nothing in PRE_COPY; None for one that returns 0."""
    opens = True
    """Whether a change of state comes with its stream of data."""
    again = False
    """Whether the stop comes with another stream."""
    resets = True
    """Whether a reset does anything."""

    def __init__(self, access: Access) -> None:
        super().__init__(access)
        self.states: list[State] = []
        self.asked: list[tuple[FeatureOperation, Feature]] = []
        self.streams: list[Stream] = []

    async def set_migration_state(self, state: int) -> MigrationData | None:
        self.states.append(State(state))
        data = await self.access.set_migration_state(state)
        if not self.opens:
            return None
        if data is None and self.again and state == State.STOP_COPY:
            data = self.streams[-1].data
        if data is None:
            return None
        self.streams.append(Stream(self, data))
        return self.streams[-1]

    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        self.asked.append((operation, Feature(feature)))
        if feature == Feature.MIG_DATA_SIZE and self.length is not None:
            if self.length < 0:
                raise DeviceRefused(self.name, "feature", -self.length)
            return FEATURE_DATA_SIZE.pack(self.length)
        if feature == Feature.MIG_DEVICE_STATE and operation == FeatureOperation.GET and self.number is not None:
            return FEATURE_MIG_STATE.pack(self.number, -1)
        return await super().feature(operation, feature, data, size)

    async def reset(self) -> None:
        if self.resets:
            await super().reset()


class Stream(DataBetween):
    closed = False

    def __init__(self, driven: Driven, data: MigrationData) -> None:
        super().__init__(driven, data)
        self.driven = driven
        self.reads: list[int] = []

    async def read_into(self, into: Sequence[memoryview]) -> int:
        try:
            count = await super().read_into(into)
        except DeviceRefused as error:
            self.reads.append(0)
            if error.errno == ENOMSG and self.driven.empty is not None:
                raise DeviceRefused(error.device, error.operation, self.driven.empty) from error
            return 0
        self.reads.append(count)
        return count

    async def precopy_info(self) -> PrecopyInfo:
        told = self.driven.told
        if isinstance(told, PrecopyInfo):
            return told
        if told is not None:
            raise DeviceRefused(self.driven.name, "precopy info", told)
        return await super().precopy_info()

    async def aclose(self) -> None:
        self.closed = True
        await super().aclose()


@asynccontextmanager
async def driven(one: ReferenceDevice) -> AsyncIterator[tuple[Device, Driven]]:
    access = Driven(InProcessAccess(one, "in-process:a"))
    async with await find(access) as device:
        access.asked.clear()
        yield device, access


def states_driver(**changes: Any) -> Any:
    return driver(interface="migration-states", **changes)


@pytest.mark.parametrize(
    ("flags", "there", "back", "target_goes"),
    [
        (
            ALL,
            [State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY],
            [State.RUNNING_P2P, State.RUNNING],
            [State.RESUMING, State.STOP, State.RUNNING_P2P, State.RUNNING],
        ),
        (
            ("stop-copy", "p2p"),
            [State.RUNNING_P2P, State.STOP_COPY],
            [State.RUNNING_P2P, State.RUNNING],
            [State.RESUMING, State.STOP, State.RUNNING_P2P, State.RUNNING],
        ),
        (
            ("stop-copy", "pre-copy"),
            [State.PRE_COPY, State.STOP_COPY],
            [State.RUNNING],
            [State.RESUMING, State.STOP, State.RUNNING],
        ),
        (("stop-copy",), [State.STOP_COPY], [State.RUNNING], [State.RESUMING, State.STOP, State.RUNNING]),
    ],
)
async def test_the_states_on_the_way(
    flags: tuple[str, ...], there: list[State], back: list[State], target_goes: list[State]
) -> None:
    kind: dict[str, Any] = {"interface": "migration-states", "states": flags}
    with drivers(kind, kind) as (one, other):
        async with driven(one) as (source, heard), driven(other) as (target, answered):
            saved = await save(source, one)
            assert heard.states == there
            await load(target, saved)
            await start(target)
            assert answered.states == target_goes
            await source.release()
            assert heard.states == [*there, State.STOP]  # left to the release: it may take its time
            heard.states.clear()
            await source.quiesce()
            await source.resume()
            assert heard.states == back
            assert all(stream.closed for stream in (*heard.streams, *answered.streams))


async def test_a_session_that_was_left_behind_is_ended_first() -> None:
    with states_driver() as one:
        one.driver.set_migration_state(State.PRE_COPY_P2P)
        async with driven(one) as (source, heard):
            await source.start_precopy()
            assert heard.states == [State.RUNNING, State.PRE_COPY]
            await source.resume()


async def test_what_a_driver_may_refuse_when_it_is_stopped_is_not_asked_then() -> None:
    with states_driver() as one:
        async with driven(one) as (source, heard):
            await source.start_precopy()
            await take_round(source)
            await source.pending()
            assert (FeatureOperation.SET, Feature.MIG_PRECOPY_INFO_V2) in heard.asked
            await halt(source)
            heard.asked.clear()
            await take_round(source)
            await source.capture_config()
            await source.release()
            assert heard.asked == []


async def test_new_initial_bytes_are_told_of_where_the_driver_was_asked_to() -> None:
    with states_driver() as one:
        async with driven(one) as (source, _):
            await source.start_precopy()
            for _ in range(2):
                await take_round(source)
            before = await source.pending()
            one.workload.write(200)
            after = await source.pending()
            assert before is not None
            assert after is not None
            assert (before.initial, after.initial > one.settings.memory // 2) == (0, True)
            await source.resume()


@pytest.mark.parametrize(
    ("told", "length", "expected"),
    [
        (PrecopyInfo(False, 5, 7), 100, Pending(5, 107)),
        (PrecopyInfo(True, 5, 7), -errno.ENOTTY, Pending(5, 7)),
        (errno.ENOTTY, 100, Pending(0, 100)),
        (errno.EINVAL, -errno.EINVAL, None),
    ],
)
async def test_what_is_pending_by_what_the_driver_tells(
    told: PrecopyInfo | int, length: int, expected: Pending | None
) -> None:
    with states_driver() as one:
        async with driven(one) as (source, heard):
            heard.told, heard.length = told, length
            await source.start_precopy()
            assert await source.pending() == expected
            await source.resume()


async def test_without_precopy_what_is_pending_is_what_the_stop_takes() -> None:
    with states_driver(states=("stop-copy",)) as one:
        async with driven(one) as (source, heard):
            heard.length = 4711
            await source.start_precopy()
            assert await source.pending() == Pending(0, 4711)
            await source.resume()


# ---- rounds


@pytest.mark.parametrize("empty", [ENOMSG, None])
async def test_nothing_for_now_ends_the_round_and_not_the_stream(empty: int | None) -> None:
    """ENOMSG is what the kernel's header asks for; its sample driver mtty returns 0."""
    kind = {"interface": "migration-states"}
    with drivers(kind, kind) as (one, other):
        async with driven(one) as (source, heard), driven(other) as (target, _):
            heard.empty, heard.told = empty, errno.ENOTTY
            saved = await save(source, one)
            assert heard.streams[0].reads.count(0) >= 2
            await load(target, saved)
            await start(target)
            assert one.digest() == other.digest()


async def test_nothing_for_now_makes_no_sense_after_the_stop() -> None:
    class Empty(Driven):
        async def called(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
            if name == "data.read_into":
                raise DeviceRefused(self.name, name, ENOMSG)
            return await call()

    with states_driver() as one:
        async with await find(Empty(InProcessAccess(one))) as source:
            await source.start_precopy()
            assert Saved(await take_round(source)).size == 0
            await halt(source)
            with pytest.raises(DeviceRefused, match="of its state with ENOMSG"):
                await take_round(source)
            await source.resume()
            assert runs(one)


async def test_a_round_has_what_the_driver_told_at_its_start_and_little_more() -> None:
    with states_driver() as one:
        async with driven(one) as (source, heard):
            heard.told = PrecopyInfo(False, 2 * PAGE, 3 * PAGE)
            await source.start_precopy()
            await source.begin_round()
            assert await source.capture() is None
            assert (
                len(await drain(source, None, (PAGE,))) == 6 * PAGE
            )  # what was told, and once more to ask for the end
            assert await source.capture() == 0
            heard.told = PrecopyInfo(False, 0, 0)
            assert await take_round(source) == []
            await source.resume()


async def test_a_driver_that_does_not_tell_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration_states, "MAX_UNTOLD_ROUND", 4 * PAGE)
    with states_driver() as one:
        async with driven(one) as (source, heard):
            heard.told = errno.ENOTTY
            await source.start_precopy()
            assert Saved(await take_round(source, (PAGE,))).size == 5 * PAGE
            await source.resume()


# ---- what makes no sense


async def test_a_change_that_is_refused_says_where_the_device_is_now() -> None:
    with states_driver(faults=(Fault(Operation.STOP_TO_STOP_COPY, 1, errno.EIO),), states=("stop-copy", "p2p")) as one:
        async with driven(one) as (source, _):
            await source.start_precopy()
            await source.quiesce()
            with pytest.raises(DeviceRefused) as caught:
                await source.stop()
            assert str(caught.value) == (
                "in-process:a: the driver refused set device state to STOP_COPY with EIO (Input/output error); it is "
                "in STOP now; its driver's log may say why"
            )
            await source.resume()
            assert runs(one)


async def test_a_change_that_breaks_the_driver_says_what_is_left_to_do() -> None:
    with states_driver(faults=(Fault(Operation.PRE_COPY_P2P_TO_STOP_COPY, 1, "error"),)) as one:
        async with driven(one) as (source, _):
            await source.start_precopy()
            await source.quiesce()
            with pytest.raises(DeviceBroken) as caught:
                await source.stop()
            assert str(caught.value) == (
                "in-process:a: the driver refused set device state to STOP_COPY with EIO (Input/output error); it is "
                "in ERROR now: only a reset gets it out of there, and that loses its state: let its guest or VMM reset "
                "it"
            )


async def test_a_change_that_is_refused_by_a_device_that_can_not_be_asked() -> None:
    with states_driver(faults=(Fault(Operation.RUNNING_TO_PRE_COPY, 1, errno.EIO),)) as one:
        async with driven(one) as (source, heard):
            asked = 0

            async def once(operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
                nonlocal asked
                asked += feature == Feature.MIG_DEVICE_STATE
                if asked == 2:
                    raise DeviceRefused("in-process:a", "feature", errno.EBUSY)
                return await heard.access.feature(operation, feature, data, size)

            heard.feature = once  # type: ignore[method-assign]
            with pytest.raises(DeviceRefused, match="PRE_COPY with EIO.*where it is now is not known.*EBUSY"):
                await source.start_precopy()
            await source.resume()


async def test_state_that_is_not_whole_is_refused_before_it_runs() -> None:
    with states_driver(seed=1) as one, states_driver(seed=2) as other:
        async with driven(one) as (source, _), driven(other) as (target, _):
            saved = await save(source, one)
            size, content = saved.captures.pop()
            saved.captures.append((size, content[:-1]))
            with pytest.raises(DeviceRefused, match="it is in RESUMING now; the state that it was given is not whole"):
                await load(target, saved)
            await target.abandon()
            assert not runs(other)


@pytest.mark.parametrize("number", [8, 99])
async def test_a_state_that_is_not_known_here(number: int) -> None:
    with states_driver() as one:
        async with driven(one) as (device, heard):
            heard.number = number
            with pytest.raises(DeviceBroken, match=f"in-process:a: .*state {number}, which is not known"):
                await device.start_precopy()
            with pytest.raises(DeviceBroken, match=f"state {number}"):
                await device.start_load()


async def test_a_driver_that_opens_no_stream() -> None:
    for name in ("start_precopy", "start_load"):
        with states_driver() as one:
            async with driven(one) as (device, heard):
                heard.opens = False
                with pytest.raises(DeviceBroken, match="opened no stream"):
                    await getattr(device, name)()


async def test_a_driver_that_begins_another_stream_at_the_stop() -> None:
    with states_driver() as one:
        async with driven(one) as (source, heard):
            heard.again = True
            await source.start_precopy()
            await source.quiesce()
            with pytest.raises(DeviceBroken, match="another stream at the stop.*reset meanwhile"):
                await source.stop()
            await source.resume()
            assert runs(one)


async def test_a_reset_that_leaves_a_load_is_helped() -> None:
    """Some drivers reset the device and leave its migration state as it is."""
    with drivers({"interface": "migration-states"}, {"interface": "migration-states"}) as (one, other):
        async with driven(one) as (source, _):
            saved = await save(source, one)
        async with driven(other) as (target, _):
            await load(target, saved)
        other.driver.set_migration_state(State.RESUMING)
        async with driven(other) as (target, heard):
            heard.resets = False
            with pytest.raises(DeviceRefused, match="set device state to STOP"):
                await target.start_load()  # this driver has not got all: it is not to be helped
            await target.abandon()
            assert not runs(other)


async def test_a_reset_that_leaves_a_failure_is_no_end_of_it() -> None:
    with states_driver(faults=(Fault(Operation.RUNNING_TO_RUNNING_P2P, 1, "error"),)) as one:
        with pytest.raises(OSError, match="fault"):
            one.driver.set_migration_state(State.STOP)
        async with driven(one) as (target, heard):
            heard.resets = False
            with pytest.raises(DeviceBroken, match="a reset has left it there"):
                await target.start_load()
            await target.abandon()
