"""Whole migrations between reference devices in this process."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Literal

import anyio
import pytest

from tests.movers import MIB, SMALL, Machine, contents, guest, machine, machines
from vfiostream.errors import (
    ConnectionLost,
    DeviceRefused,
    Incompatible,
    NotConverged,
    PeerAborted,
    StreamError,
    UsageError,
    VfiostreamError,
)
from vfiostream.guest import Guest
from vfiostream.migrate import receive, send
from vfiostream.pipeline.bandwidth import Bandwidth
from vfiostream.pipeline.progress import Progress, Summary
from vfiostream.pipeline.settings import Settings
from vfiostream.pipeline.source import Policy
from vfiostream.policy import Precopy, RoundReport, Verdict
from vfiostream.protocol import limits
from vfiostream.transports import connect, listen
from vfiostream.transports.contract import Transport
from vfiostream.transports.memory import memory_pair
from vfiostream.transports.options import Options
from vfiostream.uapi.four_region import State

pytestmark = pytest.mark.anyio

SILENT = Options(silent=True)
"""Whoever connects is accepted before he has said anything."""
NOTHING = Guest()


class Rounds:
    """A policy that switches over after a fixed number of rounds."""

    give_up_after = None

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.reports: list[RoundReport] = []

    def judge(self, report: RoundReport) -> Verdict:
        self.reports.append(report)
        return Verdict.SWITCHOVER if report.number >= self.rounds else Verdict.CONTINUE


class Restless:
    """A policy whose source never rests: its device writes whenever a round has ended."""

    def __init__(self, source: Machine, policy: Precopy) -> None:
        self.source = source
        self.policy = policy
        self.give_up_after = policy.give_up_after

    def judge(self, report: RoundReport) -> Verdict:
        self.source.driver.workload.write(16)
        return self.policy.judge(report)


async def move(
    source: Machine,
    target: Machine,
    link: tuple[Transport, Transport] | None = None,
    *,
    memory: tuple[Guest, Guest] = (NOTHING, NOTHING),
    policy: Policy | None = None,
    ours: Settings | None = None,
    theirs: Settings | None = None,
) -> tuple[Summary, Summary]:
    """Migrate, compare everything, and return what both ends said."""
    here, there = link or memory_pair(MIB)
    received: list[Summary] = []

    async def take() -> None:
        received.append(await receive(target.device, there, guest=memory[1], settings=theirs))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take)
            sent = await send(source.device, here, guest=memory[0], policy=policy, settings=ours)
    assert (source.state, target.state) == (State.STOP, State.RUNNING)
    assert source.digest == target.digest
    assert contents(memory[0]) == contents(memory[1])
    assert (sent.rounds, sent.content) == (received[0].rounds, received[0].content)
    return sent, received[0]


async def refuse(
    source: Machine,
    target: Machine,
    *,
    memory: tuple[Guest, Guest] = (NOTHING, NOTHING),
    policy: Policy | None = None,
    ours: Settings | None = None,
) -> tuple[VfiostreamError, VfiostreamError]:
    """Try to migrate; the source must run on and the target must not run. Returns what both ends raised."""
    here, there = memory_pair(MIB)
    raised: list[VfiostreamError] = []

    async def take() -> None:
        try:
            await receive(target.device, there, guest=memory[1])
        except VfiostreamError as error:
            raised.append(error)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take)
            with pytest.raises(VfiostreamError) as failed:
                await send(source.device, here, guest=memory[0], policy=policy, settings=ours)
            await here.aclose()
    assert source.state is State.RUNNING
    return failed.value, raised[0]


async def test_a_busy_device_and_its_guest_move() -> None:
    areas = ((0, MIB), (1 << 32, 2 * MIB))
    with guest(*areas) as ours, guest(*areas) as theirs:
        async with machines(replace(SMALL, dirty_rate=4 * MIB)) as (source, target):
            policy = Restless(source, Precopy(downtime_limit=3600))
            sent, _ = await move(source, target, memory=(ours, theirs), policy=policy)
            assert any(map(any, contents(ours)))
            assert sent.rounds >= 2
            assert sent.downtime is not None
            assert sent.downtime.total == sum(sent.downtime) > 0


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_over_a_real_link(scheme: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    address = "tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{tmp_path_factory.mktemp('l') / 's'}"
    async with machines(replace(SMALL, dirty_rate=MIB)) as (source, target), listen(address, SILENT) as listener:
        async with connect(listener.address) as here, await listener.accept() as there:
            await move(source, target, (here, there))


@pytest.mark.parametrize("order", ["session", "posted"])
@pytest.mark.parametrize("layout", ["natural", "packed"])
async def test_both_orders_and_layouts(order: Literal["session", "posted"], layout: str) -> None:
    settings = replace(SMALL, dirty_rate=2 * MIB, layout=layout)  # type: ignore[arg-type]
    async with machine(settings, order=order) as source, machine(SMALL, seed=5) as target:
        await move(source, target, policy=Rounds(3))


@pytest.mark.parametrize("mmap", ["whole", "sparse", "none"])
@pytest.mark.parametrize(("ours", "theirs"), [(64, 1024), (1024, 64)])
async def test_the_sizes_of_regions_and_chunks_have_nothing_to_do_with_each_other(
    mmap: str, ours: int, theirs: int
) -> None:
    source_settings = replace(SMALL, memory_region=ours * 1024, mmap=mmap, dirty_rate=MIB)  # type: ignore[arg-type]
    target_settings = replace(SMALL, memory_region=theirs * 1024, mmap=mmap)  # type: ignore[arg-type]
    async with machines(source_settings, target_settings) as (source, target):
        await move(source, target, ours=Settings(chunk=100_000), theirs=Settings(chunk=70_001), policy=Rounds(2))


async def test_a_device_without_memory_of_its_own() -> None:
    with guest((0, MIB)) as ours, guest((0, MIB)) as theirs:
        async with machines(replace(SMALL, memory=0, dirty_rate=MIB)) as (source, target):
            await move(source, target, memory=(ours, theirs), policy=Rounds(3))


async def test_a_device_that_does_not_report_what_it_dirties_can_not_dirty() -> None:
    with guest((0, MIB)) as ours, guest((0, MIB)) as theirs:
        async with machines(replace(SMALL, dirty_rate=MIB, dirty_tracking=False)) as (source, target):
            await move(source, target, memory=(ours, theirs), policy=Rounds(3))
            assert not any(contents(ours)[0])


@pytest.mark.parametrize("level", [1, 9])
async def test_compressed(level: int) -> None:
    async with machines(replace(SMALL, dirty_rate=MIB)) as (source, target):
        sent, received = await move(source, target, ours=Settings(compression=level))
        assert sent.transferred < sent.content // 2
        assert sent.transferred == received.transferred


async def test_guest_memory_larger_than_a_bitmap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BITMAP_PAGES", 64)
    areas = ((0, 4096 * 200),)
    with guest(*areas) as ours, guest(*areas) as theirs:
        ours.ranges[0].view[::4096] = bytes(range(200))
        async with machines(replace(SMALL, dirty_rate=MIB)) as (source, target):
            await move(source, target, memory=(ours, theirs), policy=Rounds(3))


async def test_several_devices_move_at_one_instant() -> None:
    async with AsyncExitStack() as stack:
        ours = [await stack.enter_async_context(machine(SMALL, seed=n, dirty_rate=MIB)) for n in range(3)]
        theirs = [await stack.enter_async_context(machine(SMALL, seed=n + 10)) for n in range(3)]
        here, there = memory_pair(MIB)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive, [made.device for made in theirs], there)
                await send([made.device for made in ours], here)
        for one, other in zip(ours, theirs, strict=True):
            assert one.digest == other.digest
            assert (one.state, other.state) == (State.STOP, State.RUNNING)


class Vmm(Guest):
    """A guest whose vCPU writes a page whenever it is asked, and which notes what it is told."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.calls: list[str] = []

    async def start_tracking(self) -> None:
        self.calls.append("start")

    async def merge_dirty(self, address: int, pages: int, bitmap: memoryview) -> None:
        if "pause" not in self.calls:
            self.ranges[0].view[5 * 4096 : 5 * 4096 + 8] = len(self.calls).to_bytes(8, "little")
        bitmap[0] |= 1 << 5
        self.calls.append("dirty")

    async def stop_tracking(self) -> None:
        self.calls.append("stop")

    async def pause(self) -> None:
        self.calls.append("pause")

    async def resume(self) -> None:
        self.calls.append("resume")


async def test_what_vcpus_dirty_moves_too() -> None:
    with guest((0, MIB), kind=Vmm) as ours, guest((0, MIB)) as theirs:
        async with machines() as (source, target):
            await move(source, target, memory=(ours, theirs), policy=Rounds(3))
        assert isinstance(ours, Vmm)
        assert ours.calls == ["start", "dirty", "dirty", "pause", "dirty", "stop"]
        assert contents(theirs)[0][5 * 4096] != 0


async def test_a_guest_runs_on_when_the_migration_fails_after_the_pause() -> None:
    from vfiostream.vendor.settings import Fault, Operation

    settings = replace(SMALL, faults=(Fault(Operation.GET_CONFIG, 1, 5),))
    with guest((0, MIB), kind=Vmm) as ours, guest((0, MIB)) as theirs:
        async with machines(settings) as (source, target):
            error, told = await refuse(source, target, memory=(ours, theirs))
            assert isinstance(error, DeviceRefused)
            assert "get config" in str(error)
            assert isinstance(told, PeerAborted)
            assert "get config" in str(told)
            assert target.state is State.STOP
        assert isinstance(ours, Vmm)
        assert ours.calls[-3:] == ["dirty", "stop", "resume"]


async def test_it_gives_up_with_the_source_running() -> None:
    async with machines() as (source, target):
        policy = Restless(source, Precopy(downtime_limit=0, max_rounds=3))
        error, told = await refuse(source, target, policy=policy)
        assert isinstance(error, NotConverged)
        assert isinstance(told, PeerAborted)
        assert told.code == "not-converged"
        assert target.state is State.STOP


async def test_it_gives_up_in_the_middle_of_a_round_that_takes_too_long() -> None:
    async with machines() as (source, target):
        error, _ = await refuse(
            source, target, policy=Precopy(max_time=0.05), ours=Settings(bandwidth=Bandwidth(1), chunk=64 * 1024)
        )
        assert isinstance(error, NotConverged)


async def test_stop_and_copy_of_what_does_not_converge() -> None:
    async with machines() as (source, target):
        policy = Restless(source, Precopy(downtime_limit=0, max_rounds=3, otherwise="stop"))
        sent, _ = await move(source, target, policy=policy)
        assert sent.rounds == 4


async def test_the_reports_of_rounds_make_sense() -> None:
    policy = Rounds(4)
    async with machines(replace(SMALL, dirty_rate=16 * MIB)) as (source, target):
        await move(source, target, policy=policy)
    assert [report.number for report in policy.reports] == [1, 2, 3, 4]
    assert policy.reports[0].total == policy.reports[0].content > 2 * MIB
    for before, report in zip(policy.reports, policy.reports[1:], strict=False):
        assert report.previous == before.collected
        assert before.ended <= report.collected <= report.ended


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version_string": "other"}, "does not take version"),
        ({"memory": 0}, "the source has device memory and the target has none"),
        ({"dirty_tracking": False}, "the source writes guest memory and reports it"),
        ({"config": 1024, "config_region": 4096}, "config"),
    ],
)
async def test_what_does_not_fit_is_said_before_anything_moves(change: dict[str, object], problem: str) -> None:
    async with machine() as source, machine(replace(SMALL, seed=3, **change)) as target:  # type: ignore[arg-type]
        before = target.digest
        error, theirs = await refuse(source, target)
        assert isinstance(error, PeerAborted)
        assert error.code == "incompatible"
        assert problem in str(error)
        assert isinstance(theirs, Incompatible)
        assert problem in str(theirs)
        assert (target.digest, target.state) == (before, State.RUNNING)


async def test_a_foreign_version_that_the_driver_accepts() -> None:
    async with machine(SMALL, version_string="gen 1") as source:
        async with machine(SMALL, version_string="gen 2", accept=("gen *",)) as target:
            await move(source, target)


async def test_a_target_with_less_memory() -> None:
    async with machine(SMALL, version_string="v") as source, machine(SMALL, version_string="v", memory=MIB) as target:
        error, theirs = await refuse(source, target)
        assert "ENOSPC" in str(theirs)
        assert "less memory" in str(theirs)
        assert "ENOSPC" in str(error)
        assert target.state is State.STOP


async def test_guest_memory_that_differs() -> None:
    with guest((0, MIB)) as ours, guest((4096, MIB)) as theirs:
        async with machines() as (source, target):
            error, _ = await refuse(source, target, memory=(ours, theirs))
            assert "guest memory differs" in str(error)
    with pytest.raises(UsageError, match="overlap"), guest((0, MIB), (4096, MIB)):
        pass


async def test_somebody_else_at_the_other_end() -> None:
    here, there = memory_pair(MIB)
    async with machine() as made:
        await there.send([b"SSH-2.0-OpenSSH_9.2 is what listens here, and it says so at length"])
        await there.finish()
        with anyio.fail_after(10), pytest.raises(StreamError, match="no vfiostream stream"):
            await send(made.device, here)
        assert made.state is State.RUNNING
    here, there = memory_pair(MIB)
    async with machine() as made:
        await here.send([b"GET / HTTP/1.1\r\nHost: somebody\r\nUser-Agent: lost\r\n\r\n"])
        await here.finish()
        with anyio.fail_after(10), pytest.raises(StreamError, match="no vfiostream stream"):
            await receive(made.device, there)


async def test_nobody_answers() -> None:
    here, _there = memory_pair(MIB)
    async with machine() as made:
        with anyio.fail_after(10), pytest.raises(ConnectionLost, match="nobody answered"):
            await send(made.device, here, settings=Settings(patience=0.05))
        assert made.state is State.RUNNING


async def test_progress_tells_the_phases() -> None:
    here, there = memory_pair(64 * 1024)
    ours, theirs = Progress(), Progress()
    seen: list[str] = []

    class Watching(Rounds):
        def judge(self, report: RoundReport) -> Verdict:
            seen.append(f"{ours.phase} {ours.round}")
            return super().judge(report)

    async with machines(replace(SMALL, dirty_rate=MIB)) as (source, target):
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: receive(target.device, there, progress=theirs))
                sent = await send(source.device, here, policy=Watching(2), progress=ours)
    assert seen == ["precopy 1", "precopy 2"]
    assert ours.phase == theirs.phase == "done"
    assert (ours.content, ours.transferred) == (sent.content, sent.transferred)
    assert ours.expected_downtime is not None
    assert theirs.content == ours.content


async def test_every_layer_leaves_a_trace(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="vfiostream"):
        async with machines() as (source, target), listen("tcp:127.0.0.1:0", SILENT) as listener:
            async with connect(listener.address) as here, await listener.accept() as there:
                await move(source, target, (here, there))
    traced = {record.name for record in caplog.records}
    assert {f"vfiostream.{layer}" for layer in ("device", "protocol", "transport", "pipeline")} <= traced
    text = caplog.text
    for record in ("HELLO", "WELCOME", "CAPTURE", "MEMORY", "CONFIG", "END", "COMMIT"):
        assert record in text
    assert "LOADED -> COMMITTED" in text


async def test_the_budget_holds_when_the_reader_stalls_for_ever() -> None:
    here, _there = memory_pair(64 * 1024)
    settings = Settings(budget=5 * MIB, patience=30)
    progress = Progress()
    async with machines(replace(SMALL, memory=32 * MIB)) as (source, _):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def accept_and_stall() -> None:
                    from vfiostream.pipeline.budget import Budget
                    from vfiostream.pipeline.frames import FrameReader
                    from vfiostream.protocol.records import Hello, Welcome
                    from vfiostream.protocol.sessions import TargetSession

                    session = TargetSession(chunk=MIB, answers=True)
                    frame = await FrameReader(_there, session, Budget(8 * MIB, MIB)).read()
                    assert frame is not None
                    assert isinstance(frame.record, Hello)
                    await _there.send(session.send(Welcome(frame.record.session, "stalls", (), MIB, 100 * MIB)))
                    await anyio.wait_all_tasks_blocked()
                    scope.cancel()

                tasks.start_soon(accept_and_stall)
                await send(source.device, here, settings=settings, progress=progress)
        assert scope.cancelled_caught
        assert progress.content <= 5 * MIB
        assert source.state is State.RUNNING
