"""Whether the state of one device can go into another: asked before anything moves.

What stands against it are reasons. What only explains how it may go wrong later (another driver, kernel or board) are
notes: whether that matters only the driver knows, and it says so by its version, or when it is given the state.
"""

from __future__ import annotations

from typing import NamedTuple

from vfiostream.devices.contract import Device, DeviceDescription, PciIdentity

_NEEDED = {"migration-states": "stop-copy"}
"""The flag without which a driver of an interface neither gives nor takes state."""


class Fit(NamedTuple):
    """How two devices fit; sentence parts for people."""

    reasons: list[str]
    """What stands against it; empty where nothing does."""
    notes: list[str]
    """What is worth knowing."""
    driver_asked: bool
    """Whether the target's driver was asked about the source's version."""


def compare(source: DeviceDescription, target: DeviceDescription) -> Fit:
    """Compare what is known of two devices. The version is the driver's to judge: :func:`fit` asks it."""
    reasons = []
    if source.interface != target.interface:
        reasons.append(f"the source speaks the interface {source.interface}, the target {target.interface}")
    if source.device_memory and not target.device_memory:
        reasons.append("the source has device memory and the target has none")
    if target.device_memory and not source.device_memory:
        reasons.append("the target has device memory and the source has none")
    if source.dirty_tracking and not target.dirty_tracking:
        reasons.append("the source writes guest memory and reports it, the target does not")
    if source.config_size > target.config_limit:
        reasons.append(
            f"the source's config of {source.config_size} bytes does not fit the target's config region of "
            f"{target.config_limit}"
        )
    for whose, known in (("source", source), ("target", target)):
        needed = _NEEDED.get(known.interface)
        if needed is not None and needed not in known.flags:
            reasons.append(f"the {whose}'s driver does not have {needed}, without which no state moves")
    notes = _who(source, target)
    if (source.pci is None) != (target.pci is None):
        reasons.append("one is a PCI device and the other is not")
    elif source.pci is not None and target.pci is not None:
        reasons += _unlike(source.pci, target.pci)
        notes += _boards(source.pci, target.pci)
    return Fit(reasons, notes + _abilities(source, target), driver_asked=False)


async def fit(source: DeviceDescription, target: Device) -> Fit:
    """As :func:`compare`, and ask the target's driver whether it takes the source's version. Changes nothing."""
    reasons, notes, _ = compare(source, target.description)
    if source.version is None:
        return Fit(reasons, notes, driver_asked=False)
    asked = await ask(source.version, target)
    return Fit(reasons + asked.reasons, notes + asked.notes, asked.driver_asked)


async def ask(version: str, target: Device) -> Fit:
    """Ask the target's driver whether it takes the state of a device of this version, and nothing else."""
    has = target.description.version
    if not await target.accepts(version):
        problem = f"the target's driver (version {has!r}) does not take version {version!r}"
        return Fit([problem], [], driver_asked=True)
    if has is not None:
        return Fit([], [], driver_asked=True)
    return Fit([], [f"the target's driver has no versions, so it was not asked about {version!r}"], driver_asked=False)


def _unlike(ours: PciIdentity, theirs: PciIdentity) -> list[str]:
    found = []
    if (ours.vendor, ours.device) != (theirs.vendor, theirs.device):
        found.append(
            f"the source is PCI device {ours.vendor:04x}:{ours.device:04x}, "
            f"the target {theirs.vendor:04x}:{theirs.device:04x}"
        )
    if ours.class_code != theirs.class_code:
        found.append(f"the source is of PCI class {ours.class_code:06x}, the target of {theirs.class_code:06x}")
    return found


def _boards(ours: PciIdentity, theirs: PciIdentity) -> list[str]:
    found = []
    if (ours.subsystem_vendor, ours.subsystem) != (theirs.subsystem_vendor, theirs.subsystem):
        found.append(
            f"the source is of PCI subsystem {ours.subsystem_vendor:04x}:{ours.subsystem:04x}, "
            f"the target of {theirs.subsystem_vendor:04x}:{theirs.subsystem:04x}"
        )
    if ours.revision != theirs.revision:
        found.append(f"the source is of revision {ours.revision:02x}, the target of {theirs.revision:02x}")
    return found


def _who(source: DeviceDescription, target: DeviceDescription) -> list[str]:
    """What differs of who drives them, where it is known of both."""
    found = []
    if None not in (source.driver, target.driver) and source.driver != target.driver:
        found.append(f"the source's driver is {source.driver}, the target's {target.driver}")
    if None not in (source.kernel, target.kernel) and source.kernel != target.kernel:
        found.append(f"the source's kernel is {source.kernel}, the target's {target.kernel}")
    return found


def _abilities(source: DeviceDescription, target: DeviceDescription) -> list[str]:
    found = []
    lacks = set(source.flags) - set(target.flags)
    if source.interface == target.interface == "migration-states":
        if "pre-copy" in lacks:
            found.append("the source gives state before it stops (pre-copy), which the target's driver may not take")
        if "p2p" in lacks:
            found.append("the target can't be quiet (p2p) while other devices of its guest start, as the source can")
    return found
