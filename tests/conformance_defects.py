"""For each rule of conformance a driver that breaks it and no other: the reference device with one thing wrong.

A defect stands between the rules and the device (:class:`Defective`), or is in the driver itself (a patch).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import pytest

from tests.between import Between, DataBetween
from vfiostream.access.contract import Access, MigrationData, PrecopyInfo, RegionInfo
from vfiostream.buffers import Buffer
from vfiostream.conformance.subject import PAGE, bits
from vfiostream.errors import DeviceLost, DeviceRefused
from vfiostream.uapi.four_region import NATURAL, Action, State as FourState
from vfiostream.uapi.vfio import (
    MIGRATION_INFO_DATA_OFFSET,
    MIGRATION_INFO_DATA_SIZE,
    MIGRATION_INFO_DEVICE_STATE,
    MIGRATION_INFO_PENDING_BYTES,
    Feature,
    FeatureOperation,
    MigrationState,
)
from vfiostream.vendor import stream
from vfiostream.vendor.capture import CONFIG_MAGIC
from vfiostream.vendor.device import ReferenceDevice

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = MigrationState
CONTROL, CONFIG, BITMAP, VERSION = 9, 10, 12, 13
REGION = 9
"""The migration region."""
INVERTED_MAGIC = bytes(byte ^ 0xFF for byte in stream.MAGIC)

Patch = Callable[[pytest.MonkeyPatch], None]
T = TypeVar("T", type["Defective"], Patch)


class HookedData(DataBetween):
    between: Defective

    async def read_into(self, into: Sequence[memoryview]) -> int:
        return await self.between.read_data(self.data, into[0])

    async def write(self, data: Buffer) -> None:
        await self.between.write_data(self.data, bytes(data))

    async def precopy_info(self) -> PrecopyInfo:
        return await self.between.told(self.data)


class Defective(Between):
    """An access to ``device``; what is wrong with it is what a subclass overrides."""

    def __init__(self, access: Access, device: ReferenceDevice) -> None:
        super().__init__(access)
        self.device = device

    @property
    def state(self) -> int:
        return self.device.state

    def refusal(self, number: int = errno.EINVAL) -> DeviceRefused:
        return DeviceRefused(self.name, "what the defect is about", number)

    async def set_migration_state(self, state: int) -> MigrationData | None:
        data = await self.access.set_migration_state(state)
        return None if data is None else HookedData(self, data)

    async def read_data(self, data: MigrationData, into: memoryview) -> int:
        return await data.read_into([into])

    async def write_data(self, data: MigrationData, piece: bytes) -> None:
        await data.write(piece)

    async def told(self, data: MigrationData) -> PrecopyInfo:
        return await data.precopy_info()


class Defects:
    """The defects of one interface, by the rule that each breaks."""

    def __init__(self) -> None:
        self.accesses: dict[str, type[Defective]] = {}
        self.patches: dict[str, Patch] = {}

    def breaks(self, rule: str) -> Callable[[T], T]:
        def add(defect: T) -> T:
            assert rule not in self.rules
            if isinstance(defect, type):
                self.accesses[rule] = defect
            else:
                self.patches[rule] = defect
            return defect

        return add

    @property
    def rules(self) -> set[str]:
        return {*self.accesses, *self.patches}


STATES, REGIONS, FOUR = Defects(), Defects(), Defects()
ALL = {"migration-states": STATES, "migration-region": REGIONS, "four-region": FOUR}


# ---- migration states


@STATES.breaks("flags")
class UnknownFlag(Defective):
    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        answer = await super().feature(operation, feature, data, size)
        if feature == Feature.MIGRATION and answer:
            return bytes((answer[0] | 0x20, *answer[1:]))
        return answer


@STATES.breaks("state-told")
class StateWithDescriptor(Defective):
    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        answer = await super().feature(operation, feature, data, size)
        return answer[:4] + b"\x05\0\0\0" if feature == Feature.MIG_DEVICE_STATE else answer


@STATES.breaks("changes-permitted")
class NoWayFromStop(Defective):
    async def set_migration_state(self, state: int) -> MigrationData | None:
        if (self.state, state) == (STOP, PRE_COPY_P2P):
            raise self.refusal()
        return await super().set_migration_state(state)


@STATES.breaks("changes-refused")
class TakesWhatIsNoState(Defective):
    async def set_migration_state(self, state: int) -> MigrationData | None:
        return None if state == 99 else await super().set_migration_state(state)


@STATES.breaks("error-refused")
class TakesError(Defective):
    async def set_migration_state(self, state: int) -> MigrationData | None:
        return None if state == ERROR else await super().set_migration_state(state)


class SaysItHasNoReset(Defective):
    def __init__(self, access: Access, device: ReferenceDevice) -> None:
        super().__init__(access, device)
        self.info = replace(self.info, can_reset=False)


for defects in ALL.values():
    defects.breaks("reset-told")(SaysItHasNoReset)


@STATES.breaks("reset")
class ResetLeavesQuiet(Defective):
    async def reset(self) -> None:
        before = self.state
        await super().reset()
        if before == PRE_COPY_P2P:
            await self.access.set_migration_state(RUNNING_P2P)


@STATES.breaks("stopped-still")
class WritesWhileItLoads(Defective):
    async def set_migration_state(self, state: int) -> MigrationData | None:
        data = await super().set_migration_state(state)
        if state == RESUMING:
            self.device.workload.run(True)
        return data


@STATES.breaks("data-opened")
class OpensAgainAtTheStop(Defective):
    last: MigrationData

    async def set_migration_state(self, state: int) -> MigrationData | None:
        before = self.state
        data = await super().set_migration_state(state)
        if data is not None:
            self.last = data
        return self.last if (before, state) == (PRE_COPY, STOP_COPY) else data


@STATES.breaks("data-one-way")
class TakesDataWhileItSaves(Defective):
    async def write_data(self, data: MigrationData, piece: bytes) -> None:
        if self.state != STOP_COPY:
            await super().write_data(data, piece)


@STATES.breaks("data-left-saving")
class EndsWhatWasLeft(Defective):
    async def read_data(self, data: MigrationData, into: memoryview) -> int:
        return 0 if self.state in (STOP, RUNNING) else await super().read_data(data, into)


@STATES.breaks("data-left-loading")
class TakesDataAfterTheLoad(Defective):
    async def write_data(self, data: MigrationData, piece: bytes) -> None:
        if self.state != STOP:
            await super().write_data(data, piece)


@STATES.breaks("closed-in-session")
class GivesDataWhenClosed(Defective):
    async def read_data(self, data: MigrationData, into: memoryview) -> int:
        return len(into) if self.closed else await super().read_data(data, into)


@STATES.breaks("precopy-end")
class NoMessageIsZero(Defective):
    async def read_data(self, data: MigrationData, into: memoryview) -> int:
        try:
            return await super().read_data(data, into)
        except DeviceRefused as refused:
            if refused.errno == errno.ENOMSG:
                return 0
            raise


@STATES.breaks("stop-copy-end")
class NoMessageBehindTheEnd(Defective):
    ended = False

    async def read_data(self, data: MigrationData, into: memoryview) -> int:
        count = await super().read_data(data, into)
        if not count and self.state == STOP_COPY:
            if self.ended:
                raise self.refusal(errno.ENOMSG)
            self.ended = True
        return count


@STATES.breaks("precopy-goes-on")
class LosesBytesAtTheStop(Defective):
    loses = False

    async def set_migration_state(self, state: int) -> MigrationData | None:
        self.loses = self.state == PRE_COPY and state == STOP_COPY
        return await super().set_migration_state(state)

    async def read_data(self, data: MigrationData, into: memoryview) -> int:
        if self.loses:
            self.loses = False
            await super().read_data(data, into[:1])
        return await super().read_data(data, into)


@STATES.breaks("read-sizes")
class LosesOneInSeven(Defective):
    async def read_data(self, data: MigrationData, into: memoryview) -> int:
        count = await super().read_data(data, into)
        return count - 1 if len(into) == 7 and count > 1 else count


@STATES.breaks("write-sizes")
class TakesNoThree(Defective):
    async def write_data(self, data: MigrationData, piece: bytes) -> None:
        if len(piece) == 3:
            raise self.refusal()
        await super().write_data(data, piece)


@STATES.breaks("data-size-states")
class NoSizeWhileItSaves(Defective):
    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        if feature == Feature.MIG_DATA_SIZE and self.state == STOP_COPY:
            raise self.refusal(errno.EBUSY)
        return await super().feature(operation, feature, data, size)


@STATES.breaks("data-size-told")
class TellsThriceTheSize(Defective):
    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        answer = await super().feature(operation, feature, data, size)
        if feature == Feature.MIG_DATA_SIZE:
            return struct.pack("<Q", 3 * struct.unpack("<Q", answer)[0])
        return answer


@STATES.breaks("precopy-info")
class TellsNothingWhileQuiet(Defective):
    async def told(self, data: MigrationData) -> PrecopyInfo:
        if self.state == PRE_COPY_P2P:
            raise self.refusal()
        return await super().told(data)


@STATES.breaks("precopy-info-refused")
class TellsWhenStopped(Defective):
    async def told(self, data: MigrationData) -> PrecopyInfo:
        return PrecopyInfo(False, 0, 0) if self.state == STOP_COPY else await super().told(data)


@STATES.breaks("precopy-told")
class TellsTheSameAllTheTime(Defective):
    async def told(self, data: MigrationData) -> PrecopyInfo:
        await super().told(data)
        return PrecopyInfo(False, 100_000, 0)


@STATES.breaks("precopy-reinit")
class BeginsAgainUnasked(Defective):
    async def told(self, data: MigrationData) -> PrecopyInfo:
        return (await super().told(data))._replace(reinit=True)


# ---- streams


@STATES.breaks("stream-short")
class TakesNothingForAStream(Defective):
    written = 0

    async def set_migration_state(self, state: int) -> MigrationData | None:
        try:
            data = await super().set_migration_state(state)
        except DeviceRefused:
            if self.state == RESUMING and state == STOP and not self.written:
                return None
            raise
        self.written = 0
        return data

    async def write_data(self, data: MigrationData, piece: bytes) -> None:
        self.written += len(piece)
        await super().write_data(data, piece)


@STATES.breaks("stream-long")
def passes_over_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    take = stream.Incoming._take

    def patched(self: stream.Incoming, data: memoryview) -> memoryview:
        return data[len(data) :] if self._content is not None else take(self, data)

    monkeypatch.setattr(stream.Incoming, "_take", patched)


@STATES.breaks("stream-head")
def looks_at_no_magic(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = stream.parse_block_head
    monkeypatch.setattr(stream, "parse_block_head", lambda data: parse(stream.MAGIC + bytes(data[8:])))


@STATES.breaks("stream-order")
class TakesWhatStartsAnywhere(Defective):
    first = True
    ignores = False

    async def set_migration_state(self, state: int) -> MigrationData | None:
        if self.ignores and state == STOP:
            return None
        self.first, self.ignores = True, False
        return await super().set_migration_state(state)

    async def write_data(self, data: MigrationData, piece: bytes) -> None:
        if self.first and self.state == RESUMING and len(piece) >= 8:
            self.ignores = piece[:8] not in (stream.MAGIC, INVERTED_MAGIC)
        self.first = False
        if not self.ignores:
            await super().write_data(data, piece)


@STATES.breaks("stream-body")
class DiesOfDamage(Defective):
    async def write_data(self, data: MigrationData, piece: bytes) -> None:
        try:
            await super().write_data(data, piece)
        except DeviceRefused as refused:
            if refused.errno == errno.EBADMSG:
                raise DeviceLost(f"{self.name}: it has died") from refused
            raise


@STATES.breaks("stream-refused")
class ForgetsWhatItRefused(Defective):
    has_refused = False

    async def set_migration_state(self, state: int) -> MigrationData | None:
        if self.has_refused and self.state == RESUMING and state == STOP:
            return None
        self.has_refused = False
        return await super().set_migration_state(state)

    async def write_data(self, data: MigrationData, piece: bytes) -> None:
        try:
            await super().write_data(data, piece)
        except DeviceRefused:
            self.has_refused = True
            raise


@STATES.breaks("stream-refused-state")
class RunsAfterARefusal(Defective):
    async def set_migration_state(self, state: int) -> MigrationData | None:
        try:
            return await super().set_migration_state(state)
        except DeviceRefused:
            if self.state == RESUMING and state == STOP:
                await self.access.reset()
            raise


# ---- log of DMA

Ranges = Sequence[tuple[int, int]]


@STATES.breaks("log-misaligned")
class RoundsRanges(Defective):
    async def start_dma_log(self, page_size: int, ranges: Ranges, *, anew: bool = True) -> None:
        rounded = [(iova & -PAGE, -(-length // PAGE) * PAGE) for iova, length in ranges]
        await super().start_dma_log(page_size, rounded, anew=anew)


@STATES.breaks("log-overlapping")
class MergesRanges(Defective):
    async def start_dma_log(self, page_size: int, ranges: Ranges, *, anew: bool = True) -> None:
        try:
            await super().start_dma_log(page_size, ranges, anew=anew)
        except DeviceRefused:
            if len(ranges) != 2:
                raise
            await super().start_dma_log(page_size, ranges[:1], anew=anew)


@STATES.breaks("log-ranges")
class HasRoomForFew(Defective):
    async def start_dma_log(self, page_size: int, ranges: Ranges, *, anew: bool = True) -> None:
        if len(ranges) == 256:
            raise self.refusal(errno.ENOSPC)
        await super().start_dma_log(page_size, ranges, anew=anew)


@STATES.breaks("log-too-many")
class TakesMoreThanItLogs(Defective):
    async def start_dma_log(self, page_size: int, ranges: Ranges, *, anew: bool = True) -> None:
        if len(ranges) <= 256:
            await super().start_dma_log(page_size, ranges, anew=anew)


@STATES.breaks("log-twice")
class StartsAgain(Defective):
    async def start_dma_log(self, page_size: int, ranges: Ranges, *, anew: bool = True) -> None:
        await super().start_dma_log(page_size, ranges)


@STATES.breaks("log-off")
class ReportsWithoutLog(Defective):
    async def read_dma_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        with suppress(DeviceRefused):
            await super().read_dma_log(iova, length, page_size, bitmap)


@STATES.breaks("log-kept-bits")
class ClearsTheBitmap(Defective):
    async def read_dma_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        bitmap[:] = bytes(len(bitmap))
        await super().read_dma_log(iova, length, page_size, bitmap)


@STATES.breaks("log-page-sizes")
class ReportsSmallPagesOnly(Defective):
    async def read_dma_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        if page_size != PAGE:
            raise self.refusal()
        await super().read_dma_log(iova, length, page_size, bitmap)


@STATES.breaks("log-complete")
class MissesAPage(Defective):
    async def read_dma_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        before = bits(bitmap)
        await super().read_dma_log(iova, length, page_size, bitmap)
        for bit in sorted(bits(bitmap) - before)[:1]:
            bitmap[bit // 8] &= ~(1 << bit % 8)


@STATES.breaks("log-clears")
class ReportsAgain(Defective):
    reported = b""

    async def read_dma_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        await super().read_dma_log(iova, length, page_size, bitmap)
        if len(self.reported) == len(bitmap):
            bitmap[:] = bytes(one | other for one, other in zip(self.reported, bitmap, strict=True))
        self.reported = bytes(bitmap)


for rule in [one for one in STATES.rules if one.startswith("log-")]:
    REGIONS.breaks(rule)(STATES.accesses[rule])


# ---- migration region


class DefectiveRegion(Defective):
    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        await super().read_into(index, offset, into)
        if index == REGION and offset < 32:
            size = len(into)
            value = await self.got(offset, int.from_bytes(into, "little"))
            into[:] = value.to_bytes(size, "little")

    async def got(self, field: int, value: int) -> int:
        """A field was read; returns what is told of it."""
        return value

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        if index == REGION and offset < 32:
            await self.put(offset, int.from_bytes(bytes(data), "little"), data)
        else:
            await super().write(index, offset, data)

    async def put(self, field: int, value: int, data: Buffer) -> None:
        """A field is to be written."""
        await self.access.write(REGION, field, data)

    async def go(self, state: int) -> None:
        await self.access.write(REGION, MIGRATION_INFO_DEVICE_STATE, struct.pack("<I", state))


@REGIONS.breaks("region")
class HeaderCanBeMapped(Defective):
    async def region_info(self, index: int) -> RegionInfo:
        info = await super().region_info(index)
        return replace(info, mappable=((0, info.size),)) if index == REGION else info


@REGIONS.breaks("state-start")
class ResetStopsIt(DefectiveRegion):
    async def reset(self) -> None:
        before = self.state
        await super().reset()
        if before == 1:
            await self.go(0)


@REGIONS.breaks("changes-permitted")
class NoWayBackFromPreCopy(DefectiveRegion):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field == MIGRATION_INFO_DEVICE_STATE and (self.state, value) == (3, 1):
            raise self.refusal()
        await super().put(field, value, data)


@REGIONS.breaks("states-refused")
class TakesInvalidStates(DefectiveRegion):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field != MIGRATION_INFO_DEVICE_STATE or value != 5:
            await super().put(field, value, data)


@REGIONS.breaks("reset")
class ResetLeavesSaving(DefectiveRegion):
    async def reset(self) -> None:
        before = self.state
        await super().reset()
        if before == 3:
            await self.go(0)


@REGIONS.breaks("pending-place")
class OffersTheHeader(DefectiveRegion):
    async def got(self, field: int, value: int) -> int:
        return 8 if field == MIGRATION_INFO_DATA_OFFSET and self.state == 3 else value


@REGIONS.breaks("pending-again")
class CountsReads(DefectiveRegion):
    last = 0

    async def got(self, field: int, value: int) -> int:
        again = self.last == field == MIGRATION_INFO_PENDING_BYTES
        self.last = field
        return value + 1 if again and value else value


@REGIONS.breaks("pending-end")
class IsNeverDone(DefectiveRegion):
    async def got(self, field: int, value: int) -> int:
        return 1 if field == MIGRATION_INFO_PENDING_BYTES and self.state == 2 and not value else value


@REGIONS.breaks("load")
class StaysStoppedAfterTheLoad(DefectiveRegion):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        before = self.state
        await super().put(field, value, data)
        if field == MIGRATION_INFO_DEVICE_STATE and (before, value) == (4, 1):
            await self.go(0)


@REGIONS.breaks("precopy-goes-on")
class LosesASegmentAtTheStop(DefectiveRegion):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        before = self.state
        await super().put(field, value, data)
        if field == MIGRATION_INFO_DEVICE_STATE and (before, value) == (3, 2):
            for offset in (MIGRATION_INFO_PENDING_BYTES, MIGRATION_INFO_DATA_OFFSET, MIGRATION_INFO_PENDING_BYTES):
                await self.access.read_into(REGION, offset, memoryview(bytearray(8)))


@REGIONS.breaks("data-size-refused")
class TakesDataWhenStopped(DefectiveRegion):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field != MIGRATION_INFO_DATA_SIZE or self.state != 0:
            await super().put(field, value, data)


@REGIONS.breaks("stopped-still")
class WritesInResuming(DefectiveRegion):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        await super().put(field, value, data)
        if field == MIGRATION_INFO_DEVICE_STATE and value == 4:
            self.device.workload.run(True)


# ---- streams, through the migration region


class DefectiveLoad(DefectiveRegion):
    """Sees what is loaded: pieces as they are taken, and the end."""

    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field == MIGRATION_INFO_DATA_SIZE and self.state == 4:
            piece = bytearray(value)
            await self.access.read_into(REGION, PAGE, memoryview(piece))
            await self.piece(bytes(piece), data)
        elif field == MIGRATION_INFO_DEVICE_STATE and self.state == 4 and value == 1:
            await self.end(data)
        else:
            if field == MIGRATION_INFO_DEVICE_STATE and value == 4:
                self.begin()
            await super().put(field, value, data)

    def begin(self) -> None:
        """A load begins."""

    async def piece(self, piece: bytes, data: Buffer) -> None:
        await self.access.write(REGION, MIGRATION_INFO_DATA_SIZE, data)

    async def end(self, data: Buffer) -> None:
        await self.access.write(REGION, MIGRATION_INFO_DEVICE_STATE, data)


@REGIONS.breaks("stream-short")
class RegionTakesNothingForAStream(DefectiveLoad):
    written = 0

    def begin(self) -> None:
        self.written = 0

    async def piece(self, piece: bytes, data: Buffer) -> None:
        self.written += len(piece)
        await super().piece(piece, data)

    async def end(self, data: Buffer) -> None:
        if self.written:
            await super().end(data)


for rule in ("stream-long", "stream-head"):
    REGIONS.breaks(rule)(STATES.patches[rule])


@REGIONS.breaks("stream-order")
class RegionTakesWhatStartsAnywhere(DefectiveLoad):
    first = True
    ignores = False

    def begin(self) -> None:
        self.first, self.ignores = True, False

    async def piece(self, piece: bytes, data: Buffer) -> None:
        if self.first and len(piece) >= 8 and piece[:8] not in (stream.MAGIC, INVERTED_MAGIC):
            self.ignores = True
        self.first = False
        if not self.ignores:
            await super().piece(piece, data)

    async def end(self, data: Buffer) -> None:
        if not self.ignores:
            await super().end(data)


@REGIONS.breaks("stream-body")
class RegionDiesOfDamage(DefectiveLoad):
    async def piece(self, piece: bytes, data: Buffer) -> None:
        try:
            await super().piece(piece, data)
        except DeviceRefused as refused:
            if refused.errno == errno.EBADMSG:
                raise DeviceLost(f"{self.name}: it has died") from refused
            raise


@REGIONS.breaks("stream-refused")
class RegionForgetsWhatItRefused(DefectiveLoad):
    has_refused = False

    def begin(self) -> None:
        self.has_refused = False

    async def piece(self, piece: bytes, data: Buffer) -> None:
        try:
            await super().piece(piece, data)
        except DeviceRefused:
            self.has_refused = True
            raise

    async def end(self, data: Buffer) -> None:
        if not self.has_refused:
            await super().end(data)


@REGIONS.breaks("stream-refused-state")
class RegionRunsAfterARefusal(DefectiveLoad):
    async def end(self, data: Buffer) -> None:
        try:
            await super().end(data)
        except DeviceRefused:
            await self.access.reset()
            raise


# ---- four regions


class DefectiveControl(Defective):
    """Sees fields of the control region (natural layout)."""

    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        await super().read_into(index, offset, into)
        if index == CONTROL:
            size = len(into)
            value = await self.got(offset, int.from_bytes(into, "little"))
            into[:] = value.to_bytes(size, "little")

    async def got(self, field: int, value: int) -> int:
        """A field was read; returns what is told of it."""
        return value

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        if index == CONTROL:
            await self.put(offset, int.from_bytes(bytes(data), "little"), data)
        else:
            await super().write(index, offset, data)

    async def put(self, field: int, value: int, data: Buffer) -> None:
        """A field is to be written (the 16 bytes of a range as one number)."""
        await self.access.write(CONTROL, field, data)

    async def go(self, state: FourState) -> None:
        await self.access.write(CONTROL, NATURAL.device_state, struct.pack("<I", state))

    async def region_bytes(self, index: int, count: int) -> bytes:
        into = bytearray(count)
        await self.access.read_into(index, 0, memoryview(into))
        return bytes(into)


@FOUR.breaks("regions")
class ControlCanBeMapped(Defective):
    async def region_info(self, index: int) -> RegionInfo:
        info = await super().region_info(index)
        return replace(info, mappable=((0, info.size),)) if index == CONTROL else info


@FOUR.breaks("version")
class IsOfVersionTwo(DefectiveControl):
    async def got(self, field: int, value: int) -> int:
        return 2 if field == NATURAL.version else value


@FOUR.breaks("caps")
class HasUnknownCaps(DefectiveControl):
    async def got(self, field: int, value: int) -> int:
        return value | 8 if field == NATURAL.caps else value


@FOUR.breaks("version-string")
class TakesAnyVersion(DefectiveControl):
    async def write(self, index: int, offset: int, data: Buffer) -> None:
        if index != VERSION:
            await super().write(index, offset, data)


@FOUR.breaks("changes-permitted")
class KeepsLogging(DefectiveControl):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field == NATURAL.device_state and (self.state, value) == (FourState.STOP_LOGGING, FourState.STOP):
            raise self.refusal()
        await super().put(field, value, data)


@FOUR.breaks("states-refused")
class TakesAFifthState(DefectiveControl):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field != NATURAL.device_state or value != 4:
            await super().put(field, value, data)


@FOUR.breaks("reset")
class ResetLeavesStop(DefectiveControl):
    async def reset(self) -> None:
        before = self.state
        await super().reset()
        if before == FourState.STOP:
            await self.go(FourState.STOP)


@FOUR.breaks("config-size")
class ConfigGrows(DefectiveControl):
    async def got(self, field: int, value: int) -> int:
        grows = field == NATURAL.config_size and self.state == FourState.RUNNING_LOGGING
        return value + (1 << 20) if grows else value


@FOUR.breaks("config-too-large")
class TakesAnyConfig(DefectiveControl):
    too_large = False

    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field == NATURAL.config_size:
            self.too_large = value > PAGE
        if not (self.too_large and field in (NATURAL.config_size, NATURAL.config_action)):
            await super().put(field, value, data)


@FOUR.breaks("actions-refused")
class TakesAnyAction(DefectiveControl):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field != NATURAL.memory_action or value != 99:
            await super().put(field, value, data)


@FOUR.breaks("size-captures")
class CapturesLessAndLess(DefectiveControl):
    captures = 0

    async def got(self, field: int, value: int) -> int:
        if field == NATURAL.memory_size and self.state == FourState.STOP:
            self.captures += 1
            return value if self.captures == 1 else value - PAGE
        return value

    async def reset(self) -> None:
        self.captures = 0
        await super().reset()


@FOUR.breaks("unfetched-kept")
class ForgetsWhatWasNotFetched(DefectiveControl):
    fetched = True

    async def got(self, field: int, value: int) -> int:
        if field == NATURAL.memory_size:
            value, self.fetched = value if self.fetched else 0, False
        return value

    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field == NATURAL.memory_action:
            self.fetched = True
        await super().put(field, value, data)


@FOUR.breaks("chunk-positions")
class GivesFromAnywhere(DefectiveControl):
    pos = 0

    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field == NATURAL.memory_pos:
            self.pos = value
        if self.pos != 1 or field != NATURAL.memory_action:
            await super().put(field, value, data)


@FOUR.breaks("region-untouched")
class ScribblesInTheRegion(DefectiveControl):
    async def got(self, field: int, value: int) -> int:
        if field == NATURAL.version:
            await self.access.write(CONFIG, 17, b"scribbled")
        return value


@FOUR.breaks("load")
class StaysStopped(DefectiveControl):
    loaded = False

    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field == NATURAL.device_state and value == FourState.RUNNING and self.loaded:
            raise self.refusal()
        await super().put(field, value, data)
        if field == NATURAL.config_action and value == Action.SET_BUFFER:
            self.loaded = True

    async def reset(self) -> None:
        self.loaded = False
        await super().reset()


@FOUR.breaks("load-stop-only")
class TakesConfigUnderLogging(DefectiveControl):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        sets = field == NATURAL.config_size or (field == NATURAL.config_action and value == Action.SET_BUFFER)
        if not sets or self.state != FourState.STOP_LOGGING:
            await super().put(field, value, data)


@FOUR.breaks("load-too-large")
class TakesAnySize(DefectiveControl):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field != NATURAL.memory_size or value < 1 << 60:
            await super().put(field, value, data)


@FOUR.breaks("load-positions")
class TakesChunksFromAnywhere(DefectiveControl):
    pos = 0

    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field == NATURAL.memory_pos:
            self.pos = value
        if self.pos < 1 << 60 or field != NATURAL.memory_action or value != Action.SET_BUFFER:
            await super().put(field, value, data)


class TakesBadConfig(DefectiveControl):
    """Takes a config that the device refuses in STOP, and runs on without it, if it begins ``well``."""

    well: bool

    async def put(self, field: int, value: int, data: Buffer) -> None:
        try:
            await super().put(field, value, data)
        except DeviceRefused:
            sets = field == NATURAL.config_action and value == Action.SET_BUFFER
            begins_well = await self.region_bytes(CONFIG, len(CONFIG_MAGIC)) == CONFIG_MAGIC
            if not sets or self.state != FourState.STOP or begins_well is not self.well:
                raise
            await self.access.reset()


@FOUR.breaks("load-short")
class TakesConfigBeforeMemory(TakesBadConfig):
    well = True


@FOUR.breaks("load-config-damaged")
class TakesDamagedConfig(TakesBadConfig):
    well = False


@FOUR.breaks("bitmap-forms")
class TakesRangesInOne(DefectiveControl):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field == NATURAL.page_nr:
            raise self.refusal()
        await super().put(field, value, data)


class DefectiveBitmap(DefectiveControl):
    """Changes what is told of dirty pages."""

    async def put(self, field: int, value: int, data: Buffer) -> None:
        await super().put(field, value, data)
        if field == NATURAL.start_addr and len(data) == 16:
            size = (value >> 64) // 8
            told = self.retold(await self.region_bytes(BITMAP, size))
            await self.access.write(BITMAP, 0, told)

    def retold(self, told: bytes) -> bytes:
        raise NotImplementedError


@FOUR.breaks("bitmap-too-large")
class TakesLargeBitmaps(DefectiveControl):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        if field != NATURAL.start_addr or len(data) < 16 or value >> 64 < 1 << 40:
            await super().put(field, value, data)


@FOUR.breaks("bitmap-empty")
class TellsWithoutLogging(DefectiveBitmap):
    def retold(self, told: bytes) -> bytes:
        return told if FourState(self.state).logging else b"\xff" * len(told)


@FOUR.breaks("bitmap-complete")
class TellsAPageTooFew(DefectiveBitmap):
    def retold(self, told: bytes) -> bytes:
        first = min(bits(told), default=0)
        return bytes(byte & ~(1 << first % 8) if at == first // 8 else byte for at, byte in enumerate(told))


@FOUR.breaks("bitmap-clears")
class TellsTwice(DefectiveBitmap):
    before = b""

    def retold(self, told: bytes) -> bytes:
        if len(self.before) == len(told):
            told = bytes(one | other for one, other in zip(self.before, told, strict=True))
        self.before = told
        return told


@FOUR.breaks("stopped-still")
class WritesWhenStopped(DefectiveControl):
    async def put(self, field: int, value: int, data: Buffer) -> None:
        await super().put(field, value, data)
        if field == NATURAL.device_state and value == FourState.STOP:
            self.device.workload.run(True)
