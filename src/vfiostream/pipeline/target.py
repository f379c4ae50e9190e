"""The target of a migration, and the reader of a checkpoint.

Tasks: the reader takes what comes and checks it, frame by frame; the loader, in order, gives it to devices and guest
memory; beside them threads that decompress.

Content is received in its place (a device's region, guest memory) if its place is known and nothing that came before is
still with the loader; else into memory of the byte budget, which the loader gives back. So a copy is made just where it
lets the link go on while a driver works. The place follows from what was announced and checked before, never from the
frame that is being received; and what lies in a region reaches the device by the loader only, after the checks. Once
anything is wrong the loader is cancelled: nothing more is given to a device.

The task group has ended before the commit is read; what follows is one straight line (``docs/switchover.md``).
"""

from __future__ import annotations

import logging
import math
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from time import monotonic

import anyio
import anyio.lowlevel

from vfiostream import _accel
from vfiostream.buffers import Buffer
from vfiostream.devices.contract import Device
from vfiostream.devices.fit import fit
from vfiostream.ending import to_the_end
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
from vfiostream.pipeline.frames import FrameReader, Incoming, part
from vfiostream.pipeline.progress import Downtime, Progress, Summary
from vfiostream.pipeline.settings import Settings
from vfiostream.pipeline.workers import Workers, threads
from vfiostream.protocol import limits, records
from vfiostream.protocol.framing import Prefix
from vfiostream.protocol.payload import Decompressor, Piece
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
    RecordType,
    Round,
    RoundEnd,
    State,
    Welcome,
)
from vfiostream.protocol.sessions import Phase, TargetSession
from vfiostream.transports.contract import Transport
from vfiostream.version import SOFTWARE

log = logging.getLogger("vfiostream.pipeline")

TURNS = 8
"""Frames received in their place before others get their turn: about a millisecond's worth."""


@dataclass(slots=True)
class _Window:
    """The pages of a range that are being received."""

    area: GuestRange
    start: int
    """Of the window, in bytes from the start of the range."""
    memory: memoryview
    runs: array[int]
    """Pages that come: of each run its first page and how many."""
    index: int = 0
    """Of the run that is next."""
    skip: int = 0
    """Pages of it that have come."""

    @property
    def is_done(self) -> bool:
        return self.index == len(self.runs) // 2

    @property
    def pos(self) -> int:
        """Where the next page goes, in bytes from the start of the window."""
        return (self.runs[2 * self.index] + self.skip) * limits.PAGE_SIZE

    @property
    def run_left(self) -> int:
        """Bytes of the run that are still to come."""
        return (self.runs[2 * self.index + 1] - self.skip) * limits.PAGE_SIZE

    def holds(self, size: int) -> bool:
        """Whether the next ``size`` bytes go in one piece."""
        return not self.is_done and size <= self.run_left

    def is_present(self, size: int) -> bool:
        """Whether the next ``size`` bytes can be written in our mapping without a fault for each page."""
        return self.start + self.pos + size <= self.area.present

    def advance(self, size: int) -> None:
        """``size`` bytes came, not more than :attr:`run_left`."""
        self.skip += size // limits.PAGE_SIZE
        if self.skip == self.runs[2 * self.index + 1]:
            self.index, self.skip = self.index + 1, 0


@dataclass(slots=True, eq=False)
class _Pending:
    """A frame between reader and loader."""

    frame: Incoming
    packed: bool = False
    """Whether a decompressor still has it."""
    delivers: bool = False
    """Whether it is in its place, and the driver is to take what is there."""


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
        limit = settings.budget - transport.keeps
        chunk = settings.chunk if transport.answers else largest_chunk(limit)
        self._budget = Budget(limit, chunk)
        self._session = TargetSession(chunk=chunk, answers=transport.answers)
        self._frames = FrameReader(transport, self._session, self._budget)
        self._decompressors = Workers(Decompressor, threads())
        self._windows: dict[int, _Window] = {}
        self._zeros = memoryview(b"")
        self._saying = anyio.Lock()
        """Around what is said to the source: reader and loader both let go of frames."""
        self._spent = 0
        """Bytes of frames that were let go of."""
        self._granted = 0
        self._stopped = False
        """The devices were told to stop by us."""
        self._warnings: list[str] = []
        self._times: list[float] = []
        """When the source was stopped, as it said, and when the phases of the downtime ended that are seen here."""
        self._to_load: deque[_Pending] = deque()
        """What the loader has not loaded; the first is what it loads."""
        self._news = anyio.Event()
        """Set when there may be something to do for the loader."""

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
            (*(device.caveat for device in self._devices.values() if device.caveat), *self._warnings),
        )

    # ---- before: does it fit?

    async def _greet(self) -> None:
        frame = await self._frames.read()
        if frame is None:
            raise self._frames.ended()
        frame.release()
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
            self._granted = self._budget.limit
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
            reasons, notes, _ = await fit(describe.described(entry).description, device)
            for note in notes:
                log.info("%s: %s", device.name, note)
            found += [f"{device.name}: {problem}" for problem in reasons]
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
            tasks.start_soon(self._read_to_the_end, tasks.cancel_scope)
            if "zstd" in self._session.features:
                tasks.start_soon(self._decompressors.run)
            await self._load_all()
            tasks.cancel_scope.cancel()

    async def _read_to_the_end(self, all_tasks: anyio.CancelScope) -> None:
        try:
            await self._read_all()
        except BaseException:
            # At once: asyncio's group takes some turns of the loop, in which a driver would still get something.
            all_tasks.cancel()
            raise

    async def _read_all(self) -> None:
        for turn in count():
            # What has come is read without waiting: let the loader work, and everybody else now and then.
            if self._to_load or turn % TURNS == 0:
                await anyio.lowlevel.checkpoint()
            head = await self._frames.head()
            if head is None:
                raise self._frames.ended()
            prefix, header = head
            place = self._place(prefix)
            if place is None:
                frame = await self._frames.leased_body(prefix, header)
                pending = _Pending(frame)
                if not frame.pieces:
                    pending.packed = True
                    self._decompressors.submit(partial(_decompress, frame), partial(self._unpacked, pending))
            else:
                with place:
                    pending = _Pending(await self._frames.body(prefix, header, place))
                self._take_in_place(pending)
            self._progress.transferred = self._frames.transferred
            match pending.frame.record:
                case Abort() as abort:
                    raise PeerAborted(abort.code, abort.reason)
                case Memory() | Config() | Pages() if place is not None and not pending.delivers:
                    await self._let_go(pending.frame)
                case record:
                    self._to_load.append(pending)
                    self._news.set()
                    if isinstance(record, End):
                        return

    def _place(self, prefix: Prefix) -> memoryview | None:
        """Where the payload of a frame goes if it is what is due next: with nothing before it that is not loaded, in
        one piece, and where it can be received without a fault for each page.
        """
        if self._to_load or prefix.flags:
            return None
        size = prefix.content_size
        if prefix.type in (RecordType.MEMORY, RecordType.CONFIG) and prefix.stream in self._devices:
            room = self._devices[prefix.stream].room(size)
            if len(room) == size:
                return room
            room.release()
        elif prefix.type == RecordType.PAGES and prefix.stream in self._windows:
            window = self._windows[prefix.stream]
            if window.holds(size) and window.is_present(size):
                return window.memory[window.pos : window.pos + size]
        return None

    def _take_in_place(self, pending: _Pending) -> None:
        """Believe what was received in its place, now that it is checked."""
        record, size = pending.frame.record, pending.frame.prefix.content_size
        if isinstance(record, Pages):
            self._advance(record.stream, size)
        elif isinstance(record, Memory | Config):
            pending.delivers = self._devices[record.stream].fill(size)
        self._count(size)

    def _advance(self, stream: int, size: int) -> None:
        window = self._windows[stream]
        window.advance(size)
        self._close_if_done(stream, window)

    def _close_if_done(self, stream: int, window: _Window) -> None:
        if window.is_done:
            del self._windows[stream]

    def _unpacked(self, pending: _Pending, content: Buffer) -> None:
        pending.frame.pieces = [Piece(len(content), content)]
        pending.packed = False
        self._news.set()

    async def _load_all(self) -> None:
        while True:
            while not self._to_load or self._to_load[0].packed:
                self._news = anyio.Event()
                await self._news.wait()
            pending = self._to_load[0]
            frame = pending.frame
            if pending.delivers:
                assert isinstance(frame.record, Memory | Config)
                await self._devices[frame.record.stream].deliver()
            else:
                await self._load(frame)
            self._to_load.popleft()
            if isinstance(frame.record, End):
                frame.release()
                return
            await self._let_go(frame)

    async def _load(self, frame: Incoming) -> None:
        match frame.record:
            case Memory() as record:
                await self._load_content(self._devices[record.stream], frame)
            case Pages() as record:
                self._load_pages(record, frame)
            case Bitmap() as record:
                area = self._ranges[record.stream]
                start = record.page * limits.PAGE_SIZE
                memory = area.view[start : start + record.pages * limits.PAGE_SIZE]
                runs = _accel.bitmap_runs(_whole(frame), record.pages)
                self._windows[record.stream] = _Window(area, start, memory, runs)
            case Capture() as record:
                await self._devices[record.stream].begin_capture(record.size)
            case Round() as record:
                self._progress.round = record.number
                self._progress.round_content = 0
            case RoundEnd():
                self._mark_end()
                if self._transport.answers and self._session.phase is Phase.ROUND_SENT:
                    await self._acknowledge("round")
            case State():
                self._times.append(monotonic())
                self._progress.phase = "stop-and-copy"
            case Pci() as record:
                await self._devices[record.stream].load_pci_config(_whole(frame))
                self._count(frame.prefix.content_size)
            case Config() as record:
                device = self._devices[record.stream]
                if record.pos == 0:
                    await device.begin_config(record.size)
                await self._load_content(device, frame)
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

    async def _load_content(self, device: Device, frame: Incoming) -> None:
        for piece in frame.pieces:
            await device.write(self._zeros[: piece.size] if piece.data is None else piece.data)
        self._count(frame.prefix.content_size)

    def _load_pages(self, record: Pages, frame: Incoming) -> None:
        window = self._windows[record.stream]
        for piece in frame.pieces:
            if piece.data is None:
                left = piece.size
                while left:
                    size = min(left, window.run_left)
                    window.area.zero(window.start + window.pos, size)
                    window.advance(size)
                    left -= size
            elif window.area.present < window.area.length:
                data = memoryview(piece.data)
                while data:
                    size = min(len(data), window.run_left)
                    window.area.write(window.start + window.pos, data[:size])
                    window.advance(size)
                    data = data[size:]
            else:
                window.index, window.skip = _accel.scatter(
                    window.memory, window.runs, window.index, window.skip, piece.data, limits.PAGE_SIZE
                )
        self._count(frame.prefix.content_size)
        self._close_if_done(record.stream, window)

    def _mark_end(self) -> None:
        """A phase of the downtime ends, if the source is stopped."""
        if self._times:
            self._times.append(monotonic())

    def _count(self, size: int) -> None:
        self._progress.content += size
        self._progress.round_content += size

    async def _let_go(self, frame: Incoming) -> None:
        """Let go of a frame that is loaded, and give new credit once a quarter of the budget was let go of: seldom, and
        always with a frame's worth left.
        """
        frame.release()
        self._spent += frame.prefix.frame_size
        budget = self._budget.limit
        if self._transport.answers and self._spent + budget - self._granted >= budget // 4:
            async with self._saying:
                self._granted = self._spent + budget
                await self._say(Credit(self._granted))

    async def _acknowledge(self, of: str) -> None:
        async with self._saying:
            self._granted = self._spent + self._budget.limit
            await self._say(Ack(of, self._session.rounds, self._granted))

    async def _say(self, record: Credit | Ack | Welcome) -> None:
        """Send a record to the source. It is small and the source always reads, so it is never cut in half."""
        frame = self._session.send(record)
        with anyio.CancelScope(shield=True), anyio.move_on_after(self._settings.patience) as scope:
            await self._transport.send(frame)
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
            frame.release()
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
                    await device.quiesce()
                for device in self._devices.values():
                    await device.run()
        except (VfiostreamError, TimeoutError) as error:
            raise await self._refuse(error) from error
        if self._transport.answers:
            try:
                with anyio.fail_after(self._settings.patience):
                    await self._acknowledge("running")
                    await self._transport.finish()
            except (TransportError, TimeoutError) as error:
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

    def _last_words(self, error: BaseException) -> Sequence[Buffer]:
        """The ABORT that tells the source why; nothing where it has said one itself."""
        if self._session.phase in (Phase.ABORTED, Phase.DONE):
            return ()
        told = failure.told(error, "the target was cancelled: nothing of this runs there")
        return self._abort(failure.abort_code(error), told, stopped=True)

    def _abort(self, code: str, problem: str, *, stopped: bool) -> Sequence[Buffer]:
        return self._session.send(Abort(code, failure.reason(problem), stopped))


def _whole(frame: Incoming) -> Buffer:
    """The content of a frame, in one piece."""
    (piece,) = frame.pieces
    return bytes(piece.size) if piece.data is None else piece.data


def _decompress(frame: Incoming, decompressor: Decompressor) -> Buffer:
    assert frame.lease is not None
    prefix = frame.prefix
    return decompressor.content(frame.lease.view, prefix.flags, prefix.content_size, frame.name)


def _areas(areas: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{length} bytes at {address:#x}" for address, length in areas) or "none"
