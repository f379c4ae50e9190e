"""What is known of a device that is not here: in a description file, or at the head of a checkpoint.

A description file is made on one host to be read on another (``docs/command-line.md``), so it may be anybody's: its
size, depth and every value have a limit, and what it says is compared, never acted on.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import fields
from pathlib import Path
from typing import Any

import anyio.to_thread

from vfiostream.devices.contract import DescribedDevice, Device
from vfiostream.errors import BadDescription, Incompatible, StreamError, TransportError
from vfiostream.pipeline.describe import described, entry
from vfiostream.protocol import framing, limits, records
from vfiostream.protocol.records import DeviceEntry, Hello, PciEntry
from vfiostream.protocol.sessions import TargetSession
from vfiostream.version import SOFTWARE

VERSION = 1
"""Of the file's layout."""
MAX_FILE = 64 * 1024
"""Bytes of a description file. One of ours is smaller, whatever device it is of."""
MAX_DEPTH = 3
"""Objects and arrays in each other: the file's, the device's, and its flags or its PCI identity."""

_DEVICE_KEYS = tuple(field.name for field in fields(DeviceEntry) if field.name != "stream")
_PCI_KEYS = tuple(field.name for field in fields(PciEntry))
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def description_text(device: Device | DescribedDevice) -> str:
    """What the description file of ``device`` holds: JSON, all of ASCII. Raises
    :class:`~vfiostream.errors.Incompatible` for a device that says of itself what no description can hold.
    """
    try:
        known = records.plain(entry(1, device))
    except ValueError as error:
        raise Incompatible(f"{device.name} can't be described: {error}") from error
    del known["stream"]
    return json.dumps({"vfiostream_description": VERSION, "software": SOFTWARE, "device": known}, indent=2) + "\n"


async def read_description(path: Path) -> DescribedDevice:
    """What the file ``path`` says of a device: a description file, or a checkpoint of one device, of which the head is
    read and nothing else.

    Raises :class:`~vfiostream.errors.TransportError` where it can't be read,
    :class:`~vfiostream.errors.BadDescription` where it is neither, :class:`~vfiostream.errors.StreamError` for a
    checkpoint whose head is damaged, and :class:`~vfiostream.errors.Incompatible` for one of several devices.
    """
    return await anyio.to_thread.run_sync(_read, path)


def _read(path: Path) -> DescribedDevice:
    where = f"file:{path}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise TransportError(f"{where} can't be opened: {why}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BadDescription(f"{where} is no file: give a checkpoint, or what `vfiostream describe` has written")
        raw = os.pread(fd, MAX_FILE + 1, 0)
        if raw.startswith(framing.MAGIC):
            return _only_device(stored_hello(fd), where)
        try:
            return parse_description(raw)
        except ValueError as error:
            raise BadDescription(
                f"{where} is neither a checkpoint nor a description of a device: {error}; `vfiostream describe` makes "
                "descriptions"
            ) from error
    except OSError as error:
        raise TransportError(f"{where} can't be read: {error.strerror}") from error
    except StreamError as error:
        error.address = where
        raise
    finally:
        os.close(fd)


def stored_hello(fd: int) -> Hello:
    """The HELLO that the checkpoint in ``fd`` begins with; raises :class:`~vfiostream.errors.StreamError` where there
    is none, and OSError.
    """
    session = TargetSession(chunk=limits.MAX_CONTENT, answers=False)
    raw = os.pread(fd, framing.PREFIX_SIZE, 0)
    if len(raw) < framing.PREFIX_SIZE:
        raise StreamError("record 1", "is cut: the file is too short for a checkpoint")
    prefix = session.parse(raw)
    header = os.pread(fd, prefix.header_size, framing.PREFIX_SIZE)
    session.check(prefix, header, ())
    hello = session.receive(prefix, header)
    if not isinstance(hello, Hello):
        raise StreamError("record 1", "is no HELLO, which a checkpoint starts with")
    return hello


def _only_device(hello: Hello, where: str) -> DescribedDevice:
    if len(hello.devices) > 1:
        raise Incompatible(
            f"{where} holds {len(hello.devices)} devices, which only as many can take together: describe each of them "
            "by itself to compare it with another"
        )
    return described(hello.devices[0])


def parse_description(raw: bytes) -> DescribedDevice:
    """The device of a description file of these bytes; raises ValueError, with what is wrong."""
    if len(raw) > MAX_FILE:
        raise ValueError(f"it has more than {MAX_FILE} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    _check_depth(text)
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON (line {error.lineno}: {error.msg})") from error
    if type(values) is not dict or "vfiostream_description" not in values:
        raise ValueError("it is no JSON object with vfiostream_description")
    version = values["vfiostream_description"]
    if type(version) is not int or version != VERSION:
        shown = version if type(version) is int and 0 <= version < 1 << 32 else "that is not a number"
        raise ValueError(f"it is of version {shown}, and version {VERSION} is known here")
    _expect(values, ("vfiostream_description", "software", "device"), "it")
    _expect(values["device"], _DEVICE_KEYS, "its device")
    if values["device"]["pci"] is not None:
        _expect(values["device"]["pci"], _PCI_KEYS, "pci of its device")
    return described(records.device_entry({**values["device"], "stream": 1}))


def _check_depth(text: str) -> None:
    depth = 0
    for bracket in re.findall(r"[][{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"it has objects or arrays more than {MAX_DEPTH} deep in each other")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made


def _expect(values: Any, keys: tuple[str, ...], what: str) -> None:
    if type(values) is not dict or values.keys() != set(keys):
        raise ValueError(f"{what} is not an object of just {', '.join(keys)}")
