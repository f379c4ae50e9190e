"""The result of a migration, a save or a restore, for programs and for people."""

from __future__ import annotations

from typing import Any

from vfiostream.cli.report import Result
from vfiostream.cli.values import show_rate, show_size, show_time
from vfiostream.pipeline.adaptive import Statistics
from vfiostream.pipeline.progress import Summary


def moved(summary: Summary) -> Result:
    """The result that ``summary`` tells of."""
    return Result(document(summary), lines(summary))


def document(summary: Summary) -> dict[str, Any]:
    """The fields of a summary, as ``docs/command-line.md`` lists them."""
    downtime = summary.downtime
    return {
        "status": "done",
        "rounds": summary.rounds,
        "bytes": summary.content,
        "transferred": summary.transferred,
        "total_seconds": summary.seconds,
        "downtime_seconds": downtime.total,
        "downtime": downtime._asdict(),
        "throughput": summary.throughput,
        "peak_buffers": summary.peak_buffers,
        "compression": None if summary.compression is None else _compression(summary.compression),
        "warnings": list(summary.warnings),
    }


def _compression(chosen: Statistics) -> dict[str, Any]:
    return {
        "level": chosen.level,
        "changes": chosen.changes,
        "uses": [{"level": level, **use._asdict()} for level, use in chosen.uses.items()],
    }


def _name(level: int | None) -> str:
    return "raw" if level is None else f"zstd {level}"


def lines(summary: Summary) -> list[str]:
    """The same for people."""
    found = [
        f"done in {show_time(summary.seconds)}, {summary.rounds} rounds",
        f"content      {show_size(summary.content)}, {show_rate(summary.throughput)}",
        f"transferred  {show_size(summary.transferred)}",
    ]
    if summary.compression is not None:
        uses = [
            f"{_name(level)} {show_size(use.content)} as {show_size(use.payload)}"
            for level, use in summary.compression.uses.items()
        ]
        found.append(f"compression  {', '.join(uses) or 'nothing but zeros'}")
    phases = ", ".join(f"{name} {show_time(seconds)}" for name, seconds in summary.downtime._asdict().items())
    found.append(f"downtime     {show_time(summary.downtime.total)}: {phases}")
    found.append(f"buffers      {show_size(summary.peak_buffers)} at most")
    found += [f"warning      {warning}" for warning in summary.warnings]
    return found
