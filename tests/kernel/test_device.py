"""The device contract on a kernel's real VFIO, through a group and a device's own node: our four-region driver, and the
kernel's sample with the migration states.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, ClassVar, Generic, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.device_contract import (
    PAGE,
    DeviceContract,
    MemoryContract,
    Opener,
    ReadableContract,
    SizedContract,
    put,
    write,
)
from tests.kernel import mdev as mdevs
from tests.kernel.kernel_drivers import FourRegionKernelDriver, KernelDriver, MttyDriver, Way, through
from vfiostream.uapi.vfio import MigrationState

pytestmark = pytest.mark.anyio

D = TypeVar("D", bound=KernelDriver)

KIB = 1 << 10
TYPES = {"whole": "256K", "sparse": "256K-sparse", "none": "256K-nomap"}
LARGE = ("16M", "16M-sparse", "16M-nomap", "16M-packed")
SMALL = ("256K", "256K-sparse", "256K-nomap", "256K-packed")

Lane = tuple[Way, tuple[str, dict[str, Any]]]
LANES: dict[str, Lane] = {
    "group-asyncio": ("group", ("asyncio", {"use_uvloop": False})),
    "node-uvloop": ("node", ("asyncio", {"use_uvloop": True})),
    "node-trio": ("node", ("trio", {})),
}
"""Ways to a device and event loops: each in one lane at least, as all six pairs of them take twice as long."""
CORE = (
    "test_everything_moves",
    "test_types_may_differ",
    "test_dirty_pages_are_added_to_what_is_there",
    "test_a_stopped_device_runs_when_told_to",
    "test_an_abandoned_target_stays_stopped_and_can_start_over",
    "test_it_can_be_closed_at_any_time",
)
"""What runs in all lanes. The rest is about the device, which knows neither way nor loop, and runs in that of its
class.
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.cls is None or not issubclass(metafunc.cls, OnKernel):
        return
    names = LANES if metafunc.function.__name__ in CORE else (metafunc.cls.lane,)
    metafunc.parametrize("lane", [pytest.param(LANES[name], id=name) for name in names])


@pytest.fixture
def anyio_backend(lane: Lane) -> Any:
    return lane[1]


class Pool(Generic[D]):
    """Devices that are used again: making and removing one takes longer than most tests."""

    def __init__(self, kind: Callable[[mdevs.Mdev], D], prefix: str) -> None:
        self._kind = kind
        self._prefix = prefix
        self._idle: dict[str, list[D]] = {}
        self._removals = ExitStack()

    @contextmanager
    def device(self, type_name: str) -> Iterator[D]:
        """A new device, as far as can be seen."""
        idle = self._idle.setdefault(type_name, [])
        if not idle:
            made = mdevs.create(f"{self._prefix}-{type_name}")
            self._removals.callback(made.remove)
            idle.append(self._kind(made))
        one = idle.pop()
        one.reset()
        try:
            yield one
        finally:
            idle.append(one)

    def close(self) -> None:
        self._removals.close()


@pytest.fixture(scope="module")
def four_regions() -> Iterator[Pool[FourRegionKernelDriver]]:
    pool = Pool(FourRegionKernelDriver, "four-region")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def mttys() -> Iterator[Pool[MttyDriver]]:
    pool = Pool(MttyDriver, "mtty")
    yield pool
    pool.close()


def type_with(
    *,
    type_name: str | None = None,
    mmap: str = "whole",
    memory: int = 48 * PAGE,
    dirty_tracking: bool = True,
    seed: int = 0,
) -> str:
    """The type of four-region device with such settings: the smallest with at least so much memory. ``seed`` is of no
    use here, as no two devices have the same content.
    """
    if type_name is not None:
        return type_name
    if memory == 0:
        return "0M"
    if memory > 256 * KIB:
        return "512K"
    return TYPES[mmap] if dirty_tracking else "256K-untracked"


class OnKernel(DeviceContract):
    """What the drivers have in common."""

    lane: ClassVar[str]

    @pytest.fixture
    def opened(self, lane: Lane) -> Opener:
        return through(lane[0])

    @contextmanager
    def drivers(self, source: dict[str, Any], target: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        with self.driver(**source) as one, self.driver(**target) as other:
            yield one, other


class TestFourRegion(OnKernel, SizedContract, MemoryContract):
    interface = "four-region"
    lane = "group-asyncio"

    @pytest.fixture(autouse=True)
    def devices(self, four_regions: Pool[FourRegionKernelDriver]) -> None:
        self.pool = four_regions

    @contextmanager
    def driver(self, **changes: Any) -> Iterator[FourRegionKernelDriver]:
        with self.pool.device(type_with(**changes)) as one:
            yield one

    @pytest.mark.parametrize(("here", "there"), list(pairwise([*SMALL, SMALL[0]])))
    async def test_types_may_differ(self, opened: Opener, here: str, there: str) -> None:
        """In their regions' sizes, in what can be mapped of them, in the layout of control."""
        await self.check_move(opened, source={"type_name": here}, target={"type_name": there})

    @pytest.mark.parametrize("kind", LARGE)
    async def test_large_ones_move(self, opened: Opener, kind: str) -> None:
        await self.check_move(opened, source={"type_name": kind}, target={"type_name": kind})

    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        read_cuts=st.lists(st.integers(300, 20 * PAGE), min_size=1, max_size=6),
        write_cuts=st.lists(st.integers(300, 20 * PAGE), min_size=1, max_size=6),
        types=st.tuples(st.sampled_from(SMALL), st.sampled_from(SMALL)),
        how=st.sampled_from([write, put]),
    )
    async def test_any_cutting_will_do(
        self,
        opened: Opener,
        read_cuts: list[int],
        write_cuts: list[int],
        types: tuple[str, str],
        how: Callable[..., Awaitable[None]],
    ) -> None:
        await self.check_move(
            opened,
            source={"type_name": types[0]},
            target={"type_name": types[1]},
            read_cuts=read_cuts,
            write_cuts=write_cuts,
            how=how,
        )


class TestMtty(OnKernel, ReadableContract):
    """Some bytes of state, and a log of DMA that it never writes to."""

    interface = "migration-states"
    lane = "node-uvloop"
    numbers: ClassVar = {
        "running": MigrationState.RUNNING,
        "stopped": MigrationState.STOP,
        "stopped and saving": MigrationState.STOP_COPY,
        "loading": MigrationState.RESUMING,
    }

    @pytest.fixture(autouse=True)
    def devices(self, mttys: Pool[MttyDriver]) -> None:
        self.pool = mttys

    @contextmanager
    def driver(self, **changes: Any) -> Iterator[MttyDriver]:
        assert not any(value for name, value in changes.items() if name != "seed")  # there is no other kind
        with self.pool.device("2") as one:
            yield one

    def tell(self, one: MttyDriver, state: int) -> None:
        one.put_in(state)

    def break_down(self, one: MttyDriver) -> None:
        one.broken = True

    @pytest.mark.parametrize("how", [write, put])
    async def test_everything_moves(self, opened: Opener, how: Callable[..., Awaitable[None]]) -> None:
        await self.check_move(opened, how=how, read_cuts=(7,), write_cuts=(5,))
