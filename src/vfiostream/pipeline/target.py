"""The target of a migration, and the reader of a checkpoint.

Tasks: the reader takes from the byte budget and checks frame by frame; decompressors; the loader, in order, gives to
devices and guest memory and gives back. Once anything is wrong the loader is cancelled: nothing more is given to a
device. The task group has ended before the commit is read; what follows is one straight line
(``docs/switchover.md``).
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import monotonic

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from vfiostream import _accel
from vfiostream.buffers import Buffer
from vfiostream.devices.contract import Device
from vfiostream.devices.fit import unfit
from vfiostream.errors import (
    ConnectionLost,
    DeviceTimeout,
    Incompatible,
    OutcomeUnknown,
    PeerAborted,
    TransportError,
    VfiostreamError,
)
from vfiostream.guest import Guest, GuestRange
from vfiostream.pipeline import describe, failure
from vfiostream.pipeline.budget import Budget, largest_chunk
from vfiostream.pipeline.ending import to_the_end
from vfiostream.pipeline.frames import FrameReader, Incoming, part
from vfiostream.pipeline.progress import Downtime, Progress, Summary
from vfiostream.pipeline.settings import Settings
from vfiostream.protocol import framing, limits, records
from vfiostream.protocol.payload import Decompressor
from vfiostream.protocol.records import (
    Abort,
    Ack,
    Bitmap,
    Capture,
    Commit,
    Config,
    Credit,
    End,
    Hello,
    Memory,
    Pages,
    Pci,
    Record,
    Round,
    RoundEnd,
    State,
    Welcome,
)
from vfiostream.protocol.sessions import Phase, TargetSession
from vfiostream.transports.contract import Transport
from vfiostream.version import SOFTWARE

log = logging.getLogger("vfiostream.pipeline")

DECOMPRESSORS = 2


@dataclass(slots=True)
class _Window:
    """The pages of a range that are being received."""

    memory: memoryview
    runs: array[int]
    index: int = 0
    skip: int = 0


@dataclass(slots=True, eq=False)
class _Pending:
    """A frame between reader and loader."""

    frame: Incoming
    ready: anyio.Event | None = None
    """Set when it is decompressed; None where nothing has to be waited for."""


class Target:
    """One migration into ``devices``. Used once: :meth:`run`."""

    def __init__(
        self,
        devices: Sequence[Device],
        guest: Guest,
        transport: Transport,
        settings: Settings,
        progress: Progress,
    ) -> None:
        self._devices = dict(enumerate(devices, 1))
        self._ranges: dict[int, GuestRange] = dict(enumerate(guest.ranges, len(devices) + 1))
        self._transport = transport
        self._settings = settings
        self._progress = progress
        # Over a link the WELCOME settles the chunk; a file brings its own.
        chunk = settings.chunk if transport.answers else largest_chunk(settings.budget)
        self._budget = Budget(settings.budget, chunk)
        self._session = TargetSession(chunk=chunk, answers=transport.answers)
        self._frames = FrameReader(transport, self._session, self._budget)
        self._windows: dict[int, _Window] = {}
        self._zeros = memoryview(b"")
        self._spent = 0
        """Bytes of frames that were let go of."""
        self._granted = 0
        self._stopped = False
        """The devices were told to stop by us."""
        self._warnings: list[str] = []
        self._times: list[float] = []
        """When the source was stopped, as it said, and when the phases of the downtime ended that are seen here."""
        self._checked: MemoryObjectSendStream[_Pending]
        self._to_load: MemoryObjectReceiveStream[_Pending]
        self._checked, self._to_load = anyio.create_memory_object_stream[_Pending](math.inf)
        self._packed: MemoryObjectSendStream[_Pending]
        self._to_decompress: MemoryObjectReceiveStream[_Pending]
        self._packed, self._to_decompress = anyio.create_memory_object_stream[_Pending](math.inf)

    async def run(self) -> Summary:
        """Load the devices and let them run; returns when they do. Raises what went wrong, with the devices stopped;
        :class:`~vfiostream.errors.OutcomeUnknown` where a driver left open whether it runs.
        """
        self._began = monotonic()
        try:
            await self._greet()
            await self._transfer()
            await self._await_commit()
        except BaseException as error:
            cause = failure.cause(error, self._transport.address)
            await to_the_end(partial(self._abandon, cause))
            if cause is error:
                raise
            raise cause from cause.__cause__
        finally:
            for stream in (self._checked, self._to_load, self._packed, self._to_decompress):
                stream.close()
        await to_the_end(self._start)
        self._mark_end()
        self._progress.phase = "done"
        return Summary(
            self._session.rounds,
            self._progress.content,
            self._frames.transferred,
            monotonic() - self._began,
            Downtime(0.0, 0.0, *(late - early for early, late in pairwise(self._times))),
            self._budget.peak,
            tuple(self._warnings),
        )

    # ---- before: does it fit?

    async def _greet(self) -> None:
        frame = await self._frames.read()
        if frame is None:
            raise self._frames.ended()
        frame.lease.release()
        match frame.record:
            case Hello() as hello:
                pass
            case Abort() as abort:
                raise PeerAborted(abort.code, abort.reason)
            case _:
                raise self._frames.ended()
        await self._check_fit(hello)
        self._stopped = True
        for device in self._devices.values():
            await device.start_load()
        for device in self._devices.values():
            for area in self._ranges.values():
                await device.dma_map(area.address, area.length, area.fd, 0)
        if self._transport.answers:
            chunk = min(hello.chunk, self._settings.chunk)
            features = tuple(feature for feature in hello.features if feature in records.FEATURES)
            self._granted = self._settings.budget
            await self._say(Welcome(hello.session, SOFTWARE, features, chunk, self._granted))
        self._zeros = memoryview(bytes(self._session.chunk))
        self._progress.phase = "precopy"

    async def _check_fit(self, hello: Hello) -> None:
        if len(hello.devices) != len(self._devices):
            raise Incompatible(
                f"the source sends {len(hello.devices)} devices, and {len(self._devices)} are here to take"
            )
        found = []
        for entry in hello.devices:
            device = self._devices[entry.stream]
            found += [f"{device.name}: {problem}" for problem in await unfit(describe.described(entry), device)]
        theirs = [(area.address, area.length) for area in hello.ranges]
        ours = [(area.address, area.length) for area in self._ranges.values()]
        if theirs != ours:
            found.append(f"the guest memory differs: the source has {_areas(theirs)}, here is {_areas(ours)}")
        if found:
            raise Incompatible("the source does not fit: " + "; ".join(found))

    # ---- during: the task group

    async def _transfer(self) -> None:
        """Everything up to the END, loaded and checked."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read_all)
            if "zstd" in self._session.features:
                for _ in range(DECOMPRESSORS):
                    tasks.start_soon(self._decompress_all)
            await self._load_all()
            tasks.cancel_scope.cancel()

    async def _read_all(self) -> None:
        while True:
            frame = await self._frames.read()
            if frame is None:
                raise self._frames.ended()
            self._progress.transferred = self._frames.transferred
            pending = _Pending(frame)
            if frame.prefix.flags == framing.FLAG_ZSTD and frame.content is None:
                pending.ready = anyio.Event()
                self._packed.send_nowait(pending)
            match frame.record:
                case Abort() as abort:
                    raise PeerAborted(abort.code, abort.reason)
                case End():
                    self._checked.send_nowait(pending)
                    return
                case _:
                    self._checked.send_nowait(pending)

    async def _decompress_all(self) -> None:
        decompressor = Decompressor()
        async for pending in self._to_decompress:
            frame = pending.frame
            assert pending.ready is not None
            frame.content = await anyio.to_thread.run_sync(
                decompressor.content, frame.lease.view, frame.prefix.flags, frame.prefix.content_size, frame.name
            )
            pending.ready.set()

    async def _load_all(self) -> None:
        async for pending in self._to_load:
            if pending.ready is not None:
                await pending.ready.wait()
            frame = pending.frame
            await self._load(frame.record, self._content(frame))
            frame.content = None
            frame.lease.release()
            self._spent += frame.prefix.frame_size
            if isinstance(frame.record, End):
                return
            await self._grant()

    def _content(self, frame: Incoming) -> Buffer:
        if frame.prefix.flags == framing.FLAG_ZERO:
            return self._zeros[: frame.prefix.content_size]
        if frame.content is not None:
            return frame.content
        return frame.lease.view

    async def _load(self, record: Record, content: Buffer) -> None:
        match record:
            case Memory():
                await self._devices[record.stream].write(content)
                self._count(content)
            case Pages():
                window = self._windows[record.stream]
                window.index, window.skip = _accel.scatter(
                    window.memory, window.runs, window.index, window.skip, content, limits.PAGE_SIZE
                )
                if window.index == len(window.runs) // 2:
                    del self._windows[record.stream]
                self._count(content)
            case Bitmap():
                start = record.page * limits.PAGE_SIZE
                memory = self._ranges[record.stream].view[start : start + record.pages * limits.PAGE_SIZE]
                self._windows[record.stream] = _Window(memory, _accel.bitmap_runs(content, record.pages))
            case Capture():
                await self._devices[record.stream].begin_capture(record.size)
            case Round():
                self._progress.round = record.number
                self._progress.round_content = 0
            case RoundEnd():
                self._mark_end()
                if self._transport.answers and self._session.phase is Phase.ROUND_SENT:
                    await self._acknowledge("round")
            case State():
                self._times.append(monotonic())
                self._progress.phase = "stop-and-copy"
            case Pci():
                await self._devices[record.stream].load_pci_config(content)
                self._count(content)
            case Config():
                device = self._devices[record.stream]
                if record.pos == 0:
                    await device.begin_config(record.size)
                await device.write(content)
                self._count(content)
            case End():
                self._mark_end()
                for device in self._devices.values():
                    await device.finish_load()
                self._progress.phase = "switchover"
                if self._transport.answers:
                    await self._acknowledge("loaded")
                self._mark_end()
            case _:
                pass

    def _mark_end(self) -> None:
        """A phase of the downtime ends, if the source is stopped."""
        if self._times:
            self._times.append(monotonic())

    def _count(self, content: Buffer) -> None:
        self._progress.content += len(content)
        self._progress.round_content += len(content)

    async def _grant(self) -> None:
        """Give new credit once a quarter of the budget was let go of: seldom, and always with a frame's worth left."""
        limit = self._spent + self._settings.budget
        if self._transport.answers and limit - self._granted >= self._settings.budget // 4:
            self._granted = limit
            await self._say(Credit(limit))

    async def _acknowledge(self, of: str) -> None:
        self._granted = self._spent + self._settings.budget
        await self._say(Ack(of, self._session.rounds, self._granted))

    async def _say(self, record: Record) -> None:
        """Send a record to the source. It is small and the source always reads, so it is never cut in half."""
        head, _ = self._session.send(record)
        with anyio.CancelScope(shield=True), anyio.move_on_after(self._settings.patience) as scope:
            await self._transport.send([head])
        if scope.cancelled_caught:
            raise ConnectionLost(f"{self._transport.address}: the source takes no answers")

    # ---- after: the commit

    async def _await_commit(self) -> None:
        """Wait for the COMMIT; for at most the patience, after which it is never acted on: the source waits longer for
        our word than we for its, so what it is told then is final.
        """
        limit = self._settings.patience if self._transport.answers else math.inf
        with anyio.move_on_after(limit) as scope:
            frame = await self._frames.read()
            if frame is None:
                raise self._frames.ended()
            frame.lease.release()
            match frame.record:
                case Commit():
                    if not self._transport.answers:
                        await self._frames.expect_end()
                    return
                case Abort() as abort:
                    raise PeerAborted(abort.code, abort.reason)
                case _:
                    raise self._frames.ended()
        assert scope.cancelled_caught
        raise ConnectionLost(
            f"{self._transport.address}: the source did not commit within {self._settings.patience:g} s; "
            "it runs on, or its own message says otherwise"
        )

    async def _start(self) -> None:
        """Let the devices run, and say so. Goes to its end, which is bounded."""
        try:
            with anyio.fail_after(self._settings.patience):
                for device in self._devices.values():
                    await device.run()
        except (VfiostreamError, TimeoutError) as error:
            raise await self._refuse(error) from error
        if self._transport.answers:
            try:
                await self._acknowledge("running")
                await self._transport.finish()
            except TransportError as error:
                log.warning("%s: the source was not told that the device runs: %s", self._transport.address, error)
                self._warnings.append(f"the device runs, but the source could not be told: {error}")

    async def _refuse(self, error: BaseException) -> VfiostreamError:
        """A driver did not run what it was given: make sure that none does, and tell the source what is certain.
        Returns what is to be raised.
        """
        names = ", ".join(device.name for device in self._devices.values())
        problem = str(error) or f"{names} did not run within {self._settings.patience:g} s of being told to"
        certain = False
        with anyio.move_on_after(self._settings.patience):
            certain = await self._stop_all()
        if self._transport.answers:
            await part(self._transport, self._abort("device", problem, stopped=certain))
        if not certain:
            before = "before the source is resumed" if self._transport.answers else "before anything else"
            return OutcomeUnknown(
                f"{problem}; and then it did not carry out the order to stop, so it may run: look at it {before}"
            )
        return error if isinstance(error, VfiostreamError) else DeviceTimeout(problem)

    async def _stop_all(self) -> bool:
        """Order every device to stop; returns whether all did."""
        certain = True
        for device in self._devices.values():
            try:
                await device.abandon()
            except VfiostreamError as doubt:
                log.warning("%s: whether it is stopped is not known: %s", device.name, doubt)
                certain = False
        return certain

    # ---- instead: the devices stay stopped

    async def _abandon(self, error: BaseException) -> None:
        """Leave the devices stopped, and tell the source why. Goes to its end, which is bounded."""
        log.debug("calling off: %r", error)
        if self._stopped:
            for device in self._devices.values():
                try:
                    await device.abandon()
                except VfiostreamError as failed:
                    # It is never told to run what came. If it never took the order to stop, it runs what it had.
                    log.debug("%s: could not be told to stay stopped: %s", device.name, failed)
        if self._transport.answers:
            await part(self._transport, self._last_words(error))

    def _last_words(self, error: BaseException) -> Buffer:
        """The ABORT that tells the source why; nothing where it has said one itself."""
        if self._session.phase in (Phase.ABORTED, Phase.DONE):
            return b""
        told = failure.told(error, "the target was cancelled: nothing of this runs there")
        return self._abort(failure.abort_code(error), told, stopped=True)

    def _abort(self, code: str, problem: str, *, stopped: bool) -> Buffer:
        head, _ = self._session.send(Abort(code, failure.reason(problem), stopped))
        return head


def _areas(areas: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{length} bytes at {address:#x}" for address, length in areas) or "none"
