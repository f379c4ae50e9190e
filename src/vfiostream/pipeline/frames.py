"""Frames in and out of a transport: the seam between the protocol, which does no I/O, and the links, which know no
frames.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import anyio

from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost, StreamError, VfiostreamError
from vfiostream.pipeline.budget import Budget, Lease
from vfiostream.protocol import framing, records
from vfiostream.protocol.framing import Prefix
from vfiostream.protocol.payload import Decompressor
from vfiostream.protocol.records import Bitmap, Record
from vfiostream.protocol.sessions import SourceSession, TargetSession
from vfiostream.transports.contract import Transport

log = logging.getLogger("vfiostream.pipeline")

LINGER = 2.0
"""Seconds that a side which gave up goes on reading, so that its last words are not lost to a reset."""


@dataclass(slots=True)
class Incoming:
    """A frame with content, from the source."""

    record: Record
    prefix: Prefix
    lease: Lease
    """The payload (maybe of no bytes), and room in the budget for the content where that is compressed. The loader's to
    release.
    """
    content: Buffer | None = None
    """What the payload stands for; set by whoever decompresses."""

    @property
    def name(self) -> str:
        return records.name_of(self.prefix.type, self.prefix.sequence)


async def _fill(transport: Transport, view: memoryview, where: str, *, at_start: bool = False) -> bool:
    """Receive until ``view`` is full; False where the stream ended instead, which is an error unless ``at_start``."""
    done = 0
    while done < len(view):
        got = await transport.receive(view[done:])
        if got == 0:
            if at_start and done == 0:
                return False
            raise _cut(transport, where, f"is cut: the stream ends after {done} of {len(view)} bytes")
        done += got
    return True


def _cut(transport: Transport, where: str, problem: str) -> Exception:
    """The stream ended: over a link the peer is gone, in a file something is missing."""
    if transport.answers:
        return ConnectionLost(f"{transport.address}: {where} {problem}; the other end is gone")
    return StreamError(where, problem, transport.address)


class FrameReader:
    """Reads the source's frames, each checked and accepted by the session before it is returned."""

    def __init__(self, transport: Transport, session: TargetSession, budget: Budget) -> None:
        self._transport = transport
        self._session = session
        self._budget = budget
        self._prefix = bytearray(framing.PREFIX_SIZE)
        self._decompressor = Decompressor()
        self.transferred = 0
        """Bytes that have come."""

    async def read(self) -> Incoming | None:
        """Return the next frame, or None where the stream ends between frames. Raises
        :class:`~vfiostream.errors.StreamError` for a frame that must not be believed, and the transport's errors.
        """
        if not await _fill(self._transport, memoryview(self._prefix), self._session.next_record, at_start=True):
            return None
        prefix = self._session.parse(self._prefix)
        where = records.name_of(prefix.type, prefix.sequence)
        header = bytearray(prefix.header_size)
        await _fill(self._transport, memoryview(header), where)
        expands = prefix.content_size if prefix.flags == framing.FLAG_ZSTD else 0
        lease = await self._budget.take(prefix.payload_size, expands)
        try:
            await _fill(self._transport, lease.view, where)
            self._session.check(prefix, header, (lease.view,))
            content = None
            if prefix.type == Bitmap.type:
                content = self._decompressor.content(lease.view, prefix.flags, prefix.content_size, where)
            record = self._session.receive(prefix, header, content)
        except BaseException:
            lease.release()
            raise
        self.transferred += prefix.frame_size
        return Incoming(record, prefix, lease, content)

    async def expect_end(self) -> None:
        """The stream must end here; raises :class:`~vfiostream.errors.StreamError`."""
        if await _fill(self._transport, memoryview(self._prefix)[:1], "the end", at_start=True):
            raise StreamError("the stream", "goes on after its COMMIT: the file is damaged", self._transport.address)

    def ended(self) -> Exception:
        """What to raise where :meth:`read` returned None too early."""
        return _cut(self._transport, self._session.next_record, "is missing: the stream ends where it should come")


async def read_reply(transport: Transport, session: SourceSession) -> Record | None:
    """Return the target's next record, or None where the stream ends; errors as :meth:`FrameReader.read`."""
    raw = bytearray(framing.PREFIX_SIZE)
    if not await _fill(transport, memoryview(raw), session.next_record, at_start=True):
        return None
    prefix = session.parse(raw)
    header = bytearray(prefix.header_size)
    await _fill(transport, memoryview(header), records.name_of(prefix.type, prefix.sequence))
    session.check(prefix, header, ())
    return session.receive(prefix, header)


async def part(transport: Transport, last_words: Buffer = b"") -> None:
    """Say ``last_words`` (a frame) and that nothing more comes, then read and forget what still does: a link that is
    closed with unread bytes is reset, and the peer then never reads what we said last. Takes :data:`LINGER` seconds at
    most, and raises nothing: what can't be said is only logged.
    """
    scrap = memoryview(bytearray(64 * 1024))
    with anyio.move_on_after(LINGER):
        try:
            await transport.send([last_words])
            await transport.finish()
            while await transport.receive(scrap):
                pass
        except VfiostreamError as error:
            log.debug("parting from %s: %s", transport.address, error)


class Pace:
    """Spreads bytes over time: at most ``rate`` bytes a second, without saving up for later."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._free_at = -math.inf

    async def wait(self, size: int) -> None:
        """Wait until ``size`` more bytes may go."""
        if self._rate is None:
            return
        now = anyio.current_time()
        if self._free_at > now:
            await anyio.sleep_until(self._free_at)
        self._free_at = max(self._free_at, now) + size / self._rate
