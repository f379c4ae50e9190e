"""The bytes of version 2, written down: a change here is a change of the format, and needs a new version number.

``PYTHONPATH=src python -m tests.test_protocol_golden`` writes the files anew.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.protocol_streams import ABORT, FORWARD, HELLO, REPLIES, send, stored_frames, take
from vfiostream.errors import StreamError
from vfiostream.protocol import limits
from vfiostream.protocol.records import Abort, Record, Welcome
from vfiostream.protocol.sessions import Phase, SourceSession, TargetSession

GOLDEN = Path(__file__).parent / "golden"
ANSWERS = [record for records in REPLIES.values() for record in records]


def conversation() -> tuple[list[bytes], list[bytes]]:
    """FORWARD and REPLIES over a link: what the source sent, what the target sent."""
    source, target = SourceSession(HELLO, answers=True), TargetSession(chunk=limits.MAX_CONTENT, answers=True)
    forth, back = [], []
    for index, frame in enumerate(FORWARD):
        forth.append(send(source, frame))
        assert take(target, forth[-1]) == frame.record
        for reply in REPLIES.get(index, []):
            back.append(b"".join(target.send(reply)))
            assert take(source, back[-1]) == reply
    assert source.phase is target.phase is Phase.DONE
    return forth, back


def refusal() -> list[bytes]:
    """All that a target sends that does not like the HELLO."""
    source, target = SourceSession(HELLO, answers=True), TargetSession(chunk=limits.MAX_CONTENT, answers=True)
    take(target, send(source, FORWARD[0]))
    frame = b"".join(target.send(ABORT))
    assert take(source, frame) == ABORT
    assert source.phase is target.phase is Phase.ABORTED
    return [frame]


FILES: dict[str, tuple[list[Record], list[bytes]]] = {
    "forward.hex": ([frame.record for frame in FORWARD], conversation()[0]),
    "back.hex": (ANSWERS, conversation()[1]),
    "abort.hex": ([ABORT], refusal()),
}


def golden(name: str) -> list[bytes]:
    """The frames of a file, in which each is a comment and lines of hexadecimal."""
    frames: list[bytes] = []
    for line in (GOLDEN / name).read_text().splitlines():
        if line.startswith("#"):
            frames.append(b"")
        else:
            frames[-1] += bytes.fromhex(line)
    return frames


@pytest.mark.parametrize("name", FILES)
def test_what_is_sent_has_not_changed(name: str) -> None:
    records, frames = FILES[name]
    for number, (record, frame, written) in enumerate(zip(records, frames, golden(name), strict=True), 1):
        assert frame == written, f"{record.type.name} record {number} has changed"


def test_the_written_bytes_are_understood() -> None:
    source, target = SourceSession(HELLO, answers=True), TargetSession(chunk=limits.MAX_CONTENT, answers=True)
    forth, back = iter(golden("forward.hex")), iter(golden("back.hex"))
    for index, frame in enumerate(FORWARD):
        send(source, frame)
        assert take(target, next(forth)) == frame.record
        for reply in REPLIES.get(index, []):
            target.send(reply)
            assert take(source, next(back)) == reply
    assert source.phase is target.phase is Phase.DONE


def test_a_checkpoint_is_the_forward_stream_byte_for_byte() -> None:
    assert stored_frames() == golden("forward.hex")


def test_every_record_is_in_a_golden_file() -> None:
    assert {record.type for records, _ in FILES.values() for record in records} == set(range(1, 17))
    assert isinstance(ANSWERS[0], Welcome)
    assert isinstance(ABORT, Abort)


VERSION_1 = bytes.fromhex(
    "564653f10100010000000000cd0100000100000000000000000000000000000053c86ba28578a69812a4a4d7a46ddb70"
)
"""The prefix of a HELLO of version 1, whose checks were right."""


def test_version_1_is_refused_in_one_sentence() -> None:
    session = TargetSession(chunk=limits.MAX_CONTENT, answers=False)
    with pytest.raises(StreamError) as caught:
        session.parse(VERSION_1)
    assert str(caught.value) == "record 1 is of format 1, this side speaks format 2"


def write() -> None:
    for name, (records, frames) in FILES.items():
        with (GOLDEN / name).open("w") as file:
            for number, (record, frame) in enumerate(zip(records, frames, strict=True), 1):
                file.write(f"# {record.type.name} record {number}\n{textwrap.fill(frame.hex(), 96)}\n")


if __name__ == "__main__":
    write()
