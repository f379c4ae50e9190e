"""What goes wrong in the tests of whole migrations, and a record of what came of it.

A :class:`World` has a source and a target: reference devices in this process, a guest each, a link between them. Every
call that an end makes of its device, its guest and its link is a *point* (``before stop``, ``after send COMMIT``) at
which something can be planned; every frame passes through an interference that may deliver it, or do worse.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import anyio
import anyio.lowlevel

from tests.movers import MIB, SMALL, Machine, guest
from vfiostream.buffers import Buffer
from vfiostream.checkpoint import restore, save
from vfiostream.cli.exits import Exit, failure_of
from vfiostream.devices.contract import Device
from vfiostream.devices.four_region import FourRegionDevice
from vfiostream.errors import ConnectionLost, OutcomeUnknown, SourceStuck, TransportError, VfiostreamError
from vfiostream.guest import Guest, GuestRange
from vfiostream.migrate import receive, send
from vfiostream.pipeline.progress import Progress, Summary
from vfiostream.pipeline.settings import Settings
from vfiostream.pipeline.source import Policy
from vfiostream.policy import RoundReport, Verdict
from vfiostream.protocol import framing, records
from vfiostream.protocol.records import Ack, RecordType
from vfiostream.transports import connect, listen
from vfiostream.transports.contract import Transport
from vfiostream.transports.memory import memory_pair
from vfiostream.uapi.four_region import State
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.settings import Fault, Settings as DeviceSettings

TINY = replace(SMALL, memory=256 * 1024, memory_region=64 * 1024, config=1024, config_region=4096, data="random")
"""A device of four chunks that stands still: its migration takes the same frames every time."""
AREA = (0, 16 * 4096)
QUICK = Settings(chunk=65536, budget=2 * MIB, patience=5)
HASTY = replace(QUICK, patience=0.3)
"""For tests in which the patience has to end."""

Action = Callable[[], Awaitable[None]]


class Killed(Exception):
    """The process of this end was killed: nothing more that it does takes place."""


async def for_ever() -> None:
    await anyio.sleep_forever()


class Trace:
    """The points that one end has passed."""

    def __init__(self) -> None:
        self.points: list[str] = []
        self.plan: dict[str, Action] = {}
        """What happens at a point, once."""
        self.cancel_at: int | None = None
        """The point, from 1, at which this end is cancelled."""
        self.scope = anyio.CancelScope()
        """All that this end does."""
        self.dead = False

    async def passing(self, point: str) -> None:
        if self.dead:
            raise Killed
        self.points.append(point)
        if len(self.points) == self.cancel_at:
            self.scope.cancel()
        action = self.plan.pop(point, None)
        if action is not None:
            await action()

    async def cancel(self) -> None:
        self.scope.cancel()

    @property
    def calls(self) -> list[str]:
        """The calls that came to their end, of device and guest."""
        return [point.removeprefix("after ") for point in self.points if point.startswith("after ")]


def interposed(inner: Device, trace: Trace) -> Device:
    """Return ``inner`` with every call traced."""

    def method(name: str) -> Callable[..., Awaitable[Any]]:
        # Given in its place or not, for those who plan it is the same: the driver takes bytes.
        point = "deliver" if name == "write" else name

        async def call(self: Device, *arguments: Any) -> Any:
            await trace.passing(f"before {point}")
            result = await getattr(inner, name)(*arguments)
            await trace.passing(f"after {point}")
            return result

        return call

    def immediate(name: str) -> Callable[..., Any]:
        def call(self: Device, *arguments: Any) -> Any:
            return getattr(inner, name)(*arguments)

        return call

    calls = {
        name: method(name) if inspect.iscoroutinefunction(getattr(Device, name)) else immediate(name)
        for name in Device.__abstractmethods__
    }
    kind = type("Interposed", (Device,), calls)
    made = cast(Device, kind())
    made.name, made.description = inner.name, inner.description
    return made


class TracedGuest(Guest):
    """A guest that notes what it is told, and whose vCPUs dirty its second page all the time."""

    trace: Trace

    def __init__(self, ranges: Sequence[GuestRange] = ()) -> None:
        super().__init__(ranges)
        self.told: list[str] = []
        self.running = True

    async def start_tracking(self) -> None:
        await self._tell("start_tracking")

    async def merge_dirty(self, address: int, pages: int, bitmap: memoryview) -> None:
        await self._tell("merge_dirty")
        bitmap[0] |= 2

    async def stop_tracking(self) -> None:
        await self._tell("stop_tracking")

    async def pause(self) -> None:
        self.running = False
        await self._tell("pause")

    async def resume(self) -> None:
        await self._tell("resume")
        self.running = True

    async def _tell(self, what: str) -> None:
        await self.trace.passing(f"before {what}")
        self.told.append(what)
        await anyio.lowlevel.checkpoint()
        await self.trace.passing(f"after {what}")


class Frame(NamedTuple):
    """A frame on its way out."""

    number: int
    """From 1, in its direction."""
    name: str
    """``MEMORY``, ``ACK loaded``."""
    data: bytes

    @classmethod
    def parse(cls, data: bytes, number: int) -> Frame:
        kind = RecordType(data[6])
        if kind is not RecordType.ACK:
            return cls(number, kind.name, data)
        record = records.decode(kind, 0, number, data[framing.PREFIX_SIZE :])
        assert isinstance(record, Ack)
        return cls(number, f"ACK {record.of}", data)

    @staticmethod
    def size_of(data: bytes) -> int:
        """Of the frame that begins with ``data``, as the offsets of ``docs/format.md`` have it."""
        header, payload = (int.from_bytes(data[at : at + 4], "little") for at in (12, 24))
        return framing.PREFIX_SIZE + header + payload

    def is_at(self, where: str | int) -> bool:
        return where in (self.number, self.name)


Interference = Callable[["Link", Frame], Awaitable[None]]


class Link(Transport):
    """One end of a link; what it sends is passed to ``interfere``, which delivers it."""

    def __init__(self, inner: Transport, interfere: Interference, trace: Trace) -> None:
        self.address = inner.address
        self.answers = inner.answers
        self.frames: list[Frame] = []
        """Those that this end has sent, or has tried to."""
        self._inner = inner
        self._interfere = interfere
        self._trace = trace
        self._lost = False
        self._pieces = b""
        """What has come of a frame that is sent piece by piece."""

    async def send(self, buffers: Sequence[Buffer]) -> None:
        self._check(0)
        if not any(buffers):
            return
        data = self._pieces + b"".join(buffers)
        if len(data) < Frame.size_of(data):
            self._pieces = data
            await self._trace.passing("after a piece")
            return
        self._pieces = b""
        frame = Frame.parse(data, len(self.frames) + 1)
        await self._trace.passing(f"before send {frame.name}")
        await anyio.lowlevel.checkpoint()
        self.frames.append(frame)
        await self._interfere(self, frame)
        await self._trace.passing(f"after send {frame.name}")

    async def receive(self, into: Sequence[memoryview], least: int = 1) -> int:
        self._check()
        await self._trace.passing("before receive")
        try:
            count = await self._inner.receive(into, least)
        except TransportError as error:
            self._check()
            raise error
        await self._trace.passing("after receive")
        return count

    async def finish(self) -> None:
        self._check()
        await self._trace.passing("before finish")
        await self._inner.finish()
        await self._trace.passing("after finish")

    async def aclose(self) -> None:
        await self._inner.aclose()

    # ---- for interferences

    async def deliver(self, data: bytes) -> None:
        try:
            await self._inner.send([data])
        except TransportError as error:
            self._check()
            raise error

    async def cut(self) -> None:
        """Both directions end here, for both ends; what has arrived can still be read there."""
        self._lost = True
        await self._inner.aclose()

    def lost(self, taken: int | None = None) -> ConnectionLost:
        error = ConnectionLost(f"{self.address}: the link was cut; start over on a new one")
        error.taken = taken
        return error

    def _check(self, taken: int | None = None) -> None:
        if self._lost:
            raise self.lost(taken)


async def untouched(link: Link, frame: Frame) -> None:
    await link.deliver(frame.data)


def cut_before(where: str | int) -> Interference:
    """The link is cut before a byte of this frame was taken."""

    async def interfere(link: Link, frame: Frame) -> None:
        if frame.is_at(where):
            await link.cut()
            raise link.lost(0)
        await link.deliver(frame.data)

    return interfere


def cut_inside(where: str | int) -> Interference:
    """Half of this frame arrives."""

    async def interfere(link: Link, frame: Frame) -> None:
        if frame.is_at(where):
            await link.deliver(frame.data[: len(frame.data) // 2])
            await link.cut()
            raise link.lost()
        await link.deliver(frame.data)

    return interfere


def cut_after(where: str | int) -> Interference:
    """This frame arrives whole, and nothing after it."""

    async def interfere(link: Link, frame: Frame) -> None:
        await link.deliver(frame.data)
        if frame.is_at(where):
            await link.cut()

    return interfere


def taken_and_lost(where: str | int) -> Interference:
    """This frame is taken, and the link is cut before any of it arrives."""

    async def interfere(link: Link, frame: Frame) -> None:
        if frame.is_at(where):
            await link.cut()
        else:
            await link.deliver(frame.data)

    return interfere


def swallowed_from(where: str | int) -> Interference:
    """From this frame on everything is taken and nothing arrives, while the link seems to live."""
    gone = False

    async def interfere(link: Link, frame: Frame) -> None:
        nonlocal gone
        gone = gone or frame.is_at(where)
        if not gone:
            await link.deliver(frame.data)

    return interfere


def stalled_at(where: str | int) -> Interference:
    """From this frame on nothing is taken."""

    async def interfere(link: Link, frame: Frame) -> None:
        if frame.is_at(where):
            await anyio.sleep_forever()
        await link.deliver(frame.data)

    return interfere


def crossing(held: str, with_: str) -> tuple[Interference, Interference]:
    """The source's frame ``held`` is on its way until the target has sent ``with_``: it arrives before that does."""
    way: list[tuple[Link, bytes]] = []

    async def out(link: Link, frame: Frame) -> None:
        if frame.is_at(held):
            way.append((link, frame.data))
        else:
            await link.deliver(frame.data)

    async def back(link: Link, frame: Frame) -> None:
        if frame.is_at(with_):
            for other, data in way:
                await other.deliver(data)
        await link.deliver(frame.data)

    return out, back


def changed(where: str | int, change: Callable[[bytes], bytes]) -> Interference:
    """What arrives in place of this frame is what ``change`` makes of it."""

    async def interfere(link: Link, frame: Frame) -> None:
        await link.deliver(change(frame.data) if frame.is_at(where) else frame.data)

    return interfere


def swapped(where: int) -> Interference:
    """This frame and the next change places."""
    held = b""

    async def interfere(link: Link, frame: Frame) -> None:
        nonlocal held
        if frame.is_at(where):
            held = frame.data
        else:
            await link.deliver(frame.data + held)
            held = b""

    return interfere


@dataclass
class Rounds:
    """A policy that stops after so many rounds."""

    count: int = 1
    give_up_after: float | None = None

    def judge(self, report: RoundReport) -> Verdict:
        return Verdict.SWITCHOVER if report.number >= self.count else Verdict.CONTINUE


class _WatchedAccess(InProcessAccess):
    """Says when the driver was written to: its state may have changed."""

    def __init__(self, driver: ReferenceDevice, name: str, written: Callable[[], None]) -> None:
        super().__init__(driver, name)
        self._written = written

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        try:
            await super().write(index, offset, data)
        finally:
            self._written()


Result = Summary | VfiostreamError | Killed | None
"""How an end came out; None where it was cancelled."""


@dataclass
class End:
    """One end of a migration."""

    is_source: bool
    machines: list[Machine]
    devices: list[Device]
    guest: TracedGuest
    trace: Trace
    before: list[bytes]
    """Digests at the start."""
    link: Link = field(init=False)
    result: Result = field(init=False, default=None)

    @property
    def machine(self) -> Machine:
        return self.machines[0]

    @property
    def state(self) -> State:
        """Of its devices, which are all in the same."""
        states = {machine.state for machine in self.machines}
        assert len(states) == 1, states
        return states.pop()

    @property
    def error(self) -> VfiostreamError:
        assert isinstance(self.result, VfiostreamError), self.result
        return self.result

    @property
    def exit(self) -> Exit | None:
        """The exit code of the command line; None for a killed process."""
        match self.result:
            case Summary():
                return Exit.DONE
            case None:
                return Exit.CALLED_OFF
            case Killed():
                return None
            case _:
                return failure_of(self.result, has_source=self.is_source).code

    async def kill(self) -> None:
        """As SIGKILL would."""
        self.trace.dead = True
        await self.link.cut()
        raise Killed

    async def attempt(self, work: Callable[[], Awaitable[Summary]]) -> None:
        """Do ``work`` as a program would, and keep how it came out."""
        with self.trace.scope:
            try:
                self.result = await work()
            except (VfiostreamError, Killed) as error:
                self.result = error
            except BaseExceptionGroup as group:
                if not self.trace.dead:
                    raise
                self.result = Killed(group)


class World:
    """Two hosts."""

    def __init__(self) -> None:
        self.source: End
        self.target: End
        self.history: list[tuple[tuple[State, ...], tuple[State, ...]]] = []
        """The states of all devices, source and target, after each write to one of them."""
        self._complete = False

    def note(self) -> None:
        if self._complete:
            self.history.append(
                (
                    tuple(machine.state for machine in self.source.machines),
                    tuple(machine.state for machine in self.target.machines),
                )
            )

    async def migrate(
        self,
        *,
        out: Interference = untouched,
        back: Interference = untouched,
        settings: Settings = QUICK,
        theirs: Settings | None = None,
        policy: Policy | None = None,
        capacity: int = MIB,
        progress: Progress | None = None,
        meanwhile: Action | None = None,
    ) -> None:
        """Run a migration to its end, at both ends, with ``meanwhile`` beside it."""
        source, target = self.source, self.target
        self._complete = True
        here, there = memory_pair(capacity)
        source.link, target.link = Link(here, out, source.trace), Link(there, back, target.trace)

        async def move() -> Summary:
            async with source.link:
                return await send(
                    source.devices,
                    source.link,
                    guest=source.guest,
                    policy=policy or Rounds(),
                    settings=settings,
                    progress=progress,
                )

        async def take() -> Summary:
            async with target.link:
                return await receive(target.devices, target.link, guest=target.guest, settings=theirs or settings)

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(target.attempt, take)
                tasks.start_soon(source.attempt, move)
                if meanwhile is not None:
                    await meanwhile()

    async def save(self, path: Path) -> None:
        """Save the source, to the end."""
        source = self.source
        packed = replace(QUICK, compression=1)

        async def work() -> Summary:
            async with connect(f"file:{path}") as opened:
                source.link = Link(opened, untouched, source.trace)
                async with source.link:
                    return await save(source.devices, source.link, guest=source.guest, policy=Rounds(), settings=packed)

        self._complete = True
        with anyio.fail_after(20):
            await source.attempt(work)

    async def restore(self, path: Path, settings: Settings = QUICK) -> None:
        """Restore into the target, to the end."""
        target = self.target

        async def work() -> Summary:
            async with listen(f"file:{path}") as folder, await folder.accept() as opened:
                target.link = Link(opened, untouched, target.trace)
                async with target.link:
                    return await restore(target.link, target.devices, guest=target.guest, settings=settings)

        with anyio.fail_after(20):
            await target.attempt(work)

    @property
    def moved(self) -> bool:
        return isinstance(self.source.result, Summary)


@asynccontextmanager
async def world(
    *,
    source_faults: Sequence[Fault] = (),
    target_faults: Sequence[Fault] = (),
    devices: int = 1,
    like: DeviceSettings = TINY,
    target_like: DeviceSettings | None = None,
) -> AsyncIterator[World]:
    """Hosts with ``devices`` devices each; the faults are those of the last one."""
    made = World()
    async with AsyncExitStack() as stack:
        for side, kind, faults, seed in (
            ("source", like, source_faults, 0),
            ("target", target_like or like, target_faults, 99),
        ):
            trace = Trace()
            machines = []
            for number in range(devices):
                settings = replace(kind, seed=seed + number, faults=tuple(faults) if number == devices - 1 else ())
                driver = ReferenceDevice(settings)
                stack.callback(driver.close)
                access = _WatchedAccess(driver, f"{side}{number}", made.note)
                machines.append(Machine(driver, await stack.enter_async_context(await FourRegionDevice.open(access))))
            memory = stack.enter_context(guest(AREA, kind=TracedGuest))
            assert isinstance(memory, TracedGuest)
            memory.trace = trace
            end = End(
                side == "source",
                machines,
                [interposed(machine.device, trace) for machine in machines],
                memory,
                trace,
                [machine.digest for machine in machines],
            )
            setattr(made, side, end)
        yield made


def assert_one_runner(made: World) -> None:
    """From when the target's devices were stopped for the state of the source's, no two of both sides ever ran."""
    stopped = False
    for ours, theirs in made.history:
        stopped = stopped or all(state is State.STOP for state in theirs)
        both = any(state.running for state in ours) and any(state.running for state in theirs)
        assert not (stopped and both), made.history


def assert_guest_follows(end: End) -> None:
    """The source's guest runs as its devices do, and was told so once."""
    told = end.guest.told
    assert told.count("pause") <= 1
    assert told.count("resume") == (1 if "pause" in told and end.state is State.RUNNING else 0)
    if not end.state.logging and "start_tracking" in told:
        assert told.count("stop_tracking") == 1


def outcome(made: World) -> str:
    """Check that what a migration came to is something that ``docs/switchover.md`` knows, and say what: ``moved``,
    ``the source runs`` or ``unknown``.
    """
    source, target = made.source, made.target
    assert_one_runner(made)
    assert_guest_follows(source)
    if made.moved:
        assert source.state is State.STOP
        assert target.state is State.RUNNING
        assert isinstance(target.result, Summary)
        assert [machine.digest for machine in target.machines] == source.before
        assert bytes(source.guest.ranges[0].view) == bytes(target.guest.ranges[0].view)
        return "moved"
    if isinstance(source.result, OutcomeUnknown):
        assert source.state is State.STOP
        assert "COMMIT" in [frame.name for frame in source.link.frames]
        if isinstance(target.result, Summary):
            assert target.state is State.RUNNING
        elif not isinstance(target.result, OutcomeUnknown):
            assert target.state is State.STOP
        return "unknown"
    assert not isinstance(source.result, SourceStuck)
    assert not isinstance(target.result, Summary | OutcomeUnknown)
    assert source.state is State.RUNNING
    assert [machine.digest for machine in source.machines] == source.before
    if "after start_load" in target.trace.points:
        assert target.state is State.STOP
    else:
        assert [machine.digest for machine in target.machines] == target.before
    return "the source runs"
