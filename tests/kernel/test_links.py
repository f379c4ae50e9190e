"""The command line between two hosts: over links that delay, lose, repeat and reorder packets, or go away."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from benchmarks.hosts import Link, Network, network

from tests.kernel.conftest import MakeMdev
from tests.kernel.mdev import Mdev
from tests.kernel.test_migrate import GUEST, IOVA, SCRIPT, digest, fill

BAD = Link(1, 5, 200, ("duplicate", "5%", "reorder", "5%"))
"""All of these happen to the 180 packets of 256 KiB."""
SLOW = Link(10, rate=10)
"""512 KiB take half a second."""
HALF = 1 << 18
"""Bytes of these, after which something happens to the link."""
PATIENCE = 60.0
"""Seconds for one move, however bad the link."""


@dataclass(frozen=True, slots=True)
class Way:
    """To connect two hosts."""

    address: str
    """Where the target listens."""
    receive: tuple[str, ...] = ()
    """Options of the command."""
    send: tuple[str, ...] = ()


def shown(side: str) -> tuple[str, ...]:
    """Options with the certificate of a side, and of who signed the other's."""
    folder = f"{{certificates}}/{side}"
    return ("--cert", f"{folder}.pem", "--key", f"{folder}.key", "--ca", "{certificates}/ca.pem")


WAYS = {
    "tcp": Way("tcp:{}:0", ("--plain",)),
    "tcp-4-channels": Way("tcp:{}:0", ("--plain",), ("--channels", "4")),
    "tls": Way("tls:{}:0", shown("target"), shown("source")),
    "quic": Way("quic:{}:0", shown("target"), shown("source")),
}


USUAL = ("tcp", "quic")
"""The rest takes as long, and is run when it is asked for: conftest.py."""


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Network]:
    with network() as made:
        yield made


@pytest.fixture
def hosts(two_hosts: Network) -> Iterator[Network]:
    """Two of them, with a network between that hinders nothing at first."""
    yield two_hosts
    two_hosts.shape(Link())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("links") / "certificates"
    make = [str(SCRIPT), "cert", str(folder), "--name", Network.address]
    subprocess.run(make, stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE)
    return folder


@pytest.fixture(params=[name if name in USUAL else pytest.param(name, marks=pytest.mark.thorough) for name in WAYS])
def way(request: pytest.FixtureRequest, certificates: Path) -> Way:
    return with_certificates(WAYS[request.param], certificates)


def with_certificates(way: Way, folder: Path) -> Way:
    receive, send = (tuple(word.format(certificates=folder) for word in words) for words in (way.receive, way.send))
    return Way(way.address, receive, send)


@pytest.fixture(params=["group", "node"])
def address(request: pytest.FixtureRequest) -> Callable[[Mdev], str]:
    """The two ways to a device, as addresses that force each."""
    if request.param == "group":
        return lambda mdev: f"vfio:{mdev.group.name}/{mdev.uuid}"
    return lambda mdev: f"vfio:{mdev.cdev}"


def move(
    hosts: Network,
    way: Way,
    source: str,
    target: str,
    memory: tuple[str, ...] = ("", ""),
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """From the first host to the second; ``memory`` are options of both, ``meanwhile`` is done when they have begun."""
    here, there = ([option] if option else [] for option in memory)
    listening = way.address.format(hosts.address)
    receive = [*hosts.there, str(SCRIPT), "receive", *way.receive, listening, target, *there]
    with subprocess.Popen(receive, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        try:
            port = receiver.stdout.readline().removeprefix("listening on ").strip()
            send = [*hosts.here, str(SCRIPT), "send", "--json", *way.send, source, port, *here]
            with subprocess.Popen(send, stdout=subprocess.PIPE, text=True) as sender:
                try:
                    meanwhile()
                    told, _ = sender.communicate(timeout=PATIENCE)
                finally:
                    sender.kill()
            received, _ = receiver.communicate(timeout=PATIENCE)
        finally:
            receiver.kill()
    assert sender.returncode == receiver.returncode == 0
    assert json.loads(told.splitlines()[-1])["status"] == "done"
    assert "done" in received


def until(condition: Callable[[], bool]) -> None:
    """Wait for what the kernel counts and does not tell. Raises AssertionError when patience is over."""
    late = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < late, "it did not happen"
        time.sleep(0.02)  # of this process alone: there is nothing to wait on


def boards(mdev: MakeMdev, size: str, pattern: int) -> tuple[str, str]:
    """Two devices that have different memory of ``size``."""
    source, target = (f"vfio:{mdev(f'four-region-{size}').uuid}" for _ in range(2))
    fill(source, pattern)
    assert digest(target) != digest(source)
    return source, target


@pytest.mark.parametrize("kind", ["mtty-2", "four-region-16M"])
def test_between_two_hosts(
    mdev: MakeMdev, hosts: Network, address: Callable[[Mdev], str], kind: str, tmp_path: Path
) -> None:
    source, target = (address(mdev(kind)) for _ in range(2))
    if kind != "mtty-2":
        fill(source, 77)
    for name in ("here", "there"):
        (tmp_path / name).write_bytes(os.urandom(GUEST) if name == "here" else bytes(GUEST))
    move(
        hosts,
        WAYS["tcp"],
        source,
        target,
        (f"--guest-memory={IOVA:#x}={tmp_path}/here", f"--guest-memory={IOVA:#x}={tmp_path}/there"),
    )
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    if kind != "mtty-2":
        assert digest(target) == digest(source)


def check_bad(mdev: MakeMdev, hosts: Network, way: Way, size: str) -> None:
    source, target = boards(mdev, size, 1234)
    hosts.shape(BAD)
    move(hosts, way, source, target)
    assert hosts.lost()
    assert digest(target) == digest(source)


def test_a_link_that_loses_repeats_and_reorders(mdev: MakeMdev, hosts: Network, way: Way) -> None:
    check_bad(mdev, hosts, way, "256K")


def test_a_bad_link_for_long(mdev: MakeMdev, hosts: Network, way: Way) -> None:
    check_bad(mdev, hosts, way, "16M")


def check_away(mdev: MakeMdev, hosts: Network, way: Way, seconds: float) -> None:
    source, target = boards(mdev, "512K", 5678)
    hosts.shape(SLOW)
    carried = hosts.carried()

    def go_away() -> None:
        until(lambda: hosts.carried() > carried + HALF)
        hosts.go_away()
        time.sleep(seconds)  # synchronises nothing: it is what is tested
        assert hosts.lost()
        hosts.shape(SLOW)

    move(hosts, way, source, target, meanwhile=go_away)
    assert digest(target) == digest(source)


def test_a_link_that_is_away_for_a_second(mdev: MakeMdev, hosts: Network, way: Way) -> None:
    check_away(mdev, hosts, way, 1.0)


def test_the_source_gets_another_address(mdev: MakeMdev, hosts: Network, certificates: Path) -> None:
    source, target = boards(mdev, "512K", 91011)
    hosts.shape(SLOW)
    carried = hosts.carried()

    def change() -> None:
        until(lambda: hosts.carried() > carried + HALF)
        hosts.change_address()

    try:
        move(hosts, with_certificates(WAYS["quic"], certificates), source, target, meanwhile=change)
    finally:
        hosts.change_address()
    assert digest(target) == digest(source)


def test_a_link_that_is_away_for_long(mdev: MakeMdev, hosts: Network, way: Way) -> None:
    check_away(mdev, hosts, way, 8.0)
