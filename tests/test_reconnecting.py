"""Links that outlive their connections: cut at many points, they go on, and send nothing again without need."""

from __future__ import annotations

import re
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.certificates import issued, written
from tests.cutting_proxy import Cuts, CuttingProxy
from tests.movers import SMALL, machines
from vfiostream.errors import ConnectionLost, StreamError, TransportError, UsageError
from vfiostream.migrate import receive, send
from vfiostream.testing import MIB, NOISE, receive_all, receive_exactly, send_all, send_for_ever, time_limit
from vfiostream.transports import connect, joining, listen, reconnecting, stream
from vfiostream.transports.channels import ChannelsTransport
from vfiostream.transports.contract import Transport
from vfiostream.transports.options import Options
from vfiostream.transports.segments import Preamble
from vfiostream.uapi.four_region import State

pytestmark = pytest.mark.anyio

WINDOW = 4 * MIB


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "FIRST_PAUSE", 0.01)


@asynccontextmanager
async def through(
    cuts: Cuts, channels: int, **changes: float
) -> AsyncIterator[tuple[Transport, Transport, CuttingProxy]]:
    options = Options(channels=channels, memory=WINDOW, **{"reconnect": 10.0, **changes})  # type: ignore[arg-type]
    async with listen("tcp:127.0.0.1:0", options) as listener:
        with CuttingProxy(int(listener.address.rpartition(":")[2]), cuts) as proxy:
            async with connect(proxy.address, options) as sender:
                yield sender, await listener.accept(), proxy


def after(*points: int, back: bool = False) -> Cuts:
    """Cut the connection of each number after so many bytes forth, or back, from the first on."""

    def cuts(number: int, forth: int, answered: int) -> bool:
        return number < len(points) and (answered if back else forth) >= points[number]

    return cuts


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("cut_at", [100, 5000, 70_000, MIB, 2 * MIB + 1])
async def test_a_link_that_is_cut_goes_on(cut_at: int, channels: int) -> None:
    """The connections of the first three attempts are."""

    def cuts(number: int, forth: int, back: int) -> bool:
        return number < 3 * channels and forth >= cut_at

    async with time_limit(), through(cuts, channels) as (sender, receiver, proxy), anyio.create_task_group() as tasks:
        tasks.start_soon(send_all, sender, [[NOISE]] * 6)
        assert await receive_all(receiver) == NOISE * 6
        sent = 6 * len(NOISE)
        assert proxy.cut
        # What was under way is at most a window, at each cut.
        assert proxy.forth < sent + len(proxy.cut) * (WINDOW + MIB)


@pytest.mark.parametrize("cut_at", [16, 32, 1000, MIB])
async def test_answers_go_on_too(cut_at: int) -> None:
    received: dict[str, bytes] = {}

    async def receive_as(name: str, transport: Transport) -> None:
        received[name] = await receive_all(transport)

    cuts = after(cut_at, cut_at, back=True)
    async with time_limit(), through(cuts, 1) as (sender, receiver, proxy), anyio.create_task_group() as tasks:
        tasks.start_soon(send_all, sender, [[NOISE]] * 3)
        tasks.start_soon(send_all, receiver, [[NOISE[::-1]]] * 3)
        tasks.start_soon(receive_as, "there", receiver)
        tasks.start_soon(receive_as, "back", sender)
    assert proxy.cut
    assert received == {"there": NOISE * 3, "back": NOISE[::-1] * 3}


async def test_what_was_acknowledged_is_not_sent_again() -> None:
    async with time_limit(), through(after(), 1) as (sender, receiver, proxy):
        chunk = NOISE[: WINDOW // 8]
        for _ in range(16):
            await sender.send([chunk])
            assert await receive_exactly(receiver, len(chunk)) == chunk
        assert isinstance(sender, reconnecting.ReconnectingTransport)
        # Everything is acknowledged, but for what is no eighth of the window.
        while (kept := sum(len(view) for view in sender._window)) >= 2 * len(chunk):
            await sender.changed()
        before = proxy.forth
        proxy.cut_all()
        await sender.send([b"on"])
        assert await receive_exactly(receiver, 2) == b"on"
        assert proxy.forth - before < kept + 500


@pytest.mark.parametrize("channels", [1, 2])
async def test_a_link_that_does_not_come_back_is_lost_at_both_ends(channels: int) -> None:
    async with time_limit(), through(after(), channels, reconnect=0.3) as (sender, receiver, proxy):
        await sender.send([b"here"])
        assert await receive_exactly(receiver, 4) == b"here"
        proxy.__exit__(None, None, None)
        for end in (sender, receiver):
            with pytest.raises(
                ConnectionLost, match=r"did not come back within 0.3 s \(.+\); see the other end"
            ) as caught:
                await end.receive([memoryview(bytearray(1))])
            assert caught.value.taken is None
            with pytest.raises(ConnectionLost) as caught:
                await end.send([b"x"])
            assert caught.value.taken == 0


async def test_bytes_that_are_only_in_the_window_count_as_taken() -> None:
    async with time_limit(), through(after(), 1, reconnect=0.3) as (sender, _, proxy):
        proxy.__exit__(None, None, None)
        with pytest.raises(ConnectionLost) as caught:
            for _ in range(64):
                await sender.send([NOISE])
        assert caught.value.taken is not None
        with pytest.raises(ConnectionLost, match="did not come back"):
            await sender.finish()


async def test_an_end_that_gives_the_link_up_says_so() -> None:
    for closer in (0, 1):
        async with time_limit(), through(after(), 1) as (sender, receiver, _):
            ends = (sender, receiver)
            await ends[closer].aclose()
            with pytest.raises(ConnectionLost, match="the other end has given this link up; see there why"):
                await ends[1 - closer].receive([memoryview(bytearray(1))])


@pytest.mark.parametrize("channels", [1, 4])
async def test_who_has_read_the_end_may_close_at_once(channels: int) -> None:
    async with time_limit(), through(after(), channels) as (sender, receiver, _), anyio.create_task_group() as tasks:
        tasks.start_soon(send_all, sender, [[NOISE]])
        assert await receive_all(receiver) == NOISE
        await receiver.aclose()


async def test_who_comes_back_to_nobody_is_told() -> None:
    async with time_limit():
        async with listen("tcp:127.0.0.1:0") as first:
            proxy = CuttingProxy(int(first.address.rpartition(":")[2]))
            with proxy:
                async with connect(proxy.address, Options(reconnect=10)) as sender:
                    async with listen("tcp:127.0.0.1:0") as second:
                        proxy.target = int(second.address.rpartition(":")[2])
                        proxy.cut_all()
                        with pytest.raises(ConnectionLost, match="has given this link up"):
                            await sender.receive([memoryview(bytearray(1))])


async def test_the_first_connection_is_not_tried_again() -> None:
    async with listen("tcp:127.0.0.1:0") as listener:
        address = listener.address
    with pytest.raises(TransportError, match="nobody listens there"):
        async with connect(address, Options(reconnect=10, channels=2)):
            pass


async def test_a_closed_listener_lets_those_come_back_that_it_knows() -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener:
        with CuttingProxy(int(listener.address.rpartition(":")[2])) as proxy:
            async with connect(proxy.address, Options(reconnect=10)) as sender:
                receiver = await listener.accept()
                await listener.aclose()
                proxy.cut_all()
                await sender.send([b"again"])
                assert await receive_exactly(receiver, 5) == b"again"
                with pytest.raises(ConnectionLost):
                    async with connect(listener.address, Options(reconnect=10)):
                        pass
                await receiver.aclose()


def said(position: int, length: int, kind: int, wanted: int = 0) -> bytes:
    return struct.pack("<QIBB2x", position, length, kind, wanted)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (said(0, 3, 1) + b"abc", "is DATA, and RESUME has to come"),
        (said(1, 0, 4), "is of 1, which is not under way"),
        (said(0, 0, 4) + said(1, 1, 1) + b"x", "is of 1, and 0 has to come"),
        (said(0, 0, 4) + said(0, 0, 4), "is RESUME, which only begins a link"),
        (said(0, 0, 4) + said(9, 0, 3), "is of 9, which is not under way"),
        (said(0, 0, 4) + said(7, 0, 2), "is of 7, and 0 has to come"),
        (said(0, 0, 4) + said(0, 0, 2) + said(0, 1, 1) + b"x", "has to come"),
        (said(0, 0, 4) + said(0, (4 << 20) + 1, 1), "4194305 bytes"),
        (said(0, 0, 4) + said(0, 0, 6), "unknown kind 6"),
        (said(0, 0, 4, 2), "zeros"),
    ],
)
async def test_an_end_that_lies_is_found_out(data: bytes, expected: str) -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener, connect(listener.address) as evil:
        await evil.send([Preamble(b"t" * 16, 0, 1, True).pack(), data])
        async with await listener.accept() as link:
            with pytest.raises(StreamError, match=re.escape(expected)):
                await link.finish()
                while True:
                    await link.receive([memoryview(bytearray(10))])
                    await link.changed()  # type: ignore[attr-defined]


@pytest.mark.parametrize("seconds", [0, -1])
def test_no_time_to_reconnect(seconds: float) -> None:
    with pytest.raises(UsageError, match="no time to reconnect in"):
        Options(reconnect=seconds)


# ---- migrations


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999, 1.0])
async def test_a_migration_that_is_cut_anywhere(share: float, back: bool, channels: int) -> None:
    """Up to the last bytes of either direction: the greeting, the rounds, the switchover, the COMMIT and its answer."""
    like = replace(SMALL, data="random")
    whole = await moved(like, lambda *_: False, channels)
    total = max(carried[1 if back else 0] for carried in whole.carried)
    cut_at = max(int(total * share), 100)

    def cuts(number: int, forth: int, answered: int) -> bool:
        return number < channels and (answered if back else forth) >= cut_at

    await moved(like, cuts, channels)


async def moved(like: object, cuts: Cuts, channels: int) -> CuttingProxy:
    """Move a device over a proxy, and see that it runs there as it was."""
    async with time_limit(), machines(like) as (source, target), listen("tcp:127.0.0.1:0") as listener:  # type: ignore[arg-type]
        with CuttingProxy(int(listener.address.rpartition(":")[2]), cuts) as proxy:

            async def take() -> None:
                async with await listener.accept() as link:
                    await receive(target.device, link)

            before = source.digest
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take)
                async with connect(proxy.address, Options(channels=channels, reconnect=10)) as link:
                    await send(source.device, link)
            assert target.digest == before
            assert (source.state, target.state) == (State.STOP, State.RUNNING)
            return proxy


def test_what_is_kept_is_within_what_it_may_have() -> None:
    link = reconnecting.ReconnectingTransport("link", WINDOW, 1)
    assert link._memory + reconnecting.rests_of(WINDOW) + reconnecting.SMALL <= link.keeps


async def test_a_way_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody resets the connection: only the kernel knows that nothing is acknowledged."""
    monkeypatch.setattr(reconnecting, "SILENCE", 0.05)
    async with time_limit(), through(after(), 1) as (sender, receiver, proxy):
        await sender.send([b"one"])
        assert await receive_exactly(receiver, 3) == b"one"
        monkeypatch.setattr(
            stream.SocketTransport, "silent", property(lambda _: 1.0 if len(proxy.carried) == 1 else 0.0)
        )
        while len(proxy.carried) == 1:
            await sender.changed()  # type: ignore[attr-defined]
        await sender.send([b"two"])
        assert await receive_exactly(receiver, 3) == b"two"


async def test_what_the_kernel_tells_of_silence() -> None:
    async with listen("tcp:127.0.0.1:0", Options(silent=True)) as listener, connect(listener.address) as sender:
        async with await listener.accept():
            await sender.send([b"x"])
            assert isinstance(sender, stream.SocketTransport)
            assert 0 <= sender.silent < 10
        await sender.aclose()
        assert sender.silent == 0


async def test_who_comes_back_with_an_older_attempt_is_turned_away() -> None:
    async with time_limit(), listen("tcp:127.0.0.1:0") as listener, connect(listener.address) as first:
        await first.send([Preamble(b"t" * 16, 0, 1, True, 0).pack(), said(0, 0, 4)])
        async with await listener.accept() as link, connect(listener.address) as again:
            await again.send([Preamble(b"t" * 16, 0, 1, True, 0).pack(), said(0, 0, 4)])
            assert (await receive_all(again))[:16] == said(0, 0, 5)
            await first.send([said(0, 4, 1), b"good"])
            assert await receive_exactly(link, 4) == b"good"


@pytest.mark.parametrize("scheme", ["tls", "quic"])
@pytest.mark.parametrize("made", [{"channels": 4}, {"reconnect": 10}, {"channels": 4, "reconnect": 10}])
async def test_encrypted_links_have_channels_and_reconnect(scheme: str, made: dict[str, int], tmp_path: Path) -> None:
    pytest.importorskip("qh3" if scheme == "quic" else "OpenSSL")
    credentials = written(tmp_path, issued("localhost"))
    async with time_limit(), listen(f"{scheme}:127.0.0.1:0", Options(credentials=credentials)) as listener:
        options = Options(credentials=credentials, **made)  # type: ignore[arg-type]
        async with connect(listener.address, options) as sender, anyio.create_task_group() as tasks:
            tasks.start_soon(send_all, sender, [[NOISE]] * 2)
            async with await listener.accept() as receiver:
                assert await receive_all(receiver) == NOISE * 2


@pytest.mark.parametrize("reconnect", [None, 10.0])
@pytest.mark.parametrize("channels", [1, 4, 16])
async def test_a_reader_who_stalls_costs_no_more_memory_than_the_link_may_have(
    channels: int, reconnect: float | None
) -> None:
    options = Options(channels=channels, reconnect=reconnect, memory=WINDOW)
    async with time_limit(), listen("tcp:127.0.0.1:0", options) as listener:
        async with connect(listener.address, options) as sender, anyio.create_task_group() as tasks:
            tasks.start_soon(send_for_ever, sender)
            await anyio.wait_all_tasks_blocked()
            held = held_by(sender)
            assert held <= sender.keeps
            if reconnect is not None:
                assert held > WINDOW // 4
            tasks.cancel_scope.cancel()


def held_by(link: Transport) -> int:
    """Bytes of what was sent that a link keeps in memory of ours."""
    held = 0
    if isinstance(link, reconnecting.ReconnectingTransport):
        held += sum(len(view) for view in link._window)
        assert link._inner is not None
        link = link._inner
    if isinstance(link, ChannelsTransport):
        held += sum(len(view) for channel in link._channels for view in channel._rest)
    return held
