"""Which interface a device speaks is found by asking it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import pytest

from tests.between import Between
from tests.device_contract import driver, served
from vfiostream.access.contract import RegionInfo
from vfiostream.devices import open_device
from vfiostream.devices.finding import find
from vfiostream.errors import DeviceRefused, Incompatible
from vfiostream.uapi.vfio import FEATURE_MIGRATION, Feature, FeatureOperation
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.settings import Interface

pytestmark = pytest.mark.anyio

REGION_9 = 9


@pytest.mark.parametrize("interface", get_args(Interface))
async def test_a_device_is_opened_with_the_interface_that_its_driver_speaks(interface: Interface) -> None:
    with driver(interface=interface) as one, served(one) as path:
        async with await open_device(f"vfio-user:{path}") as device:
            assert device.description.interface == interface


class Also(Between):
    """Over a device, which is said to have more, or less, than it has."""

    flags: int | None = None
    """Of the migration states; None leaves the answer as it is."""
    refusal: int | None = None
    """With which the question for them is refused."""
    region: tuple[int, int] | None = None
    """Type and subtype of region 9; None leaves it as it is."""

    async def region_info(self, index: int) -> RegionInfo:
        info = await super().region_info(index)
        if index == REGION_9 and self.region is not None:
            return replace(info, type=self.region[0], subtype=self.region[1])
        return info

    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        if feature == Feature.MIGRATION and self.refusal is not None:
            raise DeviceRefused(self.name, "feature", self.refusal)
        if feature == Feature.MIGRATION and self.flags is not None:
            return FEATURE_MIGRATION.pack(self.flags)
        return await super().feature(operation, feature, data, size)


@contextmanager
def said_to_have(interface: Interface, **changes: object) -> Iterator[Also]:
    with driver(interface=interface) as one:
        access = Also(InProcessAccess(one, "in-process:odd"))
        for name, value in changes.items():
            setattr(access, name, value)
        yield access


@pytest.mark.parametrize("interface", ["four-region", "migration-region"])
async def test_the_newest_interface_is_preferred(interface: Interface) -> None:
    with said_to_have(interface, flags=1) as access:
        async with await find(access) as device:
            assert device.description.interface == "migration-states"


@pytest.mark.parametrize("refusal", [errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
async def test_whoever_does_not_know_features_has_no_migration_states(refusal: int) -> None:
    with said_to_have("migration-region", refusal=refusal) as access:
        async with await find(access) as device:
            assert device.description.interface == "migration-region"


async def test_a_question_that_fails_is_no_answer() -> None:
    with said_to_have("migration-region", refusal=errno.EIO) as access:
        with pytest.raises(DeviceRefused, match="get migration flags with EIO"):
            await find(access)
        assert access.closed


@pytest.mark.parametrize("flags", [0, 2, 6, 8])
async def test_a_driver_that_can_not_save_its_state_is_a_blocker(flags: int) -> None:
    with said_to_have("migration-states", flags=flags) as access:
        with pytest.raises(Incompatible, match=r"^in-process:odd can't be moved: .*can't save its state"):
            await find(access)
        assert access.closed


async def test_flags_that_are_not_known_here_are_no_matter() -> None:
    with said_to_have("migration-states", flags=7 | 1 << 40) as access:
        async with await find(access) as device:
            assert device.description.interface == "migration-states"


async def test_a_device_with_none_of_them_is_told_what_was_looked_for() -> None:
    with said_to_have("migration-region", region=(3, 2)) as access:
        with pytest.raises(Incompatible) as caught:
            await find(access)
        assert access.closed
    text = str(caught.value)
    for part in ("in-process:odd can't be moved: ", "Linux 5.18", "feature 1", "Linux 5.8", "type 3", "2019", "type 2"):
        assert part in text


@pytest.mark.parametrize("altered", [{"writable": False}, {"readable": False}, {"size": 32}])
async def test_a_migration_region_that_can_not_be_used_is_a_blocker(altered: dict[str, object]) -> None:
    class Altered(Between):
        async def region_info(self, index: int) -> RegionInfo:
            info = await super().region_info(index)
            return replace(info, **altered) if index == REGION_9 else info  # type: ignore[arg-type]

    with driver(interface="migration-region") as one:
        access = Altered(InProcessAccess(one, "in-process:odd"))
        with pytest.raises(Incompatible, match=r"^in-process:odd can't be moved: .*migration region, 9"):
            await find(access)
        assert access.closed
