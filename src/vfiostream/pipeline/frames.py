"""Frames in and out of a transport: the seam between the protocol, which does no I/O, and the links, which know no
frames.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost, StreamError, VfiostreamError
from vfiostream.pipeline.budget import Budget, Lease
from vfiostream.protocol import framing, records
from vfiostream.protocol.framing import Prefix
from vfiostream.protocol.payload import Decompressor, Piece, pieces
from vfiostream.protocol.records import Record, RecordType
from vfiostream.protocol.sessions import SourceSession, TargetSession
from vfiostream.transports.contract import Transport

log = logging.getLogger("vfiostream.pipeline")

LOOKAHEAD = 4096
"""Bytes that may come ahead of the frame that is read: some headers' worth, and little to copy where it is payload."""


@dataclass(slots=True, eq=False)
class Incoming:
    """A frame from the source, checked, accepted by the session."""

    record: Record
    prefix: Prefix
    lease: Lease | None = None
    """Its payload (maybe of no bytes), and room in the budget for the content where that is compressed; the loader's to
    release. None where the payload was received in its place.
    """
    pieces: Sequence[Piece] = ()
    """What the payload stands for; of one that is compressed, set by whoever decompresses it."""

    @property
    def name(self) -> str:
        return records.name_of(self.prefix.type, self.prefix.sequence)

    def release(self) -> None:
        """Let go of payload and content."""
        self.pieces = ()
        if self.lease is not None:
            self.lease.release()


async def _fill(transport: Transport, view: memoryview, where: str, *, at_start: bool = False) -> bool:
    """Receive until ``view`` is full; False where the stream ended instead, which is an error unless ``at_start``."""
    done = 0
    while done < len(view):
        got = await transport.receive([view[done:]])
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
    """Reads the source's frames in two steps, so that a payload can be received in its place: :meth:`head`, then
    :meth:`body`. With the end of a payload comes the start of what follows it, in one call.

    May go on without waiting for anything as long as bytes are there: whoever reads in a loop lets others work.
    """

    def __init__(self, transport: Transport, session: TargetSession, budget: Budget) -> None:
        self._transport = transport
        self._session = session
        self._budget = budget
        self._decompressor = Decompressor()
        self._ahead = memoryview(bytearray(LOOKAHEAD))
        self._start = self._end = 0
        """What of ``_ahead`` has come and is not used yet."""
        self.transferred = 0
        """Bytes that have come in whole frames."""

    async def head(self) -> tuple[Prefix, Buffer] | None:
        """Return prefix and header of the next frame, or None where the stream ends between frames. The prefix is
        checked on its own, the header with the body. Raises :class:`~vfiostream.errors.StreamError` for a frame that
        must not be believed, and the transport's errors.
        """
        while self._end - self._start < framing.PREFIX_SIZE:
            if not await self._receive_ahead():
                if self._start == self._end:
                    return None
                raise self._short(self._session.next_record, self._end - self._start, framing.PREFIX_SIZE)
        prefix = self._session.parse(self._take(framing.PREFIX_SIZE))
        header = memoryview(bytearray(prefix.header_size))
        await self._fill(header, prefix)
        return prefix, header

    async def body(self, prefix: Prefix, header: Buffer, place: memoryview) -> Incoming:
        """Receive the payload into ``place``, which is as large as it, and check and accept the frame. Where this
        raises, what is in ``place`` is not to be used. Errors as :meth:`head`.
        """
        await self._fill(place, prefix)
        self._session.check(prefix, header, (place,))
        found: Sequence[Piece] = ()
        bitmap: Buffer | None = None
        if prefix.type == RecordType.BITMAP:
            where = records.name_of(prefix.type, prefix.sequence)
            bitmap = self._decompressor.content(place, prefix.flags, prefix.content_size, where)
            found = [Piece(prefix.content_size, bitmap)]
        elif prefix.flags != framing.FLAG_ZSTD:
            try:
                found = pieces(place, prefix.flags, prefix.content_size)
            except ValueError as error:
                raise StreamError(records.name_of(prefix.type, prefix.sequence), str(error)) from error
        record = self._session.receive(prefix, header, bitmap)
        self.transferred += prefix.frame_size
        return Incoming(record, prefix, pieces=found)

    async def leased_body(self, prefix: Prefix, header: Buffer) -> Incoming:
        """As :meth:`body`, into memory of the budget."""
        expands = prefix.content_size if prefix.flags == framing.FLAG_ZSTD else 0
        lease = await self._budget.take(prefix.payload_size, expands)
        try:
            frame = await self.body(prefix, header, lease.view)
        except BaseException:
            lease.release()
            raise
        frame.lease = lease
        return frame

    async def read(self) -> Incoming | None:
        """Return the next frame, leased, or None where the stream ends between frames. Errors as :meth:`head`."""
        head = await self.head()
        return None if head is None else await self.leased_body(*head)

    async def expect_end(self) -> None:
        """The stream must end here; raises :class:`~vfiostream.errors.StreamError`."""
        if self._start < self._end or await self._receive_ahead():
            raise StreamError("the stream", "goes on after its COMMIT: the file is damaged", self._transport.address)

    def ended(self) -> Exception:
        """What to raise where :meth:`head` or :meth:`read` returned None too early."""
        return _cut(self._transport, self._session.next_record, "is missing: the stream ends where it should come")

    async def _fill(self, place: memoryview, prefix: Prefix) -> None:
        """Fill ``place``, which is for a part of the frame of ``prefix``, with what has come already, then with what
        comes.
        """
        done = min(len(place), self._end - self._start)
        place[:done] = self._take(done)
        while done < len(place):
            # Here nothing is ahead any more.
            got = await self._transport.receive([place[done:], self._ahead], len(place) - done)
            if got == 0:
                raise self._short(records.name_of(prefix.type, prefix.sequence), done, len(place))
            done += got
        if done > len(place):
            self._start, self._end = 0, done - len(place)

    async def _receive_ahead(self) -> bool:
        """Receive more than has come already; False where the stream ends."""
        kept = self._end - self._start
        if self._start:
            self._ahead[:kept] = bytes(self._ahead[self._start : self._end])
            self._start, self._end = 0, kept
        got = await self._transport.receive([self._ahead[kept:]])
        self._end += got
        return got > 0

    def _take(self, count: int) -> memoryview:
        start = self._start
        self._start += count
        return self._ahead[start : self._start]

    def _short(self, where: str, done: int, size: int) -> Exception:
        return _cut(self._transport, where, f"is cut: the stream ends after {done} of {size} bytes")


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


async def part(transport: Transport, last_words: Sequence[Buffer] = ()) -> None:
    """Say ``last_words`` (a frame) and that nothing more comes, then read and forget what still does: a link that is
    closed with unread bytes is reset, and the peer then never reads what we said last. Takes ``transport.linger``
    seconds at most, and raises nothing: what can't be said is only logged.
    """
    scrap = memoryview(bytearray(64 * 1024))
    with anyio.move_on_after(transport.linger):
        try:
            await transport.send(last_words)
            await transport.finish()
            while await transport.receive([scrap]):
                pass
        except VfiostreamError as error:
            log.debug("parting from %s: %s", transport.address, error)
