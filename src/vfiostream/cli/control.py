"""``control``: asks a command that is moving a device how far it is, and changes its limits; and the socket that such a
command answers at.

One JSON object a line each way, one answer a request (``docs/command-line.md``, "The control socket"). Whoever asks can
harm nobody but himself: a line is bounded, a client that reads nothing holds up its own answers, and where there are
:data:`MAX_CLIENTS` and one more comes, the one that has been silent longest has to go.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import anyio
import click
from anyio.abc import TaskStatus

from vfiostream import transports
from vfiostream.cli import options
from vfiostream.cli.exits import Exit
from vfiostream.cli.report import Result, Watched
from vfiostream.cli.run import Output, Run, carry_out
from vfiostream.cli.values import option_type, parse_limit, printable, show_rate, show_size, show_time
from vfiostream.errors import ConnectionLost, StreamError, TransportError, UsageError
from vfiostream.pipeline.bandwidth import Bandwidth
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.options import Options

logger = logging.getLogger("vfiostream.control")

MAX_LINE = 4096
"""Bytes of a request or an answer, with the end of its line."""
MAX_SENTENCE = 500
"""Characters of an error, which may cite the request."""
MAX_CLIENTS = 8
RETRY = 1.0
"""Seconds until clients are accepted again after the system had no room for one."""
PATIENCE = 10.0
"""Seconds that a client of ours waits for an answer."""

LIMITS = ("max_bandwidth", "switchover_bandwidth")


class Lines:
    """Lines that come over ``link``."""

    def __init__(self, link: Transport) -> None:
        self._link = link
        self._held = bytearray()
        self._more = memoryview(bytearray(MAX_LINE))

    async def next(self) -> bytes | None:
        """The next line, without its end, which the last one need not have; None where no more come. Raises ValueError
        for one of more than :data:`MAX_LINE` bytes, and the transport's errors.
        """
        while (end := self._held.find(b"\n")) < 0:
            if len(self._held) >= MAX_LINE:
                raise ValueError(f"a line is longer than {MAX_LINE} bytes")
            got = await self._link.receive([self._more])
            if not got:
                if not self._held:
                    return None
                end = len(self._held)
                break
            self._held += self._more[:got]
        line = bytes(self._held[:end])
        del self._held[: end + 1]
        return line


def _document(line: bytes) -> dict[str, Any]:
    """The object that ``line`` is; raises ValueError."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("that is no JSON") from error
    if not isinstance(document, dict):
        raise ValueError("that is no JSON object")
    return document


async def _send(link: Transport, document: Mapping[str, Any]) -> None:
    await link.send([json.dumps(document, allow_nan=False).encode() + b"\n"])


# ---- at a command that moves a device


async def answer_at(run: Run, path: str | None, bandwidth: Bandwidth | None = None) -> None:
    """Answer at the socket ``path``, if there is one, until the command ends; ``bandwidth`` is what can be changed.
    Raises where there can be no such socket.
    """
    if path is not None:
        await run.beside(Server(run.progress, bandwidth).serve, path)


class Server:
    """Answers about ``progress``; changes ``bandwidth``, where this end has one."""

    def __init__(self, progress: Watched, bandwidth: Bandwidth | None) -> None:
        self._progress = progress
        self._bandwidth = bandwidth
        self._clients: dict[Transport, anyio.CancelScope] = {}
        """Who has been silent longest comes first."""

    async def serve(self, path: str, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """A task: answer at ``path`` until it is cancelled."""
        async with (
            transports.listen(f"unix:{path}", Options(silent=True)) as listener,
            anyio.create_task_group() as tasks,
        ):
            task_status.started()
            while True:
                link = await _accepted(listener)
                while len(self._clients) >= MAX_CLIENTS:
                    silent = next(iter(self._clients))
                    logger.debug("%s: a client makes room for another", path)
                    self._clients.pop(silent).cancel()
                self._clients[link] = anyio.CancelScope()
                tasks.start_soon(self._serve, link, self._clients[link])

    async def _serve(self, link: Transport, scope: anyio.CancelScope) -> None:
        async with link:
            with scope:
                try:
                    await self._converse(link, Lines(link))
                except TransportError as error:
                    logger.debug("a client went away: %s", error)
            self._clients.pop(link, None)

    async def _converse(self, link: Transport, lines: Lines) -> None:
        while True:
            try:
                line = await lines.next()
            except ValueError as error:
                await _send(link, _error(error))
                return
            if line is None:
                return
            if link in self._clients:
                self._clients[link] = self._clients.pop(link)
            await _send(link, self.answer(line))

    def answer(self, line: bytes) -> dict[str, Any]:
        """Do what the request in ``line`` asks for, and return the answer."""
        try:
            request = _document(line)
            match request.pop("command", None):
                case "status" if not request:
                    pass
                case "set":
                    self._set(request)
                case _:
                    raise ValueError('write {"command": "status"}, or "set" and what is to be changed')
        except (ValueError, UsageError) as error:
            return _error(error)
        return {"message_type": "status", **self._progress.look()._asdict(), **self._limits()}

    def _set(self, wanted: dict[str, Any]) -> None:
        if self._bandwidth is None:
            raise ValueError("this end has no limits: they are set where the device is sent or saved")
        if not wanted or not set(wanted) <= set(LIMITS):
            raise ValueError(f"what can be set is {' and '.join(LIMITS)}")
        for name, rate in wanted.items():
            if rate is not None and type(rate) not in (int, float):
                raise ValueError(f"{name} is a number of bytes a second, or null for no limit")
        made = Bandwidth(*({**self._limits(), **wanted}[name] for name in LIMITS))
        self._bandwidth.limit, self._bandwidth.switchover = made.limit, made.switchover

    def _limits(self) -> dict[str, float | None]:
        limits = self._bandwidth or Bandwidth()
        return dict(zip(LIMITS, (limits.limit, limits.switchover), strict=True))


def _error(error: Exception) -> dict[str, Any]:
    return {"message_type": "error", "message": printable(str(error))[:MAX_SENTENCE]}


async def _accepted(listener: Listener) -> Transport:
    while True:
        try:
            return await listener.accept()
        except TransportError as error:
            # No room for a descriptor, say. The migration goes on.
            logger.warning("%s", error)
            await anyio.sleep(RETRY)


# ---- the command


@click.group
@click.argument("path")
@click.pass_context
def control(context: click.Context, path: str) -> None:
    """Ask or change a send, receive, save or restore while it runs.

    PATH is what its --control says.
    """
    context.obj = path


@control.command
@options.answers
@click.pass_obj
def status(path: str, output: Output) -> Exit:
    """Say how far it is, and what limits it has."""
    return _ask(path, {"command": "status"}, output)


@control.command("set")
@click.argument("name", type=click.Choice([name.replace("_", "-") for name in LIMITS]))
@click.argument("rate", type=option_type(parse_limit))
@options.answers
@click.pass_obj
def change(path: str, name: str, rate: int | None, output: Output) -> Exit:
    """Change a limit: bytes a second, or none.

    It counts from now on. max-bandwidth is for while the source runs, switchover-bandwidth for while it is stopped;
    they are known where a device is sent or saved.
    """
    return _ask(path, {"command": "set", name.replace("-", "_"): rate}, output)


def _ask(path: str, request: Mapping[str, Any], output: Output) -> Exit:
    async def work(run: Run) -> None:
        answer = await ask(path, request)
        run.result = Result({"status": "answered", **answer}, _lines(answer))

    return carry_out(work, output, cancelled="whether it was changed is not known, if it was to be")


async def ask(path: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Send one request to the socket ``path``, and return the fields of the answer. Raises
    :class:`~vfiostream.errors.UsageError` for a request that is refused.
    """
    try:
        with anyio.fail_after(PATIENCE):
            async with transports.connect(f"unix:{path}") as link:
                await _send(link, request)
                line = await Lines(link).next()
    except TimeoutError as error:
        raise TransportError(f"{path}: no answer within {PATIENCE:g} s; see whether that command hangs") from error
    except ValueError as error:
        raise StreamError("the answer", str(error), path) from error
    except TransportError as error:
        raise TransportError(
            f"{path}: no command answers there; start one with --control, or it has ended ({error})"
        ) from error
    if line is None:
        raise ConnectionLost(f"{path}: the command went away without an answer; its own output says how it ended")
    try:
        answer = _document(line)
    except ValueError as error:
        raise StreamError("the answer", str(error), path) from error
    if answer.pop("message_type", None) != "status":
        raise UsageError(f"{path}: refused: {answer.get('message', 'nothing is said about why')}")
    return answer


def _lines(answer: Mapping[str, Any]) -> list[str]:
    limits = [None if answer[name] is None else show_rate(answer[name]) for name in LIMITS]
    return [
        f"{answer['phase']}, round {answer['round']}, for {show_time(answer['elapsed'])}",
        f"content      {show_size(answer['bytes'])}, {show_rate(answer['rate'])} of late",
        f"transferred  {show_size(answer['transferred'])}",
        f"pending      {show_size(answer['pending'])}, dirtied at {show_rate(answer['dirty_rate'])}; would take "
        f"{show_time(answer['expected_downtime'])}",
        f"limits       {limits[0] or 'none'}; at the switchover {limits[1] or 'none'}",
    ]
