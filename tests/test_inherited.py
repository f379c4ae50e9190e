"""Descriptors that were passed on, against the suite of transports, and which of them are taken: ``fd:``, ``stdio:``,
``systemd:``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from vfiostream.errors import LocalProtocolError, TransportError, UsageError
from vfiostream.testing import LinkContract, PipeContract, receive_all, receive_exactly, send_all, time_limit
from vfiostream.transports import connect, inherited, listen
from vfiostream.transports.contract import Transport
from vfiostream.transports.descriptors import DescriptorTransport
from vfiostream.transports.options import Options
from vfiostream.transports.stream import SocketTransport

pytestmark = pytest.mark.anyio
ONE_WAY = Options(answers=False)


def passed_on(*fds: int) -> tuple[int, ...]:
    """As if they had come from whoever started this process."""
    for fd in fds:
        os.set_inheritable(fd, True)
    return fds


def passed_sockets() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    first, second = passed_on(ours.detach(), theirs.detach())
    return first, second


def passed_pipe() -> tuple[int, int]:
    reads, writes = passed_on(*os.pipe())
    return reads, writes


@asynccontextmanager
async def accepted(address: str, options: Options | None = None) -> AsyncIterator[Transport]:
    async with listen(address, options) as listener:
        yield await listener.accept()


class TestSocket(LinkContract):
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Transport, Transport]]:
        ours, theirs = passed_sockets()
        async with connect(f"fd:{ours}") as sender, accepted(f"fd:{theirs}") as receiver:
            yield sender, receiver


class TestTwoPipes(LinkContract):
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Transport, Transport]]:
        there, back = passed_pipe(), passed_pipe()
        async with connect(f"fd:{back[0]},{there[1]}") as sender, accepted(f"fd:{there[0]},{back[1]}") as receiver:
            yield sender, receiver


class TestSocketUnderTwoNumbers(LinkContract):
    """As standard input and output of a command that sshd runs."""

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Transport, Transport]]:
        ours, theirs = passed_sockets()
        (again,) = passed_on(os.dup(theirs))
        async with connect(f"fd:{ours}") as sender, accepted(f"fd:{theirs},{again}") as receiver:
            yield sender, receiver


class TestPipe(PipeContract):
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Transport, Transport]]:
        reads, writes = passed_pipe()
        async with connect(f"fd:{writes}", ONE_WAY) as sender, accepted(f"fd:{reads}", ONE_WAY) as receiver:
            yield sender, receiver


class TestSocketOneWay(PipeContract):
    """A parent that makes its child's input and output of sockets."""

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Transport, Transport]]:
        ours, theirs = passed_sockets()
        async with connect(f"fd:{ours}", ONE_WAY) as sender, accepted(f"fd:{theirs}", ONE_WAY) as receiver:
            yield sender, receiver


# ---- which descriptors


@contextmanager
def closing(*fds: int) -> Iterator[tuple[int, ...]]:
    """Close ``fds`` at the end, where nobody else has."""
    try:
        yield fds
    finally:
        for fd in fds:
            try:
                os.close(fd)
            except OSError:
                pass


async def refused(address: str, sentence: str, *openings: Callable[..., Any], options: Options | None = None) -> None:
    for opening in openings or (connect, listen):
        with pytest.raises(UsageError, match=sentence):
            async with opening(address, options):
                pass


@pytest.mark.parametrize(
    "address",
    [
        "fd:x",
        "fd:-1",
        "fd:1,2,3",
        "fd:01",
        "fd:1,",
        "fd: 3",
        "fd:\N{FULLWIDTH DIGIT SEVEN}",
        "stdio:x",
        "fd:1234567890",
    ],
)
async def test_what_is_no_descriptor(address: str) -> None:
    await refused(address, "is not fd:N or fd:IN,OUT")


async def test_standard_error_is_not_taken() -> None:
    await refused("fd:2", "descriptor 2 is standard error")
    await refused("fd:2", "descriptor 2 is standard error", options=ONE_WAY)


async def test_one_descriptor_twice() -> None:
    await refused("fd:7,7", "one descriptor twice; write fd:7")


async def test_a_descriptor_that_is_not_open() -> None:
    await refused("fd:999", "descriptor 999 is not open .*; have it passed on")


async def test_what_this_process_has_opened_itself_is_left_alone() -> None:
    """A mistaken number would otherwise take the event loop's own sockets."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await refused(f"fd:{ours.fileno()}", "was opened in this process")
        ours.sendall(b"still there")


async def test_what_is_neither_a_pipe_nor_a_stream(tmp_path: Path) -> None:
    controller, terminal = os.openpty()
    kinds = {
        "is a regular file; name it as file:PATH": os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT),
        "is neither a pipe nor a socket": os.open("/dev/null", os.O_RDWR),
        "is a terminal": terminal,
        "is a socket of messages": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
        "is not connected": socket.socket(socket.AF_UNIX).detach(),
    }
    with closing(controller, *passed_on(*kinds.values())):
        for sentence, fd in kinds.items():
            await refused(f"fd:{fd}", sentence)
            await refused(f"fd:{fd}", sentence, options=ONE_WAY)
            assert os.fstat(fd)


async def test_a_pipe_is_one_way_and_has_one_end() -> None:
    reads, writes = passed_pipe()
    other_reads, other_writes = passed_pipe()
    with closing(reads, writes, other_reads, other_writes):
        for fd in (reads, writes):
            await refused(f"fd:{fd}", "is a pipe, and nobody answers there; give two")
        await refused(f"fd:{reads}", "has to be written, and is open for reading only", connect, options=ONE_WAY)
        await refused(f"fd:{writes}", "has to be read, and is open for writing only", listen, options=ONE_WAY)
        await refused(f"fd:{writes},{reads}", "has to be read, and is open for writing only")
        await refused(f"fd:{reads},{writes}", f"one way; give one descriptor, fd:{writes}", connect, options=ONE_WAY)
        await refused(f"fd:{reads},{writes}", f"one way; give one descriptor, fd:{reads}", listen, options=ONE_WAY)
        for fd in (reads, writes):
            assert os.get_blocking(fd)


async def test_one_way_has_one_direction() -> None:
    reads, writes = passed_pipe()
    async with time_limit(), connect(f"fd:{writes}", ONE_WAY) as sender, accepted(f"fd:{reads}", ONE_WAY) as receiver:
        async with receiver:
            with pytest.raises(LocalProtocolError):
                await sender.receive([memoryview(bytearray(1))])
            with pytest.raises(LocalProtocolError):
                await receiver.send([b"x"])
            with pytest.raises(LocalProtocolError):
                await receiver.finish()


async def test_what_they_do_not_have_is_refused() -> None:
    for address in ("fd:7", "stdio:", "systemd:"):
        await refused(address, "has no replace; leave that away", options=Options(replace=True))
        await refused(address, "has no plain; leave that away", connect, options=Options(plain=True))


# ---- what is taken


async def test_what_is_taken_is_ours_alone_and_closed_at_the_end() -> None:
    ours, theirs = passed_sockets()
    before = len(os.listdir("/proc/self/fd"))
    async with time_limit(), connect(f"fd:{ours}") as sender:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(ours)
        assert isinstance(sender, SocketTransport)
        assert not os.get_inheritable(sender._sock.fileno())
    async with time_limit(), listen(f"fd:{theirs}"):
        pass  # what nobody has accepted is closed, too
    assert len(os.listdir("/proc/self/fd")) == before - 2


async def test_who_shares_a_pipe_gets_its_mode_back() -> None:
    reads, writes = passed_pipe()
    shared = os.dup(writes)
    with closing(reads, shared):
        async with connect(f"fd:{writes}", ONE_WAY) as sender:
            assert isinstance(sender, DescriptorTransport)
            assert not os.get_blocking(shared)
        assert os.get_blocking(shared)


async def test_what_was_not_blocking_stays_so() -> None:
    reads, writes = passed_pipe()
    os.set_blocking(writes, False)
    shared = os.dup(writes)
    with closing(reads, shared):
        async with connect(f"fd:{writes}", ONE_WAY) as sender:
            await sender.finish()
        assert not os.get_blocking(shared)


async def test_what_is_connected_is_accepted_once() -> None:
    ours, theirs = passed_sockets()
    async with time_limit(), connect(f"fd:{ours}") as sender, listen(f"fd:{theirs}") as listener:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await listener.accept()
        async with await listener.accept() as receiver:
            with pytest.raises(TransportError, match="there is no other"):
                await listener.accept()
            await listener.aclose()
            await sender.send([b"it lives on"])
            assert await receive_exactly(receiver, 11) == b"it lives on"
            with pytest.raises(TransportError, match="listener was closed"):
                await listener.accept()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
async def test_a_listening_socket_is_received_from(family: socket.AddressFamily, tmp_path: Path) -> None:
    made = socket.socket(family)
    made.bind(("127.0.0.1", 0) if family == socket.AF_INET else str(tmp_path / "x"))
    made.listen()
    where = f"tcp:127.0.0.1:{made.getsockname()[1]}" if family == socket.AF_INET else f"unix:{tmp_path}/x"
    (fd,) = passed_on(made.detach())
    await refused(f"fd:{fd}", "is a listening socket, which can only be received from", connect)
    await refused(f"fd:{fd}", "is a listening socket", listen, options=ONE_WAY)
    async with time_limit(), listen(f"fd:{fd}") as listener, AsyncExitStack() as stack:
        for _ in range(2):
            sender = await stack.enter_async_context(connect(where))
            await send_all(sender, [[b"hello"]])
            receiver = await stack.enter_async_context(await listener.accept())
            assert await receive_all(receiver) == b"hello"
    assert family == socket.AF_INET or (tmp_path / "x").exists()  # it is not ours to remove


async def test_a_port_that_others_reach_needs_a_trusted_network() -> None:
    made = socket.create_server(("0.0.0.0", 0))
    port = made.getsockname()[1]
    (fd,) = passed_on(made.detach())
    await refused(f"fd:{fd}", r"it listens at 0\.0\.0\.0, and whoever reaches that could send.*--plain", listen)
    async with time_limit(), listen(f"fd:{fd}", Options(plain=True, silent=True)) as listener:
        async with connect(f"tcp:127.0.0.1:{port}"), await listener.accept() as receiver:
            assert receiver.answers


async def test_at_a_path_only_our_own_user_and_root_are_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(tmp_path / "x"))
    made.listen()
    (fd,) = passed_on(made.detach())
    heard: list[TransportError] = []
    users = iter([4711, 0, os.geteuid()])
    # The kernel says who connects; another user can't be had in a test.
    monkeypatch.setattr(inherited, "peer_user", lambda sock: next(users))
    async with time_limit(), listen(f"fd:{fd}", Options(refused=heard.append, silent=True)) as listener:
        async with connect(f"unix:{tmp_path}/x") as stranger, connect(f"unix:{tmp_path}/x") as sender:
            async with await listener.accept() as receiver:
                await sender.send([b"known"])
                assert await receive_exactly(receiver, 5) == b"known"
                assert await stranger.receive([memoryview(bytearray(1))]) == 0
        async with connect(f"unix:{tmp_path}/x"), await listener.accept() as receiver:
            assert receiver.answers
    assert [str(error) for error in heard] == [f"fd:{fd}: a process of user 4711; send as user {os.geteuid()} or root"]
    assert "a process of user 4711" in caplog.text


def test_the_kernel_says_who_connects() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert inherited.peer_user(ours) == os.geteuid()


# ---- standard input and output


def run_here(program: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=30, check=False, **options
    )


def test_what_is_printed_while_standard_output_is_taken_goes_to_standard_error() -> None:
    ended = run_here(
        """
        import anyio, os, subprocess
        from vfiostream.transports import connect
        async def main():
            async with connect("stdio:") as link:
                print("printed", flush=True)
                subprocess.run(["sh", "-c", "echo by a child; cat"])  # its input ends at once
                into = bytearray(5)
                await link.receive([memoryview(into)])
                await link.send([bytes(into)])
                await link.finish()
            print("after", flush=True)
        anyio.run(main)
        """,
        input=b"bytes",
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"bytes", b"printed\nby a child\nafter\n")


# ---- systemd


@pytest.fixture
def socket_unit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Makes the environment of a service that systemd starts, its first descriptor where this process has room."""
    made: list[int] = []

    def start(names: str | None, *, pid: int | None = None, count: str | None = None, sockets: int = 1) -> int:
        pairs = [socket.create_server(("127.0.0.1", 0)) for _ in range(sockets)]
        first = 100
        for number, one in enumerate(pairs, first):
            os.dup2(one.fileno(), number, inheritable=True)
            one.close()
            made.append(number)
        monkeypatch.setattr(inherited, "FIRST_PASSED", first)
        monkeypatch.setenv("LISTEN_PID", str(os.getpid() if pid is None else pid))
        monkeypatch.setenv("LISTEN_FDS", str(sockets) if count is None else count)
        if names is None:
            monkeypatch.delenv("LISTEN_FDNAMES", raising=False)
        else:
            monkeypatch.setenv("LISTEN_FDNAMES", names)
        return first

    yield start
    with closing(*made):
        pass


def port_of(fd: int) -> int:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return int(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "names", "sockets", "which"),
    [("systemd:", None, 1, 0), ("systemd:", "x.socket", 1, 0), ("systemd:b", "a:b:c", 3, 1), ("systemd:b", "b", 1, 0)],
)
async def test_the_socket_of_a_unit(
    address: str, names: str | None, sockets: int, which: int, socket_unit: Callable[..., int]
) -> None:
    fd = socket_unit(names, sockets=sockets) + which
    port = port_of(fd)
    async with time_limit(), listen(address) as listener, connect(f"tcp:127.0.0.1:{port}") as sender:
        assert listener.address == address
        await send_all(sender, [[b"hello"]])
        async with await listener.accept() as receiver:
            assert await receive_all(receiver) == b"hello"


async def test_a_link_of_several_channels_comes_to_a_unit(socket_unit: Callable[..., int]) -> None:
    port = port_of(socket_unit("a"))
    async with time_limit(), listen("systemd:a") as listener:
        async with connect(f"tcp:127.0.0.1:{port}", Options(channels=2)) as sender:
            async with await listener.accept() as receiver:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(send_all, sender, [[b"hello"]])
                    assert await receive_all(receiver) == b"hello"


async def test_a_unit_that_accepts_by_itself(socket_unit: Callable[..., int]) -> None:
    """Accept=yes: the socket is connected."""
    fd = socket_unit("connection")
    ours, theirs = socket.socketpair()
    os.dup2(theirs.detach(), fd, inheritable=True)
    (passed,) = passed_on(ours.detach())
    async with time_limit(), connect(f"fd:{passed}") as sender, accepted("systemd:connection") as receiver, receiver:
        await send_all(sender, [[b"hello"]])
        assert await receive_all(receiver) == b"hello"


@pytest.mark.parametrize(
    ("address", "given", "sentence"),
    [
        ("systemd:", {"names": None, "pid": 1}, "systemd has passed no socket on to this process"),
        ("systemd:", {"names": None, "count": ""}, "are not what systemd sets"),
        ("systemd:", {"names": None, "count": "0"}, "are not what systemd sets"),
        ("systemd:", {"names": None, "count": "-1"}, "are not what systemd sets"),
        ("systemd:", {"names": None, "count": "1025"}, "are not what systemd sets"),
        ("systemd:", {"names": "x" * (1 << 17), "count": "1"}, "are not what systemd sets"),
        ("systemd:", {"names": "a:b", "sockets": 1}, "has 2 names of 1 sockets"),
        ("systemd:", {"names": "a:b", "sockets": 2}, r"passed on 2 sockets, and one is needed.*here are a, b"),
        ("systemd:c", {"names": "a:b", "sockets": 2}, "passed on 0 sockets of that name"),
        ("systemd:a", {"names": "a:a", "sockets": 2}, "passed on 2 sockets of that name"),
    ],
)
async def test_what_systemd_would_not_set(
    address: str, given: dict[str, Any], sentence: str, socket_unit: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inherited, "MAX_NAMES", 1 << 16)
    socket_unit(**given)
    await refused(address, sentence, listen)


async def test_a_service_is_there_to_receive(socket_unit: Callable[..., int]) -> None:
    socket_unit("a")
    await refused("systemd:a", "there to receive", connect)
    await refused("systemd:a", "use send and receive", listen, options=ONE_WAY)
