"""Two hosts and a network between them, inside the Linux of scripts/test-kernel: for its tests, and for ``links``.

Each host is a network namespace, and so is the network: packets are delayed, lost and queued where they leave it, on
both of its sides, and never inside a host. So a sender's own kernel does not know what becomes of them, as it would
where netem is a queue of the host's. What leaves a host is cut into packets of the MTU, TCP's and UDP's large ones
alike: netem would lose or hold up such a large one as a whole. What reaches a host is joined, where it comes at once.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

MTU = 1500
LEAST_QUEUE = 100
"""Packets that fit into a queue of the network however short its way: some ten bursts of a sender that begins."""


@dataclass(frozen=True, slots=True)
class Link:
    """The same in both directions."""

    delay: float = 0.0
    """Milliseconds that a packet is under way, one way: a round trip takes twice as long."""
    loss: float = 0.0
    """Per cent of the packets, each by itself."""
    rate: float | None = None
    """Mbit/s, of packets with all their headers."""
    more: tuple[str, ...] = ()
    """Further words for netem, such as ``("reorder", "5%")``."""

    @property
    def netem(self) -> list[str]:
        """The words of tc for one direction. Its queue holds what the delay keeps, and beside it what the rate carries
        in one round trip: less, and TCP could not fill the link; far more, and nothing was ever lost by too much.
        """
        words = []
        under_way = 0.0
        if self.delay:
            words += ["delay", f"{self.delay:g}ms"]
        if self.rate is not None:
            words += ["rate", f"{self.rate:g}mbit"]
            under_way = self.rate * 1e6 / 8 * self.delay / 1e3 / MTU
        if self.loss:
            words += ["loss", f"{self.loss:g}%"]
        limit = int(under_way + max(2 * under_way, LEAST_QUEUE)) if self.rate is not None else 100_000
        return [*words, *self.more, "limit", str(limit)]

    def __str__(self) -> str:
        rate = "unhindered" if self.rate is None else f"{self.rate:g} Mbit/s"
        return f"{self.delay:g} ms, {self.loss:g} %, {rate}"


class Network:
    """Made by :func:`network`."""

    here = ("ip", "netns", "exec", "here")
    """The words that run a program on the first host."""
    there = ("ip", "netns", "exec", "there")
    address = "10.5.2.1"
    """Of the second host."""

    def __init__(self) -> None:
        self._here, self._next = "10.5.1.1", "10.5.1.3"

    def shape(self, link: Link | None) -> None:
        """Be ``link`` from now on; None: hinder nothing. What is under way arrives as it was to."""
        for device in ("net0", "net1"):
            if link is None:
                _run("tc", "-n", "net", "qdisc", "delete", "dev", device, "root")
            else:
                _run("tc", "-n", "net", "qdisc", "replace", "dev", device, "root", "netem", *link.netem)

    def go_away(self) -> None:
        """Carry nothing until the next :meth:`shape`, and tell nobody: a line that is cut somewhere on the way."""
        self.shape(Link(loss=100))

    def carried(self) -> int:
        """Bytes that have been handed on to the second host, headers and all."""
        (device,) = _json("ip", "-n", "net", "-s", "link", "show", "net1")
        return int(device["stats64"]["tx"]["bytes"])

    def lost(self) -> int:
        """Packets that have been lost since the link was given its shape."""
        return sum(qdisc["drops"] for device in ("net0", "net1") for qdisc in _queues(device))

    def change_address(self) -> None:
        """Take the first host's address away and give it another; the next time, the first one again."""
        _run("ip", "-n", "here", "address", "delete", f"{self._here}/24", "dev", "here0")
        self._here, self._next = self._next, self._here
        _run("ip", "-n", "here", "address", "add", f"{self._here}/24", "dev", "here0")
        # The kernel took what went through the old one along.
        _run("ip", "-n", "here", "route", "replace", "default", "via", "10.5.1.2")

    def set(self, settings: Mapping[str, str]) -> None:
        """Of the kernel, on both hosts: names and values of sysctl(8)."""
        for host in (self.here, self.there):
            for name, value in settings.items():
                _run(*host, "sysctl", "-q", "-w", f"{name}={value}")


@contextmanager
def network() -> Iterator[Network]:
    """Two hosts that reach each other, unhindered at first. One at a time."""
    with ExitStack() as undo:
        for name in ("here", "net", "there"):
            _run("ip", "netns", "add", name)
            undo.callback(_run, "ip", "netns", "delete", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        for number, name in ((1, "here"), (2, "there")):
            outside = f"net{number - 1}"
            _run(
                "ip", "link", "add", f"{name}0", "netns", name, "type", "veth", "peer", "name", outside, "netns", "net"
            )
            _run("ip", "netns", "exec", name, "ethtool", "-K", f"{name}0", "gro", "on")
            for space, device, host in ((name, f"{name}0", 1), ("net", outside, 2)):
                _run("ip", "netns", "exec", space, "ethtool", "-K", device, "tso", "off", "tx-udp-segmentation", "off")
                _run("ip", "-n", space, "address", "add", f"10.5.{number}.{host}/24", "dev", device)
                _run("ip", "-n", space, "link", "set", device, "mtu", str(MTU), "up")
            _run("ip", "-n", name, "route", "add", "default", "via", f"10.5.{number}.2")
        _run("ip", "netns", "exec", "net", "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        yield Network()


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


def _queues(device: str) -> Sequence[Mapping[str, Any]]:
    return _json("tc", "-n", "net", "-s", "qdisc", "show", "dev", device)


def _json(*words: str) -> Sequence[Mapping[str, Any]]:
    told = subprocess.run([words[0], "-json", *words[1:]], check=True, stdout=subprocess.PIPE)
    found: Sequence[Mapping[str, Any]] = json.loads(told.stdout)
    return found
