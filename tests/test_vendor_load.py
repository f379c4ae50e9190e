"""What the reference device refuses to load, and that it never runs with half of it."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

import pytest

from tests.vendor_operations import CONFIG, PAGE, RUNNING, RUNNING_LOGGING, STOP, STOP_LOGGING, finish, opened, refused
from vfiostream.uapi.four_region import Action
from vfiostream.vendor import capture as stream


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


def test_data_is_loaded_in_stop_only() -> None:
    with opened() as (_, ops):
        config, capture = ops.get_config(), ops.capture()
        for state in (RUNNING, RUNNING_LOGGING, STOP_LOGGING):
            ops.set_state(state)
            with refused(errno.EBUSY):
                ops.set_memory_size(len(capture))
            with refused(errno.EBUSY):
                ops.set_chunk(0, capture[: ops.chunk])
            with refused(errno.EBUSY):
                ops.set_config(config)
            with refused(errno.EBUSY):
                ops.put32(ops.layout.config_action, Action.SET_BUFFER)


def test_half_a_load_does_not_run_and_a_whole_one_does() -> None:
    with opened(seed=1) as (_, source), opened(seed=2) as (_, target):
        target.set_state(STOP)
        capture = source.capture()
        config = source.get_config()
        target.set_memory_size(len(capture))
        for pos in range(0, len(capture), target.chunk):
            for state in (RUNNING, RUNNING_LOGGING, STOP_LOGGING):
                with refused(errno.EINVAL):
                    target.set_state(state)
            with refused(errno.EINVAL):
                target.set_config(config)
            target.set_chunk(pos, capture[pos : pos + target.chunk])
        with refused(errno.EINVAL):
            target.set_state(RUNNING)
        target.set_state(STOP)
        target.set_config(config)
        target.set_state(RUNNING)
        assert source.digest == target.digest


def test_chunks_come_in_order() -> None:
    with opened(seed=1) as (_, source), opened(seed=2) as (_, target):
        target.set_state(STOP)
        capture = source.capture()
        target.set_memory_size(len(capture))
        with refused(errno.EINVAL):
            target.set_chunk(target.chunk, capture[target.chunk :][: target.chunk])
        target.set_chunk(0, capture[: target.chunk])
        for pos in (0, 2 * target.chunk, 1):
            with refused(errno.EINVAL):
                target.set_chunk(pos, capture[: target.chunk])
        for pos in range(target.chunk, len(capture), target.chunk):
            target.set_chunk(pos, capture[pos : pos + target.chunk])
        with refused(errno.EINVAL):  # nothing is due any more
            target.set_chunk(len(capture), b"more")
        target.set_config(source.get_config())
        assert source.digest == target.digest


def test_a_chunk_without_a_size_is_refused() -> None:
    with opened() as (_, ops):
        ops.set_state(STOP)
        with refused(errno.EINVAL):
            ops.set_chunk(0, b"anything")
        with refused(errno.EINVAL):
            ops.put32(ops.layout.config_action, Action.SET_BUFFER)


@pytest.mark.parametrize(
    ("at", "number"),
    [
        (0, errno.EINVAL),  # magic
        (8, errno.EINVAL),  # version
        (11, errno.EINVAL),  # kind
        (12, errno.EINVAL),  # ordinal
        (16, errno.EBADMSG),  # nonce
        (34, errno.ENOSPC),  # memory size, now larger than ours
        (40, errno.EINVAL),  # number of runs
        (49, errno.EINVAL),  # length of data
        (56, errno.EBADMSG),  # check
        (72, errno.EBADMSG),  # table
        (80, errno.EBADMSG),  # table
        (4095, errno.EINVAL),  # padding
    ],
)
def test_a_corrupt_head_is_refused_and_the_load_can_begin_again(at: int, number: int) -> None:
    with opened(seed=1) as (_, source), opened(seed=2) as (_, target):
        target.set_state(STOP)
        before = target.digest
        capture = source.capture()
        target.set_memory_size(len(capture))
        with refused(number):
            target.set_chunk(0, flipped(capture, at)[: target.chunk])
        assert target.digest == before
        with refused(errno.EINVAL):
            target.set_chunk(0, capture[: target.chunk])
        with refused(errno.EINVAL):
            target.set_state(RUNNING)
        target.load(capture)
        target.set_config(source.get_config())
        target.set_state(RUNNING)
        assert source.digest == target.digest


def forged(runs: list[tuple[int, int]], length: int, kind: int = 2, ordinal: int = 1, nonce: bytes = b"") -> bytes:
    """The head of a capture whose check is right, whatever else it says."""
    table = b"".join(struct.pack("<QQ", *run) for run in runs)
    fields = (stream.CAPTURE_MAGIC, stream.VERSION, kind, ordinal, nonce, 64 * PAGE, len(runs), length)
    check = stream._check(stream.CAPTURE_HEADER.pack(*fields, bytes(16)), table)
    return (stream.CAPTURE_HEADER.pack(*fields, check) + table).ljust(PAGE, b"\0")


@pytest.mark.parametrize(
    ("runs", "length"),
    [
        ([(64, 1)], PAGE),
        ([(63, 2)], 2 * PAGE),
        ([((1 << 64) - 1, 1)], PAGE),
        ([(1, (1 << 64) - 1)], PAGE),
        ([(3, 0), (5, 1)], PAGE),
        ([(5, 1), (3, 1)], 2 * PAGE),
        ([(5, 1), (5, 1)], 2 * PAGE),
        ([(5, 1), (6, 1)], 2 * PAGE),
        ([(5, 2)], PAGE),
        ([(5, 1)], 2 * PAGE),
    ],
)
def test_runs_that_make_no_sense_are_refused(runs: list[tuple[int, int]], length: int) -> None:
    with opened(seed=1) as (_, source), opened(seed=2) as (_, target):
        target.set_state(STOP)
        whole = source.capture()
        target.load(whole)
        before = target.digest
        capture = forged(runs, length, nonce=whole[16:32]) + b"\xff" * length
        target.set_memory_size(len(capture))
        with refused(errno.EINVAL):
            target.set_chunk(0, capture[: target.chunk])
        assert target.digest == before
        with refused(errno.EINVAL):
            target.set_config(source.get_config())


def test_a_whole_capture_has_to_cover_the_memory() -> None:
    with opened() as (_, ops):
        ops.set_state(STOP)
        with refused(errno.EINVAL):
            ops.load(forged([(0, 63)], 63 * PAGE, kind=1, ordinal=0) + bytes(63 * PAGE))


def test_the_size_of_the_source_has_to_be_ours() -> None:
    with opened(memory=32 * PAGE) as (_, small), opened() as (_, large):
        small.set_state(STOP)
        large.set_state(STOP)
        with refused(errno.ENOSPC):
            small.set_memory_size(len(large.capture()))
        small.set_state(RUNNING)  # nothing was begun
        with refused(errno.EINVAL):
            large.load(small.capture())


def test_captures_come_in_order_and_from_one_stream() -> None:
    with opened(seed=1) as (device, source), opened(seed=2) as (_, target):
        target.set_state(STOP)
        source.set_state(RUNNING_LOGGING)
        captures = [source.capture()]
        for _ in range(3):
            device.workload.write(2)
            captures.append(source.capture())
        whole, first, second, third = captures
        config = source.get_config()
        with refused(errno.EINVAL):
            target.load(first)
        for skipped in ([whole, second], [whole, first, first], [whole, first, second, second]):
            for capture in skipped[:-1]:
                target.load(capture)
            with refused(errno.EINVAL):
                target.load(skipped[-1])
        target.load(whole)
        target.load(first)
        target.load(second)
        with refused(errno.EINVAL):  # the last capture is missing
            target.set_config(config)
        target.load(third)
        target.set_config(config)
        target.set_state(RUNNING)
        assert source.digest == target.digest


def test_a_capture_of_another_stream_is_refused() -> None:
    with opened(seed=1) as (device, source), opened(seed=2) as (_, target):
        target.set_state(STOP)
        old = source.capture()
        source.set_state(RUNNING_LOGGING)
        source.set_state(RUNNING)
        source.set_state(RUNNING_LOGGING)
        source.capture()
        device.workload.write(1)
        dirty = source.capture()
        target.load(old)
        with refused(errno.EINVAL):
            target.load(dirty)


def test_a_config_of_another_stream_is_refused() -> None:
    with opened(seed=1) as (_, source), opened(seed=2) as (_, target):
        target.set_state(STOP)
        before = source.get_config()
        capture = source.capture()
        for config in (before, target.get_config()):
            target.load(capture)
            with refused(errno.EINVAL):
                target.set_config(config)


def test_a_config_alone_is_not_enough_for_a_device_with_memory() -> None:
    with opened() as (_, ops):
        config = ops.get_config()
        ops.set_state(STOP)
        with refused(errno.EINVAL):
            ops.set_config(config)
        ops.set_state(RUNNING)


@pytest.mark.parametrize(
    ("damage", "number"),
    [
        (lambda data: data[:-1], errno.EINVAL),
        (lambda data: data + b"\0", errno.EINVAL),
        (lambda data: data[:10], errno.EINVAL),
        (lambda data: b"", errno.EINVAL),
        (lambda data: flipped(data, 0), errno.EINVAL),
        (lambda data: flipped(data, 8), errno.EINVAL),
        (lambda data: flipped(data, 12), errno.EBADMSG),
        (lambda data: flipped(data, 20), errno.EBADMSG),
        (lambda data: flipped(data, 32), errno.EINVAL),
        (lambda data: flipped(data, len(data) - 1), errno.EBADMSG),
    ],
)
def test_a_damaged_config_is_refused(damage: Callable[[bytes], bytes], number: int) -> None:
    with opened(seed=1) as (_, source), opened(seed=2) as (_, target):
        target.set_state(STOP)
        target.load(source.capture())
        before = target.digest
        config = source.get_config()
        bad = damage(config)
        with refused(number):
            target.put64(target.layout.config_size, len(bad))
            target.regions.write(CONFIG, 0, bad or b"\0")
            target.put32(target.layout.config_action, Action.SET_BUFFER)
        assert target.digest == before
        target.set_config(config)
        assert target.digest == source.digest


def test_sizes_beyond_what_fits_are_refused() -> None:
    with opened() as (_, ops):
        ops.set_state(STOP)
        with refused(errno.ENOSPC):
            ops.put64(ops.layout.config_size, PAGE + 1)
        for size in (65 * PAGE + 1, (1 << 64) - 1):
            with refused(errno.ENOSPC):
                ops.set_memory_size(size)
        ops.set_memory_size(0)
        ops.set_state(RUNNING)


def test_reset_makes_a_device_with_half_a_load_run() -> None:
    with opened(seed=1) as (_, source), opened(seed=2) as (device, target):
        fresh = target.digest
        target.set_state(STOP)
        target.load(source.capture())
        device.reset()
        assert target.state is RUNNING
        assert target.digest == fresh


def test_a_device_that_was_loaded_is_saved_whole() -> None:
    with opened(seed=1) as (_, source), opened(seed=2) as (_, target), opened(seed=3) as (_, third):
        target.set_state(STOP)
        target.capture()
        target.load(source.capture())
        target.set_config(source.get_config())
        target.set_state(RUNNING_LOGGING)
        third.set_state(STOP)
        third.load(target.capture())
        finish(target, third)
        assert source.digest == third.digest
