"""From what devices and guest memory say of themselves to what the stream says of them, and back."""

from __future__ import annotations

from collections.abc import Sequence

from vfiostream.devices.contract import Device, DeviceDescription, PciIdentity
from vfiostream.errors import Incompatible
from vfiostream.guest import GuestRange
from vfiostream.pipeline.settings import Settings
from vfiostream.protocol.records import DeviceEntry, Hello, PciEntry, RangeEntry
from vfiostream.version import SOFTWARE


def hello(
    session: bytes,
    devices: Sequence[tuple[int, Device]],
    ranges: Sequence[tuple[int, GuestRange]],
    settings: Settings,
) -> Hello:
    """The HELLO of a source. Raises :class:`~vfiostream.errors.Incompatible` where a device can't be described."""
    try:
        return Hello(
            session,
            SOFTWARE,
            ("sparse", "zstd") if settings.compression else ("sparse",),
            settings.chunk,
            tuple(_entry(stream, device) for stream, device in devices),
            tuple(RangeEntry(stream, area.address, area.length) for stream, area in ranges),
        )
    except ValueError as error:
        raise Incompatible(f"this can't be described in a stream: {error}") from error


def _entry(stream: int, device: Device) -> DeviceEntry:
    known = device.description
    pci = known.pci
    return DeviceEntry(
        stream,
        device.name,
        known.interface,
        known.version,
        known.device_memory,
        known.dirty_tracking,
        known.config_size,
        None
        if pci is None
        else PciEntry(pci.vendor, pci.device, pci.subsystem_vendor, pci.subsystem, pci.class_code, pci.revision),
    )


def described(entry: DeviceEntry) -> DeviceDescription:
    """The description of a source's device, as its stream tells it. Its ``config_limit`` is not told: its size stands
    in.
    """
    pci = entry.pci
    return DeviceDescription(
        entry.interface,
        entry.version,
        entry.device_memory,
        entry.dirty_tracking,
        entry.config_size,
        entry.config_size,
        None
        if pci is None
        else PciIdentity(pci.vendor, pci.device, pci.subsystem_vendor, pci.subsystem, pci.class_code, pci.revision),
    )
