"""Rules for the migration region of Linux 5.8 to 5.17."""

from __future__ import annotations

import struct

from vfiostream.access.contract import Access, RegionInfo
from vfiostream.conformance.rules import Broken, NotTestable, Rulebook, together
from vfiostream.conformance.stream import Stream, StreamSubject, too_much
from vfiostream.conformance.subject import MAX_STREAM, Opener, named, refusal
from vfiostream.devices.regions import Region
from vfiostream.uapi.vfio import (
    MIGRATION_INFO,
    MIGRATION_INFO_DATA_OFFSET,
    MIGRATION_INFO_DATA_SIZE,
    MIGRATION_INFO_DEVICE_STATE,
    MIGRATION_INFO_PENDING_BYTES,
    RegionState,
)

STOP, RUNNING, STOP_COPY, PRE_COPY, RESUMING = 0b000, 0b001, 0b010, 0b011, 0b100
ERROR = RegionState.SAVING | RegionState.RESUMING
NAMES = {
    STOP: "STOP",
    RUNNING: "RUNNING",
    STOP_COPY: "SAVING",
    PRE_COPY: "RUNNING|SAVING",
    RESUMING: "RESUMING",
    0b101: "RUNNING|RESUMING",
    0b110: "SAVING|RESUMING",
    0b111: "RUNNING|SAVING|RESUMING",
}
BITS = 0b111
PIECE = 4096
"""Bytes that are written at a time where a load is not to be finished."""
PATHS = (
    (STOP, RUNNING),
    (STOP_COPY, STOP, RUNNING),
    (PRE_COPY, STOP_COPY, STOP),
    (PRE_COPY, RUNNING),
    (STOP_COPY, RUNNING),
)
"""From RUNNING: shut down and begin again, suspended, saved live, and a save that was called off."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class MigrationRegionSubject(StreamSubject):
    """A device with the migration region."""

    def __init__(self, opener: Opener, access: Access, info: RegionInfo) -> None:
        super().__init__(opener, access)
        self.info = info

    async def get(self, offset: int, field: struct.Struct = _U64) -> int:
        raw = bytearray(field.size)
        await self.access.read_into(self.info.index, offset, memoryview(raw))
        return int(field.unpack(raw)[0])

    async def state(self) -> int:
        return await self.get(MIGRATION_INFO_DEVICE_STATE, _U32) & BITS

    async def go(self, state: int) -> None:
        reserved = await self.get(MIGRATION_INFO_DEVICE_STATE, _U32) & ~BITS
        await self.access.write(self.info.index, MIGRATION_INFO_DEVICE_STATE, _U32.pack(reserved | state))

    async def pending(self) -> int:
        return await self.get(MIGRATION_INFO_PENDING_BYTES)

    async def place(self) -> tuple[int, int]:
        """Where the data at hand is, and how much."""
        return await self.get(MIGRATION_INFO_DATA_OFFSET), await self.get(MIGRATION_INFO_DATA_SIZE)

    async def run(self) -> None:
        if await self.state() != RUNNING:
            await self.go(RUNNING)

    async def stop(self) -> None:
        await self.go(STOP)

    async def data_region(self) -> Region:
        return await self.region(self.info.index, "migration region")

    async def segment(self) -> bytes:
        """The data at hand, copied out of the region; raises :class:`NotTestable` where that can't be: the rule
        pending-place is about that.
        """
        offset, size = await self.place()
        if not (MIGRATION_INFO.size <= offset and offset + size <= self.info.size):
            raise NotTestable(
                f"the driver offers {size} bytes at {offset}, not behind the header and within the {self.info.size} of "
                "the region"
            )
        into = bytearray(size)
        if size:
            await (await self.data_region()).read(offset, memoryview(into))
        return bytes(into)

    async def segments(self) -> list[bytes]:
        """All there is, until nothing is pending, or nothing comes."""
        whole: list[bytes] = []
        total = 0
        while await self.pending():
            piece = await self.segment()
            if not piece:
                break
            whole.append(piece)
            total += len(piece)
            if total > MAX_STREAM:
                raise too_much()
        return whole

    async def save(self) -> Stream:
        await self.reset()
        await self.go(STOP_COPY)
        whole = await self.segments()
        return Stream(b"".join(whole), tuple(map(len, whole)) or (1,))

    async def begin_load(self) -> None:
        await self.reset()
        await self.go(RESUMING)

    async def put(self, piece: bytes) -> None:
        region = await self.data_region()
        rest = memoryview(piece)
        while rest:  # more than once only for a target with a smaller region
            offset = await self.get(MIGRATION_INFO_DATA_OFFSET)
            if not MIGRATION_INFO.size <= offset < self.info.size:
                raise Broken(f"data is to be put at {offset} of the {self.info.size} bytes of the region")
            now = rest[: self.info.size - offset]
            await region.write(offset, now)
            await self.access.write(self.info.index, MIGRATION_INFO_DATA_SIZE, _U64.pack(len(now)))
            rest = rest[len(now) :]

    async def end_load(self) -> None:
        await self.go(RUNNING)

    async def is_in_load(self) -> str | None:
        state = await self.state()
        return None if state in (RESUMING, ERROR) else name_of(state)


def name_of(state: int) -> str:
    return NAMES.get(state, f"state {state}")


REGION: Rulebook[MigrationRegionSubject] = Rulebook("migration region (Linux 5.8 to 5.17)")
_INFO = "linux/vfio.h of Linux 5.8, vfio_device_migration_info"


@REGION.rule(
    "region",
    "The migration region can be read and written, is larger than its header, and the header can't be mapped.",
    _INFO,
)
async def region(subject: MigrationRegionSubject) -> None:
    info, seen = subject.info, []
    if not (info.readable and info.writable):
        seen.append("it can't be both read and written")
    if info.size <= MIGRATION_INFO.size:
        seen.append(f"it has {info.size} bytes")
    if any(at < MIGRATION_INFO.size for at, _ in info.mappable):
        seen.append("its header can be mapped")
    together(seen)


@REGION.rule("state-start", "A device that was opened or reset is in RUNNING.", f"{_INFO}: the default state")
async def state_start(subject: MigrationRegionSubject) -> None:
    if refused := await refusal(subject.access.reset()):
        raise NotTestable(f"a reset was refused with {named(refused)}")
    if (state := await subject.state()) != RUNNING:
        raise Broken(f"it is in {name_of(state)}")


@REGION.rule(
    "changes-permitted",
    "The changes that a migration makes are done, and each state is the one that is read afterwards.",
    f"{_INFO}: state transitions",
)
async def changes_permitted(subject: MigrationRegionSubject) -> None:
    seen = []
    for path in PATHS:
        await subject.reset()
        before = RUNNING
        for state in path:
            change = f"{name_of(before)} -> {name_of(state)}"
            if refused := await refusal(subject.go(state)):
                seen.append(f"{change} was refused with {named(refused)}")
                break
            if (now := await subject.state()) != state:
                seen.append(f"{change} was done, and the state was {name_of(now)}")
                break
            before = state
    together(seen)


@REGION.rule(
    "states-refused",
    "The states with RESUMING beside another bit are refused, in every state; the state stays, or is the error state.",
    f"{_INFO}: VFIO_DEVICE_STATE_VALID",
)
async def states_refused(subject: MigrationRegionSubject) -> None:
    seen = []
    for start in (RUNNING, STOP, PRE_COPY, STOP_COPY, RESUMING):
        for state in (0b101, 0b110, 0b111):
            await subject.reset()
            if start != RUNNING:
                await subject.go(start)
            refused = await refusal(subject.go(state))
            now = await subject.state()
            if refused is None:
                seen.append(f"{name_of(start)} -> {name_of(state)} was done")
            elif now not in (start, ERROR):
                seen.append(f"{name_of(start)} -> {name_of(state)} was refused, and left {name_of(now)}")
    together(seen)


@REGION.rule(
    "reset-told",
    "A device that can be moved says that it can be reset, as there may be no other way out of a failed load.",
    "linux/vfio.h of Linux 5.8, VFIO_DEVICE_FLAGS_RESET; the error state wants it",
)
async def reset_told(subject: MigrationRegionSubject) -> None:
    if not subject.access.info.can_reset:
        raise Broken("its flags do not have VFIO_DEVICE_FLAGS_RESET")


@REGION.rule("reset", "A reset brings the device from each of its states to RUNNING.", f"{_INFO}; VFIO_DEVICE_RESET")
async def reset(subject: MigrationRegionSubject) -> None:
    if refused := await refusal(subject.access.reset()):
        raise NotTestable(f"a reset was refused with {named(refused)}")
    half = await subject.half()
    seen = []
    for state in (STOP, PRE_COPY, STOP_COPY, RESUMING):
        await subject.reset()
        await subject.go(state)
        if state == RESUMING:
            await subject.write(half, (PIECE,))
        elif state in (PRE_COPY, STOP_COPY) and await subject.pending():
            await subject.place()
        await subject.access.reset()
        if (now := await subject.state()) != RUNNING:
            seen.append(f"a reset in {name_of(state)} left {name_of(now)}")
    together(seen)


@REGION.rule(
    "pending-place",
    "What a driver offers lies behind the header and within the region.",
    f"{_INFO}: data_offset and data_size",
)
async def pending_place(subject: MigrationRegionSubject) -> None:
    for state in (PRE_COPY, STOP_COPY):
        await subject.reset()
        await subject.go(state)
        while await subject.pending():
            try:
                size = len(await subject.segment())
            except NotTestable as found:
                raise Broken(str(found)) from found
            if not size:
                break
            if state == PRE_COPY:  # a busy device need not come to an end
                break


@REGION.rule(
    "pending-again",
    "Reading pending_bytes again, or data_offset and data_size, changes nothing until data was offered and taken.",
    f"{_INFO}: the sequence of an iteration, a to c",
)
async def pending_again(subject: MigrationRegionSubject) -> None:
    await subject.reset()
    await subject.go(STOP_COPY)
    first, again = await subject.pending(), await subject.pending()
    if first != again:
        raise Broken(f"pending_bytes was {first}, and then {again}, with nothing between")
    if not first:
        raise NotTestable("a stopped device has nothing to give")
    place, data = await subject.place(), await subject.segment()
    if await subject.place() != place or await subject.segment() != data:
        raise Broken("data that was offered was something else when its place was read again")


@REGION.rule(
    "pending-end",
    "In SAVING, data comes while pending_bytes is not 0; and when it is 0, it stays so.",
    f"{_INFO}: until pending_bytes is 0",
)
async def pending_end(subject: MigrationRegionSubject) -> None:
    await subject.reset()
    await subject.go(STOP_COPY)
    total = 0
    while pending := await subject.pending():
        piece = await subject.segment()
        if not piece:
            raise Broken(f"{pending} bytes were pending after {total}, and none came")
        total += len(piece)
        if total > MAX_STREAM:
            raise too_much()
    if not total:
        raise Broken("a stopped device gave no state at all")
    if again := await subject.pending():
        raise Broken(f"pending_bytes was 0 after {total} bytes, and then {again}")


@REGION.rule(
    "load", "A stream is taken in the pieces in which it came, and then the device runs.", f"{_INFO}: while _RESUMING"
)
async def load(subject: MigrationRegionSubject) -> None:
    data, pieces = await subject.stream()
    loaded = await subject.target.load(data, pieces)
    if not loaded.accepted:
        raise Broken(f"it was {loaded}")
    if (now := await subject.target.state()) != RUNNING:
        raise Broken(f"it was loaded, and the device is in {name_of(now)}")


@REGION.rule(
    "precopy-goes-on",
    "What comes in RUNNING|SAVING and then in SAVING is one stream, which can be loaded.",
    f"{_INFO}: pre-copy and stop-and-copy",
)
async def precopy_goes_on(subject: MigrationRegionSubject) -> None:
    await subject.reset()
    await subject.go(PRE_COPY)
    whole = []
    if await subject.pending() and (piece := await subject.segment()):
        whole.append(piece)
    await subject.go(STOP_COPY)
    whole += await subject.segments()
    loaded = await subject.target.load(b"".join(whole), tuple(map(len, whole)) or (1,))
    if not loaded.accepted:
        raise Broken(f"such a stream was {loaded}")


@REGION.rule(
    "data-size-refused",
    "More data than its place in the region has is refused, and so is data in a state but RESUMING.",
    f"{_INFO}: data_size",
)
async def data_size_refused(subject: MigrationRegionSubject) -> None:
    seen = []
    for state in (RESUMING, RUNNING, STOP, STOP_COPY):
        await subject.reset()
        if state != RUNNING:
            await subject.go(state)
        size = subject.info.size if state == RESUMING else 16
        write = subject.access.write(subject.info.index, MIGRATION_INFO_DATA_SIZE, _U64.pack(size))
        if await refusal(write) is None:
            seen.append(f"{size} bytes were taken in {name_of(state)}")
    together(seen)


@REGION.rule("stopped-still", "A stopped device does no DMA: without RUNNING in its state.", f"{_INFO}: _RUNNING")
async def stopped_still(subject: MigrationRegionSubject) -> None:
    seen = []
    for state in (STOP, STOP_COPY, RESUMING):
        await subject.reset()
        async with subject.guest() as guest:
            await guest.let_write()
            await subject.go(state)
            if pages := await guest.is_still():
                seen.append(f"in {name_of(state)} it wrote {len(pages)} pages of guest memory")
    together(seen)
