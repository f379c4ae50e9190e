"""msgpack, in which the stream's headers and the records of devices are written. The only module that knows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from vfiostream.buffers import Buffer

pack: Callable[[Any], bytes] = msgpack.packb
"""A value as msgpack."""


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


def is_short_map(data: Buffer) -> bool:
    """Whether ``data`` begins a fixmap, which has the number of its keys, up to 15, in its first byte."""
    return len(data) > 0 and data[0] & 0xF0 == 0x80


def unpack_short(data: Buffer) -> Any:
    """Unpack the one short map that ``data`` is, in which no other is expected: as :func:`unpack`, but what it holds is
    bounded by the length of ``data`` alone. With the number of keys told, no call for each is needed to find one that
    stands twice.
    """
    try:
        values = msgpack.unpackb(data)
    except msgpack.exceptions.UnpackException as error:
        raise ValueError(str(error)) from error
    if data[0] & 0x0F != len(values):
        raise ValueError("a key stands twice")
    return values


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made
