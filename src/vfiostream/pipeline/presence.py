"""The target's guest memory, made present a little ahead of the data, in a thread.

Touching a page for the first time costs more than receiving it does: a fault each, and a page to be found and cleared.
Asked for in large steps it costs less, and it runs beside the transfer. Only a little ahead, and only where content
comes: what is never written stays a hole. On the source it would gain nothing, as the kernel maps what is read in
stretches (``docs/performance.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import anyio

from vfiostream.guest import GuestRange
from vfiostream.pipeline.workers import Workers

STEP = 4 * 1024 * 1024
AHEAD = 8 * STEP
"""Bytes ahead of what is used now; so much at most is made present for nothing where zeros follow."""


class Presence:
    """Of the memory of ``ranges``."""

    def __init__(self, ranges: Sequence[GuestRange]) -> None:
        self._asked = {area.address: area.present for area in ranges}
        """Where what was asked for ends, in bytes from the start of the range."""
        self._present = dict(self._asked)
        """Where what is present ends."""
        self._worker = Workers(lambda: None, 1)
        self._news = anyio.Event()

    async def run(self) -> None:
        """A task: serves until it is cancelled. Raises :class:`~vfiostream.errors.GuestError` where there is no memory
        to be had.
        """
        await self._worker.run()

    def ask(self, area: GuestRange, pos: int) -> None:
        """The bytes of ``area`` from ``pos`` on are used next. Positions only go up."""
        asked = max(self._asked[area.address], pos // STEP * STEP)
        until = min(area.length, pos + AHEAD)
        while asked < until:
            size = min(STEP, area.length - asked)
            self._worker.submit(partial(_make_present, area, asked, size), partial(self._reached, area, asked + size))
            asked += size
        self._asked[area.address] = asked

    async def wait(self, area: GuestRange, pos: int, size: int) -> None:
        """Ask, and wait until the ``size`` bytes of ``area`` at ``pos`` are present."""
        self.ask(area, pos)
        while self._present[area.address] < pos + size:
            self._news = anyio.Event()
            await self._news.wait()

    def _reached(self, area: GuestRange, end: int, _: None) -> None:
        self._present[area.address] = end
        self._news.set()


def _make_present(area: GuestRange, start: int, size: int, _: None) -> None:
    area.make_present(start, size)
