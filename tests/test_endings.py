"""What must go to its end: under asyncio's own cancellation, which no scope shields from, and with hooks that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.movers import MIB, SMALL, Machine, guest, machines
from vfiostream import checkpoint
from vfiostream.ending import to_the_end
from vfiostream.errors import ConnectionLost, DeviceLost, GuestError, SourceStuck, VfiostreamError
from vfiostream.guest import Guest
from vfiostream.migrate import receive, send
from vfiostream.pipeline import source as source_module
from vfiostream.pipeline.bandwidth import Bandwidth
from vfiostream.pipeline.frames import read_reply
from vfiostream.pipeline.settings import Settings
from vfiostream.policy import Precopy, RoundReport, Verdict
from vfiostream.protocol.records import Record
from vfiostream.protocol.sessions import Phase, SourceSession
from vfiostream.transports import connect
from vfiostream.transports.contract import Transport
from vfiostream.transports.memory import memory_pair
from vfiostream.uapi.four_region import State
from vfiostream.vendor.settings import Fault, Operation

NOW = Precopy(downtime_limit=3600)


class Held:
    """A method of a device that is held when it is called."""

    def __init__(self, device: object, name: str) -> None:
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()
        inner: Callable[[], Awaitable[None]] = getattr(device, name)

        async def held() -> None:
            self.reached.set()
            await self.go_on.wait()
            await inner()

        setattr(device, name, held)


def native(test: Callable[[Machine, Machine], Awaitable[None]]) -> None:
    async def main() -> None:
        async with machines() as (source, target):
            with anyio.fail_after(20):
                await test(source, target)

    asyncio.run(main())


def test_asyncios_own_cancellation_after_the_commit_waits_for_the_outcome() -> None:
    async def test(source: Machine, target: Machine) -> None:
        here, there = memory_pair(MIB)
        run = Held(target.device, "run")
        sending = asyncio.create_task(send(source.device, here, policy=NOW))
        receiving = asyncio.create_task(receive(target.device, there))
        await run.reached.wait()
        for task in (sending, receiving, sending):
            task.cancel()
            await anyio.wait_all_tasks_blocked()
        run.go_on.set()
        sent, received = await asyncio.gather(sending, receiving)
        assert sent.content == received.content
        assert (source.state, target.state) == (State.STOP, State.RUNNING)

    native(test)


def test_asyncios_own_cancellation_during_the_clean_up_does_not_leave_the_source_stopped() -> None:
    async def test(source: Machine, target: Machine) -> None:
        here, there = memory_pair(MIB)
        config, resume = Held(source.device, "capture_config"), Held(source.device, "resume")
        sending = asyncio.create_task(send(source.device, here, policy=NOW))
        receiving = asyncio.create_task(receive(target.device, there))
        await config.reached.wait()
        sending.cancel()
        await resume.reached.wait()
        sending.cancel()
        await anyio.wait_all_tasks_blocked()
        resume.go_on.set()
        sent, received = await asyncio.gather(sending, receiving, return_exceptions=True)
        assert isinstance(sent, asyncio.CancelledError)
        assert isinstance(received, VfiostreamError)
        assert "cancelled" in str(received)
        assert (source.state, target.state) == (State.RUNNING, State.STOP)

    native(test)


@pytest.mark.anyio
async def test_a_defect_after_the_commit_never_lets_the_source_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Defect(Exception):
        pass

    async def until_commit(transport: Transport, session: SourceSession) -> Record | None:
        if session.phase is Phase.COMMITTED:
            raise Defect
        return await read_reply(transport, session)

    monkeypatch.setattr(source_module, "read_reply", until_commit)
    here, there = memory_pair(MIB)
    async with machines() as (source, target):
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive, target.device, there)
                with pytest.raises((Defect, ExceptionGroup)):
                    await send(source.device, here, policy=NOW)
        assert (source.state, target.state) == (State.STOP, State.RUNNING)


@pytest.mark.anyio
async def test_work_that_goes_to_its_end() -> None:
    done: list[str] = []

    async def work() -> int:
        await anyio.wait_all_tasks_blocked()
        done.append("work")
        return 7

    async def fail() -> None:
        raise ConnectionLost("gone")

    with anyio.CancelScope() as scope:
        scope.cancel()
        assert await to_the_end(work) == 7
    assert done == ["work"]
    with pytest.raises(ConnectionLost, match="gone"):
        await to_the_end(fail)


class Failing(Guest):
    """A guest some of whose hooks fail."""

    fails: dict[str, Exception]
    running = True

    async def pause(self) -> None:
        self.running = False
        self._maybe("pause")

    async def resume(self) -> None:
        self._maybe("resume")
        self.running = True

    async def stop_tracking(self) -> None:
        self._maybe("stop_tracking")

    def _maybe(self, hook: str) -> None:
        if hook in self.fails:
            raise self.fails[hook]


@pytest.mark.anyio
async def test_tracking_that_can_not_be_stopped_is_a_warning() -> None:
    with guest((0, MIB), kind=Failing) as ours, guest((0, MIB)) as theirs:
        assert isinstance(ours, Failing)
        ours.fails = {"stop_tracking": DeviceLost("the hypervisor is gone")}
        async with machines() as (source, target):
            here, there = memory_pair(MIB)
            with anyio.fail_after(20):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(lambda: receive(target.device, there, guest=theirs))
                    sent = await send(source.device, here, guest=ours, policy=NOW)
            assert sent.warnings == ("the hypervisor is gone",)
            assert (source.state, target.state) == (State.STOP, State.RUNNING)


@pytest.mark.anyio
@pytest.mark.parametrize("error", [DeviceLost("the hypervisor is gone"), OSError("the hypervisor is gone")])
async def test_a_guest_that_does_not_run_on_is_said(tmp_path: Path, error: Exception) -> None:
    with guest((0, MIB), kind=Failing) as ours:
        assert isinstance(ours, Failing)
        ours.fails = {"resume": error}
        async with machines() as (source, _):
            async with connect(f"file:{tmp_path / 'x'}") as file:
                with anyio.fail_after(20), pytest.raises(SourceStuck, match="the hypervisor is gone"):
                    await checkpoint.save(source.device, file, guest=ours, policy=NOW)
            assert source.state is State.RUNNING
            assert not ours.running
            assert list(tmp_path.iterdir()) == []


@pytest.mark.anyio
async def test_a_guest_that_can_not_be_paused_runs_on() -> None:
    with guest((0, MIB), kind=Failing) as ours, guest((0, MIB)) as theirs:
        assert isinstance(ours, Failing)
        ours.fails = {"pause": OSError("no such vCPU")}
        async with machines() as (source, target):
            here, there = memory_pair(MIB)
            told: list[VfiostreamError] = []

            async def take() -> None:
                try:
                    await receive(target.device, there, guest=theirs)
                except VfiostreamError as error:
                    told.append(error)

            with anyio.fail_after(20):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(take)
                    with pytest.raises(GuestError, match="could not pause"):
                        await send(source.device, here, guest=ours, policy=NOW)
            assert "could not pause" in str(told[0])
            assert ours.running
            assert (source.state, target.state) == (State.RUNNING, State.STOP)


@pytest.mark.anyio
async def test_a_slow_link_of_our_own_making_is_not_the_targets_fault() -> None:
    async with machines(replace(SMALL, memory=256 * 1024)) as (source, target):
        here, there = memory_pair(MIB)
        settings = Settings(bandwidth=Bandwidth(400_000, 400_000), chunk=64 * 1024, patience=0.3)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: receive(target.device, there, settings=replace(settings, patience=20)))
                # All of it goes after the stop: nothing is left for precopy to do.
                await send(source.device, here, policy=_Stop(source), settings=settings)
        assert target.state is State.RUNNING


class _Stop:
    """A policy that stops the source after the first round, which it has just made dirty."""

    give_up_after = None

    def __init__(self, source: Machine) -> None:
        self._source = source

    def judge(self, report: RoundReport) -> Verdict:
        self._source.driver.workload.write(60)
        return Verdict.SWITCHOVER


@pytest.mark.anyio
async def test_the_cause_of_an_error_stays_with_it() -> None:
    async with machines(replace(SMALL, faults=(Fault(Operation.GET_MEMORY, 1, 5),))) as (source, target):
        here, there = memory_pair(MIB)

        async def take() -> None:
            with pytest.raises(VfiostreamError):
                await receive(target.device, there)

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take)
                with pytest.raises(VfiostreamError) as caught:
                    await send(source.device, here, policy=NOW)
        assert caught.value.__cause__ is not None
