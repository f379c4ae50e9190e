"""Nothing from outside makes us allocate, wait for or believe more than docs/format.md allows."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from typing import Any

import msgpack
import pytest
import xxhash
import zstandard

from tests.protocol_streams import (
    ABORT,
    FORWARD,
    HELLO,
    PAGE,
    REPLIES,
    SESSION,
    Pair,
    device,
    hello,
    raw,
    take,
)
from vfiostream.errors import StreamError
from vfiostream.protocol import framing, limits
from vfiostream.protocol.framing import FLAG_ZERO, FLAG_ZSTD, PREFIX_SIZE, pack_frame, session_seed
from vfiostream.protocol.payload import Compressor, Decompressor, bound
from vfiostream.protocol.records import (
    Ack,
    Bitmap,
    Config,
    RangeEntry,
    Record,
    RecordType,
    Round,
    RoundEnd,
    State,
    Welcome,
    decode,
    encode,
)
from vfiostream.protocol.sessions import TargetSession

SEED = session_seed(SESSION)
HUGE = 0xFFFFFFFF


def prefix(**changes: int) -> bytes:
    """The prefix of the first frame of a stream, with its check right whatever else is wrong."""
    fields = {
        "magic": int.from_bytes(b"VFS\xf1", "little"),
        "version": framing.VERSION,
        "type": RecordType.HELLO,
        "flags": 0,
        "stream": 0,
        "header_size": 200,
        "sequence": 1,
        "payload_size": 0,
        "content_size": 0,
        "body_check": 0,
    } | changes
    seed = fields.pop("seed", 0)
    packed = struct.pack("<IHBBIIQIIQ", *fields.values())
    return packed + struct.pack("<Q", xxhash.xxh3_64_intdigest(packed, seed))


def later(type_: RecordType, **changes: int) -> bytes:
    """The same for the second frame."""
    return prefix(type=type_, sequence=2, seed=SEED, stream=1, header_size=6, **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"magic": 0}, "magic number"),
        ({"version": framing.VERSION - 1}, "of format 1, this side speaks format 2"),
        ({"version": framing.VERSION + 1}, "format 3"),
        ({"version": 0}, "format 0"),
        ({"type": 0}, "record 1 of type 0 is not part of this format"),
        ({"type": 17}, "record 1 of type 17 is not part of this format"),
        ({"flags": 3, "payload_size": 1, "content_size": 2}, "unknown flags 0x03"),
        ({"flags": 8}, "unknown flags 0x08"),
        ({"sequence": 0}, "out of order"),
        ({"sequence": 2}, "out of order"),
        ({"sequence": 1 << 63}, "out of order"),
        ({"header_size": limits.MAX_HELLO + 1}, "header of 524289 bytes"),
        ({"header_size": HUGE}, "header of 4294967295 bytes"),
        ({"payload_size": HUGE, "content_size": HUGE}, "4294967295 bytes"),
        ({"payload_size": 1, "content_size": 1}, "1 bytes of content, not 0 to 0"),
        ({"content_size": 1}, "0 bytes of payload for 1 of content"),
        ({"flags": FLAG_ZERO, "content_size": 1}, "1 bytes of content, not 0 to 0"),
        ({"flags": FLAG_ZERO}, "0 bytes of payload for 0 of content"),
        ({"flags": FLAG_ZSTD}, "0 bytes of payload for 0 of content"),
        ({"flags": FLAG_ZSTD, "payload_size": 5, "content_size": 6}, "did not agree"),
        ({"type": RecordType.ABORT, "header_size": limits.MAX_HEADER + 1}, "header of 8193 bytes"),
    ],
)
def test_a_first_prefix_that_is_refused(changes: dict[str, int], match: str) -> None:
    session = TargetSession(chunk=limits.MAX_CONTENT, answers=True)
    with pytest.raises(StreamError, match=match):
        session.parse(prefix(**changes))


def test_the_prefix_that_is_changed_above_is_sound() -> None:
    session = TargetSession(chunk=limits.MAX_CONTENT, answers=True)
    assert session.parse(prefix()).header_size == 200
    assert session.parse(prefix(header_size=limits.MAX_HELLO)).frame_size == 48 + limits.MAX_HELLO


CHUNK = 3 * limits.MIN_CHUNK


@pytest.mark.parametrize(
    ("type_", "flags", "payload", "content"),
    [
        (RecordType.MEMORY, 0, 0, 0),
        (RecordType.MEMORY, 0, CHUNK + 1, CHUNK + 1),
        (RecordType.MEMORY, 0, limits.MAX_CONTENT + 1, limits.MAX_CONTENT + 1),
        (RecordType.MEMORY, 0, 5, 6),
        (RecordType.MEMORY, FLAG_ZERO, 5, 5),
        (RecordType.MEMORY, FLAG_ZERO, 0, CHUNK + 1),
        (RecordType.MEMORY, FLAG_ZSTD, 5, CHUNK + 1),
        (RecordType.MEMORY, FLAG_ZSTD, 5, 5),
        (RecordType.MEMORY, FLAG_ZSTD, limits.MAX_CONTENT, 5),
        (RecordType.MEMORY, FLAG_ZSTD, 5, HUGE),
        (RecordType.PAGES, 0, PAGE - 1, PAGE - 1),
        (RecordType.PAGES, 0, CHUNK + PAGE, CHUNK + PAGE),
        (RecordType.BITMAP, 0, 0, 0),
        (RecordType.BITMAP, 0, 65537, 65537),
        (RecordType.BITMAP, FLAG_ZERO, 0, 65537),
        (RecordType.PCI, 0, 63, 63),
        (RecordType.PCI, 0, 4097, 4097),
        (RecordType.CONFIG, 0, 0, 0),
        (RecordType.CONFIG, 0, CHUNK + 1, CHUNK + 1),
        (RecordType.CAPTURE, 0, 1, 1),
        (RecordType.ROUND, 0, 1, 1),
        (RecordType.END, 0, 1, 1),
        (RecordType.COMMIT, FLAG_ZERO, 0, 1),
        (RecordType.ACK, 0, 1, 1),
    ],
)
def test_sizes_that_are_refused_before_anything_is_read(
    type_: RecordType, flags: int, payload: int, content: int
) -> None:
    pair = Pair.greeted(hello(chunk=CHUNK))
    with pytest.raises(StreamError, match="content"):
        pair.target.parse(later(type_, flags=flags, payload_size=payload, content_size=content))


@pytest.mark.parametrize(
    ("type_", "least", "most"),
    [
        (RecordType.MEMORY, 1, CHUNK),
        (RecordType.PAGES, PAGE, CHUNK),
        (RecordType.BITMAP, 1, 65536),
        (RecordType.PCI, 64, 4096),
        (RecordType.CONFIG, 1, CHUNK),
        (RecordType.ROUND, 0, 0),
    ],
)
def test_sizes_at_the_limit_are_taken(type_: RecordType, least: int, most: int) -> None:
    pair = Pair.greeted(hello(chunk=CHUNK))
    for size in (least, most):
        assert pair.target.parse(later(type_, payload_size=size, content_size=size)).content_size == size


@pytest.mark.parametrize("type_", set(RecordType) - {RecordType.HELLO})
def test_only_a_hello_has_a_large_header(type_: RecordType) -> None:
    pair = Pair.greeted(hello())
    sizes = {"payload_size": PAGE, "content_size": PAGE}
    with pytest.raises(StreamError, match="header of 8193 bytes"):
        pair.target.parse(prefix(type=type_, sequence=2, seed=SEED, header_size=8193, **sizes))


def test_zstd_that_was_not_agreed_on() -> None:
    pair = Pair.greeted(hello(zstd=False))
    with pytest.raises(StreamError, match="did not agree"):
        pair.target.parse(later(RecordType.MEMORY, flags=FLAG_ZSTD, payload_size=20, content_size=50))


def test_a_refused_prefix_has_allocated_nothing() -> None:
    session = TargetSession(chunk=limits.MAX_CONTENT, answers=True)
    data = prefix(payload_size=HUGE, content_size=HUGE)
    tracemalloc.start()
    try:
        with pytest.raises(StreamError):
            session.parse(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# zstd frames that lie. The layout is RFC 8878's: magic, descriptor of the header, window, content size, blocks.
CONTENT = b"c" * 1000


def zstd_frame(
    content: bytes = CONTENT,
    *,
    says: int | None = None,
    window_log: int = 10,
    dictionary: bytes = b"",
    last: bool = True,
) -> bytes:
    """One zstd frame with a raw block, a content size of four bytes, and a window of its own."""
    descriptor = 0x80 | len(dictionary)
    window = (window_log - 10) << 3
    size = len(content) if says is None else says
    block = struct.pack("<I", len(content) << 3 | last)[:3] + content
    return struct.pack("<IBB", 0xFD2FB528, descriptor, window) + dictionary + struct.pack("<I", size) + block


SKIPPABLE = struct.pack("<II", 0x184D2A50, 1000) + CONTENT
COMPRESSED = zstandard.ZstdCompressor(level=3).compress(CONTENT)
SIZELESS = zstandard.ZstdCompressor(level=3, write_content_size=False).compress(CONTENT)


def test_the_zstd_frames_that_are_changed_below_are_sound() -> None:
    for payload in (zstd_frame(), zstd_frame(window_log=23), COMPRESSED, memoryview(COMPRESSED)):
        assert Decompressor().content(payload, FLAG_ZSTD, len(CONTENT), "x") == CONTENT


@pytest.mark.parametrize(
    ("payload", "size"),
    [
        pytest.param(zstd_frame(says=limits.MAX_CONTENT), 1000, id="more announced inside"),
        pytest.param(zstd_frame(says=0xFFFFFFFF), 1000, id="4 GiB announced inside"),
        pytest.param(zstd_frame(), 999, id="less announced outside"),
        pytest.param(zstd_frame(), 1001, id="more announced outside"),
        pytest.param(zstd_frame(says=2000), 2000, id="holds less than it says"),
        pytest.param(zstd_frame(says=500), 500, id="holds more than it says"),
        pytest.param(zstd_frame(window_log=24), 1000, id="window of 16 MiB"),
        pytest.param(zstd_frame(window_log=31), 1000, id="window of 2 GiB"),
        pytest.param(zstd_frame(window_log=41), 1000, id="window of 2 TiB"),
        pytest.param(zstd_frame(dictionary=b"\x05"), 1000, id="dictionary"),
        pytest.param(zstd_frame(last=False), 1000, id="no last block"),
        pytest.param(SIZELESS, 1000, id="no size inside"),
        pytest.param(COMPRESSED + COMPRESSED, 1000, id="two frames"),
        pytest.param(COMPRESSED + COMPRESSED, 2000, id="two frames, both counted"),
        pytest.param(COMPRESSED + b"\0", 1000, id="a byte after it"),
        pytest.param(COMPRESSED + SKIPPABLE, 1000, id="a skippable frame after it"),
        pytest.param(SKIPPABLE, 1000, id="a skippable frame"),
        pytest.param(SKIPPABLE + COMPRESSED, 1000, id="a skippable frame before it"),
        pytest.param(COMPRESSED[:-1], 1000, id="cut"),
        pytest.param(COMPRESSED[:3], 1000, id="cut in its magic"),
        pytest.param(b"", 1000, id="empty"),
        pytest.param(b"no zstd at all", 1000, id="something else"),
    ],
)
def test_a_zstd_payload_that_is_refused(payload: bytes, size: int) -> None:
    with pytest.raises(StreamError) as caught:
        Decompressor().content(payload, FLAG_ZSTD, size, "MEMORY record 3")
    assert caught.value.record == "MEMORY record 3"


def test_a_zstd_payload_that_lies_about_its_size_allocates_nothing() -> None:
    payload = zstd_frame(says=64 * limits.MAX_CONTENT)
    tracemalloc.start()
    try:
        with pytest.raises(StreamError, match="does not hold just the 1000 bytes announced"):
            Decompressor().content(payload, FLAG_ZSTD, 1000, "x")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_decompressor_goes_on_after_a_bad_payload() -> None:
    decompressor = Decompressor()
    with pytest.raises(StreamError):
        decompressor.content(COMPRESSED[:-1], FLAG_ZSTD, 1000, "x")
    assert decompressor.content(COMPRESSED, FLAG_ZSTD, 1000, "x") == CONTENT


@pytest.mark.parametrize("level", [1, 3, 19])
@pytest.mark.parametrize("size", [1, 4096, 65536, limits.MAX_CONTENT])
def test_what_we_compress_keeps_to_the_limits(level: int, size: int) -> None:
    if level == 19 and size == limits.MAX_CONTENT:
        content = bytes(size)
    else:
        content = (b"a page of a guest, more or less " * (size // 32 + 1))[:size]
    payload = Compressor().compress(content, level)
    if size == 1:
        assert payload is None
    else:
        assert payload is not None
        assert len(payload) < size <= bound(size)
        assert Decompressor().content(payload, FLAG_ZSTD, size, "x") == content


def test_what_does_not_compress_stays_as_it_is() -> None:
    content = b"".join(xxhash.xxh3_64_digest(struct.pack("<I", number)) for number in range(512))
    assert Compressor().compress(content, 3) is None


# Headers.

EXAMPLES: dict[RecordType, Record] = {
    **{frame.record.type: frame.record for frame in FORWARD},
    **{record.type: record for replies in REPLIES.values() for record in replies},
    RecordType.ABORT: ABORT,
}
KEYS = [(type_, key) for type_ in RecordType for key in msgpack.unpackb(encode(EXAMPLES[type_]))]
DEVICE_KEYS = list(msgpack.unpackb(encode(HELLO))["devices"][0])
PCI_KEYS = list(msgpack.unpackb(encode(HELLO))["devices"][0]["pci"])
RANGE_KEYS = list(msgpack.unpackb(encode(HELLO))["ranges"][0])


def decoded(type_: RecordType, header: bytes) -> Record:
    stream = getattr(EXAMPLES[type_], "stream", 0)
    return decode(type_, stream, 7, header)


def header_is_refused(type_: RecordType, header: bytes, match: str | None = None) -> None:
    with pytest.raises(StreamError, match=match) as caught:
        decoded(type_, header)
    assert caught.value.record == f"{type_.name} record 7"
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def nested(depth: int, *, maps: bool = False) -> bytes:
    return (b"\x81\xa1a" if maps else b"\x91") * depth + b"\xc0"


# None of these is right for any key, in any record.
WRONG: dict[str, bytes] = {
    "a float": msgpack.packb(1.0),
    "the float 4096": msgpack.packb(4096.0),
    "a negative number": msgpack.packb(-1),
    "the most negative number": msgpack.packb(-(1 << 63)),
    "not a number": msgpack.packb(float("nan")),
    "an extension": msgpack.packb(msgpack.ExtType(5, b"")),
    "a time": msgpack.packb(msgpack.Timestamp(1)),
    "a map": msgpack.packb({"a": 1}),
    "an array of arrays": msgpack.packb([[1]]),
    "an array of maps": msgpack.packb([{"a": 1}]),
    "an array of a number": msgpack.packb([1]),
    "a text that is not UTF-8": b"\xa2\xc3\x28",
    "half a surrogate": b"\xa3\xed\xa0\x80",
    "a text with a line break": msgpack.packb("a\nb"),
    "a text with a null": msgpack.packb("\0"),
    "a text of 4097 bytes": msgpack.packb("x" * 4097),
    "an array of 257": msgpack.packb([1] * 257),
    "a byte that msgpack never uses": b"\xc1",
    "nothing": b"",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "an array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "bytes, 4 billion": b"\xc6\xff\xff\xff\xff",
    "a text of 4 billion": b"\xdb\xff\xff\xff\xff",
    **{f"{depth} arrays in each other": nested(depth) for depth in (2, 500, 990, 1010, 1022, 1025, 5000)},
    **{f"{depth} maps in each other": nested(depth, maps=True) for depth in (2, 500, 990, 1010, 1022, 1025, 2000)},
}
# Each is right for some keys and wrong for all others.
TYPES: dict[str, tuple[bytes, set[str]]] = {
    "true": (msgpack.packb(True), {"stopped", "device_memory", "dirty_tracking"}),
    "nil": (msgpack.packb(None), {"version", "driver", "kernel", "data_size", "pci"}),
    "an array": (msgpack.packb([]), {"features", "ranges", "flags"}),
    "16 bytes": (msgpack.packb(bytes(16)), {"session"}),
    "15 bytes": (msgpack.packb(bytes(15)), set()),
    "an empty map": (msgpack.packb({}), set()),
    "a text": (msgpack.packb("x"), {"software", "name", "interface", "version", "driver", "kernel", "reason"}),
    "a text of 257 bytes": (msgpack.packb("x" * 257), {"version", "reason"}),
    "128 letters of two bytes and one": (msgpack.packb("é" * 128 + "x"), {"version", "reason"}),
}


def replaced(values: dict[str, Any], key: str, value: bytes) -> bytes:
    """Pack a map with one value given as msgpack, which may be bad."""
    packed = {name: msgpack.packb(known) for name, known in values.items()} | {key: value}
    return bytes([0x80 | len(packed)]) + b"".join(msgpack.packb(name) + part for name, part in packed.items())


def hellos_with(where: str, key: str, value: bytes) -> bytes:
    """The header of HELLO with a value of the first device, its PCI entry or the first range replaced."""
    values = msgpack.unpackb(encode(HELLO))
    first_device, *devices = values["devices"]
    first_range, *ranges = values["ranges"]
    match where:
        case "device":
            entry, rest, outer = replaced(first_device, key, value), devices, "devices"
        case "pci":
            entry = replaced(first_device, "pci", replaced(first_device["pci"], key, value))
            rest, outer = devices, "devices"
        case _:
            entry, rest, outer = replaced(first_range, key, value), ranges, "ranges"
    return replaced(values, outer, b"\x92" + entry + msgpack.packb(rest)[1:])


PLACES = [
    *((type_.name, key) for type_, key in KEYS),
    *(("device", key) for key in DEVICE_KEYS),
    *(("pci", key) for key in PCI_KEYS),
    *(("range", key) for key in RANGE_KEYS),
]


def header_for(place: str, key: str, value: bytes) -> tuple[RecordType, bytes]:
    if place in RecordType.__members__:
        type_ = RecordType[place]
        return type_, replaced(msgpack.unpackb(encode(EXAMPLES[type_])), key, value)
    return RecordType.HELLO, hellos_with(place, key, value)


@pytest.mark.parametrize(("place", "key"), PLACES)
def test_a_value_that_is_wrong_anywhere(place: str, key: str) -> None:
    for what, value in WRONG.items():
        type_, header = header_for(place, key, value)
        try:
            header_is_refused(type_, header)
        except pytest.fail.Exception as failure:
            pytest.fail(f"{what} as {key}: {failure}")


@pytest.mark.parametrize(("place", "key"), PLACES)
def test_a_value_of_the_wrong_type(place: str, key: str) -> None:
    for value, right in TYPES.values():
        type_, header = header_for(place, key, value)
        if key in right or (place == "CAPTURE" and key == "size" and value == msgpack.packb(None)):
            decoded(type_, header)
        else:
            header_is_refused(type_, header)


BITS = {
    "chunk": 32,
    "credit": 64,
    "number": 32,
    "size": 64,
    "pos": 64,
    "page": 64,
    "pages": 32,
    "rounds": 32,
    "content": 64,
    "limit": 64,
    "stream": 32,
    "config_size": 64,
    "config_limit": 64,
    "data_size": 64,
    "vendor": 16,
    "device": 16,
    "subsystem_vendor": 16,
    "subsystem": 16,
    "class_code": 24,
    "revision": 8,
    "address": 64,
    "length": 64,
    "page_size": 32,
}


@pytest.mark.parametrize(("place", "key"), [place for place in PLACES if place[1] in BITS])
def test_a_number_that_does_not_fit(place: str, key: str) -> None:
    if BITS[key] < 64:
        header_is_refused(*header_for(place, key, msgpack.packb(1 << BITS[key])))
    for value in (msgpack.packb(b"1"), msgpack.packb("1"), msgpack.packb(True), msgpack.packb(False)):
        header_is_refused(*header_for(place, key, value))


@pytest.mark.parametrize(
    ("place", "key", "most"),
    [
        ("CAPTURE", "number", (1 << 32) - 1),
        ("CAPTURE", "size", (1 << 64) - 1),
        ("MEMORY", "pos", (1 << 64) - 1),
        ("BITMAP", "pages", limits.MAX_BITMAP_PAGES),
        ("WELCOME", "credit", (1 << 64) - 1),
        ("WELCOME", "chunk", CHUNK),
        ("pci", "vendor", 0xFFFF),
        ("pci", "class_code", 0xFFFFFF),
        ("pci", "revision", 0xFF),
        ("device", "config_size", limits.MAX_CONFIG),
        ("device", "config_limit", (1 << 64) - 1),
        ("device", "data_size", (1 << 64) - 1),
    ],
)
def test_the_largest_number_is_taken(place: str, key: str, most: int) -> None:
    decoded(*header_for(place, key, msgpack.packb(most)))


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("HELLO", "chunk", limits.MIN_CHUNK - 1),
        ("HELLO", "chunk", limits.MAX_CONTENT + 1),
        ("HELLO", "features", ["zstd", "zstd"]),
        ("HELLO", "features", [str(number) for number in range(17)]),
        ("HELLO", "devices", []),
        ("WELCOME", "credit", 2 * 1024 * 1024 + limits.CREDIT_SLACK - 1),
        ("ROUND", "number", 0),
        ("CAPTURE", "number", 0),
        ("ROUND_END", "number", 0),
        ("BITMAP", "pages", 0),
        ("BITMAP", "pages", limits.MAX_BITMAP_PAGES + 1),
        ("CONFIG", "size", 0),
        ("END", "rounds", 0),
        ("ACK", "number", 0),
        ("ACK", "of", "stopped"),
        ("STATE", "state", "running"),
        ("ABORT", "code", "other"),
        ("device", "stream", 0),
        ("device", "stream", 2),
        ("device", "config_size", limits.MAX_CONFIG + 1),
        ("device", "flags", ["p2p", "p2p"]),
        ("device", "flags", [str(number) for number in range(limits.MAX_FLAGS + 1)]),
        ("device", "flags", ["x" * (limits.MAX_FLAG + 1)]),
        ("range", "stream", 4),
        ("range", "page_size", 8192),
        ("range", "address", 1),
        ("range", "length", 0),
        ("range", "length", 1),
        ("range", "length", (1 << 64) - PAGE),
        ("range", "address", 0x1000),
    ],
)
def test_a_value_that_makes_no_sense(place: str, key: str, value: Any) -> None:
    header_is_refused(*header_for(place, key, msgpack.packb(value)))


@pytest.mark.parametrize("type_", RecordType)
def test_a_header_that_is_no_map_of_the_keys(type_: RecordType) -> None:
    values = msgpack.unpackb(encode(EXAMPLES[type_]))
    good = encode(EXAMPLES[type_])
    assert decoded(type_, good) == EXAMPLES[type_]
    assert decoded(type_, msgpack.packb(dict(reversed(values.items())))) == EXAMPLES[type_]
    for key in values:
        header_is_refused(type_, msgpack.packb({name: value for name, value in values.items() if name != key}), "map")
        twice = bytes([good[0] + 1]) + msgpack.packb(key) + msgpack.packb(values[key]) + good[1:]
        header_is_refused(type_, twice, "twice")
    header_is_refused(type_, msgpack.packb({**values, "more": 1}), "map")
    header_is_refused(type_, msgpack.packb({**values, 1: 1}))
    header_is_refused(type_, msgpack.packb({**values, b"more": 1}))
    header_is_refused(type_, msgpack.packb({**values, "stream": 1}), "map")
    header_is_refused(type_, good + b"\xc0")
    header_is_refused(type_, good + good)
    for length in range(len(good)):
        header_is_refused(type_, good[:length])
    for other in (b"\xc0", b"\x90", b"\x01", b"\xa0", b"\xc4\x00", msgpack.packb(list(values))):
        header_is_refused(type_, other)


def test_a_key_that_stands_twice_deep_inside() -> None:
    values = msgpack.unpackb(encode(HELLO))
    entry = msgpack.packb(values["ranges"][0])
    twice = bytes([entry[0] + 1]) + msgpack.packb("length") + msgpack.packb(PAGE) + entry[1:]
    header_is_refused(RecordType.HELLO, replaced(values, "ranges", b"\x91" + twice), "twice")


@pytest.mark.parametrize("type_", RecordType)
def test_a_record_on_the_wrong_kind_of_stream(type_: RecordType) -> None:
    stream = 0 if getattr(EXAMPLES[type_], "stream", 0) else 1
    with pytest.raises(StreamError, match=f"can't be on stream {stream}"):
        decode(type_, stream, 7, encode(EXAMPLES[type_]))


def test_counts_of_devices_and_ranges() -> None:
    values = msgpack.unpackb(encode(hello(device(1))))
    entry = values["devices"][0]
    for count, fits in ((limits.MAX_DEVICES, True), (limits.MAX_DEVICES + 1, False)):
        devices = [{**entry, "stream": number + 1} for number in range(count)]
        header = msgpack.packb({**values, "devices": devices})
        if fits:
            assert len(decoded(RecordType.HELLO, header).devices) == count  # type: ignore[union-attr]
        else:
            header_is_refused(RecordType.HELLO, header, "65 devices")
    ranges = tuple(RangeEntry(number + 2, number * PAGE, PAGE) for number in range(limits.MAX_RANGES))
    full = hello(device(1), ranges=ranges)
    assert decoded(RecordType.HELLO, encode(full)) == full


def test_the_largest_headers_fit_their_limits() -> None:
    long, longest = "x" * limits.MAX_NAME, "x" * limits.MAX_TEXT
    pci = HELLO.devices[0].pci
    devices = [
        device(
            number + 1,
            name=long,
            interface=long,
            version=longest,
            driver=long,
            kernel=long,
            flags=tuple(f"{flag:x>{limits.MAX_FLAG}}" for flag in range(limits.MAX_FLAGS)),
            config_size=limits.MAX_CONFIG,
            config_limit=(1 << 64) - 1,
            data_size=(1 << 64) - 1,
            pci=pci,
        )
        for number in range(limits.MAX_DEVICES)
    ]
    first = limits.MAX_DEVICES + 1
    ranges = tuple(RangeEntry(first + number, (1 << 40) + number * PAGE, PAGE) for number in range(limits.MAX_RANGES))
    features = tuple(f"{number:x>256}" for number in range(limits.MAX_FEATURES))
    full = dataclasses.replace(hello(*devices, ranges=ranges), software=long, features=features)
    assert len(encode(full)) <= limits.MAX_HELLO
    assert decoded(RecordType.HELLO, encode(full)) == full
    for record in (
        Welcome(SESSION, long, features, limits.MAX_CONTENT, (1 << 64) - 1),
        dataclasses.replace(ABORT, code="not-converged", reason=longest),
        Ack("running", (1 << 32) - 1, (1 << 64) - 1),
        Bitmap(1, (1 << 64) - 1, limits.MAX_BITMAP_PAGES),
        Config(1, (1 << 64) - 1, (1 << 64) - 1),
    ):
        assert len(encode(record)) <= limits.MAX_HEADER


@pytest.mark.parametrize("type_", RecordType)
def test_deep_nesting_instead_of_a_header(type_: RecordType) -> None:
    for depth in (1, 500, 990, 1010, 1022, 1030, limits.MAX_HEADER - 1):
        header_is_refused(type_, nested(depth))
        header_is_refused(type_, nested(depth, maps=True))
        header_is_refused(type_, b"\x92" * depth + b"\x90" * (depth + 1))


def test_a_bad_header_is_named_by_the_session() -> None:
    pair = Pair.greeted(hello())
    frame = b"".join(pack_frame(RecordType.ROUND, 0, 2, nested(1000), (), 0, 0, SEED))
    with pytest.raises(StreamError, match=r"^ROUND record 2 has a bad header"):
        take(pair.target, frame)


def test_the_body_is_checked_before_it_is_decoded() -> None:
    pair = Pair.greeted(hello())
    frame = bytearray(pair.forged(raw(Round(1))))
    frame[PREFIX_SIZE:] = b"\xc1" * (len(frame) - PREFIX_SIZE)
    with pytest.raises(StreamError, match=r"^ROUND record 2 has content that does not match its check value$"):
        take(pair.target, bytes(frame))


@pytest.mark.parametrize(
    ("record", "bitmap", "match"),
    [
        (Bitmap(2, 0, 20), b"\xff\xff", "2 bytes for 20 pages"),
        (Bitmap(2, 0, 20), b"\xff\xff\x0f\x00", "4 bytes for 20 pages"),
        (Bitmap(2, 0, 16), b"\xff\xff\x0f", "3 bytes for 16 pages"),
        (Bitmap(2, 0, 20), b"\xff\xff\x1f", "beyond its last page"),
        (Bitmap(2, 0, 1), b"\x02", "beyond its last page"),
        (Bitmap(2, 0, 20), bytes(3), "announces no page"),
        (Bitmap(2, 0, 21), b"\xff\xff\x1f", "not pages from 0 to 19"),
        (Bitmap(2, 20, 1), b"\x01", "not pages from 0 to 19"),
        (Bitmap(2, (1 << 64) - 1, 1), b"\x01", "not pages from 0 to 19"),
        (Bitmap(2, 0, limits.MAX_BITMAP_PAGES), b"\xff" * 65536, "not pages from 0 to 19"),
        (Bitmap(1, 0, 20), b"\xff\xff\x0f", "no range"),
        (Bitmap(3, 0, 20), b"\xff\xff\x0f", "no range"),
    ],
)
def test_a_bitmap_that_is_refused(record: Bitmap, bitmap: bytes, match: str) -> None:
    pair = Pair.greeted(hello(ranges=(RangeEntry(2, 0, 20 * PAGE),)))
    pair.say(Round(1))
    pair.refuses(record, bitmap, match=match)


def test_a_config_of_more_than_a_gibibyte() -> None:
    pair = Pair.greeted(hello(device(1, device_memory=False)))
    for record in (State(), Round(1), RoundEnd(1)):
        pair.say(record)
    pair.refuses(Config(1, 0, limits.MAX_CONFIG + 1), b"c", match="the limit is 1073741824")
