"""The migration states: the device contract over both accesses, with every set of optional states."""

from __future__ import annotations

import pytest

from tests.device_contract import DeviceContract, Opener, in_process, over_vfio_user

pytestmark = pytest.mark.anyio

ALL = ("stop-copy", "p2p", "pre-copy")


class TestInProcess(DeviceContract):
    interface = "migration-states"

    @pytest.fixture(autouse=True, params=[ALL, ("stop-copy", "pre-copy"), ("stop-copy", "p2p"), ("stop-copy",)])
    def states(self, request: pytest.FixtureRequest) -> None:
        self.fixed = {"states": request.param}

    @pytest.fixture
    def opened(self) -> Opener:
        return in_process()


class TestOverVfioUser(DeviceContract):
    interface = "migration-states"

    @pytest.fixture
    def opened(self) -> Opener:
        return over_vfio_user()
