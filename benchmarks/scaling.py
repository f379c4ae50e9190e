"""What a GB costs, and how much memory both sides take, as there is more to move. Guest memory only, over TCP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.moving import End, move
from benchmarks.pairs import Run, column
from benchmarks.plan import MIB, Plan
from benchmarks.row import Row, compare

Measure = Callable[[Run], float]

_SIDES: tuple[tuple[str, Measure, Measure], ...] = (
    ("sender", lambda run: run.cpu_sending, lambda run: (run.sender_peak or 0) / MIB),
    ("receiver", lambda run: run.cpu_receiving, lambda run: (run.receiver_peak or 0) / MIB),
)


def size(plan: Plan) -> Iterator[Row]:
    names = {f"{amount // MIB} MiB": amount for amount in plan.sizes}
    contestants = {name: partial(_moved, plan, amount) for name, amount in names.items()}
    rounds = plan.rounds(contestants)
    smallest, largest = min(names, key=names.__getitem__), max(names, key=names.__getitem__)
    span = f"{smallest} to {largest}"
    yield compare(
        rounds,
        largest,
        smallest,
        path=f"seconds per GB, {span}",
        must=0.1,
        measure=lambda run: run.seconds / run.content * 1e9,
        unit="s/GB",
        sense="within",
    )
    for side, cpu, peak in _SIDES:
        yield compare(
            rounds,
            largest,
            smallest,
            path=f"CPU of the {side} per GB, {span}",
            must=0.1,
            measure=cpu,
            unit="CPU s/GB",
            sense="within",
        )
        yield compare(
            rounds,
            largest,
            smallest,
            path=f"memory of the {side} (peak RssAnon), {span}",
            must=1.1,
            measure=peak,
            unit="MiB",
            sense="most",
        )
    for name, amount in names.items():
        speeds = tuple(run.speed for run in column(rounds, name))
        yield Row(f"throughput of {name}", "", None, "least", "GB/s", speeds, speeds, plot="size", at=amount / MIB)


def _moved(plan: Plan, amount: int) -> Run:
    return move(End("send", guest=amount, settings={"chunk": plan.chunk}), watch=True).run


MEASUREMENTS = (size,)
