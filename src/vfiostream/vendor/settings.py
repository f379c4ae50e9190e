"""What a reference device is like: its sizes, its load, and the faults it is to have.

The names follow the options of ``vfiostream device serve``.
"""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args

from vfiostream.errors import UsageError
from vfiostream.uapi.four_region import MAX_VERSION, PAGE_SIZE
from vfiostream.uapi.vfio import MigrationFlags
from vfiostream.vendor.capture import CONFIG_HEADER

KIB = 1024
MIB = 1024 * KIB

Pattern = Literal["uniform", "hotspot", "sequential"]
Data = Literal["zeros", "text", "library", "random"]
Interface = Literal["four-region", "migration-region", "migration-states"]
Mmap = Literal["whole", "sparse", "none"]
LayoutName = Literal["natural", "packed"]

STATES: dict[str, MigrationFlags] = {
    "stop-copy": MigrationFlags.STOP_COPY,
    "p2p": MigrationFlags.P2P,
    "pre-copy": MigrationFlags.PRE_COPY,
}
MIN_CONFIG = 16
"""Bytes: the content starts with the count of pages written so far."""


class Operation(StrEnum):
    """What a client asks a driver to do, as a fault names it: the twelve operations of the four-region interface, and
    then those of the interfaces that followed. Changes of a migration state are named by arc.
    """

    GET_VERSION = "get-version"
    GET_CAPS = "get-caps"
    SET_STATE = "set-state"
    GET_CONFIG_SIZE = "get-config-size"
    SET_CONFIG_SIZE = "set-config-size"
    GET_CONFIG = "get-config"
    SET_CONFIG = "set-config"
    GET_MEMORY_SIZE = "get-memory-size"
    SET_MEMORY_SIZE = "set-memory-size"
    GET_MEMORY = "get-memory"
    SET_MEMORY = "set-memory"
    GET_BITMAP = "get-bitmap"

    GET_PENDING = "get-pending"
    DATA_READ = "data-read"
    DATA_WRITE = "data-write"
    START_LOG = "start-log"
    STOP_LOG = "stop-log"
    REPORT = "report"

    STOP_TO_STOP_COPY = "stop-to-stop-copy"
    STOP_COPY_TO_STOP = "stop-copy-to-stop"
    STOP_TO_RESUMING = "stop-to-resuming"
    RESUMING_TO_STOP = "resuming-to-stop"
    RUNNING_TO_PRE_COPY = "running-to-pre-copy"
    PRE_COPY_TO_RUNNING = "pre-copy-to-running"
    RUNNING_TO_RUNNING_P2P = "running-to-running-p2p"
    RUNNING_P2P_TO_RUNNING = "running-p2p-to-running"
    RUNNING_P2P_TO_STOP = "running-p2p-to-stop"
    STOP_TO_RUNNING_P2P = "stop-to-running-p2p"
    RUNNING_P2P_TO_PRE_COPY_P2P = "running-p2p-to-pre-copy-p2p"
    PRE_COPY_P2P_TO_RUNNING_P2P = "pre-copy-p2p-to-running-p2p"
    PRE_COPY_TO_PRE_COPY_P2P = "pre-copy-to-pre-copy-p2p"
    PRE_COPY_P2P_TO_PRE_COPY = "pre-copy-p2p-to-pre-copy"
    PRE_COPY_P2P_TO_STOP_COPY = "pre-copy-p2p-to-stop-copy"
    RUNNING_TO_STOP = "running-to-stop"
    STOP_TO_RUNNING = "stop-to-running"
    PRE_COPY_TO_STOP_COPY = "pre-copy-to-stop-copy"


_DATA = (Operation.DATA_READ, Operation.DATA_WRITE, Operation.START_LOG, Operation.STOP_LOG, Operation.REPORT)
OPERATIONS: dict[Interface, tuple[Operation, ...]] = {
    "four-region": tuple(Operation)[:12],
    "migration-region": (Operation.SET_STATE, Operation.GET_PENDING, *_DATA),
    "migration-states": (*_DATA, *(one for one in Operation if "-to-" in one)),
}
"""What there is in each interface."""

Ending = Literal["hang", "exit", "error"]
_ENDINGS: dict[str, Ending] = {ending: ending for ending in get_args(Ending)}


@dataclass(frozen=True, slots=True)
class Fault:
    """The ``n``-th ``operation`` (from 1, over the life of the process) goes wrong, before it has done anything."""

    operation: Operation
    n: int
    effect: int | Ending
    """An errno that the operation is refused with; ``hang``: this client gets no answer any more; ``exit``: the
    device's process ends at once with status 3; ``error``: refused with EIO, and the device is in its error state (the
    four regions have none).
    """


def parse_fault(text: str) -> Fault:
    """Parse ``OPERATION:N:EFFECT``, where EFFECT is the name of an errno, ``hang``, ``exit`` or ``error``; raises
    ValueError.
    """
    parts = text.split(":")
    if len(parts) != 3:
        raise ValueError(f"{text!r} is not a fault: write OPERATION:N:EFFECT, such as get-memory:3:EIO")
    name, count, effect = parts
    try:
        operation = Operation(name)
    except ValueError as error:
        raise ValueError(f"{name!r} in {text!r} is not an operation: choose from {', '.join(Operation)}") from error
    if not (count.isascii() and count.isdecimal()) or int(count) == 0:
        raise ValueError(f"{count!r} in {text!r} does not say which {name} fails: count from 1")
    if effect in _ENDINGS:
        return Fault(operation, int(count), _ENDINGS[effect])
    number = getattr(errno, effect, None) if effect.startswith("E") else None
    if not isinstance(number, int):
        endings = ", ".join(_ENDINGS)
        raise ValueError(f"{effect!r} in {text!r} is neither the name of an errno (such as EIO) nor one of {endings}")
    return Fault(operation, int(count), number)


@dataclass(frozen=True, slots=True)
class Settings:
    """One reference device. Raises UsageError for settings that no device can have."""

    interface: Interface = "four-region"
    """What its driver speaks: the four regions of 2019, the one region of Linux 5.8, or the states of Linux 5.18."""
    states: tuple[str, ...] = tuple(STATES)
    """Of STATES, what the driver of migration states has; ``stop-copy`` is not optional."""
    memory: int = 64 * MIB
    """Bytes of device memory, whole pages; 0 for a device without (no capability DEVICE_MEMORY)."""
    config: int = 64 * KIB
    """Bytes of config, without the header of its snapshot."""
    dirty_rate: int = 0
    """Bytes a second that the running device writes to its own memory, and as many again to mapped guest memory."""
    pattern: Pattern = "uniform"
    """Which pages it writes. hotspot: 90 % of the writes go to 10 % of the pages."""
    data: Data = "library"
    """What memory is filled with at start and what is written. library: bytes of shared libraries of this machine."""
    seed: int = 0
    """Of everything that is random, but the identity of capture sessions."""
    memory_region: int = 16 * MIB
    """Bytes that device memory moves through; also the data area of the migration region."""
    config_region: int = 1 * MIB
    bitmap_region: int = 64 * KIB
    mmap: Mmap = "whole"
    """Whether the three data regions, or the data area, can be mapped; sparse: all but their first page and one in
    their middle.
    """
    layout: LayoutName = "natural"
    capture_time: float = 0.0
    """Seconds that each read of the memory size takes."""
    chunk_time: float = 0.0
    """Seconds that each chunk of memory takes, out of the device or into it, as a device's DMA would."""
    state_time: float = 0.0
    """Seconds that each change of the device state takes."""
    version_string: str = ""
    """Own version; empty for one that names the generation of the driver and the sizes that both ends must share."""
    accept: tuple[str, ...] = ()
    """Foreign versions whose streams it takes besides its own, as patterns of ``fnmatch`` (``*``, ``?``, ``[seq]``)."""
    dirty_tracking: bool = True
    """Whether it tracks the guest pages it writes (capability SYSTEM_MEMORY). It writes them either way."""
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        if self.memory < 0 or self.memory % PAGE_SIZE:
            raise UsageError(f"{self.memory} bytes of device memory are not whole pages: use a multiple of {PAGE_SIZE}")
        for name, size in (
            ("memory", self.memory_region), ("config", self.config_region), ("bitmap", self.bitmap_region)
        ):  # fmt: skip
            if size <= 0 or size % PAGE_SIZE:
                raise UsageError(f"a {name} region of {size} bytes can't be mapped: use a multiple of {PAGE_SIZE}")
        if self.config < MIN_CONFIG:
            raise UsageError(f"a config of {self.config} bytes is too small: use at least {MIN_CONFIG}")
        if self.config + CONFIG_HEADER.size > self.config_region:
            raise UsageError(
                f"a config of {self.config} bytes and its header of {CONFIG_HEADER.size} do not fit a config region of "
                f"{self.config_region}: make the region larger"
            )
        if self.dirty_rate < 0:
            raise UsageError(f"a dirty rate of {self.dirty_rate} bytes a second makes no sense: use 0 or more")
        for name, seconds in (("capture", self.capture_time), ("chunk", self.chunk_time), ("state", self.state_time)):
            if not (math.isfinite(seconds) and seconds >= 0):
                raise UsageError(f"a {name} time of {seconds} seconds makes no sense: use 0 or more")
        for name, value, choices in (
            ("interface", self.interface, get_args(Interface)),
            ("pattern", self.pattern, get_args(Pattern)),
            ("data", self.data, get_args(Data)),
            ("mmap", self.mmap, get_args(Mmap)),
            ("layout", self.layout, get_args(LayoutName)),
        ):
            if value not in choices:
                raise UsageError(f"{value!r} is not a {name} this device knows: choose from {', '.join(choices)}")
        if "\0" in self.version_string or len(self.version_string.encode()) > MAX_VERSION:
            raise UsageError(f"the version string has a NUL or more than {MAX_VERSION} bytes: use a shorter plain one")

        if "stop-copy" not in self.states or not set(self.states) <= set(STATES):
            raise UsageError(
                f"the states {', '.join(self.states)} are not those of a driver: choose from {', '.join(STATES)}, "
                "and leave stop-copy in"
            )
        for fault in self.faults:
            if fault.operation not in OPERATIONS[self.interface]:
                raise UsageError(
                    f"{fault.operation} is no operation of the {self.interface} interface: choose from "
                    f"{', '.join(OPERATIONS[self.interface])}"
                )
            if fault.effect == "error" and self.interface == "four-region":
                raise UsageError("a driver of four regions has no error state: choose an errno, hang or exit")

    @property
    def migration_flags(self) -> MigrationFlags:
        """``states``, as a client is told."""
        return MigrationFlags(sum(STATES[name] for name in set(self.states)))

    @property
    def version(self) -> str:
        """The version string that the device reports."""
        return self.version_string or f"vfiostream-reference,generation=1,memory={self.memory},config={self.config}"
