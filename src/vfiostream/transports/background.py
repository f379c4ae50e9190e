"""Tasks of a link, for what has to go on while nobody sends or receives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVarTuple

import anyio
from anyio.abc import TaskGroup

Ts = TypeVarTuple("Ts")


class Background:
    """Tasks that only the end of :func:`background` cancels. They raise nothing: what goes wrong is theirs to keep for
    whoever uses the link.
    """

    def __init__(self, group: TaskGroup) -> None:
        self._group = group
        self._scopes: set[anyio.CancelScope] = set()
        self._ended = False

    def start_soon(self, work: Callable[[*Ts], Awaitable[None]], *args: *Ts) -> None:
        """Have ``work`` done, until it returns or the context ends."""
        self._group.start_soon(self._run, work, args)

    async def _run(self, work: Callable[[*Ts], Awaitable[None]], args: tuple[*Ts]) -> None:
        with anyio.CancelScope(shield=True) as scope:
            if self._ended:
                return
            self._scopes.add(scope)
            try:
                await work(*args)
            finally:
                self._scopes.discard(scope)

    def end(self) -> None:
        """Cancel them, and what is started later."""
        self._ended = True
        for scope in self._scopes:
            scope.cancel()


@asynccontextmanager
async def background(*work: Callable[[], Awaitable[None]]) -> AsyncIterator[Background]:
    """Tasks for as long as the body runs: each of ``work``, and what it starts itself. They are shielded from whoever
    cancels the body, which may still have to send last words. What the body raises is raised as it is, in no group.
    """
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            tasks = Background(group)
            for one in work:
                tasks.start_soon(one)
            try:
                yield tasks
            except BaseException as error:
                failure = error
                raise
            finally:
                tasks.end()
    except BaseExceptionGroup:
        if failure is None or isinstance(failure, anyio.get_cancelled_exc_class()):
            raise  # A task of ours has a defect.
    if failure is not None:
        raise failure
