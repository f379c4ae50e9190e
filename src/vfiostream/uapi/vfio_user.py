"""vfio-user messages: numbers, headers and bodies, for both ends.

From QEMU's ``docs/interop/vfio-user.rst``. Host byte order, which is little endian wherever this runs. Bytes and tables
only: nothing here does I/O.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

HEADER = struct.Struct("=HHIII")
"""msg_id, command, msg_size (header included), flags, errno."""

FLAG_TYPE_MASK = 0xF
FLAG_REPLY = 0x1
FLAG_NO_REPLY = 0x10
FLAG_ERROR = 0x20

MAJOR = 0
MINOR = 1

MAX_FDS = 8
"""File descriptors we take with one message."""
MAX_BODY = 32 * 1024 + 16
"""Body of a message that we send, in bytes: some servers read a message with one recv of a fixed buffer of 64 KiB.

What fits a buffer need not come in one piece: Linux 6.18 queues what is sent to a UNIX stream socket in pieces of 36544
bytes, and a recv may return when the first is there. So this is 32 KiB and the header of a region write.
"""
MAX_MESSAGE = 1024 * 1024 + 4096
"""Largest message we accept: the specification's default max_data_xfer_size and room for its headers."""


class Command(IntEnum):
    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    GET_REGION_INFO = 5
    GET_REGION_IO_FDS = 6
    GET_IRQ_INFO = 7
    SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


DMA_MAP = struct.Struct("=IIQQQ")
"""argsz, flags (DMA_FLAG_*), offset, address, size; at most one file descriptor."""
DMA_FLAG_READ = 1
DMA_FLAG_WRITE = 2
DMA_UNMAP = struct.Struct("=IIQQ")
"""argsz, flags, address, size; echoed."""
REGION_ACCESS = struct.Struct("=QII")
"""offset, region, count; the data follows in a write and in a read's reply."""
DMA_ACCESS = struct.Struct("=QQ")
"""address, count; the data follows in a write and in a read's reply."""
MIG_DATA = struct.Struct("=II")
"""argsz, size; the data follows in MIG_DATA_WRITE and in MIG_DATA_READ's reply, which may be longer than ``size``."""
VERSION = struct.Struct("=HH")
"""major, minor; then JSON and a NUL."""

DEFAULT_CAPABILITIES: dict[str, Any] = {
    "max_msg_fds": 1,
    "max_data_xfer_size": 1048576,
    "max_dma_maps": 65535,
    "pgsizes": 4096,
}
"""What holds where the other side's VERSION does not say."""


@dataclass(frozen=True, slots=True)
class Header:
    """The 16 bytes before every message."""

    msg_id: int
    command: int
    size: int
    flags: int
    errno: int

    @property
    def body_size(self) -> int:
        return self.size - HEADER.size

    @property
    def is_reply(self) -> bool:
        return self.flags & FLAG_TYPE_MASK == FLAG_REPLY

    @property
    def is_error(self) -> bool:
        return bool(self.flags & FLAG_ERROR)

    @property
    def wants_reply(self) -> bool:
        return not self.flags & FLAG_NO_REPLY


class BadMessage(ValueError):
    """What came in is not a vfio-user message, or larger than MAX_MESSAGE."""


def pack_message(msg_id: int, command: int, body: bytes = b"", *, flags: int = 0, errno: int = 0) -> bytes:
    """A whole message: header and body."""
    return HEADER.pack(msg_id, command, HEADER.size + len(body), flags, errno) + body


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """Parse 16 bytes; raises BadMessage for a size that can't be, before anybody believes it."""
    if len(data) != HEADER.size:
        raise BadMessage(f"header of {len(data)} bytes")
    header = Header(*HEADER.unpack(data))
    if not HEADER.size <= header.size <= MAX_MESSAGE:
        raise BadMessage(f"message of {header.size} bytes (the limit is {MAX_MESSAGE})")
    if header.flags & FLAG_TYPE_MASK not in (0, FLAG_REPLY):
        raise BadMessage(f"message of unknown type {header.flags & FLAG_TYPE_MASK}")
    return header


def pack_version(major: int, minor: int, capabilities: dict[str, Any]) -> bytes:
    """Body of VERSION, either way."""
    return VERSION.pack(major, minor) + json.dumps({"capabilities": capabilities}).encode() + b"\0"


def parse_version(body: bytes) -> tuple[int, int, dict[str, Any]]:
    """Parse the body of VERSION: major, minor, capabilities (with the defaults filled in). Raises BadMessage."""
    if len(body) < VERSION.size:
        raise BadMessage("VERSION is too short")
    major, minor = VERSION.unpack_from(body)
    text = body[VERSION.size :].rstrip(b"\0")
    try:
        parsed = json.loads(text) if text else {}
        said = parsed.get("capabilities", {}) if isinstance(parsed, dict) else None
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"VERSION holds no JSON: {error}") from error
    if not isinstance(said, dict):
        raise BadMessage("VERSION holds no capabilities object")
    return major, minor, {**DEFAULT_CAPABILITIES, **said}
