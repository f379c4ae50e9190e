"""How exactly a limit of the bandwidth is kept: a reference device is sent through TCP with ``--max-bandwidth``, which
``vfiostream control`` changes in the middle, and what the sender hands to its kernel is noted.

    .venv/bin/python -m benchmarks.bandwidth [--seconds 4] [20MiB:100MiB ...]

Each argument is one run: the limit at first, and the one after half of the time. Prints a table for docs/transports.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.acceptance import VFIOSTREAM, device
from vfiostream.cli import main
from vfiostream.cli.values import parse_rate
from vfiostream.pipeline.outbound import Outbound

MIB = 1 << 20
SETTLING = 0.3
"""Seconds around the start and the change that are left out: starting a process takes as long."""

Log = list[tuple[float, int]]


def note(file: Path, arguments: list[str]) -> int:
    """Run a command in this process, and write to ``file`` when how many bytes had gone."""
    log: Log = []
    went = Outbound._went

    def noted(self: Outbound, size: int) -> None:
        log.append((time.monotonic(), size))
        went(self, size)

    Outbound._went = noted  # type: ignore[method-assign]
    try:
        return main(arguments)
    finally:
        file.write_text(json.dumps(log))


def windows(log: Log, start: float, end: float, seconds: float) -> list[int]:
    """Bytes of all windows of ``seconds`` that begin with a piece, from ``start`` to ``end``."""
    log = [(at, size) for at, size in log if start <= at < end]
    found = []
    last = total = 0
    for at, size in log:
        if at + seconds > end:
            break
        while last < len(log) and log[last][0] < at + seconds:
            total += log[last][1]
            last += 1
        found.append(total)
        total -= size
    return found


def row(log: Log, limit: int, start: float, end: float) -> str:
    """What was seen of one limit."""
    long, short = windows(log, start, end, 1.0), windows(log, start, end, 0.01)
    each = [sum(size for at, size in log if start + n <= at < start + n + 1) for n in range(int(end - start))]
    rates = ", ".join(f"{size / MIB:.2f}" for size in each)
    return (
        f"| {limit / MIB:g} | {rates} | {min(long) / limit:.4f} to {max(long) / limit:.4f} "
        f"| {max(short) / 1024:.0f} | {max(short) / limit * 1000:.1f} |"
    )


def run(first: str, second: str, seconds: float) -> list[str]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vfiostream-")))
        for name in ("a", "b"):
            stack.enter_context(device(folder / name, "--memory", "3GiB"))
        receive = [*VFIOSTREAM, "receive", "tcp:127.0.0.1:0", f"vfio-user:{folder}/b", "--json"]
        receiver = subprocess.Popen(receive, stdout=subprocess.PIPE, text=True)
        stack.callback(receiver.wait)
        assert receiver.stdout is not None
        address = json.loads(receiver.stdout.readline())["address"]
        send = ["send", f"vfio-user:{folder}/a", address, "--max-bandwidth", first, "--control", str(folder / "c")]
        noting = [sys.executable, "-m", "benchmarks.bandwidth", "--note", str(folder / "log"), *send, "--json"]
        sender = subprocess.Popen(noting, stdout=subprocess.PIPE, text=True)
        assert sender.stdout is not None
        for line in sender.stdout:
            if json.loads(line).get("bytes"):
                break
        began = time.monotonic() + SETTLING
        time.sleep(seconds + SETTLING)
        changing = time.monotonic()
        subprocess.run([*VFIOSTREAM, "control", str(folder / "c"), "set", "max-bandwidth", second], check=True)
        changed = time.monotonic()
        time.sleep(seconds + SETTLING)
        sender.send_signal(signal.SIGINT)
        ended = time.monotonic()
        sender.communicate()
        log: Log = [(at, size) for at, size in json.loads((folder / "log").read_text())]
    return [
        row(log, parse_rate(first), began, changing),
        row(log, parse_rate(second), changed + SETTLING, ended),
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--note"]:
        sys.exit(note(Path(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("runs", nargs="*", default=["20MiB:100MiB", "100MiB:400MiB", "400MiB:20MiB"])
    arguments = parser.parse_args()
    print("| limit, MiB/s | MiB in each second | in any second, by the limit | KiB in any 10 ms | ms of the limit |")
    print("|---|---|---|---|---|")
    for limits in arguments.runs:
        first, _, second = limits.partition(":")
        print(*run(first, second, arguments.seconds), sep="\n", flush=True)
