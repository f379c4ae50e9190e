"""Tasks of a link: shielded from whoever cancels the body, ended with it, and never the body's trouble."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from vfiostream.transports.background import background

pytestmark = pytest.mark.anyio


async def test_they_go_on_while_the_body_is_cancelled_and_end_with_it() -> None:
    asked, answered, ended = anyio.Event(), anyio.Event(), anyio.Event()

    async def answer() -> None:
        try:
            await asked.wait()
            answered.set()
            await anyio.sleep_forever()
        finally:
            ended.set()

    with anyio.fail_after(10), anyio.CancelScope() as scope:
        async with background(answer):
            await anyio.lowlevel.checkpoint()
            scope.cancel()
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    asked.set()
                    await answered.wait()
                    assert not ended.is_set()
    assert scope.cancelled_caught
    assert ended.is_set()


@pytest.mark.parametrize("cancel", [False, True])
async def test_what_the_body_raises_comes_as_it_is(cancel: bool) -> None:
    problem = ValueError("the body's own")
    with pytest.raises(ValueError, match="own") as caught:
        with anyio.CancelScope() as scope:
            async with background(anyio.sleep_forever) as tasks:
                tasks.start_soon(anyio.sleep, 3600)
                await anyio.wait_all_tasks_blocked()
                if cancel:
                    scope.cancel()
                raise problem
    assert caught.value is problem


async def test_nothing_is_started_any_more_at_the_end() -> None:
    begun = []

    async def begin() -> None:
        begun.append(True)
        await anyio.sleep_forever()

    with anyio.fail_after(10):
        async with background() as tasks:
            tasks.end()
            tasks.start_soon(begin)
            await anyio.wait_all_tasks_blocked()
            assert begun == []


async def test_a_defect_in_a_task_is_raised() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(BaseExceptionGroup) as caught:
        async with background(fail):
            await anyio.sleep_forever()
    assert caught.group_contains(ZeroDivisionError)
