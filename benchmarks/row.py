"""A row of the table: what was measured, against what, and what it must reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.pairs import Run, Spread, column, spread

Sense = Literal["least", "most", "within"]
"""Whether the median must be at least, or at most, or at most that far from 1."""
Verdict = Literal["reached", "not reached", "for information"]


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. All sequences are in the order of the rounds."""

    path: str
    against: str
    """Empty where nothing else was run: ``figures`` are then what was measured, in ``unit``."""
    must: float | None
    """None where nothing was promised."""
    sense: Sense
    unit: str
    """Of ``ours`` and ``theirs``."""
    figures: tuple[float, ...]
    """Ours by theirs."""
    ours: tuple[float, ...]
    theirs: tuple[float, ...] = ()
    note: str = ""
    plot: Literal["", "size"] = ""
    """Which plot it belongs to beside that of all ratios."""
    at: float = 0.0
    """Where in that plot: MiB."""

    @property
    def spread(self) -> Spread:
        return spread(self.figures)

    @property
    def verdict(self) -> Verdict:
        """Whether the median reaches what it must."""
        if self.must is None:
            return "for information"
        median = self.spread.median
        reached = {
            "least": median >= self.must,
            "most": median <= self.must,
            "within": abs(median - 1) <= self.must,
        }[self.sense]
        return "reached" if reached else "not reached"

    def as_json(self) -> dict[str, Any]:
        """For :meth:`from_json`, with numbers of five digits: more were not measured."""
        return {
            name: [float(f"{number:.5g}") for number in value] if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Row:
        """A row as :meth:`as_json` gave it."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
        }
        return cls(**values)


def compare(
    rounds: Sequence[Mapping[str, Run]],
    ours: str,
    theirs: str,
    *,
    path: str,
    must: float | None,
    measure: Callable[[Run], float] = lambda run: run.speed,
    unit: str = "GB/s",
    sense: Sense = "least",
    against: str | None = None,
    note: str = "",
) -> Row:
    """The row of two contestants of ``rounds``: by speed, or by another ``measure``."""
    mine = tuple(measure(run) for run in column(rounds, ours))
    other = tuple(measure(run) for run in column(rounds, theirs))
    figures = tuple(one / two for one, two in zip(mine, other, strict=True))
    return Row(path, theirs if against is None else against, must, sense, unit, figures, mine, other, note)


def processor_time(
    rounds: Sequence[Mapping[str, Run]], ours: str, theirs: str, *, path: str, must: float | None
) -> list[Row]:
    """The rows of what each side cost."""
    sides: tuple[tuple[str, Callable[[Run], float]], ...] = (
        ("sender", lambda run: run.cpu_sending),
        ("receiver", lambda run: run.cpu_receiving),
    )
    return [
        compare(
            rounds,
            ours,
            theirs,
            path=f"CPU of the {side}: {path}",
            must=must,
            measure=measure,
            unit="CPU s/GB",
            sense="most",
        )
        for side, measure in sides
    ]
