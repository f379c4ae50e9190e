"""``conformance``: does a driver keep the rules of its interface of migration?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from typing import Any, BinaryIO

import click
from rich.table import Table
from rich.text import Text

from vfiostream.access import open_access
from vfiostream.access.contract import Access
from vfiostream.access.record import Recording
from vfiostream.cli import options
from vfiostream.cli.exits import Exit
from vfiostream.cli.report import Result, table_lines
from vfiostream.cli.run import Output, Run, carry_out
from vfiostream.cli.values import option_time, option_type, parse_time, printable
from vfiostream.conformance import junit
from vfiostream.conformance.rules import Rule, Verdict
from vfiostream.conformance.run import Report, run as check_rules
from vfiostream.errors import UsageError


@click.command
@click.argument("device")
@click.option(
    "--target",
    metavar="DEVICE",
    help="A second device of the same kind, to load streams into.  [default: DEVICE itself, reset between]",
)
@click.option("--yes", is_flag=True, help="Nobody uses these devices: load garbage into them, stop and reset them.")
@click.option(
    "--junit",
    "path",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write a report in JUnit XML too, also of a run that was cut short.",
)
@click.option(
    "--check-timeout",
    type=option_type(parse_time),
    metavar="TIME",
    default=option_time(120.0),
    show_default=True,
    help="How long the check of one rule may take.",
)
@options.device_timeout
@options.recordings
@options.answers
def conformance(
    device: str,
    target: str | None,
    yes: bool,
    path: str | None,
    check_timeout: float,
    device_timeout: float,
    recordings: options.Recordings,
    output: Output,
) -> Exit:
    """Check DEVICE against the rules of its interface of migration, for the author of its driver.

    Never run it on a device in use. It saves and loads its state, loads streams that are cut, damaged and reordered,
    asks for what its interface forbids, resets it over and over, and leaves it running and reset: whatever a guest
    had there is lost. So it wants --yes, and opens the device as its only user.

    The device is opened several times: with --record FILE, the first is in FILE, the next in FILE.2 and so on.

    docs/conformance.md lists the rules. Exit code 8 where one is broken, or the device can't be brought back after a
    check; a rule that can't be tested on this device is none.
    """
    if not yes:
        raise UsageError(
            f"this loads garbage into {device} and resets it, and who uses it loses its state: add --yes if nobody does"
        )
    if target == device:
        raise UsageError(f"{device} is its own target where none is given: leave --target away, or name another")

    opens, *opens_target = (
        _opener(address, recording, device_timeout)
        for address, recording in recordings.of(device, *([] if target is None else [target]))
    )

    with ExitStack() as stack:
        file = None if path is None else stack.enter_context(_opened(path))

        async def work(run: Run) -> None:
            report: Report | None = None

            def begin(rule: Rule, number: int, count: int) -> None:
                run.report.checking(rule.id, number, count)

            def done(so_far: Report) -> None:
                nonlocal report
                report = so_far

            try:
                await check_rules(
                    opens,
                    opens_target[0] if opens_target else None,
                    limit=check_timeout,
                    begin=begin,
                    done=done,
                )
            finally:
                if file is not None and report is not None:
                    _write(file, report)
            assert report is not None, "there is no interface without rules"
            run.result = Result(_document(report), _lines(report), Exit.DONE if report.passed else Exit.BROKEN)

        return carry_out(work, output, cancelled=f"{device} was reset, as far as it let itself be")


def _opener(address: str, recording: Recording | None, timeout: float) -> Callable[[], Awaitable[Access]]:
    """What opens the device, again and again: each time has a record of its own."""
    numbers = count(1)

    async def opened() -> Access:
        number, here = next(numbers), recording
        if recording is not None and number > 1:
            here = replace(recording, path=recording.path.with_name(f"{recording.path.name}.{number}"))
        return await open_access(address, timeout=timeout, recording=here)

    return opened


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "wb", buffering=0)
    except OSError as error:
        raise UsageError(f"{path} can't be written ({error.strerror}): name another file for --junit") from error


def _write(file: BinaryIO, report: Report) -> None:
    try:
        file.write(junit.to_junit(report))
    except OSError as error:
        raise UsageError(f"the report can't be written ({error.strerror}): name another file for --junit") from error


def _document(report: Report) -> dict[str, Any]:
    return {
        "status": "kept" if report.passed else "broken",
        "device": report.device,
        "target": report.target,
        "interface": report.interface,
        "rules": [
            {
                "id": one.rule.id,
                "verdict": one.verdict.value,
                "detail": one.detail,
                "sentence": one.rule.sentence,
                "source": one.rule.source,
                "seconds": one.seconds,
            }
            for one in report.outcomes
        ],
    }


def _lines(report: Report) -> list[str]:
    table = Table(box=None, pad_edge=False)
    for title in ("rule", "verdict", ""):
        table.add_column(title, no_wrap=True)
    for one in report.outcomes:
        detail = "see below" if one.verdict is Verdict.BROKEN else one.detail
        table.add_row(*(Text(printable(cell)) for cell in (one.rule.id, one.verdict.value, detail)))
    lines = table_lines(table)
    for one in report.broken:
        lines += [
            f"{one.rule.id} is broken: {one.detail}",
            f"  rule    {one.rule.sentence}",
            f"  source  {one.rule.source}",
        ]
    counts = Counter(one.verdict for one in report.outcomes)
    summed = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict)
    into = "itself" if report.target is None else report.target
    lines.append(f"{report.device}, {report.interface}, loading into {into}: {summed}")
    return lines
