"""The transports against the suite, and what only one of them has: addresses, sockets' paths, files' names."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from vfiostream.errors import ConnectionLost, LocalProtocolError, TransportError, UsageError
from vfiostream.testing import (
    KIB,
    NOISE,
    LinkContract,
    TransportContract,
    receive_all,
    receive_exactly,
    send_all,
    time_limit,
)
from vfiostream.transports import blocks, connect, file, listen, write_behind
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.memory import memory_pair
from vfiostream.transports.options import Options
from vfiostream.transports.stream import SocketTransport
from vfiostream.transports.unsent import Unsent

pytestmark = pytest.mark.anyio

SILENT = Options(silent=True)
"""Whoever connects is accepted before he has said anything."""


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[Transport, Transport]]:
    async with listen(address, SILENT) as listener:
        async with connect(listener.address) as sender:
            yield sender, await listener.accept()


class TestTcp4(LinkContract):
    def pair(self) -> Any:
        return connected("tcp:127.0.0.1:0")


@pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")
class TestTcp6(LinkContract):
    def pair(self) -> Any:
        return connected("tcp:[::1]:0")


class TestUnix(LinkContract):
    links = 0

    def pair(self) -> Any:
        self.links += 1
        return connected(f"unix:{self.folder}/{self.links}")


class TestMemory(LinkContract):
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Transport, Transport]]:
        yield memory_pair()


class TestTinyMemory(LinkContract):
    """Every send waits part-way."""

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Transport, Transport]]:
        yield memory_pair(capacity=4099)


class TestFile(TransportContract):
    @asynccontextmanager
    async def sender(self) -> AsyncIterator[Transport]:
        async with connect(f"file:{self.folder}/checkpoint") as writer:
            yield writer

    @asynccontextmanager
    async def receiver(self) -> AsyncIterator[Transport]:
        async with listen(f"file:{self.folder}/checkpoint") as listener, await listener.accept() as reader:
            yield reader


class SmallBlocks(TestFile):
    """Blocks of two pages, so that a few bytes take many."""

    @pytest.fixture(autouse=True)
    def _small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blocks, "BLOCK", 8192)


class TestFileInSmallBlocks(SmallBlocks):
    pass


class TestFileThatIsNotCached(SmallBlocks):
    @pytest.fixture(autouse=True)
    def _not_cached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forget_the_cache(monkeypatch)


class TestFileSystemThatCanNotTellWhatIsCached(SmallBlocks):
    @pytest.fixture(autouse=True)
    def _can_not_tell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forget_the_cache(monkeypatch, errno.EOPNOTSUPP)


class TestFileSystemWithoutDirectAccess(SmallBlocks):
    @pytest.fixture(autouse=True)
    def _no_direct_access(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = fcntl.fcntl

        def refusing(fd: int, command: int, argument: int = 0) -> int:
            if command == fcntl.F_SETFL and argument & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(fd, command, argument)

        monkeypatch.setattr(fcntl, "fcntl", refusing)
        forget_the_cache(monkeypatch)


class TestFileSystemThatRefusesDirectAccessLate(SmallBlocks):
    @pytest.fixture(autouse=True)
    def _late_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forget_the_cache(monkeypatch)
        for call in ("pwrite", "preadv"):
            refuse_direct_access(monkeypatch, call)


def forget_the_cache(patch: pytest.MonkeyPatch, number: int = errno.EAGAIN, kept: int = 0) -> None:
    """Let every read that must not wait for a disk be refused with ``number``, wherever the test's folder is, but for
    the first ``kept`` bytes of a file.
    """
    real = os.preadv

    def refusing(fd: int, views: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            if offset < kept:
                return real(fd, [views[0][: kept - offset]], offset)
            raise OSError(number, os.strerror(number))
        return real(fd, views, offset)

    patch.setattr(os, "preadv", refusing)
    patch.setattr(file, "_lives_in_memory", lambda fd: False)


def refuse_direct_access(patch: pytest.MonkeyPatch, call: str) -> None:
    real = getattr(os, call)

    def refusing(fd: int, *arguments: Any) -> Any:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, *arguments)

    patch.setattr(os, call, refusing)


# ---- addresses


@pytest.mark.parametrize(
    "address",
    ["", "tcp", "tcp:", "unix:", "file:", "quick:host:1", "TCP:host:1", ":1", "file:a\0b", "tcp:ho\0st:1", "/a/path"],
)
async def test_what_is_no_address_is_refused_with_a_list_of_what_is(address: str) -> None:
    for opening in (connect, listen):
        with pytest.raises(UsageError, match=r"tcp:HOST:PORT, tls:HOST:PORT, quic:HOST:PORT, unix:PATH, file:PATH"):
            async with opening(address):
                pass


@pytest.mark.parametrize(
    "address",
    [
        "tcp:host",
        "tcp:host:",
        "tcp:7000",
        "tcp:host:65536",
        "tcp:host:-1",
        "tcp:host:port",
        "tcp:host:\N{FULLWIDTH DIGIT SEVEN}",
        "tcp:::1:7000",
        "tcp:[::1]",
        "tcp:[]:7000",
        "tcp:[::1]7000",
        "tcp:[::1]:7000:1",
        "tcp:host:7000\n",
    ],
)
async def test_malformed_tcp_addresses(address: str) -> None:
    for opening in (connect, listen):
        with pytest.raises(UsageError, match=r"brackets"):
            async with opening(address):
                pass


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1"])
async def test_who_knows_no_one_listens_for_this_host_only(host: str) -> None:
    with pytest.raises(
        UsageError, match="tcp: knows no one; listen at tls:, .* or at a loopback address, or .*--plain"
    ):
        async with listen(f"tcp:{host}:0"):
            pass


async def test_unless_the_network_is_trusted() -> None:
    async with time_limit(), listen("tcp:0.0.0.0:0", Options(plain=True)) as listener:
        assert re.fullmatch(r"tcp:0\.0\.0\.0:[0-9]+", listener.address)
        async with connect(listener.address.replace("0.0.0.0", "127.0.0.1")) as sender:
            await sender.send([b"here"])
            async with await listener.accept() as receiver:
                assert await receive_exactly(receiver, 4) == b"here"


async def test_no_host_is_the_loopback() -> None:
    async with time_limit(), listen("tcp::0") as listener:
        assert re.fullmatch(r"tcp:127\.0\.0\.1:[0-9]+", listener.address)
        async with connect(f"tcp::{listener.address.rpartition(':')[2]}") as sender:
            await sender.send([b"here"])
            async with await listener.accept() as receiver:
                assert await receive_exactly(receiver, 4) == b"here"


@pytest.mark.parametrize("address", ["unix:/tmp/x", "file:/tmp/x", "tls:127.0.0.1:0"])
async def test_others_have_no_plain(address: str) -> None:
    with pytest.raises(UsageError, match="has no plain"):
        async with listen(address, Options(plain=True)):
            pass


async def test_port_0_is_for_listening_only() -> None:
    with pytest.raises(UsageError, match="port 0"):
        async with connect("tcp:127.0.0.1:0"):
            pass


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 300, "ü" * 80])
async def test_a_host_that_is_not_found(host: str) -> None:
    for opening in (connect, listen):
        with pytest.raises(TransportError, match="can't be found; check its name"):
            async with opening(f"tcp:{host}:7000"):
                pass


async def test_a_unix_path_that_is_too_long() -> None:
    for opening in (connect, listen):
        with pytest.raises(UsageError, match="107 bytes"):
            async with opening("unix:/tmp/" + "x" * 103):
                pass


@pytest.mark.parametrize("address", ["file:", "file:/tmp/", "file:/tmp/.", "file:..", "file:/"])
async def test_a_file_address_without_a_file(address: str) -> None:
    with pytest.raises(UsageError):
        async with connect(address):
            pass


def test_a_scheme_loads_only_its_own_module() -> None:
    program = """
        import sys, anyio
        from vfiostream.transports import listen
        def loaded():
            return sorted(name.rpartition(".")[2] for name in sys.modules if name.startswith("vfiostream.transports."))
        assert loaded() == ["contract", "credentials", "options"], loaded()
        async def main():
            async with listen("tcp:127.0.0.1:0"):
                pass
        anyio.run(main)
        of_links = ["arrivals", "background", "channel", "channels", "contract", "credentials", "joining"]
        assert loaded() == [*of_links, "options", "polled", "reconnecting", "segments", "stream", "unsent"], loaded()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


# ---- sockets


async def test_the_address_of_a_listener_has_the_real_port() -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0", SILENT) as listener:
        match = re.fullmatch(r"tcp:127\.0\.0\.1:([0-9]+)", listener.address)
        assert match is not None
        assert int(match[1]) > 0
        async with connect(listener.address) as sender, await listener.accept() as receiver:
            assert sender.address == listener.address
            assert re.fullmatch(r"tcp:127\.0\.0\.1:[0-9]+", receiver.address)
            assert receiver.address != listener.address


@pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")
async def test_the_address_of_an_ipv6_listener_can_be_connected_to() -> None:
    async with time_limit(), listen("tcp:[::1]:0", SILENT) as listener:
        assert re.fullmatch(r"tcp:\[::1\]:[0-9]+", listener.address)
        async with connect(listener.address), await listener.accept() as receiver:
            assert receiver.address.startswith("tcp:[::1]:")


async def test_every_address_of_a_host_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0", SILENT) as listener:
        port = int(listener.address.rpartition(":")[2])

        async def two_addresses(*_: object, **__: object) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]

        monkeypatch.setattr(anyio, "getaddrinfo", two_addresses)
        async with connect(f"tcp:both:{port}") as sender, await listener.accept() as receiver:
            assert sender.address == f"tcp:both:{port}"
            await sender.send([b"here"])
            assert await receive_exactly(receiver, 4) == b"here"


async def test_nobody_listens(tmp_path: Path) -> None:
    async with listen("tcp:127.0.0.1:0") as listener:
        address = listener.address
    for nobody in (address, f"unix:{tmp_path}/none"):
        with pytest.raises(TransportError, match=rf"^{re.escape(nobody)}: nobody listens there; start `vfiostream rec"):
            async with connect(nobody):
                pass


async def test_a_port_that_is_taken() -> None:
    async with listen("tcp:127.0.0.1:0") as listener:
        with pytest.raises(TransportError, match=r"Address already in use"):
            async with listen(listener.address):
                pass


async def test_a_port_can_be_listened_on_again_at_once() -> None:
    """The connection that was closed here first stays in TIME_WAIT, which must not keep the port."""
    async with time_limit():
        async with listen("tcp:127.0.0.1:0", SILENT) as listener:
            address = listener.address
            async with connect(address) as sender, await listener.accept() as receiver:
                await receiver.aclose()
                assert await sender.receive([memoryview(bytearray(1))]) == 0
        async with listen(address) as listener:
            assert listener.address == address


async def test_both_ends_of_tcp_send_at_once_and_notice_a_peer_that_vanished() -> None:
    async with time_limit(), connected("tcp:127.0.0.1:0") as ends:
        for end in ends:
            assert isinstance(end, SocketTransport)
            async with end:
                sock = end._sock
                assert not sock.getblocking()
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 5
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 4


async def accept_nothing(listener: Listener) -> None:
    with pytest.raises(TransportError, match="closed"):
        await listener.accept()


@pytest.mark.parametrize("scheme", ["tcp", "unix", "file"])
async def test_a_listener_closes_again_and_under_cancellation(scheme: str, tmp_path: Path) -> None:
    async with listen("tcp:127.0.0.1:0" if scheme == "tcp" else f"{scheme}:{tmp_path}/x") as listener:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await listener.aclose()
        await listener.aclose()
        await accept_nothing(listener)


async def test_a_listener_is_closed_while_it_waits() -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(accept_nothing, listener)
        await anyio.wait_all_tasks_blocked()
        await listener.aclose()


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_a_cancelled_accept_leaves_the_sender_to_the_next(scheme: str, tmp_path: Path) -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{tmp_path}/x", SILENT) as listener:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.accept)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        async with connect(listener.address) as sender, await listener.accept() as receiver:
            await send_all(sender, [[b"here"]])
            assert await receive_all(receiver) == b"here"


async def test_accepted_ones_outlive_the_listener(tmp_path: Path) -> None:
    async with time_limit(), listen(f"unix:{tmp_path}/x", SILENT) as listener, connect(listener.address) as sender:
        async with await listener.accept() as receiver:
            await listener.aclose()
            assert not (tmp_path / "x").exists()
            await send_all(sender, [[b"still here"]])
            assert await receive_all(receiver) == b"still here"


async def test_a_unix_socket_is_its_owners_only(tmp_path: Path) -> None:
    async with listen(f"unix:{tmp_path}/x"):
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


async def test_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with time_limit(), listen(f"unix:{path}", SILENT) as listener:
        async with connect(f"unix:{path}"), await listener.accept():
            pass
    assert not path.exists()


async def test_a_live_unix_socket_is_left_alone_and_hears_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    async with time_limit(), listen(f"unix:{path}", SILENT) as listener:
        with pytest.raises(TransportError, match="belongs to a program that runs"):
            async with listen(f"unix:{path}"):
                pass
        # The next sender is the first the listener hears of.
        async with connect(f"unix:{path}") as sender, await listener.accept() as receiver:
            await send_all(sender, [[b"first"]])
            assert await receive_all(receiver) == b"first"
        assert path.is_socket()


async def test_a_live_datagram_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(TransportError, match="belongs to a program that runs"):
            async with listen(f"unix:{path}"):
                pass
    assert path.is_socket()


async def test_what_is_not_a_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("precious")
    with pytest.raises(TransportError, match="is not a socket"):
        async with listen(f"unix:{path}"):
            pass
    assert path.read_text() == "precious"


async def test_a_listener_removes_only_its_own_socket(tmp_path: Path) -> None:
    path = tmp_path / "x"
    async with listen(f"unix:{path}") as first:
        path.rename(tmp_path / "moved")
        async with listen(f"unix:{path}"):
            await first.aclose()
            assert path.is_socket()
        assert not path.exists()


async def test_a_unix_socket_in_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"No such file or directory.*folder that exists"):
        async with listen(f"unix:{tmp_path}/none/x"):
            pass


async def test_a_closed_socket_takes_no_wake_up_from_the_next_one() -> None:
    """The next one gets its descriptor, by which the event loop knows who waits."""
    first, first_peer = socket.socketpair()
    first.setblocking(False)
    number = first.fileno()

    async def receive_and_be_closed(transport: Transport) -> None:
        with pytest.raises(TransportError, match="closed"):
            await transport.receive([memoryview(bytearray(1))])

    async def send_byte(sock: socket.socket) -> None:
        sock.send(b"x")

    with first_peer:
        transport = SocketTransport(first, "unix:first")
        async with time_limit(), anyio.create_task_group() as tasks:
            tasks.start_soon(receive_and_be_closed, transport)
            await anyio.wait_all_tasks_blocked()
            await transport.aclose()
            second, second_peer = socket.socketpair()
            with second, second_peer:
                assert number in (second.fileno(), second_peer.fileno())
                one, other = (second, second_peer) if second.fileno() == number else (second_peer, second)
                tasks.start_soon(send_byte, other)
                await anyio.wait_readable(one)


async def test_a_reset_that_receive_was_told_is_not_forgotten() -> None:
    async with time_limit(), connected("tcp:127.0.0.1:0") as (sender, receiver), sender, receiver:
        await sender.send([b"unread"])
        await anyio.wait_readable(receiver._sock)  # type: ignore[attr-defined]
        await receiver.aclose()
        for _ in range(2):
            with pytest.raises(ConnectionLost):
                await sender.receive([memoryview(bytearray(1))])
        with pytest.raises(ConnectionLost):
            await sender.send([b"x"])


async def test_what_the_peer_said_before_a_reset_can_still_be_read() -> None:
    async with time_limit(), connected("tcp:127.0.0.1:0") as (sender, receiver), sender, receiver:
        await sender.send([b"unread"])
        await anyio.wait_readable(receiver._sock)  # type: ignore[attr-defined]
        await receiver.send([b"I give up"])
        await receiver.aclose()
        assert await receive_exactly(sender, 9) == b"I give up"
        with pytest.raises(ConnectionLost):
            await sender.receive([memoryview(bytearray(1))])


# ---- files


def names(folder: Path) -> list[str]:
    return os.listdir(folder)


async def write_whole(path: Path, content: bytes, *, replace: bool = False) -> None:
    async with connect(f"file:{path}", Options(replace=replace)) as writer:
        await send_all(writer, [[content]])


async def read_whole(path: Path) -> bytes:
    async with listen(f"file:{path}") as listener, await listener.accept() as reader:
        return await receive_all(reader)


def let_fail(patch: pytest.MonkeyPatch, call: str, on: Callable[[Any], bool]) -> None:
    """Let the system call ``call`` fail where ``on`` says so of its first argument."""
    real = getattr(os, call)

    def failing(first: Any, **kwargs: Any) -> None:
        if on(first):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(first, **kwargs)

    patch.setattr(os, call, failing)


def is_folder(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def is_partial(name: str) -> bool:
    return name.endswith(".partial")


async def test_a_file_has_its_name_only_when_finished(tmp_path: Path) -> None:
    path = tmp_path / "x"
    async with connect(f"file:{path}") as writer:
        assert not writer.answers
        await writer.send([NOISE])
        assert not path.exists()
        [partial] = names(tmp_path)
        assert re.fullmatch(r"\.x\.[0-9a-f]+\.partial", partial)
        assert stat.S_IMODE((tmp_path / partial).stat().st_mode) == 0o600
        await writer.finish()
        assert path.read_bytes() == NOISE
        assert names(tmp_path) == ["x"]
    assert names(tmp_path) == ["x"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_nlink == 1


async def test_a_file_that_is_not_finished_is_removed(tmp_path: Path) -> None:
    async with connect(f"file:{tmp_path}/x") as writer:
        await writer.send([b"half"])
    assert names(tmp_path) == []
    async with connect(f"file:{tmp_path}/x") as writer:
        await writer.send([b"half"])
        with anyio.CancelScope() as scope:
            scope.cancel()
            await writer.aclose()
        assert names(tmp_path) == []


async def test_an_existing_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("precious")
    with pytest.raises(TransportError, match=r"the file exists.*--force"):
        async with connect(f"file:{path}"):
            pass
    assert path.read_text() == "precious"
    assert names(tmp_path) == ["x"]


async def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x"
    async with connect(f"file:{path}") as writer:
        await writer.send([b"mine"])
        path.write_text("precious")
        with pytest.raises(TransportError, match=r"the file exists.*--force"):
            await writer.finish()
        with pytest.raises(TransportError, match="stopped part-way"):
            await writer.finish()
    assert path.read_text() == "precious"
    assert names(tmp_path) == ["x"]


async def test_replace_keeps_the_old_file_until_the_new_one_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    async with connect(f"file:{path}", Options(replace=True)) as writer:
        await writer.send([b"half"])
    assert path.read_text() == "old"
    async with connect(f"file:{path}", Options(replace=True)) as writer:
        await writer.send([b"new"])
        assert path.read_text() == "old"
        await writer.finish()
    assert path.read_text() == "new"
    assert names(tmp_path) == ["x"]
    await write_whole(tmp_path / "y", b"there was none", replace=True)
    assert (tmp_path / "y").read_text() == "there was none"


def make_link(path: Path) -> None:
    path.symlink_to("/nowhere")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, make_link])
async def test_only_regular_files_are_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "x"
    make(path)
    before = path.lstat()
    with pytest.raises(TransportError, match="not a regular file"):
        async with connect(f"file:{path}", Options(replace=True)):
            pass
    assert path.lstat().st_ino == before.st_ino
    assert names(tmp_path) == ["x"]


async def test_the_file_is_finished_in_the_folder_it_was_begun_in(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    async with connect(f"file:{tmp_path}/a/x") as writer:
        await writer.send([b"here"])
        (tmp_path / "a").rename(tmp_path / "b")
        await writer.finish()
    assert (tmp_path / "b" / "x").read_bytes() == b"here"


async def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    await write_whole(Path("x"), b"here")
    assert (tmp_path / "x").read_bytes() == b"here"
    assert await read_whole(Path("x")) == b"here"


async def test_content_name_and_folder_are_synced_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, link = os.fsync, os.link

    def noting_fsync(fd: int) -> None:
        steps.append("sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"sync {os.fstat(fd).st_size} bytes")
        fsync(fd)

    def noting_link(*args: Any, **kwargs: Any) -> None:
        steps.append("name")
        link(*args, **kwargs)

    async with connect(f"file:{tmp_path}/x") as writer:
        monkeypatch.setattr(os, "fsync", noting_fsync)
        monkeypatch.setattr(os, "link", noting_link)
        await writer.send([b"12345"])
        assert steps == []
        await writer.finish()
        assert steps == ["sync 5 bytes", "name", "sync folder"]


async def test_a_write_that_is_taken_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite

    def short_pwrite(fd: int, view: memoryview, offset: int) -> int:
        aligned = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        return pwrite(fd, view[: 4096 if aligned else 1000], offset)

    monkeypatch.setattr(os, "pwrite", short_pwrite)
    async with connect(f"file:{tmp_path}/x") as writer:
        await send_all(writer, [[NOISE[:100_001], b"", NOISE[100_001:200_000]]])
    assert (tmp_path / "x").read_bytes() == NOISE[:200_000]


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8191, 8192, 8193, 3 * 8192, 5 * 8192 + 5000])
async def test_files_of_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Past the page cache only whole pages can be written and read."""
    monkeypatch.setattr(blocks, "BLOCK", 8192)
    await write_whole(tmp_path / "x", NOISE[:size])
    assert (tmp_path / "x").read_bytes() == NOISE[:size]
    forget_the_cache(monkeypatch)
    assert await read_whole(tmp_path / "x") == NOISE[:size]


@pytest.mark.parametrize("first", [1, 4096, 8191, 8192, 10_000])
async def test_a_file_of_which_the_start_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 8192)
    forget_the_cache(monkeypatch, kept=first)
    await write_whole(tmp_path / "x", NOISE[:50_000])
    async with listen(f"file:{tmp_path}/x") as listener, await listener.accept() as reader:
        assert await receive_exactly(reader, first) == NOISE[:first]
        assert file_threads() == []
        assert await receive_all(reader) == NOISE[first:50_000]


async def test_a_file_that_shrinks_while_it_is_read_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_the_cache(monkeypatch, kept=6000)
    await write_whole(tmp_path / "x", NOISE[:50_000])
    async with listen(f"file:{tmp_path}/x") as listener, await listener.accept() as reader:
        assert await receive_exactly(reader, 6000) == NOISE[:6000]
        os.truncate(tmp_path / "x", 5000)
        assert await receive_all(reader) == b""


async def test_what_lives_in_memory_is_read_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.memfd_create("checkpoint", os.MFD_CLOEXEC)
    try:
        os.write(fd, NOISE[:1000])
        async with listen(f"file:/proc/self/fd/{fd}") as listener, await listener.accept() as reader:
            assert await receive_all(reader) == NOISE[:1000]
            assert file_threads() == []
    finally:
        os.close(fd)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has room for two blocks of two pages."""
    monkeypatch.setattr(blocks, "BLOCK", 8192)
    pwrite = os.pwrite

    def pwrite_until_full(fd: int, view: memoryview, offset: int) -> int:
        if offset >= 2 * 8192:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite_until_full)


FULL = r"/x: writing failed \(No space left on device\); free some space"


@pytest.mark.usefixtures("full_disk")
async def test_a_disk_that_gets_full(tmp_path: Path) -> None:
    async with time_limit(), connect(f"file:{tmp_path}/x") as writer:
        with pytest.raises(TransportError, match=FULL):
            while True:
                await writer.send([NOISE[:8192]])
        with pytest.raises(TransportError, match=FULL):
            await writer.send([NOISE[:1000]])
        with pytest.raises(TransportError, match=FULL):
            await writer.finish()
        with pytest.raises(TransportError, match="stopped part-way"):
            await writer.finish()
    assert names(tmp_path) == []


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("size", [3 * 8192 - 1, 3 * 8192])
async def test_a_disk_that_gets_full_at_the_end(tmp_path: Path, size: int) -> None:
    """All was taken; only finish can say that it did not get there."""
    async with time_limit(), connect(f"file:{tmp_path}/x") as writer:
        await writer.send([NOISE[:size]])
        with pytest.raises(TransportError, match=FULL):
            await writer.finish()
    assert names(tmp_path) == []


@pytest.mark.usefixtures("full_disk")
async def test_a_send_that_fails_part_way_tears(tmp_path: Path) -> None:
    async with time_limit(), connect(f"file:{tmp_path}/x") as writer:
        with pytest.raises(TransportError, match=FULL):
            await writer.send([NOISE])
        with pytest.raises(TransportError, match="stopped part-way"):
            await writer.send([b"more"])
    assert names(tmp_path) == []


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """The one way to a failing write that needs neither root nor a stand-in for the system call."""
    program = """
        import anyio, resource, sys
        from vfiostream.errors import TransportError
        from vfiostream.transports import connect
        async def main():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            async with connect(sys.argv[1]) as writer:
                try:
                    await writer.send([bytes(150_000)])
                    await writer.finish()
                except TransportError as error:
                    print(error)
        anyio.run(main)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), f"file:{tmp_path}/x"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "writing failed (File too large); raise the limit" in done.stdout
    assert names(tmp_path) == []


async def test_content_that_can_not_be_made_durable_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_fsync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing_fsync)
    async with connect(f"file:{tmp_path}/x") as writer:
        await writer.send([b"lost"])
        with pytest.raises(TransportError, match=r"finishing failed \(Input/output error\)"):
            await writer.finish()
        # fsync reports an error once and would succeed the next time, with the content still lost.
        monkeypatch.undo()
        with pytest.raises(TransportError, match="stopped part-way"):
            await writer.finish()
    assert names(tmp_path) == []


@pytest.mark.parametrize(("call", "on"), [("unlink", is_partial), ("fsync", is_folder)])
async def test_a_file_that_fails_after_it_was_named_is_gone(
    call: str, on: Callable[[Any], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect(f"file:{tmp_path}/x") as writer:
        await writer.send([b"whole"])
        with monkeypatch.context() as patch:
            let_fail(patch, call, on)
            with pytest.raises(TransportError, match=r"/x: finishing failed \(Input/output error\)"):
                await writer.finish()
        assert not (tmp_path / "x").exists()
        with pytest.raises(TransportError, match="stopped part-way"):
            await writer.finish()
    assert names(tmp_path) == []


async def test_a_replaced_file_whose_folder_fails_is_whole_and_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"old")
    async with connect(f"file:{tmp_path}/x", Options(replace=True)) as writer:
        await writer.send([b"whole"])
        with monkeypatch.context() as patch:
            let_fail(patch, "fsync", is_folder)
            with pytest.raises(TransportError, match=r"Input/output error.*whole under its name.*may not be durable"):
                await writer.finish()
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert names(tmp_path) == ["x"]


async def test_a_name_that_can_not_be_taken_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with connect(f"file:{tmp_path}/x") as writer:
        await writer.send([b"whole"])
        with monkeypatch.context() as patch:
            let_fail(patch, "fsync", is_folder)
            let_fail(patch, "unlink", lambda name: name == "x")
            with pytest.raises(TransportError, match=r"Input/output error.*whole under its name.*may not be durable"):
                await writer.finish()
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert names(tmp_path) == ["x"]


async def test_only_the_file_that_failed_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the folder is being synced, somebody else may give the name to a file of theirs."""
    fsync = os.fsync

    def fsync_too_late(fd: int) -> None:
        if not is_folder(fd):
            return fsync(fd)
        (tmp_path / "theirs").write_bytes(b"theirs")
        (tmp_path / "theirs").replace(tmp_path / "x")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with connect(f"file:{tmp_path}/x") as writer:
        await writer.send([b"ours"])
        monkeypatch.setattr(os, "fsync", fsync_too_late)
        with pytest.raises(TransportError, match=r"finishing failed \(Input/output error\)"):
            await writer.finish()
    assert (tmp_path / "x").read_bytes() == b"theirs"
    assert names(tmp_path) == ["x"]


async def test_a_file_system_without_hard_links_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(TransportError, match=r"hard links.*--force"):
        async with connect(f"file:{tmp_path}/x"):
            pass
    assert names(tmp_path) == []
    await write_whole(tmp_path / "x", b"with --force", replace=True)
    assert (tmp_path / "x").read_bytes() == b"with --force"


async def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"No such file or directory\); check the path; folders are not made"):
        async with connect(f"file:{tmp_path}/none/x"):
            pass


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EACCES, "change its permissions"), (errno.EROFS, "can be written"), (errno.ENOSPC, "free some space")],
)
async def test_a_folder_that_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    open_really = os.open

    def refusing_open(path: str, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return open_really(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing_open)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransportError, match=rf"{re.escape(os.strerror(number))}\); .*{advice}"):
        async with connect(f"file:{tmp_path}/x"):
            pass
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_a_file_to_read_that_does_not_exist(tmp_path: Path) -> None:
    async with listen(f"file:{tmp_path}/x") as listener:
        with pytest.raises(TransportError, match=r"No such file or directory.*check the path"):
            await listener.accept()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
async def test_only_regular_files_are_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    descriptors = len(os.listdir("/proc/self/fd"))
    async with time_limit(), listen(f"file:{tmp_path}/x") as listener:
        with pytest.raises(TransportError, match="not a regular file"):
            await listener.accept()
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_a_file_can_be_read_again(tmp_path: Path) -> None:
    await write_whole(tmp_path / "x", NOISE[:1000])
    async with listen(f"file:{tmp_path}/x") as listener:
        for _ in range(2):
            async with await listener.accept() as reader:
                assert not reader.answers
                assert await receive_all(reader) == NOISE[:1000]


async def test_a_file_has_one_direction(tmp_path: Path) -> None:
    async with connect(f"file:{tmp_path}/x") as writer:
        with pytest.raises(LocalProtocolError):
            await writer.receive([memoryview(bytearray(1))])
        await writer.finish()
    async with listen(f"file:{tmp_path}/x") as listener, await listener.accept() as reader:
        with pytest.raises(LocalProtocolError):
            await reader.send([b"x"])
        with pytest.raises(LocalProtocolError):
            await reader.finish()


async def test_a_file_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_preadv(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    await write_whole(tmp_path / "x", b"x")
    monkeypatch.setattr(os, "preadv", failing_preadv)
    with pytest.raises(TransportError, match=r"reading failed \(Input/output error\)"):
        await read_whole(tmp_path / "x")


class Held:
    """A system call that a thread is in until the test lets it go on."""

    def __init__(self, real: Callable[..., int]) -> None:
        self.real = real
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, *args: Any) -> int:
        self.begun.set()
        assert self.go_on.wait(30)
        return self.real(*args)


def file_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vfiostream-file"]


@pytest.fixture
def held_read(monkeypatch: pytest.MonkeyPatch) -> Held:
    """Nothing is cached, and threads that read are held."""
    held = Held(os.preadv)
    monkeypatch.setattr(os, "preadv", held)
    forget_the_cache(monkeypatch)
    return held


@pytest.fixture
def held_write(monkeypatch: pytest.MonkeyPatch) -> Held:
    """Blocks have two pages, and the thread that writes is held."""
    monkeypatch.setattr(blocks, "BLOCK", 8192)
    held = Held(os.pwrite)
    monkeypatch.setattr(os, "pwrite", held)
    return held


ALL_BLOCKS = write_behind.BLOCKS * 8192


async def test_a_receive_cancelled_while_it_reads_loses_nothing(tmp_path: Path, held_read: Held) -> None:
    await write_whole(tmp_path / "x", NOISE[:1000])
    received = bytearray()

    async def receive_once(transport: Transport) -> None:
        space = bytearray(100)
        received.extend(space[: await transport.receive([memoryview(space)])])

    async with time_limit(), listen(f"file:{tmp_path}/x") as listener, await listener.accept() as reader:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive_once, reader)
            await anyio.to_thread.run_sync(held_read.begun.wait)
            tasks.cancel_scope.cancel()
            held_read.go_on.set()
        received += await receive_all(reader)
    assert received == NOISE[:1000]


async def test_a_send_copies_and_waits_only_for_room(tmp_path: Path, held_write: Held) -> None:
    """What is held is bounded: the blocks, and not a byte more."""
    sent = 0

    async def send_much(transport: Transport) -> None:
        nonlocal sent
        for start in range(0, 2 * ALL_BLOCKS, 1000):
            await transport.send([NOISE[start : start + 1000]])
            sent = start + 1000
        await transport.finish()

    async with time_limit(), connect(f"file:{tmp_path}/x") as writer, anyio.create_task_group() as tasks:
        tasks.start_soon(send_much, writer)
        await anyio.to_thread.run_sync(held_write.begun.wait)
        await anyio.wait_all_tasks_blocked()
        assert sent == ALL_BLOCKS // 1000 * 1000
        held_write.go_on.set()
    assert (tmp_path / "x").read_bytes() == NOISE[:sent]


async def test_a_send_cancelled_while_it_waits_for_its_first_byte_was_not_begun(
    tmp_path: Path, held_write: Held
) -> None:
    async with time_limit(), connect(f"file:{tmp_path}/x") as writer:
        await writer.send([NOISE[:ALL_BLOCKS]])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(writer.send, [b"never"])
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        held_write.go_on.set()
        await send_all(writer, [[b"more"]])
    assert (tmp_path / "x").read_bytes() == NOISE[:ALL_BLOCKS] + b"more"


async def test_a_send_to_a_file_cancelled_part_way_tears(tmp_path: Path, held_write: Held) -> None:
    async with time_limit(), connect(f"file:{tmp_path}/x") as writer:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(writer.send, [NOISE])
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        held_write.go_on.set()
        with pytest.raises(TransportError, match="stopped part-way"):
            await writer.send([b"more"])
        with pytest.raises(TransportError, match="stopped part-way"):
            await writer.finish()
    assert names(tmp_path) == []


async def test_a_finish_cancelled_while_content_is_written_gives_no_name(tmp_path: Path, held_write: Held) -> None:
    async with time_limit(), connect(f"file:{tmp_path}/x") as writer:
        await writer.send([b"half"])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(writer.finish)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        held_write.go_on.set()
        with pytest.raises(TransportError, match="stopped part-way"):
            await writer.finish()
        assert not (tmp_path / "x").exists()
    assert names(tmp_path) == []


async def test_a_file_is_closed_while_a_send_waits(tmp_path: Path, held_write: Held) -> None:
    async def send_and_be_closed(transport: Transport) -> None:
        with pytest.raises(TransportError, match="closed while in use"):
            await transport.send([NOISE])

    async with time_limit(), connect(f"file:{tmp_path}/x") as writer, anyio.create_task_group() as tasks:
        tasks.start_soon(send_and_be_closed, writer)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(writer.aclose)
        await anyio.wait_all_tasks_blocked()
        held_write.go_on.set()
    assert file_threads() == []
    assert names(tmp_path) == []


async def test_a_file_is_closed_while_a_receive_waits(tmp_path: Path, held_read: Held) -> None:
    """Closed under the thread, the descriptor could be somebody else's file by the time of the call."""
    await write_whole(tmp_path / "x", NOISE[:1000])

    async def receive_and_be_closed(transport: Transport) -> None:
        with pytest.raises(TransportError, match="closed while in use"):
            await transport.receive([memoryview(bytearray(1))])

    async with time_limit(), listen(f"file:{tmp_path}/x") as listener:
        reader = await listener.accept()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive_and_be_closed, reader)
            await anyio.to_thread.run_sync(held_read.begun.wait)
            tasks.start_soon(reader.aclose)
            await anyio.wait_all_tasks_blocked()
            held_read.go_on.set()
    assert file_threads() == []


@pytest.mark.parametrize("cancel", [False, True])
async def test_no_thread_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancel: bool) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 8192)
    async with connect(f"file:{tmp_path}/x") as writer:
        await writer.send([NOISE[:100_000]])
        assert len(file_threads()) == 1
        await writer.finish()
        forget_the_cache(monkeypatch)
        async with listen(f"file:{tmp_path}/x") as listener:
            reader = await listener.accept()
        assert await receive_exactly(reader, 100) == NOISE[:100]
        assert len(file_threads()) == 3
        for transport in (writer, reader):
            with anyio.CancelScope() as scope:
                if cancel:
                    scope.cancel()
                await transport.aclose()
        assert file_threads() == []


async def test_a_file_system_that_hangs_does_not_keep_aclose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, held_write: Held
) -> None:
    monkeypatch.setattr(file, "CLOSE_TIMEOUT", 0)
    async with time_limit(), connect(f"file:{tmp_path}/x") as writer:
        await writer.send([NOISE[:8192]])
        [thread] = file_threads()
        await anyio.to_thread.run_sync(held_write.begun.wait)
        await writer.aclose()
        assert "the file system does not answer" in caplog.text
        assert len(names(tmp_path)) == 1
        held_write.go_on.set()
        monkeypatch.undo()
        await writer.aclose()  # waits for the one before
    assert not thread.is_alive()
    assert names(tmp_path) == []


# ---- the queue


def test_unsent_gives_no_empty_buffer_and_releases_all_views() -> None:
    first, second = bytearray(b"abc"), bytearray(b"defgh")
    with Unsent([b"", first, b"", second, b""]) as unsent:
        assert [bytes(view) for view in unsent.head()] == [b"abc", b"defgh"]
        assert [bytes(view) for view in unsent.head(1)] == [b"abc"]
        unsent.advance(4)
        assert [bytes(view) for view in unsent.head()] == [b"efgh"]
        assert unsent
        unsent.advance(4)
        assert not unsent
    with Unsent([first, second]) as unsent:
        unsent.advance(1)
    first.append(1)  # raises BufferError while a view of it is left
    second.append(1)


async def test_memory_holds_no_more_than_its_capacity() -> None:
    sender, receiver = memory_pair(capacity=100)
    async with time_limit(), sender, receiver:
        async with anyio.create_task_group() as tasks:
            await sender.send([bytes(100)])
            tasks.start_soon(send_all, sender, [[b"x"]])
            await anyio.wait_all_tasks_blocked()
            assert await receiver.receive([memoryview(bytearray(64 * KIB))]) == 100
            assert await receive_all(receiver) == b"x"


# ---- options


async def test_what_an_address_does_not_have_is_refused() -> None:
    for opening in (connect, listen):
        with pytest.raises(UsageError, match=r"^tcp:127\.0\.0\.1:0: such an address has no replace; leave that away$"):
            async with opening("tcp:127.0.0.1:0", Options(replace=True)):
                pass


async def test_nobody_answers_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anyio, "getaddrinfo", lambda *_, **__: anyio.sleep_forever())
    with pytest.raises(TransportError, match=r"^tcp:host:1: nobody answered within 0 s; check the address"):
        async with connect("tcp:host:1", Options(timeout=0)):
            pass
