"""What goes to its end, whatever is cancelled in the meantime.

A shielded cancel scope keeps anyio's cancellations out, but not asyncio's own ``Task.cancel()``, which is what
``asyncio.wait_for`` and ``asyncio.run`` on Ctrl-C use. A task group does: it waits for its child even then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from vfiostream.errors import VfiostreamError

T = TypeVar("T")


async def to_the_end(work: Callable[[], Awaitable[T]]) -> T:
    """Do ``work`` and return what it returns, or raise the VfiostreamError that it raises. A cancellation that comes
    meanwhile has come too late: anyio's is delivered afterwards, asyncio's own is forgotten. ``work`` is bounded in
    time.
    """
    results: list[T] = []
    errors: list[VfiostreamError] = []

    async def child() -> None:
        with anyio.CancelScope(shield=True):
            try:
                results.append(await work())
            except VfiostreamError as error:
                errors.append(error)

    try:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(child)
    except anyio.get_cancelled_exc_class():
        if not results and not errors:
            raise
    if errors:
        raise errors[0]
    return results[0]
