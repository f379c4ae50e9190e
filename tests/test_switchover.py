"""Every row of the table in ``docs/switchover.md``, which also says what each has to come to."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import anyio
import pytest

from tests.interference import (
    HASTY,
    QUICK,
    TINY,
    Frame,
    Interference,
    Link,
    Rounds,
    World,
    assert_guest_follows,
    assert_one_runner,
    changed,
    crossing,
    cut_after,
    cut_before,
    cut_inside,
    for_ever,
    stalled_at,
    swallowed_from,
    taken_and_lost,
    untouched,
    world,
)
from vfiostream.errors import (
    ConnectionLost,
    DeviceRefused,
    DeviceTimeout,
    Incompatible,
    NotConverged,
    OutcomeUnknown,
    PeerAborted,
    SourceStuck,
    StreamError,
    TransportError,
)
from vfiostream.pipeline.bandwidth import Bandwidth
from vfiostream.pipeline.progress import Summary
from vfiostream.policy import RoundReport, Verdict
from vfiostream.transports.contract import Transport
from vfiostream.uapi.four_region import State
from vfiostream.vendor.settings import Fault, Operation

pytestmark = pytest.mark.anyio

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "switchover.md"
Kind = Callable[[str | int], Interference]


@pytest.fixture(autouse=True)
def no_long_goodbyes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last words of an end that gave up may take as long as they need, to somebody who does not listen too."""
    monkeypatch.setattr(Transport, "linger", 0.5)


class Row(NamedTuple):
    """A line of the table: what each end may come to."""

    source: set[str]
    """Names of states; empty where there is no source."""
    target: set[str]
    source_exits: set[int | None]
    """None for a process that was killed, or is not there."""
    target_exits: set[int | None]


def _rows() -> dict[int, Row]:
    rows = {}
    for line in DOCUMENT.read_text().splitlines():
        if re.match(r"\| \d+ \|", line):
            number, _, _, source, _, target, exits = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            ours, theirs = exits.split(" / ")
            assert int(number) not in rows
            rows[int(number)] = Row(_states(source), _states(target), _exits(ours), _exits(theirs))
    return rows


def _states(cell: str) -> set[str]:
    if cell == "as left":
        return {"RUNNING", "STOP"}
    return set() if cell == "-" else {name.replace("\\|", "_") for name in cell.split(" or ")}


def _exits(cell: str) -> set[int | None]:
    return {None if code == "-" else int(code) for code in cell.split(" or ")}


ROWS = _rows()


def check(number: int, made: World) -> None:
    """Both ends must have come to what the table says."""
    row = ROWS[number]
    if row.source:
        assert made.source.state.name in row.source
        assert made.source.exit in row.source_exits, made.source.result
        if made.source.exit is not None:
            assert_guest_follows(made.source)
    if row.target:
        assert made.target.state.name in row.target
        assert made.target.exit in row.target_exits, made.target.result
    if row.source and row.target:
        assert_one_runner(made)


def test_every_row_of_the_table_is_tested() -> None:
    tested = {int(found[1]) for name in globals() if (found := re.match(r"test_row_(\d+)_", name))}
    assert sorted(tested) == sorted(ROWS) == list(range(1, len(ROWS) + 1))


def loss(*cases: tuple[str, Kind, str]) -> pytest.MarkDecorator:
    """The frames at which the link is lost: direction, how, and which."""
    names = [f"{kind.__name__} {frame}" for _, kind, frame in cases]
    return pytest.mark.parametrize(("direction", "kind", "frame"), cases, ids=names)


async def lose(number: int, made: World, direction: str, kind: Kind, frame: str) -> None:
    out, back = (kind(frame), untouched) if direction == "out" else (untouched, kind(frame))
    await made.migrate(out=out, back=back)
    check(number, made)


def errors(*numbers: int, operation: Operation = Operation.SET_STATE) -> list[Fault]:
    return [Fault(operation, number, errno.EIO) for number in numbers]


def hangs(*numbers: int) -> list[Fault]:
    return [Fault(Operation.SET_STATE, number, "hang") for number in numbers]


async def takes_its_time() -> None:
    """As a driver does that needs longer than the patience."""
    with anyio.move_on_after(1.5 * HASTY.patience):
        await anyio.sleep_forever()


# ---- the link is lost


@loss(
    ("out", cut_before, "HELLO"),
    ("out", cut_inside, "HELLO"),
    ("out", taken_and_lost, "HELLO"),
    ("out", cut_after, "HELLO"),
    ("back", cut_before, "WELCOME"),
    ("back", cut_inside, "WELCOME"),
    ("back", taken_and_lost, "WELCOME"),
)
async def test_row_01_loss_before_welcome(direction: str, kind: Kind, frame: str) -> None:
    async with world() as made:
        await lose(1, made, direction, kind, frame)
        assert isinstance(made.source.result, ConnectionLost)
        assert isinstance(made.target.result, ConnectionLost)
        assert "before start_precopy" not in made.source.trace.points


async def test_row_01_nobody_answers() -> None:
    async with world() as made:
        await made.migrate(out=swallowed_from("HELLO"), settings=HASTY)
        check(1, made)
        assert "nobody answered within 0.3 s" in str(made.source.error)


@loss(
    ("out", cut_before, "ROUND"),
    ("out", cut_inside, "MEMORY"),
    ("out", cut_after, "MEMORY"),
    ("out", cut_inside, "PAGES"),
    ("out", cut_after, "ROUND_END"),
    ("back", cut_before, "ACK round"),
    ("back", cut_inside, "ACK round"),
    ("back", taken_and_lost, "ACK round"),
)
async def test_row_02_loss_during_the_rounds(direction: str, kind: Kind, frame: str) -> None:
    async with world() as made:
        await lose(2, made, direction, kind, frame)
        assert isinstance(made.source.result, ConnectionLost)
        assert isinstance(made.target.result, ConnectionLost)
        assert "before pause" not in made.source.trace.points


@loss(
    ("out", cut_before, "STATE"),
    ("out", cut_inside, "STATE"),
    ("out", cut_after, "PCI"),
    ("out", cut_inside, "CONFIG"),
    ("out", cut_before, "END"),
    ("out", cut_inside, "END"),
)
async def test_row_03_loss_while_stopped(direction: str, kind: Kind, frame: str) -> None:
    async with world() as made:
        await lose(3, made, direction, kind, frame)
        assert isinstance(made.source.result, ConnectionLost)
        assert isinstance(made.target.result, ConnectionLost)
        assert made.source.guest.told[-2:] == ["stop_tracking", "resume"]


@loss(
    ("out", taken_and_lost, "END"),
    ("out", cut_after, "END"),
    ("back", cut_before, "ACK loaded"),
    ("back", cut_inside, "ACK loaded"),
    ("back", taken_and_lost, "ACK loaded"),
)
async def test_row_04_loss_before_everything_is_known_to_be_loaded(direction: str, kind: Kind, frame: str) -> None:
    async with world() as made:
        await lose(4, made, direction, kind, frame)
        assert isinstance(made.source.result, ConnectionLost)
        assert isinstance(made.target.result, ConnectionLost)
        assert made.source.guest.told[-1] == "resume"


@loss(("out", cut_before, "COMMIT"), ("back", cut_after, "ACK loaded"))
async def test_row_05_loss_before_the_commit_was_taken(direction: str, kind: Kind, frame: str) -> None:
    async with world() as made:
        await lose(5, made, direction, kind, frame)
        assert isinstance(made.source.result, ConnectionLost)
        assert isinstance(made.target.result, ConnectionLost)
        assert "after finish_load" in made.target.trace.points


@loss(("out", cut_inside, "COMMIT"), ("out", taken_and_lost, "COMMIT"))
async def test_row_06_the_commit_is_lost(direction: str, kind: Kind, frame: str) -> None:
    async with world() as made:
        await lose(6, made, direction, kind, frame)
        assert isinstance(made.source.result, OutcomeUnknown)
        assert isinstance(made.target.result, ConnectionLost)
        assert "device resume" in str(made.source.result)


async def test_row_06_the_commit_is_swallowed_and_so_is_every_answer() -> None:
    async with world() as made:
        await made.migrate(out=swallowed_from("COMMIT"), back=swallowed_from("ABORT"), settings=HASTY)
        check(6, made)
        assert "did not commit within 0.3 s" in str(made.target.error)


async def test_row_07_a_loss_found_while_the_answer_is_awaited_is_not_the_commits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A link of several parts may find out when it receives that something else could not be sent."""

    async def found_late(link: Link, frame: Frame) -> None:
        await link.deliver(frame.data)
        if frame.name == "COMMIT":

            async def receive(into: Sequence[memoryview], least: int = 1) -> int:
                raise link.lost(0)

            monkeypatch.setattr(link, "receive", receive)

    async with world() as made:
        await made.migrate(out=found_late)
        check(7, made)
        assert isinstance(made.source.result, OutcomeUnknown)


async def test_row_29_the_reason_is_read_though_the_link_was_lost_while_greeting() -> None:
    """The target refuses and closes while the source still sends."""

    async def too_late(link: Link, frame: Frame) -> None:
        await link.deliver(frame.data)
        if frame.name == "HELLO":
            raise link.lost(0)

    async with world(target_like=replace(TINY, memory=0)) as made:
        await made.migrate(out=too_late)
        check(29, made)


async def test_row_06_the_link_does_not_take_the_commit() -> None:
    async with world() as made:
        await made.migrate(out=stalled_at("COMMIT"), back=swallowed_from("ABORT"), settings=HASTY)
        check(6, made)


@loss(
    ("out", cut_after, "COMMIT"),
    ("back", cut_before, "ACK running"),
    ("back", cut_inside, "ACK running"),
    ("back", taken_and_lost, "ACK running"),
)
async def test_row_07_the_target_runs_and_the_source_does_not_know(direction: str, kind: Kind, frame: str) -> None:
    async with world() as made:
        await lose(7, made, direction, kind, frame)
        assert isinstance(made.source.result, OutcomeUnknown)
        assert isinstance(made.target.result, Summary)
        assert "the source could not be told" in made.target.result.warnings[0]


async def test_row_07_the_answer_is_swallowed() -> None:
    async with world() as made:
        await made.migrate(back=swallowed_from("ACK running"), settings=HASTY)
        check(7, made)


async def test_row_10_loss_after_the_answer() -> None:
    async with world() as made:
        await lose(10, made, "back", cut_after, "ACK running")
        assert made.moved


# ---- the target's driver


async def test_row_08_the_driver_refuses_to_run() -> None:
    async with world(target_faults=errors(2)) as made:
        await made.migrate()
        check(8, made)
        assert isinstance(made.source.result, PeerAborted)
        assert made.source.result.code == "device"
        assert made.source.result.reason == str(made.target.error)
        assert isinstance(made.target.result, DeviceRefused)
        assert made.source.guest.told[-1] == "resume"


async def test_row_09_the_driver_answers_nothing_any_more() -> None:
    async with world(target_faults=hangs(2, 3)) as made:
        await made.migrate()
        check(9, made)
        assert isinstance(made.source.result, OutcomeUnknown)
        assert "in doubt" in str(made.source.result)
        assert isinstance(made.target.result, OutcomeUnknown)


@pytest.mark.parametrize("stuck", ["before abandon", "after abandon"])
async def test_row_09_the_driver_takes_for_ever(stuck: str) -> None:
    async with world() as made:
        made.target.trace.plan |= {"before run": for_ever, stuck: for_ever}
        await made.migrate(theirs=HASTY)
        check(9, made)
        assert "so it may run" in str(made.target.error)


@pytest.mark.parametrize("stuck", ["before run", "after run"])
async def test_row_24_the_driver_takes_too_long_to_run(stuck: str) -> None:
    async with world() as made:
        made.target.trace.plan[stuck] = for_ever
        await made.migrate(theirs=HASTY)
        check(24, made)
        assert isinstance(made.target.result, DeviceTimeout)
        assert isinstance(made.source.result, PeerAborted)
        assert made.source.result.reason == str(made.target.result)


async def test_row_24_the_driver_says_that_it_did_not_run() -> None:
    async with world(target_faults=hangs(2)) as made:
        await made.migrate()
        check(24, made)
        assert isinstance(made.target.result, DeviceTimeout)


async def test_row_25_one_of_several_refuses_to_run() -> None:
    async with world(devices=2, target_faults=errors(2)) as made:
        await made.migrate()
        check(25, made)
        assert any(State.RUNNING in theirs for ours, theirs in made.history if State.STOP_LOGGING in ours)
        assert made.target.trace.calls.count("abandon") == 2
        told = made.target.trace.points.index("before send ABORT")
        assert "after abandon" not in made.target.trace.points[told:]


async def test_row_26_the_driver_goes_away() -> None:
    async with world(target_faults=[Fault(Operation.SET_STATE, 2, "exit")]) as made:
        await made.migrate()
        check(26, made)
        assert isinstance(made.source.result, OutcomeUnknown)
        assert isinstance(made.target.result, OutcomeUnknown)


async def test_row_29_the_target_can_not_take_it() -> None:
    async with world(target_like=replace(TINY, memory=0)) as made:
        await made.migrate()
        check(29, made)
        assert isinstance(made.source.result, PeerAborted)
        assert made.source.result.code == "incompatible"
        assert isinstance(made.target.result, Incompatible)
        assert "before start_precopy" not in made.source.trace.points
        assert [machine.digest for machine in made.target.machines] == made.target.before


async def test_row_30_the_driver_fails_before_all_is_loaded() -> None:
    async with world(target_faults=errors(2, operation=Operation.SET_MEMORY)) as made:
        await made.migrate()
        check(30, made)
        assert isinstance(made.source.result, PeerAborted)
        assert made.source.result.reason == str(made.target.error)


# ---- the source's driver


async def test_row_11_the_source_stays_in_logging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with world(source_faults=errors(4)) as made:
        await made.migrate()
        check(11, made)
        assert isinstance(made.source.result, Summary)
        assert "tracking could not be switched off" in made.source.result.warnings[0]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(Operation.SET_STATE, 2, errno.EIO),
        Fault(Operation.GET_MEMORY, 2, errno.EIO),
        Fault(Operation.SET_STATE, 3, "hang"),
        Fault(Operation.GET_CONFIG, 1, errno.EIO),
    ],
    ids=lambda fault: fault.operation,
)
async def test_row_16_the_source_fails(fault: Fault) -> None:
    async with world(source_faults=[fault]) as made:
        await made.migrate()
        check(16, made)
        assert isinstance(made.target.result, PeerAborted)
        assert made.target.result.code == "device"
        assert made.target.result.reason == str(made.source.error)


@pytest.mark.parametrize(
    ("first", "state", "number"),
    [(Operation.GET_MEMORY, State.RUNNING_LOGGING, 3), (Operation.GET_CONFIG, State.STOP_LOGGING, 4)],
    ids=["while it runs", "while it is stopped"],
)
async def test_row_27_the_source_is_stuck(first: Operation, state: State, number: int) -> None:
    async with world(source_faults=[*errors(1, operation=first), *errors(number)]) as made:
        await made.migrate()
        check(27, made)
        assert made.source.state is state
        assert isinstance(made.source.result, SourceStuck)
        assert f"refused {'get memory' if first is Operation.GET_MEMORY else 'get config'}" in str(made.source.result)
        assert "device resume" in str(made.source.result)
        assert "resume" not in made.source.guest.told
        assert isinstance(made.target.result, PeerAborted)


async def test_row_27_the_source_is_stuck_when_cancelled() -> None:
    async with world(source_faults=errors(4)) as made:
        made.source.trace.plan["after stop"] = made.source.trace.cancel
        await made.migrate()
        check(27, made)
        assert str(made.source.error).startswith("cancelled; and then the source could not be resumed")


async def test_row_27_the_other_devices_are_resumed() -> None:
    async with world(devices=2, source_faults=errors(4)) as made:
        made.source.trace.plan["after send END"] = made.source.trace.cancel
        await made.migrate()
        assert isinstance(made.source.result, SourceStuck)
        assert [machine.state for machine in made.source.machines] == [State.RUNNING, State.STOP_LOGGING]


# ---- cancelled


@pytest.mark.parametrize(
    "point", ["after start_precopy", "after send MEMORY", "before pause", "after stop", "after send END"]
)
async def test_row_12_the_source_is_cancelled(point: str) -> None:
    async with world() as made:
        made.source.trace.plan[point] = made.source.trace.cancel
        await made.migrate()
        check(12, made)
        assert isinstance(made.target.result, PeerAborted)
        assert made.target.result.code == "cancelled"


async def test_row_12_the_source_is_cancelled_before_it_has_said_anything() -> None:
    async with world() as made:
        made.source.trace.plan["before send HELLO"] = made.source.trace.cancel
        await made.migrate()
        assert made.source.result is None
        assert isinstance(made.target.result, ConnectionLost)
        assert made.target.state is State.RUNNING


@pytest.mark.parametrize("point", ["before send COMMIT", "after send COMMIT"])
async def test_row_13_the_source_is_cancelled_after_the_commit(point: str) -> None:
    async with world() as made:
        made.source.trace.plan[point] = made.source.trace.cancel
        await made.migrate()
        check(13, made)
        assert made.moved


@loss(("out", taken_and_lost, "COMMIT"), ("back", cut_before, "ACK running"))
async def test_row_13_and_the_link_is_lost(direction: str, kind: Kind, frame: str) -> None:
    async with world() as made:
        made.source.trace.plan["before send COMMIT"] = made.source.trace.cancel
        await lose(6 if direction == "out" else 7, made, direction, kind, frame)


async def test_row_13_and_the_driver_refuses() -> None:
    async with world(target_faults=errors(2)) as made:
        made.source.trace.plan["after send COMMIT"] = made.source.trace.cancel
        await made.migrate()
        check(8, made)


@pytest.mark.parametrize("point", ["before start_load", "before deliver", "after finish_load", "after send ACK loaded"])
async def test_row_14_the_target_is_cancelled(point: str) -> None:
    async with world() as made:
        made.target.trace.plan[point] = made.target.trace.cancel
        await made.migrate()
        check(14, made)
        assert isinstance(made.source.result, PeerAborted)
        assert made.source.result.code == "cancelled"


@pytest.mark.parametrize("point", ["before run", "after run", "after send ACK running"])
async def test_row_15_the_target_is_cancelled_after_the_commit(point: str) -> None:
    async with world() as made:
        made.target.trace.plan[point] = made.target.trace.cancel
        await made.migrate()
        check(15, made)
        assert made.moved


@pytest.mark.parametrize("point", ["before release", "before stop_tracking"])
async def test_row_28_the_source_is_cancelled_when_all_is_done(point: str) -> None:
    async with world() as made:
        made.source.trace.plan[point] = made.source.trace.cancel
        await made.migrate()
        check(28, made)
        assert made.moved


# ---- killed, or hanging


@pytest.mark.parametrize("point", ["after send MEMORY", "after stop", "after send END", "before send COMMIT"])
async def test_row_17_the_source_is_killed(point: str) -> None:
    async with world() as made:
        made.source.trace.plan[point] = made.source.kill
        await made.migrate()
        check(17, made)
        assert isinstance(made.target.result, ConnectionLost)


async def test_row_18_the_source_is_killed_after_the_commit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with world() as made:
        made.source.trace.plan["after send COMMIT"] = made.source.kill
        await made.migrate()
        check(18, made)
        assert isinstance(made.target.result, Summary)
        assert "the source could not be told" in made.target.result.warnings[0]
        assert "the source was not told" in caplog.text


@pytest.mark.parametrize("point", ["before deliver", "after finish_load"])
async def test_row_19_the_target_is_killed(point: str) -> None:
    async with world() as made:
        made.target.trace.plan[point] = made.target.kill
        await made.migrate()
        check(19, made)
        assert isinstance(made.source.result, ConnectionLost)


async def test_row_20_the_target_hangs_and_the_policy_gives_up() -> None:
    async with world() as made:
        made.target.trace.plan["before deliver"] = for_ever
        # Longer than the patience, which does not count here.
        await made.migrate(policy=Rounds(give_up_after=2 * HASTY.patience), settings=HASTY)
        check(20, made)
        assert isinstance(made.source.result, NotConverged)
        assert isinstance(made.target.result, PeerAborted)


async def test_row_20_the_target_hangs_and_the_source_is_cancelled() -> None:
    async with world() as made:
        made.target.trace.plan["before deliver"] = for_ever

        async def cancel_when_all_stands_still() -> None:
            await anyio.wait_all_tasks_blocked()
            assert made.source.state is State.RUNNING_LOGGING
            await made.source.trace.cancel()

        await made.migrate(meanwhile=cancel_when_all_stands_still)
        check(20, made)


@pytest.mark.parametrize("point", ["before begin_config", "before finish_load"])
async def test_row_21_the_target_hangs_while_the_source_is_stopped(point: str) -> None:
    async with world() as made:
        hangs = anyio.Event()

        async def comes_back() -> None:
            hangs.set()

        made.target.trace.plan[point] = hangs.wait
        made.source.trace.plan["after resume"] = comes_back
        await made.migrate(settings=HASTY)
        check(21, made)
        assert isinstance(made.target.result, PeerAborted)
        assert "took nothing for 0.3 s while the source was stopped" in str(made.source.error)
        assert made.source.guest.told[-1] == "resume"


async def test_row_21_the_answer_is_swallowed() -> None:
    async with world() as made:
        await made.migrate(back=swallowed_from("ACK loaded"), settings=HASTY)
        check(21, made)


async def test_row_21_what_the_source_s_own_driver_takes_does_not_count() -> None:
    async with world() as made:
        made.source.trace.plan |= {"before stop": takes_its_time, "before capture_config": takes_its_time}
        await made.migrate(settings=HASTY, theirs=QUICK)
        assert made.moved


async def test_row_21_a_slow_link_is_not_one_that_hangs() -> None:
    async with world() as made:
        slow = replace(HASTY, bandwidth=Bandwidth(switchover=2 * 64 * 1024 / HASTY.patience))

        class DirtyAtTheEnd:
            """As good as everything is sent twice, the second time with the source stopped."""

            give_up_after = None

            def judge(self, report: RoundReport) -> Verdict:
                made.source.machine.driver.workload.write(200)
                return Verdict.SWITCHOVER

        await made.migrate(settings=slow, policy=DirtyAtTheEnd())
        assert made.moved
        assert isinstance(made.source.result, Summary)
        assert made.source.result.downtime is not None
        assert made.source.result.downtime.total > slow.patience


@pytest.mark.parametrize("point", ["before run", "after run"])
async def test_row_22_the_target_is_killed_after_the_commit(point: str) -> None:
    async with world() as made:
        made.target.trace.plan[point] = made.target.kill
        await made.migrate()
        check(22, made)
        assert isinstance(made.source.result, OutcomeUnknown)
        assert made.target.state is (State.STOP if point == "before run" else State.RUNNING)


async def test_row_23_the_commit_comes_after_the_target_s_patience() -> None:
    out, back = crossing("COMMIT", "ABORT")
    async with world() as made:
        await made.migrate(out=out, back=back, theirs=HASTY)
        check(23, made)
        assert isinstance(made.source.result, PeerAborted)
        assert "did not commit within 0.3 s" in made.source.result.reason
        assert "before run" not in made.target.trace.points
        assert made.source.guest.told[-1] == "resume"


async def test_row_23_the_commit_crosses_the_target_s_abort() -> None:
    out, back = crossing("COMMIT", "ABORT")
    async with world() as made:
        made.source.trace.plan["after send COMMIT"] = made.target.trace.cancel
        await made.migrate(out=out, back=back)
        check(23, made)
        assert isinstance(made.source.result, PeerAborted)
        assert made.source.result.code == "cancelled"
        assert "before run" not in made.target.trace.points


# ---- the stream, the policy


@pytest.mark.parametrize("frame", ["MEMORY", "PAGES", "CONFIG", "END", "COMMIT"])
async def test_row_31_a_frame_is_damaged(frame: str) -> None:
    async with world() as made:
        await made.migrate(out=changed(frame, lambda data: data[:-1] + bytes([data[-1] ^ 1])))
        check(31, made)
        assert isinstance(made.target.result, StreamError)
        assert made.target.result.record.startswith(frame)
        assert isinstance(made.source.result, PeerAborted)
        assert made.source.result.code == "stream"
        assert made.source.result.reason == str(made.target.result)


async def test_row_32_precopy_does_not_converge() -> None:
    class Never:
        give_up_after = None

        def judge(self, report: RoundReport) -> Verdict:
            return Verdict.GIVE_UP if report.number == 2 else Verdict.CONTINUE

    async with world() as made:
        await made.migrate(policy=Never())
        check(32, made)
        assert isinstance(made.source.result, NotConverged)
        assert isinstance(made.target.result, PeerAborted)
        assert made.target.result.code == "not-converged"


# ---- files


async def broken() -> None:
    raise TransportError("file: writing failed (No space left on device); free some space")


@pytest.mark.parametrize("point", ["after start_precopy", "after stop", "before capture_config"])
async def test_row_33_a_save_is_cancelled(point: str, tmp_path: Path) -> None:
    async with world() as made:
        made.source.trace.plan[point] = made.source.trace.cancel
        await made.save(tmp_path / "file")
        check(33, made)
        assert made.source.result is None
    assert list(tmp_path.iterdir()) == []


async def test_row_33_the_file_can_not_be_written(tmp_path: Path) -> None:
    async with world() as made:
        made.source.trace.plan["before send MEMORY"] = broken
        await made.save(tmp_path / "file")
        check(33, made)
        assert isinstance(made.source.result, TransportError)
    assert list(tmp_path.iterdir()) == []


async def test_row_33_the_driver_fails(tmp_path: Path) -> None:
    async with world(source_faults=errors(1, operation=Operation.GET_CONFIG)) as made:
        await made.save(tmp_path / "file")
        check(33, made)
        assert isinstance(made.source.result, DeviceRefused)
        assert made.source.guest.told[-1] == "resume"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("point", ["before send COMMIT", "before finish"])
async def test_row_34_the_file_fails_at_the_end(point: str, tmp_path: Path) -> None:
    async with world() as made:
        made.source.trace.plan[point] = broken
        await made.save(tmp_path / "file")
        check(34, made)
        assert isinstance(made.source.result, TransportError)
        assert made.source.guest.told.count("resume") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("point", ["before resume", "before stop_tracking", "after resume", "before send COMMIT"])
async def test_row_34_a_save_is_cancelled_at_the_end(point: str, tmp_path: Path) -> None:
    async with world() as made:
        made.source.trace.plan[point] = made.source.trace.cancel
        await made.save(tmp_path / "file")
        check(34, made)
    assert list(tmp_path.iterdir()) == []


async def test_row_34_the_guest_goes_on_even_if_it_is_cancelled_as_it_does(tmp_path: Path) -> None:
    async with world() as made:

        async def plan_for_the_guest() -> None:
            made.source.trace.plan["before resume"] = made.source.trace.cancel

        made.source.trace.plan["after stop_tracking"] = plan_for_the_guest
        await made.save(tmp_path / "file")
        check(34, made)
        assert made.source.guest.running
    assert list(tmp_path.iterdir()) == []


async def test_row_35_a_save_does_not_resume(tmp_path: Path) -> None:
    async with world(source_faults=errors(4, 5)) as made:
        await made.save(tmp_path / "file")
        check(35, made)
        assert isinstance(made.source.result, SourceStuck)
    assert list(tmp_path.iterdir()) == []


async def test_row_36_a_restore_is_cancelled(tmp_path: Path) -> None:
    async with world() as made:
        await made.save(tmp_path / "file")
        made.target.trace.plan["before deliver"] = made.target.trace.cancel
        await made.restore(tmp_path / "file")
        check(36, made)
        assert made.target.result is None


@pytest.mark.parametrize("cut", [1, 48, 49, 1000])
async def test_row_36_the_file_is_cut(cut: int, tmp_path: Path) -> None:
    async with world() as made:
        await made.save(tmp_path / "file")
        (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-cut])
        await made.restore(tmp_path / "file")
        check(36, made)
        assert isinstance(made.target.result, StreamError)
        assert "before run" not in made.target.trace.points


async def test_row_37_a_restore_is_cancelled_at_the_end(tmp_path: Path) -> None:
    async with world() as made:
        await made.save(tmp_path / "file")
        made.target.trace.plan["before run"] = made.target.trace.cancel
        await made.restore(tmp_path / "file")
        check(37, made)
        assert [made.target.machine.digest] == made.source.before


async def test_row_37_a_file_is_waited_for(tmp_path: Path) -> None:
    async with world() as made:
        await made.save(tmp_path / "file")
        await made.restore(tmp_path / "file", replace(QUICK, patience=1e-9))
        # The patience is for other ends and for the change to RUNNING, not for the file.
        assert "before run" in made.target.trace.points


async def test_row_38_the_driver_refuses_to_run_a_restore(tmp_path: Path) -> None:
    async with world(target_faults=errors(2)) as made:
        await made.save(tmp_path / "file")
        await made.restore(tmp_path / "file")
        check(38, made)
        assert isinstance(made.target.result, DeviceRefused)


async def test_row_39_the_driver_does_not_answer_at_the_end_of_a_restore(tmp_path: Path) -> None:
    async with world(target_faults=hangs(2, 3)) as made:
        await made.save(tmp_path / "file")
        await made.restore(tmp_path / "file")
        check(39, made)
        assert isinstance(made.target.result, OutcomeUnknown)
        assert "source" not in str(made.target.result)
