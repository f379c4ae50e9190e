"""What an answer to ``VFIO_DEVICE_GET_REGION_INFO`` says, checked: it comes from outside."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from vfiostream.access.contract import RegionInfo
from vfiostream.uapi.vfio import (
    REGION_FLAG_CAPS,
    REGION_FLAG_MMAP,
    REGION_FLAG_READ,
    REGION_FLAG_WRITE,
    REGION_INFO,
    BadCapabilityChain,
    parse_capabilities,
)

MAX_REGIONS = 1024
"""Regions we believe a device to have."""
MAX_AREAS = 256
"""Mappable areas we believe a region to have."""


class BadRegionInfo(ValueError):
    """An answer that makes no sense; the text says why, as in "the device ..."."""


def parse_region_info(index: int, answer: bytes) -> tuple[RegionInfo, int]:
    """The region that ``answer`` (of the whole size that it asks for) describes, and its offset. Raises
    BadRegionInfo.
    """
    _argsz, flags, told, cap_offset, size, offset = REGION_INFO.unpack_from(answer)
    if told != index:
        raise BadRegionInfo(f"describes region {told} when asked about region {index}")
    try:
        type_, sparse = parse_capabilities(answer, cap_offset if flags & REGION_FLAG_CAPS else 0)
    except BadCapabilityChain as error:
        raise BadRegionInfo(f"gives region {index} a bad capability chain ({error})") from error
    mappable: tuple[tuple[int, int], ...] = ()
    if flags & REGION_FLAG_MMAP and flags & (REGION_FLAG_READ | REGION_FLAG_WRITE) and size:
        mappable = _check_areas(index, size, ((0, size),) if sparse is None else sparse)
    info = RegionInfo(
        index=index,
        size=size,
        readable=bool(flags & REGION_FLAG_READ),
        writable=bool(flags & REGION_FLAG_WRITE),
        type=None if type_ is None else type_[0],
        subtype=None if type_ is None else type_[1],
        mappable=mappable,
    )
    return info, offset


def _check_areas(index: int, size: int, areas: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Order them by offset; raises BadRegionInfo for what can't be areas of the region."""
    if len(areas) > MAX_AREAS:
        raise BadRegionInfo(f"gives region {index} {len(areas)} mappable areas (the limit is {MAX_AREAS})")
    end = 0
    ordered = tuple(sorted(areas))
    for start, length in ordered:
        if start < end or length == 0 or start + length > size or start % mmap.PAGESIZE:
            raise BadRegionInfo(
                f"gives region {index} of {size} bytes the mappable area {start:#x}+{length:#x}, which is empty, "
                "outside, misaligned or overlaps another"
            )
        end = start + length
    return ordered
