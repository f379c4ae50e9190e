"""What a command says while it works and at its end: for people, for programs (``--json``), or nothing (``--quiet``).

Progress goes to standard error, results to standard output. A report is written from a thread of its own while a
migration runs: a terminal or pipe that takes nothing must not hold up a guest that is stopped.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import anyio
from anyio import to_thread
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vfiostream.cli.exits import Exit, Failure
from vfiostream.cli.values import printable, show_rate, show_size, show_time
from vfiostream.errors import TransportError
from vfiostream.pipeline.progress import Progress

_WIDTH = 1000
"""Columns that a table in a result may take."""
RATE_WINDOW = 1.0
"""Seconds over which the rate of a status is measured."""


class Result(NamedTuple):
    """What a command came to."""

    document: Mapping[str, Any]
    """For programs; ``docs/command-line.md`` lists the fields."""
    lines: Sequence[str]
    """For people."""
    code: Exit = Exit.DONE
    """Other than DONE where the command did its work and the answer is no."""


class Status(NamedTuple):
    """How far a migration was at one moment; sizes are bytes, times seconds."""

    phase: str
    elapsed: float
    round: int
    bytes: int
    transferred: int
    round_bytes: int
    rate: float | None
    pending: int | None
    dirty_rate: float | None
    throughput: float | None
    expected_downtime: float | None


class Watched(Progress):
    """Progress that notes each change of phase, so that none is missed between two looks at it."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._samples = deque([(0.0, 0)])
        """Elapsed time and content of earlier looks, for the rate."""
        self._turns: deque[Status] = deque()
        self._turned = anyio.Event()
        super().__init__()

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "phase" and value != "connecting":  # which is how it begins, before there is anything to look at
            self._turns.append(self.look())
            self._turned.set()

    def look(self) -> Status:
        """Say how far it is now."""
        elapsed = time.monotonic() - self._began
        while len(self._samples) > 1 and self._samples[1][0] <= elapsed - RATE_WINDOW:
            self._samples.popleft()
        then, content = self._samples[0]
        rate = (self.content - content) / (elapsed - then) if elapsed > then else None
        self._samples.append((elapsed, self.content))
        expected = self.expected_downtime
        return Status(
            self.phase,
            elapsed,
            self.round,
            self.content,
            self.transferred,
            self.round_content,
            rate,
            self.pending,
            self.dirty_rate,
            self.throughput,
            expected if expected is not None and math.isfinite(expected) else None,
        )

    async def follow(self, report: Report) -> None:
        """Give ``report`` its statuses, until all is done or this is cancelled; then call :meth:`finish`."""
        self._began = time.monotonic()
        period = report.period
        if period is None:
            return
        while True:
            if not self._turns:
                self._turns.append(self.look())
            self._turned = anyio.Event()
            while self._turns:
                await to_thread.run_sync(report.status, self._turns[0])
                self._turns.popleft()
            if self.phase == "done":
                return
            with anyio.move_on_after(period):
                await self._turned.wait()

    def finish(self, report: Report) -> None:
        """Give ``report`` the changes of phase that it has not seen."""
        if report.period is not None:
            while self._turns:
                report.status(self._turns.popleft())


class Report(ABC):
    """Where a command tells what it does. Every method blocks until it is written."""

    period: float | None = None
    """Seconds between two statuses; None for no statuses."""

    @abstractmethod
    def listening(self, address: str) -> None:
        """A sender can connect to ``address`` now."""

    @abstractmethod
    def refused(self, error: TransportError) -> None:
        """Somebody connected and was not believed; the command goes on waiting."""

    def event(self, document: Mapping[str, Any], line: str) -> None:  # noqa: B027 - as below
        """One of the many lines that a command prints which shows something."""

    def status(self, status: Status) -> None:  # noqa: B027 - nothing is what most reports make of it
        """How far it is."""

    def checking(self, rule: str, number: int, count: int) -> None:  # noqa: B027 - as above
        """The check of ``rule`` begins, ``number`` of ``count``."""

    @abstractmethod
    def result(self, result: Result) -> None:
        """The command has done its work."""

    @abstractmethod
    def failure(self, failure: Failure) -> None:
        """The command has failed."""

    def close(self) -> None:  # noqa: B027 - as above
        """No statuses follow; may be called again."""


class Plain(Report):
    """For people, where standard error is no terminal: nothing but the result."""

    def listening(self, address: str) -> None:
        _write(f"listening on {printable(address)}")

    def refused(self, error: TransportError) -> None:
        try:
            print(f"vfiostream: refused {printable(str(error))}", file=sys.stderr, flush=True)
        except OSError:
            pass  # Nobody reads that, and the next sender is waited for all the same.

    def event(self, document: Mapping[str, Any], line: str) -> None:
        _write(printable(line))

    def result(self, result: Result) -> None:
        for line in result.lines:
            _write(printable(line))

    def failure(self, failure: Failure) -> None:
        print(f"vfiostream: {printable(failure.message)}", file=sys.stderr, flush=True)


class Quiet(Plain):
    """Nothing but errors."""

    def listening(self, address: str) -> None:
        pass

    def result(self, result: Result) -> None:
        pass


class Terminal(Plain):
    """For people at a terminal: a table that is kept up to date, and the result."""

    period = 0.25

    def __init__(self, console: Console) -> None:
        self._live = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def status(self, status: Status) -> None:
        self._live.start()
        self._live.update(_table(status), refresh=True)

    def checking(self, rule: str, number: int, count: int) -> None:
        self._live.start()
        self._live.update(Text(f"{number} of {count}: {rule}"), refresh=True)

    def close(self) -> None:
        self._live.stop()


class Json(Report):
    """For programs: one JSON object a line on standard output, all of ASCII."""

    period = 0.5

    def listening(self, address: str) -> None:
        self._put("status", phase="listening", address=address)

    def refused(self, error: TransportError) -> None:
        self._put("refused", error=type(error).__name__, message=str(error))

    def event(self, document: Mapping[str, Any], line: str) -> None:
        self._put("event", **document)

    def status(self, status: Status) -> None:
        self._put("status", **status._asdict())

    def checking(self, rule: str, number: int, count: int) -> None:
        self._put("status", phase="checking", rule=rule, number=number, count=count)

    def result(self, result: Result) -> None:
        self._put("summary", **result.document)

    def failure(self, failure: Failure) -> None:
        document: dict[str, Any] = {"code": int(failure.code), "error": failure.error, "message": failure.message}
        if failure.source is not None:
            document["source"] = failure.source
        self._put("error", **document)

    @staticmethod
    def _put(message_type: str, **document: Any) -> None:
        _write(json.dumps({"message_type": message_type, **document}, allow_nan=False))


def report_for(*, as_json: bool, quiet: bool, live: bool) -> Report:
    """The report that was asked for; ``live`` allows one that repaints the terminal."""
    if as_json:
        return Json()
    if quiet:
        return Quiet()
    console = Console(stderr=True)
    if live and console.is_terminal and not console.is_dumb_terminal:
        return Terminal(console)
    return Plain()


def _table(status: Status) -> Table:
    cells = {
        "phase": status.phase,
        "round": str(status.round),
        "bytes": show_size(status.bytes),
        "rate": show_rate(status.rate),
        "pending": show_size(status.pending),
        "dirty rate": show_rate(status.dirty_rate),
        "downtime": show_time(status.expected_downtime),
    }
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    # Widths that hold still, within 80 columns.
    table.add_column("phase", no_wrap=True, min_width=len("stop-and-copy"))
    table.add_column("round", no_wrap=True, justify="right")
    for title, widest in zip(
        list(cells)[2:], ("1000.0 MiB", "1000.0 MiB/s", "1000.0 MiB", "1000.0 MiB/s", "1000.0 ms"), strict=True
    ):
        table.add_column(title, no_wrap=True, justify="right", min_width=len(widest))
    table.add_row(*map(Text, cells.values()))
    return table


def table_lines(table: Table) -> list[str]:
    """``table`` as lines of a result, none of them broken."""
    text = io.StringIO()
    Console(file=text, width=_WIDTH, color_system=None).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def _write(line: str) -> None:
    """Write a line to standard output. Nobody there to read it changes nothing about the migration: the exit code then
    has to say how it ended.
    """
    try:
        print(line, flush=True)
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        print(f"vfiostream: standard output can't be written ({error.strerror})", file=sys.stderr, flush=True)
