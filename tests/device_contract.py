"""What every device that can move must do. A test module subclasses :class:`DeviceContract` and says how it is opened.

The drivers are reference devices, whose memory, state and faults the tests can see and set; how a :class:`Device` gets
at one is what subclasses vary.
"""

from __future__ import annotations

import errno
import inspect
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from vfiostream._accel import bitmap_runs
from vfiostream.devices.contract import Device
from vfiostream.errors import DeviceRefused, Incompatible, LocalProtocolError, VfiostreamError
from vfiostream.uapi.four_region import State
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.settings import Fault, Operation, Settings

PAGE = 4096
IOVA = 0x1_0000_0000
PCI_CONFIG = 7

Opener = Callable[[ReferenceDevice], AbstractAsyncContextManager[Device]]


@contextmanager
def driver(**changes: Any) -> Iterator[ReferenceDevice]:
    """A small reference device with these ``changes`` to its settings."""
    small: dict[str, Any] = {
        "memory": 48 * PAGE,
        "config": 3000,
        "memory_region": 8 * PAGE,
        "config_region": 2 * PAGE,
        "bitmap_region": PAGE,
        "data": "random",
    }
    with closing(ReferenceDevice(Settings(**{**small, **changes}))) as device:
        yield device


@contextmanager
def drivers(source: dict[str, Any], target: dict[str, Any]) -> Iterator[tuple[ReferenceDevice, ReferenceDevice]]:
    """Two that differ in all of their memory."""
    with driver(**source, seed=1) as one, driver(**target, seed=2) as other:
        yield one, other


@contextmanager
def guest_memory(pages: int) -> Iterator[int]:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, pages * PAGE)
        yield fd
    finally:
        os.close(fd)


@dataclass
class Saved:
    """All that a source gave."""

    captures: list[bytes] = field(default_factory=list)
    config: bytes = b""
    pci: bytes | None = None


async def drain(device: Device, size: int, cuts: Iterable[int] = (5 * PAGE,)) -> bytes:
    """Read what was captured, in pieces of the sizes in ``cuts``, over and over."""
    content = bytearray()
    for cut in itertools.cycle(cuts):
        with await device.next(cut) as piece:
            if not piece:
                assert len(content) == size
                return bytes(content)
            assert len(piece) <= min(cut, size - len(content))
            content += piece
    raise AssertionError("no cuts")


async def read_all(device: Device) -> bytes:
    """Read what was captured to its end, as it comes."""
    content = b""
    while piece := bytes(await device.next(5 * PAGE)):
        content += piece
    return content


async def save(source: Device, device: ReferenceDevice, *, rounds: int = 3, cuts: Iterable[int] = (5 * PAGE,)) -> Saved:
    """All from the start to the stop; the device writes between the rounds."""
    saved = Saved()

    async def one_round() -> None:
        if source.description.device_memory:
            saved.captures.append(await drain(source, await source.capture(), cuts))

    await source.start_precopy()
    for _ in range(rounds):
        await one_round()
        device.workload.write(7)
    await source.stop()
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


async def load(target: Device, saved: Saved, *, cuts: Iterable[int] = (5 * PAGE,)) -> None:
    await target.start_load()
    for capture in saved.captures:
        await target.begin_capture(len(capture))
        await write(target, capture, cuts)
    if saved.pci is not None:
        await target.load_pci_config(saved.pci)
    await target.begin_config(len(saved.config))
    await write(target, saved.config, cuts)
    await target.finish_load()


@pytest.mark.anyio
class DeviceContract:
    """Subclasses override ``opened``."""

    @pytest.fixture
    def opened(self) -> Opener:
        """Opens a device over a driver, closes it at the end."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    async def guard(self) -> AsyncIterator[None]:
        """Nothing here takes long: a test that hangs fails."""
        with anyio.fail_after(20):
            yield

    async def check_move(
        self,
        opened: Opener,
        *,
        source: dict[str, Any] | None = None,
        target: dict[str, Any] | None = None,
        read_cuts: Iterable[int] = (5 * PAGE,),
        write_cuts: Iterable[int] = (5 * PAGE,),
    ) -> None:
        """Move a device, and compare."""
        with drivers(source or {}, target or {}) as (one, other):
            async with opened(one) as from_, opened(other) as to:
                assert one.digest() != other.digest()
                saved = await save(from_, one, cuts=read_cuts)
                await load(to, saved, cuts=write_cuts)
                assert (one.state, other.state) == (State.STOP_LOGGING, State.STOP)
                assert one.digest() == other.digest()
                await to.run()
                await from_.release()
                assert (one.state, other.state) == (State.STOP, State.RUNNING)

    async def check_unharmed(self, opened: Opener, one: ReferenceDevice) -> None:
        """The driver runs, is not in a session, and can be moved from the start."""
        assert one.state is State.RUNNING
        with driver(seed=3, memory=one.settings.memory) as other:
            async with opened(one) as source, opened(other) as target:
                one.workload.write(5)
                await load(target, await save(source, one))
                assert one.digest() == other.digest()

    # ---- moving

    @pytest.mark.parametrize("layout", ["natural", "packed"])
    @pytest.mark.parametrize("mmap", ["whole", "sparse", "none"])
    async def test_everything_moves(self, opened: Opener, mmap: str, layout: str) -> None:
        await self.check_move(opened, source={"mmap": mmap, "layout": layout}, target={"mmap": mmap, "layout": layout})

    @pytest.mark.parametrize(
        ("here", "there"),
        [(PAGE, 16 * PAGE), (16 * PAGE, PAGE), (3 * PAGE, 7 * PAGE), (64 * PAGE, 64 * PAGE), (64 * PAGE, 2 * PAGE)],
    )
    async def test_the_regions_of_both_ends_may_differ(self, opened: Opener, here: int, there: int) -> None:
        await self.check_move(
            opened,
            source={"memory_region": here, "config_region": 3 * PAGE, "mmap": "sparse"},
            target={"memory_region": there, "config_region": PAGE, "layout": "packed"},
        )

    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        read_cuts=st.lists(st.integers(300, 20 * PAGE), min_size=1, max_size=6),
        write_cuts=st.lists(st.integers(300, 20 * PAGE), min_size=1, max_size=6),
        regions=st.tuples(st.integers(1, 12), st.integers(1, 12)),
        mmap=st.sampled_from(["whole", "sparse", "none"]),
    )
    async def test_any_cutting_will_do(
        self, opened: Opener, read_cuts: list[int], write_cuts: list[int], regions: tuple[int, int], mmap: str
    ) -> None:
        await self.check_move(
            opened,
            source={"memory_region": regions[0] * PAGE, "mmap": mmap},
            target={"memory_region": regions[1] * PAGE, "mmap": mmap},
            read_cuts=read_cuts,
            write_cuts=write_cuts,
        )

    async def test_a_device_without_memory_moves(self, opened: Opener) -> None:
        with drivers({"memory": 0}, {"memory": 0}) as (one, other):
            async with opened(one) as source, opened(other) as target:
                assert not source.description.device_memory
                saved = await save(source, one)
                assert saved.captures == []
                await load(target, saved)
                assert one.digest() == other.digest()
                with pytest.raises(LocalProtocolError):
                    await source.capture()

    async def test_the_first_capture_is_the_whole_and_later_ones_are_what_changed(self, opened: Opener) -> None:
        with driver() as one:
            async with opened(one) as source:
                await source.start_precopy()
                whole = await source.capture()
                assert whole >= one.settings.memory
                await drain(source, whole)
                assert await source.capture() == 0
                assert not await source.next(10)
                one.workload.write(2)
                assert 0 < await source.capture() < whole // 4

    async def test_a_session_starts_with_the_whole_whatever_was_before(self, opened: Opener) -> None:
        with driver() as one:
            async with opened(one) as killed:
                await killed.start_precopy()
                await drain(killed, await killed.capture())
            async with opened(one) as source:
                await source.start_precopy()
                assert await source.capture() >= one.settings.memory

    async def test_it_describes_itself(self, opened: Opener) -> None:
        with driver(version_string="version one") as one:
            async with opened(one) as device:
                about = device.description
                assert about.version == "version one"
                assert (about.device_memory, about.dirty_tracking) == (True, True)
                assert 3000 <= about.config_size <= about.config_limit == 2 * PAGE
                assert about.pci is not None
                assert about.pci.class_code == 0x120000
                assert one.state is State.RUNNING

    # ---- dirty pages

    @pytest.mark.parametrize("mmap", ["whole", "sparse", "none"])
    @pytest.mark.parametrize("pages", [1, 12, 2500, 5 * 8 * PAGE + 3])
    async def test_dirty_pages_are_the_written_ones(self, opened: Opener, pages: int, mmap: str) -> None:
        with driver(mmap=mmap) as one, guest_memory(pages) as fd:
            async with opened(one) as source:
                await source.dma_map(IOVA, pages * PAGE, fd, 0)
                await source.start_precopy()
                await drain(source, await source.capture())
                one.workload.write(300)
                bitmap = bytearray((pages + 7) // 8)
                await source.merge_dirty(IOVA, pages, memoryview(bitmap))
                written = {page for page in range(pages) if any(os.pread(fd, 64, page * PAGE))}
                assert written
                assert set_bits(bitmap) == written

                again = bytearray(len(bitmap))
                await source.merge_dirty(IOVA, pages, memoryview(again))
                assert not any(again)  # asking clears
                await source.stop()
                await source.merge_dirty(IOVA, pages, memoryview(again))
                assert not any(again)

    async def test_dirty_pages_are_added_to_what_is_there(self, opened: Opener) -> None:
        with driver() as one, guest_memory(100) as fd:
            async with opened(one) as source:
                await source.dma_map(IOVA, 100 * PAGE, fd, 0)
                await source.start_precopy()
                await drain(source, await source.capture())
                one.workload.write(10)
                around = bytearray(b"\x81" * 13)
                await source.merge_dirty(IOVA + 40 * PAGE, 20, memoryview(around)[5:8])
                expected = {page for page in range(40, 60) if any(os.pread(fd, 64, page * PAGE))}
                found = set_bits(around[5:8])
                assert found == {page - 40 for page in expected} | {0, 7, 8, 15, 16, 23}
                assert around[:5] + around[8:] == b"\x81" * 10

    async def test_without_tracking_there_is_nothing_to_merge(self, opened: Opener) -> None:
        with driver(dirty_tracking=False) as one:
            async with opened(one) as source:
                assert not source.description.dirty_tracking
                await source.start_precopy()
                await drain(source, await source.capture())
                with pytest.raises(LocalProtocolError):
                    await source.merge_dirty(IOVA, 8, memoryview(bytearray(1)))
                await source.resume()

    async def test_without_tracking_guest_memory_is_not_written(self, opened: Opener) -> None:
        with driver(dirty_tracking=False) as one, guest_memory(10) as fd:
            async with opened(one) as source:
                await source.dma_map(IOVA, 10 * PAGE, fd, 0)
                one.workload.write(10)
                assert not any(os.pread(fd, 10 * PAGE, 0))

    # ---- PCI and versions

    async def test_what_the_guest_set_in_pci_config_space_moves(self, opened: Opener) -> None:
        with drivers({}, {}) as (one, other):
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
        with driver() as other:
            async with opened(other) as target:
                await target.start_load()
                with pytest.raises(Incompatible):
                    await target.load_pci_config(bytes(256))
                await target.abandon()

    async def test_the_driver_says_which_versions_it_takes(self, opened: Opener) -> None:
        with driver(version_string="new", accept=("old",)) as one:
            before = one.digest()
            async with opened(one) as device:
                assert await device.accepts("new")
                assert await device.accepts("old")
                assert not await device.accepts("future")
                assert not await device.accepts("")
                assert not await device.accepts("x" * 10_000)
                assert device.description.version == "new"
            assert (one.state, one.digest()) == (State.RUNNING, before)

    # ---- the end that is not the happy one

    @pytest.mark.parametrize("where", ["idle", "logging", "capturing", "reading", "stopped", "config", "released"])
    async def test_resume_ends_a_session_from_everywhere(self, opened: Opener, where: str) -> None:
        with driver() as one:
            async with opened(one) as source:
                steps: list[tuple[str, Callable[[], Awaitable[object]]]] = [
                    ("idle", lambda: anyio.lowlevel.checkpoint()),
                    ("logging", source.start_precopy),
                    ("capturing", source.capture),
                    ("reading", lambda: source.next(10 * PAGE)),
                    ("", lambda: read_all(source)),
                    ("stopped", source.stop),
                    ("config", source.capture_config),
                    ("released", source.release),
                ]
                for name, step in steps:
                    await step()
                    if name == where:
                        break
                await source.resume()
                assert one.state is State.RUNNING
                await source.resume()  # and again
            await self.check_unharmed(opened, one)

    async def test_a_stopped_device_runs_when_told_to(self, opened: Opener) -> None:
        with driver() as one:
            async with opened(one) as killed:
                await save(killed, one)
            assert one.state is State.STOP_LOGGING
            async with opened(one) as device:
                await device.resume()
            await self.check_unharmed(opened, one)

    async def test_an_abandoned_target_stays_stopped_and_can_start_over(self, opened: Opener) -> None:
        with drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            async with opened(other) as target:
                await target.start_load()
                await target.begin_capture(len(saved.captures[0]))
                await target.write(saved.captures[0][: 9 * PAGE])
                await target.abandon()
                assert other.state is State.STOP
                await target.abandon()
                with pytest.raises(LocalProtocolError):
                    await target.run()
                assert other.state is State.STOP
            async with opened(other) as target:
                await load(target, saved)
                await target.run()
            assert (other.state, other.digest()) == (State.RUNNING, one.digest())

    async def test_several_targets_are_abandoned_wherever_they_are(self, opened: Opener) -> None:
        with drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            async with opened(other) as target:
                await load(target, saved)
                await target.run()
                await target.abandon()
                assert other.state is State.STOP
            with driver() as third:
                async with opened(third) as idle:
                    await idle.abandon()
                    assert third.state is State.STOP

    async def test_nothing_reaches_the_driver_before_a_chunk_is_whole(self, opened: Opener) -> None:
        with drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            before = other.digest()
            async with opened(other) as target:
                await target.start_load()
                await target.begin_capture(len(saved.captures[0]))
                await target.write(saved.captures[0][: 8 * PAGE - 1])
                assert other.digest() == before
                await target.write(saved.captures[0][8 * PAGE - 1 : 8 * PAGE])
                assert other.digest() != before
                await target.abandon()

    # ---- faults

    @pytest.mark.parametrize(
        ("operation", "n", "named"),
        [
            (Operation.SET_STATE, 1, "set device state to RUNNING"),
            (Operation.SET_STATE, 2, "set device state to RUNNING_LOGGING"),
            (Operation.SET_STATE, 3, "set device state to STOP_LOGGING"),
            (Operation.GET_MEMORY_SIZE, 1, "get memory size"),
            (Operation.GET_MEMORY_SIZE, 3, "get memory size"),
            (Operation.GET_MEMORY, 1, "get memory chunk at 0"),
            (Operation.GET_MEMORY, 3, f"get memory chunk at {16 * PAGE}"),
            (Operation.GET_CONFIG_SIZE, 2, "get config size"),  # the first is asked when it's opened
            (Operation.GET_CONFIG, 1, "get config"),
            (Operation.GET_BITMAP, 1, "get dirty bitmap of 10 pages at 0x100000000"),
        ],
    )
    async def test_a_source_survives_what_its_driver_refuses(
        self, opened: Opener, operation: Operation, n: int, named: str
    ) -> None:
        with driver(faults=(Fault(operation, n, errno.EIO),)) as one, guest_memory(10) as fd:
            async with opened(one) as source:
                await source.dma_map(IOVA, 10 * PAGE, fd, 0)
                with pytest.raises(DeviceRefused, match=source.name) as caught:
                    await save(source, one)
                    await source.merge_dirty(IOVA, 10, memoryview(bytearray(2)))
                assert (caught.value.operation, caught.value.errno) == (named, errno.EIO)
                with pytest.raises(LocalProtocolError):
                    await source.capture()
                await source.resume()
            await self.check_unharmed(opened, one)

    @pytest.mark.parametrize(
        ("operation", "n", "number", "named"),
        [
            (Operation.SET_STATE, 1, errno.EIO, "set device state to STOP"),
            (Operation.SET_STATE, 2, errno.EIO, "set device state to RUNNING"),
            (Operation.SET_MEMORY_SIZE, 1, errno.ENOSPC, "set memory size to 200704"),
            (Operation.SET_MEMORY, 1, errno.EIO, "set memory chunk at 0"),
            (Operation.SET_MEMORY, 2, errno.EBADMSG, f"set memory chunk at {8 * PAGE}"),
            (Operation.SET_CONFIG_SIZE, 1, errno.EIO, "set config size to 3056"),
            (Operation.SET_CONFIG, 1, errno.EIO, "set config"),
        ],
    )
    async def test_a_target_never_runs_what_its_driver_refused(
        self, opened: Opener, operation: Operation, n: int, number: int, named: str
    ) -> None:
        with drivers({}, {"faults": (Fault(operation, n, number),)}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            async with opened(other) as target:
                with pytest.raises(DeviceRefused) as caught:
                    await load(target, saved)
                    await target.run()
                assert (caught.value.operation, caught.value.errno) == (named, number)
                assert ("memory" in str(caught.value).partition(";")[2]) == (number == errno.ENOSPC)
                calls: list[Callable[[], Awaitable[None]]] = [
                    lambda: target.write(b"data"),
                    target.finish_load,
                    target.run,
                ]
                for call in calls:
                    with pytest.raises(LocalProtocolError):
                        await call()
                await target.abandon()
                assert other.state is State.STOP
            async with opened(other) as target:
                await load(target, saved)
                await target.run()
                assert (other.state, other.digest()) == (State.RUNNING, one.digest())

    async def test_resume_is_in_order_when_resume_has_failed(self, opened: Opener) -> None:
        with driver(faults=(Fault(Operation.SET_STATE, 4, errno.EIO),)) as one:
            async with opened(one) as source:
                await save(source, one)
                with pytest.raises(DeviceRefused):
                    await source.resume()
                await source.resume()
            await self.check_unharmed(opened, one)

    async def test_release_is_in_order_when_it_has_failed(self, opened: Opener) -> None:
        with driver(faults=(Fault(Operation.SET_STATE, 4, errno.EIO),)) as one:
            async with opened(one) as source:
                await save(source, one)
                with pytest.raises(DeviceRefused):
                    await source.release()
                await source.release()
            assert one.state is State.STOP

    async def test_a_memory_too_large_is_refused_before_it_is_loaded(self, opened: Opener) -> None:
        with driver(memory=100 * PAGE, memory_region=8 * PAGE) as one, driver() as other:
            before = other.digest()
            async with opened(one) as source, opened(other) as target:
                await source.start_precopy()
                await target.start_load()
                with pytest.raises(DeviceRefused, match="less memory"):
                    await target.begin_capture(await source.capture())
                await target.abandon()
                await source.resume()
            assert other.digest() == before

    @pytest.mark.parametrize("size", [0, 2 * PAGE + 1, 1 << 40])
    async def test_a_config_that_does_not_fit_is_refused(self, opened: Opener, size: int) -> None:
        with driver() as other:
            async with opened(other) as target:
                await target.start_load()
                with pytest.raises(Incompatible, match=f"1 to {2 * PAGE}"):
                    await target.begin_config(size)
                await target.abandon()

    # ---- cancellation

    @pytest.mark.parametrize("in_the_middle", [False, True])
    @pytest.mark.parametrize("n", range(9))
    async def test_a_source_survives_being_cancelled(self, opened: Opener, n: int, in_the_middle: bool) -> None:
        with driver(capture_time=0.005, state_time=0.005) as one:
            async with opened(one) as source:
                calls: list[Callable[[], Awaitable[object]]] = [
                    source.start_precopy,
                    source.capture,
                    lambda: read_all(source),
                    lambda: source.merge_dirty(IOVA, 0, memoryview(b"")),
                    source.stop,
                    source.capture,
                    lambda: read_all(source),
                    source.capture_config,
                    lambda: read_all(source),
                ]
                for call in calls[:n]:
                    await call()
                await cancel(calls[n], in_the_middle=in_the_middle)
                await source.resume()
            await self.check_unharmed(opened, one)

    @pytest.mark.parametrize("in_the_middle", [False, True])
    @pytest.mark.parametrize("n", range(7))
    async def test_a_target_survives_being_cancelled(self, opened: Opener, n: int, in_the_middle: bool) -> None:
        with drivers({}, {"state_time": 0.005}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one, rounds=0)
            async with opened(other) as target:
                calls: list[Callable[[], Awaitable[object]]] = [
                    target.start_load,
                    lambda: target.begin_capture(len(saved.captures[0])),
                    lambda: target.write(saved.captures[0]),
                    lambda: target.begin_config(len(saved.config)),
                    lambda: target.write(saved.config),
                    target.finish_load,
                    target.run,
                ]
                for call in calls[:n]:
                    await call()
                await cancel(calls[n], in_the_middle=in_the_middle)
                await target.abandon()
                assert other.state is State.STOP
            async with opened(other) as target:
                await load(target, saved)
                await target.run()
                assert (other.state, other.digest()) == (State.RUNNING, one.digest())

    # ---- order of calls

    @pytest.mark.parametrize(
        ("before", "in_order"),
        [
            ([], {"start_precopy", "resume", "start_load", "abandon"}),
            (["start_precopy"], {"capture", "next", "stop", "resume"}),
            (["start_precopy", "stop"], {"capture", "next", "merge_dirty", "capture_config", "release", "resume"}),
            (["start_precopy", "stop", "release"], {"resume"}),
            (["start_precopy", "stop", "resume"], {"start_precopy", "resume", "start_load", "abandon"}),
            (["start_load"], {"begin_capture", "begin_config", "load_pci_config", "finish_load", "room", "abandon"}),
            (["start_load", "finish_load"], {"run", "abandon"}),
            (["start_load", "finish_load", "run"], {"abandon"}),
            (["start_load", "abandon"], {"abandon"}),
        ],
    )
    async def test_calls_out_of_order_are_refused_and_do_nothing(
        self, opened: Opener, before: list[str], in_order: set[str]
    ) -> None:
        arguments: dict[str, tuple[Any, ...]] = {
            "next": (10,),
            "merge_dirty": (IOVA, 0, memoryview(b"")),
            "begin_capture": (0,),
            "begin_config": (10,),
            "write": (b"data",),
            "room": (10,),
            "fill": (10,),
        }
        source = ("start_precopy", "capture", "stop", "capture_config", "release", "resume")
        target = ("start_load", "deliver", "finish_load", "run", "abandon")
        with driver() as one:
            for name in (*source, *target, *arguments, "load_pci_config"):
                if name == "merge_dirty" and before == ["start_precopy"]:
                    continue  # from when on it is in order is the device's choice
                one.reset()
                async with opened(one) as device:
                    if name == "load_pci_config":
                        arguments[name] = (await device.read_pci_config(),)
                    for earlier in before:
                        await getattr(device, earlier)(*arguments.get(earlier, ()))
                    state, digest = one.state, one.digest()
                    if name in in_order:
                        await called(device, name, *arguments.get(name, ()))
                    else:
                        with pytest.raises(LocalProtocolError):
                            await called(device, name, *arguments.get(name, ()))
                        assert (one.state, one.digest()) == (state, digest)

    async def test_a_capture_is_read_to_its_end_before_the_next(self, opened: Opener) -> None:
        with driver() as one:
            for call in ("capture", "capture_config"):
                async with opened(one) as source:
                    await source.start_precopy()
                    await source.stop()
                    size = await source.capture()
                    await source.next(size - 1)
                    with pytest.raises(LocalProtocolError, match="end"):
                        await getattr(source, call)()
                    await source.resume()

    async def test_a_capture_is_written_to_its_end_before_the_next(self, opened: Opener) -> None:
        with drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            for call in ("begin_capture", "begin_config", "finish_load"):
                async with opened(other) as target:
                    await target.start_load()
                    await target.begin_capture(len(saved.captures[0]))
                    await target.write(saved.captures[0][:-1])
                    with pytest.raises(LocalProtocolError, match="end"):
                        await getattr(target, call)(*([] if call == "finish_load" else [100]))
                    await target.abandon()

    async def test_more_than_announced_is_refused(self, opened: Opener) -> None:
        with drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one)
            before = other.digest()
            async with opened(other) as target:
                await target.start_load()
                await target.begin_capture(len(saved.captures[0]))
                assert len(target.room(1 << 40)) <= len(saved.captures[0])
                with pytest.raises(LocalProtocolError, match="announced"):
                    target.fill(len(saved.captures[0]) + 1)
                assert other.digest() == before
                with pytest.raises(LocalProtocolError, match="announced"):
                    await target.write(saved.captures[0] + b"!")
                await target.abandon()

    # ---- in place

    async def test_what_lies_in_the_room_is_nothing_before_it_is_filled_and_delivered(self, opened: Opener) -> None:
        with drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one, rounds=0)
            before = other.digest()
            async with opened(other) as target:
                await target.start_load()
                content = saved.captures[0]
                await target.begin_capture(len(content))
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
                await target.begin_config(len(saved.config))
                await target.write(saved.config)
                await target.finish_load()
                await target.run()
                assert (other.state, other.digest()) == (State.RUNNING, one.digest())

    async def test_a_place_that_waits_to_be_delivered_may_be_abandoned(self, opened: Opener) -> None:
        with drivers({}, {}) as (one, other):
            async with opened(one) as source:
                saved = await save(source, one, rounds=0)
            before = other.digest()
            async with opened(other) as target:
                await target.start_load()
                content = memoryview(saved.captures[0])
                await target.begin_capture(len(content))
                while True:
                    with target.room(len(content)) as room:
                        count = len(room)
                        room[:] = content[:count]
                    if target.fill(count):
                        break
                    content = content[count:]
                await target.abandon()
                assert (other.state, other.digest()) == (State.STOP, before)

    # ---- closing

    async def test_it_can_be_closed_at_any_time(self, opened: Opener) -> None:
        with driver() as one:
            async with opened(one) as source:
                await source.start_precopy()
                await source.capture()
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await source.aclose()
                await source.aclose()
                for call in (source.capture, source.resume, source.read_pci_config, source.abandon):
                    with pytest.raises(VfiostreamError):
                        await call()
            assert one.state in (State.RUNNING, State.RUNNING_LOGGING)  # as it was left


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


async def cancel(call: Callable[[], Awaitable[object]], *, in_the_middle: bool) -> None:
    """Call, and cancel it: before it does anything, or when it waits for the driver (if it does wait)."""
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            await call()

        if in_the_middle:
            tasks.start_soon(run)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        else:
            tasks.cancel_scope.cancel()
            await run()
