"""Can this device move, and can it go there? Asked before anything moves."""

from __future__ import annotations

from dataclasses import dataclass

from vfiostream.devices.contract import Device, DeviceDescription
from vfiostream.devices.fit import unfit


@dataclass(frozen=True, slots=True)
class Answer:
    """What :func:`check` found."""

    source: DeviceDescription
    target: DeviceDescription | None
    reasons: tuple[str, ...]
    """Why the device can't go there; empty where nothing stands against it."""


async def check(device: Device, there: Device | str | None = None) -> Answer:
    """Say whether the state of ``device`` can go into ``there``: another device, or the version string of one; None
    asks only whether ``device`` can move at all, which it can, being open. Moves nothing and changes no state.

    With a version string, it is ``device``'s own driver that is asked whether it takes that version: a string has no
    driver.
    """
    if there is None:
        return Answer(device.description, None, ())
    if isinstance(there, str):
        if await device.accepts(there):
            return Answer(device.description, None, ())
        problem = (
            f"the driver of {device.name} (version {device.description.version!r}) does not take version {there!r}"
        )
        return Answer(device.description, None, (problem,))
    return Answer(device.description, there.description, tuple(await unfit(device.description, there)))
