"""The precopy policy and its estimate: pure functions of what the rounds showed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from vfiostream.errors import UsageError
from vfiostream.policy import Precopy, RoundReport, Verdict

MIB = 1024 * 1024


def report(
    number: int = 2,
    content: int = 100 * MIB,
    total: int = 1024 * MIB,
    collected: float = 10.0,
    ended: float = 11.0,
    previous: float | None = 8.0,
) -> RoundReport:
    return RoundReport(number, content, total, collected, ended, previous)


def test_the_estimate() -> None:
    seen = report()  # 100 MiB became dirty in 2 s; sending them took 1 s.
    assert seen.throughput == 100 * MIB
    assert seen.dirty_rate == 50 * MIB
    assert seen.pending == 50 * MIB
    assert seen.expected_downtime == pytest.approx(0.5)


def test_the_first_round_knows_no_dirty_rate() -> None:
    seen = report(number=1, content=1024 * MIB, previous=None)
    assert seen.dirty_rate is None
    assert seen.pending == seen.total
    assert seen.expected_downtime == pytest.approx(1.0)


def test_never_more_is_pending_than_there_is() -> None:
    assert report(content=1000 * MIB, ended=100.0).pending == 1024 * MIB


def test_nothing_dirty_is_no_downtime() -> None:
    assert report(content=0).expected_downtime == 0.0
    assert report(number=1, content=0, total=0, previous=None).expected_downtime == 0.0


def test_nothing_known_is_for_ever() -> None:
    assert report(number=1, content=0, total=5, previous=None).expected_downtime == math.inf


@given(
    st.integers(0, 1 << 50),
    st.integers(0, 1 << 50),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
    st.none() | st.floats(0, 1e6),
)
def test_an_estimate_is_always_a_number(
    content: int, total: int, collected: float, took: float, ago: float | None
) -> None:
    previous = None if ago is None else collected - ago
    seen = RoundReport(3, content, total, collected, collected + took, previous)
    assert 0 <= seen.pending <= total
    assert seen.expected_downtime >= 0


def test_it_stops_the_source_when_the_rest_fits() -> None:
    assert Precopy(downtime_limit=0.5).judge(report()) is Verdict.SWITCHOVER
    assert Precopy(downtime_limit=0.49).judge(report()) is Verdict.CONTINUE


@pytest.mark.parametrize(
    ("otherwise", "verdict"),
    [("continue", Verdict.CONTINUE), ("stop", Verdict.SWITCHOVER), ("give-up", Verdict.GIVE_UP)],
)
def test_what_does_not_converge(otherwise: str, verdict: Verdict) -> None:
    rounds = Precopy(downtime_limit=0.1, max_rounds=2, otherwise=otherwise)  # type: ignore[arg-type]
    assert rounds.judge(report(number=1)) is Verdict.CONTINUE
    assert rounds.judge(report(number=2)) is verdict
    time = Precopy(downtime_limit=0.1, max_time=11.0, otherwise=otherwise)  # type: ignore[arg-type]
    assert time.judge(report(ended=10.9)) is Verdict.CONTINUE
    assert time.judge(report()) is verdict
    assert (time.give_up_after == 11.0) is (otherwise == "give-up")


def test_the_default_is_qemus() -> None:
    assert Precopy().downtime_limit == 0.3


@pytest.mark.parametrize(
    "wrong", [{"downtime_limit": -1}, {"downtime_limit": math.nan}, {"max_rounds": 0}, {"max_time": 0}]
)
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Precopy(**wrong)  # type: ignore[arg-type]


def test_what_devices_tell_is_not_estimated() -> None:
    told = report()._replace(told_content=60 * MIB, initial=0, rest=7 * MIB)
    assert told.dirty_rate == 20 * MIB
    assert told.pending == 27 * MIB
    assert Precopy(downtime_limit=0.28).judge(told) is Verdict.SWITCHOVER
    assert Precopy(downtime_limit=0.26).judge(told) is Verdict.CONTINUE


def test_initial_bytes_are_across_before_the_source_stops() -> None:
    told = report()._replace(told_content=100 * MIB, initial=1)
    assert Precopy(downtime_limit=10).judge(told) is Verdict.CONTINUE
    assert Precopy(downtime_limit=10).judge(told._replace(initial=0, rest=1)) is Verdict.SWITCHOVER
    assert Precopy(downtime_limit=10, max_rounds=2, otherwise="stop").judge(told) is Verdict.SWITCHOVER


def test_rounds_without_content_keep_the_speed_that_was_seen() -> None:
    idle = report(content=0)._replace(rest=50 * MIB, speed=10.0 * MIB, switchover_speed=100.0 * MIB)
    assert idle.throughput == 10 * MIB
    assert idle.expected_downtime == pytest.approx(0.5)
    assert Precopy(downtime_limit=0.4).judge(idle) is Verdict.CONTINUE


def test_devices_that_give_nothing_while_they_run_are_stopped() -> None:
    assert Precopy().judge(report(number=1, content=0, total=0, previous=None)._replace(rest=5)) is Verdict.SWITCHOVER


def test_a_round_of_a_few_bytes_does_not_make_a_link_slow() -> None:
    small = report(content=24, total=0, collected=10.0, ended=10.25)._replace(told_content=24, rest=96)
    assert small.throughput == 96
    assert small.expected_downtime < 0.001
    assert Precopy().judge(small) is Verdict.SWITCHOVER
    assert Precopy().judge(small._replace(rest=10 * MIB)) is Verdict.CONTINUE


# ---- limits of the bandwidth

LIMITED = report(ended=20.0)._replace(transferred=50 * MIB, held=9.0, total=100 * MIB)
"""100 MiB of content as 50 MiB in 10 s, of which a limit of 5 MiB/s held it back for 9."""


def test_what_a_limit_holds_back_is_what_is_known_of_the_link() -> None:
    assert LIMITED.throughput == 10 * MIB
    assert LIMITED.switchover_throughput == 10 * MIB


@pytest.mark.parametrize(
    ("switchover", "expected"),
    [
        (25, 50),  # as much as was said, in content
        (500, 100),  # what other things took in this round, they take whatever the link has
        (1, 2),  # a switchover may be slower than precopy, too
    ],
)
def test_what_is_there_for_the_switchover_is_what_is_said(switchover: int, expected: int) -> None:
    told = LIMITED._replace(switchover=switchover * MIB)
    assert told.throughput == 10 * MIB
    assert told.switchover_throughput == expected * MIB
    assert told.expected_downtime == pytest.approx(told.pending / (expected * MIB))


def test_a_link_that_is_slower_than_the_limits_is_not_made_faster_by_what_is_said() -> None:
    assert report()._replace(transferred=100 * MIB, switchover=1000 * MIB).switchover_throughput == 100 * MIB


def test_a_short_round_that_was_held_back_tells_how_fast_the_limit_is() -> None:
    # 1 KiB in 1.01 s, of which 1 s is the limit's.
    small = report(content=1024, ended=11.01)._replace(transferred=1100, held=1.0, rest=1024, told_content=1024)
    assert small.expected_downtime == pytest.approx(1.0, rel=0.01)
    assert small._replace(switchover=1024.0).expected_downtime == pytest.approx(1.0, rel=0.01)
    assert small._replace(switchover=100.0 * MIB).expected_downtime < 0.001


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 50), st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1, 1e18))
def test_with_limits_an_estimate_is_a_number_too(
    content: int, transferred: int, took: float, held: float, switchover: float
) -> None:
    seen = RoundReport(3, content, 1 << 50, 1.0, 1.0 + took, 0.5, rest=5)._replace(
        transferred=transferred, held=min(held, took), switchover=switchover
    )
    assert seen.expected_downtime >= 0
