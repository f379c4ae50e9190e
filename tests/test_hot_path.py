"""The path of a byte: where it is copied, what of zeros is sent, and that the same bytes arrive whichever way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import anyio
import pytest

from tests.movers import MIB, SMALL, guest, machines
from tests.test_migrate import Rounds, move, refuse
from vfiostream.buffers import Buffer
from vfiostream.errors import GuestError
from vfiostream.guest import PAGE_SIZE, Guest, GuestRange
from vfiostream.migrate import receive, send
from vfiostream.pipeline import outbound
from vfiostream.pipeline.settings import Settings
from vfiostream.policy import RoundReport, Verdict
from vfiostream.transports.memory import memory_pair

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("mmap", ["whole", "sparse", "none"])
async def test_device_memory_is_copied_only_where_that_pays(
    copies: bool, mmap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "WORTH_A_COPY", -1.0 if copies else 1.0)
    device = replace(SMALL, mmap=mmap)  # type: ignore[arg-type]
    async with machines(device) as (source, target):
        sent, _ = await move(source, target)
        # What can't be mapped is read into the budget in any case.
        assert (sent.peak_buffers > 0) == (copies or mmap != "whole")


@pytest.mark.parametrize("level", [0, 1])
async def test_a_driver_that_takes_its_time(level: int) -> None:
    async with machines(replace(SMALL, chunk_time=0.002)) as (source, target):
        await move(source, target, policy=Rounds(2), ours=Settings(compression=level))


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("mmap", ["whole", "none"])
@pytest.mark.parametrize("compression", [0, 1])
async def test_zeros_are_nobodys_choice(
    compression: int, mmap: str, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "WORTH_A_COPY", -1.0 if copies else 1.0)
    async with machines(replace(SMALL, data="zeros", mmap=mmap)) as (source, target):  # type: ignore[arg-type]
        sent, _ = await move(source, target, ours=Settings(compression=compression))
        assert sent.compression is not None
        # What begins with the head of the capture, and the config: the other chunks of memory are zeros.
        assert sum(use.chunks for use in sent.compression.uses.values()) == 3


class Busy(Guest):
    """A guest whose every third page is dirty in each round but the first."""

    async def merge_dirty(self, address: int, pages: int, bitmap: memoryview) -> None:
        await anyio.lowlevel.checkpoint()
        for page in range(0, pages, 3):
            bitmap[page >> 3] |= 1 << (page & 7)


@pytest.fixture
def scattered() -> Iterator[tuple[Guest, Guest]]:
    """2 MiB whose every eighth page is in use, and as much that is not zeros yet."""
    with guest((0, 2 * MIB), kind=Busy) as ours, guest((0, 2 * MIB)) as theirs:
        for at in range(0, 2 * MIB, 8 * PAGE_SIZE):
            ours.ranges[0].view[at : at + PAGE_SIZE] = os.urandom(PAGE_SIZE)
        theirs.ranges[0].view[:] = os.urandom(2 * MIB)
        yield ours, theirs


async def test_pages_of_zeros_cost_no_bandwidth(scattered: tuple[Guest, Guest]) -> None:
    async with machines(replace(SMALL, memory=0)) as (source, target):
        sent, _ = await move(source, target, memory=scattered, policy=Rounds(2))
        assert sent.rounds == 3
        used = 2 * MIB // (8 * PAGE_SIZE)
        assert sent.content > 2 * MIB
        # Once all that is used, twice a third of it; and less than a page for each of the records around it.
        assert sent.transferred < (used + 2 * (used // 3 + 1) + 12) * PAGE_SIZE


@pytest.mark.parametrize("present", [False, True])
async def test_memory_that_is_present_is_not_written_through_its_file(
    present: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write = GuestRange.write

    def watched(self: GuestRange, start: int, data: Buffer) -> None:
        written.append(len(data))
        write(self, start, data)

    monkeypatch.setattr(GuestRange, "write", watched)
    with guest((0, 8 * MIB)) as ours, guest((0, 8 * MIB)) as theirs:
        ours.ranges[0].view[:] = os.urandom(8 * MIB)
        if present:
            theirs.ranges[0].make_present()
        async with machines(replace(SMALL, memory=0)) as (source, target):
            await move(source, target, memory=(ours, theirs))
    assert sum(written) == (0 if present else 8 * MIB)


@pytest.mark.parametrize("chunk", [64 * 1024, MIB])
async def test_pages_that_lie_scattered_reach_their_places(scattered: tuple[Guest, Guest], chunk: int) -> None:
    async with machines() as (source, target):
        await move(source, target, memory=scattered, policy=Rounds(2), ours=Settings(chunk=chunk))


async def test_what_nobody_used_stays_unused_on_both_sides() -> None:
    size = 32 * MIB
    with guest((0, size)) as ours, guest((0, size)) as theirs:
        for at in (0, 16 * MIB):
            ours.ranges[0].view[at : at + MIB] = os.urandom(MIB)
        held = os.fstat(ours.ranges[0].fd).st_blocks
        async with machines(replace(SMALL, memory=0)) as (source, target):
            here, there = memory_pair(MIB)
            with anyio.fail_after(30):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(lambda: receive(target.device, there, guest=theirs))
                    await send(source.device, here, guest=ours)
        assert os.fstat(ours.ranges[0].fd).st_blocks == held
        assert os.fstat(theirs.ranges[0].fd).st_blocks * 512 == 2 * MIB
        for at in (0, 16 * MIB):
            assert theirs.ranges[0].view[at : at + MIB] == ours.ranges[0].view[at : at + MIB]


async def test_pages_that_lie_scattered_and_find_no_memory_end_the_migration(
    scattered: tuple[Guest, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Through the mapping they would be a SIGBUS.
    ours, theirs = scattered
    for area in (ours.ranges[0], theirs.ranges[0]):
        area.zero(0, area.length)
    full = GuestError("there is no memory")

    def write(self: GuestRange, start: int, data: Buffer) -> None:
        raise full

    class Late(Rounds):
        def judge(self, report: RoundReport) -> Verdict:
            ours.ranges[0].view[:] = os.urandom(2 * MIB)
            return super().judge(report)

    monkeypatch.setattr(GuestRange, "write", write)
    async with machines(replace(SMALL, memory=0)) as (source, target):
        _, error = await refuse(source, target, memory=scattered, policy=Late(1))
        assert error is full
