"""Finding a device of the kernel's by its address, and opening it through its own node or its group's.

An address is ``vfio:`` and one of: the UUID of a mediated device; the address of a PCI device (``0000:3b:00.2``, or
without the domain); a group's number and the device's name in it (``12/0000:3b:00.2``), which opens the group; or the
path of the device's own node (``/dev/vfio/devices/vfio0``), which opens that, with an iommufd. UUID and PCI address
take the node of their own where the kernel and the host have it, else the group.

Each opened device has a container or an iommufd of its own. Two devices of one IOMMU group would have to share it, with
guest memory mapped once for both and one log for two who ask: that is not supported, and opening the second is refused.
Mediated devices have a group each, and so have devices that can be given to different guests at all.

Blocking; raises :class:`~vfiostream.errors.VfiostreamError`. Whatever fails, nothing stays open.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import stat
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from vfiostream.access.kernel_calls import Kernel
from vfiostream.access.kernel_host import (
    CONTAINER,
    IOMMUFD,
    MDEV_DEVICES,
    PCI_ADDRESS,
    UUID,
    holders,
    look_up,
    name_behind,
    node_of,
    others_in_group,
    trouble,
)
from vfiostream.access.kernel_iommu import Iommu, Iommufd, Type1
from vfiostream.errors import DeviceBroken, DeviceRefused, UsageError
from vfiostream.uapi import iommufd
from vfiostream.uapi.vfio_kernel import (
    API_VERSION,
    ATTACH_IOMMUFD_PT,
    BIND_IOMMUFD,
    GROUP_STATUS,
    ContainerIoctl,
    Extension,
    GroupFlags,
    Ioctl,
)

FORMS = "vfio:UUID, vfio:PCI-ADDRESS, vfio:GROUP/NAME or vfio:/dev/vfio/devices/vfioN"
_LISTING = "`vfiostream devices` lists the devices of this host"
_NODES = "/dev/vfio/devices/"
_NODE = re.compile(f"{_NODES}(noiommu-)?vfio[0-9]+")
_INT = struct.Struct("<i")
_SHARES_A_GROUP = frozenset({"pcieport", "pci-stub"})
"""Drivers that may have a device of a group whose others are VFIO's: they start no DMA."""
_NO_HINTS: Mapping[int, Callable[[], str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Opened:
    """An open device."""

    fd: int
    iommu: Iommu
    close: Callable[[], None]
    """Closes all that was opened, and then lets go of guest memory."""
    version_file: str | None
    """Of its mediated device's type."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device is opened."""

    way: Literal["group", "node"]
    node: str
    """To be opened."""
    name: str
    """Of the device, to its group and the driver core."""


def find(kernel: Kernel, address: str) -> Place:
    """Where the device of ``vfio:ADDRESS`` is opened; raises UsageError where it can't be, with the way out."""
    if _NODE.fullmatch(address):
        if not kernel.exists(address):
            raise UsageError(
                f"vfio:{address}: there is no such node; `vfiostream devices` lists the devices of this host"
            )
        return Place("node", address, name_behind(kernel, address.removeprefix(_NODES)) or address)
    group, slash, name = address.partition("/")
    if slash and group.removeprefix("noiommu-").isdecimal() and name and "/" not in name:
        return _find_in_group(kernel, address, group, name)
    kind: Literal["pci", "mdev"]
    if UUID.fullmatch(address):
        kind, name = "mdev", address.lower()
    elif PCI_ADDRESS.fullmatch(address):
        kind, name = "pci", (address if address.count(":") == 2 else f"0000:{address}").lower()
    else:
        raise UsageError(f"vfio:{address} is not the address of a device; write {FORMS}")
    device = look_up(kernel, kind, name)
    if device is None:
        raise _not_there(kernel, kind, address)
    problem = trouble(kernel, device)
    if problem is not None:
        raise UsageError(f"vfio:{address} {problem}")
    node = node_of(kernel, device)
    assert node is not None  # or that had been the trouble
    return Place("node" if node.startswith(_NODES) else "group", node, name)


def open_place(kernel: Kernel, name: str, place: Place) -> Opened:
    """Open the device at ``place``; ``name`` is what the access is called."""
    opening = _Opening(kernel, name)
    with ExitStack() as undo:
        undo.callback(opening.close)
        if place.way == "node":
            fd, iommu = opening.through_node(place.node)
        else:
            fd, iommu = opening.through_group(place.node, place.name)
        undo.pop_all()
    version_file = f"{MDEV_DEVICES}/{place.name}/mdev_type/version"

    def close() -> None:
        opening.close()
        iommu.close()

    return Opened(fd, iommu, close, version_file if kernel.exists(version_file) else None)


def _find_in_group(kernel: Kernel, address: str, group: str, name: str) -> Place:
    if group.startswith("noiommu-"):
        raise UsageError(
            f"vfio:{address} is in noiommu mode, in which no guest memory can be mapped for it: switch the host's "
            "IOMMU on"
        )
    node = f"/dev/vfio/{group}"
    if not kernel.exists("/dev/vfio"):
        raise UsageError(
            f"vfio:{address} can't be opened without /dev/vfio: load the kernel's VFIO (modprobe vfio-pci), or pass "
            "its nodes into this container"
        )
    if not kernel.exists(node):
        for kind in ("mdev", "pci"):
            device = look_up(kernel, kind, name)
            problem = None if device is None else trouble(kernel, device)
            if problem is not None:
                raise UsageError(f"vfio:{address} {problem}")
        raise UsageError(f"vfio:{address}: there is no {node}; {_LISTING}")
    return Place("group", node, name)


def _not_there(kernel: Kernel, kind: Literal["pci", "mdev"], address: str) -> UsageError:
    if kind == "pci":
        return UsageError(f"vfio:{address}: there is no such PCI device; {_LISTING}")
    if not kernel.exists(MDEV_DEVICES):
        return UsageError(
            f"vfio:{address}: the kernel has no mediated devices; load the module of the device that has them"
        )
    return UsageError(
        f"vfio:{address}: there is no such mediated device; {_LISTING}, and writing a UUID to "
        "mdev_supported_types/TYPE/create of its parent makes one"
    )


class _Opening:
    """The descriptors of a device, as they are opened."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self._kernel = kernel
        self._name = name
        self._fds: list[int] = []

    def close(self) -> None:
        """Close them, the last first."""
        while self._fds:
            try:
                self._kernel.close(self._fds.pop())
            except OSError:
                pass  # it is closed all the same

    def through_group(self, node: str, device: str) -> tuple[int, Iommu]:
        container = self._open(CONTAINER, "load the module vfio")
        version = self._ask(container, ContainerIoctl.GET_API_VERSION, 0, "its version")
        if version != API_VERSION:
            raise DeviceBroken(f"{self._name}: {CONTAINER} speaks version {version} of VFIO, not {API_VERSION}")
        group = self._open(node, "see whether the device is still bound to its driver")
        self._check_viable(group, node)
        self._ask(
            group, Ioctl.GROUP_SET_CONTAINER, bytearray(_INT.pack(container)), f"putting {node} in a container",
            {errno.EBUSY: lambda: self._unviable(node)},
        )  # fmt: skip
        for kind in (Extension.TYPE1V2_IOMMU, Extension.TYPE1_IOMMU):
            if self._ask(container, ContainerIoctl.CHECK_EXTENSION, int(kind), "what kinds of IOMMU it knows") > 0:
                break
        else:
            raise UsageError(f"{self._name}: the kernel has no IOMMU driver for it; modprobe vfio_iommu_type1")
        self._ask(
            container, ContainerIoctl.SET_IOMMU, int(kind), f"setting up the IOMMU of {node}",
            {errno.EPERM: lambda: "switch interrupt remapping on in the host's firmware"},
        )  # fmt: skip
        fd = self._ask(
            group, Ioctl.GROUP_GET_DEVICE_FD, bytearray(device.encode() + b"\0"), f"opening {device} in {node}",
            {errno.ENODEV: lambda: self._members(node), errno.EBUSY: lambda: self._held(node)},
        )  # fmt: skip
        self._fds.append(fd)
        return fd, Type1(self._kernel, container)

    def through_node(self, node: str) -> tuple[int, Iommu]:
        memory = self._open(IOMMUFD, "modprobe iommufd, or name the device as GROUP/NAME")
        fd = self._open(node, "see whether the device is still bound to its driver")
        bind = bytearray(BIND_IOMMUFD.pack(BIND_IOMMUFD.size, 0, memory, 0))
        self._ask(
            fd, Ioctl.DEVICE_BIND_IOMMUFD, bind, f"binding {node} to an iommufd",
            {errno.EBUSY: lambda: self._held(node), errno.EINVAL: lambda: self._held(node)},  # Linux says both
        )  # fmt: skip
        device = BIND_IOMMUFD.unpack(bind)[3]
        space = bytearray(iommufd.IOAS_ALLOC.pack(iommufd.IOAS_ALLOC.size, 0, 0))
        self._ask(memory, iommufd.Ioctl.IOAS_ALLOC, space, "making an address space")
        space_id: int = iommufd.IOAS_ALLOC.unpack(space)[2]
        page_table = self._logging_page_table(memory, device, space_id)
        attach = bytearray(
            ATTACH_IOMMUFD_PT.pack(ATTACH_IOMMUFD_PT.size, 0, space_id if page_table is None else page_table)
        )
        self._ask(fd, Ioctl.DEVICE_ATTACH_IOMMUFD_PT, attach, f"attaching {node} to its address space")
        return fd, Iommufd(self._kernel, memory, space_id, page_table)

    def _logging_page_table(self, memory: int, device: int, space: int) -> int | None:
        """A page table that logs what the device writes; None where its IOMMU makes none, or it has no IOMMU."""
        request = bytearray(
            iommufd.HWPT_ALLOC.pack(
                iommufd.HWPT_ALLOC.size, iommufd.HWPT_ALLOC_DIRTY_TRACKING, device, space, 0, 0, 0, 0, 0
            )
        )
        try:
            self._kernel.ioctl(memory, iommufd.Ioctl.HWPT_ALLOC, request)
        except OSError:
            return None
        page_table: int = iommufd.HWPT_ALLOC.unpack(request)[4]
        return page_table

    def _open(self, node: str, if_missing: str) -> int:
        try:
            fd = self._kernel.open(node)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
                raise UsageError(f"{self._name}: there is no {node}; {if_missing}") from error
            if error.errno in (errno.EACCES, errno.EPERM):
                raise UsageError(f"{self._name}: no permission on {node}; {self._who_may(node)}") from error
            hint = self._held(node) if error.errno == errno.EBUSY else ""
            raise DeviceRefused(self._name, f"opening {node}", error.errno or errno.EIO, hint) from error
        self._fds.append(fd)
        return fd

    def _ask(
        self, fd: int, request: int, argument: bytearray | int, operation: str,
        hints: Mapping[int, Callable[[], str]] = _NO_HINTS,
    ) -> int:  # fmt: skip
        try:
            return self._kernel.ioctl(fd, request, argument)
        except OSError as error:
            number = error.errno or errno.EIO
            raise DeviceRefused(self._name, operation, number, hints.get(number, str)()) from error

    def _check_viable(self, group: int, node: str) -> None:
        status = bytearray(GROUP_STATUS.pack(GROUP_STATUS.size, 0))
        self._ask(group, Ioctl.GROUP_GET_STATUS, status, f"asking about {node}")
        if not GROUP_STATUS.unpack(status)[1] & GroupFlags.VIABLE:
            raise UsageError(f"{self._name}: the group {node} can't be used; {self._unviable(node)}")

    def _unviable(self, node: str) -> str:
        strangers = [
            f"{name} ({driver})"
            for name, driver in others_in_group(self._kernel, node.rpartition("/")[2])
            if driver is not None and "vfio" not in driver and driver not in _SHARES_A_GROUP
        ]
        if not strangers:
            return "another driver holds a device of it: bind all its devices to vfio drivers, or to none"
        return f"the host's drivers hold {', '.join(strangers)} of it: bind them to vfio-pci, or to no driver"

    def _members(self, node: str) -> str:
        members = [name for name, _ in others_in_group(self._kernel, node.rpartition("/")[2])]
        return f"the devices of that group are: {', '.join(members) or 'unknown'}"

    def _held(self, node: str) -> str:
        """What to do where somebody else has it."""
        found = holders(self._kernel, node)
        if not found:
            return "another process has it open, or another device of its IOMMU group: end that first"
        if found[0].startswith(f"{os.getpid()} "):
            return "this process has it open: two devices of one IOMMU group can't be used at the same time"
        return f"process {', '.join(found)} has it open: end that first"

    def _who_may(self, node: str) -> str:
        try:
            found = os.stat(self._kernel.path(node))
        except OSError:
            return "run as root"
        owner, group = _user(found.st_uid), _group(found.st_gid)
        return (
            f"it belongs to user {owner} and group {group} with mode {stat.S_IMODE(found.st_mode):04o}: run as one "
            "who may read and write it, or change its owner with a rule of udev"
        )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
