"""A device's description, for programs and for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vfiostream.cli.values import show_size
from vfiostream.devices.contract import DeviceDescription


def description_document(name: str, device: DeviceDescription) -> dict[str, Any]:
    """The fields of a device, as ``docs/command-line.md`` lists them."""
    return {"name": name, **asdict(device)}


def description_lines(name: str, device: DeviceDescription) -> list[str]:
    """The same for people."""
    pci = device.pci
    identity = (
        "not on PCI"
        if pci is None
        else f"{pci.vendor:04x}:{pci.device:04x}, subsystem {pci.subsystem_vendor:04x}:{pci.subsystem:04x}, "
        f"class {pci.class_code:06x}, revision {pci.revision:02x}"
    )
    kernel = "" if device.kernel is None else f", of Linux {device.kernel}"
    size = "" if device.data_size is None else f"; about {show_size(device.data_size)} after a stop"
    return [
        f"device         {name}",
        f"  interface    {device.interface}",
        f"  driver       {device.driver or 'unknown'}{kernel}",
        f"  version      {device.version if device.version is not None else 'none'}",
        f"  pci          {identity}",
        f"  flags        {', '.join(device.flags) or 'none'}",
        f"  has          {_has(device)}",
        f"  config       {show_size(device.config_size)}, of {show_size(device.config_limit)} that it takes{size}",
    ]


def _has(device: DeviceDescription) -> str:
    memory = "device memory" if device.device_memory else "no device memory"
    return f"{memory}, {'reports' if device.dirty_tracking else 'does not report'} the guest pages it dirties"
