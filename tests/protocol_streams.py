"""What the tests of the protocol share: a small conversation with every record in it, a reader of stored streams that
works as the pipeline does, and two sessions joined without anything between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

from vfiostream.errors import LocalProtocolError, StreamError
from vfiostream.protocol import limits
from vfiostream.protocol.framing import FLAG_ZERO, FLAG_ZSTD, PREFIX_SIZE, pack_frame, session_seed
from vfiostream.protocol.payload import Decompressor
from vfiostream.protocol.records import (
    Abort,
    Ack,
    Bitmap,
    Capture,
    Commit,
    Config,
    Credit,
    DeviceEntry,
    End,
    Hello,
    Memory,
    Pages,
    Pci,
    PciEntry,
    RangeEntry,
    Record,
    RecordType,
    Round,
    RoundEnd,
    State,
    Welcome,
    encode,
    name_of,
)
from vfiostream.protocol.sessions import Phase, SourceSession, TargetSession

PAGE = limits.PAGE_SIZE
SESSION = bytes(range(1, 17))
SOFTWARE = "golden 1"
CHUNK = 2 * 1024 * 1024


def device(stream: int, **changes: Any) -> DeviceEntry:
    """A device without PCI config space; ``changes`` are fields of the entry."""
    values: dict[str, Any] = {
        "name": f"device {stream}",
        "interface": "four-region",
        "version": None,
        "driver": None,
        "kernel": None,
        "flags": (),
        "device_memory": True,
        "dirty_tracking": False,
        "config_size": 16,
        "config_limit": 4096,
        "data_size": None,
        "pci": None,
    }
    return DeviceEntry(stream, **{**values, **changes})


def hello(
    *devices: DeviceEntry, ranges: tuple[RangeEntry, ...] = (), chunk: int = limits.MIN_CHUNK, zstd: bool = True
) -> Hello:
    """A HELLO with these devices (default: one)."""
    return Hello(SESSION, SOFTWARE, ("zstd",) if zstd else (), chunk, devices or (device(1),), ranges)


def welcome(chunk: int = limits.MIN_CHUNK, credit: int = 1 << 30) -> Welcome:
    """A WELCOME that agrees to what :func:`hello` asks for."""
    return Welcome(SESSION, SOFTWARE, ("zstd",), chunk, credit)


class Frame(NamedTuple):
    """A record with its payload as the flags say, and the content that the payload stands for."""

    record: Record
    payload: bytes = b""
    flags: int = 0
    content: bytes = b""


def raw(record: Record, content: bytes = b"") -> Frame:
    return Frame(record, content, 0, content)


def zeros(record: Record, size: int) -> Frame:
    return Frame(record, b"", FLAG_ZERO, bytes(size))


# zstd frames as literals: what a compressor makes of the same content changes from version to version.
ZSTD_PAGE = bytes.fromhex("28b52ffd60000f4d00001056560100fbf70116")
ZSTD_BITMAP = bytes.fromhex("28b52ffd20324d000018000080010044000b")
PAGE_CONTENT = b"V" * PAGE
BITMAP_CONTENT = bytes(49) + b"\x80"

HELLO = Hello(
    session=SESSION,
    software=SOFTWARE,
    features=("zstd",),
    chunk=CHUNK,
    devices=(
        device(
            1,
            name="nic",
            version="1.2",
            driver="nic-vfio",
            kernel="6.8.0-rc1",
            flags=("device-memory", "system-memory"),
            dirty_tracking=True,
            data_size=18,
            config_size=5,
            pci=PciEntry(0x1AF4, 0x1041, 0x1AF4, 0x1100, 0x020000, 1),
        ),
        device(2, name="Gerät", device_memory=False, config_size=2),
    ),
    ranges=(RangeEntry(3, 0x100000000, 9 * PAGE), RangeEntry(4, 0, 400 * PAGE)),
)
PCI_CONTENT = bytes.fromhex("f41a4110") + bytes(range(4, 64))

FORWARD: list[Frame] = [
    raw(HELLO),
    raw(Round(1)),
    raw(Capture(1, 1, 10)),
    raw(Memory(1, 0), b"memory"),
    raw(Bitmap(3, 0, 9), b"\xff\x01"),
    raw(Memory(1, 6), b"-end"),
    zeros(Pages(3, 0), 8 * PAGE),
    raw(Capture(1, 2, 0)),
    Frame(Pages(3, 8 * PAGE), ZSTD_PAGE, FLAG_ZSTD, PAGE_CONTENT),
    raw(Bitmap(4, 0, 400), b"\xff" * 50),
    zeros(Pages(4, 0), 400 * PAGE),
    raw(RoundEnd(1)),
    raw(State()),
    raw(Round(2)),
    raw(Capture(1, 3, 4)),
    Frame(Bitmap(4, 0, 400), ZSTD_BITMAP, FLAG_ZSTD, BITMAP_CONTENT),
    zeros(Memory(1, 0), 4),
    Frame(Pages(4, 0), ZSTD_PAGE, FLAG_ZSTD, PAGE_CONTENT),
    raw(RoundEnd(2)),
    raw(Pci(1), PCI_CONTENT),
    raw(Config(1, 0, 5), b"con"),
    zeros(Config(2, 0, 2), 2),
    raw(Config(1, 3, 5), b"fi"),
    raw(End(2, 10 + 4 + 9 * PAGE + 401 * PAGE + 64 + 5 + 2)),
    raw(Commit()),
]
"""What a source sends, over a link and into a file."""

REPLIES: dict[int, list[Record]] = {
    0: [Welcome(SESSION, "golden 2", ("zstd",), CHUNK, CHUNK + limits.CREDIT_SLACK)],
    10: [Credit(3 * CHUNK)],
    11: [Ack("round", 1, 3 * CHUNK)],
    23: [Ack("loaded", 2, 4 * CHUNK)],
    24: [Ack("running", 2, 4 * CHUNK)],
}
"""What a target answers, by the index of the frame in FORWARD that has just come."""

ABORT = Abort("incompatible", "no such device", stopped=True)
"""What a target may answer to the HELLO instead."""


def send(session: SourceSession, frame: Frame) -> bytes:
    """Return the frame as it goes out."""
    return b"".join(
        session.send(
            frame.record,
            frame.payload,
            flags=frame.flags,
            content_size=len(frame.content),
            bitmap=frame.content if isinstance(frame.record, Bitmap) else None,
        )
    )


def stored_frames() -> list[bytes]:
    """FORWARD as a checkpoint, frame by frame."""
    session = SourceSession(HELLO, answers=False)
    return [send(session, frame) for frame in FORWARD]


def take(session: SourceSession | TargetSession, frame: bytes) -> Record:
    """Give one whole frame to a session in the order docs/format.md asks for."""
    prefix = session.parse(frame[:PREFIX_SIZE])
    header, payload = frame[PREFIX_SIZE : PREFIX_SIZE + prefix.header_size], frame[PREFIX_SIZE + prefix.header_size :]
    session.check(prefix, header, [payload])
    if isinstance(session, SourceSession):
        return session.receive(prefix, header)
    where = name_of(prefix.type, prefix.sequence)
    bitmap = None
    if prefix.type == RecordType.BITMAP:
        bitmap = Decompressor().content(payload, prefix.flags, prefix.content_size, where)
    return session.receive(prefix, header, bitmap)


def records_in(data: bytes) -> Iterator[Record]:
    """Yield the records of a stored stream, each when it and its content have been found sound."""
    session = TargetSession(chunk=limits.MAX_CONTENT, answers=False)
    decompressor = Decompressor()
    rest = memoryview(data)
    while rest or session.phase is not Phase.DONE:
        if len(rest) < PREFIX_SIZE:
            raise StreamError(session.next_record, f"is cut off: {len(rest)} bytes of its prefix are there")
        prefix = session.parse(rest[:PREFIX_SIZE])
        where = name_of(prefix.type, prefix.sequence)
        if len(rest) < prefix.frame_size:
            raise StreamError(where, f"is cut off: {len(rest)} of its {prefix.frame_size} bytes are there")
        header = rest[PREFIX_SIZE : PREFIX_SIZE + prefix.header_size]
        payload = rest[PREFIX_SIZE + prefix.header_size : prefix.frame_size]
        rest = rest[prefix.frame_size :]
        session.check(prefix, header, [payload])
        if prefix.type == RecordType.BITMAP:
            bitmap = decompressor.content(payload, prefix.flags, prefix.content_size, where)
            record = session.receive(prefix, header, bitmap)
        else:
            record = session.receive(prefix, header)
            decompressor.content(payload, prefix.flags, prefix.content_size, where)
        yield record


def read_stream(data: bytes) -> list[Record]:
    """Return the records of a stored stream; raises StreamError where it is not a whole, sound one."""
    return list(records_in(data))


@dataclass
class Pair:
    """A source and a target with nothing between them. Sessions raise for what must not be sent, so a frame that a
    correct source would not send is forged here without one.
    """

    source: SourceSession
    target: TargetSession
    sent: int = 0
    answered: int = 0
    seed: int = 0

    @classmethod
    def start(cls, greeting: Hello, *, answers: bool = True) -> Pair:
        target = TargetSession(chunk=limits.MAX_CONTENT, answers=answers)
        return cls(SourceSession(greeting, answers=answers), target)

    @classmethod
    def greeted(cls, greeting: Hello, *, credit: int = 1 << 30) -> Pair:
        pair = cls.start(greeting)
        pair.say(greeting)
        pair.answer(Welcome(SESSION, SOFTWARE, greeting.features, greeting.chunk, credit))
        return pair

    def say(self, record: Record, content: bytes = b"") -> None:
        """The source sends, the target takes."""
        assert take(self.target, send(self.source, raw(record, content))) == record
        self.sent += 1
        if isinstance(record, Hello):
            self.seed = session_seed(record.session)

    def answer(self, record: Record) -> None:
        """The target sends, the source takes."""
        assert take(self.source, b"".join(self.target.send(record))) == record
        self.answered += 1

    def forged(self, frame: Frame, *, answer: bool = False) -> bytes:
        """The frame that would be next in its direction if somebody sent it."""
        before = self.answered if answer else self.sent
        stream: int = getattr(frame.record, "stream", 0)
        seed = self.seed if before else 0
        header = encode(frame.record)
        fields = (frame.record.type, stream, before + 1, header, [frame.payload], frame.flags, len(frame.content), seed)
        return b"".join(pack_frame(*fields))

    def refuses(self, record: Record, content: bytes = b"", *, match: str) -> None:
        """The source does not send this frame, and the target does not take it. The source can go on afterwards."""
        frame = raw(record, content)
        with pytest.raises(LocalProtocolError, match=match):
            send(self.source, frame)
        self.target_refuses(frame, match=match)

    def target_refuses(self, frame: Frame, *, match: str | None = None) -> None:
        """The target, which is of no use afterwards, does not take this frame."""
        with pytest.raises(StreamError, match=match) as caught:
            take(self.target, self.forged(frame))
        assert caught.value.record == name_of(frame.record.type, self.sent + 1)

    def source_refuses(self, answer: Frame, *, match: str | None = None) -> None:
        """The source, which is of no use afterwards, does not take this answer."""
        with pytest.raises(StreamError, match=match) as caught:
            take(self.source, self.forged(answer, answer=True))
        assert caught.value.record == name_of(answer.record.type, self.answered + 1)
