"""Everything that can fail, wherever it can fail: each frame, each await, each operation of a device, each byte."""

from __future__ import annotations

import errno
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import anyio
import anyio.lowlevel
import pytest

from tests.interference import (
    HASTY,
    QUICK,
    TINY,
    End,
    Frame,
    Interference,
    Link,
    Rounds,
    World,
    assert_guest_follows,
    changed,
    cut_after,
    cut_before,
    cut_inside,
    for_ever,
    outcome,
    stalled_at,
    swapped,
    taken_and_lost,
    untouched,
    world,
)
from tests.movers import MIB
from vfiostream.errors import (
    ConnectionLost,
    DeviceError,
    DeviceLost,
    DeviceRefused,
    DeviceTimeout,
    OutcomeUnknown,
    PeerAborted,
    SourceStuck,
    StreamError,
)
from vfiostream.pipeline import outbound as outbound_module, target as target_module
from vfiostream.pipeline.bandwidth import Bandwidth
from vfiostream.pipeline.budget import Budget, Lease
from vfiostream.pipeline.progress import Progress, Summary
from vfiostream.policy import RoundReport, Verdict
from vfiostream.protocol.framing import PREFIX_SIZE
from vfiostream.transports.contract import Transport
from vfiostream.uapi.four_region import State
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.settings import OPERATIONS, Fault, Operation

pytestmark = pytest.mark.anyio
exhaustive = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
"""uvloop walks through the same hundreds of migrations as asyncio."""


@pytest.fixture(autouse=True)
def no_long_goodbyes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last words of an end that gave up may take as long as they need, to somebody who does not listen too."""
    monkeypatch.setattr(Transport, "linger", 0.5)


async def undisturbed() -> World:
    async with world() as made:
        await made.migrate()
        assert outcome(made) == "moved"
    return made


# ---- the link


@exhaustive
@pytest.mark.parametrize("kind", [cut_before, cut_inside, cut_after, taken_and_lost])
async def test_a_loss_at_every_frame(kind: Callable[[int], Interference]) -> None:
    plain = await undisturbed()
    for direction, frames in (("out", plain.source.link.frames), ("back", plain.target.link.frames)):
        for frame in frames:
            async with world() as made:
                interference = {direction: kind(frame.number)}
                await made.migrate(out=interference.get("out", untouched), back=interference.get("back", untouched))
                where = (direction, frame.name)
                if where == ("out", "COMMIT"):
                    assert outcome(made) == ("the source runs" if kind is cut_before else "unknown")
                elif where == ("back", "ACK running"):
                    assert outcome(made) == ("moved" if kind is cut_after else "unknown")
                else:
                    assert outcome(made) == "the source runs", where


@exhaustive
async def test_a_link_that_stalls_at_every_frame_can_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody takes any last words here.
    monkeypatch.setattr(outbound_module, "GRACE", 0.02)
    monkeypatch.setattr(Transport, "linger", 0.02)
    plain = await undisturbed()
    for direction, frames in (("out", plain.source.link.frames), ("back", plain.target.link.frames)):
        for frame in frames[:-1]:
            async with world() as made:
                stall = stalled_at(frame.number)

                async def leave(made: World = made) -> None:
                    await anyio.wait_all_tasks_blocked()
                    await made.source.trace.cancel()
                    await made.target.trace.cancel()

                await made.migrate(
                    out=stall if direction == "out" else untouched,
                    back=stall if direction == "back" else untouched,
                    settings=HASTY,
                    meanwhile=leave,
                )
                assert outcome(made) == "the source runs"


# ---- cancellation


@exhaustive
@pytest.mark.parametrize("side", ["source", "target"])
async def test_cancelled_at_every_await(side: str) -> None:
    seen: Counter[str] = Counter()
    for point in count(1):
        async with world() as made:
            end: End = getattr(made, side)
            end.trace.cancel_at = point
            await made.migrate()
            what = outcome(made)
            assert what != "unknown"  # The link holds: somebody always knows.
            if what == "the source runs":
                other = made.target if end is made.source else made.source
                assert end.result is None
                assert isinstance(other.result, PeerAborted | ConnectionLost)
                # Who has greeted is told why.
                assert isinstance(other.result, PeerAborted) or "send HELLO" in end.trace.points[point - 1]
            seen[what] += 1
            if len(end.trace.points) < point:
                break
    assert seen["the source runs"] > 50
    assert seen["moved"] > 3


@exhaustive
async def test_a_save_is_cancelled_at_every_await(tmp_path_factory: pytest.TempPathFactory) -> None:
    for point in count(1):
        folder = tmp_path_factory.mktemp("save")
        async with world() as made:
            made.source.trace.cancel_at = point
            await made.save(folder / "file")
            assert made.source.state is State.RUNNING
            assert_guest_follows(made.source)
            done = isinstance(made.source.result, Summary)
            assert [path.name for path in folder.iterdir()] == (["file"] if done else [])
            if len(made.source.trace.points) < point:
                assert done
                break


@exhaustive
async def test_a_restore_is_cancelled_at_every_await(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("restore") / "file"
    async with world() as made:
        await made.save(path)
    seen = set()
    for point in count(1):
        async with world() as made:
            made.target.trace.cancel_at = point
            await made.restore(path)
            loading = "before start_load" in made.target.trace.points
            done = isinstance(made.target.result, Summary)
            assert done or made.target.result is None
            assert made.target.state is (State.RUNNING if done or not loading else State.STOP)
            seen.add(done)
            if len(made.target.trace.points) < point:
                break
    assert seen == {True, False}


async def test_a_frame_that_waits_for_its_pace_is_not_begun_when_all_is_called_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbound_module, "GRACE", 1000)
    async with world() as made:
        settings = replace(QUICK, bandwidth=Bandwidth())

        async def slow_down() -> None:
            settings.bandwidth.limit = 1

        async def leave() -> None:
            await anyio.wait_all_tasks_blocked()
            await made.source.trace.cancel()

        made.source.trace.plan["before send CAPTURE"] = slow_down
        await made.migrate(settings=settings, meanwhile=leave)
        assert outcome(made) == "the source runs"
        assert isinstance(made.target.result, PeerAborted)
        assert [frame.name for frame in made.source.link.frames] == ["HELLO", "ROUND", "CAPTURE", "ABORT"]


async def test_a_frame_that_is_under_way_at_its_pace_ends_at_once_when_all_is_called_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbound_module, "GRACE", 1000)
    async with world() as made:
        settings = replace(QUICK, bandwidth=Bandwidth(100_000))

        async def leave() -> None:
            settings.bandwidth.limit = 1
            await made.source.trace.cancel()

        made.source.trace.plan["after a piece"] = leave
        await made.migrate(settings=settings)
        assert outcome(made) == "the source runs"
        assert isinstance(made.target.result, PeerAborted)
        assert [frame.name for frame in made.source.link.frames] == ["HELLO", "ROUND", "CAPTURE", "MEMORY", "ABORT"]


# ---- the devices

WORDS = {
    Operation.SET_STATE: "set device state",
    Operation.GET_CONFIG_SIZE: "get config size",
    Operation.SET_CONFIG_SIZE: "set config size",
    Operation.GET_CONFIG: "get config",
    Operation.SET_CONFIG: "set config",
    Operation.GET_MEMORY_SIZE: "get memory size",
    Operation.SET_MEMORY_SIZE: "set memory size",
    Operation.GET_MEMORY: "get memory chunk",
    Operation.SET_MEMORY: "set memory chunk",
    Operation.GET_BITMAP: "get dirty bitmap",
    Operation.GET_VERSION: "get version",
    Operation.GET_CAPS: "get caps",
}
KINDS: dict[int | str, type[DeviceError]] = {errno.EIO: DeviceRefused, "hang": DeviceTimeout, "exit": DeviceLost}
effects = pytest.mark.parametrize("effect", [errno.EIO, "hang", "exit"], ids=["errno", "hang", "exit"])


def names(error: BaseException, fault: Fault, device: str) -> bool:
    """Whether ``error`` says what failed."""
    if isinstance(error, DeviceRefused):
        return error.device == device and error.operation.startswith(WORDS[fault.operation])
    return device in str(error)


async def each_fault(side: str, effect: int | str, check: Callable[[Fault, World], None]) -> set[Operation]:
    """Let each operation of one end's device fail: the first time that it is asked for, the second, to the last.
    Returns those that were asked for at all.
    """
    seen = set()
    for operation in OPERATIONS["four-region"]:
        for number in count(1):
            fault = Fault(operation, number, effect)  # type: ignore[arg-type]
            unopened = None
            try:
                async with world(
                    source_faults=[fault] if side == "source" else (), target_faults=[fault] if side == "target" else ()
                ) as made:
                    await made.migrate()
                    result = made.source.result
                    if isinstance(result, Summary) and not result.warnings:
                        break
                    check(fault, made)
            except DeviceError as error:
                unopened = error
            assert unopened is None or (isinstance(unopened, KINDS[effect]) and names(unopened, fault, f"{side}0"))
            seen.add(operation)
    return seen


OPENING = {Operation.GET_VERSION, Operation.GET_CAPS, Operation.GET_CONFIG_SIZE}


@exhaustive
@effects
async def test_every_operation_of_the_source_fails(effect: int | str) -> None:
    def check(fault: Fault, made: World) -> None:
        source, target = made.source, made.target
        if fault.operation is Operation.SET_STATE and fault.n == 4:
            assert made.moved  # The target runs; what failed is to stop tracking.
            assert target.state is State.RUNNING
            return
        assert isinstance(target.result, PeerAborted)
        assert target.result.code == "device"
        assert target.state is State.STOP
        assert names(source.error, fault, "source0")
        if effect == "exit":
            assert isinstance(source.result, SourceStuck)
            return
        assert outcome(made) == "the source runs"
        assert isinstance(source.result, KINDS[effect])
        assert target.result.reason == str(source.result)

    assert await each_fault("source", effect, check) == OPENING | {
        Operation.SET_STATE,
        Operation.GET_CONFIG,
        Operation.GET_MEMORY_SIZE,
        Operation.GET_MEMORY,
        Operation.GET_BITMAP,
    }


@exhaustive
@effects
async def test_every_operation_of_the_target_fails(effect: int | str) -> None:
    def check(fault: Fault, made: World) -> None:
        source, target = made.source, made.target
        assert names(target.error, fault, "target0")
        if fault == Fault(Operation.SET_STATE, 2, "exit"):
            assert outcome(made) == "unknown"
            assert isinstance(target.result, OutcomeUnknown)
            return
        assert isinstance(target.result, KINDS[effect])
        assert isinstance(source.result, PeerAborted)
        assert source.result.code == "device"
        assert source.result.reason == str(target.result)
        assert outcome(made) == "the source runs"

    assert await each_fault("target", effect, check) == OPENING | {
        Operation.SET_STATE,
        Operation.SET_CONFIG_SIZE,
        Operation.SET_CONFIG,
        Operation.SET_MEMORY_SIZE,
        Operation.SET_MEMORY,
    }


async def test_the_guest_goes_on_even_if_its_tracking_can_not_be_stopped() -> None:
    class Defect(Exception):
        pass

    async def fail() -> None:
        raise Defect

    async with world() as made:
        made.source.trace.plan |= {"after stop": made.source.trace.cancel, "before stop_tracking": fail}
        await made.migrate()
        assert made.source.state is State.RUNNING
        assert made.source.guest.running


# ---- the stream

LOADS: dict[str, tuple[str, ...]] = {
    "CAPTURE": ("begin_capture",),
    "MEMORY": ("deliver",),
    "PCI": ("load_pci_config",),
    "CONFIG": ("begin_config", "deliver"),
    "END": ("finish_load",),
    "COMMIT": ("run",),
}
"""What the target asks of its device for a frame; the config of these tests is in one."""


def assert_nothing_given_from(made: World, number: int, frames: list[Frame]) -> None:
    """The target's device got what came before frame ``number``, or less, and nothing of what came then."""
    allowed = [call for frame in frames[: number - 1] for call in LOADS.get(frame.name, ())]
    loads = {call for calls in LOADS.values() for call in calls}
    given = [call for call in made.target.trace.calls if call in loads]
    assert given == allowed[: len(given)]


def assert_refused(made: World, number: int, frames: list[Frame], named: int | None = None) -> None:
    """The target has refused what came as frame ``number``, by its name (or that of frame ``named``, which came in its
    place), and the source knows.
    """
    source, target = made.source, made.target
    assert isinstance(target.result, StreamError)
    assert target.result.record.endswith(f"record {named or number}")
    assert isinstance(source.result, PeerAborted)
    assert source.result.code == "stream"
    assert source.result.reason == str(target.result)
    assert outcome(made) == "the source runs"
    assert_nothing_given_from(made, number, frames)


PREFIX_FIELDS = (0, 4, 6, 7, 8, 12, 16, 24, 28, 32, 40)


@exhaustive
async def test_a_changed_byte_of_every_frame() -> None:
    frames = (await undisturbed()).source.link.frames
    for frame in frames:
        size = len(frame.data)
        # The prefix field by field, the header, the middle and the end; of each frame every other one.
        places = [*PREFIX_FIELDS, PREFIX_SIZE, PREFIX_SIZE + 9, (PREFIX_SIZE + size) // 2, size - 1]
        for place in [place for place in places if place < size][frame.number % 2 :: 2]:

            def change(data: bytes, place: int = place) -> bytes:
                return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]

            async with world() as made:
                await made.migrate(out=changed(frame.number, change))
                assert_refused(made, frame.number, frames)


async def _check_at_once(self: InProcessAccess) -> None:
    await anyio.lowlevel.checkpoint_if_cancelled()


@pytest.mark.parametrize("where", ["before deliver", "after deliver"])
@pytest.mark.parametrize("number", [6, 7])
async def test_a_driver_that_is_done_as_a_bad_frame_comes_gets_nothing_more(
    where: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the channel to a vfio-user server, which goes on without a turn of the loop.
    monkeypatch.setattr(InProcessAccess, "_check", _check_at_once)
    seen: list[int] = []
    async with world() as made:
        trace, known = made.target.trace, anyio.Event()

        async def tell() -> None:
            seen.append(len(trace.points))
            known.set()

        async def spoil(link: Link, frame: Frame) -> None:
            if frame.number != number:
                await link.deliver(frame.data)
                return
            await anyio.wait_all_tasks_blocked()
            trace.plan["after receive"] = tell
            await link.deliver(b"X" + frame.data[1:])

        trace.plan[where] = known.wait
        await made.migrate(out=spoil)
        assert isinstance(made.target.result, StreamError)
        assert outcome(made) == "the source runs"
        assert "after deliver" not in trace.points[seen[0] :]


@exhaustive
async def test_every_frame_twice() -> None:
    frames = (await undisturbed()).source.link.frames
    for frame in frames:
        async with world() as made:
            await made.migrate(out=changed(frame.number, lambda data: data + data))
            if frame.name == "COMMIT":
                assert outcome(made) == "moved"  # Nothing is read after it.
            else:
                # Only the first frame is checked as the first of any session.
                assert_refused(made, frame.number + 1, frames, named=max(frame.number, 2))


@exhaustive
async def test_every_frame_left_out() -> None:
    frames = (await undisturbed()).source.link.frames
    for frame in frames:
        if frame.name in ("HELLO", "ROUND_END", "END", "COMMIT"):
            continue  # The source waits for what the target says to these: that is a link that stalls.
        async with world() as made:
            await made.migrate(out=changed(frame.number, lambda data: b""))
            assert_refused(made, frame.number, frames, named=frame.number + 1)


@exhaustive
async def test_every_two_frames_in_the_wrong_order() -> None:
    frames = (await undisturbed()).source.link.frames
    for frame in frames:
        if frame.name in ("HELLO", "ROUND_END", "END", "COMMIT"):
            continue
        async with world() as made:
            await made.migrate(out=swapped(frame.number))
            assert_refused(made, frame.number, frames, named=frame.number + 1)


@exhaustive
async def test_a_changed_byte_of_every_answer() -> None:
    for frame in (await undisturbed()).target.link.frames:
        for place in (0, 6, 16, 32, 40, PREFIX_SIZE, len(frame.data) - 1):

            def change(data: bytes, place: int = place) -> bytes:
                return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]

            async with world() as made:
                await made.migrate(back=changed(frame.number, change))
                if frame.name == "ACK running":
                    assert outcome(made) == "unknown"
                    assert isinstance(made.target.result, Summary)
                else:
                    assert outcome(made) == "the source runs"
                    assert isinstance(made.source.result, StreamError)
                    assert isinstance(made.target.result, PeerAborted)
                    assert made.target.result.code == "stream"


# ---- memory


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[Budget]:
    """All budgets that are made, the source's and the target's."""
    made: list[Budget] = []

    class Seen(Budget):
        def __init__(self, limit: int, chunk: int) -> None:
            super().__init__(limit, chunk)
            made.append(self)

    monkeypatch.setattr(outbound_module, "Budget", Seen)
    monkeypatch.setattr(target_module, "Budget", Seen)
    return made


@pytest.mark.parametrize("compression", [0, 1])
async def test_a_reader_that_stalls_for_ever(budgets: list[Budget], compression: int) -> None:
    progress = Progress()
    like = replace(TINY, memory=8 * MIB)
    async with world(like=like) as made:
        made.target.trace.plan["before deliver"] = for_ever
        stalled = anyio.Event()

        async def stand_still() -> None:
            while "before deliver" not in made.target.trace.points:
                await anyio.wait_all_tasks_blocked()
            await anyio.wait_all_tasks_blocked()
            assert progress.content < like.memory
            for budget in budgets:
                assert budget.used <= budget.peak <= budget.limit == QUICK.budget
            assert any(budget.used > budget.limit // 2 for budget in budgets)
            assert made.source.state is State.RUNNING_LOGGING
            stalled.set()
            await made.source.trace.cancel()
            await made.target.trace.cancel()

        await made.migrate(
            settings=replace(QUICK, compression=compression), progress=progress, capacity=65536, meanwhile=stand_still
        )
        assert stalled.is_set()
        assert outcome(made) == "the source runs"


@pytest.mark.parametrize("compression", [0, 1])
async def test_a_slow_target_with_frames_of_all_sizes(budgets: list[Budget], compression: int) -> None:
    class Rewrite(Rounds):
        def judge(self, report: RoundReport) -> Verdict:
            made.source.machine.driver.workload.write(3 * report.number)
            return super().judge(report)

    async with world(like=replace(TINY, memory=2 * MIB, data="text", memory_region=MIB)) as made:

        async def slowly() -> None:
            # The reader gets as far ahead as it can.
            made.target.trace.plan["before deliver"] = slowly
            await anyio.wait_all_tasks_blocked()

        made.target.trace.plan["before deliver"] = slowly
        ours, theirs = replace(QUICK, compression=compression), replace(QUICK, budget=MIB + MIB // 2)
        await made.migrate(policy=Rewrite(3), settings=ours, theirs=theirs)
        assert made.moved
    for budget in budgets:
        assert budget.used == 0
        assert budget.peak <= budget.limit
    assert any(budget.peak > budget.limit // 2 for budget in budgets)


@pytest.mark.parametrize("size", [1, 4096, 64 * 1024 - 1, 64 * 1024, 65 * 1024, 100 * 1024, 128 * 1024, 129 * 1024])
async def test_what_a_budget_gives_is_within_its_limit(size: int) -> None:
    """Counted by who allocates it."""
    budget = Budget(4 * MIB, 128 * 1024)
    leases: list[Lease] = []
    for _ in range(2):  # The second time with what the first left behind.
        tracemalloc.start()
        try:
            while budget.used + 128 * 1024 + size <= budget.limit and len(leases) < 4096:
                leases.append(await budget.take(size))
            held = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert held < budget.limit + len(leases) * 512
        assert budget.used <= budget.limit
        while leases:
            leases.pop().release()
    assert budget.used == 0
