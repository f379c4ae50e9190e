"""What both ends of a migration hold when the target's device takes nothing any more, over each kind of link.

The server of the target's device is stopped (SIGSTOP) in the middle of the first round, which stalls the receiver, and
so the link and the sender. When nothing has moved for a second, the memory of both processes is read: pages of their
own, less those of a receiver that waits for its sender. It must be no more than the byte budget. Prints a table for
docs/transports.md.

    .venv/bin/python -m benchmarks.stalled [KIND ...]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.acceptance import VFIOSTREAM, Watch, device
from vfiostream.transports.certificates import make_pair

MIB = 1 << 20
MEMORY = 1024
"""MiB of the device: more than both ends and the kernel between them hold."""
KINDS = {
    "tcp": ("tcp::0", ()),
    "tcp, 4 channels": ("tcp::0", ("--channels", "4")),
    "tcp, 16 channels": ("tcp::0", ("--channels", "16")),
    "tcp, 4 channels, reconnects": ("tcp::0", ("--channels", "4", "--reconnect", "20s")),
    "unix": ("unix:{}/link", ()),
    "unix, 4 channels": ("unix:{}/link", ("--channels", "4")),
    "tls": ("tls:127.0.0.1:0", ()),
    "tls, 4 channels": ("tls:127.0.0.1:0", ("--channels", "4")),
    "quic": ("quic:127.0.0.1:0", ()),
    "quic, 4 channels": ("quic:127.0.0.1:0", ("--channels", "4")),
    "quic, 4 channels, reconnects": ("quic:127.0.0.1:0", ("--channels", "4", "--reconnect", "20s")),
}


def moved(control: Path) -> int:
    """Bytes that a command says to have moved by now; -1 before it can be asked."""
    done = subprocess.run([*VFIOSTREAM, "control", str(control), "status", "--json"], capture_output=True, check=False)
    return int(json.loads(done.stdout)["transferred"]) if done.returncode == 0 else -1


def run(kind: str) -> str:
    address, options = KINDS[kind]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        make_pair(folder / "pair", ["127.0.0.1"], days=1)
        for name in ("a", "b"):
            stack.enter_context(device(folder / name, "--memory", f"{MEMORY}MiB", "--data", "random"))
        ends: list[subprocess.Popen[str]] = []

        def end_all() -> None:
            for end in ends:
                end.kill()
                end.wait()

        stack.callback(end_all)

        def command(does: str, name: str, *words: str) -> subprocess.Popen[str]:
            shown = [
                *("--cert", f"{folder}/pair/{name}.pem", "--key", f"{folder}/pair/{name}.key"),
                *("--ca", f"{folder}/pair/ca.pem"),
            ]
            encrypted = shown if address.startswith(("tls", "quic")) else []
            words = (does, *words, *encrypted, "--control", f"{folder}/{does}", "--json")
            ends.append(subprocess.Popen([*VFIOSTREAM, *words], stdout=subprocess.PIPE, text=True))
            return ends[-1]

        waiting = command("receive", "target", address.format(folder), f"vfio-user:{folder}/b")
        assert waiting.stdout is not None
        where, base = json.loads(waiting.stdout.readline())["address"], own(waiting.pid)
        sender = command("send", "source", f"vfio-user:{folder}/a", where, *options)
        watches = [Watch(sender.pid), Watch(waiting.pid)]
        driver = int(subprocess.run(["pgrep", "-f", f"serve {folder}/b"], capture_output=True, check=True).stdout)
        while moved(folder / "send") < 128 * MIB:
            pass
        os.kill(driver, signal.SIGSTOP)
        try:
            seen, since = -1, time.monotonic()
            while time.monotonic() < since + 1:
                now = moved(folder / "send")
                if now != seen:
                    seen, since = now, time.monotonic()
            peaks = [watch.stop() for watch in watches]
        finally:
            os.kill(driver, signal.SIGCONT)
    assert seen < MEMORY * MIB, "all was moved: nothing stalled"
    cells = " | ".join(f"{(peak - base) / MIB:.0f}" for peak in peaks)
    return f"| {kind} | {seen / MIB:.0f} | {cells} |"


def own(pid: int) -> int:
    """Bytes that a process has of its own."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    print("| link | MiB that had gone | MiB at the sender | MiB at the receiver |\n|---|---|---|---|")
    for kind in parser.parse_args().kinds or KINDS:
        print(run(kind), flush=True)


if __name__ == "__main__":
    main()
