"""What the tests of records share: devices that are recorded, and what came of using them."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.device_contract import IOVA, PAGE, guest_memory
from vfiostream.access.contract import Access
from vfiostream.access.record import RecordedAccess, Recording, recorded
from vfiostream.access.record_format import Event, Reader
from vfiostream.access.replay import open_replay
from vfiostream.devices.contract import Device
from vfiostream.devices.finding import find
from vfiostream.errors import DeviceRefused, VfiostreamError
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess

ADDRESS = "in-process:reference"
CUTS = (5 * PAGE, 300)


class Still:
    """In place of the driver whose device a replay is: nothing writes its memory."""

    class workload:  # noqa: N801 - named as a driver names it
        @staticmethod
        def write(pages: int) -> None:
            pass


Flow = Callable[[Device, Any], Awaitable[Any]]
"""What is done with a device; what is there to change its memory meanwhile is the second argument."""


async def record(path: Path, driver: ReferenceDevice, *, payloads: bool = True) -> RecordedAccess:
    async def open_it() -> Access:
        return InProcessAccess(driver, ADDRESS)

    return await recorded(ADDRESS, Recording(path, payloads), open_it)


def events(path: Path) -> list[Event]:
    """All of a record that is not cut."""
    with path.open("rb") as file:
        reader = Reader(file)
        found = list(iter(reader.next, None))
        assert not reader.is_cut
        return found


async def outcome(opening: Callable[[], Awaitable[Access]], flow: Flow, workload: Any) -> tuple[Any, ...]:
    """What came of ``flow`` with the device: its description and what the flow returned, or the error. Then it is
    resumed, as one would, and what came of that.
    """
    came: list[Any] = []
    try:
        device = await find(await opening())
    except VfiostreamError as error:
        return (_of(error),)
    async with device:
        came.append(device.description)
        for step in (flow, lambda device, _: device.resume(), lambda device, _: device.abandon()):
            try:
                came.append(await step(device, workload))
            except VfiostreamError as error:
                came.append(_of(error))
    return tuple(came)


def _of(error: VfiostreamError) -> tuple[Any, ...]:
    # The name of a replay is its own, and all else that is said is the device's.
    text = str(error).split("replay:", 1)
    said = text[0] + ADDRESS + text[1].partition(".record")[2] if len(text) > 1 else text[0]
    return type(error), said, error.errno if isinstance(error, DeviceRefused) else None


async def recorded_and_replayed(
    path: Path, driver: ReferenceDevice, flow: Flow, replaying: Flow | None = None, *, payloads: bool = True
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What comes of ``flow`` with the driver, and of ``replaying`` (the same) with the record of it."""

    async def replay() -> Access:
        return open_replay(path)

    first = await outcome(lambda: record(path, driver, payloads=payloads), flow, driver)
    return first, await outcome(replay, replaying or flow, Still)


@dataclass
class Saved:
    """All that a source gave: sizes and bytes of its captures."""

    captures: list[tuple[int | None, bytes]] = field(default_factory=list)
    pci: bytes | None = None
    config: bytes = b""
    dirty: bytes = b""


async def drain(device: Device, cuts: Iterator[int]) -> bytes:
    """A capture or config, in pieces of at most ``cuts``."""
    content = bytearray()
    for cut in cuts:
        piece = await device.next(cut)
        if piece is None:
            piece = memoryview(bytearray(cut))
            piece = piece[: await device.read([piece])]
        content += piece
        if not piece:
            break
    return bytes(content)


def saving(*cuts: int) -> Flow:
    """Three rounds and the stop of a source, with guest memory."""

    async def flow(device: Device, workload: Any) -> Saved:
        saved, pieces = Saved(), itertools.cycle(cuts or CUTS)

        async def one_round() -> None:
            await device.begin_round()
            while (size := await device.capture()) != 0:
                saved.captures.append((size, await drain(device, pieces)))
            bitmap = bytearray(8)
            await device.merge_dirty(IOVA, 64, memoryview(bitmap))
            saved.dirty += bitmap

        with guest_memory(64) as fd:
            await device.dma_map(IOVA, 64 * PAGE, fd, 0)
            await device.start_precopy()
            for _ in range(3):
                await one_round()
                await device.pending()
                workload.workload.write(7)
            await device.quiesce()
            await device.stop()
            await one_round()
            saved.pci = await device.read_pci_config()
            if await device.capture_config():
                saved.config = await drain(device, pieces)
            await device.release()
        return saved

    return flow


def loading(saved: Saved, *cuts: int) -> Flow:
    """All of a target."""

    async def flow(device: Device, workload: Any) -> None:
        pieces = itertools.cycle(cuts or CUTS)

        async def write(content: bytes) -> None:
            at = 0
            while at < len(content):
                cut = next(pieces)
                await device.write(content[at : at + cut])
                at += cut

        assert await device.accepts(device.description.version or "")
        await device.start_load()
        for size, content in saved.captures:
            await device.begin_capture(size)
            await write(content)
        if saved.pci is not None:
            await device.load_pci_config(saved.pci)
        if saved.config:
            await device.begin_config(len(saved.config))
            await write(saved.config)
        await device.finish_load()
        await device.run()

    return flow


async def saved_from(driver: ReferenceDevice) -> Saved:
    """What a source gives, without a record."""
    async with await find(InProcessAccess(driver)) as device:
        saved: Saved = await saving()(device, driver)
        return saved
