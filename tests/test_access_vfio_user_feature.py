"""Device features over vfio-user: what is asked of a server, and servers that differ or misbehave, by script."""

from __future__ import annotations

import errno
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import pytest

from tests.access_contract import GET, IOVA, PAGE, PRE_COPY, PRE_COPY_P2P, PROBE, RESUMING, SET, STOP_COPY
from tests.test_access_vfio_user import GUARD, Message, Peer, no_fd_leaks, serving, wait_for_close
from vfiostream.access.contract import MigrationData
from vfiostream.access.vfio_user import VfioUserAccess, connect
from vfiostream.access.vfio_user_feature import MAX_WRITE
from vfiostream.errors import DeviceBroken, DeviceLost, DeviceRefused, UsageError
from vfiostream.uapi.vfio import (
    FEATURE_DMA_LOGGING,
    FEATURE_DMA_LOGGING_REPORT,
    FEATURE_MIG_STATE,
    Feature,
    MigrationState,
)
from vfiostream.uapi.vfio_user import MAX_BODY, MIG_DATA, Command

pytestmark = pytest.mark.anyio

HEAD = struct.Struct("=II")
"""argsz and flags, as the specification has them."""


@asynccontextmanager
async def device(script: Callable[[Peer], None], **capabilities: int) -> AsyncIterator[VfioUserAccess]:
    def whole(peer: Peer) -> None:
        peer.open(**capabilities)
        script(peer)
        wait_for_close(peer)

    with no_fd_leaks(), serving(whole) as path, anyio.fail_after(GUARD):
        async with await connect(path, timeout=GUARD) as access:
            yield access


def feature(peer: Peer) -> tuple[Message, int, int, bytes]:
    """The next message, which has to be DEVICE_FEATURE: it, its argsz, flags and data."""
    message = peer.expect(Command.DEVICE_FEATURE)
    argsz, flags = HEAD.unpack_from(message.body)
    return message, argsz, flags, message.body[HEAD.size :]


def answer(peer: Peer, flags: int, data: bytes = b"") -> bytes:
    """Take a message of those flags and reply to it with ``data`` appended; returns what came with it."""
    message, _, got, sent = feature(peer)
    assert got == flags
    peer.reply(message, HEAD.pack(HEAD.size + len(sent) + len(data), flags) + sent + data)
    return sent


# ---- features


async def test_what_is_sent() -> None:
    def script(peer: Peer) -> None:
        message, argsz, flags, data = feature(peer)
        assert (argsz, flags, data) == (16, 1 << 16 | 1, b"")
        peer.reply(message, HEAD.pack(16, flags) + struct.pack("<Q", 5))
        message, argsz, flags, data = feature(peer)
        assert (argsz, flags, data) == (8, 1 << 18 | 1 << 17 | 2, b"")
        peer.reply(message, message.body)
        message, argsz, flags, data = feature(peer)
        assert (argsz, flags, data) == (16, 1 << 17 | 2, struct.pack("<Ii", 6, -1))
        peer.reply(message, message.body)

    async with device(script) as access:
        assert await access.feature(GET, Feature.MIGRATION, size=8) == struct.pack("<Q", 5)
        assert await access.feature(PROBE | SET, Feature.MIG_DEVICE_STATE) == b""
        assert await access.set_migration_state(MigrationState.PRE_COPY) is not None


@pytest.mark.parametrize("number", [errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO, 0])
async def test_whatever_is_answered_to_a_probe_it_does_not_have_it(number: int) -> None:
    def script(peer: Peer) -> None:
        for _ in range(3):
            peer.reply(feature(peer)[0], number=number)

    async with device(script) as access:
        with pytest.raises(DeviceRefused, match="MIG_DATA_SIZE .*does not have it") as caught:
            await access.feature(PROBE | GET, Feature.MIG_DATA_SIZE)
        assert caught.value.errno == errno.ENOTTY
        with pytest.raises(DeviceRefused) as caught:
            await access.feature(GET, Feature.MIGRATION, size=8)
        assert caught.value.errno == errno.ENOTTY
        assert not await access.can_log_dma()


@pytest.mark.parametrize(
    ("number", "becomes"),
    [
        (errno.ENOSYS, errno.ENOTTY),
        (errno.EOPNOTSUPP, errno.ENOTTY),
        (errno.ENOTTY, errno.ENOTTY),
        (errno.EINVAL, errno.EINVAL),
        (errno.EIO, errno.EIO),
    ],
)
async def test_refusals_of_what_is_no_question(number: int, becomes: int) -> None:
    def script(peer: Peer) -> None:
        peer.reply(feature(peer)[0], b"and a body", number=number)
        peer.reply(feature(peer)[0], number=number)

    async with device(script) as access:
        with pytest.raises(DeviceRefused) as caught:
            await access.set_migration_state(MigrationState.STOP)
        assert caught.value.errno == becomes
        with pytest.raises(DeviceRefused) as caught:
            await access.feature(GET, Feature.MIG_DEVICE_STATE, size=8)
        assert caught.value.errno == becomes


async def test_answers_longer_and_shorter_than_needed() -> None:
    def script(peer: Peer) -> None:
        answer(peer, GET | 1, bytes(range(20)))
        answer(peer, GET | 1, bytes(7))
        answer(peer, GET | 1, bytes(8))
        peer.reply(feature(peer)[0])  # a SET's reply without the request: nothing is missing

    async with device(script) as access:
        assert await access.feature(GET, Feature.MIGRATION, size=8) == bytes(range(8))
        with pytest.raises(DeviceBroken, match="15 bytes instead of 16"):
            await access.feature(GET, Feature.MIGRATION, size=8)
        assert await access.feature(GET, Feature.MIGRATION, size=8) == bytes(8)
        await access.feature(SET, Feature.MIG_PRECOPY_INFO_V2)


async def test_more_than_a_message_holds_is_not_sent() -> None:
    async with device(lambda peer: None) as access:
        with pytest.raises(UsageError, match="does not fit a message"):
            await access.feature(SET, 99, bytes(MAX_BODY))
        with pytest.raises(UsageError, match="too many"):
            await access.start_dma_log(PAGE, [(n * 2 * PAGE, PAGE) for n in range(257)])


@pytest.mark.parametrize("command", ["feature", "state", "read", "write", "log"])
async def test_a_server_that_closes_the_connection(command: str) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        if command in ("read", "write"):
            answer(peer, SET | 2)
        peer.receive()

    with no_fd_leaks(), serving(script) as path, anyio.fail_after(GUARD):
        async with await connect(path, timeout=GUARD) as access:
            data = await access.set_migration_state(RESUMING) if command in ("read", "write") else None
            for _ in range(2):
                with pytest.raises(DeviceLost):
                    match command:
                        case "feature":
                            await access.feature(PROBE | GET, Feature.MIGRATION)
                        case "state":
                            await access.set_migration_state(STOP_COPY)
                        case "log":
                            await access.can_log_dma()
                        case _:
                            assert data is not None
                            await (
                                data.write(b"lost")
                                if command == "write"
                                else data.read_into([memoryview(bytearray(4))])
                            )


# ---- states and data


async def test_which_states_open_a_stream() -> None:
    def script(peer: Peer) -> None:
        for state in (*MigrationState, PRE_COPY, PRE_COPY_P2P, PRE_COPY, STOP_COPY, STOP_COPY):
            assert answer(peer, SET | 2) == FEATURE_MIG_STATE.pack(state, -1)

    async with device(script) as access:
        opened = [await access.set_migration_state(state) is not None for state in MigrationState]
        assert opened == [False, False, False, True, True, False, True, False]  # after PRE_COPY, its stream goes on
        goes_on = [PRE_COPY, PRE_COPY_P2P, PRE_COPY, STOP_COPY]
        assert [await access.set_migration_state(state) for state in goes_on] == [None] * 4
        assert await access.set_migration_state(STOP_COPY) is not None


@pytest.mark.parametrize("between", ["refused", "reset"])
async def test_where_it_is_not_certain_that_a_stream_goes_on_it_is_another(between: str) -> None:
    def script(peer: Peer) -> None:
        answer(peer, SET | 2)
        if between == "reset":
            peer.reply(peer.expect(Command.DEVICE_RESET))
        else:
            peer.reply(feature(peer)[0], number=errno.EIO)
        answer(peer, SET | 2)

    async with device(script) as access:
        assert await access.set_migration_state(PRE_COPY) is not None
        if between == "reset":
            await access.reset()
        else:
            with pytest.raises(DeviceRefused):
                await access.set_migration_state(STOP_COPY)
        assert await access.set_migration_state(STOP_COPY) is not None


@asynccontextmanager
async def data_of(script: Callable[[Peer], None], **capabilities: int) -> AsyncIterator[MigrationData]:
    def whole(peer: Peer) -> None:
        answer(peer, SET | 2)
        script(peer)

    async with device(whole, **capabilities) as access:
        data = await access.set_migration_state(STOP_COPY)
        assert data is not None
        async with data:
            yield data


def read_request(peer: Peer) -> tuple[Message, int]:
    message = peer.expect(Command.MIG_DATA_READ)
    argsz, size = MIG_DATA.unpack(message.body)
    assert argsz == 8 + size
    return message, size


async def test_reading() -> None:
    def script(peer: Peer) -> None:
        message, size = read_request(peer)
        assert size == 64
        peer.reply(message, MIG_DATA.pack(8 + 64, 64) + bytes(range(64)))
        message, size = read_request(peer)
        peer.reply(message, MIG_DATA.pack(8 + 3, 3) + b"abc")  # short, and not the end
        message, size = read_request(peer)
        peer.reply(message, MIG_DATA.pack(8 + 64, 3) + b"def".ljust(64, b"\xff"))  # padded to what was asked
        message, size = read_request(peer)
        peer.reply(message, MIG_DATA.pack(8, 2) + b"gh".ljust(80, b"\xff"))  # padded beyond it
        message, size = read_request(peer)
        peer.reply(message, number=errno.ENOMSG)
        message, size = read_request(peer)
        peer.reply(message, MIG_DATA.pack(8, 0))

    async with data_of(script) as data:
        into = memoryview(bytearray(64))
        assert await data.read_into([into]) == 64
        assert bytes(into) == bytes(range(64))
        for expected in (b"abc", b"def", b"gh"):
            assert await data.read_into([into]) == len(expected)
            assert bytes(into[: len(expected)]) == expected
        with pytest.raises(DeviceRefused) as caught:
            await data.read_into([into])
        assert caught.value.errno == errno.ENOMSG
        assert await data.read_into([into]) == 0
        assert await data.read_into([into[:0]]) == 0  # asks nobody


@pytest.mark.parametrize(
    "body",
    [
        b"",
        bytes(7),
        MIG_DATA.pack(8 + 65, 65) + bytes(65),
        MIG_DATA.pack(8 + 64, 64) + bytes(63),
        MIG_DATA.pack(8, 0xFFFF_FFFF),
    ],
    ids=["empty", "cut", "more than asked", "less than said", "huge"],
)
async def test_reading_what_makes_no_sense(body: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.reply(read_request(peer)[0], body)
        peer.reply(read_request(peer)[0], MIG_DATA.pack(9, 1) + b"x")

    async with data_of(script) as data:
        buffer = bytearray(b"\xa5" * 80)
        with pytest.raises(DeviceBroken, match="makes no sense"):
            await data.read_into([memoryview(buffer)[8:72]])
        assert buffer[:8] == buffer[72:] == b"\xa5" * 8
        assert await data.read_into([memoryview(buffer)]) == 1


async def test_what_was_agreed_bounds_a_read_and_a_write() -> None:
    def script(peer: Peer) -> None:
        message, size = read_request(peer)
        assert size == 96
        peer.reply(message, MIG_DATA.pack(8 + 96, 96) + bytes(96))
        taken = b""
        while len(taken) < 200:
            message = peer.expect(Command.MIG_DATA_WRITE)
            argsz, size = MIG_DATA.unpack_from(message.body)
            assert argsz == 8 + size == len(message.body) <= 8 + 96
            taken += message.body[8:]
            peer.reply(message)
        assert taken == bytes(range(200))

    async with data_of(script, max_data_xfer_size=100) as data:
        assert await data.read_into([memoryview(bytearray(4096))]) == 96
        await data.write(bytes(range(200)))


async def test_writes_are_short_and_reads_are_not() -> None:
    content = bytes(range(256)) * 1024

    def script(peer: Peer) -> None:
        taken = b""
        while len(taken) < len(content):
            message = peer.expect(Command.MIG_DATA_WRITE)
            assert len(message.body) - 8 <= MAX_WRITE
            taken += message.body[8:]
            peer.reply(message)
        assert taken == content
        message, size = read_request(peer)
        assert size == len(content)
        peer.reply(message, MIG_DATA.pack(8 + size, size) + content)

    async with data_of(script) as data:
        await data.write(memoryview(content))
        await data.write(b"")  # asks nobody
        into = bytearray(len(content))
        assert await data.read_into([memoryview(into)]) == len(content)
        assert into == content


async def test_a_refused_write_ends_there() -> None:
    def script(peer: Peer) -> None:
        peer.reply(peer.expect(Command.MIG_DATA_WRITE))
        peer.reply(peer.expect(Command.MIG_DATA_WRITE), number=errno.ENOSPC)

    async with data_of(script) as data:
        with pytest.raises(DeviceRefused) as caught:
            await data.write(bytes(3 * MAX_WRITE))
        assert caught.value.errno == errno.ENOSPC


async def test_there_is_no_precopy_info_and_closed_data_is_closed() -> None:
    async with data_of(lambda peer: None) as data:
        with pytest.raises(DeviceRefused, match="vfio-user has no message for it") as caught:
            await data.precopy_info()
        assert caught.value.errno == errno.ENOTTY
        await data.aclose()
        with pytest.raises(DeviceLost, match="closed"):
            await data.read_into([memoryview(bytearray(1))])
        with pytest.raises(DeviceLost, match="closed"):
            await data.write(b"x")


# ---- the log of DMA


async def test_starting_a_log_ends_one_that_was_left_behind() -> None:
    def script(peer: Peer) -> None:
        peer.reply(feature(peer)[0], number=errno.EINVAL)  # STOP, and none runs
        sent = answer(peer, SET | 6)
        assert sent == FEATURE_DMA_LOGGING.pack(PAGE, 2, 0) + struct.pack("<4Q", IOVA, PAGE, 0, 2 * PAGE)
        assert answer(peer, SET | 7) == b""
        assert answer(peer, SET | 7) == b""
        peer.reply(feature(peer)[0], number=errno.EBUSY)

    async with device(script) as access:
        await access.stop_dma_log()  # none was begun: asks nobody
        await access.start_dma_log(PAGE, [(IOVA, PAGE), (0, 2 * PAGE)])
        await access.stop_dma_log()
        await access.stop_dma_log()
        with pytest.raises(DeviceRefused) as caught:
            await access.start_dma_log(PAGE, [(IOVA, PAGE)])
        assert caught.value.errno == errno.EBUSY


async def test_what_is_needed_for_a_log() -> None:
    def script(peer: Peer) -> None:
        for refused in (None, 6, 7, 8):
            for number, operation in ((6, SET), (7, SET), (8, GET)):
                message, _, flags, _ = feature(peer)
                assert flags == PROBE | operation | number
                if number == refused:
                    peer.reply(message, number=errno.ENOTTY)
                    break
                peer.reply(message, message.body)

    async with device(script) as access:
        assert await access.can_log_dma()
        for _ in range(3):
            assert not await access.can_log_dma()


async def test_a_large_report_is_asked_for_in_pieces() -> None:
    pages = 320 + 320 + 70
    asked: list[tuple[int, int]] = []

    def script(peer: Peer) -> None:
        for _ in range(3):
            message, argsz, flags, data = feature(peer)
            assert flags == GET | 8
            iova, length, page_size = FEATURE_DMA_LOGGING_REPORT.unpack(data)
            assert page_size == PAGE
            count = length // PAGE
            bitmap = b"\x81" * (-(-count // 64) * 8)
            assert argsz == 8 + 24 + len(bitmap)
            asked.append(((iova - IOVA) // PAGE, count))
            peer.reply(message, HEAD.pack(argsz, flags) + data + bitmap + b"more")

    async with device(script, max_data_xfer_size=64) as access:
        bitmap = bytearray(96)
        bitmap[0] = 2
        await access.read_dma_log(IOVA, pages * PAGE, PAGE, memoryview(bitmap))
        assert asked == [(0, 320), (320, 320), (640, 70)]
        assert bitmap[:1] == b"\x83"
        assert bitmap[1:88] == b"\x81" * 87
        assert bitmap[88:] == b"\x01" + bytes(7)  # pages 704 to 709; what is said beyond them does not count


@pytest.mark.parametrize(
    ("length", "page_size", "size"),
    [(PAGE, PAGE, 1), (PAGE, PAGE, 16), (0, PAGE, 0), (PAGE, 0, 8), (PAGE + 1, PAGE, 8), (65 * PAGE, PAGE, 8)],
)
async def test_bitmaps_that_do_not_fit(length: int, page_size: int, size: int) -> None:
    async with device(lambda peer: None) as access:
        with pytest.raises(UsageError, match="have no bitmap"):
            await access.read_dma_log(IOVA, length, page_size, memoryview(bytearray(size)))


async def test_a_report_that_is_too_short() -> None:
    def script(peer: Peer) -> None:
        answer(peer, GET | 8, bytes(7))

    async with device(script) as access:
        bitmap = bytearray(8)
        with pytest.raises(DeviceBroken, match="instead of 40"):
            await access.read_dma_log(IOVA, PAGE, PAGE, memoryview(bitmap))
        assert bitmap == bytes(8)
