"""The control socket of a command: what it answers, what it refuses, and that no client harms anybody."""

from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from vfiostream import transports
from vfiostream.cli.control import LIMITS, MAX_CLIENTS, MAX_LINE, Lines, Server, ask
from vfiostream.cli.report import Watched
from vfiostream.errors import TransportError, UsageError
from vfiostream.pipeline.bandwidth import Bandwidth
from vfiostream.transports.contract import Transport
from vfiostream.transports.memory import memory_pair

pytestmark = pytest.mark.anyio
MIB = 1 << 20


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vfiostream-") as folder:
        yield Path(folder) / "control"


@asynccontextmanager
async def serving(path: Path, bandwidth: Bandwidth | None = None) -> AsyncIterator[Watched]:
    progress = Watched()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(Server(progress, bandwidth).serve, str(path))
            yield progress
            tasks.cancel_scope.cancel()


async def say(link: Transport, lines: Lines, text: bytes) -> dict[str, Any]:
    await link.send([text])
    answer = await lines.next()
    assert answer is not None
    document: dict[str, Any] = json.loads(answer)
    return document


async def test_status(path: Path) -> None:
    async with serving(path, Bandwidth(5 * MIB, None)) as progress:
        progress.phase = "precopy"
        progress.content = 7
        answer = await ask(str(path), {"command": "status"})
        assert answer == {**progress.look()._asdict(), **answer}
        assert (answer["phase"], answer["bytes"], answer["pending"]) == ("precopy", 7, None)
        assert [answer[name] for name in LIMITS] == [5 * MIB, None]
        progress.expected_downtime = float("inf")
        assert (await ask(str(path), {"command": "status"}))["expected_downtime"] is None


async def test_limits_are_set_one_by_one_or_together(path: Path) -> None:
    bandwidth = Bandwidth()
    async with serving(path, bandwidth):
        for request, limits in (
            ({"max_bandwidth": 100}, (100, None)),
            ({"switchover_bandwidth": 2.5}, (100, 2.5)),
            ({"max_bandwidth": None}, (None, 2.5)),
            ({"max_bandwidth": 1, "switchover_bandwidth": None}, (1, None)),
        ):
            answer = await ask(str(path), {"command": "set", **request})
            assert (bandwidth.limit, bandwidth.switchover) == limits
            assert tuple(answer[name] for name in LIMITS) == limits


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (b"{", "no JSON"),
        (b"", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 4000, "no JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "write"),
        (b'{"command": "stop"}', "write"),
        (b'{"command": ["set"]}', "write"),
        (b'{"command": "status", "more": 1}', "write"),
        (b'{"command": "set"}', "what can be set is max_bandwidth and switchover_bandwidth"),
        (b'{"command": "set", "downtime": 1}', "what can be set is"),
        (b'{"command": "set", "max_bandwidth": 1, "x": 1}', "what can be set is"),
        (b'{"command": "set", "max_bandwidth": "1MiB"}', "is a number of bytes a second"),
        (b'{"command": "set", "max_bandwidth": true}', "is a number of bytes a second"),
        (b'{"command": "set", "max_bandwidth": 0}', "moves nothing"),
        (b'{"command": "set", "max_bandwidth": NaN}', "moves nothing"),
        (b'{"command": "set", "max_bandwidth": 1e999}', "is beyond"),
        (b'{"command": "set", "max_bandwidth": 1' + b"0" * 4000 + b"}", "a bandwidth of 1000"),
        (b'{"command": "set", "max_bandwidth": 7, "switchover_bandwidth": -1}', "moves nothing"),
    ],
)
async def test_what_is_refused_changes_nothing(request_: bytes, problem: str, path: Path) -> None:
    bandwidth = Bandwidth(5, 6)
    async with serving(path, bandwidth), transports.connect(f"unix:{path}") as link:
        lines = Lines(link)
        answer = await say(link, lines, request_ + b"\n")
        assert answer["message_type"] == "error"
        assert problem in answer["message"]
        assert (bandwidth.limit, bandwidth.switchover) == (5, 6)
        # The next one is taken as ever.
        assert (await say(link, lines, b'{"command": "status"}\n'))["max_bandwidth"] == 5


async def test_an_end_without_limits(path: Path) -> None:
    async with serving(path):
        answer = await ask(str(path), {"command": "status"})
        assert [answer[name] for name in LIMITS] == [None, None]
        with pytest.raises(UsageError, match="refused: this end has no limits"):
            await ask(str(path), {"command": "set", "max_bandwidth": 5})


async def test_a_line_that_is_too_long_is_the_last(path: Path) -> None:
    async with serving(path, Bandwidth()), transports.connect(f"unix:{path}") as link:
        lines = Lines(link)
        answer = await say(link, lines, b" " * (2 * MAX_LINE))
        assert "longer than 4096 bytes" in answer["message"]
        try:
            assert await lines.next() is None
        except TransportError:  # There was more than it has read.
            pass


async def test_lines_come_in_any_pieces() -> None:
    here, there = memory_pair()
    lines = Lines(there)
    for piece in (b"on", b"e\ntwo\n", b"\nlast"):
        await here.send([piece])
    await here.finish()
    assert [await lines.next() for _ in range(5)] == [b"one", b"two", b"", b"last", None]


async def test_several_requests_at_once_and_a_last_line_without_an_end(path: Path) -> None:
    async with serving(path, Bandwidth()), transports.connect(f"unix:{path}") as link:
        lines = Lines(link)
        await link.send([b'{"command": "status"}\n{"command": "set", "max_bandwidth": 9}\n{"command": "status"}'])
        await link.finish()
        answers = []
        while (line := await lines.next()) is not None:
            answers.append(json.loads(line))
        assert [answer["max_bandwidth"] for answer in answers] == [None, 9, 9]


STATUS = b'{"command": "status"}\n'


async def test_where_there_are_too_many_clients_the_one_that_was_silent_longest_goes(path: Path) -> None:
    async with serving(path, Bandwidth()), AsyncExitStack() as stack:
        links = [await stack.enter_async_context(transports.connect(f"unix:{path}")) for _ in range(MAX_CLIENTS)]
        clients = [(link, Lines(link)) for link in links]
        for client in (*clients, clients[0]):
            await say(*client, STATUS)
        await ask(str(path), {"command": "status"})
        assert await clients[1][1].next() is None
        for client in (clients[0], *clients[2:]):
            await say(*client, STATUS)


async def test_a_client_that_reads_nothing_holds_up_nobody(path: Path) -> None:
    async with serving(path, Bandwidth()), transports.connect(f"unix:{path}") as link:
        async with anyio.create_task_group() as tasks:

            async def ask_for_ever() -> None:
                while True:
                    await link.send([STATUS])

            tasks.start_soon(ask_for_ever)
            await anyio.wait_all_tasks_blocked()
            for _ in range(3):
                await ask(str(path), {"command": "status"})
            tasks.cancel_scope.cancel()


async def test_the_socket_is_the_owners_and_goes_with_the_command(path: Path) -> None:
    for _ in range(2):
        async with serving(path):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert not path.exists()


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with serving(path):
        with pytest.raises(BaseExceptionGroup) as caught:
            async with serving(path):
                pass
        assert caught.group_contains(TransportError, match="belongs to a program that runs")
        await ask(str(path), {"command": "status"})
    path.write_text("precious")
    with pytest.raises(BaseExceptionGroup):
        async with serving(path):
            pass
    assert path.read_text() == "precious"


async def test_nobody_there(path: Path) -> None:
    with pytest.raises(TransportError, match="no command answers there"):
        await ask(str(path), {"command": "status"})
