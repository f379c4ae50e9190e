"""What a rule is, and what became of it. The rules themselves stand beside their checks, one rulebook a module."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

S = TypeVar("S")
CheckOf = Callable[[S], Awaitable[str | None]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that a driver owes to its users."""

    id: str
    sentence: str
    source: str
    """Where it is written."""


class Broken(Exception):
    """A check has seen the rule broken; the text says what was seen."""


class NotTestable(Exception):
    """A check can't be made of this device, or from here; the text says why."""


class Verdict(StrEnum):
    KEPT = "kept"
    BROKEN = "broken"
    NOT_TESTABLE = "not testable"
    SKIPPED = "skipped"
    """An earlier check left the device unusable."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one rule."""

    rule: Rule
    verdict: Verdict
    detail: str = ""
    """What was seen, or why it was not tested; a remark on a rule that was kept."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Check(Generic[S]):
    """A rule and the function that checks it on a subject ``S``: it returns a remark or None, or raises
    :class:`Broken`, :class:`NotTestable` or what an access raises.
    """

    rule: Rule
    run: CheckOf[S]


class Rulebook(Generic[S]):
    """Rules for what is called ``title``, in the order in which they are checked."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.checks: list[Check[S]] = []

    def rule(self, id_: str, sentence: str, source: str) -> Callable[[CheckOf[S]], CheckOf[S]]:
        """Add a rule; the function that this decorates is its check."""

        def add(run: CheckOf[S]) -> CheckOf[S]:
            self.checks.append(Check(Rule(id_, sentence, source), run))
            return run

        return add


def together(seen: list[str]) -> None:
    """Raise :class:`Broken` with all that was ``seen``, if that is anything; of many, the first."""
    if seen:
        more = f" (and {len(seen) - MOST_SEEN} more)" if len(seen) > MOST_SEEN else ""
        raise Broken("; ".join(seen[:MOST_SEEN]) + more)


MOST_SEEN = 6
"""Findings of one rule that are told."""
