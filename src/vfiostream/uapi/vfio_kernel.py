"""What only the kernel has of ``include/uapi/linux/vfio.h``: ioctl numbers, groups, containers and the type 1 IOMMU.

Bytes and tables only: nothing here does I/O. Little endian, x86-64 sizes.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

from vfiostream.uapi.vfio import BadCapabilityChain

API_VERSION = 0


class Ioctl(IntEnum):
    """``_IO(';', 100 + n)``, to a group, a device, or the data of a migration."""

    GROUP_GET_STATUS = 0x3B67
    GROUP_SET_CONTAINER = 0x3B68
    GROUP_GET_DEVICE_FD = 0x3B6A
    DEVICE_GET_INFO = 0x3B6B
    DEVICE_GET_REGION_INFO = 0x3B6C
    DEVICE_RESET = 0x3B6F
    DEVICE_FEATURE = 0x3B75
    DEVICE_BIND_IOMMUFD = 0x3B76
    DEVICE_ATTACH_IOMMUFD_PT = 0x3B77
    MIG_GET_PRECOPY_INFO = 0x3B79


class ContainerIoctl(IntEnum):
    """The same, to a container: its last number means another thing to a device."""

    GET_API_VERSION = 0x3B64
    CHECK_EXTENSION = 0x3B65
    SET_IOMMU = 0x3B66
    GET_INFO = 0x3B70
    MAP_DMA = 0x3B71
    UNMAP_DMA = 0x3B72
    DIRTY_PAGES = 0x3B75


class Extension(IntEnum):
    """What CHECK_EXTENSION is asked about, and SET_IOMMU sets."""

    TYPE1_IOMMU = 1
    TYPE1V2_IOMMU = 3


class GroupFlags(IntFlag):
    VIABLE = 1
    """All devices of the group are bound to vfio drivers, or to none."""
    CONTAINER_SET = 2


GROUP_STATUS = struct.Struct("<II")
"""argsz, GroupFlags."""
BIND_IOMMUFD = struct.Struct("<IIiI")
"""argsz, flags, iommufd, out_devid."""
ATTACH_IOMMUFD_PT = struct.Struct("<III")
"""argsz, flags, pt_id (an IOAS or a HWPT)."""

DMA_MAP = struct.Struct("<IIQQQ")
"""argsz, flags (DMA_FLAG_*), vaddr, iova, size."""
DMA_FLAG_READ = 1
DMA_FLAG_WRITE = 2
DMA_UNMAP = struct.Struct("<IIQQ")
"""argsz, flags, iova, size (which comes back as what was unmapped)."""

DIRTY_PAGES = struct.Struct("<II")
"""argsz, flags (DIRTY_PAGES_*); for GET_BITMAP, DIRTY_BITMAP follows."""
DIRTY_PAGES_START = 1
DIRTY_PAGES_STOP = 2
DIRTY_PAGES_GET_BITMAP = 4
DIRTY_BITMAP = struct.Struct("<QQQQQ")
"""iova, size, then page size, size and address of the bitmap."""

IOMMU_INFO = struct.Struct("<IIQII")
"""``vfio_iommu_type1_info``: argsz, flags, iova_pgsizes, cap_offset, pad."""
IOMMU_INFO_CAPS = 2
MAX_IOMMU_INFO = 64 * 1024
"""Largest answer to IOMMU_GET_INFO that we believe, in bytes: it lists the ranges of addresses that can be mapped."""
MAX_IOMMU_CAPABILITIES = 32
_IOMMU_CAP_MIGRATION = 2
_CAP_HEADER = struct.Struct("<HHI")
_CAP_MIGRATION = struct.Struct("<IIQQ")
"""flags, padding, pgsize_bitmap, max_dirty_bitmap_size."""


def dirty_page_sizes(info: bytes) -> int:
    """The sizes of page in which this IOMMU logs (a bit for each), out of IOMMU_GET_INFO's answer with its
    capabilities; 0 where it logs nothing. Raises BadCapabilityChain as
    :func:`~vfiostream.uapi.vfio.parse_capabilities` does.
    """
    _argsz, flags, _pgsizes, offset, _pad = IOMMU_INFO.unpack_from(info)
    if not flags & IOMMU_INFO_CAPS:
        return 0
    for _ in range(MAX_IOMMU_CAPABILITIES):
        if offset == 0:
            return 0
        if offset < IOMMU_INFO.size or offset + _CAP_HEADER.size > len(info):
            raise BadCapabilityChain(f"capability at {offset} lies outside the {len(info)} bytes of the info")
        cap, _version, following = _CAP_HEADER.unpack_from(info, offset)
        if cap == _IOMMU_CAP_MIGRATION:
            body = offset + _CAP_HEADER.size
            if body + _CAP_MIGRATION.size > len(info):
                raise BadCapabilityChain(f"migration capability at {offset} is cut")
            sizes: int = _CAP_MIGRATION.unpack_from(info, body)[2]
            return sizes
        if following != 0 and following <= offset:
            raise BadCapabilityChain(f"capability at {offset} points back to {following}")
        offset = following
    raise BadCapabilityChain(f"chain is longer than {MAX_IOMMU_CAPABILITIES} capabilities")
