"""Moves over a link, inside the Linux of scripts/test-kernel: ``python -m benchmarks.inside JSON``, where JSON is what
``links.Visit`` has. Writes what happened to ``moved.json`` in the folder of results.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from benchmarks.hosts import Link, Network, network
from benchmarks.links import KINDS, Visit
from benchmarks.moving import End, move
from benchmarks.plan import MIB, CannotRun

RESULTS = Path("/run/results")
TICK = 0.05
"""Seconds between two looks at the clock, and at what a link has carried."""
HEAP = 80 * MIB
"""Bytes that an end buffers at most, and something beside."""
AS_IT_COMES = {
    "net.ipv4.tcp_congestion_control": "cubic",
    "net.ipv4.tcp_rmem": "4096 131072 6291456",
    "net.ipv4.tcp_wmem": "4096 16384 4194304",
    # What one connection has learnt of the way is not to help the next.
    "net.ipv4.tcp_no_metrics_save": "1",
}
"""Of the kernel: its own, but for the last."""


class Clock(threading.Thread):
    """Finds out whether the whole machine stood still, as it does where it is stopped or has no processor left."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest = 0.0
        """Seconds between two looks at the clock."""
        self.start()

    def run(self) -> None:
        last = monotonic()
        never = threading.Event()
        while True:
            never.wait(TICK)
            now = monotonic()
            self.longest = max(self.longest, now - last)
            last = now


@contextmanager
def going_away(hosts: Network, link: Link, when: int, seconds: float) -> Iterator[None]:
    """Let the link be away for so long once it has carried ``when`` bytes. Raises CannotRun where it never did."""
    over, gone = threading.Event(), threading.Event()
    begin = hosts.carried()

    def watch() -> None:
        while hosts.carried() - begin < when:
            if over.wait(TICK):
                return
        hosts.go_away()
        gone.set()
        over.wait(seconds)
        hosts.shape(link)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if not gone.is_set():
        raise CannotRun("all had been moved before the link was to go away")


def main() -> None:
    visit = Visit.of(json.loads(sys.argv[1]))
    clock = Clock()
    runs = {}
    with network() as hosts, TemporaryDirectory() as folder:
        certificates = f"{folder}/certificates"
        if any(KINDS[name].encrypted for name in visit.kinds):
            make = [sys.executable, "-m", "vfiostream", "cert", certificates, "--name", hosts.address]
            subprocess.run(make, stdout=subprocess.DEVNULL, check=True)
        for name in visit.kinds:
            kind = KINDS[name]
            hosts.set({**AS_IT_COMES, **kind.kernel})
            hosts.shape(visit.link)
            source = End(
                "send",
                address=kind.address.format(hosts.address),
                memory=visit.size,
                region=min(visit.size, 16 * MIB),
                channels=kind.channels,
                certificates=certificates if kind.encrypted else "",
                heap=HEAP,
            )
            away = going_away(hosts, visit.link, visit.size // 2, visit.away) if visit.away else nullcontext()
            with away:
                moved = move(source, at=(hosts.here, hosts.there))
            runs[name] = asdict(moved.run)
    (RESULTS / "moved.json").write_text(json.dumps({"runs": runs, "stood": clock.longest}))


if __name__ == "__main__":
    main()
