"""The vfio-user client: against a whole small server, and against servers that misbehave by script."""

from __future__ import annotations

import array
import errno
import gc
import logging
import mmap
import os
import select
import socket
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from tests.access_contract import IOVA, PAGE, AccessContract, Subject, guest_memory, pattern, read
from vfiostream.access import open_access, vfio_user_channel
from vfiostream.access.contract import Access
from vfiostream.access.mapping import CannotMap, Mapping
from vfiostream.access.region_info import MAX_AREAS
from vfiostream.access.vfio_user import VfioUserAccess, connect
from vfiostream.access.vfio_user_channel import Channel
from vfiostream.errors import (
    DeviceBroken,
    DeviceLost,
    DeviceRefused,
    DeviceTimeout,
    UsageError,
)
from vfiostream.uapi.vfio import (
    DEVICE_FLAGS_PCI,
    DEVICE_FLAGS_RESET,
    DEVICE_INFO,
    MAX_REGION_INFO,
    REGION_FLAG_CAPS,
    REGION_FLAG_MMAP,
    REGION_FLAG_READ,
    REGION_FLAG_WRITE,
    REGION_INFO,
    pack_capabilities,
)
from vfiostream.uapi.vfio_user import (
    DMA_ACCESS,
    DMA_MAP,
    DMA_UNMAP,
    FLAG_ERROR,
    FLAG_NO_REPLY,
    FLAG_REPLY,
    HEADER,
    MAX_BODY,
    MAX_FDS,
    MAX_MESSAGE,
    REGION_ACCESS,
    Command,
    pack_message,
    pack_version,
    parse_version,
)

pytestmark = pytest.mark.anyio

GUARD = 10.0
"""Seconds after which a test that hangs fails."""
RW = REGION_FLAG_READ | REGION_FLAG_WRITE


# ---- the other end of the socket


@dataclass
class Message:
    """What the client sent. Owns the descriptors that came with it."""

    msg_id: int
    command: int
    body: bytes
    fds: list[int] = field(default_factory=list)


class Closed(Exception):
    """The client closed the connection."""


class Peer:
    """The server's end of a connection, blocking, for scripts that run in a thread."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(GUARD)

    def receive(self) -> Message:
        fds: list[int] = []
        head = self._exactly(HEADER.size, fds)
        msg_id, command, size, flags, _ = HEADER.unpack(head)
        assert flags & ~FLAG_REPLY & ~FLAG_ERROR == 0
        assert size - HEADER.size <= MAX_BODY or flags & FLAG_REPLY
        return Message(msg_id, command, self._exactly(size - HEADER.size, fds), fds)

    def expect(self, command: Command) -> Message:
        message = self.receive()
        assert message.command == command
        return message

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self.socket.sendmsg([data], rights)
            self.socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def reply(self, to: Message, body: bytes = b"", *, number: int | None = None, fds: Sequence[int] = ()) -> None:
        flags = FLAG_REPLY if number is None else FLAG_REPLY | FLAG_ERROR
        self.send(pack_message(to.msg_id, to.command, body, flags=flags, errno=number or 0), fds)

    def ask(self, command: Command, body: bytes, *, msg_id: int = 7) -> tuple[int, bytes]:
        """Send a command of the server; returns errno and body of the answer."""
        self.send(pack_message(msg_id, command, body))
        head = self._exactly(HEADER.size, [])
        answered_id, answered, size, flags, number = HEADER.unpack(head)
        body = self._exactly(size - HEADER.size, [])
        assert (answered_id, answered) == (msg_id, command)
        assert flags & FLAG_REPLY
        assert bool(flags & FLAG_ERROR) == bool(number)
        return number, body

    def open(self, *, num_regions: int = 10, **capabilities: Any) -> None:
        """The start of every conversation that gets anywhere."""
        self.reply(self.expect(Command.VERSION), pack_version(0, 1, capabilities))
        info = DEVICE_INFO.pack(16, DEVICE_FLAGS_PCI | DEVICE_FLAGS_RESET, num_regions, 5)
        self.reply(self.expect(Command.DEVICE_GET_INFO), info)

    def reply_read(self, to: Message, data: bytes) -> None:
        assert to.command == Command.REGION_READ
        self.reply(to, to.body + data)

    def heard_nothing(self) -> bool:
        return select.select([self.socket], [], [], 0)[0] == []

    def _exactly(self, size: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece, new, _flags, _ = socket.recv_fds(self.socket, size - len(data), 16)
            except ConnectionResetError as error:  # it closed without reading all we sent
                raise Closed from error
            fds += new
            if not piece:
                raise Closed
            data += piece
        return data


@contextmanager
def listening() -> Iterator[tuple[str, socket.socket]]:
    with (
        tempfile.TemporaryDirectory(prefix="vfiostream-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        path = f"{folder}/device.sock"
        listener.bind(path)
        listener.listen(1)
        yield path, listener


@contextmanager
def serving(*scripts: Callable[[Peer], None]) -> Iterator[str]:
    """A server that plays one script for each connection, in order, and closes it; yields the path of its socket. What
    a script raises is raised at the end; that the client closes is no error.
    """
    failures: list[BaseException] = []

    def serve(listener: socket.socket) -> None:
        for script in scripts:
            connection, _ = listener.accept()
            with connection:
                try:
                    script(Peer(connection))
                except Closed:
                    pass
                except BaseException as failure:  # noqa: BLE001 - raised in the test's own thread below
                    failures.append(failure)

    with listening() as (path, listener):
        listener.settimeout(GUARD)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield path
        finally:
            thread.join(GUARD)
        assert not thread.is_alive()
        if failures:
            raise failures[0]


def wait_for_close(peer: Peer) -> None:
    with pytest.raises(Closed):
        peer.receive()


def open_fds() -> Counter[str]:
    """How many of each kind this process has open ("socket", "/memfd")."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]] += 1
        except FileNotFoundError:
            pass  # the one that lists the folder
    return found


@contextmanager
def no_fd_leaks() -> Iterator[None]:
    gc.collect()  # the event loop of the test before
    before = open_fds()
    yield
    assert open_fds() == before


@contextmanager
def memfd(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("region", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


# ---- a whole small server, for the contract


PLAIN, WHOLE, SPARSE, DOORBELL = 1, 2, 3, 4
SPARSE_AREAS = ((0, PAGE), (2 * PAGE, 3 * PAGE))
REGION_SIZES = {PLAIN: 4096, WHOLE: 128 * 1024, SPARSE: 8 * PAGE, DOORBELL: 16 + PAGE}
SHIFT = 2 * PAGE
"""Where in its descriptor each mappable region starts."""


def small_device(peer: Peer) -> None:
    """Four regions of memory. A write to the last makes the device read or write guest memory, by message: u64 length
    (0 for the data that follows), u64 address. What it read can then be read from byte 16 of that region on.
    """
    with ExitStack() as stack:
        memory: dict[int, mmap.mmap] = {}
        fds: dict[int, int] = {}
        for index, size in REGION_SIZES.items():
            fds[index] = os.memfd_create("region", os.MFD_CLOEXEC)
            stack.callback(os.close, fds[index])
            os.ftruncate(fds[index], SHIFT + size)
            memory[index] = stack.enter_context(mmap.mmap(fds[index], size, offset=SHIFT))
        mapped: set[tuple[int, int]] = set()
        peer.open(num_regions=5)
        while True:
            message = peer.receive()
            for fd in message.fds:
                os.close(fd)
            answer_small(peer, message, memory, fds, mapped)


def answer_small(
    peer: Peer,
    message: Message,
    memory: dict[int, mmap.mmap],
    fds: dict[int, int],
    mapped: set[tuple[int, int]],
) -> None:
    command, body = message.command, message.body
    if command == Command.GET_REGION_INFO:
        argsz, _, index, *_ = REGION_INFO.unpack(body)
        sparse = SPARSE_AREAS if index == SPARSE else None
        caps = pack_capabilities(REGION_INFO.size, type_=(2, index), sparse=sparse) if index in memory else b""
        needed = REGION_INFO.size + len(caps)
        flags = 0 if index not in memory else RW | REGION_FLAG_CAPS
        mappable = index in (WHOLE, SPARSE)
        flags |= REGION_FLAG_MMAP if mappable else 0
        size = len(memory[index]) if index in memory else 0
        complete = argsz >= needed
        info = REGION_INFO.pack(needed, flags, index, REGION_INFO.size if complete else 0, size, SHIFT)
        peer.reply(message, info + (caps if complete else b""), fds=[fds[index]] if mappable and complete else [])
    elif command in (Command.REGION_READ, Command.REGION_WRITE):
        offset, index, count = REGION_ACCESS.unpack_from(body)
        if index not in memory or offset + count > len(memory[index]):
            peer.reply(message, number=errno.EINVAL)
        elif command == Command.REGION_READ:
            peer.reply_read(message, memory[index][offset : offset + count])
        else:
            data = body[REGION_ACCESS.size :]
            number = ring(peer, memory[index], data) if index == DOORBELL else 0
            if index != DOORBELL:
                memory[index][offset : offset + count] = data
            if number:
                peer.reply(message, number=number)
            else:
                peer.reply(message, body[: REGION_ACCESS.size])
    elif command == Command.DMA_MAP:
        mapped.add(DMA_MAP.unpack(body)[3:])
        peer.reply(message)
    elif command == Command.DMA_UNMAP:
        if DMA_UNMAP.unpack(body)[2:] in mapped:
            mapped.remove(DMA_UNMAP.unpack(body)[2:])
            peer.reply(message, body)
        else:
            peer.reply(message, number=errno.ENOENT)
    elif command == Command.DEVICE_RESET:
        peer.reply(message)
    else:
        peer.reply(message, number=errno.ENOTSUP)


def ring(peer: Peer, memory: mmap.mmap, data: bytes) -> int:
    length, address = struct.unpack_from("<QQ", data)
    if length:
        number, answer = peer.ask(Command.DMA_READ, DMA_ACCESS.pack(address, length))
        if not number:
            memory[16 : 16 + length] = answer[DMA_ACCESS.size :]
        return number
    written = data[16:]
    number, _ = peer.ask(Command.DMA_WRITE, DMA_ACCESS.pack(address, len(written)) + written)
    return number


class SmallDevice(Subject):
    memory, unmappable, whole, sparse = PLAIN, PLAIN, WHOLE, SPARSE

    def __init__(self, access: Access) -> None:
        self.access = access

    async def device_reads(self, iova: int, length: int) -> bytes:
        await self.access.write(DOORBELL, 0, struct.pack("<QQ", length, iova))
        return await read(self.access, DOORBELL, 16, length)

    async def device_writes(self, iova: int, data: bytes) -> None:
        await self.access.write(DOORBELL, 0, struct.pack("<QQ", 0, iova) + data)


class TestContract(AccessContract):
    @pytest.fixture
    async def subject(self) -> AsyncIterator[Subject]:
        with no_fd_leaks(), serving(small_device) as path:
            async with await connect(path, timeout=GUARD) as access:
                yield SmallDevice(access)


# ---- connecting


async def refusal(path: str, kind: type[Exception], words: str, *, timeout: float = 60.0) -> None:
    """Connecting fails as it should, in one sentence."""
    with anyio.fail_after(GUARD):
        with pytest.raises(kind, match=words) as caught:
            await connect(path, timeout=timeout)
        assert str(caught.value).startswith(f"vfio-user:{path}")
        assert "\n" not in str(caught.value)
        assert ". " not in str(caught.value)


async def test_no_socket(tmp_path: Path) -> None:
    with no_fd_leaks():
        await refusal(f"{tmp_path}/none.sock", DeviceLost, r"no such socket; .*vfiostream device serve .*none.sock")


async def test_nobody_listens() -> None:
    with no_fd_leaks(), listening() as (path, listener):
        listener.close()
        await refusal(path, DeviceLost, "nobody listens there.*vfiostream device serve")


@pytest.mark.parametrize("kind", ["file", "folder"])
async def test_not_a_socket(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "device"
    if kind == "file":
        path.touch()
    else:
        path.mkdir()
    with no_fd_leaks():
        await refusal(str(path), UsageError, "not a socket.*vfiostream device serve")


async def test_a_socket_of_another_kind(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(f"{tmp_path}/datagrams")
        await refusal(f"{tmp_path}/datagrams", UsageError, "check the address")


async def test_a_path_that_is_too_long() -> None:
    await refusal("/tmp/" + "x" * 200, UsageError, "check the address")


async def test_a_path_that_is_no_text() -> None:
    with no_fd_leaks(), pytest.raises(UsageError, match="check the address"):
        await connect("/tmp/\ud800")


async def test_no_permission(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Root may connect to anything, and tests may run as root; so the kernel's answer is put in here.
    def connect_refused(self: socket.socket, address: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_refused)
        await refusal(f"{tmp_path}/device.sock", UsageError, "no permission to connect; run as the user")


async def test_a_server_that_is_busy_with_somebody_else() -> None:
    with no_fd_leaks(), listening() as (path, _listener):  # connects, as the kernel queues it; nobody accepts
        await refusal(path, DeviceTimeout, "does not answer: is another client using the device", timeout=0.05)


async def test_a_server_whose_queue_is_full() -> None:
    with no_fd_leaks(), listening() as (path, listener), ExitStack() as stack:
        listener.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            waiting.setblocking(False)
            try:
                waiting.connect(path)
            except BlockingIOError:
                break
        await refusal(path, DeviceTimeout, "is another client using the device")


async def test_what_the_client_proposes() -> None:
    proposed: list[tuple[int, int, dict[str, Any]]] = []

    def script(peer: Peer) -> None:
        message = peer.expect(Command.VERSION)
        assert message.body.endswith(b"\0")
        proposed.append(parse_version(message.body))
        peer.reply(message, pack_version(0, 0, {}))
        # A newer server's structure may be longer.
        peer.reply(peer.expect(Command.DEVICE_GET_INFO), DEVICE_INFO.pack(24, DEVICE_FLAGS_PCI, 9, 5) + bytes(8))
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path:
        async with await connect(path) as access:
            assert access.name == f"vfio-user:{path}"
            assert access.info.is_pci
            assert not access.info.can_reset
            assert access.info.num_regions == 9
    major, minor, capabilities = proposed[0]
    assert (major, minor) == (0, 1)
    assert capabilities["max_msg_fds"] == MAX_FDS
    assert capabilities["max_data_xfer_size"] == 1048576
    assert capabilities["migration"] == {"pgsize": 4096}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(pack_version(1, 0, {}), id="another major"),
        pytest.param(pack_version(0, 2, {}), id="newer minor"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\0\0\0", id="cut"),
        pytest.param(b"\0\0\1\0{\0", id="bad JSON"),
        pytest.param(b"\0\0\1\0[]\0", id="no object"),
        pytest.param(b"\0\0\1\0" + b"[" * 9000, id="deep JSON"),
        pytest.param(b"\0\0\1\0" + b" " * 16384, id="too long"),
        pytest.param(pack_version(0, 1, {"max_data_xfer_size": 4}), id="tiny transfers"),
        pytest.param(pack_version(0, 1, {"max_data_xfer_size": "64K"}), id="size in words"),
        pytest.param(pack_version(0, 1, {"max_msg_fds": -1}), id="negative fds"),
        pytest.param(pack_version(0, 1, {"pgsizes": 0}), id="no page size"),
        pytest.param(pack_version(0, 1, {"pgsizes": True}), id="boolean"),
    ],
)
async def test_an_answer_to_version_that_makes_no_sense(answer: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.reply(peer.expect(Command.VERSION), answer)
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path:
        await refusal(path, DeviceBroken, "makes no sense")


async def test_version_refused() -> None:
    def script(peer: Peer) -> None:
        peer.reply(peer.expect(Command.VERSION), number=errno.EPROTO)
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path:
        await refusal(path, DeviceRefused, "refused the negotiation of a version with EPROTO")


@pytest.mark.parametrize("info", [b"", bytes(15), DEVICE_INFO.pack(16, 2, 1 << 31, 0)], ids=["none", "cut", "many"])
async def test_device_info_that_makes_no_sense(info: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.reply(peer.expect(Command.VERSION), pack_version(0, 1, {}))
        peer.reply(peer.expect(Command.DEVICE_GET_INFO), info)
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path:
        await refusal(path, DeviceBroken, "makes no sense")


async def test_open_access_by_address() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        wait_for_close(peer)

    with serving(script) as path:
        async with await open_access(f"vfio-user:{path}") as access:
            assert isinstance(access, VfioUserAccess)
    for address in ("", "vfio-user:", "vfio-user", "pci:0000:00:01.0", "/run/gpu.sock"):
        with pytest.raises(UsageError, match="write vfio-user:SOCKET"):
            await open_access(address)


# ---- a conversation that breaks off


def talk(peer: Peer, *, limit: int, sizes: list[int]) -> None:
    """The server's part in ``converse``, until ``limit`` bytes are sent; notes the sizes of its messages."""

    def send(message: Message, body: bytes, fds: Sequence[int] = ()) -> None:
        data = pack_message(message.msg_id, message.command, body, flags=FLAG_REPLY)
        left = limit - sum(sizes)
        sizes.append(len(data))
        for at in range(0, min(left, len(data)), 7):  # in crumbs: the client must put them together
            peer.send(data[at : min(at + 7, left)], fds if at == 0 else ())
        if left < len(data):
            raise Closed

    with memfd(pattern(2 * PAGE)) as fd:
        send(peer.expect(Command.VERSION), pack_version(0, 1, {}))
        send(peer.expect(Command.DEVICE_GET_INFO), DEVICE_INFO.pack(16, 3, 10, 5))
        caps = pack_capabilities(REGION_INFO.size, type_=(2, 3), sparse=[(0, PAGE)])
        for tail in (b"", caps):
            info = REGION_INFO.pack(REGION_INFO.size + len(caps), RW | REGION_FLAG_CAPS, 9, 32, 2 * PAGE, 0)
            send(peer.expect(Command.GET_REGION_INFO), info + tail, [fd])
        message = peer.expect(Command.REGION_READ)
        send(message, message.body + b"0123")
        message = peer.expect(Command.REGION_WRITE)
        send(message, message.body[: REGION_ACCESS.size])
        message = peer.expect(Command.DMA_MAP)
        os.close(*message.fds)
        send(message, b"")
        message = peer.expect(Command.DMA_UNMAP)
        send(message, message.body)
        send(peer.expect(Command.DEVICE_RESET), b"")


async def converse(path: str) -> None:
    with guest_memory(PAGE) as (fd, _):
        async with await connect(path) as access:
            info = await access.region_info(9)
            await access.map(info)
            assert await read(access, 9, 0, 4) == b"0123"
            await access.write(9, 0, b"4567")
            await access.dma_map(IOVA, PAGE, fd, 0, writable=True)
            await access.dma_unmap(IOVA, PAGE)
            await access.reset()


async def test_a_server_that_closes_after_any_byte() -> None:
    with no_fd_leaks(), anyio.fail_after(60):
        sizes: list[int] = []
        with serving(partial(talk, limit=1 << 20, sizes=sizes)) as path:
            await converse(path)
        for limit in range(sum(sizes)):
            with serving(partial(talk, limit=limit, sizes=[])) as path:
                with pytest.raises(DeviceLost, match="lost during"):
                    await converse(path)


async def test_after_the_server_closed_every_call_says_so() -> None:
    with no_fd_leaks(), serving(lambda peer: peer.open()) as path:
        async with await connect(path) as access:
            with pytest.raises(DeviceLost, match="lost during reading 4 bytes of region 9 at 0x10"):
                await read(access, 9, 16, 4)
            with pytest.raises(DeviceLost, match="can't be used.*open the device again"):
                await read(access, 9, 16, 4)
            with pytest.raises(DeviceLost):
                await access.region_info(0)


# ---- messages that are not what was expected


def wrong(to: Message, kind: str) -> bytes:
    body = to.body + b"data"
    good = pack_message(to.msg_id, to.command, body, flags=FLAG_REPLY)
    return {
        "another id": pack_message(to.msg_id ^ 1, to.command, body, flags=FLAG_REPLY),
        "another command": pack_message(to.msg_id, Command.REGION_WRITE, body, flags=FLAG_REPLY),
        "unknown type": pack_message(to.msg_id, to.command, body, flags=2),
        "smaller than a header": HEADER.pack(to.msg_id, to.command, 15, FLAG_REPLY, 0) + body,
        "no size": HEADER.pack(to.msg_id, to.command, 0, FLAG_REPLY, 0) + body,
        "too large": HEADER.pack(to.msg_id, to.command, MAX_MESSAGE + 1, FLAG_REPLY, 0) + body,
        "huge": HEADER.pack(to.msg_id, to.command, 0xFFFFFFFF, FLAG_REPLY, 0) + body,
        "garbage": bytes(range(200, 256)),
        "text": b"HTTP/1.1 400 Bad Request\r\n\r\n",
        "good": good,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "another id",
        "another command",
        "unknown type",
        "smaller than a header",
        "no size",
        "too large",
        "huge",
        "garbage",
        "text",
    ],
)
async def test_a_reply_that_ends_the_conversation(kind: str) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        with memfd(b"x") as fd:
            peer.send(wrong(peer.expect(Command.REGION_READ), kind), [fd])
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            with pytest.raises(
                DeviceBroken, match="during reading 4 bytes of region 9 at 0x0; the server does not keep"
            ):
                await read(access, 9, 0, 4)
            with pytest.raises(DeviceLost, match="can't be used"):
                await read(access, 9, 0, 4)


@pytest.mark.parametrize(
    ("body", "good"),
    [
        pytest.param(b"", False, id="nothing"),
        pytest.param(REGION_ACCESS.pack(0, 9, 4), False, id="no data"),
        pytest.param(REGION_ACCESS.pack(0, 9, 4) + b"abc", False, id="cut"),
        pytest.param(REGION_ACCESS.pack(0, 9, 3) + b"abc", False, id="short"),
        pytest.param(REGION_ACCESS.pack(0, 9, 5) + b"abcde", False, id="long"),
        pytest.param(REGION_ACCESS.pack(0, 9, 4) + b"abcd" + bytes(100_000), True, id="padded"),
    ],
)
async def test_a_read_answered_with_another_size(body: bytes, good: bool) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.reply(peer.expect(Command.REGION_READ), body)
        peer.reply_read(peer.expect(Command.REGION_READ), b"next")
        wait_for_close(peer)

    with serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            buffer = bytearray(b"\xa5" * 12)
            if good:
                await access.read_into(9, 0, memoryview(buffer)[4:8])
                assert bytes(buffer[4:8]) == b"abcd"
            else:
                with pytest.raises(DeviceBroken, match="answered reading 4 bytes of region 9"):
                    await access.read_into(9, 0, memoryview(buffer)[4:8])
            assert buffer[:4] == buffer[8:] == b"\xa5" * 4
            assert await read(access, 9, 0, 4) == b"next"


async def test_a_write_answered_with_another_count() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        for body in (REGION_ACCESS.pack(0, 9, 3), b"", REGION_ACCESS.pack(0, 9, 4)):
            peer.reply(peer.expect(Command.REGION_WRITE), body)
        wait_for_close(peer)

    with serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            for _ in range(2):
                with pytest.raises(DeviceBroken, match="answered writing 4 bytes to region 9"):
                    await access.write(9, 0, b"data")
            await access.write(9, 0, b"data")


async def test_error_replies_with_a_body_and_descriptors() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        with memfd(b"x") as fd:
            for size in (0, 1, 16, 200_000):
                peer.reply(peer.expect(Command.REGION_READ), b"\xee" * size, number=errno.EBUSY, fds=[fd])
        peer.reply_read(peer.expect(Command.REGION_READ), b"fine")
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            buffer = bytearray(4)
            for _ in range(4):
                with pytest.raises(
                    DeviceRefused, match="refused reading 4 bytes of region 9 at 0x0 with EBUSY"
                ) as caught:
                    await access.read_into(9, 0, memoryview(buffer))
                assert caught.value.errno == errno.EBUSY
                assert buffer == bytes(4)
            await access.read_into(9, 0, memoryview(buffer))
            assert buffer == b"fine"


@pytest.mark.parametrize("number", [0, 4096, 0xFFFFFFEA])
async def test_an_error_without_a_proper_errno(number: int) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.reply(peer.expect(Command.DEVICE_RESET), number=number)
        wait_for_close(peer)

    with serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            with pytest.raises(DeviceRefused, match=f"with EIO .*{number}, says nothing") as caught:
                await access.reset()
            assert caught.value.errno == errno.EIO


async def test_replies_in_crumbs_and_with_descriptors_anywhere() -> None:
    """Descriptors may come with the first byte, with the body, or with every byte of a message nobody wants them in."""

    def script(peer: Peer) -> None:
        peer.open()
        with memfd(b"x") as fd:
            for step in (1, 3, 16, 17, 1000):
                message = peer.expect(Command.REGION_READ)
                data = pack_message(message.msg_id, message.command, message.body + b"data", flags=FLAG_REPLY)
                for count, at in enumerate(range(0, len(data), step)):
                    peer.send(data[at : at + step], [fd] if count < MAX_FDS else [])
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            for _ in range(5):
                assert await read(access, 9, 0, 4) == b"data"
                assert access._channel._fds == []


@pytest.mark.parametrize("at_once", [True, False])
async def test_too_many_descriptors(at_once: bool) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        message = peer.expect(Command.REGION_READ)
        data = pack_message(message.msg_id, message.command, message.body + b"data", flags=FLAG_REPLY)
        with memfd(b"x") as fd:
            if at_once:
                peer.send(data, [fd] * (MAX_FDS + 1))
            else:
                for at in range(MAX_FDS + 1):
                    peer.send(data[at : at + 1], [fd])
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            with pytest.raises(DeviceBroken, match="file descriptors"):
                await read(access, 9, 0, 4)


async def test_descriptors_are_not_inherited() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        with memfd(bytes(PAGE)) as fd:
            message = peer.expect(Command.GET_REGION_INFO)
            peer.reply(message, REGION_INFO.pack(32, RW | REGION_FLAG_MMAP, 9, 0, PAGE, 0), fds=[fd])
            wait_for_close(peer)

    with serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            await access.region_info(9)
            assert not os.get_inheritable(access._region_fds[9])


# ---- how messages go out


async def test_a_server_that_reads_each_message_with_one_recv() -> None:
    data = pattern(96 * 1024)
    memory = bytearray(len(data))

    def script(peer: Peer) -> None:
        peer.open()
        largest = 0
        while True:
            received = peer.socket.recv(MAX_MESSAGE)
            if not received:
                break
            msg_id, command, size, _, _ = HEADER.unpack_from(received)
            assert (command, size) == (Command.REGION_WRITE, len(received))
            largest = max(largest, size)
            offset, _, count = REGION_ACCESS.unpack_from(received, HEADER.size)
            memory[offset : offset + count] = received[HEADER.size + REGION_ACCESS.size :]
            peer.reply(Message(msg_id, command, b""), received[HEADER.size : HEADER.size + REGION_ACCESS.size])
        assert largest == HEADER.size + MAX_BODY

    with serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            for _ in range(50):
                await access.write(9, 0, data)
    assert memory == data


@pytest.mark.parametrize(("limit", "pieces"), [(8, 13), (15, 13), (64, 2), (100, 2), (104, 1), (1 << 40, 1)])
async def test_transfers_are_cut_as_the_server_wants_them(limit: int, pieces: int) -> None:
    data = pattern(100)
    counts: list[int] = []

    def script(peer: Peer) -> None:
        peer.open(max_data_xfer_size=limit)
        while True:
            message = peer.receive()
            offset, _, count = REGION_ACCESS.unpack_from(message.body)
            counts.append(count)
            if message.command == Command.REGION_READ:
                peer.reply_read(message, data[offset - 40 : offset - 40 + count])
            else:
                assert message.body[REGION_ACCESS.size :] == data[offset - 40 : offset - 40 + count]
                peer.reply(message, message.body[: REGION_ACCESS.size])

    with serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            assert await read(access, 9, 40, 100) == data
            assert len(counts) == pieces
            await access.write(9, 40, data)
    assert len(counts) == 2 * pieces
    assert max(counts) <= limit
    assert all(count % 8 == 0 for count in counts[: pieces - 1])


@pytest.mark.parametrize("said", [{}, {"max_data_xfer_size": 1 << 40}])
async def test_reads_are_as_long_as_was_agreed_and_no_longer(said: dict[str, int]) -> None:
    size = (1 << 21) + 8
    counts: list[int] = []

    def script(peer: Peer) -> None:
        peer.open(**said)
        while True:
            message = peer.receive()
            offset, _, count = REGION_ACCESS.unpack(message.body)
            counts.append(count)
            peer.reply_read(message, pattern(size)[offset : offset + count])

    with serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            assert await read(access, 9, 0, size) == pattern(size)
    assert counts == [1 << 20, 1 << 20, 8]


@asynccontextmanager
async def channel_pair(
    serve: Callable[[int, memoryview], None] = lambda command, body: None,
) -> AsyncIterator[tuple[Channel, Peer]]:
    """A channel without a device around it, and the other end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        channel = Channel(ours, "vfio-user:test", serve)
        try:
            yield channel, Peer(theirs)
        finally:
            await channel.aclose()


def fill(connected: socket.socket) -> int:
    """Send zeros until the socket takes no more; returns how many."""
    sent = 0
    while True:
        try:
            sent += connected.send(bytes(256))
        except BlockingIOError:
            return sent


async def test_a_message_is_not_sent_when_cancelled_before_its_first_byte() -> None:
    with anyio.fail_after(GUARD):
        async with channel_pair() as (channel, peer):
            filler = fill(channel._socket)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(channel.call, "the first call", Command.DEVICE_RESET, timeout=GUARD))
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            assert peer._exactly(filler, []) == bytes(filler)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(channel.call, "the second call", Command.DMA_UNMAP, timeout=GUARD))
                await anyio.wait_all_tasks_blocked()
                peer.reply(peer.expect(Command.DMA_UNMAP))


async def test_a_message_is_sent_to_its_end_when_cancelled_within() -> None:
    data = pattern(MAX_BODY)
    with anyio.fail_after(GUARD):
        async with channel_pair() as (channel, peer):
            ended = anyio.Event()

            async def call() -> None:
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    await channel.call("the first call", Command.REGION_WRITE, [data], timeout=GUARD)
                assert scope.cancelled_caught
                ended.set()

            scopes: list[anyio.CancelScope] = []
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call)
                await anyio.wait_all_tasks_blocked()
                scopes[0].cancel()
                await anyio.wait_all_tasks_blocked()
                assert not ended.is_set()  # the rest can't be sent yet, and must be
                message = await anyio.to_thread.run_sync(peer.receive)
                assert message.body == data
                await ended.wait()
                # The reply is owed: it is read before the next command goes out.
                tasks.start_soon(partial(channel.call, "the second call", Command.DEVICE_RESET, timeout=GUARD))
                await anyio.wait_all_tasks_blocked()
                assert peer.heard_nothing()
                await anyio.to_thread.run_sync(peer.reply, message, bytes(99_999))
                peer.reply(await anyio.to_thread.run_sync(peer.receive))


@pytest.mark.parametrize("why", ["cancelled", "too late"])
async def test_a_message_that_cannot_be_finished_ends_the_connection(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vfio_user_channel, "FINISH_TIMEOUT", 0.02)
    with anyio.fail_after(GUARD):
        async with channel_pair() as (channel, _peer):
            call = partial(channel.call, "a call", Command.REGION_WRITE, [bytes(MAX_BODY)])
            if why == "cancelled":
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(partial(call, timeout=GUARD))
                    await anyio.wait_all_tasks_blocked()
                    tasks.cancel_scope.cancel()
            else:
                with pytest.raises(DeviceTimeout, match="a call was not answered within 0.02 s"):
                    await call(timeout=0.02)
            with pytest.raises(DeviceLost, match="the rest of its message could not be sent"):
                await call(timeout=GUARD)


# ---- replies that are owed


class Held:
    """A server that keeps back a reply until it is told."""

    def __init__(self) -> None:
        self.received, self.go_on = threading.Event(), threading.Event()

    def hold(self) -> None:
        self.received.set()
        assert self.go_on.wait(GUARD)


async def wait_for(event: threading.Event) -> None:
    assert await anyio.to_thread.run_sync(event.wait, GUARD)


@pytest.mark.parametrize("first", [0, 5, 16, 20, 32, 33, 35], ids=lambda first: f"{first} bytes sent before")
@pytest.mark.parametrize("error", [False, True], ids=["reply", "error"])
async def test_the_reply_to_a_cancelled_call_is_awaited_first(first: int, error: bool) -> None:
    """Wherever in its reply a call is cancelled: the rest is not received into its buffer, nor taken for the next."""
    held = Held()

    def script(peer: Peer) -> None:
        peer.open()
        message = peer.expect(Command.REGION_READ)
        flags, number = (FLAG_REPLY | FLAG_ERROR, errno.EIO) if error else (FLAG_REPLY, 0)
        data = pack_message(message.msg_id, message.command, message.body + b"late", flags=flags, errno=number)
        with memfd(b"x") as fd:
            peer.send(data[:first], [fd] if first else [])
            held.hold()
            assert peer.heard_nothing()  # before the old reply is there
            peer.send(data[first:])
        peer.reply_read(peer.expect(Command.REGION_READ), b"next")
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            buffer = bytearray(4)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(access.read_into, 9, 0, memoryview(buffer))
                await wait_for(held.received)
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            buffer[:] = b"mine"
            async with anyio.create_task_group() as tasks:

                async def second() -> None:
                    assert await read(access, 9, 0, 4) == b"next"

                tasks.start_soon(second)
                await anyio.wait_all_tasks_blocked()
                held.go_on.set()
            assert buffer == b"mine"


async def test_no_answer_in_time() -> None:
    held = Held()

    def script(peer: Peer) -> None:
        peer.open()
        first = peer.expect(Command.REGION_WRITE)
        held.hold()
        peer.reply(first, first.body[: REGION_ACCESS.size])
        peer.reply_read(peer.expect(Command.REGION_READ), b"now!")
        wait_for_close(peer)

    with serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            access._timeout = 0.05
            with pytest.raises(
                DeviceTimeout, match=r"writing 4 bytes to region 9 at 0x0 was not answered within 0.05 s"
            ):
                await access.write(9, 0, b"slow")
            # The reply is still owed, and so is this call's whole time used up by waiting for it.
            with pytest.raises(DeviceTimeout, match="reading 4 bytes"):
                await read(access, 9, 0, 4)
            access._timeout = GUARD
            held.go_on.set()
            assert await read(access, 9, 0, 4) == b"now!"


async def test_closing_while_a_call_waits() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.expect(Command.REGION_READ)
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        access = await connect(path)

        async def waiting() -> None:
            with pytest.raises(DeviceLost, match="it was closed"):
                await read(access, 9, 0, 4)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(waiting)
            await anyio.wait_all_tasks_blocked()
            await access.aclose()


async def test_a_closed_connection_takes_no_wake_up_from_the_next_socket() -> None:
    """The next one gets its descriptor, by which the event loop knows who waits."""

    async def waiting(channel: Channel) -> None:
        with pytest.raises(DeviceLost, match="it was closed"):
            await channel.call("a reset", Command.DEVICE_RESET, timeout=GUARD)

    async def send_byte(sock: socket.socket) -> None:
        sock.send(b"x")

    with no_fd_leaks(), anyio.fail_after(GUARD):
        async with channel_pair() as (channel, _), anyio.create_task_group() as tasks:
            number = channel._socket.fileno()
            tasks.start_soon(waiting, channel)
            await anyio.wait_all_tasks_blocked()
            await channel.aclose()
            second, second_peer = socket.socketpair()
            with second, second_peer:
                second.setblocking(False)
                second_peer.setblocking(False)
                assert number in (second.fileno(), second_peer.fileno())
                one, other = (second, second_peer) if second.fileno() == number else (second_peer, second)
                tasks.start_soon(send_byte, other)
                await anyio.wait_readable(one)


async def test_nobody_begins_to_wait_for_a_connection_that_is_being_closed() -> None:
    """A call that has just answered a command of the server goes on to its reply, which nobody would wake it for."""
    answered = anyio.Event()

    def serve(command: int, body: memoryview) -> None:
        answered.set()

    async def waiting(channel: Channel) -> None:
        with pytest.raises(DeviceLost, match="it was closed"):
            await channel.call("a reset", Command.DEVICE_RESET, timeout=GUARD)

    with no_fd_leaks(), anyio.fail_after(GUARD):
        async with channel_pair(serve) as (channel, peer), anyio.create_task_group() as tasks:
            tasks.start_soon(waiting, channel)
            await anyio.wait_all_tasks_blocked()
            peer.send(pack_message(1, Command.DMA_READ, b"", flags=FLAG_NO_REPLY))
            await answered.wait()
            await channel.aclose()


async def test_cancelled_while_connecting() -> None:
    held = Held()

    def script(peer: Peer) -> None:
        peer.reply(peer.expect(Command.VERSION), pack_version(0, 1, {}))
        peer.expect(Command.DEVICE_GET_INFO)
        held.received.set()
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connect, path)
            await wait_for(held.received)
            tasks.cancel_scope.cancel()


# ---- the server's own commands


DMA_SIZE = 1048576


def dma(address: int, count: int, data: bytes = b"") -> bytes:
    return DMA_ACCESS.pack(address, count) + data


async def test_the_server_reads_and_writes_guest_memory_while_a_call_waits() -> None:
    def script(peer: Peer) -> None:
        peer.open(max_msg_fds=0)
        mapping = peer.expect(Command.DMA_MAP)
        assert mapping.fds == []
        assert DMA_MAP.unpack(mapping.body) == (32, 3, 0, IOVA, 2 * DMA_SIZE)
        # Already while the range is being mapped.
        assert peer.ask(Command.DMA_READ, dma(IOVA, 4)) == (0, dma(IOVA, 4, b"head"))
        peer.reply(mapping)
        message = peer.expect(Command.REGION_WRITE)
        assert peer.ask(Command.DMA_READ, dma(IOVA + 1, 3)) == (0, dma(IOVA + 1, 3, b"ead"))
        assert peer.ask(Command.DMA_WRITE, dma(IOVA + 8, 5, b"hello")) == (0, dma(IOVA + 8, 5))
        # As much as fits a message, either way.
        large = pattern(DMA_SIZE)
        assert peer.ask(Command.DMA_WRITE, dma(IOVA + DMA_SIZE, DMA_SIZE, large)) == (0, dma(IOVA + DMA_SIZE, DMA_SIZE))
        assert peer.ask(Command.DMA_READ, dma(IOVA + DMA_SIZE, DMA_SIZE))[1] == dma(IOVA + DMA_SIZE, DMA_SIZE, large)
        # One that wants no reply gets none.
        peer.send(pack_message(3, Command.DMA_WRITE, dma(IOVA + 16, 2, b"ok"), flags=FLAG_NO_REPLY))
        peer.reply(message, message.body[: REGION_ACCESS.size])
        wait_for_close(peer)

    with (
        no_fd_leaks(),
        serving(script) as path,
        anyio.fail_after(GUARD),
        guest_memory(2 * DMA_SIZE + PAGE) as (fd, memory),
    ):
        memory[PAGE : PAGE + 4] = b"head"
        async with await connect(path) as access:
            await access.dma_map(IOVA, 2 * DMA_SIZE, fd, PAGE, writable=True)
            await access.write(9, 0, b"go")
        assert memory[PAGE : PAGE + 20] == b"head\0\0\0\0hello\0\0\0ok\0\0"
        assert memory[PAGE + DMA_SIZE :] == pattern(DMA_SIZE)
        assert memory[:PAGE] == bytes(PAGE)


@pytest.mark.parametrize(
    ("command", "body"),
    [
        pytest.param(Command.DMA_READ, dma(IOVA - 1, 4), id="before"),
        pytest.param(Command.DMA_READ, dma(IOVA + PAGE - 1, 2), id="over the end"),
        pytest.param(Command.DMA_READ, dma(IOVA + PAGE, 1), id="behind"),
        pytest.param(Command.DMA_READ, dma(0, 1), id="nowhere"),
        pytest.param(Command.DMA_READ, dma((1 << 64) - 1, (1 << 64) - 1), id="around the end"),
        pytest.param(Command.DMA_READ, dma(IOVA, 0), id="nothing"),
        pytest.param(Command.DMA_READ, dma(IOVA, (1 << 64) - 1), id="everything"),
        pytest.param(Command.DMA_READ, dma(IOVA + 16 * PAGE, DMA_SIZE + 1), id="more than a message holds"),
        pytest.param(Command.DMA_READ, dma(IOVA, 4)[:15], id="cut"),
        pytest.param(Command.DMA_READ, b"", id="empty"),
        pytest.param(Command.DMA_WRITE, dma(IOVA + 8 * PAGE, 4, b"read"), id="read only"),
        pytest.param(Command.DMA_WRITE, dma(IOVA, 4, b"abc"), id="too little data"),
        pytest.param(Command.DMA_WRITE, dma(IOVA, 2, b"abc"), id="too much data"),
        pytest.param(Command.DMA_WRITE, dma(IOVA + PAGE - 2, 4, b"over"), id="write over the end"),
        pytest.param(Command.REGION_READ, REGION_ACCESS.pack(0, 9, 4), id="not a command for us"),
        pytest.param(0x7777, b"what?", id="unknown"),
    ],
)
async def test_a_command_of_the_server_that_is_refused(command: int, body: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        for _ in range(3):
            mapping = peer.expect(Command.DMA_MAP)
            os.close(*mapping.fds)
            peer.reply(mapping)
        message = peer.expect(Command.REGION_READ)
        with memfd(b"x") as fd:
            peer.send(pack_message(1, command, body), [fd])
        head = peer._exactly(HEADER.size, [])
        assert HEADER.unpack(head) == (1, command, HEADER.size, FLAG_REPLY | FLAG_ERROR, errno.EINVAL)
        peer.reply_read(message, b"data")
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD), guest_memory(2 * DMA_SIZE) as (fd, memory):
        async with await connect(path) as access:
            await access.dma_map(IOVA, PAGE, fd, 0, writable=True)
            await access.dma_map(IOVA + 8 * PAGE, PAGE, fd, 0, writable=False)
            await access.dma_map(IOVA + 16 * PAGE, DMA_SIZE + PAGE, fd, 0, writable=True)
            assert await read(access, 9, 0, 4) == b"data"
        assert memory[:PAGE] == bytes(PAGE)


async def test_a_command_of_the_server_that_a_cancelled_call_began_to_receive() -> None:
    held = Held()

    def script(peer: Peer) -> None:
        peer.open()
        mapping = peer.expect(Command.DMA_MAP)
        os.close(*mapping.fds)
        peer.reply(mapping)
        first = peer.expect(Command.REGION_READ)
        data = pack_message(1, Command.DMA_WRITE, dma(IOVA, 8, b"in two.."))
        peer.send(data[:36])
        held.hold()
        peer.send(data[36:])
        answer = pack_message(1, Command.DMA_WRITE, dma(IOVA, 8), flags=FLAG_REPLY)
        assert peer._exactly(len(answer), []) == answer
        peer.reply_read(first, b"late")
        peer.reply_read(peer.expect(Command.REGION_READ), b"next")
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD), guest_memory(PAGE) as (fd, memory):
        async with await connect(path) as access:
            await access.dma_map(IOVA, PAGE, fd, 0, writable=True)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read, access, 9, 0, 4)
                await wait_for(held.received)
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            held.go_on.set()
            assert await read(access, 9, 0, 4) == b"next"
        assert memory[:8] == b"in two.."


async def test_a_server_that_never_stops_asking_runs_into_the_time_limit() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.expect(Command.REGION_READ)
        with pytest.raises(Closed):
            while True:
                peer.send(pack_message(1, Command.DMA_READ, dma(0, 1), flags=FLAG_NO_REPLY) * 100)

    with serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            access._timeout = 0.05
            with pytest.raises(DeviceTimeout):
                await read(access, 9, 0, 4)


# ---- DMA mappings


async def test_mapping_passes_the_descriptor() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        message = peer.expect(Command.DMA_MAP)
        assert DMA_MAP.unpack(message.body) == (32, 1, PAGE, IOVA, PAGE)
        (fd,) = message.fds
        assert os.pread(fd, 4, PAGE) == b"here"
        os.close(fd)
        peer.reply(message)
        message = peer.expect(Command.DMA_UNMAP)
        assert DMA_UNMAP.unpack(message.body) == (24, 0, IOVA, PAGE)
        peer.reply(message)  # some don't echo
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD), guest_memory(2 * PAGE) as (fd, memory):
        memory[PAGE : PAGE + 4] = b"here"
        async with await connect(path) as access:
            await access.dma_map(IOVA, PAGE, fd, PAGE, writable=False)
            await access.dma_unmap(IOVA, PAGE)


async def test_a_mapping_that_is_refused_is_not_served() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        message = peer.expect(Command.DMA_MAP)
        os.close(*message.fds)
        peer.reply(message, number=errno.EEXIST)
        message = peer.expect(Command.REGION_READ)
        assert peer.ask(Command.DMA_READ, dma(IOVA, 4)) == (errno.EINVAL, b"")
        peer.reply_read(message, b"data")
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD), guest_memory(PAGE) as (fd, _):
        async with await connect(path) as access:
            with pytest.raises(DeviceRefused, match="refused mapping 0x1000 bytes of guest memory at 0x1000000000"):
                await access.dma_map(IOVA, PAGE, fd, 0, writable=True)
            assert await read(access, 9, 0, 4) == b"data"


async def test_a_mapping_made_again_after_a_cancelled_unmap_wins() -> None:
    held = Held()

    def script(peer: Peer) -> None:
        peer.open()
        for command in (Command.DMA_MAP, Command.DMA_UNMAP, Command.DMA_MAP):
            message = peer.expect(command)
            for fd in message.fds:
                os.close(fd)
            if command == Command.DMA_UNMAP:
                held.hold()
            peer.reply(message)
        message = peer.expect(Command.REGION_READ)
        assert peer.ask(Command.DMA_READ, dma(IOVA, 3)) == (0, dma(IOVA, 3, b"new"))
        assert peer.ask(Command.DMA_READ, dma(IOVA + PAGE, 3)) == (errno.EINVAL, b"")
        peer.reply_read(message, b"data")
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD), guest_memory(3 * PAGE) as (fd, memory):
        memory[:3] = b"old"
        memory[2 * PAGE : 2 * PAGE + 3] = b"new"
        async with await connect(path) as access:
            await access.dma_map(IOVA, 2 * PAGE, fd, 0, writable=True)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(access.dma_unmap, IOVA, 2 * PAGE)
                await wait_for(held.received)
                tasks.cancel_scope.cancel()
            held.go_on.set()
            await access.dma_map(IOVA, PAGE, fd, 2 * PAGE, writable=True)
            assert await read(access, 9, 0, 4) == b"data"


async def test_mappings_that_make_no_sense_are_not_sent() -> None:
    def script(peer: Peer) -> None:
        peer.open(pgsizes=PAGE * 4 | PAGE * 512)
        wait_for_close(peer)

    size = PAGE * 4
    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD), guest_memory(size) as (fd, _):
        async with await connect(path) as access:
            for iova, length in [
                (IOVA + PAGE, size),
                (IOVA, PAGE),
                (IOVA, 0),
                (-size, size),
                ((1 << 64) - size, 2 * size),
            ]:
                with pytest.raises(UsageError, match="wants multiples of 0x4000"):
                    await access.dma_map(iova, length, fd, 0, writable=True)
                with pytest.raises(UsageError, match="wants multiples of 0x4000"):
                    await access.dma_unmap(iova, length)
            with pytest.raises(UsageError, match="can't be done"):  # the file is too short
                await access.dma_map(IOVA, 2 * size, fd, 0, writable=True)
            with pytest.raises(UsageError, match="can't be done"):
                await access.dma_map(IOVA, size, fd, 7, writable=True)
            with pytest.raises(UsageError, match="can't be done"):
                await access.dma_map(IOVA, size, -1, 0, writable=True)
            with pytest.raises(UsageError, match="can't be done"):
                await access.dma_map(IOVA, size, 1 << 20, 0, writable=True)


# ---- region info and mapping


def region_script(*replies: tuple[bytes, bool], content: bytes = b"", size: int = 0) -> Callable[[Peer], None]:
    """A server that answers queries for region 9 with ``replies``, each with a body and whether a file of ``content``
    (or of ``size`` zeros) comes along.
    """

    def script(peer: Peer) -> None:
        peer.open()
        for body, with_fd in replies:
            message = peer.expect(Command.GET_REGION_INFO)
            assert REGION_INFO.unpack(message.body)[1:] == (0, 9, 0, 0, 0)
            with memfd(content or bytes(size)) as fd:
                peer.reply(message, body, fds=[fd] if with_fd else [])
        wait_for_close(peer)

    return script


def region_reply(size: int, sparse: Sequence[tuple[int, int]] | None = None, *, argsz: int | None = None) -> bytes:
    """Of a region with capabilities: complete only when asked again."""
    caps = pack_capabilities(REGION_INFO.size, type_=(2, 3), sparse=sparse)
    needed = REGION_INFO.size + len(caps) if argsz is None else argsz
    return REGION_INFO.pack(needed, RW | REGION_FLAG_MMAP | REGION_FLAG_CAPS, 9, REGION_INFO.size, size, 0) + caps


def bare_reply(size: int, *, flags: int = RW | REGION_FLAG_MMAP, offset: int = 0) -> bytes:
    """Of a region without capabilities: complete at once."""
    return REGION_INFO.pack(REGION_INFO.size, flags, 9, 0, size, offset)


async def test_region_info_comes_whole_when_asked_with_the_size_wanted() -> None:
    """Neither capabilities nor descriptor the first time, a descriptor at every asking: the newest is mapped."""
    full = region_reply(4 * PAGE, [(2 * PAGE, PAGE), (0, PAGE)])
    asked: list[int] = []

    def script(peer: Peer) -> None:
        peer.open()
        for content, body in ((b"old", full[:32]), (b"new", full)):
            message = peer.expect(Command.GET_REGION_INFO)
            asked.append(REGION_INFO.unpack(message.body)[0])
            with memfd(content * (2 * PAGE)) as fd:
                peer.reply(message, body, fds=[fd, fd])
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            info = await access.region_info(9)
            assert (info.type, info.subtype, info.size) == (2, 3, 4 * PAGE)
            assert info.mappable == ((0, PAGE), (2 * PAGE, PAGE))
            assert await access.region_info(9) is info  # not asked again
            first, second = await access.map(info)
            assert (first.offset, second.offset) == (0, 2 * PAGE)
            assert bytes(first.view[:3]) == b"new"
            assert access._region_fds == {}
    assert asked == [32, len(full)]


async def test_a_region_is_mapped_where_its_offset_says() -> None:
    content = b"-" * PAGE + b"A" * PAGE + b"B" * PAGE
    script = region_script((bare_reply(2 * PAGE, offset=PAGE), True), content=content)
    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            (area,) = await access.map(await access.region_info(9))
            assert area.view == content[PAGE:]
            assert not area.view.readonly


@pytest.mark.parametrize(
    ("flags", "with_fd", "mappable"),
    [
        (RW | REGION_FLAG_MMAP, True, True),
        (RW | REGION_FLAG_MMAP, False, False),
        (RW, True, False),
        (REGION_FLAG_READ | REGION_FLAG_MMAP, True, True),
        (REGION_FLAG_MMAP, True, False),
    ],
)
async def test_what_is_mappable(flags: int, with_fd: bool, mappable: bool) -> None:
    script = region_script((bare_reply(PAGE, flags=flags), with_fd), size=PAGE)
    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            info = await access.region_info(9)
            assert (info.readable, info.writable) == (bool(flags & REGION_FLAG_READ), bool(flags & REGION_FLAG_WRITE))
            assert info.mappable == (((0, PAGE),) if mappable else ())
            assert bool(access._region_fds) == mappable
            areas = await access.map(info)
            assert len(areas) == mappable
            if areas:
                assert areas[0].view.readonly == (not info.writable)


async def test_areas_that_cannot_be_mapped_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """The file ends within the second area; touching what is behind it would kill us."""
    script = region_script(
        (body := region_reply(3 * PAGE, [(0, PAGE), (PAGE, 2 * PAGE)]), False), (body, True), size=PAGE
    )
    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            info = await access.region_info(9)
            with caplog.at_level(logging.WARNING, "vfiostream.access"):
                (area,) = await access.map(info)
            assert area.offset == 0
            assert "0x1000+0x2000 of region 9 can't be mapped" in caplog.text
            assert await access.map(info) == (area,)


@pytest.mark.parametrize("offset", [1, PAGE - 1, 1 << 63, (1 << 64) - PAGE])
async def test_an_offset_that_cannot_be_mapped(offset: int) -> None:
    script = region_script((bare_reply(PAGE, offset=offset), True), size=PAGE)
    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            assert await access.map(await access.region_info(9)) == ()


async def test_a_descriptor_that_cannot_be_mapped_at_all() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.reply(peer.expect(Command.GET_REGION_INFO), bare_reply(PAGE), fds=[peer.socket.fileno()])
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            assert await access.map(await access.region_info(9)) == ()


AREAS = [(n * PAGE, PAGE) for n in range(MAX_AREAS + 1)]


@pytest.mark.parametrize(
    ("replies", "words"),
    [
        pytest.param([b""], "in 0 bytes", id="nothing"),
        pytest.param([region_reply(PAGE)[:31]], "in 31 bytes", id="cut"),
        pytest.param([region_reply(PAGE, argsz=MAX_REGION_INFO + 1)], "limit is 65536", id="too large"),
        pytest.param([region_reply(PAGE, argsz=0xFFFFFFFF)], "limit is 65536", id="huge"),
        pytest.param([region_reply(PAGE), b""], "in 0 bytes", id="nothing at the second asking"),
        pytest.param([region_reply(PAGE), region_reply(PAGE)[:40]], "capability chain", id="capabilities cut"),
        pytest.param(
            [bare_reply(PAGE, flags=RW | REGION_FLAG_CAPS)[:12] + b"\x20" + bytes(19)], "chain", id="no chain"
        ),
        pytest.param([REGION_INFO.pack(32, RW, 8, 0, PAGE, 0)], "region 8 when asked about region 9", id="another"),
        pytest.param([region_reply(PAGE, [(0, 2 * PAGE)])] * 2, "mappable area", id="area over the end"),
        pytest.param([region_reply(PAGE, [(PAGE, PAGE)])] * 2, "mappable area", id="area behind the end"),
        pytest.param([region_reply(PAGE, [((1 << 64) - PAGE, PAGE)])] * 2, "mappable area", id="area far away"),
        pytest.param([region_reply(9 * PAGE, [(0, 0)])] * 2, "mappable area", id="empty area"),
        pytest.param([region_reply(9 * PAGE, [(8, PAGE)])] * 2, "mappable area", id="misaligned"),
        pytest.param([region_reply(9 * PAGE, [(0, 2 * PAGE), (PAGE, PAGE)])] * 2, "mappable area", id="overlapping"),
        pytest.param([region_reply(1 << 40, AREAS)] * 2, "257 mappable areas", id="too many areas"),
    ],
)
async def test_region_info_that_makes_no_sense(replies: list[bytes], words: str) -> None:
    script = region_script(*[(reply, True) for reply in replies], size=9 * PAGE)
    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            with pytest.raises(DeviceBroken, match=words):
                await access.region_info(9)


async def test_a_region_the_device_does_not_have() -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.reply(peer.expect(Command.GET_REGION_INFO), number=errno.EINVAL)
        wait_for_close(peer)

    with serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            for index in (-1, 10, 1 << 32):
                with pytest.raises(UsageError, match="its regions are 0 to 9"):
                    await access.region_info(index)
            with pytest.raises(DeviceRefused, match="refused the query for region 9 with EINVAL"):
                await access.region_info(9)


async def test_cancelled_between_the_two_queries_for_a_region() -> None:
    held = Held()
    full = region_reply(PAGE)

    def script(peer: Peer) -> None:
        peer.open()
        with memfd(bytes(PAGE)) as fd:
            peer.reply(peer.expect(Command.GET_REGION_INFO), full[:32], fds=[fd])
            message = peer.expect(Command.GET_REGION_INFO)
            held.hold()
            peer.reply(message, full, fds=[fd])
            for body in (full[:32], full):
                peer.reply(peer.expect(Command.GET_REGION_INFO), body, fds=[fd])
        wait_for_close(peer)

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(access.region_info, 9)
                await wait_for(held.received)
                tasks.cancel_scope.cancel()
            held.go_on.set()
            assert (await access.region_info(9)).mappable == ((0, PAGE),)


def test_a_mapping_needs_memory() -> None:
    with memfd(bytes(PAGE)) as fd:
        for length in (0, -1):
            with pytest.raises(CannotMap):
                Mapping(fd, 0, length, writable=True)


# ---- what is logged


async def test_every_message_can_be_traced(caplog: pytest.LogCaptureFixture) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        message = peer.expect(Command.REGION_READ)
        assert peer.ask(Command.DMA_READ, dma(0, 1))[0] == errno.EINVAL
        peer.reply_read(message, b"data")
        wait_for_close(peer)

    with caplog.at_level(logging.DEBUG, "vfiostream.access"), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path) as access:
            await read(access, 9, 8, 4)
    lines = [record.getMessage() for record in caplog.records if record.name == "vfiostream.access"]
    assert len(lines) == 7
    assert f"vfio-user:{path}: > REGION_READ id 3, 32 bytes: reading 4 bytes of region 9 at 0x8" in lines
    assert f"vfio-user:{path}: command 11 of the server, 32 bytes, errno 22" in lines
    assert f"vfio-user:{path}: < reply id 3, 36 bytes, 0 fds, errno 0" in lines
