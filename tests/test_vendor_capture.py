"""What the reference device captures: nothing that changed is ever lost, whatever a client does."""

from __future__ import annotations

import errno

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from hypothesis.strategies import integers, sampled_from

from tests.vendor_operations import (
    IOVA,
    PAGE,
    RUNNING,
    RUNNING_LOGGING,
    SMALL,
    STOP,
    STOP_LOGGING,
    Direct,
    Operations,
    finish,
    guest,
    kind_and_ordinal,
    opened,
    pages_of,
    refused,
)
from vfiostream.uapi.four_region import State
from vfiostream.vendor import capture as stream
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.settings import Settings


def test_the_first_capture_under_logging_is_whole_and_then_what_was_written() -> None:
    with opened() as (device, ops):
        ops.set_state(RUNNING_LOGGING)
        whole = ops.capture()
        assert kind_and_ordinal(whole) == (stream.Kind.WHOLE, 0)
        assert pages_of(whole) == list(range(64))
        assert ops.get_memory_size() == 0
        device.workload.write(1)
        dirty = ops.capture()
        assert kind_and_ordinal(dirty) == (stream.Kind.DIRTY, 1)
        assert len(pages_of(dirty)) == 1
        assert ops.get_memory_size() == 0


def test_outside_logging_every_capture_is_whole() -> None:
    with opened() as (_, ops):
        assert kind_and_ordinal(ops.capture()) == (stream.Kind.WHOLE, 0)
        assert kind_and_ordinal(ops.capture()) == (stream.Kind.WHOLE, 0)


def test_the_posted_order_loses_nothing() -> None:
    with opened(seed=1) as (device, source), opened(seed=2) as (_, target):
        target.set_state(STOP)
        target.load(source.capture())
        device.workload.write(3)  # between the snapshot and LOGGING
        source.set_state(RUNNING_LOGGING)
        device.workload.write(3)
        dirty = source.capture()
        assert kind_and_ordinal(dirty) == (stream.Kind.DIRTY, 1)
        target.load(dirty)
        finish(source, target)
        assert source.digest == target.digest


def test_what_is_written_after_a_capture_comes_with_the_next() -> None:
    with opened(seed=1) as (device, source), opened(seed=2) as (_, target):
        target.set_state(STOP)
        source.set_state(RUNNING_LOGGING)
        size = source.get_memory_size()
        chunks = []
        for pos in range(0, size, source.chunk):
            chunks.append(source.get_chunk(pos, min(source.chunk, size - pos)))
            device.workload.write(2)
        target.load(b"".join(chunks))
        finish(source, target)
        assert source.digest == target.digest


@pytest.mark.parametrize("fetched", [0, 1])
def test_what_was_captured_and_not_fetched_stays_dirty(fetched: int) -> None:
    with opened() as (device, ops):
        ops.set_state(RUNNING_LOGGING)
        ops.capture()
        device.workload.write(40)
        size = ops.get_memory_size()
        assert size > 2 * ops.chunk
        for n in range(fetched):
            ops.get_chunk(n * ops.chunk, ops.chunk)
        device.workload.write(1)
        again = ops.capture()
        assert len(again) >= size
        assert kind_and_ordinal(again) == (stream.Kind.DIRTY, 1)
        assert ops.get_memory_size() == 0


def test_a_whole_capture_that_was_not_fetched_is_made_again() -> None:
    with opened() as (_, ops):
        ops.set_state(RUNNING_LOGGING)
        size = ops.get_memory_size()
        ops.get_chunk(0, ops.chunk)
        assert ops.get_memory_size() == size
        assert pages_of(ops.capture()) == list(range(64))
        assert ops.get_memory_size() == 0


@pytest.mark.parametrize("state", [RUNNING, STOP])
def test_clearing_logging_makes_everything_dirty_again(state: State) -> None:
    with opened() as (_, ops):
        ops.set_state(RUNNING_LOGGING)
        ops.capture()
        ops.set_state(state)
        with refused(errno.EINVAL):
            ops.get_chunk(0, ops.chunk)
        ops.set_state(RUNNING_LOGGING)
        assert pages_of(ops.capture()) == list(range(64))


def test_writing_the_state_it_has_without_logging_also_forgets() -> None:
    with opened() as (_, ops):
        ops.capture()
        ops.set_state(RUNNING)
        ops.set_state(RUNNING_LOGGING)
        assert kind_and_ordinal(ops.capture()) == (stream.Kind.WHOLE, 0)


def test_writing_the_state_it_has_with_logging_changes_nothing() -> None:
    with opened() as (device, ops), guest(device, 8):
        ops.set_state(RUNNING_LOGGING)
        ops.capture()
        device.workload.write(1)
        ops.set_state(RUNNING_LOGGING)
        assert len(pages_of(ops.capture())) == 1
        assert any(ops.get_bitmap(IOVA, 8))


@pytest.mark.parametrize("pos", [1, PAGE, 4 * PAGE - 1, 68 * PAGE, 1 << 63])
def test_positions_that_start_no_chunk_are_refused(pos: int) -> None:
    with opened() as (_, ops):
        assert ops.get_memory_size() == 65 * PAGE
        with refused(errno.EINVAL):
            ops.get_chunk(pos, 1)


def test_chunks_can_be_fetched_in_any_order_and_again() -> None:
    with opened() as (_, ops):
        ops.set_state(STOP)
        capture = ops.capture()
        for pos in reversed(range(0, len(capture), ops.chunk)):
            assert ops.get_chunk(pos, min(ops.chunk, len(capture) - pos)) == capture[pos : pos + ops.chunk]


def test_a_table_longer_than_a_chunk() -> None:
    with (
        opened(memory=2048 * PAGE, memory_region=PAGE, seed=1) as (device, source),
        opened(memory=2048 * PAGE, memory_region=3 * PAGE, seed=2) as (_, target),
    ):
        target.set_state(STOP)
        source.set_state(RUNNING_LOGGING)
        target.load(source.capture())
        device.workload.write(1000)
        dirty = source.capture()
        assert stream.CAPTURE_HEADER.unpack_from(dirty)[6] * 16 > PAGE
        target.load(dirty)
        finish(source, target)
        assert source.digest == target.digest


# ---- whatever a client does


class DirtyTracking(RuleBasedStateMachine):
    """A client that captures, drops captures, and changes states as it likes, never ends up with stale memory."""

    def __init__(self) -> None:
        super().__init__()
        settings = {**SMALL, "memory": 24 * PAGE, "memory_region": 2 * PAGE}
        self.source_device = ReferenceDevice(Settings(**settings, seed=1))
        self.target_device = ReferenceDevice(Settings(**settings, seed=2))
        self.source = Operations(Direct(self.source_device), 2 * PAGE)
        self.target = Operations(Direct(self.target_device), 2 * PAGE)
        self.target.set_state(STOP)
        self.synced = False
        """Whether the target has the whole of the stream so far."""

    @rule(count=integers(1, 12))
    def write(self, count: int) -> None:
        if self.source.state.running:
            self.source_device.workload.write(count)

    @rule(state=sampled_from(State))
    def change_state(self, state: State) -> None:
        self.source.set_state(state)
        if not state.logging:
            self.synced = False

    @rule()
    def capture(self) -> None:
        capture = self.source.capture()
        if capture:
            self.target.load(capture)
        self.synced = True

    @rule(chunks=integers(0, 5))
    def drop_a_capture(self, chunks: int) -> None:
        size = self.source.get_memory_size()
        for pos in range(0, size, self.source.chunk)[:chunks]:
            self.source.get_chunk(pos, 1)
        if size and chunks * self.source.chunk >= size:
            # Fetched to its end, so the driver believes that we have it.
            self.source.set_state(self.source.state & ~2)
            self.synced = False

    @precondition(lambda self: self.source.state.logging)
    @rule()
    def move(self) -> None:
        self.source.set_state(STOP_LOGGING)
        last = self.source.capture()
        if last:
            self.target.load(last)
        self.target.set_config(self.source.get_config())
        assert self.source.digest == self.target.digest
        self.target.set_state(RUNNING)
        self.target.set_state(STOP)
        self.source.set_state(RUNNING)

    def teardown(self) -> None:
        self.source_device.close()
        self.target_device.close()


DirtyTracking.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=25, deadline=None)
TestDirtyTracking = DirtyTracking.TestCase
