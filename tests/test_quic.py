"""QUIC against the suite, and what only it has."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from qh3 import QuicConfiguration, QuicConnection

from tests.certificates import issued, written
from tests.movers import machines
from tests.quic_links import linked, network, options_in
from tests.test_tls import CASES, Case, waiting
from tests.test_transports import has_ipv6
from vfiostream.errors import ConnectionLost, PeerRefused, TransportError, UsageError
from vfiostream.migrate import receive, send
from vfiostream.testing import (
    MIB,
    NOISE,
    LinkContract,
    receive_all,
    receive_exactly,
    send_all,
    send_for_ever,
    time_limit,
)
from vfiostream.transports import connect, listen, quic, quic_connection, quic_endpoint, quic_listen, tls_trust
from vfiostream.transports.contract import Transport
from vfiostream.transports.options import Options
from vfiostream.transports.quic_connection import WINDOW, Kind
from vfiostream.transports.quic_peer import Handshake
from vfiostream.transports.quic_stream import QuicStream
from vfiostream.transports.udp import UdpSocket

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    return options_in(tmp_path_factory.mktemp("certificates"))


class TestQuic(LinkContract):
    @pytest.fixture(autouse=True)
    def _options(self, options: Options) -> None:
        self.options = options

    def pair(self) -> Any:
        return linked(self.options)


class TestChannelsOfQuic(LinkContract):
    @pytest.fixture(autouse=True)
    def _options(self, options: Options) -> None:
        self.options = replace(options, channels=3, silent=False)

    def pair(self) -> Any:
        return linked(self.options)


# ---- who is believed


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_who_is_not_believed_moves_nothing(case: Case, tmp_path: Path) -> None:
    source = written(tmp_path, issued("source", **case.source), **case.source_believes)
    target = written(tmp_path, issued("target", **case.target), **case.target_believes)
    async with waiting(tmp_path, target, "quic") as (here, there):
        with pytest.raises(PeerRefused, match=f"^{there.address}: .*{case.source_says}") as caught:
            async with connect(there.address, Options(credentials=source)) as link:
                await send(here.device, link)
        assert "\n" not in str(caught.value)
        assert re.search(f"^quic:127.0.0.1:[0-9]+: .*{case.target_says}", await there.refusal())


async def test_somebody_in_between_is_noticed(options: Options, tmp_path: Path) -> None:
    """The handshake within is passed on to the right listener, by somebody who has a certificate of the same CA."""
    false = Options(credentials=written(tmp_path, issued("in between")), silent=True)
    async with time_limit(), listen("quic:127.0.0.1:0", false) as listener:
        answerer = listener._answerer  # type: ignore[attr-defined]
        answerer._context = tls_trust.context_of(options.credentials)  # type: ignore[arg-type]
        with pytest.raises(PeerRefused, match="somebody between us and the other end shows another certificate"):
            async with connect(listener.address, options):
                pass


async def test_nobody_is_connected_to_without_credentials() -> None:
    for opening in (connect, listen):
        with pytest.raises(UsageError, match="both ends of this link show a certificate"):
            async with opening("quic:127.0.0.1:7000"):
                pass


async def test_nobody_listens(options: Options) -> None:
    async with time_limit():
        with pytest.raises(TransportError, match="nobody listens there; start"):
            async with connect(f"quic:127.0.0.1:{free_port()}", options):
                pass


async def test_nobody_answers(options: Options) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        async with time_limit():
            with pytest.raises(TransportError, match=r"nobody answered within 0\.2 s"):
                async with connect(f"quic:127.0.0.1:{mute.getsockname()[1]}", replace(options, timeout=0.2)):
                    pass


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


# ---- who comes again, and who comes in crowds


async def test_a_session_is_taken_up_by_who_comes_again(options: Options, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "vfiostream.transport")
    async with time_limit(), listen("quic:127.0.0.1:0", options) as listener:
        for turn in range(3):
            async with connect(listener.address, options) as sender, await listener.accept() as receiver:
                await send_all(sender, [[b"again"]])
                assert await receive_all(receiver) == b"again"
            assert caplog.text.count("an earlier session is taken up") == turn
        port = listener.address.rpartition(":")[2]
    # A listener that knows nothing of it, at the same place.
    async with time_limit(), listen(f"quic:127.0.0.1:{port}", options) as listener:
        async with connect(listener.address, options) as sender, await listener.accept() as receiver:
            await send_all(sender, [[b"anew"]])
            assert await receive_all(receiver) == b"anew"
    assert caplog.text.count("an earlier session is taken up") == 2


async def test_who_comes_while_many_are_strangers_shows_that_its_address_is_its_own(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quic_listen, "RETRY_ABOVE", 0)
    async with time_limit(), linked(options) as (sender, receiver):
        await send_all(sender, [[b"hello"]])
        assert await receive_all(receiver) == b"hello"


def test_a_token_is_for_one_address_and_some_seconds(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        assert options.credentials is not None
        answerer = quic_listen._Answerer(UdpSocket(sock), "quic:", options, options.credentials)
        token = answerer._token(b"original", b"8 bytes.", ("192.0.2.1", 7))
        assert answerer._proven(token, ("192.0.2.1", 7)) == (b"original", b"8 bytes.")
        assert answerer._proven(token, ("192.0.2.1", 8)) is None
        assert answerer._proven(token, ("192.0.2.2", 7)) is None
        for wrong in (b"", token[:31], token[:-1], token + b"x", bytes(len(token))):
            assert answerer._proven(wrong, ("192.0.2.1", 7)) is None
        monkeypatch.setattr(quic_listen, "monotonic", lambda: monotonic() + quic_listen.RETRY_WITHIN + 1)
        assert answerer._proven(token, ("192.0.2.1", 7)) is None


def greeting() -> bytes:
    """The first datagram of somebody who will never say more."""
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["vfiostream/1"])
    quic = QuicConnection(configuration=configuration)
    quic.connect(("127.0.0.1", 1), monotonic())
    return quic.datagrams_to_send(monotonic())[0][0]


async def test_strangers_in_crowds_keep_nobody_out(options: Options) -> None:
    async with time_limit(), listen("quic:127.0.0.1:0", options) as listener:
        answerer = listener._answerer  # type: ignore[attr-defined]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(3 * quic_listen.STRANGERS):
                sock.sendto(greeting(), ("127.0.0.1", int(listener.address.rpartition(":")[2])))
        async with connect(listener.address, options) as sender, await listener.accept() as receiver:
            assert len(answerer.connections) == quic_listen.RETRY_ABOVE + 1
            await send_all(sender, [[b"at last"]])
            assert await receive_all(receiver) == b"at last"


async def test_what_is_no_quic_disturbs_nobody(options: Options) -> None:
    """Noise, cut and changed datagrams of a handshake, and those that others sent, before and within a transfer."""
    random = Random(7)
    real = greeting()
    foreign: list[bytes] = [b"", b"\x00", b"\xc0", bytes(1200), b"\xff" * 1200, real[:1199], real + real]
    for _ in range(200):
        foreign.append(random.randbytes(random.randrange(1, 1500)))
        changed = bytearray(real)
        for _ in range(random.randrange(1, 20)):
            changed[random.randrange(len(real))] = random.randrange(256)
        foreign.append(bytes(changed))
    received = bytearray()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        async with time_limit(), listen("quic:127.0.0.1:0", options) as listener, network(listener.address) as between:
            target = ("127.0.0.1", int(listener.address.rpartition(":")[2]))
            for data in foreign:
                sock.sendto(data, target)

            before = real

            def meddle(data: bytes) -> bool:
                """Before each datagram, the one before: again, changed, and cut."""
                nonlocal before
                copy = bytearray(before)
                copy[random.randrange(len(copy))] ^= 1 << random.randrange(8)
                for wrong in (before, bytes(copy), before[: random.randrange(len(before))]):
                    sock.sendto(wrong, target)
                before = data
                return True

            between.passes = meddle
            async with connect(between.address, options) as sender, await listener.accept() as receiver:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(send_all, sender, [[NOISE]])
                    received += await receive_all(receiver)
    assert received == NOISE


async def test_what_is_no_handshake_within(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Handshake.to_send
    monkeypatch.setattr(Handshake, "to_send", lambda self: honest(self) if self.listens else NOISE[:500])
    refusals: list[TransportError] = []
    listening = replace(options, refused=refusals.append)
    async with time_limit(), listen("quic:127.0.0.1:0", listening) as listener:
        with pytest.raises(PeerRefused):
            async with connect(listener.address, options):
                pass
        monkeypatch.undo()
        async with connect(listener.address, options) as sender, await listener.accept() as receiver:
            await send_all(sender, [[b"honest"]])
            assert await receive_all(receiver) == b"honest"
    [refusal] = refusals
    assert "is not TLS" in str(refusal)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ((9, 4, 0), "is of no known kind"),
        ((0, 4, 0), "is of no known kind"),
        ((Kind.WELCOME, 4, 0), "is of no known kind"),
        ((Kind.READ, 8, 0), "names a stream that is not open"),
        ((Kind.READ, 4, 1), "was read where nothing was sent"),
        ((Kind.READ, 4, 1 << 63), "was read where nothing was sent"),
    ],
)
async def test_records_that_break_the_rules(record: Any, problem: str, options: Options) -> None:
    async with time_limit(), linked(options) as (sender, receiver):
        assert isinstance(sender, QuicStream)
        sender._carrier._tell(*record)  # type: ignore[attr-defined]
        with pytest.raises(ConnectionLost, match=problem):
            await receiver.receive([memoryview(bytearray(1))])
        with pytest.raises(ConnectionLost, match="refused us"):
            await sender.receive([memoryview(bytearray(1))])


# ---- ways that change, lose, and end


async def test_the_answer_comes_from_the_address_that_was_asked(options: Options) -> None:
    """A host with several addresses listens at all of them."""
    async with time_limit(), listen("quic:0.0.0.0:0", options) as listener:
        port = listener.address.rpartition(":")[2]
        credentials = replace(options.credentials, peer_name="localhost")  # type: ignore[type-var]
        for host in ("127.0.0.1", "127.0.0.2"):
            async with connect(f"quic:{host}:{port}", Options(credentials=credentials)) as sender:
                async with await listener.accept() as receiver:
                    await send_all(sender, [[b"there?"]])
                    assert await receive_all(receiver) == b"there?"


@pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")
@pytest.mark.parametrize("address", ["quic:[::1]:0", "quic:[::]:0"])
async def test_ipv6(address: str, options: Options) -> None:
    async with time_limit(), listen(address, options) as listener:
        port = listener.address.rpartition(":")[2]
        async with connect(f"quic:[::1]:{port}", options) as sender, await listener.accept() as receiver:
            await send_all(sender, [[NOISE[:100_000]]])
            assert await receive_all(receiver) == NOISE[:100_000]


async def test_certificates_that_are_pinned(tmp_path: Path) -> None:
    source, target = issued("source", ca=1), issued("target", ca=2)
    here = written(tmp_path, source, None, peer_fingerprints=(target.fingerprint,))
    there = written(tmp_path, target, None, peer_fingerprints=(source.fingerprint,))
    async with time_limit(), listen("quic:127.0.0.1:0", Options(credentials=there, silent=True)) as listener:
        async with connect(listener.address, Options(credentials=here)) as sender:
            async with await listener.accept() as receiver:
                await send_all(sender, [[b"it is us"]])
                assert await receive_all(receiver) == b"it is us"


async def test_lost_datagrams_are_sent_again(options: Options) -> None:
    received = bytearray()
    async with time_limit(), listen("quic:127.0.0.1:0", options) as listener, network(listener.address) as between:
        between.passes = lambda _: between.count % 20 != 0
        async with connect(between.address, options) as sender, await listener.accept() as receiver:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send_all, sender, [[NOISE]])
                received += await receive_all(receiver)
    assert received == NOISE


async def test_keys_are_changed_on_the_way(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = 0
    change = QuicConnection.request_key_update

    def counted(quic: QuicConnection) -> None:
        nonlocal changes
        change(quic)
        changes += 1

    monkeypatch.setattr(QuicConnection, "request_key_update", counted)
    monkeypatch.setattr(quic_connection, "KEY_LASTS", 50)
    received = bytearray()
    async with time_limit(), listen("quic:127.0.0.1:0", options) as listener, network(listener.address) as between:
        between.passes = lambda _: between.count % 50 != 0
        async with connect(between.address, options) as sender, await listener.accept() as receiver:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send_all, sender, [[NOISE], [NOISE]])
                received += await receive_all(receiver)
    assert received == NOISE * 2
    assert changes > 3


async def test_a_way_that_carries_small_datagrams_only(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic, "LARGE_TRIED", 0.5)
    received = bytearray()
    async with time_limit(), listen("quic:127.0.0.1:0", options) as listener, network(listener.address) as between:
        between.passes = lambda data: len(data) <= 1400
        async with connect(between.address, options) as sender, await listener.accept() as receiver:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send_all, sender, [[NOISE]])
                received += await receive_all(receiver)
    assert received == NOISE


async def test_a_silent_way_is_a_lost_one_at_both_ends(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic_endpoint, "IDLE", 0.5)
    async with time_limit(), listen("quic:127.0.0.1:0", options) as listener, network(listener.address) as between:
        async with connect(between.address, options) as sender, await listener.accept() as receiver:
            between.passes = lambda _: False
            async with anyio.create_task_group() as tasks:
                for transport in (sender, receiver):
                    tasks.start_soon(lost, transport)


async def lost(transport: Transport) -> None:
    with pytest.raises(ConnectionLost, match="nothing was heard of the other end"):
        await transport.receive([memoryview(bytearray(1))])
    with pytest.raises(ConnectionLost, match="lost"):
        await transport.send([b"x"])


async def test_a_quiet_link_stays(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic_endpoint, "IDLE", 0.5)
    monkeypatch.setattr(quic_connection, "PING_EVERY", 0.1)
    async with time_limit(), linked(options) as (sender, receiver):
        with anyio.move_on_after(1.5):
            await receiver.receive([memoryview(bytearray(1))])
        await send_all(sender, [[b"still here"]])
        assert await receive_all(receiver) == b"still here"


async def test_a_listener_that_died(options: Options) -> None:
    async with time_limit(), listen("quic:127.0.0.1:0", options) as listener, network(listener.address) as between:
        async with connect(between.address, options) as sender, await listener.accept():
            await between.die()
            with pytest.raises(ConnectionLost, match="nobody listens there any more"):
                await send_for_ever(sender)


@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> list[quic._Caller]:
    """Those who have connected, as the endpoints they are."""
    made: list[quic._Caller] = []

    class Noted(quic._Caller):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(quic, "_Caller", Noted)
    return made


def move(caller: quic._Caller) -> None:
    caller.move(quic._connected(caller.udp.sock.family, caller.udp.sock.getpeername()))


async def test_a_device_moves_while_its_host_changes_address(options: Options, callers: list[quic._Caller]) -> None:
    async with time_limit(), machines() as (here, there):
        before = here.digest
        async with listen("quic:127.0.0.1:0", options) as listener, connect(listener.address, options) as link:
            async with anyio.create_task_group() as tasks, await listener.accept() as receiver:
                tasks.start_soon(receive, there.device, receiver)
                move(callers[-1])
                await send(here.device, link)
        assert there.digest == before


async def test_the_listener_follows_who_moves(options: Options, callers: list[quic._Caller]) -> None:
    async with time_limit(), linked(options) as (sender, receiver):
        [caller] = callers
        seen = {caller.udp.sock.getsockname()}
        for turn in range(caller.MOST_MOVES):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sender.send, [NOISE])
                move(caller)
                seen.add(caller.udp.sock.getsockname())
                assert await receive_exactly(receiver, len(NOISE)) == NOISE
            await receiver.send([bytes([turn])])
            assert await receive_exactly(sender, 1) == bytes([turn])
    assert len(seen) == 1 + caller.MOST_MOVES


async def test_who_hears_nothing_and_has_another_address_goes_on_from_there(
    options: Options, callers: list[quic._Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent from the old one goes nowhere."""
    received = bytearray()

    def connected(family: socket.AddressFamily, target: Any) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.bind((new, 0))
        sock.connect(target)
        return sock

    async with time_limit(), linked(options) as (sender, receiver):
        [caller] = callers
        caller.SILENCE = 0.1
        old, new = caller.udp, "127.0.0.1"
        monkeypatch.setattr(quic, "_connected", connected)
        old.send = lambda datagrams, here=(): looked.set()  # type: ignore[method-assign]
        async with anyio.create_task_group() as tasks:
            looked = anyio.Event()
            tasks.start_soon(send_all, sender, [[NOISE]])
            for _ in range(5):  # It sends again and again, and stays, as this host is where it was.
                await looked.wait()
                looked = anyio.Event()
            assert caller.udp is old
            new = "127.0.0.3"
            received += await receive_all(receiver)
        assert caller.udp.sock.getsockname()[0] == new
    assert received == NOISE


async def test_a_closed_listener_lets_nobody_in_and_lets_go_who_waits(options: Options) -> None:
    async with time_limit(), listen("quic:127.0.0.1:0", options) as listener:
        async with connect(listener.address, options) as first, connect(listener.address, options) as second:
            receiver = await listener.accept()
            await listener.aclose()
            with pytest.raises(TransportError, match="the listener was closed"):
                await listener.accept()
            await send_all(second if await first_lost(first, second) is first else first, [[b"it lives on"]])
            assert await receive_all(receiver) == b"it lives on"
            with pytest.raises(TransportError, match=r"nobody answered"):
                async with connect(listener.address, replace(options, timeout=0.2)):
                    pass


async def first_lost(*links: Transport) -> Transport:
    """Wait until one of ``links`` is lost, and return it."""
    lost: list[Transport] = []

    async def watch(link: Transport) -> None:
        with pytest.raises(ConnectionLost):
            await link.receive([memoryview(bytearray(1))])
        lost.append(link)
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for link in links:
            tasks.start_soon(watch, link)
    return lost[0]


async def test_who_has_read_all_may_leave_before_the_end(options: Options) -> None:
    async with time_limit(), linked(options) as (sender, receiver):
        await sender.send([b"all of it"])
        assert await receive_exactly(receiver, 9) == b"all of it"
        await receiver.aclose()
        await sender.finish()
    async with time_limit(), linked(options) as (sender, receiver):
        await sender.send([b"all of it"])
        assert await receive_exactly(receiver, 3) == b"all"
        await receiver.aclose()
        with pytest.raises(ConnectionLost):
            await sender.finish()


# ---- bounds


async def test_a_stalled_reader_bounds_the_memory_of_both_ends(options: Options) -> None:
    chunk = bytes(MIB)

    async def send_much(transport: Transport) -> None:
        for _ in range(16 * WINDOW // MIB):
            await transport.send([chunk])

    async with time_limit(), linked(options) as (sender, receiver):
        before = resident()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_much, sender)
            assert isinstance(receiver, QuicStream)
            with anyio.move_on_after(20):
                while receiver.buffered < WINDOW:
                    await receiver.more(WINDOW)
                    await anyio.lowlevel.checkpoint()
            assert receiver.buffered == WINDOW == receiver.keeps
            await anyio.wait_all_tasks_blocked()
            assert receiver.buffered == WINDOW
            # Both ends are in this process: what has arrived, and at most as much again on its way.
            assert resident() - before < 4 * WINDOW
            tasks.cancel_scope.cancel()


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def test_who_sends_more_than_may_be_under_way_is_cut_off(options: Options) -> None:
    async with time_limit(), linked(options) as (sender, receiver):
        assert isinstance(sender, QuicStream)
        sender.window = 8 * WINDOW
        with pytest.raises(ConnectionLost):
            await send_for_ever(sender)
        with pytest.raises(ConnectionLost, match="more than may be under way"):
            while True:
                await receiver.receive([memoryview(bytearray(MIB))])


async def test_several_streams_of_one_connection(options: Options, callers: list[quic._Caller]) -> None:
    count = 4
    received: dict[bytes, bytes] = {}

    async def take(transport: Transport) -> None:
        name = await receive_exactly(transport, 1)
        received[name] = await receive_all(transport)

    async with time_limit(), listen("quic:127.0.0.1:0", options) as listener:
        async with quic.connect_many(listener.address, options, count) as senders, anyio.create_task_group() as tasks:
            assert len(callers) == 1
            assert sum(sender.keeps for sender in senders) == WINDOW
            for number, sender in enumerate(senders):
                tasks.start_soon(take, await listener.accept())
                tasks.start_soon(send_all, sender, [[bytes([number])], [NOISE[number:]]])
    assert received == {bytes([number]): NOISE[number:] for number in range(count)}
