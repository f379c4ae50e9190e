"""Migrations over the links that there are: delay, loss and rate of Linux's netem, between two hosts of the User-Mode
Linux of scripts/test-kernel. What a kind of link moves there, and what it does when the way is gone for a while.

In each round every kind moves the same, one after the other, each in a Linux that is booted for it (``inside``); the
order is turned round by round. That Linux has one processor for both hosts and the network, which limits what a link of
1 Gbit/s carries: so the first table says what the kinds move where nothing hinders them. A move during which the
machine stood still, or in which a process was lost, is forgotten and run again.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.hosts import Link
from benchmarks.moving import ROOT
from benchmarks.pairs import Run, column
from benchmarks.plan import BUILD, MIB, CannotRun, Plan
from benchmarks.row import Row, compare

DELAYS = (0.1, 10.0, 100.0)
LOSSES = (0.0, 0.1, 1.0)
RATES = (100.0, 1000.0)
UNHINDERED = Link()
AWAY = 5.0
"""Seconds for which a link is away."""
STOOD = 1.0
"""Seconds without a look at the clock that make a move worthless."""
ATTEMPTS = 6
"""At one move."""
LONGEST = 90
"""Seconds for one move: a guest in which one hangs is given up."""
GUESTS = 2
"""At a time, where loss leaves processors idle."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Of link."""

    address: str
    """Where the target listens, with a place for the host."""
    channels: int = 1
    kernel: Mapping[str, str] = field(default_factory=dict)
    """Settings that differ from the kernel's own."""

    @property
    def encrypted(self) -> bool:
        return not self.address.startswith("tcp:")


TCP, TLS, QUIC = "tcp:{}:0", "tls:{}:0", "quic:{}:0"
BBR = {"net.ipv4.tcp_congestion_control": "bbr"}
LARGE_BUFFERS = {"net.ipv4.tcp_rmem": "4096 131072 67108864", "net.ipv4.tcp_wmem": "4096 65536 67108864"}
KINDS: dict[str, Kind] = {
    "TCP": Kind(TCP),
    "TCP, 4 channels": Kind(TCP, 4),
    "TLS": Kind(TLS),
    "TLS, 4 channels": Kind(TLS, 4),
    "QUIC": Kind(QUIC),
    "TCP, BBR": Kind(TCP, kernel=BBR),
    "TCP, large buffers": Kind(TCP, kernel=LARGE_BUFFERS),
    "TCP, BBR, large buffers": Kind(TCP, kernel={**BBR, **LARGE_BUFFERS}),
}
"""The simpler before those that need more; and last what needs settings of the hosts."""
IN_GRID = ("TCP", "TCP, 4 channels", "TLS, 4 channels", "QUIC")


@dataclass(frozen=True, slots=True)
class Visit:
    """One round: what is moved over which link, by which kinds in turn."""

    link: Link
    kinds: Sequence[str]
    size: int
    """Bytes of the memory of a reference device, all of which changes once."""
    away: float = 0.0
    """Seconds for which the link is away when half of it has been carried."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Visit:
        """One that was JSON."""
        link = Link(**{**told["link"], "more": tuple(told["link"]["more"])})
        return cls(**{**told, "link": link})


def size_for(link: Link) -> int:
    """Bytes that take one TCP connection some seconds: a power of two, as the region that they go through."""
    trip = 2 * link.delay / 1e3 + 3e-4
    most = (1e9 if link.rate is None else link.rate * 1e6) / 8
    # Of a connection of the kernel's own buffers, and of one that loses packets (Mathis et al., 1997). Such a one is
    # given longer, as most of its first seconds are without a loss.
    size = 6 * min(most, 4e6 / trip)
    if link.loss:
        size = min(size, 18 * 1.2 * 1448 / trip / math.sqrt(link.loss / 100))
    return int(min(max(MIB, 2 ** round(math.log2(size))), 256 * MIB))


def rounds_of(visit: Visit, number: int) -> tuple[list[dict[str, Run]], int]:
    """That many rounds, and how many moves were forgotten. Raises :class:`CannotRun`."""
    kinds = list(visit.kinds)
    orders = [kinds if number % 2 == 0 else kinds[::-1] for number in range(number)]
    with ThreadPoolExecutor(GUESTS if _is_idle(visit.link) else 1) as pool:
        done = list(pool.map(lambda order: [(kind, *_moved(replace(visit, kinds=[kind]))) for kind in order], orders))
    forgotten = sum(attempts - 1 for moves in done for _, _, attempts in moves)
    return [{kind: run for kind, run, _ in moves} for moves in done], forgotten


def _is_idle(link: Link) -> bool:
    """Whether it is so slow, whoever uses it, that processors wait for it."""
    return link.delay > 1 and link.loss > 0


def _moved(visit: Visit) -> tuple[Run, int]:
    """What the one kind of ``visit`` did, and in which attempt. Each has a Linux of its own, and is repeated alone."""
    for attempt in count(1):
        try:
            (run,) = _boot(visit).values()
        except CannotRun:
            if attempt == ATTEMPTS:
                raise
        else:
            return run, attempt
    raise AssertionError("count ends")


def _boot(visit: Visit) -> dict[str, Run]:
    BUILD.mkdir(parents=True, exist_ok=True)
    limit = str(60 + LONGEST * len(visit.kinds))
    with TemporaryDirectory(prefix="links-", dir=BUILD) as folder:
        told = subprocess.run(
            ["scripts/test-kernel", "--run", ".venv/bin/python", "-m", "benchmarks.inside", json.dumps(asdict(visit))],
            cwd=ROOT,
            env={**os.environ, "VFIOSTREAM_KERNEL_RESULTS": folder, "VFIOSTREAM_KERNEL_TIMEOUT": limit},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        try:
            with open(f"{folder}/moved.json") as file:
                moved = json.load(file)
        except (OSError, ValueError) as error:
            raise CannotRun(f"nothing was moved over {visit.link}:\n{told.stdout[-2000:]}") from error
    if moved["stood"] > STOOD:
        raise CannotRun(f"the machine stood still for {moved['stood']:.1f} s: use it for nothing else meanwhile")
    return {name: Run(**run) for name, run in moved["runs"].items()}


def line(table: str, visit: Visit, rounds: Sequence[Mapping[str, Run]], forgotten: int) -> dict[str, Any]:
    """Of the results: seconds, and CPU seconds for each GB of both ends, in the order of the rounds."""
    link = {"delay": visit.link.delay, "loss": visit.link.loss, "rate": visit.link.rate}
    runs = {kind: column(rounds, kind) for kind in sorted(visit.kinds, key=list(KINDS).index)}
    return {
        "table": table,
        **link,
        "away": visit.away,
        "size": visit.size,
        "forgotten": forgotten,
        "seconds": {kind: [run.seconds for run in done] for kind, done in runs.items()},
        "cpu": {kind: [run.cpu_sending + run.cpu_receiving for run in done] for kind, done in runs.items()},
    }


def _lines(plan: Plan, table: str, visits: Sequence[Visit]) -> Iterator[dict[str, Any]]:
    for visit in visits:
        yield line(table, visit, *rounds_of(visit, 1 if plan.quick else min(plan.pairs, 3)))


def unhindered(plan: Plan) -> Iterator[dict[str, Any]]:
    """Where nothing hinders."""
    kinds = [name for name, kind in KINDS.items() if not kind.kernel]
    yield from _lines(plan, "unhindered", [Visit(UNHINDERED, kinds, 16 * MIB if plan.quick else 256 * MIB)])


def grid(plan: Plan) -> Iterator[dict[str, Any]]:
    """Every delay with every loss and rate; first those that are the least trouble."""
    links = [Link(delay, loss, rate) for delay in DELAYS for loss in LOSSES for rate in RATES]
    links.sort(key=lambda link: not _is_idle(link))
    if plan.quick:
        links = links[:1]
    yield from _lines(plan, "grid", [Visit(link, IN_GRID, MIB if plan.quick else size_for(link)) for link in links])


def settings_of_a_host(plan: Plan) -> Iterator[dict[str, Any]]:
    """What another congestion control, or larger buffers, would change."""
    if plan.quick:
        return
    kinds = ["TCP", *(name for name, kind in KINDS.items() if kind.kernel)]
    links = [Link(10.0, 0.1, 1000.0), Link(10.0, 1.0, 1000.0), Link(100.0, 0.0, 1000.0), Link(100.0, 1.0, 1000.0)]
    yield from _lines(plan, "settings", [Visit(link, kinds, size_for(link)) for link in links])


def away(plan: Plan) -> Iterator[dict[str, Any]]:
    """A link that is gone for a while, half-way; and the same one that is not."""
    if plan.quick:
        return
    link = Link(10.0, 0.0, 100.0)
    visits = [Visit(link, IN_GRID, 32 * MIB, seconds) for seconds in (0.0, AWAY)]
    yield from _lines(plan, "away", visits)


def _pairs(plan: Plan, link: Link, ours: str, theirs: str, must: float) -> Iterator[Row]:
    size = MIB if plan.quick else size_for(link)
    rounds, _ = rounds_of(Visit(link, (ours, theirs), size), 1 if plan.quick else max(plan.pairs, 5))
    yield compare(
        rounds,
        ours,
        theirs,
        path=f"{ours}, {link.delay:g} ms, {link.loss:g} %, {link.rate:g} Mbit/s",
        must=must,
        measure=lambda run: 1e3 * run.speed,
        unit="MB/s",
        note=f"{size // MIB} MiB",
    )


def quic_where_it_is_worst(plan: Plan) -> Iterator[Row]:
    """Far away, with loss."""
    yield from _pairs(plan, Link(100.0, 1.0, 1000.0), "QUIC", "TCP", 1.0)


def channels_with_loss(plan: Plan) -> Iterator[Row]:
    """Four of them against one."""
    yield from _pairs(plan, Link(10.0, 0.1, 1000.0), "TCP, 4 channels", "TCP", 2.0)


MEASUREMENTS: Sequence[Callable[[Plan], Iterator[Row | dict[str, Any]]]] = (
    grid,
    away,
    quic_where_it_is_worst,
    channels_with_loss,
    settings_of_a_host,
    unhindered,
)
