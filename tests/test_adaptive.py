"""The choice of levels, against a simulation of workers, a line and a link in which nothing is left to chance."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, cycle, groupby, islice, takewhile
from typing import NamedTuple

import pytest

from vfiostream.pipeline.adaptive import LADDER, Adaptive, Choice, Choices, Fixed, Use

MIB = 1 << 20
GB = 1e9


class Level(NamedTuple):
    speed: float
    """Bytes a second."""
    ratio: float


Data = Mapping[int, Level]
"""What each level makes of it."""

LIBRARIES: Data = {
    -5: Level(0.80 * GB, 1.83),
    -1: Level(0.65 * GB, 2.22),
    1: Level(0.56 * GB, 2.53),
    3: Level(0.36 * GB, 2.79),
    6: Level(0.13 * GB, 2.94),
    9: Level(0.09 * GB, 2.97),
}
SOURCES: Data = {
    -5: Level(0.54 * GB, 2.75),
    -1: Level(0.48 * GB, 3.46),
    1: Level(0.47 * GB, 4.14),
    3: Level(0.32 * GB, 4.49),
    6: Level(0.11 * GB, 5.00),
    9: Level(0.087 * GB, 5.12),
}
"""Python's own, measured as the libraries were: the levels differ from each other in another way."""
WORDS: Data = {
    -5: Level(0.34 * GB, 2.43),
    -1: Level(0.33 * GB, 2.79),
    1: Level(0.31 * GB, 3.16),
    3: Level(0.275 * GB, 3.40),
    6: Level(0.084 * GB, 3.42),
    9: Level(0.053 * GB, 3.49),
}
"""The reference device's text."""
LEAN: Data = {level: Level(3 * speed, ratio**3) for level, (speed, ratio) in LIBRARIES.items()}
STIFF: Data = {level: Level(speed / 2, 1 + (ratio - 1) / 12) for level, (speed, ratio) in LIBRARIES.items()}
"""It hardly shrinks, and that slowly."""
RANDOM: Data = {}
"""It does not shrink, and a probe says so."""
PROBE = 1e-5
"""Seconds that a probe takes."""

MIXED = (LIBRARIES, RANDOM, SOURCES)


@dataclass
class Line:
    """Chunks of a MiB that go in order through ``workers`` workers and a link; ``depth`` of them at a time."""

    choices: Choices
    rate: Callable[[float], float]
    """Bytes a second of the link, at a time."""
    workers: int = 2
    depth: int = 28
    swallows: float = 6 * MIB
    """Bytes between the two ends, which are taken at the speed of memory."""
    slowed: float = 1.0
    """What is left of a worker's speed where another one works too."""
    ends: list[float] = field(default_factory=list)
    """When each chunk was sent."""
    levels: list[int | None] = field(default_factory=list)

    def run(self, data: Iterable[Data]) -> float:
        """Send chunks of ``data`` one after the other; return bytes a second."""
        news: list[tuple[float, int, Callable[[], None]]] = []
        free = [0.0] * self.workers
        now = emptied = 0.0
        for number, chunk in enumerate(data):
            admitted = self.ends[number - self.depth] if number >= self.depth else 0.0
            while news and news[0][0] <= admitted:
                heapq.heappop(news)[2]()
            choice = self.choices.choose(MIB)
            self.levels.append(choice.level)
            ready, packed = admitted, None
            if choice.level is not None:
                worker = free.index(min(free))
                start = max(admitted, free[worker])
                seconds, packed = self._compress(chunk, choice, alone=max(free) <= start)
                ready = free[worker] = start + seconds
                heapq.heappush(news, (ready, 2 * number, self._packed(choice, packed, seconds)))
            payload = packed or MIB
            begin = max(now, admitted, ready)
            starved = max(0.0, ready - max(now, admitted))
            # The link empties what it has swallowed meanwhile; there has to be room for the frame.
            rate = self.rate(begin)
            emptied = max(emptied, begin - self.swallows / rate) + payload / rate
            now = max(begin + payload / (5 * GB), emptied)
            self.ends.append(now)
            heapq.heappush(news, (now, 2 * number + 1, self._sent(choice, payload, now - begin, starved)))
        return len(self.ends) * MIB / now

    def _compress(self, chunk: Data, choice: Choice, *, alone: bool) -> tuple[float, int | None]:
        assert choice.level is not None
        if not chunk:
            return PROBE, None
        speed, ratio = chunk[choice.level]
        return MIB / speed / (1.0 if alone else self.slowed), int(MIB / ratio)

    def _packed(self, choice: Choice, size: int | None, seconds: float) -> Callable[[], None]:
        return lambda: self.choices.packed(choice, size, seconds)

    def _sent(self, choice: Choice, payload: int, link: float, starved: float) -> Callable[[], None]:
        return lambda: self.choices.sent(choice, payload, link, starved)


def steady(rate: float) -> Callable[[float], float]:
    return lambda _: rate


def forever(*data: Data) -> Iterator[Data]:
    return cycle(data)


def fixed(level: int | None, rate: float, workers: int, *data: Data) -> float:
    return Line(Fixed(level), steady(rate), workers).run(islice(cycle(data), 1000))


def best(rate: float, workers: int, *data: Data) -> float:
    """What the best fixed level reaches, in bytes a second."""
    return max(fixed(level, rate, workers, *data) for level in LADDER)


def for_a_time(line: Line, seconds: float, *data: Data) -> Iterator[Data]:
    """Data until so much time has passed on the line."""
    return takewhile(lambda _: not line.ends or line.ends[-1] < seconds, cycle(data))


def reached(line: Line, since: float) -> float:
    """Bytes a second from then on."""
    first = next(number for number, end in enumerate(line.ends) if end >= since)
    return (len(line.ends) - 1 - first) * MIB / (line.ends[-1] - line.ends[first])


RATES = (0.01, 0.1, 0.2, 0.45, 0.8, 1.25, 2.0, 10.0)
"""GB/s."""
DATA = {
    "libraries": (LIBRARIES,),
    "sources": (SOURCES,),
    "words": (WORDS,),
    "lean": (LEAN,),
    "stiff": (STIFF,),
    "random": (RANDOM,),
    "mixed": MIXED,
}


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("rate", RATES)
def test_it_is_within_a_tenth_of_the_best_level_its_start_included(rate: float, name: str, workers: int) -> None:
    data = DATA[name]
    goal = best(rate * GB, workers, *data)
    choices = Adaptive(workers)
    line = Line(choices, steady(rate * GB), workers)
    # Four seconds, and where the link is slow so many chunks that the first ones do not matter.
    got = line.run(islice(cycle(data), max(2000, int(4 * goal / MIB))))
    assert got >= 0.9 * goal
    assert choices.statistics.changes <= len(line.ends) / 100


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("name", ["libraries", "mixed"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(10, 0.05), (0.05, 10), (3, 0.3), (0.3, 3), (1, 0.2), (0.2, 1), (1, 0.5), (0.5, 1)],
)
def test_it_finds_its_level_again_when_the_link_changes(before: float, after: float, name: str, workers: int) -> None:
    data = DATA[name]
    line = Line(Adaptive(workers), lambda now: (before if now < 3 else after) * GB, workers)
    line.run(for_a_time(line, 7, *data))
    assert reached(line, 5) >= 0.9 * best(after * GB, workers, *data)


@pytest.mark.parametrize(("rate", "levels"), [(0.01, {6, 9}), (0.3, {1}), (10, {None})])
def test_a_slow_link_is_worth_a_high_level_and_a_fast_one_none(rate: float, levels: set[int | None]) -> None:
    choices = Adaptive(2)
    line = Line(choices, steady(rate * GB))
    line.run(islice(cycle((LIBRARIES,)), 2000))
    assert choices.statistics.level in levels


@pytest.mark.parametrize(
    ("before", "after"), [(RANDOM, LIBRARIES), (LIBRARIES, RANDOM), (SOURCES, STIFF), (LEAN, STIFF), (STIFF, LEAN)]
)
@pytest.mark.parametrize("rate", [0.1, 0.6, 2.0])
def test_it_follows_the_data(before: Data, after: Data, rate: float) -> None:
    line = Line(Adaptive(2), steady(rate * GB))
    line.run(chain(for_a_time(line, 3, before), for_a_time(line, 9, after)))
    assert reached(line, 6) >= 0.85 * best(rate * GB, 2, after)


def test_where_workers_slow_each_other_down_raw_is_come_back_to_and_left_less_and_less() -> None:
    # A single trial looks more than twice as good as what both workers come to.
    choices = Adaptive(2)
    line = Line(choices, steady(1.2 * GB), slowed=0.4)
    line.run(for_a_time(line, 20, LIBRARIES))
    assert reached(line, 1) >= 0.95 * 1.2 * GB
    # One that rested for half a second each time would make ten times as many.
    assert choices.statistics.changes <= 20


def test_a_level_stays_for_more_than_a_moment() -> None:
    line = Line(Adaptive(2), steady(0.45 * GB))
    line.run(islice(cycle((LIBRARIES,)), 6000))
    spans = [len(list(group)) for _, group in groupby(line.levels)]
    assert len(spans) > 2
    assert min(spans[:-1]) >= 50


def test_among_raw_chunks_few_are_tried() -> None:
    line = Line(Adaptive(1), steady(10 * GB))
    line.run(islice(cycle((LIBRARIES,)), 20000))
    tail = line.levels[10000:]
    tried = sum(level is not None for level in tail)
    assert tried
    assert tried * MIB / LIBRARIES[-5].speed <= 0.015 * (line.ends[-1] - line.ends[9999])


def test_it_begins_with_a_level_that_suits_most_links() -> None:
    assert Adaptive(2).choose(MIB).level == 1


def test_only_what_adapts_probes() -> None:
    assert Adaptive(2).choose(MIB).probe
    assert not Fixed(1).choose(MIB).probe


@pytest.mark.parametrize("level", [None, 1, 19])
def test_a_fixed_level_stays_whatever_is_seen(level: int | None) -> None:
    choices = Fixed(level)
    for _ in range(100):
        choice = choices.choose(MIB)
        if level is not None:
            choices.packed(choice, None, 1.0)
        choices.sent(choice, MIB, 0.0, 10.0)
    assert choices.choose(MIB).level == level
    assert choices.statistics.changes == 0


def test_statistics_tell_what_went_out_and_how() -> None:
    choices = Fixed(3)
    shrank, did_not = choices.choose(1000), choices.choose(500)
    choices.packed(shrank, 100, 0.1)
    choices.packed(did_not, None, 0.1)
    choices.sent(shrank, 100, 0.1, 0.0)
    choices.sent(did_not, 500, 0.1, 0.0)
    statistics = choices.statistics
    assert statistics.uses == {3: Use(1, 1000, 100), None: Use(1, 500, 500)}
    assert statistics.ratio == pytest.approx(2.5)
    assert statistics.level == 3


def test_before_anything_was_sent_the_ratio_is_one() -> None:
    assert Adaptive(2).statistics.ratio == 1.0


@pytest.mark.parametrize("choices", [Adaptive(1), Fixed(None)])
def test_content_that_is_sent_in_no_time_or_as_nothing_is_no_error(choices: Choices) -> None:
    for _ in range(300):
        choice = choices.choose(4096)
        if choice.level is not None:
            choices.packed(choice, 1, 0.0)
        choices.sent(choice, 0, 0.0, 0.0)
        choices.sent(choices.choose(4096), 0, 0.0, 0.01)
        choices.sent(choices.choose(4096), 0, 0.01, 0.0)
