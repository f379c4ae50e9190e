"""The byte budget: bounded whatever the sizes, fair, and right under cancellation."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from vfiostream.errors import UsageError
from vfiostream.pipeline.budget import CHARGE, Budget, Lease

pytestmark = pytest.mark.anyio
CHUNK = 1024 * 1024
LIMIT = 5 * CHUNK


async def test_it_waits_for_what_is_out() -> None:
    budget = Budget(LIMIT, CHUNK)
    held = [await budget.take(CHUNK) for _ in range(5)]
    got: list[Lease] = []

    async def more() -> None:
        got.append(await budget.take(CHUNK))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(more)
        await anyio.wait_all_tasks_blocked()
        assert not got
        assert budget.used == LIMIT
        held.pop().release()
    assert len(got) == 1
    assert budget.peak == LIMIT


async def test_a_large_request_is_not_overtaken() -> None:
    budget = Budget(LIMIT, CHUNK)
    first = await budget.take(CHUNK, 3 * CHUNK)
    order: list[str] = []

    async def take(name: str, size: int, more: int) -> None:
        lease = await budget.take(size, more)
        order.append(name)
        lease.release()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take, "large", CHUNK, 4 * CHUNK)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(take, "small", 1, 0)
        await anyio.wait_all_tasks_blocked()
        assert order == []
        first.release()
    assert order == ["large", "small"]


async def test_cancelled_while_it_waits_nothing_is_taken() -> None:
    budget = Budget(LIMIT, CHUNK)
    held = await budget.take(CHUNK, 4 * CHUNK)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(budget.take, 2 * CHUNK)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    held.release()
    assert budget.used == 0
    with anyio.fail_after(5):
        (await budget.take(CHUNK)).release()


async def test_cancelled_when_it_was_just_granted_it_is_given_back() -> None:
    budget = Budget(LIMIT, CHUNK)
    held = await budget.take(CHUNK, 4 * CHUNK)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(budget.take, 2 * CHUNK)
        await anyio.wait_all_tasks_blocked()
        held.release()
        tasks.cancel_scope.cancel()
    await checkpoint()
    assert budget.used in (0, 2 * CHUNK + CHARGE)  # Granted before or after the cancellation came: both are whole.
    if budget.used:
        with anyio.fail_after(5):
            (await budget.take(CHUNK)).release()


async def test_one_cancelled_lets_the_next_go() -> None:
    budget = Budget(LIMIT, CHUNK)
    held = await budget.take(2 * CHUNK)
    scope = anyio.CancelScope()
    done = anyio.Event()

    async def large() -> None:
        with scope:
            await budget.take(CHUNK, 3 * CHUNK)

    async def small() -> None:
        await budget.take(CHUNK)
        done.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(large)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(small)
        await anyio.wait_all_tasks_blocked()
        assert not done.is_set()
        scope.cancel()
        with anyio.fail_after(5):
            await done.wait()
    held.release()
    assert budget.used == CHUNK


async def test_small_things_are_charged_for() -> None:
    budget = Budget(LIMIT, CHUNK)
    lease = await budget.take(1)
    assert (budget.used, len(lease.view)) == (1 + CHARGE, 1)
    lease.release()
    assert budget.used == 0


async def test_memory_is_used_again_and_counted() -> None:
    budget = Budget(LIMIT, CHUNK)
    first = await budget.take(CHUNK)
    first.view[:4] = b"mark"
    first.release()
    again = await budget.take(CHUNK)
    assert bytes(again.view[:4]) == b"mark"
    again.release()
    many = [await budget.take(CHUNK // 4 - CHARGE) for _ in range(20)]
    assert not budget._spare  # All of the limit is out: nothing may lie spare beside it.
    for lease in many:
        lease.release()


async def test_what_is_left_over_is_not_waited_for() -> None:
    budget = Budget(LIMIT, CHUNK)
    one = budget.take_left_over(CHUNK)
    two = budget.take_left_over(CHUNK)
    assert one is not None
    assert two is not None
    assert budget.take_left_over(CHUNK) is None  # half is for those who wait
    assert budget.take_left_over(CHUNK // 2 - CHARGE) is not None
    two.release()
    assert budget.take_left_over(CHUNK, CHUNK) is None
    again = budget.take_left_over(CHUNK)
    assert again is not None
    assert len(again.view) == CHUNK
    again.release()
    one.release()
    assert (budget.used, budget.peak) == (CHUNK // 2, LIMIT // 2)


async def test_nothing_is_left_over_while_somebody_waits() -> None:
    budget = Budget(LIMIT, CHUNK)
    held = await budget.take(CHUNK)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(budget.take, CHUNK, 4 * CHUNK)
        await anyio.wait_all_tasks_blocked()
        assert budget.take_left_over(CHUNK) is None
        held.release()
    assert budget.used == LIMIT


async def test_what_never_fits_is_refused() -> None:
    with pytest.raises(UsageError):
        Budget(CHUNK, CHUNK)
    with pytest.raises(UsageError):
        await Budget(LIMIT, CHUNK).take(LIMIT, 1)
