"""The reference device as a vfio-user server: every message by hand, and clients that do not keep to the protocol."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.vendor_client import TIMEOUT, Client
from tests.vendor_operations import (
    BAR0,
    BITMAP,
    CONFIG,
    CONTROL,
    IOVA,
    MEMORY,
    PAGE,
    RUNNING,
    RUNNING_LOGGING,
    SMALL,
    STOP,
    STOP_LOGGING,
    VERSION,
    Operations,
    finish,
    refused,
)
from tests.vendor_states import GET, PROBE, SET
from vfiostream.errors import UsageError
from vfiostream.uapi import vfio, vfio_user
from vfiostream.uapi.four_region import VERSION_SUBTYPE
from vfiostream.uapi.vfio_user import Command
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.server import MAX_TRANSFER, Server
from vfiostream.vendor.settings import Interface, Settings


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts servers on a thread each; returns where they listen."""
    running: list[tuple[ReferenceDevice, Server, threading.Thread]] = []

    def start(**changes: Any) -> str:
        path = str(tmp_path / f"{len(running)}.sock")
        device = ReferenceDevice(Settings(**{**SMALL, **changes}))
        server = Server(device, path)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        running.append((device, server, thread))
        return path

    yield start
    for device, server, thread in running:
        server.close()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        device.close()


@pytest.fixture
def path(start: Callable[..., str]) -> str:
    return start()


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 8 * PAGE)
    yield fd
    os.close(fd)


# ---- each message


def test_version(path: str) -> None:
    with Client(path, greet=False) as client:
        reply = client.ask(Command.VERSION, struct.pack("<HH", 0, 7) + b'{"capabilities":{"max_msg_fds":8}}\0')
        assert struct.unpack_from("<HH", reply) == (0, 1)
        assert json.loads(reply[4:-1]) == {
            "capabilities": {
                "max_msg_fds": 1, "max_data_xfer_size": MAX_TRANSFER, "max_dma_maps": 512, "pgsizes": 4096
            }
        }  # fmt: skip
        with refused(errno.EINVAL):
            client.ask(Command.VERSION, vfio_user.pack_version(0, 1, {}))


def test_version_without_capabilities_is_enough(path: str) -> None:
    with Client(path, greet=False) as client:
        assert struct.unpack_from("<HH", client.ask(Command.VERSION, struct.pack("<HH", 0, 0))) == (0, 0)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0\0\0",
        struct.pack("<HH", 1, 0),
        b"\0\0\1\0{",
        b"\0\0\1\0[]",
        b"\0\0\1\0\xff",
        b"\0\0\1\0" + b"[" * 60000,
    ],
)
def test_a_version_that_makes_no_sense_ends_the_connection(path: str, body: bytes) -> None:
    with Client(path, greet=False) as client:
        with refused(errno.EINVAL):
            client.ask(Command.VERSION, body)
        assert client.is_dropped()
    with Client(path):
        pass


def test_nothing_comes_before_version(path: str) -> None:
    with Client(path, greet=False) as client:
        with refused(errno.EINVAL):
            client.ask(Command.DEVICE_RESET)
        assert client.is_dropped()


def test_device_info(path: str) -> None:
    with Client(path) as client:
        reply = client.ask(Command.DEVICE_GET_INFO, vfio.DEVICE_INFO.pack(16, 0, 0, 0))
        assert vfio.DEVICE_INFO.unpack(reply) == (16, vfio.DEVICE_FLAGS_RESET | vfio.DEVICE_FLAGS_PCI, 14, 5)
        with refused(errno.EINVAL):
            client.ask(Command.DEVICE_GET_INFO, vfio.DEVICE_INFO.pack(15, 0, 0, 0))


@pytest.mark.parametrize("mmap", ["whole", "sparse", "none"])
def test_region_info_has_type_areas_and_file_descriptor(start: Callable[..., str], mmap: str) -> None:
    with Client(start(mmap=mmap, memory_region=8 * PAGE)) as client:
        for index in range(14):
            fields, reply, fds = client.region_info(index)
            _, flags, same, cap_offset, size, offset = fields
            type_, sparse = vfio.parse_capabilities(reply, cap_offset)
            assert (same, offset, fields[0]) == (index, 0, len(reply))
            assert bool(flags & vfio.REGION_FLAG_CAPS) == (cap_offset != 0) == (type_ is not None)
            if CONTROL <= index <= BITMAP:
                assert type_ == (2, index - CONTROL + 1)
            if index == VERSION:
                assert type_ == (vfio.REGION_TYPE_PCI_VENDOR | 0x5653, VERSION_SUBTYPE)
            if index != MEMORY:
                for fd in fds:
                    os.close(fd)
                continue
            assert size == 8 * PAGE
            assert bool(flags & vfio.REGION_FLAG_MMAP) == (mmap != "none") == bool(fds)
            assert sparse == (((PAGE, 3 * PAGE), (5 * PAGE, 3 * PAGE)) if mmap == "sparse" else None)
            for fd in fds:
                client.write(MEMORY, PAGE, b"through the socket")
                assert os.pread(fd, 18, PAGE) == b"through the socket"
                with pytest.raises(PermissionError):  # it can't be shrunk under the device's feet
                    os.ftruncate(fd, 0)
                os.close(fd)


def test_region_info_with_little_room_says_how_much_it_needs(path: str) -> None:
    with Client(path) as client:
        full = client.region_info(MEMORY)
        for fd in full[2]:
            os.close(fd)
        fields, reply, fds = client.region_info(MEMORY, argsz=32)
        assert fields[0] == len(full[1]) > len(reply) == 32
        assert fields[1] & vfio.REGION_FLAG_CAPS
        assert fields[3] == 0
        assert not fds
        for argsz, index in ((31, MEMORY), (1024, 14), (1024, 0xFFFF_FFFF)):
            with refused(errno.EINVAL):
                client.region_info(index, argsz)


def test_interrupts_are_none(path: str) -> None:
    with Client(path) as client:
        for index in range(5):
            assert client.ask(Command.GET_IRQ_INFO, struct.pack("<IIII", 16, 0, index, 0)) == struct.pack(
                "<IIII", 16, 0, index, 0
            )
            assert client.ask(Command.SET_IRQS, struct.pack("<IIIII", 20, 0x21, index, 0, 0)) == b""
        for body in (struct.pack("<IIII", 16, 0, 5, 0), struct.pack("<IIII", 15, 0, 0, 0)):
            with refused(errno.EINVAL):
                client.ask(Command.GET_IRQ_INFO, body)
        for body in (struct.pack("<IIIII", 20, 0x24, 0, 0, 1), struct.pack("<IIIII", 20, 0x21, 5, 0, 0)):
            with refused(errno.EINVAL):
                client.ask(Command.SET_IRQS, body)


def test_region_access_within_bounds_and_limits(path: str) -> None:
    with Client(path) as client:
        client.write(MEMORY, 3, b"hello")
        assert client.read(MEMORY, 0, 9) == b"\0\0\0hello\0"
        for offset, count in ((4 * PAGE, 1), (0, 4 * PAGE + 1), (0, 0), ((1 << 64) - 1, 2), (0, MAX_TRANSFER + 1)):
            with refused(errno.EINVAL):
                client.read(MEMORY, offset, count)
        with refused(errno.EINVAL):
            client.read(0xFFFF_FFFF, 0, 1)
        with refused(errno.EPERM):
            client.write(BAR0, 0, b"\0")
        for data in (b"1234", b"123456"):
            with refused(errno.EINVAL):
                client.ask(Command.REGION_WRITE, vfio_user.REGION_ACCESS.pack(0, MEMORY, 5) + data)


def test_the_largest_transfer_goes_both_ways(start: Callable[..., str]) -> None:
    with Client(start(memory_region=MAX_TRANSFER)) as client:
        data = random.Random(1).randbytes(MAX_TRANSFER)
        client.write(MEMORY, 0, data)
        assert client.read(MEMORY, 0, MAX_TRANSFER) == data
        with refused(errno.EINVAL):
            client.ask(Command.REGION_WRITE, vfio_user.REGION_ACCESS.pack(0, MEMORY, MAX_TRANSFER + 1) + data + b"x")


def test_dma_and_bitmap(path: str, memfd: int) -> None:
    with Client(path) as client:
        ops = Operations(client, 4 * PAGE)
        client.dma_map(IOVA, 8 * PAGE, memfd)
        ops.set_state(RUNNING_LOGGING)
        assert ops.get_bitmap(IOVA, 8) == b"\0"
        request = vfio_user.DMA_UNMAP.pack(24, 0, IOVA, 8 * PAGE)
        assert client.ask(Command.DMA_UNMAP, request) == request
        with refused(errno.EINVAL):
            ops.get_bitmap(IOVA, 8)
        with refused(errno.ENOENT):
            client.ask(Command.DMA_UNMAP, request)


def test_dma_that_makes_no_sense_is_refused(path: str, memfd: int) -> None:
    with Client(path) as client:
        client.dma_map(0, 4 * PAGE, memfd)
        good = (32, 3, 0, IOVA, PAGE)
        for change in ({0: 31}, {1: 0}, {1: 4}, {1: 7}, {2: 1}, {2: 8 * PAGE}, {3: 1}, {3: 3 * PAGE}, {4: 1}, {4: 0}):
            fields = [change.get(at, value) for at, value in enumerate(good)]
            with refused(errno.EINVAL):
                client.ask(Command.DMA_MAP, vfio_user.DMA_MAP.pack(*fields), (memfd,))
        for fds in ((), (memfd, memfd)):
            with refused(errno.EINVAL):
                client.ask(Command.DMA_MAP, vfio_user.DMA_MAP.pack(*good), fds)
        reader, writer = os.pipe()
        with refused(errno.EINVAL):
            client.ask(Command.DMA_MAP, vfio_user.DMA_MAP.pack(*good), (reader,))
        os.close(reader)
        os.close(writer)
        read_only = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
        with refused(errno.EACCES):
            client.ask(Command.DMA_MAP, vfio_user.DMA_MAP.pack(*good), (read_only,))
        os.close(read_only)
        for fields in ([23, 0, 0, 4 * PAGE], [24, 1, 0, 4 * PAGE], [24, 0, 0, PAGE]):
            with refused(errno.EINVAL):
                client.ask(Command.DMA_UNMAP, vfio_user.DMA_UNMAP.pack(*fields))


def test_reset(path: str) -> None:
    with Client(path) as client:
        ops = Operations(client, 4 * PAGE)
        ops.set_state(STOP)
        assert client.ask(Command.DEVICE_RESET) == b""
        assert ops.state is RUNNING


@pytest.mark.parametrize("command", [0, 6, 11, 12, 14, 15, 19, 0xFFFF])
def test_commands_that_are_not_supported(path: str, command: int) -> None:
    with Client(path) as client:
        with refused(errno.EOPNOTSUPP):
            client.ask(command, b"whatever")
        client.read(BAR0, 0, 1)


# ---- device features and migration data


def ask_feature(client: Client, flags: int, data: bytes = b"", argsz: int = 4096) -> bytes:
    """Returns the data of the answer."""
    reply = client.ask(Command.DEVICE_FEATURE, struct.pack("<II", argsz, flags) + data)
    assert struct.unpack_from("<II", reply) == (len(reply), flags)
    return reply[8:]


def read_data(client: Client, size: int, argsz: int | None = None) -> bytes:
    request = struct.pack("<II", 8 + size if argsz is None else argsz, size)
    reply = client.ask(Command.MIG_DATA_READ, request)
    told, count = struct.unpack_from("<II", reply)
    assert told == 8 + count == len(reply)
    return reply[8:]


def write_data(client: Client, data: bytes) -> None:
    assert client.ask(Command.MIG_DATA_WRITE, struct.pack("<II", 8 + len(data), len(data)) + data) == b""


def set_migration_state(client: Client, state: int) -> None:
    data = struct.pack("<Ii", state, -1)
    assert ask_feature(client, SET | 2, data) == data


def test_a_move_of_migration_states_from_server_to_server(start: Callable[..., str]) -> None:
    states = {"interface": "migration-states", "memory": 500 * PAGE}
    with Client(start(seed=1, dirty_rate=1 << 20, **states)) as source, Client(start(seed=2, **states)) as target:
        assert ask_feature(source, GET | 1) == struct.pack("<Q", 7)
        assert ask_feature(source, PROBE | GET | SET | 2) == b""
        set_migration_state(source, 6)
        set_migration_state(target, 4)
        for _ in range(3):
            write_data(target, read_data(source, 500_000))
        set_migration_state(source, 3)
        assert ask_feature(source, GET | 2) == struct.pack("<Ii", 3, -1)
        while piece := read_data(source, 500_000):
            write_data(target, piece)
        set_migration_state(target, 1)
        assert source.read(BAR0, 0, 32) == target.read(BAR0, 0, 32)
        set_migration_state(target, 2)


def test_a_device_with_a_migration_region(start: Callable[..., str]) -> None:
    with Client(start(interface="migration-region", mmap="whole")) as client:
        reply = client.ask(Command.DEVICE_GET_INFO, vfio.DEVICE_INFO.pack(16, 0, 0, 0))
        assert vfio.DEVICE_INFO.unpack(reply)[2] == 10
        info, whole, fds = client.region_info(9)
        assert info[4] == 5 * PAGE
        assert vfio.parse_capabilities(whole, info[3]) == ((3, 1), ((PAGE, 4 * PAGE),))
        client.write(9, 0, struct.pack("<I", 2))
        assert struct.unpack("<Q", client.read(9, 8, 8))[0] > 64 * PAGE
        at, size = struct.unpack("<Q", client.read(9, 16, 8))[0], struct.unpack("<Q", client.read(9, 24, 8))[0]
        assert (at, size) == (PAGE, 4 * PAGE)
        assert os.pread(fds[0], size, at) == client.read(9, at, size)
        with refused(errno.EINVAL):
            client.read(9, 0, 8)
        with refused(errno.ENOTTY):
            ask_feature(client, GET | 1)
        assert ask_feature(client, PROBE | SET | 6) == b""
        for fd in fds:
            os.close(fd)


def test_a_device_with_four_regions_has_no_features(path: str) -> None:
    with Client(path) as client:
        for flags in (GET | 1, PROBE | GET | 1, SET | 7):
            with refused(errno.ENOTTY):
                ask_feature(client, flags)
        with refused(errno.EINVAL):
            read_data(client, 4)
        with refused(errno.EINVAL):
            write_data(client, b"data")


def test_the_log_over_messages(start: Callable[..., str], memfd: int) -> None:
    with Client(start(interface="migration-states", dirty_rate=1 << 24)) as client:
        client.dma_map(IOVA, 8 * PAGE, memfd)
        asked = struct.pack("<QII", 2 * PAGE, 1, 0) + struct.pack("<QQ", IOVA, 8 * PAGE)
        assert ask_feature(client, SET | 6, asked) == struct.pack("<Q", PAGE) + asked[8:]  # what it can do
        request = struct.pack("<QQQ", IOVA, 8 * PAGE, PAGE)
        with refused(errno.EINVAL):
            ask_feature(client, GET | 8, request, argsz=39)  # and what it would have told is not lost
        with refused(errno.EINVAL):
            ask_feature(client, GET | 8, request, argsz=0xFFFF_FFFF)
        set_migration_state(client, 1)
        expected = {page for page in range(8) if any(os.pread(memfd, PAGE, page * PAGE))}
        reply = ask_feature(client, GET | 8, request, argsz=40)
        assert reply[:24] == request
        assert {page for page in range(64) if reply[24 + page // 8] >> page % 8 & 1} == expected
        assert ask_feature(client, SET | 7) == b""
        with refused(errno.EINVAL):
            ask_feature(client, GET | 8, request)


def test_malformed_features_and_data(start: Callable[..., str]) -> None:
    with Client(start(interface="migration-states")) as client:
        for size in (0, 4, 7):
            for command in (Command.DEVICE_FEATURE, Command.MIG_DATA_READ, Command.MIG_DATA_WRITE):
                with refused(errno.EINVAL):
                    client.ask(command, bytes(size))
        with refused(errno.EINVAL):
            ask_feature(client, GET | 1, argsz=15)
        set_migration_state(client, 3)
        for size, argsz in ((0, 8), (MAX_TRANSFER + 1, MAX_TRANSFER + 9), (0xFFFF_FFFF, 7), (100, 107)):
            with refused(errno.EINVAL):
                read_data(client, size, argsz)
        assert len(read_data(client, 10_000, 0xFFFF_FFFF)) == 10_000
        client.ask(Command.DEVICE_RESET)
        set_migration_state(client, 4)
        for said, sent in ((3, 4), (5, 4), (0xFFFF_FFFF, 4)):
            with refused(errno.EINVAL):
                client.ask(Command.MIG_DATA_WRITE, struct.pack("<II", 12, said) + bytes(sent))
        write_data(client, b"")
        write_data(client, b"VFS")
        with refused(errno.EINVAL):
            write_data(client, bytes(100))


def test_the_state_outlives_the_client_and_its_log_does_not(start: Callable[..., str]) -> None:
    path = start(interface="migration-states")
    with Client(path) as client:
        set_migration_state(client, 6)
        head = read_data(client, 72)
        ask_feature(client, SET | 6, struct.pack("<QII", PAGE, 0, 0))
    with Client(path) as client:
        assert ask_feature(client, GET | 2) == struct.pack("<Ii", 6, -1)
        assert read_data(client, 72) != head
        with refused(errno.EINVAL):
            ask_feature(client, GET | 8, struct.pack("<QQQ", IOVA, PAGE, PAGE))


def test_no_reply_means_none(path: str) -> None:
    with Client(path) as client:
        body = vfio_user.REGION_ACCESS.pack(0, MEMORY, 4)
        no_reply = vfio_user.FLAG_NO_REPLY
        client.send(vfio_user.pack_message(7, Command.REGION_WRITE, body + b"data", flags=no_reply))
        client.send(vfio_user.pack_message(8, Command.REGION_WRITE, body + b"da", flags=no_reply))
        assert client.read(MEMORY, 0, 4) == b"data"


def test_a_move_from_server_to_server(start: Callable[..., str]) -> None:
    with Client(start(seed=1, dirty_rate=1 << 20)) as one, Client(start(seed=2)) as two:
        source, target = Operations(one, 4 * PAGE), Operations(two, 4 * PAGE)
        target.set_state(STOP)
        source.set_state(RUNNING_LOGGING)
        target.load(source.capture())
        target.load(source.capture())
        finish(source, target)
        assert source.digest == target.digest
        assert target.state is RUNNING


# ---- clients that do not keep to the protocol


@pytest.mark.parametrize(
    "message",
    [
        vfio_user.HEADER.pack(1, Command.REGION_READ, 15, 0, 0),
        vfio_user.HEADER.pack(1, Command.REGION_READ, 0, 0, 0),
        vfio_user.HEADER.pack(1, Command.REGION_WRITE, vfio_user.MAX_MESSAGE + 1, 0, 0),
        vfio_user.HEADER.pack(1, Command.REGION_WRITE, 0xFFFF_FFFF, 0, 0),
        vfio_user.HEADER.pack(1, Command.REGION_READ, 16, 2, 0),
        vfio_user.HEADER.pack(1, Command.DEVICE_RESET, 16, vfio_user.FLAG_REPLY, 0),
    ],
)
def test_a_message_after_which_nothing_can_be_found_ends_the_connection(path: str, message: bytes) -> None:
    with Client(path) as client:
        client.send(message)
        assert client.is_dropped()
    with Client(path) as client:
        client.read(BAR0, 0, 32)


@pytest.mark.parametrize("cut", [1, 15, 16, 20])
def test_a_client_that_goes_away_in_the_middle_of_a_message(path: str, cut: int) -> None:
    with Client(path) as client:
        client.send(vfio_user.pack_message(1, Command.REGION_READ, bytes(16))[:cut])
    with Client(path) as client:
        client.read(BAR0, 0, 32)


def test_a_message_may_come_byte_by_byte(path: str) -> None:
    with Client(path) as client:
        for byte in vfio_user.pack_message(9, Command.REGION_READ, vfio_user.REGION_ACCESS.pack(32, BAR0, 4)):
            client.send(bytes([byte]))
        header, body, _ = client.receive()
        assert (header.msg_id, body[16:]) == (9, struct.pack("<I", RUNNING))


@pytest.mark.parametrize("size", range(36))
@pytest.mark.parametrize("fill", [b"\0", b"\xff"])
@pytest.mark.parametrize("interface", get_args(Interface))
def test_bodies_of_every_size_are_answered(start: Callable[..., str], interface: str, size: int, fill: bytes) -> None:
    with Client(start(interface=interface, states=("stop-copy",))) as client:
        numbers = set()
        for command in Command:
            try:
                client.ask(command, fill * size)
            except OSError as error:
                numbers.add(error.errno)
        assert numbers <= {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT, errno.ENOTTY}
        running = {"four-region": 0, "migration-region": 1, "migration-states": 2}[interface]
        assert client.read(BAR0, 32, 4) == struct.pack("<I", running)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_file_descriptors_nobody_asked_for_are_closed(path: str, memfd: int) -> None:
    with Client(path) as client:
        before = open_fds()
        for _ in range(3):
            with refused(errno.EINVAL):
                client.ask(Command.DEVICE_RESET, b"", (memfd, memfd))
            with refused(errno.EINVAL):
                client.ask(Command.DMA_MAP, b"short", (memfd,))
        client.read(BAR0, 0, 1)  # the server is done with what it answered before
        assert open_fds() == before
        client.send(vfio_user.pack_message(1, Command.DEVICE_RESET), (memfd,) * (vfio_user.MAX_FDS + 1))
        assert client.is_dropped()
        assert open_fds() == before - 1  # the connection is gone
    with Client(path) as client:
        client.read(BAR0, 0, 32)


@pytest.mark.parametrize("seed", range(10))
def test_noise(path: str, seed: int) -> None:
    source = random.Random(seed)
    for _ in range(10):
        with Client(path, greet=bool(source.randrange(2))) as client:
            try:
                for _ in range(5):
                    body = source.randbytes(source.randrange(64))
                    client.send(vfio_user.pack_message(1, source.randrange(20), body, flags=source.choice((0, 16, 32))))
                client.send(source.randbytes(100))
            except ConnectionError:
                pass  # it had enough
    with Client(path) as client:
        client.read(BAR0, 0, 32)


# ---- clients one after another


def test_the_device_outlives_its_clients_and_their_mappings_do_not(path: str, memfd: int) -> None:
    with Client(path) as client:
        ops = Operations(client, 4 * PAGE)
        client.dma_map(IOVA, 8 * PAGE, memfd)
        ops.set_state(STOP_LOGGING)
        client.write(CONFIG, 0, b"staged")
        digest = ops.digest
    with Client(path) as client:
        ops = Operations(client, 4 * PAGE)
        assert ops.state is STOP_LOGGING
        assert ops.digest == digest
        assert client.read(CONFIG, 0, 6) == b"staged"
        with refused(errno.EINVAL):
            ops.get_bitmap(IOVA, 8)
        client.dma_map(IOVA, 8 * PAGE, memfd)
        assert ops.get_bitmap(IOVA, 8) == b"\0"


def test_the_next_client_waits_for_its_turn(path: str) -> None:
    with Client(path) as first, Client(path, greet=False) as second:
        second.send(vfio_user.pack_message(1, Command.VERSION, vfio_user.pack_version(0, 1, {})))
        first.write(CONFIG, 0, b"mine")
        first.socket.close()
        second.receive()
        assert second.read(CONFIG, 0, 4) == b"mine"


# ---- the socket


def test_a_socket_of_somebody_who_listens_is_left_alone(path: str) -> None:
    device = ReferenceDevice(Settings(**SMALL))
    with pytest.raises(UsageError, match="a server is listening"):
        Server(device, path)
    device.close()
    with Client(path) as client:
        client.read(BAR0, 0, 1)


def test_what_is_not_a_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    device = ReferenceDevice(Settings(**SMALL))
    with pytest.raises(UsageError, match="not a socket"):
        Server(device, str(tmp_path / "file"))
    with pytest.raises(UsageError, match="no socket can be made"):
        Server(device, str(tmp_path / "missing" / "socket"))
    with pytest.raises(UsageError, match="no socket can be made"):
        Server(device, str(tmp_path / ("long" * 50)))
    device.close()
    assert (tmp_path / "file").read_text() == "precious"


def test_a_stale_socket_is_replaced(tmp_path: Path, start: Callable[..., str]) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "0.sock"))
    path = start()
    assert path == str(tmp_path / "0.sock")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with Client(path):
        pass
