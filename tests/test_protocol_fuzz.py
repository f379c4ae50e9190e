"""tests/fuzz_stream.py for a moment; what it finds in longer runs belongs here as a case of its own."""

from __future__ import annotations

from hypothesis import example, given, settings, strategies as st

from tests.fuzz_stream import FRAMES, fuzz_answer, fuzz_bytes, fuzz_frame, golden_answer, one_input
from vfiostream.protocol.framing import PREFIX_SIZE

GOLDEN = b"".join(FRAMES)


@st.composite
def changed(draw: st.DrawFn, original: bytes, least: int = 0) -> bytes:
    """A frame or stream with some of its parts replaced, taken out or repeated."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(start + 40, len(data))))
        data[start:end] = draw(st.one_of(st.binary(max_size=12), st.just(bytes(data[start:end]) * 2)))
    return bytes(data) + bytes(max(0, least - len(data)))


def test_what_is_sound_is_accepted() -> None:
    assert fuzz_bytes(GOLDEN)
    assert all(fuzz_frame(number, frame) for number, frame in enumerate(FRAMES))
    assert fuzz_answer(golden_answer())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes(data: bytes) -> None:
    assert not fuzz_bytes(data)
    one_input(data)


@settings(max_examples=300, deadline=None)
@given(changed(GOLDEN))
def test_a_changed_stream(data: bytes) -> None:
    assert fuzz_bytes(data) is (data == GOLDEN)


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_a_changed_frame_whose_checks_are_right(data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(FRAMES) - 1))
    fuzz_frame(number, data.draw(changed(FRAMES[number], least=PREFIX_SIZE)))


@settings(max_examples=300, deadline=None)
@given(changed(golden_answer(), least=PREFIX_SIZE))
def test_a_changed_answer_whose_checks_are_right(frame: bytes) -> None:
    fuzz_answer(frame)
