"""Random legal conversations between a source and a target, with frames under way in both directions; at any point
either end is given something illegal, refuses it, and the conversation goes on.
"""

from __future__ import annotations

from collections import deque
from copy import deepcopy

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.protocol_streams import PAGE, SESSION, Frame, device, hello, raw, send, take, zeros
from vfiostream.errors import LocalProtocolError, StreamError
from vfiostream.protocol import limits
from vfiostream.protocol.framing import PREFIX_SIZE, pack_frame, session_seed
from vfiostream.protocol.records import (
    Ack,
    Bitmap,
    Capture,
    Commit,
    Config,
    Credit,
    End,
    Memory,
    Pages,
    Pci,
    PciEntry,
    RangeEntry,
    Record,
    Round,
    RoundEnd,
    State,
    Welcome,
    encode,
)
from vfiostream.protocol.sessions import Phase, SourceSession, TargetSession

CHUNK = limits.MIN_CHUNK
CREDIT = CHUNK + limits.CREDIT_SLACK
DATA_PHASES = (Phase.ROUND, Phase.LAST_ROUND)
WITHOUT_CREDIT = (Phase.LOADED, Phase.COMMITTED, Phase.DONE)
SIZES = st.sampled_from([0, 1, 200, CHUNK, 3 * CHUNK])
PIECES = st.sampled_from([1, 100, CHUNK - 1, CHUNK])


class Device:
    """What the source still owes of a device."""

    def __init__(self, stream: int, *, memory: bool, pci: bool, config: int) -> None:
        self.stream = stream
        self.memory = memory
        self.captures = self.pos = self.left = self.config_pos = 0
        self.pci = pci
        self.config = config


class Range:
    """What the source still owes of a range of guest memory."""

    def __init__(self, stream: int, pages: int) -> None:
        self.stream = stream
        self.pages = pages
        self.next = self.pos = self.left = 0


class Conversation(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.devices = [
            Device(1, memory=True, pci=True, config=5),
            Device(2, memory=True, pci=True, config=0),
            Device(3, memory=False, pci=False, config=CHUNK + 1),
        ]
        self.ranges = [Range(4, 20), Range(5, 3)]
        pci = PciEntry(1, 2, 3, 4, 5, 6)
        entries = [
            device(owed.stream, device_memory=owed.memory, config_size=owed.config, pci=pci if owed.pci else None)
            for owed in self.devices
        ]
        self.hello = hello(*entries, ranges=(RangeEntry(4, 1 << 20, 20 * PAGE), RangeEntry(5, 0, 3 * PAGE)))
        self.source = SourceSession(self.hello, answers=True)
        self.target = TargetSession(chunk=limits.MAX_CONTENT, answers=True)
        self.forth: deque[tuple[bytes, Record]] = deque()
        self.back: deque[tuple[bytes, Record]] = deque()
        self.taken = self.answered = 0
        """Frames that have come to the target, and to the source."""
        self.rounds = self.content = self.spent = 0
        self.given = self.limit = CREDIT
        """Credit that the target has given, and that the source knows of."""
        self.forth.append((send(self.source, raw(self.hello)), self.hello))
        self.deliver_everything()
        self.answer(Welcome(SESSION, "target", ("zstd",), CHUNK, CREDIT))
        self.deliver_everything()

    def say(self, frame: Frame) -> bool:
        """Send a frame that the conversation allows, if the credit covers it: session and model agree on that."""
        size = PREFIX_SIZE + len(encode(frame.record)) + len(frame.payload)
        free = isinstance(frame.record, Commit)
        affordable = self.spent + size <= self.limit
        assert self.source.affords(size) is affordable
        if not (affordable or free):
            with pytest.raises(LocalProtocolError, match="exceeds the credit"):
                send(self.source, frame)
            return False
        self.forth.append((send(self.source, frame), frame.record))
        self.spent += 0 if free else size
        if isinstance(frame.record, Memory | Pages | Pci | Config):
            self.content += len(frame.content)
        return True

    def answer(self, record: Record) -> None:
        self.back.append((b"".join(self.target.send(record)), record))

    @staticmethod
    def data(record: Record, size: int, zero: bool) -> Frame:
        return zeros(record, size) if zero else raw(record, b"d" * size)

    @initialize(
        rounds=st.integers(0, 2), captured=SIZES, then=st.sampled_from(["go on", "stop", "send the last round"])
    )
    def get_somewhere(self, rounds: int, captured: int, then: str) -> None:
        """Start after some whole rounds: few conversations would get that far by chance."""
        for number in range(rounds + (then == "send the last round")):
            if number == rounds:
                self.stop()
            self.begin_round()
            self.capture(0, captured)
            self.finish_what_is_open()
            self.end_round()
            self.deliver_everything()
            if self.target.phase is Phase.ROUND_SENT:
                self.acknowledge(0)
                self.deliver_everything()
        if then == "stop":
            self.stop()

    # What the source does.

    @precondition(lambda self: self.source.phase in (Phase.OPEN, Phase.STOPPED))
    @rule()
    def begin_round(self) -> None:
        if self.say(raw(Round(self.rounds + 1))):
            self.rounds += 1
            for area in self.ranges:
                area.next = 0

    @precondition(lambda self: self.source.phase is Phase.OPEN)
    @rule()
    def stop(self) -> None:
        self.say(raw(State()))

    @precondition(lambda self: self.source.phase in DATA_PHASES)
    @rule(number=st.integers(0, 1), size=SIZES)
    def capture(self, number: int, size: int) -> None:
        owed = self.devices[number]
        if not owed.left and self.say(raw(Capture(owed.stream, owed.captures + 1, size))):
            owed.captures += 1
            owed.pos, owed.left = 0, size

    @precondition(lambda self: self.source.phase in DATA_PHASES)
    @rule(number=st.integers(0, 1), size=PIECES, zero=st.booleans())
    def memory(self, number: int, size: int, zero: bool) -> None:
        owed = self.devices[number]
        size = min(size, owed.left)
        if size and self.say(self.data(Memory(owed.stream, owed.pos), size, zero)):
            owed.pos += size
            owed.left -= size

    @precondition(lambda self: self.source.phase in DATA_PHASES)
    @rule(number=st.integers(0, 1), pages=st.integers(1, 20), skipped=st.integers(0, 3), every=st.integers(1, 3))
    def bitmap(self, number: int, pages: int, skipped: int, every: int) -> None:
        area = self.ranges[number]
        if self.rounds == 1:
            skipped, every = 0, 1
        start = area.next + skipped
        pages = min(pages, area.pages - start)
        bits = sum(1 << page for page in range(0, pages, every))
        if any(other.left for other in self.ranges) or not bits:
            return
        if self.say(raw(Bitmap(area.stream, start, pages), bits.to_bytes((pages + 7) // 8, "little"))):
            area.next = start + pages
            area.pos, area.left = 0, bits.bit_count() * PAGE

    @precondition(lambda self: self.source.phase in DATA_PHASES)
    @rule(number=st.integers(0, 1), count=st.integers(1, 16), zero=st.booleans())
    def pages(self, number: int, count: int, zero: bool) -> None:
        area = self.ranges[number]
        size = min(count * PAGE, area.left)
        if size and self.say(self.data(Pages(area.stream, area.pos), size, zero)):
            area.pos += size
            area.left -= size

    @precondition(lambda self: self.source.phase in DATA_PHASES)
    @rule()
    def finish_what_is_open(self) -> None:
        """As far as the credit goes; else few conversations would get to their end."""
        for number in (0, 1):
            for _ in range(3):
                self.memory(number, CHUNK, zero=True)
            if not self.devices[number].captures:
                self.capture(number, 0)
        for start in (True, False):
            for number in (0, 1):
                self.pages(number, 16, zero=True)
                self.pages(number, 16, zero=True)
            for number in (0, 1) if start and self.rounds == 1 else ():
                self.bitmap(number, 20, skipped=0, every=1)
                self.pages(number, 16, zero=True)
                self.pages(number, 16, zero=True)

    @property
    def complete(self) -> bool:
        left = [owed.left for owed in self.devices] + [area.left for area in self.ranges]
        captured = all(owed.captures for owed in self.devices if owed.memory)
        announced = all(area.next == area.pages for area in self.ranges)
        return not any(left) and (self.rounds != 1 or (captured and announced))

    @property
    def configured(self) -> bool:
        return all(not owed.pci and owed.config_pos == owed.config for owed in self.devices)

    @precondition(lambda self: self.source.phase in DATA_PHASES and self.complete)
    @rule()
    def end_round(self) -> None:
        self.say(raw(RoundEnd(self.rounds)))

    @precondition(lambda self: self.source.phase is Phase.CONFIG)
    @rule(number=st.integers(0, 2), size=PIECES, zero=st.booleans())
    def config(self, number: int, size: int, zero: bool) -> None:
        owed = self.devices[number]
        if owed.pci:
            owed.pci = not self.say(self.data(Pci(owed.stream), 64, zero))
            return
        size = min(size, owed.config - owed.config_pos)
        if size and self.say(self.data(Config(owed.stream, owed.config_pos, owed.config), size, zero)):
            owed.config_pos += size

    @precondition(lambda self: self.source.phase is Phase.CONFIG)
    @rule()
    def finish(self) -> None:
        """As far as the credit goes: all config, then END."""
        for number in (0, 0, 1, 2, 2):
            self.config(number, CHUNK, zero=True)
        if self.configured:
            self.say(raw(End(self.rounds, self.content)))

    @precondition(lambda self: self.source.phase is Phase.LOADED)
    @rule()
    def commit(self) -> None:
        assert self.say(raw(Commit()))

    # What the target does.

    @precondition(lambda self: self.target.phase in (Phase.ROUND_SENT, Phase.ENDED, Phase.COMMITTED))
    @rule(more=st.integers(0, 1 << 16))
    def acknowledge(self, more: int) -> None:
        of = {Phase.ROUND_SENT: "round", Phase.ENDED: "loaded", Phase.COMMITTED: "running"}[self.target.phase]
        self.given = max(self.given, self.target.spent + CREDIT) + more
        self.answer(Ack(of, self.target.rounds, self.given))

    @precondition(lambda self: self.target.phase not in WITHOUT_CREDIT)
    @rule(more=st.integers(0, 1 << 16))
    def credit(self, more: int) -> None:
        self.given = max(self.given, self.target.spent + CREDIT) + more
        self.answer(Credit(self.given))

    # What is under way arrives.

    @precondition(lambda self: self.forth)
    @rule()
    def deliver_forth(self) -> None:
        frame, record = self.forth.popleft()
        assert take(self.target, frame) == record
        self.taken += 1

    @precondition(lambda self: self.back)
    @rule()
    def deliver_back(self) -> None:
        frame, record = self.back.popleft()
        assert take(self.source, frame) == record
        self.answered += 1
        if isinstance(record, Credit | Ack):
            self.limit = record.limit

    @rule()
    def deliver_everything(self) -> None:
        while self.forth:
            self.deliver_forth()
        while self.back:
            self.deliver_back()

    # What must not be.

    def illegal_frames(self) -> list[Frame]:
        """Frames that the source must not send now."""
        phase = self.source.phase
        rounds = max(self.rounds, 1)
        frames = [
            raw(self.hello),
            raw(Round(self.rounds + 2)),
            raw(Round(rounds)) if self.rounds else raw(Commit()),
            raw(RoundEnd(self.rounds + 1)),
            raw(End(rounds, self.content + 1)),
            raw(End(rounds + 1, self.content)),
            raw(Capture(3, 1, 0)),
            raw(Capture(4, 1, 0)),
            raw(Capture(6, 1, 0)),
            raw(Memory(3, 0), b"d"),
            raw(Pages(1, 0), bytes(PAGE)),
            raw(Pci(3), bytes(64)),
            raw(Config(5, 0, 1), b"c"),
            raw(Config(3, self.devices[2].config_pos + 1, CHUNK + 1), b"c"),
            raw(Bitmap(4, 19, 2), b"\x03"),
            raw(Bitmap(5, 0, 3), b"\x0f"),
            raw(Bitmap(5, 0, 3), b"\0"),
        ]
        for owed in self.devices[:2]:
            frames += [
                raw(Capture(owed.stream, owed.captures + 2, 0)),
                raw(Memory(owed.stream, owed.pos + 1), b"d"),
                zeros(Memory(owed.stream, owed.pos), owed.left + 1),
            ]
            if owed.left:
                frames.append(raw(Capture(owed.stream, owed.captures + 1, 0)))
        for area in self.ranges:
            frames += [
                raw(Pages(area.stream, area.pos + PAGE), bytes(PAGE)),
                zeros(Pages(area.stream, area.pos), area.left + PAGE),
            ]
            if area.next:
                frames.append(raw(Bitmap(area.stream, area.next - 1, 1), b"\x01"))
            if area.next < area.pages and any(other.left for other in self.ranges):
                frames.append(raw(Bitmap(area.stream, area.next, 1), b"\x01"))
        for step, frame in (
            (phase is Phase.OPEN, raw(State())),
            (phase in (Phase.OPEN, Phase.STOPPED), raw(Round(self.rounds + 1))),
            (phase in DATA_PHASES and self.complete, raw(RoundEnd(rounds))),
            (phase is Phase.CONFIG, raw(Config(2, 0, 1), b"c")),
            (phase is Phase.CONFIG and self.configured, raw(End(rounds, self.content))),
            (phase is Phase.LOADED, raw(Commit())),
        ):
            if not step:
                frames.append(frame)
        return frames

    def illegal_answers(self) -> list[Record]:
        """Answers that the target must not give now."""
        rounds = max(self.target.rounds, 1)
        due = {Phase.ROUND_SENT: "round", Phase.ENDED: "loaded", Phase.COMMITTED: "running"}.get(self.target.phase)
        answers: list[Record] = [Welcome(SESSION, "target", (), CHUNK, 1 << 40), Credit(self.given - 1)]
        for of in ("round", "loaded", "running"):
            answers += [Ack(of, rounds + 1, self.given), Ack(of, rounds, self.given - 1)]
            if of != due:
                answers.append(Ack(of, rounds, self.given))
        if self.target.phase in WITHOUT_CREDIT:
            answers.append(Credit(self.given))
        return answers

    @rule(part=st.integers(0, 9))
    def illegal_frame(self, part: int) -> None:
        for number, frame in enumerate(self.illegal_frames()):
            with pytest.raises(LocalProtocolError):
                send(self.source, frame)
            if number % 10 == part and not self.forth and not self.back:
                self.forged(deepcopy(self.target), frame, self.taken + 1)

    @rule(part=st.integers(0, 3))
    def illegal_answer(self, part: int) -> None:
        for number, answer in enumerate(self.illegal_answers()):
            with pytest.raises(LocalProtocolError):
                self.target.send(answer)
            if number % 4 == part and not self.forth and not self.back:
                self.forged(deepcopy(self.source), raw(answer), self.answered + 1)

    @precondition(lambda self: not self.forth and not self.back)
    @rule(size=PIECES)
    def beyond_the_credit(self, size: int) -> None:
        """A frame that is right but for its size: the target knows what it gave, also what has not arrived."""
        owed = self.devices[0]
        if self.source.phase in DATA_PHASES and self.spent + size > self.given and size <= owed.left:
            self.forged(
                deepcopy(self.target), raw(Memory(1, owed.pos), b"d" * size), self.taken + 1, "exceeds the credit"
            )

    @staticmethod
    def forged(session: SourceSession | TargetSession, frame: Frame, sequence: int, match: str | None = None) -> None:
        stream: int = getattr(frame.record, "stream", 0)
        fields = (frame.record.type, stream, sequence, encode(frame.record), [frame.payload], frame.flags)
        with pytest.raises(StreamError, match=match) as caught:
            take(session, b"".join(pack_frame(*fields, len(frame.content), session_seed(SESSION))))
        assert caught.value.record == f"{frame.record.type.name} record {sequence}"

    @invariant()
    def both_ends_know_the_same_when_nothing_is_under_way(self) -> None:
        assert (self.source.rounds, self.source.content) == (self.rounds, self.content)
        if not self.forth:
            assert (self.target.rounds, self.target.content) == (self.rounds, self.content)
            assert self.target.spent == self.spent
            if not self.back:
                assert self.source.phase is self.target.phase


Conversation.TestCase.settings = settings(
    max_examples=80, stateful_step_count=80, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestConversation = Conversation.TestCase
