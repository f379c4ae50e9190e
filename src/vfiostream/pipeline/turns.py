"""Whose turn it is, where several streams have something to send.

The order is by *start-time fair queueing* (Goyal, Vin and Cheng, SIGCOMM 1996): each stream has a position of its own,
in bytes, and what has the smallest goes first. A stream that had nothing to say for a while begins where the others
are: it saves up no turns, and it waits for one item of each other stream however many those have in line. So a device
whose memory is sent from where it lies, one piece at a time, gets as much of the link as one that has filled the byte
budget with copies.

The items of one stream stay in their order, and a *barrier* stays behind everything that was put before it, and before
everything after. Pure: nothing here waits.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar, cast

Item = TypeVar("Item")


class _Entry(NamedTuple):
    start: int
    """Position of its stream at which it begins."""
    number: int
    """In the order in which all were put."""
    stream: int | None
    item: object


class Turns(Generic[Item]):
    """Items in line."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._number = 0
        self._now = 0
        """Where the item begins that was taken last."""
        self._ends: dict[int, int] = {}
        """Where the last item of each stream ends."""
        self._barrier = 0
        """Where the last barrier is."""

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, item: Item, stream: int | None, size: int) -> None:
        """Put an item of ``size`` bytes in line; without a ``stream`` it is a barrier."""
        start = max(self._now, self._barrier)
        if stream is None:
            self._barrier = start = max(start, *self._ends.values()) if self._ends else start
        else:
            start = max(start, self._ends.get(stream, 0))
            self._ends[stream] = start + size
        self._number += 1
        insort(self._entries, _Entry(start, self._number, stream, item))

    def take(self, is_ready: Callable[[Item], bool]) -> Item | None:
        """Take the item whose turn it is; None where there is none that is ready. One that is not ready holds up those
        of its own stream only.
        """
        held: set[int] = set()
        for index, entry in enumerate(self._entries):
            item = cast("Item", entry.item)
            if entry.stream not in held and is_ready(item):
                if entry.stream is None and index:
                    return None
                del self._entries[index]
                self._now = max(self._now, entry.start)
                return item
            if entry.stream is None:
                return None
            held.add(entry.stream)
        return None

    def clear(self) -> None:
        """Let go of everything."""
        self._entries.clear()
