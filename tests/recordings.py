"""What the tests of records share: devices that are recorded, and what came of using them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.device_contract import IOVA, PAGE, Saved, guest_memory, load, save
from vfiostream.access.contract import Access
from vfiostream.access.record import RecordedAccess, Recording, recorded
from vfiostream.access.record_format import Event, Reader
from vfiostream.access.replay import open_replay
from vfiostream.devices.contract import Device
from vfiostream.devices.four_region import FourRegionDevice
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
        device = await FourRegionDevice.open(await opening())
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


def saving(*cuts: int) -> Flow:
    async def flow(device: Device, workload: Any) -> tuple[Saved, bytes]:
        with guest_memory(64) as fd:
            await device.dma_map(IOVA, 64 * PAGE, fd, 0)
            saved = await save(device, workload, cuts=cuts or CUTS)
            bitmap = bytearray(8)
            if device.description.dirty_tracking:
                await device.merge_dirty(IOVA, 64, memoryview(bitmap))
            await device.release()
            return saved, bytes(bitmap)

    return flow


def loading(saved: Saved, *cuts: int) -> Flow:
    async def flow(device: Device, workload: Any) -> None:
        assert await device.accepts(device.description.version or "")
        await load(device, saved, cuts=cuts or CUTS)
        await device.run()

    return flow
