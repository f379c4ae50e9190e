"""Data regions: mapped where the device lets us, read and written by calls elsewhere.

A region may be mapped whole, in parts or not at all, and mapping may fail for any part. So each access is cut where
mapped areas begin and end, and each piece goes the way it can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from vfiostream._accel import copy
from vfiostream.access.contract import Access, MappedArea, RegionInfo
from vfiostream.buffers import Buffer
from vfiostream.devices.control import operation


class Region:
    """One data region of a device. ``name`` says which, for messages ("memory region")."""

    def __init__(self, access: Access, info: RegionInfo, name: str, areas: Sequence[MappedArea]) -> None:
        """``areas`` are ordered by offset and do not overlap; they belong to the access."""
        self.size = info.size
        self._access = access
        self._index = info.index
        self._name = name
        self._areas = tuple(areas)

    @classmethod
    async def open(cls, access: Access, info: RegionInfo, name: str) -> Self:
        return cls(access, info, name, await access.map(info))

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill ``into`` from ``offset`` on."""
        start = offset
        for end, mapped in self._pieces(offset, len(into)):
            piece = into[start - offset : end - offset]
            if mapped is not None:
                copy(piece, mapped)
            else:
                with operation(self._access.name, f"read {len(piece)} bytes of its {self._name} at {start}"):
                    await self._access.read_into(self._index, start, piece)
            start = end

    async def write(self, offset: int, data: Buffer) -> None:
        """Put ``data`` at ``offset``. The driver does not look at it before it is told to."""
        whole = memoryview(data)
        start = offset
        for end, mapped in self._pieces(offset, len(whole)):
            piece = whole[start - offset : end - offset]
            if mapped is not None:
                copy(mapped, piece)
            else:
                with operation(self._access.name, f"write {len(piece)} bytes of its {self._name} at {start}"):
                    await self._access.write(self._index, start, piece)
            start = end

    def forget_areas(self) -> None:
        """To be called before the access is closed."""
        self._areas = ()

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, memoryview | None]]:
        """Cut a stretch: where each piece ends, and the memory it is mapped to, if it is."""
        stop = offset + length
        for area in self._areas:
            area_end = area.offset + len(area.view)
            if area_end <= offset or stop <= area.offset:
                continue
            if offset < area.offset:
                yield area.offset, None
                offset = area.offset
            end = min(stop, area_end)
            yield end, area.view[offset - area.offset : end - area.offset]
            offset = end
        if offset < stop:
            yield stop, None
