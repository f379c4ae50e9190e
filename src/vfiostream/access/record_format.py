"""The file of a record: what a device was asked and what it answered (``docs/record.md``).

A record comes from somebody's bug report: each length has a limit that is checked before it is used, each entry has
check values, and its fields are those of the table :data:`CALLS` and no others. What a process that was killed left
half written is told apart from what is damaged.

A question stands in the file before the device is asked: a call that brings a machine down is the last one in it. So
question and answer are entries of their own, which :class:`Reader` brings together again.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import xxhash

from vfiostream.buffers import Buffer
from vfiostream.packing import pack, unpack

MAGIC = b"VFSREC"
VERSION = 1

_START = struct.Struct("<6sH")
_PREFIX = struct.Struct("<IIQQ")
_SIZES = 8
_CHECKED = 16

MAX_HEADER = 64 * 1024
"""Bytes of an entry without its payload."""
MAX_PAYLOAD = 1024 * 1024
"""Bytes that one call transfers; longer transfers are recorded as several."""
MAX_TEXT = 4096
"""Bytes of a text."""
MAX_BYTES = 32 * 1024
"""Bytes of the data of a feature."""
MAX_PAIRS = 1024
"""Areas of a region, or ranges of a log."""
MAX_FIELDS = 16
"""Of a map."""
MAX_WAITING = 64
"""Calls that are begun while an earlier one waits for its answer: so much is read ahead."""


class Bulk(NamedTuple):
    """What a call transferred."""

    size: int
    digest: int
    """XXH3-64 of it."""
    data: Buffer | None
    """None where it was left out."""


class Call(NamedTuple):
    """One question to a device."""

    number: int
    """Counted from 1: the number of the event."""
    at: int
    """Microseconds since the record began."""
    what: str
    arguments: Mapping[str, Any]
    bulk: Bulk | None
    """What is written."""


class Failed(NamedTuple):
    """An answer that is an error."""

    kind: str
    """One of :data:`KINDS`."""
    message: str
    errno: int | None
    """Of a refusal, as the two that follow."""
    operation: str | None
    hint: str | None


class Answer(NamedTuple):
    """What the device answered."""

    took: int
    """Microseconds."""
    result: Mapping[str, Any]
    bulk: Bulk | None
    """What was read."""
    failed: Failed | None


class Event(NamedTuple):
    """A question, and its answer where there is one."""

    call: Call
    answer: Answer | None


KINDS = ("DeviceRefused", "DeviceLost", "DeviceTimeout", "DeviceBroken", "UsageError", "cancelled", "other")
"""How a call fails: by one of these exceptions; cancelled; or by what is no error of a device."""

_Check: TypeAlias = Callable[[Any], bool]


def _u32(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


def _u64(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _bool(value: Any) -> bool:
    return type(value) is bool


def _text(value: Any) -> bool:
    return type(value) is str and len(value.encode()) <= MAX_TEXT


def _bytes(value: Any) -> bool:
    return type(value) is bytes and len(value) <= MAX_BYTES


def _pairs(value: Any) -> bool:
    return (
        type(value) is list
        and len(value) <= MAX_PAIRS
        and all(type(pair) is list and len(pair) == 2 and all(map(_u64, pair)) for pair in value)
    )


def _or_none(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


@dataclass(frozen=True, slots=True)
class Shape:
    """What belongs to a call."""

    arguments: Mapping[str, _Check]
    result: Mapping[str, _Check]
    writes: bool = False
    """Its question has a bulk."""
    reads: bool = False
    """Its answer has a bulk, unless it failed."""


CALLS: dict[str, Shape] = {
    "open": Shape(
        {"address": _text, "software": _text, "started": _u64, "payloads": _bool},
        {"is_pci": _bool, "can_reset": _bool, "num_regions": _u32, "num_irqs": _u32},
    ),
    "region_info": Shape(
        {"region": _u32},
        {
            "size": _u64,
            "readable": _bool,
            "writable": _bool,
            "type": _or_none(_u32),
            "subtype": _or_none(_u32),
            "mappable": _pairs,
        },
    ),
    "read": Shape({"region": _u32, "offset": _u64, "size": _u32}, {}, reads=True),
    "write": Shape({"region": _u32, "offset": _u64}, {}, writes=True),
    "dma_map": Shape({"iova": _u64, "length": _u64, "writable": _bool}, {}),
    "dma_unmap": Shape({"iova": _u64, "length": _u64}, {}),
    "reset": Shape({}, {}),
    "feature": Shape({"operation": _u32, "feature": _u32, "data": _bytes, "size": _u32}, {"data": _bytes}),
    "set_migration_state": Shape({"state": _u32}, {"data": _or_none(_u32)}),
    "can_log_dma": Shape({}, {"can": _bool}),
    "start_dma_log": Shape({"page_size": _u64, "ranges": _pairs}, {}),
    "read_dma_log": Shape({"iova": _u64, "length": _u64, "page_size": _u64}, {}, reads=True),
    "stop_dma_log": Shape({}, {}),
    "version": Shape({}, {"version": _or_none(_text)}),
    "accepts_version": Shape({"version": _text}, {"accepts": _bool}),
    "close": Shape({}, {}),
    # Of the data of a migration, which set_migration_state numbers:
    "read_data": Shape({"data": _u32, "size": _u32}, {}, reads=True),
    "write_data": Shape({"data": _u32}, {}, writes=True),
    "precopy_info": Shape({"data": _u32}, {"reinit": _bool, "initial": _u64, "dirty": _u64}),
    "close_data": Shape({"data": _u32}, {}),
}

_CALL: dict[str, _Check] = {"call": _u64, "at": _u64, "what": lambda value: type(value) is str and value in CALLS}
_ANSWER: dict[str, _Check] = {"answer": _u64, "took": _u64}
_FAILED: dict[str, _Check] = {
    "kind": lambda value: type(value) is str and value in KINDS,
    "message": _text,
    "errno": _or_none(_u32),
    "operation": _or_none(_text),
    "hint": _or_none(_text),
}
_BULK: dict[str, _Check] = {
    "size": lambda value: type(value) is int and 0 <= value <= MAX_PAYLOAD,
    "digest": _u64,
    "kept": _bool,
}


def _expect(values: Any, fields: Mapping[str, _Check], what: str) -> None:
    if type(values) is not dict or values.keys() != fields.keys():
        raise ValueError(f"its {what} is not a map of just {', '.join(fields) or 'nothing'}")
    for name, check in fields.items():
        if not check(values[name]):
            raise ValueError(f"{name} of its {what} is not what it can be")


def digest(data: Buffer) -> int:
    """XXH3-64 of ``data``."""
    return xxhash.xxh3_64_intdigest(data)


def bulk_of(data: Buffer, *, keep: bool) -> Bulk:
    """What a call transfers, with its bytes where they are to be kept: ``data`` itself."""
    return Bulk(len(data), digest(data), data if keep else None)


# ---- writing


def start() -> bytes:
    """What a file begins with."""
    return _START.pack(MAGIC, VERSION)


def encode(number: int, entry: Call | tuple[Call, Answer]) -> tuple[bytes, Buffer]:
    """Entry ``number`` of a file (from 1), a question or an answer to one: prefix and header, and payload. Raises
    ValueError where a reader would not take it.
    """
    if isinstance(entry, Call):
        bulk = entry.bulk
        values = {
            "call": entry.number,
            "at": entry.at,
            "what": entry.what,
            "arguments": dict(entry.arguments),
            "bulk": _packed(bulk),
        }
    else:
        call, answer = entry
        bulk = answer.bulk
        values = {
            "answer": call.number,
            "took": answer.took,
            "result": dict(answer.result),
            "failed": None if answer.failed is None else answer.failed._asdict(),
            "bulk": _packed(bulk),
        }
    header = pack(values)
    payload = b"" if bulk is None or bulk.data is None else bulk.data
    if len(header) > MAX_HEADER or len(payload) > MAX_PAYLOAD:
        raise ValueError(f"it takes {len(header)} and {len(payload)} bytes (the limits: {MAX_HEADER}, {MAX_PAYLOAD})")
    written = unpack(header, text=MAX_TEXT, binary=MAX_BYTES, items=MAX_PAIRS, keys=MAX_FIELDS)
    if isinstance(entry, Call):
        _call(written, payload)
    else:
        _answer(written, payload, entry[0])
    checked = _PREFIX.pack(len(header), len(payload), xxhash.xxh3_64_intdigest(header, number), 0)[:_CHECKED]
    return checked + struct.pack("<Q", xxhash.xxh3_64_intdigest(checked, number)) + header, payload


def _packed(bulk: Bulk | None) -> dict[str, Any] | None:
    return None if bulk is None else {"size": bulk.size, "digest": bulk.digest, "kept": bulk.data is not None}


# ---- reading


class Reader:
    """The events of a record, one after another in the order of their questions."""

    def __init__(self, file: BinaryIO) -> None:
        """Read on from where ``file`` is, a buffered file at its start. Raises ValueError where it is no record."""
        self.is_cut = False
        """Whether the file ends in the middle of an entry: its writer was killed."""
        self._file = file
        self._entries = 0
        self._calls = 0
        self._waiting: deque[tuple[Call, list[Answer]]] = deque()
        """Calls that were read and not yet given; with each its answer, once there is one."""
        self._by_number: dict[int, tuple[Call, list[Answer]]] = {}
        raw = file.read(_START.size)
        if len(raw) < _START.size or not raw.startswith(MAGIC):
            raise ValueError("it is no record of a device")
        version = _START.unpack(raw)[1]
        if version != VERSION:
            raise ValueError(f"it is a record of version {version}, and version {VERSION} is known here")

    def next(self) -> Event | None:
        """The next event; None at the end. Raises ValueError where the record is damaged."""
        while not self._waiting or not self._waiting[0][1]:
            if not self._read_entry():
                break
        if not self._waiting:
            return None
        call, answers = self._waiting.popleft()
        del self._by_number[call.number]
        return Event(call, answers[0] if answers else None)

    def _read_entry(self) -> bool:
        """Read one more entry; False at the end."""
        number = self._entries + 1
        prefix = self._file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size:
            self.is_cut |= bool(prefix)
            return False
        header_size, payload_size, header_check, prefix_check = _PREFIX.unpack(prefix)
        where = f"event {self._calls} or the one after it (entry {number})"
        if prefix_check != xxhash.xxh3_64_intdigest(prefix[:_CHECKED], number):
            raise ValueError(f"{where} is damaged")
        if not 0 < header_size <= MAX_HEADER or payload_size > MAX_PAYLOAD:
            raise ValueError(
                f"{where} has {header_size} and {payload_size} bytes (the limits: {MAX_HEADER}, {MAX_PAYLOAD})"
            )
        header = self._file.read(header_size)
        payload = self._file.read(payload_size) if len(header) == header_size else b""
        if len(header) < header_size or len(payload) < payload_size:
            self.is_cut = True
            return False
        if header_check != xxhash.xxh3_64_intdigest(header, number):
            raise ValueError(f"{where} is damaged")
        try:
            self._take(header, payload)
        except ValueError as error:
            raise ValueError(f"{where} makes no sense: {error}") from error
        self._entries = number
        return True

    def _take(self, header: bytes, payload: Buffer) -> None:
        values = unpack(header, text=MAX_TEXT, binary=MAX_BYTES, items=MAX_PAIRS, keys=MAX_FIELDS)
        if type(values) is dict and "answer" in values:
            known = self._by_number.get(values["answer"]) if type(values["answer"]) is int else None
            if known is None or known[1]:
                raise ValueError("it answers nothing that was asked")
            answer = _answer(values, payload, known[0])
            _check_digest(answer.bulk)
            known[1].append(answer)
            return
        call = _call(values, payload)
        _check_digest(call.bulk)
        if call.number != self._calls + 1:
            raise ValueError(f"it says that it is event {call.number}")
        if (call.what == "open") != (call.number == 1):
            raise ValueError("a device is opened once, at first")
        if len(self._waiting) > MAX_WAITING:
            raise ValueError(f"more than {MAX_WAITING} calls were made while event {self._waiting[0][0].number} waited")
        self._calls = call.number
        self._waiting.append((call, []))
        self._by_number[call.number] = self._waiting[-1]


def _call(values: Any, payload: Buffer) -> Call:
    rest = _without(values, "arguments", "bulk")
    _expect(rest, _CALL, "question")
    shape = CALLS[rest["what"]]
    _expect(values["arguments"], shape.arguments, "arguments")
    return Call(
        rest["call"], rest["at"], rest["what"], values["arguments"], _bulk(values["bulk"], payload, shape.writes)
    )


def _answer(values: Any, payload: Buffer, call: Call) -> Answer:
    rest = _without(values, "result", "failed", "bulk")
    _expect(rest, _ANSWER, "answer")
    shape = CALLS[call.what]
    if values["failed"] is not None:
        _expect(values["failed"], _FAILED, "error")
        _expect(values["result"], {}, "result")
        _bulk(values["bulk"], payload, False)
        failed = Failed(**values["failed"])
        if (failed.kind == "DeviceRefused") != (failed.errno is not None and failed.operation is not None):
            raise ValueError("a refusal has an errno and an operation, and nothing else has")
        return Answer(rest["took"], {}, None, failed)
    _expect(values["result"], shape.result, "result")
    bulk = _bulk(values["bulk"], payload, shape.reads)
    if bulk is not None:
        asked = call.arguments.get("size", bulk.size)
        if bulk.size > asked or (call.what == "read" and bulk.size != asked):
            raise ValueError(f"{bulk.size} bytes answer a call for {asked}")
    return Answer(rest["took"], values["result"], bulk, None)


def _without(values: Any, *names: str) -> dict[str, Any]:
    if type(values) is not dict or not values.keys() >= set(names):
        raise ValueError(f"it is not a map with {', '.join(names)}")
    return {name: value for name, value in values.items() if name not in names}


def _bulk(values: Any, payload: Buffer, wanted: bool) -> Bulk | None:
    if not wanted:
        if values is not None or payload:
            raise ValueError("it has bytes that do not belong to such a call")
        return None
    _expect(values, _BULK, "bulk")
    kept = payload if values["kept"] else None
    if len(payload) != (values["size"] if values["kept"] else 0):
        raise ValueError(f"{len(payload)} bytes of {values['size']} are there")
    return Bulk(values["size"], values["digest"], kept)


def _check_digest(bulk: Bulk | None) -> None:
    if bulk is not None and bulk.data is not None and digest(bulk.data) != bulk.digest:
        raise ValueError("its bytes are damaged")


# ---- for people


def describe(what: str, arguments: Mapping[str, Any], bulk: Bulk | None) -> str:
    """A question in words."""
    given = {**arguments, "bytes": "" if bulk is None else _shown(bulk)}
    return _WORDS[what](given)


_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "open": lambda a: f"open {a['address']}",
    "region_info": lambda a: f"describe region {a['region']}",
    "read": lambda a: f"read {a['size']} bytes of region {a['region']} at {a['offset']:#x}",
    "write": lambda a: f"write {a['bytes']} to region {a['region']} at {a['offset']:#x}",
    "dma_map": lambda a: (
        f"map {a['length']:#x} bytes of guest memory at {a['iova']:#x}" + (", writable" if a["writable"] else "")
    ),
    "dma_unmap": lambda a: f"unmap {a['length']:#x} bytes of guest memory at {a['iova']:#x}",
    "reset": lambda a: "reset",
    "feature": lambda a: f"feature {a['feature']}, operation {a['operation']:#x}, {_hex(a['data'])}, size {a['size']}",
    "set_migration_state": lambda a: f"set migration state {a['state']}",
    "can_log_dma": lambda a: "ask whether there is a log of DMA",
    "start_dma_log": lambda a: f"start the log of DMA for {_ranges(a['ranges'])} in pages of {a['page_size']}",
    "read_dma_log": lambda a: (
        f"read the log of DMA for {a['length']:#x} bytes at {a['iova']:#x}, in pages of {a['page_size']}"
    ),
    "stop_dma_log": lambda a: "stop the log of DMA",
    "version": lambda a: "ask for its version",
    "accepts_version": lambda a: f"ask whether it takes version {a['version']!r}",
    "close": lambda a: "close",
    "read_data": lambda a: f"read at most {a['size']} bytes of data {a['data']}",
    "write_data": lambda a: f"write {a['bytes']} to data {a['data']}",
    "precopy_info": lambda a: f"ask what data {a['data']} still has to give",
    "close_data": lambda a: f"close data {a['data']}",
}

_SHOWN = 16
"""Bytes that are shown of what a call transferred; and ranges."""


def _shown(bulk: Bulk) -> str:
    if bulk.data is not None and bulk.size <= _SHOWN:
        return f"{bulk.size} bytes ({_hex(bulk.data)})"
    return f"{bulk.size} bytes (xxh3 {bulk.digest:016x})"


def _hex(data: Buffer) -> str:
    more = "..." if len(data) > _SHOWN else ""
    return f"{bytes(data[:_SHOWN]).hex() or 'no data'}{more}"


def _ranges(ranges: list[list[int]]) -> str:
    more = ", ..." if len(ranges) > _SHOWN else ""
    return ", ".join(f"{iova:#x}+{length:#x}" for iova, length in ranges[:_SHOWN]) + more


def describe_answer(answer: Answer | None) -> str:
    """An answer in words."""
    if answer is None:
        return "no answer: the record ends before it"
    if answer.failed is not None:
        return f"{answer.failed.kind}: {answer.failed.message}"
    if answer.bulk is not None:
        return _shown(answer.bulk)
    shown = [
        f"{name} {_hex(value) if isinstance(value, bytes) else _ranges(value) if isinstance(value, list) else value}"
        for name, value in answer.result.items()
    ]
    return ", ".join(shown) or "done"
