"""At which level content is compressed, if at all: settled (:class:`Fixed`) or found (:class:`Adaptive`).

Nothing here does anything or has a clock. Whoever has a chunk asks :meth:`Choices.choose`; says :meth:`Choices.packed`
when a worker is done with it, if it was to be compressed; and :meth:`Choices.sent` when it is on its way, with how long
the link took and how long the sender had to wait for the worker before.

How :class:`Adaptive` decides. There are two questions, and each is answered by what tells most about it.

Which level, where content is compressed? The line goes as fast as the slower of two: the workers (as many times the
speed of the level) and the link (its rate times what a byte of payload stands for). That is computed for every level:

- Speed and ratio of the levels are at first what we measured on libraries. The chunks correct them, all by the same
  factor. What does not shrink loads the link alone.
- What can't be computed shows at once: a level that was no better than the one before is given up for a while. (Workers
  that share processors with others are slower the more they have to do.)
- The rate of the link is seen where the sender waits for nothing else. Where it waits for the workers, the link may be
  faster than what goes over it by any factor.

Compressed or raw? That can't be computed: the target decompresses on processors of which nothing is known here, and
seen from the source a slow target looks as a slow link does. So what both showed themselves is compared, in seconds for
a byte of content:

- It begins raw, which costs nothing on a fast link. What sockets swallow at the speed of memory is paid for on a slow
  one: as much as so many megabytes take, once.
- While content is compressed, raw is believed to be as quick as it was last seen, and is gone back to when compressing
  is slower than that. It is tried again when it may be quicker by now: where the link can't be seen, and, as a target
  that is slow hides it as well, now and then where it can. A trial ends when it takes long.
- While all goes raw, a chunk now and then is compressed, to know what that would be like. What compressing came to last
  is believed for a while: by its worker alone a chunk looks faster than many can be.
- A change back rests the matter, each time for twice as long.

A level is judged by several chunks and some milliseconds at a time, of those that were chosen since it was, and left
only for a gain that is worth it. So it can't change with each chunk.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

LADDER: tuple[int | None, ...] = (None, -5, -1, 1, 3, 6, 9)
"""What :class:`Adaptive` chooses from, the quickest first. None is raw. What lies between gains little more (the ratio
of 2 is within 6 % of both neighbours'), what lies beyond 9 takes longer without getting smaller.
"""
SAMPLED = 1
"""The level of a sample among raw chunks: in the middle, so that it says something of all."""
SHARE = 0.01
"""The share of the time that finding out may take: samples among raw chunks, trials of raw on a link that is seen."""
GAIN = 0.05
"""The least gain in time that a change is worth."""
FEWEST_CHUNKS = 8
"""Chunks that have to be sent before a level is judged."""
SHORTEST = 0.02
"""Seconds that sending them has to take: noise is of milliseconds."""
LONG = 0.1
"""Seconds of raw chunks after which they are judged anyway, for more would be waste."""
STARVED = 0.1
"""The share of its time that a sender may wait for workers while the link still counts as what it waits for."""
SWALLOWED = 8 << 20
"""Bytes of payload that go out after a change before the level is judged: about what sockets hold."""
BELIEVED = 0.5
"""Seconds for which compressing and raw rest at first when one has been changed for the other."""
OTHER = 1.5
"""The factor between two times for the same that have nothing to do with each other."""
LONGEST = 16.0
"""Seconds to which failures alone make that grow."""
_KEPT = 31 / 32
"""Of what is known, at each new sample."""

# GB/s of one core, and bytes of content for one of payload: 1 MiB frames of the libraries of a Debian, zstd 1.5.7.
_LIBRARIES = {-5: (0.80, 1.83), -1: (0.65, 2.22), 1: (0.56, 2.53), 3: (0.36, 2.79), 6: (0.13, 2.94), 9: (0.09, 2.97)}


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
    seconds: float = 0.0
    """Of the worker's time; set with it."""


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
    def is_raw(self) -> bool:
        """Whether chunks go raw now, but for one now and then."""

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
        choice.seconds = seconds

    def sent(self, choice: Choice, payload_size: int, link: float, starved: float) -> None:
        """The chunk is on its way, with ``payload_size`` bytes (pages of zeros may have been left out of a raw one).
        The sender had to wait ``starved`` seconds for the worker, and then ``link`` seconds for credit, for its turn
        in a limited bandwidth, and until the transport had taken the frame. Waiting for something to send is neither.
        In the order of the choices, for each stream.
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
    def is_raw(self) -> bool:
        return self._level is None

    @property
    def statistics(self) -> Statistics:
        return Statistics(self._level, dict(self._uses), 0)


@dataclass(slots=True)
class _Window:
    """What was seen of the chunks of one turn, since the level was last judged."""

    chunks: int = 0
    content: int = 0
    payload: int = 0
    seconds: float = 0.0
    """That sending took, and waiting for workers, which the next one is alone."""
    starved: float = 0.0
    shrunk: int = 0
    """Bytes of content of those that shrank, and so is what follows."""
    packed: int = 0
    worked: float = 0.0

    @property
    def is_starved(self) -> bool:
        return self.starved > STARVED * self.seconds


class Adaptive(Choices):
    """Follows what the data, ``workers`` workers, the link and the target allow."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self._workers = workers
        self._speeds = {level: speed * 1e9 for level, (speed, _) in _LIBRARIES.items()}
        """Bytes of content a second that one worker compresses, of what shrinks."""
        self._saved = {level: math.log(ratio) for level, (_, ratio) in _LIBRARIES.items()}
        """Logarithm of the ratio, of what shrinks."""
        self._shrinking = 1.0
        """The share of the chunks that shrinks."""
        self._tried = 0
        """Chunks that were compressed, or did not shrink."""
        self._link = 0.0
        """Seconds that the link takes for a byte of payload, at most; 0 until it was seen."""
        self._raw = 0.0
        """Seconds that a byte of content took, or would have taken at most, where all went raw."""
        self._packed = 0.0
        """Seconds that a byte of content took when compressing was left; 0 where the workers were what was slow."""
        self._clock = 0.0
        """Seconds that the sender sent, or waited for workers."""

        self._level: int | None = None
        self._turn = 0
        self._window = _Window()
        self._to_swallow = SWALLOWED
        """Bytes of payload that are still to go out before the level is judged."""
        self._took: float | None = None
        """Seconds for a byte of content in this turn, of late."""
        self._left: tuple[int, float] | None = None
        """The level that another one was just chosen instead of, and what it took."""
        self._settled_until = 0.0
        """On the clock: for how long no other level is tried, as the last one was none the better."""
        self._settled_took = 0.0
        self._crossed_at = 0.0
        """On the clock: when compressing was last changed for raw, or raw for compressing."""
        self._patience = BELIEVED
        """Seconds for which the matter rests then."""
        self._sample_at = 0.0
        """On the clock: when the next chunk is compressed where all go raw. Never while one is."""

    def choose(self, size: int) -> Choice:
        level = self._level
        if level is None and self._clock >= self._sample_at:
            self._sample_at = math.inf
            level = SAMPLED
        return Choice(size, level, probe=True, turn=self._turn)

    def unused(self, choice: Choice) -> None:
        if self._is_sample(choice):
            self._sample_at = self._clock

    def packed(self, choice: Choice, packed_size: int | None, seconds: float) -> None:
        super().packed(choice, packed_size, seconds)
        assert choice.level is not None, "raw chunks are not packed"
        self._tried += 1
        share = max(1 / self._tried, 1 - _KEPT)
        self._shrinking += share * ((packed_size is not None) - self._shrinking)
        if packed_size is None or choice.turn != self._turn:
            return
        if self._is_sample(choice):
            self._learn_ratio(choice.level, choice.size, packed_size, share)
            if self._turn == 0 or not self._rests:
                self._learn_speed(choice.level, choice.size, seconds, share)
        else:
            self._window.shrunk += choice.size
            self._window.packed += packed_size
            self._window.worked += seconds

    def sent(self, choice: Choice, payload_size: int, link: float, starved: float) -> None:
        super().sent(choice, payload_size, link, starved)
        self._clock += link + starved
        if choice.turn != self._turn:
            return
        if self._is_sample(choice):
            self._sample_at = self._clock + (choice.seconds + starved) / SHARE
        window = self._window
        window.chunks += 1
        window.content += choice.size
        window.payload += payload_size
        window.seconds += link + starved
        window.starved += starved
        swallows = self._to_swallow > 0
        self._to_swallow -= payload_size
        enough = not swallows and window.chunks >= FEWEST_CHUNKS and window.seconds >= SHORTEST
        is_long = self._level is None and window.seconds >= LONG
        if is_long and swallows:
            # What went before it may have been swallowed.
            window = _Window(1, choice.size, payload_size, link + starved, starved)
        if enough or is_long:
            self._window = _Window()
            self._judge(window)
        elif swallows and self._to_swallow <= 0:
            self._window = _Window()

    @property
    def is_raw(self) -> bool:
        return self._level is None

    @property
    def statistics(self) -> Statistics:
        return Statistics(self._level, dict(self._uses), self._turn)

    # ---- what is known

    def _is_sample(self, choice: Choice) -> bool:
        return choice.turn == self._turn and choice.level != self._level

    def _learn_ratio(self, level: int, content: int, packed: int, share: float) -> None:
        """Correct what is known of the levels by a share of the difference (of logarithms) to what was seen of one."""
        more = math.log(content / packed) / self._saved[level]
        for each in self._saved:
            self._saved[each] *= more**share

    def _learn_speed(self, level: int, content: int, seconds: float, share: float) -> None:
        """As :meth:`_learn_ratio`."""
        faster = content / max(seconds, 1e-9) / self._speeds[level]
        for each in self._speeds:
            self._speeds[each] *= faster**share

    def _seconds(self, level: int) -> float:
        """Time for a byte of content, as far as workers and link go."""
        payload = 1 - self._shrinking + self._shrinking * math.exp(-self._saved[level])
        return max(payload * self._link, self._shrinking / (self._workers * self._speeds[level]))

    @property
    def _rests(self) -> bool:
        return self._clock < self._crossed_at + self._patience

    # ---- what follows

    def _judge(self, window: _Window) -> None:
        took = window.seconds / window.content
        is_first = self._took is None
        self._took = took if self._took is None else (self._took + took) / 2
        link = window.seconds / max(window.payload, 1)
        if self._level is None:
            self._link, self._raw = link, self._took
            level = self._instead_of_raw(self._took)
        else:
            if window.shrunk:
                self._learn_ratio(self._level, window.shrunk, window.packed, 1.0)
                self._learn_speed(self._level, window.shrunk, window.worked, 1.0)
            self._link = min(self._link, link) if window.is_starved else link
            self._raw = min(self._raw, self._link)
            self._packed = 0.0 if window.is_starved else self._took
            level = self._instead_of(self._level, self._took, starved=window.is_starved, first=is_first)
        if level != self._level:
            self._change(level)

    def _instead_of_raw(self, took: float) -> int | None:
        best = min(self._speeds, key=self._seconds)
        seconds = max(self._seconds(best), self._packed if self._rests else 0.0)
        return best if seconds < (1 - GAIN) * took else None

    def _instead_of(self, level: int, took: float, *, starved: bool, first: bool) -> int | None:
        best = min(self._speeds, key=self._seconds)
        # Where it is the workers that are slow, a lower level may be all it needs.
        if self._raw < (1 - GAIN) * (self._seconds(best) if starved else took):
            return None
        if first and self._left is not None and took > self._left[1]:
            return self._left[0]
        settled = self._clock < self._settled_until and took < OTHER * self._settled_took
        if not settled and self._seconds(best) < (1 - GAIN) * self._seconds(level):
            return best
        # About twice what is to be swallowed goes raw in a trial.
        due = starved or self._clock >= self._crossed_at + 2 * SWALLOWED * self._link / SHARE
        return None if due and not self._rests else level

    def _change(self, level: int | None) -> None:
        if level is None or self._level is None:
            stayed = self._clock - self._crossed_at
            if self._turn and self._rests:
                self._patience = min(2 * self._patience, LONGEST)
                if self._level is None:
                    self._patience = max(self._patience, stayed / SHARE / 2)
            elif stayed > LONGEST:
                self._patience = BELIEVED
            self._crossed_at = self._clock
            self._left = None
        elif self._left is not None and level == self._left[0]:
            self._patience = min(2 * self._patience, LONGEST)
            self._settled_until = self._clock + self._patience
            self._settled_took = self._left[1]
            self._left = None
        else:
            assert self._took is not None
            self._left = self._level, self._took
        self._level = level
        self._turn += 1
        self._window = _Window()
        self._to_swallow = SWALLOWED
        self._took = None
        self._sample_at = self._clock
