"""When to stop the source: the precopy policy, and the estimate it decides on.

Pure: no device, no transport, no clock. What is pending in guest memory, and in a four-region device (which can't be
asked without disturbing it), is estimated from what the last rounds found dirty. The other devices tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from vfiostream.errors import UsageError

TELLING = 1 << 20
"""Bytes of content from which on the time of a round tells how fast the link is. A shorter round tells how long one
takes at all, and a longer one would have taken no more: a device of 60 bytes would never be still enough for its link.
"""


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
    """Bytes of the first round, without those of devices that tell: more can't be pending."""
    collected: float
    """Seconds from the migration's start to when this round began to collect what is dirty."""
    ended: float
    """Seconds from the migration's start to when the target had taken the round."""
    previous: float | None
    """``collected`` of the round before; None in the first."""
    told_content: int = 0
    """Bytes of ``content`` that came from devices that tell what is pending."""
    initial: int = 0
    """Bytes that such devices say the target should have before the source stops."""
    rest: int = 0
    """Bytes that they would give beyond those if they were stopped now."""
    speed: float = 0.0
    """Throughput of the last round before this one that had content; 0 where there was none."""
    switchover_speed: float = 0.0
    """Its :attr:`switchover_throughput`."""
    transferred: int = 0
    """Bytes that went over the link in this round."""
    held: float = 0.0
    """Seconds of this round in which nothing but a limit of the bandwidth held the source back."""
    switchover: float | None = None
    """Bytes a second that may go over the link while the source is stopped, and that are there according to who said
    so; None where nobody did.
    """

    @property
    def throughput(self) -> float:
        """Bytes of content a second, as the target took them; of a round without content, what was seen before it, 0
        where nothing was.
        """
        return self.content / max(self.ended - self.collected, 1e-6) if self.content else self.speed

    @property
    def switchover_throughput(self) -> float:
        """Bytes of content a second that can be expected while the source is stopped. Where nobody said what is there
        then, what was seen in this round: a limit held it back, and whether the link has more is not known. Else the
        round again, without being held back, and at that rate: what other things took, it takes all the same.
        """
        if self.switchover is None or not self.content:
            return self.throughput if self.content else self.switchover_speed
        return self.content / max(self.ended - self.collected - self.held, self.transferred / self.switchover, 1e-6)

    @property
    def dirty_rate(self) -> float | None:
        """Bytes dirtied a second, apart from devices that tell; None in the first round, which finds everything."""
        if self.previous is None:
            return None
        return (self.content - self.told_content) / max(self.collected - self.previous, 1e-6)

    @property
    def pending(self) -> int:
        """Bytes that are dirty by now: as told, and estimated for the rest, of which it is never more than there is."""
        rate = self.dirty_rate
        estimated = self.total if rate is None else min(self.total, round(rate * (self.ended - self.collected)))
        return self.initial + self.rest + estimated

    @property
    def expected_downtime(self) -> float:
        """Seconds that sending what is pending takes with the source stopped, if all but the limit of the bandwidth
        stays as it was in this round. The devices' own times for stopping and starting come on top. Infinite where
        nothing was sent yet, so that nothing is known.
        """
        if self.pending == 0:
            return 0.0
        if 0 < self.content < TELLING:
            # What a limit holds back takes longer the more it is.
            free = max(self.ended - self.collected - self.held, 1e-6) / TELLING
            if self.switchover is None:
                return self.pending * (free + self.held / self.content)
            return self.pending * max(free, 1 / self.switchover)
        speed = self.switchover_throughput
        return self.pending / speed if speed else float("inf")


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
        if report.expected_downtime <= self.downtime_limit and not report.initial:
            return Verdict.SWITCHOVER
        if not report.throughput:
            return Verdict.SWITCHOVER  # The devices give nothing while they run: more rounds would show nothing more.
        if report.number >= self.max_rounds or (self.max_time is not None and report.ended >= self.max_time):
            return _OTHERWISE[self.otherwise]
        return Verdict.CONTINUE


_OTHERWISE = {"continue": Verdict.CONTINUE, "stop": Verdict.SWITCHOVER, "give-up": Verdict.GIVE_UP}
