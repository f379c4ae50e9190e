"""Renders what is kept in ``benchmarks/results`` between two marks of ``docs/performance.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.moving import ROOT
from benchmarks.pairs import spread
from benchmarks.plan import CannotRun
from benchmarks.result import Group, Result
from benchmarks.row import Row

PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- scripts/bench writes from here -->"
END = "<!-- to here -->"

TITLES = {
    "network": "TCP and UNIX sockets",
    "devices": "Data of the kernel's drivers, for which files stand",
    "compression": "Compression",
    "files": "Checkpoints",
    "leaves": "The accelerator",
    "scaling": "From small to large",
    "switchover": "The switchover",
    "delta": "Pages sent again as a delta: a prototype",
}

_SENSES = {"least": "at least", "most": "at most", "within": "1 ±"}


def put(page: Path, part: str) -> None:
    """Put ``part`` between the marks of ``page``. Raises :class:`~benchmarks.plan.CannotRun` where they are not."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise CannotRun(f"{page} has no place for the table: it needs the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{part}\n{END}{after}")


def render(newest: Mapping[str, Result], plots: Mapping[str, str]) -> str:
    """The generated part: of each group its newest result; ``plots`` are titles and where the page finds them."""
    parts: list[str] = []
    for group, title in TITLES.items():
        if group in newest:
            parts += [f"### {title}", _source(newest[group]), *_group(newest[group].groups[group])]
    for title, file in plots.items():
        parts += [f"### {title}", f"![{title}]({file})"]
    machines = {tuple(result.machine.items()): result for result in newest.values()}
    for result in sorted(machines.values(), key=lambda result: result.when):
        parts += [f"### The machine on {result.when[:10]} at {result.when[11:16]}", machine(result.machine)]
    return "\n\n".join(parts) + "\n"


def _source(result: Result) -> str:
    return (
        f"Commit {result.commit}, {result.when[:10]} {result.when[11:16]} UTC, `{result.command}`: {result.pairs} "
        f"pairs of {result.size / 2**30:.3g} GiB where the row says nothing else."
    )


def _group(group: Group) -> list[str]:
    parts = comparisons(group.rows)
    if group.table:
        parts.append(_delta(group.table))
    return parts + failures(group)


def comparisons(rows: Sequence[Row]) -> list[str]:
    """The table of ``rows``, if there are any, and what is to be said of them."""
    if not rows:
        return []
    head = "| path | against | must reach | ratio: median | quartiles | least..most | ours | theirs | verdict |"
    notes = [f"- {row.path}{' against ' + row.against if row.against else ''}: {row.note}." for row in rows if row.note]
    return ["\n".join([head, "|---" * 9 + "|", *(_line(row) for row in rows)]), *(["\n".join(notes)] if notes else [])]


def failures(group: Group) -> list[str]:
    return [f"**Could not run:** {failure}" for failure in group.failures]


def _line(row: Row) -> str:
    seen = row.spread
    unit = "" if row.theirs else f" {row.unit}"
    must = "-" if row.must is None else f"{_SENSES[row.sense]} {row.must:g}{unit}"
    cells = (
        row.path,
        row.against or "-",
        must,
        f"**{number(seen.median)}**{unit}",
        f"{number(seen.first_quartile)} to {number(seen.third_quartile)}",
        f"{number(seen.low)}..{number(seen.high)}",
        _figure(row.ours, row.unit),
        _figure(row.theirs, row.unit) if row.theirs else "-",
        row.verdict,
    )
    return "| " + " | ".join(cells) + " |"


def _figure(values: Sequence[float], unit: str) -> str:
    return f"{number(spread(values).median)} {unit}"


def number(value: float) -> str:
    """Three digits, and no exponent for what people read."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _delta(lines: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "| changed in each page | sent by | through | CPU s/GB: raw, zstd 1, delta | on the link: zstd 1, delta "
        "| CPU s/GB receiving: zstd 1, delta | delta is faster than raw | than zstd 1 |"
    )
    return "\n".join([head, "|---" * 8 + "|", *(_delta_line(line) for line in lines)])


def _delta_line(line: Mapping[str, Any]) -> str:
    raw, plain, delta = line["raw"], line["zstd 1"], line["delta"]
    cells = (
        line["changed in each page"],
        line["sent by"],
        line["through"],
        f"{raw['cpu']:.2f}, {plain['cpu']:.2f}, {delta['cpu']:.2f}",
        f"{plain['wire']:.3f}, {delta['wire']:.3f}",
        f"{plain['receiving']:.2f}, {delta['receiving']:.2f}",
        line["delta is faster than raw"],
        line["delta is faster than zstd 1"],
    )
    return "| " + " | ".join(cells) + " |"


def machine(described: Mapping[str, str]) -> str:
    return "\n".join(["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in described.items())])
