"""Can this device move, and can it go there? Asked before anything moves."""

from __future__ import annotations

from dataclasses import dataclass

from vfiostream.devices.contract import DescribedDevice, Device, DeviceDescription
from vfiostream.devices.fit import ask, compare, fit
from vfiostream.errors import UsageError


@dataclass(frozen=True, slots=True)
class Answer:
    """What :func:`check` found."""

    source: DeviceDescription | None
    """None where nothing but its version was given."""
    target: DeviceDescription | None
    driver_asked: bool
    """Whether the target's driver was asked about the source's version."""
    reasons: tuple[str, ...]
    """Why the device can't go there; empty where nothing stands against it."""
    notes: tuple[str, ...]
    """What is no reason against it, and worth knowing."""


async def check(source: Device | DescribedDevice | str, target: Device | DescribedDevice | None = None) -> Answer:
    """Say whether the state of ``source`` can go into ``target``; None asks only whether ``source`` can move at all,
    which it can, being open or described. Moves nothing and changes no state.

    Each is a device that is open, or what a checkpoint or a description file says of one
    (:func:`vfiostream.description.read_description`). Of the source, the version string is enough; then nothing else is
    compared. A target that is open is asked whether it takes the source's version, and its driver decides; of one that
    is only described, a note says that nobody was asked. Raises :class:`~vfiostream.errors.UsageError` for a version
    without anybody to ask, and what a device raises.
    """
    if isinstance(source, str):
        if not isinstance(target, Device):
            raise UsageError(f"only a driver knows whether it takes version {source!r}: give a device as the target")
        reasons, notes, asked = await ask(source, target)
        return Answer(None, target.description, asked, tuple(reasons), (*_caveats(target), *notes))
    ours = source.description
    if target is None:
        return Answer(ours, None, driver_asked=False, reasons=(), notes=(*_caveats(source), *_alone(ours)))
    theirs = target.description
    if isinstance(target, Device):
        reasons, notes, asked = await fit(ours, target)
    else:
        reasons, notes, asked = compare(ours, theirs)
        notes.append(_not_asked(ours, target))
    return Answer(ours, theirs, asked, tuple(reasons), (*_caveats(source, target), *_alone(ours), *notes))


def _caveats(*given: Device | DescribedDevice) -> list[str]:
    return [one.caveat for one in given if isinstance(one, Device) and one.caveat is not None]


def _alone(source: DeviceDescription) -> tuple[str, ...]:
    if source.dirty_tracking:
        return ()
    return (
        "the source does not report which guest pages it dirties, so it can't write guest memory while it is migrated",
    )


def _not_asked(source: DeviceDescription, target: DescribedDevice) -> str:
    note = f"{target.name} is only described, so its driver was not asked"
    if source.version is None:
        return note
    has = target.description.version
    return f"{note} whether it takes version {source.version!r}; {'it had none' if has is None else f'it had {has!r}'}"
