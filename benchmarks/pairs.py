"""Runs contestants in turn, so that what else the machine does meets all of them alike.

A ratio is of two runs that follow each other. Which of them comes first alternates, so that neither always finds the
machine as the other left it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")
Name = TypeVar("Name")  # of a contestant


@dataclass(frozen=True, slots=True)
class Run:
    """What one contestant did once."""

    content: int
    """Bytes that were to be moved."""
    seconds: float
    """From the first byte sent to the last one in its place."""
    sender_cpu: float | None = None
    """CPU seconds of the side that sends, around the transfer; None where it was not measured."""
    receiver_cpu: float | None = None
    transferred: int | None = None
    """Bytes on the link."""
    sender_peak: int | None = None
    """Bytes of memory of its own that the side that sends had at most."""
    receiver_peak: int | None = None

    @property
    def speed(self) -> float:
        """GB/s."""
        return self.content / self.seconds / 1e9

    @property
    def cpu_sending(self) -> float:
        """CPU seconds per GB; 0 where it was not measured."""
        return (self.sender_cpu or 0.0) / self.content * 1e9

    @property
    def cpu_receiving(self) -> float:
        return (self.receiver_cpu or 0.0) / self.content * 1e9


class Spread(NamedTuple):
    """How measurements of the same thing lie."""

    low: float
    first_quartile: float
    median: float
    third_quartile: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Raises ``ValueError`` where there are none."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("there is no spread of nothing")
    if len(ordered) == 1:
        return Spread(*ordered * 5)
    first, median, third = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(ordered[0], first, median, third, ordered[-1])


def in_turn(
    contestants: Mapping[Name, Callable[[], Result]], count: int, *, warm_up: bool = True
) -> list[dict[Name, Result]]:
    """Run every contestant ``count`` times, each round in the opposite order of the one before. With ``warm_up`` they
    run once more, before, and that is forgotten. Returns the rounds; what a contestant raises ends it all.
    """
    names = list(contestants)
    rounds: list[dict[Name, Result]] = []
    for number in range(-1 if warm_up else 0, count):
        order = names if number % 2 == 0 else names[::-1]
        results = {name: contestants[name]() for name in order}
        if number >= 0:
            rounds.append(results)
    return rounds


def column(rounds: Sequence[Mapping[Name, Result]], name: Name) -> list[Result]:
    """The results of one contestant, in the order of the rounds."""
    return [results[name] for results in rounds]
