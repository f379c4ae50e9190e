"""Whose turn it is: in the line alone, and what of it is seen in whole migrations of several devices."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import anyio
import pytest
from hypothesis import given, strategies as st

from tests.between import Between
from tests.movers import MIB, SMALL
from tests.virtual_time import in_virtual_time
from vfiostream.devices.four_region import FourRegionDevice
from vfiostream.migrate import receive, send
from vfiostream.pipeline import outbound, target
from vfiostream.pipeline.bandwidth import Bandwidth
from vfiostream.pipeline.settings import Settings
from vfiostream.pipeline.turns import Turns
from vfiostream.protocol.records import Memory, Record
from vfiostream.protocol.sessions import SourceSession
from vfiostream.transports.memory import memory_pair
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess

T = TypeVar("T")


class OneAtATime:
    """Compressors and decompressors that take a millisecond of virtual time for each chunk, which threads
    do not know."""

    def __init__(self, make: Callable[[], Any], count: int) -> None:
        self._context = make()
        self._jobs: deque[tuple[Any, Any]] = deque()
        self._news = anyio.Event()

    def submit(self, job: Any, done: Any) -> None:
        self._jobs.append((job, done))
        self._news.set()

    async def run(self) -> None:
        while True:
            await self._news.wait()
            self._news = anyio.Event()
            while self._jobs:
                job, done = self._jobs.popleft()
                await anyio.sleep(0.001)
                done(job(self._context))


def is_ready(item: object) -> bool:
    return True


def all_of(turns: Turns[str]) -> str:
    taken = []
    while (item := turns.take(is_ready)) is not None:
        taken.append(item)
    return "".join(taken)


def test_one_stream_keeps_its_order() -> None:
    turns = Turns[str]()
    for number, letter in enumerate("abcdef"):
        turns.put(letter, 1, 5 - number)
    assert len(turns) == 6
    assert all_of(turns) == "abcdef"
    assert turns.take(is_ready) is None


def test_several_streams_take_turns() -> None:
    turns = Turns[str]()
    for _ in range(4):
        turns.put("a", 1, 10)
    for _ in range(4):
        turns.put("b", 2, 10)
    for _ in range(2):
        turns.put("C", 3, 20)  # twice as large, so half as often
    assert all_of(turns) == "abCababCab"


def test_who_comes_late_is_next_and_saves_up_nothing() -> None:
    turns = Turns[str]()
    for _ in range(8):
        turns.put("a", 1, 10)
    for _ in range(4):
        turns.take(is_ready)
    for _ in range(3):
        turns.put("b", 2, 10)
    assert all_of(turns) == "babab" + "aa"


def test_what_is_put_one_at_a_time_takes_turns_with_a_long_line() -> None:
    turns = Turns[str]()
    for _ in range(20):
        turns.put("a", 1, 10)
    taken = ""
    turns.put("b", 2, 10)
    for _ in range(20):
        item = turns.take(is_ready)
        assert item is not None
        taken += item
        if item == "b":
            turns.put("b", 2, 10)
    assert taken == "ab" * 10


def test_nothing_overtakes_a_barrier() -> None:
    turns = Turns[str]()
    for _ in range(3):
        turns.put("a", 1, 10)
    turns.put("|", None, 0)
    turns.put("b", 2, 10)
    turns.put("|", None, 0)
    turns.put("a", 1, 10)
    assert all_of(turns) == "aaa|b|a"


def test_what_is_not_ready_holds_up_its_stream_only() -> None:
    turns = Turns[str]()
    for item, stream in (("x", 1), ("a", 1), ("b", 2), ("|", None), ("c", 2)):
        turns.put(item, stream, 10)
    assert turns.take(lambda item: item != "x") == "b"
    assert turns.take(lambda item: item != "x") is None
    assert all_of(turns) == "xa|c"
    turns.put("a", 1, 10)
    turns.clear()
    assert not turns


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 100), st.integers(0, 2)), max_size=60))
def test_nothing_is_lost_and_each_stream_keeps_its_order(steps: list[tuple[int, int, int]]) -> None:
    turns = Turns[tuple[int, int]]()
    taken = []
    for number, (stream, size, takes) in enumerate(steps):
        turns.put((stream, number), stream or None, size)
        taken += [turns.take(lambda item: item[1] % 3 != 0) for _ in range(takes)]
    done = [item for item in taken if item is not None]
    while (item := turns.take(is_ready)) is not None:
        done.append(item)
    assert Counter(done) == Counter((stream, number) for number, (stream, *_) in enumerate(steps))
    for stream in range(4):
        of_stream = [number for each, number in done if each == stream]
        assert of_stream == sorted(of_stream)
    for at, (stream, number) in enumerate(done):
        if stream == 0:  # a barrier
            assert all(other < number for _, other in done[:at])
            assert all(other > number for _, other in done[at + 1 :])


# ---- of devices

CHUNK = 64 * 1024
DEVICE = replace(SMALL, memory=4 * MIB, memory_region=CHUNK, data="random")
"""64 chunks, each of them a capture's piece by itself."""


class Slow(Between):
    """A driver whose every chunk takes ``seconds``, of virtual time."""

    def __init__(self, driver: ReferenceDevice, seconds: float) -> None:
        super().__init__(InProcessAccess(driver))
        self._seconds = seconds

    async def called(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        if name == "write" and self._seconds:
            await anyio.sleep(self._seconds)
        return await super().called(name, call)


async def order_of(
    monkeypatch: pytest.MonkeyPatch, *devices: tuple[dict[str, Any], float], settings: Settings
) -> list[int]:
    """The streams of the chunks of memory that go out until one of the devices has sent all, in their order."""
    sent: list[int] = []
    plain = SourceSession.send

    def seen(self: SourceSession, record: Record, *payload: Any, **more: Any) -> Any:
        if isinstance(record, Memory):
            sent.append(record.stream)
        return plain(self, record, *payload, **more)

    monkeypatch.setattr(SourceSession, "send", seen)
    async with AsyncExitStack() as stack:
        sides = []
        for seed in (1, 50):
            opened = []
            for number, (changes, seconds) in enumerate(devices):
                driver = ReferenceDevice(replace(DEVICE, seed=seed + number, **changes))
                stack.callback(driver.close)
                access = Slow(driver, seconds if seed == 1 else 0)
                opened.append(await stack.enter_async_context(await FourRegionDevice.open(access)))
            sides.append(opened)
        here, there = memory_pair(MIB)
        with anyio.fail_after(3600):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive, sides[1], there)
                await send(sides[0], here, settings=settings)
    last = DEVICE.memory // CHUNK - 1
    places = [[at for at, stream in enumerate(sent) if stream == number + 1] for number in range(len(devices))]
    return sent[: min(of_device[last] for of_device in places)]


def furthest_apart(order: list[int], *streams: int) -> int:
    """The most chunks by which one of ``streams`` was ahead of another."""
    counts = dict.fromkeys(streams, 0)
    most = 0
    for stream in order:
        counts[stream] += 1
        most = max(most, max(counts.values()) - min(counts.values()))
    return most


IN_PLACE: dict[str, Any] = {"mmap": "whole"}
READ: dict[str, Any] = {"mmap": "none"}


@pytest.mark.parametrize("limit", [None, 20 * MIB])
@pytest.mark.parametrize("compression", [0, 1])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(
    "devices",
    [(IN_PLACE, IN_PLACE), (READ, READ), (IN_PLACE, READ), (READ, IN_PLACE), (READ, IN_PLACE, IN_PLACE, READ)],
)
def test_devices_are_at_about_the_same_position(
    devices: tuple[dict[str, Any], ...],
    copies: bool,
    compression: int,
    limit: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbound, "WORTH_A_COPY", -1.0 if copies else 1.0)
    for module in (outbound, target):
        monkeypatch.setattr(module, "Workers", OneAtATime)
    settings = Settings(chunk=CHUNK, bandwidth=Bandwidth(limit), compression=compression)

    @in_virtual_time
    async def order() -> list[int]:
        return await order_of(monkeypatch, *((device, 0.0) for device in devices), settings=settings)

    assert furthest_apart(order(), *range(1, len(devices) + 1)) <= 3


@pytest.mark.parametrize("slow", [IN_PLACE, READ])
@pytest.mark.parametrize("quick", [IN_PLACE, READ])
def test_a_slow_driver_gets_its_turn_whenever_it_has_something(
    slow: dict[str, Any], quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk takes the link 10 ms, the slow driver 40: it is to have about a fifth of the chunks, not what a budget
    full of the other's leaves over.
    """
    settings = Settings(chunk=CHUNK, bandwidth=Bandwidth(100 * CHUNK))

    @in_virtual_time
    async def order() -> list[int]:
        return await order_of(monkeypatch, (quick, 0.0), (slow, 0.01), settings=settings)

    seen = order()
    at = [number for number, stream in enumerate(seen) if stream == 2]
    assert len(at) >= 5
    assert max(late - early for early, late in pairwise(at)) <= 8
