"""What both ends of a link of several channels, or of one that reconnects, say to each other besides the bytes that it
carries (``docs/format.md``, "Channels" and "Reconnecting").

A connection begins with a :class:`Preamble`, which says of which link it is a channel; then come segments, a
:class:`Head` each and, for DATA, the bytes. Every field that comes from outside is checked here, before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
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
_HEAD = struct.Struct("<QIBBxx")
_RECONNECTS = 1
PREAMBLE_SIZE = _PREAMBLE.size
HEAD_SIZE = _HEAD.size


class Kind(IntEnum):
    """What a segment is."""

    DATA = 1
    END = 2
    """Nothing more is sent."""
    ACK = 3
    """Everything before its position is here."""
    RESUME = 4
    """The first on each connection: everything before its position is here, and what follows it is to be sent."""
    GONE = 5
    """There is no such link here any more."""


OF_CHANNELS = frozenset({Kind.DATA, Kind.END})
"""What the channels of a link use among themselves; a link that reconnects uses all, within what they carry."""


class Preamble(NamedTuple):
    """The first bytes of each connection, from the end that connects."""

    token: bytes
    """Of the link: :data:`TOKEN_SIZE` random bytes, the same for all its channels."""
    number: int
    """Of this channel, from 0."""
    channels: int
    """Of the link."""
    reconnects: bool = False
    """Whether the link outlives its connections."""
    attempt: int = 0
    """How often all its connections were opened before."""

    def pack(self) -> bytes:
        flags = _RECONNECTS if self.reconnects else 0
        return _PREAMBLE.pack(MAGIC, VERSION, flags, self.channels, self.number, self.attempt, self.token)

    @classmethod
    def parse(cls, raw: bytes | bytearray) -> Preamble:
        """Raises ValueError, with the problem in words."""
        magic, version, flags, count, number, attempt, token = _PREAMBLE.unpack(raw)
        if magic != MAGIC:
            raise ValueError("does not begin as a channel does")
        if version != VERSION:
            raise ValueError(f"has version {version}, and this end speaks {VERSION}")
        if not 1 <= count <= MAX_CHANNELS or number >= count:
            raise ValueError(f"is number {number + 1} of {count}, and a link has 1 to {MAX_CHANNELS}")
        if flags & ~_RECONNECTS or any(raw[9:12]) or (attempt and not flags):
            raise ValueError("has something where version 1 has zeros")
        return cls(token, number, count, bool(flags), attempt)


class Head(NamedTuple):
    """What comes before the bytes of a segment."""

    position: int
    """Where in the link's stream the segment belongs: how many bytes come before it."""
    length: int
    """Bytes that follow."""
    kind: Kind
    wanted: bool = False
    """Whether an ACK is wanted as soon as all of the segment is there."""

    def pack(self) -> bytes:
        return _HEAD.pack(*self)

    @classmethod
    def parse(cls, raw: bytes | bytearray, kinds: Collection[Kind] = OF_CHANNELS) -> Head:
        """Raises ValueError, with the problem in words, also for what is none of ``kinds``."""
        position, length, number, flags = _HEAD.unpack(raw)
        if number not in kinds:
            raise ValueError(f"has the unknown kind {number}")
        kind = Kind(number)
        if position > MAX_POSITION:
            raise ValueError(f"has the position {position}, and the last is {MAX_POSITION}")
        if kind is Kind.DATA and not 1 <= length <= MAX_SEGMENT:
            raise ValueError(f"has {length} bytes, and 1 to {MAX_SEGMENT} can be")
        if (length and kind is not Kind.DATA) or flags > (kinds is not OF_CHANNELS) or any(raw[14:]):
            raise ValueError("has something where there have to be zeros")
        return cls(position, length, kind, bool(flags))
