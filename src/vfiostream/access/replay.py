"""A device that is a record of one: it answers what the recorded device answered, as long as it is asked the same.

The same questions in the same order. Everything else is a :class:`~vfiostream.errors.ReplayDiverged` that names the
event, and leaves it the next one. What may differ:

- How a transfer of more than ``SMALL`` bytes is cut: pieces that follow each other in a region, or in the data of a
  migration, are answered from as many recorded ones as they need. The cut is the user's choice, not the device's. What
  is not read of the data of a migration, as a round ended earlier for that, is read first in the next.
- How often a region is described, and when data and access are closed: nothing hangs on that.
- What is written in larger transfers, where the record does not hold it: only its length is compared.

Where the record was made without payloads, larger transfers read zeros: sizes, states, order and errors are the
device's, this content is made up. So whatever comes of it says that it does (:attr:`ReplayAccess.caveat`). Guest memory
is mapped by word only: nobody writes it.

A call that has no answer in the record (it was cancelled, or its process was killed) is a
:class:`~vfiostream.errors.DeviceTimeout`, and whatever is asked after the last event a
:class:`~vfiostream.errors.DeviceLost`. Answers come at once, however long the device took. The file is read by the
event loop's thread, as it is needed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import anyio.lowlevel

from vfiostream import errors
from vfiostream._accel import bitmap_merge, copy
from vfiostream.access.contract import Access, DeviceInfo, MappedArea, MigrationData, PrecopyInfo, RegionInfo
from vfiostream.access.record import SMALL, pieces_of_log
from vfiostream.access.record_format import CALLS, Answer, Bulk, Call, Event, Failed, Reader, bulk_of, describe
from vfiostream.buffers import Buffer
from vfiostream.errors import (
    DeviceBroken,
    DeviceError,
    DeviceLost,
    DeviceRefused,
    DeviceTimeout,
    ReplayDiverged,
    UsageError,
)
from vfiostream.uapi.vfio import FeatureOperation

MAX_UNREAD = 16 * 1024 * 1024
"""Bytes of the data of a migration that may be left for later: more than one read is large."""

_UNASKED = ("close", "close_data")
"""Recorded for people: a replay does not ask for them."""


def open_record(path: Path) -> BinaryIO:
    """Open the file of a record; raises :class:`~vfiostream.errors.UsageError` where that can't be done."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"the record {path} can't be opened: {why}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path} is no file, so no record either; give one that was made with --record")
    return os.fdopen(fd, "rb", buffering=1 << 20)


def open_replay(path: Path) -> ReplayAccess:
    """The device of the record in ``path``. Raises :class:`~vfiostream.errors.UsageError` where that is no record, and
    what was raised when the recorded device could not be opened.
    """
    file = open_record(path)
    try:
        return ReplayAccess(path, file)
    except BaseException:
        file.close()
        raise


class _Tape:
    """The events of a record, from the one that comes next."""

    def __init__(self, name: str, path: Path, file: BinaryIO) -> None:
        self.name = name
        self._file = file
        try:
            self._reader = Reader(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} can't be replayed: {error}; give one that was made with --record") from error
        self._event: Event | None = None
        self._number = 0
        self._done = 0
        """Bytes of the event that were transferred already."""
        self._recorded_name = ""
        self._damage: Exception | None = None
        self._unread: dict[int, deque[Bulk]] = {}
        """Of the data of each migration, what was read earlier when it was recorded."""

    def open(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The first event: arguments, and result."""
        event = self._next()
        if event is None:
            raise DeviceLost(f"{self.name}: the record ends before the device was opened; make another")
        self._recorded_name = event.call.arguments["address"]
        return event.call.arguments, self._answer(event).result

    def close(self) -> None:
        self._file.close()

    def ask(self, what: str, **arguments: Any) -> Answer:
        """The answer to a question that is no transfer; raises what was raised."""
        event = self._next_but_reads()
        if event is None or event.call.what != what or event.call.arguments != arguments or self._done:
            raise self._diverged(event, describe(what, arguments, None))
        return self._answer(event)

    def read(self, into: memoryview, region: int, offset: int) -> None:
        """Answer a read of a region, cut as it may be."""
        done = 0
        while done < len(into):
            rest = into[done:]
            event = self._transfer("read", {"region": region, "offset": offset + done}, rest, continues=done > 0)
            done += self._fill(rest, event)

    def write(self, data: Buffer, what: str, place: Mapping[str, int]) -> None:
        """Take what is written to a region, or to the data of a migration."""
        whole = memoryview(data)
        done = 0
        while done < len(whole):
            rest = whole[done:]
            asked = {name: value + done if name == "offset" else value for name, value in place.items()}
            event = self._transfer(what, asked, rest, continues=done > 0)
            bulk = event.call.bulk
            assert bulk is not None
            count = min(len(rest), bulk.size - self._done)
            if bulk.data is not None and memoryview(bulk.data)[self._done : self._done + count] != rest[:count]:
                raise self._diverged(event, _transferred(what, asked, rest))
            if _failure(event) is not None:
                self._answer(event)
            self._advance(count, bulk.size, event)
            done += count

    def read_data(self, into: memoryview, data: int) -> int:
        """Answer a read of the data of a migration: what one recorded read gave, or as much of it as there is room
        for.
        """
        if unread := self._unread.get(data):
            bulk = unread.popleft()
            count = min(len(into), bulk.size)
            _give(into[:count], bulk, 0)
            if count < bulk.size:
                unread.appendleft(_rest(bulk, count))
            return count
        event = self._next()
        if event is None or event.call.what != "read_data" or event.call.arguments["data"] != data:
            raise self._diverged(event, _transferred("read_data", {"data": data}, into))
        return self._fill(into, event)

    def _transfer(self, what: str, asked: Mapping[str, int], rest: memoryview, *, continues: bool) -> Event:
        """The event that a transfer, or ``rest`` of it, begins with."""
        event = self._next_but_reads()
        if event is None or event.call.what != what:
            raise self._diverged(event, _transferred(what, asked, rest))
        recorded = dict(event.call.arguments)
        size = recorded.pop("size") if event.call.bulk is None else event.call.bulk.size
        if "offset" in recorded:
            recorded["offset"] += self._done
        may_be_cut = continues or size > SMALL or what == "write_data"
        if recorded != asked or not (may_be_cut or size == len(rest)):
            raise self._diverged(event, _transferred(what, asked, rest))
        return event

    def _fill(self, into: memoryview, event: Event) -> int:
        """Put what the event read, from where it was left off, in ``into``; returns how many bytes."""
        if _failure(event) is not None:
            self._answer(event)
        assert event.answer is not None
        bulk = _bulk(event.answer)
        count = min(len(into), bulk.size - self._done)
        _give(into[:count], bulk, self._done)
        self._advance(count, bulk.size, event)
        return count

    def _advance(self, count: int, size: int, event: Event) -> None:
        self._done += count
        if self._done == size:
            self._answer(event)

    def _next(self) -> Event | None:
        """The event that comes next; it stays that until :meth:`_answer`."""
        while self._event is None or self._event.call.what in _UNASKED:
            if self._damage is None:
                try:
                    self._event = self._reader.next()
                except (OSError, ValueError) as error:
                    self._damage = error
            if self._damage is not None:
                raise DeviceBroken(f"{self.name} can't be replayed any further: {self._damage}") from self._damage
            if self._event is None:
                return None
            self._number = self._event.call.number
        return self._event

    def _next_but_reads(self) -> Event | None:
        """The event that comes next when no data of a migration is read; what was read then is kept for later."""
        while (event := self._next()) is not None and event.call.what == "read_data":
            failure = _failure(event)
            if isinstance(failure, Failed) and failure.errno == errno.ENOMSG:
                pass  # there was nothing more for then, and that is not so later
            elif failure is None and event.answer is not None:
                rest = _rest(_bulk(event.answer), self._done)
                unread = self._unread.setdefault(event.call.arguments["data"], deque())
                if sum(bulk.size for bulk in unread) + rest.size > MAX_UNREAD:
                    break
                if rest.size:
                    unread.append(rest)
            else:
                break
            self._event = None
            self._done = 0
        return event

    def _answer(self, event: Event) -> Answer:
        """Let ``event`` be over; raises what was raised."""
        self._event = None
        self._done = 0
        failure = _failure(event)
        if failure is None:
            assert event.answer is not None
            return event.answer
        if isinstance(failure, str):
            raise DeviceTimeout(
                f"{self.name}: event {event.call.number} of the record has no answer ({failure}): {_what(event.call)}"
            )
        if failure.kind == "DeviceRefused":
            assert failure.errno is not None
            assert failure.operation is not None
            raise DeviceRefused(self.name, failure.operation, failure.errno, failure.hint or "")
        raised: type[DeviceError | UsageError] = getattr(errors, failure.kind)
        text = failure.message
        raise raised(text.replace(self._recorded_name, self.name, 1) if self._recorded_name else text)

    def _diverged(self, event: Event | None, asked: str) -> DeviceError:
        if event is None:
            where = "in the middle of what follows" if self._reader.is_cut else "after"
            return DeviceLost(f"{self.name}: the record ends {where} event {self._number}, and it was asked to {asked}")
        part = f", of which {self._done} bytes are done" if self._done else ""
        return ReplayDiverged(
            f"{self.name}: it was asked to {asked}, where event {event.call.number} of the record is to "
            f"{_what(event.call)}{part}; use it just as the device was used that was recorded"
        )


def _give(into: memoryview, bulk: Bulk, start: int) -> None:
    """Fill ``into`` with what is in ``bulk`` from ``start`` on, or with zeros where its bytes are not known."""
    if bulk.data is None:
        into[:] = bytes(len(into))
    else:
        copy(into, memoryview(bulk.data)[start : start + len(into)])


def _rest(bulk: Bulk, start: int) -> Bulk:
    """What is in ``bulk`` from ``start`` on; its digest is that of all."""
    return Bulk(bulk.size - start, bulk.digest, None if bulk.data is None else memoryview(bulk.data)[start:])


def _what(call: Call) -> str:
    return describe(call.what, call.arguments, call.bulk)


def _transferred(what: str, asked: Mapping[str, int], rest: memoryview) -> str:
    if CALLS[what].writes:
        return describe(what, asked, bulk_of(rest, keep=True))
    return describe(what, {**asked, "size": len(rest)}, None)


def _failure(event: Event) -> Failed | str | None:
    """How a call failed: with an error, or with no answer at all, for this reason."""
    if event.answer is None:
        return "the record ends before it"
    failed = event.answer.failed
    if failed is not None and failed.kind == "cancelled":
        return "it was cancelled"
    if failed is not None and failed.kind == "other":
        return f"it failed with {failed.message}"
    return failed


def _bulk(answer: Answer) -> Bulk:
    assert answer.bulk is not None  # of a transfer that did not fail; the reader looks after that
    return answer.bulk


class ReplayAccess(Access):
    """The device of a record; made by :func:`open_replay`."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name = f"replay:{path}"
        self._tape = _Tape(self.name, path, file)
        asked, info = self._tape.open()
        self.info = DeviceInfo(**info)
        self._caveat = f"{self.name} is a record of {asked['address']} and no device"
        if not asked["payloads"]:
            self._caveat += f", made without payloads: what it gave in more than {SMALL} bytes is zeros here"
        self._regions: dict[int, RegionInfo] = {}
        self._is_closed = False

    @property
    def caveat(self) -> str | None:
        return self._caveat

    async def region_info(self, index: int) -> RegionInfo:
        await self.check()
        if index not in self._regions:
            info = self._tape.ask("region_info", region=index).result
            self._regions[index] = RegionInfo(index, **{**info, "mappable": ()})
        return self._regions[index]

    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        await self.check()
        self._tape.read(into, index, offset)

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        await self.check()
        self._tape.write(data, "write", {"region": index, "offset": offset})

    async def map(self, info: RegionInfo) -> Sequence[MappedArea]:
        await self.check()
        return ()

    async def dma_map(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
        await self.check()
        self._tape.ask("dma_map", iova=iova, length=length, writable=writable)

    async def dma_unmap(self, iova: int, length: int) -> None:
        await self.check()
        self._tape.ask("dma_unmap", iova=iova, length=length)

    async def reset(self) -> None:
        await self.check()
        self._tape.ask("reset")

    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        await self.check()
        asked = {"operation": int(operation), "feature": int(feature), "data": bytes(data), "size": size}
        answer: bytes = self._tape.ask("feature", **asked).result["data"]
        return answer

    async def set_migration_state(self, state: int) -> MigrationData | None:
        await self.check()
        data = self._tape.ask("set_migration_state", state=int(state)).result["data"]
        return None if data is None else ReplayData(self, self._tape, data)

    async def can_log_dma(self) -> bool:
        await self.check()
        answer: bool = self._tape.ask("can_log_dma").result["can"]
        return answer

    async def start_dma_log(self, page_size: int, ranges: Sequence[tuple[int, int]], *, anew: bool = True) -> None:
        await self.check()
        self._tape.ask("start_dma_log", page_size=page_size, ranges=[list(pair) for pair in ranges])

    async def read_dma_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        await self.check()
        for at, count, into in pieces_of_log(iova, length, page_size, bitmap):
            answer = self._tape.ask("read_dma_log", iova=at, length=count, page_size=page_size)
            found = _bulk(answer)
            if found.size != len(into):
                raise DeviceBroken(f"{self.name}: the record has {found.size} bytes of a bitmap of {len(into)}")
            if found.data is not None:
                bitmap_merge(into, found.data)

    async def stop_dma_log(self) -> None:
        await self.check()
        self._tape.ask("stop_dma_log")

    async def version(self) -> str | None:
        await self.check()
        answer: str | None = self._tape.ask("version").result["version"]
        return answer

    async def accepts_version(self, version: str) -> bool:
        await self.check()
        answer: bool = self._tape.ask("accepts_version", version=version).result["accepts"]
        return answer

    async def aclose(self) -> None:
        self._is_closed = True
        self._tape.close()

    async def check(self) -> None:
        """Let others run, as a device would; raises DeviceLost once this is closed."""
        await anyio.lowlevel.checkpoint()
        if self._is_closed:
            raise DeviceLost(f"{self.name}: the access was closed; open it again")


class ReplayData(MigrationData):
    """Data number ``number`` of the migration in a record."""

    def __init__(self, access: ReplayAccess, tape: _Tape, number: int) -> None:
        self._access = access
        self._tape = tape
        self._number = number

    async def read_into(self, into: Sequence[memoryview]) -> int:
        await self._access.check()
        return self._tape.read_data(into[0], self._number)

    async def write(self, data: Buffer) -> None:
        await self._access.check()
        self._tape.write(data, "write_data", {"data": self._number})

    async def precopy_info(self) -> PrecopyInfo:
        await self._access.check()
        return PrecopyInfo(**self._tape.ask("precopy_info", data=self._number).result)

    async def aclose(self) -> None:
        """Nothing is held here."""
