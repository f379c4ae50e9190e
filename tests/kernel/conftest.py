"""What the tests in here share: mediated devices, and the two ways to reach one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeAlias

import pytest

from tests.kernel import mdev as mdevs, raw_vfio

if os.environ.get("VFIOSTREAM_IN_KERNEL") != "1":  # tests/conftest.py tells the user how to run them
    collect_ignore_glob = ["test_*.py"]

THOROUGH = (
    # What the library does by itself; on reference devices, scripts/test has it on all loops.
    "test_calls_out_of_order_are_refused_and_do_nothing",
    "test_what_ends_a_session_can_be_done_again",
    "test_whatever_happens_they_never_both_run",
    # Links: it takes as long as they are bad.
    "test_a_bad_link_for_long",
    "test_a_link_that_is_away_for_long",
)
THOROUGH_BUT_ON_ASYNCIO = (
    # Each takes seconds, and is about the drivers.
    "test_what_the_kernels_sample_breaks",
    "test_our_driver_keeps_all_rules",
    "test_a_busy_four_region_device_moves_with_its_guest_memory",
    "test_devices_of_two_interfaces_move_together",
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thorough: takes long, and is not run unless it is asked for: -m ''")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name, _, case = item.name.partition("[")
        if name in THOROUGH or (name in THOROUGH_BUT_ON_ASYNCIO and ("trio" in case or "uvloop" in case)):
            item.add_marker("thorough")


MakeMdev: TypeAlias = Callable[[str], mdevs.Mdev]
MakeHolder: TypeAlias = Callable[[], raw_vfio.Holder]


@pytest.fixture
def mdev() -> Iterator[MakeMdev]:
    """Makes devices of a type (``mdev("mtty-2")``), which are removed after the test. They must be closed by then."""
    with ExitStack() as removals:  # all of them, whatever becomes of one

        def make(type_name: str) -> mdevs.Mdev:
            made = mdevs.create(type_name)
            removals.callback(made.remove)
            return made

        yield make


@pytest.fixture(params=[raw_vfio.Type1, raw_vfio.Iommufd], ids=["group", "cdev"])
def holder(request: pytest.FixtureRequest, mdev: MakeMdev) -> Iterator[MakeHolder]:
    """Makes what devices are opened in by hand; all of them are closed after the test, and before the devices go."""
    made: list[raw_vfio.Holder] = []

    def make() -> raw_vfio.Holder:
        made.append(request.param())
        return made[-1]

    yield make
    for one in made:
        one.close()  # may be called again
