"""What has to go on while nobody sends or receives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup


@asynccontextmanager
async def background() -> AsyncIterator[TaskGroup]:
    """A task group that ends with its context. Unlike anyio's it leaves what is raised in there as it is; its tasks
    must raise nothing.
    """
    raised = None
    async with anyio.create_task_group() as tasks:
        try:
            yield tasks
        except Exception as error:  # noqa: BLE001 - goes on below, where no group is put around it
            raised = error
        tasks.cancel_scope.cancel()
    if raised is not None:
        raise raised
