"""zstd over TCP, against the zstd program and socat; guest memory, so that both move the same file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.contents import Content, write
from benchmarks.moving import End, move
from benchmarks.pairs import Run, column, in_turn
from benchmarks.peers import zstd_size, zstd_through_socat
from benchmarks.plan import Plan
from benchmarks.row import Row, compare

PEER = "zstd -1 -T2 through socat"


def library(plan: Plan) -> Iterator[Row]:
    yield from _against_zstd(plan, "library", "zstd 1 over TCP, library-like data", {"compression": 1}, must=1.2)


def mixed(plan: Plan) -> Iterator[Row]:
    path = "adaptive over TCP, mixed data"
    yield from _against_zstd(plan, "mixed", path, {"compression": "adaptive"}, must=2.0)


def _against_zstd(plan: Plan, content: Content, path: str, settings: dict[str, Any], must: float) -> Iterator[Row]:
    with plan.folder() as folder:
        file, target = folder / "content", folder / "target"
        write(file, content, plan.size)
        write(target, "random", plan.size)  # so that all its pages are there
        source = End("send", guest=plan.size, file=str(file), settings={"chunk": plan.chunk, **settings})
        taking = End("receive", guest=plan.size, file=str(target))
        rounds = in_turn(
            {
                "ours": lambda: move(source, taking).run,
                PEER: lambda: zstd_through_socat(file, target, plan.size),
            },
            plan.pairs,
            warm_up=False,  # seconds long, and nothing of it is warm afterwards
        )
        theirs = plan.size / zstd_size(file)
    yield compare(rounds, "ours", PEER, path=path, must=must)
    yield _ratio(column(rounds, "ours"), theirs, path, plan.size)


def _ratio(runs: list[Run], theirs: float, path: str, size: int) -> Row:
    """Size by size on the link. The table asks for the same or better at a fixed level."""
    ours = tuple(size / (run.transferred or size) for run in runs)
    return Row(
        f"compression ratio of: {path}",
        "zstd -1 -T2",
        1.0 if "zstd 1" in path else None,
        "least",
        "content / link",
        tuple(ratio / theirs for ratio in ours),
        ours,
        (theirs,) * len(ours),
        note="" if "zstd 1" in path else "what does not shrink much goes raw where the link has room for it",
    )


MEASUREMENTS = (library, mixed)
