"""Finding the four regions on a device, and being sure that they are what they look like.

Regions are found by the type capability of their region info, never by index. The type's number alone says little:
Linux later gave it to CCW devices. So it is believed only when subtypes, sizes, access rights, version and capabilities
fit the interface too. What does not fit is a migration blocker, an :class:`~vfiostream.errors.Incompatible` that says
what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vfiostream.access.contract import Access, RegionInfo
from vfiostream.devices.contract import DeviceDescription, PciIdentity, flag_names
from vfiostream.devices.control import Control
from vfiostream.devices.operations import blocker, operation
from vfiostream.devices.pci_space import PciSpace
from vfiostream.devices.regions import Region
from vfiostream.uapi.four_region import (
    INTERFACE_VERSION,
    MAX_VERSION,
    NATURAL,
    PACKED,
    REGION_TYPE,
    VERSION_SUBTYPE,
    Caps,
    ControlLayout,
    Subtype,
)
from vfiostream.uapi.vfio import REGION_TYPE_PCI_VENDOR

LayoutName: TypeAlias = Literal["natural", "packed"]

_KNOWN_CAPS = int(Caps.DEVICE_MEMORY | Caps.SYSTEM_MEMORY)


@dataclass(frozen=True, slots=True)
class Found:
    """The parts of a device that has the interface."""

    control: Control
    config: Region
    memory: Region | None
    bitmap: Region | None
    version: RegionInfo | None
    """Where the driver's version string is read, and foreign ones are checked."""
    pci: PciSpace | None
    description: DeviceDescription


async def discover(access: Access, infos: Sequence[RegionInfo], layout: LayoutName | None) -> Found:
    """Find the interface on the device behind ``access``, which has these regions; raises Incompatible, and what an
    access raises.
    """
    regions = _by_subtype(access.name, [info for info in infos if info.type == REGION_TYPE and info.size])
    control_info, config_info = regions[Subtype.CONTROL], regions[Subtype.CONFIG]
    control = Control(access, control_info.index, _layout(access.name, control_info.size, layout))
    if (version := await control.get_version()) != INTERFACE_VERSION:
        raise blocker(access.name, f"its driver speaks version {version} of the interface, not {INTERFACE_VERSION}")
    caps = _known_caps(access.name, await control.get_caps(), regions)
    config_size = await control.get_config_size()
    if config_size > config_info.size:
        raise blocker(access.name, f"its config of {config_size} bytes does not fit its region of {config_info.size}")

    pci = await PciSpace.find(access, infos)
    version_info = None if pci is None else _version_region(infos, pci.identity)
    memory_info, bitmap_info = regions.get(Subtype.MEMORY), regions.get(Subtype.BITMAP)
    return Found(
        control=control,
        config=await Region.open(access, config_info, "config region"),
        memory=None if memory_info is None else await Region.open(access, memory_info, "memory region"),
        bitmap=None if bitmap_info is None else await Region.open(access, bitmap_info, "bitmap region"),
        version=version_info,
        pci=pci,
        description=DeviceDescription(
            interface="four-region",
            version=await (access.version() if version_info is None else _read_version(access, version_info)),
            device_memory=Caps.DEVICE_MEMORY in caps,
            dirty_tracking=Caps.SYSTEM_MEMORY in caps,
            config_size=config_size,
            config_limit=config_info.size,
            pci=None if pci is None else pci.identity,
            driver=access.info.driver,
            kernel=access.info.kernel,
            flags=flag_names(caps),
            data_size=None,  # the driver would capture
        ),
    )


def _by_subtype(name: str, infos: list[RegionInfo]) -> dict[Subtype, RegionInfo]:
    """The regions of the type, with control and config among them, each with the access it needs."""
    regions: dict[Subtype, RegionInfo] = {}
    for info in infos:
        if info.subtype not in tuple(Subtype):
            raise blocker(name, f"region {info.index} has the interface's type and the unknown subtype {info.subtype}")
        subtype = Subtype(info.subtype)
        if subtype in regions:
            raise blocker(name, f"it has two {subtype.name.lower()} regions, {regions[subtype].index} and {info.index}")
        if not info.readable or not (info.writable or subtype is Subtype.BITMAP):
            raise blocker(name, f"its {subtype.name.lower()} region, {info.index}, can't be both read and written")
        regions[subtype] = info
    for subtype in (Subtype.CONTROL, Subtype.CONFIG):
        if subtype not in regions:
            raise blocker(name, f"it has no {subtype.name.lower()} region (type {REGION_TYPE}, subtype {subtype})")
    return regions


def _layout(name: str, size: int, wanted: LayoutName | None) -> ControlLayout:
    if size != PACKED.size and size < NATURAL.size:
        raise blocker(
            name,
            f"its control region has {size} bytes, not {PACKED.size} or at least {NATURAL.size} as the interface has",
        )
    if wanted == "packed":
        return PACKED
    if size >= NATURAL.size:
        return NATURAL
    if wanted == "natural":
        raise blocker(name, f"its control region has {size} bytes, too few for the natural layout that was asked for")
    return PACKED


def _known_caps(name: str, value: int, regions: dict[Subtype, RegionInfo]) -> Caps:
    if value & ~_KNOWN_CAPS:
        raise blocker(name, f"its driver has capabilities that are not known here ({value:#x})")
    caps = Caps(value)
    for cap, subtype in ((Caps.DEVICE_MEMORY, Subtype.MEMORY), (Caps.SYSTEM_MEMORY, Subtype.BITMAP)):
        region = subtype.name.lower()
        if cap in caps and subtype not in regions:
            raise blocker(name, f"its driver has the capability {cap.name} and no {region} region")
        if cap not in caps and subtype in regions:
            raise blocker(name, f"it has a {region} region and its driver does not have the capability {cap.name}")
    return caps


def _version_region(infos: Sequence[RegionInfo], identity: PciIdentity) -> RegionInfo | None:
    """A vendor's types are the vendor's, and ours is only one use of them: Intel's subtype 1 is a graphics OpRegion.
    So size and access must fit as well.
    """
    kind = (REGION_TYPE_PCI_VENDOR | identity.vendor, VERSION_SUBTYPE, MAX_VERSION)
    for info in infos:
        if (info.type, info.subtype, info.size) == kind and info.readable and info.writable:
            return info
    return None


async def _read_version(access: Access, info: RegionInfo) -> str | None:
    raw = bytearray(info.size)
    with operation(access.name, "read the driver's own version"):
        await access.read_into(info.index, 0, memoryview(raw))
    try:
        version = raw.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise blocker(access.name, "its driver's version string is not UTF-8") from error
    return version or None
