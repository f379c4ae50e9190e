"""The reference device's stream of data: whole ones move a device however they are cut, and no others do."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import xxhash
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from hypothesis.strategies import integers, sampled_from

from tests.vendor_operations import PAGE, refused
from tests.vendor_states import PRE_COPY, PRE_COPY_P2P, RESUMING, RUNNING, STOP, STOP_COPY, Machine, machine
from vfiostream.uapi.vfio import MigrationState
from vfiostream.vendor.capture import CONFIG_HEADER
from vfiostream.vendor.stream import BLOCK_HEADER, parse_block_head

MOST_STATES = [("stop-copy",), ("stop-copy", "pre-copy"), ("stop-copy", "p2p", "pre-copy")]


@pytest.mark.parametrize("names", MOST_STATES, ids="+".join)
@pytest.mark.parametrize("memory", [64 * PAGE, 0])
@pytest.mark.parametrize("most", [1 << 20, 4099, 100])
def test_the_whole_way(names: tuple[str, ...], memory: int, most: int) -> None:
    with (
        machine(seed=1, states=names, memory=memory) as source,
        machine(seed=2, states=names, memory=memory) as target,
    ):
        stream = b""
        if "pre-copy" in names:
            source.go(PRE_COPY)
            for _ in range(3):
                stream += source.read_all(most)
                source.device.workload.write(5)
        source.go(STOP_COPY)
        stream += source.read_all(most)
        assert source.read() == b""
        target.go(RESUMING)
        for at in range(0, len(stream), most):
            target.driver.write_data(stream[at : at + most])
        target.go(STOP)
        assert target.digest == source.digest
        target.go(RUNNING)


def test_a_config_larger_than_a_block() -> None:
    sizes = {"config": 3 << 20, "config_region": 4 << 20}
    with machine(seed=1, **sizes) as source, machine(seed=2, **sizes) as target:
        source.go(STOP_COPY)
        target.go(RESUMING)
        target.driver.write_data(source.read_all())
        target.go(STOP)
        assert target.digest == source.digest


def test_a_round_ends_though_more_has_changed() -> None:
    with machine() as one:
        one.go(PRE_COPY)
        first = one.read_all()
        one.device.workload.write(1)
        second = one.read_all()
        assert len(first) > 64 * PAGE > 3 * PAGE > len(second) > PAGE
        for _ in range(2):
            with refused(errno.ENOMSG):
                one.read()
        one.device.workload.write(1)
        assert one.read(10)
        one.device.workload.write(1)
        assert len(one.read_all()) < 3 * PAGE
        assert len(one.read_all()) < 3 * PAGE
        assert one.read_all() == b""


@pytest.mark.parametrize("way", [(RUNNING,), (STOP, RUNNING), (STOP_COPY, RUNNING), (PRE_COPY_P2P, RUNNING)])
def test_a_session_that_was_left_is_forgotten(way: tuple[MigrationState, ...]) -> None:
    with machine() as one:
        one.go(PRE_COPY)
        one.read_all()
        one.go(*way)
        with refused(errno.EINVAL):
            one.read()
        one.go(PRE_COPY)
        assert len(one.read_all()) > 64 * PAGE


def test_a_device_that_was_loaded_is_saved_whole() -> None:
    with machine(seed=1) as source, machine(seed=2) as middle, machine(seed=3) as target:
        for one, other in ((source, middle), (middle, target)):
            one.go(PRE_COPY)
            stream = one.read_all()
            one.go(STOP_COPY)
            stream += one.read_all()
            other.go(RESUMING)
            other.driver.write_data(stream)
            other.go(RUNNING)
        assert source.digest == target.digest


# ---- streams that are not to be loaded


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


def make_stream() -> bytes:
    with machine(seed=1, memory=600 * PAGE, pattern="sequential") as source:
        source.go(PRE_COPY)
        stream = source.read_all()
        source.device.workload.write(3)
        source.go(STOP_COPY)
        return stream + source.read_all()


@pytest.fixture(scope="module")
def blocks() -> list[bytes]:
    """The blocks of a stream: one whole capture in three, a dirty one, and the config."""
    stream, found = make_stream(), []
    while stream:
        size = BLOCK_HEADER.size + parse_block_head(stream[: BLOCK_HEADER.size]).length
        found.append(stream[:size])
        stream = stream[size:]
    assert len(found) == 5
    return found


@contextmanager
def loading(**changes: Any) -> Iterator[Machine]:
    with machine(**{"seed": 2, "memory": 600 * PAGE, **changes}) as target:
        target.go(RESUMING)
        yield target


def refuse_load(target: Machine, stream: bytes) -> None:
    """``stream`` is refused, when it is written or at its end; and the device runs only after a reset."""
    with pytest.raises(OSError, match=r"\[Errno"):
        for at in range(0, len(stream), 100_000):
            target.driver.write_data(stream[at : at + 100_000])
        target.go(STOP)
    for state in (STOP, RUNNING):
        with refused(errno.EINVAL):
            target.go(state)
    assert target.state is RESUMING
    target.device.reset()
    assert target.state is RUNNING


def test_the_blocks_are_loaded_as_they_are(blocks: list[bytes]) -> None:
    with loading() as target:
        target.driver.write_data(b"".join(blocks))
        target.go(RUNNING)


def test_nothing_at_all_is_no_stream() -> None:
    with loading() as target:
        refuse_load(target, b"")


@pytest.mark.parametrize("one", range(5))
def test_a_stream_that_lacks_a_block(blocks: list[bytes], one: int) -> None:
    with loading() as target:
        refuse_load(target, b"".join(blocks[:one] + blocks[one + 1 :]))


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(range(5), 2)))
def test_a_stream_in_another_order(blocks: list[bytes], one: int, other: int) -> None:
    swapped = blocks[:]
    swapped[one], swapped[other] = blocks[other], blocks[one]
    with loading() as target:
        refuse_load(target, b"".join(swapped))


@pytest.mark.parametrize("one", range(5))
def test_a_stream_with_a_block_twice(blocks: list[bytes], one: int) -> None:
    with loading() as target:
        refuse_load(target, b"".join(blocks[: one + 1] + blocks[one:]))


@pytest.mark.parametrize("one", range(5))
def test_a_stream_with_a_block_of_another(blocks: list[bytes], one: int) -> None:
    stream = make_stream()
    assert len(stream) == sum(len(block) for block in blocks)
    start = sum(len(block) for block in blocks[:one])
    foreign = stream[start : start + len(blocks[one])]
    with loading() as target:
        refuse_load(target, b"".join([*blocks[:one], foreign, *blocks[one + 1 :]]))


@pytest.mark.parametrize("at", [0, 8, 10, 12, 14, 16, 24, 32, 40, 56, 71, 72, 300, -1])
@pytest.mark.parametrize("one", range(5))
def test_a_stream_that_was_damaged(blocks: list[bytes], one: int, at: int) -> None:
    damaged = flipped(blocks[one], at % len(blocks[one]))
    with loading() as target:
        refuse_load(target, b"".join([*blocks[:one], damaged, *blocks[one + 1 :]]))


def test_a_damaged_block_does_not_reach_the_memory(blocks: list[bytes]) -> None:
    with loading() as target:
        digest = target.digest
        with refused(errno.EBADMSG):
            target.driver.write_data(flipped(blocks[0], len(blocks[0]) - 1))
        assert target.digest == digest


@pytest.mark.parametrize("cut", [1, 71, 73, 600, 5000])
def test_a_stream_that_was_cut(blocks: list[bytes], cut: int) -> None:
    with loading() as target:
        refuse_load(target, b"".join(blocks)[:-cut])


def test_a_stream_that_was_cut_may_still_be_completed(blocks: list[bytes]) -> None:
    with loading() as target:
        stream = b"".join(blocks)
        target.driver.write_data(stream[:-9])
        with refused(errno.EINVAL):
            target.go(STOP)
        target.driver.write_data(stream[-9:])
        target.go(STOP)


def test_a_stream_that_goes_on(blocks: list[bytes]) -> None:
    for more in (b"x", blocks[-1]):
        with loading() as target:
            refuse_load(target, b"".join(blocks) + more)


@pytest.mark.parametrize("changes", [{"memory": 599 * PAGE}, {"memory": 601 * PAGE}, {"memory": 0}, {"config": 511}])
def test_a_stream_of_a_device_that_is_not_like_this(blocks: list[bytes], changes: dict[str, int]) -> None:
    with loading(**changes) as target:
        refuse_load(target, b"".join(blocks))


def test_a_stream_without_memory_for_a_device_with() -> None:
    with machine(memory=0) as source, loading() as target:
        source.go(STOP_COPY)
        refuse_load(target, source.read_all())


# ---- the format


def test_golden_bytes() -> None:
    """What is written, byte by byte, but for the nonce that is drawn; see the table in ``vendor/stream.py``."""
    with machine(memory=PAGE, config=16, data="zeros") as source:
        source.go(STOP_COPY)
        stream = source.read_all()
    nonce = stream[40:56]
    assert any(nonce)
    capture, config = stream[72 : 72 + 2 * PAGE], stream[2 * 72 + 2 * PAGE :]
    assert len(config) == CONFIG_HEADER.size + 16
    assert capture[:10].hex() == "5646535245464d0a0100"  # in the format of capture.py
    assert config[:10].hex() == "564653524546430a0100"
    first = bytes.fromhex(
        "564653524546420a" "0100" "0100" "00200000" "0000000000000000" "0020000000000000" "0000000000000000"
    )  # fmt: skip
    second = bytes.fromhex(
        "564653524546420a" "0100" "0200" "48000000" "0100000000000000" "4800000000000000" "0000000000000000"
    )  # fmt: skip
    expected = b""
    for head, payload in ((first, capture), (second, config)):
        expected += head + nonce + xxhash.xxh3_128_digest(head + nonce + bytes(16) + payload) + payload
    assert stream == expected


# ---- whatever a client does


class AnyClient(RuleBasedStateMachine):
    """A client that reads as much as it likes, and changes states as it likes, never ends up with stale memory, if
    what it has is all that a session gave.
    """

    def __init__(self) -> None:
        super().__init__()
        self.contexts = [machine(memory=24 * PAGE, seed=1), machine(memory=24 * PAGE, seed=2)]
        self.source, self.target = (context.__enter__() for context in self.contexts)
        self.stream = b""

    @rule(count=integers(1, 20))
    def write(self, count: int) -> None:
        if self.source.state not in (STOP, STOP_COPY):
            self.source.device.workload.write(count)

    @rule(state=sampled_from((RUNNING, STOP, PRE_COPY, PRE_COPY_P2P)))
    def change_state(self, state: MigrationState) -> None:
        self.source.go(state)
        if state in (RUNNING, STOP):
            self.stream = b""

    @precondition(lambda self: self.source.state in (PRE_COPY, PRE_COPY_P2P))
    @rule(most=sampled_from((1, 71, PAGE, 30 * PAGE)))
    def read(self, most: int) -> None:
        before = self.source.driver.precopy_info()
        try:
            piece = self.source.read(most)
        except OSError as error:
            assert error.errno == errno.ENOMSG  # noqa: PT017 - the end for now, or a round's
        else:
            assert sum(before[1:]) > 0
            self.stream += piece

    @rule(step=sampled_from((1 << 20, 999)))
    def move(self, step: int) -> None:
        self.source.go(STOP_COPY)
        stream = self.stream + self.source.read_all()
        self.target.go(RESUMING)
        for at in range(0, len(stream), step):
            self.target.driver.write_data(stream[at : at + step])
        self.target.go(STOP)
        assert self.target.digest == self.source.digest
        self.source.go(RUNNING)
        self.stream = b""

    def teardown(self) -> None:
        for context in self.contexts:
            context.__exit__(None, None, None)


AnyClient.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAnyClient = AnyClient.TestCase
