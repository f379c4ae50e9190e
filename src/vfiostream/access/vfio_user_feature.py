"""Device features over vfio-user: the states of a migration, its data, and the log of DMA.

The messages are those of ``docs/interop/vfio-user.rst`` of QEMU. A feature's data goes in the message, where the kernel
takes pointers; the data of a migration goes by message too, where the kernel gives a file descriptor. No answer
tells whether a state has opened a stream of data, so that follows from the state before, where it is known. What a
device still has to give in PRE_COPY (``VFIO_MIG_GET_PRECOPY_INFO``) has no message.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from vfiostream._accel import bitmap_merge
from vfiostream.access.contract import MigrationData, PrecopyInfo
from vfiostream.access.vfio_user_channel import Channel
from vfiostream.buffers import Buffer
from vfiostream.errors import DeviceBroken, DeviceLost, DeviceRefused, UsageError
from vfiostream.uapi.vfio import (
    DMA_LOGGING_RANGE,
    FEATURE,
    FEATURE_DMA_LOGGING,
    FEATURE_DMA_LOGGING_REPORT,
    FEATURE_MIG_STATE,
    MAX_DMA_LOGGING_RANGES,
    Feature,
    FeatureOperation,
    MigrationState,
)
from vfiostream.uapi.vfio_user import MAX_BODY, MIG_DATA, Command

MAX_WRITE = MAX_BODY - 16
"""Bytes of a migration's data that we send in one message; see MAX_BODY."""
WORD = 8
"""A bitmap is a whole number of words of 8 bytes."""

_PRE_COPY = (MigrationState.PRE_COPY, MigrationState.PRE_COPY_P2P)
_SAVING = (*_PRE_COPY, MigrationState.STOP_COPY)
_WITH_DATA = (*_SAVING, MigrationState.RESUMING)
_UNKNOWN = (errno.EOPNOTSUPP, errno.ENOSYS)
"""With which servers refuse a command, or a feature, that they do not know; beside ENOTTY."""


class Features:
    """What :class:`~vfiostream.access.vfio_user.VfioUserAccess` does by DEVICE_FEATURE and MIG_DATA messages."""

    def __init__(self, channel: Channel, max_transfer: int, timeout: float) -> None:
        """``max_transfer`` is how many bytes of data a reply may carry, a multiple of 8; ``timeout`` that of a call."""
        self._channel = channel
        self._max_transfer = max_transfer
        self._timeout = timeout
        self._saving = False
        """Whether the device is certain to be in a state whose stream goes on in the next states of precopy."""
        self._logging = False
        """Whether we have asked for a log; it may not run, if the call was cancelled or refused."""

    async def do(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        """As :meth:`vfiostream.access.contract.Access.feature`.

        What a server answers to the question whether it has a feature, or to a command that it does not know, differs
        from one to another (EINVAL, EOPNOTSUPP, ENOTTY): all of it becomes ENOTTY.
        """
        what = f"feature {_feature_name(feature)} ({operation.name})"
        if FEATURE.size + len(data) > MAX_BODY:
            raise UsageError(f"{self._channel.name}: {what} with {len(data)} bytes does not fit a message: pass less")
        head, body = bytearray(FEATURE.size), bytearray(size)
        request = FEATURE.pack(FEATURE.size + max(len(data), size), operation | feature)
        try:
            reply = await self._channel.call(
                what,
                Command.DEVICE_FEATURE,
                [request, data],
                [memoryview(head), memoryview(body)],
                timeout=self._timeout,
            )
        except DeviceRefused as refused:
            asks = operation & FeatureOperation.PROBE or feature == Feature.MIGRATION
            if asks or refused.errno in _UNKNOWN:
                raise DeviceRefused(self._channel.name, what, errno.ENOTTY, "it does not have it") from refused
            raise
        if size and reply.size < FEATURE.size + size:
            raise self._broken(f"answered {what} with {reply.size} bytes instead of {FEATURE.size + size}")
        return bytes(body)

    async def set_state(self, state: int) -> MigrationData | None:
        """As :meth:`vfiostream.access.contract.Access.set_migration_state`."""
        goes_on = self._saving and state in _SAVING
        self._saving = False
        await self.do(FeatureOperation.SET, Feature.MIG_DEVICE_STATE, FEATURE_MIG_STATE.pack(state, -1))
        self._saving = state in _PRE_COPY
        opened = state in _WITH_DATA and not goes_on
        return _Data(self._channel, self._max_transfer, self._timeout) if opened else None

    def was_reset(self) -> None:
        """The device is in RUNNING, and a stream that it gives begins."""
        self._saving = False

    # ---- the log of DMA

    async def can_log(self) -> bool:
        needed = (
            (Feature.DMA_LOGGING_START, FeatureOperation.SET),
            (Feature.DMA_LOGGING_STOP, FeatureOperation.SET),
            (Feature.DMA_LOGGING_REPORT, FeatureOperation.GET),
        )
        for feature, operation in needed:
            try:
                await self.do(FeatureOperation.PROBE | operation, feature)
            except DeviceRefused:
                return False
        return True

    async def start_log(self, page_size: int, ranges: Sequence[tuple[int, int]], anew: bool) -> None:
        if len(ranges) > MAX_DMA_LOGGING_RANGES:
            raise UsageError(
                f"{self._channel.name}: a DMA log of {len(ranges)} ranges is too many: merge them into at most "
                f"{MAX_DMA_LOGGING_RANGES}"
            )
        if anew:
            try:  # one that a client before us left behind would be in the way
                await self._stop()
            except DeviceRefused:
                pass  # there is none, or starting says what is wrong
        data = FEATURE_DMA_LOGGING.pack(page_size, len(ranges), 0)
        data += b"".join(DMA_LOGGING_RANGE.pack(*one) for one in ranges)
        self._logging = True
        await self.do(FeatureOperation.SET, Feature.DMA_LOGGING_START, data)

    async def read_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        pages = length // page_size if page_size > 0 else 0
        if pages <= 0 or length % page_size or len(bitmap) != -(-pages // 64) * WORD:
            raise UsageError(
                f"{self._channel.name}: {length:#x} bytes in pages of {page_size} have no bitmap of {len(bitmap)} "
                "bytes: use whole pages, and a word of 8 bytes for each 64"
            )
        most = max(WORD, (self._max_transfer - FEATURE_DMA_LOGGING_REPORT.size) & ~(WORD - 1))
        head = FEATURE_DMA_LOGGING_REPORT.size
        for start in range(0, len(bitmap), most):
            into = bitmap[start : start + most]
            first = start * 8
            count = min(pages - first, len(into) * 8)
            request = FEATURE_DMA_LOGGING_REPORT.pack(iova + first * page_size, count * page_size, page_size)
            reply = await self.do(FeatureOperation.GET, Feature.DMA_LOGGING_REPORT, request, head + len(into))
            found = bytearray(memoryview(reply)[head:])
            if beyond := -count % 64:  # pages that we did not ask for
                last = int.from_bytes(found[-WORD:], "little") & ((1 << 64 - beyond) - 1)
                found[-WORD:] = last.to_bytes(WORD, "little")
            bitmap_merge(into, found)

    async def stop_log(self) -> None:
        if self._logging:
            await self._stop()

    async def _stop(self) -> None:
        await self.do(FeatureOperation.SET, Feature.DMA_LOGGING_STOP)
        self._logging = False

    def _broken(self, problem: str) -> DeviceBroken:
        return _broken(self._channel.name, problem)


class _Data(MigrationData):
    """The stream of data of the state that the device is in."""

    def __init__(self, channel: Channel, max_transfer: int, timeout: float) -> None:
        self._channel = channel
        self._max_transfer = max_transfer
        self._timeout = timeout
        self._closed = False

    async def read_into(self, into: Sequence[memoryview]) -> int:
        self._check()
        piece = into[0][: self._max_transfer]
        if not piece:
            return 0
        what = f"reading {len(piece)} bytes of migration data"
        head = bytearray(MIG_DATA.size)
        request = MIG_DATA.pack(MIG_DATA.size + len(piece), len(piece))
        reply = await self._channel.call(
            what, Command.MIG_DATA_READ, [request], [memoryview(head), piece], timeout=self._timeout
        )
        _argsz, count = MIG_DATA.unpack(head)
        if reply.size < MIG_DATA.size or count > len(piece) or count > reply.size - MIG_DATA.size:
            raise _broken(self._channel.name, f"answered {what} with {count} in a body of {reply.size}")
        return int(count)

    async def write(self, data: Buffer) -> None:
        self._check()
        limit = min(self._max_transfer, MAX_WRITE)
        whole = memoryview(data)
        for start in range(0, len(whole), limit):
            piece = whole[start : start + limit]
            request = MIG_DATA.pack(MIG_DATA.size + len(piece), len(piece))
            await self._channel.call(
                f"writing {len(piece)} bytes of migration data",
                Command.MIG_DATA_WRITE,
                [request, piece],
                timeout=self._timeout,
            )

    async def precopy_info(self) -> PrecopyInfo:
        self._check()
        raise DeviceRefused(
            self._channel.name, "asking what is pending in PRE_COPY", errno.ENOTTY, "vfio-user has no message for it"
        )

    async def aclose(self) -> None:
        self._closed = True

    def _check(self) -> None:
        self._channel.check()
        if self._closed:
            raise DeviceLost(f"{self._channel.name}: this migration's data was closed; set the state again for more")


def _feature_name(feature: int) -> str:
    try:
        return Feature(feature).name
    except ValueError:
        return str(feature)


def _broken(name: str, problem: str) -> DeviceBroken:
    return DeviceBroken(f"{name}: the server {problem}, which makes no sense; see its log")
