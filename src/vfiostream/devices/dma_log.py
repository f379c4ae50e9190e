"""The log of a device's DMA as its dirty tracking: what is mapped of guest memory is what is logged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from vfiostream.access.contract import Access
from vfiostream.devices import dirty
from vfiostream.devices.dirty import PAGE_SIZE
from vfiostream.devices.operations import logger, operation
from vfiostream.errors import DeviceRefused
from vfiostream.uapi.vfio import MAX_DMA_LOGGING_RANGES


class DmaLog:
    """The log of the device behind ``access``. Raises what an access raises."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._mapped: list[tuple[int, int]] = []
        self.running = False
        """Whether it may run: it was told to start, and not to stop since."""

    def add(self, iova: int, length: int) -> None:
        """Guest memory that was mapped: it is in the log from the next start on."""
        self._mapped.append((iova, length))

    async def start(self) -> None:
        """Begin to log; nothing where nothing is mapped."""
        ranges = merged(self._mapped)
        if not ranges:
            return
        self.running = True
        with operation(self._access.name, f"start the DMA log of {len(ranges)} ranges"):
            await self._access.start_dma_log(PAGE_SIZE, ranges)

    async def merge(self, iova: int, pages: int, bitmap: memoryview) -> None:
        """OR the pages written since they were last asked for into ``bitmap``; asking clears."""

        async def ask(first: int, count: int, bits: memoryview) -> None:
            start = iova + first * PAGE_SIZE
            with operation(self._access.name, f"read the DMA log of {count} pages at {start:#x}"):
                await self._access.read_dma_log(start, count * PAGE_SIZE, PAGE_SIZE, bits)

        await dirty.merge(bitmap, pages, dirty.MAX_WINDOW, ask)

    async def stop(self) -> None:
        """Log no more. That a driver refuses to stop harms nobody, as the next start begins anew: it is a warning."""
        if not self.running:
            return
        try:
            with operation(self._access.name, "stop the DMA log"):
                await self._access.stop_dma_log()
        except DeviceRefused as error:
            logger.warning("%s", error)
        self.running = False


def merged(mapped: Sequence[tuple[int, int]], most: int = MAX_DMA_LOGGING_RANGES) -> list[tuple[int, int]]:
    """The ranges, (address, length), ordered and apart; where they are more than ``most``, those with the smallest
    gaps between them are combined, and the gaps are logged as well.
    """
    apart: list[tuple[int, int]] = []
    for start, length in sorted(mapped):
        end = start + length
        if apart and start <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        else:
            apart.append((start, end))
    by_gap = sorted(range(1, len(apart)), key=lambda n: apart[n][0] - apart[n - 1][1], reverse=True)
    cuts = [0, *sorted(by_gap[: most - 1]), len(apart)] if apart else []
    return [(apart[first][0], apart[last - 1][1] - apart[first][0]) for first, last in pairwise(cuts)]
