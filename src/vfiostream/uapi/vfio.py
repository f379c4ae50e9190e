"""Constants and structures of ``include/uapi/linux/vfio.h`` that vfio-user and the kernel share.

Bytes and tables only: nothing here does I/O. Little endian, x86-64 sizes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag

DEVICE_FLAGS_RESET = 1 << 0
DEVICE_FLAGS_PCI = 1 << 1

REGION_FLAG_READ = 1 << 0
REGION_FLAG_WRITE = 1 << 1
REGION_FLAG_MMAP = 1 << 2
REGION_FLAG_CAPS = 1 << 3

REGION_CAP_SPARSE_MMAP = 1
REGION_CAP_TYPE = 2

PCI_BAR0_REGION = 0
PCI_CONFIG_REGION = 7
PCI_NUM_REGIONS = 9
"""BARs 0 to 5, ROM, config space, VGA; device-specific regions follow."""

REGION_TYPE_PCI_VENDOR = 1 << 31
"""ORed with a PCI vendor id: the type name space of that vendor."""

REGION_INFO = struct.Struct("<IIIIQQ")
"""``vfio_region_info``: argsz, flags, index, cap_offset, size, offset."""
DEVICE_INFO = struct.Struct("<IIII")
"""``vfio_device_info`` as vfio-user has it: argsz, flags, num_regions, num_irqs."""

_CAP_HEADER = struct.Struct("<HHI")
_CAP_TYPE = struct.Struct("<II")
_CAP_SPARSE = struct.Struct("<II")
_AREA = struct.Struct("<QQ")

REGION_TYPE_MIGRATION = 3
REGION_SUBTYPE_MIGRATION = 1
"""The migration region of Linux 5.8 to 5.17."""

MIGRATION_INFO = struct.Struct("<IIQQQ")
"""``vfio_device_migration_info``, at the start of that region: device_state, reserved, pending_bytes, data_offset,
data_size.
"""
MIGRATION_INFO_DEVICE_STATE = 0
MIGRATION_INFO_PENDING_BYTES = 8
MIGRATION_INFO_DATA_OFFSET = 16
MIGRATION_INFO_DATA_SIZE = 24


class RegionState(IntFlag):
    """``device_state`` of that region; 0 is stopped."""

    RUNNING = 1
    SAVING = 2
    RESUMING = 4


class FeatureOperation(IntFlag):
    """What ``VFIO_DEVICE_FEATURE`` is to do with a feature."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


class Feature(IntEnum):
    """``VFIO_DEVICE_FEATURE_*``: what they carry is in the structures below."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9
    MIG_PRECOPY_INFO_V2 = 12


class MigrationFlags(IntFlag):
    """What a driver of the migration states (Linux 5.18) can do; the answer to Feature.MIGRATION."""

    STOP_COPY = 1
    P2P = 2
    PRE_COPY = 4


class MigrationState(IntEnum):
    """``enum vfio_device_mig_state``."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


FEATURE = struct.Struct("<II")
"""``vfio_device_feature``: argsz, flags (the feature's number and FeatureOperation)."""
FEATURE_MASK = 0xFFFF
"""The feature's number in ``flags``."""
FEATURE_MIGRATION = struct.Struct("<Q")
"""MigrationFlags."""
FEATURE_MIG_STATE = struct.Struct("<Ii")
"""MigrationState, data_fd."""
FEATURE_DATA_SIZE = struct.Struct("<Q")
"""stop_copy_length."""
FEATURE_DMA_LOGGING = struct.Struct("<QII")
"""page_size, num_ranges, reserved; then a pointer to the ranges (the kernel), or they (vfio-user)."""
DMA_LOGGING_RANGE = struct.Struct("<QQ")
"""iova, length."""
FEATURE_DMA_LOGGING_REPORT = struct.Struct("<QQQ")
"""iova, length, page_size; then a pointer to the bitmap (the kernel), or it (vfio-user)."""
PRECOPY_INFO = struct.Struct("<IIQQ")
"""``vfio_precopy_info``: argsz, flags, initial_bytes, dirty_bytes."""
PRECOPY_INFO_REINIT = 1
MAX_DMA_LOGGING_RANGES = 256
"""Ranges that one log takes: a page of them (``vfio_main.c``, LOG_MAX_RANGES)."""

MAX_REGION_INFO = 64 * 1024
"""Largest region info with its capabilities that we believe, in bytes."""
MAX_CAPABILITIES = 32
"""Longest capability chain that we follow."""


class BadCapabilityChain(ValueError):
    """A capability chain points outside its structure, into itself, or holds a malformed capability."""


def pack_capabilities(start: int, *, type_: tuple[int, int] | None, sparse: Sequence[tuple[int, int]] | None) -> bytes:
    """Build the chain that follows a ``vfio_region_info``; ``start`` is its offset from the start of the info."""
    bodies: list[tuple[int, bytes]] = []
    if type_ is not None:
        bodies.append((REGION_CAP_TYPE, _CAP_TYPE.pack(*type_)))
    if sparse is not None:
        areas = b"".join(_AREA.pack(*area) for area in sparse)
        bodies.append((REGION_CAP_SPARSE_MMAP, _CAP_SPARSE.pack(len(sparse), 0) + areas))
    out = bytearray()
    for position, (cap, body) in enumerate(bodies):
        end = start + len(out) + _CAP_HEADER.size + len(body)
        out += _CAP_HEADER.pack(cap, 1, 0 if position == len(bodies) - 1 else end) + body
    return bytes(out)


def parse_capabilities(
    info: bytes, cap_offset: int
) -> tuple[tuple[int, int] | None, tuple[tuple[int, int], ...] | None]:
    """Walk the chain in ``info`` (a region info with what follows it); returns (type, subtype) and the sparse areas,
    each None where there is no such capability. Unknown capabilities are passed over.

    Raises BadCapabilityChain for a chain that leaves ``info``, is longer than MAX_CAPABILITIES, does not move
    forward, or repeats a capability.
    """
    type_: tuple[int, int] | None = None
    sparse: tuple[tuple[int, int], ...] | None = None
    offset = cap_offset
    for _ in range(MAX_CAPABILITIES):
        if offset == 0:
            break
        if offset < REGION_INFO.size or offset + _CAP_HEADER.size > len(info):
            raise BadCapabilityChain(f"capability at {offset} lies outside the {len(info)} bytes of the info")
        cap, _version, following = _CAP_HEADER.unpack_from(info, offset)
        body = offset + _CAP_HEADER.size
        if cap == REGION_CAP_TYPE:
            if type_ is not None or body + _CAP_TYPE.size > len(info):
                raise BadCapabilityChain(f"type capability at {offset} is repeated or cut")
            type_ = _CAP_TYPE.unpack_from(info, body)
        elif cap == REGION_CAP_SPARSE_MMAP:
            if sparse is not None or body + _CAP_SPARSE.size > len(info):
                raise BadCapabilityChain(f"sparse mmap capability at {offset} is repeated or cut")
            count, _ = _CAP_SPARSE.unpack_from(info, body)
            first = body + _CAP_SPARSE.size
            if first + count * _AREA.size > len(info):
                raise BadCapabilityChain(f"sparse mmap capability at {offset} names {count} areas and holds fewer")
            sparse = tuple(_AREA.unpack_from(info, first + n * _AREA.size) for n in range(count))
        if following != 0 and following <= offset:
            raise BadCapabilityChain(f"capability at {offset} points back to {following}")
        offset = following
    if offset != 0:
        raise BadCapabilityChain(f"chain is longer than {MAX_CAPABILITIES} capabilities")
    return type_, sparse
