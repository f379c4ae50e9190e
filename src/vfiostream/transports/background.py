"""What goes on while nobody sends or receives, in the context of ``connect`` or ``listen``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio.abc import TaskGroup


@asynccontextmanager
async def background(*work: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[TaskGroup]:
    """Run each of ``work`` in a task of its own until the block ends, which cancels them, and gives the group for more.
    What the block raises comes out as it is, not in a group.
    """
    failure: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        for one in work:
            tasks.start_soon(one)
        try:
            yield tasks
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:  # noqa: BLE001 - raised below
            failure = error
        finally:
            tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
