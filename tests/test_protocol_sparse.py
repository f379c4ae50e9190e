"""Content without its zero pages: what it looks like on the wire, and what is refused of it."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from tests.protocol_streams import SESSION, SOFTWARE, Frame, Pair, device
from vfiostream.errors import LocalProtocolError, StreamError
from vfiostream.protocol.framing import FLAG_SPARSE, FLAG_ZERO
from vfiostream.protocol.limits import PAGE_SIZE
from vfiostream.protocol.payload import Piece, pieces, shrunk
from vfiostream.protocol.records import Capture, Config, Hello, Memory, Pages, Record, Round

ZERO = bytes(PAGE_SIZE)


def page(letter: str) -> bytes:
    return letter.encode() * PAGE_SIZE


def joined(found: list[Piece]) -> bytes:
    return b"".join(bytes(piece.size) if piece.data is None else bytes(piece.data) for piece in found)


def test_the_bytes_of_sparse_content() -> None:
    content = ZERO + page("a") + page("b") + ZERO * 5 + page("c") + ZERO
    flags, payload = shrunk(memoryview(content))
    assert flags == FLAG_SPARSE
    assert b"".join(payload) == page("a") + page("b") + page("c") + bytes([0b0000_0110, 0b0000_0001])
    assert payload[0].obj is content  # type: ignore[union-attr]  # in place, not copied


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, PAGE_SIZE - 1))
def test_what_goes_out_comes_in(used: list[bool], tail: int) -> None:
    for rest in (0, tail):
        content = b"".join(page("x") if one else ZERO for one in used) + bytes(rest)
        flags, payload = shrunk(memoryview(content))
        sent = b"".join(payload)
        assert joined(pieces(sent, flags, len(content))) == content
        if not any(used):
            assert (flags, sent) == (FLAG_ZERO, b"")
        elif not rest:
            assert len(sent) == sum(used) * PAGE_SIZE + (0 if all(used) else (len(used) + 7) // 8)


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (page("a") + b"\x00", "says that 0 of its pages"),
        (page("a") + b"\x03", "says that 2 of its pages"),
        (page("a") + b"\x05", "bits set beyond its last page"),
        (page("a") + b"\x81", "bits set beyond its last page"),
    ],
)
def test_bitmaps_that_lie(payload: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pieces(payload, FLAG_SPARSE, 2 * PAGE_SIZE)


def hello(*features: str) -> Hello:
    return Hello(SESSION, SOFTWARE, features, 1 << 20, (device(1),), ())


def sparse(record: Record, payload_size: int, content_size: int) -> Frame:
    return Frame(record, bytes(payload_size), FLAG_SPARSE, bytes(content_size))


@pytest.mark.parametrize(
    ("payload_size", "content_size"),
    [
        (PAGE_SIZE, 2 * PAGE_SIZE),  # no bitmap
        (1, 2 * PAGE_SIZE),  # no page
        (2 * PAGE_SIZE + 1, 2 * PAGE_SIZE),  # all pages
        (PAGE_SIZE + 1, 2 * PAGE_SIZE + 1),  # no whole pages
        (PAGE_SIZE + 2, 2 * PAGE_SIZE),
        (0, 2 * PAGE_SIZE),
    ],
)
def test_sizes_that_can_not_be(payload_size: int, content_size: int) -> None:
    pair = Pair.greeted(hello("sparse"))
    pair.say(Round(1))
    pair.say(Capture(1, 1, 1 << 20))
    with pytest.raises(StreamError, match="with flags 4"):
        pair.target.parse(pair.forged(sparse(Memory(1, 0), payload_size, content_size))[:48])


def test_it_must_have_been_agreed_on() -> None:
    pair = Pair.greeted(hello())
    pair.say(Round(1))
    pair.say(Capture(1, 1, 1 << 20))
    with pytest.raises(LocalProtocolError, match="is sparse, and the ends did not agree"):
        pair.source.send(Memory(1, 0), page("a"), b"\x01", flags=FLAG_SPARSE, content_size=2 * PAGE_SIZE)
    pair.target_refuses(
        sparse(Memory(1, 0), PAGE_SIZE + 1, 2 * PAGE_SIZE), match="is sparse, and the ends did not agree"
    )


@pytest.mark.parametrize("record", [Config(1, 0, 1 << 20), Round(2), Pages(1, 0)])
def test_not_every_record_can_be_sparse(record: Record) -> None:
    pair = Pair.greeted(hello("sparse"))
    pair.say(Round(1))
    pair.target_refuses(
        sparse(record, PAGE_SIZE + 1, 2 * PAGE_SIZE),
        match="no range" if isinstance(record, Pages) else "can't be sparse",
    )
