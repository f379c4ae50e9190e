"""The conversation: which record may come when, from whom, and whether its positions fit (``docs/format.md``, "Order").

Sans-IO: a session takes records and bytes and returns buffers and records. The order is a literal table of phases,
shared by both ends; the positions are checked by :class:`_Contents`, on the way out as on the way in. What the peer
does wrong is a :class:`~vfiostream.errors.StreamError`, what we do wrong a
:class:`~vfiostream.errors.LocalProtocolError`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from vfiostream import _accel
from vfiostream.buffers import Buffer
from vfiostream.errors import LocalProtocolError, StreamError
from vfiostream.protocol import framing, limits, records
from vfiostream.protocol.framing import Prefix
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
    RangeEntry,
    Record,
    RecordType,
    Round,
    RoundEnd,
    State,
    Welcome,
)

log = logging.getLogger("vfiostream.protocol")


class Phase(Enum):
    """Where a migration is."""

    __hash__ = object.__hash__  # Members are looked up once a frame; Enum's own hash is Python code.

    START = auto()
    GREETED = auto()
    OPEN = auto()
    """Between rounds, the source's devices run."""
    ROUND = auto()
    ROUND_SENT = auto()
    STOPPED = auto()
    """The source's devices are stopped; the last round follows."""
    LAST_ROUND = auto()
    CONFIG = auto()
    """The devices' config follows."""
    ENDED = auto()
    LOADED = auto()
    COMMITTED = auto()
    """The target owns the devices."""
    DONE = auto()
    ABORTED = auto()


class Step(Enum):
    """What moves a migration from phase to phase: the records, with ACK and the data records told apart."""

    __hash__ = object.__hash__  # as above

    HELLO = "HELLO"
    WELCOME = "WELCOME"
    ROUND = "ROUND"
    DATA = "CAPTURE, MEMORY, BITMAP, PAGES"
    ROUND_END = "ROUND_END"
    ROUND_ACK = "ACK round"
    STATE = "STATE stopped"
    CONFIG = "PCI, CONFIG"
    END = "END"
    LOADED_ACK = "ACK loaded"
    COMMIT = "COMMIT"
    RUNNING_ACK = "ACK running"
    CREDIT = "CREDIT"
    ABORT = "ABORT"


_STEPS: dict[type[Record], Step] = {
    Hello: Step.HELLO,
    Welcome: Step.WELCOME,
    Round: Step.ROUND,
    Capture: Step.DATA,
    Memory: Step.DATA,
    Bitmap: Step.DATA,
    Pages: Step.DATA,
    RoundEnd: Step.ROUND_END,
    State: Step.STATE,
    Pci: Step.CONFIG,
    Config: Step.CONFIG,
    End: Step.END,
    Credit: Step.CREDIT,
    Commit: Step.COMMIT,
    Abort: Step.ABORT,
}
_ACKS = {"round": Step.ROUND_ACK, "loaded": Step.LOADED_ACK, "running": Step.RUNNING_ACK}

TARGET_STEPS = frozenset({Step.WELCOME, Step.ROUND_ACK, Step.LOADED_ACK, Step.RUNNING_ACK, Step.CREDIT})
"""What only a target says; ABORT is said by both, everything else by the source."""

LIVE: dict[tuple[Phase, Step], Phase] = {
    (Phase.START, Step.HELLO): Phase.GREETED,
    (Phase.GREETED, Step.WELCOME): Phase.OPEN,
    (Phase.OPEN, Step.ROUND): Phase.ROUND,
    (Phase.ROUND, Step.DATA): Phase.ROUND,
    (Phase.ROUND, Step.ROUND_END): Phase.ROUND_SENT,
    (Phase.ROUND_SENT, Step.ROUND_ACK): Phase.OPEN,
    (Phase.OPEN, Step.STATE): Phase.STOPPED,
    (Phase.STOPPED, Step.ROUND): Phase.LAST_ROUND,
    (Phase.LAST_ROUND, Step.DATA): Phase.LAST_ROUND,
    (Phase.LAST_ROUND, Step.ROUND_END): Phase.CONFIG,
    (Phase.CONFIG, Step.CONFIG): Phase.CONFIG,
    (Phase.CONFIG, Step.END): Phase.ENDED,
    (Phase.ENDED, Step.LOADED_ACK): Phase.LOADED,
    (Phase.LOADED, Step.COMMIT): Phase.COMMITTED,
    (Phase.COMMITTED, Step.RUNNING_ACK): Phase.DONE,
    (Phase.OPEN, Step.CREDIT): Phase.OPEN,
    (Phase.ROUND, Step.CREDIT): Phase.ROUND,
    (Phase.ROUND_SENT, Step.CREDIT): Phase.ROUND_SENT,
    (Phase.STOPPED, Step.CREDIT): Phase.STOPPED,
    (Phase.LAST_ROUND, Step.CREDIT): Phase.LAST_ROUND,
    (Phase.CONFIG, Step.CREDIT): Phase.CONFIG,
    (Phase.ENDED, Step.CREDIT): Phase.ENDED,
    (Phase.START, Step.ABORT): Phase.ABORTED,
    (Phase.GREETED, Step.ABORT): Phase.ABORTED,
    (Phase.OPEN, Step.ABORT): Phase.ABORTED,
    (Phase.ROUND, Step.ABORT): Phase.ABORTED,
    (Phase.ROUND_SENT, Step.ABORT): Phase.ABORTED,
    (Phase.STOPPED, Step.ABORT): Phase.ABORTED,
    (Phase.LAST_ROUND, Step.ABORT): Phase.ABORTED,
    (Phase.CONFIG, Step.ABORT): Phase.ABORTED,
    (Phase.ENDED, Step.ABORT): Phase.ABORTED,
    (Phase.LOADED, Step.ABORT): Phase.ABORTED,
    (Phase.COMMITTED, Step.ABORT): Phase.ABORTED,
}
"""A migration over a link: both ends walk through it."""

STORED: dict[tuple[Phase, Step], Phase] = {
    (Phase.START, Step.HELLO): Phase.OPEN,
    (Phase.OPEN, Step.ROUND): Phase.ROUND,
    (Phase.ROUND, Step.DATA): Phase.ROUND,
    (Phase.ROUND, Step.ROUND_END): Phase.OPEN,
    (Phase.OPEN, Step.STATE): Phase.STOPPED,
    (Phase.STOPPED, Step.ROUND): Phase.LAST_ROUND,
    (Phase.LAST_ROUND, Step.DATA): Phase.LAST_ROUND,
    (Phase.LAST_ROUND, Step.ROUND_END): Phase.CONFIG,
    (Phase.CONFIG, Step.CONFIG): Phase.CONFIG,
    (Phase.CONFIG, Step.END): Phase.LOADED,
    (Phase.LOADED, Step.COMMIT): Phase.DONE,
}
"""A checkpoint: the same stream, and nobody answers."""


def _name(prefix: Prefix) -> str:
    return records.name_of(prefix.type, prefix.sequence)


def _step(record: Record) -> Step:
    return _ACKS[record.of] if isinstance(record, Ack) else _STEPS[type(record)]


@dataclass(slots=True)
class _DeviceProgress:
    captures: int = 0
    left: int = 0
    """Bytes of the open capture that are still to come."""
    pos: int = 0
    pci: bool = False
    config_size: int = 0
    config_pos: int = 0


@dataclass(slots=True)
class _RangeProgress:
    next_page: int = 0
    """First page that a window of this round may start at."""
    left: int = 0
    pos: int = 0
    announced: int = 0
    """Pages in this round."""


def _misplaced(size: int, pos: int, left: int, expected: int) -> str:
    return f"has {size} bytes at {pos}, where {left} bytes at {expected} are to come"


class _Contents:
    """What has come of what was announced. :meth:`take` raises ValueError for a record that does not fit."""

    def __init__(self, hello: Hello) -> None:
        self._devices = {entry.stream: (entry, _DeviceProgress()) for entry in hello.devices}
        self._ranges: dict[int, tuple[RangeEntry, _RangeProgress]] = {
            entry.stream: (entry, _RangeProgress()) for entry in hello.ranges
        }
        self.rounds = 0
        self.content = 0

    def take(self, record: Record, content_size: int, bitmap: Buffer | None) -> None:
        match record:
            case Memory():
                device = self._device(record.stream)[1]
                if record.pos != device.pos or content_size > device.left:
                    raise ValueError(_misplaced(content_size, record.pos, device.left, device.pos))
                device.pos += content_size
                device.left -= content_size
                self.content += content_size
            case Pages():
                guest = self._range(record.stream)[1]
                if record.pos != guest.pos or content_size > guest.left or content_size % limits.PAGE_SIZE:
                    raise ValueError(_misplaced(content_size, record.pos, guest.left, guest.pos))
                guest.pos += content_size
                guest.left -= content_size
                self.content += content_size
            case Round():
                if record.number != self.rounds + 1:
                    raise ValueError(f"starts round {record.number}, round {self.rounds + 1} is next")
                self.rounds = record.number
                for _, guest in self._ranges.values():
                    guest.next_page = guest.announced = 0
            case Capture():
                self._capture(record)
            case Bitmap():
                assert bitmap is not None
                self._bitmap(record, bitmap)
            case RoundEnd():
                self._round_end(record)
            case Pci():
                entry, device = self._device(record.stream)
                if entry.pci is None or device.pci:
                    raise ValueError(f"is not expected for stream {record.stream}")
                device.pci = True
                self.content += content_size
            case Config():
                self._config(record, content_size)
            case End():
                self._end(record)
            case _:
                pass

    def _device(self, stream: int) -> tuple[records.DeviceEntry, _DeviceProgress]:
        if stream not in self._devices:
            raise ValueError(f"is on stream {stream}, which is no device")
        return self._devices[stream]

    def _range(self, stream: int) -> tuple[RangeEntry, _RangeProgress]:
        if stream not in self._ranges:
            raise ValueError(f"is on stream {stream}, which is no range of guest memory")
        return self._ranges[stream]

    def _capture(self, record: Capture) -> None:
        entry, device = self._device(record.stream)
        if not entry.device_memory:
            raise ValueError(f"is for {entry.name}, which has no device memory")
        if device.left:
            raise ValueError(f"comes while {device.left} bytes of the capture before are missing")
        if record.number != device.captures + 1:
            raise ValueError(f"is capture {record.number} of {entry.name}, capture {device.captures + 1} is next")
        device.captures += 1
        device.left, device.pos = record.size, 0

    def _bitmap(self, record: Bitmap, bitmap: Buffer) -> None:
        entry, guest = self._range(record.stream)
        left = sum(progress.left for _, progress in self._ranges.values())
        if left:
            raise ValueError(f"comes while {left} bytes of pages announced before are missing")
        if record.page < guest.next_page or record.page + record.pages > entry.pages:
            raise ValueError(
                f"covers pages {record.page} to {record.page + record.pages - 1}, not pages from "
                f"{guest.next_page} to {entry.pages - 1}"
            )
        if len(bitmap) != (record.pages + 7) // 8:
            raise ValueError(f"has {len(bitmap)} bytes for {record.pages} pages")
        if record.pages % 8 and bitmap[-1] >> record.pages % 8:
            raise ValueError("has bits set beyond its last page")
        count = _accel.bitmap_count(bitmap, record.pages)
        if not count:
            raise ValueError("announces no page")
        guest.next_page = record.page + record.pages
        guest.announced += count
        guest.left, guest.pos = count * limits.PAGE_SIZE, 0

    def _round_end(self, record: RoundEnd) -> None:
        if record.number != self.rounds:
            raise ValueError(f"ends round {record.number} in round {self.rounds}")
        for entry, device in self._devices.values():
            if device.left:
                raise ValueError(f"comes while {device.left} bytes of {entry.name} are missing")
            if self.rounds == 1 and entry.device_memory and not device.captures:
                raise ValueError(f"ends the first round without a capture of {entry.name}")
        for area, guest in self._ranges.values():
            if guest.left:
                raise ValueError(f"comes while {guest.left} bytes of guest memory at {area.address:#x} are missing")
            if self.rounds == 1 and guest.announced != area.pages:
                raise ValueError(
                    f"ends the first round with {guest.announced} of {area.pages} pages of guest memory "
                    f"at {area.address:#x}"
                )

    def _config(self, record: Config, content_size: int) -> None:
        entry, device = self._device(record.stream)
        if entry.pci is not None and not device.pci:
            raise ValueError(f"comes before the PCI config space of {entry.name}")
        if record.size > limits.MAX_CONFIG:
            raise ValueError(f"announces {record.size} bytes of config (the limit is {limits.MAX_CONFIG})")
        size = device.config_size or record.size
        if record.size != size or record.pos != device.config_pos or content_size > record.size - record.pos:
            raise ValueError(
                f"has {content_size} bytes at {record.pos} of {record.size}, where byte {device.config_pos} "
                f"of {size} is next"
            )
        device.config_size = size
        device.config_pos += content_size
        self.content += content_size

    def _end(self, record: End) -> None:
        for entry, device in self._devices.values():
            if entry.pci is not None and not device.pci:
                raise ValueError(f"comes before the PCI config space of {entry.name}")
            if device.config_pos != device.config_size or (entry.config_size and not device.config_size):
                raise ValueError(f"comes before the whole config of {entry.name}")
        if (record.rounds, record.content) != (self.rounds, self.content):
            raise ValueError(
                f"counts {record.rounds} rounds and {record.content} bytes, {self.rounds} and {self.content} came"
            )


class _Session:
    """What both ends share: the table, the sequence numbers, the positions."""

    def __init__(
        self, table: dict[tuple[Phase, Step], Phase], sends: frozenset[Step], receives: frozenset[Step]
    ) -> None:
        self.phase = Phase.START
        self._table = table
        self._sends = sends
        self._receives = receives
        self._sent = 0
        self._received = 0
        self._hello: Hello | None = None
        self._contents: _Contents | None = None
        self._limit = 0
        """Bytes of frames that the target's credit covers altogether."""
        self._seed = 0
        """Of the checks of every frame but the first of a direction, known once the HELLO has passed."""
        self.chunk = limits.MIN_CHUNK
        """Most content of a frame; final once HELLO and WELCOME have passed."""
        self.features: tuple[str, ...] = ()
        """What both ends agreed to use."""

    @property
    def rounds(self) -> int:
        """Rounds that have begun."""
        return self._contents.rounds if self._contents else 0

    @property
    def content(self) -> int:
        """Bytes of content that have been announced by data records."""
        return self._contents.content if self._contents else 0

    @property
    def next_record(self) -> str:
        """What messages call the frame that should come next."""
        return f"record {self._received + 1}"

    def parse(self, prefix: Buffer) -> Prefix:
        """Check the first 48 bytes of the next frame from the peer, before header and payload are read. Raises
        :class:`~vfiostream.errors.StreamError`.
        """
        try:
            parsed = framing.parse_prefix(prefix, self._seed if self._received else 0)
        except ValueError as error:
            raise StreamError(self.next_record, str(error)) from error
        try:
            if parsed.sequence != self._received + 1:
                raise ValueError(f"is out of order: record {self._received + 1} should come here")
            if not records.is_known(parsed.type):
                raise ValueError("is not part of this format")
            if parsed.header_size > limits.MAX_HEADER and parsed.type != RecordType.HELLO:
                raise ValueError(f"has a header of {parsed.header_size} bytes (the limit is {limits.MAX_HEADER})")
            self._check_content(parsed.type, parsed.flags, parsed.content_size)
        except ValueError as error:
            raise StreamError(_name(parsed), str(error)) from error
        return parsed

    def check(self, prefix: Prefix, header: Buffer, payload: Sequence[Buffer]) -> None:
        """Check header and payload (in the pieces it was received in) against their prefix. Raises
        :class:`~vfiostream.errors.StreamError`.
        """
        seed = self._seed if self._received else 0
        if framing.body_check(header, payload, seed) != prefix.body_check:
            raise StreamError(_name(prefix), "has content that does not match its check value")

    def _check_content(self, type_: int, flags: int, content_size: int) -> None:
        """Raise ValueError for content that no record of this type has, or that was not agreed on."""
        if flags == framing.FLAG_ZSTD and "zstd" not in self.features:
            raise ValueError("is compressed, and the ends did not agree on that")
        if flags == framing.FLAG_SPARSE:
            if "sparse" not in self.features:
                raise ValueError("is sparse, and the ends did not agree on that")
            if type_ not in (RecordType.MEMORY, RecordType.PAGES):
                raise ValueError("can't be sparse")
        least, most = records.CONTENT.get(type_, (0, 0))
        most = min(most, self.chunk)
        if not least <= content_size <= most:
            raise ValueError(f"has {content_size} bytes of content, not {least} to {most}")

    def _accept(self, prefix: Prefix, header: Buffer, bitmap: Buffer | None) -> Record:
        """Decode and check a frame whose body check has passed."""
        record = records.decode(prefix.type, prefix.stream, prefix.sequence, header)
        step = _step(record)
        try:
            if step not in self._receives or (self.phase, step) not in self._table:
                raise ValueError(f"must not come now (the migration is in phase {self.phase.name})")
            self._settle(record)
            if self._contents is not None:
                self._contents.take(record, prefix.content_size, bitmap)
        except ValueError as error:
            raise StreamError(_name(prefix), str(error)) from error
        self._move(step)
        self._received += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug("in  %s %s, %d bytes", _name(prefix), record, prefix.frame_size)
        return record

    def _settle(self, record: Record) -> None:
        """Hold both ends to what one of them says: chunk, features, credit. Raises ValueError for what does not fit."""
        match record:
            case Hello():
                self._hello = record
                self._contents = _Contents(record)
                self._seed = framing.session_seed(record.session)
                self.features, self.chunk = record.features, record.chunk
            case Welcome():
                assert self._hello is not None
                if record.session != self._hello.session:
                    raise ValueError("is for another session")
                if not set(record.features) <= set(self._hello.features):
                    raise ValueError("agrees to features that were not asked for")
                if record.chunk > self._hello.chunk:
                    raise ValueError(f"has a chunk of {record.chunk} bytes, where {self._hello.chunk} were offered")
                self.features, self.chunk, self._limit = record.features, record.chunk, record.credit
            case Credit() | Ack():
                if isinstance(record, Ack) and record.number != self.rounds:
                    raise ValueError(f"is for round {record.number}, where round {self.rounds} is the last")
                if record.limit < self._limit:
                    raise ValueError(f"takes back credit: {record.limit} after {self._limit}")
                self._limit = record.limit
            case _:
                pass

    def _check_phase(self, record: Record) -> None:
        """Raise LocalProtocolError for a record that this end must not send now."""
        step = _step(record)
        if step not in self._sends or (self.phase, step) not in self._table:
            raise LocalProtocolError(f"{record.type.name} must not be sent in phase {self.phase.name}")

    def _emit(
        self,
        record: Record,
        header: bytes,
        payload: Sequence[Buffer],
        flags: int,
        content_size: int,
        bitmap: Buffer | None,
        check: int | None = None,
    ) -> list[Buffer]:
        """Make the next frame, of a record that may be sent now."""
        try:
            self._check_content(record.type, flags, content_size)
            self._settle(record)
            if self._contents is not None:
                self._contents.take(record, content_size, bitmap)
        except ValueError as error:
            raise LocalProtocolError(f"{record.type.name} {error}") from error
        self._move(_step(record))
        self._sent += 1
        stream = records.stream_of(record)
        frame = framing.pack_frame(
            record.type,
            stream,
            self._sent,
            header,
            payload,
            flags,
            content_size,
            self._seed if self._sent > 1 else 0,
            check,
        )
        if log.isEnabledFor(logging.DEBUG):
            log.debug("out %s record %d %s, %d bytes", record.type.name, self._sent, record, sum(map(len, frame)))
        return frame

    def _move(self, step: Step) -> None:
        phase = self._table[self.phase, step]
        if phase is not self.phase:
            log.debug("phase %s -> %s on %s", self.phase.name, phase.name, step.value)
        self.phase = phase


_SOURCE_STEPS = frozenset(Step) - TARGET_STEPS


class SourceSession(_Session):
    """The source's end of a migration, or the writer of a checkpoint (``answers=False``)."""

    def __init__(self, hello: Hello, *, answers: bool) -> None:
        super().__init__(LIVE if answers else STORED, _SOURCE_STEPS, TARGET_STEPS | {Step.ABORT})
        self._offer = hello
        self._answers = answers
        self._spent = 0

    def send(
        self,
        record: Record,
        *payload: Buffer,
        flags: int = 0,
        content_size: int | None = None,
        bitmap: Buffer | None = None,
        check: int | None = None,
    ) -> list[Buffer]:
        """Return the buffers of the next frame, to be sent in this order. ``payload``, in pieces, is as the flags say,
        of ``content_size`` bytes of content (default: the payload is the content); ``bitmap`` is the content of a
        BITMAP; ``check`` is the XXH3-64 of :meth:`head` and payload where somebody has it who copied the payload. The
        payload stays the caller's and must not change until it is sent. Raises
        :class:`~vfiostream.errors.LocalProtocolError` where the record must not be sent now, or exceeds the credit; the
        session is then as it was.
        """
        self._check_phase(record)
        if isinstance(record, Hello) and record != self._offer:
            raise LocalProtocolError("HELLO is not the one that this session was made for")
        header = records.encode(record)
        payload_size = sum(map(len, payload))
        cost = 0 if _step(record) in _FREE else framing.PREFIX_SIZE + len(header) + payload_size
        if cost and not self.affords(cost):
            excess = self._spent + cost - self._limit
            raise LocalProtocolError(f"{record.type.name} exceeds the credit that was given by {excess} bytes")
        size = payload_size if content_size is None else content_size
        frame = self._emit(record, header, payload, flags, size, bitmap, check)
        self._spent += cost
        return frame

    def head(self, record: Record) -> tuple[bytes, int]:
        """The header that ``record`` will have, and the seed of its check value: for whoever copies the payload and
        hashes it with that. Not for a HELLO.
        """
        return records.encode(record), self._seed

    def affords(self, frame_size: int) -> bool:
        """Whether the target's credit covers a frame of ``frame_size`` bytes now."""
        return not self._answers or self._spent + frame_size <= self._limit

    def receive(self, prefix: Prefix, header: Buffer) -> Record:
        """Take a frame from the target, whose prefix :meth:`parse` returned and whose body check has passed. Raises
        :class:`~vfiostream.errors.StreamError`.
        """
        return self._accept(prefix, header, None)


_FREE = frozenset({Step.HELLO, Step.COMMIT, Step.ABORT})
"""What costs no credit."""


class TargetSession(_Session):
    """The target's end of a migration, or the reader of a checkpoint (``answers=False``)."""

    def __init__(self, *, chunk: int, answers: bool) -> None:
        """``chunk`` is the most that there is room for. Over a link, the WELCOME that is sent says what holds: at most
        this and at most the HELLO's.
        """
        super().__init__(LIVE if answers else STORED, TARGET_STEPS | {Step.ABORT}, _SOURCE_STEPS)
        self._answers = answers
        self._most = chunk
        self.spent = 0
        """Bytes of frames that count against the credit and have come."""

    def receive(self, prefix: Prefix, header: Buffer, bitmap: Buffer | None = None) -> Record:
        """Take a frame from the source, whose prefix :meth:`parse` returned and whose body check has passed; ``bitmap``
        is the content of a BITMAP. Raises :class:`~vfiostream.errors.StreamError`.
        """
        record = self._accept(prefix, header, bitmap)
        if self._answers and _step(record) not in _FREE:
            self.spent += prefix.frame_size
            if self.spent > self._limit:
                excess = self.spent - self._limit
                raise StreamError(_name(prefix), f"exceeds the credit that was given by {excess} bytes")
        return record

    def send(self, record: Record) -> list[Buffer]:
        """Return the buffers of the next frame to the source. Raises
        :class:`~vfiostream.errors.LocalProtocolError` where it must not be sent now, or does not fit what was said
        before; the session is then as it was.
        """
        self._check_phase(record)
        return self._emit(record, records.encode(record), (), 0, 0, None)

    def _settle(self, record: Record) -> None:
        if isinstance(record, Hello) and not self._answers:
            unknown = set(record.features) - set(records.FEATURES)
            if unknown:
                raise ValueError(f"uses features that this side does not know: {', '.join(sorted(unknown))}")
        # Over a link the WELCOME can still bring the chunk down, in a file the HELLO's holds.
        if isinstance(record, Welcome if self._answers else Hello) and record.chunk > self._most:
            raise ValueError(
                f"has chunks of {record.chunk} bytes, more than the {self._most} there is room for: "
                "give a larger budget"
            )
        super()._settle(record)
