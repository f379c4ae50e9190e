"""A transport over something that does not block: what a socket, a pipe, TLS and a stream of QUIC have in common.

It copies nothing and asks the event loop only where there is no room or no data. Invariants:

- After a part of a send went out and until the rest has, ``_torn`` is set; so whatever ends the call in between leaves
  it set.
- The kernel reports a reset once and calls the stream ended from then on. ``_lost`` remembers it, so that a broken
  stream never looks like a finished one, even if the other direction was told.
"""

from __future__ import annotations

import errno
import logging
from abc import abstractmethod
from collections.abc import Sequence

import anyio
import anyio.lowlevel

from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost, LocalProtocolError, TransportError
from vfiostream.transports.contract import Transport
from vfiostream.transports.unsent import IOV_MAX, Unsent

logger = logging.getLogger("vfiostream.transport")

_LOST = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.EPIPE,
        errno.ETIMEDOUT,
    }
)
"""What says that the peer or the way to it is gone, not that something is wrong here."""


class PolledTransport(Transport):
    """A transport made of four steps, two that wait and two that do not.

    Channels use the steps, which one task a direction may do; everybody else sends and receives. A subclass gives
    :meth:`_write`, :meth:`_read`, :meth:`_writable`, :meth:`_readable`, :meth:`_end` and :meth:`_let_go`, which may
    raise ``OSError``, or an error of ours where they know more.
    """

    peer: str | None = None
    """SHA-256 of the certificate that the peer has shown, in small hexadecimal digits; None where it shows none."""

    def __init__(self, address: str, *, answers: bool = True) -> None:
        self.address = address
        self.answers = answers
        self._torn = False
        self._finished = False
        self._lost = False
        self._closed = False
        self._ahead: memoryview | None = None
        """What was read to see what comes, and is to be read again."""

    # ---- steps

    def offer(self, buffers: Sequence[Buffer]) -> int:
        """Hand over what can go now of ``buffers`` (not empty, :data:`~vfiostream.transports.unsent.IOV_MAX` at most),
        and return how many bytes went: they may be reused, the others are forgotten. 0 where nothing can. Raises as
        ``send``.
        """
        self._check_open()
        try:
            return self._write(buffers)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._failure("sending", error) from error
        except ConnectionLost:
            self._lost = True
            raise

    @property
    def holds(self) -> bool:
        """Whether something that :meth:`offer` took has still to leave: :meth:`room` sees to that. Until it has, the
        peer may wait for it in vain.
        """
        return False

    @property
    def silent(self) -> float:
        """For how many seconds nothing was acknowledged, where something has to be; 0 also where that is not known."""
        return 0.0

    async def room(self) -> None:
        """Wait until :meth:`offer` may get rid of something. Raises as ``send``."""
        try:
            await self._writable()
        except anyio.ClosedResourceError as error:
            raise self._used_when_closed() from error
        except ConnectionLost:
            self._lost = True
            raise

    def take(self, into: Sequence[memoryview]) -> int | None:
        """Fill ``into`` with what is there, as ``receive`` does, but return None where nothing is."""
        self._check_open()
        if self._ahead is not None:
            return self._take_ahead(self._ahead, into[0])
        if len(into) > IOV_MAX:
            into = into[:IOV_MAX]
        try:
            count = self._read(into)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._failure("receiving", error) from error
        except ConnectionLost:
            self._lost = True
            raise
        if count == 0 and self._lost:
            raise ConnectionLost(self._lost_text())
        return count

    def _take_ahead(self, ahead: memoryview, into: memoryview) -> int:
        count = min(len(ahead), len(into))
        into[:count] = ahead[:count]
        self._ahead = ahead[count:] if count < len(ahead) else None
        return count

    def put_back(self, data: bytes) -> None:
        """Have ``data``, which :meth:`take` gave last, come once more."""
        assert self._ahead is None
        self._ahead = memoryview(data) if data else None

    async def more(self, least: int = 1) -> None:
        """Wait until :meth:`take` may find something; better when ``least`` bytes are there."""
        try:
            await self._readable(least)
        except anyio.ClosedResourceError as error:
            raise self._used_when_closed() from error

    @abstractmethod
    def _write(self, buffers: Sequence[Buffer]) -> int:
        """Take what can go now, at least one byte, or raise BlockingIOError; the next call may offer other bytes. Where
        it raises, none of these bytes may go out later: what a library has got is taken, its failure comes next time.
        """

    @abstractmethod
    def _read(self, into: Sequence[memoryview]) -> int:
        """Give what is there, at least one byte; 0 at the end of the stream; or raise BlockingIOError."""

    @abstractmethod
    async def _writable(self) -> None:
        """Wait until :meth:`_write` may take something. Raises anyio.ClosedResourceError when it is closed."""

    @abstractmethod
    async def _readable(self, least: int) -> None:
        """Wait until :meth:`_read` may give something. Raises anyio.ClosedResourceError when it is closed."""

    @abstractmethod
    async def _end(self) -> None:
        """Say that nothing more will be sent."""

    @abstractmethod
    async def _let_go(self) -> None:
        """Close; called once, and those who wait have to be told."""

    # ---- the contract

    async def send(self, buffers: Sequence[Buffer]) -> None:
        self._check_can_send()
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        size = sum(map(len, buffers))
        # As a rule everything is taken, and the caller's own list will do.
        taken = await self._send_some(buffers, 0) if size and len(buffers) <= IOV_MAX else 0
        if taken < size:
            with Unsent(buffers) as unsent:
                unsent.advance(taken)
                while unsent:
                    self._torn = taken > 0
                    count = await self._send_some(unsent.head(), taken)
                    unsent.advance(count)
                    taken += count
            self._torn = False
        if self.holds:
            self._torn = True
            await self._settle(taken)
            self._torn = False
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: sent %d bytes", self.address, size)

    async def _settle(self, taken: int) -> None:
        """Wait until all ``taken`` bytes of a call have left."""
        try:
            while self.holds:
                await self.room()
                self._check_open()
        except TransportError as error:
            error.taken = taken
            raise

    async def _send_some(self, buffers: Sequence[Buffer], taken: int) -> int:
        """Wait until something of ``buffers`` is taken; ``taken`` bytes of the same call went before them."""
        while True:
            self._check_open()
            try:
                count = self.offer(buffers)
                if count:
                    return count
                await self.room()
            except TransportError as error:
                self._torn = True
                error.taken = taken
                raise

    async def receive(self, into: Sequence[memoryview], least: int = 1) -> int:
        self._check_open()
        # Before the bytes are taken: nothing may be awaited between taking and returning them.
        await anyio.lowlevel.checkpoint_if_cancelled()
        while (count := self.take(into)) is None:
            await self.more(least)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: received %d bytes", self.address, count)
        return count

    async def finish(self) -> None:
        self._check_can_send()
        await anyio.lowlevel.checkpoint()
        self._check_open()
        try:
            await self._end()
        except OSError as error:
            raise self._failure("finishing", error) from error
        except anyio.ClosedResourceError as error:
            raise self._used_when_closed() from error
        except ConnectionLost:
            self._lost = True
            raise
        self._finished = True
        logger.debug("%s: finished sending", self.address)

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._let_go()
        logger.debug("%s: closed", self.address)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"{self.address}: it was closed; open a new one")

    def _check_can_send(self) -> None:
        self._check_open()
        if self._finished:
            raise LocalProtocolError(f"{self.address}: nothing can be sent or finished after finish")
        if self._lost:
            failure = ConnectionLost(self._lost_text())
            failure.taken = 0
            raise failure
        if self._torn:
            raise TransportError(f"{self.address}: an earlier send stopped part-way; start over on a new connection")

    def _used_when_closed(self) -> TransportError:
        return TransportError(f"{self.address}: it was closed while in use; open a new one")

    def _lost_text(self) -> str:
        return f"{self.address}: the connection is lost; start over on a new one"

    def _failure(self, doing: str, error: OSError) -> TransportError:
        reason = error.strerror
        if error.errno in _LOST:
            self._lost = True
            return ConnectionLost(
                f"{self.address}: the connection was lost while {doing} ({reason}); see the other end"
            )
        return TransportError(f"{self.address}: {doing} failed ({reason}); start over on a new connection")
