"""Whether the state of one device can go into another: asked before anything moves."""

from __future__ import annotations

from vfiostream.devices.contract import Device, DeviceDescription


def mismatches(source: DeviceDescription, target: DeviceDescription) -> list[str]:
    """Return why a device described by ``source`` does not fit into one described by ``target``, one sentence part
    each; empty where nothing stands against it. The version is the driver's to judge: :func:`unfit` asks it.
    """
    found = []
    if source.interface != target.interface:
        found.append(f"the source speaks the interface {source.interface}, the target {target.interface}")
    if source.device_memory and not target.device_memory:
        found.append("the source has device memory and the target has none")
    if target.device_memory and not source.device_memory:
        found.append("the target has device memory and the source has none")
    if source.dirty_tracking and not target.dirty_tracking:
        found.append("the source writes guest memory and reports it, the target does not")
    if source.config_size > target.config_limit:
        found.append(
            f"the source's config of {source.config_size} bytes does not fit the target's config region of "
            f"{target.config_limit}"
        )
    if (source.pci is None) != (target.pci is None):
        found.append("one is a PCI device and the other is not")
    elif source.pci is not None and target.pci is not None:
        ours, theirs = source.pci, target.pci
        if (ours.vendor, ours.device) != (theirs.vendor, theirs.device):
            found.append(
                f"the source is PCI device {ours.vendor:04x}:{ours.device:04x}, "
                f"the target {theirs.vendor:04x}:{theirs.device:04x}"
            )
        if ours.class_code != theirs.class_code:
            found.append(f"the source is of PCI class {ours.class_code:06x}, the target of {theirs.class_code:06x}")
    return found


async def unfit(source: DeviceDescription, target: Device) -> list[str]:
    """As :func:`mismatches`, and ask the target's driver whether it takes the source's version."""
    found = mismatches(source, target.description)
    if source.version is not None and not await target.accepts(source.version):
        found.append(
            f"the target's driver (version {target.description.version!r}) does not take version {source.version!r}"
        )
    return found
