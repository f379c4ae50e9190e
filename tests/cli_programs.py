"""vfiostream's own programs, run for tests: started, read line by line, ended. Nothing here waits without a limit."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import anyio

from vfiostream.access import open_access
from vfiostream.devices import open_device

LIMIT = 30.0
"""Seconds for anything a program is waited for."""


class Ended(NamedTuple):
    """How a program ended, and all that it printed that was not read before."""

    code: int
    output: str
    errors: str

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.splitlines()]


class Program:
    """``vfiostream ARGUMENTS`` as a process of its own."""

    def __init__(self, *arguments: object, **options: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vfiostream", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            **{"stderr": subprocess.PIPE, **options},
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        self._read = b""

    def line(self) -> str:
        """The next line of its output."""
        deadline = time.monotonic() + LIMIT
        while b"\n" not in self._read:
            ready, _, _ = select.select([self._output], [], [], deadline - time.monotonic())
            assert ready, "the program prints nothing"
            piece = os.read(self._output, 65536)
            assert piece, f"the program has ended: {self.end()}"
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()

    def line_with(self, text: str) -> str:
        """The next line of its output that contains ``text``."""
        while text not in (line := self.line()):
            pass
        return line

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next JSON object of its output that is ``wanted``."""
        while True:
            event: dict[str, Any] = json.loads(self.line())
            if wanted(event):
                return event

    def phase(self, name: str) -> dict[str, Any]:
        """Its next status in phase ``name``."""
        return self.until(lambda event: event.get("phase") == name)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop_reading(self) -> None:
        """Close our end of its output."""
        assert self._process.stdout is not None
        self._process.stdout.close()

    def end(self) -> Ended:
        """Wait for it to end."""
        output, errors = self._process.communicate(timeout=LIMIT)
        return Ended(self._process.returncode, (self._read + (output or b"")).decode(), (errors or b"").decode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


def run(*arguments: object, **options: Any) -> Ended:
    """Run ``vfiostream ARGUMENTS`` to its end."""
    with Program(*arguments, **options) as program:
        return program.end()


@contextmanager
def device(path: Path, *options: object) -> Iterator[str]:
    """Serve a reference device at ``path``; gives its address."""
    with Program("device", "serve", path, *options) as program:
        assert program.line() == f"serving vfio-user:{path}"
        yield f"vfio-user:{path}"


def digest_and_state(address: str) -> tuple[bytes, int]:
    """What a reference device says of itself in BAR 0: the digest of its memory and config, and its device state."""

    async def read() -> tuple[bytes, int]:
        with anyio.fail_after(LIMIT):
            async with await open_access(address) as access:
                raw = bytearray(36)
                await access.read_into(0, 0, memoryview(raw))
        return bytes(raw[:32]), int.from_bytes(raw[32:], "little")

    return anyio.run(read)


def set_running(address: str) -> None:
    """Let a device run, whatever an earlier test left it in."""

    async def resume() -> None:
        with anyio.fail_after(LIMIT):
            async with await open_device(address) as opened:
                await opened.resume()

    anyio.run(resume)
