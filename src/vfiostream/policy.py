"""When to stop the source: the precopy policy, and the estimate it decides on.

Pure: no device, no transport, no clock. What is pending can't be asked of a four-region device without
disturbing it, so it is estimated from what the last rounds found dirty.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from vfiostream.errors import UsageError


class Verdict(Enum):
    CONTINUE = "continue"
    SWITCHOVER = "switchover"
    GIVE_UP = "give up"


class RoundReport(NamedTuple):
    """What one round of precopy showed."""

    number: int
    """1 for the round that sends everything."""
    content: int
    """Bytes of device and guest memory that were sent."""
    total: int
    """Bytes of the first round: more can't be pending."""
    collected: float
    """Seconds from the migration's start to when this round began to collect what is dirty."""
    ended: float
    """Seconds from the migration's start to when the target had taken the round."""
    previous: float | None
    """``collected`` of the round before; None in the first."""

    @property
    def throughput(self) -> float:
        """Bytes of content a second, as the target took them."""
        return self.content / max(self.ended - self.collected, 1e-6)

    @property
    def dirty_rate(self) -> float | None:
        """Bytes dirtied a second; None in the first round, which finds everything."""
        return None if self.previous is None else self.content / max(self.collected - self.previous, 1e-6)

    @property
    def pending(self) -> int:
        """Bytes that are dirty by now, estimated; never more than there is."""
        rate = self.dirty_rate
        return self.total if rate is None else min(self.total, round(rate * (self.ended - self.collected)))

    @property
    def expected_downtime(self) -> float:
        """Seconds that sending what is pending takes, if the link stays as it was in this round. The devices' own times
        for stopping and starting come on top.
        """
        if self.pending == 0:
            return 0.0
        return self.pending / self.throughput if self.content else float("inf")


@dataclass(frozen=True, slots=True)
class Precopy:
    """Send rounds of what is dirty until what is left can be sent within ``downtime_limit``."""

    downtime_limit: float = 0.3
    """Seconds; QEMU's default."""
    max_rounds: int = 30
    """After so many rounds, or ``max_time``, :attr:`otherwise` applies."""
    max_time: float | None = None
    """Seconds from the migration's start."""
    otherwise: Literal["continue", "stop", "give-up"] = "give-up"
    """What to do with a device that does not converge: go on, stop and copy whatever is left, or give up with
    the source running.
    """

    def __post_init__(self) -> None:
        if not self.downtime_limit >= 0:
            raise UsageError(f"the downtime limit is {self.downtime_limit} s: it can't be less than 0")
        if self.max_rounds < 1:
            raise UsageError(f"the most rounds are {self.max_rounds}: there must be at least 1")
        if self.max_time is not None and not self.max_time > 0:
            raise UsageError(f"the most time is {self.max_time} s: it must be more than 0")

    @property
    def give_up_after(self) -> float | None:
        """Seconds after which precopy is given up even within a round; None for never."""
        return self.max_time if self.otherwise == "give-up" else None

    def judge(self, report: RoundReport) -> Verdict:
        """Say what follows after a round."""
        if report.expected_downtime <= self.downtime_limit:
            return Verdict.SWITCHOVER
        if report.number >= self.max_rounds or (self.max_time is not None and report.ended >= self.max_time):
            return _OTHERWISE[self.otherwise]
        return Verdict.CONTINUE


_OTHERWISE = {"continue": Verdict.CONTINUE, "stop": Verdict.SWITCHOVER, "give-up": Verdict.GIVE_UP}
