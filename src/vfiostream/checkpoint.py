"""A device into a file and back: :func:`save`, :func:`restore`; and what a file says: :func:`inspect`, :func:`verify`.

A checkpoint is the stream of a migration, written down (``docs/format.md``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.lowlevel

from vfiostream.description import stored_hello
from vfiostream.devices.contract import Device, as_sequence
from vfiostream.errors import StreamError, TransportError, UsageError
from vfiostream.guest import Guest
from vfiostream.pipeline.budget import Budget, enough_for, largest_chunk
from vfiostream.pipeline.frames import FrameReader
from vfiostream.pipeline.progress import Progress, Summary
from vfiostream.pipeline.settings import Settings
from vfiostream.pipeline.source import Policy, Source
from vfiostream.pipeline.target import Target
from vfiostream.policy import Precopy
from vfiostream.protocol import framing, limits, records
from vfiostream.protocol.payload import Decompressor
from vfiostream.protocol.records import Hello, RecordType
from vfiostream.protocol.sessions import Phase, TargetSession
from vfiostream.transports.contract import Transport


async def save(
    device: Device | Sequence[Device],
    transport: Transport,
    *,
    guest: Guest | None = None,
    policy: Policy | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write a checkpoint of ``device`` (or several, at one instant), and the memory of ``guest``, to ``transport`` (of
    ``connect("file:...")``, or of another that keeps it, asked for with ``Options(answers=False)``). Returns when it is
    durable under its name, or as far as the transport knows. The device is stopped only while what the rounds of
    precopy left is read, and runs on whatever happens then.

    Arguments and ownership as in :func:`vfiostream.migrate.send`. Raises whatever
    :class:`~vfiostream.errors.VfiostreamError` ended it; the device runs then (except after
    :class:`~vfiostream.errors.SourceStuck`), and there is no file; an older one that was to be replaced is as it was.
    Should the disk fail so late that the name can't be taken back, the error says that the file is there.
    """
    if transport.answers:
        raise UsageError(f"{transport.address} is no file: use send to move a device there")
    source = Source(
        as_sequence(device),
        guest or Guest(),
        transport,
        policy or Precopy(),
        settings or Settings(),
        progress or Progress(),
    )
    return await source.run()


async def restore(
    transport: Transport,
    device: Device | Sequence[Device],
    *,
    guest: Guest | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Load a checkpoint from ``transport`` (of ``listen("file:...")``) into ``device`` and let it run.

    Arguments, ownership and errors as in :func:`vfiostream.migrate.receive`: a checkpoint that is damaged or not
    whole raises :class:`~vfiostream.errors.StreamError`, and the device stays stopped.
    """
    if transport.answers:
        raise UsageError(f"{transport.address} is no file: use receive to take a device from there")
    return await Target(
        as_sequence(device), guest or Guest(), transport, settings or Settings(), progress or Progress()
    ).run()


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a checkpoint."""

    hello: Hello
    """Devices and guest memory, as the source described them."""
    rounds: int
    frames: int
    size: int
    """Bytes of the file."""
    content: int
    """Bytes of content: of device memory, guest memory and config, each round's."""
    memory: int
    """Bytes of device memory of :attr:`content`."""
    pages: int
    """Bytes of guest memory of :attr:`content`."""
    config: int
    """Bytes of config and PCI config space of :attr:`content`."""
    complete: bool
    """Whether the file ends as a checkpoint ends, with COMMIT."""


async def verify(transport: Transport, *, budget: int | None = None) -> Contents:
    """Read a whole checkpoint from ``transport`` (of ``listen("file:...")``) and check everything that can be checked
    without a device: every check value, every position, every compressed payload. Raises
    :class:`~vfiostream.errors.StreamError` naming the first record that is wrong.
    """
    settings = Settings(budget=enough_for(limits.MAX_CONTENT) if budget is None else budget)
    session = TargetSession(chunk=largest_chunk(settings.budget), answers=False)
    frames = FrameReader(transport, session, Budget(settings.budget, session.chunk))
    try:
        return await _read_all(frames, session)
    except StreamError as error:
        error.address = transport.address
        raise


async def _read_all(frames: FrameReader, session: TargetSession) -> Contents:
    decompressor = Decompressor()
    hello = None
    count = 0
    sizes = dict.fromkeys(RecordType, 0)
    while session.phase is not Phase.DONE:
        await anyio.lowlevel.checkpoint()  # what the page cache has is read without waiting
        frame = await frames.read()
        if frame is None:
            raise frames.ended()
        count += 1
        sizes[frame.record.type] += frame.prefix.content_size
        if isinstance(frame.record, Hello):
            hello = frame.record
        if frame.prefix.flags == framing.FLAG_ZSTD and not frame.pieces:
            assert frame.lease is not None
            await anyio.to_thread.run_sync(
                decompressor.content, frame.lease.view, frame.prefix.flags, frame.prefix.content_size, frame.name
            )
        frame.release()
    await frames.expect_end()
    assert hello is not None
    return _contents(hello, sizes, session.rounds, count, frames.transferred, complete=True)


async def inspect(path: Path) -> Contents:
    """Say what is in a checkpoint, quickly: reads the description and the frames' prefixes, and skips the payloads, so
    what it says is not :func:`verify`'s word. Raises :class:`~vfiostream.errors.StreamError` where the file is no
    checkpoint, and :class:`~vfiostream.errors.TransportError` where it can't be read. A file that is cut is told by
    ``complete``.
    """
    return await anyio.to_thread.run_sync(_inspect, path)


def _inspect(path: Path) -> Contents:
    where = f"file:{path}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TransportError(f"{where} can't be opened: {error.strerror}") from error
    try:
        return _walk(fd)
    except OSError as error:
        raise TransportError(f"{where} can't be read: {error.strerror}") from error
    except StreamError as error:
        error.address = where
        raise
    finally:
        os.close(fd)


def _walk(fd: int) -> Contents:
    size = os.fstat(fd).st_size
    hello = stored_hello(fd)
    seed = framing.session_seed(hello.session)
    sizes = dict.fromkeys(RecordType, 0)
    frames = rounds = 0
    offset, last = 0, RecordType.HELLO
    while offset + framing.PREFIX_SIZE <= size:
        raw = os.pread(fd, framing.PREFIX_SIZE, offset)
        try:
            prefix = framing.parse_prefix(raw, seed if frames else 0)
        except ValueError as error:
            raise StreamError(f"record {frames + 1}", str(error)) from error
        if not records.is_known(prefix.type) or offset + prefix.frame_size > size:
            break
        last = RecordType(prefix.type)
        sizes[last] += prefix.content_size
        rounds += last is RecordType.ROUND
        frames += 1
        offset += prefix.frame_size
    complete = offset == size and last is RecordType.COMMIT
    return _contents(hello, sizes, rounds, frames, size, complete=complete)


def _contents(
    hello: Hello, sizes: dict[RecordType, int], rounds: int, frames: int, size: int, *, complete: bool
) -> Contents:
    memory, pages = sizes[RecordType.MEMORY], sizes[RecordType.PAGES]
    config = sizes[RecordType.CONFIG] + sizes[RecordType.PCI]
    return Contents(hello, rounds, frames, size, memory + pages + config, memory, pages, config, complete)
