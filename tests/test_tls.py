"""TLS: the suite of all transports, and who is believed."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from tests.certificates import issued, written
from tests.movers import Machine, machines
from tests.test_channels import SmallBuffers
from vfiostream.errors import ConnectionLost, PeerRefused, StreamError, TransportError, UsageError, VfiostreamError
from vfiostream.migrate import receive, send
from vfiostream.testing import MIB, NOISE, LinkContract, receive_exactly, time_limit
from vfiostream.transports import connect, listen, tls, tls_trust
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.credentials import Credentials
from vfiostream.transports.options import Options
from vfiostream.transports.segments import Preamble
from vfiostream.transports.stream import SocketListener
from vfiostream.transports.tls import TlsTransport
from vfiostream.uapi.four_region import State

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def connected(
    source: Credentials, target: Credentials, channels: int = 1
) -> AsyncIterator[tuple[Transport, Transport]]:
    async with listen("tls:127.0.0.1:0", Options(credentials=target, silent=channels == 1)) as listener:
        async with connect(listener.address, Options(credentials=source, channels=channels)) as sender:
            yield sender, await listener.accept()


class TestTlsByCa(LinkContract):
    def pair(self) -> Any:
        return connected(written(self.folder, issued("source")), written(self.folder, issued("target")))


class TestTlsByFingerprint(LinkContract):
    def pair(self) -> Any:
        source, target = issued("source", ca=1), issued("target", ca=2)
        return connected(
            written(self.folder, source, None, peer_fingerprints=(target.fingerprint,)),
            written(self.folder, target, None, peer_fingerprints=(source.fingerprint.upper(),)),
        )


class TestTlsThatHoldsLittle(SmallBuffers):
    """Sockets that take less than a record."""

    def pair(self) -> Any:
        return connected(written(self.folder, issued("source")), written(self.folder, issued("target")))

    async def test_a_send_cancelled_part_way_tears(self) -> None:
        """Nobody can read a part of a record."""
        async with self.link() as (sender, receiver):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sender.send, [NOISE])
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            for call in (sender.send([b"more"]), sender.finish()):
                with pytest.raises(TransportError, match="stopped part-way"):
                    await call
            await sender.aclose()
            with pytest.raises(ConnectionLost):
                await receiver.receive([memoryview(bytearray(1))])


class TestFourChannelsOfTls(LinkContract):
    def pair(self) -> Any:
        return connected(written(self.folder, issued("source")), written(self.folder, issued("target")), channels=4)


async def test_all_channels_show_one_certificate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who has a certificate of his own can't take the place of a channel of somebody else's link."""
    target = written(tmp_path, issued("target"))
    token = bytes(range(16))
    async with time_limit(), listen("tls:127.0.0.1:0", Options(credentials=target)) as listener:
        contexts = [
            connect(listener.address, Options(credentials=written(tmp_path, issued(name))))
            for name in ("source", "other")
        ]
        async with contexts[0] as one, contexts[1] as other:
            await one.send([Preamble(token, 0, 2).pack()])
            await other.send([Preamble(token, 1, 2).pack()])
            for link in (one, other):
                with pytest.raises(ConnectionLost):
                    await link.receive([memoryview(bytearray(1))])
    assert "contradict each other" in caplog.text


# ---- who is believed


@dataclass(frozen=True)
class Case:
    """Two ends that do not believe each other."""

    source: dict[str, Any]
    """What the source's certificate is; the rest is right."""
    target: dict[str, Any]
    source_says: str
    target_says: str
    source_believes: dict[str, Any] = field(default_factory=dict)
    target_believes: dict[str, Any] = field(default_factory=dict)


OTHER = "0" * 64
ALERT = "the other end does not believe our certificate"
CASES = {
    "the source's has expired": Case(
        {"since": -3, "until": -1}, {}, "says that our certificate has expired", "was valid until 2"
    ),
    "the target's has expired": Case(
        {}, {"since": -3, "until": -1}, "was valid until 2", "says that our certificate has expired"
    ),
    "the source's is not valid yet": Case({"since": 1, "until": 3}, {}, ALERT, "is not valid before 2"),
    "the target's is not valid yet": Case({}, {"since": 1, "until": 3}, "is not valid before 2", ALERT),
    "the source's is pinned and has expired": Case(
        {"since": -3, "until": -1},
        {},
        "says that our certificate has expired",
        "was valid until 2",
        target_believes={"peer_fingerprints": (issued("source", since=-3, until=-1).fingerprint,)},
    ),
    "the target's is for another host": Case(
        {}, {"names": ("gpu.example", "192.0.2.1")}, "is for gpu.example, 192.0.2.1, not for 127.0.0.1", ALERT
    ),
    "the target's is for nobody": Case({}, {"names": ()}, "is for nobody, not for 127.0.0.1", ALERT),
    "the source expects another name than the host's": Case(
        {}, {}, "not for gpu.example; say --peer-name", ALERT, source_believes={"peer_name": "gpu.example"}
    ),
    "the source's is for another host": Case(
        {"names": ("there.example",)},
        {},
        ALERT,
        "is for there.example, not for here.example",
        target_believes={"peer_name": "here.example"},
    ),
    "the source's is of another CA": Case(
        {"ca": 1}, {}, "does not know the CA of our certificate", "does not vouch .* issuer cert locally"
    ),
    "the target's is of another CA": Case(
        {}, {"ca": 1}, "does not vouch .* issuer cert locally", "does not know the CA of our certificate"
    ),
    "the source's is not the one that is pinned": Case(
        {},
        {},
        "the other end does not",
        f"has the fingerprint {issued('source').fingerprint}, which is not pinned",
        target_believes={"believed": None, "peer_fingerprints": (OTHER,)},
    ),
    "the target's is not the one that is pinned": Case(
        {},
        {},
        f"has the fingerprint {issued('target').fingerprint}, which is not pinned",
        "the other end does not",
        source_believes={"believed": None, "peer_fingerprints": (OTHER,)},
    ),
}


class Target:
    """Listens, and says whom it has refused."""

    def __init__(self) -> None:
        self.address = ""
        self.refusals: list[str] = []
        self._refused = anyio.Event()

    def refused(self, error: TransportError) -> None:
        self.refusals.append(str(error))
        self._refused.set()

    async def refusal(self) -> str:
        """What it says about the one that it refuses."""
        await self._refused.wait()
        [sentence] = self.refusals
        assert "\n" not in sentence
        return sentence


@asynccontextmanager
async def waiting(folder: Path, credentials: Credentials, scheme: str = "tls") -> AsyncIterator[tuple[Machine, Target]]:
    """A source, and a target that waits for it with ``credentials``. What the body does moves nothing: neither driver
    is told anything. When it ends, a friend whom the target believes moves the source: nobody was kept out.
    """
    friend = written(folder, issued("friend"))
    credentials = replace(credentials, peer_fingerprints=(*credentials.peer_fingerprints, issued("friend").fingerprint))
    async with time_limit(), machines() as (here, there):
        touched: list[str] = []
        for name, one in (("source", here), ("target", there)):
            one.driver.write = lambda *_, name=name: touched.append(name)  # type: ignore[method-assign]
        content = here.digest, there.digest
        target = Target()

        async def take(listener: Listener) -> None:
            async with await listener.accept() as link:
                await receive(there.device, link)

        options = Options(credentials=credentials, refused=target.refused)
        async with listen(f"{scheme}:127.0.0.1:0", options) as listener, anyio.create_task_group() as tasks:
            target.address = listener.address
            tasks.start_soon(take, listener)
            yield here, target
            assert touched == []
            assert (here.digest, there.digest) == content
            assert here.state is there.state is State.RUNNING
            for one in (here, there):
                del one.driver.write
            if credentials.cert.read_bytes() != issued("target").certificate_file:
                tasks.cancel_scope.cancel()  # There are no friends of somebody whose own certificate is wrong.
                return
            async with connect(target.address, Options(credentials=friend)) as link:
                await send(here.device, link)
        assert there.digest == content[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_who_is_not_believed_moves_nothing(case: Case, tmp_path: Path) -> None:
    source = written(tmp_path, issued("source", **case.source), **case.source_believes)
    target = written(tmp_path, issued("target", **case.target), **case.target_believes)
    async with waiting(tmp_path, target) as (here, there):
        with pytest.raises(PeerRefused, match=f"^{there.address}: .*{case.source_says}") as caught:
            async with connect(there.address, Options(credentials=source)) as link:
                await send(here.device, link)
        assert "\n" not in str(caught.value)
        assert re.search(f"^tls:127.0.0.1:[0-9]+: .*{case.target_says}", await there.refusal())


def talk(address: str, context: ssl.SSLContext | None, words: bytes) -> bytes | OSError:
    """Connect to ``address`` as no program of ours would, and say ``words``; returns the answer, or what went wrong."""
    host, _, port = address.removeprefix("tls:").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        try:
            if context is not None:
                sock = context.wrap_socket(sock)
            sock.sendall(words)
            return sock.recv(100)
        except OSError as error:
            return error
        finally:
            sock.close()


def client(credentials: Credentials | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if credentials is not None:
        context.load_cert_chain(credentials.cert, credentials.key)
    return context


async def test_a_client_without_a_certificate(tmp_path: Path) -> None:
    async with waiting(tmp_path, written(tmp_path, issued("target"))) as (_, target):
        answer = await anyio.to_thread.run_sync(talk, target.address, client(), b"hello")
        assert isinstance(answer, OSError)
        assert re.search("showed no certificate; give it one", await target.refusal())


async def test_a_client_of_an_older_tls(tmp_path: Path) -> None:
    context = client(written(tmp_path, issued("source")))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with waiting(tmp_path, written(tmp_path, issued("target"))) as (_, target):
        answer = await anyio.to_thread.run_sync(talk, target.address, context, b"hello")
        assert isinstance(answer, ssl.SSLError)
        assert re.search("does not speak TLS 1.3; use a newer one there", await target.refusal())


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n\r\n", bytes(100), bytes(range(1, 200)), b"\x16\x03\x01" + b"\xff" * 99]
)
async def test_what_is_no_tls(words: bytes, tmp_path: Path) -> None:
    async with waiting(tmp_path, written(tmp_path, issued("target"))) as (_, target):
        answer = await anyio.to_thread.run_sync(talk, target.address, None, words)
        assert isinstance(answer, OSError) or b"hello" not in answer
        assert re.search("what comes from the other end is not TLS; let both ends use tls:", await target.refusal())


async def test_a_plain_source_at_an_encrypted_target(tmp_path: Path) -> None:
    async with waiting(tmp_path, written(tmp_path, issued("target"))) as (here, target):
        with pytest.raises(VfiostreamError):
            async with connect(target.address.replace("tls:", "tcp:")) as link:
                await send(here.device, link)
        assert re.search("what comes from the other end is not TLS; let both ends use tls:", await target.refusal())


async def test_an_encrypted_source_at_a_plain_target(tmp_path: Path) -> None:
    async def take(listener: Listener) -> None:
        async with await listener.accept() as link:
            with pytest.raises(StreamError):
                await receive(there.device, link)

    async with time_limit(), machines() as (here, there):
        content = here.digest, there.digest
        async with listen("tcp:127.0.0.1:0") as listener, anyio.create_task_group() as tasks:
            tasks.start_soon(take, listener)
            address = listener.address.replace("tcp:", "tls:")
            with pytest.raises(TransportError, match="is not TLS; let both ends use tls:"):
                async with connect(address, Options(credentials=written(tmp_path, issued("source")))) as link:
                    await send(here.device, link)
        assert (here.digest, there.digest) == content
        assert here.state is there.state is State.RUNNING


async def test_a_server_of_an_older_tls(tmp_path: Path) -> None:
    credentials = written(tmp_path, issued("target"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(credentials.cert, credentials.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def serve() -> None:
        sock, _ = server.accept()
        with sock, pytest.raises(ssl.SSLError):
            context.wrap_socket(sock, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        address = f"tls:127.0.0.1:{server.getsockname()[1]}"
        async with time_limit(), anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, serve)
            with pytest.raises(PeerRefused, match="TLS 1.3.*; use a newer one there"):
                async with connect(address, Options(credentials=written(tmp_path, issued("source")))):
                    pass


async def test_strangers_who_say_nothing_keep_nobody_out(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack, waiting(tmp_path, written(tmp_path, issued("target"))) as (_, target):
        host, _, port = target.address.removeprefix("tls:").rpartition(":")
        strangers = []
        for _ in range(tls.STRANGERS + 3):
            strangers.append(await stack.enter_async_context(await anyio.connect_tcp(host, int(port))))
            await anyio.wait_all_tasks_blocked()
        for stranger in strangers[:3]:
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stranger.receive()
        assert target.refusals == []


async def test_a_stranger_who_says_nothing_is_let_go(tmp_path: Path) -> None:
    async with waiting(tmp_path, written(tmp_path, issued("target"))) as (_, target):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tls, "HANDSHAKE_TIMEOUT", 0)
            assert await anyio.to_thread.run_sync(talk, target.address, None, b"") == b""
            assert re.search("did not greet us within 0 s; let both ends use tls:", await target.refusal())


async def test_a_server_who_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT", 0)
    options = Options(credentials=written(tmp_path, issued("source")))
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(TransportError, match="did not greet us within 0 s; let both ends use tls:"):
            async with time_limit(), connect(f"tls:127.0.0.1:{server.getsockname()[1]}", options):
                pass


# ---- the listener


async def test_a_listener_lets_go_of_those_it_has_not_accepted(tmp_path: Path) -> None:
    source, target = written(tmp_path, issued("source")), written(tmp_path, issued("target"))
    async with time_limit(), listen("tls:127.0.0.1:0", Options(credentials=target, silent=True)) as listener:
        host, _, port = listener.address.removeprefix("tls:").rpartition(":")
        async with (
            await anyio.connect_tcp(host, int(port)) as stranger,
            connect(listener.address, Options(credentials=source)) as believed,
        ):
            await anyio.wait_all_tasks_blocked()
            with anyio.CancelScope() as scope:
                scope.cancel()
                await listener.aclose()
            await listener.aclose()
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stranger.receive()
            with pytest.raises(ConnectionLost):
                await believed.receive([memoryview(bytearray(1))])
        with pytest.raises(TransportError, match="the listener was closed"):
            await listener.accept()


async def test_a_listener_that_could_not_accept_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = written(tmp_path, issued("source")), written(tmp_path, issued("target"))
    real = SocketListener.accept_socket
    failures = [TransportError("no descriptor is free")]

    async def accept(listener: SocketListener) -> tuple[socket.socket, str]:
        if failures:
            raise failures.pop()
        return await real(listener)

    monkeypatch.setattr(SocketListener, "accept_socket", accept)
    async with time_limit(), listen("tls:127.0.0.1:0", Options(credentials=target, silent=True)) as listener:
        with pytest.raises(TransportError, match="no descriptor is free"):
            await listener.accept()
        async with connect(listener.address, Options(credentials=source)), await listener.accept():
            pass


# ---- the stream


async def test_each_end_says_whom_it_believes(tmp_path: Path) -> None:
    source, target = written(tmp_path, issued("source")), written(tmp_path, issued("target"))
    async with time_limit(), connected(source, target) as (sender, receiver), receiver:
        assert isinstance(sender, TlsTransport)
        assert isinstance(receiver, TlsTransport)
        assert (sender.peer, receiver.peer) == (issued("target").fingerprint, issued("source").fingerprint)


async def test_the_end_wakes_a_reader_who_waits_for_more(tmp_path: Path) -> None:
    source, target = written(tmp_path, issued("source")), written(tmp_path, issued("target"))
    received = []

    async def take(transport: Transport) -> None:
        received.append(await transport.receive([memoryview(bytearray(MIB))], MIB))

    async with time_limit(), connected(source, target) as (sender, receiver), receiver:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take, receiver)
            await anyio.wait_all_tasks_blocked()
            await sender.finish()
    assert received == [0]


async def test_the_end_of_the_connection_is_not_the_end_of_the_stream(tmp_path: Path) -> None:
    """Anybody on the way can end a connection; only the peer can say that this was all."""
    source, target = written(tmp_path, issued("source")), written(tmp_path, issued("target"))
    async with time_limit(), connected(source, target) as (sender, receiver), receiver:
        await sender.send([b"not all"])
        await sender.aclose()
        assert await receive_exactly(receiver, 7) == b"not all"
        for _ in range(2):
            with pytest.raises(ConnectionLost):
                await receiver.receive([memoryview(bytearray(1))])


async def test_the_last_words_of_who_resets_the_connection_can_be_read(tmp_path: Path) -> None:
    source, target = written(tmp_path, issued("source")), written(tmp_path, issued("target"))
    async with time_limit(), connected(source, target) as (sender, receiver):
        await sender.send([b"unread"])
        await receiver.send([b"I give up"])
        await anyio.wait_all_tasks_blocked()
        await receiver.aclose()
        for _ in range(2):
            with pytest.raises(ConnectionLost) as caught:
                await sender.send([b"more"])
            assert caught.value.taken == 0
        assert await receive_exactly(sender, 9) == b"I give up"
        for _ in range(2):
            with pytest.raises(ConnectionLost):
                await sender.receive([memoryview(bytearray(1))])


async def test_what_a_full_kernel_holds_up_is_sent_though_nothing_follows(tmp_path: Path) -> None:
    """OpenSSL holds a record that it has sealed until the kernel has room."""
    source, target = written(tmp_path, issued("source")), written(tmp_path, issued("target"))
    async with time_limit(), connected(source, target) as (sender, receiver), receiver:
        assert isinstance(sender, TlsTransport)
        taken = 0
        while count := sender.offer([NOISE]):
            taken += count
        assert sender.holds
        received = 0
        space = memoryview(bytearray(MIB))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sender.room)
            while received < taken:
                received += await receiver.receive([space])
        assert received == taken
        assert not sender.holds


async def test_a_damaged_record_is_no_content(tmp_path: Path) -> None:
    source, target = written(tmp_path, issued("source")), written(tmp_path, issued("target"))
    async with time_limit(), connected(source, target) as (sender, receiver), receiver:
        assert isinstance(sender, TlsTransport)
        sender._sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        for _ in range(2):
            with pytest.raises(TransportError, match="failed in TLS"):
                await receiver.receive([memoryview(bytearray(1))])
        for _ in range(2):
            with pytest.raises(TransportError, match="the other end has ended TLS") as caught:
                await sender.receive([memoryview(bytearray(1))])
            assert not isinstance(caught.value, PeerRefused)  # Trying again may help.


# ---- what is asked for


async def test_nobody_is_connected_to_without_credentials() -> None:
    for opening in (connect, listen):
        with pytest.raises(UsageError, match="name yours with --cert and --key, and whom to believe with --ca"):
            async with opening("tls:127.0.0.1:7000"):
                pass


@pytest.mark.parametrize("address", ["tcp:127.0.0.1:7000", "unix:/tmp/x", "file:/tmp/x"])
async def test_others_have_no_credentials(address: str, tmp_path: Path) -> None:
    for opening in (connect, listen):
        with pytest.raises(UsageError, match="has no credentials"):
            async with opening(address, Options(credentials=written(tmp_path, issued("source")))):
                pass


def test_credentials_that_believe_nobody(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nobody would be believed"):
        Credentials(tmp_path, tmp_path)
    with pytest.raises(UsageError, match="leave out --peer-name"):
        Credentials(tmp_path, tmp_path, peer_fingerprints=(OTHER,), peer_name="x")


@pytest.mark.parametrize("text", ["", "ab", "0" * 63, "0" * 65, "g" * 64])
def test_what_is_no_fingerprint(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a fingerprint"):
        Credentials(tmp_path, tmp_path, peer_fingerprints=(text,))


def test_a_fingerprint_is_read_as_people_write_it(tmp_path: Path) -> None:
    written_by_openssl = ":".join(["AB"] * 32)
    assert Credentials(tmp_path, tmp_path, peer_fingerprints=(written_by_openssl,)).peer_fingerprints == ("ab" * 32,)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cert.pem", None, "cert.pem: a certificate can't be read"),
        ("key.pem", None, "key.pem: a private key can't be read"),
        ("ca.pem", None, "ca.pem: the certificate of a CA can't be read"),
        ("cert.pem", b"junk", "cert.pem: this is not a certificate in PEM"),
        ("key.pem", b"junk", "key.pem: this is not a private key in PEM"),
        ("ca.pem", b"junk", "ca.pem: this is not the certificate of a CA in PEM"),
        ("cert.pem", bytes(tls_trust.MAX_FILE + 1), "has at most 1048576 bytes"),
        ("key.pem", issued("other").key_file, "is not the key of the certificate in"),
        (
            "key.pem",
            issued("source").key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")),
            "has a passphrase; name one without",
        ),
    ],
)
async def test_files_that_are_not_what_they_should_be(
    name: str, content: bytes | None, says: str, tmp_path: Path
) -> None:
    credentials = written(tmp_path, issued("source"))
    file = credentials.cert.parent / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(says)):
        async with listen("tls:127.0.0.1:0", Options(credentials=credentials)):
            pass


def test_without_the_extra_it_says_what_to_install() -> None:
    program = """
        import anyio, sys
        sys.modules["OpenSSL"] = None
        from vfiostream.errors import UsageError
        from vfiostream.transports import listen
        async def main():
            try:
                async with listen("tls:127.0.0.1:0"):
                    pass
            except UsageError as error:
                print(error)
        anyio.run(main)
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, capture_output=True, text=True)
    assert said.stdout == ("tls:127.0.0.1:0: this needs OpenSSL, which is not installed; install vfiostream[tls]\n")
