"""Whole migrations between two reference devices in this process."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from tests.movers import MIB, SMALL, contents, guest, machines
from vfiostream.migrate import receive, send
from vfiostream.pipeline.progress import Summary
from vfiostream.transports.memory import memory_pair
from vfiostream.uapi.four_region import State

pytestmark = pytest.mark.anyio


async def test_a_busy_device_moves() -> None:
    with guest((0, MIB), (1 << 32, 2 * MIB)) as ours, guest((0, MIB), (1 << 32, 2 * MIB)) as theirs:
        async with machines(replace(SMALL, dirty_rate=4 * MIB)) as (source, target):
            here, there = memory_pair(MIB)
            results: list[Summary] = []

            async def take() -> None:
                results.append(await receive(target.device, there, guest=theirs))

            with anyio.fail_after(30):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(take)
                    sent = await send(source.device, here, guest=ours)
            assert source.state is State.STOP
            assert target.state is State.RUNNING
            assert source.digest == target.digest
            assert contents(ours) == contents(theirs)
            assert any(contents(ours)[0])
            assert sent.rounds == results[0].rounds >= 2
            assert sent.content == results[0].content
