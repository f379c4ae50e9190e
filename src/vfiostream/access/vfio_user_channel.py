"""Messages of vfio-user, the client's end: commands go out one at a time, and each waits for its reply.

Invariants:

- A message goes out whole or not at all. Once its first byte is sent, cancellation waits for the rest (for at most
  FINISH_TIMEOUT; then the connection is given up).
- At most one reply is *owed*: that of a call which was cancelled, or timed out, after its command had gone out. The
  next call reads it before it sends anything, so replies can't be taken for one another's.
- What was received of a message is remembered here, not in the call. No byte is lost when a call is cancelled in the
  middle of a message, and nothing is received into a buffer whose call is over.
- File descriptors that came with a message are closed when it ends, unless the call asked for one.

The server's own commands are answered while a call waits for its reply, and at no other time: a server that wants guest
memory by message while nobody calls waits until somebody does.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import anyio
import anyio.lowlevel

from vfiostream.buffers import Buffer
from vfiostream.errors import DeviceBroken, DeviceLost, DeviceRefused, DeviceTimeout
from vfiostream.uapi.vfio_user import (
    FLAG_ERROR,
    FLAG_REPLY,
    HEADER,
    MAX_FDS,
    BadMessage,
    Command,
    Header,
    parse_header,
)

logger = logging.getLogger("vfiostream.access")

FINISH_TIMEOUT = 5.0
"""Seconds that a cancelled call may take to get the rest of a message out."""
MAX_ERRNO = 4095
"""The kernel's own limit; a server's errno beyond it is not believed."""

_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * array("i").itemsize)
_DRAIN = 64 * 1024
"""Bytes read at a time of what nobody wants."""


class Reply(NamedTuple):
    """What came back for a command."""

    size: int
    """Bytes of body; may be more than the buffers given for it hold (the rest was thrown away), or fewer."""
    fd: int | None
    """The caller's to close; None unless asked for and sent."""


class Channel:
    """A connected, non-blocking socket, which the channel closes."""

    def __init__(
        self, connected: socket.socket, name: str, serve: Callable[[int, memoryview], Sequence[Buffer] | None]
    ) -> None:
        """``serve`` gets the server's commands and bodies; it returns the body of the reply, or None to refuse."""
        self.name = name
        self._socket = connected
        self._serve = serve
        # The fast acquire saves a turn of the event loop for each message; a call waits for its reply anyway.
        self._lock = anyio.Lock(fast_acquire=True)
        self._unusable: str | None = None
        self._operation = ""
        self._next_id = 0
        self._owed: tuple[int, int] | None = None
        """Id and command of the reply that is to come."""
        self._unsent = memoryview(b"")
        """The rest of a message of which the first bytes are sent."""

        # The message that is being received.
        self._head = bytearray(HEADER.size)
        self._head_left = HEADER.size
        self._header: Header | None = None
        self._body_left = 0
        self._command_body = memoryview(b"")
        self._fds: list[int] = []

    async def call(
        self,
        operation: str,
        command: Command,
        request: Sequence[Buffer] = (),
        reply: Sequence[memoryview] = (),
        *,
        timeout: float,
        pass_fds: Sequence[int] = (),
        take_fd: bool = False,
    ) -> Reply:
        """Send a command whose body is ``request`` and wait for its reply, the body of which goes to ``reply``.

        ``operation`` says what is done, for messages ("reading 4 bytes of region 9 at 0"). ``timeout`` is in seconds,
        for everything from the reply still owed to the reply to this. Buffers are used only while the call runs.
        """
        async with self._lock:
            await anyio.lowlevel.checkpoint_if_cancelled()  # nothing is sent for a call that's already cancelled
            self.check()
            self._operation = operation
            with anyio.move_on_after(timeout) as limit:
                if self._owed is not None:
                    await self._receive_reply(())
                    self._end_message()
                await self._send_command(command, request, pass_fds)
                header = await self._receive_reply(reply)
                fd = self._fds.pop(0) if take_fd and self._fds and not header.is_error else None
                self._end_message()
            if limit.cancelled_caught:
                raise DeviceTimeout(
                    f"{self.name}: {operation} was not answered within {timeout:g} s; see whether the device is stuck"
                )
        if header.is_error:
            raise self._refused(operation, header.errno)
        return Reply(header.body_size, fd)

    def check(self) -> None:
        """Raise :class:`~vfiostream.errors.DeviceLost` if the connection is of no more use."""
        if self._unusable is not None:
            raise DeviceLost(f"{self.name}: the connection can't be used ({self._unusable}); open the device again")

    async def aclose(self) -> None:
        """Close the socket; a call that waits ends with :class:`~vfiostream.errors.DeviceLost`. May be called again,
        and under cancellation.
        """
        self._unusable = self._unusable or "it was closed"
        if self._socket.fileno() < 0:
            return
        anyio.notify_closing(self._socket)
        try:
            # Who waits goes before the descriptor does: anyio knows them by its number, which the next socket may get.
            await anyio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._socket.close()
            self._close_fds()

    # ---- sending

    async def _send_command(self, command: Command, request: Sequence[Buffer], fds: Sequence[int]) -> None:
        self._next_id = (self._next_id + 1) & 0xFFFF
        size = HEADER.size + sum(len(piece) for piece in request)
        head = HEADER.pack(self._next_id, command, size, 0, 0)
        owed = (self._next_id, int(command))
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: > %s id %d, %d bytes: %s", self.name, command.name, self._next_id, size, self._operation)
        sent = self._send_now([head, *request], fds)
        while not sent:
            await self._wait(anyio.wait_writable)
            sent = self._send_now([head, *request], fds)
        self._owed = owed
        if sent < size:
            await self._send_rest([head, *request], sent)

    async def _send_rest(self, pieces: Sequence[Buffer], sent: int) -> None:
        """Send what comes after the first ``sent`` bytes, also when cancelled."""
        self._unsent = memoryview(b"".join(pieces))[sent:]  # a copy, but a full socket is rare
        try:
            await self._flush()
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(FINISH_TIMEOUT, shield=True):
                await self._flush()
            if self._unsent:
                self._give_up(f"{self._operation} was cancelled and the rest of its message could not be sent")
            raise

    async def _flush(self) -> None:
        while self._unsent:
            sent = self._send_now([self._unsent])
            self._unsent = self._unsent[sent:]
            if not sent:
                await self._wait(anyio.wait_writable)

    def _send_now(self, pieces: Sequence[Buffer], fds: Sequence[int] = ()) -> int:
        """Send what the socket takes: 0 bytes if it is full."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        try:
            return self._socket.sendmsg(pieces, ancillary)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost(error.strerror or str(error)) from error

    # ---- receiving

    async def _receive_reply(self, into: Sequence[memoryview]) -> Header:
        """Receive the reply that is owed, its body into ``into``; answer what the server asks before it comes."""
        while not (header := await self._receive_header()).is_reply:
            await self._answer(header)
            # A server that never stops asking must not keep the event loop, nor the time limit, from running.
            await anyio.lowlevel.checkpoint()
        if (header.msg_id, header.command) != self._owed:
            raise self._broken(f"a reply to command {header.command}, id {header.msg_id}, came where another was due")
        if not header.is_error:
            await self._receive_into(into)
        while self._body_left:
            await self._receive_into([memoryview(bytearray(min(self._body_left, _DRAIN)))])
        self._owed = None
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "%s: < reply id %d, %d bytes, %d fds, errno %d",
                self.name,
                header.msg_id,
                header.size,
                len(self._fds),
                header.errno if header.is_error else 0,
            )
        return header

    async def _receive_header(self) -> Header:
        """The header of the message that is being received, which may be an old one's."""
        while self._header is None:
            self._head_left -= await self._receive([memoryview(self._head)[-self._head_left :]])
            if self._head_left:
                continue
            try:
                header = parse_header(self._head)
            except BadMessage as error:
                raise self._broken(f"there came a {error}") from error
            self._header = header
            self._body_left = header.body_size
            if not header.is_reply:
                self._command_body = memoryview(bytearray(header.body_size))
        return self._header

    async def _receive_into(self, into: Sequence[memoryview]) -> None:
        """Fill ``into``, as far as the body goes."""
        pending = _take(into, self._body_left)
        while pending:
            size = await self._receive(pending)
            self._body_left -= size
            pending = _skip(pending, size)

    def _end_message(self) -> None:
        """The message was received and dealt with."""
        self._header = None
        self._head_left = HEADER.size
        self._command_body = memoryview(b"")
        self._close_fds()

    async def _receive(self, into: Sequence[memoryview]) -> int:
        """Receive at least a byte; ``into`` isn't empty and does not reach over the end of the message."""
        while True:
            try:
                size, ancillary, flags, _ = self._socket.recvmsg_into(into, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                await self._wait(anyio.wait_readable)
                continue
            except OSError as error:
                raise self._lost(error.strerror or str(error)) from error
            if ancillary or flags & socket.MSG_CTRUNC:
                self._take_fds(ancillary, flags)
            if size == 0:
                raise self._lost("the server closed the connection")
            return size

    def _take_fds(self, ancillary: Sequence[tuple[int, int, bytes]], flags: int) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            # The kernel cuts the list too where this process can open no more files.
            raise self._broken(f"more than {MAX_FDS} file descriptors came with a message, or more than can be open")

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    # ---- the server's commands

    async def _answer(self, header: Header) -> None:
        """Receive the rest of a command and answer it; once it is received the server gets its answer."""
        await self._receive_into([self._command_body[-self._body_left :]] if self._body_left else ())
        body = self._serve(header.command, self._command_body)
        self._end_message()
        number = 0 if body is not None else errno.EINVAL
        logger.debug("%s: command %d of the server, %d bytes, errno %d", self.name, header.command, header.size, number)
        if not header.wants_reply:
            return
        flags = FLAG_REPLY if body is not None else FLAG_REPLY | FLAG_ERROR
        pieces = body or ()
        size = HEADER.size + sum(len(piece) for piece in pieces)
        pieces = [HEADER.pack(header.msg_id, header.command, size, flags, number), *pieces]
        sent = self._send_now(pieces)
        if sent < size:
            await self._send_rest(pieces, sent)

    # ---- what goes wrong

    async def _wait(self, until_ready: Callable[[socket.socket], Awaitable[None]]) -> None:
        if self._unusable is not None:  # aclose has woken those who waited, and nobody would wake this one
            raise self._lost(self._unusable)
        try:
            await until_ready(self._socket)
        except anyio.ClosedResourceError as error:
            raise self._lost("it was closed") from error

    def _give_up(self, reason: str) -> None:
        self._unusable = self._unusable or reason
        self._close_fds()

    def _lost(self, reason: str) -> DeviceLost:
        self._give_up(reason)
        return DeviceLost(
            f"{self.name}: the connection was lost during {self._operation} ({reason}); "
            "see whether the device's process runs, and open the device again"
        )

    def _broken(self, problem: str) -> DeviceBroken:
        """The two ends no longer agree on where they are in the conversation."""
        self._give_up(problem)
        return DeviceBroken(
            f"{self.name}: {problem} during {self._operation}; the server does not keep to vfio-user, see its log"
        )

    def _refused(self, operation: str, number: int) -> DeviceRefused:
        if 0 < number <= MAX_ERRNO:
            return DeviceRefused(self.name, operation, number)
        return DeviceRefused(self.name, operation, errno.EIO, f"the errno it gave, {number}, says nothing")


def _take(buffers: Sequence[memoryview], size: int) -> list[memoryview]:
    """The first ``size`` bytes of ``buffers`` (fewer if they hold fewer), without empty ones."""
    taken: list[memoryview] = []
    for buffer in buffers:
        piece = buffer[:size]
        if piece:
            taken.append(piece)
            size -= len(piece)
    return taken


def _skip(buffers: list[memoryview], size: int) -> list[memoryview]:
    """``buffers`` without their first ``size`` bytes."""
    for number, buffer in enumerate(buffers):
        if size < len(buffer):
            return [buffer[size:], *buffers[number + 1 :]]
        size -= len(buffer)
    return []
