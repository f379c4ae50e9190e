"""Data regions: used in place where the device lets us map them, read and written by calls elsewhere.

A region may be mapped whole, in parts or not at all, and mapping may fail for any part. So each stretch is cut where
mapped areas begin and end, and each piece goes the way it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from vfiostream._accel import copy
from vfiostream.access.contract import Access, MappedArea, RegionInfo
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
        self._buffer = bytearray()
        """For what is not mapped; as large as the largest piece that was asked for."""

    @classmethod
    async def open(cls, access: Access, info: RegionInfo, name: str) -> Self:
        return cls(access, info, name, await access.map(info))

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill ``into`` from ``offset`` on."""
        done = 0
        while done < len(into):
            with await self.next(offset + done, len(into) - done) as piece:
                copy(into[done : done + len(piece)], piece)
                done += len(piece)

    async def next(self, offset: int, most: int) -> memoryview:
        """The bytes from ``offset`` on, at least one and at most ``most``: in place where they are mapped, else read
        into a buffer of this region, which the next call uses again.
        """
        end, mapped = self._piece(offset, most)
        if mapped is not None:
            return mapped
        read = self._unmapped(end - offset)
        with operation(self._access.name, f"read {len(read)} bytes of its {self._name} at {offset}"):
            await self._access.read_into(self._index, offset, read)
        return read

    def room(self, offset: int, most: int) -> memoryview:
        """Where bytes are to be put that are for ``offset`` and on, at least one and at most ``most``. The driver does
        not look at them before it is told to.
        """
        end, mapped = self._piece(offset, most)
        return self._unmapped(end - offset) if mapped is None else mapped

    def is_mapped(self, offset: int) -> bool:
        """Whether what is put in the room at ``offset`` is in the region with that, and :meth:`send` not needed."""
        return self._piece(offset, 1)[1] is not None

    async def send(self, offset: int, count: int) -> None:
        """Write the first ``count`` bytes of the unmapped :meth:`room` at ``offset`` to the region."""
        data = self._unmapped(count)
        with operation(self._access.name, f"write {count} bytes of its {self._name} at {offset}"):
            await self._access.write(self._index, offset, data)

    def forget_areas(self) -> None:
        """To be called before the access is closed."""
        self._areas = ()

    def _unmapped(self, size: int) -> memoryview:
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        return memoryview(self._buffer)[:size]

    def _piece(self, offset: int, most: int) -> tuple[int, memoryview | None]:
        """Where the first piece of a stretch ends, and the memory it is mapped to, if it is."""
        stop = offset + most
        for area in self._areas:
            area_end = area.offset + len(area.view)
            if area_end <= offset:
                continue
            if offset < area.offset:
                return min(stop, area.offset), None
            end = min(stop, area_end)
            return end, area.view[offset - area.offset : end - area.offset]
        return stop, None
