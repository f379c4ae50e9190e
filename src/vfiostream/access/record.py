"""A record of what a device was asked and what it answered, made while somebody uses it.

Decisions:

- A recorded access maps no region: what goes through a mapping is not seen here. Its regions say that they can't be
  mapped, so that everything is read and written by calls, each of which is in the record. That is complete, and the
  driver sees the same operations; it costs the speed of mappings (``docs/record.md``).
- Of what is transferred, length and digest are recorded; the bytes only with ``payloads``. Always whole are transfers
  of at most :data:`SMALL` bytes (registers) and those of :data:`KEPT` regions, without which nobody could replay it.
- Each entry is written with one call and not synchronised: it outlives this process, not the machine. The file is
  written by the event loop's thread, so a disk that blocks holds it up.
- A file that can't be written on (a full disk) does not end what is recorded: the record ends there, and
  :attr:`RecordedAccess.caveat` says so.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import anyio

from vfiostream._accel import bitmap_merge
from vfiostream.access.contract import Access, MappedArea, MigrationData, PrecopyInfo, RegionInfo
from vfiostream.access.record_format import (
    KINDS,
    MAX_PAYLOAD,
    MAX_TEXT,
    Answer,
    Bulk,
    Call,
    Failed,
    bulk_of,
    encode,
    start as file_start,
)
from vfiostream.buffers import Buffer
from vfiostream.errors import DeviceRefused, UsageError
from vfiostream.uapi.four_region import VERSION_SUBTYPE
from vfiostream.uapi.vfio import PCI_CONFIG_REGION, REGION_TYPE_PCI_VENDOR, FeatureOperation
from vfiostream.version import SOFTWARE

logger = logging.getLogger("vfiostream.access")

SMALL = 64
"""Bytes of a transfer that is always recorded whole."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What is to be recorded, and where."""

    path: Path
    """A new file, readable by its owner only: what a device holds may be secret."""
    payloads: bool = False
    """Whether the bytes of larger transfers are recorded, too."""


@dataclass(slots=True)
class _Asked:
    """A call that is under way, for whoever makes it to put the answer in."""

    result: dict[str, Any]
    read: Bulk | None = None


class Recorder:
    """The file of a record; made by :meth:`create`."""

    def __init__(self, fd: int, recording: Recording) -> None:
        self.problem: str | None = None
        """Why the record ends before what is recorded does."""
        self.payloads = recording.payloads
        self._path = recording.path
        self._fd = fd
        self._began = time.monotonic_ns()
        self._entries = 0
        self._calls = 0

    @classmethod
    def create(cls, recording: Recording) -> Recorder:
        """Make the file; raises :class:`~vfiostream.errors.UsageError` where that can't be done, or it is there."""
        try:
            fd = os.open(recording.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"no record can be made in {recording.path}: {why}; name a new file") from error
        made = cls(fd, recording)
        made._write(file_start())
        return made

    @contextmanager
    def asked(self, what: str, written: Bulk | None = None, /, **arguments: Any) -> Iterator[_Asked]:
        """Record a call, which is made within, and its answer or error."""
        asked_at = time.monotonic_ns()
        self._calls += 1
        call = Call(self._calls, (asked_at - self._began) // 1000, what, arguments, written)
        self._put(call)
        answer = _Asked({})
        try:
            yield answer
        except BaseException as error:
            self._put((call, Answer(_since(asked_at), {}, None, _failed(error))))
            raise
        self._put((call, Answer(_since(asked_at), answer.result, answer.read, None)))

    def close(self) -> None:
        """Let go of the file; may be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                os.close(fd)
            except OSError as error:  # of a file system that keeps for then what it could not write
                self._give_up(error.strerror or str(error))

    def _put(self, entry: Call | tuple[Call, Answer]) -> None:
        if self._fd < 0:
            return
        self._entries += 1
        try:
            entries = encode(self._entries, entry)
        except ValueError as error:
            self._give_up(f"event {self._calls} can't be put down: {error}")
        else:
            self._write(*entries)

    def _write(self, *pieces: Buffer) -> None:
        rest = [memoryview(piece) for piece in pieces if piece]
        try:
            while rest:
                done = os.writev(self._fd, rest)
                while rest and done >= len(rest[0]):
                    done -= len(rest.pop(0))
                if rest:
                    rest[0] = rest[0][done:]
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def _give_up(self, why: str) -> None:
        self.problem = f"the record in {self._path} is not whole: it ends before event {self._calls} ({why})"
        logger.warning("%s", self.problem)
        self.close()


def _since(then: int) -> int:
    return (time.monotonic_ns() - then) // 1000


def _text(text: str) -> str:
    """``text`` as it can be recorded: paths may hold what is no UTF-8, and nothing bounds a message."""
    return text.encode(errors="replace")[:MAX_TEXT].decode(errors="ignore")


def _failed(error: BaseException) -> Failed:
    kind = type(error).__name__
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return Failed("cancelled", "cancelled", None, None, None)
    if kind not in KINDS:
        return Failed("other", _text(f"{kind}: {error}"), None, None, None)
    message = _text(str(error))
    if isinstance(error, DeviceRefused):
        return Failed(kind, message, error.errno, _text(error.operation), _text(error.hint))
    return Failed(kind, message, None, None, None)


class RecordedAccess(Access):
    """``access``, with all that goes through it put down by ``recorder``. Both belong to it."""

    def __init__(self, access: Access, recorder: Recorder) -> None:
        self.name = access.name
        self.info = access.info
        self._access = access
        self._recorder = recorder
        self._regions: dict[int, RegionInfo] = {}
        self._kept: set[int] = {PCI_CONFIG_REGION} if access.info.is_pci else set()
        """Regions whose content is always recorded."""
        self._data = 0
        """How often the driver has opened data of a migration."""

    @property
    def caveat(self) -> str | None:
        return self._recorder.problem or self._access.caveat

    async def region_info(self, index: int) -> RegionInfo:
        if index not in self._regions:
            with self._recorder.asked("region_info", region=index) as answer:
                info = await self._access.region_info(index)
                answer.result = {
                    "size": info.size,
                    "readable": info.readable,
                    "writable": info.writable,
                    "type": info.type,
                    "subtype": info.subtype,
                    "mappable": info.mappable,
                }
            if (info.type or 0) & REGION_TYPE_PCI_VENDOR and info.subtype == VERSION_SUBTYPE:
                self._kept.add(index)  # the version string of a device
            self._regions[index] = replace(info, mappable=())
        return self._regions[index]

    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        for at in range(0, len(into), MAX_PAYLOAD):
            piece = into[at : at + MAX_PAYLOAD]
            with self._recorder.asked("read", region=index, offset=offset + at, size=len(piece)) as answer:
                await self._access.read_into(index, offset + at, piece)
                answer.read = self._bulk(piece, index)

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        whole = memoryview(data)
        for at in range(0, len(whole), MAX_PAYLOAD):
            piece = whole[at : at + MAX_PAYLOAD]
            with self._recorder.asked("write", self._bulk(piece, index), region=index, offset=offset + at):
                await self._access.write(index, offset + at, piece)

    async def map(self, info: RegionInfo) -> Sequence[MappedArea]:
        return ()

    async def dma_map(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
        with self._recorder.asked("dma_map", iova=iova, length=length, writable=writable):
            await self._access.dma_map(iova, length, fd, offset, writable=writable)

    async def dma_unmap(self, iova: int, length: int) -> None:
        with self._recorder.asked("dma_unmap", iova=iova, length=length):
            await self._access.dma_unmap(iova, length)

    async def reset(self) -> None:
        with self._recorder.asked("reset"):
            await self._access.reset()

    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        asked = {"operation": int(operation), "feature": int(feature), "data": data, "size": size}
        with self._recorder.asked("feature", **asked) as answer:
            got = await self._access.feature(operation, feature, data, size)
            answer.result = {"data": got}
        return got

    async def set_migration_state(self, state: int) -> MigrationData | None:
        with self._recorder.asked("set_migration_state", state=int(state)) as answer:
            data = await self._access.set_migration_state(state)
            if data is None:
                answer.result = {"data": None}
                return None
            self._data += 1
            answer.result = {"data": self._data}
        return RecordedData(data, self._data, self._recorder)

    async def can_log_dma(self) -> bool:
        with self._recorder.asked("can_log_dma") as answer:
            can = await self._access.can_log_dma()
            answer.result = {"can": can}
        return can

    async def start_dma_log(self, page_size: int, ranges: Sequence[tuple[int, int]], *, anew: bool = True) -> None:
        with self._recorder.asked("start_dma_log", page_size=page_size, ranges=[list(pair) for pair in ranges]):
            # Not in the record: who moves a device always begins anew.
            await self._access.start_dma_log(page_size, ranges, anew=anew)

    async def read_dma_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        for at, count, into in pieces_of_log(iova, length, page_size, bitmap):
            found = memoryview(bytearray(len(into)))  # what the device adds, apart from what was there
            with self._recorder.asked("read_dma_log", iova=at, length=count, page_size=page_size) as answer:
                await self._access.read_dma_log(at, count, page_size, found)
                answer.read = bulk_of(found, keep=self._recorder.payloads or len(found) <= SMALL)
            bitmap_merge(into, found)

    async def stop_dma_log(self) -> None:
        with self._recorder.asked("stop_dma_log"):
            await self._access.stop_dma_log()

    async def version(self) -> str | None:
        with self._recorder.asked("version") as answer:
            version = await self._access.version()
            answer.result = {"version": version}
        return version

    async def accepts_version(self, version: str) -> bool:
        with self._recorder.asked("accepts_version", version=version) as answer:
            accepts = await self._access.accepts_version(version)
            answer.result = {"accepts": accepts}
        return accepts

    async def aclose(self) -> None:
        try:
            with self._recorder.asked("close"):
                await self._access.aclose()
        finally:
            self._recorder.close()

    def _bulk(self, data: Buffer, index: int) -> Bulk:
        return bulk_of(data, keep=self._recorder.payloads or len(data) <= SMALL or index in self._kept)


class RecordedData(MigrationData):
    """Data number ``number`` of a migration, recorded. Its bytes are the device's state, however few they are."""

    def __init__(self, data: MigrationData, number: int, recorder: Recorder) -> None:
        self._inner = data
        self._number = number
        self._recorder = recorder
        self._closed = False

    async def read_into(self, into: Sequence[memoryview]) -> int:
        piece = into[0][:MAX_PAYLOAD]
        with self._recorder.asked("read_data", data=self._number, size=len(piece)) as answer:
            count = await self._inner.read_into([piece])
            answer.read = bulk_of(piece[:count], keep=self._recorder.payloads)
        return count

    async def write(self, data: Buffer) -> None:
        whole = memoryview(data)
        for at in range(0, len(whole), MAX_PAYLOAD):
            piece = whole[at : at + MAX_PAYLOAD]
            with self._recorder.asked("write_data", bulk_of(piece, keep=self._recorder.payloads), data=self._number):
                await self._inner.write(piece)

    async def precopy_info(self) -> PrecopyInfo:
        with self._recorder.asked("precopy_info", data=self._number) as answer:
            info = await self._inner.precopy_info()
            answer.result = info._asdict()
        return info

    async def aclose(self) -> None:
        if self._closed:
            await self._inner.aclose()
            return
        self._closed = True
        with self._recorder.asked("close_data", data=self._number):
            await self._inner.aclose()


def pieces_of_log(iova: int, length: int, page_size: int, bitmap: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """(IOVA, length, bitmap) of the calls that a log of DMA is read with, none larger than can be recorded."""
    step = MAX_PAYLOAD * 8 * page_size
    for done in range(0, length, step):
        at = done // page_size // 8
        yield iova + done, min(step, length - done), bitmap[at : at + MAX_PAYLOAD]


async def recorded(address: str, recording: Recording, open_it: Callable[[], Awaitable[Access]]) -> RecordedAccess:
    """Open the device at ``address`` with ``open_it`` and record it, from this call on: that it can't be opened is in
    the record, too. Raises what ``open_it`` raises, and :class:`~vfiostream.errors.UsageError` where the file can't be
    made; no file is left after one of these.
    """
    recorder = Recorder.create(recording)
    now = time.time_ns() // 1000
    try:
        with recorder.asked(
            "open", address=_text(address), software=SOFTWARE, started=now, payloads=recording.payloads
        ) as answer:
            access = await open_it()
            answer.result = asdict(access.info)
    except BaseException as error:
        recorder.close()
        if isinstance(error, UsageError):
            recording.path.unlink(missing_ok=True)
        raise
    return RecordedAccess(access, recorder)
