"""Move a busy reference device between real processes in the ways users do, and say what was seen.

Every scenario starts two ``vfiostream device serve`` processes and moves one device to the other with the command
line, then compares the digests that the devices themselves give (BAR 0) and the files of guest memory: a difference
ends it. Prints a table; ``--json`` prints one object a scenario. What it measures ran on the reference device, in
processes of one machine: it is no hardware.

    .venv/bin/python benchmarks/acceptance.py [--memory 1GiB] [--guest 512MiB] [--rate 100MiB] [--only NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from vfiostream.access.vfio_user import connect

VFIOSTREAM = [sys.executable, "-m", "vfiostream"]
GUEST_ADDRESS = "0x100000000"


@dataclass(frozen=True)
class Scenario:
    """One way to move."""

    name: str
    link: str
    """``tcp``, ``unix`` or ``file``."""
    source: tuple[str, ...] = ()
    """Options of the source device beyond size and rate."""
    target: tuple[str, ...] = ()
    memory: str | None = None
    """Of device memory, where it is not the common one."""


SCENARIOS = (
    Scenario("tcp", "tcp"),
    Scenario("unix", "unix"),
    Scenario("file", "file"),
    Scenario("64M to 1M regions", "tcp", ("--memory-region", "64MiB"), ("--memory-region", "1MiB")),
    Scenario("1M to 64M regions", "tcp", ("--memory-region", "1MiB"), ("--memory-region", "64MiB")),
    Scenario("mmap refused", "tcp", ("--mmap", "none"), ("--mmap", "none")),
    Scenario("mmap sparse", "tcp", ("--mmap", "sparse"), ("--mmap", "sparse")),
    Scenario("no device memory", "tcp", memory="0"),
)


@dataclass
class Watch:
    """Samples what a process has of its own, in bytes: pages that are neither files nor shared memory."""

    pid: int
    peak: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        status = Path(f"/proc/{self.pid}/status")
        while not self._stop.wait(0.02):
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                if line.startswith("RssAnon:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.peak


@contextmanager
def device(socket: Path, *options: str) -> Iterator[None]:
    """A reference device in a process of its own."""
    words = [*VFIOSTREAM, "device", "serve", str(socket), *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if "serving" not in process.stdout.readline():
            raise SystemExit(f"the device at {socket} did not start")
        yield
    finally:
        process.terminate()
        process.wait()


def command(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*VFIOSTREAM, *words, "--json"], stdout=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str], watch: Watch) -> dict[str, Any]:
    """Wait for a command's end; returns its summary and its peak memory."""
    assert process.stdout is not None
    lines = [json.loads(line) for line in process.stdout]
    peak = watch.stop()
    if process.wait():
        raise SystemExit(f"{process.args!r} failed with {process.returncode}: {lines[-1]}")
    return {**lines[-1], "peak_memory": peak}


async def bar0(socket: Path) -> tuple[str, int]:
    """The device's own word: digest of its memory and config, and its state."""
    async with await connect(str(socket)) as access:
        raw = bytearray(36)
        await access.read_into(0, 0, memoryview(raw)[:32])
        await access.read_into(0, 32, memoryview(raw)[32:])
    return raw[:32].hex(), int.from_bytes(raw[32:], "little")


def compare(scenario: Scenario, one: Path, other: Path, files: list[Path], states: tuple[int, int]) -> None:
    """Devices and guest memories must be the same, and the devices in these states; else this run has failed."""
    (ours, our_state), (theirs, their_state) = anyio.run(bar0, one), anyio.run(bar0, other)
    if (
        ours != theirs
        or subprocess.run(["cmp", *map(str, files)], check=False).returncode
        or (our_state, their_state) != states
    ):
        raise SystemExit(f"{scenario.name}: the devices differ, or are in states {our_state} and {their_state}")


def run(scenario: Scenario, memory: str, guest: str, rate: str) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        files = [folder / "guest-source", folder / "guest-target"]
        for file in files:
            subprocess.run(["truncate", "-s", guest.replace("iB", ""), file], check=True)
        sockets = [folder / "source.sock", folder / "target.sock"]
        size = ("--memory", scenario.memory or memory)
        stack.enter_context(device(sockets[0], *size, "--dirty-rate", rate, *scenario.source))
        stack.enter_context(device(sockets[1], *size, "--seed", "2", *scenario.target))
        memories = [("--guest-memory", f"{GUEST_ADDRESS}={file}") for file in files]
        devices = [f"vfio-user:{socket}" for socket in sockets]
        if scenario.link == "file":
            where = f"file:{folder / 'checkpoint'}"
            saving = command("save", devices[0], where, *memories[0])
            sent = outcome(saving, Watch(saving.pid))
            verifying = command("verify", where)
            outcome(verifying, Watch(verifying.pid))
            restoring = command("restore", where, devices[1], *memories[1])
            received = outcome(restoring, Watch(restoring.pid))
            # The source runs on after a save and changes; the restored device stands still, so one more round trip can
            # be compared. (That the first is exact is tested with a device that is looked at while it is stopped.)
            again, third = f"file:{folder / 'again'}", folder / "third.sock"
            stack.enter_context(device(third, *size, "--seed", "3"))
            saving = command("save", devices[1], again, *memories[1])
            outcome(saving, Watch(saving.pid))
            restoring = command("restore", again, f"vfio-user:{third}", *memories[0])
            outcome(restoring, Watch(restoring.pid))
            compare(scenario, sockets[1], third, files, states=(0, 0))
        else:
            where = "tcp:127.0.0.1:0" if scenario.link == "tcp" else f"unix:{folder / 'link'}"
            receiving = command("receive", where, devices[1], *memories[1])
            assert receiving.stdout is not None
            listening = json.loads(receiving.stdout.readline())
            watch = Watch(receiving.pid)
            sending = command("send", devices[0], listening["address"], *memories[0])
            sent = outcome(sending, Watch(sending.pid))
            received = outcome(receiving, watch)
            compare(scenario, sockets[0], sockets[1], files, states=(1, 0))
        return {"scenario": scenario.name, "sent": sent, "received": received}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--guest", default="512MiB")
    parser.add_argument("--rate", default="100MiB")
    parser.add_argument("--only", default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.json:
        print(
            f"reference device of {options.memory}, guest memory of {options.guest}, both written at {options.rate}/s\n"
        )
        print("| scenario | rounds | content MiB | seconds | MiB/s | downtime ms | peak MiB sender | receiver |")
        print("|---|---|---|---|---|---|---|---|")
    for scenario in SCENARIOS:
        if options.only in (None, scenario.name):
            seen = run(scenario, options.memory, options.guest, options.rate)
            if options.json:
                print(json.dumps(seen), flush=True)
                continue
            sent, received = seen["sent"], seen["received"]
            print(
                f"| {scenario.name} | {sent['rounds']} | {sent['bytes'] / 2**20:.0f} | {sent['total_seconds']:.2f} "
                f"| {sent['bytes'] / 2**20 / sent['total_seconds']:.0f} | {1000 * sent['downtime_seconds']:.0f} "
                f"| {sent['peak_memory'] / 2**20:.0f} | {received['peak_memory'] / 2**20:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
