"""Sizes, rates, times and the other values of the command line: as people write them, and written for people."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Literal, TypeVar

import click

from vfiostream.protocol.payload import MAX_LEVEL

T = TypeVar("T")

_AMOUNT = re.compile(r"(\d{1,19}(?:\.\d{1,9})?) ?([A-Za-z]*)", re.ASCII)
_SIZES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_TIMES = {"ms": Fraction(1, 1000), "s": Fraction(1)}
_MAX_SIZE = (1 << 63) - 1
"""What the kernel takes as a size or an offset."""
_MAX_ADDRESS = (1 << 64) - 1


def option_type(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Turn a function that raises ValueError with a sentence into a type for click, which would drop the sentence."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return convert


def parse_size(text: str) -> int:
    """Bytes of ``text``, such as ``64MiB``, ``1.5GiB`` or ``4096``; raises ValueError."""
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2] not in _SIZES:
        raise ValueError(f"{text!r} is not a size: write bytes, or a number with KiB, MiB or GiB, such as 64MiB")
    size = Fraction(match[1]) * _SIZES[match[2]]
    if size.denominator != 1 or size > _MAX_SIZE:
        raise ValueError(f"{text!r} is not a number of bytes that can be: 0 to {_MAX_SIZE} whole ones can")
    return int(size)


def parse_rate(text: str) -> int:
    """Bytes a second of ``text``, a size with or without ``/s``; raises ValueError."""
    return parse_size(text.removesuffix("/s"))


def parse_limit(text: str) -> int | None:
    """Bytes a second of ``text``, or None for ``none``; raises ValueError."""
    return None if text == "none" else parse_rate(text)


def parse_time(text: str) -> float:
    """Seconds of ``text``, such as ``300ms`` or ``1.5s``; raises ValueError."""
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2] not in _TIMES:
        raise ValueError(f"{text!r} is not a time: write a number with ms or s, such as 300ms")
    return float(Fraction(match[1]) * _TIMES[match[2]])


def parse_level(text: str) -> int | Literal["adaptive"]:
    """A zstd level of ``text``, 0 for none, or ``adaptive``; raises ValueError."""
    if text == "adaptive":
        return "adaptive"
    if re.fullmatch("[0-9]{1,2}", text) is None or int(text) > MAX_LEVEL:
        raise ValueError(f"{text!r} is not a level of compression: write 0 for none, 1 to {MAX_LEVEL}, or adaptive")
    return int(text)


def parse_guest_memory(text: str) -> tuple[int, Path]:
    """Guest physical address and file of ``GPA=FILE``, the address decimal or hexadecimal (0x); raises ValueError."""
    address, _, file = text.partition("=")
    if not file or "\0" in file or re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}|\d{1,20}", address, re.ASCII) is None:
        raise ValueError(f"{text!r} is not guest memory: write GPA=FILE, such as 0x100000000=/dev/shm/guest")
    number = int(address, 16) if address[1:2] in ("x", "X") else int(address)
    if number > _MAX_ADDRESS:
        raise ValueError(f"{address} is beyond the 64 bits of an address: write a smaller one")
    return number, Path(file)


def parse_file_address(text: str) -> str:
    """The address of a checkpoint, ``file:PATH``; raises ValueError. Its path is judged when it is opened."""
    if not text.startswith("file:") or text == "file:" or "\0" in text:
        raise ValueError(f"{text!r} is not the address of a checkpoint: write file:PATH")
    return text


def parse_kept_address(text: str) -> str:
    """The address a checkpoint goes to or comes from; raises ValueError. The rest shows when the transport is asked."""
    if ":" not in text or "\0" in text:
        raise ValueError(f"{text!r} is not the address of a checkpoint: write file:PATH, or exec:COMMAND")
    return text


def takes_output(argument: str) -> bool:
    """Whether ``argument`` is an address for which standard output is taken, so that nothing else may be printed to it:
    ``stdio:``, and ``fd:`` with descriptor 1.
    """
    return argument == "stdio:" or (argument.startswith("fd:") and "1" in argument[3:].split(","))


def parse_link_address(text: str) -> str:
    """The address of somebody who answers, so not of a file; raises ValueError. The rest shows when it is opened."""
    if text.startswith("file:"):
        raise ValueError(f"{text!r} is a file: use save and restore for a checkpoint")
    return text


def option_size(size: int) -> str:
    """``size`` bytes exactly, as :func:`parse_size` reads it: ``64MiB``."""
    unit = next(unit for unit in ("GiB", "MiB", "KiB", "") if size % _SIZES[unit] == 0 and (size or not unit))
    return f"{size // _SIZES[unit]}{unit}"


def option_time(seconds: float) -> str:
    """``seconds`` as :func:`parse_time` reads it: ``300ms`` or ``30s``."""
    return f"{seconds:g}s" if seconds >= 1 or seconds == 0 else f"{seconds * 1000:g}ms"


def show_size(size: float | None) -> str:
    """``size`` bytes, rounded, for people: ``64.0 MiB``; a dash for None."""
    if size is None:
        return "-"
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if size >= _SIZES[unit]), None)
    return f"{size:.0f} B" if unit is None else f"{size / _SIZES[unit]:.1f} {unit}"


def show_rate(rate: float | None) -> str:
    """``rate`` bytes a second, rounded, for people; a dash for None."""
    return "-" if rate is None else f"{show_size(rate)}/s"


def show_time(seconds: float | None) -> str:
    """``seconds``, rounded, for people; a dash for None."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def printable(text: str) -> str:
    """``text`` as one line without control characters: part of it may have been written by the other end."""
    return "".join(
        letter if letter.isprintable() else " " if letter.isspace() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
