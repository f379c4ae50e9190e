"""Carrying a command out: its event loop, its signals, and the exit code it comes to.

SIGINT and SIGTERM cancel what runs. What that leads to is the pipeline's to decide: after the commit a migration goes
on to its outcome, which is what counts then. Further signals change nothing; all clean-up is bounded in time.
"""

from __future__ import annotations

import logging
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import anyio
from anyio.abc import Process, TaskGroup

from vfiostream.cli.exits import Cancelled, Exit, failure_of
from vfiostream.cli.report import Report, Result, Watched, report_for
from vfiostream.pipeline.failure import cause


@dataclass(frozen=True, slots=True)
class Output:
    """What was asked for about what is printed."""

    as_json: bool = False
    quiet: bool = False
    traceback: bool = False
    verbose: bool = False

    def log(self, level: int = logging.CRITICAL) -> None:
        """Send what the layers log to standard error: every event with ``--verbose``, else from ``level`` on."""
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
        logging.getLogger("vfiostream").setLevel(logging.DEBUG if self.verbose else level)


class Run:
    """A command at work."""

    def __init__(self, report: Report, tasks: TaskGroup) -> None:
        self.report = report
        self.progress = Watched()
        self.result: Result | None = None
        """What it came to; once this is set it is too late to cancel the command."""
        self._tasks = tasks

    def follow(self) -> None:
        """From now on, report :attr:`progress`."""
        self._tasks.start_soon(self.progress.follow, self.report)

    async def beside(self, task: Callable[..., Coroutine[Any, Any, None]], *arguments: object) -> None:
        """Start ``task`` (as a task group's ``start`` does), which goes on until the command ends."""
        await self._tasks.start(task, *arguments)


Work = Callable[[Run], Awaitable[None]]


def carry_out(work: Work, output: Output, *, cancelled: str, has_source: bool = False) -> Exit:
    """Do ``work``, report what it comes to and return the exit code.

    ``cancelled`` says how things stand after a signal; ``has_source`` is for a command that moves or saves a device.
    """
    output.log()
    # What is logged would be written into the middle of the table.
    report = report_for(as_json=output.as_json, quiet=output.quiet, live=not output.verbose)
    return anyio.run(_attend, work, report, output.traceback, cancelled, has_source)


async def _attend(work: Work, report: Report, with_traceback: bool, cancelled: str, has_source: bool) -> Exit:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        try:
            result = await _until_signal(work, report, signals)
            if result is None:
                raise Cancelled(f"cancelled: {cancelled}")
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, it gets its sentence and its exit code
            report.close()
            if with_traceback:
                traceback.print_exception(error)
            failure = failure_of(error, has_source=has_source)
            report.failure(failure)
            return failure.code
        report.close()
        report.result(result)
        return result.code


async def _until_signal(work: Work, report: Report, signals: AsyncIterator[signal.Signals]) -> Result | None:
    """Do ``work`` until it ends or the first signal has cancelled it; None where that came before its result."""
    scope = anyio.CancelScope()

    async def cancel() -> None:
        async for _ in signals:
            scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            run = Run(report, tasks)
            tasks.start_soon(cancel)
            with scope:
                await work(run)
            tasks.cancel_scope.cancel()
        run.progress.finish(report)
        return run.result
    except BaseExceptionGroup as group:
        error = cause(group)
    raise error


KILL_AFTER = 5.0
"""Seconds that a process of ours may take to end when it is told to."""


async def end(process: Process) -> None:
    """Have a process of ours end, whoever is cancelled meanwhile."""
    with anyio.CancelScope(shield=True):
        if process.returncode is None:
            process.terminate()
        with anyio.move_on_after(KILL_AFTER) as scope:
            await process.wait()
        if scope.cancelled_caught:
            process.kill()
        await process.aclose()
