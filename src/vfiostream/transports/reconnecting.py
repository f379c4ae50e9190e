"""A link that outlives its connections.

Around one ordered link after another: what is sent is kept until the other end has acknowledged it, and goes out again
where it was lost with a link. Each new one begins with both ends saying up to where they have everything. Invariants:

- ``_window`` holds what is sent and not acknowledged, in order, ``_first`` the position of its first byte. Only
  :meth:`_write` sends, and only what is there: so whatever was put there may go out at any time, until the link fails.
- ``_position`` is what has come. It only grows by bytes that are with the reader, or kept for him: an acknowledged byte
  is never needed again. The end counts as one more position.
- Whoever reads the inner link holds ``_reading``: the reader himself, straight to where it goes, and while he does not,
  a task, for acknowledgements and what is small.
- There is at most one inner link at a time, ``_inner``, and a task that serves it until it is lost.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

import anyio
import anyio.lowlevel

from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost, LocalProtocolError, StreamError, TransportError
from vfiostream.transports.channel import Signal
from vfiostream.transports.contract import Transport
from vfiostream.transports.polled import PolledTransport
from vfiostream.transports.segments import HEAD_SIZE, Head, Kind
from vfiostream.transports.unsent import IOV_MAX, Unsent

logger = logging.getLogger("vfiostream.transport")

SMALL = 64 << 10
"""Bytes that are kept for a reader who is not there: enough for what ends a migration, so that it is acknowledged."""
GREETING_TIMEOUT = 10.0
"""Seconds that the other end may take to say where it is, on a new link."""
SILENCE = 5.0
"""Seconds without an acknowledgement of what the kernel has sent, after which a connection counts as lost."""
ACK_WITHIN = 2.0
"""Seconds that ``finish`` waits for the other end to say that it has everything, once that was handed over."""
GOODBYE_WITHIN = 0.5
"""Seconds that it may take to say on the connection there is that the link is given up."""
_ALL = frozenset(Kind)


def rests_of(memory: int) -> int:
    """What the channels below may have of the ``memory`` of a link."""
    return memory // 4


class Gone(ConnectionLost):
    """The other end does not know the link any more."""


class ReconnectingTransport(Transport):
    """A link whose connections :meth:`serve` is given. It holds ``memory`` bytes of what was sent, and waits
    ``patience`` seconds for the next connection where one was lost.
    """

    def __init__(self, address: str, memory: int, patience: float) -> None:
        self.address = address
        self.answers = True
        self.keeps = memory + SMALL
        memory -= rests_of(memory)
        self.linger = patience
        self.patience = patience
        self.said_goodbye = False
        """Whether the other end was told that the link is given up."""
        self.closed = anyio.Event()
        """Given up, or closed: nothing is served any more."""
        self._memory = memory
        self._closed = False
        self._inner: Transport | None = None
        self._failure: Exception | None = None
        """Why there will be no other link."""
        self.lost = "no connection has come"
        """What became of the last connection."""
        self._change = anyio.Event()
        """Set and renewed when there is another inner link, none any more, more room, or more to read."""

        self._window: deque[memoryview] = deque()
        self._first = 0
        self._sent = 0
        """Where the next byte goes."""
        self._next = 0
        """Index in the window of what goes out next over this link, and"""
        self._written = 0
        """its position."""
        self._handed = 0
        """Up to where it has taken them."""
        self._went = 0
        """Up to where anything went out over any of them; the end counts."""
        self._marked = 0
        """Up to where an acknowledgement was asked for."""
        self._writing = False
        """Whether a segment is under way: nothing else can be said then."""
        self._to_write = Signal()
        self._finishing = False
        self._end_written = False
        self._end_handed = False
        self._end_known = False
        """Whether the other end has the end of what we sent."""
        self._torn = False
        self._finished = False

        self._reading = anyio.Lock(fast_acquire=True)
        self._position = 0
        self._left = 0
        """Bytes of the segment at ``_position`` that are still to be read."""
        self._wanted = False
        self._ack_due = False
        self._kept: deque[memoryview] = deque()
        self._ended = False
        self._head = memoryview(bytearray(HEAD_SIZE))
        self._got = 0
        self._consumed = Signal()

    # ---- one connection after another

    @property
    def open(self) -> bool:
        """Whether it can still need a connection."""
        return not self.closed.is_set() and not self.over

    @property
    def over(self) -> bool:
        """Whether both ends have everything: no other connection is needed."""
        return self._ended and self._end_known

    async def serve(
        self, inner: Transport, connections: Sequence[PolledTransport], *, met: Callable[[], None] = lambda: None
    ) -> None:
        """Go on over ``inner``, which goes over ``connections``, until that is lost, or the link is closed; ``inner``
        is this object's, and closed then. ``met`` is called once both ends have said where they are. Raises nothing
        but :class:`Gone`.
        """
        async with inner:
            try:
                with anyio.fail_after(GREETING_TIMEOUT):
                    await inner.send([Head(self._received, 0, Kind.RESUME).pack()])
                    await self._resume(inner)
            except TimeoutError:
                self.lost = f"the other end did not say within {GREETING_TIMEOUT:g} s where it is"
                return
            except Gone:
                raise
            except TransportError as error:
                self.lost = self._reason(error, inner)
                return
            except StreamError as error:
                self.fail(error)
                return
            met()
            self._inner = inner
            self.notify()
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._write, inner)
                    tasks.start_soon(self._read, inner)
                    tasks.start_soon(self._watch, inner, connections)
                    while self._inner is inner and not self.closed.is_set():
                        await self.changed()
                    tasks.cancel_scope.cancel()
                if self._closed and not self._writing:
                    await self._say_goodbye(inner)
            except TransportError as error:
                logger.debug("%s: %s", self.address, error)
            finally:
                self.lose(inner, "another took its place")

    async def _say_goodbye(self, inner: Transport) -> None:
        """Tell the other end that the link is given up, and wait until it has closed: it would not hear it otherwise,
        if we close with something unread.
        """
        scrap = memoryview(bytearray(SMALL))
        with anyio.move_on_after(GOODBYE_WITHIN):
            # What it waits for may be just this acknowledgement.
            await inner.send([Head(self._received, 0, Kind.ACK).pack(), Head(0, 0, Kind.GONE).pack()])
            await inner.finish()
            try:
                while await inner.receive([scrap]):
                    pass
            except ConnectionLost as error:
                logger.debug("%s", error)
            self.said_goodbye = True

    async def _watch(self, inner: Transport, connections: Sequence[PolledTransport]) -> None:
        """A task: notice where a way has ended without a word, which the kernel takes many minutes for."""
        seen = [0] * len(connections)
        interval = SILENCE / 5
        while True:
            await anyio.sleep(interval)
            # What was sent only now may be without an answer after an hour in which there was nothing to say.
            for number, connection in enumerate(connections):
                seen[number] = seen[number] + 1 if connection.silent > interval else 0
            if max(seen) == 5:
                self.lose(inner, f"the other end's host was silent for {SILENCE:g} s")
                return

    async def _resume(self, inner: Transport) -> None:
        raw = bytearray(HEAD_SIZE)
        with memoryview(raw) as view:
            done = 0
            while done < HEAD_SIZE:
                count = await inner.receive([view[done:]], HEAD_SIZE - done)
                if count == 0:
                    raise ConnectionLost(f"{inner.address}: the other end closed it; see there why")
                done += count
        try:
            head = Head.parse(raw, _ALL)
        except ValueError as error:
            raise StreamError("the first segment", str(error), self.address) from error
        if head.kind is Kind.GONE:
            raise self._gone()
        if head.kind is not Kind.RESUME:
            raise StreamError("the first segment", f"is {head.kind.name}, and RESUME has to come", self.address)
        self._left = self._got = 0
        self._acknowledged(head.position)
        self._next = 0
        self._written = self._handed = self._marked = self._first
        self._writing = False
        self._end_written = self._end_known
        self._end_handed = False
        self._ack_due = False
        if self._went > self._first:
            logger.debug("%s: %d bytes may have been lost and go out again", self.address, self._went - self._first)
        self._to_write.give()

    async def changed(self) -> None:
        """Wait until something is different: a connection, what was acknowledged, what has come, or the link's end."""
        await self._change.wait()

    def lose(self, inner: Transport, reason: str) -> None:
        """``inner`` can't be used any more."""
        if self._inner is inner:
            logger.debug("%s: %s", self.address, reason)
            self._inner = None
            self.lost = reason
            self.notify()

    def fail(self, error: Exception) -> None:
        """There will be no other connection."""
        if self._failure is None:
            self._failure = error
        self._inner = None
        self.closed.set()
        self.notify()
        self._to_write.give()

    def _gone(self) -> Gone:
        return Gone(f"{self.address}: the other end has given this link up; see there why")

    def could_not(self, error: TransportError) -> None:
        """Another connection could not be had, for now."""
        self.lost = self._reason(error, self)

    def give_up(self) -> None:
        """The time for another connection is over."""
        self.fail(
            ConnectionLost(
                f"{self.address}: the link was lost and did not come back within {self.patience:g} s ({self.lost}); "
                "see the other end"
            )
        )

    def notify(self) -> None:
        """Wake whoever waits for :meth:`changed`."""
        self._change.set()
        self._change = anyio.Event()

    def _reason(self, error: Exception, inner: Transport) -> str:
        text = str(error)
        for address in (self.address, inner.address):
            text = text.removeprefix(f"{address}: ")
        return text

    # ---- out

    async def send(self, buffers: Sequence[Buffer]) -> None:
        self._check_can_send()
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._check_can_send()
        size = left = sum(map(len, buffers))
        largest = self._memory // 4
        with Unsent(buffers) as unsent:
            while left:
                length = min(left, largest)
                while self._sent - self._first + length > self._memory:
                    self._torn = left < size
                    await self.changed()
                    self.check_alive(size - left)
                self._window.append(_copied(unsent, length))
                self._sent += length
                left -= length
                self._to_write.give()
        # Where there is a connection, it has to take them: what is in the window alone goes with this process.
        end, self._torn = self._sent, size > 0
        while self._inner is not None and self._handed < end:
            await self.changed()
        self._torn = False
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: sent %d bytes", self.address, size)

    async def finish(self) -> None:
        self._check_can_send()
        await anyio.lowlevel.checkpoint()
        self._check_can_send()
        self._finishing = self._torn = True
        self._to_write.give()
        while not self._end_known:
            with anyio.move_on_after(ACK_WITHIN if self._end_handed else None) as limit:
                await self.changed()
            if not self._end_known:
                self.check_alive()
            if limit.cancelled_caught:
                break  # Who does not read can't acknowledge.
        self._torn = False
        self._finished = True
        logger.debug("%s: finished sending", self.address)

    async def _write(self, inner: Transport) -> None:
        """A task: send what the window has, and acknowledgements, until ``inner`` is lost."""
        try:
            while True:
                if self._ack_due:
                    self._ack_due = False
                    await inner.send([Head(self._received, 0, Kind.ACK).pack()])
                elif self._next < len(self._window):
                    view, position = self._window[self._next], self._written
                    self._next += 1
                    self._written += len(view)
                    self._went = max(self._went, self._written)
                    wanted = self._written - self._marked >= self._memory // 8
                    if wanted:
                        self._marked = self._written
                    self._writing = True
                    await inner.send([Head(position, len(view), Kind.DATA, wanted).pack(), view])
                    self._writing = False
                    self._handed = position + len(view)
                    self.notify()
                elif self._finishing and not self._end_written:
                    self._end_written = True
                    self._went = self._sent + 1
                    await inner.send([Head(self._sent, 0, Kind.END, True).pack()])
                    self._end_handed = True
                    self.notify()
                else:
                    await self._to_write.wait()
        except TransportError as error:
            self.lose(inner, self._reason(error, inner))

    def _acknowledged(self, position: int) -> None:
        """The other end has everything before ``position``. Raises StreamError for what can't be."""
        if not self._first <= position <= self._went:
            raise StreamError("an acknowledgement", f"is of {position}, which is not under way", self.address)
        if position == self._sent + 1:
            self._end_known = True
            position -= 1
        while self._window and self._first < position:
            view = self._window[0]
            if self._first + len(view) <= position:
                self._first += len(view)
                self._window.popleft()
                self._next = max(self._next - 1, 0)
            else:
                self._window[0] = view[position - self._first :]
                self._first = position
        self._written = max(self._written, self._first)
        self.notify()

    # ---- in

    async def receive(self, into: Sequence[memoryview], least: int = 1) -> int:
        self._check_open()
        # Before bytes are taken: nothing may be awaited between taking and returning them.
        await anyio.lowlevel.checkpoint_if_cancelled()
        while True:
            self._check_open()
            if self._kept:
                return self._from_kept(into)
            if self._ended:
                return 0
            self.check_alive()
            inner = self._inner
            if inner is None:
                await self.changed()
                continue
            async with self._reading:
                if self._inner is not inner or self._kept or self._ended:
                    continue
                count = await self._read_some(inner, into, least)
            if count:
                return count

    async def _read(self, inner: Transport) -> None:
        """A task: read what is not for the reader, or small, until ``inner`` is lost."""
        while self._inner is inner:
            async with self._reading:
                if self._inner is inner and self._left == 0:
                    await self._read_head(inner)
                while self._inner is inner and 0 < self._left <= SMALL - sum(map(len, self._kept)):
                    space = memoryview(bytearray(self._left))
                    count = await self._read_some(inner, [space], len(space))
                    if count:
                        self._kept.append(space[:count])
                        self.notify()
            if self._left:
                await self._consumed.wait()

    def _from_kept(self, into: Sequence[memoryview]) -> int:
        done = 0
        for view in into:
            start = 0
            while self._kept and start < len(view):
                kept = self._kept[0]
                count = min(len(kept), len(view) - start)
                view[start : start + count] = kept[:count]
                start += count
                if count == len(kept):
                    self._kept.popleft()
                else:
                    self._kept[0] = kept[count:]
            done += start
        self._consumed.give()
        return done

    async def _read_some(self, inner: Transport, into: Sequence[memoryview], least: int) -> int:
        """Read the segment into ``into``; 0 where its head, or nothing, came."""
        if self._left == 0:
            await self._read_head(inner)
            return 0
        views: list[memoryview] = []
        room = 0
        cut: memoryview | None = None
        for view in into[: IOV_MAX - 1]:
            if room + len(view) >= self._left:
                cut = view[: self._left - room]
                views.append(cut)
                room = self._left
                break
            views.append(view)
            room += len(view)
        if room == self._left:
            views.append(self._head)
        try:
            count = await inner.receive(views, min(least, room))
        except (TransportError, StreamError) as error:
            self._broken(inner, error)
            return 0
        finally:
            if cut is not None:
                cut.release()
        if count == 0:
            self.lose(inner, "the other end closed it")
            return 0
        done = min(count, room)
        self._left -= done
        self._position += done
        if self._left == 0:
            if self._wanted:
                self._acknowledge()
            self._came(inner, count - done)
            self._consumed.give()
        return done

    async def _read_head(self, inner: Transport) -> None:
        try:
            count = await inner.receive([self._head[self._got :]], HEAD_SIZE - self._got)
        except (TransportError, StreamError) as error:
            self._broken(inner, error)
            return
        if count == 0:
            self.lose(inner, "the other end closed it")
        elif self._inner is inner:
            self._came(inner, count)

    def _came(self, inner: Transport, count: int) -> None:
        """``count`` more bytes of a head are there."""
        self._got += count
        if self._got < HEAD_SIZE:
            return
        self._got = 0
        try:
            head = Head.parse(bytes(self._head), _ALL)
            if head.kind is Kind.ACK:
                self._acknowledged(head.position)
            elif head.kind is Kind.GONE:
                self.fail(self._gone())
            elif head.kind is Kind.RESUME:
                raise ValueError("is RESUME, which only begins a link")
            elif self._ended or head.position != self._position:
                raise ValueError(f"is of {head.position}, and {self._position} has to come")
            elif head.kind is Kind.END:
                self._ended = True
                self._acknowledge()
                self.notify()
            else:
                self._left, self._wanted = head.length, head.wanted
        except ValueError as error:
            self._broken(inner, StreamError("a segment", str(error), self.address))
        except StreamError as error:
            self._broken(inner, error)

    def _broken(self, inner: Transport, error: Exception) -> None:
        if isinstance(error, StreamError):
            self.fail(error)
        else:
            self.lose(inner, self._reason(error, inner))

    @property
    def _received(self) -> int:
        return self._position + self._ended

    def _acknowledge(self) -> None:
        self._ack_due = True
        self._to_write.give()

    # ---- both

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._inner = None
        self.closed.set()
        self.notify()
        await anyio.lowlevel.cancel_shielded_checkpoint()
        logger.debug("%s: closed", self.address)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"{self.address}: it was closed; open a new one")

    def check_alive(self, taken: int | None = None) -> None:
        """Raise what has ended the link."""
        self._check_open()
        failure: Exception
        match self._failure:
            case None:
                return
            case StreamError():
                raise StreamError(*self._failure.args)
            case ConnectionLost():
                failure = ConnectionLost(*self._failure.args)
            case _:
                failure = TransportError(*self._failure.args)
        failure.taken = taken
        raise failure

    def _check_can_send(self) -> None:
        self._check_open()
        if self._finished:
            raise LocalProtocolError(f"{self.address}: nothing can be sent or finished after finish")
        self.check_alive(0)
        if self._torn:
            raise TransportError(f"{self.address}: an earlier send stopped part-way; start over on a new link")


def _copied(unsent: Unsent, length: int) -> memoryview:
    """The next ``length`` bytes, which are taken out of ``unsent``."""
    copy = memoryview(bytearray(length))
    done = 0
    while done < length:
        view = unsent.head(1)[0]
        count = min(len(view), length - done)
        copy[done : done + count] = view[:count]
        unsent.advance(count)
        done += count
    return copy
