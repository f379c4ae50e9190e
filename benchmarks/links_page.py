"""Renders what kinds of links do over real networks, and which to take, between the marks of ``docs/transports.md``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.links import KINDS
from benchmarks.moving import ROOT
from benchmarks.page import comparisons, failures, machine, number
from benchmarks.pairs import spread
from benchmarks.plan import MIB
from benchmarks.result import Result

PAGE = ROOT / "docs" / "transports.md"
ENOUGH = 0.9
"""Of the fastest: a simpler kind that moves so much of it is the one to take."""


def render(result: Result) -> str:
    """The generated part."""
    group = result.groups["links"]
    of = {
        table: [line for line in group.table if line["table"] == table]
        for table in ("unhindered", "grid", "settings", "away")
    }
    parts = [
        f"Commit {result.commit}, {result.when[:10]} {result.when[11:16]} UTC, `{result.command}`. Throughput in MB/s, "
        "the median of the rounds; in brackets the least and the most."
    ]
    if of["unhindered"]:
        parts += ["#### Where nothing hinders", _unhindered(of["unhindered"][0])]
    if of["grid"]:
        parts += [
            "#### What to take where",
            _grid(sorted(of["grid"], key=lambda line: (line["delay"], line["loss"], line["rate"]))),
        ]
    if of["settings"]:
        parts += ["#### What settings of both hosts change", _plain(of["settings"])]
    if len(of["away"]) == 2:
        parts += ["#### A link that is away for a while", _away(of["away"])]
    if group.rows:
        parts += ["#### What must be reached", *comparisons(group.rows)]
    parts += [*failures(group), "#### The machine", machine(result.machine)]
    return "\n\n".join(parts) + "\n"


def take(line: Mapping[str, Any], *, encrypted: bool) -> str:
    """The kind to take: the simplest that moves :data:`ENOUGH` of what the fastest does. They stand in that order."""
    speeds: dict[str, float] = {
        kind: _speed(line, kind) for kind in line["seconds"] if not encrypted or KINDS[kind].encrypted
    }
    if not speeds:
        return "-"
    best = max(speeds.values())
    return next(kind for kind, speed in speeds.items() if speed >= ENOUGH * best)


def _unhindered(line: Mapping[str, Any]) -> str:
    rows = [
        (kind, _figure(line, kind), f"{8 * _speed(line, kind):.0f}", number(spread(line["cpu"][kind]).median))
        for kind in line["seconds"]
    ]
    return _table(("kind", "MB/s", "Mbit/s", "CPU s/GB, both ends"), rows)


def _grid(lines: Sequence[Mapping[str, Any]]) -> str:
    kinds = list(lines[0]["seconds"])
    head = ("delay", "loss", "Mbit/s", "MiB", *kinds, "take", "encrypted")
    return _table(
        head,
        (
            (
                *_link(line),
                *(_figure(line, kind) for kind in kinds),
                take(line, encrypted=False),
                take(line, encrypted=True),
            )
            for line in lines
        ),
    )


def _plain(lines: Sequence[Mapping[str, Any]]) -> str:
    kinds = list(lines[0]["seconds"])
    rows = ((*_link(line), *(_figure(line, kind) for kind in kinds)) for line in lines)
    return _table(("delay", "loss", "Mbit/s", "MiB", *kinds), rows)


def _away(lines: Sequence[Mapping[str, Any]]) -> str:
    whole, gone = lines
    rows = []
    for kind in whole["seconds"]:
        plain, longer = (spread(line["seconds"][kind]) for line in (whole, gone))
        lost = longer.median - plain.median
        rows.append((kind, f"{plain.median:.1f} s", f"{longer.median:.1f} s", f"{lost - gone['away']:.1f} s"))
    link = f"{whole['size'] // MIB} MiB over {whole['delay']:g} ms, {whole['loss']:g} %, {whole['rate']:g} Mbit/s"
    head = (link, "takes", f"and away for {gone['away']:g} s half-way", "lost beyond these")
    return _table(head, rows)


def _link(line: Mapping[str, Any]) -> tuple[str, ...]:
    return f"{line['delay']:g} ms", f"{line['loss']:g} %", f"{line['rate']:g}", str(line["size"] // MIB)


def _speeds(line: Mapping[str, Any], kind: str) -> list[float]:
    return [line["size"] / seconds / 1e6 for seconds in line["seconds"][kind]]


def _speed(line: Mapping[str, Any], kind: str) -> float:
    return spread(_speeds(line, kind)).median


def _figure(line: Mapping[str, Any], kind: str) -> str:
    seen = spread(_speeds(line, kind))
    return f"**{number(seen.median)}** ({number(seen.low)}..{number(seen.high)})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
