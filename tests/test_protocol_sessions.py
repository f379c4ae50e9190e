"""Which record may come when, and whether it fits: every phase with every step, at both ends, and the positions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy

import pytest

from tests.protocol_streams import PAGE, SESSION, SOFTWARE, Pair, device, hello, raw, send, take, welcome
from vfiostream.errors import LocalProtocolError
from vfiostream.protocol import limits
from vfiostream.protocol.framing import FLAG_ZERO, FLAG_ZSTD
from vfiostream.protocol.records import (
    Abort,
    Ack,
    Bitmap,
    Capture,
    Commit,
    Config,
    Credit,
    End,
    Hello,
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
)
from vfiostream.protocol.sessions import LIVE, STORED, TARGET_STEPS, Phase, SourceSession, Step, TargetSession

TABLES = {True: LIVE, False: STORED}
# A device that owes nothing but its first capture: after that, whatever the table allows is complete at once.
FREE = hello(device(1, config_size=0))
CREDIT = 1 << 30


def example(step: Step, rounds: int) -> Record:
    """A record of this step that fits wherever the table allows it, after so many rounds."""
    examples: dict[Step, Record] = {
        Step.HELLO: FREE,
        Step.WELCOME: welcome(credit=CREDIT),
        Step.ROUND: Round(rounds + 1),
        Step.DATA: Capture(1, 2, 0),
        Step.ROUND_END: RoundEnd(max(rounds, 1)),
        Step.ROUND_ACK: Ack("round", max(rounds, 1), CREDIT),
        Step.STATE: State(),
        Step.CONFIG: Config(1, 0, 1),
        Step.END: End(max(rounds, 1), 0),
        Step.LOADED_ACK: Ack("loaded", max(rounds, 1), CREDIT),
        Step.COMMIT: Commit(),
        Step.RUNNING_ACK: Ack("running", max(rounds, 1), CREDIT),
        Step.CREDIT: Credit(CREDIT),
        Step.ABORT: Abort("failed", "no reason", stopped=False),
    }
    return examples[step]


def content(step: Step) -> bytes:
    return b"c" if step is Step.CONFIG else b""


def reached(answers: bool) -> dict[Phase, Pair]:
    """A pair in each phase that can be reached, found by trying every step that the sessions accept."""
    found = {Phase.START: Pair.start(FREE, answers=answers)}
    new = [Phase.START]
    while new:
        for step in Step:
            pair = deepcopy(found[new[0]])
            record = example(step, pair.source.rounds)
            try:
                if step in TARGET_STEPS:
                    pair.answer(record)
                else:
                    pair.say(record, content(step))
            except LocalProtocolError:
                continue
            if step is Step.ROUND:
                pair.say(Capture(1, 1, 0))
            assert pair.source.phase is pair.target.phase
            if pair.source.phase not in found:
                found[pair.source.phase] = pair
                new.append(pair.source.phase)
        del new[0]
    return found


PAIRS = {answers: reached(answers) for answers in TABLES}
CASES = [(answers, phase, step) for answers in TABLES for phase in PAIRS[answers] for step in Step]


def test_every_phase_of_the_tables_is_reached() -> None:
    for answers, table in TABLES.items():
        assert set(PAIRS[answers]) == {Phase.START, *table.values()}
    assert set(PAIRS[True]) == set(Phase)


@pytest.mark.parametrize(("answers", "phase", "step"), CASES)
def test_sending_is_as_the_table_says(answers: bool, phase: Phase, step: Step) -> None:
    """Each end sends what the table allows and is its own to send; anything else leaves it as it was."""
    record = example(step, PAIRS[answers][phase].source.rounds)
    refusal = f"^{record.type.name} must not be sent in phase {phase.name}$"
    after = TABLES[answers].get((phase, step))

    source = deepcopy(PAIRS[answers][phase].source)
    if after is not None and step not in TARGET_STEPS:
        send(source, raw(record, content(step)))
        assert source.phase is after
    else:
        with pytest.raises(LocalProtocolError, match=refusal):
            send(source, raw(record, content(step)))
        assert source.phase is phase

    target = deepcopy(PAIRS[answers][phase].target)
    if after is not None and (step in TARGET_STEPS or step is Step.ABORT):
        target.send(record)
        assert target.phase is after
    else:
        with pytest.raises(LocalProtocolError, match=refusal):
            target.send(record)
        assert target.phase is phase


@pytest.mark.parametrize(("answers", "phase", "step"), CASES)
def test_receiving_is_as_the_table_says(answers: bool, phase: Phase, step: Step) -> None:
    """Each end takes what the table allows and is the other's to send, and nothing else."""
    pair = deepcopy(PAIRS[answers][phase])
    frame = raw(example(step, pair.source.rounds), content(step))
    after = TABLES[answers].get((phase, step))

    if after is not None and step not in TARGET_STEPS:
        take(pair.target, pair.forged(frame))
        assert pair.target.phase is after
    else:
        pair.target_refuses(frame)
        assert pair.target.phase is phase

    if after is not None and (step in TARGET_STEPS or step is Step.ABORT):
        take(pair.source, pair.forged(frame, answer=True))
        assert pair.source.phase is after
    else:
        pair.source_refuses(frame)
        assert pair.source.phase is phase


def paths(answers: bool, length: int) -> Iterator[str]:
    """All whole conversations of at most ``length`` records that the table allows, without CREDIT and ABORT."""
    table = TABLES[answers]
    last = Phase.DONE
    open_paths: list[tuple[Phase, tuple[Step, ...]]] = [(Phase.START, ())]
    while open_paths:
        phase, path = open_paths.pop()
        if phase is last:
            yield "".join(LETTERS[step] for step in path)
        elif len(path) < length:
            steps = [(step, after) for (before, step), after in table.items() if before is phase and step in LETTERS]
            open_paths += [(after, (*path, step)) for step, after in steps]


LETTERS = {
    Step.HELLO: "H",
    Step.WELCOME: "w",
    Step.ROUND: "R",
    Step.DATA: "D",
    Step.ROUND_END: "E",
    Step.ROUND_ACK: "a",
    Step.STATE: "S",
    Step.CONFIG: "C",
    Step.END: "N",
    Step.LOADED_ACK: "l",
    Step.COMMIT: "M",
    Step.RUNNING_ACK: "r",
}


@pytest.mark.parametrize(
    ("answers", "order"),
    [(True, "Hw(RD*Ea)*SRD*EC*NlMr"), (False, "H(RD*E)*SRD*EC*NM")],
)
def test_the_tables_are_the_order_of_the_document(answers: bool, order: str) -> None:
    """Both ways, for all conversations that are short enough: CONFIG+ is the positions' business, so C* here."""
    length = 16 if answers else 14
    allowed = set(paths(answers, length))
    assert all(re.fullmatch(order, path) for path in allowed)
    start, end = ("Hw", "NlMr") if answers else ("H", "NM")
    round_end = "Ea" if answers else "E"
    rounds = [""]
    for known in rounds:
        room = length - len(start) - len(end) - len("SRE") - len(known) - len("R") - len(round_end)
        rounds += [f"{known}R{'D' * data}{round_end}" for data in range(room + 1)]
    documented = {
        f"{start}{early}SR{'D' * data}E{'C' * config}{end}"
        for early in rounds
        for data in range(length)
        for config in range(length)
    }
    assert allowed == {path for path in documented if len(path) <= length}


# Positions. Each case is refused on its way out and on its way in, and then the conversation goes on.

AREA = RangeEntry(3, 1 << 20, 20 * PAGE)
OTHER = RangeEntry(4, 0, PAGE)
ALL = b"\xff\xff\x0f"
PCI = PciEntry(1, 2, 3, 4, 5, 6)


@pytest.fixture
def pair() -> Pair:
    devices = (device(1, pci=PCI), device(2, device_memory=False, config_size=0))
    return Pair.greeted(hello(*devices, ranges=(AREA, OTHER)))


def refuses_all(pair: Pair, cases: list[tuple[Record, bytes, str]]) -> None:
    """Neither end has any of these; ``pair`` is where it was."""
    for record, data, match in cases:
        trial = deepcopy(pair)
        trial.refuses(record, data, match=match)


def first_round(pair: Pair) -> None:
    pair.say(Round(1))
    pair.say(Capture(1, 1, 0))
    pair.say(Bitmap(3, 0, 20), ALL)
    pair.say(Pages(3, 0), bytes(16 * PAGE))
    pair.say(Pages(3, 16 * PAGE), bytes(4 * PAGE))
    pair.say(Bitmap(4, 0, 1), b"\x01")
    pair.say(Pages(4, 0), bytes(PAGE))
    pair.say(RoundEnd(1))
    pair.answer(Ack("round", 1, CREDIT))


def test_captures(pair: Pair) -> None:
    refuses_all(pair, [(Round(number), b"", "round 1 is next") for number in (2, 7)])
    pair.say(Round(1))
    refuses_all(
        pair,
        [
            (Capture(1, 2, 5), b"", "capture 1 is next"),
            (Capture(2, 1, 5), b"", "no device memory"),
            (Capture(3, 1, 5), b"", "stream 3, which is no device"),
            (Capture(5, 1, 5), b"", "stream 5, which is no device"),
            (Memory(1, 0), b"x", "0 bytes at 0 are to come"),
            (Memory(3, 0), b"x", "stream 3, which is no device"),
        ],
    )
    pair.say(Capture(1, 1, 5))
    refuses_all(
        pair,
        [
            (Capture(1, 2, 5), b"", "5 bytes of the capture before are missing"),
            (Memory(1, 1), b"x", "at 1, where 5 bytes at 0"),
            (Memory(1, 0), b"sixsix", "6 bytes at 0, where 5 bytes at 0"),
            (Memory(1, 0), b"", "0 bytes of content"),
            (RoundEnd(1), b"", "5 bytes of device 1 are missing"),
        ],
    )
    pair.say(Memory(1, 0), b"thr")
    refuses_all(
        pair,
        [
            (Memory(1, 0), b"thr", "3 bytes at 0, where 2 bytes at 3"),
            (Memory(1, 2), b"xx", "2 bytes at 2, where 2 bytes at 3"),
            (Memory(1, 4), b"x", "1 bytes at 4, where 2 bytes at 3"),
            (Memory(1, 3), b"xxx", "3 bytes at 3, where 2 bytes at 3"),
            (Memory(2, 3), b"x", "0 bytes at 0 are to come"),
        ],
    )
    pair.say(Memory(1, 3), b"ee")
    refuses_all(pair, [(Memory(1, 5), b"x", "0 bytes at 5"), (Capture(1, 1, 1), b"", "capture 2 is next")])
    pair.say(Capture(1, 2, 0))
    refuses_all(pair, [(Memory(1, 0), b"x", "0 bytes at 0"), (Memory(1, 5), b"x", "0 bytes at 0")])
    pair.say(Capture(1, 3, 1))
    pair.say(Memory(1, 0), b"x")


def test_a_capture_of_no_known_size_ends_with_the_next_or_the_round() -> None:
    pair = Pair.greeted(hello())
    pair.say(Round(1))
    pair.say(Capture(1, 1, None))
    refuses_all(pair, [(Memory(1, 1), b"x", "1 bytes at 1, where bytes at 0 are to come")])
    pair.say(Memory(1, 0), b"one")
    refuses_all(
        pair,
        [
            (Memory(1, 0), b"one", "3 bytes at 0, where bytes at 3"),
            (Memory(1, 4), b"x", "1 bytes at 4, where bytes at 3"),
        ],
    )
    pair.say(Memory(1, 3), b"two")
    pair.say(Capture(1, 2, 2))
    refuses_all(pair, [(Memory(1, 6), b"x", "1 bytes at 6, where 2 bytes at 0"), (RoundEnd(1), b"", "2 bytes of")])
    pair.say(Memory(1, 0), b"xx")
    pair.say(Capture(1, 3, None))
    pair.say(RoundEnd(1))
    pair.answer(Ack("round", 1, CREDIT))
    pair.say(Round(2))
    refuses_all(pair, [(Memory(1, 0), b"x", "where 0 bytes at 0")])


def test_captures_are_counted_over_all_rounds(pair: Pair) -> None:
    pair = Pair.greeted(hello())
    for number in (1, 2):
        pair.say(Round(number))
        refuses_all(pair, [(Capture(1, 3 - number, 0), b"", f"capture {number} is next")])
        pair.say(Capture(1, number, 0))
        refuses_all(pair, [(RoundEnd(3 - number), b"", f"ends round {3 - number} in round {number}")])
        pair.say(RoundEnd(number))
        pair.answer(Ack("round", number, CREDIT))
    refuses_all(pair, [(Round(number), b"", "round 3 is next") for number in (1, 2, 4)])


@pytest.mark.parametrize("last", [False, True])
def test_the_first_round_has_a_capture_of_each_device_with_memory(last: bool) -> None:
    pair = Pair.greeted(hello(device(1), device(2, device_memory=False), device(3)))
    if last:
        pair.say(State())
    pair.say(Round(1))
    refuses_all(pair, [(RoundEnd(1), b"", "ends the first round without a capture of device 1")])
    pair.say(Capture(1, 1, 0))
    refuses_all(pair, [(RoundEnd(1), b"", "ends the first round without a capture of device 3")])
    pair.say(Capture(3, 1, 0))
    pair.say(RoundEnd(1))
    if not last:
        # Later rounds need none.
        pair.answer(Ack("round", 1, CREDIT))
        pair.say(Round(2))
        pair.say(RoundEnd(2))


def test_one_window_is_open_over_all_ranges(pair: Pair) -> None:
    first_round(pair)
    pair.say(Round(2))
    pair.say(Bitmap(4, 0, 1), b"\x01")
    refuses_all(pair, [(Bitmap(3, 0, 1), b"\x01", "comes while 4096 bytes of pages announced before are missing")])
    # A capture may come in between.
    pair.say(Capture(1, 2, 1))
    pair.say(Pages(4, 0), bytes(PAGE))
    pair.say(Bitmap(3, 0, 2), b"\x03")
    pair.say(Pages(3, 0), bytes(PAGE))
    refuses_all(pair, [(Bitmap(3, 2, 1), b"\x01", "comes while 4096 bytes of pages announced before are missing")])
    pair.say(Memory(1, 0), b"x")
    pair.say(Pages(3, PAGE), bytes(PAGE))
    pair.say(RoundEnd(2))


def test_guest_memory(pair: Pair) -> None:
    pair.say(Round(1))
    pair.say(Capture(1, 1, 0))
    page = bytes(PAGE)
    refuses_all(pair, [(Pages(3, 0), page, "0 bytes at 0"), (Pages(1, 0), page, "no range of guest memory")])
    pair.say(Bitmap(3, 0, 10), b"\xff\x03")
    refuses_all(
        pair,
        [
            (Bitmap(3, 10, 10), b"\xff\x03", "pages announced before are missing"),
            (Bitmap(4, 0, 1), b"\x01", "40960 bytes of pages announced before are missing"),
            (Pages(3, PAGE), page, "at 4096, where 40960 bytes at 0"),
            (Pages(3, 0), page + b"x", "4097 bytes at 0"),
            (Pages(3, 0), page * 11, "45056 bytes at 0"),
            (Pages(3, 0), b"x" * 4095, "4095 bytes of content"),
            (Pages(4, 0), page, "0 bytes at 0"),
            (RoundEnd(1), b"", "40960 bytes of guest memory at 0x100000 are missing"),
        ],
    )
    pair.say(Pages(3, 0), page * 9)
    refuses_all(pair, [(Pages(3, 0), page, "at 0, where"), (Pages(3, 9 * PAGE), page * 2, "8192 bytes at 36864")])
    pair.say(Pages(3, 9 * PAGE), page)
    refuses_all(
        pair,
        [
            (Bitmap(3, 0, 1), b"\x01", "not pages from 10 to 19"),
            (Bitmap(3, 9, 2), b"\x03", "not pages from 10 to 19"),
            (Bitmap(3, 10, 11), b"\xff\x07", "not pages from 10 to 19"),
            (RoundEnd(1), b"", "10 of 20 pages of guest memory at 0x100000"),
        ],
    )
    pair.say(Bitmap(3, 11, 9), b"\xff\x01")
    pair.say(Pages(3, 0), page * 9)
    pair.say(Bitmap(4, 0, 1), b"\x01")
    pair.say(Pages(4, 0), page)
    refuses_all(pair, [(RoundEnd(1), b"", "19 of 20 pages"), (Bitmap(3, 10, 1), b"\x01", "not pages from 20")])


def test_later_rounds_need_not_cover_memory_and_start_again_at_its_first_page(pair: Pair) -> None:
    first_round(pair)
    pair.say(Round(2))
    pair.say(Bitmap(3, 5, 1), b"\x01")
    pair.say(Pages(3, 0), bytes(PAGE))
    refuses_all(pair, [(Bitmap(3, 5, 1), b"\x01", "not pages from 6 to 19")])
    pair.say(RoundEnd(2))
    pair.answer(Ack("round", 2, CREDIT))
    pair.say(Round(3))
    pair.say(Bitmap(3, 0, 1), b"\x01")


def test_a_first_round_that_is_also_the_last_covers_all_memory(pair: Pair) -> None:
    pair.say(State())
    pair.say(Round(1))
    pair.say(Capture(1, 1, 0))
    refuses_all(pair, [(RoundEnd(1), b"", "0 of 20 pages")])


def test_config_and_end(pair: Pair) -> None:
    first_round(pair)
    for record in (State(), Round(2), RoundEnd(2)):
        pair.say(record)
    came = 21 * PAGE
    pci = bytes(64)
    refuses_all(
        pair,
        [
            (Config(1, 0, 4), b"con", "before the PCI config space of device 1"),
            (Pci(2), pci, "not expected for stream 2"),
            (Pci(3), pci, "no device"),
            (Pci(1), bytes(63), "63 bytes of content, not 64 to 4096"),
            (Pci(1), bytes(4097), "4097 bytes of content, not 64 to 4096"),
            (Config(3, 0, 4), b"con", "no device"),
            (Config(2, 1, 4), b"con", "3 bytes at 1 of 4, where byte 0"),
            (Config(2, 0, 2), b"con", "3 bytes at 0 of 2"),
            (End(2, came), b"", "before the PCI config space of device 1"),
        ],
    )
    pair.say(Pci(1), pci)
    refuses_all(pair, [(Pci(1), pci, "not expected"), (End(2, came + 64), b"", "before the whole config of device 1")])
    pair.refuses(Config(1, 0, 2), b"con", match="3 bytes at 0 of 2")


def test_the_end_comes_after_all_pci_config_space() -> None:
    """Also of a device that has no config of its own."""
    pair = Pair.greeted(hello(*(device(number, device_memory=False, config_size=0, pci=PCI) for number in (1, 2))))
    for record in (State(), Round(1), RoundEnd(1)):
        pair.say(record)
    refuses_all(pair, [(End(1, 0), b"", "before the PCI config space of device 1")])
    pair.say(Pci(1), bytes(64))
    refuses_all(pair, [(End(1, 64), b"", "before the PCI config space of device 2")])
    pair.say(Pci(2), bytes(64))
    pair.say(End(1, 128))


def test_config_is_cut_like_a_capture(pair: Pair) -> None:
    first_round(pair)
    for record, data in ((State(), b""), (Round(2), b""), (RoundEnd(2), b""), (Pci(1), bytes(64))):
        pair.say(record, data)
    came = 21 * PAGE + 64
    pair.say(Config(1, 0, 8), b"con")
    refuses_all(
        pair,
        [
            (Config(1, 0, 8), b"con", "3 bytes at 0 of 8, where byte 3 of 8"),
            (Config(1, 4, 8), b"fig", "3 bytes at 4"),
            (Config(1, 3, 9), b"fig", "of 9, where byte 3 of 8"),
            (Config(1, 3, 8), b"figure", "6 bytes at 3 of 8"),
            (End(2, came + 3), b"", "before the whole config of device 1"),
        ],
    )
    pair.say(Config(2, 0, 1), b"2")
    pair.say(Config(1, 3, 8), b"figur")
    refuses_all(
        pair,
        [
            (Config(1, 0, 8), b"con", "where byte 8 of 8 is next"),
            (Config(1, 8, 8), b"c", "where byte 8 of 8 is next"),
            (End(1, came + 9), b"", "counts 1 rounds"),
            (End(3, came + 9), b"", "counts 3 rounds"),
            (End(2, came + 8), b"", f"{came + 8} bytes, 2 and {came + 9} came"),
            (End(2, 0), b"", "0 bytes"),
        ],
    )
    pair.say(End(2, came + 9))
    assert pair.source.content == pair.target.content == came + 9
    pair.answer(Ack("loaded", 2, CREDIT))


# Greetings.


def test_a_source_that_does_not_say_its_own_hello() -> None:
    session = SourceSession(FREE, answers=True)
    with pytest.raises(LocalProtocolError, match="HELLO"):
        session.send(hello(device(1), device(2)))


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (Welcome(bytes(16), SOFTWARE, (), limits.MIN_CHUNK, CREDIT), "another session"),
        (Welcome(SESSION, SOFTWARE, ("zstd", "lz4"), limits.MIN_CHUNK, CREDIT), "features"),
        (Welcome(SESSION, SOFTWARE, (), limits.MIN_CHUNK + 1, CREDIT), "chunk"),
    ],
)
def test_a_welcome_to_something_else(answer: Welcome, match: str) -> None:
    pair = Pair.start(FREE)
    pair.say(FREE)
    with pytest.raises(LocalProtocolError, match=match):
        pair.target.send(answer)
    pair.source_refuses(raw(answer), match=match)


def test_what_was_welcomed_holds_at_both_ends() -> None:
    pair = Pair.start(hello(chunk=2 * limits.MIN_CHUNK))
    pair.say(hello(chunk=2 * limits.MIN_CHUNK))
    pair.answer(Welcome(SESSION, SOFTWARE, (), limits.MIN_CHUNK, CREDIT))
    for session in (pair.source, pair.target):
        assert (session.chunk, session.features) == (limits.MIN_CHUNK, ())
    pair.say(Round(1))
    pair.say(Capture(1, 1, 1 << 20))
    pair.refuses(Memory(1, 0), bytes(limits.MIN_CHUNK + 1), match="65537 bytes of content, not 1 to 65536")


def test_a_file_needs_no_more_room_than_there_is() -> None:
    greeting = hello(chunk=limits.MIN_CHUNK + 1)
    pair = Pair(SourceSession(greeting, answers=False), TargetSession(chunk=limits.MIN_CHUNK, answers=False))
    pair.target_refuses(raw(greeting), match="65537")


def test_a_file_with_a_feature_that_is_not_known() -> None:
    greeting = Hello(SESSION, SOFTWARE, ("zstd", "lz4"), limits.MIN_CHUNK, (device(1),), ())
    Pair.start(greeting, answers=False).target_refuses(raw(greeting), match="lz4")
    # Over a link the target just does not agree to it.
    Pair.greeted(hello()).say(Round(1))


def test_a_file_keeps_to_the_chunk_of_its_hello() -> None:
    pair = Pair.start(FREE, answers=False)
    for record in (FREE, Round(1), Capture(1, 1, 1 << 20)):
        pair.say(record)
    pair.refuses(Memory(1, 0), bytes(limits.MIN_CHUNK + 1), match="65537 bytes of content, not 1 to 65536")


# Credit.


def frame_size(pair: Pair, record: Record, data: bytes = b"") -> int:
    return len(pair.forged(raw(record, data)))


LEAST = limits.MIN_CHUNK + limits.CREDIT_SLACK


def spend(pair: Pair) -> tuple[int, int]:
    """Send as much of a capture as the credit covers; return where it stands and what is left."""
    chunk = bytes(limits.MIN_CHUNK)
    pair.say(Round(1))
    pair.say(Capture(1, 1, 1 << 30))
    spent = frame_size(pair, Round(1)) + frame_size(pair, Capture(1, 1, 1 << 30))
    pos = 0
    while pair.source.affords(frame_size(pair, Memory(1, pos), chunk)):
        spent += frame_size(pair, Memory(1, pos), chunk)
        pair.say(Memory(1, pos), chunk)
        pos += len(chunk)
    assert pair.target.spent == spent
    return pos, LEAST - spent


def test_the_credit_is_used_to_the_last_byte_and_not_exceeded() -> None:
    pair = Pair.greeted(hello(), credit=LEAST)
    pos, left = spend(pair)
    overhead = frame_size(pair, Memory(1, pos), b"")
    assert not pair.source.affords(left + 1)
    pair2 = deepcopy(pair)
    pair2.refuses(Memory(1, pos), bytes(left - overhead + 1), match="exceeds the credit.* by 1 bytes")
    assert pair.source.affords(left)
    pair.say(Memory(1, pos), bytes(left - overhead))
    assert not pair.source.affords(1)


def test_a_refused_frame_costs_nothing() -> None:
    pair = Pair.greeted(hello(), credit=LEAST)
    pos, left = spend(pair)
    for _ in range(3):
        with pytest.raises(LocalProtocolError, match="exceeds the credit"):
            send(pair.source, raw(Memory(1, pos), bytes(limits.MIN_CHUNK)))
        with pytest.raises(LocalProtocolError, match="to come"):
            send(pair.source, raw(Memory(1, pos + 1), b"x"))
    pair.say(Memory(1, pos), bytes(left - frame_size(pair, Memory(1, pos), b"")))


@pytest.mark.parametrize("answer", [Credit, lambda limit: Ack("round", 1, limit)])
def test_new_credit(answer: type[Credit]) -> None:
    pair = Pair.greeted(hello(), credit=LEAST)
    records = (Round(1), Capture(1, 1, 0), RoundEnd(1))
    for record in records:
        pair.say(record)
    for limit in (0, LEAST - 1):
        with pytest.raises(LocalProtocolError, match="takes back credit"):
            pair.target.send(answer(limit))
        deepcopy(pair).source_refuses(raw(answer(limit)), match="takes back credit")
    size = sum(frame_size(pair, record) for record in records)
    pair.answer(answer(LEAST + 1))
    assert pair.source.affords(LEAST + 1 - size)
    assert not pair.source.affords(LEAST + 2 - size)


def test_a_credit_that_could_not_be_sent_was_not_given() -> None:
    pair = Pair.greeted(hello(), credit=LEAST)
    pos, left = spend(pair)
    with pytest.raises(LocalProtocolError, match="must not be sent"):
        pair.target.send(Ack("round", 1, 1 << 40))
    pair.target_refuses(raw(Memory(1, pos), bytes(left)), match="exceeds the credit")


def test_an_abort_is_free() -> None:
    pair = Pair.greeted(hello(device(1, config_size=0)), credit=LEAST)
    pos, left = spend(pair)
    pair.say(Memory(1, pos), bytes(left - frame_size(pair, Memory(1, pos), b"")))
    pair.say(Abort("cancelled", "enough", stopped=False))


def test_a_file_knows_no_credit() -> None:
    pair = Pair.start(hello(), answers=False)
    for record in (hello(), Round(1), Capture(1, 1, 1 << 20)):
        pair.say(record)
    for pos in range(0, 1 << 20, limits.MIN_CHUNK):
        assert pair.source.affords(1 << 40)
        pair.say(Memory(1, pos), bytes(limits.MIN_CHUNK))


# Acknowledgements.


def test_an_acknowledgement_of_another_round() -> None:
    pair = Pair.greeted(FREE)
    for record in (Round(1), Capture(1, 1, 0), RoundEnd(1)):
        pair.say(record)
    with pytest.raises(LocalProtocolError, match="round 2"):
        pair.target.send(Ack("round", 2, CREDIT))
    pair.source_refuses(raw(Ack("round", 2, CREDIT)), match="round 2")


def test_a_frame_that_crosses_a_later_one() -> None:
    """The ends of a link are not in the same phase: credit for an early record may come after a late one was sent."""
    pair = Pair.greeted(FREE)
    for record in (State(), Round(1), Capture(1, 1, 0), RoundEnd(1), End(1, 0)):
        pair.say(record)
    late = deepcopy(pair)
    take(pair.source, b"".join(late.target.send(Credit(CREDIT + 1))))


# What goes out is held to the rules of its content too.


def test_content_that_may_not_be_sent() -> None:
    pair = Pair.greeted(hello(zstd=False))
    pair.say(Round(1))
    pair.say(Capture(1, 1, 1 << 20))
    with pytest.raises(LocalProtocolError, match="is compressed, and the ends did not agree"):
        pair.source.send(Memory(1, 0), b"zstd", flags=FLAG_ZSTD, content_size=100)
    with pytest.raises(LocalProtocolError, match="65537 bytes of content, not 1 to 65536"):
        pair.source.send(Memory(1, 0), b"", flags=FLAG_ZERO, content_size=limits.MIN_CHUNK + 1)
    pair.refuses(RoundEnd(1), b"x", match="1 bytes of content, not 0 to 0")
