"""What a transport is: one ordered stream of bytes to somebody, or to a file.

A transport moves buffers and knows nothing of frames. It is used by one task for sending and by one for receiving; the
two may run at the same time. Every transport passes the suite in :mod:`vfiostream.testing`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from vfiostream.buffers import Buffer
from vfiostream.closing import Closing


class Transport(Closing):
    """One ordered byte stream, in one direction or in both.

    Errors: a peer or link that is gone raises :class:`~vfiostream.errors.ConnectionLost`, anything else the operating
    system reports raises :class:`~vfiostream.errors.TransportError`, both naming :attr:`address`. Using a transport
    after :meth:`aclose`, or while it is closed, raises :class:`~vfiostream.errors.TransportError`; using one in a
    direction it does not have raises :class:`~vfiostream.errors.LocalProtocolError`.

    Turns: a call notices that it is cancelled, but one that can go on at once need not let other tasks run, which
    costs more than handing over a small frame. Whoever calls in a loop gives way himself.
    """

    address: str
    """How the user would write it, with what was filled in (``tcp:127.0.0.1:40001``); for messages."""

    answers: bool
    """Whether somebody reads what is sent and may answer now (a link), or not (a file)."""

    keeps: int = 0
    """Bytes of what was sent or came that it may hold in memory of this process. They come out of the byte budget."""

    linger: float = 2.0
    """Seconds that last words may take to reach the peer before the transport is closed."""

    @abstractmethod
    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Hand over every byte of ``buffers``, in order.

        Returns when the buffers may be reused: their content was copied by the kernel, written, or copied by the
        transport. Blocks while the other side takes nothing; that is the backpressure. If it is cancelled or fails, an
        unknown prefix went out: the transport is torn, later calls to ``send`` and ``finish`` raise, and the buffers
        may be reused. Only a call that was cancelled before its first byte went out leaves the transport as it was.
        What it raises has ``taken`` 0 only if no byte of ``buffers`` went out, or ever will.
        """

    @abstractmethod
    async def receive(self, into: Sequence[memoryview], least: int = 1) -> int:
        """Fill the views ``into`` (at least one, none of them empty), in order, with at least one byte in all and
        return how many; 0 means the sender has finished and everything was read. More may be there already, or come.
        The views belong to the transport only while the call runs, and bytes that were not counted are as they were. A
        cancelled call loses nothing: either its bytes are still to be read, or the call returned them.

        ``least`` is a hint: fewer bytes than that do not get the caller any further, so a transport that has to wait
        may wait until so many are there, or the stream ends. It may return fewer.
        """

    @abstractmethod
    async def finish(self) -> None:
        """Say that nothing more will be sent; returns when it has left this process, and where the transport itself
        sends lost bytes again, when the peer has everything. On a link, the peer's ``receive`` then returns 0. For a
        file, everything is durable (file and folder synced) and has its final name when this returns, and not before;
        where it raises, the name is not given, or is taken back; if it can't be, the error says that the file is there.
        A ``send`` or ``finish`` after it raises :class:`~vfiostream.errors.LocalProtocolError`.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of everything, at once and without raising; may be called again, and under cancellation. A file that
        was not finished is removed: nothing half written is ever left under the final name. On a link, the peer sees
        ``ConnectionLost`` or the end of the stream.
        """


class Listener(Closing):
    """Where a transport comes from on the receiving side."""

    address: str
    """As on :class:`Transport`; with the real port where port 0 was asked for."""

    @abstractmethod
    async def accept(self) -> Transport:
        """Wait for a sender. For a file, open it. May be called again for the next one."""

    @abstractmethod
    async def aclose(self) -> None:
        """Stop listening: nobody else gets in. Transports that were accepted live on, but no longer than the context
        the listener is from. Never raises; may be called again.
        """
