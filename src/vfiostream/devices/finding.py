"""Finding the interface that a device speaks, by asking it."""

from __future__ import annotations

from vfiostream.access.contract import Access
from vfiostream.devices.contract import Device
from vfiostream.devices.four_region import FourRegionDevice, Order
from vfiostream.devices.migration_region import MigrationRegionDevice, migration_region
from vfiostream.devices.migration_states import MigrationStatesDevice, migration_flags
from vfiostream.devices.operations import blocker
from vfiostream.devices.regions import regions_of
from vfiostream.uapi import four_region, vfio


async def find(access: Access, *, order: Order = "session") -> Device:
    """The device behind ``access``, with the newest interface that it has. It is closed with the device, and where this
    fails. Raises :class:`~vfiostream.errors.Incompatible` for a device that can't be moved, and what an access raises.
    """
    try:
        infos = await regions_of(access)
        if (flags := await migration_flags(access)) is not None:
            return await MigrationStatesDevice.open(access, flags, infos)
        if (region := migration_region(infos)) is not None:
            return await MigrationRegionDevice.open(access, infos, region)
        if any(info.type == four_region.REGION_TYPE and info.size for info in infos):
            return await FourRegionDevice.open(access, order=order)
        raise blocker(
            access.name,
            "it has none of the migration states of Linux 5.18 (feature 1), the migration region of Linux 5.8 (type "
            f"{vfio.REGION_TYPE_MIGRATION}) and the four regions of 2019 (type {four_region.REGION_TYPE})",
        )
    except BaseException:
        await access.aclose()
        raise
