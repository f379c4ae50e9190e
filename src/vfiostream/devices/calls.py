"""Which call of :class:`vfiostream.devices.contract.Device` is in order when: the same for every interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TypeAlias

from vfiostream.errors import LocalProtocolError


class Phase(StrEnum):
    """Where a device is in its migration; the values are for messages."""

    IDLE = "idle"
    TRACKING = "tracking"
    QUIET = "quiet"
    STOPPED = "stopped"
    RELEASED = "released"
    WAKING = "quiet, to run on"
    SOURCE_FAILED = "in a session that has failed"
    LOADING = "loading"
    FILLED = "loading, with bytes that wait to be delivered"
    LOADED = "loaded"
    LOADED_QUIET = "loaded and quiet"
    RUNNING = "running what it has loaded"
    ABANDONED = "abandoned"
    LOAD_FAILED = "in a load that has failed"
    CLOSED = "closed"


_Table: TypeAlias = dict[str, dict[Phase, Phase]]

_READING = {Phase.TRACKING: Phase.TRACKING, Phase.STOPPED: Phase.STOPPED}
_PENDING = {Phase.TRACKING: Phase.TRACKING}

SOURCE_CALLS: _Table = {
    "start_precopy": {Phase.IDLE: Phase.TRACKING},
    "begin_round": _READING,
    "capture": _READING,
    "next": _READING,
    "read": _READING,
    "merge_dirty": _READING,
    "pending": _PENDING,
    "quiesce": {
        Phase.TRACKING: Phase.QUIET,
        Phase.QUIET: Phase.QUIET,
        Phase.STOPPED: Phase.WAKING,
        Phase.RELEASED: Phase.WAKING,
        Phase.WAKING: Phase.WAKING,
        Phase.SOURCE_FAILED: Phase.SOURCE_FAILED,
    },
    "stop": {Phase.QUIET: Phase.STOPPED},
    "capture_config": {Phase.STOPPED: Phase.STOPPED},
    "release": {Phase.STOPPED: Phase.RELEASED, Phase.SOURCE_FAILED: Phase.RELEASED},
    "resume": {
        Phase.IDLE: Phase.IDLE,
        Phase.TRACKING: Phase.IDLE,
        Phase.QUIET: Phase.IDLE,
        Phase.STOPPED: Phase.IDLE,
        Phase.RELEASED: Phase.IDLE,
        Phase.WAKING: Phase.IDLE,
        Phase.SOURCE_FAILED: Phase.IDLE,
    },
}
_FILLING = {Phase.LOADING: Phase.LOADING}
TARGET_CALLS: _Table = {
    "start_load": {Phase.IDLE: Phase.LOADING},
    "begin_capture": _FILLING,
    "room": _FILLING,
    "fill": _FILLING,
    "deliver": {Phase.FILLED: Phase.LOADING},
    "write": _FILLING,
    "begin_config": _FILLING,
    "load_pci_config": _FILLING,
    "finish_load": {Phase.LOADING: Phase.LOADED},
    "quiesce": {Phase.LOADED: Phase.LOADED_QUIET},
    "run": {Phase.LOADED: Phase.RUNNING, Phase.LOADED_QUIET: Phase.RUNNING},
    # Where several devices move, all are abandoned if one fails, wherever the others are.
    "abandon": {
        Phase.IDLE: Phase.ABANDONED,
        Phase.LOADING: Phase.ABANDONED,
        Phase.FILLED: Phase.ABANDONED,
        Phase.LOADED: Phase.ABANDONED,
        Phase.LOADED_QUIET: Phase.ABANDONED,
        Phase.RUNNING: Phase.ABANDONED,
        Phase.LOAD_FAILED: Phase.ABANDONED,
        Phase.ABANDONED: Phase.ABANDONED,
    },
}


class Calls:
    """The calls to one device, called ``device`` in messages."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.phase = Phase.IDLE

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Check that the call ``name`` is in order. It leaves a failed device behind unless it comes to its end."""
        then = self.check(name)
        is_source = self.phase in SOURCE_CALLS.get(name, {})
        self.phase = Phase.SOURCE_FAILED if is_source else Phase.LOAD_FAILED
        yield
        self.phase = then

    def check(self, name: str) -> Phase:
        """Raise :class:`~vfiostream.errors.LocalProtocolError` where the call is out of order; returns the phase that
        follows it.
        """
        for table in (SOURCE_CALLS, TARGET_CALLS):
            if self.phase in table.get(name, {}):
                return table[name][self.phase]
        raise self.misuse(f"{name} is out of order while the device is {self.phase}")

    def misuse(self, problem: str) -> LocalProtocolError:
        """What to raise for a call that makes no sense."""
        return LocalProtocolError(f"{self._device}: {problem}")
