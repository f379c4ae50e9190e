"""The migration states: the device contract over both accesses, with every set of optional states."""

from __future__ import annotations

from typing import ClassVar

import pytest

from tests.device_contract import Opener, ReadableContract, in_process, over_vfio_user
from vfiostream.errors import Incompatible
from vfiostream.uapi.vfio import MigrationState as State
from vfiostream.vendor.device import ReferenceDevice

pytestmark = pytest.mark.anyio

ALL = ("stop-copy", "p2p", "pre-copy")


class StatesContract(ReadableContract):
    interface = "migration-states"
    numbers: ClassVar = {
        "running": State.RUNNING,
        "stopped": State.STOP,
        "stopped and saving": State.STOP_COPY,
        "loading": State.RESUMING,
    }

    def tell(self, one: ReferenceDevice, state: int) -> None:
        one.driver.set_migration_state(state)

    async def test_a_capture_with_a_size_is_refused(self, opened: Opener) -> None:
        with self.driver() as other:
            async with opened(other) as target:
                await target.start_load()
                await target.begin_capture(0)  # nothing at all is no matter
                with pytest.raises(Incompatible, match="same kind"):
                    await target.begin_capture(100)
                await target.abandon()


class TestInProcess(StatesContract):
    @pytest.fixture(autouse=True, params=[ALL, ("stop-copy", "pre-copy"), ("stop-copy", "p2p"), ("stop-copy",)])
    def states(self, request: pytest.FixtureRequest) -> None:
        self.fixed = {"states": request.param}

    @pytest.fixture
    def opened(self) -> Opener:
        return in_process()


class TestOverVfioUser(StatesContract):
    @pytest.fixture
    def opened(self) -> Opener:
        return over_vfio_user()
