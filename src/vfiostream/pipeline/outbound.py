"""What goes out from a source: records in line, compressed, within the credit, paced, whole, each stream in its turn.

Content goes from where it lies if it can stay there until it is sent; else it is copied into memory of the byte budget,
which the sender gives back when it is on its way. Where a copy is made:

- guest memory: it changes while it is read, and what is checked has to be what is sent;
- what is compressed: the driver need not wait for that;
- a device's memory where driver and link are both slow: the driver then collects what is next meanwhile. It costs the
  copy, so it is done where the faster of the two takes longer than that (:data:`WORTH_A_COPY`).

The sender and the compressors run in the source's task group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter

import anyio
import anyio.lowlevel

from vfiostream import _accel
from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost
from vfiostream.pipeline.adaptive import Adaptive, Choice, Choices, Fixed
from vfiostream.pipeline.bandwidth import Pace, Pieces
from vfiostream.pipeline.budget import Budget, Lease
from vfiostream.pipeline.progress import Progress
from vfiostream.pipeline.settings import Settings
from vfiostream.pipeline.turns import Turns
from vfiostream.pipeline.workers import Workers, threads
from vfiostream.protocol import framing
from vfiostream.protocol.payload import Compressor, bound, shrunk
from vfiostream.protocol.records import Bitmap, Capture, Config, Memory, Pages, Pci, Record
from vfiostream.protocol.sessions import SourceSession
from vfiostream.transports.contract import Transport

GRACE = 0.5
"""Seconds that a frame which is under way may take to end when everything is called off: a torn one would leave no way
to say why.
"""
WORTH_A_COPY = 0.15e-9
"""Seconds a byte: about twice what copying takes (``docs/performance.md``)."""
CAUGHT_UP = 2
"""Records in line."""
_HEADER_ROOM = 256
"""More than the header of any record that costs credit takes."""


@dataclass(slots=True, eq=False)
class Outgoing:
    """A record on its way out."""

    record: Record
    payload: Sequence[Buffer] = ()
    """In pieces."""
    content_size: int = 0
    flags: int = 0
    check: int | None = None
    """Of header and payload, if it is known."""
    lease: Lease | None = None
    """Where its content lies; given back when it is sent."""
    choice: Choice | None = None
    """What was to be done with its content; None for what is not asked about."""
    in_place: bool = False
    """Whether who put it in line waits until it is sent."""
    packing: bool = False
    """Whether a compressor still has it."""
    awaited: float = 0.0
    """Seconds that the sender waited for the compressor."""
    sent: bool = False


class Cost:
    """Seconds that a byte takes somewhere, of late; 0 until that is known."""

    _KEPT = 0.97
    """Of what was seen before, at each addition."""

    def __init__(self) -> None:
        self._size = self._seconds = 0.0

    def add(self, size: int, seconds: float) -> None:
        self._size = self._KEPT * self._size + size
        self._seconds = self._KEPT * self._seconds + seconds

    @property
    def per_byte(self) -> float:
        return self._seconds / self._size if self._size else 0.0


class Outbound:
    """The line of one source."""

    def __init__(
        self,
        transport: Transport,
        session: SourceSession,
        settings: Settings,
        progress: Progress,
        *,
        several: bool = False,
    ) -> None:
        """``several`` says that more than one device puts in line what it has."""
        self._transport = transport
        self._session = session
        self._settings = settings
        self._progress = progress
        self._several = several
        self.pace = Pace(settings.bandwidth)
        self.budget = Budget(settings.budget - transport.keeps, settings.chunk)
        self.compressors = Workers(Compressor, threads())
        self._choices: Choices | None = None
        self.content = 0
        """Bytes of content that were put in line, but bitmaps."""
        self.whole = True
        """Whether every frame that was made went out whole; if not, the link can't say anything more."""
        self.waiting = False
        """Whether it is the other end that has to do something now: give credit, or take a frame."""
        self.moved_at = 0.0
        """When the other end last did something, or was last given something to do; as :func:`time.monotonic`, which
        costs a tenth of asking the event loop.
        """
        self.driver = Cost()
        """What collecting device memory takes the driver."""
        self._link = Cost()
        """What sending takes, in a limited bandwidth too."""
        self._packing = 0
        """Records in line that compressors still have."""
        self._turns: Turns[Outgoing] = Turns()
        self._current: Outgoing | None = None
        """The one that is being sent; it is in line still."""
        self._news = anyio.Event()
        """Set when the sender may have something to do."""
        self._shorter = anyio.Event()
        """Set when the line has got shorter."""
        self._sending = anyio.CancelScope(shield=True)
        """Around the sender. What is under way is sent whole whoever is cancelled: only :meth:`call_off` ends it."""
        self._off = False

    @property
    def compresses(self) -> bool:
        """Whether both ends agreed that content may be compressed; known after the greeting."""
        return bool(self._settings.compression) and "zstd" in self._session.features

    @property
    def choices(self) -> Choices:
        """Who says what is compressed, and how; known after the greeting."""
        if self._choices is None:
            wanted = self._settings.compression if self.compresses else None
            self._choices = Adaptive(self.compressors.count) if wanted == "adaptive" else Fixed(wanted)
        return self._choices

    # ---- in line

    def put(self, record: Record) -> None:
        """Put a record without content in line."""
        self._append(Outgoing(record))

    async def take(self, size: int, *, gives_way: bool = True) -> Lease:
        """Memory for ``size`` bytes of content; waits until the budget has it."""
        return await self.budget.take(size, bound(size) if self.compresses else 0, gives_way=gives_way)

    def take_left_over(self, size: int) -> Lease | None:
        """The same where the budget has it left over; None where not."""
        return self.budget.take_left_over(size, bound(size) if self.compresses else 0)

    def put_bitmap(self, record: Bitmap, lease: Lease) -> None:
        """Put a bitmap in line; the lease is the line's from here on."""
        self._append(Outgoing(record, (lease.view,), len(lease.view), lease=lease))

    def put_copied(
        self, record: Memory | Pages | Config | Pci, lease: Lease, check: int | None, choice: Choice | None = None
    ) -> None:
        """Put content in line that was copied to ``lease``, which is the line's from here on. ``check`` is the check
        value of header and content; None where the content is zeros. ``choice`` is what was chosen for it, if it was.
        """
        size = len(lease.view)
        self._count(size)
        if check is None:
            lease.release()
            if choice is not None:
                self.choices.unused(choice)
            self._append(Outgoing(record, (), size, framing.FLAG_ZERO))
            return
        self._put_leased(Outgoing(record, (lease.view,), size, 0, check, lease, choice or self.choices.choose(size)))

    def put_read(self, record: Memory | Config, lease: Lease) -> None:
        """Put content in line that a driver wrote to ``lease``, which is the line's from here on."""
        if _accel.is_zero(lease.view):
            self.put_copied(record, lease, None)
            return
        size = len(lease.view)
        self._count(size)
        self._put_leased(Outgoing(record, (lease.view,), size, 0, None, lease, self.choices.choose(size)))

    def _put_leased(self, item: Outgoing) -> None:
        assert item.lease is not None
        assert item.choice is not None
        if item.choice.level is not None:
            item.packing = True
            self._packing += 1
            self.compressors.submit(partial(_compress, item.lease.view, item.choice), partial(self._packed, item))
        else:
            self._shrink(item, item.lease.view)
        self._append(item)

    async def carry(self, record: Memory | Config | Pci, content: memoryview) -> None:
        """Send ``content`` from where it lies, or copy it. Returns when its place is not needed any more."""
        choice = self.choices.choose(len(content))
        if choice.level is not None or min(self.driver.per_byte, self._link.per_byte) > WORTH_A_COPY:
            # The region is emptied in one go: then the driver collects what is next while this is sent.
            # Not where others would then get no turn to put anything in line.
            lease = await self.take(len(content), gives_way=self._several)
            self.put_copied(record, lease, _accel.copy_check(lease.view, content, *self._session.head(record)), choice)
            return
        self._count(len(content))
        item = Outgoing(record, (content,), len(content), choice=choice)
        self._shrink(item, content)
        if item.flags == framing.FLAG_ZERO:
            item.choice = None
            self.choices.unused(choice)
        self._append(item)
        item.in_place = True
        while not item.sent:
            await self._change()

    async def flushed(self) -> None:
        """Wait until everything that was put in line is sent."""
        await self._shorter_than(1)

    async def caught_up(self) -> None:
        """Wait until the sender has all but caught up. What is copied just before it is sent is still in the
        processor's cache then. Not while content is compressed: the compressors are to have more.
        """
        if self.choices.is_raw or not self._packing:
            await self._shorter_than(CAUGHT_UP)

    async def _shorter_than(self, length: int) -> None:
        while len(self._turns) + (self._current is not None) >= length:
            await self._change()

    async def _change(self) -> None:
        """Wait until the line has got shorter, or a compressor has had what is in it."""
        if self._shorter.is_set():
            self._shorter = anyio.Event()
        await self._shorter.wait()

    def _shrink(self, item: Outgoing, content: memoryview) -> None:
        """Leave zeros out."""
        if not isinstance(item.record, Memory | Pages):
            return
        flags, payload = shrunk(content)
        if flags == framing.FLAG_ZERO or (flags and "sparse" in self._session.features):
            item.flags, item.payload, item.check = flags, payload, None

    def _append(self, item: Outgoing) -> None:
        self._turns.put(item, _stream(item.record), item.content_size)
        if self._current is None:
            self._news.set()

    def _count(self, size: int) -> None:
        self.content += size
        self._progress.content = self.content
        self._progress.round_content += size

    def _packed(self, item: Outgoing, result: tuple[bytes | None, float]) -> None:
        packed, seconds = result
        assert item.choice is not None
        self.choices.packed(item.choice, None if packed is None else len(packed), seconds)
        if packed is not None:
            item.payload, item.flags, item.check = (packed,), framing.FLAG_ZSTD, None
        item.packing = False
        self._packing -= 1
        self._news.set()
        self._shorter.set()

    # ---- on its way

    async def send_all(self) -> None:
        """A task: send what is in line, as far as credit and bandwidth go, until it is called off."""
        starved = 0.0
        with self._sending, self.pace:
            while not self._off:
                self._current = self._turns.take(_is_packed)
                if self._current is not None:
                    self._current.awaited, starved = starved, 0.0
                    await self._send(self._current)
                elif self._turns:
                    began = monotonic()
                    await self._wait()
                    starved += monotonic() - began
                else:
                    await self._wait()

    async def _send(self, item: Outgoing) -> None:
        size = framing.PREFIX_SIZE + _HEADER_ROOM + sum(map(len, item.payload))
        due = monotonic()
        most = await self.pace.turn()
        paced = monotonic()
        self._other_end_is_to_move()
        while not self._off and not self._session.affords(size):
            await self._wait()
        if self._off:
            return
        bitmap = item.payload[0] if isinstance(item.record, Bitmap) else None
        frame = self._session.send(
            item.record,
            *item.payload,
            flags=item.flags,
            content_size=item.content_size,
            bitmap=bitmap,
            check=item.check,
        )
        began = monotonic()
        try:
            await (self.hand_over(frame) if size <= most else self._hand_over_in_pieces(frame, most))
        except ConnectionLost:
            # The target may have said why before it closed: the listener finds that, and all is called off.
            with anyio.move_on_after(self._transport.linger if self._transport.answers else 0):
                await anyio.sleep_forever()
            raise
        self.moved_at = monotonic()
        self._link.add(size, self.moved_at - began + paced - due)
        if item.choice is not None:
            payload_size = sum(map(len, item.payload))
            self.choices.sent(item.choice, payload_size, self.moved_at - due, item.awaited)
        self.waiting = False
        self._current = None
        item.sent = True
        if item.lease is not None:
            item.payload = ()
            item.lease.release()
        self._shorter.set()
        if item.in_place and self._turns:
            # Who waited for it is to put the next one in line before others get his turn.
            await anyio.lowlevel.checkpoint()

    async def _wait(self) -> None:
        """Wait until something may have changed for the sender."""
        self._news = anyio.Event()
        await self._news.wait()

    async def hand_over(self, buffers: Sequence[Buffer]) -> None:
        """Send a frame that the session has made, past the line and at once."""
        self.whole = False
        await self._transport.send(buffers)
        self.whole = True
        self._went(sum(map(len, buffers)))

    async def _hand_over_in_pieces(self, frame: Sequence[Buffer], most: float) -> None:
        """Send a frame at its pace, ``most`` bytes at once at first. When all is called off the rest goes at once."""
        self.whole = False
        with Pieces(frame) as pieces:
            while True:
                piece = pieces.take(most)
                await self._transport.send(piece)
                self._went(sum(map(len, piece)))
                if not pieces:
                    break
                self.waiting = False
                most = await self.pace.turn()
                self._other_end_is_to_move()
        self.whole = True

    def _went(self, size: int) -> None:
        self.pace.count(size)
        self._progress.transferred += size

    def _other_end_is_to_move(self) -> None:
        self.moved_at = monotonic()
        self.waiting = True

    def credit_came(self) -> None:
        """The target may have given credit."""
        self.moved_at = monotonic()
        self._news.set()

    def call_off(self) -> None:
        """Nothing more is to be sent but what is under way now, for :data:`GRACE` seconds."""
        self._off = True
        self.pace.call_off()
        self._sending.deadline = anyio.current_time() + GRACE
        self._news.set()

    def close(self) -> None:
        """Let go of what is still in line."""
        self._turns.clear()
        self._current = None


def _stream(record: Record) -> int | None:
    """The device whose turn it takes; None for what stays in its place. Guest memory does: one task puts it in line,
    when the devices have had their turns of a round.
    """
    return record.stream if isinstance(record, Memory | Capture | Config | Pci) else None


def _is_packed(item: Outgoing) -> bool:
    return not item.packing


def _compress(content: Buffer, choice: Choice, compressor: Compressor) -> tuple[bytes | None, float]:
    """A smaller zstd frame, if there is one, and the seconds that it took."""
    assert choice.level is not None
    began = perf_counter()
    packed = compressor.compress(content, choice.level, probe=choice.probe)
    return packed, perf_counter() - began
