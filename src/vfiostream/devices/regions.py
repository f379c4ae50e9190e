"""Data regions: used in place where the device lets us map them, read and written by calls elsewhere.

A region may be mapped whole, in parts or not at all, and mapping may fail for any part. So each stretch is cut where
mapped areas begin and end, and each piece goes the way it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from vfiostream._accel import copy
from vfiostream.access.contract import Access, MappedArea, RegionInfo
from vfiostream.devices.operations import operation


async def regions_of(access: Access) -> list[RegionInfo]:
    """All regions of the device behind ``access``, by their indexes."""
    return [await access.region_info(index) for index in range(access.info.num_regions)]


class Region:
    """One data region of a device. ``name`` says which, for messages ("memory region")."""

    def __init__(self, access: Access, info: RegionInfo, name: str, areas: Sequence[MappedArea]) -> None:
        """``areas`` are ordered by offset and do not overlap; they belong to the access."""
        self.index = info.index
        self.size = info.size
        self._access = access
        self._name = name
        self._areas = tuple(areas)

    @classmethod
    async def open(cls, access: Access, info: RegionInfo, name: str) -> Self:
        return cls(access, info, name, await access.map(info))

    def view(self, offset: int, most: int) -> memoryview | None:
        """The bytes from ``offset`` on, at least one and at most ``most``, where they are mapped; None where they are
        not: then :meth:`read` and :meth:`write` get at them. The driver does not look at them before it is told to.
        """
        return self._piece(offset, most)[1]

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill ``into`` from ``offset`` on."""
        done = 0
        while done < len(into):
            end, mapped = self._piece(offset + done, len(into) - done)
            piece = into[done : end - offset]
            if mapped is not None:
                copy(piece, mapped)
            else:
                with operation(self._access.name, f"read {len(piece)} bytes of its {self._name} at {offset + done}"):
                    await self._access.read_into(self.index, offset + done, piece)
            done += len(piece)

    async def write(self, offset: int, data: memoryview) -> None:
        """Put ``data`` in the region from ``offset`` on."""
        done = 0
        while done < len(data):
            end, mapped = self._piece(offset + done, len(data) - done)
            piece = data[done : end - offset]
            if mapped is not None:
                copy(mapped, piece)
            else:
                with operation(self._access.name, f"write {len(piece)} bytes of its {self._name} at {offset + done}"):
                    await self._access.write(self.index, offset + done, piece)
            done += len(piece)

    def forget_areas(self) -> None:
        """To be called before the access is closed."""
        self._areas = ()

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
