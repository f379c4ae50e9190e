"""One side of ours, a process of its own: ``python -m benchmarks.end JSON``, where JSON is a ``moving.End``.

It makes its device and its memory, says that it is ready, and moves when it is told to. The clock runs around ``send``,
``receive``, ``save`` or ``restore`` alone, for the wall (CLOCK_MONOTONIC, which all processes of a machine share) and
for this process's CPU time: making memory, starting the interpreter and comparing what arrived are not in it.

Lines of JSON on its output: ``{"address": ...}`` when it is ready, then what it measured. One line on its input: the
address it sends or saves to, or restores from.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import anyio
import anyio.to_thread
import xxhash

import vfiostream
from benchmarks.contents import fill_random
from benchmarks.moving import End
from vfiostream.devices.contract import Device
from vfiostream.devices.four_region import FourRegionDevice
from vfiostream.guest import PAGE_SIZE
from vfiostream.policy import RoundReport, Verdict
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.settings import Settings as DeviceSettings


class LastRound(vfiostream.Guest):
    """A guest whose vCPUs write nothing while it runs, and exactly ``size`` bytes just before they stop."""

    size = 0

    def __init__(self, ranges: tuple[vfiostream.GuestRange, ...] = ()) -> None:
        super().__init__(ranges)
        self._left = 0

    async def pause(self) -> None:
        self._left = self.size // PAGE_SIZE

    async def merge_dirty(self, address: int, pages: int, bitmap: memoryview) -> None:
        count = min(self._left, pages)
        self._left -= count
        bitmap[: count // 8] = b"\xff" * (count // 8)


class OneRound:
    """The policy that stops the source after one round, and remembers how fast that was."""

    give_up_after = None
    throughput = 0.0
    """Bytes a second."""

    def judge(self, report: RoundReport) -> Verdict:
        self.throughput = report.throughput
        return Verdict.SWITCHOVER


def make_guest(end: End) -> LastRound:
    if not end.guest:
        return LastRound()
    if end.file:
        fd = os.open(end.file, os.O_RDWR | os.O_CLOEXEC)
    else:
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(fd, end.guest)
    memory = vfiostream.GuestRange(0, end.guest, fd, "guest")
    if end.populated:
        memory.make_present()
    if end.does in ("send", "save") and not end.file:
        fill_random(memory.view, seed=1)
    guest = LastRound((memory,))
    guest.size = end.last_round
    return guest


@asynccontextmanager
async def open_device(end: End) -> AsyncIterator[tuple[Device, ReferenceDevice | None]]:
    if end.socket:
        async with await vfiostream.open_device(f"vfio-user:{end.socket}") as device:
            yield device, None
        return
    giving = end.does in ("send", "save")
    reference = ReferenceDevice(
        DeviceSettings(
            memory=end.memory,
            memory_region=end.region,
            config=PAGE_SIZE,
            data="random" if giving and end.memory else "zeros",
            seed=1 if giving else 2,
        )
    )
    try:
        async with await FourRegionDevice.open(InProcessAccess(reference)) as device:
            yield device, reference
    finally:
        reference.close()


async def move(end: End) -> dict[str, Any]:
    if end.core is not None:
        os.sched_setaffinity(0, {end.core})
    settings = vfiostream.Settings(**end.settings)
    guest = make_guest(end)
    async with open_device(end) as (device, reference):
        if end.does in ("receive", "restore"):
            seen = await take(end, device, guest, settings)
        else:
            seen = await give(end, device, guest, settings)
        seen["digest"] = digest(guest, reference)
    guest.close()
    return seen


def link_options(end: End) -> vfiostream.Options:
    channels = end.channels if end.does == "send" else 1
    if not end.certificates:
        return vfiostream.Options(channels=channels)
    folder, name = Path(end.certificates), "source" if end.does == "send" else "target"
    credentials = vfiostream.Credentials(folder / f"{name}.pem", folder / f"{name}.key", folder / "ca.pem")
    return vfiostream.Options(channels=channels, credentials=credentials)


async def give(end: End, device: Device, guest: LastRound, settings: vfiostream.Settings) -> dict[str, Any]:
    say({"address": ""})
    address = await told()
    policy = OneRound()
    if end.does == "save":
        began, cpu = monotonic(), process_time()
        async with vfiostream.connect(address) as file:
            summary = await vfiostream.save(device, file, guest=guest, policy=policy, settings=settings)
    else:
        async with vfiostream.connect(address, link_options(end)) as transport:
            began, cpu = monotonic(), process_time()
            summary = await vfiostream.send(device, transport, guest=guest, policy=policy, settings=settings)
    return measured(summary, began, cpu) | {"first_round": policy.throughput}


async def take(end: End, device: Device, guest: LastRound, settings: vfiostream.Settings) -> dict[str, Any]:
    if end.does == "restore":
        say({"address": ""})
        address = await told()
        began, cpu = monotonic(), process_time()
        async with vfiostream.listen(address) as folder, await folder.accept() as file:
            return measured(await vfiostream.restore(file, device, guest=guest, settings=settings), began, cpu)
    async with vfiostream.listen(end.address, link_options(end)) as listener:
        say({"address": listener.address})
        async with await listener.accept() as transport:
            began, cpu = monotonic(), process_time()
            return measured(await vfiostream.receive(device, transport, guest=guest, settings=settings), began, cpu)


def measured(summary: vfiostream.Summary, began: float, cpu: float) -> dict[str, Any]:
    """What is told of the move that has just ended."""
    ended, used = monotonic(), process_time() - cpu
    return {
        "began": began,
        "ended": ended,
        "cpu": used,
        "content": summary.content,
        "transferred": summary.transferred,
        "downtime": summary.downtime.total,
    }


def digest(guest: vfiostream.Guest, reference: ReferenceDevice | None) -> str:
    """Of all memory that was to be moved."""
    sums = xxhash.xxh3_64()
    for memory in guest.ranges:
        sums.update(memory.view)
    if reference is not None and reference.settings.memory:
        sums.update(reference.digest())
    return sums.hexdigest()


async def told() -> str:
    line: str = await anyio.to_thread.run_sync(sys.stdin.readline)
    return line.strip()


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    end = End(**json.loads(sys.argv[1]))
    backend, options = {
        "asyncio": ("asyncio", {}),
        "uvloop": ("asyncio", {"use_uvloop": True}),
        "trio": ("trio", {}),
    }[end.backend]
    say(anyio.run(move, end, backend=backend, backend_options=options))


if __name__ == "__main__":
    main()
