"""Ours: a source and a target, each in a process of its own (``end``), and what they did as one :class:`Run`."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.pairs import Run
from benchmarks.plan import MIB, CannotRun

Does = Literal["send", "receive", "save", "restore"]
Backend = Literal["asyncio", "uvloop", "trio"]
ROOT = Path(__file__).resolve().parent.parent
MADV_POPULATE_WRITE = 23
"""madvise(2), Linux 5.14; Python 3.11 has no name for it."""
TIME_LIMIT = 300.0
"""Seconds that a process of ours may live: one that hangs is killed, and its row fails."""


@dataclass(frozen=True, slots=True)
class End:
    """One side: what it has, and what it does with it."""

    does: Does
    address: str = "tcp:127.0.0.1:0"
    """Where a target listens."""
    backend: Backend = "asyncio"
    certificates: str = ""
    """A folder of `vfiostream cert`, for a link that needs one."""
    memory: int = 0
    """Bytes of memory of a reference device in this process; 0 for a device without."""
    region: int = 16 * MIB
    """Bytes of the region it moves through."""
    socket: str = ""
    """Of a reference device in a process of its own, instead."""
    guest: int = 0
    """Bytes of guest memory; 0 for none."""
    file: str = ""
    """Holds guest memory, as it is; empty for a memfd, which a source fills with random bytes."""
    populated: bool = True
    """Whether guest memory was touched before."""
    last_round: int = 0
    """Bytes of guest memory that are dirty when the source has stopped."""
    channels: int = 1
    """Connections that a source makes its link of."""
    core: int | None = None
    """The only one that this side may use; None for all."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the library."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What both sides saw."""

    content: int
    """Bytes that the source has, zeros and all."""
    sent: dict[str, Any]
    received: dict[str, Any]
    peaks: tuple[int, int] = (0, 0)
    """Bytes of their own that both had at most, where that was watched."""

    @property
    def run(self) -> Run:
        return Run(
            self.content,
            self.received["ended"] - self.sent["began"],
            self.sent["cpu"],
            self.received["cpu"],
            self.sent["transferred"],
            *self.peaks,
        )


def move(source: End, target: End | None = None, *, watch: bool = False) -> Moved:
    """Move what ``source`` has to ``target``, its like where none is given; checks that all arrived. With ``watch``,
    memory is sampled meanwhile. Raises :class:`CannotRun`.
    """
    target = target or replace(source, does="receive", file="", last_round=0)
    with ExitStack() as stack:
        receiving, sending = (stack.enter_context(_process(end)) for end in (target, source))
        address = _line(receiving, target)["address"]
        _line(sending, source)
        if target.guest and not target.populated:
            have_backed(target.guest)
        watches = [_Watch(process.pid) for process in (sending, receiving)] if watch else []
        _tell(sending, address)
        sent, received = _line(sending, source), _line(receiving, target)
        peaks = tuple(entry.stop() for entry in watches)
    if sent["digest"] != received["digest"]:
        raise CannotRun(f"what arrived is not what was sent: {source}")
    size = source.memory + source.guest or sent["content"]
    return Moved(size, sent, received, (peaks[0], peaks[1]) if peaks else (0, 0))


def have_backed(size: int) -> None:
    """Take ``size`` bytes of memory and give them back. Where a hypervisor takes back what its guest leaves free,
    whoever touches it next waits for the hypervisor: that is not what is to be measured. ``limit.c`` does the same.
    """
    with mmap.mmap(-1, size) as memory:
        memory.madvise(MADV_POPULATE_WRITE)


def store(end: End, file: Path) -> dict[str, Any]:
    """Let ``end`` save to ``file``, or restore from it; returns what it saw. Raises :class:`CannotRun`."""
    with _process(end) as process:
        _line(process, end)
        _tell(process, f"file:{file}")
        return _line(process, end)


@contextmanager
def reference_device(socket: Path, *options: str) -> Iterator[None]:
    """A reference device in a process of its own, served at ``socket``."""
    words = [sys.executable, "-m", "vfiostream", "device", "serve", str(socket), *options]
    with _running(words) as process:
        assert process.stdout is not None
        if "serving" not in process.stdout.readline():
            raise CannotRun(f"the reference device at {socket} did not start")
        yield


def _process(end: End) -> AbstractContextManager[subprocess.Popen[str]]:
    return _running([sys.executable, "-m", "benchmarks.end", json.dumps(asdict(end))])


@contextmanager
def _running(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    limit = threading.Timer(TIME_LIMIT, process.kill)
    limit.start()
    try:
        yield process
    finally:
        limit.cancel()
        process.terminate()
        process.communicate()


def _line(process: subprocess.Popen[str], end: End) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise CannotRun(f"the side that was to {end.does} with {end.settings} failed, and said above why")
    message: dict[str, Any] = json.loads(line)
    return message


def _tell(process: subprocess.Popen[str], address: str) -> None:
    assert process.stdin is not None
    process.stdin.write(address + "\n")
    process.stdin.flush()


class _Watch:
    """Samples every 20 ms what a process has of its own, in bytes: pages that are neither files nor shared memory."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._over.wait(0.02):
            for line in self._status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self._peak = max(self._peak, int(line.split()[1]) * 1024)

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self._peak
