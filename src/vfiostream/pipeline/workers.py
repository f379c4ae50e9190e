"""Threads that do work for the event loop: long-lived, each with a context of its own (a zstd compressor, say).

Invariants:

- The loop and the threads share two queues, a flag and nothing else. A job goes into one queue, its result into the
  other, and an eventfd tells the loop, under any of its backends, that results are there. The result is there before
  the eventfd is written, and the eventfd is read before the results are taken: none is overlooked, and one wake-up may
  bring many.
- Jobs start in the order of their submission; the results come in the order in which the jobs end.
- A thread with nothing to do blocks in its queue, and holds nothing of the job it did last: a mapping that the job
  worked on can be closed then.
- When :meth:`Workers.run` ends, for whatever reason, no job starts any more, and it returns when every thread has
  ended: a thread that touches mapped memory is never left alone with it.

Nothing here is bounded: what a job holds comes from the byte budget, so that bounds how many there are.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeVar, cast

import anyio
import anyio.to_thread

from vfiostream.ending import to_the_end

Context = TypeVar("Context")
Result = TypeVar("Result")


MOST_THREADS = 16
"""More would outrun what copying, checking and the link can do beside them."""


def threads() -> int:
    """How many threads there should be for work that keeps a core busy: one for each core that this process may use."""
    return min(len(os.sched_getaffinity(0)), MOST_THREADS)


class _Job(NamedTuple):
    work: Callable[[object], object]
    done: Callable[[object], None]


class _Result(NamedTuple):
    done: Callable[[object], None]
    value: object
    error: BaseException | None


class Workers(Generic[Context]):
    """``count`` threads, each with its own context, which ``make`` makes in it when its first job comes. Used once:
    :meth:`run`.
    """

    def __init__(self, make: Callable[[], Context], count: int) -> None:
        self._make = make
        self.count = count
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._results: deque[_Result] = deque()
        self._off = False

    def submit(self, job: Callable[[Context], Result], done: Callable[[Result], None]) -> None:
        """Have ``job`` done in a thread, with its context, and then ``done`` called with the result in the event loop.
        May be called before :meth:`run`; what is left when that ends is let go of, and so is what comes later.
        """
        if not self._off:
            self._jobs.put(_Job(cast("Callable[[object], object]", job), cast("Callable[[object], None]", done)))

    async def run(self) -> None:
        """A task: has the jobs done until it is cancelled. Raises what ``make``, a job or its ``done`` raises; the
        first of it, where it is more. Whoever gives jobs that do not end is not cancelled either.
        """
        bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        threads = [
            threading.Thread(target=self._work, args=(bell,), name="vfiostream-worker") for _ in range(self.count)
        ]
        try:
            for thread in threads:
                thread.start()
            while True:
                await anyio.wait_readable(bell)
                os.eventfd_read(bell)
                while self._results:
                    _deliver(self._results.popleft())
        finally:
            self._off = True
            for _ in threads:
                self._jobs.put(None)
            await to_the_end(partial(_join, threads))
            os.close(bell)
            self._results.clear()
            while not self._jobs.empty():
                self._jobs.get()

    def _work(self, bell: int) -> None:
        context: Context | None = None
        while (job := self._jobs.get()) is not None and not self._off:
            try:
                if context is None:
                    context = self._make()
                result = _Result(job.done, job.work(context), None)
            except BaseException as error:  # noqa: BLE001 - raised from run
                result = _Result(job.done, None, error)
            self._results.append(result)
            # While this waits for the next one, whoever gave the job may want its memory back.
            del job, result
            os.eventfd_write(bell, 1)


def _deliver(result: _Result) -> None:
    if result.error is not None:
        raise result.error
    result.done(result.value)


async def _join(threads: list[threading.Thread]) -> None:
    # A limiter of its own: here nobody may have to wait for others who use threads.
    await anyio.to_thread.run_sync(_join_all, threads, limiter=anyio.CapacityLimiter(1))


def _join_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        if thread.ident is not None:
            thread.join()
