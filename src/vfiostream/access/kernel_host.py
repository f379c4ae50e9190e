"""The devices of this host, as sysfs shows them: PCI devices and mediated devices, their drivers, groups and nodes.

Reads files and opens no device. What can't be read is as if it were not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vfiostream.access.kernel_calls import Kernel

CONTAINER = "/dev/vfio/vfio"
IOMMUFD = "/dev/iommu"
PCI_DEVICES = "/sys/bus/pci/devices"
MDEV_DEVICES = "/sys/bus/mdev/devices"
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
PCI_ADDRESS = re.compile(r"([0-9a-fA-F]{4,8}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]")
_NODES_CLASS = "/sys/class/vfio-dev"
_BRIDGE = "0x06"
"""Class of PCI devices that nobody can have."""
MAX_HOLDERS = 3
"""Processes that are named as those that have a device open."""


Kind: TypeAlias = Literal["pci", "mdev", "other"]


@dataclass(frozen=True, slots=True)
class HostDevice:
    """A device of the kernel's."""

    kind: Kind
    name: str
    """What the driver core and its group call it: a PCI address, a UUID, or what another bus has."""
    folder: str
    """In sysfs."""
    driver: str | None
    """The driver it is bound to."""
    group: str | None
    """Number of its IOMMU group."""
    noiommu: bool
    """Whether that group was made up because there is no IOMMU."""
    cdev: str | None
    """``vfioN``, where the kernel has a node of its own for it."""

    @property
    def bound(self) -> bool:
        """Whether its driver is one of VFIO's. The kernel says so since 6.1, by the folder that ``cdev`` is found in;
        before that, their names do. Mediated devices, and what was found by that folder, have no other drivers.
        """
        return self.driver is not None and (self.kind != "pci" or self.cdev is not None or "vfio" in self.driver)


def look_up(kernel: Kernel, kind: Literal["pci", "mdev"], name: str) -> HostDevice | None:
    """The device called ``name``; None where there is none."""
    folder = f"{PCI_DEVICES if kind == 'pci' else MDEV_DEVICES}/{name}"
    return _look(kernel, kind, name, folder) if kernel.exists(folder) else None


def _look(kernel: Kernel, kind: Kind, name: str, folder: str) -> HostDevice:
    group = kernel.link(f"{folder}/iommu_group")
    nodes = [node for node in kernel.names(f"{folder}/vfio-dev") if "vfio" in node]
    # Not by the name of the group: that is vfio-noiommu for every mediated device.
    noiommu = kernel.exists(f"/dev/vfio/noiommu-{group}") or any(node.startswith("noiommu-") for node in nodes)
    return HostDevice(
        kind=kind,
        name=name,
        folder=folder,
        driver=kernel.link(f"{folder}/driver"),
        group=group,
        noiommu=noiommu,
        cdev=nodes[0] if nodes else None,
    )


def list_devices(kernel: Kernel) -> Iterator[HostDevice]:
    """The PCI devices that are in an IOMMU group and no bridges, the mediated devices, and what else VFIO has."""
    known = set()
    for name in kernel.names(PCI_DEVICES):
        device = _look(kernel, "pci", name, f"{PCI_DEVICES}/{name}")
        kind = kernel.attribute(f"{PCI_DEVICES}/{name}/class") or ""
        if device.group is not None and not kind.startswith(_BRIDGE):
            known.add(device.cdev)
            yield device
    for name in kernel.names(MDEV_DEVICES):
        device = _look(kernel, "mdev", name, f"{MDEV_DEVICES}/{name}")
        known.add(device.cdev)
        yield device
    for node in kernel.names(_NODES_CLASS):
        if node not in known:
            yield _look(kernel, "other", name_behind(kernel, node) or node, f"{_NODES_CLASS}/{node}/device")


def address(device: HostDevice) -> str:
    """What to call ``device`` where an address is wanted."""
    return f"vfio:{device.name}" if device.kind != "other" else f"vfio:/dev/vfio/devices/{device.cdev}"


def node_of(kernel: Kernel, device: HostDevice) -> str | None:
    """The node by which ``device`` is opened: its own where there is one and iommufd is there, else its group's; None
    where it can't be.
    """
    own = None if device.cdev is None else f"/dev/vfio/devices/{device.cdev}"
    if own is not None and kernel.exists(own) and kernel.exists(IOMMUFD):
        return own
    group = None if device.group is None else f"/dev/vfio/{device.group}"
    if group is not None and kernel.exists(group) and kernel.exists(CONTAINER):
        return group
    return own if own is not None and kernel.exists(own) else None


def name_behind(kernel: Kernel, node: str) -> str | None:
    """What the driver core calls the device whose own node (``vfioN``) this is."""
    return kernel.link(f"{_NODES_CLASS}/{node}/device")


def trouble(kernel: Kernel, device: HostDevice) -> str | None:
    """Why ``device`` can't be opened as it is, and what to do about it; None where nothing is in the way that sysfs
    knows of. A clause that goes on from the device's name.
    """
    if device.group is None and device.cdev is None:
        return (
            "has no IOMMU group, so the host's IOMMU is off: switch it on in the firmware (VT-d, AMD-Vi) and with "
            "intel_iommu=on on the kernel's command line"
        )
    if not device.bound:
        return _not_bound(device)
    if device.noiommu:
        return (
            "is in noiommu mode, in which no guest memory can be mapped for it: switch the host's IOMMU on, and vfio's "
            "enable_unsafe_noiommu_mode off"
        )
    if not kernel.exists("/dev/vfio"):
        return (
            "can't be opened without /dev/vfio: load the kernel's VFIO (modprobe vfio-pci), or pass its nodes into "
            "this container"
        )
    if node_of(kernel, device) is None:
        nodes = f"no {device.group}, nor {device.cdev or 'one of its own'}"
        return f"has no node in /dev/vfio ({nodes}): see whether udev runs"
    return None


def _not_bound(device: HostDevice) -> str:
    if device.kind == "mdev":
        return "is bound to no driver: load the module of its parent's mediated devices"
    has = "no driver" if device.driver is None else f"the driver {device.driver}"
    unbind = "" if device.driver is None else f"echo {device.name} > {device.folder}/driver/unbind; "
    return (
        f"is bound to {has}: bind it to its vendor's vfio driver, or to vfio-pci with `driverctl set-override "
        f"{device.name} vfio-pci`, which is `echo vfio-pci > {device.folder}/driver_override; {unbind}"
        f"echo {device.name} > /sys/bus/pci/drivers_probe`"
    )


def others_in_group(kernel: Kernel, group: str) -> list[tuple[str, str | None]]:
    """The devices of an IOMMU group, with their drivers."""
    folder = f"/sys/kernel/iommu_groups/{group}/devices"
    return [(name, kernel.link(f"{folder}/{name}/driver")) for name in kernel.names(folder)]


def holders(kernel: Kernel, node: str) -> list[str]:
    """The processes that have ``node`` open, as far as we may know; at most MAX_HOLDERS."""
    found: list[str] = []
    for process in kernel.names("/proc"):
        if not process.isdigit():
            continue
        for number in kernel.names(f"/proc/{process}/fd"):
            if kernel.target(f"/proc/{process}/fd/{number}") == node:
                found.append(f"{process} ({kernel.attribute(f'/proc/{process}/comm') or 'unknown'})")
                break
        if len(found) == MAX_HOLDERS:
            break
    return found
