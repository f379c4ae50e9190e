"""At which level content is compressed, if at all: settled (:class:`Fixed`) or found (:class:`Adaptive`).

Nothing here does anything or has a clock. Whoever has a chunk asks :meth:`Choices.choose`; says :meth:`Choices.packed`
when a worker is done with it, if it was to be compressed; and :meth:`Choices.sent` when it is on its way, with how long
the link took and how long the sender had to wait for the worker before.

How :class:`Adaptive` decides. A line that compresses goes as fast as the slower of two: the workers (as many times the
speed of the level) and the link (its rate times what a byte of payload stands for). So compressing pays where the
workers take less time than the link would with what they save, and the best level is about where both are busy. That
is computed for every level, from what is known of the data, the machine and the link:

- Speed and ratio of the levels are at first what we measured on libraries. The chunks correct them. What a level shows
  when it comes after another is half the difference of the two and half a change of data or load, for all we know; what
  it shows later is a change, and concerns all levels.
- Some chunks do not shrink. How many is known from those that were tried, and they load the link alone.
- The rate of the link is seen only where the sender waits for nothing else, and when the sockets between are full: they
  swallow megabytes at the speed of memory. Where it waits for the workers, the link may be faster than what goes
  over it by any factor. What was seen before is then believed for a while; after that one level less is tried, and so
  on until the link is what is slow.
- A change that leads back to where it began rests the matter, each time for twice as long, unless the link becomes
  another.
- Where all goes raw, a chunk now and then is compressed all the same, to know what that would be like.

A level is judged by the chunks that were chosen since it was, by several of them and some milliseconds at a time, and
changed only for a gain that is worth it. So it can't change with each chunk.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

LADDER: tuple[int | None, ...] = (None, -5, -1, 1, 3, 6, 9)
"""What :class:`Adaptive` chooses from, the quickest first. None is raw. What lies between gains little more (the ratio
of 2 is within 6 % of both neighbours'), what lies beyond 9 takes longer without getting smaller.
"""
START = 1
"""The level to begin with: a raw chunk costs much where the link is slow, this costs little where it is fast."""
GAIN = 0.05
"""The least gain in time that a change is worth."""
FEWEST_CHUNKS = 8
"""Chunks that have to be sent before a level is judged."""
SHORTEST = 0.02
"""Seconds that sending them has to take: noise is of milliseconds."""
STARVED = 0.1
"""The share of its time that a sender may wait for workers while the link still counts as what it waits for."""
SWALLOWED = 8 << 20
"""Bytes of payload that go out after a change before the level is judged: about what sockets hold."""
BELIEVED = 0.5
"""Seconds for which the rate of a link is believed that is not seen any more; a first failure rests twice as long."""
LONGEST = 16.0
"""Seconds that a failure rests at most."""
OTHER = 1.5
"""The factor between two rates of a link that have nothing to do with each other."""
TRIALS = 0.01
"""The share of the time that compressing a chunk now and then may take, where everything goes raw."""
_KEPT = 7 / 8
"""Of how many chunks shrank, at each new one."""

# GB/s of one core, and bytes of content for one of payload: 1 MiB frames of the libraries of a Debian, zstd 1.5.7.
_LIBRARIES = {-5: (0.80, 1.83), -1: (0.65, 2.22), 1: (0.56, 2.53), 3: (0.36, 2.79), 6: (0.13, 2.94), 9: (0.09, 2.97)}
_QUICKEST = min(_LIBRARIES)


@dataclass(slots=True, eq=False)
class Choice:
    """What is to be done with one chunk."""

    size: int
    """Bytes of content."""
    level: int | None
    """zstd's level; None for raw."""
    probe: bool
    """Whether to compress only what a probe says will shrink."""
    turn: int = 0
    """Changes of level before this choice."""
    packed_size: int | None = None
    """Bytes of the zstd frame, where there is one; :meth:`Choices.packed` sets it."""


class Use(NamedTuple):
    """What went out in one way."""

    chunks: int
    content: int
    """Bytes."""
    payload: int
    """Bytes on the wire, without frames' headers."""


class Statistics(NamedTuple):
    """What was chosen so far."""

    level: int | None
    """The level of now; None for raw."""
    uses: dict[int | None, Use]
    """By level, of chunks that were sent. Those that did not shrink count as raw, whatever was tried."""
    changes: int
    """Of level."""

    @property
    def ratio(self) -> float:
        """Bytes of content for one of payload, over all; 1.0 before the first."""
        payload = sum(use.payload for use in self.uses.values())
        return sum(use.content for use in self.uses.values()) / payload if payload else 1.0


class Choices(ABC):
    """Who is asked about each chunk of a line."""

    def __init__(self) -> None:
        self._uses: dict[int | None, Use] = {}

    @abstractmethod
    def choose(self, size: int) -> Choice:
        """Say what to do with the next chunk, of ``size`` bytes (more than 0)."""

    @property
    @abstractmethod
    def statistics(self) -> Statistics: ...

    def unused(self, choice: Choice) -> None:  # noqa: B027 - most have nothing to take back
        """The chunk is zeros: nothing was done with it, and neither :meth:`packed` nor :meth:`sent` follows."""

    def packed(self, choice: Choice, packed_size: int | None, seconds: float) -> None:
        """A worker has done what the choice says, in ``seconds`` of its time; None if there is no smaller zstd frame.
        In any order; not for raw chunks.
        """
        choice.packed_size = packed_size

    def sent(self, choice: Choice, payload_size: int, link: float, starved: float) -> None:
        """The chunk is on its way, with ``payload_size`` bytes (pages of zeros may have been left out of a raw one).
        The sender had to wait ``starved`` seconds for the worker, and then ``link`` seconds for credit, for its turn
        in a limited bandwidth, and until the transport had taken the frame. Waiting for something to send is neither.
        In the order of the choices.
        """
        way = None if choice.packed_size is None else choice.level
        use = self._uses.get(way, Use(0, 0, 0))
        self._uses[way] = Use(use.chunks + 1, use.content + choice.size, use.payload + payload_size)


class Fixed(Choices):
    """One level for everything; None for raw."""

    def __init__(self, level: int | None) -> None:
        super().__init__()
        self._level = level

    def choose(self, size: int) -> Choice:
        return Choice(size, self._level, probe=False)

    @property
    def statistics(self) -> Statistics:
        return Statistics(self._level, dict(self._uses), 0)


@dataclass(slots=True)
class _Window:
    """What was seen of the chunks of one turn, since the level was last judged."""

    chunks: int = 0
    payload: int = 0
    link: float = 0.0
    starved: float = 0.0
    content: int = 0
    """Of those that shrank, and so is what follows."""
    packed: int = 0
    seconds: float = 0.0

    @property
    def is_enough(self) -> bool:
        return self.chunks >= FEWEST_CHUNKS and self.link + self.starved >= SHORTEST

    @property
    def is_starved(self) -> bool:
        return self.starved > STARVED * (self.link + self.starved)


class Adaptive(Choices):
    """Follows what the data, ``workers`` workers and the link allow."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self._workers = workers
        self._speeds = {level: speed * 1e9 for level, (speed, _) in _LIBRARIES.items()}
        """Bytes of content a second that one worker compresses, of what shrinks."""
        self._saved = {level: math.log(ratio) for level, (_, ratio) in _LIBRARIES.items()}
        """Logarithm of the ratio, of what shrinks."""
        self._shrinking = 1.0
        """The share of the chunks that shrinks."""
        self._rate: float | None = None
        """Bytes a second that the link takes; None until it was seen."""
        self._clock = 0.0
        """Seconds that the sender sent, or waited for workers."""

        self._level: int | None = START
        self._turn = 0
        self._window = _Window()
        self._to_swallow = SWALLOWED
        """Bytes of payload that are still to go out before the level is judged."""
        self._judged = 0
        """How often it was in this turn."""
        self._kept = False
        """Whether it was found good."""

        self._left: set[int | None] = set()
        """The level that was kept last, and those after it."""
        self._left_at = 0.0
        """On the clock: when it was left."""
        self._believed_until = 0.0
        """On the clock: what is known of the link."""
        self._patience = BELIEVED
        self._resting_until = 0.0
        """On the clock."""
        self._resting_rate = 0.0
        """Of the link, when that was settled."""
        self._trial_at = 0.0
        """On the clock: when the next chunk is compressed where all go raw."""

    def choose(self, size: int) -> Choice:
        level = self._level
        if level is None and self._clock >= self._trial_at:
            self._trial_at = self._clock + size / self._speeds[_QUICKEST] / TRIALS
            level = _QUICKEST
        return Choice(size, level, probe=True, turn=self._turn)

    def unused(self, choice: Choice) -> None:
        if choice.turn == self._turn and choice.level != self._level:
            self._trial_at = self._clock

    def packed(self, choice: Choice, packed_size: int | None, seconds: float) -> None:
        super().packed(choice, packed_size, seconds)
        level = choice.level
        assert level is not None, "raw chunks are not packed"
        self._shrinking = _KEPT * self._shrinking + (1 - _KEPT) * (packed_size is not None)
        is_trial = level != self._level and choice.turn == self._turn
        if packed_size is None or choice.turn != self._turn:
            return
        if is_trial:
            self._learn(level, choice.size, packed_size, seconds, dict.fromkeys(self._speeds, 1 - _KEPT))
            return
        self._window.content += choice.size
        self._window.packed += packed_size
        self._window.seconds += seconds

    def sent(self, choice: Choice, payload_size: int, link: float, starved: float) -> None:
        super().sent(choice, payload_size, link, starved)
        self._clock += link + starved
        if choice.turn != self._turn:
            return
        if self._to_swallow > 0:
            self._to_swallow -= payload_size
            return
        window = self._window
        window.chunks += 1
        window.payload += payload_size
        window.link += link
        window.starved += starved
        if window.is_enough:
            self._window = _Window()
            self._judge(window)

    @property
    def statistics(self) -> Statistics:
        return Statistics(self._level, dict(self._uses), self._turn)

    # ---- what is known

    def _learn(self, level: int, content: int, packed: int, seconds: float, shares: Mapping[int, float]) -> None:
        """Correct what is known of each level by its share of the difference (of logarithms) between what is known of
        ``level`` and what was seen of it.
        """
        faster = content / max(seconds, 1e-9) / self._speeds[level]
        more = math.log(content / packed) / self._saved[level]
        for each, share in shares.items():
            self._speeds[each] *= faster**share
            self._saved[each] *= more**share

    def _seconds(self, level: int | None, rate: float) -> float:
        """Time for a byte of content."""
        if level is None:
            return 1 / rate
        payload = 1 - self._shrinking + self._shrinking * math.exp(-self._saved[level])
        return max(payload / rate, self._shrinking / (self._workers * self._speeds[level]))

    # ---- what follows

    def _judge(self, window: _Window) -> None:
        self._judged += 1
        if window.content and self._level is not None:
            share = dict.fromkeys(self._speeds, 1.0)
            if self._turn and self._judged == 1:
                share = {level: 0.0 if level in self._left else 0.5 for level in share} | {self._level: 1.0}
            self._learn(self._level, window.content, window.packed, window.seconds, share)
        starved = window.is_starved and self._level is not None
        if not starved:
            self._rate = window.payload / max(window.link, 1e-9)
            self._believed_until = self._clock + BELIEVED
        elif self._judged == 1:
            return  # It may be that the sockets are still swallowing.
        elif self._rate is not None:
            self._rate = max(self._rate, window.payload / (window.link + window.starved))
        level = self._better(starved)
        if level == self._level:
            self._kept = True
        else:
            self._change(level)

    def _better(self, starved: bool) -> int | None:
        """The level to go on with."""
        if self._rate is None:
            # Nothing is known of the link but that it waits, so go far; not to raw, which takes too long if the link
            # is fast only because the data shrinks to little.
            return _QUICKEST if self._level != _QUICKEST else None
        another = max(self._rate, self._resting_rate) > OTHER * min(self._rate, self._resting_rate)
        if another:
            self._patience = BELIEVED
        elif self._clock < self._resting_until:
            return self._level
        if starved and self._clock >= self._believed_until:
            return LADDER[LADDER.index(self._level) - 1]
        rate = self._rate
        best = min(LADDER, key=lambda level: self._seconds(level, rate))
        worth = self._seconds(best, rate) < (1 - GAIN) * self._seconds(self._level, rate)
        return best if worth else self._level

    def _change(self, level: int | None) -> None:
        if self._kept:
            self._left.clear()
            self._left_at = self._clock
        self._left.add(self._level)
        if level in self._left:
            failed = self._clock - self._left_at < self._patience
            self._patience = min(2 * self._patience, LONGEST) if failed else BELIEVED
            self._resting_until = self._clock + self._patience
            self._resting_rate = self._rate or 0.0
            self._left.clear()
        self._level = level
        self._turn += 1
        self._judged = 0
        self._kept = False
        self._window = _Window()
        self._to_swallow = SWALLOWED
        self._trial_at = self._clock
