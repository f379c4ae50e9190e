"""``record show``: what a record of a device holds, for people and for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vfiostream.access.record import SMALL
from vfiostream.access.record_format import Bulk, Event, Reader, describe, describe_answer
from vfiostream.access.replay import open_record
from vfiostream.cli import options
from vfiostream.cli.exits import Exit
from vfiostream.cli.report import Result
from vfiostream.cli.run import Output, Run, carry_out
from vfiostream.errors import StreamError


@click.group
def record() -> None:
    """Look at what --record wrote."""


@record.command
@click.argument("file", type=click.Path(path_type=Path))
@options.answers
def show(file: Path, output: Output) -> Exit:
    """Print what a device was asked, and what it answered.

    FILE is what --record wrote. A line has the event's number, the seconds since the record began, the question,
    the answer, and how long that took. Exit code 4 where the file is no record, or damaged; what is before that is
    printed.
    """

    async def work(run: Run) -> None:
        with open_record(file) as opened:
            try:
                events = Reader(opened)
                number = 0
                while event := events.next():
                    number = event.call.number
                    run.report.event(_document(event), _line(event))
            except ValueError as error:
                raise StreamError(str(file), f"is no record that could be read on: {error}") from error
        end = "is cut in the middle of what follows" if events.is_cut else "ends there"
        run.result = Result({"status": "cut" if events.is_cut else "whole", "events": number}, [f"the record {end}"])

    return carry_out(work, output, cancelled="nothing was changed")


def _line(event: Event) -> str:
    call, answer = event
    took = "" if answer is None else f" ({answer.took / 1000:.3f} ms)"
    asked = describe(call.what, call.arguments, call.bulk)
    return f"{call.number:>6} {call.at / 1e6:>10.6f}  {asked}: {describe_answer(answer)}{took}"


def _document(event: Event) -> dict[str, Any]:
    call, answer = event
    return {
        "number": call.number,
        "at": call.at / 1e6,
        "call": call.what,
        "arguments": _plain(call.arguments),
        "written": _bulk(call.bulk),
        "answered": answer is not None,
        "took": None if answer is None else answer.took / 1e6,
        "result": None if answer is None or answer.failed is not None else _plain(answer.result),
        "read": None if answer is None else _bulk(answer.bulk),
        "error": None if answer is None or answer.failed is None else answer.failed._asdict(),
    }


def _plain(values: Any) -> dict[str, Any]:
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in values.items()}


def _bulk(bulk: Bulk | None) -> dict[str, Any] | None:
    if bulk is None:
        return None
    return {
        "size": bulk.size,
        "xxh3": f"{bulk.digest:016x}",
        "bytes": None if bulk.data is None or bulk.size > SMALL else bytes(bulk.data).hex(),
    }
