"""What every device that can move must do. A test module subclasses :class:`DeviceContract`, or those of its subclasses
that have more to ask of a device, and says which interface the driver speaks and how the device is reached.

What the tests see of a device past the one who moves it, and do to it, is a :class:`Driver`: a reference device in
this process, whose settings and faults they choose, or one of the kernel's (``tests/kernel/kernel_drivers.py``). What
tells the interfaces apart is in :class:`DeviceContract`'s attributes and in what a device says of itself; nothing here
names a state.
"""

from __future__ import annotations

import errno
import inspect
import itertools
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.between import STRIKES, Between, Striking, T
from vfiostream._accel import bitmap_runs
from vfiostream.access import vfio_user
from vfiostream.access.contract import Access
from vfiostream.devices.contract import Device
from vfiostream.devices.finding import find
from vfiostream.devices.four_region import Order
from vfiostream.errors import (
    DeviceBroken,
    DeviceError,
    DeviceRefused,
    DeviceTimeout,
    Incompatible,
    LocalProtocolError,
    VfiostreamError,
)
from vfiostream.uapi.four_region import State as FourRegionState
from vfiostream.uapi.vfio import MigrationState, RegionState
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.faults import Broken, FaultPlan
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.server import Server
from vfiostream.vendor.settings import Fault, Interface, Operation, Settings

PAGE = 4096
IOVA = 0x1_0000_0000
PCI_CONFIG = 7

SMALL: dict[str, Any] = {
    "memory": 48 * PAGE,
    "config": 3000,
    "memory_region": 8 * PAGE,
    "config_region": 2 * PAGE,
    "bitmap_region": PAGE,
    "data": "random",
}


class About(Protocol):
    """What a driver is."""

    @property
    def interface(self) -> Interface: ...

    @property
    def memory(self) -> int:
        """Bytes of device memory."""


class Workload(Protocol):
    """What a device does of itself."""

    def write(self, count: int) -> None:
        """Write ``count`` pages of device memory and as many of guest memory, where there is some, now."""


class Driver(Protocol):
    """A device as the tests see it, whether somebody has it open or not."""

    @property
    def settings(self) -> About: ...

    @property
    def workload(self) -> Workload: ...

    @property
    def state(self) -> int:
        """The device state, in the numbers of its interface."""

    def digest(self) -> bytes:
        """Of all that is to be moved, as it is now."""

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write to a region, as the guest does."""

    def reset(self) -> None:
        """Make it new."""


class Opener(Protocol):
    """Opens a device over a driver, closes it at the end; ``between`` may put something before the access. Each knows
    one kind of driver.
    """

    def __call__(self, one: Any, between: Callable[[Access], Access] = ...) -> AbstractAsyncContextManager[Device]: ...


@contextmanager
def driver(**changes: Any) -> Iterator[ReferenceDevice]:
    """A small reference device with these ``changes`` to its settings."""
    with closing(ReferenceDevice(Settings(**{**SMALL, **changes}))) as device:
        yield device


@contextmanager
def drivers(source: dict[str, Any], target: dict[str, Any]) -> Iterator[tuple[ReferenceDevice, ReferenceDevice]]:
    """Two that differ in all of their memory."""
    with driver(**source, seed=1) as one, driver(**target, seed=2) as other:
        yield one, other


@contextmanager
def served(device: ReferenceDevice) -> Iterator[str]:
    """The path of a vfio-user server for ``device``."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "device.sock")
        server = Server(device, path)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield path
        finally:
            server.close()
            thread.join()


def as_it_is(access: Access) -> Access:
    return access


def in_process(order: Order = "session") -> Opener:
    """Opens a device in this process."""

    @asynccontextmanager
    async def opened(one: ReferenceDevice, between: Callable[[Access], Access] = as_it_is) -> AsyncIterator[Device]:
        async with await find(between(InProcessAccess(one)), order=order) as device:
            yield device

    return opened


def over_vfio_user(order: Order = "session") -> Opener:
    """Opens a device over a socket."""

    @asynccontextmanager
    async def opened(one: ReferenceDevice, between: Callable[[Access], Access] = as_it_is) -> AsyncIterator[Device]:
        with served(one) as path:
            async with await find(between(await vfio_user.connect(path)), order=order) as device:
                yield device

    return opened


def state(device: Driver) -> int:
    """The device state, in the numbers of its interface."""
    return device.state


def runs(device: Driver) -> bool:
    match device.settings.interface:
        case "four-region":
            return FourRegionState(state(device)).running
        case "migration-region":
            return bool(RegionState(state(device)) & RegionState.RUNNING)
    return state(device) in (
        MigrationState.RUNNING,
        MigrationState.RUNNING_P2P,
        MigrationState.PRE_COPY,
        MigrationState.PRE_COPY_P2P,
    )


def runs_free(device: Driver) -> bool:
    """Whether it runs, and is in no session."""
    free: dict[Interface, int] = {
        "four-region": FourRegionState.RUNNING,
        "migration-region": RegionState.RUNNING,
        "migration-states": MigrationState.RUNNING,
    }
    return state(device) == free[device.settings.interface]


@contextmanager
def guest_memory(pages: int) -> Iterator[int]:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, pages * PAGE)
        yield fd
    finally:
        os.close(fd)


def written_pages(fd: int, pages: int) -> set[int]:
    """Which of them have something in them."""
    found = set()
    position = 0
    while position < pages * PAGE:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # there is none from here on
        if any(os.pread(fd, 64, position)):
            found.add(position // PAGE)
        position += PAGE
    return found


@dataclass
class Saved:
    """All that a source gave."""

    captures: list[tuple[int | None, bytes]] = field(default_factory=list)
    """The size that was told, and the bytes."""
    config: bytes = b""
    pci: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes of all captures."""
        return sum(len(content) for _, content in self.captures)


async def drain(device: Device, size: int | None, cuts: Iterable[int] = (5 * PAGE,)) -> bytes:
    """Read what was captured to its end, in pieces of the sizes in ``cuts``, over and over."""
    content = bytearray()
    for cut in itertools.cycle(cuts):
        piece = await device.next(cut)
        if piece is None:
            views = [memoryview(bytearray(cut)) for _ in range(3)]
            count = await device.read(views)
            assert count <= 3 * cut
            piece = memoryview(b"".join(views))[:count]
        else:
            assert len(piece) <= cut
        with piece:
            if not piece:
                assert size is None or len(content) == size
                assert not await device.next(cut)
                assert not await device.read([memoryview(bytearray(cut))])
                return bytes(content)
            content += piece
    raise AssertionError("no cuts")


async def take_round(device: Device, cuts: Iterable[int] = (5 * PAGE,)) -> list[tuple[int | None, bytes]]:
    """All captures of one round."""
    captures = []
    await device.begin_round()
    while (size := await device.capture()) != 0:
        captures.append((size, await drain(device, size, cuts)))
    return captures


async def halt(device: Device) -> None:
    await device.quiesce()
    await device.stop()


async def save(source: Device, device: Driver, *, rounds: int = 3, cuts: Iterable[int] = (5 * PAGE,)) -> Saved:
    """All from the start to the stop; the device writes between the rounds."""
    saved = Saved()

    async def one_round() -> None:
        if source.description.device_memory:
            saved.captures += await take_round(source, cuts)

    await source.start_precopy()
    for _ in range(rounds):
        await one_round()
        device.workload.write(7)
    await halt(source)
    await one_round()
    saved.pci = await source.read_pci_config()
    saved.config = await drain(source, await source.capture_config(), cuts)
    return saved


async def write(target: Device, content: bytes, cuts: Iterable[int]) -> None:
    position = 0
    for cut in itertools.cycle(cuts):
        if position == len(content):
            return
        await target.write(content[position : position + cut])
        position = min(len(content), position + cut)


async def put(target: Device, content: bytes, cuts: Iterable[int]) -> None:
    """As :func:`write`, in place where the device has a place."""
    rest = memoryview(content)
    for cut in itertools.cycle(cuts):
        if not rest:
            return
        with target.room(min(cut, len(rest))) as room:
            count = len(room)
            if count:
                room[:] = rest[:count]
        if not count:
            count = min(cut, len(rest), PAGE)
            await target.write(rest[:count])
        elif target.fill(count):
            await target.deliver()
        rest = rest[count:]


async def load(
    target: Device,
    saved: Saved,
    *,
    cuts: Iterable[int] = (5 * PAGE,),
    how: Callable[[Device, bytes, Iterable[int]], Awaitable[None]] = write,
) -> None:
    await target.start_load()
    for size, content in saved.captures:
        await target.begin_capture(size)
        await how(target, content, cuts)
    if saved.pci is not None:
        await target.load_pci_config(saved.pci)
    if saved.config:
        await target.begin_config(len(saved.config))
        await how(target, saved.config, cuts)
    await target.finish_load()


async def start(target: Device) -> None:
    await target.quiesce()
    await target.run()


@pytest.mark.anyio
class DeviceContract:
    """What every device must do, however small. Subclasses say what they vary."""

    interface: ClassVar[Interface]
    fixed: dict[str, Any] = {}  # noqa: RUF012 - subclasses replace it
    """Settings of every driver, beside what a test asks for."""

    @pytest.fixture
    def opened(self) -> Opener:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    async def guard(self) -> AsyncIterator[None]:
        """Nothing here takes long: a test that hangs fails."""
        with anyio.fail_after(60):
            yield

    def driver(self, **changes: Any) -> AbstractContextManager[Driver]:
        """A driver with these ``changes`` to its settings, as far as the class may ask for any."""
        return driver(**{"interface": self.interface, **self.fixed, **changes})

    def drivers(self, source: dict[str, Any], target: dict[str, Any]) -> AbstractContextManager[tuple[Driver, Driver]]:
        """Two whose content differs."""
        both = {"interface": self.interface, **self.fixed}
        return drivers({**both, **source}, {**both, **target})

    def break_down(self, one: Any) -> None:
        """Let the driver fail for good, where it has a state for that."""

    @property
    def gives_early(self) -> bool:
        """Whether it gives state before it is stopped."""
        return "pre-copy" in self.fixed.get("states", ("pre-copy",))

    async def check_move(
        self,
        opened: Opener,
        *,
        source: dict[str, Any] | None = None,
        target: dict[str, Any] | None = None,
        read_cuts: Iterable[int] = (5 * PAGE,),
        write_cuts: Iterable[int] = (5 * PAGE,),
        how: Callable[[Device, bytes, Iterable[int]], Awaitable[None]] = write,
    ) -> None:
        """Move a device, and compare."""
        with self.drivers(source or {}, target or {}) as (one, other):
            async with opened(one) as from_, opened(other) as to:
                assert one.digest() != other.digest()
                saved = await save(from_, one, cuts=read_cuts)
                await load(to, saved, cuts=write_cuts, how=how)
                assert (runs(one), runs(other)) == (False, False)
                await start(to)
                assert one.digest() == other.digest()
                await from_.release()
                assert (runs(one), runs_free(other)) == (False, True)

    async def check_unharmed(self, opened: Opener, one: Driver) -> None:
        """The driver runs, is not in a session, and can be moved from the start."""
        assert runs_free(one)
        with self.driver(seed=3, memory=one.settings.memory) as other:
            async with opened(one) as source, opened(other) as target:
                one.workload.write(5)
                await load(target, await save(source, one))
                await start(target)
                assert one.digest() == other.digest()

    # ---- moving

    async def test_a_session_starts_with_the_whole_whatever_was_before(self, opened: Opener) -> None:
        with self.driver() as one:
            async with opened(one) as killed:
                await killed.start_precopy()
                await take_round(killed)
            async with opened(one) as source:
                assert Saved((await save(source, one)).captures).size >= one.settings.memory
                await source.resume()
            await self.check_unharmed(opened, one)

    # ---- dirty pages

    @pytest.mark.parametrize("length", [0, 1, 3])
    async def test_a_bitmap_of_another_size_is_refused(self, opened: Opener, length: int) -> None:
        with self.driver() as one:
            async with opened(one) as source:
                await source.start_precopy()
                await take_round(source)
                with pytest.raises(LocalProtocolError, match="12 pages"):
                    await source.merge_dirty(IOVA, 12, memoryview(bytearray(length)))
                await source.resume()

    # ---- PCI

    # ---- the end that is not the happy one

    @pytest.mark.parametrize(
        "where", ["idle", "tracking", "capturing", "reading", "quiet", "stopped", "config", "released", "waking"]
    )
    async def test_resume_ends_a_session_from_everywhere(self, opened: Opener, where: str) -> None:
        with self.driver() as one:
            async with opened(one) as source:
                before = one.digest()
                steps: list[tuple[str, Callable[[], Awaitable[object]]]] = [
                    ("idle", lambda: anyio.lowlevel.checkpoint()),
                    ("tracking", source.start_precopy),
                    ("", source.begin_round),
                    ("capturing", source.capture),
                    ("reading", lambda: read_some(source)),
                    ("", lambda: read_all(source)),
                    ("quiet", source.quiesce),
                    ("stopped", source.stop),
                    ("config", source.capture_config),
                    ("released", source.release),
                    ("waking", source.quiesce),
                ]
                for name, step in steps:
                    await step()
                    if name == where:
                        break
                await source.resume()
                assert runs_free(one)
                await source.resume()  # and again
                assert one.digest() == before
            await self.check_unharmed(opened, one)

    async def test_a_stopped_device_runs_when_told_to(self, opened: Opener) -> None:
        with self.driver() as one:
            async with opened(one) as killed:
                await save(killed, one)
            assert not runs(one)
            async with opened(one) as device:
                await device.resume()
            await self.check_unharmed(opened, one)

    async def test_what_a_killed_client_left_behind_of_a_session_is_ended(self, opened: Opener) -> None:
        with self.driver() as one:
            async with opened(one) as killed:
                await killed.start_precopy()
                await take_round(killed)
                await killed.quiesce()
            assert runs(one)
            async with opened(one) as device:
                await device.resume()
            await self.check_unharmed(opened, one)

    async def test_an_abandoned_target_stays_stopped_and_can_start_over(self, opened: Opener) -> None:
        with self.drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            async with opened(other) as target:
                await target.start_load()
                size, content = saved.captures[0]
                await target.begin_capture(size)
                await target.write(content[: len(content) // 2])
                await target.abandon()
                assert not runs(other)
                await target.abandon()
                with pytest.raises(LocalProtocolError):
                    await target.run()
                assert not runs(other)
            async with opened(other) as target:
                await load(target, saved)
                await start(target)
            assert (runs_free(other), other.digest()) == (True, one.digest())

    async def test_several_targets_are_abandoned_wherever_they_are(self, opened: Opener) -> None:
        with self.drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            for steps in (["run"], ["quiesce"], ["quiesce", "run"], []):
                async with opened(other) as target:
                    await load(target, saved)
                    for step in steps:
                        await getattr(target, step)()
                    await target.abandon()
                    assert not runs(other)
            with self.driver() as third:
                async with opened(third) as idle:
                    await idle.abandon()
                    assert not runs(third)

    # ---- whatever goes wrong

    @pytest.mark.parametrize("how", STRIKES)
    async def test_a_source_survives_whatever_goes_wrong(self, opened: Opener, how: str) -> None:
        with self.driver() as one, guest_memory(10) as fd:
            for n in range(1, 1000):
                access: Striking | None = None

                def between(real: Access) -> Access:
                    nonlocal access
                    access = Striking(real)
                    return access

                before = None
                async with opened(one, between) as source:
                    assert access is not None
                    await source.dma_map(IOVA, 10 * PAGE, fd, 0)
                    access.strike({n: how})
                    error: BaseException | None = None
                    with anyio.CancelScope() as access.scope:
                        try:
                            await save(source, one, rounds=1)
                            await source.merge_dirty(IOVA, 10, memoryview(bytearray(2)))
                        except DeviceError as caught:
                            error = caught
                    before = one.digest()
                    access.plan.clear()
                    if error is not None:
                        assert source.name in str(error)
                    await source.resume()
                    assert (runs_free(one), one.digest()) == (True, before)
                    if not access.struck:
                        break
            else:
                raise AssertionError("it never came to its end")
            assert n > 4
            await self.check_unharmed(opened, one)

    @pytest.mark.parametrize("how", STRIKES)
    async def test_after_a_failure_a_source_can_only_be_ended(self, opened: Opener, how: str) -> None:
        with self.driver() as one:
            access: Striking | None = None

            def between(real: Access) -> Access:
                nonlocal access
                access = Striking(real)
                return access

            async with opened(one, between) as source:
                assert access is not None
                await source.start_precopy()
                await take_round(source)
                await source.quiesce()
                access.strike({1: how})
                with anyio.CancelScope() as access.scope:
                    with suppress(DeviceError):
                        await source.stop()
                for call in (source.start_precopy, source.begin_round, source.capture, source.stop, source.pending):
                    with pytest.raises(LocalProtocolError):
                        await call()
                await source.quiesce()
                await source.resume()
            await self.check_unharmed(opened, one)

    @pytest.mark.parametrize("how", STRIKES)
    async def test_a_target_never_runs_after_anything_went_wrong(self, opened: Opener, how: str) -> None:
        with self.drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one, rounds=1)
            for n in range(1, 1000):
                access: Striking | None = None

                def between(real: Access) -> Access:
                    nonlocal access
                    access = Striking(real)
                    return access

                async with opened(other, between) as target:
                    assert access is not None
                    access.strike({n: how})
                    error: BaseException | None = None
                    with anyio.CancelScope() as access.scope:
                        try:
                            await load(target, saved)
                            await start(target)
                        except DeviceError as caught:
                            error = caught
                    access.plan.clear()
                    if not access.struck:
                        break
                    assert error is None or target.name in str(error)
                    for call in (target.finish_load, target.run, lambda: target.write(b"data")):
                        with pytest.raises(LocalProtocolError):
                            await call()
                    await target.abandon()
                    assert not runs(other)
            else:
                raise AssertionError("it never came to its end")
            assert n > 4
            assert (runs_free(other), other.digest()) == (True, one.digest())

    @pytest.mark.parametrize("how", STRIKES)
    @pytest.mark.parametrize("call", ["resume", "release", "quiesce", "abandon"])
    async def test_what_ends_a_session_can_be_done_again(self, opened: Opener, call: str, how: str) -> None:
        for n in range(1, 100):
            with self.driver() as one, guest_memory(10) as fd:
                access: Striking | None = None

                def between(real: Access) -> Access:
                    nonlocal access
                    access = Striking(real)
                    return access

                async with opened(one, between) as device:
                    assert access is not None
                    await device.dma_map(IOVA, 10 * PAGE, fd, 0)
                    if call == "abandon":
                        await device.start_load()
                    else:
                        await save(device, one)
                    access.strike({n: how})
                    error: BaseException | None = None
                    with anyio.CancelScope() as access.scope:
                        try:
                            await getattr(device, call)()
                        except DeviceError as caught:
                            error = caught
                    assert error is None or device.name in str(error)
                    access.plan.clear()
                    struck = bool(access.struck)
                    if call == "quiesce":
                        await device.resume()
                    elif error is not None or access.scope.cancelled_caught:
                        await getattr(device, call)()
                    assert runs(one) == (call in ("resume", "quiesce"))
                if call != "abandon":
                    async with opened(one) as device:
                        await device.resume()
                    await self.check_unharmed(opened, one)
                if not struck:
                    return
        raise AssertionError("it never came to its end")

    @settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        plans=st.tuples(*[st.dictionaries(st.integers(1, 40), st.sampled_from([*STRIKES, "broken"]), max_size=3)] * 2),
        choices=st.lists(st.integers(0, 20), max_size=20),
    )
    async def test_whatever_happens_they_never_both_run(
        self, opened: Opener, plans: Sequence[dict[int, str]], choices: list[int]
    ) -> None:
        with self.drivers({}, {}) as (one, other), guest_memory(10) as fd:
            ends: list[Striking] = []

            def between(real: Access) -> Access:
                ends.append(Striking(real))
                return ends[-1]

            async with opened(one, between) as source, opened(other, between) as target:
                await source.dma_map(IOVA, 10 * PAGE, fd, 0)
                for access, plan, device in zip(ends, plans, (one, other), strict=True):
                    access.strike(plan)
                    access.break_down = partial(self.break_down, device)
                await Exploration(choices, one, other, source, target, ends).go()

    # ---- order of calls

    @pytest.mark.parametrize("call", ["begin_round", "capture"])
    async def test_a_capture_is_read_to_its_end_before_the_next(self, opened: Opener, call: str) -> None:
        with self.driver() as one:
            async with opened(one) as source:
                await source.start_precopy()
                if not self.gives_early:
                    await halt(source)
                await source.begin_round()
                assert await source.capture() != 0
                await read_some(source)
                with pytest.raises(LocalProtocolError, match="end"):
                    await getattr(source, call)()
                await source.resume()
                assert runs_free(one)

    # ---- closing

    async def test_it_can_be_closed_at_any_time(self, opened: Opener) -> None:
        with self.driver() as one:
            async with opened(one) as source:
                await source.start_precopy()
                await source.begin_round()
                await source.capture()
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await source.aclose()
                await source.aclose()
                for call in (source.capture, source.resume, source.read_pci_config, source.abandon):
                    with pytest.raises(VfiostreamError):
                        await call()
            assert runs(one)  # as it was left


class MemoryContract(DeviceContract):
    """What is to be added where a device has memory of its own, writes guest memory and tells which, has the PCI config
    space that we expect, and outlives a client that is killed in the midst of a load.
    """

    @pytest.mark.parametrize("how", [write, put])
    @pytest.mark.parametrize("mmap", ["whole", "sparse", "none"])
    async def test_everything_moves(self, opened: Opener, mmap: str, how: Callable[..., Awaitable[None]]) -> None:
        await self.check_move(opened, source={"mmap": mmap}, target={"mmap": mmap}, how=how)

    async def test_a_device_without_memory_moves(self, opened: Opener) -> None:
        await self.check_move(opened, source={"memory": 0}, target={"memory": 0})

    async def test_it_gives_the_whole_and_then_what_changed(self, opened: Opener) -> None:
        with self.driver() as one:
            async with opened(one) as source:
                await source.start_precopy()
                rounds = [Saved(await take_round(source)).size for _ in range(3)]
                assert (rounds[0] >= one.settings.memory) == self.gives_early
                assert rounds[0] == max(rounds)
                assert rounds[2] == 0  # by the second, also what a driver told too little of has come
                one.workload.write(2)
                rounds += [Saved(await take_round(source)).size for _ in range(2)]
                await halt(source)
                rest = Saved(await take_round(source)).size
                assert Saved(await take_round(source)).size == 0
                changed = sum(rounds[3:]) + rest
                if self.gives_early:
                    assert 2 * PAGE <= changed < one.settings.memory // 4
                    assert sum(rounds[3:]) >= 2 * PAGE
                else:
                    assert sum(rounds) == 0
                    assert changed >= one.settings.memory
                await source.resume()

    async def test_a_round_ends_though_the_device_changes_all_the_time(self, opened: Opener) -> None:
        with self.driver() as one:
            async with opened(one) as source:
                await source.start_precopy()
                for _ in range(3):
                    size = 0
                    await source.begin_round()
                    while (told := await source.capture()) != 0:
                        one.workload.write(40)
                        size += len(await drain(source, told))
                        assert size <= 4 * one.settings.memory
                await source.resume()

    async def test_it_describes_itself(self, opened: Opener) -> None:
        with self.driver() as one:
            async with opened(one) as device:
                about = device.description
                assert about.interface == self.interface
                assert (about.device_memory, about.dirty_tracking) == (True, True)
                assert about.config_size <= about.config_limit
                assert about.pci is not None
                assert about.pci.class_code == 0x120000
                assert runs_free(one)

    async def test_what_is_pending(self, opened: Opener) -> None:
        with self.driver() as one:
            async with opened(one) as source:
                await source.start_precopy()
                whole = await source.pending()
                if whole is not None:
                    assert whole.initial + whole.rest >= one.settings.memory
                    for _ in range(3):
                        await take_round(source)
                    left = await source.pending()
                    assert left is not None
                    assert (left.initial + left.rest < one.settings.memory // 2) == self.gives_early
                await source.resume()

    @pytest.mark.parametrize("mmap", ["whole", "sparse", "none"])
    @pytest.mark.parametrize("pages", [1, 12, 2500, 5 * 8 * PAGE + 3])
    async def test_dirty_pages_are_the_written_ones(self, opened: Opener, pages: int, mmap: str) -> None:
        with self.driver(mmap=mmap) as one, guest_memory(pages) as fd:
            async with opened(one) as source:
                await source.dma_map(IOVA, pages * PAGE, fd, 0)
                await source.start_precopy()
                await take_round(source)
                one.workload.write(300)
                bitmap = bytearray((pages + 7) // 8)
                await source.merge_dirty(IOVA, pages, memoryview(bitmap))
                written = written_pages(fd, pages)
                assert written
                assert set_bits(bitmap) == written

                again = bytearray(len(bitmap))
                await source.merge_dirty(IOVA, pages, memoryview(again))
                assert not any(again)  # asking clears
                await halt(source)
                await source.merge_dirty(IOVA, pages, memoryview(again))
                assert not any(again)
                await source.resume()

    async def test_dirty_pages_are_added_to_what_is_there(self, opened: Opener) -> None:
        with self.driver() as one, guest_memory(100) as fd:
            async with opened(one) as source:
                await source.dma_map(IOVA, 100 * PAGE, fd, 0)
                await source.start_precopy()
                await take_round(source)
                one.workload.write(10)
                around = bytearray(b"\x81" * 13)
                await source.merge_dirty(IOVA + 40 * PAGE, 20, memoryview(around)[5:8])
                expected = {page for page in range(40, 60) if any(os.pread(fd, 64, page * PAGE))}
                found = set_bits(around[5:8])
                assert found == {page - 40 for page in expected} | {0, 7, 8, 15, 16, 23}
                assert around[:5] + around[8:] == b"\x81" * 10

    async def test_what_was_dirty_before_a_session_is_not_reported_in_it(self, opened: Opener) -> None:
        with self.driver() as one, guest_memory(10) as fd:
            async with opened(one) as source:
                await source.dma_map(IOVA, 10 * PAGE, fd, 0)
                for _ in range(2):
                    one.workload.write(100)
                    await source.start_precopy()
                    await take_round(source)
                    bitmap = bytearray(2)
                    await source.merge_dirty(IOVA, 10, memoryview(bitmap))
                    assert not any(bitmap)
                    one.workload.write(100)
                    await source.resume()

    async def test_without_tracking_there_is_nothing_to_merge(self, opened: Opener) -> None:
        with self.driver(dirty_tracking=False) as one:
            async with opened(one) as source:
                assert not source.description.dirty_tracking
                await source.start_precopy()
                await take_round(source)
                with pytest.raises(LocalProtocolError):
                    await source.merge_dirty(IOVA, 8, memoryview(bytearray(1)))
                await source.resume()
            await self.check_unharmed(opened, one)

    async def test_without_tracking_guest_memory_is_not_written(self, opened: Opener) -> None:
        with self.driver(dirty_tracking=False) as one, guest_memory(10) as fd:
            async with opened(one) as source:
                await source.dma_map(IOVA, 10 * PAGE, fd, 0)
                one.workload.write(10)
                assert not any(os.pread(fd, 10 * PAGE, 0))

    async def test_what_the_guest_set_in_pci_config_space_moves(self, opened: Opener) -> None:
        with self.drivers({}, {}) as (one, other):
            for offset, data in ((0x04, b"\x06\x04"), (0x0C, b"\x10"), (0x3C, b"\x0b"), (0x10, b"\x00\x00\xb0\xfe")):
                one.write(PCI_CONFIG, offset, data)
            one.write(PCI_CONFIG, 0x54, bytes.fromhex("0010e0fe 01000000 4142"))
            one.write(PCI_CONFIG, 0x52, b"\x81\x01")
            async with opened(one) as source, opened(other) as target:
                theirs = await source.read_pci_config()
                assert theirs is not None
                await target.start_load()
                await target.load_pci_config(theirs)
                ours = await target.read_pci_config()
                assert ours is not None
                assert {at for at in range(256) if ours[at] != theirs[at]} == {0x12, 0x13}  # the BAR is the target's
                await target.abandon()

    async def test_pci_config_space_of_another_device_is_refused(self, opened: Opener) -> None:
        with self.driver() as other:
            async with opened(other) as target:
                await target.start_load()
                with pytest.raises(Incompatible):
                    await target.load_pci_config(bytes(256))
                await target.abandon()

    async def test_a_load_that_a_killed_client_left_behind_is_begun_anew(self, opened: Opener) -> None:
        with self.drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            async with opened(other) as killed:
                await killed.start_load()
                size, content = saved.captures[0]
                await killed.begin_capture(size)
                await killed.write(content[: len(content) // 2])
            async with opened(other) as target:
                await load(target, saved)
                await start(target)
            assert (runs_free(other), other.digest()) == (True, one.digest())

    async def test_a_memory_too_large_is_refused_before_it_runs(self, opened: Opener) -> None:
        with self.driver(memory=100 * PAGE) as one, self.driver() as other:
            async with opened(one) as source, opened(other) as target:
                saved = await save(source, one)
                with pytest.raises(DeviceRefused):
                    await load(target, saved)
                    await start(target)
                await target.abandon()
                await source.resume()
            assert not runs(other)


class SettingsContract(MemoryContract):
    """What is to be added where a driver is of this process: it has whatever settings a test asks for, and is quickly
    opened some hundred times to see what is our own doing alone.
    """

    @pytest.mark.parametrize(
        ("here", "there"),
        [(PAGE, 16 * PAGE), (16 * PAGE, PAGE), (3 * PAGE, 7 * PAGE), (64 * PAGE, 64 * PAGE), (64 * PAGE, 2 * PAGE)],
    )
    async def test_the_regions_of_both_ends_may_differ(self, opened: Opener, here: int, there: int) -> None:
        await self.check_move(
            opened,
            source={"memory_region": here, "config_region": 3 * PAGE, "mmap": "sparse"},
            target={"memory_region": there, "config_region": PAGE},
        )

    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        read_cuts=st.lists(st.integers(300, 20 * PAGE), min_size=1, max_size=6),
        write_cuts=st.lists(st.integers(300, 20 * PAGE), min_size=1, max_size=6),
        regions=st.tuples(st.integers(1, 12), st.integers(1, 12)),
        mmap=st.sampled_from(["whole", "sparse", "none"]),
        how=st.sampled_from([write, put]),
    )
    async def test_any_cutting_will_do(
        self,
        opened: Opener,
        read_cuts: list[int],
        write_cuts: list[int],
        regions: tuple[int, int],
        mmap: str,
        how: Callable[..., Awaitable[None]],
    ) -> None:
        await self.check_move(
            opened,
            source={"memory_region": regions[0] * PAGE, "mmap": mmap},
            target={"memory_region": regions[1] * PAGE, "mmap": mmap},
            read_cuts=read_cuts,
            write_cuts=write_cuts,
            how=how,
        )

    @pytest.mark.parametrize(
        ("before", "in_order"),
        [
            ([], {"start_precopy", "resume", "start_load", "abandon"}),
            (["start_precopy"], {"begin_round", "capture", "next", "read", "pending", "quiesce", "resume"}),
            (["start_precopy", "quiesce"], {"quiesce", "stop", "resume"}),
            (
                ["start_precopy", "halt"],
                {"begin_round", "capture", "next", "read", "merge_dirty", "capture_config", "release", "quiesce"}
                | {"resume"},
            ),
            (["start_precopy", "halt", "release"], {"quiesce", "resume"}),
            (["start_precopy", "halt", "quiesce"], {"quiesce", "resume"}),
            (["start_precopy", "halt", "resume"], {"start_precopy", "resume", "start_load", "abandon"}),
            (["start_load"], {"begin_capture", "begin_config", "load_pci_config", "finish_load", "room", "abandon"}),
            (["load"], {"quiesce", "run", "abandon"}),
            (["load", "quiesce"], {"run", "abandon"}),
            (["load", "run"], {"abandon"}),
            (["start_load", "abandon"], {"abandon"}),
        ],
    )
    async def test_calls_out_of_order_are_refused_and_do_nothing(
        self, opened: Opener, before: list[str], in_order: set[str]
    ) -> None:
        arguments: dict[str, tuple[Any, ...]] = {
            "next": (10,),
            "read": ([memoryview(bytearray(10))],),
            "merge_dirty": (IOVA, 0, memoryview(b"")),
            "begin_capture": (0,),
            "begin_config": (10,),
            "write": (b"data",),
            "room": (10,),
            "fill": (10,),
        }
        source = ("start_precopy", "begin_round", "capture", "pending", "quiesce", "stop", "capture_config", "release")
        target = ("resume", "start_load", "deliver", "finish_load", "run", "abandon")
        with self.driver(seed=7) as model, self.driver() as one:
            async with opened(model) as device:
                saved = await save(device, model, rounds=0)
            for name in (*source, *target, *arguments, "load_pci_config"):
                if name == "merge_dirty" and before == ["start_precopy"]:
                    continue  # from when on it is in order is the device's choice
                one.reset()
                async with opened(one) as device:
                    if name == "load_pci_config":
                        arguments[name] = (await device.read_pci_config(),)
                    for earlier in before:
                        if earlier == "load":
                            await load(device, saved)
                        elif earlier == "halt":
                            await halt(device)
                        else:
                            await getattr(device, earlier)(*arguments.get(earlier, ()))
                    as_it_was = state(one), one.digest()
                    try:
                        await called(device, name, *arguments.get(name, ()))
                    except LocalProtocolError:
                        assert name not in in_order
                        assert (state(one), one.digest()) == as_it_was
                    except VfiostreamError:
                        assert name in in_order  # what it was asked for it can't do, or has not got
                    else:
                        assert name in in_order


class SizedContract(DeviceContract):
    """What is to be added where captures have a size, and a place in memory that they go through."""

    async def test_a_capture_is_written_to_its_end_before_the_next(self, opened: Opener) -> None:
        with self.drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            size, content = saved.captures[0]
            for call in ("begin_capture", "finish_load"):
                async with opened(other) as target:
                    await target.start_load()
                    await target.begin_capture(size)
                    await target.write(content[:-1])
                    with pytest.raises(LocalProtocolError, match="end"):
                        await getattr(target, call)(*([] if call == "finish_load" else [100]))
                    await target.abandon()

    async def test_more_than_announced_is_refused(self, opened: Opener) -> None:
        with self.drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            size, content = saved.captures[0]
            before = other.digest()
            async with opened(other) as target:
                await target.start_load()
                await target.begin_capture(size)
                assert len(target.room(1 << 40)) <= len(content)
                with pytest.raises(LocalProtocolError, match="announced"):
                    target.fill(len(content) + 1)
                assert other.digest() == before
                with pytest.raises(LocalProtocolError, match="announced"):
                    await target.write(content + b"!")
                await target.abandon()

    async def test_a_capture_without_a_size_is_refused(self, opened: Opener) -> None:
        with self.driver() as other:
            async with opened(other) as target:
                await target.start_load()
                with pytest.raises(Incompatible, match="same kind"):
                    await target.begin_capture(None)
                await target.abandon()

    async def test_what_lies_in_the_room_is_nothing_before_it_is_filled_and_delivered(self, opened: Opener) -> None:
        with self.drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one, rounds=0)
            before = other.digest()
            async with opened(other) as target:
                await target.start_load()
                size, content = saved.captures[0]
                await target.begin_capture(size)
                delivered = False
                while room := target.room(len(content)):
                    count = len(room)
                    room[:] = b"\xff" * count
                    assert len(target.room(len(content))) == count  # the same place, until it is filled
                    room[:] = content[:count]
                    room.release()
                    assert delivered or other.digest() == before
                    if target.fill(count):
                        with pytest.raises(LocalProtocolError):
                            target.room(1)
                        await target.deliver()
                        delivered = True
                    content = content[count:]
                assert not content
                await target.abandon()

    async def test_a_place_that_waits_to_be_delivered_may_be_abandoned(self, opened: Opener) -> None:
        with self.drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one, rounds=0)
            before = other.digest()
            async with opened(other) as target:
                await target.start_load()
                size, whole = saved.captures[0]
                content = memoryview(whole)
                await target.begin_capture(size)
                while True:
                    with target.room(len(content)) as room:
                        count = len(room)
                        room[:] = content[:count]
                    if target.fill(count):
                        break
                    content = content[count:]
                await target.abandon()
                assert (runs(other), other.digest()) == (False, before)


class Breaking(FaultPlan):
    """Nothing goes right, and the driver can't go on."""

    def strike(self, operation: Operation) -> None:
        raise Broken(errno.EIO, "a test breaks it")


class ReadableContract(DeviceContract):
    """What is to be added where the state of a device can be asked, and all of it comes in one stream."""

    numbers: ClassVar[dict[str, int]]
    """What the conditions that tests ask for are called in the interface; ``failed`` need not be there."""

    def tell(self, one: Any, state: int) -> None:
        """Put the driver in ``state``, by hand."""
        raise NotImplementedError

    def put_in(self, one: Driver, condition: str) -> None:
        """Put the driver in the state that ``condition`` names, by hand."""
        if condition == "failed":
            self.break_down(one)
        else:
            self.tell(one, self.numbers[condition])

    async def test_a_capture_is_read_to_its_end_before_the_stop(self, opened: Opener) -> None:
        if not self.gives_early:
            pytest.skip("there is nothing to be read before the stop")
        with self.driver() as one:
            async with opened(one) as source:
                await source.start_precopy()
                await source.begin_round()
                await source.capture()
                await read_some(source)
                await source.quiesce()
                with pytest.raises(LocalProtocolError, match="end"):
                    await source.stop()
                await source.resume()
            await self.check_unharmed(opened, one)

    @pytest.mark.parametrize(
        ("condition", "advice"),
        [
            (
                "stopped",
                "another may run with its state; only if none does, let it run with `vfiostream device resume`",
            ),
            ("stopped and saving", "another may run"),
            ("loading", "what it has is nobody's state"),
            ("failed", "only a reset"),
        ],
    )
    async def test_what_does_not_run_is_no_source(self, opened: Opener, condition: str, advice: str) -> None:
        with self.driver() as one:
            self.put_in(one, condition)
            before, digest = state(one), one.digest()
            async with opened(one) as source:
                for _ in range(2):
                    with pytest.raises(Incompatible, match=advice) as caught:
                        await source.start_precopy()
                    assert str(caught.value).startswith(f"{source.name} can't be moved: it ")
                    await source.resume()  # a caller does not ask what has failed
                    assert (state(one), one.digest()) == (before, digest)

    async def test_a_source_that_could_not_be_asked_is_left_alone(self, opened: Opener) -> None:
        with self.driver() as one:
            self.put_in(one, "stopped")
            access: Striking | None = None

            def between(real: Access) -> Access:
                nonlocal access
                access = Striking(real)
                return access

            for how in STRIKES:
                async with opened(one, between) as source:
                    assert access is not None
                    access.strike({1: how})
                    with anyio.CancelScope() as access.scope:
                        with suppress(DeviceError):
                            await source.start_precopy()
                    await source.resume()
                    assert not runs(one)

    @pytest.mark.parametrize("condition", ["loading", "failed"])
    async def test_what_is_no_state_is_not_let_run(self, opened: Opener, condition: str) -> None:
        with self.driver() as one:
            self.put_in(one, condition)
            before, digest = state(one), one.digest()
            async with opened(one) as source:
                for _ in range(2):
                    with pytest.raises(DeviceBroken, match="can't be let run: it "):
                        await source.resume()
            assert (state(one), one.digest()) == (before, digest)

    @pytest.mark.parametrize("condition", ["stopped", "stopped and saving", "loading", "failed", "running"])
    async def test_a_target_may_be_in_any_state(self, opened: Opener, condition: str) -> None:
        with self.drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            self.put_in(other, condition)
            async with opened(other) as target:
                await load(target, saved)
                await start(target)
                assert (runs_free(other), other.digest()) == (True, one.digest())

    @pytest.mark.parametrize("condition", ["stopped", "stopped and saving", "loading", "failed", "running"])
    async def test_a_target_is_abandoned_in_any_state(self, opened: Opener, condition: str) -> None:
        with self.driver() as other:
            self.put_in(other, condition)
            async with opened(other) as target:
                await target.abandon()
                assert not runs(other)

    async def test_a_source_that_fails_says_that_only_a_reset_helps_and_is_not_reset(self, opened: Opener) -> None:
        with self.driver() as one:
            async with opened(one) as source:
                await source.start_precopy()
                await take_round(source)
                digest = one.digest()
                self.put_in(one, "failed")
                for call in (source.quiesce, source.resume, source.resume, source.release):
                    if call == source.quiesce:
                        with suppress(DeviceBroken):  # which does nothing where there is no such state
                            await call()
                        continue
                    with pytest.raises(DeviceBroken, match="only a reset gets it out of there") as caught:
                        await call()
                    assert source.name in str(caught.value)
                assert (runs(one), one.digest()) == (False, digest)

    async def test_it_runs_before_its_log_is_stopped(self, opened: Opener) -> None:
        class Slow(Between):
            async def stop_dma_log(self) -> None:
                raise DeviceTimeout(f"{self.name}: no answer")

        with self.driver() as one, guest_memory(10) as fd:
            async with opened(one, Slow) as source:
                await source.dma_map(IOVA, 10 * PAGE, fd, 0)
                await source.start_precopy()
                with pytest.raises(DeviceTimeout, match="stop the DMA log"):
                    await source.resume()
                assert runs_free(one)

    async def test_dirty_pages_of_memory_that_was_not_mapped_can_not_be_asked_for(self, opened: Opener) -> None:
        with self.driver() as one:
            async with opened(one) as source:
                await source.start_precopy()
                with pytest.raises(LocalProtocolError, match="mapped"):
                    await source.merge_dirty(IOVA, 8, memoryview(bytearray(1)))
                await source.resume()

    async def test_there_is_no_config_apart(self, opened: Opener) -> None:
        with self.driver() as one:
            async with opened(one) as device:
                assert (device.description.config_size, device.description.config_limit) == (0, 0)
                await device.start_load()
                with pytest.raises(Incompatible, match="same kind"):
                    await device.begin_config(100)
                await device.abandon()

    @pytest.mark.parametrize("taken", [True, False])
    async def test_versions_are_the_access_s(self, opened: Opener, taken: bool) -> None:
        class Versioned(Between):
            async def version(self) -> str | None:
                return "one"

            async def accepts_version(self, version: str) -> bool:
                return taken and version == "two"

        with self.driver() as one:
            async with opened(one, Versioned) as device:
                assert device.description.version == "one"
                assert await device.accepts("two") == taken
                assert not await device.accepts("three")
            async with opened(one) as device:
                assert device.description.version is None
                assert await device.accepts("anything")


class ReadableSettingsContract(ReadableContract, SettingsContract):
    """What is to be added where both is so, and the driver fails as it is told to."""

    def break_down(self, one: Any) -> None:
        hardware = one.driver.hardware
        faults, hardware.faults = hardware.faults, Breaking([])
        other = "stopped" if state(one) != self.numbers["stopped"] else "loading"
        with pytest.raises(OSError, match="breaks it|error state|no way leads from ERROR"):
            self.tell(one, self.numbers[other])
        hardware.faults = faults
        assert not runs(one)

    async def test_damage_is_found_before_it_runs(self, opened: Opener) -> None:
        with self.drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            size, content = saved.captures[0]
            saved.captures[0] = size, content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
            async with opened(other) as target:
                with pytest.raises(DeviceRefused):
                    await load(target, saved)
                    await start(target)
                await target.abandon()
            assert not runs(other)

    async def test_a_target_that_can_not_be_stopped_is_reset(self, opened: Opener) -> None:
        """Not stopped, but certain not to have the source's state: it is then stopped as what it was at first."""
        with self.drivers({}, {}) as (one, other):
            fresh = other.digest()

            class Stubborn(Between):
                """Refuses everything until it is reset, once it runs."""

                stubborn = False

                async def called(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
                    if self.stubborn and name in ("set_migration_state", "write"):
                        raise DeviceRefused(self.name, name, errno.EIO)
                    if name == "reset":
                        self.stubborn = False
                    return await call()

            access: Stubborn | None = None

            def between(real: Access) -> Access:
                nonlocal access
                access = Stubborn(real)
                return access

            async with opened(one) as source:
                saved = await save(source, one)
            async with opened(other, between) as target:
                assert access is not None
                await load(target, saved)
                await start(target)
                access.stubborn = True
                await target.abandon()
                assert (runs(other), other.digest()) == (False, fresh)

            async with opened(other, between) as target:  # but not a device that is none of our load
                access.stubborn = True
                with suppress(DeviceRefused):
                    await target.abandon()
                assert access.stubborn

    async def test_a_log_that_does_not_start_ends_it_before_anything_moves(self, opened: Opener) -> None:
        with self.driver(faults=(Fault(Operation.START_LOG, 1, errno.ENOMEM),)) as one, guest_memory(10) as fd:
            async with opened(one) as source:
                await source.dma_map(IOVA, 10 * PAGE, fd, 0)
                with pytest.raises(DeviceRefused, match="start the DMA log of 1 ranges with ENOMEM"):
                    await source.start_precopy()
                assert runs_free(one)
                await source.resume()
            await self.check_unharmed(opened, one)

    async def test_a_log_that_does_not_stop_keeps_nothing_from_running(
        self, opened: Opener, caplog: pytest.LogCaptureFixture
    ) -> None:
        with self.driver(faults=(Fault(Operation.STOP_LOG, 2, errno.EIO),)) as one, guest_memory(10) as fd:
            async with opened(one) as source:
                await source.dma_map(IOVA, 10 * PAGE, fd, 0)
                await source.start_precopy()
                await source.resume()
                assert runs_free(one)
                assert [record.message for record in caplog.records if record.levelname == "WARNING"]
                await source.start_precopy()
                one.workload.write(100)
                bitmap = bytearray(2)
                await source.merge_dirty(IOVA, 10, memoryview(bitmap))
                assert any(bitmap)


class Exploration:
    """A migration with a caller who knows the rules (``docs/switchover.md``). What it does where it has a choice is in
    ``choices``, and what goes wrong in the accesses.
    """

    def __init__(
        self,
        choices: Iterable[int],
        one: Driver,
        other: Driver,
        source: Device,
        target: Device,
        accesses: Iterable[Striking],
    ) -> None:
        self.choices = iter(choices)
        self.one, self.other = one, other
        self.source, self.target = source, target
        self.accesses = tuple(accesses)
        self.committed = False

    def choose(self, count: int) -> int:
        """0 to ``count`` - 1."""
        return next(self.choices, 0) % count

    async def go(self) -> None:
        if await self.tried(self.move):
            assert self.one.digest() == self.other.digest()
            await self.try_often(self.source.release)
            assert runs_free(self.other)
            assert not runs(self.one)
            return
        stopped = await self.try_often(self.target.abandon)
        assert not (stopped and runs(self.other))
        if self.committed and not stopped:
            return  # the outcome is unknown: the source stays stopped
        digest = self.one.digest()
        if self.choose(2):
            await self.tried(self.source.quiesce)
        if await self.try_often(self.source.resume):
            # A driver that breaks is not touched where it could not be asked at first, nor looked at when it ran again.
            assert runs_free(self.one) or any(what.endswith(" broken") for what in self.accesses[0].struck)
        assert self.one.digest() == digest

    async def move(self) -> None:
        source, target = self.source, self.target
        await source.start_precopy()
        await target.start_load()
        for _ in range(self.choose(4)):
            await self.one_round()
            if self.choose(2):
                await source.pending()
            if self.choose(2):
                await source.merge_dirty(IOVA, 10, memoryview(bytearray(2)))
            self.one.workload.write(3)
        for _ in range(1 + self.choose(2)):
            await source.quiesce()
        if self.choose(10) == 9:
            raise DeviceError("the caller gives up")
        await source.stop()
        for _ in range(1 + self.choose(2)):
            await self.one_round()
        await self.move_config()
        await target.finish_load()
        if self.choose(10) == 9:
            raise DeviceError("the caller gives up")
        assert not runs(self.one)
        self.committed = True
        if self.choose(2):
            await target.quiesce()
        await target.run()

    async def one_round(self) -> None:
        await self.source.begin_round()
        while (size := await self.source.capture()) != 0:
            await self.target.begin_capture(size)
            cut = (1 + self.choose(20)) * PAGE
            await put(self.target, await drain(self.source, size, (cut,)), (cut,))

    async def move_config(self) -> None:
        pci = await self.source.read_pci_config()
        if pci is not None:
            await self.target.load_pci_config(pci)
        if size := await self.source.capture_config():
            await self.target.begin_config(size)
            await write(self.target, await drain(self.source, size), (PAGE,))

    async def tried(self, call: Callable[[], Awaitable[object]]) -> bool:
        """Whether it was done."""
        with anyio.CancelScope() as scope:
            for access in self.accesses:
                access.scope = scope
            try:
                await call()
                return True
            except (DeviceError, LocalProtocolError):
                pass
            finally:
                assert not (self.committed and runs(self.one) and runs(self.other))
        return False

    async def try_often(self, call: Callable[[], Awaitable[object]]) -> bool:
        """Whether it was done, by a caller who tries again."""
        for _ in range(8):
            if await self.tried(call):
                return True
        return False


async def read_some(device: Device) -> None:
    """Part of what is left of a capture."""
    piece = await device.next(2 * PAGE)
    if piece is None:
        await device.read([memoryview(bytearray(2 * PAGE))])


async def read_all(device: Device) -> None:
    """What is left of a capture, and of the round."""
    await drain(device, None)
    while size := await device.capture():
        await drain(device, size)


async def called(device: Device, name: str, *arguments: Any) -> None:
    """Call a method, whether it is to be awaited or not."""
    result = getattr(device, name)(*arguments)
    if inspect.isawaitable(result):
        await result


def set_bits(bitmap: bytes | bytearray) -> set[int]:
    runs = bitmap_runs(bitmap, 8 * len(bitmap))
    return {
        page
        for first, count in zip(runs[::2], runs[1::2], strict=True)
        for page in range(first, first + count)
    }  # fmt: skip
