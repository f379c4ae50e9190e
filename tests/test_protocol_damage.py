"""Whatever happens to a stored stream: the first record that is not as it was written is refused, and none after it."""

from __future__ import annotations

import dataclasses

import pytest

from tests.protocol_streams import FORWARD, HELLO, Frame, records_in, send, stored_frames
from vfiostream.errors import StreamError
from vfiostream.protocol.records import Record
from vfiostream.protocol.sessions import SourceSession

FRAMES = stored_frames()
RECORDS = [frame.record for frame in FORWARD]
NUMBERS = range(len(FRAMES))


def refused(data: bytes, good: int) -> str:
    """Read a stream of which the first ``good`` records are sound; return the record that the error names."""
    found: list[Record] = []
    with pytest.raises(StreamError) as caught:
        for record in records_in(data):
            found.append(record)
    assert found == RECORDS[:good]
    return caught.value.record


def test_the_stream_is_sound() -> None:
    assert list(records_in(b"".join(FRAMES))) == RECORDS


@pytest.mark.parametrize("change", [0x01, 0x80, 0xFF])
@pytest.mark.parametrize("number", NUMBERS)
def test_a_changed_byte(number: int, change: int) -> None:
    before, after = b"".join(FRAMES[:number]), b"".join(FRAMES[number + 1 :])
    names = {f"record {number + 1}", f"{RECORDS[number].type.name} record {number + 1}"}
    for offset in range(len(FRAMES[number])):
        damaged = bytearray(FRAMES[number])
        damaged[offset] ^= change
        assert refused(before + damaged + after, number) in names, f"byte {offset}"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_stream_cut_anywhere(number: int) -> None:
    before = b"".join(FRAMES[:number])
    names = {f"record {number + 1}", f"{RECORDS[number].type.name} record {number + 1}"}
    for length in range(len(FRAMES[number])):
        assert refused(before + FRAMES[number][:length], number) in names, f"after {length} bytes"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_repeated_frame(number: int) -> None:
    stream = [*FRAMES[: number + 1], *FRAMES[number:]]
    assert refused(b"".join(stream), number + 1).endswith(f"record {number + 1 if number else 2}")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_dropped_frame(number: int) -> None:
    stream = [*FRAMES[:number], *FRAMES[number + 1 :]]
    name = refused(b"".join(stream), number)
    # Without its HELLO, the check of the second frame has the wrong seed, and its sequence number is not believed.
    assert name.endswith("record 1" if number == 0 else f"record {min(number + 2, len(FRAMES))}")


@pytest.mark.parametrize("number", NUMBERS[:-1])
def test_two_frames_in_the_wrong_order(number: int) -> None:
    stream = [*FRAMES[:number], FRAMES[number + 1], FRAMES[number], *FRAMES[number + 2 :]]
    assert refused(b"".join(stream), number).endswith("record 1" if number == 0 else f"record {number + 2}")


@pytest.mark.parametrize("after", [b"\0", bytes(48), FRAMES[-1], b"".join(FRAMES)])
def test_bytes_after_the_commit(after: bytes) -> None:
    assert refused(b"".join(FRAMES) + after, len(FRAMES)).endswith(f"record {len(FRAMES) + (after != FRAMES[-1])}")


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_the_end_of_another_checkpoint_of_the_same_device(number: int) -> None:
    greeting = dataclasses.replace(HELLO, session=bytes(16))
    other = SourceSession(greeting, answers=False)
    frames = [send(other, frame) for frame in (Frame(greeting), *FORWARD[1:])]
    stream = [*FRAMES[:number], *frames[number:]]
    assert refused(b"".join(stream), number) == f"record {number + 1}"
