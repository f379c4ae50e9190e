"""The control region: the twelve operations of the four-region interface, one method each.

Every access to it is trapped: a call returns when the driver has done what it asks for.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from contextlib import AbstractContextManager

from vfiostream.access.contract import Access
from vfiostream.devices.operations import NO_HINTS, operation
from vfiostream.uapi.four_region import Action, ControlLayout, State

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BITMAP_REQUEST = struct.Struct("<QQ")

_SMALLER = "does this device have less memory, or another kind, than the source?"
_SIZE_HINTS = {errno.ENOSPC: _SMALLER, errno.EINVAL: _SMALLER}


class Control:
    """Region ``index`` of ``access``, with its fields where ``layout`` has them.

    Raises what an access raises.
    """

    def __init__(self, access: Access, index: int, layout: ControlLayout) -> None:
        self._access = access
        self._index = index
        self._layout = layout

    async def get_version(self) -> int:
        with self._operation("get version"):
            return await self._read(self._layout.version, _U32)

    async def get_caps(self) -> int:
        with self._operation("get caps"):
            return await self._read(self._layout.caps, _U32)

    async def set_state(self, state: State) -> None:
        with self._operation(f"set device state to {state.name}"):
            await self._write(self._layout.device_state, _U32.pack(state))

    async def get_config_size(self) -> int:
        with self._operation("get config size"):
            return await self._read(self._layout.config_size, _U64)

    async def set_config_size(self, size: int) -> None:
        with self._operation(f"set config size to {size}"):
            await self._write(self._layout.config_size, _U64.pack(size))

    async def get_config(self) -> None:
        """The driver puts a snapshot of the whole config in the config region."""
        with self._operation("get config"):
            await self._write(self._layout.config_action, _U32.pack(Action.GET_BUFFER))

    async def set_config(self) -> None:
        """The driver takes the whole config from the config region."""
        with self._operation("set config"):
            await self._write(self._layout.config_action, _U32.pack(Action.SET_BUFFER))

    async def get_memory_size(self) -> int:
        """The driver makes a capture of device memory; returns its size. To be read once a capture."""
        with self._operation("get memory size"):
            return await self._read(self._layout.memory_size, _U64)

    async def set_memory_size(self, size: int) -> None:
        with self._operation(f"set memory size to {size}", _SIZE_HINTS):
            await self._write(self._layout.memory_size, _U64.pack(size))

    async def get_memory(self, pos: int) -> None:
        """The driver puts what the capture has from ``pos`` on, a multiple of the region's length, in the region."""
        with self._operation(f"get memory chunk at {pos}"):
            await self._write(self._layout.memory_pos, _U64.pack(pos))
            await self._write(self._layout.memory_action, _U32.pack(Action.GET_BUFFER))

    async def set_memory(self, pos: int) -> None:
        """The driver takes what is in the region as what the capture has from ``pos`` on."""
        with self._operation(f"set memory chunk at {pos}"):
            await self._write(self._layout.memory_pos, _U64.pack(pos))
            await self._write(self._layout.memory_action, _U32.pack(Action.SET_BUFFER))

    async def get_bitmap(self, start: int, pages: int) -> None:
        """The driver puts the dirty bitmap of ``pages`` pages of guest memory from ``start`` in the bitmap region."""
        with self._operation(f"get dirty bitmap of {pages} pages at {start:#x}"):
            await self._write(self._layout.start_addr, _BITMAP_REQUEST.pack(start, pages))

    def _operation(self, what: str, hints: Mapping[int, str] = NO_HINTS) -> AbstractContextManager[None]:
        return operation(self._access.name, what, hints)

    async def _read(self, offset: int, field: struct.Struct) -> int:
        raw = bytearray(field.size)
        await self._access.read_into(self._index, offset, memoryview(raw))
        value: int = field.unpack(raw)[0]
        return value

    async def _write(self, offset: int, data: bytes) -> None:
        await self._access.write(self._index, offset, data)
