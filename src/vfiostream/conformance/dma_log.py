"""Rules for a device's own log of the guest memory that it writes by DMA. That of an IOMMU is its kernel's business."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from vfiostream.conformance.rules import Broken, NotTestable, Rulebook, together
from vfiostream.conformance.subject import GUEST_IOVA, GUEST_PAGES, PAGE, Guest, Subject, bits, named, refusal
from vfiostream.errors import DeviceRefused
from vfiostream.uapi.vfio import MAX_DMA_LOGGING_RANGES, Feature, FeatureOperation

LENGTH = GUEST_PAGES * PAGE

LOG: Rulebook[Subject] = Rulebook("log of DMA")
_START = "linux/vfio.h, VFIO_DEVICE_FEATURE_DMA_LOGGING_START; drivers/vfio/vfio_main.c"
_REPORT = "linux/vfio.h, VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT"


async def _require_log(subject: Subject) -> None:
    probe = FeatureOperation.PROBE | FeatureOperation.SET
    if await refusal(subject.access.feature(probe, Feature.DMA_LOGGING_START)) is not None:
        raise NotTestable("the device has no log of its own")


async def _start(subject: Subject, ranges: Sequence[tuple[int, int]], *, anew: bool = True) -> DeviceRefused | None:
    """Start a log; returns with what the device refused that."""
    return await refusal(subject.access.start_dma_log(PAGE, ranges, anew=anew))


async def _report(subject: Subject, page_size: int = PAGE, bitmap: bytearray | None = None) -> bytearray:
    into = bytearray(LENGTH // page_size // 8) if bitmap is None else bitmap
    await subject.access.read_dma_log(GUEST_IOVA, LENGTH, page_size, memoryview(into))
    return into


async def _expect_refused(subject: Subject, cases: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> None:
    await _require_log(subject)
    seen = []
    for what, ranges in cases:
        if await _start(subject, ranges) is None:
            seen.append(f"{what} was taken")
            await subject.access.stop_dma_log()
    together(seen)


@LOG.rule("log-misaligned", "A log of ranges that are not of whole pages is refused.", _START)
async def misaligned(subject: Subject) -> None:
    await _expect_refused(
        subject,
        [
            ("a range that starts in a page", [(GUEST_IOVA + 1, PAGE)]),
            ("a range that ends in a page", [(GUEST_IOVA, PAGE - 1)]),
        ],
    )


@LOG.rule("log-overlapping", "A log of ranges that overlap is refused.", _START)
async def overlapping(subject: Subject) -> None:
    await _expect_refused(
        subject,
        [
            ("two ranges that overlap", [(GUEST_IOVA, 2 * PAGE), (GUEST_IOVA + PAGE, 2 * PAGE)]),
            ("the same range twice", [(GUEST_IOVA, PAGE), (GUEST_IOVA, PAGE)]),
        ],
    )


def _apart(count: int) -> list[tuple[int, int]]:
    return [(GUEST_IOVA + 2 * n * PAGE, PAGE) for n in range(count)]


@LOG.rule("log-ranges", f"A log of {MAX_DMA_LOGGING_RANGES} ranges is taken.", f"{_START}: as many as fit a page")
async def ranges(subject: Subject) -> None:
    await _require_log(subject)
    if (refused := await _start(subject, _apart(MAX_DMA_LOGGING_RANGES))) is not None:
        raise Broken(f"it was refused with {named(refused)}")


@LOG.rule("log-too-many", f"A log of more than {MAX_DMA_LOGGING_RANGES} ranges is refused, or taken whole.", _START)
async def too_many(subject: Subject) -> str:
    await _require_log(subject)
    count = MAX_DMA_LOGGING_RANGES + 1
    if (refused := await _start(subject, _apart(count))) is not None:
        return f"{count} were refused with {named(refused)}"
    if await refusal(_report(subject)):
        raise Broken(f"{count} ranges were taken, and then there was no log")
    return f"{count} were taken"


@LOG.rule("log-twice", "A log that runs is not started again.", f"{_START}: another start is not allowed")
async def twice(subject: Subject) -> None:
    await _require_log(subject)
    if (refused := await _start(subject, [(GUEST_IOVA, LENGTH)])) is not None:
        raise NotTestable(f"a log could not be started: {named(refused)}")
    if await _start(subject, [(GUEST_IOVA, LENGTH)], anew=False) is None:
        raise Broken("a second start was taken")


@LOG.rule("log-off", "Where no log runs, a report is refused: before the start, and after the stop.", _REPORT)
async def off(subject: Subject) -> None:
    await _require_log(subject)
    seen = []
    if await refusal(_report(subject)) is None:
        seen.append("a report before the start was answered")
    if await _start(subject, [(GUEST_IOVA, LENGTH)]) is None:
        await subject.access.stop_dma_log()
        if await refusal(_report(subject)) is None:
            seen.append("a report after the stop was answered")
    together(seen)


@LOG.rule("log-kept-bits", "A report sets bits and clears none.", _REPORT)
async def kept_bits(subject: Subject) -> None:
    async with _logging(subject):
        bitmap = bytearray(b"\xa5" * (GUEST_PAGES // 8))
        await _report(subject, bitmap=bitmap)
        if lost := bits(b"\xa5" * len(bitmap)) - bits(bitmap):
            raise Broken(f"{len(lost)} bits that were set before are clear")


@LOG.rule("log-page-sizes", "A report can be had in pages larger than those of the log.", _REPORT)
async def page_sizes(subject: Subject) -> None:
    async with _logging(subject):
        seen = []
        for size in (PAGE, 2 * PAGE, 4 * PAGE):
            if refused := await refusal(_report(subject, size)):
                seen.append(f"one in pages of {size} bytes was refused with {named(refused)}")
        together(seen)


@asynccontextmanager
async def _logging(subject: Subject) -> AsyncIterator[Guest]:
    await _require_log(subject)
    async with subject.guest() as guest:
        if (refused := await _start(subject, [(GUEST_IOVA, LENGTH)])) is not None:
            raise NotTestable(f"a log could not be started: {named(refused)}")
        yield guest
        await subject.access.stop_dma_log()


@LOG.rule("log-complete", "Every page that the device has written is in the next report.", _REPORT)
async def complete(subject: Subject) -> str:
    async with _logging(subject) as guest:
        before = await guest.let_write()
        await subject.stop()
        written = guest.changed(before)
        if missing := written - bits(await _report(subject)):
            raise Broken(f"{len(missing)} of {len(written)} pages that were written were not told")
        return f"{len(written)} pages were written and told"


@LOG.rule("log-clears", "A report clears what it told.", _REPORT)
async def clears(subject: Subject) -> None:
    async with _logging(subject) as guest:
        await guest.let_write()
        await subject.stop()
        first = bits(await _report(subject))
        if again := first & bits(await _report(subject)):
            raise Broken(f"{len(again)} pages were told twice, and the device was stopped")
