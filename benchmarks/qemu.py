"""QEMU moving a guest's RAM to another QEMU, over TCP: what a VMM does without us.

Two processes without a guest's operating system and stopped from the start; their RAM is a file in memory each, the
target's preallocated. The time is from the source's word that the migration is active (the connections are made
then) to the target's word that it is complete, both stamped by QEMU: asking costs nothing, and neither our commands nor
what QEMU sets up beforehand is in it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import anyio
from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from benchmarks.pairs import Run
from benchmarks.peers import free_port, program
from benchmarks.plan import CannotRun

CHANNELS = 2
TIME_LIMIT = 300.0
"""Seconds that a migration may take."""


def migrate(content: Path, target: Path, size: int, folder: Path) -> Run:
    """Move the ``size`` bytes of ``content`` into ``target``, files in memory; the sockets of QMP are in ``folder``.
    Raises :class:`~benchmarks.plan.CannotRun`.
    """
    return anyio.run(_migrate, content, target, size, folder)


async def _migrate(content: Path, target: Path, size: int, folder: Path) -> Run:
    try:
        with anyio.fail_after(TIME_LIMIT):
            async with (
                _machine(content, size, folder / "source.qmp") as source,
                _machine(target, size, folder / "target.qmp", "-incoming", "defer") as destination,
            ):
                return Run(size, await _measure(source, destination))
    except (QMPError, ExecuteError) as error:
        raise CannotRun(f"QEMU did not migrate: {error}") from error
    except TimeoutError as error:
        raise CannotRun(f"QEMU did not migrate within {TIME_LIMIT:g} s") from error


async def _measure(source: QMPClient, destination: QMPClient) -> float:
    for client in (source, destination):
        capabilities = [{"capability": name, "state": True} for name in ("multifd", "events")]
        await client.execute("migrate-set-capabilities", {"capabilities": capabilities})
        await client.execute("migrate-set-parameters", {"multifd-channels": CHANNELS, "max-bandwidth": 1 << 40})
    uri = f"tcp:127.0.0.1:{free_port()}"
    with (
        source.listener("MIGRATION") as sending,
        destination.listener("MIGRATION") as receiving,
    ):
        await destination.execute("migrate-incoming", {"uri": uri})
        await source.execute("migrate", {"uri": uri})
        began = await _reached(sending, "active")
        return await _reached(receiving, "completed") - began


async def _reached(events: EventListener, status: str) -> float:
    """When a migration had come to ``status``, in seconds of the machine's clock."""
    async for event in events:
        data, stamp = (cast("dict[str, Any]", event[part]) for part in ("data", "timestamp"))
        seen = data["status"]
        if seen == status:
            return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6
        if seen in ("failed", "cancelled"):
            break
    raise CannotRun(f"QEMU's migration ended before it was {status}")


@asynccontextmanager
async def _machine(memory: Path, size: int, socket: Path, *options: str) -> AsyncIterator[QMPClient]:
    """QEMU with ``memory`` as its RAM, and a QMP connection to it."""
    backend = f"memory-backend-file,id=ram,size={size},mem-path={memory},share=on,prealloc=on"
    machine = ["-machine", "q35,memory-backend=ram", "-accel", "tcg", "-m", f"{size}B", "-object", backend]
    quiet = ["-nodefaults", "-no-user-config", "-display", "none", "-S"]
    client = QMPClient(memory.name)
    await client.start_server(str(socket))
    words = [program("qemu-system-x86_64"), *machine, *quiet, "-qmp", f"unix:{socket}", *options]
    process = await anyio.open_process(words, stdin=None, stdout=None, stderr=None)
    try:
        await client.accept()
        yield client
    finally:
        await client.disconnect()
        process.kill()
        await process.wait()
