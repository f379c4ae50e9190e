"""Numbers and structures of ``include/uapi/linux/iommufd.h``: every one begins with its size. x86-64, little endian."""

from __future__ import annotations

import struct
from enum import IntEnum


class Ioctl(IntEnum):
    """``_IO(';', n)``."""

    IOAS_ALLOC = 0x3B81
    IOAS_MAP = 0x3B85
    IOAS_UNMAP = 0x3B86
    HWPT_ALLOC = 0x3B89
    HWPT_SET_DIRTY_TRACKING = 0x3B8B
    HWPT_GET_DIRTY_BITMAP = 0x3B8C


IOAS_ALLOC = struct.Struct("<III")
"""size, flags, out_ioas_id."""
IOAS_MAP = struct.Struct("<IIIIQQQ")
"""size, flags (MAP_*), ioas_id, reserved, user_va, length, iova."""
MAP_FIXED_IOVA = 1
MAP_WRITEABLE = 2
MAP_READABLE = 4
IOAS_UNMAP = struct.Struct("<IIQQ")
"""size, ioas_id, iova, length (which comes back as what was unmapped)."""
HWPT_ALLOC = struct.Struct("<IIIIIIIIQ")
"""size, flags, dev_id, pt_id, out_hwpt_id, reserved, data_type, data_len, data_uptr."""
HWPT_ALLOC_DIRTY_TRACKING = 2
SET_DIRTY_TRACKING = struct.Struct("<IIII")
"""size, flags, hwpt_id, reserved."""
DIRTY_TRACKING_ENABLE = 1
GET_DIRTY_BITMAP = struct.Struct("<IIIIQQQQ")
"""size, hwpt_id, flags, reserved, iova, length, page_size, address of the bitmap."""
