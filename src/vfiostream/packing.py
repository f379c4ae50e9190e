"""msgpack, in which the stream's headers and the records of devices are written. The only module that knows it."""

from __future__ import annotations

from typing import Any

import msgpack

from vfiostream.buffers import Buffer


def pack(value: Any) -> bytes:
    """``value`` as msgpack."""
    packed: bytes = msgpack.packb(value)
    return packed


def unpack(data: Buffer, *, text: int, binary: int, items: int, keys: int) -> Any:
    """The one value that ``data`` is. It may come from anybody: raises ValueError where it is no msgpack or has
    something behind it, where a key is no text or stands twice, and where a text has more than ``text`` bytes, a bin
    more than ``binary``, an array more than ``items`` items, or a map more than ``keys`` keys.
    """
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_unique,
            max_str_len=text,
            max_bin_len=binary,
            max_array_len=items,
            max_map_len=keys,
            max_ext_len=0,
        )
    except msgpack.exceptions.UnpackException as error:
        # OutOfData; its FormatError, StackError and ExtraData are ValueErrors as they come.
        raise ValueError(str(error)) from error


def unpack_flat(data: Buffer, *, keys: int) -> Any:
    """As :func:`unpack`, for a map of at most ``keys`` keys that holds numbers and texts only, which is for whoever
    asks to check: something else in it may come back as it is. For ``data`` whose size has a limit, as that bounds what
    is allocated. A map of up to 15 keys tells their number in its first byte, so no call for each is needed to find one
    that stands twice: for the header of a frame that is half of the time.
    """
    if not len(data) or data[0] & 0xF0 != _SHORT_MAP:
        return unpack(data, text=len(data), binary=len(data), items=len(data), keys=keys)
    try:
        values = msgpack.unpackb(data)
    except msgpack.exceptions.UnpackException as error:
        raise ValueError(str(error)) from error
    if data[0] != _SHORT_MAP | len(values):
        raise ValueError("a key stands twice")
    return values


_SHORT_MAP = 0x80
"""msgpack's fixmap."""


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made
