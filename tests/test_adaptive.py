"""The choice of levels, against a simulation of workers, a line, a link and a target in which nothing is left to
chance.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, cycle, groupby, islice, takewhile
from random import Random
from typing import Any, NamedTuple

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

MIXED: tuple[Data, ...] = tuple(Random("mixed").choices((LIBRARIES, RANDOM, SOURCES), k=997))


@dataclass
class Line:
    """Chunks of a MiB that go in order through ``workers`` workers, a link and a target; ``depth`` of them at a time
    before the link, and what fits ``room`` behind it.
    """

    choices: Choices
    rate: Callable[[float], float]
    """Bytes a second of the link, at a time."""
    workers: int = 2
    depth: int = 28
    swallows: float = 6 * MIB
    """Bytes between the two ends, which are taken at the speed of memory."""
    slowed: float = 1.0
    """What is left of a worker's speed where another one works too."""
    unpacks: float = 0.0
    """Bytes of content a second that each of the target's two decompressors makes; 0 if it has no limit. A raw chunk
    has nothing to do with them.
    """
    cores: int = 0
    """Which workers and decompressors share with each other and with what moves the bytes; 0 if they need not."""
    room: int = 64 * MIB
    """Bytes of payload, and of content that is to be decompressed, that the target holds at most."""
    ends: list[float] = field(default_factory=list)
    """When each chunk was sent."""
    levels: list[int | None] = field(default_factory=list)

    def run(self, data: Iterable[Data]) -> float:
        """Send chunks of ``data`` one after the other; return bytes a second."""
        news: list[tuple[float, int, Callable[[], None]]] = []
        self._free = [0.0] * self.workers
        self._unpacking = [0.0, 0.0]
        now = loaded = 0.0
        link = _Link(self.swallows)
        held: deque[tuple[float, int]] = deque()
        holds = 0
        for number, chunk in enumerate(data):
            depth = 2 if self.choices.is_raw else self.depth
            admitted = self.ends[number - depth] if number >= depth else 0.0
            while news and news[0][0] <= admitted:
                heapq.heappop(news)[2]()
            choice = self.choices.choose(MIB)
            self.levels.append(choice.level)
            ready, packed = admitted, None
            if choice.level is not None:
                worker = self._free.index(min(self._free))
                start = max(admitted, self._free[worker])
                seconds, packed = self._compress(chunk, choice, start)
                ready = self._free[worker] = start + seconds
                heapq.heappush(news, (ready, 2 * number, self._packed(choice, packed, seconds)))
            payload = packed or MIB
            begin = max(now, admitted, ready)
            starved = max(0.0, ready - max(now, admitted))
            # The target takes the frame from the link when it has room for it.
            room_at = 0.0
            needs = payload + (MIB if packed else 0)
            while held and holds + needs > self.room:
                room_at, size = held.popleft()
                holds -= size
            now, arrived = link.send(begin, payload, self.rate(begin), room_at)
            if packed and self.unpacks:
                one = self._unpacking.index(min(self._unpacking))
                start = max(arrived, self._unpacking[one])
                self._unpacking[one] = start + MIB / self.unpacks / self._share(start)
                arrived = self._unpacking[one]
            loaded = max(loaded, arrived)
            held.append((loaded, needs))
            holds += needs
            self.ends.append(now)
            heapq.heappush(news, (now, 2 * number + 1, self._sent(choice, payload, now - begin, starved)))
        self.loaded = loaded
        return len(self.ends) * MIB / loaded

    def _share(self, at: float) -> float:
        """Of a core, for one who begins to work."""
        busy = 2 + sum(free > at for free in (*self._free, *self._unpacking))
        return min(1.0, self.cores / busy) if self.cores else 1.0

    def _compress(self, chunk: Data, choice: Choice, start: float) -> tuple[float, int | None]:
        assert choice.level is not None
        if not chunk:
            return PROBE, None
        speed, ratio = chunk[choice.level]
        speed *= 1.0 if max(self._free) <= start else self.slowed
        return MIB / speed / self._share(start), int(MIB / ratio)

    def _packed(self, choice: Choice, size: int | None, seconds: float) -> Callable[[], None]:
        return lambda: self.choices.packed(choice, size, seconds)

    def _sent(self, choice: Choice, payload: int, link: float, starved: float) -> Callable[[], None]:
        return lambda: self.choices.sent(choice, payload, link, starved)


class _Link:
    """Empties what it has swallowed at its rate, as far as the target takes it."""

    def __init__(self, swallows: float) -> None:
        self._swallows = swallows
        self._sent = self._taken = 0
        self._taken_at = 0.0
        self._under_way: deque[tuple[int, float, float]] = deque()
        """Of each frame: the bytes up to its end, when its first byte is taken, and its last."""

    def send(self, begin: float, size: int, rate: float, room_at: float) -> tuple[float, float]:
        """Returns when a frame that is sent at ``begin`` is off the sender's hands, and when the target has it."""
        first = max(begin, self._taken_at, room_at)
        self._taken_at = first + size / rate
        self._sent += size
        self._under_way.append((self._sent, first, self._taken_at))
        gone = begin + size / (5 * GB)
        # Taken has to be what does not fit between the ends.
        need = self._sent - self._swallows
        while self._under_way and self._under_way[0][0] <= need:
            end, _, last = self._under_way.popleft()
            self._taken = end
            gone = max(gone, last)
        if need > self._taken:
            end, first, last = self._under_way[0]
            gone = max(gone, first + (last - first) * (need - self._taken) / (end - self._taken))
        return gone, self._taken_at


def steady(rate: float) -> Callable[[float], float]:
    return lambda _: rate


def forever(*data: Data) -> Iterator[Data]:
    return cycle(data)


def fixed(level: int | None, rate: float, workers: int, *data: Data, **line: Any) -> float:
    return Line(Fixed(level), steady(rate), workers, **line).run(islice(cycle(data), 1000))


def best(rate: float, workers: int, *data: Data, **line: Any) -> float:
    """What the best fixed level reaches, in bytes a second."""
    return max(fixed(level, rate, workers, *data, **line) for level in LADDER)


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
    # Four seconds; where the link is slow so many that what it swallows at the start, raw, does not matter.
    got = line.run(islice(cycle(data), max(2000, int((4 + 0.16 / rate) * goal / MIB))))
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


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.05])
def test_a_high_level_that_is_too_slow_here_is_left_for_a_lower_one_not_for_raw(rate: float) -> None:
    # A single sample looks six times as good as what both workers come to, as on a machine that has much else to do.
    line = Line(Adaptive(2), steady(rate * GB), slowed=0.15)
    line.run(for_a_time(line, 30, LIBRARIES))
    assert reached(line, 3) >= 0.9 * best(rate * GB, 2, LIBRARIES, slowed=0.15)
    assert sum(level is None for level in line.levels) <= 40


TARGETS: dict[str, dict[str, Any]] = {
    "two cores for both ends": {"unpacks": 1.5 * GB, "cores": 2},
    "half as fast as the source": {"unpacks": 0.5 * GB},
    "a fifth": {"unpacks": 0.2 * GB},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["libraries", "words", "mixed"])
@pytest.mark.parametrize("rate", [0.1, 0.4, 0.8, 1.5, 3.0, 5.0])
def test_a_target_that_decompresses_slowly_is_no_slow_link(rate: float, name: str, target: str) -> None:
    data, slow = DATA[name], TARGETS[target]
    line = Line(Adaptive(2), steady(rate * GB), **slow)
    line.run(for_a_time(line, 5, *data))
    assert reached(line, 1.5) >= 0.9 * best(rate * GB, 2, *data, **slow)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["libraries", "words", "mixed"])
def test_on_a_fast_link_the_start_costs_little(name: str, target: str) -> None:
    line = Line(Adaptive(2), steady(4.5 * GB), **TARGETS[target])
    assert line.run(islice(cycle(DATA[name]), 2048)) >= 0.95 * 4.5 * GB


@pytest.mark.parametrize(
    ("rate", "swallows", "most"), [(0.001, 0, 3), (0.01, 0, 4), (0.001, 6, 9), (0.01, 6, 10), (0.1, 6, 18)]
)
def test_on_a_slow_link_little_more_goes_raw_at_the_start_than_is_swallowed(
    rate: float, swallows: int, most: int
) -> None:
    line = Line(Adaptive(2), steady(rate * GB), swallows=swallows * MIB)
    line.run(islice(cycle((LIBRARIES,)), 200))
    assert sum(level is None for level in line.levels) <= most


def test_a_trial_on_a_link_that_has_become_slow_is_broken_off() -> None:
    line = Line(Adaptive(2), lambda now: (4 if now < 2 else 0.002) * GB, unpacks=0.5 * GB)
    line.run(for_a_time(line, 60, LIBRARIES))
    after = [level for level, end in zip(line.levels, line.ends, strict=True) if end > 2]
    # What was swallowed before is not among them.
    assert sum(level is None for level in after) <= 12
    assert reached(line, 10) >= 0.95 * best(0.002 * GB, 2, LIBRARIES)


def test_a_link_that_becomes_fast_behind_a_slow_target_is_found_in_the_end() -> None:
    line = Line(Adaptive(2), lambda now: (0.2 if now < 3 else 4.0) * GB, unpacks=0.2 * GB)
    line.run(for_a_time(line, 15, LIBRARIES))
    assert reached(line, 12) >= 0.9 * 4.0 * GB


def test_compressing_stays_for_more_than_a_moment_and_trials_of_raw_are_few() -> None:
    line = Line(Adaptive(2), steady(0.45 * GB))
    line.run(islice(cycle((LIBRARIES,)), 6000))
    spans = [(level, len(list(group))) for level, group in groupby(line.levels)]
    compressed = [count for level, count in spans if level is not None and count > 1]
    assert compressed
    assert min(compressed) >= 50
    assert sum(count for level, count in spans if level is None) <= 0.03 * 6000


def test_among_raw_chunks_few_are_tried() -> None:
    line = Line(Adaptive(1), steady(10 * GB))
    line.run(islice(cycle((LIBRARIES,)), 20000))
    tail = line.levels[10000:]
    tried = sum(level is not None for level in tail)
    assert tried
    # Their worker's time, and as much of the sender's, who waits for it.
    assert 2 * tried * MIB / LIBRARIES[1].speed <= 0.011 * (line.ends[-1] - line.ends[9999])


def test_it_begins_raw_with_one_chunk_that_says_what_the_others_would_come_to() -> None:
    choices = Adaptive(2)
    assert choices.is_raw
    assert [choices.choose(MIB).level for _ in range(3)] == [1, None, None]


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
