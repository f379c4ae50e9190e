"""What is measured of a machine, and what follows from a rate."""

from __future__ import annotations

import pytest

from vfiostream import probe
from vfiostream.policy import Precopy

GIB = 1 << 30
RATE = 1e9


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "AREA", 4 << 20)
    monkeypatch.setattr(probe, "LEAST_TIME", 0.0)


@pytest.mark.parametrize("content", [b"\1", bytes(5 << 20), b"abc" * 1000], ids=["byte", "zeros", "text"])
def test_speeds(content: bytes) -> None:
    found = probe.speeds(content)
    assert min(found) > 0
    # A byte does not shrink; the others are nearly nothing.
    assert found.ratio == 1 if len(content) == 1 else found.ratio > 50


def test_an_outlook_at_rest_is_one_pass() -> None:
    found = probe.outlook(16 * GIB, RATE, Precopy())
    assert found.size == 16 * GIB
    assert found.seconds == pytest.approx(16 * GIB / RATE)
    assert found.seconds < found.seconds_at_dirty_rate


@pytest.mark.parametrize("rounds", [1, 2, 5, 30])
def test_the_dirty_rate_is_where_the_policy_turns(rounds: int) -> None:
    size, policy = 16 * GIB, Precopy(max_rounds=rounds + 1)
    found = probe.outlook(size, RATE, policy)
    # A round sends what was dirtied during the one before, so what is left shrinks by dirty rate / rate each time. It
    # is judged after the last of the rounds, when as much was dirtied again.
    left = size / RATE * (found.dirty_rate / RATE) ** (rounds + 1)
    assert left == pytest.approx(policy.downtime_limit, rel=1e-3)
    assert 0 < found.dirty_rate < RATE


def test_what_fits_the_downtime_converges_whatever_is_dirtied() -> None:
    found = probe.outlook(64 << 20, RATE, Precopy(downtime_limit=0.3))
    assert found.dirty_rate == pytest.approx(RATE, abs=2)


def test_more_downtime_allows_more_to_be_dirtied() -> None:
    rates = [probe.outlook(GIB, RATE, Precopy(downtime_limit=limit)).dirty_rate for limit in (0.01, 0.1, 0.5)]
    assert rates == sorted(set(rates))
