"""From what devices and guest memory say of themselves to what the stream says of them, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from vfiostream.devices.contract import DescribedDevice, Device, DeviceDescription, PciIdentity
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
            tuple(entry(stream, device) for stream, device in devices),
            tuple(RangeEntry(stream, area.address, area.length) for stream, area in ranges),
        )
    except ValueError as error:
        raise Incompatible(f"this can't be described in a stream: {error}") from error


def entry(stream: int, device: Device | DescribedDevice) -> DeviceEntry:
    """What a HELLO says of ``device``. Raises ValueError where it says of itself what no stream can hold."""
    known = device.description
    values = {name: getattr(known, name) for name in DeviceDescription.__slots__}
    pci = None if known.pci is None else PciEntry(**asdict(known.pci))
    return DeviceEntry(stream, device.name, **{**values, "pci": pci})


def described(told: DeviceEntry) -> DescribedDevice:
    """A source's device, as its stream tells it."""
    values = {name: getattr(told, name) for name in DeviceDescription.__slots__}
    pci = None if told.pci is None else PciIdentity(**asdict(told.pci))
    return DescribedDevice(told.name, DeviceDescription(**{**values, "pci": pci}))
