"""Limits of the bandwidth: exact, without bursts, and changed while they hold. Time is virtual where it matters."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import anyio
import pytest

from tests.movers import MIB, SMALL, guest, machines
from tests.virtual_time import in_virtual_time
from vfiostream.buffers import Buffer
from vfiostream.checkpoint import save
from vfiostream.errors import UsageError
from vfiostream.guest import Guest
from vfiostream.migrate import receive, send
from vfiostream.pipeline.bandwidth import LEAST_PIECE, MAX_RATE, PIECE, SAVED, Bandwidth, Pace, Pieces
from vfiostream.pipeline.progress import Progress
from vfiostream.pipeline.settings import Settings
from vfiostream.policy import RoundReport, Verdict
from vfiostream.transports.contract import Transport
from vfiostream.transports.memory import memory_pair

Log = list[tuple[float, int]]
"""When how many bytes went."""


def bytes_within(log: Log, seconds: float) -> int:
    """The most that went within any ``seconds``."""
    most = first = total = 0
    for at, size in log:
        total += size
        while log[first][0] <= at - seconds:
            total -= log[first][1]
            first += 1
        most = max(most, total)
    return most


def assert_kept(log: Log, rate: float) -> None:
    """No window of any length has more than the rate gives for it, and what is allowed on top."""
    piece = max(LEAST_PIECE, rate * PIECE)
    assert max(size for _, size in log) <= piece
    for seconds in (0.001, 0.01, 0.1, 1.0, 10.0):
        assert bytes_within(log, seconds) <= rate * (seconds + SAVED) + piece + 1


async def paced(bandwidth: Bandwidth, seconds: float, *, slow: Sequence[float] = (0.0,)) -> Log:
    """What a sender gets rid of in ``seconds``; what it does between is late by one of ``slow``, in turn."""
    log: Log = []
    began = anyio.current_time()
    with Pace(bandwidth) as pace, anyio.move_on_after(seconds):
        while True:
            most = await pace.turn()
            log.append((anyio.current_time() - began, int(most)))
            pace.count(int(most))
            await anyio.sleep(slow[len(log) % len(slow)])
    return log


# ---- the pace


@pytest.mark.parametrize("rate", [1_000_000, 20 * MIB, 100 * MIB, 400 * MIB, 10_000 * MIB])
def test_a_limit_is_exact(rate: float) -> None:
    @in_virtual_time
    async def log() -> Log:
        return await paced(Bandwidth(rate), 20.0)

    seen = log()
    assert_kept(seen, rate)
    sent = sum(size for _, size in seen)
    assert sent == pytest.approx(20 * rate, rel=0.001, abs=2 * max(LEAST_PIECE, rate * PIECE))


@pytest.mark.parametrize("rate", [20 * MIB, 400 * MIB])
def test_what_takes_too_long_is_made_up_for(rate: float) -> None:
    lateness = random.Random(5)
    slow = [lateness.choice((0.0, 0.0, 0.0, 0.0, 0.001, 0.002, 0.004)) for _ in range(997)]

    @in_virtual_time
    async def log() -> Log:
        return await paced(Bandwidth(rate), 20.0, slow=slow)

    seen = log()
    assert_kept(seen, rate)
    assert sum(size for _, size in seen) > 0.99 * 20 * rate


def test_nothing_is_saved_up_by_whoever_has_nothing_to_send() -> None:
    @in_virtual_time
    async def log() -> Log:
        return await paced(Bandwidth(100 * MIB), 20.0, slow=(*[0.0] * 400, 3.0))

    assert_kept(log(), 100 * MIB)


def test_a_change_counts_from_when_it_is_made() -> None:
    @in_virtual_time
    async def log() -> Log:
        bandwidth = Bandwidth(400 * MIB)
        seen: Log = []

        async def send_all() -> None:
            seen.extend(await paced(bandwidth, 9.0))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_all)
            for limit in (10 * MIB, 200 * MIB):
                await anyio.sleep(3)
                bandwidth.limit = limit
        return seen

    seen = log()
    for rate, start in ((400 * MIB, 0), (10 * MIB, 3), (200 * MIB, 6)):
        part = [(at, size) for at, size in seen if start <= at < start + 3]
        assert_kept(part, rate)
        assert sum(size for _, size in part) == pytest.approx(3 * rate, rel=0.04)


@pytest.mark.anyio
@pytest.mark.parametrize("what", ["raised", "lifted", "stopped", "called off"])
async def test_who_waits_is_woken_at_once(what: str) -> None:
    bandwidth = Bandwidth(1)
    with Pace(bandwidth) as pace:
        assert await pace.turn() == LEAST_PIECE
        pace.count(MIB)
        woken: list[float] = []

        async def wait() -> None:
            woken.append(await pace.turn())

        with anyio.fail_after(20):  # at one byte a second it would be days
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                assert not woken
                if what == "raised":
                    bandwidth.limit = MAX_RATE
                elif what == "lifted":
                    bandwidth.limit = None
                elif what == "stopped":
                    pace.source_stopped = True
                else:
                    pace.call_off()
        assert woken[0] > MIB


@pytest.mark.anyio
async def test_a_limit_of_one_does_not_wake_those_of_others() -> None:
    bandwidth = Bandwidth(1)
    with Pace(bandwidth), Pace(bandwidth):
        assert len(bandwidth._told) == 2
    assert not bandwidth._told
    bandwidth.limit = 2


@pytest.mark.anyio
async def test_without_a_limit_nobody_waits() -> None:
    with Pace(Bandwidth()) as pace:
        for _ in range(3):
            assert await pace.turn() == math.inf
            pace.count(1 << 40)
        assert pace.held == 0


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf, -math.inf, 1 << 63, 10**400])
def test_what_is_no_rate(wrong: float) -> None:
    bandwidth = Bandwidth(5, 6)
    with pytest.raises(UsageError, match="a bandwidth of"):
        Bandwidth(wrong)
    with pytest.raises(UsageError, match="a bandwidth of"):
        bandwidth.limit = wrong
    with pytest.raises(UsageError, match="a bandwidth of"):
        bandwidth.switchover = wrong
    assert (bandwidth.limit, bandwidth.switchover) == (5, 6)
    assert repr(bandwidth) == "Bandwidth(5, 6)"


# ---- frames in pieces


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, math.inf])
def test_pieces_are_the_frame(size: float) -> None:
    parts: list[Buffer] = [b"abc", b"", bytearray(b"defgh"), memoryview(b"i"), b"jk"]
    taken = []
    with Pieces(parts) as pieces:
        while pieces:
            piece = pieces.take(size)
            assert all(piece)
            assert 0 < sum(map(len, piece)) <= size
            taken.append(b"".join(piece))
    assert b"".join(taken) == b"abcdefghijk"
    assert len(taken) == (1 if size == math.inf else math.ceil(11 / size))


def test_pieces_hold_nothing_when_they_are_left() -> None:
    memory = bytearray(100)
    with pytest.raises(ZeroDivisionError), Pieces([memory, memory]) as pieces:
        pieces.take(30)
        memory[0] = 1 // 0
    memory.append(1)  # BufferError where a view is left


# ---- whole migrations


class Timed(Transport):
    """Notes when how much was sent."""

    def __init__(self, inner: Transport) -> None:
        self.address, self.answers = inner.address, inner.answers
        self.log: Log = []
        self._inner = inner

    async def send(self, buffers: Sequence[Buffer]) -> None:
        self.log.append((anyio.current_time(), sum(map(len, buffers))))
        await self._inner.send(buffers)

    async def receive(self, into: Sequence[memoryview], least: int = 1) -> int:
        return await self._inner.receive(into, least)

    async def finish(self) -> None:
        await self._inner.finish()

    async def aclose(self) -> None:
        await self._inner.aclose()


class Steps:
    """A policy that does something after the first round and switches over."""

    give_up_after = None

    def __init__(self) -> None:
        self.reports: list[RoundReport] = []

    def judge(self, report: RoundReport) -> Verdict:
        self.reports.append(report)
        return Verdict.SWITCHOVER


class AllDirty(Guest):
    """A guest that has changed everything whenever it is asked."""

    async def merge_dirty(self, address: int, pages: int, bitmap: memoryview) -> None:
        await anyio.lowlevel.checkpoint()
        bitmap[:] = b"\xff" * len(bitmap)


RATE = 2 * MIB
DEVICE = replace(SMALL, data="random")


async def migration(bandwidth: Bandwidth, *, mmap: str = "whole") -> tuple[Log, Log, RoundReport]:
    """What goes out with the source running, with it stopped (all of a guest's memory, again), and the report."""
    policy = Steps()
    device = replace(DEVICE, mmap=mmap)  # type: ignore[arg-type]
    with guest((0, MIB), kind=AllDirty) as ours, guest((0, MIB)) as theirs:
        ours.ranges[0].view[:] = random.Random(7).randbytes(MIB)
        async with machines(device) as (source, target):
            here, there = memory_pair(MIB)
            timed = Timed(here)
            progress = Progress()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: receive(target.device, there, guest=theirs))
                summary = await send(
                    source.device,
                    timed,
                    guest=ours,
                    policy=policy,
                    settings=Settings(bandwidth=bandwidth, patience=10_000),
                    progress=progress,
                )
    assert sum(size for _, size in timed.log) == summary.transferred == progress.transferred
    (report,) = policy.reports
    left = timed.log[0][1] + report.transferred  # the HELLO is of no round
    for number, (_, size) in enumerate(timed.log):
        if not left:
            return timed.log[:number], timed.log[number:], report
        left -= size
    raise AssertionError("a round is longer than the migration")


@pytest.mark.parametrize("mmap", ["whole", "sparse", "none"])
def test_a_migration_keeps_to_its_limits(mmap: str) -> None:
    @in_virtual_time
    async def run() -> tuple[Log, Log, RoundReport]:
        return await migration(Bandwidth(RATE, RATE // 2), mmap=mmap)

    running, stopped, report = run()
    assert sum(size for _, size in running) > 3 * MIB
    assert sum(size for _, size in stopped) > MIB
    assert_kept(running, RATE)
    assert_kept(stopped, RATE // 2)
    took = running[-1][0] - running[0][0]
    assert took == pytest.approx(sum(size for _, size in running) / RATE, rel=0.02)
    assert report.held == pytest.approx(took, rel=0.01)
    assert report.transferred == pytest.approx(sum(size for _, size in running), rel=0.001)
    assert report.switchover == RATE // 2


def test_while_the_source_is_stopped_nothing_is_held_back() -> None:
    @in_virtual_time
    async def run() -> tuple[Log, Log, RoundReport]:
        return await migration(Bandwidth(RATE))

    running, stopped, report = run()
    assert_kept(running, RATE)
    assert stopped[-1][0] == stopped[0][0]
    assert report.switchover is None


def test_a_limit_for_the_switchover_alone() -> None:
    @in_virtual_time
    async def run() -> tuple[Log, Log, RoundReport]:
        return await migration(Bandwidth(switchover=RATE))

    running, stopped, report = run()
    assert running[-1][0] == running[0][0]
    assert max(size for _, size in running) > 0.1 * MIB  # whole frames
    assert_kept(stopped, RATE)
    assert report.held == 0


def test_a_checkpoint_keeps_to_its_limits_and_the_source_runs_again_at_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What lies in memory when the device runs on is no matter of the switchover."""

    class Written(Timed):
        answers = False

        def __init__(self) -> None:
            here, self.there = memory_pair(1 << 30)
            super().__init__(here)
            self.answers = False

    running: list[tuple[float, bool]] = []

    class Vmm(AllDirty):
        async def pause(self) -> None:
            running.append((anyio.current_time(), False))

        async def resume(self) -> None:
            running.append((anyio.current_time(), True))

    @in_virtual_time
    async def run() -> Log:
        written = Written()
        with guest((0, 4 * MIB), kind=Vmm) as ours:
            ours.ranges[0].view[:] = random.Random(7).randbytes(4 * MIB)
            async with machines(replace(DEVICE, memory=0)) as (source, _):
                await save(
                    source.device,
                    written,
                    guest=ours,
                    policy=Steps(),
                    settings=Settings(bandwidth=Bandwidth(8 * MIB, MIB), chunk=MIB),
                )
        return written.log

    log = run()
    (paused, _), (resumed, _) = running
    assert_kept([(at, size) for at, size in log if at <= paused], 8 * MIB)
    assert_kept([(at, size) for at, size in log if paused < at <= resumed], MIB)
    assert_kept([(at, size) for at, size in log if resumed < at], 8 * MIB)
