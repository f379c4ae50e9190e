"""What goes out from a source: records in line, compressed, within the credit, paced, whole and in order.

The producer takes memory from the byte budget, fills it and puts it in line with its record; the sender gives it back
when it is on its way. Both ends of the line and the compressors beside it run in the source's task group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost
from vfiostream.pipeline.budget import Budget, Lease
from vfiostream.pipeline.frames import LINGER, Pace
from vfiostream.pipeline.progress import Progress
from vfiostream.pipeline.settings import Settings
from vfiostream.protocol import framing
from vfiostream.protocol.payload import Compressor, bound, is_zero
from vfiostream.protocol.records import Bitmap, Record
from vfiostream.protocol.sessions import SourceSession
from vfiostream.transports.contract import Transport

COMPRESSORS = 2
GRACE = 0.5
"""Seconds that a frame which is under way may take to end when everything is called off: a torn one would leave no way
to say why.
"""
_HEADER_ROOM = 256
"""More than the header of any record that costs credit takes."""


@dataclass(slots=True, eq=False)
class Outgoing:
    """A record on its way out."""

    record: Record
    lease: Lease | None = None
    """Its content; given back when it is sent."""
    payload: Buffer = b""
    flags: int = 0
    ready: anyio.Event | None = None
    """Set when it is compressed; None where nothing has to be waited for."""
    sent: anyio.Event = field(default_factory=anyio.Event)


class Outbound:
    """The line of one source."""

    def __init__(self, transport: Transport, session: SourceSession, settings: Settings, progress: Progress) -> None:
        self._transport = transport
        self._session = session
        self._settings = settings
        self._progress = progress
        self._pace = Pace(settings.max_bandwidth)
        self.budget = Budget(settings.budget, settings.chunk)
        self.content = 0
        """Bytes of content that were put in line, but bitmaps."""
        self.whole = True
        """Whether every frame that was made went out whole; if not, the link can't say anything more."""
        self.waiting = False
        """Whether it is the other end that has to do something now: give credit, or take a frame."""
        self.moved_at = 0.0
        """When the other end last did something, or was last given something to do."""
        self._in_flight: anyio.CancelScope | None = None
        self._send_until = math.inf
        """When a frame that is under way is given up; set when everything is called off, or done."""
        self._credit = anyio.Event()
        self._unsent: MemoryObjectSendStream[Outgoing]
        self._to_send: MemoryObjectReceiveStream[Outgoing]
        self._unsent, self._to_send = anyio.create_memory_object_stream[Outgoing](math.inf)
        self._raw: MemoryObjectSendStream[Outgoing]
        self._to_compress: MemoryObjectReceiveStream[Outgoing]
        self._raw, self._to_compress = anyio.create_memory_object_stream[Outgoing](math.inf)

    @property
    def compresses(self) -> bool:
        """Whether both ends agreed to compress; known after the greeting."""
        return bool(self._settings.compression) and "zstd" in self._session.features

    async def take(self, size: int) -> Lease:
        """Memory for ``size`` bytes of content; waits until the budget has it."""
        return await self.budget.take(size, bound(size) if self.compresses else 0)

    def put(self, record: Record, lease: Lease | None = None) -> Outgoing:
        """Put a record in line; the lease with its content is the line's from here on."""
        item = Outgoing(record, lease)
        if lease is not None:
            item.payload = lease.view
            if not isinstance(record, Bitmap):
                self.content += len(lease.view)
                self._progress.content = self.content
                self._progress.round_content += len(lease.view)
                if is_zero(lease.view):
                    item.payload, item.flags = b"", framing.FLAG_ZERO
                elif self.compresses:
                    item.ready = anyio.Event()
                    self._raw.send_nowait(item)
        self._unsent.send_nowait(item)
        return item

    async def compress_all(self) -> None:
        """A task, one of :data:`COMPRESSORS`: compress what is in line."""
        compressor = Compressor(self._settings.compression)
        async for item in self._to_compress:
            packed = await anyio.to_thread.run_sync(compressor.compress, item.payload)
            if packed is not None:
                item.payload, item.flags = packed, framing.FLAG_ZSTD
            assert item.ready is not None
            item.ready.set()

    async def send_all(self) -> None:
        """A task: send what is in line, as far as credit and bandwidth go."""
        async for item in self._to_send:
            if item.ready is not None:
                await item.ready.wait()
            size = framing.PREFIX_SIZE + _HEADER_ROOM + len(item.payload)
            await self._pace.wait(size)
            self.moved_at = anyio.current_time()
            self.waiting = True
            while not self._session.affords(size):
                self._credit = anyio.Event()
                await self._credit.wait()
            await self._send_whole(self._framed(item))
            self.moved_at = anyio.current_time()
            self.waiting = False
            item.payload = b""
            if item.lease is not None:
                item.lease.release()
            item.sent.set()

    def _framed(self, item: Outgoing) -> tuple[bytes, Buffer]:
        content = item.lease.view if item.lease is not None else b""
        bitmap = content if isinstance(item.record, Bitmap) else None
        return self._session.send(item.record, item.payload, flags=item.flags, content_size=len(content), bitmap=bitmap)

    async def _send_whole(self, buffers: Sequence[Buffer]) -> None:
        try:
            with anyio.CancelScope(shield=True, deadline=self._send_until) as self._in_flight:
                await self.hand_over(buffers)
            if self._in_flight.cancelled_caught:
                await anyio.sleep_forever()  # Called off: this task is about to be cancelled.
        except ConnectionLost:
            # The target may have said why before it closed: the listener finds that, and cancels this.
            with anyio.move_on_after(LINGER if self._transport.answers else 0):
                await anyio.sleep_forever()
            raise
        finally:
            self._in_flight = None

    async def hand_over(self, buffers: Sequence[Buffer]) -> None:
        """Send a frame that the session has made, past the line."""
        self.whole = False
        await self._transport.send(buffers)
        self.whole = True
        self._progress.transferred += sum(map(len, buffers))

    def credit_came(self) -> None:
        """The target may have given credit."""
        self.moved_at = anyio.current_time()
        self._credit.set()

    def call_off(self) -> None:
        """Nothing more is to be sent but what is under way now, for :data:`GRACE` seconds."""
        self._send_until = anyio.current_time() + GRACE
        if self._in_flight is not None:
            self._in_flight.deadline = self._send_until

    def close(self) -> None:
        """Let go of what is still in line."""
        for stream in (self._unsent, self._to_send, self._raw, self._to_compress):
            stream.close()
