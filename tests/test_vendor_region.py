"""The migration region of the reference device: its fields, whatever order a client uses them in, and faults."""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from hypothesis.strategies import integers, sampled_from

from tests.vendor_operations import BAR0, PAGE, SMALL, Direct, refused
from vfiostream.uapi.vfio import MIGRATION_INFO, REGION_SUBTYPE_MIGRATION, REGION_TYPE_MIGRATION, RegionState
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.settings import Mmap, Settings, parse_fault

MIGRATION = 9
STOP, RUNNING, PRE_COPY, STOP_COPY, RESUMING = (RegionState(value) for value in (0, 1, 3, 2, 4))
STATES = (STOP, RUNNING, PRE_COPY, STOP_COPY, RESUMING)
ERROR = 6
AREA = 4 * PAGE


class Client:
    """A client of the region, who does what the kernel's header says."""

    def __init__(self, device: ReferenceDevice) -> None:
        self.device = device
        self.regions = Direct(device)

    def get32(self, offset: int) -> int:
        return int(struct.unpack("<I", self.regions.read(MIGRATION, offset, 4))[0])

    def get64(self, offset: int) -> int:
        return int(struct.unpack("<Q", self.regions.read(MIGRATION, offset, 8))[0])

    @property
    def state(self) -> int:
        state = self.get32(0)
        assert struct.unpack("<I", self.regions.read(BAR0, 32, 4))[0] == state
        return state

    @property
    def digest(self) -> bytes:
        return self.regions.read(BAR0, 0, 32)

    def go(self, *states: int) -> None:
        for state in states:
            self.regions.write(MIGRATION, 0, struct.pack("<I", state))

    @property
    def pending(self) -> int:
        return self.get64(8)

    def piece(self) -> bytes:
        """One iteration, but for the pending bytes."""
        start, size = self.get64(16), self.get64(24)
        return self.regions.read(MIGRATION, start, size) if size else b""

    def save(self) -> bytes:
        """What there is, to the end or the end for now."""
        whole = b""
        while self.pending:
            piece = self.piece()
            assert piece
            whole += piece
        return whole

    def load(self, data: bytes, step: int = AREA) -> None:
        for at in range(0, len(data), step):
            piece = data[at : at + step]
            self.regions.write(MIGRATION, self.get64(16), piece)
            self.regions.write(MIGRATION, 24, struct.pack("<Q", len(piece)))


@contextmanager
def region(**changes: Any) -> Iterator[Client]:
    device = ReferenceDevice(Settings(**{**SMALL, "interface": "migration-region", **changes}))
    try:
        yield Client(device)
    finally:
        device.close()


@pytest.mark.parametrize("how", get_args(Mmap))
@pytest.mark.parametrize("memory", [64 * PAGE, 0])
def test_the_whole_way(how: Mmap, memory: int) -> None:
    with region(seed=1, mmap=how, memory=memory) as source, region(seed=2, mmap=how, memory=memory) as target:
        source.go(PRE_COPY)
        stream = source.save()
        for _ in range(3):
            source.device.workload.write(5)
            stream += source.save()
        assert source.pending == 0
        source.device.workload.write(5)
        source.go(STOP_COPY)
        stream += source.save()
        assert source.piece() == b""
        target.go(RESUMING)
        target.load(stream)
        target.go(RUNNING)
        assert target.digest == source.digest
        assert target.state == RUNNING


@pytest.mark.parametrize("step", [1, 7, 1000, AREA])
def test_the_stream_may_be_cut_anywhere(step: int) -> None:
    with region(seed=1, memory=4 * PAGE) as source, region(seed=2, memory=4 * PAGE) as target:
        source.go(STOP_COPY)
        target.go(RESUMING)
        target.load(source.save(), step)
        target.go(STOP)
        assert target.digest == source.digest


@pytest.mark.parametrize(
    ("how", "areas"),
    [
        ("none", ()),
        ("whole", ((PAGE, 8 * PAGE),)),
        ("sparse", ((2 * PAGE, 3 * PAGE), (6 * PAGE, 3 * PAGE))),
    ],
)
def test_the_data_area_can_be_mapped_and_the_header_cannot(how: Mmap, areas: tuple[tuple[int, int], ...]) -> None:
    with region(mmap=how, memory_region=8 * PAGE) as client:
        assert len(client.device.regions) == MIGRATION + 1
        one = client.device.regions[MIGRATION]
        assert one.type == (REGION_TYPE_MIGRATION, REGION_SUBTYPE_MIGRATION)
        assert one.size == 9 * PAGE
        assert one.mappable == areas
        assert one.sparse == (how != "none")


def test_accesses_that_are_not_of_a_field_are_refused() -> None:
    reads = {(0, 4), (4, 4), (8, 8), (16, 8), (24, 8)}
    with region() as client:
        client.go(RESUMING)
        for offset, count in itertools.product(range(40), (1, 2, 4, 8, 16, 32)):
            if (offset, count) not in reads:
                with refused(errno.EINVAL):
                    client.regions.read(MIGRATION, offset, count)
            if (offset, count) not in ((0, 4), (24, 8)):
                with refused(errno.EINVAL):
                    client.regions.write(MIGRATION, offset, bytes(count))
        with refused(errno.EINVAL):
            client.regions.read(MIGRATION, PAGE - 4, 8)
        assert MIGRATION_INFO.size == 32


@pytest.mark.parametrize("value", [5, 6, 7, 8, 9, 0x8000_0001])
def test_states_that_make_no_sense_are_refused(value: int) -> None:
    with region() as client, refused(errno.EINVAL):
        client.go(value)
    assert value not in STATES


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, repeat=2)))
def test_changes_of_state(before: RegionState, after: RegionState) -> None:
    with region() as client:
        client.go(before)
        if before == RESUMING != after or (before, after) == (STOP_COPY, PRE_COPY):
            with refused(errno.EINVAL):
                client.go(after)
            assert client.state == before
        else:
            client.go(after)
            assert client.state == after
            client.go(after)


def test_half_a_load_does_not_run_and_a_reset_ends_it() -> None:
    with region(seed=1) as source, region(seed=2) as target:
        fresh = target.digest
        source.go(STOP_COPY)
        stream = source.save()
        target.go(RESUMING)
        target.load(stream[:-1])
        for state in (STOP, RUNNING):
            with refused(errno.EINVAL):
                target.go(state)
        assert target.state == RESUMING
        target.device.reset()
        assert (target.state, target.digest) == (RUNNING, fresh)


def test_pieces_are_freed_by_asking_what_is_pending() -> None:
    with region() as client:
        client.go(STOP_COPY)
        assert client.get64(24) == 0
        first = client.piece()
        assert client.piece() == first
        assert client.pending
        assert client.get64(24) == 0
        second = client.piece()
        assert second != first
        assert len(first) == len(second) == AREA


def test_what_is_pending_goes_down_to_nothing() -> None:
    with region() as client:
        assert client.pending == 0
        client.go(STOP_COPY)
        seen = []
        while pending := client.pending:
            seen.append(pending)
            client.piece()
        assert seen == sorted(seen, reverse=True)
        assert len(set(seen)) == len(seen) > 10


def test_more_than_the_area_is_not_taken() -> None:
    with region() as client:
        with refused(errno.EINVAL):
            client.regions.write(MIGRATION, 24, struct.pack("<Q", 1))
        client.go(RESUMING)
        for size in (AREA + 1, (1 << 64) - 1):
            with refused(errno.EINVAL):
                client.regions.write(MIGRATION, 24, struct.pack("<Q", size))


def test_faults() -> None:
    texts = (
        "set-state:2:EIO",
        "get-pending:2:ENOMEM",
        "data-read:2:EAGAIN",
        "data-write:2:ENOSPC",
        "set-state:6:error",
    )
    with region(faults=tuple(parse_fault(text) for text in texts)) as client:
        client.go(PRE_COPY)
        with refused(errno.EIO):
            client.go(STOP_COPY)
        assert client.state == PRE_COPY
        assert client.pending
        with refused(errno.ENOMEM):
            client.pending  # noqa: B018 - reading is asking
        first = client.piece()
        assert client.pending
        with refused(errno.EAGAIN):
            client.piece()
        assert client.piece() != first
        client.go(RUNNING, RESUMING)
        client.load(b"VFS")
        with refused(errno.ENOSPC):
            client.load(b"REF")
        client.device.reset()
        client.go(PRE_COPY)
        with refused(errno.EIO):
            client.go(STOP_COPY)
        assert client.state == ERROR
        with refused(errno.EINVAL):
            client.go(RUNNING)
        assert client.pending == 0
        client.device.reset()
        assert client.state == RUNNING


class AnyClient(RuleBasedStateMachine):
    """A client that asks, reads and changes states as it likes never ends up with stale memory, if what it has is all
    that a session gave.
    """

    @initialize(how=sampled_from(get_args(Mmap)))
    def start(self, how: Mmap) -> None:
        changes = {**SMALL, "interface": "migration-region", "memory": 24 * PAGE, "mmap": how}
        self.source = Client(ReferenceDevice(Settings(**changes, seed=1)))
        self.target = Client(ReferenceDevice(Settings(**changes, seed=2)))
        self.state = RUNNING
        self.stream = b""
        self.last = b""
        """The piece in the data area, which may yet be read again."""

    @rule(count=integers(1, 20))
    def write(self, count: int) -> None:
        if self.state & RUNNING:
            self.source.device.workload.write(count)

    @rule(state=sampled_from((STOP, RUNNING, PRE_COPY, STOP_COPY)))
    def change_state(self, state: RegionState) -> None:
        if (self.state, state) == (STOP_COPY, PRE_COPY):
            with refused(errno.EINVAL):
                self.source.go(state)
            return
        if state != self.state and self.last:
            self.free()  # a client that changes the state with a piece in the area has read it
        self.source.go(state)
        self.state = state
        if not state & STOP_COPY:
            self.stream = b""

    @rule()
    def free(self) -> None:
        pending = self.source.pending
        assert pending == 0 or self.state & STOP_COPY
        self.stream += self.last
        self.last = b""

    @precondition(lambda self: self.state & STOP_COPY)
    @rule()
    def read(self) -> None:
        piece = self.source.piece()
        assert not self.last or piece == self.last
        self.last = piece

    @precondition(lambda self: self.state & STOP_COPY)
    @rule(step=sampled_from((AREA, 999)))
    def move(self, step: int) -> None:
        if self.last:
            self.free()
        self.source.go(STOP_COPY)
        stream = self.stream + self.source.save()
        self.target.go(RESUMING)
        self.target.load(stream, step)
        self.target.go(STOP)
        assert self.target.digest == self.source.digest
        self.source.go(RUNNING)
        self.state, self.stream = RUNNING, b""

    def teardown(self) -> None:
        if hasattr(self, "source"):
            self.source.device.close()
            self.target.device.close()


AnyClient.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAnyClient = AnyClient.TestCase
