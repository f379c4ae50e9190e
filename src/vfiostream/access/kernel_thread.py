"""The one thread in which an access calls the kernel: a call may take as long as the device likes.

A thread of its own and not one of a pool: a slow device then holds up nobody but itself, and calls stay in order. A
call costs one wake-up each way: 30 to 38 microseconds (asyncio 36, uvloop 31, trio 30; a pool of anyio's 41, 34, 48).

Invariants:

- Calls start in the order in which they are made, one at a time, and each runs to its end: a thread can't be taken out
  of the kernel. Cancellation waits for it. Who waits no longer than the time limit leaves the call *owed*: the next
  one waits for it first.
- What the access holds is closed by the thread itself, as its last work. So nothing is closed, and no memory unmapped,
  while a call runs, also where nobody waits for that any more.
- While it has nothing to do the thread holds nothing of the call it did last: a buffer of that can be unmapped then.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import TypeVar, cast

import anyio
import anyio.lowlevel
import anyio.to_thread

from vfiostream.ending import to_the_end
from vfiostream.errors import DeviceLost, DeviceTimeout

logger = logging.getLogger("vfiostream.access")

T = TypeVar("T")


class _Call:
    """Work that a thread does once, and what came of it."""

    def __init__(self, operation: str, work: Callable[[], object]) -> None:
        self.operation = operation
        self.work: Callable[[], object] | None = work
        self.value: object = None
        self.error: BaseException | None = None
        self.done = False

    def do(self) -> None:
        assert self.work is not None
        try:
            self.value = self.work()
        except BaseException as error:  # noqa: BLE001 - raised where the call is waited for
            self.error = error
        self.work = None
        self.done = True


class KernelThread:
    """A thread that runs from here until :meth:`aclose`; ``close`` is its last work, and raises nothing."""

    def __init__(self, name: str, close: Callable[[], None], timeout: float) -> None:
        """``timeout``: seconds that is waited for a call, or for the end."""
        self.name = name
        self._timeout = timeout
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._owed: _Call | None = None
        """What the thread does, or has done and nobody has looked at."""
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # The fast acquire saves a turn of the event loop for each call; a call waits for the thread anyway.
        self._lock = anyio.Lock(fast_acquire=True)
        self._closed = False
        # A daemon: a call that the kernel never ends must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, args=(close,), name="vfiostream-kernel", daemon=True)
        self._thread.start()

    async def call(self, operation: str, work: Callable[[], T]) -> T:
        """Have ``work`` done in the thread; returns what it returns and raises what it raises.

        Raises :class:`~vfiostream.errors.DeviceTimeout` where it takes longer than the time limit, and goes on: what
        ``work`` was given stays in use until a later call returns. Raises :class:`~vfiostream.errors.DeviceLost` after
        :meth:`aclose`.
        """
        async with self._lock:
            await anyio.lowlevel.checkpoint_if_cancelled()  # nothing is begun for a call that's already cancelled
            self._check()
            deadline = anyio.current_time() + self._timeout
            if self._owed is not None:
                await self._settle(self._owed, deadline)
                self._check()
            call = self._owed = _Call(operation, work)
            del work
            self._calls.put(call)
            await self._settle(call, deadline)
        if call.error is not None:
            raise call.error
        return cast(T, call.value)

    async def call_to_the_end(self, work: Callable[[], None]) -> None:
        """As :meth:`call`, whatever is cancelled meanwhile, for clean-up that ``aclose`` does if this can't: raises
        nothing.
        """

        async def to_its_end() -> None:
            try:
                await self.call("clean-up", work)
            except (DeviceLost, DeviceTimeout):
                pass

        await to_the_end(to_its_end)

    async def aclose(self) -> None:
        """Have the thread close what it holds and end, after the call that runs. Where that takes longer than the time
        limit this returns, and the thread does it later. Never raises; may be called again and under cancellation.
        """
        if not self._closed:
            self._closed = True
            self._calls.put(None)
        await to_the_end(self._end)

    def _check(self) -> None:
        if self._closed:
            raise DeviceLost(f"{self.name} was closed; open the device again")

    async def _settle(self, call: _Call, deadline: float) -> None:
        """Wait for ``call``; under cancellation too, which is raised then."""
        try:
            await self._until(deadline, call)
        except anyio.get_cancelled_exc_class():
            await to_the_end(partial(self._until, deadline, call))
            raise
        finally:
            if call.done:
                self._owed = None
        if not call.done:
            raise DeviceTimeout(
                f"{self.name}: {call.operation} has not ended within {self._timeout:g} s; the kernel still works at "
                "it, and the device can be used again when it has: see the kernel's log"
            )

    async def _until(self, deadline: float, call: _Call) -> None:
        with anyio.CancelScope(deadline=deadline):
            await self._answered(call)

    async def _answered(self, call: _Call) -> None:
        while not call.done:
            await anyio.wait_readable(self._bell)
            try:
                os.eventfd_read(self._bell)
            except BlockingIOError:
                pass  # it rang for a call that ended while it was looked at

    async def _end(self) -> None:
        # A limiter of its own: nobody may have to wait here for others who use threads.
        join = partial(self._thread.join, self._timeout)
        await anyio.to_thread.run_sync(join, limiter=anyio.CapacityLimiter(1))
        if self._thread.is_alive():
            # The bell stays open with the thread, which will ring it.
            logger.warning("%s: closed before the kernel has ended a call; the thread does the rest later", self.name)
            return
        async with self._lock:  # who waits for the last call looks at the bell
            if self._bell >= 0:
                os.close(self._bell)
                self._bell = -1

    def _run(self, close: Callable[[], None]) -> None:
        while (call := self._calls.get()) is not None:
            call.do()
            del call
            os.eventfd_write(self._bell, 1)
        close()
