"""A file as a transport: written to the side and named when it is whole, read from its start.

Threads write it and read it, in large blocks and never one chunk at a time, for a file blocks; only what the page cache
has is read in line. Opening, finishing and closing are one step each, in a worker thread that is never abandoned.
Invariants:

- The final name appears only in ``finish``, after the content is durable; until then it is a hidden ``.partial`` file.
  When ``finish`` fails after that, the name is taken back; a file that was replaced can't be, and the error says so.
- A name that exists is never replaced unless that was asked for: ``link`` decides it, without a race.
- The descriptor is not closed under a thread that uses it: closing waits for those that read or write, and for
  ``_lock``, which finishing holds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import anyio.to_thread

from vfiostream.buffers import Buffer
from vfiostream.errors import LocalProtocolError, TransportError, UsageError
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.options import Options
from vfiostream.transports.read_ahead import ReadAhead
from vfiostream.transports.unsent import IOV_MAX
from vfiostream.transports.write_behind import WriteBehind

logger = logging.getLogger("vfiostream.transport")

OPTIONS = frozenset({"replace", "answers"})

CLOSE_TIMEOUT = 5.0
"""Seconds ``aclose`` waits for a file system that hangs; closing then goes on by itself."""

_ADVICE = {
    errno.EACCES: "change its permissions or choose another path",
    errno.EDQUOT: "free some space or raise the quota",
    errno.EFBIG: "raise the limit on file sizes or choose another file system",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ENOENT: "check the path; folders are not made",
    errno.ENOSPC: "free some space or choose another file system",
    errno.ENOTDIR: "check the path",
    errno.EPERM: "change its permissions or choose another path",
    errno.EROFS: "choose a file system that can be written",
}


def _failure(address: str, doing: str, error: OSError) -> TransportError:
    advice = _ADVICE.get(error.errno or 0, "check the file system and its device")
    return TransportError(f"{address}: {doing} failed ({error.strerror}); {advice}")


class _OpenFile(Transport):
    """What both directions share: a descriptor that worker threads use and that is closed once."""

    def __init__(self, address: str, fd: int) -> None:
        self.address = address
        self.answers = False
        self._fd = fd
        self._lock = threading.Lock()
        self._closed = False

    async def aclose(self) -> None:
        self._closed = True
        try:
            await self._stop()
        finally:
            with anyio.move_on_after(CLOSE_TIMEOUT, shield=True) as scope:
                await anyio.to_thread.run_sync(self._close, abandon_on_cancel=True)
            if scope.cancelled_caught:
                logger.warning("%s: the file system does not answer; closing goes on behind", self.address)

    async def _stop(self) -> None:
        """Let calls go that wait for a thread."""

    def _close(self) -> None:
        with self._lock:
            if self._fd < 0:
                return
            fd, self._fd = self._fd, -1
            try:
                self._let_go(fd)
            except OSError as error:
                logger.warning("%s: closing failed: %s", self.address, error.strerror)
        logger.debug("%s: closed", self.address)

    def _let_go(self, fd: int) -> None:
        os.close(fd)

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _failure(self.address, doing, error) from error
        except anyio.ClosedResourceError as error:
            raise TransportError(f"{self.address}: the file was closed while in use; open it again") from error

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"{self.address}: the file was closed; open it again")


class FileWriter(_OpenFile):
    """A file being written. A ``send`` copies, and waits only for room; an error of writing is raised by the next call.

    It takes :data:`~vfiostream.transports.write_behind.BLOCKS` blocks of memory. Cancelling ``finish`` takes effect
    before the file gets its name, or after all is done.
    """

    def __init__(self, address: str, fd: int, folder: int, partial: str, name: str, *, replace: bool) -> None:
        super().__init__(address, fd)
        self._folder = folder
        self._partial = partial
        self._name = name
        self._replace = replace
        self._behind = WriteBehind(fd)
        self._torn = False
        self._finished = False

    async def send(self, buffers: Sequence[Buffer]) -> None:
        self._check_can_write()
        await anyio.lowlevel.checkpoint_if_cancelled()
        with self._translated("writing"):
            await self._behind.ready()
            # Set until all is taken; so whatever ends the call in between leaves it set.
            self._torn = True
            for buffer in buffers:
                await self._behind.write(buffer)
            self._torn = False

    async def finish(self) -> None:
        self._check_can_write()
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._torn = True
        with self._translated("writing"):
            await self._behind.flush()
        await anyio.to_thread.run_sync(self._publish)

    async def receive(self, into: Sequence[memoryview], least: int = 1) -> int:
        raise LocalProtocolError(f"{self.address}: a file opened for writing can't be read")

    def _publish(self) -> None:
        with self._lock:
            self._check_open()
            try:
                os.fsync(self._fd)
                self._give_name()
            except FileExistsError as error:
                raise _exists(self.address) from error
            except OSError as error:
                raise _failure(self.address, "finishing", error) from error
            try:
                if not self._replace:
                    _unlink_if_there(self._folder, self._partial)
                os.fsync(self._folder)
            except OSError as error:
                raise self._failed_when_named(error) from error
            self._torn = False
            self._finished = True
        logger.debug("%s: written and durable", self.address)

    def _give_name(self) -> None:
        if self._replace:
            os.replace(self._partial, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        else:
            _link(self._folder, self._partial, self._name)

    def _failed_when_named(self, error: OSError) -> TransportError:
        """The file has its name, and then ``error`` came: take the name back, unless the file before it is gone."""
        if not self._replace:
            try:
                self._take_name_back()
            except OSError as failed:
                logger.debug("%s: the name can't be taken back: %s", self.address, failed.strerror)
            else:
                return _failure(self.address, "finishing", error)
        return TransportError(
            f"{self.address}: finishing failed ({error.strerror}) when the file was whole under its name; it is there "
            "but may not be durable: check the file system, and remove the file if it is not wanted"
        )

    def _take_name_back(self) -> None:
        try:
            named = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if os.path.samestat(named, os.fstat(self._fd)):  # else somebody has given the name to another file
            os.unlink(self._name, dir_fd=self._folder)

    async def _stop(self) -> None:
        await self._behind.stop()

    def _let_go(self, fd: int) -> None:
        self._behind.join()
        try:
            if not self._finished:
                _unlink_if_there(self._folder, self._partial)
        finally:
            os.close(self._folder)
            os.close(fd)

    def _check_can_write(self) -> None:
        self._check_open()
        if self._finished:
            raise LocalProtocolError(f"{self.address}: nothing can be sent or finished after finish")
        if self._torn:
            raise TransportError(f"{self.address}: an earlier write stopped part-way; start over with a new file")


class FileReader(_OpenFile):
    """A file being read.

    What the page cache has is read in line: that takes no longer than copying it. From the first piece on that it does
    not have, the rest is read ahead, past the page cache, which takes
    :data:`~vfiostream.transports.read_ahead.BLOCKS` blocks of memory.
    """

    def __init__(self, address: str, fd: int) -> None:
        super().__init__(address, fd)
        self._offset = 0
        """Moved when a call returns, so that a call that is cut off loses nothing."""
        self._flags = 0 if _lives_in_memory(fd) else os.RWF_NOWAIT
        self._ahead: ReadAhead | None = None

    async def send(self, buffers: Sequence[Buffer]) -> None:
        raise LocalProtocolError(f"{self.address}: a file opened for reading can't be written")

    async def finish(self) -> None:
        raise LocalProtocolError(f"{self.address}: a file opened for reading can't be finished")

    async def receive(self, into: Sequence[memoryview], least: int = 1) -> int:
        self._check_open()
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        with self._translated("reading"):
            if self._ahead is None:
                try:
                    count = os.preadv(self._fd, into[:IOV_MAX], self._offset, self._flags)
                except OSError as error:
                    if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                        raise
                    # Where the file system can't tell what the cache has, it is not passed by: it may have everything.
                    self._ahead = ReadAhead(self._fd, self._offset, direct=error.errno == errno.EAGAIN)
                    logger.debug("%s: reading ahead from %d on", self.address, self._offset)
                else:
                    self._offset += count
                    return count
            return await self._ahead.receive(into)

    async def _stop(self) -> None:
        if self._ahead is not None:
            await self._ahead.stop()

    def _let_go(self, fd: int) -> None:
        if self._ahead is not None:
            self._ahead.join()
        super()._let_go(fd)


class FileListener(Listener):
    """Opens the file at each :meth:`accept`, from its start."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._closed = False

    async def accept(self) -> Transport:
        if self._closed:
            raise TransportError(f"{self.address}: the listener was closed; open a new one")
        return await anyio.to_thread.run_sync(_open_to_read, self.address)

    async def aclose(self) -> None:
        self._closed = True


@asynccontextmanager
async def connect(address: str, options: Options) -> AsyncIterator[Transport]:
    """Begin a file of mode 0600. One that exists is refused, or replaced by ``finish`` with ``options.replace``."""
    async with await anyio.to_thread.run_sync(_open_to_write, address, options.replace) as writer:
        yield writer


@asynccontextmanager
async def listen(address: str, options: Options) -> AsyncIterator[Listener]:
    """Name a file to be read; whether it can be is known at ``accept``."""
    await anyio.lowlevel.checkpoint()
    async with FileListener(address) as listener:
        yield listener


def _open_to_write(address: str, replace: bool) -> FileWriter:
    path = address.removeprefix("file:")
    folder_path, name = os.path.split(path)
    if name in ("", ".", ".."):
        raise UsageError(f"{address!r} names a folder; name a file in it")
    with contextlib.ExitStack() as undo:
        # All names are relative to the folder's descriptor: the file is finished where it was begun, even if the
        # folder gets another name or the process another working directory.
        try:
            folder = os.open(folder_path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _failure(address, "opening the folder", error) from error
        undo.callback(os.close, folder)
        _check_free(address, folder, name, replace)
        partial = f".{name}.{secrets.token_hex(4)}.partial"
        try:
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        except OSError as error:
            raise _failure(address, "making the file", error) from error
        undo.callback(os.close, fd)
        undo.callback(_unlink_if_there, folder, partial)
        if not replace:
            _check_links(address, folder, partial)
        try:
            writer = FileWriter(address, fd, folder, partial, name, replace=replace)
        except OSError as error:
            raise _failure(address, "making the file", error) from error
        undo.pop_all()
    logger.debug("%s: writing to %s", address, partial)
    return writer


def _check_free(address: str, folder: int, name: str, replace: bool) -> None:
    try:
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _failure(address, "making the file", error) from error
    if not stat.S_ISREG(mode):
        raise TransportError(f"{address}: the name belongs to something that is not a regular file; choose another one")
    if not replace:
        raise _exists(address)


def _check_links(address: str, folder: int, partial: str) -> None:
    """Refuse a file system without hard links now, not in ``finish`` when a guest has been stopped for it."""
    probe = f"{partial}.link"
    try:
        _link(folder, partial, probe)
        os.unlink(probe, dir_fd=folder)
    except OSError as error:
        raise TransportError(
            f"{address}: the file system has no hard links ({error.strerror}), without which a file that appears "
            "meanwhile could be replaced; choose another file system or accept that with --force"
        ) from error


def _open_to_read(address: str) -> FileReader:
    path = address.removeprefix("file:")
    with contextlib.ExitStack() as undo:
        try:
            # O_NONBLOCK: opening a FIFO nobody writes to must not hang; regular files don't know it.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            undo.callback(os.close, fd)
            mode = os.fstat(fd).st_mode
        except OSError as error:
            raise _failure(address, "opening it", error) from error
        if not stat.S_ISREG(mode):
            raise TransportError(f"{address}: it is not a regular file; name the file a checkpoint was written to")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        undo.pop_all()
    logger.debug("%s: reading", address)
    return FileReader(address, fd)


def _lives_in_memory(fd: int) -> bool:
    """Whether reading never waits for a disk (but for one that is swapped to). Only files of tmpfs, hugetlbfs and memfd
    have seals, and tmpfs does not know RWF_NOWAIT.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def _link(folder: int, existing: str, name: str) -> None:
    os.link(existing, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)


def _unlink_if_there(folder: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        logger.debug("%s is gone already", name)


def _exists(address: str) -> TransportError:
    return TransportError(f"{address}: the file exists; choose another name, or replace it with --force")
