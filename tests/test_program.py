"""``exec:COMMAND`` against the suite of transports, and what becomes of the program."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from vfiostream.errors import ConnectionLost, LocalProtocolError, TransportError, UsageError
from vfiostream.testing import (
    NOISE,
    LinkContract,
    TransportContract,
    receive_all,
    receive_exactly,
    send_for_ever,
    time_limit,
)
from vfiostream.transports import connect, listen, program
from vfiostream.transports.contract import Transport
from vfiostream.transports.options import Options

pytestmark = pytest.mark.anyio
ONE_WAY = Options(answers=False)
SILENT = Options(silent=True)
RELAY = f"exec {shlex.quote(sys.executable)} -I -S {shlex.quote(str(Path(__file__).with_name('relay.py')))}"


class ThroughRelay(LinkContract):
    """The other end is where a program passes everything on to."""

    links = 0

    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is waited for here is a program that stays, as it should."""
        monkeypatch.setattr(program, "GRACE", 0.2)
        monkeypatch.setattr(program, "ENDING", 0.05)


class TestLink(ThroughRelay):
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Transport, Transport]]:
        self.links += 1
        path = f"{self.folder}/{self.links}"
        async with listen(f"unix:{path}", SILENT) as listener, connect(f"exec:{RELAY} {path}") as sender:
            yield sender, await listener.accept()


class TestLinkTheOtherWay(ThroughRelay):
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Transport, Transport]]:
        self.links += 1
        path = f"{self.folder}/{self.links}"
        async with listen(f"unix:{path}", SILENT) as listener, listen(f"exec:{RELAY} {path}") as programs:
            receiver = await programs.accept()
            yield await listener.accept(), receiver


class TestCheckpoint(TransportContract):
    """One way into a program that keeps it, and one way out of another."""

    @asynccontextmanager
    async def sender(self) -> AsyncIterator[Transport]:
        async with connect(f"exec:gzip -1 > {self.folder}/kept", ONE_WAY) as writer:
            yield writer

    @asynccontextmanager
    async def receiver(self) -> AsyncIterator[Transport]:
        async with listen(f"exec:gzip -dc {self.folder}/kept", ONE_WAY) as listener:
            async with await listener.accept() as reader:
                yield reader


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_child(pid: int) -> bool:
    """Whether it runs, or nobody has asked how it ended."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


async def pid_from(transport: Transport) -> int:
    """The number that the program prints first, in ten digits."""
    return int(await receive_exactly(transport, 10))


PID = "printf '%010d' $$"


def script(folder: Path, text: str) -> str:
    """A command that runs ``text`` in a shell of its own."""
    path = folder / "script"
    path.write_text(text)
    return f"sh {path}"


# ---- how the program ends


@pytest.mark.parametrize(
    ("command", "how"),
    [
        ("cat > /dev/null; exit 7", "with exit status 7"),
        ("cat > /dev/null; kill -KILL $$", "by signal SIGKILL"),
        ("cat > /dev/null; sh -c 'kill -KILL $$'; exit $?", r"with exit status 137 \(SIGKILL\)"),
        ("no-such-program-anywhere", r"before it had taken everything|with exit status 127"),
    ],
)
async def test_a_checkpoint_is_not_kept_where_the_program_says_so(command: str, how: str) -> None:
    async with time_limit(), connect(f"exec:{command}", ONE_WAY) as writer:
        with pytest.raises(TransportError, match=how):
            await writer.send([b"x" * 100])
            await writer.finish()
        with pytest.raises(TransportError):
            await writer.send([b"more"])


async def test_a_program_that_ends_well_without_having_read_all_has_not_kept_it() -> None:
    async with time_limit(), connect("exec:head -c 10 > /dev/null; true", ONE_WAY) as writer:
        await writer.send([NOISE[: 200 * 1024]])
        with pytest.raises(TransportError, match="had not read all, [1-9][0-9]* bytes were left"):
            await writer.finish()


async def test_a_program_that_ends_early_is_named_with_its_status() -> None:
    async with time_limit(), connect("exec:head -c 10 > /dev/null; exit 4", ONE_WAY) as writer:
        with pytest.raises(ConnectionLost, match=r"ended with exit status 4 before it had taken everything") as caught:
            await send_for_ever(writer)
        assert caught.value.taken is not None


async def test_a_program_that_takes_no_more_and_runs_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "ENDING", 0.0)
    async with time_limit(), connect("exec:exec <&-; cat /dev/zero") as link:
        with pytest.raises(ConnectionLost, match="takes no more, though it runs"):
            await send_for_ever(link)


@pytest.mark.parametrize(("options", "kind"), [(ONE_WAY, TransportError), (Options(), ConnectionLost)])
async def test_what_a_program_gave_before_it_failed_is_no_whole_stream(
    options: Options, kind: type[TransportError]
) -> None:
    async with time_limit(), listen("exec:printf 'some bytes'; exit 5", options) as listener:
        async with await listener.accept() as reader:
            assert await receive_exactly(reader, 10) == b"some bytes"
            for _ in range(2):
                with pytest.raises(kind, match="ended with exit status 5; see what it says|the connection is lost"):
                    await reader.receive([memoryview(bytearray(1))])


async def test_a_checkpoint_that_is_called_off_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    """The program is told to end before it could see the end of its input."""
    async with time_limit():
        async with connect(f"exec:cat > {tmp_path}/part && mv {tmp_path}/part {tmp_path}/whole", ONE_WAY) as writer:
            await writer.send([NOISE])
        assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("options", [ONE_WAY, Options()])
async def test_nothing_of_it_is_left(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the shell, not what the shell has started, no zombie and no descriptor; under cancellation, too."""
    monkeypatch.setattr(program, "GRACE", 0.0)
    inner = script(tmp_path, f"{PID}; exec sleep 1000")
    await anyio.lowlevel.checkpoint()
    before = len(os.listdir("/proc/self/fd"))
    async with time_limit(), listen(f"exec:{PID}; {inner} | cat", options) as listener:
        reader = await listener.accept()
        shell, started = await pid_from(reader), await pid_from(reader)
        assert alive(shell)
        assert alive(started)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await reader.aclose()
    assert not alive(shell)
    assert not is_child(shell)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_program_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "GRACE", 0.0)
    monkeypatch.setattr(program, "KILL_AFTER", 0.2)
    async with time_limit(), listen(f"exec:trap '' TERM; {PID}; while :; do sleep 1000; done", ONE_WAY) as listener:
        reader = await listener.accept()
        shell = await pid_from(reader)
        await reader.aclose()
    assert not alive(shell)


async def test_what_a_shell_has_started_has_its_time_to_end(tmp_path: Path) -> None:
    """The shell itself is gone at once."""
    said = tmp_path / "said"
    inner = script(tmp_path, f"trap 'sleep 0.2; echo cleaned > {said}; exit' TERM; {PID}; while :; do sleep 0.05; done")
    async with time_limit(), listen(f"exec:{inner} | cat", ONE_WAY) as listener:
        reader = await listener.accept()
        await pid_from(reader)
        await reader.aclose()
    assert said.read_text() == "cleaned\n"


async def test_what_a_program_that_ended_well_has_left_behind_goes_on(tmp_path: Path) -> None:
    async with time_limit():
        async with connect(f"exec:sleep 1000 & echo $! > {tmp_path}/pid; cat > /dev/null", ONE_WAY) as writer:
            await writer.finish()
        left = int((tmp_path / "pid").read_text())
        assert alive(left)
        os.kill(left, signal.SIGKILL)


async def test_finish_can_be_cancelled_while_the_program_works() -> None:
    async with time_limit(), connect("exec:cat > /dev/null; sleep 1000", ONE_WAY) as writer:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(writer.finish)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        with pytest.raises(TransportError, match="stopped part-way"):
            await writer.finish()


async def test_closed_while_it_is_finished() -> None:
    async def finish_and_be_closed(transport: Transport) -> None:
        with pytest.raises(TransportError, match="closed"):
            await transport.finish()

    async with time_limit(), connect("exec:cat > /dev/null; sleep 1000", ONE_WAY) as writer:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(finish_and_be_closed, writer)
            await anyio.wait_all_tasks_blocked()
            await writer.aclose()


# ---- what it is given


async def test_it_has_nothing_of_ours_but_the_stream_and_standard_error() -> None:
    """Neither our terminal nor our input or output, nor a descriptor but the one that says that it lives."""
    command = "ls /proc/self/fd | wc -l; cat; ps -o sid= -p $$; echo $$"
    async with time_limit(), listen(f"exec:{command}", ONE_WAY) as listener:
        async with await listener.accept() as reader:
            descriptors, session, own = (await receive_all(reader)).split()
    assert int(descriptors) == 5  # with the folder that ls reads
    assert session == own


async def test_what_it_prints_that_is_no_part_of_the_stream_goes_to_standard_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async with time_limit(), connect("exec:echo said; cat > /dev/null", ONE_WAY) as writer:
        await writer.finish()
    assert capfd.readouterr() == ("", "said\n")


async def test_one_way_has_one_direction() -> None:
    async with time_limit(), connect("exec:cat > /dev/null", ONE_WAY) as writer:
        with pytest.raises(LocalProtocolError):
            await writer.receive([memoryview(bytearray(1))])
    async with time_limit(), listen("exec:echo", ONE_WAY) as listener, await listener.accept() as reader:
        with pytest.raises(LocalProtocolError):
            await reader.send([b"x"])
        with pytest.raises(LocalProtocolError):
            await reader.finish()


@pytest.mark.parametrize("wanted", [{"replace": True}])
async def test_what_it_does_not_have_is_refused(wanted: dict[str, Any]) -> None:
    for opening in (connect, listen):
        with pytest.raises(UsageError, match="leave that away"):
            async with opening("exec:cat", Options(**wanted)):
                pass


async def test_a_command_that_can_not_be_started() -> None:
    with pytest.raises(TransportError, match="can't be started"):
        async with connect("exec:" + "x" * (8 << 20)):
            pass
