"""`vfiostream bench`: real processes over loopback and sockets, and what a listener does not take. Nothing is timed."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.cli_programs import LIMIT, Ended, Program, run
from tests.test_cli_processes import call, check_fields, listening, sentence, short_folder, socket_dir
from vfiostream import migrate, transports
from vfiostream.cli import specimen, trial
from vfiostream.cli.specimen import CONTENT_SIZE, DATA, Specimen, make_content
from vfiostream.cli.trial import Answer, BadNote, Cost, Part
from vfiostream.errors import ConnectionLost, Incompatible, UsageError
from vfiostream.pipeline.progress import Progress, Summary
from vfiostream.pipeline.settings import Settings
from vfiostream.transports.contract import Listener
from vfiostream.transports.options import Options

__all__ = ["call", "socket_dir"]  # fixtures

MIB = 1 << 20
SIZE = 16 * MIB
SMALL = ("--size", "16MiB")


def check_summary(summary: dict[str, Any], compressions: list[str]) -> None:
    """Every field is there, and the figures are positive and add up."""
    check_fields(summary, "summary of bench")
    assert min(summary["speeds"].values()) > 0
    assert [(run["what"], run["simulated"], run["compression"]) for run in summary["runs"]] == [
        (what, what == "reference device", name) for what in specimen.WHATS for name in compressions
    ]
    for done in summary["runs"]:
        check_fields(done, "a migration of bench")
        assert SIZE <= done["bytes"] < SIZE + MIB
        assert done["throughput"] == pytest.approx(done["bytes"] / done["seconds"])
        assert 0 < done["downtime_seconds"] < done["seconds"]
        for end in ("source", "target"):
            assert done[f"{end}_cpu_seconds"] > 0
            assert done[f"{end}_cpu_per_gb"] == pytest.approx(done[f"{end}_cpu_seconds"] / done["bytes"] * 1e9)
    memory = {done["throughput"]: done["compression"] for done in summary["runs"] if not done["simulated"]}
    assert summary["outlook_compression"] == memory[max(memory)]
    for outlook in summary["outlook"]:
        assert outlook["seconds"] == pytest.approx(outlook["size"] / max(memory))
        assert 0 < outlook["dirty_rate"] < max(memory)
        assert outlook["seconds"] < outlook["seconds_at_dirty_rate"]


# ---- it measures


def test_loopback() -> None:
    ended = run("bench", *SMALL, "--data", "mixed", "--compress", "1", "--json")
    assert (ended.code, ended.errors) == (0, "")
    *statuses, summary = ended.events
    for status in statuses:
        check_fields(status, "status of send, receive, save, restore, demo")
    assert [status["phase"] for status in statuses].count("done") == 4
    check_summary(summary, ["off", "1"])
    assert (summary["loopback"], summary["data"], summary["size"]) == (True, "mixed", SIZE)
    off, packed, *_ = summary["runs"]
    # Zeros are not sent, and a quarter shrinks.
    assert off["transferred"] == pytest.approx(SIZE / 2, rel=0.01)
    assert SIZE / 4 < packed["transferred"] < off["transferred"]


def test_what_people_read() -> None:
    ended = run("bench", *SMALL, "--data", "random")
    assert (ended.code, ended.errors) == (0, "")
    for what in ("guest memory", "reference device"):
        assert re.search(rf"^  {what} +off +[\d.]+ [MG]iB/s +16.0 MiB +[\d.]+ +[\d.]+ +[\d.]+ ms$", ended.output, re.M)
    assert "the reference device is a simulation inside each process, no hardware" in ended.output
    for word in ("copy", "check", "zstd 1", "precopy", "may be dirtied", "downtime of 300.0 ms"):
        assert word in ended.output


@pytest.mark.parametrize("link", ["tcp", "unix"])
def test_a_listener_serves_one_bench_after_another(link: str, socket_dir: Path) -> None:
    where = "tcp:127.0.0.1:0" if link == "tcp" else f"unix:{socket_dir}/link"
    with Program("bench", "--listen", where, "--json") as listener:
        address = listening(listener)
        for number in (1, 2):
            ended = run("bench", address, *SMALL, "--data", "zeros", "--json")
            assert (ended.code, ended.errors) == (0, "")
            summary = ended.events[-1]
            check_summary(summary, ["off"])
            assert (summary["address"], summary["loopback"]) == (address, False)
            served = json.loads(listener.line())
            check_fields(served, "summary of bench --listen")
            assert served["benches"] == number
            # Both ends tell the same of what the listener saw.
            for theirs, ours in zip(served["runs"], summary["runs"], strict=True):
                shared = ("what", "simulated", "bytes", "target_cpu_seconds", "target_cpu_per_gb")
                assert {name: theirs[name] for name in shared} == {name: ours[name] for name in shared}
                assert theirs["throughput"] == pytest.approx(theirs["bytes"] / theirs["seconds"])
        listener.signal(signal.SIGINT)
        ended = listener.end()
    assert (ended.code, ended.errors) == (0, "")
    (summary,) = ended.events
    check_fields(summary, "summary of bench --listen")
    assert (summary["benches"], summary["runs"]) == (2, [])


def test_once(socket_dir: Path) -> None:
    with Program("bench", "--listen", f"unix:{socket_dir}/link", "--once") as listener:
        assert listener.line() == f"listening on unix:{socket_dir}/link"
        assert run("bench", f"unix:{socket_dir}/link", *SMALL, "--quiet") == (0, "", "")
        ended = listener.end()
    assert (ended.code, ended.errors) == (0, "")
    assert re.match(r"guest memory +16.0 MiB .* CPU s/GB here\nreference device +16.0 MiB ", ended.output)


# ---- it says no


def test_a_listener_takes_only_what_it_wants_to(socket_dir: Path) -> None:
    address = f"unix:{socket_dir}/link"
    with Program("bench", "--listen", address, "--max-size", "8MiB") as listener:
        listener.line()
        refused = run("bench", address, *SMALL)
        assert refused.code == 5
        assert sentence(refused) == (
            f"{address} says no: at most 8.0 MiB are taken, not 16.0 MiB: choose a smaller --size, or start "
            "`vfiostream bench --listen` with a larger --max-size"
        )
        assert run("bench", address, "--size", "8MiB", "--quiet").code == 0
        listener.signal(signal.SIGTERM)
        ended = listener.end()
    assert ended.code == 0
    assert f"{address} was told no: at most 8.0 MiB are taken" in ended.errors
    with Program("bench", "--listen", address, "--max-size", "8MiB", "--once", "--json") as listener:
        listening(listener)
        run("bench", address, *SMALL)
        ended = listener.end()
    assert (ended.code, ended.events[-1]["message_type"], ended.events[-1]["code"]) == (5, "error", 5)


def test_a_stranger_does_not_end_a_listener(socket_dir: Path) -> None:
    address = f"unix:{socket_dir}/link"
    with Program("bench", "--listen", address, "--json") as listener:
        listening(listener)
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(f"{socket_dir}/link")
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: vfiostream\r\nAccept: */*\r\n\r\n")
            assert json.loads(listener.line())["code"] == 4
        with Program("device", "serve", socket_dir / "device") as device:
            device.line()
            lost = run("send", f"vfio-user:{socket_dir}/device", address)
            assert lost.code == 5
            assert "vfiostream-bench" in sentence(lost)
            assert json.loads(listener.line())["code"] == 5
        assert run("bench", address, *SMALL, "--quiet").code == 0


def test_what_receives_migrations_takes_no_bench(socket_dir: Path) -> None:
    address = f"unix:{socket_dir}/link"
    with Program("device", "serve", socket_dir / "device") as device:
        device.line()
        with Program("receive", address, f"vfio-user:{socket_dir}/device") as receiver:
            receiver.line()
            ended = run("bench", address, *SMALL)
            assert ended.code == 5
            assert "start `vfiostream bench --listen` of the same version there" in sentence(ended)
            assert receiver.end().code == 5


def test_nobody_listens(call: Callable[..., Ended], socket_dir: Path) -> None:
    ended = call("bench", f"unix:{socket_dir}/link", *SMALL)
    assert ended.code == 1
    assert sentence(ended) == (
        f"unix:{socket_dir}/link: nobody listens there; start `vfiostream bench --listen` on it first"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--size", "1000000GiB"), "choose a smaller --size"),
        (("--size", "5"), "multiple of 4096"),
        (("--size", "0"), "multiple of 4096"),
        (("--compress", "0"), "is no compression"),
        (("--compress", "20"), "is no compression"),
        (("--compress", "fast"), "is no compression"),
        (("--data", "noise"), "is not one of"),
        (("--once",), "without --listen, --once has no meaning"),
        (("--max-size", "1GiB"), "--max-size has no meaning"),
        (
            ("--listen", "tcp:127.0.0.1:0", "tcp:127.0.0.1:1"),
            "with --listen, ADDRESS has no meaning: who connects chooses it",
        ),
        (("--listen", "tcp:127.0.0.1:0", "--compress", "1"), "--compress has no meaning"),
        (("--listen", "127.0.0.1:0"), "is not an address"),
        (("file:x",), "is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_usage(call: Callable[..., Ended], arguments: tuple[str, ...], expected: str) -> None:
    ended = call("bench", *arguments)
    assert ended.code == 2
    assert expected in sentence(ended)


def test_an_interrupt_ends_both_processes() -> None:
    with Program("bench", "--size", "64MiB", "--json") as bench:
        bench.phase("precopy")
        bench.signal(signal.SIGINT)
        ended = bench.end()  # Its standard error is at its end when the other process has gone too.
    assert (ended.code, ended.errors) == (6, "")
    assert ended.events[-1]["error"] == "Cancelled"


# ---- what is moved


@pytest.mark.parametrize("data", DATA)
def test_content(data: specimen.Data) -> None:
    content = make_content(data)
    assert len(content) == CONTENT_SIZE
    zeros = [not any(content[at : at + MIB]) for at in range(0, CONTENT_SIZE, MIB)]
    expected = {"zeros": [True], "mixed": [True, False]}.get(data, [False])
    assert zeros == expected * (len(zeros) // len(expected))
    if data == "mixed":
        # Only one in two of what is not zeros is random: bytes that come equally often.
        spread = [max(Counter(content[at : at + MIB]).values()) for at in range(MIB, CONTENT_SIZE, 2 * MIB)]
        assert [most < 2 * MIB / 256 for most in spread] == [False, True] * (len(spread) // 2)


def test_a_specimen_holds_its_content() -> None:
    content = bytes(MIB) + b"x" * MIB
    memory, device = (Specimen(what, 3 * MIB, content) for what in specimen.WHATS)
    (range_,) = memory.guest.ranges
    assert bytes(range_.view) == content + bytes(MIB)
    assert device.guest.ranges == ()
    memory.close()
    device.close()


def test_room(monkeypatch: pytest.MonkeyPatch) -> None:
    specimen.check_room(MIB)
    monkeypatch.setattr(specimen, "RESERVE", 1 << 62)
    with pytest.raises(UsageError, match="where 0 B can be had: choose a smaller --size"):
        specimen.check_room(1)


# ---- what the other end may say


@pytest.mark.parametrize(
    "note",
    [
        None,
        [],
        {},
        {"what": "guest memory", "size": MIB, "runs": 1},
        {"what": "guest memory", "size": MIB, "runs": 1, "last": True, "more": 1},
        {"what": "the world", "size": MIB, "runs": 1, "last": True},
        {"what": ["guest memory"], "size": MIB, "runs": 1, "last": True},
        {"what": "guest memory", "size": 0, "runs": 1, "last": True},
        {"what": "guest memory", "size": -MIB, "runs": 1, "last": True},
        {"what": "guest memory", "size": 1 << 63, "runs": 1, "last": True},
        {"what": "guest memory", "size": 1e6, "runs": 1, "last": True},
        {"what": "guest memory", "size": True, "runs": 1, "last": True},
        {"what": "guest memory", "size": MIB, "runs": 0, "last": True},
        {"what": "guest memory", "size": MIB, "runs": 33, "last": True},
        {"what": "guest memory", "size": MIB, "runs": 1, "last": 1},
    ],
    ids=str,
)
def test_what_is_no_part(note: object) -> None:
    with pytest.raises(BadNote, match="run the same version"):
        trial._parsed(Part, note)


@pytest.mark.parametrize(
    "cost", [(0, 1.0, 1.0), (1, -1.0, 1.0), (1, 1.0, float("nan")), (1, float("inf"), 1.0), (1, 1, 1)]
)
def test_what_is_no_cost(cost: tuple[int, float, float]) -> None:
    with pytest.raises(BadNote):
        Cost(*cost)


@pytest.mark.parametrize("answer", [(5, "x", "x"), ("", "x" * 513, "x"), (None, "x", None), ("x" * 513, "x", "x")])
def test_what_is_no_answer(answer: Any) -> None:
    with pytest.raises(BadNote):
        Answer(*answer)


async def follow(carry: Callable[[Progress], Awaitable[Summary]]) -> Summary:
    return await carry(Progress())


@pytest.fixture
async def listener(anyio_backend: Any) -> AsyncIterator[Listener]:
    with short_folder() as folder:
        async with transports.listen(f"unix:{folder}/link", Options(silent=True)) as opened:
            yield opened


@pytest.mark.anyio
async def test_both_ends_in_one_process(listener: Listener) -> None:
    served = []

    async def serve() -> None:
        served.extend(await trial.serve(listener, SIZE))

    content = make_content("library")
    settings = [("off", Settings()), ("1", Settings(compression=1))]
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            for what in specimen.WHATS:
                part = Part(what, SIZE, 2, last=what == specimen.WHATS[-1])
                runs, answer = await trial.measure(listener.address, Options(), part, content, settings, follow)
                assert [done.compression for done in runs] == ["off", "1"]
                assert answer.refused is None
                for done in runs:
                    assert done.here.content == done.there.content == done.summary.content
    assert [entry.part.what for entry in served] == list(specimen.WHATS)
    assert [len(entry.costs) for entry in served] == [2, 2]
    assert not [thread for thread in threading.enumerate() if thread.name == "vfiostream-workload"]


@pytest.mark.parametrize(
    "note",
    [b"", b"\xff", b"[" * 4000, b"[]", b"{}", b'{"what": NaN}', b"9" * 4096],
    ids=["empty", "no UTF-8", "deep", "list", "nothing", "NaN", "digits"],
)
@pytest.mark.anyio
async def test_a_bad_note_ends_a_bench(note: bytes, listener: Listener) -> None:
    async def tell() -> None:
        page = Specimen("guest memory", 4096, note.ljust(4096, b"\0"))
        async with transports.connect(listener.address) as link, page.opened() as device:
            await migrate.send(device, link, guest=page.guest)
        page.close()

    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tell)
            with pytest.raises(BadNote):
                await trial.serve(listener, SIZE)


@pytest.mark.anyio
async def test_who_asks_and_goes_away_is_given_up(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PATIENCE", 0.2)

    async def ask() -> None:
        await trial._ask(listener.address, Options(), Part("guest memory", MIB, 1, last=True))

    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            with pytest.raises(ConnectionLost, match="did not do its next step"):
                await trial.serve(listener, SIZE)


@pytest.mark.anyio
async def test_who_asks_and_then_moves_nothing_is_given_up(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    over = anyio.Event()

    async def ask() -> None:
        await trial._ask(listener.address, Options(), Part("guest memory", MIB, 1, last=True))
        async with transports.connect(listener.address) as link:
            await trial._read_note(link)
        monkeypatch.setattr(trial, "PATIENCE", 0.2)
        monkeypatch.setattr(trial, "SLOWEST_MOVE", 1 << 40)
        async with transports.connect(listener.address):
            await over.wait()

    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            with pytest.raises(ConnectionLost, match="did not do its next step"):
                await trial.serve(listener, SIZE)
            over.set()


@pytest.mark.anyio
async def test_no_memory_is_taken_for_who_asks_too_much(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(Specimen):
        def __init__(self, what: specimen.What, size: int, content: bytes = b"\0") -> None:
            made.append(size)
            super().__init__(what, size, content)

    monkeypatch.setattr(specimen, "Specimen", Counted)

    async def ask(size: int) -> None:
        await trial._ask(listener.address, Options(), Part("guest memory", size, 1, last=True))
        async with transports.connect(listener.address) as link:
            answer = trial._parsed(Answer, await trial._read_note(link))
        assert answer.refused is not None
        assert "choose a" in answer.refused

    for size, expected in ((SIZE + 4096, "at most 16.0 MiB"), (MIB + 1, "multiple of 4096")):
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask, size)
                with pytest.raises(Incompatible, match=expected):
                    await trial.serve(listener, SIZE)
    assert made == []
