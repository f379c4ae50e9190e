"""The state machine of Linux 5.18's migration states: which arcs there are, and which way a driver goes.

From the comment above ``enum vfio_device_mig_state`` in ``include/uapi/linux/vfio.h``: the arcs are a table, and a
change of state that is no arc is the shortest way along them, where

- the states that give data (the saving group) are passed through only on the way from one of them to another;
- data that has come to its last part is not continued by precopy: from STOP_COPY nothing leads to PRE_COPY.
"""

from __future__ import annotations

from collections import deque

from vfiostream.uapi.vfio import MigrationFlags, MigrationState

STOP = MigrationState.STOP
RUNNING = MigrationState.RUNNING
STOP_COPY = MigrationState.STOP_COPY
RESUMING = MigrationState.RESUMING
RUNNING_P2P = MigrationState.RUNNING_P2P
PRE_COPY = MigrationState.PRE_COPY
PRE_COPY_P2P = MigrationState.PRE_COPY_P2P

Arc = tuple[MigrationState, MigrationState]

_ALWAYS: tuple[Arc, ...] = (
    (STOP, STOP_COPY),
    (STOP_COPY, STOP),
    (STOP, RESUMING),
    (RESUMING, STOP),
    (RUNNING, PRE_COPY),
    (PRE_COPY, RUNNING),
)
_WITH_P2P: tuple[Arc, ...] = (
    (RUNNING, RUNNING_P2P),
    (RUNNING_P2P, RUNNING),
    (RUNNING_P2P, STOP),
    (STOP, RUNNING_P2P),
    (RUNNING_P2P, PRE_COPY_P2P),
    (PRE_COPY_P2P, RUNNING_P2P),
    (PRE_COPY, PRE_COPY_P2P),
    (PRE_COPY_P2P, PRE_COPY),
    (PRE_COPY_P2P, STOP_COPY),
)
_WITHOUT_P2P: tuple[Arc, ...] = (
    (RUNNING, STOP),
    (STOP, RUNNING),
    (PRE_COPY, STOP_COPY),
)
ARCS = _ALWAYS + _WITH_P2P + _WITHOUT_P2P
"""All of them; which ones a driver has depends on whether it has the P2P states."""

SAVING = frozenset((PRE_COPY, PRE_COPY_P2P, STOP_COPY))
"""States that give data."""
OPENING = frozenset(((RUNNING, PRE_COPY), (RUNNING_P2P, PRE_COPY_P2P), (STOP, STOP_COPY), (STOP, RESUMING)))
"""Arcs that open a stream of data."""

_NEEDS = {
    STOP_COPY: MigrationFlags.STOP_COPY,
    RUNNING_P2P: MigrationFlags.P2P,
    PRE_COPY: MigrationFlags.PRE_COPY,
    PRE_COPY_P2P: MigrationFlags.PRE_COPY | MigrationFlags.P2P,
}


def has(flags: MigrationFlags, state: MigrationState) -> bool:
    """Whether a driver with ``flags`` has ``state``."""
    return _NEEDS.get(state, flags) in flags


def path(flags: MigrationFlags, start: MigrationState, end: MigrationState) -> list[MigrationState] | None:
    """The states from ``start`` (without it) to ``end``; None where no way leads there."""
    if MigrationState.ERROR in (start, end) or not has(flags, end):
        return None
    if start is STOP_COPY and end in (PRE_COPY, PRE_COPY_P2P):
        return None
    arcs = _ALWAYS + (_WITH_P2P if MigrationFlags.P2P in flags else _WITHOUT_P2P)
    through_saving = start in SAVING and end in SAVING
    ways: deque[list[MigrationState]] = deque([[]])
    seen = {start}
    while ways:
        way = ways.popleft()
        at = way[-1] if way else start
        if at is end:
            return way
        if way and at in SAVING and not through_saving:
            continue
        for one, other in arcs:
            if one is at and other not in seen and has(flags, other):
                seen.add(other)
                ways.append([*way, other])
    return None
