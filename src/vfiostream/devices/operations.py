"""Operations on a device: each leaves a DEBUG event, and where the driver refuses it, the error names the operation
instead of bytes at an offset.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from vfiostream.errors import DeviceLost, DeviceRefused, DeviceTimeout, Incompatible

logger = logging.getLogger("vfiostream.device")

NO_HINTS: Mapping[int, str] = MappingProxyType({})


@contextmanager
def operation(device: str, what: str, hints: Mapping[int, str] = NO_HINTS) -> Iterator[None]:
    """Trace one operation on ``device``, and name it ``what`` if it fails; ``hints`` by errno of a refusal."""
    logger.debug("%s: %s", device, what)
    try:
        yield
    except DeviceRefused as error:
        raise DeviceRefused(device, what, error.errno, hints.get(error.errno, "")) from error
    except (DeviceLost, DeviceTimeout) as error:
        raise type(error)(f"{what}: {error}") from error


def blocker(device: str, problem: str) -> Incompatible:
    """What to raise for a device that can't be moved at all."""
    return Incompatible(f"{device} can't be moved: {problem}")
