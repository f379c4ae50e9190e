"""The source of a migration, and the writer of a checkpoint.

Tasks: the producer (devices, guest memory, policy) takes from the byte budget; the sender, in order, gives back; beside
them threads that compress; over a link, a listener for the target's answers and a watch on its silence. They live in
one task group that has ended before the commit: what follows is one straight line (``docs/switchover.md``).

Whatever fails before the commit ends with the source running.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import pairwise
from time import monotonic
from typing import Protocol

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from vfiostream import _accel
from vfiostream.buffers import Buffer
from vfiostream.devices.contract import Device, Pending
from vfiostream.ending import to_the_end
from vfiostream.errors import (
    ConnectionLost,
    DeviceBroken,
    GuestError,
    NotConverged,
    OutcomeUnknown,
    PeerAborted,
    SourceStuck,
    TransportError,
    VfiostreamError,
)
from vfiostream.guest import Guest, GuestRange
from vfiostream.pipeline import describe, failure
from vfiostream.pipeline.frames import part, read_reply
from vfiostream.pipeline.outbound import Outbound
from vfiostream.pipeline.progress import Downtime, Progress, Summary
from vfiostream.pipeline.reading import Reading
from vfiostream.pipeline.settings import Settings
from vfiostream.policy import RoundReport, Verdict
from vfiostream.protocol import limits
from vfiostream.protocol.records import (
    Abort,
    Ack,
    Bitmap,
    Capture,
    Commit,
    Config,
    Credit,
    End,
    Memory,
    Pages,
    Pci,
    Round,
    RoundEnd,
    State,
    Welcome,
)
from vfiostream.protocol.sessions import Phase, SourceSession
from vfiostream.transports.contract import Transport

log = logging.getLogger("vfiostream.pipeline")


class Policy(Protocol):
    """When to stop the source; :class:`vfiostream.policy.Precopy` is one."""

    @property
    def give_up_after(self) -> float | None:
        """Seconds from the start after which precopy is given up, even within a round; None for never."""

    def judge(self, report: RoundReport) -> Verdict: ...


class Source:
    """One migration out of ``devices``. Used once: :meth:`run`."""

    def __init__(
        self,
        devices: Sequence[Device],
        guest: Guest,
        transport: Transport,
        policy: Policy,
        settings: Settings,
        progress: Progress,
    ) -> None:
        self._devices = tuple(enumerate(devices, 1))
        self._ranges: tuple[tuple[int, GuestRange], ...] = tuple(enumerate(guest.ranges, len(devices) + 1))
        self._guest = guest
        self._transport = transport
        self._policy = policy
        self._settings = settings
        self._progress = progress
        hello = describe.hello(secrets.token_bytes(16), self._devices, self._ranges, settings)
        self._session = SourceSession(hello, answers=transport.answers)
        self._hello = hello
        self._line = Outbound(transport, self._session, settings, progress, several=len(self._devices) > 1)
        self._captures = dict.fromkeys((stream for stream, _ in self._devices), 0)
        self._given = dict.fromkeys((stream for stream, _ in self._devices), 0)
        """Bytes of captures and config so far, by stream."""
        self._round = 0
        self._tracking = False
        self._started = False
        """The devices were told to track: whatever happens now, they have to be told to run on."""
        self._quiet = False
        """The devices were told to be quiet on their way to the stop: on the way back they are, too."""
        self._paused = False
        self._committed = False
        """The target may have the devices: the source is not to run, until the target says that it never will."""
        self._stopped_at = math.inf
        self._awaited = False
        """Whether the target has everything, and its answer is what is waited for."""
        self._ack: MemoryObjectSendStream[Ack]
        self._acks: MemoryObjectReceiveStream[Ack]
        self._ack, self._acks = anyio.create_memory_object_stream[Ack](math.inf)
        self._warnings: list[str] = []

    async def run(self) -> Summary:
        """Move the devices; returns when the target runs (or the file is durable). Raises what went wrong, after the
        source was made to run on; :class:`~vfiostream.errors.OutcomeUnknown` or
        :class:`~vfiostream.errors.SourceStuck` where it does not run.
        """
        self._began = monotonic()
        try:
            await self._greet()
            downtime = await self._transfer()
            if self._transport.answers:
                committed = monotonic()
                await to_the_end(self._commit)
                downtime = downtime._replace(start=monotonic() - committed)
            else:
                await self._store()
        except BaseException as error:
            cause = failure.cause(error, self._transport.address)
            if self._committed:
                await to_the_end(self._let_go)
            else:
                cause = await to_the_end(partial(self._recover, cause))
            if cause is error:
                raise
            raise cause from cause.__cause__
        finally:
            self._line.close()
            self._ack.close()
            self._acks.close()
        if self._committed:
            await to_the_end(self._let_go)
        self._progress.phase = "done"
        return Summary(
            self._round,
            self._line.content,
            self._progress.transferred,
            monotonic() - self._began,
            downtime,
            self._line.budget.peak,
            (*(device.caveat for _, device in self._devices if device.caveat), *self._warnings),
            self._line.choices.statistics,
        )

    # ---- before: greeting

    async def _greet(self) -> None:
        frame = self._session.send(self._hello)
        with anyio.move_on_after(self._settings.patience) as scope:
            try:
                await self._line.hand_over(frame)
            except ConnectionLost:
                # Whoever refuses us says why before it closes: that is read below, if it came.
                if not self._transport.answers:
                    raise
                await self._refused()
                raise
            if not self._transport.answers:
                return
            match await read_reply(self._transport, self._session):
                case Welcome():
                    return
                case Abort() as abort:
                    raise PeerAborted(abort.code, abort.reason)
                case _:
                    raise ConnectionLost(
                        f"{self._transport.address}: the target went away before it accepted; its own message says why"
                    )
        assert scope.cancelled_caught
        raise ConnectionLost(
            f"{self._transport.address}: nobody answered within {self._settings.patience:g} s; "
            "is `vfiostream receive` running there, and free?"
        )

    async def _refused(self) -> None:
        """Raise what the target said before the link was lost, if it said anything."""
        with anyio.move_on_after(self._transport.linger):
            try:
                answer = await read_reply(self._transport, self._session)
            except ConnectionLost as lost:
                log.debug("%s", lost)
                return
            if isinstance(answer, Abort):
                raise PeerAborted(answer.code, answer.reason)

    # ---- during: the task group

    async def _transfer(self) -> Downtime:
        """Everything up to the point where the target has loaded and checked all, or the file holds all."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._line.send_all)
            if self._line.compresses:
                tasks.start_soon(self._line.compressors.run)
            if self._transport.answers:
                tasks.start_soon(self._listen)
                tasks.start_soon(self._watch)
            try:
                downtime = await self._produce()
            finally:
                self._line.call_off()
            tasks.cancel_scope.cancel()
        return downtime

    async def _produce(self) -> Downtime:
        for _, device in self._devices:
            for _, area in self._ranges:
                await device.dma_map(area.address, area.length, area.fd, 0)
        self._started = True
        for _, device in self._devices:
            await device.start_precopy()
        self._tracking = True
        await self._ask_guest("track what it changes", self._guest.start_tracking)
        self._progress.phase = "precopy"
        limit = self._policy.give_up_after
        left = math.inf if limit is None else limit - (monotonic() - self._began)
        with anyio.move_on_after(left) as scope:
            await self._precopy()
        if scope.cancelled_caught:
            raise NotConverged(
                f"precopy had not converged after {limit:g} s and round {self._round}; the source runs: "
                "allow a longer downtime, more time or more bandwidth"
            )
        return await self._stop_and_copy()

    async def _precopy(self) -> None:
        """Rounds with the devices running, until the policy says stop."""
        total, previous, speeds = None, None, (0.0, 0.0)
        while True:
            collected = monotonic() - self._began
            before, given = self._line.content, dict(self._given)
            transferred, held = self._progress.transferred, self._line.pace.held
            await self._send_round()
            ended = monotonic() - self._began
            told = await self._ask_pending()
            content = self._line.content - before
            told_content = sum(self._given[stream] - given[stream] for stream in told)
            if total is None:
                total = content - told_content
            report = RoundReport(
                self._round,
                content,
                total,
                collected,
                ended,
                previous,
                told_content,
                sum(pending.initial for pending in told.values()),
                sum(pending.rest for pending in told.values()),
                *speeds,
                self._progress.transferred - transferred,
                self._line.pace.held - held,
                self._settings.bandwidth.switchover,
            )
            previous, speeds = collected, (report.throughput, report.switchover_throughput)
            self._progress.pending = report.pending
            self._progress.dirty_rate = report.dirty_rate
            self._progress.throughput = report.throughput
            self._progress.expected_downtime = report.expected_downtime
            verdict = self._policy.judge(report)
            log.debug("%s: %s", report, verdict)
            if verdict is Verdict.SWITCHOVER:
                return
            if verdict is Verdict.GIVE_UP:
                raise NotConverged(
                    f"precopy has not converged after {report.number} rounds and {ended:.1f} s: about "
                    f"{report.pending} bytes are dirty and would take {report.expected_downtime:.3f} s; the source "
                    "runs: allow a longer downtime, more rounds or more bandwidth"
                )

    async def _ask_pending(self) -> dict[int, Pending]:
        """By stream: what the devices that can be asked still have to give."""
        told = {stream: await device.pending() for stream, device in self._devices}
        return {stream: pending for stream, pending in told.items() if pending is not None}

    async def _stop_and_copy(self) -> Downtime:
        times = [monotonic()]
        self._progress.phase = "stop-and-copy"
        self._line.moved_at = self._stopped_at = monotonic()
        self._line.pace.source_stopped = True
        self._paused = True
        await self._ask_guest("pause", self._guest.pause)
        times.append(monotonic())
        self._quiet = True
        for _, device in self._devices:
            await device.quiesce()
        for _, device in self._devices:
            await device.stop()
        times.append(monotonic())
        self._line.put(State())
        await self._send_round(last=True)
        times.append(monotonic())
        for stream, device in self._devices:
            await self._send_config(stream, device)
        times.append(monotonic())
        if not self._transport.answers:
            await self._resume()
            self._line.pace.source_stopped = False
            times += [times[-1], monotonic()]
            self._progress.phase = "finishing"
        self._line.put(End(self._round, self._line.content))
        await self._line.flushed()
        if self._transport.answers:
            self._awaited = True
            await self._acks.receive()
            times += [monotonic()] * 2
            self._progress.phase = "switchover"
        return Downtime(*(late - early for early, late in pairwise(times)))

    async def _send_round(self, *, last: bool = False) -> None:
        self._round += 1
        self._progress.round = self._round
        self._progress.round_content = 0
        self._line.put(Round(self._round))
        await self._send_captures()
        for stream, area in self._ranges:
            await self._send_pages(stream, area)
        self._line.put(RoundEnd(self._round))
        if last:
            return
        if self._transport.answers:
            await self._acks.receive()
        else:
            await self._line.flushed()

    async def _send_captures(self) -> None:
        """What the devices have to give in this round: of several at once, as each has a driver of its own to wait
        for.
        """
        given = [(stream, device) for stream, device in self._devices if device.description.device_memory]
        if len(given) == 1:
            await self._send_device(*given[0])
            return
        async with anyio.create_task_group() as tasks:
            for stream, device in given:
                tasks.start_soon(self._send_device, stream, device)

    async def _send_device(self, stream: int, device: Device) -> None:
        await device.begin_round()
        size = await device.capture()
        while True:
            self._captures[stream] += 1
            self._line.put(Capture(stream, self._captures[stream], size))
            if size == 0:
                return
            await self._send_content(stream, device, size, lambda pos: Memory(stream, pos))
            size = await device.capture()
            if size == 0:
                return

    async def _send_config(self, stream: int, device: Device) -> None:
        pci = await device.read_pci_config()
        if pci is not None:
            await self._line.carry(Pci(stream), memoryview(pci))
        size = await device.capture_config()
        if size:
            await self._send_content(stream, device, size, lambda pos: Config(stream, pos, size))

    async def _send_content(
        self, stream: int, device: Device, size: int | None, record: Callable[[int], Memory | Config]
    ) -> None:
        """Send a capture or the config; ``record`` makes the record of what begins at a position."""
        pos = 0
        reading = Reading(device, self._line, self._session.chunk)
        while True:
            asked = monotonic()
            content = await device.next(self._session.chunk)
            if content is None:
                leases = await reading.read()
                count = sum(len(lease.view) for lease in leases)
                self._check_size(device, size, pos + count)
                for at, lease in zip(range(pos, pos + count, self._session.chunk), leases, strict=True):
                    self._line.put_read(record(at), lease)
            elif content:
                self._line.driver.add(len(content), monotonic() - asked)
                self._check_size(device, size, pos + len(content))
                # Not released where this fails: the sender may be in the middle of it, and ends the frame.
                await self._line.carry(record(pos), content)
                count = len(content)
                content.release()
            else:
                count = 0
            if not count:
                break
            pos += count
            self._given[stream] += count
        if size is not None and pos != size:
            raise DeviceBroken(f"{device.name}: the device's state ends {size - pos} bytes before the size it told")

    @staticmethod
    def _check_size(device: Device, size: int | None, end: int) -> None:
        if size is not None and end > size:
            raise DeviceBroken(f"{device.name}: the device's state goes on beyond the size it told")

    async def _send_pages(self, stream: int, area: GuestRange) -> None:
        for page in range(0, area.pages, limits.MAX_BITMAP_PAGES):
            pages = min(limits.MAX_BITMAP_PAGES, area.pages - page)
            lease = await self._line.take((pages + 7) // 8)
            await self._find_dirty(area.address + page * limits.PAGE_SIZE, pages, lease.view)
            runs = _accel.bitmap_runs(lease.view, pages)
            if not runs:
                lease.release()
                continue
            self._line.put_bitmap(Bitmap(stream, page, pages), lease)
            start = page * limits.PAGE_SIZE
            memory = area.view[start : start + pages * limits.PAGE_SIZE]
            left = sum(runs[1::2]) * limits.PAGE_SIZE
            pos = index = skip = 0
            while left:
                await self._line.caught_up()
                size = min(left, self._session.chunk // limits.PAGE_SIZE * limits.PAGE_SIZE)
                lease = await self._line.take(size)
                record = Pages(stream, pos)
                if self._round == 1 and area.is_hole(start + pos, size):
                    skip += size // limits.PAGE_SIZE  # of the one run there is
                    self._line.put_copied(record, lease, None)
                    pos += size
                    left -= size
                    continue
                filled, index, skip, check = _accel.gather_check(
                    memory, runs, index, skip, lease.view, limits.PAGE_SIZE, *self._session.head(record)
                )
                self._line.put_copied(record, lease, check)
                pos += filled
                left -= filled

    async def _find_dirty(self, address: int, pages: int, bitmap: memoryview) -> None:
        """Set ``bitmap`` to the pages to be sent in this round: all in the first, then what anybody has dirtied."""
        if self._round == 1:
            bitmap[:] = b"\xff" * len(bitmap)
            if pages % 8:
                bitmap[-1] = (1 << pages % 8) - 1
            return
        bitmap[:] = bytes(len(bitmap))
        for _, device in self._devices:
            if device.description.dirty_tracking:
                await device.merge_dirty(address, pages, bitmap)
        await self._ask_guest("say what it changed", partial(self._guest.merge_dirty, address, pages, bitmap))

    async def _listen(self) -> None:
        while True:
            record = await read_reply(self._transport, self._session)
            self._line.credit_came()
            match record:
                case Credit():
                    pass
                case Ack():
                    self._ack.send_nowait(record)
                    if record.of == "loaded":
                        return
                case Abort():
                    raise PeerAborted(record.code, record.reason)
                case _:
                    raise ConnectionLost(f"{self._transport.address}: the target went away before the switchover")

    async def _watch(self) -> None:
        """Call it off when the source is stopped and the target shows no progress: the guest is waiting. What the
        source's own devices take is not the target's fault.
        """
        while True:
            now = monotonic()
            limit = max(self._line.moved_at, self._stopped_at) + self._settings.patience
            if self._stopped_at == math.inf or not (self._line.waiting or self._awaited):
                limit = now + self._settings.patience
            elif now >= limit:
                raise ConnectionLost(
                    f"{self._transport.address}: the target took nothing for {self._settings.patience:g} s while the "
                    "source was stopped; see whether it hangs"
                )
            await anyio.sleep(limit - now)

    # ---- after: the commit

    async def _commit(self) -> None:
        """Let the target run; returns when it does. From here on, only its word says who has the devices, so this
        can't be cancelled; it is bounded by three times the patience.
        """
        unknown = (
            f"{self._transport.address}: the connection was lost after the commit, so only the target knows whether it "
            "runs: see its outcome there, and let the source run again with `vfiostream device resume` only if "
            "it says that it was never committed"
        )
        frame = self._session.send(Commit())
        self._committed = True
        try:
            with anyio.fail_after(self._settings.patience):
                await self._line.hand_over(frame)
        except (TimeoutError, VfiostreamError) as error:
            if isinstance(error, TransportError) and error.taken == 0:
                self._committed = False
                raise
            raise OutcomeUnknown(unknown) from error
        try:
            with anyio.fail_after(2 * self._settings.patience):
                answer = await read_reply(self._transport, self._session)
        except (TimeoutError, VfiostreamError) as error:
            raise OutcomeUnknown(unknown) from error
        match answer:
            case Abort() if answer.stopped:
                self._committed = False
                raise PeerAborted(answer.code, answer.reason)
            case Abort():
                raise OutcomeUnknown(
                    f"{self._transport.address}: the target was committed, and whether it runs is in doubt "
                    f"({answer.reason}): the source stays stopped; look at the target's device before anything else"
                )
            case None:
                raise OutcomeUnknown(unknown)

    async def _let_go(self) -> None:
        """The source is not to run: stop tracking. That this fails changes nothing for the target."""
        for _, device in self._devices:
            try:
                await device.release()
            except VfiostreamError as error:
                self._warn(f"{device.name}: tracking could not be switched off: {error}")
        await self._stop_tracking()

    async def _store(self) -> None:
        """Make the checkpoint whole: the source runs already."""
        frame = self._session.send(Commit())
        await self._line.hand_over(frame)
        await self._transport.finish()

    # ---- instead: the source runs on

    async def _resume(self) -> None:
        """Let the devices run on, then the guest. Never half: every device is tried, and what failed can be tried
        again.
        """
        failed: Sequence[VfiostreamError] = ()
        with anyio.CancelScope(shield=True):
            if self._started:
                failed = await self._run_on()
            if not failed:
                self._started = self._quiet = False
                await self._stop_tracking()
                if self._paused:
                    try:
                        await self._ask_guest("run on", self._guest.resume, self._settings.patience)
                        self._paused = False
                    except VfiostreamError as error:
                        failed = (error,)
        if failed:
            raise failed[0] if len(failed) == 1 else SourceStuck("; ".join(map(str, failed)))

    async def _run_on(self) -> Sequence[VfiostreamError]:
        """Let every device run on; returns what failed. That one is not quiet on the way is no reason to leave it
        stopped, so it counts only where it does not run then.
        """
        failed = []
        if self._quiet:
            for _, device in self._devices:
                try:
                    await device.quiesce()
                except VfiostreamError as error:
                    log.debug("%s: %s", device.name, error)
        for _, device in self._devices:
            try:
                await device.resume()
            except VfiostreamError as error:
                failed.append(error)
        return failed

    async def _stop_tracking(self) -> None:
        """The guest need not track any more. That this fails changes nothing."""
        if self._tracking:
            self._tracking = False
            try:
                await self._ask_guest("stop tracking", self._guest.stop_tracking, self._settings.patience)
            except VfiostreamError as error:
                self._warn(str(error))

    async def _ask_guest(self, what: str, hook: Callable[[], Awaitable[None]], limit: float = math.inf) -> None:
        """Call one of the guest's hooks, for ``limit`` seconds at most, and translate what it raises."""
        try:
            with anyio.fail_after(None if limit == math.inf else limit):
                await hook()
        except VfiostreamError:
            raise
        except TimeoutError as error:
            raise GuestError(f"the guest did not {what} within {limit:g} s: see to its VMM") from error
        except Exception as error:  # The edge to the VMM's code: whatever it raises must not keep the source stopped.
            raise GuestError(f"the guest could not {what}: {error!r}") from error

    def _warn(self, warning: str) -> None:
        log.warning(warning)
        self._warnings.append(warning)

    async def _recover(self, error: BaseException) -> BaseException:
        """Make the source run, and tell the target why; returns what is to be raised."""
        log.debug("calling off: %r", error)
        stuck = None
        try:
            await self._resume()
        except VfiostreamError as failed:
            stuck = failed
        if self._transport.answers:
            await part(self._transport, self._last_words(error))
        if stuck is None:
            return error
        instead = SourceStuck(
            f"{failure.told(error)}; and then the source could not be resumed ({stuck}): its state is unknown, see to "
            "its driver, then use `vfiostream device resume`"
        )
        instead.__cause__ = stuck
        return instead

    def _last_words(self, error: BaseException) -> Sequence[Buffer]:
        """The ABORT that tells the target why; nothing where it knows, or can't be told."""
        if self._session.phase in (Phase.ABORTED, Phase.DONE) or not self._line.whole:
            return ()
        told = failure.told(error, "the source was cancelled: it runs on")
        return self._session.send(Abort(failure.abort_code(error), failure.reason(told), stopped=False))
