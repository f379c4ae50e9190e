"""Checking a device against the rules of its interface, one after another, whatever an earlier one has done to it.

Between two checks the device is reset, closed and opened again. A check that hangs is given up after a time, and one
that loses the device costs the rules behind it only if the device can't be opened again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from vfiostream.access.contract import Access
from vfiostream.conformance.dma_log import LOG
from vfiostream.conformance.four_region import FOUR, FourRegionSubject
from vfiostream.conformance.migration_region import REGION, MigrationRegionSubject
from vfiostream.conformance.rules import Broken, Check, NotTestable, Outcome, Rule, Rulebook, Verdict
from vfiostream.conformance.states import STATES, StatesSubject
from vfiostream.conformance.stream import STREAM
from vfiostream.conformance.subject import Opener, Subject, Unusable
from vfiostream.devices.migration_region import migration_region
from vfiostream.devices.migration_states import migration_flags
from vfiostream.devices.operations import blocker
from vfiostream.devices.regions import regions_of
from vfiostream.errors import DeviceError, Incompatible, UsageError
from vfiostream.uapi.four_region import REGION_TYPE, Subtype

RULEBOOKS: dict[str, tuple[Rulebook[Any], ...]] = {
    "migration-states": (STATES, STREAM, LOG),
    "migration-region": (REGION, STREAM, LOG),
    "four-region": (FOUR,),
}
"""What each interface is held against, by its name in ``DeviceDescription.interface``."""
LAST_RESORT = 5.0
"""Seconds that bringing the device back may take when the run is over or cancelled."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of all rules of ``interface``, in the order in which they were checked."""

    device: str
    target: str | None
    interface: str
    outcomes: tuple[Outcome, ...]

    @property
    def broken(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.verdict is Verdict.BROKEN]

    @property
    def passed(self) -> bool:
        """Whether no rule was seen broken, and the device could be brought back after each check."""
        return all(one.verdict not in (Verdict.BROKEN, Verdict.SKIPPED) for one in self.outcomes)


def checks_of(interface: str) -> list[Check[Any]]:
    """The checks for ``interface``."""
    return [check for book in RULEBOOKS[interface] for check in book.checks]


async def run(
    opener: Opener,
    target: Opener | None = None,
    *,
    limit: float = 60.0,
    begin: Callable[[Rule, int, int], None] | None = None,
    done: Callable[[Report], None] | None = None,
) -> Report:
    """Check the device that ``opener`` opens; streams are loaded into the one of ``target``, or the same one.

    A check may take ``limit`` seconds. ``begin`` is called before each check, with the rule, its number and how many
    there are; ``done`` after each, with what there is so far. Both devices are left reset and running,
    as far as they can be.

    Raises :class:`~vfiostream.errors.Incompatible` where a device has no interface that is known or the two have not
    the same, and what an access raises when the devices are first opened.
    """
    subject, interface = await _open(opener)
    try:
        if target is not None:
            other, its = await _open(target)
            subject.target = other
            if its != interface:
                raise Incompatible(
                    f"{other.name} speaks {its}, and {subject.name} {interface}: choose a target of the same kind"
                )
        report = Report(subject.name, None if target is None else subject.target.name, interface, ())
        checks = checks_of(interface)
        for number, check in enumerate(checks, 1):
            if begin is not None:
                begin(check.rule, number, len(checks))
            outcome = await _check(subject, check, limit)
            report = Report(report.device, report.target, interface, (*report.outcomes, outcome))
            if done is not None:
                done(report)
        return report
    finally:
        with anyio.CancelScope(shield=True):
            for one in (subject.target, subject) if subject.target is not subject else (subject,):
                with anyio.move_on_after(LAST_RESORT):
                    try:
                        await one.fresh()
                    except Unusable:
                        pass  # the outcomes say so
                await one.aclose()


async def _open(opener: Opener) -> tuple[Subject, str]:
    access = await opener()
    try:
        return await _subject(opener, access)
    except BaseException:
        await access.aclose()
        raise


async def _subject(opener: Opener, access: Access) -> tuple[Subject, str]:
    infos = await regions_of(access)
    if (flags := await migration_flags(access)) is not None:
        return StatesSubject(opener, access, flags), "migration-states"
    if (info := migration_region(infos)) is not None:
        return MigrationRegionSubject(opener, access, info), "migration-region"
    if any(one.type == REGION_TYPE and one.subtype == Subtype.CONTROL and one.size for one in infos):
        return FourRegionSubject(opener, access, infos), "four-region"
    raise blocker(access.name, "it has none of the interfaces of migration, so there is nothing to check")


async def _check(subject: Subject, check: Check[Any], limit: float) -> Outcome:
    started = time.monotonic()
    verdict, detail = Verdict.KEPT, ""
    with anyio.move_on_after(limit) as scope:
        verdict, detail = await _judge(subject, check)
    if scope.cancelled_caught:
        verdict, detail = Verdict.BROKEN, f"the check was not done within {limit:g} s"
    return Outcome(check.rule, verdict, detail, time.monotonic() - started)


async def _judge(subject: Subject, check: Check[Any]) -> tuple[Verdict, str]:
    try:
        for one in _both(subject):
            await one.fresh()
    except Unusable as error:
        return Verdict.SKIPPED, f"the device can't be brought back: {error}"
    try:
        remark = await check.run(subject)
    except Broken as broken:
        return Verdict.BROKEN, str(broken)
    except NotTestable as reason:
        return Verdict.NOT_TESTABLE, str(reason)
    except UsageError as error:
        return Verdict.NOT_TESTABLE, f"the access does not pass it on: {error}"
    except DeviceError as error:
        # What a check does not expect to be refused is in order: see its sentence, and what was refused.
        return Verdict.BROKEN, str(error)
    return Verdict.KEPT, remark or ""


def _both(subject: Subject) -> Sequence[Subject]:
    return (subject,) if subject.target is subject else (subject, subject.target)
