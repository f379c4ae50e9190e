"""Threads that work for the event loop: order, errors, cancellation, and nothing that is left behind."""

from __future__ import annotations

import asyncio
import gc
import mmap
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from vfiostream.pipeline.workers import Workers

pytestmark = pytest.mark.anyio
WAIT = 20
"""Seconds after which something that is waited for will not come any more."""


class Wall(Exception):
    pass


class Results:
    """What was delivered, and a way to wait for it."""

    def __init__(self) -> None:
        self.got: list[object] = []
        self._more = anyio.Event()

    def __call__(self, result: object) -> None:
        self.got.append(result)
        self._more.set()

    async def wait(self, count: int) -> None:
        with anyio.fail_after(WAIT):
            while len(self.got) < count:
                self._more = anyio.Event()
                await self._more.wait()


class Gate:
    """A job that a test holds; and whether it was entered, and left."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.left = False

    def __call__(self, context: object) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT)
        self.left = True

    async def reached(self) -> None:
        assert await anyio.to_thread.run_sync(self.entered.wait, WAIT)


def held(gate: Gate, result: object, context: object) -> object:
    gate(context)
    return result


def same(number: int, _: object) -> int:
    return number


def ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "vfiostream-worker"}


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def nothing_left() -> object:
    before = ours()
    yield
    assert ours() == before


@asynccontextmanager
async def running(workers: Workers[object]) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(workers.run)
        yield
        tasks.cancel_scope.cancel()


async def test_results_arrive_in_the_thread_of_the_loop() -> None:
    workers = Workers[object](object, 2)
    results, places = Results(), set()

    def done(result: int) -> None:
        places.add(threading.current_thread())
        results(result)

    async with running(workers):
        for number in range(500):
            workers.submit(partial(same, number), done)
        await results.wait(500)
    assert set(results.got) == set(range(500))
    assert len(results.got) == 500
    assert places == {threading.current_thread()}


async def test_one_thread_keeps_the_order_and_takes_what_was_submitted_before_it_ran() -> None:
    workers = Workers[object](object, 1)
    results = Results()
    for number in range(100):
        workers.submit(partial(same, number), results)
    async with running(workers):
        await results.wait(100)
    assert results.got == list(range(100))


async def test_what_ends_first_comes_first() -> None:
    workers = Workers[object](object, 2)
    results, gate = Results(), Gate()
    async with running(workers):
        workers.submit(gate, lambda _: results("slow"))
        await gate.reached()
        workers.submit(lambda _: "quick", results)
        await results.wait(1)
        gate.opened.set()
        await results.wait(2)
    assert results.got == ["quick", "slow"]


async def test_each_thread_makes_one_context_and_keeps_it() -> None:
    made: list[tuple[threading.Thread, object]] = []

    def make() -> object:
        made.append((threading.current_thread(), object()))
        return made[-1][1]

    workers = Workers(make, 2)
    results = Results()
    gates = [Gate(), Gate()]
    async with running(workers):
        for gate in gates:
            workers.submit(gate, results)
        for gate in gates:
            await gate.reached()
            gate.opened.set()
        for _ in range(20):
            workers.submit(lambda context: (threading.current_thread(), context), results)
        await results.wait(22)
    assert len(made) == 2
    assert len({thread for thread, _ in made}) == 2
    assert {pair for pair in results.got if pair is not None} <= set(made)


async def test_done_may_submit_more() -> None:
    workers = Workers[object](object, 1)
    results = Results()

    def again(left: int) -> None:
        if left:
            workers.submit(lambda _: left - 1, again)
        results(left)

    async with running(workers):
        workers.submit(lambda _: 30, again)
        await results.wait(31)
    assert results.got == list(range(30, -1, -1))


def boom(*_: object) -> None:
    raise Wall("here")


@pytest.mark.parametrize("where", ["make", "job", "done"])
async def test_what_fails_is_raised_from_run(where: str) -> None:
    workers = Workers[object](boom if where == "make" else object, 2)
    workers.submit(boom if where == "job" else lambda _: None, boom if where == "done" else lambda _: None)
    with anyio.fail_after(WAIT):
        with pytest.raises(Wall, match="here"):
            await workers.run()


async def test_after_a_failure_no_job_starts_and_the_one_that_runs_is_waited_for() -> None:
    workers = Workers[object](object, 2)
    gate = Gate()
    failed = anyio.Event()
    late: list[object] = []

    async def run() -> None:
        with pytest.raises(Wall):
            await workers.run()
        assert gate.left

    def fail(_: object) -> None:
        failed.set()
        boom()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        workers.submit(gate, late.append)
        await gate.reached()
        workers.submit(lambda _: None, fail)
        await failed.wait()
        await anyio.wait_all_tasks_blocked()
        workers.submit(lambda _: late.append("started"), late.append)
        assert not gate.left
        gate.opened.set()
    assert late == []


async def test_cancelled_it_waits_for_what_runs_and_starts_nothing() -> None:
    workers = Workers[object](object, 1)
    gate = Gate()
    late: list[object] = []
    ended = anyio.Event()

    async def run() -> None:
        try:
            await workers.run()
        finally:
            assert gate.left
            ended.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        workers.submit(gate, late.append)
        workers.submit(lambda _: late.append("started"), late.append)
        await gate.reached()
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()
            assert not ended.is_set()
            gate.opened.set()
            with anyio.fail_after(WAIT):
                await ended.wait()
    assert late == []


async def test_cancelled_before_it_begins_it_leaves_nothing() -> None:
    workers = Workers[object](object, 2)
    workers.submit(lambda _: None, lambda _: None)
    before = descriptors()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await workers.run()
    assert scope.cancelled_caught
    assert descriptors() == before


def test_asyncios_own_cancellation_waits_for_what_runs_too() -> None:
    async def main() -> None:
        workers = Workers[object](object, 1)
        gate = Gate()
        workers.submit(gate, lambda _: None)
        task = asyncio.create_task(workers.run())
        await gate.reached()
        for _ in range(3):
            task.cancel()
            await anyio.wait_all_tasks_blocked()
            assert not task.done()
        gate.opened.set()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), WAIT)
        assert gate.left

    asyncio.run(main())


async def test_threads_that_others_hold_do_not_keep_it_from_ending() -> None:
    workers = Workers[object](object, 1)
    hold = threading.Event()
    limiter = anyio.to_thread.current_default_thread_limiter()
    tokens = limiter.total_tokens
    async with anyio.create_task_group() as tasks:
        limiter.total_tokens = 1
        try:
            tasks.start_soon(anyio.to_thread.run_sync, hold.wait, WAIT)
            await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(WAIT / 2):
                async with running(workers):
                    pass
        finally:
            hold.set()
            limiter.total_tokens = tokens


async def test_a_thread_that_waits_does_not_hold_what_it_worked_on() -> None:
    workers = Workers[object](object, 1)
    results = Results()
    async with running(workers):
        area = mmap.mmap(-1, 4096)
        workers.submit(reader(area), results)
        await results.wait(1)
        # A view of it that somebody still has makes this raise BufferError.
        area.close()
    assert results.got == [0]


def reader(area: mmap.mmap) -> Callable[[object], int]:
    view = memoryview(area)
    return lambda _: view[0]


async def test_what_was_not_delivered_or_not_started_is_let_go_of() -> None:
    workers = Workers[object](object, 1)
    gate = Gate()

    class Content:
        def job(self, _: object) -> Content:
            return self

    contents = [Content() for _ in range(4)]
    gone = [weakref.ref(content) for content in contents]
    gc.collect()  # of tests before
    before = descriptors()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(workers.run)
        workers.submit(partial(held, gate, contents[0]), lambda _: None)
        for content in contents[1:3]:
            workers.submit(content.job, lambda _: None)
        await gate.reached()
        tasks.cancel_scope.cancel()
        gate.opened.set()
    workers.submit(contents[3].job, lambda _: None)
    del contents, content
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
    assert descriptors() == before
