"""What a driver of the reference device is: the front-end of one interface onto :class:`~.hardware.Hardware`.

It refuses with OSError; the errno is what a client gets, the text is for the log of the driver. No driver knows
another.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod

from vfiostream.buffers import Buffer
from vfiostream.uapi.vfio import FEATURE_MASK, Feature, FeatureOperation
from vfiostream.vendor.faults import Broken
from vfiostream.vendor.hardware import Hardware
from vfiostream.vendor.regions import Region
from vfiostream.vendor.settings import Operation

_GET, _SET, _PROBE = (int(one) for one in (FeatureOperation.GET, FeatureOperation.SET, FeatureOperation.PROBE))
"""Plain numbers: the inverse of a flag has no bits but those of its class, and a client sends what it likes."""


class Driver(ABC):
    """One interface onto ``hardware``."""

    regions: tuple[Region, ...] = ()
    """Those of the interface; the first has number ``PCI_NUM_REGIONS``."""
    features: dict[Feature, FeatureOperation]
    """What a client can do with each feature that the device has."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.settings = hardware.settings
        self.features = {}

    @property
    @abstractmethod
    def state(self) -> int:
        """The device state, in the numbers of the interface."""

    def read(self, index: int, offset: int, into: memoryview) -> None:
        """Read from a region of the interface that has no memory of its own; bounds were checked."""
        raise OSError(errno.EINVAL, f"region {index} can't be read")

    def write(self, index: int, offset: int, data: Buffer) -> None:
        """Write to such a region; returns when what it asks for is done."""
        raise OSError(errno.EINVAL, f"region {index} can't be written")

    @abstractmethod
    def reset(self) -> None:
        """Forget everything; the hardware is reset afterwards."""

    @abstractmethod
    def client_gone(self) -> None:
        """The client went away; its guest memory was unmapped."""

    def strike(self, operation: Operation) -> None:
        """Let ``operation`` fail, if it is to; see :class:`~.faults.FaultPlan`."""
        try:
            self.hardware.faults.strike(operation)
        except Broken:
            with self.hardware.lock:
                self.hardware.workload.run(False)
                self.break_down()
            raise

    @abstractmethod
    def break_down(self) -> None:
        """Go to the error state: the device does nothing any more until it is reset."""

    def close(self) -> None:
        for region in self.regions:
            region.close()

    # ---- features

    def feature(self, flags: int, data: Buffer) -> bytes:
        """``VFIO_DEVICE_FEATURE`` with ``flags`` and what follows them; returns the data of the answer."""
        number = flags & FEATURE_MASK
        asked = flags & ~FEATURE_MASK
        if asked & ~(_GET | _SET | _PROBE):
            raise OSError(errno.EINVAL, f"the flags {flags:#x} of feature {number} are not known")
        if number not in self.features:
            raise OSError(errno.ENOTTY, f"there is no feature {number}")
        feature = Feature(number)
        if asked & ~_PROBE & ~self.features[feature]:
            raise OSError(errno.EINVAL, f"feature {number} can't be used with flags {flags:#x}")
        if asked & _PROBE:
            return bytes(data)
        if asked == _GET:
            return self.get_feature(feature, bytes(data))
        if asked == _SET:
            return self.set_feature(feature, bytes(data))
        raise OSError(errno.EINVAL, f"feature {number} is to be neither got nor set")

    def get_feature(self, feature: Feature, data: bytes) -> bytes:
        """Get one of :attr:`features`."""
        raise NotImplementedError

    def set_feature(self, feature: Feature, data: bytes) -> bytes:
        """Set one of :attr:`features`; returns ``data``, changed where the driver has chosen otherwise."""
        raise NotImplementedError

    # ---- the data of a migration

    def set_migration_state(self, state: int) -> bool:
        """Set MIG_DEVICE_STATE; returns whether that opened a stream of data."""
        raise OSError(errno.ENOTTY, "this device has no migration states")

    def read_data(self, into: memoryview) -> int:
        """Read from the stream of data: at least a byte, or 0 at its end."""
        raise OSError(errno.EINVAL, "this device has no stream of data")

    def write_data(self, data: Buffer) -> None:
        """Write to the stream of data."""
        raise OSError(errno.EINVAL, "this device has no stream of data")

    def precopy_info(self) -> tuple[bool, int, int]:
        """``vfio_precopy_info``: whether there are new initial bytes, initial bytes, dirty bytes."""
        raise OSError(errno.ENOTTY, "this device has no PRE_COPY")
