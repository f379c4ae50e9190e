"""Mediated devices: made by writing a UUID to sysfs, and gone by writing to their own ``remove``."""

from __future__ import annotations

import subprocess
import uuid as uuids
from dataclasses import dataclass
from pathlib import Path

PARENTS = Path("/sys/class/mdev_bus")
DEVICES = Path("/sys/bus/mdev/devices")
PATIENCE = 5.0
"""Seconds."""
_still_asking: list[subprocess.Popen[bytes]] = []
"""They end when we do, which closes everything. Kept, as Python complains of a process that is forgotten."""


@dataclass(frozen=True, slots=True)
class Mdev:
    """One device, which exists until :meth:`remove`."""

    type_name: str
    uuid: str

    @property
    def sysfs(self) -> Path:
        return DEVICES / self.uuid

    @property
    def group(self) -> Path:
        """``/dev/vfio/N``, to be put in a container."""
        return Path("/dev/vfio") / (self.sysfs / "iommu_group").resolve().name

    @property
    def cdev(self) -> Path:
        """``/dev/vfio/devices/vfioN``, to be bound to an iommufd."""
        (entry,) = (self.sysfs / "vfio-dev").iterdir()
        return Path("/dev/vfio/devices") / entry.name

    def remove(self) -> None:
        """Raises AssertionError when somebody still has it open. The kernel waits for them then, and who asks it waits
        as well: that had better be a process of its own.
        """
        asking = subprocess.Popen(["sh", "-c", 'echo 1 >"$0"', self.sysfs / "remove"])
        try:
            status = asking.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            _still_asking.append(asking)
            raise AssertionError(f"{self.type_name} {self.uuid} was not closed by the test") from None
        assert status == 0


def type_directory(type_name: str) -> Path:
    """Where sysfs describes a type, such as ``mtty-2`` or ``four-region-16M``."""
    (found,) = PARENTS.glob(f"*/mdev_supported_types/{type_name}")
    return found


def create(type_name: str) -> Mdev:
    uuid = str(uuids.uuid4())
    (type_directory(type_name) / "create").write_text(uuid)
    return Mdev(type_name, uuid)
