"""The migrations of a bench, over a link: how both ends agree on them, carry them out and count what they cost.

There is no protocol but the ordinary stream: every step is a migration on a connection of its own, and it is always the
bencher who connects. What one end has to tell the other is the content of a page of guest memory (a *note*, JSON). A
bench has one part for guest memory and one for the reference device, and each part goes::

    bencher  --- note: the part: what, which size, how often --->  listener
    bencher  <-- note: ready, or a sentence that says no --------  listener
    bencher  --- the migration that is measured, `runs` times -->  listener
    bencher  <-- note: what the runs cost there -----------------  listener

Nothing of the size that was named is allocated before it was held against the listener's own limit and the memory that
is free. Any failure ends the bench, and the listener waits for the next one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

import anyio

from vfiostream import _accel, migrate, transports
from vfiostream.cli.specimen import WHATS, Specimen, What, check_size, prepared
from vfiostream.cli.values import show_size
from vfiostream.errors import ConnectionLost, Incompatible, PeerAborted, TransportError, UsageError, VfiostreamError
from vfiostream.guest import PAGE_SIZE
from vfiostream.pipeline.progress import Progress, Summary
from vfiostream.pipeline.settings import Settings
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.options import Options
from vfiostream.version import SOFTWARE

NOTE_SIZE = PAGE_SIZE
MAX_RUNS = 32
"""Migrations in one part of a bench."""
MAX_TEXT = 512
"""Characters of a text in a note."""
MAX_NUMBER = (1 << 63) - 1

PATIENCE = 10.0
"""Seconds one end waits for a step of the other that moves next to nothing."""
SLOWEST_READY = 64 << 20
"""Bytes a second at which memory is made ready at least; one end waits so long for the other."""
SLOWEST_MOVE = 1 << 20
"""Bytes a second below which the listener gives up on a migration."""

GB = 10**9


class BadNote(VfiostreamError):
    """A note of the other end is none."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one end asks the other to take. Raises :class:`BadNote` for what can't be asked."""

    what: What
    size: int
    runs: int
    last: bool
    """Whether the bench is over after it."""

    def __post_init__(self) -> None:
        _require(self.what in WHATS and type(self.last) is bool)
        _require(type(self.size) is int and 0 < self.size <= MAX_NUMBER)
        _require(type(self.runs) is int and 0 < self.runs <= MAX_RUNS)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the listener says to it. Raises :class:`BadNote` for what is no answer."""

    refused: str | None
    """Why not; None where it is ready."""
    software: str
    accelerator: str

    def __post_init__(self) -> None:
        for text in (self.refused or "", self.software, self.accelerator):
            _require(isinstance(text, str) and len(text) <= MAX_TEXT)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one migration cost at one end. Raises :class:`BadNote` for what can't be."""

    content: int
    """Bytes of memory, pages and config."""
    seconds: float
    """As its :class:`~vfiostream.pipeline.progress.Summary` says."""
    cpu_seconds: float
    """Of all threads of this end's process, user and system, which has in it some of what the kernel does for the other
    end where the link is a loopback.
    """

    def __post_init__(self) -> None:
        _require(type(self.content) is int and 0 < self.content <= MAX_NUMBER)
        for seconds in (self.seconds, self.cpu_seconds):
            _require(isinstance(seconds, float) and math.isfinite(seconds) and seconds >= 0)

    @property
    def throughput(self) -> float:
        return self.content / max(self.seconds, 1e-9)

    @property
    def cpu_per_gb(self) -> float:
        """CPU seconds for 10^9 bytes of content."""
        return self.cpu_seconds * GB / self.content


@dataclass(frozen=True, slots=True)
class Run:
    """A migration that was measured."""

    what: What
    compression: str
    """As ``--compress`` has it."""
    summary: Summary
    here: Cost
    there: Cost


@dataclass(frozen=True, slots=True)
class Served:
    """A part that the listener has taken."""

    part: Part
    costs: tuple[Cost, ...]


Follow = Callable[[Callable[[Progress], Awaitable[Summary]]], Awaitable[Summary]]
"""Carries a migration out while somebody watches its progress."""


# ---- the bencher


async def measure(
    address: str,
    options: Options,
    part: Part,
    content: bytes,
    settings: Sequence[tuple[str, Settings]],
    follow: Follow,
) -> tuple[list[Run], Answer]:
    """Carry out ``part`` with whoever serves benches at ``address``: a migration for each of ``settings`` (with its
    name), of memory that holds ``content``.

    Raises :class:`~vfiostream.errors.Incompatible` where the other end says no, and what a migration raises.
    """
    async with prepared(part.what, part.size, content) as specimen:
        await _ask(address, options, part)
        async with _connected(address, options) as link:
            answer = _parsed(Answer, await _read_note(link, PATIENCE + part.size / SLOWEST_READY))
        if answer.refused is not None:
            raise Incompatible(f"{address} says no: {answer.refused}")
        done = []
        for name, chosen in settings:
            async with _connected(address, options) as link:
                done.append((name, *await _send(specimen, link, chosen, follow)))
        async with _connected(address, options) as link:
            told = (await _read_note(link)).get("costs")
    if not isinstance(told, list) or len(told) != len(done):
        raise BadNote(_BAD)
    return [Run(part.what, *run, _parsed(Cost, cost)) for run, cost in zip(done, told, strict=True)], answer


async def _ask(address: str, options: Options, part: Part) -> None:
    try:
        async with _connected(address, options) as link:
            await _write_note(link, asdict(part))
    except TransportError as error:
        if isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError):
            raise TransportError(
                f"{address}: nobody listens there; start `vfiostream bench --listen` on it first"
            ) from error
        raise
    except PeerAborted as error:
        if error.code != "incompatible":
            raise
        raise Incompatible(
            f"{address} does not take a bench now ({error.reason}): start `vfiostream bench --listen` of the same "
            "version there, or try again when the bench that runs there is over"
        ) from error


async def _send(specimen: Specimen, link: Transport, settings: Settings, follow: Follow) -> tuple[Summary, Cost]:
    async with specimen.opened() as device:
        before = time.process_time()
        summary = await follow(
            lambda progress: migrate.send(device, link, guest=specimen.guest, settings=settings, progress=progress)
        )
        return summary, Cost(summary.content, summary.seconds, time.process_time() - before)


@asynccontextmanager
async def _connected(address: str, options: Options) -> AsyncIterator[Transport]:
    async with transports.connect(address, replace(options, timeout=PATIENCE)) as link:
        yield link


# ---- the listener


async def serve(listener: Listener, max_size: int) -> list[Served]:
    """Serve one bench of those who connect to ``listener``, of at most ``max_size`` bytes a part. Waits for its start
    without a limit, and with one at each step that follows.

    Raises what went wrong, :class:`~vfiostream.errors.Incompatible` for what was refused; the next can be served then.
    """
    served: list[Served] = []
    link = await listener.accept()
    while True:
        async with link:
            part = _parsed(Part, await _read_note(link))
        served.append(Served(part, await _take(listener, part, max_size)))
        if part.last:
            return served
        # The bencher makes the memory of the next part ready first.
        link = await _accepted(listener, PATIENCE + part.size / SLOWEST_READY)


async def _take(listener: Listener, part: Part, max_size: int) -> tuple[Cost, ...]:
    async with AsyncExitStack() as stack:
        try:
            specimen = await _taking(stack, part, max_size)
        except UsageError as error:
            async with await _accepted(listener) as link:
                await _write_note(link, _answer(str(error)))
            raise Incompatible(f"{link.address} was told no: {error}") from error
        async with await _accepted(listener) as link:
            await _write_note(link, _answer(None))
        costs = []
        for _ in range(part.runs):
            async with await _accepted(listener) as link, specimen.opened() as device:
                with _within(link.address, PATIENCE + part.size / SLOWEST_MOVE):
                    before = time.process_time()
                    summary = await migrate.receive(device, link, guest=specimen.guest)
                    costs.append(Cost(summary.content, summary.seconds, time.process_time() - before))
        async with await _accepted(listener) as link:
            await _write_note(link, {"costs": [asdict(cost) for cost in costs]})
    return tuple(costs)


async def _taking(stack: AsyncExitStack, part: Part, max_size: int) -> Specimen:
    """What ``part`` is to be moved into. Raises :class:`~vfiostream.errors.UsageError` for what is not taken here."""
    if part.size > max_size:
        raise UsageError(
            f"at most {show_size(max_size)} are taken, not {show_size(part.size)}: choose a smaller --size, or start "
            "`vfiostream bench --listen` with a larger --max-size"
        )
    check_size(part.size)
    return await stack.enter_async_context(prepared(part.what, part.size))


def _answer(refused: str | None) -> dict[str, Any]:
    return asdict(Answer(None if refused is None else refused[:MAX_TEXT], SOFTWARE, _accel.IMPLEMENTATION))


async def _accepted(listener: Listener, seconds: float | None = None) -> Transport:
    with _within(listener.address, PATIENCE if seconds is None else seconds):
        return await listener.accept()


# ---- notes


async def _write_note(link: Transport, note: dict[str, Any]) -> None:
    text = json.dumps(note).encode()
    assert len(text) <= NOTE_SIZE, "the limits of what a note holds let it fit"
    with closing(Specimen("guest memory", NOTE_SIZE, text.ljust(NOTE_SIZE, b"\0"))) as page:
        async with page.opened() as device:
            with _within(link.address, PATIENCE):
                await migrate.send(device, link, guest=page.guest)


async def _read_note(link: Transport, seconds: float | None = None) -> dict[str, Any]:
    """The note that comes over ``link`` within ``seconds`` (None for the patience). Raises :class:`BadNote` for what is
    no JSON object.
    """
    with closing(Specimen("guest memory", NOTE_SIZE)) as page:
        async with page.opened() as device:
            with _within(link.address, PATIENCE if seconds is None else seconds):
                await migrate.receive(device, link, guest=page.guest)
        text = bytes(page.guest.ranges[0].view).rstrip(b"\0")
    try:
        note = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadNote(_BAD) from error
    if not isinstance(note, dict):
        raise BadNote(_BAD)
    return note


_Note = TypeVar("_Note", Part, Answer, Cost)


def _parsed(kind: type[_Note], note: object) -> _Note:
    """``note`` as what it should be. Raises :class:`BadNote` where it has other keys, or values that can't be."""
    if not isinstance(note, dict) or set(note) != {field.name for field in fields(kind)}:
        raise BadNote(_BAD)
    return kind(**note)


_BAD = "what the other end says in a bench can't be understood: run the same version of vfiostream at both ends"


def _require(holds: bool) -> None:
    if not holds:
        raise BadNote(_BAD)


@contextmanager
def _within(address: str, seconds: float) -> Iterator[None]:
    """Raise :class:`~vfiostream.errors.ConnectionLost` where the body takes more than so many ``seconds``."""
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError as error:
        raise ConnectionLost(
            f"{address}: the other end of the bench did not do its next step within {seconds:.0f} s; see what it says"
        ) from error
