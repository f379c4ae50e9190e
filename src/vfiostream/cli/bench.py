"""``bench``: what this machine and a link do to a migration, without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import click
from anyio import to_thread
from anyio.streams.buffered import BufferedByteReceiveStream

from vfiostream import _accel, probe, transports
from vfiostream.cli import options
from vfiostream.cli.exits import Exit, failure_of
from vfiostream.cli.report import Report, Result, Watched
from vfiostream.cli.run import KILL_AFTER, Output, Run, carry_out, end
from vfiostream.cli.specimen import DATA, WHATS, Data, check_room, check_size, make_content
from vfiostream.cli.trial import Answer, Part, Run as Measured, Served, measure, serve
from vfiostream.cli.values import (
    option_size,
    option_type,
    parse_level,
    parse_link_address,
    parse_size,
    show_rate,
    show_size,
    show_time,
)
from vfiostream.errors import TransportError, VfiostreamError
from vfiostream.pipeline.progress import Progress, Summary
from vfiostream.pipeline.settings import Settings
from vfiostream.policy import Precopy
from vfiostream.transports.options import Options
from vfiostream.version import SOFTWARE

GIB = 1 << 30
SIZE = GIB
MAX_SIZE = 16 * GIB
"""Bytes that a listener takes at most for one part of a bench."""
OUTLOOKS = (4 * GIB, 16 * GIB, 64 * GIB)
"""Sizes of guests for which it is said what follows."""

LOOPBACK = "tcp:127.0.0.1:0"
STARTS_WITHIN = 30.0
"""Seconds that the other process may take to start."""
MAX_LINE = 4096


def parse_compression(text: str) -> tuple[str, Settings]:
    """Name and settings of ``text``: ``off``, ``adaptive`` or a zstd level; raises ValueError."""
    try:
        if text == "0":
            raise ValueError("for none, bench has a word")
        return text, Settings(compression=0 if text == "off" else parse_level(text))
    except ValueError as error:
        raise ValueError(f"{text!r} is no compression: write off, adaptive, or a zstd level from 1 to 19") from error


@click.command
@click.argument("address", required=False, type=option_type(parse_link_address))
@click.option("--listen", metavar="ADDRESS", type=option_type(parse_link_address), help="Serve benches here instead.")
@click.option("--once", is_flag=True, help="With --listen: end after one bench.")
@click.option(
    "--max-size",
    type=option_type(parse_size),
    metavar="SIZE",
    help=f"With --listen: take no more memory than this.  [default: {option_size(MAX_SIZE)}]",
)
@click.option(
    "--size",
    type=option_type(parse_size),
    metavar="SIZE",
    help=f"Of guest memory, and of the reference device's memory.  [default: {option_size(SIZE)}]",
)
@click.option("--data", type=click.Choice(DATA), help="What memory holds.  [default: library]")
@click.option(
    "--compress",
    "compressions",
    type=option_type(parse_compression),
    multiple=True,
    metavar="LEVEL",
    help="Measure this too, besides no compression: adaptive, or a zstd level, 1 to 19. May be repeated.",
)
@options.link(listens=True)
@options.progress
def bench(
    address: str | None,
    listen: str | None,
    once: bool,
    max_size: int | None,
    size: int | None,
    data: Data | None,
    compressions: tuple[tuple[str, Settings], ...],
    link: Options,
    output: Output,
) -> Exit:
    """Measure what this machine and a link do to a migration, without a device.

    Without ADDRESS, to another process on this machine, over TCP. For a link between two hosts, start `vfiostream
    bench --listen ADDRESS` on one and `vfiostream bench ADDRESS` on the other, with the tls:HOST:PORT, tcp:HOST:PORT
    or unix:PATH to listen at. Moves guest memory, and a reference device, which is a simulation inside each process.
    Whoever can connect to a listener, and is believed where it is tls:, can have it use up to --max-size of memory.
    """
    asks = {"ADDRESS": address, "--size": size, "--data": data, "--compress": compressions}
    takes = {"--once": once, "--max-size": max_size, "--plain": link.plain}
    given = [name for name, value in (takes if listen is None else asks).items() if value]
    if given:
        given_where, chooser = ("without", "listens") if listen is None else ("with", "connects")
        raise click.UsageError(f"{given_where} --listen, {given[0]} has no meaning: who {chooser} chooses it")
    if listen is not None:
        limit = MAX_SIZE if max_size is None else max_size
        return _serve(listen, link, limit, once, output)
    chosen = dict([parse_compression("off"), *compressions])
    if address is None and link.credentials is not None:
        raise click.UsageError("without ADDRESS the bench stays on this machine, where certificates have no meaning")
    return _measure(address, link, SIZE if size is None else size, data or "library", list(chosen.items()), output)


# ---- one end: who connects


def _measure(
    address: str | None,
    link: Options,
    size: int,
    data: Data,
    settings: Sequence[tuple[str, Settings]],
    output: Output,
) -> Exit:
    check_size(size)

    async def work(run: Run) -> None:
        # Over loopback both ends are on this machine. A far end looks for its room by itself.
        check_room(size if address else 2 * size)
        content = make_content(data)
        speeds = await to_thread.run_sync(probe.speeds, content)
        runs: list[Measured] = []
        async with _other_end(address, size) as there:
            for what in WHATS:
                part = Part(what, size, len(settings), last=what == WHATS[-1])
                measured, other = await measure(there, link, part, content, settings, _followed(run.report))
                runs += measured
        run.result = _result(there, address is None, data, size, speeds, runs, other)

    return carry_out(work, output, cancelled="what the bench started has ended")


def _followed(report: Report) -> Callable[[Callable[[Progress], Awaitable[Summary]]], Awaitable[Summary]]:
    async def follow(carry: Callable[[Progress], Awaitable[Summary]]) -> Summary:
        progress = Watched()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(progress.follow, report)
            summary = await carry(progress)
            tasks.cancel_scope.cancel()
        progress.finish(report)
        return summary

    return follow


@asynccontextmanager
async def _other_end(address: str | None, size: int) -> AsyncIterator[str]:
    """``address``; or, where that is None, that of a process of ours that listens for one bench of ``size``."""
    if address is not None:
        yield address
        return
    listening = ("bench", "--listen", LOOPBACK, "--once", "--max-size", str(size), "--json")
    process = await anyio.open_process(
        [sys.executable, "-m", "vfiostream", *listening],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None,
        env={**os.environ, "TERM": "dumb"},
        start_new_session=True,  # An interrupt at the terminal is for us, and we end it.
    )
    try:
        assert process.stdout is not None
        try:
            with anyio.fail_after(STARTS_WITHIN):
                line = await BufferedByteReceiveStream(process.stdout).receive_until(b"\n", MAX_LINE)
            where: str = json.loads(line)["address"]
        except (TimeoutError, anyio.IncompleteRead, anyio.DelimiterNotFound, ValueError, KeyError) as error:
            raise TransportError("the other process of the bench did not start; what it said stands above") from error
        yield where
        with anyio.move_on_after(KILL_AFTER):
            await process.wait()
    finally:
        await end(process)


def _result(
    address: str, loopback: bool, data: Data, size: int, speeds: probe.Speeds, runs: Sequence[Measured], other: Answer
) -> Result:
    best = max((run for run in runs if run.what == "guest memory"), key=lambda run: run.here.throughput)
    outlooks = [probe.outlook(wanted, best.here.throughput, Precopy()) for wanted in OUTLOOKS]
    document = {
        "status": "done",
        "address": address,
        "loopback": loopback,
        "data": data,
        "size": size,
        "processors": os.cpu_count(),
        "software": SOFTWARE,
        "accelerator": _accel.IMPLEMENTATION,
        "other_software": other.software,
        "other_accelerator": other.accelerator,
        "speeds": speeds._asdict(),
        "runs": [_run_document(run) for run in runs],
        "outlook_compression": best.compression,
        "outlook": [outlook._asdict() for outlook in outlooks],
    }
    return Result(document, _lines(document, speeds, runs, best, outlooks))


def _run_document(run: Measured) -> dict[str, Any]:
    return {
        "what": run.what,
        "simulated": run.what == "reference device",
        "compression": run.compression,
        "bytes": run.summary.content,
        "transferred": run.summary.transferred,
        "seconds": run.here.seconds,
        "throughput": run.here.throughput,
        "downtime_seconds": run.summary.downtime.total,
        "source_cpu_seconds": run.here.cpu_seconds,
        "source_cpu_per_gb": run.here.cpu_per_gb,
        "target_cpu_seconds": run.there.cpu_seconds,
        "target_cpu_per_gb": run.there.cpu_per_gb,
    }


def _lines(
    known: dict[str, Any],
    speeds: probe.Speeds,
    runs: Sequence[Measured],
    best: Measured,
    outlooks: Sequence[probe.Outlook],
) -> list[str]:
    policy = Precopy()
    where = "another process here" if known["loopback"] else known["address"]
    here, there = ((known["software"], known["accelerator"]), (known["other_software"], known["other_accelerator"]))
    found = [
        f"here           {here[0]}, accelerator {here[1]}, {known['processors']} processors",
        f"there          {there[0]}, accelerator {there[1]}; {where}",
        "",
        "one thread here",
        f"  copy         {show_rate(speeds.copy)}",
        f"  check        {show_rate(speeds.check)}, xxh3",
        f"  zstd 1       {show_rate(speeds.compress)}, {known['data']} data, {speeds.ratio:.2f} to 1",
        "",
        f"migrations of {show_size(known['size'])} of {known['data']} data, touched before at both ends",
        f"  {'':<18}{'compress':<10}{'rate':>13}{'on the link':>13}{'CPU s/GB':>10}{'there':>7}{'downtime':>11}",
    ]
    found += [
        f"  {run.what:<18}{run.compression:<10}{show_rate(run.here.throughput):>13}"
        f"{show_size(run.summary.transferred):>13}{run.here.cpu_per_gb:>10.2f}{run.there.cpu_per_gb:>7.2f}"
        f"{show_time(run.summary.downtime.total):>11}"
        for run in runs
    ]
    found += [
        "guest memory is plain memory; the reference device is a simulation inside each process, no hardware",
        "",
        f"what follows for guest memory at {show_rate(best.here.throughput)} (compress {best.compression}), with a "
        f"downtime of {show_time(policy.downtime_limit)}",
    ]
    return found + [
        f"  {show_size(outlook.size):<10} precopy {show_time(outlook.seconds)} at rest; up to "
        f"{show_rate(outlook.dirty_rate)} may be dirtied, which takes {show_time(outlook.seconds_at_dirty_rate)}"
        for outlook in outlooks
    ]


# ---- the other end: who listens


def _serve(address: str, link: Options, max_size: int, once: bool, output: Output) -> Exit:
    async def work(run: Run) -> None:
        # Whoever benches waits for our notes, on connections of their own.
        async with transports.listen(address, replace(link, refused=run.report.refused, silent=True)) as listener:
            run.report.listening(listener.address)
            if once:
                run.result = _served(1, await serve(listener, max_size))
                return
            benches = 0
            while True:
                run.result = _served(benches, [])  # A signal that comes now ends well.
                try:
                    served = await serve(listener, max_size)
                except VfiostreamError as error:
                    if output.traceback:
                        traceback.print_exception(error)
                    run.report.failure(failure_of(error, has_source=False))
                else:
                    benches += 1
                    run.report.result(_served(benches, served))

    return carry_out(work, output, cancelled="the bench is not over, and the other end was told")


def _served(benches: int, parts: Sequence[Served]) -> Result:
    runs = [(part.part.what, cost) for part in parts for cost in part.costs]
    document = {
        "status": "done",
        "benches": benches,
        "runs": [
            {
                "what": what,
                "simulated": what == "reference device",
                "bytes": cost.content,
                "seconds": cost.seconds,
                "throughput": cost.throughput,
                "target_cpu_seconds": cost.cpu_seconds,
                "target_cpu_per_gb": cost.cpu_per_gb,
            }
            for what, cost in runs
        ],
    }
    lines = [
        f"{what:<18}{show_size(cost.content):>11}{show_rate(cost.throughput):>15}{cost.cpu_per_gb:>8.2f} CPU s/GB here"
        for what, cost in runs
    ]
    return Result(document, lines or [f"benches served: {benches}"])
