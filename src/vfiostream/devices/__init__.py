"""Devices that can move: the contract, and one module for each interface a driver may speak."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiostream.access import open_access

if TYPE_CHECKING:
    from vfiostream.access.record import Recording
    from vfiostream.devices.contract import Device
    from vfiostream.devices.four_region import Order


async def open_device(
    address: str, *, order: Order = "session", timeout: float = 60.0, recording: Recording | None = None
) -> Device:
    """Open the device at ``address`` (``vfio-user:SOCKET`` or ``replay:FILE``), with the newest of the interfaces that
    its driver speaks.

    ``order`` is that of a session of the four regions, see :mod:`vfiostream.devices.four_region`; ``timeout`` and
    ``recording`` are as for :func:`vfiostream.access.open_access`. Raises :class:`~vfiostream.errors.UsageError` for
    what is not the address of a device, :class:`~vfiostream.errors.Incompatible` for a device that can't be moved, and
    what its access raises.
    """
    from vfiostream.devices.finding import find  # the contract alone need not load it

    return await find(await open_access(address, timeout=timeout, recording=recording), order=order)
