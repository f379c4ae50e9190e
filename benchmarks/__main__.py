"""Runs benchmarks, keeps what they found and renders it: ``scripts/bench``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import (
    compression,
    delta,
    devices,
    files,
    leaves,
    links,
    links_page,
    machine,
    network,
    page,
    plots,
    scaling,
    switchover,
)
from benchmarks.moving import ROOT
from benchmarks.plan import BUILD, CannotRun, Plan
from benchmarks.result import FOLDER, Group, Result, newest
from benchmarks.row import Row

Measurement = Callable[[Plan], Iterator[Row | dict[str, Any]]]
"""Gives rows, and lines of a table of its group's own."""

GROUPS: dict[str, Sequence[Measurement]] = {
    "network": network.MEASUREMENTS,
    "devices": devices.MEASUREMENTS,
    "compression": compression.MEASUREMENTS,
    "files": files.MEASUREMENTS,
    "leaves": leaves.MEASUREMENTS,
    "scaling": scaling.MEASUREMENTS,
    "switchover": switchover.MEASUREMENTS,
    "delta": delta.MEASUREMENTS,
    "links": links.MEASUREMENTS,
}
"""Shown in docs/performance.md, but for the last, which boots Linux many times: docs/transports.md has it."""
UNASKED = [name for name in GROUPS if name != "links"]


def main() -> int:
    options = _options()
    if options.render:
        _render(FOLDER, page.PAGE)
        return 0
    plan = Plan.smoke() if options.quick else Plan()
    plan = replace(plan, pairs=options.pairs or plan.pairs, disk=options.disk or plan.disk)
    result = Result(
        datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        machine.commit(),
        shlex.join(["scripts/bench", *sys.argv[1:]]),
        plan.pairs,
        plan.size,
        machine.describe(),
    )
    # What is not whole, or not measured for long enough, is kept from the page of the repository.
    folder = BUILD / "only" if options.only else BUILD / "quick" if plan.quick else FOLDER
    for name in options.groups or UNASKED:
        result.groups[name] = Group()
        for _ in _run(name, plan, options.only, result.groups[name]):
            kept = result.write(folder)  # after each, so that what has been measured is not lost
    print(f"\nkept in {kept}")
    if not options.only:
        _render(folder, BUILD / "quick" / "performance.md" if plan.quick else page.PAGE)
    return 1 if result.failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"one or more of: {', '.join(GROUPS)}; else all")
    parser.add_argument("--quick", action="store_true", help="small, to see that everything runs; written to build/")
    parser.add_argument("--pairs", type=int, help="how many times both sides run")
    parser.add_argument("--disk", type=Path, help="a folder on a disk, for what has to be durable")
    parser.add_argument("--render", action="store_true", help="measure nothing: show what is kept")
    parser.add_argument("--only", help="of a group, what has this in its name; the page is not rendered then")
    options = parser.parse_args()
    unknown = set(options.groups) - set(GROUPS)
    if unknown:
        parser.error(f"there is no group {', '.join(sorted(unknown))}: choose from {', '.join(GROUPS)}")
    if options.pairs is not None and options.pairs < 1:
        parser.error("there must be at least one pair")
    return options


def _run(name: str, plan: Plan, only: str | None, group: Group) -> Iterator[None]:
    """Measure one group and put it into ``group``, where there is more at each step. What can't run is said, and the
    rest goes on.
    """
    for measurement in GROUPS[name]:
        if only and only not in measurement.__name__:
            continue
        print(f"\n{name}: {measurement.__name__.replace('_', ' ')}", flush=True)
        try:
            for found in measurement(plan):
                if isinstance(found, Row):
                    group.rows.append(found)
                    _show(found)
                else:
                    group.table.append(found)
                    print(f"  {found}", flush=True)
                yield
        except CannotRun as error:
            _failed(group, f"{measurement.__name__.replace('_', ' ')}: {error}")
    yield


def _failed(group: Group, failure: str) -> None:
    group.failures.append(failure)
    print(f"  could not run: {failure}", file=sys.stderr, flush=True)


def _show(row: Row) -> None:
    seen = row.spread
    against = f" / {row.against}" if row.against else f" ({row.unit})"
    must = "" if row.must is None else f" must be {row.sense} {row.must:g}: {row.verdict}"
    print(f"  {row.path}{against}: {seen.median:.3g} ({seen.low:.3g}..{seen.high:.3g}){must}", flush=True)


def _render(results: Path, where: Path) -> None:
    """Show the newest of each group that is kept in ``results``."""
    groups = newest(Result.read(file) for file in results.glob("*.json"))
    if (found := groups.pop("links", None)) is not None:
        _put(links_page.PAGE if results == FOLDER else where.with_name("transports.md"), links_page.render(found))
    rows = [row for name in GROUPS if name in groups for row in groups[name].groups[name].rows]
    drawn = plots.draw(rows, where.parent / where.stem)
    _put(where, page.render(groups, {title: f"{where.stem}/{file.name}" for title, file in drawn.items()}))


def _put(where: Path, part: str) -> None:
    if not where.exists():
        where.write_text(f"{page.BEGIN}\n{page.END}\n")
    page.put(where, part)
    print(f"rendered {where.relative_to(ROOT) if where.is_relative_to(ROOT) else where}")


if __name__ == "__main__":
    sys.exit(main())
