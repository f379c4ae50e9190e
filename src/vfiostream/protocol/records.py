"""The records of the stream, and their headers as msgpack (``docs/format.md``, "Records").

Each record is validated when it is made, here and from the wire alike: a ValueError says what is wrong with it, and
:func:`decode` turns that into a StreamError. The only module that knows msgpack.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import IntEnum
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias, get_args

import msgpack

from vfiostream.buffers import Buffer
from vfiostream.errors import StreamError
from vfiostream.protocol import limits


class RecordType(IntEnum):
    HELLO = 1
    WELCOME = 2
    ROUND = 3
    CAPTURE = 4
    MEMORY = 5
    BITMAP = 6
    PAGES = 7
    ROUND_END = 8
    STATE = 9
    PCI = 10
    CONFIG = 11
    END = 12
    CREDIT = 13
    ACK = 14
    COMMIT = 15
    ABORT = 16


FEATURES = ("sparse", "zstd")
"""The features this side knows: payloads may be SPARSE, may be ZSTD."""

ABORT_CODES = ("cancelled", "not-converged", "device", "incompatible", "stream", "failed")


def _shown(value: Any) -> str:
    """``value`` as messages show it. The repr of just anything could be too deep for Python's stack: a header may hold
    a thousand arrays in each other.
    """
    return f"{value!r:.40}" if type(value) in (bool, bytes, float, int, str) else f"a {type(value).__name__}"


def _unsigned(bits: int, least: int = 0, **values: Any) -> None:
    for name, value in values.items():
        if type(value) is not int or not least <= value < 1 << bits:
            raise ValueError(f"{name} is {_shown(value)}, not a number from {least} to 2^{bits} - 1")


def _text(most: int, **values: Any) -> None:
    for name, value in values.items():
        if type(value) is not str or len(value.encode()) > most or not value.isprintable():
            raise ValueError(f"{name} is not a printable text of at most {most} bytes")


def _bool(**values: Any) -> None:
    for name, value in values.items():
        if type(value) is not bool:
            raise ValueError(f"{name} is {_shown(value)}, not true or false")


def _session(value: Any) -> None:
    if type(value) is not bytes or len(value) != 16:
        raise ValueError("session is not 16 bytes")


def _features(values: tuple[str, ...]) -> None:
    for value in values:
        _text(limits.MAX_NAME, feature=value)
    if len(values) > limits.MAX_FEATURES or len(set(values)) != len(values):
        raise ValueError(f"features are not at most {limits.MAX_FEATURES} different texts")


def _chunk(value: Any) -> None:
    if type(value) is not int or not limits.MIN_CHUNK <= value <= limits.MAX_CONTENT:
        raise ValueError(f"chunk is {_shown(value)}, not {limits.MIN_CHUNK} to {limits.MAX_CONTENT}")


@dataclass(frozen=True, slots=True)
class PciEntry:
    """``pci`` of a device in HELLO."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    class_code: int
    revision: int

    def __post_init__(self) -> None:
        _unsigned(16, vendor=self.vendor, device=self.device)
        _unsigned(16, subsystem_vendor=self.subsystem_vendor, subsystem=self.subsystem)
        _unsigned(24, class_code=self.class_code)
        _unsigned(8, revision=self.revision)


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """A device in HELLO."""

    stream: int
    name: str
    interface: str
    version: str | None
    device_memory: bool
    dirty_tracking: bool
    config_size: int
    pci: PciEntry | None

    def __post_init__(self) -> None:
        _unsigned(32, 1, stream=self.stream)
        _text(limits.MAX_NAME, name=self.name, interface=self.interface)
        if self.version is not None:
            _text(limits.MAX_TEXT, version=self.version)
        _bool(device_memory=self.device_memory, dirty_tracking=self.dirty_tracking)
        _unsigned(64, config_size=self.config_size)
        if self.config_size > limits.MAX_CONFIG:
            raise ValueError(f"config_size is {self.config_size} (the limit is {limits.MAX_CONFIG})")


@dataclass(frozen=True, slots=True)
class RangeEntry:
    """A range of guest memory in HELLO."""

    stream: int
    address: int
    """Guest physical."""
    length: int
    page_size: int = limits.PAGE_SIZE

    def __post_init__(self) -> None:
        _unsigned(32, 1, stream=self.stream)
        _unsigned(64, address=self.address)
        _unsigned(64, 1, length=self.length)
        if type(self.page_size) is not int or self.page_size != limits.PAGE_SIZE:
            raise ValueError(f"page_size is {_shown(self.page_size)}, not {limits.PAGE_SIZE}")
        if self.address % self.page_size or self.length % self.page_size:
            raise ValueError(f"range at {self.address:#x} of {self.length} bytes is not made of whole pages")
        if self.address + self.length > 1 << 64:
            raise ValueError(f"range at {self.address:#x} of {self.length} bytes leaves the address space")

    @property
    def pages(self) -> int:
        return self.length // self.page_size


@dataclass(frozen=True, slots=True)
class Hello:
    """What the source is about to send."""

    type: ClassVar = RecordType.HELLO
    session: bytes
    software: str
    features: tuple[str, ...]
    """What the stream may use beyond the plain format; of :data:`FEATURES`."""
    chunk: int
    devices: tuple[DeviceEntry, ...]
    ranges: tuple[RangeEntry, ...]

    def __post_init__(self) -> None:
        _session(self.session)
        _text(limits.MAX_NAME, software=self.software)
        _features(self.features)
        _chunk(self.chunk)
        if not 1 <= len(self.devices) <= limits.MAX_DEVICES:
            raise ValueError(f"{len(self.devices)} devices, not 1 to {limits.MAX_DEVICES}")
        if len(self.ranges) > limits.MAX_RANGES:
            raise ValueError(f"{len(self.ranges)} ranges of guest memory (the limit is {limits.MAX_RANGES})")
        streams = [device.stream for device in self.devices] + [area.stream for area in self.ranges]
        if streams != list(range(1, len(streams) + 1)):
            raise ValueError("streams are not numbered 1, 2, 3 and so on")
        ordered = sorted(self.ranges, key=lambda entry: entry.address)
        for low, high in pairwise(ordered):
            if low.address + low.length > high.address:
                raise ValueError(f"ranges of guest memory overlap at {high.address:#x}")


@dataclass(frozen=True, slots=True)
class Welcome:
    """The target is ready and gives its first credit."""

    type: ClassVar = RecordType.WELCOME
    session: bytes
    software: str
    features: tuple[str, ...]
    """Those of the HELLO that the target agrees to."""
    chunk: int
    credit: int

    def __post_init__(self) -> None:
        _session(self.session)
        _text(limits.MAX_NAME, software=self.software)
        _features(self.features)
        _chunk(self.chunk)
        _unsigned(64, self.chunk + limits.CREDIT_SLACK, credit=self.credit)


@dataclass(frozen=True, slots=True)
class Round:
    """Round ``number`` begins; counted from 1."""

    type: ClassVar = RecordType.ROUND
    number: int

    def __post_init__(self) -> None:
        _unsigned(32, 1, number=self.number)


@dataclass(frozen=True, slots=True)
class Capture:
    """``size`` bytes of device memory follow."""

    type: ClassVar = RecordType.CAPTURE
    stream: int = field(metadata={"prefix": True})
    number: int
    size: int

    def __post_init__(self) -> None:
        _unsigned(32, 1, number=self.number)
        _unsigned(64, size=self.size)


@dataclass(frozen=True, slots=True)
class Memory:
    """The content is the capture's bytes from ``pos`` on."""

    type: ClassVar = RecordType.MEMORY
    stream: int = field(metadata={"prefix": True})
    pos: int

    def __post_init__(self) -> None:
        _unsigned(64, pos=self.pos)


@dataclass(frozen=True, slots=True)
class Bitmap:
    """The content says which of ``pages`` pages from page ``page`` of the range follow."""

    type: ClassVar = RecordType.BITMAP
    stream: int = field(metadata={"prefix": True})
    page: int
    pages: int

    def __post_init__(self) -> None:
        _unsigned(64, page=self.page)
        if type(self.pages) is not int or not 1 <= self.pages <= limits.MAX_BITMAP_PAGES:
            raise ValueError(f"pages is {_shown(self.pages)}, not 1 to {limits.MAX_BITMAP_PAGES}")


@dataclass(frozen=True, slots=True)
class Pages:
    """The content is announced pages, joined, from byte ``pos`` on."""

    type: ClassVar = RecordType.PAGES
    stream: int = field(metadata={"prefix": True})
    pos: int

    def __post_init__(self) -> None:
        _unsigned(64, pos=self.pos)


@dataclass(frozen=True, slots=True)
class RoundEnd:
    """Everything that round ``number`` announced has been sent."""

    type: ClassVar = RecordType.ROUND_END
    number: int

    def __post_init__(self) -> None:
        _unsigned(32, 1, number=self.number)


@dataclass(frozen=True, slots=True)
class State:
    """All devices of the source, and the guest, are stopped."""

    type: ClassVar = RecordType.STATE
    state: str = "stopped"

    def __post_init__(self) -> None:
        if self.state != "stopped":
            raise ValueError(f"state is {_shown(self.state)}, not 'stopped'")


@dataclass(frozen=True, slots=True)
class Pci:
    """The content is PCI config space."""

    type: ClassVar = RecordType.PCI
    stream: int = field(metadata={"prefix": True})


@dataclass(frozen=True, slots=True)
class Config:
    """The content is the config's bytes from ``pos`` on, of ``size`` altogether."""

    type: ClassVar = RecordType.CONFIG
    stream: int = field(metadata={"prefix": True})
    pos: int
    size: int

    def __post_init__(self) -> None:
        _unsigned(64, pos=self.pos)
        _unsigned(64, 1, size=self.size)


@dataclass(frozen=True, slots=True)
class End:
    """Everything was sent: ``rounds`` rounds and ``content`` bytes of content."""

    type: ClassVar = RecordType.END
    rounds: int
    content: int

    def __post_init__(self) -> None:
        _unsigned(32, 1, rounds=self.rounds)
        _unsigned(64, content=self.content)


@dataclass(frozen=True, slots=True)
class Credit:
    """The target has let go of what came, and takes more."""

    type: ClassVar = RecordType.CREDIT
    limit: int
    """Bytes of frames after HELLO that the source may have sent altogether; never goes down."""

    def __post_init__(self) -> None:
        _unsigned(64, limit=self.limit)


@dataclass(frozen=True, slots=True)
class Ack:
    """The target has done it: a ``"round"``, ``"loaded"`` everything, ``"running"``."""

    type: ClassVar = RecordType.ACK
    of: str
    number: int
    """Of the round; else the number of rounds."""
    limit: int
    """Credit, as in :class:`Credit`."""

    def __post_init__(self) -> None:
        if self.of not in ("round", "loaded", "running"):
            raise ValueError(f"of is {_shown(self.of)}, not 'round', 'loaded' or 'running'")
        _unsigned(32, 1, number=self.number)
        _unsigned(64, limit=self.limit)


@dataclass(frozen=True, slots=True)
class Commit:
    """The target may run: the source has let go."""

    type: ClassVar = RecordType.COMMIT


@dataclass(frozen=True, slots=True)
class Abort:
    """This end gives up: nothing more of it follows."""

    type: ClassVar = RecordType.ABORT
    code: str
    """Of :data:`ABORT_CODES`."""
    reason: str
    """For people; at most ``limits.MAX_TEXT`` bytes."""
    stopped: bool
    """From a target: its devices are certain not to run."""

    def __post_init__(self) -> None:
        if self.code not in ABORT_CODES:
            raise ValueError(f"code is {_shown(self.code)}, not one of {', '.join(ABORT_CODES)}")
        _text(limits.MAX_TEXT, reason=self.reason)
        _bool(stopped=self.stopped)


Record: TypeAlias = (
    Hello
    | Welcome
    | Round
    | Capture
    | Memory
    | Bitmap
    | Pages
    | RoundEnd
    | State
    | Pci
    | Config
    | End
    | Credit
    | Ack
    | Commit
    | Abort
)

_CLASSES: dict[int, type[Any]] = {
    cls.type: cls
    for cls in (
        Hello,
        Welcome,
        Round,
        Capture,
        Memory,
        Bitmap,
        Pages,
        RoundEnd,
        State,
        Pci,
        Config,
        End,
        Credit,
        Ack,
        Commit,
        Abort,
    )
}

_HEADER_FIELDS: dict[type[Any], tuple[str, ...]] = {
    cls: tuple(known.name for known in fields(cls) if not known.metadata.get("prefix"))
    for cls in (*_CLASSES.values(), DeviceEntry, PciEntry, RangeEntry)
}

_FLAT = frozenset(_CLASSES.values()) - {Hello, Welcome}
"""The records whose headers hold numbers and texts only."""

Streamed: TypeAlias = Capture | Memory | Bitmap | Pages | Pci | Config
"""The records that belong to a device or a range of guest memory."""
_STREAMED = frozenset(get_args(Streamed))

CONTENT: dict[int, tuple[int, int]] = {
    RecordType.MEMORY: (1, limits.MAX_CONTENT),
    RecordType.BITMAP: (1, limits.MAX_BITMAP_PAGES // 8),
    RecordType.PAGES: (limits.PAGE_SIZE, limits.MAX_CONTENT),
    RecordType.PCI: (limits.MIN_PCI_CONFIG, limits.MAX_PCI_CONFIG),
    RecordType.CONFIG: (1, limits.MAX_CONTENT),
}
"""Least and most content of the records that have any."""


def encode(record: Record) -> bytes:
    """The record's header. Its stream number is not in it: that is the prefix's."""
    cls = type(record)
    if cls in _FLAT:
        header: bytes = msgpack.packb({name: getattr(record, name) for name in _HEADER_FIELDS[cls]})
    else:
        header = msgpack.packb(_plain(record))
    return header


def _plain(value: Any) -> Any:
    if type(value) in _HEADER_FIELDS:
        return {name: _plain(getattr(value, name)) for name in _HEADER_FIELDS[type(value)]}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def stream_of(record: Record) -> int:
    """The number of the record's stream, 0 for one of the migration itself."""
    return getattr(record, "stream", 0)


def is_known(type_: int) -> bool:
    """Whether this format has records of this type."""
    return type_ in _CLASSES


def name_of(type_: int, sequence: int) -> str:
    """What messages call a frame: ``MEMORY record 17``."""
    return f"{RecordType(type_).name} record {sequence}" if is_known(type_) else f"record {sequence} of type {type_}"


def decode(type_: int, stream: int, sequence: int, header: Buffer) -> Record:
    """Make the record of a frame of a known type whose checks have passed; raises
    :class:`~vfiostream.errors.StreamError`.
    """
    cls = _CLASSES[type_]
    streamed = cls in _STREAMED
    if streamed != (stream != 0):
        raise StreamError(name_of(type_, sequence), f"can't be on stream {stream}")
    try:
        values = _unpack(header) if cls in _FLAT and _is_short_map(header) else _unpack_nested(header)
        _expect(cls, values)
        if cls is Hello or cls is Welcome:
            values["features"] = tuple(_list(values["features"]))
        if cls is Hello:
            values["devices"] = tuple(_device(entry) for entry in _list(values["devices"]))
            values["ranges"] = tuple(_entry(RangeEntry, entry) for entry in _list(values["ranges"]))
        made: Record = cls(stream=stream, **values) if streamed else cls(**values)
        return made
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        # msgpack's FormatError, StackError and ExtraData are ValueErrors, OutOfData is an UnpackException.
        raise StreamError(name_of(type_, sequence), f"has a bad header: {error}") from error


def _is_short_map(header: Buffer) -> bool:
    """Whether this is msgpack's fixmap, which has the number of its keys, up to 15, in its first byte."""
    return len(header) > 0 and header[0] & 0xF0 == 0x80


def _unpack(header: Buffer) -> Any:
    """Unpack a short map that holds no other; what it holds is checked by the record. A header has a limit, and that
    bounds everything that is allocated here. With the number of keys told, no call for each is needed to find one that
    stands twice.
    """
    values = msgpack.unpackb(header)
    if header[0] & 0x0F != len(values):
        raise ValueError("a key stands twice")
    return values


def _unpack_nested(header: Buffer) -> Any:
    return msgpack.unpackb(
        header,
        raw=False,
        strict_map_key=True,
        object_pairs_hook=_unique,
        max_str_len=limits.MAX_TEXT,
        max_bin_len=16,
        max_array_len=limits.MAX_RANGES,
        max_map_len=16,
        max_ext_len=0,
    )


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made


def _expect(cls: type[Any], values: Any) -> None:
    wanted = _HEADER_FIELDS[cls]
    if type(values) is not dict or set(values) != set(wanted):
        raise ValueError(f"it is not a map of just {', '.join(wanted) or 'nothing'}")


def _list(values: Any) -> list[Any]:
    if type(values) is not list:
        raise ValueError("features, devices and ranges are not all arrays")
    return values


def _entry(cls: type[Any], values: Any) -> Any:
    _expect(cls, values)
    return cls(**values)


def _device(values: Any) -> DeviceEntry:
    _expect(DeviceEntry, values)
    pci = values["pci"]
    return DeviceEntry(**{**values, "pci": None if pci is None else _entry(PciEntry, pci)})
