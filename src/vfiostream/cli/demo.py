"""``demo``: two reference devices in processes of their own; the busy one moves to the other, and digests are compared.

Everything it starts, it ends, and its files go with it, also when it is interrupted. The processes get a session of
their own, so that an interrupt at the terminal reaches this one alone, and the devices are there for as long as it
needs them.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import click
from anyio import to_thread
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from vfiostream import migrate, transports
from vfiostream.access import open_access
from vfiostream.cli import options
from vfiostream.cli.exits import Exit
from vfiostream.cli.report import Result
from vfiostream.cli.run import Output, Run, carry_out, end
from vfiostream.cli.summary import document, lines
from vfiostream.cli.values import option_size
from vfiostream.devices import open_device
from vfiostream.errors import DeviceLost, VfiostreamError
from vfiostream.guest import Guest
from vfiostream.uapi.four_region import State
from vfiostream.uapi.vfio import PCI_BAR0_REGION

MIB = 1 << 20
MEMORY = 256 * MIB
DIRTY_RATE = 100 * MIB
"""Bytes a second, of device memory and of guest memory each."""
GUEST_MEMORY = 64 * MIB
GUEST_ADDRESS = 4 << 30

PATIENCE = 30.0
"""Seconds a process may take to start, or to end by itself."""
MAX_LINE = 4096
DIGEST_SIZE = 32


class DigestsDiffer(VfiostreamError):
    """What arrived is not what was sent."""


@dataclass(frozen=True, slots=True)
class _Side:
    """One host of the demo: a device and the memory of its guest."""

    socket: Path
    memory: Path

    @property
    def address(self) -> str:
        return f"vfio-user:{self.socket}"

    async def digests(self) -> dict[str, str]:
        """The state of the device; the digest that it computes of its memory and config; one of guest memory."""
        async with await open_access(self.address) as access:
            raw = bytearray(DIGEST_SIZE + 4)
            await access.read_into(PCI_BAR0_REGION, 0, memoryview(raw))
        state = State(int.from_bytes(raw[DIGEST_SIZE:], "little"))
        return {
            "state": state.name.lower().replace("_", " and "),
            "device": raw[:DIGEST_SIZE].hex(),
            "guest_memory": await to_thread.run_sync(_file_digest, self.memory),
        }


@click.command
@options.progress
def demo(output: Output) -> Exit:
    """Move a busy simulated device to another process, live, and compare digests.

    Starts two reference devices, which are simulations and no hardware, moves one into the other while it writes its
    own memory and a guest's, and then asks both what they hold. Exit code 1 where that differs.
    """

    async def work(run: Run) -> None:
        with tempfile.TemporaryDirectory(prefix="vfiostream-") as folder:
            await _move(Path(folder), run)

    return carry_out(work, output, cancelled="what the demo started has ended")


async def _move(folder: Path, run: Run) -> None:
    source, target = (_Side(folder / f"{name}.sock", folder / f"{name}.guest") for name in ("source", "target"))
    for side in (source, target):
        with side.memory.open("wb") as file:
            file.truncate(GUEST_MEMORY)
    busy = ("--dirty-rate", option_size(DIRTY_RATE), "--seed", "1")
    link = f"unix:{folder / 'link.sock'}"
    memory = f"{GUEST_ADDRESS:#x}={target.memory}"
    async with (
        _started("device", "serve", str(source.socket), "--memory", option_size(MEMORY), *busy),
        _started("device", "serve", str(target.socket), "--memory", option_size(MEMORY), "--seed", "2"),
        _started("receive", link, target.address, "--guest-memory", memory) as receiver,
    ):
        run.follow()
        with Guest.open([(GUEST_ADDRESS, source.memory)]) as guest:
            async with await open_device(source.address) as device, transports.connect(link) as transport:
                summary = await migrate.send(device, transport, guest=guest, progress=run.progress)
        with anyio.move_on_after(PATIENCE):
            await receiver.wait()
        if receiver.returncode != 0:
            how = "did not end" if receiver.returncode is None else f"ended with {receiver.returncode}"
            raise DeviceLost(f"the receiving process {how}; what it said stands above")
        here, there = await source.digests(), await target.digests()
    for what in ("device", "guest_memory"):
        if here[what] != there[what]:
            raise DigestsDiffer(
                f"the {what.replace('_', ' ')} that arrived is not what was sent ({there[what]}, not {here[what]}): "
                "this is a defect in vfiostream, report it"
            )
    run.result = Result(
        {**document(summary), "simulated": True, "source": here, "target": there},
        [*lines(summary), *_comparison(here, there)],
    )


def _comparison(here: dict[str, str], there: dict[str, str]) -> list[str]:
    kept = 16
    return [
        "",
        f"reference device, simulated, no hardware: {MEMORY // MIB} MiB of device memory and {GUEST_MEMORY // MIB} MiB",
        f"of guest memory, each written at {DIRTY_RATE // MIB} MiB/s while it moved from one process to another",
        f"{'':<24}{'source':<20}target",
        f"{'state':<24}{here['state']:<20}{there['state']}",
        *(
            f"{name:<24}{here[key][:kept] + '...':<20}{there[key][:kept]}...  equal"
            for name, key in (("device memory, config", "device"), ("guest memory", "guest_memory"))
        ),
    ]


@asynccontextmanager
async def _started(*arguments: str) -> AsyncIterator[Process]:
    """A vfiostream process that has printed its first line, which says that it can be connected to."""
    process = await anyio.open_process(
        [sys.executable, "-m", "vfiostream", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None,
        env={**os.environ, "TERM": "dumb"},  # only one process may repaint the terminal
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        output = BufferedByteReceiveStream(process.stdout)
        try:
            with anyio.fail_after(PATIENCE):
                await output.receive_until(b"\n", MAX_LINE)
        except (TimeoutError, anyio.IncompleteRead, anyio.DelimiterNotFound) as error:
            raise DeviceLost(f"`vfiostream {arguments[0]}` did not start; what it said stands above") from error
        yield process
    finally:
        await end(process)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_SIZE)).hexdigest()
