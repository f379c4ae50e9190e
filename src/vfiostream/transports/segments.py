"""What the channels of a link say to each other besides the bytes they carry (``docs/format.md``, "Channels").

A connection begins with a :class:`Preamble`, which says of which link it is a channel; then come segments, a
:class:`Head` each and, for DATA, the bytes. Every field that comes from outside is checked here, before it is used.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from vfiostream.transports.options import MAX_CHANNELS

MAGIC = b"VFC\xf1"
VERSION = 1
TOKEN_SIZE = 16
MAX_SEGMENT = 4 << 20
"""Bytes of a segment."""
MAX_POSITION = (1 << 63) - 1
"""Bytes of a link in one direction."""

_PREAMBLE = struct.Struct("<4sHBBBxxxI16s")
_HEAD = struct.Struct("<QIBxxx")
PREAMBLE_SIZE = _PREAMBLE.size
HEAD_SIZE = _HEAD.size


class Kind(IntEnum):
    """What a segment is."""

    DATA = 1
    END = 2
    """Nothing more is sent."""


class Preamble(NamedTuple):
    """The first bytes of each connection, from the end that connects."""

    token: bytes
    """Of the link: :data:`TOKEN_SIZE` random bytes, the same for all its channels."""
    number: int
    """Of this channel, from 0."""
    channels: int
    """Of the link."""

    def pack(self) -> bytes:
        return _PREAMBLE.pack(MAGIC, VERSION, 0, self.channels, self.number, 0, self.token)

    @classmethod
    def parse(cls, raw: bytes | bytearray) -> Preamble:
        """Raises ValueError, with the problem in words."""
        magic, version, flags, count, number, zero, token = _PREAMBLE.unpack(raw)
        if magic != MAGIC:
            raise ValueError("does not begin as a channel does")
        if version != VERSION:
            raise ValueError(f"has version {version}, and this end speaks {VERSION}")
        if not 1 <= count <= MAX_CHANNELS or number >= count:
            raise ValueError(f"is number {number + 1} of {count}, and a link has 1 to {MAX_CHANNELS}")
        if flags or zero or any(raw[9:12]):
            raise ValueError("has something where version 1 has zeros")
        return cls(token, number, count)


class Head(NamedTuple):
    """What comes before the bytes of a segment."""

    position: int
    """Where in the link's stream the segment belongs: how many bytes come before it."""
    length: int
    """Bytes that follow."""
    kind: Kind

    def pack(self) -> bytes:
        return _HEAD.pack(*self)

    @classmethod
    def parse(cls, raw: bytes | bytearray) -> Head:
        """Raises ValueError, with the problem in words."""
        position, length, number = _HEAD.unpack(raw)
        try:
            kind = Kind(number)
        except ValueError:
            raise ValueError(f"has the unknown kind {number}") from None
        if position > MAX_POSITION:
            raise ValueError(f"has the position {position}, and the last is {MAX_POSITION}")
        if kind is Kind.DATA and not 1 <= length <= MAX_SEGMENT:
            raise ValueError(f"has {length} bytes, and 1 to {MAX_SEGMENT} can be")
        if (length and kind is not Kind.DATA) or any(raw[13:]):
            raise ValueError("has something where there have to be zeros")
        return cls(position, length, kind)
