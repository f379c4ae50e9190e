"""Frames: a 48-byte prefix, a msgpack header, a raw payload (``docs/format.md``, "Frame").

The only module that hashes, but for what is hashed while it is copied (``_accel.copy_check``). Frames go out as buffers
to be gathered, and come in as three pieces, so that a payload is never copied here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from vfiostream.buffers import Buffer
from vfiostream.protocol import limits

MAGIC = b"VFS\xf1"
VERSION = 2

FLAG_ZSTD = 1
FLAG_ZERO = 2
FLAG_SPARSE = 4

_PREFIX = struct.Struct("<4sHBBIIQIIQQ")
_CHECK = struct.Struct("<Q")
PREFIX_SIZE = _PREFIX.size
_CHECKED = PREFIX_SIZE - _CHECK.size


class Prefix(NamedTuple):
    """The fixed part of a frame, believed as far as it can be on its own."""

    type: int
    flags: int
    stream: int
    header_size: int
    sequence: int
    payload_size: int
    content_size: int
    body_check: int

    @property
    def frame_size(self) -> int:
        """Bytes of the whole frame."""
        return PREFIX_SIZE + self.header_size + self.payload_size


def pack_frame(
    type_: int,
    stream: int,
    sequence: int,
    header: bytes,
    payload: Sequence[Buffer],
    flags: int,
    content_size: int,
    seed: int,
    check: int | None = None,
) -> list[Buffer]:
    """Return the buffers of a frame, to be sent one after the other: prefix and header, and the pieces of ``payload``,
    which are not copied: they must not change until they are sent. ``seed`` is the session's (:func:`session_seed`), 0
    for a HELLO. ``check`` is the xxh3 of header and payload where the caller has it already.
    """
    if check is None:
        check = body_check(header, payload, seed)
    fields = (MAGIC, VERSION, type_, flags, stream, len(header), sequence, sum(map(len, payload)), content_size)
    unchecked = _PREFIX.pack(*fields, check, 0)[:_CHECKED]
    return [unchecked + _CHECK.pack(xxhash.xxh3_64_intdigest(unchecked, seed)) + header, *payload]


def body_check(header: Buffer, payload: Sequence[Buffer], seed: int) -> int:
    """The check value of a header and a payload that lies in pieces."""
    digest = xxhash.xxh3_64(header, seed)
    for piece in payload:
        digest.update(piece)
    return digest.intdigest()


def sparse_bitmap_size(content_size: int) -> int:
    """Bytes of the bitmap that ends the payload of sparse content, which is whole pages."""
    return (content_size // limits.PAGE_SIZE + 7) // 8


def session_seed(session: bytes) -> int:
    """The seed of every check after the HELLO: frames of another session never pass for this one's."""
    return int.from_bytes(session[:8], "little")


def parse_prefix(data: Buffer, seed: int) -> Prefix:
    """Check the first :data:`PREFIX_SIZE` bytes of a frame in the order the format gives, up to the limits. Raises
    ValueError for anything wrong.
    """
    magic, version, type_, flags, stream, header_size, sequence, payload_size, content_size, body_check, check = (
        _PREFIX.unpack(data)
    )
    if magic != MAGIC:
        raise ValueError("does not start with the magic number: this is no vfiostream stream, or it is damaged")
    if version != VERSION:
        raise ValueError(f"is of format {version}, this side speaks format {VERSION}")
    if check != xxhash.xxh3_64_intdigest(memoryview(data)[:_CHECKED], seed):
        raise ValueError("has a prefix that does not match its check value, or is of another session")
    if header_size > limits.MAX_HELLO:
        raise ValueError(f"has a header of {header_size} bytes (the limit is {limits.MAX_HELLO})")
    if payload_size > limits.MAX_CONTENT or content_size > limits.MAX_CONTENT:
        raise ValueError(
            f"has {payload_size} bytes of payload for {content_size} of content (the limit is {limits.MAX_CONTENT})"
        )
    if flags == 0:
        sound = payload_size == content_size
    elif flags == FLAG_ZSTD:
        sound = 0 < payload_size < content_size
    elif flags == FLAG_ZERO:
        sound = payload_size == 0 and content_size > 0
    elif flags == FLAG_SPARSE:
        kept = payload_size - sparse_bitmap_size(content_size)
        sound = 0 < kept < content_size and kept % limits.PAGE_SIZE == content_size % limits.PAGE_SIZE == 0
    else:
        raise ValueError(f"has unknown flags {flags:#04x}")
    if not sound:
        raise ValueError(f"has {payload_size} bytes of payload for {content_size} of content with flags {flags}")
    return Prefix(type_, flags, stream, header_size, sequence, payload_size, content_size, body_check)
