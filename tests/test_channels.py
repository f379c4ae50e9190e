"""Links of several channels: against the suite of all links, and what only they have."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.movers import machines
from tests.slow_connections import SlowConnection, slow_pair
from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost, StreamError, TransportError, UsageError
from vfiostream.migrate import receive, send
from vfiostream.testing import (
    MIB,
    NOISE,
    LinkContract,
    joined,
    receive_all,
    receive_exactly,
    receive_until_gone,
    send_all,
    send_for_ever,
    time_limit,
)
from vfiostream.transports import arrivals, connect, listen, stream
from vfiostream.transports.background import background
from vfiostream.transports.channels import ChannelsTransport
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.options import Options
from vfiostream.transports.segments import MAGIC, Preamble
from vfiostream.uapi.four_region import State

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def linked(address: str, channels: int, **options: Any) -> AsyncIterator[tuple[Transport, Transport]]:
    async with listen(address) as listener:
        async with connect(listener.address, Options(channels=channels, **options)) as sender:
            yield sender, await listener.accept()


class TestTwoOverTcp(LinkContract):
    def pair(self) -> Any:
        return linked("tcp:127.0.0.1:0", 2)


class TestFourOverTcp(LinkContract):
    def pair(self) -> Any:
        return linked("tcp:127.0.0.1:0", 4)


class TestOneThatReconnects(LinkContract):
    def pair(self) -> Any:
        return linked("tcp:127.0.0.1:0", 1, reconnect=5)


class TestFourThatReconnect(LinkContract):
    def pair(self) -> Any:
        return linked("tcp:127.0.0.1:0", 4, reconnect=5)


class SmallBuffers(LinkContract):
    """Sockets that hold little: a segment is taken in many parts, and all channels are in use."""

    @pytest.fixture(autouse=True)
    def _small_buffers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = stream._socket

        def small(family: socket.AddressFamily) -> socket.socket:
            sock = real(family)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            return sock

        monkeypatch.setattr(stream, "_socket", small)


class TestSixteenOverTcp(SmallBuffers):
    def pair(self) -> Any:
        return linked("tcp:127.0.0.1:0", 16)


class TestTwoOverUnixThatHoldLittle(SmallBuffers):
    links = 0

    def pair(self) -> Any:
        self.links += 1
        return linked(f"unix:{self.folder}/{self.links}", 2)


class TestFourOverUnix(LinkContract):
    links = 0

    def pair(self) -> Any:
        self.links += 1
        return linked(f"unix:{self.folder}/{self.links}", 4)


# ---- any order in which channels take and give


@asynccontextmanager
async def over(pairs: list[tuple[SlowConnection, SlowConnection]]) -> AsyncIterator[tuple[Transport, Transport]]:
    """Both ends of a link of these connections."""
    async with background() as tasks:
        ends = [ChannelsTransport("link", side, MIB) for side in zip(*pairs, strict=True)]
        async with ends[0], ends[1]:
            for end in ends:
                tasks.start_soon(end.run)
            yield ends[0], ends[1]


CAPACITIES = st.lists(st.integers(40, 3000), min_size=1, max_size=5)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    capacities=CAPACITIES,
    sizes=st.lists(st.integers(0, 3000), max_size=8),
    space=st.integers(20, 20000),
    seed=st.integers(0, 1 << 30),
)
async def test_whatever_channels_take_and_give_the_bytes_are_the_same(
    capacities: list[int], sizes: list[int], space: int, seed: int
) -> None:
    pairs = [slow_pair(f"slow {number}", capacity, seed + number) for number, capacity in enumerate(capacities)]
    sends = [[NOISE[size : 2 * size], NOISE[:7]] for size in sizes]
    async with time_limit(), over(pairs) as (sender, receiver), anyio.create_task_group() as tasks:
        tasks.start_soon(send_all, sender, sends)
        assert await receive_all(receiver, memoryview(bytearray(space))) == joined(sends)


async def test_a_channel_that_is_stuck_gets_no_more_and_keeps_nobody_else_out() -> None:
    """By free space and not in turns: one that takes nothing after its first bytes does not stop the sender."""
    pairs = [slow_pair("slow", 1 << 20, 1), slow_pair("stuck", 40, 2)]
    async with time_limit(), over(pairs) as (sender, _):
        for _ in range(40):
            await sender.send([NOISE[:20000]])
            if pairs[0][0].out.carried > 500_000:
                break
        assert pairs[1][0].out.carried <= 40


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut_at=st.integers(0, 30000), victim=st.integers(0, 2), seed=st.integers(0, 1 << 30))
async def test_a_channel_that_is_cut_anywhere_ends_the_link_at_both_ends(cut_at: int, victim: int, seed: int) -> None:
    pairs = [slow_pair(f"slow {number}", 997, seed + number) for number in range(3)]
    ending = pairs[victim][0]
    real = ending._write

    def cutting(buffers: Sequence[Buffer]) -> int:
        count = real(buffers)
        if ending.out.carried >= cut_at:
            ending.cut()
        return count

    ending._write = cutting  # type: ignore[method-assign]
    async with time_limit(), over(pairs) as (sender, receiver), anyio.create_task_group() as tasks:

        async def lose() -> None:
            with pytest.raises(ConnectionLost, match=f"channel {victim + 1} of 3: "):
                await send_for_ever(sender)
            with pytest.raises(ConnectionLost, match=f"channel {victim + 1} of 3: "):
                await sender.finish()

        tasks.start_soon(lose)
        received = bytearray()
        space = memoryview(bytearray(5000))
        with pytest.raises(ConnectionLost, match=f"channel {victim + 1} of 3: "):
            while count := await receiver.receive([space]):
                received += space[:count]
        assert received == (NOISE * (len(received) // len(NOISE) + 1))[: len(received)]
        with pytest.raises(ConnectionLost):
            await receiver.receive([space])


# ---- who connects


TOKEN = b"0123456789abcdef"


def head(position: int, length: int, kind: int = 1) -> bytes:
    return struct.pack("<QIB3x", position, length, kind)


@asynccontextmanager
async def channels_of(address: str, count: int, token: bytes = TOKEN) -> AsyncIterator[list[Transport]]:
    """Connections that say they are the channels of a link, and nothing more."""
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(connect(address)) for _ in range(count)]
        for number, one in enumerate(opened):
            await one.send([Preamble(token, number, count).pack()])
        yield opened


LIES = {
    "a position left out": ([head(5, 3) + b"abc", head(9, 3) + b"abc"], "have left out what comes at 0"),
    "one position twice": ([head(0, 3) + b"abc", head(0, 3) + b"abc"], "brings what has come already, at 0"),
    "what has come": ([head(0, 3) + b"abc" + head(1, 1) + b"b"], "brings what has come already, at 1"),
    "an overlap": ([head(0, 3) + b"abc", head(2, 3) + b"cde"], "left out what comes at 3|has come already, at 2"),
    "more than a segment": ([head(0, (4 << 20) + 1)], "has 4194305 bytes, and 1 to 4194304 can be"),
    "a segment of nothing": ([head(0, 0)], "has 0 bytes, and 1 to"),
    "beyond what can be counted": ([head(1 << 63, 1)], "has the position 9223372036854775808, and the last is"),
    "a kind there is not": ([head(0, 1, 9)], "has the unknown kind 9"),
    "padding": ([head(0, 1)[:-1] + b"x"], "zeros"),
    "an end with bytes": ([head(0, 1, 2)], "zeros"),
    "an end before what comes": ([head(0, 3) + b"abc", head(1, 0, 2)], "stream ends at 1, where it does not|already"),
    "two ends": ([head(5, 0, 2), head(6, 0, 2)], "ends at 6, where it does not|is after the end"),
    "bytes after the end": ([head(2, 0, 2), head(2, 3) + b"abc"], "after the end, at 2|has come already|ends at 2"),
}


@pytest.mark.parametrize("name", LIES)
async def test_a_sender_that_lies_is_found_out_in_a_sentence(name: str) -> None:
    says, expected = LIES[name]
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener, channels_of(listener.address, 2) as opened:
        async with await listener.accept() as link:
            for one, data in zip(opened, says, strict=False):
                await one.send([data])
            with pytest.raises(StreamError, match=rf"^tcp:\S+: channel [12] of 2 .*({expected})"):
                for _ in range(10):
                    assert await link.receive([memoryview(bytearray(100))])
            with pytest.raises(StreamError):
                await link.receive([memoryview(bytearray(100))])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.binary(max_size=60), min_size=2, max_size=2), seed=st.integers(0, 99))
async def test_whatever_a_sender_says_what_comes_of_it_has_a_name(pieces: list[bytes], seed: int) -> None:
    pairs = [slow_pair(f"slow {number}", 100, seed) for number in range(2)]
    async with time_limit(), background() as tasks:
        async with ChannelsTransport("link", [there for _, there in pairs], MIB) as link:
            tasks.start_soon(link.run)
            for (evil, _), piece in zip(pairs, pieces, strict=True):
                await evil.send([piece])
                await evil.aclose()
            with pytest.raises((StreamError, ConnectionLost)):
                while await link.receive([memoryview(bytearray(100))]):
                    pass
                raise ConnectionLost("it has ended well")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (MAGIC + b"\x02\x00" + bytes(26), "has version 2"),
        (MAGIC + b"\x01\x00" + bytes(26), "is number 1 of 0"),
        (Preamble(TOKEN, 0, 16).pack().replace(b"\x10", b"\x11", 1), "is number 1 of 17"),
        (struct.pack("<4sHBBB7x16s", MAGIC, 1, 0, 2, 2, TOKEN), "is number 3 of 2"),
        (struct.pack("<4sHBBB7x16s", MAGIC, 1, 2, 2, 1, TOKEN), "zeros"),
        (struct.pack("<4sHBBBxxxI16s", MAGIC, 1, 0, 2, 1, 7, TOKEN), "zeros"),
        (MAGIC + b"\x01", "ends too early"),
    ],
)
async def test_what_is_no_channel_costs_a_line_in_the_log(
    raw: bytes, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener:
        async with connect(listener.address) as stranger:
            await stranger.send([raw])
            await stranger.finish()
            assert await receive_until_gone(stranger) == b""
        assert re.search(expected, caplog.text)
        await arrives(listener)


async def arrives(listener: Listener, channels: int = 3) -> None:
    """Somebody else connects, and gets in."""
    async with connect(listener.address, Options(channels=channels)) as sender:
        await sender.send([b"here"])
        async with await listener.accept() as receiver:
            assert await receive_exactly(receiver, 4) == b"here"


async def test_who_says_nothing_keeps_nobody_out() -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener, AsyncExitStack() as stack:
        for _ in range(arrivals.STRANGERS + 3):
            await stack.enter_async_context(connect(listener.address))
        await arrives(listener)
        async with connect(listener.address) as plain:
            await plain.send([b"VFS"])
            await plain.finish()
            async with await listener.accept() as link:
                assert await receive_all(link) == b"VFS"


async def test_who_leaves_without_a_word_is_no_sender() -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener:
        async with connect(listener.address):
            pass
        await arrives(listener, 1)


async def test_channels_that_do_not_come_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(arrivals, "GATHERING_TIMEOUT", 0.05)
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener:
        async with connect(listener.address) as one:
            await one.send([Preamble(TOKEN, 1, 4).pack()])
            assert await receive_until_gone(one) == b""
        assert "only 1 of 4 channels of a link came within 0.05 s" in caplog.text
        await arrives(listener)


@pytest.mark.parametrize("second", [Preamble(TOKEN, 0, 4), Preamble(TOKEN, 1, 3)])
async def test_channels_that_contradict_each_other(second: Preamble, caplog: pytest.LogCaptureFixture) -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener:
        async with connect(listener.address) as one, connect(listener.address) as two:
            await one.send([Preamble(TOKEN, 0, 4).pack()])
            await anyio.wait_all_tasks_blocked()
            await two.send([second.pack()])
            for each in (one, two):
                assert await receive_until_gone(each) == b""
        assert "contradict each other" in caplog.text
        await arrives(listener)


async def test_links_that_are_not_complete_leave_room_for_one_that_is() -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener, AsyncExitStack() as stack:
        for number in range(arrivals.GATHERINGS - 1):
            one = await stack.enter_async_context(connect(listener.address))
            await one.send([Preamble(bytes([number]) * 16, 0, 2).pack()])
        await anyio.wait_all_tasks_blocked()
        await arrives(listener)


async def test_a_channel_that_comes_late_is_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "GATHERING_TIMEOUT", 0.05)
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener, channels_of(listener.address, 2) as opened:
        async with await listener.accept() as link, connect(listener.address) as late:
            await late.send([Preamble(TOKEN, 1, 2).pack(), head(0, 4), b"evil"])
            assert await receive_until_gone(late) == b""
            await opened[0].send([head(0, 4), b"good"])
            assert await receive_exactly(link, 4) == b"good"


async def test_a_closed_listener_lets_go_of_all_who_wait() -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener:
        async with connect(listener.address) as silent, connect(listener.address) as alone:
            async with connect(listener.address, Options(channels=2)) as whole:
                await alone.send([Preamble(TOKEN, 0, 2).pack()])
                await anyio.wait_all_tasks_blocked()
                await listener.aclose()
                for each in (silent, alone, whole):
                    assert await receive_until_gone(each) == b""


async def test_nobody_listens_for_channels(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="nobody listens there"):
        async with connect(f"unix:{tmp_path}/none", Options(channels=8)):
            pass


@pytest.mark.parametrize("channels", [0, 17, -1])
def test_how_many_there_can_be(channels: int) -> None:
    with pytest.raises(UsageError, match="1 to 16 can"):
        Options(channels=channels)


async def test_a_file_has_no_channels(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="such an address has no channels"):
        async with connect(f"file:{tmp_path}/x", Options(channels=2)):
            pass


@pytest.mark.parametrize("channels", [1, 4, 16])
async def test_a_migration(channels: int) -> None:
    async with machines() as (source, target), time_limit(), listen("tcp:127.0.0.1:0") as listener:

        async def take() -> None:
            async with await listener.accept() as link:
                await receive(target.device, link)

        before = source.digest
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take)
            async with connect(listener.address, Options(channels=channels)) as link:
                await send(source.device, link)
        assert target.digest == before
        assert target.state is State.RUNNING
