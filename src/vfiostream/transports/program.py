"""``exec:COMMAND``: through any program, which ``/bin/sh`` runs.

As a link, its standard input and output are the two directions. One way, it gets the stream on its input and has to
end well when that ends; or it gives one on its output, and has to end well after it. What it says on standard error
goes to ours, and so does its output where that is no part of the stream.

Invariants:

- The program has a session of its own, so that neither an interrupt at the terminal nor what happens in its process
  group is anybody else's; and it has no terminal.
- It is not reaped before all that has to be told to its process group was told: until then nobody gets its number.
- What has to know that the stream is not whole (a checkpoint that is called off) is terminated before it sees the end.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import termios
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager

import anyio
import anyio.lowlevel

from vfiostream.buffers import Buffer
from vfiostream.ending import to_the_end
from vfiostream.errors import ConnectionLost, TransportError
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.descriptors import DescriptorTransport
from vfiostream.transports.options import Options

logger = logging.getLogger("vfiostream.transport")

OPTIONS = frozenset({"answers"})

ENDING = 1.0
"""Seconds that a program which takes or gives nothing more may take to end, before that counts without its status."""
GRACE = 2.0
"""Seconds that the program of a link has to pass on what it still holds, when the link is closed."""
KILL_AFTER = 5.0
"""Seconds that a program may take to end when it is told to."""

_SHELL = "/bin/sh"


class Program:
    """A command that runs, until :meth:`end`."""

    def __init__(self, command: str, stdin: int, stdout: int) -> None:
        """Start it; raises OSError."""
        self._alive, held = os.pipe()
        """What all that the command starts holds the other end of: it ends with the last of them, as a shell that is
        told to end does not wait for those it has started.
        """
        with ExitStack() as undo:
            undo.callback(os.close, self._alive)
            try:
                self._process = subprocess.Popen(
                    [_SHELL, "-c", command], stdin=stdin, stdout=stdout, pass_fds=[held], start_new_session=True
                )
            finally:
                os.close(held)
            try:
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError:
                self._signal(signal.SIGKILL)
                self._process.wait()
                raise
            undo.pop_all()
        self._one_waits = anyio.Lock()
        """Around waiting on the descriptor, which only one task may at a time."""

    def status(self) -> int | None:
        """Its exit status, or the signal that ended it as a negative number; None while it runs. Does not reap it."""
        try:
            found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # SIGCHLD is ignored in this process, so its status is nobody's.
            return 255
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    async def ended(self) -> int:
        """Wait until it has ended; returns :meth:`status`."""
        while (status := self.status()) is None:
            async with self._one_waits:
                if self.status() is None:
                    await anyio.wait_readable(self._pidfd)
        return status

    def terminate(self) -> None:
        """Tell it, and all that it has started, to end; nothing where it has ended well."""
        if self.status() != 0:
            self._signal(signal.SIGTERM)

    async def end(self, grace: float) -> None:
        """Have it end, with ``grace`` seconds to do so by itself, and reap it. Takes ``grace`` and twice
        :data:`KILL_AFTER` at most, and is not to be cancelled. Where it has ended well, what it left behind goes on.
        """
        with anyio.move_on_after(grace):
            await self.ended()
        if self.status() != 0:
            self.terminate()
            with anyio.move_on_after(KILL_AFTER) as scope:
                await anyio.wait_readable(self._alive)
            if scope.cancelled_caught:
                self._signal(signal.SIGKILL)
            with anyio.move_on_after(KILL_AFTER):
                await self.ended()
        anyio.notify_closing(self._pidfd)
        try:
            await anyio.lowlevel.cancel_shielded_checkpoint()
        finally:
            os.close(self._pidfd)
            os.close(self._alive)
        if self._process.poll() is None:
            logger.warning("process %d was killed and has not ended; look at what it waits for", self._process.pid)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError) as error:
            logger.debug("process group %d: %s", self._process.pid, error.strerror)


def _how(status: int) -> str:
    """How a program ended, in words. A shell's status is 128 more than the signal that ended what it ran."""
    try:
        name = signal.Signals(-status if status < 0 else status - 128).name
    except ValueError:
        name = ""
    if status < 0:
        return f"by signal {name or -status}"
    return f"with exit status {status}" + (f" ({name})" if name else "")


class ProgramTransport(DescriptorTransport):
    """A program, and our ends of its pipes: both of a link, one of what goes one way."""

    def __init__(self, address: str, program: Program, reads: int | None, writes: int | None, *, answers: bool) -> None:
        super().__init__(address, reads, writes, answers=answers)
        self._program = program

    async def send(self, buffers: Sequence[Buffer]) -> None:
        try:
            await super().send(buffers)
        except ConnectionLost as error:
            failure = ConnectionLost(f"{self.address}: {await self._why_lost()}")
            failure.taken = error.taken
            raise failure from error

    async def receive(self, into: Sequence[memoryview], least: int = 1) -> int:
        count = await super().receive(into, least)
        if count == 0:
            await self._check_end()
        return count

    async def _why_lost(self) -> str:
        status = None
        with anyio.move_on_after(ENDING):
            status = await self._ended()
        if status is None:
            return "the program takes no more, though it runs; see what it says"
        return f"the program ended {_how(status)} before it had taken everything; see what it says"

    async def _check_end(self) -> None:
        """The program gives no more: if it has not ended well, that is no end of the stream. The program of a link may
        live on, for the other direction.
        """
        status = None
        with anyio.move_on_after(ENDING if self.answers else None):
            status = await self._ended()
        if not status:
            return
        problem = f"{self.address}: the program ended {_how(status)}; see what it says"
        if self.answers:
            self._lost = True
            raise ConnectionLost(problem)
        raise TransportError(problem)

    async def _end(self) -> None:
        if self.answers or self._writes is None:
            await super()._end()
            return
        # From the first step on, this is neither whole nor to be gone on with; so whatever ends it leaves it at that.
        self._torn = True
        # Only a reader's end tells what is left in a pipe when all writers are gone.
        witness = os.open(f"/proc/self/fd/{self._writes}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            await super()._end()
            status = await self._ended()
            left = bytearray(4)
            fcntl.ioctl(witness, termios.FIONREAD, left)
        finally:
            os.close(witness)
        if status:
            raise TransportError(f"{self.address}: the program ended {_how(status)}; see what it says")
        if any(left):
            count = int.from_bytes(left, "little")
            raise TransportError(f"{self.address}: the program ended and had not read all, {count} bytes were left")
        self._torn = False

    async def _ended(self) -> int:
        try:
            status = await self._program.ended()
        except anyio.ClosedResourceError as error:
            raise self._used_when_closed() from error
        self._check_open()
        return status

    async def _let_go(self) -> None:
        await to_the_end(self._part)

    async def _part(self) -> None:
        if not self.answers:
            self._program.terminate()
        try:
            await super()._let_go()
        finally:
            await self._program.end(GRACE if self.answers else 0)


class ProgramListener(Listener):
    """Runs the command at each :meth:`accept`."""

    def __init__(self, address: str, *, answers: bool) -> None:
        self.address = address
        self._answers = answers
        self._closed = False

    async def accept(self) -> Transport:
        await anyio.lowlevel.checkpoint()
        if self._closed:
            raise TransportError(f"{self.address}: the listener was closed; open a new one")
        return _start(self.address, reads=True, writes=self._answers)

    async def aclose(self) -> None:
        self._closed = True


@asynccontextmanager
async def connect(address: str, options: Options) -> AsyncIterator[Transport]:
    """Run the command, with its input to write to; as a link, with its output to read from, too."""
    await anyio.lowlevel.checkpoint()
    async with _start(address, reads=options.answers, writes=True) as transport:
        yield transport


@asynccontextmanager
async def listen(address: str, options: Options) -> AsyncIterator[Listener]:
    """Name a command with an output to read from; as a link, with its input to write to, too. ``accept`` runs it."""
    await anyio.lowlevel.checkpoint()
    async with ProgramListener(address, answers=options.answers) as listener:
        yield listener


def _start(address: str, *, reads: bool, writes: bool) -> ProgramTransport:
    command = address.removeprefix("exec:")
    ours: list[int] = []
    theirs: list[int] = []
    try:
        try:
            if writes:
                end, our_end = os.pipe()
                theirs.append(end)
                ours.append(our_end)
            if reads:
                our_end, end = os.pipe()
                theirs.append(end)
                ours.append(our_end)
            stdin = theirs[0] if writes else subprocess.DEVNULL
            stdout = theirs[-1] if reads else 2
            program = Program(command, stdin, stdout)
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise TransportError(f"{address}: the program can't be started ({why}); try the command by itself") from error
    logger.debug("%s: runs", address)
    return ProgramTransport(
        address, program, ours[-1] if reads else None, ours[0] if writes else None, answers=reads and writes
    )
